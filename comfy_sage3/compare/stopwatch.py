"""Time on a device: CUDA events on a GPU (reading the clock then stalls nothing), else the wall clock."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Marks in time. ``between`` is valid only after ``synchronise``; all times are in seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"

    def synchronise(self) -> None:
        """Wait until everything queued on the device is done."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        """This moment in the device's own queue of work."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to a later one."""
        return start.elapsed_time(end) / 1000 if self._cuda else end - start

    def reset_peak_memory(self) -> None:
        """Start a new maximum of allocated memory."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int | None:
        """Most bytes that tensors held on the device since the reset; None on a CPU, which keeps no such
        count.
        """
        return torch.cuda.max_memory_allocated(self.device) if self._cuda else None
