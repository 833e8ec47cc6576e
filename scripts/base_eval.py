"""Evaluate a trained model: bits per byte on train and validation text, CORE tasks, and samples.

Results are also written to `evaluation.json` in the run folder and to the run's report.

    python -m scripts.base_eval --run-name=d4
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval --run-name=d20
"""

import contextlib
import tempfile
from functools import partial

import numpy as np

from nanotrain import checkpoint, config, core_bundle, core_eval, dataloader, dataset, errors, loss_eval, paths, report
from nanotrain.dist import DistContext, faults_as_sentences, init_distributed
from nanotrain.engine import samples
from nanotrain.files import write_json
from nanotrain.gpt import GPT
from nanotrain.terminal import progress_bar
from nanotrain.tokenizer import BPETokenizer

# --- settings
RUN_NAME = ""  # folder under NANOTRAIN_DIR/runs; empty: the most recently saved run
BEST = False  # checkpoint with the best validation bits per byte instead of the newest
STEP = 0  # step of the checkpoint; 0: the newest
DATA_DIR = ""  # folder of shards; empty: the one the run was trained on
DEVICE = "auto"  # auto, cuda, mps or cpu
DTYPE = "auto"  # dtype of matrix products: auto, bfloat16, float16 or float32
DEVICE_BATCH_SIZE = 16  # sequences per forward pass
EVAL_TOKENS = 262144  # maximum number of train and of validation tokens
EVAL_DOCUMENT_BYTES = 600000  # UTF-8 bytes of whole validation documents to evaluate on; 0: off
CORE = True  # evaluation on the tasks of CORE or CORE_BUNDLE
CORE_BUNDLE = ""  # folder or zip of tasks; own: tasks made from the validation shard; empty: public CORE (download)
CORE_MAX_PER_TASK = 500  # maximum number of items per task; 0: all, as in published scores
SAMPLE_TOKENS = 96  # tokens per sample
REPORT = True  # update of the run's report
# ------------


@faults_as_sentences(when_full=": try a smaller --device-batch-size")
def main() -> None:
    config.check_numbers(config.snapshot(__name__), at_least_one=("DEVICE_BATCH_SIZE",))
    dist = init_distributed(DEVICE, DTYPE)
    run_dir = dist.on_rank0(lambda: checkpoint.find_run(RUN_NAME))
    model, tokenizer, meta = dist.on_all_ranks(lambda: checkpoint.load_model(run_dir, dist.device, BEST, STEP))
    dist.on_rank0(lambda: tempfile.TemporaryFile(dir=run_dir).close())  # fail before the work, not after
    shards = dist.on_all_ranks(lambda: dataset.open_shards(paths.data_dir(DATA_DIR or meta["data_dir"])))
    same_data = dist.on_rank0(lambda: dataset.fingerprint(shards)) == meta["data"]
    dist.print0(f"{run_dir}, step {meta['step']}{'' if same_data else ', on other data than it was trained on'}")
    bundle = CORE and core_bundle.obtain(CORE_BUNDLE, shards.validation.path, dist, CORE_MAX_PER_TASK)
    result = {"step": meta["step"], "tokens": meta["loader"]["next_sequence"] * model.config.max_seq_len}
    result |= text_bits_per_byte(dist, model, tokenizer, shards)
    if bundle:
        num_items = sum(len(task.items) for task in bundle.tasks)
        with progress_bar(None, "tasks", -(-num_items // dist.world_size), dist.is_rank0) as bar:
            found = core_eval.evaluate(model, tokenizer, bundle, dist, DEVICE_BATCH_SIZE, bar.update)
        dist.print0(core_eval.table(found))
        dist.print0(core_eval.headline(found))
        result["core"] = {**found, "max_per_task": CORE_MAX_PER_TASK}
    if dist.is_rank0:
        result["samples"] = []
        for prompt, text in samples(model, tokenizer, SAMPLE_TOKENS):
            result["samples"].append(prompt + text)
            print(f"---- sample, prompt {prompt!r}\n{prompt}{text}")
        write_json(run_dir / "evaluation.json", result)
        if REPORT:
            print(report.attempt(run_dir))
    dist.close()


def text_bits_per_byte(dist: DistContext, model: GPT, tokenizer: BPETokenizer, shards: dataset.Shards) -> dict:
    """{train_bpb, val_bpb, doc_bpb} of packed text and whole validation documents, and compared_bpb of the latter."""
    seq_len, token_bytes, found = model.config.max_seq_len, tokenizer.token_bytes(), {}

    def measure(split, windows, what):
        with progress_bar(None, split, -(-len(windows) // dist.world_size), dist.is_rank0) as bar:
            bpb = loss_eval.bits_per_byte(model, windows, token_bytes, dist, DEVICE_BATCH_SIZE, bar.update)
        found[f"{split}_bpb"] = bpb
        dist.print0(f"{split:<5} bpb {bpb:.4f} on {what}")

    for split, part in (("train", shards.train), ("val", (shards.validation,))):
        read = partial(dataloader.packed_sequences, [shard.path for shard in part], tokenizer, seq_len, EVAL_TOKENS)
        windows = loss_eval.packed_windows(dist.on_all_ranks(read))
        measure(split, windows, f"{len(windows) * seq_len:,} tokens")
    if EVAL_DOCUMENT_BYTES:
        read = partial(dataloader.validation_documents, shards.validation.path, tokenizer, EVAL_DOCUMENT_BYTES)
        documents, num_cut = dist.on_all_ranks(read)
        windows = loss_eval.document_windows(documents, tokenizer.bos, seq_len)
        truncated = f", {num_cut} of them truncated" if num_cut else ""
        measure("doc", windows, f"{len(documents):,} whole validation documents{truncated}")
        text = "".join(tokenizer.decode(ids.tolist()) for ids in documents)
        found["compared_bpb"] = compared_bits_per_byte(text.encode())
        for name, bpb in found["compared_bpb"].items():
            dist.print0(f"      bpb {bpb:.4f} with {name} on the same text")
    return found


def compared_bits_per_byte(text: bytes) -> dict[str, float]:
    """{method without a model: its bits per byte of a text}."""
    shares = np.unique(np.frombuffer(text, np.uint8), return_counts=True)[1] / len(text)
    found = {"byte frequencies": -float(shares @ np.log2(shares))}
    with contextlib.suppress(ImportError):  # some builds of Python have no lzma
        import lzma

        found["xz -9"] = 8 * len(lzma.compress(text, preset=9)) / len(text)
    return found


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)
