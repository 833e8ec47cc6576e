"""The commit protocol on a disk that forgets: every crash, every full disk, every rival, and the twins that fail."""

import contextlib
import copy
import errno
import hashlib
import itertools
import json
import os
from pathlib import Path

import pytest

from nanotrain import store
from nanotrain.errors import CheckpointError, SupersededError
from nanotrain.store import Disk, Store

NAMES = ("model", "optimizer", "state")
RUN = Path("/runs/r")  # on the fake disk
RESTARTS = ("kill", "names lost", "names kept", "names kept, data zero")


# ---- a disk in memory ----


class Node:
    """A file (bytes) or a folder ({name: node}): what it holds, and what of that is synced."""

    def __init__(self, holds, stamp=0):
        self.holds, self.synced, self.stamp = holds, copy.copy(holds), stamp

    def forget(self, how):
        """Lose what is not synced."""
        if isinstance(self.holds, bytes):
            zeros = how.endswith("zero") and self.holds != self.synced
            self.holds = self.synced = bytes(len(self.holds)) if zeros else self.synced
        else:
            self.holds = dict(self.synced if how == "names lost" else self.holds)
            self.synced = dict(self.holds)
            for child in self.holds.values():
                child.forget(how)


class FakeDisk(Disk):
    """What a Disk does, in memory, with what is synced told from what is not.

    It consists of steps: a write is two, for a crash in its middle, and the removal of a folder one for every name in
    it. `before_step` is called before each; the `full_at`-th of those that take space raises ENOSPC.
    """

    def __init__(self):
        self.root = Node({"runs": Node({})})
        self.before_step, self.full_at, self.taken, self.clock = None, None, 0, 0

    def step(self, takes_space=True):
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
            twin.root.forget(how)
        return twin

    def find(self, path):
        node = self.root
        for part in Path(path).parts[1:]:
            if part not in node.holds:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
            node = node.holds[part]
        return node

    def names(self, folder):
        with contextlib.suppress(OSError):
            return list(self.find(folder).holds)
        return []

    def status(self, path):
        file = self.find(path)
        return len(file.holds), file.stamp, 0

    def read(self, path):
        return self.find(path).holds

    def free(self, folder):
        return 1 << 40

    def _add(self, path, holds):
        self.step()
        self.clock += 1
        assert Path(path).name not in self.names(Path(path).parent)
        self.find(Path(path).parent).holds[Path(path).name] = node = Node(holds, self.clock)
        return node

    def make_folders(self, path):
        for folder in [*reversed(Path(path).parents[:-1]), Path(path)]:
            if folder.name not in self.names(folder.parent):
                self.make_folder(folder)

    def make_folder(self, path):
        self._add(path, {})

    def create(self, path):
        return contextlib.nullcontext(self._add(path, b""))

    def write(self, file, block):
        self.step()
        file.holds += bytes(block[: len(block) // 2])
        self.step(takes_space=False)
        file.holds += bytes(block[len(block) // 2 :])

    def sync(self, file):
        self.step()  # some file systems find out only here that they are full
        file.synced = copy.copy(file.holds)

    def sync_folder(self, path):
        self.sync(self.find(path))

    def rename(self, path, new_path):
        self.step()
        path, new_path, node = Path(path), Path(new_path), self.find(path)
        assert isinstance(node.holds, bytes) or not self.names(new_path), "a folder cannot be replaced"
        del self.find(path.parent).holds[path.name]
        self.find(new_path.parent).holds[new_path.name] = node

    def remove(self, path):
        path = Path(path)
        if path.name not in self.names(path.parent):
            return
        for name in [] if isinstance(self.find(path).holds, bytes) else self.names(path):
            self.remove(path / name)
        self.step(takes_space=False)
        del self.find(path.parent).holds[path.name]


# ---- the check ----


def content(step, version, names=NAMES):
    """{file name: function that gives its bytes}, different for every step and version."""
    return {name: lambda name=name: f"{name} of step {step}, version {version}. ".encode() * 2 for name in names}


def data(step, version, names=NAMES):
    return {name: give() for name, give in content(step, version, names).items()}


def filled(run, *steps, disk=None):
    """A store with the sets of these steps."""
    sets = Store(run, NAMES, disk)
    for step in steps:
        sets.commit(step, content(step, 0), 100)
    return sets


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
    sets.claim()
    owner = sets.claim()  # of the run that another process had claimed
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
    possible = [(None, None), *((at, data(at, version)) for at, version in HISTORY)]
    if (step, files) not in possible[reported : reported + 2]:  # what was reported last, and what was being written
        return f"{reported} saves were reported, and step {step} is there"
    if "owner.json" in disk.names(RUN) and not disk.read(RUN / "owner.json").endswith(b'"}'):
        return "the claim is half written"
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
    """([(crash point, restart, what is wrong)], number of crash points) over all crash points of a process."""
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
    cases = 0
    for disk, _ in crashes(start, lambda: commit(start, 1)):
        allowed = [(1, data(1, version, names), []) for version in (0, 1, 2)]
        assert Store(RUN, names, disk).newest() in allowed[:2]
        for after_cut, _ in crashes(disk, lambda disk=disk: commit(disk, 2)):
            for how in RESTARTS[1:]:
                assert Store(RUN, names, after_cut.restarted(how)).newest() in allowed
                cases += 1
        assert [Store(RUN, names, disk.restarted(how)).newest() for how in RESTARTS[1:]] == allowed[2:] * 3
    assert cases > 1000


# ---- twins: a protocol with one thing wrong must fail the same check ----


class NoFileSync(FakeDisk):
    def sync(self, file):
        self.step()


class NoFolderSync(FakeDisk):
    def sync_folder(self, path):
        self.step()


class NoMiddleName(Store):
    """Frees the name of a replaced set under a name that no reader knows."""

    def _hidden(self, kind, name):
        return super()._hidden("bad" if kind == "old" else kind, name)


@pytest.mark.parametrize(
    ("kind", "make", "restart"),
    [
        (FakeDisk, NoMiddleName, "kill"),
        (NoFileSync, Store, "names kept"),
        (NoFileSync, Store, "names kept, data zero"),
        (NoFolderSync, Store, "names lost"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.usefixtures("_small_blocks")
def test_p4_crash_safe_the_check_notices_a_protocol_with_one_thing_wrong(kind, make, restart):
    found, points = problems(kind(), make, [restart])
    assert len(found) >= 4
    assert points > 100


# ---- full disks ----


@pytest.mark.usefixtures("_small_blocks")
def test_p4_crash_safe_a_disk_that_is_full_at_any_write_keeps_every_older_set_and_no_part_of_the_new():
    for place in itertools.count(1):
        disk = FakeDisk()
        sets = filled(RUN, 1, 2, disk=disk)
        names = disk.names(sets.folder)
        disk.full_at = disk.taken + place
        try:
            sets.commit(3, content(3, 0), 100)
            break
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
    assert place > 15


def test_what_a_killed_save_left_makes_room_before_the_space_is_counted(tmp_path):
    leftover = tmp_path / "checkpoints" / ".tmp-step_00000001-ab"
    leftover.mkdir(parents=True)

    class Full(Disk):
        def free(self, folder):
            return 0 if leftover.exists() else 10_000

    filled(tmp_path, 1, disk=Full())


# ---- disks that fail for a while ----


class Stale(Disk):
    """Cannot read the set of step 3, for a reason that may pass, and notes the new names of what it renames."""

    def __init__(self):
        self.error, self.renamed = OSError(errno.ESTALE, "Stale file handle"), []

    def read(self, path):
        if path.parent.name == "step_00000003":
            raise self.error
        return super().read(path)

    def rename(self, path, new_path):
        self.renamed.append(new_path.name.partition("-")[0])
        super().rename(path, new_path)


def test_a_set_that_cannot_be_read_for_now_is_not_set_aside_as_bad(tmp_path):
    filled(tmp_path, 3)
    disk = Stale()
    filled(tmp_path, 3, disk=disk)
    assert ".old" in disk.renamed
    assert ".bad" not in disk.renamed


def test_a_set_that_cannot_be_read_for_now_is_not_removed(tmp_path):
    filled(tmp_path, 1, 2, 3)
    sets = Store(tmp_path, NAMES, Stale())
    sets.clean(1, 0, -1, None)
    assert sets.steps() == [3, 2]
    sets.disk.error = FileNotFoundError(errno.ENOENT, "No such file or directory")
    sets.clean(1, 0, -1, None)
    assert sets.steps() == [2]


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


@pytest.mark.parametrize("how", ["same size", "another size", "another inode", "gone"])
@pytest.mark.parametrize("name", ["model", "manifest.json"])
def test_p5_nothing_wrong_is_loaded_silently_a_set_that_changed_since_it_was_verified_counts_no_more(
    tmp_path, name, how
):
    sets = filled(tmp_path, 1, 2)
    sets.clean(2, 0, -1, None)
    path = sets.folder / "step_00000002" / name
    was, wrong = path.stat(), b"x" + path.read_bytes()[1:] + b"x" * (how == "another size")
    if how in ("another inode", "gone"):
        path.rename(tmp_path / "aside")
    if how != "gone":
        path.write_bytes(wrong)
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns + (how == "same size")))  # one of the three is enough
    sets.clean(1, 0, -1, None)
    assert sets.steps() == [1]


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


def files_in(folder):
    return json.loads((folder / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("how", ["besides", "instead"])
def test_p6_no_file_is_opened_by_a_name_from_a_manifest(tmp_path, how):
    folder = Store(tmp_path, NAMES).commit(1, content(1, 0), 100)
    files = files_in(folder)
    entry = files["model"] if how == "besides" else files.pop("model")
    for name in HOSTILE:
        seal(folder, files={**files, name: entry})
        disk = Counting()
        with pytest.raises(CheckpointError):
            Store(tmp_path, NAMES, disk).read(1)
        assert disk.reads == [("step_00000001", "manifest.json")]


def test_p5_nothing_wrong_is_loaded_silently_by_a_manifest_with_a_strange_entry(tmp_path):
    sets = filled(tmp_path, 1)
    folder, files = sets.folder / "step_00000001", files_in(sets.folder / "step_00000001")
    strange = (None, 1, "x", [], {}, {"bytes": 5}, {"sha256": 5}, {"bytes": "5", "sha256": "x"})
    for entry in (*strange, {"bytes": 1e999, "sha256": ""}):
        seal(folder, files={**files, "model": entry})
        with pytest.raises(CheckpointError, match="step_00000001"):
            sets.newest()
    seal(folder, files=files)
    assert sets.newest()[0] == 1


@pytest.mark.parametrize("name", ["model", "manifest.json"])
@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "folder", "/nowhere", "grown file"])
def test_p5_nothing_wrong_is_loaded_silently_or_without_end_from_what_is_no_file_of_ours(tmp_path, name, what):
    sets = filled(tmp_path, 1, 2)
    path = sets.folder / "step_00000002" / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "grown file":
        path.touch()
        os.truncate(path, 1 << 40)  # takes no space; reading it would take all memory
    else:
        path.symlink_to(what)
    step, _, (complaint,) = sets.newest()
    assert step == 1
    assert "step_00000002" in complaint


# ---- two processes on one run ----


def test_of_two_writers_only_the_one_that_claimed_last_commits(tmp_path):
    sets = Store(tmp_path, NAMES)
    first = sets.claim()
    sets.commit(1, content(1, 0), 100, first)
    second = sets.claim()
    assert json.loads((tmp_path / "owner.json").read_text()) == {"owner": second} != {"owner": first}
    for act in (lambda: sets.commit(2, content(2, 0), 100, first), lambda: sets.clean(1, 0, -1, None, first)):
        with pytest.raises(SupersededError, match="taken over"):
            act()
    assert os.listdir(sets.folder) == ["step_00000001"]
    sets.commit(2, content(2, 1), 100, second)
    sets.clean(1, 0, -1, None, second)
    assert sets.newest() == (2, data(2, 1), [])
    assert sets.steps() == [2]


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.usefixtures("_small_blocks")
def test_a_writer_that_is_superseded_at_any_step_before_its_rename_commits_nothing(saving):
    """A rival claims the run before each step of a commit in turn, and also saves the same step if it is `saving`."""

    def rival(disk, number):
        """For `before_step`: claims the run when it is called for the `number`-th time."""

        def step():
            nonlocal number
            number -= 1
            if number == 0:
                sets = Store(RUN, NAMES, disk)
                owner = sets.claim()
                if saving:
                    sets.commit(2, content(2, 7), 100, owner)

        return step

    start = FakeDisk()
    owner = filled(RUN, 1, disk=start).claim()
    rehearsal = start.copy()
    steps = len(crashes(rehearsal, lambda: filled(RUN, 2, disk=rehearsal))) - 1
    assert steps > 15
    for number in range(1, steps - 1):  # what is left is the rename itself, and what comes after it
        disk = start.copy()
        disk.before_step = rival(disk, number)
        with pytest.raises(SupersededError):
            Store(RUN, NAMES, disk).commit(2, content(2, 0), 100, owner)
        assert sorted(disk.names(RUN / "checkpoints")) == ["step_00000001", "step_00000002"][: 1 + saving]
        assert Store(RUN, NAMES, disk).newest()[1] == (data(2, 7) if saving else data(1, 0))


def test_a_clean_that_is_superseded_removes_nothing_more(tmp_path):
    class Late(Disk):
        def remove(self, path):
            Store(tmp_path, NAMES).claim()
            super().remove(path)

    sets = filled(tmp_path, 1, 2, 3, 4)
    with pytest.raises(SupersededError):
        Store(tmp_path, NAMES, Late()).clean(1, 0, -1, None, sets.claim())
    assert sets.steps() == [4, 2, 1]


def test_an_owner_file_that_is_not_ours_is_that_of_another(tmp_path):
    owner = Store(tmp_path, NAMES).claim()
    for strange in ("", "{", "null", '{"owner": 1}', "[" * 100_000):
        (tmp_path / "owner.json").write_text(strange)
        with pytest.raises(SupersededError):
            Store(tmp_path, NAMES).commit(1, content(1, 0), 100, owner)


def test_a_run_folder_that_was_removed_is_not_made_again_by_its_owner(tmp_path):
    run = tmp_path / "run"
    owner = Store(run, NAMES).claim()
    (run / "owner.json").unlink()
    run.rmdir()
    with pytest.raises(FileNotFoundError, match=r"owner\.json"):
        Store(run, NAMES).commit(1, content(1, 0), 100, owner)
    assert not run.exists()
