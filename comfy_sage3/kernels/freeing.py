"""Attention that lets go of q, k and v as soon as the kernel has its own, smaller copy of them.

At a video's lengths the three are gigabytes, and the output needs as much again: who has handed them over for good gets the
room back before the output is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import compiled


def attend(
    hold: list[Tensor], mask: Tensor | None, is_causal: bool, scale: float, kernel: str, also: list[Tensor]
) -> Tensor:
    """out (B, H, Lq, D), laid out token by token, of ``hold`` = [q, k, v], each (B, H, L, D); ``hold`` is emptied.

    ``kernel`` is a name in the built library. The 4-bit kernel keeps k, which its correction reads. ``also`` holds what
    else keeps that memory, and is emptied with it. Raises what the library raises: with both lists as they were, if
    nothing has been let go yet.
    """
    ops = compiled.operators()
    fp4 = kernel.startswith("fp4")
    workspace = (ops.fp4_quantize if fp4 else ops.int8_quantize)(*hold, scale, None)
    q, k = hold[0], hold[1]
    b, h, lq, d = q.shape
    dtype, device = q.dtype, q.device
    q = torch.empty_like(q, device="meta")  # its shape is all that is still asked for
    if not fp4:
        k = torch.empty_like(k, device="meta")
    hold.clear()
    also.clear()
    out = torch.empty(b, lq, h, d, dtype=dtype, device=device).transpose(1, 2)
    if fp4:
        ops.fp4_attend(workspace, q, k, mask, is_causal, scale, out, None)
    else:
        ops.int8_attend(workspace, q, k, mask, is_causal, out, None, kernel)
    return out
