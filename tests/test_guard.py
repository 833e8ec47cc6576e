"""What a run must notice: signals, hangs, losses out of line, ranks that drift apart."""

import math
import os
import random
import signal
import statistics
import time
from types import SimpleNamespace

import pytest
import torch

from nanotrain import guard
from nanotrain.errors import RunError

# ---- a request to stop ----


SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_asks_to_stop_and_says_so_once(number, capfd):
    stop = guard.StopRequest(prints=True)
    assert not stop.requested
    signal.raise_signal(number)
    signal.raise_signal(number)  # at once again: torchrun passes the terminal's Ctrl-C on
    assert stop.requested
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_a_second_ctrl_c_ends_the_process_at_once_but_a_second_sigterm_does_not(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    stop = guard.StopRequest(prints=False)
    signal.raise_signal(signal.SIGINT)
    stop.since -= 2.0
    signal.raise_signal(signal.SIGTERM)
    assert left == []
    signal.raise_signal(signal.SIGINT)
    assert left == [130]


# ---- hangs ----


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def left(monkeypatch):
    """The codes that the process has been ended with."""
    codes = []
    monkeypatch.setattr(guard.Watchdog, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(guard.os, "_exit", codes.append)
    return codes


def test_p7_a_process_that_hangs_is_ended_with_the_stacks_of_all_its_threads(left, capfd):
    with guard.Watchdog(0.1, rank=3):
        assert wait_for(lambda: left)
    said = capfd.readouterr().err
    assert left == [8]
    assert said.startswith("[rank 3] error: no progress for 0 s")
    assert "in wait_for" in said
    assert "in _watch" in said


def test_who_beats_in_time_or_is_closed_is_left_alone_and_each_beat_sets_the_next_limit(left):
    with guard.Watchdog(0.1):
        pass
    with guard.Watchdog(0.5) as watchdog:
        for _ in range(15):
            time.sleep(0.05)
            watchdog.beat(0.5)
        assert left == []
        watchdog.beat(0.1)
        assert wait_for(lambda: left)
    assert left == [8]


# ---- updates that are not finite, and spikes ----


@pytest.mark.parametrize(
    ("skipped", "ends"),
    [
        ([3, 4, 5], True),
        ([1, 3, 5], False),
        ([2, 3, 4, 90], False),
        ([*range(90, 891, 100), 1090], False),  # the first of ten is just too old
        ([*range(90, 891, 100), 1089], True),
    ],
)
def test_several_in_a_row_or_many_within_a_thousand_steps_end_a_run(skipped, ends):
    assert guard.too_many_skipped(skipped, skipped[-1]) is ends


def test_a_spike_is_measured_against_the_accepted_losses_in_their_standard_deviations():
    draw = random.Random(0)
    losses = [3 + 0.1 * draw.random() for _ in range(100)]
    for loss in (3.05, 4.0, 2.0):
        expected = (loss - statistics.mean(losses)) / statistics.pstdev(losses)
        assert guard.deviations(losses, loss) == pytest.approx(expected)
    assert guard.deviations(losses[:31], 100.0) == 0.0, "too few to say anything"
    assert math.isfinite(guard.deviations([2.0] * 64, 3.0))


# ---- ranks that drift apart ----


def among(*sums):
    """The part of a DistContext that the check uses: this rank, and others with these checksums."""
    return SimpleNamespace(world_size=1 + len(sums), all_gather_objects=lambda value: [value, *sums])


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in ((5, 7), (), (3,))] + [torch.zeros(4, 2).t()]


def test_the_checksum_notices_every_single_changed_bit_and_an_exchange_of_tensors():
    tensors = some_tensors()
    expected = guard.checksum(tensors)
    assert guard.checksum([tensor.clone() for tensor in tensors]) == expected
    for tensor in tensors:
        flat = tensor.contiguous().flatten()
        for bit in range(32):
            changed = flat.clone()
            changed.view(torch.int32)[-1] ^= -(2**31) if bit == 31 else 2**bit
            assert guard.checksum([changed if other is tensor else other for other in tensors]) != expected
    assert guard.checksum(tensors[::-1]) != expected


def test_ranks_that_hold_other_weights_are_named_on_all():
    tensors = some_tensors()
    same = guard.checksum(tensors)
    guard.check_replicas(among(same, same), tensors, 7)
    guard.check_replicas(among(same + 1), tensors, 7, every=5)
    with pytest.raises(RunError, match="weights of rank 1, 3"):
        guard.check_replicas(among(same + 1, same, same - 1), tensors, 7)
