"""The 8-bit gradient on a Hopper GPU: against fp64, against the reference, again and again.

The same sources run on a CPU in tests/kernels/test_backward_kernels.py; what is left to show here is what only a GPU does:
its copies, fences, atomic additions and dtypes' conversions, and long sequences.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from comfy_sage3 import reference
from comfy_sage3.kernels import build, training

from ..sinks import give_sink
from . import calls
from .exact import exact as exact_attention
from .exact import relative_l1

NAMES = ("dq", "dk", "dv")
# Cosine with fp64 on N(0,1) inputs: the bar, at 4096 tokens, is 0.999 each. Both operands of each are e4m3: 0.9991 to 0.9993
# there; of a single row or channel it may be less.
LEAST = 0.998
# Of the relative L1 of the reference, which is the same algorithm; scales of V and means are grouped a little differently.
OF_REFERENCE, BESIDES = 1.25, 0.004
# A gradient that is exactly zero (one query that sees one key: its dS is) has no direction. Of the largest that it could be,
# scale |dout| |v| |k|, the output's 8 bits leave about 0.001.
ZERO, NEXT_TO_ZERO = 1e-9, 0.01


@pytest.fixture(autouse=True)
def _the_kernels():
    outcome = build.load()
    assert isinstance(outcome, build.Loaded)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the 8-bit gradient needs a GPU of sm_90")
    assert hasattr(outcome.ops, "int8_attention_gradient"), "the library was built without its gradient"


def inputs(lq, lk, d, *, b=1, h=2, hkv=2, dtype=torch.bfloat16, offset=1.0, seed=0):
    q, k, v = calls.qkv(lq, lk, d, b=b, h=h, hkv=hkv, dtype=dtype, seed=seed)
    return q, k + offset, v + offset / 2, calls.randn(*q.shape, seed=seed + 9, dtype=dtype)


def ours(q, k, v, dout, causal=False, scale=None, deterministic=False, mask=None):
    calls.poison()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = training.attend(*leaves, mask, causal, calls.scale_of(q, scale), False, deterministic)[0]
    calls.poison()
    return out, torch.autograd.grad(out, leaves, dout)


def exact(q, k, v, dout, causal=False, scale=None, mask=None, dlse=None):
    """By the chain rule in fp64: autograd makes NaN of a row that may attend nothing."""
    group, scale = q.shape[1] // k.shape[1], calls.scale_of(q, scale)
    q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
    out, lse = exact_attention(q, k, v, mask, causal, scale)
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    p = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    dout = dout.double()
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True) + (0.0 if dlse is None else dlse.double().unsqueeze(-1)))
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ q * scale, p.mT @ dout))
    return ds @ k * scale, dk, dv


def cosine(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def largest_row(x):
    return float(x.double().norm(dim=-1).max())


def bounds(q, k, v, dout, scale):
    """What no row of dq, dk (of one query) and dv (of one query) can exceed in size."""
    ds = largest_row(dout) * largest_row(v)
    scale = abs(calls.scale_of(q, scale))
    return scale * ds * largest_row(k), scale * ds * largest_row(q), largest_row(dout)


def problem(got, want, bound, least=LEAST):
    """What is wrong with a gradient, or None. ``bound`` is the most that a row of it can be, ``least`` the least cosine."""
    if not got.isfinite().all():
        return "not finite"
    if largest_row(want) < ZERO * bound:
        size = largest_row(got) / bound
        return None if size < NEXT_TO_ZERO else f"exactly zero, and here {size:.3f} of what it could be"
    found = cosine(got, want)
    return None if found > least else f"cosine {found:.5f}"


def by_reference(q, k, v, dout, causal, options=reference.OUR_INT8):
    wide = [x.float() for x in (q, k, v)]
    out, lse = reference.int8_attention(*wide, is_causal=causal, options=options)
    return reference.int8_attention_backward(dout.float(), *wide, out, lse, is_causal=causal, options=options)


def check(q, k, v, dout, causal=False, scale=None, deterministic=False, mask=None):
    _, got = ours(q, k, v, dout, causal, scale, deterministic, mask)
    want, most = exact(q, k, v, dout, causal, scale, mask), bounds(q, k, v, dout, scale)
    for name, like, a, e, bound in zip(NAMES, (q, k, v), got, want, most, strict=True):
        assert (a.shape, a.dtype) == (like.shape, like.dtype), name
        assert problem(a, e, bound) is None, (name, problem(a, e, bound))


@pytest.mark.parametrize("dtype", calls.DTYPES)
@pytest.mark.parametrize("d", [1, 37, 40, 64, 72, 80, 96, 112, 128])
def test_head_dims_and_dtypes(d, dtype):
    check(*inputs(203, 257, d, dtype=dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lq", [1, 63, 64, 65, 203, 1025])
@pytest.mark.parametrize("lk", [97, 128, 129, 1023])
def test_lengths(lq, lk, causal):
    check(*inputs(lq, lk, 128), causal)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(("h", "hkv"), [(8, 8), (8, 2), (6, 1)])
def test_grouped_heads_in_token_major_memory(d, h, hkv):
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(300, 300, d, b=2, h=h, hkv=hkv)]
    check(*tensors, causal=True)


def test_a_gradient_of_any_strides():
    q, k, v, dout = inputs(130, 200, 64)
    strided = torch.empty(*dout.shape, 2, dtype=dout.dtype, device=dout.device)[..., 0].copy_(dout)
    expanded = dout[:, :, :1].expand_as(dout)
    check(q, k, v, strided)
    check(q, k, v, expanded)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, *calls.DTYPES])
@pytest.mark.parametrize("shape", [(1, 1, 203, 400), (2, 4, 203, 400), (2, 1, 1, 400), (1, 4, 203, 1)])
def test_masks(shape, dtype, deterministic):
    mask = calls.some_mask(shape, dtype)
    mask[..., :64, :] = True if dtype == torch.bool else 0
    if shape[-1] > 1:
        mask[..., 128:256] = False if dtype == torch.bool else -math.inf
    check(*inputs(203, 400, 64, b=2, h=4, hkv=2), mask=mask, deterministic=deterministic)


def test_the_gradient_of_lse():
    q, k, v, dout = inputs(203, 257, 64, h=4, hkv=2)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = training.attend(*leaves, None, True, 0.125, True)[:2]
    dlse = calls.randn(*lse.shape, seed=3, dtype=torch.float32)
    got = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    for a, e in zip(got, exact(q, k, v, dout, True, 0.125, dlse=dlse), strict=True):
        assert cosine(a, e) > LEAST


def test_a_negative_scale():
    check(*inputs(200, 300, 64), scale=-0.2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_as_near_to_exact_as_the_reference(d, causal):
    q, k, v, dout = inputs(1024, 1024, d, h=2, hkv=1)
    want = exact(q, k, v, dout, causal)
    _, got = ours(q, k, v, dout, causal)
    for name, a, b, e in zip(NAMES, got, by_reference(q, k, v, dout, causal), want, strict=True):
        assert relative_l1(a, e) < OF_REFERENCE * relative_l1(b, e) + BESIDES, name


def test_the_bar_at_4096_tokens():
    q, k, v, dout = inputs(4096, 4096, 128, h=1, hkv=1, offset=0.0)
    out, got = ours(q, k, v, dout)
    p = torch.softmax(q.double() @ k.double().mT * 128**-0.5, -1)
    assert cosine(out, p @ v.double()) >= 0.9995
    for a, e in zip(got, exact(q, k, v, dout), strict=True):
        assert cosine(a, e) >= 0.999


def test_a_long_sequence_of_keys():
    """dq is added up in fp16, here in 256 parts."""
    check(*inputs(256, 32768, 128, h=1, hkv=1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tiles", [None, range(0, 32, 3)], ids=["all queries", "a third of them"])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_keys_beside_a_sink_keep_their_digits(d, tiles, causal):
    """Of scores in 8 bits: those cost dQ, beside a sink, more than the gradient's own 8 bits do.

    A lift that makes P 2 to 64 stays as it is here; the reference brings every tile's to 16 or more.
    """
    q, k, v, dout = inputs(2048, 2048, d, dtype=torch.float32, h=4, hkv=2, offset=0.0)
    q, k, v = give_sink(q, k, v, 0.8, tiles)
    _, got = ours(q, k, v, dout, causal)
    want, same = exact(q, k, v, dout, causal), by_reference(q, k, v, dout, causal)
    # With causality all queries see the keys of the sink's warp.
    factor, least = (1.5, 0.99) if causal and tiles is None else (OF_REFERENCE, 0.995)
    by_rows = by_reference(q, k, v, dout, causal, replace(reference.OUR_INT8, gradient_scales="row"))  # dQ in bf16
    assert 1 - cosine(got[0], want[0]) < 1.5 * (1 - cosine(by_rows[0], want[0])) + 0.001
    for name, a, b, e in zip(NAMES, got, same, want, strict=True):
        first = 0 if name == "dq" else 1
        error, of_reference = (relative_l1(x[:, :, first:], e[:, :, first:]) for x in (a, b))
        assert error < factor * of_reference + BESIDES, name
    for name, a, e in zip(NAMES[1:], got[1:], want[1:], strict=True):
        assert cosine(a[:, :, 1:], e[:, :, 1:]) > least, name
        assert cosine(a[:, :, 16:], e[:, :, 16:]) > 0.998, name  # of others than the keys of the sink's warp


def test_rows_of_tiny_gradients_keep_their_digits():
    q, k, v, dout = inputs(512, 512, 64, dtype=torch.float32, offset=0.0)
    dout = dout * 1e-4 ** (torch.arange(512, device=dout.device) // 64).clamp(max=4).view(1, 1, -1, 1)
    _, got = ours(q, k, v, dout)
    want = exact(q, k, v, dout)
    for tile in range(5):
        rows = slice(64 * tile, 64 * tile + 64)
        assert cosine(got[0][:, :, rows], want[0][:, :, rows]) > LEAST, tile


@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_is_not_hidden(where, bad):
    """What scales a loss relies on it."""
    tensors = dict(zip(("q", "k", "v", "dout"), inputs(200, 200, 64), strict=True))
    tensors[where][0, 1, 130, 7] = bad
    _, got = ours(*tensors.values())
    for name, x in zip(NAMES, got, strict=True):
        # dV = P^T dO does not depend on V
        assert x[0, 1].isfinite().all() == (where == "v" and name == "dv"), name
        assert x[0, 0].isfinite().all(), name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_fifty_repeats_are_the_same_bits_in_deterministic_mode(d, causal):
    q, k, v, dout = inputs(1025, 2049, d, b=2, h=8, hkv=4)
    tensors = (*give_sink(q, k, v, 0.8, range(0, 17, 3)), dout)
    _, want = ours(*tensors, causal, deterministic=True)
    for _ in range(50):
        _, got = ours(*tensors, causal, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_keys_and_values_are_the_same_bits_in_every_run():
    """Each block of dk and dv has one writer. dq's sums, in fp16, come as they come: last digits differ."""
    q, k, v, dout = inputs(1025, 2049, 128, h=8, hkv=4)
    tensors = (*give_sink(q, k, v, 0.8, range(0, 17, 3)), dout)
    _, want = ours(*tensors)
    for _ in range(20):
        _, got = ours(*tensors)
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[2], want[2])
        assert relative_l1(got[0], want[0]) < 3e-3


def test_nothing_waits_for_the_device():
    q, k, v, dout = inputs(257, 1025, 64)
    ours(q, k, v, dout)
    torch.cuda.synchronize()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    done = torch.cuda.Event()
    torch.cuda._sleep(400_000_000)  # about 0.2 seconds
    out = training.attend(*leaves, None, False, 0.125, False)[0]
    torch.autograd.grad(out, leaves, dout)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_lse_is_that_of_the_inference_kernel():
    q, k, v, _ = inputs(203, 257, 128)
    outcome = build.load()
    out, lse = outcome.ops.int8_attention(q, k, v, None, True, 0.1, True, "sm90")
    got, got_lse = training.attend(q, k, v, None, True, 0.1, True)[:2]
    assert torch.equal(got, out)
    assert (got_lse - lse).abs().max() < 1e-4


@pytest.mark.parametrize("d", [64, 96, 128])
def test_what_is_kept_between_the_passes(d):
    q, k, v, _ = inputs(1000, 1000, d, h=4, hkv=4)
    kept = training.attend(q, k, v, None, False, 0.1, False)[2:]
    assert kept[0].numel() == training.workspace_bytes(1, 4, 4, 1000, 1000, d)
    assert sum(x.numel() * x.element_size() for x in kept) <= 0.6 * 4 * 2 * q.numel()
