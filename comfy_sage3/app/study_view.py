"""A sweep's results as the page shows them: blocks of words and tables, plots, and files to take away."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..compare.engine import EMULATED_NOTE
from ..study import plots
from ..study.report import CSV, JSON, REPORT, cell_lines, count_of, numbers, verdict, write_report
from ..study.results import cells, results
from ..study.store import BROKEN, DONE, Store
from .words import Block

MOST_LINES = 100  # of the table of cells; the files have all
HEADS = ["", "cells", "PSNR", "noise floor", "SSIM", "attention error", "followed", "speed-up"]
CELL_HEADS = ["prompt", "seed", "contestant", "PSNR", "SSIM", "attention error", "followed", "sampling", "speed-up"]


def summary(found: dict[str, Any]) -> list[Block]:
    """What stands above the plots."""
    s = found["sweep"]
    chips = [count_of(len(s["prompts"]), "prompt"), count_of(len(s["seeds"]), "seed"), s["size"]]
    chips += [count_of(s["steps"], "step"), *found["devices"]]
    blocks: list[Block] = [{"kind": "verdict", "text": s["name"] or verdict(found)}]
    if s["name"]:
        blocks.append({"kind": "text", "text": verdict(found) + "."})
    blocks.append({"kind": "text", "text": numbers(found)})
    if found["note"]:
        blocks.append({"kind": "banner", "text": EMULATED_NOTE[0].upper() + EMULATED_NOTE[1:]})
    blocks.append({"kind": "chips", "items": chips})
    rows = [list(cells(one)) for one in found["summary"]]
    return [*blocks, {"kind": "table", "title": "Against exact attention, medians", "heads": HEADS, "rows": rows}]


def details(found: dict[str, Any]) -> list[Block]:
    """What stands below the plots: every cell, and what failed."""
    lines = [list(line) for line in cell_lines(found)]
    blocks: list[Block] = []
    failed = [f"{r['contestant']}, seed {r['seed']}: {r['reason']}" for r in found["rows"] if r["state"] == BROKEN]
    if failed:
        blocks += [{"kind": "heading", "text": "What failed"}, {"kind": "list", "items": failed}]
    if lines:
        table: Block = {"kind": "table", "title": "", "heads": CELL_HEADS, "rows": lines[:MOST_LINES]}
        more = f" (the first {MOST_LINES}; the files have all)" if len(lines) > MOST_LINES else ""
        blocks.append({"kind": "more", "text": f"Every cell{more}", "blocks": [table]})
    return blocks


def pictures(store: Store, found: dict[str, Any]) -> list[dict[str, str]]:
    """Box plots, heat map, and quality against speed where there is a speed, in both themes."""
    shown = [
        picture(plots.box_plots, found, "Every cell a point; dashed: the noise floor, two exact runs"),
        picture(plots.heat_maps, store, "Attention error by layer and step, the mean of all prompts and seeds"),
        picture(plots.pareto_plot, found, "Quality against speed; ringed and joined: the Pareto front"),
    ]
    return [one for one in shown if one]


def picture(draw: Callable[..., bytes | None], of: Any, caption: str) -> dict[str, str] | None:
    """A plot as plots.js takes it; None where there is nothing to draw."""
    light, dark = draw(of), draw(of, "dark")
    return {"caption": caption, "light": _uri(light), "dark": _uri(dark)} if light and dark else None


def files(store: Store) -> list[str]:
    """Copies of results.csv, results.json and report.html in the app's private folder: the out folder is never served."""
    write_report(store)
    base = os.environ.get("GRADIO_TEMP_DIR") or None
    folder = Path(tempfile.mkdtemp(prefix="study-", dir=base))
    copied = []
    for name in (CSV, JSON, REPORT):
        target = folder / f"{store.out.name}-{name}"
        target.write_bytes((store.out / name).read_bytes())
        copied.append(str(target))
    return copied


def found_in(store: Store) -> tuple[dict[str, Any], bool]:
    """The results so far, and whether any cell is done."""
    found = results(store)
    return found, found["states"][DONE] > 0


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
