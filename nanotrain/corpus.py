"""Making shards: cutting text into documents, and the streaming import of a user's own files.

The import reads every file once and never holds the whole: each document goes to one of many buckets on disk by a
hash of its text (and a bucket too large for memory to smaller ones), then bucket after bucket is sorted by that hash
and written out. That shuffles, finds exact duplicates (they have one hash), and gives the same shards for the same
documents, whatever the order or the names of the files.
"""

import codecs
import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import struct
import sys
import sysconfig
import uuid
import zlib
from collections import Counter
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
BLOCK_BYTES = 1 << 20  # of a plain text file read at a time
MAX_LINE_BYTES = 128 << 20  # of a row of .jsonl: a longer one is a mistake, as a whole data set in one JSON array is
BUCKET_BYTES = 64 << 20  # of text that are sorted in memory at a time
BUCKET_BITS, LEVELS = 6, 4  # 64 files are open at a time; a bucket that is too large is divided again, 3 times at most
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
    validation_names, validation_chars = set(), 0
    goal = VALIDATION_SHARE * sum(map(len, sources.values()))
    for name in sorted(sources, key=lambda name: _order("file", name)):
        if validation_chars >= goal:
            break
        validation_names.add(name)
        validation_chars += len(sources[name])
    documents, seen = {True: [], False: []}, set()
    for name in sorted(sources, key=lambda name: (name in validation_names, name)):
        for document in cut(sources[name]):
            if document not in seen:
                seen.add(document)
                documents[name in validation_names].append(document)
    return tuple(sorted(documents[side], key=lambda text: _order("text", text)) for side in (False, True))


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

    texts.update((f"topics/{name}", text) for name, text in topics.topics.items())
    return texts


def _order(kind, text):
    """A key that shuffles: the same on every machine and in every version."""
    return hashlib.sha256(f"{STDLIB_SEED} {kind} {text}".encode("utf-8", "replace")).digest()


# ---- import ----


def import_text(source: str | Path, folder: str | Path, text_column: str = "text") -> tuple[str, int, Counter[str]]:
    """Make shuffled shards of the text in `source` (a file or a folder of them) in `folder`.

    Returns (validation shard name, documents written, what was skipped by reason). Plain text is cut into
    documents; rows of .jsonl (.gz, .zst) and .parquet files are documents as they are.
    Raises DataError if there is nothing to read or a file is broken.
    """
    source, folder, skipped = Path(source).expanduser(), Path(folder), Counter()
    files = _files(source, skipped)
    if not files:
        left_out = f" ({_reasons(skipped)})" if skipped else ""
        raise DataError(
            f"{source}: no .txt, .md, .py, .jsonl, .jsonl.gz, .jsonl.zst, .parquet or other text file there{left_out}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    buckets = folder / f".tmp-{uuid.uuid4().hex}"
    try:
        with _bar("reading", sum(path.stat().st_size for path in files)) as bar:
            texts = (text for path in files for text in _documents(path, text_column, skipped, bar))
            paths = _spread(_keyed(texts, skipped), buckets)
        sizes = [_sort_bucket(path, skipped) for path in tqdm(paths, "sorting", leave=False, disable=_quiet())]
        documents, text_bytes = (sum(column) for column in zip(*sizes, strict=True))
        if not documents:
            raise DataError(f"{source}: no text in {len(files)} files ({_reasons(skipped)})")
        if documents < 2:
            left_out = f" ({_reasons(skipped)})" if skipped else ""
            raise DataError(
                f"{source}: a single document; at least two are needed, one of them for validation{left_out}"
            )
        names = _write_shards(folder, paths, documents, text_bytes)
    finally:
        shutil.rmtree(buckets, ignore_errors=True)
    return names[-1], documents, skipped


def _files(source, skipped):
    """The files to read, in order of name."""
    if not source.exists():
        raise DataError(f"--from={source}: no such file or folder")
    found = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    files = []
    for path in found:
        if path != source and _is_hidden(path, source):
            skipped["hidden file"] += 1
        elif _kind(path) is None:
            skipped["file of an unknown kind (a text file is read if it ends in .txt)"] += 1
        else:
            files.append(path)
    return files


def _is_hidden(path, source):
    return any(part.startswith(".") for part in path.relative_to(source).parts)


def _kind(path):
    """How a file is read: jsonl, parquet or plain; None for a file that is not text."""
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return "jsonl"
    if name.endswith(".parquet"):
        return "parquet"
    return "plain" if path.suffix.lower() in PLAIN_SUFFIXES else None


def _documents(path, text_column, skipped, bar):
    """Yield the documents of one file; `bar.update` is told of the bytes read."""
    readers = {"jsonl": _json_documents, "parquet": _parquet_documents, "plain": _plain_documents}
    try:
        yield from readers[_kind(path)](path, text_column, skipped, bar)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from None


def _plain_documents(path, text_column, skipped, bar):
    """What `cut` makes of the whole file, without holding it."""
    with open(path, "rb") as file:
        for document in _cut_blocks(_decoded(file, bar)):
            if _is_utf8(document) and "\0" not in document:
                yield document
            else:
                skipped["not UTF-8 text"] += 1


def _decoded(file, bar):
    """Yield the text of a file in blocks, line ends as \\n, bytes that are not UTF-8 as lone surrogates."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
    while block := file.read(BLOCK_BYTES):
        bar.update(len(block))
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _cut_blocks(blocks):
    rest = ""
    for block in blocks:
        rest += block
        end, keep = _last_blank_lines(rest), None
        if len(rest) - end > 4 * BLOCK_BYTES:  # a very long paragraph, or very many blanks
            end, keep = len(rest.rstrip()), MAX_CHARS
        *done, last = cut(rest[:end]) or [""]
        yield from done
        rest = last + rest[end:][:keep]  # what follows may still belong to the last document
    yield from cut(rest)


def _last_blank_lines(text):
    """Where the last blank lines of a text begin, 0 if there are none or nothing is before them."""
    body = text[: text.rfind("\n\n") + 1].rstrip(" \t\n")
    return text.find("\n", len(body)) if body else 0


def _json_documents(path, text_column, skipped, bar):
    with open(path, "rb") as raw:
        name = path.name.lower()
        if name.endswith(".gz"):
            lines = gzip.open(raw)
        elif name.endswith(".zst"):
            lines = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"), 1 << 20)
        else:
            lines = raw
        done = 0
        for line in _lines(lines):
            bar.update(raw.tell() - done)
            done = raw.tell()
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
            if not isinstance(row, dict) or text_column not in row:
                skipped[f"no {text_column!r} in the row (--text-column=NAME chooses another field)"] += 1
                continue
            yield row[text_column]


def _lines(file):
    """Yield the lines of a file, None for one longer than MAX_LINE_BYTES, which is never held."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        whole = len(line) <= MAX_LINE_BYTES
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)
        yield line if whole else None


def _parquet_documents(path, text_column, skipped, bar):
    with pq.ParquetFile(path, memory_map=False, buffer_size=1 << 20) as file:
        if text_column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise DataError(f"{path} has no column {text_column!r}, only: {names} (--text-column=NAME chooses one)")
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(256, row_groups=[group], columns=[text_column]):
                for value in batch.column(0):
                    try:
                        yield value.as_py()
                    except UnicodeDecodeError:
                        skipped["not UTF-8 text"] += 1
            bar.update(path.stat().st_size // file.num_row_groups)


def _keyed(texts, skipped):
    """Yield (key, UTF-8) of the texts that are documents; keys are random, and equal for equal texts only."""
    for text in texts:
        if not isinstance(text, str):
            skipped["null" if text is None else "not a string"] += 1
        elif not text.strip():
            skipped["empty"] += 1
        else:
            if not _is_utf8(text):  # lone surrogates, which no file can hold
                text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            data = text.encode()
            yield hashlib.sha256(SEED + data).digest()[:16], data


def _is_utf8(text):
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


# ---- buckets: files of entries (key, length, UTF-8) ----


def _spread(entries, folder, level=0):
    """Write entries to buckets by the leading bits of their key; returns the paths of the buckets, in order of key."""
    folder.mkdir()
    paths = [folder / f"{number:02d}" for number in range(1 << BUCKET_BITS)]
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(open(path, "wb")) for path in paths]
        for key, data in entries:
            number = int.from_bytes(key[:4], "big") >> (32 - (level + 1) * BUCKET_BITS) & (1 << BUCKET_BITS) - 1
            handles[number].write(key + struct.pack("<Q", len(data)) + data)
    spread = []
    for path in paths:
        if path.stat().st_size > BUCKET_BYTES and level + 1 < LEVELS:
            spread += _spread(_read_bucket(path), folder / f"{path.name}-divided", level + 1)
            path.unlink()
        else:
            spread.append(path)
    return spread


def _sort_bucket(path, skipped):
    """Put the documents of a bucket in order of their key, each once; returns (documents, bytes)."""
    entries = {}
    for key, data in _read_bucket(path):
        if key in entries:
            skipped["duplicate"] += 1
        entries[key] = data
    with open(path, "wb") as file:
        for key in sorted(entries):
            file.write(key + struct.pack("<Q", len(entries[key])) + entries[key])
    return len(entries), sum(map(len, entries.values()))


def _read_bucket(path):
    with open(path, "rb") as file:
        while header := file.read(24):
            yield header[:16], file.read(struct.unpack("<Q", header[16:])[0])


def _write_shards(folder, buckets, documents, text_bytes):
    """Write the sorted buckets as shards; returns their names. The last one is for validation and never empty."""
    train_bytes = text_bytes - min(text_bytes * VALIDATION_SHARE, MAX_VALIDATION_BYTES)
    num_train = max(math.ceil(train_bytes / SHARD_BYTES), MIN_TRAIN_SHARDS)
    group_bytes = min(max(train_bytes / MIN_GROUPS, 1), GROUP_BYTES)
    names, shard, left, written = [], None, documents, 0
    with _bar("writing", text_bytes) as bar:
        for bucket in buckets:
            for _, data in _read_bucket(bucket):
                # by the sum, so that what a shard has too much does not add up, at the cost of the last one
                full = shard is not None and (written * num_train >= train_bytes * len(names) or left == 1)
                if shard is None or (full and len(names) <= num_train):
                    if shard is not None:
                        shard.close()
                    names.append(f"shard_{len(names):05d}.parquet")
                    shard = ShardWriter(folder / names[-1], group_bytes)
                shard.add(data.decode(), len(data))
                bar.update(len(data))
                left, written = left - 1, written + len(data)
    shard.close()
    return names


class ShardWriter:
    """Writes one shard, holding no more than one row group of about `group_bytes` of text."""

    def __init__(self, path: Path, group_bytes: float):
        self.schema = pa.schema([("text", pa.string())])
        self.writer = pq.ParquetWriter(path, self.schema, compression="zstd")
        self.group_bytes, self.group, self.held_bytes = group_bytes, [], 0

    def add(self, text: str, num_bytes: int) -> None:
        """Append one document of `num_bytes` in UTF-8."""
        self.group.append(text)
        self.held_bytes += num_bytes
        if self.held_bytes >= self.group_bytes:
            self._flush()

    def _flush(self):
        if self.group:
            self.writer.write_table(pa.table({"text": self.group}, self.schema), row_group_size=len(self.group))
        self.group, self.held_bytes = [], 0

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self.writer.close()


def _reasons(skipped):
    return ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common()) or "all empty"


def _bar(description, total):
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, leave=False, disable=_quiet())


def _quiet():
    return not sys.stderr.isatty()
