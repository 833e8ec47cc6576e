"""Data sets as parquet shards: prepare them, check them, and read them by row group.

    python -m nanotrain.dataset --dataset=stdlib              build the embedded corpus from this Python installation
    python -m nanotrain.dataset -n 8 --dataset=fineweb-edu    download 8 train shards and the validation shard
    python -m nanotrain.dataset --from=PATH --name=mine       build shards of your own .txt, .md, .jsonl, .parquet
    python -m nanotrain.dataset --verify                      hash the shards on disk and compare with the manifests

A data folder holds `shard_<digits>.parquet` files with a string column `text`. The validation shard is the one named in
`manifest.json`, or without a manifest the last by name. Files with other names are ignored.
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

from nanotrain import config, corpus, errors, paths, recipe
from nanotrain.errors import DataError, UserError, first_line
from nanotrain.files import file_sha256, new_folder, write_json
from nanotrain.terminal import progress_bar

# --- source
DATASET = ""  # data set to prepare: stdlib, fineweb-edu or climbmix
FROM = ""  # file or folder of your own text to build shards from
BASE_URL = ""  # URL of another host of shards, as in https://host/path
NAME = ""  # data set name, its folder under NANOTRAIN_DIR/data (for --from, --base-url and --verify)
# --- amount and format
TRAIN_SHARDS = 0  # number of train shards to download; 0: all (with --base-url)
FOR_DEPTH = 0  # model depth, to download as many shards as it trains on by default (instead of TRAIN_SHARDS)
NUM_SHARDS = 0  # number of shards on the host, the last of them for validation (with --base-url)
TEXT_COLUMN = "text"  # text field of .jsonl rows or column of .parquet files (with --from)
VERIFY = False  # verification of the shards' hashes against the manifest
# -----------

MANIFEST = "manifest.json"
STDLIB = "stdlib of Python"  # data set name in the embedded corpus's manifest, followed by the Python version
SHARD_NAME = re.compile(r"shard_[0-9]{1,12}\.parquet")
SHARD_TEXT_BYTES, BYTES_PER_TOKEN = 250e6, 4.8  # approximate bytes of text per hosted shard and per token
READ_BYTES = 1 << 20  # bytes of a row group decoded at a time


@dataclass(frozen=True)
class Source:
    """A hosted data set of shards 0 to num_shards - 1; the last one is for validation."""

    url: str
    num_shards: int
    shard_megabytes: int  # approximate; 0: unknown
    licence: str


SOURCES = {
    "fineweb-edu": Source("datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main", 1823, 100, "ODC-By"),
    "climbmix": Source("datasets/karpathy/climbmix-400b-shuffle/resolve/main", 6543, 90, "CC-BY-NC: non-commercial"),
}


@dataclass(frozen=True)
class Shard:
    """One parquet file: its size, the rows in each row group, and its approximate bytes of text."""

    name: str
    path: Path
    num_bytes: int
    modified_ns: int
    group_rows: tuple[int, ...]
    text_bytes: int


@dataclass(frozen=True)
class Shards:
    """A folder of shards: the train shards sorted by name, and the validation shard, which is not among them."""

    folder: Path
    train: tuple[Shard, ...]
    validation: Shard


def open_shards(folder: str | Path) -> Shards:
    """Open a data folder. Raises DataError if a shard is missing, corrupt or differs in size from the manifest."""
    folder, names = Path(folder), _shard_names(folder)
    if not names:
        fix = "build a data set with python -m nanotrain.dataset --dataset=stdlib"
        raise DataError(f"no shard_<digits>.parquet in {folder}: {fix}")
    manifest = read_manifest(folder)
    validation, entries = manifest["validation"], manifest["shards"]
    missing = sorted({validation, *entries} - set(names))
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing[:5])} of its manifest: prepare this data set again")
    shards = {name: open_shard(folder / name) for name in names}
    for name, entry in entries.items():
        size = shards[name].num_bytes
        if size != entry["bytes"]:
            raise DataError(f"{folder / name} has {size} bytes, the manifest says {entry['bytes']}: replace it")
    last = shards.pop(validation)
    if not any(sum(shard.group_rows) for shard in shards.values()):
        raise DataError(f"{folder} has no train shard with rows besides the validation shard {validation}: add one")
    return Shards(folder, tuple(shards.values()), last)


def open_shard(path: Path) -> Shard:
    """Read and check a shard's footer and schema. Raises DataError if the file is not a shard."""
    try:
        with pq.ParquetFile(path) as file:
            details = file.metadata
            groups = [details.row_group(group) for group in range(details.num_row_groups)]
            columns = [details.schema.column(number) for number in range(details.num_columns)]
            kinds = [(column.path, column.logical_type.type) for column in columns]
        status = path.stat()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable parquet file ({first_line(error)}): replace it") from None
    if kinds.count(("text", "STRING")) != 1:
        found = ", ".join(f"{name} ({kind.lower()})" for name, kind in kinds)
        raise DataError(f"{path} must have exactly one string column 'text'; its columns: {found or 'none'}")
    place = kinds.index(("text", "STRING"))
    text_bytes = sum(group.column(place).total_uncompressed_size for group in groups)
    group_rows = tuple(group.num_rows for group in groups)
    return Shard(path.name, path, status.st_size, status.st_mtime_ns, group_rows, text_bytes)


def read_texts(
    path: Path, group: int, start: int = 0, stop: int | None = None, modified_ns: int | None = None
) -> Iterator[str | None]:
    """Yield the texts of rows `start` to `stop` of a row group, None for nulls, decoding about READ_BYTES at a time.
    Raises DataError if the rows cannot be read or the file's modification time is not `modified_ns`.
    """
    where, at = f"{path}, row group {group}", 0
    try:
        if modified_ns not in (None, path.stat().st_mtime_ns):
            raise DataError(f"{where}, cannot be read: the file has changed since it was opened")
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:  # else whole columns are read
            details = file.metadata.row_group(group)
            rows = max(READ_BYTES * details.num_rows // max(details.total_byte_size, 1), 1)
            for batch in file.iter_batches(min(rows, 4096), [group], ["text"], use_threads=False):
                if stop is not None and at >= stop:
                    break
                yield from batch.column("text")[max(start - at, 0) : None if stop is None else stop - at].to_pylist()
                at += len(batch)
    except (pa.ArrowException, OSError, LookupError, UnicodeDecodeError) as error:  # LookupError: file replaced
        raise DataError(f"{where}, cannot be read ({first_line(error)}): replace the file") from None


def read_shards(paths: Iterable[Path], most_chars: int | None = None) -> Iterator[str]:
    """Yield the texts of shards in order, each cut to `most_chars`; nulls and empty texts are skipped."""
    for path in paths:
        for group in range(len(open_shard(path).group_rows)):
            yield from (text[:most_chars] for text in read_texts(path, group) if text)


def fingerprint(shards: Shards) -> dict:
    """{validation: name, files: {name: {bytes, sha256}}}, by which a checkpoint identifies its data.
    Files without a manifest entry are hashed. Raises DataError if a train shard equals the validation shard.
    """
    entries, files = read_manifest(shards.folder)["shards"], {}
    for shard in progress_bar((*shards.train, shards.validation), "hashing shards"):
        digest = entries[shard.name]["sha256"] if shard.name in entries else file_sha256(shard.path)
        files[shard.name] = {"bytes": shard.num_bytes, "sha256": digest}
    for shard in shards.train:
        if files[shard.name] == files[shards.validation.name]:
            raise DataError(f"{shard.path} has the same content as the validation shard: remove one of them")
    return {"validation": shards.validation.name, "files": files}


def hash_of(value: dict | list) -> str:
    """Hex SHA-256 of a JSON-like value, such as a `fingerprint`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict:
    """{dataset, validation, shards: {name: {bytes, sha256}}} of a data folder. Without a manifest, `shards` is empty
    and validation is the last shard by name. Raises DataError if the manifest is not valid.
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
    raise DataError(f"{path} is not a valid manifest: rename it, and the last shard by name is used for validation")


def write_manifest(folder: Path, dataset: str, validation: str, hashes: Mapping[str, str] | None = None) -> None:
    """Write the manifest of the shards in `folder`. hashes: known {name: SHA-256}, which are not computed again."""
    shards, hashes = [], hashes or {}
    for name in _shard_names(folder):
        shard, digest = open_shard(folder / name), hashes.get(name) or file_sha256(folder / name)
        shards.append({"name": name, "bytes": shard.num_bytes, "sha256": digest, "rows": sum(shard.group_rows)})
    write_json(folder / MANIFEST, {"dataset": dataset, "validation": validation, "shards": shards})


def verify(folder: Path) -> list[str]:
    """Compare the shards in `folder` with the manifest; return one message per difference."""
    manifest, present, bad = read_manifest(folder), _shard_names(folder), []
    shards = manifest["shards"]
    if not shards:
        raise DataError(f"{folder} has no {MANIFEST} to compare with")
    for name in progress_bar(sorted({manifest["validation"], *shards, *present}), "verifying"):
        if name not in present:
            bad.append(f"{name} is missing")
        elif name not in shards:
            bad.append(f"{name} is not in the manifest")
        elif file_sha256(folder / name) != shards[name]["sha256"]:
            bad.append(f"{name} does not match its SHA-256")
    return bad


def _shard_names(folder):
    return sorted(path.name for path in Path(folder).glob("shard_*.parquet") if SHARD_NAME.fullmatch(path.name))


def build_stdlib(folder: Path) -> bool:
    """Write the embedded corpus to `folder`: the sources of this Python's standard library and pydoc's help topics.
    Returns False if an intact one exists; a damaged one, or one of another Python version, is replaced.
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
        return False  # another process has built it in the meantime
    return True


def write_shard(path: Path, texts: Sequence[str], rows_per_group: int = 16) -> None:
    """Write `texts` as one shard."""
    table = pa.table({"text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=rows_per_group, compression="zstd")


def fetch(name: str, source: Source, train_shards: int, folder: Path) -> None:
    """Download the first `train_shards` train shards and the validation shard of a hosted data set into `folder`.
    Intact files are kept and damaged ones downloaded again. Raises DataError that lists the missing shards.
    """
    from nanotrain import download  # here, because no stage but this one waits for requests

    most = source.num_shards - 1
    if not 1 <= train_shards <= most:
        raise UserError(f"-n {train_shards}: choose 1 to {most} train shards of {name}, as in -n {min(most, 8)}")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    base = source.url if "://" in source.url else f"{endpoint}/{source.url}"
    hub = "" if "://" in source.url else download.setting("HF_ENDPOINT")
    download.check_url(base, hub)
    token = os.environ.get("HF_TOKEN", "").strip() if download.host_of(base) == download.host_of(endpoint) else None
    shards = [f"shard_{number:05d}.parquet" for number in (most, *range(train_shards))]
    validation, held = shards[0], read_manifest(folder)
    if held["validation"] and (held["dataset"], held["validation"]) != (name, validation):
        what = f"{held['dataset'] or 'unknown'}; training would use its validation shard {held['validation']}"
        raise UserError(f"{folder} holds another data set ({what}): choose another --name or move the folder away")
    earlier = [shard for shard in held["shards"] if (folder / shard).is_file()]
    good, bad = {}, []
    for shard in progress_bar(dict.fromkeys([*shards, *earlier]), "checking"):
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
    print(f"{name} (licence: {source.licence}): {len(bad)} of {count} shards to download from {download.host_of(base)}")
    print(f"to {folder}" + (f", about {size / 1e9:.2f} GB" if size else ""), flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise DataError(f"not enough disk space: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free in {folder}")
    write_manifest(folder, name, validation, good)  # identifies the folder after a kill
    with progress_bar(None, "download", size or None, shown=bool(bad), unit="B", unit_scale=True) as bar:
        for some in (bad[:1], bad[1:]):  # one first, to see whether the host is reachable
            urls = {shard: f"{base}/{shard}" for shard in some}
            fetched, failed = download.fetch_all(urls, folder, open_shard, bar.update, token)
            good |= fetched
            if failed:
                break
    write_manifest(folder, name, validation, good)
    if failed:
        listed, reasons = ", ".join(sorted(failed)[:20]), "; ".join(sorted(set(failed.values()))[:3]) + hub
        missing = f"{count - len(good)} of {count} shards are missing ({listed}): {reasons}"
        raise DataError(f"{missing}. Run this again, or train without a network: DATASET=stdlib bash speedrun.sh")


def main() -> None:
    if VERIFY:
        return verify_command()
    if sum(map(bool, (DATASET, FROM, BASE_URL))) != 1 or DATASET not in ("", "stdlib", *SOURCES):
        names = "|".join(("stdlib", *SOURCES))
        raise UserError(f"choose one of --dataset={names}, --from=PATH --name=mine, --base-url=URL --name=mine")
    if not (NAME or DATASET):
        raise UserError(f"{'--from' if FROM else '--base-url'} needs a name for the data set, as in --name=mine")
    folder = paths.dataset_dir(NAME or DATASET)
    if FROM:
        with new_folder(folder) as temporary:
            validation, documents, skipped = corpus.import_text(FROM, temporary, TEXT_COLUMN)
            write_manifest(temporary, "own text", validation)
        reasons = "".join(f", {count:,} skipped: {reason}" for reason, count in skipped.most_common())
        print(f"{folder}: {documents:,} documents{reasons}")
        print(f"train on it with --data-dir={folder} or DATA_DIR={folder} bash speedrun.sh")
    elif BASE_URL:
        if NUM_SHARDS < 2:
            raise UserError("--base-url needs --num-shards=N, the number of shards on the host (2 or more)")
        source = Source(BASE_URL.rstrip("/"), NUM_SHARDS, 0, "see the host")
        fetch(NAME, source, TRAIN_SHARDS or source.num_shards - 1, folder)
    elif DATASET in SOURCES:
        num_shards = TRAIN_SHARDS
        if FOR_DEPTH:  # ten tokens per weight
            num_bytes = 10 * recipe.num_weights(FOR_DEPTH, recipe.model_width(FOR_DEPTH, 0, 128)[0]) * BYTES_PER_TOKEN
            num_shards = math.ceil(num_bytes / SHARD_TEXT_BYTES)
        fetch(DATASET, SOURCES[DATASET], num_shards, folder)
    else:
        print(f"{folder}: {'built' if build_stdlib(folder) else 'already built, every shard matches the manifest'}")


def verify_command() -> None:
    """Verify the data set NAME or DATASET, or all data sets that have a manifest."""
    name, parent, num_bad = NAME or DATASET, paths.base_dir() / "data", 0
    folders = [paths.dataset_dir(name)] if name else sorted(path.parent for path in parent.glob(f"*/{MANIFEST}"))
    if not folders:
        raise DataError(f"no data set with a {MANIFEST} in {parent}")
    for folder in folders:
        bad = verify(folder)
        num_bad += len(bad)
        print(f"{folder}: {'; '.join(bad) or 'every shard matches the manifest'}")
    if num_bad:
        raise DataError(f"{num_bad} bad shards: delete them and prepare the data set again")


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__, short={"-n": "TRAIN_SHARDS"}), main)
