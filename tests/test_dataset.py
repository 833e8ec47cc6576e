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


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def listed_shards(folder, validation=NAMES[2], **settings):
    """make_shards with a manifest."""
    dataset.write_manifest(make_shards(folder, **settings), "mine", validation)
    return folder


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# ---- reading ----


def test_row_groups_are_all_of_the_texts_in_order_without_null_and_empty_ones(data_dir, tmp_path):
    shard_paths = sorted(data_dir.glob("*.parquet"))
    groups = list(dataset.row_groups(shard_paths))
    expected = [text for path in shard_paths for text in pq.read_table(path)["text"].to_pylist()]
    assert len(groups) == 24
    assert [text for group in groups for text in group] == expected
    dataset.write_shard(tmp_path / NAMES[0], ["a", None, "", "b", None, "", "c"], rows_per_group=3)
    assert list(dataset.row_groups([tmp_path / NAMES[0]])) == [["a"], ["b"], ["c"]]


def test_open_shards_tells_rows_and_size_of_text(tmp_path):
    draw = random.Random(1)
    texts = ["".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(5000)) for _ in range(10)]
    columns = {"source": pa.array([{"name": "x", "text": 1}] * 10), "text": pa.array(texts)}
    pq.write_table(pa.table(columns), tmp_path / NAMES[0], row_group_size=4)
    dataset.write_shard(tmp_path / NAMES[1], ["validation"])
    (shard,) = dataset.open_shards(tmp_path).train
    assert shard.group_rows == (4, 4, 2)
    assert shard.text_bytes == pytest.approx(50_000, rel=0.01)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_kind_of_string_column_is_read(tmp_path, kind):
    texts = ["eins", None, "zwei", "eins"]
    pq.write_table(pa.table({"text": pa.array(texts, pa.string()).cast(kind)}), tmp_path / NAMES[0])
    assert dataset.open_shard(tmp_path / NAMES[0]).group_rows == (4,)
    assert dataset.read_texts(tmp_path / NAMES[0], 0, 1) == texts[1:]


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


def without(name):
    return lambda folder: (listed_shards(folder) / name).unlink()


def no_rows(folder):
    dataset.write_shard(folder / NAMES[0], [])
    dataset.write_shard(folder / NAMES[1], ["x"])


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: folder.rmdir(), "no data folder .*--dataset=stdlib"),
        (lambda folder: None, "holds no shard_<digits>.parquet.*--dataset=stdlib"),
        (lambda folder: dataset.write_shard(folder / NAMES[0], ["x"]), "only the validation shard"),
        (no_rows, "no rows"),
        (with_table(content=["a"], id=[1]), f"{NAMES[1]} has no column 'text', only: content, id"),
        (with_table(text=[1, 2]), f"{NAMES[1]}.*strings, not int64"),
        (with_table(text=[b"a", b"b"]), f"{NAMES[1]}.*strings, not binary"),
        (with_table(text=[["a"], ["b"]]), f"{NAMES[1]}.*strings, not list"),
        (with_table(text=[{"text": "a"}]), f"{NAMES[1]}.*strings, not struct"),
        (with_bytes(lambda data: b"<html>sorry</html>"), f"{NAMES[1]} is not a readable parquet file"),
        (with_bytes(lambda data: data[: len(data) // 2]), f"{NAMES[1]} is not a readable parquet file"),
        (with_bytes(lambda data: b""), f"{NAMES[1]} is not a readable parquet file .*0 bytes"),
        (with_bytes(lambda data: data[:-400] + bytes(392) + data[-8:]), f"{NAMES[1]} is not a readable parquet"),
        (with_bytes(lambda data: data[:-8] + b"\xff" * 4 + b"PAR1"), f"{NAMES[1]} is not a readable parquet"),
        (lambda folder: (listed_shards(folder) / NAMES[1]).write_bytes(bytes(100)), "100 bytes, its manifest says"),
        (without(NAMES[2]), f"{NAMES[2]} of its manifest is missing"),
        (without(NAMES[1]), f"{NAMES[1]} of its manifest is missing"),
        (with_manifest('{"validation": "shard_0'), "manifest.json is broken"),
        (with_manifest("[" * 100_000), "manifest.json is broken .*: rename"),
        (with_manifest('{"docs": 3}'), "manifest.json is another program's: rename"),
        (with_manifest('{"validation": "x", "shards": [], "coming": 5}'), "manifest.json is another program's: rename"),
        (with_manifest(f'{{"validation": "{NAMES[2]}", "shards": [{{"name": "../x"}}]}}'), "manifest.json is broken"),
    ],
)
def test_open_shards_says_what_is_wrong(tmp_path, prepare, says):
    folder = tmp_path / "shards"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(DataError, match=says) as caught:
        dataset.open_shards(folder)
    assert "\n" not in str(caught.value)


def test_a_manifest_of_ours_is_read_with_a_byte_order_mark_too(tmp_path):
    path = listed_shards(tmp_path, NAMES[0]) / "manifest.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert dataset.open_shards(tmp_path).validation.name == NAMES[0]


def damaged_page(path):
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(len(data) // 2) + data[len(data) // 2 + 4 :])


HARMS = [
    damaged_page,
    lambda path: pq.write_table(pa.table({"body": ["x"]}), path),
    lambda path: pq.write_table(pa.table({"text": pa.array([], pa.string())}), path),
    lambda path: path.write_bytes(b""),
    lambda path: path.unlink(),
]


@pytest.mark.parametrize("harm", HARMS)
def test_a_row_group_that_cannot_be_read_is_named(tmp_path, harm):
    """A shard that is replaced or vanishes after it was opened."""
    path = make_shards(tmp_path) / NAMES[0]
    harm(path)
    with pytest.raises(DataError, match=rf"{NAMES[0]}, row group 1, cannot be read .*get it again"):
        dataset.read_texts(path, 1)


@pytest.mark.parametrize("kept", [None, {}])
def test_a_shard_that_another_good_one_has_replaced_is_an_error(tmp_path, kept):
    """Also where its row group is kept."""
    shard = dataset.open_shards(make_shards(tmp_path)).train[0]
    before = dataset.read_texts(shard.path, 0, 1, 3, shard.stamp, kept)
    assert dataset.read_texts(shard.path, 0, 1, 3, shard.stamp, kept) == before
    dataset.write_shard(shard.path, make_texts(40, seed=9), rows_per_group=5)
    assert dataset.read_texts(shard.path, 0, 1, 3) != before
    with pytest.raises(DataError, match=rf"{NAMES[0]}, row group 0, cannot be read: .* has changed"):
        dataset.read_texts(shard.path, 0, 1, 3, shard.stamp, kept)
    shard.path.unlink()
    with pytest.raises(DataError, match=rf"{NAMES[0]}, row group 0, cannot be read"):
        dataset.read_texts(shard.path, 0, 1, 3, shard.stamp, kept)


def test_row_groups_read_in_slices_are_decoded_once_within_bounds(tmp_path, monkeypatch):
    path, texts, decoded = tmp_path / NAMES[0], make_texts(40), []
    dataset.write_shard(path, texts, rows_per_group=10)
    real = pq.ParquetFile.read_row_group
    noting = lambda file, group, **settings: decoded.append(group) or real(file, group, **settings)  # noqa: E731
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noting)

    def read(kept, *groups, rows=5):
        decoded.clear()
        for group in groups:
            found = dataset.read_texts(path, group, 2, 2 + rows, kept=kept)
            assert found == texts[10 * group + 2 : 10 * group + 10][:rows]
        return decoded

    assert read({}, 0, 1, 2, 0, 1, 2) == [0, 1, 2]
    monkeypatch.setattr(dataset, "KEPT_BYTES", 1)
    kept = {}
    assert read(kept, 0, 0, 1, 0) == [0, 1, 0], "the last one always stays"
    monkeypatch.setattr(dataset, "KEPT_BYTES", 2.5 * kept[path, 0].nbytes)
    assert read(kept, 0, 1, 0, 2, 0, 1) == [1, 2, 1], "the one that was not asked for longest is given up first"
    assert read(kept, 3, rows=10) == [3]
    assert 3 not in [group for _, group in kept], "one that is read whole is not read again"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_that_is_not_utf8_is_named_to_the_row(tmp_path, kind):
    text = pa.array([b"fine", None, "é".encode(), b"\xff\xfe\xfd", b"\xff"])
    if pa.types.is_dictionary(kind):
        text = text.dictionary_encode()
        text = pa.DictionaryArray.from_arrays(text.indices, text.dictionary.view(pa.string()))
    else:
        text = text.cast(pa.large_binary()).view(kind) if kind == pa.large_string() else text.view(kind)
    pq.write_table(pa.table({"text": text}), tmp_path / NAMES[0])
    for start in (0, 2):
        with pytest.raises(DataError, match=rf"{NAMES[0]}, row group 0, row 3: the text is not UTF-8"):
            dataset.read_texts(tmp_path / NAMES[0], 0, start)


def test_a_row_group_that_declares_too_much_text_is_refused(tmp_path, monkeypatch):
    """Before it is decompressed."""
    dataset.write_shard(tmp_path / NAMES[0], ["a", "a" * 1_000_000, "b"], rows_per_group=1)
    assert (tmp_path / NAMES[0]).stat().st_size < 5000
    assert dataset.MAX_GROUP_BYTES == 2 * 1024**3
    monkeypatch.setattr(dataset, "MAX_GROUP_BYTES", 1_100_000)
    dataset.open_shard(tmp_path / NAMES[0])
    monkeypatch.setattr(dataset, "MAX_GROUP_BYTES", 900_000)
    with pytest.raises(DataError, match=rf"{NAMES[0]} declares a row group"):
        dataset.open_shard(tmp_path / NAMES[0])


# ---- hashes ----


@pytest.mark.parametrize("validation", [None, NAMES[0]])
def test_fingerprint_has_size_and_hash_of_every_shard(tmp_path, validation):
    make_shards(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    expected = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    if validation:
        dataset.write_manifest(tmp_path, "mine", validation)
    found = dataset.fingerprint(dataset.open_shards(tmp_path))
    assert found == {"validation": validation or NAMES[2], "files": expected}


@pytest.mark.parametrize("with_manifest", [False, True])
def test_a_train_shard_equal_to_the_validation_shard_is_an_error(tmp_path, with_manifest):
    """Whatever its name."""
    make_shards(tmp_path, train=3)
    (tmp_path / NAMES[1]).write_bytes((tmp_path / NAMES[3]).read_bytes())
    if with_manifest:
        dataset.write_manifest(tmp_path, "mine", NAMES[3])
    shards = dataset.open_shards(tmp_path)
    with pytest.raises(DataError, match=f"{NAMES[1]} has the same content as the validation shard"):
        dataset.fingerprint(shards)
    (tmp_path / NAMES[1]).write_bytes((tmp_path / NAMES[0]).read_bytes())
    (tmp_path / "manifest.json").unlink(missing_ok=True)
    assert len(dataset.fingerprint(dataset.open_shards(tmp_path))["files"]) == 4, "two equal train shards are not"


def test_verify_names_every_bad_shard_and_what_is_wrong_with_it(tmp_path):
    listed_shards(tmp_path, NAMES[6], train=6)
    assert dataset.verify(tmp_path) == []
    last = tmp_path / NAMES[6]
    size = last.stat().st_size
    (tmp_path / NAMES[0]).unlink()
    flip(tmp_path / NAMES[2], 500)
    last.write_bytes(last.read_bytes()[:-1])
    dataset.write_shard(tmp_path / NAMES[7], ["new"])
    (tmp_path / "notes.txt").write_text("no shard")
    assert dataset.verify(tmp_path) == [
        f"{NAMES[0]} is missing",
        f"{NAMES[2]} has another SHA-256",
        f"{NAMES[6]} has {size - 1} bytes of {size}",
        f"{NAMES[7]} is not in the manifest",
    ]


def test_verify_notices_any_flipped_bit_and_reading_gives_text_or_a_data_error(tmp_path):
    """Pages have no checksum of their own, so only the hash of the whole file is sure to notice."""
    path = listed_shards(tmp_path, NAMES[1], train=1) / NAMES[0]
    good, texts, unnoticed = path.read_bytes(), list(dataset.row_groups([path])), 0
    for place in range(0, len(good), 211):
        flip(path, place)
        assert dataset.verify(tmp_path) == [f"{NAMES[0]} has another SHA-256"]
        try:
            unnoticed += list(dataset.row_groups([path])) != texts
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
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [str(one), str(two)]
    (two / NAMES[1]).unlink()
    flip(two / NAMES[2], 100)
    bad = f"{two}: {NAMES[1]} is missing; {NAMES[2]} has another SHA-256\n"
    for name, printed in (("", f"{one}: every shard is as the manifest says\n{bad}"), (two.name, bad)):
        monkeypatch.setattr(dataset, "DATASET", name)
        with pytest.raises(DataError, match="2 bad shards"):
            dataset.main()
        assert capsys.readouterr().out == printed
    monkeypatch.setattr(dataset, "NAME", without.name)
    with pytest.raises(DataError, match="without has no manifest"):
        dataset.main()


# ---- what lies where a data set is to go ----


@pytest.fixture
def _small_stdlib(monkeypatch):
    monkeypatch.setattr(corpus, "stdlib_sources", lambda: {f"f{n}.py": text for n, text in enumerate(make_texts(60))})


@pytest.mark.usefixtures("_small_stdlib")
def test_the_embedded_corpus_is_not_built_twice_and_replaces_no_other(monkeypatch, base_dir, capsys):
    monkeypatch.setattr(dataset, "DATASET", "stdlib")
    dataset.main()
    shard = base_dir / "data" / "stdlib" / NAMES[0]
    stamp = shard.stat().st_mtime_ns
    dataset.main()
    assert "there already" in capsys.readouterr().out
    assert shard.stat().st_mtime_ns == stamp
    shard.write_bytes(shard.read_bytes()[:-1])
    dataset.main()
    assert dataset.verify(shard.parent) == []
    dataset.write_manifest(shard.parent, "own text", NAMES[4])
    with pytest.raises(UserError, match=r"own text"):
        dataset.main()


@pytest.mark.usefixtures("_small_stdlib")
def test_the_embedded_corpus_replaces_nothing_that_it_did_not_make(tmp_path):
    dataset.write_shard(tmp_path / "mine" / NAMES[0], ["own"])
    with pytest.raises(UserError, match=NAMES[0]):
        dataset.build_stdlib(tmp_path / "mine")
    dataset.build_stdlib(tmp_path / "stdlib")
    (tmp_path / "stdlib" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes.txt"):
        dataset.build_stdlib(tmp_path / "stdlib")
    assert (tmp_path / "stdlib" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        dataset.build_stdlib(tmp_path / "file")


def test_an_import_never_takes_the_place_of_the_texts_it_reads(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, text in enumerate(make_texts(40)):
        (folder / f"a{number}.txt").write_text(text)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="would be lost"):
        dataset.import_text(folder, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names_in(tmp_path) == ["mine"]
