"""Compression of the tokenizer, in UTF-8 bytes per token (1 for single bytes as tokens).

python -m scripts.tok_eval --data-dir=D
"""

from itertools import islice

from nanotrain import config, dataset, errors, paths
from nanotrain.tokenizer import BPETokenizer

# --- settings
DATA_DIR = ""  # folder of shards; empty: the only data set in NANOTRAIN_DIR/data
TOKENIZER_DIR = ""  # folder of tokenizer.json; empty: NANOTRAIN_DIR/tokenizer
NUM_TEXTS = 1000  # number of train and of validation documents
MAX_CHARS = 20_000  # maximum characters per document
# ------------


def main() -> None:
    tokenizer = BPETokenizer.load(paths.tokenizer_dir(TOKENIZER_DIR))
    shards = dataset.open_shards(paths.data_dir(DATA_DIR))
    print(f"vocabulary {tokenizer.vocab_size}\n{'text':<12}{'bytes':>11}{'tokens':>11}{'bytes/token':>13}")
    for kind, part in (("train", shards.train), ("validation", [shards.validation])):
        texts = list(islice(dataset.read_shards([shard.path for shard in part], MAX_CHARS), NUM_TEXTS))
        num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
        num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
        print(f"{kind:<12}{num_bytes:>11,}{num_tokens:>11,}{num_bytes / max(num_tokens, 1):>13.3f}")


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)
