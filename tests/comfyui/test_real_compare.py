"""The comparison on a real ComfyUI server: a workflow of the user's own, its live previews, and a stop between steps."""

import json
import os
from pathlib import Path

import pytest
from given import LOADS_THE_BUNDLED_VAE, kind, version

from comfy_sage3.compare.comfyui_engine import ComfyUIEngine
from comfy_sage3.compare.engine import Side, WorkflowRequest
from comfy_sage3.compare.given import read
from comfy_sage3.compare.measure import compare
from comfy_sage3.precision import Precision
from comfy_sage3.workflow import serve
from comfy_sage3.workflow.server import find_python

pytestmark = pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason="COMFYUI_PATH is not set: no real ComfyUI")
A, B = Side("A", Precision.EXACT), Side("B", Precision.FP4)


@pytest.fixture(scope="module")
def url():
    comfyui, given = Path(os.environ["COMFYUI_PATH"]), os.environ.get("COMFYUI_PYTHON")
    with serve(comfyui, python=find_python(comfyui, Path(given) if given else None)) as client:
        yield client.url


@pytest.fixture
def given():
    """Side A of the A/B workflow alone, small, and saved by a node that must not run."""
    path = Path(__file__).parents[2] / "workflows" / "api" / "text_to_video_ab.json"
    graph = {key: node for key, node in json.loads(path.read_text("utf-8")).items() if int(key) < 20}
    graph["5"]["inputs"] |= {"width": 64, "height": 64, "length": 17}
    graph["11"]["inputs"]["steps"] = 3
    return read("small", graph)


def test_a_given_workflow_is_compared_with_its_previews(url, given):
    if version() < LOADS_THE_BUNDLED_VAE:
        pytest.skip("this ComfyUI cannot load the bundled model's VAE")
    engine, seen = ComfyUIEngine(url, given), []
    engine.on_preview = lambda frame: seen.append(frame.shape)
    try:
        made = compare(engine, WorkflowRequest.of(given), A, B, repeats=1)
    finally:
        engine.close()
    m = made.metrics
    assert made.videos["a"].shape == (17, 64, 64, 3)
    assert (m["request"]["workflow"], m["request"]["width"], m["request"]["frames"]) == ("small", 64, 17)
    assert m["sides"]["a"]["report"][0]["kernel"] == "exact"
    assert any(kind(line["kernel"]) == "fp4" for line in m["sides"]["b"]["report"])
    assert len(m["timing"]["b"]["step_seconds"]["values"]) == 3
    assert not m["quality"]["end_to_end"]["a_vs_b"]["identical"]
    assert m["quality"]["end_to_end"]["noise_floor"]["identical"]
    assert m["quality"]["adherence"]["a"] == {}
    assert seen
    assert all(len(shape) == 3 and shape[2] == 3 for shape in seen)


def test_a_stop_between_steps_leaves_the_server_idle(url, given):
    class Enough(Exception):
        pass

    def enough(done, steps):
        raise Enough

    engine = ComfyUIEngine(url, given)
    try:
        with pytest.raises(Enough):
            engine.generate(WorkflowRequest.of(given), B, enough)
        again = engine.generate(WorkflowRequest.of(given), A, lambda done, steps: None)
    finally:
        engine.close()
    assert [line["kernel"] for line in again.report] == ["exact"]
