"""Making shards: cutting text into documents, the embedded corpus, and the import of a user's own text."""

import gzip
import hashlib
import json
import random
import re
from collections import Counter
from pydoc_data import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_shards, make_texts

from nanotrain import corpus, dataset
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
    kept = [line for document in corpus.cut(text, 60) for line in document.split("\n") if line.strip()]
    assert kept == written


@pytest.mark.parametrize("seed", range(4))
def test_cut_keeps_every_character_of_lines_longer_than_a_document(seed):
    text = odd_text(seed, longest_line=500)
    assert re.sub(r"\s", "", "".join(corpus.cut(text, 60))) == re.sub(r"\s", "", text)


@pytest.mark.parametrize("longest_line", [10, 50, 500])
def test_cut_documents_are_never_too_long_nor_blank(longest_line):
    documents = corpus.cut(odd_text(7, longest_line), 60)
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
    assert corpus.cut(text, 10) == documents


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
    monkeypatch.setattr(corpus, "stdlib_sources", made_up_sources)
    return made_up_sources()


def test_embedded_corpus_has_the_same_bytes_every_time(sources, tmp_path, monkeypatch):
    dataset.build_stdlib(tmp_path / "first")
    backwards = dict(reversed(sources.items()))  # a file system may list its files in any order
    monkeypatch.setattr(corpus, "stdlib_sources", lambda: backwards)
    dataset.build_stdlib(tmp_path / "second")
    assert len(names_in(tmp_path / "first")) == corpus.STDLIB_SHARDS + 2
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
    cuts = [document for source in sources.values() for document in corpus.cut(source)]
    assert len(cuts) > len(set(cuts)), "the made-up sources must repeat themselves for this to mean anything"
    assert sorted(documents) == sorted(set(cuts))
    assert counts == (sum(map(len, train)), len(validation))


def test_embedded_corpus_keeps_a_text_of_both_sides_in_train(sources, tmp_path):
    dataset.build_stdlib(tmp_path)
    validation = read_all(tmp_path)["shard_00004.parquet"]
    marks = set(re.findall(r"mark\d\d", " ".join(validation)))
    cuts = {True: set(), False: set()}
    for source in sources.values():
        cuts[source[:6] in marks].update(corpus.cut(source))
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


