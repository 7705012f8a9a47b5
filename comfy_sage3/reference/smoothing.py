"""What is taken out of Q and K before they are quantised, and what must be added back.

Video and image models give K (and, less, Q) channels with a large offset shared by all tokens. A 4-bit block whose
scale is set by the offset has no bits left for what distinguishes the tokens. Source: arXiv 2410.02367 (K),
arXiv 2411.10958 (Q), arXiv 2505.11594 section 3.1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Q_GROUP = 128
"""Rows of Q that share a mean: the query tile of the kernel, so that the correction is one vector a tile."""


def token_mean(k: Tensor) -> Tensor:
    """The mean of K or V (B, H, Lk, D) over its tokens, (B, H, 1, D); zeros when there are none.

    Subtracting K's changes every score of a row by the same amount, which softmax ignores; the LSE moves by
    scale * q . mean, which the caller adds back. Subtracting V's takes it from every output row, whose weights add up to 1.
    """
    return k.sum(-2, keepdim=True) / max(k.shape[-2], 1)


SAMPLES = 512


def sample_tokens(tokens: int, device: torch.device) -> Tensor:
    """Which tokens the kernels take the mean over: int64, all of them or ``SAMPLES``.

    Every tokens/512, moved on by a fraction of the step that differs from one to the next (csrc/include/sage3/sample.cuh).
    """
    i = torch.arange(min(tokens, SAMPLES), device=device)
    if tokens <= SAMPLES:
        return i
    return ((i << 16) | (i * 40503 & 0xFFFF)) * tokens // (SAMPLES << 16)


def sampled_mean(x: Tensor) -> Tensor:
    """The mean of ``sample_tokens`` of K or V (B, H, Lk, D), (B, H, 1, D) fp32, summed in fp64; zeros when there are none.

    Any constant may be subtracted in place of the mean; how well it fits only decides about the range left to the codes.
    """
    sample = x[..., sample_tokens(x.shape[-2], x.device), :].double()
    return (sample.sum(-2, keepdim=True) / max(sample.shape[-2], 1)).float()


def halving_means(q: Tensor) -> Tensor:
    """``query_means`` per 128 rows in fp32, added in the kernel's order: rows r and r + 64, then r and r + 32, and so on."""
    tokens = q.shape[-2]
    blocks = -(-tokens // Q_GROUP)
    sums = F.pad(q, (0, 0, 0, blocks * Q_GROUP - tokens)).unflatten(-2, (blocks, Q_GROUP))
    while sums.shape[-2] > 1:
        first, second = sums.chunk(2, -2)
        sums = first + second
    rows = (tokens - Q_GROUP * torch.arange(blocks, device=q.device)).clamp(max=Q_GROUP)
    return sums.squeeze(-2) / rows.to(q.dtype).unsqueeze(-1)


def query_means(q: Tensor, per_block: bool = True) -> Tensor:
    """Means of Q (B, H, Lq, D): of each 128 rows, (B, H, ceil(Lq / 128), D), or of all of them, (B, H, 1, D).

    The mean of the last, partial block is over its real rows only. The scores lose mean . K^T, which differs
    from key to key and must be added back before the softmax.
    """
    tokens = q.shape[-2]
    if not per_block:
        return q.sum(-2, keepdim=True) / max(tokens, 1)
    blocks = -(-tokens // Q_GROUP)
    sums = F.pad(q, (0, 0, 0, blocks * Q_GROUP - tokens)).unflatten(-2, (blocks, Q_GROUP)).sum(-2)
    rows = torch.full((blocks, 1), float(Q_GROUP), dtype=q.dtype, device=q.device)
    if blocks:
        rows[-1] = tokens - (blocks - 1) * Q_GROUP
    return sums / rows


def spread_means(means: Tensor, tokens: int, per_block: bool = True) -> Tensor:
    """``query_means`` repeated for each row it belongs to: (B, H, tokens, D), or (B, H, 1, D) as it is."""
    return means.repeat_interleave(Q_GROUP, -2)[..., :tokens, :] if per_block else means


def hadamard(x: Tensor) -> Tensor:
    """``x`` (..., D) times the orthonormal Hadamard matrix, D padded with zeros to a power of two P: (..., P).

    Rotating Q and K alike leaves Q K^T as it is and spreads an outlier channel over all channels. It is here for
    comparison: it spreads a channel offset but does not remove it.
    """
    size = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = F.pad(x, (0, size - x.shape[-1]))
    shape = x.shape
    step = 1
    while step < size:
        x = x.reshape(*shape[:-1], size // (2 * step), 2, step)
        a, b = x.unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).reshape(shape)
        step *= 2
    return x / math.sqrt(size)


def smooth_quant(q: Tensor, k: Tensor, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """Q / s and K * s with s = max|Q_c|**alpha / max|K_c|**(1 - alpha) per channel c: the product is unchanged.

    SmoothQuant (arXiv 2211.10438) moves the outliers of one operand into the other; for comparison.
    q (B, Hkv, n, D) and k (B, Hkv, m, D) must have the same heads.
    """
    tiny = 1e-5
    q_max = q.abs().amax(-2, keepdim=True).clamp_min(tiny)
    k_max = k.abs().amax(-2, keepdim=True).clamp_min(tiny)
    s = q_max.pow(alpha) / k_max.pow(1.0 - alpha)
    return q / s, k * s
