"""A plan as a picture: layers down, steps across; what was chosen, and the error of every precision beside it.

Drawn with PIL alone. Choices are told apart by letters as well as by colours that colour-blind people can tell apart; the
error colours get darker steadily, on a fixed logarithmic scale, so that pictures of two plans can be compared.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ..precision import Precision
from .plan import LOW, LayerPlan

Colour = tuple[int, int, int]
INK, PAPER, FAINT, GRID = (20, 20, 24), (255, 255, 255), (110, 110, 118), (214, 214, 220)
CHOICES: dict[Precision, Colour] = {  # after Okabe and Ito
    Precision.FP4: (230, 159, 0),
    Precision.INT8_FAST: (86, 180, 233),
    Precision.INT8: (0, 114, 178),
    Precision.EXACT: (226, 226, 230),
}
LETTERS = {Precision.FP4: "4", Precision.INT8_FAST: "f", Precision.INT8: "8", Precision.EXACT: "x"}
# From light to dark: grey alone already says which is more.
ERRORS: tuple[Colour, ...] = ((255, 255, 229), (254, 217, 118), (244, 140, 60), (196, 52, 78), (104, 16, 96), (32, 4, 52))
LEAST, MOST = 1e-3, 1.0  # of the scale
MARGIN, GAP = 24, 28


class _Sizes(NamedTuple):
    """Pixels: of a cell, of its text and of labels."""

    width: int
    height: int
    text: int
    label: int


def draw(plan: LayerPlan) -> Image.Image:
    """``plan`` as an RGB picture; larger with more layers and steps."""
    sizes = _sizes(len(plan.layers), len(plan.sigmas))
    names = [_layer_name(layer) for layer in plan.layers]
    titles = ["chosen", *(f"error of {p.value}" for p in LOW if p in plan.errors)]
    tables: list[Precision | None] = [None, *(p for p in LOW if p in plan.errors)]
    font, small = _font(sizes.label), _font(13)
    head, legend = _headline(plan), _font(14)
    left = MARGIN + max(int(font.getlength(n)) for n in [*names, "sigma"]) + 10
    panel = max(len(plan.sigmas) * sizes.width, *(int(legend.getlength(t)) + 8 for t in titles))
    width = max(left + len(tables) * panel + (len(tables) - 1) * GAP + MARGIN, 640)
    top = MARGIN + 24 * len(head) + 62
    bottom = top + len(names) * sizes.height
    picture = Image.new("RGB", (width, bottom + 104), PAPER)
    pen = ImageDraw.Draw(picture)
    for i, line in enumerate(head):
        fitting = _fitting(line, width - 2 * MARGIN, 14 if i else 18)
        pen.text((MARGIN, MARGIN + 24 * i), line, FAINT if i else INK, fitting)
    for row, name in enumerate(names):
        pen.text((left - 8, top + (row + 0.5) * sizes.height), name, INK, font, anchor="rm")
    pen.text((left - 8, top - 28), "step", FAINT, small, anchor="rm")
    pen.text((left - 8, top - 12), "sigma", FAINT, small, anchor="rm")
    for i, (title, precision) in enumerate(zip(titles, tables, strict=True)):
        x = left + i * (panel + GAP)
        pen.text((x, top - 56), title, INK, legend)
        _columns(pen, plan, sizes, x, top)
        _cells(pen, plan, precision, sizes, x, top)
    _legend(pen, plan, left, bottom + 22)
    return picture


def _sizes(layers: int, columns: int) -> _Sizes:
    height, text, label = (28, 13, 14) if layers <= 16 else (22, 12, 13) if layers <= 36 else (17, 11, 12)
    width = 58 if columns <= 8 else 44 if columns <= 16 else 26 if columns <= 32 else 15
    return _Sizes(width, height, text, label)


def _headline(plan: LayerPlan) -> list[str]:
    error = f"mean error {plan.mean_error:.4f} of {plan.budget.error:g} allowed"
    return [
        f"Precision plan: {error} ({plan.budget.name}), attention {plan.speedup:.2f} x",
        f"{plan.model}; times {plan.costs} ({plan.device})",
    ]


def _layer_name(layer: str) -> str:
    name = layer or "all calls"
    return name if len(name) <= 24 else name[:22] + ".."


def _columns(pen: ImageDraw.ImageDraw, plan: LayerPlan, sizes: _Sizes, x: int, top: int) -> None:
    """Above each column the steps it stands for and its sigma; of narrow ones, every third or so."""
    font = _font(12 if sizes.width >= 40 else 11)
    every = max(1, math.ceil(44 / sizes.width))
    first = 1
    for column, (sigma, steps) in enumerate(zip(plan.sigmas, plan.steps, strict=True)):
        if column % every == 0:
            last = first + steps - 1
            said = f"{first}-{last}" if steps > 1 and every == 1 else str(first)
            middle = x + (column + 0.5) * sizes.width
            pen.text((middle, top - 28), said, INK, font, anchor="mm")
            pen.text((middle, top - 12), f"{sigma:.2f}" if sigma < 10 else f"{sigma:.1f}", FAINT, font, anchor="mm")
        first += steps


def _cells(pen: ImageDraw.ImageDraw, plan: LayerPlan, precision: Precision | None, sizes: _Sizes, x: int, top: int) -> None:
    """One panel: what was chosen where ``precision`` is None, else its errors; what was chosen has a frame there."""
    font = _font(sizes.text)
    for row in range(len(plan.layers)):
        for column in range(len(plan.sigmas)):
            at = (x + column * sizes.width, top + row * sizes.height)
            box = (*at, at[0] + sizes.width, at[1] + sizes.height)
            pick = plan.chosen[row][column]
            known = plan.seconds[Precision.EXACT][row][column] is not None
            error = None if precision is None else plan.errors[precision][row][column]
            if not known or (precision is not None and error is None):
                fill, said = PAPER, "-" if not known else "!"  # no call here; cannot serve it
            elif precision is None:
                fits = sizes.width >= 40 and font.getlength(pick.value) < sizes.width - 4
                fill, said = CHOICES[pick], pick.value if fits else LETTERS[pick]
            else:
                fill, said = _colour(error or 0.0), _number(error or 0.0) if sizes.width >= 40 else ""
            pen.rectangle(box, fill, GRID)
            if precision is not None and pick is precision and known:
                inner = (box[0] + 2, box[1] + 2, box[2] - 2, box[3] - 2)
                pen.rectangle(inner, None, _ink_on(fill), width=2 if sizes.width >= 26 else 1)
            if said:
                middle = (at[0] + sizes.width / 2 + 0.5, at[1] + sizes.height / 2 + 0.5)
                pen.text(middle, said, _ink_on(fill), font, anchor="mm")


def _legend(pen: ImageDraw.ImageDraw, plan: LayerPlan, x: int, y: int) -> None:
    """What the colours and letters mean: choices with their shares in the first line, the error scale in the second."""
    font = _font(13)
    counts = plan.counts()
    total = max(1, sum(counts.values()))
    at = float(x)
    for precision, count in counts.items():
        pen.rectangle((at, y, at + 22, y + 16), CHOICES[precision], GRID)
        pen.text((at + 11, y + 8.5), LETTERS[precision], _ink_on(CHOICES[precision]), font, anchor="mm")
        said = f"{precision.value} {count / total:.0%}"
        pen.text((at + 28, y + 8), said, INK, font, anchor="lm")
        at += 28 + font.getlength(said) + 20
    y += 30
    bar = 240
    for i in range(bar):
        pen.line((x + i, y, x + i, y + 14), _colour(LEAST * (MOST / LEAST) ** (i / (bar - 1))))
    pen.rectangle((x, y, x + bar, y + 14), None, FAINT)
    for value in (0.001, 0.01, 0.1, 1):
        place = x + bar * math.log(value / LEAST) / math.log(MOST / LEAST)
        pen.line((place, y + 14, place, y + 18), FAINT)
        pen.text((place, y + 27), f"{value:g}", INK, font, anchor="mm")
    said = "relative error (L2), logarithmic; a frame marks what was chosen"
    pen.text((x + bar + 22, y + 7), said, INK, font, anchor="lm")


def _colour(error: float) -> Colour:
    """The colour of an error on the fixed scale."""
    place = math.log(max(error, LEAST) / LEAST) / math.log(MOST / LEAST)
    place = min(place, 1.0) * (len(ERRORS) - 1)
    i = min(int(place), len(ERRORS) - 2)
    a, b, t = ERRORS[i], ERRORS[i + 1], place - i
    return (round(a[0] + t * (b[0] - a[0])), round(a[1] + t * (b[1] - a[1])), round(a[2] + t * (b[2] - a[2])))


def _ink_on(fill: Colour) -> Colour:
    """Black or white, whichever stands out more: relative luminance, with a gamma of 2.2 for sRGB's curve."""
    r, g, b = ((c / 255) ** 2.2 for c in fill)
    return INK if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.19 else PAPER


def _number(error: float) -> str:
    """ ".013" for 0.0132."""
    if error < 5e-4:
        return f"{error:.0e}" if error else "0"
    return f"{error:.2f}" if error >= 0.9995 else f"{error:.3f}"[1:]


def _fitting(text: str, width: int, size: int) -> Any:
    """The font in which ``text`` is no wider than ``width``, of ``size`` if that will do."""
    while size > 9 and _font(size).getlength(text) > width:
        size -= 1
    return _font(size)


@lru_cache(maxsize=32)
def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()
