"""Who may talk to the app: the Host header is checked, and the browser is told to load nothing from elsewhere."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

HEADERS = (
    # gradio builds its page with inline scripts and new Function; nothing of it may come from or go to another host
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
        b"worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'; object-src 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
REFUSED = b"This app does not answer to that name: open it by its address, or start it with --name NAME."


def is_allowed(host: str, names: Iterable[str] = ()) -> bool:
    """Whether a Host header may be answered: localhost, any IP address, or one of ``names``.

    A page elsewhere that points its own name at this machine (DNS rebinding) always sends that name.
    """
    name = host.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") <= 1:
        name = name.partition(":")[0]
    name = name.rstrip(".")
    if name == "localhost" or name in {n.lower().rstrip(".") for n in names}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """ASGI middleware: 421 for a foreign Host, and ``HEADERS`` on every answer."""

    def __init__(self, app: Any, names: Iterable[str] = ()) -> None:
        self.app, self.names = app, tuple(names)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not is_allowed(hosts[0], self.names):
            if scope["type"] == "http":
                plain = (b"content-type", b"text/plain; charset=utf-8")
                await send({"type": "http.response.start", "status": 421, "headers": [plain]})
                await send({"type": "http.response.body", "body": REFUSED})
            else:
                await send({"type": "websocket.close", "code": 1008})
            return

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        await self.app(scope, receive, with_headers)
