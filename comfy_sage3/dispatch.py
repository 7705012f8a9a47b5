"""The decision: which kernel serves a call, and why. Pure data in, pure data out; no device is asked.

A wish is tried from the lowest precision up: fp4 -> int8 -> exact. The reason is one short sentence that a
person reads in the report, so it always says what was missing and what there was instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .kernels.devices import DTYPE_NAMES, EXACT, HARDWARE, KERNELS, Capability, Kernel
from .precision import Precision

CHAIN = {"auto": ("fp4", "int8"), "fp4": ("fp4", "int8"), "int8": ("int8",), "exact": ()}
EMULATED = "emulated in plain PyTorch: the quality is real, the speed is not"


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
    v_head_dim: int | None = None  # None: the same as q's


@dataclass(frozen=True)
class Decision:
    """The kernel that runs, why, and whether that is less than what was wished."""

    kernel: str
    reason: str
    fell_back: bool


class Obstacle(NamedTuple):
    """Why a kernel cannot serve a call: what it needs, and what there is."""

    needs: str
    have: str


def obstacle(kernel: Kernel, call: Call) -> Obstacle | None:
    """The first of ``kernel``'s constraints that ``call`` does not meet, or None when it can serve it."""
    head_dim = call.q_shape[-1]
    v_head_dim = head_dim if call.v_head_dim is None else call.v_head_dim
    if kernel.capabilities and call.capability not in kernel.capabilities:
        names = " or ".join(f"sm_{major}{minor}" for major, minor in kernel.capabilities)
        return Obstacle(f"a GPU of {names}", _device(call))
    if kernel.precision == "exact":
        return None
    if call.needs_grad and not kernel.trainable:
        return Obstacle("inputs that do not require grad (inference only)", "these do")
    if call.dtype not in kernel.dtypes:
        names = ", ".join(DTYPE_NAMES[d] for d in kernel.dtypes)
        return Obstacle(f"one of {names}", f"the inputs are {DTYPE_NAMES.get(call.dtype, call.dtype)}")
    if head_dim > kernel.max_head_dim:
        return Obstacle(f"a head_dim of at most {kernel.max_head_dim}", f"this call has {head_dim}")
    if v_head_dim != head_dim:
        return Obstacle("v of the same head_dim as q and k", f"they are {v_head_dim} and {head_dim}")
    if 0 in call.q_shape or 0 in call.k_shape:
        return Obstacle("at least one query and one key", "this call is empty")
    return None


def decide(
    call: Call, precision: str | Precision, *, emulate: bool = False, kernels: Sequence[Kernel] = KERNELS
) -> Decision:
    """The kernel for ``call`` at the wished ``precision``.

    ``emulate`` lets a wished precision without a kernel on this device run as plain PyTorch; "auto" never
    does. ``kernels`` is the table to choose from. Raises InputError for an unknown precision.
    """
    wished = Precision.parse(precision).value
    chain = CHAIN[wished]
    if not chain:
        return Decision(EXACT.name, "asked for", False)
    missing: list[tuple[str, Obstacle]] = []
    for step in chain:
        found = _serve(step, call, emulate and wished != "auto", kernels)
        if isinstance(found, Kernel):
            how = EMULATED if found.emulated else f"runs on {_device(call, bare=True)}"
            if missing and wished != "auto":
                return Decision(found.name, f"{_sentence(missing)}; {step} instead, {how}", True)
            choice = "the fastest here" if wished == "auto" else "asked for"
            return Decision(found.name, f"{choice}, {how}", False)
        missing.append((step, found))
    reason = _sentence(missing)
    if wished == "auto":  # auto promises nothing, so exact is no fallback, but the reason is worth reading
        return Decision(EXACT.name, f"auto found no low-bit kernel: {reason}", False)
    return Decision(EXACT.name, reason, True)


def _serve(precision: str, call: Call, emulate: bool, kernels: Sequence[Kernel]) -> Kernel | Obstacle:
    """The first kernel of ``precision`` that can serve ``call``, or what stands in the way."""
    why = None
    for kernel in kernels:
        if kernel.precision != precision or (kernel.emulated and not emulate):
            continue
        if kernel.capabilities and call.capability not in kernel.capabilities:
            continue  # another GPU's kernel: the hardware sentence below says it better
        why = obstacle(kernel, call)
        if why is None:
            return kernel
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
