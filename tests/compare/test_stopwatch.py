"""Time on a device: the wall clock here, and CUDA's own events by a stand-in that counts what is asked of it."""

from __future__ import annotations

import time

import pytest
import torch

from comfy_sage3.compare.stopwatch import Stopwatch


def test_the_wall_clock_on_a_cpu():
    watch = Stopwatch(torch.device("cpu"))
    watch.reset_peak_memory()
    start = watch.mark()
    time.sleep(0.02)
    end = watch.mark()
    watch.synchronise()
    assert 0.02 <= watch.between(start, end) < 1
    assert watch.peak_memory() is None


def test_events_on_a_gpu(monkeypatch):
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            asked.append(("record", stream))

        def elapsed_time(self, end):  # CUDA counts in milliseconds
            return 1500.0

    device = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: f"stream of {d}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda d: asked.append(("synchronize", d)))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: asked.append(("reset", d)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 7)
    watch = Stopwatch(device)
    watch.reset_peak_memory()
    start, end = watch.mark(), watch.mark()
    assert ("synchronize", device) not in asked  # a mark must not stall the queue
    watch.synchronise()
    assert watch.between(start, end) == pytest.approx(1.5)
    assert watch.peak_memory() == 7
    assert asked == [
        ("reset", device),
        *[("record", "stream of cuda:1")] * 2,
        ("synchronize", device),
    ]
