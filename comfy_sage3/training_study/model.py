"""The model of an arm: the bundled one or a fresh one of its shape, with or without QK norm, whole or by adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..demo import load
from .settings import Setting


class LowRank(nn.Module):
    """A frozen linear layer with a trained product of two thin matrices beside it, which starts at zero."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def build(setting: Setting, seed: int, device: str) -> Any:
    """The model before its first step; the same for every form of attention."""
    torch.manual_seed(seed)
    model = load.load_transformer().requires_grad_(True) if setting.start == "bundled" else load.new_transformer()
    if not setting.qk_norm:
        for block in model.blocks:
            for layer in (block.attn1, block.attn2):
                layer.norm_q = layer.norm_k = nn.Identity()
    if setting.rank:
        model.requires_grad_(False)
        for block in model.blocks:
            layer = block.attn1
            for name in ("to_q", "to_k", "to_v"):
                setattr(layer, name, LowRank(getattr(layer, name), setting.rank))
            layer.to_out[0] = LowRank(layer.to_out[0], setting.rank)
    return nn.Module.to(model.train(), device)
