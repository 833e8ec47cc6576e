"""Fine-tune an exported model on your own text with LoRA (arXiv:2106.09685), using transformers' Trainer and peft.

    pip install -e '.[finetune]'
    python dev/lora.py --model=exported --text=notes.txt --out=adapter
    python dev/lora.py --model=exported --text=notes.txt --out=adapter --four-bits     QLoRA (arXiv:2305.14314)

The last sixteenth of the text is held out: training stops early when the loss on it stops improving, and the best
adapter is kept.
"""

import importlib.util
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from nanotrain import config, errors
from nanotrain.errors import UserError

try:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        EarlyStoppingCallback,
        Trainer,
        TrainingArguments,
    )
except ImportError as error:
    sys.exit(f"error: {error}: pip install -e '.[finetune]'")

# --- settings
MODEL = ""  # folder written by scripts.export_hf
TEXT = ""  # file of plain text
OUT = ""  # folder for the adapter
RANK = 16  # rank of the adapter's matrices
LEARNING_RATE = 3e-3  # peak learning rate
STEPS = 80  # maximum number of steps
BATCH_SIZE = 16  # sequences per step
EVAL_EVERY = 10  # steps between evaluations
PATIENCE = 3  # evaluations without improvement before training stops
FOUR_BITS = False  # 4-bit base model (needs bitsandbytes)
SEED = 1337  # seed of the adapter and of the order of sequences
# ------------


def main():
    if not (MODEL and TEXT and OUT):
        raise UserError("give --model=FOLDER, --text=FILE and --out=FOLDER")
    if not Path(MODEL, "config.json").is_file():
        raise UserError(f"--model={MODEL}: no exported model; write one: python -m scripts.export_hf --out={MODEL}")
    if FOUR_BITS and not importlib.util.find_spec("bitsandbytes"):
        raise UserError("--four-bits needs bitsandbytes: pip install bitsandbytes")
    tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
    try:
        text = Path(TEXT).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fix = "convert it with iconv -f ENCODING -t UTF-8"
        raise UserError(f"--text={TEXT}: byte {error.start} is not UTF-8: {fix}") from None
    sequences = sequences_of(text, tokenizer)
    held_out = max(len(sequences) // 16, 1)
    if len(sequences) <= held_out:
        raise UserError(f"--text={TEXT}: too short, {len(sequences)} sequences of {tokenizer.model_max_length} tokens")
    model = get_peft_model(
        base_model(),
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    arguments = TrainingArguments(
        OUT,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=BATCH_SIZE,
        eval_strategy="steps",
        eval_steps=EVAL_EVERY,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=EVAL_EVERY,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=EVAL_EVERY,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=SEED,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=sequences[:-held_out],
        eval_dataset=sequences[-held_out:],
        callbacks=[EarlyStoppingCallback(PATIENCE)],
    )
    begin = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - begin
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    trained, all_weights = model.get_nb_trainable_parameters()
    trainer.save_model(OUT)
    best = min(losses[1:])  # Trainer does not count the evaluation before the first step either
    print(f"held-out loss {losses[0]:.4f} -> {best:.4f} nats per token after {trainer.state.global_step} steps")
    print(f"{seconds:.0f} s, {memory_gib():.2f} GiB peak, {trained:,} of {all_weights:,} weights trained: {OUT}")


def sequences_of(text, tokenizer):
    """A dataset for Trainer: the tokens of a text in whole sequences of model_max_length."""
    length = tokenizer.model_max_length
    ids = tokenizer(text, verbose=False)["input_ids"]  # BOS first
    starts = range(0, len(ids) - length + 1, length)
    return [{"input_ids": ids[start : start + length], "labels": ids[start : start + length]} for start in starts]


def base_model():
    """The exported model in float32, or with its matrices in 4 bits."""
    if not FOUR_BITS:
        return AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=True, dtype=torch.float32)
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "value_gate"],  # gates are tiny
    )
    model = AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=True, quantization_config=bits)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 would repack the weights in the first evaluation and then pass on no gradients
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def memory_gib():
    """Peak memory of this process, on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)
