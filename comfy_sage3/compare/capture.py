"""The first two layers of quality: the same q, k, v through every kernel, and the same x_t through one step.

Replaying captured tensors is the only measurement of the kernel itself: at the end of a sampling run small
errors have steered the whole trajectory, and the videos differ for reasons of chaos as well as of arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention import attention
from ..metrics import attention_error
from ..reference import exact_attention
from ..report import Report
from .engine import Side, Where

MAX_CAPTURED_STEPS = 8
MAX_CAPTURED_BYTES = 1 << 30

Attend = Callable[..., Tensor]
"""``attend(q, k, v, *, where, mask, is_causal, scale, enable_gqa) -> out``, all (B, L, H, D)."""


@dataclass(frozen=True)
class Place:
    """Where in the model an attention call was made: transformer block and "self" or "cross"."""

    layer: int
    kind: str


@dataclass
class CapturedCall:
    """One attention call: q, k, v as (B, L, H, D) and the keyword arguments it was made with."""

    place: Place
    step: int
    sigma: float
    qkv: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any]


@dataclass
class Captured:
    """What one run of side A left behind: attention calls, and (step, sigma, x_t) of every captured step."""

    calls: list[CapturedCall] = field(default_factory=list)
    latents: list[tuple[int, float, Tensor]] = field(default_factory=list)


def spread(steps: int, bytes_per_step: int) -> list[int]:
    """Step indices to capture: evenly spread, first and last included, within the memory bound."""
    count = max(1, min(steps, MAX_CAPTURED_STEPS, MAX_CAPTURED_BYTES // max(1, bytes_per_step)))
    if count == 1:
        return [steps // 2]
    return sorted({round(i * (steps - 1) / (count - 1)) for i in range(count)})


def door(side: Side, report: Report) -> Attend:
    """Attention at the precision the side's plan chooses for each call, through the package's one door."""
    unseen = Report()

    def attend(q: Tensor, k: Tensor, v: Tensor, *, where: Where | None = None, **options: Any) -> Tensor:
        wish, why_exact = side.choose(where, q.shape[1], k.shape[1])
        out = attention(
            q,
            k,
            v,
            layout="NHD",
            precision=wish,
            emulate=side.emulate,
            report=unseen if why_exact else report,
            **options,
        )
        if why_exact:  # the plan's reason, where the door would only say that exact was asked for
            report.record(wish.value, "exact", why_exact, False)
        return out

    return attend


def exact_second_way(
    q: Tensor, k: Tensor, v: Tensor, *, where: Where | None = None, enable_gqa: bool = False, **options: Any
) -> Tensor:
    """Exact attention by the chunked fp32 reference (which infers GQA): the noise floor's other end."""
    out, _ = exact_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
    return out.transpose(1, 2)


def contestants(a: Side, b: Side, exact: Side) -> dict[str, Attend]:
    """What every row is measured with: side A, side B, and exact attention the usual way."""
    unseen = Report()  # replays are measurements, not the model's calls: they belong in nobody's tally
    return {"a": door(a, unseen), "b": door(b, unseen), "floor": door(exact, unseen)}


@torch.inference_mode()
def replay(captured: Captured, kernels: dict[str, Attend], tell: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Each captured call through each kernel, against exact fp32 attention on the same tensors.

    ``tell`` is called after each call and kernel; it may raise to cancel.
    """
    rows = []
    for call in captured.calls:
        q, k, v = call.qkv
        truth = exact_second_way(q.float(), k.float(), v.float(), **call.options)
        row: dict[str, Any] = {"layer": call.place.layer, "kind": call.place.kind, "step": call.step}
        row |= {"sigma": call.sigma, "q_tokens": q.shape[1], "k_tokens": k.shape[1]}
        where = Where(str(call.place.layer), call.sigma)
        for name, attend in kernels.items():
            row[name] = attention_error(attend(q, k, v, where=where, **call.options), truth)
            tell()
        rows.append(row)
    return rows
