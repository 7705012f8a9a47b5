"""report.html: self-contained, safe against what is in the prompt, and honest about emulation."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from comfy_sage3.compare import measure
from comfy_sage3.compare.engine import EMULATED_NOTE, Side
from comfy_sage3.compare.page import amplified_difference, report_html, sheet
from comfy_sage3.demo.prompts import Scene
from comfy_sage3.precision import Precision

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> ${7*7} {{7*7}} \" ' & http://evil.example/"


class Reader(HTMLParser):
    """Collects elements, their attributes, and the text of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "source", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in self._open[-1:]:
            self.texts.setdefault(tag, []).append(data)


@pytest.fixture
def make(standin, request_, monkeypatch):
    def page(precision: Precision = Precision.FP4, prompt: str | None = None, reason: str | None = None):
        request = request_
        if prompt is not None:  # an engine of another model may take any text
            monkeypatch.setattr("comfy_sage3.demo.prompts.parse", lambda _: Scene())
            request = dataclasses.replace(request_, prompt=prompt)
        c = measure.compare(standin, request, Side("A", Precision.EXACT), Side("B", precision), repeats=1)
        if reason is not None:
            c.metrics["sides"]["b"]["report"][0]["reason"] = reason
        return report_html(c.metrics, c.videos), c

    return page


def test_nothing_is_fetched_from_anywhere(make):
    html, _ = make()
    for tag, attributes in Reader(html).elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "srcset", "href", "poster", "action"):
            if name in attributes:
                assert attributes[name].startswith("data:image/png;base64,"), (tag, name)
    assert "http" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html).replace("http-equiv", "")
    assert "@import" not in html
    assert "url(" not in html


def test_the_policy_allows_exactly_the_scripts_and_styles_there_are(make):
    html, _ = make()
    reader = Reader(html)
    named = "Content-Security-Policy"
    policy = next(a["content"] for _, a in reader.elements if a.get("http-equiv") == named)
    code = re.search(r"<script>(.*?)</script>", html, re.S).group(1)
    style = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    for directive, text in (("script-src", code), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:")
    assert "unsafe" not in policy
    for _, attributes in reader.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes)


def test_prompt_and_reasons_cannot_become_markup(make):
    html, _ = make(prompt=EVIL, reason=EVIL)
    reader = Reader(html)
    assert [t for t, _ in reader.elements].count("script") == 2
    assert all(a.get("src", "").startswith("data:") for t, a in reader.elements if t == "img")
    assert "<script>alert(1)" not in html
    assert reader.texts["blockquote"] == [EVIL]
    assert EVIL in reader.texts["title"][0]
    assert json.loads("".join(reader.texts["script"][0]))["frames"] == 5


def test_an_emulated_side_is_labelled_and_shows_no_ratio(make):
    html, _ = make()
    assert html.count(EMULATED_NOTE) >= 3  # the banner, the quality table, the timing table
    assert "as fast as A" not in html
    assert "B: fp4 (emulated)" in html


def test_real_kernels_show_a_ratio_and_no_label(make):
    html, _ = make(Precision.INT8)
    assert "sampling: B is" in html
    assert "as fast as A" in html
    assert EMULATED_NOTE not in html


def test_the_noise_floor_and_the_reasons_are_on_the_page(make):
    html, c = make()
    assert "noise floor" in html
    assert "one way against another" in html
    assert "24 calls on <b>fp4-emulated</b>: told to" in html
    assert "--seed 1" in html
    assert "nan" not in Reader(html).texts["td"]
    assert c.metrics["quality"]["end_to_end"]["ssim_convention"].split(",")[0] in html


def test_calls_kept_exact_are_on_the_page(make, standin):
    standin.short_calls = True
    html, _ = make()
    assert "24 calls on <b>exact</b>: fewer than 64 tokens" in html
    assert "<p>24 of 48 calls were kept exact by --min-tokens 64.</p>" in html
    assert "cross-attention, against exact fp32; B kept exact" in html
    assert "--min-tokens 64" in Reader(html).texts["pre"][0]


def test_sheets_hold_every_frame_exactly(make):
    html, c = make()
    reader = Reader(html)
    data = json.loads(reader.texts["script"][0])
    for key in ("a", "b"):
        uri = next(a["src"] for t, a in reader.elements if a.get("id") == f"sheet-{key}")
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
        for i, frame in enumerate(c.videos[key]):
            y, x = i // data["columns"] * data["height"], i % data["columns"] * data["width"]
            np.testing.assert_array_equal(picture[y : y + data["height"], x : x + data["width"]], frame)


@pytest.mark.parametrize("frames", [1, 5, 9, 33])
def test_sheet_has_room_for_all_frames(frames):
    picture, columns = sheet(np.ones((frames, 4, 6, 3), np.uint8))
    assert picture.sum() == frames * 4 * 6 * 3
    assert picture.shape[1] == columns * 6


def test_the_difference_is_symmetric_amplified_and_saturates():
    a = np.array([0, 10, 200], np.uint8).reshape(1, 1, 1, 3)
    b = np.array([0, 12, 100], np.uint8).reshape(1, 1, 1, 3)
    assert amplified_difference(a, b).flatten().tolist() == [0, 16, 255]
    np.testing.assert_array_equal(amplified_difference(a, b), amplified_difference(b, a))
