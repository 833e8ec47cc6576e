"""Export to the Hugging Face format: a folder that `transformers` loads, checked against the original model.

A plain model (`GPTConfig.plain`) becomes transformers' own NanoChatForCausalLM. Any other is exported with a copy of
the two self-contained modeling files of this package, the only one that needs transformers.
"""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Tokenizer, processors

from nanotrain import dataset
from nanotrain.errors import RunError, first_line
from nanotrain.gpt import GPT, GPTConfig
from nanotrain.tokenizer import BOS, FILE_NAME, PAD, BPETokenizer

CARD = Path(__file__).parent / "model_card.md"
# Settings that are private or contain local paths.
PRIVATE = re.compile("RUN_NAME|INIT_FROM|CORE_BUNDLE|WANDB|.*_DIR$")
TOLERANCE = 1e-3  # for float32 logits, which are bounded by the softcap
CHECKED_TEXTS = ("  Ünïcode, 日本語, 🙂🏽\r\n\t0123", f"text that names {BOS} is text", "")
PLAIN_NAMES = {  # our module names -> those of NanoChatForCausalLM, where they differ
    "embedding": "model.embed_tokens",
    "blocks": "model.layers",
    "attention": "self_attn",
    "up_proj": "mlp.fc1",
    "down_proj": "mlp.fc2",
}


def write(model: GPT, tokenizer: BPETokenizer, folder: Path) -> None:
    """Write a model and its tokenizer into an empty folder. Raises RunError if the disk is full."""
    try:
        convert(model, tokenizer).save_pretrained(folder, max_shard_size="5GB")
    except SafetensorError as error:  # not an OSError, even for a full disk
        raise RunError(f"{folder.parent.parent}: {first_line(error)}") from None
    inner = Tokenizer.from_str(tokenizer.to_json())
    begins = {"single": f"{BOS} $A", "pair": f"{BOS} $A {BOS}:1 $B:1"}  # adds BOS
    inner.post_processor = processors.TemplateProcessing(**begins, special_tokens=[(BOS, tokenizer.bos)])
    inner.save(str(folder / FILE_NAME))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token"), BOS),  # a text ends where the next one begins
        "pad_token": BOS if tokenizer.pad is None else PAD,
        "padding_side": "left",  # for batched generation
        "model_max_length": model.config.max_seq_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "<|bos|>" in a text is plain text
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def convert(model: GPT, tokenizer: BPETokenizer) -> torch.nn.Module:
    """A transformers model that shares a GPT's weights."""
    from transformers import GenerationConfig, NanoChatForCausalLM

    from nanotrain.huggingface.modeling_nanotrain import NanotrainForCausalLM

    NanotrainForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # saves the code with the model
    plain = model.config.plain
    converted = (NanoChatForCausalLM if plain else NanotrainForCausalLM)(convert_config(model.config, tokenizer))
    tensors = {}
    for name, tensor in model.state_dict().items():
        if plain:
            name = ".".join(PLAIN_NAMES.get(part, part) for part in name.split("."))
        elif name != "lm_head.weight":
            name = f"model.{name}"
        tensors[name] = tensor
    converted.load_state_dict(tensors, assign=True)  # strict: raises if any are missing
    special = {name: getattr(converted.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    converted.generation_config = GenerationConfig(**special, do_sample=True, temperature=0.8, top_k=50)
    return converted.eval()


def convert_config(config: GPTConfig, tokenizer: BPETokenizer) -> object:
    """The NanoChatConfig for a plain GPTConfig, a NanotrainConfig for any other."""
    from transformers import NanoChatConfig

    from nanotrain.huggingface.configuration_nanotrain import NanotrainConfig

    NanotrainConfig.register_for_auto_class()
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "final_logit_softcapping": config.softcap,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.bos,
        "pad_token_id": tokenizer.pad,  # never BOS: the padding embedding gets no gradient
    }
    if config.plain:
        shape["intermediate_size"] = 4 * config.model_dim
        shape["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_base}
        return NanoChatConfig(**shape)
    return NanotrainConfig(
        **shape,
        auto_map={"AutoModel": "modeling_nanotrain.NanotrainModel"},
        value_embedding_layers=list(filter(config.has_value_embedding, range(config.num_layers))),
        bigram_rows=config.bigram_rows,
        gate_channels=config.gate_channels,
        attention_gain=config.attention_gain,
        rope_theta=config.rope_base,
    )


@torch.no_grad()
def check(model: GPT, tokenizer: BPETokenizer, folder: Path) -> float:
    """Load the folder as its users will and compare float32 logits of random tokens, with and without left padding.
    Returns the largest difference. Raises RunError if it exceeds TOLERANCE or the tokenizers disagree.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trust = not model.config.plain
    other = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for text in CHECKED_TEXTS:
        if other(text)["input_ids"] != [tokenizer.bos, *tokenizer.encode(text)]:
            raise RunError(f"{folder}: transformers and nanotrain tokenize {text!r} differently")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust)
    length, padding = model.config.max_seq_len, model.config.max_seq_len // 3
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    first, expected = tokens[:, : length - padding], model.logits(tokens)
    padded, mask = F.pad(first, (padding, 0), value=tokenizer.bos), F.pad(torch.ones_like(first), (padding, 0))
    behind = loaded(padded, attention_mask=mask).logits[:, padding:] - expected[:, : length - padding]
    difference = torch.cat((loaded(tokens).logits - expected, behind), 1).abs().max().item()
    if not difference <= TOLERANCE:
        raise RunError(f"{folder}: logits differ by {difference:.2g} from the model's, more than {TOLERANCE:g}")
    return difference


def model_card(name: str, model: GPT, meta: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The README.md of an exported model. meta: checkpoint state; evaluation: contents of evaluation.json, or {}."""
    splits = {"val_bpb": "validation text", "train_bpb": "train text", "doc_bpb": "whole validation documents"}
    settings, folder = meta["settings"].items(), Path(meta["data_dir"]).name
    template = jinja2.Template(CARD.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True)
    return template.render(
        name=name,
        config=model.config,
        parameters=sum(model.parameter_counts().values()),
        meta=meta,
        tokens=meta["loader"]["next_sequence"] * model.config.max_seq_len,
        bits_per_byte={what: evaluation.get(split, meta.get(split)) for split, what in splits.items()},
        core=evaluation.get("core"),
        folder=folder,
        source=dataset.SOURCES.get(folder),
        data_hash=dataset.hash_of(meta["data"]),
        settings={name: repr(value) for name, value in settings if not PRIVATE.match(name)},
    )
