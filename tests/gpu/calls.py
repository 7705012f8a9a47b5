"""Inputs for the kernels, and the kernels as the tests call them: always on memory full of NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"
KERNELS = ("sm90", "mma")
FAST = "sm90-fast"  # differs from sm90 in its exponentials only: test_fast.py
LOWEST = {  # compute capabilities that a kernel serves, ends included
    "sm90": ((9, 0), (9, 0)),
    FAST: ((9, 0), (9, 0)),
    "mma": ((7, 5), (99, 0)),
}

LENGTHS = (1, 97, 113, 203, 257, 1023, 1025)
HEAD_DIMS = (1, 40, 64, 72, 80, 96, 112, 128, 160, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Kernel:
    """One attention kernel, forced: no dispatch between it and the test."""

    name: str
    ops: Any

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
    ) -> Tensor:
        """out."""
        poison()
        return self.ops.int8_attention(q, k, v, mask, causal, scale_of(q, scale), False, self.name)[0]

    def with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        poison()
        return self.ops.int8_attention(q, k, v, mask, causal, scale_of(q, scale), True, self.name)


def scale_of(q: Tensor, scale: float | None) -> float:
    """None means what it means everywhere."""
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def poison(megabytes: int = 64) -> None:
    """Fill what the allocator hands out next with bytes 0xFF: NaN as fp16, bf16 and fp32, -1 as int8.

    Small blocks come from a pool of their own, hence many of them.
    """
    sizes = (megabytes << 20, *(4 * (512, 4096, 1 << 16, 1 << 19)))
    held = [torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE) for size in sizes]
    del held


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """N(0,1), the same for every dtype up to rounding."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def qkv(
    lq: int = 203, lk: int = 257, d: int = 64, *, b: int = 2, h: int = 2, hkv: int | None = None,
    dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """N(0,1) inputs, HND."""
    hkv = h if hkv is None else hkv
    return (
        randn(b, h, lq, d, seed=seed, dtype=dtype),
        randn(b, hkv, lk, d, seed=seed + 1, dtype=dtype),
        randn(b, hkv, lk, d, seed=seed + 2, dtype=dtype),
    )


def some_mask(shape: tuple[int, ...], dtype: torch.dtype, keep: float = 0.7, seed: int = 9) -> Tensor:
    """Random: True with probability ``keep``, or N(0,1) where kept and -inf where not."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    kept = torch.rand(shape, generator=generator, device=DEVICE) < keep
    if dtype == torch.bool:
        return kept
    bias = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    return bias.masked_fill(~kept, -torch.inf)
