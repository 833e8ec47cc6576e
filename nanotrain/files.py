"""Files and folders that are there whole or not at all, and their hashes."""

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
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in this block names `path`, where the system names no file, as for a write to an open one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """`with atomic_file(path) as temporary:` write to it; it becomes `path` at the end, or vanishes on an error."""
    path = Path(os.path.realpath(path))  # a link stays
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with naming(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def check_empty(folder: Path) -> None:
    """Raise UserError if there is a file at `folder`, or anything in it."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} holds files that would be lost: choose another name, or move them away")


@contextlib.contextmanager
def new_folder(folder: Path, check: Callable[[Path], object] = check_empty) -> Iterator[Path]:
    """`with new_folder(path) as temporary:` fill it; at the end it becomes `path`, or vanishes on an error.

    What is there already is replaced, unless check(path) raises a UserError, at once or at the end. A mount point stays
    and is filled, if it is empty; a link stays too.
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
    """Whether `folder` can get another name. A mount point cannot, nor a folder in one that is read-only."""
    other = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        folder.rename(other)
    except OSError:
        return False
    other.rename(folder)
    return True
