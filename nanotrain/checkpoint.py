"""Checkpoints: their contents, saving, restoring and loading.

    <run>/checkpoints/step_00001000/
        manifest.json                         format, step, size and SHA-256 of every other file, and a hash of all this
        model.safetensors                     weights by name
        optim-00000-of-00001.safetensors      whole tensors by "parameter/state"
        state.json                            everything else: see `CheckpointManager.save` and `RunPlan.record`

store.py writes and verifies the files, so that a checkpoint is never half written or silently corrupt. Tensors are
safetensors and the rest is JSON, never pickle, so that a hostile checkpoint cannot execute code.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from nanotrain import config, guard, hardware, optim, paths
from nanotrain.dataloader import Prefetcher, TrainData
from nanotrain.dist import DistContext
from nanotrain.errors import CheckpointError, DataError, NonFiniteError, UserError
from nanotrain.gpt import CONSTANTS, GPT, GPTConfig
from nanotrain.metrics import MetricLogger
from nanotrain.store import HORIZON, MODEL, OPTIMIZER, STATE, Store
from nanotrain.tokenizer import BPETokenizer
from nanotrain.trainer import TrainState, TrainStep

FAILED_SAVES_LIMIT = 3  # consecutive failed saves that end a run
T = TypeVar("T")
Tensors = dict[str, Tensor]  # tensors by name


def pack(weights: Tensors, moments: Tensors, state: dict) -> dict[str, Callable[[], bytes]]:
    """{file name: function that returns its bytes} of a checkpoint."""
    return {
        MODEL: lambda: tensor_bytes(_contiguous(weights)),
        OPTIMIZER: lambda: tensor_bytes(_contiguous(moments)),
        STATE: lambda: json.dumps(state, indent=1, allow_nan=False).encode(),
    }


def unpack(files: dict[str, bytes]) -> tuple[Tensors, Tensors, dict]:
    """(model tensors, optimizer tensors, state) of verified files. Raises CheckpointError if they cannot be parsed."""
    try:
        model_tensors, optimizer_tensors = load_tensors(files[MODEL]), load_tensors(files[OPTIMIZER])
        state = json.loads(files[STATE])
        if not isinstance(state, dict):
            raise TypeError(f"{STATE} is not a JSON object")
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"the checkpoint is intact but not in nanotrain's format: {error}") from None
    return model_tensors, optimizer_tensors, state


def find_run(name: str = "") -> Path:
    """The folder of the run `name`, or of the most recently saved run. Raises CheckpointError if there is none."""
    if name:
        return paths.run_dir(name)
    runs = paths.base_dir() / "runs"
    saved = [folder for folder in runs.iterdir() if Store(folder).steps()] if runs.is_dir() else []
    if not saved:
        raise CheckpointError(f"no run in {runs}: train one with python -m scripts.base_train")
    return max(saved, key=lambda folder: (folder / "checkpoints").stat().st_mtime)


def load_model(
    run_dir: str | Path, device: str | torch.device = "cpu", best: bool = False, step: int = 0
) -> tuple[GPT, BPETokenizer, dict]:
    """Load (model, tokenizer, meta) from a run's newest valid checkpoint, the one with the best validation bits per
    byte, or that of `step`. The model has float32 weights on `device` and is in evaluation mode.

    meta is the checkpoint's state: step, settings, model_config, val_bpb and so on. Raises CheckpointError (no usable
    checkpoint), DataError (tokenizer missing or not the run's) or UserError (both `best` and `step`).
    """
    run_dir, store = Path(run_dir), Store(run_dir)
    if best and step:
        raise UserError(f"--best and --step={step} are mutually exclusive: give one of them")
    if step and step not in store.steps():
        available = ", ".join(map(str, store.steps())) or "none"
        raise CheckpointError(f"--step={step}: no such checkpoint in {store.folder}; available: {available}")
    tensors, _, meta = unpack(store.read(step)) if step else _newest(run_dir)
    if best:
        best_step = (meta.get("train_state") or {}).get("best_step", -1)
        if best_step < 0:
            raise CheckpointError(f"{run_dir} has no best checkpoint because it was never evaluated: omit --best")
        tensors, _, meta = unpack(store.read(best_step))
    model_config = parsed(GPTConfig, meta.get("model_config"))
    tokenizer = BPETokenizer.load(run_dir)
    if tokenizer.sha256() != meta.get("tokenizer_sha256"):
        raise DataError(f"{run_dir / 'tokenizer.json'} is not the tokenizer this run was trained with")
    model = build_model(model_config, torch.device(device))
    load_weights(model, tensors)
    return model.eval(), tokenizer, meta


def build_model(model_config: GPTConfig, device: str | torch.device) -> GPT:
    """A GPT on `device` with uninitialized memory: call `init_weights` or `load_weights` next."""
    with torch.device("meta"):
        model = GPT(model_config)
    # not to_empty, which imports sympy for a meta tensor
    return model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


def load_weights(model: GPT, tensors: Tensors) -> None:
    """Load weights into a model. Raises CheckpointError that lists missing, unexpected and misshapen tensors."""
    model.init_buffers()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights do not fit this model: {error}") from None


def parsed(kind: type[T], saved: object) -> T:
    """An instance of the dataclass `kind` from saved fields. Raises CheckpointError if they are not valid."""
    types = {found.name: found.type for found in fields(kind)}
    try:
        for name, value in saved.items():
            wrong = types.get(name) in (int, float, bool, str) and type(value) is not types[name]
            if wrong and (types[name], type(value)) != (float, int):
                raise TypeError(f"{name} is {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}")
        return kind(**saved)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint has no valid {kind.__name__}: {error}") from None


@dataclass
class Restored:
    """The contents of the checkpoint that a run resumes from."""

    model_tensors: Tensors
    optimizer_tensors: Tensors
    state: dict
    changed: set[str] = field(default_factory=set)  # names of settings that differ from the checkpoint

    def check(self, data: TrainData, cfg: SimpleNamespace, defaults: dict, identity: tuple, trajectory: tuple) -> None:
        """Set `changed`. Raises DataError if tokenizer or data differ, and UserError if settings in `identity` do, or
        those in `trajectory` that are not in ALLOW_CHANGE. defaults: values of settings newer than the checkpoint.
        """
        if self.state["tokenizer_sha256"] != data.tokenizer.sha256():
            raise DataError("this run was trained with another tokenizer: give its folder with --tokenizer-dir")
        if self.state["data"] != data.fingerprint:
            raise DataError("this run was trained on other data: give their folder with --data-dir")
        was, settings = {**defaults, **self.state["settings"]}, vars(cfg)
        self.changed = {name for name in settings if was[name] != settings[name]}
        may = {name.strip().replace("-", "_").upper() for name in cfg.ALLOW_CHANGE.split(",")}
        lines = []
        for name in (*identity, *trajectory):
            if name in self.changed and (name in identity or name not in may):
                fixed = name in identity
                rule = "cannot change within a run" if fixed else f"allow it with --allow-change={name.lower()}"
                lines.append(f"{config.flag_of(name)} was {was[name]}, is {settings[name]}: {rule}")
        if lines:
            raise UserError("this run was started with other settings:\n  " + "\n  ".join(lines))

    def warn_of_difference(self, environment: dict, dist: DistContext) -> None:
        """Print in one line how this machine and code differ from those that wrote the checkpoint."""
        was = self.state["environment"]
        names = ("packages", "cuda", "device_name", "threads", "world_size", "dtype", "deterministic", "code_sha256")
        different = [f"{n} was {was.get(n)}, is {environment[n]}" for n in names if was.get(n) != environment[n]]
        if different:
            dist.print0(f"warning    same sequences, but results will not be bit-identical: {'; '.join(different)}")

    def load_tensors(self, model: GPT, optimizers: Iterable[optim.ShardedOptimizer]) -> None:
        """Load weights and optimizer state and free the tensors, so that a run does not hold two copies."""
        load_weights(model, self.model_tensors)
        try:
            optim.load_state_tensors(optimizers, self.optimizer_tensors)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint's optimizer state does not fit these settings: {error}") from None
        self.model_tensors = self.optimizer_tensors = {}


class CheckpointManager:
    """The checkpoints of one run. Call `restore`, `claim`, `begin`, and then `save` whenever it is `due`. There is no
    state of a random number generator to save: nothing is drawn after initialization.
    """

    def __init__(self, run_dir: Path, dist: DistContext, save_every: int = 0, keep_last: int = 2, keep_every: int = 0):
        """save_every, keep_every: in steps; 0: never."""
        self.run_dir, self.dist, self.store = run_dir, dist, Store(run_dir)
        self.save_every, self.keep_last, self.keep_every = save_every, keep_last, keep_every
        self.failures, self.resumed_step = 0, None  # failures: consecutive failed saves

    def restore(self, resume: bool) -> Restored | None:
        """The newest valid checkpoint, on every rank; None for a new run, which must not have any yet."""
        files = {}  # on rank 0, which reads them to find the step

        def find():
            if resume:
                step, found, complaints = self.store.newest()
                files.update(found or {})
                return step, complaints
            if steps := self.store.steps():
                found = f"run {self.run_dir.name!r} is already at step {steps[0]}"
                raise UserError(f"{found}: continue with --resume or choose another --run-name")
            return None, []

        self.resumed_step, complaints = self.dist.on_rank0(find)
        for complaint in complaints:
            self.dist.print0(f"not used: {complaint}")
        if self.resumed_step is None:
            return None
        tensors_and_state = self.dist.on_all_ranks(lambda: unpack(files or self.store.read(self.resumed_step)))
        self.dist.print0(f"resume     {self.run_dir.name} at step {self.resumed_step}")
        return Restored(*tensors_and_state)

    def claim(self, tokenizer: BPETokenizer) -> None:
        """Make this process the only writer of the run's folder, and save the tokenizer there."""
        self.owner = self.dist.on_rank0(self.store.claim)
        self.dist.on_rank0(lambda: tokenizer.save(self.run_dir))

    def horizon(self, of: str) -> tuple[dict[str, int], Callable[[dict[str, int]], bool]]:
        """(the saved {step: num_steps} for the same horizon `of`, a function that saves the current one and returns
        whether it could be written).
        """

        def read():
            with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
                found = json.loads((self.run_dir / HORIZON).read_bytes())
                if found["of"] == of:
                    return {step: int(num_steps) for step, num_steps in found["num_steps"].items()}
            return {}

        def keep(chosen):
            with contextlib.suppress(OSError):
                self.store.put(HORIZON, json.dumps({"of": of, "num_steps": chosen}).encode())
                return True
            return False

        return self.dist.on_rank0(read), keep

    def begin(self, state: TrainState, record: dict, metrics: MetricLogger, beat: Callable[[float], None]) -> None:
        """Prepare for saving. `record` goes into every checkpoint."""
        self.record, self.metrics, self.beat, self.saved = record, metrics, beat, replace(state)

    def due(self, state: TrainState, is_final: bool) -> bool:
        """Whether to save: on schedule, at the end, at a new best, or after evaluations that an earlier stop skipped.
        Never twice for the same state, and not before the first step.
        """
        if state.step == self.saved.step:
            return state.step > 0 and state.evals_step != self.saved.evals_step
        scheduled = self.save_every > 0 and state.step % self.save_every == 0
        return scheduled or is_final or state.best_step == state.step

    def save(self, state: TrainState, train_step: TrainStep, batches: Prefetcher, is_final: bool = False) -> None:
        """Save a checkpoint; a collective operation. Raises NonFiniteError for non-finite weights, RunError if they
        differ between ranks, CheckpointError if the final checkpoint or FAILED_SAVES_LIMIT in a row cannot be written.
        """
        self.beat(guard.SLOW_SECONDS)
        guard.check_replicas(self.dist, train_step.parameters, state.step)
        if not all(parameter.isfinite().all() for parameter in train_step.parameters):
            fix = f"lower the rates (--matrix-lr={self.record['recipe']['matrix_lr'] / 2:g})"
            raise NonFiniteError(f"step {state.step}: non-finite weights; the last checkpoint is intact: {fix}")
        state.wandb_id = self.metrics.wandb_id or state.wandb_id  # a sweep chooses its own
        found = {
            "step": state.step,
            "val_bpb": state.val_bpb if state.evaluated_step == state.step else None,
            "train_state": {**asdict(state), "seconds": state.seconds + hardware.seconds_since_start()},
            "loader": batches.state(self.dist),
            **train_step.state(),
            **self.record,
        }
        hardware.give_back_freed_memory()  # each file is assembled in memory
        weights, moments = train_step.model.state_dict(), optim.state_tensors(train_step.optimizers, self.dist)
        failure = self.dist.on_rank0(lambda: self._write(state, weights, moments, found))
        if not failure:
            self.failures, self.saved = 0, replace(state)
            self.metrics.event(f"step {state.step}: checkpoint saved")
            return
        self.failures += 1
        state.best_bpb, state.best_step = self.saved.best_bpb, self.saved.best_step  # the best must be on disk
        if is_final or self.failures == FAILED_SAVES_LIMIT:
            which = "the last checkpoint" if is_final else f"{self.failures} checkpoints in a row"
            raise CheckpointError(f"{which} could not be written: {failure}: {self.run_dir}; older ones are intact")
        self.metrics.event(f"step {state.step}: the checkpoint could not be written ({failure}); training continues")

    def save_then_raise(self, state: TrainState, train_step: TrainStep, batches: Prefetcher) -> None:
        """After a data error, save the finished steps, then raise the error on all ranks."""
        if self.due(state, is_final=True):
            self.save(state, train_step, batches)
        raise next(filter(None, self.dist.all_gather_objects(batches.error)))

    def _write(self, state, weights, moments, found):
        """Write the checkpoint; return why that failed (such as a full disk), or ""."""
        try:
            self.store.commit(state.step, pack(weights, moments, found), self.owner)
        except OSError as error:
            return error.strerror or str(error)
        with contextlib.suppress(OSError):  # saved; the next save tries again to remove old checkpoints
            self.store.clean(self.keep_last, self.keep_every, state.best_step, self.resumed_step, self.owner)
        return ""


def load_first_weights(
    dist: DistContext, source: str, model_config: GPTConfig, tokenizer: BPETokenizer
) -> tuple[Tensors, GPTConfig]:
    """(weights, configuration) of the run `source`, to initialize a new run with the same tokenizer and shape."""
    run_dir = dist.on_rank0(lambda: find_run(source))

    def load():
        tensors, _, state = _newest(run_dir)
        if state.get("tokenizer_sha256") != tokenizer.sha256():
            raise DataError(f"--init-from={source} has another tokenizer: use it with --tokenizer-dir={run_dir}")
        own, found = asdict(model_config), parsed(GPTConfig, state.get("model_config"))
        other = {name: value for name, value in asdict(found).items() if name not in CONSTANTS and own[name] != value}
        if other:
            shape = ", ".join(f"{name} {value}" for name, value in other.items())
            raise UserError(f"--init-from={source} has another shape: {shape}; use the settings it was trained with")
        dist.print0(f"weights    from {source} at step {state['step']}")
        return tensors, found

    return dist.on_all_ranks(load)


def _newest(run_dir):
    step, files, _ = Store(run_dir).newest()
    if step is None:
        raise CheckpointError(f"no checkpoint in {run_dir}: train one with python -m scripts.base_train")
    return unpack(files)


def _contiguous(tensors):
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
