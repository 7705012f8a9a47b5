"""Which kernels exist and what each needs, as plain data: ``dispatch`` reads it, nothing else decides.

A CUDA kernel joins by adding a row; the first row of a precision that can serve a call is the one that runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Capability = tuple[int, int]  # compute capability (major, minor): (12, 0) is sm_120

LOW_BIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALL_DTYPES = (*LOW_BIT_DTYPES, torch.float64)
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Kernel:
    """One implementation of attention and the calls it can serve.

    ``capabilities`` names the GPUs a compiled kernel was built for; empty means plain PyTorch, which runs
    on any device. ``emulated`` kernels compute what the low-bit kernel would, slowly: quality, not speed.
    """

    name: str
    precision: str  # "fp4", "int8" or "exact"
    capabilities: tuple[Capability, ...] = ()
    emulated: bool = False
    trainable: bool = False
    dtypes: tuple[torch.dtype, ...] = LOW_BIT_DTYPES
    max_head_dim: int = 256


@dataclass(frozen=True)
class Hardware:
    """The GPUs on which a precision pays: those listed in ``only``, or every one from ``lowest`` up."""

    text: str
    only: tuple[Capability, ...] = ()
    lowest: Capability | None = None

    def has(self, capability: Capability) -> bool:
        """Whether a GPU of this compute capability has the instructions."""
        return capability in self.only or (self.lowest is not None and capability >= self.lowest)


# fp4: mma.sync with block scales exists on sm_120 and sm_121 only (sm_100 has other instructions for it).
# int8: mma.sync m16n8k32 with 8-bit integers and cp.async, from Ampere on.
HARDWARE = {
    "fp4": Hardware("a Blackwell GPU (sm_120 or sm_121)", only=((12, 0), (12, 1))),
    "int8": Hardware("an NVIDIA GPU from Ampere on (sm_80 or newer)", lowest=(8, 0)),
}

EXACT = Kernel("exact", "exact", trainable=True, dtypes=ALL_DTYPES, max_head_dim=2**31)

KERNELS: tuple[Kernel, ...] = (
    Kernel("fp4-emulated", "fp4", emulated=True),
    Kernel("int8-emulated", "int8", emulated=True, trainable=True),
    EXACT,
)


def capability_of(device: torch.device) -> Capability | None:
    """The compute capability of an NVIDIA GPU, None for anything else (a ROCm build also says "cuda")."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return _capability(device.index or 0)


def _capability(index: int) -> Capability:
    return torch.cuda.get_device_capability(index)


# What torch.compiler.assume_constant_result does, without the import of all of torch._dynamo that it costs
# (seconds): a compiled graph asks for the capability once, while it is traced.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
