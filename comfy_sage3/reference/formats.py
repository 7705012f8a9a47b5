"""The low-precision number formats: e2m1, e4m3, e8m0, INT8, and the block-scaled formats built from them.

Every format exists twice: ``encode_*`` / ``decode_*`` give and take the bits a kernel would store, ``round_*``
goes straight from a tensor to the fp32 values those bits stand for, which is what the simulation multiplies.
``decode(encode(x)) == round(x)`` for every x; the tests check it against tables written out by hand.

Sources: OCP Microscaling Formats (MX) v1.0 for e2m1, e8m0 and MXFP4; OCP 8-bit floating point v1.0 for e4m3;
PTX ISA, ``cvt.rn.satfinite``, for rounding and saturation; arXiv 2505.11594 section 3.1 for NVFP4 in attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

E2M1_MAX = 6.0
E4M3_MAX = 448.0
INT8_MAX = 127.0
UINT8_MAX = 255.0

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The eight magnitudes of e2m1, indexed by the low three bits of the code; the fourth bit is the sign."""

BlockFormat = Literal["nvfp4", "mxfp4"]
BLOCK_SIZE: dict[str, int] = {"nvfp4": 16, "mxfp4": 32}

_EXPONENT_BITS = 0x7F800000  # of an fp32


# ------------------------------------------------------------------------------------------- element formats
def round_float_(x: Tensor, scratch: Tensor, *, mantissa_bits: int, min_exponent: int) -> Tensor:
    """Round the fp32 tensor ``x`` in place to a float with fewer mantissa bits, to nearest, ties to even.

    Args:
        x: contiguous fp32, any shape; magnitudes below 2**60. Not saturated here: clamp first.
        scratch: contiguous fp32 of the same shape, overwritten.
        mantissa_bits: explicit mantissa bits of the target.
        min_exponent: exponent of the smallest normal; below it the spacing stays that of the subnormals.

    A negative zero becomes a positive one; NaN stays NaN. Four passes over memory and no table, because this
    runs over the whole attention matrix: with 2**e the power of two at or below |x|, adding and subtracting
    1.5 * 2**(23 - mantissa_bits) * 2**e makes the fp32 adder itself do the rounding at the wanted bit.
    """
    torch.clamp(torch.abs(x, out=scratch), min=2.0**min_exponent, out=scratch)
    return _round_at_(x, scratch, mantissa_bits)


def round_magnitude_(x: Tensor, scratch: Tensor, *, mantissa_bits: int, min_exponent: int) -> Tensor:
    """``round_float_`` for a tensor without negative values: one pass fewer."""
    torch.clamp(x, min=2.0**min_exponent, out=scratch)
    return _round_at_(x, scratch, mantissa_bits)


def _round_at_(x: Tensor, scratch: Tensor, mantissa_bits: int) -> Tensor:
    scratch.view(torch.int32).bitwise_and_(_EXPONENT_BITS)
    magic = 1.5 * 2.0 ** (23 - mantissa_bits)
    return x.add_(scratch, alpha=magic).sub_(scratch, alpha=magic)


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest e2m1 value (0, 0.5, 1, 1.5, 2, 3, 4, 6 and negatives), fp32. Ties to even, saturates at 6.

    The sign of zero is kept. NaN stays NaN here although e2m1 has no NaN: in a block format the NaN travels in
    the block's scale.
    """
    source = x.float()
    y = source.clamp(-E2M1_MAX, E2M1_MAX).contiguous()
    return round_float_(y, torch.empty_like(y), mantissa_bits=1, min_exponent=0).copysign_(source)


def encode_e2m1(x: Tensor) -> Tensor:
    """The 4-bit codes of ``round_e2m1(x)``, uint8 in 0..15. NaN gives 7 (+6), as PTX ``cvt.rn.satfinite`` does."""
    rounded = round_e2m1(x)
    nan = rounded.isnan()
    # Twice a magnitude is a whole number: 0 1 2 3 4 6 8 12; this table sends it back to 0..7.
    table = torch.tensor([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=torch.uint8, device=x.device)
    code = table[(rounded.abs() * 2).nan_to_num(nan=12.0).long()]
    return torch.where(rounded.signbit() & ~nan, code + 8, code)


def decode_e2m1(codes: Tensor) -> Tensor:
    """The fp32 values of 4-bit codes (uint8 in 0..15)."""
    table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], device=codes.device)
    return table[codes.long()]


def pack_e2m1(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte along the last dimension, the first in the low nibble: (..., n) -> (..., n/2) uint8.

    Raises:
        InputError: n is odd.
    """
    if codes.shape[-1] % 2:
        raise InputError(f"Packing needs an even number of 4-bit values, got {codes.shape[-1]}: pad by one.")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """The inverse of ``pack_e2m1``: (..., n/2) uint8 -> (..., n) uint8 codes."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def round_e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 value, fp32. Ties to even, saturates at 448 (infinities too), subnormals of 2**-9."""
    source = x.float()
    y = source.clamp(-E4M3_MAX, E4M3_MAX).contiguous()
    return round_float_(y, torch.empty_like(y), mantissa_bits=3, min_exponent=-6).copysign_(source)


def encode_e4m3(x: Tensor) -> Tensor:
    """The e4m3 codes of ``round_e4m3(x)``, uint8; NaN gives 0x7F."""
    code = x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(x.isnan(), torch.full_like(code, 0x7F), code)


def decode_e4m3(codes: Tensor) -> Tensor:
    """The fp32 values of e4m3 codes (uint8); 0x7F and 0xFF are NaN."""
    return codes.view(torch.float8_e4m3fn).float()


def encode_e8m0(x: Tensor) -> Tensor:
    """The power of two at or below ``x`` as its biased exponent, uint8 in 0..254; NaN, infinity, negative: 255.

    Zero and everything under 2**-127 give 0, that is 2**-127.
    """
    x = x.float()
    exponent = torch.frexp(x).exponent - 1
    code = (exponent + 127).clamp(0, 254).to(torch.uint8)
    code = torch.where(x == 0, torch.zeros_like(code), code)
    bad = x.isnan() | x.isinf() | (x < 0)
    return torch.where(bad, torch.full_like(code, 255), code)


def decode_e8m0(codes: Tensor) -> Tensor:
    """The fp32 powers of two of e8m0 codes (uint8); 255 is NaN."""
    value = torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes.to(torch.int32) - 127)
    return torch.where(codes == 255, torch.full_like(value, torch.nan), value)


# --------------------------------------------------------------------------------------- block-scaled 4 bit
def block_scales(amax: Tensor, block_format: BlockFormat, second_level: Tensor | None = None) -> Tensor:
    """The scale each block is divided by, from its largest magnitude. fp32, shape of ``amax``; 0 where it vanishes.

    nvfp4: e4m3(amax / 6), times ``second_level`` (fp32, broadcastable) when given.
    mxfp4: 2**(floor(log2 amax) - 2), the exponent the MX specification prescribes (so values in (6, 8) saturate).
    """
    if block_format == "mxfp4":
        scale = decode_e8m0(encode_e8m0(amax / 4.0))
        return torch.where(amax == 0, torch.zeros_like(scale), scale)
    if second_level is None:
        return round_e4m3(amax / E2M1_MAX)
    return round_e4m3(amax / (E2M1_MAX * second_level)) * second_level


def second_level_scale(x: Tensor) -> Tensor:
    """The fp32 scale per head that maps the head's largest magnitude to 448 * 6: (B, H, n, m) -> (B, H, 1, 1).

    1 for a head of zeros.
    """
    amax = x.float().abs().amax(dim=(-2, -1), keepdim=True) / (E4M3_MAX * E2M1_MAX)
    return torch.where(amax == 0, torch.ones_like(amax), amax)


ScaleChoice = Literal["six", "four_or_six", "search", "quick"]
"""Which e4m3 scale a block gets: the one that puts its maximum at 6; that or the one that puts it at 4; the best of those
whose code is 2 below to 6 above the first; or, "quick", the best of three of these (``quantize_blocks_quick``). Best: of
least squared error."""
SEARCHED = range(-2, 7)
QUICK_STEPS = (0, -1, 5)
"""What three tries gain most by: from the code of the scale that puts the maximum at 6 to those tried, in this order."""


def round_blocks(
    x: Tensor, dim: int, block_format: BlockFormat = "nvfp4", second_level: Tensor | None = None,
    choice: ScaleChoice = "six",
) -> Tensor:  # fmt: skip
    """``x`` as the values it has after a trip through a block-scaled 4-bit format; a new fp32 tensor.

    Args:
        x: any shape; the size of ``dim`` a multiple of the format's block (16 for nvfp4, 32 for mxfp4).
        dim: the dimension the blocks run along.
        second_level: fp32 scale broadcastable to x, or None (nvfp4 only).
        choice: of the block scale (nvfp4 only; see ``ScaleChoice``).

    Raises:
        InputError: the size of ``dim`` is no multiple of the block.
    """
    blocks, dim = _split(x.float(), dim, block_format)
    if second_level is not None:
        second_level = second_level.unsqueeze(dim + 1)
    if choice == "quick" and block_format == "nvfp4":
        level = 1.0 if second_level is None else second_level
        codes, scales = quantize_blocks_quick((blocks / level).movedim(dim + 1, -1))
        values = decode_e2m1(codes) * decode_e4m3(scales).unsqueeze(-1)
        return (values.movedim(-1, dim + 1) * level).reshape(x.shape)
    scale = block_scales(blocks.abs().amax(dim + 1, keepdim=True), block_format, second_level)
    best = _divide(blocks, scale).mul_(scale)
    if choice == "six" or block_format != "nvfp4":
        return best.reshape(x.shape)
    least = (best - blocks).square_().sum(dim + 1, keepdim=True)
    for other in _other_scales(blocks, scale, dim, second_level, choice):
        tried = _divide(blocks, other).mul_(other)
        error = (tried - blocks).square_().sum(dim + 1, keepdim=True)
        better = error < least  # never in a block with NaN
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best.reshape(x.shape)


def _other_scales(
    blocks: Tensor, scale: Tensor, dim: int, second_level: Tensor | None, choice: ScaleChoice
) -> Iterator[Tensor]:
    """The scales to be tried beside ``scale``, one tensor each."""
    level: Tensor | float = 1.0 if second_level is None else second_level
    if choice == "four_or_six":
        yield round_e4m3(blocks.abs().amax(dim + 1, keepdim=True) / (4.0 * level)) * level
        return
    code = encode_e4m3(scale / level).int()
    for step in SEARCHED:
        if step:
            yield decode_e4m3((code + step).clamp(0, 126).to(torch.uint8)) * level


def quantize_blocks_quick(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (..., 16) fp32 as e2m1 codes, uint8 (..., 16), and e4m3 scale codes, uint8 (...): bit by bit as the kernel.

    Scales are judged in fp16, as csrc/include/sage3/nvfp4_block.cuh says; the codes are those that were judged, 6 at most. A
    block that holds a NaN or an infinity has the scale NaN; its codes, and those of a block of scale 0, are 0.
    """
    amax = blocks.abs().amax(-1)
    start = encode_e4m3(amax.half().float() * (1.0 / 6.0))
    first = torch.where(amax < torch.inf, start, torch.full_like(start, 0x7F))
    magnitude = blocks.abs().half().float()
    best, least, values = first, torch.empty(0), torch.empty(0)
    for step in QUICK_STEPS:
        code = first.int() + step  # where there is no such code, a NaN, which is never better
        code = torch.where((code < 0) | (code > 0x7F), torch.full_like(code, 0x7F), code).to(torch.uint8)
        scale = decode_e4m3(code)
        y = (magnitude * (1.0 / scale).half().float().unsqueeze(-1)).half().float()
        error = _fp16_square_sum(y) * (scale * scale)
        if step == 0:
            least, values = error, y
            continue
        better = error < least  # never where either is NaN
        best, least = torch.where(better, code, best), torch.where(better, error, least)
        values = torch.where(better.unsqueeze(-1), y, values)
    codes = _rounded_bits(values.clamp(max=E2M1_MAX)).bitwise_right_shift(9).to(torch.uint8)
    codes += blocks.signbit().to(torch.uint8) * 8
    return codes.masked_fill_(((best == 0) | (best == 0x7F)).unsqueeze(-1), 0), best


def _fp16_square_sum(y: Tensor) -> Tensor:
    """The squares of what rounding fp16 magnitudes y (..., 16) to e2m1 changes, summed (...) in the kernel's order, fp32.

    Rounding goes on above 6 in steps of 2, 4, ... Two sums in fp16, of numbers 0-3 and 8-11 and of the others, by fused
    multiply-adds: fp64 holds their exact results.
    """
    rounded = (_rounded_bits(y) & ~0x1FF).view(torch.float16).float() * 2.0**14
    off = (rounded - y).half().double()
    terms = off.square_().unflatten(-1, (2, 2, 4)).transpose(-3, -2).flatten(-2)  # (..., 2, 8)
    total = torch.zeros_like(terms[..., 0])
    for i in range(terms.shape[-1]):
        total = _round_to_fp16(total + terms[..., i])
    return _round_to_fp16(total[..., 0] + total[..., 1]).float()


def _rounded_bits(y: Tensor) -> Tensor:
    """Magnitudes y rounded to e2m1's grid, of ties away from 0: fp16's bits of 2^-14 of them, codes from bit 9 on, int16.

    Below 1 both formats have fixed steps then: y / 2^14 is subnormal in fp16 where y is in e2m1. The nine last bits are no
    part of it.
    """
    return (y * 2.0**-14).half().view(torch.int16) + 0x100


def _round_to_fp16(x: Tensor) -> Tensor:
    """fp64 magnitudes rounded once to fp16's values below 65504; PyTorch's own conversion goes through fp32."""
    power = x.clamp(min=2.0**-14).view(torch.int64).bitwise_and_(0x7FF0000000000000).view(torch.float64)
    magic = power * (1.5 * 2.0**42)
    return (x + magic) - magic


def _split(x: Tensor, dim: int, block_format: BlockFormat) -> tuple[Tensor, int]:
    block = BLOCK_SIZE[block_format]
    dim = dim % x.dim()
    if x.shape[dim] % block:
        raise InputError(
            f"{block_format} needs a multiple of {block} values along dimension {dim}, got {x.shape[dim]}: pad it."
        )
    return x.unflatten(dim, (x.shape[dim] // block, block)), dim


def _divide(blocks: Tensor, scale: Tensor) -> Tensor:
    """round_e2m1(blocks / scale), 0 in blocks whose scale is 0; sign of zero not kept."""
    y = (blocks / scale.masked_fill(scale == 0, torch.inf)).clamp_(-E2M1_MAX, E2M1_MAX).contiguous()
    return round_float_(y, torch.empty_like(y), mantissa_bits=1, min_exponent=0)


@dataclass(frozen=True)
class BlockScaled:
    """A tensor in a block-scaled 4-bit format, blocks along the last dimension.

    Attributes:
        packed: uint8 (..., n/2), two e2m1 codes a byte.
        scales: uint8 (..., n/block), e4m3 codes (nvfp4) or e8m0 codes (mxfp4).
        second_level: fp32 broadcastable to (..., n), or None.
        block_format: "nvfp4" or "mxfp4".
    """

    packed: Tensor
    scales: Tensor
    second_level: Tensor | None = None
    block_format: BlockFormat = "nvfp4"

    def dequantize(self) -> Tensor:
        """The fp32 values, (..., n)."""
        scale = decode_e4m3(self.scales) if self.block_format == "nvfp4" else decode_e8m0(self.scales)
        values = decode_e2m1(unpack_e2m1(self.packed))
        values = values.unflatten(-1, (-1, BLOCK_SIZE[self.block_format])) * scale.unsqueeze(-1)
        values = values.flatten(-2)
        return values if self.second_level is None else values * self.second_level


def quantize_blocks(x: Tensor, block_format: BlockFormat = "nvfp4", second_level: Tensor | None = None) -> BlockScaled:
    """``x`` (..., n) in packed 4-bit codes with a scale per block of its last dimension.

    A block whose scale rounds to zero is all zeros; a block holding a NaN has a NaN scale.

    Raises:
        InputError: n is no multiple of the block.
    """
    blocks, _ = _split(x.float(), -1, block_format)
    if second_level is not None:
        blocks = blocks / second_level.unsqueeze(-1)
    amax = blocks.abs().amax(-1)
    scale = block_scales(amax, block_format)
    codes = encode_e2m1(torch.where(scale.unsqueeze(-1) == 0, torch.zeros_like(blocks), blocks / scale.unsqueeze(-1)))
    stored = encode_e4m3(scale) if block_format == "nvfp4" else encode_e8m0(amax / 4.0)
    return BlockScaled(pack_e2m1(codes.flatten(-2)), stored, second_level, block_format)


# ------------------------------------------------------------------------------------------------ 8 bit
Granularity = Literal["block", "token", "thread"]
Q_BLOCK, K_BLOCK = 128, 64
"""Rows of Q and of K that share a scale in "block" granularity: the tile of SageAttention2's kernels."""
Q_WARP = 32
"""Rows of Q one warp owns; "thread" granularity groups within it."""


def token_groups(tokens: int, granularity: Granularity, role: Literal["q", "k"], device: torch.device) -> Tensor:
    """Which scale each token uses: int64 (tokens,), groups numbered from 0.

    block: 128 consecutive rows of Q, 64 of K. token: each its own.
    thread: the rows one thread of ``mma.m16n8k32`` holds, so that a thread needs a single scale of each: in a
    warp's 32 rows of Q those equal modulo 8 (4 rows), in 64 tokens of K those with equal (token mod 8) // 2
    (16 tokens). Source: SageAttention2, arXiv 2411.10958, section 3.2.

    Raises:
        InputError: unknown granularity.
    """
    t = torch.arange(tokens, device=device)
    if granularity == "token":
        return t
    if granularity == "block":
        return t // (Q_BLOCK if role == "q" else K_BLOCK)
    if granularity == "thread":
        return t // Q_WARP * 8 + t % 8 if role == "q" else t // K_BLOCK * 4 + t % 8 // 2
    raise InputError(f"Unknown granularity {granularity!r}: use block, token or thread.")


def _group_amax(per_token: Tensor, granularity: Granularity, role: Literal["q", "k"]) -> Tensor:
    """The largest of ``per_token`` (..., tokens) in each group, (..., groups), in the order of ``token_groups``."""
    if granularity == "token":
        return per_token
    if granularity == "block":
        size = Q_BLOCK if role == "q" else K_BLOCK
        return pad_to(per_token, -1, size).unflatten(-1, (-1, size)).amax(-1)
    if role == "q":
        return pad_to(per_token, -1, Q_WARP).unflatten(-1, (-1, Q_WARP // 8, 8)).amax(-2).flatten(-2)
    return pad_to(per_token, -1, K_BLOCK).unflatten(-1, (-1, K_BLOCK // 8, 4, 2)).amax((-3, -1)).flatten(-2)


@dataclass(frozen=True)
class Int8:
    """INT8 codes (..., tokens, D) and one fp32 scale a group (..., groups); ``groups`` maps token to group.

    The last groups of "thread" granularity may be empty, their scale is then 0.
    """

    codes: Tensor
    scales: Tensor
    groups: Tensor

    def dequantize(self) -> Tensor:
        """The fp32 values, (..., tokens, D)."""
        return self.codes.float() * self.scales[..., self.groups].unsqueeze(-1)


def quantize_int8(x: Tensor, granularity: Granularity, role: Literal["q", "k"]) -> Int8:
    """``x`` (..., tokens, D) as round(x / s), s = max|x| / 127 over each group of tokens. Ties to even.

    Groups as in ``token_groups``. NaN in a group makes its scale NaN.

    Raises:
        InputError: unknown granularity.
    """
    x = x.float()
    groups = token_groups(x.shape[-2], granularity, role, x.device)
    scales = _group_amax(x.abs().amax(-1), granularity, role) / INT8_MAX
    codes = _safe_divide(x, scales[..., groups].unsqueeze(-1)).round_().clamp_(-INT8_MAX, INT8_MAX)
    return Int8(codes.nan_to_num_(nan=0.0).to(torch.int8), scales, groups)


def quantize_fp8_channels(v: Tensor) -> tuple[Tensor, Tensor]:
    """V (..., tokens, D) as e4m3 codes (uint8) and a scale per channel, fp32 (..., 1, D): max|v| / 448."""
    scale = _channel_scale(v, E4M3_MAX)
    return encode_e4m3(_safe_divide(v.float(), scale)), scale


def round_fp8_channels(v: Tensor) -> Tensor:
    """The fp32 values of ``quantize_fp8_channels(v)``."""
    scale = _channel_scale(v, E4M3_MAX)
    return round_e4m3(_safe_divide(v.float(), scale)) * scale


def round_int8_channels(v: Tensor) -> Tensor:
    """V (..., tokens, D) through INT8 with a scale per channel (max|v| / 127), as fp32 values."""
    scale = _channel_scale(v, INT8_MAX)
    return _safe_divide(v.float(), scale).round() * scale


def _channel_scale(v: Tensor, largest: float) -> Tensor:
    return v.float().abs().amax(-2, keepdim=True) / largest


def _safe_divide(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.zeros_like(x), x / scale)


def pad_to(x: Tensor, dim: int, multiple: int) -> Tensor:
    """``x`` with zeros appended along ``dim`` up to a multiple of ``multiple``; x itself when it already is."""
    missing = -x.shape[dim] % multiple
    if not missing:
        return x
    before = (x.dim() - 1 - dim % x.dim()) * 2
    return F.pad(x, [0] * before + [0, missing])
