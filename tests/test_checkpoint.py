"""Checkpoints: exact, whole or absent, never believed unless every byte verifies, and kept by rule."""

import errno
import hashlib
import json
import os
import random
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from nanotrain import checkpoint, paths, store
from nanotrain.errors import CheckpointError, DataError, SupersededError, UserError
from nanotrain.gpt import GPTConfig
from nanotrain.tokenizer import BPETokenizer
from scripts import base_eval, generate

FILES = ("manifest.json", "model.safetensors", "optim-00000-of-00001.safetensors", "state.json")
WEIGHTS = {"layer.weight": torch.arange(6.0).view(2, 3), "scale": torch.tensor(0.1)}
MOMENTS = {"layer.weight/momentum": torch.full((2, 3), 1 / 3)}


def save(run, step, weights=WEIGHTS, moments=MOMENTS, state=None):
    return checkpoint.save(run, step, weights, moments, state or {"step": step})


def checkpoints(run):
    return store.Store(run, FILES[1:])


def damage(path, how):
    data = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "one byte short":
        path.write_bytes(data[:-1])
    elif how == "one byte long":
        path.write_bytes(data + b"\0")
    else:
        bit = {"first": 0, "middle": len(data) * 4, "last": len(data) * 8 - 1}[how.split()[0]]
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)


def folders(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).tolist()


# ---- what is saved ----


def test_tensors_and_state_come_back_to_the_bit(tmp_path):
    weights = {
        "float32": torch.tensor([[0.1, -0.0, float("inf")], [float("nan"), 1e-45, -3e38]]),
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "float16": torch.randn(4).half(),
        "int64": torch.tensor([2**62, -1]),
        "scalar": torch.tensor(1 / 3),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(12.0).view(3, 4).t(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    moments = {f"{name}/momentum": tensor.detach().clone() for name, tensor in weights.items()}
    state = {"step": 3, "nested": {"list": [1, 0.1, None, "ü"]}, "large": 2**63}
    save(tmp_path, 3, weights, moments, state)
    step, files, complaints = checkpoint.newest(tmp_path)
    loaded_weights, loaded_moments, loaded_state = checkpoint.unpack(files)
    assert (step, complaints, loaded_state) == (3, [], state)
    for saved, loaded in ((weights, loaded_weights), (moments, loaded_moments)):
        assert {name: bits(tensor.detach()) for name, tensor in saved.items()} == {
            name: bits(tensor) for name, tensor in loaded.items()
        }


def test_the_manifest_lists_every_file_with_size_and_hash_and_seals_itself(tmp_path):
    folder = save(tmp_path, 1000)
    assert folder == tmp_path / "checkpoints" / "step_00001000"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert sorted(manifest["files"]) == sorted(FILES[1:])
    seal = manifest.pop("sha256")
    assert manifest.keys() == {"format", "step", "files"}
    assert (manifest["format"], manifest["step"]) == (2, 1000)
    assert seal == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def test_the_weights_file_is_plain_safetensors_and_a_function_of_the_weights_alone(tmp_path):
    first = save(tmp_path / "a", 1, state={"step": 1, "time": 1.5}) / "model.safetensors"
    backwards = dict(reversed(WEIGHTS.items()))
    second = save(tmp_path / "b", 77, backwards, {}, {"step": 77}) / "model.safetensors"
    assert first.read_bytes() == second.read_bytes()
    loaded = safetensors.torch.load_file(first)
    assert {name: bits(tensor) for name, tensor in loaded.items()} == {n: bits(t) for n, t in WEIGHTS.items()}
    nudged = {**WEIGHTS, "scale": torch.nextafter(WEIGHTS["scale"], torch.tensor(1.0))}
    assert (save(tmp_path / "c", 1, nudged) / "model.safetensors").read_bytes() != first.read_bytes()


@pytest.mark.parametrize("step", [0, 7, 12345678])
def test_folders_are_named_by_the_step_in_eight_digits(tmp_path, step):
    save(tmp_path, step)
    assert folders(tmp_path) == [f"step_{step:08d}"]
    assert checkpoint.steps(tmp_path) == [step]


def test_a_state_that_json_cannot_hold_is_refused_and_leaves_nothing(tmp_path):
    for state in ({"loss": float("nan")}, {"best": float("inf")}, {"tensor": torch.zeros(1)}):
        with pytest.raises((ValueError, TypeError)):
            save(tmp_path, 1, state=state)
    assert folders(tmp_path) == []


# ---- damage ----


@pytest.mark.parametrize(
    "how", ["deleted", "emptied", "one byte short", "one byte long", "first bit", "middle bit", "last bit"]
)
@pytest.mark.parametrize("name", FILES)
def test_p5_nothing_wrong_is_loaded_silently_a_damaged_checkpoint_gives_way_to_the_older_one_and_is_named(
    tmp_path, name, how
):
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name, how)
    step, files, complaints = checkpoint.newest(tmp_path)
    assert step == 1
    assert checkpoint.unpack(files)[2] == {"step": 1}
    (complaint,) = complaints
    assert "step_00000002" in complaint
    assert name in complaint or name == "manifest.json"
    damage(tmp_path / "checkpoints" / "step_00000001" / name, how)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.newest(tmp_path)
    assert "step_00000002" in str(caught.value)
    assert "step_00000001" in str(caught.value)


def test_p5_nothing_wrong_is_loaded_silently_every_byte_of_the_manifest_counts(tmp_path):
    path = save(tmp_path, 5) / "manifest.json"
    data = path.read_bytes()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            checkpoint.read(tmp_path, 5)
    path.write_bytes(data)
    checkpoint.read(tmp_path, 5)


@pytest.mark.parametrize("content", ["null", "[]", "{}", '"x"', '{"sha256": 1}', "[" * 100_000])
def test_a_manifest_of_another_shape_is_a_checkpoint_error(tmp_path, content):
    (save(tmp_path, 1) / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError):
        checkpoint.newest(tmp_path)


def test_a_sealed_manifest_of_another_step_format_or_list_of_files_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    honest = json.loads((folder / "manifest.json").read_text())
    del honest["sha256"]
    wrong = "format 2 and step 1"
    for change, message in (
        ({"format": 1}, "has format 1, and this version of nanotrain reads format 2: use the version that wrote it"),
        ({"format": "2"}, wrong),
        ({"step": 2}, wrong),
        ({"files": {}}, wrong),
        ({"files": {**honest["files"], "../x": {}}}, wrong),
        ({}, ""),
    ):
        manifest = {**honest, **change}
        seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": seal}))
        if change:
            with pytest.raises(CheckpointError, match=message):
                checkpoint.read(tmp_path, 1)
    checkpoint.read(tmp_path, 1)  # the last manifest was sealed the same way and changed nothing


def test_a_checkpoint_under_another_name_is_not_that_step(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoints" / "step_00000001", tmp_path / "checkpoints" / "step_00000009")
    assert checkpoint.newest(tmp_path)[0] == 1


def test_stray_files_and_folders_are_ignored(tmp_path):
    save(tmp_path, 1)
    here = tmp_path / "checkpoints"
    for name in ("step_2", "step_000000003", "step_0000000x", ".tmp-step_00000004-ab", ".bad-step_00000005-ab", "old"):
        shutil.copytree(here / "step_00000001", here / name)
    (here / "notes.txt").write_text("mine")
    (here / "latest").write_text("step_00000099")
    assert checkpoint.steps(tmp_path) == [1]
    step, _, complaints = checkpoint.newest(tmp_path)
    assert (step, complaints) == (1, [])


def test_a_file_or_an_empty_folder_named_like_a_checkpoint_is_complained_about(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step_00000002").mkdir()
    (tmp_path / "checkpoints" / "step_00000003").write_text("")
    step, _, complaints = checkpoint.newest(tmp_path)
    assert step == 1
    assert ["step_00000003" in complaints[0], "step_00000002" in complaints[1]] == [True, True]


def test_a_run_without_checkpoints_has_no_newest_and_no_complaints(tmp_path):
    assert checkpoint.newest(tmp_path / "never made") == (None, None, [])
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint.newest(tmp_path) == (None, None, [])


def test_verified_files_that_cannot_be_read_are_a_checkpoint_error(tmp_path):
    save(tmp_path, 1)
    files = checkpoint.read(tmp_path, 1)
    for name, content in (("model.safetensors", b"no tensors"), ("state.json", b"{"), ("state.json", b"[" * 100_000)):
        with pytest.raises(CheckpointError):
            checkpoint.unpack({**files, name: content})


def mutations(data):
    """The bytes of a safetensors file with its header or its length changed, in many ways."""
    draw = random.Random(0)
    length = int.from_bytes(data[:8], "little")
    text, elements = data[8 : 8 + length], data[8 + length :]

    def framed(header, size=None):
        return (len(header) if size is None else size).to_bytes(8, "little") + header + elements

    for _ in range(700):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(8 + length)] = draw.choice((draw.randrange(256), *b'0129[]{}",:-'))
        yield bytes(changed)
        start, end = sorted(draw.randrange(length) for _ in range(2))
        yield framed(text[:start] + text[end:])
        yield framed(text[:start] + text[start:end] * 2 + text[end:])
        yield data[: draw.randrange(len(data))]
    for size in (0, 1, length - 1, length + 1, len(data), 2**31, 2**62, 2**64 - 1):
        yield framed(text, size)
    header = json.loads(text)
    numbers = (-1, 0, 1, 3, 24, 2**31, 2**62, 2**63, 2**64, 10**30, 1.5, 1e400, None, True, "1", [], {})
    changes = [
        *(
            {"dtype": kind}
            for kind in ("F64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "BOOL", "U64", "x", "", 1)
        ),
        *({"shape": shape} for number in numbers for shape in (number, [number], [2, number], [number, 0], [1] * 70)),
        *({"data_offsets": place} for number in numbers for place in (number, [number], [0, number], [number, 24])),
        *({"shape": [0, number], "data_offsets": [0, 0]} for number in numbers),
    ]
    for name in WEIGHTS:
        for change in changes:
            yield framed(json.dumps({**header, name: {**header[name], **change}}).encode())
        for strange in ("", "x" * 10_000, "\0", "__metadata__", "a/../b", "\ud800"):
            yield framed(json.dumps({**header, strange: header[name]}).encode())
            yield framed(json.dumps({strange: header[name]}).encode())
    for strange in (b"", b"null", b"[]", b"1", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b" " * 100, b"\xff"):
        yield framed(strange)


def test_p6_a_mutated_header_of_tensors_is_a_checkpoint_error_or_well_formed(tmp_path):
    save(tmp_path, 1)
    files = checkpoint.read(tmp_path, 1)
    outcomes = {"refused": 0, "read": 0}
    for changed in mutations(files["model.safetensors"]):
        try:
            tensors, _, _ = checkpoint.unpack({**files, "model.safetensors": changed})
        except CheckpointError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert all(isinstance(name, str) for name in tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(changed)
        assert all(len(tensor.tolist()) == len(tensor) for tensor in tensors.values() if tensor.dim())
    assert outcomes["refused"] > 2000
    assert outcomes["read"] > 20


@pytest.mark.parametrize("content", ["null", "[]", "1", '"x"', "[[[", ""])
def test_p5_nothing_wrong_is_loaded_silently_a_state_that_is_no_object_is_refused(tmp_path, content):
    save(tmp_path, 1)
    files = checkpoint.read(tmp_path, 1)
    with pytest.raises(CheckpointError, match="written by another program"):
        checkpoint.unpack({**files, "state.json": content.encode()})


# ---- crashes ----


class Crash:
    """Counts the calls of a system function and raises at the one wanted."""

    def __init__(self, function, error, at):
        self.function, self.error, self.at, self.calls = function, error, at, 0

    def __call__(self, *arguments, **named):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.function(*arguments, **named)


LAST_SYNC = 8  # of the run, its parent, four files, the temporary folder, the folder of checkpoints
CALLS = [
    *((os, "fsync", at) for at in range(1, LAST_SYNC + 1)),
    (os, "replace", 1),
    (store.Disk, "make_folders", 1),
    (store.Disk, "make_folder", 1),
    *((store.Disk, "write", at) for at in range(1, 5)),
]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("owner", "name", "at"), CALLS)
def test_an_error_at_any_write_leaves_the_older_checkpoint_and_no_part_of_the_new(
    tmp_path, monkeypatch, owner, name, at, error
):
    save(tmp_path, 1)
    crash = Crash(getattr(owner, name), error, at)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *arguments, **named: crash(*arguments, **named))
        with pytest.raises(type(error)):
            save(tmp_path, 2)
    assert crash.calls == at
    if (name, at) == ("fsync", LAST_SYNC):  # of the parent folder, when the new one has its name and is whole
        assert folders(tmp_path) == ["step_00000001", "step_00000002"]
        assert checkpoint.newest(tmp_path)[0] == 2
    else:
        assert folders(tmp_path) == ["step_00000001"]
        assert checkpoint.newest(tmp_path)[::2] == (1, [])


def test_those_are_all_the_calls_of_a_save(tmp_path, monkeypatch):
    counters = {name: Crash(getattr(owner, name), None, 0) for owner, name, _ in CALLS}
    for owner, name in {(owner, name) for owner, name, _ in CALLS}:
        monkeypatch.setattr(owner, name, lambda *a, count=counters[name], **k: count(*a, **k))
    save(tmp_path, 2)
    assert {name: counter.calls for name, counter in counters.items()} == {
        name: max(at for _, other, at in CALLS if other == name) for name in counters
    }


@pytest.mark.parametrize(("owner", "name", "at"), CALLS)
def test_a_kill_at_any_write_leaves_only_a_temporary_folder_that_the_next_clean_removes(
    tmp_path, monkeypatch, owner, name, at
):
    save(tmp_path, 1)
    crash = Crash(getattr(owner, name), RuntimeError("killed"), at)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *arguments, **named: crash(*arguments, **named))
        patch.setattr(shutil, "rmtree", lambda *arguments, **named: None)  # a killed process tidies nothing up
        with pytest.raises(RuntimeError):
            save(tmp_path, 2)
    newest = 2 if (name, at) == ("fsync", LAST_SYNC) else 1
    assert checkpoint.newest(tmp_path)[::2] == (newest, [])
    checkpoints(tmp_path).clean(1, 0, -1, None)
    assert folders(tmp_path) == [f"step_{newest:08d}"]


def test_every_file_is_synced_before_the_folder_gets_its_name_and_the_parent_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda path, to: (events.append("rename"), rename(path, to))[1])
    folder = save(tmp_path, 1)
    assert events[:2] == [tmp_path.stat().st_ino, tmp_path.parent.stat().st_ino]
    del events[:2]  # so that the folder of checkpoints is not lost with all in it
    inodes = {path.stat().st_ino for path in folder.iterdir()}
    named = events.index("rename")
    assert set(events[: named - 1]) == inodes
    assert events[named - 2] == (folder / "manifest.json").stat().st_ino
    assert events[named - 1] == folder.stat().st_ino
    assert events[named + 1 :] == [(tmp_path / "checkpoints").stat().st_ino]


def test_saving_a_step_again_replaces_a_broken_one_and_sets_it_aside(tmp_path):
    damage(save(tmp_path, 4) / "state.json", "emptied")
    save(tmp_path, 4)
    assert checkpoint.newest(tmp_path)[::2] == (4, [])
    aside = [name for name in folders(tmp_path) if name != "step_00000004"]
    assert [name.startswith(".bad-step_00000004-") for name in aside] == [True]


def test_the_space_that_a_save_asks_for_is_that_of_its_tensors_and_a_little_more(tmp_path, monkeypatch):
    weights, moments = {"w": torch.zeros(1000, 1000)}, {"w/m": torch.zeros(1_000_000, dtype=torch.bfloat16)}
    needed = int(1.1 * (6_000_000 + (1 << 20)))
    monkeypatch.setattr(store.Disk, "free", lambda self, folder: needed - 1)
    with pytest.raises(OSError, match=f"No space left on device: {needed:,} bytes needed, {needed - 1:,} free"):
        save(tmp_path, 1, weights, moments)
    assert folders(tmp_path) == []
    monkeypatch.setattr(store.Disk, "free", lambda self, folder: needed)
    folder = save(tmp_path, 1, weights, moments)
    assert sum(path.stat().st_size for path in folder.iterdir()) < needed


def test_a_file_is_serialized_only_when_the_one_before_it_is_written(tmp_path, monkeypatch):
    events = []
    serialize, write = checkpoint.tensor_bytes, store.Store._write
    monkeypatch.setattr(checkpoint, "tensor_bytes", lambda tensors: (events.append("serialize"), serialize(tensors))[1])
    monkeypatch.setattr(
        store.Store, "_write", lambda self, path, data: (events.append(path.name), write(self, path, data))[1]
    )
    save(tmp_path, 1)
    assert events == ["serialize", FILES[1], "serialize", FILES[2], FILES[3], FILES[0]]


def test_a_run_that_another_process_claimed_is_neither_saved_nor_cleaned(tmp_path):
    first = checkpoints(tmp_path).claim()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, WEIGHTS, MOMENTS, {"step": step}, owner=first)
    second = checkpoints(tmp_path).claim()
    with pytest.raises(SupersededError, match="newer one goes on"):
        checkpoint.save(tmp_path, 3, WEIGHTS, MOMENTS, {"step": 3}, owner=first)
    with pytest.raises(SupersededError, match="newer one goes on"):
        checkpoints(tmp_path).clean(1, 0, -1, None, owner=first)
    assert folders(tmp_path) == ["step_00000001", "step_00000002"]
    checkpoint.save(tmp_path, 3, WEIGHTS, MOMENTS, {"step": 3}, owner=second)
    checkpoints(tmp_path).clean(1, 0, -1, None, owner=second)
    assert folders(tmp_path) == ["step_00000003"]


# ---- retention ----


@pytest.mark.parametrize(
    ("saved", "broken", "keep_last", "keep_every", "best", "resumed", "left"),
    [
        pytest.param("123456", "", 2, 0, -1, None, "56", id="the last two"),
        pytest.param("123456", "", 1, 0, -1, None, "6", id="the last"),
        pytest.param("123456", "", 0, 0, -1, None, "6", id="never none"),
        pytest.param("123456", "", 9, 0, -1, None, "123456", id="fewer than asked for"),
        pytest.param("123456", "", 1, 3, -1, None, "36", id="every third"),
        pytest.param("123456", "", 1, 2, 1, None, "1246", id="every second and the best"),
        pytest.param("123456", "6", 2, 0, -1, None, "45", id="a broken one does not count"),
        pytest.param("123456", "56", 1, 0, -1, None, "4", id="two broken ones do not count"),
        pytest.param("123456", "123456", 1, 0, -1, None, "123456", id="nothing goes where nothing verifies"),
        pytest.param("34", "", 1, 0, -1, 3, "34", id="the resumed one stays beside one newer"),
        pytest.param("345", "", 1, 0, -1, 3, "5", id="the resumed one goes when two are newer"),
        pytest.param("345", "", 2, 0, -1, 3, "45", id="the resumed one goes when two newer ones stay"),
        pytest.param("3456", "56", 1, 0, -1, 3, "34", id="broken ones are not newer"),
        pytest.param("3456", "", 1, 0, 4, 3, "46", id="the best stays when the resumed one goes"),
    ],
)
def test_what_clean_keeps(tmp_path, saved, broken, keep_last, keep_every, best, resumed, left):
    for step in saved:
        folder = save(tmp_path, int(step))
        if step in broken:
            damage(folder / "model.safetensors", "last bit")
    checkpoints(tmp_path).clean(keep_last, keep_every, best, resumed)
    assert folders(tmp_path) == [f"step_{int(step):08d}" for step in left]


def test_clean_reads_no_more_checkpoints_than_it_must(tmp_path, monkeypatch):
    for step in range(1, 9):
        save(tmp_path, step)
    verify, asked = store.Store.verify, []
    monkeypatch.setattr(store.Store, "verify", lambda self, step: (asked.append(step), verify(self, step))[1])
    checkpoints(tmp_path).clean(2, 1, -1, None)
    assert asked == [8, 7]


def test_a_kill_while_cleaning_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *arguments, **named: None)
        checkpoints(tmp_path).clean(1, 0, -1, None)
    assert checkpoint.steps(tmp_path) == [3]
    checkpoints(tmp_path).clean(1, 0, -1, None)
    assert folders(tmp_path) == ["step_00000003"]


# ---- models ----


@pytest.fixture
def trained(tmp_path, tokenizer):
    """A run folder with a model of random weights, and that model."""
    config = GPTConfig(tokenizer.vocab_size, 16, 2, 2, 1, 8)
    model = checkpoint.build_model(config, "cpu")
    model.init_weights(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / 10)
    tokenizer.save(tmp_path)
    state = {"step": 8, "model_config": config.to_dict(), "tokenizer_sha256": tokenizer.sha256(), "val_bpb": 1.25}
    checkpoint.save(tmp_path, 8, model.state_dict(), {}, state)
    return tmp_path, model


def test_load_model_gives_float32_weights_equal_logits_and_the_tokenizer(trained, tokenizer):
    run, original = trained
    model, loaded_tokenizer, meta = checkpoint.load_model(run)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokens = torch.randint(0, tokenizer.vocab_size, (3, 16))
    logits = model.logits(tokens)
    assert logits.dtype == torch.float32
    assert logits.shape == (3, 16, tokenizer.vocab_size)
    assert torch.equal(logits, original.logits(tokens))
    assert loaded_tokenizer.to_json() == tokenizer.to_json()
    assert (meta["step"], meta["val_bpb"]) == (8, 1.25)


def test_load_model_takes_the_newest_that_verifies(trained):
    run, original = trained
    other = {name: tensor + 1 for name, tensor in original.state_dict().items()}
    state = {**checkpoint.load_model(run)[2], "step": 9}
    folder = checkpoint.save(run, 9, other, {}, state)
    assert checkpoint.load_model(run)[2]["step"] == 9
    damage(folder / "model.safetensors", "middle bit")
    model, _, meta = checkpoint.load_model(run)
    assert meta["step"] == 8
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


def save_again(trained, step, best_step, add):
    run, original = trained
    tensors = {name: tensor + add for name, tensor in original.state_dict().items()}
    state = checkpoint.unpack(checkpoint.read(run, 8))[2]
    return checkpoint.save(run, step, tensors, {}, {**state, "step": step, "train_state": {"best_step": best_step}})


def test_load_model_takes_the_best_that_the_newest_knows(trained):
    run, original = trained
    for newest, best in ((9, 8), (10, 9), (11, 11)):
        save_again(trained, newest, best, add=newest)
        model, _, meta = checkpoint.load_model(run, best=True)
        assert meta["step"] == best
        assert torch.equal(model.lm_head.weight, original.lm_head.weight + (best if best > 8 else 0))
        assert checkpoint.load_model(run)[2]["step"] == newest


@pytest.mark.parametrize("best_step", [-1, None, "8", 8.0, True])
def test_load_model_of_the_best_of_a_run_that_was_never_evaluated_says_so(trained, best_step):
    save_again(trained, 9, best_step, add=0)
    with pytest.raises(CheckpointError, match="never evaluated"):
        checkpoint.load_model(trained[0], best=True)
    for run in ({}, None, []):
        state = {**checkpoint.load_model(trained[0])[2], "train_state": run}
        checkpoint.save(trained[0], 9, trained[1].state_dict(), {}, state)
        with pytest.raises(CheckpointError, match="never evaluated"):
            checkpoint.load_model(trained[0], best=True)


def test_load_model_takes_any_step_that_is_there(trained):
    run, original = trained
    save_again(trained, 9, 8, add=9)
    folder = save_again(trained, 10, 8, add=10)
    for step, add in ((8, 0), (9, 9), (10, 10)):
        model, _, meta = checkpoint.load_model(run, step=step)
        assert meta["step"] == step
        assert torch.equal(model.lm_head.weight, original.lm_head.weight + add)
    with pytest.raises(CheckpointError, match=r"--step=7: no such checkpoint in .*; there: 10, 9, 8"):
        checkpoint.load_model(run, step=7)
    damage(folder / "model.safetensors", "middle bit")
    with pytest.raises(CheckpointError, match="step_00000010"):
        checkpoint.load_model(run, step=10)


def test_load_model_of_a_best_that_is_damaged_or_gone_takes_no_other(trained):
    run, _ = trained
    save_again(trained, 9, 8, add=1)
    folder = run / "checkpoints" / "step_00000008"
    damage(folder / "model.safetensors", "middle bit")
    with pytest.raises(CheckpointError, match=r"best checkpoint, of step 8, cannot be used: .*step_00000008"):
        checkpoint.load_model(run, best=True)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"best checkpoint, of step 8, cannot be used: .*step_00000008"):
        checkpoint.load_model(run, best=True)
    assert checkpoint.load_model(run)[2]["step"] == 9


@pytest.mark.parametrize("script", [base_eval, generate], ids=["base_eval", "generate"])
def test_the_scripts_load_the_best_when_told_to(script, trained, monkeypatch):
    class Loaded(Exception):
        pass

    def load_model(run_dir, device, best=False, step=0):
        raise Loaded(run_dir, best)

    alone = SimpleNamespace(device="cpu", on_rank0=lambda act: act(), on_all_ranks=lambda act: act())
    monkeypatch.setattr(script, "init_distributed", lambda *_, **named: alone)  # which would set what others see
    monkeypatch.setattr(checkpoint, "load_model", load_model)
    monkeypatch.setattr(script, "RUN_NAME", str(trained[0]))
    for best in (False, True):
        assert not script.BEST or best
        monkeypatch.setattr(script, "BEST", best)
        with pytest.raises(Loaded) as caught:
            script.main()
        assert caught.value.args == (trained[0], best)


@pytest.mark.parametrize("change", [{"model_config": None}, {"model_config": {"depth": 3}}, {"model_config": []}])
def test_p5_nothing_wrong_is_loaded_silently_a_state_without_a_model_is_refused(trained, change):
    run, original = trained
    state = {**checkpoint.load_model(run)[2], **change}
    checkpoint.save(run, 9, original.state_dict(), {}, state)
    with pytest.raises(CheckpointError, match="no valid GPTConfig"):
        checkpoint.load_model(run)


def test_load_model_refuses_another_tokenizer_or_none(trained):
    run, _ = trained
    BPETokenizer.train(["other text entirely"], 260).save(run)
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer"):
        checkpoint.load_model(run)
    (run / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer"):
        checkpoint.load_model(run)


def test_load_model_of_a_missing_run_says_how_to_train_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"python -m scripts\.base_train"):
        checkpoint.load_model(tmp_path / "nothing")


def test_load_weights_names_what_is_missing_extra_misshapen_or_of_another_dtype(trained):
    _, model = trained
    good = model.state_dict()
    missing = {name: tensor for name, tensor in good.items() if name != "lm_head.weight"}
    for tensors, name in (
        (missing, "lm_head.weight"),
        ({**good, "surprise": torch.zeros(1)}, "surprise"),
        ({**good, "backout_scale": torch.zeros(1)}, "backout_scale"),
        ({**good, "lm_head.weight": good["lm_head.weight"].double()}, "lm_head.weight"),
    ):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load_weights(model, tensors)


def test_load_weights_sets_everything_even_in_memory_full_of_nan(trained):
    run, original = trained
    model = checkpoint.build_model(original.config, "cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    checkpoint.load_weights(model, checkpoint.unpack(checkpoint.read(run, 8))[0])
    tokens = torch.arange(16)[None]
    assert torch.equal(model.logits(tokens), original.logits(tokens))


# ---- runs ----


def test_find_run_takes_the_one_saved_last_and_ignores_what_is_no_run(base_dir):
    runs = base_dir / "runs"
    for name, when in (("old", 1000), ("young", 3000), ("middle", 2000)):
        save(runs / name, 1)
        os.utime(runs / name / "checkpoints", (when, when))
    (runs / "empty" / "checkpoints").mkdir(parents=True)
    (runs / "file").write_text("")
    assert checkpoint.find_run() == runs / "young"
    assert checkpoint.find_run("old") == runs / "old"


def test_find_run_without_any_run_says_how_to_train_one(base_dir):
    with pytest.raises(CheckpointError, match=r"python -m scripts\.base_train"):
        checkpoint.find_run()


def test_a_run_name_is_one_folder_and_a_path_is_taken_as_it_is(base_dir, tmp_path):
    assert paths.run_dir("d4") == base_dir / "runs" / "d4"
    assert paths.run_dir(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"
    for name in ("", ".", "..", "-x", "a b", "x" * 101, "a\n"):
        with pytest.raises(UserError, match="run name"):
            paths.run_dir(name)
