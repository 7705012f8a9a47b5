"""The app with an engine whose frames and times are known beforehand, launched once, and a browser to open it with."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from comfy_sage3.compare.engine import Generation, Inspection
from comfy_sage3.precision import Precision

PROMPT = "a red circle moving left on a black background"
ERRORS = {"cosine": 0.5, "relative_l1": 0.25, "rmse": 0.125, "max_abs": 2.0}
SHIFT = 6  # how far side B's marked frame is from side A's
MARKED = 2  # the frame in which the sides differ


def frames(size, offset):
    """A grey video, brighter from frame to frame; ``offset`` is added to the right half of frame MARKED."""
    video = np.zeros((size.frames, size.height, size.width, 3), np.uint8)
    video += (40 + 10 * np.arange(size.frames, dtype=np.uint8))[:, None, None, None]
    video[min(MARKED, size.frames - 1), :, size.width // 2 :, 0] += np.uint8(offset)
    return video


class FakeEngine:
    """Exact and two kernels; ``pause`` is what a step takes. ``closed`` counts engines that were let go."""

    name, floor_method = "fake", "one way against another"
    closed = 0

    def __init__(self, pause=0.0):
        self.pause = pause
        self.on_preview = None
        self.size = None

    def describe(self):
        return {"engine": self.name, "device": "<b>no device</b>"}

    def check(self, request, sides):
        _ = request.scene
        self.size = request.size

    def _steps(self, steps, on_step):
        for i in range(steps):
            time.sleep(self.pause)
            if self.on_preview:
                self.on_preview(frames(self.size, 0)[0])
            on_step(i + 1, steps)

    def warm_up(self, request, side, on_step):
        self._steps(1, on_step)

    def generate(self, request, side, on_step):
        self._steps(request.steps, on_step)
        exact = side.precision is Precision.EXACT
        kernel = {"exact": "exact", "fp4": "fp4-emulated"}.get(side.wish, f"{side.wish}-sm90")
        line = {"wished": side.wish, "kernel": kernel, "reason": "told to", "fell_back": False, "calls": 24}
        seconds = 2.0 if exact else 1.0
        return Generation(
            seconds, [seconds / request.steps] * request.steps, [line], seconds / 2, None, handle=0 if exact else SHIFT
        )

    def exact(self, request, second_way, on_step):
        self._steps(request.steps, on_step)
        return Generation(1.0, [1.0], [], handle=1 if second_way else 0)

    def finish(self, generation):
        generation.video = frames(self.size, generation.handle)
        generation.decode_seconds = 0.5

    def inspect(self, request, a, b, on_step):
        each = {"a": ERRORS, "b": ERRORS, "floor": ERRORS}
        row = {"layer": 0, "kind": "self", "step": 0, "sigma": 1.0, "q_tokens": 320, "k_tokens": 320, **each}
        return Inspection([row], [{"step": 0, "sigma": 1.0, **each}])

    def close(self):
        type(self).closed += 1


@pytest.fixture(scope="session")
def gradio():
    return pytest.importorskip("gradio", reason="gradio is not installed: pip install 'comfy-sage3[app]'")


@pytest.fixture(scope="session")
def launch(gradio, tmp_path_factory):
    """``launch(pause, **services)`` starts an app of its own and gives (address, services); all are closed at the end."""
    from comfy_sage3.app.launch import private_folder, start
    from comfy_sage3.app.services import Services

    with contextlib.ExitStack() as undo:
        undo.enter_context(private_folder())

        def launched(pause=0.0, **options):
            given = {"open_engine": lambda name: FakeEngine(pause), "out": tmp_path_factory.mktemp("out") / "runs"}
            services = Services(**given | options)
            page, address = start(services, host="127.0.0.1", port=0)
            undo.callback(page.close, verbose=False)
            return address, services

        yield launched


@pytest.fixture(scope="session")
def app(launch):
    """One app for all tests that do not change it for others."""
    return launch()


def find_chromium(playwright):
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("SAGE3_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None and not Path(playwright.chromium.executable_path).exists():
        pytest.skip("There is no Chromium: install the distribution's or Playwright's, or set SAGE3_CHROMIUM")
    return path


@pytest.fixture(scope="module")  # while Playwright is open, its event loop runs, and no other test could run one
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=find_chromium(playwright), args=["--no-sandbox"])
        yield made
        made.close()
