"""Long sequences: offsets past 32 bits, accumulators that would overflow, memory that stays bounded."""

import pytest
import torch

from .calls import DEVICE, qkv, randn, scale_of
from .exact import LSE_MEAN, NORMAL, exact, lse_problems, relative_l1

LONG = 200_000


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    yield
    torch.cuda.empty_cache()


def test_two_hundred_thousand_keys(kernel):
    q, k, v = qkv(70, LONG, 128, b=1, h=2)
    out, lse = kernel.with_lse(q, k, v)
    want, want_lse = exact(q, k, v)
    assert relative_l1(out, want) <= NORMAL
    assert not lse_problems(lse, want_lse)


def test_two_hundred_thousand_keys_with_a_mask(kernel):
    q, k, v = qkv(70, LONG, 64, b=1, h=2)
    mask = torch.rand(1, 1, 1, LONG, device=DEVICE) < 0.5
    mask[..., 50_000:120_000] = False
    out = kernel(q, k, v, mask)
    assert relative_l1(out, exact(q, k, v, mask)[0]) <= NORMAL


def test_seventy_thousand_queries(kernel):
    """Some rows, from all over the sequence, against fp64."""
    length = 70_000
    q, k, v = qkv(length, length, 128, b=1, h=1)
    rows = torch.cat([torch.arange(a, a + 40, device=DEVICE) for a in (0, 32_760, 65_520, length - 40)])
    for causal in (False, True):
        out, lse = kernel.with_lse(q, k, v, causal=causal)
        assert out.isfinite().all()
        mask = (torch.arange(length, device=DEVICE) <= rows[:, None])[None, None] if causal else None
        want, want_lse = exact(q[:, :, rows], k, v, mask)
        assert relative_l1(out[:, :, rows], want) <= NORMAL
        assert not lse_problems(lse[:, :, rows], want_lse)


def test_offsets_past_thirty_two_bits(kernel):
    """The last heads of a token-major tensor of 2^31 elements and more, 128 heads apart from token to token."""
    d, heads = 128, 128
    base = torch.empty(1, LONG, heads, d, dtype=torch.bfloat16, device=DEVICE)
    assert base.numel() > 2**31
    q, k, v = qkv(70, LONG, d, b=1, h=2)
    far = []
    for i, x in enumerate((k, v)):
        view = base[:, :, heads - 2 - 2 * i : heads - 2 * i].transpose(1, 2)
        view.copy_(x)
        far.append(view)
    rows = base[:, LONG - 70 :, :2].transpose(1, 2)
    rows.copy_(q)
    assert relative_l1(kernel(rows, *far), exact(q, k, v)[0]) <= NORMAL


def test_a_mask_of_more_than_two_to_the_thirty_one_elements(kernel):
    q, k, v = qkv(11_000, LONG, 64, b=1, h=1)
    mask = torch.zeros(1, 1, 11_000, LONG, dtype=torch.bool, device=DEVICE)
    assert mask.numel() > 2**31
    mask[..., ::3] = True
    mask[:, :, 10_900:, LONG // 2 :] = False
    out = kernel(q, k, v, mask)
    rows = torch.tensor([0, 5_000, 10_899, 10_900, 10_999], device=DEVICE)
    assert relative_l1(out[:, :, rows], exact(q[:, :, rows], k, v, mask[:, :, rows])[0]) <= NORMAL


def test_sums_that_overflow_thirty_two_bit_integers(kernel):
    """Equal weights of 255 and 120,000 values of one sign before the other sign comes: 255 * 127 * 80,000 > 2^31."""
    q, k, v = qkv(70, LONG, 64, b=1, h=1)
    v[:, :, :120_000], v[:, :, 120_000:] = 1.0, -1.0
    out, lse = kernel.with_lse(q, k, v, scale=0.0)
    assert ((out.float() - 0.2).abs() < 0.01).all()
    assert (lse - torch.tensor(float(LONG)).log()).abs().max() < LSE_MEAN


def test_one_key_among_many_is_found(kernel):
    """Its weight is 1: what all other keys round to must not add up."""
    q, k, v = (randn(1, 1, n, 128, seed=i, dtype=torch.float32) for i, n in enumerate((70, LONG, LONG)))
    q = q * 0 + 4.0
    k[:, :, 123_457] = 4.0  # a score of 181 against N(0, 16)
    out = kernel(q, k, v)
    assert relative_l1(out, v[:, :, 123_457].double()[:, :, None].expand_as(out)) <= NORMAL


def test_the_memory_of_a_long_call_grows_with_its_length_only(kernel):
    q, k, v = qkv(70_000, 70_000, 128, b=1, h=1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = kernel.ops.int8_attention(q, k, v, None, True, scale_of(q, None), False, kernel.name)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before - out.nbytes <= 1.6 * 3 * q.numel()
