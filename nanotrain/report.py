"""The report of a run, or of several runs against each other, as tables and pictures.

    python -m nanotrain.report d4            writes report/report.html and report.md into the folder of the run d4
    python -m nanotrain.report d4 d4-wide    both runs in every picture and table, in the folder of the first

It can be made at any time, also of a run that is still going. What a run did not record is left out, with a line that
says so.
"""

import math
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanotrain import config, dataset, errors, paths
from nanotrain import report_page as page
from nanotrain import report_pictures as pictures
from nanotrain.errors import UserError
from nanotrain.files import atomic_file
from nanotrain.report_data import Run, core_of, dig, evaluated_step, number, objects, read_run, spread

# --- settings
OUT = ""  # folder for the report; empty: report/ in the folder of the first run
# ------------

NOT_REPEATED = ("RUN_NAME", "RESUME", "ALLOW_CHANGE", "DRY_RUN", "REPORT", "TOKENIZER_DIR")
PICTURES = ("loss", "bits_per_byte", "schedule", "speed", "tasks")
TOKEN_UNITS = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"), (1.0, "tokens"))
TIME_UNITS = ((3600.0, "hours of training"), (60.0, "minutes of training"), (1.0, "seconds of training"))
MARK = b"A report of nanotrain"  # in report.html where it may be replaced
LAST_STEPS = 20  # whose mean loss is the loss at the end
SHOWN_CHARACTERS, SHOWN_TOKENS = 1500, 300  # of a text, at most
SHOWN_TEXTS, SHOWN_SHARDS = 10, 20
NO_PICTURES = "Without pictures, because matplotlib is missing: pip install matplotlib brings them."


def write(run_dirs: Iterable[str | Path], out: str = "") -> tuple[Path, list[str]]:
    """Write the report of the runs in some folders into the folder `out`, or into report/ of the first run.

    Returns (path of report.html, lines to say with it). Raises UserError if a folder holds no run, or `out` files that
    are not of a report.
    """
    runs = [read_run(run_dir) for run_dir in dict.fromkeys(Path(run_dir).absolute() for run_dir in run_dirs)]
    report, drawn, complaints = build(runs)
    folder = Path(out).expanduser().absolute() if out else runs[0].folder / "report"
    # report.html first: it has the mark
    files = {"report.html": page.html_of(report).encode(), "report.md": page.markdown_of(report).encode()}
    files |= {f"{name}.png": drawn.get(name) for name in PICTURES}
    taken = [name for name in files if (folder / name).exists()]
    if out and taken and not ("report.html" in taken and MARK in (folder / "report.html").read_bytes()):
        raise UserError(f"--out={out} holds {', '.join(taken)}, not of a report of nanotrain: choose another folder")
    for name, content in files.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier report
            continue
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(content)
    return folder / "report.html", complaints


def attempt(run_dir: str | Path) -> str:
    """`write` at the end of a run, and what to say of it. An error is said, not raised: it must not fail the run."""
    try:
        path, complaints = write([run_dir])
    except Exception as error:
        return f"report     not written: {type(error).__name__}: {error}"
    return "\n".join([f"report     {path}", *complaints])


def build(runs: Sequence[Run]) -> tuple[page.Page, dict[str, bytes], list[str]]:
    """(page, {name: PNG}, complaints) of some runs; complaints: lines for whoever asked for the report."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)  # two folders of one name
    drawing = Drawing()
    sections = [
        page.Section("Numbers", _numbers(runs)),
        page.Section("Training", _training(runs, drawing)),
        page.Section("Tasks", _tasks(runs, drawing)),
        page.Section("Samples", _per_run(runs, _samples)),
        page.Section("Validation text", _per_run(runs, _documents)),
        page.Section("Settings", _differences(runs) + _per_run(runs, _settings)),
        page.Section("Environment and data", _per_run(runs, _environment)),
        page.Section("Reproduce", _per_run(runs, _commands)),
    ]
    sections[0].blocks += map(page.Text, drawing.complaints)
    title = " against ".join(run.name for run in runs)
    subtitle = f"{MARK.decode()}, {time.strftime('%Y-%m-%d %H:%M')}"
    return page.Page(title, subtitle, sections), drawing.drawn, drawing.complaints


class Drawing:
    """Draws pictures as long as that works, and remembers in `complaints` why it does not."""

    def __init__(self):
        self.drawn, self.complaints = {}, []

    def picture(
        self, name: str, alternative: str, caption: str, *parts: pictures.Panel | pictures.Bars
    ) -> list[page.Picture]:
        """One picture, or none where it cannot be drawn."""
        if self.complaints:
            return []
        try:
            self.drawn[name] = pictures.png_of(*parts)
        except ImportError:
            self.complaints.append(NO_PICTURES)
            return []
        except Exception as error:  # whatever is wrong with that package: the tables are still worth having
            self.complaints.append(f"Without pictures: {type(error).__name__}: {error}")
            return []
        return [page.Picture(name, self.drawn[name], alternative, caption)]


def _per_run(runs, part):
    """The blocks of `part` for each run, folded under the run's name where there are several."""
    return part(runs[0]) if len(runs) == 1 else [page.Fold(run.name, part(run)) for run in runs]


def _table_by_run(runs, title, heads, rows):
    """A Table whose second column names the run, which is left out where there is only one."""
    if len(runs) == 1:
        heads, *rows = ([row[0], *row[2:]] for row in (heads, *rows))
    return page.Table(heads, rows, title=title)


# ---- numbers ----


def _numbers(runs):
    """The headline numbers, and what could not be read."""
    found = {run.name: headline(run) for run in runs}
    if len(runs) == 1:
        blocks = [page.Numbers(found[runs[0].name])]
    else:
        values = {name: {what: value for what, value, _ in items} for name, items in found.items()}
        kinds = dict.fromkeys(what for items in values.values() for what in items)
        rows = [[what, *(items.get(what, "") for items in values.values())] for what in kinds]
        blocks = [page.Table(["", *values], rows)]
        if len({run.config.get("tokenizer_sha256") for run in runs}) > 1:
            blocks.append(page.Text("The tokenizers differ: compare bits per byte, not losses."))
    for run in runs:
        blocks += [page.Text(f"{run.name}: {complaint}.") for complaint in run.complaints]
        if not run.evaluation:
            known = run.folder.parent == paths.base_dir() / "runs"
            measure = shlex.join(
                ["python", "-m", "scripts.base_eval", f"--run-name={run.folder.name if known else run.folder}"]
            )
            blocks.append(page.Text(f"Left out: the numbers of scripts.base_eval for {run.name} ({measure})."))
    return blocks


def headline(run: Run) -> list[tuple[str, str, str]]:
    """(what, value, remark) of the numbers that say most about a run."""
    items = []

    def add(what, value, text, remark=""):
        if not math.isnan(value):
            items.append((what, text, remark))

    measured = {step: bpb for step, bpb in run.val_bpb.items() if not math.isnan(bpb)}
    if measured:
        step, best = list(measured)[-1], min(measured, key=measured.get)
        better = "" if best == step else f"; {measured[best]:.4f} at step {best:,}"
        add("validation, bits per byte", measured[step], f"{measured[step]:.4f}", f"at step {step:,}{better}")
    for what, name in (("whole validation documents", "doc_bpb"), ("train text", "train_bpb")):
        bpb = number(run.evaluation.get(name))
        add(f"{what}, bits per byte", bpb, f"{bpb:.4f}", f"at step {evaluated_step(run):,}")
    if core := core_of(run):
        add(core.name, core.metric, _with_error(core), f"guessing: 0; {len(core.tasks)} tasks at step {core.step:,}")
    losses = run.columns["loss"][np.isfinite(run.columns["loss"])][-LAST_STEPS:]
    if len(losses):
        add(
            "train loss, nats per token", losses.mean(), f"{losses.mean():.4f}", f"mean of the last {len(losses)} steps"
        )
    if len(run.steps):
        batch = "" if math.isnan(run.batch_tokens) else f"of {run.batch_tokens:,.0f} tokens"
        add("steps", 0.0, f"{run.steps[-1]:,}", batch)
        tokens, epoch, elapsed = run.tokens()[-1], run.columns["epoch"][-1], run.elapsed()[-1]
        add("tokens", tokens, _count(tokens), "" if math.isnan(epoch) else f"in epoch {epoch + 1:.0f} of the text")
        add("time of the steps", elapsed, _duration(elapsed), "without start, evaluations and saves")
        speed, mfu = _median(run.columns["tok_per_sec"]), _median(run.columns["mfu"])
        add("tokens per second", speed, f"{speed:,.0f}", "median" if math.isnan(mfu) else f"median; {mfu:.1%} MFU")
        lost = np.isnan(run.columns["loss"]) | np.isnan(run.columns["grad_norm"])
        add(
            "steps without an update", 0.0 if lost.any() else math.nan, f"{lost.sum():,}", "loss or gradient not finite"
        )
    weights = {role: number(count) for role, count in run.part("plan", "parameters").items()}
    if weights:
        tables = sum(count for role, count in weights.items() if "embedding" in role and role != "unembedding")
        depth = f"depth {dig(run.config, 'model_config', 'num_layers')}; {_count(tables)} in tables"
        add("weights", sum(weights.values()), _count(sum(weights.values())), depth)
    return items


def _with_error(core):
    return f"{core.metric:.4f}" + ("" if math.isnan(core.error) else f" ± {core.error:.4f}")


def _median(values):
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _count(value):
    """12,345, and 12.35 M where it is large."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.2f} {letter}"
    return f"{value:,.0f}"


def _duration(seconds):
    if math.isnan(seconds) or seconds < 120:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60)} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _value(value):
    """A setting as it is on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- training ----


def _training(runs, drawing):
    """Curves and tables of the training."""
    if not any(len(run.steps) or run.val_bpb for run in runs):
        return [page.Text("Left out: metrics.jsonl has no step.")]
    drawn = []
    by_tokens = _axis(runs, [run.tokens() for run in runs], TOKEN_UNITS)
    by_time = _axis(runs, [run.elapsed() for run in runs], TIME_UNITS)

    def add(name, caption, *panels):
        panels = [panel for panel in panels if panel.curves]
        if panels:
            drawn.extend(drawing.picture(name, " ".join(panel.in_words() for panel in panels), caption, *panels))

    def of_column(title, name, axis, log=False):
        return _panel(title, axis, {run.name: run.columns[name] for run in runs}, log=log)

    def of_bpb(axis):
        curves = []
        for run, x in zip(runs, axis[1], strict=True):
            measured = {step: bpb for step, bpb in run.val_bpb.items() if not math.isnan(bpb)}
            if measured:
                curves.append(pictures.Curve(run.name, run.at(list(measured), x), np.array(list(measured.values()))))
        return pictures.Panel("validation, bits per byte", axis[0], curves)

    of_a_point = max(len(run.steps) for run in runs) / pictures.POINTS
    band = f"A point is the mean of about {of_a_point:.0f} steps, the band their lowest and highest."
    title = "train loss, nats per token"
    add(
        "loss", band if of_a_point > 1.5 else "", of_column(title, "loss", by_tokens), of_column(title, "loss", by_time)
    )
    add("bits_per_byte", "", of_bpb(by_tokens), of_bpb(by_time))
    rates, norms = (
        of_column("learning rate", "lr", by_tokens),
        of_column("gradient norm", "grad_norm", by_tokens, log=True),
    )
    add("schedule", "The rate is that of the matrices; the others rise and fall with it.", rates, norms)
    speeds = of_column("tokens per second", "tok_per_sec", by_tokens)
    whole = {run.name: 1000 * run.step_seconds() for run in runs}
    parts = {part: 1000 * seconds for part, seconds in runs[0].parts_of_a_step().items()} if len(runs) == 1 else {}
    title = "milliseconds of a step"
    times = _panel(title, (by_tokens[0], by_tokens[1] * max(len(parts), 1)), parts or whole, stacked=bool(parts))
    add("speed", "", speeds, times)
    return [page.Gallery(drawn), page.Gallery([_step_times(runs), _evaluations(runs)])]


def _axis(runs, reached, units):
    """(label, [(n,) float64 of each run]): what was reached after each step, in the largest of `units` that suits."""
    if not all(np.isfinite(values).all() for values in reached):
        return "steps", [run.steps.astype(np.float64) for run in runs]
    end = max((values[-1] for values in reached if len(values)), default=0.0)
    size, label = next(((size, label) for size, label in units if end >= 2 * size), units[-1])
    return label, [values / size for values in reached]


def _panel(title, axis, series, stacked=False, log=False):
    """The Panel of {label: (n,) values at the steps of the axis}; those without a finite value are left out."""
    label, places = axis
    pairs = zip(series.items(), places, strict=True)
    curves = [pictures.curve_of(name, x, values) for (name, values), x in pairs if np.isfinite(values).any()]
    return pictures.Panel(title, label, curves, stacked, log)


def _step_times(runs):
    """The parts of a step in a table."""
    rows = []
    for run in runs:
        whole = _median(run.columns["seconds"])
        for part, seconds in run.parts_of_a_step().items():
            rows.append(
                [
                    part,
                    run.name,
                    f"{1000 * _median(seconds):,.1f}\N{NO-BREAK SPACE}ms",
                    f"{_median(seconds) / whole:.1%}",
                ]
            )
    if not rows:
        return page.Text("Left out: the parts of a step's time, which are not recorded.")
    return _table_by_run(runs, "A step's time", ["part", "run", "median", "of the whole"], rows)


def _evaluations(runs):
    """Some of the evaluations during training in a table."""
    rows = []
    for run in runs:
        for step in spread(sorted({*run.val_bpb, *run.core_metric})):
            tokens = run.at(step, run.tokens())
            measured = [run.val_bpb.get(step), run.core_metric.get(step)]
            cells = [
                "" if value is None else "not finite" if math.isnan(value) else f"{value:.4f}" for value in measured
            ]
            rows.append([f"{step:,}", run.name, "" if math.isnan(tokens) else _count(tokens), *cells])
    if not rows:
        return page.Text("Left out: evaluations during training, of which there are none (--eval-every).")
    heads = ["step", "run", "tokens", "bits per byte", "CORE or tasks"]
    columns = 5 if any(row[4] for row in rows) else 4
    rows = [row[:columns] for row in rows]
    return _table_by_run(runs, "Evaluations during training", heads[:columns], rows)


# ---- what the model can do ----


def _tasks(runs, drawing):
    """The scores on the tasks of CORE, or of another bundle."""
    found = {run.name: core for run in runs if (core := core_of(run))}
    if not found:
        return [
            page.Text("Left out: tasks, of which none were evaluated (base_eval, or base_train --core-metric-every).")
        ]
    labels = list(dict.fromkeys(task.label for core in found.values() for task in core.tasks))
    series, rows, told = [], [], []
    for name, core in found.items():
        tasks = {task.label: task for task in core.tasks}
        known = [tasks.get(label) for label in labels]
        series.append(
            (name, *([getattr(task, value, math.nan) for task in known] for value in ("centered", "error_of_centered")))
        )
        for task in core.tasks:
            scores = (task.accuracy, task.error, task.baseline, task.centered)
            rows.append([task.label, name, *(f"{score:.3f}" for score in scores), f"{task.items:,.0f}"])
        best, worst = max(core.tasks, key=lambda task: task.centered), min(core.tasks, key=lambda task: task.centered)
        told.append(
            f"{name}: {core.name} {_with_error(core)} after step {core.step:,}, most in {best.label}"
            f" ({best.centered:.3f}), least in {worst.label} ({worst.centered:.3f})"
        )
    title = f"{' and '.join(dict.fromkeys(core.name for core in found.values()))}: centred score of each"
    bars = pictures.Bars(title, "0: guessing, 1: all right; with standard errors", labels, series)
    drawn = drawing.picture("tasks", f"{title}. {'; '.join(told)}.", "", bars)
    heads = ["task", "run", "accuracy", "±", "guessing", "centred", "items"]
    rows.sort(key=lambda row: labels.index(row[0]))
    table = _table_by_run(runs, "", heads, rows)
    return [*(page.Text(f"{line}.") for line in told), page.Gallery([*drawn, table])]


def _samples(run):
    """What the model wrote, by step, under each prompt."""
    by_prompt = {}
    for detail in run.details:
        for sample in objects(detail.get("samples")):
            prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
            shown = page.Excerpt(f"step {detail['step']:,}", prompt, _cut(text.removeprefix(prompt)))
            by_prompt.setdefault(prompt, []).append(shown)
    blocks = []
    for prompt, texts in list(by_prompt.items())[:SHOWN_TEXTS]:
        blocks += [page.Heading(f"After {prompt!r}"), page.Gallery(spread(texts))]
    written = run.evaluation.get("samples")
    if isinstance(written, list) and written:
        blocks.append(page.Heading(f"Written by base_eval after step {evaluated_step(run):,}"))
        texts = enumerate(written[:SHOWN_TEXTS], 1)
        blocks.append(page.Gallery([page.Excerpt(f"sample {place}", "", _cut(str(text))) for place, text in texts]))
    return blocks or [
        page.Text("Left out: samples, of which there are none (base_eval, or base_train --sample-every).")
    ]


def _cut(text):
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"


def _documents(run):
    """The validation documents of most and of fewest bits per byte, token by token."""
    for detail in reversed(run.details):
        found = {kind: objects(dig(detail, "documents", kind))[:SHOWN_TEXTS] for kind in ("worst", "best")}
        if any(found.values()):
            about = f"After step {detail['step']:,}. The bits of a token are shown where you point."
            blocks = [page.Text(about), page.BitScale()]
            for kind, documents in found.items():
                texts = [_document(f"{kind} {place}", document) for place, document in enumerate(documents, 1)]
                blocks.append(page.Gallery(texts))
            return blocks
    return [page.Text("Left out: validation documents, of which none are recorded.")]


def _document(label, document):
    """One document as Tokens, or as it is where its tokens are missing."""
    bpb = number(document.get("bpb"))
    label += "" if math.isnan(bpb) else f": {bpb:.3f} bits per byte"
    pairs = document.get("tokens")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return page.Excerpt(label, "", _cut(str(document.get("text", ""))))
    tokens = [(str(text)[:SHOWN_CHARACTERS], number(bits)) for text, bits in pairs[:SHOWN_TOKENS]]
    return page.Tokens(f"{label}, its first {len(tokens)} tokens", tokens)


# ---- where it comes from ----


def _changed(run):
    """{NAME: value} of the settings that differ from the script's defaults; all where these are not recorded."""
    defaults = run.part("defaults")
    settings = run.part("settings").items()
    return {name: value for name, value in settings if name not in defaults or value != defaults[name]}


def _settings(run):
    """The settings that differ from the defaults, and all of them."""
    settings, defaults, changed = run.part("settings"), run.part("defaults"), _changed(run)
    if not settings:
        return [page.Text("Left out: settings, without config.json.")]
    if not defaults:
        rows = [[name, _value(value)] for name, value in settings.items()]
        return [page.Text("The defaults are not recorded."), page.Table(["setting", "value"], rows)]
    heads = ["setting", "value", "default"]
    rows = [[name, _value(value), _value(defaults.get(name, "none"))] for name, value in settings.items()]
    marked = frozenset(place for place, name in enumerate(settings) if name in changed)
    return [
        page.Text(f"{len(changed)} of {len(settings)} settings of {run.name} differ from the defaults."),
        page.Table(heads, [rows[place] for place in sorted(marked)]),
        page.Fold(f"All settings of {run.name}, with those that differ marked", [page.Table(heads, rows, marked)]),
    ]


def _differences(runs):
    """What differs between the runs of all that a result depends on."""
    if len(runs) == 1:
        return []
    facts = []
    for run in runs:
        settings = {name: _value(value) for name, value in run.part("settings").items() if name not in NOT_REPEATED}
        facts.append({**settings, **dict(_surroundings(run))})
    rows = [
        [name, *(known.get(name, "") for known in facts)] for name in dict.fromkeys(n for known in facts for n in known)
    ]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return [page.Text("Settings, environment, data and tokenizer are the same.")]
    return [page.Heading("What differs"), page.Table(["", *(run.name for run in runs)], rows)]


def _surroundings(run):
    """[(name, value in words)] of the environment, the data and the tokenizer."""
    rows = []
    for name, value in run.part("environment").items():
        if isinstance(value, dict):
            value = ", ".join(f"{package} {version}" for package, version in value.items())
        rows.append((name.replace("_", " "), "none" if value is None else _value(value)))
    files = run.part("data", "files")
    if files:
        size = sum(number(dig(files, name, "bytes")) for name in files) / 1e6
        rows.append(
            ("data", f"{len(files)} shards, {size:,.1f} MB, validation {dig(run.config, 'data', 'validation')}")
        )
        rows.append(("data, SHA-256 of all names, sizes and hashes", dataset.hash_of(run.part("data"))))
    if tokenizer := run.config.get("tokenizer_sha256"):
        rows.append(("tokenizer, SHA-256", str(tokenizer)))
        rows.append(("tokenizer, tokens", str(dig(run.config, "model_config", "vocab_size"))))
    return rows


def _environment(run):
    """Versions, hardware, and the fingerprints of data and tokenizer."""
    rows, files = [list(row) for row in _surroundings(run)], run.part("data", "files")
    if not rows:
        return [page.Text("Left out: environment and data, without config.json.")]
    shards = [[name, str(dig(files, name, "bytes")), str(dig(files, name, "sha256"))] for name in files]
    title = f"The shards{f', {SHOWN_SHARDS} of them' if len(shards) > SHOWN_SHARDS else ''}"
    listed = page.Table(["file", "bytes", "SHA-256"], spread(shards, SHOWN_SHARDS))
    return [page.Table(["", ""], rows), *([page.Fold(title, [listed])] if shards else [])]


def _commands(run):
    """How to make the run again."""
    settings, changed = run.part("settings"), _changed(run)
    if not settings:
        return [page.Text("Left out: the command, without config.json.")]
    commit = dig(run.config, "environment", "commit")
    checkout = f"git checkout {shlex.quote(str(commit))}\n" if commit else ""
    blocks = [
        page.Text(
            "The same rows anywhere, and the same bits on the same machine with as many processes and these versions:"
        ),
        page.Code(checkout + command(run, changed)),
    ]
    if settings.get("TARGET_MINUTES") and len(run.steps):
        blocks.append(
            page.Text("By minutes, size and steps follow the machine. The same shape, batch and steps on any:")
        )
        blocks.append(page.Code(command(run, _pinned(run, changed))))
    if changed != settings:
        every = [page.Text("Also where defaults were edited in the script."), page.Code(command(run, settings))]
        blocks.append(page.Fold(f"The same with every setting of {run.name}", every))
    return blocks


def _pinned(run, settings):
    """`settings` with the shape, the batch and the number of steps that a run by minutes came to."""
    found = {
        "DEPTH": run.part("model_config").get("num_layers"),
        "MAX_SEQ_LEN": run.part("model_config").get("max_seq_len"),
        "TOTAL_BATCH_SIZE": run.part("plan").get("total_batch_size"),
        "NUM_ITERATIONS": int(run.steps[-1]),
    }
    kept = {name: value for name, value in settings.items() if name not in ("TARGET_MINUTES", "EVALUATIONS_AFTER")}
    return kept | {name: value for name, value in found.items() if value is not None}


def command(run: Run, settings: dict[str, Any]) -> str:
    """The command line that trains with `settings` on the tokenizer in the run's folder, under a new name."""
    ranks = number(dig(run.config, "environment", "world_size"))
    launch = f"torchrun --standalone --nproc_per_node={ranks:.0f}" if ranks > 1 else "python"
    flags = [f"{config.flag_of(name)}={_value(value)}" for name, value in settings.items() if name not in NOT_REPEATED]
    flags += [f"--tokenizer-dir={run.folder}", f"--run-name={run.folder.name}-again"]
    return " \\\n    ".join([f"{launch} -m scripts.base_train", *map(shlex.quote, flags)])


# ---- the command ----


def find(name: str) -> Path:
    """The folder of the run `name`; or `name` itself, if it is a folder and no run is called so."""
    if Path(name).is_dir() and (name in (".", "..") or not (paths.base_dir() / "runs" / name).is_dir()):
        return Path(name)
    return paths.run_dir(name)


def main(names: Sequence[str]) -> None:
    if not names:
        raise UserError("which run? Give its name or its folder, as in python -m nanotrain.report d4")
    path, complaints = write(map(find, names), OUT)
    print("\n".join([str(path), *complaints]))


if __name__ == "__main__":
    arguments = []
    errors.run(lambda: arguments.extend(config.override(__name__, positional=True)), lambda: main(arguments))
