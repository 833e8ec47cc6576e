"""What the path on a CUDA device relies on. What of it can be seen on a CPU is checked there too.

There an operation that would make a GPU wait is recognised by its kind, on CUDA torch itself raises an error.
"""

import contextlib
import math
import time

import numpy as np
import pytest
import torch
from conftest import ALONE, make_model
from test_base_train import _global_state, column, saved, train  # noqa: F401
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanotrain import dataloader, dataset, hardware, metrics, optim
from nanotrain.dist import DistContext
from nanotrain.gpt import GPTConfig
from tests import soak

on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")]
on_each = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
cuda_only = pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_cuda)])
on_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

WAITS = {  # operations whose result, or the size of it, the CPU has to know
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_coalesce",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::equal",
    "aten::is_nonzero",
    "aten::lift_fresh",  # torch.tensor: numbers that are brought to the device
}
RATES = {"matrix": 0.02, "embedding": 0.3, "unembedding": 0.004, "scalar": 0.5}


class Operations(TorchDispatchMode):
    """Records [(name, dtypes of its tensors)] of the operations that run under it in this thread."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
        self.found.append((function._schema.name, {tensor.dtype for tensor in tensors}))
        return function(*arguments, **(options or {}))

    def dtypes_of(self, *names):
        """The set of dtypes that the operations of these names have seen."""
        return set().union(*(dtypes for name, dtypes in self.found if name in names))

    def waits(self):
        """The names of those that would make the CPU wait for a GPU."""
        masks, indexed = {torch.bool, torch.uint8}, {"aten::index", "aten::index_put_"}
        return [name for name, dtypes in self.found if name in WAITS or (name in indexed and masks & dtypes)]


def place_on(device, dtype=torch.bfloat16):
    return DistContext(0, 1, torch.device(device), dtype, "test")


def model_on(device):
    """(model with heads of 128 channels, inputs, targets)."""
    model = make_model(GPTConfig(320, 64, 2, 2, 2, 128), head_std=0.02).to(device)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):  # away from zero, so that every gradient flows
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).to(device)
    tokens = torch.randint(320, (2, 65), generator=torch.Generator().manual_seed(1)).to(device)
    return model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# ---- loader ----


def assert_batches_are_the_sequences(device, data_dir, tokenizer):
    """30 batches of the loader, taken faster than the device copies them, are those that a reader gives."""
    slices = dataloader.slices_of(dataset.open_shards(data_dir).train, 4)
    plain, threaded = (dataloader.SequenceReader(slices, tokenizer, 32, 4, 1) for _ in range(2))
    got = []
    with dataloader.DataLoader(threaded, 64, torch.device(device)) as loader:
        if device == "cuda":
            assert all(filled.result()[0].is_pinned() for filled in loader._filled)
        for _ in range(30):
            if device == "cuda":
                torch.cuda._sleep(20_000_000)  # cycles in which the copy stays behind
            batch = next(loader)
            got.append((batch.inputs, batch.targets))
            time.sleep(0.002)  # in which the thread would fill the slot again
    for inputs, targets in got:
        sequences = np.empty((64, 33), dtype=np.int64)
        plain.fill(sequences)
        assert np.array_equal(targets.cpu().numpy(), sequences[:, 1:])
        assert np.array_equal(inputs.cpu().numpy(), sequences[:, :-1])


@on_each
def test_a_slot_is_filled_again_only_after_the_copy_out_of_it(device, data_dir, tokenizer):
    assert_batches_are_the_sequences(device, data_dir, tokenizer)


# ---- precision and attention ----


@on_each
def test_training_uses_flash_attention_in_bfloat16(device):
    """Forward and backward with nothing but flash attention allowed; products and attention see bfloat16 alone, loss
    and gradients are float32 and those of plain attention.
    """
    results = []
    for allowed in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        model, inputs, targets = model_on(device)
        with sdpa_kernel(allowed), Operations() as operations:
            with place_on(device).autocast():
                loss = model(inputs, targets)
            loss.backward()
        results.append((loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
        flash = [name for name, _ in operations.found if "flash_attention" in name and "backward" not in name]
        if allowed == SDPBackend.MATH:
            assert not flash
        else:
            assert len(flash) == model.config.num_layers
            assert operations.dtypes_of("aten::mm", "aten::addmm") == operations.dtypes_of(flash[0]) == {torch.bfloat16}
    assert {result.dtype for result in results[0]} == {torch.float32}
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).norm() < 0.05 * plain.norm() + 1e-6


# ---- optimizers ----


@on_each
def test_the_optimizers_use_fused_kernels_and_low_precision_and_do_not_wait(device):
    model, inputs, targets = model_on(device)
    dist = place_on(device)
    optimizers = optim.build_optimizers(model.parameters_by_role(), RATES, 0.1, torch.bfloat16, dist)
    model(inputs, targets).backward()
    guarded = contextlib.nullcontext() if device == "cpu" else no_waiting_on_cuda()
    with Operations() as operations, guarded:
        torch.nn.utils.get_total_norm(optim.collect_gradients(list(model.parameters()), dist))
        optim.step(optimizers)
    fused = sum(name == "aten::_fused_adamw_" for name, _ in operations.found)
    assert fused == sum(bool(group["params"]) for group in optimizers[1].param_groups)
    assert operations.dtypes_of("aten::baddbmm") == {torch.bfloat16}
    assert operations.waits() == []
    assert torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all()


@contextlib.contextmanager
def no_waiting_on_cuda():
    """An error where the CPU waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- a step waits once ----


def waits_of_steps(run, monkeypatch, device, **settings):
    """[names of what would wait in each step], from the second one on, and how often each of these steps reads the
    status; on CUDA torch itself raises an error for anything else that waits.
    """
    waited, reads, now = [], [], contextlib.ExitStack()
    set_schedule, total, record = optim.set_schedule, DistContext.all_reduce_sum, metrics.MetricLogger.log_step
    steps = 0

    def beginning(*arguments):
        nonlocal steps
        steps += 1
        if steps > 1:  # the first one makes DDP's and the allocator's memory
            waited.append(now.enter_context(Operations()))
            reads.append(0)
            if device == "cuda":
                now.enter_context(no_waiting_on_cuda())
        set_schedule(*arguments)

    def reading(self, values):
        if not waited or not now._exit_callbacks:
            return total(self, values)
        reads[-1] += 1
        operations, before = waited[-1], len(waited[-1].found)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        found = total(self, values)
        del operations.found[before:]
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        return found

    def ending(*arguments):
        now.close()
        record(*arguments)

    monkeypatch.setattr(optim, "set_schedule", beginning)
    monkeypatch.setattr(DistContext, "all_reduce_sum", reading)
    monkeypatch.setattr(metrics.MetricLogger, "log_step", ending)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: waited and waited[-1].found.append(("wait", [])))
    WAITS.add("wait")
    with now:
        run(DEVICE=device, BIGRAM_ROWS=0, EVAL_EVERY=0, GRAD_CLIP=1.0, NUM_ITERATIONS=4, **settings)
    return [operations.waits() for operations in waited], reads


@on_each
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_waits_for_the_device_once(device, dtype, train, monkeypatch):  # noqa: F811
    waited, reads = waits_of_steps(train, monkeypatch, device, DTYPE=dtype)
    assert reads == [1, 1, 1]
    assert waited == [[], [], []]


def test_the_check_of_waiting_notices_a_number_that_is_read_or_brought(train, monkeypatch):  # noqa: F811
    total_norm = torch.nn.utils.get_total_norm

    def reading(gradients):
        return torch.tensor(total_norm(gradients).item())

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", reading)
    waited, _ = waits_of_steps(train, monkeypatch, "cpu")
    assert waited == [["aten::_local_scalar_dense", "aten::lift_fresh"]] * 3


# ---- ranks ----


@cuda_only
@on_two
def test_two_gpus_train_as_one_does(device, run_script, base_dir, data_dir, tokenizer):
    tokenizer.save(base_dir / "tokenizer")
    losses = []
    for ranks in (1, 2):
        settings = {**soak.TINY, "DEVICE": device, "NUM_ITERATIONS": 10, "DEVICE_BATCH_SIZE": 2, "DATA_DIR": data_dir}
        flags = soak.flags(**settings, RUN_NAME=f"r{ranks}")
        done = run_script("scripts.base_train", *flags, ranks=ranks, timeout=300)
        assert done.returncode == 0, done.stderr
        losses.append(column(base_dir / "runs" / f"r{ranks}", "train/loss"))
    assert max(abs(two / one - 1) for one, two in zip(*losses, strict=True)) < 1e-5


# ---- whole runs ----


@cuda_only
def test_in_float32_a_gpu_trains_as_the_cpu_does(device, train):  # noqa: F811
    runs = [train(name, DEVICE=name, DTYPE="float32", NUM_ITERATIONS=10) for name in ("cpu", device)]
    ours, theirs = (column(run, "train/loss") for run in runs)
    assert max(abs(our / their - 1) for our, their in zip(ours, theirs, strict=True)) < 1e-4


@cuda_only
def test_with_deterministic_a_resume_on_a_gpu_is_exact(device, train, monkeypatch):  # noqa: F811
    settings = {"DEVICE": device, "DTYPE": "bfloat16", "DETERMINISTIC": True, "SAVE_EVERY": 3, "KEEP_LAST": 9}
    straight = train("straight", **settings)
    broken = train("broken", **settings)
    (broken / "checkpoints" / "step_00000006" / "manifest.json").unlink()
    again = train("broken", **settings, RESUME=True)
    for ours, theirs in zip(saved(again)[:2], saved(straight)[:2], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@cuda_only
def test_compiled_blocks_meet_one_shape_and_compute_the_same(device, train):  # noqa: F811
    model, inputs, targets = model_on(device)
    dist = place_on(device)
    torch.compiler.reset()

    def loss_and_gradient():
        model.zero_grad()
        with dist.autocast():
            loss = model(inputs, targets)
        loss.backward()
        return loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    eager = loss_and_gradient()
    model.compile_parts()
    loss_and_gradient()
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = loss_and_gradient()
    torch.compiler.reset()
    assert math.isclose(compiled[0], eager[0], rel_tol=1e-2)
    assert (compiled[1] - eager[1]).norm() < 0.05 * eager[1].norm()


@cuda_only
def test_peak_memory_is_that_of_the_gpu(device):
    dist = place_on(device)
    before = hardware.peak_memory_bytes(dist.device)
    block = torch.empty(2**26, device=device)
    assert hardware.peak_memory_bytes(dist.device) >= max(before, block.nbytes)
    assert hardware.peak_memory_bytes(ALONE.device) != hardware.peak_memory_bytes(dist.device)


@cuda_only
def test_a_fresh_model_is_the_same_as_on_the_cpu(device):
    models = [make_model(GPTConfig(320, 64, 2, 2, 2, 128), head_std=0.02).to(place) for place in ("cpu", device)]
    for model in models:
        model.init_weights(7)
    ours, theirs = (model.state_dict() for model in models)
    assert all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)
