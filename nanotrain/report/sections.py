"""What a report says about each run, as plain data for the template. A part that was not recorded is empty."""

import itertools
import math
import shlex
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from nanotrain import config, dataset
from nanotrain.report.data import Run

NOT_REPEATED = ("RUN_NAME", "RESUME", "ALLOW_CHANGE", "DRY_RUN", "REPORT", "TOKENIZER_DIR")
MOST_BITS = 12  # of a token, at which its colour is the darkest
SHOWN = 10  # samples of a prompt, at most


def build(runs: Sequence[Run]) -> dict[str, Any]:
    """What the template shows beside the pictures: sentences (notes), and

    tables: {title: (heads, [(what, its value in each run, whether to mark the row)])}
    texts: {title: [(run, {heading: [(label, [(piece, its CSS class, its tooltip)])]})]}
    """
    tables, texts = {}, {title: [(run.name, part(run)) for run in runs] for title, part in TEXTS.items()}
    for title, part in TABLES.items():
        columns = {run.name: part(run) for run in runs}
        if part is settings:
            columns["default"] = settings(runs[0], "defaults")
        rows = []
        for what in dict.fromkeys(itertools.chain(*columns.values())):
            cells = [facts.get(what, "") for facts in columns.values()]
            rows.append((what, cells, part in (settings, recipe, environment) and len(set(cells)) > 1))
        tables[title] = (list(columns), sorted(rows, key=lambda row: not row[2]))
    notes = [f"{run.name}: {complaint}." for run in runs for complaint in run.complaints]
    return {"tables": tables, "texts": texts, "notes": notes, "most_bits": MOST_BITS}


def summary(run: Run) -> dict[str, str]:
    """{question: answer} for the first screen."""
    found, evaluation, steps, measured = {}, run.evaluation, run.metrics["train/loss"], run.bits_per_byte()
    if "doc_bpb" in evaluation:
        others = "".join(f"; {name} {bpb:.2f}" for name, bpb in evaluation.get("compared_bpb", {}).items())
        found["How good is it?"] = f"{evaluation['doc_bpb']:.4f} bits per byte on whole validation documents{others}"
    elif measured:
        found["How good is it?"] = f"{measured[max(measured)]:.4f} bits per byte on validation sequences"
    if steps:
        minutes, tokens = run.minutes([max(steps)])[0], run.tokens([max(steps)])[0]
        found["How long did it train?"] = f"{minutes:,.1f} minutes, {max(steps):,} steps, {tokens / 1e6:,.1f} M tokens"
    if len(measured) > 1:
        (before, earlier), (last, latest) = list(measured.items())[-2:]
        answer = f"{'yes' if latest < earlier else 'no'}, {latest - earlier:+.4f} bits per byte"
        found["Is it still improving?"] = f"{answer} from step {before:,} to {last:,}"
    return found


def results(run: Run) -> dict[str, str]:
    """{what: value} of the numbers that say most about a run."""
    found, evaluation, core, loss = {}, run.evaluation, run.core(), run.column("loss")
    if measured := run.bits_per_byte():
        best = min(measured, key=measured.get)
        found["bits per byte, validation sequences, last"] = f"{measured[max(measured)]:.4f} (step {max(measured):,})"
        found["bits per byte, validation sequences, best"] = f"{measured[best]:.4f} (step {best:,})"
    for what, name in (("whole validation documents", "doc_bpb"), ("training text", "train_bpb")):
        if name in evaluation:
            found[f"bits per byte, {what}"] = f"{evaluation[name]:.4f} (step {evaluation['step']:,})"
    if core:
        name = "CORE" if core["is_core"] else "tasks"
        found[name] = f"{core['core_metric']:.4f} ± {core['standard_error']:.4f} (step {core['step']:,})"
    if len(last := loss[np.isfinite(loss)][-20:]):
        found["training loss, last 20 steps, nats per token"] = f"{last.mean():.4f}"
    if len(loss):
        last_step, mfu = max(run.metrics["train/loss"]), np.median(run.column("mfu"))
        found["steps"] = f"{last_step:,}"
        found["tokens"] = f"{run.tokens([last_step])[0]:,.0f}"
        found["epoch reached"] = f"{run.column('epoch')[-1] + 1:.0f}"
        time = timedelta(seconds=round(np.nansum(run.column("seconds"))))
        found["time of all steps, without evaluations and checkpoints"] = str(time)
        found["tokens per second, median"] = f"{np.median(run.column('tok_per_sec')):,.0f}"
        if not math.isnan(mfu):
            found["MFU, median"] = f"{mfu:.1%}"
        if lost := np.isnan(loss + run.column("grad_norm")).sum():
            found["updates skipped because loss or gradient was not finite"] = f"{lost:,}"
    if plan := run.config.get("plan"):
        found["tokens per batch"] = f"{plan['total_batch_size']:,}"
        found["parameters"] = f"{sum(plan['parameters'].values()):,}"
    return found


def step_times(run: Run) -> dict[str, str]:
    """{part of a step: its median time, and how much of the whole that is}."""
    whole, waiting, update = map(run.column, ("seconds", "loader_seconds", "optimizer_seconds"))
    rest = whole - waiting - np.nan_to_num(update)  # on a GPU the update is not measured
    parts = {"forward and backward": rest, "waiting for data": waiting, "optimizer": update}
    medians = {part: np.nanmedian(seconds) for part, seconds in parts.items() if np.isfinite(seconds).any()}
    return {part: f"{1000 * time:,.1f} ms, {time / np.median(whole):.1%}" for part, time in medians.items()}


def evaluations(run: Run) -> dict[str, str]:
    """{step: what was measured during training}."""
    bpb, core, found = run.metrics["val/bpb"], run.metrics["core/core_metric"], {}
    for step in sorted(bpb.keys() | core.keys()):
        values = [f"{bpb[step]:.4f} bits per byte"] if step in bpb else []
        values += [f"CORE or tasks {core[step]:.4f}"] if step in core else []
        found[f"step {step:,}"] = f"{', '.join(values)} after {run.tokens([step])[0]:,.0f} tokens"
    return found


def tasks(run: Run) -> dict[str, str]:
    """{task: its score} of CORE, or of another bundle."""
    return {
        label: f"{task['accuracy']:.3f} ± {task['standard_error']:.3f} of {task['num_items']:,} items "
        f"(guessing {task['baseline']:.3f}): {task['centered']:.3f}"
        for label, task in sorted(run.core().get("tasks", {}).items())
    }


def settings(run: Run, part: str = "settings") -> dict[str, str]:
    """{NAME: value} of the settings as on the command line, or of the defaults in the script that made the run."""
    return {name: _value(value) for name, value in run.config.get(part, {}).items()}


def _value(value):
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def recipe(run: Run) -> dict[str, str]:
    """{what: value} of the numbers of the optimization, as given or chosen."""
    chosen = run.config.get("recipe", {}).items()
    return {name: f"{value:.4g}" if isinstance(value, float) else _value(value) for name, value in chosen}


def environment(run: Run) -> dict[str, str]:
    """{what: value} of versions, hardware and model, and the fingerprints of data and tokenizer."""
    if not run.config:
        return {}
    data, known = run.config["data"], run.config["environment"] | run.config["model_config"]
    found = {name.replace("_", " "): _value(value) for name, value in known.items()}
    size = sum(file["bytes"] for file in data["files"].values()) / 1e6
    found["data"] = f"{len(data['files'])} shards, {size:,.1f} MB, validation {data['validation']}"
    found["data, SHA-256 of all names, sizes and hashes"] = dataset.hash_of(data)
    return found | {"tokenizer, SHA-256": run.config["tokenizer_sha256"]}


def samples(run: Run) -> dict[str, list]:
    """What the model wrote, by step under each prompt, and for base_eval."""
    found = {}
    for record in run.records:
        for sample in record.get("samples", ()):
            pieces = [(sample["prompt"], "prompt", ""), (sample["text"], "", "")]
            found.setdefault(f"Prompt {sample['prompt']!r}", []).append((f"step {record['step']:,}", pieces))
    for heading, shown in found.items():
        places = np.linspace(0, len(shown) - 1, min(SHOWN, len(shown)))
        found[heading] = [shown[round(place)] for place in places]  # evenly, the first and the last among them
    if texts := run.evaluation.get("samples"):
        found["From base_eval"] = [(f"step {run.evaluation['step']:,}", [(text, "", "")]) for text in texts]
    return found


def documents(run: Run) -> dict[str, list]:
    """The newest validation documents of most and of fewest bits per byte, token by token."""
    found, record = {}, next((record for record in reversed(run.records) if "documents" in record), {})
    for kind, few in record.get("documents", {}).items():
        found[f"The {kind} documents"] = shown = []
        for document in few:
            tokens = document["tokens"]
            pieces = [(text, f"b{min(int(bits), MOST_BITS)}", f"{bits:.1f} bits") for text, bits in tokens]
            shown.append((f"step {record['step']:,}: {document['bpb']:.3f} bits per byte", pieces))
    return found


def commands(run: Run) -> dict[str, list]:
    """How to make the run again."""
    if not run.config:
        return {}
    commit, known = run.config["environment"].get("commit"), run.config["defaults"]
    changed = {name: value for name, value in run.config["settings"].items() if value != known.get(name)}
    edited = "  # with changes" if run.config["environment"].get("changed") else ""
    checkout = f"git checkout {shlex.quote(commit)}{edited}\n" if commit else ""
    why = "The same sequences on any machine; the same bits on this one, with these versions and as many processes"
    found = {why: [("", [(checkout + command(run, changed), "", "")])]}
    if run.config["settings"]["TARGET_MINUTES"] and run.metrics["train/loss"]:
        model, batch = run.config["model_config"], run.config["plan"]["total_batch_size"]
        changed |= {"TARGET_MINUTES": 0.0, "EVALUATIONS_AFTER": 0.0, "NUM_ITERATIONS": max(run.metrics["train/loss"])}
        changed |= {"DEPTH": model["num_layers"], "MAX_SEQ_LEN": model["max_seq_len"], "TOTAL_BATCH_SIZE": batch}
        why = "With a time limit, depth and steps depend on the machine. With these settings they do not"
        found[why] = [("", [(command(run, changed), "", "")])]
    return found


def command(run: Run, changed: dict[str, Any]) -> str:
    """The command line that trains with the changed settings on the tokenizer in the run's folder, under a new name."""
    ranks = run.config["environment"].get("world_size", 1)
    launch = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    flags = [f"{config.flag_of(name)}={_value(value)}" for name, value in changed.items() if name not in NOT_REPEATED]
    flags += [f"--tokenizer-dir={run.folder}", f"--run-name={run.folder.name}-again"]
    return " \\\n    ".join([f"{launch} -m scripts.base_train", *map(shlex.quote, flags)])


TABLES = {
    "Summary": summary,
    "Results": results,
    "Time per step": step_times,
    "Evaluations during training": evaluations,
    "Tasks": tasks,
    "Settings": settings,
    "Recipe": recipe,
    "Environment and data": environment,
}
TEXTS = {"Samples": samples, "Validation text": documents, "Reproduce": commands}
