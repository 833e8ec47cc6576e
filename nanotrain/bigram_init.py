"""Bigram initialization: set embedding and head from bigram counts, so that training starts from a bigram model.

With identity layers the model predicts the next token from the current one alone. The best logits for that are the
pointwise mutual information (PMI) of token pairs; a low-rank factorization of the PMI matrix gives embedding and head
(an interpretation of word vectors by Levy and Goldberg, 2014).

    V vocabulary   C width   p(j) frequency of token j   p(j | i) frequency of token j after token i
"""

from contextlib import contextmanager

import torch
from torch import Tensor

from nanotrain.dataloader import SequenceReader
from nanotrain.gpt import GPT

SMOOTHING = 200.0  # pseudo-counts per token, distributed as p, to limit the effect of small counts
RIDGE = 1e-3  # ridge penalty for the head, relative to the mean of the Gram matrix's diagonal
LARGEST_VOCABULARY = 16384  # the V x V matrices take 12 bytes per bigram
OVERSAMPLING, POWER_STEPS = 32, 2  # parameters of the randomized SVD (Halko et al., arXiv:0909.4061)


@torch.no_grad()
def init_from_bigrams(model: GPT, reader: SequenceReader, num_tokens: int, seed: int) -> None:
    """Set embedding and head of `model` from about `num_tokens` of `reader`, unless its vocabulary is too large."""
    if model.config.vocab_size > LARGEST_VOCABULARY:
        return
    sequences = torch.empty(max(num_tokens // reader.seq_len, 1), reader.seq_len + 1, dtype=torch.int64)
    reader.fill(sequences.numpy())
    generator = torch.Generator().manual_seed(seed)
    embedding, head = bigram_init(sequences, model.config.vocab_size, model.config.model_dim, generator)
    model.embedding.weight.copy_(embedding)
    model.lm_head.weight.copy_(head)


@contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def bigram_init(sequences: Tensor, vocab_size: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(embedding (V, C), head (V, C)), float32 on the CPU, of a bigram model of `sequences` (N, T) int64.

    Embedding vectors have RMS 1 and are rotated randomly, so that no channel is special. Tokens that do not occur get
    random vectors. Runs in one thread: with nearly equal singular values, another summation order would change vectors.
    """
    embedding = torch.randn(vocab_size, width, generator=generator)
    embedding /= embedding.square().mean(1, keepdim=True).sqrt()
    bigrams = (sequences[:, :-1] * vocab_size + sequences[:, 1:]).flatten()
    counts = torch.bincount(bigrams, minlength=vocab_size**2).view(vocab_size, vocab_size).float()
    first_counts, second_counts = counts.sum(1), counts.sum(0) + 0.5
    frequency = second_counts / second_counts.sum()

    # Log of the smoothed p(j | i) / p(j), minus its mean over p: softmax ignores a constant per row.
    pmi = counts.div_(SMOOTHING * frequency).log1p_()
    pmi -= (pmi @ frequency)[:, None]

    # Weighted factorization: rows by count, columns by frequency.
    row_weight, column_weight = first_counts.sqrt()[:, None], frequency.sqrt()[:, None]
    rank = min(width - 1, vocab_size)
    block = torch.randn(vocab_size, min(rank + OVERSAMPLING, vocab_size), generator=generator)
    for _ in range(POWER_STEPS + 1):
        basis = torch.linalg.qr(row_weight * (pmi @ (column_weight * block)))[0]
        block = column_weight * (pmi.T @ (row_weight * basis))
    left, sizes, _ = torch.linalg.svd(block.T, full_matrices=False)
    features = (basis @ left)[:, :rank] * sizes[:rank].sqrt() / row_weight.clamp(min=1.0)

    # Vectors of equal length with one common component, through which the head encodes token frequencies.
    vectors = torch.zeros(vocab_size, width)
    vectors[:, 0] = 1.0
    vectors[:, 1 : rank + 1] = features / features.norm(dim=1, keepdim=True).clamp(min=1e-9)
    vectors /= vectors.square().mean(1, keepdim=True).sqrt()
    vectors @= torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    seen = first_counts > 0
    embedding[seen] = vectors[seen]

    # Head: ridge regression of the centered log p(j | i) on the embedding, rows weighted by count.
    weighted = first_counts[:, None] * vectors
    gram = (vectors.T @ weighted).double()
    gram += RIDGE * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    log_frequency = frequency.log() - frequency.log().mean()
    targets = pmi.T @ weighted + torch.outer(log_frequency, weighted.sum(0))
    return embedding, torch.linalg.solve(gram, targets.T.double()).T.float()
