"""A look at the first result of every layer and shape, before a black frame is made of it.

Where a model does not say which layer calls, the calls of one forward pass are told apart by their place in it.

The output must be finite, and a few of its rows must agree with exact attention as far as the precision promises. A layer
that fails gets the next precision for the rest of the run. The look costs a wait for the GPU and about a millionth of the
call's products, once a layer and shape: no step after the first is slower.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..precision import Precision
from .call import HookCall
from .layers import Layer

ROWS, HEADS = 16, 2  # that are held against exact attention, spread over all of them
LEAST_COSINE = {"fp4": 0.9, "int8": 0.99, "int8-fast": 0.98}  # of a kernel's rows; on usual inputs 0.98, 0.9998 and 0.9996
MOST_PLACES = 1000  # of one pass; what calls more often tells of no passes, and its calls are no longer told apart
NEXT = {"fp4": Precision.INT8, "int8-fast": Precision.INT8}  # else exact


class Guard:
    """What was looked at in this run, and which layers are not trusted with what."""

    def __init__(self) -> None:
        self._seen: set[tuple[Layer | int | None, str, tuple[int, ...], tuple[int, ...]]] = set()
        self._unnamed = 0  # calls of this forward pass that named no layer
        self._limits: dict[tuple[Layer | None, str], tuple[Precision, str]] = {}
        self._no_room: dict[tuple[str, tuple[int, ...], tuple[int, ...]], str] = {}

    def reset(self) -> None:
        """A new run begins."""
        self._seen.clear()
        self._limits.clear()
        self._no_room.clear()

    def begin_pass(self) -> None:
        """The model is about to be evaluated."""
        self._unnamed = 0

    def limit(self, layer: Layer | None, kernel: str, call: HookCall) -> tuple[Precision, str] | None:
        """What a layer's call is to have in place of ``kernel`` and why, or None where that is trusted."""
        if self._no_room and (reason := self._no_room.get((kernel, call.q_shape, call.k_shape))):
            return Precision.EXACT, reason
        return self._limits.get((layer, precision_of(kernel))) if self._limits else None

    def no_room(self, kernel: str, call: HookCall) -> str:
        """``kernel`` ran out of memory at this shape: it is not tried again in this run. Returns the reason."""
        reason = f"the GPU's memory did not suffice for {kernel} at {call.q_shape[2]} tokens; exact for the rest of the run"
        self._no_room[(kernel, call.q_shape, call.k_shape)] = reason
        return reason

    def place(self, layer: Layer | None) -> Layer | int:
        """What tells this call from others of its forward pass: its layer, else how many without one came before it."""
        if layer is not None:
            return layer
        self._unnamed += 1
        return min(self._unnamed, MOST_PLACES)

    def is_new(self, place: Layer | int | None, kernel: str, call: HookCall) -> bool:
        """Whether no result of this place and shape has been looked at."""
        return (place, kernel, call.q_shape, call.k_shape) not in self._seen

    def seen(self, place: Layer | int | None, kernel: str, call: HookCall) -> None:
        """A result of this place and shape has been looked at in another way."""
        self._seen.add((place, kernel, call.q_shape, call.k_shape))

    @torch.no_grad()
    def check(
        self, layer: Layer | None, kernel: str, call: HookCall, out: Tensor, place: Layer | int | None = None
    ) -> str | None:
        """What is wrong with the first ``out`` of this place and shape (in the call's layout); its layer then has a limit.

        All calls without a layer have one limit together. ``place`` is the layer where it is not given. Not what bad numbers
        in q, k or v made of it: no other kernel would mend that.
        """
        key = (layer if place is None else place, kernel, call.q_shape, call.k_shape)
        if key in self._seen:
            return None
        self._seen.add(key)
        precision = precision_of(kernel)
        finite, cosine = agreement(call, out)
        if not finite:
            if not call.all_finite():
                return None
            wrong = "is not finite"
        else:
            if cosine >= LEAST_COSINE[precision]:
                return None
            wrong = f"agrees too little with exact attention (cosine {cosine:.3f} of {ROWS} rows)"
        after = NEXT.get(precision, Precision.EXACT)
        reason = f"{layer or 'a layer without a number'}: {kernel}'s result {wrong}; {after.value} for the rest of the run"
        self._limits[(layer, precision)] = (after, reason)
        return reason


def precision_of(kernel: str) -> str:
    """ "int8-fast-sm90" -> "int8-fast"."""
    return next(name for name in ("fp4", "int8-fast", "int8") if kernel.startswith(name))


def agreement(call: HookCall, out: Tensor) -> tuple[bool, float]:
    """Whether ``out`` is finite, and the cosine between a few of its rows and exact attention in fp32 (1: both are zero).

    Waits for the device once, at the end. Slices and few launches: what it costs is latency more than work.
    """
    q, k, v, got = (x if call.layout == "HND" else x.transpose(1, 2) for x in (call.q, call.k, call.v, out))
    heads, rows = _spread(q.shape[1], HEADS), _spread(q.shape[2], ROWS)
    of_kv = _spread(k.shape[1], HEADS)  # of the first and the last head of q; where there is one, for both
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    keys, values = (x[0, of_kv].expand(q[0, heads].shape[0], -1, -1) for x in (k, v))
    # Plain products: PyTorch's attention would walk over all keys with one block for these few rows.
    scores = _wide_product(q[0, heads, rows], keys.transpose(1, 2)) * scale
    if call.mask is None:
        weights = scores.softmax(2)
    else:
        mask = call.mask[0]
        mask = mask if mask.shape[0] == 1 else mask[heads]
        mask = mask if mask.shape[1] == 1 else mask[:, rows]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
        weights = scores.softmax(2).nan_to_num()  # NaN: rows that attend nothing
    kind = torch.float32 if v.dtype == torch.float32 else torch.bfloat16  # sums of small numbers leave fp16
    want = torch.stack([_split_product(w, x.to(kind)) for w, x in zip(weights.to(kind), values, strict=True)])
    both = torch.stack([want, got[0, heads, rows].float()]).flatten(1)
    total = out.sum(dtype=torch.float32)  # not finite if any number is not, or if it is too large
    wanted, product, _, had, all_of = torch.cat([(both @ both.T).flatten(), total.unsqueeze(0)]).tolist()
    same = 1.0 if wanted == had else 0.0  # where one of them is zero
    cosine = product / math.sqrt(wanted) / math.sqrt(had) if wanted > 0 and had > 0 else same
    return math.isfinite(all_of) or bool(torch.isfinite(out).all()), cosine


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32; on a GPU and with a recent PyTorch without a copy of what is in 16 bits."""
    if a.is_cuda and a.dtype != torch.float32:
        try:
            return torch.bmm(a, b, out_dtype=torch.float32)
        except (TypeError, RuntimeError):  # PyTorch before 2.8; a device that lacks it
            pass
    return a.float() @ b.float()


def _split_product(weights: Tensor, v: Tensor) -> Tensor:
    """weights (R, L) @ v (L, D) of one dtype, summed in fp32, with many blocks at work on the long sum over few rows."""
    keys = v.shape[0]
    if keys < 64:
        return (weights @ v).float()
    left, pieces = next((left, n) for left in range(64) for n in range(64, 16, -1) if (keys - left) % n == 0)
    whole = keys - left
    split = weights[:, :whole].unflatten(1, (pieces, -1)).transpose(0, 1)
    total = (split @ v[:whole].unflatten(0, (pieces, -1))).sum(0, dtype=torch.float32)
    return total + weights[:, whole:] @ v[whole:] if left else total


def _spread(size: int, count: int) -> slice:
    """About ``count`` of ``size`` indices at equal distances, up to the last; two are the first and the last."""
    step = max((size - 1) // (count - 1), 1)
    return slice((size - 1) % step if size > count else 0, None, step)
