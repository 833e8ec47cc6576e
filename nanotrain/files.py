"""Atomic files and folders, and file hashes."""

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanotrain.errors import UserError


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError of this block that has no file name, as after a write to an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It becomes `path` at the end of the block, or is deleted on an error."""
    path = Path(os.path.realpath(path))  # replace the target of a link, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with naming(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def check_empty(folder: Path) -> None:
    """Raise UserError if `folder` is a file or a folder that is not empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} holds files that would be lost: choose another name or move them away")


@contextlib.contextmanager
def new_folder(folder: Path, check: Callable[[Path], object] = check_empty) -> Iterator[Path]:
    """Yield a temporary folder to fill. It becomes `folder` at the end of the block, or is deleted on an error.

    An existing folder is replaced if check(folder), called at the beginning and at the end, raises no UserError. Links
    are followed. A mount point must be empty and is filled in place.
    """
    folder = Path(os.path.realpath(folder))
    check(folder)
    in_place = folder.exists() and not _can_be_renamed(folder)
    if in_place:
        check_empty(folder)
    place = folder if in_place else folder.parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".tmp-{folder.name}-", dir=place) as parent:
        temporary = Path(parent, "new")
        temporary.mkdir()
        with naming(folder):
            yield temporary
        if in_place:
            for path in temporary.iterdir():
                path.rename(folder / path.name)
            return
        check(folder)
        if folder.exists():
            folder.rename(Path(parent, "old"))
        temporary.rename(folder)


def _can_be_renamed(folder):
    """Whether `folder` can be renamed. A mount point cannot, nor a folder in a read-only one."""
    other = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        folder.rename(other)
    except OSError:
        return False
    other.rename(folder)
    return True
