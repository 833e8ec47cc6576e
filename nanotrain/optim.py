"""Muon for the matrices, RowAdam for the table of token pairs, AdamW for everything else.

All keep their state in float32, by parameter, and are told their learning rate before each step (`set_schedule`).

On several ranks each owns a part: whole matrices with Muon, an equal run of elements with AdamW. It keeps the state of
its part alone, updates that from the averaged gradients and sends it to the others, so that parameters stay equal to
the bit. Any number of ranks will do; one rank owns everything and has nobody to send it to.
"""

import itertools
import math

import torch
from torch.optim.adamw import adamw

# Five steps of the Polar Express iteration (arXiv:2505.16932, coefficients for bfloat16): X <- a X + (b A + c A^2) X
# with A = X X^T.
POLAR_EXPRESS = (
    (8.157, -22.483, 15.879),
    (4.043, -2.809, 0.500),
    (3.892, -2.772, 0.506),
    (3.286, -2.368, 0.464),
    (2.347, -1.710, 0.423),
)
ROW_BETA = 0.9
POLAR_SAFETY = 1.01  # rounding may push a singular value above 1, where the iteration diverges


class SharedOptimizer(torch.optim.Optimizer):
    """An optimizer of which every rank has the state of its own elements only.

    spans: {parameter: [(begin, end) of each rank]}, of the parameter's elements in order. A rank that has none of a
    parameter has no state of it. shapes: {parameter: {state name: shape that it has as a whole}}, equal on all ranks.
    """

    def __init__(self, groups, defaults, dist, spans, shapes):
        super().__init__(groups, defaults)
        self.dist, self.spans, self.shapes = dist, spans, shapes
        for parameter, of_state in shapes.items():
            begin, end = self.own(parameter)
            for key, shape in of_state.items() if end > begin else ():
                share = _scaled((begin, end), parameter, shape)
                self.state[parameter][key] = torch.zeros(share[1] - share[0], device=parameter.device)

    def step(self):
        """Update every parameter from its gradient."""
        for wait in self.begin():
            wait()

    @torch.no_grad()
    def begin(self):
        """Update this rank's part of every parameter from its gradient; returns the functions that wait for the rest.
        What is done travels while the next group is worked on.
        """
        sent = []
        for group in self.param_groups:
            self.update(self.owned(group["params"]), group)
            sent.append(self.send(group["params"]))
        return sent

    def update(self, parameters, group):
        """Update this rank's elements of `parameters`, of which it has some, by the settings of their group."""
        raise NotImplementedError

    def own(self, parameter):
        """(begin, end) of this rank."""
        return self.spans[parameter][self.dist.rank]

    def owned(self, parameters):
        """Those of which this rank has elements."""
        return [parameter for parameter in parameters if self.own(parameter)[1] > self.own(parameter)[0]]

    def send(self, parameters):
        """Begin to send every rank's elements of `parameters` to all; returns the function that waits for them."""
        owned = [[] for _ in range(self.dist.world_size)]
        for parameter in parameters:
            for part, (begin, end) in zip(owned, self.spans[parameter], strict=True):
                if end > begin:
                    part.append(parameter.detach().view(-1)[begin:end])
        return self.dist.broadcast_owned(owned)


def _scaled(span, parameter, shape):
    """The span of a state tensor of `shape` that belongs to `span` of its parameter; it may have one value a row."""
    return [place * math.prod(shape) // parameter.numel() for place in span]


def deal(costs, world_size):
    """The rank of each of the `costs`: the largest first, each to the rank with the least so far."""
    totals, owners = [0] * world_size, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = totals.index(min(totals))
        totals[owners[number]] += costs[number]
    return owners


def cut(sizes, world_size):
    """[[(begin, end) of each rank]] of each of the `sizes`: laid end to end they make one line, which is cut into runs
    of equal length.
    """
    total, first, spans = sum(sizes), 0, []
    bounds = [total * rank // world_size for rank in range(world_size + 1)]
    for size in sizes:
        places = [min(max(bound - first, 0), size) for bound in bounds]
        spans.append(list(itertools.pairwise(places)))
        first += size
    return spans


class Muon(SharedOptimizer):
    """Momentum, orthogonalised (Keller Jordan's Muon; Nesterov form), for 2-D parameters, in stacks of one shape.

    The update has singular values near 1; its rows are then evened out (`even_rows`), and it is scaled by
    sqrt(max(1, rows / columns)). Weight decay is cautious (arXiv:2411.16085): it acts only where it does not oppose the
    update.
    """

    def __init__(self, named_parameters, lr, dist, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        """named_parameters: {name: parameter}. dtype: of the orthogonalisation's products."""
        stacks = {}
        for name, parameter in named_parameters.items():
            stacks.setdefault(tuple(sorted(parameter.shape)), []).append((name, parameter))
        # The largest first: the last of all has nothing left behind which it could travel.
        stacks = sorted(stacks.values(), key=lambda stack: -sum(parameter.numel() for _, parameter in stack))
        groups = [{"params": [p for _, p in stack], "names": [n for n, _ in stack]} for stack in stacks]
        defaults = {"lr": lr, "base_lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        parameters = list(named_parameters.values())
        owners = deal([orthogonalization_cost(parameter) for parameter in parameters], dist.world_size)
        spans = {
            parameter: [(0, parameter.numel() if rank == owner else 0) for rank in range(dist.world_size)]
            for parameter, owner in zip(parameters, owners, strict=True)
        }
        shapes = {parameter: {"momentum": parameter.shape, "row_sq": parameter.shape[:1]} for parameter in parameters}
        super().__init__(groups, defaults, dist, spans, shapes)
        self.dtype = dtype

    def update(self, parameters, group):
        """Update `parameters`, which have one shape or its transpose, by the settings of their group."""
        if parameters:
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
                update = even_rows(update, self.state[parameter]["row_sq"])
                rate = group["lr"] * math.sqrt(max(1.0, parameter.size(0) / parameter.size(1)))
                if group["weight_decay"]:
                    agrees = update * parameter >= 0
                    parameter.sub_(parameter * agrees, alpha=rate * group["weight_decay"])
                parameter.sub_(update, alpha=rate)


def orthogonalization_cost(matrix):
    """What orthogonalising one matrix costs, in multiply-adds of one iteration."""
    short, long = sorted(matrix.shape)
    return short * short * (2 * long + short)


def even_rows(update, row_sq):
    """(R, C) -> (R, C): rows divided by the root of `row_sq` (R,), a running mean of their mean squares that this adds
    to; the norm of the whole stays (NorMuon, arXiv:2510.05491).
    """
    row_sq.lerp_(update.square().mean(1), 1 - ROW_BETA)
    evened = update / (row_sq.sqrt()[:, None] + 1e-10)
    return evened * (update.norm() / (evened.norm() + 1e-10))


def orthogonalize(stack, dtype):
    """(N, R, C) with R <= C -> (N, R, C) float32: the nearest matrices with all singular values 1, to about 15 %."""
    norms = stack.flatten(1).norm(dim=1)[:, None, None]  # in float32: a bfloat16 sum of squares is too coarse
    x = (stack / (norms * POLAR_SAFETY + 1e-7)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()


class AdamW(SharedOptimizer):
    """AdamW (arXiv:1711.05101) with torch's fused kernel, over groups of {"names", "params", "lr", "betas"}."""

    def __init__(self, groups, dist):
        parameters = [parameter for group in groups for parameter in group["params"]]
        spans = cut([parameter.numel() for parameter in parameters], dist.world_size)
        shapes = {parameter: {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape} for parameter in parameters}
        defaults = {"weight_decay": 0.0, "eps": 1e-8}
        super().__init__(groups, defaults, dist, dict(zip(parameters, spans, strict=True)), shapes)
        self.updates = 0
        for group in self.param_groups:
            group["base_lr"] = group["lr"]

    def begin(self):
        """Update this rank's elements; returns the functions that wait for those of the others."""
        sent = super().begin()
        self.updates += 1
        return sent

    def update(self, parameters, group):
        """Update this rank's elements of `parameters` by the settings of their group."""
        if parameters:
            # The kernel adds 1: it counts this update itself. One tensor, made on the device: to bring a number there
            # would wait for it.
            steps = torch.full((len(parameters),), float(self.updates), device=parameters[0].device)
            adamw(
                [parameter.view(-1)[slice(*self.own(parameter))] for parameter in parameters],
                [parameter.grad.flatten()[slice(*self.own(parameter))] for parameter in parameters],
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


class RowAdam(SharedOptimizer):
    """Adam without momentum for tables of which a step touches few rows: it reads and writes only those.

    A row has one second moment, the mean of the squares of its gradients' elements over its own updates, the last
    1 / (1 - beta2) at most. Steps in which a row has no gradient do not count: as in dense Adam they would shrink its
    moment, and a rare row would then leap by up to ten times the rate.

    Every rank has all of its small state and does all of its little work.
    """

    def __init__(self, groups, dist):
        """groups: {"names", "params", "lr", "beta2"}; the gradients are sparse."""
        parameters = [parameter for group in groups for parameter in group["params"]]
        spans = {parameter: [(0, parameter.numel())] * dist.world_size for parameter in parameters}
        shapes = {p: {"exp_avg_sq": p.shape[:1], "updates": p.shape[:1]} for p in parameters}
        super().__init__(groups, {"eps": 1e-10}, dist, spans, shapes)
        for group in self.param_groups:
            group["base_lr"] = group["lr"]

    @torch.no_grad()
    def begin(self):
        """Update the rows that have a gradient; there is nothing to wait for."""
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


def build(roles, rates, weight_decay, dtype, dist):
    """[Muon, AdamW] over the parameters of a model, and RowAdam if it has a table of token pairs.

    roles: {role: {name: parameter}} as `GPT.parameters_by_role` gives. rates: {"matrix", "embedding", "unembedding",
    "scalar": learning rate}. dtype: of Muon's products. The rate of each role follows from those four. dist: with
    whose ranks the work is shared; a rank's part follows from its number alone.
    """
    # At step 1 the gradient of the scalars is rounding: about 1e-6, where later ones are about 1e-2. A small eps would
    # turn it into full updates, which differ with the number of ranks.
    scalar = {"betas": (0.9, 0.95), "eps": 1e-4}
    options = {
        "embedding": {"lr": rates["embedding"], "betas": (0.8, 0.99)},
        "value_embedding": {"lr": rates["embedding"] / 2, "betas": (0.8, 0.99)},
        "unembedding": {"lr": rates["unembedding"], "betas": (0.8, 0.98)},
        "residual": {"lr": rates["scalar"] / 10, **scalar},  # a small change of it moves the whole stream
        "x0": {"lr": rates["scalar"], **scalar},
        "gate": {"lr": rates["scalar"], **scalar},
    }
    groups = [
        {"names": list(roles[role]), "params": list(roles[role].values()), **option}
        for role, option in options.items()
        if role in roles
    ]
    muon = Muon(roles["matrix"], rates["matrix"], dist, weight_decay=weight_decay, dtype=dtype)
    optimizers = [muon, AdamW(groups, dist)]
    if "bigram_embedding" in roles:
        named = roles["bigram_embedding"]
        rate = rates["embedding"] / 2
        group = {"names": list(named), "params": list(named.values()), "lr": rate, "beta2": 0.99}
        optimizers.append(RowAdam([group], dist))
    return optimizers


def step(optimizers):
    """Update the parameters of all `optimizers`, as `build` gives them, from their gradients.

    The last comes first: the large tables of AdamW are quickly done, and travel while Muon works.
    """
    sent = [wait for optimizer in reversed(optimizers) for wait in optimizer.begin()]
    for wait in sent:
        wait()


@torch.no_grad()
def collect_gradients(parameters, dist):
    """The gradients of `parameters` as dense tensors that share their memory; of a sparse one the rows that it has.

    The sparse ones, which DistributedDataParallel leaves alone, are averaged over the ranks here.
    """
    found = []
    for parameter in parameters:
        if parameter.grad.is_sparse:
            own = parameter.grad.coalesce()  # a row that many tokens share is sent once
            rows = dist.all_gather_rows(own.indices()[0])
            values = dist.all_gather_rows(own.values() / dist.world_size)
            alone = dist.world_size == 1
            parameter.grad = torch.sparse_coo_tensor(
                rows[None], values, parameter.shape, check_invariants=False, is_coalesced=alone
            ).coalesce()
            found.append(parameter.grad.values())
        else:
            found.append(parameter.grad)
    return found


def set_schedule(optimizers, rate, momentum, weight_decay):
    """Set every group's learning rate to `rate` times its own, and Muon's momentum and weight decay."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
            if "momentum" in group:
                group["momentum"], group["weight_decay"] = momentum, weight_decay


def _state_tensors_of(optimizers):
    """(name, optimizer, parameter, state name, shape as a whole) of every state tensor, in the same order on all
    ranks.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, shape in optimizer.shapes[parameter].items():
                    yield f"{name}/{key}", optimizer, parameter, key, shape


def state_tensors(optimizers, dist):
    """{"parameter name/state name": tensor} of all optimizers on rank 0: whole tensors, whatever the rank count. Empty
    on the other ranks, all of which must call it, because they send their parts.
    """
    found = {}
    for name, optimizer, parameter, key, shape in _state_tensors_of(optimizers):
        sizes, filled = [], 0
        for span in optimizer.spans[parameter]:
            begin, end = _scaled(span, parameter, shape)
            sizes.append(end - begin if begin >= filled else 0)  # a part that an earlier rank has too comes from that
            filled = max(filled, end)
        part = optimizer.state[parameter][key] if sizes[dist.rank] else torch.empty(0)
        whole = dist.gather_to_rank0(part, sizes)
        if dist.is_rank0:
            found[name] = whole.view(shape)
    return found


@torch.no_grad()
def load_state_tensors(optimizers, tensors):
    """Put back what `state_tensors` gave: each rank takes its part of every tensor. Raises ValueError for a missing,
    extra or misshapen tensor.
    """
    own = {name: place for name, *place in _state_tensors_of(optimizers)}
    if own.keys() != tensors.keys():
        raise ValueError(f"optimizer state differs in {sorted(own.keys() ^ tensors.keys())[:4]}")
    for name, (optimizer, parameter, key, shape) in own.items():
        if tensors[name].shape != shape:
            raise ValueError(f"optimizer state {name} has shape {tuple(tensors[name].shape)}, not {tuple(shape)}")
        begin, end = _scaled(optimizer.own(parameter), parameter, shape)
        if end > begin:
            optimizer.state[parameter][key].copy_(tensors[name].flatten()[begin:end])


def footprint(optimizers, dist, table_rows):
    """What sharing costs this rank, as {"gradients", "rows", "parameters", "state": bytes}: what it sends in a step,
    in the mean over the ranks, to average the dense gradients (in a ring), to gather the rows of sparse ones, and to
    hand out the updated parameters; and the optimizer state that it holds.

    table_rows: of a table of which a rank has gradients in a step, at most.
    """
    dense = [p for optimizer in optimizers if not isinstance(optimizer, RowAdam) for p in optimizer.spans]
    tables = [p for optimizer in optimizers if isinstance(optimizer, RowAdam) for p in optimizer.spans]
    others, dense_bytes = dist.world_size - 1, 4 * sum(p.numel() for p in dense)
    rows_bytes = sum(min(table_rows, len(p)) * (8 + 4 * p.size(1)) + 16 for p in tables)  # number, values; two counts
    states = (tensor for optimizer in optimizers for state in optimizer.state.values() for tensor in state.values())
    return {
        "gradients": 2 * dense_bytes * others // dist.world_size,
        "rows": rows_bytes * others,
        "parameters": dense_bytes * others // dist.world_size,
        "state": sum(4 * tensor.numel() for tensor in states),
    }
