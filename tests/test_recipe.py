"""The recipe: plans against arithmetic by hand, memory against what torch allocates, schedules by known values."""

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanotrain import loss, optim, recipe
from nanotrain.checkpoint import build_model
from nanotrain.dist import DistContext
from nanotrain.errors import UserError
from nanotrain.gpt import GPT, GPTConfig
from nanotrain.recipe import ActivationPolicy, Horizon, Memory


def test_the_recipe_needs_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, nanotrain.recipe; assert 'torch' not in sys.modules"], check=True
    )


# ---- model shape ----


@pytest.mark.parametrize(
    ("depth", "aspect_ratio", "head_dim", "width"),
    [
        (4, 64, 128, 256),
        (5, 64, 128, 384),
        (1, 64, 128, 128),
        (3, 7, 4, 24),
        (1, 0, 128, 256),  # without an aspect ratio 64 a layer and at least 256
        (5, 0, 128, 384),
        (20, 0, 128, 1280),
    ],
)
def test_width_follows_depth_in_whole_heads(depth, aspect_ratio, head_dim, width):
    assert recipe.model_width(depth, aspect_ratio, head_dim) == (width, width // head_dim)


@pytest.mark.parametrize("bad", [(0, 64, 128), (-1, 64, 128), (4, -1, 128), (4, 64, 0), (4, 64, 1), (4, 64, 7)])
def test_impossible_shapes_are_refused_with_their_values(bad):
    with pytest.raises(UserError, match="--depth={} --aspect-ratio={} --head-dim={}".format(*bad)):
        recipe.model_width(*bad)


def test_what_follows_from_the_width():
    widths = (128, 256, 384, 512, 640, 768, 2048)
    found = [recipe.sizes(width) for width in widths]
    assert [sizes.vocab_size for sizes in found] == [4096, 4096, 8192, 8192, 16384, 32768, 32768]
    assert [sizes.seq_len for sizes in found] == [256, 256, 256, 512, 1024, 2048, 2048]
    assert [sizes.bigram_rows > 0 for sizes in found] == [True] * 4 + [False] * 3
    rates = [recipe.Recipe.of(width, 1e9, 2**19).embedding_lr for width in (192, 768, 3072)]
    assert rates == pytest.approx([factor * rates[1] for factor in (2, 1, 0.5)])


def weights_of(depth):
    width, _ = recipe.model_width(depth, 0, 128)
    return 12 * depth * width**2 + recipe.sizes(width).vocab_size * width


def test_the_chosen_depth_grows_with_the_operations_and_passes_the_published_optimum():
    depths = [recipe.choose_depth(10.0**power, 128) for power in range(10, 23)]
    assert depths == sorted(depths)
    assert depths[0] == 2
    assert depths[-1] == recipe.MOST_LAYERS
    at_anchor = [recipe.choose_depth(flops, 128) for flops in (recipe.OPTIMUM_FLOPS, 1e18)]
    for depth, best in zip(at_anchor, (recipe.OPTIMUM_WEIGHTS, 129e6), strict=True):
        nearest = min(range(2, 33), key=lambda other: abs(math.log(weights_of(other) / best)))
        assert depth == nearest
    assert at_anchor[1] in (11, 12, 13)


def test_the_operations_of_a_run_by_time_leave_out_its_start_but_never_all_of_it():
    assert recipe.training_flops(2, 1e9) == (120 - recipe.START_SECONDS) * 1e9
    assert recipe.training_flops(0.1, 1e9) == 3e9


@pytest.mark.parametrize(("depth", "kv_heads"), [(1, 4), (4, 2), (5, 1), (12, 4)])
def test_counts_by_role_are_those_of_the_architecture(depth, kv_heads):
    V, C, D = 100, 32, 8
    with torch.device("meta"):
        model = GPT(GPTConfig(V, 16, depth, 4, kv_heads, D))
    tables = depth if depth <= 4 else (depth + 1) // 2
    counts = {role: sum(p.numel() for p in named.values()) for role, named in model.parameters_by_role().items()}
    assert counts == {
        "matrix": depth * (2 * C * C + 2 * C * kv_heads * D + 8 * C * C),
        "embedding": V * C,
        "unembedding": V * C,
        "value_embedding": tables * V * kv_heads * D,
        "gate": tables * 16 * kv_heads,
        "residual": depth,
        "x0": depth + 1,
    }


# ---- batch ----


@pytest.mark.parametrize("parts", [1, 4])
def test_split_batch_meets_the_total_exactly_or_names_one_that_works(parts):
    draw = random.Random(0)
    met = 0
    for _ in range(2000):
        seq_len, most, world_size = draw.choice((1, 7, 64, 256)), draw.randint(1, 40), draw.randint(1, 9)
        total = draw.choice((draw.randint(1, 100), draw.randint(1, 40) * world_size * parts)) * draw.choice(
            (1, seq_len)
        )
        unit = seq_len * world_size
        if total % (unit * parts):
            with pytest.raises(UserError, match=f"--total-batch-size={total} ") as refusal:
                recipe.split_batch(total, seq_len, most, world_size, parts)
            works = int(str(refusal.value).rpartition(" ")[2])
            assert abs(works - total) < unit * parts
        else:
            met, works = met + 1, total
        rows, grad_accum_steps = recipe.split_batch(works, seq_len, most, world_size, parts)
        assert rows * grad_accum_steps * unit == works
        assert grad_accum_steps % parts == 0
        share = works // (unit * parts)
        assert rows == max(size for size in range(1, most + 1) if share % size == 0)
    assert 300 < met < 1700


@pytest.mark.parametrize("total", [0, -512])
def test_a_batch_without_tokens_is_refused(total):
    with pytest.raises(UserError, match="try 512"):
        recipe.split_batch(total, 256, 16, 2)


@pytest.mark.parametrize(
    ("tokens", "on_gpu", "expected"),
    [(1e3, False, 4096), (3e6, False, 4096), (12e6, False, 8192), (42e6, True, 2**17), (1.4e9, True, 2**19)],
)
def test_the_batch_grows_with_the_tokens_from_another_start_on_gpus(tokens, on_gpu, expected):
    assert recipe.batch_tokens(tokens, 256, 1, on_gpu) == expected


@pytest.mark.parametrize("seq_len", [64, 1000, 2048])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_a_planned_batch_can_be_met_and_is_near_a_power_of_two(world_size, seq_len):
    unit, totals = world_size * seq_len, []
    for exponent in range(5, 13):
        totals.append(recipe.batch_tokens(10.0**exponent, seq_len, world_size, True))
        rows, grad_accum_steps = recipe.split_batch(totals[-1], seq_len, 16, world_size)
        assert rows * grad_accum_steps * unit == totals[-1]
        assert totals[-1] == unit or min(abs(totals[-1] - 2**n) for n in range(12, 21)) <= unit / 2
    assert totals == sorted(totals)
    assert recipe.batch_tokens(3e6, 1000, 2, False, 4) == 8000


# ---- the recipe ----


def numbers(depth, on_gpu=True, world_size=8, tokens=0):
    """What the recipe chooses for `--depth` alone, at ten tokens a weight or a given number of them."""
    width, heads = recipe.model_width(depth, 0, 128)
    sizes = recipe.sizes(width)._asdict()
    tokens = tokens or 10 * weights_of(depth)
    batch = recipe.batch_tokens(tokens, sizes["seq_len"], world_size, on_gpu)
    found = recipe.Recipe.of(width, tokens, batch)
    shape = {"width": width, "heads": heads, "batch": batch, "steps": round(tokens / batch), **sizes}
    return shape | asdict(found)


COLUMNS = """width seq_len vocab_size bigram_rows batch steps matrix_lr embedding_lr unembedding_lr scalar_lr
weight_decay warmup_ratio momentum_peak momentum_warmup final_lr_frac""".split()


def row(plan):
    """The columns of a plan, floats with four digits."""
    return [float(f"{plan[name]:.4g}") if type(plan[name]) is float else plan[name] for name in COLUMNS]


GOLDEN = json.loads(Path(__file__).with_name("plans.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_the_plans_of_all_depths_are_as_they_were(name):
    """Changed on purpose? `python tests/test_recipe.py` writes tests/plans.json anew; say why in dev/LOG.md."""
    depth, kind = name.split()
    assert row(numbers(int(depth), kind == "gpu")) == GOLDEN[name]


@pytest.mark.parametrize(("anchor", "width"), [(recipe.SMALL, 256), (recipe.LARGE, 768)])
def test_the_recipe_passes_through_what_was_measured_and_what_was_published(anchor, width):
    found = recipe.Recipe.of(width, anchor.tokens, anchor.batch)
    scale = math.sqrt(768 / width)
    assert found.learning_rates == pytest.approx(
        {
            "matrix": anchor.matrix_lr,
            "embedding": anchor.embedding_lr * scale,
            "unembedding": anchor.unembedding_lr * scale,
            "scalar": anchor.scalar_lr,
        }
    )
    assert (found.momentum_peak, found.final_lr_frac) == (anchor.momentum_peak, anchor.final_lr_frac)
    steps = anchor.tokens / anchor.batch
    assert found.weight_decay == pytest.approx(0.28 if anchor is recipe.LARGE else 0, rel=0.01)
    assert found.warmup_ratio * steps == pytest.approx(min(40, 0.04 * steps))
    assert found.momentum_warmup * steps == pytest.approx(min(400, 0.3 * steps))


def test_rates_go_with_the_root_of_the_batch_and_not_without_bound():
    one, four, many = (recipe.learning_rate("matrix_lr", 1e8, batch) for batch in (2**14, 2**16, 2**30))
    assert four == pytest.approx(2 * one)
    assert many == 2 * recipe.SMALL.matrix_lr


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("tokens", [1e6, 3e7, 1e9, 3e10])
def test_neighbouring_depths_differ_by_less_than_a_factor_of_two(tokens, on_gpu):
    for depth in range(1, 32):
        one, other = numbers(depth, on_gpu, 1, tokens), numbers(depth + 1, on_gpu, 1, tokens)
        for name in set(one) - {"vocab_size", "bigram_rows", "spectral_tokens", "rope_base", "schedule", "batch_ramp"}:
            assert one[name] == other[name] or 0.5 <= one[name] / other[name] <= 2, (depth, name)


def test_what_is_given_comes_first_and_the_rest_is_left_to_the_recipe():
    given = dict(MATRIX_LR=0.1, EMBEDDING_LR=0.2, WARMUP_RATIO=0.5, GRAD_CLIP=-1.0, SCHEDULE="cosine", SEED=5)
    found, plain = recipe.Recipe.of(192, 1e9, 2**19, given), recipe.Recipe.of(192, 1e9, 2**19)
    assert (found.matrix_lr, found.embedding_lr, found.warmup_ratio, found.schedule) == (0.1, 0.4, 0.5, "cosine")
    assert found.warmdown_ratio == 0.5, "what the warmup leaves of it"
    assert (found.grad_clip, found.scalar_lr) == (plain.grad_clip, plain.scalar_lr)
    again = plain.resumed(asdict(found), {"MATRIX_LR"})
    assert again == dataclasses.replace(found, matrix_lr=plain.matrix_lr)


# ---- the plan ----

COUNTS = {"matrix": 1000, "unembedding": 200, "embedding": 200, "value_embedding": 400, "gate": 16, "x0": 3}
PER_TOKEN = 6 * (1000 + 200) + 12 * 2 * 8 * 16  # of depth 2, width 8, rows of 16


def plan(horizon, total_batch_size=64, device_batch_size=2, world_size=1):
    return recipe.make_plan(
        COUNTS,
        GPTConfig(25, 16, 2, 1, 1, 8),
        horizon,
        total_batch_size=total_batch_size,
        max_device_batch_size=device_batch_size,
        world_size=world_size,
        on_gpu=False,
        flops_per_second=1e6,
        policy=ActivationPolicy(4, False, False, 512),
    )


@pytest.mark.parametrize(
    ("horizon", "steps"),
    [
        (Horizon(num_iterations=7), 7),
        (Horizon(target_flops=PER_TOKEN * 64 * 9.4), 9),
        (Horizon(target_flops=1.0), 1),
        (Horizon(target_minutes=2.0), round(120 * 1e6 / PER_TOKEN / 64)),
        (Horizon(param_data_ratio=10.0), round(12_000 / 64)),
        (Horizon(param_data_ratio=1.0), 19),
        (Horizon(num_iterations=7, target_flops=1e12, target_minutes=5.0), 7),
        (Horizon(target_flops=PER_TOKEN * 64.0, target_minutes=5.0), 1),
    ],
)
def test_each_horizon_gives_the_steps_that_fit(horizon, steps):
    made = plan(horizon)
    assert PER_TOKEN == 10_272
    assert made.flops_per_token == PER_TOKEN
    assert made.num_steps == steps
    assert made.tokens == 64 * steps
    assert made.seconds == pytest.approx(PER_TOKEN * 64 * steps / 1e6)
    assert made.parameters == COUNTS
    assert (made.total_batch_size, made.device_batch_size, made.grad_accum_steps) == (64, 2, 2)


@pytest.mark.parametrize(
    "horizon", [Horizon(num_iterations=5), Horizon(param_data_ratio=1e6), Horizon(target_flops=1e15)]
)
def test_the_batch_follows_the_training_tokens_where_none_is_asked_for(horizon):
    tokens = horizon.target_flops / PER_TOKEN if horizon.target_flops else horizon.param_data_ratio * 1200
    made = plan(horizon, total_batch_size=0, world_size=2)
    assert made.total_batch_size == recipe.batch_tokens(tokens, 16, 2, False)
    assert made.tokens == made.num_steps * made.total_batch_size


def test_a_plan_survives_json():
    made = plan(Horizon(num_iterations=3))
    again = json.loads(json.dumps(asdict(made)))
    assert recipe.Plan(**{**again, "memory": Memory(**again["memory"])}) == made


# ---- memory ----


def measured_peak(model, optimizers, rows, grad_accum_steps, dist):
    """The most bytes of tensors that torch has had at once during a step, beyond weights and optimizer state."""
    tokens = torch.randint(model.config.vocab_size, (2, rows, model.config.max_seq_len))
    parameters = list(model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(grad_accum_steps):
            with dist.autocast():
                mean = model(*tokens) / grad_accum_steps
            mean.backward()
        optim.collect_gradients(parameters, dist)
        for optimizer in optimizers:
            optim.step([optimizer])
        for parameter in parameters:
            parameter.grad = None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


RATES = {"matrix": 0.02, "embedding": 0.2, "unembedding": 0.004, "scalar": 0.04}
# (depth, width, vocabulary, tokens of a row, rows of a pass, micro-steps, dtype, whether the update needs the most)
MEMORIES = [
    (3, 64, 1024, 128, 8, 2, torch.bfloat16, False),
    (4, 128, 256, 256, 4, 1, torch.float32, False),
    (6, 128, 256, 32, 2, 1, torch.bfloat16, True),
]


@pytest.mark.parametrize(
    ("depth", "width", "vocab_size", "seq_len", "rows", "grad_accum_steps", "dtype", "in_update"), MEMORIES
)
def test_the_memory_of_a_step_is_what_the_plan_says(
    depth, width, vocab_size, seq_len, rows, grad_accum_steps, dtype, in_update
):
    dist = DistContext(0, 1, torch.device("cpu"), dtype, "test")
    model = build_model(GPTConfig(vocab_size, seq_len, depth, width // 32, width // 32, 32, 1000), "cpu")
    model.init_weights(0)
    roles = model.parameters_by_role()
    counts = {role: sum(p.numel() for p in named.values()) for role, named in roles.items()}
    optimizers = optim.build_optimizers(roles, RATES, 0.0, dtype, dist)
    measured, planned = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.recompute_blocks = True
        policy = ActivationPolicy(dtype.itemsize, False, checkpointing, loss.chunk_rows(dist.device))
        needed = recipe.estimate_memory(counts, model.config, rows, grad_accum_steps, 1, policy)
        assert (needed.update > needed.activations + needed.logits) == in_update
        planned.append(needed.peak - needed.weights - needed.optimizer)
        measured.append(measured_peak(model, optimizers, rows, grad_accum_steps, dist))
        state = [tensor for of_one in optimizers for state in of_one.state.values() for tensor in state.values()]
        assert needed.weights == sum(p.nbytes for p in model.parameters())
        assert needed.optimizer == pytest.approx(sum(tensor.nbytes for tensor in state), rel=0.02)
    assert planned == pytest.approx(measured, rel=0.25)
    if not in_update:  # the twin: the plan without checkpointing does not fit the run with it
        assert planned[0] > 1.25 * measured[1]


def test_ranks_share_the_optimizer_state_and_the_update_alone():
    policy = ActivationPolicy(4, False, False, 512)
    counts = {"matrix": 12 * 4 * 64**2, "unembedding": 6400, "embedding": 6400}
    one, four = (recipe.estimate_memory(counts, GPTConfig(100, 32, 4, 1, 1, 64), 64, 1, n, policy) for n in (1, 4))
    assert one.optimizer == 4 * 12 * 4 * 64**2 + 8 * 12800
    assert (four.optimizer, four.update) == (one.optimizer // 4, one.update // 4)
    assert (four.weights, four.gradients, four.activations) == (one.weights, one.gradients, one.activations)
    assert one.peak == one.weights + one.gradients + one.optimizer + one.activations + one.logits


# ---- schedules ----

LENGTHS = (1, 2, 5, 20, 50, 10_000)
# (warmup, warmdown, final)
RATIOS = ((0.04, 0.65, 0.03), (0.0, 0.65, 0.03), (0.0, 0.0, 0.5), (0.5, 0.5, 0.0), (0.02, 0.98, 0.1), (1.0, 0.0, 0.2))


@pytest.mark.parametrize("ratios", RATIOS)
@pytest.mark.parametrize("shape", recipe.SCHEDULES)
def test_the_rate_is_never_zero_or_above_its_peak_and_rises_once_then_falls_without_a_jump(shape, ratios):
    warmup, warmdown, final = ratios
    up = 1 / warmup if warmup else 0
    length = {"wsd": warmdown, "linear": 1 - warmup, "cosine": 2 / math.pi * (1 - warmup)}[shape]
    steepest = max(up, (1 - final) / length if length else 0)
    for num_steps in LENGTHS:
        places = [recipe.progress_at_step(step, num_steps) for step in range(1, num_steps + 1)]
        rates = [recipe.SCHEDULES[shape](place, *ratios) for place in places]
        peak = rates.index(max(rates))
        assert 0 < min(rates) <= rates[peak] <= 1
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert all(abs(after - before) <= steepest / num_steps + 1e-12 for before, after in pairwise(rates))


KNOWN = {
    "wsd": {0.01: 0.25, 0.04: 1, 0.35: 1, 0.675: 0.515, 0.9: 0.03 + 0.97 * 0.1 / 0.65, 1: 0.03},
    "cosine": {0.02: 0.5, 0.04: 1, 0.28: 0.03 + 0.97 * (1 + math.sqrt(0.5)) / 2, 0.52: 0.515, 1: 0.03},
    "linear": {0.02: 0.5, 0.04: 1, 0.28: 0.7575, 0.52: 0.515, 1: 0.03},
}


@pytest.mark.parametrize("shape", recipe.SCHEDULES)
def test_known_values(shape):
    found = {place: recipe.SCHEDULES[shape](place, 0.04, 0.65, 0.03) for place in KNOWN[shape]}
    assert found == pytest.approx(KNOWN[shape])


@pytest.mark.parametrize("warmdown", [0.0, 0.3, 0.65, 0.7, 0.9, 1.0])
def test_momentum_is_continuous_and_within_its_bounds(warmdown):
    values = [recipe.momentum(n / 10_000, warmdown, (0.85, 0.95, 0.90), 0.3) for n in range(10_001)]
    assert (min(values), max(values), values[-1]) == pytest.approx((0.85, 0.95, 0.90 if warmdown else 0.95))
    falling = min(warmdown, 0.7)
    steepest = max(0.10 / 0.30, 0.05 / falling if falling else 0)
    assert all(abs(after - before) <= steepest / 10_000 + 1e-12 for before, after in pairwise(values))


def test_known_values_of_momentum():
    found = [recipe.momentum(place, 0.65, (0.85, 0.95, 0.90), 0.3) for place in (0, 0.15, 0.30, 0.35, 0.675, 1)]
    assert found == pytest.approx([0.85, 0.90, 0.95, 0.95, 0.925, 0.90])


def test_weight_decay_falls_from_its_peak_to_zero():
    values = [recipe.weight_decay(place, 0.2) for place in (0, 0.25, 0.5, 1)]
    assert values == pytest.approx([0.2, 0.1 * (1 + math.sqrt(0.5)), 0.1, 0])


@pytest.mark.parametrize("num_steps", [1, 40, 300])
def test_progress_is_the_middle_of_each_step_also_after_a_correction(num_steps):
    for from_step, begin in ((0, 0.0), (10, 0.25)):
        steps = range(from_step + 1, from_step + num_steps + 1)
        places = [recipe.progress_at_step(step, from_step + num_steps, from_step, begin) for step in steps]
        assert places == pytest.approx([begin + (1 - begin) * (n + 0.5) / num_steps for n in range(num_steps)])


def test_the_batch_grows_in_three_parts_and_its_mean_is_that_of_a_fine_grid():
    shares = [recipe.batch_share((n + 0.5) / 100_000) for n in range(100_000)]
    assert shares == sorted(shares)
    assert sorted(set(shares)) == [0.25, 0.5, 1.0]
    assert recipe.mean_batch_share() == pytest.approx(sum(shares) / len(shares))
    for begin in (0.05, 0.1, 0.15, 0.22, 0.5, 0.99):
        rest = shares[round(begin * 100_000) :]
        assert recipe.mean_batch_share(begin) == pytest.approx(sum(rest) / len(rest))
        so_far = sum(shares[: round(begin * 100_000)]) / sum(shares)
        assert recipe.progress_at_tokens(so_far) == pytest.approx(begin, abs=2e-5)
    assert (recipe.progress_at_tokens(0.0), recipe.progress_at_tokens(1.0)) == (0.0, 1.0)
    assert recipe.BATCH_RAMP[-1][0] < 0.25  # a run by time measures whole steps before it corrects its horizon


if __name__ == "__main__":
    depths, kinds = (2, 4, 6, 8, 12, 16, 20, 24, 26, 32), ("cpu", "gpu")
    plans = {f"{n} {kind}": numbers(n, kind == "gpu") for n, kind in itertools.product(depths, kinds)}
    lines = [f'"{name}": {row(plan)}' for name, plan in plans.items()]
    Path(__file__).with_name("plans.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
