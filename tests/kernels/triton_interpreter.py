"""Triton's kernels on a CPU: what runs in a process of its own that was started with TRITON_INTERPRET=1.

Two faults of Triton's interpreter are mended: it multiplies bf16 as the integers that hold its bits, and takes a minute
for a reduction by a function of one's own. What such a reduction is there for, NaN that are passed on, is shown by
tests/gpu only.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from comfy_sage3 import reference
from comfy_sage3.kernels import triton_training

from ..training_cases import exact

TILES = triton_training.Tiles(64, 64, 4, 2)
CONFIG = triton_training.Config(TILES, TILES, TILES)
OPTIONS = dataclasses.replace(reference.OUR_INT8, gradient_scales="row")  # INT8 with scales like these kernels'


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. ``mask``: its type; ``mask_shape``: its shape, 0 for a dimension's full size."""

    lq: int = 70
    lk: int = 100
    d: int = 64
    b: int = 1
    h: int = 2
    hkv: int = 2
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    scale: float | None = None
    mask: torch.dtype | None = None
    mask_shape: tuple[int, ...] = (1, 1, 0, 0)
    dlse: bool = False
    eight_bit_dq: bool = False
    tiles: triton_training.Tiles = TILES
    offset: float = 1.0
    dout: str = "plain"


def start() -> None:
    """Make the interpreter compute what a GPU does."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    from comfy_sage3.kernels import triton_backward, triton_forward

    def values(x: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        return x.data.astype(np.float32)

    def dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
        product = values(a) @ values(b)  # of 8-bit integers below 2^24: exact
        return interpreter.TensorHandle(product.astype(acc.data.dtype) + acc.data, acc.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot
    triton_forward.largest = triton_backward.largest = lambda x, axis: tl.max(tl.abs(x), axis)


def _poison() -> None:
    """Fill what empty tensors will be made of: NaN as floats, -1 as integers."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)


def run(case: Case) -> dict[str, Any]:
    """Cosines of out, dq, dk and dv with fp64, and with the reference; what else a test asks for."""
    _poison()
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    c = case
    q, k, v = randn(c.b, c.h, c.lq, c.d), randn(c.b, c.hkv, c.lk, c.d) + c.offset, randn(c.b, c.hkv, c.lk, c.d)
    q, k, v = (x.to(c.dtype) for x in (q, k, v))
    dout = {
        "plain": lambda: randn(c.b, c.h, c.lq, c.d),
        "transposed": lambda: randn(c.b, c.lq, c.d, c.h).permute(0, 3, 1, 2),
        "expanded": lambda: randn(c.b, c.h, 1, 1).expand(c.b, c.h, c.lq, c.d),
        "tiny": lambda: randn(c.b, c.h, c.lq, c.d) * 10.0 ** -(torch.arange(c.lq) % 8).view(1, 1, -1, 1),
    }[c.dout]().to(c.dtype)
    scale = c.d**-0.5 if c.scale is None else c.scale
    dlse = randn(c.b, c.h, c.lq) if c.dlse else None
    mask = None
    if c.mask is not None:
        shape = [n or full for n, full in zip(c.mask_shape, (c.b, c.h, c.lq, c.lk), strict=True)]
        keep = torch.rand(shape, generator=g) < 0.7
        keep[..., :2, :] = False  # rows that may attend nothing
        mask = keep if c.mask == torch.bool else randn(*shape).to(c.mask).masked_fill(~keep, -math.inf)
    config = triton_training.Config(c.tiles, c.tiles, c.tiles, c.eight_bit_dq)
    out, lse, *kept = triton_training.run_forward(q, k, v, mask, c.causal, scale, True, config)
    got = triton_training.run_backward(dout, dlse, *kept, mask, c.hkv, c.lk, c.causal, scale, config)
    want_out, want_lse, *want = exact(q, k, v, dout, mask, c.causal, scale, dlse)
    dead = want_lse == -math.inf
    wide = [x.float() for x in (q, k, v)]
    full = None if mask is None else mask if mask.dtype == torch.bool else mask.float()
    same = reference.int8_attention(*wide, mask=full, is_causal=c.causal, scale=scale, options=OPTIONS)
    theirs = reference.int8_attention_backward(
        dout.float(), *wide, *same, mask=full, is_causal=c.causal, scale=scale, options=OPTIONS
    )
    names = ("out", "dq", "dk", "dv")
    return {
        "cosine": {n: _cosine(a, e) for n, a, e in zip(names, (out, *got), (want_out, *want), strict=True)},
        "off": {n: _off(a, e) for n, a, e in zip(names, (out, *got), (want_out, *want), strict=True)},
        "reference": {n: _off(a, e) for n, a, e in zip(names, (same[0], *theirs), (want_out, *want), strict=True)},
        "rows": [_cosine(got[0][:, :, i], want[0][:, :, i]) for i in range(c.lq)],
        "lse": float((lse - want_lse).masked_fill(dead, 0.0).abs().max()),
        "dead": int(dead.sum()),
        "quiet": not (out[dead].any() or got[0][dead].any()) and bool((lse[dead] == -math.inf).all()),
        "finite": all(bool(x.isfinite().all()) for x in (out, *got)),
        "like": [(x.shape, x.dtype, x.is_contiguous()) for x in got],
        "kept": sum(x.numel() * x.element_size() for x in kept),
    }


def _cosine(a: torch.Tensor, e: torch.Tensor) -> float:
    a, e = a.double().flatten(), e.double().flatten()
    return float(a @ e / (a.norm() * e.norm()).clamp_min(1e-300))


def _off(a: torch.Tensor, e: torch.Tensor) -> float:
    """Relative L1."""
    return float((a.double() - e).abs().sum() / e.abs().sum().clamp_min(1e-300))


def ops(_: None = None) -> list[str]:
    """The ops on a CPU: opcheck, gradients through autograd, saved tensors, a second derivative."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 64, generator=g).requires_grad_() for h, n in ((2, 40), (1, 50), (1, 50)))
    problems = []
    args = (q, k, v, None, True, 0.2, True)
    torch.library.opcheck(triton_training.attend, args, test_utils=("test_schema", "test_faketensor"))
    out, lse, *kept = triton_training.attend(*args)
    dout, dlse = torch.randn(out.shape, generator=g), torch.randn(lse.shape, generator=g)
    args = (dout, dlse, *kept, None, 1, 50, True, 0.2, False)
    torch.library.opcheck(triton_training.gradient, args, test_utils=("test_schema", "test_faketensor"))
    got = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse), retain_graph=True)
    for name, a, e in zip(("dq", "dk", "dv"), got, exact(q, k, v, dout, None, True, 0.2, dlse)[2:], strict=True):
        if _cosine(a, e) < 0.999:
            problems.append(f"{name}: cosine {_cosine(a, e)}")
    through_lse = torch.autograd.grad(lse, (q, k), dlse, retain_graph=True)
    for name, a, e in zip(("dq", "dk"), through_lse, exact(q, k, v, None, None, True, 0.2, dlse)[2:], strict=False):
        if _cosine(a, e) < 0.999:
            problems.append(f"{name} through lse alone: cosine {_cosine(a, e)}")
    dq = torch.autograd.grad(out, q, dout.requires_grad_(), create_graph=True)[0]
    try:
        dq.sum().backward()
        problems.append("a second derivative was given")
    except RuntimeError as problem:
        if "no second derivatives" not in str(problem):
            problems.append(str(problem))
    return problems


def nothing(_: None = None) -> list[str]:
    """Calls without queries, keys or heads."""
    problems = []
    for lq, lk, h in ((0, 5, 2), (5, 0, 2), (5, 5, 0)):
        q, k = torch.randn(1, h, lq, 64), torch.randn(1, h, lk, 64)
        out, lse, *kept = triton_training.run_forward(q, k, k, None, False, 0.2, True, CONFIG)
        got = triton_training.run_backward(out, None, *kept, None, h, lk, False, 0.2, CONFIG)
        if [x.shape for x in (out, *got)] != [q.shape, q.shape, k.shape, k.shape]:
            problems.append(f"{lq}, {lk}, {h}: {[x.shape for x in (out, *got)]}")
        if any(x.any() for x in (out, *got)) or (lse != -math.inf).any():
            problems.append(f"{lq}, {lk}, {h}: not zeros")
    return problems
