"""The 4-bit operands bit by bit as csrc/quantize/nvfp4.cu makes them: Q, K and V as codes, scales, levels and means.

    code * scale * level = (q - mean) * sign(softmax scale)      a scale for 16 channels, a mean and a level for 128 rows
    code * scale * level = k - mean                              a scale for 16 channels, a level for 128 tokens
    code * scale * level = v - mean                              a scale for 16 tokens of a channel, a level for a head

Scales are e4m3. Levels are powers of two, so that dividing by them rounds nothing: they keep the scales away from both
ends of e4m3, whatever the tensor's unit is. Tokens are padded to whole tiles of 128 and channels to whole blocks of 16;
tokens past the end have codes and scales of 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import smoothing
from .formats import BLOCK_SIZE, decode_e2m1, decode_e4m3, pad_to, quantize_blocks_quick

TILE = 128
_BLOCK = BLOCK_SIZE["nvfp4"]


@dataclass(frozen=True)
class Operand:
    """A quantised tensor.

    Attributes:
        codes: uint8 (B, H, n, D) e2m1 codes, n a multiple of 128.
        scales: uint8 e4m3 codes; of Q and K (B, H, n, D / 16), of V (B, H, n / 16, D).
        levels: fp32; of Q and K (B, H, n / 128), of V (B, H, 1).
        means: fp32; of Q (B, H, n / 128, D), of K and V (B, H, 1, D).
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor
    means: Tensor

    def values(self) -> Tensor:
        """What the codes stand for, mean not added: fp32 (B, H, n, D)."""
        codes, scales = self.codes, decode_e4m3(self.scales)
        along = -2 if self.scales.shape[-1] == codes.shape[-1] else -1
        scales = scales.repeat_interleave(_BLOCK, along)
        levels = self.levels.repeat_interleave(codes.shape[-2] // max(self.levels.shape[-1], 1), -1)
        return decode_e2m1(codes) * scales * levels.unsqueeze(-1)


def quantize_queries(q: Tensor, scale: float) -> Operand:
    """Q (B, H, Lq, D) of any floating-point dtype; of the softmax scale the sign counts."""
    rows = pad_to(q.float(), -1, _BLOCK)
    means = smoothing.halving_means(rows)
    centred = pad_to(rows - smoothing.spread_means(means, q.shape[-2]), -2, TILE)
    return _quantize_rows(centred, tile_levels(pad_to(rows, -2, TILE)), math.copysign(1.0, scale), q.shape[-2], means)


def quantize_keys(k: Tensor) -> Operand:
    """K (B, H, Lk, D) of any floating-point dtype."""
    rows = pad_to(k.float(), -1, _BLOCK)
    means = smoothing.sampled_mean(rows)
    levels = tile_levels(torch.maximum(pad_to(rows, -2, TILE).abs(), means.abs()))
    return _quantize_rows(pad_to(rows - means, -2, TILE), levels, 1.0, k.shape[-2], means)


def quantize_values(v: Tensor) -> Operand:
    """V (B, H, Lk, D) of any floating-point dtype."""
    rows = pad_to(v.float(), -1, _BLOCK)
    means = smoothing.sampled_mean(rows)
    levels = value_levels(v, means[..., : v.shape[-1]])
    x = pad_to(rows - means, -2, TILE) * (1.0 / levels).unsqueeze(-1)
    codes, scales = quantize_blocks_quick(x.unflatten(-2, (-1, _BLOCK)).movedim(-2, -1))
    return Operand(codes.movedim(-1, -2).flatten(-3, -2), scales, levels, means)


def _quantize_rows(centred: Tensor, levels: Tensor, sign: float, tokens: int, means: Tensor) -> Operand:
    """Rows that are padded to whole tiles already; those from ``tokens`` on are zeros."""
    x = centred * (sign / levels).repeat_interleave(TILE, -1).unsqueeze(-1)
    codes, scales = quantize_blocks_quick(x.unflatten(-1, (-1, _BLOCK)))
    scales[..., tokens:, :] = 0  # a tile whose level is NaN
    return Operand(codes.flatten(-2), scales, levels, means)


def tile_levels(x: Tensor) -> Tensor:
    """The power of two that brings the largest magnitude of 128 tokens to [2^9, 2^10): (B, H, n, D) -> (B, H, n / 128).

    Without their mean they are below 2^11 still, which is within e4m3's 448 times e2m1's 6.

    2^-126 at least, so that its inverse is a number; 1 where all is 0; NaN where anything is NaN or infinite.
    """
    amax = x.unflatten(-2, (-1, TILE)).abs().amax((-2, -1))
    level = _power_of_two(torch.frexp(amax).exponent - 1 - 9)
    level = torch.where(amax == 0, torch.ones_like(level), level)
    return torch.where(amax < torch.inf, level, torch.full_like(level, torch.nan))


def value_levels(v: Tensor, mean: Tensor) -> Tensor:
    """2^(floor(log2(rms)) + 1) of a head's sample less its mean: V (B, H, Lk, D), mean (B, H, 1, D) -> (B, H, 1).

    A typical block's scale is then about a quarter. 1 where the rms is 0 or no number.
    """
    sample = v[..., smoothing.sample_tokens(v.shape[-2], v.device), :].double() - mean.double()
    rms = sample.square().mean((-2, -1)).sqrt().unsqueeze(-1)
    level = _power_of_two(torch.frexp(rms).exponent)
    return torch.where((rms > 0) & (rms < torch.inf), level, torch.ones_like(level))


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, fp32, where that and its inverse are normal numbers, else the nearest such."""
    exponent = exponent.clamp(-126, 126)
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)
