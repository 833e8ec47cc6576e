"""Making shards: cutting text into documents, the embedded corpus, and the import of a user's own text."""

import gzip
import hashlib
import itertools
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
    assert manifest["dataset"] == f"stdlib of Python {platform.python_version()}"
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


def test_embedded_corpus_replaces_that_of_another_python(sources, tmp_path):
    make_shards(tmp_path, train=8)
    dataset.write_manifest(tmp_path, f"{dataset.STDLIB} 3.0.0", "shard_00008.parquet")
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


# ---- import ----


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows_of(texts):
    return [{"text": text} for text in texts]


def write_plain(path, texts):
    """Files of their own, since a plain text file is cut into documents."""
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number}.txt").write_text(text, encoding="utf-8")


def write_jsonl(path, texts):
    path.write_bytes(json_lines(rows_of(texts)))


def write_gz(path, texts):
    middle = len(texts) // 2  # as `cat a.gz b.gz` makes it
    path.write_bytes(b"".join(gzip.compress(json_lines(rows_of(part))) for part in (texts[:middle], texts[middle:])))


def write_zst(path, texts):
    middle = len(texts) // 2
    for part in (texts[:middle], texts[middle:]):
        with open(path, "ab") as file, pa.CompressedOutputStream(file, "zstd") as packed:
            packed.write(json_lines(rows_of(part)))


def write_parquet(path, texts):
    pq.write_table(pa.table({"number": range(len(texts)), "text": texts}), path, row_group_size=7)


WRITERS = {"plain": write_plain, "a.jsonl": write_jsonl, "a.jsonl.gz": write_gz, "a.JSONL.zst": write_zst,
           "a.parquet": write_parquet}  # fmt: skip


def imported(source, folder, **settings):
    """([documents of each train shard], documents of validation, Counter of what was skipped)."""
    folder.mkdir()
    validation, count, skipped = corpus.import_text(source, folder, **settings)
    shards = read_all(folder)
    assert names_in(folder) == [f"shard_{number:05d}.parquet" for number in range(len(shards))]
    assert validation == max(shards)
    assert count == sum(map(len, shards.values()))
    *train, last = shards.values()
    return train, last, skipped


def all_of(train, validation, skipped=None):
    return [text for texts in (*train, validation) for text in texts]


def hashes(folder):
    return {path.name: sha256(path) for path in folder.iterdir()}


@pytest.mark.parametrize("name", WRITERS)
def test_import_gives_the_documents_that_were_written(tmp_path, name):
    texts = [*make_texts(40), "line\nline\n\n\n\nline", "  indented", "日" * 3000, "<|bos|>", "a\r\nb\x0bc"]
    if name == "plain":
        texts = [*texts[:40], *texts[41:44]]  # what cutting and reading as text would change is tested below
    WRITERS[name](tmp_path / name, texts)
    found = imported(tmp_path / name, tmp_path / "shards")
    assert sorted(all_of(*found)) == sorted(texts)
    assert found[2] == Counter()


def test_import_of_a_folder_takes_every_kind_of_file_at_every_depth_and_nothing_hidden(tmp_path):
    source, texts = tmp_path / "source", make_texts(70)
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
    assert sorted(all_of(*found)) == sorted(texts[:52])
    assert found[2] == {"hidden file": 2, "file of an unknown kind (a text file is read if it ends in .txt)": 4}


def test_import_of_the_same_documents_gives_the_same_bytes_whatever_holds_them(tmp_path):
    texts = make_texts(200)
    for number, name in enumerate(WRITERS):
        (tmp_path / f"{number}").mkdir()
        shuffled = random.Random(number).sample(texts, 200)
        WRITERS[name](tmp_path / f"{number}" / f"{9 - number}-{name}", shuffled[:120])
        WRITERS["a.jsonl"](tmp_path / f"{number}" / "b.jsonl", shuffled[100:])
        imported(tmp_path / f"{number}", tmp_path / f"shards{number}")
    assert all(hashes(tmp_path / f"shards{number}") == hashes(tmp_path / "shards0") for number in range(len(WRITERS)))
    write_jsonl(tmp_path / "less.jsonl", texts[1:])
    imported(tmp_path / "less.jsonl", tmp_path / "less")
    assert hashes(tmp_path / "less") != hashes(tmp_path / "shards0")


def test_import_shuffles(tmp_path):
    texts = make_texts(400)
    write_jsonl(tmp_path / "a.jsonl", texts)
    places = [texts.index(text) for text in all_of(*imported(tmp_path / "a.jsonl", tmp_path / "shards"))]
    rising = sum(a < b for a, b in itertools.pairwise(places))
    assert 150 < rising < 250, "about half of 399 steps go up in a random order"
    assert sum(abs(place - number) for number, place in enumerate(places)) > 400 * 400 / 4, "about n^2 / 3"
    by_text = sorted(texts)
    assert [by_text.index(texts[place]) for place in places] != list(range(400))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 17, 60, 1000])
def test_import_always_has_train_and_validation_and_no_text_in_both(tmp_path, count):
    """DA10."""
    texts = make_texts(count)
    write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[: count // 2]])
    train, validation, skipped = imported(tmp_path / "a.jsonl", tmp_path / "shards")
    assert min(map(len, [*train, validation])) >= 1
    assert sorted(all_of(train, validation)) == sorted(texts)
    assert skipped == {"duplicate": count // 2}
    if count == 1000:
        assert 0.7 * 1000 / 16 < len(validation) < 1.3 * 1000 / 16
        assert max(map(len, train)) < 1.2 * min(map(len, train))


def test_import_has_train_and_validation_where_one_document_is_nearly_all(tmp_path):
    """DA10: whether that one comes first or last."""
    first = set()
    for letter in "abcdefgh":
        write_jsonl(tmp_path / f"{letter}.jsonl", texts := [letter, letter * 50_000])
        train, validation, _ = imported(tmp_path / f"{letter}.jsonl", tmp_path / letter)
        assert [*train, validation] in ([[texts[0]], [texts[1]]], [[texts[1]], [texts[0]]])
        first.add(len(train[0][0]))
    assert first == {1, 50_000}


def test_import_drops_exact_duplicates_only(tmp_path):
    near = ["the same", "the same ", "The same", "the same\n", "the  same"]
    write_jsonl(tmp_path / "a.jsonl", [*near, *near, "other"])
    write_parquet(tmp_path / "b.parquet", near[:2])
    *found, skipped = imported(tmp_path, tmp_path / "shards")
    assert sorted(all_of(*found)) == sorted([*near, "other"])
    assert skipped == {"duplicate": 7}


@pytest.mark.parametrize(("bits", "bucket_bytes"), [(1, 1 << 20), (1, 1), (2, 3000), (6, 4000)])
def test_import_in_any_number_of_buckets_gives_the_same_bytes(tmp_path, monkeypatch, bits, bucket_bytes):
    write_jsonl(tmp_path / "a.jsonl", make_texts(300) + make_texts(20) + ["one text"] * 50)
    imported(tmp_path / "a.jsonl", tmp_path / "expected")
    monkeypatch.setattr(corpus, "BUCKET_BITS", bits)
    monkeypatch.setattr(corpus, "BUCKET_BYTES", bucket_bytes)
    sort_bucket, sizes = corpus._sort_bucket, []

    def watching(path, skipped):
        sizes.append(path.stat().st_size)
        return sort_bucket(path, skipped)

    monkeypatch.setattr(corpus, "_sort_bucket", watching)
    *_, skipped = imported(tmp_path / "a.jsonl", tmp_path / "shards")
    assert skipped == {"duplicate": 69}
    assert hashes(tmp_path / "shards") == hashes(tmp_path / "expected")
    if bucket_bytes == 1:
        assert len(sizes) == 2**corpus.LEVELS, "even so it ends"
    elif bits > 1:
        assert len(sizes) > 2**bits, "some were divided again"
        assert sum(size > bucket_bytes for size in sizes) <= 1, "but that of equal texts"


@pytest.mark.parametrize("group_bytes", [2000, 9000])
def test_import_bounds_the_text_of_row_groups_and_shards(tmp_path, monkeypatch, group_bytes):
    texts = make_texts(600)
    longest = max(len(text.encode()) for text in texts)
    write_jsonl(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr(corpus, "GROUP_BYTES", group_bytes)
    monkeypatch.setattr(corpus, "MIN_GROUPS", 1)
    monkeypatch.setattr(corpus, "SHARD_BYTES", 30_000)
    imported(tmp_path / "a.jsonl", tmp_path / "shards")
    shards = sorted((tmp_path / "shards").iterdir())
    assert len(shards) >= 8
    for path in shards:
        file = pq.ParquetFile(path)
        groups = [file.read_row_group(n)["text"].to_pylist() for n in range(file.num_row_groups)]
        sizes = [sum(len(text.encode()) for text in texts) for texts in groups]
        assert max(sizes) < group_bytes + longest
        assert min(sizes[:-1], default=group_bytes) >= group_bytes
        assert sum(sizes) < 30_000 + longest


def test_long_documents_do_not_use_up_the_text_for_validation(tmp_path, monkeypatch):
    draw = random.Random(1)
    texts = [f"{n} " + "abcdefg " * round(draw.lognormvariate(6, 1)) for n in range(1000)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr(corpus, "SHARD_BYTES", 30_000)  # of about five documents
    imported(tmp_path / "a.jsonl", tmp_path / "shards")
    shards = sorted((tmp_path / "shards").iterdir())
    sizes = [sum(len(text) for text in pq.read_table(path)["text"].to_pylist()) for path in shards]
    assert len(shards) > 100
    assert abs(sizes[-1] - sum(sizes) / 16) <= max(map(len, texts))


def test_import_of_little_text_still_has_many_row_groups(tmp_path):
    """DA9: lanes and ranks find something to read."""
    write_jsonl(tmp_path / "a.jsonl", make_texts(1000))
    imported(tmp_path / "a.jsonl", tmp_path / "shards")
    *train, _ = sorted((tmp_path / "shards").iterdir())
    assert len(train) == 4
    assert 80 < sum(pq.read_metadata(path).num_row_groups for path in train) <= 110


# ---- import of plain text ----


def plain_documents(tmp_path, data):
    """The documents of a plain text file, sorted; two more documents are there so that there are enough."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").write_bytes(data)
    write_jsonl(tmp_path / "source" / "b.jsonl", ["first of two", "second of two"])
    *found, skipped = imported(tmp_path / "source", tmp_path / "shards")
    return sorted(set(all_of(*found)) - {"first of two", "second of two"}), skipped


@pytest.mark.parametrize(
    ("data", "documents"),
    [
        (b"one\n\ntwo", ["one\n\ntwo"]),
        (b"one\r\n\r\n\r\ntwo\r\nthree", ["one\n\ntwo\nthree"]),
        (b"one\rtwo", ["one\ntwo"]),
        (b"\xef\xbb\xbfone \xef\xbb\xbf", ["one \ufeff"]),  # a byte order mark is one only at the start
        ("ünï日🙂".encode(), ["ünï日🙂"]),
        (b"<|bos|>", ["<|bos|>"]),
        (b"", []),
        (b" \n\n\t\r\n ", []),
    ],
)
def test_import_of_plain_text_by_hand(tmp_path, data, documents):
    assert plain_documents(tmp_path, data) == (documents, {})


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 4096, 1 << 20])
def test_import_of_plain_text_does_not_show_the_edges_of_blocks(tmp_path, monkeypatch, block, newline):
    """Paragraphs of which no two fit in a document are the documents."""
    monkeypatch.setattr(corpus, "BLOCK_BYTES", block)
    draw = random.Random(block)
    paragraphs = ["".join(draw.choices("ab é日🙂", k=2200)).strip() + f"\nend {n}" for n in range(4)]
    data = "\n\n".join(paragraphs).replace("\n", newline).encode()
    assert plain_documents(tmp_path, data) == (sorted(paragraphs), {})


@pytest.mark.parametrize("longest_line", [50, 3000, 30_000])
@pytest.mark.parametrize("block", [1501, 5003])
def test_import_cuts_a_long_file_as_if_it_were_read_whole(tmp_path, monkeypatch, block, longest_line):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", block)
    text = odd_text(5, longest_line)[:200_000] + " \n\n\t\n" + odd_text(6, 40) * 10
    documents, skipped = plain_documents(tmp_path, text.encode())
    expected = Counter(corpus.cut(text))
    assert len(expected) >= 4
    assert documents == sorted(expected)
    assert skipped["duplicate"] == expected.total() - len(expected)


def test_import_of_a_file_without_blank_lines_cuts_it_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 2000)
    lines = [f"line {number} " + "word " * (number % 40) for number in range(3000)]
    documents, _ = plain_documents(tmp_path, "\n".join(lines).encode())
    in_order = sorted(documents, key=lambda document: int(document.split()[1]))
    assert all(3700 < len(document) <= 4000 for document in in_order[:-1])
    assert "\n".join(in_order).split("\n") == lines


def test_import_leaves_out_only_the_documents_that_are_not_utf8(tmp_path):
    """DA6: bytes that are no UTF-8, one of UTF-16, and the end of a file in the middle of a character."""
    good = [letter * 3000 for letter in "abc"]
    bad = [b"caf\xe9 " + b"x" * 3000, "y".encode("utf-16") * 900, b"z" * 3000 + "日".encode()[:2]]
    parts = [good[0].encode(), bad[0], good[1].encode(), bad[1], good[2].encode(), bad[2]]
    assert plain_documents(tmp_path, b"\n\n".join(parts)) == (good, {"not UTF-8 text": 3})


# ---- import: time and memory ----


@pytest.mark.parametrize("text", ["a" * 20_000_000, "\n" * 20_000_000, " " * 20_000_000, "\n " * 10_000_000])
def test_cut_takes_time_and_memory_in_proportion_to_the_text(text):
    """DA5: a slice of what is left at each cut would be 50 GB of copies."""
    begin = time.process_time()
    documents = corpus.cut(text)
    assert time.process_time() - begin < 2
    assert len(documents) == (5000 if "a" in text else 0)
    tracemalloc.start()
    corpus.cut(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(text)


@pytest.mark.parametrize("text", ["a", "\n", "ab \n", "word\n\n"])
def test_import_holds_a_few_blocks_of_a_file_and_not_all_of_it(tmp_path, monkeypatch, text):
    """DA5: whatever it consists of."""
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 1 << 13)
    (tmp_path / "a.txt").write_bytes((text * 500_000).encode()[:500_000])

    def read():
        skipped = Counter()
        with corpus._bar("reading", 0) as bar:
            return Counter(corpus._documents(tmp_path / "a.txt", "text", skipped, bar))

    tracemalloc.start()
    documents = read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250_000
    characters = sum(count * len(document.replace("\n", "")) for document, count in documents.items())
    assert characters == len((text * 500_000)[:500_000].replace("\n", ""))


def test_import_takes_long_rows_as_they_are(tmp_path):
    """DA5."""
    texts = ["a" * 2_000_000, "b" * 4001, "c\n\n" * 5000]
    write_jsonl(tmp_path / "a.jsonl", texts)
    assert sorted(all_of(*imported(tmp_path / "a.jsonl", tmp_path / "shards"))) == texts


# ---- import: what is left out ----


def test_import_counts_what_it_leaves_out_by_reason(tmp_path):
    """DA4, and DA6 in a column."""
    good = make_texts(3)
    bad = [{"text": value} for value in (None, "", " \n\t", 5, ["a"])] + [{"content": "a"}, ["text"]]
    bad_lines = b'{"text": "cut\n\n  \n' + b'{"text": "\xff"}\n' + b"[" * 100_000
    (tmp_path / "a.jsonl").write_bytes(json_lines([*rows_of(good), *bad, {"text": good[0]}]) + bad_lines)
    column = pa.array([None, b"fine", b"\xff\xfe", b"", good[1].encode()]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet")
    *found, skipped = imported(tmp_path, tmp_path / "shards")
    assert sorted(all_of(*found)) == sorted([*good, "fine"])
    assert skipped == {
        "null": 2, "empty": 3, "not a string": 2, "not JSON": 3, "duplicate": 2, "not UTF-8 text": 1,
        "no 'text' in the row (--text-column=NAME chooses another field)": 2,
    }  # fmt: skip


@pytest.mark.parametrize("write", [write_jsonl, write_gz, write_zst])
@pytest.mark.parametrize("excess", [-1, 0, 1, 1000, 1 << 20, (1 << 20) + 1, 5 << 20])
def test_import_never_holds_a_row_that_is_too_long(tmp_path, monkeypatch, write, excess):
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1 << 20)
    long = "a" * ((1 << 20) + excess - len(json_lines(rows_of([""]))))
    write(tmp_path / "a.jsonl", ["one", long, "two", long, "three"])
    path = (tmp_path / "a.jsonl").rename(
        tmp_path / {write_gz: "a.jsonl.gz", write_zst: "a.jsonl.zst"}.get(write, "a.jsonl")
    )
    *found, skipped = imported(path, tmp_path / "shards")
    fits = excess <= 0
    assert sorted(all_of(*found)) == sorted(["one", "two", "three", *([long] if fits else [])])
    assert skipped == ({"duplicate": 1} if fits else {"row longer than 1 MiB": 2})


def test_import_makes_lone_surrogates_replacement_characters(tmp_path):
    """DA7: JSON can hold them, parquet cannot."""
    (tmp_path / "a.jsonl").write_bytes(rb'{"text": "a\ud800b"}' + b"\n" + rb'{"text": "c\ud83d\ude42\udc00"}')
    assert sorted(all_of(*imported(tmp_path, tmp_path / "shards"))) == ["a\ufffdb", "c🙂\ufffd"]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_import_of_another_column(tmp_path, write):
    path = tmp_path / ("a.jsonl" if write is write_jsonl else "a.parquet")
    texts = make_texts(5)
    if write is write_jsonl:
        path.write_bytes(json_lines([{"text": "no", "body": text} for text in texts]))
    else:
        pq.write_table(pa.table({"text": ["no"] * 5, "body": pa.array(texts).dictionary_encode()}), path)
    assert sorted(all_of(*imported(path, tmp_path / "shards", text_column="body"))) == sorted(texts)


# ---- import: errors ----


def damaged(write, harm):
    def make(path):
        write(path, make_texts(200))
        path.write_bytes(harm(path.read_bytes()))

    return make


def half(data):
    return data[: len(data) // 2]


def scrambled(data):
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0x5A for byte in data[middle : middle + 400]) + data[middle + 400 :]


def of_another_kind(path):
    write_jsonl(path, ["a", "b"])


def without_rows(path):
    path.write_bytes(json_lines([{"text": ""}, {"body": "a"}]))


def other_columns(path):
    pq.write_table(pa.table({"id": [1, 2], "body": ["a", "b"]}), path)


BAD_SOURCES = {
    "missing": ("a.txt", lambda path: None, r"--from=.*a.txt: no such file or folder"),
    "nothing to read": ("folder", lambda path: path.mkdir(), r"folder: no .txt, .* or other text file there"),
    "another kind": (
        "a.png",
        lambda path: path.write_bytes(b"x"),
        r"a.png: no .txt, .* text file there \(1 file of an",
    ),
    "empty file": ("a.txt", lambda path: path.write_bytes(b""), r"no text in 1 files \(all empty\)"),
    "no good row": ("a.jsonl", without_rows, r"no text in 1 files \(1 empty, 1 no 'text' .*--text-column"),
    "one document": ("a.txt", lambda path: path.write_text("one"), r"a single document; at least two are needed"),
    "equal documents": ("a.jsonl", lambda path: write_jsonl(path, ["a", "a"]), r"a single document; .*\(1 duplicate\)"),
    "missing column": ("a.parquet", other_columns, r"no column 'text', only: id, body \(--text-column=NAME"),
    "cut gz": ("a.jsonl.gz", damaged(write_gz, half), r"a.jsonl.gz cannot be read: Compressed file ended"),
    "scrambled gz": ("a.jsonl.gz", damaged(write_gz, scrambled), r"a.jsonl.gz cannot be read: .*(invalid|CRC)"),
    "no gz": ("a.jsonl.gz", of_another_kind, r"a.jsonl.gz cannot be read: Not a gzipped file"),
    "cut zst": ("a.jsonl.zst", damaged(write_zst, half), r"a.jsonl.zst cannot be read: "),
    "no zst": ("a.jsonl.zst", of_another_kind, r"a.jsonl.zst cannot be read: ZSTD decompress"),
    "cut parquet": ("a.parquet", damaged(write_parquet, half), r"a.parquet cannot be read: Parquet magic bytes"),
    "no parquet": ("a.parquet", of_another_kind, r"a.parquet cannot be read: Parquet magic bytes"),
}


@pytest.mark.parametrize(("name", "make", "says"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_import_says_what_is_wrong_and_leaves_nothing(tmp_path, name, make, says):
    """DA1 and DA3 of a user's own files."""
    make(tmp_path / name)
    with pytest.raises(DataError, match=says) as caught:
        dataset.import_text(tmp_path / name, tmp_path / "data" / "mine")
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path / "data") == []


PLACES = {
    "reading": (corpus, "_is_utf8"),
    "sorting": (corpus, "_sort_bucket"),
    "writing": (corpus.ShardWriter, "add"),
    "closing": (corpus.ShardWriter, "close"),
    "manifest": (dataset, "file_sha256"),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_import_that_ends_in_the_middle_leaves_nothing(tmp_path, monkeypatch, place, error):
    mine = tmp_path / "data" / "mine"
    write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    real, calls, seen = getattr(*place), [], []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            seen.append([path.name[:5] for path in sorted((tmp_path / "data").iterdir())])
            raise error
        return real(*arguments)

    monkeypatch.setattr(*place, failing)
    with pytest.raises(type(error)):
        dataset.import_text(tmp_path / "a.jsonl", mine)
    assert seen == [[".tmp-"]], "it was in the middle of it"
    assert names_in(tmp_path / "data") == []
    dataset.import_text(tmp_path / "a.jsonl", mine)
    assert names_in(tmp_path / "data") == ["mine"]
    assert sorted(all_of(read_all(mine).values(), [])) == sorted(make_texts(50))
    assert names_in(mine) == ["manifest.json", *(f"shard_{number:05d}.parquet" for number in range(5))]
    assert dataset.verify(mine) == []


def test_import_command_end_to_end(run_script, base_dir, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_jsonl(source / "a.jsonl", [*make_texts(100), None])
    (source / "b.txt").write_text("my own text\n\nin two paragraphs")
    done = run_script("nanotrain.dataset", f"--from={source}", "--name=mine")
    assert (done.returncode, done.stderr) == (0, "")
    folder = base_dir / "data" / "mine"
    first, second = done.stdout.splitlines()
    assert re.fullmatch(rf"{folder}: 101 documents in \d+\.\d s, 1 left out: null", first)
    assert f"--data-dir={folder}" in second
    assert names_in(base_dir / "data") == ["mine"]
    shards = dataset.open_shards(folder)
    found = [text for shard in (*shards.train, shards.validation) for group in range(len(shard.group_rows))
             for text in dataset.read_texts(shard.path, group)]  # fmt: skip
    assert sorted(found) == sorted([*make_texts(100), "my own text\n\nin two paragraphs"])
    assert shards.validation.name == dataset.read_manifest(folder)["validation"] == "shard_00004.parquet"
    done = run_script("nanotrain.dataset", f"--from={source / 'none'}", "--name=other")
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr == f"error: --from={source / 'none'}: no such file or folder\n"
    done = run_script("nanotrain.dataset", f"--from={source}", "--name=mine")
    assert (done.returncode, done.stdout) == (2, "")
    assert str(folder) in done.stderr
    assert dataset.verify(folder) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"FROM": "x"}, "--from needs a name for the data set, as in --name=mine"),
        ({"FROM": "x", "NAME": "../mine"}, "data set name '../mine'"),
        ({"FROM": "x", "NAME": "mine", "DATASET": "stdlib"}, "--dataset, --from and --base-url: one of them at a time"),
    ],
)
def test_import_command_says_what_is_missing(monkeypatch, base_dir, settings, says):
    for name, value in settings.items():
        monkeypatch.setattr(dataset, name, value)
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        dataset.main()
    assert caught.value.exit_code == 2
    assert not base_dir.exists()
