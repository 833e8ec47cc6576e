"""Checkpoints that cannot be half written, silently wrong or hostile.

    <run>/checkpoints/step_00001000/
        manifest.json                         format, step, size and SHA-256 of every other file, and a hash of all that
        model.safetensors                     the weights by name, and nothing else
        optim-00000-of-00001.safetensors      "parameter/state" -> whole tensors
        state.json                            everything else: step, settings, loader, horizon, fingerprints

A checkpoint is written to a temporary folder, every file hashed and synced, the manifest last; then the folder is
renamed. A folder is a checkpoint only if its manifest and all that it lists verify. There is no pickle: tensors are
safetensors, the rest is JSON.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes

from nanotrain import paths
from nanotrain.errors import CheckpointError, DataError
from nanotrain.gpt import GPT, GPTConfig
from nanotrain.tokenizer import BPETokenizer

FORMAT = 1
STEP_NAME = re.compile(r"step_(\d{8})")
MANIFEST, MODEL, STATE = "manifest.json", "model.safetensors", "state.json"
OPTIMIZER = "optim-00000-of-00001.safetensors"
FILES = {MODEL, OPTIMIZER, STATE}


def save(run_dir, step, model_tensors, optimizer_tensors, state):
    """Write the checkpoint of `step`: tensors by name (float32 weights, whole optimizer state) and `state`, a
    JSON-like dict.

    It is there as a whole or not at all, whatever happens. A full disk raises OSError and leaves nothing behind.
    """
    folder = Path(run_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:08d}"
    temporary = folder / f".tmp-{final.name}-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        contents = {
            MODEL: tensor_bytes(_plain(model_tensors)),
            OPTIMIZER: tensor_bytes(_plain(optimizer_tensors)),
            STATE: json.dumps(state, indent=1, allow_nan=False).encode(),
        }
        files = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()
        }
        manifest = {"format": FORMAT, "step": step, "files": files}
        contents[MANIFEST] = json.dumps({**manifest, "sha256": _hash_of(manifest)}, indent=1).encode()
        for name, data in contents.items():
            _write_synced(temporary / name, data)
        _sync_folder(temporary)
        if final.exists():  # one that did not verify, or the same step again
            final.rename(folder / f".bad-{final.name}-{uuid.uuid4().hex}")
        temporary.rename(final)
        _sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def steps(run_dir):
    """The steps of the checkpoint folders of a run, newest first, verified or not."""
    folder = Path(run_dir) / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]) for name in names if (match := STEP_NAME.fullmatch(name))), reverse=True)


def read(run_dir, step):
    """{file name: bytes} of the checkpoint of `step`, every byte verified. Raises CheckpointError that says what is
    wrong.
    """
    folder = Path(run_dir) / "checkpoints" / f"step_{step:08d}"
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        claimed = manifest.pop("sha256")
        if claimed != _hash_of(manifest):
            raise CheckpointError(f"{folder}: {MANIFEST} does not match its own hash")
        if manifest["format"] != FORMAT or manifest["step"] != step or set(manifest["files"]) != FILES:
            raise CheckpointError(f"{folder}: {MANIFEST} is not of format {FORMAT} and step {step}")
        contents = {}
        for name in FILES:
            contents[name] = (folder / name).read_bytes()
            if hashlib.sha256(contents[name]).hexdigest() != manifest["files"][name]["sha256"]:
                raise CheckpointError(f"{folder}: {name} does not match its hash")
        return contents
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {type(error).__name__}: {error}") from None


def newest(run_dir):
    """(step, files, complaints): the newest checkpoint that verifies, and why newer ones were rejected; (None, None,
    []) if there is none.

    Raises CheckpointError if there are checkpoints and none of them verifies.
    """
    complaints = []
    for step in steps(run_dir):
        try:
            return step, read(run_dir, step), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    if complaints:
        raise CheckpointError(f"no checkpoint of {run_dir} can be used: " + "; ".join(complaints))
    return None, None, []


def unpack(files):
    """(model tensors, optimizer tensors, state) of the verified files of a checkpoint."""
    try:
        return load_tensors(files[MODEL]), load_tensors(files[OPTIMIZER]), json.loads(files[STATE])
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"a verified file cannot be read ({error}): was it written by another program?") from None


def clean(run_dir, keep_last, keep_every, best_step, resumed_step):
    """Remove temporary folders and old checkpoints: keep the newest `keep_last`, every `keep_every`-th, the best, the
    one resumed from.

    The one resumed from may go only when two newer ones are there. Only ones that verify count as newest.
    """
    folder = Path(run_dir) / "checkpoints"
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    known = steps(run_dir)
    # only as many are read as the rules need: the others may be many, and large
    good = list(itertools.islice((step for step in known if _verifies(run_dir, step)), max(keep_last, 2)))
    newest_good = good[: max(keep_last, 1)]
    newer = [step for step in good if resumed_step is not None and step > resumed_step]
    for step in known:
        kept = step in newest_good or step == best_step or (keep_every and step % keep_every == 0)
        if kept or not newest_good or (step == resumed_step and len(newer) < 2):
            continue
        doomed = folder / f"step_{step:08d}"
        trash = folder / f".tmp-trash-{step:08d}-{uuid.uuid4().hex}"
        doomed.rename(trash)  # first, so that no reader meets half a checkpoint
        shutil.rmtree(trash, ignore_errors=True)


def find_run(name=""):
    """The folder of the run `name`, or of the run that was saved last. Raises CheckpointError if there is none."""
    if name:
        return paths.run_dir(name)
    runs = paths.base_dir() / "runs"
    saved = [folder for folder in runs.iterdir() if steps(folder)] if runs.is_dir() else []
    if not saved:
        raise CheckpointError(f"no run in {runs}: train one with python -m scripts.base_train")
    return max(saved, key=lambda folder: (folder / "checkpoints").stat().st_mtime)


def load_model(run_dir, device="cpu"):
    """(model, tokenizer, meta) of the newest checkpoint of a run that verifies: float32 weights on `device`, in
    evaluation mode.

    meta is the checkpoint's state: step, settings, model_config, val_bpb and so on. Raises CheckpointError (none can
    be used) or DataError (the tokenizer is missing or not that of the run).
    """
    run_dir = Path(run_dir)
    step, files, _ = newest(run_dir)
    if step is None:
        raise CheckpointError(
            f"no checkpoint in {run_dir / 'checkpoints'}: train one with python -m scripts.base_train"
        )
    tensors, _, meta = unpack(files)
    tokenizer = BPETokenizer.load(run_dir)
    if tokenizer.sha256() != meta["tokenizer_sha256"]:
        raise DataError(f"{run_dir / 'tokenizer.json'} is not the tokenizer this run was trained with")
    model = build_model(GPTConfig(**meta["model_config"]), torch.device(device))
    load_weights(model, tensors)
    return model.eval(), tokenizer, meta


def build_model(config, device):
    """A GPT on `device` whose memory is not set yet: `init_weights` or `load_weights` comes next."""
    with torch.device("meta"):
        model = GPT(config)
    return model.to_empty(device=device)


def load_weights(model, tensors):
    """Fill a model from {name: tensor}. Raises CheckpointError that lists what is missing, extra or misshapen."""
    own = model.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if wrong:
        raise CheckpointError(f"the checkpoint's weights are not those of this model: {', '.join(wrong[:5])}")
    model.init_weights(0)  # for the buffers, which a checkpoint does not hold
    model.load_state_dict(tensors)


def _verifies(run_dir, step):
    try:
        read(run_dir, step)
        return True
    except CheckpointError:
        return False


def _plain(tensors):
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _hash_of(fields):
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _write_synced(path, data):
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path):
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
