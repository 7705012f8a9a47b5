"""What the ComfyUI hook costs: the guard, the counting and the timing, against the same attention called without them.

    python benchmarks/hook.py --out benchmarks/results/hook-h100.json

"sampling" is a stand-in for Wan 2.1 1.3B at 480p: 30 layers, each with self-attention over 32,760 tokens (12 heads of
128), its projections and the two products of the MLP; no attention to the text, no VAE; 4 steps, as distilled models have.
What is paid once a run, the guard's look at first results, weighs a fifth of that in 20. "attention alone" leaves out all
but attention. "bare" calls the door, "hook" goes through the override as ComfyUI calls it, "no guard" is the hook without
its look at first results. Runs take turns; medians. Writes JSON; exits with 2 where there is no GPU.
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
import torch.nn.functional as F
from torch import Tensor

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine
from comfy_sage3.attention import attention
from comfy_sage3.comfyui.guard import Guard
from comfy_sage3.comfyui.hook import Hook
from comfy_sage3.comfyui.override import make_override
from comfy_sage3.precision import Precision, PrecisionPlan

LAYERS, HEADS, HEAD_DIM, MLP, TOKENS, STEPS = 30, 12, 128, 8960, 32_760, 4
WIDTH = HEADS * HEAD_DIM

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v), each (1, tokens, WIDTH)
Step = Callable[[Attend], None]


class Blind(Guard):
    """A guard that looks at nothing."""

    def check(self, *args: Any) -> None:
        """Trust everything."""


class Model:
    """LAYERS blocks whose weights are the same, since only their time counts."""

    def __init__(self, tokens: int) -> None:
        def made(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5

        self.x, self.qkv, self.out = made(1, tokens, WIDTH) * WIDTH**0.5, made(3 * WIDTH, WIDTH), made(WIDTH, WIDTH)
        self.up, self.down = made(MLP, WIDTH), made(WIDTH, MLP)

    def step(self, attend: Attend) -> None:
        """One step of a sampling."""
        x = self.x
        for layer in range(LAYERS):
            q, k, v = F.linear(F.layer_norm(x, (WIDTH,)), self.qkv).chunk(3, 2)
            x = x + F.linear(attend(layer, q, k, v), self.out)
            x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (WIDTH,)), self.up), approximate="tanh"), self.down)

    def attention_alone(self, attend: Attend) -> None:
        """The attention of one step."""
        for layer in range(LAYERS):
            attend(layer, self.x, self.x, self.x)


def bare(step: Step, steps: int) -> None:
    """Every layer of every step through the door."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (HEADS, HEAD_DIM)) for x in (q, k, v))
        return attention(q, k, v, layout="NHD", precision="int8").flatten(2)

    for _ in range(steps):
        step(attend)


def hooked(guard: Guard) -> Callable[[Step, int], None]:
    """The same through the override, as a model calls it."""

    def run(step: Step, steps: int) -> None:
        hook = Hook(PrecisionPlan(Precision.INT8))
        hook.guard = guard
        override = make_override(hook)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found: Tensor = override(None, q, k, v, heads=HEADS, transformer_options={"block_index": layer})
            return found

        hook.begin(None)
        for _ in range(steps):
            step(attend)
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/hook.py needs a CUDA GPU.", file=sys.stderr)
        return 2
    runs: dict[str, Callable[..., None]] = {"bare": bare, "hook": hooked(Guard()), "no guard": hooked(Blind())}
    result: dict[str, Any] = {}
    long, short = Model(args.tokens), Model(128)
    cases: tuple[tuple[str, Step, int, int], ...] = (
        ("sampling", long.step, args.tokens, args.steps),
        ("attention alone", long.attention_alone, args.tokens, args.steps),
        ("short calls", short.attention_alone, 128, 20),
    )
    for what, step, tokens, steps in cases:
        for run in runs.values():
            run(step, 1)  # compilers, allocator
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                times[name].append(seconds(run, step, steps))
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
