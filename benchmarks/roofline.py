"""How near to the hardware's limits recorded attention comes: a table, and the roofline as a plot.

    python benchmarks/roofline.py benchmarks/results/h200.json --out docs/images/roofline-h200.png

A call's roof is the least of three: the tensor cores' rate; the rate at which exponentials come, one a score (not for
int8-fast, which reads its codes off bits); the memory's, which is the copy's of the same run, for each operand read and the
output written once. Rates are Hopper's, a clock and multiprocessor (docs/performance.md, "Rates"), at the clock that the run
read while busy. No GPU is needed. Exits with 2 for a file that is not such a result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

INT8, BF16, EXPONENTIALS = 4096.0, 2048.0, 16.0  # multiply-adds, and MUFU.EX2, a clock and multiprocessor


class Peer(NamedTuple):
    """A row's peer: its label, its multiply-adds a clock, whether it computes exponentials, bytes of a number it reads."""

    label: str
    macs: float
    exponentials: bool
    bytes: int


PEERS = {
    "cudnn": Peer("cuDNN, bf16", BF16, True, 2),
    "sm90-kernel": Peer("int8, kernel", INT8, True, 1),
    "sm90-fast-kernel": Peer("int8-fast, kernel", INT8, False, 1),
}


class Point(NamedTuple):
    """One row: FLOP a byte, what was measured and what can be (TFLOPS), and what sets that limit."""

    shape: str
    peer: str
    intensity: float
    tflops: float
    roof: float
    limit: str


def points(result: dict[str, Any]) -> list[Point]:
    """Of every forward row of PEERS. Raises KeyError or TypeError for what is no result of benchmarks/attention.py."""
    units = result["device"]["multiprocessors"] * result["clocks"]["busy"]["sm_mhz"] * 1e6
    found = []
    for row in result["rows"]:
        peer = PEERS.get(row["peer"])
        if peer is None or row["direction"] != "forward" or not row["tflops"]:
            continue
        heads, d = row["batch"] * row["heads"], row["head_dim"]
        seen = 0.5 if row["causal"] else 1.0
        flops = 4.0 * heads * row["queries"] * row["keys"] * d * seen
        moved = heads * d * (peer.bytes * (row["queries"] + 2 * row["keys"]) + 2 * row["queries"])
        limits = {"tensor cores": 2 * peer.macs * units, "memory": flops / moved * result["copy_gb_per_s"] * 1e9}
        if peer.exponentials:
            limits["exponentials"] = EXPONENTIALS * units * 4 * d
        limit = min(limits, key=lambda name: limits[name])
        found.append(Point(row["shape"], row["peer"], flops / moved, row["tflops"], limits[limit] / 1e12, limit))
    return found


def table(found: Sequence[Point]) -> list[str]:
    """Markdown: shapes down, peers across; TFLOPS and the share of the roof."""
    lines = [
        "| shape | FLOP a byte (int8) | " + " | ".join(p.label for p in PEERS.values()) + " |",
        "| --- " * (2 + len(PEERS)) + "|",
    ]
    by = {(p.shape, p.peer): p for p in found}
    for shape in dict.fromkeys(p.shape for p in found):
        mine = [by.get((shape, peer)) for peer in PEERS]
        told = [
            "–" if p is None else f"{p.tflops:.0f} of {p.roof:.0f} ({p.limit}), {100 * p.tflops / p.roof:.0f} %"
            for p in mine
        ]
        intensity = next((p.intensity for p in reversed(mine) if p is not None), 0.0)
        lines.append(f"| {shape} | {intensity:.0f} | " + " | ".join(told) + " |")
    return lines


def plot(found: Sequence[Point], result: dict[str, Any], to: Path) -> None:
    """The roofline, both axes logarithmic, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    units = result["device"]["multiprocessors"] * result["clocks"]["busy"]["sm_mhz"] * 1e6
    copy = result["copy_gb_per_s"] / 1e3
    ends = (min(p.intensity for p in found) / 2, max(p.intensity for p in found) * 2)
    for macs, label, colour in ((BF16, "bf16 tensor cores", "#888888"), (INT8, "INT8 tensor cores", "#222222")):
        peak = 2 * macs * units / 1e12
        axes.plot(
            [ends[0], peak / copy, ends[1]], [ends[0] * copy, peak, peak], color=colour, label=f"{label}, {peak:.0f} TFLOPS"
        )
    for (name, peer), colour in zip(PEERS.items(), ("#888888", "#2f6fde", "#e08a1e"), strict=True):
        mine = [p for p in found if p.peer == name]
        axes.scatter([p.intensity for p in mine], [p.tflops for p in mine], color=colour, label=peer.label, zorder=3)
    axes.set(xscale="log", yscale="log", xlim=ends, xlabel="FLOP for each byte that must be moved", ylabel="TFLOPS")
    axes.set_title(f"{result['device']['name']}: copy {copy * 1e3:.0f} GB/s, {result['clocks']['busy']['sm_mhz']:.0f} MHz")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    figure.savefig(to, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, draw the plot. Returns the exit status."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("result", type=Path, help="a JSON of benchmarks/attention.py")
    made.add_argument("--out", type=Path, default=None, help="the PNG")
    args = made.parse_args(argv)
    try:
        result = json.loads(args.result.read_text("utf-8"))
        found = points(result)
        if not found:
            raise KeyError("rows")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        print(
            f"error: {args.result} is not a result of benchmarks/attention.py ({problem}): run that first.", file=sys.stderr
        )
        return 2
    print("\n".join(table(found)))
    if args.out is not None:
        plot(found, result, args.out)
        print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
