"""Bits per byte against hand-computed sums, at every batch size and rank count."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_shards

from nanotrain import dataloader
from nanotrain.gpt import GPT, GPTConfig
from nanotrain.loss_eval import bits_per_byte
from nanotrain.runtime import Runtime

ALONE = Runtime(0, 0, 1, torch.device("cpu"), torch.float32, "test")


class TableModel:
    """A model that is sure of its losses: `table[input, target]` nats."""

    def __init__(self, table):
        self.table = torch.tensor(table)

    def token_losses(self, inputs, targets):
        return self.table[inputs, targets]


class Rank(Runtime):
    """One rank of several, whose sums are handed over instead of reduced."""

    def sum(self, values):
        self.handed.append([float(value) for value in values])
        return self.totals or [1.0, 1.0]


def on_every_rank(world_size, *arguments):
    """What each rank returns, the sums of all of them being added by hand."""
    handed, totals, results = [], [], []
    for _ in range(2):  # first to learn what they hand over, then to give each the totals
        results.clear()
        for number in range(world_size):
            rank = Rank(number, number, world_size, torch.device("cpu"), torch.float32, "test")
            vars(rank).update(handed=handed, totals=totals)
            model, rows, token_bytes, batch_rows = arguments
            results.append(bits_per_byte(model, rows, token_bytes, rank, batch_rows))
        totals = totals or [sum(column) for column in zip(*handed, strict=True)]
    assert len(handed) == 2 * world_size, "every rank joins the sum once, also one without rows"
    return results


def make_model(vocab_size):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size, 32, 2, 2, 2, 16))
    model.to_empty(device="cpu")
    model.init_weights(3)
    with torch.no_grad():  # a fresh head may be zero
        model.head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(5))
    return model


@pytest.fixture(scope="module")
def case(tokenizer, tmp_path_factory):
    """A model, 13 validation rows of 24 tokens, and the bytes of each token."""
    folder = make_shards(tmp_path_factory.mktemp("validation"))
    rows = dataloader.validation_rows(folder / "shard_00002.parquet", tokenizer, 24, 13 * 24)
    rows[4, 7] = tokenizer.bos  # besides those between documents
    return SimpleNamespace(model=make_model(320), rows=rows, token_bytes=tokenizer.token_bytes(), bos=tokenizer.bos)


def by_definition(case):
    """From the model's logits, one row at a time, in float64."""
    nats, size = 0.0, 0
    for row in case.rows.tolist():
        logits = case.model.logits(torch.tensor([row[:-1]]))[0].double()
        for log_probabilities, target in zip(torch.log_softmax(logits, -1), row[1:], strict=True):
            if target != case.bos:
                nats -= log_probabilities[target].item()
                size += case.token_bytes[target].item()
    return nats / math.log(2) / size


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(case):
    model = make_model(320)
    with torch.no_grad():
        model.head.weight.zero_()
    targets = case.rows[:, 1:].ravel()
    counted = [token for token in targets.tolist() if token != case.bos]
    expected = math.log2(320) * len(counted) / sum(case.token_bytes[token].item() for token in counted)
    assert len(counted) < len(targets)
    assert bits_per_byte(model, case.rows, case.token_bytes, ALONE, 4) == pytest.approx(expected, rel=1e-6)


def test_a_small_case_by_hand():
    token_bytes = torch.tensor([0, 1, 3, 2])
    table = [[9.0, 0.5, 9.0, 9.0], [9.0, 9.0, 1.5, 9.0], [100.0, 9.0, 9.0, 0.25], [9.0, 9.0, 9.0, 9.0]]
    rows = np.array([[0, 1, 2, 0], [1, 2, 3, 3]], dtype=np.int32)
    nats = (0.5 + 1.5) + (1.5 + 0.25 + 9.0)  # and not the 100 of the special token
    size = (1 + 3) + (3 + 2 + 2)
    found = bits_per_byte(TableModel(table), rows, token_bytes, ALONE, 1)
    assert found == pytest.approx(nats / math.log(2) / size, rel=1e-12)


def test_special_tokens_are_in_neither_sum():
    token_bytes = torch.tensor([0, 2])
    plain = np.array([[1, 1, 1, 1, 1]], dtype=np.int32)
    special = np.array([[1, 1, 0, 0, 1]], dtype=np.int32)  # its other targets are the first and the last
    for cost in (0.0, 7.0, math.inf, math.nan):
        model = TableModel([[cost, 3.0], [cost, 3.0]])
        for rows in (plain, special):
            assert bits_per_byte(model, rows, token_bytes, ALONE, 1) == pytest.approx(3 / math.log(2) / 2, rel=1e-12)


def test_a_real_model_gives_the_definition(case):
    assert bits_per_byte(case.model, case.rows, case.token_bytes, ALONE, 4) == pytest.approx(
        by_definition(case), rel=1e-5
    )


@pytest.mark.parametrize("batch_rows", [2, 8, 100])
def test_the_batch_size_changes_nothing(case, batch_rows):
    one = bits_per_byte(case.model, case.rows, case.token_bytes, ALONE, 1)
    assert bits_per_byte(case.model, case.rows, case.token_bytes, ALONE, batch_rows) == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 8, 20])
@pytest.mark.parametrize("batch_rows", [1, 3])
def test_the_number_of_ranks_changes_nothing(case, world_size, batch_rows):
    alone = bits_per_byte(case.model, case.rows, case.token_bytes, ALONE, 8)
    found = on_every_rank(world_size, case.model, case.rows, case.token_bytes, batch_rows)
    assert found == [pytest.approx(alone, rel=1e-6)] * world_size


def test_one_row_less_is_noticed(case):
    whole = bits_per_byte(case.model, case.rows, case.token_bytes, ALONE, 8)
    assert bits_per_byte(case.model, case.rows[:-1], case.token_bytes, ALONE, 8) != pytest.approx(whole, rel=1e-6)


def test_progress_counts_every_row_once(case):
    done = []
    bits_per_byte(case.model, case.rows, case.token_bytes, ALONE, 5, done.append)
    assert done == [5, 5, 3]


def test_nothing_is_kept_for_gradients(case):
    seen = []

    class Watching:
        def token_losses(self, inputs, targets):
            seen.append(torch.is_grad_enabled())
            return case.model.token_losses(inputs, targets)

    bits_per_byte(Watching(), case.rows, case.token_bytes, ALONE, 8)
    assert seen == [False, False]
    assert torch.is_grad_enabled()
