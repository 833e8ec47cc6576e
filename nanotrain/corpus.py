"""Building shards: split text into documents, and import a user's own files in bounded memory.

The import reads each file once, in blocks, and distributes the documents over buckets on disk by their SHA-256. It then
loads one bucket at a time, drops exact duplicates, sorts by hash and writes the shards. This shuffles the documents;
the same documents give the same shards whatever the names or order of the files.
"""

import contextlib
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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanotrain import paths
from nanotrain.errors import DataError, first_line
from nanotrain.terminal import progress_bar

MAX_CHARS = 4000  # maximum length of a document cut from a longer text
BLOCK_CHARS = 16 << 20  # characters of a plain text file read and cut at a time
BLANK_LINES = re.compile(r"\n[ \t\n]*\n")
VALIDATION_SHARE, MAX_VALIDATION_BYTES = 1 / 16, 32 << 20
STDLIB_SEED, STDLIB_SHARDS = 1337, 4
STDLIB_EXCLUDED = set("test tests idle_test site-packages dist-packages __pycache__ encodings pydoc_data".split())
SEED = b"nanotrain"  # seed of the import's shuffle
NOT_ROWS = "not one JSON object per line (convert: jq -c 'arrays[], objects' FILE > FILE.jsonl)"
NOT_UTF8 = "not UTF-8 (convert: iconv -f UTF-16 -t UTF-8 FILE, or from another encoding)"
UNREADABLE = "unreadable folder"
PLAIN_SUFFIXES = set(
    ".txt .md .rst .tex .org .html .xml .csv .py .js .ts .c .h .cc .cpp .hpp .java .go .rs .rb .php .sh .sql .lua .pl "
    ".r .jl .scala .kt .swift".split()
)
LONE_SURROGATES = re.compile("[\ud800-\udfff]")  # not encodable in UTF-8
MAX_LINE_BYTES = 128 << 20  # longest .jsonl line; a longer one (a whole data set in one array) is not imported
NUM_BUCKETS = 128  # only one is held in memory at a time
SHARD_BYTES = 200 << 20  # bytes of text per shard, about 100 MB as parquet
GROUP_BYTES = 4 << 20  # maximum bytes of text per row group
MIN_TRAIN_SHARDS, MIN_GROUPS = 4, 100  # lower limits that give every stream data from a small corpus


def cut(text: str, max_chars: int = MAX_CHARS) -> Iterator[str]:
    """Split text into the longest possible documents of at most `max_chars`: at blank lines, else at line ends, else
    anywhere. Only blank lines are lost.
    """
    document = ""
    for part in itertools.chain.from_iterable(_cut_lines(part, max_chars) for part in BLANK_LINES.split(text)):
        if document and len(document) + 2 + len(part) > max_chars:
            if document.strip():
                yield document
            document = ""
        document = f"{document}\n\n{part}" if document else part
    if document.strip():
        yield document


def _cut_lines(paragraph, max_chars):
    begin = 0
    while len(paragraph) - begin > max_chars:
        end = paragraph.rfind("\n", begin + 1, begin + max_chars)
        end = end if end > 0 else begin + max_chars
        yield paragraph[begin:end]
        begin = end + paragraph.startswith("\n", end)
    yield paragraph[begin:]


def stdlib_documents() -> tuple[list[str], list[str]]:
    """(train documents, validation documents) of the embedded corpus, shuffled and split by source file. Exact
    duplicates are dropped; a document that occurs on both sides stays in train.
    """
    sources = stdlib_sources()
    validation, chars, goal = set(), 0, VALIDATION_SHARE * sum(map(len, sources.values()))
    for name in sorted(sources, key=lambda name: _shuffle_key("file", name)):
        if chars < goal:
            validation.add(name)
            chars += len(sources[name])
    sides = {}  # {document: whether it is for validation}
    for name in sorted(sources, key=lambda name: name in validation):
        for document in cut(sources[name]):
            sides.setdefault(document, name in validation)
    documents = sorted(sides, key=lambda text: _shuffle_key("text", text))
    return [text for text in documents if not sides[text]], [text for text in documents if sides[text]]


def stdlib_sources() -> dict[str, str]:
    """{name: text} of the standard library's sources, except tests and files of one machine, and of pydoc's topics."""
    root, skipped, texts = Path(sysconfig.get_path("stdlib")), Counter(), {}
    for path in _walk(root, skipped):
        name = path.relative_to(root)
        if path.suffix == ".py" and not STDLIB_EXCLUDED & {*name.parts} and not path.name.startswith("_sysconfigdata"):
            texts[name.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    if not texts or skipped[UNREADABLE]:
        fix = "use another Python installation or your own text (--from=PATH)"
        raise DataError(f"standard library sources are missing or unreadable in {root}: {fix}")
    from pydoc_data import topics  # a large module, imported only when needed

    return texts | {f"topics/{name}": text for name, text in topics.topics.items()}


def _shuffle_key(kind, text):
    """Shuffle key, the same on every machine and Python version."""
    return hashlib.sha256(f"{STDLIB_SEED} {kind} {text}".encode("utf-8", "replace")).digest()


def import_text(source: str | Path, folder: Path, text_column: str = "text") -> tuple[str, int, Counter[str]]:
    """Write the text in `source` (a file or a folder) as shuffled shards to the existing `folder`.

    Returns (name of the validation shard, documents written, number of skipped documents or files by reason). Plain
    text is cut into documents; each row of a .jsonl (.gz, .zst) or .parquet file is one document. Raises DataError if
    there are fewer than two documents or a file is corrupt.
    """
    source, skipped = paths.absolute(source), Counter()
    files = _files(source, skipped)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
        texts = itertools.chain.from_iterable(_documents(path, text_column, skipped) for path in files)
        texts = progress_bar(texts, "reading", unit=" documents")
        found = _write_buckets(texts, Path(temporary))
        buckets, documents, text_bytes = sorted(Path(temporary).iterdir()), 0, 0
        for bucket in buckets:
            unique = set(_read_bucket(bucket))
            documents, text_bytes = documents + len(unique), text_bytes + sum(map(len, unique))
        skipped += Counter(duplicate=found - documents)
        if documents < 2:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
            summary = f"{documents} in {len(files)} text files (skipped: {reasons or 'nothing'})"
            raise DataError(f"--from={source}: at least 2 documents are needed, found {summary}")
        shuffled = (text for bucket in buckets for text in sorted(set(_read_bucket(bucket)), key=_sort_key))
        return _write_shards(folder, shuffled, documents, text_bytes), documents, skipped


def _files(source, skipped):
    if not source.exists():
        raise DataError(f"--from={source}: no such file or folder")
    files = []
    for path in [source] if source.is_file() else _walk(source, skipped):
        if path.suffix.lower() == ".json":
            skipped[NOT_ROWS] += 1
        elif _reader(path) is None or any(part.startswith(".") for part in path.relative_to(source).parts):
            skipped["hidden file or unknown file type (rename plain text to .txt)"] += 1
        else:
            files.append(path)
    return sorted(files)


def _walk(source, skipped):
    """Yield the files in a folder and its subfolders; count everything else in `skipped` by reason."""
    for folder, folders, names in os.walk(source, onerror=lambda error: skipped.update([UNREADABLE])):
        skipped["symbolic link to a folder"] += sum(Path(folder, name).is_symlink() for name in folders)
        for path in (Path(folder, name) for name in names):
            if path.is_file():
                yield path
            else:
                skipped["socket, pipe, device or broken link"] += 1


def _reader(path):
    """The reader for this file type, or None if it is not text."""
    if path.name.lower().endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return _json_documents
    if path.suffix.lower() == ".parquet":
        return _parquet_documents
    return _plain_documents if path.suffix.lower() in PLAIN_SUFFIXES else None


def _documents(path, text_column, skipped):
    """Yield a file's documents as UTF-8 bytes; lone surrogates become U+FFFD."""
    left_out, text = skipped.total(), None
    try:
        for text in _reader(path)(path, text_column, skipped):
            if not isinstance(text, str) or not text.strip():
                skipped["empty or not a string"] += 1
            else:
                yield (text if text.isascii() else LONE_SURROGATES.sub("\ufffd", text)).encode()
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from None
    skipped["file without text"] += text is None and skipped.total() == left_out


def _plain_documents(path, text_column, skipped):
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        blocks = iter(lambda: "".join(file.readlines(BLOCK_CHARS)), "")
        for document in itertools.chain.from_iterable(map(cut, blocks)):
            if "\0" in document or (not document.isascii() and LONE_SURROGATES.search(document)):
                skipped[NOT_UTF8] += 1
            else:
                yield document


def _json_documents(path, text_column, skipped):
    with io.BufferedReader(pa.input_stream(str(path)), 1 << 20) as file:
        while line := file.readline(MAX_LINE_BYTES):
            if line.isspace():
                continue
            try:
                text = json.loads(line.decode("utf-8-sig", "surrogatepass"))[text_column]
            except UnicodeDecodeError:
                skipped[NOT_UTF8] += 1
            except (ValueError, RecursionError, TypeError):
                skipped[NOT_ROWS] += 1
            except KeyError:
                skipped[f"no field {text_column!r} in the row (--text-column=NAME selects another)"] += 1
            else:
                yield text


def _parquet_documents(path, text_column, skipped):
    with pq.ParquetFile(path, buffer_size=1 << 20) as file:
        names = file.schema_arrow.names
        if names.count(text_column) != 1:
            number = "several columns" if text_column in names else "no column"
            fix = f"choose one with --text-column=NAME (columns: {', '.join(names)})"
            raise DataError(f"{path} has {number} {text_column!r}: {fix}")
        for batch in file.iter_batches(256, columns=[text_column]):
            yield from batch.column(0).to_pylist()


def _sort_key(data):
    return hashlib.sha256(SEED + data).digest()


def _write_buckets(texts, folder):
    """Write each text as (length, UTF-8 bytes) to a bucket file; return their number. Bucket names sort like keys."""
    count = 0
    with contextlib.ExitStack() as stack:
        buckets = [stack.enter_context(open(folder / f"{number:03d}", "wb")) for number in range(NUM_BUCKETS)]
        for data in texts:
            count += 1
            buckets[_sort_key(data)[0] * NUM_BUCKETS >> 8].write(len(data).to_bytes(8, "big") + data)
    return count


def _read_bucket(path):
    with open(path, "rb") as file:
        while length := file.read(8):
            yield file.read(int.from_bytes(length, "big"))


def _write_shards(folder, texts, documents, text_bytes):
    """Write the texts as shards; return the name of the last one, which is for validation and never empty."""
    schema = pa.schema([("text", pa.string())])
    for shard, groups in itertools.groupby(_row_groups(texts, documents, text_bytes), operator.itemgetter(0)):
        name = f"shard_{shard:05d}.parquet"
        with pq.ParquetWriter(folder / name, schema, compression="zstd") as writer:
            for _, group in groups:
                writer.write_table(pa.table({"text": group}, schema), row_group_size=len(group))
    return name


def _row_groups(texts, documents, text_bytes):
    """Yield (shard number, list of texts) for each row group."""
    train_bytes = text_bytes - min(text_bytes * VALIDATION_SHARE, MAX_VALIDATION_BYTES)
    num_train = max(math.ceil(train_bytes / SHARD_BYTES), MIN_TRAIN_SHARDS)
    group_bytes = min(max(train_bytes / MIN_GROUPS, 1), GROUP_BYTES)
    group, shard, written, held = [], 0, 0, 0
    for number, data in enumerate(texts):
        # compare running sums: otherwise the excess of each shard adds up and starves the last one
        full = written * num_train >= train_bytes * (shard + 1) or number == documents - 1
        starts_shard = number > 0 and full and shard < num_train
        if starts_shard or held >= group_bytes:
            yield shard, group
            group, held = [], 0
        shard += starts_shard
        group.append(data.decode())
        held += len(data)
        written += len(data)
    yield shard, group
