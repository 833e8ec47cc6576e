"""The plan of a run: what follows from settings, data, machine and checkpoint before any memory is allocated."""

from dataclasses import asdict
from types import SimpleNamespace

from nanotrain import checkpoint, hardware, recipe, warmup
from nanotrain.checkpoint import Restored, parsed
from nanotrain.dataloader import TrainData
from nanotrain.dist import DistContext
from nanotrain.errors import UserError
from nanotrain.gpt import GPTConfig
from nanotrain.loss import chunk_rows
from nanotrain.trainer import TrainState

HORIZON = ("NUM_ITERATIONS", "TARGET_FLOPS", "TARGET_MINUTES", "TARGET_PARAM_DATA_RATIO")
DEFAULT_BATCH = 16  # sequences of a forward pass


class RunPlan:
    """Model shape, recipe, batch and horizon of one run, and the state that it begins with.

    A run that goes on takes its shape, its recipe and its batch from the checkpoint, except for settings that were
    changed on purpose.
    """

    def __init__(self, cfg: SimpleNamespace, data: TrainData, dist: DistContext, restored: Restored | None):
        """cfg: the settings of scripts.base_train. Raises UserError if they contradict each other or the checkpoint."""
        self.cfg, self.data, self.dist = cfg, data, dist
        self.saved = restored.state if restored else None  # state.json of the checkpoint
        was, changed = self.saved or {}, restored.changed if restored else set()
        self.environment = hardware.environment(dist.device, dist.dtype, dist.world_size)
        if restored:
            restored.warn_of_difference(self.environment, dist)
        measured = dist.broadcast_object(hardware.training_flops_per_second(dist.device, dist.dtype))
        self.flops_per_second = measured * recipe.EFFICIENCY * dist.world_size
        self.horizon = recipe.Horizon(
            cfg.NUM_ITERATIONS, cfg.TARGET_FLOPS, cfg.TARGET_MINUTES, cfg.TARGET_PARAM_DATA_RATIO
        )
        self.depth_reason = "as before"
        self.model_config = parsed(GPTConfig, was["model_config"]) if restored else self._choose_model()
        seq_len = self.model_config.max_seq_len
        if cfg.EVAL_EVERY and cfg.EVAL_TOKENS < seq_len:
            raise UserError(f"--eval-tokens={cfg.EVAL_TOKENS}: less than one sequence of {seq_len} tokens")
        self.recipe = recipe.Recipe.from_settings(vars(cfg), self.model_config.model_dim)
        if restored:
            self.recipe = self.recipe.resumed(asdict(parsed(recipe.Recipe, was["recipe"])), changed)
        self.total_batch_size = cfg.TOTAL_BATCH_SIZE or was.get("total_batch_size", 0)
        self.set_batch(cfg.DEVICE_BATCH_SIZE or DEFAULT_BATCH)
        self.state = parsed(TrainState, was.get("train_state", {}))
        self.trained_tokens = was["loader"]["next_sequence"] * seq_len if restored else 0
        if not restored or changed & {*HORIZON, "TOTAL_BATCH_SIZE", "BATCH_RAMP"}:
            self.state.set_horizon(self.horizon, self.plan, self.trained_tokens, self.recipe.batch_ramp)
        self.first_weights = None
        if cfg.INIT_FROM and not restored:
            self.first_weights, self.model_config = checkpoint.load_first_weights(
                dist, cfg.INIT_FROM, self.model_config, data.tokenizer
            )

    def _choose_model(self):
        cfg = self.cfg
        depth, self.depth_reason = recipe.resolve_depth(
            cfg.DEPTH, self.horizon, cfg.HEAD_DIM, cfg.ASPECT_RATIO, self.flops_per_second
        )
        width, heads = recipe.model_width(depth, cfg.ASPECT_RATIO, cfg.HEAD_DIM)
        return GPTConfig(
            vocab_size=self.data.tokenizer.vocab_size,
            max_seq_len=cfg.MAX_SEQ_LEN or recipe.sequence_length(width),
            num_layers=depth,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=cfg.HEAD_DIM,
            bigram_rows=0 if cfg.PLAIN else cfg.BIGRAM_ROWS,
            plain=cfg.PLAIN,
        )

    def set_batch(self, max_device_batch_size: int) -> None:
        """Set `plan`, with at most so many sequences per forward pass."""
        cfg, dist = self.cfg, self.dist
        compiled = warmup.compile_pays(cfg.COMPILE, dist.dtype, cfg.TARGET_MINUTES) and hardware.can_compile()
        self.plan = recipe.make_plan(
            checkpoint.build_model(self.model_config, "meta").parameter_counts(),
            self.model_config,
            self.horizon,
            total_batch_size=self.total_batch_size,
            max_device_batch_size=max_device_batch_size,
            world_size=dist.world_size,
            flops_per_second=self.flops_per_second,
            policy=recipe.ActivationPolicy(dist.dtype.itemsize, compiled, cfg.GRAD_CHECKPOINT, chunk_rows(dist.device)),
            batch_parts=self.recipe.batch_parts,
            mean_batch_share=self.recipe.mean_batch_share,
        )

    @property
    def tries_batch_sizes(self) -> bool:
        """Whether the largest batch that fits is found by trying: elsewhere memory that runs out ends the process."""
        return self.cfg.DEVICE_BATCH_SIZE == 0 and self.dist.device.type == "cuda"

    def record(self) -> dict:
        """What every checkpoint and config.json hold of this run."""
        return {
            "model_config": self.model_config.to_dict(),
            "recipe": asdict(self.recipe),
            "total_batch_size": self.plan.total_batch_size,
            "tokenizer_sha256": self.data.tokenizer.sha256(),
            "data": self.data.fingerprint,
            "data_dir": str(self.data.shards.folder),
            "environment": self.environment,
            "settings": vars(self.cfg),
        }

    def describe(self) -> list[str]:
        """The lines that a person reads before the first step."""
        state, dist, share = self.state, self.dist, 1.0
        steps_left = max(state.num_steps - state.step, 0)
        if self.recipe.batch_ramp and steps_left:
            share = recipe.mean_batch_share(state.progress(state.step + 0.5))
        tokens = self.trained_tokens + steps_left * self.plan.total_batch_size * share
        text_tokens, folder = self.data.estimated_tokens(), self.data.shards.folder
        lines = [
            f"device     {dist.world_size} x {hardware.device_name(dist.device)}",
            f"precision  {str(dist.dtype).removeprefix('torch.')} ({dist.dtype_reason})",
            *recipe.describe_model(self.plan, self.model_config, self.depth_reason),
            *self.describe_batch(),
            *recipe.describe_horizon(self.plan, self.horizon, state.num_steps, tokens, text_tokens, folder),
        ]
        if self.tries_batch_sizes:
            lines.append("fits       the largest batch is found by trying, once the model is there")
        return lines

    def describe_batch(self) -> list[str]:
        """The lines about batch and memory."""
        cfg, dist = self.cfg, self.dist
        taken = hardware.peak_memory_bytes(dist.device) if dist.device.type == "cpu" else None
        free, most = hardware.free_memory_bytes(dist.device), cfg.DEVICE_BATCH_SIZE
        return recipe.describe_batch(
            self.plan, self.model_config, dist.world_size, most, cfg.GRAD_CHECKPOINT, free, taken
        )
