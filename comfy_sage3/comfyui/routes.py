"""What the front end asks the server for: the machine's doctor result, the last runs, and news of a kernel build.

GET /sage3/doctor            examines the machine once per process, off the event loop
GET /sage3/doctor?known=1    the same if it has been examined, else null
GET /sage3/runs              {"runs": [the last payload of each workflow's node, oldest first],
                             "build": the last event or null}
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import OrderedDict
from typing import Any

from .. import doctor
from ..kernels import build

BUILD_EVENT = "sage3.build"
MOST_RUNS = 32
log = logging.getLogger("comfy_sage3")

_lock = threading.Lock()
_runs: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()  # by workflow and node
_build: dict[str, str] | None = None
_doctor: dict[str, Any] | None = None
_examining = threading.Lock()


def remember(payload: dict[str, Any]) -> None:
    """Keep ``payload`` as the last of its node; those of the ``MOST_RUNS`` nodes that ran last are kept."""
    with _lock:
        key = str(payload.get("workflow")), str(payload.get("node"))
        _runs.pop(key, None)
        _runs[key] = payload
        while len(_runs) > MOST_RUNS:
            _runs.popitem(last=False)


def last() -> list[dict[str, Any]]:
    """The last payload of each node, the latest at the end."""
    with _lock:
        return list(_runs.values())


def examined() -> dict[str, Any]:
    """The doctor's result, found once; two who ask at the same time wait for one examination."""
    global _doctor
    with _examining:
        if _doctor is None:
            _doctor = plain(doctor.examine())
        return _doctor


def on_build(state: str, text: str) -> None:
    """Tell the browsers that kernels are being built, are built, or could not be."""
    global _build
    _build = {"state": state, "text": text}
    server = running_server()
    if server is not None:
        server.send_sync(BUILD_EVENT, _build)


def register() -> None:
    """Add the routes and listen for builds; nothing where ComfyUI's nodes are used without its server."""
    server = running_server()
    if server is None:
        return
    from aiohttp import web

    @server.routes.get("/sage3/doctor")
    async def get_doctor(request: Any) -> Any:
        if request.query.get("known"):
            return web.json_response(_doctor)
        try:
            return web.json_response(await asyncio.get_running_loop().run_in_executor(None, examined))
        except Exception as error:  # a broken driver is what the reader wants to know about
            log.warning("Sage3: this machine could not be examined: %s", error)
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=500)

    @server.routes.get("/sage3/runs")
    async def get_runs(request: Any) -> Any:
        return web.json_response({"runs": plain(last()), "build": _build})

    build.listen(on_build)


def running_server() -> Any:
    """ComfyUI's server, or None."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)


def plain(value: Any) -> Any:
    """``value`` for strict JSON: NaN and infinity, which browsers refuse, become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
