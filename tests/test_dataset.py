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


# ---- cut ----


def odd_text(seed, longest_line):
    """Paragraphs of lines of many lengths, between blank lines of many kinds; no line is longer than asked."""
    draw = random.Random(seed)
    text = ""
    for _ in range(30):
        lines = ["".join(draw.choices("ab cé日 ", k=draw.randint(1, longest_line))) for _ in range(draw.randint(1, 8))]
        text += "\n".join(lines) + draw.choice(["\n\n", "\n \t\n", "\n\n\n\n", "\n  \n\t\n"])
    return text


@pytest.mark.parametrize("seed", range(4))
def test_cut_keeps_every_line_that_is_not_blank_in_order(seed):
    text = odd_text(seed, longest_line=50)
    written = [line for line in text.split("\n") if line.strip()]
    kept = [line for document in dataset.cut(text, 60) for line in document.split("\n") if line.strip()]
    assert kept == written


@pytest.mark.parametrize("seed", range(4))
def test_cut_keeps_every_character_of_lines_longer_than_a_document(seed):
    text = odd_text(seed, longest_line=500)
    assert re.sub(r"\s", "", "".join(dataset.cut(text, 60))) == re.sub(r"\s", "", text)


@pytest.mark.parametrize("longest_line", [10, 50, 500])
def test_cut_documents_are_never_too_long_nor_blank(longest_line):
    documents = dataset.cut(odd_text(7, longest_line), 60)
    assert len(documents) > 10
    assert all(document.strip() and len(document) <= 60 for document in documents)


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\n\ntwo\n\nthree", ["one\n\ntwo", "three"]),  # at blank lines, as much as fits
        ("one\n \t\n\n  two", ["one\n\n  two"]),  # blank lines become one, indents stay
        ("aa\nbb\n\ncccc\ndd", ["aa\nbb", "cccc\ndd"]),  # not at a line end where a blank line will do
        ("aaaa\nbbbb\ncccc", ["aaaa\nbbbb", "cccc"]),  # at a line end where there is no blank line
        ("abcdefghijklmnopqrstu", ["abcdefghij", "klmnopqrst", "u"]),  # anywhere where there is neither
        ("short", ["short"]),
        ("", []),
        (" \n\n\t\n ", []),
    ],
)
def test_cut_by_hand(text, documents):
    assert dataset.cut(text, 10) == documents


# ---- the embedded corpus ----


def made_up_sources():
    """40 sources; each document cut from one holds its name, but for licence texts that several have in common."""
    licence = "\n\n".join(f"licence paragraph {n} " + "all rights are yours " * 150 for n in range(3))
    sources = {}
    for number in range(40):
        paragraphs = [f"mark{number:02d} {n} " + "words of many kinds " * (20 + n) for n in range(12)]
        sources[f"package/file{number:02d}.py"] = "\n\n".join(paragraphs) + (licence if number % 3 == 0 else "")
    sources["package/copy.py"] = sources["package/file07.py"]
    return sources


@pytest.fixture
def sources(monkeypatch):
    monkeypatch.setattr(dataset, "_stdlib_sources", made_up_sources)
    return made_up_sources()


def test_embedded_corpus_has_the_same_bytes_every_time(sources, tmp_path, monkeypatch):
    dataset.build_stdlib(tmp_path / "first")
    backwards = dict(reversed(sources.items()))  # a file system may list its files in any order
    monkeypatch.setattr(dataset, "_stdlib_sources", lambda: backwards)
    dataset.build_stdlib(tmp_path / "second")
    assert len(names_in(tmp_path / "first")) == dataset.STDLIB_SHARDS + 2
    assert names_in(tmp_path / "first") == names_in(tmp_path / "second")
    for name in names_in(tmp_path / "first"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_embedded_corpus_has_no_source_on_both_sides(sources, tmp_path):
    dataset.build_stdlib(tmp_path)
    *train, validation = read_all(tmp_path).values()
    train_marks = set(re.findall(r"mark\d\d", " ".join(text for texts in train for text in texts)))
    validation_marks = set(re.findall(r"mark\d\d", " ".join(validation)))
    assert train_marks | validation_marks == {f"mark{number:02d}" for number in range(40)}
    assert len(validation_marks) >= 2
    assert not train_marks & validation_marks


def test_embedded_corpus_has_every_document_once(sources, tmp_path):
    counts = dataset.build_stdlib(tmp_path)
    *train, validation = read_all(tmp_path).values()
    documents = [document for texts in (*train, validation) for document in texts]
    cuts = [document for source in sources.values() for document in dataset.cut(source)]
    assert len(cuts) > len(set(cuts)), "the made-up sources must repeat themselves for this to mean anything"
    assert sorted(documents) == sorted(set(cuts))
    assert counts == (sum(map(len, train)), len(validation))


def test_embedded_corpus_keeps_a_text_of_both_sides_in_train(sources, tmp_path):
    dataset.build_stdlib(tmp_path)
    validation = read_all(tmp_path)["shard_00004.parquet"]
    marks = set(re.findall(r"mark\d\d", " ".join(validation)))
    cuts = {True: set(), False: set()}
    for source in sources.values():
        cuts[source[:6] in marks].update(dataset.cut(source))
    assert cuts[True] & cuts[False], "the two sides must share texts for this to mean anything"
    assert set(validation) == cuts[True] - cuts[False]


def test_embedded_corpus_gives_validation_its_share(sources, tmp_path):
    dataset.build_stdlib(tmp_path)
    validation = read_all(tmp_path)["shard_00004.parquet"]
    total = sum(map(len, sources.values()))
    size = sum(map(len, validation))
    # whole sources until the share is reached, less what train holds too
    assert 0.5 * total / 16 < size < total / 16 + max(map(len, sources.values()))


def test_embedded_corpus_manifest_is_true(sources, tmp_path):
    dataset.build_stdlib(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["dataset"] == "stdlib"
    assert [entry["name"] for entry in manifest["shards"]] == [f"shard_{number:05d}.parquet" for number in range(5)]
    assert manifest["validation"] == "shard_00004.parquet"
    for entry in manifest["shards"]:
        path = tmp_path / entry["name"]
        rows = pq.read_metadata(path).num_rows
        assert entry == {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path), "rows": rows}


def test_embedded_corpus_has_small_row_groups(sources, tmp_path):
    dataset.build_stdlib(tmp_path)
    for path in tmp_path.glob("*.parquet"):
        details = pq.read_metadata(path)
        rows = [details.row_group(group).num_rows for group in range(details.num_row_groups)]
        assert rows[:-1] == [16] * (len(rows) - 1)
        assert 1 <= rows[-1] <= 16


def test_embedded_corpus_replaces_what_was_there(sources, tmp_path):
    make_shards(tmp_path, train=8)
    dataset.build_stdlib(tmp_path)
    assert names_in(tmp_path) == ["manifest.json", *(f"shard_{number:05d}.parquet" for number in range(5))]


def test_validation_stays_pinned_when_shards_are_added(sources, tmp_path):
    dataset.build_stdlib(tmp_path)
    dataset.write_shard(tmp_path / "shard_99999.parquet", ["later"])
    shards = dataset.open_shards(tmp_path)
    assert shards.validation.name == "shard_00004.parquet"
    assert [shard.name for shard in shards.train] == [f"shard_{number:05d}.parquet" for number in (0, 1, 2, 3, 99999)]


def test_real_corpus_is_ten_megabytes_of_short_documents_and_the_same_in_every_process(run_script, base_dir, tmp_path):
    done = run_script("nanotrain.dataset", "--dataset=stdlib", PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    folder = base_dir / "data" / "stdlib"
    texts = [text for texts in read_all(folder).values() for text in texts]
    assert 8e6 < sum(len(text.encode()) for text in texts) < 16e6
    assert max(map(len, texts)) <= 4000
    assert len(set(texts)) == len(texts)
    assert any(topics.topics["assert"][:200] in text for text in texts), "the help topics are part of it"
    dataset.build_stdlib(tmp_path / "again")
    assert {path.name: sha256(path) for path in folder.iterdir()} == {
        path.name: sha256(path) for path in (tmp_path / "again").iterdir()
    }


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
