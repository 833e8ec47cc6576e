"""Downloads from a hostile loopback host: a file is the source's bytes in the end, or it is named and not there."""

import contextlib
import email.utils
import hashlib
import http.server
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

from nanotrain import dataset, download
from nanotrain.errors import DataError, UserError

SOURCE = dataset.SOURCES["fineweb-edu"]
PREFIX = f"/{SOURCE.url}/"
ALL = ["shard_00000.parquet", "shard_00001.parquet", "shard_01822.parquet"]
ONE, TWO, VALIDATION = ALL
COMMAND = ("nanotrain.dataset", "-n", "2", "--dataset=fineweb-edu")


class Host(http.server.ThreadingHTTPServer):
    """script[path] lists the answers to that path (bytes, or a function that is given the socket), the last of which is
    repeated; any other path is a 404.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.url = {}, [], f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def asked(self):
        """The names of the files that were asked for, in order."""
        return [path.rpartition("/")[2] for path, _ in self.seen]

    def handle_error(self, *arguments):
        """Say nothing of a client that went away."""

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        answers = self.server.script.get(self.path, [reply(status=404)])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        answer(self.connection) if callable(answer) else self.wfile.write(answer)

    def log_message(self, *arguments):
        """Nothing."""


def reply(body=b"", status=200, length=None, **headers):
    """The bytes of an answer; `length` is the Content-Length that it claims, False for none."""
    headers = {"Connection": "close", "Content-Length": len(body) if length is None else length, **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items() if value is not False]
    return "\r\n".join([f"HTTP/1.1 {status} x", *lines, "", ""]).encode() + body


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: bytes} of two train shards and a validation shard."""
    return dict(zip(ALL, contents(make_shards(tmp_path_factory.mktemp("source"))).values(), strict=True))


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
    """{name: bytes} of everything in a folder, hidden files too, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


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


# ---- a hostile host ----


def reset(body):
    def answer(connection):
        connection.sendall(reply(body[:2000], length=len(body)))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    return answer


def drip(body):
    def answer(connection):
        connection.sendall(reply(length=len(body)))
        for place in range(40):
            connection.sendall(body[place : place + 1])
            time.sleep(0.01)

    return answer


def flipped(body):
    """`body` with one bit changed in the first page: a parquet file that opens, with another text."""
    return body[:40] + bytes([body[40] ^ 1]) + body[41:]


def chunked(body, part):
    return reply(f"{len(body):x}\r\n".encode() + part, length=False, Transfer_Encoding="chunked")


FAULTS = {  # of a body: (the answer, a word of the reason, whether only size and hash can tell)
    "503": (lambda body: reply(status=503), "answers 503", False),
    "429": (lambda body: reply(status=429, Retry_After=0), "answers 429", False),
    "no answer": (lambda body: b"", "connection broke", False),
    "no HTTP": (lambda body: b"nonsense\r\n\r\n", "connection broke", False),
    "reset": (reset, "connection broke", False),
    "cut": (lambda body: reply(body[:2000], length=len(body)), "connection broke", False),
    "cut chunk": (lambda body: chunked(body, body[:2000]), "connection broke", False),
    "no last chunk": (lambda body: chunked(body, body + b"\r\n"), "connection broke", False),
    "cut, no length": (lambda body: reply(body[:2000], length=False), "readable", False),
    "too long": (lambda body: reply(body + b"x"), "of", True),
    "empty": (lambda body: reply(), "0 of", False),
    "a page": (lambda body: reply(b"<html>", Content_Type="text/html; charset=utf-8"), "a web page", False),
    "JSON": (lambda body: reply(b'{"error": 1}'), "readable", False),
    "a flipped bit": (lambda body: reply(flipped(body)), "SHA-256", True),
    "slow": (drip, "slower than", False),
}


@pytest.mark.parametrize(("answer", "reason", "known"), FAULTS.values(), ids=FAULTS)
def test_after_a_fault_the_file_is_whole_or_named(host, files, folder, monkeypatch, answer, reason, known):
    if answer is drip:
        monkeypatch.setattr(download, "SLOW_SECONDS", 0.1)
    body, counts = files[ONE], []
    items = [item(host, ONE, body if known else None), item(host, TWO)]
    host.script[PREFIX + ONE] = [answer(body), answer(body), reply(body)]
    assert get(items[:1], folder, on_bytes=counts.append) == ({ONE: sha256(body)}, {})
    assert (contents(folder), sum(counts), host.asked()) == ({ONE: body}, len(body), [ONE] * 3)
    shutil.rmtree(folder)
    host.script[PREFIX + ONE] = [answer(body)]
    done, failed = get(items, folder)
    assert (list(done), list(failed), contents(folder)) == ([TWO], [ONE], {TWO: files[TWO]})
    assert reason in failed[ONE]
    assert (failed[ONE].endswith("(5 attempts)"), host.asked().count(ONE)) == (True, 3 + 5)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry_After": "7"}, 7),
        ({"Retry_After": email.utils.formatdate(time.time() + 3600, usegmt=True)}, 120),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 55),
        ({"RateLimit": '"resolvers";r=2999;t=55'}, 0),
        ({"Retry_After": "soon"}, 0),
    ],
)
def test_a_host_may_ask_for_a_pause(host, files, folder, monkeypatch, headers, seconds):
    def wait(self, least):
        pauses.append(max(self.open_at - time.monotonic(), 0))

    pauses = []
    monkeypatch.setattr(download._Download, "wait", wait)
    host.script[PREFIX + ONE] = [reply(status=429, **headers), reply(files[ONE])]
    assert get([item(host, ONE)], folder)[1] == {}
    assert pauses == [0, pytest.approx(seconds, abs=2)]


def test_a_pause_that_the_host_asks_for_holds_for_every_worker(host, files, folder):
    def note(name, answer, wait=0.0):
        def note_time(connection):
            time.sleep(wait)
            times[name] = time.monotonic()
            connection.sendall(answer)

        return note_time

    times = {}
    host.script[PREFIX + ONE] = [note(ONE, reply(status=429, Retry_After=1)), reply(files[ONE])]
    host.script[PREFIX + TWO] = [note(TWO, reply(files[TWO]), 0.3)]
    host.script[PREFIX + VALIDATION] = [note(VALIDATION, reply(files[VALIDATION]))]
    assert get([item(host, name) for name in ALL], folder, workers=2)[1] == {}
    assert contents(folder) == files
    assert times[VALIDATION] - times[ONE] > 0.9, "the worker of the second file waited too"


@pytest.mark.parametrize(("status", "says"), [(401, "set HF_TOKEN"), (403, "set HF_TOKEN"), (404, "404"), (416, "416")])
def test_a_refusal_is_reported_after_one_request(host, folder, status, says):
    host.script[PREFIX + ONE] = [reply(status=status)]
    assert says in get([item(host, ONE)], folder)[1][ONE]
    assert (contents(folder), host.asked()) == ({}, [ONE])


def test_an_unreachable_host_is_reported_soon_with_the_way_to_do_without(start_host, folder, monkeypatch):
    (host := start_host()).close()
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"127.0.0.1:\d+: .*cannot be reached.*2 attempts.*--dataset=stdlib"):
        get_set(folder)
    assert time.monotonic() - begin < 2
    assert not folder.exists()


# ---- redirects, secrets and proxies ----


def test_size_and_hash_are_those_of_the_first_host(host, start_host, files, folder):
    body, wrong, cdn = files[ONE], flipped(files[ONE]), start_host()
    linked = {"X_Linked_Size": len(body), "X_Linked_Etag": f'"{sha256(body)}"'}
    host.script[PREFIX + ONE] = [reply(status=302, Location=f"{cdn.url}/x", **linked)]
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


@pytest.mark.parametrize(
    ("start", "target"),
    [
        ("https://127.0.0.1/x", "http://127.0.0.1/y"),
        ("http://127.0.0.1/x", "http://example.com/y"),
        ("http://127.0.0.1/x", "https://me:password@example.com/y"),
        ("http://127.0.0.1/x", "file:///etc/passwd"),
    ],
)
def test_a_redirect_to_less_than_https_is_refused(folder, monkeypatch, start, target):
    def send(adapter, request, **options):  # instead of a host with a certificate
        sent.append(request.url)
        response = requests.Response()
        response.status_code, response.request, response.raw = 302, request, io.BytesIO()
        response.headers["Location"] = target
        return response

    sent = []
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    assert "without https" in get([download.Item(ONE, start)], folder)[1][ONE]
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
    assert get([download.Item(ONE, url)], folder) == ({ONE: sha256(files[ONE])}, {})


LEAKS = {
    "no answer": b"",
    "500": reply(status=500),
    "410": reply(status=410),
    "no header": b"HTTP/1.1 403 x\r\nno header at all\r\nA: b\r\n\r\n",
    "no URL": reply(status=302, Location="http://[sig=CANARY"),
    "no host": reply(status=302, Location=f"https://{'a' * 300}/?sig=CANARY"),
    "closed": None,
}


@pytest.mark.parametrize("answer", LEAKS.values(), ids=LEAKS)
def test_no_error_shows_a_signed_url_or_a_token(host, start_host, folder, monkeypatch, capfd, caplog, answer):
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY")
    signed = start_host()
    signed.script["/x?sig=CANARY"] = [answer]
    if answer is None:
        signed.close()
    host.script[PREFIX + ONE] = [reply(status=302, Location=f"{signed.url}/x?sig=CANARY")]
    with pytest.raises(DataError, match=f"1 of 3 shards are missing .{ONE}") as caught:
        get_set(folder)
    told = [*capfd.readouterr(), caplog.text, *traceback.format_exception(caught.value), str(contents(folder))]
    assert "CANARY" not in "".join(told)
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
    with pytest.raises(DataError, match=r"300.0 MB needed, 299.0 MB free"):
        get_set(folder)
    assert (host.asked(), folder.exists()) == (["manifest.json"], False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_download_leaves_no_piece_and_the_next_one_goes_on(host, files, folder, number):
    def stall(connection):
        connection.sendall(reply(files[ONE][:-1000], length=len(files[ONE])))
        end.wait(60)

    end, deadline = threading.Event(), time.monotonic() + 60
    host.script |= {PREFIX + name: [stall, reply(files[name])] for name in (ONE, TWO)}
    process = subprocess.Popen([sys.executable, "-m", *COMMAND], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        while not (folder / VALIDATION).exists() or len(list(folder.glob(".*.part"))) != 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        begin = time.monotonic()
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        assert time.monotonic() - begin < 3
    finally:
        process.kill()
        end.set()
    killed = number == signal.SIGKILL
    assert (process.returncode, b"Traceback" in errors) == (-number if killed else 130, False)
    assert len(list(folder.glob(".*.part"))) == 2 * killed
    assert [path.name for path in folder.glob("shard*")] == [VALIDATION]
    (living := folder / f".x.{socket.gethostname()}.{os.getppid()}.part").touch()  # another download writes it
    host.seen.clear()
    get_set(folder)
    assert sorted(host.asked()) == ["manifest.json", ONE, TWO]
    assert (shards_in(folder), dataset.verify(folder)) == ({**files, living.name: b""}, [])


def test_the_same_command_again_fetches_only_what_is_missing(host, files, folder, run_script):
    answers = host.script.pop(PREFIX + TWO)
    done = run_script(*COMMAND, HF_TOKEN="hf_secret\n")  # as read from a file
    assert {headers["Authorization"] for _, headers in host.seen} == {"Bearer hf_secret"}
    assert (done.returncode, f"1 of 3 shards are missing ({TWO})" in done.stderr) == (6, True)
    assert shards_in(folder) == {name: files[name] for name in (ONE, VALIDATION)}
    host.script[PREFIX + TWO] = answers
    host.seen.clear()
    get_set(folder)
    assert host.asked() == ["manifest.json", TWO]
    assert (shards_in(folder), dataset.verify(folder)) == (files, [])


# ---- data sets ----


@pytest.mark.parametrize("hashed_by", ["the host", "us"])
def test_a_bad_shard_in_place_is_fetched_again(host, files, folder, hashed_by):
    if hashed_by == "the host":
        serve_manifest(host, files)
    get_set(folder)
    for bad in (flipped(files[TWO]), files[TWO][:-1], b""):
        host.seen.clear()
        (folder / TWO).write_bytes(bad)
        get_set(folder)
        assert (shards_in(folder), host.asked()) == (files, ["manifest.json", TWO])


@pytest.mark.parametrize(
    "name", ["../shard_00000.parquet", "/shard_0.parquet", "shard_0.parquet\n", "manifest.json", 7]
)
def test_a_hostile_name_in_the_manifest_of_a_host_is_refused(host, files, folder, name):
    for change in ({"validation": name}, {"shards": [{"name": name, "bytes": 9, "sha256": "0" * 64}]}):
        serve_manifest(host, files, **change)
        with pytest.raises(DataError, match=r"the host's manifest.json is broken"):
            get_set(folder)
        assert (set(host.asked()), folder.exists()) == ({"manifest.json"}, False)


@pytest.mark.parametrize("page", [b"log in", b"[1]", b"\xff", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(host, folder, page):
    host.script[PREFIX + "manifest.json"] = [reply(page)]
    with pytest.raises(DataError, match=r"manifest.json from .*--dataset=stdlib"):
        get_set(folder)


def test_the_validation_shard_of_a_folder_never_becomes_a_train_shard(host, files, folder):
    get_set(folder)
    before, more = contents(folder), "shard_01823.parquet"
    serve_manifest(host, {**files, more: files[ONE]}, validation=more)
    with pytest.raises(UserError, match=f"{VALIDATION}, which would become a train shard"):
        get_set(folder)
    assert contents(folder) == before


@pytest.mark.parametrize(("name", "text"), [("manifest.json", '{"docs": 3}'), ("notes.txt", "mine")])
def test_what_a_user_has_in_the_folder_stays(host, folder, name, text):
    (make_shards(folder) / name).write_text(text)
    before = contents(folder)
    with pytest.raises(UserError, match=str(folder)):
        get_set(folder)
    assert contents(folder) == before


def test_another_host_is_fetched_from_by_its_url_and_without_the_token(start_host, files, monkeypatch, base_dir):
    host, shards = start_host(), {f"shard_{number:05d}.parquet": files[name] for number, name in enumerate(ALL)}
    host.script = {f"/a/{name}": [reply(body, length=False)] for name, body in shards.items()}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name, value in {"BASE_URL": f"{host.url}/a/", "NUM_SHARDS": 3, "NAME": "mine"}.items():
        monkeypatch.setattr(dataset, name, value)
    dataset.main()
    assert shards_in(base_dir / "data" / "mine") == shards
    assert dataset.read_manifest(base_dir / "data" / "mine")["validation"] == max(shards)
    assert "Authorization" not in str(host.seen)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"BASE_URL": "https://host/x", "NAME": "mine", "NUM_SHARDS": 1}, "--num-shards"),
        ({"BASE_URL": "https://host/x", "NUM_SHARDS": 3}, "--name=mine"),
        ({"DATASET": "fineweb-edu", "TRAIN_SHARDS": 1823}, "1 to 1822"),
    ],
)
def test_wrong_flags_are_refused_with_what_would_be_right(monkeypatch, flags, says):
    for name, value in flags.items():
        monkeypatch.setattr(dataset, name, value)
    with pytest.raises(UserError, match=says):
        dataset.main()
