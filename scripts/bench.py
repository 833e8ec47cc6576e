"""Time and memory tables, each measured in interleaved repetitions; run it on a machine that does nothing else.

    python -m scripts.bench            all tables
    python -m scripts.bench loader     tokens per second of the loader, against the tokenizer alone

Markdown goes to the terminal, the same as JSON to --out.
"""

import json
import statistics
import time
from pathlib import Path

import numpy as np

from nanotrain import config, dataloader, dataset, errors, paths, runtime
from nanotrain.errors import UserError
from nanotrain.tokenizer import BPETokenizer

# --- settings
DATA_DIR = ""  # folder of shards; empty: the only data set in NANOTRAIN_DIR/data
TOKENIZER_DIR = ""  # folder of tokenizer.json; empty: NANOTRAIN_DIR/tokenizer
REPETITIONS = 5  # of every measurement
LOADER_TOKENS = 4_000_000  # of one measurement of the loader: few tokens would count the first reading of each unit
OUT = ""  # file for the JSON; empty: none
# ------------

SHAPES = ((16, 256), (32, 2048))


def main(names=()):
    tables = {"loader": loader_table}
    unknown = [name for name in names if name not in tables]
    if unknown:
        raise UserError(f"no table {unknown[0]!r}: there are {', '.join(tables)}")
    if REPETITIONS < 1 or LOADER_TOKENS < 1:
        raise UserError("--repetitions and --loader-tokens must be at least 1")
    found = {}
    for name in names or tables:
        found[name] = tables[name]()
        print(f"\n## {name}\n\n{markdown(found[name])}")
    if OUT:
        with dataset.atomic_file(Path(OUT)) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def loader_table():
    """The loader's tokens per second into (B, T) buffers, end to end, against `encode_batch_fast` alone.

    Both read texts of the same data set, one after the other in each repetition.
    """
    tokenizer = BPETokenizer.load(paths.tokenizer_dir(TOKENIZER_DIR))
    shards = dataset.open_shards(paths.data_dir(DATA_DIR))
    units = dataloader.units_of(shards.train, 48)
    texts = some_texts(shards)
    rows = []
    for threads in (1, 2):
        for batch_rows, seq_len in SHAPES:
            pairs = []
            for _ in range(REPETITIONS):
                runtime.use_tokenizer_threads(threads > 1)
                alone = tokenizer_speed(tokenizer, texts)
                runtime.use_tokenizer_threads(False)  # the reader has threads of its own
                pairs.append((loader_speed(units, tokenizer, batch_rows, seq_len, threads), alone))
            ratios = sorted(loaded / alone for loaded, alone in pairs)
            rows.append(
                {
                    "threads": threads if threads == 1 else "all",
                    "shape": f"({batch_rows}, {seq_len})",
                    "loader tok/s": round(statistics.median(loaded for loaded, _ in pairs)),
                    "tokenizer tok/s": round(statistics.median(alone for _, alone in pairs)),
                    "ratio": round(statistics.median(ratios), 3),
                    "spread": f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
                }
            )
    return rows


def some_texts(shards):
    """Texts of about LOADER_TOKENS tokens, from the train shards in order."""
    texts, chars = [], 0
    for group in dataset.row_groups([shard.path for shard in shards.train]):
        texts += group
        chars += sum(map(len, group))
        if chars > 3 * LOADER_TOKENS:
            break
    return texts


def tokenizer_speed(tokenizer, texts):
    """Tokens per second of `encode_batch_fast` in calls of 64 texts, their ids never looked at."""
    begin, tokens = time.perf_counter(), 0
    for start in range(0, len(texts), 64):
        encodings = tokenizer.inner.encode_batch_fast(texts[start : start + 64], add_special_tokens=False)
        tokens += sum(map(len, encodings))
    return tokens / (time.perf_counter() - begin)


def loader_speed(units, tokenizer, batch_rows, seq_len, threads):
    """Tokens per second into (B, T + 1) buffers of a reader that starts anew, its first batch not counted."""
    reader = dataloader.RowReader(units, tokenizer, seq_len, 48, seed=1337, threads=threads)
    rows = np.empty((batch_rows, seq_len + 1), dtype=np.int64)
    reader.fill(rows)
    batches = max(LOADER_TOKENS // rows[:, 1:].size, 1)
    begin = time.perf_counter()
    for _ in range(batches):
        reader.fill(rows)
    return batches * rows[:, 1:].size / (time.perf_counter() - begin)


def markdown(rows):
    """A table of dicts with the same keys."""
    lines = [[str(value) if isinstance(value, str) else f"{value:,}" for value in row.values()] for row in rows]
    header = list(rows[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


if __name__ == "__main__":
    arguments = []
    errors.run(lambda: arguments.extend(config.override(globals(), positional=True)), lambda: main(arguments))
