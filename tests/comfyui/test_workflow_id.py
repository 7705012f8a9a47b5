"""Which workflow a run is said to belong to: that of the prompt that runs, as whoever queued it gave it."""

import types

import pytest

from comfy_sage3.comfyui import routes, status
from comfy_sage3.comfyui.hook import Hook
from comfy_sage3.comfyui.install import install
from comfy_sage3.comfyui.workflow_id import workflow_of
from comfy_sage3.precision import PrecisionPlan

WAITING = [(2, "waits", {}, {"extra_pnginfo": {"workflow": {"id": "of the one that waits"}}}, [])]


def running(comfy, extra, name="get_current_queue_volatile"):
    """A server that runs the prompt "p", queued with ``extra``."""
    item = (1, "p", {}, extra, [], {})
    comfy.Server.instance.prompt_queue = types.SimpleNamespace(**{name: lambda: ([item], WAITING)})


@pytest.mark.parametrize("look", ["get_current_queue_volatile", "get_current_queue"])  # the latter in older versions
def test_the_workflow_of_the_running_prompt_is_found(comfy, look):
    running(comfy, {"client_id": "x", "extra_pnginfo": {"workflow": {"id": "one", "nodes": []}}}, look)
    assert workflow_of("p") == "one"
    assert workflow_of("another") is None
    assert workflow_of(None) is None


@pytest.mark.parametrize(
    "extra",
    [
        *({}, None, {"extra_pnginfo": None}, {"extra_pnginfo": []}, {"extra_pnginfo": {"workflow": None}}),
        *({"extra_pnginfo": {"workflow": {"id": value}}} for value in (None, "", 3, ["x"], "x" * 101)),
    ],
)
def test_a_prompt_without_a_workflow_has_none_whatever_was_sent(comfy, extra):
    running(comfy, extra)
    assert workflow_of("p") is None


def test_without_a_server_or_its_queue_there_is_none(comfy, monkeypatch):
    assert workflow_of("p") is None
    monkeypatch.setattr(comfy.Server, "instance", None)
    assert workflow_of("p") is None


def test_a_cached_node_speaks_for_the_workflow_that_runs_now(comfy, monkeypatch):
    """The same graph in two tabs: ComfyUI makes the node's model once, and samples it for both."""
    monkeypatch.setattr(routes, "_runs", type(routes._runs)())
    model = install(comfy.Patcher(), Hook(PrecisionPlan("fp4"), emulate=True, node_id="7"), status.publish, lambda: "p")
    for name in ("one", "two"):
        running(comfy, {"extra_pnginfo": {"workflow": {"id": name}}})
        model.sample([1.0, 0.5])
    assert [data["workflow"] for _, data in comfy.Server.instance.sent] == ["one", "two"]
    assert [(run["workflow"], run["node"]) for run in routes.last()] == [("one", "7"), ("two", "7")]
