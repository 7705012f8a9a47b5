"""Where the calls of one run went: by layer and step, and the time that attention took.

The GPU is never waited for: a call is put between two events of the stream, and those are read when the run is over.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

MOST_TIMED = 20_000  # calls of one run: two events each
MOST_REASONS = 8  # of one layer


@dataclass
class LayerRow:
    """One layer's calls. ``kernels`` counts by kernel, ``reasons`` names why some were exact."""

    calls: int = 0
    fell_back: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, None] = field(default_factory=dict)  # in the order in which they came


@dataclass(frozen=True)
class Timed:
    """A timed call: by whom, of what, and its two events or its seconds."""

    layer: str
    kernel: str
    shape: tuple[Any, ...]
    start: Any
    end: Any

    def seconds(self) -> float:
        """How long it took; waits for the GPU."""
        if isinstance(self.start, float):
            return float(self.end - self.start)
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1000


class Tally:
    """The calls of one run of a model, by layer ("" where the model does not say) and step."""

    def __init__(self) -> None:
        self.rows: defaultdict[str, LayerRow] = defaultdict(LayerRow)
        self._cells: defaultdict[tuple[str, int], Counter[str]] = defaultdict(Counter)
        self._timed: list[Timed] = []
        self._read: list[tuple[Timed, float]] = []

    def record(self, layer: str, step: int, kernel: str, reason: str, fell_back: bool, weight: int) -> None:
        """Count a call. ``weight`` is its number of scores: a step's cell shows who served most of a layer's work."""
        row = self.rows[layer]
        row.calls += 1
        row.fell_back += fell_back
        row.kernels[kernel] += 1
        if kernel == "exact" and reason and len(row.reasons) < MOST_REASONS:
            row.reasons[reason] = None
        self._cells[(layer, step)][kernel] += weight

    @contextmanager
    def timing(self, layer: str, kernel: str, shape: tuple[Any, ...], device: torch.device) -> Iterator[None]:
        """Time what is done inside, on ``device``'s current stream; a call that raises is not counted."""
        if len(self._timed) >= MOST_TIMED or torch.compiler.is_compiling():
            yield
            return
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                yield
                return
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._timed.append(Timed(layer, kernel, shape, start, end))
        else:
            before = time.perf_counter()
            yield
            self._timed.append(Timed(layer, kernel, shape, before, time.perf_counter()))

    def settle(self) -> None:
        """Read the times of what has been timed so far; waits for the GPU. Call it when a run is over."""
        self._read += [(t, t.seconds()) for t in self._timed]
        self._timed.clear()

    def layers(self) -> list[str]:
        """In the order in which the model calls them."""
        return list(self.rows)

    def cells(self, steps: int) -> list[list[str | None]]:
        """(layers, steps): the kernel that served most of a layer's work in a step, None where it had none."""
        out: list[list[str | None]] = []
        for layer in self.rows:
            found = (self._cells.get((layer, step)) for step in range(steps))
            out.append([None if not c else c.most_common(1)[0][0] for c in found])
        return out

    def seconds_by_kernel(self) -> dict[str, float]:
        """Seconds of attention by kernel, of what has been settled."""
        out: Counter[str] = Counter()
        for timed, seconds in self._read:
            out[timed.kernel] += seconds  # type: ignore[assignment]
        return dict(out)

    def seconds_by_layer(self) -> dict[str, float]:
        """Seconds of attention by layer, of what has been settled."""
        out: Counter[str] = Counter()
        for timed, seconds in self._read:
            out[timed.layer] += seconds  # type: ignore[assignment]
        return dict(out)

    def saved_seconds(self) -> float | None:
        """What the low-bit calls took less than exact calls of the same shape in this run; None where none was timed."""
        by_shape: defaultdict[tuple[Any, ...], tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for timed, seconds in self._read:
            by_shape[timed.shape][timed.kernel != "exact"].append(seconds)
        both = [(exact, low) for exact, low in by_shape.values() if exact and low]
        return sum(len(low) * fmean(exact) - sum(low) for exact, low in both) if both else None
