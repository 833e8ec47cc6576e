"""Muon for the matrices, RowwiseAdam for the bigram table, AdamW for everything else.

Optimizer state is float32 and sharded over ranks: Muon assigns whole matrices, AdamW element ranges of equal total
size. Each rank updates its shard from the averaged gradients and sends it to the others, so parameters are
bit-identical on all ranks. Any number of ranks works.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nanotrain.dist import DistContext

# Five steps of the Polar Express iteration (arXiv:2505.16932, coefficients for bfloat16): X <- a X + (b A + c A^2) X
# with A = X X^T.
POLAR_EXPRESS = (
    (8.157, -22.483, 15.879),
    (4.043, -2.809, 0.500),
    (3.892, -2.772, 0.506),
    (3.286, -2.368, 0.464),
    (2.347, -1.710, 0.423),
)
ROW_BETA = 0.9  # decay of NorMuon's running mean square per row
POLAR_SAFETY = 1.01  # margin, because rounding may push a singular value above 1, where the iteration diverges
Named = dict[str, nn.Parameter]  # parameters by name
Range = tuple[int, int]  # element range [start, end) of a flattened tensor


class ShardedOptimizer:
    """Base class of optimizers with state for this rank's elements only. Not a torch.optim.Optimizer, whose constructor
    imports the compiler, which takes a second. Subclasses define STATE and two methods:

    partition(parameters): the element range of each rank, for each parameter. Ranks with an empty range have no state.
    update(parameters, group): update this rank's elements of `parameters` with the settings of their group.
    """

    STATE: ClassVar[dict[str, int | None]]  # {state name: number of leading dimensions of the parameter, None for all}

    def __init__(self, groups: list[dict], dist: DistContext, **defaults: float):
        """groups: dicts of "params", as (name, parameter) pairs, "lr" and options. defaults: for missing options."""
        self.dist, self.updates, self.param_groups = dist, 0, [{**defaults, **group} for group in groups]
        for group in self.param_groups:
            group["param_names"], group["params"] = map(list, zip(*group["params"], strict=True))
            group["base_lr"] = group["lr"]  # peak learning rate; `set_schedule` sets lr
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.shard_ranges = dict(zip(parameters, self.partition(parameters), strict=True))
        self.own_ranges = {parameter: ranges[dist.rank] for parameter, ranges in self.shard_ranges.items()}
        self.state = defaultdict(dict)  # {parameter: {state name: tensor}}
        for parameter in parameters:
            start, end = self.own_ranges[parameter]
            for key, dimensions in self.STATE.items() if end > start else ():
                first, last = _state_range((start, end), parameter, parameter.shape[:dimensions])
                self.state[parameter][key] = torch.zeros(last - first, device=parameter.device)

    @torch.no_grad()
    def start_step(self) -> list[Callable[[], None]]:
        """Update this rank's shards and start sending them. Returns functions that wait for the other ranks' shards."""
        waits = []
        for group in self.param_groups:
            own = [parameter for parameter in group["params"] if parameter in self.state]
            if own:
                self.update(own, group)
            shards = [[] for _ in range(self.dist.world_size)]
            for parameter in group["params"]:
                for shard, (start, end) in zip(shards, self.shard_ranges[parameter], strict=True):
                    if end > start:
                        shard.append(parameter.detach().view(-1)[start:end])
            waits.append(self.dist.broadcast_owned(shards))  # overlaps with the update of the next group
        self.updates += 1
        return waits


def _state_range(element_range, parameter, shape):
    """Element range of a state tensor of `shape` (a value per element or per row) for a range of its parameter."""
    return [place * shape.numel() // parameter.numel() for place in element_range]


def partition_by_cost(costs: Sequence[float], world_size: int) -> list[int]:
    """Owner rank of each item: in order of decreasing cost, items go to the rank with the lowest total so far."""
    totals, owners = [0] * world_size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = totals.index(min(totals))
        totals[owners[index]] += costs[index]
    return owners


class Muon(ShardedOptimizer):
    """Muon (Keller Jordan) with Nesterov momentum for 2-D parameters, orthogonalized in stacks of equal shape.

    Orthogonalized updates have singular values near 1, row norms equalized by `normuon_normalize`, and the scale
    sqrt(max(1, rows / columns)). Weight decay is cautious (arXiv:2411.16085): it skips elements where it opposes the
    update.
    """

    STATE: ClassVar = {"momentum": None, "row_sq": 1}

    def __init__(self, named: Named, lr: float, weight_decay: float, dtype: torch.dtype, dist: DistContext):
        """dtype: precision of the matrix products in `orthogonalize`."""
        stacks = {}
        for name, parameter in named.items():
            stacks.setdefault(tuple(sorted(parameter.shape)), []).append((name, parameter))
        # Largest first: sending the last stack overlaps with nothing.
        stacks = sorted(stacks.values(), key=lambda stack: -sum(parameter.numel() for _, parameter in stack))
        super().__init__([{"params": stack} for stack in stacks], dist, lr=lr, momentum=0.95, weight_decay=weight_decay)
        self.dtype = dtype

    def partition(self, parameters: list[nn.Parameter]) -> list[list[Range]]:
        """Whole matrices, balanced by the multiply-adds of one iteration of `orthogonalize`."""
        shapes = [sorted(parameter.shape) for parameter in parameters]
        costs = [short * short * (2 * long + short) for short, long in shapes]
        ranks, owners = range(self.dist.world_size), partition_by_cost(costs, self.dist.world_size)
        sizes = [parameter.numel() for parameter in parameters]
        return [[(0, size * (rank == owner)) for rank in ranks] for size, owner in zip(sizes, owners, strict=True)]

    def update(self, parameters: list[nn.Parameter], group: dict) -> None:
        """Update `parameters`, all of one shape or its transpose."""
        updates = []
        for parameter in parameters:
            buffer = self.state[parameter]["momentum"].view_as(parameter)
            gradient = parameter.grad.float()
            buffer.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(buffer, group["momentum"])
            updates.append(update if parameter.size(0) <= parameter.size(1) else update.t())
        updates = orthogonalize(torch.stack(updates), self.dtype)
        for parameter, update in zip(parameters, updates, strict=True):
            update = update if parameter.size(0) <= parameter.size(1) else update.t()
            update = normuon_normalize(update, self.state[parameter]["row_sq"])
            rate = group["lr"] * math.sqrt(max(1.0, parameter.size(0) / parameter.size(1)))
            if group["weight_decay"]:
                agrees = update * parameter >= 0
                parameter.sub_(parameter * agrees, alpha=rate * group["weight_decay"])
            parameter.sub_(update, alpha=rate)


def normuon_normalize(update: Tensor, row_sq: Tensor) -> Tensor:
    """(R, C) -> (R, C): divide each row by its running RMS, but keep the norm of the matrix (NorMuon,
    arXiv:2510.05491). `row_sq` (R,), the running mean square, is updated in place.
    """
    row_sq.lerp_(update.square().mean(1), 1 - ROW_BETA)
    normalized = update / (row_sq.sqrt()[:, None] + 1e-10)
    return normalized * (update.norm() / (normalized.norm() + 1e-10))


def orthogonalize(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, R <= C, C) -> nearest semi-orthogonal float32 matrices, singular values 0.85 to 1.15. Products in `dtype`."""
    norms = stack.flatten(1).norm(dim=1)[:, None, None]  # in float32: bfloat16 sums of squares are too coarse
    x = (stack / (norms * POLAR_SAFETY + 1e-7)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()


class AdamW(ShardedOptimizer):
    """AdamW (arXiv:1711.05101) with torch's fused kernel. Group options: "betas", "weight_decay" and "eps"."""

    STATE: ClassVar = {"exp_avg": None, "exp_avg_sq": None}

    def partition(self, parameters: list[nn.Parameter]) -> list[list[Range]]:
        """Equal parts of the concatenation of all parameters."""
        ends = list(itertools.accumulate(parameter.numel() for parameter in parameters))
        bounds = [ends[-1] * rank // self.dist.world_size for rank in range(self.dist.world_size + 1)]
        spans = itertools.pairwise([0, *ends])  # the range of each parameter in the concatenation
        places = [[min(max(bound, begin), end) - begin for bound in bounds] for begin, end in spans]
        return [list(itertools.pairwise(of_parameter)) for of_parameter in places]

    def update(self, parameters: list[nn.Parameter], group: dict) -> None:
        # The kernel adds 1. The counts are created on the device because copying them would synchronize.
        steps = torch.full((len(parameters),), float(self.updates), device=parameters[0].device)
        adamw(
            [parameter.view(-1)[slice(*self.own_ranges[parameter])] for parameter in parameters],
            [parameter.grad.flatten()[slice(*self.own_ranges[parameter])] for parameter in parameters],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            max_exp_avg_sqs=[],
            state_steps=list(steps.unbind()),
            fused=parameters[0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class RowwiseAdam(ShardedOptimizer):
    """Adam without momentum for sparse gradients, replicated on every rank. Group options: "beta2" and "eps".

    A row's second moment averages its squared gradients over about the last 1 / (1 - beta2) updates of that row. Steps
    without a gradient for the row do not count: dense Adam would decay the moment in each of them, and the next update
    of a rare row would be up to ten times the learning rate.
    """

    STATE: ClassVar = {"exp_avg_sq": 1, "updates": 1}

    def partition(self, parameters: list[nn.Parameter]) -> list[list[Range]]:
        """All elements on every rank."""
        return [[(0, parameter.numel())] * self.dist.world_size for parameter in parameters]

    @torch.no_grad()
    def start_step(self) -> list[Callable[[], None]]:
        """Update the rows that have a gradient. Nothing is sent."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                state = self.state[parameter]
                updates = state["updates"][rows] + 1
                weight = (1 / updates).clamp(min=1 - group["beta2"])
                second = torch.lerp(state["exp_avg_sq"][rows], values.square().mean(1), weight)
                state["updates"][rows], state["exp_avg_sq"][rows] = updates, second
                parameter.index_add_(0, rows, values * (-group["lr"] / (second.sqrt() + group["eps"]))[:, None])
        return []


def build_optimizers(
    roles: dict[str, Named], rates: dict[str, float], weight_decay: float, dtype: torch.dtype, dist: DistContext
) -> list[ShardedOptimizer]:
    """[Muon, AdamW] for the parameters of a model, plus RowwiseAdam if it has a bigram embedding.
    roles: from `GPT.parameters_by_role`. rates: learning rates of "matrix", "embedding", "unembedding" and "scalar".
    dtype: precision of Muon's matrix products. Their memory is estimated by `recipe.estimate_memory`.
    """
    # At step 1 the scalars' gradients are rounding errors of about 1e-6, later they are about 1e-2. A small eps would
    # turn these errors into full updates that depend on the number of ranks.
    scalar = {"betas": (0.9, 0.95), "eps": 1e-4}
    options = {
        "embedding": {"lr": rates["embedding"], "betas": (0.8, 0.99)},
        "value_embedding": {"lr": rates["embedding"] / 2, "betas": (0.8, 0.99)},
        "unembedding": {"lr": rates["unembedding"], "betas": (0.8, 0.98)},
        "residual": {"lr": rates["scalar"] / 10, **scalar},  # lower, because they scale the whole residual stream
        "x0": {"lr": rates["scalar"], **scalar},
        "gate": {"lr": rates["scalar"], **scalar},
    }
    groups = [{"params": roles[role].items(), **option} for role, option in options.items() if role in roles]
    muon = Muon(roles["matrix"], rates["matrix"], weight_decay, dtype, dist)
    optimizers = [muon, AdamW(groups, dist, weight_decay=0.0, eps=1e-8)]
    if "bigram_embedding" in roles:
        group = {"params": roles["bigram_embedding"].items(), "lr": rates["embedding"] / 2, "beta2": 0.99}
        optimizers.append(RowwiseAdam([group], dist, eps=1e-10))
    return optimizers


def step(optimizers: Sequence[ShardedOptimizer]) -> None:
    """Update all parameters, AdamW before Muon: its large tables are fast to update and sent while Muon computes."""
    waits = [wait for optimizer in reversed(optimizers) for wait in optimizer.start_step()]
    for wait in waits:
        wait()


@torch.no_grad()
def collect_gradients(parameters: Iterable[nn.Parameter], dist: DistContext) -> list[Tensor]:
    """Gradients of `parameters`, sharing memory with them; of a sparse gradient, the values of its rows."""
    found = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient.is_sparse:
            gradient = gradient.coalesce()  # sums duplicate rows, so each row is sent once
            if dist.world_size > 1:  # DistributedDataParallel does not average sparse gradients
                rows = dist.all_gather_rows(gradient.indices()[0])
                values = dist.all_gather_rows(gradient.values() / dist.world_size)
                gradient = torch.sparse_coo_tensor(rows[None], values, parameter.shape).coalesce()
            parameter.grad, gradient = gradient, gradient.values()
        found.append(gradient)
    return found


def set_schedule(optimizers: Iterable[ShardedOptimizer], rate: float, momentum: float, weight_decay: float) -> None:
    """Set every group's learning rate to `rate` times its base rate, and Muon's momentum and weight decay."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
            if isinstance(optimizer, Muon):
                group["momentum"], group["weight_decay"] = momentum, weight_decay


def _state_tensors_of(optimizers):
    """Yield (name, optimizer, parameter, state name, unsharded shape) per state tensor, in one order on all ranks."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                for key, dimensions in optimizer.STATE.items():
                    yield f"{name}/{key}", optimizer, parameter, key, parameter.shape[:dimensions]


def state_tensors(optimizers: Iterable[ShardedOptimizer], dist: DistContext) -> dict[str, Tensor]:
    """{"parameter name/state name": unsharded tensor} on rank 0, {} on other ranks. A collective operation."""
    found = {}
    for name, optimizer, parameter, key, shape in _state_tensors_of(optimizers):
        sizes, filled = [], 0
        for element_range in optimizer.shard_ranges[parameter]:
            start, end = _state_range(element_range, parameter, shape)
            sizes.append(end - start if start >= filled else 0)  # replicated tensors come from rank 0 only
            filled = max(filled, end)
        part = optimizer.state[parameter][key] if sizes[dist.rank] else torch.empty(0)
        whole = dist.gather_to_rank0(part, sizes)
        if dist.is_rank0:
            found[name] = whole.view(shape)
    return found


@torch.no_grad()
def load_state_tensors(optimizers: Iterable[ShardedOptimizer], tensors: dict[str, Tensor]) -> None:
    """Load the tensors of `state_tensors`. Raises ValueError if tensors are missing, unexpected or misshapen."""
    places = list(_state_tensors_of(optimizers))
    expected = {(name, shape) for name, *_, shape in places}
    if different := expected ^ {(name, tensor.shape) for name, tensor in tensors.items()}:
        raise ValueError(f"missing, unexpected or misshapen tensors, such as {sorted(different)[:4]}")
    for name, optimizer, parameter, key, shape in places:
        start, end = _state_range(optimizer.own_ranges[parameter], parameter, shape)
        if end > start:
            optimizer.state[parameter][key].copy_(tensors[name].flatten()[start:end])
