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
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanotrain import config, corpus, download, errors, paths, recipe
from nanotrain.errors import DataError, UserError, first_line
from nanotrain.files import file_sha256, new_folder, write_json

# --- which data
DATASET = ""  # stdlib, fineweb-edu or climbmix
FROM = ""  # a file or folder of your own text to make shards of
BASE_URL = ""  # another host of shards, as in https://host/path
NAME = ""  # of the data set, for --from, --base-url and --verify: its folder under NANOTRAIN_DIR/data
# --- how much of it, and how it is read
TRAIN_SHARDS = 0  # how many train shards to download; 0: all (with --base-url)
FOR_DEPTH = 0  # instead of TRAIN_SHARDS: as many as a model of this depth trains on by default
NUM_SHARDS = 0  # with --base-url: how many shards the host has, the last of them for validation
TEXT_COLUMN = "text"  # with --from: the field of .jsonl rows or the column of .parquet files
VERIFY = False  # hash the shards again and compare with the manifest
# -----------

MANIFEST = "manifest.json"
STDLIB = "stdlib of Python"  # with its version: what the manifest of the embedded corpus calls it
SHARD_NAME = re.compile(r"shard_[0-9]{1,12}\.parquet")
SHARD_TEXT_BYTES, BYTES_PER_TOKEN = 250e6, 4.8  # about, of a hosted shard and of its text
READ_BYTES = 1 << 20  # of a row group, decoded at a time


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
    """One parquet file, with the number of rows in each of its row groups and about how many bytes of text it holds."""

    name: str
    path: Path
    num_bytes: int
    modified_ns: int
    group_rows: tuple[int, ...]
    text_bytes: int


@dataclass(frozen=True)
class Shards:
    """A folder of shards: the train shards in order of name, and the validation shard, which is never one of them."""

    folder: Path
    train: tuple[Shard, ...]
    validation: Shard


def open_shards(folder: str | Path) -> Shards:
    """The Shards of a data folder. Raises DataError that says which shard is missing, broken or not the manifest's."""
    folder, names = Path(folder), _shard_names(folder)
    if not names:
        fix = "python -m nanotrain.dataset --dataset=stdlib builds one"
        raise DataError(f"no data folder {folder}, or no shard_<digits>.parquet in it: {fix}")
    manifest = read_manifest(folder)
    validation, entries = manifest["validation"], manifest["shards"]
    missing = sorted({validation, *entries} - set(names))
    if missing:
        raise DataError(f"{folder}: {', '.join(missing[:5])} of its manifest is missing; prepare this data set again")
    shards = {name: open_shard(folder / name) for name in names}
    for name, entry in entries.items():
        size = shards[name].num_bytes
        if size != entry["bytes"]:
            raise DataError(f"{folder / name} has {size} bytes, its manifest says {entry['bytes']}: get it again")
    last = shards.pop(validation)
    if not any(sum(shard.group_rows) for shard in shards.values()):
        raise DataError(f"{folder} holds no train shard with rows beside {validation}, the validation shard: add one")
    return Shards(folder, tuple(shards.values()), last)


def open_shard(path: Path) -> Shard:
    """The Shard at `path`, its footer and schema checked. Raises DataError that says what is wrong with it."""
    try:
        with pq.ParquetFile(path) as file:
            details = file.metadata
            groups = [details.row_group(group) for group in range(details.num_row_groups)]
            columns = [details.schema.column(number) for number in range(details.num_columns)]
            kinds = [(column.path, column.logical_type.type) for column in columns]
        status = path.stat()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable parquet file ({first_line(error)}): get it again") from None
    if kinds.count(("text", "STRING")) != 1:
        found = ", ".join(f"{name} ({kind.lower()})" for name, kind in kinds)
        raise DataError(f"{path} needs one column 'text' of strings and has: {found or 'none'}")
    place = kinds.index(("text", "STRING"))
    text_bytes = sum(group.column(place).total_uncompressed_size for group in groups)
    group_rows = tuple(group.num_rows for group in groups)
    return Shard(path.name, path, status.st_size, status.st_mtime_ns, group_rows, text_bytes)


def read_texts(
    path: Path, group: int, start: int = 0, stop: int | None = None, modified_ns: int | None = None
) -> Iterator[str | None]:
    """Yield the texts of rows `start` to `stop` of a row group, None for nulls; about READ_BYTES are held at a time.
    Raises DataError that names the place, also if the file was changed at another time than `modified_ns`.
    """
    where, at = f"{path}, row group {group}", 0
    try:
        if modified_ns not in (None, path.stat().st_mtime_ns):
            raise DataError(f"{where}, cannot be read: the file has changed since it was opened")
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:  # which reads no whole column chunk
            details = file.metadata.row_group(group)
            rows = max(READ_BYTES * details.num_rows // max(details.total_byte_size, 1), 1)
            for batch in file.iter_batches(min(rows, 4096), [group], ["text"], use_threads=False):
                if stop is not None and at >= stop:
                    break
                yield from batch.column("text")[max(start - at, 0) : None if stop is None else stop - at].to_pylist()
                at += len(batch)
    except (pa.ArrowException, OSError, LookupError, UnicodeDecodeError) as error:  # LookupError: another file is there
        raise DataError(f"{where}, cannot be read ({first_line(error)}): delete the file and get it again") from None


def read_shards(paths: Iterable[Path], most_chars: int | None = None) -> Iterator[str]:
    """Yield the texts of shards in order, each cut to `most_chars`; nulls and empty texts left out."""
    for path in paths:
        for group in range(len(open_shard(path).group_rows)):
            yield from (text[:most_chars] for text in read_texts(path, group) if text)


def fingerprint(shards: Shards) -> dict:
    """{name: {bytes, sha256}} of every shard and which is validation: what a checkpoint remembers of its data.

    Files that the manifest does not know are hashed. Raises DataError if a train shard equals the validation shard.
    """
    entries, files = read_manifest(shards.folder)["shards"], {}
    for shard in tqdm((*shards.train, shards.validation), "hashing shards", leave=False, disable=None):
        digest = entries[shard.name]["sha256"] if shard.name in entries else file_sha256(shard.path)
        files[shard.name] = {"bytes": shard.num_bytes, "sha256": digest}
    for shard in shards.train:
        if files[shard.name] == files[shards.validation.name]:
            raise DataError(f"{shard.path} has the same content as the validation shard: remove one of them")
    return {"validation": shards.validation.name, "files": files}


def hash_of(value: dict | list) -> str:
    """The SHA-256, in hex, of a JSON-like value, such as a `fingerprint`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---- manifest ----


def read_manifest(folder: Path) -> dict:
    """{dataset, validation, shards: {name: {bytes, sha256}}} of a data folder. Without a manifest, validation is the
    last shard by name. Raises DataError if the manifest is broken or another program's.
    """
    path, shards = folder / MANIFEST, {}
    if not path.is_file():
        return {"dataset": "", "validation": max(_shard_names(folder), default=""), "shards": shards}
    with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):
        manifest = json.loads(path.read_bytes())
        for entry in manifest["shards"]:
            shards[entry["name"]] = {"bytes": entry["bytes"], "sha256": str(entry["sha256"])}
        if all(map(SHARD_NAME.fullmatch, [manifest["validation"], *shards])):
            return {"dataset": str(manifest.get("dataset")), "validation": manifest["validation"], "shards": shards}
    raise DataError(f"{path} is broken or another program's: rename it, and the last shard by name is validation")


def write_manifest(folder: Path, dataset: str, validation: str, hashes: Mapping[str, str] | None = None) -> None:
    """Write the manifest of the shards in `folder`. hashes: {name: SHA-256} of those that need not be hashed again."""
    shards, hashes = [], hashes or {}
    for name in _shard_names(folder):
        shard, digest = open_shard(folder / name), hashes.get(name) or file_sha256(folder / name)
        shards.append({"name": name, "bytes": shard.num_bytes, "sha256": digest, "rows": sum(shard.group_rows)})
    write_json(folder / MANIFEST, {"dataset": dataset, "validation": validation, "shards": shards})


def verify(folder: Path) -> list[str]:
    """[what is wrong] of every shard of `folder` that is not as the manifest says, each with its name."""
    manifest, there, bad = read_manifest(folder), _shard_names(folder), []
    shards = manifest["shards"]
    if not shards:
        raise DataError(f"{folder} has no {MANIFEST} to compare with")
    for name in tqdm(sorted({manifest["validation"], *shards, *there}), "verifying", leave=False, disable=None):
        if name not in there:
            bad.append(f"{name} is missing")
        elif name not in shards:
            bad.append(f"{name} is not in the manifest")
        elif file_sha256(folder / name) != shards[name]["sha256"]:
            bad.append(f"{name} has another SHA-256")
    return bad


def _shard_names(folder):
    return sorted(path.name for path in Path(folder).glob("shard_*.parquet") if SHARD_NAME.fullmatch(path.name))


# ---- preparing a data set ----


def build_stdlib(folder: Path) -> bool:
    """Write the embedded corpus to `folder`: the sources of this Python's standard library and the help of pydoc.

    Returns False if it is there already; that of another Python, or a damaged one, is replaced.
    """
    title, held = f"{STDLIB} {platform.python_version()}", read_manifest(folder)
    if held["dataset"] == title and not verify(folder):
        return False
    if held["dataset"].startswith(STDLIB) and {path.name for path in folder.iterdir()} <= {MANIFEST, *held["shards"]}:
        for path in folder.iterdir():
            path.unlink()
    try:
        with new_folder(folder) as temporary:
            train, validation = corpus.stdlib_documents()
            sides = [*(train[number :: corpus.STDLIB_SHARDS] for number in range(corpus.STDLIB_SHARDS)), validation]
            for number, texts in enumerate(sides):
                last = f"shard_{number:05d}.parquet"
                write_shard(temporary / last, texts)
            write_manifest(temporary, title, last)
    except UserError:
        if read_manifest(folder)["dataset"] != title or verify(folder):
            raise
        return False  # another process has built it meanwhile
    return True


def write_shard(path: Path, texts: Sequence[str], rows_per_group: int = 16) -> None:
    """Write `texts` as one shard."""
    table = pa.table({"text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=rows_per_group, compression="zstd")


def fetch(name: str, source: Source, train_shards: int, folder: Path) -> None:
    """Fetch the first `train_shards` train shards and the validation shard of a hosted data set into `folder`.

    Good files that are there stay, bad ones are fetched again. Raises DataError that lists what could not be had.
    """
    most = source.num_shards - 1
    if not 1 <= train_shards <= most:
        raise UserError(f"-n {train_shards}: {name} has 1 to {most} train shards, as in -n {min(most, 8)}")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    base = source.url if "://" in source.url else f"{endpoint}/{source.url}"
    hub = "" if "://" in source.url else download.setting("HF_ENDPOINT")
    download.check_url(base, hub)
    token = os.environ.get("HF_TOKEN", "").strip() if download.host_of(base) == download.host_of(endpoint) else None
    shards = [f"shard_{number:05d}.parquet" for number in (most, *range(train_shards))]
    validation, held = shards[0], read_manifest(folder)
    if held["validation"] and (held["dataset"], held["validation"]) != (name, validation):
        what = f"{held['dataset'] or 'of others'}, validated on {held['validation']}, which would become a train shard"
        raise UserError(f"{folder} holds other data ({what}): choose another --name, or move it away")
    earlier = [shard for shard in held["shards"] if (folder / shard).is_file()]
    good, bad = {}, []
    for shard in tqdm(dict.fromkeys([*shards, *earlier]), "checking", leave=False, disable=None):
        path = folder / shard
        with contextlib.suppress(DataError):
            open_shard(path)
            digest = file_sha256(path)
            if digest == held["shards"].get(shard, {}).get("sha256", digest):
                good[shard] = digest
        if shard not in good:
            path.unlink(missing_ok=True)
            bad.append(shard)
    size, count = len(bad) * source.shard_megabytes * 1_000_000, len(good) + len(bad)
    print(f"{name} (licence: {source.licence}): {len(bad)} of {count} shards to fetch from {download.host_of(base)}")
    print(f"into {folder}" + (f", about {size / 1e9:.2f} GB" if size else ""), flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise DataError(f"the disk is full: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free in {folder}")
    write_manifest(folder, name, validation, good)  # after a kill, the folder is known as ours
    with tqdm(None, "download", size or None, unit="B", unit_scale=True, disable=not bad, mininterval=2) as bar:
        for some in (bad[:1], bad[1:]):  # the first one shows whether the host can be reached
            urls = {shard: f"{base}/{shard}" for shard in some}
            fetched, failed = download.fetch_all(urls, folder, open_shard, bar.update, token)
            good |= fetched
            if failed:
                break
    write_manifest(folder, name, validation, good)
    if failed:
        listed, reasons = ", ".join(sorted(failed)[:20]), "; ".join(sorted(set(failed.values()))[:3]) + hub
        missing = f"{count - len(good)} of {count} shards are missing ({listed}): {reasons}"
        raise DataError(f"{missing}. Run this again, or without a network DATASET=stdlib bash speedrun.sh")


def main() -> None:
    if VERIFY:
        return verify_command()
    if sum(map(bool, (DATASET, FROM, BASE_URL))) != 1 or DATASET not in ("", "stdlib", *SOURCES):
        names = "|".join(("stdlib", *SOURCES))
        raise UserError(f"which data? One of --dataset={names}, --from=PATH --name=mine, --base-url=URL --name=mine")
    if not (NAME or DATASET):
        raise UserError(f"{'--from' if FROM else '--base-url'} needs a name for the data set, as in --name=mine")
    folder = paths.dataset_dir(NAME or DATASET)
    if FROM:
        with new_folder(folder) as temporary:
            validation, documents, skipped = corpus.import_text(FROM, temporary, TEXT_COLUMN)
            write_manifest(temporary, "own text", validation)
        left_out = "".join(f", {count:,} left out: {reason}" for reason, count in skipped.most_common())
        print(f"{folder}: {documents:,} documents{left_out}")
        print(f"train on it with --data-dir={folder}, or DATA_DIR={folder} bash speedrun.sh")
    elif BASE_URL:
        if NUM_SHARDS < 2:
            raise UserError("--base-url needs --num-shards, how many the host has (2 or more), the last for validation")
        source = Source(BASE_URL.rstrip("/"), NUM_SHARDS, 0, "see the host")
        fetch(NAME, source, TRAIN_SHARDS or source.num_shards - 1, folder)
    elif DATASET in SOURCES:
        fetch(DATASET, SOURCES[DATASET], shards_for(FOR_DEPTH) if FOR_DEPTH else TRAIN_SHARDS, folder)
    else:
        built = build_stdlib(folder)
        print(f"{folder}: {'built' if built else 'there already, every shard is as the manifest says'}")


def shards_for(depth: int) -> int:
    """How many hosted shards hold the text that a model of this depth trains on: ten tokens for each weight."""
    width, _ = recipe.model_width(depth, 0, 128)
    return math.ceil(10 * recipe.num_weights(depth, width) * BYTES_PER_TOKEN / SHARD_TEXT_BYTES)


def verify_command() -> None:
    """Verify one data set, or all that have a manifest."""
    name, parent, num_bad = NAME or DATASET, paths.base_dir() / "data", 0
    folders = [paths.dataset_dir(name)] if name else sorted(path.parent for path in parent.glob(f"*/{MANIFEST}"))
    if not folders:
        raise DataError(f"no data set with a {MANIFEST} in {parent}")
    for folder in folders:
        bad = verify(folder)
        num_bad += len(bad)
        print(f"{folder}: {'; '.join(bad) or 'every shard is as the manifest says'}")
    if num_bad:
        raise DataError(f"{num_bad} bad shards: delete them and prepare the data set again")


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__, short={"-n": "TRAIN_SHARDS"}), main)
