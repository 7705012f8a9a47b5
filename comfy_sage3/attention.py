"""The one door: ``attention``. Check, decide, run, write down."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import checks
from .dispatch import COMPILED, Call, Decision, choose
from .kernels import exact, freeing, ops, training, triton_training
from .kernels.devices import capability_of
from .precision import Precision
from .report import Report, note_of, process_report

_EMULATED = {
    "fp4-emulated": ops.fp4_attention,
    "int8-emulated": ops.int8_attention,
    "int8-fast-emulated": ops.int8_fast_attention,
}
TRAINED = {"int8-sm90": training.attend, "int8-triton": triton_training.attend}
"""What a kernel runs where gradients are needed, and always where it has no other op: an op that takes and gives what
``training.attend`` does."""


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "HND",
    precision: str | Precision = "auto",
    return_lse: Literal[False] = False,
    emulate: bool = False,
    report: Report | None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "HND",
    precision: str | Precision = "auto",
    return_lse: Literal[True],
    emulate: bool = False,
    report: Report | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "HND",
    precision: str | Precision = "auto",
    return_lse: bool = False,
    emulate: bool = False,
    report: Report | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v, at the precision wished for where this device and call allow it.

    Args:
        q: (B, H, Lq, D) in layout "HND", (B, Lq, H, D) in "NHD"; fp16, bf16, fp32, or fp64 (exact only).
        k, v: (B, Hkv, Lk, D) or (B, Lk, Hkv, D), q's dtype and device. Hkv == H unless ``enable_gqa``.
        mask: bool (True = attend) or floating (added to the scaled scores), broadcastable to
            (B, H, Lq, Lk) whatever the layout. A row that may attend nothing gives 0.
        is_causal: query i attends keys 0..i (top-left aligned, as in PyTorch); joins ``mask``.
        scale: of the scores; None means D ** -0.5.
        enable_gqa: let q have a multiple of the heads of k and v.
        precision: "fp4", "int8", "int8-fast", "exact" or "auto" (the fastest here: a kernel of this device, never
            emulated, or exact attention for few keys). A call that cannot be served falls back fp4 -> int8 -> exact;
            the report says why. int8-fast reads exponentials off the bits of a number, within 6 % each: on Hopper it
            is faster than int8 at 1.6 times its error, elsewhere int8 runs instead. int8 has compiled kernels for
            NVIDIA GPUs from Turing on (wgmma on Hopper, mma.sync on the others), built on first use, which can take
            minutes. fp4 has one for Blackwell (sm_120, sm_121), checked by emulation and not yet run on such a GPU.
        return_lse: also return the natural log-sum-exp of each row's scores.
        emulate: run a wished precision that has no kernel here in plain PyTorch: true to its quality, slow.
        report: where the call is counted; None means ``report.process_report``. Under ``torch.compile``
            keep one report per compiled function: another one compiles it again.

    Returns:
        out, in q's layout and dtype (under autocast its dtype), fresh memory; with ``return_lse`` also
        lse, float32 (B, H, Lq), -inf for rows that attend nothing. A compiled kernel's out lies in memory as
        ``torch.empty_like(q)`` does (contiguous, where q's channels are not dense). Where q, k or v require grad,
        int8 gives gradients in 8 bits: on Hopper up to a head_dim of 128 by a CUDA kernel; above that, and on other GPUs
        from Ampere on (not sm_100 and sm_103), where Triton is installed; and emulated. fp4 and int8-fast run as int8,
        "auto" and what has no such kernel as exact. Deterministic under ``torch.use_deterministic_algorithms``. A mask that
        requires grad gets its gradient from exact attention. See ``comfy_sage3.training``.

    Raises:
        InputError: an argument that cannot be used as it is, and NaN in the inputs (on CPU and in emulated
            kernels, which refuse infinity too; a GPU kernel is never held up to look for it).
    """
    out, lse = attend(
        q, k, v, mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, layout=layout, precision=precision,
        return_lse=return_lse, emulate=emulate, report=report, deterministic=None,
    )  # fmt: skip
    return out if lse is None else (out, lse)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    layout: str,
    precision: str | Precision,
    return_lse: bool,
    emulate: bool,
    report: Report | None,
    deterministic: bool | None,
) -> tuple[Tensor, Tensor | None]:
    """``attention`` -> (out, lse, or None where it was not asked for), with one choice more.

    deterministic: add up gradients in a fixed order; None follows ``torch.are_deterministic_algorithms_enabled``.
    """
    wished = Precision.parse(precision).value
    token_major = checks.layout(layout)
    q, k, v, mask, scale = _checked(q, k, v, mask, scale, enable_gqa, token_major)
    call = _call(q, k, v, mask, bool(is_causal))
    decision = choose(call, wished, emulate=emulate)
    if report is None:
        report = process_report
    run = TRAINED.get(decision.kernel)
    if run is not None and (call.needs_grad or decision.kernel not in COMPILED):
        note = note_of(report, wished, decision.kernel, decision.reason, decision.fell_back)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        deterministic = torch.are_deterministic_algorithms_enabled() if deterministic is None else bool(deterministic)
        out, lse, *_ = run(q, k, v, mask, bool(is_causal), scale, return_lse, deterministic, note)
    else:
        out, lse = _run(decision, wished, q, k, v, mask, bool(is_causal), scale, return_lse, report)
    if token_major:
        out = out.transpose(1, 2)
    return out, lse if return_lse else None


def attention_freeing(
    hold: list[Tensor],
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    layout: str = "HND",
    precision: str | Precision = "auto",
    emulate: bool = False,
    report: Report | None = None,
) -> Tensor:
    """``attention`` of ``hold`` = [q, k, v], which it empties: where a compiled kernel serves the call, their memory is
    free (if nobody else holds them) before the output is made. Where it raises, ``hold`` is as it was, unless a kernel
    failed after it had taken its copy. Arguments, result and errors are those of ``attention``.
    """
    wished = Precision.parse(precision).value
    token_major = checks.layout(layout)
    q, k, v, checked_mask, number = _checked(hold[0], hold[1], hold[2], mask, scale, enable_gqa, token_major)
    call = _call(q, k, v, checked_mask, False)
    decision = choose(call, wished, emulate=emulate)
    if decision.kernel not in COMPILED or call.needs_grad:
        out = attention(
            *hold, mask=mask, scale=scale, enable_gqa=enable_gqa, layout=layout, precision=precision, emulate=emulate,
            report=report,
        )  # fmt: skip
        hold.clear()
        return out
    number = q.shape[3] ** -0.5 if number is None else number
    views = [q, k, v]
    del q, k, v
    handed = hold.copy()
    hold.clear()
    try:
        out = freeing.attend(views, checked_mask, False, number, COMPILED[decision.kernel], handed)
    except Exception:
        hold.extend(handed)  # all three, or none
        raise
    (process_report if report is None else report).record(wished, decision.kernel, decision.reason, decision.fell_back)
    return out.transpose(1, 2) if token_major else out


def _checked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, enable_gqa: bool, token_major: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]:
    """The arguments as the kernels take them, q, k and v as (B, H, L, D). Raises InputError."""
    checks.tensors(q, k, v, mask)
    q, k, v = checks.autocast(q, k, v)
    if token_major:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    checks.shapes(q, k, v, enable_gqa)
    return q, k, v, checks.attention_mask(mask, q, k), checks.scale(scale)


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Call:
    return Call(
        q_shape=tuple(q.shape),
        k_shape=tuple(k.shape),
        dtype=q.dtype,
        device_type=q.device.type,
        capability=capability_of(q.device),
        has_mask=mask is not None,
        is_causal=is_causal,
        needs_grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        mask_needs_grad=torch.is_grad_enabled() and mask is not None and mask.requires_grad,
        v_head_dim=v.shape[3],
    )


def _run(
    decision: Decision,
    wished: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    return_lse: bool,
    report: Report,
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel that was decided on, and count the call where it really happens."""
    if decision.kernel == "exact" and not return_lse and not torch.compiler.is_compiling():
        # PyTorch's attention, called plainly: it brings its own fast gradient, and there is no graph to break
        if q.device.type == "cpu":
            ops.refuse_bad_numbers(q, k, v, mask, infinite=False)
        out = exact.sdpa(q, k, v, mask, is_causal, scale)
        report.record(wished, decision.kernel, decision.reason, decision.fell_back)
        return out, None
    note = note_of(report, wished, decision.kernel, decision.reason, decision.fell_back)
    if decision.kernel == "exact":
        return ops.exact_attention(q, k, v, mask, is_causal, scale, return_lse, note)
    if decision.kernel in COMPILED:
        scale = q.shape[3] ** -0.5 if scale is None else scale
        name = COMPILED[decision.kernel]
        run = ops.fp4_attention_compiled if name.startswith("fp4") else ops.int8_attention_compiled
        return run(q, k, v, mask, is_causal, scale, return_lse, name, note)
    return _EMULATED[decision.kernel](q, k, v, mask, is_causal, scale, note)
