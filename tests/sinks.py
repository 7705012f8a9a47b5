"""Inputs with an attention sink: one key that takes a given part of many queries' weight, with a small value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import measure

TILE = 64  # queries


def give_sink(
    q: Tensor, k: Tensor, v: Tensor, weight: float, tiles: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of N(0,1) q (B, H, Lq, D), k and v (B, Hkv, Lk, D) whose first key takes about ``weight``.

    Of every query, or of those in some tiles of 64; the scores are to be scaled by 1 / sqrt(D).
    """
    q, k, v = q.clone(), k.clone(), v.clone()
    tile = torch.arange(q.shape[2], device=q.device) // TILE
    measure.give_sink(q, k, v, weight, 1.0 if tiles is None else torch.isin(tile, torch.tensor(tiles, device=q.device)))
    return q, k, v
