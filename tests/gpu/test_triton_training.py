"""8-bit attention that trains, in Triton, on a GPU: against fp64, against the reference, again and again.

Its kernels run in Triton's interpreter in tests/kernels/test_triton_training.py; what is left to show is what a GPU does:
its tensor cores' types, tiles in flight, tiles of this GPU's own, NaN, and long sequences.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from comfy_sage3 import reference
from comfy_sage3.kernels import triton_training

from ..training_cases import exact
from . import calls
from .exact import relative_l1
from .test_backward import bounds, largest_row

NAMES = ("dq", "dk", "dv")
LEAST = 0.9995  # cosine with fp64 on N(0,1) inputs: the bar is 0.999 each
OF_REFERENCE, BESIDES = 1.25, 0.004  # of the relative L1 of the reference: scales are grouped a little differently


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch on Linux")
    assert triton_training.absent() is None
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("Triton's 8-bit products need a GPU of sm_80 or newer")


def inputs(lq, lk, d, *, b=1, h=2, hkv=2, dtype=torch.bfloat16, offset=1.0, seed=0):
    q, k, v = calls.qkv(lq, lk, d, b=b, h=h, hkv=hkv, dtype=dtype, seed=seed)
    return q, k + offset, v + offset / 2, calls.randn(*q.shape, seed=seed + 9, dtype=dtype)


def ours(q, k, v, dout, causal=False, scale=None, mask=None, dlse=None):
    """(out, lse), (dq, dk, dv)."""
    calls.poison()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = triton_training.attend(*leaves, mask, causal, calls.scale_of(q, scale), True)[:2]
    calls.poison()
    if dlse is None:
        return (out, lse), torch.autograd.grad(out, leaves, dout)
    return (out, lse), torch.autograd.grad((out, lse), leaves, (dout, dlse))


def cosine(a, b):
    a, b = a.detach().double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def check(q, k, v, dout, causal=False, scale=None, mask=None, dlse=None):
    (out, lse), got = ours(q, k, v, dout, causal, scale, mask, dlse)
    want_out, want_lse, *want = exact(q, k, v, dout, mask, causal, scale, dlse)
    dead = want_lse == -math.inf
    assert torch.equal(lse == -math.inf, dead)
    assert not out[dead].any()
    assert not got[0][dead].any()
    assert (lse - want_lse).masked_fill(dead, 0.0).abs().max() < 0.1
    for name, like, a, e in zip(("out", *NAMES), (q, q, k, v), (out, *got), (want_out, *want), strict=True):
        assert (a.shape, a.dtype) == (like.shape, like.dtype), name
        assert a.isfinite().all(), name
        assert cosine(a, e) > LEAST, (name, cosine(a, e))


@pytest.mark.parametrize("dtype", calls.DTYPES)
@pytest.mark.parametrize("d", [16, 37, 40, 64, 80, 96, 128, 160, 256])
def test_head_dims_and_dtypes(d, dtype):
    check(*inputs(203, 257, d, dtype=dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lq", [2, 63, 64, 65, 203, 1025])
@pytest.mark.parametrize("lk", [97, 128, 129, 1023])
def test_lengths(lq, lk, causal):
    tensors = inputs(lq, lk, 128)
    if not (causal and lq == 2):
        return check(*tensors, causal)
    # Two queries that see one key and two: gradients of q and k are a hundredth of what they could be, of which 8 bits leave
    # up to 0.0012. Their direction says little; their error is small beside that size.
    q, k, v, dout = tensors
    _, got = ours(q, k, v, dout, causal)
    want = exact(q, k, v, dout, None, causal, None, None)[2:]
    for name, a, e, bound in zip(NAMES, got, want, bounds(q, k, v, dout, None), strict=True):
        assert a.isfinite().all(), name
        assert largest_row(a.double() - e) < (0.02 if name == "dv" else 0.004) * bound, name
    assert cosine(got[2], want[2]) > LEAST


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 203, 400), (2, 4, 203, 400), (1, 4, 1, 400)])
def test_masks(shape, dtype, d):
    mask = calls.some_mask(shape, dtype)
    if shape[2] > 1:
        mask[..., 3:9, :] = False if dtype == torch.bool else -math.inf
    check(*inputs(203, 400, d, b=2, h=4, hkv=2), mask=mask, causal=shape[0] == 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h", "hkv"), [(4, 1), (6, 2), (8, 8)])
def test_grouped_heads(h, hkv, causal):
    check(*inputs(300, 400, 64, b=2, h=h, hkv=hkv), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_the_gradient_of_lse(d, causal):
    tensors = inputs(203, 257, d, h=4, hkv=2)
    check(*tensors, causal, dlse=calls.randn(*tensors[0].shape[:3], seed=3, dtype=torch.float32))


def test_a_negative_scale():
    check(*inputs(200, 300, 64), scale=-0.2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_as_near_to_exact_as_the_reference(d, causal):
    q, k, v, dout = inputs(1024, 1024, d, h=2, hkv=1)
    want = exact(q, k, v, dout, causal=causal)[2:]
    _, got = ours(q, k, v, dout, causal)
    wide = [x.float() for x in (q, k, v)]
    options = replace(reference.OUR_INT8, gradient_scales="row")  # INT8 with scales like these kernels'
    out, lse = reference.int8_attention(*wide, is_causal=causal, options=options)
    same = reference.int8_attention_backward(dout.float(), *wide, out, lse, is_causal=causal, options=options)
    for name, a, b, e in zip(NAMES, got, same, want, strict=True):
        assert relative_l1(a, e) < OF_REFERENCE * relative_l1(b, e) + BESIDES, name


@pytest.mark.parametrize("eight_bit_dq", [False, True])
def test_the_bar_at_4096_tokens(eight_bit_dq):
    q, k, v, dout = inputs(4096, 4096, 128, h=1, hkv=1, offset=0.0)
    tiles = triton_training.config(torch.cuda.get_device_capability(), 128)
    config = triton_training.Config(tiles.forward, tiles.keys, tiles.queries, eight_bit_dq)
    out, _, *kept = triton_training.run_forward(q, k, v, None, False, 128**-0.5, False, config)
    got = triton_training.run_backward(dout, None, *kept, None, 1, 4096, False, 128**-0.5, config)
    want_out, _, *want = exact(q, k, v, dout)
    assert cosine(out, want_out) >= 0.9995
    for name, a, e in zip(NAMES, got, want, strict=True):
        assert cosine(a, e) >= 0.999, name


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_the_tiles_of_other_gpus(capability, d):
    """Their shapes, not their machine code."""
    q, k, v, dout = inputs(600, 700, d)
    config = triton_training.config(capability, d)
    out, _, *kept = triton_training.run_forward(q, k, v, None, True, 0.1, False, config)
    got = triton_training.run_backward(dout, None, *kept, None, 2, 700, True, 0.1, config)
    want_out, _, *want = exact(q, k, v, dout, causal=True, scale=0.1)
    for name, a, e in zip(("out", *NAMES), (out, *got), (want_out, *want), strict=True):
        assert cosine(a, e) > LEAST, name


@pytest.mark.parametrize("dtype", calls.DTYPES)
def test_rows_of_tiny_gradients_keep_their_digits(dtype):
    q, k, v, dout = inputs(512, 512, 64, dtype=dtype, offset=0.0)
    powers = (torch.arange(512, device=dout.device) % 5).view(1, 1, -1, 1)
    dout = (dout.float() * 0.1**powers).to(dtype)
    _, got = ours(q, k, v, dout)
    want = exact(q, k, v, dout)[2]
    for power in range(5):
        assert cosine(got[0][:, :, power::5], want[:, :, power::5]) > LEAST, power


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
@pytest.mark.parametrize("d", [64, 128])
def test_fifty_repeats_are_the_same_bits(d, causal):
    tensors = inputs(1025, 2049, d, b=2, h=8, hkv=4)
    (want_out, _), want = ours(*tensors, causal)
    for _ in range(50):
        (out, _), got = ours(*tensors, causal)
        assert torch.equal(out, want_out)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_long_sequence():
    q, k, v, dout = inputs(32768, 32768, 128, h=1, hkv=1)
    (out, _), got = ours(q, k, v, dout)
    # In fp32: with offsets in K and V bf16's dQ has a cosine of 0.995 at this length, by the rounding of its output alone.
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want_out = torch.nn.functional.scaled_dot_product_attention(*leaves)
    want = torch.autograd.grad(want_out, leaves, dout.float())
    for name, a, e in zip(("out", *NAMES), (out, *got), (want_out.detach(), *want), strict=True):
        assert cosine(a, e) > 0.999, name


def test_more_than_two_to_the_31_mask_elements_and_offsets():
    q, k, v, dout = inputs(48000, 48000, 16, h=1, hkv=1)
    mask = torch.ones(1, 1, 48000, 48000, dtype=torch.bool, device=q.device)
    mask[..., 47000:, 24000:] = False
    out, _ = ours(q, k, v, dout, mask=mask)[0]
    want = torch.nn.functional.scaled_dot_product_attention(q[:, :, 47000:], k[:, :, :24000], v[:, :, :24000])
    assert cosine(out[:, :, 47000:], want) > 0.999


def test_any_order_of_memory():
    q, k, v, dout = inputs(203, 257, 64, h=4, hkv=4)
    (want_out, _), want = ours(q, k, v, dout)
    strange = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
    (out, _), got = ours(*strange)
    assert out.stride() == strange[0].stride()
    assert all(torch.equal(a, b) for a, b in zip((out, *got), (want_out, *want), strict=True))


def test_nothing_waits_for_the_device():
    tensors = inputs(257, 1025, 64)
    ours(*tensors)
    torch.cuda.synchronize()
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    done = torch.cuda.Event()
    torch.cuda._sleep(400_000_000)  # about 0.2 seconds
    out = triton_training.attend(*leaves, None, False, 0.125, True)[0]
    torch.autograd.grad(out, leaves, tensors[3])
    done.record()
    assert not done.query()
    torch.cuda.synchronize()
