"""The decision: which kernel serves a call, and why. ``decide`` is pure: data in, data out; no device is asked.

``choose`` decides and, where the choice is a compiled kernel, asks whether the library is there, which builds it; where it
is one of Triton's, whether that is there.
A wish is tried from the lowest precision up: fp4 or int8-fast -> int8 -> exact. Gradients in 8 bits are for who asks for
int8 by name or falls back to it: what training makes of them is not for "auto" to decide. The reason is one short sentence
that a person reads in the report, so it always says what was missing and what there was instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .kernels import compiled, devices, triton_training
from .kernels.devices import DTYPE_NAMES, EXACT, FP4_BUILT_FOR_HOPPER, HARDWARE, KERNELS, Capability, Kernel
from .precision import Precision

COMPILED = {row.name: row.compiled for row in (FP4_BUILT_FOR_HOPPER, *KERNELS) if row.compiled is not None}
TRITON = {row.name for row in KERNELS if row.triton}
CHAIN = {
    "auto": ("fp4", "int8"),
    "fp4": ("fp4", "int8"),
    "int8": ("int8",),
    "int8-fast": ("int8-fast", "int8"),
    "exact": (),
}
AUTO_TRAINS_EXACTLY = "auto: gradients are exact, 8-bit ones are for who asks for int8"
EMULATED = "emulated in plain PyTorch: the quality is real, the speed is not"
EMULATED_BUILT = "the Blackwell kernel with its two instructions emulated: the quality is real, the speed is not"


@dataclass(frozen=True)
class Call:
    """Everything a decision depends on. Shapes are HND: (batch, heads, tokens, head_dim)."""

    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    dtype: torch.dtype
    device_type: str
    capability: Capability | None = None
    has_mask: bool = False
    is_causal: bool = False
    needs_grad: bool = False
    mask_needs_grad: bool = False
    v_head_dim: int | None = None  # None: the same as q's
    build_failure: str | None = None  # why there are no compiled kernels; None: there are, or nobody has asked yet
    triton_failure: str | None = None  # the same of Triton's kernels


@dataclass(frozen=True)
class Decision:
    """The kernel that runs, why, and whether that is less than what was wished."""

    kernel: str
    reason: str
    fell_back: bool


class Obstacle(NamedTuple):
    """Why a kernel cannot serve a call: what it needs, and what there is; whether that can be installed."""

    needs: str
    have: str
    can_be_installed: bool = False


def obstacle(kernel: Kernel, call: Call) -> Obstacle | None:
    """The first of ``kernel``'s constraints that ``call`` does not meet, or None when it can serve it."""
    head_dim = call.q_shape[-1]
    v_head_dim = head_dim if call.v_head_dim is None else call.v_head_dim
    if kernel.capabilities and call.capability not in kernel.capabilities:
        names = " or ".join(f"sm_{major}{minor}" for major, minor in kernel.capabilities)
        return Obstacle(f"a GPU of {names}", _device(call))
    if kernel.precision == "exact":
        return None
    if kernel.training_only and not call.needs_grad:
        return Obstacle("inputs that require grad (training only)", "these do not")
    if call.needs_grad and not kernel.trainable:
        return Obstacle("inputs that do not require grad (inference only)", "these do")
    if call.mask_needs_grad:
        return Obstacle("a mask that does not require grad", "this one does")
    if call.dtype not in kernel.dtypes:
        names = ", ".join(DTYPE_NAMES[d] for d in kernel.dtypes)
        return Obstacle(f"one of {names}", f"the inputs are {DTYPE_NAMES.get(call.dtype, call.dtype)}")
    if head_dim > kernel.max_head_dim:
        return Obstacle(f"a head_dim of at most {kernel.max_head_dim}", f"this call has {head_dim}")
    if call.needs_grad and head_dim > kernel.trained_head_dim:
        return Obstacle(f"a head_dim of at most {kernel.trained_head_dim} for its gradient", f"this call has {head_dim}")
    if v_head_dim != head_dim:
        return Obstacle("v of the same head_dim as q and k", f"they are {v_head_dim} and {head_dim}")
    if 0 in call.q_shape or 0 in call.k_shape:
        return Obstacle("at least one query and one key", "this call is empty")
    if kernel.compiled is not None and call.build_failure is not None:  # last: only a call that could run asks for it
        return Obstacle("compiled kernels", call.build_failure, True)
    if kernel.triton and call.triton_failure is not None:
        return Obstacle("Triton for its gradient", call.triton_failure, True)
    return None


def decide(
    call: Call, precision: str | Precision, *, emulate: bool = False, kernels: Sequence[Kernel] = KERNELS
) -> Decision:
    """The kernel for ``call`` at the wished ``precision``.

    ``emulate`` lets a wished precision without a kernel on this device run as plain PyTorch; "auto" never
    does, and leaves to exact attention what that does faster. ``kernels`` is the table to choose from. Raises
    InputError for an unknown precision.
    """
    wished = Precision.parse(precision).value
    chain = CHAIN[wished]
    if not chain:
        return Decision(EXACT.name, "asked for", False)
    if wished == "auto" and call.needs_grad:
        return Decision(EXACT.name, AUTO_TRAINS_EXACTLY, False)
    missing: list[tuple[str, Obstacle]] = []
    too_short = ""
    for step in chain:
        found = _serve(step, call, emulate and wished != "auto", kernels)
        if isinstance(found, Kernel):
            faster = _exact_is_faster(found, call) if wished == "auto" else None
            if faster is not None:
                too_short = faster
                continue  # the next precision may pay earlier
            how = f"runs on {_device(call, bare=True)}{' in Triton' if found.triton else ''}"
            if found.emulated:
                how = EMULATED if found.compiled is None else EMULATED_BUILT
            if found.compiled is None and call.build_failure is not None:
                how += f"; there are no compiled kernels: {call.build_failure}"
            if missing and wished != "auto":
                return Decision(found.name, f"{_sentence(missing)}; {step} instead, {how}", True)
            choice = "the fastest here" if wished == "auto" else "asked for"
            return Decision(found.name, f"{choice}, {how}", False)
        missing.append((step, found))
    if too_short:
        return Decision(EXACT.name, f"auto: exact is faster {too_short}", False)
    reason = _sentence(missing)
    if wished == "auto":  # auto promises nothing, so exact is no fallback, but the reason is worth reading
        return Decision(EXACT.name, f"auto found no low-bit kernel: {reason}", False)
    return Decision(EXACT.name, reason, True)


def choose(call: Call, precision: str | Precision, *, emulate: bool = False) -> Decision:
    """``decide`` for this machine: a decision for a compiled kernel holds only if the library can be had.

    Builds it on first use, and only for a call that nothing else rules out; ``call.build_failure`` is filled in here.
    """
    kernels = devices.kernels()
    decision = decide(call, precision, emulate=emulate, kernels=kernels)
    if decision.kernel in COMPILED and call.capability is not None:
        failure = compiled.failure(call.capability)
        if failure is not None:
            call = replace(call, build_failure=failure)
            decision = decide(call, precision, emulate=emulate, kernels=kernels)
    if decision.kernel in TRITON:
        absent = triton_training.absent()
        if absent is not None:
            decision = decide(replace(call, triton_failure=absent), precision, emulate=emulate, kernels=kernels)
    return decision


def _exact_is_faster(kernel: Kernel, call: Call) -> str | None:
    """Where exact attention beats ``kernel`` at this call, or None when it does not."""
    if call.capability in kernel.auto_not_on:
        return f"on {_device(call, bare=True)}"
    if call.k_shape[2] < kernel.auto_from_keys:  # how many it has is left out: one line in a report for all lengths
        return f"below {kernel.auto_from_keys} keys"
    return None


def _serve(precision: str, call: Call, emulate: bool, kernels: Sequence[Kernel]) -> Kernel | Obstacle:
    """The first kernel of ``precision`` that can serve ``call``, or what stands in the way."""
    why = None
    for kernel in kernels:
        if kernel.precision != precision or (kernel.emulated and not emulate):
            continue
        if kernel.capabilities and call.capability not in kernel.capabilities:
            continue  # another GPU's kernel: the hardware sentence below says it better
        if kernel.training_only and not call.needs_grad:
            continue  # in no reason either: who infers need not know of it
        here = obstacle(kernel, call)
        if here is None:
            return kernel
        if why is None or here.can_be_installed > why.can_be_installed:
            why = here  # of the first kernel, which is the best; what can be installed is said before what must be so
    if why is not None:
        return why
    hardware = HARDWARE[precision]
    if call.capability is None or not hardware.has(call.capability):
        return Obstacle(hardware.text, _device(call))
    return Obstacle(f"a kernel for {_device(call, bare=True)}", "this version has none")


def _device(call: Call, bare: bool = False) -> str:
    if call.capability is not None:
        name = f"sm_{call.capability[0]}{call.capability[1]}"
        return name if bare else f"this GPU is {name}"
    if call.device_type == "cpu":
        return "this is a CPU"
    if call.device_type == "cuda":
        return "this GPU is not an NVIDIA one"
    return f"this is a device of type {call.device_type!r}"


def _sentence(missing: list[tuple[str, Obstacle]]) -> str:
    """What each precision needs and what there is, said once where it is the same."""
    first, why = missing[0]
    if len(missing) == 1:
        return f"{first} needs {why.needs}; {why.have}"
    second, other = missing[1]
    if other == why:
        return f"{first} and {second} need {why.needs}; {why.have}"
    if other.have == why.have:
        return f"{first} needs {why.needs}; {why.have}; {second} needs {other.needs}"
    return f"{first} needs {why.needs}; {why.have}; {second} needs {other.needs}; {other.have}"
