"""Plans against arithmetic done by hand, and the laws of batches."""

import json
import math
import random

import pytest
import torch

from nanotrain import scaling
from nanotrain.errors import UserError
from nanotrain.gpt import GPT, GPTConfig
from nanotrain.memory import Kept, Memory
from nanotrain.scaling import Horizon


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("depth", [1, 4, 5, 6, 12])
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
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())


# ---- batch ----


def test_split_batch_meets_the_total_exactly_or_names_three_that_work():
    draw = random.Random(0)
    met = refused = 0
    for _ in range(3000):
        seq_len, most, world_size = draw.choice((1, 7, 64, 256)), draw.randint(1, 40), draw.randint(1, 9)
        total = draw.choice((draw.randint(1, 100), draw.randint(1, 40) * world_size)) * draw.choice((1, seq_len))
        refusal = None
        try:
            rows, accumulation = scaling.split_batch(total, seq_len, most, world_size)
        except UserError as error:
            refusal = str(error)
        if refusal:
            refused += 1
            assert total % (seq_len * world_size)
            assert f"--total-batch-size={total} " in refusal
            works = [int(number) for number in refusal.partition("three that work are ")[2].split(", ")]
            assert len(set(works)) == 3
            assert abs(works[0] - total) < seq_len * world_size
            for other in works:
                rows, accumulation = scaling.split_batch(other, seq_len, most, world_size)
                assert rows * accumulation * seq_len * world_size == other
        else:
            met += 1
            assert rows * accumulation * seq_len * world_size == total
            assert 1 <= rows <= most
            rank_rows = total // (seq_len * world_size)
            assert not any(rank_rows % larger == 0 for larger in range(rows + 1, most + 1))
    assert met > 500
    assert refused > 500


def test_a_batch_in_parts_is_made_of_whole_passes():
    for rank_rows in range(1, 65):
        for most in range(1, 20):
            if rank_rows % 4:
                with pytest.raises(UserError, match=r"1 ranks x rows of 16 x 4 parts of a growing batch"):
                    scaling.split_batch(16 * rank_rows, 16, most, 1, 4)
                continue
            rows, accumulation = scaling.split_batch(16 * rank_rows, 16, most, 1, 4)
            assert (rows * accumulation, accumulation % 4) == (rank_rows, 0)
            assert not any(rank_rows // 4 % larger == 0 for larger in range(rows + 1, most + 1))
    assert scaling.batch_tokens(3e6, 1000, 2, 4) == 8000


@pytest.mark.parametrize("total", [0, -512])
def test_a_batch_without_tokens_is_refused(total):
    with pytest.raises(UserError, match=rf"--total-batch-size={total} .*: three that work are 512, 1024, 1536"):
        scaling.split_batch(total, 256, 16, 2)


def test_a_device_batch_without_rows_is_refused():
    with pytest.raises(UserError, match="--device-batch-size=0"):
        scaling.split_batch(1024, 256, 0, 1)


@pytest.mark.parametrize(
    ("training_tokens", "expected"),
    [(1e3, 4096), (3e6, 4096), (1.4e9, 2**19), (1e13, 2**20)],
)
def test_batch_goes_through_the_recipes_that_it_was_fitted_to(training_tokens, expected):
    assert scaling.batch_tokens(training_tokens, 256, 1) == expected


@pytest.mark.parametrize("seq_len", [64, 256, 1000, 2048])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_a_planned_batch_can_be_met_and_is_near_a_power_of_two(world_size, seq_len):
    unit, before = world_size * seq_len, 0
    for exponent in range(5, 13):
        total = scaling.batch_tokens(10.0**exponent, seq_len, world_size)
        rows, accumulation = scaling.split_batch(total, seq_len, 16, world_size)
        assert rows * accumulation * unit == total
        powers = [2**n for n in range(12, 21)]
        assert total == unit or min(abs(total - power) for power in powers) <= unit / 2
        assert total >= before
        before = total


# ---- the plan ----

COUNTS = {
    "matrix": 1000,
    "unembedding": 200,
    "embedding": 200,
    "value_embedding": 400,
    "gate": 16,
    "residual": 2,
    "x0": 3,
}
PER_TOKEN = 6 * (1000 + 200) + 12 * 2 * 8 * 16  # of depth 2, width 8, rows of 16


def plan(horizon, total_batch_size=64, device_batch_size=2, world_size=1, flops_per_second=1e6):
    kept = Kept(4, False, False, 512)
    return scaling.make_plan(
        COUNTS,
        GPTConfig(25, 16, 2, 1, 1, 8),
        horizon,
        total_batch_size=total_batch_size,
        device_batch_size=device_batch_size,
        world_size=world_size,
        flops_per_second=flops_per_second,
        kept=kept,
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
    assert made.flops == PER_TOKEN * 64 * steps
    assert made.seconds == pytest.approx(PER_TOKEN * 64 * steps / 1e6)
    assert made.parameters == COUNTS
    assert (made.total_batch_size, made.device_rows, made.accumulation) == (64, 2, 2)


@pytest.mark.parametrize(
    ("world_size", "device_batch_size", "rows", "accumulation"),
    [(1, 16, 12, 1), (1, 5, 4, 3), (2, 5, 3, 2), (3, 5, 4, 1)],
)
def test_a_step_has_the_same_tokens_on_any_number_of_ranks(world_size, device_batch_size, rows, accumulation):
    made = plan(Horizon(num_iterations=3), 192, device_batch_size, world_size)
    assert (made.device_rows, made.accumulation, made.tokens) == (rows, accumulation, 3 * 192)


@pytest.mark.parametrize(
    "horizon", [Horizon(num_iterations=5), Horizon(param_data_ratio=1e6), Horizon(target_flops=1e15)]
)
def test_the_batch_follows_the_training_tokens_where_none_is_asked_for(horizon):
    tokens = horizon.target_flops / PER_TOKEN if horizon.target_flops else horizon.param_data_ratio * 1200
    made = plan(horizon, total_batch_size=0, world_size=2)
    assert made.total_batch_size == scaling.batch_tokens(tokens, 16, 2)
    assert made.tokens == made.num_steps * made.total_batch_size


def test_a_plan_survives_json():
    made = plan(Horizon(num_iterations=3))
    again = json.loads(json.dumps(made.to_dict()))
    assert scaling.Plan(**{**again, "memory": Memory(**again["memory"])}) == made


# ---- the dial ----


@pytest.mark.parametrize(
    ("depth", "aspect_ratio", "head_dim", "expected"),
    [
        (4, 64, 128, (256, 2)),
        (5, 64, 128, (384, 3)),
        (12, 64, 128, (768, 6)),
        (1, 64, 128, (128, 1)),
        (3, 7, 4, (24, 6)),
    ],
)
def test_width_follows_depth_in_whole_heads(depth, aspect_ratio, head_dim, expected):
    assert scaling.model_width(depth, aspect_ratio, head_dim) == expected


@pytest.mark.parametrize("bad", [(0, 64, 128), (-1, 64, 128), (4, -1, 128), (4, 64, 0), (4, 64, 1), (4, 64, 7)])
def test_impossible_shapes_are_refused_with_their_values(bad):
    with pytest.raises(UserError, match="--depth={} --aspect-ratio={} --head-dim={}".format(*bad)):
        scaling.model_width(*bad)


def test_table_rates_fall_with_the_root_of_the_width():
    assert scaling.width_factor(768) == 1
    assert scaling.width_factor(3072) == pytest.approx(0.5)
    assert scaling.width_factor(192) == pytest.approx(2)


# ---- the dial ----


@pytest.mark.parametrize(
    ("depth", "width"), [(1, 256), (2, 256), (4, 256), (5, 384), (6, 384), (8, 512), (12, 768), (20, 1280)]
)
def test_without_an_aspect_ratio_the_width_is_64_a_layer_and_at_least_256(depth, width):
    assert scaling.model_width(depth, 0, 128) == (width, width // 128)


def weights_of(depth):
    width, _ = scaling.model_width(depth, 0, 128)
    return 12 * depth * width**2 + scaling.vocabulary(width) * width


def test_the_chosen_depth_grows_with_the_operations_and_passes_the_published_optimum():
    depths = [scaling.choose_depth(10.0**power, 128) for power in range(10, 23)]
    assert depths == sorted(depths)
    assert depths[0] == 2
    assert depths[-1] == scaling.MOST_LAYERS
    at_anchor = [scaling.choose_depth(flops, 128) for flops in (scaling.OPTIMUM_FLOPS, 1e18)]
    for depth, best in zip(at_anchor, (scaling.OPTIMUM_WEIGHTS, 129e6), strict=True):
        nearest = min(range(2, 27), key=lambda other: abs(math.log(weights_of(other) / best)))
        assert depth == nearest
    assert at_anchor[1] in (11, 12, 13)


def test_vocabulary_and_rows_grow_with_the_width():
    widths = (128, 256, 384, 512, 640, 768, 2048)
    assert [scaling.vocabulary(width) for width in widths] == [4096, 4096, 8192, 8192, 16384, 32768, 32768]
    assert [scaling.row_length(width) for width in widths] == [256, 256, 256, 512, 1024, 2048, 2048]


def test_the_operations_of_a_run_by_time_leave_out_its_start_but_never_all_of_it():
    assert scaling.training_flops(2, 1e9) == (120 - scaling.START_SECONDS) * 1e9
    assert scaling.training_flops(0.1, 1e9) == 3e9
