"""The record of a run: rows of metrics.jsonl, lines for people, and a wandb that can never end a run."""

import io
import itertools
import json
import math
import sys
import types
from pathlib import Path

import pytest

from nanotrain import tracker as tracker_module
from nanotrain.tracker import Tracker

METRICS = {"train/loss": 2.5, "train/lr": 0.01, "train/tok_per_sec": 1234.5}


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run_steps(run_dir, steps, **options):
    with Tracker(run_dir, "r", {}, 10, **options) as tracker:
        for step in steps:
            tracker.step(step, {**METRICS, "train/loss": float(step)}, 1.0)


# ---- metrics.jsonl ----


def test_every_step_is_one_json_line_that_is_on_disk_at_once(tmp_path):
    with Tracker(tmp_path / "new" / "run", "r", {}, 2) as tracker:
        tracker.record(0, {"val/bpb": 1.5})
        assert rows(tmp_path / "new" / "run") == [{"step": 0, "val/bpb": 1.5}]
        tracker.step(1, {**METRICS, "data_hash": "00ff"}, 1.0)
        assert rows(tmp_path / "new" / "run")[1:] == [{"step": 1, **METRICS, "data_hash": "00ff"}]


def test_what_json_does_not_have_becomes_null(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with Tracker(tmp_path, "r", {}, 2) as tracker:
        tracker.record(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0, "e": 0, "f": "nan"})
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
    with Tracker(tmp_path, "r", {}, 10) as tracker:
        tracker.record(0, {"val/bpb": 3.0})
        for step in (1, 2, 3):
            tracker.step(step, METRICS, 1.0)
            tracker.record(step, {"val/bpb": float(step)})
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
        with Tracker(tmp_path, "r", {}, 10) as tracker:
            tracker.record(0, {"val/bpb": 3.0})
            tracker.step(1, METRICS, 1.0)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_costs_rows_but_not_the_run(tmp_path, capsys):
    with Tracker(tmp_path, "r", {}, 10) as tracker:
        tracker._file.close()
        tracker._file = open("/dev/full", "w")  # every write there fails as on a full disk
        for step in range(1, 4):
            tracker.step(step, METRICS, 1.0)
    printed = capsys.readouterr().out
    assert printed.count("No space left on device") == 1


# ---- ranks ----


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    with Tracker(tmp_path / "run", "r", {}, 10, wandb_mode="online", enabled=False) as tracker:
        tracker.set_num_steps(5)
        tracker.step(1, METRICS, 1.0)
        tracker.record(1, {"val/bpb": 1.0})
        tracker.event("something")
        with tracker.progress("evaluation", 3) as update:
            assert update is None
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


# ---- for people ----


def test_without_a_terminal_there_are_plain_lines_some_seconds_apart_and_at_the_end(tmp_path, capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(tracker_module.time, "monotonic", lambda: clock[0])
    with Tracker(tmp_path, "r", {}, 9) as tracker:
        for step in range(1, 10):
            tracker.step(step, {**METRICS, "train/mfu": 0.123}, 42.4)
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
    monkeypatch.setattr(tracker_module.time, "monotonic", lambda: clock[0])
    with Tracker(tmp_path, "r", {}, 3 * 3600) as tracker:
        for step in range(1, 3 * 3600 + 1):
            clock[0] += 1
            tracker.step(step, METRICS, 0.0)
    return [int(line.partition("/")[0].removeprefix("step ")) for line in capsys.readouterr().out.splitlines()]


def test_lines_come_often_at_first_and_a_log_of_hours_stays_short(tmp_path, capsys, monkeypatch):
    seconds = plain_seconds(tmp_path, capsys, monkeypatch)
    gaps = [after - before for before, after in itertools.pairwise(seconds)]
    assert len(seconds) < 400
    assert seconds[0] == 1
    assert max(gaps[:20]) <= 6
    assert max(gaps) <= 61
    monkeypatch.setattr(tracker_module, "PLAIN_SHARE", 0.0)
    assert len(plain_seconds(tmp_path, capsys, monkeypatch)) > 1000


def test_on_a_terminal_there_is_a_bar_and_no_line_for_a_step(tmp_path, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Tracker(tmp_path, "r", {}, 9, first_step=3) as tracker:
        assert tracker.bar.n == 3
        tracker.step(4, METRICS, 42.0)
        tracker.event("something happened")
        tracker.set_num_steps(7)
        assert (tracker.bar.n, tracker.bar.total) == (4, 7)
        with tracker.progress("evaluation", 3) as update:
            update(2)
    assert "loss 2.5000" in terminal.getvalue()
    assert "/7" in terminal.getvalue()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in lines if line.strip()] == ["something happened"]


# ---- wandb ----


class FakeWandb(types.ModuleType):
    """Stands in for wandb: records what it is given, and fails where it is told to."""

    def __init__(self, failing=()):
        super().__init__("wandb")
        self.failing, self.inits, self.logged, self.finished, self.id = set(failing), [], [], False, "abc123"

    def fail(self, *places):
        if self.failing & set(places):
            raise ConnectionError(f"no {places[0]}")

    def Settings(self, **settings):
        self.fail("Settings")
        return settings

    def init(self, **options):
        self.inits.append(options)
        self.fail("init", options["mode"])
        return self

    def log(self, row):
        self.fail("log")
        self.logged.append(row)

    def finish(self):
        self.finished = True
        self.fail("finish")


def track(run_dir, **options):
    with Tracker(run_dir, "r", {"DEPTH": 4}, 10, **options) as tracker:
        tracker.record(1, {"loss": math.nan})
        tracker.record(2, {"loss": 2.0})
    assert [row["step"] for row in rows(run_dir)] == [1, 2]
    return tracker


def test_wandb_gets_the_settings_the_rows_and_the_run_it_goes_on_with(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = track(tmp_path, wandb_mode="online", wandb_id="earlier")
    (options,) = fake.inits
    assert (options["mode"], options["id"], options["resume"]) == ("online", "earlier", "allow")
    assert (options["name"], options["config"]) == ("r", {"DEPTH": 4})
    assert fake.logged == [{"step": 1, "loss": None}, {"step": 2, "loss": 2.0}]
    assert fake.finished
    assert tracker.wandb_id == "abc123"


def test_wandb_off_is_not_even_imported(tmp_path, monkeypatch):
    fake = FakeWandb(("Settings", "init", "log"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    track(tmp_path)
    assert fake.inits == []


def test_wandb_that_cannot_go_online_goes_offline_and_says_so(tmp_path, monkeypatch, capsys):
    fake = FakeWandb(("online",))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    track(tmp_path, wandb_mode="online")
    assert [options["mode"] for options in fake.inits] == ["online", "offline"]
    assert "wandb online does not work: ConnectionError" in capsys.readouterr().out
    assert len(fake.logged) == 2


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("failing", [("Settings",), ("init",), ("log",), ("finish",), ("Settings", "init", "log")])
def test_wandb_that_fails_anywhere_never_ends_the_run(tmp_path, monkeypatch, capsys, failing, mode):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(failing))
    track(tmp_path, wandb_mode=mode)
    if failing != ("finish",):
        assert "wandb" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["import a_module_that_is_missing", "raise RuntimeError('broken')"])
def test_wandb_that_cannot_be_imported_never_ends_the_run(tmp_path, monkeypatch, capsys, source):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    track(tmp_path / "run", wandb_mode="offline")
    assert "wandb is off" in capsys.readouterr().out
