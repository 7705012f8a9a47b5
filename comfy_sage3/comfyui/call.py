"""One call of ComfyUI's attention hook, read into the shape the door takes.

The contract is that of ``wrap_attn`` in ComfyUI's comfy/ldm/modules/attention.py: q, k, v, heads and mask
come by position or by keyword, tensors are flat (B, L, H*D) or split (B, H, L, D), as is the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What a call may carry besides the named arguments of HookCall.read. Anything else could change the result
# in a way this code does not know, so such a call is left to ComfyUI.
KNOWN_EXTRAS = frozenset(("transformer_options", "_inside_attn_wrapper", "scale", "enable_gqa", "low_precision_attention"))


class NotServed(Exception):
    """Why a call is left to ComfyUI's own attention; the text is what the user reads."""


@dataclass(frozen=True)
class HookCall:
    """q (B, Lq, H, D) and k, v (B, Lk, Hkv, D) when ``layout`` is "NHD"; (B, H, L, D) when it is "HND"."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: str
    mask: Tensor | None
    scale: float | None
    split_output: bool  # the caller wants (B, H, Lq, D) back, not (B, Lq, H*D)

    @classmethod
    def read(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **extras: Any,
    ) -> HookCall:
        """Read the hook's arguments. Raises NotServed for a call that must keep ComfyUI's own attention."""
        if extras.get("low_precision_attention") is False:
            raise NotServed("the model asks for full precision here")
        if attn_precision == torch.float32 and q.dtype != torch.float32:
            raise NotServed("the model asks for float32 attention here")
        unknown = sorted(name for name, value in extras.items() if name not in KNOWN_EXTRAS and value is not None)
        if unknown:
            raise NotServed(f"the call has an argument this node does not know ({', '.join(unknown)})")
        scale = extras.get("scale")
        if scale is not None and not isinstance(scale, (int, float)):
            raise NotServed("scale is not a plain number")

        dims = 4 if skip_reshape else 3
        if not skip_reshape:  # SD3 hands over q and k flat and v split into heads
            q, k, v = (t.flatten(2) if t.ndim == 4 else t for t in (q, k, v))
        if not q.ndim == k.ndim == v.ndim == dims:
            raise NotServed(f"q, k and v have {q.ndim}, {k.ndim} and {v.ndim} dimensions where {dims} are expected")
        if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
            raise NotServed("q, k and v differ in dtype or device")
        if not skip_reshape:
            q, k, v = _split_heads(q, k, v, heads)
        call = cls(q, k, v, "HND" if skip_reshape else "NHD", None, scale, bool(skip_output_reshape))
        call._check_shapes(heads, bool(extras.get("enable_gqa", False)))
        return call if mask is None else _with_mask(call, mask)

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """(B, H, Lq, D) whatever the layout."""
        return _hnd(self.q, self.layout)

    @property
    def k_shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, Lk, D) whatever the layout."""
        return _hnd(self.k, self.layout)

    @property
    def needs_grad(self) -> bool:
        """Whether this call will be differentiated."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.q, self.k, self.v))

    def all_finite(self) -> bool:
        """Whether q, k and v are free of NaN and infinity; waits for the device."""
        return all(bool(torch.isfinite(t).all()) for t in (self.q, self.k, self.v))

    def of_few_heads(self, count: int = 2) -> HookCall:
        """This call, of the first batch entry, up to ``count`` heads of k and v and the heads of q that go with them."""
        q, k, v = (x if self.layout == "HND" else x.transpose(1, 2) for x in (self.q, self.k, self.v))
        group = q.shape[1] // k.shape[1]
        of_kv = torch.linspace(0, k.shape[1] - 1, min(count, k.shape[1])).round().long().tolist()
        of_q = [head * group + i for head in of_kv for i in range(group)]
        mask = None if self.mask is None else self.mask[:1]
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, of_q]
        q, k, v = q[:1, of_q], k[:1, of_kv], v[:1, of_kv]
        if self.layout == "NHD":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return HookCall(q, k, v, self.layout, mask, self.scale, self.split_output)

    def result(self, out: Tensor) -> Tensor:
        """``out``, in this call's layout, in the form the caller asked for."""
        if self.split_output:
            return out if self.layout == "HND" else out.transpose(1, 2)
        out = out if self.layout == "NHD" else out.transpose(1, 2)
        return out.reshape(out.shape[0], out.shape[1], -1)

    def _check_shapes(self, heads: int, enable_gqa: bool) -> None:
        (b, h, _, d), (bk, hk, lk, dk) = self.q_shape, self.k_shape
        bv, hv, lv, dv = _hnd(self.v, self.layout)
        if h != heads:
            raise NotServed(f"q has {h} heads where the call says {heads}")
        if (bk, bv, dk, dv, hv, lv) != (b, b, d, d, hk, lk):
            raise NotServed(f"the shapes of q {self.q_shape}, k {self.k_shape} and v {(bv, hv, lv, dv)} do not match")
        if hk != h and not (enable_gqa and hk and h % hk == 0):
            raise NotServed(f"{h} query heads do not fit {hk} key heads")


def _hnd(t: Tensor, layout: str) -> tuple[int, int, int, int]:
    b, x, y, d = t.shape
    return (b, x, y, d) if layout == "HND" else (b, y, x, d)


def _split_heads(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    head_dim, rest = divmod(q.shape[-1], heads)
    if rest or any(t.shape[-1] % head_dim for t in (k, v)):
        raise NotServed(f"widths {q.shape[-1]}, {k.shape[-1]}, {v.shape[-1]} do not split into {heads} heads")
    split = tuple(t.unflatten(-1, (t.shape[-1] // head_dim, head_dim)) for t in (q, k, v))
    return split[0], split[1], split[2]


def _with_mask(call: HookCall, mask: Tensor) -> HookCall:
    """ComfyUI's masks may lack leading dimensions: (Lq, Lk), (B, Lq, Lk) or (B, H, Lq, Lk), broadcastable."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise NotServed(f"the mask is {mask.dtype}, neither bool nor float")
    if mask.ndim == 2:
        mask = mask[None, None]
    elif mask.ndim == 3:
        mask = mask[:, None]
    b, h, lq, _ = call.q_shape
    want = (b, h, lq, call.k_shape[2])
    if mask.ndim != 4 or any(m not in (1, w) for m, w in zip(mask.shape, want, strict=True)):
        raise NotServed(f"the mask's shape {tuple(mask.shape)} does not broadcast to {want}")
    return HookCall(call.q, call.k, call.v, call.layout, mask, call.scale, call.split_output)
