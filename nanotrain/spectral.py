"""A start for the embedding and the head from counts of neighbouring tokens, so that training begins as a bigram model.

A model whose layers are the identity predicts the next token from the present one alone. The best that it can be is
known before the first step: the logits are how much more often j follows i than j is found anywhere, and that matrix,
factored to the model's width, is the embedding times the head (Levy and Goldberg 2014 read word vectors so).

    V vocabulary   C width   c(i, j) how often j follows i   p(j) share of j in the text
"""

from contextlib import contextmanager

import torch

SMOOTHING = 200.0  # virtual neighbours of each token, drawn from p: few counts should not say much
RIDGE = 1e-3  # of the head's regression, against the mean diagonal
LARGEST_VOCABULARY = 16384  # all pairs of tokens are held at once, in 12 bytes each
OVERSAMPLING, POWER_STEPS = 32, 2  # of the randomised factoring (Halko et al., arXiv:0909.4061)


@contextmanager
def one_thread():
    """Products in one thread, which sum in the same order whatever the number of threads that torch has been given."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@one_thread()
def start(rows, vocab_size, width, generator):
    """(embedding (V, C), head (V, C)), float32 on the CPU, of a bigram model of `rows` (N, T) int64.

    The rows of the embedding have root mean square 1 and are turned at random, so that no channel is special. Tokens
    that do not occur get random rows. The result does not depend on the number of threads: singular vectors of nearly
    equal values would turn rounding into another start.
    """
    embedding = torch.randn(vocab_size, width, generator=generator)
    embedding /= embedding.square().mean(1, keepdim=True).sqrt()
    pairs = (rows[:, :-1] * vocab_size + rows[:, 1:]).flatten()
    counts = torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size).float()
    of_row, of_column = counts.sum(1), counts.sum(0) + 0.5
    share = of_column / of_column.sum()

    # Log of the smoothed p(j | i) / p(j), less its mean over p: a constant of the row, which no softmax sees.
    surplus = counts.div_(SMOOTHING * share).log1p_()
    surplus -= (surplus @ share)[:, None]

    # Factor it as it is used: a row weighs as often as it occurs, a column as its share.
    row_weight, column_weight = of_row.sqrt()[:, None], share.sqrt()[:, None]
    rank = min(width - 1, vocab_size)
    block = torch.randn(vocab_size, min(rank + OVERSAMPLING, vocab_size), generator=generator)
    for _ in range(POWER_STEPS + 1):
        basis = torch.linalg.qr(row_weight * (surplus @ (column_weight * block)))[0]
        block = column_weight * (surplus.T @ (row_weight * basis))
    left, sizes, _ = torch.linalg.svd(block.T, full_matrices=False)
    features = (basis @ left)[:, :rank] * sizes[:rank].sqrt() / row_weight.clamp(min=1.0)

    # Rows of one length, with one direction that all share: with it the head says how frequent each token is.
    vectors = torch.zeros(vocab_size, width)
    vectors[:, 0] = 1.0
    vectors[:, 1 : rank + 1] = features / features.norm(dim=1, keepdim=True).clamp(min=1e-9)
    vectors /= vectors.square().mean(1, keepdim=True).sqrt()
    vectors @= torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    seen = of_row > 0
    embedding[seen] = vectors[seen]

    # The head: ridge regression of log p(j | i), centred, on the embedding, each row weighing as often as it occurs.
    weighted = of_row[:, None] * vectors
    gram = (vectors.T @ weighted).double()
    gram += RIDGE * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    log_share = share.log() - share.log().mean()
    targets = surplus.T @ weighted + torch.outer(log_share, weighted.sum(0))
    return embedding, torch.linalg.solve(gram, targets.T.double()).T.float()
