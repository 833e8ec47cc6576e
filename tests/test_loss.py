"""The chunked, hand-differentiated loss against autograd through torch's cross-entropy in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanotrain import loss

CHUNK, WIDTH, VOCAB, CAP = 4, 6, 11, 15.0
ROWS = (1, 4, 5, 13)  # below, at, above and between whole chunks


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setitem(loss.CHUNK_ROWS, "cpu", CHUNK)


def draw(rows, width=WIDTH, vocab=VOCAB, scale=3.0, dtype=torch.float32):
    """hidden, weight, targets; both factors already rounded to `dtype`."""
    generator = torch.Generator().manual_seed(rows)
    hidden = scale * torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    return hidden.to(dtype), weight.to(dtype).float(), torch.randint(vocab, (rows,), generator=generator)


def differentiated(function, hidden, weight):
    """(value, gradient by hidden, gradient by weight)"""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = function(hidden, weight)
    value.backward()
    return value.detach(), hidden.grad, weight.grad


def mean_loss(targets, cap=CAP):
    return lambda hidden, weight: loss.mean_loss(hidden, weight, targets, cap, loss.softmax_gradient)


def reference(targets, cap=CAP, reduction="mean"):
    """What the losses stand for, with all logits at once and in float64."""

    def function(hidden, weight):
        logits = cap * torch.tanh(hidden.double() @ weight.double().T / cap)
        return F.cross_entropy(logits, targets, reduction=reduction)

    return function


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("factor", "cap"), [(1.0, CAP), (-65536.0, CAP), (1.0, 2.0), (1.0, 70.0)])
def test_loss_and_both_gradients_equal_autograd(rows, factor, cap):
    hidden, weight, targets = draw(rows)
    got, expected = (
        differentiated(lambda h, w, of=of: factor * of(targets, cap)(h, w), hidden, weight)
        for of in (mean_loss, reference)
    )
    for part, exact in zip(got, expected, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, exact.float(), rtol=1e-5, atol=1e-6 * abs(factor))


@pytest.mark.parametrize("rows", ROWS)
def test_token_losses_and_greedy_tokens_are_those_of_all_logits(rows):
    hidden, weight, targets = draw(rows)
    expected = reference(targets, reduction="none")(hidden, weight).float()
    torch.testing.assert_close(loss.token_losses(hidden, weight, targets, CAP), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(loss.greedy_tokens(hidden, weight), (hidden.double() @ weight.double().T).argmax(-1))


def test_extreme_logits_stay_finite():
    hidden, weight, targets = draw(13, scale=1e30)
    value, *gradients = differentiated(mean_loss(targets), hidden, weight)
    assert 0 <= value <= 30 + math.log(VOCAB)  # the cap keeps every two logits within 30
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert loss.token_losses(hidden, weight, targets, CAP).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_products_have_float32_sums(dtype):
    hidden, weight, targets = draw(400, width=8, scale=1.0, dtype=dtype)
    got = differentiated(mean_loss(targets), hidden, weight)
    expected = differentiated(reference(targets), hidden, weight)
    assert [part.dtype for part in got] == [torch.float32, dtype, torch.float32]
    errors = [(part.double() - exact).norm() / exact.norm() for part, exact in zip(got, expected, strict=True)]
    rounding = torch.finfo(dtype).eps / 2
    # 100 chunks summed in the low dtype would make the last more than twice the rounding of one product
    assert all(error < limit * rounding for error, limit in zip(errors, (0.1, 2, 0.5), strict=True))


def test_the_logits_of_all_rows_never_exist():
    hidden, weight, targets = draw(13)
    chunks = []

    def kernel(logits, cap):
        chunks.append(len(logits))
        return loss.softmax_gradient(logits, cap)

    loss.mean_loss(hidden, weight, targets, CAP, kernel)
    assert chunks == [4, 4, 4, 1]
