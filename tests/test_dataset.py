"""Shards: opening, reading and verifying folders of them."""

import hashlib
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_shards, make_texts

from nanotrain import corpus, dataset, paths
from nanotrain.errors import DataError, UserError


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


def test_validation_stays_pinned_when_shards_are_added(tmp_path):
    make_shards(tmp_path)
    dataset.write_manifest(tmp_path, "mine", "shard_00002.parquet")
    dataset.write_shard(tmp_path / "shard_99999.parquet", ["later"])
    shards = dataset.open_shards(tmp_path)
    assert shards.validation.name == "shard_00002.parquet"
    assert [shard.name for shard in shards.train] == [f"shard_{number:05d}.parquet" for number in (0, 1, 99999)]


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


def shorter(folder):
    dataset.write_manifest(make_shards(folder), "mine", "shard_00002.parquet")
    (folder / "shard_00001.parquet").write_bytes(bytes(100))


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
        (with_table({"text": [b"a", b"b"]}), "shard_00001.parquet.*must hold strings, not binary"),
        (with_table({"text": [["a"], ["b"]]}), "shard_00001.parquet.*must hold strings, not list"),
        (with_table({"text": [{"text": "a"}]}), "shard_00001.parquet.*must hold strings, not struct"),
        (with_bytes(lambda data: b"<html>sorry</html>"), "shard_00001.parquet is not a readable parquet file"),
        (with_bytes(lambda data: data[: len(data) // 2]), "shard_00001.parquet is not a readable parquet file"),
        (with_bytes(lambda data: b""), "shard_00001.parquet is not a readable parquet file .0 bytes, .*get it again"),
        (
            with_bytes(lambda data: data[:-400] + bytes(392) + data[-8:]),
            "shard_00001.parquet is not a readable parquet",
        ),
        (with_bytes(lambda data: data[:-8] + b"\xff" * 4 + b"PAR1"), "shard_00001.parquet is not a readable parquet"),
        (shorter, r"shard_00001.parquet has 100 bytes, its manifest says \d+: delete it and get it again"),
        (validation_gone, "the validation shard shard_00002.parquet is missing"),
        (with_manifest('{"validation": "shard_0'), "manifest.json is broken"),
        (with_manifest('{"docs": 3}'), "manifest.json is another program's: rename"),
        (with_manifest('{"validation": "x", "shards": 3}'), "manifest.json is another program's: rename"),
        (with_manifest("[" * 100_000), "manifest.json is broken .*: rename"),
        (
            with_manifest('{"validation": "shard_00002.parquet", "shards": [{"name": "../x"}]}'),
            "manifest.json is broken",
        ),
    ],
)
def test_open_shards_says_what_is_wrong(tmp_path, prepare, says):
    """DA1, DA3, DA10."""
    folder = tmp_path / "shards"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(DataError, match=says) as caught:
        dataset.open_shards(folder)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)


def test_a_manifest_of_ours_is_read_with_a_byte_order_mark_too(tmp_path):
    dataset.write_manifest(make_shards(tmp_path), "mine", "shard_00000.parquet")
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert dataset.open_shards(tmp_path).validation.name == "shard_00000.parquet"


def damaged_page(path):
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    path.write_bytes(data)


def another_file(path):
    pq.write_table(pa.table({"body": ["x"]}), path)


def fewer_row_groups(path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)


HARMS = [damaged_page, another_file, fewer_row_groups, lambda path: path.write_bytes(b""), lambda path: path.unlink()]


@pytest.mark.parametrize("harm", HARMS)
def test_a_row_group_that_cannot_be_read_is_named(tmp_path, harm):
    """DA2, and DA12: a shard that is replaced or vanishes after it was opened."""
    path = make_shards(tmp_path) / "shard_00000.parquet"
    harm(path)
    with pytest.raises(DataError, match=r"shard_00000.parquet, row group 1, cannot be read .*get it again"):
        dataset.read_texts(path, 1)


@pytest.mark.parametrize("kept", [None, {}])
def test_a_shard_that_another_good_one_has_replaced_is_an_error(tmp_path, kept):
    """DA12: also where its row group is kept."""
    folder = make_shards(tmp_path)
    shard = dataset.open_shards(folder).train[0]
    before = dataset.read_texts(shard.path, 0, 1, 3, shard.stamp, kept)
    assert dataset.read_texts(shard.path, 0, 1, 3, shard.stamp, kept) == before
    dataset.write_shard(shard.path, make_texts(40, seed=9), rows_per_group=5)
    assert dataset.read_texts(shard.path, 0, 1, 3) != before
    with pytest.raises(DataError, match=r"shard_00000.parquet, row group 0, cannot be read: the file has changed"):
        dataset.read_texts(shard.path, 0, 1, 3, shard.stamp, kept)
    shard.path.unlink()
    with pytest.raises(DataError, match=r"shard_00000.parquet, row group 0, cannot be read \(.*No such file"):
        dataset.read_texts(shard.path, 0, 1, 3, shard.stamp, kept)


@pytest.mark.parametrize(("kept_bytes", "rounds_decoded", "stay"), [(1 << 20, 1, 3), (1, 4, 1)])
def test_row_groups_read_in_slices_are_decoded_once_within_bounds(
    tmp_path, monkeypatch, kept_bytes, rounds_decoded, stay
):
    path, texts = tmp_path / "shard_00000.parquet", make_texts(30)
    dataset.write_shard(path, texts, rows_per_group=10)
    groups, read_row_group = [], pq.ParquetFile.read_row_group

    def counting(file, group, **settings):
        groups.append(group)
        return read_row_group(file, group, **settings)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    monkeypatch.setattr(dataset, "KEPT_BYTES", kept_bytes)
    kept = {}
    for start in (0, 3, 6, 6):
        for group in range(3):
            for _ in range(2):
                found = dataset.read_texts(path, group, start, start + 4, kept=kept)
                assert found == texts[10 * group + start : 10 * group + start + 4]
    assert groups == [0, 1, 2] * rounds_decoded
    assert len(kept) == stay


def test_the_row_group_that_was_not_asked_for_longest_is_given_up_first(tmp_path, monkeypatch):
    path = tmp_path / "shard_00000.parquet"
    dataset.write_shard(path, ["a" * 100] * 40, rows_per_group=10)
    monkeypatch.setattr(dataset, "KEPT_BYTES", 2500)
    kept = {}
    for group in (0, 1, 0, 2):
        dataset.read_texts(path, group, 0, 5, kept=kept)
    assert [group for _, group in kept] == [0, 2]
    dataset.read_texts(path, 3, 0, 10, kept=kept)
    assert [group for _, group in kept] == [0, 2], "one that is read whole is not read again"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_that_is_not_utf8_is_named_to_the_row(tmp_path, kind):
    """DA6."""
    raw = pa.array([b"fine", None, "é".encode(), b"\xff\xfe\xfd", b"\xff"])
    text = raw.dictionary_encode() if pa.types.is_dictionary(kind) else raw
    if pa.types.is_dictionary(kind):
        text = pa.DictionaryArray.from_arrays(text.indices, text.dictionary.view(pa.string()))
    else:
        text = raw.cast(pa.large_binary()).view(kind) if kind == pa.large_string() else raw.view(kind)
    pq.write_table(pa.table({"text": text}), tmp_path / "shard_00000.parquet")
    with pytest.raises(DataError, match=r"shard_00000.parquet, row group 0, row 3: the text is not UTF-8"):
        dataset.read_texts(tmp_path / "shard_00000.parquet", 0)


def test_a_row_group_that_declares_too_much_text_is_refused(tmp_path, monkeypatch):
    """DA14: before it is decompressed."""
    make_shards(tmp_path)
    dataset.write_shard(tmp_path / "shard_00001.parquet", ["a", "a" * 1_000_000, "b"], rows_per_group=1)
    assert (tmp_path / "shard_00001.parquet").stat().st_size < 5000
    assert dataset.MAX_GROUP_BYTES == 2 * 1024**3
    dataset.open_shards(tmp_path)
    monkeypatch.setattr(dataset, "MAX_GROUP_BYTES", 1_100_000)
    dataset.open_shards(tmp_path)
    monkeypatch.setattr(dataset, "MAX_GROUP_BYTES", 900_000)
    with pytest.raises(DataError, match=r"shard_00001.parquet declares a row group of 0.0 GiB of text: use smaller"):
        dataset.open_shards(tmp_path)


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


@pytest.mark.parametrize("with_manifest", [False, True])
def test_a_train_shard_equal_to_the_validation_shard_is_an_error(tmp_path, with_manifest):
    """DA10: whatever its name."""
    make_shards(tmp_path, train=3)
    (tmp_path / "shard_00001.parquet").write_bytes((tmp_path / "shard_00003.parquet").read_bytes())
    if with_manifest:
        dataset.write_manifest(tmp_path, "mine", "shard_00003.parquet")
    shards = dataset.open_shards(tmp_path)
    with pytest.raises(DataError, match=r"shard_00001.parquet has the same content as the validation shard: remove"):
        dataset.fingerprint(shards)
    (tmp_path / "shard_00001.parquet").write_bytes((tmp_path / "shard_00000.parquet").read_bytes())
    (tmp_path / "manifest.json").unlink(missing_ok=True)
    assert len(dataset.fingerprint(dataset.open_shards(tmp_path))["files"]) == 4, "two equal train shards are not"


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_verify_names_every_bad_shard_and_what_is_wrong_with_it(tmp_path):
    make_shards(tmp_path, train=6)
    dataset.write_manifest(tmp_path, "mine", "shard_00006.parquet")
    assert dataset.verify(tmp_path) == []
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.parquet"))]
    (tmp_path / "shard_00000.parquet").unlink()
    flip(tmp_path / "shard_00002.parquet", sizes[2] // 2)
    last = tmp_path / "shard_00006.parquet"
    last.write_bytes(last.read_bytes()[:-1])
    dataset.write_shard(tmp_path / "shard_00007.parquet", ["new"])
    (tmp_path / "notes.txt").write_text("no shard")
    assert dataset.verify(tmp_path) == [
        "shard_00000.parquet is missing",
        "shard_00002.parquet has another SHA-256",
        f"shard_00006.parquet has {sizes[6] - 1} bytes of {sizes[6]}",
        "shard_00007.parquet is not in the manifest",
    ]


def test_verify_notices_any_flipped_bit_and_reading_gives_text_or_a_data_error(tmp_path):
    """DA2: pages have no checksum of their own, so only the hash of the whole file is sure to notice."""
    path = make_shards(tmp_path, train=1) / "shard_00000.parquet"
    dataset.write_manifest(tmp_path, "mine", "shard_00001.parquet")
    good = path.read_bytes()
    texts = list(dataset.row_groups([path]))
    unnoticed = 0
    for place in range(0, len(good), 97):
        flip(path, place)
        assert dataset.verify(tmp_path) == ["shard_00000.parquet has another SHA-256"]
        try:
            unnoticed += list(dataset.row_groups([path])) != texts
        except DataError as error:
            assert "shard_00000.parquet" in str(error)  # noqa: PT017
        path.write_bytes(good)
    assert dataset.verify(tmp_path) == []
    assert unnoticed > 0, "this is why there are hashes"


def test_verify_command_names_every_bad_shard_of_one_or_all_data_sets(monkeypatch, capsys):
    monkeypatch.setattr(dataset, "VERIFY", True)
    with pytest.raises(DataError, match=r"no data set with a manifest.json in .*data"):
        dataset.main()
    one, two, without = (make_shards(paths.dataset_dir(name)) for name in ("one", "two", "without"))
    for folder in (one, two):
        dataset.write_manifest(folder, folder.name, "shard_00002.parquet")
    dataset.main()
    assert capsys.readouterr().out == "".join(f"{f}: every shard is as the manifest says\n" for f in (one, two))
    (two / "shard_00001.parquet").unlink()
    flip(two / "shard_00002.parquet", 100)
    bad = f"{two}: shard_00001.parquet is missing; shard_00002.parquet has another SHA-256\n"
    with pytest.raises(DataError, match="2 bad shards: delete them and prepare the data set again") as caught:
        dataset.main()
    assert caught.value.exit_code == 6
    assert capsys.readouterr().out == f"{one}: every shard is as the manifest says\n{bad}"
    monkeypatch.setattr(dataset, "NAME", "one")
    dataset.main()
    assert capsys.readouterr().out == f"{one}: every shard is as the manifest says\n"
    monkeypatch.setattr(dataset, "NAME", "")
    monkeypatch.setattr(dataset, "DATASET", "two")
    with pytest.raises(DataError, match="2 bad shards"):
        dataset.main()
    assert capsys.readouterr().out == bad
    monkeypatch.setattr(dataset, "DATASET", without.name)
    with pytest.raises(DataError, match=r"without has no manifest.json to compare with"):
        dataset.main()


def test_a_train_shard_that_the_manifest_lists_and_is_gone_is_an_error(tmp_path):
    folder = make_shards(tmp_path / "data")
    dataset.write_manifest(folder, "made up", "shard_00002.parquet")
    (folder / "shard_00001.parquet").unlink()
    with pytest.raises(DataError, match=r"shard_00001.parquet of its manifest is missing; prepare"):
        dataset.open_shards(folder)


def test_the_embedded_corpus_is_not_built_twice_and_replaces_no_other(monkeypatch, base_dir, capsys):
    monkeypatch.setattr(dataset, "DATASET", "stdlib")
    monkeypatch.setattr(corpus, "stdlib_sources", lambda: {f"f{n}.py": text for n, text in enumerate(make_texts(60))})
    dataset.main()
    shard = base_dir / "data" / "stdlib" / "shard_00000.parquet"
    stamp = shard.stat().st_mtime_ns
    dataset.main()
    assert "there already" in capsys.readouterr().out
    assert shard.stat().st_mtime_ns == stamp
    shard.write_bytes(shard.read_bytes()[:-1])
    dataset.main()
    assert dataset.verify(shard.parent) == []
    dataset.write_manifest(shard.parent, "own text", "shard_00004.parquet")
    with pytest.raises(UserError, match=r"holds another data set \(own text\): choose another --name"):
        dataset.main()


# ---- what lies where a data set is to go ----


def test_an_import_never_takes_the_place_of_the_texts_it_reads(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, text in enumerate(make_texts(40)):
        (folder / f"a{number}.txt").write_text(text)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="holds files that would be lost: choose another name, or move them away"):
        dataset.import_text(folder, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_embedded_corpus_replaces_no_shards_without_a_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "stdlib_sources", lambda: {f"f{n}.py": text for n, text in enumerate(make_texts(60))})
    dataset.write_shard(tmp_path / "mine" / "shard_00000.parquet", ["own"])
    with pytest.raises(UserError, match=r"shard_00000.parquet"):
        dataset.build_stdlib(tmp_path / "mine")
    dataset.build_stdlib(tmp_path / "stdlib")
    (tmp_path / "stdlib" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes.txt"):
        dataset.build_stdlib(tmp_path / "stdlib")
    (tmp_path / "stdlib" / "notes.txt").unlink()
    (tmp_path / "stdlib" / "shard_00000.parquet").write_bytes(b"damaged")
    dataset.build_stdlib(tmp_path / "stdlib")
    assert not dataset.verify(tmp_path / "stdlib")
