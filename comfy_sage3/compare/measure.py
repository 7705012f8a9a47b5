"""The comparison itself: what is run, in which order, and what is computed from it.

``compare`` returns everything as plain data (for metrics.json, the terminal and the page) plus the videos. It
knows engines only through their protocol.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

from ..demo.score import adherence
from ..errors import EngineError, InputError
from ..metrics import SSIM_CONVENTION, flicker, motion_energy, psnr, ssim, worst_frame
from ..precision import Precision
from .engine import (
    EMULATED_NOTE,
    Engine,
    Generation,
    Inspection,
    OnStep,
    Request,
    Side,
    Where,
    fell_back,
    is_emulated,
    kept_exact,
)

SCHEMA = "comfy_sage3.compare"
SCHEMA_VERSION = 1
MAX_REPEATS = 20
ERRORS = ("cosine", "relative_l1", "rmse", "max_abs")
KINDS = ("self", "cross")

OnProgress = Callable[[float, str], None]
"""Called as ``on_progress(fraction done in [0, 1], what is being done)``; may raise to cancel."""


@dataclass
class Comparison:
    """metrics: plain data, ready for JSON. videos: uint8 (T, H, W, 3) of "a" and "b"."""

    metrics: dict[str, Any]
    videos: dict[str, np.ndarray]


class Progress:
    """Turns steps of many runs into one fraction. Decoding a video counts as ``DECODE`` steps, an inspection as two runs."""

    DECODE = 10
    INSPECT = 2

    def __init__(self, steps: int, repeats: int, exact_runs: int, tell: OnProgress) -> None:
        warm_up = 2 * min(steps, 2)
        self._steps = steps
        self._total = warm_up + steps * (2 * repeats + self.INSPECT + exact_runs) + self.DECODE * (2 + exact_runs)
        self._done = 0.0
        self._tell = tell
        self._doing = ""

    def begin(self, doing: str) -> None:
        """Name the work that follows."""
        self._doing = doing
        self.step(0)

    def step(self, count: float = 1) -> None:
        """``count`` steps of work are done."""
        self._done = min(self._done + count, self._total)
        self._tell(self._done / self._total, self._doing)

    def on_step(self, done: int, steps: int) -> None:
        """As an engine's ``on_step``."""
        self.step()

    def inspecting(self) -> OnStep:
        """As ``on_step`` of an inspection, which counts steps of its own."""
        before = self._done

        def on_step(done: int, steps: int) -> None:
            self.step(before + self.INSPECT * self._steps * done / steps - self._done)

        return on_step


def compare(
    engine: Engine,
    request: Request,
    a: Side,
    b: Side,
    *,
    repeats: int = 3,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Make the video with both sides and measure speed and quality.

    Both sides are warmed up, then run in turn (A B A B ...), ``repeats`` times each; each side's video is
    decoded once. Raises InputError for a request that cannot be served, EngineError when the engine fails.
    """
    if not 1 <= repeats <= MAX_REPEATS:
        raise InputError(f"The number of repeats is {repeats}: give 1 to {MAX_REPEATS}.")
    engine.check(request, (a, b))
    scene = request.scene
    exact_runs = 1 if Precision.EXACT in (a.precision, b.precision) else 2
    progress = Progress(request.steps, repeats, exact_runs, on_progress or (lambda fraction, doing: None))

    for side in (a, b):
        progress.begin(f"warming up {side.name}")
        engine.warm_up(request, side, progress.on_step)
    runs = interleaved(engine, request, (a, b), repeats, progress)
    last = {key: runs[key][-1] for key in ("a", "b")}
    for key, side in (("a", a), ("b", b)):
        _finish(engine, last[key], side.name, progress)

    progress.begin("replaying captured attention calls")
    inspected = progress.inspecting()
    inspection = engine.inspect(request, a, b, inspected)
    inspected(1, 1)  # also where the engine cannot

    floor = noise_floor(engine, request, a, b, last, progress)
    videos = {key: _video(run) for key, run in last.items()}
    progress.begin("measuring")
    metrics: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "request": request.data(videos["a"].shape),
        "environment": engine.describe(),
        "sides": {"a": side_data(a, runs["a"]), "b": side_data(b, runs["b"])},
    }
    emulated = any(metrics["sides"][key]["emulated"] for key in ("a", "b"))
    metrics["emulated"] = emulated
    metrics["note"] = EMULATED_NOTE if emulated else None
    metrics["timing"] = timing(runs, metrics["sides"], repeats)
    metrics["quality"] = {
        "noise_floor_method": engine.floor_method,
        "replay": replay_data(inspection, {"a": a, "b": b}),
        "one_step": one_step_data(inspection),
        "end_to_end": end_to_end(videos["a"], videos["b"], floor, lambda: progress.step(0)),
        "adherence": {
            key: adherence(as_signed(video), scene) if scene else {}
            for key, video in (*videos.items(), ("noise_floor", floor[1]))
        },
    }
    return Comparison(json_safe(metrics), videos)


def interleaved(
    engine: Engine, request: Request, sides: tuple[Side, Side], repeats: int, progress: Progress
) -> dict[str, list[Generation]]:
    """A B A B ...: a machine that warms up or slows down over time then does so for both alike."""
    runs: dict[str, list[Generation]] = {"a": [], "b": []}
    for i in range(repeats):
        for key, side in zip(("a", "b"), sides, strict=True):
            progress.begin(f"{side.name}, run {i + 1} of {repeats}")
            runs[key].append(engine.generate(request, side, progress.on_step))
    return runs


def noise_floor(
    engine: Engine, request: Request, a: Side, b: Side, last: dict[str, Generation], progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """The videos of exact attention computed two ways: how far apart two runs are that are both right."""

    def run(second_way: bool, name: str) -> np.ndarray:
        progress.begin(f"noise floor: {name}")
        generation = engine.exact(request, second_way, progress.on_step)
        _finish(engine, generation, name, progress)
        return _video(generation)

    exact_key = next((k for k, s in (("a", a), ("b", b)) if s.precision is Precision.EXACT), None)
    first = _video(last[exact_key]) if exact_key else run(False, "exact attention")
    return first, run(True, "exact attention a second way")


def _finish(engine: Engine, generation: Generation, name: str, progress: Progress) -> None:
    progress.begin(f"decoding the video of {name}")
    engine.finish(generation)
    progress.step(progress.DECODE)


def _video(generation: Generation) -> np.ndarray:
    if generation.video is None or generation.video.ndim != 4 or generation.video.dtype != np.uint8:
        raise EngineError("The engine returned no video: run the comparison again, and report this if it persists.")
    return generation.video


def as_signed(video: np.ndarray) -> torch.Tensor:
    """uint8 (T, H, W, 3) as float32 (3, T, H, W) in [-1, 1], the demo's own range."""
    return torch.from_numpy(video).permute(3, 0, 1, 2).float() / 127.5 - 1


def side_data(side: Side, runs: Sequence[Generation]) -> dict[str, Any]:
    """What a side wished for and what it got; the report is that of one run (they are all alike)."""
    report = runs[-1].report
    return {
        "label": side.label,
        "precision": side.wish,
        "emulation_allowed": side.emulate,
        "emulated": is_emulated(report),
        "fell_back": fell_back(report),
        "min_tokens": side.min_tokens,
        "calls": sum(line["calls"] for line in report),
        "kept_exact": kept_exact(report, side),
        "report": [dict(line) for line in report],
    }


def timing(runs: dict[str, list[Generation]], sides: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Times of both sides. A ratio is given only where both ran what they were asked to, on real kernels."""
    data: dict[str, Any] = {
        "repeats": repeats,
        "order": "AB" * repeats,
        "warm_up": "one short run of each side, not counted",
    }
    for key, generations in runs.items():
        last = generations[-1]
        data[key] = {
            "note": EMULATED_NOTE if sides[key]["emulated"] else None,
            "sampling_seconds": spread_of(g.seconds_total for g in generations),
            "step_seconds": spread_of(s for g in generations for s in g.seconds_per_step),
            "attention_seconds": spread_of(g.attention_seconds for g in generations),
            "decode_seconds": last.decode_seconds,
            "peak_memory_bytes": max((g.peak_memory_bytes or 0 for g in generations), default=0) or None,
            "build_seconds": last.build_seconds,
        }
    data["a_over_b"] = None
    if not any(sides[key]["emulated"] or sides[key]["fell_back"] for key in ("a", "b")):
        data["a_over_b"] = {
            name: data["a"][name]["median"] / data["b"][name]["median"]
            for name in ("sampling_seconds", "step_seconds", "attention_seconds")
            if data["a"][name] and data["b"][name] and data["b"][name]["median"] > 0
        }
    return data


def spread_of(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Median, quartiles, extremes and every value; None when nothing was measured."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    low, high = np.percentile(known, [25, 75])
    return {
        "median": statistics.median(known),
        "q1": float(low),
        "q3": float(high),
        "min": min(known),
        "max": max(known),
        "values": known,
    }


def replay_data(inspection: Inspection | None, sides: dict[str, Side]) -> dict[str, Any] | None:
    """Every replayed call, and per kind the mean (the worst for max_abs) over layers and steps.

    ``kept_exact`` names, per kind, the sides whose own plan kept every replayed call exact.
    """
    if inspection is None:
        return None
    return {
        "against": "exact fp32 attention on the same captured q, k, v of side A's run",
        "rows": inspection.replay,
        "summary": {kind: summarise([row for row in inspection.replay if row["kind"] == kind]) for kind in KINDS},
        "kept_exact": {
            kind: [key for key, side in sides.items() if _keeps_exact(side, kind, inspection.replay)] for kind in KINDS
        },
    }


def _keeps_exact(side: Side, kind: str, rows: Sequence[dict[str, Any]]) -> bool:
    def kept(row: dict[str, Any]) -> bool:
        where = Where(str(row["layer"]), row["sigma"]) if "sigma" in row else None
        return bool(side.choose(where, row["q_tokens"], row["k_tokens"])[1])

    mine = [row for row in rows if row["kind"] == kind]
    return bool(mine) and all(kept(row) for row in mine)


def one_step_data(inspection: Inspection | None) -> dict[str, Any] | None:
    """Every one-step comparison and its mean over steps."""
    if inspection is None:
        return None
    return {
        "against": "the guided velocity on the same x_t with exact attention computed the second way",
        "rows": inspection.one_step,
        "summary": summarise(inspection.one_step),
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per contestant: the mean of each error over the rows, and the largest max_abs."""
    result = {}
    for key in ("a", "b", "floor"):
        result[key] = {
            name: (max if name == "max_abs" else statistics.fmean)([row[key][name] for row in rows])
            for name in ERRORS
            if rows
        }
    return result


def end_to_end(
    a: np.ndarray, b: np.ndarray, floor: tuple[np.ndarray, np.ndarray], between: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The finished videos: A against B, next to exact against exact, and what moves in each.

    ``between`` is called between the parts, and may raise to cancel.
    """
    videos = {"a": a, "b": b, "noise_floor": floor[1]}
    found = {"a_vs_b": pair(a, b)}
    between()
    found["noise_floor"] = pair(*floor)
    between()
    return {
        "ssim_convention": SSIM_CONVENTION,
        **found,
        "motion_energy": {key: motion_energy(v) if len(v) > 1 else None for key, v in videos.items()},
        "flicker": {key: flicker(v) if len(v) > 2 else None for key, v in videos.items()},
    }


def pair(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Two videos: PSNR of the whole (all pixels of all frames pooled) and per frame, SSIM, worst frame.

    PSNR is in dB, infinite (null in JSON) where nothing differs.
    """
    if a.shape != b.shape:
        raise EngineError(f"The two videos differ in shape, {a.shape} and {b.shape}: compare the same size on both sides.")
    per_frame = [float(x) for x in psnr(a, b)]
    similarity = [float(x) for x in ssim(a, b)]
    worst = worst_frame(per_frame)
    error = statistics.fmean(0.0 if math.isinf(x) else 10 ** (-x / 10) for x in per_frame)
    return {
        "identical": bool(np.array_equal(a, b)),
        "psnr": math.inf if error == 0 else -10 * math.log10(error),
        "ssim": statistics.fmean(similarity),
        "psnr_per_frame": per_frame,
        "ssim_per_frame": similarity,
        "worst_frame": {"index": worst, "psnr": per_frame[worst], "ssim": similarity[worst]},
        "mean_abs_difference": float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean()),
    }


def json_safe(value: Any) -> Any:
    """``value`` with numpy and torch scalars as plain numbers and non-finite floats as None: strict JSON."""
    if isinstance(value, dict):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    if isinstance(value, (np.generic, torch.Tensor)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
