"""Making shards: cutting text into documents, the embedded corpus, and the import of a user's own text."""

import gzip
import hashlib
import json
import os
import platform
import random
import re
import tracemalloc
from pydoc_data import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_shards, make_texts

from nanotrain import corpus, dataset
from nanotrain.errors import DataError, UserError


def read_all(folder):
    """[the texts of each shard], read with pyarrow alone."""
    return [pq.read_table(path)["text"].to_pylist() for path in sorted(folder.glob("*.parquet"))]


def row_groups_of(path):
    file = pq.ParquetFile(path)
    return [file.read_row_group(group)["text"].to_pylist() for group in range(file.num_row_groups)]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("longest_line", [10, 50, 500])
def test_cut_loses_nothing_but_blank_lines_and_makes_no_document_too_long(longest_line):
    """Paragraphs of lines of many lengths between blank lines of many kinds."""
    draw, text = random.Random(7), ""
    for _ in range(30):
        lines = ["".join(draw.choices("ab cé日 ", k=draw.randint(1, longest_line))) for _ in range(draw.randint(1, 8))]
        text += "\n".join(lines) + draw.choice(["\n\n", "\n \t\n", "\n\n\n\n", "\n  \n\t\n"])
    documents = list(corpus.cut(text, 60))
    assert len(documents) > 10
    assert all(document.strip() and len(document) <= 60 for document in documents)
    assert "".join("".join(documents).split()) == "".join(text.split())
    if longest_line < 60:
        lines = [line for document in documents for line in document.split("\n") if line.strip()]
        assert lines == [line for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\n\ntwo\n\nthree", ["one\n\ntwo", "three"]),  # at blank lines, as much as fits
        ("one\n \t\n\n  two", ["one\n\n  two"]),  # blank lines become one, indents stay
        ("aa\nbb\n\ncccc\ndd", ["aa\nbb", "cccc\ndd"]),  # not at a line end where a blank line will do
        ("aaaa\nbbbb\ncccc", ["aaaa\nbbbb", "cccc"]),  # at a line end where there is no blank line
        ("a\nbbbbbbbb\n\ncc", ["a\nbbbbbbbb", "cc"]),  # which is not the one before a blank line
        ("abcdefghijklmnopqrstu", ["abcdefghij", "klmnopqrst", "u"]),  # anywhere where there is neither
        (" \n\n\t\n ", []),
    ],
)
def test_cut_by_hand(text, documents):
    assert list(corpus.cut(text, 10)) == documents


ORDER = ["f59adfd3f1b935f4", "46271f5a79d878b5", "b7e22c3a5f9d1d28", "636a5b8dcf5af4d6", "2dc6dc4e59c37c9e"]


@pytest.fixture
def sources(monkeypatch):
    """40 sources; each document cut from one holds its name, but for licence texts that several have in common."""
    licence = "\n\n".join(f"licence paragraph {n} " + "all rights are yours " * 150 for n in range(3))
    sources = {}
    for number in range(40):
        paragraphs = [f"mark{number:02d} {n} " + "words of many kinds " * (20 + n) for n in range(12)]
        sources[f"package/file{number:02d}.py"] = "\n\n".join(paragraphs) + (licence if number % 3 == 0 else "")
    sources["package/copy.py"] = sources["package/file07.py"]
    monkeypatch.setattr(corpus, "stdlib_sources", lambda: sources)
    return sources


def test_embedded_corpus_is_the_same_every_time_with_a_true_manifest(sources, tmp_path, monkeypatch):
    dataset.write_manifest(make_shards(tmp_path / "first", 8), f"{dataset.STDLIB} 3.0.0", "shard_00008.parquet")
    dataset.build_stdlib(tmp_path / "first")  # in place of that of another Python
    backwards = dict(reversed(sources.items()))  # a file system may list its files in any order
    monkeypatch.setattr(corpus, "stdlib_sources", lambda: backwards)
    dataset.build_stdlib(tmp_path / "second")
    found = hashes(tmp_path / "second")
    assert hashes(tmp_path / "first") == found
    order = [hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] for texts in read_all(tmp_path / "first")]
    assert order == ORDER, "published numbers depend on it"
    expected = []
    for path in sorted((tmp_path / "first").glob("*.parquet")):
        rows = len(pq.read_table(path))
        expected.append({"name": path.name, "bytes": path.stat().st_size, "sha256": found[path.name], "rows": rows})
    what = {"dataset": f"stdlib of Python {platform.python_version()}", "validation": "shard_00004.parquet"}
    assert json.loads((tmp_path / "first" / "manifest.json").read_text()) == {**what, "shards": expected}


def test_embedded_corpus_has_every_document_once_and_no_source_on_both_sides(sources, tmp_path):
    dataset.build_stdlib(tmp_path)
    *train, validation = read_all(tmp_path)
    train = [text for texts in train for text in texts]
    in_train, in_validation = (set(re.findall(r"mark\d\d", " ".join(texts))) for texts in (train, validation))
    assert in_train | in_validation == {f"mark{number:02d}" for number in range(40)}
    assert len(in_validation) >= 2
    assert not in_train & in_validation
    cuts = {True: set(), False: set()}
    for source in sources.values():
        cuts[source[:6] in in_validation].update(corpus.cut(source))
    assert cuts[True] & cuts[False], "the two sides must share texts for this to mean anything"
    assert (sorted(train), sorted(validation)) == (sorted(cuts[False]), sorted(cuts[True] - cuts[False]))


def test_real_corpus_is_ten_megabytes_of_short_documents_and_the_same_in_every_process(run_script, base_dir, tmp_path):
    done = run_script("nanotrain.dataset", "--dataset=stdlib", PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    folder = base_dir / "data" / "stdlib"
    *train, validation = read_all(folder)
    texts = all_of(train, validation)
    size = sum(map(len, texts))
    assert 8e6 < size < 16e6
    assert 0.05 < sum(map(len, validation)) / size < 0.08
    assert max(map(len, texts)) <= 4000
    assert len(set(texts)) == len(texts)
    assert any(topics.topics["assert"][:200] in text for text in texts), "the help topics are part of it"
    dataset.build_stdlib(tmp_path / "again")
    assert hashes(folder) == hashes(tmp_path / "again")


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_plain(path, texts):
    """Files of their own, since a plain text file is cut into documents."""
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number}.txt").write_text(text, encoding="utf-8")


def write_gz(path, texts):
    path.write_bytes(gzip.compress(json_lines(texts[:20])) + gzip.compress(json_lines(texts[20:])))  # `cat a.gz b.gz`


def write_zst(path, texts):
    for part in (texts[:20], texts[20:]):
        with open(path, "ab") as file, pa.CompressedOutputStream(file, "zstd") as packed:
            packed.write(json_lines(part))


WRITERS = {
    "plain": write_plain,
    "a.jsonl": lambda path, texts: path.write_bytes(json_lines(texts)),
    "a.jsonl.gz": write_gz,
    "a.JSONL.zst": write_zst,
    "a.parquet": lambda path, texts: pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, 7),
}


def imported(source, folder, **settings):
    """([documents of each train shard], documents of validation, what was skipped) of an import of a file, or of texts
    in a .jsonl.
    """
    folder.mkdir()
    if isinstance(source, list):
        texts, source = source, folder.with_suffix(".jsonl")
        source.write_bytes(json_lines(texts))
    validation, count, skipped = corpus.import_text(source, folder, **settings)
    *train, last = read_all(folder)
    assert names_in(folder) == [f"shard_{number:05d}.parquet" for number in range(len(train) + 1)]
    assert validation == max(names_in(folder))
    assert count == len(all_of(train, last))
    return train, last, skipped


def all_of(train, validation, skipped=None):
    return [text for texts in (*train, validation) for text in texts]


def test_import_writes_each_document_once_in_an_order_that_no_file_decides(tmp_path):
    near = ["the same", "the same ", "The same", "the same\n", "the  same"]
    texts = [*make_texts(200), *near, "  indented", "日" * 3000, "<|bos|>", "a" * 4001, "a\n\nb" * 900]
    by_hash = sorted(texts[:-2], key=lambda text: hashlib.sha256(b"nanotrain" + text.encode()).digest())
    assert by_hash != sorted(by_hash)
    for number, name in enumerate(WRITERS):
        (tmp_path / name).mkdir()
        shuffled = random.Random(number).sample(texts[:-2], len(by_hash))
        WRITERS[name](tmp_path / name / f"{9 - number}-{name}", shuffled[:120])
        WRITERS["a.jsonl"](tmp_path / name / "b.jsonl", shuffled[100:])
        *found, skipped = imported(tmp_path / name, tmp_path / f"shards{number}")
        assert all_of(*found) == by_hash, "as in imports of older versions"
        assert skipped == {"duplicate": 20}
        assert hashes(tmp_path / f"shards{number}") == hashes(tmp_path / "shards0")
    *found, _ = imported(texts, tmp_path / "rows")
    assert sorted(all_of(*found)) == sorted(texts), "rows are not cut"


def test_import_of_a_folder_takes_every_kind_of_file_at_every_depth_and_nothing_hidden(tmp_path):
    source, texts = tmp_path / "source", make_texts(51)
    for number, name in enumerate(WRITERS):
        parent = source / "/".join("abcde"[:number])
        parent.mkdir(parents=True, exist_ok=True)
        WRITERS[name](parent / name, texts[10 * number : 10 * number + 10])
    (source / "READ.ME.MD").write_text(texts[50])
    (source / ".git").mkdir()
    for name in (".hidden.txt", ".git/config.txt", "picture.png", "no_suffix"):
        (source / name).write_text(f"not to be read {name}")
    found = imported(source, tmp_path / "shards")
    assert sorted(all_of(*found)) == sorted(texts)
    assert sum(found[2].values()) == 4


@pytest.mark.parametrize("texts", [make_texts(2), ["a", "a" * 50_000], ["c", "c" * 50_000]], ids=len)
def test_import_always_has_train_and_validation_and_no_text_in_both(tmp_path, texts):
    """Also where one document, the first or the last, is nearly all."""
    train, validation, skipped = imported([*texts, *texts[: len(texts) // 2]], tmp_path / "shards")
    assert min(map(len, [*train, validation])) >= 1
    assert sorted(all_of(train, validation)) == sorted(texts)
    assert skipped == {"duplicate": len(texts) // 2}


def test_import_holds_a_bucket_of_the_text_at_a_time(tmp_path, monkeypatch):
    """Its bytes do not depend on how many there are."""
    texts, source, folder = [f"{n} " + "a" * 10_000 for n in range(1200)], tmp_path / "a.jsonl", tmp_path / "shards"
    source.write_bytes(json_lines([*texts, *texts[:20], *["b" * 10_000] * 500]))
    folder.mkdir()
    tracemalloc.start()
    corpus.import_text(source, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < source.stat().st_size / 4, "with what readers take"
    monkeypatch.setattr(corpus, "NUM_BUCKETS", 3)
    imported(source, tmp_path / "few")
    assert hashes(folder) == hashes(tmp_path / "few")


def test_a_large_plain_text_is_cut_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_CHARS", 1000)
    texts = make_texts(200)
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    found = all_of(*imported(tmp_path, tmp_path / "shards"))
    assert len(found) > 50
    assert sorted(text for document in found for text in document.strip().split("\n\n")) == sorted(texts)


def test_import_bounds_the_text_of_row_groups_and_of_shards_without_a_drift(tmp_path, monkeypatch):
    draw = random.Random(1)
    texts = [f"{n} " + "abcdefg " * round(draw.lognormvariate(6, 1)) for n in range(1000)]
    longest = max(map(len, texts))
    monkeypatch.setattr(corpus, "GROUP_BYTES", 9000)
    monkeypatch.setattr(corpus, "MIN_GROUPS", 1)
    monkeypatch.setattr(corpus, "SHARD_BYTES", 30_000)  # of about five documents
    train, validation, _ = imported(texts, tmp_path / "shards")
    assert len(train) > 100
    assert max(sum(map(len, texts)) for texts in train) < 30_000 + longest
    assert abs(sum(map(len, validation)) - sum(map(len, texts)) / 16) <= longest, "the last one is not used up"
    sizes = [sum(map(len, group)) for group in row_groups_of(max((tmp_path / "shards").iterdir()))]
    assert 9000 <= min(sizes[:-1])
    assert max(sizes) < 9000 + longest


@pytest.mark.parametrize(
    ("data", "documents", "left_out"),
    [
        (b"one\r\n\r\n\r\ntwo\r\nthree\rfour", ["one\n\ntwo\nthree\nfour"], 0),
        (b"\xef\xbb\xbfone \xef\xbb\xbf", ["one \ufeff"], 0),  # a byte order mark is one only at the start
        (b"a" * 3000 + b"\n\ncaf\xe9 " + b"b" * 3000, ["a" * 3000], 1),
        ("a".encode("utf-16-le") * 1500, [], 1),
    ],
    ids=range(4),
)
def test_import_of_plain_text_leaves_out_the_documents_that_are_not_utf8(tmp_path, data, documents, left_out):
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.jsonl").write_bytes(json_lines(["one", "two"]))
    *found, skipped = imported(tmp_path, tmp_path / "shards")
    assert sorted(all_of(*found)) == sorted(["one", "two", *documents])
    assert sum(skipped.values()) == left_out


def test_import_counts_what_it_leaves_out_by_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 120_000)
    good, long = make_texts(3), json_lines(["a" * 130_000])
    bad_lines = b'{"content": "a"}\n["text"]\n{"text": "cut\n\n  \n{"text": "\xff"}\n' + b"[" * 100_000 + b"\n"
    rows = [*good, "a\ud800b", None, "", " \n\t", 5, ["a"], good[0]]
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows) + bad_lines + long)
    *found, skipped = imported(tmp_path, tmp_path / "shards")
    assert sorted(all_of(*found)) == sorted([*good, "a\ufffdb"]), "JSON can hold lone surrogates, parquet cannot"
    assert skipped == {
        "empty or not a string": 5, corpus.NOT_ROWS: 3 + 2, corpus.NOT_UTF8: 1, "duplicate": 1,
        "no field 'text' in the row (--text-column=NAME selects another)": 1,
    }  # fmt: skip


def test_import_counts_what_is_no_file_and_says_what_to_do_with_a_list(tmp_path):
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    (source / "a.jsonl").write_bytes(json_lines(["one", "two"]))
    (source / "list.json").write_text('["three"]')
    (source / "list.jsonl").write_text('["three"]')
    (source / "empty.txt").write_text(" \n")
    (source / "wide.jsonl").write_bytes(json_lines(["four"]).decode().encode("utf-16-le"))
    (source / "folder").symlink_to(elsewhere)
    (source / "nothing.txt").symlink_to("nothing")
    os.mkfifo(source / "pipe.txt")
    *_, skipped = imported(source, tmp_path / "shards")
    links = {"symbolic link to a folder": 1, "socket, pipe, device or broken link": 2}
    assert skipped == {corpus.NOT_ROWS: 4, "file without text": 1, **links}


def test_folders_that_cannot_be_read_are_counted_and_the_embedded_corpus_is_whole_or_not(tmp_path, monkeypatch):
    walk = os.walk

    def walk_with_an_error(top, onerror):
        onerror(PermissionError())
        return walk(top)

    monkeypatch.setattr(os, "walk", walk_with_an_error)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "two"]))
    *_, skipped = imported(tmp_path, tmp_path / "shards")
    assert skipped == {corpus.UNREADABLE: 1}
    with pytest.raises(DataError, match="missing or unreadable"):
        corpus.stdlib_sources()


def two_columns_text():
    return pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])


def cut_short(name):
    def make(path):
        WRITERS[name](path, make_texts(200))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return make


BAD_SOURCES = [
    ("a.txt", lambda path: None, "--from=.*no such file"),
    ("a.png", lambda path: path.write_bytes(b"x"), "found 0 in 0 text files .skipped: 1 hidden file"),
    ("a.jsonl", lambda path: path.write_bytes(json_lines(["a", "a"])), "at least 2 .*found 1 .* 1 duplicate"),
    ("a.parquet", lambda path: pq.write_table(pa.table({"body": ["a"]}), path), "--text-column=NAME .columns: body"),
    ("a.parquet", lambda path: pq.write_table(two_columns_text(), path), "several columns 'text'.*--text-column"),
    ("a.jsonl.gz", cut_short("a.jsonl.gz"), "a.jsonl.gz cannot be read"),
    ("a.jsonl.zst", cut_short("a.JSONL.zst"), "a.jsonl.zst cannot be read"),
    ("a.parquet", cut_short("a.parquet"), "a.parquet cannot be read"),
]


@pytest.mark.parametrize(("name", "make", "says"), BAD_SOURCES)
def test_import_says_what_is_wrong_and_leaves_nothing(tmp_path, base_dir, monkeypatch, name, make, says):
    """Of a user's own files."""
    make(tmp_path / name)
    monkeypatch.setattr(dataset, "FROM", str(tmp_path / name))
    monkeypatch.setattr(dataset, "NAME", "mine")
    with pytest.raises(DataError, match=says) as caught:
        dataset.main()
    assert "\n" not in str(caught.value)
    assert names_in(base_dir / "data") == []


def test_import_command_end_to_end(run_script, base_dir, tmp_path):
    source, folder = tmp_path / "source", base_dir / "data" / "mine"
    source.mkdir()
    (source / "a.jsonl").write_bytes(json_lines([*make_texts(100), None]).replace(b'"text"', b'"body"'))
    (source / "b.txt").write_text("my own text\n\nin two paragraphs")
    done = run_script("nanotrain.dataset", f"--from={source}", "--name=mine", "--text-column=body")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(rf"{folder}: 101 documents, 1 skipped: empty.*\n.*--data-dir={folder}", done.stdout)
    assert names_in(base_dir / "data") == ["mine"]
    assert sorted(all_of(read_all(folder), [])) == sorted([*make_texts(100), (source / "b.txt").read_text()])
    assert dataset.open_shards(folder).validation.name == "shard_00004.parquet"


@pytest.mark.parametrize("flags", [{"DATASET": "x"}, {"FROM": "x"}, {"FROM": "x", "NAME": "../x"}], ids=str)
def test_import_command_says_what_is_missing(monkeypatch, base_dir, flags):
    for name, value in flags.items():
        monkeypatch.setattr(dataset, name, value)
    with pytest.raises(UserError, match=r"--from|name"):
        dataset.main()
    assert not base_dir.exists()
