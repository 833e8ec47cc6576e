"""Export to the Hugging Face format: a folder that `transformers` loads, checked against the model it was made from.

A plain model (`GPTConfig.plain`) is written as transformers' own NanoChatForCausalLM. Any other comes with the two
files of nanotrain/huggingface, which stand alone and compute the same as gpt.py.

    config.json  generation_config.json  model.safetensors (in parts above 5 GB)
    tokenizer.json  tokenizer_config.json  README.md (the model card)  LICENSE

transformers is imported only where it is needed; nothing else in nanotrain needs it.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, processors

from nanotrain import dataset
from nanotrain.errors import FileError, UserError
from nanotrain.tokenizer import BOS, FILE_NAME, BPETokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from nanotrain.gpt import GPT, GPTConfig

CODE = Path(__file__).parent / "huggingface"
CODE_FILES = ("configuration_nanotrain.py", "modeling_nanotrain.py")
CARD = CODE / "model_card.md"
SHARD_SIZE = "5GB"
# settings that are nobody else's business, or hold paths of the machine; so do those that end in _DIR
PRIVATE = ("RUN_NAME", "INIT_FROM", "CORE_BUNDLE", "WANDB")
LISTED_SHARDS = 20  # of the training data, in the model card
TOLERANCE = 1e-3  # of float32 logits, which the softcap bounds
CHECKED_TEXTS = (
    "def main():\n    return 1\n",
    "  Ünïcode, 日本語, 🙂🏽\r\n\t0123",
    f"text that names {BOS} is text",
    "",
)

STOCK_NAMES = {  # of the modules that NanoChatForCausalLM calls otherwise
    "embedding": "model.embed_tokens",
    "blocks": "model.layers",
    "attention": "self_attn",
    "up_proj": "mlp.fc1",
    "down_proj": "mlp.fc2",
}


def require_transformers() -> None:
    """Raise UserError with the command that installs transformers if it is not there."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"transformers cannot be imported ({error}): pip install -e '.[export]', with Python 3.11 or newer"
        ) from None


def write(model: "GPT", tokenizer: BPETokenizer, folder: str | Path) -> None:
    """Write a model and its tokenizer into the folder, which must not exist yet or be empty."""
    folder = Path(folder)
    converted = convert(model, tokenizer)
    converted.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    for path in folder.glob("*.safetensors"):  # which only their owner could read
        shutil.copymode(folder / "config.json", path)
    if not model.config.plain:
        for name in CODE_FILES:
            shutil.copyfile(CODE / name, folder / name)
    write_tokenizer(tokenizer, folder, model.config.max_seq_len)


def convert(model: "GPT", tokenizer: BPETokenizer) -> "PreTrainedModel":
    """A transformers model that shares the weights of a GPT."""
    from transformers import GenerationConfig, NanoChatForCausalLM

    from nanotrain.huggingface.modeling_nanotrain import NanotrainForCausalLM

    special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.bos}
    shape, rename = (stock_config, stock_name) if model.config.plain else (own_config, own_name)
    kind = NanoChatForCausalLM if model.config.plain else NanotrainForCausalLM
    converted = kind(shape(model.config, special))
    tensors = {rename(name): tensor for name, tensor in model.state_dict().items()}
    converted.load_state_dict(tensors, assign=True)  # all of them, or it raises
    converted.generation_config = GenerationConfig(
        **special, pad_token_id=tokenizer.bos, do_sample=True, temperature=0.8, top_k=50
    )  # as scripts.generate draws
    return converted.eval()


def stock_config(config: "GPTConfig", special: dict[str, int]) -> "PretrainedConfig":
    """transformers' NanoChatConfig of a plain GPTConfig. Every field whose default is another is written out."""
    from transformers import NanoChatConfig

    return NanoChatConfig(
        **_shape(config),
        **special,
        pad_token_id=None,  # a number would keep that token's embedding from training
        intermediate_size=4 * config.model_dim,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
    )


def own_config(config: "GPTConfig", special: dict[str, int]) -> "PretrainedConfig":
    """The NanotrainConfig of any other GPTConfig."""
    from nanotrain.huggingface.configuration_nanotrain import NanotrainConfig

    code = {"AutoConfig": NanotrainConfig.__name__, "AutoModelForCausalLM": "NanotrainForCausalLM"}
    files = [name.removesuffix(".py") for name in CODE_FILES]
    return NanotrainConfig(
        **_shape(config),
        **special,
        value_embedding_layers=[n for n in range(config.num_layers) if config.has_value_embedding(n)],
        bigram_rows=config.bigram_rows,
        gate_channels=config.gate_channels,
        attention_gain=config.attention_gain,
        rope_theta=config.rope_base,
        auto_map={auto: f"{file}.{name}" for file, (auto, name) in zip(files, code.items(), strict=True)},
    )


def _shape(config):
    return {
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
    }


def stock_name(name: str) -> str:
    """What NanoChatForCausalLM calls a tensor of a plain GPT."""
    return ".".join(STOCK_NAMES.get(part, part) for part in name.split("."))


def own_name(name: str) -> str:
    """What NanotrainForCausalLM calls a tensor of a GPT."""
    return name if name == "lm_head.weight" else f"model.{name}"


def write_tokenizer(tokenizer: BPETokenizer, folder: Path, max_length: int) -> None:
    """The tokenizer of training, which here puts BOS before a text by itself."""
    inner = Tokenizer.from_str(tokenizer.to_json())
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.bos)]
    )
    inner.save(str(folder / FILE_NAME))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,  # where a text ends, the next begins
        "pad_token": BOS,
        "padding_side": "left",  # so that a batch can be continued
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # the name of BOS in a text is text
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def check(model: "GPT", tokenizer: BPETokenizer, folder: str | Path) -> float:
    """Load the folder back as its users will; returns the largest difference of its float32 logits from the model's,
    over sequences of max_seq_len random tokens, one of them padded on the left.

    Raises FileError if that is above TOLERANCE, or if the tokenizers disagree.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trust = not model.config.plain
    other = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    for text in CHECKED_TEXTS:
        if other(text)["input_ids"] != [tokenizer.bos, *tokenizer.encode(text)]:
            raise FileError(f"{folder}: transformers reads {text!r} as other tokens than nanotrain")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust)
    length, padding = model.config.max_seq_len, model.config.max_seq_len // 3
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    tokens[:, 0] = tokenizer.bos
    padded = tokens.clone()
    padded[1] = torch.cat((tokens[1, :1].expand(padding), tokens[1, : length - padding]))
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    found = loaded(padded, attention_mask=mask).logits.float()
    expected = model.logits(tokens)
    whole, rest = found[0] - expected[0], found[1, padding:] - expected[1, : length - padding]
    difference = max(whole.abs().max().item(), rest.abs().max().item())
    if not difference <= TOLERANCE:
        raise FileError(f"{folder}: logits differ by {difference:.2g} from the model's, more than {TOLERANCE:g}")
    return difference


def model_card(name: str, model: "GPT", meta: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The README.md of an exported model.

    meta: the checkpoint's state. evaluation: what scripts.base_eval wrote of this checkpoint, or {}.
    """
    config, environment = model.config, meta.get("environment", {})
    shards = {shard: file["sha256"] for shard, file in meta["data"]["files"].items()}
    named = list(shards.items())[:LISTED_SHARDS]
    settings = [
        f"    {setting} = {value!r}"
        for setting, value in meta.get("settings", {}).items()
        if not setting.endswith("_DIR") and not setting.startswith(PRIVATE)
    ]
    folder = Path(meta["data_dir"]).name
    source = dataset.SOURCES.get(folder)
    return CARD.read_text(encoding="utf-8").format(
        name=name,
        tags="" if config.plain else "tags: [custom_code]\n",
        remote="" if config.plain else ", trust_remote_code=True",
        architecture="transformers' own NanoChatForCausalLM" if config.plain else "that of `modeling_nanotrain.py`",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_layers,
        width=config.model_dim,
        vocab_size=config.vocab_size,
        max_seq_len=config.max_seq_len,
        numbers="\n".join(f"| {what} | {value} |" for what, value in _results(meta, evaluation)),
        data=f"{folder} ({source.licence})" if source else folder,
        num_shards=len(shards),
        validation=meta["data"]["validation"],
        shards="\n".join(f"    {sha256}  {shard}" for shard, sha256 in named),
        more=f"\n    and {len(shards) - len(named)} more" if len(shards) > len(named) else "",
        tokens=meta["loader"]["next_sequence"] * config.max_seq_len,
        step=meta["step"],
        commit=environment.get("commit") or "not known",
        machine=environment.get("device_name", "not known"),
        torch=environment.get("packages", {}).get("torch", "not known"),
        settings="\n".join(settings) or "    not known",
    )


def _results(meta, evaluation):
    """(what, value) of each number that is known."""
    measures = {
        "val_bpb": "bits per byte, sequences of validation text",
        "train_bpb": "bits per byte, sequences of train text",
        "doc_bpb": "bits per byte, whole validation documents",
    }
    for key, what in measures.items():
        value = evaluation.get(key, meta.get(key))
        if value is not None:
            yield what, f"{value:.4f}"
    if core := evaluation.get("core"):
        what = "CORE (22 tasks, baselines of DCLM v1)" if core["is_core"] else f"{len(core['tasks'])} tasks, not CORE"
        items = f", at most {core['max_per_task']} items of each" if core["max_per_task"] else ""
        yield f"{what}{items}", f"{core['core_metric']:.4f} +- {core['standard_error']:.4f}"
    else:
        yield "CORE", "not measured"
