"""Muon, AdamW and RowwiseAdam against other implementations and against their definitions, and their state."""

import math

import numpy as np
import pytest
import torch
from conftest import ALONE

from nanotrain import optim
from nanotrain.dist import DistContext
from nanotrain.gpt import GPT, GPTConfig
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
    for optimizer in optimizers:
        optimizer.step()


def small_model(seed=0):
    with torch.device("meta"):
        model = GPT(GPTConfig(23, 8, 3, 2, 2, 8, bigram_rows=11))
    model.to_empty(device="cpu")
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
    optimizer = AdamW([{"names": list(ours), "params": list(ours.values()), **options}], ALONE)
    other = torch.optim.AdamW(theirs.values(), **options, foreach=False, fused=False)
    for number in range(1, 21):
        step([optimizer], ours, number)
        step([other], theirs, number)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    assert (ours["matrix 0"] - draw(7, 5, seed=0)).abs().amax() > 0.1


# ---- orthogonalisation ----


def polar_factor(matrix):
    """The nearest matrix whose singular values are all 1."""
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def polar_express(matrix):
    """What the iteration gives without rounding: the singular vectors stay, each value goes through the polynomials."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    values = values / (1.01 * np.linalg.norm(matrix) + 1e-7)
    for a, b, c in optim.POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    return u * values @ vt


def test_the_polynomials_bring_every_singular_value_near_one():
    values = np.logspace(-3, 0, 1000)
    ends = [polar_express(np.diag([value, math.sqrt(1 - value**2)]))[0, 0] for value in values]
    assert 0.85 < min(ends)
    assert max(ends) < 1.15


@pytest.mark.parametrize("shape", [(8, 8), (6, 16), (12, 40), (1, 5)])
def test_orthogonalize_keeps_singular_vectors_and_sets_values_near_one(shape):
    stack = draw(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]  # the size plays no part
    for matrix, result in zip(stack, orthogonalize(stack, torch.float32), strict=True):
        exact = matrix.double().numpy()
        torch.testing.assert_close(result, torch.from_numpy(polar_express(exact)).float(), rtol=0, atol=2e-5)
        values = np.linalg.svd(result.double().numpy(), compute_uv=False)
        assert 0.85 < values.min() <= values.max() < 1.15
        assert np.abs(result.numpy() - polar_factor(exact)).max() < 0.15


@pytest.mark.parametrize("shape", [(8, 8), (6, 16), (12, 40), (1, 5)])
def test_orthogonalize_in_bfloat16_stays_in_the_band(shape):
    stack = draw(3, *shape)
    result = orthogonalize(stack, torch.bfloat16)
    assert result.dtype == torch.float32
    for matrix, low in zip(stack, result.double().numpy(), strict=True):
        values = np.linalg.svd(low, compute_uv=False)
        assert 0.8 < values.min() <= values.max() < 1.2
        exact = polar_factor(matrix.double().numpy())
        assert (low * exact).sum() > 0.97 * np.linalg.norm(low) * np.linalg.norm(exact)


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
    optimizer = Muon(named, 0.1, ALONE, momentum=0.9, weight_decay=weight_decay)
    for seed in range(1, 6):
        step([optimizer], named, seed)
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach(), torch.from_numpy(expected[name]).float(), rtol=0, atol=1e-4)


def test_muon_equals_the_one_of_torch_with_its_coefficients_and_precision(monkeypatch):
    monkeypatch.setattr(optim, "POLAR_EXPRESS", ((3.4445, -4.7750, 2.0315),) * 5)
    monkeypatch.setattr(optim, "POLAR_SAFETY", 1.0)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's knows no other precision
    monkeypatch.setattr(optim, "normuon_normalize", lambda update, row_sq: update)  # nor this
    ours, theirs = parameters(), parameters()
    optimizer = Muon(ours, 0.1, ALONE, momentum=0.9)
    other = torch.optim.Muon(theirs.values(), lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=True)
    for seed in range(1, 11):
        step([optimizer], ours, seed)
        step([other], theirs, seed)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)


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


def test_row_adam_equals_its_definition_on_dense_gradients():
    """And leaves rows without a gradient alone to the bit."""
    table = torch.nn.Parameter(draw(ROWS, COLUMNS, seed=5))
    optimizer = RowwiseAdam([{"names": ["table"], "params": [table], "lr": 0.3, "beta2": 0.9}], ALONE)
    expected, second, updates = table.detach().double().clone(), [0.0] * ROWS, [0] * ROWS
    for number in range(1, 41):
        before = table.detach().clone()
        table.grad, dense = sparse_gradient(number)
        optimizer.step()
        assert torch.equal((table != before).any(1), dense.any(1))
        for row, gradient in enumerate(dense.double()):
            if gradient.any():
                updates[row] += 1
                keep = min(1 - 1 / updates[row], 0.9)
                second[row] = keep * second[row] + (1 - keep) * gradient.square().mean().item()
                expected[row] -= 0.3 * gradient / math.sqrt(second[row])
    torch.testing.assert_close(table.detach(), expected.float(), rtol=1e-5, atol=1e-5)


class Ranks:
    """Two ranks, the other of which has `there` where this one asks with `here`."""

    world_size = 2

    def __init__(self, pairs):
        self.pairs = pairs

    def all_gather_rows(self, tensor):
        (there,) = [there for here, there in self.pairs if here.shape == tensor.shape and torch.equal(here, tensor)]
        return torch.cat((tensor, there))


def test_collected_gradients_are_dense_share_memory_and_average_the_sparse_ones_over_ranks():
    table, matrix = torch.nn.Parameter(draw(ROWS, COLUMNS)), torch.nn.Parameter(draw(3, 3))
    table.grad, dense = sparse_gradient(1)
    matrix.grad = draw(3, 3, seed=2)
    other, other_dense = sparse_gradient(2)
    here, there = table.grad.coalesce(), other.coalesce()  # each row once
    pairs = [(here.indices()[0], there.indices()[0]), (here.values() / 2, there.values() / 2)]
    rows, whole = optim.collect_gradients([table, matrix], Ranks(pairs))
    assert whole is matrix.grad
    torch.testing.assert_close(table.grad.to_dense(), (dense + other_dense) / 2)
    assert rows.size(0) == len(torch.unique(table.grad._indices()))  # every row once, so that norms are right
    rows.mul_(2)
    torch.testing.assert_close(table.grad.to_dense(), dense + other_dense)


# ---- shares of ranks ----

WORLDS = (1, 2, 3, 4, 5, 7, 8)


def test_costs_are_assigned_largest_first_to_the_rank_with_the_least():
    assert optim.partition_by_cost([1, 5, 4, 1, 3], 2) == [0, 0, 1, 0, 1]
    assert optim.partition_by_cost([2, 2], 5) == [0, 1]
    assert optim.partition_by_cost([], 3) == []


@pytest.mark.parametrize("world_size", WORLDS)
def test_shards_differ_by_one_element_at_most(world_size):
    sizes = [1, 40, 7, 7, 1, 1, 100]
    ranges = optim.shard_ranges(sizes, world_size)
    line = [rank for tensor in ranges for rank, (begin, end) in enumerate(tensor) for _ in range(end - begin)]
    assert line == sorted(line)
    counts = [line.count(rank) for rank in range(world_size)]
    assert sum(counts) == sum(sizes)
    assert max(counts) - min(counts) <= 1
    for size, tensor in zip(sizes, ranges, strict=True):
        owned = [element for begin, end in tensor for element in range(begin, end)]
        assert owned == list(range(size))


def test_what_is_updated_travels_while_the_rest_is_worked_on(monkeypatch):
    """All is sent as soon as it is done, what takes no time first and the largest stack before the others, and nobody
    waits before all is.
    """
    events = []

    class Recorder(DistContext):
        def broadcast_owned(self, owned):
            events.append(sum(len(tensor) for part in owned for tensor in part))
            return lambda: events.append("wait")

    monkeypatch.setattr(Muon, "update", lambda self, parameters, group: events.append(f"Muon {len(group['params'])}"))
    model = small_model()
    optimizers = build(model, Recorder(0, 0, 2, torch.device("cpu"), torch.float32, "test"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.bigram_embedding.weight.grad = torch.ones(11, 16).to_sparse(1)
    optim.step(optimizers)
    sent = [event for event in events if isinstance(event, int)]
    assert events[-len(sent) :] == ["wait"] * len(sent)
    assert events[: -len(sent)] == [*sent[:-2], "Muon 6", 6144, "Muon 12", 3072]  # of 1,024 and of 256 elements each
    assert sum(sent) == sum(parameter.numel() for parameter in model.parameters()) - 11 * 16


class Lonely(DistContext):
    """One rank of several, to whom nobody sends anything."""

    def broadcast_owned(self, owned):
        assert len(owned) == self.world_size
        return lambda: None


def place_among(world_size, rank):
    return Lonely(rank, rank, world_size, torch.device("cpu"), torch.float32, "test")


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_rank_updates_what_it_owns_as_one_process_would_and_nothing_else(world_size):
    (alone, _), untouched = trained(3), small_model()
    moved = {name: 0 for name, _ in alone.named_parameters()}
    for rank in range(world_size):
        _, optimizers = trained(3, place_among(world_size, rank))
        owned = sum(len(state["exp_avg"]) for state in optimizers[1].state.values())
        assert abs(owned - sum(parameter.numel() for parameter in optimizers[1].shard_ranges) / world_size) <= 1
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    begin, end = optimizer.own_range(parameter)
                    here = torch.zeros(parameter.numel(), dtype=torch.bool)
                    here[begin:end] = True
                    moved[name] += here.int()
                    expected = torch.where(
                        here.view_as(parameter), alone.get_parameter(name), untouched.get_parameter(name)
                    )
                    torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-5)
                    assert (parameter in optimizer.state) == (end > begin)
    for name, times in moved.items():
        assert (times == (world_size if name.startswith("bigram") else 1)).all(), name


def test_the_communication_bytes_of_a_small_model_are_those_counted_by_hand():
    model = small_model()
    dense = sum(parameter.numel() for parameter in model.parameters()) - 11 * 16
    matrices, matrix_rows = 3 * 12 * 16 * 16, 3 * (4 * 16 + 64 + 16)
    state = 4 * (matrices + matrix_rows) + 8 * (dense - matrices) + 8 * 11
    alone = optim.communication_bytes(build(model), ALONE, 5)
    assert alone == {"gradients": 0, "rows": 0, "parameters": 0, "state": state}
    place = place_among(4, 1)
    found = optim.communication_bytes(build(model, place), place, 5)
    assert found["gradients"] == 4 * dense * 2 * 3 // 4  # around the ring twice, a quarter of them at a time
    assert found["parameters"] == 4 * dense * 3 // 4  # everything but one's own
    assert found["rows"] == 3 * (5 * (8 + 4 * 16) + 2 * 8)
    assert found["state"] == pytest.approx((state - 8 * 11) / 4 + 8 * 11, rel=0.1)


# ---- groups, schedule, state ----


def test_build_puts_every_parameter_in_one_group_with_the_rate_of_its_role():
    model = small_model()
    optimizers = build(model)
    named = dict(model.named_parameters())
    held = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
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
    for group in optimizers[0].param_groups:
        assert (group["momentum"], group["weight_decay"]) == (0.87, 0.03)
    for group in optimizers[1].param_groups:
        assert group["weight_decay"] == 0.0
        assert "momentum" not in group


def trained(steps, dist=ALONE):
    """A model and its optimizers after so many steps on fixed gradients."""
    model = small_model()
    optimizers = build(model, dist)
    for seed in range(1, steps + 1):
        step(optimizers, dict(model.named_parameters()), seed)
    return model, optimizers


def test_restored_state_makes_the_next_steps_bit_equal():
    straight, _ = trained(5)
    model, optimizers = trained(3)
    fresh, fresh_optimizers = trained(0)
    fresh.load_state_dict(model.state_dict())
    optim.load_state_tensors(fresh_optimizers, optim.state_tensors(optimizers, ALONE))
    fresh_optimizers[1].updates = optimizers[1].updates
    for seed in (4, 5):
        step(fresh_optimizers, dict(fresh.named_parameters()), seed)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


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
    for bad in (missing, {**missing, "other/momentum": good[name]}, {**good, "other/momentum": good[name]}, misshapen):
        with pytest.raises(ValueError, match=r"blocks\.0\.up_proj|other/momentum"):
            optim.load_state_tensors(optimizers, bad)


# ---- accumulation ----


def gradients(model, inputs, targets, micro_steps):
    """As the training loop accumulates them: the mean over equal micro-steps."""
    model.zero_grad()
    for part, wanted in zip(inputs.chunk(micro_steps), targets.chunk(micro_steps), strict=True):
        (model(part, wanted) / micro_steps).backward()
    return {name: parameter.grad.to_dense().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("micro_steps", [2, 8])
def test_accumulated_gradients_and_the_next_muon_step_equal_those_of_the_whole_batch(micro_steps):
    tokens = torch.randint(23, (8, 9), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    models = [small_model(), small_model()]
    whole = gradients(models[0], inputs, targets, 1)
    parts = gradients(models[1], inputs, targets, micro_steps)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().amax().item())
        assert gradient.any(), name
    for model in models:  # AdamW's first step is a sign, which rounding may turn
        build(model, weight_decay=0.0)[0].step()
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
