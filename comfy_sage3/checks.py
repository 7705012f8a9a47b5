"""What a call to ``attention`` must look like; every refusal is an InputError of one sentence.

Everything here reads shapes, dtypes and devices only, never values, so it costs no device synchronisation
and can be traced by ``torch.compile``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import InputError
from .kernels.devices import ALL_DTYPES, AUTOCAST_DEVICES, LOW_BIT_DTYPES


def tensors(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """q, k and v are 4-D strided floating tensors on one device; mask is on it too."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} is a {type(tensor).__name__}: give a torch.Tensor.")
        if tensor.layout != torch.strided:
            raise InputError(f"{name} is stored as {tensor.layout}: give a dense tensor ({name}.to_dense()).")
        if tensor.dim() != 4:
            raise InputError(
                f"{name} has {tensor.dim()} dimensions: give 4, (batch, heads, tokens, head_dim) for layout "
                "'HND' or (batch, tokens, heads, head_dim) for 'NHD'."
            )
        if tensor.dtype not in ALL_DTYPES:
            raise InputError(f"{name} is {tensor.dtype}: convert it to float16, bfloat16 or float32.")
        if tensor.device != q.device:
            raise InputError(f"{name} is on {tensor.device} and q on {q.device}: move them to one device.")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise InputError(f"mask is a {type(mask).__name__}: give a torch.Tensor or None.")
        if mask.device != q.device:
            raise InputError(f"mask is on {mask.device} and q on {q.device}: move them to one device.")
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise InputError(f"mask is {mask.dtype}: give bool (True = attend) or a floating mask to add to the scores.")


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the autocast dtype where autocast is on, as ``F.scaled_dot_product_attention`` does."""
    kind = q.device.type
    if kind not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (t.to(dtype) if t.dtype in LOW_BIT_DTYPES else t for t in (q, k, v))
    return q, k, v


def shapes(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    """q (B, H, Lq, D), k (B, Hkv, Lk, D) and v (B, Hkv, Lk, Dv) belong together (already in HND order)."""
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise InputError(f"{name} is {tensor.dtype} and q is {q.dtype}: convert them to one dtype.")
        if tensor.shape[0] != q.shape[0]:
            raise InputError(f"{name} has batch {tensor.shape[0]} and q {q.shape[0]}: make them equal.")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise InputError(
            f"k has {k.shape[1]} heads of {k.shape[2]} tokens and v has {v.shape[1]} of {v.shape[2]}: "
            "make them equal (is the layout right?)."
        )
    if q.shape[3] != k.shape[3]:
        raise InputError(f"k has head_dim {k.shape[3]} and q {q.shape[3]}: make them equal.")
    if q.shape[3] == 0 or v.shape[3] == 0:
        raise InputError("head_dim is 0: give at least 1.")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads:
        if not enable_gqa:
            raise InputError(
                f"q has {heads} heads and k and v have {kv_heads}: pass enable_gqa=True for grouped-query "
                "attention (or check the layout)."
            )
        if kv_heads == 0 or heads % kv_heads:
            raise InputError(f"q has {heads} heads and k and v have {kv_heads}: grouped-query attention needs a multiple.")


def attention_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """``mask`` with 4 dimensions and, when additive, q's dtype; it must broadcast to (B, H, Lq, Lk)."""
    if mask is None:
        return None
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    shape = tuple(mask.shape)
    fits = len(shape) <= 4 and all(m in (1, n) for m, n in zip(shape[::-1], full[::-1], strict=False))
    if not fits:
        raise InputError(f"mask has shape {shape}: it must broadcast to (batch, heads, q tokens, k tokens) = {full}.")
    for _ in range(4 - len(shape)):
        mask = mask.unsqueeze(0)
    return mask if mask.dtype == torch.bool else mask.to(q.dtype)


def scale(value: float | None) -> float | None:
    """``value`` as a finite float, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"scale is a {type(value).__name__}: give a number or None for head_dim ** -0.5.")
    if not math.isfinite(value):
        raise InputError(f"scale is {value}: give a finite number or None for head_dim ** -0.5.")
    return float(value)


def layout(value: str) -> bool:
    """Whether ``value`` is the token-major layout NHD; raises InputError for anything but HND and NHD."""
    if value not in ("HND", "NHD"):
        raise InputError(
            f"Unknown layout {value!r}: choose 'HND' (batch, heads, tokens, head_dim) "
            "or 'NHD' (batch, tokens, heads, head_dim)."
        )
    return value == "NHD"
