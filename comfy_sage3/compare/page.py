"""report.html: one file that says what happened, every image inside it, nothing fetched from anywhere.

Text from outside (the prompt, a server's node reasons) reaches the page only through ``html.escape`` or as
escaped JSON, and the page's own policy forbids every script and style but the two whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .engine import EMULATED_NOTE
from .plots import error_plot, psnr_plot
from .tables import (
    Row,
    adherence_rows,
    command,
    decibels,
    headline,
    kept_exact_sentence,
    noun,
    quality_rows,
    ratio_rows,
    side_title,
    timing_rows,
)

DIFFERENCE_GAIN = 8
NO_TENSORS = (
    "This engine does not hand out the model's tensors, so the kernel and the single step were not measured "
    "on their own: use the diffusers engine for those."
)
ASSETS = Path(__file__).parent / "assets"


def report_html(m: dict[str, Any], videos: dict[str, np.ndarray]) -> str:
    """The page for ``metrics`` and the two uint8 (T, H, W, 3) videos."""
    style, script = ((ASSETS / name).read_text("utf-8") for name in ("report.css", "report.js"))
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    verdict, numbers = headline(m)
    a, b = m["sides"]["a"], m["sides"]["b"]
    difference = amplified_difference(videos["a"], videos["b"])
    worst = m["quality"]["end_to_end"]["a_vs_b"]["worst_frame"]["index"]
    banner = f'<p class="banner" role="note">{escape(EMULATED_NOTE)}</p>' if m["note"] else ""
    parts = [
        f"<header><p class=kicker>comfy_sage3 · A/B comparison</p><h1>{escape(verdict)}</h1>",
        f"<p>{escape(numbers)}</p>{banner}{_request(m)}</header>",
        _player(m, videos, difference, worst),
        _reading_help(m),
        f"<section><h2>Quality</h2>{_quality(m)}</section>",
        f"<section><h2>Prompt, detail by detail</h2>{_adherence(m)}</section>",
        f"<section><h2>Where the error is</h2>{_plots(m)}</section>",
        f"<section><h2>Time</h2>{_timing(m)}</section>",
        f"<section><h2>What ran, and why</h2>{_ran(a)}{_ran(b)}</section>",
        f"<section><h2>Make it again</h2><pre>{escape(command(m))}</pre>{_environment(m)}</section>",
    ]
    data = _json(_player_data(m, videos, worst))
    title = f"{a['precision']} or {b['precision']}: {m['request']['prompt']}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + f'\n</main>\n<script type="application/json" id="data">{data}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def amplified_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|A - B| times ``DIFFERENCE_GAIN``, saturating; black where the videos agree."""
    distance = np.abs(a.astype(np.int16) - b.astype(np.int16)) * DIFFERENCE_GAIN
    return distance.clip(0, 255).astype(np.uint8)


def sheet(video: np.ndarray) -> tuple[np.ndarray, int]:
    """All frames in one picture, row by row, for a canvas to cut from, and its number of columns."""
    frames, height, width, _ = video.shape
    columns = math.ceil(math.sqrt(frames))
    rows = math.ceil(frames / columns)
    grid = np.zeros((rows * columns, height, width, 3), np.uint8)
    grid[:frames] = video
    grid = grid.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, columns * width, 3), columns


def _player(m: dict[str, Any], videos: dict[str, np.ndarray], difference: np.ndarray, worst: int) -> str:
    frames, height, width, _ = videos["a"].shape
    a, b = m["sides"]["a"], m["sides"]["b"]
    shown = (
        ("a", videos["a"], side_title(a)),
        ("b", videos["b"], side_title(b)),
        ("d", difference, f"Difference × {DIFFERENCE_GAIN} (black: the same)"),
    )
    figures = "".join(
        f'<figure><canvas width="{width}" height="{height}" data-sheet="sheet-{key}" role="img" '
        f'aria-label="{escape(caption)}"></canvas><figcaption>{escape(caption)}</figcaption>'
        f'<img id="sheet-{key}" class="sheet" alt="" src="{_uri(_png(sheet(video)[0]))}"></figure>'
        for key, video, caption in shown
    )
    which = "both sides and their difference" if frames == 1 else f"frame {worst + 1}, where the sides differ most"
    still = np.concatenate([video[worst] for _, video, _ in shown], 1)
    return (
        f'<section class="player" aria-label="The two {noun(m)}s"><div class="videos">{figures}</div>'
        f'<div class="controls"{" hidden" if frames == 1 else ""}><button id="play" type="button">Pause</button>'
        f'<input id="scrub" type="range" min="0" max="{frames - 1}" value="0" step="1" aria-label="Frame">'
        '<output id="where"></output><button id="worst" type="button">Worst frame</button></div>'
        f"<noscript><p>Without scripts: {which}.</p>"
        f'<img class="still" alt="A, B and their difference" src="{_uri(_png(still))}"></noscript></section>'
    )


def _player_data(m: dict[str, Any], videos: dict[str, np.ndarray], worst: int) -> dict[str, Any]:
    frames, height, width, _ = videos["a"].shape
    per_frame = m["quality"]["end_to_end"]["a_vs_b"]["psnr_per_frame"]
    return {
        "frames": frames,
        "width": width,
        "height": height,
        "columns": sheet(videos["a"])[1],
        "worst": worst,
        "psnr": [decibels(x) for x in per_frame],
    }


def _request(m: dict[str, Any]) -> str:
    r, e = m["request"], m["environment"]
    chips = (
        f"seed {r['seed']}",
        f"{r['width']} × {r['height']} px, {'a still' if r['frames'] == 1 else str(r['frames']) + ' frames'}",
        *([f"{r['tokens']:,} tokens"] if r["tokens"] else []),
        f"{r['steps']} steps",
        f"cfg {r['cfg']:g}",
        e["device"],
        f"{e['engine']} engine",
    )
    items = "".join(f"<li>{escape(c)}</li>" for c in chips)
    return f"<blockquote>{escape(r['prompt'])}</blockquote><ul class=chips>{items}</ul>"


def _reading_help(m: dict[str, Any]) -> str:
    method = escape(m["quality"]["noise_floor_method"])
    convention = escape(m["quality"]["end_to_end"]["ssim_convention"])
    made = noun(m)
    over_time = """
<p><b>Motion energy</b> is how much changes from frame to frame, <b>flicker</b> how unevenly it
does; a side that freezes or trembles shows here.</p>"""
    return f"""<details><summary>How to read this</summary>
<p>Both {made}s start from the same noise and the same prompt; only the arithmetic of attention
differs. A difference therefore does not mean that a {made} is worse: small errors steer the sampling
onto another path, and 20 to 30 dB is usual for good methods.</p>
<p>The <b>noise floor</b> is how far apart two runs are that are both exact ({method}). A side that
is as close as the noise floor cannot be told from exact.</p>{over_time if made == "video" else ""}
<p>{convention}.</p></details>"""


def _quality(m: dict[str, Any]) -> str:
    body = ""
    for title, rows in quality_rows(m):
        body += f'<tr class="section"><th scope="colgroup" colspan="4">{escape(title)}</th></tr>'
        body += "".join(_row(row, 4) for row in rows)
    missing = "" if m["quality"]["replay"] else f"<p class=muted>{escape(NO_TENSORS)}</p>"
    return f"{_note(m)}{_wrap(_head_row(_heads(m, '')) + body)}{missing}"


def _adherence(m: dict[str, Any]) -> str:
    return _table(adherence_rows(m), _heads(m, "prompt asked for"))


def _timing(m: dict[str, Any]) -> str:
    repeats, order = m["timing"]["repeats"], m["timing"]["order"]
    ratios = "".join(f"<p><b>{escape(name)}: B is {escape(value)} as fast as A.</b></p>" for name, value in ratio_rows(m))
    return (
        f"{_note(m)}{ratios}{_table(timing_rows(m), _heads(m, '')[:3])}"
        f"<p class=muted>Median (minimum to maximum) of {repeats} runs a side, in the order {escape(order)}; "
        f"{escape(m['timing']['warm_up'])}. The {noun(m)} is decoded once per side and timed apart.</p>"
    )


def _note(m: dict[str, Any]) -> str:
    return f"<p class=note>{escape(EMULATED_NOTE)}</p>" if m["note"] else ""


def _plots(m: dict[str, Any]) -> str:
    pairs = []
    if m["request"]["frames"] > 1:
        pairs.append(("PSNR of every frame, B against A, next to the noise floor", psnr_plot(m), psnr_plot(m, "dark")))
    light, dark = error_plot(m), error_plot(m, "dark")
    if light and dark:
        pairs.append(("Attention error of side B for every layer and captured step", light, dark))
    return '<div class="plots">' + "".join(_picture(*pair) for pair in pairs) + "</div>"


def _picture(caption: str, light: bytes, dark: bytes) -> str:
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_uri(dark)}">'
        f'<img alt="{escape(caption)}" '
        f'src="{_uri(light)}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _ran(side: dict[str, Any]) -> str:
    lines = "".join(
        f"<li>{line['calls']:,} calls on <b>{escape(str(line['kernel']))}</b>"
        f"{', a fallback' if line['fell_back'] else ''}: {escape(str(line['reason']))}</li>"
        for line in side["report"]
    )
    kept = f"<p>{escape(kept_exact_sentence(side))}</p>" if side["kept_exact"] else ""
    return f"<h3>{escape(side_title(side))}</h3><ul>{lines or '<li>no attention calls were reported</li>'}</ul>{kept}"


def _environment(m: dict[str, Any]) -> str:
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in m["environment"].items())
    return f"<dl>{items}<dt>made</dt><dd>{escape(m['created'])}</dd></dl>"


def _heads(m: dict[str, Any], first: str) -> list[str]:
    return [first, side_title(m["sides"]["a"]), side_title(m["sides"]["b"]), "noise floor"]


def _table(rows: Sequence[Row], heads: Sequence[str]) -> str:
    return _wrap(_head_row(heads) + "".join(_row(row, len(heads)) for row in rows))


def _wrap(inner: str) -> str:
    return f'<div class="scroll"><table>{inner}</table></div>'


def _head_row(heads: Sequence[str]) -> str:
    first, *rest = heads
    return f"<tr><th>{escape(first)}</th>" + "".join(f'<th scope="col">{escape(h)}</th>' for h in rest) + "</tr>"


def _row(row: Row, columns: int) -> str:
    cells = "".join(f"<td>{escape(text)}</td>" for text in row[1:columns])
    return f'<tr><th scope="row">{escape(row.name)}</th>{cells}</tr>'


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _json(value: Any) -> str:
    """JSON that cannot end its script element or open a comment."""
    text = json.dumps(value)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
