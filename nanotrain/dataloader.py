"""Row groups -> documents -> tokens -> rows of T + 1 -> pinned buffers -> device, in an order that no process count
changes.

Units, lanes, rows: a unit is a row group of a train shard (or a slice of one, where there
are few). The endless sequence of units is epoch after epoch, each a permutation by hash. Lane l of L reads the units
at positions l, l + L, l + 2L, ... as one stream of BOS + document tokens. Row n of the run is the next T + 1 tokens of
lane n mod L, which then advances by T, so that the last target of a row is the first input of that lane's next one.
Rank r of W trains on the rows n = r mod W. Nothing here depends on W but that choice, and the state between two
batches is n and three integers per lane.

    N rows of a batch   T tokens of a row   L lanes   W ranks
"""

import contextlib
import hashlib
import itertools
import math
import queue
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from nanotrain.dataset import read_texts, row_groups
from nanotrain.errors import DataError

MAX_PIECE_CHARS = (
    100_000  # longer documents are tokenized in pieces, which bounds memory; the cut is part of the data order
)
AHEAD_ROWS = 16  # of each lane that are tokenized at a time
CHARS_PER_TOKEN = 3  # a first guess of how much text to tokenize; a wrong one costs time, never changes a row


@dataclass(frozen=True)
class Unit:
    """Rows `start` to `stop` of one row group, the name by which the unit is shuffled, and the stamp of its shard."""

    name: str
    path: object
    group: int
    start: int
    stop: int
    stamp: tuple


def units_of(shards, lanes):
    """The units of a tuple of train shards: their row groups, each cut into equal slices where there are fewer than 2
    * lanes.
    """
    groups = [(shard, group, rows) for shard in shards for group, rows in enumerate(shard.group_rows) if rows]
    slices = math.ceil(2 * lanes / max(len(groups), 1))
    units = []
    for shard, group, rows in groups:
        edges = [rows * part // slices for part in range(slices + 1)]
        for start, stop in itertools.pairwise(edges):
            if start < stop:
                units.append(Unit(f"{shard.name}:{group}:{start}", shard.path, group, start, stop, shard.stamp))
    return units


class UnitSequence:
    """The endless sequence of units: epoch after epoch, each sorted by SHA-256 of (seed, epoch, unit)."""

    def __init__(self, units, seed):
        self.units, self.seed, self._orders = units, seed, {}
        self.empty = set()  # the units that were found to hold no text
        self.kept = {}  # the row groups decoded last, of which other lanes read other slices

    def __getitem__(self, position):
        """The unit at `position` of the sequence."""
        epoch, index = divmod(position, len(self.units))
        if epoch not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if known >= epoch - 2}
            self._orders[epoch] = sorted(range(len(self.units)), key=lambda unit: self._key(epoch, unit))
        return self.units[self._orders[epoch][index]]

    def _key(self, epoch, unit):
        return hashlib.sha256(f"{self.seed} {epoch} {self.units[unit].name}".encode()).digest()


@dataclass
class Part:
    """Tokens of a lane that are not yet used, an array (n,) int32, and where the first of them is."""

    position: int  # of its unit in the sequence
    piece: int
    offset: int  # in its piece
    tokens: np.ndarray


class Lane:
    """One stream of tokens with a position in it: (sequence position, piece of text, token offset) of the first token
    not yet used.

    A piece is a document, or a part of a very long one; it counts within its unit.
    """

    def __init__(self, sequence, lane, lanes, state=None):
        self.sequence, self.lanes = sequence, lanes
        self.position, self.piece, self.skip = state or (lane, 0, 0)
        self.pieces = None  # the texts of the unit at `position`, once it is read
        self.taken = deque()  # (sequence position, piece) of what is being tokenized
        self.parts = deque()  # what is tokenized and not yet used
        self.available = 0
        self.encoding = None  # the Future of the arrays of what is in `taken`, if any
        self.skipped_documents = 0

    def take_texts(self, num_tokens):
        """The next pieces as [(text, whether it begins a document)], one at least, about `num_tokens` tokens."""
        taken, chars = [], 0
        while not taken or chars < num_tokens * CHARS_PER_TOKEN:
            if self.pieces is None:
                self.pieces = self._read()
            if self.piece >= len(self.pieces):
                self.position, self.piece, self.pieces = self.position + self.lanes, 0, None
                continue
            text, first = self.pieces[self.piece]
            taken.append((text, first))
            self.taken.append((self.position, self.piece))
            chars += len(text)
            self.piece += 1
        return taken

    def _read(self):
        unit, empty = self.sequence[self.position], self.sequence.empty
        pieces = []
        place = unit.path, unit.group, unit.start, unit.stop, unit.stamp, self.sequence.kept
        for text in [] if unit in empty else read_texts(*place):
            if not text:
                self.skipped_documents += 1
                continue
            for begin in range(0, len(text), MAX_PIECE_CHARS):
                pieces.append((text[begin : begin + MAX_PIECE_CHARS], begin == 0))
        if not pieces:
            empty.add(unit)
            if len(empty) == len(self.sequence.units):
                raise DataError("the train shards hold no text: every document is null or empty")
        return pieces

    def append(self, tokens):
        """Add the tokens of the next of the pieces that `take_texts` gave."""
        position, piece = self.taken.popleft()
        offset, self.skip = self.skip, 0  # only the first piece after a resume is begun in its middle
        tokens = tokens[offset:]
        if len(tokens):
            self.parts.append(Part(position, piece, offset, tokens))
            self.available += len(tokens)

    def fill(self, row):
        """Copy the next T + 1 tokens into `row` (T + 1,)."""
        filled = 0
        for part in self.parts:
            tokens = part.tokens[: len(row) - filled]
            row[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
            if filled == len(row):
                return
        raise AssertionError(f"lane has {self.available} tokens of {len(row)}")

    def advance(self, count):
        """Step over `count` tokens; at least one must stay."""
        self.available -= count
        while count:
            front = self.parts[0]
            used = min(count, len(front.tokens))
            front.offset += used
            front.tokens = front.tokens[used:]
            count -= used
            if not len(front.tokens):
                self.parts.popleft()

    def state(self):
        """(sequence position, piece, token offset) of the first token not yet used."""
        if self.parts:
            return self.parts[0].position, self.parts[0].piece, self.parts[0].offset
        return *(self.taken[0] if self.taken else (self.position, self.piece)), self.skip


@dataclass(frozen=True)
class Batch:
    """One micro-batch of this rank: inputs and targets (N, T) int64 on the device, and where it stands in the run."""

    inputs: torch.Tensor
    targets: torch.Tensor
    row_hash: int  # the sum mod 2^64 of the row hashes, see `row_hash`
    state: dict  # of the loader before this batch: what resumes with it


def row_hash(number, row):
    """An 8-byte BLAKE2b of row `number` of the run, as an int: over the number (int64) and the tokens (int32),
    little-endian.
    """
    digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8)
    digest.update(np.ascontiguousarray(row, dtype="<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")


class RowReader:
    """The rows of one rank as arrays, in the order of the run, with the exact state between any two batches."""

    def __init__(self, units, tokenizer, seq_len, lanes, seed, rank=0, world_size=1, state=None, threads=1):
        """state: what `state()` gave, from any rank count (the union of all ranks' lanes), or None for the start of the
        run. threads: how many tokenize ahead.
        """
        if not units:
            raise DataError("the train shards hold no rows")
        self.tokenizer, self.seq_len, self.num_lanes = tokenizer, seq_len, lanes
        self.rank, self.world_size = rank, world_size
        self.next_row = state["row"] if state else 0
        sequence = UnitSequence(units, seed)
        self.num_units = len(units)
        self._ahead = AHEAD_ROWS * seq_len
        self._begun = {}  # the lanes that were read from so far, in order
        self._workers = ThreadPoolExecutor(threads)
        shared = math.gcd(world_size, lanes)
        self._counts_documents = rank < shared  # the first of the ranks that read these lanes
        self.lanes = {
            lane: Lane(sequence, lane, lanes, tuple(state["lanes"][str(lane)]) if state else None)
            for lane in range(rank % shared, lanes, shared)
        }

    def fill(self, rows):
        """Fill `rows` (N, T + 1) with this rank's rows of the next N * W; returns the sum of their hashes."""
        count, total = len(rows) * self.world_size, 0
        numbers = [n for n in range(self.next_row, self.next_row + count) if n % self.num_lanes in self.lanes]
        self._tokenize(numbers)
        for number in numbers:
            lane = self.lanes[number % self.num_lanes]
            if number % self.world_size == self.rank:
                row = rows[(number - self.next_row) // self.world_size]
                lane.fill(row)
                total += row_hash(number, row)
            lane.advance(self.seq_len)
        self.next_row += count
        return total % 2**64

    def _tokenize(self, numbers):
        """Have enough tokens in every lane for the rows `numbers`; the worker threads tokenize ahead meanwhile."""
        needed = {}
        for number in numbers:
            lane = self.lanes[number % self.num_lanes]
            needed[lane] = needed.get(lane, 1) + self.seq_len  # the last target stays: the first input of the next row
        for lane, count in needed.items():
            if lane not in self._begun:
                self._begun[lane] = True
                self._submit(lane, count)  # the first batch should come soon
        for lane, count in needed.items():
            while lane.available < count:
                if lane.encoding is None:
                    self._submit(lane, max(count, self._ahead))
                self._collect(lane)
        for lane in self._begun:
            if lane.encoding is None and lane.available < self._ahead // 2:
                self._submit(lane, self._ahead)

    def _submit(self, lane, num_tokens):
        """Begin to tokenize the next texts of `lane`, so that it has about `num_tokens` tokens."""
        lane.encoding = self._workers.submit(self._encode, lane.take_texts(num_tokens - lane.available))

    def _encode(self, taken):
        """The token arrays of what `Lane.take_texts` gave. Runs in a worker thread."""
        encoded = self.tokenizer.encode_batch([text for text, _ in taken])
        return [
            np.array([self.tokenizer.bos, *ids] if first else ids, dtype=np.int32)
            for (_, first), ids in zip(taken, encoded, strict=True)
        ]

    def _collect(self, lane):
        """Wait for what is being tokenized of `lane`, and give it its tokens."""
        encoding, lane.encoding = lane.encoding, None
        for tokens in encoding.result():
            lane.append(tokens)

    def state(self):
        """The state between two batches as plain JSON: the row counter and, for each lane of this rank, where it
        stands.
        """
        return {"row": self.next_row, "lanes": {str(number): list(lane.state()) for number, lane in self.lanes.items()}}

    def epoch(self, state):
        """How many times the data had been read at `state`, in whole epochs (of the lane that was furthest)."""
        return max(position for position, _, _ in state["lanes"].values()) // self.num_units

    @property
    def skipped_documents(self):
        """How many null or empty documents were left out so far (of what is tokenized), told by one of the ranks that
        read the same lanes; the others say 0.
        """
        return sum(lane.skipped_documents for lane in self.lanes.values()) if self._counts_documents else 0


class DataLoader:
    """The batches of one rank on its device, one kept ready by a background thread. Use as a context manager and an
    iterator.

    Two slots (pinned for CUDA) are filled in turn; a slot is filled again only after the copy out of it has ended.
    """

    def __init__(self, reader, batch_rows, device):
        self.reader, self.device = reader, device
        shape = (batch_rows, reader.seq_len + 1)
        pinned = device.type == "cuda"
        slots = [torch.empty(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._free, self._ready, self._stopped = queue.Queue(), queue.Queue(maxsize=1), threading.Event()
        for slot in slots:
            self._free.put((slot, None))
        self._thread = threading.Thread(target=self._work, name="nanotrain-data", daemon=True)
        self._thread.start()

    def _work(self):
        try:
            while True:
                slot, copied = self._free.get()
                if slot is None:
                    return
                if copied is not None:
                    copied.synchronize()
                state = self.reader.state()
                self._put((slot, self.reader.fill(slot.numpy()), state, None))
        except Exception as error:  # it must reach the training thread, whatever it is
            self._put((None, 0, None, error))

    def _put(self, item):
        while not self._stopped.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self):
        return self

    def __next__(self):
        slot, total, state, error = self._ready.get()
        if error is not None:
            self._ready.put((slot, total, state, error))  # for whoever asks again
            raise error
        rows = slot.to(self.device, non_blocking=True, copy=True)
        copied = None
        if self.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self._free.put((slot, copied))
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), total, state)

    def close(self):
        """End the thread."""
        self._stopped.set()
        self._free.put((None, None))
        with contextlib.suppress(queue.Empty):
            self._ready.get_nowait()  # the thread may be waiting to put the next one
        self._thread.join(timeout=10)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class LookAhead:
    """The batches, with the next one already here: its state is where a resume begins.

    After an error the last batch comes again, so that this rank takes part in the step in which all ranks learn of it.
    """

    def __init__(self, loader):
        self.loader, self.error = loader, None
        self.next = next(loader)

    def take(self):
        """The batch to train on now."""
        now = self.next
        try:
            self.next = next(self.loader)
        except DataError as error:
            self.error = error
        return now

    def raise_error(self):
        """Raise what went wrong on this rank, if anything did."""
        if self.error:
            raise self.error


def packed_rows(paths, tokenizer, seq_len, num_tokens):
    """(N, T + 1) int32: the first num_tokens // T rows of shards read in order, fewer if they end, to evaluate on. The
    same for every rank count.

    Raises DataError if the shards hold less than one row.
    """
    stream, total, goal = [], 0, num_tokens // seq_len * seq_len + 1
    batches = _few_at_a_time(paths)
    while total < goal and (some := next(batches, None)):
        for ids in tokenizer.encode_batch(some):
            stream.append(np.array([tokenizer.bos, *ids], dtype=np.int32))
            total += len(stream[-1])
    count = min((total - 1) // seq_len, num_tokens // seq_len)
    if count < 1:
        holds = f"{paths[0]} holds" if len(paths) == 1 else f"the {len(paths)} train shards in {paths[0].parent} hold"
        raise DataError(
            f"{holds} {total} tokens, less than one row of {seq_len + 1}: train with a shorter --max-seq-len"
        )
    tokens = np.concatenate(stream)
    starts = np.arange(count)[:, None] * seq_len
    return tokens[starts + np.arange(seq_len + 1)]


def _few_at_a_time(paths):
    """Yield lists of the texts of shards, of 64 or of a million characters: a row group, or 64 texts, may be far more
    than is needed.
    """
    some, chars = [], 0
    for text in itertools.chain.from_iterable(row_groups(paths)):
        some.append(text)
        chars += len(text)
        if len(some) == 64 or chars >= 1_000_000:
            yield some
            some, chars = [], 0
    if some:
        yield some


def validation_documents(path, tokenizer, num_bytes):
    """The first documents of a shard, whole, until they have at least `num_bytes` UTF-8 bytes: a list of (n,) int32
    arrays without BOS. The same for every rank count.

    Raises DataError if there is none.
    """
    found, total = [], 0
    batches = _few_at_a_time([path])
    while total < num_bytes and (some := next(batches, None)):
        for text, ids in zip(some, tokenizer.encode_batch(some), strict=True):
            if total < num_bytes:
                found.append(np.array(ids, dtype=np.int32))
                total += len(text.encode("utf-8"))
    if not found:
        raise DataError(f"{path} holds no text: prepare this data set again")
    return found
