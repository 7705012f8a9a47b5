"""Attention, side by side in one run: PyTorch's, comfy-kitchen's and ours, speed and error of each.

    python benchmarks/attention.py                                     every shape and peer, about two minutes
    python benchmarks/attention.py --quick                             the two square shapes of 8192 tokens
    python benchmarks/attention.py --shapes wan,hd128-8192 --peers cudnn,sm90 --out benchmarks/results/wan.json
    python benchmarks/attention.py --backward                          gradients too: square shapes, sharp scores, a sink
    python benchmarks/attention.py --from-json benchmarks/results/h200.json     table and plot anew, no GPU needed

Peers take turns within each shape, so that a clock that drifts is fair to all. "with quantisation" is the whole call,
"kernel alone" starts from prepared 8-bit operands. TFLOPS are 4 B H Lq Lk D / time, halved when causal, x 2.5 backward and
x 3.5 for both passes together. Errors are against fp64 on the same inputs, up to 4 heads and 1024 rows. GB/s of the
quantisation count q, k and v read once and every code and scale written once. Writes NAME.json, NAME.md and NAME.png;
exits with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import gc
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a script: let the checkout's own packages be found, and this folder's files stay private
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import bars, machine, measure, page, peers, shapes
from benchmarks.measure import KIND_TEXT, CudaClock, Timing
from benchmarks.peers import Peer
from benchmarks.shapes import Shape
from comfy_sage3.errors import InputError, Sage3Error

SECONDS = 2.5  # timed per shape
QUICK_SECONDS = 1.5
LONG_FLOPS = 5e13  # from here a peer that is slower than the others would cost a second a call
DEVICE = "cuda"
DTYPE = torch.bfloat16


class Stopped(Exception):
    """The device is lost: every further call would fail."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, write. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    try:
        if args.from_json is not None:
            print("\n".join(page.render(page.read(args.from_json), args.from_json)))
            return 0
        wanted = shapes.chosen(args.shapes or (shapes.QUICK if args.quick else shapes.usual(args.backward)))
        measured = peers.chosen(args.peers, args.backward)
        if not 0 <= args.rest <= 60:
            raise InputError(f"--rest is {args.rest}: give 0 to 60 seconds.")
        if not torch.cuda.is_available():
            print("benchmarks/attention.py needs a CUDA GPU, and torch sees none here.", file=sys.stderr)
            return 2
        seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
        result = run(wanted, measured, seconds, args.rest, command(words), say=lambda text: print(text, flush=True))
        print(summary(result))
        print("\n".join(page.write(result, args.out or default_out(result))))
    except Sage3Error as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 1 if result["stopped"] else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    intro, _, rest = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog="benchmarks/attention.py", description=intro, epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument(
        "--shapes", type=names, help="groups or names: square, weights, wan, hunyuan, flux, qwen, sdxl, cogvideox"
    )
    made.add_argument("--peers", type=names, help="such as cudnn,comfy-kitchen,sm90,sm90-kernel,mma,quantise")
    made.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/attention-GPU.json)")
    made.add_argument("--backward", action="store_true", help="time gradients too, on square shapes and weights")
    made.add_argument("--quick", action="store_true", help="hd128 and hd64 at 8192 tokens only")
    made.add_argument("--seconds", type=float, help="timed per shape, about")
    made.add_argument("--rest", type=float, default=measure.REST_S, help="seconds before each sample; 0: back to back")
    made.add_argument("--from-json", type=Path, metavar="FILE", help="render an earlier result's table and plot anew")
    return made


def command(words: Sequence[str]) -> str:
    """The command line as it was given, without this machine's folders."""
    return machine.tidy(shlex.join(["python", "benchmarks/attention.py", *words]))


def default_out(result: dict[str, Any]) -> Path:
    """benchmarks/results/attention-nvidia-h200.json"""
    name = "".join(c if c.isalnum() else "-" for c in result["device"]["name"].lower())
    return Path(__file__).resolve().parent / "results" / f"attention-{name}.json"


def run(
    wanted: Sequence[Shape],
    measured: Sequence[Peer],
    seconds: float,
    rest_s: float,
    command: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure everything -> the result, as the JSON has it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    clock = CudaClock(rest_s)
    absent = {p.name: p.absent() for p in measured}
    present = [p for p in measured if absent[p.name] is None]
    result: dict[str, Any] = {
        "schema": page.SCHEMA,
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "commit": machine.commit(),
        "device": machine.device(),
        "versions": machine.versions(),
        "clocks": {"start": machine.smi(), "busy": None, "end": None},
        "rest_s": rest_s,
        "dtype": str(DTYPE).removeprefix("torch."),
        "kinds": KIND_TEXT,
        "peers": [
            {"name": p.name, "label": p.label, "part": p.part, "direction": p.direction,
             "absent": machine.tidy(absent[p.name] or "") or None}
            for p in measured
        ],
        "copy_gb_per_s": measure.copy_bandwidth(clock, DEVICE),
        "rows": [],
        "stopped": None,
    }  # fmt: skip
    for p in measured:
        if why := absent[p.name]:
            say(f"absent: {p.label}: {machine.tidy(why)}")
    say(f"{result['device']['name']}: copies {result['copy_gb_per_s']:.0f} GB/s")
    try:
        for shape in wanted:
            for direction in shapes.PASSES:
                mine = [p for p in present if p.direction == direction]
                if not mine or (direction != "forward" and shape.group not in shapes.WITH_GRADIENTS):
                    continue
                rows = Turn(shape, direction, mine, clock).rows(seconds, result)
                result["rows"] += rows
                say("\n".join(line(row) for row in rows))
        result["clocks"]["end"] = machine.smi()
    except Stopped as problem:
        result["stopped"] = machine.tidy(str(problem))
        say(f"stopped: {result['stopped']}")
    result["verdicts"] = bars.verdicts(result)
    return result


class Turn:
    """One shape in one direction: the peers that take it, and what they have to show."""

    def __init__(self, shape: Shape, direction: str, measured: Sequence[Peer], clock: measure.Clock) -> None:
        self.shape, self.direction, self.clock = shape, direction, clock
        self.peers = list(measured)
        self.missing: dict[str, str] = {}
        self.errors: dict[str, dict[str, dict[str, float | None]]] = {p.name: {} for p in measured}

    def rows(self, seconds: float, result: dict[str, Any]) -> list[dict[str, Any]]:
        """Prepare, check, time. ``result`` gives the clocks under load a place."""
        shape = self.shape
        for p in self.peers:
            why = p.refuses(shape) or self._too_slow(p)
            if why:
                self.missing[p.name] = why
        count = measure.input_sets(shape, DTYPE.itemsize, machine.l2_bytes())
        sets = [measure.inputs(shape, "normal", seed, DEVICE, DTYPE) for seed in range(count)]
        runners: dict[str, list[Callable[[], Any]]] = {}
        for p in self.peers:
            made = self._guarded(p, prepare, p, sets, shape.causal)
            if made is not None:
                runners[p.name] = made
        self._compare("normal", sets[0], runners)
        workspace = 0
        if "quantise" in runners:
            workspace = runners["quantise"][0]().numel()
        runners = {name: calls for name, calls in runners.items() if name not in self.missing}
        timings: dict[str, Timing] = {}
        if runners:
            try:
                timings = measure.interleaved(runners, seconds, self.clock)
            except RuntimeError as problem:
                raise Stopped(f"{shape.name}: {first_line(problem)}") from problem
            if result["clocks"]["busy"] is None:
                result["clocks"]["busy"] = under_load(runners)
        sets, runners = [], {}
        release()
        if self.direction == "forward":
            heads = measure.sampled_heads(shape)
            for kind in measure.KINDS[1:]:
                few = measure.inputs(shape, kind, 1, DEVICE, DTYPE, heads=heads)
                calls = {}
                for p in self.peers:
                    made = self._guarded(p, prepare, p, [few], shape.causal)
                    if made is not None and p.has_output:
                        calls[p.name] = made
                self._compare(kind, few, calls)
            del few, calls
            release()
        return [self._row(p, timings, workspace) for p in self.peers]

    def _too_slow(self, p: Peer) -> str | None:
        long = self.shape.flops(self.direction) > LONG_FLOPS
        return "left out of long shapes: about a second a call" if long and p.name.startswith("efficient") else None

    def _guarded(self, p: Peer, make: Callable[..., Any], *args: Any) -> Any:
        """What ``make`` gives; None, and the reason kept, when the peer cannot. Raises Stopped when the device is lost."""
        if p.name in self.missing:
            return None
        try:
            made = make(*args)
            torch.cuda.synchronize()
            return made
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as problem:
            self.missing[p.name] = machine.tidy(f"{type(problem).__name__}: {first_line(problem)}")
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise Stopped(f"{self.shape.name}, {p.label}: {first_line(lost)}") from lost
        return None

    def _compare(self, kind: str, qkv: Any, runners: dict[str, Any]) -> None:
        """Run each peer once and hold some rows of it against fp64."""
        shape = self.shape
        heads, rows = measure.sampled_heads(shape), measure.sampled_rows(shape.queries)
        q, k, v = (x[:1, :heads] for x in qkv)
        forward = self.direction == "forward"
        out, dq = measure.exact_rows(q, k, v, rows, shape.causal, None if forward else q)
        exact = out if dq is None else dq
        for p in self.peers:
            if p.name not in runners:
                continue
            got = self._guarded(p, runners[p.name][0])
            if got is not None and p.has_output:
                found = measure.error(got, exact, rows)
                self.errors[p.name][kind] = {k: v if math.isfinite(v) else None for k, v in found.items()}
            del got

    def _row(self, p: Peer, timings: dict[str, Timing], workspace: int) -> dict[str, Any]:
        shape, timing = self.shape, timings.get(p.name)
        row: dict[str, Any] = asdict(shape) | {"shape": shape.name, "text": shape.text, "peer": p.name, "part": p.part}
        del row["name"]
        row |= {"direction": self.direction, "missing": self.missing.get(p.name), "error": self.errors[p.name] or None}
        if timing is None:
            return row
        row["ms"] = asdict(timing)
        row["tflops"] = shape.flops(self.direction) / timing.median / 1e9 if p.has_output else None
        cudnn = timings.get(peers.BASELINE + ("" if self.direction == "forward" else f"-{self.direction}"))
        row["ratio_to_cudnn"] = cudnn.median / timing.median if cudnn and p.has_output else None
        if p.part == peers.QUANTISATION:
            moved = peers.quantisation_bytes(shape, DTYPE.itemsize, workspace)
            row |= {"bytes": moved, "gb_per_s": peers.gigabytes_per_second(moved, timing.median)}
        return row


def prepare(p: Peer, sets: Sequence[tuple[Tensor, Tensor, Tensor]], causal: bool) -> list[Callable[[], Any]]:
    """A call for each set of inputs."""
    return [p.make(q, k, v, causal) for q, k, v in sets]


def under_load(runners: dict[str, Any], seconds: float = 1.0) -> dict[str, Any] | None:
    """Clocks and power while one peer works: ours where it is there, else cuDNN."""
    name = next((n for n in ("sm90-kernel", "mma-kernel", peers.BASELINE) if n in runners), next(iter(runners)))
    clock = CudaClock()
    ms = clock.time(runners[name][0])
    measure.looped(runners[name], min(2000, max(1, int(seconds * 1000 / max(ms, 0.01)))))()  # queued, not awaited
    found = machine.smi()
    torch.cuda.synchronize()
    return found


def release() -> None:
    """Give the memory of the last shape back, so that the next one starts alike."""
    gc.collect()
    torch.cuda.empty_cache()


def first_line(problem: BaseException) -> str:
    """What an exception says, short."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def line(row: dict[str, Any]) -> str:
    """A row for the terminal, as soon as it is known."""
    name = f"{row['shape']:<18} {row['peer']:<16}"
    if not row.get("ms"):
        return f"{name} {row['missing'] or 'not timed'}"
    ms = row["ms"]
    speed = f"{row['tflops']:7.1f} TFLOPS" if row["tflops"] else f"{row['gb_per_s']:7.0f} GB/s  "
    ratio = f"{row['ratio_to_cudnn']:5.2f}x" if row["ratio_to_cudnn"] else "     -"
    errors = " ".join(
        f"{kind} {'NaN' if e['relative_l1'] is None else format(e['relative_l1'], '.4f')}"
        for kind, e in (row["error"] or {}).items()
    )
    return f"{name} {ms['median']:9.4f} ms ({ms['p10']:.4f} to {ms['p90']:.4f}) {speed} {ratio}  {errors}"


def summary(result: dict[str, Any]) -> str:
    """The verdicts, for the terminal."""
    cells = [page.verdict_cells(v) for v in result["verdicts"]]
    return "\n".join(
        f"{verdict.strip('*'):<14} {here:>7}  must {must:<8} aim {aim:<8} {what}" for what, must, aim, here, verdict in cells
    )


if __name__ == "__main__":
    sys.exit(main())
