"""The 4-bit quantisation and its correction on this GPU, against a plain copy of as many bytes.

    SAGE3_EMULATE_FP4=1 python benchmarks/fp4_quantise.py --out benchmarks/results/fp4-quantise-h200.json

Needs the 4-bit kernels: a GPU of sm_12x, or the switch on sm_90. The quantisation is the same code on both: it rounds to
e2m1 by itself. Bytes count q, k and v read once and every code and scale written once
(csrc/include/sage3/nvfp4_format.cuh). The correction is Q's block means times K, made for a chunk of the query tiles at a
time. The three take turns; medians. Exits with 2 where there is no such kernel.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine
from comfy_sage3.kernels import build

SHAPES = ((4, 32, 8192, 128), (4, 32, 8192, 64), (2, 16, 8192, 256), (1, 24, 32768, 128))  # B, H, N, D
TILE, BLOCK = 128, 16
MOST_DELTA = 256 << 20  # bytes of the correction's room, whatever N
CALLS, ROUNDS = 8, 7
BAR = 0.6  # of the copy's bandwidth


def record_bytes(d: int) -> int:
    """What is written for 128 tokens of q, k and v of one head: codes, scales, levels."""
    codes, scales = TILE * d // 2, TILE * d // BLOCK
    query_scales = 4 * 256 * (2 if d == 256 else 1)
    return 3 * codes + 2 * scales + query_scales + 2 * 16


def milliseconds(call: Callable[[], Any]) -> float:
    """Of one call, in a batch of several."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS


def measure(ops: Any, b: int, h: int, n: int, d: int) -> dict[str, Any]:
    """One shape: medians in ms, and the quantisation's share of the copy's bandwidth."""
    q, k, v = (torch.randn(b, h, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    jobs = b * h * (n // TILE)
    moved = 3 * q.numel() * 2 + jobs * record_bytes(d)
    source = torch.empty(moved // 2, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    workspace = ops.fp4_quantize(q, k, v, 0.1, None)
    chunk = max(1, min(jobs, MOST_DELTA // (n // TILE * 1024)))

    def correct() -> None:
        for first in range(0, jobs, chunk):
            ops.fp4_correct(workspace, q, k, False, 0.1, first, min(chunk, jobs - first))

    calls = {
        "copy": lambda: target.copy_(source),
        "quantise": lambda: ops.fp4_quantize(q, k, v, 0.1, None),
        "correct": correct,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    ms = {name: statistics.median(t) for name, t in times.items()}
    return {
        "shape": {"batch": b, "heads": h, "tokens": n, "head_dim": d},
        "bytes": moved,
        "ms": ms,
        "copy_gb_per_s": moved / ms["copy"] / 1e6,
        "quantise_of_copy": ms["copy"] / ms["quantise"],
        "workspace_bytes": workspace.numel(),
    }


def main() -> int:
    """Measure, print, write. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    outcome = build.load() if torch.cuda.is_available() else None
    if not isinstance(outcome, build.Loaded) or not hasattr(outcome.ops, "fp4_quantize"):
        print("benchmarks/fp4_quantise.py needs a GPU with the 4-bit kernels; see its first lines.", file=sys.stderr)
        return 2
    rows = [measure(outcome.ops, *shape) for shape in SHAPES]
    for row in rows:
        print(f"{row['shape']}: {row['quantise_of_copy']:.1%} of {row['copy_gb_per_s']:.0f} GB/s; {row['ms']}")
    reached = rows[0]["quantise_of_copy"]
    print(f"{'reached' if reached >= BAR else 'MISSED'}: {reached:.1%} of the copy's bandwidth (must {BAR:.0%})")
    if args.out is not None:
        command = shlex.join(["python", "benchmarks/fp4_quantise.py", *sys.argv[1:]])
        record = machine.record((__doc__ or "").splitlines()[0], command)
        machine.write(args.out, record | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
