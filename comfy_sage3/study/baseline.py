"""The exact side of one prompt and seed, made once per sweep and met by every contestant.

Nothing is measured here that ``compare.measure`` does not measure: an engine is handed to it whose exact runs are
remembered instead of made again. What that costs is said in the results: exact runs then do not alternate with the
contestant's, so a machine that slows down over hours shows in their ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..compare.engine import Engine, Generation, Inspection, OnPreview, OnStep, Request, Side
from ..compare.measure import Comparison, OnProgress, Progress, compare
from ..errors import EngineError
from ..precision import Precision
from .sweep import Cell, Sweep


@dataclass
class Baseline:
    """runs: timed exact runs, without videos. video, second: uint8 (T, H, W, 3), exact attention done two ways."""

    runs: list[Generation]
    video: np.ndarray
    second: np.ndarray
    environment: dict[str, str]


class WithBaseline:
    """``engine``, whose exact runs of one request were made before. Everything else is the engine's own."""

    def __init__(self, engine: Engine, baseline: Baseline) -> None:
        self.name, self.floor_method = engine.name, engine.floor_method
        self.on_preview: OnPreview | None = None  # a sweep shows none
        self._engine, self._baseline, self._next = engine, baseline, 0

    def describe(self) -> dict[str, str]:
        return self._engine.describe()

    def check(self, request: Request, sides: Sequence[Side]) -> None:
        self._engine.check(request, sides)

    def warm_up(self, request: Request, side: Side, on_step: OnStep) -> None:
        if side.precision is not Precision.EXACT:
            self._engine.warm_up(request, side, on_step)

    def generate(self, request: Request, side: Side, on_step: OnStep) -> Generation:
        if side.precision is not Precision.EXACT:
            return self._engine.generate(request, side, on_step)
        run = self._baseline.runs[self._next % len(self._baseline.runs)]
        self._next += 1
        return self._remembered(run, self._baseline.video, request, on_step)

    def exact(self, request: Request, second_way: bool, on_step: OnStep) -> Generation:
        video = self._baseline.second if second_way else self._baseline.video
        return self._remembered(self._baseline.runs[-1], video, request, on_step)

    def finish(self, generation: Generation) -> None:
        if generation.video is None:
            self._engine.finish(generation)

    def inspect(self, request: Request, a: Side, b: Side, on_step: OnStep) -> Inspection | None:
        return self._engine.inspect(request, a, b, on_step)

    def close(self) -> None:
        """Nothing: the engine belongs to whoever opened it."""

    def _remembered(self, run: Generation, video: np.ndarray, request: Request, on_step: OnStep) -> Generation:
        for i in range(request.steps):
            on_step(i + 1, request.steps)
        return replace(run, video=video, report=[*run.report])


def exact_side(engine: Engine, sweep: Sweep, cell: Cell, on_progress: OnProgress) -> Baseline:
    """What ``compare`` does for its exact side: warm up, run ``repeats`` times, once more a second way, decode."""
    request = sweep.request(cell.prompt, cell.seed)
    a, b = sweep.sides(cell.contestant)
    engine.check(request, (a, b))
    progress = Progress(request.steps, 1, sweep.repeats, on_progress)
    progress.begin("warming up exact attention")
    engine.warm_up(request, a, progress.on_step)
    runs = []
    for i in range(sweep.repeats):
        progress.begin(f"exact attention, run {i + 1} of {sweep.repeats}")
        runs.append(engine.generate(request, a, progress.on_step))
    progress.begin("exact attention a second way")
    second = engine.exact(request, True, progress.on_step)
    progress.begin("decoding")
    videos = []
    for generation in (runs[-1], second):
        engine.finish(generation)
        if generation.video is None:
            raise EngineError("The engine returned no video: run the sweep again, and report this if it persists.")
        videos.append(generation.video)
        progress.step(progress.DECODE)
    kept = [replace(run, video=None, handle=None) for run in runs]
    return Baseline(kept, videos[0], videos[1], engine.describe())


def compare_cell(
    engine: Engine, sweep: Sweep, cell: Cell, baseline: Baseline, on_progress: OnProgress | None = None
) -> Comparison:
    """The cell's comparison, its exact side taken from ``baseline``; metrics say so under ``timing`` and ``sweep``."""
    request, sides = sweep.request(cell.prompt, cell.seed), sweep.sides(cell.contestant)
    done = compare(WithBaseline(engine, baseline), request, *sides, repeats=sweep.repeats, on_progress=on_progress)
    done.metrics["timing"]["order"] = "A" * sweep.repeats + "B" * sweep.repeats
    done.metrics["timing"]["warm_up"] = "A once for all cells of this prompt and seed; a short run first, not counted"
    done.metrics["sweep"] = {"cell": cell.id, "exact": cell.exact, "contestant": cell.contestant.name}
    done.metrics["sweep"]["exact_environment"] = dict(baseline.environment)
    return done


def to_data(baseline: Baseline) -> dict[str, Any]:
    """All but the videos, ready for JSON."""
    names = ("seconds_total", "seconds_per_step", "attention_seconds", "peak_memory_bytes", "build_seconds")
    runs = [
        {name: getattr(run, name) for name in (*names, "decode_seconds")} | {"report": [dict(x) for x in run.report]}
        for run in baseline.runs
    ]
    return {"runs": runs, "environment": baseline.environment}


def from_data(data: dict[str, Any], video: np.ndarray, second: np.ndarray) -> Baseline:
    """What ``to_data`` gave. Raises ValueError, KeyError or TypeError for anything else."""
    for frames in (video, second):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError("not a video")
    runs = [Generation(**run) for run in data["runs"]]
    if not runs or not all(isinstance(r.seconds_total, (int, float)) for r in runs):
        raise ValueError("no runs")
    return Baseline(runs, video, second, {str(k): str(v) for k, v in data["environment"].items()})
