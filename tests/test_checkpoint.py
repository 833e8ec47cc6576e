"""Checkpoints: exact, whole or absent, never believed unless every byte verifies, and kept by rule."""

import hashlib
import json
import os
import random
import shutil

import pytest
import safetensors.torch
import torch
from conftest import ALONE

from nanotrain import checkpoint, paths, store
from nanotrain.errors import CheckpointError, DataError, UserError
from nanotrain.gpt import GPTConfig
from nanotrain.tokenizer import BPETokenizer
from scripts import base_eval, generate

FILES = ("manifest.json", "model.safetensors", "optim-00000-of-00001.safetensors", "state.json")
WEIGHTS = {"layer.weight": torch.arange(6.0).view(2, 3), "scale": torch.tensor(0.1)}
MOMENTS = {"layer.weight/momentum": torch.full((2, 3), 1 / 3)}


def save(run, step, weights=WEIGHTS, moments=MOMENTS, state=None):
    return checkpoint.save(run, step, weights, moments, state or {"step": step})


def damage(path, how="middle bit"):
    data = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "one byte short":
        path.write_bytes(data[:-1])
    elif how == "one byte long":
        path.write_bytes(data + b"\0")
    else:
        place = {"first": 0, "middle": len(data) // 2, "last": -1}[how.split()[0]]
        flipped = bytearray(data)
        flipped[place] ^= 1
        path.write_bytes(flipped)


def folders(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def bits(tensors):
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().flatten().view(torch.uint8).tolist())
        for name, tensor in tensors.items()
    }


# ---- what is saved ----


def test_tensors_and_state_come_back_to_the_bit(tmp_path):
    weights = {
        "float32": torch.tensor([[0.1, -0.0, float("inf")], [float("nan"), 1e-45, -3e38]]),
        "bfloat16": torch.randn(3, 5).bfloat16(),
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
    assert (bits(loaded_weights), bits(loaded_moments)) == (bits(weights), bits(moments))


def test_the_manifest_lists_every_file_with_size_and_hash_and_seals_itself(tmp_path):
    folder = save(tmp_path, 1000)
    assert folder == tmp_path / "checkpoints" / "step_00001000"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(FILES[1:])
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    seal = manifest.pop("sha256")
    assert (manifest.keys(), manifest["format"], manifest["step"]) == ({"format", "step", "files"}, 2, 1000)
    assert seal == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def test_the_weights_file_is_plain_safetensors_and_a_function_of_the_weights_alone(tmp_path):
    first = save(tmp_path / "a", 1, state={"step": 1, "time": 1.5}) / "model.safetensors"
    second = save(tmp_path / "b", 77, dict(reversed(WEIGHTS.items())), {}) / "model.safetensors"
    assert first.read_bytes() == second.read_bytes()
    assert bits(safetensors.torch.load_file(first)) == bits(WEIGHTS)


def test_a_state_that_json_cannot_hold_is_refused_and_leaves_nothing(tmp_path):
    for state in ({"loss": float("nan")}, {"tensor": torch.zeros(1)}):
        with pytest.raises((ValueError, TypeError)):
            save(tmp_path, 1, state=state)
    assert folders(tmp_path) == []


# ---- damage ----


@pytest.mark.parametrize("how", ["deleted", "one byte short", "one byte long", "first bit", "middle bit", "last bit"])
@pytest.mark.parametrize("name", FILES)
def test_p5_nothing_wrong_is_loaded_silently_a_damaged_checkpoint_gives_way_to_the_older_one_and_is_named(
    tmp_path, name, how
):
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name, how)
    step, files, (complaint,) = checkpoint.newest(tmp_path)
    assert (step, checkpoint.unpack(files)[2]) == (1, {"step": 1})
    assert "step_00000002" in complaint
    damage(tmp_path / "checkpoints" / "step_00000001" / name, how)
    with pytest.raises(CheckpointError, match=r"step_00000002.*step_00000001"):
        checkpoint.newest(tmp_path)


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


def test_what_is_no_checkpoint_is_ignored_and_what_has_the_name_of_one_is_complained_about(tmp_path):
    assert checkpoint.newest(tmp_path / "never made") == (None, None, [])
    whole, here = save(tmp_path, 1), tmp_path / "checkpoints"
    for name in ("step_2", "step_000000003", "step_0000000x", "step_0000000٢", "step_00000003\n", "old"):
        shutil.copytree(whole, here / name)
    for kind in (".tmp-step_00000004-ab", ".old-step_00000004", ".old-step_00000005-zz"):
        shutil.copytree(whole, here / kind)
    (here / "latest").write_text("step_00000099")
    assert checkpoint.steps(tmp_path) == [1]
    shutil.copytree(whole, here / "step_00000009")  # of another step
    (here / "step_00000002").mkdir()
    (here / "step_00000003").write_text("")
    step, _, complaints = checkpoint.newest(tmp_path)
    assert step == 1
    assert [number in complaint for number, complaint in zip("932", complaints, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("name", "content"), [("model.safetensors", "no tensors"), *(("state.json", text) for text in ("[]", "[" * 99_999))]
)
def test_p5_nothing_wrong_is_loaded_silently_a_verified_file_of_another_program_is_refused(tmp_path, name, content):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="another program"):
        checkpoint.unpack({**checkpoint.read(tmp_path, 1), name: content.encode()})


def mutations(data):
    """The bytes of a safetensors file with its header or its length changed, in many ways."""
    draw = random.Random(0)
    length = int.from_bytes(data[:8], "little")
    text, elements = data[8 : 8 + length], data[8 + length :]

    def framed(header, size=None):
        return (len(header) if size is None else size).to_bytes(8, "little") + header + elements

    for _ in range(500):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(8 + length)] = draw.choice((draw.randrange(256), *b'0129[]{}",:-'))
        yield bytes(changed)
        start, end = sorted(draw.randrange(length) for _ in range(2))
        yield framed(text[:start] + text[end:])
        yield data[: draw.randrange(len(data))]
    for size in (0, 1, length - 1, length + 1, len(data), 2**31, 2**62, 2**64 - 1):
        yield framed(text, size)
    header = json.loads(text)
    changes = [{"dtype": kind} for kind in ("F64", "F16", "F8_E4M3", "F4", "C64", "BOOL", "x", 1)]
    for number in (-1, 0, 3, 24, 2**31, 2**63, 10**30, 1.5, 1e400, None, True, "1", {}):
        changes += [{"shape": [2, number]}, {"shape": number}, {"data_offsets": [0, number]}]
    for change in changes:
        yield framed(json.dumps({**header, "scale": {**header["scale"], **change}}).encode())
    for strange in (b"", b"null", b"[" * 100_000, b" " * 100, b"\xff"):
        yield framed(strange)


def test_p6_a_mutated_header_of_tensors_is_a_checkpoint_error_or_well_formed(tmp_path):
    save(tmp_path, 1)
    files, refused, well_formed = checkpoint.read(tmp_path, 1), 0, 0
    for changed in mutations(files["model.safetensors"]):
        try:
            tensors, _, _ = checkpoint.unpack({**files, "model.safetensors": changed})
        except CheckpointError:
            refused += 1
            continue
        well_formed += 1
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(changed)
        assert all(len(tensor.tolist()) == len(tensor) for tensor in tensors.values() if tensor.dim())
    assert refused > 1000
    assert well_formed > 10


# ---- saving (tests/test_store.py has a crash at every operation) ----


def test_p4_every_file_is_synced_before_the_folder_gets_its_name_and_the_parent_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda path, to: (events.append("rename"), rename(path, to))[1])
    folder = save(tmp_path, 1)
    assert len(events) == 9
    assert events[:2] == [tmp_path.stat().st_ino, tmp_path.parent.stat().st_ino]
    assert set(events[2:6]) == {path.stat().st_ino for path in folder.iterdir()}
    assert events[5] == (folder / "manifest.json").stat().st_ino
    assert events[6:] == [folder.stat().st_ino, "rename", folder.parent.stat().st_ino]


def test_saving_a_step_again_replaces_a_broken_one(tmp_path):
    damage(save(tmp_path, 4) / "state.json", "deleted")
    save(tmp_path, 4)
    assert checkpoint.newest(tmp_path)[::2] == (4, [])
    assert folders(tmp_path) == ["step_00000004"]


def test_a_file_is_serialized_only_when_the_one_before_it_is_written(tmp_path, monkeypatch):
    events = []
    serialize, write = checkpoint.tensor_bytes, store.Disk.write
    monkeypatch.setattr(checkpoint, "tensor_bytes", lambda tensors: (events.append("serialize"), serialize(tensors))[1])
    monkeypatch.setattr(
        store.Disk, "write", lambda self, path, data: (events.append(path.name), write(self, path, data))
    )
    save(tmp_path, 1)
    assert events == ["serialize", FILES[1], "serialize", FILES[2], FILES[3], FILES[0]]


# ---- retention ----


@pytest.mark.parametrize(
    ("saved", "broken", "keep_last", "keep_every", "best", "resumed", "left"),
    [
        ("123456", "", 2, 0, -1, None, "56"),
        ("123456", "", 9, 0, -1, None, "123456"),
        ("123456", "", 1, 3, -1, None, "36"),
        ("123456", "", 1, 2, 1, None, "1246"),
        ("123456", "6", 2, 0, -1, None, "456"),  # a broken one does not count
        ("123456", "14", 2, 0, -1, None, "56"),
        ("123456", "123456", 1, 0, -1, None, "123456"),  # nothing goes where nothing verifies
        ("34", "", 1, 0, -1, 3, "34"),  # the resumed one stays beside one newer
        ("345", "", 1, 0, -1, 3, "5"),  # and goes when two are newer
        ("3456", "56", 1, 0, -1, 3, "3456"),  # broken ones are not newer
        ("3456", "", 1, 0, 4, 3, "46"),
    ],
)
def test_what_clean_keeps(tmp_path, saved, broken, keep_last, keep_every, best, resumed, left):
    for step in saved:
        folder = save(tmp_path, int(step))
        if step in broken:
            damage(folder / "model.safetensors")
    store.Store(tmp_path, FILES[1:]).clean(keep_last, keep_every, best, resumed)
    assert folders(tmp_path) == [f"step_{int(step):08d}" for step in left]


# ---- models ----


@pytest.fixture
def trained(tmp_path, tokenizer):
    """A run folder with a model of random weights at step 8, and that model."""
    config = GPTConfig(tokenizer.vocab_size, 16, 2, 2, 1, 8)
    model = checkpoint.build_model(config, "cpu")
    model.init_weights(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / 10)
    tokenizer.save(tmp_path)
    state = {"step": 8, "model_config": config.to_dict(), "tokenizer_sha256": tokenizer.sha256(), "val_bpb": 1.25}
    save(tmp_path, 8, model.state_dict(), {}, state)
    return tmp_path, model


def save_more(trained, step, **state):
    """Save the weights plus `step` as another step."""
    run, original = trained
    tensors = {name: tensor + step for name, tensor in original.state_dict().items()}
    was = checkpoint.unpack(checkpoint.read(run, 8))[2]
    return save(run, step, tensors, {}, {**was, "step": step, **state})


def test_load_model_gives_float32_weights_equal_logits_and_the_tokenizer(trained, tokenizer):
    run, original = trained
    model, loaded_tokenizer, meta = checkpoint.load_model(run)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokens = torch.randint(0, tokenizer.vocab_size, (3, 16))
    assert torch.equal(model.logits(tokens), original.logits(tokens))
    assert loaded_tokenizer.to_json() == tokenizer.to_json()
    assert (meta["step"], meta["val_bpb"]) == (8, 1.25)


def test_load_model_takes_the_newest_that_verifies_the_best_that_it_knows_or_any_step(trained):
    run, original = trained
    save_more(trained, 9, train_state={"best_step": 8})
    newest = save_more(trained, 10, train_state={"best_step": 9})
    for chosen, step in (({}, 10), ({"best": True}, 9), ({"step": 8}, 8), ({"step": 10}, 10)):
        model, _, meta = checkpoint.load_model(run, **chosen)
        assert meta["step"] == step
        assert torch.equal(model.lm_head.weight, original.lm_head.weight + (step if step > 8 else 0))
    with pytest.raises(CheckpointError, match=r"--step=7: .*; there: 10, 9, 8"):
        checkpoint.load_model(run, step=7)
    with pytest.raises(UserError, match="--best and --step=8"):
        checkpoint.load_model(run, best=True, step=8)
    damage(newest / "model.safetensors")
    with pytest.raises(CheckpointError, match="step_00000010"):
        checkpoint.load_model(run, step=10)
    assert checkpoint.load_model(run)[2]["step"] == 9
    damage(run / "checkpoints" / "step_00000008" / "model.safetensors")
    with pytest.raises(CheckpointError, match="step_00000008"):
        checkpoint.load_model(run, best=True)  # and takes no other


@pytest.mark.parametrize("script", [base_eval, generate], ids=["base_eval", "generate"])
def test_the_scripts_load_the_best_when_told_to(script, trained, monkeypatch):
    monkeypatch.setattr(script, "init_distributed", lambda *_, **named: ALONE)  # which would set what others see
    monkeypatch.setattr(script, "RUN_NAME", str(trained[0]))
    monkeypatch.setattr(script, "BEST", True)
    with pytest.raises(CheckpointError, match="never evaluated"):
        script.main()


def test_load_model_refuses_another_configuration_or_tokenizer_and_a_missing_run(trained, tmp_path):
    run, _ = trained
    for strange in (None, {"depth": 3}, []):
        save_more(trained, 9, model_config=strange)
        with pytest.raises(CheckpointError, match="no valid GPTConfig"):
            checkpoint.load_model(run)
    save_more(trained, 9)
    BPETokenizer.train(["other text entirely"], 260).save(run)
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer"):
        checkpoint.load_model(run)
    (run / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer"):
        checkpoint.load_model(run)
    with pytest.raises(CheckpointError, match=r"python -m scripts\.base_train"):
        checkpoint.load_model(tmp_path / "nothing")


def test_load_weights_names_what_is_missing_extra_or_misshapen(trained):
    _, model = trained
    good = model.state_dict()
    missing = {name: tensor for name, tensor in good.items() if name != "lm_head.weight"}
    for tensors, name in (
        (missing, "lm_head.weight"),
        ({**good, "surprise": torch.zeros(1)}, "surprise"),
        ({**good, "backout_scale": torch.zeros(1, 2)}, "backout_scale"),
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


def test_find_run_takes_the_one_saved_last_and_ignores_what_is_no_run(base_dir, tmp_path):
    runs = base_dir / "runs"
    with pytest.raises(CheckpointError, match=r"python -m scripts\.base_train"):
        checkpoint.find_run()
    for name, when in (("old", 1000), ("young", 3000), ("middle", 2000)):
        save(runs / name, 1)
        os.utime(runs / name / "checkpoints", (when, when))
    (runs / "empty" / "checkpoints").mkdir(parents=True)
    (runs / "file").write_text("")
    assert checkpoint.find_run() == runs / "young"
    assert checkpoint.find_run("old") == runs / "old"
    assert paths.run_dir(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"
    for name in ("", ".", "..", "-x", "a b", "x" * 101, "a\n"):
        with pytest.raises(UserError, match="run name"):
            paths.run_dir(name)
