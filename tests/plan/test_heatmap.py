"""The picture: of the right size, with every cell's colour where it belongs, and colours that do not need colour vision."""

import itertools

import pytest
from PIL import Image

from comfy_sage3.plan import heatmap
from comfy_sage3.plan.heatmap import CHOICES, draw
from comfy_sage3.plan.plan import Budget, LayerPlan
from comfy_sage3.precision import Precision

FP4, INT8, EXACT = Precision.FP4, Precision.INT8, Precision.EXACT


def plan(layers, columns, chosen=FP4, error=0.05):
    def table(value):
        return ((value,) * columns,) * layers

    return LayerPlan(
        model="M-0",
        layers=tuple(f"double {i}" for i in range(layers)),
        sigmas=tuple(1 / (1 + i) for i in range(columns)),
        steps=(2,) * columns,
        chosen=table(chosen),
        errors={FP4: table(error), INT8: table(error / 8)},
        seconds={EXACT: table(1.0), FP4: table(0.3), INT8: table(0.5)},
        budget=Budget("draft", 0.1, 0.3),
        bound=1.0,
        costs="measured",
        device="a GPU",
    )


@pytest.mark.parametrize(("layers", "columns"), [(1, 1), (6, 4), (60, 8), (30, 60)])
def test_every_size_is_drawn_and_stays_a_picture_one_can_look_at(layers, columns):
    picture = draw(plan(layers, columns))
    assert picture.mode == "RGB"
    assert 640 <= picture.width <= 3200
    assert 200 < picture.height <= 1500


def painted(picture: Image.Image, colour) -> int:
    return sum(n for n, c in picture.getcolors(1 << 20) if c == colour)


@pytest.mark.parametrize("pick", [FP4, INT8, EXACT])
def test_the_chosen_precision_fills_its_cells(pick):
    area = 6 * 4 * 58 * 28
    other = FP4 if pick is INT8 else INT8
    picture = draw(plan(6, 4, chosen=pick))
    assert painted(picture, CHOICES[pick]) > 0.7 * area
    assert painted(picture, CHOICES[other]) < 0.05 * area


def test_errors_fill_their_cells_and_a_frame_marks_what_was_chosen():
    area = 6 * 4 * 58 * 28
    both = draw(plan(6, 4, chosen=EXACT, error=0.05))
    framed = draw(plan(6, 4, chosen=FP4, error=0.05))
    colour = heatmap._colour(0.05)
    assert painted(both, colour) > 0.6 * area
    assert 0.4 * area < painted(framed, colour) < painted(both, colour)


def luminance(colour):
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


def test_more_error_is_darker_without_exception():
    scale = [luminance(heatmap._colour(0.001 * 1.05**i)) for i in range(142)]
    assert all(a > b for a, b in itertools.pairwise(scale))
    assert heatmap._colour(0.0) == heatmap._colour(1e-5)
    assert heatmap._colour(7.0) == heatmap._colour(1.0)


def test_text_can_be_read_on_every_colour():
    def contrast(a, b):  # WCAG 2
        def linear(c):
            c /= 255
            return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

        high, low = sorted(0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]) for c in (a, b))[::-1]
        return (high + 0.05) / (low + 0.05)

    for fill in (*CHOICES.values(), *(heatmap._colour(0.001 * 1.1**i) for i in range(73))):
        assert contrast(fill, heatmap._ink_on(fill)) > 4


def dichromat(colour, kind):
    """Red-green blindness, after Vienot, Brettel and Mollon 1999."""
    r, g, b = ((c / 255) ** 2.2 for c in colour)
    long, medium, short = 17.88 * r + 43.52 * g + 4.12 * b, 3.46 * r + 27.16 * g + 3.87 * b, 0.03 * r + 0.18 * g + 1.47 * b
    if kind == "protan":
        long = 2.02 * medium - 2.53 * short
    else:
        medium = 0.49 * long + 1.25 * short
    return (long / 65.5, medium / 34.5, short / 1.68)


@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_choices_are_told_apart_with_colour_blindness(kind):
    seen = [dichromat(c, kind) for c in CHOICES.values()]
    for a, b in itertools.combinations(seen, 2):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 0.1


def test_a_pillow_with_one_size_of_letters_will_do(monkeypatch):
    small = heatmap.ImageFont.load_default(11)

    def only(*size):
        if size:
            raise TypeError("load_default() takes 0 positional arguments but 1 was given")
        return small

    heatmap._font.cache_clear()
    monkeypatch.setattr(heatmap.ImageFont, "load_default", only)
    try:
        assert draw(plan(3, 3)).width >= 640
    finally:
        heatmap._font.cache_clear()
