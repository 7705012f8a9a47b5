"""The routes for the front end, against the stand-in: what they answer, what is kept, and how a build is told."""

import asyncio
import json
import sys
import types

import pytest

from comfy_sage3.comfyui import routes
from comfy_sage3.kernels import build


@pytest.fixture
def server(comfy, monkeypatch):
    """A registered server whose doctor answers at once."""
    monkeypatch.setattr(routes, "_runs", type(routes._runs)())
    monkeypatch.setattr(routes, "_build", None)
    monkeypatch.setattr(routes, "_doctor", None)
    monkeypatch.setattr(build, "_listeners", [])
    routes.register()
    return comfy.Server.instance


def get(server, path, **query):
    """What the browser reads: (status, data)."""
    answer = asyncio.run(server.routes.handlers[path](types.SimpleNamespace(query=query)))
    return answer.status, json.loads(answer.body)


def test_the_doctor_is_asked_once_and_only_on_demand(server, monkeypatch):
    asked = []
    monkeypatch.setattr(routes.doctor, "examine", lambda: asked.append(1) or {"self_test": [{"cosine": float("nan")}]})
    assert get(server, "/sage3/doctor", known="1") == (200, None)
    assert asked == []
    found = {"self_test": [{"cosine": None}]}  # NaN is not JSON
    assert get(server, "/sage3/doctor") == get(server, "/sage3/doctor") == (200, found)
    assert get(server, "/sage3/doctor", known="1") == (200, found)
    assert asked == [1]


def test_the_doctor_does_not_hold_up_the_event_loop(server, monkeypatch):
    """The examination waits for something that only the loop can bring."""
    import threading

    go = threading.Event()
    monkeypatch.setattr(routes.doctor, "examine", lambda: {"waited": go.wait(10)})

    async def both():
        asked = asyncio.ensure_future(server.routes.handlers["/sage3/doctor"](types.SimpleNamespace(query={})))
        await asyncio.sleep(0.05)
        go.set()
        return await asked

    assert json.loads(asyncio.run(both()).body) == {"waited": True}


def test_a_doctor_that_breaks_is_told(server, monkeypatch):
    monkeypatch.setattr(routes.doctor, "examine", lambda: 1 / 0)
    assert get(server, "/sage3/doctor") == (500, {"error": "ZeroDivisionError: division by zero"})


def test_the_real_doctor_is_what_the_route_answers(server):
    status, found = get(server, "/sage3/doctor")
    assert status == 200
    assert found["versions"]["torch"]
    assert {test["precision"] for test in found["self_test"]} == {"fp4", "int8", "int8-fast", "exact"}


def test_the_last_run_of_each_node_is_kept_and_no_more(server):
    for i in range(routes.MOST_RUNS + 3):
        routes.remember({"node": str(i), "step": 1})
    routes.remember({"node": "10", "step": 2, "seconds": {"exact": float("inf")}})
    kept = routes.last()
    assert len(kept) == routes.MOST_RUNS
    assert kept[-1]["step"] == 2
    assert kept[0]["node"] == "3"
    status, answer = get(server, "/sage3/runs")
    assert status == 200
    assert answer["build"] is None
    assert answer["runs"][-1] == {"node": "10", "step": 2, "seconds": {"exact": None}}


def test_a_build_reaches_the_browsers_and_those_that_come_later(server):
    build.tell("building", "wait")
    build.tell("failed", "no compiler")
    first, second = {"state": "building", "text": "wait"}, {"state": "failed", "text": "no compiler"}
    assert server.sent == [("sage3.build", first), ("sage3.build", second)]
    assert get(server, "/sage3/runs")[1]["build"] == second


@pytest.mark.parametrize("fault", ["no server", "no instance"])
def test_without_a_server_nothing_is_registered(comfy, monkeypatch, fault):
    monkeypatch.setattr(build, "_listeners", [])
    if fault == "no server":
        monkeypatch.setitem(sys.modules, "server", None)
    else:
        monkeypatch.setattr(comfy.Server, "instance", None)
    routes.register()
    assert build._listeners == []
    routes.on_build("built", "nobody hears it")
