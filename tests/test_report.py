"""The report: its numbers, what a page may hold, and that nothing in a run's folder keeps it from being made."""

import importlib.util
import json
import math
import re
import shlex
import struct
import sys
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from nanotrain import config, errors, report, report_data, report_page, report_pictures
from nanotrain.report_data import number, read_run
from scripts import base_train

HOSTILE = (
    "</pre><script>alert('1')</script>\"><img src=x onerror=alert(2)> & ``` ]]> | \x07\u202e \ud800 <!-- \n````\n# no"
)
draws = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib: the extra `report`")


def png(width=4, height=2):
    """A PNG of that size in white."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress((b"\0" + b"\xff" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture
def drawn(monkeypatch):
    """Pictures are not drawn; what they would show is in the list."""
    found = []
    monkeypatch.setattr(report_pictures, "png_of", lambda *parts: found.append(parts) or png())
    return found


SETTINGS = {
    **config.defaults(base_train.__file__),
    "DEPTH": 2,
    "BATCH_RAMP": True,
    "DATA_DIR": "/data/my text",
    "RESUME": True,
}


def make_run(folder, steps=4, texts=("a plain text",), **changes):
    """The folder of a run of `steps` steps of 1,000 tokens, the first half of them of 500, each of 2 seconds."""
    folder.mkdir(parents=True)
    rows = [{"step": 0, "val/bpb": 3.0}]
    for step in range(1, steps + 1):
        tokens = 500 if step <= steps // 2 else 1000
        row = {
            "train/loss": 5.0 - step / steps,
            "train/lr": 0.1,
            "train/grad_norm": 1.0,
            "train/tok_per_sec": tokens / 2,
        }
        row |= {"train/seconds": 2.0, "train/loader_seconds": 0.5, "train/optimizer_seconds": 0.25, "train/epoch": 1}
        rows.append({"step": step, **row})
    rows += [{"step": steps, "val/bpb": 1.25, "core/core_metric": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recorded = {
        "plan": {"total_batch_size": 1000, "parameters": {"matrix": 3_000_000, "embedding": 500_000}},
        "environment": {"world_size": 1, "commit": "abc123", "packages": {"torch": "2"}, "device_name": texts[0]},
        "format": 2,
        "model_config": {"vocab_size": 300, "num_layers": 2, "max_seq_len": 64},
        "tokenizer_sha256": "00ff",
        "data": {"validation": "v", "files": {"v": {"bytes": 10, "sha256": "aa"}}},
        "settings": {**SETTINGS, "RUN_NAME": folder.name, **changes},
        "defaults": config.defaults(base_train.__file__),
    }
    (folder / "config.json").write_text(json.dumps(recorded))
    task = {"accuracy": 0.8, "baseline": 0.6, "standard_error": 0.1, "centered": 0.5, "num_items": 16}
    core = {"core_metric": 0.5, "standard_error": 0.25, "is_core": False, "tasks": {texts[-1]: task}}
    evaluation = {"step": steps, "doc_bpb": 1.5, "train_bpb": 1.0, "core": core, "samples": list(texts)}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "evaluation").mkdir()
    for step in (steps // 2, steps):
        document = {"text": texts[0], "bpb": 2.5, "tokens": [[text, 3.25] for text in texts]}
        found = {"samples": [{"prompt": text, "text": f"{text} at {step}"} for text in texts]}
        found |= {"documents": {"worst": [document], "best": [document]}}
        (folder / "evaluation" / f"step_{step:08d}.json").write_text(json.dumps(found))
    return folder


# ---- numbers ----


def check_numbers(folder):
    items = {what: value for what, value, _ in report.headline(read_run(folder))}
    assert items == {
        "validation, bits per byte": "1.2500",
        "whole validation documents, bits per byte": "1.5000",
        "train text, bits per byte": "1.0000",
        "tasks": "0.5000 ± 0.2500",
        "train loss, nats per token": "4.3750",  # of 4.75, 4.5, 4.25, 4.0
        "steps": "4",
        "tokens": "3,000",
        "time of the steps": "8.0 s",
        "tokens per second": "375",
        "weights": "3.50 M",
    }


def test_the_headline_numbers_are_those_of_the_files(tmp_path):
    check_numbers(make_run(tmp_path / "r"))


@pytest.mark.parametrize("forgotten", ["seconds", "steps", "evaluation"])
def test_the_check_of_the_numbers_notices(tmp_path, forgotten):
    """Tokens by whole batches, a first step that is lost, an evaluation that is not read."""
    folder = make_run(tmp_path / "r")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if forgotten == "seconds":
        rows = [{name: value for name, value in row.items() if name != "train/seconds"} for row in rows]
    elif forgotten == "steps":
        rows = [row for row in rows if row["step"] != 1]
    else:
        (folder / "evaluation.json").unlink()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(AssertionError):
        check_numbers(folder)


def test_without_recorded_seconds_time_and_tokens_come_from_speed_and_plan(tmp_path):
    run = read_run(make_run(tmp_path / "r"))
    run.columns["seconds"][:] = math.nan
    assert run.elapsed().tolist() == [4.0, 8.0, 10.0, 12.0]
    assert run.tokens().tolist() == [1000, 2000, 3000, 4000]
    run.columns["tok_per_sec"][1] = math.nan  # the median stands in
    assert run.elapsed().tolist() == [4.0, 6.0, 8.0, 10.0]
    assert run.at([0, 1, 2.5, 4, 9], run.tokens()).tolist() == [0, 1000, 2500, 4000, 4000]


def test_a_step_has_parts_that_add_up(tmp_path):
    run = read_run(make_run(tmp_path / "r"))
    parts = {part: seconds.tolist() for part, seconds in run.parts_of_a_step().items()}
    assert parts == {"forward and backward": [1.25] * 4, "waiting for data": [0.5] * 4, "optimizer": [0.25] * 4}


@pytest.mark.parametrize(("count", "points"), [(1, 400), (7, 400), (1003, 400), (200_000, 400)])
def test_a_curve_of_many_steps_is_means_with_their_lowest_and_highest(count, points):
    x = np.arange(1.0, count + 1)
    values = np.random.default_rng(0).normal(size=count)
    values[:: max(count // 3, 1)] = math.nan
    curve = report_pictures.curve_of("r", x, values)
    assert len(curve.x) == min(count, points)
    assert curve.x[-1] == count
    assert len(curve.lost) <= report_pictures.MARKS
    begin = 0
    for place, end in enumerate(curve.x.astype(int)):
        inside = values[begin:end]
        inside = inside[np.isfinite(inside)]
        shown = [curve.y[place], curve.low[place], curve.high[place]]
        expected = [inside.mean(), inside.min(), inside.max()] if len(inside) else [math.nan] * 3
        assert shown == pytest.approx(expected, nan_ok=True)
        begin = end


def test_what_a_picture_shows_is_said_with_numbers(tmp_path, drawn):
    page, _, _ = report.build([read_run(make_run(tmp_path / "r"))])
    (gallery, *_) = page.sections[1].blocks
    said = {picture.name: picture.alternative for picture in gallery.blocks}
    assert said["loss"].startswith(
        "train loss, nats per token: r from 4.75 to 4 at 3 thousand tokens, lowest 4, highest 4.75. "
        "train loss, nats per token: r from 4.75 to 4 at 8 seconds of training"
    )
    assert said["bits_per_byte"].startswith("validation, bits per byte: r from 3 to 1.25 at 3 thousand tokens")
    assert "waiting for data from 500 to 500" in said["speed"]
    assert all(picture.alternative for section in page.sections for picture in pictures_in(section.blocks))
    assert [len(parts) for parts in drawn] == [2, 2, 2, 2, 1]


def pictures_in(blocks):
    for block in blocks:
        if isinstance(block, report_page.Picture):
            yield block
        yield from pictures_in(getattr(block, "blocks", ()))


def test_the_numbers_of_a_newer_evaluation_count(tmp_path):
    folder = make_run(tmp_path / "r")
    task = {"accuracy": 0.7, "standard_error": 0.1, "baseline": 0.5, "centered": 0.4, "num_items": 9}
    core = {"core_metric": 0.4, "standard_error": 0.2, "is_core": True, "tasks": {"t": task}}
    (folder / "evaluation" / "step_00000004.json").write_text(json.dumps({"core": core}))
    assert report_data.core_of(read_run(folder)).name == "tasks"  # of the same step: what base_eval says
    evaluation = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({**evaluation, "step": 3}))
    found = report_data.core_of(read_run(folder))
    assert (found.step, found.name, found.metric, found.error) == (4, "CORE", 0.4, 0.2)
    assert found.tasks[0].error_of_centered == pytest.approx(0.1 / 0.5)


# ---- the page ----

VOID = {"meta", "link", "img", "br"}
TAGS = VOID | set(
    "html head title style body header h1 h2 h3 p nav a main section dl div dt dd b span pre figure figcaption table "
    "caption thead tbody tr th td details summary".split()
)


class Page(HTMLParser):
    """Reads a page strictly; keeps the text of every element."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.texts, self.images, self.styles = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag in TAGS, tag
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("style", "srcset", "action", "formaction"), (tag, name)
            if name == "href":
                assert value == "data:," or value.startswith("#s"), value
            if name == "src":
                assert value.startswith("data:image/png;base64,")
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in VOID:
            self.texts.append((tag, []))
            self.open.append(self.texts[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            tag, parts = self.open[-1]
            parts.append(data)
            self.styles += data if tag == "style" else ""

    def handle_comment(self, data):
        raise AssertionError("a comment")

    unknown_decl = handle_pi = handle_comment


def check_page(text, expected=()):
    """That an HTML page holds nothing that runs or reaches out, and each of `expected` as text."""
    page = Page(text)
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    assert "default-src 'none'" in text
    assert all(image["alt"] for image in page.images)
    texts = ["".join(parts) for _, parts in page.texts]
    for wanted in expected:
        assert any(wanted in found for found in texts), wanted
    return page


@pytest.mark.usefixtures("drawn")
def test_whatever_a_run_holds_is_shown_as_text_and_never_obeyed(tmp_path):
    folder = make_run(tmp_path / "r", texts=("fine", HOSTILE), DATA_DIR=HOSTILE)
    (folder / "evaluation" / "step_00000002.json").write_text("<script>")
    path, _ = report.write([folder])
    visible = HOSTILE.replace("\x07", "\u2407").replace("\u202e", "\ufffd").replace("\ud800", "\ufffd")
    check_page(path.read_text(encoding="utf-8"), [visible, " at 4", visible.replace("\n", "⏎\n")])
    check_markdown((path.parent / "report.md").read_text(encoding="utf-8"), visible)


@pytest.mark.usefixtures("drawn")
def test_the_check_of_the_page_notices_text_that_is_not_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "_escape", report_page.printable)
    path, _ = report.write([make_run(tmp_path / "r", texts=("fine", HOSTILE))])
    with pytest.raises(AssertionError):
        check_page(path.read_text(encoding="utf-8"))


def check_markdown(text, wanted):
    """That `wanted` stands in blocks of code, that these end where they should, and that outside nothing is HTML."""
    fence, inside, outside, blocks = "", [], [], []
    for line in text.splitlines():
        if not fence and re.fullmatch("`{3,}", line):
            fence, inside = line, []
        elif fence and line == fence:
            fence = ""
            blocks.append("\n".join(inside))
        else:
            (inside if fence else outside).append(line)
    assert not fence
    assert any(wanted in block for block in blocks)
    assert "<" not in "".join(outside)
    return "\n".join(outside)


@pytest.mark.usefixtures("drawn")
def test_the_check_of_the_markdown_notices_a_block_that_its_text_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "_fenced", lambda text: f"```\n{report_page.printable(text)}\n```")
    path, _ = report.write([make_run(tmp_path / "r", texts=("fine\n```\n<b>",))])
    with pytest.raises(AssertionError):
        check_markdown((path.parent / "report.md").read_text(encoding="utf-8"), "fine")


@pytest.mark.usefixtures("drawn")
def test_the_markdown_has_what_the_page_has(tmp_path):
    path, _ = report.write([make_run(tmp_path / "r")])
    folder = path.parent
    assert sorted(file.name for file in folder.iterdir()) == [
        "bits_per_byte.png", "loss.png", "report.html", "report.md", "schedule.png", "speed.png", "tasks.png",
    ]  # fmt: skip
    outside = check_markdown((folder / "report.md").read_text(encoding="utf-8"), "a plain text at 4")
    assert set(re.findall(r"!\[[^\]]+\]\((\w+\.png)\)", outside)) == {file.name for file in folder.glob("*.png")}
    page = check_page(path.read_text(encoding="utf-8"))
    titles = ["".join(parts) for tag, parts in page.texts if tag == "h2"]
    assert re.findall("^## (.*)$", outside, re.MULTILINE) == titles
    assert len(page.images) == 5
    assert "| tokens | 3,000 | in epoch 2 of the text |" in outside
    assert "Most bits: 'a plain text' 3.2" in outside


def test_tokens_carry_their_bits_as_number_colour_and_line():
    levels = [0.0, 0.99, 1.0, 2.0, 4.0, 8.0, 11.9, 12.0, 99.0, math.nan]
    assert [report_page.bit_level(bits) for bits in levels] == [0, 0, 1, 2, 3, 4, 4, 5, 5, 0]
    assert report_page.bit_level_names() == ["under 1", "1 to 2", "2 to 4", "4 to 8", "8 to 12", "12 and more"]
    block = report_page.Tokens("label", [["a<b\n", 1.26], ["c", math.nan]])
    shown = report_page._block(block)
    assert '<span class="b1" title="1.3 bits">a&lt;b⏎\n</span><span class="b0" title="not measured">c</span>' in shown
    sheet = report_page._style()
    lines = [re.search(rf"\.b{level} {{ background: var\(--bits{level}\); (.*?)}}", sheet)[1] for level in range(6)]
    assert len(set(lines)) == 6  # not by colour alone


# ---- contrast ----


def channels(colour):
    return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def luminance(rgb):
    """Relative luminance of WCAG 2.2."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def turned_over(colour, card):
    """What `report_page.DARK_PICTURES` makes of a colour on a card (CSS Filter Effects and Compositing)."""
    inverted = np.array([1 - value for value in channels(colour)])
    weights = np.array([0.213, 0.715, 0.072])
    matrix = 2 * np.tile(weights, (3, 1)) - np.eye(3)  # hue-rotate by 180 degrees
    rotated = (matrix @ inverted).clip(0, 1)
    return [1 - (1 - a) * (1 - b) for a, b in zip(rotated, channels(card), strict=True)]


def too_faint(theme):
    """Pairs of text and ground below the 4.5 that WCAG AA asks for, of lines and ground below 3."""
    pairs = [(theme[ink], theme[ground], 4.5) for ink in ("ink", "muted", "accent") for ground in ("page", "card")]
    pairs += [(theme["ink"], ground, 4.5) for ground in (*theme["bits"], theme["changed"])]
    pairs += [(theme["underline"], theme["card"], 3.0)]
    return [pair for pair in pairs if contrast(channels(pair[0]), channels(pair[1])) < pair[2]]


def test_contrast_is_that_of_wcag():
    assert contrast(channels("#ffffff"), channels("#000000")) == pytest.approx(21)
    assert contrast(channels("#777777"), channels("#ffffff")) == pytest.approx(4.48, abs=0.005)
    assert report_page.DARK_PICTURES == "filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen;"


@pytest.mark.parametrize("theme", [report_page.LIGHT, report_page.DARK], ids=["light", "dark"])
def test_all_text_can_be_read_in_both_themes(theme):
    assert too_faint(theme) == []
    assert too_faint({**theme, "muted": theme["line"]})
    assert too_faint({**theme, "bits": (*theme["bits"], theme["muted"])})


@pytest.mark.parametrize("theme", [report_page.LIGHT, report_page.DARK], ids=["light", "dark"])
def test_pictures_can_be_read_in_both_themes(theme):
    def seen(colour):
        return turned_over(colour, theme["card"]) if theme is report_page.DARK else channels(colour)

    paper = seen(report_pictures.PAPER)
    assert contrast(paper, channels(theme["card"])) < 1.01
    texts = {colour: contrast(seen(colour), paper) for colour in (report_pictures.INK, report_pictures.MUTED)}
    lines = {colour: contrast(seen(colour), paper) for colour in report_pictures.COLOURS}
    assert min(texts.values()) >= 4.5, texts
    assert min(lines.values()) >= 3.0, lines
    assert contrast(seen("#dddddd"), paper) < 3.0


# ---- several runs ----


def test_several_runs_are_in_every_picture_and_what_differs_is_in_a_table(tmp_path, drawn):
    runs = [make_run(tmp_path / name, **changes) for name, changes in (("one", {}), ("two", {"MATRIX_LR": 0.5}))]
    path, _ = report.write(runs, tmp_path / "both")
    assert path == tmp_path / "both" / "report.html"
    page = report.build([read_run(run) for run in runs])[0]
    assert page.title == "one against two"
    (table,) = (block for block in page.sections[5].blocks if isinstance(block, report_page.Table))
    assert (table.heads, table.rows) == (["", "one", "two"], [["MATRIX_LR", "0.04", "0.5"]])
    for panel in (panel for parts in drawn for panel in parts):
        if isinstance(panel, report_pictures.Panel):
            assert [curve.label for curve in panel.curves] == ["one", "two"], panel.title
        else:
            assert [name for name, *_ in panel.series] == ["one", "two"]
    same = report.build([read_run(runs[0]), read_run(make_run(tmp_path / "three"))])[0]
    assert not [block for block in same.sections[5].blocks if isinstance(block, report_page.Table)]


@draws
def test_the_curves_that_are_drawn_are_those_of_the_runs(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setattr(report_pictures, "DPI", 50)
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **named: figures.append(self) or save(self, *args, **named)
    )
    folder = make_run(tmp_path / "one", steps=6)
    report.write([folder, make_run(tmp_path / "two", steps=6)])
    by_tokens, by_time = figures[0].axes
    assert [text.get_text() for text in by_tokens.get_legend().get_texts()] == ["one", "two"]
    for line in by_tokens.get_lines():
        assert line.get_xdata().tolist() == [0.5, 1, 1.5, 2.5, 3.5, 4.5]
        assert line.get_ydata() == pytest.approx([5 - step / 6 for step in range(1, 7)])
    assert by_time.get_lines()[0].get_xdata().tolist() == [2, 4, 6, 8, 10, 12]
    bars = figures[4].axes[0].patches
    assert [bar.get_width() for bar in bars] == [0.5, 0.5]
    for name in report.PICTURES:
        width, height = report_page.png_size((folder / "report" / f"{name}.png").read_bytes())
        assert (width, 50 < height < 400) == (250, True)


@draws
def test_a_picture_of_the_same_is_the_same_to_the_byte(monkeypatch):
    monkeypatch.setattr(report_pictures, "DPI", 50)
    panels = [
        report_pictures.Panel("title", "x", [report_pictures.Curve("r", np.arange(3.0), np.array([1.0, y, 3.0]))])
        for y in (2.0, 2.0, 2.1)
    ]
    one, same, other = map(report_pictures.png_of, panels)
    assert one == same != other


# ---- the command to make it again ----


def settings_of_command(text):
    """What a command line sets, by the script's own reading of it."""
    words = shlex.split(text.replace("\\\n", " "))
    namespace = dict(vars(base_train))
    config.override(namespace, words[words.index("scripts.base_train") + 1 :])
    return config.settings(namespace)


def test_the_command_sets_what_the_run_had(tmp_path):
    run = read_run(make_run(tmp_path / "r", SCHEDULE="cosine", TARGET_MINUTES=2.5))
    expected = {**run.config["settings"], "RESUME": False, "RUN_NAME": "r-again", "TOKENIZER_DIR": str(run.folder)}
    text = report.command(run, report._changed(run))
    assert settings_of_command(text) == expected
    assert text.startswith("python -m scripts.base_train")
    assert len(text.splitlines()) == 8  # five settings, tokenizer and name, each on a line of its own
    assert settings_of_command(report.command(run, run.config["settings"])) == expected
    assert settings_of_command(report.command(run, {})) != expected
    run.config["environment"]["world_size"] = 8
    assert report.command(run, {}).startswith("torchrun --standalone --nproc_per_node=8 -m scripts.base_train")


def test_a_run_by_minutes_has_a_command_that_does_not_depend_on_the_machine(tmp_path):
    changes = {"TARGET_MINUTES": 2.5, "EVALUATIONS_AFTER": 3.0, "DEPTH": 0, "WARMUP_RATIO": 0.25}
    run = read_run(make_run(tmp_path / "r", **changes))
    codes = [block.text for block in report._commands(run) if isinstance(block, report_page.Code)]
    as_it_was, pinned = map(settings_of_command, codes)
    assert {name: as_it_was[name] for name in changes} == changes
    assert {name: value for name, value in pinned.items() if value != as_it_was[name]} == {
        "TARGET_MINUTES": 0.0,
        "EVALUATIONS_AFTER": 0.0,
        "DEPTH": 2,
        "MAX_SEQ_LEN": 64,
        "TOTAL_BATCH_SIZE": 1000,
        "NUM_ITERATIONS": 4,
    }
    run = read_run(make_run(tmp_path / "by-steps", NUM_ITERATIONS=4))
    assert len([block for block in report._commands(run) if isinstance(block, report_page.Code)]) == 1


@pytest.mark.usefixtures("drawn")
def test_settings_that_differ_from_the_defaults_are_marked(tmp_path):
    page = report.build([read_run(make_run(tmp_path / "r"))])[0]
    _, changed, fold = page.sections[5].blocks
    names = {"RUN_NAME", "RESUME", "DATA_DIR", "DEPTH", "BATCH_RAMP"}
    assert {row[0] for row in changed.rows} == names
    (everything,) = fold.blocks
    assert {everything.rows[place][0] for place in everything.marked} == names
    assert len(everything.rows) == len(SETTINGS)
    assert ["BATCH_RAMP", "true", "false"] in everything.rows


# ---- whatever the folder holds ----


@draws
def test_one_step_lost_steps_and_200000_steps_are_drawn_on_a_small_page(tmp_path, recwarn):
    one = make_run(tmp_path / "one", steps=1)
    lost = make_run(tmp_path / "lost", steps=6)
    rows = [json.loads(line) for line in (lost / "metrics.jsonl").read_text().splitlines()]
    for row in rows[2:5]:
        row.update({"train/loss": None, "train/grad_norm": None})
    (lost / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 6, "val/bpb": None}])
    )
    long = make_run(tmp_path / "long", steps=2)
    with open(long / "metrics.jsonl", "w") as file:
        for step in range(1, 200_001):
            file.write(
                f'{{"step": {step}, "train/loss": {2 + 1 / step}, "train/lr": 0.1, "train/grad_norm": {step % 7 + 0.1},'
                f' "train/tok_per_sec": 100.0, "train/seconds": 10.0}}\n'
            )
            if step % 100 == 0:
                file.write(f'{{"step": {step}, "val/bpb": {1 + 1 / step}}}\n')
    path, complaints = report.write([long, one, lost], tmp_path / "all")
    assert complaints == []
    assert [str(warning.message) for warning in recwarn] == []
    assert path.stat().st_size < 2_000_000
    page = check_page(path.read_text(encoding="utf-8"), ["200,000", "200.00 M", "555 h 33 min"])
    assert len(page.images) == 5
    said = next(image["alt"] for image in page.images if "train loss" in image["alt"])
    assert "one from 4 to 4" in said
    assert "lost from" in said
    assert "some steps without a value" in said
    items = {what: value for what, value, _ in report.headline(read_run(lost))}
    assert items["steps without an update"] == "3"
    assert items["validation, bits per byte"] == "3.0000"  # the last that was finite


def test_a_row_that_comes_again_counts_once_and_a_cut_line_is_said(tmp_path):
    folder = make_run(tmp_path / "r")
    with open(folder / "metrics.jsonl", "a") as file:
        again = {"train/loss": 1.0, "train/tok_per_sec": 1000.0, "train/seconds": 1.0}
        file.write(json.dumps({"step": 3, **again}) + "\n" + '[1]\n{"step": "x"}\n{"step": 5, "train/lo')
    run = read_run(folder)
    assert run.steps.tolist() == [1, 2, 3, 4]
    assert run.columns["loss"].tolist() == [4.75, 4.5, 1.0, 4.0]
    assert run.tokens().tolist() == [500, 1000, 2000, 3000]
    assert [complaint for complaint in run.complaints if complaint.startswith("3 lines of metrics.jsonl")]


def test_records_after_the_last_step_are_of_an_attempt_that_was_taken_back(tmp_path):
    folder = make_run(tmp_path / "r")
    (folder / "evaluation" / "step_00000009.json").write_text("{}")
    (folder / "evaluation" / "step_x.json").write_text("{}")
    assert [detail["step"] for detail in read_run(folder).details] == [2, 4]


def test_of_many_records_some_samples_are_shown_and_the_last_documents(tmp_path):
    folder = make_run(tmp_path / "r", steps=100)
    for step in range(1, 100):
        found = {"documents": {"worst": [{"text": f"of {step}"}]}}
        if step % 10 == 0:
            found["samples"] = [{"prompt": "p", "text": f"at {step}"}]
        (folder / "evaluation" / f"step_{step:08d}.json").write_text(json.dumps(found))
    (folder / "evaluation" / "step_00000100.json").write_text("{}")
    run = read_run(folder)
    heading, gallery, *_ = report._samples(run)
    assert heading.text == "After 'p'"
    assert [excerpt.label for excerpt in gallery.blocks] == [
        f"step {step}" for step in (10, 20, 30, 40, 60, 70, 80, 90)
    ]
    assert report._documents(run)[0].text.startswith("After step 99.")
    assert sum("documents" in detail for detail in run.details) == 1


REMOVED = ["metrics.jsonl", "config.json", "evaluation.json", "evaluation/step_00000002.json"]
CONTENTS = [
    None,
    "",
    "[]",
    "{}",
    "nonsense",
    '{"step": 1, "train/loss": NaN, "train/tok_per_sec": 0}',
    '{"core": {"tasks": [1]}}',
]


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", REMOVED)
def test_a_part_that_is_missing_or_nonsense_is_left_out_with_a_line(tmp_path, name, content):
    folder = make_run(tmp_path / "r")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    path, _ = report.write([folder])
    page = check_page(path.read_text(encoding="utf-8"))
    texts = ["".join(parts) for tag, parts in page.texts if tag == "p"]
    if content is None and not name.startswith("evaluation/"):
        assert [text for text in texts if text.startswith("Left out") or "metrics.jsonl could not be read" in text]
    if content == "nonsense":
        assert [text for text in texts if re.search("could not be read", text)]


def test_a_complete_run_leaves_nothing_out(tmp_path, drawn):
    path, complaints = report.write([make_run(tmp_path / "r")])
    assert complaints == []
    assert "Left out" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [None, True, "3", math.nan, math.inf, 10**400, [], {}])
def test_what_is_no_finite_number_is_none(value):
    assert math.isnan(number(value))


# ---- pictures that cannot be drawn ----


def test_without_matplotlib_the_tables_remain_and_one_line_says_how_to_get_pictures(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "r")
    (folder / "report").mkdir()
    (folder / "report" / "loss.png").write_bytes(png())  # of an earlier report
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.main([str(folder)])
    assert capsys.readouterr().out == f"{folder}/report/report.html\n{report.NO_PICTURES}\n"
    assert sorted(file.name for file in (folder / "report").iterdir()) == ["report.html", "report.md"]
    page = check_page(
        (folder / "report" / "report.html").read_text(encoding="utf-8"), ["3,000", "pip install matplotlib"]
    )
    assert page.images == []
    assert sum(text == [report.NO_PICTURES] for _, text in page.texts) == 1


def test_pictures_that_fail_are_said_and_the_rest_is_written(tmp_path, monkeypatch):
    def fail(*parts):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(report_pictures, "png_of", fail)
    path, complaints = report.write([make_run(tmp_path / "r")])
    assert complaints == ["Without pictures: RuntimeError: no fonts"]
    check_page(path.read_text(encoding="utf-8"), ["3,000", "Without pictures: RuntimeError: no fonts"])


def test_a_report_that_fails_at_the_end_of_a_run_is_said_and_not_raised(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "r")
    (folder / "report").write_text("a file where the folder should be")
    monkeypatch.setattr(report_pictures, "png_of", lambda *parts: png())
    assert report.attempt(folder).startswith("report     not written: ")
    assert report.attempt(tmp_path / "nothing").startswith("report     not written: UserError: ")
    (folder / "report").unlink()
    assert report.attempt(folder) == f"report     {folder}/report/report.html"


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [make_run(tmp_path / place / "r") for place in ("a", "b")]
    page = report.build([read_run(folder) for folder in folders])[0]
    assert page.title == f"{folders[0]} against {folders[1]}"


# ---- the command ----


@pytest.mark.usefixtures("drawn")
def test_a_run_is_given_by_its_name_or_its_folder(tmp_path, base_dir, monkeypatch, capsys):
    known = make_run(base_dir / "runs" / "known")
    elsewhere = make_run(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for name, folder in (("known", known), ("elsewhere", elsewhere), ("./elsewhere", elsewhere), (str(known), known)):
        report.main([name])
        assert capsys.readouterr().out == f"{folder}/report/report.html\n"
    monkeypatch.chdir(elsewhere)
    report.main(["."])
    assert capsys.readouterr().out == f"{elsewhere}/report/report.html\n"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "OUT", str(tmp_path / "out"))
    report.main(["known", "elsewhere", "known"])
    assert capsys.readouterr().out == f"{tmp_path}/out/report.html\n"
    assert "<title>known against elsewhere</title>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("drawn")
def test_a_report_replaces_only_a_report(tmp_path):
    run, out = make_run(tmp_path / "r"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    report.write([run], out)
    report.write([run], out)
    (out / "report.html").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(errors.UserError, match=r"report.html") as caught:
        report.write([run], out)
    assert caught.value.exit_code == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_that_is_not_there_is_a_sentence(base_dir):
    with pytest.raises(errors.UserError, match="which run"):
        report.main([])
    with pytest.raises(errors.UserError, match=r"nothing: no run is there.*train one first"):
        report.main(["nothing"])
    make_run(base_dir / "runs" / "known")
    with pytest.raises(errors.UserError, match=r"nothing: no run is there.*runs in .*: known"):
        report.main(["nothing"])
