"""Parquet shards of text: what a folder of them holds, reading them by row group, and the commands that prepare one.

    python -m nanotrain.dataset --dataset=stdlib              build the embedded corpus from this Python installation
    python -m nanotrain.dataset -n 8 --dataset=fineweb-edu    download 8 train shards and the validation shard
    python -m nanotrain.dataset --from=PATH --name=mine       make shards of your own .txt, .md, .jsonl, .parquet files
    python -m nanotrain.dataset --verify                      hash what is on disk again and compare with the manifests

A data folder holds `shard_<digits>.parquet` files with a string column `text`. One of them is validation: the one that
`manifest.json` names, or else the last by name. Files of any other name are ignored.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanotrain import config, corpus, download, errors, paths
from nanotrain.errors import DataError, UserError, first_line
from nanotrain.files import atomic_file, file_sha256, new_folder, write_json

# --- which data
DATASET = ""  # stdlib, fineweb-edu or climbmix
FROM = ""  # a file or folder of your own text to make shards of
BASE_URL = ""  # another host of shards, as in https://host/path
NAME = ""  # of the data set, for --from, --base-url and --verify: its folder under NANOTRAIN_DIR/data
# --- how much of it, and how it is read
TRAIN_SHARDS = 0  # how many train shards to download; 0: all (with --base-url)
NUM_SHARDS = 0  # with --base-url: how many shards the host has, the last of them for validation
TEXT_COLUMN = "text"  # with --from: the field of .jsonl rows or the column of .parquet files
VERIFY = False  # hash the shards again and compare with the manifest
# -----------

MANIFEST = "manifest.json"
STDLIB = "stdlib of Python"  # with its version: what the manifest of the embedded corpus calls it
CHECKED = "checked.json"  # hashes of files, so that an unchanged one is not read again
SHARD_NAME = re.compile(r"shard_[0-9]{1,12}\.parquet")
MAX_GROUP_BYTES = 2 << 30  # of text in one row group, as its footer declares it: more is a mistake or an attack
KEPT_BYTES = 256 << 20  # of decoded row groups, for those who read them slice by slice


@dataclass(frozen=True)
class Source:
    """A hosted data set: shards 0 .. num_shards - 1, the last of which is validation."""

    url: str
    num_shards: int
    shard_megabytes: int  # about; 0: not known
    licence: str


SOURCES = {
    "fineweb-edu": Source("datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main", 1823, 100, "ODC-By"),
    "climbmix": Source("datasets/karpathy/climbmix-400b-shuffle/resolve/main", 6543, 90, "CC-BY-NC: non-commercial"),
}


# ---- reading ----


@dataclass(frozen=True)
class Shard:
    """One parquet file: its name and path, the number of rows in each of its row groups, about how many bytes of text
    it holds, and the size and time by which another file in its place is noticed.
    """

    name: str
    path: Path
    group_rows: tuple[int, ...]
    text_bytes: int
    stamp: tuple


@dataclass(frozen=True)
class Shards:
    """A folder of shards: the train shards in order of name, and the validation shard, which is never one of them."""

    folder: Path
    train: tuple[Shard, ...]
    validation: Shard


def open_shards(folder: str | Path) -> Shards:
    """The Shards of a data folder, with every footer and schema checked.

    Raises DataError for a missing or empty folder, no train shard, a broken file, or one without a string column
    `text`.
    """
    folder = Path(folder)
    fix = "python -m nanotrain.dataset --dataset=stdlib builds one"
    if not folder.is_dir():
        raise DataError(f"no data folder {folder}: {fix}")
    names, manifest = _shard_names(folder), read_manifest(folder)
    if not names:
        raise DataError(f"{folder} holds no shard_<digits>.parquet: {fix}")
    validation, entries = manifest["validation"] if manifest else names[-1], _entries(manifest)
    missing = sorted({validation, *entries} - set(names))
    if missing:
        raise DataError(f"{folder}: {', '.join(missing[:5])} of its manifest is missing; prepare this data set again")
    if len(names) == 1:
        raise DataError(f"{folder} holds only the validation shard {validation}: add at least one train shard")
    with ThreadPoolExecutor(8) as pool:
        sizes = [entries[name]["bytes"] if name in entries else None for name in names]
        shards = dict(zip(names, pool.map(open_shard, [folder / name for name in names], sizes), strict=True))
    last = shards.pop(validation)
    if not any(sum(shard.group_rows) for shard in shards.values()):
        raise DataError(f"the train shards of {folder} hold no rows")
    return Shards(folder, tuple(shards.values()), last)


def open_shard(path: Path, size: int | None = None) -> Shard:
    """The Shard at `path`, its footer and schema checked, and its size in bytes where `size` is given.

    Raises DataError that says what is wrong with it.
    """
    try:
        stamp = _stamp(path)
        if size not in (None, stamp[0]):
            raise DataError(f"{path} has {stamp[0]} bytes, its manifest says {size}: delete it and get it again")
        with pq.ParquetFile(path) as file:
            schema, details = file.schema_arrow, file.metadata
            groups = [details.row_group(group) for group in range(details.num_row_groups)]
            columns = [details.schema.column(number).path for number in range(details.num_columns)]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a readable parquet file ({first_line(error)}): delete it and get it again"
        ) from None
    if "text" not in schema.names:
        raise DataError(f"{path} has no column 'text', only: {', '.join(schema.names) or 'none'}")
    kind = schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{path}: the column 'text' must hold strings, not {kind}")
    sizes = [group.column(columns.index("text")).total_uncompressed_size for group in groups]
    if max(sizes, default=0) > MAX_GROUP_BYTES:
        raise DataError(f"{path} declares a row group of {max(sizes) / 2**30:.1f} GiB of text: use smaller row groups")
    return Shard(path.name, path, tuple(group.num_rows for group in groups), sum(sizes), stamp)


def read_texts(
    path: Path,
    group: int,
    start: int = 0,
    stop: int | None = None,
    stamp: tuple | None = None,
    kept: dict | None = None,
) -> list[str | None]:
    """The texts of rows `start` to `stop` of a row group, None for nulls. Raises DataError that names the place.

    stamp: of the Shard; a file that has changed since it was opened is an error. kept: a dict in which row groups stay
    decoded for other slices of theirs, the last one always, others within KEPT_BYTES.
    """
    where, texts = f"{path}, row group {group}", []
    try:
        if stamp and stamp != _stamp(path):
            raise DataError(f"{where}, cannot be read: the file has changed since it was opened")
        column = kept.pop((path, group), None) if kept else None
        if column is None:
            with pq.ParquetFile(path) as file:
                column = file.read_row_group(group, columns=["text"]).column("text")
        if kept is not None and stop is not None and stop - start < len(column):
            kept[path, group] = column
            while len(kept) > 1 and sum(other.nbytes for other in kept.values()) > KEPT_BYTES:
                del kept[next(iter(kept))]
        for value in column[start:stop]:
            texts.append(value.as_py())
        return texts
    except UnicodeDecodeError:
        raise DataError(f"{where}, row {start + len(texts)}: the text is not UTF-8; make this shard again") from None
    except (pa.ArrowException, OSError, KeyError) as error:  # KeyError: another file is there now, without the column
        raise DataError(f"{where}, cannot be read ({first_line(error)}): delete the file and get it again") from None


def _stamp(path):
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def row_groups(shard_paths: Iterable[str | Path]) -> Iterator[list[str]]:
    """Yield the texts of each row group of the shards, in order; nulls and empty texts left out."""
    for path in shard_paths:
        for group in range(len(open_shard(Path(path)).group_rows)):
            yield [text for text in read_texts(path, group) if text]


def hash_of(fingerprint: dict) -> str:
    """One SHA-256, in hex, of all names, sizes and hashes in a `fingerprint`."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def fingerprint(shards: Shards) -> dict:
    """{name: {bytes, sha256}} of every shard and which is validation: what a checkpoint remembers of its data.

    Hashes come from the manifest where it has them, else from the files themselves.
    """
    entries, files = _entries(read_manifest(shards.folder)), {}
    for shard in tqdm((*shards.train, shards.validation), "hashing shards", leave=False, disable=None):
        digest = entries[shard.name]["sha256"] if shard.name in entries else file_sha256(shard.path)
        files[shard.name] = {"bytes": shard.stamp[0], "sha256": digest}
    validation = files[shards.validation.name]["sha256"]
    same = [shard.name for shard in shards.train if files[shard.name]["sha256"] == validation]
    if same:
        raise DataError(f"{shards.folder}: {same[0]} has the same content as the validation shard: remove one of them")
    return {"validation": shards.validation.name, "files": files}


# ---- manifest ----


def _shard_names(folder):
    return sorted(path.name for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name))


def _entries(manifest, where=MANIFEST, fix=""):
    """{name: entry} of a manifest or None. Raises DataError, which calls it `where`, if a name, size or hash is bad."""
    if manifest is None:
        return {}
    with contextlib.suppress(KeyError, TypeError):
        entries = {entry["name"]: entry for entry in manifest["shards"]}
        named = all(map(SHARD_NAME.fullmatch, [manifest["validation"], *entries]))
        hashed = all(map(download.SHA256.fullmatch, [entry["sha256"] for entry in entries.values()]))
        if named and hashed and all(isinstance(entry["bytes"], int) for entry in entries.values()):
            return entries
    raise DataError(f"{where} is broken{fix}")


def read_manifest(folder: Path, check: bool = True) -> dict | None:
    """The manifest of a data folder as a dict, or None where there is none. Raises DataError if it is broken, or of
    another program; the names, sizes and hashes of shards are looked at only with `check`.
    """
    path, what = Path(folder) / MANIFEST, "another program's"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8-sig"))  # an editor may have put a BOM
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        manifest, what = None, f"broken ({first_line(error)})"
    ours = isinstance(manifest, dict) and "validation" in manifest
    if not ours or not all(isinstance(manifest.get(key, []), list) for key in ("shards", "coming")):
        raise DataError(f"{path} is {what}: rename it (the last shard by name is then validation)")
    if check:
        _entries(manifest, path, ": prepare this data set again")
    return manifest


def write_manifest(
    folder: Path, dataset: str, validation: str, hashes: Mapping[str, str] | None = None, coming: Sequence[str] = ()
) -> None:
    """Write the manifest of the shards in `folder`; `validation` is the name of the validation shard, there or not.

    hashes: {name: SHA-256} of files that are known already; the others are hashed. coming: names of shards that are
    about to be fetched: after a kill, what has these names is ours.
    """
    shards = []
    for name in _shard_names(folder):
        path, digest = folder / name, (hashes or {}).get(name)
        rows = sum(open_shard(path).group_rows)
        shards.append({"name": name, "bytes": path.stat().st_size, "sha256": digest or file_sha256(path), "rows": rows})
    manifest = {"dataset": dataset, "validation": validation, "shards": shards}
    write_json(folder / MANIFEST, {**manifest, "coming": coming} if coming else manifest)


def verify(folder: Path) -> list[str]:
    """[what is wrong] of every shard of `folder` that is not as the manifest says, each with its name."""
    folder, manifest = Path(folder), read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder} has no {MANIFEST} to compare with")
    entries = _entries(manifest)
    bad = [] if manifest["validation"] in entries else [f"{manifest['validation']}, the validation shard, is missing"]
    for name, entry in tqdm(entries.items(), "verifying", unit="shard", leave=False, disable=None):
        path = folder / name
        if not path.is_file():
            bad.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            bad.append(f"{name} has {path.stat().st_size} bytes of {entry['bytes']}")
        elif file_sha256(path) != entry["sha256"]:
            bad.append(f"{name} has another SHA-256")
    return bad + [f"{name} is not in the manifest" for name in _shard_names(folder) if name not in entries]


# ---- preparing a data set ----


def check_ours(folder: Path, dataset: str, validation: str | None = None, whole: bool = False) -> None:
    """Raise UserError unless nanotrain made every shard in `folder` for the data set `dataset` (STDLIB: for any
    version): only what the folder's manifest names may be replaced. A folder that is missing or empty is fine.

    validation: the name of the new validation shard; another one until now would become a train shard. whole: the
    folder itself is to be replaced, so that it may hold no other file either.
    """
    away = "choose another --name, or move it away"
    if folder.is_file():
        raise UserError(f"{folder} is a file: {away}")
    try:
        manifest = read_manifest(folder, check=False) or {}
    except DataError:
        raise UserError(f"{folder} holds a {MANIFEST} of another program, or a broken one: {away}") from None
    made = [entry.get("name") for entry in manifest.get("shards", []) if isinstance(entry, dict)]
    made += [MANIFEST, CHECKED, *manifest.get("coming", [])] if manifest else []
    others = sorted(path.name for path in folder.glob("*") if path.name not in made)
    others = [name for name in others if whole or name == CHECKED or SHARD_NAME.fullmatch(name)]
    if others:
        raise UserError(f"{folder} holds what nanotrain did not make ({', '.join(others[:5])}): {away}")
    held, old = str(manifest.get("dataset", "of no name")), str(manifest.get("validation"))
    if manifest and held != dataset and not (dataset == STDLIB and held.startswith(STDLIB)):
        raise UserError(f"{folder} holds another data set ({held}): {away}")
    if manifest and validation not in (None, old) and (folder / old).exists():
        raise UserError(
            f"{folder} is validated on {old}, which would become a train shard, and {validation} validation: {away}"
        )


def build_stdlib(folder: Path) -> tuple[int, int]:
    """Write the embedded corpus to `folder`: the sources of this Python's standard library and the help of pydoc.

    The same Python (and pyarrow) gives the same bytes. Returns (train documents, validation documents).
    """
    with new_folder(folder, partial(check_ours, dataset=STDLIB, whole=True)) as temporary:
        train, validation = corpus.stdlib_documents()
        sides = [*(train[number :: corpus.STDLIB_SHARDS] for number in range(corpus.STDLIB_SHARDS)), validation]
        for number, texts in enumerate(sides):
            last = f"shard_{number:05d}.parquet"
            write_shard(temporary / last, texts)
        write_manifest(temporary, f"{STDLIB} {platform.python_version()}", last)
    return len(train), len(validation)


def write_shard(path: Path, texts: Sequence[str], rows_per_group: int = 16) -> None:
    """Write `texts` as one shard, whole or not at all."""
    with atomic_file(path) as temporary:
        table = pa.table({"text": pa.array(texts, pa.string())})
        pq.write_table(table, temporary, row_group_size=rows_per_group, compression="zstd")


def is_stdlib(folder: Path) -> bool:
    """Whether `folder` holds the embedded corpus of this very Python, undamaged."""
    with contextlib.suppress(DataError):
        manifest = read_manifest(folder) or {}
        return manifest.get("dataset") == f"{STDLIB} {platform.python_version()}" and not verify(folder)
    return False


def import_text(source: Path, folder: Path, text_column: str = "text") -> tuple[int, Counter[str]]:
    """Make the data set `folder`, new or empty, of the text in `source`; returns (documents, what was skipped by
    reason).
    """
    with new_folder(folder) as temporary:
        validation, documents, skipped = corpus.import_text(source, temporary, text_column)
        write_manifest(temporary, "own text", validation)
    return documents, skipped


def fetch(name: str, source: Source, train_shards: int, folder: Path) -> None:
    """Fetch the first `train_shards` train shards and the validation shard of a hosted data set into `folder`.

    Good files that are there stay, bad ones are fetched again. Raises DataError with the list of what could not be had;
    what was fetched is kept.
    """
    most = source.num_shards - 1
    if not 1 <= train_shards <= most:
        raise UserError(f"-n {train_shards}: {name} has 1 to {most} train shards, as in -n {min(most, 8)}")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    base = source.url if "://" in source.url else f"{endpoint}/{source.url}"
    download.check_url(base)
    token = os.environ.get("HF_TOKEN", "").strip() if download.host_of(base) == download.host_of(endpoint) else None
    check_ours(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        try:
            remote = download.json_beside(f"{base}/{MANIFEST}", token)
        except DataError as error:
            raise DataError(f"{error}. Without it: --dataset=stdlib (DATASET=stdlib bash speedrun.sh)") from None
        entries = _entries(remote, f"the host's {MANIFEST}")
        shards = [f"shard_{number:05d}.parquet" for number in range(source.num_shards)]
        validation = shards[-1] if remote is None else remote["validation"]
        check_ours(folder, name, validation)
        names = [validation, *[shard for shard in shards if shard != validation][:train_shards]]
        expected = {shard: entry["sha256"] for shard, entry in entries.items()}
        own = {}
        with contextlib.suppress(DataError):  # a broken manifest is about to be written anew
            own = {shard: entry["sha256"] for shard, entry in _entries(read_manifest(folder)).items()}
        good = _good_files(folder, names, {**own, **expected})
        items = [
            download.Item(shard, f"{base}/{shard}", entries.get(shard, {}).get("bytes"), expected.get(shard))
            for shard in names
            if shard not in good
        ]
        known = sum(item.size or source.shard_megabytes * 1e6 for item in items)
        print(f"{name} (licence: {source.licence}): {len(items)} of {len(names)} shards to fetch from ", end="")
        print(f"{download.host_of(base)}{f', about {known / 1e9:.2f} GB' if known else ''}, into {folder}", flush=True)
        free = shutil.disk_usage(folder).free
        if known > free:
            raise DataError(f"the disk is full: {known / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free in {folder}")
        write_manifest(folder, name, validation, {**own, **good}, [item.name for item in items])  # pins it from here on
        with tqdm(None, "download", int(known), unit="B", unit_scale=True, disable=not items, mininterval=2) as bar:
            fetched, failed = download.fetch_all(items, folder, open_shard, bar.update, token=token)
        good |= fetched
        if good:
            write_manifest(folder, name, validation, {**own, **good})
            noted = {_checked_key(folder / shard): digest for shard, digest in good.items()}
            write_json(folder / CHECKED, {**_read_checked(folder), **noted})
    finally:
        if not _shard_names(folder):
            for left in (CHECKED, MANIFEST):
                (folder / left).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was had, and an empty folder is no data set
    if failed:
        reasons = "; ".join(sorted(set(failed.values()) - {download.NOT_TRIED})[:3])
        listed = ", ".join(sorted(failed)[:20]) + (", ..." if len(failed) > 20 else "")
        raise DataError(f"{len(failed)} of {len(names)} shards are missing ({listed}): {reasons}")


def _good_files(folder, names, expected):
    """{name: SHA-256} of the shards that are there and right; a wrong one is deleted.

    Right is a file that opens and has the expected SHA-256, where there is one.
    """
    checked, good = _read_checked(folder), {}
    there = [name for name in names if (folder / name).is_file()]
    for name in tqdm(there, "checking", unit="shard", leave=False, disable=None):
        digest = checked.get(_checked_key(folder / name)) or file_sha256(folder / name)
        if digest == expected.get(name, digest):
            with contextlib.suppress(DataError):
                open_shard(folder / name)
                good[name] = digest
        if name not in good:
            (folder / name).unlink()
    return good


def _checked_key(path):
    """The key of a file in checked.json, another one after each change."""
    return " ".join(map(str, (path.name, *_stamp(path), path.stat().st_ino)))


def _read_checked(folder):
    """{key: SHA-256} of the files that were hashed before."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads((folder / CHECKED).read_text(encoding="utf-8")))
    return {}


def main() -> None:
    if sum(map(bool, (DATASET, FROM, BASE_URL))) > 1:
        raise UserError("--dataset, --from and --base-url: one of them at a time")
    if VERIFY:
        return verify_command()
    if DATASET not in ("stdlib", *SOURCES) and not FROM and not BASE_URL:
        given = f"--dataset={DATASET}" if DATASET else "which data?"
        names = ", ".join(("stdlib", *SOURCES))
        raise UserError(f"{given}: choose one of {names}, as in --dataset=stdlib, or --from=PATH --name=mine")
    if not (NAME or DATASET):
        raise UserError(f"{'--from' if FROM else '--base-url'} needs a name for the data set, as in --name=mine")
    begin, folder = time.monotonic(), paths.dataset_dir(NAME or DATASET)
    if FROM:
        documents, skipped = import_text(FROM, folder, TEXT_COLUMN)
        left_out = "".join(f", {count:,} left out: {reason}" for reason, count in skipped.most_common())
        print(f"{folder}: {documents:,} documents in {time.monotonic() - begin:.1f} s{left_out}")
        print(f"train on it with --data-dir={folder}, or DATA_DIR={folder} bash speedrun.sh")
    elif BASE_URL:
        if NUM_SHARDS < 2:
            raise UserError("--base-url needs --num-shards, how many the host has (2 or more), the last for validation")
        download.check_url(BASE_URL)
        source = Source(BASE_URL.rstrip("/"), NUM_SHARDS, 0, "see the host")
        fetch(NAME, source, TRAIN_SHARDS or NUM_SHARDS - 1, folder)
    elif DATASET in SOURCES:
        fetch(DATASET, SOURCES[DATASET], TRAIN_SHARDS, folder)
    elif is_stdlib(folder):
        print(f"{folder}: there already, every shard is as the manifest says")
    else:
        train, validation = build_stdlib(folder)
        size, seconds = sum(path.stat().st_size for path in folder.glob("*.parquet")) / 1e6, time.monotonic() - begin
        print(f"{folder}: {train} train and {validation} validation documents, {size:.1f} MB, {seconds:.1f} s")


def verify_command() -> None:
    """Verify one data set, or all that have a manifest."""
    name, parent = NAME or DATASET, paths.base_dir() / "data"
    folders = [paths.dataset_dir(name)] if name else sorted(path.parent for path in parent.glob(f"*/{MANIFEST}"))
    if not folders:
        raise DataError(f"no data set with a {MANIFEST} in {parent}")
    bad = {folder: verify(folder) for folder in folders}
    for folder in folders:
        print(f"{folder}: {'; '.join(bad[folder]) or 'every shard is as the manifest says'}")
    if any(bad.values()):
        raise DataError(f"{sum(map(len, bad.values()))} bad shards: delete them and prepare the data set again")


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__, short={"-n": "TRAIN_SHARDS"}), main)
