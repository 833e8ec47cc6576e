"""Attention by its formula against torch's kernel."""

import pytest
import torch
import torch.nn.functional as F

from nanotrain import attention


def of_torch(q, k, v, scale):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("length", [2, 3, 128, 301])
def test_outputs_and_gradients_are_those_of_torch(length, dtype, atol):
    q, k, v, weight = torch.randn(4, 2, 3, length, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for attend, of_dtype in ((attention.attend, dtype), (of_torch, torch.float32)):
        inputs = [x.to(of_dtype).requires_grad_() for x in (F.rms_norm(q, (8,)), F.rms_norm(k, (8,)), v)]
        output = attend(*inputs, 0.5)
        found.append([output, *torch.autograd.grad((output * weight).sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0, atol=atol)


def test_what_only_torch_can_or_does_well_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    q = torch.zeros(1, 2, 16, 8)
    assert attention.is_faster(q, q, 0.5)
    assert not attention.is_faster(q, q, 9.0), "exp(72) overflows"
    assert not attention.is_faster(q, q[:, :1], 0.5), "grouped queries"
    assert not attention.is_faster(q.half(), q.half(), 0.5)
    long = torch.zeros(1, 1, attention.LONGEST + 1, 8)
    assert not attention.is_faster(long, long, 0.5)
