"""The app's end: streams of events to open tabs are ended, which gradio would wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

STREAM = "/queue/data"  # gradio's stream of what becomes of a visitor's events; it does not end when the app does
LOOK = 0.25  # seconds between two looks at whether the app still runs


class EndStreams:
    """ASGI middleware: when ``running`` says False, answers that stream end at once, as if they were complete."""

    def __init__(self, app: Any, running: Callable[[], bool]) -> None:
        self.app, self.running = app, running

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(STREAM):
            await self.app(scope, receive, send)
            return
        begun = False

        async def noting(message: dict[str, Any]) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        answer = asyncio.ensure_future(self.app(scope, receive, noting))
        try:
            while not answer.done() and self.running():
                await asyncio.wait({answer}, timeout=LOOK)
            if not answer.done():
                answer.cancel()
                await asyncio.wait({answer})
                if not begun:
                    await send({"type": "http.response.start", "status": 503, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
            await answer
        finally:
            answer.cancel()
