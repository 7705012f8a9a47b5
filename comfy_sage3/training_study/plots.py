"""A study's plots as PNG: loss against steps and seconds, and how far each form of attention is from exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..compare.plots import INK, _figure, _png
from ..study.plots import PALETTE
from .pace import median_ms
from .results import Group
from .seeds import interval
from .settings import EXACT, FORMS

THEME = "light"
STYLE = {form: (PALETTE[THEME][i], "-" if i != 1 else "--") for i, form in enumerate(FORMS)}
SMOOTH = 20  # parts that the training loss is averaged in


def loss_plot(found: Sequence[Group]) -> bytes | None:
    """Training loss (thin, means of a twentieth of the steps) and held-out loss (dots) against steps; a panel a setting."""
    return _panels(found, "steps", "loss", lambda group, axes: _curves(group, axes, {}))


def seconds_plot(found: Sequence[Group]) -> bytes | None:
    """The same against seconds: steps times the time that one takes alone on the machine."""
    timed = [g for g in found if all(form in g.paces for form in g.forms)]
    return _panels(
        timed, "seconds of training", "loss",
        lambda group, axes: _curves(group, axes, {f: median_ms(group.paces[f]) / 1000 for f in group.forms}),
    )  # fmt: skip


def difference_plot(found: Sequence[Group]) -> bytes | None:
    """Held-out loss less that of exact attention at the same seed; the grey band is what seeds do to exact attention."""
    compared = [g for g in found if g.runs.get(EXACT) and len(g.forms) > 1]
    return _panels(compared, "steps", "held-out loss − exact", _differences)


def _panels(found: Sequence[Group], x: str, y: str, draw: Callable[[Group, Any], list[tuple[Any, str]]]) -> bytes | None:
    """A panel a setting, two in a row, each with its own legend."""
    shown = [g for g in found if g.runs and g.steps]
    if not shown:
        return None
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure, grid = _figure(THEME, (4.6 * columns + 0.4, 0.3 + 3.1 * rows), columns, rows)
    panels = list(np.atleast_1d(grid).flat)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes, group in zip(panels, shown, strict=False):
        drawn = draw(group, axes)
        norm = "" if group.setting.qk_norm else ", no QK norm"
        axes.set_title(
            f"{group.setting.title.removesuffix(', no QK norm')}{norm}\n{group.setting.tokens:,} tokens a step",
            fontsize=9, color=INK[THEME],
        )  # fmt: skip
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.2)
        legend = axes.legend(*zip(*drawn, strict=True), frameon=False, fontsize=7.5) if drawn else None
        for text in legend.get_texts() if legend else ():
            text.set_color(INK[THEME])
    return _png(figure)


def _curves(group: Group, axes: Any, scale: dict[str, float]) -> list[tuple[Any, str]]:
    """Means over seeds; the band is from the lowest seed to the highest."""
    drawn = []
    for form in group.forms:
        colour, style = STYLE[form]
        factor = scale.get(form, 1.0)
        trained = [_averaged(run["losses"], group.steps) for run in group.runs[form].values()]
        places = (np.arange(SMOOTH) + 0.5) * group.steps / SMOOTH
        if group.steps >= 2 * SMOOTH:
            axes.plot(places * factor, _mean(np.array(trained)), style, color=colour, linewidth=0.8, alpha=0.6)
        steps, table = _looks(group, form)
        width = 4.0 if form == EXACT else 1.3  # so that it shows under what lies upon it
        (line,) = axes.plot(steps * factor, _mean(table), style, color=colour, marker="o", markersize=3, linewidth=width)
        line.set_alpha(0.5 if form == EXACT else 1.0)
        low, high = _range(table)
        axes.fill_between(steps * factor, low, high, color=colour, alpha=0.15, linewidth=0)
        drawn.append((line, _label(group, form)))
    top, bottom = _limits(group)
    if bottom < top:
        axes.set_ylim(bottom, top)
    return drawn


def _differences(group: Group, axes: Any) -> list[tuple[Any, str]]:
    steps, exact = _looks(group, EXACT)
    seeds = list(group.runs[EXACT])
    drawn: list[tuple[Any, str]] = []
    if len(seeds) > 1:
        spread = np.nanstd(exact, 0, ddof=1)
        band = axes.fill_between(steps, -spread, spread, color="#888888", alpha=0.22, linewidth=0)
        drawn.append((band, "one standard deviation of exact's seeds"))
    axes.axhline(0, color=INK[THEME], linewidth=0.8)
    for i, form in enumerate(f for f in group.forms if f != EXACT):
        at, table = _looks(group, form)
        both = [(list(group.runs[form]).index(s), seeds.index(s)) for s in seeds if s in group.runs[form]]
        if not both or len(at) != len(steps):
            continue
        gap = np.array([table[mine] - exact[other] for mine, other in both])
        values = [interval(column[np.isfinite(column)]) if np.isfinite(column).any() else (np.nan,) * 3 for column in gap.T]
        mean, low, high = np.array(values).T
        colour, style = STYLE[form]
        bars = np.where(np.isfinite(high), high - mean, 0.0)
        shifted = steps + (i - 1) * group.steps * 0.008  # so that bars do not hide each other
        made = axes.errorbar(
            shifted, mean, yerr=bars, fmt=style, color=colour, marker="o", markersize=3, linewidth=1.3, elinewidth=0.8,
            capsize=1.5,
        )  # fmt: skip
        drawn.append((made, _label(group, form)))
    return drawn


def _looks(group: Group, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and held-out losses (seeds, steps); NaN where a run had ended."""
    runs = list(group.runs[form].values())
    steps = sorted({look["step"] for run in runs for look in run["held_out"]})
    table = np.full((len(runs), len(steps)), np.nan)
    for i, run in enumerate(runs):
        for look in run["held_out"]:
            if look["loss"] is not None:
                table[i, steps.index(look["step"])] = look["loss"]
    return np.array(steps), table


def _averaged(losses: Sequence[float | None], steps: int) -> np.ndarray:
    padded = np.full(steps, np.nan)
    padded[: len(losses)] = [np.nan if v is None else v for v in losses]
    return np.array([_mean(part[:, None])[0] if len(part) else np.nan for part in np.array_split(padded, SMOOTH)])


def _mean(table: np.ndarray) -> np.ndarray:
    """Over the first axis, of what is there; NaN where nothing is."""
    there = np.isfinite(table)
    return np.where(there, table, 0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)


def _range(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = np.isfinite(table)
    low, high = np.where(there, table, np.inf).min(0), np.where(there, table, -np.inf).max(0)
    return np.where(there.any(0), low, np.nan), np.where(there.any(0), high, np.nan)


def _limits(group: Group) -> tuple[float, float]:
    """The range of the held-out losses after the first look, from which a fresh model falls steeply."""
    later = [look["loss"] for runs in group.runs.values() for run in runs.values() for look in run["held_out"][1:]]
    known = [v for v in later if v is not None]
    if not known:
        return 0.0, 0.0
    margin = 0.15 * (max(known) - min(known)) or 0.05 * abs(max(known)) or 1.0
    return max(known) + margin, min(known) - margin


def _label(group: Group, form: str) -> str:
    count = len(group.runs[form])
    return f"{form} ({count} seed{'s' if count > 1 else ''})"
