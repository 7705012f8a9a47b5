"""Counts by layer and step, seconds by kernel, and seconds saved only where both were timed."""

import pytest
import torch

from comfy_sage3.comfyui import routes, status
from comfy_sage3.comfyui import tally as tally_module
from comfy_sage3.comfyui.hook import Hook
from comfy_sage3.comfyui.install import install
from comfy_sage3.comfyui.tally import Tally
from comfy_sage3.precision import PrecisionPlan

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock finds it a second later."""
    now = iter(range(10_000))
    monkeypatch.setattr(tally_module.time, "perf_counter", lambda: float(next(now)))


def timed(tally, kernel, shape, times=1, layer="0"):
    for _ in range(times):
        with tally.timing(layer, kernel, (shape,), CPU):
            pass


def test_a_cell_shows_who_served_most_of_the_work():
    tally = Tally()
    for kernel, weight in (("exact", 10), ("exact", 10), ("fp4-sm120", 1000)):
        tally.record("0", 1, kernel, "", False, weight)
    assert tally.cells(3) == [[None, "fp4-sm120", None]]
    assert tally.rows["0"].kernels == {"exact": 2, "fp4-sm120": 1}


def test_seconds_add_up_by_kernel_and_layer(clock):
    tally = Tally()
    timed(tally, "int8-sm90", 4096, 3)
    timed(tally, "exact", 77, 2, layer="1")
    assert tally.seconds_by_kernel() == {}  # not before the run is over
    tally.settle()
    assert tally.seconds_by_kernel() == {"int8-sm90": 3.0, "exact": 2.0}
    assert tally.seconds_by_layer() == {"0": 3.0, "1": 2.0}


def test_seconds_saved_need_exact_calls_of_the_same_shape(clock):
    tally = Tally()
    timed(tally, "int8-sm90", 4096, 3)
    timed(tally, "exact", 77, 2)
    tally.settle()
    assert tally.saved_seconds() is None
    with tally.timing("0", "exact", (4096,), CPU):
        tally_module.time.perf_counter(), tally_module.time.perf_counter()  # takes 3 s where int8 took 1
    tally.settle()
    assert tally.saved_seconds() == 3 * (3.0 - 1.0)


def test_a_call_that_raises_is_not_timed(clock):
    tally = Tally()
    with pytest.raises(ZeroDivisionError), tally.timing("0", "exact", (1,), CPU):
        1 / 0  # noqa: B018
    tally.settle()
    assert tally.seconds_by_kernel() == {}


def test_the_payload_of_a_run(comfy):
    hook = Hook(PrecisionPlan("fp4", end=0.5, min_tokens=64), emulate=True, node_id="7")
    running = []
    model = install(comfy.Patcher(), hook, lambda h: None, lambda: "p", lambda h: running.append(status.payload(h)))
    model.sample([1.0, 0.4])
    model.sample([1.0], tokens=32)
    now = status.payload(hook)
    assert now["map"] == {
        "layers": ["0", "1"], "steps": 3, "cells": [["fp4-emulated", "exact", "exact"]] * 2,
    }  # fmt: skip
    counts = ("calls", "accelerated", "fell_back", "exact", "step", "steps", "running", "emulated", "planned", "prompt")
    assert {k: now[k] for k in counts} == {
        "calls": 6, "accelerated": 2, "fell_back": 0, "exact": 4, "step": 3, "steps": 3, "running": False,
        "emulated": True, "planned": False, "prompt": "p",
    }  # fmt: skip
    (first, _) = now["layers"]
    assert (first["layer"], first["calls"], first["kernels"]) == ("0", 3, {"fp4-emulated": 1, "exact": 2})
    assert first["reasons"] == ["step outside the window 0% to 50%", "fewer than 64 tokens"]
    assert set(now["seconds"]) == {"fp4-emulated", "exact"}
    assert min(now["seconds"].values()) > 0
    assert now["saved_seconds"] is None  # emulated: the speed is not real
    assert [(r["step"], r["steps"], r["running"], r["seconds"]) for r in running] == [
        (2, 2, True, None), (2, 2, True, None), (3, 3, True, None),
    ]  # fmt: skip


def test_events_while_running_are_few_and_the_last_one_is_always_sent(comfy, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    hook = Hook(PrecisionPlan("fp4"), emulate=True, node_id="7")

    def on_step(h):
        now[0] += 0.1
        status.progress(h)

    model = install(comfy.Patcher(), hook, status.publish, lambda: "p", on_step)
    model.sample([1.0] * 10)
    sent = [data for event, data in comfy.Server.instance.sent if event == "sage3.status"]
    assert [data["running"] for data in sent].count(True) in (3, 4)
    assert sent[-1]["running"] is False
    assert routes.last()[-1] == sent[-1]  # for a page that is opened later


def test_a_model_without_layers_is_told_apart(comfy):
    hook = Hook(PrecisionPlan("fp4"), emulate=True)
    hook.count(None, "fp4", "fp4-emulated", "asked for", False, 1)
    assert status.NO_LAYERS in status.text(hook)
    hook.count(None, "fp4", "fp4-emulated", "asked for", False, 1)
    hook.tally.record("0", 0, "exact", "", False, 1)
    assert status.NO_LAYERS not in status.text(hook)
