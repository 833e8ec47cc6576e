"""Muon for the matrices, RowAdam for the table of token pairs, AdamW for everything else.

All keep their state in float32, by parameter, and are told their learning rate before each step (`set_schedule`). On
several ranks every rank does the same work on the same averaged gradients, so that parameters stay equal to the bit.
"""

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


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Keller Jordan's Muon; Nesterov form), for 2-D parameters, in stacks of one shape.

    The update has singular values near 1; its rows are then evened out (`even_rows`), and it is scaled by
    sqrt(max(1, rows / columns)). Weight decay is cautious
    (arXiv:2411.16085): it acts only where it does not oppose the update.
    """

    def __init__(self, named_parameters, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        """named_parameters: {name: parameter}. dtype: of the orthogonalisation's products."""
        stacks = {}
        for name, parameter in named_parameters.items():
            stacks.setdefault(tuple(sorted(parameter.shape)), []).append((name, parameter))
        groups = [{"params": [p for _, p in stack], "names": [n for n, _ in stack]} for stack in stacks.values()]
        super().__init__(groups, {"lr": lr, "base_lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
                self.state[parameter]["row_sq"] = torch.zeros(len(parameter), device=parameter.device)

    @torch.no_grad()
    def step(self):
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            updates = []
            for parameter in group["params"]:
                buffer = self.state[parameter]["momentum"]
                gradient = parameter.grad.float()
                buffer.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(buffer, group["momentum"])
                updates.append(update if parameter.size(0) <= parameter.size(1) else update.t())
            updates = orthogonalize(torch.stack(updates), self.dtype)
            for parameter, update in zip(group["params"], updates, strict=True):
                update = update if parameter.size(0) <= parameter.size(1) else update.t()
                update = even_rows(update, self.state[parameter]["row_sq"])
                rate = group["lr"] * math.sqrt(max(1.0, parameter.size(0) / parameter.size(1)))
                if group["weight_decay"]:
                    agrees = update * parameter >= 0
                    parameter.sub_(parameter * agrees, alpha=rate * group["weight_decay"])
                parameter.sub_(update, alpha=rate)


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


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with torch's fused kernel, over groups of {"names", "params", "lr", "betas"}."""

    def __init__(self, groups):
        super().__init__(groups, {"weight_decay": 0.0, "eps": 1e-10})
        self.updates = 0
        for group in self.param_groups:
            group["base_lr"] = group["lr"]
            for parameter in group["params"]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)

    @torch.no_grad()
    def step(self):
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            parameters = group["params"]
            adamw(
                parameters,
                [parameter.grad for parameter in parameters],
                [self.state[parameter]["exp_avg"] for parameter in parameters],
                [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
                max_exp_avg_sqs=[],
                state_steps=[torch.tensor(float(self.updates), device=parameter.device) for parameter in parameters],
                fused=parameters[0].device.type in ("cpu", "cuda"),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        self.updates += 1


class RowAdam(torch.optim.Optimizer):
    """Adam without momentum for tables of which a step touches few rows: it reads and writes only those.

    A row has one second moment, the mean of the squares of its gradients' elements over its own updates, the last
    1 / (1 - beta2) at most. Steps in which a row has no gradient do not count: as in dense Adam they would shrink its
    moment, and a rare row would then leap by up to ten times the rate.
    """

    def __init__(self, groups):
        """groups: {"names", "params", "lr", "beta2"}; the gradients are sparse."""
        super().__init__(groups, {"eps": 1e-10})
        for group in self.param_groups:
            group["base_lr"] = group["lr"]
            for parameter in group["params"]:
                self.state[parameter]["exp_avg_sq"] = torch.zeros(len(parameter), device=parameter.device)
                self.state[parameter]["updates"] = torch.zeros(len(parameter), device=parameter.device)

    @torch.no_grad()
    def step(self):
        """Update the rows that have a gradient."""
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


def build(roles, rates, weight_decay, dtype):
    """[Muon, AdamW] over the parameters of a model, and RowAdam if it has a table of token pairs.

    roles: {role: {name: parameter}} as `GPT.parameters_by_role` gives. rates: {"matrix", "embedding", "unembedding",
    "scalar": learning rate}. dtype: of Muon's products. The rate of each role follows from those four.
    """
    # At step 1 the gradient of the scalars is zero but for rounding, which a tiny eps would blow up to a full update.
    scalar = {"betas": (0.9, 0.95), "eps": 1e-6}
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
    optimizers = [Muon(roles["matrix"], rates["matrix"], weight_decay=weight_decay, dtype=dtype), AdamW(groups)]
    if "bigram_embedding" in roles:
        named = roles["bigram_embedding"]
        rate = rates["embedding"] / 2
        optimizers.append(RowAdam([{"names": list(named), "params": list(named.values()), "lr": rate, "beta2": 0.99}]))
    return optimizers


@torch.no_grad()
def collect_gradients(parameters, runtime):
    """The gradients of `parameters` as dense tensors that share their memory; of a sparse one the rows that it has.

    The sparse ones, which DistributedDataParallel leaves alone, are averaged over the ranks here.
    """
    found = []
    for parameter in parameters:
        if parameter.grad.is_sparse:
            rows = runtime.concatenate(parameter.grad._indices()[0])
            values = runtime.concatenate(parameter.grad._values() / runtime.world_size)
            parameter.grad = torch.sparse_coo_tensor(
                rows[None], values, parameter.shape, check_invariants=False
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


def state_tensors(optimizers):
    """{"parameter name/state name": tensor} of all optimizers: whole tensors, whatever the rank count."""
    return {
        f"{name}/{key}": tensor
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, tensor in optimizer.state[parameter].items()
    }


@torch.no_grad()
def load_state_tensors(optimizers, tensors):
    """Put back what `state_tensors` gave. Raises ValueError for a missing, extra or misshapen tensor."""
    own = state_tensors(optimizers)
    if own.keys() != tensors.keys():
        raise ValueError(f"optimizer state differs in {sorted(own.keys() ^ tensors.keys())[:4]}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"optimizer state {name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
            )
        tensor.copy_(tensors[name])
