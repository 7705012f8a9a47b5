"""int8-fast on Hopper: exponentials read off the bits of a number. What it shares with int8 is tested there."""

from itertools import product

import pytest
import torch

from comfy_sage3.kernels import build

from .calls import DEVICE, DTYPES, FAST, LENGTHS, Kernel, qkv, randn, some_mask
from .conftest import obstacle
from .exact import FAST_LSE, FAST_NORMAL, exact, problems, relative_l1


@pytest.fixture
def fast():
    why = obstacle(FAST)
    if why:
        pytest.skip(why)
    return Kernel(FAST, build.load().ops)


def faults(fast, tensors, mask=None, causal=False, scale=None, normal=True, lse_factor=FAST_LSE):
    got = fast.with_lse(*tensors, mask, causal, scale)
    return problems(*got, *tensors, mask, causal, scale, normal=normal, lse_factor=lse_factor, bound=FAST_NORMAL)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_odd_lengths(fast, d, causal):
    found = []
    for lq, lk in product(LENGTHS, (97, 257, 1025)):
        found += faults(fast, qkv(lq, lk, d), causal=causal)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_a_padded_head_dim(fast, dtype):
    found = []
    for d in (40, 72, 112):
        found += faults(fast, qkv(257, 1025, d, dtype=dtype))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.bfloat16], ids=str)
def test_masks(fast, mask_dtype):
    found = []
    for causal in (False, True):
        found += faults(
            fast, qkv(257, 1025, 128), some_mask((2, 1, 257, 1025), mask_dtype), causal, normal=False, lse_factor=6
        )
    assert not found, "\n".join(found)


@pytest.mark.parametrize("times", [4, 20, 100])
def test_peaked_rows(fast, times):
    """From about 16 on the fixed-point product could wrap around, and the path that prevents it runs."""
    found = []
    for d, causal in product((64, 128), (False, True)):
        scale = times * d**-0.5
        found += faults(fast, qkv(257, 1025, d), causal=causal, scale=scale, normal=False, lse_factor=0)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("gap", [200, 300, 340, 360, 400, 512, 600, 1000, 100_000])
def test_scores_far_below_the_maximum_count_for_nothing(fast, gap):
    """Half of the keys score ``gap`` (in powers of two) less; whatever wraps around would show their values."""
    q, k, v = qkv(130, 512, 64, dtype=torch.float32)
    q = q * 0
    q[..., 0] = 1.0
    k = 1e-4 * gap * k
    k[:, :, ::2, 0], k[:, :, 1::2, 0] = 0.0, -gap / 1.4427
    v[:, :, 1::2] = 1000.0
    out = fast(q, k, v, scale=1.0)
    want, _ = exact(q, k, v, scale=1.0)
    assert (out.double() - want).abs().max() <= 0.02 * v[:, :, ::2].abs().max() + 0.004 * 1000  # V's own 8 bits


def test_a_rising_maximum_between_threads_and_tiles(fast):
    found = []
    for slope in (0.3, 3.0, 30.0):
        q, k, v = qkv(130, 1000, 64, dtype=torch.float32)
        q[..., 0] = 1.0
        k[..., 0] = slope * torch.arange(1000, device=DEVICE) / 8
        found += faults(fast, (q, k, v), scale=1.0, normal=False, lse_factor=0)
    assert not found, "\n".join(found)


def test_all_scores_alike_give_the_mean(fast):
    q, k, v = qkv(65, 203, 64)
    for tensors, scale in (((q, k, v), 0.0), ((q * 0, k, v), None), ((q, k * 0 + 2.0, v), None)):
        out = fast(*tensors, scale=scale)
        assert relative_l1(out, v.double().mean(2, keepdim=True).expand_as(out)) <= FAST_NORMAL


@pytest.mark.parametrize("size", [1e-20, 1e-5, 1e4, 1e15])
def test_tiny_and_huge_values(fast, size):
    q, k, v = qkv(130, 257, 64, dtype=torch.float32)
    out = fast(q / size, k * size, v * size)
    assert relative_l1(out.double() / size, exact(q, k, v)[0]) <= FAST_NORMAL


def test_nan_is_seen(fast):
    for which in range(3):
        tensors = list(qkv(130, 257, 64))
        tensors[which][0, 0, 100, 3] = torch.nan
        assert fast(*tensors).isnan().any()


def test_fifty_repeats_are_identical(fast):
    q, k, v = (randn(1, 8, 1500, 128, seed=i) for i in range(3))
    first = fast(q, k, v)
    for _ in range(50):
        assert torch.equal(fast(q, k, v), first)
