"""What the ComfyUI hook costs: the guard, the counting and the timing, against the same attention called without them.

    python benchmarks/hook.py --out benchmarks/results/hook-h200.json

A stand-in for Wan 2.1 1.3B at 480p: 30 layers of self-attention over 32,760 tokens, 12 heads of 128, 20 steps, and 4, as
distilled models have; nothing but attention, so each share printed is an upper bound of its share of a sampling. "bare"
calls the door, "hook" goes through the override as ComfyUI calls it, "no guard" is the hook without its look at first
results. Runs take turns; medians. Writes JSON; exits with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine
from comfy_sage3.attention import attention
from comfy_sage3.comfyui.guard import Guard
from comfy_sage3.comfyui.hook import Hook
from comfy_sage3.comfyui.override import make_override
from comfy_sage3.precision import Precision, PrecisionPlan

LAYERS, HEADS, HEAD_DIM, TOKENS, STEPS, FEW_STEPS = 30, 12, 128, 32_760, 20, 4


class Blind(Guard):
    """A guard that looks at nothing."""

    def check(self, *args: Any) -> None:
        """Trust everything."""


def bare(q: Tensor, k: Tensor, v: Tensor, steps: int) -> None:
    """Every layer of every step through the door."""
    for _ in range(steps * LAYERS):
        attention(q, k, v, layout="NHD", precision="int8")


def hooked(guard: Guard) -> Callable[[Tensor, Tensor, Tensor, int], None]:
    """The same through the override, as a model calls it."""

    def run(q: Tensor, k: Tensor, v: Tensor, steps: int) -> None:
        hook = Hook(PrecisionPlan(Precision.INT8))
        hook.guard = guard
        override = make_override(hook)
        hook.begin(None)
        flat = [x.flatten(2) for x in (q, k, v)]
        for _ in range(steps):
            for layer in range(LAYERS):
                override(None, *flat, heads=HEADS, transformer_options={"block_index": layer})
        hook.end()
        assert hook.report.accelerated == steps * LAYERS, hook.report.summary()

    return run


def seconds(run: Callable[..., None], *args: Any) -> float:
    """Of one run, the GPU's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(*args)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    """Measure, print, write. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/hook.py needs a CUDA GPU.", file=sys.stderr)
        return 2
    runs: dict[str, Callable[..., None]] = {"bare": bare, "hook": hooked(Guard()), "no guard": hooked(Blind())}
    result: dict[str, Any] = {}
    cases = (("sampling", args.tokens, args.steps), ("few steps", args.tokens, FEW_STEPS), ("short calls", 128, args.steps))
    for what, tokens, steps in cases:
        q, k, v = (torch.randn(1, tokens, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for run in runs.values():
            run(q, k, v, 1)  # compilers, allocator
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                times[name].append(seconds(run, q, k, v, steps))
        medians = {name: statistics.median(t) for name, t in times.items()}
        calls = steps * LAYERS
        result[what] = {
            "tokens": tokens,
            "steps": steps,
            "calls": calls,
            "seconds": times,
            "median_seconds": medians,
            "guard_percent": 100 * (medians["hook"] - medians["no guard"]) / medians["no guard"],
            "hook_percent": 100 * (medians["hook"] - medians["bare"]) / medians["bare"],
            "hook_microseconds_per_call": 1e6 * (medians["no guard"] - medians["bare"]) / calls,
        }
        print(what, json.dumps({k: v for k, v in result[what].items() if k != "seconds"}, indent=1))
    if args.out is not None:
        command = shlex.join(["python", "benchmarks/hook.py", *sys.argv[1:]])
        record = machine.record((__doc__ or "").splitlines()[0], command)
        machine.write(args.out, record | {"result": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
