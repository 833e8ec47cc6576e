"""Bits per byte against hand-computed sums, at every batch size and rank count."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ALONE, make_model, make_shards, make_texts, on_every_rank

from nanotrain import dataloader, loss_eval
from nanotrain.dist import DistContext
from nanotrain.errors import DataError
from nanotrain.gpt import GPTConfig
from nanotrain.loss_eval import bits_per_byte, document_windows, packed_windows


class TableModel:
    """A model that is sure of its losses: `table[input, target]` nats."""

    def __init__(self, table):
        self.table = torch.tensor(table)

    def token_losses(self, inputs, targets, counted):
        return torch.where(counted, self.table[inputs, targets], 0.0)


@pytest.fixture(scope="module")
def case(tokenizer, tmp_path_factory):
    """A model, 13 validation sequences of 24 tokens, also as windows, and the bytes of each token."""
    folder = make_shards(tmp_path_factory.mktemp("validation"))
    sequences = dataloader.packed_sequences([folder / "shard_00002.parquet"], tokenizer, 24, 13 * 24)
    sequences[4, 7] = tokenizer.bos  # besides those between documents
    model = make_model(GPTConfig(320, 32, 2, 2, 2, 16), 0.5)
    for block in model.blocks:  # so that what comes before a token matters
        torch.nn.init.eye_(block.attention.o_proj.weight)
    windows, token_bytes = packed_windows(sequences), tokenizer.token_bytes()
    return SimpleNamespace(
        model=model, sequences=sequences, windows=windows, token_bytes=token_bytes, bos=tokenizer.bos
    )


def test_a_small_case_by_hand():
    token_bytes = torch.tensor([0, 1, 3, 2])
    table = [[9.0, 0.5, 9.0, 9.0], [9.0, 9.0, 1.5, 9.0], [math.nan, 9.0, 9.0, 0.25], [9.0, 9.0, 9.0, 9.0]]
    sequences = np.array([[0, 1, 2, 0], [1, 2, 3, 3]], dtype=np.int32)
    nats = (0.5 + 1.5) + (1.5 + 0.25 + 9.0)  # and not that of the special token
    size = (1 + 3) + (3 + 2 + 2)
    found = bits_per_byte(TableModel(table), packed_windows(sequences), token_bytes, ALONE, 1)
    assert found == pytest.approx(nats / math.log(2) / size, rel=1e-12)


def test_a_real_model_gives_the_definition(case):
    nats, size = 0.0, 0
    for sequence in case.sequences.tolist():
        logits = case.model.logits(torch.tensor([sequence[:-1]]))[0].double()
        for log_probabilities, target in zip(torch.log_softmax(logits, -1), sequence[1:], strict=True):
            if target != case.bos:
                nats -= log_probabilities[target].item()
                size += case.token_bytes[target].item()
    found = bits_per_byte(case.model, case.windows, case.token_bytes, ALONE, 4)
    assert found == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_text_without_bytes_is_an_error_and_not_infinity():
    windows = np.zeros((2, 2, 4), dtype=np.int32)
    with pytest.raises(DataError, match="--data-dir"):
        bits_per_byte(TableModel([[1.0]]), windows, torch.tensor([0]), ALONE, 1)


# ---- whole documents ----


@pytest.fixture(scope="module")
def documents(tokenizer):
    """Token ids of seven texts, the shortest of one token, the longest of several windows of 32."""
    texts = ["a", *make_texts(5, seed=9), " ".join(make_texts(3, seed=4))]
    return texts, [np.array(tokenizer.encode(text), dtype=np.int32) for text in texts]


@pytest.mark.parametrize("seq_len", [32, 7])
def test_documents_give_the_definition(case, documents, seq_len):
    """One token at a time: after BOS and all of its document before it in the first window, then after what a window
    that ends up to a half further on has of it.
    """
    texts, documents = documents
    nats, half = 0.0, seq_len // 2
    for ids in documents:
        for place, token in enumerate(ids.tolist()):
            end = seq_len if place < seq_len else min(seq_len + half * ((place - seq_len) // half + 1), len(ids))
            context = [case.bos, *ids[max(end - seq_len, 0) : place].tolist()]
            assert place < seq_len or len(context) > half
            logits = case.model.logits(torch.tensor([context]))[0, -1].double()
            nats -= torch.log_softmax(logits, -1)[token].item()
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    windows = document_windows(documents, case.bos, seq_len)
    assert bits_per_byte(case.model, windows, case.token_bytes, ALONE, 3) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (3, 8), (50, 2)])
def test_neither_the_number_of_ranks_nor_the_batch_size_changes_anything(case, documents, world_size, batch_size):
    windows, done = document_windows(documents[1], case.bos, 32), []
    arguments = case.model, windows, case.token_bytes
    alone = bits_per_byte(*arguments, ALONE, 100)
    found = on_every_rank(world_size, lambda rank: bits_per_byte(*arguments, rank, batch_size, done.append))
    assert found == [pytest.approx(alone, rel=1e-6)] * world_size
    assert sum(done) == 2 * len(windows)  # none is done twice: on_every_rank evaluates twice


def test_windows_count_every_token_once_and_overlap_by_half():
    documents = [np.array(ids, dtype=np.int32) for ids in ([2, 3, 4, 5, 6, 7, 8], [4], [])]
    windows = document_windows(documents, 1, 4)
    assert [window.tolist() for window in windows] == [
        [[1], [4]],
        [[1, 2, 3, 4], [2, 3, 4, 5]],
        [[1, 4, 5, 6], [1, 1, 6, 7]],
        [[1, 5, 6, 7], [1, 1, 1, 8]],
    ]
    assert {window.dtype for window in windows} == {np.dtype(np.int32)}


def test_validation_documents_are_the_first_ones_whole(tokenizer, tmp_path):
    folder = make_shards(tmp_path)
    texts = make_texts(40, seed=2)
    sizes = [len(text.encode()) for text in texts]
    for num_bytes, count in ((sizes[0], 1), (sizes[0] + 1, 2), (sum(sizes[:9]), 9), (10**9, 40)):
        found, _ = dataloader.validation_documents(folder / "shard_00002.parquet", tokenizer, num_bytes)
        assert [tokenizer.decode(ids) for ids in found] == texts[:count]


# ---- where the loss is ----


def stats_of(case, tokenizer, world_size, batch_size):
    """What every rank of several finds, what they share being put together by hand."""
    stats, objects = [], []
    for number in range(world_size):
        rank = DistContext(number, world_size, torch.device("cpu"), torch.float32, "test")
        vars(rank)["all_reduce_sum"] = lambda values: [1.0] * len(values)
        stats.append(loss_eval.TokenLossStats(tokenizer))
        bits_per_byte(case.model, case.windows, case.token_bytes, rank, batch_size, stats=stats[-1].add)
    for each in stats:
        each.result(SimpleNamespace(all_gather_objects=lambda value: objects.append(value) or [value]))
    results = [each.result(SimpleNamespace(all_gather_objects=lambda value: objects)) for each in stats]
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (16, 2)])
def test_the_texts_are_those_of_the_definition(case, tokenizer, world_size, batch_size):
    found = stats_of(case, tokenizer, world_size, batch_size)
    texts = {}  # {text: (bits per byte, bits of all its tokens)}
    for sequence in case.sequences.tolist():
        logits = case.model.logits(torch.tensor([sequence[:-1]]))[0].double()
        bits = (-torch.log_softmax(logits, -1)[range(24), sequence[1:]] / math.log(2)).tolist()
        for is_bos, group in itertools.groupby(zip(sequence[1:], bits, strict=True), lambda pair: pair[0] == case.bos):
            ids, costs = zip(*group, strict=True)
            if len(ids) >= 6 and not is_bos:
                size = sum(case.token_bytes[token].item() for token in ids)
                texts[tokenizer.decode(ids)] = (sum(costs) / size, sum(costs))
    ordered = sorted(texts, key=lambda text: texts[text][0])
    assert len(ordered) > 10
    for kind, expected in (("worst", ordered[::-1][:5]), ("best", ordered[:5])):
        assert [text["text"] for text in found["documents"][kind]] == expected
        for text in found["documents"][kind]:
            bpb, bits = texts[text["text"]]
            assert text["bpb"] == pytest.approx(bpb, rel=1e-5)
            assert "".join(piece for piece, _ in text["tokens"]) == text["text"]
            assert sum(cost for _, cost in text["tokens"]) == pytest.approx(bits, abs=0.02)


def test_tokens_that_are_parts_of_a_character_are_shown_as_the_character(tokenizer):
    ids = tokenizer.encode("a ☃ b")
    assert len(ids) > 5  # its bytes are tokens of their own
    stats = loss_eval.TokenLossStats(tokenizer)
    stats.add(torch.tensor([ids]), torch.full((1, len(ids)), math.log(2), dtype=torch.float64))
    (text,) = stats.result(ALONE)["documents"]["worst"]
    assert text["text"] == "a ☃ b"
    assert dict(text["tokens"])["☃"] >= 3
    assert sum(bits for _, bits in text["tokens"]) == len(ids)
    assert text["bpb"] == len(ids) / 7


def test_texts_with_losses_that_are_not_finite_are_left_out(tokenizer):
    stats, token = loss_eval.TokenLossStats(tokenizer), tokenizer.encode("a")[0]
    nats = math.log(2) * torch.tensor([[math.nan, math.inf, 1.1, 500.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    stats.add(torch.full((2, 4), token), nats)
    assert [text["bpb"] for text in stats.result(ALONE)["documents"]["worst"]] == [2.5]
