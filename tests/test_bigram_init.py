"""Bigram init: on text from a known Markov chain the initial model must predict nearly as well as the chain itself."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanotrain import bigram_init, loss

VOCAB = 24


def chain(seed=0):
    """(V, V) transition matrix with a few likely successors of each token, and unequal frequencies."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(VOCAB, VOCAB, generator=generator) ** 8 * torch.arange(1, VOCAB + 1)
    return weights / weights.sum(1, keepdim=True)


def draw(matrix, sequences=400, length=400, seed=1):
    """(sequences, length) int64 of the Markov chain."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(sequences, length, dtype=torch.int64)
    for t in range(1, length):
        tokens[:, t] = torch.multinomial(matrix[tokens[:, t - 1]], 1, generator=generator).squeeze(1)
    return tokens


def init(sequences, width, seed=0):
    return bigram_init.bigram_init(sequences, VOCAB, width, torch.Generator().manual_seed(seed))


def nats(embedding, head, sequences):
    """Mean loss of the bigram model on the bigrams of `sequences`, as computed before the layers are trained."""
    hidden = F.rms_norm(embedding, embedding.shape[1:])[sequences[:, :-1].flatten()]
    return loss.token_losses(hidden, head, sequences[:, 1:].flatten(), 15.0).mean().item()


def entropies(sequences):
    """(of a token alone, of a token given the one before it): entropies in nats, reached by the two best tables."""
    counts = torch.zeros(VOCAB, VOCAB).index_put_(
        (sequences[:, :-1].flatten(), sequences[:, 1:].flatten()), torch.ones(()), accumulate=True
    )
    total, single = counts.sum(), counts.sum(0)
    alone = -(single * (single / total).log()).sum() / total
    given = -(counts * (counts / counts.sum(1, keepdim=True)).clamp(min=1e-30).log()).sum() / total
    return alone.item(), given.item()


@pytest.mark.parametrize(("width", "share"), [(8, 0.55), (16, 0.85), (VOCAB + 1, 0.95), (40, 0.95)])
def test_it_predicts_nearly_as_well_as_the_best_bigram_table(width, share):
    matrix = chain()
    text = draw(matrix, 50, seed=2)
    alone, given = entropies(text)
    assert alone - nats(*init(draw(matrix), width), text) > share * (alone - given)


def test_bigrams_do_not_cross_sequences():
    sequences = torch.tensor([[1, 2], [3, 4]]).repeat(100, 1)
    embedding, head = init(sequences, VOCAB + 1)
    logits = F.rms_norm(embedding, embedding.shape[1:]) @ head.T
    assert logits[1].argmax() == 2
    assert logits[3].argmax() == 4
    assert logits[2, 3] < logits[1, 2] - 1  # the end of a sequence predicts nothing about the next one


@pytest.mark.parametrize("width", [4, 16, 100])
def test_every_token_has_a_finite_vector_of_length_one(width):
    sequences = draw(chain(), sequences=4, length=20) // 2  # half the vocabulary never occurs
    embedding, head = init(sequences, width)
    assert (embedding.shape, head.shape) == ((VOCAB, width), (VOCAB, width))
    torch.testing.assert_close(embedding.square().mean(1), torch.ones(VOCAB))
    assert head.isfinite().all()
    assert len(embedding.unique(dim=0)) == VOCAB
    assert nats(embedding, head, draw(chain(), sequences=2)) < 3 * math.log(VOCAB)


def test_it_is_the_same_for_every_number_of_threads():
    """With a size at which products are shared among threads, and values so close that rounding decides their order."""
    sequences = torch.randint(600, (200, 257), generator=torch.Generator().manual_seed(4))
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(torch.cat(bigram_init.bigram_init(sequences, 600, 256, torch.Generator().manual_seed(0))))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
