"""Compare nanotrain's evaluation with lm-evaluation-harness (`pip install -e '.[lm-eval]'`) on the same tasks.

    python dev/harness.py --run-name=r --out=TASKS             write the tasks and nanotrain's results
    lm_eval run ...                                            printed by the first command; needs no network
    python dev/harness.py --out=TASKS --found=TASKS/found      compare item by item

Both see the same tokens. A document is the first whole lines of a validation document that fit into one sequence. As in
core_eval, a choice starts where the tokens of the choices differ and is scored by the mean loss of its tokens; the
harness has no such metric, so the tasks bring their own.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from nanotrain import checkpoint, config, core_bundle, core_eval, dataset, errors, loss_eval, paths
from nanotrain.dist import init_distributed
from nanotrain.errors import UserError

# --- settings
RUN_NAME = ""  # folder under NANOTRAIN_DIR/runs; empty: the run with the newest checkpoint
DATA_DIR = ""  # folder of shards; empty: the run's training data
BUNDLE = ""  # folder or zip of a CORE bundle; empty: tasks made from the run's validation shard
TASKS = ""  # multiple-choice tasks to use, as in copa,arc_easy; empty: all
ITEMS = 150  # maximum number of items per task
DOCUMENTS = 200  # number of validation documents
OUT = ""  # folder for the tasks
FOUND = ""  # folder that lm_eval wrote to (--output_path)
# ------------

PICK = '''"""The choice whose tokens have the lowest mean loss."""


def process_results(doc, results):
    means = [-likelihood / length for (likelihood, _), length in zip(results, doc["lengths"])]
    pick = min(range(len(means)), key=lambda choice: (means[choice] > min(means) + 1e-5, choice))
    return {"acc": float(pick == doc["gold"])}
'''
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
process_results: !function nanotrain_pick.process_results
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXT = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
"""
# The harness adds BOS to documents itself, and keeps one more token of a truncated prompt than core_eval.
COMMANDS = """
With the exported folder as $EXPORTED:

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
lm_eval run --model hf --device cpu --batch_size 16 --include_path {out} --output_path {out}/found \\
    --model_args pretrained=$EXPORTED,dtype=float32,trust_remote_code=True,max_length={length},add_bos_token=False \\
    --tasks nanotrain_documents
lm_eval run --model hf --device cpu --batch_size 16 --include_path {out} --output_path {out}/found \\
    --model_args pretrained=$EXPORTED,dtype=float32,trust_remote_code=True,max_length={choice_length} \\
    --tasks {tasks} --log_samples"""


def main():
    if not OUT:
        raise UserError("no folder for the tasks: give one, as in --out=tasks")
    if FOUND:
        compare(Path(OUT).expanduser(), Path(FOUND).expanduser())
        return
    out = Path(OUT).expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer, meta = checkpoint.load_model(checkpoint.find_run(RUN_NAME))
    dist = init_distributed("cpu", "float32")
    shard = dataset.open_shards(paths.data_dir(DATA_DIR or meta["data_dir"])).validation.path
    bundle = core_bundle.read(BUNDLE or core_bundle.own(shard), ITEMS)
    named = {task.label: task for task in bundle.tasks if task.kind == core_bundle.MULTIPLE_CHOICE}
    labels = TASKS.split(",") if TASKS else list(named)
    missing = [label for label in labels if label not in named]
    if missing:
        raise UserError(f"--tasks={TASKS}: no multiple-choice task {missing[0]}; tasks: {', '.join(named)}")
    expected = {"documents": documents(out, shard, model, tokenizer, dist)}
    print(f"{'documents':<28}{expected['documents']:.6f} bits per byte")
    (out / "nanotrain_pick.py").write_text(PICK, encoding="utf-8")
    for label in labels:
        expected[label] = choices(out, named[label], model, tokenizer, dist)
        print(f"{label:<28}{sum(expected[label].values()):.0f} of {len(expected[label])} right")
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    length, tasks = model.config.max_seq_len, ",".join(f"nanotrain_{label}" for label in labels)
    print(COMMANDS.format(length=length, choice_length=length - 1, out=out, tasks=tasks))


def documents(out, shard, model, tokenizer, dist):
    """Write the documents and return their bits per byte."""
    texts = []
    for text in dataset.read_shards([shard]):
        lines = text.splitlines(keepends=True)
        while lines and len(tokenizer.encode("".join(lines))) > model.config.max_seq_len:
            lines = lines[: len(lines) // 2]
        if lines:
            texts.append("".join(lines))
        if len(texts) == DOCUMENTS:
            break
    write(out, "nanotrain_documents", TEXT, [{"text": text} for text in texts])
    ids = [tokenizer.encode(text) for text in texts]
    windows = loss_eval.document_windows(ids, tokenizer.bos, model.config.max_seq_len)
    assert len(windows) == len(texts), "each document fits into one window"
    return loss_eval.bits_per_byte(model, windows, tokenizer.token_bytes(), dist, 16)


def choices(out, task, model, tokenizer, dist):
    """Write the items of a task and return {item number: whether core_eval picks the right choice}."""
    rows, right = [], {}
    for index, (options, gold) in enumerate(task.items):
        texts = core_eval.prompts(task, index)
        encoded = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
        sequences = core_eval.sequences(task.kind, encoded, model.config.max_seq_len)
        lengths = [len(ids) - start for ids, start in sequences]
        pick = core_eval._first_least([mean_loss(model, ids, start) for ids, start in sequences])
        right[index] = pick == gold
        common = encoded[0][1 : len(encoded[0]) - lengths[0]]
        context = tokenizer.decode(common)
        # To find where a choice starts, the harness encodes the context alone, without trailing spaces.
        if context != context.rstrip() or tokenizer.encode(context) != common or not texts[0].startswith(context):
            context, lengths = texts[0][: len(texts[0]) - len(options[0][1])], None
        parts = [text[len(context) :] for text in texts]
        rows.append({"number": index, "context": context, "choices": parts, "gold": gold, "lengths": lengths})
    whole = core_eval.evaluate(model, tokenizer, core_bundle.Bundle([task], ""), dist, 16)
    assert round(whole["accuracy"] * len(task.items)) == sum(right.values()), "differs from scripts.base_eval"
    kept = [row for row in rows if row["lengths"]]
    print(f"{task.label:<28}{len(rows) - len(kept)} items left out: their choices differ where the harness cuts")
    write(out, f"nanotrain_{task.label}", CHOICE, kept)
    return {row["number"]: right[row["number"]] for row in kept}


def mean_loss(model, ids, start):
    """Mean loss in nats of the tokens from `start` on."""
    tokens, places = torch.tensor([ids]), torch.arange(1, len(ids))[None]
    return model.token_losses(tokens[:, :-1], tokens[:, 1:], places >= start)[0, start - 1 :].double().mean().item()


def write(out, name, kind, rows):
    path = out / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (out / f"{name}.yaml").write_text(TASK.format(name=name, file=json.dumps(str(path))) + kind, encoding="utf-8")


def compare(out, found):
    """Print how far the harness and nanotrain agree."""
    expected, compared = json.loads((out / "expected.json").read_text(encoding="utf-8")), 0
    for path in sorted(found.rglob("results_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))["results"].get("nanotrain_documents")
        if result:
            ours, theirs = expected["documents"], result["bits_per_byte,none"]
            compared += 1
            print(f"{'documents':<28}{ours:.6f} and {theirs:.6f} bits per byte, difference {abs(ours - theirs):.1e}")
    for label in sorted(expected.keys() - {"documents"}):
        for path in sorted(found.rglob(f"samples_nanotrain_{label}_*.jsonl")):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            theirs = {str(row["doc"]["number"]): bool(row["acc"]) for row in rows}
            ours = expected[label]
            compared += 1
            same = sum(theirs.get(number) == answer for number, answer in ours.items())
            print(
                f"{label:<28}{same} of {len(ours)} items equal, {sum(ours.values())} and {sum(theirs.values())} right"
            )
    if not compared:
        raise UserError(f"--found={found}: no results of these tasks; run the printed commands first")


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)
