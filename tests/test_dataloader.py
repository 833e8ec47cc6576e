"""The order of data and its exact state, against streams written out as plain lists of tokens."""

import hashlib
import itertools
import json
import struct
import threading
from collections import Counter, deque
from multiprocessing.pool import ThreadPool

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_texts

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
        self.hashes = [hash_by_hand(n, sequence) for n, sequence in enumerate(self.sequences)]

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


def assert_follows(ranks, expected, steps, sequences_per_rank):
    """Steps of all ranks give the sequences of the reference, their hashes, and the state before and after each."""
    for _ in range(steps):
        begin = ranks.readers[0].next_sequence
        assert ranks.state() == expected.state(begin)
        sequences, total = ranks.step(sequences_per_rank)
        end = begin + len(sequences)
        np.testing.assert_array_equal(sequences, expected.sequences[begin:end])
        assert total == sum(expected.hashes[begin:end]) % 2**64
    assert ranks.state() == expected.state(ranks.readers[0].next_sequence)


CORPORA = [many_row_groups, few_row_groups, one_row_group, one_document, holes, a_needle]


@pytest.fixture
def small(tmp_path):
    """A corpus so small that a few dozen sequences are several epochs."""
    return write(tmp_path, make_texts(5, seed=1), make_texts(4, seed=2), rows_per_group=2)


def soon(function):
    """The result of `function()`; a failure instead of a hanging test where it does not come."""
    return ThreadPool(1).apply_async(function).get(timeout=20)


class Watching:
    """A tokenizer that notes the lengths of the texts that it is asked for, call by call."""

    def __init__(self, tokenizer):
        self.inner, self.bos, self.lengths = tokenizer, tokenizer.bos, []

    def encode_batch(self, texts):
        self.lengths.append([len(text) for text in texts])
        return self.inner.encode_batch(texts)


# ---- the order of sequences ----


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("num_streams", [1, 5, 48])
def test_sequences_are_those_of_the_definition(tokenizer, tmp_path, corpus, num_streams):
    folder, seed = corpus(tmp_path), num_streams
    expected = Reference(folder, tokenizer, 16, num_streams, 240, seed=seed)
    assert_follows(Ranks(folder, tokenizer, 16, num_streams, seed=seed), expected, 8, 30)


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize(
    ("corpus", "num_streams", "sequences_per_rank", "steps"),
    [(many_row_groups, 48, 1, 12), (few_row_groups, 6, 5, 4), (one_row_group, 48, 3, 3)],
)
def test_p2_the_order_of_sequences_is_the_definition_at_every_world_size(
    tokenizer, tmp_path, world_size, corpus, num_streams, sequences_per_rank, steps
):
    folder = corpus(tmp_path)
    expected = Reference(folder, tokenizer, 12, num_streams, steps * sequences_per_rank * world_size)
    assert_follows(Ranks(folder, tokenizer, 12, num_streams, world_size), expected, steps, sequences_per_rank)


def test_a_long_document_is_one_document_tokenized_in_bounded_pieces(tokenizer, tmp_path):
    long = " ".join(make_texts(800, seed=3))
    assert len(long) > 250_000
    folder, watching = write(tmp_path, ["before", long, "after"]), Watching(tokenizer)
    expected = Reference(folder, tokenizer, 2048, 1, 80)
    assert_follows(Ranks(folder, watching, 2048, 1), expected, 8, 10)
    assert max(itertools.chain.from_iterable(watching.lengths)) == 100_000
    assert {piece for _, piece, _ in expected.places[0][: 80 * 2048]} >= {0, 1, 2}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_null_and_empty_documents_are_skipped(tokenizer, tmp_path, world_size):
    texts = make_texts(6, seed=1)
    folder = write(tmp_path, [None, *texts[:3], "", *texts[3:], None], rows_per_group=9)
    expected = Reference(folder, tokenizer, 4, 4, 48 * world_size)
    assert_follows(Ranks(folder, tokenizer, 4, 4, world_size), expected, 48, 1)


@pytest.mark.parametrize("num_streams", [1, 48])
@pytest.mark.parametrize("texts", [[None], [None, ""] * 40])
def test_shards_without_text_are_an_error_and_not_an_endless_search(tokenizer, tmp_path, texts, num_streams):
    folder = write(tmp_path, texts, rows_per_group=1)
    ranks = Ranks(folder, tokenizer, 16, num_streams)
    for _ in range(2):
        with pytest.raises(DataError, match="the train shards have no text") as caught:
            soon(lambda: ranks.step(4))
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("num_streams", [1, 4])
def test_a_huge_row_group_is_read_in_windows(tokenizer, tmp_path, monkeypatch, num_streams):
    monkeypatch.setattr(dataloader, "WINDOW_BYTES", 1000)
    folder, windows = write(tmp_path, make_texts(40), rows_per_group=1000), []

    def noting(path, group, start, stop, stamp):
        windows.append(stop - start)
        return dataset.read_texts(path, group, start, stop, stamp)

    monkeypatch.setattr(dataloader, "read_texts", noting)
    expected = Reference(folder, tokenizer, 16, num_streams, 200)
    assert_follows(Ranks(folder, tokenizer, 16, num_streams), expected, 10, 20)
    assert len(windows) > 8
    assert max(windows) <= 6


@pytest.mark.parametrize(
    ("groups", "megabytes", "rows", "expected"),
    [
        (10_000, 4, 100, 192), (400, 250, 100, 8), (101, 25, 100, 64), (10, 250, 100, 8), (1, 250, 100, 8),
        (1, 0.1, 100, 192), (1, 1e4, 100, 1), (12, 20, 1, 12),
    ],
)  # fmt: skip
def test_the_number_of_streams_follows_the_row_groups(groups, megabytes, rows, expected):
    shards = [dataset.Shard(f"{n}", None, 0, 0, (rows,), int(megabytes * 1e6)) for n in range(groups)]
    assert dataloader.choose_num_streams(shards) == expected


def test_every_text_is_tokenized_once_at_the_usual_world_sizes():
    for world_size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128):
        readers = [
            SequenceReader([dataloader.Slice(None, 0, 0, 1, 1)], None, 16, 192, SEED, rank, world_size)
            for rank in range(world_size)
        ]
        read = Counter(itertools.chain.from_iterable(reader.streams for reader in readers))
        assert set(read.values()) == {2 if world_size == 128 else 1}
        assert len(read) == 192


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
        assert_follows(Ranks(small, tokenizer, 16, num_streams, state=state), expected, 2, 5)
        offsets.update(offset > 0 for _, _, offset in state["streams"].values())
        epochs.update(position // len(expected.slices) for position, _, _ in state["streams"].values())
    assert offsets == {True, False}, "in the middle and at the start of documents"
    assert len(epochs) >= 2, "on both sides of the edge of an epoch"


@pytest.mark.parametrize("piece_chars", [37, 100_000])
@pytest.mark.parametrize("worlds", [[(1, 8), (2, 3), (4, 1)], [(3, 4), (2, 5), (5, 2)], [(8, 1), (1, 1), (7, 3)]])
def test_p3_resuming_twice_with_other_world_and_batch_sizes(tokenizer, small, monkeypatch, worlds, piece_chars):
    monkeypatch.setattr(dataloader, "MAX_PIECE_CHARS", piece_chars)
    expected = Reference(small, tokenizer, 16, 6, 100, piece_chars)
    state = None
    for world_size, sequences_per_rank in worlds:
        for steps in (2, 0, 1):  # a resume that is stopped before its first step as well
            ranks = Ranks(small, tokenizer, 16, 6, world_size, state)
            assert_follows(ranks, expected, steps, sequences_per_rank)
            state = ranks.state()
    assert state["next_sequence"] > 50


@pytest.mark.parametrize("part", [0, 1, 2])
def test_p3_a_state_with_one_cursor_off_by_one_gives_other_sequences(tokenizer, small, part):
    expected = Reference(small, tokenizer, 16, 3, 60)
    first = Ranks(small, tokenizer, 16, 3)
    first.step(9)
    state = first.state()
    state["streams"]["1"][part] += 1
    sequences = Ranks(small, tokenizer, 16, 3, state=state).step(12)[0]
    different = np.flatnonzero((sequences != expected.sequences[9:21]).any(axis=1))
    assert set(different % 3) == {1}, "and only in that stream"


# ---- the loader ----


def reader_of(folder, tokenizer, rank=0, world_size=1):
    return Ranks(folder, tokenizer, 16, 3, world_size).readers[rank]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 3)])
def test_batches_are_the_sequences_of_the_reader_with_its_state_before_them(tokenizer, small, rank, world_size):
    """And stay so while later ones are made."""
    twin = reader_of(small, tokenizer, rank=rank, world_size=world_size)
    with DataLoader(reader_of(small, tokenizer, rank=rank, world_size=world_size), 4, CPU) as loader:
        batches = [next(loader) for _ in range(20)]
    for batch in batches:
        sequences = np.empty((4, 17), dtype=np.int64)
        assert batch.state == twin.state()
        assert batch.sequence_hash == twin.fill(sequences)
        for tensor, expected in ((batch.inputs, sequences[:, :-1]), (batch.targets, sequences[:, 1:])):
            assert tensor.dtype == torch.int64
            assert tensor.is_contiguous()
            np.testing.assert_array_equal(tensor.numpy(), expected)


def test_a_shard_that_vanishes_is_a_data_error_of_every_later_batch(tokenizer, small):
    with DataLoader(reader_of(small, tokenizer), 4, CPU) as loader:
        next(loader)
        for number in (0, 1):
            (small / f"shard_{number:05d}.parquet").unlink()
        with pytest.raises(DataError, match=r"shard_0000\d.parquet, row group \d, cannot be read"):
            soon(lambda: deque(itertools.islice(loader, 1000)))
        with pytest.raises(DataError, match="cannot be read"):
            soon(lambda: next(loader))


def test_any_error_of_the_thread_reaches_the_caller_again_and_again(small):
    class Broken:
        bos = 0

        def encode_batch(self, texts):
            raise error

    error = KeyError("x")
    with DataLoader(reader_of(small, Broken()), 4, CPU) as loader:
        for _ in range(3):
            with pytest.raises(KeyError) as caught:
                soon(lambda: next(loader))
            assert caught.value is error
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nanotrain-data")]


# ---- validation ----


def test_packed_sequences_by_hand(tokenizer, tmp_path):
    """They go on from row group to row group and from shard to shard, of which one may be empty."""
    parts = [], ["river stone", None, "the old ships"], ["", "seven 12"]
    paths = [tmp_path / f"shard_{number}.parquet" for number in range(3)]
    for path, texts in zip(paths, parts, strict=True):
        dataset.write_shard(path, texts, rows_per_group=2)
    texts = filter(None, itertools.chain(*parts))
    stream = [token for text in texts for token in (tokenizer.bos, *tokenizer.encode(text))]
    available = (len(stream) - 1) // 3
    assert available >= 3
    for num_tokens, count in ((3, 1), (8, 2), (9, 3), (3 * available, available), (10**6, available)):
        sequences = dataloader.packed_sequences(paths, tokenizer, 3, num_tokens)
        assert sequences.dtype == np.int32
        assert sequences.tolist() == [stream[3 * n : 3 * n + 4] for n in range(count)]
    assert len(dataloader.packed_sequences(paths, tokenizer, len(stream) - 1, 10**6)) == 1
    with pytest.raises(DataError, match=r"the train shards in .* have"):
        dataloader.packed_sequences(paths, tokenizer, 10**4, 10**5)


@pytest.mark.parametrize(("texts", "tokens"), [(["a"], 2), ([], 0)])
def test_a_validation_shard_shorter_than_a_sequence_is_a_data_error(tokenizer, tmp_path, texts, tokens):
    dataset.write_shard(tmp_path / "shard_0.parquet", texts)
    with pytest.raises(DataError, match=rf"shard_0.parquet has {tokens} tokens.* 17: .*--max-seq-len"):
        dataloader.packed_sequences([tmp_path / "shard_0.parquet"], tokenizer, 16, 1000)


def test_validation_tokenizes_little_more_than_it_needs(tmp_path, tokenizer):
    """Of documents of 300,000 characters four at a time or in pieces, and no more than 64 of short ones."""
    watching = Watching(tokenizer)
    for name, texts, num_bytes in (("long", ["word " * 60_000] * 8, 10**5), ("short", ["a b"] * 130, 9)):
        dataset.write_shard(tmp_path / name, texts)
        documents, num_cut = dataloader.validation_documents(tmp_path / name, watching, num_bytes)
        assert (len(documents), num_cut) == (1 if name == "long" else 3, 0)
        assert dataloader.packed_sequences([tmp_path / name], watching, 4, 20).shape == (5, 5)
    assert [(len(lengths), max(lengths)) for lengths in watching.lengths] == [(4, 3e5), (10, 1e5), (64, 3), (64, 3)]


def test_of_a_document_far_longer_than_asked_only_the_beginning_is_read(tmp_path, tokenizer):
    watching = Watching(tokenizer)
    dataset.write_shard(tmp_path / "a", ["word " * 60_000] * 2)
    (ids,), num_cut = dataloader.validation_documents(tmp_path / "a", watching, 1000)
    assert (tokenizer.decode(ids), num_cut) == ("word " * 200, 1)
    assert max(itertools.chain.from_iterable(watching.lengths)) == 1000
