"""The backward kernels' own sources (csrc/backward), run thread by thread on a CPU: see emulator/machine.h.

Fragments, swizzles, descriptors, the order of products and waits are then those of the kernel; what a GPU may still do
otherwise are memory orders between its engines. All that is read and written starts out as NaN.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_bool, c_float, c_int64, c_void_p

import pytest
import torch

from ..sinks import give_sink
from .emulated import (
    Forward,
    Shape,
    Tensor4,
    build,
    mask_tiles,
    memory,
    normal,
    one_thread,
    setting,
    some_mask,
    translate,
    view,
)

# Statements of the main kernel, and a gradient that goes wrong without: where there are sinks, what suits others' dS is not
# known yet; dS of the other warpgroup is not there yet; dP is not; nor is dQ's product; nor S of the next tile; the last
# sums of dQ have not been read yet.
WITH_SINKS = "sm90::sync_threads<1, 256>();"
WAITS = {
    WITH_SINKS: "dq",
    "sm90::sync_threads_count<1, 256>((bits & asks) != 0, said);": "dq",
    "sm90::wgmma_wait<0>();\n    sm90::pin(y);": "dk",
    "sm90::wgmma_wait<0>();\n    sm90::pin(sums);": "dq",
    "sm90::wgmma_wait<1>();\n    sm90::pin(y);": "dv",
    "if (threadIdx.x % C::kWriters == 0) sm90::await_additions_read();\n    ": "dq",  # not the one at the end
}


class SaveOutput(ctypes.Structure):
    _fields_ = [("shape", Shape), ("out", Tensor4), ("out8", c_void_p), ("out_scale", c_void_p)]


class Backward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        *((name, c_void_p) for name in ("saved", "out8", "out_scale", "lse", "peak")),
        *((name, Tensor4) for name in ("dout", "dq", "dk", "dv")),
        ("scale", c_float), ("workspace", c_void_p), ("causal", c_bool), ("deterministic", c_bool),
        ("mask", Tensor4), ("mask_tiles", c_void_p), ("dlse", c_void_p),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backward")
    sources = {
        "SAGE3_PREPARE": translate("backward/int8_prepare.cu", folder, launches=7),
        "SAGE3_GRAD": translate("backward/int8_grad_sm90.cu", folder, launches=1, omissible=WAITS),
    }
    library = build(folder, "backward_host.cpp", sources)
    library.workspace_bytes.restype = c_int64
    with one_thread():
        yield library


def gradients(host, q, k, v, dout, *, scale=None, causal=False, deterministic=False, mask=None, dlse=None, lower_peak=1.0):
    """((dq, dk, dv) of the kernels, the same in fp64); the forward pass's peaks are ``lower_peak`` of each row's."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    forward = Forward(host, q, k, v, scale, causal, mask)
    exact_out, lse, *exact = forward.exact(dout, dlse)
    out = exact_out[..., : q.shape[3]].to(q.dtype).contiguous()
    lse, peak = lse.float().contiguous(), (forward.peak * lower_peak).contiguous()
    out8, out_scale = torch.empty(out.shape, dtype=torch.int8), torch.full(out.shape[:3], math.nan)
    assert host.save_output(ctypes.byref(SaveOutput(forward.shape, view(out), out8.data_ptr(), out_scale.data_ptr()))) == 0
    assert ((out8 * out_scale.unsqueeze(-1) - out).abs() <= out_scale.unsqueeze(-1) * 0.51).all()
    got = [torch.full(x.shape, math.nan, dtype=q.dtype) for x in (q, k, v)]
    tiles = mask_tiles(mask) if mask is not None else None
    workspace = memory(host.workspace_bytes(ctypes.byref(forward.shape)))
    call = Backward(
        forward.shape, forward.saved.data_ptr(), out8.data_ptr(), out_scale.data_ptr(), lse.data_ptr(), peak.data_ptr(),
        view(dout), *map(view, got), scale, workspace.data_ptr(), causal, deterministic,
        view(mask) if mask is not None else Tensor4(), tiles.data_ptr() if mask is not None else None,
        dlse.data_ptr() if dlse is not None else None,
    )  # fmt: skip
    message = ctypes.create_string_buffer(200)
    assert host.backward(ctypes.byref(call), message) == 0, message.value
    exact[0] *= scale
    return got, [x[..., : q.shape[3]] for x in exact]


def with_sink(queries, keys, d, weight, tiles=None):
    """q, k, v, dout."""
    q, k, v, dout = (normal(1, 1, tokens, d, seed=seed) for seed, tokens in enumerate((queries, keys, keys, queries)))
    return *give_sink(q, k, v, weight, tiles), dout


def cosine(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


LEAST = {"dq": 0.999, "dk": 0.999, "dv": 0.999}  # dK and dV have both operands in e4m3: 0.9991 to 0.9994


def check(got, want):
    for tensor, a, e in zip(LEAST, got, want, strict=True):
        assert a.isfinite().all(), tensor
        assert cosine(a, e) >= LEAST[tensor], tensor


CASES = {
    "one tile, hd64": ((64, 128, 64), {}),
    "one tile, hd96": ((64, 128, 96), {}),
    "one tile, hd128": ((64, 128, 128), {}),
    "ragged ends, bf16": ((203, 257, 128), {"dtype": torch.bfloat16}),
    "hd80 in fp16": ((97, 113, 80), {"dtype": torch.float16}),
    "hd37, token-major, grouped heads, batch": ((130, 150, 37), {"b": 2, "h": 4, "hkv": 2, "token_major": True}),
    "causal, more queries": ((300, 140, 64), {"causal": True}),
    "causal, more keys": ((140, 300, 96), {"causal": True}),
    "causal, grouped heads, in turns": ((200, 300, 128), {"causal": True, "h": 2, "deterministic": True}),
    "in turns": ((130, 300, 64), {"deterministic": True}),
    "one query": ((1, 300, 128), {}),
    "negative scale": ((100, 200, 64), {"scale": -0.2}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_exact_attentions_within_8_bits(host, name):
    (lq, lk, d), more = CASES[name]
    more = dict(more)
    b, h, hkv = more.pop("b", 1), more.pop("h", 1), more.pop("hkv", 1)
    dtype, token_major = more.pop("dtype", torch.float32), more.pop("token_major", False)
    q, dout = (normal(b, h, lq, d, seed=seed, dtype=dtype) for seed in (0, 1))
    k, v = (normal(b, hkv, lk, d, seed=seed, dtype=dtype) + 1 for seed in (2, 3))
    if token_major:
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    got, want = gradients(host, q, k, v, dout, **more)
    check(got, want)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "d"),
    [
        ((1, 1, 150, 400), torch.bool, 64),
        ((2, 2, 150, 400), torch.float32, 128),
        ((2, 1, 1, 400), torch.bool, 128),
        ((1, 2, 150, 400), torch.bfloat16, 96),
        ((1, 1, 150, 400), torch.float16, 64),
    ],
)
def test_masks(host, shape, dtype, d, deterministic):
    q, dout = normal(2, 2, 150, d, seed=0), normal(2, 2, 150, d, seed=1)
    k, v = normal(2, 1, 400, d, seed=2) + 1, normal(2, 1, 400, d, seed=3) + 1
    mask = some_mask(shape, dtype)
    assert set(mask_tiles(mask).flatten().tolist()) >= ({0, 2} if dtype == torch.bool else {0, 2})
    got, want = gradients(host, q, k, v, dout, mask=mask, deterministic=deterministic)
    check(got, want)
    for tensor, a, e in zip(LEAST, got, want, strict=True):
        assert not a[e.abs().amax(-1) == 0].any(), tensor  # nothing where nobody attends


def test_a_mask_of_very_negative_numbers_hides_without_overflow(host):
    """Scores that the mask lowers by 1e4 lie far above the row's LSE before it does."""
    q, k, v, dout = (normal(1, 1, 128, 64, seed=seed) for seed in range(4))
    mask = torch.where(torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(5)) < 0.5, 0.0, -1e4)
    mask[0, 0, 3] = -1e4  # a row whose every key is as unlikely
    got, want = gradients(host, q, k, v, dout, mask=mask)
    check(got, want)


def test_the_gradient_of_lse(host):
    q, k, v, dout = (normal(1, 1, 200, 64, seed=seed) for seed in range(4))
    dlse = normal(1, 1, 200, seed=5)
    got, want = gradients(host, q, k, v, dout, dlse=dlse)
    check(got, want)


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_that_is_missing_is_seen_here(host, wait):
    """Of what this emulation is worth: it does notice."""
    q, k, v, dout = with_sink(203, 203, 64, weight=0.97, tiles=(0, 2) if wait == WITH_SINKS else ())
    with setting(host, omitted=list(WAITS).index(wait)):
        got, want = gradients(host, q, k, v, dout)
    at = ("dq", "dk", "dv").index(WAITS[wait])
    assert not cosine(got[at], want[at]) > 0.99


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_is_not_hidden(host, bad):
    """What scales a loss relies on it, and e4m3 has no infinity."""
    q, k, v, dout = (normal(1, 2, 200, 64, seed=seed) for seed in range(4))
    dout[0, 1, 130, 7] = bad
    got, _ = gradients(host, q, k, v, dout)
    for x in got:
        assert not x[0, 1].isfinite().all()
        assert x[0, 0].isfinite().all()


def test_a_single_key_has_no_gradient_but_its_values(host):
    """Every weight is 1 whatever q and k are; dS is the difference of two equal numbers, one of them in 8 bits."""
    q, dout = normal(1, 1, 5, 64, seed=0), normal(1, 1, 5, 64, seed=1)
    k, v = normal(1, 1, 1, 64, seed=2), normal(1, 1, 1, 64, seed=3)
    (dq, dk, dv), (_, _, want) = gradients(host, q, k, v, dout)
    assert dq.abs().max() == 0  # k less its mean
    assert dk.abs().max() < 0.05 * dv.abs().max()
    assert cosine(dv, want) > 0.999


@pytest.mark.parametrize("lowered", [1.0, 0.5, 0.25])
def test_the_forward_pass_knows_peaks_within_a_factor_of_4(host, lowered):
    q, k, v, dout = (normal(1, 1, 203, 64, seed=seed) for seed in range(4))
    check(*gradients(host, q, k, v, dout, lower_peak=lowered))


@pytest.mark.parametrize(("d", "keys", "weight"), [(64, 1024, 0.9), (64, 4096, 0.5), (128, 1024, 0.5), (96, 2048, 0.7)])
def test_keys_beside_one_that_takes_most_of_every_weight_keep_their_digits(host, d, keys, weight):
    (dq, dk, dv), (wq, wk, wv) = gradients(host, *with_sink(64, keys, d, weight))
    assert cosine(dq, wq) > 0.997  # of the sink's warp only the sink's own is left
    for got, want in ((dk, wk), (dv, wv)):
        assert cosine(got[:, :, 16:], want[:, :, 16:]) > 0.999  # of other warps
        assert cosine(got[:, :, 1:], want[:, :, 1:]) > (0.9977 if d == 96 else 0.998)  # those that share its warp lose


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_tiles_of_queries_with_a_sink_and_without_leave_each_other_alone(host, d, deterministic):
    """What is lifted in one tile is too large in the next, and in a block's warps not the same."""
    inputs = with_sink(320, 512, d, 0.9, tiles=(0, 2, 3))
    (dq, dk, dv), (wq, wk, wv) = gradients(host, *inputs, deterministic=deterministic)
    for tile in range(5):
        rows = slice(64 * tile, 64 * tile + 64)
        assert cosine(dq[:, :, rows], wq[:, :, rows]) > (0.997 if tile in (0, 2, 3) else 0.999), tile
    for got, want in ((dk, wk), (dv, wv)):
        assert cosine(got[:, :, 16:], want[:, :, 16:]) > 0.999


@pytest.mark.parametrize(
    ("d", "keys", "weight", "every", "of_dq", "of_dk"),
    [(64, 1024, 0.9, 2, 0.963, 0.9965), (64, 4096, 0.5, 2, 0.998, 0.999), (128, 1024, 0.8, 8, 0.967, 0.998)],
)
def test_queries_of_one_tile_with_a_sink_and_without(host, d, keys, weight, every, of_dq, of_dk):
    q, k, v, dout = with_sink(128, keys, d, weight)
    q[:, :, torch.arange(128) % every != 0, 0] = 0.0
    (dq, dk, dv), (wq, wk, wv) = gradients(host, q, k, v, dout)
    assert cosine(dq, wq) > 0.998
    assert cosine(dq[:, :, ::every], wq[:, :, ::every]) > of_dq  # small beside others' P, some of which need no lift
    assert cosine(dq[:, :, 1::every], wq[:, :, 1::every]) > 0.999
    assert cosine(dk[:, :, 16:], wk[:, :, 16:]) > of_dk
    assert cosine(dv[:, :, 16:], wv[:, :, 16:]) > 0.999


@pytest.mark.parametrize("form", ["causal", "mask", "in turns"])
def test_a_sink_of_one_head_of_two_that_share_their_keys(host, form):
    q, k, v, dout = with_sink(300, 300, 64, 0.9)
    other = normal(1, 1, 300, 64, seed=7)
    other[..., 0] = 0.0
    q, dout = torch.cat([q, other], 1), torch.cat([dout, normal(1, 1, 300, 64, seed=8)], 1)
    mask = some_mask((1, 2, 300, 300), torch.bool) if form == "mask" else None
    got, want = gradients(host, q, k, v, dout, causal=form == "causal", deterministic=form == "in turns", mask=mask)
    assert cosine(got[0][:, 0], want[0][:, 0]) > 0.995
    assert cosine(got[0][:, 1], want[0][:, 1]) > 0.999
    for a, e in zip(got[1:], want[1:], strict=True):
        assert cosine(a[:, :, 16:], e[:, :, 16:]) > 0.998


@pytest.mark.parametrize("weight", [0.5, 0.9])
def test_what_is_lifted_is_not_cut_off(host, weight):
    """Values of one size and a gradient along them make dS as large as it can be beside its P."""
    q, k, v, _ = with_sink(128, 512, 64, weight)
    v = normal(1, 1, 512, 64, seed=2).sign()
    scores = (q @ k.mT)[0, 0]
    scores[:, 0] = -math.inf
    (dq, dk, _), (wq, wk, _) = gradients(host, q, k, v, v[:, :, scores.argmax(1)].contiguous())
    assert cosine(dq, wq) > 0.999
    assert cosine(dk[:, :, 16:], wk[:, :, 16:]) > 0.999


def test_gradients_along_values_of_one_size_are_not_cut_off_where_peaks_are_known_within_a_factor_of_2(host):
    q, k, v = (normal(1, 1, tokens, 64, seed=seed) for seed, tokens in enumerate((128, 512, 512)))
    v = v.sign()
    dout = v[:, :, (q @ k.mT)[0, 0].argmax(1)].contiguous()
    for lower_peak in (1.0, 0.5):
        check(*gradients(host, q, k, v, dout, lower_peak=lower_peak))


def test_a_gradient_along_the_values_is_not_cut_off(host):
    q, k, v = (normal(1, 1, 256, 64, seed=seed) for seed in range(3))
    dout = v[:, :, (4 * q @ k.mT)[0, 0].argmax(1)].contiguous()
    for lower_peak in (1.0, 0.25):
        check(*gradients(host, 4 * q, k, v, dout, lower_peak=lower_peak))


def test_scores_of_one_head_sharp_and_diffuse(host):
    """Largest weights from 1/600 to 1, so that tiles differ in their gains; causal, from the first row's single key on."""
    q, k, v, dout = (normal(1, 1, 600, 64, seed=seed) for seed in range(4))
    size = torch.where(torch.arange(600) // 100 % 2 == 0, 0.1, 8.0).view(1, 1, 600, 1)
    check(*gradients(host, q * size, k, v, dout, causal=True))
    check(*gradients(host, q * size, k, v, dout))


SIZES = (1.0, 1e4, 0.0, 1e-4, 1e-2, 1e8)  # of dO of each 64 queries


@pytest.mark.parametrize("sizes", [SIZES, SIZES[::-1], (0.0, 0.0, 1.0), (1e-3, 0.0, 0.0)], ids=str)
def test_gains_that_change_from_tile_to_tile(host, sizes):
    count = 64 * len(sizes)
    q, k, v, dout = (normal(1, 1, count, 64, seed=seed) for seed in range(4))
    dout *= torch.tensor(sizes).repeat_interleave(64).view(1, 1, count, 1)
    got, want = gradients(host, q, k, v, dout)
    check(got, want)
    for i, size in enumerate(sizes):
        a, e = (x[0][:, :, 64 * i : 64 * i + 64] for x in (got, want))
        assert not a.any() if size == 0.0 else cosine(a, e) > 0.999, i


@pytest.mark.parametrize("sizes", [(1e25, 1e-30, 1.0), (1e-30, 1e25, 1.0), (1e-37, 1e-37, 1e-37)], ids=str)
def test_gains_at_the_ends_of_floats(host, sizes):
    """Where a tile's gradients vanish beside another's, and where all do, the sums stay numbers."""
    q, k, v, dout = (normal(1, 2, 192, 64, seed=seed) for seed in range(4))
    dout *= torch.tensor(sizes).repeat_interleave(64).view(1, 1, 192, 1)
    dout[:, 1] *= 1e-5
    got, want = gradients(host, q, k[:, :1], v[:, :1], dout)
    for tensor, a, e in zip(LEAST, got, want, strict=True):
        assert a.isfinite().all(), tensor
        assert max(sizes) < 1.0 or cosine(a, e) >= LEAST[tensor], tensor


def test_rows_of_one_tile_of_very_different_gradients(host):
    """A scale for each query: dO of every row another power of ten, which its dQ does not notice."""
    q, k, v = (normal(1, 1, 128, 64, seed=seed) for seed in (0, 1, 2))
    dout = normal(1, 1, 128, 64, seed=3) * 10.0 ** -(torch.arange(128) % 16).view(1, 1, 128, 1)
    got, want = gradients(host, q, k, v, dout)
    check(got, want)
    for row in range(128):
        assert cosine(got[0][:, :, row], want[0][:, :, row]) > 0.998, row


def test_rows_of_tiny_gradients_keep_their_digits(host):
    """dO of every 64 queries a millionth of the last ones': each tile has scales of its own, so nothing is rounded to 0."""
    q, k, v = (normal(1, 1, 256, 64, seed=seed) for seed in (0, 1, 2))
    dout = normal(1, 1, 256, 64, seed=3) * 1e-6 ** (torch.arange(256) // 64).view(1, 1, 256, 1)
    (dq, _, _), (want, _, _) = gradients(host, q, k, v, dout)
    for tile in range(4):
        rows = slice(64 * tile, 64 * tile + 64)
        assert cosine(dq[:, :, rows], want[:, :, rows]) > 0.999, tile


def test_a_number_that_is_none_spoils_its_row_and_is_seen(host):
    q, k, v, dout = (normal(1, 1, 128, 64, seed=seed) for seed in range(4))
    dout[0, 0, 70, 3] = math.nan
    (dq, _, dv), _ = gradients(host, q, k, v, dout)
    assert dq[0, 0, 70].isnan().any()
    assert dv.isnan().any()
    assert dq[0, 0, :64].isfinite().all()


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_an_lse_gradient_that_is_no_number_is_seen_and_leaves_the_values_alone(host, number):
    q, k, v, dout = (normal(1, 1, 128, 64, seed=seed) for seed in range(4))
    dlse = normal(1, 1, 128, 1, seed=5)[..., 0].contiguous()
    dlse[0, 0, 70] = number
    (dq, dk, dv), (_, _, want) = gradients(host, q, k, v, dout, dlse=dlse)
    assert not dq[0, 0, 70].isfinite().any()
    assert not dk.isfinite().all()
    assert dq[0, 0, :64].isfinite().all()
    assert cosine(dv, want) > LEAST["dv"]


def test_values_that_are_signs_are_no_constants(host):
    """A norm of exactly 1 is a constant channel's mark, and theirs."""
    q, k, dout = (normal(1, 1, 128, 64, seed=seed) for seed in range(3))
    v = torch.tensor([[1.0]])
    while v.shape[0] < 128:
        v = torch.cat([torch.cat([v, v], 1), torch.cat([v, -v], 1)])
    v = v[:, 1:65].contiguous()[None, None]  # rows of a Hadamard matrix: each channel's mean is 0, its norm 1
    check(*gradients(host, q, k, v, dout.sign()))


def test_the_order_of_the_sums_does_not_depend_on_deterministic_where_blocks_come_in_turn(host):
    """Blocks run one after the other here, so both variants must give the same bits for causal calls."""
    q, k, v, dout = (normal(1, 1, 200, 64, seed=seed) for seed in range(4))
    first, _ = gradients(host, q, k, v, dout, causal=True)
    second, _ = gradients(host, q, k, v, dout, causal=True, deterministic=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
