"""Downloads from a hostile loopback host: a file is the source's bytes in the end, or it is named and not there."""

import contextlib
import email.utils
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from types import SimpleNamespace

import pytest
import requests
import urllib3
from conftest import ROOT, make_shards

from nanotrain import dataset, download, paths
from nanotrain.errors import DataError, UserError

SOURCE = dataset.SOURCES["fineweb-edu"]
PREFIX = f"/{SOURCE.url}/"
ALL = ["shard_00000.parquet", "shard_00001.parquet", "shard_01822.parquet"]
ONE, TWO, VALIDATION = ALL


class Host:
    """An HTTP host on raw sockets. script[path] lists the answers to the next requests of that path, the last of which
    is repeated: bytes, or a function that is given the socket. What is not in the script is a 404.
    """

    def __init__(self):
        self.script, self.seen = {}, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=[self.listener.accept()[0]], daemon=True).start()

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
        return [path.rpartition("/")[2] for path, _ in self.seen]

    def close(self):
        with contextlib.suppress(OSError):  # closed before
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def reply(body=b"", status=200, length=None, **headers):
    """The bytes of an answer; `length` is the Content-Length that it claims, False for none."""
    lines = [f"HTTP/1.1 {status} x", "Connection: close"]
    if length is not False:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Pauses:
    """An answer in two parts: `arrived` is set in the middle, and it goes on when `go` is."""

    def __init__(self, body):
        self.whole, self.arrived, self.go = reply(body), threading.Event(), threading.Event()

    def __call__(self, connection):
        connection.sendall(self.whole[:-1000])
        self.arrived.set()
        self.go.wait(20)
        connection.sendall(self.whole[-1000:])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: bytes} of two train shards and a validation shard."""
    folder = make_shards(tmp_path_factory.mktemp("source"))
    (folder / "shard_00002.parquet").rename(folder / VALIDATION)
    return contents(folder)


@pytest.fixture
def start_host():
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(Host()))


@pytest.fixture
def host(start_host, files, monkeypatch):
    """A host of the shards, which is Hugging Face to the code under test; retries come without a pause."""
    host = start_host()
    host.script = {PREFIX + name: [reply(body)] for name, body in files.items()}
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(download, "RETRY", urllib3.Retry(4))
    return host


@pytest.fixture
def folder(base_dir):
    return base_dir / "data" / "fineweb-edu"


def contents(folder):
    """{name: bytes} of everything in a folder, hidden files too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def shards_in(folder):
    """contents() without the .json files of a data set; anything else, as a temporary file, stays in."""
    return {name: data for name, data in contents(folder).items() if not name.endswith(".json")}


def sha256(body):
    return hashlib.sha256(body).hexdigest()


def item(host, name, body=None):
    """The Item of a shard, with size and hash if `body` is given."""
    return download.Item(name, host.url + PREFIX + name, body and len(body), body and sha256(body))


def get(items, folder, check=dataset.open_shard, on_bytes=lambda count: None, **options):
    return download.fetch_all(items, folder, check, on_bytes, **options)


def get_set(folder, train_shards=2):
    dataset.fetch("fineweb-edu", SOURCE, train_shards, folder)


def serve_manifest(host, files, **changes):
    entries = [{"name": name, "bytes": len(body), "sha256": sha256(body)} for name, body in files.items()]
    manifest = {"validation": VALIDATION, "shards": entries, **changes}
    host.script[PREFIX + "manifest.json"] = [reply(json.dumps(manifest).encode())]


def until(condition):
    """Wait for another thread or process, at most some seconds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ---- a hostile host ----


def reset(body):
    """Part of an answer, then a TCP reset."""

    def answer(connection):
        connection.sendall(reply(body[:2000], length=len(body)))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def drip(body):
    def answer(connection):
        connection.sendall(reply(length=len(body)))
        for byte in body[:40]:
            connection.sendall(bytes([byte]))
            time.sleep(0.01)

    return answer


def flipped(body):
    """`body` with one bit changed in the first page: a parquet file that opens, with another text."""
    return body[:40] + bytes([body[40] ^ 1]) + body[41:]


def chunked(body, part):
    return reply(f"{len(body):x}\r\n".encode() + part, length=False, Transfer_Encoding="chunked")


FAULTS = {  # of a body: (the answer, whether only size and hash can tell, a word of the reason)
    "503": (lambda body: reply(status=503), False, "answers 503"),
    "429": (lambda body: reply(status=429, Retry_After=0), False, "answers 429"),
    "no answer": (lambda body: b"", False, "connection broke"),
    "no HTTP": (lambda body: b"nonsense\r\n\r\n", False, "connection broke"),
    "reset": (reset, False, "connection broke"),
    "cut": (lambda body: reply(body[:2000], length=len(body)), False, "connection broke"),
    "cut chunk": (lambda body: chunked(body, body[:2000]), False, "connection broke"),
    "no last chunk": (lambda body: chunked(body, body + b"\r\n"), False, "connection broke"),
    "cut without a length": (lambda body: reply(body[:2000], length=False), False, "2000"),
    "too long": (lambda body: reply(body + b"x"), True, "of"),
    "empty": (lambda body: reply(), False, "0 of"),
    "a page": (lambda body: reply(b"<html>", Content_Type="text/html; charset=utf-8"), False, "a web page"),
    "JSON": (lambda body: reply(b'{"error": 1}'), False, "12"),
    "a flipped bit": (lambda body: reply(flipped(body)), True, "SHA-256"),
    "slow": (drip, False, "slower than"),
}


@pytest.mark.parametrize(("answer", "needs_hash", "reason"), FAULTS.values(), ids=FAULTS)
def test_after_a_fault_the_file_is_whole_or_named(host, files, folder, monkeypatch, answer, needs_hash, reason):
    monkeypatch.setattr(download, "SLOW_SECONDS", 0.1)
    body, counts = files[ONE], []
    wanted = item(host, ONE, body if needs_hash else None)
    host.script[PREFIX + ONE] = [answer(body), answer(body), reply(body)]
    assert get([wanted], folder, on_bytes=counts.append) == ({ONE: sha256(body)}, {})
    assert (contents(folder), sum(counts), host.asked()) == ({ONE: body}, len(body), [ONE] * 3)
    shutil.rmtree(folder)
    host.script[PREFIX + ONE] = [answer(body)]
    done, failed = get([wanted, item(host, TWO)], folder)
    assert (list(done), list(failed)) == ([TWO], [ONE])
    assert reason in failed[ONE]
    assert "(5 attempts)" in failed[ONE]
    assert (contents(folder), host.asked().count(ONE)) == ({TWO: files[TWO]}, 3 + 5)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry_After": "7"}, 7),
        ({"Retry_After": email.utils.formatdate(time.time() + 3600, usegmt=True)}, 120),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 55),
        ({"RateLimit": '"resolvers";r=2999;t=55'}, 0),
        ({"Retry_After": "soon"}, 0),
        ({"Retry_After": "-5"}, 0),
    ],
)
def test_a_host_may_ask_for_a_pause(host, files, folder, monkeypatch, headers, seconds):
    pauses = []
    monkeypatch.setattr(
        download._Download, "wait", lambda self, least: pauses.append(max(self.open_at - time.monotonic(), 0))
    )
    host.script[PREFIX + ONE] = [reply(status=429, **headers), reply(files[ONE])]
    assert get([item(host, ONE)], folder)[1] == {}
    assert pauses == [0, pytest.approx(seconds, abs=2)]


def test_a_pause_that_the_host_asks_for_holds_for_every_worker(host, files, folder):
    times = {}

    def note(name, wait, answer):
        def note_time(connection):
            time.sleep(wait)
            times[name] = time.monotonic()
            connection.sendall(answer)

        return note_time

    host.script[PREFIX + ONE] = [note(ONE, 0, reply(status=429, Retry_After=1)), reply(files[ONE])]
    host.script[PREFIX + TWO] = [note(TWO, 0.3, reply(files[TWO]))]
    host.script[PREFIX + VALIDATION] = [note(VALIDATION, 0, reply(files[VALIDATION]))]
    assert get([item(host, name) for name in ALL], folder, workers=2)[1] == {}
    assert contents(folder) == files
    assert times[VALIDATION] - times[ONE] > 0.9, "the worker of the second file waited too"


@pytest.mark.parametrize(("status", "says"), [(401, "set HF_TOKEN"), (403, "set HF_TOKEN"), (404, "404"), (416, "416")])
def test_a_refusal_is_reported_after_one_request(host, folder, status, says):
    host.script[PREFIX + ONE] = [reply(status=status)]
    assert says in get([item(host, ONE)], folder)[1][ONE]
    assert (contents(folder), host.asked()) == ({}, [ONE])


# ---- redirects, secrets and proxies ----


def test_size_and_hash_are_those_of_the_first_host(host, start_host, files, folder):
    body, cdn = files[ONE], start_host()
    linked = {"X_Linked_Size": len(body), "X_Linked_Etag": f'"{sha256(body)}"'}
    host.script[PREFIX + ONE] = [reply(status=302, Location=f"{cdn.url}/x", **linked)]
    wrong = flipped(body)
    for answer in (reply(wrong, X_Linked_Etag=f'"{sha256(wrong)}"'), reply(body[:1000], length=False)):
        cdn.script["/x"] = [answer]
        assert get([item(host, ONE)], folder, check=lambda path: None)[0] == {}
        assert contents(folder) == {}
    cdn.script["/x"] = [reply(body)]
    assert get([item(host, ONE)], folder) == ({ONE: sha256(body)}, {})
    assert download.size_of(item(host, ONE), None) == len(body)


def test_a_token_goes_to_its_own_host_alone_and_netrc_nowhere(host, start_host, files, folder, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    other = start_host()
    other.script["/signed"] = [reply(files[ONE])]
    host.script[PREFIX + ONE] = [reply(status=302, Location=PREFIX + "moved")]
    host.script[PREFIX + "moved"] = [reply(status=302, Location=f"{other.url}/signed")]
    for token, sent in (("hf_secret", "Bearer hf_secret"), (None, None)):
        host.seen.clear()
        assert get([item(host, ONE)], folder, token=token)[1] == {}
        assert [headers.get("Authorization") for _, headers in host.seen] == [sent] * 2
    assert [headers.get("Authorization") for _, headers in other.seen] == [None] * 2


def test_the_token_of_hugging_face_is_not_for_other_hosts(host, start_host, files, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")  # as read from a file
    get_set(folder)
    assert [headers["Authorization"] for _, headers in host.seen] == ["Bearer hf_secret"] * 4
    other = start_host()
    other.script = {f"/{ONE}": [reply(files[ONE])], f"/{TWO}": [reply(files[VALIDATION], length=False)]}
    dataset.fetch("mine", dataset.Source(other.url, 2, 0, "?"), 1, folder.with_name("mine"))
    assert "Authorization" not in str(other.seen)
    assert shards_in(folder.with_name("mine")) == {ONE: files[ONE], TWO: files[VALIDATION]}


@pytest.mark.parametrize(
    ("start", "target"),
    [
        ("https://127.0.0.1/x", "HOST"),
        ("http://127.0.0.1/x", "http://example.com/x"),
        ("http://127.0.0.1/x", "https://me:password@example.com/x"),
        ("http://127.0.0.1/x", "file:///etc/passwd"),
    ],
)
def test_a_redirect_to_less_than_https_is_refused(host, folder, monkeypatch, start, target):
    def redirect(adapter, request, **options):  # instead of a host with a certificate
        response = requests.Response()
        response.status_code, response.request, response.url = 302, request, request.url
        response.raw = io.BytesIO()
        response.headers["Location"] = target.replace("HOST", host.url + PREFIX + ONE)
        sent.append(request.url)
        return response

    sent = []
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", redirect)
    _, failed = get([download.Item(ONE, start)], folder)
    assert "without https" in failed[ONE]
    assert (contents(folder), sent) == ({}, [start])


@pytest.mark.parametrize("url", ["http://example.com/x", "ftp://127.0.0.1/x", "https://me@host/x", "https:///x"])
def test_a_host_without_https_or_with_a_password_is_refused(folder, url):
    with pytest.raises(UserError, match="https://host/path"):
        dataset.fetch("mine", dataset.Source(url, 2, 0, "?"), 1, folder)
    assert not folder.exists()


def test_a_proxy_of_the_environment_is_used(start_host, files, folder, monkeypatch):
    proxy, url = start_host(), "http://localhost:1/x"
    proxy.script[url] = [reply(files[ONE])]
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "")
    assert get([download.Item(ONE, url)], folder)[1] == {}
    assert contents(folder) == {ONE: files[ONE]}


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        reply(status=500),
        reply(status=410),
        reply(b"<html>"),
        b"HTTP/1.1 403 x\r\nno header at all\r\nA: b\r\n\r\n",
        b"HTTP/1.1 302 x\r\nLocation: http://[sig=CANARY\r\n\r\n",
        b"HTTP/1.1 302 x\r\nLocation: https://%s/?sig=CANARY\r\n\r\n" % (b"a" * 300),
        "closed",
    ],
)
def test_no_error_shows_a_signed_url_or_a_token(host, start_host, folder, monkeypatch, capfd, caplog, answer):
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY")
    signed = start_host()
    signed.script["/x?sig=CANARY"] = [answer]
    if answer == "closed":
        signed.close()
    host.script[PREFIX + ONE] = [reply(status=302, Location=f"{signed.url}/x?sig=CANARY")]
    with pytest.raises(DataError, match=f"1 of 3 shards are missing .{ONE}") as caught:
        get_set(folder)
    printed = capfd.readouterr()
    told = printed.out + printed.err + caplog.text + "".join(traceback.format_exception(caught.value))
    assert "CANARY" not in told
    assert b"CANARY" not in b"".join(contents(folder).values())
    assert sorted(shards_in(folder)) == ALL[1:]


# ---- the disk, and the end of a process ----


def test_a_disk_that_fills_up_ends_the_download(host, files, folder, monkeypatch):
    monkeypatch.setattr(download, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_500_000))
    done, failed = get([item(host, name) for name in ALL], folder, workers=1)
    assert failed == {ONE: f"the disk is full: 2.5 MB free in {folder}", TWO: "not tried", VALIDATION: "not tried"}
    assert (done, contents(folder), host.asked()) == ({}, {}, [ONE])


def test_a_data_set_that_does_not_fit_is_not_begun(host, folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=299_000_000))
    with pytest.raises(DataError, match=r"300.0 MB needed, 299.0 MB free") as caught:
        get_set(folder)
    assert (caught.value.exit_code, host.asked(), folder.exists()) == (6, ["manifest.json"], False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_download_leaves_no_piece_and_the_next_one_goes_on(host, files, folder, number):
    middle = {name: Pauses(files[name]) for name in (ONE, TWO)}
    for name in middle:
        host.script[PREFIX + name] = [middle[name], reply(files[name])]
    command = [sys.executable, "-m", "nanotrain.dataset", "-n", "2", "--dataset=fineweb-edu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        for answer in middle.values():
            assert answer.arrived.wait(60)
        until(lambda: VALIDATION in contents(folder) and len(list(folder.glob("*.part"))) == 2)
        begin = time.monotonic()
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        assert time.monotonic() - begin < 3
    finally:
        process.kill()
        process.wait()
    assert b"Traceback" not in errors
    if number == signal.SIGKILL:
        assert len(list(folder.glob("*.part"))) == 2
    else:
        assert process.returncode == 130
        assert list(folder.glob("*.part")) == []
    assert sorted(path.name for path in folder.glob("shard*")) == [VALIDATION]
    (living := folder / f".x.{socket.gethostname()}.{os.getppid()}.part").touch()  # what another download writes
    host.seen.clear()
    get_set(folder)
    assert sorted(host.asked()) == ["manifest.json", ONE, TWO]
    assert shards_in(folder) == {**files, living.name: b""}
    assert dataset.verify(folder) == []


def test_the_same_command_again_fetches_only_what_is_missing(host, files, folder, run_script):
    answers, command = host.script.pop(PREFIX + TWO), ("nanotrain.dataset", "-n", "2", "--dataset=fineweb-edu")
    done = run_script(*command)
    assert done.returncode == 6
    assert f"1 of 3 shards are missing ({TWO})" in done.stderr
    assert shards_in(folder) == {name: files[name] for name in (ONE, VALIDATION)}
    host.script[PREFIX + TWO] = answers
    host.seen.clear()
    assert run_script(*command).returncode == 0
    assert host.asked() == ["manifest.json", TWO]
    assert (shards_in(folder), dataset.verify(folder)) == (files, [])


def test_an_unreachable_host_is_reported_soon_with_the_way_to_do_without(start_host, folder, monkeypatch):
    (host := start_host()).close()
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"127.0.0.1:\d+: .*cannot be reached.*2 attempts.*--dataset=stdlib"):
        get_set(folder, 50)
    assert time.monotonic() - begin < 2
    assert not folder.exists()


# ---- data sets ----


@pytest.mark.parametrize("harm", [flipped, lambda body: body[:-1], lambda body: b""])
@pytest.mark.parametrize("hashed_by", ["the host", "us"])
def test_a_bad_shard_in_place_is_fetched_again(host, files, folder, harm, hashed_by):
    if hashed_by == "the host":
        serve_manifest(host, files)
    get_set(folder)
    host.seen.clear()
    (folder / TWO).write_bytes(harm(files[TWO]))
    get_set(folder)
    assert (shards_in(folder), host.asked()) == (files, ["manifest.json", TWO])


@pytest.mark.parametrize(
    "name", ["../shard_00000.parquet", "/shard_0.parquet", "shard_0.parquet\n", "manifest.json", 7]
)
@pytest.mark.parametrize("place", ["validation", "shards"])
def test_a_hostile_name_in_the_manifest_of_a_host_is_refused(host, files, folder, name, place):
    entry = {"name": name, "bytes": 9, "sha256": "0" * 64}
    serve_manifest(host, files, **{place: name if place == "validation" else [entry]})
    with pytest.raises(DataError, match=r"the host's manifest.json is broken"):
        get_set(folder)
    assert (host.asked(), folder.exists()) == (["manifest.json"], False)


@pytest.mark.parametrize("page", [b"log in", b"[1]", b"null", b"\xff", b"[" * 100_000, b""])
def test_a_page_in_place_of_the_manifest_is_reported(host, folder, page):
    host.script[PREFIX + "manifest.json"] = [reply(page)]
    with pytest.raises(DataError, match=r"manifest.json from .*--dataset=stdlib"):
        get_set(folder)
    assert host.asked() == ["manifest.json"] * 5


def test_the_validation_shard_of_a_folder_never_becomes_a_train_shard(host, files, folder):
    get_set(folder)
    before, more = contents(folder), "shard_01823.parquet"
    serve_manifest(host, {**files, more: files[ONE]}, validation=more)
    host.script[PREFIX + more] = [reply(files[ONE])]
    with pytest.raises(UserError, match=f"{VALIDATION}, which would become a train shard"):
        get_set(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("left", [("manifest.json", '{"docs": 3}'), ("notes.txt", "mine")])
def test_what_a_user_has_in_the_folder_stays(host, folder, left):
    (make_shards(folder) / left[0]).write_text(left[1])
    before = contents(folder)
    with pytest.raises(UserError, match=str(folder)) as caught:
        get_set(folder)
    assert (caught.value.exit_code, contents(folder)) == (2, before)


def test_another_host_is_fetched_from_by_its_url(start_host, files, monkeypatch, base_dir):
    host = start_host()
    host.script = {f"/a/shard_0000{n}.parquet": [reply(files[name])] for n, name in enumerate(ALL)}
    for name, value in {"BASE_URL": f"{host.url}/a/", "NUM_SHARDS": 3, "NAME": "mine"}.items():
        monkeypatch.setattr(dataset, name, value)
    dataset.main()
    assert list(shards_in(base_dir / "data" / "mine").values()).sort() == list(files.values()).sort()
    assert dataset.read_manifest(base_dir / "data" / "mine")["validation"] == "shard_00002.parquet"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"DATASET": "fineweb"}, r"--dataset=fineweb: choose one of"),
        ({"BASE_URL": "https://host/x", "NAME": "mine", "NUM_SHARDS": 1}, r"--num-shards"),
        ({"BASE_URL": "https://host/x", "NUM_SHARDS": 3}, r"--name=mine"),
        ({"BASE_URL": "https://host/x", "NUM_SHARDS": 3, "NAME": "../x"}, r"'../x'"),
        ({"BASE_URL": "https://host/x", "DATASET": "stdlib"}, r"one of them at a time"),
        ({"DATASET": "fineweb-edu", "TRAIN_SHARDS": 1823}, r"1 to 1822 train shards"),
    ],
)
def test_wrong_flags_are_refused_with_what_would_be_right(monkeypatch, flags, says):
    for name, value in flags.items():
        monkeypatch.setattr(dataset, name, value)
    with pytest.raises(UserError, match=says):
        dataset.main()
    assert not paths.base_dir().exists()
