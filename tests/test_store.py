"""The commit protocol on a disk that forgets: every crash, every full disk, every rival, and twins that must fail."""

import copy
import errno
import hashlib
import itertools
import json
import os
import stat
from pathlib import Path

import pytest

from nanotrain.errors import CheckpointError, RunError
from nanotrain.store import Disk, Store

NAMES = ("model", "optimizer", "state")
RUN = Path("/runs/r")  # on the fake disk
RESTARTS = ("kill", "names lost", "names kept", "names kept, data zero")


# ---- a disk in memory ----


class Node:
    """A file (bytes) or a folder ({name: node}): what it holds, and what of that is synced."""

    def __init__(self, holds):
        self.holds, self.synced = holds, copy.copy(holds)

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

    It consists of steps: a write is four, for a crash between them, and the removal of a folder one for every name in
    it. `before_step` is called before each; the `full_at`-th of those that take space raises ENOSPC.
    """

    syncs_files = syncs_folders = True

    def __init__(self):
        self.root = Node({"runs": Node({})})
        self.before_step, self.full_at, self.taken = None, None, 0

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
        for part in path.parts[1:]:
            if part not in node.holds:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
            node = node.holds[part]
        return node

    def names(self, folder):
        try:
            return list(self.find(folder).holds)
        except FileNotFoundError:
            return []

    def read(self, path, max_bytes):
        assert len(self.find(path).holds) <= max_bytes
        return self.find(path).holds

    def _add(self, path, holds):
        self.step()
        assert path.name not in self.names(path.parent)
        self.find(path.parent).holds[path.name] = node = Node(holds)
        return node

    def make_folder(self, path):
        for folder in [*reversed(path.parents[:-1]), path]:
            if folder.name not in self.names(folder.parent):
                self._add(folder, {})

    def write(self, path, data):
        file = self._add(path, b"")
        self.step()
        file.holds = data[: len(data) // 2]
        self.step(takes_space=False)
        file.holds = data
        self.step()  # some file systems find out only here that they are full
        if self.syncs_files:
            file.synced = data

    def sync_folder(self, path):
        self.step()
        if self.syncs_folders:
            self.find(path).synced = dict(self.find(path).holds)

    def lock(self, path):
        pass

    def rename(self, path, new_path):
        self.step()
        node = self.find(path)
        assert isinstance(node.holds, bytes) or not self.names(new_path), "a folder cannot be replaced"
        del self.find(path.parent).holds[path.name]
        self.find(new_path.parent).holds[new_path.name] = node

    def remove(self, path):
        for name in self.names(path):
            self.step(takes_space=False)
            del self.find(path).holds[name]
        if path.name in self.names(path.parent):
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
        sets.commit(step, content(step, 0))
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
        sets.commit(step, content(step, version), owner)
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
    if "owner.json" in disk.names(RUN) and not disk.read(RUN / "owner.json", 99).endswith(b'"'):
        return "the claim is half written"
    following = (step or 0) + 1
    owner = sets.claim()
    sets.commit(following, content(following, 9), owner)
    sets.clean(2, 0, -1, step, owner)
    if sets.newest() != (following, data(following, 9), []):
        return "the save after it is not there"
    if (step or following) not in sets.steps() or len(disk.names(sets.folder)) > len(sets.steps()):
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


def test_p4_crash_safe_at_every_operation_of_a_run_by_a_kill_or_a_power_loss():
    found, points = problems(FakeDisk())
    assert found == []
    assert points > 100


def test_p4_crash_safe_when_the_process_that_goes_on_after_a_kill_loses_power_too():
    """A kill at every operation of a save that replaces a set, then a power loss at every operation of the next."""

    def commit(disk, version):
        Store(RUN, NAMES[:1], disk).commit(1, content(1, version, NAMES[:1]))

    start = FakeDisk()
    commit(start, 0)
    cases = 0
    for disk, _ in crashes(start, lambda: commit(start, 1)):
        allowed = [(1, data(1, version, NAMES[:1]), []) for version in (0, 1, 2)]
        assert Store(RUN, NAMES[:1], disk).newest() in allowed[:2]
        for after_cut, _ in crashes(disk, lambda disk=disk: commit(disk, 2)):
            for how in RESTARTS[1:]:
                assert Store(RUN, NAMES[:1], after_cut.restarted(how)).newest() in allowed
                cases += 1
        assert [Store(RUN, NAMES[:1], disk.restarted(how)).newest() for how in RESTARTS[1:]] == allowed[2:] * 3
    assert cases > 1000


# ---- twins: a protocol with one thing wrong must fail the same check ----


class NoMiddleName(Store):
    """Frees the name of a replaced set under a name that no reader knows."""

    def _hidden(self, kind, name):
        return super()._hidden("bad" if kind == "old" else kind, name)


@pytest.mark.parametrize(
    ("make", "synced", "restart"),
    [
        (NoMiddleName, {}, "kill"),
        (Store, {"syncs_files": False}, "names kept, data zero"),
        (Store, {"syncs_folders": False}, "names lost"),
    ],
)
def test_p4_crash_safe_the_check_notices_a_protocol_with_one_thing_wrong(make, synced, restart):
    disk = FakeDisk()
    vars(disk).update(synced)
    assert len(problems(disk, make, [restart])[0]) >= 4


# ---- full disks ----


def test_p4_crash_safe_a_disk_that_is_full_at_any_write_keeps_every_older_set_and_no_part_of_the_new():
    for place in itertools.count(1):
        disk = FakeDisk()
        sets = filled(RUN, 1, 2, disk=disk)
        disk.full_at = disk.taken + place
        try:
            sets.commit(3, content(3, 0))
            break
        except OSError:
            there = sets.steps()
            assert len(disk.names(sets.folder)) == len(there)
            assert there in ([2, 1], [3, 2, 1])  # the latter if only the last sync found the disk full
            assert [sets.read(step) for step in there] == [data(step, 0) for step in there]
        disk.full_at = None
        sets.commit(3, content(3, 0))
        assert sets.newest() == (3, data(3, 0), [])
    assert place > 15


class Stale(Disk):
    """Cannot read the set of step 3, for a reason that may pass."""

    def read(self, path, max_bytes):
        if path.parent.name == "step_00000003":
            raise OSError(errno.ESTALE, "Stale file handle")
        return super().read(path, max_bytes)


def test_a_set_that_cannot_be_read_for_now_is_not_removed(tmp_path):
    filled(tmp_path, 1, 2, 3)
    Store(tmp_path, NAMES, Stale()).clean(1, 0, -1, None)
    assert Store(tmp_path, NAMES).newest() == (3, data(3, 0), [])
    assert Store(tmp_path, NAMES).steps() == [3, 2]


# ---- retention ----


class Counting(Disk):
    """Counts the files that are read."""

    def __init__(self):
        self.reads = []

    def read(self, path, max_bytes):
        self.reads.append((path.parent.name, path.name))
        return super().read(path, max_bytes)


# ---- hostile sets ----


def seal(folder, **changes):
    """Give a set a manifest that is right in itself, with these fields."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest = {**{key: value for key, value in manifest.items() if key != "sha256"}, **changes}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))


def test_p5_p6_nothing_wrong_is_loaded_silently_from_a_manifest_of_another_kind_and_no_file_by_its_names(tmp_path):
    folder = Store(tmp_path, NAMES).commit(1, content(1, 0))
    files = json.loads((folder / "manifest.json").read_text())["files"]
    others = {name: entry for name, entry in files.items() if name != "model"}
    entries = (None, 1, "x", {}, {"bytes": 5}, {"bytes": "5", "sha256": "x"}, {"bytes": 1e999, "sha256": ""})
    names = ("../model", "/etc/passwd", "..", "", "a/../model", "model\0", "manifest.json", "x" * 5000, "\ud800")
    strange = [{"files": {**files, "model": entry}} for entry in entries]
    strange += [{"files": {**kept, name: files["model"]}} for name in names for kept in (files, others)]
    for changes in (*strange, {"files": {}}, {"format": 1}, {"format": "2"}, {"step": 2}):
        seal(folder, **{"format": 2, "step": 1, "files": files, **changes})
        disk = Counting()
        with pytest.raises(CheckpointError, match="step_00000001"):
            Store(tmp_path, NAMES, disk).newest()
        assert set(disk.reads) <= {("step_00000001", name) for name in ("manifest.json", "model")}
    seal(folder, format=2, step=1, files=files)
    assert Store(tmp_path, NAMES).newest()[0] == 1
    for text in ("null", "[]", "{}", '{"sha256": 1}', "[" * 100_000):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match="step_00000001"):
            Store(tmp_path, NAMES).newest()


def grow(path):
    path.touch()
    os.truncate(path, 1 << 40)  # takes no space; reading it would take all memory


@pytest.mark.parametrize("name", ["model", "manifest.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, grow, lambda path: path.symlink_to("/dev/zero")])
def test_p5_nothing_wrong_is_loaded_silently_or_without_end_from_what_is_no_file_of_ours(tmp_path, name, make):
    path = filled(tmp_path, 1, 2).folder / "step_00000002" / name
    path.unlink()
    make(path)
    step, _, (complaint,) = Store(tmp_path, NAMES).newest()
    assert step == 1
    assert "step_00000002" in complaint


# ---- two processes on one run ----


def test_of_two_writers_only_the_one_that_claimed_last_commits_and_cleans(tmp_path):
    sets = filled(tmp_path, 1, 2)
    first, second = sets.claim(), sets.claim()
    assert json.loads((tmp_path / "owner.json").read_text()) == second
    for act in (lambda: sets.commit(3, content(3, 0), first), lambda: sets.clean(1, 0, -1, None, first)):
        with pytest.raises(RunError, match="taken over"):
            act()
    assert sorted(os.listdir(sets.folder)) == ["step_00000001", "step_00000002"]
    sets.commit(3, content(3, 1), second)
    sets.clean(1, 0, -1, None, second)
    assert sets.steps() == [3]


def test_a_writer_that_is_superseded_at_any_step_before_its_rename_commits_nothing():
    """A rival claims the run and saves the same step before each step of a commit in turn."""
    start = FakeDisk()
    owner = filled(RUN, 1, disk=start).claim()
    rehearsal = start.copy()
    steps = len(crashes(rehearsal, lambda: filled(RUN, 2, disk=rehearsal))) - 1
    assert steps > 15
    for number in range(1, steps - 1):  # what is left is the rename itself, and what comes after it
        disk, countdown = start.copy(), iter(range(number, -10_000, -1))

        def rival(disk=disk, countdown=countdown):
            if next(countdown) == 1:
                sets = Store(RUN, NAMES, disk)
                sets.commit(2, content(2, 7), sets.claim())

        disk.before_step = rival
        with pytest.raises(RunError):
            Store(RUN, NAMES, disk).commit(2, content(2, 0), owner)
        assert sorted(disk.names(RUN / "checkpoints")) == ["step_00000001", "step_00000002"]
        assert Store(RUN, NAMES, disk).newest() == (2, data(2, 7), [])


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EIO], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_sync_folders_is_said_once_and_other_errors_name_the_path(
    tmp_path, monkeypatch, capsys, code
):
    sync = os.fsync

    def sync_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    store = Store(tmp_path / "run")
    if code == errno.EIO:
        with pytest.raises(OSError, match=f"Input/output error: '{tmp_path / 'run'}'"):
            store.claim()
        return
    store.commit(1, dict.fromkeys(store.names, bytes), store.claim())
    assert store.newest()[0] == 1
    assert capsys.readouterr().out.count("cannot sync folders") == 1
