"""What the kernels compute, against fp64 attention: lengths, head dims, types, grouped heads, scales, hard inputs."""

from itertools import product

import pytest
import torch

from . import exact
from .calls import DTYPES, HEAD_DIMS, LENGTHS, qkv, randn
from .exact import problems


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_every_pair_of_odd_lengths(kernel, d, causal):
    found = []
    for lq, lk in product(LENGTHS, LENGTHS):
        tensors = qkv(lq, lk, d)
        found += problems(*kernel.with_lse(*tensors, causal=causal), *tensors, causal=causal)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_every_head_dim_and_dtype(kernel, d, dtype):
    found = []
    for (lq, lk), causal in product(((257, 203), (203, 1025), (1023, 113)), (False, True)):
        tensors = qkv(lq, lk, d, dtype=dtype, seed=d)
        found += problems(*kernel.with_lse(*tensors, causal=causal), *tensors, causal=causal)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("causal", [False, True])
def test_tile_boundaries(kernel, causal):
    found = []
    for lq, lk in product((63, 64, 65, 127, 128, 129, 192, 193), (127, 128, 129, 255, 256, 257)):
        tensors = qkv(lq, lk, 128, b=1)
        found += problems(*kernel.with_lse(*tensors, causal=causal), *tensors, causal=causal)
    assert not found, "\n".join(found)


def test_few_keys(kernel):
    found = []
    for lq, lk, d in product((1, 70), (1, 2, 3, 7, 8, 9, 31, 33), (64, 80)):
        tensors = qkv(lq, lk, d)
        found += problems(*kernel.with_lse(*tensors), *tensors)
    assert not found, "\n".join(found)


def test_many_batches_and_heads(kernel):
    tensors = qkv(130, 150, 64, b=7, h=19)
    found = problems(*kernel.with_lse(*tensors), *tensors)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("hkv", [1, 2, 8])
def test_grouped_heads(kernel, hkv):
    found = []
    for (lq, lk), d, causal in product(((257, 203), (113, 1025)), (64, 128), (False, True)):
        tensors = qkv(lq, lk, d, h=8, hkv=hkv)
        found += problems(*kernel.with_lse(*tensors, causal=causal), *tensors, causal=causal)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("scale", [0.0, -0.125, 0.01, 0.2])
def test_any_scale(kernel, scale):
    found = []
    for d, causal in product((64, 128), (False, True)):
        tensors = qkv(257, 1025, d)
        # the scores' errors grow with the scale
        factor = max(1.0, abs(scale) * d**0.5)
        got = kernel.with_lse(*tensors, causal=causal, scale=scale)
        found += problems(*got, *tensors, causal=causal, scale=scale, normal=factor == 1, lse_factor=factor)
    assert not found, "\n".join(found)


def test_a_scale_of_zero_gives_the_mean_and_the_log_of_the_count(kernel):
    q, k, v = qkv(65, 203, 64)
    out, lse = kernel.with_lse(q, k, v, scale=0.0)
    assert exact.relative_l1(out, v.double().mean(2, keepdim=True).expand_as(out)) <= exact.NORMAL
    torch.testing.assert_close(lse, torch.full_like(lse, 203.0).log(), rtol=0, atol=exact.LSE_MEAN)


def offsets(shape, size, seed):
    """One number per head and channel, shared by all tokens."""
    b, h, _, d = shape
    return size * randn(b, h, 1, d, seed=seed, dtype=torch.float32)


def with_offsets(which, size, dtype, d, lq=257, lk=1025):
    tensors = qkv(lq, lk, d, dtype=torch.float32)
    names = zip("qkv", tensors, strict=True)
    return [(x + offsets(x.shape, size, 50 + i) if n in which else x).to(dtype) for i, (n, x) in enumerate(names)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v", "kv", "qkv"])
def test_channel_offsets(kernel, which, dtype):
    found = []
    for d, causal in product((64, 128), (False, True)):
        tensors = with_offsets(which, 5.0, dtype, d)
        # K's offset moves every score of a row alike: the LSE must have it, in full. Q's makes its codes coarser.
        got = kernel.with_lse(*tensors, causal=causal)
        factor = 5.0 if "q" in which else 1.0
        found += problems(*got, *tensors, causal=causal, normal=which in ("k", "v", "kv"), lse_factor=factor)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("d", [64, 128])
def test_an_offset_of_k_changes_nothing_but_the_lse(kernel, d):
    """Softmax does not see it, so the error is that of plain inputs: fp32, in which 100 + x is still x to 7e-6."""
    q, k, v = qkv(257, 1025, d, dtype=torch.float32)
    moved = k + 100.0 * randn(2, 2, 1, d, seed=3, dtype=torch.float32)
    (plain, _), (out, lse) = kernel.with_lse(q, k, v), kernel.with_lse(q, moved, v)
    assert exact.relative_l1(out, plain) <= exact.SAME
    want, want_lse = exact.exact(q, moved, v)
    assert exact.relative_l1(out, want) <= exact.NORMAL
    assert not exact.lse_problems(lse, want_lse)


def test_an_offset_of_v_is_added_exactly(kernel):
    """Weights sum to one: what all tokens of V share passes through without 8-bit error."""
    q, k, v = qkv(257, 1025, 128, dtype=torch.float32)
    offset = 100.0 * randn(2, 2, 1, 128, seed=3, dtype=torch.float32)
    out = kernel(q, k, v + offset)
    want, _ = exact.exact(q, k, v)
    assert exact.relative_l1(out - offset, want) <= exact.NORMAL


@pytest.mark.parametrize("causal", [False, True])
def test_peaked_rows(kernel, causal):
    found = []
    for d in (64, 128):
        tensors = qkv(257, 1025, d)
        scale = 20 * d**-0.5
        got = kernel.with_lse(*tensors, causal=causal, scale=scale)
        found += problems(*got, *tensors, causal=causal, scale=scale, normal=False, lse_factor=20)
    assert not found, "\n".join(found)


def test_a_growing_maximum(kernel):
    """Scores that rise from tile to tile, by a little and by a lot, and then fall: every rescaling of the softmax."""
    found = []
    for slope, turn in product((0.01, 0.3, 3.0), (200, 1000)):
        q, k, v = qkv(130, 1000, 64, dtype=torch.float32)
        q[..., 0] = 1.0
        token = torch.arange(1000, device=q.device)
        k[..., 0] = slope * torch.where(token < turn, token, 2 * turn - token) / 8
        # a scale of 1 is 8 times the usual one; the steeper ones leave K's other channels few codes
        factor = 8 if slope == 0.01 else 0
        found += problems(*kernel.with_lse(q, k, v, scale=1.0), q, k, v, scale=1.0, normal=False, lse_factor=factor)
    assert not found, "\n".join(found)


def test_constant_and_zero_inputs(kernel):
    q, k, v = qkv(70, 203, 64)
    for other in (torch.zeros_like(v), torch.full_like(v, 3.0)):
        out = kernel(q, k, other)
        torch.testing.assert_close(out, torch.full_like(out, float(other[0, 0, 0, 0])), rtol=4e-3, atol=1e-6)
    for name, tensors in (("q", (q * 0, k, v)), ("k", (q, k * 0 + 2.0, v))):
        out = kernel(*tensors)
        error = exact.relative_l1(out, v.double().mean(2, keepdim=True).expand_as(out))
        assert error <= exact.NORMAL, f"{name} constant: {error:.4f}"


def test_tiny_and_huge_values(kernel):
    """Scales carry the size: 8 bits of 1e-20 are as good as 8 bits of 1."""
    for size in (1e-20, 1e-5, 1e4, 1e15):
        q, k, v = qkv(130, 257, 64, dtype=torch.float32)
        out = kernel(q / size, k * size, v * size)
        want, _ = exact.exact(q, k, v)
        error = exact.relative_l1(out.double() / size, want)
        assert error <= exact.NORMAL, f"values of size {size}: {error:.4f}"


def test_fp16_keeps_outputs_near_its_limit(kernel):
    q, k, _ = qkv(70, 130, 64, dtype=torch.float16)
    v = torch.full_like(k, 60000.0)
    out = kernel(q, k, v)
    assert out.isfinite().all()
    torch.testing.assert_close(out.float(), torch.full_like(out, 60000.0).float(), rtol=2e-3, atol=0)
