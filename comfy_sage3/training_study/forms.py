"""The forms of attention an arm can train with, put in the place of diffusers' own, and a count of what ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import checks
from ..attention import attention
from ..compare.capture import Place
from ..errors import EngineError
from ..kernels.ops import full_precision
from ..reference import OUR_INT8, Int8Options, int8_attention, int8_attention_backward
from ..report import Report
from .settings import AGAIN, EXACT, INT8, REFERENCE, UNSMOOTHED

OPTIONS = {REFERENCE: OUR_INT8, UNSMOOTHED: replace(OUR_INT8, smooth_k=False)}


class Attention:
    """Attention of ``form`` for the self-attention of a model; cross-attention, whose 11 keys are text, stays exact.

    ``forward`` and ``backward`` count self-attention calls by kernel.
    """

    def __init__(self, form: str) -> None:
        self.form, self.report = form, Report()
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self._exactly = False

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Within this context every call is exact, and not counted."""
        self._exactly = True
        try:
            yield
        finally:
            self._exactly = False

    def route(self, place: Place, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """As ``compare.diffusers_engine.routed`` calls it; q, k, v (B, L, H, D). Raises EngineError for a fallback."""
        if self._exactly or place.kind != "self":
            return attention(q, k, v, layout="NHD", precision=EXACT, report=Report(), **options)
        kernel, out = self._serve(q, k, v, options)
        self.forward[kernel] += 1
        if out.requires_grad:
            out.register_hook(partial(self._count, kernel))
        return out

    def _serve(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[str, Tensor]:
        if self.form in (EXACT, INT8):
            emulate = q.device.type == "cpu"  # a GPU without the kernel must not pass for one
            out = attention(q, k, v, layout="NHD", precision=self.form, emulate=emulate, report=self.report, **options)
            line = self.report.lines()[0]
            if self.report.fell_back:
                raise EngineError(f"This arm asks for {self.form} and got {line['kernel']}: {line['reason']}.")
            return line["kernel"], out
        q, k, v = (x.transpose(1, 2) for x in checks.autocast(q, k, v))
        if self.form == AGAIN:
            on_gpu = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
            with sdpa_kernel(on_gpu if q.device.type == "cuda" else [SDPBackend.MATH]):
                return "exact, another kernel", F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        name = "int8 in plain PyTorch" + (", unsmoothed" if self.form == UNSMOOTHED else "")
        return name, _Reference.apply(q, k, v, OPTIONS[self.form]).transpose(1, 2)

    def _count(self, kernel: str, _: Tensor) -> None:
        self.backward[kernel] += 1

    def counts(self) -> dict[str, Any]:
        """What ran, for an arm's JSON; ``gradients``: backward passes that the 8-bit gradient itself has counted."""
        return {
            "forward": dict(self.forward), "backward": dict(self.backward), "gradients": self.report.gradients(),
        }  # fmt: skip

    def go_on_from(self, counts: dict[str, Any]) -> None:
        """Add the counts of an earlier part of the same arm."""
        self.forward.update(counts["forward"])
        self.backward.update(counts["backward"])
        for kernel, calls in counts["gradients"].items():
            self.report.record_gradient(kernel, calls)


class _Reference(torch.autograd.Function):
    """8-bit attention in plain PyTorch with any options, without the look for NaN that waits for the device."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Int8Options) -> Tensor:
        with full_precision(q):
            out, lse = int8_attention(q, k, v, options=options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        with full_precision(q):
            dq, dk, dv = int8_attention_backward(grads[0], q, k, v, out, lse, options=ctx.options)
        return dq, dk, dv, None
