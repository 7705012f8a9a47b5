"""Exact, 4-bit and 8-bit attention in plain PyTorch: the specification the kernels are held against.

Products of quantised operands are fp32 products of the values the codes stand for. That is what the hardware
computes, up to the order of the fp32 additions: an e2m1 x e2m1 product times two e4m3 scales is exact in fp32, and
an INT8 dot product of 256 terms stays below 2**24.

Sources: arXiv 2505.11594 algorithm 1 (4 bit), arXiv 2411.10958 and 2505.21136 (8 bit forward).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError
from . import operands, smoothing
from .formats import (
    BLOCK_SIZE,
    E2M1_MAX,
    E4M3_MAX,
    INT8_MAX,
    UINT8_MAX,
    BlockFormat,
    Granularity,
    ScaleChoice,
    block_scales,
    pad_to,
    quantize_int8,
    round_blocks,
    round_e4m3,
    round_fp8_channels,
    round_int8_channels,
    round_magnitude_,
    second_level_scale,
)
from .tiles import LAZY_UP, Shape, WeightRule, attend, finite, lazy_references, references


@dataclass(frozen=True)
class Fp4Options:
    """Every choice of the 4-bit method as a flag; the defaults are the paper's method.

    Attributes:
        smooth_q: take the mean of each block of 128 rows out of Q and add its product with K back.
        smooth_k: take the mean over tokens out of K.
        per_block_mean: means of Q per 128 rows; False: one over the whole sequence.
        two_level_p: scale P to 0..448*6 before giving it block scales; False: quantise P in 0..1 directly.
        p_reference: what the first level of two_level_p refers to: the row maximum of P in its own KV tile
            ("tile", the paper's algorithm 1), the running maximum ("running", one multiplication fewer in a
            kernel), or a power of two that follows the tile's maximum lazily ("lazy", which moves the output seldom and
            exactly; see ``tiles.lazy_references``).
        official_p: P as the official code has it: divided by its block's scale before that was rounded, and its row's sum
            taken before the weights were.
        smooth_v: take the mean over tokens out of V and add it to the output, which is exact: a row's weights add up to
            1 (not in the paper).
        block_scale: how the e4m3 scale of a block of Q, K or V is chosen, see ``formats.ScaleChoice``; the paper's
            is "six". P's always is.
        kernel_operands: Q, K and V bit by bit as the compiled kernel quantises them, with means of samples and a second
            level of powers of two (``operands``). Needs smooth_v and the block scale "quick".
        second_level_scale: an fp32 scale per head on top of the block scales of Q, K and V (not in the paper).
        block_format: "nvfp4" (blocks of 16, e4m3 scales) or "mxfp4" (blocks of 32, power-of-two scales).
        rotate: "none", or for comparison "hadamard" or "smoothquant", applied to Q and K after smoothing.
        kv_tile: keys in a tile of the online softmax; a multiple of 32.
        quantize: False leaves every operand in fp32: the same steps, to check the algebra.
    """

    smooth_q: bool = True
    smooth_k: bool = True
    per_block_mean: bool = True
    two_level_p: bool = True
    p_reference: Literal["tile", "running", "lazy"] = "tile"
    official_p: bool = False
    smooth_v: bool = False
    block_scale: ScaleChoice = "six"
    kernel_operands: bool = False
    second_level_scale: bool = False
    block_format: BlockFormat = "nvfp4"
    rotate: Literal["none", "hadamard", "smoothquant"] = "none"
    kv_tile: int = 128
    quantize: bool = True

    def __post_init__(self) -> None:
        _one_of("p_reference", self.p_reference, ("tile", "running", "lazy"))
        if self.p_reference == "lazy" and (self.block_format != "nvfp4" or self.official_p):
            raise InputError('p_reference is "lazy": that needs the block format "nvfp4", and not official_p.')
        _one_of("block_scale", self.block_scale, get_args(ScaleChoice))
        _one_of("block_format", self.block_format, tuple(BLOCK_SIZE))
        _one_of("rotate", self.rotate, ("none", "hadamard", "smoothquant"))
        _check_tile(self.kv_tile)
        if self.kernel_operands and not (
            self.smooth_q and self.smooth_k and self.smooth_v and self.per_block_mean and self.quantize
            and self.block_scale == "quick" and self.block_format == "nvfp4" and self.rotate == "none"
            and not self.second_level_scale
        ):  # fmt: skip
            raise InputError('kernel_operands needs smooth_v and block_scale "quick", and all else of Q, K and V as it is.')


@dataclass(frozen=True)
class Int8Options:
    """Every choice of the 8-bit method as a flag.

    Attributes:
        pv: how P and V are multiplied: "fp8" (P in e4m3 scaled to 448 relative to the running maximum, V in e4m3
            with a scale per channel) or "int8" (P in unsigned 8 bits relative to its tile's row maximum, V in
            INT8 with a scale per channel).
        exponential: of P in pv "int8": "exact", or "linear": (1 + f) 2^(n - 0.0575) for 2^(n + f), which is what the bits
            of a float are when its exponent and mantissa are written as one number (Schraudolph, Neural Computation
            11, 1999), less the mean of what that is too large by. Within 6 %.
        smooth_k: take the mean over tokens out of K.
        granularity: tokens of Q and K that share a scale: "thread", "token" or "block" (see
            ``formats.token_groups``).
        kv_tile: keys in a tile of the online softmax; a multiple of 32.
        do_v: backward only. The product dO V^T: "high" (not quantised) or "int8", for comparison.
        gradient_scales: backward only. "block": one scale for 64 keys by 128 queries of P and of dS, and for a block of
            every other operand, as in the paper; "query": e4m3, as the compiled kernel computes; or "row": INT8 with a scale
            for a key and 64 queries. See ``backward``.
        products: what the operands of the scores and of dV, dK and dQ are rounded to: "int8", or "fp8" (e4m3 with a scale
            for the same group), for comparison. Needs gradient_scales "block".
        key_mean_term: backward only. Add rowsum(dS) . mean(K) to dQ, as the first paper does (see docs/numerics.md).
        quantize: False leaves every operand in fp32: the same steps, to check the algebra.
    """

    pv: Literal["fp8", "int8"] = "fp8"
    exponential: Literal["exact", "linear"] = "exact"
    smooth_k: bool = True
    granularity: Granularity = "thread"
    kv_tile: int = 128
    do_v: Literal["high", "int8"] = "high"
    gradient_scales: Literal["block", "row", "query"] = "block"
    products: Literal["int8", "fp8"] = "int8"
    key_mean_term: bool = False
    quantize: bool = True

    def __post_init__(self) -> None:
        _one_of("pv", self.pv, ("fp8", "int8"))
        _one_of("exponential", self.exponential, ("exact", "linear"))
        if self.exponential == "linear" and self.pv != "int8":
            raise InputError('exponential is "linear": that needs pv "int8".')
        _one_of("granularity", self.granularity, ("block", "token", "thread"))
        _one_of("do_v", self.do_v, ("high", "int8"))
        _one_of("gradient_scales", self.gradient_scales, ("block", "row", "query"))
        _one_of("products", self.products, ("int8", "fp8"))
        if self.gradient_scales != "block" and self.do_v == "int8":
            raise InputError(f'gradient_scales is "{self.gradient_scales}": that needs do_v "high".')
        if self.gradient_scales != "block" and self.products == "fp8":
            raise InputError(f'gradient_scales is "{self.gradient_scales}": that needs products "int8".')
        _check_tile(self.kv_tile)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}: use {', '.join(allowed)}.")


def _check_tile(kv_tile: int) -> None:
    if kv_tile < 32 or kv_tile % 32 or 1024 % kv_tile:
        raise InputError(f"kv_tile is {kv_tile}: use 32, 64, 128, 256, 512 or 1024.")


# What runs as "fp4", "int8" and "int8-fast": as the compiled kernels compute, or will.
OUR_FP4 = Fp4Options(smooth_v=True, block_scale="quick", kernel_operands=True, p_reference="lazy")
OUR_INT8 = Int8Options(pv="int8", gradient_scales="query")
OUR_INT8_FAST = Int8Options(pv="int8", exponential="linear")


def softmax_scale(scale: float | None, head_dim: int) -> float:
    """``scale``, or 1 / sqrt(head_dim) when it is None."""
    return head_dim**-0.5 if scale is None else float(scale)


@torch.no_grad()
def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale + mask) v without quantisation, in fp32 (fp64 for fp64 inputs).

    Args:
        q: (B, H, Lq, D), any floating-point dtype.
        k, v: (B, Hkv, Lk, D) with H a multiple of Hkv.
        mask: bool (True attends) or additive, broadcastable to (B, H, Lq, Lk).
        is_causal: row i sees keys 0..i, also when Lq != Lk.
        scale: softmax scale; None: D**-0.5.

    Returns:
        out (B, H, Lq, D) in q's dtype; lse (B, H, Lq) fp32, natural logarithm. A row that sees no key gives 0 and
        -inf. The inputs are not modified.

    Raises:
        InputError: shapes, dtypes or devices do not fit together.
    """
    shape = Shape.of(q, k, v)
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_t = by_kv_head(q.to(high) * softmax_scale(scale, shape.head_dim), shape).transpose(-1, -2)
    out, lse = attend(
        shape, q_t, k.to(high).transpose(-1, -2), v.to(high), _weigh_exact,
        mask=shape.mask(mask), is_causal=is_causal, out_dtype=q.dtype,
    )  # fmt: skip
    return out, lse.float()


@torch.no_grad()
def fp4_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None, options: Fp4Options | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with Q, K, P and V in 4 bits (arXiv 2505.11594, algorithm 1), simulated in fp32.

    Arguments, results and errors as ``exact_attention``; ``options`` None means ``Fp4Options()``. Q, K and V are quantised
    in fp32 also where they are fp64; all that follows is then fp64, so that what a kernel differs by is its own rounding.
    """
    options = options or Fp4Options()
    shape = Shape.of(q, k, v)
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    softmax = softmax_scale(scale, shape.head_dim)
    block = BLOCK_SIZE[options.block_format]
    made = (_kernel_operands if options.kernel_operands else _studied_operands)(q, k, v, shape, softmax, options).to(high)
    lazy = options.quantize and options.two_level_p and options.p_reference == "lazy"
    out, lse = attend(
        shape, made.q_t, made.k_t, made.v, _weigh_fp4(options) if options.quantize else _weigh_exact,
        block=block, states=2 if lazy else 1, unit=made.unit, means_t=made.means_t, k_smooth_t=made.k_smooth_t,
        mask=shape.mask(mask), is_causal=is_causal, out_dtype=q.dtype if made.mean_v is None else high,
    )  # fmt: skip
    if made.mean_v is not None:
        attends = (lse > -torch.inf).unsqueeze(-1)
        out = (out + made.mean_v.repeat_interleave(shape.groups, 1) * attends).to(q.dtype)
    return out, _restore_lse(lse, q.to(high), made.mean_k, softmax, shape).float()


@dataclass(frozen=True)
class _Fp4Operands:
    """What ``tiles.attend`` takes, and the means (B, Hkv, 1, D) that the results get back; None where none was taken."""

    q_t: Tensor
    k_t: Tensor
    v: Tensor
    means_t: Tensor | None
    k_smooth_t: Tensor | None
    mean_k: Tensor | None
    mean_v: Tensor | None
    unit: float | None = None  # of the scores; None: q_t and means_t hold the softmax scale

    def to(self, dtype: torch.dtype) -> _Fp4Operands:
        """The same numbers in ``dtype``."""
        tensors: dict[str, Any] = {name: x.to(dtype) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


def _studied_operands(q: Tensor, k: Tensor, v: Tensor, shape: Shape, softmax: float, options: Fp4Options) -> _Fp4Operands:
    """Q, K and V by the choices of ``options``."""
    block = BLOCK_SIZE[options.block_format]
    q32, k32, v32 = q.float(), k.float(), v.float()
    mean_k = smoothing.token_mean(k32) if options.smooth_k else None
    k_smooth = k32 if mean_k is None else k32 - mean_k
    means_t = None
    q_smooth = q32
    if options.smooth_q:
        means = smoothing.query_means(q32, options.per_block_mean)
        q_smooth = q32 - smoothing.spread_means(means, shape.q_tokens, options.per_block_mean)
        means_t = by_kv_head(means * softmax, shape).transpose(-1, -2)
    q_op, k_op = _rotate(q_smooth, k_smooth, shape, options.rotate)

    def quantize(x: Tensor, dim: int) -> Tensor:
        """Blocks along ``dim``; head_dim and keys are padded to whole blocks."""
        x = pad_to(x, dim, block)
        if not options.quantize or x.numel() == 0:
            return x
        second = second_level_scale(x) if options.second_level_scale else None
        return round_blocks(x, dim, options.block_format, second, options.block_scale)

    mean_v = smoothing.token_mean(v32) if options.smooth_v else None
    return _Fp4Operands(
        q_t=by_kv_head(quantize(q_op, -1) * softmax, shape).transpose(-1, -2),
        k_t=pad_to(quantize(k_op, -1), -2, block).transpose(-1, -2),
        v=quantize(v32 if mean_v is None else v32 - mean_v, -2),
        means_t=means_t,
        k_smooth_t=pad_to(k_smooth, -2, block).transpose(-1, -2) if means_t is not None else None,
        mean_k=mean_k,
        mean_v=mean_v,
    )


_LEAST_UNIT = 1e-30  # in the kernel too: where scores count nothing, what hides them still is a number


def _kernel_operands(q: Tensor, k: Tensor, v: Tensor, shape: Shape, softmax: float, options: Fp4Options) -> _Fp4Operands:
    """Q, K and V as ``operands`` has them; the sign of the softmax scale is in Q's codes."""
    queries, keys, values = (
        operands.quantize_queries(q, softmax), operands.quantize_keys(k), operands.quantize_values(v)
    )  # fmt: skip
    mean_k, mean_v = (x.means[..., : shape.head_dim] for x in (keys, values))
    means = queries.means[..., : shape.head_dim] * math.copysign(1.0, softmax)
    base_2 = float(torch.tensor(abs(softmax), dtype=torch.float32) * math.log2(math.e))  # an fp32 number, as in the kernel
    return _Fp4Operands(
        q_t=by_kv_head(queries.values()[..., : shape.q_tokens, :], shape).transpose(-1, -2),
        k_t=keys.values().transpose(-1, -2),
        v=values.values()[..., : shape.head_dim],
        means_t=by_kv_head(means, shape).transpose(-1, -2),
        k_smooth_t=pad_to(k.float() - mean_k, -2, operands.TILE).transpose(-1, -2),
        mean_k=mean_k,
        mean_v=mean_v,
        unit=max(base_2, _LEAST_UNIT) * math.log(2),
    )


@torch.no_grad()
def int8_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None, options: Int8Options | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with Q K^T in INT8 and P V in FP8 or INT8 (arXiv 2411.10958, 2505.21136), simulated in fp32.

    Arguments, results and errors as ``exact_attention``; ``options`` None means ``Int8Options()``.
    """
    options = options or Int8Options()
    shape = Shape.of(q, k, v)
    softmax = softmax_scale(scale, shape.head_dim)
    q32, k32, v32 = q.float(), k.float(), v.float()
    mean_k = smoothing.token_mean(k32) if options.smooth_k else None
    k_smooth = k32 if mean_k is None else k32 - mean_k
    weigh: WeightRule = _weigh_exact
    if options.quantize:
        q_op = round_tokens(q32, options.granularity, "q", options)
        k_smooth = round_tokens(k_smooth, options.granularity, "k", options)
        v32 = round_fp8_channels(v32) if options.pv == "fp8" else round_int8_channels(v32)
        weigh = _weigh_fp8(options) if options.pv == "fp8" else _weigh_uint8(options)
    else:
        q_op = q32
    out, lse = attend(
        shape, by_kv_head(q_op * softmax, shape).transpose(-1, -2),
        pad_to(k_smooth, -2, _BLOCK_8).transpose(-1, -2), pad_to(v32, -2, _BLOCK_8), weigh,
        block=_BLOCK_8, mask=shape.mask(mask), is_causal=is_causal, out_dtype=q.dtype,
    )  # fmt: skip
    return out, _restore_lse(lse, q32, mean_k, softmax, shape)


def round_tokens(x: Tensor, granularity: Granularity, role: Literal["q", "k"], options: Int8Options) -> Tensor:
    """x (..., tokens, D) as it is multiplied, fp32: in ``options.products``, with a scale for each group of tokens."""
    made = quantize_int8(x, granularity, role)
    if options.products == "int8":
        return made.dequantize()
    scale = (made.scales * (INT8_MAX / E4M3_MAX))[..., made.groups].unsqueeze(-1)
    return round_e4m3(x / torch.where(scale == 0, torch.ones_like(scale), scale)) * scale


_BLOCK_8 = 32  # keys whose maximum is taken first; the 8-bit formats have no block of their own along the keys


def by_kv_head(x: Tensor, shape: Shape) -> Tensor:
    """(B, H, n, D) -> (B, Hkv, G, n, D)."""
    return x.unflatten(1, (shape.kv_heads, shape.groups))


def _rotate(q: Tensor, k: Tensor, shape: Shape, how: str) -> tuple[Tensor, Tensor]:
    if how == "hadamard":
        return smoothing.hadamard(q), smoothing.hadamard(k)
    if how == "smoothquant":
        rows = q.reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)
        rows, k = smoothing.smooth_quant(rows, k)
        return rows.reshape(q.shape), k
    return q, k


def _restore_lse(lse: Tensor, q: Tensor, mean_k: Tensor | None, scale: float, shape: Shape) -> Tensor:
    """The LSE of the scores before K's mean was taken out."""
    return lse if mean_k is None else lse + mean_scores(q, mean_k, scale, shape)


def mean_scores(q: Tensor, mean_k: Tensor, scale: float, shape: Shape) -> Tensor:
    """scale * q_i . mean(K), what smoothing K takes from every score of row i: (B, H, Lq)."""
    return (by_kv_head(q, shape) @ mean_k.unsqueeze(-1)).squeeze(-1).flatten(1, 2) * scale


# ------------------------------------------------------------------------------------ from scores to weights
def _weigh_exact(scores: Tensor, block_max: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor | None]:
    new = torch.maximum(maximum, block_max.amax(1, keepdim=True))
    scores.sub_(finite(new)).exp_()
    return new, None


def _weigh_fp4(options: Fp4Options) -> WeightRule:
    if options.two_level_p and options.p_reference == "lazy":
        return _weigh_fp4_lazily(options)
    block = BLOCK_SIZE[options.block_format]
    reach = E4M3_MAX * E2M1_MAX if options.two_level_p else 1.0
    own_tile = options.two_level_p and options.p_reference == "tile"

    def weigh(scores: Tensor, block_max: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor | None]:
        """P = e2m1(exp(S - ref) * reach / s) * s / reach with s the ROUNDED block scale of exp(max - ref) * reach."""
        reference, factor, new = references(block_max, maximum, options.kv_tile // block, own_tile)
        largest = torch.exp(block_max - reference).mul_(reach)
        scale = block_scales(largest, options.block_format).div_(reach)
        divisor = largest.div_(E2M1_MAX * reach) if options.official_p else scale
        divisor = divisor.masked_fill(scale == 0, torch.inf)  # such a block becomes 0
        blocks = scores.unflatten(1, (-1, block))
        blocks.sub_(reference.unsqueeze(2)).exp_()
        growth = (blocks * factor.unsqueeze(2)).sum((1, 2)).unsqueeze(1) if options.official_p else None
        blocks.div_(divisor.unsqueeze(2)).clamp_(max=E2M1_MAX)
        codes = scores.float()  # scores itself, unless it is fp64
        round_magnitude_(codes, torch.empty_like(codes), mantissa_bits=1, min_exponent=0)
        scores.copy_(codes)
        blocks.mul_(factor.mul_(scale).unsqueeze(2))
        return new, growth

    return weigh


def _weigh_fp4_lazily(options: Fp4Options) -> WeightRule:
    """In base 2 and relative to whole powers of it, as the kernel computes: every sum in an exponent is rounded to fp32."""
    block = BLOCK_SIZE[options.block_format]
    log2_reach, log2_sixth = (
        float(torch.tensor(math.log2(x) - LAZY_UP, dtype=torch.float32)) for x in (E4M3_MAX * E2M1_MAX, E4M3_MAX)
    )

    def weigh(scores: Tensor, block_max: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor | None]:
        """P = e2m1(2^(S - m + reach - log2 s)) * s / 2^reach with s = e4m3(2^(max - m + reach) / 6), the block's scale."""
        reference, factor, new = lazy_references(block_max, maximum, options.kv_tile // block)
        m = (reference * math.log2(math.e)).round()
        sixth = ((log2_sixth - m).float() + block_max * math.log2(math.e)).float().exp2()
        scale = round_e4m3(sixth).to(scores.dtype)
        power = ((log2_reach - m).float() - torch.log2(scale)).float()
        power = power.masked_fill(scale == 0, -torch.inf)  # such a block becomes 0
        blocks = scores.unflatten(1, (-1, block))
        blocks.mul_(math.log2(math.e)).add_(power.unsqueeze(2))
        codes = scores.float().exp2_().clamp_(max=E2M1_MAX)
        round_magnitude_(codes, torch.empty_like(codes), mantissa_bits=1, min_exponent=0)
        scores.copy_(codes)
        blocks.mul_(factor.mul_(scale.div_(2.0**log2_reach)).unsqueeze(2))
        return new, None

    return weigh


def _weigh_fp8(options: Int8Options) -> WeightRule:
    def weigh(scores: Tensor, block_max: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor | None]:
        """P = e4m3(448 exp(S - running maximum)) / 448."""
        reference, factor, new = references(block_max, maximum, options.kv_tile // _BLOCK_8, own_tile=False)
        blocks = scores.unflatten(1, (-1, _BLOCK_8))
        blocks.sub_((reference - math.log(E4M3_MAX)).unsqueeze(2)).exp_().clamp_(max=E4M3_MAX)
        round_magnitude_(scores, torch.empty_like(scores), mantissa_bits=3, min_exponent=-6)
        blocks.mul_((factor / E4M3_MAX).unsqueeze(2))
        return new, None

    return weigh


LINEAR_BIAS = 0.0575  # log2 of what (1 + f) 2^n exceeds 2^(n + f) by, in the mean over f
_LINEAR_TOP = 7 + UINT8_MAX / 128 - 1 - LINEAR_BIAS  # where linear_exp2 gives 255, less the bias


def linear_exp2(x: Tensor) -> Tensor:
    """(1 + f) 2^n for x = n + f, 0 <= f < 1: equal to 2^x at whole numbers, up to 6 % larger between them."""
    n = x.clamp(min=-126.0).floor()
    return torch.ldexp(1 + (x.clamp(min=-126.0) - n), n)


def _weigh_uint8(options: Int8Options) -> WeightRule:
    def weigh(scores: Tensor, block_max: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor | None]:
        """P = round(255 exp(S - row maximum of the tile)) / 255, times exp(row maximum of the tile - maximum)."""
        reference, factor, new = references(block_max, maximum, options.kv_tile // _BLOCK_8, own_tile=True)
        blocks = scores.unflatten(1, (-1, _BLOCK_8))
        if options.exponential == "linear":
            blocks.sub_(reference.unsqueeze(2)).mul_(math.log2(math.e))
            blocks.copy_(linear_exp2(blocks + _LINEAR_TOP))
        else:
            blocks.sub_((reference - math.log(UINT8_MAX)).unsqueeze(2)).exp_()
        blocks.round_().clamp_(max=UINT8_MAX)
        blocks.mul_((factor / UINT8_MAX).unsqueeze(2))
        return new, None

    return weigh
