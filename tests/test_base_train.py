"""The training loop: what it records, that a resume changes nothing, what it refuses, and how it ends."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ALONE, ROOT, TINY_RUN, make_shards, make_texts
from fake_wandb import FakeWandb

from nanotrain import (
    bigram_init,
    checkpoint,
    config,
    core_bundle,
    core_eval,
    dataloader,
    dataset,
    engine,
    errors,
    evals,
    guard,
    hardware,
    loss,
    loss_eval,
    recipe,
    run_plan,
    trainer,
    warmup,
)
from nanotrain.dist import DistContext
from nanotrain.errors import CheckpointError, DataError, MemoryLimitError, NonFiniteError, RunError, UserError
from nanotrain.gpt import GPT
from nanotrain.run_plan import RunPlan
from nanotrain.store import HORIZON, Store
from nanotrain.tokenizer import BPETokenizer
from scripts import base_train, tok_train

TINY = {**TINY_RUN, "NUM_ITERATIONS": 6}
MEASURED = {f"train/{name}" for name in ("tok_per_sec", "seconds", "loader_seconds", "optimizer_seconds")}
MEASURED |= {"system/peak_memory_bytes"}  # what differs between two equal runs


def main(**settings):
    """Run base_train in this process with TINY and the given settings."""
    with pytest.MonkeyPatch.context() as patch:
        for setting, value in {**TINY, **settings}.items():
            patch.setattr(base_train, setting, value)
        base_train.main()


@pytest.fixture(scope="module", autouse=True)
def _global_state():
    """Puts back what a run changes in its process. The speed is given: to measure it takes longer than a run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    }
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "training_flops_per_second", lambda *arguments: 1e11)
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def train(base_dir, data_dir, tokenizer):
    """train("name", DEPTH=2) runs base_train with TINY and the given settings; returns the folder of the run."""
    tokenizer.save(base_dir / "tokenizer")

    def run(name="r", **settings):
        main(**{"RUN_NAME": name, "DATA_DIR": str(data_dir), **settings})
        return base_dir / "runs" / name

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir, tokenizer):
    """A run with TINY that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer.save(folder / "tokenizer")
    main(RUN_NAME=str(folder / "run"), DATA_DIR=str(data_dir), TOKENIZER_DIR=str(folder / "tokenizer"))
    return folder / "run"


@pytest.fixture
def at_step(monkeypatch):
    """at_step(3, action) calls `action()` when the third step from now begins, at_step() does nothing any more."""
    momentum, planned = recipe.momentum, {"step": 0}

    def hooked(*arguments):
        planned["step"] -= 1
        if planned["step"] == 0:
            planned["action"]()
        return momentum(*arguments)

    monkeypatch.setattr(recipe, "momentum", hooked)
    return lambda step=0, action=None: planned.update(step=step, action=action)


@pytest.fixture
def measured(monkeypatch):
    """measured([...]) gives these bits per byte to the evaluations, in order."""

    def give(values):
        values = iter(values)
        monkeypatch.setattr(loss_eval, "bits_per_byte", lambda *arguments: next(values))

    return give


@pytest.fixture
def disk_full_at(monkeypatch):
    """disk_full_at(2, 4): the disk is full when these steps are saved."""
    commit, full = Store.commit, set()

    def committing(store, step, *arguments):
        if step in full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return commit(store, step, *arguments)

    monkeypatch.setattr(Store, "commit", committing)
    return lambda *steps: (full.clear(), full.update(steps))


def terminate():
    signal.raise_signal(signal.SIGTERM)


def kill():
    raise ZeroDivisionError("killed")


def rows(run_dir, key="train/loss"):
    """The rows of metrics.jsonl that have `key`."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def column(run_dir, key):
    return [row[key] for row in rows(run_dir, key)]


def timeless(run_dir):
    """Everything in metrics.jsonl but times and memory."""
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows(run_dir, "step")]


def saved(run_dir, step=None):
    """(weights, optimizer tensors, state without times and names) of a checkpoint, the newest by default."""
    weights, moments, state = checkpoint.unpack(Store(run_dir).read(step or Store(run_dir).newest()[0]))
    for name in ("seconds", "evaluation_seconds", "core_seconds"):
        del state["train_state"][name]
    for name in ("RUN_NAME", "TOKENIZER_DIR", "RESUME", "SAVE_EVERY"):
        del state["settings"][name]
    del state["environment"]["commit"]
    return weights, moments, state


def equal(first, second):
    """Whether two dicts of tensors are the same to the bit."""
    return first.keys() == second.keys() and all(
        torch.equal(tensor.flatten().view(torch.uint8), second[name].flatten().view(torch.uint8))
        for name, tensor in first.items()
    )


def same_run(first, second, but_for=()):
    """Whether two runs ended in the same weights, optimizer state and place, with the same record, settings aside."""
    ours, theirs = saved(first), saved(second)
    for name in but_for:
        del ours[2]["settings"][name], theirs[2]["settings"][name]
    tensors = equal(ours[0], theirs[0]) and equal(ours[1], theirs[1])
    return tensors and ours[2] == theirs[2] and timeless(first) == timeless(second)


# ---- what a run does and records ----


def test_a_run_starts_as_the_bigram_model_of_its_first_tokens_where_the_vocabulary_is_small(train, monkeypatch):
    few, many, at_random = (
        column(train(f"t{n}", NUM_ITERATIONS=7, SPECTRAL_TOKENS=n), "val/bpb")[0] for n in (64, 5000, 0)
    )
    assert many < few < at_random
    assert many < 0.6 * at_random
    monkeypatch.setattr(bigram_init, "LARGEST_VOCABULARY", 319)
    assert column(train("large", NUM_ITERATIONS=1), "val/bpb")[0] == at_random


def test_every_step_has_a_row_and_the_evaluations_have_theirs(train):
    run = train(EVAL_EVERY=4, SAVE_EVERY=5, KEEP_LAST=9)
    steps = rows(run)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for row in steps:
        assert {"train/loss", "train/lr", "train/grad_norm", "train/tok_per_sec", "data_hash"} <= row.keys()
        assert 0 < row["train/lr"] <= recipe.learning_rate("matrix_lr", 768, 128)
    bpb = column(run, "val/bpb")
    assert [row["step"] for row in rows(run, "val/bpb")] == [0, 4, 6]
    assert bpb[0] > bpb[1] > bpb[2] > 0
    states = {step: json.loads(Store(run).read(step)["state.json"]) for step in Store(run).steps()}
    assert {step: state["val_bpb"] for step, state in states.items()} == {6: bpb[2], 5: None, 4: bpb[1]}


@pytest.fixture
def tasks(data_dir, tmp_path):
    """Settings that make a run evaluate on a few tasks after every four steps."""
    core_bundle.make(tmp_path / "tasks", data_dir / "shard_00002.parquet", 8)
    return {"CORE_METRIC_EVERY": 4, "CORE_BUNDLE": str(tmp_path / "tasks"), "CORE_MAX_PER_TASK": 6}


def test_tasks_and_samples_are_those_of_the_weights_and_change_nothing_else(train, tasks, whole, capsys):
    run = train("scored", **tasks, SAMPLE_EVERY=4)
    scored = rows(run, "core/core_metric")
    assert [row["step"] for row in scored] == [4, 6], "before the first step one item is enough"
    model, tokenizer, _ = checkpoint.load_model(run)
    result = core_eval.evaluate(model, tokenizer, core_bundle.read(tasks["CORE_BUNDLE"], 6), ALONE, 100)
    expected = {f"core/{label}": task["centered"] for label, task in result["tasks"].items()}
    assert scored[-1] == {"step": 6, "core/core_metric": result["core_metric"], **expected}
    ids = engine.generate(model, [tokenizer.bos, *tokenizer.encode(engine.PROMPTS[0])], 48, stop=[tokenizer.bos])
    assert f"sample: {engine.PROMPTS[0]}{tokenizer.decode(list(ids))}".rstrip("\n") in capsys.readouterr().out
    assert equal(saved(run)[0], saved(whole)[0])
    assert [row for row in timeless(run) if "core/core_metric" not in row] == timeless(whole)


def test_the_same_command_gives_the_same_run_and_another_seed_does_not(train, whole):
    assert same_run(train("again"), whole)
    assert same_run(train("recomputed", GRAD_CHECKPOINT=True), whole, but_for=["GRAD_CHECKPOINT"])
    other = train("other", SEED=1)
    assert not equal(saved(other)[0], saved(whole)[0])
    assert set(column(other, "data_hash")).isdisjoint(column(whole, "data_hash"))


def test_the_run_folder_is_whole_by_itself(whole, tokenizer):
    names = sorted(path.name for path in whole.iterdir())
    assert names == [
        ".lock",
        "checkpoints",
        "config.json",
        "evaluation",
        "metrics.jsonl",
        "owner.json",
        "tokenizer.json",
    ]
    _, loaded, meta = checkpoint.load_model(whole)
    assert loaded.to_json() == tokenizer.to_json()
    assert (meta["step"], meta["total_batch_size"]) == (6, 128)


def test_a_run_says_once_that_its_file_system_cannot_sync_folders(train, monkeypatch, capsys):
    sync = os.fsync

    def sync_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    assert Store(train(EVAL_EVERY=0, SAVE_EVERY=2)).steps() == [6, 4]
    assert capsys.readouterr().out.count("cannot sync folders") == 1


def test_checkpoints_are_saved_on_time_and_kept_by_rule(train, measured):
    assert Store(train("a", EVAL_EVERY=0, SAVE_EVERY=1, KEEP_LAST=2, KEEP_EVERY=2)).steps() == [6, 5, 4, 2]
    measured((1.0, 3.0, 2.0, 4.0))  # step 0 is never the best, because it is not saved
    run = train("b", EVAL_EVERY=2, SAVE_EVERY=0, KEEP_LAST=1)
    assert Store(run).steps() == [6, 4]
    assert checkpoint.load_model(run, best=True)[2]["step"] == 4


@pytest.fixture
def clock(monkeypatch):
    """[seconds] of a clock by which every step, pass and evaluation takes 20 ms, whatever the machine."""
    calls, now = itertools.count(1), [0.0]

    def monotonic():
        now[0] = 0.02 * (next(calls) // 2)
        return now[0]

    for module in (trainer, evals):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic, perf_counter=time.perf_counter))
    monkeypatch.setattr(warmup, "one_pass", lambda *arguments: 0.02)
    monkeypatch.setattr(hardware, "seconds_since_start", lambda: now[0])
    return now


TIMED = {"NUM_ITERATIONS": 0, "TARGET_MINUTES": 0.05, "EVAL_EVERY": 0, "SAVE_EVERY": 20}


def test_target_minutes_ends_in_time_and_the_horizon_is_recorded(train, clock):
    run = train(NUM_ITERATIONS=0, TARGET_MINUTES=0.05)
    assert 1.9 < clock[0] < 2.1  # a second is kept for the last save, which takes none here
    steps, state = len(rows(run)), saved(run)[2]
    assert 50 < steps == state["step"] == state["train_state"]["num_steps"] < 200
    assert state["train_state"]["horizon_fixed"] is True


def test_p1_a_timed_run_that_was_killed_repeats_what_it_chose_and_goes_on(train, clock, at_step):
    """Twice, once before its first checkpoint: it equals a run that began with all of its choices."""
    for killed in (15, 35):
        at_step(killed, kill)
        with pytest.raises(ZeroDivisionError):
            train("victim", RESUME=True, **TIMED)
        clock[0] = 0.0
    at_step()
    victim = train("victim", RESUME=True, **TIMED)
    chosen = json.loads((victim / HORIZON).read_text())["num_steps"]
    assert len(chosen) > 7
    other = victim.with_name("other")
    other.mkdir()
    shutil.copy(victim / HORIZON, other / HORIZON)
    assert column(train("other", **TIMED), "train/lr") == column(victim, "train/lr")
    assert equal(saved(other)[0], saved(victim)[0])
    assert json.loads((other / HORIZON).read_text())["num_steps"] == chosen


def test_a_node_with_other_files_than_rank_0_is_named(data_dir, tokenizer, tmp_path):
    class Second(DistContext):
        def all_gather_objects(self, value):
            of_main.append(value)  # the first time as if it were rank 0's
            return [of_main[0], value]

    of_main, shards = [], dataset.open_shards(data_dir)
    place = Second(1, 1, torch.device("cpu"), torch.float32, "test")
    for _ in range(2):
        dataloader.check_nodes(place, tokenizer, shards)
    with pytest.raises(DataError, match="ranks 0 and 1 have different shards"):
        dataloader.check_nodes(place, tokenizer, dataset.open_shards(make_shards(tmp_path / "data", documents=39)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_loss_falls(train, dtype):
    rates = {"MATRIX_LR": 0.04, "EMBEDDING_LR": 0.35, "UNEMBEDDING_LR": 0.005, "SCALAR_LR": 0.05}
    run = train(NUM_ITERATIONS=30, DTYPE=dtype, SPECTRAL_TOKENS=0, **rates)
    losses, (weights, _, state) = column(run, "train/loss"), saved(run)
    assert losses[0] == pytest.approx(math.log(320), abs=0.05)  # weights know nothing: all tokens are equally likely
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    assert (state["scaler"].get("scale", 0) > 1) == (dtype == "float16")
    assert state["train_state"]["skipped_steps"] < 10
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


# ---- the dial ----


def test_a_run_whose_shape_was_chosen_keeps_it_on_another_machine(train, at_step, monkeypatch):
    settings = {"DEPTH": 0, "ASPECT_RATIO": 8, "HEAD_DIM": 8, "NUM_ITERATIONS": 0, "TARGET_FLOPS": 2e7}
    monkeypatch.setattr(recipe, "choose_depth", lambda *_: 2)
    undisturbed = train("undisturbed", **settings)
    at_step(2, terminate)
    train(**settings)
    at_step()
    monkeypatch.setattr(recipe, "choose_depth", lambda *_: 5)
    resumed = train(RESUME=True, **settings)
    assert saved(resumed)[2]["model_config"]["num_layers"] == 2
    assert same_run(undisturbed, resumed)


# ---- the data of a run ----


def data_hashes(folder, tokenizer, num_steps, sequences_per_step):
    """The data_hash of each step by definition: slices ordered by hash, sequences taken from the streams in turn."""
    num_streams, seq_len = TINY["NUM_STREAMS"], TINY["MAX_SEQ_LEN"]
    slices = {}
    for shard in ("shard_00000.parquet", "shard_00001.parquet"):
        file = pq.ParquetFile(folder / shard)
        for group in range(file.num_row_groups):
            slices[f"{shard}:{group}:0"] = file.read_row_group(group).column("text").to_pylist()
    order = []
    for epoch in range(3):
        keys = {name: hashlib.sha256(f"{base_train.SEED} {epoch} {name}".encode()).digest() for name in slices}
        order += sorted(slices, key=keys.get)
    streams = []
    for stream in range(num_streams):
        texts = [text for name in order[stream::num_streams] for text in slices[name]]
        streams.append([token for text in texts for token in (tokenizer.bos, *tokenizer.encode(text))])
    hashes = []
    for step in range(num_steps):
        total = 0
        for number in range(step * sequences_per_step, (step + 1) * sequences_per_step):
            start = number // num_streams * seq_len
            sequence = streams[number % num_streams][start : start + seq_len + 1]
            packed = struct.pack("<q", number) + struct.pack(f"<{seq_len + 1}i", *sequence)
            total += int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
        hashes.append(f"{total % 2**64:016x}")
    return hashes


def test_p2_the_sequences_are_those_of_the_definition_over_more_than_one_epoch(train, data_dir, tokenizer):
    run = train(NUM_ITERATIONS=14, TOTAL_BATCH_SIZE=1024, DEVICE_BATCH_SIZE=32, EVAL_EVERY=0)
    assert rows(run)[-1]["train/epoch"] >= 1
    assert column(run, "data_hash") == data_hashes(data_dir, tokenizer, 14, 64)


def test_the_number_of_micro_steps_changes_neither_rows_nor_losses(train):
    # not from pairs: there gradients nearly cancel, and AdamW's first updates make much of rounding
    runs = [train(f"r{size}", DEVICE_BATCH_SIZE=size, NUM_ITERATIONS=8, SPECTRAL_TOKENS=0) for size in (8, 1, 4)]
    for run in runs[1:]:
        assert column(run, "data_hash") == column(runs[0], "data_hash")
        assert column(run, "train/loss") == pytest.approx(column(runs[0], "train/loss"), rel=2e-6)
        assert column(run, "train/grad_norm") == pytest.approx(column(runs[0], "train/grad_norm"), rel=1e-4)


def test_a_growing_batch_takes_the_same_rows_in_order_with_smaller_steps_first(train, data_dir, tokenizer, at_step):
    settings = {"BATCH_RAMP": True, "NUM_ITERATIONS": 20, "DEVICE_BATCH_SIZE": 2, "SAVE_EVERY": 0}
    micro_steps = [1, 1, 2, 2] + [4] * 16  # of two rows
    counts = [2 * sum(micro_steps[:step]) for step in range(21)]
    single = data_hashes(data_dir, tokenizer, counts[-1], 1)  # row by row
    expected = [sum(int(one, 16) for one in single[counts[step] : counts[step + 1]]) % 2**64 for step in range(20)]
    undisturbed = train(**settings)
    assert [int(found, 16) for found in column(undisturbed, "data_hash")] == expected
    full = column(train("full", NUM_ITERATIONS=20), "train/lr")
    shares = [grown / rate for grown, rate in zip(column(undisturbed, "train/lr"), full, strict=True)]
    assert shares == pytest.approx([math.sqrt(count / 4) for count in micro_steps])
    at_step(3, terminate)
    train("stopped", **settings)
    at_step()
    stopped = train("stopped", RESUME=True, **settings)
    assert same_run(undisturbed, stopped)
    assert saved(stopped)[2]["loader"]["next_sequence"] == counts[-1]


# ---- memory ----


@pytest.mark.parametrize(("asked", "rows"), [(7, "4 sequences (lowered from 7)"), (0, "8 sequences")])
def test_a_dry_run_prints_the_plan_and_leaves_no_trace(train, base_dir, capsys, asked, rows):
    """The rows of a pass are lowered to a divisor of 8; 0 is the default where nothing is tried."""
    train(DEVICE_BATCH_SIZE=asked, DRY_RUN=True)
    assert f"batch      128 tokens = {rows} of 16 x " in capsys.readouterr().out
    assert not (base_dir / "runs").exists()


def test_a_device_batch_of_0_is_the_most_that_fits_where_it_is_tried(train, whole, monkeypatch, capsys):
    tried, most, forward = [], [5], GPT.forward

    def limited(self, inputs, targets):
        tried.append(len(inputs))
        if len(inputs) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, inputs, targets)

    monkeypatch.setattr(GPT, "forward", limited)
    monkeypatch.setattr(RunPlan, "tries_batch_sizes", True)
    run = train(DEVICE_BATCH_SIZE=0)
    assert tried[:3] == [8, 4, 4]
    assert set(tried[3:]) == {4}
    assert "fits       4 sequences\nbatch      128 tokens = 4 sequences of 16 x 2" in capsys.readouterr().out
    assert equal(saved(run)[0], saved(whole)[0])
    assert json.loads((run / "config.json").read_text())["plan"]["device_batch_size"] == 4
    most[0] = 0
    with pytest.raises(MemoryLimitError, match="with a single sequence"):
        train("second", DEVICE_BATCH_SIZE=0)


def test_memory_that_runs_out_names_half_of_the_rows_that_ran(train, at_step, monkeypatch):
    def run_out(*arguments):
        raise MemoryError

    at_step(2, run_out)
    with pytest.raises(MemoryLimitError, match="--device-batch-size=4,"):
        train(DEVICE_BATCH_SIZE=99)  # of which a step has 8
    monkeypatch.setattr(loss_eval, "bits_per_byte", run_out)
    with pytest.raises(MemoryLimitError, match="--device-batch-size=8,"):
        train(DEVICE_BATCH_SIZE=0)  # 16 in an evaluation


def test_memory_that_runs_out_before_the_first_pass_is_a_sentence(train):
    with pytest.raises(MemoryLimitError, match="before the first pass") as caught:
        train(HEAD_DIM=2**24)  # a matrix of 2^50 bytes
    assert caught.value.exit_code == 5


# ---- compilation ----


def test_a_compiler_that_does_not_work_is_a_sentence_where_asked_for_and_unused_in_a_run_too_short(
    train, monkeypatch, tmp_path
):
    asked = []
    monkeypatch.setattr(GPT, "compile_parts", lambda model: asked.append(model) or setattr(model, "loss_kernel", None))
    train("short", COMPILE="auto", TARGET_MINUTES=0.01, NUM_ITERATIONS=0)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a b"))
    with pytest.raises(UserError, match=r"--compile=on: .* has a space or a quote: .*/a b"):
        train(COMPILE="on")
    assert asked == []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a"))
    with pytest.raises(UserError, match="--compile=on: compilation fails here"):
        train(COMPILE="on")
    assert asked


@pytest.mark.slow
@pytest.mark.skipif(not hardware.can_compile(), reason="no compiler")
def test_compiling_in_a_thread_changes_no_bit(train, monkeypatch, tmp_path):
    runs = []
    for name in ("ahead", "alone"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
        torch.compiler.reset()
        runs.append(train(name, COMPILE="on"))
        monkeypatch.setattr(warmup, "compiling_ahead", lambda *arguments: contextlib.nullcontext())
    torch.compiler.reset()
    assert same_run(*runs)


# ---- stopping and resuming ----


@pytest.mark.parametrize(
    ("step", "number"), [(1, signal.SIGTERM), (2, signal.SIGHUP), (3, signal.SIGINT), (5, signal.SIGUSR1)]
)
def test_p1_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(train, whole, at_step, capsys, step, number):
    at_step(step, lambda: signal.raise_signal(number))
    stopped = train("stopped", SAVE_EVERY=0)
    assert column(stopped, "train/loss") == column(whole, "train/loss")[:step]
    assert Store(stopped).steps() == [step]
    assert f"stopped and saved at step {step} of 6" in capsys.readouterr().out
    assert not same_run(whole, stopped)
    at_step()
    train("stopped", SAVE_EVERY=0, RESUME=True)
    assert same_run(whole, stopped)


def test_p1_what_a_stop_left_out_comes_first_at_the_resume(train, at_step, tasks):
    due = {**tasks, "EVAL_EVERY": 2, "SAMPLE_EVERY": 2, "CORE_METRIC_EVERY": 2, "SAVE_EVERY": 0}
    undisturbed = train("whole", **due)
    at_step(2, terminate)
    stopped = train("stopped", **due)
    assert [row["step"] for row in rows(stopped, "val/bpb")] == [0]
    at_step()
    train("stopped", **due, RESUME=True)
    assert same_run(undisturbed, stopped)
    first, second = ((run / "evaluation" / "step_00000002.json").read_text() for run in (undisturbed, stopped))
    assert json.loads(first) == json.loads(second)
    assert "samples" in json.loads(first)


@pytest.mark.parametrize("changed", [{"TOTAL_BATCH_SIZE": 64, "TARGET_FLOPS": 4e8}, {"BATCH_RAMP": False}], ids=str)
def test_a_change_at_a_resume_keeps_the_tokens_of_the_horizon(train, at_step, changed):
    settings = {"NUM_ITERATIONS": 0, "TARGET_FLOPS": 2e8, "BATCH_RAMP": "BATCH_RAMP" in changed, "SAVE_EVERY": 0}
    at_step(7, terminate)
    train(**settings)
    at_step()
    run = train(**{**settings, **changed}, RESUME=True, ALLOW_CHANGE="total_batch_size,target_flops,batch_ramp")
    plan = json.loads((run / "config.json").read_text())["plan"]
    trained = saved(run)[2]["loader"]["next_sequence"] * 16
    assert trained == pytest.approx(plan["tokens"], abs=plan["total_batch_size"] / 2 + 1)


def test_p1_a_run_that_was_killed_loses_only_the_steps_since_its_checkpoints(train, whole, at_step, base_dir):
    victim = base_dir / "runs" / "victim"
    at_step(1, kill)  # before its first checkpoint, so that it starts over
    for killed in (1, 4, 6):
        with pytest.raises(ZeroDivisionError):
            train("victim", SAVE_EVERY=2, RESUME=True)  # with nothing to resume this is a start
        assert Store(victim).steps()[:1] == [killed - 2][: killed > 1]
        assert column(victim, "train/loss") == column(whole, "train/loss")[: killed - 1]
        at_step(4, kill)  # of this process, which does steps 1 to 4, and then 3 to 6
    at_step()
    train("victim", SAVE_EVERY=2, RESUME=True)
    assert same_run(whole, victim)


def test_p5_a_broken_checkpoint_is_named_and_the_older_one_gives_the_same_run(train, whole, capsys):
    run = train("broken", SAVE_EVERY=2)
    path = run / "checkpoints" / "step_00000006" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    train("broken", SAVE_EVERY=2, RESUME=True)
    printed = capsys.readouterr().out
    assert re.search(r"not used: .*step_00000006: model\.safetensors does not match its hash", printed)
    assert "resume     broken at step 4" in printed
    assert same_run(whole, run)


@pytest.fixture
def stopped(train, at_step):
    """The run `whole` under this name, stopped after its third step."""
    at_step(3, terminate)
    run = train("stopped")
    at_step()
    return run


@pytest.fixture
def finished(whole, base_dir):
    """A copy of the run `whole` under this name."""
    return Path(shutil.copytree(whole, base_dir / "runs" / "finished"))


def test_resuming_at_the_last_step_says_that_there_is_nothing_to_do(train, finished, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    train("finished", RESUME=True)
    assert "nothing to do: finished has a checkpoint at step 6 of 6" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match="already at step 6: continue with --resume") as caught:
        train("finished")
    assert caught.value.exit_code == 2
    train("finished", RESUME=True, REPORT=True)  # which a kill had left out
    assert (finished / "report" / "report.html").exists()


# ---- what a resume may change ----

REFUSED = {
    "SEED": 1, "MAX_SEQ_LEN": 32, "NUM_STREAMS": 8, "DEPTH": 2, "ASPECT_RATIO": 9, "HEAD_DIM": 8, "BIGRAM_ROWS": 60,
    "PLAIN": True, "SPECTRAL_TOKENS": 99, "INIT_FROM": "other",
}  # fmt: skip
CHANGES = {
    "NUM_ITERATIONS": 4, "TOTAL_BATCH_SIZE": 64, "BATCH_RAMP": True, "MATRIX_LR": 0.03, "EMBEDDING_LR": 0.1,
    "UNEMBEDDING_LR": 0.004, "SCALAR_LR": 0.01, "WEIGHT_DECAY": 0.1, "GRAD_CLIP": 1.0, "SCHEDULE": "linear",
    "WARMUP_RATIO": 0.1, "WARMDOWN_RATIO": 0.5, "FINAL_LR_FRAC": 0.1, "DTYPE": "bfloat16", "COMPILE": "auto",
    "DETERMINISTIC": True,
}  # fmt: skip
FREE = (
    "RUN_NAME", "RESUME", "ALLOW_CHANGE", "DRY_RUN", "DEVICE", "DATA_DIR", "TOKENIZER_DIR", "DEVICE_BATCH_SIZE",
    "GRAD_CHECKPOINT", "EVAL_EVERY", "EVAL_TOKENS", "EVALUATIONS_AFTER", "CORE_METRIC_EVERY", "CORE_BUNDLE",
    "CORE_MAX_PER_TASK", "REPORT", "SAMPLE_EVERY", "SAVE_EVERY", "KEEP_LAST", "KEEP_EVERY", "EARLY_STOP_PATIENCE",
    "EARLY_STOP_MIN_DELTA", "WANDB", "WANDB_PROJECT", "WANDB_TAGS", "WANDB_NOTES", "WANDB_LOG_EVERY",
)  # fmt: skip


def test_every_setting_is_of_exactly_one_class():
    """A new setting needs a decision."""
    classes = (*base_train.IDENTITY, *base_train.TRAJECTORY, *FREE)
    assert sorted(classes) == sorted(config.settings(vars(base_train))), "IDENTITY, TRAJECTORY, or FREE here"
    assert set(REFUSED) == set(base_train.IDENTITY)
    # the others have tests of their own
    assert set(base_train.TRAJECTORY) - set(CHANGES) == {"TARGET_FLOPS", "TARGET_MINUTES", "TARGET_PARAM_DATA_RATIO"}


@pytest.mark.usefixtures("stopped")
def test_what_a_run_is_cannot_change_even_if_asked_for(train):
    for name, value in REFUSED.items():
        with pytest.raises(UserError, match=f"{config.flag_of(name)} was .*, is {value}: cannot change"):
            train("stopped", RESUME=True, ALLOW_CHANGE=name.lower(), **{name: value})


def test_what_changes_the_training_must_be_allowed_by_name(train, stopped):
    names = [*map(str.lower, CHANGES)]
    for allowed in ([], names[2:]):
        with pytest.raises(UserError) as caught:
            train("stopped", RESUME=True, ALLOW_CHANGE=",".join(allowed), **CHANGES)
        assert sorted(re.findall(r"--allow-change=(.*)", str(caught.value))) == sorted(set(names) - set(allowed))
    train("stopped", RESUME=True, ALLOW_CHANGE=", ".join(names).replace("_", "-"), **CHANGES)
    assert [row["step"] for row in rows(stopped)] == [1, 2, 3, 4]


def test_what_changes_nothing_about_the_training_is_free_and_another_machine_is_said(
    train, whole, stopped, monkeypatch, capsys
):
    environment = hardware.environment
    monkeypatch.setattr(hardware, "environment", lambda *place: {**environment(*place), "threads": 99})
    train("stopped", RESUME=True, EVAL_EVERY=5, EVAL_TOKENS=32, SAVE_EVERY=1, KEEP_LAST=4, SAMPLE_EVERY=6)
    assert re.search(r"warning .*threads was 1, is 99", capsys.readouterr().out)
    assert equal(saved(stopped)[0], saved(whole)[0])
    assert equal(saved(stopped)[1], saved(whole)[1])


def test_a_resume_takes_the_recipe_from_the_checkpoint_and_not_from_newer_code(train, whole, stopped, monkeypatch):
    unpack = checkpoint.unpack

    def older(files):
        *tensors, state = unpack(files)
        del state["settings"]["BATCH_RAMP"]  # as if it came later
        return *tensors, state

    monkeypatch.setattr(recipe, "SMALL", dataclasses.replace(recipe.SMALL, matrix_lr=0.3, momentum_peak=0.5))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "unpack", older)
        train("stopped", RESUME=True)
    assert same_run(whole, stopped)
    assert not same_run(whole, train("new"))


@pytest.mark.usefixtures("stopped")
def test_another_tokenizer_or_other_data_are_refused_on_resume(train, base_dir, tmp_path, tokenizer):
    with pytest.raises(DataError, match="--data-dir"):
        train("stopped", RESUME=True, DATA_DIR=str(make_shards(tmp_path / "other", documents=30)))
    BPETokenizer.train(make_texts(60, seed=9), tokenizer.vocab_size).save(base_dir / "tokenizer")
    with pytest.raises(DataError, match="--tokenizer-dir"):
        train("stopped", RESUME=True)


# ---- non-finite numbers ----


@pytest.fixture
def poison(monkeypatch):
    """poison(steps) makes every loss of these steps NaN."""
    momentum, mean_loss = recipe.momentum, loss.mean_loss
    planned = {"step": 0, "steps": set()}

    def counting(*arguments):
        planned["step"] += 1
        return momentum(*arguments)

    def poisoned(*arguments):
        return mean_loss(*arguments) * (math.nan if planned["step"] in planned["steps"] else 1.0)

    monkeypatch.setattr(recipe, "momentum", counting)
    monkeypatch.setattr(loss, "mean_loss", poisoned)
    return lambda steps: planned.update(steps=steps)


def test_p8_a_step_that_is_not_finite_leaves_weights_and_moments_alone(train, poison):
    poison({1, 3})  # two that are not in a row end nothing
    run = train(SAVE_EVERY=1, KEEP_LAST=9, EVAL_EVERY=0)
    before, after, later = (saved(run, step) for step in (2, 3, 4))
    assert equal(before[0], after[0])
    assert equal(before[1], after[1])
    assert before[2]["updates"] == after[2]["updates"] == 1
    assert not equal(after[0], later[0])
    assert [row["system/skipped_steps"] for row in rows(run)] == [1, 1, 2, 2, 2, 2]
    assert [row["train/loss"] is None for row in rows(run)] == [True, False, True, False, False, False]
    assert all(tensor.isfinite().all() for tensor in saved(run)[0].values())


def test_p8_three_in_a_row_end_the_run_also_across_a_stop_and_the_checkpoint_stays_as_it_was(
    train, poison, at_step, base_dir
):
    poison({4, 5})
    at_step(5, terminate)
    run = train(SAVE_EVERY=3)
    poison({6})
    at_step()
    with pytest.raises(NonFiniteError, match=r"--matrix-lr=0\.02") as caught:
        train(SAVE_EVERY=3, RESUME=True, MATRIX_LR=0.04, ALLOW_CHANGE="matrix_lr")
    assert re.search(r"step 6: loss nan.*gradient: \w+; no updates at steps 4, 5, 6", str(caught.value))
    assert caught.value.exit_code == 7
    assert Store(run).steps() == [5, 3]
    assert all(tensor.isfinite().all() for tensor in saved(run)[0].values())


def test_p8_weights_that_are_not_finite_are_never_saved(train, at_step, monkeypatch, base_dir):
    models, build = [], checkpoint.build_model
    monkeypatch.setattr(checkpoint, "build_model", lambda *arguments: models.append(build(*arguments)) or models[-1])

    def spoil():
        with torch.no_grad():
            next(p for name, p in models[-1].named_parameters() if "scale" in name).view(-1)[0] = math.nan

    at_step(5, spoil)
    with pytest.raises(NonFiniteError, match="step 6: non-finite weights"):
        train(SAVE_EVERY=2)
    assert Store(base_dir / "runs" / "r").newest()[0] == 4
    assert all(tensor.isfinite().all() for tensor in saved(base_dir / "runs" / "r")[0].values())


def test_an_evaluation_that_is_not_finite_is_recorded_as_nothing_and_never_the_best(train, measured):
    measured((2.0, math.nan, 1.5, math.nan))
    run = train(EVAL_EVERY=2)
    assert column(run, "val/bpb") == [2.0, None, 1.5, None]
    state = saved(run)[2]
    assert (state["val_bpb"], state["train_state"]["best_bpb"], state["train_state"]["best_step"]) == (None, 1.5, 4)


# ---- what goes wrong ----


def test_a_shard_that_vanishes_costs_no_step(train, tmp_path, at_step):
    """The last finished step is saved, and the run goes on from there once the shard is back."""
    folder = make_shards(tmp_path / "folder")
    shard, hidden = folder / "shard_00001.parquet", tmp_path / "hidden"
    settings = {"DATA_DIR": str(folder), "NUM_ITERATIONS": 40, "SAVE_EVERY": 0, "EVAL_EVERY": 0}
    undisturbed = train("undisturbed", **settings)
    at_step(4, lambda: shard.rename(hidden))
    with pytest.raises(DataError, match=r"shard_00001.parquet, row group \d+, cannot be read"):
        train("disturbed", **settings)
    disturbed = undisturbed.parent / "disturbed"
    assert Store(disturbed).newest()[0] == len(column(disturbed, "train/loss")) in range(4, 40)
    hidden.rename(shard)
    at_step()
    train("disturbed", RESUME=True, **settings)
    assert same_run(undisturbed, disturbed)


@pytest.mark.parametrize(
    "settings",
    [
        {"TARGET_FLOPS": 1e9}, {"TARGET_PARAM_DATA_RATIO": 0, "NUM_ITERATIONS": 0}, {"EVAL_TOKENS": 15},
        {"MATRIX_LR": -0.1}, {"KEEP_LAST": 0}, {"HEAD_DIM": 15}, {"DEPTH": -1},
        {"WARMUP_RATIO": 0.5, "WARMDOWN_RATIO": 0.6},
        {"SCHEDULE": "constant"}, {"COMPILE": "maybe"}, {"WANDB": "yes"}, {"DTYPE": "fp8"}, {"DEVICE": "tpu"},
        {"TOTAL_BATCH_SIZE": 100},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_end_with_2_and_name_the_setting_and_the_value(train, base_dir, settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(UserError, match=re.escape(f"{config.flag_of(name)}={value}")) as caught:
        train(**settings)
    assert caught.value.exit_code == 2
    assert not (base_dir / "runs").exists()


def test_a_full_disk_ends_a_run_only_at_its_last_save_or_at_the_third_in_a_row(train, whole, disk_full_at, capsys):
    disk_full_at(2, 4)
    run = train(SAVE_EVERY=2)
    assert Store(run).steps() == [6]
    assert same_run(whole, run)
    assert "step 2: the checkpoint could not be written (No space left on device)" in capsys.readouterr().out
    disk_full_at(6)
    with pytest.raises(CheckpointError, match="the last checkpoint could not be written: No space left on device"):
        train("second", SAVE_EVERY=5)
    assert Store(run.parent / "second").newest()[0] == 5
    disk_full_at(2, 4, 8, 10, 12)
    with pytest.raises(CheckpointError, match="3 checkpoints in a row"):
        train("third", SAVE_EVERY=2, NUM_ITERATIONS=20, EVAL_EVERY=0)
    assert Store(run.parent / "third").newest()[0] == 6


def test_the_best_checkpoint_is_one_that_was_saved_and_the_older_ones_may_fail_to_go(
    train, measured, disk_full_at, monkeypatch
):
    def failing(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    disk_full_at(4)
    measured([3.0, 2.0, 1.0, 2.5, 2.25])
    monkeypatch.setattr(Store, "clean", failing)  # no reason to fail a save
    run = train(SAVE_EVERY=2, NUM_ITERATIONS=8, EVAL_EVERY=2, KEEP_LAST=1)
    assert Store(run).steps() == [8, 6, 2]
    assert checkpoint.load_model(run, best=True)[2]["step"] == 2


def test_the_older_of_two_jobs_on_one_run_stops_before_it_overwrites(train, at_step, base_dir):
    run = base_dir / "runs" / "r"
    at_step(4, Store(run).claim)
    with pytest.raises(RunError) as caught:
        train(SAVE_EVERY=3)
    assert caught.value.exit_code == 1
    assert Store(run).steps() == [3]


def test_the_second_of_two_jobs_on_one_run_is_told_before_it_trains_and_a_killed_one_is_in_nobodys_way(
    train, base_dir, data_dir, monkeypatch
):
    run = base_dir / "runs" / "r"
    holding = "import sys; from nanotrain.store import Store; s = Store(sys.argv[1]); s.claim(); print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}

    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    with subprocess.Popen([sys.executable, "-c", holding, run], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == b"\n"
        monkeypatch.setattr(tok_train, "DATA_DIR", str(data_dir))
        monkeypatch.setattr(tok_train, "TOKENIZER_DIR", str(run))
        for function in (train, tok_train.main):
            with pytest.raises(RunError, match=f"process {other.pid} on .* is writing to {run}"):
                function()
        assert sorted(path.name for path in run.iterdir()) == [".lock", "owner.json"]
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "lockf", unsupported)
            train(NUM_ITERATIONS=1)  # nobody can know
        other.kill()
    train(NUM_ITERATIONS=1, RESUME=True)


def test_p7_a_rank_that_hangs_is_ended_with_what_it_was_doing(train, at_step, monkeypatch, capfd):
    """A step takes ten seconds where at most half of one is allowed."""
    left = []
    monkeypatch.setattr(trainer, "STEP_SECONDS", 0.5)
    monkeypatch.setattr(trainer, "SLOW_STEP_FACTOR", 0.0)
    monkeypatch.setattr(guard.os, "_exit", left.append)

    def hang():
        end = time.monotonic() + 10
        while not left and time.monotonic() < end:
            time.sleep(0.01)

    at_step(3, hang)
    train()
    assert left == [errors.HANG_EXIT_CODE]
    assert re.search(r"error: no progress for(.|\n)*in hang", capfd.readouterr().err)


# ---- other ways to begin and to end ----


def test_what_another_run_must_have_to_begin_with_its_weights(train, whole, base_dir):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        train("second", INIT_FROM="nowhere")
    with pytest.raises(UserError, match="another shape: num_layers 1"):
        train("second", INIT_FROM=str(whole), DEPTH=2)
    BPETokenizer.train(make_texts(60, seed=9), 320).save(base_dir / "tokenizer")
    with pytest.raises(DataError, match="another tokenizer"):
        train("second", INIT_FROM=str(whole))
    assert not (base_dir / "runs" / "second").exists()


def test_a_run_in_wandb_goes_on_there_and_its_best_checkpoint_is_a_run(train, at_step, tmp_path, monkeypatch):
    fakes = [FakeWandb(), FakeWandb()]
    at_step(4, terminate)
    for fake in fakes:
        monkeypatch.setitem(sys.modules, "wandb", fake)
        run = train(WANDB="offline", WANDB_LOG_EVERY=2, RESUME=True, EVAL_EVERY=3)
    (_, first), (_, second) = (fake.of("init")[0] for fake in fakes)
    assert first["id"] == second["id"] == saved(run)[2]["train_state"]["wandb_id"]
    assert [[row["step"] for (row,) in fake.of("log") if "val/bpb" in row] for fake in fakes] == [[0, 3], [6]]
    ((best, aliases),) = fakes[1].of("log_artifact")
    assert (best.name, best.kind, aliases[0]) == (first["name"], "model", "best")
    for name, data in best.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    new = train("new", INIT_FROM=str(tmp_path), NUM_ITERATIONS=1, EVAL_EVERY=1)
    assert column(new, "val/bpb")[0] == column(run, "val/bpb")[-1]


@pytest.mark.parametrize(
    ("values", "delta", "ended"),
    [
        ([3.0, 2.0, 2.1, 1.9, 2.0, 1.95], 0.0, 5),  # two in a row that are no better
        ([3.0, 2.0, 1.95, 1.92], 0.1, 3),  # better, but by less than asked for
    ],
)
def test_a_run_that_gets_no_better_ends_early_like_a_finished_one(train, measured, values, delta, ended):
    measured(values)
    run = train(EVAL_EVERY=1, SAVE_EVERY=0, EARLY_STOP_PATIENCE=2, EARLY_STOP_MIN_DELTA=delta)
    assert (rows(run)[-1]["step"], Store(run).steps()[0]) == (ended, ended)
    assert saved(run)[2]["train_state"]["num_steps"] == ended


def test_a_batch_that_was_given_is_not_refused_for_the_ramp(train, capsys):
    run = train(BATCH_RAMP=True, TOTAL_BATCH_SIZE=48, NUM_ITERATIONS=2)
    assert "no ramp" in capsys.readouterr().out
    assert saved(run)[2]["recipe"]["batch_ramp"] is False
    ramp = train("ramp", BATCH_RAMP=True, TOTAL_BATCH_SIZE=64, NUM_ITERATIONS=2)
    assert saved(ramp)[2]["recipe"]["batch_ramp"] is True


def test_the_number_of_streams_is_fixed_at_the_start_of_a_run(train, at_step, monkeypatch):
    whole = train("streams", NUM_STREAMS=0)
    assert len(saved(whole)[2]["loader"]["streams"]) == 192
    at_step(2, terminate)
    train(NUM_STREAMS=0)
    at_step()
    monkeypatch.setattr(run_plan, "choose_num_streams", lambda shards: 2)
    assert same_run(whole, train(NUM_STREAMS=0, RESUME=True))
