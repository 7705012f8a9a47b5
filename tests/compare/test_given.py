"""A workflow of the user's own: what of it is set, and what is never sent to a server."""

import copy
import json
from pathlib import Path

import pytest

from comfy_sage3.compare.comfyui_engine import given_graph
from comfy_sage3.compare.engine import Side, WorkflowRequest
from comfy_sage3.compare.given import MOST_NODES, read, read_text
from comfy_sage3.errors import InputError
from comfy_sage3.precision import Precision

WORKFLOWS = Path(__file__).parents[2] / "workflows" / "api"
FP4 = Side("B", Precision.FP4)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture
def small():
    return {
        "1": node("UNETLoader", unet_name="x.safetensors", weight_dtype="default"),
        "2": node("Sage3Attention", model=["1", 0], precision="auto", end_percent=1.0, min_tokens=7, emulate=True),
        "3": node("CLIPTextEncode", text="a fox", clip=["9", 0]),
        "4": node("KSampler", model=["2", 0], positive=["3", 0], seed=5, steps=30, cfg=4.5),
        "5": node("Sage3Report", model=["2", 0], latent=["4", 0]),
        "6": node("VAEDecode", samples=["5", 1], vae=["8", 0]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="../../x"),
        "8": node("VAELoader", vae_name="v.safetensors"),
        "9": node("CLIPLoader", clip_name="c.safetensors", type="wan"),
    }


def test_only_the_attention_node_is_set_and_nothing_is_saved(small):
    given = read("mine", small)
    assert (given.attention, given.samplers, given.reports, given.pictures) == (("2",), ("4",), ("5",), "6")
    assert (given.prompt, given.seed, given.steps, given.cfg) == ("a fox", 5, 30, 4.5)
    graph = given_graph(given, FP4, 1e-6)
    assert graph["2"]["inputs"] == {**small["2"]["inputs"], "precision": "fp4", "end_percent": 1 - 1e-6}
    assert {key: graph[key] for key in ("1", "3", "4", "5", "9")} == {key: small[key] for key in ("1", "3", "4", "5", "9")}
    assert set(graph) == {"1", "2", "3", "4", "5", "9"}  # decoding comes later, saving never
    assert given.graph["2"]["inputs"]["precision"] == "auto"  # the given one stays as it was


def test_a_warm_up_is_short_and_a_saved_plan_is_loaded_for_the_nodes_own_model(small):
    given = read("mine", small)
    assert given_graph(given, FP4, 0, short=True)["4"]["inputs"]["steps"] == 2
    graph = given_graph(given, Side("B", Precision.AUTO, saved="draft"), 0)
    assert graph["2"]["inputs"]["plan"] == ["2-plan", 0]
    assert graph["2-plan"] == node("Sage3LoadPlan", model=["1", 0], plan_name="draft")


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*_to_*.json")), ids=lambda path: path.stem)
def test_the_packs_own_workflows_are_read_or_refused_for_drawing_more_than_one(path):
    if path.stem.startswith("text_to_video_ab"):
        with pytest.raises(InputError, match="decodes 0 pictures|Sage3Compare"):
            read_text(path.stem, path.read_text("utf-8"))
        return
    given = read_text(path.stem, path.read_text("utf-8"))
    graph = given_graph(given, FP4, 1e-6)
    assert all(graph[key]["inputs"]["precision"] == "fp4" for key in given.attention)
    assert not {"SaveVideo", "SaveImage", "CreateVideo"} & {n["class_type"] for n in graph.values()}
    request = WorkflowRequest.of(given)
    assert request.scene is None
    assert request.data((5, 48, 64, 3)) | {"width": 64, "height": 48, "frames": 5, "workflow": path.stem} == request.data(
        (5, 48, 64, 3)
    )


def change(workflow, path, value):
    made = copy.deepcopy(workflow)
    part = made
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("1", "class_type"), "ExecutePython", "ExecutePython"),
        (("1", "class_type"), "OpenAIChatNode", "not on the list"),
        (("1", "class_type"), "<script>" * 50, "not on the list"),
        (("1", "class_type"), 3, "API format"),
        (("1", "inputs"), [], "API format"),
        (("2", "inputs", "end_percent"), ["9", 0], "end_percent"),
        (("4", "inputs", "seed"), float("nan"), "neither a plain value"),
        (("4", "inputs", "seed"), float("inf"), "neither a plain value"),
        (("4", "inputs", "positive"), ["3", 0, 1], "neither a plain value"),
        (("4", "inputs", "positive"), {"a": {"b": 1}}, "neither a plain value"),
        (("3", "inputs", "text"), "x" * 100_000, "neither a plain value"),
        (("4", "inputs", "positive"), ["77", 0], "not there"),
        (("4", "inputs", "positive"), ["7", 0], "not there"),
        (("1", "inputs", "unet_name"), ["4", 0], "circle"),
        (("5", "class_type"), "PreviewAny", "not there|no Sage3 Report"),
        (("2", "class_type"), "ModelSamplingSD3", "no Sage3 Attention"),
        (("4", "class_type"), "VAEEncode", "no sampler"),
        (("8", "class_type"), "VAEDecode", "decodes 2"),
    ],
)
def test_what_is_not_to_be_sent_is_refused_in_one_sentence(small, path, value, says):
    with pytest.raises(InputError, match=says) as refused:
        read("mine", change(small, path, value))
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "3", '{"1": NaN}', "{" * 100_000, "[" * 100_000, '{"nodes": []}'])
def test_what_is_no_workflow_is_refused(text):
    with pytest.raises(InputError, match="mine"):
        read_text("mine", text)


def test_too_many_nodes_and_too_many_bytes_are_refused(small):
    with pytest.raises(InputError, match=str(MOST_NODES)):
        read("mine", {str(i): node("VAELoader") for i in range(MOST_NODES + 1)})
    with pytest.raises(InputError, match="larger"):
        read_text("mine", json.dumps(small) + " " * (5 << 20))
