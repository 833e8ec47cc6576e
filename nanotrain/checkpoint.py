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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from nanotrain import config, guard, hardware, optim, paths
from nanotrain.dist import DistContext
from nanotrain.errors import CheckpointError, DataError, NonFiniteError, UserError
from nanotrain.gpt import CONSTANTS, GPT, GPTConfig
from nanotrain.metrics import WANDB_PREFIX, MetricLogger, fetch_artifact
from nanotrain.store import Store
from nanotrain.tokenizer import BPETokenizer

if TYPE_CHECKING:
    from nanotrain.dataloader import Prefetcher, TrainData
    from nanotrain.trainer import TrainState, TrainStep

FAILED_SAVES_LIMIT = 3  # consecutive ones that end a run
MODEL, OPTIMIZER, STATE = "model.safetensors", "optim-00000-of-00001.safetensors", "state.json"
NEEDED = (  # in state.json, for a resume
    "step", "train_state", "loader", "updates", "scaler", "model_config", "recipe", "total_batch_size",
    "tokenizer_sha256", "data", "environment", "settings",
)  # fmt: skip
T = TypeVar("T")
OTHER_BYTES = 1 << 20  # more than all of a checkpoint that is not the elements of tensors


def save(
    run_dir: Path,
    step: int,
    model_tensors: Mapping[str, Tensor],
    optimizer_tensors: Mapping[str, Tensor],
    state: dict,
    owner: str | None = None,
) -> Path:
    """Write the checkpoint of `step`: tensors by name (float32 weights, whole optimizer state) and `state`, a
    JSON-like dict. Returns its folder.

    It is there as a whole or not at all, whatever happens, and one serialized file is in memory at a time. A full disk
    raises OSError and leaves nothing behind; so does SupersededError, if the run is no longer that of `owner` (an id
    from `Store.claim`; None does not ask).
    """
    files = {
        MODEL: lambda: tensor_bytes(_plain(model_tensors)),
        OPTIMIZER: lambda: tensor_bytes(_plain(optimizer_tensors)),
        STATE: lambda: json.dumps(state, indent=1, allow_nan=False).encode(),
    }
    size = sum(tensor.nbytes for tensors in (model_tensors, optimizer_tensors) for tensor in tensors.values())
    return _store(run_dir).commit(step, files, size + OTHER_BYTES, owner)


def steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints of a run, newest first, verified or not."""
    return _store(run_dir).steps()


def read(run_dir: Path, step: int) -> dict[str, bytes]:
    """{file name: bytes} of the checkpoint of `step`, every byte verified. Raises CheckpointError that says what is
    wrong.
    """
    return _store(run_dir).read(step)


def newest(run_dir: Path) -> tuple[int | None, dict[str, bytes] | None, list[str]]:
    """(step, files, complaints): the newest checkpoint that verifies, and why newer ones were rejected; (None, None,
    []) if there is none.

    Raises CheckpointError if there are checkpoints and none of them verifies.
    """
    return _store(run_dir).newest()


def unpack(files: dict[str, bytes]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """(model tensors, optimizer tensors, state) of the verified files of a checkpoint.

    Raises CheckpointError if another program wrote them and they are not what they should be.
    """
    return _tensors(files[MODEL]), _tensors(files[OPTIMIZER]), _state(files)


def check_choice(best: bool, step: int) -> None:
    """Raise UserError if --best and --step contradict each other, or the step is negative."""
    if step < 0:
        raise UserError(f"--step={step}: at least 0")
    if best and step:
        raise UserError(f"--best and --step={step}: two checkpoints; give one of them")


def find_run(name: str = "") -> Path:
    """The folder of the run `name`, or of the run that was saved last; `wandb:ENTITY/PROJECT/NAME:ALIAS` is an artifact
    of one, which is fetched. Raises CheckpointError if there is none.
    """
    if name.startswith(WANDB_PREFIX):
        return fetch_artifact(name, paths.artifacts_dir())
    if name:
        return paths.run_dir(name)
    runs = paths.base_dir() / "runs"
    saved = [folder for folder in runs.iterdir() if steps(folder)] if runs.is_dir() else []
    if not saved:
        raise CheckpointError(f"no run in {runs}: train one with python -m scripts.base_train")
    return max(saved, key=lambda folder: (folder / "checkpoints").stat().st_mtime)


def load_model(
    run_dir: str | Path, device: str | torch.device = "cpu", best: bool = False, step: int = 0
) -> tuple[GPT, BPETokenizer, dict]:
    """(model, tokenizer, meta) of the newest checkpoint of a run that verifies, of the one with the best validation
    bits per byte, or of the one after `step` steps: float32 weights on `device`, in evaluation mode.

    meta is the checkpoint's state: step, settings, model_config, val_bpb and so on. Raises CheckpointError (none can
    be used) or DataError (the tokenizer is missing or not that of the run).
    """
    run_dir = Path(run_dir)
    files = _chosen(run_dir, step) if step else _newest_or_best(run_dir, best)
    tensors, _, meta = unpack(files)
    if not {"model_config", "tokenizer_sha256"} <= meta.keys():
        raise CheckpointError(f"a checkpoint of {run_dir} lacks what a model needs: model_config or tokenizer_sha256")
    model_config, tokenizer_sha256 = parsed(GPTConfig, meta["model_config"]), meta["tokenizer_sha256"]
    tokenizer = BPETokenizer.load(run_dir)
    if tokenizer.sha256() != tokenizer_sha256:
        raise DataError(f"{run_dir / 'tokenizer.json'} is not the tokenizer this run was trained with")
    model = build_model(model_config, torch.device(device))
    load_weights(model, tensors)
    return model.eval(), tokenizer, meta


def build_model(model_config: GPTConfig, device: str | torch.device) -> GPT:
    """A GPT on `device` whose memory is not set yet: `init_weights` or `load_weights` comes next."""
    with torch.device("meta"):
        model = GPT(model_config)
    return model.to_empty(device=device)


def load_weights(model: GPT, tensors: Mapping[str, Tensor]) -> None:
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


def parsed(kind: type[T], saved: object) -> T:
    """The dataclass `kind` of the fields that a checkpoint holds. Raises CheckpointError if they are not of its types,
    not finite, or refused by it.
    """
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


def checked(state: dict, step: int) -> dict:
    """`state` itself if it has all that a resume needs and is that of `step`; raises CheckpointError if not."""
    lacking = [name for name in NEEDED if name not in state]
    if lacking or state["step"] != step:
        raise CheckpointError(f"the state of step {step} is not one to go on from: {', '.join(lacking) or 'its step'}")
    return state


@dataclass
class Restored:
    """A checkpoint that a run goes on from."""

    state: dict
    model_tensors: dict[str, Tensor]
    optimizer_tensors: dict[str, Tensor]
    changed: set[str] = field(default_factory=set)  # settings that are other than in the checkpoint

    def check(
        self,
        data: "TrainData",
        settings: dict,
        defaults: dict,
        identity: Sequence[str],
        trajectory: Sequence[str],
        allowed: str,
    ) -> None:
        """Find `changed`. Raises an error with a readable difference if tokenizer or data differ, or settings that may
        not.

        settings: {name: value}. defaults: of those that are newer than the checkpoint. identity: names of those that
        cannot change within a run; trajectory: of those that can if `allowed`, names separated by commas, has them. All
        others may change.
        """
        was = {**defaults, **self.state["settings"]}
        if self.state["tokenizer_sha256"] != data.tokenizer.sha256():
            raise DataError(
                "the tokenizer is not the one this run was trained with: give --tokenizer-dir (the run's folder has "
                "a copy), or start another run with --run-name"
            )
        if self.state["data"] != data.fingerprint:
            raise DataError(
                "the data are not those this run was trained with: give their folder with --data-dir, or start another "
                "run with --run-name"
            )
        self.changed = {name for name in settings if was[name] != settings[name]}
        may = {name.strip().replace("-", "_").upper() for name in allowed.split(",")}
        lines = []
        for name in (*identity, *trajectory):
            if name in self.changed and (name in identity or name not in may):
                what = f"{config.flag_of(name)} was {was[name]}, is {settings[name]}"
                allow = f"allow it with --allow-change={name.lower()}"
                lines.append(f"{what}: {'it cannot change within a run' if name in identity else allow}")
        if lines:
            raise UserError("this run was started with other settings:\n  " + "\n  ".join(lines))

    def warn_of_difference(self, environment: dict, dist: DistContext) -> None:
        """Say in one line what differs from the machine on which the checkpoint was written."""
        was = self.state["environment"]
        names = ("packages", "cuda", "device_name", "threads", "world_size", "dtype", "deterministic")
        different = [f"{n} was {was.get(n)}, is {environment[n]}" for n in names if was.get(n) != environment[n]]
        if different:
            what = "the same sequences, but not to the same bits"
            dist.print0(f"warning    the run goes on with {what}: {'; '.join(different)}")

    def load_tensors(self, model: GPT, optimizers: Iterable[optim.ShardedOptimizer]) -> None:
        """Load weights and optimizer state, and let go of the tensors: a run must not hold two copies of them."""
        load_weights(model, self.model_tensors)
        try:
            optim.load_state_tensors(optimizers, self.optimizer_tensors)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint's optimizer state is not that of these settings: {error}") from None
        self.model_tensors = self.optimizer_tensors = {}


class CheckpointManager:
    """The checkpoints of one run: which to go on from, when to save, what to save, which to keep. A few that cannot be
    written do not end the run. Call `restore`, then `claim`, then `begin`, then `save` as often as it is due.

    There is no state of a random number generator: after initialization nothing is drawn.
    """

    def __init__(self, run_dir: Path, dist: DistContext, save_every: int = 0, keep_last: int = 2, keep_every: int = 0):
        """save_every, keep_every: steps; 0: never."""
        self.run_dir, self.dist, self.store = run_dir, dist, _store(run_dir)
        self.save_every, self.keep_last, self.keep_every = save_every, keep_last, keep_every
        self.resumed_step = None
        self.failures = 0  # consecutive
        self.saved = 0, -1  # step and evals_step of the newest one

    def restore(self, resume: bool) -> Restored | None:
        """The newest checkpoint that verifies, on every rank; None for a new run. Raises UserError if there is a
        checkpoint and `resume` is False.
        """
        files_of_rank0 = {}

        def find():
            if resume:
                step, files_of_rank0["files"], complaints = self.store.newest()
                return step, complaints
            if there := self.store.steps():
                raise UserError(
                    f"run {self.run_dir.name!r} is already at step {there[0]}: go on with --resume, or choose another "
                    "--run-name"
                )
            return None, []

        step, complaints = self.dist.on_rank0(find)
        for complaint in complaints:
            self.dist.print0(f"not used: {complaint}")
        if step is None:
            return None
        model_tensors, optimizer_tensors, state = self.dist.on_all_ranks(
            lambda: unpack(files_of_rank0.pop("files", None) or self.store.read(step))
        )
        self.dist.print0(f"resume     {self.run_dir.name} at step {step}")
        self.resumed_step = step
        return Restored(checked(state, step), model_tensors, optimizer_tensors)

    def claim(self, tokenizer: BPETokenizer) -> None:
        """Make this process the one that writes to the run's folder, and put the tokenizer there."""
        self.owner = self.dist.on_rank0(self.store.claim)
        self.dist.on_rank0(lambda: tokenizer.save(self.run_dir))

    def begin(self, state: "TrainState", record: dict, metrics: MetricLogger, beat: Callable[[float], None]) -> None:
        """Get ready to save. `record` goes into every checkpoint; `beat` is the watchdog's."""
        self.record, self.metrics, self.beat = record, metrics, beat
        self.saved_best = state.best_bpb, state.best_step
        if self.resumed_step is not None:
            self.saved = state.step, state.evals_step

    def due(self, state: "TrainState", is_final: bool) -> bool:
        """Whether to save after this step: on schedule, at the end, if it is the best, and if evaluations that a stop
        had left out were made up. Never twice for the same state, and not before the first step.
        """
        saved_step, saved_evals_step = self.saved
        if state.step == saved_step:
            return state.step > 0 and state.evals_step != saved_evals_step
        scheduled = self.save_every > 0 and state.step % self.save_every == 0
        return scheduled or is_final or state.best_step == state.step

    def save(self, state: "TrainState", train_step: "TrainStep", batches: "Prefetcher", is_final: bool = False) -> None:
        """Save on all ranks at once. Raises NonFiniteError or RankError and saves nothing if the weights are not
        what they should be, and CheckpointError if it cannot be written and is the final one, or one too many in a row.
        """
        self.beat(guard.SLOW_SECONDS)
        guard.check_replicas(self.dist, train_step.parameters, state.step)
        if not all(parameter.isfinite().all() for parameter in train_step.parameters):
            raise NonFiniteError(
                f"step {state.step}: the weights are not finite and were not saved; the last checkpoint is intact. "
                f"{guard.lower_rates(self.record['recipe']['matrix_lr'])}"
            )
        seconds = state.seconds + hardware.seconds_since_start()
        state.wandb_id = self.metrics.wandb_id or state.wandb_id  # which a sweep chooses itself
        found = {
            "step": state.step,
            "val_bpb": state.val_bpb if state.evaluated_step == state.step else None,
            "train_state": {**asdict(state), "seconds": seconds},
            "loader": batches.state(self.dist),
            **train_step.state(),
            **self.record,
        }
        hardware.give_back_freed_memory()  # a file is put together in memory
        weights, moments = train_step.model.state_dict(), optim.state_tensors(train_step.optimizers, self.dist)
        failure, is_there = self.dist.on_rank0(lambda: self._write(state, weights, moments, found))
        self.failures = self.failures + 1 if failure else 0
        if failure and (is_final or self.failures == FAILED_SAVES_LIMIT):
            which = "the last checkpoint" if is_final else f"{self.failures} checkpoints in a row"
            raise CheckpointError(f"{which} could not be written: {failure}: {self.run_dir}. Older ones are intact")
        if is_there:
            self.saved_best = state.best_bpb, state.best_step
        state.best_bpb, state.best_step = self.saved_best  # one that can be loaded
        if not failure:
            self.saved = state.step, state.evals_step
        outcome = f"could not be written ({failure}); training goes on" if failure else "saved"
        self.metrics.event(f"step {state.step}: {'the ' if failure else ''}checkpoint {outcome}")

    def save_then_raise(self, state: "TrainState", train_step: "TrainStep", batches: "Prefetcher") -> None:
        """Save the finished steps after an error of the data, then raise it on all ranks."""
        if self.due(state, is_final=True):
            self.save(state, train_step, batches)
        self.dist.on_all_ranks(batches.raise_error)

    def _write(self, state, weights, moments, found):
        """(why it could not be written, as on a full disk, or None; whether a checkpoint of this step is there)."""
        try:
            save(self.run_dir, state.step, weights, moments, found, self.owner)
        except OSError as error:
            return error.strerror or str(error), state.step in self.store.steps()
        with contextlib.suppress(OSError):  # it is saved; what could not be removed is removed at the next save
            self.store.clean(self.keep_last, self.keep_every, state.best_step, self.resumed_step, self.owner)
        return None, True


def load_first_weights(
    dist: DistContext, source: str, model_config: GPTConfig, tokenizer: BPETokenizer
) -> tuple[dict[str, Tensor], GPTConfig]:
    """({name: tensor}, configuration) of the newest checkpoint of the run `source`, for a new run to begin with: of the
    same shape as `model_config`, with the constants of `source`. Raises CheckpointError, DataError or UserError if
    there is none, or if it has another tokenizer or another shape.
    """
    run_dir = dist.on_rank0(lambda: find_run(source))

    def load():
        step, files, _ = newest(run_dir)
        if step is None:
            raise CheckpointError(f"--init-from={source}: no checkpoint in {run_dir}")
        tensors, _, state = unpack(files)
        if state["tokenizer_sha256"] != tokenizer.sha256():
            raise DataError(f"--init-from={source} has another tokenizer: give its own, --tokenizer-dir={run_dir}")
        own, found = model_config.to_dict(), parsed(GPTConfig, state["model_config"])
        other = {name: value for name, value in found.to_dict().items() if name not in CONSTANTS and own[name] != value}
        if other:
            shape = ", ".join(f"{name} {value}" for name, value in other.items())
            raise UserError(f"--init-from={source} has another shape: {shape}; use the settings it was trained with")
        dist.print0(f"weights    of {source} at step {step}")
        return tensors, found

    return dist.on_all_ranks(load)


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
        best_step = _state(files)["train_state"]["best_step"]
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
