"""What a training took: seconds, and memory at its highest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_FORGET_PEAK = "5"  # proc(5): resets VmHWM


class Usage:
    """From ``begin`` to ``end`` on ``device``: seconds of wall time and the most bytes that were in use at once.

    On an NVIDIA GPU bytes are those of PyTorch's tensors there, and PyTorch's own count of the most is begun anew; on a CPU
    under Linux those of the whole process. Elsewhere nobody counts them: None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: float | None = None  # None: nothing has ended yet
        self.peak_bytes: int | None = None
        self._started = 0.0
        self._counting = False

    def begin(self) -> None:
        """A training begins."""
        self.seconds = self.peak_bytes = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._counting = True
        else:
            self._counting = self.device.type == "cpu" and _forget_the_processs_peak()
        self._started = time.perf_counter()

    def end(self) -> None:
        """It is over: read what it took. Waits for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._counting:
            self.peak_bytes = _peak_of_the_process()
        self.seconds = time.perf_counter() - self._started

    def text(self) -> str:
        """One line, or nothing where nothing has ended."""
        if self.seconds is None:
            return ""
        line = f"Training took {self.seconds:.1f} s"
        if self.peak_bytes is None:
            return line + "."
        where = "of GPU memory" if self.device.type == "cuda" else "of memory (the whole process)"
        return f"{line} and at most {self.peak_bytes / 2**20:.0f} MiB {where}."

    def data(self) -> dict[str, Any]:
        """The same as plain data: seconds, bytes (or None), and of which device."""
        return {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "device": self.device.type}


def _forget_the_processs_peak() -> bool:
    """Whether Linux counts this process's most resident memory anew from here."""
    try:
        _CLEAR.write_text(_FORGET_PEAK)
    except OSError:  # not Linux, or a container that forbids it
        return False
    return True


def _peak_of_the_process() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("VmHWM:")), None)
    return None if found is None else int(found[1]) * 1024  # the line is in kB
