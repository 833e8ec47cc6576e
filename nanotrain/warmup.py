"""Between building a model and its first step: the largest batch that fits, compilation, and the time of a pass."""

import gc
import re
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch

from nanotrain import checkpoint, errors, hardware
from nanotrain.dist import DistContext, faults_as_sentences
from nanotrain.errors import MemoryLimitError, UserError
from nanotrain.gpt import GPT, GPTConfig

# Minutes of a timed run below which eager code makes more steps: compiling takes 8 to 33 s on a CPU, and saves a fifth
# of a step in float32, where matrix products dominate (dev/LOG.md).
COMPILE_MINUTES = {torch.float32: 2.5, torch.bfloat16: 0.6, torch.float16: 0.6}


def compile_pays(mode: str, dtype: torch.dtype, target_minutes: float) -> bool:
    """Whether to compile: the same at every resume, because eager code gives other bits."""
    return mode == "on" or (mode == "auto" and not 0 < target_minutes < COMPILE_MINUTES[dtype])


def largest_batch_that_fits(dist: DistContext, model: GPT, most: int) -> int:
    """The first of `most` sequences, half of it, and so on, that fits on every rank beside weights and optimizer state.
    Raises MemoryLimitError if not even one does.
    """
    batch_size = most
    while batch_size:
        try:
            # Eager, which takes no less memory than compiled code, and no minute of compilation for each size.
            with torch.compiler.set_stance("force_eager"):
                for _ in range(2):  # the second with the gradients there, as micro-steps have them
                    one_pass(dist, model, batch_size)
            failed = False
        except (RuntimeError, MemoryError) as error:
            if not hardware.is_out_of_memory(error):
                raise
            failed = True
        # Only here, where the error and the frames of its traceback have gone, can their tensors go too.
        model.zero_grad()
        gc.collect()
        if dist.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(dist.device)
        if not any(dist.all_gather_objects(failed)):
            return batch_size
        batch_size //= 2
    raise MemoryLimitError(f"out of memory with a single sequence: {_less_memory(1, model)}")


def one_pass(dist: DistContext, model: GPT, batch_size: int) -> float:
    """Seconds of a forward and backward pass over so many sequences, which leaves its gradients."""
    tokens = torch.zeros(batch_size, model.config.max_seq_len, dtype=torch.int64, device=dist.device)
    begin = time.monotonic()
    with dist.autocast():
        loss = model(tokens, tokens)
    loss.backward()
    hardware.synchronize(dist.device)
    return time.monotonic() - begin


@contextmanager
def compiling_ahead(
    dist: DistContext, config: GPTConfig, batch_size: int, mode: str, target_minutes: float
) -> Iterator[None]:
    """Meanwhile compile, in a thread on a CPU, what a model of this shape needs for such batches, by way of one with a
    single layer. If that fails, `compile_and_warm_up` finds out again.
    """
    if dist.device.type != "cpu" or not compile_pays(mode, dist.dtype, target_minutes):
        yield
        return
    import torch._inductor.compile_fx  # here, because two threads must not import the compiler at once

    num_threads = torch.get_num_threads()

    def work():
        torch.set_num_threads(num_threads)  # every thread has its own number, and the code depends on it
        model = checkpoint.build_model(replace(config, num_layers=1, bigram_rows=0), dist.device)
        model.init_weights(0)
        _compile(dist, model, batch_size)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def compile_and_warm_up(dist: DistContext, model: GPT, batch_size: int, mode: str, target_minutes: float) -> float:
    """Compile the model if that pays (see `compile_pays`), and return the seconds of a pass afterwards. Where compiling
    fails on one rank, all stay eager; with mode "on" that is a UserError.
    """
    pays = compile_pays(mode, dist.dtype, target_minutes)
    if mode == "auto" and not pays:
        dist.print0(f"compile    off: it pays from {COMPILE_MINUTES[dist.dtype]:g} minutes (--compile=on all the same)")
    begin = time.monotonic()
    with memory_limit(batch_size, model):
        failures = dist.all_gather_objects(_compile(dist, model, batch_size) if pays else "")
        failure = next(filter(None, failures), "")
        if failure and mode == "on":
            raise UserError(f"--compile=on: it does not work here ({failure}): give --compile=auto or --compile=off")
        if failure:
            torch.compiler.set_stance("force_eager")
            dist.print0(f"compile    off, because it does not work here ({failure})")
        elif pays:
            dist.print0(f"compile    ready in {time.monotonic() - begin:.0f} s")
        seconds = [one_pass(dist, model, batch_size) for _ in range(3)]
        model.zero_grad()
        return min(seconds[1:])


def _compile(dist, model, batch_size):
    """Compile in a first pass. Returns why that failed, or ""."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # here: it takes a while, and eager runs do without

    try:
        cache = cache_dir()
    except OSError as error:
        return str(errors.file_error(error))
    python = sysconfig.get_path("include"), sysconfig.get_config_var("LIBDIR")
    for path in (torch.__path__[0], *python, cache) if dist.device.type == "cpu" else ():
        if re.search(r"[\s'\"\\]", path or ""):
            return f"torch gives the C++ compiler paths without quotes, so none may have a space, unlike {path}"
    for attempt in range(2):  # torch's parallel compilers sometimes read a header that is only half written
        # At first trust the CPU's flags for vector instructions: torch's own test of them takes as long as a model.
        torch._inductor.config.cpp.vec_isa_ok = True if attempt == 0 else None
        model.compile_parts()
        try:
            one_pass(dist, model, batch_size)
            return ""
        except Exception as error:
            if hardware.is_out_of_memory(error):
                raise
            torch.compiler.reset()
            said = re.search(".* error: .*", str(error))  # of a C++ compiler, below torch's own line
            failure = f"{type(error).__name__}: {(said[0] if said else errors.first_line(error))[:100]}"
    return failure


def memory_limit(batch_size: int, model: GPT) -> AbstractContextManager:
    """Where memory runs out in passes over so many sequences: MemoryLimitError, with what to lower."""
    return faults_as_sentences(when_lost=None, when_full=f": {_less_memory(batch_size, model)}")


def _less_memory(batch_size, model):
    smaller = f"--device-batch-size={batch_size // 2}" if batch_size > 1 else "a smaller --max-seq-len"
    return f"try {smaller}, {'' if model.recompute_blocks else '--grad-checkpoint, '}or a smaller --depth"
