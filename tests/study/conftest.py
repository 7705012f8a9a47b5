"""A small sweep, its folder, and an engine that takes no time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from comfy_sage3.study.store import Store
from comfy_sage3.study.sweep import parse

sys.path.insert(0, str(Path(__file__).parent))  # for study_fake.py
from study_fake import FakeEngine  # noqa: E402

DATA = {
    "prompts": ["a large red circle moving left on a black background", "a small blue square standing still"],
    "seeds": [1, 2],
    "precisions": ["fp4", "int8"],
    "size": "32x16x5",
    "steps": 2,
    "repeats": 2,
    "min_tokens": 0,
}


@pytest.fixture
def data():
    return {**DATA}


@pytest.fixture
def sweep():
    return parse(DATA)


@pytest.fixture
def store(tmp_path, sweep):
    return Store.create(tmp_path / "study", sweep)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture(autouse=True)
def quick_output(request, monkeypatch):
    """A comparison's folder without its pictures, which are others' to test and take a second a cell."""
    if "with_pictures" in request.fixturenames:
        return
    from comfy_sage3.compare import output

    for name in ("psnr_plot", "error_plot"):
        monkeypatch.setattr(output, name, lambda metrics: b"")
    monkeypatch.setattr(output, "report_html", lambda metrics, videos: "")
    monkeypatch.setattr(output, "_animate", lambda path, video: None)


@pytest.fixture(autouse=True)
def one_thread():
    """Frames of 32 x 16 pixels: many threads would mostly wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def with_pictures():
    """For tests that want a comparison's folder as it is."""
