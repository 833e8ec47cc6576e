"""The order of data and its exact state, against lanes written out as plain lists of tokens."""

import hashlib
import itertools
import json
import struct
import threading
from collections import deque

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_shards, make_texts

from nanotrain import dataloader, dataset
from nanotrain.dataloader import DataLoader, RowReader
from nanotrain.errors import DataError

SEED = 11
CPU = torch.device("cpu")


# ---- the reference ----


class Reference:
    """The rows of a run by their definition: each lane one list of tokens, each token with where it comes from."""

    def __init__(self, folder, tokenizer, seq_len, lanes, rows, piece_chars=100_000, seed=SEED):
        self.seq_len, self.lanes = seq_len, lanes
        groups = []  # (shard name, group, texts) of every row group with rows, the last shard being validation
        for path in sorted(folder.glob("shard_*.parquet"))[:-1]:
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                groups.append((path.name, group, file.read_row_group(group)["text"].to_pylist()))
        slices = 1
        while slices * len(groups) < 2 * lanes:
            slices += 1
        self.units = {}
        for name, group, texts in groups:
            for part in range(slices):
                start, stop = len(texts) * part // slices, len(texts) * (part + 1) // slices
                if start < stop:
                    self.units[f"{name}:{group}:{start}"] = texts[start:stop]
        needed = (rows // lanes + 2) * seq_len + 1
        self.sequence = []
        self.tokens = [[] for _ in range(lanes)]
        self.places = [[] for _ in range(lanes)]
        for epoch in itertools.count():
            if all(len(tokens) >= needed for tokens in self.tokens):
                break
            key = lambda name: hashlib.sha256(f"{seed} {epoch} {name}".encode()).hexdigest()  # noqa: B023, E731
            for name in sorted(self.units, key=key):
                position = len(self.sequence)
                self.sequence.append(name)
                piece = 0
                for text in filter(None, self.units[name]):
                    for begin in range(0, len(text), piece_chars):
                        ids = tokenizer.encode(text[begin : begin + piece_chars])
                        ids = ids if begin else [tokenizer.bos, *ids]
                        self.tokens[position % lanes] += ids
                        self.places[position % lanes] += [(position, piece, offset) for offset in range(len(ids))]
                        piece += 1
        self.rows = np.array([self.row(n) for n in range(rows)])

    def row(self, n):
        begin = n // self.lanes * self.seq_len
        return self.tokens[n % self.lanes][begin : begin + self.seq_len + 1]

    def state(self, row):
        """What is to be trained on next when `row` rows are done."""
        lanes = {}
        for lane in range(self.lanes):
            done = len(range(lane, row, self.lanes))
            lanes[str(lane)] = list(self.places[lane][done * self.seq_len]) if done else [lane, 0, 0]
        return {"row": row, "lanes": lanes}


def hash_by_hand(number, row):
    packed = struct.pack(f"<q{len(row)}i", number, *row)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


class Ranks:
    """All ranks of a world, stepped together."""

    def __init__(self, folder, tokenizer, seq_len, lanes, world_size=1, state=None, seed=SEED):
        units = dataloader.units_of(dataset.open_shards(folder).train, lanes)
        state = json.loads(json.dumps(state))  # as a checkpoint keeps it
        self.readers = [
            RowReader(units, tokenizer, seq_len, lanes, seed, rank, world_size, state) for rank in range(world_size)
        ]

    def step(self, rows_per_rank):
        """The next rows in the order of the run, and their hash."""
        parts = [np.full((rows_per_rank, reader.seq_len + 1), -1, dtype=np.int64) for reader in self.readers]
        begin, world_size = self.readers[0].next_row, len(parts)
        total = sum(reader.fill(part) for reader, part in zip(self.readers, parts, strict=True))
        rows = [parts[(begin + n) % world_size][n // world_size] for n in range(world_size * rows_per_rank)]
        return np.array(rows), total % 2**64

    def steps(self, count, rows_per_rank):
        return np.concatenate([self.step(rows_per_rank)[0] for _ in range(count)])

    def state(self):
        """One state of all, as a checkpoint merges it; ranks that read the same lane must agree."""
        states = [reader.state() for reader in self.readers]
        merged = {"row": states[0]["row"], "lanes": {}}
        for state in states:
            assert state["row"] == merged["row"]
            for lane, place in state["lanes"].items():
                assert merged["lanes"].setdefault(lane, place) == place
        return merged


def write(folder, *shards, rows_per_group=2):
    """Write each list of texts as a shard, and a validation shard."""
    for number, texts in enumerate([*shards, ["validation text"]]):
        dataset.write_shard(folder / f"shard_{number:05d}.parquet", texts, rows_per_group)
    return folder


def many_row_groups(folder):
    return write(folder, make_texts(24, seed=1), make_texts(17, seed=2), rows_per_group=2)


def few_row_groups(folder):
    return write(folder, make_texts(13, seed=3), make_texts(8, seed=4), rows_per_group=10)


def one_row_group(folder):
    return write(folder, make_texts(7, seed=5), rows_per_group=100)


def one_document(folder):
    return write(folder, make_texts(1, seed=6))


def holes(folder):
    texts = [text for pair in zip(make_texts(10, seed=7), itertools.cycle([None, ""]), strict=False) for text in pair]
    return write(folder, [None] * 5 + texts, [None, ""] * 4, ["", *make_texts(3, seed=8), None], rows_per_group=3)


def a_needle(folder):
    return write(folder, [None] * 20 + make_texts(1, seed=9) + [None, ""] * 10, rows_per_group=1)


CORPORA = [many_row_groups, few_row_groups, one_row_group, one_document, holes, a_needle]


@pytest.fixture
def small(tmp_path):
    """A corpus of which a few dozen rows are several epochs."""
    return write(tmp_path, make_texts(5, seed=1), make_texts(4, seed=2), rows_per_group=2)


def soon(function):
    """The result of `function()`; a failure instead of a hanging test where it does not come."""
    ended = []

    def work():
        try:
            ended.append((function(), None))
        except Exception as error:
            ended.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert ended, "no end within 20 seconds"
    result, error = ended[0]
    if error:
        raise error
    return result


# ---- the order of rows ----


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("lanes", [1, 5, 48])
def test_rows_are_those_of_the_definition(tokenizer, tmp_path, corpus, lanes):
    folder = corpus(tmp_path)
    expected = Reference(folder, tokenizer, 16, lanes, 240)
    ranks = Ranks(folder, tokenizer, 16, lanes)
    rows = ranks.steps(40, 6)
    np.testing.assert_array_equal(rows, expected.rows)
    assert ranks.state() == expected.state(240)


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize(
    ("corpus", "lanes", "rows_per_rank", "steps"),
    [
        (many_row_groups, 4, 4, 5),
        (many_row_groups, 48, 1, 12),
        (few_row_groups, 6, 5, 4),
        (one_row_group, 7, 11, 2),
        (one_row_group, 48, 3, 3),
    ],
)
def test_p2_the_order_of_rows_does_not_depend_on_the_world_size(
    tokenizer, tmp_path, world_size, corpus, lanes, rows_per_rank, steps
):
    folder = corpus(tmp_path)
    alone = Ranks(folder, tokenizer, 12, lanes).steps(1, steps * rows_per_rank * world_size)
    together = Ranks(folder, tokenizer, 12, lanes, world_size).steps(steps, rows_per_rank)
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_one_cursor_off_by_one_would_be_noticed_at_every_world_size(tokenizer, tmp_path, world_size, part):
    """The twin of the test above."""
    folder = few_row_groups(tmp_path)
    alone = Ranks(folder, tokenizer, 12, 6).steps(1, 20 * world_size)
    state = Ranks(folder, tokenizer, 12, 6).state()
    state["lanes"]["3"][part] += 1
    together = Ranks(folder, tokenizer, 12, 6, world_size, state).steps(4, 5)
    assert set(np.flatnonzero((together != alone).any(axis=1)) % 6) == {3}, "and only in that lane"


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
def test_p2_the_order_of_rows_is_the_definition_at_every_world_size(tokenizer, tmp_path, world_size):
    expected = Reference(few_row_groups(tmp_path), tokenizer, 16, 6, 12 * world_size)
    ranks = Ranks(tmp_path, tokenizer, 16, 6, world_size)
    np.testing.assert_array_equal(ranks.steps(4, 3), expected.rows)
    assert ranks.state() == expected.state(12 * world_size)


def test_the_last_target_of_a_row_is_the_first_input_of_its_lanes_next(tokenizer, small):
    rows = Ranks(small, tokenizer, 16, 3).steps(10, 6)
    np.testing.assert_array_equal(rows[:-3, -1], rows[3:, 0])


def test_a_rank_reads_only_the_lanes_it_needs(tokenizer, small):
    for world_size, expected in ((2, [0, 2, 4]), (3, [0, 3]), (4, [0, 2, 4]), (5, [0, 1, 2, 3, 4, 5]), (6, [0])):
        reader = Ranks(small, tokenizer, 16, 6, world_size).readers[0]
        assert [int(lane) for lane in reader.state()["lanes"]] == expected


def test_another_seed_gives_another_order_of_the_same_documents(tokenizer, tmp_path):
    folder = many_row_groups(tmp_path)
    first, other = (Ranks(folder, tokenizer, 16, 4, seed=seed).steps(5, 8) for seed in (1, 2))
    assert (first != other).any()
    np.testing.assert_array_equal(other, Reference(folder, tokenizer, 16, 4, 40, seed=2).rows)


def test_an_epoch_holds_every_document_once_and_the_next_has_another_order(tokenizer, tmp_path):
    texts = make_texts(30, seed=1)
    folder = write(tmp_path, texts[:20], texts[20:], rows_per_group=3)
    epoch_tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    rows = Ranks(folder, tokenizer, 1, 1).steps(1, 2 * epoch_tokens)
    stream = rows[:, 0].tolist()
    epochs = [stream[:epoch_tokens], stream[epoch_tokens:]]
    documents = [tokenizer.decode(epoch).removeprefix("<|bos|>").split("<|bos|>") for epoch in epochs]
    assert sorted(documents[0]) == sorted(documents[1]) == sorted(texts)
    assert documents[0] != documents[1]
    assert documents[0] != texts


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("lanes", [1, 3, 48])
def test_units_are_every_row_of_train_once(tmp_path, corpus, lanes):
    folder = corpus(tmp_path)
    shards = dataset.open_shards(folder)
    rows = [(unit.path, unit.group, row) for unit in dataloader.units_of(shards.train, lanes)
            for row in range(unit.start, unit.stop)]  # fmt: skip
    groups = [(shard.path, group, count) for shard in shards.train for group, count in enumerate(shard.group_rows)]
    assert rows == [(path, group, row) for path, group, count in groups for row in range(count)]
    units = dataloader.units_of(shards.train, lanes)
    if len(groups) >= 2 * lanes:
        assert len(units) == len(groups)
    else:
        assert len(units) >= min(2 * lanes, len(rows)) / 2
    assert len({unit.name for unit in units}) == len(units)


def test_a_long_document_is_one_document_tokenized_in_bounded_pieces(tokenizer, tmp_path):
    long = " ".join(make_texts(800, seed=3))
    assert len(long) > 250_000
    folder = write(tmp_path, ["before", long, "after"])
    sizes = []

    class Watching:
        bos = tokenizer.bos

        def encode_batch(self, texts):
            sizes.extend(map(len, texts))
            return tokenizer.encode_batch(texts)

    expected = Reference(folder, tokenizer, 2048, 1, 80)
    ranks = Ranks(folder, Watching(), 2048, 1)
    np.testing.assert_array_equal(ranks.steps(8, 10), expected.rows)
    assert ranks.state() == expected.state(80)
    assert max(sizes) == 100_000
    assert {piece for _, piece, _ in expected.places[0][: 80 * 2048]} >= {0, 1, 2}


def test_the_cut_of_long_documents_is_noticed_by_the_comparison(tokenizer, small, monkeypatch):
    expected = Reference(small, tokenizer, 16, 3, 60, piece_chars=33)
    assert (Ranks(small, tokenizer, 16, 3).steps(10, 6) != expected.rows).any()
    monkeypatch.setattr(dataloader, "MAX_PIECE_CHARS", 33)
    ranks = Ranks(small, tokenizer, 16, 3)
    np.testing.assert_array_equal(ranks.steps(10, 6), expected.rows)
    assert ranks.state() == expected.state(60)


def test_null_and_empty_documents_are_skipped_and_counted(tokenizer, tmp_path):
    texts = make_texts(6, seed=1)
    folder = write(tmp_path, [None, *texts[:3], "", *texts[3:], None], rows_per_group=9)
    reader = Ranks(folder, tokenizer, 4, 1).readers[0]
    epoch_tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    rows = np.empty((1, 5), dtype=np.int64)
    stream = []
    while len(stream) < epoch_tokens:
        reader.fill(rows)
        stream += rows[0, :4].tolist()
    documents = tokenizer.decode(stream[:epoch_tokens]).removeprefix("<|bos|>").split("<|bos|>")
    assert sorted(documents) == sorted(texts)
    assert reader.skipped_documents >= 3
    for world_size in (2, 3, 4, 8):  # several of which read the same lane
        ranks = Ranks(folder, tokenizer, 4, 4, world_size)
        ranks.steps(48, 1)
        once = {number: lane.skipped_documents for reader in ranks.readers for number, lane in reader.lanes.items()}
        assert len(once) == 4
        assert sum(reader.skipped_documents for reader in ranks.readers) == sum(once.values()) > 0
    assert Ranks(folder, tokenizer, 4, 1).readers[0].skipped_documents == 0


@pytest.mark.parametrize("lanes", [1, 4, 48])
@pytest.mark.parametrize("texts", [[None], [None, ""] * 40])
def test_shards_without_text_are_an_error_and_not_an_endless_search(tokenizer, tmp_path, texts, lanes):
    folder = write(tmp_path, texts, rows_per_group=1)
    ranks = Ranks(folder, tokenizer, 16, lanes)
    for _ in range(2):
        with pytest.raises(DataError, match="the train shards hold no text") as caught:
            soon(lambda: ranks.step(4))
    assert caught.value.exit_code == 6


def test_a_row_group_without_text_is_read_once(tokenizer, tmp_path, monkeypatch):
    folder = a_needle(tmp_path)
    reads = []

    def counting(path, group, *rows):
        reads.append(group)
        return dataset.read_texts(path, group, *rows)

    monkeypatch.setattr(dataloader, "read_texts", counting)
    Ranks(folder, tokenizer, 16, 4).steps(10, 4)
    assert reads.count(20) > 1, "the one that holds the document"
    assert max(reads.count(group) for group in range(41) if group != 20) == 1


def test_lanes_that_share_a_row_group_decode_it_once(tokenizer, tmp_path, monkeypatch):
    folder = write(tmp_path, make_texts(300), rows_per_group=1000)
    expected = Reference(folder, tokenizer, 16, 48, 480)
    decoded, read_row_group = [], pq.ParquetFile.read_row_group

    def counting(file, group, **settings):
        decoded.append(group)
        return read_row_group(file, group, **settings)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    np.testing.assert_array_equal(Ranks(folder, tokenizer, 16, 48).steps(10, 48), expected.rows)
    assert decoded == [0]


def test_no_units_are_a_data_error(tokenizer):
    with pytest.raises(DataError, match="hold no rows"):
        RowReader([], tokenizer, 16, 4, SEED)


def test_the_first_rows_come_without_tokenizing_whole_units(tokenizer, tmp_path):
    texts = make_texts(2000, seed=1)
    folder = write(tmp_path, texts, rows_per_group=1000)
    seen = []

    class Watching:
        bos = tokenizer.bos

        def encode_batch(self, texts):
            seen.append(sum(map(len, texts)))
            return tokenizer.encode_batch(texts)

    Ranks(folder, Watching(), 16, 2).step(2)
    assert len(seen) >= 2
    assert sum(seen[:2]) < 0.01 * sum(map(len, texts)), "one job for each lane"


# ---- the hash of rows ----


def test_row_hash_is_blake2b_of_number_and_tokens():
    row = [0, 5, 70_000, 2**31 - 1]
    packed = b"\x07\x01\0\0\0\0\0\0" + b"\0\0\0\0" + b"\x05\0\0\0" + b"\x70\x11\x01\0" + b"\xff\xff\xff\x7f"
    expected = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
    for kind in (np.int64, np.int32):
        assert dataloader.row_hash(263, np.array(row, dtype=kind)) == expected == hash_by_hand(263, row)
    assert dataloader.row_hash(264, np.array(row)) != expected
    assert dataloader.row_hash(263, np.array(row[::-1])) != expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_hash_of_a_step_is_the_sum_over_its_rows_at_every_world_size(tokenizer, small, world_size):
    expected = Reference(small, tokenizer, 16, 4, 48).rows
    ranks = Ranks(small, tokenizer, 16, 4, world_size)
    for start in (0, 24):
        by_hand = sum(hash_by_hand(n, expected[n]) for n in range(start, start + 24)) % 2**64
        assert ranks.step(24 // world_size)[1] == by_hand


def test_the_hash_of_many_rows_stays_below_2_to_the_64(tokenizer, small):
    rows = np.empty((60, 17), dtype=np.int64)
    total = reader_of(small, tokenizer).fill(rows)
    assert total == sum(hash_by_hand(n, row) for n, row in enumerate(rows)) % 2**64
    with DataLoader(reader_of(small, tokenizer), 60, CPU) as loader:
        assert next(loader).row_hash == total


def test_the_hash_of_a_step_notices_two_rows_that_changed_places(tokenizer, small):
    rows = Reference(small, tokenizer, 16, 4, 4).rows
    right = sum(hash_by_hand(n, rows[n]) for n in range(4))
    swapped = sum(hash_by_hand(n, rows[m]) for n, m in enumerate((0, 2, 1, 3)))
    assert Ranks(small, tokenizer, 16, 4).step(4)[1] == right % 2**64 != swapped % 2**64


# ---- the state ----


@pytest.mark.parametrize("lanes", [1, 3, 48])
def test_p3_resuming_after_any_row_gives_the_rest_of_the_rows(tokenizer, small, lanes):
    expected = Reference(small, tokenizer, 16, lanes, 110)
    first = Ranks(small, tokenizer, 16, lanes)
    offsets, epochs = set(), set()
    for done in range(0, 100, 1 if lanes == 3 else 7):
        if done > first.readers[0].next_row:
            first.step(done - first.readers[0].next_row)
        state = first.state()
        assert state == expected.state(done)
        resumed = Ranks(small, tokenizer, 16, lanes, state=state)
        assert resumed.state() == state
        np.testing.assert_array_equal(resumed.steps(2, 5), expected.rows[done : done + 10])
        assert resumed.state() == expected.state(done + 10)
        offsets.update(offset > 0 for _, _, offset in state["lanes"].values())
        epochs.update(position // len(expected.units) for position, _, _ in state["lanes"].values())
    assert offsets == {True, False}, "in the middle and at the start of documents"
    assert len(epochs) >= 2, "on both sides of the edge of an epoch"


@pytest.mark.parametrize("piece_chars", [37, 100_000])
@pytest.mark.parametrize("worlds", [[(1, 8), (2, 3), (4, 1)], [(3, 4), (2, 5), (5, 2)], [(8, 1), (1, 1), (7, 3)]])
def test_p3_resuming_twice_with_other_world_and_batch_sizes(tokenizer, small, monkeypatch, worlds, piece_chars):
    monkeypatch.setattr(dataloader, "MAX_PIECE_CHARS", piece_chars)
    expected = Reference(small, tokenizer, 16, 6, 100, piece_chars)
    state, done = None, 0
    for world_size, rows_per_rank in worlds:
        for steps in (2, 0, 1):  # a resume that is stopped before its first step as well
            ranks = Ranks(small, tokenizer, 16, 6, world_size, state)
            if steps:
                rows = ranks.steps(steps, rows_per_rank)
                np.testing.assert_array_equal(rows, expected.rows[done : done + len(rows)])
                done += len(rows)
            state = ranks.state()
            assert state == expected.state(done)
    assert done > 50


@pytest.mark.parametrize("shifted", [0, 1])
def test_one_cursor_off_by_one_at_either_of_two_resumes_would_be_noticed(tokenizer, small, shifted):
    """The twin of the test above."""
    expected, state = Reference(small, tokenizer, 16, 6, 100), None
    for number, (world_size, rows_per_rank) in enumerate([(3, 4), (2, 5), (5, 2)]):
        ranks = Ranks(small, tokenizer, 16, 6, world_size, state)
        rows = ranks.steps(2, rows_per_rank)
        begin = ranks.readers[0].next_row - len(rows)
        assert (rows == expected.rows[begin : begin + len(rows)]).all() == (number <= shifted)
        state = ranks.state()
        if number == shifted:
            state["lanes"]["2"][2] += 1


@pytest.mark.parametrize("part", [0, 1, 2])
def test_p3_a_state_with_one_cursor_off_by_one_gives_other_rows(tokenizer, small, part):
    expected = Reference(small, tokenizer, 16, 3, 60)
    first = Ranks(small, tokenizer, 16, 3)
    first.step(9)
    state = first.state()
    state["lanes"]["1"][part] += 1
    rows = Ranks(small, tokenizer, 16, 3, state=state).step(12)[0]
    different = (rows != expected.rows[9:21]).any(axis=1)
    assert different.any()
    assert set(np.flatnonzero(different) % 3) == {1}, "and only in that lane"


def test_a_state_with_another_row_number_gives_other_rows_and_hashes(tokenizer, small):
    first = Ranks(small, tokenizer, 16, 3)
    first.step(9)
    state = first.state()
    rows, total = Ranks(small, tokenizer, 16, 3, state=state).step(6)
    for shift in (1, 3):  # three rows later every lane has its turn again, but the hashes know
        other_rows, other = Ranks(small, tokenizer, 16, 3, state={**state, "row": 9 + shift}).step(6)
        assert (other_rows == rows).all() == (shift == 3)
        assert other != total


def test_the_epoch_is_the_one_of_the_lane_that_is_furthest(tokenizer, small):
    reader = Ranks(small, tokenizer, 16, 3).readers[0]
    assert reader.epoch(reader.state()) == 0
    rows = np.empty((1, 17), dtype=np.int64)
    while (epoch := reader.epoch(reader.state())) < 3:
        reader.fill(rows)
        furthest = max(position for position, _, _ in reader.state()["lanes"].values())
        assert epoch <= reader.epoch(reader.state()) == furthest // reader.num_units


# ---- the loader ----


def reader_of(folder, tokenizer, seq_len=16, lanes=3, rank=0, world_size=1, state=None):
    return Ranks(folder, tokenizer, seq_len, lanes, world_size, state).readers[rank]


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "nanotrain-data"]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 3)])
def test_batches_are_the_rows_of_the_reader_with_its_state_before_them(tokenizer, small, rank, world_size):
    twin = reader_of(small, tokenizer, rank=rank, world_size=world_size)
    with DataLoader(reader_of(small, tokenizer, rank=rank, world_size=world_size), 4, CPU) as loader:
        for _, batch in zip(range(20), loader, strict=False):
            rows = np.empty((4, 17), dtype=np.int64)
            assert batch.state == twin.state()
            assert batch.row_hash == twin.fill(rows)
            np.testing.assert_array_equal(batch.targets.numpy(), rows[:, 1:])
            np.testing.assert_array_equal(batch.inputs.numpy(), rows[:, :-1])


def test_batches_stay_as_they_are_while_later_ones_are_made(tokenizer, small):
    expected = Reference(small, tokenizer, 16, 3, 40).rows
    with DataLoader(reader_of(small, tokenizer), 4, CPU) as loader:
        batches = [next(loader) for _ in range(10)]
    np.testing.assert_array_equal(torch.cat([batch.inputs for batch in batches])[:, 1:], expected[:, 1:-1])
    np.testing.assert_array_equal(torch.cat([batch.targets for batch in batches]), expected[:, 1:])
    for batch in batches:
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.is_contiguous()
        assert batch.targets.is_contiguous()


def test_resuming_from_the_state_of_a_batch_gives_that_batch_again(tokenizer, small):
    with DataLoader(reader_of(small, tokenizer), 4, CPU) as loader:
        batches = [next(loader) for _ in range(8)]
    with DataLoader(reader_of(small, tokenizer, state=batches[3].state), 4, CPU) as loader:
        for batch in batches[3:]:
            assert torch.equal(next(loader).inputs, batch.inputs)


def test_the_state_of_the_prefetched_batch_would_be_wrong(tokenizer, small):
    loader = DataLoader(reader_of(small, tokenizer), 4, CPU)
    batch, following = next(loader), next(loader)
    loader.close()
    assert batch.state["row"] == 0
    assert following.state["row"] == 4
    assert loader.reader.state()["row"] > 8, "the reader is ahead, so taking its state would be noticed"


def test_a_shard_that_vanishes_is_a_data_error_of_every_later_batch(tokenizer, small):
    with DataLoader(reader_of(small, tokenizer), 4, CPU) as loader:
        next(loader)
        for path in small.iterdir():
            path.unlink()
        with pytest.raises(DataError, match=r"shard_0000\d.parquet, row group \d, cannot be read"):
            soon(lambda: deque(itertools.islice(loader, 1000)))
        for _ in range(3):
            with pytest.raises(DataError, match="cannot be read"):
                soon(lambda: next(loader))
    assert loader_threads() == []


def test_a_shard_that_is_replaced_is_a_data_error_and_not_other_rows(tokenizer, small):
    with DataLoader(reader_of(small, tokenizer), 4, CPU) as loader:
        next(loader)
        for number, count in ((0, 5), (1, 4)):
            dataset.write_shard(small / f"shard_{number:05d}.parquet", make_texts(count, seed=9), 2)
        with pytest.raises(DataError, match=r"shard_0000\d.parquet, row group \d, cannot be read: .* has changed"):
            soon(lambda: deque(itertools.islice(loader, 1000)))


@pytest.mark.parametrize("error", [RuntimeError("odd"), MemoryError(), KeyError("x")])
def test_any_error_of_the_thread_reaches_the_caller_again_and_again(small, error):
    class Broken:
        bos = 0

        def encode_batch(self, texts):
            raise error

    with DataLoader(reader_of(small, Broken()), 4, CPU) as loader:
        for _ in range(3):
            with pytest.raises(type(error)) as caught:
                soon(lambda: next(loader))
            assert caught.value is error
    assert loader_threads() == []


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_close_ends_the_thread(tokenizer, small, taken):
    with DataLoader(reader_of(small, tokenizer), 4, CPU) as loader:
        assert len(loader_threads()) == 1
        for _ in range(taken):
            next(loader)
    assert loader_threads() == []
    loader.close()


def test_the_thread_ends_when_training_fails(tokenizer, small):
    def train():
        with DataLoader(reader_of(small, tokenizer), 4, CPU) as loader:
            next(loader)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert loader_threads() == []


# ---- validation ----


def test_packed_rows_by_hand(tokenizer, tmp_path):
    texts = ["river stone", None, "the old ships", "", "seven 12"]
    dataset.write_shard(tmp_path / "shard_0.parquet", texts, rows_per_group=2)
    stream = [token for text in filter(None, texts) for token in (tokenizer.bos, *tokenizer.encode(text))]
    available = (len(stream) - 1) // 3
    assert available >= 3
    for num_tokens, count in ((3, 1), (8, 2), (9, 3), (3 * available, available), (10**6, available)):
        rows = dataloader.packed_rows([tmp_path / "shard_0.parquet"], tokenizer, 3, num_tokens)
        assert rows.dtype == np.int32
        assert rows.tolist() == [stream[3 * n : 3 * n + 4] for n in range(count)]
    for seq_len in range(1, len(stream)):  # one of them ends just at the end of the shard, one a token behind it
        rows = dataloader.packed_rows([tmp_path / "shard_0.parquet"], tokenizer, seq_len, 10**6)
        whole = [stream[at : at + seq_len + 1] for at in range(0, len(stream), seq_len)]
        assert rows.tolist() == [row for row in whole if len(row) == seq_len + 1]


@pytest.mark.parametrize("seq_len", [1, 16, 100])
def test_packed_rows_read_on_from_row_group_to_row_group(tokenizer, tmp_path, seq_len):
    folder = make_shards(tmp_path)
    texts = pq.read_table(folder / "shard_00002.parquet")["text"].to_pylist()
    stream = [token for text in texts for token in (tokenizer.bos, *tokenizer.encode(text))]
    for num_tokens in (100, 1000, 1700):
        rows = dataloader.packed_rows([folder / "shard_00002.parquet"], tokenizer, seq_len, num_tokens)
        count = num_tokens // seq_len
        assert rows.tolist() == [stream[seq_len * n : seq_len * (n + 1) + 1] for n in range(count)]


def test_packed_rows_read_on_from_shard_to_shard(tokenizer, tmp_path):
    """Of which the first may be empty."""
    texts = make_texts(9, seed=2)
    paths = [tmp_path / f"shard_{number}.parquet" for number in range(3)]
    for path, part in zip(paths, ([], texts[:2], texts[2:]), strict=True):
        dataset.write_shard(path, part)
    dataset.write_shard(tmp_path / "one.parquet", texts)
    rows = dataloader.packed_rows(paths, tokenizer, 16, 10**6)
    np.testing.assert_array_equal(rows, dataloader.packed_rows([tmp_path / "one.parquet"], tokenizer, 16, 10**6))
    with pytest.raises(DataError, match=rf"the 2 train shards in {tmp_path} hold \d+ tokens, less than one row of"):
        dataloader.packed_rows(paths[:2], tokenizer, 10**4, 10**5)


def test_packed_rows_tokenize_little_more_than_they_need(tokenizer, tmp_path):
    texts, count = make_texts(2000), 0

    class Watching:
        bos = tokenizer.bos

        def encode_batch(self, texts):
            nonlocal count
            count += len(texts)
            return tokenizer.encode_batch(texts)

    dataset.write_shard(tmp_path / "shard_0.parquet", texts, rows_per_group=2000)
    stream = [token for text in texts[:400] for token in (tokenizer.bos, *tokenizer.encode(text))]
    needed = stream[:10_001].count(tokenizer.bos)
    rows = dataloader.packed_rows([tmp_path / "shard_0.parquet"], Watching(), 100, 10_000)
    assert rows[:, 1:].tolist() == [stream[100 * n + 1 : 100 * n + 101] for n in range(100)]
    assert needed <= count <= needed + 64, "and not the whole row group"


@pytest.mark.parametrize(("texts", "tokens"), [(["a"], 2), ([None, ""], 0), ([], 0)])
def test_a_validation_shard_shorter_than_a_row_is_a_data_error(tokenizer, tmp_path, texts, tokens):
    dataset.write_shard(tmp_path / "shard_0.parquet", texts)
    with pytest.raises(DataError, match=f"shard_0.parquet holds {tokens} tokens, less than one row of 17") as caught:
        dataloader.packed_rows([tmp_path / "shard_0.parquet"], tokenizer, 16, 1000)
    assert "--max-seq-len" in str(caught.value)


def test_validation_tokenizes_little_more_than_it_needs(tmp_path, tokenizer, monkeypatch):
    """Of documents of 300,000 characters four at a time, and no more than 64 of short ones."""
    sizes, encode_batch = [], type(tokenizer).encode_batch

    def counted(self, texts):
        sizes.append(len(texts))
        return encode_batch(self, texts)

    monkeypatch.setattr(type(tokenizer), "encode_batch", counted)
    texts = ["word " * 60_000] * 12
    dataset.write_shard(tmp_path / "long.parquet", texts)
    whole = dataloader.validation_documents(tmp_path / "long.parquet", tokenizer, 10**9)
    assert (sizes, len(whole)) == ([4, 4, 4], 12)
    assert len(dataloader.validation_documents(tmp_path / "long.parquet", tokenizer, 1)) == 1
    assert dataloader.packed_rows([tmp_path / "long.parquet"], tokenizer, 16, 64).shape == (4, 17)
    assert sizes == [4] * 5
    dataset.write_shard(tmp_path / "short.parquet", ["a b"] * 130)
    sizes.clear()
    assert len(dataloader.validation_documents(tmp_path / "short.parquet", tokenizer, 10**9)) == 130
    assert sizes == [64, 64, 2]
