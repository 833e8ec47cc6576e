"""The order of data and its exact state, against streams written out as plain lists of tokens."""

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
from nanotrain.dataloader import DataLoader, SequenceReader
from nanotrain.errors import DataError

SEED = 11
CPU = torch.device("cpu")


# ---- the reference ----


class Reference:
    """The sequences of a run by definition: each stream is one list of tokens, each token with its origin."""

    def __init__(self, folder, tokenizer, seq_len, num_streams, sequences, piece_chars=100_000, seed=SEED):
        self.seq_len, self.num_streams = seq_len, num_streams
        groups = []  # (shard name, group, texts) of every row group with rows, the last shard being validation
        for path in sorted(folder.glob("shard_*.parquet"))[:-1]:
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                groups.append((path.name, group, file.read_row_group(group)["text"].to_pylist()))
        slices = 1
        while slices * len(groups) < 2 * num_streams:
            slices += 1
        self.slices = {}
        for name, group, texts in groups:
            for part in range(slices):
                start, stop = len(texts) * part // slices, len(texts) * (part + 1) // slices
                if start < stop:
                    self.slices[f"{name}:{group}:{start}"] = texts[start:stop]
        needed = (sequences // num_streams + 2) * seq_len + 1
        self.order = []
        self.tokens = [[] for _ in range(num_streams)]
        self.places = [[] for _ in range(num_streams)]
        for epoch in itertools.count():
            if all(len(tokens) >= needed for tokens in self.tokens):
                break
            key = lambda name: hashlib.sha256(f"{seed} {epoch} {name}".encode()).hexdigest()  # noqa: B023, E731
            for name in sorted(self.slices, key=key):
                position = len(self.order)
                self.order.append(name)
                piece = 0
                for text in filter(None, self.slices[name]):
                    for begin in range(0, len(text), piece_chars):
                        ids = tokenizer.encode(text[begin : begin + piece_chars])
                        ids = ids if begin else [tokenizer.bos, *ids]
                        self.tokens[position % num_streams] += ids
                        self.places[position % num_streams] += [(position, piece, offset) for offset in range(len(ids))]
                        piece += 1
        self.sequences = np.array([self.sequence(n) for n in range(sequences)])

    def sequence(self, n):
        begin = n // self.num_streams * self.seq_len
        return self.tokens[n % self.num_streams][begin : begin + self.seq_len + 1]

    def state(self, sequence):
        """The state from which sequence number `sequence` comes next."""
        streams = {}
        for stream in range(self.num_streams):
            done = len(range(stream, sequence, self.num_streams))
            streams[str(stream)] = list(self.places[stream][done * self.seq_len]) if done else [stream, 0, 0]
        return {"next_sequence": sequence, "streams": streams}


def hash_by_hand(number, sequence):
    packed = struct.pack(f"<q{len(sequence)}i", number, *sequence)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


class Ranks:
    """All ranks of a world, stepped together."""

    def __init__(self, folder, tokenizer, seq_len, num_streams, world_size=1, state=None, seed=SEED):
        slices = dataloader.slices_of(dataset.open_shards(folder).train, num_streams)
        state = json.loads(json.dumps(state))  # as a checkpoint keeps it
        self.readers = [
            SequenceReader(slices, tokenizer, seq_len, num_streams, seed, rank, world_size, state)
            for rank in range(world_size)
        ]

    def step(self, sequences_per_rank):
        """The next sequences in the order of the run, and their hash."""
        parts = [np.full((sequences_per_rank, reader.seq_len + 1), -1, dtype=np.int64) for reader in self.readers]
        begin, world_size = self.readers[0].next_sequence, len(parts)
        total = sum(reader.fill(part) for reader, part in zip(self.readers, parts, strict=True))
        sequences = [parts[(begin + n) % world_size][n // world_size] for n in range(world_size * sequences_per_rank)]
        return np.array(sequences), total % 2**64

    def steps(self, count, sequences_per_rank):
        return np.concatenate([self.step(sequences_per_rank)[0] for _ in range(count)])

    def state(self):
        """One state of all, as a checkpoint merges it; ranks that read the same stream must agree."""
        states = [reader.state() for reader in self.readers]
        merged = {"next_sequence": states[0]["next_sequence"], "streams": {}}
        for state in states:
            assert state["next_sequence"] == merged["next_sequence"]
            for stream, place in state["streams"].items():
                assert merged["streams"].setdefault(stream, place) == place
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
    """A corpus so small that a few dozen sequences are several epochs."""
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


# ---- the order of sequences ----


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("num_streams", [1, 5, 48])
def test_sequences_are_those_of_the_definition(tokenizer, tmp_path, corpus, num_streams):
    folder = corpus(tmp_path)
    expected = Reference(folder, tokenizer, 16, num_streams, 240)
    ranks = Ranks(folder, tokenizer, 16, num_streams)
    sequences = ranks.steps(40, 6)
    np.testing.assert_array_equal(sequences, expected.sequences)
    assert ranks.state() == expected.state(240)


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize(
    ("corpus", "num_streams", "sequences_per_rank", "steps"),
    [
        (many_row_groups, 4, 4, 5),
        (many_row_groups, 48, 1, 12),
        (few_row_groups, 6, 5, 4),
        (one_row_group, 7, 11, 2),
        (one_row_group, 48, 3, 3),
    ],
)
def test_p2_the_order_of_sequences_does_not_depend_on_the_world_size(
    tokenizer, tmp_path, world_size, corpus, num_streams, sequences_per_rank, steps
):
    folder = corpus(tmp_path)
    alone = Ranks(folder, tokenizer, 12, num_streams).steps(1, steps * sequences_per_rank * world_size)
    together = Ranks(folder, tokenizer, 12, num_streams, world_size).steps(steps, sequences_per_rank)
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_one_cursor_off_by_one_would_be_noticed_at_every_world_size(tokenizer, tmp_path, world_size, part):
    """The twin of the test above."""
    folder = few_row_groups(tmp_path)
    alone = Ranks(folder, tokenizer, 12, 6).steps(1, 20 * world_size)
    state = Ranks(folder, tokenizer, 12, 6).state()
    state["streams"]["3"][part] += 1
    together = Ranks(folder, tokenizer, 12, 6, world_size, state).steps(4, 5)
    assert set(np.flatnonzero((together != alone).any(axis=1)) % 6) == {3}, "and only in that stream"


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
def test_p2_the_order_of_sequences_is_the_definition_at_every_world_size(tokenizer, tmp_path, world_size):
    expected = Reference(few_row_groups(tmp_path), tokenizer, 16, 6, 12 * world_size)
    ranks = Ranks(tmp_path, tokenizer, 16, 6, world_size)
    np.testing.assert_array_equal(ranks.steps(4, 3), expected.sequences)
    assert ranks.state() == expected.state(12 * world_size)


def test_the_last_target_of_a_sequence_is_the_first_input_of_its_streams_next(tokenizer, small):
    sequences = Ranks(small, tokenizer, 16, 3).steps(10, 6)
    np.testing.assert_array_equal(sequences[:-3, -1], sequences[3:, 0])


def test_a_rank_reads_only_the_streams_it_needs(tokenizer, small):
    for world_size, expected in ((2, [0, 2, 4]), (3, [0, 3]), (4, [0, 2, 4]), (5, [0, 1, 2, 3, 4, 5]), (6, [0])):
        reader = Ranks(small, tokenizer, 16, 6, world_size).readers[0]
        assert [int(stream) for stream in reader.state()["streams"]] == expected


def test_another_seed_gives_another_order_of_the_same_documents(tokenizer, tmp_path):
    folder = many_row_groups(tmp_path)
    first, other = (Ranks(folder, tokenizer, 16, 4, seed=seed).steps(5, 8) for seed in (1, 2))
    assert (first != other).any()
    np.testing.assert_array_equal(other, Reference(folder, tokenizer, 16, 4, 40, seed=2).sequences)


def test_an_epoch_holds_every_document_once_and_the_next_has_another_order(tokenizer, tmp_path):
    texts = make_texts(30, seed=1)
    folder = write(tmp_path, texts[:20], texts[20:], rows_per_group=3)
    epoch_tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    sequences = Ranks(folder, tokenizer, 1, 1).steps(1, 2 * epoch_tokens)
    stream = sequences[:, 0].tolist()
    epochs = [stream[:epoch_tokens], stream[epoch_tokens:]]
    documents = [tokenizer.decode(epoch).removeprefix("<|bos|>").split("<|bos|>") for epoch in epochs]
    assert sorted(documents[0]) == sorted(documents[1]) == sorted(texts)
    assert documents[0] != documents[1]
    assert documents[0] != texts


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("num_streams", [1, 3, 48])
def test_slices_are_every_row_of_train_once(tmp_path, corpus, num_streams):
    folder = corpus(tmp_path)
    shards = dataset.open_shards(folder)
    rows = [(part.path, part.group, row) for part in dataloader.slices_of(shards.train, num_streams)
            for row in range(part.start, part.stop)]  # fmt: skip
    groups = [(shard.path, group, count) for shard in shards.train for group, count in enumerate(shard.group_rows)]
    assert rows == [(path, group, row) for path, group, count in groups for row in range(count)]
    slices = dataloader.slices_of(shards.train, num_streams)
    if len(groups) >= 2 * num_streams:
        assert len(slices) == len(groups)
    else:
        assert len(slices) >= min(2 * num_streams, len(rows)) / 2
    assert len({part.name for part in slices}) == len(slices)


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
    np.testing.assert_array_equal(ranks.steps(8, 10), expected.sequences)
    assert ranks.state() == expected.state(80)
    assert max(sizes) == 100_000
    assert {piece for _, piece, _ in expected.places[0][: 80 * 2048]} >= {0, 1, 2}


def test_the_cut_of_long_documents_is_noticed_by_the_comparison(tokenizer, small, monkeypatch):
    expected = Reference(small, tokenizer, 16, 3, 60, piece_chars=33)
    assert (Ranks(small, tokenizer, 16, 3).steps(10, 6) != expected.sequences).any()
    monkeypatch.setattr(dataloader, "MAX_PIECE_CHARS", 33)
    ranks = Ranks(small, tokenizer, 16, 3)
    np.testing.assert_array_equal(ranks.steps(10, 6), expected.sequences)
    assert ranks.state() == expected.state(60)


def test_null_and_empty_documents_are_skipped_and_counted(tokenizer, tmp_path):
    texts = make_texts(6, seed=1)
    folder = write(tmp_path, [None, *texts[:3], "", *texts[3:], None], rows_per_group=9)
    reader = Ranks(folder, tokenizer, 4, 1).readers[0]
    epoch_tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    sequences = np.empty((1, 5), dtype=np.int64)
    stream = []
    while len(stream) < epoch_tokens:
        reader.fill(sequences)
        stream += sequences[0, :4].tolist()
    documents = tokenizer.decode(stream[:epoch_tokens]).removeprefix("<|bos|>").split("<|bos|>")
    assert sorted(documents) == sorted(texts)
    assert reader.skipped_documents >= 3
    for world_size in (2, 3, 4, 8):  # several ranks read the same stream
        ranks = Ranks(folder, tokenizer, 4, 4, world_size)
        ranks.steps(48, 1)
        once = {
            number: stream.skipped_documents for reader in ranks.readers for number, stream in reader.streams.items()
        }
        assert len(once) == 4
        assert sum(reader.skipped_documents for reader in ranks.readers) == sum(once.values()) > 0
    assert Ranks(folder, tokenizer, 4, 1).readers[0].skipped_documents == 0


@pytest.mark.parametrize("num_streams", [1, 4, 48])
@pytest.mark.parametrize("texts", [[None], [None, ""] * 40])
def test_shards_without_text_are_an_error_and_not_an_endless_search(tokenizer, tmp_path, texts, num_streams):
    folder = write(tmp_path, texts, rows_per_group=1)
    ranks = Ranks(folder, tokenizer, 16, num_streams)
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


def test_streams_that_share_a_row_group_decode_it_once(tokenizer, tmp_path, monkeypatch):
    folder = write(tmp_path, make_texts(300), rows_per_group=1000)
    expected = Reference(folder, tokenizer, 16, 48, 480)
    decoded, read_row_group = [], pq.ParquetFile.read_row_group

    def counting(file, group, **settings):
        decoded.append(group)
        return read_row_group(file, group, **settings)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    np.testing.assert_array_equal(Ranks(folder, tokenizer, 16, 48).steps(10, 48), expected.sequences)
    assert decoded == [0]


def test_no_slices_are_a_data_error(tokenizer):
    with pytest.raises(DataError, match="hold no rows"):
        SequenceReader([], tokenizer, 16, 4, SEED)


def test_the_first_sequences_come_without_tokenizing_whole_slices(tokenizer, tmp_path):
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
    assert sum(seen[:2]) < 0.01 * sum(map(len, texts)), "one job for each stream"


# ---- the hash of sequences ----


def test_sequence_hash_is_blake2b_of_number_and_tokens():
    sequence = [0, 5, 70_000, 2**31 - 1]
    packed = b"\x07\x01\0\0\0\0\0\0" + b"\0\0\0\0" + b"\x05\0\0\0" + b"\x70\x11\x01\0" + b"\xff\xff\xff\x7f"
    expected = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
    for kind in (np.int64, np.int32):
        assert dataloader.sequence_hash(263, np.array(sequence, dtype=kind)) == expected == hash_by_hand(263, sequence)
    assert dataloader.sequence_hash(264, np.array(sequence)) != expected
    assert dataloader.sequence_hash(263, np.array(sequence[::-1])) != expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_hash_of_a_step_is_the_sum_over_its_sequences_at_every_world_size(tokenizer, small, world_size):
    expected = Reference(small, tokenizer, 16, 4, 48).sequences
    ranks = Ranks(small, tokenizer, 16, 4, world_size)
    for start in (0, 24):
        by_hand = sum(hash_by_hand(n, expected[n]) for n in range(start, start + 24)) % 2**64
        assert ranks.step(24 // world_size)[1] == by_hand


def test_the_hash_of_many_sequences_stays_below_2_to_the_64(tokenizer, small):
    sequences = np.empty((60, 17), dtype=np.int64)
    total = reader_of(small, tokenizer).fill(sequences)
    assert total == sum(hash_by_hand(n, sequence) for n, sequence in enumerate(sequences)) % 2**64
    with DataLoader(reader_of(small, tokenizer), 60, CPU) as loader:
        assert next(loader).sequence_hash == total


def test_the_hash_of_a_step_notices_two_sequences_that_changed_places(tokenizer, small):
    sequences = Reference(small, tokenizer, 16, 4, 4).sequences
    right = sum(hash_by_hand(n, sequences[n]) for n in range(4))
    swapped = sum(hash_by_hand(n, sequences[m]) for n, m in enumerate((0, 2, 1, 3)))
    assert Ranks(small, tokenizer, 16, 4).step(4)[1] == right % 2**64 != swapped % 2**64


# ---- the state ----


@pytest.mark.parametrize("num_streams", [1, 3, 48])
def test_p3_resuming_after_any_sequence_gives_the_rest_of_the_sequences(tokenizer, small, num_streams):
    expected = Reference(small, tokenizer, 16, num_streams, 110)
    first = Ranks(small, tokenizer, 16, num_streams)
    offsets, epochs = set(), set()
    for done in range(0, 100, 1 if num_streams == 3 else 7):
        if done > first.readers[0].next_sequence:
            first.step(done - first.readers[0].next_sequence)
        state = first.state()
        assert state == expected.state(done)
        resumed = Ranks(small, tokenizer, 16, num_streams, state=state)
        assert resumed.state() == state
        np.testing.assert_array_equal(resumed.steps(2, 5), expected.sequences[done : done + 10])
        assert resumed.state() == expected.state(done + 10)
        offsets.update(offset > 0 for _, _, offset in state["streams"].values())
        epochs.update(position // len(expected.slices) for position, _, _ in state["streams"].values())
    assert offsets == {True, False}, "in the middle and at the start of documents"
    assert len(epochs) >= 2, "on both sides of the edge of an epoch"


@pytest.mark.parametrize("piece_chars", [37, 100_000])
@pytest.mark.parametrize("worlds", [[(1, 8), (2, 3), (4, 1)], [(3, 4), (2, 5), (5, 2)], [(8, 1), (1, 1), (7, 3)]])
def test_p3_resuming_twice_with_other_world_and_batch_sizes(tokenizer, small, monkeypatch, worlds, piece_chars):
    monkeypatch.setattr(dataloader, "MAX_PIECE_CHARS", piece_chars)
    expected = Reference(small, tokenizer, 16, 6, 100, piece_chars)
    state, done = None, 0
    for world_size, sequences_per_rank in worlds:
        for steps in (2, 0, 1):  # a resume that is stopped before its first step as well
            ranks = Ranks(small, tokenizer, 16, 6, world_size, state)
            if steps:
                sequences = ranks.steps(steps, sequences_per_rank)
                np.testing.assert_array_equal(sequences, expected.sequences[done : done + len(sequences)])
                done += len(sequences)
            state = ranks.state()
            assert state == expected.state(done)
    assert done > 50


@pytest.mark.parametrize("shifted", [0, 1])
def test_one_cursor_off_by_one_at_either_of_two_resumes_would_be_noticed(tokenizer, small, shifted):
    """The twin of the test above."""
    expected, state = Reference(small, tokenizer, 16, 6, 100), None
    for number, (world_size, sequences_per_rank) in enumerate([(3, 4), (2, 5), (5, 2)]):
        ranks = Ranks(small, tokenizer, 16, 6, world_size, state)
        sequences = ranks.steps(2, sequences_per_rank)
        begin = ranks.readers[0].next_sequence - len(sequences)
        assert (sequences == expected.sequences[begin : begin + len(sequences)]).all() == (number <= shifted)
        state = ranks.state()
        if number == shifted:
            state["streams"]["2"][2] += 1


@pytest.mark.parametrize("part", [0, 1, 2])
def test_p3_a_state_with_one_cursor_off_by_one_gives_other_sequences(tokenizer, small, part):
    expected = Reference(small, tokenizer, 16, 3, 60)
    first = Ranks(small, tokenizer, 16, 3)
    first.step(9)
    state = first.state()
    state["streams"]["1"][part] += 1
    sequences = Ranks(small, tokenizer, 16, 3, state=state).step(12)[0]
    different = (sequences != expected.sequences[9:21]).any(axis=1)
    assert different.any()
    assert set(np.flatnonzero(different) % 3) == {1}, "and only in that stream"


def test_a_state_with_another_sequence_number_gives_other_sequences_and_hashes(tokenizer, small):
    first = Ranks(small, tokenizer, 16, 3)
    first.step(9)
    state = first.state()
    sequences, total = Ranks(small, tokenizer, 16, 3, state=state).step(6)
    for shift in (1, 3):  # three sequences later every stream has its turn again, but the hashes know
        other_sequences, other = Ranks(small, tokenizer, 16, 3, state={**state, "next_sequence": 9 + shift}).step(6)
        assert (other_sequences == sequences).all() == (shift == 3)
        assert other != total


def test_the_epoch_is_the_one_of_the_stream_that_is_furthest(tokenizer, small):
    reader = Ranks(small, tokenizer, 16, 3).readers[0]
    assert reader.epoch(reader.state()) == 0
    sequences = np.empty((1, 17), dtype=np.int64)
    while (epoch := reader.epoch(reader.state())) < 3:
        reader.fill(sequences)
        furthest = max(position for position, _, _ in reader.state()["streams"].values())
        assert epoch <= reader.epoch(reader.state()) == furthest // reader.num_slices


# ---- the loader ----


def reader_of(folder, tokenizer, seq_len=16, num_streams=3, rank=0, world_size=1, state=None):
    return Ranks(folder, tokenizer, seq_len, num_streams, world_size, state).readers[rank]


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "nanotrain-data"]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 3)])
def test_batches_are_the_sequences_of_the_reader_with_its_state_before_them(tokenizer, small, rank, world_size):
    twin = reader_of(small, tokenizer, rank=rank, world_size=world_size)
    with DataLoader(reader_of(small, tokenizer, rank=rank, world_size=world_size), 4, CPU) as loader:
        for _, batch in zip(range(20), loader, strict=False):
            sequences = np.empty((4, 17), dtype=np.int64)
            assert batch.state == twin.state()
            assert batch.sequence_hash == twin.fill(sequences)
            np.testing.assert_array_equal(batch.targets.numpy(), sequences[:, 1:])
            np.testing.assert_array_equal(batch.inputs.numpy(), sequences[:, :-1])


def test_batches_stay_as_they_are_while_later_ones_are_made(tokenizer, small):
    expected = Reference(small, tokenizer, 16, 3, 40).sequences
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
    assert batch.state["next_sequence"] == 0
    assert following.state["next_sequence"] == 4
    assert loader.reader.state()["next_sequence"] > 8, "the reader is ahead, so taking its state would be noticed"


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


def test_a_shard_that_is_replaced_is_a_data_error_and_not_other_sequences(tokenizer, small):
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


def test_packed_sequences_by_hand(tokenizer, tmp_path):
    texts = ["river stone", None, "the old ships", "", "seven 12"]
    dataset.write_shard(tmp_path / "shard_0.parquet", texts, rows_per_group=2)
    stream = [token for text in filter(None, texts) for token in (tokenizer.bos, *tokenizer.encode(text))]
    available = (len(stream) - 1) // 3
    assert available >= 3
    for num_tokens, count in ((3, 1), (8, 2), (9, 3), (3 * available, available), (10**6, available)):
        sequences = dataloader.packed_sequences([tmp_path / "shard_0.parquet"], tokenizer, 3, num_tokens)
        assert sequences.dtype == np.int32
        assert sequences.tolist() == [stream[3 * n : 3 * n + 4] for n in range(count)]
    for seq_len in range(1, len(stream)):  # one of them ends just at the end of the shard, one a token behind it
        sequences = dataloader.packed_sequences([tmp_path / "shard_0.parquet"], tokenizer, seq_len, 10**6)
        whole = [stream[at : at + seq_len + 1] for at in range(0, len(stream), seq_len)]
        assert sequences.tolist() == [sequence for sequence in whole if len(sequence) == seq_len + 1]


@pytest.mark.parametrize("seq_len", [1, 16, 100])
def test_packed_sequences_read_on_from_row_group_to_row_group(tokenizer, tmp_path, seq_len):
    folder = make_shards(tmp_path)
    texts = pq.read_table(folder / "shard_00002.parquet")["text"].to_pylist()
    stream = [token for text in texts for token in (tokenizer.bos, *tokenizer.encode(text))]
    for num_tokens in (100, 1000, 1700):
        sequences = dataloader.packed_sequences([folder / "shard_00002.parquet"], tokenizer, seq_len, num_tokens)
        count = num_tokens // seq_len
        assert sequences.tolist() == [stream[seq_len * n : seq_len * (n + 1) + 1] for n in range(count)]


def test_packed_sequences_read_on_from_shard_to_shard(tokenizer, tmp_path):
    """Of which the first may be empty."""
    texts = make_texts(9, seed=2)
    paths = [tmp_path / f"shard_{number}.parquet" for number in range(3)]
    for path, part in zip(paths, ([], texts[:2], texts[2:]), strict=True):
        dataset.write_shard(path, part)
    dataset.write_shard(tmp_path / "one.parquet", texts)
    sequences = dataloader.packed_sequences(paths, tokenizer, 16, 10**6)
    np.testing.assert_array_equal(
        sequences, dataloader.packed_sequences([tmp_path / "one.parquet"], tokenizer, 16, 10**6)
    )
    with pytest.raises(
        DataError, match=rf"the 2 train shards in {tmp_path} hold \d+ tokens, less than one sequence of"
    ):
        dataloader.packed_sequences(paths[:2], tokenizer, 10**4, 10**5)


def test_packed_sequences_tokenize_little_more_than_they_need(tokenizer, tmp_path):
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
    sequences = dataloader.packed_sequences([tmp_path / "shard_0.parquet"], Watching(), 100, 10_000)
    assert sequences[:, 1:].tolist() == [stream[100 * n + 1 : 100 * n + 101] for n in range(100)]
    assert needed <= count <= needed + 64, "and not the whole row group"


@pytest.mark.parametrize(("texts", "tokens"), [(["a"], 2), ([None, ""], 0), ([], 0)])
def test_a_validation_shard_shorter_than_a_sequence_is_a_data_error(tokenizer, tmp_path, texts, tokens):
    dataset.write_shard(tmp_path / "shard_0.parquet", texts)
    with pytest.raises(
        DataError, match=f"shard_0.parquet holds {tokens} tokens, less than one sequence of 17"
    ) as caught:
        dataloader.packed_sequences([tmp_path / "shard_0.parquet"], tokenizer, 16, 1000)
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
    assert dataloader.packed_sequences([tmp_path / "long.parquet"], tokenizer, 16, 64).shape == (4, 17)
    assert sizes == [4] * 5
    dataset.write_shard(tmp_path / "short.parquet", ["a b"] * 130)
    sizes.clear()
    assert len(dataloader.validation_documents(tmp_path / "short.parquet", tokenizer, 10**9)) == 130
    assert sizes == [64, 64, 2]
