"""How well the tokenizer packs text: UTF-8 bytes per token, where single bytes as tokens would give 1.

python -m scripts.tok_eval --data-dir=D
"""

from collections.abc import Sequence
from pathlib import Path

from nanotrain import config, dataset, errors, paths
from nanotrain.tokenizer import BPETokenizer

# --- settings
DATA_DIR = ""  # folder of shards; empty: the only data set in NANOTRAIN_DIR/data
TOKENIZER_DIR = ""  # folder of tokenizer.json; empty: NANOTRAIN_DIR/tokenizer
MAX_CHARS = 2_000_000  # of train and of validation text to measure on
# ------------


def main() -> None:
    tokenizer = BPETokenizer.load(paths.tokenizer_dir(TOKENIZER_DIR))
    shards = dataset.open_shards(paths.data_dir(DATA_DIR))
    print(f"vocabulary {tokenizer.vocab_size}\n{'text':<12}{'bytes':>11}{'tokens':>11}{'bytes/token':>13}")
    for kind, part in (("train", shards.train), ("validation", [shards.validation])):
        texts = beginning([shard.path for shard in part])
        num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
        num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
        print(f"{kind:<12}{num_bytes:>11,}{num_tokens:>11,}{num_bytes / max(num_tokens, 1):>13.3f}")


def beginning(shard_paths: Sequence[Path]) -> list[str]:
    """The first texts of the shards, MAX_CHARS characters of them."""
    texts, chars = [], 0
    for text in dataset.read_shards(shard_paths):
        texts.append(text[: MAX_CHARS - chars])
        chars += len(texts[-1])
        if chars >= MAX_CHARS:
            break
    return texts


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)
