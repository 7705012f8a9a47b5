"""Inputs with an attention sink: one key that takes a given part of many queries' weight, with a small value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TILE = 64  # queries


def give_sink(
    q: Tensor, k: Tensor, v: Tensor, weight: float, tiles: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of N(0,1) q (B, H, Lq, D), k and v (B, Hkv, Lk, D) whose first key takes about ``weight``.

    Of every query, or of those in some tiles of 64; the scores are to be scaled by 1 / sqrt(D).
    """
    q, k, v = q.clone(), k.clone(), v.clone()
    tile = torch.arange(q.shape[2], device=q.device) // TILE
    sees = (
        torch.ones_like(tile, dtype=torch.bool) if tiles is None else torch.isin(tile, torch.tensor(tiles, device=q.device))
    )
    q[..., 0], k[..., 0] = (16.0 * sees).to(q.dtype), 0.0  # a channel that only the sink answers to
    k[:, :, 0] = 0.0
    k[:, :, 0, 0] = math.log(weight / (1 - weight) * k.shape[2] * math.exp(0.5)) / 16.0 * q.shape[3] ** 0.5
    v[:, :, 0] *= 0.05
    return q, k, v
