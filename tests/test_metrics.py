"""The record of a run: rows of metrics.jsonl, what evaluations found, lines for people, and wandb, which can neither
slow nor end a run.
"""

import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from fake_wandb import FakeArtifact, FakeWandb

from nanotrain import checkpoint, core_bundle, core_eval, metrics
from nanotrain.errors import CheckpointError, UserError
from nanotrain.metrics import MetricLogger, WandbRun
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
    "data_dir": "/data/my texts ü" + 50 * "x",
}
NINE_ITEMS = core_bundle.Task("t", core_bundle.SCHEMA, 0, " ", 0.25, 9 * [([], 0)])
PARTS = {
    "samples": [{"prompt": "The", "text": " end"}],
    "core": core_eval.summary(core_bundle.Bundle([NINE_ITEMS], "ab"), [4.5]),
    "documents": {"worst": [{"bpb": 3.5, "text": "a b", "tokens": [["a", 2.0], [" b", 7.25]]}], "best": []},
    "token_bits": {"edges": [0, 1, 2], "counts": [3, 4]},
}


def rows(run_dir):
    text = (run_dir / "metrics.jsonl").read_text()
    assert "NaN" not in text, "which is not JSON"
    assert "Infinity" not in text
    return [json.loads(line) for line in text.splitlines()]


def log_steps(logger, steps, result=RESULT):
    for step in steps:
        logger.log_step(TrainState(step=step), result, 0.5, 0.01, 42.4)


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


@pytest.mark.parametrize("ending", ["", '{"step": 3, "train/lo', '{"step": 3', "\0\0\0\0", "\n\n"])
def test_resuming_cuts_later_rows_and_a_half_written_line_and_goes_on_below(tmp_path, ending):
    with MetricLogger(tmp_path, 10) as logger:
        logger.record(0, {"val/bpb": 3.0})
        log_steps(logger, (1, 2, 3))
        logger.record(3, {"val/bpb": 2.0})  # of the step resumed from: it stays
        log_steps(logger, (4, 5))
    kept = "".join((tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:5])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(ending)
    with MetricLogger(tmp_path, 10, first_step=3) as logger:
        log_steps(logger, (4, 5))
    assert (tmp_path / "metrics.jsonl").read_text().startswith(kept)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    with MetricLogger(tmp_path, 10):  # a run that starts over
        assert rows(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_costs_rows_but_not_the_run(tmp_path, capsys):
    with MetricLogger(tmp_path, 10) as logger:
        logger._file.close()
        logger._file = open("/dev/full", "w")  # every write there fails as on a full disk
        log_steps(logger, (1, 2, 3))
    assert capsys.readouterr().out.count("No space left on device") == 1


# ---- evaluations ----


def evaluations(run_dir):
    """{file name: what is in it}, of all that is in the folder."""
    return {path.name: json.loads(path.read_text()) for path in sorted((run_dir / "evaluation").iterdir())}


def test_the_parts_of_an_evaluation_are_one_file_of_its_step_and_resuming_removes_later_ones(tmp_path):
    with MetricLogger(tmp_path, 10) as logger:
        logger.evaluation(5, val_bpb=1.5, documents={"worst": [], "best": []})
        logger.evaluation(5, samples=[{"prompt": "a", "text": "b 日"}])
        logger.evaluation(10, val_bpb=None)
    first = {"step": 5, "val_bpb": 1.5, "documents": {"worst": [], "best": []}}
    assert evaluations(tmp_path) == {
        "step_00000005.json": {**first, "samples": [{"prompt": "a", "text": "b 日"}]},
        "step_00000010.json": {"step": 10, "val_bpb": None},
    }
    for resumed, kept in ((10, [5, 10]), (9, [5]), (5, [5]), (0, [])):
        with MetricLogger(tmp_path, 10, first_step=resumed):
            assert list(evaluations(tmp_path)) == [f"step_{step:08d}.json" for step in kept]


def test_an_evaluation_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    (tmp_path / "evaluation").write_text("a file where the folder belongs")
    with MetricLogger(tmp_path, 10) as logger:
        logger.evaluation(5, val_bpb=1.5)
        log_steps(logger, [6])
    assert "an evaluation could not be written" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path)] == [6]


# ---- for people ----


def test_other_ranks_write_and_print_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with MetricLogger(tmp_path / "run", 10, enabled=False) as logger:
        logger.start_wandb("offline", LABELS, RECORD, None, 1)
        logger.set_num_steps(5)
        log_steps(logger, [1, 5], replace(RESULT, skipped="loss nan"))
        logger.record(1, {"val/bpb": 1.0})
        logger.evaluation(1, val_bpb=1.0)
        with logger.progress("evaluation", 3) as bar:
            bar.update(2)
        assert logger.wandb_id is None
    assert capsys.readouterr().out == sys.stderr.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def steps_with_a_line(tmp_path, capsys, monkeypatch, num_steps, seconds):
    """([step of each line], the lines) of a run whose steps take so many seconds."""
    clock = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with MetricLogger(tmp_path, num_steps, peak_speed=12344.0) as logger:
        for step in range(1, num_steps + 1):
            log_steps(logger, [step])
            clock[0] += seconds
    captured = capsys.readouterr()
    assert (captured.err, "\r" in captured.out) == ("", False)
    lines = captured.out.splitlines()
    return [int(line.partition("/")[0].removeprefix("step ")) for line in lines], lines


def test_without_a_terminal_there_are_plain_lines_some_seconds_apart_and_at_the_end(tmp_path, capsys, monkeypatch):
    steps, lines = steps_with_a_line(tmp_path, capsys, monkeypatch, num_steps=9, seconds=2)
    assert steps == [1, 4, 7, 9]
    assert lines[0] == "step 1/9: loss 2.5000, lr 0.01, 1,234 tok/s, mfu 10.0%, 42 s left"


def test_a_log_of_hours_stays_short(tmp_path, capsys, monkeypatch):
    steps, _ = steps_with_a_line(tmp_path, capsys, monkeypatch, num_steps=3600, seconds=3)
    seconds = [3 * (after - before) for before, after in itertools.pairwise(steps)]
    assert len(steps) < 400
    assert (max(seconds[:20]) <= 6, max(seconds) <= 63) == (True, True)


def test_on_a_terminal_there_is_a_bar_and_no_line_for_a_step(tmp_path, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with MetricLogger(tmp_path, 9, first_step=3) as logger:
        log_steps(logger, [4])
        logger.event("something happened")
        logger.set_num_steps(7)
        assert (logger.bar.n, logger.bar.total) == (4, 7)
        with logger.progress("evaluation", 3) as bar:
            bar.update(2)
    assert "loss 2.5000" in terminal.getvalue()
    assert "/7" in terminal.getvalue()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in lines if line.strip()] == ["something happened"]


# ---- what wandb is told ----


@pytest.fixture
def fake(monkeypatch):
    """fake(...) puts a FakeWandb in the place of wandb."""

    def put(*arguments, **options):
        module = FakeWandb(*arguments, **options)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return put


def talk(run_dir, mode="offline", run_id="d4-mine-20260101-1200-x7k2", calls=lambda run: None, failed=False):
    """Start a run, let `calls` use it, and close it; returns (the run, what it said)."""
    said = []
    (run_dir / "tokenizer.json").write_text("{}")
    run = WandbRun(run_dir, mode, LABELS, RECORD, run_id, said.append)
    calls(run)
    run.close(failed)
    assert not run._thread.is_alive()
    return run, said


def use(run):
    """One call of every kind."""
    run.log({"step": 3, "train/loss": 2.5, "train/grad_norm": None, "data_hash": "00ff", "val/bpb": 1.0})
    run.evaluation(3, PARTS)


def test_wandb_is_told_of_every_evaluation_and_of_some_steps_and_the_last(tmp_path, fake):
    wandb = fake()
    (tmp_path / "tokenizer.json").write_text("{}")
    with MetricLogger(tmp_path, 7) as logger:
        logger.start_wandb("offline", LABELS, RECORD, None, 3)
        log_steps(logger, range(1, 8))
        logger.record(7, {"val/bpb": 1.0})
        logger.evaluation(7, samples=PARTS["samples"])
    told = [(row["step"], *sorted(row)[-1:]) for (row,) in wandb.of("log")]
    assert told == [*((step, "train/tok_per_sec") for step in (3, 6, 7)), (7, "val/bpb"), (7, "val/samples")]
    assert len(rows(tmp_path)) == 8


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_wandb_is_ended_on_every_way_out_and_knows_that_the_run_has_failed(tmp_path, fake, error):
    wandb = fake()

    def run():
        with MetricLogger(tmp_path, 7) as logger:
            logger.start_wandb("offline", LABELS, RECORD, None, 1)
            raise error

    with pytest.raises(error):
        run()
    assert wandb.done[-1] == ("finish", 1)


def test_a_new_id_begins_with_depth_data_and_time_and_a_sweep_may_choose_another(tmp_path, fake):
    wandb = fake()
    ids = {talk(tmp_path, run_id=None)[0].id for _ in range(3)}
    assert len(ids) == 3
    assert all(re.fullmatch(r"d4-my-texts-x+-\d{8}-\d{4}-[a-z0-9]{4}", run_id) for run_id in ids)
    wandb.init = lambda **options: setattr(wandb, "id", "chosen") or wandb
    with MetricLogger(tmp_path, 7) as logger:
        logger.start_wandb("offline", LABELS, RECORD, "abc123", 1)
        assert logger._wandb.name == "abc123"
    assert logger.wandb_id == "chosen"


def test_a_run_has_a_name_its_settings_and_its_own_axis_and_goes_on_under_its_id(tmp_path, fake):
    wandb = fake()
    run, said = talk(tmp_path)
    ((mode, options),) = wandb.of("init")
    assert (mode, options["id"], options["resume"]) == ("offline", run.id, "allow")
    assert (options["name"], options["project"]) == ("d4-mine-20260101-1200", "nanotrain")
    assert (options["tags"], options["notes"], options["dir"]) == (["a", "b"], None, str(tmp_path))
    config = options["config"]
    assert (config["depth"], config["environment"], config["tokenizer_sha256"]) == (4, {"torch": "2"}, "ab" * 32)
    assert len(config["data_sha256"]) == 64
    # or the start and the end would wait for the server for minutes, or for ever
    assert (options["settings"]["init_timeout"], options["settings"]["finish_timeout"]) == (20, 120)
    axes = dict(wandb.of("define_metric"))
    assert axes.pop("step") == {"hidden": True}
    assert axes == {f"{group}/*": {"step_metric": "step"} for group in ("train", "val", "core", "system")}
    assert said == ["wandb: offline; wandb sync /somewhere/offline-run sends it"]
    assert wandb.of("login") == []  # which would look for the server
    assert wandb.of("setup") == [["offline"]]  # or wandb's own telemetry would


def test_numbers_tables_a_histogram_and_what_the_run_is_made_from_are_logged(tmp_path, fake):
    wandb = fake()
    another = {"samples": [{"prompt": "If", "text": " so"}]}
    talk(tmp_path, calls=lambda run: (use(run), run.evaluation(4, {"val_bpb": 1.0}), run.evaluation(6, another)))
    (numbers,), (evaluation,), (samples,) = wandb.of("log")
    assert numbers == {"step": 3, "train/loss": 2.5, "val/bpb": 1.0}
    task = {"label": "t", "num_items": 9, "accuracy": 0.5, "baseline": 0.25, "centered": 1 / 3, "standard_error": 1 / 6}
    assert evaluation == {
        "step": 3,
        "val/samples": ("table", ["step", "prompt", "text"], [[3, "The", " end"]]),
        "core/tasks": ("table", list(task), [[pytest.approx(value) for value in task.values()]]),
        "val/worst_documents": ("table", ["bpb", "text", "hardest tokens"], [[3.5, "a b", "' b' 7.2, 'a' 2.0"]]),
        "val/token_bits": ("histogram", [3, 4], [0, 1, 2]),
    }
    assert samples["val/samples"][2] == [[3, "The", " end"], [6, "If", " so"]]
    tokenizer, data = [artifact for artifact, _ in wandb.of("log_artifact")]
    assert (tokenizer.name, tokenizer.files) == ("tokenizer-abababababab", {"tokenizer.json": b"{}"})
    assert json.loads(data.files["data.json"]) == RECORD["data"]


# ---- it is never in the way ----


@pytest.mark.parametrize("fails", [{"key": False}, {"failing": ["online"]}])
def test_online_without_a_key_or_a_server_goes_offline_under_the_same_id_and_asks_nobody(tmp_path, fake, fails):
    wandb = fake(**fails)
    run, said = talk(tmp_path, "online", calls=use)
    tried = ["offline"] if "key" in fails else ["online", "offline"]
    assert [(mode, options["id"]) for mode, options in wandb.of("init")] == [(mode, run.id) for mode in tried]
    assert ("wandb login" if "key" in fails else "no online") in said[0]
    assert len(wandb.of("log")) == 2


PLACES = ["setup", "login", "init", "define_metric", "log", "Table", "Artifact", "log_artifact", "finish", "everything"]


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("place", PLACES)
def test_wandb_that_fails_anywhere_is_a_line_and_nothing_else(tmp_path, fake, place, mode):
    fake((place,))
    _, said = talk(tmp_path, mode, calls=lambda run: (use(run), use(run)))
    if (place, mode) != ("login", "offline"):  # not needed there
        assert any("no " + place in line or place == "everything" for line in said)
    assert all("\n" not in line for line in said)
    assert len(said) <= metrics.MAX_FAILURES + 1


def test_what_wandb_does_not_take_is_left_out_and_after_the_third_it_is_left_alone(tmp_path, fake):
    wandb, bad = fake(), {2, 4, 7}

    def log(row):
        wandb.note("log", row["step"])
        if row["step"] in bad:
            raise ValueError(f"not {row['step']}")

    wandb.log = log
    _, said = talk(tmp_path, calls=lambda run: [run.log({"step": step}) for step in range(1, 11)])
    assert wandb.of("log") == [[step] for step in range(1, 8)]
    assert [line.partition("; ")[2] for line in said[1:]] == ["", "", "nothing more is logged there"]
    assert wandb.done[-1] == ("finish", 0)


def test_wandb_that_cannot_be_imported_is_a_line(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise RuntimeError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (line,) = talk(tmp_path, calls=use)[1]
    assert line.startswith("wandb: ")


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_training_does_not_wait_for_wandb_and_its_end_not_for_ever(tmp_path, fake, monkeypatch, place):
    monkeypatch.setattr(metrics, "START_SECONDS", 0.1)
    monkeypatch.setattr(metrics, "FINISH_SECONDS", 0.1)
    goes_on, said = threading.Event(), []
    setattr(fake(), place, lambda *arguments, **named: goes_on.wait(10) and None)
    begin = time.monotonic()
    run = WandbRun(tmp_path, "offline", LABELS, RECORD, None, said.append)
    use(run)
    run.close()
    assert time.monotonic() - begin < 3
    assert "wandb does not answer" in said[-1]
    goes_on.set()
    run._thread.join()


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
    run.log({"step": step, "train/loss": 1.0})
assert time.monotonic() - begin < 2
if stops:
    time.sleep(1)
    assert run._calls.qsize() > 1000, "a call of wandb does not wait: the thread is not needed"
run.close()
assert not run._thread.is_alive()
assert (service.poll() is not None) == stops
"""


def talk_to_wandb(tmp_path, mode, stops, **environment):
    """What a process says that logs to the real wandb, which finds no network; it must end."""
    (tmp_path / "tokenizer.json").write_text("{}")
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


# ---- artifacts that are loaded again ----


def test_a_reference_is_fetched_into_a_folder_of_its_version(base_dir, fake):
    artifact = FakeArtifact("d4", "model", {})
    artifact.files = {"tokenizer.json": b"{}"}
    fake().log_artifact(artifact, ["best"])
    folder = checkpoint.find_run("wandb:me/nanotrain/d4:best")
    assert folder == base_dir / "artifacts" / "me" / "nanotrain" / "d4-v3"
    assert (folder / "tokenizer.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    "reference", ["wandb:", "wandb:a/b", "wandb:a/b/c/d:e", "wandb:a/b/c:", "wandb:a/../c:e", "wandb:a/b/c d:e"]
)
def test_another_form_of_reference_is_a_usage_error(tmp_path, reference):
    with pytest.raises(UserError) as caught:
        metrics.fetch_artifact(reference, tmp_path)
    assert reference in str(caught.value)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_cannot_be_had_is_a_sentence_and_nobody_is_asked_for_a_key(tmp_path, fake):
    def artifact(path, type):
        assert path == "a/b/c:latest"
        raise ConnectionError("no host\nand much more")

    fake().artifact = artifact
    with pytest.raises(CheckpointError, match=r"^wandb:a/b/c: .*ConnectionError: no host$"):
        metrics.fetch_artifact("wandb:a/b/c", tmp_path)
    fake(key=False)
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        metrics.fetch_artifact("wandb:a/b/c:best", tmp_path)
