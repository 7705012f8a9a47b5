"""Attention that trains in 8 bits: a function, a module, and a switch for a model that is written already.

    from comfy_sage3 import training
    out = training.attention(q, k, v, is_causal=True)      # gradients in 8 bits, where this device has a kernel for them

    with training.sdpa_replaced() as replaced:             # every F.scaled_dot_product_attention in here
        loss = model(batch)
        loss.backward()
    print(replaced.report.summary())                       # what ran, forward and backward, and what did not and why

Forward and backward of one call compute with the same 8-bit codes (arXiv 2505.11594, algorithms 2 and 3, with the changes
that docs/numerics.md gives reasons for). What no 8-bit kernel serves runs through exact attention and is in the report with
its reason: gradients are never lost without a word, and never approximate without being asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend
from .errors import InputError
from .kernels import exact
from .precision import Precision
from .report import Report, process_report


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "HND",
    precision: str | Precision = "int8",
    deterministic: bool | None = None,
    return_lse: Literal[False] = False,
    emulate: bool = False,
    report: Report | None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "HND",
    precision: str | Precision = "int8",
    deterministic: bool | None = None,
    return_lse: Literal[True],
    emulate: bool = False,
    report: Report | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "HND",
    precision: str | Precision = "int8",
    deterministic: bool | None = None,
    return_lse: bool = False,
    emulate: bool = False,
    report: Report | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v whose gradients are computed in 8 bits too.

    ``comfy_sage3.attention`` with what matters in training: ``precision`` is int8 unless told otherwise, and
    ``deterministic`` is a choice. Kept for the backward pass are 8-bit tensors, half the bytes of what flash attention keeps
    of bf16 inputs.

    Args:
        q: (B, H, Lq, D) in layout "HND", (B, Lq, H, D) in "NHD"; fp16, bf16 or fp32. The Hopper kernel gives gradients up to
            a head_dim of 128, Triton's up to 256.
        k, v: (B, Hkv, Lk, D) or (B, Lk, Hkv, D), q's dtype and device. Hkv == H unless ``enable_gqa``. Any of the three may
            be the same tensor as another, and any of them may not require grad.
        mask: bool (True = attend) or floating (added to the scaled scores), broadcastable to (B, H, Lq, Lk). A row that may
            attend nothing gives 0 and gets no gradient. A mask that requires grad gets it, from exact attention.
        is_causal: query i attends keys 0..i (top-left aligned, as in PyTorch); joins ``mask``.
        scale: of the scores; None means D ** -0.5.
        enable_gqa: let q have a multiple of the heads of k and v; their gradients are summed over the heads they served.
        precision: "int8", or any other of ``comfy_sage3.attention``: all but "exact" and "auto" train as int8.
        deterministic: True: the same bits in every run, at some cost in time. Else dq of the Hopper kernel is added up in
            the order in which its blocks finish; dk, dv and all of Triton's are the same bits anyway. None: as
            ``torch.use_deterministic_algorithms`` says.
        return_lse: also return the natural log-sum-exp of each row's scores; it may be differentiated.
        emulate: run 8 bits in plain PyTorch where there is no kernel: true to their quality, slow.
        report: where calls and their gradients are counted; None means ``report.process_report``.

    Returns:
        out, in q's layout and dtype (under autocast its dtype); with ``return_lse`` also lse, float32 (B, H, Lq). Works
        under ``torch.compile``, activation checkpointing and autocast. Gradients come in the inputs' dtypes.

    Raises:
        InputError: an argument that cannot be used as it is.
        RuntimeError: when a gradient is differentiated again; exact attention may be able to.
    """
    out, lse = attend(
        q, k, v, mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, layout=layout, precision=precision,
        return_lse=return_lse, emulate=emulate, report=report, deterministic=deterministic,
    )  # fmt: skip
    return out if lse is None else (out, lse)


class Sage3Attention(nn.Module):
    """``F.scaled_dot_product_attention`` as a module without parameters, in 8 bits: for the place where a model calls that.

    precision, deterministic, emulate, report: as in ``attention``. Raises InputError for an unknown precision.
    """

    def __init__(
        self,
        precision: str | Precision = "int8",
        *,
        deterministic: bool | None = None,
        emulate: bool = False,
        report: Report | None = None,
    ) -> None:
        super().__init__()
        self.precision = Precision.parse(precision).value
        self.deterministic = deterministic
        self.emulate = emulate
        self.report = report

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention of query (B, H, Lq, D), key and value (B, Hkv, Lk, D) -> (B, H, Lq, D); arguments are PyTorch's.

        Raises InputError as ``attention`` does, and for a ``dropout_p`` above 0: 8-bit attention drops no weights.
        """
        if dropout_p > 0.0:
            raise InputError(f"dropout_p is {dropout_p}: 8-bit attention has no dropout, pass 0.0.")
        return attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, precision=self.precision,
            deterministic=self.deterministic, emulate=self.emulate, report=self.report,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"precision={self.precision!r}, deterministic={self.deterministic}, emulate={self.emulate}"


class sdpa_replaced:
    """A context in which ``F.scaled_dot_product_attention`` is ``attention``, whoever calls it by that name, in any thread.

    Keep the backward pass inside where activations are checkpointed: it runs the forward pass again, which must be the same.
    A graph that torch compiled outside keeps what it was compiled with, and so does ``from torch.nn.functional import``. A
    call with dropout, or whose tensors do not have 4 dimensions, stays PyTorch's and is in ``report`` with that reason.

    precision, deterministic, emulate: as in ``attention``. report: where calls are counted; None: a new one, ``.report``.
    """

    def __init__(
        self,
        precision: str | Precision = "int8",
        *,
        deterministic: bool | None = None,
        emulate: bool = False,
        report: Report | None = None,
    ) -> None:
        self.report = Report() if report is None else report
        self._attention = Sage3Attention(precision, deterministic=deterministic, emulate=emulate, report=self.report)
        self._before: list[Callable[..., Tensor]] = []

    def __enter__(self) -> sdpa_replaced:
        before = F.scaled_dot_product_attention

        @wraps(before)
        def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
            return self._attend(before, *args, **kwargs)

        setattr(scaled_dot_product_attention, exact.IN_PLACE_OF, before)
        self._before.append(before)
        F.scaled_dot_product_attention = scaled_dot_product_attention
        return self

    def __exit__(self, *exception: object) -> None:
        F.scaled_dot_product_attention = self._before.pop()

    def _attend(
        self, before: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if dropout_p > 0.0:
            left = "8-bit attention has no dropout"
        elif not query.dim() == key.dim() == value.dim() == 4:
            left = "8-bit attention takes tensors of 4 dimensions"
        else:
            out: Tensor = self._attention(query, key, value, attn_mask, dropout_p, *args, **kwargs)
            return out
        if not torch.compiler.is_compiling():
            precision = self._attention.precision
            self.report.record(precision, "exact", left, precision != "exact")
        return before(query, key, value, attn_mask, dropout_p, *args, **kwargs)


__all__ = ["Report", "Sage3Attention", "attention", "process_report", "sdpa_replaced"]
