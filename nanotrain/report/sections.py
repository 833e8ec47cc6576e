"""Tables and texts of a report, as plain data for the template. Parts that were not recorded are empty."""

import itertools
import math
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanotrain import config, dataset
from nanotrain.report.data import Run

NOT_REPEATED = ("RUN_NAME", "RESUME", "ALLOW_CHANGE", "DRY_RUN", "REPORT", "TOKENIZER_DIR")
MAX_BITS = 12  # bits of a token at which its colour is darkest
MAX_SAMPLES = 10  # samples shown per prompt


def build(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything in the template but the pictures: sentences (notes), and

    tables: {title: (heads, [(label, its value in each run, whether to mark the row)])}
    texts: {title: [(run, {heading: [(label, [(text, CSS class, tooltip)])]})]}
    """
    tables, texts = {}, {title: [(run.name, part(run)) for run in runs] for title, part in TEXTS.items()}
    for title, part in TABLES.items():
        columns = {run.name: part(run) for run in runs}
        if part is settings:
            columns["default"] = settings(runs[0], "defaults")
        marks, labels = part in (settings, recipe, environment), dict.fromkeys(itertools.chain(*columns.values()))
        rows = [(label, [facts.get(label, "") for facts in columns.values()]) for label in labels]
        rows = [(label, cells, marks and len(set(cells)) > 1) for label, cells in rows]
        tables[title] = (list(columns), sorted(rows, key=lambda row: not row[2]))
    notes = [f"{run.name}: {problem}." for run in runs for problem in run.problems]
    return {"tables": tables, "texts": texts, "notes": notes, "max_bits": MAX_BITS}


def summary(run: Run) -> dict[str, str]:
    """{question: answer} for the first screen."""
    found, evaluation, measured = {}, run.evaluation, run.bits_per_byte()
    if "doc_bpb" in evaluation:
        others = "".join(f"; {name} {bpb:.2f}" for name, bpb in evaluation.get("compared_bpb", {}).items())
        found["How good is it?"] = f"{evaluation['doc_bpb']:.4f} bits per byte on whole validation documents{others}"
    elif measured:
        found["How good is it?"] = f"{measured[max(measured)]:.4f} bits per byte on validation sequences"
    if last := max(run.metrics["train/loss"], default=0):
        minutes, tokens = run.minutes([last])[0], run.tokens([last])[0]
        found["How long did it train?"] = f"{minutes:,.1f} minutes, {last:,} steps, {tokens / 1e6:,.1f} M tokens"
    if len(measured) > 1:
        (before, earlier), (after, latest) = list(measured.items())[-2:]
        answer = f"{'yes' if latest < earlier else 'no'}, {latest - earlier:+.4f} bits per byte"
        found["Is it still improving?"] = f"{answer} from step {before:,} to {after:,}"
    return found


def results(run: Run) -> dict[str, str]:
    """{label: value} of a run's main numbers."""
    found, evaluation, core, loss = {}, run.evaluation, run.core(), run.column("loss")
    if measured := run.bits_per_byte():
        for label, step in (("last", max(measured)), ("best", min(measured, key=measured.get))):
            found[f"bits per byte, validation sequences, {label}"] = f"{measured[step]:.4f} (step {step:,})"
    for label, name in (("whole validation documents", "doc_bpb"), ("training text", "train_bpb")):
        if name in evaluation:
            found[f"bits per byte, {label}"] = f"{evaluation[name]:.4f} (step {evaluation['step']:,})"
    if core:
        score = f"{core['core_metric']:.4f} ± {core['standard_error']:.4f} (step {core['step']:,})"
        found["CORE" if core["is_core"] else "tasks"] = score
    if len(last := loss[np.isfinite(loss)][-20:]):
        found["training loss, mean of the last 20 steps, nats per token"] = f"{last.mean():.4f}"
    if len(loss):
        mfu = np.median(run.column("mfu"))
        found["tokens"] = f"{run.tokens([max(run.metrics['train/loss'])])[0]:,.0f}"
        found["epoch reached"] = f"{run.column('epoch')[-1] + 1:.0f}"
        found["tokens per second, median"] = f"{np.median(run.column('tok_per_sec')):,.0f}"
        if not math.isnan(mfu):
            found["MFU, median"] = f"{mfu:.1%}"
        if skipped := np.isnan(loss + run.column("grad_norm")).sum():
            found["updates skipped because loss or gradient was not finite"] = f"{skipped:,}"
    if plan := run.config.get("plan"):
        found["tokens per batch"] = f"{plan['total_batch_size']:,}"
        found["parameters"] = f"{sum(plan['parameters'].values()):,}"
    return found


def step_times(run: Run) -> dict[str, str]:
    """{part of a step: its median time and share of the step}."""
    step, loader, update = map(run.column, ("seconds", "loader_seconds", "optimizer_seconds"))
    rest = step - loader - np.nan_to_num(update)  # GPU runs do not measure the update
    parts = {"forward and backward": rest, "waiting for data": loader, "optimizer": update}
    medians = {part: np.nanmedian(seconds) for part, seconds in parts.items() if np.isfinite(seconds).any()}
    return {part: f"{1000 * time:,.1f} ms, {time / np.median(step):.1%}" for part, time in medians.items()}


def tasks(run: Run) -> dict[str, str]:
    """{task: score}."""
    return {
        label: f"{task['accuracy']:.3f} ± {task['standard_error']:.3f} of {task['num_items']:,} items "
        f"(guessing {task['baseline']:.3f}): {task['centered']:.3f}"
        for label, task in sorted(run.core().get("tasks", {}).items())
    }


def settings(run: Run, part: str = "settings") -> dict[str, str]:
    """{NAME: value} of the run's settings, or of the "defaults" in its script, as on the command line."""
    return {name: _value(value) for name, value in run.config.get(part, {}).items()}


def _value(value):
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def recipe(run: Run) -> dict[str, str]:
    """{name: value} of the recipe, as given or chosen."""
    chosen = run.config.get("recipe", {}).items()
    return {name: f"{value:.4g}" if isinstance(value, float) else _value(value) for name, value in chosen}


def environment(run: Run) -> dict[str, str]:
    """{label: value} of versions, hardware, model, and hashes of data and tokenizer."""
    if not run.config:
        return {}
    data, known = run.config["data"], run.config["environment"] | run.config["model_config"]
    found = {name.replace("_", " "): _value(value) for name, value in known.items()}
    size = sum(file["bytes"] for file in data["files"].values()) / 1e6
    found["data"] = f"{len(data['files'])} shards, {size:,.1f} MB, validation {data['validation']}"
    found["data, SHA-256 of all names, sizes and hashes"] = dataset.hash_of(data)
    return found | {"tokenizer, SHA-256": run.config["tokenizer_sha256"]}


def samples(run: Run) -> dict[str, list]:
    """Generated texts: for each prompt by step, and those of base_eval."""
    found = {}
    for record in run.records:
        for sample in record.get("samples", ()):
            pieces = [(sample["prompt"], "prompt", ""), (sample["text"], "", "")]
            found.setdefault(f"Prompt {sample['prompt']!r}", []).append((f"step {record['step']:,}", pieces))
    for heading, shown in found.items():  # evenly spaced, including the first and the last
        found[heading] = [shown[round(n)] for n in np.linspace(0, len(shown) - 1, min(MAX_SAMPLES, len(shown)))]
    if texts := run.evaluation.get("samples"):
        found["From base_eval"] = [(f"step {run.evaluation['step']:,}", [(text, "", "")]) for text in texts]
    return found


def documents(run: Run) -> dict[str, list]:
    """The newest validation documents with the most and the fewest bits per byte, with the bits of each token."""
    found, record = {}, next((record for record in reversed(run.records) if "documents" in record), {})
    for kind, chosen in record.get("documents", {}).items():
        found[f"The {kind} documents"] = shown = []
        for document in chosen:
            pieces = [(text, f"b{min(int(bits), MAX_BITS)}", f"{bits:.1f} bits") for text, bits in document["tokens"]]
            shown.append((f"step {record['step']:,}: {document['bpb']:.3f} bits per byte", pieces))
    return found


def commands(run: Run) -> dict[str, list]:
    """Commands that repeat the run."""
    if not run.config:
        return {}
    code, settings = run.config["environment"], run.config["settings"]
    edited = "  # with changes" if code.get("changed") else ""
    checkout = f"git checkout {shlex.quote(code['commit'])}{edited}\n" if code.get("commit") else ""
    why = "Same sequences on any machine; bit-identical on this one, with these versions and as many processes"
    found = {why: [("", [(checkout + command(run, settings), "", "")])]}
    if settings["TARGET_MINUTES"] and run.metrics["train/loss"]:
        model, batch = run.config["model_config"], run.config["plan"]["total_batch_size"]
        steps = {"TARGET_MINUTES": 0.0, "EVALUATIONS_AFTER": 0.0, "NUM_ITERATIONS": max(run.metrics["train/loss"])}
        shape = {"DEPTH": model["num_layers"], "MAX_SEQ_LEN": model["max_seq_len"], "TOTAL_BATCH_SIZE": batch}
        why = "With a time limit, depth and steps depend on the machine. With these settings they do not"
        found[why] = [("", [(command(run, settings | steps | shape), "", "")])]
    return found


def command(run: Run, settings: dict[str, Any]) -> str:
    """The command that trains a new run with these settings and the tokenizer in the run's folder."""
    known = run.config["defaults"]
    changed = {name: value for name, value in settings.items() if value != known.get(name)}
    ranks = run.config["environment"].get("world_size", 1)
    launch = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    flags = [f"{config.flag_of(name)}={_value(value)}" for name, value in changed.items() if name not in NOT_REPEATED]
    flags += [f"--tokenizer-dir={run.folder}", f"--run-name={run.folder.name}-again"]
    return " \\\n    ".join([f"{launch} -m scripts.base_train", *map(shlex.quote, flags)])


TABLES = {
    "Summary": summary, "Results": results, "Time per step": step_times, "Tasks": tasks, "Settings": settings,
    "Recipe": recipe, "Environment and data": environment,
}  # fmt: skip
TEXTS = {"Samples": samples, "Validation text": documents, "Reproduce": commands}
