"""Between building a model and its first step: the largest batch that fits, compilation, and timing a pass."""

import gc
import re
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace

import torch

from nanotrain import checkpoint, errors, hardware
from nanotrain.dist import DistContext, faults_as_sentences
from nanotrain.errors import MemoryLimitError, UserError
from nanotrain.gpt import GPT, GPTConfig


def least_minutes(dist: DistContext) -> float:
    """Minutes of a timed run below which eager code makes more steps: compiling takes 15 to 28 s on a CPU, and saves a
    fifth of a step where matrix products dominate, a third where AMX makes these fast (dev/LOG.md).
    """
    products_are_fast = dist.device.type != "cpu" or hardware.has_amx()
    return 0.6 if products_are_fast and dist.dtype != torch.float32 else 2.5


def compile_pays(mode: str, dist: DistContext, target_minutes: float) -> bool:
    """Whether to compile: the same at every resume, because eager code gives other bits."""
    return mode == "on" or (mode == "auto" and not 0 < target_minutes < least_minutes(dist))


def largest_batch_that_fits(dist: DistContext, model: GPT, most: int) -> int:
    """Largest of `most`, most / 2, ... sequences that fits on every rank beside weights and optimizer state. Raises
    MemoryLimitError if not even one sequence fits.
    """
    batch_size = most
    while batch_size:
        try:
            # Before compilation: eager code takes at least as much memory, and no minute of compilation for each size.
            for _ in range(2):  # the second pass with gradients allocated, as in later micro-steps
                one_pass(dist, model, batch_size)
            failed = False
        except (RuntimeError, MemoryError) as error:
            if not hardware.is_out_of_memory(error):
                raise
            failed = True
        # Outside the handler: the traceback has let go of its tensors.
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
    """Run a forward and backward pass over `batch_size` sequences, leaving gradients; return its seconds."""
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
    """On a CPU, compile in a thread what a model of this shape needs, through one with a single layer, as the body
    runs. `compile_and_warm_up` then finds the code, or fails in the same way and says so.
    """
    if dist.device.type != "cpu" or not compile_pays(mode, dist, target_minutes):
        yield
        return
    import torch._inductor.compile_fx  # here: two threads must not import it at once, and eager runs do without

    num_threads = torch.get_num_threads()

    def work():
        torch.set_num_threads(num_threads)  # per thread, and compiled into the code
        with suppress(Exception):
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
    """Compile the model if that pays (see `compile_pays`), and return the seconds of a pass. If that fails on any rank,
    all stay eager; with mode "on" that is a UserError.
    """
    pays = compile_pays(mode, dist, target_minutes)
    if mode == "auto" and not pays:
        dist.print0(f"compile    off below {least_minutes(dist):g} minutes (--compile=on forces it)")
    with memory_limit(batch_size, model):
        failures = dist.all_gather_objects(_compile(dist, model, batch_size) if pays else "")
        failure = next(filter(None, failures), "")
        if failure and mode == "on":
            raise UserError(f"--compile=on: compilation fails here ({failure}): use --compile=auto or --compile=off")
        if failure:
            torch.compiler.set_stance("force_eager")
            dist.print0(f"compile    off, it fails here ({failure})")
        elif pays:
            dist.print0(f"compile    ready, {hardware.seconds_since_start():.0f} s after the start")
        one_pass(dist, model, batch_size)
        seconds = one_pass(dist, model, batch_size)
        model.zero_grad()
        return seconds


def _compile(dist, model, batch_size):
    """Compile in a first pass. Returns the reason if that fails, else ""."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # here: eager runs do without this slow import

    try:
        cache = cache_dir()
    except OSError as error:
        return str(errors.file_error(error))
    python = sysconfig.get_path("include"), sysconfig.get_config_var("LIBDIR")
    for path in (torch.__path__[0], *python, cache) if dist.device.type == "cpu" else ():
        if re.search(r"[\s'\"\\]", path or ""):
            return f"torch does not quote paths for the C++ compiler, and this one has a space or a quote: {path}"
    for attempt in range(2):  # torch's parallel compilers sometimes read a half-written header
        # First trust the CPU's vector flags: torch's own test of them takes as long as compiling a model.
        torch._inductor.config.cpp.vec_isa_ok = True if attempt == 0 else None
        model.compile_parts()
        try:
            one_pass(dist, model, batch_size)
            return ""
        except Exception as error:
            if hardware.is_out_of_memory(error):
                raise
            torch.compiler.reset()
            said = re.search(".* error: .*", str(error))  # the C++ compiler's line, below torch's
            failure = f"{type(error).__name__}: {(said[0] if said else errors.first_line(error))[:100]}"
    return failure


def memory_limit(batch_size: int, model: GPT) -> AbstractContextManager:
    """Context in which out of memory becomes a MemoryLimitError that names what to lower."""
    return faults_as_sentences(when_lost=None, when_full=f": {_less_memory(batch_size, model)}")


def _less_memory(batch_size, model):
    smaller = f"--device-batch-size={batch_size // 2}" if batch_size > 1 else "a smaller --max-seq-len"
    return f"try {smaller}, {'' if model.recompute_blocks else '--grad-checkpoint, '}or a smaller --depth"
