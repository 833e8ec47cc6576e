"""Sets of files that are whole or absent, whatever happens while they are written: what checkpoints are made of.

    <run>/owner.json                          who may write here: the process that claimed the run last
    <run>/checkpoints/step_00001000/          the files of a set, and manifest.json with the size and SHA-256 of each
    <run>/checkpoints/.tmp-step_00001000-...  being written, or (.tmp-trash-...) being removed
    <run>/checkpoints/.old-step_00001000-...  replaced by another set of the same step; it counts until that is there
    <run>/checkpoints/.bad-step_00001000-...  in the way of a set of that step, and not one itself

A set is written to a temporary folder: every file hashed and synced, the manifest last, then the folder. Only then does
the folder get its name, and only when that is synced too is the set reported as saved. Readers believe nothing that
they have not hashed.

Every operation on files goes through a Disk, so that a test can end the process, cut the power or fill the disk before
each of them. Nothing here knows what the files mean, or of torch.
"""

import collections
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from nanotrain.errors import CheckpointError, SupersededError

FORMAT = 2  # of what is in the files too: state.json and the names of tensors
MANIFEST, OWNER = "manifest.json", "owner.json"
SET_NAME = re.compile(r"(?P<old>\.old-)?(?P<name>step_(?P<step>[0-9]{8}))(?(old)-[0-9a-f]{32})")
BLOCK_BYTES = 16 << 20  # of one write
MAX_MANIFEST_BYTES = 1 << 20  # ours have a few hundred
NEEDED_SPACE = 1.1  # times what is to be written


class Disk:
    """The operations on files that a store consists of. All raise OSError, but `names` and `remove`."""

    def names(self, folder: Path) -> list[str]:
        """The names in a folder; none if there is no such folder."""
        return os.listdir(folder) if os.path.isdir(folder) else []

    def status(self, path: Path) -> tuple[int, int, int]:
        """(bytes, time of the last change, inode) of a file. Raises CheckpointError if it is something else."""
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device might never end
            raise CheckpointError(f"{path} is not a file")
        return found.st_size, found.st_mtime_ns, found.st_ino

    def read(self, path: Path) -> bytes:
        return Path(path).read_bytes()

    def free(self, folder: Path) -> int:
        """Bytes that may still be written there."""
        return shutil.disk_usage(folder).free

    def make_folders(self, path: Path) -> None:
        """The folder and those above it, where they are not there."""
        Path(path).mkdir(parents=True, exist_ok=True)

    def make_folder(self, path: Path) -> None:
        """A new folder."""
        Path(path).mkdir()

    def create(self, path: Path) -> BinaryIO:
        """A new file, to be used by `with`, `write` and `sync`."""
        return open(path, "xb")

    def write(self, file: BinaryIO, block: memoryview) -> None:
        file.write(block)

    def sync(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder last."""
        if os.name == "nt":  # folders cannot be opened there
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, path: Path, new_path: Path) -> None:
        """Give a file or folder another name; a file of that name is replaced in one instant."""
        os.replace(path, new_path)

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with all in it; what cannot be removed stays."""
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.remove(path)


class Store:
    """The sets of files of one run, each of the same file `names` and known by its step."""

    def __init__(self, run_dir: str | Path, names: Iterable[str], disk: Disk | None = None):
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "checkpoints"
        self.names = set(names)
        self.disk = disk or Disk()
        self.verified = {}  # {step: size, time and inode of each file} of the sets that `clean` has hashed

    # ---- reading ----

    def steps(self) -> list[int]:
        """The steps of the sets, newest first, verified or not."""
        return sorted(self._places(), reverse=True)

    def read(self, step: int) -> dict[str, bytes]:
        """{file name: bytes} of the set of `step`, every byte verified. Raises CheckpointError that says what is wrong.

        Its cause is the OSError if the system did not let us read.
        """
        return dict(self._verified_files(step))

    def verify(self, step: int) -> None:
        """Read the set of `step` to the end and keep nothing. Raises CheckpointError as `read` does."""
        collections.deque(self._verified_files(step), maxlen=0)

    def newest(self) -> tuple[int | None, dict[str, bytes] | None, list[str]]:
        """(step, files, complaints): the newest set that verifies, and why newer ones were rejected; (None, None, [])
        if there is none.

        Raises CheckpointError if there are sets and none of them verifies.
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

    # ---- writing ----

    def commit(self, step: int, files: dict[str, Callable[[], bytes]], size: int, owner: str | None = None) -> Path:
        """Write {file name: function that gives its bytes} as the set of `step`, and return its folder.

        One file is in memory at a time; `size` says about how many bytes all of them will have. The set is there as a
        whole or not at all, and no other set is lost. Raises OSError (with what is needed and what is free, if the disk
        is full) and SupersededError (the run is no longer that of `owner`); neither leaves a part of the set behind.
        """
        assert set(files) == self.names
        final = self.folder / f"step_{step:08d}"
        temporary = self._hidden("tmp", final.name)
        self.check_owner(owner)
        try:
            self._make_place()
            self._sweep()
            self._check_space(size)
            self.disk.make_folder(temporary)
            written = {name: self._write(temporary / name, content()) for name, content in files.items()}
            self._write(temporary / MANIFEST, _sealed({"format": FORMAT, "step": step, "files": written}))
            self.disk.sync_folder(temporary)
            aside = self._place_aside(final)
            self.check_owner(owner)
            if aside:
                self.disk.rename(final, aside)
            self.disk.rename(temporary, final)
            self.disk.sync_folder(self.folder)
        except BaseException as error:
            self.disk.remove(temporary)
            if isinstance(error, OSError):
                self.check_owner(owner)  # a newer process sweeps our temporary folder away: that is the true reason
            raise
        self._sweep()
        return final

    def clean(
        self, keep_last: int, keep_every: int, best_step: int, resumed_step: int | None, owner: str | None = None
    ) -> None:
        """Remove what is left of broken writes and old sets: keep the newest `keep_last`, every `keep_every`-th, the
        best, the one resumed from.

        The one resumed from may go only when two newer ones are there. Only sets that verify count as newest; one that
        the system does not let us read stays. What was verified once is not read again until a size, time or inode of
        its files has changed. Raises SupersededError as `commit` does.
        """
        self.check_owner(owner)
        self._sweep()
        known = self.steps()
        good, unreadable = [], set()
        for step in known:  # only as many are read as the rules need: the others may be many, and large
            if len(good) == max(keep_last, 2):
                break
            try:
                self._verify_once(step)
                good.append(step)
            except CheckpointError as error:
                if _may_pass(error):
                    unreadable.add(step)
        newest_good = good[: max(keep_last, 1)]
        newer = [step for step in good if resumed_step is not None and step > resumed_step]
        for step in known:
            kept = step in newest_good or step == best_step or (keep_every and step % keep_every == 0)
            if kept or step in unreadable or not newest_good or (step == resumed_step and len(newer) < 2):
                continue
            self.check_owner(owner)
            self._discard(self._places()[step])
            self.verified.pop(step, None)

    # ---- who may write ----

    def claim(self) -> str:
        """Make the run ours and return the id to write with: whoever had claimed it before can write no more."""
        owner = uuid.uuid4().hex
        temporary = self.run_dir / f".{OWNER}.{owner}.part"
        self.disk.make_folders(self.run_dir)
        try:
            self._write(temporary, json.dumps({"owner": owner}).encode())
            self.disk.rename(temporary, self.run_dir / OWNER)
            self.disk.sync_folder(self.run_dir)
        except BaseException:
            self.disk.remove(temporary)
            raise
        return owner

    def check_owner(self, owner: str | None) -> None:
        """Raise SupersededError unless the last `claim` of the run returned `owner`; None may always write.

        Raises OSError if the claim cannot be read, as when the run's folder was removed.
        """
        if owner is None:
            return
        try:
            current = json.loads(self.disk.read(self.run_dir / OWNER))
        except (ValueError, RecursionError):
            current = None
        if current != {"owner": owner}:
            raise SupersededError(
                f"another process has taken over {self.run_dir}: that newer one goes on, this one stops and saves "
                "nothing more"
            )

    # ---- parts of these ----

    def _places(self):
        """{step: name of its folder}: step_N, or what it was to replace if the writer ended between the two."""
        found = {}
        for name in sorted(self.disk.names(self.folder)):  # .old-step_N comes before step_N, which overrides it
            if match := SET_NAME.fullmatch(name):
                found[int(match["step"])] = name
        return found

    def _verified_files(self, step):
        """Yield (file name, bytes) of a set, each verified when it comes."""
        folder = self.folder / self._places().get(step, f"step_{step:08d}")
        try:
            for name, entry in self._manifest(folder, step)["files"].items():
                yield name, self._verified(folder / name, entry)
        except OSError as error:
            raise CheckpointError(f"{folder}: {type(error).__name__}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{folder}: {type(error).__name__}: {error}") from None

    def _manifest(self, folder, step):
        if self.disk.status(folder / MANIFEST)[0] > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{folder}: {MANIFEST} is larger than any of ours")
        manifest = json.loads(self.disk.read(folder / MANIFEST))
        if manifest.pop("sha256") != _hash_of(manifest):
            raise CheckpointError(f"{folder}: {MANIFEST} does not match its own hash")
        if type(manifest["format"]) is int and manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has format {manifest['format']}, and this version of nanotrain reads format {FORMAT}: use "
                "the version that wrote it, or train anew with another --run-name"
            )
        # no name comes from the manifest: it must list those that are expected, and no other
        if manifest["format"] != FORMAT or manifest["step"] != step or set(manifest["files"]) != self.names:
            raise CheckpointError(f"{folder}: {MANIFEST} is not of format {FORMAT} and step {step}")
        return manifest

    def _verified(self, path, entry):
        size = self.disk.status(path)[0]
        if size != entry["bytes"]:  # first, so that no file is read that is longer than it says
            problem = f"it has {size} bytes, not {entry['bytes']}"
            raise CheckpointError(f"{path.parent}: {path.name} does not match its hash: {problem}")
        data = self.disk.read(path)
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{path.parent}: {path.name} does not match its hash")
        return data

    def _verify_once(self, step):
        """`verify`, unless `verified` says that it was done and the files are still the same."""
        folder = self.folder / self._places()[step]
        stamp = None
        with contextlib.suppress(OSError, CheckpointError):  # verify says it better
            stamp = [self.disk.status(folder / name) for name in sorted({MANIFEST, *self.names})]
        if stamp is None or self.verified.get(step) != stamp:
            self.verify(step)
            self.verified[step] = stamp  # taken before: a change in between is noticed the next time

    def _make_place(self):
        """The folder of the sets, with a name that lasts."""
        self.disk.make_folders(self.folder)
        self.disk.sync_folder(self.run_dir)
        with contextlib.suppress(PermissionError):  # a folder that we may not list is older than this run
            self.disk.sync_folder(self.run_dir.parent)

    def _check_space(self, size):
        needed, free = int(size * NEEDED_SPACE), self.disk.free(self.folder)
        if needed > free:
            message = f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes needed, {free:,} free"
            raise OSError(errno.ENOSPC, message, str(self.folder))

    def _write(self, path, data):
        """Write a new file that lasts; returns its entry in the manifest."""
        digest = hashlib.sha256()
        with self.disk.create(path) as file:
            for start in range(0, len(data), BLOCK_BYTES):
                block = memoryview(data)[start : start + BLOCK_BYTES]
                self.disk.write(file, block)
                digest.update(block)
            self.disk.sync(file)
        return {"bytes": len(data), "sha256": digest.hexdigest()}

    def _place_aside(self, final):
        """Where to move what has the name of a new set, which cannot be replaced in one instant; None if it is free."""
        if final.name not in self.disk.names(self.folder):
            return None
        try:
            self.verify(int(SET_NAME.fullmatch(final.name)["step"]))
        except CheckpointError as error:
            if not _may_pass(error):
                return self._hidden("bad", final.name)
        return self._hidden("old", final.name)

    def _sweep(self):
        """Remove what is left of writes, and sets that were replaced; one that was not gets its name back."""
        names = self.disk.names(self.folder)
        for name in list(names):
            if name.startswith(".tmp-"):
                self.disk.remove(self.folder / name)
            elif (match := SET_NAME.fullmatch(name)) and match["old"]:
                if match["name"] in names:
                    self._discard(name)
                else:
                    self.disk.rename(self.folder / name, self.folder / match["name"])
                    names.append(match["name"])

    def _discard(self, name):
        """Remove a set; one that cannot be removed goes another time."""
        trash = self._hidden("tmp", f"trash-{name.lstrip('.')}")
        with contextlib.suppress(OSError):
            self.disk.rename(self.folder / name, trash)  # first, so that no reader meets half a set
            self.disk.sync_folder(self.folder)  # and none after a power loss
            self.disk.remove(trash)

    def _hidden(self, kind, name):
        return self.folder / f".{kind}-{name}-{uuid.uuid4().hex}"


def _may_pass(error):
    """Whether a set was not verified because the system did not let us read it, and not because it is damaged."""
    return isinstance(error.__cause__, OSError) and not isinstance(
        error.__cause__, (FileNotFoundError, NotADirectoryError)
    )


def _sealed(manifest):
    return json.dumps({**manifest, "sha256": _hash_of(manifest)}, indent=1).encode()


def _hash_of(fields):
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
