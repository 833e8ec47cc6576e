"""Checkpoints that cannot be half written, silently wrong or hostile.

    <run>/checkpoints/step_00001000/
        manifest.json                         format, step, size and SHA-256 of every other file, and a hash of all that
        model.safetensors                     the weights by name, and nothing else
        optim-00000-of-00001.safetensors      "parameter/state" -> whole tensors
        state.json                            everything else: see `CheckpointManager.save` and `RunPlan.record`

How they are written and verified is in store.py; what is in them is here. There is no pickle: tensors are safetensors,
the rest is JSON.
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

FAILED_SAVES_LIMIT = 3  # consecutive ones that end a run
T = TypeVar("T")
Tensors = dict[str, Tensor]  # by name


def pack(weights: Tensors, moments: Tensors, state: dict) -> dict[str, Callable[[], bytes]]:
    """{file name: function that gives its bytes} of a checkpoint."""
    return {
        MODEL: lambda: tensor_bytes(_plain(weights)),
        OPTIMIZER: lambda: tensor_bytes(_plain(moments)),
        STATE: lambda: json.dumps(state, indent=1, allow_nan=False).encode(),
    }


def unpack(files: dict[str, bytes]) -> tuple[Tensors, Tensors, dict]:
    """(model tensors, optimizer tensors, state) of verified files. Raises CheckpointError if they are no checkpoint."""
    try:
        model_tensors, optimizer_tensors = load_tensors(files[MODEL]), load_tensors(files[OPTIMIZER])
        state = json.loads(files[STATE])
        if not isinstance(state, dict):
            raise TypeError(f"{STATE} is no JSON object")
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"a verified file of another program cannot be read: {error}") from None
    return model_tensors, optimizer_tensors, state


def find_run(name: str = "") -> Path:
    """The folder of the run `name`, or of the one saved last."""
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
    """(model, tokenizer, meta) of the newest checkpoint of a run that verifies, of the one with the best validation
    bits per byte, or of the one after `step` steps: float32 weights on `device`, in evaluation mode.

    meta is the checkpoint's state: step, settings, model_config, val_bpb and so on. Raises CheckpointError (none can
    be used), DataError (the tokenizer is missing or not that of the run) or UserError (both `best` and `step`).
    """
    run_dir, store = Path(run_dir), Store(run_dir)
    if best and step:
        raise UserError(f"--best and --step={step}: two checkpoints; give one of them")
    if step and step not in store.steps():
        there = ", ".join(map(str, store.steps())) or "none"
        raise CheckpointError(f"--step={step}: no such checkpoint in {store.folder}; there: {there}")
    tensors, _, meta = unpack(store.read(step)) if step else _newest(run_dir)
    if best:
        best_step = (meta.get("train_state") or {}).get("best_step", -1)
        if best_step < 0:
            raise CheckpointError(f"no checkpoint of {run_dir} is known as its best: it was never evaluated")
        tensors, _, meta = unpack(store.read(best_step))
    model_config = parsed(GPTConfig, meta.get("model_config"))
    tokenizer = BPETokenizer.load(run_dir)
    if tokenizer.sha256() != meta.get("tokenizer_sha256"):
        raise DataError(f"{run_dir / 'tokenizer.json'} is not the tokenizer this run was trained with")
    model = build_model(model_config, torch.device(device))
    load_weights(model, tensors)
    return model.eval(), tokenizer, meta


def build_model(model_config: GPTConfig, device: str | torch.device) -> GPT:
    """A GPT on `device` whose memory is not set yet: `init_weights` or `load_weights` comes next."""
    with torch.device("meta"):
        model = GPT(model_config)
    return model.to_empty(device=device)


def load_weights(model: GPT, tensors: Tensors) -> None:
    """Fill a model. Raises CheckpointError that lists what is missing, extra or misshapen."""
    model.init_buffers()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights are not those of this model: {error}") from None


def parsed(kind: type[T], saved: object) -> T:
    """The dataclass `kind` of the fields that a checkpoint holds. Raises CheckpointError if they are not valid."""
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
        raise CheckpointError(f"a checkpoint holds no valid {kind.__name__}: {error}") from None


@dataclass
class Restored:
    """A checkpoint that a run goes on from."""

    model_tensors: Tensors
    optimizer_tensors: Tensors
    state: dict
    changed: set[str] = field(default_factory=set)  # settings that are other than in the checkpoint

    def check(self, data: TrainData, cfg: SimpleNamespace, defaults: dict, identity: tuple, trajectory: tuple) -> None:
        """Find `changed`. Raises DataError if tokenizer or data differ, and UserError if settings do that may not: of
        `identity` none may, of `trajectory` those in ALLOW_CHANGE. defaults: of settings newer than the checkpoint.
        """
        if self.state["tokenizer_sha256"] != data.tokenizer.sha256():
            raise DataError("the tokenizer is not that of this run: give its folder with --tokenizer-dir")
        if self.state["data"] != data.fingerprint:
            raise DataError("the data are not those of this run: give their folder with --data-dir")
        was, settings = {**defaults, **self.state["settings"]}, vars(cfg)
        self.changed = {name for name in settings if was[name] != settings[name]}
        may = {name.strip().replace("-", "_").upper() for name in cfg.ALLOW_CHANGE.split(",")}
        lines = []
        for name in (*identity, *trajectory):
            if name in self.changed and (name in identity or name not in may):
                fixed = name in identity
                rule = "it cannot change within a run" if fixed else f"allow it with --allow-change={name.lower()}"
                lines.append(f"{config.flag_of(name)} was {was[name]}, is {settings[name]}: {rule}")
        if lines:
            raise UserError("this run was started with other settings:\n  " + "\n  ".join(lines))

    def warn_of_difference(self, environment: dict, dist: DistContext) -> None:
        """Say in one line what differs from the machine on which the checkpoint was written."""
        was = self.state["environment"]
        names = ("packages", "cuda", "device_name", "threads", "world_size", "dtype", "deterministic", "code_sha256")
        different = [f"{n} was {was.get(n)}, is {environment[n]}" for n in names if was.get(n) != environment[n]]
        if different:
            dist.print0(f"warning    the same sequences, but not to the same bits: {'; '.join(different)}")

    def load_tensors(self, model: GPT, optimizers: Iterable[optim.ShardedOptimizer]) -> None:
        """Load weights and optimizer state, and let go of the tensors: a run must not hold two copies of them."""
        load_weights(model, self.model_tensors)
        try:
            optim.load_state_tensors(optimizers, self.optimizer_tensors)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint's optimizer state is not that of these settings: {error}") from None
        self.model_tensors = self.optimizer_tensors = {}


class CheckpointManager:
    """The checkpoints of one run. Call `restore`, then `claim`, then `begin`, then `save` as often as it is due. A few
    that cannot be written do not end the run.

    There is no state of a random number generator: after initialization nothing is drawn.
    """

    def __init__(self, run_dir: Path, dist: DistContext, save_every: int = 0, keep_last: int = 2, keep_every: int = 0):
        """save_every, keep_every: steps; 0: never."""
        self.run_dir, self.dist, self.store = run_dir, dist, Store(run_dir)
        self.save_every, self.keep_last, self.keep_every = save_every, keep_last, keep_every
        self.failures, self.resumed_step = 0, None  # failures: consecutive

    def restore(self, resume: bool) -> Restored | None:
        """The newest checkpoint that verifies, on every rank; None for a new run, which must have no checkpoint."""
        files = {}  # of rank 0, which has read them to find the step

        def find():
            if resume:
                step, found, complaints = self.store.newest()
                files.update(found or {})
                return step, complaints
            if there := self.store.steps():
                begun = f"run {self.run_dir.name!r} is already at step {there[0]}"
                raise UserError(f"{begun}: go on with --resume, or choose another --run-name")
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
        """Make this process the one that writes to the run's folder, and put the tokenizer there."""
        self.owner = self.dist.on_rank0(self.store.claim)
        self.dist.on_rank0(lambda: tokenizer.save(self.run_dir))

    def horizon(self, of: str) -> tuple[dict[str, int], Callable[[dict[str, int]], bool]]:
        """({step: num_steps} that earlier processes chose for a horizon `of` the same; a function that keeps what is
        chosen now, and returns whether it could be written).
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
        """Get ready to save: `record` goes into every checkpoint."""
        self.record, self.metrics, self.beat, self.saved = record, metrics, beat, replace(state)

    def due(self, state: TrainState, is_final: bool) -> bool:
        """Whether to save: on schedule, at the end, if it is the best, or if evaluations that a stop had left out were
        made up. Never twice for the same state, and not before the first step.
        """
        if state.step == self.saved.step:
            return state.step > 0 and state.evals_step != self.saved.evals_step
        scheduled = self.save_every > 0 and state.step % self.save_every == 0
        return scheduled or is_final or state.best_step == state.step

    def save(self, state: TrainState, train_step: TrainStep, batches: Prefetcher, is_final: bool = False) -> None:
        """Save on all ranks at once. Raises NonFiniteError or RunError if the weights are not what they should be, and
        CheckpointError if it cannot be written and is the final one, or one too many in a row.
        """
        self.beat(guard.SLOW_SECONDS)
        guard.check_replicas(self.dist, train_step.parameters, state.step)
        if not all(parameter.isfinite().all() for parameter in train_step.parameters):
            fix = f"lower the rates (--matrix-lr={self.record['recipe']['matrix_lr'] / 2:g})"
            raise NonFiniteError(f"step {state.step}: the weights are not finite; the last checkpoint is intact: {fix}")
        state.wandb_id = self.metrics.wandb_id or state.wandb_id  # which a sweep chooses itself
        found = {
            "step": state.step,
            "val_bpb": state.val_bpb if state.evaluated_step == state.step else None,
            "train_state": {**asdict(state), "seconds": state.seconds + hardware.seconds_since_start()},
            "loader": batches.state(self.dist),
            **train_step.state(),
            **self.record,
        }
        hardware.give_back_freed_memory()  # a file is put together in memory
        weights, moments = train_step.model.state_dict(), optim.state_tensors(train_step.optimizers, self.dist)
        failure = self.dist.on_rank0(lambda: self._write(state, weights, moments, found))
        if not failure:
            self.failures, self.saved = 0, replace(state)
            self.metrics.event(f"step {state.step}: checkpoint saved")
            return
        self.failures += 1
        state.best_bpb, state.best_step = self.saved.best_bpb, self.saved.best_step  # one that can be loaded
        if is_final or self.failures == FAILED_SAVES_LIMIT:
            which = "the last checkpoint" if is_final else f"{self.failures} checkpoints in a row"
            raise CheckpointError(f"{which} could not be written: {failure}: {self.run_dir}. Older ones are intact")
        self.metrics.event(f"step {state.step}: the checkpoint could not be written ({failure}); training goes on")

    def save_then_raise(self, state: TrainState, train_step: TrainStep, batches: Prefetcher) -> None:
        """Save the finished steps after an error of the data, then raise it on all ranks."""
        if self.due(state, is_final=True):
            self.save(state, train_step, batches)
        raise next(filter(None, self.dist.all_gather_objects(batches.error)))

    def _write(self, state, weights, moments, found):
        """Why it could not be written, as on a full disk; empty if it was."""
        try:
            self.store.commit(state.step, pack(weights, moments, found), self.owner)
        except OSError as error:
            return error.strerror or str(error)
        with contextlib.suppress(OSError):  # it is saved; what could not be removed is removed at the next save
            self.store.clean(self.keep_last, self.keep_every, state.best_step, self.resumed_step, self.owner)
        return ""


def load_first_weights(
    dist: DistContext, source: str, model_config: GPTConfig, tokenizer: BPETokenizer
) -> tuple[Tensors, GPTConfig]:
    """(weights, configuration) of the run `source`, for a new run of the same tokenizer and shape to begin with."""
    run_dir = dist.on_rank0(lambda: find_run(source))

    def load():
        tensors, _, state = _newest(run_dir)
        if state.get("tokenizer_sha256") != tokenizer.sha256():
            raise DataError(f"--init-from={source} has another tokenizer: give its own, --tokenizer-dir={run_dir}")
        own, found = asdict(model_config), parsed(GPTConfig, state.get("model_config"))
        other = {name: value for name, value in asdict(found).items() if name not in CONSTANTS and own[name] != value}
        if other:
            shape = ", ".join(f"{name} {value}" for name, value in other.items())
            raise UserError(f"--init-from={source} has another shape: {shape}; use the settings it was trained with")
        dist.print0(f"weights    of {source} at step {state['step']}")
        return tensors, found

    return dist.on_all_ranks(load)


def _newest(run_dir):
    step, files, _ = Store(run_dir).newest()
    if step is None:
        raise CheckpointError(f"no checkpoint in {run_dir}: train one with python -m scripts.base_train")
    return unpack(files)


def _plain(tensors):
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
