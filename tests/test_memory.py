"""The planned memory of a step against what torch takes."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanotrain import loss, memory, optim, runtime
from nanotrain.checkpoint import build_model
from nanotrain.gpt import GPTConfig
from nanotrain.memory import Kept, memory_plan
from nanotrain.runtime import Runtime


def measured_peak(model, optimizers, rows, accumulation, rt):
    """The most bytes of tensors that torch has had at once during a step, beyond weights and optimizer state."""
    tokens = torch.randint(model.config.vocab_size, (2, rows, model.config.max_seq_len))
    parameters = list(model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(accumulation):
            with rt.autocast():
                mean = model(*tokens) / accumulation
            mean.backward()
        optim.collect_gradients(parameters, rt)
        for optimizer in optimizers:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


RATES = {"matrix": 0.02, "embedding": 0.2, "unembedding": 0.004, "scalar": 0.04}
# (depth, width, vocabulary, tokens of a row, rows of a pass, micro-steps, dtype, moment with and without checkpointing)
MEMORIES = [
    (3, 64, 1024, 128, 8, 2, torch.bfloat16, ("loss", "loss")),
    (4, 128, 256, 256, 4, 1, torch.float32, ("backward", "backward")),
    (6, 128, 256, 32, 2, 1, torch.bfloat16, ("update", "update")),
]


@pytest.mark.parametrize(
    ("depth", "width", "vocab_size", "seq_len", "rows", "accumulation", "dtype", "moments"), MEMORIES
)
def test_the_memory_of_a_step_is_what_the_plan_says(
    depth, width, vocab_size, seq_len, rows, accumulation, dtype, moments
):
    rt = Runtime(0, 0, 1, torch.device("cpu"), dtype, "test")
    model = build_model(GPTConfig(vocab_size, seq_len, depth, width // 32, width // 32, 32, 1000), "cpu")
    model.init_weights(0)
    roles = model.parameters_by_role()
    counts = {role: sum(p.numel() for p in named.values()) for role, named in roles.items()}
    optimizers = optim.build_optimizers(roles, RATES, 0.0, dtype, rt)
    measured, planned = [], []
    for checkpointing, moment in zip((False, True), moments, strict=True):
        if checkpointing:
            model.checkpoint_activations()
        kept = Kept(dtype.itemsize, False, checkpointing, loss.chunk_rows(rt.device))
        needed = memory_plan(counts, model.config, rows, accumulation, 1, kept)
        assert needed.moment == moment
        planned.append(needed.peak - needed.weights - needed.optimizer)
        measured.append(measured_peak(model, optimizers, rows, accumulation, rt))
        state = [tensor for of_one in optimizers for state in of_one.state.values() for tensor in state.values()]
        assert needed.weights == sum(p.nbytes for p in model.parameters())
        assert needed.optimizer == pytest.approx(sum(tensor.nbytes for tensor in state), rel=0.02)
    assert planned == pytest.approx(measured, rel=0.1)
    if "update" not in moments:  # the twin: neither plan fits the other's run
        assert abs(planned[0] / measured[1] - 1) > 0.15


def test_ranks_share_the_optimizer_state_and_hold_all_gradients_during_every_pass():
    kept = Kept(4, False, False, 512)
    counts = {"matrix": 12 * 4 * 64**2, "unembedding": 6400, "embedding": 6400}
    one, four = (memory_plan(counts, GPTConfig(100, 32, 4, 1, 1, 64), 64, 1, ranks, kept) for ranks in (1, 4))
    assert one.optimizer == 4 * 12 * 4 * 64**2 + 8 * 12800
    assert four.optimizer == one.optimizer // 4
    assert (four.weights, four.gradients, four.activations) == (one.weights, one.gradients, one.activations)
    assert one.moment == four.moment == "backward"
    assert four.peak - four.optimizer - (one.peak - one.optimizer) == four.gradients


def test_the_messages_that_are_planned_are_those_that_are_sent():
    assert memory.MESSAGE_BYTES == runtime.MESSAGE_BYTES
