"""Parquet shards of text: where they come from, what a folder of them holds, and reading them by row group.

    python -m nanotrain.dataset --dataset=stdlib            build the embedded corpus from this Python installation
    python -m nanotrain.dataset -n 8 --dataset=fineweb-edu  download 8 train shards and the validation shard
    python -m nanotrain.dataset --verify --dataset=stdlib   hash what is on disk again and compare with the manifest

A data folder holds `shard_<digits>.parquet` files with a string column `text`. One of them is validation: the one that
`manifest.json` names, or else the last by name. Files of any other name are ignored.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import sysconfig
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanotrain import config, errors, paths
from nanotrain.errors import DataError, UserError

# --- data
DATASET = ""  # stdlib, fineweb-edu or climbmix
TRAIN_SHARDS = 0  # how many train shards to download
VERIFY = False  # hash the data set's shards again and compare with its manifest
# -----------

MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"shard_\d{1,12}\.parquet")
STDLIB_SEED = 1337
STDLIB_SHARDS = 4
STDLIB_VALIDATION_SHARE = 1 / 16
STDLIB_EXCLUDED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}
MAX_CHARS = 4000  # of a document cut from a longer text
DOWNLOAD_WORKERS = 4
DOWNLOAD_ATTEMPTS = 5


@dataclass(frozen=True)
class Source:
    """A hosted data set: shards 0 .. num_shards - 1, the last of which is validation."""

    url: str
    num_shards: int
    shard_megabytes: int
    licence: str


SOURCES = {
    "fineweb-edu": Source("datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main", 1823, 100, "ODC-By"),
    "climbmix": Source(
        "datasets/karpathy/climbmix-400b-shuffle/resolve/main", 6543, 90, "CC-BY-NC: not for commercial use"
    ),
}


# ---- reading ----


@dataclass(frozen=True)
class Shard:
    """One parquet file: its name and path, the number of rows in each of its row groups, and about how many bytes of
    text it holds.
    """

    name: str
    path: Path
    group_rows: tuple
    text_bytes: int


@dataclass(frozen=True)
class Shards:
    """A folder of shards: the train shards in order of name, and the validation shard, which is never one of them."""

    folder: Path
    train: tuple
    validation: Shard


def open_shards(folder):
    """The Shards of a data folder, with every footer and schema checked.

    Raises DataError for a missing or empty folder, no train shard, a broken file, or one without a string column
    `text`.
    """
    folder = Path(folder)
    fix = "python -m nanotrain.dataset --dataset=stdlib builds one"
    if not folder.is_dir():
        raise DataError(f"no data folder {folder}: {fix}")
    manifest = read_manifest(folder)
    names = sorted(path.name for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name))
    if not names:
        raise DataError(f"{folder} holds no shard_<digits>.parquet: {fix}")
    validation = manifest["validation"] if manifest else names[-1]
    if validation not in names:
        raise DataError(f"{folder}: the validation shard {validation} is missing; prepare this data set again")
    train = [name for name in names if name != validation]
    if not train:
        raise DataError(f"{folder} holds only the validation shard {validation}: add at least one train shard")
    with ThreadPoolExecutor(8) as pool:
        opened = dict(zip(names, pool.map(lambda name: _open_shard(folder / name), names), strict=True))
    if not any(sum(opened[name].group_rows) for name in train):
        raise DataError(f"the train shards of {folder} hold no rows")
    return Shards(folder, tuple(opened[name] for name in train), opened[validation])


def _open_shard(path):
    try:
        with pq.ParquetFile(path) as file:
            schema, details = file.schema_arrow, file.metadata
            groups = [details.row_group(group) for group in range(details.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable parquet file ({_first_line(error)}): delete it and get it again"
        ) from None
    if "text" not in schema.names:
        raise DataError(f"{path} has no column 'text', only: {', '.join(schema.names) or 'none'}")
    kind = schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{path}: the column 'text' must hold strings, not {kind}")
    leaf = [details.schema.column(leaf).path for leaf in range(details.num_columns)].index("text")
    text_bytes = sum(group.column(leaf).total_uncompressed_size for group in groups)
    return Shard(path.name, path, tuple(group.num_rows for group in groups), text_bytes)


def read_texts(path, group):
    """The texts of one row group in order, None for nulls. Raises DataError that names the place."""
    try:
        with pq.ParquetFile(path, memory_map=False) as file:
            return file.read_row_group(group, columns=["text"]).column("text").to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}, row group {group}, cannot be read ({_first_line(error)}): delete the file and get it again"
        ) from None


def row_groups(shard_paths, start=0, step=1):
    """Yield the texts of row groups start, start + step, ... of the shards, counted through in order; nulls and empty
    texts left out.
    """
    number = 0
    for path in shard_paths:
        for group in range(len(_open_shard(Path(path)).group_rows)):
            if number % step == start:
                yield [text for text in read_texts(path, group) if text]
            number += 1


def fingerprint(shards):
    """{name: {bytes, sha256}} of every shard and which is validation: what a checkpoint remembers of its data.

    Hashes come from the manifest where it has them (and the sizes agree), else from the files themselves.
    """
    manifest = read_manifest(shards.folder)
    known = {entry["name"]: entry for entry in manifest["shards"]} if manifest else {}
    files = {}
    everything = (*shards.train, shards.validation)
    unknown = [shard for shard in everything if shard.name not in known]
    for shard in everything:
        size = shard.path.stat().st_size
        entry = known.get(shard.name)
        if entry and entry["bytes"] != size:
            raise DataError(f"{shard.path} has {size} bytes, its manifest says {entry['bytes']}: get it again")
        files[shard.name] = {"bytes": size, "sha256": entry["sha256"] if entry else None}
    for shard in tqdm(unknown, "hashing shards", disable=not sys.stderr.isatty(), leave=False):
        files[shard.name]["sha256"] = file_sha256(shard.path)
    return {"validation": shards.validation.name, "files": files}


# ---- manifest ----


def read_manifest(folder):
    """The manifest of a data folder as a dict, or None where there is none. Raises DataError if it is broken."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest["validation"], str):
            raise TypeError("'validation' is no name")
        for entry in manifest["shards"]:
            if (
                not SHARD_NAME.fullmatch(entry["name"])
                or not isinstance(entry["bytes"], int)
                or len(entry["sha256"]) != 64
            ):
                raise ValueError(f"bad entry {entry}")
        return manifest
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is broken ({_first_line(error)}): prepare this data set again") from None


def write_manifest(folder, dataset, validation):
    """Hash every shard of `folder` and write its manifest; `validation` is the name of the validation shard."""
    shards = []
    for path in sorted(path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name)):
        rows = sum(_open_shard(path).group_rows)
        shards.append({"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path), "rows": rows})
    manifest = {"dataset": dataset, "validation": validation, "shards": shards}
    with atomic_file(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def verify(folder):
    """The names of the shards of `folder` that differ from the manifest: missing, of another size, or of another
    hash.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder} has no {MANIFEST} to compare with")
    bad = []
    for entry in tqdm(manifest["shards"], "verifying", unit="shard", leave=False):
        path = Path(folder) / entry["name"]
        if not path.is_file() or path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
            bad.append(entry["name"])
    return bad


def file_sha256(path):
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class atomic_file:
    """`with atomic_file(path) as temporary:` write to `temporary`; it becomes `path` at the end, or vanishes on an
    error.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.part")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, kind, error, trace):
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


# ---- the embedded corpus ----


def build_stdlib(folder):
    """Write the embedded corpus to `folder`: the sources of this Python's standard library and the help topics of
    pydoc.

    The same Python (and pyarrow) gives the same bytes. Returns (train documents, validation documents).
    """
    sources = _stdlib_sources()
    validation_names, validation_chars = set(), 0
    goal = STDLIB_VALIDATION_SHARE * sum(map(len, sources.values()))
    for name in sorted(sources, key=lambda name: _order("file", name)):
        if validation_chars >= goal:
            break
        validation_names.add(name)
        validation_chars += len(sources[name])
    documents, seen = {True: [], False: []}, set()
    for name in sorted(
        sources, key=lambda name: (name in validation_names, name)
    ):  # a text on both sides stays in train
        for document in cut(sources[name]):
            if document not in seen:
                seen.add(document)
                documents[name in validation_names].append(document)
    train, validation = (sorted(documents[side], key=lambda text: _order("text", text)) for side in (False, True))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # what it says stops being true now
    for old in folder.iterdir():
        if SHARD_NAME.fullmatch(old.name):
            old.unlink()
    for number in range(STDLIB_SHARDS):
        write_shard(folder / f"shard_{number:05d}.parquet", train[number::STDLIB_SHARDS])
    last = folder / f"shard_{STDLIB_SHARDS:05d}.parquet"
    write_shard(last, validation)
    write_manifest(folder, "stdlib", last.name)
    return len(train), len(validation)


def _stdlib_sources():
    """{name: text} of the corpus: each source file of the standard library without its tests, and each pydoc topic."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for folder, children, files in os.walk(root):
        children[:] = [child for child in children if child not in STDLIB_EXCLUDED]
        for file in files:
            path = Path(folder) / file
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):  # those differ from machine to machine
                texts[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    if not texts:
        raise DataError(f"no standard library sources in {root}: use another Python, or your own text with --data-dir")
    from pydoc_data import topics  # a large module, needed only here

    texts.update((f"topics/{name}", text) for name, text in topics.topics.items())
    return texts


def _order(kind, text):
    """A key that shuffles: the same on every machine and in every version."""
    return hashlib.sha256(f"{STDLIB_SEED} {kind} {text}".encode("utf-8", "replace")).digest()


def cut(text, max_chars=MAX_CHARS):
    """`text` as documents of at most `max_chars`, cut at blank lines where possible, else at line ends, else anywhere.

    Each document is as long as what follows allows; nothing but blank lines is lost.
    """
    documents, current = [], ""
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text):
        for part in _cut_lines(paragraph, max_chars):
            if current and len(current) + 2 + len(part) > max_chars:
                documents.append(current)
                current = ""
            current = f"{current}\n\n{part}" if current else part
    documents.append(current)
    return [document for document in documents if document.strip()]


def _cut_lines(paragraph, max_chars):
    while len(paragraph) > max_chars:
        end = paragraph.rfind("\n", 1, max_chars)
        end = end if end > 0 else max_chars
        yield paragraph[:end]
        paragraph = paragraph[end:].removeprefix("\n")
    yield paragraph


def write_shard(path, texts, rows_per_group=16):
    """Write `texts` as one shard, whole or not at all."""
    with atomic_file(path) as temporary:
        pq.write_table(
            pa.table({"text": pa.array(texts, pa.string())}),
            temporary,
            row_group_size=rows_per_group,
            compression="zstd",
        )


# ---- download ----


def download(dataset, train_shards, folder):
    """Fetch the first `train_shards` train shards and the validation shard of a hosted data set into `folder`.

    Files that are there stay. Raises DataError with the list of what could not be had; what was fetched is kept.
    """
    source = SOURCES[dataset]
    if not 1 <= train_shards < source.num_shards:
        raise UserError(f"-n {train_shards}: {dataset} has 1 to {source.num_shards - 1} train shards, as in -n 8")
    numbers = [*range(train_shards), source.num_shards - 1]
    missing = [name for name in map("shard_{:05d}.parquet".format, numbers) if not (folder / name).is_file()]
    base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    host = base.partition("://")[2]
    print(f"{dataset} (licence {source.licence}): {len(missing)} of {len(numbers)} shards to fetch from {host}, "
          f"about {len(missing) * source.shard_megabytes / 1000:.1f} GB, into {folder}")  # fmt: skip
    failed, stop = {}, threading.Event()
    with (
        tqdm(unit="B", unit_scale=True, desc="download", disable=not missing) as bar,
        ThreadPoolExecutor(DOWNLOAD_WORKERS) as pool,
    ):

        def fetch(name):
            try:
                _fetch(f"{base}/{source.url}/{name}", folder / name, bar.update, stop)
            except DataError as error:
                failed[name] = str(error)
                if "cannot be reached" in failed[name]:
                    stop.set()  # the next shards would only wait for the same
            except OSError as error:  # a full disk
                failed[name] = f"{folder}: {error.strerror or error}"
                stop.set()

        try:
            list(pool.map(fetch, missing))
        except KeyboardInterrupt:
            stop.set()
            raise
    if failed:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was had, and an empty folder is no data set
        names = ", ".join(sorted(failed)[:10])
        reason = next(iter(failed.values()))
        raise DataError(f"{len(failed)} of {len(numbers)} shards are missing ({names}): {reason}")
    write_manifest(folder, dataset, f"shard_{numbers[-1]:05d}.parquet")


def _fetch(url, path, on_bytes, stop):
    import requests  # slow to import, and most uses of this module never download

    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    host = url.split("/")[2]
    reason = "stopped"
    for attempt in range(DOWNLOAD_ATTEMPTS):
        if stop.wait(min(60, 2**attempt) if attempt else 0):
            break
        received = 0
        try:
            with (
                atomic_file(path) as temporary,
                requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response,
            ):
                if response.status_code in (401, 403):
                    raise DataError(
                        f"{host} answers {response.status_code}: set HF_TOKEN to a token that may read this data set"
                    )
                if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
                    raise DataError(f"{host} answers {response.status_code} for {path.name}")
                response.raise_for_status()
                with open(temporary, "wb") as file:
                    for block in response.iter_content(1 << 20):
                        if stop.is_set():
                            raise DataError("stopped")
                        file.write(block)
                        received += len(block)
                        on_bytes(len(block))
                expected = int(response.headers.get("Content-Length", received))
                if received != expected:
                    raise requests.ConnectionError(f"{received} of {expected} bytes")
                try:
                    _open_shard(temporary)
                except DataError:
                    raise DataError(f"what {host} sent as {path.name} is no shard") from None
            return
        except requests.ConnectionError:
            on_bytes(-received)
            reason = f"{host} cannot be reached; without it use --dataset=stdlib (bash speedrun.sh: DATASET=stdlib)"
            if attempt == 1 and not received:
                break
        except requests.RequestException as error:
            on_bytes(-received)
            reason = f"{host}: {type(error).__name__}"
    raise DataError(reason)


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def main():
    names = ("stdlib", *SOURCES)
    if DATASET not in names:
        raise UserError(f"--dataset={DATASET}: choose one of {', '.join(names)}, as in --dataset=stdlib")
    folder = paths.dataset_dir(DATASET)
    if VERIFY:
        bad = verify(folder)
        if bad:
            raise DataError(
                f"{len(bad)} bad shards in {folder}: {', '.join(bad)}. Delete them and run the download again"
            )
        print(f"{folder}: every shard is as the manifest says")
    elif DATASET == "stdlib":
        begin = time.monotonic()
        train, validation = build_stdlib(folder)
        size = sum(path.stat().st_size for path in folder.glob("shard_*.parquet"))
        print(
            f"{folder}: {train} train and {validation} validation documents, "
            f"{size / 1e6:.1f} MB, {time.monotonic() - begin:.1f} s"
        )
    else:
        download(DATASET, TRAIN_SHARDS, folder)
        print(f"{folder}: complete")


if __name__ == "__main__":
    errors.run(lambda: config.override(globals(), short={"-n": "TRAIN_SHARDS"}), main)
