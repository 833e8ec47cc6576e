"""Evaluate a trained model: bits per byte on train and validation text, and samples.

The result also goes into `evaluation.json` in the run's folder.

python -m scripts.base_eval --run-name=d4
"""

import json

from tqdm import tqdm

from nanotrain import checkpoint, config, dataloader, dataset, errors, loss_eval, paths, runtime
from nanotrain.engine import generate
from nanotrain.errors import UserError

# --- settings
RUN_NAME = ""  # folder under NANOTRAIN_DIR/runs; empty: the run that was saved last
BEST = False  # its checkpoint with the best validation bits per byte, not the newest
DATA_DIR = ""  # folder of shards; empty: the one the run was trained on
DEVICE = "auto"  # auto, cuda, mps or cpu
DTYPE = "auto"  # of the matrix products: auto, bfloat16, float16 or float32
DEVICE_BATCH_SIZE = 16  # rows of one forward pass
EVAL_TOKENS = 262144  # of each kind of text, or all of it where there is less
SAMPLE_TOKENS = 96  # of each sample
# ------------

PROMPTS = ("import os\n", "def __init__(self", "class", "The", "If the")


def main():
    rt = runtime.start(DEVICE, DTYPE)
    run_dir = rt.on_main(lambda: checkpoint.find_run(RUN_NAME))
    model, tokenizer, meta = rt.together(lambda: checkpoint.load_model(run_dir, rt.device, BEST))
    shards = rt.together(lambda: dataset.open_shards(paths.data_dir(DATA_DIR or meta["data_dir"])))
    same_data = rt.on_main(lambda: dataset.fingerprint(shards)) == meta["data"]
    if rt.is_main:
        print(f"{run_dir}, step {meta['step']}{'' if same_data else ', on other data than it was trained on'}")
    token_bytes = tokenizer.token_bytes()
    seq_len = model.config.max_seq_len
    if EVAL_TOKENS < seq_len:
        raise UserError(f"--eval-tokens={EVAL_TOKENS}: less than one row of this model, which has {seq_len}")
    if DEVICE_BATCH_SIZE < 1:
        raise UserError(f"--device-batch-size={DEVICE_BATCH_SIZE}: at least 1")
    result = {"step": meta["step"], "tokens": meta["step"] * meta["total_batch_size"]}
    for split, path in (("train", shards.train[0].path), ("val", shards.validation.path)):
        rows = rt.together(lambda path=path: dataloader.validation_rows(path, tokenizer, seq_len, EVAL_TOKENS))
        with tqdm(
            total=-(-len(rows) // rt.world_size), desc=split, leave=False, disable=None if rt.is_main else True
        ) as bar:
            result[f"{split}_bpb"] = loss_eval.bits_per_byte(
                model, rows, token_bytes, rt, DEVICE_BATCH_SIZE, bar.update
            )
        if rt.is_main:
            print(f"{split:<5} bpb {result[f'{split}_bpb']:.4f} on {rows[:, 1:].size:,} tokens")
    if rt.is_main:
        result["samples"] = samples(model, tokenizer)
        with dataset.atomic_file(run_dir / "evaluation.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rt.close()


def samples(model, tokenizer):
    """[prompt and continuation] for each of PROMPTS, printed as they come."""
    found = []
    for prompt in PROMPTS:
        tokens = list(generate(model, [tokenizer.bos, *tokenizer.encode(prompt)], SAMPLE_TOKENS, stop=(tokenizer.bos,)))
        found.append(prompt + tokenizer.decode(tokens))
        print(f"---- sample\n{found[-1]}")
    return found


if __name__ == "__main__":
    errors.run(lambda: config.override(globals()), main)
