"""The plan of a run, derived from settings, data, machine and checkpoint before any memory is allocated."""

from dataclasses import asdict
from types import SimpleNamespace

from nanotrain import attention, checkpoint, hardware, recipe, warmup
from nanotrain.checkpoint import Restored, parsed
from nanotrain.dataloader import TrainData, choose_num_streams
from nanotrain.dist import DistContext
from nanotrain.gpt import GPTConfig
from nanotrain.loss import chunk_rows
from nanotrain.terminal import row
from nanotrain.trainer import TrainState

HORIZON = ("NUM_ITERATIONS", "TARGET_FLOPS", "TARGET_MINUTES", "TARGET_PARAM_DATA_RATIO")  # fields of recipe.Horizon
UNSET = {"max_seq_len": 0, "total_batch_size": 0, "batch_ramp": False, "schedule": "wsd"}  # defaults other than -1
DEFAULT_BATCH_TOKENS = 4096  # tokens of a forward pass where the largest batch that fits is not searched for


class RunPlan:
    """Model shape, recipe, batch, horizon and initial state of a run. A resumed run takes shape, recipe and batch from
    its checkpoint, except for settings that were changed on purpose.
    """

    def __init__(self, cfg: SimpleNamespace, data: TrainData, dist: DistContext, restored: Restored | None):
        """cfg: settings of scripts.base_train. Raises UserError for bad ones, CheckpointError for a bad saved state."""
        self.cfg, self.data, self.dist = cfg, data, dist
        self.saved = restored.state if restored else None  # contents of state.json
        was, changed = self.saved or {}, restored.changed if restored else set()
        self.environment = hardware.environment(dist.device, dist.dtype, dist.world_size)
        if restored:
            restored.warn_of_difference(self.environment, dist)
        measured = dist.broadcast_object(hardware.training_flops_per_second(dist.device, dist.dtype))
        self.flops_per_second = measured * recipe.EFFICIENCY * dist.world_size
        self.horizon = recipe.Horizon(*[getattr(cfg, name) for name in HORIZON])
        self.depth_reason = "from the checkpoint"
        self.model_config = parsed(GPTConfig, was["model_config"]) if restored else self._choose_model()
        width, seq_len = self.model_config.model_dim, self.model_config.max_seq_len
        self.total_batch_size = cfg.TOTAL_BATCH_SIZE or was.get("total_batch_size", 0)
        self.batch_ramp = cfg.BATCH_RAMP
        if restored and "BATCH_RAMP" not in changed:
            self.batch_ramp = was["recipe"]["batch_ramp"]
        elif self.total_batch_size % (recipe.BATCH_PARTS * seq_len * dist.world_size):
            self.batch_ramp = False  # not an error: a given batch takes precedence over the ramp
        self.set_batch(cfg.DEVICE_BATCH_SIZE or max(DEFAULT_BATCH_TOKENS // seq_len, 1))
        settings = {**vars(cfg), "BATCH_RAMP": self.batch_ramp}
        self.recipe = recipe.Recipe.of(width, self.plan.tokens, self.plan.total_batch_size, settings)
        if restored:
            self.recipe = self.recipe.resumed(asdict(parsed(recipe.Recipe, was["recipe"])), changed)
        self.state = parsed(TrainState, was.get("train_state", {}))
        self.trained_tokens = was["loader"]["next_sequence"] * seq_len if restored else 0
        if not restored or changed & {*HORIZON, "TOTAL_BATCH_SIZE", "BATCH_RAMP"}:
            self.state.set_horizon(self.horizon, self.plan, self.trained_tokens, self.batch_ramp)
        streams = was["loader"]["streams"] if restored else ()
        self.num_streams = len(streams) or cfg.NUM_STREAMS or choose_num_streams(data.shards.train)
        unset = cfg.SPECTRAL_TOKENS == -1
        self.spectral_tokens = recipe.sizes(width).spectral_tokens if unset else cfg.SPECTRAL_TOKENS
        self.first_weights = None
        if cfg.INIT_FROM and not restored:
            source = (dist, cfg.INIT_FROM, self.model_config, data.tokenizer)
            self.first_weights, self.model_config = checkpoint.load_first_weights(*source)

    def _choose_model(self):
        """The GPTConfig of a new run: depth as set, or optimal for the FLOPs of the horizon, or the default."""
        cfg, minutes = self.cfg, self.horizon.target_minutes
        depth, self.depth_reason = cfg.DEPTH or recipe.DEFAULT_DEPTH, "--depth" if cfg.DEPTH else "default"
        if not cfg.DEPTH and (minutes or self.horizon.target_flops):
            flops = self.horizon.target_flops or recipe.training_flops(minutes, self.flops_per_second)
            speed = f": {minutes:.3g} minutes at {self.flops_per_second / 1e9:,.0f} GFLOP/s" if minutes else ""
            depth = recipe.choose_depth(flops, cfg.HEAD_DIM, cfg.ASPECT_RATIO)
            self.depth_reason = f"{flops:.1e} FLOPs{speed}"
        width, heads = recipe.model_width(depth, cfg.ASPECT_RATIO, cfg.HEAD_DIM)
        sizes = recipe.sizes(width)
        rows = 0 if cfg.PLAIN else sizes.bigram_rows if cfg.BIGRAM_ROWS == -1 else cfg.BIGRAM_ROWS
        lengths = self.data.tokenizer.vocab_size, cfg.MAX_SEQ_LEN or sizes.seq_len
        layers = {"num_layers": depth, "num_heads": heads, "num_kv_heads": heads, "head_dim": cfg.HEAD_DIM}
        return GPTConfig(*lengths, **layers, bigram_rows=rows, plain=cfg.PLAIN, rope_base=sizes.rope_base)

    def set_batch(self, max_device_batch_size: int) -> None:
        """Set `plan`, with at most `max_device_batch_size` sequences per forward pass."""
        cfg, dist = self.cfg, self.dist
        compiled = warmup.compile_pays(cfg.COMPILE, dist, cfg.TARGET_MINUTES) and hardware.can_compile()
        keeps_scores = compiled and dist.device.type == "cpu" and self.model_config.max_seq_len <= attention.LONGEST
        self.plan = recipe.make_plan(
            checkpoint.build_model(self.model_config, "meta").parameter_counts(),
            self.model_config,
            self.horizon,
            total_batch_size=self.total_batch_size,
            max_device_batch_size=max_device_batch_size,
            world_size=dist.world_size,
            on_gpu=dist.device.type == "cuda",
            flops_per_second=self.flops_per_second,
            policy=recipe.ActivationPolicy(
                dist.dtype.itemsize, compiled, cfg.GRAD_CHECKPOINT, chunk_rows(dist.device), keeps_scores
            ),
            batch_ramp=self.batch_ramp,
        )

    @property
    def tries_batch_sizes(self) -> bool:
        """Whether to find the largest batch that fits by trial. Not on a CPU, where running out of memory is fatal."""
        return self.cfg.DEVICE_BATCH_SIZE == 0 and self.dist.device.type == "cuda"

    def record(self) -> dict:
        """Description of this run for its checkpoints and config.json."""
        return {
            "model_config": asdict(self.model_config),
            "recipe": asdict(self.recipe),
            "total_batch_size": self.plan.total_batch_size,
            "tokenizer_sha256": self.data.tokenizer.sha256(),
            "data": self.data.fingerprint,
            "data_dir": str(self.data.shards.folder),
            "environment": self.environment,
            "settings": vars(self.cfg),
        }

    def describe(self) -> list[str]:
        """Table to print before the first step; in a dry run with every number of the recipe and its reason."""
        dist, shape, counts, found = self.dist, self.model_config, self.plan.parameters, self.recipe
        tables = sum(count for role, count in counts.items() if "embedding" in role and role != "unembedding")
        weights = f"{counts['matrix']:,} in matrices, {counts['unembedding']:,} in the head, {tables:,} in embeddings"
        warmup_steps = round(found.warmup_ratio * self.state.num_steps)
        rates = f"{found.matrix_lr:.3g} matrices (Muon), {found.embedding_lr:.3g} embedding"
        rates += f", {found.unembedding_lr:.3g} head, {found.scalar_lr:.3g} scalars"
        schedule = f"{found.schedule}, {warmup_steps:,} warmup steps, weight decay {found.weight_decay:.3g}"
        return [
            row("device", f"{dist.world_size} x {hardware.device_name(dist.device)}"),
            row("precision", f"{str(dist.dtype).removeprefix('torch.')} ({dist.dtype_reason})"),
            row("model", f"depth {shape.num_layers} ({self.depth_reason}), width {shape.model_dim}"),
            row("weights", weights),
            *self.describe_batch(),
            *self._describe_horizon(),
            *(self._reasons() if self.cfg.DRY_RUN else [row("rates", rates), row("schedule", schedule)]),
        ]

    def _describe_horizon(self):
        state, plan = self.state, self.plan
        steps_left, share = max(state.num_steps - state.step, 0), 1.0
        if self.batch_ramp and steps_left:
            share = recipe.mean_batch_share(state.progress(state.step + 0.5))
        tokens = self.trained_tokens + steps_left * plan.total_batch_size * share
        text_tokens, folder = self.data.estimated_tokens(), self.data.shards.folder
        minutes = self.horizon.target_minutes or plan.seconds / 60
        steps = f"{'about ' if self.horizon.is_timed else ''}{state.num_steps:,} steps"
        lines = [
            row("data", f"about {text_tokens / 1e6:,.1f} M tokens in {folder}"),
            row("horizon", f"{steps}, {tokens / 1e6:,.2f} M tokens ({tokens / text_tokens:.2f} epochs)"),
            row("cost", f"{tokens * plan.flops_per_token:.1e} FLOPs, about {minutes:.1f} minutes"),
        ]
        if tokens > 2 * text_tokens:  # from here on a small model with tables memorizes (dev/LOG.md)
            lines.append(row("warning", "more than 2 epochs: more text would help more than more steps"))
        return lines

    def describe_batch(self) -> list[str]:
        """Lines about batch and memory, with a warning if there is too little memory."""
        plan, shape, memory, gib = self.plan, self.model_config, self.plan.memory, 2**30
        size, most = plan.device_batch_size, self.cfg.DEVICE_BATCH_SIZE
        lowered = f" (lowered from {most})" if size < most else ""
        factors = f"{size} sequences{lowered} of {shape.max_seq_len} x {plan.grad_accum_steps} micro-steps"
        lines = [row("batch", f"{plan.total_batch_size:,} tokens = {factors} x {self.dist.world_size} ranks")]
        if self.cfg.BATCH_RAMP and not self.batch_ramp:
            lines.append(row("", "no ramp: the batch cannot be divided into four equal parts"))
        needed, free = memory.peak, hardware.free_memory_bytes(self.dist.device)
        text = f"about {memory.peak / gib:.2f} GiB per rank"
        if self.cfg.DRY_RUN:
            names = ("weights", "gradients", "optimizer", "activations", "logits", "update")
            parts = [f"{name} {getattr(memory, name) / gib:.2f}" for name in names]
            text += f": {', '.join(parts[:3])}, and the larger of {' + '.join(parts[3:5])} and {parts[5]}"
        if self.dist.device.type == "cpu":
            needed, taken = recipe.process_growth(memory), hardware.peak_memory_bytes(self.dist.device)
            text += f"; process up to {(taken + needed) / gib:.1f} GiB ({taken / gib:.1f} already used)"
        lines.append(row("memory", text))
        if needed > free:
            less = self._less_memory()
            lines.append(row("warning", f"only {free / gib:.1f} GiB of memory is free per rank: {less}"))
        return lines

    def _less_memory(self):
        memory, size, depth = self.plan.memory, self.plan.device_batch_size, self.model_config.num_layers
        peak_in_passes = memory.update <= memory.activations + memory.logits
        smaller = f"--device-batch-size={size // 2} (now {size})"
        if not peak_in_passes or size == 1:
            smaller = f"--depth={depth // 2 or 1} (now {depth})"
        return f"{'' if self.cfg.GRAD_CHECKPOINT or not peak_in_passes else 'add --grad-checkpoint or '}use {smaller}"

    def _reasons(self):
        lines, places = [], (self.recipe, self.model_config, self.plan, self)
        for name, reason in recipe.REASONS.items():
            value = next(getattr(place, name) for place in places if hasattr(place, name))
            given = getattr(self.cfg, name.upper(), -1) != UNSET.get(name, -1)
            reason = "from the checkpoint" if self.saved else "as set" if given else reason
            lines.append(f"  {name:<16} {f'{value:.4g}' if type(value) is float else value!s:<9} {reason}")
        return lines
