"""The Wan VAE over a whole clip at once, for training.

diffusers (like Wan) walks through a clip in chunks with a cache of past features, which costs a launch per layer and
chunk. A whole clip fits in memory here, and a causal 3-D convolution over it is a 2-D convolution over the channels
of three neighbouring frames, which GPUs run far faster at 16 to 64 channels. The results are the chunked ones to
rounding (tests/demo/test_fast_vae.py).

Activations are (B*T, C, H, W); every function takes T beside them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def encode(vae: Any, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance, each (B, 16, T', H/8, W/8), of a video (B, 3, T, H, W) in [-1, 1] with T = 4n + 1."""
    batch, frames = len(video), video.shape[2]
    x = _fold(video)
    encoder = vae.encoder
    x = _causal(encoder.conv_in, x, frames)
    for layer in encoder.down_blocks:
        if hasattr(layer, "conv1"):
            x = _residual(layer, x, frames)
        else:
            x = layer.resample(x)
            if hasattr(layer, "time_conv"):
                x, frames = _halve_time(layer.time_conv, x, frames)
    x = _middle(encoder.mid_block, x, frames)
    x = _causal(encoder.conv_out, F.silu(_norm(encoder.norm_out, x)), frames)
    moments = _unfold(_causal(vae.quant_conv, x, frames), batch)
    mean, log_variance = moments.float().chunk(2, 1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """The video (B, 3, T, H, W), not clamped, of latents (B, 16, T', H/8, W/8)."""
    batch, frames = len(latents), latents.shape[2]
    x = _causal(vae.post_quant_conv, _fold(latents), frames)
    decoder = vae.decoder
    x = _causal(decoder.conv_in, x, frames)
    x = _middle(decoder.mid_block, x, frames)
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = _residual(layer, x, frames)
        if block.upsamplers is not None:
            layer = block.upsamplers[0]
            if hasattr(layer, "time_conv"):
                x, frames = _double_time(layer.time_conv, x, frames)
            x = layer.resample[1](F.interpolate(x, scale_factor=2.0, mode="nearest"))
    x = _causal(decoder.conv_out, F.silu(_norm(decoder.norm_out, x)), frames)
    return _unfold(x, batch)


def _fold(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _unfold(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _neighbours(x: Tensor, frames: int, taps: int) -> Tensor:
    """Each frame with the ``taps - 1`` before it (zeros before the first), stacked on the channels."""
    clip = F.pad(x.unflatten(0, (-1, frames)), (0, 0, 0, 0, 0, 0, taps - 1, 0))
    return torch.cat([clip[:, i : i + frames] for i in range(taps)], 2).flatten(0, 1)


def _flat_weight(conv: Any) -> Tensor:
    """(O, C, taps, kh, kw) -> (O, taps * C, kh, kw), the order of ``_neighbours``."""
    return conv.weight.transpose(1, 2).flatten(1, 2)


def _causal(conv: Any, x: Tensor, frames: int) -> Tensor:
    taps, height, _ = conv.kernel_size
    if taps > 1:
        x = _neighbours(x, frames, taps)
    return F.conv2d(x, _flat_weight(conv), conv.bias, padding=height // 2)


def _halve_time(conv: Any, x: Tensor, frames: int) -> tuple[Tensor, int]:
    """Stride 2 in time over windows of three frames; the first frame passes through unchanged."""
    clip = x.unflatten(0, (-1, frames))
    windows = torch.cat([clip[:, 0:-2:2], clip[:, 1:-1:2], clip[:, 2::2]], 2)
    half = windows.shape[1]
    later = F.conv2d(windows.flatten(0, 1), _flat_weight(conv), conv.bias).unflatten(0, (-1, half))
    return torch.cat([clip[:, :1], later], 1).flatten(0, 1), half + 1


def _double_time(conv: Any, x: Tensor, frames: int) -> tuple[Tensor, int]:
    """Two frames out of each but the first; the convolution does not see the first frame (as Wan's cache has it)."""
    clip = x.unflatten(0, (-1, frames))
    if frames == 1:
        return x, 1
    later = clip[:, 1:].flatten(0, 1)
    pairs = F.conv2d(_neighbours(later, frames - 1, 3), _flat_weight(conv), conv.bias)
    pairs = pairs.unflatten(1, (2, -1)).unflatten(0, (-1, frames - 1)).flatten(1, 2)  # (B, 2(T-1), C, H, W)
    return torch.cat([clip[:, :1], pairs], 1).flatten(0, 1), 2 * frames - 1


def _norm(layer: Any, x: Tensor) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-12) * layer.gamma.view(1, -1, 1, 1)
    return y.to(x.dtype)


def _residual(layer: Any, x: Tensor, frames: int) -> Tensor:
    shortcut = _causal(layer.conv_shortcut, x, frames) if hasattr(layer.conv_shortcut, "weight") else x
    y = _causal(layer.conv1, F.silu(_norm(layer.norm1, x)), frames)
    return shortcut + _causal(layer.conv2, F.silu(_norm(layer.norm2, y)), frames)


def _middle(block: Any, x: Tensor, frames: int) -> Tensor:
    x = _residual(block.resnets[0], x, frames)
    for attention, layer in zip(block.attentions, list(block.resnets)[1:], strict=True):
        q, k, v = attention.to_qkv(_norm(attention.norm, x)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        x = _residual(layer, x + attention.proj(mixed), frames)
    return x
