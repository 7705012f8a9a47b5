"""A few small calls of every kind, to be run under NVIDIA's compute-sanitizer (of the CUDA toolkit), once per tool:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1     # every tensor its own allocation: one byte too far is seen
    compute-sanitizer --error-exitcode 9 --tool memcheck --leak-check full python tests/gpu/sanitize.py
    compute-sanitizer --error-exitcode 9 --tool racecheck --racecheck-report all python tests/gpu/sanitize.py
    compute-sanitizer --error-exitcode 9 --tool initcheck python tests/gpu/sanitize.py
    compute-sanitizer --error-exitcode 9 --tool synccheck --num-cuda-barriers 4096 python tests/gpu/sanitize.py

Build the kernels before (python -m comfy_sage3 build), or the compiler runs under the tool too. ``--kernel sm90`` and
``--only causal`` narrow it down; SAGE3_LINEINFO=1 gives line numbers.

synccheck must be told how many barriers to follow: left to itself (or with 12) it loses track at the mma kernel's masked
calls, says so ("Detected overflow of tracked cuda::barrier structures"), and the launch fails under it; with 4096 all calls
of all kernels pass. racecheck does not credit __syncwarp() before lane 0 arrives for its warp, and reports a write after the
other lanes' reads where a slot of a ring is filled again. The control: with all 32 lanes arriving (the lane's test removed
from the kernel's ``release``, the "empty" barriers' counts times 32) there is no hazard in any call of sm90, sm90-fast and
fp4, nor in those of mma and the gradient that were tried. leak-check names what torch keeps until the process ends.

Exits with 1 where a result is wrong, 2 where no kernel is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from comfy_sage3.kernels import build
from comfy_sage3.kernels.training import MAX_HEAD_DIM
from comfy_sage3.metrics import attention_error
from comfy_sage3.reference import exact_attention
from tests.gpu.calls import FAST, HEAD_DIMS, KERNELS, LOWEST
from tests.gpu.exact import FAST_LSE, FAST_NORMAL, NORMAL, problems
from tests.gpu.test_backward import LEAST, NAMES, bounds, problem
from tests.gpu.test_backward import exact as exact_gradients
from tests.sinks import give_sink

FP4 = "fp4"  # where the library has it: on sm_12x, or with SAGE3_EMULATE_FP4=1
GRADIENT = "gradient"  # sm90's forward pass, what it saves, and the backward pass; with the library for sm_90
EVERY = (*KERNELS, FAST, FP4, GRADIENT)
LEAST_COSINE = 0.9  # of fp4, whose rightness is for test_fp4.py to show


class Call(NamedTuple):
    """One call; tensors on the CPU."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    causal: bool = False
    least: float = LEAST  # cosine of its gradients: a sink's own is 16 times a sum that all but vanishes


def inputs(lq: int, lk: int, d: int, h: int = 2, hkv: int = 2, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """N(0,1) from the CPU: no kernel but ours is watched."""
    generator = torch.Generator().manual_seed(lq + lk + d)
    return [torch.randn(1, n, tokens, d, generator=generator).to(dtype) for n, tokens in ((h, lq), (hkv, lk), (hkv, lk))]


def calls() -> Iterator[Call]:
    """Ragged ends, every head dim, enough tiles that every ring of buffers comes round, every kind of mask."""
    for d in HEAD_DIMS:
        yield Call(f"ragged hd{d}", *inputs(70, 131, d))
    for d in (64, 96, 128, 256):
        yield Call(f"long hd{d}", *inputs(200, 1000, d))
        yield Call(f"causal hd{d}", *inputs(300, 301, d), causal=True)
    for d in (64, 128):
        yield Call(f"longest hd{d}", *inputs(70, 2500, d))  # 20 tiles: the sm90 kernel has slots of scales for 8
    for d in (64, 128):  # some tiles of queries with a sink, some without: what the gradient lifts changes
        yield Call(f"sink hd{d}", *give_sink(*inputs(300, 400, d), 0.9, (0, 2, 3)), least=0.99)
    yield Call("causal, more keys", *inputs(97, 400, 128), causal=True)
    yield Call("causal, more queries", *inputs(400, 97, 64), causal=True)
    yield Call("one query, one key", *inputs(1, 1, 64))
    yield Call("one query", *inputs(1, 700, 128))
    yield Call("grouped", *inputs(130, 257, 128, h=8))
    for dtype in (torch.float16, torch.float32):
        yield Call(f"{dtype}"[6:], *inputs(113, 203, 72, dtype=dtype))
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(113, 203, 128)]
    yield Call("token-major", *token_major)
    yield Call("every second channel", *(x[..., ::2] for x in inputs(113, 203, 128)))
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(1, 2, 130, 391, generator=generator) < 0.7
    kept[:, :, 64:128, 128:256] = False
    kept[:, :, :64, 256:384] = True
    kept[:, :, 129] = False
    yield Call("bool mask", *inputs(130, 391, 64), mask=kept)
    yield Call("bool mask, causal", *inputs(130, 391, 128), mask=kept, causal=True)
    yield Call("padding mask", *inputs(130, 391, 128), mask=torch.arange(391)[None, None, None] < 300)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        bias = torch.randn(1, 1, 130, 391, generator=generator).to(dtype).masked_fill(~kept[:, :1], -torch.inf)
        yield Call(f"additive mask {dtype}"[:32], *inputs(130, 391, 96), mask=bias)


def main() -> int:
    """Run the calls, hold each against fp64. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", choices=EVERY, help="default: every one that this GPU has")
    parser.add_argument("--only", default="", help="calls whose name contains this")
    args = parser.parse_args()
    outcome = build.load()
    if isinstance(outcome, build.Failure):
        print(f"no kernels: {outcome.reason}", file=sys.stderr)
        return 2
    here = torch.cuda.get_device_capability()
    kernels = [n for n in EVERY if n in LOWEST and LOWEST[n][0] <= here <= LOWEST[n][1] and args.kernel in (None, n)]
    for name, operator in ((FP4, "fp4_attention"), (GRADIENT, "int8_attention_gradient")):
        if hasattr(outcome.ops, operator) and args.kernel in (None, name):
            kernels.append(name)
    wrong = 0
    for kernel in kernels:
        for call in calls():
            if args.only not in call.name or (kernel == GRADIENT and call.q.shape[-1] > MAX_HEAD_DIM):
                continue
            q, k, v = (to_gpu(x) for x in (call.q, call.k, call.v))
            mask = None if call.mask is None else call.mask.cuda()
            given = (q, k, v, mask, call.causal, call.q.shape[-1] ** -0.5, True)
            if kernel == FP4:
                out, lse = outcome.ops.fp4_attention(*given)
                want, _ = exact_attention(call.q, call.k, call.v, mask=call.mask, is_causal=call.causal)
                cosine = attention_error(out.cpu(), want)["cosine"]
                found = [] if cosine >= LEAST_COSINE else [f"cosine {cosine:.4f}"]
            elif kernel == GRADIENT:
                found = [
                    x for deterministic in (False, True) for x in wrong_gradients(outcome.ops, call, given, deterministic)
                ]
            else:
                out, lse = outcome.ops.int8_attention(*given, kernel)
                torch.cuda.synchronize()
                bound, lse_factor = (FAST_NORMAL, 2 * FAST_LSE) if kernel == FAST else (NORMAL, 2.0)
                found = problems(
                    out.cpu(),
                    lse.cpu(),
                    *call[1:6],
                    normal=call.mask is None and call.least == LEAST,
                    lse_factor=lse_factor,
                    bound=bound,
                )
            wrong += len(found)
            print(f"{kernel:<9} {call.name}: {'; '.join(found) or 'right'}", flush=True)
    return 1 if wrong else 0 if kernels else 2


def wrong_gradients(ops: Any, call: Call, given: tuple[Any, ...], deterministic: bool) -> list[str]:
    """What is wrong with the gradients of ``call``, as sentences; ``given`` is what its forward pass takes on the GPU."""
    q, k, v, mask, causal, scale, _ = given
    generator = torch.Generator().manual_seed(2)
    dout = torch.randn(call.q.shape, generator=generator).to(call.q.dtype)
    _, _, *saved = ops.int8_attention_saving(*given, "sm90")
    got = ops.int8_attention_gradient(dout.cuda(), None, *saved, mask, k.shape[1], k.shape[2], causal, scale, deterministic)
    torch.cuda.synchronize()
    want = exact_gradients(call.q, call.k, call.v, dout, causal, scale, call.mask)
    most = bounds(call.q, call.k, call.v, dout, scale)
    told = [(name, problem(a.cpu(), e, m, call.least)) for name, a, e, m in zip(NAMES, got, want, most, strict=True)]
    return [f"{name}: {text}" for name, text in told if text is not None]


def to_gpu(x: Tensor) -> Tensor:
    """The same strides on the GPU: what lies between the elements comes along."""
    base = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


if __name__ == "__main__":
    sys.exit(main())
