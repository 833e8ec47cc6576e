"""Train the tokenizer on the train shards.

python -m scripts.tok_train --data-dir=D --vocab-size=4096
"""

import time
from collections.abc import Iterator

from nanotrain import config, dataset, errors, paths, recipe
from nanotrain.errors import UserError
from nanotrain.store import LOCK, Disk
from nanotrain.terminal import progress_bar
from nanotrain.tokenizer import FILE_NAME, BPETokenizer

# --- settings
DATA_DIR = ""  # folder of shards; empty: the only data set in NANOTRAIN_DIR/data
TOKENIZER_DIR = ""  # output folder of tokenizer.json; empty: NANOTRAIN_DIR/tokenizer
VOCAB_SIZE = 4096  # number of tokens: 4096 for minutes on a CPU, 32768 for days on GPUs; 0: from depth or minutes
DEPTH = 0  # model depth from which --vocab-size=0 derives the size
TARGET_MINUTES = 0.0  # training minutes from which --vocab-size=0 derives depth and size
TRAINING_GFLOPS = 0.0  # training speed that python -m nanotrain.hardware has printed; 0: measured here
MAX_CHARS = 200_000_000  # characters of training text; time and memory grow with it
DOC_CHARS = 10_000  # maximum characters per document
HEAD_DIM = 128  # head dimension of the model, a divisor of its width
# ------------


def main() -> None:
    begin = time.monotonic()
    shards = dataset.open_shards(paths.data_dir(DATA_DIR))
    folder, disk = paths.tokenizer_dir(TOKENIZER_DIR), Disk()
    disk.make_folder(folder)
    disk.lock(folder / LOCK)  # fails for the folder of a run in training, or a read-only one
    if (folder / FILE_NAME).exists():
        BPETokenizer.load(folder)  # raises rather than overwrite another program's file
    vocab_size = VOCAB_SIZE or planned_vocab_size()
    tokenizer = BPETokenizer.train(texts(shards), vocab_size)
    tokenizer.save(folder)
    if tokenizer.vocab_size < vocab_size:
        print(f"too little text for {vocab_size} tokens, only {tokenizer.vocab_size} found")
    print(f"{folder}: {tokenizer.vocab_size} tokens in {time.monotonic() - begin:.1f} s")


def planned_vocab_size() -> int:
    """Vocabulary size for a model of DEPTH, or for the one this machine can train in TARGET_MINUTES."""
    if not DEPTH and TARGET_MINUTES <= 0:
        raise UserError("--vocab-size=0 derives the size from --depth or --target-minutes: give one of them")
    depth = DEPTH
    if not depth:
        speed = TRAINING_GFLOPS * 1e9 or measured_speed()
        depth = recipe.choose_depth(recipe.training_flops(TARGET_MINUTES, speed * recipe.EFFICIENCY), HEAD_DIM)
    width, _ = recipe.model_width(depth, 0, HEAD_DIM)
    print(f"for a model of depth {depth} and width {width}")
    return recipe.sizes(width).vocab_size


def measured_speed() -> float:
    """Training FLOP/s of this machine."""
    from nanotrain import hardware  # here, because importing torch takes longer than a small tokenizer
    from nanotrain.dist import init_distributed

    dist = init_distributed()
    return hardware.training_flops_per_second(dist.device, dist.dtype)


def texts(shards: dataset.Shards) -> Iterator[str]:
    """Yield the training texts within MAX_CHARS and DOC_CHARS."""
    chars, total = 0, min(sum(shard.text_bytes for shard in shards.train), MAX_CHARS)
    with progress_bar(None, "tokenizer", total, unit="B", unit_scale=True) as bar:
        for text in dataset.read_shards([shard.path for shard in shards.train], DOC_CHARS):
            yield text
            chars += len(text)
            bar.update(len(text))
            if chars >= MAX_CHARS:
                return


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)
