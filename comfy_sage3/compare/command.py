"""``python -m comfy_sage3 compare``: headless, with a progress bar, a table, and a folder of results."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..demo.sizes import LONG, MIN_TOKENS, Size, shift_of
from ..precision import Precision
from .engine import Engine, Request
from .sides import read_side

PROMPT = "a large red circle moving left quickly on a black background"
OUT = "runs/compare"
BAR = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    choices = ", ".join(p.value for p in Precision)
    parser.add_argument("--prompt", default=PROMPT, help=f'what to draw (default: "{PROMPT}")')
    parser.add_argument(
        "--a", default="exact", metavar="PRECISION", help=f"side A: {choices}, or a plan's .json file (default: exact)"
    )
    parser.add_argument("--b", default="fp4", metavar="PRECISION", help="side B, likewise (default: fp4)")
    parser.add_argument("--negative", default="", help="what guidance is to steer away from (default: nothing)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the noise both sides start from (default: 1)")
    parser.add_argument("--out", default=OUT, metavar="DIR", help=f"folder for the results (default: {OUT})")
    parser.add_argument(
        "--size",
        help="cpu (128x128x17), gpu (480x480x33) or WIDTHxHEIGHTxFRAMES (default: by device; a server: cpu)",
    )
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument("--cfg", type=float, default=3.0, help="classifier-free guidance scale (default: 3)")
    parser.add_argument(
        "--shift",
        type=float,
        help=f"time shift of the noise schedule (default: the size's own, {shift_of(0):g} below {LONG:,} tokens "
        f"and {shift_of(LONG):g} from there)",
    )
    parser.add_argument(
        "--min-tokens",
        type=int,
        default=MIN_TOKENS,
        metavar="N",
        help=f"calls of fewer query or key tokens stay exact, as with the node (default: {MIN_TOKENS}, which keeps "
        "the cross-attention to the prompt exact; 0: none)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side (default: 3)")
    parser.add_argument("--engine", choices=("diffusers", "comfyui"), default="diffusers", help="what makes the videos")
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="the ComfyUI server to use")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (diffusers engine)")
    parser.add_argument(
        "--emulate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="where this device has no kernel for a wished precision, run the plain-PyTorch reference "
        "instead, which shows the quality, not the speed (default); --no-emulate falls back instead",
    )


def run(args: argparse.Namespace) -> int:
    """Make the comparison, write the results, print the table. Returns 0; errors are raised as Sage3Error."""
    # Everything that can be refused is refused before torch and a model are loaded.
    a, b = (read_side(x, p, args.emulate, args.min_tokens) for x, p in (("A", args.a), ("B", args.b)))
    request = _request(args)
    from .measure import compare
    from .output import check_out, write
    from .tables import terminal

    out = Path(args.out)
    check_out(out)
    with terminable():
        engine = _engine(args)
        bar = Bar(sys.stderr)
        try:
            comparison = compare(engine, request, a, b, repeats=args.repeats, on_progress=bar)
            bar.done()
        finally:
            bar.close()
            engine.close()
        write(comparison, out)
    print(terminal(comparison.metrics))
    print(f"\nResults: {out / 'report.html'} (open it in a browser), {out / 'metrics.json'}")
    return 0


def _request(args: argparse.Namespace) -> Request:
    size = args.size
    if size is None:
        from .diffusers_engine import pick_device

        size = "gpu" if args.engine == "diffusers" and pick_device(args.device).type == "cuda" else "cpu"
    return Request(args.prompt, Size.parse(size), args.seed, args.steps, args.cfg, args.shift, args.negative)


def _engine(args: argparse.Namespace) -> Engine:
    if args.engine == "comfyui":
        from .comfyui_engine import ComfyUIEngine

        return ComfyUIEngine(args.server)
    from .diffusers_engine import DiffusersEngine

    return DiffusersEngine(args.device)


class Bar:
    """A progress bar on one line of a terminal; elsewhere (a log) one line per piece of work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._doing = ""
        self._start = time.monotonic()

    def __call__(self, fraction: float, doing: str) -> None:
        if self._live:
            filled = round(fraction * BAR)
            line = f"[{'#' * filled}{'.' * (BAR - filled)}] {fraction:4.0%}  {doing}"
            print(f"\r{line:<79.79}", end="", file=self._stream, flush=True)
        elif doing != self._doing:
            print(f"{fraction:4.0%}  {doing}", file=self._stream, flush=True)
        self._doing = doing

    def done(self) -> None:
        """Fill the bar and say how long it took."""
        self(1.0, f"done in {time.monotonic() - self._start:.0f} s")

    def close(self) -> None:
        """Leave the bar's line, so that what follows starts on its own."""
        if self._live and self._doing:
            print(file=self._stream)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt, so that a stopped run cleans up like an interrupted one."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        earlier = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: leave signals to whoever owns them
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
