"""What the kernels must show and what they aim at, as data, and the verdict on a run.

All speeds are ratios to another peer of the same run, since absolute figures drift.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Metric = Literal["speed", "relative_l1", "bandwidth"]


@dataclass(frozen=True)
class Bar:
    """One promise. ``against`` names the peer (or "copy") that the figure is divided by; None: an absolute figure."""

    shape: str
    peer: str
    metric: Metric
    must: float
    aim: float | None
    against: str | None = None
    kind: str = "normal"  # of the inputs, where the metric is an error

    @property
    def text(self) -> str:
        """What is promised, for a person."""
        if self.metric == "relative_l1":
            against = f" / {self.against}'s" if self.against else ""
            return f"{self.shape} {self.peer}: relative L1, {self.kind} inputs{against}"
        return f"{self.shape} {self.peer}: {self.metric} / {self.against}"

    @property
    def sign(self) -> str:
        """Errors must stay below, everything else above."""
        return "<=" if self.metric == "relative_l1" else ">="

    def reached(self, value: float) -> str:
        """ "aim", "must" or "missed"."""
        holds = operator.le if self.sign == "<=" else operator.ge
        if self.aim is not None and holds(value, self.aim):
            return "aim"
        return "must" if holds(value, self.must) else "missed"


BARS: tuple[Bar, ...] = (
    Bar("hd128-8192", "sm90-kernel", "speed", 1.6, 2.0, "cudnn"),
    Bar("hd128-8192", "sm90", "speed", 1.4, 1.75, "cudnn"),
    Bar("hd128-2048", "sm90", "speed", 0.9, 1.3, "cudnn"),
    Bar("hd128-32768", "sm90", "speed", 1.5, 1.9, "cudnn"),
    Bar("hd128-8192-causal", "sm90-kernel", "speed", 1.5, 1.8, "cudnn"),
    Bar("hd64-8192", "sm90-kernel", "speed", 1.4, 1.9, "cudnn"),
    Bar("hd64-8192", "sm90", "speed", 1.2, 1.6, "cudnn"),
    Bar("hd128-8192", "sm90-fast-kernel", "speed", 1.6, 2.0, "cudnn"),
    Bar("hd128-8192", "sm90-fast", "speed", 1.4, 1.75, "cudnn"),
    Bar("hd128-2048", "sm90-fast", "speed", 0.9, 1.3, "cudnn"),
    Bar("hd128-32768", "sm90-fast", "speed", 1.5, 1.9, "cudnn"),
    Bar("hd128-8192-causal", "sm90-fast-kernel", "speed", 1.5, 1.8, "cudnn"),
    Bar("hd64-8192", "sm90-fast-kernel", "speed", 1.4, 1.9, "cudnn"),
    Bar("hd64-8192", "sm90-fast", "speed", 1.2, 1.6, "cudnn"),
    Bar("hd128-8192", "sm90-fast", "relative_l1", 0.040, 0.035),
    Bar("hd128-8192", "sm90", "relative_l1", 0.020, 0.016),
    Bar("hd128-8192", "sm90", "relative_l1", 1.0, None, "comfy-kitchen", "offsets"),
    Bar("hd128-8192", "sm90", "relative_l1", 1.0, None, "comfy-kitchen", "kv-offsets"),
    Bar("hd128-8192", "sm90-mask", "speed", 0.8, None, "sm90-kernel"),
    Bar("hd128-8192", "quantise", "bandwidth", 0.7, None, "copy"),
    Bar("hd128-8192", "mma", "speed", 1.15, None, "comfy-kitchen"),
    Bar("hd64-8192", "mma", "speed", 1.15, None, "comfy-kitchen"),
    Bar("hd128-8192", "mma", "relative_l1", 0.020, 0.016),
)

OF_GRADIENTS: tuple[Bar, ...] = (
    Bar("hd128-8192", "sm90-backward", "speed", 1.0, 1.35, "cudnn-backward"),
    Bar("hd128-8192-causal", "sm90-backward", "speed", 1.0, 1.25, "cudnn-backward"),
    Bar("hd64-8192", "sm90-backward", "speed", 0.95, 1.2, "cudnn-backward"),
    Bar("hd128-8192", "sm90-both", "speed", 1.15, 1.45, "cudnn-both"),
    Bar("hd128-8192", "int8-triton-backward", "speed", 1.0, None, "fa2-backward"),
)


def verdicts(result: dict[str, Any], bars: Sequence[Bar] | None = None) -> list[dict[str, Any]]:
    """Each bar with what this run says of it: ``value`` and ``verdict``, or "not measured" and ``why``.

    Without ``bars``: all, those of gradients where there are any.
    """
    if bars is None:
        bars = BARS + (OF_GRADIENTS if any(p["direction"] != "forward" for p in result["peers"]) else ())
    rows = {(r["shape"], r["peer"]): r for r in result["rows"]}
    absent = {p["name"]: p["absent"] for p in result["peers"]}
    found = []
    for bar in bars:
        value, why = _value(bar, rows, absent, result.get("copy_gb_per_s"))
        verdict = "not measured" if value is None else bar.reached(value)
        said = {"text": bar.text, "sign": bar.sign, "value": value, "verdict": verdict, "why": why}
        found.append(asdict(bar) | said)
    return found


def _value(
    bar: Bar, rows: dict[tuple[str, str], dict[str, Any]], absent: dict[str, str | None], copy: float | None
) -> tuple[float | None, str | None]:
    figures = []
    for name in (bar.peer, bar.against):
        if name is None:
            continue
        if name == "copy":
            figure, why = copy, "the copy was not timed"
        elif (row := rows.get((bar.shape, name))) is None:
            figure, why = None, absent.get(name, "not among the peers of this run") or "this shape was not run"
        else:
            figure, why = _figure(bar, row), row.get("missing") or "it has no such figure"
        if figure is None:
            return None, f"{name}: {why}"
        figures.append(figure)
    if len(figures) == 1:
        return figures[0], None
    if figures[1] == 0:
        return None, f"{bar.against}: its figure is 0"
    return figures[0] / figures[1], None


def _figure(bar: Bar, row: dict[str, Any]) -> float | None:
    if bar.metric == "relative_l1":
        return (row.get("error") or {}).get(bar.kind, {}).get("relative_l1")
    if bar.metric == "bandwidth":
        return row.get("gb_per_s")
    return 1 / row["ms"]["median"] if row.get("ms") else None
