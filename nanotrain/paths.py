"""Where things live: every folder of nanotrain is found through these functions."""

import os
import re
from pathlib import Path

from nanotrain.errors import DataError, UserError


def base_dir() -> Path:
    """The folder that holds data, tokenizer and runs: NANOTRAIN_DIR, read when used, or ~/.cache/nanotrain."""
    return absolute(os.environ.get("NANOTRAIN_DIR") or "~/.cache/nanotrain")


def absolute(path: str | Path) -> Path:
    """`path` from the root, with ~ as this user's home folder; UserError where there is none."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise UserError(f"{path}: no such home folder: set NANOTRAIN_DIR, or give another path") from None


def dataset_dir(name: str) -> Path:
    """The folder of the prepared data set `name`."""
    return base_dir() / "data" / checked_name(name, "data set name")


def data_dir(path: str = "") -> Path:
    """The folder of shards at `path`; without one, the only data set, or DataError if there are none or several."""
    if path:
        return absolute(path)
    parent = base_dir() / "data"
    found = sorted({shard.parent for shard in parent.glob("[!.]*/shard_*.parquet")})
    if not found:
        raise DataError(f"no data set in {parent}: python -m nanotrain.dataset --dataset=stdlib builds one")
    if len(found) > 1:
        raise DataError(f"several data sets in {parent}: choose one, as in --data-dir={found[0]}")
    return found[0]


def tokenizer_dir(path: str = "") -> Path:
    """The folder of the tokenizer: `path`, or the default one."""
    return absolute(path) if path else base_dir() / "tokenizer"


def run_dir(name: str) -> Path:
    """The folder of the run `name`; a name with a slash is taken as a path."""
    if "/" in name or os.sep in name:
        return absolute(name)
    return base_dir() / "runs" / checked_name(name, "run name")


def checked_name(name: str, what: str) -> str:
    """`name` itself if it is safe as one file name on every system; raises UserError if not."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"{what} {name!r}: use 1 to 100 letters, digits, dots, dashes and underscores")
    return name
