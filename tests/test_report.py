"""The report: its numbers, what a page may hold, and that nothing in a run's folder keeps it from being made."""

import base64
import importlib.util
import json
import math
import re
import shlex
import sys
from html.parser import HTMLParser

import pytest

from nanotrain import config, errors, report
from nanotrain.report import __main__ as command_line
from nanotrain.report import pictures, sections
from nanotrain.report.data import read_run
from scripts import base_train

HOSTILE = (
    "</pre><script>alert('1')</script>\"><img src=x onerror=alert(2)> & ``` ]]> | \x07\u202e \ud800 <!-- \n````\n# no"
)
VISIBLE = HOSTILE.replace("\x07", "\ufffd").replace("\u202e", "\ufffd").replace("\ud800", "\ufffd")
draws = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib: the extra `report`")


@pytest.fixture
def quick(monkeypatch):
    """Pictures are not drawn."""
    monkeypatch.setattr(pictures, "draw", lambda runs: {name: (b"PNG", name) for name in pictures.NAMES})


def make_run(folder, steps=4, texts=("a plain text",), **changes):
    """The folder of a run of `steps` steps of 1,000 tokens, the first half of them of 500, each of 2 seconds."""
    folder.mkdir(parents=True)
    rows = [{"step": 0, "val/bpb": 3.0}]
    for step in range(1, steps + 1):
        row = {"train/loss": 5.0 - step / steps, "train/lr": 0.1, "train/grad_norm": 1.0, "train/epoch": 1}
        row |= {"train/tok_per_sec": 250 if step <= steps // 2 else 500, "train/seconds": 2.0}
        rows.append({"step": step, **row, "train/loader_seconds": 0.5, "train/optimizer_seconds": 0.25})
    rows += [{"step": steps, "val/bpb": 1.25, "core/core_metric": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = config.defaults(base_train.__file__)
    settings = defaults | {"DEPTH": 2, "BATCH_RAMP": True, "DATA_DIR": "/data/my text", "RESUME": True}
    recorded = {
        "format": 2,
        "plan": {"total_batch_size": 1000, "parameters": {"matrix": 3_000_000, "embedding": 500_000}},
        "environment": {"world_size": 1, "commit": "abc123", "packages": {"torch": "2"}, "device_name": texts[-1]},
        "model_config": {"vocab_size": 300, "num_layers": 2, "max_seq_len": 64},
        "tokenizer_sha256": "00ff",
        "data": {"validation": "v", "files": {"v": {"bytes": 10, "sha256": "aa"}}},
        "settings": settings | {"RUN_NAME": folder.name} | changes,
        "defaults": defaults,
    }
    (folder / "config.json").write_text(json.dumps(recorded))
    task = {"accuracy": 0.8, "baseline": 0.6, "standard_error": 0.1, "centered": 0.5, "num_items": 16}
    core = {"core_metric": 0.5, "standard_error": 0.25, "is_core": False, "tasks": {texts[-1]: task}}
    evaluation = {"step": steps, "doc_bpb": 1.5, "train_bpb": 1.0, "core": core, "samples": list(texts)}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "evaluation").mkdir()
    for step in (steps // 2, steps):
        document = {"text": texts[0], "bpb": 2.5, "tokens": [[text, 3.25] for text in texts]}
        found = {"step": step, "samples": [{"prompt": text, "text": f"{text} at {step}"} for text in texts]}
        found |= {"documents": {"worst": [document], "best": [document]}}
        (folder / "evaluation" / f"step_{step:08d}.json").write_text(json.dumps(found))
    return folder


class Page(HTMLParser):
    """Reads a page strictly: nothing in it runs or reaches out, and every element ends where it should."""

    VOID = ("meta", "link", "img")
    TAGS = "html head title style body header h1 h2 h3 p nav a main section div b span pre figure figcaption table"
    TAGS += " caption thead tbody tr th td details summary meta link img"

    def __init__(self, folder):
        super().__init__(convert_charrefs=True)
        text = (folder / "report.html").read_text(encoding="utf-8")
        self.open, self.texts, self.images, self.tables, self.spans, self.marked = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        assert "default-src 'none'" in text
        styles = "".join(text for tag, text in self.texts if tag == "style")
        assert "url(" not in styles
        assert "@import" not in styles

    def handle_starttag(self, tag, attributes):
        assert tag in self.TAGS.split(), tag
        allowed = {"href": r"data:,|#s\d", "src": r"data:image/png;base64,[\w+/=]+"}
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("style", "srcset", "action"), (tag, name)
            assert name not in allowed or re.fullmatch(allowed[name], value), value
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
            self.changed = ("class", "changed") in attributes
        if tag == "span":
            self.spans.append(dict(attributes))
        if tag not in self.VOID:
            self.open.append((tag, []))

    def handle_endtag(self, tag):
        opened, parts = self.open.pop()
        assert opened == tag
        self.texts.append((tag, "".join(parts)))
        if tag in ("th", "td"):
            self.tables[-1][-1].append("".join(parts))
            self.marked += ["".join(parts)] if tag == "th" and self.changed else []

    def handle_data(self, data):
        for _, parts in self.open:
            parts.append(data)

    def handle_comment(self, data):
        raise AssertionError("a comment")

    unknown_decl = handle_pi = handle_comment

    def all(self, tag):
        return [text for found, text in self.texts if found == tag]


def written(*folders):
    path, _ = report.write(folders)
    return Page(path.parent)


def outside_of_code(folder, wanted):
    """What is in no block of code of report.md; `wanted` is in one, and outside there is no HTML."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    code = re.compile(r"^(`{3,})\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)
    assert any(wanted in block for _, block in code.findall(text))
    outside = code.sub("", text)
    assert "<" not in outside
    return outside


# ---- content ----


@pytest.mark.usefixtures("quick")
def test_the_numbers_of_the_page_are_those_of_the_files(tmp_path):
    page = written(make_run(tmp_path / "r"))
    numbers = {what: re.sub(r" \(step 4\)", "", value) for what, value in page.tables[0][1:]}
    assert numbers == {
        "validation, bits per byte, last": "1.2500",
        "validation, bits per byte, best": "1.2500",
        "whole validation documents, bits per byte": "1.5000",
        "train text, bits per byte": "1.0000",
        "tasks": "0.5000 ± 0.2500",
        "train loss of the last 20 steps, nats per token": "4.3750",  # of 4.75, 4.5, 4.25, 4.0
        "steps": "4",
        "tokens": "3,000",
        "epoch of the text": "2",
        "time of the steps, without evaluations and saves": "0:00:08",
        "tokens per second, median": "375",
        "tokens of a batch": "1,000",
        "weights": "3,500,000",
    }
    times, evaluations, tasks = page.tables[1:4]
    assert [row[1:] for row in times[1:]] == [["1,250.0 ms", "62.5%"], ["500.0 ms", "25.0%"], ["250.0 ms", "12.5%"]]
    assert evaluations[1:] == [["0", "0", "3.0000", ""], ["4", "3,000", "1.2500", "0.5000"]]
    assert tasks[1] == ["a plain text", "0.800", "0.100", "0.600", "0.500", "16"]
    assert {"class": "b2", "title": "3.2 bits"} in page.spans
    assert [label for label in page.all("figcaption") if label.startswith("step")] == ["step 2", "step 4"]
    assert not [text for text in page.all("p") if "Left out" in text]
    assert sorted(page.marked) == ["BATCH_RAMP", "DATA_DIR", "DEPTH", "RESUME", "RUN_NAME"]
    outside = outside_of_code(tmp_path / "r" / "report", "a plain text at 4")
    assert re.findall("^## (.*)$", outside, re.MULTILINE) == page.all("h2")
    assert "| tokens | 3,000 |" in outside
    assert "Most bits: 'a plain text' 3.2" in outside


def settings_of_command(text):
    """What a command line sets, by the script's own reading of it."""
    words = shlex.split(text.replace("\\\n", " "))
    namespace = dict(vars(base_train))
    config.override(namespace, words[words.index("scripts.base_train") + 1 :])
    return config.settings(namespace)


def test_the_command_sets_what_the_run_had(tmp_path):
    run = read_run(make_run(tmp_path / "r", SCHEDULE="cosine", TARGET_MINUTES=2.5))
    expected = {**run.config["settings"], "RESUME": False, "RUN_NAME": "r-again", "TOKENIZER_DIR": str(run.folder)}
    codes = [block["code"] for block in sections._commands(run) if "code" in block]
    assert "git checkout abc123\npython -m scripts.base_train" in codes[0]
    assert settings_of_command(codes[0]) == expected
    fixed = {"DEPTH": 2, "MAX_SEQ_LEN": 64, "TOTAL_BATCH_SIZE": 1000, "NUM_ITERATIONS": 4, "TARGET_MINUTES": 0.0}
    assert settings_of_command(codes[1]) == expected | fixed
    assert settings_of_command(sections.command(run, run.config["settings"])) == expected
    assert settings_of_command(sections.command(run, {})) != expected
    run.config["environment"]["world_size"] = 8
    assert sections.command(run, {}).startswith("torchrun --standalone --nproc_per_node=8 -m scripts.base_train")


@pytest.mark.usefixtures("quick")
def test_several_runs_are_side_by_side_with_what_differs(tmp_path):
    runs = [make_run(tmp_path / name, **changes) for name, changes in (("one", {}), ("two", {"MATRIX_LR": 0.5}))]
    page = written(*runs)
    assert page.all("h1") == ["one against two"]
    assert page.tables[0][0] == ["", "one", "two"]
    assert ["tokens", "3,000", "3,000"] in page.tables[0]
    assert [["", "one", "two"], ["MATRIX_LR", "0.04", "0.5"]] in page.tables
    assert written(*(make_run(tmp_path / place / "r") for place in "ab")).all("h1") == [
        f"{tmp_path}/a/r against {tmp_path}/b/r"
    ]


@draws
def test_the_curves_are_those_of_the_runs_and_the_pictures_are_in_the_page(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **named: figures.append(self) or save(self, *args, dpi=40, **named)
    )
    folders = [make_run(tmp_path / "one", steps=6), make_run(tmp_path / "two", steps=300)]
    with open(folders[0] / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 6, "train/loss": None, "train/tok_per_sec": 500, "train/seconds": 2.0}) + "\n")
    page = written(*folders)
    one, cross, mean, two, _ = figures[0].axes[0].get_lines()
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == ["one", "two"]
    assert one.get_xdata() * 1e6 == pytest.approx([500, 1000, 1500, 2500, 3500])
    assert one.get_ydata() == pytest.approx([5 - step / 6 for step in range(1, 6)])
    assert cross.get_xdata() * 1e6 == pytest.approx([4500])
    assert two.get_ydata() == pytest.approx([5 - step / 300 for step in range(1, 301)])
    assert mean.get_ydata() == pytest.approx([5 - (step - 1.5) / 300 for step in range(4, 301)])  # of 4 values
    assert [bar.get_width() for bar in figures[4].axes[0].patches] == [0.5, 0.5]
    assert "one from 4.833 to 4.167 at 0.0035 million tokens" in page.images[0]["alt"]
    embedded = [base64.b64decode(image["src"].partition(",")[2]) for image in page.images]
    assert embedded == [(folders[0] / "report" / f"{name}.png").read_bytes() for name in pictures.NAMES]
    monkeypatch.setattr(pictures, "CURVES", {"loss": pictures.CURVES["loss"]})
    again, other = (pictures.draw([read_run(folder) for folder in some])["loss"][0] for some in (folders, folders[:1]))
    assert embedded[0] == again != other


# ---- whatever the folder holds ----


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("count", [1, 2])
def test_whatever_a_run_holds_is_shown_as_text_and_never_obeyed(tmp_path, count):
    name = "<script>alert(1)<"
    folders = [make_run(tmp_path / str(n) / name, texts=("fine", HOSTILE), DATA_DIR=HOSTILE) for n in range(count)]
    page = written(*folders)
    assert any(VISIBLE.replace("\n", "⏎\n") in text for text in page.all("span"))
    for tag in ("td", "th", "pre"):
        assert any(VISIBLE in text for text in page.all(tag)), tag
    assert name in page.all("title")[0]
    outside_of_code(folders[0] / "report", VISIBLE)


@pytest.mark.usefixtures("quick")
def test_the_check_of_the_page_notices_text_that_is_not_escaped(tmp_path, monkeypatch):
    environment = report.jinja2.Environment
    monkeypatch.setattr(report.jinja2, "Environment", lambda **named: environment(**named | {"autoescape": False}))
    with pytest.raises(AssertionError):
        written(make_run(tmp_path / "r", texts=("fine", HOSTILE)))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "content", [None, "[]", "{}", "{cut", '{"step": 1, "core": {"tasks": [1]}, "format": 2}', '{"format": 1}']
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "evaluation.json", "evaluation/step_00000004.json"])
def test_a_part_that_is_missing_or_damaged_is_left_out_with_a_line(tmp_path, name, content):
    folder = make_run(tmp_path / "r")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    page = written(folder)
    lines = [text for text in page.all("p") if re.search("[Ll]eft out|could not be read", text)]
    assert lines or name.startswith("evaluation/")  # without the last there is one before
    assert len(page.all("h2")) == 8
    if content == "{cut" or (name, content) == ("config.json", '{"format": 1}'):
        assert [line for line in lines if name.rpartition("/")[2] in line]


@pytest.mark.usefixtures("quick")
def test_the_last_row_of_a_step_counts_and_what_a_resume_took_back_does_not(tmp_path):
    folder = make_run(tmp_path / "r")
    (folder / "evaluation" / "step_00000009.json").write_text('{"step": 9}')
    with open(folder / "metrics.jsonl", "a") as file:
        again = {"step": 3, "train/loss": 1.0, "train/tok_per_sec": 1000.0, "train/seconds": 1.0, "val/bpb": math.nan}
        file.write(json.dumps(again) + "\n" + '[1]\n{"step": "x"}\n{"step": 5, "train/lo')
    run = read_run(folder)
    assert run.steps() == [1, 2, 3, 4]
    assert run.column("loss").tolist() == [4.75, 4.5, 1.0, 4.0]
    assert run.tokens().tolist() == [500, 1000, 2000, 3000]
    assert [record["step"] for record in run.records] == [2, 4]
    assert ["documents" in record for record in run.records] == [False, True]
    assert [complaint for complaint in run.complaints if complaint.startswith("3 lines of metrics.jsonl")]
    assert sections.headline(run)["validation, bits per byte, last"] == "1.2500 (step 4)"


def test_the_newest_scores_count(tmp_path):
    folder = make_run(tmp_path / "r")
    task = {"accuracy": 0.7, "standard_error": 0.1, "baseline": 0.5, "centered": 0.4, "num_items": 9}
    core = {"core_metric": 0.4, "standard_error": 0.2, "is_core": True, "tasks": {"t": task}}
    (folder / "evaluation" / "step_00000004.json").write_text(json.dumps({"step": 4, "core": core}))
    assert read_run(folder).core()["name"] == "tasks"  # of the same step: what base_eval says
    evaluation = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({**evaluation, "step": 3}))
    assert sections.headline(read_run(folder))["CORE"] == "0.4000 ± 0.2000 (step 4)"


# ---- pictures that cannot be drawn, and the command ----


def test_without_matplotlib_the_tables_remain_and_one_line_says_how_to_get_pictures(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "r")
    (folder / "report").mkdir()
    (folder / "report" / "loss.png").write_bytes(b"of an earlier report")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command_line.main([str(folder)])
    path, line = capsys.readouterr().out.splitlines()
    assert (path, "pip install matplotlib" in line) == (f"{folder}/report/report.html", True)
    assert sorted(file.name for file in (folder / "report").iterdir()) == ["report.html", "report.md"]
    page = Page(folder / "report")
    assert (page.images, page.all("p").count(line)) == ([], 1)
    assert ["tokens", "3,000"] in page.tables[0]


def test_a_report_that_fails_at_the_end_of_a_run_is_said_and_not_raised(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "r")
    (folder / "report").write_text("a file where the folder should be")
    monkeypatch.setattr(pictures, "draw", lambda runs: 1 / 0)
    assert report.attempt(folder).startswith("report     not written: ")
    assert report.attempt(tmp_path / "nothing").startswith("report     not written: UserError: ")
    (folder / "report").unlink()
    assert report.attempt(folder).startswith(f"report     {folder}/report/report.html\nWithout pictures: ZeroDivision")


@pytest.mark.usefixtures("quick")
def test_a_run_is_given_by_its_name_or_its_folder(tmp_path, base_dir, monkeypatch, capsys):
    known = make_run(base_dir / "runs" / "known")
    elsewhere = make_run(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for name, folder in (("known", known), ("elsewhere", elsewhere), ("./elsewhere", elsewhere), (str(known), known)):
        command_line.main([name])
        assert capsys.readouterr().out == f"{folder}/report/report.html\n"
    monkeypatch.setattr(command_line, "OUT", str(tmp_path / "out"))
    command_line.main(["known", "elsewhere", "known"])
    assert Page(tmp_path / "out").all("title") == ["known against elsewhere"]
    for names, words in (([], "which run"), (["nothing"], "nothing: no run is there.*known")):
        with pytest.raises(errors.UserError, match=words):
            command_line.main(names)


@pytest.mark.usefixtures("quick")
def test_a_report_replaces_only_a_report(tmp_path):
    run, out = make_run(tmp_path / "r"), tmp_path / "out"
    report.write([run], out)
    report.write([run], out)
    (out / "report.html").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(errors.UserError, match=r"report.html"):
        report.write([run], out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
