"""Exact attention: PyTorch's own, made safe for fully masked rows, and its gradient in closed form.

All tensors HND: q (B, H, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv). ``mask`` is 4-D, bool (True = attend)
or additive in q's dtype. Causal is top-left aligned, as in ``F.scaled_dot_product_attention``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference

SCORES_AT_ONCE = 1 << 24  # held at a time by what writes out its scores, so that memory stays O(N * D)
REFERENCE_HEAD_DIM = 256  # the widest the reference takes
IN_PLACE_OF = "sage3_in_place_of"  # of a function in the place of PyTorch's attention: what was there before


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """``F.scaled_dot_product_attention`` -> (B, H, Lq, Dv); rows that may attend nothing give 0."""
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        group = q.shape[1] // max(k.shape[1], 1)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return q @ k.transpose(-1, -2) @ v  # a sum over nothing: zeros, and part of the autograd graph
    gqa = q.shape[1] != k.shape[1]
    if mask is None:
        return _pytorchs()(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    mask, dead = _open_dead_rows(_joined(mask, 0, q.shape[2], k.shape[2], is_causal))
    out = _pytorchs()(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out.masked_fill(dead, 0.0)


def _pytorchs() -> Callable[..., Tensor]:
    """PyTorch's attention, also while ``training.sdpa_replaced`` has ours in its place."""
    function = F.scaled_dot_product_attention
    while hasattr(function, IN_PLACE_OF):
        function = getattr(function, IN_PLACE_OF)
    return function


def with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """(out, lse): as ``sdpa``, with the natural log of each row's sum of exp(scores), float32 (B, H, Lq)."""
    if 0 in q.shape or 0 in k.shape:
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        return sdpa(q, k, v, mask, is_causal, scale), lse
    if q.shape[3] == v.shape[3] <= REFERENCE_HEAD_DIM:
        return reference.exact_attention(q, k, v, mask=mask, is_causal=is_causal, scale=scale)
    lse = torch.cat([
        s.logsumexp(-1) if dead is None else s.logsumexp(-1).masked_fill(dead[..., 0], -torch.inf)
        for _, s, dead in _scores(_wide(q), _wide(k, q.shape[1]), mask, is_causal, scale)
    ], dim=2)  # fmt: skip
    return sdpa(q, k, v, mask, is_causal, scale), lse.float()


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of exact attention from the gradients of its output and of its lse (None = zero).

    P = softmax(S), dS = P * (dP - rowsum(P * dP) + dlse), in fp32 (fp64 for fp64 inputs).
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    qs, ks, vs = _wide(q), _wide(k, heads), _wide(v, heads)
    dq, dk, dv = torch.zeros_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    for here, p, ds in _score_gradients(dout, dlse, qs, ks, vs, mask, is_causal, scale):
        if dout is not None:
            dv += p.transpose(-1, -2) @ dout[:, :, here].to(qs.dtype)
        dq[:, :, here] = ds @ ks * factor
        dk += ds.transpose(-1, -2) @ qs[:, :, here] * factor
    if heads > kv_heads > 0:
        dk, dv = (t.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) for t in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def mask_gradient(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """The gradient of an additive ``mask``, in its shape and dtype: dS, summed where the mask was broadcast."""
    heads = q.shape[1]
    qs, ks, vs = _wide(q), _wide(k, heads), _wide(v, heads)
    total = torch.zeros(mask.shape, dtype=qs.dtype, device=mask.device)
    for here, _, ds in _score_gradients(dout, dlse, qs, ks, vs, mask, is_causal, scale):
        part = total if mask.shape[2] == 1 else total[:, :, here]
        part += ds.sum_to_size(part.shape)
    return total.to(mask.dtype)


def _score_gradients(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool,
    scale: float | None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:  # fmt: skip
    """P and dS of a few query rows at a time: (which rows, P, dS). q, k and v in one dtype, with equally many heads."""
    for here, s, dead in _scores(q, k, mask, is_causal, scale):
        p = torch.softmax(s, -1)
        if dead is not None:
            p = p.masked_fill(dead, 0.0)
        ds = torch.zeros_like(p)
        if dout is not None:
            dp = dout[:, :, here].to(q.dtype) @ v.transpose(-1, -2)
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        if dlse is not None:
            ds = ds + p * dlse[:, :, here, None].to(q.dtype)
        yield here, p, ds


def _wide(x: Tensor, heads: int | None = None) -> Tensor:
    """``x`` in fp32 (fp64 stays), its heads repeated up to ``heads``."""
    if heads is not None and heads > x.shape[1] > 0:
        x = x.repeat_interleave(heads // x.shape[1], 1)
    return x if x.dtype == torch.float64 else x.float()


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """The masked scores of a few query rows at a time: (which rows, scores, which of them are dead or None).

    Dead rows come opened (see ``_open_dead_rows``); q and k in one dtype and with equally many heads.
    """
    (batch, heads, q_len, head_dim), k_len = q.shape, k.shape[2]
    rows = max(1, SCORES_AT_ONCE // max(1, batch * heads * k_len))
    for start in range(0, q_len if k_len else 0, rows):
        here = slice(start, min(start + rows, q_len))
        s = (q[:, :, here] @ k.transpose(-1, -2)) * (head_dim**-0.5 if scale is None else scale)
        dead = None
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, here]
            part, dead = _open_dead_rows(_joined(part, start, s.shape[2], k_len, is_causal))
            s = s.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else s + part
        elif is_causal:
            s = s.masked_fill(~_triangle(start, s.shape[2], k_len, q.device), -torch.inf)
        yield here, s, dead


def _triangle(start: int, rows: int, k_len: int, device: torch.device) -> Tensor:
    """Which keys the queries ``start`` to ``start + rows`` may attend under causality: bool (rows, Lk)."""
    i = torch.arange(start, start + rows, device=device)[:, None]
    return torch.arange(k_len, device=device) <= i


def _joined(mask: Tensor, start: int, rows: int, k_len: int, is_causal: bool) -> Tensor:
    """The mask of the queries from ``start`` on, with the causal triangle where asked; Lk columns.

    A mask that is the same for every query stays one row high unless causality makes the rows differ.
    """
    mask = mask.expand(-1, -1, -1, k_len)
    if not is_causal:
        return mask
    triangle = _triangle(start, rows, k_len, mask.device)
    return mask & triangle if mask.dtype == torch.bool else mask.masked_fill(~triangle, -torch.inf)


def _open_dead_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask with every fully masked row opened, and which rows those were.

    Some SDPA back ends give NaN for such rows, forward and backward. Opened they stay finite, and zeroing
    the output afterwards also zeroes their gradients.
    """
    if mask.dtype == torch.bool:
        dead = ~mask.any(-1, keepdim=True)
        return mask | dead, dead
    dead = (mask == -torch.inf).all(-1, keepdim=True)
    return mask.masked_fill(dead, 0.0), dead
