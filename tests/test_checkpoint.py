"""Checkpoints: exact, whole or absent, never believed unless every byte verifies, and kept by rule."""

import hashlib
import json
import os
import random
import shutil

import pytest
import safetensors.torch
import torch

from nanotrain import checkpoint
from nanotrain.errors import CheckpointError, DataError, UserError
from nanotrain.gpt import GPTConfig
from nanotrain.store import Store
from nanotrain.tokenizer import BPETokenizer

FILES = ("manifest.json", "model.safetensors", "optim-00000-of-00001.safetensors", "state.json")
WEIGHTS = {"layer.weight": torch.arange(6.0).view(2, 3), "scale": torch.tensor(0.1)}
MOMENTS = {"layer.weight/momentum": torch.full((2, 3), 1 / 3)}


def save(run, step, weights=WEIGHTS, moments=MOMENTS, state=None):
    return Store(run).commit(step, checkpoint.pack(weights, moments, state or {"step": step}))


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def damage(path):
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2))


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
        "scalar": torch.tensor(1 / 3),
        "transposed": torch.arange(12.0).view(3, 4).t(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    moments = {f"{name}/momentum": tensor.detach().clone() for name, tensor in weights.items()}
    state = {"step": 3, "nested": {"list": [1, 0.1, None, "ü"]}, "large": 2**63}
    save(tmp_path, 3, weights, moments, state)
    step, files, complaints = Store(tmp_path).newest()
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


# ---- damage ----


def test_p5_nothing_wrong_is_loaded_silently_every_byte_of_every_file_counts_and_the_older_one_is_used(tmp_path):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    for path in newer.iterdir():
        honest = path.read_bytes()
        wrong = [flipped(honest, place) for place in range(len(honest))]
        for changed in (*wrong, b"", honest[:-1], honest + b"\0"):
            path.write_bytes(changed)
            step, files, (complaint,) = Store(tmp_path).newest()
            assert (step, checkpoint.unpack(files)[2]) == (1, {"step": 1})
            assert "step_00000002" in complaint
        path.write_bytes(honest)
    assert Store(tmp_path).newest()[::2] == (2, [])
    for folder in (newer, older):
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step_00000002.*step_00000001") as caught:
        Store(tmp_path).newest()
    assert caught.value.exit_code == 3


def test_what_is_no_checkpoint_is_ignored_and_what_has_the_name_of_one_is_complained_about(tmp_path):
    assert Store(tmp_path / "never made").newest() == (None, None, [])
    whole, here = save(tmp_path, 1), tmp_path / "checkpoints"
    for name in ("step_2", "step_000000003", "step_0000000٢", "step_00000003\n", ".tmp-step_00000004-a", ".old-step_4"):
        shutil.copytree(whole, here / name)
    assert Store(tmp_path).steps() == [1]
    shutil.copytree(whole, here / "step_00000009")  # of another step
    (here / "step_00000002").mkdir()
    (here / "step_00000003").write_text("")
    step, _, complaints = Store(tmp_path).newest()
    assert step == 1
    assert [number in complaint for number, complaint in zip("932", complaints, strict=True)] == [True] * 3


def test_p6_a_verified_file_of_another_program_is_a_checkpoint_error_or_well_formed(tmp_path):
    save(tmp_path, 1)
    files, draw, refused = Store(tmp_path).read(1), random.Random(0), 0
    data = files["model.safetensors"]
    header_end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(header_end)] = draw.choice((draw.randrange(256), *b'0129[]{}",:-'))
        try:
            tensors, _, _ = checkpoint.unpack({**files, "model.safetensors": bytes(changed)})
        except CheckpointError:
            refused += 1
        else:
            assert sum(tensor.nbytes for tensor in tensors.values()) <= len(data)
            assert all(len(tensor.tolist()) == len(tensor) for tensor in tensors.values() if tensor.dim())
    assert 1000 < refused < 1490
    for name, text in (("model.safetensors", b""), ("state.json", b"[]"), ("state.json", b"[" * 99_999)):
        with pytest.raises(CheckpointError, match="not in nanotrain"):
            checkpoint.unpack({**files, name: text})


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
    Store(tmp_path).clean(keep_last, keep_every, best, resumed)
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
    state = {"step": 8, "model_config": vars(config), "tokenizer_sha256": tokenizer.sha256(), "val_bpb": 1.25}
    save(tmp_path, 8, model.state_dict(), {}, state)
    return tmp_path, model


def save_more(trained, step, **state):
    """Save the weights plus `step` as another step."""
    run, original = trained
    tensors = {name: tensor + step for name, tensor in original.state_dict().items()}
    was = checkpoint.unpack(Store(run).read(8))[2]
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
    with pytest.raises(CheckpointError, match=r"--step=7: .*; available: 10, 9, 8"):
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


def test_load_model_refuses_another_configuration_or_tokenizer_and_a_missing_run(trained, tmp_path):
    run, model = trained
    for strange in (None, {"depth": 3}, []):
        save_more(trained, 9, model_config=strange)
        with pytest.raises(CheckpointError, match="no valid GPTConfig"):
            checkpoint.load_model(run)
    with pytest.raises(CheckpointError, match="surprise"):
        checkpoint.load_weights(model, {**model.state_dict(), "surprise": torch.zeros(1)})
    save_more(trained, 9)
    BPETokenizer.train(["other text entirely"], 260).save(run)
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer"):
        checkpoint.load_model(run)
    (run / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer"):
        checkpoint.load_model(run)
    with pytest.raises(CheckpointError, match=r"python -m scripts\.base_train"):
        checkpoint.load_model(tmp_path / "nothing")


# ---- runs ----


def test_find_run_takes_the_one_saved_last_and_ignores_what_is_no_run(base_dir):
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
    for name in (".", "..", "-x", "a b", "x" * 101, "a\n"):
        with pytest.raises(UserError, match="run name"):
            checkpoint.find_run(name)
