"""The 4-bit quantisation kernels: the workspace, bit for bit, against reference/operands.py.

The layout is written down a second time here, as reshapes: csrc/include/sage3/nvfp4_format.cuh says what each axis is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from comfy_sage3.reference import operands

from .calls import DEVICE, DTYPES, poison, qkv, randn
from .conftest import fp4_operators

LENGTHS = (1, 16, 31, 97, 128, 129, 1000, 4096)
HEAD_DIMS = (40, 64, 96, 128, 200, 256)
TILE, LEVEL_BYTES = 128, 16


@pytest.fixture(scope="module")
def ops() -> Any:
    """The built library, where it has the 4-bit kernels."""
    return fp4_operators()


def _halves(record: Tensor) -> Tensor:
    """Bytes (..., n) -> half bytes (..., 2 n), the lower first."""
    return torch.stack((record & 15, record >> 4), -1).flatten(-2)


def _ordered(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """These last axes, in this order."""
    return x.movedim(axes, tuple(range(-len(axes), 0)))


def _tokens_of_columns(x: Tensor) -> Tensor:
    """(..., 128 columns of Q K^T, n) -> (..., 128 tokens, n)."""
    return x.unflatten(-2, (4, 4, 4, 2)).transpose(-4, -3).flatten(-5, -2)


def query_codes(record: Tensor, d: int) -> Tensor:
    """[warp][step][g][t][k / 32][row / 8][8 channels] -> (..., 128, d)."""
    x = _halves(record).unflatten(-1, (8, d // 64, 8, 4, 2, 2, 8))
    return _ordered(x, (-7, -2, -5, -6, -3, -4, -1)).flatten(-7, -5).flatten(-4)


def query_scales(record: Tensor, d: int) -> Tensor:
    """[warp][pair of steps][g][step % 2][row / 8][4 blocks] -> (..., 128, d / 16)."""
    x = record.unflatten(-1, (8, max(d // 128, 1), 8, 2, 2, 4))
    return _ordered(x, (-6, -2, -4, -5, -3, -1)).flatten(-6, -4).flatten(-3)[..., : d // 16]


def key_codes(record: Tensor, d: int) -> Tensor:
    """-> (..., 128, d)."""
    x = _halves(record)
    if d == 64:  # [pair of n8 tiles][column][t][n8 tile][k / 32][8 channels]
        x = _ordered(x.unflatten(-1, (8, 8, 4, 2, 2, 8)), (-6, -3, -5, -2, -4, -1))
        return _tokens_of_columns(x.flatten(-3).flatten(-4, -2))
    x = x.unflatten(-1, (16, d // 128, 8, 4, 2, 2, 8))  # [n8 tile][pair of steps][column][t][step][k / 32][8 channels]
    x = _ordered(x, (-7, -5, -6, -3, -2, -4, -1))
    return _tokens_of_columns(x.flatten(-5).flatten(-3, -2))


def key_scales(record: Tensor, d: int) -> Tensor:
    """[step][column][n8 tile % 4][n8 tile / 4][4 blocks] -> (..., 128, d / 16)."""
    x = _ordered(record.unflatten(-1, (d // 64, 8, 4, 4, 4)), (-2, -3, -4, -5, -1))
    return _tokens_of_columns(x.flatten(-2).flatten(-4, -2))


def value_codes(record: Tensor, d: int) -> Tensor:
    """[n8 tile][column][t][step of 64 tokens][k / 32][8 tokens] -> (..., 128, d)."""
    x = _ordered(_halves(record).unflatten(-1, (d // 8, 8, 4, 2, 2, 8)), (-3, -2, -4, -1, -6, -5))
    return x.flatten(-6, -3).flatten(-2)


def value_scales(record: Tensor, d: int) -> Tensor:
    """[128 channels][word / 4][column][n8 tile % 4][word % 4][4 blocks] -> (..., 8, d); words [64 tokens][32 channels]."""
    width = min(d, 128)
    x = _ordered(record.unflatten(-1, (d // width, width // 64, 8, 4, 4, 4)), (-5, -2, -1, -3, -4))
    x = x.flatten(-5, -4).unflatten(-4, (2, width // 32))  # half, 64 tokens, 32 channels, block, n8 tile, column
    return _ordered(x, (-5, -3, -6, -4, -2, -1)).flatten(-4).flatten(-3, -2)


@dataclass(frozen=True)
class Unpacked:
    """A workspace, with codes and scales in natural order and channels padded to 64, 128 or 256."""

    queries: operands.Operand
    keys: operands.Operand
    values: operands.Operand
    delta: Tensor  # (jobs of a chunk, key tiles, 16, 4, 4), a view


def unpack(workspace: Tensor, q: Tensor, k: Tensor) -> Unpacked:
    """The parts of fp4_quantize's workspace."""
    b, h, lq, head_dim = q.shape
    hkv, lk = k.shape[1], k.shape[2]
    d = next(n for n in (64, 128, 256) if head_dim <= n)
    query_tiles, key_tiles = -(-lq // TILE), -(-lk // TILE)
    at = 0

    def take(size: int) -> Tensor:
        nonlocal at
        part = workspace[at : at + size]
        assert part.numel() == size
        at += -(-size // 256) * 256
        return part

    def records(heads: int, tiles: int, *sizes: int) -> list[Tensor]:
        return list(take(b * heads * tiles * sum(sizes)).view(b, heads, tiles, -1).split(sizes, -1))

    def floats(*shape: int) -> Tensor:
        return take(4 * torch.Size(shape).numel()).view(torch.float32).view(shape)

    codes, scales = TILE * d // 2, TILE * d // 16
    q_codes, q_scales, q_level = records(h, query_tiles, codes, 4 * 8 * 32 * max(d // 128, 1), LEVEL_BYTES)
    k_codes, k_scales, k_level = records(hkv, key_tiles, codes, scales, LEVEL_BYTES)
    v_codes, v_scales = records(hkv, key_tiles, codes, scales)
    q_mean, k_mean, v_mean = floats(b, h, query_tiles, d), floats(b, hkv, 1, d), floats(b, hkv, 1, d)
    v_level = floats(b, hkv, 1)
    jobs = b * h * query_tiles
    chunk = min(max((256 << 20) // (key_tiles * 1024), 1), jobs)
    delta = floats(chunk, key_tiles, 16, 4, 4)
    assert at == workspace.numel()

    def level(part: Tensor) -> Tensor:
        four = part.contiguous().view(torch.float32)
        assert (four[..., 1:] == 0).all()
        return four[..., 0]

    def natural(order: Callable[[Tensor, int], Tensor], part: Tensor) -> Tensor:
        return order(part, d).flatten(2, 3)

    return Unpacked(
        operands.Operand(natural(query_codes, q_codes), natural(query_scales, q_scales), level(q_level), q_mean),
        operands.Operand(natural(key_codes, k_codes), natural(key_scales, k_scales), level(k_level), k_mean),
        operands.Operand(natural(value_codes, v_codes), natural(value_scales, v_scales), v_level, v_mean),
        delta,
    )


def same(got: Tensor, want: Tensor) -> bool:
    """Bit for bit over want's channels, NaN as NaN; beyond them zeros."""
    here, beyond = got[..., : want.shape[-1]], got[..., want.shape[-1] :]
    return torch.equal(here.nan_to_num(1e38), want.nan_to_num(1e38)) and not beyond.any()


def check(ops: Any, q: Tensor, k: Tensor, v: Tensor, scale: float = 0.1) -> Unpacked:
    """Quantise, on memory full of NaN, and hold every part against the reference."""
    before = [x.clone() for x in (q, k, v)]
    poison(16)
    workspace = ops.fp4_quantize(q, k, v, scale, None)
    for mine, old in zip((q, k, v), before, strict=True):
        assert torch.equal(mine.nan_to_num(), old.nan_to_num()), "an input has changed"
    got = unpack(workspace, q, k)
    want = (operands.quantize_queries(q, scale), operands.quantize_keys(k), operands.quantize_values(v))
    for name, mine, theirs in zip("qkv", (got.queries, got.keys, got.values), want, strict=True):
        assert same(mine.means, theirs.means), f"{name}: means"
        assert same(mine.levels, theirs.levels), f"{name}: levels"
        assert same(mine.scales, theirs.scales), f"{name}: scales"
        assert same(mine.codes, theirs.codes), f"{name}: codes"
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_every_length_has_the_bits_of_the_reference(ops, d, dtype):
    for n, length in enumerate(LENGTHS):
        check(ops, *qkv(length, LENGTHS[-1 - n], d, dtype=dtype, seed=n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(ops, dtype):
    wide = randn(2, 300, 4, 256, dtype=dtype)
    q, k, v = (wide[:, :, :, i * 64 : i * 64 + 64].transpose(1, 2) for i in range(3))  # (B, N, H, 3 D)
    check(ops, q, k, v)
    check(ops, q[:, :, ::3], k[:, :1].expand(-1, 4, -1, -1), v.flip(2))
    odd = randn(2, 2, 129, 97, dtype=dtype)
    check(ops, odd[..., 1:], odd[:, :, 3:, 1:], odd[:, :, 3:, :-1])
    turned = randn(2, 2, 96, 200, dtype=dtype).transpose(2, 3)
    check(ops, turned, turned[:, :, 7:], turned[:, :, 7:])


def test_key_heads_may_be_shared_and_the_scale_negative(ops):
    for scale in (0.3, -0.3, 0.0):
        check(ops, *qkv(257, 391, 128, h=6, hkv=2), scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e-4, 1e4, 1e20, 1e36])
def test_any_magnitude(ops, size, dtype):
    check(ops, *(x * size for x in qkv(203, 600, 64, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_outliers_and_constants(ops, dtype):
    q, k, v = qkv(300, 600, 128, dtype=dtype)
    offset = 20 * randn(1, 1, 1, 128, seed=5, dtype=dtype)
    check(ops, q + offset, k - offset, v + offset)
    spread = torch.logspace(-6, 4, 600, device=DEVICE).to(dtype)[:, None]
    check(ops, q * spread[:300], k * spread, v * spread)
    v[:, :, 400, 7] = 30000.0  # not in the sample: far beyond 448 levels
    check(ops, torch.ones_like(q), torch.zeros_like(k), v)
    check(ops, torch.zeros_like(q), torch.ones_like(k), torch.full_like(v, 3.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_scale_nan(ops, bad):
    for which in range(3):
        for token in (0, 600):
            tensors = list(qkv(700, 700, 64))
            tensors[which][1, 1, token, 17] = bad
            got = check(ops, *tensors)
            mine = (got.queries, got.keys, got.values)[which]
            if which < 2:
                assert (mine.scales[1, 1, token] == 0x7F).all()
            else:
                assert mine.scales[1, 1, token // 16, 17] == 0x7F
                assert (mine.scales == 0x7F).sum() == (1 if mine.means.isfinite().all() else 44)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [40, 64, 200, 256])
def test_the_lse_gets_what_the_mean_took(ops, d, dtype):
    q, k, v = qkv(300, 700, d, h=4, hkv=2, dtype=dtype)
    lse = torch.full(q.shape[:3], float("nan"), device=DEVICE)
    got = unpack(ops.fp4_quantize(q, k + 1, v, -0.2, lse), q, k)
    mean = got.keys.means[..., :d].double().repeat_interleave(2, 1)
    want = -0.2 * (q.double() @ mean.mT).squeeze(-1)
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=2e-6 * d)


def _jobs(b: int, h: int, tiles: int, causal: bool) -> list[tuple[int, int]]:
    """Head, counted with the batch, and query tile of every job."""
    heads = b * h
    if causal:
        return [(j % heads, tiles - 1 - j // heads) for j in range(heads * tiles)]
    return [divmod(j, tiles) for j in range(heads * tiles)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lq", "lk", "d"), [(1, 1, 64), (700, 391, 40), (391, 1000, 128), (130, 129, 200), (9000, 300, 64)])
def test_delta(ops, lq, lk, d, dtype, causal):
    q, k, v = qkv(lq, lk, d, h=4, hkv=2, dtype=dtype)
    q, k = q + 2 * randn(1, 4, 1, d, seed=7, dtype=dtype), k + 3
    workspace = ops.fp4_quantize(q, k, v, -0.2, None)
    parts = unpack(workspace, q, k)
    tiles, key_tiles = -(-lq // TILE), -(-lk // TILE)
    jobs = _jobs(2, 4, tiles, causal)
    padded = parts.keys.means.shape[-1]
    centred = torch.zeros(2, 2, key_tiles * TILE, padded, dtype=torch.float64, device=DEVICE)
    centred[:, :, :lk, :d] = k.double() - parts.keys.means[..., :d].double()
    centred = (centred / parts.keys.levels.double().repeat_interleave(TILE, -1).unsqueeze(-1)).repeat_interleave(2, 1)
    means = -parts.queries.means.double() / parts.queries.levels.double().unsqueeze(-1)
    want, size = means @ centred.mT, means.abs() @ centred.abs().mT  # (B, H, tiles, tokens)
    for first, count in ((0, len(jobs)), (len(jobs) // 3, len(jobs) // 2 + 1)):
        count = min(count, len(jobs) - first)
        parts.delta.fill_(float("nan"))
        ops.fp4_correct(workspace, q, k, causal, -0.2, first, count)
        columns = parts.delta[..., :2].flatten(2).unsqueeze(-1)  # (jobs, key tiles, 128 columns, 1)
        got = _tokens_of_columns(columns).flatten(1).double()  # (jobs, tokens)
        for local, (head, tile) in enumerate(jobs[first : first + count]):
            seen = min(key_tiles, tile + 1 if causal else key_tiles) * TILE
            error = (got[local, :seen] - want.flatten(0, 1)[head, tile, :seen]).abs()
            assert (error <= 1e-5 * size.flatten(0, 1)[head, tile, :seen]).all()
            assert torch.equal(parts.delta[local, : seen // TILE, ..., :2], parts.delta[local, : seen // TILE, ..., 2:])
            assert (got[local, lk:seen] == 0).all()
        assert parts.delta[count:].isnan().all(), "more than was asked for"
