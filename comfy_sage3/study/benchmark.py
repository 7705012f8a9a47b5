"""Run the checkout's attention benchmark on this machine's GPU, as a process of its own that can be stopped."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import EngineError
from .recorded import BENCHMARKS, condensed

GROUPS = ("square", "wan", "hunyuan", "flux", "qwen", "sdxl", "cogvideox")  # of benchmarks/shapes.py
SECONDS = 600.0  # the most a run may take; all shapes take about two minutes
LOOK = 0.5
MOST_LINES = 400


def why_not() -> str:
    """Why the benchmark cannot run here, "" where it can."""
    if not torch.cuda.is_available():
        return "There is no CUDA GPU here that PyTorch can use, so there is nothing to measure: see the recorded results."
    if not (BENCHMARKS / "attention.py").is_file():
        return "The benchmark is not part of the installed package: start the app from a checkout of the repository."
    return ""


def measure(
    groups: Sequence[str], stop: Callable[[], bool] = lambda: False, seconds: float = SECONDS
) -> Iterator[str | dict[str, Any]]:
    """Yield the benchmark's lines as it goes on, "" while there is nothing new, and at last the condensed result.

    Raises EngineError where it cannot run, fails, or takes too long. Closing the generator, or ``stop()``, ends the process.
    """
    problem = why_not()
    if problem:
        raise EngineError(problem)
    wanted = [group for group in GROUPS if group in groups]
    if not wanted:
        raise EngineError(f"No shapes were chosen: choose from {', '.join(GROUPS)}.")
    with tempfile.TemporaryDirectory(prefix="sage3-bench-") as folder:
        out = Path(folder) / "attention.json"
        words = [sys.executable, str(BENCHMARKS / "attention.py"), "--shapes", ",".join(wanted), "--out", str(out)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        try:
            last = ""
            for line in _lines(process, stop, seconds):
                last = line or last
                yield line
            if process.wait() != 0:
                raise EngineError(f"The benchmark ended without a result: {last[:300]}")
            yield condensed(json.loads(out.read_text("utf-8")))
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


def _lines(process: subprocess.Popen[str], stop: Callable[[], bool], seconds: float) -> Iterator[str]:
    """The process's lines, "" twice a second meanwhile. Raises EngineError when it is to stop."""
    said: queue.Queue[str | None] = queue.Queue(MOST_LINES)

    def read() -> None:
        for line in process.stdout or ():
            said.put(line.rstrip())
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    waited = 0.0
    while True:
        if stop():
            raise EngineError("The benchmark was stopped.")
        if waited > seconds:
            raise EngineError(f"The benchmark took more than {seconds:.0f} s and was ended: choose fewer shapes.")
        try:
            line = said.get(timeout=LOOK)
        except queue.Empty:
            waited += LOOK
            yield ""
            continue
        if line is None:
            return
        yield line
