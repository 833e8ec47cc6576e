"""The record of a run: rows of metrics.jsonl, what evaluations found, lines for people, and wandb, which can neither
slow nor end a run.
"""

import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from fake_wandb import FakeWandb

from nanotrain import metrics
from nanotrain.metrics import MetricLogger
from nanotrain.trainer import StepResult, TrainState

RESULT = StepResult(2.5, 1.5, 255, 6172, 0, stop_requested=False, seconds=5.0, peak_memory_bytes=7)
LABELS = {"project": "nanotrain", "tags": "a, b", "notes": ""}
RECORD = {
    "settings": {"DEPTH": 4},
    "model_config": {"vocab_size": 320, "num_layers": 4},
    "plan": {"tokens": 1},
    "environment": {"torch": "2"},
    "tokenizer_sha256": "ab" * 32,
    "data": {"validation": "shard_00001.parquet", "files": {}},
}


def rows(run_dir):
    text = (run_dir / "metrics.jsonl").read_text()
    assert "NaN" not in text, "which is not JSON"
    assert "Infinity" not in text
    return [json.loads(line) for line in text.splitlines()]


def log_steps(logger, steps, result=RESULT, num_steps=9):
    for step in steps:
        logger.log_step(TrainState(step=step, num_steps=num_steps), result, 0.5, 0.01, 42.4)


# ---- metrics.jsonl ----


def test_every_step_is_one_json_line_that_is_on_disk_at_once(tmp_path):
    run_dir = tmp_path / "new" / "run"
    with MetricLogger(run_dir, 2, peak_speed=12344.0) as logger:
        logger.record(0, {"val/bpb": 1.5, "infinite": -math.inf, "text": "nan"})
        assert rows(run_dir) == [{"step": 0, "val/bpb": 1.5, "infinite": None, "text": "nan"}]
        log_steps(logger, [1], replace(RESULT, grad_norm=math.nan))
        row = rows(run_dir)[1]
    assert (row["step"], row["train/loss"], row["train/grad_norm"], row["train/lr"]) == (1, 2.5, None, 0.01)
    assert (row["train/tok_per_sec"], row["train/mfu"], row["data_hash"]) == (1234.4, 0.1, "00000000000000ff")
    assert "train/optimizer_seconds" not in row  # where it is not known


@pytest.mark.parametrize("ending", ["", '{"step": 3, "train/lo', "\0\0\0\0"])
def test_resuming_cuts_later_rows_and_a_half_written_line_and_goes_on_below(tmp_path, ending):
    with MetricLogger(tmp_path, 9) as logger:
        logger.record(0, {"val/bpb": 3.0})
        log_steps(logger, (1, 2, 3))
        logger.record(3, {"val/bpb": 2.0})  # of the step resumed from: it stays
        log_steps(logger, (4, 5))
    kept = "".join((tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:5])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(ending)
    with MetricLogger(tmp_path, 9, first_step=3) as logger:
        log_steps(logger, (4, 5))
    assert (tmp_path / "metrics.jsonl").read_text().startswith(kept)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3, 3, 4, 5]
    with MetricLogger(tmp_path, 9):  # a run that starts over
        assert rows(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_costs_what_could_not_be_written_but_not_the_run(tmp_path, capsys):
    (tmp_path / "evaluation").write_text("a file where the folder belongs")
    with MetricLogger(tmp_path, 9) as logger:
        logger._file.close()
        logger._file = open("/dev/full", "w")  # every write there fails as on a full disk
        log_steps(logger, (1, 2, 3))
        logger.evaluation(3, val_bpb=1.5)
    assert capsys.readouterr().out.count("No space left on device") == 1


# ---- evaluations ----


def test_the_parts_of_an_evaluation_are_one_file_of_its_step_and_resuming_removes_later_ones(tmp_path):
    def evaluations():
        return {path.name: json.loads(path.read_text()) for path in sorted((tmp_path / "evaluation").iterdir())}

    with MetricLogger(tmp_path, 9) as logger:
        logger.evaluation(5, val_bpb=1.5, documents={"worst": [], "best": []})
        logger.evaluation(5, samples=[{"prompt": "a", "text": "b 日"}])
        logger.evaluation(10, val_bpb=None)
    first = {"step": 5, "val_bpb": 1.5, "documents": {"worst": [], "best": []}}
    assert evaluations() == {
        "step_00000005.json": {**first, "samples": [{"prompt": "a", "text": "b 日"}]},
        "step_00000010.json": {"step": 10, "val_bpb": None},
    }
    for resumed, kept in ((10, [5, 10]), (9, [5]), (5, [5]), (0, [])):
        with MetricLogger(tmp_path, 9, first_step=resumed):
            assert list(evaluations()) == [f"step_{step:08d}.json" for step in kept]


# ---- for people ----


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_other_ranks_write_and_print_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with MetricLogger(tmp_path / "run", 9, enabled=False) as logger:
        logger.start_wandb("offline", LABELS, RECORD, None, 1)
        log_steps(logger, [1, 9], replace(RESULT, skipped="loss nan"))
        logger.record(1, {"val/bpb": 1.0})
        logger.evaluation(1, val_bpb=1.0)
        assert logger.wandb_id is None
    assert capsys.readouterr().out == sys.stderr.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_without_a_terminal_that_can_show_a_bar_there_are_plain_lines(tmp_path, capsys, monkeypatch, stream):
    clock = [1000.0]
    monkeypatch.setenv("TERM", "dumb" if stream is Terminal else "xterm")
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with MetricLogger(tmp_path, 9, peak_speed=12344.0) as logger:
        for step in range(1, 10):
            log_steps(logger, [step])
            clock[0] += 4
    captured = capsys.readouterr()
    assert (sys.stderr.getvalue(), "\r" in captured.out) == ("", False)
    lines = captured.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 1/9", "step 4/9", "step 7/9", "step 9/9"]
    assert lines[0] == "step 1/9: loss 2.5000, lr 0.01, 1,234 tok/s, 00:42 left, mfu 10.0%"


def test_on_a_terminal_there_is_a_bar_and_no_line_for_a_step(tmp_path, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with MetricLogger(tmp_path, 9, first_step=3) as logger:
        logger.event("something happened")
        log_steps(logger, [4], num_steps=7)  # the number of steps was corrected
        assert "57%|#####7    | 4/7, loss 2.5000, lr 0.01, 1,234 tok/s, 00:42 left" in str(logger.bar)
    assert "33%|###3      | 3/9" in terminal.getvalue()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in lines if line.strip()] == ["something happened"]


@pytest.fixture
def fake(monkeypatch):
    """fake(...) puts a FakeWandb in the place of wandb."""

    def put(*arguments, **options):
        module = FakeWandb(*arguments, **options)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return put


def talk(folder, mode="offline", run_id="x7k2"):
    """A short run that talks to wandb; returns (its folder, the logger)."""
    run_dir = folder / "mine"
    with MetricLogger(run_dir, 7) as logger:
        logger.start_wandb(mode, LABELS, RECORD, run_id, 3)
        log_steps(logger, range(1, 8), replace(RESULT, grad_norm=math.nan), num_steps=7)
        logger.record(7, {"val/bpb": 1.0})
    assert len(rows(run_dir)) == 8
    return run_dir, logger


def test_wandb_is_told_of_settings_some_steps_every_evaluation_and_what_the_run_is_made_from(tmp_path, fake, capsys):
    wandb = fake()
    run_dir, logger = talk(tmp_path)
    ((mode, options),) = wandb.of("init")
    assert (mode, options["id"], options["resume"], logger.wandb_id) == ("offline", "x7k2", "allow", "x7k2")
    assert (options["name"], options["project"], options["tags"]) == ("mine", "nanotrain", ["a", "b"])
    assert options["dir"] == str(run_dir)
    config = options["config"]
    assert (config["depth"], config["environment"], config["tokenizer_sha256"]) == (4, {"torch": "2"}, "ab" * 32)
    # or the start and the end would wait for the server for minutes, or for ever
    assert (options["settings"]["init_timeout"], options["settings"]["finish_timeout"]) == (20, 120)
    assert "wandb: offline; wandb sync /somewhere/offline-run uploads it" in capsys.readouterr().out
    assert wandb.of("login") == []  # which would look for the server
    assert wandb.of("setup") == [["offline"]]  # or wandb's own telemetry would

    told = [(row["step"], row.get("train/loss"), row.get("val/bpb")) for (row,) in wandb.of("log")]
    assert told == [(3, 2.5, None), (6, 2.5, None), (7, 2.5, None), (7, None, 1.0)]
    assert not any("train/grad_norm" in row for (row,) in wandb.of("log"))  # NaN
    assert wandb.done[-1] == ("finish", 0)

    wandb.init = lambda **options: setattr(wandb, "id", "chosen") or wandb  # as a sweep does
    assert talk(tmp_path, run_id=None)[1].wandb_id == "chosen"


@pytest.mark.parametrize("fails", [{"key": False}, {"failing": ["online"]}])
def test_online_without_a_key_or_a_server_goes_offline_under_the_same_id(tmp_path, fake, capsys, fails):
    wandb = fake(**fails)
    talk(tmp_path, "online")
    tried = ["offline"] if "key" in fails else ["online", "offline"]
    assert [(mode, options["id"]) for mode, options in wandb.of("init")] == [(mode, "x7k2") for mode in tried]
    assert ("wandb login" if "key" in fails else "no online") in capsys.readouterr().out
    assert len(wandb.of("log")) == 4


@pytest.mark.parametrize("place", ["setup", "init", "log", "finish", "everything"])
def test_wandb_that_fails_anywhere_is_a_line_and_nothing_else(tmp_path, fake, capsys, place):
    wandb = fake((place,))
    talk(tmp_path)
    printed = capsys.readouterr().out
    assert (printed.count("nothing more is logged"), "second line" in printed) == (1, False)
    assert len(wandb.of("log")) <= 1 or place == "finish"


def test_a_wandb_that_never_answers_delays_the_end_by_a_bounded_time(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "START_SECONDS", 0.1)
    monkeypatch.setattr(metrics, "FINISH_SECONDS", 0.1)
    goes_on, begin = threading.Event(), time.monotonic()
    fake().log = lambda row: goes_on.wait(10) and None
    talk(tmp_path)
    assert time.monotonic() - begin < 3
    assert "wandb does not answer" in capsys.readouterr().out
    goes_on.set()


PROGRAM = """
import json, os, signal, sys, threading, time
from pathlib import Path
from nanotrain import metrics

run_dir, mode, labels, record, stops = Path(sys.argv[1]), sys.argv[2], *map(json.loads, sys.argv[3:])
metrics.START_SECONDS, metrics.FINISH_SECONDS = 2.0, 1.0 if stops else 50.0
started = threading.Event()

def say(line):
    print(line, flush=True)
    if "offline; wandb sync" in line:
        started.set()

run = metrics.WandbRun(run_dir, mode, labels, record, "a-b", say)
assert started.wait(60)
service = sys.modules["wandb"].sdk.wandb_setup._singleton._connection._proc._process
if stops:
    os.kill(service.pid, signal.SIGSTOP)
begin = time.monotonic()
for step in range(3000):
    run.calls.put(lambda run: run.log({"step": step, "train/loss": 1.0, "data_hash": "00ff"}))
assert time.monotonic() - begin < 2
if stops:
    time.sleep(1)
    assert run.calls.qsize() > 1000, "a call of wandb does not wait: the thread is not needed"
run.close()
assert not run._thread.is_alive()
assert (service.poll() is not None) == stops
"""


def talk_to_wandb(tmp_path, mode, stops, **environment):
    """What a process says that logs to the real wandb, which finds no network; it must end."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), mode, *map(json.dumps, (LABELS, RECORD, stops))]
    place = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_ERROR_REPORTING": "false"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **place, **environment}
    done = subprocess.run(command, env=environment, stdin=subprocess.PIPE, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_stopped_wandb_service_delays_no_call_and_is_ended_with_the_run(tmp_path):
    assert "wandb does not answer" in talk_to_wandb(tmp_path, "offline", True)[1]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", 40 * "a"])
def test_real_wandb_without_a_key_or_a_server_goes_offline_by_itself(tmp_path, key):
    failure, offline = talk_to_wandb(tmp_path, "online", False, WANDB_API_KEY=key)
    assert ("wandb login" in failure) == (not key)
    assert "offline; wandb sync" in offline
    (file,) = tmp_path.glob("wandb/offline-run-*-a-b/run-a-b.wandb")
    assert b"train/loss" in file.read_bytes()
