"""Shards: opening, reading and verifying folders of them, and what the commands may replace."""

import hashlib
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_shards, make_texts

from nanotrain import corpus, dataset, paths
from nanotrain.errors import DataError, UserError

NAMES = [f"shard_{number:05d}.parquet" for number in range(9)]


def listed_shards(folder, validation=NAMES[2], **settings):
    """make_shards with a manifest."""
    dataset.write_manifest(make_shards(folder, **settings), "mine", validation)
    return folder


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# ---- reading ----


def test_shards_are_read_in_order_without_null_and_empty_texts_and_no_further_than_asked(data_dir, tmp_path):
    shard_paths = sorted(data_dir.glob("*.parquet"))
    expected = [text for path in shard_paths for text in pq.read_table(path)["text"].to_pylist()]
    assert list(dataset.read_shards(shard_paths)) == expected
    dataset.write_shard(tmp_path / NAMES[0], ["a", None, "", "b", None, "", "cd"], rows_per_group=3)
    assert list(dataset.read_shards([tmp_path / NAMES[0]], 1)) == ["a", "b", "c"]
    texts = dataset.read_shards([tmp_path / NAMES[0], tmp_path / "no such shard"])
    assert [next(texts) for _ in range(3)] == ["a", "b", "cd"]


def test_open_shards_tells_rows_and_size_of_text(tmp_path):
    draw = random.Random(1)
    texts = ["".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(5000)) for _ in range(10)]
    columns = {"source": pa.array([{"name": "x", "text": 1}] * 10), "text": pa.array(texts)}
    pq.write_table(pa.table(columns), tmp_path / NAMES[0], row_group_size=4)
    dataset.write_shard(tmp_path / NAMES[1], ["validation"])
    (shard,) = dataset.open_shards(tmp_path).train
    assert shard.group_rows == (4, 4, 2)
    assert shard.text_bytes == pytest.approx(50_000, rel=0.01)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_string_column_is_read(tmp_path, kind):
    texts = ["eins", None, "zwei", "eins"]
    pq.write_table(pa.table({"text": pa.array(texts, pa.string()).cast(kind)}), tmp_path / NAMES[0])
    assert dataset.open_shard(tmp_path / NAMES[0]).group_rows == (4,)
    assert list(dataset.read_texts(tmp_path / NAMES[0], 0, 1)) == texts[1:]


def test_validation_is_never_in_train(tmp_path):
    """The last by name, or what the manifest says, also when shards are added; files of other names are ignored."""
    make_shards(tmp_path, train=3)
    for name in ("shard_a.parquet", "shard_00009.parquet.part", ".shard_00009.parquet", "Shard_00009.parquet", "a.txt"):
        (tmp_path / name).write_text("not parquet")
    for validation in (None, *NAMES[:4]):
        if validation:
            dataset.write_manifest(tmp_path, "mine", validation)
            dataset.write_shard(tmp_path / NAMES[8], ["later"])
        shards, last = dataset.open_shards(tmp_path), validation or NAMES[3]
        assert shards.validation.name == last
        there = NAMES[:4] if validation is None else [*NAMES[:4], NAMES[8]]
        assert [shard.name for shard in shards.train] == [name for name in there if name != last]


def with_table(**columns):
    return lambda folder: pq.write_table(pa.table(columns), make_shards(folder) / NAMES[1])


def with_bytes(change):
    def write(folder):
        path = make_shards(folder) / NAMES[1]
        path.write_bytes(change(path.read_bytes()))

    return write


def with_manifest(text):
    return lambda folder: (make_shards(folder) / "manifest.json").write_text(text)


TWO_COLUMNS = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])


def no_rows(folder):
    dataset.write_shard(folder / NAMES[0], [])
    dataset.write_shard(folder / NAMES[1], ["x"])


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: folder.rmdir(), "no shard_<digits>.*--dataset=stdlib"),
        (lambda folder: dataset.write_shard(folder / NAMES[0], ["x"]), "no train shard"),
        (no_rows, "no train shard with rows"),
        (with_table(content=["a"], id=[1]), rf"{NAMES[1]} must have exactly one.* 'text'.*: content \(string\)"),
        (lambda folder: pq.write_table(TWO_COLUMNS, make_shards(folder) / NAMES[1]), "exactly one string column"),
        (with_table(text=[b"a", b"b"]), f"{NAMES[1]} must have exactly one string column 'text'"),
        (with_bytes(lambda data: data[:-400] + bytes(392) + data[-8:]), f"{NAMES[1]} is not a readable parquet"),
        (lambda folder: dataset.write_shard(listed_shards(folder) / NAMES[1], ["b"]), "bytes, the manifest says"),
        (lambda folder: (listed_shards(folder) / NAMES[1]).unlink(), f"lacks {NAMES[1]} of its manifest"),
        (with_manifest('{"validation": "shard_0'), "manifest.json is not a valid manifest"),
        (with_manifest("[" * 100_000), "manifest.json is not a valid manifest"),
        (with_manifest('{"docs": 3}'), "manifest.json is not a valid manifest: rename"),
        (with_manifest(f'{{"validation": "{NAMES[2]}", "shards": [{{"name": "../x"}}]}}'), "not a valid manifest"),
    ],
)
def test_open_shards_says_what_is_wrong(tmp_path, prepare, says):
    folder = tmp_path / "shards"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(DataError, match=says) as caught:
        dataset.open_shards(folder)
    assert "\n" not in str(caught.value)


def damaged_page(path):
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(len(data) // 2) + data[len(data) // 2 + 4 :])


def not_utf8(path):
    text = pa.array([b"\xff\xfe\xfd"] * 40).view(pa.string())
    pq.write_table(pa.table({"text": text}), path, 5)


def no_rows_any_more(path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)


@pytest.mark.parametrize("harm", [damaged_page, not_utf8, no_rows_any_more, lambda path: path.unlink()])
def test_a_row_group_that_cannot_be_read_is_named(tmp_path, harm):
    """Also where the shard was replaced or has vanished since it was opened."""
    path = make_shards(tmp_path) / NAMES[0]
    harm(path)
    with pytest.raises(DataError, match=rf"{NAMES[0]}, row group 1, cannot be read .*replace the file"):
        list(dataset.read_texts(path, 1))


def test_any_rows_of_a_row_group_are_read(tmp_path, monkeypatch):
    path, texts = tmp_path / NAMES[0], make_texts(40)
    dataset.write_shard(path, texts, rows_per_group=20)
    monkeypatch.setattr(dataset, "READ_BYTES", 100)
    for group, start, stop in ((1, 0, 5), (0, 19, 20), (0, 3, 17), (0, 7, 7), (1, 0, None)):
        expected = texts[20 * group :][:20][start:stop]
        assert list(dataset.read_texts(path, group, start, stop)) == expected


# ---- hashes ----


@pytest.mark.parametrize("validation", [None, NAMES[0]])
def test_fingerprint_has_size_and_hash_of_every_shard_and_none_equals_validation(tmp_path, validation):
    make_shards(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    expected = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    if validation:
        dataset.write_manifest(tmp_path, "mine", validation)
    found = dataset.fingerprint(dataset.open_shards(tmp_path))
    assert found == {"validation": validation or NAMES[2], "files": expected}
    (tmp_path / NAMES[1]).write_bytes((tmp_path / (validation or NAMES[2])).read_bytes())
    if validation:
        dataset.write_manifest(tmp_path, "mine", validation)
    with pytest.raises(DataError, match=f"{NAMES[1]} has the same content as the validation shard"):
        dataset.fingerprint(dataset.open_shards(tmp_path))


def test_verify_notices_any_flipped_bit_and_reading_gives_text_or_a_data_error(tmp_path):
    """Pages have no checksum of their own, so only the hash of the whole file is sure to notice."""
    path = listed_shards(tmp_path, NAMES[1], train=1) / NAMES[0]
    good, texts, unnoticed = path.read_bytes(), list(dataset.read_shards([path])), 0
    for place in range(0, len(good), 211):
        flip(path, place)
        assert dataset.verify(tmp_path) == [f"{NAMES[0]} does not match its SHA-256"]
        try:
            unnoticed += list(dataset.read_shards([path])) != texts
        except DataError as error:
            assert NAMES[0] in str(error)  # noqa: PT017
        path.write_bytes(good)
    assert dataset.verify(tmp_path) == []
    assert unnoticed > 0, "this is why there are hashes"


def test_verify_command_names_every_bad_shard_of_one_or_all_data_sets(monkeypatch, capsys):
    monkeypatch.setattr(dataset, "VERIFY", True)
    with pytest.raises(DataError, match=r"no data set with a manifest.json"):
        dataset.main()
    one, two = (listed_shards(paths.dataset_dir(name)) for name in ("one", "two"))
    without = make_shards(paths.dataset_dir("without"))
    dataset.main()
    good = "every shard matches the manifest"
    assert capsys.readouterr().out == f"{one}: {good}\n{two}: {good}\n"
    (two / NAMES[1]).unlink()
    flip(two / NAMES[2], 100)
    dataset.write_shard(two / NAMES[7], ["new"])
    bad = f"{NAMES[1]} is missing; {NAMES[2]} does not match its SHA-256; {NAMES[7]} is not in the manifest"
    with pytest.raises(DataError, match="3 bad shards"):
        dataset.main()
    assert capsys.readouterr().out == f"{one}: {good}\n{two}: {bad}\n"
    monkeypatch.setattr(dataset, "NAME", without.name)
    with pytest.raises(DataError, match="without has no manifest"):
        dataset.main()


# ---- what lies where a data set is to go ----


@pytest.fixture
def _small_stdlib(monkeypatch):
    monkeypatch.setattr(corpus, "stdlib_sources", lambda: {f"f{n}.py": text for n, text in enumerate(make_texts(60))})


@pytest.mark.usefixtures("_small_stdlib")
def test_the_embedded_corpus_is_built_once_and_replaced_if_it_is_damaged_or_of_another_python(tmp_path, monkeypatch):
    folder = tmp_path / "stdlib"
    folder.symlink_to(tmp_path / "elsewhere")
    assert dataset.build_stdlib(folder)
    assert not dataset.build_stdlib(folder)
    (folder / NAMES[0]).write_bytes(b"")
    assert dataset.build_stdlib(folder)
    monkeypatch.setattr(dataset.platform, "python_version", lambda: "9.9")
    assert dataset.build_stdlib(folder)
    assert dataset.verify(folder) == []


@pytest.mark.usefixtures("_small_stdlib")
def test_of_two_that_build_the_embedded_corpus_at_once_the_second_finds_it_built(tmp_path, monkeypatch):
    documents, folder = corpus.stdlib_documents, tmp_path / "stdlib"

    def build_meanwhile():
        monkeypatch.setattr(corpus, "stdlib_documents", documents)
        assert dataset.build_stdlib(folder)
        return documents()

    monkeypatch.setattr(corpus, "stdlib_documents", build_meanwhile)
    assert not dataset.build_stdlib(folder)
    assert dataset.verify(folder) == []


@pytest.mark.usefixtures("_small_stdlib")
def test_the_embedded_corpus_replaces_nothing_that_it_did_not_make(tmp_path):
    dataset.build_stdlib(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / NAMES[0]).unlink()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="holds files that would be lost"):
        dataset.build_stdlib(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
