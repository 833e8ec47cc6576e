"""Pretrain a base model.

    python -m scripts.base_train --depth=4 --target-minutes=5          one process
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train     eight GPUs

Without a horizon it trains --target-param-data-ratio tokens per weight. Ctrl-C saves and stops; the same command with
--resume goes on.
"""

import contextlib
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel

from nanotrain import (
    bigram_init,
    checkpoint,
    config,
    core_bundle,
    core_eval,
    dataloader,
    dataset,
    errors,
    guard,
    hardware,
    loss_eval,
    optim,
    paths,
    recipe,
    report,
    resume,
    wandb_run,
)
from nanotrain.dist import init_distributed, is_lost_peer
from nanotrain.engine import samples
from nanotrain.errors import CheckpointError, MemoryLimitError, NonFiniteError, PeerError, UserError
from nanotrain.files import write_json
from nanotrain.gpt import GPTConfig
from nanotrain.loss import chunk_rows
from nanotrain.tokenizer import BPETokenizer
from nanotrain.tracker import Tracker

# --- run
RUN_NAME = ""  # folder of the run under NANOTRAIN_DIR/runs; empty: d<depth>, or base where the plan chooses it
RESUME = False  # go on from the newest checkpoint that verifies; without one, start
ALLOW_CHANGE = ""  # settings that --resume may change although they change the training, as in matrix_lr,warmdown_ratio
INIT_FROM = ""  # begin a new run with the weights of this run (or wandb:ENTITY/PROJECT/NAME:ALIAS)
DRY_RUN = False  # print the plan and stop
REPORT = True  # write report/ into the run's folder when it is done
# --- machine
DEVICE = "auto"  # auto, cuda, mps or cpu
DTYPE = "auto"  # of the matrix products: auto, bfloat16, float16 or float32
COMPILE = "auto"  # auto (eager where no compiler works, or where TARGET_MINUTES are too few to repay it), on or off
DETERMINISTIC = False  # repeatable kernels on CUDA too, where they cost time
SEED = 1337  # of the weights and of the order of the data
# --- data
DATA_DIR = ""  # folder of shards; empty: the only data set in NANOTRAIN_DIR/data
TOKENIZER_DIR = ""  # folder of tokenizer.json; empty: NANOTRAIN_DIR/tokenizer
MAX_SEQ_LEN = 0  # tokens of a row; 0: chosen by the width
LANES = 48  # token streams from which sequences are taken in turn
# --- model
DEPTH = 0  # layers; 0: chosen by the horizon in minutes or operations, else 4
ASPECT_RATIO = 0  # width per layer; 0: 64, and a width of at least 256
HEAD_DIM = 128  # the width is rounded up to whole heads
BIGRAM_ROWS = 65536  # of the hashed table of token pairs; 0: no table
PLAIN = False  # only what transformers' own NanoChat class has, so no table of pairs either: for scripts.export_hf
SPECTRAL_TOKENS = 2_000_000  # counted for bigram init of embedding and head (vocabularies to 16,384); 0: random init
# --- horizon: at most one of the first three
NUM_ITERATIONS = 0  # optimizer steps
TARGET_FLOPS = 0.0  # floating-point operations
TARGET_MINUTES = 0.0  # from process start to the last save
EVALUATIONS_AFTER = 0.0  # of EVAL_TOKENS each, for which TARGET_MINUTES leaves time after the run
TARGET_PARAM_DATA_RATIO = 10.0  # training tokens per matrix and head weight, where none of the others is set
# --- batch
TOTAL_BATCH_SIZE = 0  # tokens of one optimizer step; 0: by the plan
BATCH_RAMP = False  # begin with a quarter of the micro-steps, then half of them
DEVICE_BATCH_SIZE = 16  # rows of one forward pass, lowered to a divisor; 0: on CUDA the most that fit, elsewhere 16
GRAD_CHECKPOINT = False  # run each block again in the backward pass: less memory, more time, the same bits
# --- optimization
MATRIX_LR = 0.04  # Muon, for the matrices of the blocks
EMBEDDING_LR = 0.35  # AdamW, for the token embedding (half of it for value embeddings), at width 768
UNEMBEDDING_LR = 0.005  # AdamW, for the head, at width 768
SCALAR_LR = 0.05  # AdamW, for residual scalars and gates
WEIGHT_DECAY = 0.0  # of the matrices, at the start; it falls to zero
GRAD_CLIP = 0.0  # largest norm of the gradient; 0: not clipped
SCHEDULE = "wsd"  # of the learning rate: wsd (warmup-stable-decay), cosine or linear
WARMUP_RATIO = 0.04  # share of the run in which the learning rate rises
WARMDOWN_RATIO = 0.65  # share of the run in which it falls (wsd), and Muon's momentum a little
FINAL_LR_FRAC = 0.03  # where it ends, as a share of its peak
# --- evaluation and saving: every so many steps and at the last; 0: never
EVAL_EVERY = 250  # bits per byte on validation rows
EVAL_TOKENS = 131072  # of the validation shard
CORE_METRIC_EVERY = 0  # the tasks of CORE
CORE_BUNDLE = ""  # folder or zip of tasks, or own: those of the validation shard; empty: CORE's public one, fetched
CORE_MAX_PER_TASK = 500  # items of each task; 0: all
SAMPLE_EVERY = 0  # print a few continuations
SAVE_EVERY = 250  # checkpoint (the last step always saves one)
KEEP_LAST = 2  # newest checkpoints that stay
KEEP_EVERY = 0  # steps between checkpoints that stay for good
EARLY_STOP_PATIENCE = 0  # evaluations in a row without a better one after which the run ends; 0: off
EARLY_STOP_MIN_DELTA = 0.0  # by how many bits per byte an evaluation must be better to count
# --- wandb
WANDB = "off"  # off, offline or online
WANDB_PROJECT = "nanotrain"  # that the run belongs to
WANDB_TAGS = ""  # of the run, as in baseline,cpu
WANDB_NOTES = ""  # about the run
WANDB_LOG_EVERY = 10  # steps between those whose numbers are logged; metrics.jsonl has all
# -----------

# What --resume does with a setting that differs from the checkpoint's: refused, or to be allowed by name, or free.
IDENTITY = (
    "SEED", "MAX_SEQ_LEN", "LANES", "DEPTH", "ASPECT_RATIO", "HEAD_DIM", "BIGRAM_ROWS", "PLAIN", "SPECTRAL_TOKENS",
    "INIT_FROM",
)  # fmt: skip
HORIZON = ("NUM_ITERATIONS", "TARGET_FLOPS", "TARGET_MINUTES", "TARGET_PARAM_DATA_RATIO")
TRAJECTORY = (
    *HORIZON, "TOTAL_BATCH_SIZE", "BATCH_RAMP", "MATRIX_LR", "EMBEDDING_LR", "UNEMBEDDING_LR", "SCALAR_LR",
    "WEIGHT_DECAY", "GRAD_CLIP", "SCHEDULE", "WARMUP_RATIO", "WARMDOWN_RATIO", "FINAL_LR_FRAC", "DTYPE", "COMPILE",
    "DETERMINISTIC",
)  # fmt: skip
FREE = (
    "RUN_NAME", "RESUME", "ALLOW_CHANGE", "DRY_RUN", "DEVICE", "DATA_DIR", "TOKENIZER_DIR", "DEVICE_BATCH_SIZE",
    "GRAD_CHECKPOINT", "EVAL_EVERY", "EVAL_TOKENS", "EVALUATIONS_AFTER", "CORE_METRIC_EVERY", "CORE_BUNDLE",
    "CORE_MAX_PER_TASK", "REPORT", "SAMPLE_EVERY", "SAVE_EVERY", "KEEP_LAST", "KEEP_EVERY", "EARLY_STOP_PATIENCE",
    "EARLY_STOP_MIN_DELTA", "WANDB", "WANDB_PROJECT", "WANDB_TAGS", "WANDB_NOTES", "WANDB_LOG_EVERY",
)  # fmt: skip

REFIT_PROGRESS = 0.25  # with TARGET_MINUTES the number of steps is corrected once here, where the learning rate is flat
STEP_PER_PASSES = 1.25  # until steps have been timed: a step takes so many times its forward and backward passes
# TARGET_MINUTES leaves time for evaluations that are so much slower than the last, and for the last save
SLOWER_LATER, LAST_SAVE_SECONDS = 1.1, 1.0
# TARGET_MINUTES below which eager code makes more steps: compiling takes 8 to 33 s of a CPU, and in float32, where the
# products take most of the time, it saves little of a step (dev/LOG.md)
COMPILE_MINUTES = {torch.float32: 5.0, torch.bfloat16: 0.6, torch.float16: 0.6}
SPECTRAL_RUNS = 5  # SPECTRAL_TOKENS is at most so many times the tokens of the run
DEFAULT_DEPTH = 4
DEFAULT_ROWS = 16  # of a forward pass
SLOW_SECONDS = 1800.0  # without progress after which a rank counts as hung, outside of steps
STEP_SECONDS, SLOW_STEP_FACTOR = 120.0, 20.0  # and in a step: this, or so many times the median step if that is more
DRIFT_EVERY = 500  # steps between comparisons of the weights of all ranks
FAILED_SAVES_LIMIT = 3  # in a row
SAMPLE_TOKENS = 48  # of a continuation


@dataclass
class Run:
    """What changes as a run goes on; a checkpoint keeps all of it."""

    num_steps: int = 0
    horizon_fixed: bool = False  # until a run by TARGET_MINUTES has corrected num_steps
    step: int = 0  # finished optimizer steps
    corrected_step: int = 0  # after which num_steps was last corrected
    corrected_progress: float = 0.0  # the progress there, in [0, 1]
    seconds: float = 0.0  # that earlier processes spent on this run
    skipped_steps: int = 0
    skipped_recently: list = field(default_factory=list)  # the last of them
    recent_losses: list = field(default_factory=list)  # of the steps that counted
    val_bpb: float | None = None  # of the last evaluation
    evaluated_step: int = -1  # when that was
    assessed_step: int = 0  # after which all that was due has been done: evaluation, tasks, samples
    evaluation_seconds: float = 0.0  # that it took, and those of the tasks
    core_seconds: float = 0.0
    best_bpb: float | None = None
    best_step: int = -1
    goal_bpb: float | None = None  # what the next evaluation must beat, for early stopping
    stale_evaluations: int = 0  # in a row that did not
    wandb_id: str | None = None

    def progress(self, step):
        """The progress in (0, 1) at a step of this run."""
        return recipe.progress_at_step(step, self.num_steps, self.corrected_step, self.corrected_progress)

    def correct(self, num_steps, progress):
        """Give the run `num_steps`, and spread what is left of its progress over those to come."""
        self.num_steps, self.corrected_step, self.corrected_progress = num_steps, self.step, progress

    def correction_is_due(self):
        """Whether so many steps have been timed that the number of all of them can be corrected."""
        begun, planned = self.step - self.corrected_step, self.num_steps - self.corrected_step
        return not self.horizon_fixed and begun >= REFIT_PROGRESS * planned


def main():
    check_settings()
    stop = guard.StopRequest(speaks=os.environ.get("RANK", "0") == "0")
    dist = init_distributed(DEVICE, DTYPE, SEED, DETERMINISTIC)
    with guard.Watchdog(SLOW_SECONDS, dist.rank) as watchdog:
        pretrain(dist, stop, watchdog)
    dist.close()


def pretrain(dist, stop, watchdog):
    """The run, from its data to its last checkpoint. `stop.requested` ends it early, `watchdog` is told of progress."""
    run_name = RUN_NAME or (f"d{DEPTH}" if DEPTH else "base")
    run_dir = paths.run_dir(run_name)

    # ---- data, and the checkpoint to go on from ----
    tokenizer = BPETokenizer.load(paths.tokenizer_dir(TOKENIZER_DIR))
    shards = dist.on_all_ranks(lambda: dataset.open_shards(paths.data_dir(DATA_DIR)))
    resume.check_nodes(dist, tokenizer, shards)
    data = dist.on_rank0(lambda: dataset.fingerprint(shards))
    settings = config.settings(globals())
    saved, model_tensors, optimizer_tensors = resume.load_checkpoint(dist, run_dir, run_name, RESUME)
    if saved:
        resume.check_same(saved, tokenizer, data, settings, IDENTITY, TRAJECTORY, ALLOW_CHANGE)
        dist.print0(f"resume     {run_name} at step {saved['step']}")

    # ---- the model's shape, and the plan ----
    environment = hardware.environment(dist.device, dist.dtype, dist.world_size)
    if saved:
        resume.warn_of_difference(dist, saved.get("environment", environment), environment)
    speed = (
        dist.broadcast_object(hardware.training_flops_per_second(dist.device, dist.dtype))
        * recipe.EFFICIENCY
        * dist.world_size
    )
    if saved:
        model_config, reason = GPTConfig(**saved["model_config"]), "as before"
    else:
        model_config, reason = choose_shape(tokenizer.vocab_size, speed)
    seq_len = model_config.max_seq_len
    if EVAL_TOKENS < seq_len:
        raise UserError(f"--eval-tokens={EVAL_TOKENS}: less than one sequence of {seq_len} tokens")
    validation = EVAL_EVERY and dist.on_all_ranks(
        lambda: dataloader.packed_sequences([shards.validation.path], tokenizer, seq_len, EVAL_TOKENS)
    )
    identity = {
        "model_config": model_config.to_dict(),
        "tokenizer_sha256": tokenizer.sha256(),
        "data": data,
        "settings": settings,
    }
    first_weights = None
    if INIT_FROM and not saved:
        first_weights = resume.load_first_weights(dist, INIT_FROM, model_config, tokenizer)
    model = checkpoint.build_model(model_config, "meta")
    plan = make_plan(dist, model, saved, speed, DEVICE_BATCH_SIZE or DEFAULT_ROWS)
    if saved:
        run = Run(**{"assessed_step": saved["step"], **saved["run"]})  # which old checkpoints lack
        trained_tokens = saved["loader"]["row"] * seq_len
    else:
        run, trained_tokens = Run(), 0
    planned = (*HORIZON, "TOTAL_BATCH_SIZE", "BATCH_RAMP")
    new_horizon = not saved or any(resume.changed(saved, settings, name) for name in planned)
    if new_horizon:
        progress = share_done(run, plan, trained_tokens)
        steps_left = round((1 - progress) * plan.num_steps)
        run.correct(run.step + (max(steps_left, 1) if TARGET_MINUTES else steps_left), progress)
        run.horizon_fixed = not TARGET_MINUTES
    dist.print0(describe(dist, plan, run, trained_tokens, model_config, reason, shards, tokenizer, run_dir))
    if DRY_RUN:
        return
    if run.step >= run.num_steps:
        dist.print0(f"nothing to do: the newest checkpoint of {run_name} is at step {run.step} of {run.num_steps}")
        if REPORT and dist.is_rank0:  # which a kill after the last save left out
            dist.print0(report.attempt(run_dir))
        return

    bundle = CORE_METRIC_EVERY and core_bundle.obtain(
        CORE_BUNDLE, paths.core_dir(), shards.validation.path, dist, CORE_MAX_PER_TASK, dist.print0
    )
    owner = dist.on_rank0(lambda: checkpoint.claim(run_dir))
    dist.on_rank0(lambda: tokenizer.save(run_dir))

    # ---- weights and optimizers ----
    slices = dataloader.slices_of(shards.train, LANES)
    hardware.use_tokenizer_threads(False)  # the readers have threads of their own
    model = model.to_empty(device=dist.device)
    if GRAD_CHECKPOINT:
        model.checkpoint_activations()
    factor = recipe.width_factor(model_config.model_dim)
    rates = {
        "matrix": MATRIX_LR,
        "embedding": EMBEDDING_LR * factor,
        "unembedding": UNEMBEDDING_LR * factor,
        "scalar": SCALAR_LR,
    }
    muon_dtype = torch.bfloat16 if dist.dtype == torch.bfloat16 else torch.float32
    _, adamw, *_ = optimizers = optim.build_optimizers(
        model.parameters_by_role(), rates, WEIGHT_DECAY, muon_dtype, dist
    )
    if dist.world_size > 1:
        dist.print0(
            describe_sharing(optim.communication_bytes(optimizers, dist, plan.total_batch_size // dist.world_size))
        )
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
    if saved:
        checkpoint.load_weights(model, model_tensors)
        optim.load_state_tensors(optimizers, optimizer_tensors)
        adamw.updates = saved["updates"]
        if saved["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])
    elif first_weights:
        checkpoint.load_weights(model, first_weights)
    else:
        model.init_weights(SEED)
        if SPECTRAL_TOKENS and tokenizer.vocab_size <= bigram_init.LARGEST_VOCABULARY:
            # rank 0 only: DistributedDataParallel, below, broadcasts the result
            dist.on_rank0(lambda: apply_bigram_init(model, slices, tokenizer, plan.tokens))
            hardware.give_back_freed_memory()  # the bigram counts
    del model_tensors, optimizer_tensors, first_weights  # else a resumed run would hold two copies of everything
    if rows_are_tried(dist):
        rows = rows_that_fit(dist, model, plan.device_batch_size * plan.grad_accum_steps // batch_parts())
        plan = make_plan(dist, model, saved, speed, rows)
        dist.print0("\n".join([f"fits       {rows} rows", *describe_batch(dist, plan, model_config)]))
    record = {"plan": asdict(plan), "environment": environment, **identity, "defaults": config.defaults(__file__)}
    dist.on_rank0(lambda: write_json(run_dir / "config.json", record))
    with within_memory(plan.device_batch_size):
        pass_seconds = warm_up(dist, model, plan.device_batch_size)
    trained = model
    if dist.world_size > 1:
        ignored = list(model.parameters_by_role().get("bigram_embedding", {}))  # optim shares these
        ignored += [name for name, _ in model.named_buffers()]  # constants, which every rank has made
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        trained = DistributedDataParallel(model, gradient_as_bucket_view=True)
    parameters = list(model.parameters())

    # ---- the run ----
    loader_state = saved["loader"] if saved else None
    threads = hardware.cores_of_a_rank()
    reader = dataloader.SequenceReader(
        slices, tokenizer, seq_len, LANES, SEED, dist.rank, dist.world_size, loader_state, threads
    )
    tracker = dist.on_all_ranks(lambda: Tracker(run_dir, run.num_steps, run.step, dist.is_rank0))
    in_wandb = None
    if WANDB != "off" and dist.is_rank0:
        run_id = run.wandb_id or wandb_run.new_id(f"d{model_config.num_layers}-{shards.folder.name}")
        options = wandb_run.options(WANDB_PROJECT, WANDB_TAGS, WANDB_NOTES, record)
        in_wandb = wandb_run.WandbRun(run_dir, WANDB, run_id, options, tracker.event)
        in_wandb.sources(run_dir, record, shards.folder.name)
        tracker.use_wandb(in_wandb, WANDB_LOG_EVERY)
    peak_flops = hardware.peak_flops(dist.device)
    saver = Saver(dist, run, run_dir, owner, tracker, run.step if saved else None)
    step_seconds, typical_seconds = [], math.inf

    def save(next_batch, final=False):
        watchdog.beat(SLOW_SECONDS)
        guard.check_replicas(dist, parameters, run.step)
        if not all(parameter.isfinite().all() for parameter in parameters):
            raise NonFiniteError(
                f"step {run.step}: the weights are not finite and were not saved; the last checkpoint is intact. "
                f"Lower the rates (--matrix-lr={MATRIX_LR / 2:g})"
            )
        loader_state = {**next_batch.state, "lanes": {}}
        for part in dist.all_gather_objects(next_batch.state["lanes"]):
            loader_state["lanes"].update(part)
        spent = run.seconds + hardware.seconds_since_start()
        if in_wandb:
            run.wandb_id = in_wandb.id
        state = {
            "step": run.step,
            "val_bpb": run.val_bpb if run.evaluated_step == run.step else None,
            "run": {**asdict(run), "seconds": spent},
            "loader": loader_state,
            "total_batch_size": plan.total_batch_size,
            "data_dir": str(shards.folder),
            "updates": adamw.updates,
            "scaler": scaler.state_dict(),
            "environment": environment,
            **identity,
        }
        hardware.give_back_freed_memory()  # a file is put together in memory
        saver.save(model.state_dict(), optim.state_tensors(optimizers, dist), state, final)

    def assess(last):
        """Do what is due after this step. Returns whether it is the last one, which patience may have made it."""
        watchdog.beat(SLOW_SECONDS)
        # eager, for each new number of rows or tokens would be compiled
        with within_memory(DEVICE_BATCH_SIZE or DEFAULT_ROWS), torch.compiler.set_stance("force_eager"):
            if due(EVAL_EVERY, run.step, last):
                evaluate(dist, run, model, validation, tokenizer, tracker, watchdog)
                last = last or (run.step > 0 and ends_early(run, tracker))
            if bundle and due(CORE_METRIC_EVERY, run.step, last):  # at step 0 to find out now whether it can be done
                evaluate_core(dist, run, model, tokenizer, bundle, tracker, watchdog)
            if due(SAMPLE_EVERY, run.step, last) and run.step and dist.is_rank0:
                sample(run, model, tokenizer, tracker)
        run.assessed_step = run.step
        return last

    with (
        within_memory(plan.device_batch_size),
        tracker,
        dataloader.DataLoader(reader, plan.device_batch_size, dist.device) as loader,
    ):
        batches, mean_loss = dist.on_all_ranks(lambda: dataloader.Prefetcher(loader)), math.nan
        stopped_before = run.assessed_step != run.step  # what was due then
        if run.step == 0 or stopped_before:
            last = assess(last=False)
        if new_horizon and not run.horizon_fixed:  # now that an evaluation has been timed
            run.num_steps = dist.broadcast_object(
                steps_in_time(run, STEP_PER_PASSES * pass_seconds * plan.grad_accum_steps)
            )
            tracker.set_num_steps(run.num_steps)
        if stopped_before:
            save(batches.next, final=last)
        while run.step < run.num_steps:
            begin = time.monotonic()
            watchdog.beat(min(max(STEP_SECONDS, SLOW_STEP_FACTOR * typical_seconds), SLOW_SECONDS))

            # ---- schedule ----
            progress = run.progress(run.step + 1)
            rate = recipe.SCHEDULES[SCHEDULE](progress, WARMUP_RATIO, WARMDOWN_RATIO, FINAL_LR_FRAC)
            momentum = recipe.momentum(progress, WARMDOWN_RATIO)
            share = recipe.batch_share(progress) if BATCH_RAMP else 1.0
            micro_steps = round(plan.grad_accum_steps * share)
            rate *= math.sqrt(micro_steps / plan.grad_accum_steps)  # of smaller batches: noise grows so
            optim.set_schedule(optimizers, rate, momentum, recipe.weight_decay(progress, WEIGHT_DECAY))

            # ---- gradients of the whole batch ----
            loss_sum, data_hash = torch.zeros((), device=dist.device), 0
            first_batch, loader_seconds = batches.next, 0.0
            for micro_step in range(micro_steps):
                asked = time.perf_counter()
                batch = batches.take()
                loader_seconds += time.perf_counter() - asked
                data_hash += batch.sequence_hash
                # before the forward, where DDP decides whether this backward will average over the ranks
                trained.require_backward_grad_sync = micro_step == micro_steps - 1
                with dist.autocast():
                    loss = trained(batch.inputs, batch.targets) / micro_steps
                scaler.scale(loss).backward()
                loss_sum += loss.detach()
            gradients = optim.collect_gradients(parameters, dist)
            for optimizer in optimizers:
                scaler.unscale_(optimizer)  # after all ranks have the same, so that all see the same overflow
            norm = torch.nn.utils.get_total_norm(gradients)

            # ---- what all ranks must know, in one reduction and one read ----
            halves = [data_hash % 2**32, (data_hash >> 32) % 2**32]  # float64 adds 32-bit halves exactly
            status = [loss_sum, norm, stop.requested, batches.error is not None, *halves]
            loss_total, norm_total, stops, data_errors, hash_low, hash_high = dist.all_reduce_sum(status)
            mean_loss, grad_norm = loss_total / dist.world_size, norm_total / dist.world_size
            if data_errors:
                if run.step > (saver.resumed_step or 0):
                    save(first_batch)  # of this step, which does not count
                dist.on_all_ranks(batches.raise_error)

            # ---- update ----
            run.step += 1
            update_begin = time.perf_counter()
            if math.isfinite(mean_loss) and math.isfinite(grad_norm):
                deviations = guard.deviations(run.recent_losses, mean_loss)
                run.recent_losses = [*run.recent_losses, mean_loss][-guard.LOSS_WINDOW :]
                if GRAD_CLIP:
                    torch._foreach_mul_(gradients, (GRAD_CLIP / (norm + 1e-6)).clamp(max=1.0))
                optim.step(optimizers)  # and not by the scaler, which would read again what the norm has told
            else:
                deviations = math.nan
                run.skipped_steps += 1
                tracker.event(f"step {run.step}: loss {mean_loss}, gradient norm {grad_norm}: the update was skipped")
                # float16 begins by overflowing a few times, until the scale is found
                if not (scaler.is_enabled() and scaler.get_scale() > 1):
                    run.skipped_recently = [*run.skipped_recently, run.step][-guard.NON_FINITE_NEARBY :]
                    if guard.too_many_skipped(run.skipped_recently, run.step):
                        losses = dist.all_gather_objects(loss_sum.item())
                        raise NonFiniteError(non_finite_message(model, run, losses))
            if scaler.is_enabled():
                scaler.update()
            for parameter in parameters:
                if dist.world_size == 1 or parameter.grad.is_sparse:
                    parameter.grad = None
                else:
                    parameter.grad.zero_()  # a view of DDP's bucket, which must stay

            # ---- log ----
            update_seconds = time.perf_counter() - update_begin
            # A GPU still works on the update, which counts in the next step: to wait here would leave it idle then.
            seconds = time.monotonic() - begin
            if micro_steps == plan.grad_accum_steps or not step_seconds:
                step_seconds.append(seconds * plan.grad_accum_steps / micro_steps)
            typical_seconds = statistics.median(step_seconds[-200:])
            metrics = {
                "train/loss": mean_loss,
                "train/lr": MATRIX_LR * rate,
                "train/grad_norm": grad_norm,
                "train/tok_per_sec": plan.total_batch_size * micro_steps / plan.grad_accum_steps / seconds,
                "train/epoch": reader.epoch(batch.state),
                "train/loss_deviations": deviations,
                "train/seconds": seconds,
                "train/loader_seconds": loader_seconds,
                "system/skipped_steps": run.skipped_steps,
                "system/peak_memory_bytes": hardware.peak_memory_bytes(dist.device),
                "data_hash": f"{(int(hash_low) + (int(hash_high) << 32)) % 2**64:016x}",
            }
            if dist.device.type == "cpu":  # on the others it is only queued by then
                metrics["train/optimizer_seconds"] = update_seconds
            if peak_flops:
                metrics["train/mfu"] = (
                    metrics["train/tok_per_sec"] * plan.flops_per_token / (peak_flops * dist.world_size)
                )
            tracker.step(run.step, metrics, (run.num_steps - run.step) * typical_seconds)
            if deviations > guard.SPIKE_DEVIATIONS:
                tracker.event(f"step {run.step}: loss {mean_loss:.4f} is {deviations:.1f} deviations above the last")
            if run.step % DRIFT_EVERY == 0:
                guard.check_replicas(dist, parameters, run.step)
            if run.correction_is_due():
                run.correct(dist.broadcast_object(steps_in_time(run, typical_seconds)), progress)
                run.horizon_fixed = True
                tracker.set_num_steps(run.num_steps)
                tracker.event(f"{1000 * typical_seconds:.0f} ms a step: {run.num_steps} steps end in time")

            # ---- evaluate, sample, save ----
            last = run.step == run.num_steps
            stopping = stops > 0 and not last
            if not stopping:
                last = assess(last)
            if due(SAVE_EVERY, run.step, last) or last or stopping or run.best_step == run.step:
                save(batches.next, final=last or stopping)
            if stopping:
                break
        left_out = round(dist.all_reduce_sum([reader.skipped_documents])[0])
        if left_out:
            tracker.event(f"{left_out} documents without text were left out since this start")
        if run.step < run.num_steps:
            tracker.event(
                f"stopped and saved at step {run.step} of {run.num_steps}: the same command with --resume goes on"
            )
        else:
            evaluated = run.evaluated_step == run.step and run.val_bpb is not None
            result = f"val bpb {run.val_bpb:.4f}" if evaluated else f"loss {mean_loss:.4f}"
            used = f"{hardware.seconds_since_start():.0f} s, {hardware.peak_memory_bytes(dist.device) / 2**30:.1f} GiB"
            tracker.event(f"done in {used}: {result} after {run.num_steps} steps")
            if in_wandb:
                in_wandb.checkpoint(run_dir, run.best_step if run.best_step >= 0 else run.step, run.best_bpb)
    if REPORT and dist.is_rank0 and run.step == run.num_steps:
        dist.print0(report.attempt(run_dir))


class Saver:
    """Writes the checkpoints of a run, and removes old ones. A few that cannot be written do not end it."""

    def __init__(self, dist, run, run_dir, owner, tracker, resumed_step):
        """owner: what `checkpoint.claim` gave. resumed_step: of the checkpoint that the run goes on from, or None."""
        self.dist, self.run, self.run_dir, self.owner, self.tracker = dist, run, run_dir, owner, tracker
        self.resumed_step = resumed_step
        self.verified = {}  # the checkpoints that were read back and hashed
        self.failures = 0  # in a row
        self.saved_best = run.best_bpb, run.best_step

    def save(self, weights, moments, state, final):
        """Save after the step that the run is at, on all ranks at once. Raises CheckpointError if it cannot be written
        and is the final one, or one too many in a row.
        """
        run = self.run
        failure, is_there = self.dist.on_rank0(lambda: self._write(weights, moments, state))
        self.failures = self.failures + 1 if failure else 0
        if failure and (final or self.failures == FAILED_SAVES_LIMIT):
            which = "the last checkpoint" if final else f"{self.failures} checkpoints in a row"
            raise CheckpointError(f"{which} could not be written: {failure}: {self.run_dir}. Older ones are intact")
        if is_there:
            self.saved_best = run.best_bpb, run.best_step
        run.best_bpb, run.best_step = self.saved_best  # one that can be loaded
        if failure:
            self.tracker.event(f"step {run.step}: the checkpoint could not be written ({failure}); training goes on")
        else:
            self.tracker.event(f"step {run.step}: checkpoint saved")

    def _write(self, weights, moments, state):
        """(what kept it from being written, as a full disk does, or None; whether one of this step is there)."""
        run = self.run
        try:
            checkpoint.save(self.run_dir, run.step, weights, moments, state, self.owner)
        except OSError as error:
            return error.strerror or str(error), run.step in checkpoint.steps(self.run_dir)
        with contextlib.suppress(OSError):  # it is saved; what could not be removed goes another time
            checkpoint.clean(
                self.run_dir, KEEP_LAST, KEEP_EVERY, run.best_step, self.resumed_step, self.owner, self.verified
            )
        return None, True


def check_settings():
    global SCHEDULE  # whose old name becomes the new one
    config.choice("COMPILE", COMPILE, ("auto", "on", "off"))
    SCHEDULE = recipe.schedule_name(SCHEDULE)
    config.choice("SCHEDULE", SCHEDULE, tuple(recipe.SCHEDULES))
    config.choice("WANDB", WANDB, ("off", "offline", "online"))
    horizons = {
        name: globals()[name] for name in ("NUM_ITERATIONS", "TARGET_FLOPS", "TARGET_MINUTES") if globals()[name]
    }
    if len(horizons) > 1:
        given = " ".join(f"{config.flag_of(name)}={value}" for name, value in horizons.items())
        raise UserError(f"{given}: two horizons at once; give one of them")
    if not horizons and not TARGET_PARAM_DATA_RATIO:
        raise UserError("--target-param-data-ratio=0 and no other horizon: give one, as in --num-iterations=1000")
    for name, value in config.settings(globals()).items():
        if isinstance(value, (int, float)) and value < 0:
            raise UserError(f"{config.flag_of(name)}={value}: must not be negative")
    if RUN_NAME.startswith(wandb_run.PREFIX):
        raise UserError(f"--run-name={RUN_NAME}: begin a new run with its weights, by --init-from={RUN_NAME}")
    if SEED >= 2**63:
        raise UserError(f"--seed={SEED}: must be below 2^63")
    for name in ("LANES", "KEEP_LAST", "WANDB_LOG_EVERY"):
        if globals()[name] < 1:
            raise UserError(f"{config.flag_of(name)}={globals()[name]}: at least 1")
    if EARLY_STOP_PATIENCE and not EVAL_EVERY:
        raise UserError("--early-stop-patience needs evaluations: give --eval-every, as in --eval-every=250")
    for name in ("WARMUP_RATIO", "WARMDOWN_RATIO", "FINAL_LR_FRAC"):
        if globals()[name] > 1:
            raise UserError(f"{config.flag_of(name)}={globals()[name]}: a share, at most 1")
    if WARMUP_RATIO + WARMDOWN_RATIO > 1:
        raise UserError(
            f"--warmup-ratio={WARMUP_RATIO} and --warmdown-ratio={WARMDOWN_RATIO} overlap: together at most 1"
        )


def choose_shape(vocab_size, flops_per_second):
    """(GPTConfig, why it has this depth) of a new run; what the settings leave open follows from the horizon."""
    depth, reason = DEPTH, "as asked"
    if not depth and (TARGET_MINUTES or TARGET_FLOPS):
        flops = TARGET_FLOPS or recipe.training_flops(TARGET_MINUTES, flops_per_second)
        depth = recipe.choose_depth(flops, HEAD_DIM, ASPECT_RATIO)
        reason = f"{flops:.1e} FLOPs"
        if TARGET_MINUTES:
            reason += f": {TARGET_MINUTES:.3g} minutes at {flops_per_second / 1e9:,.0f} GFLOP/s"
    elif not depth:
        depth, reason = DEFAULT_DEPTH, "the default"
    width, heads = recipe.model_width(depth, ASPECT_RATIO, HEAD_DIM)
    seq_len = MAX_SEQ_LEN or recipe.sequence_length(width)
    bigram_rows = 0 if PLAIN else BIGRAM_ROWS
    return GPTConfig(vocab_size, seq_len, depth, heads, heads, HEAD_DIM, bigram_rows, PLAIN), reason


def make_plan(dist, model, saved, flops_per_second, max_device_batch_size):
    parameters = {role: sum(p.numel() for p in named.values()) for role, named in model.parameters_by_role().items()}
    horizon = recipe.Horizon(NUM_ITERATIONS, TARGET_FLOPS, TARGET_MINUTES, TARGET_PARAM_DATA_RATIO)
    compiled = compile_pays(dist.dtype) and hardware.can_compile()
    return recipe.make_plan(
        parameters,
        model.config,
        horizon,
        total_batch_size=saved["total_batch_size"] if saved and not TOTAL_BATCH_SIZE else TOTAL_BATCH_SIZE,
        max_device_batch_size=max_device_batch_size,
        world_size=dist.world_size,
        flops_per_second=flops_per_second,
        policy=recipe.ActivationPolicy(dist.dtype.itemsize, compiled, GRAD_CHECKPOINT, chunk_rows(dist.device)),
        mean_batch_share=recipe.mean_batch_share() if BATCH_RAMP else 1.0,
        batch_parts=batch_parts(),
    )


def compile_pays(dtype):
    """Whether to compile, as far as the settings say: the same at every resume, since eager code gives other bits."""
    return COMPILE == "on" or (COMPILE == "auto" and not 0 < TARGET_MINUTES < COMPILE_MINUTES[dtype])


def share_done(run, plan, trained_tokens):
    """What share of the plan a run has behind it: 0 for a new one."""
    if NUM_ITERATIONS:
        return min(run.step / NUM_ITERATIONS, 1.0)
    if TARGET_MINUTES:  # of which at least one step is left
        share = min(run.seconds / (60 * TARGET_MINUTES), run.step / (run.step + 1))
    else:
        share = min(trained_tokens / plan.tokens, 1.0)
    return recipe.progress_at_tokens(share) if BATCH_RAMP else share


def batch_parts():
    """Into how many equal parts a step's rows must be cut."""
    return recipe.BATCH_PARTS if BATCH_RAMP else 1


def describe(dist, plan, run, trained_tokens, model_config, reason, shards, tokenizer, run_dir):
    """The plan as the lines that a person reads before the first step; trained_tokens: those of a run that goes on."""
    texts = next(dataset.row_groups([shard.path for shard in shards.train]))[:50]
    num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    bytes_per_token = sum(len(text.encode("utf-8", "replace")) for text in texts) / num_tokens if num_tokens else 1
    on_disk = sum(shard.text_bytes for shard in shards.train) / bytes_per_token
    steps_left, share = max(run.num_steps - run.step, 0), 1.0
    if BATCH_RAMP and steps_left:
        share = recipe.mean_batch_share(run.progress(run.step + 0.5))
    tokens = trained_tokens + steps_left * plan.total_batch_size * share
    tables = sum(count for role, count in plan.parameters.items() if "embedding" in role and role != "unembedding")
    minutes = TARGET_MINUTES or plan.seconds / 60
    lines = [
        f"run        {run_dir}",
        f"device     {dist.world_size} x {hardware.device_name(dist.device)}",
        f"precision  {str(dist.dtype).removeprefix('torch.')} ({dist.dtype_reason})",
        f"model      depth {model_config.num_layers} ({reason}), width {model_config.model_dim}",
        f"weights    {plan.parameters['matrix']:,} in matrices, {plan.parameters['unembedding']:,} in the head,"
        f" {tables:,} in tables",
        *describe_batch(dist, plan, model_config),
        f"horizon    {'about ' if TARGET_MINUTES else ''}{run.num_steps:,} steps, {tokens / 1e6:,.1f} M tokens,"
        f" {tokens * plan.flops_per_token:.1e} FLOPs, about {minutes:.1f} minutes",
        f"data       about {on_disk / 1e6:,.1f} M tokens in {shards.folder}: {tokens / on_disk:.1f} epochs",
    ]
    if rows_are_tried(dist):
        lines.append("rows       as many as fit are tried once the model is there")
    if tokens > 2 * on_disk:  # a small model with tables has begun to learn its text by heart then (dev/LOG.md)
        lines.append("warning    more than 2 epochs: more text would help more than more steps")
    return "\n".join(lines)


def describe_batch(dist, plan, model_config):
    """The lines about the batch and the memory that it needs."""
    of_step, free, needed = plan.memory, hardware.free_memory_bytes(dist.device), plan.memory.peak
    rows = plan.device_batch_size
    lowered = f" (lowered from {DEVICE_BATCH_SIZE})" if rows < DEVICE_BATCH_SIZE else ""
    names = ("weights", "gradients", "optimizer", "activations", "logits", "update")
    parts = [f"{name} {getattr(of_step, name) / 2**30:.2f}" for name in names]
    in_passes = of_step.update <= of_step.activations + of_step.logits  # is the most needed, not in the update
    lines = [
        f"batch      {plan.total_batch_size:,} tokens = {rows} rows{lowered} of {model_config.max_seq_len}"
        f" x {plan.grad_accum_steps} micro-steps x {dist.world_size} ranks",
        f"memory     about {of_step.peak / 2**30:.2f} GiB a rank: {', '.join(parts[:3])},",
        f"           and {' with '.join(parts[3:5])} or, later, {parts[5]}",
    ]
    if dist.device.type == "cpu":
        needed, taken = recipe.process_growth(of_step), hardware.peak_memory_bytes(dist.device)
        lines.append(
            f"process    about {(taken + needed) / 2**30:.1f} GiB at most, {taken / 2**30:.1f} of them taken already"
        )
    if needed > free:
        if not GRAD_CHECKPOINT and in_passes:
            lower = "give --grad-checkpoint, or lower "
        else:
            lower = "lower "
        smaller = f"--device-batch-size={max(rows // 2, 1)} (now {rows})"
        if not in_passes or rows == 1:
            smaller = f"--depth={model_config.num_layers // 2 or 1} (now {model_config.num_layers})"
        lines.append(f"warning    more than the {free / 2**30:.1f} GiB that are free for a rank: {lower}{smaller}")
    return lines


def describe_sharing(num_bytes):
    """The line that says what the ranks send each other and what each of them holds."""
    sent = sum(size for name, size in num_bytes.items() if name != "state")
    return (
        f"sharing    a rank sends at most {sent / 1e6:,.1f} MB a step"
        f" and holds {num_bytes['state'] / 1e6:,.1f} MB of optimizer state"
    )


def apply_bigram_init(model, slices, tokenizer, run_tokens):
    """Initialize embedding and head from the bigrams of the run's first tokens, and of later tokens that the run will
    not reach: counting takes far less time than training.
    """
    seq_len = model.config.max_seq_len
    count = max(min(SPECTRAL_TOKENS, SPECTRAL_RUNS * run_tokens) // seq_len, 1)
    threads = hardware.cores_of_a_rank()
    reader = dataloader.SequenceReader(slices, tokenizer, seq_len, LANES, SEED, threads=threads)
    sequences = torch.empty(count, seq_len + 1, dtype=torch.int64)
    reader.fill(sequences.numpy())
    generator = torch.Generator().manual_seed(SEED)
    embedding, head = bigram_init.bigram_init(sequences, model.config.vocab_size, model.config.model_dim, generator)
    with torch.no_grad():
        model.embedding.weight.copy_(embedding)
        model.head.weight.copy_(head)


def rows_are_tried(dist):
    """Whether the rows of a forward pass are found by trying: elsewhere memory that runs out ends the process."""
    return DEVICE_BATCH_SIZE == 0 and dist.device.type == "cuda"


def rows_that_fit(dist, model, most):
    """The first of `most`, half of it, and so on, with which forward and backward pass fit on every rank beside weights
    and optimizer state. No weight changes.
    """

    def attempt(rows):
        tokens = torch.zeros(rows, model.config.max_seq_len, dtype=torch.int64, device=dist.device)
        # Eager, which takes no less memory than compiled code, and no minute of compilation for each number of rows.
        with torch.compiler.set_stance("force_eager"):
            try:
                for _ in range(2):  # the second with the gradients there, as micro-steps have them
                    with dist.autocast():
                        mean = model(tokens, tokens)
                    mean.backward()
                hardware.synchronize(dist.device)
            finally:
                model.zero_grad()

    rows = dist.largest_that_fits(most, attempt)
    if not rows:
        raise MemoryLimitError(f"out of memory with a single row: {less_memory(0)}")
    hardware.forget_peak_memory(dist.device)  # of the trials
    return rows


def warm_up(dist, model, rows):
    """Compile the model, and return the seconds of a forward and backward pass afterwards. No weight changes."""
    tokens = torch.zeros(rows, model.config.max_seq_len, dtype=torch.int64, device=dist.device)

    def one_pass():
        begin = time.monotonic()
        with dist.autocast():
            loss = model(tokens, tokens)
        loss.backward()
        model.zero_grad()
        hardware.synchronize(dist.device)
        return time.monotonic() - begin

    compile_model(dist, model, one_pass)
    one_pass()
    return min(one_pass() for _ in range(2))


def compile_model(dist, model, one_pass):
    """Compile what can be compiled, in a first `one_pass()`. Where it does not work on one rank, all stay eager; with
    --compile=on it is a UserError.
    """
    failure = None
    pays = compile_pays(dist.dtype)
    if COMPILE == "auto" and not pays:
        minutes = COMPILE_MINUTES[dist.dtype]
        dist.print0(f"compile    off: it repays its time in {minutes:g} minutes or more (--compile=on all the same)")
    for attempt in range(2 if pays else 0):
        hardware.trust_cpu_flags(attempt == 0)
        model.compile_parts()
        try:
            dist.print0(f"compile    ready in {one_pass():.0f} s")
            failure = None
            break
        except Exception as error:
            if hardware.is_out_of_memory(error):
                raise
            # Once more: torch's parallel compilers sometimes meet a precompiled header that is only half written.
            torch.compiler.reset()
            model.zero_grad()
            failure = f"{type(error).__name__}: {errors.first_line(error)[:100]}"
    failure = next((reason for reason in dist.all_gather_objects(failure) if reason), None)
    if failure and COMPILE == "on":
        raise UserError(f"--compile=on: it does not work here ({failure}): give --compile=auto or --compile=off")
    if failure:
        torch.compiler.set_stance("force_eager")
        model.zero_grad()
        dist.print0(f"compile    off, because it does not work here ({failure})")


def steps_in_time(run, step_seconds):
    """The number of steps with which a run by TARGET_MINUTES ends in time, with the evaluations and the last save."""
    after = (SLOWER_LATER + EVALUATIONS_AFTER) * run.evaluation_seconds + SLOWER_LATER * run.core_seconds
    after += LAST_SAVE_SECONDS
    left = TARGET_MINUTES * 60 - run.seconds - hardware.seconds_since_start() - after
    each = step_seconds + (run.evaluation_seconds / EVAL_EVERY if EVAL_EVERY else 0)
    each += run.core_seconds / CORE_METRIC_EVERY if CORE_METRIC_EVERY else 0
    return run.step + max(round(left / each), 1)


@contextlib.contextmanager
def progress_bar(dist, tracker, watchdog, what, count):
    """Yields the function to call with the number of things done here, of `count` on all ranks."""
    with tracker.progress(what, -(-count // dist.world_size)) as bar:

        def done(number):
            watchdog.beat(SLOW_SECONDS)
            if bar:
                bar(number)

        yield done


def evaluate(dist, run, model, validation, tokenizer, tracker, watchdog):
    """Measure bits per byte on the validation sequences, and record it in `run` and the log."""
    begin, stats = time.monotonic(), loss_eval.TokenLossStats(tokenizer)
    with progress_bar(dist, tracker, watchdog, "evaluation", len(validation)) as done:
        rows = DEVICE_BATCH_SIZE or DEFAULT_ROWS
        val_bpb = loss_eval.bits_per_byte(model, validation, tokenizer.token_bytes(), dist, rows, done, stats.add)
    run.val_bpb = val_bpb if math.isfinite(val_bpb) else None  # a checkpoint holds no NaN
    run.evaluated_step = run.step
    tracker.record(run.step, {"val/bpb": val_bpb})
    tracker.evaluation(run.step, val_bpb=run.val_bpb, **stats.result(dist))
    if run.step and run.val_bpb is not None and (run.best_bpb is None or val_bpb < run.best_bpb):
        run.best_bpb, run.best_step = val_bpb, run.step  # of those that are saved: step 0 is not
    if run.val_bpb is not None and (run.goal_bpb is None or val_bpb < run.goal_bpb):
        run.goal_bpb, run.stale_evaluations = val_bpb - EARLY_STOP_MIN_DELTA, 0
    else:
        run.stale_evaluations += 1
    best = ", the best so far" if run.best_step == run.step else ""
    tracker.event(f"step {run.step}: val bpb {val_bpb:.4f}{best}")
    run.evaluation_seconds = time.monotonic() - begin


def ends_early(run, tracker):
    """Whether patience is at its end; the run is then no longer than it is now."""
    if not 0 < EARLY_STOP_PATIENCE <= run.stale_evaluations:
        return False
    tracker.event(f"step {run.step}: {run.stale_evaluations} evaluations without a better one: the end")
    run.num_steps, run.horizon_fixed = run.step, True
    tracker.set_num_steps(run.num_steps)
    return True


def evaluate_core(dist, run, model, tokenizer, bundle, tracker, watchdog):
    """Score the tasks of a bundle, and record it in the log."""
    begin, count = time.monotonic(), sum(len(task.items) for task in bundle.tasks)
    with progress_bar(dist, tracker, watchdog, "tasks", count) as done:
        scores = core_eval.evaluate(model, tokenizer, bundle.tasks, dist, DEVICE_BATCH_SIZE or DEFAULT_ROWS, done)
    centered = {f"core/{score.label}": score.centered for score in scores}
    tracker.record(run.step, {"core/core_metric": core_eval.core_metric(scores)[0], **centered})
    tracker.evaluation(run.step, core=core_eval.summary(bundle, scores))
    tracker.event(f"step {run.step}: {core_eval.headline(bundle, scores)}")
    run.core_seconds = time.monotonic() - begin


def due(every, step, last):
    """Whether something that is done `every` so many steps, and at the last, is due. 0 is never."""
    return every > 0 and (last or step % every == 0)


def sample(run, model, tokenizer, tracker):
    """Continue a few prompts, and record the texts in the log."""
    found = []
    for prompt, text in samples(model, tokenizer, SAMPLE_TOKENS):
        found.append({"prompt": prompt, "text": text})
        tracker.event(f"sample: {prompt}{text}")
    tracker.evaluation(run.step, samples=found)


def non_finite_message(model, run, losses):
    """What to tell of too many steps that were not finite; losses: of each rank at the last of them."""
    bad = next(
        (name for name, p in model.named_parameters() if p.grad is not None and not p.grad.sum().isfinite()), "none"
    )
    return (
        f"step {run.step}: loss {', '.join(map(str, losses))} on the ranks, first parameter with a bad gradient: {bad};"
        f" updates were left out at steps {', '.join(map(str, run.skipped_recently))}. "
        f"The last checkpoint is intact. Lower the rates (--matrix-lr={MATRIX_LR / 2:g}) or use --dtype=float32"
    )


def main_within_memory():
    """`main`, with a sentence instead of a traceback where memory runs out or another rank has ended."""
    try:
        main()
    except (RuntimeError, MemoryError) as error:
        if is_lost_peer(error):
            raise PeerError(
                "another rank has ended, and says why itself: --resume goes on from the last checkpoint"
            ) from None
        if not hardware.is_out_of_memory(error):
            raise
        smaller = "a smaller --depth or --spectral-tokens=0"
        raise MemoryLimitError(f"out of memory before the first pass: try {smaller}") from None


@contextlib.contextmanager
def within_memory(rows):
    """Where memory runs out in passes of so many rows: MemoryLimitError, with what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not hardware.is_out_of_memory(error):
            raise
        raise MemoryLimitError(f"out of memory: {less_memory(rows)}") from None


def less_memory(rows):
    """What to do where memory ran out with so many rows a pass; 0: the number does not matter."""
    smaller = f"--device-batch-size={rows // 2} (now {rows})" if rows > 1 else "a smaller --max-seq-len"
    return f"try {smaller}, {'' if GRAD_CHECKPOINT else '--grad-checkpoint, '}or a smaller --depth"


if __name__ == "__main__":
    errors.run(lambda: config.override(globals()), main_within_memory)
