"""The report: its numbers, what a page may hold, and that a report is made of whatever a run's folder holds."""

import json
import math
import shlex
from xml.etree import ElementTree

import pytest

from nanotrain import config, errors, report
from nanotrain.report import __main__ as command_line
from nanotrain.report import pictures, sections
from nanotrain.report.data import read_run
from scripts import base_train

HOSTILE = "</pre><script>alert('1')</script>\"><img src=x onerror=alert(2)> & <!-- "


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
        "recipe": {"batch_ramp": True, "grad_clip": 0.5},
        "model_config": {"vocab_size": 300, "num_layers": 2, "max_seq_len": 64},
        "tokenizer_sha256": "00ff",
        "data": {"validation": "v", "files": {"v": {"bytes": 10, "sha256": "aa"}}},
        "settings": settings | {"RUN_NAME": folder.name} | changes,
        "defaults": defaults,
    }
    (folder / "config.json").write_text(json.dumps(recorded))
    task = {"accuracy": 0.8, "baseline": 0.6, "standard_error": 0.1, "centered": 0.5, "num_items": 16}
    core = {"core_metric": 0.5, "standard_error": 0.25, "is_core": False, "tasks": {texts[-1]: task}}
    evaluation = {"step": steps, "doc_bpb": 1.5, "compared_bpb": {"xz -9": 1.9}, "train_bpb": 1.0, "core": core}
    evaluation["samples"] = list(texts)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "evaluation").mkdir()
    for step in (steps // 2, steps):
        document = {"text": texts[0], "bpb": 2.5, "tokens": [[text, 3.25] for text in texts]}
        found = {"step": step, "samples": [{"prompt": text, "text": f"{text} at {step}"} for text in texts]}
        found |= {"documents": {"worst": [document], "best": [document]}}
        (folder / "evaluation" / f"step_{step:08d}.json").write_text(json.dumps(found))
    return folder


class Page:
    """A page read strictly: nothing in it runs or reaches out, and every element ends where it should."""

    TAGS = "html head title style body h1 h2 h3 h4 p div span pre figure figcaption table thead tbody tr th td meta"
    TAGS += " svg path text circle"
    ATTRIBUTES = "lang class title scope tabindex charset name content http-equiv role aria-label viewBox d x y r cx cy"
    ATTRIBUTES += " fill stroke stroke-width stroke-dasharray opacity text-anchor font-family font-size"

    def __init__(self, path):
        self.root = ElementTree.parse(path).getroot()
        for element in self.root.iter():
            element.tag = element.tag.removeprefix("{http://www.w3.org/2000/svg}")
            assert element.tag in self.TAGS.split()
            assert set(element.keys()) <= set(self.ATTRIBUTES.split())
        policy = self.root.find(".//meta[@http-equiv='Content-Security-Policy']").get("content")
        assert policy == "default-src 'none'; style-src 'unsafe-inline'"
        self.rows = [["".join(cell.itertext()) for cell in row] for row in self.root.iter("tr")]

    def all(self, tag):
        return ["".join(element.itertext()) for element in self.root.iter(tag)]


def written(*folders):
    return Page(report.write(folders))


def test_the_numbers_of_the_page_are_those_of_the_files(tmp_path):
    page = written(make_run(tmp_path / "r"))
    expected = {
        "How good is it?": "1.5000 bits per byte on whole validation documents; xz -9 1.90",
        "How long did it train?": "0.1 minutes, 4 steps, 0.0 M tokens",
        "Is it still improving?": "yes, -1.7500 bits per byte from step 0 to 4",
        "bits per byte, validation sequences, last": "1.2500 (step 4)",
        "bits per byte, whole validation documents": "1.5000 (step 4)",
        "tasks": "0.5000 ± 0.2500 (step 4)",
        "training loss, mean of the last 20 steps, nats per token": "4.3750",  # of 4.75, 4.5, 4.25, 4.0
        "tokens": "3,000",
        "tokens per second, median": "375",
        "parameters": "3,500,000",
        "forward and backward": "1,250.0 ms, 62.5%",
        "a plain text": "0.800 ± 0.100 of 16 items (guessing 0.600): 0.500",
        "DEPTH": "2",
        "grad_clip": "0.5",
    }
    assert expected.items() <= {row[0]: row[1] for row in page.rows}.items()
    marked = {row[0].text for row in page.root.iter("tr") if row.get("class") == "marked"}
    assert marked == {"BATCH_RAMP", "DATA_DIR", "DEPTH", "RESUME", "RUN_NAME"}
    assert {"class": "b3", "title": "3.2 bits"} in [span.attrib for span in page.root.iter("span")]
    assert page.all("figcaption")[:2] == ["step 2", "step 4"]
    assert "Not recorded" not in "".join(page.all("p"))


def settings_of_command(text):
    """What a command line sets, by the script's own reading of it."""
    words = shlex.split(text.replace("\\\n", " "))
    namespace = dict(vars(base_train))
    config.override(namespace, words[words.index("scripts.base_train") + 1 :])
    return config.settings(namespace)


def test_the_command_sets_what_the_run_had(tmp_path):
    run = read_run(make_run(tmp_path / "r", SCHEDULE="cosine", TARGET_MINUTES=2.5))
    expected = {**run.config["settings"], "RESUME": False, "RUN_NAME": "r-again", "TOKENIZER_DIR": str(run.folder)}
    same, fixed = (shown[0][1][0][0] for shown in sections.commands(run).values())
    assert "git checkout abc123\npython -m scripts.base_train" in same
    assert settings_of_command(same) == expected
    shape = {"DEPTH": 2, "MAX_SEQ_LEN": 64, "TOTAL_BATCH_SIZE": 1000, "NUM_ITERATIONS": 4, "TARGET_MINUTES": 0.0}
    assert settings_of_command(fixed) == expected | shape
    run.config["environment"]["world_size"] = 8
    assert sections.command(run, {}).startswith("torchrun --standalone --nproc_per_node=8 -m scripts.base_train")


def test_several_runs_are_side_by_side(tmp_path):
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two", MATRIX_LR=0.5), make_run(tmp_path / "three")]
    (folders[2] / "metrics.jsonl").unlink()
    page = written(*folders)
    assert page.all("h1") == ["one and two and three"]
    assert page.rows[0] == ["", "one", "two", "three"]
    assert ["tokens", "3,000", "3,000", ""] in page.rows
    assert ["MATRIX_LR", "-1.0", "0.5", "-1.0", "-1.0"] in page.rows
    assert ["two" in text for text in page.all("svg")] == [True] * len(pictures.CURVES)


def test_the_curves_are_those_of_the_runs_and_the_pictures_are_in_the_page(tmp_path):
    folders = [make_run(tmp_path / "one", steps=6), make_run(tmp_path / "two", steps=300)]
    with open(folders[0] / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 6, "train/loss": None, "train/tok_per_sec": 500, "train/seconds": 2.0}) + "\n")
    runs = [read_run(folder) for folder in folders]
    x, y, lost = pictures.curve(runs[0], "train/loss", pictures.TOKENS)
    assert (x * 1e6).tolist() == pytest.approx([500, 1000, 1500, 2500, 3500])
    assert (lost * 1e6).tolist() == pytest.approx([4500])
    assert y == pytest.approx([5 - step / 6 for step in range(1, 6)])
    assert pictures.curve(runs[0], "train/loss", pictures.MINUTES)[0] * 60 == pytest.approx([2, 4, 6, 8, 10])
    mean = pictures.running_mean(pictures.curve(runs[1], "train/loss", pictures.TOKENS)[1])
    assert mean == pytest.approx([5 - (step - 1.5) / 300 for step in range(4, 301)])  # of 4 values
    assert [label for _, label in pictures.ticks(0.0, 0.31)] == ["0.0", "0.1", "0.2", "0.3"]
    page, files = written(*folders), (folders[0] / "report" / f"{name}.svg" for name in pictures.CURVES)
    assert page.all("svg") == ["".join(ElementTree.parse(file).getroot().itertext()) for file in files]
    circles = [circle for circle in page.root.iter("circle") if circle.get("fill") == pictures.COLOURS[0]]
    assert len(circles) == 2 * 2 + 2 * 5 + 1 + 3 * 6, "a dot for each finite value of the short run"


def test_whatever_a_run_holds_is_shown_as_text_and_never_obeyed(tmp_path):
    name = "<script>alert(1)<"
    folders = [make_run(tmp_path / str(n) / name, texts=("fine \ud800", HOSTILE), DATA_DIR=HOSTILE) for n in range(2)]
    for page in (written(folders[0]), written(*folders)):
        for tag in ("td", "th", "span", "h4"):
            assert any(HOSTILE in text or repr(HOSTILE) in text for text in page.all(tag)), tag
        assert name in page.all("title")[0]


@pytest.mark.parametrize("content", [None, '{"format": 1}', "{cut"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "evaluation.json", "evaluation/step_00000004.json"])
def test_a_part_that_is_missing_or_cut_is_left_out(tmp_path, name, content):
    folder = make_run(tmp_path / "r")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    page = written(folder)
    assert len(page.all("h2")) == 11
    said = "".join(page.all("p"))
    assert "could not be read" in said or content != "{cut"
    assert "has format 1" in said or (name, content) != ("config.json", '{"format": 1}')
    assert ("bits per byte, training text" in page.all("th")) == (name != "evaluation.json")
    assert ("parameters" in page.all("th")) == (name != "config.json")
    assert ("optimizer" in page.all("th")) == (name != "metrics.jsonl")


def test_the_last_row_of_a_step_counts_and_what_a_resume_took_back_does_not(tmp_path):
    folder = make_run(tmp_path / "r")
    (folder / "evaluation" / "step_00000009.json").write_text('{"step": 9}')
    with open(folder / "metrics.jsonl", "a") as file:
        again = {"step": 3, "train/loss": 1.0, "train/tok_per_sec": 1000.0, "train/seconds": 1.0, "val/bpb": math.nan}
        file.write(json.dumps(again) + "\n" + '[1]\n{"step": "x"}\n{"step": 5, "train/lo')
    run = read_run(folder)
    assert run.column("loss").tolist() == [4.75, 4.5, 1.0, 4.0]
    assert run.tokens([0, 1, 2, 3, 4]).tolist() == [0, 500, 1000, 2000, 3000]
    assert [record["step"] for record in run.records] == [2, 4]
    assert any(problem.startswith("3 lines of metrics.jsonl") for problem in run.problems)
    assert sections.results(run)["bits per byte, validation sequences, last"] == "1.2500 (step 4)"


def test_a_report_that_fails_at_the_end_of_a_run_is_said_and_not_raised(tmp_path):
    assert report.attempt(tmp_path / "nothing").startswith("report     not written: UserError: ")


def test_a_run_is_given_by_its_name_or_its_folder(tmp_path, base_dir, monkeypatch, capsys):
    runs = [make_run(base_dir / "runs" / "known"), make_run(tmp_path / "elsewhere")]
    command_line.main(["known", str(runs[1]), "known"])
    assert capsys.readouterr().out == f"{runs[0]}/report/report.html\n"
    monkeypatch.setattr(command_line, "OUT", str(tmp_path / "out"))
    command_line.main(["known", str(runs[1])])
    assert Page(tmp_path / "out" / "report.html").all("title") == ["known and elsewhere"]
    for names, words in (([], "no run given"), (["nothing"], "nothing: no run is there")):
        with pytest.raises(errors.UserError, match=words):
            command_line.main(names)
