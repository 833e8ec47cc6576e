"""The start from pairs: on text whose law is known, the model that it gives must predict nearly as well as that law."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanotrain import loss, spectral

VOCAB = 24


def chain(seed=0):
    """(V, V) transition matrix with a few likely successors of each token, and unequal frequencies."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(VOCAB, VOCAB, generator=generator) ** 8 * torch.arange(1, VOCAB + 1)
    return weights / weights.sum(1, keepdim=True)


def draw(matrix, rows=400, length=400, seed=1):
    """(rows, length) int64 of the Markov chain."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    for t in range(1, length):
        tokens[:, t] = torch.multinomial(matrix[tokens[:, t - 1]], 1, generator=generator).squeeze(1)
    return tokens


def start(rows, width, seed=0):
    return spectral.start(rows, VOCAB, width, torch.Generator().manual_seed(seed))


def nats(embedding, head, rows):
    """Mean loss of the bigram model on the pairs of `rows`, as the model computes it before any layer has learnt."""
    hidden = F.rms_norm(embedding, embedding.shape[1:])[rows[:, :-1].flatten()]
    return loss.token_losses(hidden, head, rows[:, 1:].flatten()).mean().item()


def entropies(rows):
    """(of a token alone, of a token given the one before it): what the two best tables reach, in nats."""
    counts = torch.zeros(VOCAB, VOCAB).index_put_(
        (rows[:, :-1].flatten(), rows[:, 1:].flatten()), torch.ones(()), accumulate=True
    )
    total, single = counts.sum(), counts.sum(0)
    alone = -(single * (single / total).log()).sum() / total
    given = -(counts * (counts / counts.sum(1, keepdim=True)).clamp(min=1e-30).log()).sum() / total
    return alone.item(), given.item()


def assert_predicts(rows, text, width, share):
    """The start from `rows` wins on `text` at least `share` of what the best table of pairs wins over frequencies."""
    alone, given = entropies(text)
    assert alone - nats(*start(rows, width), text) > share * (alone - given)


@pytest.mark.parametrize(("width", "share"), [(8, 0.55), (16, 0.85), (VOCAB + 1, 0.95), (40, 0.95)])
def test_the_start_predicts_nearly_as_well_as_the_best_table_of_pairs(width, share):
    matrix = chain()
    assert_predicts(draw(matrix), draw(matrix, 50, seed=2), width, share)


def test_the_check_notices_pairs_that_say_nothing():
    matrix = chain()
    rows = draw(matrix)
    shuffled = rows.flatten()[torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(0))].view_as(rows)
    with pytest.raises(AssertionError):
        assert_predicts(shuffled, rows, VOCAB + 1, 0.1)


def test_pairs_do_not_cross_rows():
    rows = torch.tensor([[1, 2], [3, 4]]).repeat(100, 1)
    embedding, head = start(rows, VOCAB + 1)
    logits = F.rms_norm(embedding, embedding.shape[1:]) @ head.T
    assert logits[1].argmax() == 2
    assert logits[3].argmax() == 4
    assert logits[2, 3] < logits[1, 2] - 1  # the end of a row says nothing of the next row


@pytest.mark.parametrize("width", [4, 16, 100])
def test_every_token_has_a_finite_row_of_length_one(width):
    rows = draw(chain(), rows=4, length=20) // 2  # half the vocabulary never occurs
    embedding, head = start(rows, width)
    assert (embedding.shape, head.shape) == ((VOCAB, width), (VOCAB, width))
    torch.testing.assert_close(embedding.square().mean(1), torch.ones(VOCAB))
    assert head.isfinite().all()
    assert len(embedding.unique(dim=0)) == VOCAB
    assert nats(embedding, head, draw(chain(), rows=2)) < 3 * math.log(VOCAB)


def test_the_generator_decides_the_turn_and_nothing_of_the_prediction():
    rows = draw(chain(), rows=50)
    (first, first_head), (again, again_head), (other, other_head) = start(rows, 30), start(rows, 30), start(rows, 30, 1)
    assert torch.equal(first, again)
    assert torch.equal(first_head, again_head)
    assert not torch.allclose(first, other)
    seen = rows.unique()
    torch.testing.assert_close(first[seen] @ first_head.T, other[seen] @ other_head.T, rtol=0, atol=0.02)


def test_the_start_is_the_same_for_every_number_of_threads():
    """With a size at which products are shared among threads, and values so close that rounding decides their order."""
    rows = torch.randint(600, (200, 257), generator=torch.Generator().manual_seed(4))
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(torch.cat(spectral.start(rows, 600, 256, torch.Generator().manual_seed(0))))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
