"""A run in its thread: what it tells, how it is stopped, what it leaves."""

import importlib
import threading
import time

import numpy as np
import pytest

from comfy_sage3.app import kept
from comfy_sage3.app.runs import Stops, plain, watch
from comfy_sage3.app.services import HIDDEN_ERROR, Services
from comfy_sage3.compare.engine import Request, Side
from comfy_sage3.compare.measure import Comparison
from comfy_sage3.demo.sizes import Size
from comfy_sage3.errors import EngineError, InputError
from comfy_sage3.precision import Precision

from .conftest import PROMPT, FakeEngine

REQUEST = Request(PROMPT, Size(32, 32, 5), steps=3)
A, B = Side("A", Precision.EXACT), Side("B", Precision.FP4)


def run(services, open_engine, stop=None, keep=lambda comparison: "kept", request=REQUEST):
    return watch(services, open_engine, request, A, B, 1, stop or threading.Event(), keep)


def test_a_run_tells_of_both_sides_and_ends_with_what_was_kept(tmp_path):
    closed = FakeEngine.closed
    told = [
        plain(x, lambda frame: str(frame.shape)) if not isinstance(x, tuple) else x
        for x in run(Services(tmp_path), lambda: FakeEngine(0.3))
    ]
    *states, (comparison, name) = told
    assert isinstance(comparison, Comparison)
    assert name == "kept"
    assert comparison.videos["a"].shape == (5, 32, 32, 3)
    assert {side["name"] for side in states[0]["sides"].values()} == {"A (exact)", "B (fp4)"}
    for key in ("a", "b"):
        assert any(state["sides"][key]["active"] and "step" in state["sides"][key]["text"] for state in states)
        assert states[-1]["sides"][key]["preview"] == "(32, 32, 3)"
    assert [state["fraction"] for state in states] == sorted(state["fraction"] for state in states)
    assert states[-1]["doing"] == "done"
    assert not states[-1]["running"]
    assert FakeEngine.closed == closed + 1


def test_stopped_between_steps_nothing_is_kept_and_the_gpu_is_free(tmp_path):
    services, stop, closed = Services(tmp_path), threading.Event(), FakeEngine.closed
    states = []
    for state in run(services, lambda: FakeEngine(0.2), stop, keep=lambda c: pytest.fail("was kept")):
        states.append(state)
        stop.set()
    assert states[-1].failed.startswith("Stopped")
    assert not plain(states[-1], str)["failed"]  # it was asked for: no red frame
    assert states[-1].fraction < 1
    assert FakeEngine.closed == closed + 1
    assert services.gpu.acquire(blocking=False)


def test_a_reader_that_leaves_ends_the_run(tmp_path):
    services, closed = Services(tmp_path), FakeEngine.closed
    reader = run(services, lambda: FakeEngine(0.2))
    next(reader)
    reader.close()  # what gradio does when the tab is closed
    assert FakeEngine.closed == closed + 1
    assert services.gpu.acquire(blocking=False)


def test_the_embedded_model_is_as_it_was_after_a_stop(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from comfy_sage3.compare.diffusers_engine import HOOK, WAN_MODULE, DiffusersEngine

    engine = DiffusersEngine("cpu")
    module = importlib.import_module(WAN_MODULE)
    original, stop = getattr(module, HOOK), threading.Event()
    seen = []
    for state in run(Services(tmp_path), lambda: engine, stop, request=Request(PROMPT, Size(32, 32, 1), steps=100)):
        seen.append(getattr(module, HOOK) is original)
        blocks = engine.transformer.blocks if hasattr(engine, "transformer") else []
        if state.sides["a"].done:
            stop.set()
    assert not all(seen)  # attention was routed while it ran
    assert getattr(module, HOOK) is original
    assert not any(block.attn1._forward_hooks or block.attn1._forward_pre_hooks for block in blocks)
    assert state.failed.startswith("Stopped")


def test_errors_meant_for_people_are_told_and_others_only_where_that_is_safe(tmp_path):
    def fails(error):
        def opened():
            raise error

        return opened

    def last(services, error):
        return list(run(services, fails(error)))[-1].failed

    assert last(Services(tmp_path), EngineError("No server: start it.")) == "No server: start it."
    assert "secret" in last(Services(tmp_path), RuntimeError("secret"))
    assert last(Services(tmp_path, mask_errors=True), RuntimeError("secret")) == HIDDEN_ERROR


def test_a_stop_reaches_a_run_that_waits_and_no_other():
    stops = Stops()
    assert not stops.stop("one")
    stops.ask("one")
    stops.ask("two")
    assert stops.stop("one")
    assert stops.take("one").is_set()
    assert not stops.take("two").is_set()
    stops.ask("one")  # asked for anew: the old stop is forgotten
    stop = stops.take("one")
    assert not stop.is_set()
    stops.drop("one", stop)
    assert not stops.stop("one")


def test_too_many_that_wait_are_told_so_and_those_who_leave_make_room():
    stops = Stops(most_waiting=2)
    stops.ask("runs")
    stops.take("runs")
    stops.ask("one")
    stops.ask("two")
    with pytest.raises(InputError, match="queue is full, with 2 waiting"):
        stops.ask("three")
    stops.ask("two")  # who waits already may ask anew
    stops.leave("one")
    stops.ask("three")
    stops.leave("runs")
    assert stops.take("runs").is_set()


def test_two_runs_take_turns_at_the_gpu(tmp_path):
    services, running, most = Services(tmp_path), set(), []

    class Counting(FakeEngine):
        def warm_up(self, request, side, on_step):
            running.add(id(self))
            most.append(len(running))
            super().warm_up(request, side, on_step)

        def close(self):
            running.discard(id(self))
            super().close()

    def whole():
        for _ in run(services, lambda: Counting(0.02)):
            pass

    threads = [threading.Thread(target=whole) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 4  # each of the two warmed up two sides


def test_a_kept_run_is_found_by_its_name_and_by_nothing_else(tmp_path):
    (comparison, name) = list(
        watch(Services(tmp_path), FakeEngine, REQUEST, A, B, 1, threading.Event(), lambda c: kept.keep(c, tmp_path))
    )[-1]
    again = kept.load(name, tmp_path)
    assert again.metrics == comparison.metrics
    assert all(np.array_equal(again.videos[key], comparison.videos[key]) for key in ("a", "b"))
    assert kept.latest(tmp_path) == name
    for wrong in ("", "..", "../" + name, "/etc", name + "/", "x" * 99, None, 3):
        with pytest.raises(Exception, match="no such run"):
            kept.load(wrong, tmp_path)


def test_the_recorded_comparison_is_whole_small_and_says_that_it_was_emulated():
    comparison = kept.load(kept.RECORDED, None)
    assert comparison.metrics["sides"]["b"]["precision"] == "fp4"
    assert comparison.metrics["note"]
    assert comparison.videos["b"].shape == (17, 128, 128, 3)
    folder = kept.Path(kept.__file__).parent / kept.RECORDED
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 400_000


def test_previews_are_not_part_of_a_steps_time():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from comfy_sage3.compare.diffusers_engine import DiffusersEngine

    engine, slow = DiffusersEngine("cpu"), []

    def look(frame):
        slow.append(frame.shape)
        time.sleep(3)

    engine.on_preview = look
    began = time.monotonic()
    run_ = engine.generate(Request(PROMPT, Size(32, 32, 5), steps=2), A, lambda done, steps: None)
    whole = time.monotonic() - began
    assert slow == [(32, 32, 3)]  # the second was not due: previews may take a fifth of the time
    assert run_.seconds_total < whole - 3
    assert len(run_.seconds_per_step) == 2
