"""Attention as torch ops: ``torch.compile`` and autograd see one opaque call with known shapes and strides.

Every op takes HND tensors of any strides and returns fresh ones: contiguous, from a compiled kernel in q's own
order of memory. ``note`` names the report in which to count the call when it really runs ("" counts nothing).
fp4, int8-fast and the compiled kernels of this module have no gradient: their backward raises. ``training`` has one's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..errors import InputError
from ..report import record_gradient_note, record_note
from . import compiled, exact
from .devices import AUTOCAST_DEVICES


def _unused_namespace() -> str:
    """A namespace for this load of the module, in which torch has no ops yet.

    Never an old one: ``custom_op`` under a taken name destroys the op that was there, and whoever still holds
    it (another module, a compiled graph, a node of a reloaded pack) then calls freed memory. The first load
    as ``comfy_sage3`` is ``comfy_sage3``; a copy under another name (installed, and again as a ComfyUI node
    pack) has a hash of that name, the same in every process; a reload has a number.
    """
    package = __name__.removesuffix(".kernels.ops")
    first = "comfy_sage3"
    if package != first:
        first += "_" + hashlib.sha256(package.encode()).hexdigest()[:8]
    names = chain([first], (f"{first}_load{n}" for n in count(2)))
    return next(name for name in names if not hasattr(getattr(torch.ops, name), "exact_attention"))


NAMESPACE = _unused_namespace()


def refuse_bad_numbers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, infinite: bool) -> None:
    """Raise InputError naming the first tensor that holds NaN (or infinity, when ``infinite``).

    Reads every value and waits for the device, so it is for CPU tensors and for emulated kernels only:
    rounding to few bits would turn NaN and infinity into ordinary numbers and hide the fault.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v), ("mask", mask)):
        if tensor is None or tensor.dtype == torch.bool or tensor.numel() == 0:
            continue
        low, high = (x.item() for x in torch.aminmax(tensor.detach()))  # NaN if any value is
        if math.isnan(low):
            found = "NaN"
        elif infinite and name != "mask" and (math.isinf(low) or math.isinf(high)):
            found = "infinity"
        else:
            continue
        raise InputError(
            f"{name} contains {found}: look at the step that produced it "
            "(most often an fp16 overflow, which bfloat16 or float32 avoids)."
        )


def full_precision(q: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: it would round the fp32 steps inside a kernel; ``attention`` has cast the inputs."""
    if q.device.type in AUTOCAST_DEVICES:
        return torch.autocast(q.device.type, enabled=False)
    return nullcontext()


def _op(name: str) -> Callable[[Callable[..., Any]], Any]:
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())


@_op("exact_attention")
def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    note: str = "",
) -> tuple[Tensor, Tensor]:
    """Exact attention -> (out (B, H, Lq, Dv), lse float32 (B, H, Lq), or 0 elements when not asked for)."""
    if q.device.type == "cpu":
        refuse_bad_numbers(q, k, v, mask, infinite=False)
    with full_precision(q):
        if return_lse:
            out, lse = exact.with_lse(q, k, v, mask, is_causal, scale)
        else:
            out, lse = exact.sdpa(q, k, v, mask, is_causal, scale), q.new_empty(0, dtype=torch.float32)
    record_note(note)
    return out.contiguous(), lse.contiguous()


@_op("exact_attention_backward")
def exact_attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradients of out and lse; None stands for zero."""
    with full_precision(q):
        dq, dk, dv = exact.backward(dout, dlse, q, k, v, mask, is_causal, scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_op("exact_mask_gradient")
def exact_mask_gradient(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The gradient of an additive mask, as ``exact_attention_backward``'s of q, k and v."""
    with full_precision(q):
        return exact.mask_gradient(dout, dlse, q, k, v, mask, is_causal, scale)


def _emulate(
    run: Callable[..., tuple[Tensor, Tensor]], options: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    is_causal: bool, scale: float | None, note: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    refuse_bad_numbers(q, k, v, mask, infinite=True)
    with full_precision(q):
        out, lse = run(q, k, v, mask=mask, is_causal=is_causal, scale=scale, options=options)
    record_note(note)
    return out.contiguous(), lse.contiguous()


def _within_range(mask: Tensor | None) -> Tensor | None:
    """A mask of about -finfo.max, in the units of the 4-bit kernel's exponents, would be -inf, a row of it attend nothing
    in place of everything alike. From -1e30 on no score makes a difference any more."""
    if mask is None or mask.dtype in (torch.bool, torch.float16):
        return mask
    return torch.where(mask.isneginf(), mask, mask.clamp(min=-1e30))


@_op("fp4_attention")
def fp4_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    note: str = "",
) -> tuple[Tensor, Tensor]:
    """4-bit attention (NVFP4, SageAttention3), emulated -> (out, lse)."""
    return _emulate(reference.fp4_attention, reference.OUR_FP4, q, k, v, _within_range(mask), is_causal, scale, note)


@_op("int8_attention")
def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    note: str = "",
) -> tuple[Tensor, Tensor]:
    """8-bit attention, emulated -> (out, lse)."""
    return _emulate(reference.int8_attention, reference.OUR_INT8, q, k, v, mask, is_causal, scale, note)


@_op("int8_fast_attention")
def int8_fast_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    note: str = "",
) -> tuple[Tensor, Tensor]:
    """8-bit attention with linear pieces for exponentials, emulated -> (out, lse)."""
    return _emulate(reference.int8_attention, reference.OUR_INT8_FAST, q, k, v, mask, is_causal, scale, note)


def as_faked(q: Tensor) -> Tensor:
    """The stride of a single channel means nothing, and torch's fake tensors make another of it."""
    return q.contiguous() if q.shape[3] == 1 else q


@_op("int8_attention_compiled")
def int8_attention_compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    kernel: str,
    note: str = "",
) -> tuple[Tensor, Tensor]:
    """8-bit attention by ``kernel`` of the built library -> (out, lse, of 0 elements when not asked for).

    The GPU is never waited for, so nothing looks for NaN here. mask is bool, fp16, bf16 or fp32.
    """
    out, lse = compiled.operators().int8_attention(as_faked(q), k, v, mask, is_causal, scale, return_lse, kernel)
    record_note(note)
    return out, lse


@_op("fp4_attention_compiled")
def fp4_attention_compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    kernel: str,
    note: str = "",
) -> tuple[Tensor, Tensor]:
    """4-bit attention by the built library; all else as ``int8_attention_compiled``. ``kernel`` is "fp4-sm120"."""
    mask = _within_range(mask)
    out, lse = compiled.operators().fp4_attention(as_faked(q), k, v, mask, is_causal, scale, return_lse)
    record_note(note)
    return out, lse


@_op("int8_attention_backward")
def int8_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    note: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of 8-bit attention from the gradient of its output, by the same 8-bit products."""
    with full_precision(q):
        dq, dk, dv = reference.int8_attention_backward(
            dout, q, k, v, out, lse, mask=mask, is_causal=is_causal, scale=scale, options=reference.OUR_INT8
        )
    record_gradient_note(note)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@fp4_attention.register_fake
@int8_attention.register_fake
@int8_fast_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    note: str = "",
) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


@int8_attention_compiled.register_fake
@fp4_attention_compiled.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    kernel: str,
    note: str = "",
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)  # as binding.cpp does: q's order of memory, if that keeps a token's channels together
    if out.stride(3) != 1 or q.shape[3] == 1:
        out = q.new_empty(q.shape)
    return out, q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)


@exact_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    note: str = "",
) -> tuple[Tensor, Tensor]:
    lse_shape = q.shape[:3] if return_lse else (0,)
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(lse_shape, dtype=torch.float32)


@exact_attention_backward.register_fake
def _(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@exact_mask_gradient.register_fake
def _(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    return mask.new_empty(mask.shape)


@int8_attention_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    note: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.is_causal, ctx.scale, *rest = inputs
    ctx.spare = (None,) * (2 + len(rest))  # no gradient: is_causal, scale and what follows
    ctx.note = rest[-1]
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.set_materialize_grads(False)  # so that an lse nobody used costs nothing


def _exact_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, mask, _, lse = ctx.saved_tensors
    if dlse is not None and lse.numel() == 0:
        dlse = None
    if dout is None and dlse is None:
        return (None,) * 4 + ctx.spare
    grads = exact_attention_backward(dout, dlse, q, k, v, mask, ctx.is_causal, ctx.scale)
    dmask = None
    if ctx.needs_input_grad[3]:
        dmask = exact_mask_gradient(dout, dlse, q, k, v, mask, ctx.is_causal, ctx.scale)
    return (*grads, dmask, *ctx.spare)


def _int8_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, mask, out, lse = ctx.saved_tensors
    total: list[Tensor] = []
    if dout is not None:
        total = list(int8_attention_backward(dout, q, k, v, out, lse, mask, ctx.is_causal, ctx.scale, ctx.note))
    if dlse is not None:  # the 8-bit backward knows only out; the lse's own gradient is exact
        exactly = exact_attention_backward(None, dlse, q, k, v, mask, ctx.is_causal, ctx.scale)
        total = [a + b for a, b in zip(total, exactly, strict=True)] if total else list(exactly)
    return (*(total or (None,) * 3), None, *ctx.spare)


def no_second_derivative(ctx: Any, *grads: Any) -> None:
    """The backward of a backward: says in plain words that there is none. Raises RuntimeError."""
    raise RuntimeError(
        "This attention has no second derivatives: where a gradient is differentiated again, use precision exact without "
        "return_lse, outside of torch.compile."
    )


exact_attention.register_autograd(_exact_backward, setup_context=_save)
int8_attention.register_autograd(_int8_backward, setup_context=_save)
for _op_of_a_gradient in (exact_attention_backward, exact_mask_gradient, int8_attention_backward):
    _op_of_a_gradient.register_autograd(no_second_derivative)
