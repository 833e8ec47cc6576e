"""Making shards: cutting text into documents, the embedded corpus, and the import of a user's own text."""

import gzip
import hashlib
import json
import platform
import random
import re
import time
import tracemalloc
from collections import Counter
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


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def peak_of(function):
    """The most bytes of Python objects that `function` held at a time."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- cut ----


def odd_text(seed, longest_line):
    """Paragraphs of lines of many lengths, between blank lines of many kinds; no line is longer than asked."""
    draw = random.Random(seed)
    text = ""
    for _ in range(30):
        lines = ["".join(draw.choices("ab cé日 ", k=draw.randint(1, longest_line))) for _ in range(draw.randint(1, 8))]
        text += "\n".join(lines) + draw.choice(["\n\n", "\n \t\n", "\n\n\n\n", "\n  \n\t\n"])
    return text


@pytest.mark.parametrize("longest_line", [10, 50, 500])
def test_cut_loses_nothing_but_blank_lines_and_makes_no_document_too_long(longest_line):
    text = odd_text(7, longest_line)
    documents = corpus.cut(text, 60)
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
        ("abcdefghijklmnopqrstu", ["abcdefghij", "klmnopqrst", "u"]),  # anywhere where there is neither
        (" \n\n\t\n ", []),
    ],
)
def test_cut_by_hand(text, documents):
    assert corpus.cut(text, 10) == documents


@pytest.mark.parametrize("text", ["a" * 20_000_000, "\n " * 10_000_000])
def test_cut_takes_time_and_memory_in_proportion_to_the_text(text):
    """A slice of what is left at each cut would be 50 GB of copies."""
    begin = time.process_time()
    assert len(corpus.cut(text)) == (5000 if "a" in text else 0)
    assert time.process_time() - begin < 2
    assert peak_of(lambda: corpus.cut(text)) < 8 * len(text)


# ---- the embedded corpus ----

ORDER = ["f59adfd3f1b935f4", "46271f5a79d878b5", "b7e22c3a5f9d1d28", "636a5b8dcf5af4d6", "2dc6dc4e59c37c9e"]


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
    monkeypatch.setattr(corpus, "stdlib_sources", made_up_sources)
    return made_up_sources()


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
        details, size = pq.read_metadata(path), path.stat().st_size
        rows = [details.row_group(group).num_rows for group in range(details.num_row_groups)]
        assert rows == [*[16] * (len(rows) - 1), rows[-1]]
        expected.append({"name": path.name, "bytes": size, "sha256": found[path.name], "rows": sum(rows)})
    what = {"dataset": f"stdlib of Python {platform.python_version()}", "validation": "shard_00004.parquet"}
    assert json.loads((tmp_path / "first" / "manifest.json").read_text()) == {**what, "shards": expected}


def test_embedded_corpus_has_every_document_once_and_no_source_on_both_sides(sources, tmp_path):
    counts = dataset.build_stdlib(tmp_path)
    *train, validation = read_all(tmp_path)
    train = [text for texts in train for text in texts]
    assert counts == (len(train), len(validation))
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
    texts = [text for texts in (*train, validation) for text in texts]
    size = sum(map(len, texts))
    assert 8e6 < size < 16e6
    assert 0.05 < sum(map(len, validation)) / size < 0.08
    assert max(map(len, texts)) <= 4000
    assert len(set(texts)) == len(texts)
    assert any(topics.topics["assert"][:200] in text for text in texts), "the help topics are part of it"
    dataset.build_stdlib(tmp_path / "again")
    assert hashes(folder) == hashes(tmp_path / "again")


# ---- import ----


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
    source, texts = tmp_path / "source", make_texts(52)
    for number, name in enumerate(WRITERS):
        parent = source / "/".join("abcde"[:number])
        parent.mkdir(parents=True, exist_ok=True)
        WRITERS[name](parent / name, texts[10 * number : 10 * number + 10])
    (source / "READ.ME.MD").write_text(texts[50])
    (source / "code.py").write_text(texts[51])
    (source / ".git").mkdir()
    for name in (".hidden.txt", ".git/config.txt", "picture.png", "archive.zip", "no_suffix", "a.jsonl.part"):
        (source / name).write_text(f"not to be read {name}")
    found = imported(source, tmp_path / "shards")
    assert sorted(all_of(*found)) == sorted(texts)
    assert sorted(found[2].values()) == [2, 4], "hidden, and of another kind"


@pytest.mark.parametrize(
    "texts", [*map(make_texts, (2, 3, 4, 5, 60)), *([letter, letter * 50_000] for letter in "abcdefgh")], ids=len
)
def test_import_always_has_train_and_validation_and_no_text_in_both(tmp_path, texts):
    """Also where one document, the first or the last, is nearly all."""
    train, validation, skipped = imported([*texts, *texts[: len(texts) // 2]], tmp_path / "shards")
    assert train
    assert min(map(len, [*train, validation])) >= 1
    assert sorted(all_of(train, validation)) == sorted(texts)
    assert skipped == {"duplicate": len(texts) // 2}


def test_import_gives_the_same_bytes_however_little_memory_it_may_take(tmp_path, monkeypatch):
    texts, source, folder = [f"{n} " + "a" * 10_000 for n in range(1200)], tmp_path / "a.jsonl", tmp_path / "shards"
    imported([*texts, *texts[:20], *["b" * 10_000] * 500], tmp_path / "a")
    read_bucket, sizes, held = corpus._read_bucket, [], source.stat().st_size // 10
    monkeypatch.setattr(corpus, "_read_bucket", lambda path: sizes.append(path.stat().st_size) or read_bucket(path))
    monkeypatch.setattr(corpus, "HELD_BYTES", held)
    folder.mkdir()
    assert peak_of(lambda: corpus.import_text(source, folder)) < 2 * held + 3e6, "what a row and the readers take"
    assert hashes(folder) == hashes(tmp_path / "a")
    assert len(sizes) == 2 * 81
    assert sorted(sizes)[-3] < held / 2, "but the bucket of equal texts, which is read twice"


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
    file = pq.ParquetFile(max((tmp_path / "shards").iterdir()))
    groups = [file.read_row_group(n)["text"].to_pylist() for n in range(file.num_row_groups)]
    sizes = [sum(map(len, texts)) for texts in groups]
    assert 9000 <= min(sizes[:-1])
    assert max(sizes) < 9000 + longest


def test_import_of_little_text_still_has_many_row_groups(tmp_path):
    """Streams and ranks find something to read."""
    train, validation, _ = imported(make_texts(1000), tmp_path / "shards")
    assert len(train) == 4
    assert max(map(len, train)) < 1.2 * min(map(len, train))
    assert 0.7 * 1000 / 16 < len(validation) < 1.3 * 1000 / 16
    assert 100 < sum(pq.read_metadata(path).num_row_groups for path in (tmp_path / "shards").iterdir()) < 120


# ---- import of plain text ----


def plain_documents(path, data):
    """The documents of a plain text file, sorted, and what was skipped."""
    path.write_bytes(data)
    skipped = Counter()
    return sorted(corpus._documents(path, "text", skipped)), skipped


@pytest.mark.parametrize(
    ("data", "documents"),
    [
        (b"one\r\n\r\n\r\ntwo\r\nthree\rfour", ["one\n\ntwo\nthree\nfour"]),
        (b"\xef\xbb\xbfone \xef\xbb\xbf", ["one \ufeff"]),  # a byte order mark is one only at the start
        ("ünï日🙂 <|bos|>".encode(), ["ünï日🙂 <|bos|>"]),
        (b" \n\n\t\r\n ", []),
        (  # two blanks at the end of a paragraph decide how it is cut
            b"p" * 3000 + b"\n\n" + b"x" * 900 + b"\n" + b"y" * 3098 + b"  \n\nz",
            ["p" * 3000 + "\n\n" + "x" * 900, "y" * 3098 + "  \n\nz"],
        ),
    ],
    ids=len,
)
def test_import_of_plain_text_by_hand(tmp_path, data, documents):
    assert plain_documents(tmp_path / "a.txt", data) == (documents, {})


@pytest.mark.parametrize(("block", "longest_line"), [(1501, 50), (1501, 3000), (5003, 30_000)])
def test_import_cuts_a_long_file_as_if_it_were_read_whole(tmp_path, monkeypatch, block, longest_line):
    monkeypatch.setattr(corpus, "BLOCK_CHARS", block)
    text = odd_text(5, longest_line)[:200_000] + " \n\n\t\n" + odd_text(6, 40) * 10
    documents, _ = plain_documents(tmp_path / "a.txt", text.replace("\n", "\r\n").encode())
    assert len(documents) >= 4
    assert documents == sorted(corpus.cut(text))


def test_import_leaves_out_only_the_documents_that_are_not_utf8(tmp_path):
    """Bytes that are no UTF-8, UTF-16, and the end of a file in the middle of a character."""
    good = [letter * 3000 for letter in "abc"]
    bad = [b"caf\xe9 " + b"x" * 3000, "y".encode("utf-16-le") * 2000, b"z" * 3000 + "日".encode()[:2]]
    parts = [good[0].encode(), bad[0], good[1].encode(), bad[1], good[2].encode(), bad[2]]
    assert plain_documents(tmp_path / "a.txt", b"\n\n".join(parts)) == (good, {"not UTF-8 text": 3})


@pytest.mark.parametrize("text", ["a", "\n", "ab \n", "word\n\n"])
def test_import_holds_a_few_blocks_of_a_file_and_not_all_of_it(tmp_path, monkeypatch, text):
    """Whatever it consists of."""
    monkeypatch.setattr(corpus, "BLOCK_CHARS", 1 << 13)
    data, lengths = (text * 500_000)[:500_000], []
    (tmp_path / "a.txt").write_text(data)

    def read():
        for document in corpus._documents(tmp_path / "a.txt", "text", Counter()):
            lengths.append(len(document.replace("\n", "")))

    assert peak_of(read) < 250_000
    assert sum(lengths) == len(data.replace("\n", ""))


# ---- import: what is left out ----


def test_import_counts_what_it_leaves_out_by_reason(tmp_path):
    """Also bytes that are no UTF-8 in a column."""
    good = make_texts(3)
    bad_lines = b'{"content": "a"}\n["text"]\n{"text": "cut\n\n  \n{"text": "\xff"}\n' + b"[" * 100_000
    (tmp_path / "a.jsonl").write_bytes(json_lines([*good, None, "", " \n\t", 5, ["a"], good[0]]) + bad_lines)
    column = pa.array([None, b"fine", b"\xff\xfe", b"", good[1].encode()]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet")
    *found, skipped = imported(tmp_path, tmp_path / "shards")
    assert sorted(all_of(*found)) == sorted([*good, "fine"])
    assert skipped == {
        "null": 2, "empty": 3, "not a string": 2, "not JSON": 3, "duplicate": 2, "not UTF-8 text": 1,
        "no 'text' in the row (--text-column=NAME chooses another field)": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.JSONL.zst"])
@pytest.mark.parametrize("excess", [0, 1, 1 << 20, 5 << 20])
def test_import_never_holds_a_row_that_is_too_long(tmp_path, monkeypatch, name, excess):
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1 << 20)
    long = "a" * ((1 << 20) + excess - len(json_lines([""])))
    WRITERS[name](tmp_path / name, ["one", long, "two", long, "three"])
    *found, skipped = imported(tmp_path / name, tmp_path / "shards")
    assert sorted(all_of(*found)) == sorted(["one", "two", "three", *([] if excess else [long])])
    assert skipped == ({"row longer than 1 MiB": 2} if excess else {"duplicate": 1})


def test_import_makes_lone_surrogates_replacement_characters(tmp_path):
    """JSON can hold them, parquet cannot."""
    assert sorted(all_of(*imported(["a\ud800b", "c🙂\udc00"], tmp_path / "shards"))) == ["a\ufffdb", "c🙂\ufffd"]


def test_import_of_another_column(tmp_path):
    texts = make_texts(5)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "no", "body": text}) + "\n" for text in texts[:3]))
    pq.write_table(pa.table({"body": pa.array(texts[3:]).dictionary_encode()}), tmp_path / "a.parquet")
    assert sorted(all_of(*imported(tmp_path, tmp_path / "shards", text_column="body"))) == sorted(texts)


# ---- import: errors ----


def cut_short(name):
    def make(path):
        WRITERS[name](path, make_texts(200))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return make


def scrambled(path):
    write_gz(path, make_texts(200))
    data = bytearray(path.read_bytes())
    data[3000:3400] = bytes(400)
    path.write_bytes(data)


def no_archive(path):
    path.write_bytes(json_lines(["a", "b"]))


BAD_SOURCES = [
    ("a.txt", lambda path: None, "--from=.*no such file"),
    ("a.png", lambda path: path.write_bytes(b"x"), "found: 0, files read: 0;.* 1 file of an unknown kind"),
    ("a.txt", lambda path: path.write_bytes(b""), "found: 0, files read: 1;"),
    ("a.jsonl", lambda path: path.write_bytes(json_lines(["a", "a"])), "at least 2 .*found: 1,.* 1 duplicate"),
    ("a.parquet", lambda path: pq.write_table(pa.table({"body": ["a"]}), path), "only: body .*--text-column"),
    ("a.jsonl.gz", cut_short("a.jsonl.gz"), "a.jsonl.gz cannot be read"),
    ("a.jsonl.gz", scrambled, "a.jsonl.gz cannot be read"),
    ("a.jsonl.gz", no_archive, "a.jsonl.gz cannot be read"),
    ("a.jsonl.zst", cut_short("a.JSONL.zst"), "a.jsonl.zst cannot be read"),
    ("a.jsonl.zst", no_archive, "a.jsonl.zst cannot be read"),
    ("a.parquet", cut_short("a.parquet"), "a.parquet cannot be read"),
]


@pytest.mark.parametrize(("name", "make", "says"), BAD_SOURCES)
def test_import_says_what_is_wrong_and_leaves_nothing(tmp_path, name, make, says):
    """Of a user's own files."""
    make(tmp_path / name)
    with pytest.raises(DataError, match=says) as caught:
        dataset.import_text(tmp_path / name, tmp_path / "data" / "mine")
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path / "data") == []


def test_import_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    no_archive(tmp_path / "a.jsonl")
    seen = []

    def interrupt(*arguments, **settings):
        seen.append(names_in(tmp_path / "data"))
        raise KeyboardInterrupt

    monkeypatch.setattr(pq.ParquetWriter, "write_table", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dataset.import_text(tmp_path / "a.jsonl", tmp_path / "data" / "mine")
    assert seen[0][0].startswith(".tmp-")
    assert names_in(tmp_path / "data") == []


def test_import_command_end_to_end(run_script, base_dir, tmp_path):
    source, folder = tmp_path / "source", base_dir / "data" / "mine"
    source.mkdir()
    (source / "a.jsonl").write_bytes(json_lines([*make_texts(100), None]))
    (source / "b.txt").write_text("my own text\n\nin two paragraphs")
    done = run_script("nanotrain.dataset", f"--from={source}", "--name=mine")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(rf"{folder}: 101 documents in \d+\.\d s, 1 left out: null\n.*--data-dir={folder}", done.stdout)
    assert names_in(base_dir / "data") == ["mine"]
    assert sorted(all_of(read_all(folder), [])) == sorted([*make_texts(100), (source / "b.txt").read_text()])
    assert dataset.open_shards(folder).validation.name == "shard_00004.parquet"
    done = run_script("nanotrain.dataset", f"--from={source / 'none'}", "--name=other")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (6, "", 1)


@pytest.mark.parametrize(
    "flags",
    [{}, {"FROM": "x"}, {"FROM": "x", "NAME": "../x"}, {"FROM": "x", "NAME": "y", "DATASET": "stdlib"}],
    ids=str,
)
def test_import_command_says_what_is_missing(monkeypatch, base_dir, flags):
    for name, value in flags.items():
        monkeypatch.setattr(dataset, name, value)
    with pytest.raises(UserError, match=r"--from|name"):
        dataset.main()
    assert not base_dir.exists()
