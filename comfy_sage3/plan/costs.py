"""What a call costs at each precision: timed on this GPU, or modelled for one that has all kernels.

Seconds of two GPUs cannot be added, so a plan's costs are of one kind: measured where every precision it may choose has a
kernel here, else all modelled, exact attention too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..dispatch import Call, choose
from ..kernels.devices import capability_of
from ..precision import Precision
from .plan import LOW, MEASURED, MODELLED

MODEL_OF = "NVIDIA GeForce RTX 5090"
TIMED_RUNS = 3


class Rates(NamedTuple):
    """Of one precision on ``MODEL_OF``: what attention alone reaches at long sequences, and what goes on top."""

    tflops_64: float  # head_dim up to 64
    tflops: float  # above
    picoseconds: float  # per element of q, k and v: reading, smoothing and quantising them
    start: float  # seconds of launches


# Exact: PyTorch's FlashAttention-2 in bf16. int8: SageAttention's 8-bit kernel, as published for this GPU with
# SageAttention3 (arXiv 2505.11594, figures 4 and 5). fp4: fitted to what users measured with all of its quantisation
# (issue 342 of thu-ml/SageAttention: 278, 392, 535, 655, 727, 778 TFLOPS from 1024 to 32768 tokens), which the fit meets
# within 7 %; hd64 in the ratio of the paper. Nobody has timed this pack's own kernels on it.
RATES = {
    Precision.EXACT: Rates(218, 212, 0.0, 5e-6),
    Precision.INT8: Rates(428, 479, 2.8, 8e-6),
    Precision.FP4: Rates(690, 850, 3.5, 8e-6),
}


@dataclass(frozen=True)
class Costs:
    """Which precisions a plan may choose on this machine, and where their costs come from."""

    kind: str  # "measured" or "modelled"
    device: str
    precisions: tuple[Precision, ...]
    emulated: tuple[Precision, ...] = ()
    missing: str = ""  # why there is nothing to choose from


def costs_of(device: torch.device, emulate: bool) -> Costs:
    """What there is to choose from on ``device``; no precision at all where it has no kernel and ``emulate`` is off.

    Builds the kernels where they are not built.
    """
    call = Call((1, 8, 4096, 128), (1, 8, 4096, 128), torch.bfloat16, device.type, capability_of(device))
    kernels = {p: choose(call, p, emulate=emulate) for p in LOW}
    found = tuple(p for p in LOW if not kernels[p].fell_back)
    emulated = tuple(p for p in found if kernels[p].kernel.endswith("-emulated"))
    if any(p in RATES for p in emulated):
        return Costs(MODELLED, MODEL_OF, tuple(p for p in found if p in RATES), tuple(p for p in emulated if p in RATES))
    found = tuple(p for p in found if p not in emulated)  # int8-fast where only Hopper has it
    name = torch.cuda.get_device_name(device) if found else device.type
    return Costs(MEASURED, name, found, missing="" if found else kernels[Precision.INT8].reason)


def modelled(precision: Precision, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> float:
    """Seconds of one call of shapes (B, H, Lq, D) and (B, Hkv, Lk, D) on ``MODEL_OF``."""
    (b, h, lq, d), (_, hkv, lk, _) = q_shape, k_shape
    rates = RATES[precision]
    rate = rates.tflops_64 if d <= 64 else rates.tflops
    elements = b * d * (h * lq + 2 * hkv * lk)
    return rates.start + 4 * b * h * lq * lk * d / (rate * 1e12) + elements * rates.picoseconds * 1e-12


def measured(runs: Mapping[Precision, Callable[[], object]], repeats: int = TIMED_RUNS) -> dict[Precision, float]:
    """Median seconds of each of ``runs`` on the current GPU, in turns after one run each that does not count."""
    for run in runs.values():
        run()
    marks: dict[Precision, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {p: [] for p in runs}
    for _ in range(repeats):
        for precision, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            marks[precision].append((begin, end))
    torch.cuda.synchronize()
    return {p: sorted(a.elapsed_time(b) for a, b in pairs)[repeats // 2] / 1e3 for p, pairs in marks.items()}
