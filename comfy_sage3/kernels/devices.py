"""Which kernels exist and what each needs, as plain data: ``dispatch`` reads it, nothing else decides.

A CUDA kernel joins by adding a row; the first row of a precision that can serve a call is the one that runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .jit.switches import Switches

Capability = tuple[int, int]  # compute capability (major, minor): (12, 0) is sm_120

LOW_BIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALL_DTYPES = (*LOW_BIT_DTYPES, torch.float64)
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Kernel:
    """One implementation of attention and the calls it can serve.

    ``capabilities`` names the GPUs a kernel is for; empty means plain PyTorch, which runs on any device.
    ``compiled`` is a kernel's name in the built library, without which it cannot run; None means that there is
    nothing to build. ``emulated`` kernels compute what the low-bit kernel would, slowly: quality, not speed; most are
    plain PyTorch, one is the kernel itself on a GPU that lacks its instructions (``compiled``).
    ``auto_from_keys`` and ``auto_not_on`` say where exact attention is faster, so that "auto" leaves the call to it;
    a precision that was asked for by name always runs.
    ``trainable`` kernels give gradients, up to a head_dim of ``trained_head_dim``; ``training_only`` ones serve no other
    calls. ``triton`` kernels are compiled by Triton, which may not be installed, when they run first.
    """

    name: str
    precision: str  # "fp4", "int8", "int8-fast" or "exact"
    capabilities: tuple[Capability, ...] = ()
    compiled: str | None = None
    emulated: bool = False
    trainable: bool = False
    trained_head_dim: int = 256
    training_only: bool = False
    triton: bool = False
    dtypes: tuple[torch.dtype, ...] = LOW_BIT_DTYPES
    max_head_dim: int = 256
    auto_from_keys: int = 0
    auto_not_on: tuple[Capability, ...] = ()


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
# int8: mma.sync with 8-bit integers, as m8n8k16 from Turing on, as m16n8k32 from Ampere on.
HARDWARE = {
    "fp4": Hardware("a Blackwell GPU (sm_120 or sm_121)", only=((12, 0), (12, 1))),
    "int8-fast": Hardware("a Hopper GPU (sm_90; no other is held up by exponentials)", only=((9, 0),)),
    "int8": Hardware("an NVIDIA GPU from Turing on (sm_75 or newer)", lowest=(7, 5)),
}

EXACT = Kernel("exact", "exact", trainable=True, dtypes=ALL_DTYPES, max_head_dim=2**31)

# A short call is over before its quantisation has paid for itself. On Hopper PyTorch's own attention is cuDNN's, which
# int8 catches up with at 4096 keys (measured on an H100); elsewhere it is FlashAttention-2, which is slower.
INT8_AUTO_FROM_KEYS = 1024
INT8_AUTO_FROM_KEYS_ON_HOPPER = 4096

# 4 bits pay from where their quantisation, which costs what that of 8 bits does and a correction of 1/128 of the products on
# top, is less than what the products save. Modelled (docs/performance.md): this kernel has not been run on a Blackwell GPU.
FP4_AUTO_FROM_KEYS = 2048

# Both products, Q K^T and P V, are 8-bit integer products on tensor cores: of the 8-bit types the one that every GPU
# from Turing on has. Two kernels, because Hopper reaches its full rate through wgmma only, which no other GPU knows;
# mma.sync serves all of them (Hopper too, should the first row not do), each through the code of its own architecture.
# Blackwell Ultra (sm_103) has a fifteenth of its 16-bit rate left for 8-bit integers: there it runs when asked for.
#
# Gradients: the Hopper kernel's, to a head_dim of 128 (csrc/backward), and Triton's, which serve what the first cannot and
# are slower than mma.sync where there is no gradient to compute. Each has an entry in attention.TRAINED.
KERNELS: tuple[Kernel, ...] = (
    Kernel("fp4-sm120", "fp4", capabilities=((12, 0), (12, 1)), compiled="fp4-sm120", auto_from_keys=FP4_AUTO_FROM_KEYS),
    Kernel(
        "int8-sm90",
        "int8",
        capabilities=((9, 0),),
        compiled="sm90",
        trainable=True,
        trained_head_dim=128,
        auto_from_keys=INT8_AUTO_FROM_KEYS_ON_HOPPER,
    ),
    Kernel(
        "int8-triton",
        "int8",
        capabilities=((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (12, 0), (12, 1)),
        trainable=True,
        training_only=True,
        triton=True,
    ),
    Kernel("int8-fast-sm90", "int8-fast", capabilities=((9, 0),), compiled="sm90-fast"),
    Kernel(
        "int8-mma",
        "int8",
        capabilities=((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)),
        compiled="mma",
        auto_from_keys=INT8_AUTO_FROM_KEYS,
        auto_not_on=((10, 3),),
    ),
    Kernel("fp4-emulated", "fp4", emulated=True),
    Kernel("int8-emulated", "int8", emulated=True, trainable=True),
    Kernel("int8-fast-emulated", "int8-fast", emulated=True),
    EXACT,
)

# The Blackwell kernel as SAGE3_EMULATE_FP4 builds it for Hopper (sources.py): the same source, with the two instructions
# that Hopper lacks emulated exactly. Ahead of the reference in plain PyTorch, because it is the kernel that is shown.
FP4_BUILT_FOR_HOPPER = Kernel("fp4-sm120-emulated", "fp4", capabilities=((9, 0),), compiled="fp4-sm120", emulated=True)


def kernels() -> tuple[Kernel, ...]:
    """The rows of this process: ``KERNELS``, and the emulated Blackwell kernel where SAGE3_EMULATE_FP4 is set."""
    return (FP4_BUILT_FOR_HOPPER, *KERNELS) if _emulate_fp4() else KERNELS


def _emulate_fp4() -> bool:
    return bool(Switches.read(os.environ).emulate_fp4)


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
_emulate_fp4._dynamo_marked_constant = True  # type: ignore[attr-defined]
