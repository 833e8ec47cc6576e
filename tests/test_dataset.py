"""Shards: cutting, the embedded corpus, opening and verifying folders, and downloads from a loopback server."""

import hashlib
import http.server
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from pydoc_data import topics
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, make_shards, make_texts

from nanotrain import dataset, paths
from nanotrain.errors import DataError, UserError


def read_all(folder):
    """{shard name: its texts}, read with pyarrow alone."""
    return {path.name: pq.read_table(path)["text"].to_pylist() for path in sorted(folder.glob("*.parquet"))}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- reading ----


@pytest.mark.parametrize("step", [1, 2, 3, 7, 50])
def test_row_groups_deal_every_group_to_one_start(data_dir, step):
    shard_paths = sorted(data_dir.glob("*.parquet"))
    groups = []
    for path in shard_paths:
        file = pq.ParquetFile(path)
        groups += [file.read_row_group(group)["text"].to_pylist() for group in range(file.num_row_groups)]
    assert len(groups) == 24
    for start in range(step):
        assert list(dataset.row_groups(shard_paths, start, step)) == groups[start::step]


def test_row_groups_leave_out_null_and_empty_texts(tmp_path):
    dataset.write_shard(tmp_path / "shard_0.parquet", ["a", None, "", "b", None, "", "c"], rows_per_group=3)
    assert list(dataset.row_groups([tmp_path / "shard_0.parquet"])) == [["a"], ["b"], ["c"]]


def test_open_shards_tells_rows_and_size_of_text(tmp_path):
    draw = random.Random(1)
    texts = ["".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(5000)) for _ in range(10)]
    columns = {"source": pa.array([{"name": "x", "text": 1}] * 10), "text": pa.array(texts)}
    pq.write_table(pa.table(columns), tmp_path / "shard_00000.parquet", row_group_size=4)
    dataset.write_shard(tmp_path / "shard_00001.parquet", ["validation"])
    (shard,) = dataset.open_shards(tmp_path).train
    assert shard.group_rows == (4, 4, 2)
    assert shard.text_bytes == pytest.approx(50_000, rel=0.01)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_kind_of_string_column_is_read(tmp_path, kind):
    texts = ["eins", None, "zwei", "eins"]
    for number in range(2):
        table = pa.table({"text": pa.array(texts, pa.string()).cast(kind)})
        pq.write_table(table, tmp_path / f"shard_{number:05d}.parquet")
    (shard,) = dataset.open_shards(tmp_path).train
    assert dataset.read_texts(shard.path, 0) == texts


def test_files_of_other_names_are_ignored(tmp_path):
    make_shards(tmp_path)
    for name in ("shard_a.parquet", "shard_00009.parquet.part", ".shard_00009.parquet", "Shard_00009.parquet", "a.txt"):
        (tmp_path / name).write_text("not parquet")
    (tmp_path / "shard_").mkdir()
    shards = dataset.open_shards(tmp_path)
    assert [shard.name for shard in shards.train] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert shards.validation.name == "shard_00002.parquet"


def test_validation_is_never_in_train(tmp_path):
    make_shards(tmp_path, train=3)
    for name in names_in(tmp_path):
        dataset.write_manifest(tmp_path, "mine", name)
        shards = dataset.open_shards(tmp_path)
        assert shards.validation.name == name
        assert {shard.name for shard in shards.train} == set(names_in(tmp_path)) - {name, "manifest.json"}


def only_one_shard(folder):
    dataset.write_shard(folder / "shard_00000.parquet", ["x"])


def no_rows(folder):
    dataset.write_shard(folder / "shard_00000.parquet", [])
    dataset.write_shard(folder / "shard_00001.parquet", ["x"])


def with_table(table):
    def write(folder):
        make_shards(folder)
        pq.write_table(pa.table(table), folder / "shard_00001.parquet")

    return write


def with_bytes(change):
    def write(folder):
        path = make_shards(folder) / "shard_00001.parquet"
        path.write_bytes(change(path.read_bytes()))

    return write


def validation_gone(folder):
    dataset.write_manifest(make_shards(folder), "mine", "shard_00002.parquet")
    (folder / "shard_00002.parquet").unlink()


def with_manifest(text):
    def write(folder):
        (make_shards(folder) / "manifest.json").write_text(text)

    return write


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: folder.rmdir(), "no data folder .*--dataset=stdlib"),
        (lambda folder: None, "holds no shard_<digits>.parquet.*--dataset=stdlib"),
        (only_one_shard, "only the validation shard shard_00000.parquet"),
        (no_rows, "hold no rows"),
        (with_table({"content": ["a"], "id": [1]}), "shard_00001.parquet has no column 'text', only: content, id"),
        (with_table({"text": [1, 2]}), "shard_00001.parquet.*must hold strings, not int64"),
        (with_table({"text": [["a"], ["b"]]}), "shard_00001.parquet.*must hold strings, not list"),
        (with_bytes(lambda data: b"<html>sorry</html>"), "shard_00001.parquet is not a readable parquet file"),
        (with_bytes(lambda data: data[: len(data) // 2]), "shard_00001.parquet is not a readable parquet file"),
        (with_bytes(lambda data: b""), "shard_00001.parquet is not a readable parquet file"),
        (validation_gone, "the validation shard shard_00002.parquet is missing"),
        (with_manifest('{"validation": "shard_0'), "manifest.json is broken"),
        (with_manifest('{"shards": []}'), "manifest.json is broken"),
        (with_manifest("[]"), "manifest.json is broken"),
        (
            with_manifest('{"validation": "shard_00002.parquet", "shards": [{"name": "../x"}]}'),
            "manifest.json is broken",
        ),
    ],
)
def test_open_shards_says_what_is_wrong(tmp_path, prepare, says):
    folder = tmp_path / "shards"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(DataError, match=says) as caught:
        dataset.open_shards(folder)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)


def not_utf8(path):
    table = pa.table({"text": pa.array([b"\xff\xfe\xfd"]).view(pa.string())})
    pq.write_table(table, path)


def damaged_page(path):
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [not_utf8, damaged_page, lambda path: path.unlink()])
def test_a_row_group_that_cannot_be_read_is_named(tmp_path, harm):
    path = make_shards(tmp_path) / "shard_00000.parquet"
    harm(path)
    with pytest.raises(DataError, match=r"shard_00000.parquet, row group 0, cannot be read"):
        dataset.read_texts(path, 0)


# ---- hashes ----


@pytest.mark.parametrize("with_manifest", [False, True])
def test_fingerprint_has_size_and_hash_of_every_shard(tmp_path, with_manifest):
    make_shards(tmp_path)
    expected = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in tmp_path.iterdir()}
    if with_manifest:
        dataset.write_manifest(tmp_path, "mine", "shard_00000.parquet")
    found = dataset.fingerprint(dataset.open_shards(tmp_path))
    assert found == {"validation": f"shard_0000{0 if with_manifest else 2}.parquet", "files": expected}


def test_fingerprint_notices_a_shard_of_another_size_than_in_its_manifest(tmp_path):
    make_shards(tmp_path)
    dataset.write_manifest(tmp_path, "mine", "shard_00002.parquet")
    dataset.write_shard(tmp_path / "shard_00001.parquet", make_texts(41, seed=5))
    with pytest.raises(DataError, match=r"shard_00001.parquet has \d+ bytes, its manifest says \d+"):
        dataset.fingerprint(dataset.open_shards(tmp_path))


def test_verify_names_a_flipped_byte_a_missing_and_a_shorter_shard(tmp_path):
    make_shards(tmp_path, train=4)
    dataset.write_manifest(tmp_path, "mine", "shard_00004.parquet")
    assert dataset.verify(tmp_path) == []
    path = tmp_path / "shard_00002.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert dataset.verify(tmp_path) == ["shard_00002.parquet"]
    (tmp_path / "shard_00000.parquet").unlink()
    last = tmp_path / "shard_00004.parquet"
    last.write_bytes(last.read_bytes()[:-1])
    assert dataset.verify(tmp_path) == ["shard_00000.parquet", "shard_00002.parquet", "shard_00004.parquet"]


def test_verify_command_ends_with_a_data_error_that_names_the_shard(monkeypatch, capsys):
    folder = make_shards(paths.dataset_dir("stdlib"))
    monkeypatch.setattr(dataset, "DATASET", "stdlib")
    monkeypatch.setattr(dataset, "VERIFY", True)
    with pytest.raises(DataError, match=r"has no manifest.json"):
        dataset.main()
    dataset.write_manifest(folder, "stdlib", "shard_00002.parquet")
    dataset.main()
    assert "every shard is as the manifest says" in capsys.readouterr().out
    (folder / "shard_00001.parquet").unlink()
    with pytest.raises(DataError, match=r"1 bad shards .*shard_00001.parquet"):
        dataset.main()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"

    def write(text, error=None):
        with dataset.atomic_file(path) as temporary:
            temporary.write_text(text)
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write("half", KeyboardInterrupt())
    assert names_in(path.parent) == []
    write("first")
    with pytest.raises(ValueError, match="disk"):
        write("sec", ValueError("disk"))
    assert (names_in(path.parent), path.read_text()) == (["file"], "first")
    write("third")
    assert (names_in(path.parent), path.read_text()) == (["file"], "third")


# ---- download ----


class Hub:
    """A hosted data set on loopback. `answers` maps a shard to functions that answer its next requests otherwise."""

    prefix = "/" + dataset.SOURCES["fineweb-edu"].url + "/"
    validation = "shard_01822.parquet"

    def __init__(self, folder):
        make_shards(folder, train=2)
        (folder / "shard_00002.parquet").rename(folder / self.validation)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.answers, self.requests = {}, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                assert self.path.startswith(hub.prefix)
                name = self.path.removeprefix(hub.prefix)
                hub.requests.append((name, self.headers.get("Authorization")))
                answer = hub.answers[name].pop(0) if hub.answers.get(name) else send
                answer(self, hub.files[name])

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def send(handler, body, length=None, status=200):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def status(code):
    return lambda handler, body: send(handler, b"no", status=code)


def half(handler, body):
    send(handler, body[: len(body) // 2], length=len(body))


def web_page(handler, body):
    send(handler, b"<html>please log in</html>")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.close()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that downloads would have waited between attempts; they do not wait."""
    seconds = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            seconds.append(timeout)
            return self.is_set()

    monkeypatch.setattr(dataset, "threading", SimpleNamespace(Event=Event))
    return seconds


ALL = ["shard_00000.parquet", "shard_00001.parquet", Hub.validation]


def test_download_gives_the_files_of_the_source_and_a_true_manifest(hub, tmp_path, capsys):
    folder = tmp_path / "here"
    dataset.download("fineweb-edu", 2, folder)
    assert names_in(folder) == ["manifest.json", *ALL]
    assert {name: (folder / name).read_bytes() for name in ALL} == hub.files
    assert sorted(hub.requests) == [(name, None) for name in ALL]
    assert dataset.verify(folder) == []
    shards = dataset.open_shards(folder)
    assert [shard.name for shard in shards.train] == ALL[:2]
    assert shards.validation.name == Hub.validation
    assert "ODC-By" in capsys.readouterr().out


def test_download_does_not_fetch_what_is_there(hub, tmp_path):
    folder = tmp_path / "here"
    dataset.download("fineweb-edu", 1, folder)
    assert sorted(name for name, _ in hub.requests) == [ALL[0], ALL[2]]
    hub.requests.clear()
    dataset.download("fineweb-edu", 2, folder)
    assert hub.requests == [(ALL[1], None)]
    hub.requests.clear()
    dataset.download("fineweb-edu", 2, folder)
    assert hub.requests == []
    assert [entry["name"] for entry in dataset.read_manifest(folder)["shards"]] == ALL


def test_a_shard_that_the_source_lacks_is_named_and_not_asked_for_again(hub, waits, tmp_path):
    hub.answers[ALL[1]] = [status(404)]
    folder = tmp_path / "here"
    with pytest.raises(DataError, match=r"1 of 3 shards are missing \(shard_00001.parquet\).* answers 404") as caught:
        dataset.download("fineweb-edu", 2, folder)
    assert caught.value.exit_code == 6
    assert names_in(folder) == [ALL[0], ALL[2]], "what was had is kept, and nothing else"
    assert sum(waits) == 0
    dataset.download("fineweb-edu", 2, folder)
    assert dataset.verify(folder) == []


def test_a_download_that_got_nothing_leaves_no_folder(hub, waits, tmp_path):
    hub.answers = {name: [status(404)] for name in ALL}
    with pytest.raises(DataError, match="3 of 3 shards are missing"):
        dataset.download("fineweb-edu", 2, tmp_path / "here")
    assert names_in(tmp_path) == ["hub"]


@pytest.mark.parametrize("trouble", [half, status(500), status(503), status(429), status(408)])
def test_passing_trouble_is_tried_again(hub, waits, tmp_path, trouble):
    hub.answers[ALL[0]] = [trouble, trouble, trouble]
    folder = tmp_path / "here"
    dataset.download("fineweb-edu", 1, folder)
    assert (folder / ALL[0]).read_bytes() == hub.files[ALL[0]]
    assert names_in(folder) == ["manifest.json", ALL[0], ALL[2]]
    assert [name for name, _ in hub.requests].count(ALL[0]) == 4
    assert 3 <= sum(waits) < 120


@pytest.mark.parametrize("trouble", [half, status(500), web_page])
def test_lasting_trouble_ends_and_leaves_nothing_of_the_shard(hub, waits, tmp_path, trouble):
    hub.answers[ALL[0]] = [trouble] * 100
    folder = tmp_path / "here"
    with pytest.raises(DataError, match=r"\(shard_00000.parquet\): .*127.0.0.1"):
        dataset.download("fineweb-edu", 1, folder)
    assert names_in(folder) == [ALL[2]]
    assert len(hub.requests) <= 10
    assert sum(waits) < 300


def test_an_unreachable_host_is_told_soon_with_the_way_to_do_without(waits, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening: nobody answers at this port
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(DataError, match=r"127.0.0.1:\d+ cannot be reached.*--dataset=stdlib"):
            dataset.download("fineweb-edu", 50, tmp_path / "here")
    assert sum(waits) <= 4 * dataset.DOWNLOAD_WORKERS, "for 51 shards, and the workers wait side by side"
    assert names_in(tmp_path) == []


def test_a_token_is_sent_and_a_refusal_asks_for_one(hub, waits, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.answers = {name: [status(401)] for name in ALL}
    with pytest.raises(DataError, match="answers 401: set HF_TOKEN"):
        dataset.download("fineweb-edu", 1, tmp_path / "here")
    assert sorted(hub.requests) == [(name, "Bearer hf_secret") for name in (ALL[0], ALL[2])]


@pytest.mark.parametrize(("code", "says"), [(404, "answers 404 for shard_00001.parquet"), (403, "set HF_TOKEN")])
def test_the_command_ends_with_6_and_never_shows_the_token(hub, run_script, base_dir, code, says):
    hub.answers[ALL[1]] = [status(code)]
    done = run_script("nanotrain.dataset", "-n", "2", "--dataset=fineweb-edu", HF_TOKEN="hf_secret")
    assert done.returncode == 6
    assert done.stderr.splitlines()[-1].startswith("error: 1 of 3 shards are missing (shard_00001.parquet)")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert (ALL[0], "Bearer hf_secret") in hub.requests
    assert "hf_secret" not in done.stdout + done.stderr
    assert names_in(base_dir / "data" / "fineweb-edu") == [ALL[0], ALL[2]]


def test_ctrl_c_leaves_no_piece_of_a_shard(hub, base_dir):
    arrived, release = threading.Event(), threading.Event()

    def stall(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:100])
        arrived.set()
        release.wait(60)

    hub.answers = {name: [stall] for name in ALL[:2]}
    command = [sys.executable, "-m", "nanotrain.dataset", "-n", "2", "--dataset=fineweb-edu"]
    environment = {**os.environ, "NANOTRAIN_DIR": str(base_dir)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert arrived.wait(60)
        process.send_signal(signal.SIGINT)
        release.set()
        _, errors = process.communicate(timeout=60)
    finally:
        release.set()
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in errors
    folder = base_dir / "data" / "fineweb-edu"
    left = names_in(folder) if folder.exists() else []
    assert left in ([], [Hub.validation])


def test_a_full_disk_ends_the_download_with_its_reason(hub, base_dir):
    command = [sys.executable, "-m", "nanotrain.dataset", "-n", "2", "--dataset=fineweb-edu"]
    environment = {**os.environ, "NANOTRAIN_DIR": str(base_dir)}
    limited = ["sh", "-c", 'ulimit -f 1 && exec "$@"', "sh", *command]  # writes fail as they do on a full disk
    done = subprocess.run(limited, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 6
    assert done.stderr.splitlines()[-1].startswith("error: 3 of 3 shards are missing")
    assert done.stderr.splitlines()[-1].endswith("fineweb-edu: File too large")
    assert "Traceback" not in done.stderr
    assert not (base_dir / "data" / "fineweb-edu").exists()


@pytest.mark.parametrize("count", [0, -1, 1823])
def test_a_number_of_shards_that_the_source_does_not_have_is_refused(tmp_path, count):
    with pytest.raises(UserError, match=f"-n {count}: fineweb-edu has 1 to 1822 train shards") as caught:
        dataset.download("fineweb-edu", count, tmp_path / "here")
    assert caught.value.exit_code == 2
    assert names_in(tmp_path) == []


def test_an_unknown_data_set_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setattr(dataset, "DATASET", "fineweb")
    with pytest.raises(UserError, match=r"--dataset=fineweb: choose one of stdlib, fineweb-edu, climbmix"):
        dataset.main()
