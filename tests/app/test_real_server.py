"""A real ComfyUI server, driven through the app's page in Chromium, and a sweep on it by page and by command.

COMFYUI_PATH names a checkout, COMFYUI_PYTHON its Python.
"""

import json
import os
from pathlib import Path

import pytest

from comfy_sage3.app.services import open_engine, open_workflow
from comfy_sage3.cli import main
from comfy_sage3.workflow import serve
from comfy_sage3.workflow.server import find_python

from .test_api import wait_for
from .test_browser import choose, fill, opened
from .test_study_browser import clean, progress, small

pytestmark = pytest.mark.skipif(
    not os.environ.get("COMFYUI_PATH"), reason="COMFYUI_PATH is not set: no real ComfyUI for the app to run on"
)
WORKFLOW = Path(__file__).parents[2] / "workflows" / "api" / "text_to_video_ab.json"
LONG = 300_000  # ms


@pytest.fixture(scope="module")
def server():
    comfyui, given = Path(os.environ["COMFYUI_PATH"]), os.environ.get("COMFYUI_PYTHON")
    with serve(comfyui, python=find_python(comfyui, Path(given) if given else None)) as client:
        yield client


@pytest.fixture(scope="module")
def served(launch, server):
    """(address, services) of an app whose engine is that server, as ``--engine URL`` makes it."""
    return launch(engine=server.url, open_engine=open_engine, open_workflow=open_workflow)


def idle(server):
    queue = server._json("/queue")
    return not queue["queue_running"] and not queue["queue_pending"]


def run(page, steps):
    fill(page, "#steps input[type=number]", steps)
    choose(page, "Size", "64x64")
    page.click("#run")


def test_the_bundled_model_on_a_server_through_the_page(browser, served, server):
    page = opened(browser, served[0])
    assert page.get_by_label("Address of the ComfyUI server").input_value() == server.url
    run(page, 4)
    page.wait_for_function("() => /step [1-4] of 4/.test(document.querySelector('#progress')?.innerText)", timeout=LONG)
    page.wait_for_function("() => document.querySelectorAll('.s3-preview:not([hidden])').length === 2", timeout=LONG)
    page.wait_for_function("() => document.querySelector('#verdict').innerText.includes('comfyui engine')", timeout=LONG)
    page.wait_for_function("() => !document.querySelector('#run').disabled")
    numbers = page.locator("#numbers").inner_text()
    assert "calls on fp4-emulated" in numbers
    assert "two runs of the server's own exact attention" in page.locator("#numbers").text_content()
    assert page.locator(".s3-count").inner_text() == "1 / 17"
    (kept,) = served[1].out.glob("*/metrics.json")
    assert json.loads(kept.read_text())["environment"]["server"] == server.url
    clean(page)


def test_a_workflow_of_the_visitors_own_through_the_page(browser, served, tmp_path):
    """Side A of the A/B workflow alone: its own size and steps stay, its Sage3 Attention node is set for each side."""
    graph = {key: node for key, node in json.loads(WORKFLOW.read_text("utf-8")).items() if int(key) < 20}
    graph["5"]["inputs"] |= {"width": 48, "height": 64, "length": 5}
    graph["11"]["inputs"]["steps"] = 3
    graph["10"]["inputs"] |= {"emulate": True, "min_tokens": 16}
    (tmp_path / "mine.json").write_text(json.dumps(graph))
    page = opened(browser, served[0])
    page.locator("input[type=file]").last.set_input_files(tmp_path / "mine.json")
    page.get_by_text("mine.json").first.wait_for()
    page.click("#run")
    page.wait_for_function("() => document.querySelector('#verdict').innerText.includes('48 × 64')", timeout=LONG)
    assert "3 steps" in page.locator("#verdict").inner_text()
    assert page.locator(".s3-count").inner_text() == "1 / 5"
    assert "calls on fp4-emulated" in page.locator("#numbers").inner_text()
    clean(page)


def test_a_stop_on_the_page_ends_the_servers_run(browser, served, server):
    page = opened(browser, served[0])
    before = len(list(served[1].out.glob("*/metrics.json")))
    run(page, 100)
    page.wait_for_function("() => /step \\d+ of 100/.test(document.querySelector('#progress')?.innerText)", timeout=LONG)
    page.click("#stop")
    page.wait_for_function("() => document.querySelector('.s3-doing')?.textContent.startsWith('Stopped')", timeout=60_000)
    wait_for(lambda: idle(server))
    assert len(list(served[1].out.glob("*/metrics.json"))) == before
    clean(page)


def test_a_sweep_on_a_server_through_the_page(browser, served, server):
    page = opened(browser, served[0])
    page.get_by_role("tab", name="Study").click()
    small(page, seeds="1", prompts="a red circle")
    page.locator("#study-make").click()
    progress(page, "2 of 2 cells have a result; 2 were run now.")
    page.wait_for_function("() => document.querySelectorAll('#study-plots img').length >= 1", timeout=LONG)
    (sweep,) = [entry for entry in served[1].history.list() if entry.kind == "sweep"]
    cells = list((served[1].out / sweep.id / "cells").glob("*/metrics.json"))
    assert [json.loads(cell.read_text())["environment"]["server"] for cell in cells] == [server.url] * 2
    clean(page)


def test_a_sweep_on_a_server_by_command_goes_on_where_it_was(server, tmp_path, capsys):
    data = {"prompts": ["a red circle"], "seeds": [1], "precisions": ["fp4"], "size": "64x64x5", "steps": 2}
    data |= {"min_tokens": 0, "engine": server.url}
    words = ["compare", "--sweep", str(tmp_path / "sweep.json"), "--out", str(tmp_path / "out")]
    (tmp_path / "sweep.json").write_text(json.dumps(data))
    assert main(words) == 0
    assert "1 of 1 cells have a result; 1 were run now." in capsys.readouterr().out
    (tmp_path / "sweep.json").write_text(json.dumps(data | {"precisions": ["fp4", "int8"]}))
    assert main(words) == 0
    assert "2 of 2 cells have a result; 1 were run now." in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [s["contestant"] for s in found["summary"]] == ["fp4", "int8"]
    assert idle(server)
