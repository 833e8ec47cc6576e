"""The chunked, hand-differentiated loss against autograd through torch's cross-entropy in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanotrain import loss

CHUNK, WIDTH, VOCAB, CAP = 4, 6, 11, 15.0
ROWS = (1, 3, 4, 5, 8, 13)  # below, at, above and between whole chunks


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


def reference(hidden, weight, targets, cap=CAP):
    """What mean_loss stands for, with all logits at once and in float64."""
    logits = cap * torch.tanh(hidden.double() @ weight.double().T / cap)
    return F.cross_entropy(logits, targets)


def assert_mean_loss_is_right(rows, factor=1.0, cap=CAP):
    hidden, weight, targets = draw(rows)
    got = differentiated(
        lambda h, w: factor * loss.mean_loss(h, w, targets, cap, loss.softmax_gradient), hidden, weight
    )
    expected = differentiated(lambda h, w: factor * reference(h, w, targets, cap), hidden, weight)
    for part, exact in zip(got, expected, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, exact.float(), rtol=1e-5, atol=1e-6 * abs(factor))


@pytest.mark.parametrize("rows", ROWS)
def test_loss_and_both_gradients_equal_autograd(rows):
    assert_mean_loss_is_right(rows)


@pytest.mark.parametrize("factor", [0.125, -2.0, 65536.0])
def test_gradients_scale_with_what_follows_the_loss(factor):
    assert_mean_loss_is_right(5, factor)


@pytest.mark.parametrize("cap", [2.0, 70.0])
def test_another_cap_bounds_the_logits_of_everything(cap):
    assert_mean_loss_is_right(13, cap=cap)
    hidden, weight, targets = draw(13)
    by_token = loss.token_losses(hidden, weight, targets, cap)
    torch.testing.assert_close(by_token.mean(), reference(hidden, weight, targets, cap).float(), rtol=1e-5, atol=1e-6)
    assert (by_token - loss.token_losses(hidden, weight, targets, CAP)).abs().max() > 0.1
    torch.testing.assert_close(loss.softcap(torch.tensor([-1e30, 1e30]), cap), torch.tensor([-cap, cap]))


def test_the_check_notices_a_lost_last_chunk(monkeypatch):
    chunks = loss._chunks
    monkeypatch.setattr(loss, "_chunks", lambda hidden: chunks(hidden)[:-1])
    with pytest.raises(AssertionError):
        assert_mean_loss_is_right(13)


@pytest.mark.parametrize("rows", ROWS)
def test_token_losses_equal_cross_entropy(rows):
    hidden, weight, targets = draw(rows)
    logits = 15 * torch.tanh(hidden.double() @ weight.double().T / 15)
    expected = F.cross_entropy(logits, targets, reduction="none").float()
    torch.testing.assert_close(loss.token_losses(hidden, weight, targets, CAP), expected, rtol=1e-5, atol=1e-6)
    mean = loss.mean_loss(hidden, weight, targets, CAP, loss.softmax_gradient)
    torch.testing.assert_close(mean, expected.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_greedy_tokens_are_the_likeliest_of_all(rows):
    hidden, weight, _ = draw(rows)
    expected = (15 * torch.tanh(hidden.double() @ weight.double().T / 15)).argmax(-1)
    assert torch.equal(loss.greedy_tokens(hidden, weight), expected)
    assert len(set(expected.tolist())) > 1 or rows == 1


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_one_of_the_gradients_alone(wanted):
    hidden, weight, targets = draw(5)
    (hidden if wanted == "hidden" else weight).requires_grad_()
    loss.mean_loss(hidden, weight, targets, CAP, loss.softmax_gradient).backward()
    alone = hidden.grad if wanted == "hidden" else weight.grad
    both = differentiated(lambda h, w: reference(h, w, targets), hidden.detach(), weight.detach())
    torch.testing.assert_close(alone, both[1 if wanted == "hidden" else 2].float(), rtol=1e-5, atol=1e-6)


def test_kernel_gives_the_sum_and_its_gradient_by_the_logits():
    _, _, targets = draw(5)
    logits = 8 * torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    total, gradient = loss.loss_and_gradient(logits, targets, CAP)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(15 * torch.tanh(exact / 15), targets, reduction="sum")
    expected.backward()
    torch.testing.assert_close(total, expected.detach().float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, exact.grad.float(), rtol=1e-5, atol=1e-6)


def test_softcap_bounds_without_changing_small_logits():
    x = torch.tensor([0.0, 1e-3, 15.0, -40.0, 1e30, -math.inf])
    expected = torch.tensor([0.0, 1e-3, 15 * math.tanh(1), -15 * math.tanh(40 / 15), 15.0, -15.0])
    torch.testing.assert_close(loss.softcap(x, CAP), expected)


@pytest.mark.parametrize("scale", [1e2, 1e6, 1e30])
def test_extreme_logits_stay_finite(scale):
    hidden, weight, targets = draw(13, scale=scale)
    value, grad_hidden, grad_weight = differentiated(
        lambda h, w: loss.mean_loss(h, w, targets, CAP, loss.softmax_gradient), hidden, weight
    )
    assert 0 <= value <= 30 + math.log(VOCAB)  # the cap keeps every two logits within 30
    assert grad_hidden.isfinite().all()
    assert grad_weight.isfinite().all()
    assert loss.token_losses(hidden, weight, targets, CAP).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_products_have_float32_sums(dtype):
    hidden, weight, targets = draw(400, width=8, scale=1.0, dtype=dtype)
    value, grad_hidden, grad_weight = differentiated(
        lambda h, w: loss.mean_loss(h, w, targets, CAP, loss.softmax_gradient), hidden, weight
    )
    expected = differentiated(lambda h, w: reference(h, w, targets), hidden, weight)
    assert (value.dtype, grad_hidden.dtype, grad_weight.dtype) == (torch.float32, dtype, torch.float32)
    errors = [
        (got.double() - exact).norm() / exact.norm()
        for got, exact in zip((value, grad_hidden, grad_weight), expected, strict=True)
    ]
    rounding = torch.finfo(dtype).eps / 2
    # 100 chunks summed in the low dtype would make the last more than twice the rounding of one product
    assert errors[0] < 0.1 * rounding
    assert errors[1] < 2 * rounding
    assert errors[2] < 0.5 * rounding


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def largest_tensor(rows, width, vocab):
    hidden, weight, targets = draw(rows, width, vocab)
    with LargestTensor() as largest:
        differentiated(lambda h, w: loss.mean_loss(h, w, targets, CAP, loss.softmax_gradient), hidden, weight)
        loss.token_losses(hidden, weight, targets, CAP)
    return largest.numel


def test_the_logits_of_all_rows_never_exist(monkeypatch):
    rows, width, vocab = 64, 3, 50
    assert largest_tensor(rows, width, vocab) == max(rows * width, width * vocab, CHUNK * vocab)
    monkeypatch.setitem(loss.CHUNK_ROWS, "cpu", rows)
    assert largest_tensor(rows, width, vocab) == rows * vocab  # the check notices them


@pytest.mark.parametrize(("device", "size"), [("cpu", CHUNK), ("meta", 7)])
def test_chunks_cover_every_row_once_and_in_order(device, size, monkeypatch):
    monkeypatch.setattr(loss, "LARGE_CHUNK_ROWS", 7)  # for every device but the CPU
    rows = list(range(23))
    chunks = [rows[chunk] for chunk in loss._chunks(torch.empty(23, 1, device=device))]
    assert [row for chunk in chunks for row in chunk] == rows
    assert max(map(len, chunks)) == size
