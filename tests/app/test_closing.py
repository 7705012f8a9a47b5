"""The app's end, with tabs still open."""

import asyncio
import json
import threading
import time
import urllib.request

import pytest

from comfy_sage3.app.closing import EndStreams

from .conftest import FakeEngine
from .test_api import SMALL, fetch, wait_for


def test_an_app_closes_at_once_though_a_run_streams_to_an_open_tab(gradio, tmp_path):
    from comfy_sage3.app.launch import private_folder, start
    from comfy_sage3.app.services import Services

    with private_folder() as folder:
        page, address = start(Services(tmp_path, open_engine=lambda name: FakeEngine(0.2)), host="127.0.0.1", port=0)
        (index,) = [d["id"] for d in json.loads(fetch(f"{address}config")[2])["dependencies"] if d["api_name"] == "compare"]
        body = json.dumps({"data": SMALL, "fn_index": index, "session_hash": "tab"}).encode()
        request = urllib.request.Request(f"{address}gradio_api/queue/join", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=30).close()
        heard, ended = [], threading.Event()

        def listen():
            with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=tab", timeout=60) as events:
                heard.extend(events)  # to the stream's own, orderly end
            ended.set()

        threading.Thread(target=listen, daemon=True).start()
        wait_for(lambda: any(b"sampling" in line for line in heard))
        began = time.monotonic()
        page.close(verbose=False)
        assert time.monotonic() - began < 3  # gradio alone waits five seconds, and leaves its thread behind
        assert ended.wait(5)
        assert not page.server.thread.is_alive()
    assert not folder.exists()


def answers(app, running, path="/gradio_api/queue/data"):
    """What comes out of the middleware around ``app``."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path}
    asyncio.run(asyncio.wait_for(EndStreams(app, running)(scope, None, send), 5))
    return sent


async def stream(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await asyncio.sleep(60)


async def short(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await asyncio.sleep(0.4)
    await send({"type": "http.response.body", "body": b"whole"})


async def broken(scope, receive, send):
    raise OSError("the visitor left")


def test_a_stream_is_completed_and_what_ends_by_itself_is_left_alone():
    ends = time.monotonic() + 0.5
    begun = answers(stream, lambda: time.monotonic() < ends)
    assert [(m["type"], m.get("status")) for m in begun] == [("http.response.start", 200), ("http.response.body", None)]
    assert answers(stream, lambda: False)[0]["status"] == 503  # asked for when it was too late
    assert answers(short, lambda: True)[-1]["body"] == b"whole"
    assert answers(short, lambda: False, "/config")[-1]["body"] == b"whole"  # no stream: it may end
    with pytest.raises(OSError, match="left"):
        answers(broken, lambda: True)
