"""The record of a run: rows of metrics.jsonl, what evaluations found, lines for people, and what goes to wandb."""

import io
import itertools
import json
import math
import sys
from pathlib import Path

import pytest

from nanotrain import metrics as metrics_module
from nanotrain.metrics import MetricLogger

METRICS = {"train/loss": 2.5, "train/lr": 0.01, "train/tok_per_sec": 1234.5}


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run_steps(run_dir, steps, **options):
    with MetricLogger(run_dir, 10, **options) as logger:
        for step in steps:
            logger.step(step, {**METRICS, "train/loss": float(step)}, 1.0)


# ---- metrics.jsonl ----


def test_every_step_is_one_json_line_that_is_on_disk_at_once(tmp_path):
    with MetricLogger(tmp_path / "new" / "run", 2) as logger:
        logger.record(0, {"val/bpb": 1.5})
        assert rows(tmp_path / "new" / "run") == [{"step": 0, "val/bpb": 1.5}]
        logger.step(1, {**METRICS, "data_hash": "00ff"}, 1.0)
        assert rows(tmp_path / "new" / "run")[1:] == [{"step": 1, **METRICS, "data_hash": "00ff"}]


def test_what_json_does_not_have_becomes_null(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with MetricLogger(tmp_path, 2) as logger:
        logger.record(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0, "e": 0, "f": "nan"})
    line = (tmp_path / "metrics.jsonl").read_text()
    expected = {"step": 1, "a": None, "b": None, "c": None, "d": 1.0, "e": 0, "f": "nan"}
    assert json.loads(line, parse_constant=refuse) == expected


@pytest.mark.parametrize("ending", ["", '{"step": 3, "train/lo', '{"step": 3', "{", "\0\0\0\0", "\n\n"])
def test_resuming_cuts_later_rows_and_a_half_written_line_and_goes_on_below(tmp_path, ending):
    run_steps(tmp_path, range(1, 6))
    kept = "".join((tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:3])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(ending)
    run_steps(tmp_path, (4, 5), first_step=3)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith(kept)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_all_rows_of_the_step_resumed_from_stay(tmp_path):
    with MetricLogger(tmp_path, 10) as logger:
        logger.record(0, {"val/bpb": 3.0})
        for step in (1, 2, 3):
            logger.step(step, METRICS, 1.0)
            logger.record(step, {"val/bpb": float(step)})
    run_steps(tmp_path, (), first_step=2)
    assert [(row["step"], row.get("val/bpb")) for row in rows(tmp_path)] == [
        (0, 3.0),
        (1, None),
        (1, 1.0),
        (2, None),
        (2, 2.0),
    ]


def test_a_run_that_starts_over_at_step_zero_keeps_no_row_of_the_first_attempt(tmp_path):
    for _ in range(2):
        with MetricLogger(tmp_path, 10) as logger:
            logger.record(0, {"val/bpb": 3.0})
            logger.step(1, METRICS, 1.0)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_costs_rows_but_not_the_run(tmp_path, capsys):
    with MetricLogger(tmp_path, 10) as logger:
        logger._file.close()
        logger._file = open("/dev/full", "w")  # every write there fails as on a full disk
        for step in range(1, 4):
            logger.step(step, METRICS, 1.0)
    printed = capsys.readouterr().out
    assert printed.count("No space left on device") == 1


# ---- evaluations ----


def evaluations(run_dir):
    """{file name: what is in it}, of all that is in the folder."""
    return {path.name: json.loads(path.read_text()) for path in sorted((run_dir / "evaluation").iterdir())}


def test_the_parts_of_an_evaluation_are_one_file_of_its_step(tmp_path):
    with MetricLogger(tmp_path, 10) as logger:
        logger.evaluation(5, val_bpb=1.5, documents={"worst": [], "best": []})
        logger.evaluation(5, samples=[{"prompt": "a", "text": "b 日"}])
        logger.evaluation(10, val_bpb=None)
    first = {"step": 5, "val_bpb": 1.5, "documents": {"worst": [], "best": []}}
    assert evaluations(tmp_path) == {
        "step_00000005.json": {**first, "samples": [{"prompt": "a", "text": "b 日"}]},
        "step_00000010.json": {"step": 10, "val_bpb": None},
    }


@pytest.mark.parametrize(("resumed", "kept"), [(0, []), (4, []), (5, [5]), (9, [5]), (10, [5, 10])])
def test_resuming_removes_the_evaluations_of_later_steps(tmp_path, resumed, kept):
    with MetricLogger(tmp_path, 10) as logger:
        logger.evaluation(5, val_bpb=1.5)
        logger.evaluation(10, val_bpb=1.2)
    with MetricLogger(tmp_path, 10, first_step=resumed):
        assert list(evaluations(tmp_path)) == [f"step_{step:08d}.json" for step in kept]


def test_an_evaluation_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    (tmp_path / "evaluation").write_text("a file where the folder belongs")
    with MetricLogger(tmp_path, 10) as logger:
        logger.evaluation(5, val_bpb=1.5)
        logger.step(6, METRICS, 1.0)
    assert "an evaluation could not be written" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path)] == [6]


# ---- ranks ----


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    with MetricLogger(tmp_path / "run", 10, enabled=False) as logger:
        logger.set_num_steps(5)
        logger.step(1, METRICS, 1.0)
        logger.record(1, {"val/bpb": 1.0})
        logger.evaluation(1, val_bpb=1.0)
        logger.event("something")
        with logger.progress("evaluation", 3) as update:
            assert update is None
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


# ---- for people ----


def test_without_a_terminal_there_are_plain_lines_some_seconds_apart_and_at_the_end(tmp_path, capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: clock[0])
    with MetricLogger(tmp_path, 9) as logger:
        for step in range(1, 10):
            logger.step(step, {**METRICS, "train/mfu": 0.123}, 42.4)
            clock[0] += 2.0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 1/9", "step 4/9", "step 7/9", "step 9/9"]
    assert lines[0] == "step 1/9: loss 2.5000, lr 0.01, 1,234 tok/s, mfu 12.3%, 42 s left"
    assert captured.err == ""
    assert "\r" not in captured.out


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def plain_seconds(tmp_path, capsys, monkeypatch):
    """When the lines of three hours of steps of a second come."""
    clock = [1000.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: clock[0])
    with MetricLogger(tmp_path, 3 * 3600) as logger:
        for step in range(1, 3 * 3600 + 1):
            clock[0] += 1
            logger.step(step, METRICS, 0.0)
    return [int(line.partition("/")[0].removeprefix("step ")) for line in capsys.readouterr().out.splitlines()]


def test_lines_come_often_at_first_and_a_log_of_hours_stays_short(tmp_path, capsys, monkeypatch):
    seconds = plain_seconds(tmp_path, capsys, monkeypatch)
    gaps = [after - before for before, after in itertools.pairwise(seconds)]
    assert len(seconds) < 400
    assert seconds[0] == 1
    assert max(gaps[:20]) <= 6
    assert max(gaps) <= 61
    monkeypatch.setattr(metrics_module, "PLAIN_SHARE", 0.0)
    assert len(plain_seconds(tmp_path, capsys, monkeypatch)) > 1000


def test_on_a_terminal_there_is_a_bar_and_no_line_for_a_step(tmp_path, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with MetricLogger(tmp_path, 9, first_step=3) as logger:
        assert logger.bar.n == 3
        logger.step(4, METRICS, 42.0)
        logger.event("something happened")
        logger.set_num_steps(7)
        assert (logger.bar.n, logger.bar.total) == (4, 7)
        with logger.progress("evaluation", 3) as update:
            update(2)
    assert "loss 2.5000" in terminal.getvalue()
    assert "/7" in terminal.getvalue()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in lines if line.strip()] == ["something happened"]


# ---- wandb ----


class Told:
    """Stands in for a WandbRun: what it was told."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


def test_wandb_is_told_of_every_evaluation_and_of_some_steps_and_the_last(tmp_path):
    told = Told()
    with MetricLogger(tmp_path, 7) as logger:
        logger.use_wandb(told, every=3)
        for step in range(1, 8):
            logger.step(step, {**METRICS, "train/grad_norm": math.nan}, 1.0)
        logger.record(7, {"val/bpb": 1.0})
        logger.evaluation(7, val_bpb=1.0)
    row = {**METRICS, "train/grad_norm": None}
    assert told.calls == [
        *(("log", step, row) for step in (3, 6, 7)),
        ("log", 7, {"val/bpb": 1.0}),
        ("evaluation", 7, {"val_bpb": 1.0}),
        ("close", False),
    ]
    assert len(rows(tmp_path)) == 8


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_wandb_is_closed_on_every_way_out_and_knows_that_the_run_has_failed(tmp_path, error):
    told = Told()

    def run():
        with MetricLogger(tmp_path, 7) as logger:
            logger.use_wandb(told)
            raise error

    with pytest.raises(error):
        run()
    assert told.calls == [("close", True)]
