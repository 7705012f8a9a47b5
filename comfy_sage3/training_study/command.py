"""``python -m comfy_sage3 train-study``: run the arms, list them, or make the page of their results."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch

from ..demo.sizes import Size
from ..errors import InputError
from . import settings
from .settings import FORMS, SETTINGS, Setting

OUT = Path("runs/training")
PAGE = Path("docs/training.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``train-study``."""
    parser.add_argument("action", choices=["run", "list", "report"])
    parser.add_argument("--out", type=Path, default=OUT, help=f"the study's folder (default {OUT}); report: or a study.json")
    choice = parser.add_argument_group("run and list")
    names = ", ".join(s.name for s in SETTINGS)
    choice.add_argument("--only", type=_names, default=[], metavar="NAMES", help=f"settings, joined by commas, of {names}")
    choice.add_argument("--forms", type=_names, default=[], metavar="NAMES", help=f"attention, of {', '.join(FORMS)}")
    choice.add_argument("--seeds", type=int, help="at most so many seeds of each setting")
    choice.add_argument("--miniature", action="store_true", help="tiny sizes: shows on a CPU that the study works")
    choice.add_argument("--steps", type=int, help="steps of each arm")
    choice.add_argument("--size", help="of the videos: cpu, gpu or WIDTHxHEIGHTxFRAMES")
    choice.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    choice.add_argument("--workers", type=int, default=1, help="arms that train side by side, a process each")
    choice.add_argument("--budget", type=float, default=math.inf, help="seconds; run again to go on")
    page = parser.add_argument_group("report")
    page.add_argument("--page", type=Path, default=PAGE, help=f"the page (default {PAGE}); plots go into images beside it")


def run(args: argparse.Namespace) -> int:
    """Do what was asked. Returns 1 where an arm failed, else 0. Raises InputError for what cannot be run."""
    if args.action == "report":
        from .page import write

        for line in write(args.out, args.page):
            print(line)
        return 0
    asked = _settings(args)
    if args.action == "list":
        return _list(asked, args.out)
    if args.workers < 1:
        raise InputError(f"{args.workers} workers are too few: give 1 or more.")
    from .run import CUT, DONE, FAILED
    from .run import run as run_arms

    outcome = run_arms(
        asked, args.out, args.device, command=_command(args), workers=args.workers, budget=args.budget,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    print(f"{len(outcome[DONE])} done, {len(outcome[CUT])} not finished, {len(outcome[FAILED])} failed; see {args.out}")
    return 1 if outcome[FAILED] else 0


def _list(asked: list[Setting], out: Path) -> int:
    done = {path.stem for path in (out / "arms").glob("*.json")}
    for arm in settings.arms(asked):
        print(f"{'done' if arm.name in done else '-':5}{arm.name}")
    return 0


def _settings(args: argparse.Namespace) -> list[Setting]:
    found = settings.miniature() if args.miniature else SETTINGS
    asked = settings.chosen(found, args.only, args.forms, args.seeds)
    if args.steps is not None:
        if args.steps < 1:
            raise InputError(f"{args.steps} steps are too few: give 1 or more.")
        asked = [replace(s, steps=args.steps) if s.steps else s for s in asked]
    if args.size:
        size = str(Size.parse(args.size))
        asked = [replace(s, size=size) for s in asked]
    return asked


def _command(args: argparse.Namespace) -> str:
    """What a reader types for the same; without this machine's folders."""
    parts = ["python -m comfy_sage3 train-study run"]
    parts += [f"--{name} {','.join(getattr(args, name))}" for name in ("only", "forms") if getattr(args, name)]
    parts += [f"--{name} {getattr(args, name)}" for name in ("seeds", "steps", "size") if getattr(args, name) is not None]
    return " ".join(parts + (["--miniature"] if args.miniature else []))


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
