"""Pretrain a base model.

    python -m scripts.base_train --depth=4 --target-minutes=5        one process
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train   eight GPUs

Without a horizon it trains --target-param-data-ratio tokens per weight. Ctrl-C
saves and stops; the same command with --resume continues.
"""

import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch

from nanotrain import checkpoint, config, core_bundle, errors, guard, hardware, optim, paths, recipe, report, warmup
from nanotrain.bigram_init import init_from_bigrams
from nanotrain.checkpoint import CheckpointManager, Restored
from nanotrain.dataloader import DataLoader, Prefetcher, SequenceReader, TrainData, packed_sequences, slices_of
from nanotrain.dist import DistContext, faults_as_sentences, init_distributed
from nanotrain.errors import UserError
from nanotrain.evals import Evals
from nanotrain.files import write_json
from nanotrain.gpt import GPT
from nanotrain.metrics import MetricLogger
from nanotrain.run_plan import HORIZON, RunPlan
from nanotrain.store import FORMAT
from nanotrain.trainer import TimeBudget, TrainState, TrainStep

# --- run
RUN_NAME = ""  # folder under NANOTRAIN_DIR/runs; empty: d<depth>, or base if the plan chooses the depth
RESUME = False  # continue from the newest valid checkpoint; without one, start
ALLOW_CHANGE = ""  # training settings that --resume may change, as in matrix_lr,warmdown_ratio
INIT_FROM = ""  # run whose weights a new run starts from
DRY_RUN = False  # print the plan and stop
REPORT = True  # write report/ in the run's folder at the end
# --- machine
DEVICE = "auto"  # auto, cuda, mps or cpu
DTYPE = "auto"  # precision of matrix products: auto, bfloat16, float16 or float32
COMPILE = "auto"  # on, off, or auto: off without a working compiler, or if TARGET_MINUTES are too few to repay it
DETERMINISTIC = False  # deterministic kernels on CUDA, which are slower; those of CPUs always are
SEED = 1337  # seed of the initial weights and the data order
# --- data
DATA_DIR = ""  # folder of shards; empty: the only data set in NANOTRAIN_DIR/data
TOKENIZER_DIR = ""  # folder of tokenizer.json; empty: NANOTRAIN_DIR/tokenizer
MAX_SEQ_LEN = 0  # tokens per sequence; 0: from the width
NUM_STREAMS = 0  # token streams that sequences are drawn from in turn; 0: 192, fewer for huge row groups
# --- model
DEPTH = 0  # number of layers; 0: from TARGET_MINUTES or TARGET_FLOPS, else 4
ASPECT_RATIO = 0  # width divided by depth; 0: 64, with a width of at least 256
HEAD_DIM = 128  # attention head dimension; the width is rounded up to a multiple
BIGRAM_ROWS = -1  # rows of the hashed bigram embedding; 0: none, -1: by the recipe (65,536 up to depth 8, then none)
PLAIN = False  # the architecture of transformers' own NanoChat class, for an export without remote code
SPECTRAL_TOKENS = -1  # tokens counted for the bigram init of embedding and head; 0: random init, -1: by the recipe
# --- horizon: at most one of the first three
NUM_ITERATIONS = 0  # number of optimizer steps
TARGET_FLOPS = 0.0  # total floating-point operations
TARGET_MINUTES = 0.0  # minutes from process start to the last save
EVALUATIONS_AFTER = 0.0  # evaluations of EVAL_TOKENS that must still fit into TARGET_MINUTES after the run
TARGET_PARAM_DATA_RATIO = 10.0  # training tokens per matrix and head weight, if none of the three is set
# --- batch
TOTAL_BATCH_SIZE = 0  # tokens per optimizer step; 0: by the recipe
BATCH_RAMP = False  # start with a quarter, then half of the micro-steps, if the batch can be divided
DEVICE_BATCH_SIZE = 0  # sequences per forward pass, lowered to a divisor; 0: what fits on CUDA, else 4,096 tokens
GRAD_CHECKPOINT = False  # recompute each block in the backward pass: less memory, more time, same bits
# --- optimization; -1: by the recipe (--dry-run prints every number)
MATRIX_LR = -1.0  # learning rate of the hidden matrices (Muon)
EMBEDDING_LR = -1.0  # learning rate of the token embedding (AdamW) at width 768; half of it for value embeddings
UNEMBEDDING_LR = -1.0  # learning rate of the head (AdamW) at width 768
SCALAR_LR = -1.0  # learning rate of residual scalars and gates (AdamW)
WEIGHT_DECAY = -1.0  # initial weight decay of the matrices; it falls to zero
GRAD_CLIP = -1.0  # maximum gradient norm; 0: no clipping
SCHEDULE = "wsd"  # learning rate schedule: wsd (warmup-stable-decay), cosine or linear
WARMUP_RATIO = -1.0  # warmup as a fraction of the run
WARMDOWN_RATIO = -1.0  # warmdown as a fraction of the run (wsd); Muon's momentum falls a little in it too
FINAL_LR_FRAC = -1.0  # final learning rate as a fraction of the peak
# --- evaluation and saving: intervals in steps, and at the last step; 0: never
EVAL_EVERY = 250  # steps between evaluations in bits per byte
EVAL_TOKENS = 131072  # validation tokens of an evaluation
CORE_METRIC_EVERY = 0  # steps between evaluations on the CORE tasks
CORE_BUNDLE = ""  # folder or zip of tasks; own: made from the validation shard; empty: CORE's, downloaded
CORE_MAX_PER_TASK = 500  # items per task; 0: all
SAMPLE_EVERY = 0  # steps between samples
SAVE_EVERY = 250  # steps between checkpoints; the last step always saves one
KEEP_LAST = 2  # number of newest checkpoints to keep
KEEP_EVERY = 0  # steps between checkpoints that are kept for good
EARLY_STOP_PATIENCE = 0  # evaluations in a row without improvement that end the run; 0: off
EARLY_STOP_MIN_DELTA = 0.0  # smallest improvement in bits per byte that counts
# --- wandb
WANDB = "off"  # off, offline or online
WANDB_PROJECT = "nanotrain"  # project of the run
WANDB_TAGS = ""  # tags of the run, as in baseline,cpu
WANDB_NOTES = ""  # notes about the run
WANDB_LOG_EVERY = 10  # steps between logged steps; metrics.jsonl has all of them
# -----------

# A resume refuses changes of IDENTITY, and of TRAJECTORY unless ALLOW_CHANGE names them; other settings may change.
# Every setting of the optimization is also a field of recipe.Recipe.
IDENTITY = (
    "SEED", "MAX_SEQ_LEN", "NUM_STREAMS", "DEPTH", "ASPECT_RATIO", "HEAD_DIM", "BIGRAM_ROWS", "PLAIN",
    "SPECTRAL_TOKENS", "INIT_FROM",
)  # fmt: skip
TRAJECTORY = (
    *HORIZON, "TOTAL_BATCH_SIZE", "BATCH_RAMP", "MATRIX_LR", "EMBEDDING_LR", "UNEMBEDDING_LR", "SCALAR_LR",
    "WEIGHT_DECAY", "GRAD_CLIP", "SCHEDULE", "WARMUP_RATIO", "WARMDOWN_RATIO", "FINAL_LR_FRAC", "DTYPE", "COMPILE",
    "DETERMINISTIC",
)  # fmt: skip
SPECTRAL_RUNS = 5  # bigram init counts at most this multiple of the run's training tokens


@faults_as_sentences(
    when_lost=": --resume continues from the last checkpoint",
    when_full=" before the first pass: try a smaller --depth or --spectral-tokens=0",
)
def main() -> None:
    cfg = config.snapshot(__name__)
    check_settings(cfg)
    dist = init_distributed(cfg.DEVICE, cfg.DTYPE, cfg.SEED, cfg.DETERMINISTIC)
    stop = guard.StopRequest(prints=dist.is_rank0)  # only now: a signal while ranks join has nothing to save
    with guard.Watchdog(guard.SLOW_SECONDS, dist.rank) as watchdog:
        train(cfg, dist, stop, watchdog)
    dist.close()


def train(cfg: SimpleNamespace, dist: DistContext, stop: guard.StopRequest, watchdog: guard.Watchdog) -> None:
    """Train one run, from its data to its last checkpoint. `stop.requested` ends it early; `watchdog` sees progress."""
    run_dir = paths.run_dir(cfg.RUN_NAME or (f"d{cfg.DEPTH}" if cfg.DEPTH else "base"))
    data = TrainData.open(cfg.DATA_DIR, cfg.TOKENIZER_DIR, dist)
    checkpoints = CheckpointManager(run_dir, dist, cfg.SAVE_EVERY, cfg.KEEP_LAST, cfg.KEEP_EVERY)
    restored = checkpoints.restore(cfg.RESUME)  # None for a new run
    if restored:
        restored.check(data, cfg, config.defaults(__file__), IDENTITY, TRAJECTORY)
    run = RunPlan(cfg, data, dist, restored)
    state = run.state
    text = ([data.shards.validation.path], data.tokenizer, run.model_config.max_seq_len, cfg.EVAL_TOKENS)
    sequences = dist.on_all_ranks(lambda: packed_sequences(*text)) if cfg.EVAL_EVERY else None
    dist.print0("\n".join([f"run        {run_dir}", *run.describe()]))
    if cfg.DRY_RUN:
        return
    if state.is_finished:
        dist.print0(f"nothing to do: {run_dir.name} has a checkpoint at step {state.step} of {state.num_steps}")
        return write_report(cfg, run_dir, state, dist)

    tasks = (cfg.CORE_BUNDLE, data.shards.validation.path, dist, cfg.CORE_MAX_PER_TASK)
    bundle = core_bundle.obtain(*tasks) if cfg.CORE_METRIC_EVERY else None
    checkpoints.claim(data.tokenizer)
    shapes = run.model_config, run.plan.device_batch_size
    with warmup.compiling_ahead(dist, *shapes, cfg.COMPILE, cfg.TARGET_MINUTES):
        model, optimizers, reader = build(cfg, data, run, dist, restored)
    record = {"format": FORMAT, "plan": asdict(run.plan), **run.record(), "defaults": config.defaults(__file__)}
    dist.on_rank0(lambda: write_json(run_dir / "config.json", record))
    batch_size, grad_accum_steps = run.plan.device_batch_size, run.plan.grad_accum_steps
    pass_seconds = warmup.compile_and_warm_up(dist, model, batch_size, cfg.COMPILE, cfg.TARGET_MINUTES)
    train_step = TrainStep(model, optimizers, dist, run.plan, run.recipe.grad_clip, run.saved)
    peak = (hardware.peak_flops(dist.device) or 0.0) * dist.world_size / run.plan.flops_per_token
    metrics = dist.on_all_ranks(lambda: MetricLogger(run_dir, state.num_steps, state.step, dist.is_rank0, peak))
    evaluations = (cfg.EVAL_EVERY, cfg.CORE_METRIC_EVERY, cfg.EVALUATIONS_AFTER)
    kept = checkpoints.horizon(f"{cfg.TARGET_MINUTES} minutes in steps of {run.plan.total_batch_size} tokens")
    budget = TimeBudget(cfg.TARGET_MINUTES, *evaluations, pass_seconds * grad_accum_steps, dist, *kept)
    evals = Evals(cfg, model, data.tokenizer, sequences, bundle, dist, metrics, watchdog.beat)
    checkpoints.begin(state, run.record(), metrics, watchdog.beat)
    with warmup.memory_limit(batch_size, model), metrics, DataLoader(reader, batch_size, dist.device) as loader:
        labels = {"project": cfg.WANDB_PROJECT, "tags": cfg.WANDB_TAGS, "notes": cfg.WANDB_NOTES}
        metrics.start_wandb(cfg.WANDB, labels, record, state.wandb_id, cfg.WANDB_LOG_EVERY)
        batches = dist.on_all_ranks(lambda: Prefetcher(loader))
        stopping = False
        while True:
            if not stopping:
                evals.run(state)
            is_final = stopping or state.is_finished
            if checkpoints.due(state, is_final):
                checkpoints.save(state, train_step, batches, is_final)
            if is_final:
                break
            budget.correct(state)  # before the first step of a horizon
            watchdog.beat(budget.step_limit_seconds)
            schedule = run.recipe.at(state.progress(state.step + 1), grad_accum_steps)
            result = train_step(batches, schedule, stop)
            if result.data_failed:  # this step does not count; the finished ones are saved
                checkpoints.save_then_raise(state, train_step, batches)
            deviations = state.advance(result)
            budget.add(result, run.plan.total_batch_size)
            metrics.log_step(state, result, deviations, schedule.matrix_lr, budget.seconds_left(state))
            state.raise_if_too_many_skipped(result, run.recipe.matrix_lr)
            guard.check_replicas(dist, train_step.parameters, state.step, guard.CHECK_REPLICAS_EVERY)
            budget.correct(state)
            stopping = result.stop_requested and not state.is_finished
        metrics.finish(state, hardware.peak_memory_bytes(dist.device))
    write_report(cfg, run_dir, state, dist)


# ---- before the first step ----


def build(
    cfg: SimpleNamespace, data: TrainData, run: RunPlan, dist: DistContext, restored: Restored | None
) -> tuple[GPT, list[optim.ShardedOptimizer], SequenceReader]:
    """Model with its weights, optimizers, and reader of the next sequences. On CUDA, finds the batch size that fits and
    changes run.plan.
    """
    slices = slices_of(data.shards.train, run.num_streams)
    stream = (slices, data.tokenizer, run.model_config.max_seq_len, run.num_streams, cfg.SEED)
    threads = hardware.cores_of_a_rank()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the readers have their own threads
    model = checkpoint.build_model(run.model_config, dist.device)
    if cfg.GRAD_CHECKPOINT:
        model.recompute_blocks = True
    roles, rates = model.parameters_by_role(), run.recipe.learning_rates
    muon_dtype = torch.bfloat16 if dist.dtype == torch.bfloat16 else torch.float32
    optimizers = optim.build_optimizers(roles, rates, run.recipe.weight_decay, muon_dtype, dist)
    if restored:
        restored.load_tensors(model, optimizers)
    elif run.first_weights:
        checkpoint.load_weights(model, run.first_weights)
        run.first_weights = None
    else:
        model.init_buffers()
        dist.on_rank0(lambda: draw_weights(model, run, SequenceReader(*stream, threads=threads)))
        drawn = [parameter.detach().view(-1) for parameter in model.parameters()]
        dist.broadcast_owned([drawn, *[[]] * (dist.world_size - 1)])()
    if run.tries_batch_sizes:
        most = run.plan.device_batch_size * run.plan.grad_accum_steps // (recipe.BATCH_PARTS if run.batch_ramp else 1)
        fitting = warmup.largest_batch_that_fits(dist, model, most)
        run.set_batch(fitting)
        dist.print0("\n".join([f"fits       {fitting} sequences", *run.describe_batch()]))
    loader_state = restored.state["loader"] if restored else None
    reader = SequenceReader(*stream, dist.rank, dist.world_size, loader_state, threads)
    return model, optimizers, reader


def draw_weights(model: GPT, run: RunPlan, reader: SequenceReader) -> None:
    """Initialize all weights; embedding and head from the bigrams of the next sequences if the plan says so."""
    model.init_weights(run.cfg.SEED)
    if run.spectral_tokens:
        num_tokens = min(run.spectral_tokens, SPECTRAL_RUNS * run.plan.tokens)
        init_from_bigrams(model, reader, num_tokens, run.cfg.SEED)
        hardware.give_back_freed_memory()  # the bigram counts


# ---- around the loop ----


def write_report(cfg: SimpleNamespace, run_dir: Path, state: TrainState, dist: DistContext) -> None:
    if cfg.REPORT and state.is_finished and dist.is_rank0:
        dist.print0(report.attempt(run_dir))


def check_settings(cfg: SimpleNamespace) -> None:
    config.choice("COMPILE", cfg.COMPILE, ("auto", "on", "off"))
    config.choice("SCHEDULE", cfg.SCHEDULE, tuple(recipe.SCHEDULES))
    config.choice("WANDB", cfg.WANDB, ("off", "offline", "online"))
    config.check_numbers(
        cfg,
        at_least_one=("KEEP_LAST", "WANDB_LOG_EVERY"),
        fractions=("WARMUP_RATIO", "WARMDOWN_RATIO", "FINAL_LR_FRAC"),
        unset=[name for name, value in config.defaults(__file__).items() if value == -1],
    )
    horizons = [f"{config.flag_of(name)}={getattr(cfg, name)}" for name in HORIZON[:3] if getattr(cfg, name)]
    if len(horizons) > 1:
        raise UserError(f"{' '.join(horizons)}: more than one horizon: give only one")
    if not horizons and not cfg.TARGET_PARAM_DATA_RATIO:
        raise UserError("--target-param-data-ratio=0 and no other horizon: set one, as in --num-iterations=1000")
    if cfg.EARLY_STOP_PATIENCE and not cfg.EVAL_EVERY:
        raise UserError("--early-stop-patience needs evaluations: set --eval-every, as in --eval-every=250")
    if max(cfg.WARMUP_RATIO, 0) + max(cfg.WARMDOWN_RATIO, 0) > 1:
        ratios = f"--warmup-ratio={cfg.WARMUP_RATIO} and --warmdown-ratio={cfg.WARMDOWN_RATIO}"
        raise UserError(f"{ratios} overlap: together at most 1")


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)
