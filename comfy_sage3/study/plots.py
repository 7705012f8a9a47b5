"""A sweep's plots as PNG, light or dark: boxes per contestant, error by layer and step, quality against speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..compare.plots import COLOURS, INK, _figure, _png
from .store import DONE, Store

MARKERS = "osD^vP*X"
PALETTE = {
    "light": ("#0b62d6", "#c2570c", "#12805c", "#8e3bb0", "#a83250", "#5b6b00", "#006f86", "#6b4e2e"),
    "dark": ("#6cb0ff", "#ffa05c", "#5fd3a6", "#d39bf0", "#ff8fa8", "#c6d65a", "#5cd0e6", "#d0b08a"),
}
FAR = 5  # times below every cell: from there a noise floor is written, not drawn
BOXES = (  # column, its noise floor, title, whether the axis is logarithmic
    ("psnr", "floor_psnr", "PSNR against exact (dB)\nhigher is closer", False),
    ("ssim", "floor_ssim", "SSIM against exact\nhigher is closer", False),
    ("self_relative_l1", "floor_relative_l1", "attention error (relative L1)\nlower is closer", True),
    ("step_relative_l1", "floor_step_relative_l1", "error of one step (relative L1)\nlower is closer", True),
)


def box_plots(found: dict[str, Any], theme: str = "light") -> bytes | None:
    """Every cell a point, every contestant a box, the noise floor a line; None where no cell is done."""
    names = [s["contestant"] for s in found["summary"] if s["done"]]
    done = [r for r in found["rows"] if r["state"] == DONE]
    shown = [box for box in BOXES if any(r[box[0]] is not None for r in done)]
    if not shown:
        return None
    figure, panels = _panels(theme, len(shown), 2.6)
    for axes, (column, floor, title, log) in zip(panels, shown, strict=True):
        values = [[r[column] for r in done if r["contestant"] == name and r[column] is not None] for name in names]
        for i, (mine, colour) in enumerate(zip(values, colours(len(names), theme), strict=True)):
            if not mine:
                continue
            line = {"color": colour, "linewidth": 1.4}
            box = axes.boxplot(
                [mine], positions=[i], widths=0.5, showfliers=False, patch_artist=True, boxprops={**line},
                medianprops={**line, "linewidth": 2.4}, whiskerprops=line, capprops=line,
            )  # fmt: skip
            box["boxes"][0].set_facecolor((*_rgb(colour), 0.18))
            places = i + np.linspace(-0.12, 0.12, len(mine)) if len(mine) > 1 else [i]
            axes.plot(places, mine, "o", color=colour, markersize=3, alpha=0.75, zorder=3)
        floors = [r[floor] for r in done if r[floor] is not None]
        lowest = min((v for mine in values for v in mine), default=0.0)
        if floors and log and float(np.median(floors)) < lowest / FAR:  # drawn in, it would press the boxes flat
            said = f"noise floor {float(np.median(floors)):.1g}: far below"
            axes.text(0.02, 0.02, said, transform=axes.transAxes, fontsize=7.5, color=COLOURS[theme][1])
        elif floors:
            axes.axhline(float(np.median(floors)), color=COLOURS[theme][1], linestyle="--", linewidth=1.2, zorder=1)
        if log and lowest > 0:
            axes.set_yscale("log")
            axes.margins(y=0.25)
            for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                ticks(_sparse(axes))
        axes.set_xticks(range(len(names)), [short(name) for name in names], rotation=0 if len(names) < 4 else 30)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_title(title, fontsize=9, color=INK[theme])
        axes.tick_params(which="both", colors=INK[theme], labelsize=8)
        axes.grid(axis="y", alpha=0.2)
    return _png(figure)


def heat_maps(store: Store, theme: str = "light") -> bytes | None:
    """Relative L1 of self-attention by layer and step, the mean over prompts and seeds, a map a contestant on one scale."""
    maps = [(name, *grid) for name, grid in error_grids(store).items()]
    if not maps:
        return None
    figure, panels = _panels(theme, len(maps), 2.3)
    top = max(float(np.nanmax(grid)) for _, grid, _, _ in maps if not np.isnan(grid).all()) if maps else 1.0
    image = None
    for axes, (name, grid, layers, steps) in zip(panels, maps, strict=True):
        image = axes.imshow(grid, cmap="viridis", aspect="auto", vmin=0, vmax=top or 1.0)
        axes.set_title(short(name, 28), color=INK[theme], fontsize=10)
        axes.set_xticks(*_ticks(steps))
        axes.set_yticks(*_ticks(layers))
        axes.set_xlabel("step")
        axes.set_ylabel("layer")
    bar = figure.colorbar(image, ax=panels, format="%.2g", label="relative L1")
    bar.ax.tick_params(colors=INK[theme], labelsize=8)
    bar.ax.yaxis.label.set_color(INK[theme])
    bar.ax.yaxis.label.set_fontsize(9)
    bar.outline.set_visible(False)
    return _png(figure)


def error_grids(store: Store) -> dict[str, tuple[np.ndarray, list[int], list[int]]]:
    """Per contestant: mean relative L1 of self-attention (layers, steps), with the layers and steps; those measured only."""
    sums: dict[str, dict[tuple[int, int], list[float]]] = {}
    for cell in store.sweep.cells():
        metrics = store.metrics(cell)
        if metrics is None or not metrics["quality"]["replay"]:
            continue
        for row in metrics["quality"]["replay"]["rows"]:
            if row["kind"] == "self" and row["b"]["relative_l1"] is not None:
                mine = sums.setdefault(cell.contestant.name, {})
                mine.setdefault((row["layer"], row["step"]), []).append(row["b"]["relative_l1"])
    found = {}
    for name, places in sums.items():
        layers, steps = sorted({layer for layer, _ in places}), sorted({step for _, step in places})
        grid = np.full((len(layers), len(steps)), np.nan)
        for (layer, step), values in places.items():
            grid[layers.index(layer), steps.index(step)] = float(np.mean(values))
        found[name] = (grid, layers, steps)
    return found


def _sparse(axes: Any) -> Any:
    """Labels at 1, 2 and 5 of every decade; at all of them where the axis spans less than half a decade."""

    def label(value: float, _: Any) -> str:
        text, (low, high) = f"{value:.1g}", axes.get_ylim()
        return text if high < 3 * low or text.strip("0.")[:1] in ("1", "2", "5") else ""

    return label


def pareto_plot(found: dict[str, Any], theme: str = "light") -> bytes | None:
    """Quality against speed-up, the Pareto front drawn through the medians; None unless something ran on real kernels.

    Emulated contestants and those that fell back have no speed, and no place on this axis.
    """
    points = speed_points(found)
    if not points:
        return None
    figure, axes = _figure(theme, (6.4, 3.9))
    names = [s["contestant"] for s in found["summary"]]
    tints = dict(zip(names, colours(len(names), theme), strict=True))
    grey = COLOURS[theme][1]
    front = pareto_front([(x, y) for _, x, y in points])
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=grey, linewidth=1.4, linestyle="-", zorder=1, label="Pareto front")
    for name, x, y in points:
        mine = [r for r in found["rows"] if r["contestant"] == name and r["state"] == DONE and r["speedup"]]
        near = [(r["speedup"], r["psnr"]) for r in mine if r["psnr"] is not None]
        axes.plot(*zip(*near, strict=True), "o", color=tints[name], markersize=4, alpha=0.4, linestyle="none", zorder=2)
        marker = MARKERS[names.index(name) % len(MARKERS)]
        best = (x, y) in front
        axes.plot([x], [y], marker, color=tints[name], markersize=11, zorder=3, markeredgecolor=INK[theme],
                  markeredgewidth=1.2 if best else 0, linestyle="none", label=short(name, 24))  # fmt: skip
    floors = [r["floor_psnr"] for r in found["rows"] if r["floor_psnr"] is not None]
    if floors:
        axes.axhline(float(np.median(floors)), color=grey, linestyle="--", linewidth=1.2, label="noise floor", zorder=1)
    axes.axvline(1.0, color=grey, linestyle=":", linewidth=1.2, label="exact attention's speed", zorder=1)
    axes.set_xlabel("sampling: times as fast as exact attention")
    axes.set_ylabel("PSNR against exact (dB)")
    axes.margins(0.12)
    axes.grid(alpha=0.2)
    legend = figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_color(INK[theme])
    return _png(figure)


def speed_points(found: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(contestant, median speed-up, median PSNR) of those with a speed and a difference to exact."""
    return [
        (s["contestant"], s["speedup"]["median"], s["psnr"]["median"])
        for s in found["summary"]
        if s["speedup"] and s["psnr"]
    ]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points that no other beats: as good in both and better in one, where more is better; from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _panels(theme: str, count: int, height: float) -> tuple[Any, list[Any]]:
    """A figure with ``count`` panels, two in a row, ``height`` inches each."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure, axes = _figure(theme, (6.4, 0.4 + height * rows), columns, rows)
    panels = list(np.atleast_1d(axes).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def colours(count: int, theme: str) -> list[str]:
    """A colour a contestant, in the sweep's order."""
    return [PALETTE[theme][i % len(PALETTE[theme])] for i in range(count)]


def short(name: str, most: int = 14) -> str:
    """A name that fits under a box."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _ticks(values: Sequence[int]) -> tuple[list[int], list[str]]:
    """At most ten ticks, numbered from 1 as people do."""
    every = max(1, -(-len(values) // 10))
    return list(range(0, len(values), every)), [str(v + 1) for v in values[::every]]


def benchmark_plot(result: dict[str, Any], theme: str = "light") -> bytes | None:
    """One result of the attention benchmark: times the speed of PyTorch's SDPA (cuDNN), a group of bars a shape."""
    from .recorded import BASELINE, shapes_of, whole_calls

    peers = {peer: label for peer, label in whole_calls(result).items() if peer != BASELINE}
    by = {(row["shape"], row["peer"]): row["ratio"] for row in result["rows"] if row["ratio"] is not None}
    shapes = [shape for shape in shapes_of(result) if any((shape, peer) in by for peer in peers)]
    if not shapes:
        return None
    figure, axes = _figure(theme, (7.2, 1.2 + 0.1 * len(shapes) * (len(peers) + 1.5)))
    thick = 0.86 / len(peers)
    for i, (peer, label) in enumerate(peers.items()):
        places = [n - 0.43 + (i + 0.5) * thick for n, shape in enumerate(shapes) if (shape, peer) in by]
        values = [by[shape, peer] for shape in shapes if (shape, peer) in by]
        axes.barh(places, values, thick * 0.92, color=PALETTE[theme][i % 8], label=label)
    axes.axvline(1.0, color=INK[theme], linewidth=1.2, label="SDPA cuDNN")
    axes.set_yticks(range(len(shapes)), shapes)
    axes.set_ylim(len(shapes) - 0.4, -0.6)
    axes.set_xlabel("times as fast as SDPA cuDNN, quantisation included")
    axes.set_title(f"Attention on {result['device']}", fontsize=10, color=INK[theme])
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    legend = figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_color(INK[theme])
    return _png(figure)
