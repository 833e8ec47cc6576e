"""What is in a report, as blocks that the two templates write as HTML and as Markdown.

A block is a paragraph (str), blocks side by side (list), or a dict with one of these keys first:

    heading: str
    rows: [[cell]]                    heads: [str]; marked: {row}; title: str
    picture: str                      png: bytes; alt: str, what it shows in words
    code: str
    excerpt: str                      label: str; lead: str, what stood there before the model went on
    tokens: [(text, bits, level)]     label: str; most: str, the tokens of most bits
    scale: [str]                      the bits of each level
    fold: str                         blocks: [block], shown on request
"""

import bisect
import itertools
import math
import shlex
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from nanotrain import config, dataset, paths
from nanotrain.report.data import Run

NOT_REPEATED = ("RUN_NAME", "RESUME", "ALLOW_CHANGE", "DRY_RUN", "REPORT", "TOKENIZER_DIR")
BIT_EDGES = (1, 2, 4, 8, 12)  # bits of a token at which the next level begins
SCALE = ("under 1", "1 to 2", "2 to 4", "4 to 8", "8 to 12", "12 and more")
LAST_STEPS = 20  # whose mean loss is the loss at the end
SHOWN = 10  # evaluations, samples after a prompt, and shards; at most


def build(runs: Sequence[Run], drawn: dict[str, tuple[bytes, str]]) -> dict[str, list]:
    """{title: blocks} of the report of some runs; `drawn` as `pictures.draw` returns it."""
    blocks = {name: {"picture": name, "png": png, "alt": alt} for name, (png, alt) in drawn.items()}
    tasks = [blocks.pop("tasks")] if "tasks" in blocks else []
    return {
        "Numbers": _guarded(_numbers, runs),
        "Training": [list(blocks.values()), *_guarded(_training, runs)],
        "Tasks": [[*tasks, *_guarded(_tasks, runs)]],
        "Samples": _each(_samples, runs),
        "Validation text": _each(_documents, runs),
        "Settings": _guarded(_differences, runs) + _each(_settings, runs),
        "Environment and data": _each(_environment, runs),
        "Reproduce": _each(_commands, runs),
    }


def _guarded(part: Callable[..., list], *arguments: Any) -> list:
    """The blocks of a part; a line instead where a file holds something else than nanotrain writes."""
    try:
        return part(*arguments)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return [f"Left out, because a file of the run is damaged: {type(error).__name__}: {error}"]


def _each(part, runs):
    """The blocks of a part for each run, folded under the run's name where there are several."""
    if len(runs) == 1:
        return _guarded(part, runs[0])
    return [{"fold": run.name, "blocks": _guarded(part, run)} for run in runs]


def _by_run(runs, heads, rows, title=""):
    """A table whose second column names the run; that is left out where there is only one."""
    if len(runs) == 1:
        heads, *rows = ([first, *rest] for first, _, *rest in (heads, *rows))
    return {"rows": rows, "heads": heads, "title": title}


def _compared(runs, facts):
    """A table of {what: value} of each run, side by side."""
    rows = [[what, *(known.get(what, "") for known in facts)] for what in dict.fromkeys(itertools.chain(*facts))]
    return {"rows": rows, "heads": ["", *(run.name for run in runs)]}


def _spread(items):
    """At most SHOWN of `items`, evenly, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(SHOWN, len(items)))
    return [items[round(place)] for place in places]


def _value(value):
    """A setting as it is on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _numbers(runs):
    """The headline numbers, and what could not be read."""
    blocks = [_compared(runs, [headline(run) for run in runs])]
    if len({run.config.get("tokenizer_sha256") for run in runs}) > 1:
        blocks.append("The tokenizers differ: compare bits per byte, not losses.")
    for run in runs:
        blocks += [f"{run.name}: {complaint}." for complaint in run.complaints]
        if not run.evaluation:
            name = run.folder.name if run.folder.parent == paths.base_dir() / "runs" else run.folder
            measure = shlex.join(["python", "-m", "scripts.base_eval", f"--run-name={name}"])
            blocks.append(f"Left out: the numbers of scripts.base_eval for {run.name} ({measure}).")
    return blocks


def headline(run: Run) -> dict[str, str]:
    """{what: value} of the numbers that say most about a run."""
    found, evaluation, plan, core = {}, run.evaluation, run.part("plan"), run.core()
    if measured := {step: bpb for step, bpb in run.of("val/bpb").items() if math.isfinite(bpb)}:
        best = min(measured, key=measured.get)
        found["validation, bits per byte, last"] = f"{measured[max(measured)]:.4f} (step {max(measured):,})"
        found["validation, bits per byte, best"] = f"{measured[best]:.4f} (step {best:,})"
    for what, name in (("whole validation documents", "doc_bpb"), ("train text", "train_bpb")):
        if name in evaluation:
            found[f"{what}, bits per byte"] = f"{evaluation[name]:.4f} (step {evaluation['step']:,})"
    if core:
        found[core["name"]] = f"{core['core_metric']:.4f} ± {core['standard_error']:.4f} (step {core['step']:,})"
    steps, loss = run.steps(), run.column("loss")
    if len(last := loss[np.isfinite(loss)][-LAST_STEPS:]):
        found[f"train loss of the last {LAST_STEPS} steps, nats per token"] = f"{last.mean():.4f}"
    if steps:
        mfu, seconds = np.median(run.column("mfu")), run.column("seconds").sum()
        found["steps"] = f"{steps[-1]:,}"
        found["tokens"] = f"{run.tokens()[-1]:,.0f}"
        found["epoch of the text"] = f"{run.column('epoch')[-1] + 1:.0f}"
        found["time of the steps, without evaluations and saves"] = str(timedelta(seconds=round(seconds)))
        found["tokens per second, median"] = f"{np.median(run.column('tok_per_sec')):,.0f}"
        found |= {} if math.isnan(mfu) else {"MFU, median": f"{mfu:.1%}"}
        if lost := np.isnan(loss + run.column("grad_norm")).sum():
            found["steps without an update, because loss or gradient were not finite"] = f"{lost:,}"
    if plan:
        found["tokens of a batch"] = f"{plan['total_batch_size']:,}"
        found["weights"] = f"{sum(plan['parameters'].values()):,}"
    return found


def _training(runs):
    """The parts of a step's time, and the evaluations during training, in tables."""
    times, evaluations = [], []
    for run in runs:
        for part, seconds in run.parts_of_a_step().items():
            share = np.nanmedian(seconds) / np.median(run.column("seconds"))
            times.append([part, run.name, f"{1000 * np.nanmedian(seconds):,.1f} ms", f"{share:.1%}"])
        measured = (run.of("val/bpb"), run.of("core/core_metric"))
        for step in _spread(sorted(set().union(*measured))):
            cells = (f"{values[step]:.4f}" if step in values else "" for values in measured)
            evaluations.append([f"{step:,}", run.name, f"{run.at(step, run.tokens()):,.0f}", *cells])
    if not times and not evaluations:
        return ["Left out: metrics.jsonl has no step."]
    heads = ["step", "run", "tokens", "bits per byte", "CORE or tasks"]
    evaluations = _by_run(runs, heads, evaluations, "Evaluations during training")
    return [[_by_run(runs, ["part", "run", "median", "of the whole"], times, "A step's time"), evaluations]]


def _tasks(runs):
    """The scores on the tasks of CORE, or of another bundle."""
    rows = []
    for run in runs:
        for label, task in (run.core() or {"tasks": {}})["tasks"].items():
            scores = (f"{task[score]:.3f}" for score in ("accuracy", "standard_error", "baseline", "centered"))
            rows.append([label, run.name, *scores, f"{task['num_items']:,}"])
    if not rows:
        return ["Left out: tasks, of which none were evaluated (base_eval, or base_train --core-metric-every)."]
    return [_by_run(runs, ["task", "run", "accuracy", "±", "guessing", "centred", "items"], sorted(rows))]


def _samples(run):
    """What the model wrote, by step, under each prompt."""
    by_prompt = {}
    for record in run.records:
        for sample in record.get("samples", ()):
            shown = {"excerpt": sample["text"], "label": f"step {record['step']:,}", "lead": sample["prompt"]}
            by_prompt.setdefault(sample["prompt"], []).append(shown)
    blocks = []
    for prompt, texts in by_prompt.items():
        blocks += [{"heading": f"After {prompt!r}"}, _spread(texts)]
    if written := run.evaluation.get("samples"):
        blocks.append({"heading": f"Written by base_eval after step {run.evaluation['step']:,}"})
        blocks.append([{"excerpt": text, "label": f"sample {place}"} for place, text in enumerate(written, 1)])
    return blocks or ["Left out: samples, of which there are none (base_eval, or base_train --sample-every)."]


def _documents(run):
    """The validation documents of most and of fewest bits per byte, token by token."""
    recorded = [record for record in run.records if "documents" in record]
    if not recorded:
        return ["Left out: validation documents, of which none are recorded."]
    step, documents = recorded[-1]["step"], recorded[-1]["documents"]
    blocks = [f"After step {step:,}. The bits of a token are shown where you point.", {"scale": SCALE}]
    for kind in ("worst", "best"):
        blocks.append([_document(f"{kind} {place}", found) for place, found in enumerate(documents[kind], 1)])
    return blocks


def _document(label, document):
    tokens = [(text, bits, bisect.bisect(BIT_EDGES, bits)) for text, bits in document["tokens"]]
    most = ", ".join(f"{text!r} {bits:.1f}" for text, bits, _ in sorted(tokens, key=lambda token: -token[1])[:5])
    label += f": {document['bpb']:.3f} bits per byte, its first {len(tokens)} tokens"
    return {"tokens": tokens, "label": label, "most": most}


def changed(run: Run) -> dict[str, Any]:
    """{NAME: value} of the settings that differ from the script's defaults."""
    defaults = run.part("defaults")
    return {name: value for name, value in run.part("settings").items() if value != defaults.get(name)}


def _settings(run):
    """All settings, with those that differ from the defaults marked."""
    if not run.config:
        return ["Left out: settings, without config.json."]
    settings, different = run.part("settings"), changed(run)
    rows = [[name, _value(value), _value(run.part("defaults").get(name))] for name, value in settings.items()]
    marked = {place for place, row in enumerate(rows) if row[0] in different}
    heads = ["setting", "value", "default"]
    every = {"rows": rows, "heads": heads, "marked": marked}
    few = {"rows": [rows[place] for place in sorted(marked)], "heads": heads}
    return [few, {"fold": "All settings, with those that differ from the defaults marked", "blocks": [every]}]


def _differences(runs):
    """What differs between several runs of all that a result depends on."""
    if len(runs) == 1:
        return []
    settings = [{name: _value(value) for name, value in run.part("settings").items()} for run in runs]
    table = _compared(runs, [found | _surroundings(run) for found, run in zip(settings, runs, strict=True)])
    table["rows"] = [row for row in table["rows"] if row[0] not in NOT_REPEATED and len(set(row[1:])) > 1]
    return [{"heading": "What differs"}, table] if table["rows"] else ["The runs differ in nothing that counts."]


def _surroundings(run):
    """{what: value} of the environment, the model, the data and the tokenizer; empty without config.json."""
    if not run.config:
        return {}
    found, data = {}, run.config["data"]
    for name, value in (run.config["environment"] | run.config["model_config"]).items():
        if isinstance(value, dict):
            value = ", ".join(f"{package} {version}" for package, version in value.items())
        found[name.replace("_", " ")] = "none" if value is None else _value(value)
    size = sum(file["bytes"] for file in data["files"].values()) / 1e6
    found["data"] = f"{len(data['files'])} shards, {size:,.1f} MB, validation {data['validation']}"
    found["data, SHA-256 of all names, sizes and hashes"] = dataset.hash_of(data)
    return found | {"tokenizer, SHA-256": run.config["tokenizer_sha256"]}


def _environment(run):
    """Versions, hardware, and the fingerprints of data and tokenizer."""
    if not run.config:
        return ["Left out: environment and data, without config.json."]
    shards = [[name, str(file["bytes"]), file["sha256"]] for name, file in run.config["data"]["files"].items()]
    listed = {"rows": _spread(shards), "heads": ["file", "bytes", "SHA-256"]}
    title = f"The shards, at most {SHOWN} of them"
    return [{"rows": list(_surroundings(run).items())}, {"fold": title, "blocks": [listed]}]


def _commands(run):
    """How to make the run again."""
    if not run.config:
        return ["Left out: the command, without config.json."]
    settings, different, commit = run.part("settings"), changed(run), run.part("environment").get("commit")
    checkout = f"git checkout {shlex.quote(commit)}\n" if commit else ""
    blocks = [
        "The same rows anywhere, and the same bits on the same machine with as many processes and these versions:",
        {"code": checkout + command(run, different)},
    ]
    if settings["TARGET_MINUTES"] and run.steps():
        model, batch = run.part("model_config"), run.part("plan")["total_batch_size"]
        pinned = different | {"TARGET_MINUTES": 0.0, "EVALUATIONS_AFTER": 0.0, "NUM_ITERATIONS": run.steps()[-1]}
        pinned |= {"DEPTH": model["num_layers"], "MAX_SEQ_LEN": model["max_seq_len"], "TOTAL_BATCH_SIZE": batch}
        blocks.append("By minutes, size and steps follow the machine. The same shape, batch and steps on any:")
        blocks.append({"code": command(run, pinned)})
    every = ["Also where defaults were edited in the script.", {"code": command(run, settings)}]
    return [*blocks, {"fold": "The same with every setting", "blocks": every}]


def command(run: Run, settings: dict[str, Any]) -> str:
    """The command line that trains with `settings` on the tokenizer in the run's folder, under a new name."""
    ranks = run.part("environment").get("world_size", 1)
    launch = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    flags = [f"{config.flag_of(name)}={_value(value)}" for name, value in settings.items() if name not in NOT_REPEATED]
    flags += [f"--tokenizer-dir={run.folder}", f"--run-name={run.folder.name}-again"]
    return " \\\n    ".join([f"{launch} -m scripts.base_train", *map(shlex.quote, flags)])
