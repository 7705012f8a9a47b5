"""The backward kernels' own sources (csrc/backward), run thread by thread on a CPU: see emulator/machine.h.

Fragments, swizzles, descriptors, the order of products and waits are then those of the kernel; what a GPU may still do
otherwise are memory orders between its engines. All that is read and written starts out as NaN.
"""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from comfy_sage3.kernels import training
from comfy_sage3.kernels.sources import find_tree

from .test_nvfp4 import cxx

HERE = Path(__file__).parent
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.bool: 3}
LAUNCH = re.compile(r"(?m)^( *)(.+?)<<<(.+), (.+?), (.+?), stream>>>\((\w+)\);")
SHARED = "extern __shared__ __align__(1024) unsigned char memory[];"


class Shape(ctypes.Structure):
    _fields_ = [(name, c_int) for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim")]


class Tensor4(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 4), ("dtype", c_int)]


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
    return build(tmp_path_factory.mktemp("backward"))


def build(folder, omit=None):
    """The sources as a library for this CPU; without the statement ``omit`` of the main kernel."""
    defines = []
    for macro, stem, launches in (("SAGE3_PREPARE", "int8_prepare", 6), ("SAGE3_GRAD", "int8_grad_sm90", 1)):
        text = (find_tree().root / "backward" / f"{stem}.cu").read_text(encoding="utf-8")
        if omit is not None and stem == "int8_grad_sm90":
            assert text.count(omit) == 1
            text = text.replace(omit, "")
        text = text.replace(SHARED, "unsigned char* const memory = emulator::shared_memory();")
        text = text.replace("__shared__ alignas(16) T", "alignas(16) __shared__ T")  # where C++ wants it
        text, found = LAUNCH.subn(r"\1emulator::run(\3, \4, \5, [&] { \2(\6); });", text)
        assert found == launches
        text = text.replace("namespace {\n", f"namespace {stem} {{\n", 1)  # both files become one
        text = text.replace("}  // namespace\n", f"}}  // namespace\nusing namespace {stem};\n", 1)
        (folder / f"{stem}.cu").write_text(text, encoding="utf-8")
        defines.append(f'-D{macro}="{folder / f"{stem}.cu"}"')
    flags = ["-std=c++20", "-O2" if omit is None else "-O0", "-w", "-ffp-contract=off", "-shared", "-fPIC", *defines]
    includes = [f"-I{HERE / 'emulator'}", f"-I{find_tree().root / 'include'}"]
    command = [cxx(), *flags, *includes, "-o", folder / "host.so", HERE / "backward_host.cpp"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    library = ctypes.CDLL(str(folder / "host.so"))
    library.saved_bytes.restype = library.workspace_bytes.restype = c_int64
    return library


def view(x):
    strides = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return Tensor4(x.data_ptr(), (c_int64 * 4)(*strides), DTYPES[x.dtype])


def mask_tiles(mask):
    """mask_tiles.cuh's byte for every 64 x 128 of a mask (B or 1, H or 1, Lq or 1, Lk): nobody, everybody, mixed."""
    hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
    plain = mask if mask.dtype == torch.bool else mask == 0
    (b, h, lq, lk), found = mask.shape, []
    for rows in torch.arange(lq).split(64):
        for columns in torch.arange(lk).split(128):
            part = (..., rows[:, None], columns)
            none, every = hidden[part].all(-1).all(-1), plain[part].all(-1).all(-1)
            found.append(torch.where(none, 0, torch.where(every, 1, 2)))
    return torch.stack(found, -1).to(torch.uint8).reshape(b, h, -1, -(-lk // 128)).contiguous()


def memory(size):
    """1024-byte aligned, all NaN."""
    block = torch.full((size + 1024,), 0xFF, dtype=torch.uint8)
    start = -block.data_ptr() % 1024
    return block[start : start + size]


def to_tokens(x, count):
    return F.pad(x, (0, 0, 0, count - x.shape[2]))


def codes(x, dims):
    scale = x.abs().amax(dims, keepdim=True) / 127
    return (x / torch.where(scale == 0, 1.0, scale)).round(), scale


class Forward:
    """What the forward pass leaves of q, k and v, and the attention of what it stands for."""

    def __init__(self, host, q, k, v, scale, causal, mask=None):
        (b, h, lq, d), (hkv, lk) = q.shape, k.shape[1:3]
        self.shape, self.dim = Shape(b, h, hkv, lq, lk, d), training.padded_head_dim(d)
        q, k, v = (F.pad(x.float(), (0, self.dim - d)) for x in (q, k, v))
        self.saved = memory(host.saved_bytes(ctypes.byref(self.shape)))
        self.at = (c_int64 * 8)()
        host.saved_parts(ctypes.byref(self.shape), self.at)
        offsets = [torch.empty(n, self.dim, dtype=torch.int32) for n in (64, 128, 128)]
        host.saved_offsets(self.dim, *(c_void_p(x.data_ptr()) for x in offsets))

        query_tiles, key_tiles = -(-lq // 64), -(-lk // 128)
        log2e = math.log2(math.e)
        q8, s = codes(q * scale * log2e, (-1,))
        self.put_codes(0, to_tokens(q8, query_tiles * 64).unflatten(2, (-1, 64)), offsets[0])
        self.put(1, to_tokens(s, query_tiles * 64))
        self.q = q8 * s / log2e  # with the softmax scale
        k8, s = codes(to_tokens(k - k.mean(2, keepdim=True), key_tiles * 128).unflatten(2, (key_tiles, 16, 4, 2)), (3, 5, 6))
        self.put_codes(2, k8.flatten(3, 5), offsets[1])
        self.put(3, s)
        self.k = (k8 * s).flatten(2, 5)[:, :, :lk]
        mean, norm = v.mean(2, keepdim=True), v.std(2, keepdim=True, unbiased=False)
        norm = torch.where(norm > 1e-3, norm, 1.0)
        v8, s = codes(to_tokens((v - mean) / norm, key_tiles * 128).unflatten(2, (-1, 128)).unflatten(-1, (-1, 32)), (3, 5))
        self.put_codes(4, v8.flatten(-2), offsets[2])
        self.put(5, F.pad(s.flatten(2), (0, 0)).reshape(-1, self.dim // 32), columns=4)
        self.put(6, mean)
        self.put(7, norm)
        self.v = (v8 * s).flatten(-2).flatten(2, 3)[:, :, :lk] * norm + mean
        self.causal, self.mask = causal, mask

    def put(self, part, x, columns=None):
        x = x if columns is None else F.pad(x, (0, columns - x.shape[1]))
        found = x.contiguous().view(torch.uint8).flatten()
        self.saved[self.at[part] : self.at[part] + found.numel()] = found

    def put_codes(self, part, x, offsets):
        """x (B, H, tiles, tokens, D)."""
        tiles = torch.empty(*x.shape[:3], offsets.numel(), dtype=torch.int8)
        tiles[..., offsets.flatten().long()] = x.to(torch.int8).flatten(3)
        self.put(part, tiles)

    def exact(self, dout, dlse=None):
        """(out, lse, dq, dk, dv) in fp64 of the values that the codes stand for; dq without the softmax scale."""
        group = self.shape.heads // self.shape.kv_heads
        q, k, v = self.q.double(), *(x.double().repeat_interleave(group, 1) for x in (self.k, self.v))
        dout = F.pad(dout.double(), (0, self.dim - dout.shape[3]))
        scores = q @ k.mT
        if self.causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, -math.inf)
        elif self.mask is not None:
            scores = scores + self.mask.double()
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))  # a row that attends nothing is 0
        out, dp = p @ v, dout @ v.mT
        ds = p * (dp - (dout * out).sum(-1, keepdim=True) + (0.0 if dlse is None else dlse.double().unsqueeze(-1)))
        dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ q, p.mT @ dout))
        self.peak = p.amax(-1).float()
        return out, lse, ds @ k, dk, dv


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
    assert host.backward(ctypes.byref(call)) == 0
    exact[0] *= scale
    return got, [x[..., : q.shape[3]] for x in exact]


def cosine(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


LEAST = {"dq": 0.9998, "dk": 0.999, "dv": 0.999}  # dK and dV have both operands in e4m3: 0.9991 to 0.9994


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


def some_mask(shape, dtype):
    """Tiles that hide everything, nothing and some of it; rows that may attend nothing; values of -inf."""
    lq, lk = shape[-2:]
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.7
    kept[..., :128] = True
    kept[..., 128:256] = False
    if lq > 70:
        kept[..., 64:70, :] = False
    if dtype == torch.bool:
        return kept
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    return torch.where(kept, torch.where(torch.arange(lk) < 128, torch.zeros_like(bias), bias), -math.inf)


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


@pytest.mark.parametrize(
    ("omit", "spoilt"),
    [
        ("sm90::sync_threads<1, 256>();", "dq"),  # dS of the other warpgroup is not there yet
        ("sm90::wgmma_wait<0>();\n    sm90::pin(y);", "dk"),  # dP is not
        ("sm90::wgmma_wait<0>();\n    sm90::pin(sums);", "dq"),  # nor is dQ's product
        ("sm90::wgmma_wait<1>();\n    sm90::pin(y);", "dv"),  # nor S of the next tile
        # the last sums of dQ have not been read yet
        ("if (threadIdx.x % C::kWriters == 0) sm90::await_additions_read();\n    ", "dq"),
    ],
)
def test_a_wait_that_is_missing_is_seen_here(tmp_path, omit, spoilt):
    """Of what this emulation is worth: it does notice."""
    q, k, v, dout = (normal(1, 1, 203, 64, seed=seed) for seed in range(4))
    got, want = gradients(build(tmp_path, omit), q, k, v, dout)
    at = ("dq", "dk", "dv").index(spoilt)
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
        assert not a.any() if size == 0.0 else cosine(a, e) > 0.9998, i


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
        assert cosine(got[0][:, :, row], want[0][:, :, row]) > 0.999, row


def test_rows_of_tiny_gradients_keep_their_digits(host):
    """dO of every 64 queries a millionth of the last ones': each tile has scales of its own, so nothing is rounded to 0."""
    q, k, v = (normal(1, 1, 256, 64, seed=seed) for seed in (0, 1, 2))
    dout = normal(1, 1, 256, 64, seed=3) * 1e-6 ** (torch.arange(256) // 64).view(1, 1, 256, 1)
    (dq, _, _), (want, _, _) = gradients(host, q, k, v, dout)
    for tile in range(4):
        rows = slice(64 * tile, 64 * tile + 64)
        assert cosine(dq[:, :, rows], want[:, :, rows]) > 0.9999, tile


def test_a_number_that_is_none_spoils_its_row_and_is_seen(host):
    q, k, v, dout = (normal(1, 1, 128, 64, seed=seed) for seed in range(4))
    dout[0, 0, 70, 3] = math.nan
    (dq, _, dv), _ = gradients(host, q, k, v, dout)
    assert dq[0, 0, 70].isnan().any()
    assert dv.isnan().any()
    assert dq[0, 0, :64].isfinite().all()


def test_the_order_of_the_sums_does_not_depend_on_deterministic_where_blocks_come_in_turn(host):
    """Blocks run one after the other here, so both variants must give the same bits for causal calls."""
    q, k, v, dout = (normal(1, 1, 200, 64, seed=seed) for seed in range(4))
    first, _ = gradients(host, q, k, v, dout, causal=True)
    second, _ = gradients(host, q, k, v, dout, causal=True, deterministic=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
