"""Train the tokenizer on train shards.

python -m scripts.tok_train --data-dir=D --vocab-size=4096
"""

import time
from collections.abc import Iterator

from tqdm import tqdm

from nanotrain import config, dataset, errors, paths, recipe
from nanotrain.errors import UserError
from nanotrain.store import LOCK, Disk
from nanotrain.tokenizer import FILE_NAME, BPETokenizer

# --- settings
DATA_DIR = ""  # folder of shards; empty: the only data set in NANOTRAIN_DIR/data
TOKENIZER_DIR = ""  # where tokenizer.json goes; empty: NANOTRAIN_DIR/tokenizer
VOCAB_SIZE = 4096  # tokens; 4096 suits minutes on a CPU, 32768 days on GPUs; 0: by depth or minutes
DEPTH = 0  # of the model that the tokenizer is for
TARGET_MINUTES = 0.0  # that the model will be trained for, where its depth follows from them
MAX_CHARS = 200_000_000  # of text to train on; memory and time grow with it
DOC_CHARS = 10_000  # of one document to train on
HEAD_DIM = 128  # of the model, which the plan of its width needs
# ------------


def main() -> None:
    begin = time.monotonic()
    shards = dataset.open_shards(paths.data_dir(DATA_DIR))
    folder, disk = paths.tokenizer_dir(TOKENIZER_DIR), Disk()
    disk.make_folder(folder)
    disk.lock(folder / LOCK)  # it may be the folder of a run that trains, or one that cannot be written
    if (folder / FILE_NAME).exists():
        BPETokenizer.load(folder)  # which refuses another program's, so that it is not overwritten
    vocab_size = VOCAB_SIZE or planned_vocab_size()
    tokenizer = BPETokenizer.train(texts(shards), vocab_size)
    tokenizer.save(folder)
    if tokenizer.vocab_size < vocab_size:
        print(f"the text gives only {tokenizer.vocab_size} tokens of {vocab_size}")
    print(f"{folder}: {tokenizer.vocab_size} tokens in {time.monotonic() - begin:.1f} s")


def planned_vocab_size() -> int:
    """The vocabulary that suits DEPTH, or the model that this machine can train in TARGET_MINUTES."""
    if not DEPTH and TARGET_MINUTES <= 0:
        raise UserError("--vocab-size=0 leaves the choice to the plan, which needs --depth or --target-minutes")
    depth = DEPTH
    if not depth:
        from nanotrain import hardware  # here, so that a tokenizer of a given size does not wait for torch
        from nanotrain.dist import init_distributed

        dist = init_distributed()
        speed = hardware.training_flops_per_second(dist.device, dist.dtype) * recipe.EFFICIENCY
        depth = recipe.choose_depth(recipe.training_flops(TARGET_MINUTES, speed), HEAD_DIM)
    width, _ = recipe.model_width(depth, 0, HEAD_DIM)
    print(f"for a model of depth {depth} and width {width}")
    return recipe.sizes(width).vocab_size


def texts(shards: dataset.Shards) -> Iterator[str]:
    """The texts to train on, cut and counted as the settings say."""
    chars, total = 0, min(sum(shard.text_bytes for shard in shards.train), MAX_CHARS)
    with tqdm(desc="tokenizer", total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for text in dataset.read_shards([shard.path for shard in shards.train], DOC_CHARS):
            yield text
            chars += len(text)
            bar.update(len(text))
            if chars >= MAX_CHARS:
                return


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)
