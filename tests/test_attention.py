"""Attention in segments against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from nanotrain import attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2, 128, 129, 300])
def test_outputs_and_gradients_are_those_of_torch(length, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = torch.randn(4, 2, 3, length, 8, generator=generator)
    q, k = F.rms_norm(q, (8,)), F.rms_norm(k, (8,))  # a score of up to 8, times 0.5
    found, expected = [], []
    for attend, options, results in (
        (attention.attend, {}, found),
        (F.scaled_dot_product_attention, {"is_causal": True}, expected),
    ):
        inputs = [x.to(dtype if attend is attention.attend else torch.float32).requires_grad_() for x in (q, k, v)]
        output = attend(*inputs, scale=0.5, **options) if options else attend(*inputs, 0.5)
        results += [output, *torch.autograd.grad((output * weight.to(output.dtype)).sum(), inputs)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.08)


def test_scores_without_a_bound_and_what_only_torch_does_well_go_to_torch(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    q = torch.zeros(1, 2, 16, 8)
    assert attention.is_faster(q, q, 0.5)
    assert not attention.is_faster(q, q, 9.0)  # exp(72) has no float32
    assert not attention.is_faster(q, q[:, :1], 0.5)  # shared keys
    assert not attention.is_faster(q.half(), q.half(), 0.5)
    assert not attention.is_faster(q[:, :, :1], q[:, :, :1], 0.5)
    long = torch.zeros(1, 1, attention.LONGEST + 1, 8)
    assert not attention.is_faster(long, long, 0.5)
