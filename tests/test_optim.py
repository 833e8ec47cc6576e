"""Muon, AdamW and RowwiseAdam against other implementations and against their definitions, and their state."""

import math

import numpy as np
import pytest
import torch
from conftest import ALONE

from nanotrain import optim
from nanotrain.checkpoint import build_model
from nanotrain.dist import DistContext
from nanotrain.gpt import GPTConfig
from nanotrain.optim import AdamW, Muon, RowwiseAdam, orthogonalize

SHAPES = ((8, 8), (6, 16), (16, 6), (16, 6), (1, 5), (5, 1))
RATES = {"matrix": 0.02, "embedding": 0.3, "unembedding": 0.004, "scalar": 0.05}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(shapes=SHAPES):
    return {f"matrix {n}": torch.nn.Parameter(draw(*shape, seed=n)) for n, shape in enumerate(shapes)}


def step(optimizers, named, seed):
    """One step on gradients that are a function of the seed."""
    for number, (name, parameter) in enumerate(named.items()):
        parameter.grad = draw(*parameter.shape, seed=1000 * seed + number)
        if name.startswith("bigram"):
            parameter.grad[seed % 2 :: 2] = 0  # other rows each time
            parameter.grad = parameter.grad.to_sparse(1)
    optim.step(optimizers)


def small_model(seed=0):
    model = build_model(GPTConfig(23, 8, 3, 2, 2, 8, bigram_rows=11), "cpu")
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # away from zero, so that every gradient flows
            parameter += 0.2 * draw(*parameter.shape, seed=seed)
    return model


def build(model, dist=ALONE, weight_decay=0.1):
    return optim.build_optimizers(model.parameters_by_role(), RATES, weight_decay, torch.float32, dist)


# ---- AdamW ----


@pytest.mark.parametrize(("betas", "weight_decay", "eps"), [((0.8, 0.99), 0.0, 1e-10), ((0.9, 0.95), 0.3, 1e-6)])
def test_adamw_equals_the_one_of_torch(betas, weight_decay, eps):
    shapes, options = ((7, 5), (3,), ()), {"lr": 0.05, "betas": betas, "weight_decay": weight_decay, "eps": eps}
    ours, theirs = parameters(shapes), parameters(shapes)
    optimizer = AdamW([{"params": ours.items(), **options}], ALONE)
    other = torch.optim.AdamW(theirs.values(), **options, foreach=False, fused=False)
    for number in range(1, 21):
        step([optimizer], ours, number)
        step([], theirs, number)
        other.step()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    assert (ours["matrix 0"] - draw(7, 5, seed=0)).abs().amax() > 0.1


# ---- orthogonalization ----


def polar_express(matrix):
    """What the iteration gives without rounding: the singular vectors stay, each value goes through the polynomials."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    values = values / (1.01 * np.linalg.norm(matrix) + 1e-7)
    for a, b, c in optim.POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    return u * values @ vt


@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, 0.15), (torch.bfloat16, 0.2)])
def test_orthogonalize_keeps_singular_vectors_and_sets_values_near_one(dtype, band):
    for shape in ((8, 8), (6, 16), (12, 40), (1, 5)):
        stack = draw(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]  # the size plays no part
        for matrix, result in zip(stack.double().numpy(), orthogonalize(stack, dtype).double().numpy(), strict=True):
            values = np.linalg.svd(result, compute_uv=False)
            assert 1 - band < values.min() <= values.max() < 1 + band
            u, _, vt = np.linalg.svd(matrix, full_matrices=False)
            exact = u @ vt
            assert (result * exact).sum() > 0.97 * np.linalg.norm(result) * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_survives_zero_and_rank_one(dtype):
    column, row = draw(6, 1), draw(1, 16, seed=1)
    stack = torch.stack([torch.zeros(6, 16), column @ row])
    zero, one = orthogonalize(stack, dtype)
    assert not zero.any()
    values = torch.linalg.svdvals(one)
    assert 0.8 < values[0] < 1.2


# ---- Muon ----


def muon_steps(named, seeds, lr, momentum, weight_decay):
    """The definition, in float64: {name: matrix} after a step for each seed."""
    weights = {name: parameter.detach().double().numpy() for name, parameter in named.items()}
    averages = {name: np.zeros_like(weight) for name, weight in weights.items()}
    squares = {name: np.zeros((len(weight), 1)) for name, weight in weights.items()}
    for seed in seeds:
        for number, (name, weight) in enumerate(weights.items()):
            gradient = draw(*weight.shape, seed=1000 * seed + number).double().numpy()
            averages[name] = momentum * averages[name] + (1 - momentum) * gradient
            update = polar_express((1 - momentum) * gradient + momentum * averages[name])
            squares[name] = 0.9 * squares[name] + 0.1 * (update**2).mean(1, keepdims=True)
            evened = update / np.sqrt(squares[name])
            update = evened * np.linalg.norm(update) / np.linalg.norm(evened)
            rate = lr * math.sqrt(max(1, weight.shape[0] / weight.shape[1]))
            decay = np.where(update * weight >= 0, weight_decay * weight, 0)
            weights[name] = weight - rate * decay - rate * update
    return weights


@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
def test_muon_equals_its_definition(weight_decay):
    named = parameters()
    expected = muon_steps(named, range(1, 6), 0.1, 0.9, weight_decay)
    optimizer = Muon(named, 0.1, 0.0, torch.float32, ALONE)
    optim.set_schedule([optimizer], 1.0, 0.9, weight_decay)
    for seed in range(1, 6):
        step([optimizer], named, seed)
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach(), torch.from_numpy(expected[name]).float(), rtol=0, atol=1e-4)


# ---- RowwiseAdam ----

ROWS, COLUMNS = 9, 4


def sparse_gradient(seed):
    """A gradient of a few rows, one of them twice, and the same as a dense tensor."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(ROWS, (3,), generator=generator)
    rows = torch.cat((rows, rows[:1]))
    values = torch.randn(4, COLUMNS, generator=generator)
    sparse = torch.sparse_coo_tensor(rows[None], values, (ROWS, COLUMNS), check_invariants=True)
    return sparse, sparse.to_dense()


def test_row_adam_equals_its_definition_and_leaves_rows_without_a_gradient_alone_to_the_bit():
    table = torch.nn.Parameter(draw(ROWS, COLUMNS, seed=5))
    optimizer = RowwiseAdam([{"params": [("table", table)], "lr": 0.3, "beta2": 0.9}], ALONE, eps=1e-10)
    expected, second, updates = table.detach().double().clone(), [0.0] * ROWS, [0] * ROWS
    for number in range(1, 41):
        before = table.detach().clone()
        table.grad, dense = sparse_gradient(number)
        optim.step([optimizer])
        assert torch.equal((table != before).any(1), dense.any(1))
        for row, gradient in enumerate(dense.double()):
            if gradient.any():
                updates[row] += 1
                keep = min(1 - 1 / updates[row], 0.9)
                second[row] = keep * second[row] + (1 - keep) * gradient.square().mean().item()
                expected[row] -= 0.3 * gradient / math.sqrt(second[row])
    torch.testing.assert_close(table.detach(), expected.float(), rtol=1e-5, atol=1e-5)


def test_collected_gradients_are_dense_and_share_memory():
    table, matrix = torch.nn.Parameter(draw(ROWS, COLUMNS)), torch.nn.Parameter(draw(3, 3))
    table.grad, dense = sparse_gradient(1)
    matrix.grad = draw(3, 3, seed=2)
    rows, whole = optim.collect_gradients([table, matrix], ALONE)
    assert whole is matrix.grad
    assert rows.size(0) == len(torch.unique(table.grad._indices()))  # every row once, so that norms are right
    rows.mul_(2)
    torch.testing.assert_close(table.grad.to_dense(), 2 * dense)


# ---- sharding ----


class Place(DistContext):
    """One rank of several, to whom nobody sends anything."""

    def broadcast_owned(self, owned):
        assert len(owned) == self.world_size
        return lambda: None


def place_among(world_size, rank):
    return Place(rank, world_size, torch.device("cpu"), torch.float32, "test")


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_rank_updates_what_it_owns_as_one_process_would_and_nothing_else(world_size):
    (alone, _), untouched = trained(3), small_model()
    moved = {name: 0 for name, _ in alone.named_parameters()}
    for rank in range(world_size):
        _, optimizers = trained(3, place_among(world_size, rank))
        owned = sum(len(state["exp_avg"]) for state in optimizers[1].state.values())
        assert abs(owned - sum(parameter.numel() for parameter in optimizers[1].shard_ranges) / world_size) <= 1
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    begin, end = optimizer.own_ranges[parameter]
                    here = torch.zeros(parameter.numel(), dtype=torch.bool)
                    here[begin:end] = True
                    moved[name] += here.int()
                    theirs, old = alone.get_parameter(name), untouched.get_parameter(name)
                    expected = torch.where(here.view_as(parameter), theirs, old)
                    torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-5)
                    assert (parameter in optimizer.state) == (end > begin)
    for name, times in moved.items():
        assert (times == (world_size if name.startswith("bigram") else 1)).all(), name


def test_build_puts_every_parameter_in_one_group_with_the_rate_of_its_role():
    model = small_model()
    optimizers = build(model)
    named = dict(model.named_parameters())
    held = {}
    for optimizer, group in ((each, group) for each in optimizers for group in each.param_groups):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert parameter is named.pop(name)
            held[name] = (type(optimizer), group["lr"], group.get("betas"), group.get("weight_decay"))
    assert not named
    expected = {
        "embedding.weight": (AdamW, 0.3, (0.8, 0.99), 0.0),
        "value_embeddings.2.weight": (AdamW, 0.15, (0.8, 0.99), 0.0),
        "bigram_embedding.weight": (RowwiseAdam, 0.15, None, None),
        "lm_head.weight": (AdamW, 0.004, (0.8, 0.98), 0.0),
        "blocks.1.residual_scale": (AdamW, 0.005, (0.9, 0.95), 0.0),
        "blocks.1.x0_scale": (AdamW, 0.05, (0.9, 0.95), 0.0),
        "backout_scale": (AdamW, 0.05, (0.9, 0.95), 0.0),
        "blocks.0.attention.value_gate.weight": (AdamW, 0.05, (0.9, 0.95), 0.0),
        "blocks.2.down_proj.weight": (Muon, 0.02, None, 0.1),
        "blocks.0.attention.q_proj.weight": (Muon, 0.02, None, 0.1),
    }
    assert {name: held[name] for name in expected} == expected
    assert {name for name in held if held[name][0] is Muon} == set(model.parameters_by_role()["matrix"])


def test_set_schedule_scales_every_rate_from_its_own_base():
    model = small_model()
    optimizers = build(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    base = [group["lr"] for group in groups]
    for rate in (0.5, 0.25):  # the second does not build on the first
        optim.set_schedule(optimizers, rate, momentum=0.87, weight_decay=0.03)
        assert [group["lr"] for group in groups] == [rate * lr for lr in base]
    assert {(group["momentum"], group["weight_decay"]) for group in optimizers[0].param_groups} == {(0.87, 0.03)}
    assert {group["weight_decay"] for group in optimizers[1].param_groups} == {0.0}


def trained(steps, dist=ALONE):
    """A model and its optimizers after so many steps on fixed gradients."""
    model = small_model()
    optimizers = build(model, dist)
    for seed in range(1, steps + 1):
        step(optimizers, dict(model.named_parameters()), seed)
    return model, optimizers


def test_state_is_named_whole_and_in_float32():
    model, optimizers = trained(1)
    tensors = optim.state_tensors(optimizers, ALONE)
    expected = {}
    for role, named in model.parameters_by_role().items():
        for name, parameter in named.items():
            for key in {"matrix": ["momentum"], "bigram_embedding": []}.get(role, ["exp_avg", "exp_avg_sq"]):
                expected[f"{name}/{key}"] = parameter.shape, torch.float32
    for name, parameter in model.parameters_by_role()["matrix"].items():
        expected[f"{name}/row_sq"] = parameter.shape[:1], torch.float32
    expected["bigram_embedding.weight/exp_avg_sq"] = (11,), torch.float32
    expected["bigram_embedding.weight/updates"] = (11,), torch.float32
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == expected


def test_wrong_state_is_refused_with_the_name_of_the_tensor():
    _, optimizers = trained(1)
    good = dict(optim.state_tensors(optimizers, ALONE))
    name = "blocks.0.up_proj.weight/momentum"
    missing = {key: tensor for key, tensor in good.items() if key != name}
    misshapen = {**good, name: torch.zeros(2, 2)}
    for bad in (missing, {**good, "other/momentum": good[name]}, misshapen):
        with pytest.raises(ValueError, match=r"blocks\.0\.up_proj|other/momentum"):
            optim.load_state_tensors(optimizers, bad)
