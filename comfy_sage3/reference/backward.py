"""The gradient of 8-bit attention: arXiv 2505.11594 algorithm 3, and two forms of it that kernels here compute.

The paper's ("block" scales): every product in INT8 but dO V^T, psi(X) with one scale for a block of X.

Ours differ where a scale for a block costs accuracy or what is saved would cost memory. Both start from the codes of the
forward pass, V's too, and from its output in 8 bits, one scale a token: the gradient of the function that was computed, and
half the memory. delta = rowsum(dO O) then matches dO V^T.

* "row" scales (the Triton kernels): dV and dK in INT8, dQ in bf16, like dP. P and dS have one scale for a key and 64
  queries, a row of the tiles of P^T and dS^T that are contracted; Q and dO one for 64 queries by 32 channels.
* "query" scales (the kernel for Hopper, csrc/include/sage3/backward_format.cuh): dV, dK and dQ in e4m3. The sums of dV and
  dK stay in fp32 from the first query to the last, so that a scale can only be a query's. P and dS are in units of a query's
  largest weight and of a, max|dO| / 2 < a <= max|dO|, both powers of two; Q and dO take these units over, less what 64
  queries have in common. Keys far below a query's largest weight would fall below e4m3's last step: 16 of them, for 64
  queries, are lifted by one more power of two (``_lifts``). The kernel adds to dQ in fp16 what each tile of 128 keys gives;
  here all of it is fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError
from . import smoothing
from .formats import (
    E4M3_MAX,
    INT8_MAX,
    K_BLOCK,
    Q_BLOCK,
    UINT8_MAX,
    Granularity,
    pad_to,
    quantize_int8,
    round_e4m3,
    round_float_,
    round_int8_channels,
    round_magnitude_,
)
from .forward import Int8Options, by_kv_head, mean_scores, round_tokens, softmax_scale
from .tiles import Plan, Shape, finite, hide_, pair_ranges, row_ranges


@torch.no_grad()
def int8_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, mask: Tensor | None = None,
    is_causal: bool = False, scale: float | None = None, options: Int8Options | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of ``int8_attention`` with respect to q, k and v.

    For each block of 128 rows i and 64 keys j, with psi(X) = INT8 with one scale for the block:
    S = Q K^T as in the forward pass; P = exp(S - lse); dV_j += psi(P)^T psi(dO_i); dP = dO_i V_j^T, not quantised;
    dS = P (dP - rowsum(dO O)); dQ_i += psi(dS) psi(K_j); dK_j += psi(dS)^T psi(Q_i).

    Args:
        dout: gradient of the loss with respect to ``out``, (B, H, Lq, D).
        q, k, v: as given to the forward pass.
        out, lse: what the forward pass returned for them, with the same options.
        mask, is_causal, scale, options: as in the forward pass. The mask itself gets no gradient.

    Returns:
        dq (B, H, Lq, D), dk and dv (B, Hkv, Lk, D), summed over the query heads that share a key head, in the
        dtypes of q, k and v. Rows that see no key give and receive 0.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
    """
    options = options or Int8Options()
    shape = Shape.of(q, k, v)
    if dout.shape != q.shape or out.shape != q.shape or lse.shape != q.shape[:3]:
        raise InputError(
            f"For q {tuple(q.shape)} give dout and out of that shape and lse {tuple(q.shape[:3])}, "
            f"got {tuple(dout.shape)}, {tuple(out.shape)} and {tuple(lse.shape)}."
        )
    full_mask = shape.mask(mask)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if q.numel() == 0 or k.numel() == 0:
        return dq, dk, dv
    scale = softmax_scale(scale, shape.head_dim)
    q32, k32, v32, do32 = q.float(), k.float(), v.float(), dout.float()
    lse32, mean_k = lse.float(), smoothing.token_mean(k32)
    if options.smooth_k:  # the forward pass reported the LSE of the unsmoothed scores
        k32 = k32 - mean_k
        lse32 = lse32 - mean_scores(q32, mean_k, scale, shape)
    delta = (do32 * out.float()).sum(-1)

    def psi(x: Tensor, role: Literal["q", "k"], granularity: Granularity = "block") -> Tensor:
        return round_tokens(x, granularity, role, options) if options.quantize else x

    fp8 = options.products == "fp8"
    # The scores repeat the forward pass. Where tokens are summed over, only a scale per block can leave the product.
    q_scores, q_block = (by_kv_head(x, shape) for x in (psi(q32, "q", options.granularity), psi(q32, "q")))
    k_scores, k_block = (pad_to(x, -2, K_BLOCK) for x in (psi(k32, "k", options.granularity), psi(k32, "k")))
    row_scales, query_scales = (options.gradient_scales == form and options.quantize for form in ("row", "query"))
    units = None
    if row_scales or query_scales:
        do_dp, v_dp, k_block = _bf16(do32), _bf16(_forward_values(v32, options)), _bf16(k_scores)
        delta = (do_dp * quantize_int8(out, "token", "q").dequantize()).sum(-1)
        if query_scales:
            units = _Units.of(do_dp, q_scores.flatten(1, 2), k_scores, v_dp, shape)
            do_dp, delta = do_dp / units.a.unsqueeze(-1), delta / units.a * units.value.repeat_interleave(shape.groups, 1)
            do_block, q_block, k_block, v_dp = do_dp, q_scores.flatten(1, 2), units.k, v_dp * units.value.unsqueeze(-1)
        else:
            do_block, q_block = _psi_groups(do_dp), _psi_groups(q_scores.flatten(1, 2))
        q_block, v_dp = by_kv_head(q_block, shape), pad_to(v_dp, -2, K_BLOCK)
    else:
        do_block = psi(do32, "q")
        do_dp, v_dp = (do_block, psi(v32, "k")) if options.do_v == "int8" else (do32, v32)
        v_dp = pad_to(v_dp, -2, K_BLOCK)
    do_block, do_dp = by_kv_head(do_block, shape), by_kv_head(do_dp, shape)
    lse32, delta = (x.unflatten(1, (shape.kv_heads, shape.groups)) for x in (finite(lse32), delta))

    plan = Plan.for_device(q.device, shape)
    d, g = shape.head_dim, shape.groups
    for bs, hs in pair_ranges(shape, plan.pairs):
        keys, keys_block, values = (x[bs, hs].flatten(0, 1) for x in (k_scores, k_block, v_dp))
        n = keys.shape[0]
        dk_acc, dv_acc = torch.zeros_like(keys), torch.zeros_like(keys)
        for r0, r1 in row_ranges(shape.q_tokens, plan.rows):
            width = g * (r1 - r0)
            rows, rows_block, do_rows, do_rows_block = (
                x[bs, hs, :, r0:r1].reshape(n, width, d) for x in (q_scores, q_block, do_dp, do_block)
            )
            row_lse, row_delta = (x[bs, hs, :, r0:r1].reshape(n, 1, width) for x in (lse32, delta))
            dq_acc = torch.zeros_like(rows)
            padded = keys.shape[1]
            seen = min(padded, -(-r1 // K_BLOCK) * K_BLOCK) if is_causal else padded
            ranges = [(c0, min(c0 + plan.keys, seen)) for c0 in range(0, seen, plan.keys)]
            tile = _Tile(shape, scale, is_causal, (r0, r1), rows, row_lse, None if full_mask is None else full_mask[bs, hs])
            held = tile.weights(keys, *ranges[0]) if len(ranges) == 1 else None
            if units is not None:  # the kernel of the forward pass says what the largest weights were
                peak = torch.stack([(tile.weights(keys, *r) if held is None else held).amax(1) for r in ranges]).amax(0)
                p_unit, row_unit, rows_block, do_rows_block = units.of_rows(
                    peak, rows_block, do_rows_block, shape, bs, hs, (r0, r1)
                )
            for c0, c1 in ranges:
                p = tile.weights(keys, c0, c1) if held is None else held
                if units is not None:
                    p.div_(p_unit)
                ds = torch.bmm(values[:, c0:c1], do_rows.transpose(1, 2)).sub_(row_delta).mul_(p)
                if options.key_mean_term and options.smooth_k:
                    means = mean_k[bs, hs].flatten(0, 1)
                    dq_acc += ds.sum(1).unsqueeze(-1) * means
                ds_keys = ds  # as dK and dQ take it
                if units is not None:
                    lift = _lifts(p, g)
                    codes = _round_e4m3_(ds.mul_(lift))  # of dK; dQ has them in a unit of its block
                    common = _common_lift(codes, lift, g)
                    ds_keys, ds = codes / lift, _round_e4m3_(codes * (common / lift)) / common
                    p = round_magnitude_(p.mul_(lift), torch.empty_like(p), mantissa_bits=3, min_exponent=-6).div_(lift)
                elif row_scales:
                    ds_keys, ds = _psi_rows(ds, g, INT8_MAX), _bf16(ds)
                    p = _psi_rows(p, g, UINT8_MAX)
                elif options.quantize:
                    _psi_tiles_(p, g, fp8)
                    _psi_tiles_(ds, g, fp8)
                dv_acc[:, c0:c1].baddbmm_(p, do_rows_block)
                dk_acc[:, c0:c1].baddbmm_(ds_keys, rows_block)
                dq_acc.baddbmm_(ds.transpose(1, 2), keys_block[:, c0:c1])
            if units is not None:
                dq_acc *= row_unit
            b_count, h_count = bs.stop - bs.start, hs.stop - hs.start
            dq.unflatten(1, (shape.kv_heads, g))[bs, hs, :, r0:r1] = dq_acc.mul_(scale).view(b_count, h_count, g, r1 - r0, d)
        b_count, h_count = bs.stop - bs.start, hs.stop - hs.start
        dk[bs, hs] = dk_acc.mul_(scale)[:, : shape.k_tokens].view(b_count, h_count, -1, d)
        dv[bs, hs] = dv_acc[:, : shape.k_tokens].view(b_count, h_count, -1, d)
    return dq, dk, dv


@dataclass(frozen=True)
class _Tile:
    """Rows of some heads of Q, (n, G * (r1 - r0), D), that are multiplied with all keys; mask (b, h, G, Lq, Lk)."""

    shape: Shape
    scale: float
    causal: bool
    range: tuple[int, int]
    rows: Tensor
    lse: Tensor
    mask: Tensor | None

    def weights(self, keys: Tensor, c0: int, c1: int) -> Tensor:
        """P^T of keys c0 to c1, (n, c1 - c0, G * (r1 - r0)); keys (n, Lk padded, D)."""
        r0, r1 = self.range
        limit = min(c1, self.shape.k_tokens)
        p = torch.bmm(keys[:, c0:c1], self.rows.transpose(1, 2)).mul_(self.scale)
        piece = None if self.mask is None else self.mask[:, :, :, r0:r1, c0:limit]
        grid = p.view(p.shape[0], c1 - c0, self.shape.groups, r1 - r0)
        hide_(grid, piece, rows=self.range, keys=(c0, c1), limit=limit, causal=self.causal)
        return p.sub_(self.lse).exp_()


def _psi_tiles_(x: Tensor, groups: int, fp8: bool = False) -> None:
    """INT8 (or e4m3) in place for x^T (n, keys, groups * rows), one scale for each 64 keys by 128 rows of one head."""
    n, c, width = x.shape
    rows = width // groups
    block = Q_BLOCK if rows % Q_BLOCK == 0 else rows
    tiles = x.view(n, c // K_BLOCK, K_BLOCK, groups, rows // block, block)
    scale = tiles.abs().amax((2, 5), keepdim=True).div_(E4M3_MAX if fp8 else INT8_MAX)
    tiles.div_(torch.where(scale == 0, torch.ones_like(scale), scale))
    (tiles.copy_(round_e4m3(tiles)) if fp8 else tiles.round_()).mul_(scale)


GRADIENT_ROWS = 64
"""Queries that share a scale of a key's row of P^T and dS^T: the query tile of the kernel."""
GRADIENT_CHANNELS = 32
"""Channels that share a scale of Q and dO in dK and dV."""


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _forward_values(v: Tensor, options: Int8Options) -> Tensor:
    """V as the 8-bit forward pass multiplied it. FP8 has no kernel, and stays as it is."""
    return round_int8_channels(v) if options.pv == "int8" else v


def _quantized(x: Tensor, dims: tuple[int, ...], top: float) -> Tensor:
    scale = x.abs().amax(dims, keepdim=True) / top
    return (x / torch.where(scale == 0, torch.ones_like(scale), scale)).round_() * scale


def _psi_groups(x: Tensor) -> Tensor:
    """INT8 of x (B, H, tokens, D), one scale for 64 tokens by 32 channels."""
    tokens, d = x.shape[-2:]
    padded = pad_to(pad_to(x, -1, GRADIENT_CHANNELS), -2, GRADIENT_ROWS)
    tiles = padded.unflatten(-1, (-1, GRADIENT_CHANNELS)).unflatten(-3, (-1, GRADIENT_ROWS))
    return _quantized(tiles, (-3, -1), INT8_MAX).flatten(-2).flatten(-3, -2)[..., :tokens, :d]


def _psi_rows(x: Tensor, groups: int, top: float) -> Tensor:
    """8 bits of x^T (n, keys, groups * rows), one scale for each key and 64 rows of one head."""
    n, c, width = x.shape
    rows = width // groups
    tiles = pad_to(x.view(n, c, groups, rows), -1, GRADIENT_ROWS).unflatten(-1, (-1, GRADIENT_ROWS))
    return _quantized(tiles, (-1,), top).flatten(-2)[..., :rows].reshape(n, c, width)


# ---------------------------------------------------------------------------------------- "query" scales
_UNIT = 4  # a query's largest P is 2^4 to 2^5 of its unit, as the kernel knows it no better than within a factor of 4
_SPAN = 2  # octaves that its unit may be below the largest of 64 queries
_LEAST = 2.0  # P of a block, or of a warp in its block's unit, that needs no lift
_LEAST_BESIDE = 2.0**-3  # the same beside two or more warps that need none
_LIFTED_TO = 4  # the exponent that others are brought to


def _power_below(x: Tensor) -> Tensor:
    """The power of two at magnitudes x, from 2^-126 to 2^126; 1 for what is no number."""
    exponent = (torch.frexp(x).exponent - 1).masked_fill(x == 0, -126).clamp(-126, 126)
    power = ((exponent + 127) << 23).to(torch.int32).view(torch.float32)
    return torch.where(x < torch.inf, power, torch.ones_like(power))


def _level(most: Tensor) -> Tensor:
    """What numbers up to ``most`` are divided by so that the largest is 128 to 256."""
    return _power_below(most).div_(128.0).clamp_min_(2.0**-126)


def _round_e4m3_(x: Tensor) -> Tensor:
    """``round_e4m3`` in place, of a contiguous tensor; the sign of zero is not kept."""
    return round_float_(x.clamp_(-E4M3_MAX, E4M3_MAX), torch.empty_like(x), mantissa_bits=3, min_exponent=-6)


@dataclass(frozen=True)
class _Units:
    """What is known before the products begin.

    a (B, H, Lq): a <= max|dO| < 2 a. k (B, Hkv, Lk, D): K in steps of e4m3 as its largest magnitude in a kv head is 128 to
    256; query (B, Hkv, 1): what Q is divided by for that.
    value (B, Hkv, 1): V times it makes 256 (dP - delta) of normal inputs about 30; beyond 448 it is limited, which with one
    channel it never is.
    """

    a: Tensor
    k: Tensor
    query: Tensor
    value: Tensor

    @classmethod
    def of(cls, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> _Units:
        """dout and q (B, H, Lq, D), k and v (B, Hkv, Lk, D)."""
        level_k = _level(k.abs().amax((2, 3)))[..., None, None]
        off = (v - smoothing.token_mean(v)).abs().amax(-2)  # (B, Hkv, D)
        unit = _power_below(off.amax(-1, keepdim=True))
        reach = (off / unit).square_().sum(-1, keepdim=True).sqrt_() * (4.0 * (0.35 + 0.65 / v.shape[-1]))
        value = 0.5 / _power_below((unit * (reach * (256.0 / 448.0))).clamp_min_(2.0**-100))
        value = torch.where(off.amax(-1, keepdim=True) > 0, value, torch.ones_like(value))
        query = _level(by_kv_head(q, shape).abs().amax((2, 3, 4))).unsqueeze(-1)
        return cls(_power_below(dout.abs().amax(-1)), _round_e4m3_(k / level_k).mul_(level_k), query, value)

    def of_rows(
        self, peak: Tensor, q: Tensor, dout: Tensor, shape: Shape, batch: slice, heads: slice, rows: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For some rows of some heads: their largest weights (n, G * rows), Q and dO / a (n, G * rows, D).

        Returns:
            P's unit (n, 1, G * rows); that of dQ's sums (n, G * rows, 1); Q and dO as dK and dV multiply P and dS in their
            units by them.
        """
        n, groups = peak.shape[0], shape.groups
        a = self.a.unflatten(1, (shape.kv_heads, groups))[batch, heads, :, slice(*rows)].flatten(0, 1)  # (n, G, rows)
        query, value = (x[batch, heads].flatten(0, 1).unsqueeze(-1) for x in (self.query, self.value))  # (n, 1, 1)
        is_weight = ((peak > 0) & (peak < torch.inf)).view_as(a)

        def largest(exponent: Tensor) -> Tensor:
            """Of the tile of each query; 0 where there is none."""
            above = pad_to((exponent + 1000).masked_fill(~is_weight, 0), -1, GRADIENT_ROWS)
            tiles = above.unflatten(-1, (-1, GRADIENT_ROWS)).amax(-1).repeat_interleave(GRADIENT_ROWS, -1)
            return torch.where(tiles > 0, tiles - 1000, 0)[..., : a.shape[-1]]

        own = torch.frexp(peak).exponent.view_as(a) - 1 - _UNIT
        own = torch.maximum(own, largest(own) - _SPAN).masked_fill(~is_weight, 0)
        unit = own + torch.frexp(a).exponent - 1
        tile = largest(unit)
        below = torch.where(is_weight, unit - tile, 0)
        p_unit, row, down, common = (
            torch.exp2(x.float()).reshape(n, -1, 1) for x in (own, unit, below.clamp_min(-126), tile)
        )
        q8 = _round_e4m3_(q / query * down).mul_(query * common / value)
        return p_unit.transpose(1, 2), row / value, q8, _round_e4m3_(dout * down * 128.0).mul_(common / 128.0)


def _warps(x: Tensor, groups: int) -> Tensor:
    """x^T (n, keys, G * rows) as (n, blocks of 128 keys, 8 warps, 16 keys, G, tiles, 64 queries)."""
    tiles = pad_to(pad_to(x.view(*x.shape[:2], groups, -1), -1, GRADIENT_ROWS), 1, 128)
    return tiles.unflatten(-1, (-1, GRADIENT_ROWS)).unflatten(1, (-1, 8, 16))


def _spread(x: Tensor, like: Tensor, groups: int) -> Tensor:
    """A number for each warp and tile (n, blocks, 8, G, tiles) -> one for each element of ``like``, (n, keys, G * rows)."""
    x = x.repeat_interleave(16, 2).flatten(1, 2).repeat_interleave(GRADIENT_ROWS, -1)
    return x[:, : like.shape[1], :, : like.shape[2] // groups].reshape(like.shape)


def _lifts(p: Tensor, groups: int) -> Tensor:
    """What P^T (n, keys, G * rows) is multiplied by before it is rounded: a power of two for 16 keys and 64 queries.

    1 where some P of the block of 128 keys is 2 or more, and of the 16; else the largest of the block becomes 16 to 32, or
    that of the 16 where it would still be below 2. Beside two times 16 keys whose P is that large 1/8 is enough: what lies
    below counts for little. The kernel's lifts also depend on the tile before: one stays while it suits, and whether there
    were two such is what was found there.
    """
    most = _warps(p, groups).amax((3, 6))
    least = torch.where((most >= _LEAST).sum(2, keepdim=True) >= 2, _LEAST_BESIDE, _LEAST)

    def to_lift(x: Tensor) -> Tensor:
        exponent = (_LIFTED_TO + 1 - torch.frexp(x).exponent).clamp_(-126, 126)
        return torch.ldexp(torch.ones_like(x), exponent.masked_fill((x == 0) | ~(x < torch.inf), 0))

    of_block = most.amax(2, keepdim=True)
    common = torch.where(of_block < least, to_lift(of_block), torch.ones_like(of_block)).expand_as(most)
    return _spread(torch.where((most * common < least) & (most > 0), to_lift(most), common), p, groups)


def _common_lift(codes: Tensor, lift: Tensor, groups: int) -> Tensor:
    """dQ's lift for dS^T, whose ``codes`` (n, keys, G * rows) have those of 16 keys: one for a block of 128.

    Where they differ it is the largest that keeps all below 256.
    """
    of_warp = _warps(lift, groups).amax((3, 6))
    of_warp = torch.where(of_warp > 0, of_warp, of_warp.amax(2, keepdim=True))  # past the last key
    most = _warps(codes.abs(), groups).amax((3, 6))
    headroom = torch.ldexp(torch.ones_like(most), 8 - torch.frexp(most).exponent.clamp_min(-5))
    suits = torch.where(most > 0, of_warp * headroom, torch.inf).amin(2, keepdim=True)
    agreed = of_warp.amin(2, keepdim=True) == of_warp.amax(2, keepdim=True)
    common = torch.where(agreed | suits.isinf(), of_warp.amax(2, keepdim=True), suits).expand_as(of_warp)
    return _spread(common, codes, groups)
