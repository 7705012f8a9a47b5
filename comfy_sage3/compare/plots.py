"""The two plots as PNG, light or dark: PSNR of every frame, attention error of every layer and step."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

INK = {"light": "#1c2330", "dark": "#e6e9ef"}
PAPER = {"light": "#ffffff", "dark": "#171b22"}
COLOURS = {"light": ("#0b62d6", "#767d88"), "dark": ("#6cb0ff", "#9aa3b0")}
CEILING = 100.0  # dB, where identical frames (infinite PSNR) are drawn


def psnr_plot(m: dict[str, Any], theme: str = "light") -> bytes:
    """PSNR of B against A per frame, next to the noise floor."""
    end = m["quality"]["end_to_end"]
    figure, axes = _figure(theme, (6.4, 3.2))
    series = (
        ("B against A", end["a_vs_b"], "-o", 3),
        ("noise floor (two exact runs)", end["noise_floor"], "--s", 2),
    )
    identical = False
    for (name, pair, style, order), colour in zip(series, COLOURS[theme], strict=True):
        values = [CEILING if v is None else min(v, CEILING) for v in pair["psnr_per_frame"]]
        identical |= None in pair["psnr_per_frame"]
        frames = range(1, len(values) + 1)
        axes.plot(frames, values, style, color=colour, label=name, markersize=4, linewidth=1.6, zorder=order)
    axes.set_xlabel("frame")
    axes.set_ylabel("PSNR (dB), higher is closer")
    axes.set_ylim(0, CEILING * 1.08)
    if identical:
        axes.axhline(CEILING, color=INK[theme], linewidth=0.5, linestyle=":")
        axes.text(1, CEILING * 1.015, "100 dB = identical", fontsize=8, color=INK[theme])
    axes.grid(alpha=0.2)
    legend = axes.legend(frameon=False, fontsize=9, loc="center right")
    for text in legend.get_texts():
        text.set_color(INK[theme])
    return _png(figure)


def error_plot(m: dict[str, Any], theme: str = "light") -> bytes | None:
    """Relative L1 error of B's attention per layer and step: a map each for self- and cross-attention."""
    if not m["quality"]["replay"]:
        return None
    rows = m["quality"]["replay"]["rows"]
    kinds = [kind for kind in ("self", "cross") if any(r["kind"] == kind for r in rows)]
    figure, panels = _figure(theme, (6.4, 3.2), len(kinds))
    for axes, kind in zip(np.atleast_1d(panels), kinds, strict=True):
        mine = [r for r in rows if r["kind"] == kind]
        layers, steps = sorted({r["layer"] for r in mine}), sorted({r["step"] for r in mine})
        grid = np.full((len(layers), len(steps)), np.nan)
        for r in mine:
            value = r["b"]["relative_l1"]
            grid[layers.index(r["layer"]), steps.index(r["step"])] = np.nan if value is None else value
        image = axes.imshow(grid, cmap="viridis", aspect="auto", vmin=0)
        kept = " (kept exact)" if "b" in m["quality"]["replay"]["kept_exact"][kind] else ""
        axes.set_title(f"{kind}-attention{kept}", color=INK[theme], fontsize=10)
        axes.set_xticks(range(len(steps)), [str(s + 1) for s in steps])
        axes.set_yticks(range(len(layers)), [str(x + 1) for x in layers])
        axes.set_xlabel("step")
        bar = figure.colorbar(image, ax=axes, format="%.2g")
        bar.ax.tick_params(colors=INK[theme], labelsize=8)
        bar.outline.set_visible(False)
    np.atleast_1d(panels)[0].set_ylabel("layer")
    figure.suptitle(f"Relative L1 error of B ({m['sides']['b']['precision']})", color=INK[theme], fontsize=10)
    return _png(figure)


def _figure(theme: str, size: tuple[float, float], panels: int = 1, rows: int = 1) -> tuple[Any, Any]:
    # The object interface with its own canvas: pyplot would choose a window system and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, facecolor=PAPER[theme], layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, panels)
    for ax in np.atleast_1d(axes).flat:
        ax.set_facecolor(PAPER[theme])
        ax.tick_params(colors=INK[theme], labelsize=8)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set_color(INK[theme])
            label.set_fontsize(9)
        for spine in ax.spines.values():
            spine.set_color(INK[theme])
            spine.set_alpha(0.4)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()
