"""Making shards: cutting text into documents, and the import of a user's own files in bounded memory.

The import reads every file once, in blocks. Each document goes to a bucket on disk, a range of SHA-256; then bucket
after bucket is sorted by that hash in memory, without exact duplicates, and written out. This shuffles the documents,
and the same documents give the same shards, whatever the order or the names of the files.
"""

import hashlib
import io
import itertools
import json
import math
import operator
import os
import re
import sysconfig
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanotrain.errors import DataError, first_line

MAX_CHARS = 4000  # of a document cut from a longer text
BLANK_LINES = re.compile(r"\n[ \t\n]*\n")
VALIDATION_SHARE, MAX_VALIDATION_BYTES = 1 / 16, 32 << 20
STDLIB_SEED, STDLIB_SHARDS = 1337, 4
STDLIB_EXCLUDED = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data",
}  # fmt: skip
SEED = b"nanotrain"  # of the import's shuffle
PLAIN_SUFFIXES = {
    ".txt", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".csv", ".py", ".js", ".ts", ".c", ".h", ".cc", ".cpp",
    ".hpp", ".java", ".go", ".rs", ".rb", ".php", ".sh", ".sql", ".lua", ".pl", ".r", ".jl", ".scala", ".kt", ".swift",
}  # fmt: skip
LONE_SURROGATES = re.compile("[\ud800-\udfff]")  # which UTF-8 cannot hold
BLOCK_CHARS = 1 << 20  # of a plain text file read at a time
MAX_LINE_BYTES = 128 << 20  # of a row of .jsonl: a longer one is a mistake, as a whole data set in one JSON array is
HELD_BYTES = 128 << 20  # of documents in memory at a time
BUCKETS_PER_HELD = 8  # per HELD_BYTES of files, so that a bucket fits even where they are compressed to an eighth
SHARD_BYTES = 200 << 20  # of text, about 100 MB as parquet
GROUP_BYTES = 4 << 20  # of text in a row group, at most
MIN_TRAIN_SHARDS, MIN_GROUPS = 4, 100  # spreads a small corpus, so that many streams find something to read


def cut(text: str, max_chars: int = MAX_CHARS) -> list[str]:
    """`text` as documents of at most `max_chars`, cut at blank lines where possible, else at line ends, else anywhere.

    Each document is as long as what follows allows; nothing but blank lines is lost.
    """
    documents, current = [], ""
    for paragraph in BLANK_LINES.split(text):
        for part in _cut_lines(paragraph, max_chars):
            if current and len(current) + 2 + len(part) > max_chars:
                documents.append(current)
                current = ""
            current = f"{current}\n\n{part}" if current else part
    documents.append(current)
    return [document for document in documents if document.strip()]


def _cut_lines(paragraph, max_chars):
    begin = 0
    while len(paragraph) - begin > max_chars:
        end = paragraph.rfind("\n", begin + 1, begin + max_chars)
        end = end if end > 0 else begin + max_chars
        yield paragraph[begin:end]
        begin = end + paragraph.startswith("\n", end)
    yield paragraph[begin:]


# ---- the embedded corpus ----


def stdlib_documents() -> tuple[list[str], list[str]]:
    """(train documents, validation documents) of the embedded corpus, shuffled; no source file is on both sides.

    Exact duplicates are dropped; a text that both sides have stays in train.
    """
    sources = stdlib_sources()
    validation, chars, goal = set(), 0, VALIDATION_SHARE * sum(map(len, sources.values()))
    for name in sorted(sources, key=lambda name: _order("file", name)):
        if chars < goal:
            validation.add(name)
            chars += len(sources[name])
    sides = {}  # whether it is for validation, of each document
    for name in sorted(sources, key=lambda name: name in validation):
        for document in cut(sources[name]):
            sides.setdefault(document, name in validation)
    documents = sorted(sides, key=lambda text: _order("text", text))
    return [text for text in documents if not sides[text]], [text for text in documents if sides[text]]


def stdlib_sources() -> dict[str, str]:
    """{name: text}: each source file of the standard library without its tests, and each help topic of pydoc."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for folder, children, files in os.walk(root):
        children[:] = [child for child in children if child not in STDLIB_EXCLUDED]
        for file in files:
            path = Path(folder) / file
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):  # those differ from machine to machine
                texts[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    if not texts:
        raise DataError(f"no standard library sources in {root}: use another Python, or your own text (--from=PATH)")
    from pydoc_data import topics  # a large module, needed only here

    return texts | {f"topics/{name}": text for name, text in topics.topics.items()}


def _order(kind, text):
    """A key that shuffles: the same on every machine and in every version."""
    return hashlib.sha256(f"{STDLIB_SEED} {kind} {text}".encode("utf-8", "replace")).digest()


# ---- import ----


def import_text(source: str | Path, folder: str | Path, text_column: str = "text") -> tuple[str, int, Counter[str]]:
    """Make shuffled shards of the text in `source` (a file or a folder of them) in `folder`, which must exist.

    Returns (name of the validation shard, documents written, number of documents or files left out by reason). Plain
    text is cut into documents; rows of .jsonl (.gz, .zst) and .parquet files are documents as they are. Raises
    DataError if there are fewer than two documents or a file is broken.
    """
    source, folder, skipped = Path(source).expanduser(), Path(folder), Counter()
    files = _files(source, skipped)
    num_buckets = BUCKETS_PER_HELD * sum(path.stat().st_size for path in files) // HELD_BYTES + 1
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
        texts = (text for path in files for text in _documents(path, text_column, skipped))
        texts = tqdm(_encoded(texts, skipped), "reading", unit=" documents", leave=False, disable=None)
        found = _spread(texts, Path(temporary), num_buckets)
        buckets, documents, text_bytes = sorted(Path(temporary).iterdir()), 0, 0
        for bucket in buckets:
            unique = set(_read_bucket(bucket))
            documents, text_bytes = documents + len(unique), text_bytes + sum(map(len, unique))
        skipped += Counter(duplicate=found - documents)
        if documents < 2:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
            raise DataError(
                f"{source}: at least 2 documents are needed (found: {documents}, files read: {len(files)}; of "
                f".txt, .md, .py, .jsonl, .jsonl.gz, .jsonl.zst, .parquet ...); left out: {reasons or 'nothing'}"
            )
        shuffled = (text for bucket in buckets for text in sorted(set(_read_bucket(bucket)), key=_key))
        shuffled = tqdm(shuffled, "writing", documents, unit=" documents", leave=False, disable=None)
        return _write_shards(folder, shuffled, documents, text_bytes), documents, skipped


def _files(source, skipped):
    """The files to read, in order of name."""
    if not source.exists():
        raise DataError(f"--from={source}: no such file or folder")
    files = []
    for path in [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file()):
        if any(part.startswith(".") for part in path.relative_to(source).parts):
            skipped["hidden file"] += 1
        elif _reader(path) is None:
            skipped["file of an unknown kind (a text file is read if it ends in .txt)"] += 1
        else:
            files.append(path)
    return files


def _reader(path):
    """The function that yields the documents of a file; None for one that is not text."""
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return _json_documents
    if name.endswith(".parquet"):
        return _parquet_documents
    return _plain_documents if path.suffix.lower() in PLAIN_SUFFIXES else None


def _documents(path, text_column, skipped):
    try:
        yield from _reader(path)(path, text_column, skipped)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from None


def _plain_documents(path, text_column, skipped):
    for document in _cut_file(path):
        if "\0" in document or (not document.isascii() and LONE_SURROGATES.search(document)):
            skipped["not UTF-8 text"] += 1
        else:
            yield document


def _cut_file(path):
    """What `cut` makes of a whole file, which is never held; bytes that are not UTF-8 become lone surrogates."""
    rest = ""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        while block := file.read(BLOCK_CHARS):
            rest += block
            body = rest[: rest.rfind("\n\n") + 1].rstrip(" \t\n")
            end, keep = rest.find("\n", len(body)) if body else 0, None  # where the last blank lines begin
            if len(rest) - end > 4 * BLOCK_CHARS:  # a very long paragraph, or very many blanks
                end, keep = len(rest.rstrip()), MAX_CHARS
            *done, last = cut(rest[:end]) or [""]
            yield from done
            rest = last + rest[end:][:keep]  # what follows may still belong to the last document
    yield from cut(rest)


def _json_documents(path, text_column, skipped):
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    with open(path, "rb") as raw:
        for line in _lines(io.BufferedReader(pa.input_stream(raw, compression), 1 << 20)):
            if line is None:
                skipped[f"row longer than {MAX_LINE_BYTES >> 20} MiB"] += 1
                continue
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                skipped["not JSON"] += 1
                continue
            if isinstance(row, dict) and text_column in row:
                yield row[text_column]
            else:
                skipped[f"no {text_column!r} in the row (--text-column=NAME chooses another field)"] += 1


def _lines(file):
    """Yield the lines of a file, None for one longer than MAX_LINE_BYTES, which is never held."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        whole = len(line) <= MAX_LINE_BYTES
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)
        yield line if whole else None


def _parquet_documents(path, text_column, skipped):
    with pq.ParquetFile(path, buffer_size=1 << 20) as file:
        if text_column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise DataError(f"{path} has no column {text_column!r}, only: {names} (--text-column=NAME chooses one)")
        for batch in file.iter_batches(256, columns=[text_column]):
            for value in batch.column(0):
                try:
                    yield value.as_py()
                except UnicodeDecodeError:
                    skipped["not UTF-8 text"] += 1


def _encoded(texts, skipped):
    """Yield the UTF-8 of the texts that are documents; lone surrogates become U+FFFD."""
    for text in texts:
        if not isinstance(text, str):
            skipped["null" if text is None else "not a string"] += 1
        elif not text.strip():
            skipped["empty"] += 1
        else:
            try:
                yield text.encode()
            except UnicodeEncodeError:
                yield LONE_SURROGATES.sub("\ufffd", text).encode()


# ---- buckets: files of (length, UTF-8) ----


def _key(data):
    """The sort key of a document."""
    return hashlib.sha256(SEED + data).digest()


def _spread(texts: Iterable[bytes], folder: Path, num_buckets: int) -> int:
    """Write each text to the bucket of its key, a file in `folder`; returns the number of texts. The names of the
    buckets sort as their keys do.
    """
    waiting, held, count = defaultdict(bytearray), 0, 0

    def flush():
        for number, entries in waiting.items():
            with open(folder / f"{number:08d}", "ab") as file:
                file.write(entries)
        waiting.clear()

    for data in texts:
        waiting[int.from_bytes(_key(data)[:4], "big") * num_buckets >> 32] += len(data).to_bytes(8, "big") + data
        held, count = held + len(data), count + 1
        if held > HELD_BYTES:
            flush()
            held = 0
    flush()
    return count


def _read_bucket(path):
    with open(path, "rb") as file:
        while length := file.read(8):
            yield file.read(int.from_bytes(length, "big"))


def _write_shards(folder: Path, texts: Iterable[bytes], documents: int, text_bytes: int) -> str:
    """Write the texts as shards; returns the name of the last one, which is for validation and never empty."""
    train_bytes = text_bytes - min(text_bytes * VALIDATION_SHARE, MAX_VALIDATION_BYTES)
    num_train = max(math.ceil(train_bytes / SHARD_BYTES), MIN_TRAIN_SHARDS)
    group_bytes = min(max(train_bytes / MIN_GROUPS, 1), GROUP_BYTES)
    schema = pa.schema([("text", pa.string())])

    def numbered():
        shard = written = 0
        for number, data in enumerate(texts):
            # by the running sum, so that what shards have too much does not add up at the cost of the last one
            full = written * num_train >= train_bytes * (shard + 1) or number == documents - 1
            if number and full and shard < num_train:
                shard += 1
            yield shard, data
            written += len(data)

    for shard, members in itertools.groupby(numbered(), operator.itemgetter(0)):
        name = f"shard_{shard:05d}.parquet"
        with pq.ParquetWriter(folder / name, schema, compression="zstd") as writer:
            for group in _groups((data for _, data in members), group_bytes):
                writer.write_table(pa.table({"text": group}, schema), row_group_size=len(group))
    return name


def _groups(texts, group_bytes):
    """Yield lists of texts: the row groups of a shard, each of at least `group_bytes`, but for the last."""
    group, held = [], 0
    for data in texts:
        group.append(data.decode())
        held += len(data)
        if held >= group_bytes:
            yield group
            group, held = [], 0
    if group:
        yield group
