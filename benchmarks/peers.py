"""Who is measured. Each peer says whether it is here, which shapes it does not take, and how it is called.

A peer that is absent or refuses is named in the result with its reason; nobody's numbers are taken from elsewhere.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from comfy_sage3.errors import InputError
from comfy_sage3.kernels import build

from .shapes import Shape

Call = Callable[[], Tensor]
Make = Callable[[Tensor, Tensor, Tensor, bool], Call]

END_TO_END = "with quantisation"
KERNEL = "kernel alone"
QUANTISATION = "quantisation alone"
PLAIN = "no quantisation"

BASELINE = "cudnn"
MASKED_AT_MOST = 8192  # keys of a call with a mask of a byte per score


@dataclass(frozen=True)
class Peer:
    """``make(q, k, v, causal)`` prepares a call that returns its output (or, for quantisation, its codes)."""

    name: str
    label: str
    part: str
    make: Make
    absent: Callable[[], str | None]
    refuses: Callable[[Shape], str | None] = lambda shape: None
    direction: str = "forward"

    @property
    def has_output(self) -> bool:
        """Whether what it returns is attention, to be held against exact attention."""
        return self.part != QUANTISATION


# ------------------------------------------------------------------------------------------------ PyTorch
def _sdpa(backend: str) -> Make:
    def make(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)

        def call() -> Tensor:
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    return make


def _sdpa_backward(backend: str) -> Make:
    """The gradient of one forward pass, again and again; returns dq."""

    def make(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            out = _sdpa(backend)(leaves[0], leaves[1], leaves[2], causal)()

        def call() -> Tensor:
            return torch.autograd.grad(out, leaves, q, retain_graph=True)[0]  # the gradient of out is q: as good as any

        return call

    return make


def _sdpa_both(backend: str) -> Make:
    """A forward pass and its gradient; returns dq."""

    def make(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))

        def call() -> Tensor:
            with torch.enable_grad():
                out = _sdpa(backend)(leaves[0], leaves[1], leaves[2], causal)()
            return torch.autograd.grad(out, leaves, q)[0]

        return call

    return make


def _ours_both(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    """A forward pass with quantisation and what it saves, and its gradient; returns dq."""
    from comfy_sage3.kernels import training

    leaves, scale = tuple(x.detach().requires_grad_() for x in (q, k, v)), _scale(q)

    def call() -> Tensor:
        with torch.enable_grad():
            out = training.attend(leaves[0], leaves[1], leaves[2], None, causal, scale, False)[0]
        return torch.autograd.grad(out, leaves, q)[0]

    return call


def _ours_backward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    """The gradient of one forward pass, with what prepares and finishes it; returns dq."""
    ops, scale = _ops(), _scale(q)
    _, _, *saved = ops.int8_attention_saving(q, k, v, None, causal, scale, False, "sm90")
    heads, keys = k.shape[1], k.shape[2]  # and the gradient of out is q
    return lambda: ops.int8_attention_gradient(q, None, *saved, None, heads, keys, causal, scale, False)[0]


def _triton(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    """With what it saves for the gradient."""
    from comfy_sage3.kernels import triton_training

    return lambda: triton_training.attend(q, k, v, None, causal, _scale(q), False)[0]


def _triton_backward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    """The gradient of one forward pass, with what prepares it; returns dq."""
    from comfy_sage3.kernels import triton_training

    scale, (heads, keys) = _scale(q), k.shape[1:3]
    _, _, *saved = triton_training.attend(q, k, v, None, causal, scale, False)
    return lambda: triton_training.gradient(q, None, *saved, None, heads, keys, causal, scale, True)[0]


def _no_triton() -> str | None:
    from comfy_sage3.kernels import triton_training

    return _no_cuda() or triton_training.absent()


def _no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "there is no CUDA GPU"


def _no_flash() -> str | None:
    available = getattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return _no_cuda() or (None if available() else "this torch was built without FlashAttention")


def _no_cudnn() -> str | None:
    return _no_cuda() or (None if torch.backends.cudnn.is_available() else "this torch has no cuDNN")


# ------------------------------------------------------------------------------------------------ comfy-kitchen
def _no_kitchen() -> str | None:
    try:
        version = metadata.version("comfy-kitchen")
    except metadata.PackageNotFoundError:
        return "comfy-kitchen is not installed (pip install comfy-kitchen)"
    if missing := _no_cuda():
        return missing
    try:
        available = importlib.import_module("comfy_kitchen").int8_attention_is_available()
    except Exception as problem:  # a wheel for another CUDA, an older version without this function
        return f"comfy-kitchen {version} does not import here: {type(problem).__name__}: {problem}"
    return None if available else f"comfy-kitchen {version} has no int8_attention for this GPU"


def _kitchen(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    attention = importlib.import_module("comfy_kitchen").int8_attention
    return lambda: attention(q, k, v)


def _not_causal(shape: Shape) -> str | None:
    return "its int8_attention has no causal mode" if shape.causal else None


# ------------------------------------------------------------------------------------------------ ours
def _ops() -> Any:
    outcome = build.load()
    if isinstance(outcome, build.Failure):
        raise RuntimeError(outcome.reason)
    return outcome.ops


def _no_kernel(kernel: str) -> Callable[[], str | None]:
    def absent() -> str | None:
        if missing := _no_cuda():
            return missing
        capability = torch.cuda.get_device_capability()
        if kernel.startswith("sm90") and capability != (9, 0):
            return f"this kernel is for sm_90 and this GPU is sm_{capability[0]}{capability[1]}"
        outcome = build.load()
        return outcome.reason if isinstance(outcome, build.Failure) else None

    return absent


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _ours(kernel: str) -> Make:
    def make(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
        attention, scale = _ops().int8_attention, _scale(q)
        return lambda: attention(q, k, v, None, causal, scale, False, kernel)[0]

    return make


def _ours_alone(kernel: str, masked: bool = False) -> Make:
    def make(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
        attend, out = _ops().int8_attend, torch.empty_like(q)
        workspace = _ops().int8_quantize(q, k, v, _scale(q), None)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device) if masked else None

        def call() -> Tensor:
            attend(workspace, q, k, mask, causal, out, None, kernel)
            return out

        return call

    return make


def _quantise(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    quantize, scale = _ops().int8_quantize, _scale(q)
    return lambda: quantize(q, k, v, scale, None)


def _too_large_a_mask(shape: Shape) -> str | None:
    if shape.group == "square" and shape.keys <= MASKED_AT_MOST and not shape.causal:
        return None
    return f"measured on square shapes of at most {MASKED_AT_MOST} tokens without causality"


PEERS: tuple[Peer, ...] = (
    Peer("fa2", "SDPA FlashAttention-2", PLAIN, _sdpa("FLASH_ATTENTION"), _no_flash),
    Peer(BASELINE, "SDPA cuDNN", PLAIN, _sdpa("CUDNN_ATTENTION"), _no_cudnn),
    Peer("efficient", "SDPA efficient", PLAIN, _sdpa("EFFICIENT_ATTENTION"), _no_cuda),
    Peer("comfy-kitchen", "comfy-kitchen int8", END_TO_END, _kitchen, _no_kitchen, _not_causal),
    Peer("sm90", "int8-sm90", END_TO_END, _ours("sm90"), _no_kernel("sm90")),
    Peer("sm90-kernel", "int8-sm90, kernel", KERNEL, _ours_alone("sm90"), _no_kernel("sm90")),
    Peer("sm90-mask", "int8-sm90, kernel, mask all true", KERNEL, _ours_alone("sm90", True), _no_kernel("sm90"),
         _too_large_a_mask),
    Peer("sm90-fast", "int8-fast-sm90", END_TO_END, _ours("sm90-fast"), _no_kernel("sm90-fast")),
    Peer("sm90-fast-kernel", "int8-fast-sm90, kernel", KERNEL, _ours_alone("sm90-fast"), _no_kernel("sm90-fast")),
    Peer("mma", "int8-mma", END_TO_END, _ours("mma"), _no_kernel("mma")),
    Peer("mma-kernel", "int8-mma, kernel", KERNEL, _ours_alone("mma"), _no_kernel("mma")),
    Peer("int8-triton", "int8-triton, saving", END_TO_END, _triton, _no_triton),
    Peer("quantise", "int8 quantisation", QUANTISATION, _quantise, _no_kernel("mma")),
    *(
        Peer(f"{name}-{direction}", f"{label}, {what}", PLAIN, make(backend), absent, direction=direction)
        for direction, what, make in (("backward", "backward", _sdpa_backward), ("both", "both passes", _sdpa_both))
        for name, label, backend, absent in (
            ("fa2", "SDPA FlashAttention-2", "FLASH_ATTENTION", _no_flash),
            (BASELINE, "SDPA cuDNN", "CUDNN_ATTENTION", _no_cudnn),
            ("efficient", "SDPA efficient", "EFFICIENT_ATTENTION", _no_cuda),
        )
    ),
    Peer("sm90-backward", "int8-sm90, backward", END_TO_END, _ours_backward, _no_kernel("sm90"), direction="backward"),
    Peer("sm90-both", "int8-sm90, both passes", END_TO_END, _ours_both, _no_kernel("sm90"), direction="both"),
    Peer("int8-triton-backward", "int8-triton, backward", END_TO_END, _triton_backward, _no_triton, direction="backward"),
)  # fmt: skip


def chosen(names: Sequence[str] | None, backward: bool) -> tuple[Peer, ...]:
    """The peers of these names (None: all), with gradients only where asked. Raises InputError naming what there is."""
    known = [p.name for p in PEERS if p.direction == "forward"]
    for name in names or ():
        if name not in known:
            raise InputError(f"Unknown peer {name!r}: choose from {', '.join(known)}.")
    wanted = known if names is None else names
    return tuple(
        p for p in PEERS if p.name.removesuffix(f"-{p.direction}") in wanted and (backward or p.direction == "forward")
    )


def quantisation_bytes(shape: Shape, element_size: int, workspace_bytes: int) -> int:
    """What quantisation must move: q, k and v read once, its codes and scales written once."""
    return shape.elements() * element_size + workspace_bytes


def gigabytes_per_second(moved: int, ms: float) -> float:
    """10^9 bytes a second."""
    return moved / ms / 1e6 if ms > 0 else math.nan
