"""Checkpoints that cannot be half written, silently wrong or hostile.

    <run>/checkpoints/step_00001000/
        manifest.json                         format, step, size and SHA-256 of every other file, and a hash of all that
        model.safetensors                     the weights by name, and nothing else
        optim-00000-of-00001.safetensors      "parameter/state" -> whole tensors
        state.json                            everything else: step, settings, loader, horizon, fingerprints

How they are written and verified is in store.py; what is in them is here. There is no pickle: tensors are safetensors,
the rest is JSON.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes

from nanotrain import paths, wandb_run
from nanotrain.errors import CheckpointError, DataError, UserError
from nanotrain.gpt import GPT, GPTConfig
from nanotrain.store import Store
from nanotrain.tokenizer import BPETokenizer

MODEL, OPTIMIZER, STATE = "model.safetensors", "optim-00000-of-00001.safetensors", "state.json"
OTHER_BYTES = 1 << 20  # more than all of a checkpoint that is not the elements of tensors


def save(run_dir, step, model_tensors, optimizer_tensors, state, owner=None):
    """Write the checkpoint of `step`: tensors by name (float32 weights, whole optimizer state) and `state`, a
    JSON-like dict. Returns its folder.

    It is there as a whole or not at all, whatever happens, and one serialized file is in memory at a time. A full disk
    raises OSError and leaves nothing behind; so does SupersededError, if the run is no longer that of `owner` (an id
    from `claim`; None does not ask).
    """
    files = {
        MODEL: lambda: tensor_bytes(_plain(model_tensors)),
        OPTIMIZER: lambda: tensor_bytes(_plain(optimizer_tensors)),
        STATE: lambda: json.dumps(state, indent=1, allow_nan=False).encode(),
    }
    size = sum(tensor.nbytes for tensors in (model_tensors, optimizer_tensors) for tensor in tensors.values())
    return _store(run_dir).commit(step, files, size + OTHER_BYTES, owner)


def steps(run_dir):
    """The steps of the checkpoints of a run, newest first, verified or not."""
    return _store(run_dir).steps()


def read(run_dir, step):
    """{file name: bytes} of the checkpoint of `step`, every byte verified. Raises CheckpointError that says what is
    wrong.
    """
    return _store(run_dir).read(step)


def newest(run_dir):
    """(step, files, complaints): the newest checkpoint that verifies, and why newer ones were rejected; (None, None,
    []) if there is none.

    Raises CheckpointError if there are checkpoints and none of them verifies.
    """
    return _store(run_dir).newest()


def clean(run_dir, keep_last, keep_every, best_step, resumed_step, owner=None, verified=None):
    """Remove temporary folders and old checkpoints by the rules of `Store.clean`. `verified` is a dict for the caller
    to hand in again, so that no checkpoint is hashed at every save.
    """
    _store(run_dir).clean(keep_last, keep_every, best_step, resumed_step, owner, verified)


def claim(run_dir):
    """Make this process the one that may write checkpoints of a run, until another claims it; returns the `owner` to
    save with.
    """
    return _store(run_dir).claim()


def unpack(files):
    """(model tensors, optimizer tensors, state) of the verified files of a checkpoint.

    Raises CheckpointError if another program wrote them and they are not what they should be.
    """
    return _tensors(files[MODEL]), _tensors(files[OPTIMIZER]), _state(files)


def check_choice(best, step):
    """Raise UserError if --best and --step contradict each other, or the step is negative."""
    if step < 0:
        raise UserError(f"--step={step}: at least 0")
    if best and step:
        raise UserError(f"--best and --step={step}: two checkpoints; give one of them")


def find_run(name=""):
    """The folder of the run `name`, or of the run that was saved last; `wandb:ENTITY/PROJECT/NAME:ALIAS` is an artifact
    of one, which is fetched. Raises CheckpointError if there is none.
    """
    if name.startswith(wandb_run.PREFIX):
        return wandb_run.fetch(name, paths.artifacts_dir())
    if name:
        return paths.run_dir(name)
    runs = paths.base_dir() / "runs"
    saved = [folder for folder in runs.iterdir() if steps(folder)] if runs.is_dir() else []
    if not saved:
        raise CheckpointError(f"no run in {runs}: train one with python -m scripts.base_train")
    return max(saved, key=lambda folder: (folder / "checkpoints").stat().st_mtime)


def load_model(run_dir, device="cpu", best=False, step=0):
    """(model, tokenizer, meta) of the newest checkpoint of a run that verifies, of the one with the best validation
    bits per byte, or of the one after `step` steps: float32 weights on `device`, in evaluation mode.

    meta is the checkpoint's state: step, settings, model_config, val_bpb and so on. Raises CheckpointError (none can
    be used) or DataError (the tokenizer is missing or not that of the run).
    """
    run_dir = Path(run_dir)
    files = _chosen(run_dir, step) if step else _newest_or_best(run_dir, best)
    tensors, _, meta = unpack(files)
    try:
        config, tokenizer_sha256 = GPTConfig(**meta["model_config"]), meta["tokenizer_sha256"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"a checkpoint of {run_dir} lacks what a model needs: {error}") from None
    tokenizer = BPETokenizer.load(run_dir)
    if tokenizer.sha256() != tokenizer_sha256:
        raise DataError(f"{run_dir / 'tokenizer.json'} is not the tokenizer this run was trained with")
    model = build_model(config, torch.device(device))
    load_weights(model, tensors)
    return model.eval(), tokenizer, meta


def build_model(config, device):
    """A GPT on `device` whose memory is not set yet: `init_weights` or `load_weights` comes next."""
    with torch.device("meta"):
        model = GPT(config)
    return model.to_empty(device=device)


def load_weights(model, tensors):
    """Fill a model from {name: tensor}. Raises CheckpointError that lists what is missing, extra, misshapen or of
    another dtype.
    """
    own = model.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys())
    for name in sorted(own.keys() & tensors.keys()):
        if (own[name].shape, own[name].dtype) != (tensors[name].shape, tensors[name].dtype):
            wrong.append(name)
    if wrong:
        raise CheckpointError(f"the checkpoint's weights are not those of this model: {', '.join(wrong[:5])}")
    model.init_buffers()
    model.load_state_dict(tensors)


def _chosen(run_dir, step):
    there = steps(run_dir)
    if step not in there:
        listed = ", ".join(map(str, there)) or "none"
        raise CheckpointError(f"--step={step}: no such checkpoint in {run_dir / 'checkpoints'}; there: {listed}")
    return read(run_dir, step)


def _newest_or_best(run_dir, best):
    step, files, _ = newest(run_dir)
    if step is None:
        raise CheckpointError(
            f"no checkpoint in {run_dir / 'checkpoints'}: train one with python -m scripts.base_train"
        )
    return _best(run_dir, step, files) if best else files


def _best(run_dir, step, files):
    """The files of the checkpoint with the best validation bits per byte, which the newest one (`files` of `step`)
    knows.
    """
    try:
        best_step = _state(files)["run"]["best_step"]
    except (KeyError, TypeError):
        best_step = None
    if type(best_step) is not int or best_step < 0:
        raise CheckpointError(f"no checkpoint of {run_dir} is known as its best: it was never evaluated")
    if best_step == step:
        return files
    try:
        return read(run_dir, best_step)
    except CheckpointError as error:
        raise CheckpointError(f"the best checkpoint, of step {best_step}, cannot be used: {error}") from None


def _store(run_dir):
    return Store(run_dir, (MODEL, OPTIMIZER, STATE))


def _tensors(data):
    try:
        return load_tensors(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise _foreign(error) from None


def _state(files):
    try:
        state = json.loads(files[STATE])
    except (ValueError, RecursionError) as error:
        raise _foreign(error) from None
    if not isinstance(state, dict):
        raise _foreign(f"{STATE} is no JSON object")
    return state


def _foreign(problem):
    return CheckpointError(f"a verified file cannot be read ({problem}): was it written by another program?")


def _plain(tensors):
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
