"""What wandb is told, that it can never slow or end a run, and that what was logged there is loaded again."""

import json
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from fake_wandb import FakeArtifact, FakeWandb

from nanotrain import checkpoint, core_eval, wandb_run
from nanotrain.errors import CheckpointError, UserError
from nanotrain.wandb_run import WandbRun

RECORD = {
    "settings": {"DEPTH": 4, "MATRIX_LR": 0.04},
    "model_config": {"vocab_size": 320},
    "plan": {"tokens": 1},
    "environment": {"torch": "2"},
    "tokenizer_sha256": "ab" * 32,
    "data": {"validation": "shard_00001.parquet", "files": {}},
}
PARTS = {
    "samples": [{"prompt": "The", "text": " end"}],
    "core": core_eval.summary(SimpleNamespace(is_core=True, sha256="ab"), [core_eval.Score("t", 9, 0.5, 0.25)]),
    "documents": {"worst": [{"bpb": 3.5, "text": "a b", "tokens": [["a", 2.0], [" b", 7.25]]}], "best": []},
    "token_bits": {"edges": [0, 1, 2], "counts": [3, 4]},
}


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
    options = wandb_run.options("nanotrain", "a, b", "", RECORD)
    run = WandbRun(run_dir, mode, run_id, options, said.append, start_seconds=5, finish_seconds=5)
    calls(run)
    run.close(failed)
    assert not run._thread.is_alive()
    return run, said


def use(run):
    """One call of every kind."""
    run.log(3, {"train/loss": 2.5, "train/grad_norm": None, "data_hash": "00ff", "val/bpb": 1.0, "other/x": 1})
    run.evaluation(3, PARTS)
    run.artifact("n", "dataset", {"a": 1}, values={"data.json": {"b": 2}}, aliases=["x"])


# ---- what it is told ----


def test_ids_begin_with_a_name_and_the_time_and_differ():
    ids = {wandb_run.new_id("d4-stdlib") for _ in range(50)}
    assert len(ids) == 50
    for run_id in ids:
        assert time.strptime(wandb_run.name_of(run_id).removeprefix("d4-stdlib-"), "%Y%m%d-%H%M")
    assert wandb_run.new_id("d4-my data/ü" + 50 * "x").startswith("d4-my-data-xxx")
    assert max(map(len, ids)) <= 64
    assert wandb_run.name_of("abc123") == "abc123"


def test_a_run_has_a_name_its_settings_and_its_own_axis_and_goes_on_under_its_id(tmp_path, fake):
    wandb = fake()
    run, said = talk(tmp_path)
    ((mode, options),) = wandb.of("init")
    assert (mode, options["id"], options["resume"]) == ("offline", "d4-mine-20260101-1200-x7k2", "allow")
    assert (options["name"], options["project"]) == ("d4-mine-20260101-1200", "nanotrain")
    assert (options["tags"], options["notes"], options["dir"]) == (["a", "b"], None, str(tmp_path))
    config = options["config"]
    assert (config["depth"], config["matrix_lr"]) == (4, 0.04)
    assert (config["environment"], config["tokenizer_sha256"]) == ({"torch": "2"}, "ab" * 32)
    assert len(config["data_sha256"]) == 64
    assert options["settings"]["finish_timeout"] == 5  # or the end would wait for the server for ever
    axes = {name: how for name, how in wandb.of("define_metric")}
    assert axes.pop("step") == {"hidden": True}
    assert axes == {f"{group}/*": {"step_metric": "step"} for group in ("train", "val", "core", "system")}
    assert said == ["wandb: offline, to be sent by wandb sync /somewhere/offline-run"]
    assert wandb.of("login") == []  # which would look for the server
    assert wandb.of("setup") == [["offline"]]  # or wandb's own telemetry would
    assert run.id == options["id"]


def test_numbers_tables_and_a_histogram_are_logged_in_order(tmp_path, fake):
    wandb = fake()

    def calls(run):
        use(run)
        run.evaluation(4, {"val_bpb": 1.0})
        run.evaluation(6, {"samples": [{"prompt": "If", "text": " so"}]})

    talk(tmp_path, calls=calls)
    (numbers,), (evaluation,), (samples,) = wandb.of("log")
    assert numbers == {"step": 3, "train/loss": 2.5, "val/bpb": 1.0}
    assert evaluation == {
        "step": 3,
        "val/samples": ("table", ["step", "prompt", "text"], [[3, "The", " end"]]),
        "core/tasks": (
            "table",
            ["label", "accuracy", "standard_error", "baseline", "centered", "num_items"],
            [["t", 0.5, pytest.approx(1 / 6), 0.25, pytest.approx(1 / 3), 9]],
        ),
        "val/worst_documents": ("table", ["bpb", "text", "hardest tokens"], [[3.5, "a b", "' b' 7.2, 'a' 2.0"]]),
        "val/token_bits": ("histogram", [3, 4], [0, 1, 2]),
    }
    assert samples["val/samples"][2] == [[3, "The", " end"], [6, "If", " so"]]
    ((artifact, aliases),) = wandb.of("log_artifact")
    assert (artifact.name, artifact.kind, artifact.metadata, aliases) == ("n", "dataset", {"a": 1}, ["x"])
    assert json.loads(artifact.files["data.json"]) == {"b": 2}


@pytest.mark.parametrize("failed", [False, True])
def test_it_is_ended_as_the_run_ended(tmp_path, fake, failed):
    wandb = fake()
    talk(tmp_path, calls=use, failed=failed)
    assert wandb.done[-1] == ("finish", int(failed))


# ---- it is never in the way ----


def test_online_without_a_key_does_not_ask_and_goes_offline(tmp_path, fake):
    wandb = fake(key=False)
    _, said = talk(tmp_path, "online", calls=use)
    assert [mode for mode, _ in wandb.of("init")] == ["offline"]
    assert said[0] == "wandb online does not work: UserError: no key is known: `wandb login`, or set WANDB_API_KEY"
    assert len(wandb.of("log")) == 2


def test_online_that_cannot_be_reached_goes_offline_under_the_same_id(tmp_path, fake):
    wandb = fake(("online",))
    _, said = talk(tmp_path, "online", calls=use)
    assert [(mode, options["id"]) for mode, options in wandb.of("init")] == [
        ("online", "d4-mine-20260101-1200-x7k2"),
        ("offline", "d4-mine-20260101-1200-x7k2"),
    ]
    assert said[0] == "wandb online does not work: ConnectionError: no online"
    assert len(wandb.of("log")) == 2


PLACES = ["setup", "login", "init", "define_metric", "log", "Table", "Artifact", "log_artifact", "finish", "everything"]


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("place", PLACES)
def test_wandb_that_fails_anywhere_is_a_line_and_nothing_else(tmp_path, fake, place, mode):
    fake((place,))
    _, said = talk(tmp_path, mode, calls=lambda run: (use(run), use(run)))
    if (place, mode) != ("login", "offline"):  # not needed there
        assert 1 <= sum("no " + place in line or place == "everything" for line in said) <= wandb_run.MAX_FAILURES
    assert all("\n" not in line for line in said)


def test_what_wandb_does_not_take_is_left_out_and_after_the_third_it_is_left_alone(tmp_path, fake):
    wandb, bad = fake(), {2, 4, 7}

    def log(row):
        wandb.note("log", row["step"])
        if row["step"] in bad:
            raise ValueError(f"not {row['step']}")

    wandb.log = log
    _, said = talk(tmp_path, calls=lambda run: [run.log(step, {"train/loss": 1.0}) for step in range(1, 11)])
    assert wandb.of("log") == [[step] for step in range(1, 8)]
    assert [line.partition(":")[0] for line in said[1:]] == 2 * ["wandb did not take something"] + [
        "wandb is off from here"
    ]
    assert wandb.done[-1] == ("finish", 0)


@pytest.mark.parametrize("source", ["import a_module_that_is_missing", "raise RuntimeError('broken')"])
def test_wandb_that_cannot_be_imported_is_a_line(tmp_path, monkeypatch, source):
    (tmp_path / "wandb.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert [line.partition(":")[0] for line in talk(tmp_path, calls=use)[1]] == ["wandb is off"]


def seconds_of_calls(run_dir, wandb, place):
    """How long the calls of training take while wandb hangs in `place`, for half a second."""
    goes_on = threading.Event()
    setattr(wandb, place, lambda *arguments, **named: goes_on.wait(0.5) and None)
    run = WandbRun(run_dir, "offline", "a-b", {}, lambda line: None, start_seconds=1, finish_seconds=1)
    begin = time.monotonic()
    use(run)
    seconds = time.monotonic() - begin
    goes_on.set()
    run.close()
    return seconds


@pytest.mark.parametrize("place", ["init", "log"])
def test_training_never_waits_for_wandb(tmp_path, fake, monkeypatch, place):
    assert seconds_of_calls(tmp_path, fake(), place) < 0.25
    monkeypatch.setattr(WandbRun, "_later", lambda self, call: call(sys.modules["wandb"], sys.modules["wandb"]))
    if place == "log":  # the comparison notices a call that waits
        assert seconds_of_calls(tmp_path, fake(), place) > 0.25


def test_an_end_that_hangs_is_left_behind(tmp_path, fake):
    goes_on, said = threading.Event(), []
    fake().finish = lambda exit_code: goes_on.wait(10)
    run = WandbRun(tmp_path, "offline", "a-b", {}, said.append, start_seconds=0.1, finish_seconds=0.1)
    begin = time.monotonic()
    run.close()
    assert time.monotonic() - begin < 3
    assert said[-1] == "wandb does not end and is left behind"
    goes_on.set()
    run._thread.join()


def test_what_waits_is_bounded(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(wandb_run, "MAX_CALLS", 5)
    goes_on, said, wandb = threading.Event(), [], fake()
    wandb.setup = lambda settings: goes_on.wait(10)
    run = WandbRun(tmp_path, "offline", "a-b", {}, said.append)
    for step in range(20):
        run.log(step, {"train/loss": 1.0})
    goes_on.set()
    run.close()
    assert [row["step"] for (row,) in wandb.of("log")] == [0, 1, 2, 3, 4]
    assert sum("wandb does not keep up" in line for line in said) == 1


# ---- artifacts that are loaded again ----


def test_a_reference_is_fetched_into_a_folder_of_its_version(tmp_path):
    artifact = FakeArtifact("d4", "model", {})
    artifact.files = {"tokenizer.json": b"{}"}
    folder = wandb_run.fetch("wandb:me/nanotrain/d4:best", tmp_path, artifact.api)
    assert folder == tmp_path / "me" / "nanotrain" / "d4-v3"
    assert (folder / "tokenizer.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    "reference", ["wandb:", "wandb:a/b", "wandb:a/b/c/d:e", "wandb:a/b/c:", "wandb:a/../c:e", "wandb:a/b/c d:e"]
)
def test_another_form_of_reference_is_a_usage_error(tmp_path, reference):
    with pytest.raises(UserError) as caught:
        wandb_run.fetch(reference, tmp_path, None)
    assert reference in str(caught.value)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_cannot_be_had_is_a_sentence(tmp_path):
    def artifact(path, type):
        assert path == "a/b/c:latest"
        raise ConnectionError("no host\nand much more")

    with pytest.raises(CheckpointError, match=r"^wandb:a/b/c: wandb does not give it: ConnectionError: no host$"):
        wandb_run.fetch("wandb:a/b/c", tmp_path, SimpleNamespace(artifact=artifact))


def test_without_a_key_nobody_is_asked_for_one(tmp_path, fake):
    fake(key=False)
    with pytest.raises(UserError, match="knows no key here: `wandb login`, or set WANDB_API_KEY"):
        wandb_run.fetch("wandb:a/b/c:best", tmp_path)


def test_a_run_name_may_be_an_artifact(monkeypatch, base_dir):
    fetched = []
    monkeypatch.setattr(wandb_run, "fetch", lambda *arguments: fetched.append(arguments) or "folder")
    assert checkpoint.find_run("wandb:a/b/c:best") == "folder"
    assert fetched == [("wandb:a/b/c:best", base_dir / "artifacts")]
