"""A sweep's report.html: one file, every image inside it, nothing fetched from anywhere, as ``compare.page`` makes its own.

Text from outside (prompts, plans' names, reasons) reaches the page only through ``html.escape``; there is no script, and
the page's policy forbids every one.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..compare.engine import EMULATED_NOTE
from ..compare.output import enlarged
from ..compare.page import ASSETS, DIFFERENCE_GAIN, _hash, _picture, _png, _uri, amplified_difference
from ..errors import InputError
from ..files import put
from .plots import box_plots, heat_maps, pareto_front, pareto_plot, speed_points
from .results import cells, results, speed_text, to_csv, to_json
from .store import BROKEN, DONE, Store

REPORT, CSV, JSON = "report.html", "results.csv", "results.json"
NOT_TIMED = "–"
MAX_STILLS = 4  # cells of which a frame is shown
NO_SPEED = "No contestant ran on real kernels as asked, so there is no speed to set quality against"
SLOW_DRIFT = (
    "The exact side of a prompt and seed was made once and met by every contestant, so exact and contestant did not take "
    "turns: a machine that slows down over time shows in the speed-up."
)


def write_report(store: Store) -> dict[str, Any]:
    """Write results.csv, results.json and report.html into the sweep's folder, each whole, and return the results."""
    found = results(store)
    try:
        put(store.out / CSV, to_csv(found).encode())
        put(store.out / JSON, to_json(found).encode())
        put(store.out / REPORT, report_html(store, found).encode())
    except OSError as error:
        raise InputError(f"Cannot write the report to {store.out} ({error.strerror}): free some space.") from None
    return found


def report_html(store: Store, found: dict[str, Any] | None = None) -> str:
    """The page for what the sweep has found so far."""
    found = found or results(store)
    style = (ASSETS / "report.css").read_text("utf-8")
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'"
    banner = f'<p class="banner" role="note">{escape(EMULATED_NOTE)}</p>' if found["note"] else ""
    sweep = found["sweep"]
    title = sweep["name"] or "Sweep: " + ", ".join(s["contestant"] for s in found["summary"])
    parts = [
        f"<header><p class=kicker>comfy_sage3 · study</p><h1>{escape(verdict(found))}</h1>"
        f"<p>{escape(numbers(found))}</p>{banner}{_chips(found)}</header>",
        _reading_help(),
        f"<section><h2>Every contestant against exact attention</h2>{_summary(found)}</section>",
        _section("Spread over prompts and seeds, and where the error is", _plots(store, found)),
        f"<section><h2>Quality against speed</h2>{_pareto(found)}</section>",
        _section("Where it differed most", _stills(store, found)),
        f"<section><h2>Every cell</h2>{_cells(found)}</section>",
        _section("What failed", _failures(found)),
        f"<section><h2>What was asked for</h2>{_asked(found)}</section>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def verdict(found: dict[str, Any]) -> str:
    """One sentence a stranger understands."""
    states = found["states"]
    if not states[DONE]:
        return "No cell of this sweep has a result yet"
    front = pareto_front([(x, y) for _, x, y in speed_points(found)])
    best = [name for name, x, y in speed_points(found) if (x, y) in front]
    done = [s for s in found["summary"] if s["psnr"]]
    if len(best) > 1 and len(best) == len(done):
        return f"Speed costs closeness to exact attention: {_and(best)} are all on the Pareto front"
    if best and len(done) > 1:
        return f"None beats {_and(best)} in both speed and closeness to exact attention"
    if not done:
        return "Every video came out the same as with exact attention"
    closest = max(done, key=lambda s: s["psnr"]["median"])
    if len(done) == 1:
        return f"{closest['contestant']} against exact attention, over {closest['done']} videos"
    return f"{closest['contestant']} stayed closest to exact attention"


def numbers(found: dict[str, Any]) -> str:
    """The numbers under the verdict."""
    said = []
    for s in found["summary"]:
        if s["psnr"]:
            speed = f", {s['speedup']['median']:.2f}x as fast" if s["speedup"] else ""
            said.append(f"{s['contestant']}: PSNR {s['psnr']['median']:.1f} dB{speed}")
    states = found["states"]
    left = [f"{states[key]} {word}" for key, word in ((BROKEN, "failed"), ("waiting", "not run yet")) if states[key]]
    count = f"{states[DONE]} of {sum(states.values())} cells have a result" + (f" ({', '.join(left)})" if left else "") + "."
    return (f"Medians: {'; '.join(said)}. " if said else "") + count


def count_of(number: int, word: str) -> str:
    """ "1 seed", "2 seeds"."""
    return f"{number} {word}" + ("" if number == 1 else "s")


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>" if inner else ""


def _chips(found: dict[str, Any]) -> str:
    s = found["sweep"]
    counts = (("prompt", s["prompts"]), ("seed", s["seeds"]), ("contestant", found["summary"]))
    said = [count_of(len(values), word) for word, values in counts]
    said += [s["size"], f"{s['steps']} steps", f"cfg {s['cfg']:g}", *found["devices"]]
    return "<ul class=chips>" + "".join(f"<li>{escape(x)}</li>" for x in said) + "</ul>"


def _reading_help() -> str:
    return f"""<details><summary>How to read this</summary>
<p>Every contestant draws the same prompts from the same noise as exact attention; only the arithmetic of attention differs.
A difference does not mean that a video is worse: small errors steer the sampling onto another path, and 20 to 30 dB is
usual for good methods. The <b>noise floor</b> is how far apart two runs are that are both exact.</p>
<p><b>Attention error</b> is the kernel's own: the same captured tensors through it and through exact fp32 attention.
<b>Followed</b> counts the prompt's details that can be seen in the finished video.</p>
<p>{escape(SLOW_DRIFT)}</p></details>"""


def _summary(found: dict[str, Any]) -> str:
    head = ("", "cells", "PSNR", "noise floor", "SSIM", "attention error", "followed", "speed-up")
    body = "".join(_row(cells(s)) for s in found["summary"])
    several = (
        '<p class="note">These cells were made on several devices: compare quality, not speed.</p>'
        if len(found["devices"]) > 1
        else ""
    )
    return (
        f"{several}{_table(head, body)}<p class=muted>Medians over prompts and seeds. A speed-up is of the whole sampling, "
        "decoding apart, and given only where both sides ran on real kernels as asked.</p>"
    )


def _plots(store: Store, found: dict[str, Any]) -> str:
    boxes = _figure(box_plots, found, "Every cell a point; dashed: the noise floor, two exact runs")
    maps = _figure(heat_maps, store, "Attention error by layer and step, the mean of all prompts and seeds")
    return f'<div class="plots">{boxes}{maps}</div>' if boxes or maps else ""


def _figure(draw: Any, of: Any, caption: str) -> str:
    light, dark = draw(of), draw(of, "dark")
    return _picture(caption, light, dark) if light and dark else ""


def _pareto(found: dict[str, Any]) -> str:
    emulated = [s["contestant"] for s in found["summary"] if s["emulated"]]
    slow = f"<p class=note>{escape(_and(emulated))}: {escape(EMULATED_NOTE)}</p>" if emulated else ""
    picture = _figure(pareto_plot, found, "Small: every cell. Large: medians. Ringed and joined: on the Pareto front.")
    if not picture:
        return slow + f"<p>{escape(NO_SPEED)}.</p>"
    points = speed_points(found)
    front = pareto_front([(x, y) for _, x, y in points])
    items = "".join(
        f"<li><b>{escape(name)}</b>: {x:.2f}x as fast, PSNR {y:.1f} dB"
        f"{'' if (x, y) in front else ', no better than another in either'}</li>"
        for name, x, y in points
    )
    why = "On the Pareto front is who no other contestant beats in both speed and closeness to exact attention."
    return f'{slow}<div class="plots">{picture}<div><p>{escape(why)}</p><ul>{items}</ul></div></div>'


def _stills(store: Store, found: dict[str, Any]) -> str:
    done = {row["cell"]: row["psnr"] for row in found["rows"] if row["psnr"] is not None}
    by_id = {cell.id: cell for cell in store.sweep.cells()}
    shown = []
    for name in sorted(done, key=lambda n: done[n])[:MAX_STILLS]:
        cell = by_id[name]
        metrics = store.metrics(cell)
        frames = _worst(store.folder(cell), metrics) if metrics else None
        if frames is None:
            continue
        caption = f"{cell.contestant.name}, seed {cell.seed}, {done[name]:.1f} dB: {cell.prompt}"
        picture = _uri(_png(frames))
        shown.append(
            f'<figure><img class="still" alt="Exact, {escape(cell.contestant.name)}, and their difference" src="{picture}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    if not shown:
        return ""
    help_ = f"Worst frame of the cells with the lowest PSNR: exact, the contestant, their difference × {DIFFERENCE_GAIN}."
    return f'<p class=muted>{escape(help_)}</p><div class="plots">{"".join(shown)}</div>'


def _worst(folder: Path, metrics: dict[str, Any]) -> np.ndarray | None:
    """The frame where a cell differs most: exact, contestant, difference, side by side; None where it cannot be read."""
    index = metrics["quality"]["end_to_end"]["a_vs_b"]["worst_frame"]["index"]
    try:
        a, b = (np.asarray(Image.open(folder / side / f"{index:04d}.png").convert("RGB")) for side in ("a", "b"))
    except (OSError, ValueError, TypeError):
        return None
    if a.shape != b.shape:
        return None
    pictures = enlarged(np.stack([a, b, amplified_difference(a, b)]))
    gap = np.full((pictures.shape[1], 6, 3), 128, np.uint8)
    return np.concatenate([pictures[0], gap, pictures[1], gap, pictures[2]], 1)


def _cells(found: dict[str, Any]) -> str:
    head = ("prompt", "seed", "contestant", "PSNR", "SSIM", "attention error", "followed", "sampling", "speed-up")
    body = "".join(_row(line) for line in cell_lines(found))
    return (
        f"{_table(head, body)}<p class=muted>Each cell's own comparison, with its videos, is in the folder "
        "cells of this sweep; all numbers are in results.csv and results.json.</p>"
    )


def cell_lines(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line a finished cell, as people read it."""
    lines: list[tuple[str, ...]] = []
    for r in (row for row in found["rows"] if row["state"] == DONE):
        speed = speed_text(r)
        followed = f"{r['followed']} of {r['details']}" if r["details"] else "n/a"
        lines.append(
            (r["prompt"], str(r["seed"]), r["contestant"], "identical" if r["identical"] else f"{r['psnr']:.1f} dB")
            + (
                f"{r['ssim']:.4f}",
                _number(r["self_relative_l1"], "{:.2g}"),
                followed,
                NOT_TIMED if r["emulated"] else _number(r["seconds"], "{:.2f} s"),
                speed,
            )
        )
    return lines


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else form.format(value)


def _failures(found: dict[str, Any]) -> str:
    failed = [r for r in found["rows"] if r["state"] == BROKEN]
    items = "".join(
        f"<li><b>{escape(r['contestant'])}</b>, seed {r['seed']}, “{escape(r['prompt'])}”: {escape(str(r['reason']))}</li>"
        for r in failed
    )
    return f"<ul>{items}</ul>" if failed else ""


def _asked(found: dict[str, Any]) -> str:
    s = found["sweep"]
    prompts = "".join(f"<li>{escape(p)}</li>" for p in s["prompts"])
    facts = {
        "seeds": ", ".join(map(str, s["seeds"])),
        "repeats": f"{s['repeats']} timed runs of each side",
        "min_tokens": str(s["min_tokens"]),
        "negative prompt": s["negative"] or "none",
        "engine": s["engine"],
        "device": ", ".join(found["devices"]) or "none yet",
        "begun": found["created"],
        "go on, or again": "python -m comfy_sage3 compare --sweep FILE --out this folder",
    }
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<ol>{prompts}</ol><dl>{items}</dl>"


def _table(head: tuple[str, ...], body: str) -> str:
    first, *rest = head
    top = f"<tr><th>{escape(first)}</th>" + "".join(f'<th scope="col">{escape(h)}</th>' for h in rest) + "</tr>"
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def _row(texts: tuple[str, ...]) -> str:
    first, *rest = texts
    return f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(_whole(t))}</td>" for t in rest) + "</tr>"


def _whole(text: str) -> str:
    """A number and its unit stay on one line."""
    return text.replace(" ", "\u00a0") if len(text) < 14 else text
