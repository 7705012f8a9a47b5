"""A sweep's results as one table: a row a cell, a summary a contestant, and both as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from typing import Any

from ..compare.engine import EMULATED_NOTE
from ..compare.measure import json_safe
from ..compare.tables import adherence_counts
from .store import BROKEN, DONE, WAITING, Store

SCHEMA = "comfy_sage3.sweep.results"
SCHEMA_VERSION = 1
COLUMNS = (
    *("cell", "contestant", "seed", "prompt", "state", "reason", "emulated", "fell_back", "calls", "kept_exact"),
    *("identical", "psnr", "ssim", "worst_psnr", "floor_psnr", "floor_ssim"),
    *("self_relative_l1", "cross_relative_l1", "floor_relative_l1", "step_relative_l1", "floor_step_relative_l1"),
    *("motion_exact", "motion", "flicker_exact", "flicker", "followed_exact", "followed", "details"),
    *("seconds_exact", "seconds", "attention_seconds_exact", "attention_seconds", "memory_bytes"),
    *("speedup", "attention_speedup", "device"),
)
"""Of a row, and of the CSV. Seconds are medians of the runs; a speed-up is None unless both sides ran on real kernels."""


def results(store: Store) -> dict[str, Any]:
    """Everything the sweep has found so far, as plain data ready for JSON."""
    rows = rows_of(store)
    names = [c.name for c in store.sweep.contestants]
    return json_safe(
        {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "created": store.created,
            "sweep": {key: value for key, value in store.sweep.to_data().items() if key != "plans"}
            | {"plans": [c.plan_name for c in store.sweep.contestants if c.plan_name]},
            "note": EMULATED_NOTE if any(r["emulated"] for r in rows) else None,
            "states": {state: sum(r["state"] == state for r in rows) for state in (DONE, BROKEN, WAITING)},
            "devices": sorted({r["device"] for r in rows if r["device"]}),
            "summary": [summary(name, [r for r in rows if r["contestant"] == name]) for name in names],
            "rows": rows,
        }
    )


def rows_of(store: Store) -> list[dict[str, Any]]:
    """One row a cell, in the sweep's order; what a cell does not have is None."""
    rows = []
    for cell in store.sweep.cells():
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {"cell": cell.id, "contestant": cell.contestant.name, "seed": cell.seed, "prompt": cell.prompt}
        row["state"] = store.state(cell)
        metrics = store.metrics(cell)
        if metrics is not None:
            row |= measured(metrics)
        elif row["state"] == BROKEN:
            row["reason"] = (store.failure(cell) or {}).get("reason")
        rows.append(row)
    return rows


def measured(m: dict[str, Any]) -> dict[str, Any]:
    """What a comparison's metrics say of its side B, next to exact attention (side A) and the noise floor."""
    quality, timing, b = m["quality"], m["timing"], m["sides"]["b"]
    end, floor = quality["end_to_end"]["a_vs_b"], quality["end_to_end"]["noise_floor"]
    counts = adherence_counts(m)
    row = {
        "emulated": b["emulated"],
        "fell_back": b["fell_back"],
        "calls": b["calls"],
        "kept_exact": b["kept_exact"],
        "identical": end["identical"],
        "psnr": end["psnr"],
        "ssim": end["ssim"],
        "worst_psnr": end["worst_frame"]["psnr"],
        "floor_psnr": floor["psnr"],
        "floor_ssim": floor["ssim"],
        "motion_exact": quality["end_to_end"]["motion_energy"]["a"],
        "motion": quality["end_to_end"]["motion_energy"]["b"],
        "flicker_exact": quality["end_to_end"]["flicker"]["a"],
        "flicker": quality["end_to_end"]["flicker"]["b"],
        "followed_exact": counts["a"][0],
        "followed": counts["b"][0],
        "details": counts["b"][1],
        "memory_bytes": timing["b"]["peak_memory_bytes"],
        "device": m["environment"].get("device"),
    }
    if quality["replay"]:
        found = quality["replay"]["summary"]
        row["self_relative_l1"] = found["self"]["b"].get("relative_l1")
        row["cross_relative_l1"] = found["cross"]["b"].get("relative_l1")
        row["floor_relative_l1"] = found["self"]["floor"].get("relative_l1")
    if quality["one_step"]:
        row["step_relative_l1"] = quality["one_step"]["summary"]["b"].get("relative_l1")
        row["floor_step_relative_l1"] = quality["one_step"]["summary"]["floor"].get("relative_l1")
    for side, suffix in (("a", "_exact"), ("b", "")):
        for name, key in (("seconds", "sampling_seconds"), ("attention_seconds", "attention_seconds")):
            row[name + suffix] = (timing[side][key] or {}).get("median")
    # Where every call stayed exact there is nothing to be faster by: a ratio would be the machine's own unrest.
    ratios = (None if never_ran(row) else timing["a_over_b"]) or {}
    return row | {"speedup": ratios.get("sampling_seconds"), "attention_speedup": ratios.get("attention_seconds")}


def never_ran(row: dict[str, Any]) -> bool:
    """Whether every call of a finished cell was kept exact by its own settings."""
    return bool(row["calls"]) and row["kept_exact"] == row["calls"]


def speed_text(row: dict[str, Any], form: str = "{:.2f}x") -> str:
    """A cell's speed-up, or why it has none."""
    if row["emulated"] or row["fell_back"]:
        return "emulated" if row["emulated"] else "fell back"
    if never_ran(row):
        return "kept exact"
    return "n/a" if row["speedup"] is None else form.format(row["speedup"])


def summary(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One contestant over all prompts and seeds: medians with the range of the middle half. Identical videos count apart."""
    done = [r for r in rows if r["state"] == DONE]
    found: dict[str, Any] = {"contestant": name, "cells": len(rows), "done": len(done)}
    found["failed"] = sum(r["state"] == BROKEN for r in rows)
    found |= {key: any(r[key] for r in done) for key in ("emulated", "fell_back")}
    found["never_ran"] = any(never_ran(r) for r in done)
    found["identical"] = sum(bool(r["identical"]) for r in done)
    for key in ("psnr", "ssim", "floor_psnr", "self_relative_l1", "step_relative_l1", "speedup", "attention_speedup"):
        found[key] = middle([r[key] for r in done])
    found["motion_kept"] = middle([r["motion"] / r["motion_exact"] for r in done if r["motion"] and r["motion_exact"]])
    found |= {key: sum(r[key] or 0 for r in done) for key in ("followed_exact", "followed", "details")}
    if (
        found["emulated"] or found["fell_back"] or found["never_ran"]
    ):  # of some cells only: a median of the others would mislead
        found["speedup"] = found["attention_speedup"] = None
    return found


def middle(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Median and quartiles of the values that are known; None where none is."""
    known = sorted(v for v in values if v is not None)
    if not known:
        return None
    low, high = (known[0], known[0]) if len(known) == 1 else statistics.quantiles(known, n=4, method="inclusive")[::2]
    return {"median": statistics.median(known), "q1": low, "q3": high, "count": len(known)}


def to_csv(found: dict[str, Any]) -> str:
    """One line a cell, with a header; nothing is written for what is not known. Safe to open in a spreadsheet."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows([_field(row[name]) for name in COLUMNS] for row in found["rows"])
    return text.getvalue()


def to_json(found: dict[str, Any]) -> str:
    """The results as a file has them."""
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


def _field(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula becomes a text to it, too."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def terminal(found: dict[str, Any]) -> str:
    """The summary as plain text, at most 110 columns wide."""
    states = found["states"]
    lines = [f"{states['done']} cells done, {states['failed']} failed, {states['waiting']} waiting"]
    if found["note"]:
        lines.append(found["note"])
    head = ("", "cells", "PSNR", "noise floor", "SSIM", "attention error", "followed", "speed-up")
    lines += ["", _line(head), *(_line(cells(s)) for s in found["summary"])]
    for row in found["rows"]:
        if row["state"] == BROKEN:
            lines.append(f"failed: {row['cell']}: {row['reason']}")
    return "\n".join(lines)


def cells(s: dict[str, Any]) -> tuple[str, ...]:
    """One contestant's line: name, cells, PSNR, floor, SSIM, error, prompt followed, speed-up."""
    psnr = "identical" if s["done"] and s["identical"] == s["done"] else median_text(s["psnr"], "{:.1f} dB")
    floor = median_text(s["floor_psnr"], "{:.1f} dB") if s["floor_psnr"] or not s["done"] else "identical"
    reasons = (("emulated", "emulated"), ("fell back", "fell_back"), ("kept exact", "never_ran"))
    speed = next((text for text, key in reasons if s[key]), median_text(s["speedup"], "{:.2f}x"))
    followed = f"{s['followed']} of {s['details']}" if s["details"] else "n/a"
    error = median_text(s["self_relative_l1"], "{:.2g}")
    done = f"{s['done']} of {s['cells']}" + (f", {s['failed']} failed" if s["failed"] else "")
    return s["contestant"], done, psnr, floor, median_text(s["ssim"], "{:.4f}"), error, followed, speed


def median_text(found: dict[str, Any] | None, form: str) -> str:
    """The median in ``form``; "n/a" where nothing is known."""
    return "n/a" if found is None else form.format(found["median"])


def _line(texts: Sequence[str]) -> str:
    widths = (20, 16, 12, 12, 8, 16, 12, 10)
    first, *rest = texts
    return f"{first:<{widths[0]}.{widths[0]}}" + "".join(f"{t:>{w}}" for t, w in zip(rest, widths[1:], strict=True))
