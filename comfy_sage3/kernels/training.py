"""8-bit attention with an 8-bit gradient on Hopper, by the built library, as torch ops (csrc/backward).

Between the passes lie one byte a channel of q, k, v and of the output, and a few numbers a token: 4.1 bytes where flash
attention keeps the 8 of q, k, v and out in bf16 (head dims of 64, 96 and 128; others are padded to these).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..report import record_gradient_note, record_note
from . import compiled
from .ops import NAMESPACE, as_faked, no_second_derivative

MAX_HEAD_DIM = 128
_ALIGNMENT = 256


def padded_head_dim(d: int) -> int:
    """The head dim that the kernels compute with. Raises InputError above 128."""
    for padded in (64, 96, MAX_HEAD_DIM):
        if d <= padded:
            return padded
    raise InputError(f"The 8-bit gradient takes a head_dim of at most {MAX_HEAD_DIM}, this call has {d}.")


def workspace_bytes(batch: int, heads: int, kv_heads: int, queries: int, keys: int, head_dim: int) -> int:
    """Of int8_format.cuh's Workspace: q, k and v as codes and scales, and three numbers a channel."""
    d = padded_head_dim(head_dim)
    q_rows = batch * heads * ((queries + 63) // 64) * 64
    k_tiles = batch * kv_heads * ((keys + 127) // 128)
    parts = (q_rows * d, q_rows * 4, k_tiles * 128 * d, k_tiles * 16, k_tiles * 128 * d, k_tiles * 16)
    return sum((size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT for size in (*parts, *3 * (batch * kv_heads * d * 4,)))


@torch.library.custom_op(f"{NAMESPACE}::int8_attention_saving", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    deterministic: bool = False,
    note: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """8-bit attention of q (B, H, Lq, D), k and v (B, Hkv, Lk, D) -> (out, lse, saved, out8, rows).

    out and lse as ``ops.int8_attention_compiled``'s. The rest is for the gradient: bytes; int8 of out's shape; fp32
    (3, B, H, Lq). mask is bool, fp16, bf16 or fp32 and gets no gradient. ``deterministic``: dq is added up in a fixed order.
    """
    result = compiled.operators().int8_attention_saving(as_faked(q), k, v, mask, is_causal, scale, return_lse, "sm90")
    record_note(note)
    out, lse, saved, out8, rows = result
    return out, lse, saved, out8, rows


@torch.library.custom_op(f"{NAMESPACE}::int8_attention_gradient", mutates_args=())
def gradient(
    dout: Tensor,
    dlse: Tensor | None,
    saved: Tensor,
    out8: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    kv_heads: int,
    keys: int,
    is_causal: bool,
    scale: float,
    deterministic: bool,
    note: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of ``attend`` from the gradients of out and lse, contiguous and in dout's dtype."""
    dq, dk, dv = compiled.operators().int8_attention_gradient(
        dout, dlse, saved, out8, rows, mask, kv_heads, keys, is_causal, scale, deterministic
    )
    record_gradient_note(note)
    return dq, dk, dv


@attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    deterministic: bool = False,
    note: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty_like(q)  # as binding.cpp does: q's order of memory, if that keeps a token's channels together
    if out.stride(3) != 1 or q.shape[3] == 1:
        out = q.new_empty(q.shape)
    size = workspace_bytes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    return (
        out,
        q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32),
        q.new_empty(size, dtype=torch.uint8),
        q.new_empty(q.shape, dtype=torch.int8),
        q.new_empty((3, *q.shape[:3]), dtype=torch.float32),
    )


@gradient.register_fake
def faked_gradient(
    dout: Tensor,
    dlse: Tensor | None,
    saved: Tensor,
    out8: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    kv_heads: int,
    keys: int,
    is_causal: bool,
    scale: float,
    deterministic: bool,
    note: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``gradient`` returns, empty."""
    shape = (dout.shape[0], kv_heads, keys, dout.shape[3])
    return dout.new_empty(dout.shape), dout.new_empty(shape), dout.new_empty(shape)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what ``backward_by`` takes: of ``attend`` here and of every op that takes and gives the same."""
    q, k, _, mask, ctx.is_causal, ctx.scale, _, ctx.deterministic, ctx.note = inputs
    ctx.kv_heads, ctx.keys = k.shape[1], k.shape[2]
    _, _, saved, out8, rows = output
    ctx.mark_non_differentiable(saved, out8, rows)
    ctx.save_for_backward(saved, out8, rows, mask)
    ctx.like = q.dtype
    ctx.set_materialize_grads(False)


def backward_by(gradient: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of an op that ``save`` was for, by an op that takes and gives what ``gradient`` here does."""

    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        saved, out8, rows, mask = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 9
        if dout is None:
            dout = torch.zeros(out8.shape, dtype=ctx.like, device=out8.device)
        if dlse is not None:
            dlse = dlse.float().contiguous()
        grads = gradient(
            dout, dlse, saved, out8, rows, mask, ctx.kv_heads, ctx.keys, ctx.is_causal, ctx.scale, ctx.deterministic,
            ctx.note,
        )  # fmt: skip
        return (*grads, None, None, None, None, None, None)

    return backward


attend.register_autograd(backward_by(gradient), setup_context=save)
gradient.register_autograd(no_second_derivative)
