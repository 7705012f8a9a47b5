"""``python -m comfy_sage3 build``: compile the kernels now, or make a wheel that has them inside."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..errors import Sage3Error
from .build import obtain, wanted_archs
from .jit.lock import LockTimeout
from .jit.machine import ToolchainError
from .jit.make import make
from .jit.ninja import BuildError
from .jit.setting import Setting
from .jit.wheel import make_wheel
from .sources import parse_archs


class CommandError(Sage3Error):
    """A build that could not be done; the reason is one sentence, the log stands above it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--arch", default=None, help='such as "90a,120a", or all (default: the GPUs of this machine)')
    parser.add_argument("--wheel", type=Path, default=None, metavar="DIR", help="make a wheel with the kernels inside")
    parser.add_argument("--force", action="store_true", help="build even where a fitting library is in the cache")


def run(args: argparse.Namespace, setting: Setting | None = None) -> int:
    """Build and say where the result lies. Returns 0."""
    setting = setting or Setting()
    if args.arch:
        setting = dataclasses.replace(setting, archs=parse_archs(args.arch))
    try:
        archs = wanted_archs(setting)
        if args.force or args.wheel:
            entry, _ = make(setting, archs, print, always=args.force)
        else:
            entry, origin = obtain(setting, archs, print)
            if origin == "cache":  # another compiler may have made it; the one of today is what was asked for
                entry, _ = make(setting, archs, print)
        print(entry.library)
        if args.wheel:
            print(make_wheel(entry, args.wheel, setting.version))
    except BuildError as problem:
        if problem.log:
            print(problem.log)
        hint = "; name the GPUs with --arch" if "no NVIDIA GPU" in str(problem) else ""
        raise CommandError(f"{problem}{hint}") from None
    except (ToolchainError, LockTimeout, OSError) as problem:
        raise CommandError(str(problem)) from None
    return 0
