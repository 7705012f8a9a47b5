"""A real ComfyUI, its own page in a headless Chromium, and the A/B workflow run once on it: once for each renderer.

COMFYUI_PATH names a checkout, COMFYUI_PYTHON its Python, SAGE3_CHROMIUM a Chromium (else one on PATH, or Playwright's).
SAGE3_SCREENSHOTS names a folder for pictures of what was tested; without it none are kept.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from given import LOADS_THE_BUNDLED_VAE, version

from comfy_sage3.workflow import serve
from comfy_sage3.workflow.server import find_python

sys.path.insert(0, str(Path(__file__).parent))  # for screen.py


@pytest.fixture(scope="session")
def client():
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: no real ComfyUI to show the nodes")
    comfyui = Path(os.environ["COMFYUI_PATH"])
    given = os.environ.get("COMFYUI_PYTHON")
    with serve(comfyui, python=find_python(comfyui, Path(given) if given else None)) as made:
        yield made


@pytest.fixture(scope="module")  # while Playwright is open, its event loop runs, and no other test could run one
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    with api.sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        path = os.environ.get("SAGE3_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("There is no Chromium: install the distribution's or Playwright's, or set SAGE3_CHROMIUM")
        made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module", params=["classic", "vue"])
def screen(request, client, browser):
    """The A/B workflow, opened and run through the page."""
    from screen import open_page, workflow

    if version() < LOADS_THE_BUNDLED_VAE:
        pytest.skip("this ComfyUI cannot load the bundled model's VAE: test_older_front_end.py is for those")
    made = open_page(client, browser, request.param)
    page = made.page
    page.evaluate("made => app.loadGraphData(made)", workflow(seed=1 if request.param == "vue" else 2))
    page.wait_for_timeout(1000)
    page.evaluate(
        """() => {
            window.sage3Seen = [];
            window.comfyAPI.api.api.addEventListener("sage3.status", ({ detail }) => {
                const box = document.querySelector(`.sage3-status[data-node="${detail.node}"]`);
                setTimeout(() => detail.node === "20" && detail.running && window.sage3Seen.push(box.innerText), 0);
            });
        }"""
    )
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("() => document.querySelector('.sage3-compare .sage3-count')?.textContent", timeout=240_000)
    page.wait_for_timeout(1000)
    made.live = page.evaluate("() => window.sage3Seen")
    (entry,) = list(client._json("/history?max_items=1").values())
    made.outputs = entry["outputs"]
    yield made
    page.close()
