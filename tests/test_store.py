"""The commit protocol on a disk that forgets: every crash, every full disk, every rival, and the twins that fail."""

import contextlib
import copy
import errno
import functools
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from nanotrain import store
from nanotrain.errors import CheckpointError, SupersededError
from nanotrain.store import Disk, Store

NAMES = ("model", "optimizer", "state")
RUN = Path("/runs/r")  # on the fake disk
RESTARTS = ("kill", "names lost", "names kept", "names kept, data zero")


# ---- a disk in memory ----


class File:
    def __init__(self, inode):
        self.data, self.synced, self.inode, self.changed = b"", b"", inode, 0


class Folder:
    def __init__(self):
        self.names, self.synced = {}, {}


class Writing(contextlib.nullcontext):
    def __init__(self, file):
        super().__init__(self)
        self.file = file


class FakeDisk(Disk):
    """What a Disk does, in memory, with what is synced told from what is not.

    It consists of steps: a write is two, for a crash in its middle, and the removal of a folder one for every name in
    it. `before_step` is called before each; the `full_at`-th of those that take space raises ENOSPC.
    """

    def __init__(self):
        self.root = Folder()
        self.root.names["runs"] = self.root.synced["runs"] = Folder()
        self.before_step, self.full_at, self.taken, self.clock = None, None, 0, 0

    def step(self, takes_space=False):
        if self.before_step:
            self.before_step()
        self.taken += takes_space
        if takes_space and self.taken == self.full_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    def copy(self):
        twin = copy.copy(self)
        twin.root, twin.before_step = copy.deepcopy(self.root), None
        return twin

    def restarted(self, how):
        """A copy of the disk, as a process finds it after the one before it ended like this."""
        twin = self.copy()
        if how != "kill":
            twin.forget(twin.root, how)
        return twin

    def forget(self, node, how):
        if isinstance(node, File):
            node.data = bytes(len(node.data)) if how.endswith("zero") and node.data != node.synced else node.synced
            node.synced = node.data
        else:
            node.names = dict(node.synced) if how == "names lost" else node.names
            node.synced = dict(node.names)
            for child in node.names.values():
                self.forget(child, how)

    def find(self, path, kind=(File, Folder)):
        node = self.root
        for part in filter(None, os.fspath(path).split("/")):
            if not isinstance(node, Folder):
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(path))
            if part not in node.names:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
            node = node.names[part]
        if not isinstance(node, kind):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
        return node

    def names(self, folder):
        try:
            return list(self.find(folder, Folder).names)
        except OSError:
            return []

    def status(self, path):
        file = self.find(path, File)
        return len(file.data), file.changed, file.inode

    def read(self, path):
        return bytes(self.find(path, File).data)

    def free(self, folder):
        assert isinstance(self.find(folder), Folder)
        return 1 << 40

    def _add(self, path, node):
        names = self.find(Path(path).parent, Folder).names
        if Path(path).name in names:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        names[Path(path).name] = node
        return node

    def make_folders(self, path):
        for folder in [*reversed(Path(path).parents[:-1]), Path(path)]:
            if folder.name not in self.names(folder.parent):
                self.make_folder(folder)

    def make_folder(self, path):
        self.step(takes_space=True)
        self._add(path, Folder())

    def create(self, path):
        self.step(takes_space=True)
        self.clock += 1
        return Writing(self._add(path, File(self.clock)))

    def write(self, file, block):
        self.step(takes_space=True)
        file.file.data += bytes(block[: len(block) // 2])
        self.step()
        file.file.data += bytes(block[len(block) // 2 :])
        self.clock += 1
        file.file.changed = self.clock

    def sync(self, file):
        self.step(takes_space=True)  # some file systems find out only here
        file.file.synced = file.file.data

    def sync_folder(self, path):
        self.step(takes_space=True)
        folder = self.find(path, Folder)
        folder.synced = dict(folder.names)

    def rename(self, path, new_path):
        self.step(takes_space=True)
        node = self.find(path)
        target = self.find(Path(new_path).parent, Folder).names
        present = target.get(Path(new_path).name)
        assert present is None or isinstance(present, File) or not present.names, "a folder cannot be replaced"
        del self.find(Path(path).parent, Folder).names[Path(path).name]
        target[Path(new_path).name] = node

    def remove(self, path):
        try:
            node = self.find(path)
        except FileNotFoundError:
            return
        for name in list(node.names) if isinstance(node, Folder) else []:
            self.remove(Path(path) / name)
        self.step()
        del self.find(Path(path).parent, Folder).names[Path(path).name]


def test_the_fake_disk_forgets_what_it_should():
    def write(disk, path, data, sync):
        file = disk.create(path)
        disk.write(file, memoryview(data))
        if sync:
            disk.sync(file)

    def written():
        disk = FakeDisk()
        for name, sync_file, sync_folder in (("kept", True, True), ("data", False, True), ("name", True, False)):
            disk.make_folder(f"/runs/{name}")
            write(disk, f"/runs/{name}/file", b"abcd", sync_file)
            disk.sync_folder("/runs")
            if sync_folder:
                disk.sync_folder(f"/runs/{name}")
        return disk

    def contents(disk):
        return {name: [disk.read(f"/runs/{name}/file") for _ in disk.names(f"/runs/{name}")] for name in names}

    names = ("kept", "data", "name")
    whole, empty, zero = [b"abcd"], [b""], [bytes(4)]
    for how, after in (
        ("kill", (whole, whole, whole)),
        ("names lost", (whole, empty, [])),
        ("names kept", (whole, empty, whole)),
        ("names kept, data zero", (whole, zero, whole)),
    ):
        assert contents(written().restarted(how)) == dict(zip(names, after, strict=True))


# ---- the check ----


def content(step, version, names=NAMES):
    """{file name: function that gives its bytes}, different for every step and version."""
    return {name: lambda name=name: f"{name} of step {step}, version {version}. ".encode() * 2 for name in names}


def data(step, version, names=NAMES):
    return {name: give() for name, give in content(step, version, names).items()}


def crashes(disk, act, reported=()):
    """[(copy of the disk, how much was `reported`)] before every step of act() and after the last."""
    found = []
    disk.before_step = lambda: found.append((disk.copy(), len(reported)))
    act()
    disk.before_step()
    return found


HISTORY = ((1, 0), (2, 0), (2, 1), (3, 0))  # (step, version) of the saves of a run


def live(disk, reported, make=Store):
    """A process that saves and cleans as a run does; appends to `reported` what it was told is saved."""
    sets = make(RUN, NAMES, disk)
    owner = sets.claim()
    for step, version in HISTORY:
        sets.commit(step, content(step, version), 100, owner)
        reported.append((step, version))
        sets.clean(1, 0, -1, 1, owner)


def problem_with(disk, reported, make=Store):
    """What is wrong with the disk as the next process finds it when so many saves were reported, or None."""
    sets = make(RUN, NAMES, disk)
    try:
        step, files, complaints = sets.newest()
    except CheckpointError as error:
        return f"none is left: {error}"
    if complaints:
        return f"a part of a set has the name of one: {complaints}"
    for name in disk.names(sets.folder):
        there = disk.names(sets.folder / name)
        if "manifest.json" in there and not name.startswith(".tmp-trash"):
            with contextlib.suppress(ValueError):  # half a manifest
                if not set(json.loads(disk.read(sets.folder / name / "manifest.json"))["files"]) <= set(there):
                    return f"{name} has a manifest before it has all files"
    possible = [(None, None), *((at, data(at, version)) for at, version in HISTORY)]
    if (step, files) not in possible[reported : reported + 2]:  # what was reported last, and what was being written
        return f"{reported} saves were reported, and step {step} is there"
    following = (step or 0) + 1
    owner = sets.claim()
    sets.commit(following, content(following, 9), 100, owner)
    sets.clean(2, 0, -1, step, owner)
    if sets.newest() != (following, data(following, 9), []):
        return "the save after it is not there"
    if (step or following) not in sets.steps() or [name for name in disk.names(sets.folder) if name.startswith(".")]:
        return f"the clean after it left {disk.names(sets.folder)}"
    return None


def problems(disk, make=Store, restarts=RESTARTS):
    """[(crash point, restart, what is wrong)] over all crash points of a process, and how many there were to find."""
    reported = []
    points = crashes(disk, lambda: live(disk, reported, make), reported)
    found = [
        (at, how, problem)
        for at, (left, count) in enumerate(points)
        for how in restarts
        if (problem := problem_with(left.restarted(how), count, make))
    ]
    return found, len(points)


@pytest.fixture
def _small_blocks(monkeypatch):
    """So that a manifest is written in several steps."""
    monkeypatch.setattr(store, "BLOCK_BYTES", 300)


@pytest.mark.usefixtures("_small_blocks")
def test_p4_crash_safe_at_every_operation_of_a_run_by_a_kill_or_a_power_loss():
    found, points = problems(FakeDisk())
    assert found == []
    assert points > 100


def test_p4_crash_safe_when_the_process_that_goes_on_after_a_kill_loses_power_too():
    """A kill at every operation of a save that replaces a set, then a power loss at every operation of the next."""
    names = ["model"]

    def commit(disk, version):
        Store(RUN, names, disk).commit(1, content(1, version, names), 100)

    start = FakeDisk()
    commit(start, 0)
    killed = crashes(start, lambda: commit(start, 1))
    cases = 0
    for after_kill, _ in killed:
        disk = after_kill.copy()
        allowed = [(1, data(1, version, names), []) for version in (0, 1, 2)]
        assert Store(RUN, names, disk).newest() in allowed[:2]
        for after_cut, _ in crashes(disk, lambda disk=disk: commit(disk, 2)):
            for how in RESTARTS[1:]:
                assert Store(RUN, names, after_cut.restarted(how)).newest() in allowed
                cases += 1
        for how in RESTARTS[1:]:
            assert Store(RUN, names, disk.restarted(how)).newest() == allowed[2]
    assert cases > 1000


# ---- twins: a protocol with one thing wrong must fail the same check ----


class NoFileSync(FakeDisk):
    def sync(self, file):
        self.step()


class NoFolderSync(FakeDisk):
    def sync_folder(self, path):
        self.step()


class NoSyncOfTheParents(FakeDisk):
    def sync_folder(self, path):
        if Path(path).name.startswith((".tmp", "checkpoints")):
            super().sync_folder(path)


class InPlace(FakeDisk):
    """Writes where the set will be, over what is there."""

    def place(self, path):
        parts = [part.split("-")[1] if part.startswith(".tmp-step") else part for part in Path(path).parts]
        return Path(*parts)

    def make_folder(self, path):
        with contextlib.suppress(FileExistsError):
            super().make_folder(self.place(path))

    def create(self, path):
        self.step()
        file = self.find(self.place(path).parent, Folder).names.setdefault(Path(path).name, File(self.clock))
        file.data = b""
        return Writing(file)

    def sync_folder(self, path):
        super().sync_folder(self.place(path))

    def rename(self, path, new_path):
        if self.place(path) == path and not Path(new_path).name.startswith((".old", ".bad")):
            super().rename(path, new_path)


class ManifestFirst(FakeDisk):
    """Holds the files of a set back until its manifest is there."""

    def __init__(self):
        super().__init__()
        self.waiting = {}

    def create(self, path):
        if path.name in NAMES:
            return contextlib.nullcontext(self.waiting.setdefault(path, []))
        return super().create(path)

    def write(self, file, block):
        if isinstance(file, list):
            file.append(bytes(block))
        else:
            super().write(file, block)

    def sync(self, file):
        if isinstance(file, list):
            return
        super().sync(file)
        while self.waiting:
            path, blocks = self.waiting.popitem()
            late = super().create(path)
            super().write(late, b"".join(blocks))
            super().sync(late)


class NoMiddleName(Store):
    """Frees the name of a replaced set under a name that no reader knows."""

    def _hidden(self, kind, name):
        return super()._hidden("bad" if kind == "old" else kind, name)


class EarlyClean(Store):
    """Removes the older sets before the new one is written."""

    def commit(self, step, *arguments):
        for older in self.steps():
            self._discard(self._places()[older])
        return super().commit(step, *arguments)


@pytest.mark.parametrize(
    ("kind", "make", "restart"),
    [
        (InPlace, Store, "kill"),
        (ManifestFirst, Store, "kill"),
        (FakeDisk, NoMiddleName, "kill"),
        (FakeDisk, EarlyClean, "kill"),
        (NoFileSync, Store, "names kept"),
        (NoFileSync, Store, "names kept, data zero"),
        (NoFolderSync, Store, "names lost"),
        (NoSyncOfTheParents, Store, "names lost"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.usefixtures("_small_blocks")
def test_p4_crash_safe_the_check_notices_a_protocol_with_one_thing_wrong(kind, make, restart):
    found, points = problems(kind(), make, [restart])
    assert len(found) >= 4
    assert points > 100


# ---- a real process, really killed ----

WRITER = """
import sys
from nanotrain.store import Store
sets = Store(sys.argv[1], ["a", "b"])
assert "torch" not in sys.modules
step = max(sets.steps(), default=0)
owner = sets.claim()
while True:
    step += 1
    sets.commit(step, {name: lambda name=name: f"{name}{step}".encode() * 100_000 for name in "ab"}, 1, owner)
    print(step, flush=True)
    sets.clean(2, 0, -1, None, owner)
"""


def test_p4_crash_safe_a_writer_killed_five_times_loses_nothing_that_it_reported(tmp_path):
    last = 0
    for kill in range(5):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            for _ in range(2):
                line = writer.stdout.readline()
            time.sleep(kill / 500)  # to stop it elsewhere each time
            writer.send_signal(signal.SIGKILL)
            reported = [int(line) for line in [line, *writer.stdout]][-1]
        assert writer.returncode == -signal.SIGKILL
        step, files, complaints = Store(tmp_path, ["a", "b"]).newest()
        assert step in (reported, reported + 1)
        assert complaints == []
        assert files == {name: f"{name}{step}".encode() * 100_000 for name in "ab"}
        assert step > last
        last = step
    sets = Store(tmp_path, ["a", "b"])
    sets.commit(last + 1, {"a": lambda: b"", "b": lambda: b""}, 0)
    sets.clean(1, 0, -1, None)
    assert os.listdir(sets.folder) == [f"step_{last + 1:08d}"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "owner.json"]


# ---- full disks ----


@pytest.mark.usefixtures("_small_blocks")
def test_p4_crash_safe_a_disk_that_is_full_at_any_write_keeps_every_older_set_and_no_part_of_the_new():
    places, failed = 0, True
    while failed:
        disk = FakeDisk()
        sets = Store(RUN, NAMES, disk)
        sets.commit(1, content(1, 0), 100)
        sets.commit(2, content(2, 0), 100)
        names = disk.names(sets.folder)
        disk.full_at = disk.taken + places + 1
        try:
            sets.commit(3, content(3, 0), 100)
            failed = False
        except OSError:
            if disk.names(sets.folder) == names:
                assert sets.newest() == (2, data(2, 0), [])
            else:  # only the last sync found the disk full
                assert disk.names(sets.folder) == [*names, "step_00000003"]
                assert sets.newest() == (3, data(3, 0), [])
            assert sets.read(1) == data(1, 0)
        disk.full_at = None
        sets.commit(3, content(3, 0), 100)
        assert sets.newest() == (3, data(3, 0), [])
        assert sorted(disk.names(sets.folder)) == [f"step_0000000{step}" for step in (1, 2, 3)]
        places += 1
    assert places > 15


def test_too_little_space_is_found_before_anything_is_written_and_told_with_numbers(tmp_path):
    class Small(Disk):
        def free(self, folder):
            return 1099

        def make_folder(self, path):
            raise AssertionError("began to write")

    with pytest.raises(OSError, match="1,100 bytes needed, 1,099 free") as caught:
        Store(tmp_path, NAMES, Small()).commit(1, content(1, 0), 1000)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "checkpoints")
    Store(tmp_path, NAMES, Disk()).commit(1, content(1, 0), 1000)


def test_what_a_killed_save_left_makes_room_before_the_space_is_counted(tmp_path):
    leftover = tmp_path / "checkpoints" / ".tmp-step_00000001-ab"
    leftover.mkdir(parents=True)

    class Full(Disk):
        def free(self, folder):
            return 0 if leftover.exists() else 10_000

    Store(tmp_path, NAMES, Full()).commit(1, content(1, 0), 1000)


def test_one_file_is_in_memory_at_a_time(tmp_path):
    alive = []

    class Content(bytearray):
        def __init__(self, size):
            super().__init__(size)
            alive.append(size)

        def __del__(self):
            alive.pop()

    counts = []

    def give():
        counts.append(len(alive))
        return Content(1000)

    Store(tmp_path, NAMES).commit(1, dict.fromkeys(NAMES, give), 3000)
    assert counts == [0, 0, 0]


# ---- the same step again ----


def test_the_same_step_again_replaces_the_set_and_leaves_nothing_else(tmp_path):
    sets = Store(tmp_path, NAMES)
    for version in (0, 0, 1):
        sets.commit(4, content(4, version), 100)
        assert sets.newest() == (4, data(4, version), [])
        assert os.listdir(sets.folder) == ["step_00000004"]


def test_a_set_that_cannot_be_read_for_now_is_not_set_aside_as_bad(tmp_path):
    Store(tmp_path, NAMES).commit(4, content(4, 0), 100)
    renamed = []

    class Stale(Disk):
        def read(self, path):
            raise OSError(errno.EIO, "Input/output error", str(path))

        def rename(self, path, new_path):
            renamed.append(new_path.name)
            super().rename(path, new_path)

    Store(tmp_path, NAMES, Stale()).commit(4, content(4, 1), 100)
    assert [name for name in renamed if name.startswith(".bad")] == []
    assert [name for name in renamed if name.startswith(".old-step_00000004-")] != []


def test_a_set_whose_replacement_was_cut_short_counts_and_gets_its_name_back(tmp_path):
    sets = Store(tmp_path, NAMES)
    folder = sets.commit(4, content(4, 0), 100)
    for version in (1, 2):  # no crash leaves two of them
        folder.rename(folder.with_name(f".old-step_00000004-{version:032x}"))
        assert sets.newest() == (4, data(4, version - 1), [])
        folder = sets.commit(5, content(4, version), 100) if version == 2 else sets.commit(4, content(4, 1), 100)
    assert sets.steps() == [5, 4]
    assert sorted(os.listdir(sets.folder)) == ["step_00000004", "step_00000005"]


# ---- retention ----


class Counting(Disk):
    """Counts the files that are read."""

    def __init__(self):
        self.reads = []

    def read(self, path):
        self.reads.append((path.parent.name, path.name))
        return super().read(path)


def test_a_set_is_read_once_by_a_process_that_cleans_often(tmp_path):
    disk = Counting()
    sets = Store(tmp_path, NAMES, disk)
    for step in range(1, 6):
        sets.commit(step, content(step, 0), 100)
        sets.clean(2, 0, -1, None)
    once = {(f"step_{step:08d}", name) for step in range(1, 6) for name in (*NAMES, "manifest.json")}
    assert sorted(disk.reads) == sorted(once)
    assert set(sets.verified) == {4, 5}
    Store(tmp_path, NAMES, disk).clean(2, 0, -1, None)
    assert len(disk.reads) == len(once) + 8  # another store reads both again


@pytest.mark.parametrize("how", ["same size", "another size", "another inode", "gone"])
@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
def test_p5_nothing_wrong_is_loaded_silently_a_set_that_changed_since_it_was_verified_counts_no_more(
    tmp_path, name, how
):
    sets = Store(tmp_path, NAMES)
    for step in (1, 2):
        sets.commit(step, content(step, 0), 100)
    sets.clean(2, 0, -1, None)
    path = sets.folder / "step_00000002" / name
    was = path.stat()
    wrong = b"x" + path.read_bytes()[1:]
    if how == "another inode":
        path.rename(path.with_name("aside"))
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(wrong + b"x" * (how == "another size"))
        if how != "same size":  # one of the three is enough
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
        else:
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    sets.clean(1, 0, -1, None)
    assert sets.steps() == [1]


def test_a_set_that_cannot_be_read_for_now_is_not_removed(tmp_path):
    for step in (1, 2, 3):
        Store(tmp_path, NAMES).commit(step, content(step, 0), 100)

    class Stale(Disk):
        error = OSError(errno.ESTALE, "Stale file handle")

        def read(self, path):
            if path.parent.name == "step_00000003":
                raise self.error
            return super().read(path)

    Store(tmp_path, NAMES, Stale()).clean(1, 0, -1, None)
    assert Store(tmp_path, NAMES).steps() == [3, 2]
    Stale.error = FileNotFoundError(errno.ENOENT, "No such file or directory")
    Store(tmp_path, NAMES, Stale()).clean(1, 0, -1, None)
    assert Store(tmp_path, NAMES).steps() == [2]


def test_a_set_that_cannot_be_removed_ends_no_run(tmp_path):
    class Stuck(Disk):
        def rename(self, path, new_path):
            if "trash" in new_path.name:
                raise OSError(errno.EBUSY, "Device or resource busy")
            super().rename(path, new_path)

    sets = Store(tmp_path, NAMES, Stuck())
    for step in (1, 2):
        sets.commit(step, content(step, 0), 100)
    sets.clean(1, 0, -1, None)
    assert sets.steps() == [2, 1]


# ---- hostile sets ----

HOSTILE = (
    *("../model", "/etc/passwd", "..", ".", "", "a/../model", "model\0", "C:\\x", "\\\\host\\x", "model/", "．．/x"),
    *("x" * 5000, "con", "manifest.json", "\ud800"),
)


def seal(folder, **changes):
    """Give a set a manifest that is right in itself, with these fields."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest = {**{key: value for key, value in manifest.items() if key != "sha256"}, **changes}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
@pytest.mark.parametrize("how", ["besides", "instead"])
def test_p6_no_file_is_opened_by_a_name_from_a_manifest(tmp_path, name, how):
    folder = Store(tmp_path, NAMES).commit(1, content(1, 0), 100)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    entry = files["model"] if how == "besides" else files.pop("model")
    seal(folder, files={**files, name: entry})
    disk = Counting()
    with pytest.raises(CheckpointError, match="format 2 and step 1"):
        Store(tmp_path, NAMES, disk).read(1)
    assert disk.reads == [("step_00000001", "manifest.json")]


@pytest.mark.parametrize(
    "entry",
    [None, 1, "x", [], {}, {"bytes": 5}, {"sha256": 5}, {"bytes": "5", "sha256": "x"}, {"bytes": 1e999, "sha256": ""}],
    ids=str,
)
def test_p5_nothing_wrong_is_loaded_silently_by_a_manifest_with_a_strange_entry(tmp_path, entry):
    folder = Store(tmp_path, NAMES).commit(1, content(1, 0), 100)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    seal(folder, files={**files, "model": entry})
    with pytest.raises(CheckpointError, match="step_00000001"):
        Store(tmp_path, NAMES).newest()
    seal(folder, files=files)
    assert Store(tmp_path, NAMES).newest()[0] == 1


@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
@pytest.mark.parametrize("what", ["pipe", "device", "folder", "dangling link", "grown file"])
def test_p5_nothing_wrong_is_loaded_silently_or_without_end_from_what_is_no_file_of_ours(tmp_path, name, what):
    Store(tmp_path, NAMES).commit(1, content(1, 0), 100)
    path = Store(tmp_path, NAMES).commit(2, content(2, 0), 100) / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "grown file":
        with open(path, "wb") as file:
            file.truncate(1 << 40)  # takes no space; reading it would take all memory
    else:
        path.symlink_to("/dev/zero" if what == "device" else tmp_path / "nowhere")
    step, _, (complaint,) = Store(tmp_path, NAMES).newest()
    assert step == 1
    assert "step_00000002" in complaint


def test_other_digits_do_not_name_a_set(tmp_path):
    sets = Store(tmp_path, NAMES)
    sets.commit(1, content(1, 0), 100)
    for name in ("step_0000000٢", "step_00000003\n", ".old-step_00000004", ".old-step_00000005-zz"):
        (sets.folder / name).mkdir()
    assert sets.steps() == [1]


# ---- two processes on one run ----


def test_of_two_writers_only_the_one_that_claimed_last_commits(tmp_path):
    sets = Store(tmp_path, NAMES)
    first = sets.claim()
    sets.commit(1, content(1, 0), 100, first)
    second = sets.claim()
    assert first != second
    assert json.loads((tmp_path / "owner.json").read_text()) == {"owner": second}
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "owner.json"]
    for act in (lambda: sets.commit(2, content(2, 0), 100, first), lambda: sets.clean(1, 0, -1, None, first)):
        with pytest.raises(SupersededError, match=r"taken over .*newer one goes on, this one stops and saves nothing"):
            act()
    assert os.listdir(sets.folder) == ["step_00000001"]
    sets.commit(2, content(2, 1), 100, second)
    sets.clean(1, 0, -1, None, second)
    assert sets.newest() == (2, data(2, 1), [])
    assert sets.steps() == [2]


class CareFree(Store):
    """Looks only once who may write."""

    def check_owner(self, owner):
        if not getattr(self, "asked", False):
            super().check_owner(owner)
        self.asked = True


def rivalries(make, saving):
    """[(whether a commit was superseded, names after it, newest files)] with a rival that claims the run before each
    step of it in turn, and also saves the same step if it is `saving`.
    """

    def rival():  # on the disk of this case
        disk.before_step = None
        owner = Store(RUN, NAMES, disk).claim()
        if saving:
            Store(RUN, NAMES, disk).commit(2, content(2, 7), 100, owner)

    start = FakeDisk()
    owner = Store(RUN, NAMES, start).claim()
    Store(RUN, NAMES, start).commit(1, content(1, 0), 100, owner)
    rehearsal = start.copy()
    found = []
    for number in range(len(crashes(rehearsal, lambda: make(RUN, NAMES, rehearsal).commit(2, content(2, 0), 100))) - 1):
        disk = start.copy()
        disk.before_step = functools.partial(lambda steps: None if next(steps) else rival(), itertools.count(-number))
        superseded = False
        try:
            make(RUN, NAMES, disk).commit(2, content(2, 0), 100, owner)
        except SupersededError:
            superseded = True
        found.append((superseded, sorted(disk.names(RUN / "checkpoints")), Store(RUN, NAMES, disk).newest()[1]))
    return found


@pytest.mark.usefixtures("_small_blocks")
def test_a_writer_that_is_superseded_at_any_step_before_its_rename_commits_nothing():
    cases = rivalries(Store, saving=False)
    stopped = [case for case in cases if case[0]]
    assert stopped == cases[: len(stopped)]  # what is left is the rename itself, and what comes after it
    assert len(cases) - len(stopped) == 2
    assert all(case == (True, ["step_00000001"], data(1, 0)) for case in stopped)
    assert len(stopped) > 15


@pytest.mark.usefixtures("_small_blocks")
def test_a_rival_that_saves_the_same_step_meanwhile_keeps_it():
    cases = rivalries(Store, saving=True)
    for superseded, names, files in cases[:-2]:
        assert (superseded, names, files) == (True, ["step_00000001", "step_00000002"], data(2, 7))
    assert len(cases) > 15


@pytest.mark.usefixtures("_small_blocks")
def test_the_check_of_rivals_notices_a_writer_that_asks_only_at_its_start():
    assert [case for case in rivalries(CareFree, saving=False) if not case[0]][5:] != []


def test_a_clean_that_is_superseded_removes_nothing_more(tmp_path):
    for step in (1, 2, 3, 4):
        Store(tmp_path, NAMES).commit(step, content(step, 0), 100)
    owner = Store(tmp_path, NAMES).claim()

    class Late(Disk):
        def remove(self, path):
            Store(tmp_path, NAMES).claim()
            super().remove(path)

    with pytest.raises(SupersededError):
        Store(tmp_path, NAMES, Late()).clean(1, 0, -1, None, owner)
    assert Store(tmp_path, NAMES).steps() == [4, 2, 1]


@pytest.mark.parametrize("content_of_owner", ["", "{", "null", '{"owner": 1}', "[" * 100_000])
def test_an_owner_file_that_is_not_ours_is_that_of_another(tmp_path, content_of_owner):
    owner = Store(tmp_path, NAMES).claim()
    (tmp_path / "owner.json").write_text(content_of_owner)
    with pytest.raises(SupersededError):
        Store(tmp_path, NAMES).commit(1, content(1, 0), 100, owner)


def test_a_run_folder_that_was_removed_is_not_made_again_by_its_owner(tmp_path):
    run = tmp_path / "run"
    owner = Store(run, NAMES).claim()
    (run / "owner.json").unlink()
    run.rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        Store(run, NAMES).commit(1, content(1, 0), 100, owner)
    assert caught.value.filename == str(run / "owner.json")
    assert not run.exists()


def test_p4_crash_safe_a_claim_that_is_cut_short_leaves_the_old_owner_or_the_new():
    disk = FakeDisk()
    owners = [Store(RUN, NAMES, disk).claim()]
    disk.sync_folder("/runs")
    points = crashes(disk, lambda: owners.append(Store(RUN, NAMES, disk).claim()))
    found = {
        (count, how): json.loads(left.restarted(how).read(RUN / "owner.json"))["owner"]
        for count, (left, _) in enumerate(points)
        for how in RESTARTS
    }
    assert set(found.values()) == set(owners)
    assert {found[len(points) - 1, how] for how in RESTARTS} == {owners[1]}
