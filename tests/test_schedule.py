"""The schedules by their known values and by laws over many runs."""

import itertools
import math
from itertools import pairwise

import pytest

from nanotrain import schedule

LENGTHS = (1, 2, 5, 20, 50, 10_000)
# (warmup, warmdown, final)
RATIOS = (
    (0.04, 0.65, 0.03),
    (0.0, 0.65, 0.03),
    (0.0, 0.0, 0.5),
    (0.5, 0.5, 0.0),
    (0.02, 1.0 - 0.02, 0.1),
    (1.0, 0.0, 0.2),
)


def factors(shape, num_steps, ratios):
    return [schedule.SHAPES[shape](schedule.progress(step, num_steps), *ratios) for step in range(1, num_steps + 1)]


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_progress_is_the_middle_of_each_step(num_steps):
    places = [schedule.progress(step, num_steps) for step in range(1, num_steps + 1)]
    assert places[0] == pytest.approx(0.5 / num_steps)
    assert places[-1] == pytest.approx(1 - 0.5 / num_steps)
    assert all(after - before == pytest.approx(1 / num_steps) for before, after in pairwise(places))


@pytest.mark.parametrize("ratios", RATIOS)
@pytest.mark.parametrize("shape", schedule.SHAPES)
def test_no_step_has_a_rate_of_zero_or_above_its_peak(shape, ratios):
    for num_steps in LENGTHS:
        assert all(0 < factor <= 1 for factor in factors(shape, num_steps, ratios))


@pytest.mark.parametrize("ratios", RATIOS)
@pytest.mark.parametrize("shape", schedule.SHAPES)
def test_no_jump_is_larger_than_the_steepest_slope_allows(shape, ratios):
    warmup, warmdown, final = ratios
    up = 1 / warmup if warmup else 0
    if shape == "cosine":
        down = (1 - final) * math.pi / 2 / (1 - warmup) if warmup < 1 else 0
    else:
        length = warmdown if shape == "trapezoid" else 1 - warmup
        down = (1 - final) / length if length else 0
    for num_steps in LENGTHS:
        limit = max(up, down) / num_steps + 1e-12
        assert all(abs(after - before) <= limit for before, after in pairwise(factors(shape, num_steps, ratios)))


@pytest.mark.parametrize("num_steps", LENGTHS)
@pytest.mark.parametrize("shape", schedule.SHAPES)
def test_the_rate_rises_once_then_falls_to_its_end(shape, num_steps):
    rates = factors(shape, num_steps, (0.04, 0.65, 0.03))
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0.03 < rates[-1] <= 0.03 + 0.97 * 0.5 / num_steps / 0.65 + 1e-12
    if num_steps >= 20:  # else the middle of the first step may lie behind the warmup
        assert rates[0] == pytest.approx(0.5 / num_steps / 0.04)
        assert max(rates) > 0.95


@pytest.mark.parametrize(
    ("shape", "place", "expected"),
    [
        ("trapezoid", 0.01, 0.25),
        ("trapezoid", 0.04, 1.0),
        ("trapezoid", 0.35, 1.0),
        ("trapezoid", 0.675, 0.515),
        ("trapezoid", 0.9, 0.03 + 0.97 * 0.1 / 0.65),
        ("trapezoid", 1.0, 0.03),
        ("cosine", 0.02, 0.5),
        ("cosine", 0.04, 1.0),
        ("cosine", 0.28, 0.03 + 0.97 * (1 + math.sqrt(0.5)) / 2),
        ("cosine", 0.52, 0.515),
        ("cosine", 1.0, 0.03),
        ("linear", 0.02, 0.5),
        ("linear", 0.04, 1.0),
        ("linear", 0.28, 0.7575),
        ("linear", 0.52, 0.515),
        ("linear", 1.0, 0.03),
    ],
)
def test_known_values(shape, place, expected):
    assert schedule.SHAPES[shape](place, 0.04, 0.65, 0.03) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_warmdown_plays_no_part_in_the_other_shapes(shape):
    assert factors(shape, 50, (0.1, 0.2, 0.03)) == factors(shape, 50, (0.1, 0.9, 0.03))


@pytest.mark.parametrize("warmdown", [0.0, 0.3, 0.65, 0.7, 0.9, 1.0])
def test_momentum_is_continuous_and_within_its_bounds(warmdown):
    values = [schedule.momentum(n / 10_000, warmdown) for n in range(10_001)]
    assert values[0] == pytest.approx(0.85)
    assert max(values) == pytest.approx(0.95)
    assert min(values) == pytest.approx(0.85)
    assert values[-1] == pytest.approx(0.90 if warmdown else 0.95)
    falling = min(warmdown, 0.7)
    steepest = max(0.10 / 0.30, 0.05 / falling if falling else 0)
    assert all(abs(after - before) <= steepest / 10_000 + 1e-12 for before, after in pairwise(values))


@pytest.mark.parametrize(
    ("place", "warmdown", "expected"),
    [
        (0.15, 0.65, 0.90),
        (0.30, 0.65, 0.95),
        (0.35, 0.65, 0.95),
        (0.675, 0.65, 0.925),
        (0.65, 1.0, 0.925),
        (0.8, 0.4, 0.925),
    ],
)
def test_known_values_of_momentum(place, warmdown, expected):
    assert schedule.momentum(place, warmdown) == pytest.approx(expected)


def test_weight_decay_falls_from_its_peak_to_zero():
    values = [schedule.weight_decay(n / 1000, 0.2) for n in range(1001)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 0.2
    assert values[250] == pytest.approx(0.1 * (1 + math.sqrt(0.5)))
    assert values[500] == pytest.approx(0.1)
    assert values[1000] == pytest.approx(0, abs=1e-15)
    assert schedule.weight_decay(0.3, 0.0) == 0


@pytest.mark.parametrize("num_steps", [12, 40, 300])
def test_a_corrected_number_of_steps_makes_no_jump(num_steps):
    before = schedule.progress(10, 40)
    after = [schedule.progress(step, num_steps, 10, 10 / 40) for step in range(11, num_steps + 1)]
    assert before < 10 / 40 < after[0] <= 10 / 40 + 0.75 / (num_steps - 10)
    assert after[-1] == pytest.approx(1 - 0.375 / (num_steps - 10))
    gaps = {round(second - first, 9) for first, second in itertools.pairwise(after)}
    assert gaps == {round(0.75 / (num_steps - 10), 9)}


# ---- a growing batch ----


def test_the_batch_grows_in_three_parts_and_its_mean_is_that_of_a_fine_grid():
    shares = [schedule.batch_share((n + 0.5) / 100_000) for n in range(100_000)]
    assert shares == sorted(shares)
    assert sorted(set(shares)) == [0.25, 0.5, 1.0]
    assert schedule.mean_batch_share() == pytest.approx(sum(shares) / len(shares))
    for begin in (0.05, 0.1, 0.15, 0.22, 0.5, 0.99):
        rest = shares[round(begin * 100_000) :]
        assert schedule.mean_batch_share(begin) == pytest.approx(sum(rest) / len(rest))
        so_far = sum(shares[: round(begin * 100_000)]) / sum(shares)
        assert schedule.progress_at(so_far) == pytest.approx(begin, abs=2e-5)
    assert (schedule.progress_at(0.0), schedule.progress_at(1.0)) == (0.0, 1.0)
    assert schedule.BATCH_RAMP[-1][0] < 0.25  # a run by time measures whole steps before it corrects its horizon
