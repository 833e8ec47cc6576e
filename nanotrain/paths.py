"""Locations of data sets, tokenizers and runs."""

import os
import re
from pathlib import Path

from nanotrain.errors import DataError, UserError


def base_dir() -> Path:
    """The folder of data, tokenizer and runs: the environment variable NANOTRAIN_DIR or ~/.cache/nanotrain."""
    return absolute(os.environ.get("NANOTRAIN_DIR") or "~/.cache/nanotrain")


def absolute(path: str | Path) -> Path:
    """Absolute path with ~ expanded. Raises UserError if there is no home folder."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise UserError(f"{path}: no such home folder; set NANOTRAIN_DIR or give another path") from None


def dataset_dir(name: str) -> Path:
    """The folder of the prepared data set `name`."""
    return base_dir() / "data" / checked_name(name, "data set name")


def data_dir(path: str = "") -> Path:
    """The folder of shards: `path`, or the only prepared data set. Raises DataError if there are none or several."""
    if path:
        return absolute(path)
    parent = base_dir() / "data"
    found = sorted({shard.parent for shard in parent.glob("[!.]*/shard_*.parquet")})
    if not found:
        raise DataError(f"no data set in {parent}: build one with python -m nanotrain.dataset --dataset=stdlib")
    if len(found) > 1:
        raise DataError(f"several data sets in {parent}: choose one, as in --data-dir={found[0]}")
    return found[0]


def tokenizer_dir(path: str = "") -> Path:
    """The tokenizer's folder: `path`, or else the default."""
    return absolute(path) if path else base_dir() / "tokenizer"


def run_dir(name: str) -> Path:
    """The folder of the run `name`. A name with a slash is a path."""
    if "/" in name or os.sep in name:
        return absolute(name)
    return base_dir() / "runs" / checked_name(name, "run name")


def checked_name(name: str, what: str) -> str:
    """Return `name` if it is a safe file name on every system. Raises UserError otherwise. what: its description."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"{what} {name!r}: use 1 to 100 letters, digits, dots, dashes and underscores")
    return name
