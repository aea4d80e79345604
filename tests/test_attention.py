"""attention() against the formula written out."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyldm.attention import attention


def plain_attention(q, k, v, heads, causal=False):
    """softmax(Q K^T / sqrt(d)) V, head by head, with the (n, m) matrix of weights in full view."""
    out = []
    for q_head, k_head, v_head in zip(*(x.chunk(heads, dim=-1) for x in (q, k, v)), strict=True):
        logits = q_head @ k_head.mT / math.sqrt(q_head.shape[-1])
        if causal:
            future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(diagonal=1)
            logits = logits.masked_fill(future, -torch.inf)
        out.append(logits.softmax(dim=-1) @ v_head)
    return torch.cat(out, dim=-1)


def random_qkv(n, m, width=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, width, generator=generator, dtype=torch.float64) for length in (n, m, m)]


@pytest.mark.parametrize("heads", [1, 3, 12])
@pytest.mark.parametrize("n, m", [(6, 6), (6, 4), (1, 5), (5, 1)])
def test_is_the_formula_for_any_number_of_heads_and_lengths(n, m, heads):
    q, k, v = random_qkv(n, m)
    torch.testing.assert_close(attention(q, k, v, heads), plain_attention(q, k, v, heads))


@pytest.mark.parametrize("heads", [1, 3])
def test_causal_is_the_formula_with_the_future_masked(heads):
    q, k, v = random_qkv(6, 6)
    torch.testing.assert_close(attention(q, k, v, heads, causal=True), plain_attention(q, k, v, heads, causal=True))


def test_a_causal_position_does_not_see_what_comes_after_it():
    q, k, v = random_qkv(6, 6)
    before = attention(q, k, v, heads=3, causal=True)
    for x in (q, k, v):
        x[:, 4:] += 1
    after = attention(q, k, v, heads=3, causal=True)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])
    torch.testing.assert_close(after[:, 0], v[:, 0])  # the first sees only itself


def test_heads_do_not_mix():
    q, k, v = random_qkv(6, 4)
    before = attention(q, k, v, heads=3)
    for x in (q, k, v):
        x[..., 4:8] += torch.linspace(-1, 1, 4, dtype=x.dtype)  # the second of three heads of four numbers
        x[:, 0, 4:8] *= 2
    after = attention(q, k, v, heads=3)
    same = torch.isclose(after, before).all(dim=(0, 1))
    assert same.tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_equal_keys_average_the_values():
    q, k, v = random_qkv(6, 4)
    out = attention(q, torch.ones_like(k), v, heads=3)
    torch.testing.assert_close(out, v.mean(dim=1, keepdim=True).expand_as(out))


def test_very_large_logits_stay_finite():
    q, k, v = (x.float() for x in random_qkv(6, 4))
    assert attention(1e4 * q, 1e4 * k, v, heads=3).isfinite().all()


@pytest.mark.parametrize("m, causal", [(4, False), (6, True)])
def test_gradients_are_those_of_the_formula(m, causal):
    inputs = [x.requires_grad_() for x in random_qkv(6, m)]
    weights = torch.randn(2, 6, 12, dtype=torch.float64)
    fused = torch.autograd.grad((weights * attention(*inputs, 3, causal)).sum(), inputs)
    plain = torch.autograd.grad((weights * plain_attention(*inputs, 3, causal)).sum(), inputs)
    for ours, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow_where_the_logits_would(dtype):
    """Stable Diffusion 2.1 has queries and keys whose products are beyond 65504, the largest number of float16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (scale * torch.randn(1, 64, 64, generator=generator) for scale in (300, 300, 1))
    q[0, 0], k[0, 0] = 200, 200
    assert (q.half() @ k.half().mT).isinf().any()
    expected = plain_attention(*(x.to(dtype).float() for x in (q, k, v)), heads=1)
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):  # without and with a fused kernel
        with sdpa_kernel(backend):
            out = attention(*(x.to(dtype) for x in (q, k, v)), heads=1)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02)
