"""Downloads from a hostile loopback host: a file is the source's bytes in the end, or it is named and not there."""

import contextlib
import hashlib
import http.client
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from types import SimpleNamespace

import pytest
import urllib3
from conftest import ROOT, make_shards

from nanotrain import dataset, download
from nanotrain.errors import DataError, UserError

SOURCE = dataset.SOURCES["fineweb-edu"]
ALL = ["shard_00000.parquet", "shard_00001.parquet", "shard_01822.parquet"]
ONE, TWO, VALIDATION = ALL
COMMAND = ("nanotrain.dataset", "-n", "2", "--dataset=fineweb-edu")


class Host(http.server.ThreadingHTTPServer):
    """script[name] lists the answers to a URL that ends in /name (bytes, or a function that is given the socket), the
    last of which is repeated; any other is a 404. `seen` lists (name, headers) of what was asked for.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.answer)
        self.script, self.seen, self.url = {}, [], f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def answer(self, connection, address, server):
        with connection.makefile("rb") as file:
            name = file.readline().split()[1].decode().rpartition("/")[2]
            self.seen.append((name, http.client.parse_headers(file)))
        answers = self.script.get(name, [reply(status=404)])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        with contextlib.suppress(OSError):  # the client went away
            answer(connection) if callable(answer) else connection.sendall(answer)

    def asked(self):
        return [name for name, _ in self.seen]

    def close(self):
        self.shutdown()
        self.server_close()


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
    host.script = {name: [reply(body)] for name, body in files.items()}
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


def get(host, folder, *names, check=dataset.open_shard, token=None):
    return download.fetch_all({name: f"{host.url}/{name}" for name in names}, folder, check, abs, token)


def get_set(folder):
    dataset.fetch("fineweb-edu", SOURCE, 2, folder)


def flipped(body):
    """`body` with one bit changed in the first page: a parquet file that opens, with another text."""
    return body[:40] + bytes([body[40] ^ 1]) + body[41:]


def linked(body):
    """The headers with which Hugging Face tells size and hash of a file."""
    return {"X_Linked_Size": len(body), "X_Linked_Etag": f'"{sha256(body)}"'}


FAULTS = {  # of a body: (the answer, a word of the reason)
    "503": (lambda body: reply(status=503), "answers 503"),
    "no answer": (lambda body: b"", "incomplete response"),
    "cut": (lambda body: reply(body[:2000], length=len(body)), "incomplete response"),
    "cut, no length": (lambda body: reply(body[:2000], length=False, **linked(body)), "2000 of"),
    "a page": (lambda body: reply(b"<html>", Content_Type="text/html"), "not a readable parquet file"),
    "a flipped bit": (lambda body: reply(flipped(body), **linked(body)), "SHA-256"),
}


@pytest.mark.parametrize(("answer", "reason"), FAULTS.values(), ids=FAULTS)
def test_after_a_fault_the_file_is_whole_or_named(host, files, folder, answer, reason):
    answers = host.script[ONE] = [answer(files[ONE]), answer(files[ONE]), reply(files[ONE])]
    done, failed = get(host, folder, ONE, TWO)
    assert (done[ONE], failed, host.asked().count(ONE)) == (sha256(files[ONE]), {}, 3)
    assert contents(folder) == {ONE: files[ONE], TWO: files[TWO]}
    shutil.rmtree(folder)
    answers[:] = [answer(files[ONE])]
    done, failed = get(host, folder, ONE, TWO)
    assert (list(done), list(failed), contents(folder)) == ([TWO], [ONE], {TWO: files[TWO]})
    assert reason in failed[ONE]
    assert host.asked().count(ONE) == 3 + 5


@pytest.mark.parametrize(("asked", "seconds"), [("7", 7), ("3600", 120), ("soon", 0)])
def test_a_host_may_ask_for_a_pause(host, folder, files, monkeypatch, asked, seconds):
    class Clock(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            return self.is_set()

    pauses = []
    monkeypatch.setattr(download, "threading", SimpleNamespace(Event=Clock))
    host.script[ONE] = [reply(status=429, Retry_After=asked), reply(files[ONE])]
    assert get(host, folder, ONE)[1] == {}
    assert max(pauses) == pytest.approx(seconds, abs=2)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (reply(status=401), "set HF_TOKEN"),
        (reply(status=404), "404"),
        (reply(status=302, Location="http://example.com/x"), "without https"),
    ],
)
def test_a_refusal_is_reported_after_one_request(host, folder, answer, says):
    host.script[ONE] = [answer]
    assert says in get(host, folder, ONE)[1][ONE]
    assert (contents(folder), host.asked()) == ({}, [ONE])


def test_an_unreachable_host_is_reported_with_the_way_to_do_without(host, folder):
    host.close()
    with pytest.raises(DataError, match=r"3 of 3 .*127.0.0.1:\d+: .*HF_ENDPOINT=http://127.*DATASET=stdlib"):
        get_set(folder)
    assert shards_in(folder) == {}


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem", "/nowhere/ca.pem"),
        ("https_proxy", "socks5h://127.0.0.1:1", "socks5h://127.0.0.1:1"),
        ("HTTPS_PROXY", "http://me:CANARY@127.0.0.1:1", "127.0.0.1:1"),
        ("ALL_PROXY", "http://:x", "http://:x"),
    ],
)
def test_a_variable_that_keeps_a_host_out_of_reach_is_named(folder, monkeypatch, name, value, shown):
    for other in (*download.PROXIES, *download.CERTIFICATES):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr(download, "RETRY", urllib3.Retry(4))
    monkeypatch.setenv(name, value)
    _, failed = download.fetch_all({ONE: "https://shards.invalid/x"}, folder, dataset.open_shard, abs)
    assert f"({name}={shown})" in failed[ONE]
    assert "CANARY" not in failed[ONE]


def test_an_endpoint_that_is_no_https_one_is_named(folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "mirror.invalid")
    with pytest.raises(UserError, match=r"https://host/path.*\(HF_ENDPOINT=mirror.invalid\)"):
        get_set(folder)


def test_size_and_hash_are_those_of_the_first_host(host, start_host, files, folder):
    body, wrong, cdn = files[ONE], flipped(files[ONE]), start_host()
    host.script[ONE] = [reply(status=302, Location=f"{cdn.url}/x", **linked(body))]
    for answer in (reply(wrong, X_Linked_Etag=f'"{sha256(wrong)}"'), reply(body[:1000], length=False)):
        cdn.script["x"] = [answer]
        assert get(host, folder, ONE, check=lambda path: None)[0] == {}
        assert contents(folder) == {}
    cdn.script["x"] = [reply(body)]
    assert get(host, folder, ONE) == ({ONE: sha256(body)}, {})


def test_a_token_goes_to_its_own_host_alone_and_netrc_nowhere(host, start_host, files, folder, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    other = start_host()
    other.script["signed"] = [reply(files[ONE])]
    host.script[ONE] = [reply(status=302, Location="/moved")]
    host.script["moved"] = [reply(status=302, Location=f"{other.url}/signed")]
    for token, sent in (("hf_secret", "Bearer hf_secret"), (None, None)):
        host.seen.clear()
        assert get(host, folder, ONE, token=token)[1] == {}
        assert [headers.get("Authorization") for _, headers in host.seen] == [sent] * 2
    assert [headers.get("Authorization") for _, headers in other.seen] == [None] * 2


LEAKS = {
    "no header": b"HTTP/1.1 403 x\r\nno header at all\r\nA: b\r\n\r\n",  # which urllib3 warns of
    "closed": None,
}


@pytest.mark.parametrize("answer", LEAKS.values(), ids=LEAKS)
def test_no_error_shows_a_signed_url_or_a_token(host, start_host, folder, monkeypatch, capfd, caplog, answer):
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY")
    signed = start_host()
    signed.script["x?sig=CANARY"] = [answer]
    if answer is None:
        signed.close()
    host.script[ONE] = [reply(status=302, Location=f"{signed.url}/x?sig=CANARY")]
    with pytest.raises(DataError, match=f"1 of 3 shards are missing .{ONE}") as caught:
        get_set(folder)
    told = [*capfd.readouterr(), caplog.text, *traceback.format_exception(caught.value), str(contents(folder))]
    assert "CANARY" not in "".join(told)
    assert sorted(shards_in(folder)) == ALL[1:]


def test_a_full_disk_ends_the_download_also_for_those_that_wait(host, files, folder, monkeypatch):
    def late(connection):
        time.sleep(0.3)
        connection.sendall(reply(files[TWO]))

    def open_full(path, mode):
        return open("/dev/full" if TWO in path.name else path, mode)

    monkeypatch.setattr(download, "open", open_full, raising=False)
    monkeypatch.setattr(download, "WORKERS", 2)
    host.script[ONE], host.script[TWO] = [reply(status=429, Retry_After=100)], [late]
    begin = time.monotonic()
    done, failed = get(host, folder, *ALL)
    assert time.monotonic() - begin < 10
    assert (done, failed.pop(TWO)) == ({}, f"No space left on device: {folder}")
    assert (failed, contents(folder)) == (dict.fromkeys((ONE, VALIDATION), download.NOT_TRIED), {})


def test_a_data_set_that_does_not_fit_is_not_begun(host, folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=299_000_000))
    with pytest.raises(DataError, match=r"300.0 MB needed, 299.0 MB free"):
        get_set(folder)
    assert (host.asked(), folder.exists()) == ([], False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_download_leaves_no_piece_and_the_next_one_goes_on(host, files, folder, number):
    def stall(connection):
        connection.sendall(reply(files[ONE][:-1000], length=len(files[ONE])))
        end.wait(60)

    end, deadline = threading.Event(), time.monotonic() + 60
    host.script |= {name: [stall, reply(files[name])] for name in (ONE, TWO)}
    process = subprocess.Popen([sys.executable, "-m", *COMMAND], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        while not (folder / VALIDATION).exists() or len(list(folder.glob(".*.part"))) != 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        errors = process.communicate(timeout=10)[1]
    finally:
        process.kill()
        end.set()
    killed, left = number == signal.SIGKILL, list(folder.glob(".*.part"))
    assert (process.returncode, b"Traceback" in errors, len(left)) == (-number if killed else 130, False, 2 * killed)
    for path in left:
        os.utime(path, (0, 0))
    (living := folder / ".x.1.part").touch()  # another download writes it
    host.seen.clear()
    get_set(folder)
    assert sorted(host.asked()) == [ONE, TWO]
    assert (shards_in(folder), dataset.verify(folder)) == ({**files, living.name: b""}, [])


def test_the_same_command_again_fetches_only_what_is_missing(host, files, folder, run_script):
    answers = host.script.pop(TWO)
    done = run_script(*COMMAND, HF_TOKEN="hf_secret\n")  # as read from a file
    assert {headers["Authorization"] for _, headers in host.seen} == {"Bearer hf_secret"}
    assert (done.returncode, f"1 of 3 shards are missing ({TWO})" in done.stderr) == (6, True)
    assert shards_in(folder) == {name: files[name] for name in (ONE, VALIDATION)}
    host.script[TWO] = answers
    host.seen.clear()
    get_set(folder)
    assert host.asked() == [TWO]
    (folder / ONE).write_bytes(flipped(files[ONE]))
    get_set(folder)
    assert (shards_in(folder), dataset.verify(folder), host.asked()) == (files, [], [TWO, ONE])


def test_the_validation_shard_of_a_folder_never_becomes_a_train_shard(host, files, folder):
    get_set(folder)
    before = contents(folder)
    with pytest.raises(UserError, match=VALIDATION):
        dataset.fetch("fineweb-edu", replace(SOURCE, num_shards=2000), 2, folder)
    assert contents(folder) == before


def test_another_host_is_fetched_from_by_its_url_and_without_the_token(start_host, files, monkeypatch, base_dir):
    host, shards = start_host(), {f"shard_{number:05d}.parquet": files[name] for number, name in enumerate(ALL)}
    host.script = {name: [reply(body, length=False)] for name, body in shards.items()}
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
        ({"BASE_URL": "http://example.com/x", "NAME": "mine", "NUM_SHARDS": 2}, "https://host/path"),
        ({"BASE_URL": "https://me@host/x", "NAME": "mine", "NUM_SHARDS": 2}, "https://host/path"),
        ({"BASE_URL": "https://host/x", "NUM_SHARDS": 3}, "--name=mine"),
        ({"DATASET": "fineweb-edu", "TRAIN_SHARDS": 1823}, "1 to 1822"),
    ],
)
def test_wrong_flags_are_refused_with_what_would_be_right(monkeypatch, flags, says):
    for name, value in flags.items():
        monkeypatch.setattr(dataset, name, value)
    with pytest.raises(UserError, match=says):
        dataset.main()
