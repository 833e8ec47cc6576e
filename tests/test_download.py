"""Downloads against a scripted loopback host: every fault, and the files are the source's bytes or not there."""

import contextlib
import dataclasses
import email.utils
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import namedtuple
from types import SimpleNamespace

import pytest
import requests
from conftest import ROOT, make_shards, make_texts

from nanotrain import corpus, dataset, download, paths
from nanotrain.errors import DataError, UserError

PREFIX = "/" + dataset.SOURCES["fineweb-edu"].url + "/"
VALIDATION = "shard_01822.parquet"
ALL = ["shard_00000.parquet", "shard_00001.parquet", VALIDATION]
ONE = ALL[0]
START = float(int(time.time()))  # on the wall, where FakeClock begins


# ---- the host, the clock, and what a download must leave ----


class Host:
    """An HTTP host on raw sockets. script[path] lists the answers to the next requests of that path, the last of which
    is repeated: bytes, or a function that is given the socket. What is not in the script is a 404.
    """

    def __init__(self):
        self.script, self.seen, self.open = {}, [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.open.append(connection)
                threading.Thread(target=self._answer, args=[connection], daemon=True).start()

    def _answer(self, connection):
        with connection, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            first, *lines = request.decode("latin-1").strip().split("\r\n")
            path = first.split()[1]
            self.seen.append((path, dict(line.split(": ", 1) for line in lines)))
            answers = self.script.get(path, [reply(status=404)])
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            answer(connection) if callable(answer) else connection.sendall(answer)

    def asked(self):
        """The names of the files that were asked for, in order."""
        return [path.split("?")[0].rpartition("/")[2] for path, _ in self.seen]

    def close(self):
        with contextlib.suppress(OSError):  # closed before
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.open:
            connection.close()


def reply(body=b"", status=200, length=None, **headers):
    """The bytes of an answer; `length` is the Content-Length that it claims, False for none."""
    lines = [f"HTTP/1.1 {status} x", "Connection: close"]
    if length is not False:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def redirect(url):
    return reply(status=302, Location=url)


def half(body, **headers):
    """An answer that breaks off, though it claims the whole length."""
    return reply(body[: len(body) // 2], length=len(body), **headers)


def reset(body):
    """40 % of an answer, then a TCP reset."""

    def answer(connection):
        connection.sendall(reply(body[: len(body) * 2 // 5], length=len(body)))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


class Pauses:
    """An answer in two halves: `arrived` is set in the middle, and it goes on when `go` is."""

    def __init__(self, body, then=None):
        self.whole, self.then = reply(body), then
        self.arrived, self.go = threading.Event(), threading.Event()

    def __call__(self, connection):
        middle = len(self.whole) - 1000
        connection.sendall(self.whole[:middle])
        self.arrived.set()
        if not self.go.wait(20):
            return
        connection.sendall(self.whole[middle:] if self.then is None else self.then)


class FakeClock(download.Clock):
    """Time passes only where somebody waits for it."""

    def __init__(self, jitter=0.5):
        super().__init__(now=lambda: self.time, wall=lambda: START + self.time, jitter=lambda: jitter)
        self.time, self.sleeps = 0.0, []

    def sleep(self, seconds):
        if self.stop.is_set():
            raise download.StoppedError
        self.sleeps.append(seconds)
        self.time += seconds


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: bytes} of two train shards and a validation shard."""
    folder = make_shards(tmp_path_factory.mktemp("source"))
    (folder / "shard_00002.parquet").rename(folder / VALIDATION)
    return contents(folder)


@pytest.fixture
def start_host():
    hosts = []

    def start():
        hosts.append(Host())
        return hosts[-1]

    yield start
    for host in hosts:
        host.close()


@pytest.fixture
def host(start_host, files, monkeypatch):
    """A host of the shards, which is Hugging Face to the code under test."""
    host = start_host()
    host.script = {PREFIX + name: [reply(body)] for name, body in files.items()}
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return host


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "here"


def contents(folder):
    """{name: bytes} of everything in a folder, hidden files too."""
    found = {}
    for path in folder.iterdir() if folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # taken away by the download that is watched
            found[path.name] = path.read_bytes()
    return found


def shards_in(folder):
    """contents() without the two .json files of a data set; anything else, as a temporary file, stays in."""
    return {name: data for name, data in contents(folder).items() if name not in ("manifest.json", "checked.json")}


def sha256(body):
    return hashlib.sha256(body).hexdigest()


def item(host, name, body=None):
    """The Item of a shard, with size and hash if `body` is given."""
    known = {} if body is None else {"size": len(body), "sha256": sha256(body)}
    return download.Item(name, host.url + PREFIX + name, **known)


def get(items, folder, clock=None, check=dataset.open_shard, **options):
    return download.fetch_all(items, folder, check, clock=clock or FakeClock(), **options)


def get_set(folder, train_shards=2, clock=None):
    dataset.fetch("fineweb-edu", dataset.SOURCES["fineweb-edu"], train_shards, folder, clock or FakeClock())


def hub_manifest(files, **changes):
    entries = [{"name": name, "bytes": len(body), "sha256": sha256(body)} for name, body in files.items()]
    return {"validation": VALIDATION, "shards": entries, **changes}


def serve_manifest(host, manifest):
    host.script[PREFIX + "manifest.json"] = [reply(json.dumps(manifest).encode())]


def until(condition):
    """Wait for other threads, at most some seconds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


# ---- no fault ----


@pytest.mark.parametrize("known", [True, False])
def test_the_files_are_those_of_the_source_and_their_hashes_are_told(host, files, folder, known):
    counts = []
    items = [item(host, name, body if known else None) for name, body in files.items()]
    done, failed = get(items, folder, on_bytes=counts.append)
    assert contents(folder) == files
    assert (done, failed) == ({name: sha256(body) for name, body in files.items()}, {})
    assert sum(counts) == sum(map(len, files.values()))
    assert sorted(host.asked()) == ALL


def test_four_workers_and_no_more_fetch_at_a_time(host, files, folder):
    running, most, lock = [], [], threading.Lock()
    four = threading.Barrier(4)
    names = [f"shard_{number:05d}.parquet" for number in range(8)]

    def answer(connection):
        with lock:
            running.append(1)
            most.append(len(running))
        four.wait(20)
        with lock:
            running.pop()
        connection.sendall(reply(files[ONE]))

    host.script = {PREFIX + name: [answer] for name in names}
    done, _ = get([item(host, name) for name in names], folder)
    assert (sorted(done), max(most)) == (names, 4)


# ---- DL1 to DL8: what passes ----


def test_resets_and_empty_replies_are_tried_again(host, files, folder):
    """DL1"""
    host.script[PREFIX + ONE] = [reset(files[ONE]), b"", reply(files[ONE])]
    clock, counts = FakeClock(), []
    done, failed = get([item(host, ONE)], folder, clock, on_bytes=counts.append)
    assert contents(folder) == {ONE: files[ONE]}
    assert (done, failed) == ({ONE: sha256(files[ONE])}, {})
    assert host.asked() == [ONE] * 3
    assert clock.sleeps == [0.75, 1.5]
    assert sum(counts) == len(files[ONE]), "what a lost try had counted is taken back"


def test_a_name_that_does_not_resolve_is_tried_again(host, files, folder, monkeypatch):
    """DL1"""
    real, failures = socket.getaddrinfo, [1, 2, 3]

    def resolve(*arguments, **options):
        if failures:
            failures.pop()
            raise socket.gaierror(socket.EAI_AGAIN, "temporary failure in name resolution")
        return real(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    clock = FakeClock()
    assert get([item(host, ONE)], folder, clock)[1] == {}
    assert contents(folder) == {ONE: files[ONE]}
    assert clock.sleeps == [0.75, 1.5, 3.0]


@pytest.mark.parametrize("trouble", [b"", reply(status=503)])
def test_lasting_trouble_ends_after_five_attempts(host, files, folder, trouble):
    """DL1 DL2"""
    host.script[PREFIX + ONE] = [trouble]
    done, failed = get([item(host, ONE), item(host, ALL[1])], folder)
    assert contents(folder) == {ALL[1]: files[ALL[1]]}
    assert (list(done), list(failed)) == ([ALL[1]], [ONE])
    assert failed[ONE].startswith(f"{ONE} from 127.0.0.1")
    assert "(5 attempts)" in failed[ONE]
    assert host.asked().count(ONE) == 5


def test_troubles_of_several_kinds_share_the_five_attempts(host, files, folder):
    """DL1 DL2"""
    unreachable = redirect(f"http://127.0.0.1:{closed_port()}/x")
    troubles = [unreachable, reply(status=503), unreachable, reply(b"<html>"), half(files[ONE])]
    host.script[PREFIX + ONE] = [*troubles, reply(files[ONE])]
    assert "(5 attempts)" in get([item(host, ONE)], folder)[1][ONE]
    assert contents(folder) == {}
    host.script[PREFIX + ONE] = [*troubles[1:], reply(files[ONE])]
    assert get([item(host, ONE)], folder)[1] == {}
    assert contents(folder) == {ONE: files[ONE]}


@pytest.mark.parametrize("jitter", [0.0, 0.25, 0.999])
def test_pauses_double_up_to_a_minute_within_their_jitter(host, files, folder, monkeypatch, jitter):
    """DL2"""
    monkeypatch.setattr(download, "ATTEMPTS", 10)
    trouble = [reply(status=code) for code in (408, 500, 502, 503, 504, 500, 503, 502)]
    host.script[PREFIX + ONE] = [*trouble, reply(files[ONE])]
    clock = FakeClock(jitter)
    assert get([item(host, ONE)], folder, clock)[1] == {}
    assert contents(folder) == {ONE: files[ONE]}
    assert clock.sleeps == [pytest.approx(most * (1 + jitter) / 2) for most in (1, 2, 4, 8, 16, 32, 60, 60)]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry_After": "7"}, 7 * 1.05),
        ({"Retry_After": email.utils.formatdate(START + 120, usegmt=True)}, 120 * 1.05),
        ({"Retry_After": "99999999"}, 900 * 1.05),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 55 * 1.05),
        ({"Retry_After": "7", "RateLimit": '"resolvers";r=0;t=55'}, 7 * 1.05),
        ({"Retry_After": email.utils.formatdate(START - 120, usegmt=True)}, 0.75),
        ({"Retry_After": "soon"}, 0.75),
        ({"Retry_After": "\xb2"}, 0.75),
        ({"Retry_After": "-5"}, 0.75),
        ({}, 0.75),
    ],
)
def test_the_next_attempt_is_when_the_host_says(host, files, folder, headers, seconds):
    """DL3"""
    clock, times = FakeClock(), []

    def note_time(connection):
        times.append(clock.time)
        connection.sendall(reply(files[ONE]))

    host.script[PREFIX + ONE] = [reply(status=429, **headers).decode().encode("latin-1"), note_time]
    assert get([item(host, ONE)], folder, clock)[1] == {}
    assert contents(folder) == {ONE: files[ONE]}
    assert times == [pytest.approx(seconds)]


def test_a_rate_limit_that_is_not_the_trouble_is_no_reason_to_wait(host, files, folder):
    """DL3"""
    host.script[PREFIX + ONE] = [reply(status=503, RateLimit='"resolvers";r=2999;t=290'), reply(files[ONE])]
    clock = FakeClock()
    assert get([item(host, ONE)], folder, clock)[1] == {}
    assert clock.sleeps == [0.75]


class HeldClock(FakeClock):
    """Time passes only when the test says so; sleepers wait for it."""

    def __init__(self):
        super().__init__()
        self.asleep = 0

    def sleep(self, seconds):
        end = self.time + seconds
        self.asleep += 1
        until(lambda: self.time >= end)
        self.asleep -= 1


def requests_during_a_pause(host, files, folder):
    """Two workers, one of which is told to wait 7 s while the other is in the middle of a file: which requests come in
    these 7 s?
    """
    clock, middle, early = HeldClock(), Pauses(files[ALL[1]]), []

    def note_time(connection):
        if clock.time < 7:
            early.append(clock.time)
        connection.sendall(reply(files[VALIDATION]))

    def too_many(connection):
        assert middle.arrived.wait(20)
        connection.sendall(reply(status=429, Retry_After=7))

    host.script[PREFIX + ONE] = [too_many, reply(files[ONE])]
    host.script[PREFIX + ALL[1]] = [middle]
    host.script[PREFIX + VALIDATION] = [note_time]
    items = [item(host, name) for name in ALL]
    worker = threading.Thread(target=get, args=[items, folder, clock], kwargs={"workers": 2})
    worker.start()
    until(lambda: clock.asleep == 1)
    middle.go.set()
    until(lambda: clock.asleep == 2 or not worker.is_alive() or early)
    while worker.is_alive():
        clock.time += 1
        worker.join(0.01)
    assert contents(folder) == files
    return early


def test_a_pause_that_the_host_asks_for_holds_for_every_worker(host, files, folder):
    """DL3"""
    assert requests_during_a_pause(host, files, folder) == []


def test_a_pause_of_one_worker_only_would_be_noticed(host, files, folder, monkeypatch):
    """DL3"""
    monkeypatch.setattr(download.Clock, "pause_everyone", lambda self, seconds: self.sleep(seconds))
    assert requests_during_a_pause(host, files, folder) == [0.0]


@pytest.mark.parametrize(
    ("status", "says"), [(401, "set HF_TOKEN"), (403, "set HF_TOKEN"), (404, ""), (410, ""), (400, ""), (416, "")]
)
def test_a_refusal_is_told_after_one_request(host, folder, status, says):
    """DL4"""
    host.script[PREFIX + ONE] = [reply(status=status)]
    clock = FakeClock()
    _, failed = get([item(host, ONE)], folder, clock)
    assert failed[ONE].startswith(f"127.0.0.1 answers {status} for {ONE}")
    assert says in failed[ONE]
    assert (contents(folder), host.asked(), clock.sleeps) == ({}, [ONE], [])


def chunked_and_cut(body):
    return reply(f"{len(body):x}\r\n".encode() + body[: len(body) // 2], length=False, Transfer_Encoding="chunked")


def chunked_without_end(body):
    return reply(f"{len(body):x}\r\n".encode() + body + b"\r\n", length=False, Transfer_Encoding="chunked")


@pytest.mark.parametrize("cut", [half, chunked_and_cut, chunked_without_end])
def test_a_body_that_breaks_off_is_fetched_again(host, files, folder, cut):
    """DL5"""
    host.script[PREFIX + ONE] = [cut(files[ONE]), reply(files[ONE])]
    done, _ = get([item(host, ONE)], folder, check=lambda path: None)
    assert contents(folder) == {ONE: files[ONE]}
    assert done == {ONE: sha256(files[ONE])}
    assert host.asked() == [ONE] * 2


@pytest.mark.parametrize("length", [False, 1000])
@pytest.mark.parametrize("told_by", ["the list", "headers"])
def test_a_short_body_that_looks_whole_is_fetched_again(host, files, folder, length, told_by):
    """DL6"""
    body = files[ONE]
    linked = {"X_Linked_Size": len(body), "X_Linked_Etag": f'"{sha256(body)}"'} if told_by == "headers" else {}
    short = reply(body[:1000], length=length, **linked)
    host.script[PREFIX + ONE] = [short, short, reply(body, **linked)]
    wanted = item(host, ONE, body if told_by == "the list" else None)
    assert get([wanted], folder, check=lambda path: None)[1] == {}
    assert contents(folder) == {ONE: body}
    host.script[PREFIX + ONE] = [short]
    shutil.rmtree(folder)
    _, failed = get([wanted], folder)
    assert f"1000 of {len(body)} bytes" in failed[ONE]
    assert (contents(folder), len(host.seen)) == ({}, 3 + 5)


def test_a_short_body_of_unknown_size_is_noticed_by_its_missing_footer(host, files, folder):
    """DL6"""
    host.script[PREFIX + ONE] = [reply(files[ONE][:1000], length=False), reply(files[ONE])]
    assert get([item(host, ONE)], folder)[1] == {}
    assert contents(folder) == {ONE: files[ONE]}


def test_a_body_without_end_is_left_where_it_is_too_long(host, files, folder):
    """DL6"""

    def endless(connection):
        connection.sendall(reply(files[ONE], length=False))
        while True:
            connection.sendall(bytes(1 << 16))

    host.script[PREFIX + ONE] = [endless]
    _, failed = get([item(host, ONE, files[ONE])], folder)
    assert f"of {len(files[ONE])} bytes" in failed[ONE]
    assert contents(folder) == {}


def flipped(body):
    """`body` with one bit changed in the first page: a parquet file that opens, with another text."""
    return body[:40] + bytes([body[40] ^ 1]) + body[41:]


def wrong_content_is_refused(host, files, folder):
    host.script[PREFIX + ONE] = [reply(flipped(files[ONE]))]
    _, failed = get([item(host, ONE, files[ONE])], folder)
    return "another SHA-256" in failed.get(ONE, "") and contents(folder) == {}


def test_a_flipped_bit_is_refused_after_two_tries(host, files, folder):
    """DL6"""
    assert wrong_content_is_refused(host, files, folder)
    assert host.asked() == [ONE] * 2


def test_a_missing_hash_check_would_be_noticed(host, files, folder, monkeypatch):
    """DL6"""
    monkeypatch.setattr(download, "_expected", lambda item, response: (item.size, None))
    assert not wrong_content_is_refused(host, files, folder)


def test_the_hash_in_the_headers_of_the_first_host_counts(host, start_host, files, folder):
    """DL6 DL15"""
    cdn, wrong = start_host(), flipped(files[ONE])
    linked = {"X_Linked_Etag": f'"{sha256(files[ONE])}"', "X_Linked_Size": len(files[ONE])}
    host.script[PREFIX + ONE] = [reply(status=302, Location=f"{cdn.url}/x", **linked)]
    cdn.script["/x"] = [reply(wrong, X_Linked_Etag=f'"{sha256(wrong)}"')]
    _, failed = get([item(host, ONE)], folder)
    assert "another SHA-256" in failed[ONE]
    assert contents(folder) == {}
    cdn.script["/x"] = [reply(files[ONE])]
    assert get([item(host, ONE)], folder) == ({ONE: sha256(files[ONE])}, {})


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("body", "kind", "quoted"),
    [
        (b"<html>please log in</html>", "text/html; charset=utf-8", "'<html>please log in</html>'"),
        (b'{"error": "no such key"}', "application/json", "no such key"),
        (b"\x1b[31m\x00evil" + b"x" * 1000, "text/html", "'.[31m.evil" + "x" * 70 + "'"),
    ],
)
def test_a_page_in_place_of_a_shard_is_told_after_two_tries(host, files, folder, known, body, kind, quoted):
    """DL7"""
    host.script[PREFIX + ONE] = [reply(body, Content_Type=kind)]
    _, failed = get([item(host, ONE, files[ONE] if known else None)], folder)
    assert kind in failed[ONE]
    assert quoted in failed[ONE]
    assert (contents(folder), host.asked()) == ({}, [ONE] * 2)
    assert str(folder) not in failed[ONE]
    assert "delete it" not in failed[ONE], "nothing is there to be deleted"


def test_a_page_once_is_no_obstacle(host, files, folder):
    """DL7"""
    host.script[PREFIX + ONE] = [reply(b"<html>", Content_Type="text/html"), reply(files[ONE])]
    assert get([item(host, ONE)], folder)[1] == {}
    assert contents(folder) == {ONE: files[ONE]}


@pytest.mark.parametrize(("per_second", "enough"), [(9_999, False), (10_000, True), (1, False)])
def test_a_drip_is_given_up_after_a_minute(tmp_path, per_second, enough):
    """DL8"""
    clock, left = FakeClock(), [bytes(per_second)] * 150

    def read1(count):
        clock.time += 1
        return left.pop() if left else b""

    response = SimpleNamespace(raw=SimpleNamespace(read1=read1))
    arguments = (response, tmp_path / "part", None, clock, [], lambda count: None)
    if enough:
        assert download._receive(*arguments) == (150 * per_second, sha256(bytes(150 * per_second)))
    else:
        with pytest.raises(download.TransientError, match=r"slower than 10 kB/s for 60 s"):
            download._receive(*arguments)
        assert clock.time == 60


def test_after_a_drip_the_file_is_fetched_again(host, files, folder):
    """DL8"""
    clock, slow = FakeClock(), [61.0]

    def time_passes(count):
        clock.time += slow.pop() if slow else 0

    assert get([item(host, ONE)], folder, clock, on_bytes=time_passes)[1] == {}
    assert contents(folder) == {ONE: files[ONE]}
    assert (host.asked(), clock.sleeps) == ([ONE] * 2, [0.75])


# ---- DL9 to DL12: the disk ----


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT"])
def test_a_disk_that_fills_up_ends_the_download_at_once(host, files, folder, monkeypatch, error):
    """DL9"""
    real = os.open

    def no_room(path, flags, *arguments):
        if not str(path).endswith(".part"):
            return real(path, flags, *arguments)
        if error == "EDQUOT":
            raise OSError(errno.EDQUOT, "quota")
        os.close(real(path, flags, *arguments))
        return real("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", no_room)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_500_000))
    clock = FakeClock()
    done, failed = get([item(host, name, files[name]) for name in ALL], folder, clock, workers=1)
    needed = f"{len(files[ONE]) / 1e6:.1f} MB needed, 2.5 MB free in {folder}"
    assert failed == {ONE: f"the disk is full: {needed}", ALL[1]: "not tried", VALIDATION: "not tried"}
    assert (done, contents(folder), host.asked(), clock.sleeps) == ({}, {}, [ONE], [])


def test_a_file_that_does_not_fit_is_not_begun(host, files, folder, monkeypatch):
    """DL9"""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(files[ONE]) - 1))
    monkeypatch.setattr(download, "_receive", None)
    _, failed = get([item(host, ONE)], folder)
    assert failed[ONE].startswith("the disk is full: ")
    assert (contents(folder), host.asked()) == ({}, [ONE])


def test_a_data_set_that_does_not_fit_is_not_begun(host, folder, monkeypatch):
    """DL9"""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=299_000_000))
    with pytest.raises(DataError, match=r"the disk is full: 300.0 MB needed, 299.0 MB free in ") as caught:
        get_set(folder)
    assert caught.value.exit_code == 6
    assert host.asked() == ["manifest.json"]
    assert not folder.exists()


def two_at_once(host, files, folder):
    """Two downloads of one shard, the first of which fails in the middle. Returns the names of the temporary files when
    both were in the middle.
    """
    loser, winner = Pauses(files[ONE], then=b""), Pauses(files[ONE])
    host.script[PREFIX + ONE] = [loser, winner, reply(status=404)]
    results = []
    threads = []
    for answer in (loser, winner):
        threads.append(threading.Thread(target=lambda: results.append(get([item(host, ONE)], folder))))
        threads[-1].start()
        assert answer.arrived.wait(20)
    until(lambda: len(contents(folder)) == 2 or results)
    parts = sorted(contents(folder))
    winner.go.set()
    until(lambda: results)
    assert contents(folder).get(ONE) in (None, files[ONE])
    loser.go.set()
    for thread in threads:
        thread.join(20)
    return parts, results


def test_two_downloads_of_one_shard_do_not_touch_each_other(host, files, folder):
    """DL10"""
    parts, results = two_at_once(host, files, folder)
    assert len(set(parts)) == 2
    assert all(download.PART_NAME.fullmatch(part)["pid"] == str(os.getpid()) for part in parts)
    assert [sorted(done) for done, _ in results] == [[ONE], []]
    assert contents(folder) == {ONE: files[ONE]}, "the loser took nothing away"


def test_a_shared_temporary_name_would_be_noticed(host, files, folder, monkeypatch):
    """DL10"""
    monkeypatch.setattr(download.uuid, "uuid4", lambda: SimpleNamespace(hex="0" * 32))
    parts, _ = two_at_once(host, files, folder)
    assert len(parts) < 2


def seen_in_the_middle(host, files, folder):
    """What the final name holds while its file is fetched anew."""
    middle = Pauses(files[ONE])
    host.script[PREFIX + ONE] = [middle]
    folder.mkdir()
    (folder / ONE).write_bytes(b"old")
    thread = threading.Thread(target=get, args=[[item(host, ONE)], folder])
    thread.start()
    assert middle.arrived.wait(20)
    until(lambda: contents(folder) != {ONE: b"old"})
    found = (folder / ONE).read_bytes()
    middle.go.set()
    thread.join(20)
    return found


def test_the_final_name_never_holds_a_piece(host, files, folder):
    """DL10"""
    assert seen_in_the_middle(host, files, folder) == b"old"
    assert contents(folder) == {ONE: files[ONE]}


def test_a_download_in_place_would_be_noticed(host, files, folder, monkeypatch):
    """DL10"""
    real = os.open

    def in_place(path, flags, *arguments):
        if str(path).endswith(".part"):
            return real(folder / ONE, os.O_WRONLY | os.O_TRUNC)
        return real(path, flags, *arguments)

    monkeypatch.setattr(os, "open", in_place)
    assert seen_in_the_middle(host, files, folder) != b"old"


def test_a_link_at_the_final_name_is_replaced_and_not_followed(host, files, folder, tmp_path):
    """DL10"""
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    folder.mkdir()
    (folder / ONE).symlink_to(outside)
    assert get([item(host, ONE)], folder)[1] == {}
    assert (outside.read_bytes(), contents(folder)) == (b"mine", {ONE: files[ONE]})
    assert not (folder / ONE).is_symlink()


FETCH_ONE = """
import sys
from nanotrain import download
print(download.fetch_all([download.Item(sys.argv[1], sys.argv[2])], sys.argv[3], lambda path: None))
"""


def test_a_killed_download_leaves_no_shard_and_the_next_one_cleans_up(host, files, folder):
    """DL11"""
    middle = Pauses(files[ONE])
    host.script[PREFIX + ONE] = [middle, reply(files[ONE])]
    command = [sys.executable, "-c", FETCH_ONE, ONE, host.url + PREFIX + ONE, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        assert middle.arrived.wait(20)
        until(lambda: any(contents(folder).values()))
    finally:
        process.kill()
        process.wait()
    (part,) = contents(folder)
    assert download.PART_NAME.fullmatch(part)["pid"] == str(process.pid)
    assert get([item(host, ONE)], folder)[1] == {}
    assert contents(folder) == {ONE: files[ONE]}


def test_temporary_files_of_the_living_stay(tmp_path):
    """DL11"""
    here, number = socket.gethostname().replace(".", "-"), "0" * 32
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    clock = download.Clock()
    old, young = clock.wall() - 3700, clock.wall() - 3500
    stays = {
        f".{ONE}.{here}.{os.getpid()}.{number}.part": old,
        f".{ONE}.{here}x.{dead.pid}.{number}.part": young,  # of another host, whose processes we cannot see
        f".manifest.json.{number}.part": young,
        ".notes.part": old,
        f"{ONE}.{here}.{dead.pid}.{number}.part": old,
        ONE: old,
    }
    goes = {
        f".{ONE}.{here}.{dead.pid}.{number}.part": young,
        f".{ONE}.{here}x.{dead.pid}.{number[:-1]}1.part": old,
        f".manifest.json.{number[:-1]}1.part": old,
    }
    for name, changed in {**stays, **goes}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (changed, changed))
    download.remove_stale_parts(tmp_path, clock)
    assert sorted(contents(tmp_path)) == sorted(stays)


@pytest.mark.parametrize("told_by", ["its manifest", "our manifest"])
@pytest.mark.parametrize("harm", [flipped, lambda body: body[:-1], lambda body: b""])
def test_a_bad_shard_in_place_is_fetched_again(host, files, folder, harm, told_by):
    """DL12"""
    if told_by == "its manifest":
        serve_manifest(host, hub_manifest(files))
    get_set(folder)
    host.seen.clear()
    (folder / ALL[1]).write_bytes(harm(files[ALL[1]]))
    get_set(folder)
    assert shards_in(folder) == files
    assert host.asked() == ["manifest.json", ALL[1]]
    assert dataset.verify(folder) == []


def test_a_shard_of_another_content_than_the_host_has_now_is_fetched_again(host, files, folder):
    """DL12"""
    host.script[PREFIX + ONE] = [reply(files[ALL[1]])]
    get_set(folder)
    host.script[PREFIX + ONE] = [reply(files[ONE])]
    serve_manifest(host, hub_manifest(files))
    get_set(folder)
    assert shards_in(folder) == files


def test_an_unchanged_shard_is_not_read_again(host, files, folder, monkeypatch):
    """DL12"""
    hashed = []
    monkeypatch.setattr(
        dataset, "file_sha256", lambda path, real=dataset.file_sha256: hashed.append(path.name) or real(path)
    )
    get_set(folder)
    assert hashed == [], "hashed as they came in"
    host.seen.clear()
    get_set(folder)
    assert (hashed, host.asked()) == ([], ["manifest.json"])
    os.utime(folder / ONE)
    get_set(folder)
    assert hashed == [ONE]
    (folder / "checked.json").write_text('{"shard_00000.parquet": []}')
    get_set(folder)
    assert sorted(hashed) == sorted([ONE, *ALL])
    assert shards_in(folder) == files


def test_a_bad_shard_beyond_those_asked_for_is_not_taken_for_good(host, files, folder):
    """DL12"""
    get_set(folder, 2)
    (folder / ALL[1]).write_bytes(flipped(files[ALL[1]]))
    get_set(folder, 1)
    assert len(dataset.verify(folder)) == 1
    get_set(folder, 2)
    assert shards_in(folder) == files


def test_a_broken_manifest_of_ours_is_written_anew(host, files, folder):
    get_set(folder)
    manifest = dataset.read_manifest(folder)
    manifest["shards"][0]["sha256"] = None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    get_set(folder)
    assert (shards_in(folder), dataset.verify(folder)) == (files, [])


# ---- DL13 to DL16 ----


def test_content_that_is_not_what_the_manifest_beside_it_says_is_refused(host, files, folder):
    """DL13, as far as there is a manifest"""
    serve_manifest(host, hub_manifest(files))
    host.script[PREFIX + ONE] = [reply(flipped(files[ONE]))]
    with pytest.raises(DataError, match=r"1 of 3 shards are missing \(shard_00000.parquet\): .*another SHA-256"):
        get_set(folder)
    assert shards_in(folder) == {name: files[name] for name in ALL[1:]}


def test_missing_shards_are_listed_the_others_kept_and_only_the_rest_is_fetched_next(host, files, folder):
    """DL14"""
    answer = host.script.pop(PREFIX + ALL[1])
    with pytest.raises(DataError, match=r"1 of 3 shards are missing \(shard_00001.parquet\): .* answers 404") as caught:
        get_set(folder)
    assert caught.value.exit_code == 6
    assert shards_in(folder) == {name: files[name] for name in (ONE, VALIDATION)}
    host.script[PREFIX + ALL[1]] = answer
    host.seen.clear()
    get_set(folder)
    assert host.asked() == ["manifest.json", ALL[1]]
    assert (shards_in(folder), dataset.verify(folder)) == (files, [])


def test_a_download_that_got_nothing_leaves_no_folder(host, folder):
    """DL14"""
    host.script = {}
    with pytest.raises(DataError, match="3 of 3 shards are missing"):
        get_set(folder)
    assert not folder.exists()


def token_at_the_other_host(host, start_host, files, folder):
    other = start_host()
    other.script["/signed"] = [reply(files[ONE])]
    host.script[PREFIX + ONE] = [redirect(PREFIX + "moved")]
    host.script[PREFIX + "moved"] = [redirect(f"{other.url}/signed")]
    host.seen.clear()
    assert get([item(host, ONE)], folder, token="hf_secret")[1] == {}
    assert contents(folder) == {ONE: files[ONE]}
    assert [headers["Authorization"] for _, headers in host.seen] == ["Bearer hf_secret"] * 2
    return [headers.get("Authorization") for _, headers in other.seen]


def test_a_token_goes_to_the_own_host_alone(host, start_host, files, folder, tmp_path, monkeypatch):
    """DL15"""
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert token_at_the_other_host(host, start_host, files, folder) == [None]


def test_a_token_that_goes_along_would_be_noticed(host, start_host, files, folder, monkeypatch):
    """DL15"""
    real = requests.get

    def with_token(url, headers, **options):
        return real(url, headers={**headers, "Authorization": "Bearer hf_secret"}, **options)

    monkeypatch.setattr(requests, "get", with_token)
    assert token_at_the_other_host(host, start_host, files, folder) == ["Bearer hf_secret"]


def test_the_token_of_hugging_face_is_not_for_other_hosts(host, start_host, files, folder, monkeypatch):
    """DL15"""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")  # as read from a file
    get_set(folder)
    assert [headers["Authorization"] for _, headers in host.seen] == ["Bearer hf_secret"] * 4
    other = start_host()
    other.script = {f"/{ONE}": [reply(files[ONE])], f"/{ALL[1]}": [reply(files[VALIDATION])]}
    dataset.fetch("mine", dataset.Source(other.url, 2, 0, "?"), 1, folder.with_name("mine"), FakeClock())
    assert "Authorization" not in str(other.seen)
    assert shards_in(folder.with_name("mine")) == {ONE: files[ONE], ALL[1]: files[VALIDATION]}


@pytest.mark.parametrize(
    ("hops", "says"),
    [
        (["https://127.0.0.1/x", "HOST"], "127.0.0.1 without https"),
        (["http://127.0.0.1/x", "https://127.0.0.1/x", "HOST"], "127.0.0.1 without https"),
        (["https://127.0.0.1/x", "http://example.com/x"], "example.com without https"),
        (["http://127.0.0.1/x", "http://example.com/x"], "example.com without https"),
        (["http://127.0.0.1/x", "file:///etc/passwd"], "without https"),
        (["http://127.0.0.1/x", "ftp://127.0.0.1/x"], "InvalidSchema"),
        (["http://127.0.0.1/x", "http://[bad"], "ValueError"),
        (["http://127.0.0.1/x", "https://" + "a" * 300 + "/"], "LocationParseError"),
    ],
)
def test_a_redirect_to_less_than_https_is_refused(host, files, folder, monkeypatch, hops, says):
    """DL15"""
    *hops, last = [hop.replace("HOST", host.url + PREFIX + ONE) for hop in hops]
    following = dict(zip(hops, [*hops[1:], last], strict=True))
    real = requests.get

    def get_redirected(url, **options):  # a host with a certificate is more than a test can have
        if url not in following:
            return real(url, **options)
        response = requests.Response()
        response.status_code, response.raw, response.headers["Location"] = 302, io.BytesIO(), following.pop(url)
        return response

    monkeypatch.setattr(requests, "get", get_redirected)
    clock = FakeClock()
    _, failed = get([download.Item(ONE, hops[0])], folder, clock)
    assert says in failed[ONE]
    assert (contents(folder), host.seen, clock.sleeps, following) == ({}, [], [], {})


@pytest.mark.parametrize(("count", "works"), [(5, True), (6, False)])
def test_at_most_five_redirects_are_followed(host, files, folder, count, works):
    """DL15"""
    host.script[PREFIX + ONE] = [*[redirect(PREFIX + ONE)] * count, reply(files[ONE])]
    _, failed = get([item(host, ONE)], folder)
    assert contents(folder) == ({ONE: files[ONE]} if works else {})
    assert failed == ({} if works else {ONE: f"{ONE}: more than 5 redirects"})
    assert len(host.seen) == 6


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/x",
        "ftp://127.0.0.1/x",
        "https://",
        "https://me@host/x",
        "https://:password@host/x",
        "https:///x",
    ],
)
def test_a_host_without_https_or_with_a_password_is_refused(folder, url):
    """DL15"""
    with pytest.raises(UserError, match="must be given as https://host/path") as caught:
        dataset.fetch("mine", dataset.Source(url, 2, 0, "?"), 1, folder, FakeClock())
    assert "password@" not in str(caught.value)
    assert not folder.exists()


def test_ctrl_c_ends_in_two_seconds_and_leaves_no_piece(host, files, base_dir):
    """DL16"""
    answers = [Pauses(files[name]) for name in ALL[:2]]
    for name, answer in zip(ALL, answers, strict=False):
        host.script[PREFIX + name] = [answer]
    command = [sys.executable, "-m", "nanotrain.dataset", "-n", "2", "--dataset=fineweb-edu"]
    environment = {**os.environ, "NANOTRAIN_DIR": str(base_dir)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        for answer in answers:
            assert answer.arrived.wait(30)
        folder = base_dir / "data" / "fineweb-edu"
        until(lambda: len(contents(folder)) == 4)  # two pieces, the validation shard, and the manifest that pins it
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        seconds = time.monotonic() - begin
    finally:
        process.kill()
        process.wait()
        for answer in answers:
            answer.go.set()
    assert seconds < 2
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert dataset.read_manifest(folder)["validation"] == VALIDATION
    assert {name: body for name, body in contents(folder).items() if name != "manifest.json"} == {
        VALIDATION: files[VALIDATION]
    }
    with pytest.raises(DataError, match="holds only the validation shard"):
        dataset.open_shards(folder)


@pytest.mark.parametrize("blocks_before", [0, 1, 2])
def test_a_worker_that_is_asked_to_stop_does_so_at_the_next_block(tmp_path, blocks_before):
    """DL16"""
    clock, reads = FakeClock(), []

    def read1(count):
        reads.append(count)
        if len(reads) == blocks_before:
            clock.stop.set()
        return b"x" if len(reads) < 10 else b""

    if not blocks_before:
        clock.stop.set()
    response = SimpleNamespace(raw=SimpleNamespace(read1=read1))
    with pytest.raises(download.StoppedError):
        download._receive(response, tmp_path / "part", None, clock, [], lambda count: None)
    assert len(reads) == blocks_before
    assert (tmp_path / "part").exists() == (blocks_before > 0), "one that begins now would be seen by nobody"


# ---- secrets ----


def test_the_command_ends_with_6_and_shows_neither_token_nor_signed_url(host, start_host, files, run_script, base_dir):
    signed = start_host()
    signed.script["/x?sig=CANARY"] = [reply(status=403)]
    host.script[PREFIX + ONE] = [redirect(f"{signed.url}/x?sig=CANARY")]
    done = run_script("nanotrain.dataset", "-n", "2", "--dataset=fineweb-edu", HF_TOKEN="hf_CANARY")
    assert done.returncode == 6
    assert done.stderr.splitlines()[-1].startswith(f"error: 1 of 3 shards are missing ({ONE}): 127.0.0.1 answers 403")
    assert "set HF_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
    assert (len(signed.seen), host.seen[0][1]["Authorization"]) == (1, "Bearer hf_CANARY")
    assert "CANARY" not in done.stdout + done.stderr
    folder = base_dir / "data" / "fineweb-edu"
    assert shards_in(folder) == {name: files[name] for name in ALL[1:]}
    assert b"CANARY" not in b"".join(contents(folder).values())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        reply(status=500),
        reply(status=410),
        reply(b"<html>", Content_Type="text/html"),
        half(b"x" * 2000),
        b"HTTP/1.1 nonsense\r\n\r\n",
        b"HTTP/1.1 403 x\r\nno header at all\r\nA: b\r\n\r\n",
        b"HTTP/1.1 302 x\r\nLocation: http://[sig=CANARY\r\n\r\n",
        b"HTTP/1.1 302 x\r\nLocation: https://%s/?sig=CANARY\r\n\r\n" % (b"a" * 300),
        "closed",
    ],
)
def test_no_error_shows_a_signed_url(host, start_host, folder, monkeypatch, capfd, caplog, answer):
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY")
    signed = start_host()
    signed.script["/x?sig=CANARY"] = [answer]
    if answer == "closed":
        signed.close()
    host.script[PREFIX + ONE] = [redirect(f"{signed.url}/x?sig=CANARY")]
    with pytest.raises(DataError, match=f"1 of 3 shards are missing .{ONE}") as caught:
        get_set(folder)
    assert signed.seen or answer == "closed"
    printed = capfd.readouterr()
    told = printed.out + printed.err + caplog.text + "".join(traceback.format_exception(caught.value))
    assert "CANARY" not in told.replace("test_no_error_shows_a_signed_url", "")
    assert sorted(shards_in(folder)) == ALL[1:]


def test_a_url_in_a_warning_of_the_http_library_would_be_noticed(host, caplog):
    """Why the library's warnings are turned off."""
    host.script["/x?sig=CANARY"] = [b"HTTP/1.1 200 x\r\nno header at all\r\nA: b\r\n\r\n"]
    with caplog.at_level("WARNING", logger="urllib3"):
        requests.get(f"{host.url}/x?sig=CANARY", timeout=20)
    assert "CANARY" in caplog.text


# ---- the first contact, and what is printed ----


def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_an_unreachable_host_is_told_in_two_seconds_with_the_way_to_do_without(folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    clock = FakeClock()
    with pytest.raises(DataError, match=r"127.0.0.1:\d+ cannot be reached.*--dataset=stdlib") as caught:
        get_set(folder, 50, clock)
    assert caught.value.exit_code == 6
    assert clock.sleeps == [0.75], "one more try, and nothing for each shard"
    assert not folder.exists()


def test_a_host_that_drops_our_packets_is_told_soon(folder, monkeypatch):
    monkeypatch.setattr(download, "FIRST_CONTACT_SECONDS", 0.2)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # who stand in the queue that nobody empties, so that the next SYN is dropped
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{full.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(DataError, match=r"cannot be reached \(ConnectTimeoutError\).*--dataset=stdlib"):
            get_set(folder, clock=download.Clock())
        assert time.monotonic() - begin < 2


def test_a_host_that_breaks_off_at_the_first_contact_is_asked_again(host, files, folder):
    host.script[PREFIX + "manifest.json"] = [b"", b"", reply(status=503), b"", reply(status=404)]
    get_set(folder)
    assert shards_in(folder) == files


def test_after_the_first_contact_an_unreachable_host_gets_every_attempt(host, folder):
    host.script[PREFIX + ONE] = [redirect(f"http://127.0.0.1:{closed_port()}/x")]
    with pytest.raises(DataError, match=r"cannot be reached \(\w+Error\) \(5 attempts\)"):
        get_set(folder)
    assert host.asked().count(ONE) == 5


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_host_without_a_manifest_is_no_trouble(host, files, folder, status):
    host.script[PREFIX + "manifest.json"] = [reply(status=status)]
    get_set(folder)
    assert (shards_in(folder), dataset.verify(folder)) == (files, [])


@pytest.mark.parametrize(
    "name",
    [
        "../shard_00000.parquet",
        "/shard_00000.parquet",
        "..",
        "C:\\shard_00000.parquet",
        "\\\\host\\shard_00000.parquet",
        "a/shard_00000.parquet",
        "shard_00000.parquet\x00",
        "shard_00000.parquet\n",
        "shard_00000.parquet/..",
        "shard_" + "0" * 300 + ".parquet",
        "shard_٣.parquet",
        "．．/shard_0.parquet",
        "CON",
        "manifest.json",
        "",
        None,
        7,
    ],
)
@pytest.mark.parametrize("place", ["validation", "shards"])
def test_a_hostile_name_in_the_manifest_of_a_host_is_refused(host, files, folder, tmp_path, name, place):
    manifest = hub_manifest(files)
    if place == "validation":
        manifest["validation"] = name
    else:
        manifest["shards"][1]["name"] = name
    serve_manifest(host, manifest)
    with pytest.raises(DataError, match=r"the host's manifest.json is broken"):
        get_set(folder)
    assert host.asked() == ["manifest.json"]
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"validation": VALIDATION},
        {"validation": VALIDATION, "shards": {"a": 1}},
        {"validation": VALIDATION, "shards": [{"name": ONE, "bytes": "9", "sha256": "0" * 64}]},
        {"validation": VALIDATION, "shards": [{"name": ONE, "bytes": 9, "sha256": "0" * 63}]},
        {"validation": VALIDATION, "shards": [{"name": ONE, "bytes": 9, "sha256": None}]},
    ],
)
def test_a_broken_manifest_of_a_host_is_refused(host, folder, manifest):
    serve_manifest(host, manifest)
    with pytest.raises(DataError, match=r"the host's manifest.json is broken"):
        get_set(folder)
    assert (host.asked(), folder.exists()) == (["manifest.json"], False)


@pytest.mark.parametrize("page", [b"<html>log in", b"[1]", b"null", b"\xff", b"[" * 100_000, b""])
def test_a_page_in_place_of_the_manifest_is_told(host, folder, page):
    """DL7"""
    host.script[PREFIX + "manifest.json"] = [reply(page, Content_Type="text/html")]
    begin = page[:12].decode("latin-1").replace("\xff", ".")
    with pytest.raises(DataError, match=rf"no JSON object; text/html, begins '{re.escape(begin)}.*--dataset=stdlib"):
        get_set(folder)
    assert host.asked() == ["manifest.json"] * 2


def test_validation_is_what_the_manifest_of_the_host_names(host, files, folder):
    serve_manifest(host, hub_manifest(files, validation=ONE))
    host.script[PREFIX + "shard_00002.parquet"] = [reply(files[VALIDATION])]
    get_set(folder)
    assert sorted(shards_in(folder)) == [ONE, ALL[1], "shard_00002.parquet"]
    shards = dataset.open_shards(folder)
    assert (shards.validation.name, [shard.name for shard in shards.train]) == (ONE, [ALL[1], "shard_00002.parquet"])


def test_the_validation_shard_of_a_folder_never_becomes_a_train_shard(host, files, folder, monkeypatch):
    """DA10: the number of shards, or the host, may say another one the next time."""
    get_set(folder)
    before, more = contents(folder), "shard_01823.parquet"
    serve_manifest(host, hub_manifest({**files, more: files[ONE]}, validation=more))
    host.script[PREFIX + more] = [reply(files[ONE])]
    with pytest.raises(UserError, match=f"{VALIDATION}, which would become a train shard, and {more} validation: "):
        get_set(folder)
    del host.script[PREFIX + "manifest.json"]
    smaller = dataclasses.replace(dataset.SOURCES["fineweb-edu"], num_shards=2)
    monkeypatch.setitem(dataset.SOURCES, "fineweb-edu", smaller)
    with pytest.raises(UserError, match=f"{VALIDATION}, which would become a train shard, and {ALL[1]} validation"):
        get_set(folder, 1)
    assert contents(folder) == before
    (folder / VALIDATION).unlink()  # nobody can have trained without it
    get_set(folder, 1)
    assert dataset.read_manifest(folder)["validation"] == ALL[1]


def test_a_folder_of_another_data_set_is_refused(host, folder):
    for held, asked in (("stdlib of Python 3.11.7", "stdlib"), ("fineweb-edu", "fineweb"), ("own text", "own")):
        make_shards(folder, train=1)
        dataset.write_manifest(folder, held, "shard_00001.parquet")
        before = contents(folder)
        with pytest.raises(UserError, match=rf"holds another data set \({held}\): choose another --name"):
            dataset.fetch(asked, dataset.SOURCES["fineweb-edu"], 1, folder, FakeClock())
        assert contents(folder) == before


def with_file(name, content):
    def prepare(folder, dataset_name):
        (make_shards(folder) / name).write_text(content)

    return prepare


def with_another_shard(folder, dataset_name):
    dataset.write_manifest(make_shards(folder), dataset_name, "shard_00002.parquet")
    dataset.write_shard(folder / "shard_00003.parquet", ["mine"])


def only_checked_json(folder, dataset_name):
    folder.mkdir(parents=True)
    (folder / "checked.json").write_text('{"docs": 3}')


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (with_file("manifest.json", '{"docs": 3}'), "manifest.json"),
        (with_file("manifest.json", "docs: 3"), "manifest.json"),
        (with_file("notes.txt", "mine"), ONE),
        (with_another_shard, "shard_00003.parquet"),
        (only_checked_json, "checked.json"),
    ],
    ids=["foreign manifest", "no JSON", "no manifest", "a shard more", "no shard"],
)
@pytest.mark.parametrize(
    ("flags", "dataset_name"),
    [
        ({"DATASET": "stdlib"}, "stdlib of Python 3.0.0"),
        ({"DATASET": "fineweb-edu", "TRAIN_SHARDS": 2}, "fineweb-edu"),
        ({"BASE_URL": "HOST", "NUM_SHARDS": 3}, "mine"),
    ],
    ids=["stdlib", "hosted", "another host"],
)
def test_what_a_user_has_in_the_folder_stays(host, files, base_dir, monkeypatch, flags, dataset_name, prepare, says):
    monkeypatch.setattr(corpus, "stdlib_sources", lambda: {f"f{n}.py": text for n, text in enumerate(make_texts(60))})
    host.script |= {f"/{name}": [reply(files[ONE])] for name in (*ALL, "shard_00002.parquet")}
    folder = base_dir / "data" / "mine"
    prepare(folder, dataset_name)
    before = contents(folder)
    if "BASE_URL" in flags:
        flags = {**flags, "BASE_URL": host.url}
    set_flags(monkeypatch, NAME="mine", **flags)
    with pytest.raises(UserError, match=says) as caught:
        dataset.main()
    assert caught.value.exit_code == 2
    assert str(folder) in str(caught.value)
    assert contents(folder) == before


KILLED = """
import os
from nanotrain import dataset

real, calls = os.replace, []

def replace(*paths):
    calls.append(paths)
    if len(calls) == NUMBER:
        os.kill(os.getpid(), 9)
    real(*paths)

os.replace = replace
dataset.DATASET, dataset.TRAIN_SHARDS = "fineweb-edu", 2
dataset.main()
"""


@pytest.mark.parametrize("number", range(1, 7))  # the manifest, three shards, the manifest, checked.json
def test_a_download_goes_on_wherever_it_was_killed(host, files, base_dir, number):
    command = [sys.executable, "-c", KILLED.replace("NUMBER", str(number))]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NANOTRAIN_DIR": str(base_dir)}, timeout=60)
    assert done.returncode == -signal.SIGKILL
    folder = base_dir / "data" / "fineweb-edu"
    left = [name for name in contents(folder) if name.startswith("shard_")]
    get_set(folder)
    found = contents(folder)
    assert {name: found[name] for name in found if name.startswith("shard_")} == files
    assert dataset.verify(folder) == []
    assert "coming" not in dataset.read_manifest(folder)
    assert len(left) == min(number - 2, 3) if number > 1 else not left


def test_a_download_that_fails_where_its_shards_were_deleted_leaves_no_folder(host, folder):
    get_set(folder)
    for path in folder.glob("shard_*.parquet"):
        path.unlink()
    host.script = {}
    with pytest.raises(DataError, match="3 of 3 shards are missing"):
        get_set(folder)
    assert not folder.exists()


def test_the_size_is_told_before_the_first_shard_is_asked_for(host, files, folder, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e12))
    manifest = hub_manifest(files)
    for entry in manifest["shards"]:
        entry["bytes"] = 1_500_000_000
    serve_manifest(host, manifest)
    printed = []

    def listen(connection):
        printed.append(capsys.readouterr().out)
        connection.sendall(reply(status=404))

    host.script[PREFIX + ONE] = [listen]
    with pytest.raises(DataError):
        get_set(folder)
    assert printed[0].startswith("fineweb-edu (licence: ODC-By): 3 of 3 shards to fetch from 127.0.0.1:")
    assert ", about 4.50 GB, into " in printed[0]


def test_one_bar_counts_the_bytes(host, files, folder, capfd):
    serve_manifest(host, hub_manifest(files))
    get_set(folder)
    last = capfd.readouterr().err.strip().splitlines()[-1].rpartition("\r")[2]
    total = f"{sum(map(len, files.values())) / 1000:.1f}k"
    assert last.startswith("download: 100%")
    assert f" {total}/{total} " in last


# ---- the command ----


def set_flags(monkeypatch, **flags):
    for name, value in flags.items():
        monkeypatch.setattr(dataset, name, value)


def test_another_host_is_fetched_from_by_its_url(start_host, files, monkeypatch, base_dir, capsys):
    host = start_host()
    host.script = {"/a/shard_00000.parquet": [reply(files[ONE])], "/a/shard_00002.parquet": [reply(files[VALIDATION])]}
    host.script["/a/shard_00001.parquet"] = [reply(files[ALL[1]])]
    set_flags(monkeypatch, BASE_URL=f"{host.url}/a/", NUM_SHARDS=3, NAME="mine")
    dataset.main()
    folder = base_dir / "data" / "mine"
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet"]
    assert shards_in(folder) == dict(zip(names, (files[name] for name in ALL), strict=True))
    manifest = dataset.read_manifest(folder)
    assert (manifest["dataset"], manifest["validation"]) == ("mine", names[-1])
    assert dataset.verify(folder) == []
    assert "3 of 3 shards to fetch" in capsys.readouterr().out


def test_a_host_that_will_not_tell_sizes_beforehand_is_no_trouble(start_host, files, monkeypatch, base_dir):
    host = start_host()
    host.script = {"/shard_00000.parquet": [b"", reply(files[ONE], length=False)]}
    host.script["/shard_00001.parquet"] = [reply(files[VALIDATION])]
    set_flags(monkeypatch, BASE_URL=host.url, NUM_SHARDS=2, NAME="mine")
    dataset.main()
    assert shards_in(base_dir / "data" / "mine") == {ONE: files[ONE], "shard_00001.parquet": files[VALIDATION]}


Wrong = namedtuple("Wrong", "flags says")


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong({"DATASET": "fineweb"}, r"--dataset=fineweb: choose one of stdlib, fineweb-edu, climbmix"),
        Wrong({"BASE_URL": "https://host/x", "NAME": "mine"}, r"--base-url needs --num-shards"),
        Wrong({"BASE_URL": "https://host/x", "NAME": "mine", "NUM_SHARDS": 1}, r"--base-url needs --num-shards"),
        Wrong({"BASE_URL": "https://host/x", "NUM_SHARDS": 3}, r"--base-url needs a name .*--name=mine"),
        Wrong({"BASE_URL": "https://host/x", "NUM_SHARDS": 3, "NAME": "../x"}, r"data set name '../x'"),
        Wrong({"BASE_URL": "host/x", "NUM_SHARDS": 3, "NAME": "mine"}, r"must be given as https://host/path"),
        Wrong({"BASE_URL": "https://host/x", "DATASET": "stdlib"}, r"one of them at a time"),
        Wrong({"DATASET": "fineweb-edu"}, r"-n 0: fineweb-edu has 1 to 1822 train shards"),
        Wrong({"DATASET": "fineweb-edu", "TRAIN_SHARDS": -1}, r"-n -1: fineweb-edu has 1 to 1822 train shards"),
        Wrong({"DATASET": "fineweb-edu", "TRAIN_SHARDS": 1823}, r"-n 1823: fineweb-edu has 1 to 1822 train shards"),
    ],
    ids=str,
)
def test_wrong_flags_are_refused_with_what_would_be_right(monkeypatch, base_dir, wrong):
    set_flags(monkeypatch, **wrong.flags)
    with pytest.raises(UserError, match=wrong.says) as caught:
        dataset.main()
    assert caught.value.exit_code == 2
    assert not paths.base_dir().exists()
