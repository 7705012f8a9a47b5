"""A comparison in blocks of words and tables, as assets/blocks.js shows them: the rows are ``compare.tables``'s own."""

from __future__ import annotations

from typing import Any

from ..compare import tables
from ..compare.engine import EMULATED_NOTE
from ..compare.page import NO_TENSORS
from ..compare.tables import Row

Block = dict[str, Any]
READING = (
    "Both sides start from the same noise and the same prompt; only the arithmetic of attention differs. A difference "
    "does not mean that a {} is worse: small errors steer the sampling onto another path, and 20 to 30 dB is usual for "
    "good methods."
)
FLOOR = (
    "The noise floor is how far apart two runs are that are both exact ({}). A side that close cannot be told from exact."
)
MOVING = (
    "Motion energy is how much changes from frame to frame, flicker how unevenly it does: a side that freezes or trembles "
    "shows here."
)


def verdict(m: dict[str, Any]) -> list[Block]:
    """What stands above the videos."""
    said, numbers = tables.headline(m)
    r, e = m["request"], m["environment"]
    chips = [
        f"seed {r['seed']}",
        f"{r['width']} × {r['height']}",
        "a still" if r["frames"] == 1 else f"{r['frames']} frames",
        f"{r['steps']} steps",
    ]
    chips += [f"guidance {r['cfg']:g}", str(e["device"]), f"{e['engine']} engine"]
    blocks: list[Block] = [{"kind": "verdict", "text": said}, {"kind": "text", "text": numbers}]
    if m["note"]:
        blocks.append({"kind": "banner", "text": EMULATED_NOTE[0].upper() + EMULATED_NOTE[1:]})
    blocks.append({"kind": "quote", "text": r["prompt"]})
    if r.get("negative"):
        blocks.append({"kind": "quiet", "text": f"Steered away from: {r['negative']}"})
    return [*blocks, {"kind": "chips", "items": chips}]


def numbers(m: dict[str, Any]) -> list[Block]:
    """What stands below the videos: time, quality, what ran and why."""
    a, b = m["sides"]["a"], m["sides"]["b"]
    heads = ["", tables.side_title(a), tables.side_title(b)]
    return [
        *_time(m, heads),
        *_quality(m, [*heads, "noise floor"]),
        {"kind": "more", "text": "How to read this", "blocks": _reading(m)},
        {"kind": "heading", "text": "What ran, and why"},
        *_ran(a),
        *_ran(b),
        {"kind": "more", "text": "Make it again", "blocks": _again(m)},
    ]


def _time(m: dict[str, Any], heads: list[str]) -> list[Block]:
    t = m["timing"]
    ratios = [f"{name}: B is {value} as fast as A" for name, value in tables.ratio_rows(m)]
    blocks: list[Block] = [
        {"kind": "table", "title": "Time", "heads": heads, "rows": _rows(tables.timing_rows(m), 3), "note": m["note"]}
    ]
    if ratios:
        blocks.append({"kind": "list", "items": ratios})
    said = f"Median (least to most) of {t['repeats']} runs a side, in the order {t['order']}; {t['warm_up']}."
    return [*blocks, {"kind": "quiet", "text": said}]


def _quality(m: dict[str, Any], heads: list[str]) -> list[Block]:
    rows: list[list[str]] = []
    for title, found in tables.quality_rows(m):
        rows += [[title], *_rows(found, 4)]
    blocks: list[Block] = [{"kind": "table", "title": "Quality", "heads": heads, "rows": rows}]
    if not m["quality"]["replay"]:
        blocks.append({"kind": "quiet", "text": NO_TENSORS})
    details = tables.adherence_rows(m)
    if details:
        asked = ["the prompt asked for", *heads[1:]]
        table = {"kind": "table", "title": "", "heads": asked, "rows": _rows(details, 4)}
        blocks.append({"kind": "more", "text": "The prompt, detail by detail", "blocks": [table]})
    return blocks


def _reading(m: dict[str, Any]) -> list[Block]:
    q = m["quality"]
    made = tables.noun(m)
    texts = [READING.format(made), FLOOR.format(q["noise_floor_method"]), MOVING, f"{q['end_to_end']['ssim_convention']}."]
    return [{"kind": "text", "text": text} for text in texts if text is not MOVING or made == "video"]


def _ran(side: dict[str, Any]) -> list[Block]:
    items = [
        f"{line['calls']:,} calls on {line['kernel']}{', a fallback' if line['fell_back'] else ''}: {line['reason']}"
        for line in side["report"]
    ] or ["no attention calls were reported"]
    blocks: list[Block] = [{"kind": "text", "text": tables.side_title(side)}, {"kind": "list", "items": items}]
    if side["kept_exact"]:
        blocks.append({"kind": "quiet", "text": tables.kept_exact_sentence(side)})
    return blocks


def _again(m: dict[str, Any]) -> list[Block]:
    known = [[name, str(value)] for name, value in m["environment"].items()] + [["made", m["created"]]]
    table = {"kind": "table", "title": "", "heads": ["", ""], "rows": known}
    return [{"kind": "code", "text": tables.command(m)}, table]


def _rows(rows: list[Row], columns: int) -> list[list[str]]:
    return [list(row[:columns]) for row in rows]
