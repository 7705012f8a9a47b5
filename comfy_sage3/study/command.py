"""``python -m comfy_sage3 compare``: one comparison, or with ``--sweep`` many, headless, with one progress bar."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..compare import command as single
from ..compare.engine import Engine
from ..errors import InputError
from .sweep import EMBEDDED, read

OUT = "runs/sweep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a single comparison, and those of a sweep."""
    single.add_arguments(parser)
    parser.set_defaults(out=None)
    parser.add_argument(
        "--sweep",
        metavar="FILE",
        help=f"prompts x seeds x precisions from a .json or .toml file, into --out (then {OUT} by default); of the other "
        "options only --device counts. The same command again goes on where it was interrupted",
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="run the sweep's cells on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT or local"
    )


def run(args: argparse.Namespace) -> int:
    """Run one comparison or a sweep. Returns the exit status."""
    if args.sweep:
        return run_sweep(args)
    if args.ray:
        raise InputError("A single comparison runs on one machine: give --ray together with --sweep.")
    args.out = args.out or single.OUT
    return single.run(args)


def run_sweep(args: argparse.Namespace) -> int:
    """Run or go on with the sweep, write the report, print the summary. Returns 1 where cells failed, else 0."""
    sweep = read(Path(args.sweep))
    from .report import REPORT, write_report
    from .results import terminal
    from .run import run as run_here
    from .store import Store

    out = Path(args.out or OUT)
    store = Store.create(out, sweep)
    open_engine, bar = _Open(args.device), single.Bar(sys.stderr)
    with single.terminable():
        try:
            if args.ray:
                from .ray_runner import run_on_ray

                outcome = run_on_ray(store, args.ray, open_engine, on_progress=bar)
            else:
                outcome = run_here(store, open_engine, on_progress=bar)
            bar.done()
        finally:
            bar.close()
            found = write_report(store)
    print(terminal(found))
    print(f"\n{outcome.sentence}\nResults: {out / REPORT} (open it in a browser), results.csv and results.json")
    return 1 if outcome.failed else 0


class _Open:
    """Opens the sweep's engine on the device; plain data, so that it can be sent to another machine."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, name: str) -> Engine:
        if name == EMBEDDED:
            from ..compare.diffusers_engine import DiffusersEngine

            return DiffusersEngine(self.device)
        from ..compare.comfyui_engine import ComfyUIEngine

        return ComfyUIEngine(name)
