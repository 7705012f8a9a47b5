"""The 8-bit format of csrc/include/sage3/int8_format.cuh in plain PyTorch: an independent quantiser to hold kernels to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUERY_TILE, KEY_TILE = 64, 128


def padded_head_dim(d: int) -> int:
    """64, 96, 128 or 256."""
    return next(p for p in (64, 96, 128, 256) if d <= p)


def swizzle(offset: Tensor, row_bytes: int) -> Tensor:
    """XOR of 16-byte units, as TMA and wgmma define it."""
    return offset ^ (((offset >> 7) & (row_bytes // 16 - 1)) << 4)


def query_offsets(d: int) -> Tensor:
    """(64, d): the byte of a q8 tile that holds (row, channel)."""
    row, channel = torch.arange(QUERY_TILE)[:, None], torch.arange(d)[None, :]
    lane = row % 8 * 4 + channel % 16 // 4
    register = row % 16 // 8 + 2 * (channel % 32 // 16)
    return ((row // 16 * (d // 32) + channel // 32) * 32 + lane) * 16 + register * 4 + channel % 4


def key_offsets(d: int) -> Tensor:
    """(128, d): the byte of a k8 tile that holds (token, channel)."""
    token, channel = torch.arange(KEY_TILE)[:, None], torch.arange(d)[None, :]
    width = {64: 64, 96: 32}.get(d, 128)
    return channel // width * KEY_TILE * width + swizzle(token * width + channel % width, width)


def value_offsets(d: int) -> Tensor:
    """(128, d): the byte of a v8 tile that holds (token, channel)."""
    token, channel = torch.arange(KEY_TILE)[:, None], torch.arange(d)[None, :]
    t = token % 16
    position = token - t + t % 8 // 2 * 4 + t // 8 * 2 + t % 2
    return swizzle(channel * KEY_TILE + position, KEY_TILE)


def _tiles(x: Tensor, tile: int, d: int) -> Tensor:
    """(B, H, L, D) -> fp32 (B * H, tiles, tile, padded D), zeros where there is nothing."""
    length, head_dim = x.shape[2:]
    x = torch.nn.functional.pad(x.float(), (0, d - head_dim, 0, -length % tile))
    return x.flatten(0, 1).unflatten(1, (-1, tile))


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, x / scale, 0).round().clamp(-127, 127).to(torch.int8)


def _scatter(codes: Tensor, offsets: Tensor) -> Tensor:
    """(heads, tiles, rows, d) codes -> the tiles' bytes in memory."""
    out = torch.empty(codes.shape[0], codes.shape[1], offsets.numel(), dtype=torch.int8, device=codes.device)
    out[:, :, offsets.flatten().to(codes.device)] = codes.flatten(2)
    return out


def quantize(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The workspace (uint8) for HND inputs, with the exact means of K and V and the rms of V over all tokens."""
    d = padded_head_dim(q.shape[3])
    pad = (0, d - q.shape[3])
    k_mean = k.float().mean(2, keepdim=True)
    v_mean = v.float().mean(2, keepdim=True)
    v_norm = (v.float() - v_mean).square().mean(2, keepdim=True).sqrt().clamp_min(1e-6)
    qs = _tiles(q, QUERY_TILE, d) * (abs(scale) * math.log2(math.e)) * (1 if scale >= 0 else -1)
    ks = _tiles(k.float() - k_mean, KEY_TILE, d)
    vs = _tiles((v.float() - v_mean) / v_norm, KEY_TILE, d)
    q_scale = qs.abs().amax(3) / 127
    k_scale = ks.abs().amax(3).unflatten(2, (-1, 4, 2)).amax((2, 4)) / 127  # groups: token % 8 // 2
    v_scale = vs.abs().amax(2).unflatten(2, (-1, 32)).amax(3) / 127
    q8 = _scatter(_codes(qs, q_scale[..., None]), query_offsets(d))
    per_token = k_scale[:, :, None, :, None].expand(-1, -1, KEY_TILE // 8, -1, 2).flatten(2)
    k8 = _scatter(_codes(ks, per_token[..., None]), key_offsets(d))
    v8 = _scatter(_codes(vs, v_scale.repeat_interleave(32, 2)[:, :, None]), value_offsets(d))
    v_scale = torch.nn.functional.pad(v_scale, (0, (4 if d <= 128 else 8) - v_scale.shape[2]))
    flat = [torch.nn.functional.pad(t, pad).flatten() for t in (k_mean, v_mean)]
    norm = torch.nn.functional.pad(v_norm, pad, value=1).flatten()
    parts = []
    for part in (q8, q_scale, k8, k_scale, v8, v_scale, *flat, norm):
        raw = part.contiguous().flatten().view(torch.uint8)
        parts.append(torch.nn.functional.pad(raw, (0, -raw.numel() % 256)))
    return torch.cat(parts)
