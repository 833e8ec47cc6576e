"""Train the tokenizer on train shards.

python -m scripts.tok_train --data-dir=D --vocab-size=4096
"""

import time

from tqdm import tqdm

from nanotrain import config, dataset, errors, paths
from nanotrain.tokenizer import BPETokenizer

# --- settings
DATA_DIR = ""  # folder of shards; empty: the only data set in NANOTRAIN_DIR/data
TOKENIZER_DIR = ""  # where tokenizer.json goes; empty: NANOTRAIN_DIR/tokenizer
VOCAB_SIZE = 4096  # tokens, BOS included; 4096 suits minutes on a CPU, 32768 days on GPUs
MAX_CHARS = 200_000_000  # of text to train on; memory and time grow with it
DOC_CHARS = 10_000  # of one document to train on
# ------------


def main():
    begin = time.monotonic()
    shards = dataset.open_shards(paths.data_dir(DATA_DIR))
    folder = paths.tokenizer_dir(TOKENIZER_DIR)
    tokenizer = BPETokenizer.train(texts(shards), VOCAB_SIZE)
    tokenizer.save(folder)
    if tokenizer.vocab_size < VOCAB_SIZE:
        print(f"the text gives only {tokenizer.vocab_size} tokens of {VOCAB_SIZE}")
    print(f"{folder}: {tokenizer.vocab_size} tokens in {time.monotonic() - begin:.1f} s")


def texts(shards):
    """The texts to train on, row group by row group, cut and counted as the settings say."""
    total = min(sum(shard.text_bytes for shard in shards.train), MAX_CHARS)
    chars = 0
    with tqdm(desc="tokenizer", total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for group in dataset.row_groups([shard.path for shard in shards.train]):
            cut = [text[:DOC_CHARS] for text in group]
            yield cut
            chars += sum(map(len, cut))
            bar.update(sum(map(len, cut)))
            if chars >= MAX_CHARS:
                return


if __name__ == "__main__":
    errors.run(lambda: config.override(globals()), main)
