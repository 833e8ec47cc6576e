"""Crash-safe storage for checkpoints: sets of files that are whole or absent.

    <run>/owner.json                          id of the process that claimed the run last, the only one that may write
    <run>/horizon.json                        corrections of a timed run's number of steps: see `TimeBudget.correct`
    <run>/.lock                               locked by the process that trains
    <run>/checkpoints/step_00001000/          a set: its files, and manifest.json with the size and SHA-256 of each
    <run>/checkpoints/.tmp-step_00001000-...  being written or removed
    <run>/checkpoints/.old-step_00001000-...  being replaced by another set of the same step; valid until that is there

A set is written to a temporary folder. Every file is hashed and synced, the manifest last, then the folder. Then the
folder is renamed, and when the rename is synced, the set counts as saved. Readers verify every hash.

All file operations go through a Disk, so that tests can kill the process, cut the power or fill the disk before each of
them. This module does not depend on torch or on the contents of the files.
"""

import collections
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanotrain.errors import CheckpointError, RunError
from nanotrain.files import naming

FORMAT = 2  # version, including the fields of state.json and the tensor names
MODEL, OPTIMIZER, STATE = "model.safetensors", "optim-00000-of-00001.safetensors", "state.json"
MANIFEST, OWNER, HORIZON, LOCK = "manifest.json", "owner.json", "horizon.json", ".lock"
SET_NAME = re.compile(r"(?P<old>\.old-)?(?P<name>step_(?P<step>[0-9]{8}))(?(old)-[0-9a-f]{32})")
CANNOT_SYNC_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)  # CIFS, sshfs, DrvFs
SMALL_FILE = 1 << 20  # size limit of manifest and owner


class Disk:
    """The file operations of a store. All raise OSError, except `remove`."""

    syncs_folders = True

    def names(self, folder: Path) -> list[str]:
        """The names in a folder; [] if it does not exist."""
        return os.listdir(folder) if os.path.isdir(folder) else []

    def read(self, path: Path, max_bytes: int) -> bytes:
        """Read a file. Raises CheckpointError if it is longer than `max_bytes` or not a regular file."""
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > max_bytes:
            raise CheckpointError(f"{path} is not a file of at most {max_bytes} bytes")
        return path.read_bytes()

    def make_folder(self, path: Path) -> None:
        Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)  # create the target of a broken link

    def write(self, path: Path, data: bytes) -> None:
        with naming(path), open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Sync the names in a folder to disk; print a warning once if the file system cannot."""
        handle = os.open(path, os.O_RDONLY)
        try:
            with naming(path):
                os.fsync(handle)
        except OSError as error:
            if error.errno not in CANNOT_SYNC_FOLDERS:
                raise
            if self.syncs_folders:
                print(f"{path}: this file system cannot sync folders, so a power loss may undo the last save")
            self.syncs_folders = False
        finally:
            os.close(handle)

    def lock(self, path: Path) -> None:
        """Lock `path` until this process ends. Raises RunError if another process holds the lock."""
        self._lock = open(path, "a+")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._lock.seek(0)
            holder = self._lock.read()
            raise RunError(f"process {holder} is writing to {path.parent}: end it or choose another name") from None
        except OSError:  # no locks on this file system: our claim stops the older process at its next save
            return
        self._lock.truncate(0)
        print(f"{os.getpid()} on {socket.gethostname()}", end="", file=self._lock, flush=True)

    def rename(self, path: Path, new_path: Path) -> None:
        os.replace(path, new_path)

    def remove(self, path: Path) -> None:
        """Remove a folder and its contents, ignoring errors."""
        shutil.rmtree(path, ignore_errors=True)


class Store:
    """The sets of files of one run, identified by step; all have the same file `names`."""

    def __init__(self, run_dir: str | Path, names: Iterable[str] = (MODEL, OPTIMIZER, STATE), disk: Disk | None = None):
        self.run_dir, self.names, self.disk = Path(run_dir), set(names), disk or Disk()
        self.folder = self.run_dir / "checkpoints"
        self._verified = set()  # steps that `clean` has verified

    def steps(self) -> list[int]:
        """Steps of all sets, newest first, without verification."""
        return sorted(self._folders(), reverse=True)

    def read(self, step: int) -> dict[str, bytes]:
        """{file name: bytes} of the set of `step`. Raises CheckpointError if a hash does not match."""
        return dict(self._verified_files(step))

    def newest(self) -> tuple[int | None, dict[str, bytes] | None, list[str]]:
        """(step, files, complaints) of the newest valid set: complaints are the errors of newer ones. (None, None, [])
        without any sets. Raises CheckpointError if there are sets but none is valid.
        """
        complaints = []
        for step in self.steps():
            try:
                return step, self.read(step), complaints
            except CheckpointError as error:
                complaints.append(str(error))
        if complaints:
            raise CheckpointError(f"no checkpoint of {self.run_dir} can be used: " + "; ".join(complaints))
        return None, None, []

    def commit(self, step: int, files: dict[str, Callable[[], bytes]], owner: str | None = None) -> Path:
        """Write {file name: function that returns its bytes} as the set of `step` and return its folder.

        The set appears as a whole or not at all, and no other is lost. Only one file is in memory at a time. Raises
        OSError (such as a full disk) or RunError (`owner` no longer owns the run).
        """
        assert set(files) == self.names
        final = self.folder / f"step_{step:08d}"
        temporary = self._hidden("tmp", final.name)
        self.check_owner(owner)
        try:
            self.disk.make_folder(self.folder)
            self.disk.sync_folder(self.run_dir)
            self.disk.sync_folder(self.run_dir.parent)
            self._sweep()
            self.disk.make_folder(temporary)
            entries = {name: self._write(temporary / name, content) for name, content in files.items()}
            manifest = {"format": FORMAT, "step": step, "files": entries}
            manifest["sha256"] = _hash_of(manifest)
            self._write(temporary / MANIFEST, json.dumps(manifest, indent=1).encode)
            self.disk.sync_folder(temporary)
            self.check_owner(owner)
            if final.name in self.disk.names(self.folder):  # a folder cannot be replaced atomically
                self.disk.rename(final, self._hidden("old", final.name))
            self.disk.rename(temporary, final)
            self.disk.sync_folder(self.folder)
        except BaseException as error:
            self.disk.remove(temporary)
            if isinstance(error, OSError):
                self.check_owner(owner)  # the cause may be a new owner that removed our temporary folder
            raise
        self._verified.discard(step)
        self._sweep()
        return final

    def clean(
        self, keep_last: int, keep_every: int, best_step: int, resumed_step: int | None, owner: str | None = None
    ) -> None:
        """Remove leftovers of interrupted writes, and old sets except the newest `keep_last`, those of a multiple of
        `keep_every` steps, the best, and the one resumed from while it has fewer than two newer ones.

        Only valid sets count; an unreadable one stays until `keep_last` newer ones are valid. Raises as `commit` does.
        """
        self.check_owner(owner)
        self._sweep()
        known, whole = self.steps(), []
        for step in known:  # verify no more than necessary: sets can be large
            if len(whole) < max(keep_last, 2) and self._is_valid(step):
                whole.append(step)
        if not whole:
            return
        oldest = whole[:keep_last][-1]
        kept = {best_step}
        if resumed_step is not None and sum(step > resumed_step for step in whole) < 2:
            kept.add(resumed_step)
        for step in known:
            if step < oldest and step not in kept and not (keep_every and step % keep_every == 0):
                self._discard(self._folders()[step])

    def claim(self) -> str:
        """Take over the run from earlier owners; return a new owner id. Raises RunError if a process trains in it."""
        owner = uuid.uuid4().hex
        self.disk.make_folder(self.run_dir)
        self.disk.lock(self.run_dir / LOCK)
        self.put(OWNER, json.dumps(owner).encode())
        return owner

    def put(self, name: str, data: bytes) -> None:
        """Write a file of the run's folder atomically and sync it."""
        temporary = self.run_dir / f".{name}.{uuid.uuid4().hex}.part"
        self.disk.write(temporary, data)
        self.disk.rename(temporary, self.run_dir / name)
        self.disk.sync_folder(self.run_dir)

    def check_owner(self, owner: str | None) -> None:
        """Raise RunError (or OSError) unless `owner` is from the last `claim` or None."""
        if owner is not None and self.disk.read(self.run_dir / OWNER, SMALL_FILE) != json.dumps(owner).encode():
            raise RunError(f"another process has taken over {self.run_dir}: this one stops without saving")

    def _folders(self) -> dict[int, str]:
        """{step: folder name}: step_N, or .old-step_N if the writer was killed between the two renames."""
        found = {}
        for name in sorted(self.disk.names(self.folder)):  # .old-step_N sorts before step_N, which overrides it
            if match := SET_NAME.fullmatch(name):
                found[int(match["step"])] = name
        return found

    def _verified_files(self, step: int) -> Iterator[tuple[str, bytes]]:
        """Yield (file name, verified bytes) of a set. Raises CheckpointError."""
        folder = self.folder / self._folders().get(step, f"step_{step:08d}")
        try:
            for name, entry in self._manifest(folder, step)["files"].items():
                data = self.disk.read(folder / name, entry["bytes"])
                if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                    raise CheckpointError(f"{folder}: {name} does not match its hash")
                yield name, data
                del data  # hold one file at a time
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{folder}: {type(error).__name__}: {error}") from None

    def _manifest(self, folder: Path, step: int) -> dict:
        manifest = json.loads(self.disk.read(folder / MANIFEST, SMALL_FILE))
        if manifest.pop("sha256") != _hash_of(manifest):
            raise CheckpointError(f"{folder}: {MANIFEST} does not match its own hash")
        if manifest["format"] != FORMAT:
            found = f"{folder} has format {manifest['format']}, and this version of nanotrain reads format {FORMAT}"
            raise CheckpointError(f"{found}: use the version that wrote it, or start a new run with another --run-name")
        # never trust names from the manifest: they must be exactly the expected ones
        if manifest["step"] != step or set(manifest["files"]) != self.names:
            raise CheckpointError(f"{folder}: {MANIFEST} does not describe the checkpoint of step {step}")
        return manifest

    def _is_valid(self, step: int) -> bool:
        """Whether a set is valid; cached."""
        with contextlib.suppress(CheckpointError):
            if step not in self._verified:
                collections.deque(self._verified_files(step), maxlen=0)  # read everything, keep nothing
                self._verified.add(step)
        return step in self._verified

    def _write(self, path: Path, content: Callable[[], bytes]) -> dict:
        data = content()
        self.disk.write(path, data)
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def _sweep(self) -> None:
        """Remove leftovers of interrupted writes, and replaced sets."""
        names = self.disk.names(self.folder)
        for name in names:
            match = SET_NAME.fullmatch(name)
            if name.startswith(".tmp-"):
                self.disk.remove(self.folder / name)
            elif match and match["old"] and match["name"] in names:
                self._discard(name)

    def _discard(self, name: str) -> None:
        """Remove a set; if that fails, a later call tries again."""
        trash = self._hidden("tmp", f"trash-{name.lstrip('.')}")
        with contextlib.suppress(OSError):
            self.disk.rename(self.folder / name, trash)  # first, so that no reader sees half a set
            self.disk.sync_folder(self.folder)  # not even after a power loss
            self.disk.remove(trash)

    def _hidden(self, kind: str, name: str) -> Path:
        return self.folder / f".{kind}-{name}-{uuid.uuid4().hex}"


def _hash_of(fields: dict) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
