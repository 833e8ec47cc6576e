"""Parquet shards -> token sequences -> batches on the device, in an order independent of the number of processes.

A *slice* is a row group of a train shard, or part of one if the data set has few row groups. Slices are read epoch
after epoch, each epoch in a new pseudorandom order. A *stream* is an endless sequence of tokens: stream s of S
concatenates the documents of the slices at positions s, s + S, s + 2S, ... of that order, each document preceded by
BOS. A *sequence* is one training example of T + 1 tokens, inputs and targets shifted by one. Sequence n of the run is
taken from stream n mod S, which then advances by T tokens: the last target of a sequence is the first input of the
next one from the same stream.

Rank r of W trains on the sequences n with n mod W = r; nothing else depends on W. The state between two batches is n
and three integers per stream.

    N sequences in a batch   T tokens in a sequence   S streams   W ranks
"""

import hashlib
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanotrain import paths
from nanotrain.dataset import Shard, Shards, fingerprint, hash_of, open_shards, read_shards, read_texts
from nanotrain.dist import DistContext
from nanotrain.errors import DataError, UserError
from nanotrain.tokenizer import BPETokenizer

# Longer documents are tokenized in pieces, which bounds memory. Changing this changes the data order.
MAX_PIECE_CHARS = 100_000
ESTIMATE_CHARS = 20_000  # characters of each of 50 texts used to estimate the number of tokens
PREFETCH_SEQUENCES = 4  # sequences tokenized at a time per stream
# More streams let more ranks share the work without tokenizing a text twice, but need more memory.
NUM_STREAMS = (192, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
HELD_BYTES = 256e6  # limit for texts that are read but not yet tokenized, all streams together
WINDOW_BYTES, MOST_WINDOWS = 1e6, 8  # part of a row group read at a time; each decodes those before it again
CHARS_PER_TOKEN = 3  # estimate of how much text to tokenize; it affects speed but never a sequence


@dataclass(frozen=True)
class TrainData:
    """Tokenizer and shards of a run."""

    tokenizer: BPETokenizer
    shards: Shards
    fingerprint: dict  # name, size and SHA-256 of every shard

    @classmethod
    def open(cls, data_dir: str, tokenizer_dir: str, dist: DistContext) -> "TrainData":
        """Open both folders ("": the defaults) on every rank. Raises DataError; see `open_shards`, `check_nodes`."""
        tokenizer = BPETokenizer.load(paths.tokenizer_dir(tokenizer_dir))
        shards = dist.on_all_ranks(lambda: open_shards(paths.data_dir(data_dir)))
        check_nodes(dist, tokenizer, shards)
        return cls(tokenizer, shards, dist.on_rank0(lambda: fingerprint(shards)))

    def estimated_tokens(self) -> float:
        """Approximate number of tokens in the train shards, extrapolated from the first 50 texts."""
        groups = (
            (shard.path, group) for shard in self.shards.train for group, rows in enumerate(shard.group_rows) if rows
        )
        texts = [text[:ESTIMATE_CHARS] for text in itertools.islice(filter(None, read_texts(*next(groups))), 50)]
        num_tokens = sum(map(len, self.tokenizer.encode_batch(texts)))
        num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
        return sum(shard.text_bytes for shard in self.shards.train) / (num_bytes / num_tokens if num_tokens else 1)


def check_nodes(dist: DistContext, tokenizer: BPETokenizer, shards: Shards) -> None:
    """Raise DataError on all ranks if tokenizer or shards on any node differ from those of rank 0."""
    opened = [[shard.name, shard.text_bytes, shard.group_rows] for shard in (*shards.train, shards.validation)]
    found = dist.all_gather_objects([tokenizer.sha256(), hash_of(opened)])
    for rank, here in enumerate(found):
        if here != found[0]:
            what = "tokenizers" if here[0] != found[0][0] else f"shards in {shards.folder}"
            raise DataError(f"ranks 0 and {rank} have different {what}: copy the same files to every node")


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of one row group, read `window_rows` at a time."""

    shard: Shard
    group: int
    start: int
    stop: int
    window_rows: int


def choose_num_streams(shards: Sequence[Shard]) -> int:
    """Number of streams for train shards: the largest of NUM_STREAMS that keeps texts in memory within HELD_BYTES."""
    windows = sum(min(rows, MOST_WINDOWS) for shard in shards for rows in shard.group_rows)
    held = max(WINDOW_BYTES, sum(shard.text_bytes for shard in shards) / max(windows, 1))
    return next((count for count in NUM_STREAMS if count * held <= HELD_BYTES), 1)


def slices_of(shards: Sequence[Shard], num_streams: int) -> list[Slice]:
    """The slices of train shards: whole row groups if there are at least 2 * num_streams of them, else equal parts."""
    groups = [(shard, group, rows) for shard in shards for group, rows in enumerate(shard.group_rows) if rows]
    parts = math.ceil(2 * num_streams / max(len(groups), 1))
    slices = []
    for shard, group, rows in groups:
        windows = min(math.ceil(shard.text_bytes * rows / sum(shard.group_rows) / WINDOW_BYTES), MOST_WINDOWS)
        edges = [rows * part // parts for part in range(parts + 1)]
        for start, stop in itertools.pairwise(edges):
            if start < stop:
                slices.append(Slice(shard, group, start, stop, rows // max(windows, 1) + 1))
    return slices


class SliceOrder:
    """The endless order of slices: epoch after epoch, each sorted by SHA-256 of (seed, epoch, slice)."""

    def __init__(self, slices: list[Slice], seed: int):
        self.slices, self.seed, self._orders = slices, seed, {}
        self.empty = set()  # slices found to contain no text

    def __getitem__(self, position: int) -> Slice:
        """The slice at `position`."""
        epoch, index = divmod(position, len(self.slices))
        if epoch not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if known >= epoch - 2}
            self._orders[epoch] = sorted(range(len(self.slices)), key=lambda number: self._key(epoch, number))
        return self.slices[self._orders[epoch][index]]

    def _key(self, epoch, number):
        part = self.slices[number]
        return hashlib.sha256(f"{self.seed} {epoch} {part.shard.name}:{part.group}:{part.start}".encode()).digest()


@dataclass
class Part:
    """Unused tokens of a stream, an array (n,) int32, and the location of the first one."""

    position: int  # position of the slice in the SliceOrder
    piece: int  # index of the piece in the slice
    offset: int  # index of the token in the piece
    tokens: np.ndarray


class Stream:
    """An endless stream of tokens. A piece is a document or a part of a very long one, numbered within its slice."""

    def __init__(self, order: SliceOrder, number: int, num_streams: int, state: tuple | None = None):
        self.order, self.num_streams = order, num_streams
        self.position, self.piece, self.skip = state or (number, 0, 0)
        self.pieces = None  # iterator over the texts of the slice at `position`, from `piece` on
        self.taken = deque()  # (slice position, piece) of the texts being tokenized
        self.parts = deque()  # tokenized and unused
        self.available = 0
        self.encoding = None  # Future of the token arrays for `taken`, if any

    def take_texts(self, num_tokens: int) -> list[tuple[str, bool]]:
        """The next pieces, at least one and about `num_tokens` tokens, as (text, whether it starts a document)."""
        taken, chars = [], 0
        while not taken or chars < num_tokens * CHARS_PER_TOKEN:
            if self.pieces is None:
                self.pieces = itertools.islice(self._read(), self.piece, None)
            text, first = next(self.pieces, ("", False))
            if not text:
                self.position, self.piece, self.pieces = self.position + self.num_streams, 0, None
                continue
            taken.append((text, first))
            self.taken.append((self.position, self.piece))
            chars += len(text)
            self.piece += 1
        return taken

    def _read(self):
        """Yield the pieces of the slice at `position`."""
        current, empty, is_empty = self.order[self.position], self.order.empty, True
        if len(empty) == len(self.order.slices):
            raise DataError("the train shards have no text: every document is null or empty")
        if current in empty:
            return
        shard = current.shard
        for start in range(current.start, current.stop, current.window_rows):
            stop = min(start + current.window_rows, current.stop)
            texts = list(read_texts(shard.path, current.group, start, stop, shard.modified_ns))
            for text in filter(None, texts):
                is_empty = False
                yield from _pieces(text)
        if is_empty:
            empty.add(current)

    def append(self, tokens: np.ndarray) -> None:
        """Add the tokens of the next piece returned by `take_texts`."""
        position, piece = self.taken.popleft()
        offset, self.skip = self.skip, 0  # only the first piece after a resume starts in its middle
        tokens = tokens[offset:]
        if len(tokens):
            self.parts.append(Part(position, piece, offset, tokens))
            self.available += len(tokens)

    def fill(self, sequence: np.ndarray) -> None:
        """Copy the next T + 1 tokens into `sequence` (T + 1,)."""
        assert self.available >= len(sequence)
        sequence[:] = np.concatenate([part.tokens for part in self.parts])[: len(sequence)]

    def advance(self, count: int) -> None:
        """Skip `count` tokens; at least one must remain."""
        self.available -= count
        while count:
            front = self.parts[0]
            used = min(count, len(front.tokens))
            front.offset += used
            front.tokens = front.tokens[used:]
            count -= used
            if not len(front.tokens):
                self.parts.popleft()

    def state(self) -> tuple[int, int, int]:
        """(slice position, piece, token offset) of the first unused token."""
        if self.parts:
            return self.parts[0].position, self.parts[0].piece, self.parts[0].offset
        return *(self.taken[0] if self.taken else (self.position, self.piece)), self.skip


@dataclass(frozen=True)
class Batch:
    """One micro-batch of this rank: inputs and targets (N, T) int64 on the device, hash and loader state."""

    inputs: torch.Tensor
    targets: torch.Tensor
    sequence_hash: int  # sum of `sequence_hash` over the sequences, mod 2^64
    state: dict  # loader state before this batch; resuming from it yields this batch again


def sequence_hash(number: int, sequence: np.ndarray) -> int:
    """8-byte BLAKE2b over the number (int64) and tokens (int32) of a sequence, little-endian."""
    digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8)
    digest.update(np.ascontiguousarray(sequence, dtype="<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")


class SequenceReader:
    """The sequences of one rank as arrays, in the order of the run, with an exact state between any two batches."""

    def __init__(
        self,
        slices: list[Slice],
        tokenizer: BPETokenizer,
        seq_len: int,
        num_streams: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        state: dict | None = None,
        threads: int = 1,
    ):
        """state: the merged `state()` of any number of ranks, or None. threads: number of tokenizer threads."""
        self.tokenizer, self.seq_len, self.num_streams = tokenizer, seq_len, num_streams
        self.rank, self.world_size = rank, world_size
        self.next_sequence = state["next_sequence"] if state else 0
        order = SliceOrder(slices, seed)
        self.num_slices = len(slices)
        self._prefetch_tokens = PREFETCH_SEQUENCES * seq_len
        self._workers = ThreadPoolExecutor(threads)
        shared = math.gcd(world_size, num_streams)
        self.streams = {
            number: Stream(order, number, num_streams, tuple(state["streams"][str(number)]) if state else None)
            for number in range(rank % shared, num_streams, shared)
        }

    def fill(self, sequences: np.ndarray) -> int:
        """Fill `sequences` (N, T + 1) with this rank's share of the next N * W; return the sum of its hashes."""
        count, total = len(sequences) * self.world_size, 0
        following = range(self.next_sequence, self.next_sequence + count)
        numbers = [number for number in following if number % self.num_streams in self.streams]
        needed = Counter(self.streams[number % self.num_streams] for number in numbers)
        self._tokenize(needed)
        for number in numbers:
            stream = self.streams[number % self.num_streams]
            if number % self.world_size == self.rank:
                sequence = sequences[(number - self.next_sequence) // self.world_size]
                stream.fill(sequence)
                total += sequence_hash(number, sequence)
            stream.advance(self.seq_len)
        for stream in needed:
            if stream.encoding is None and stream.available < self._prefetch_tokens // 2:
                self._submit(stream, self._prefetch_tokens)
        self.next_sequence += count
        return total % 2**64

    def _tokenize(self, needed):
        """Make enough tokens available for {stream: number of sequences}."""
        # + 1: the last target stays in the stream as the first input of the next sequence
        needed = {stream: count * self.seq_len + 1 for stream, count in needed.items()}
        for stream, count in needed.items():
            if stream.encoding is None and stream.available < count:
                self._submit(stream, count)  # submit all streams before waiting for any
        for stream, count in needed.items():
            while stream.available < count:
                if stream.encoding is None:
                    self._submit(stream, count)
                encoding, stream.encoding = stream.encoding, None
                for tokens in encoding.result():
                    stream.append(tokens)

    def _submit(self, stream, num_tokens):
        """Start tokenizing the next texts of `stream`, enough for about `num_tokens` tokens in total."""
        stream.encoding = self._workers.submit(self._encode, stream.take_texts(num_tokens - stream.available))

    def _encode(self, taken):
        """The token arrays for the result of `Stream.take_texts`. Runs in a worker thread."""
        encoded = self.tokenizer.encode_batch([text for text, _ in taken])
        return [
            np.array([self.tokenizer.bos, *ids] if first else ids, dtype=np.int32)
            for (_, first), ids in zip(taken, encoded, strict=True)
        ]

    def state(self) -> dict:
        """JSON-like state between two batches: next sequence number and positions of this rank's streams."""
        positions = {str(number): list(stream.state()) for number, stream in self.streams.items()}
        return {"next_sequence": self.next_sequence, "streams": positions}


class DataLoader(Iterator[Batch], AbstractContextManager):
    """Iterator over the batches of one rank on its device; a thread prepares the next two."""

    def __init__(self, reader: SequenceReader, batch_size: int, device: torch.device):
        self.reader, self.device = reader, device
        self._shape = (batch_size, reader.seq_len + 1)
        self._worker = ThreadPoolExecutor(1, "nanotrain-data")
        self._filled = deque(self._worker.submit(self._fill) for _ in range(2))

    def _fill(self):
        # torch reuses a pinned buffer only after the copy from it has finished
        buffer = torch.empty(self._shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        state = self.reader.state()
        return buffer, self.reader.fill(buffer.numpy()), state

    def __next__(self) -> Batch:
        buffer, total, state = self._filled[0].result()  # an error is raised again at every call
        self._filled.popleft()
        self._filled.append(self._worker.submit(self._fill))
        sequences = buffer.to(self.device, non_blocking=True)
        return Batch(sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous(), total, state)

    def __exit__(self, *error):
        self._worker.shutdown(cancel_futures=True)


class Prefetcher:
    """Batches of a loader, fetched one ahead: a run resumes from the state of `next`.
    After an error, `take` repeats the last batch so that this rank joins the step in which all ranks learn of it.
    """

    def __init__(self, loader: DataLoader):
        self.loader, self.error = loader, None
        self.next = next(loader)

    def take(self) -> Batch:
        """Return the next batch."""
        now = self.next
        try:
            self.next = next(self.loader)
        except DataError as error:
            self.error = error
        return now

    def state(self, dist: DistContext) -> dict:
        """Loader state before the next batch, with the streams of all ranks. A collective operation."""
        streams = {}
        for part in dist.all_gather_objects(self.next.state["streams"]):
            streams |= part
        return {**self.next.state, "streams": streams}

    def epoch(self, batch: Batch) -> int:
        """Number of complete epochs before `batch`, in the most advanced stream."""
        return max(position for position, _, _ in batch.state["streams"].values()) // self.loader.reader.num_slices


def packed_sequences(paths: Sequence[Path], tokenizer: BPETokenizer, seq_len: int, num_tokens: int) -> np.ndarray:
    """The first num_tokens // T sequences of shards read in order, (N, T + 1) int32, or all if there are fewer. Long
    documents are tokenized in pieces, as in training. Raises UserError if `num_tokens` is less than one sequence,
    DataError if the shards hold less.
    """
    if num_tokens < seq_len:
        raise UserError(f"--eval-tokens={num_tokens}: must be at least one sequence of {seq_len} tokens")
    parts, total, most = [], 0, num_tokens // seq_len
    for (_, first), ids in _encoded(itertools.chain.from_iterable(map(_pieces, read_shards(paths))), tokenizer):
        parts.append(np.array([tokenizer.bos] * first + ids, dtype=np.int32))
        total += len(parts[-1])
        if total > most * seq_len:
            break
    count = min((total - 1) // seq_len, most)
    if count < 1:
        have = f"{paths[0]} has" if len(paths) == 1 else f"the train shards in {paths[0].parent} have"
        raise DataError(f"{have} {total} tokens, one sequence needs {seq_len + 1}: train with a shorter --max-seq-len")
    starts = np.arange(count)[:, None] * seq_len
    return np.concatenate(parts)[starts + np.arange(seq_len + 1)]


def validation_documents(path: Path, tokenizer: BPETokenizer, num_bytes: int) -> tuple[list[np.ndarray], int]:
    """(documents, number of truncated ones): the first documents of a shard, with at least `num_bytes` UTF-8 bytes in
    total, as (n,) int32 arrays without BOS. Those over 4 * `num_bytes` characters are cut to `num_bytes` characters.
    """
    found, total, num_cut = [], 0, 0
    texts = ((text[:num_bytes], True) if len(text) > 4 * num_bytes else (text, False) for text in read_shards([path]))
    for (text, is_cut), ids in _encoded(texts, tokenizer):
        found.append(np.array(ids, dtype=np.int32))
        num_cut += is_cut
        total += len(text.encode("utf-8"))
        if total >= num_bytes:
            break
    if not found:
        raise DataError(f"{path} has no text: prepare this data set again")
    return found, num_cut


def _pieces(text):
    """Yield (piece, whether it is the first) for each piece of a document."""
    for begin in range(0, len(text), MAX_PIECE_CHARS):
        yield text[begin : begin + MAX_PIECE_CHARS], begin == 0


def _encoded(pieces, tokenizer):
    """Yield ((text, anything), ids of the text) for each of `pieces`, tokenized in small batches."""
    some = []
    for piece in pieces:
        some.append(piece)
        if len(some) == 64 or sum(len(text) for text, _ in some) >= 1_000_000:
            yield from zip(some, tokenizer.encode_batch([text for text, _ in some]), strict=True)
            some = []
    yield from zip(some, tokenizer.encode_batch([text for text, _ in some]), strict=True)
