"""``python -m comfy_sage3 COMMAND``: one table of commands, each a module with ``add_arguments`` and ``run``."""

from __future__ import annotations

import argparse
import importlib
import sys

from .errors import Sage3Error

COMMANDS = {
    "doctor": ("comfy_sage3.doctor", "what this machine can run, and why"),
    "compare": ("comfy_sage3.study.command", "the same prompt and seed through two attention kernels, or a sweep of many"),
    "run": ("comfy_sage3.workflow", "run a ComfyUI workflow headless"),
    "build": ("comfy_sage3.kernels.build_command", "compile the CUDA kernels now, or make a wheel with them inside"),
    "sass": ("comfy_sage3.kernels.sass", "registers, spills and loops of every kernel, without a GPU"),
    "numerics": ("comfy_sage3.numerics", "the accuracy tables of docs/numerics.md"),
    "train-demo": ("comfy_sage3.demo.train", "train the bundled model on one GPU"),
    "train-study": ("comfy_sage3.training_study.command", "does 8-bit attention train as exact attention does?"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 done, 1 failed, 2 for bad input (one sentence on stderr)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m comfy_sage3", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        if argv and argv[0] == name:  # import only the command that runs: each brings its own dependencies
            importlib.import_module(module).add_arguments(sub)
    args = parser.parse_args(argv)
    try:
        return importlib.import_module(COMMANDS[args.command][0]).run(args)
    except Sage3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
