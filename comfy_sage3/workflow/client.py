"""A client of ComfyUI's HTTP API: submit a workflow, watch it, fetch what it made."""

from __future__ import annotations

import contextlib
import json
import struct
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlencode, urlsplit

from ..errors import EngineError, InputError
from .document import Workflow
from .websocket import WebSocket

OnProgress = Callable[[str, float, float], None]
"""(node id, steps done, steps in all); 0 of 0 says that the node has begun."""
OnPicture = Callable[[bytes], None]
"""Called with a preview as an encoded picture."""
POLL_SECONDS = 0.5
_PICTURE, _PICTURE_WITH_DATA = 1, 4  # kinds of the server's binary messages


@dataclass(frozen=True)
class OutputFile:
    """A file that a node saved on the server."""

    node: str
    filename: str
    subfolder: str
    kind: str  # the server's folder: "output", "temp" or "input"


class ComfyClient:
    """Talks to the server at ``url``, such as http://127.0.0.1:8188; every failure is an EngineError.

    Use it as a context manager, or call ``close``, to give back the event connection.
    """

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url!r} is not the address of a server: give one like http://127.0.0.1:8188.")
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.client_id = uuid.uuid4().hex
        self._events: WebSocket | None = None

    def __enter__(self) -> ComfyClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the event connection, if one is open."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def system_stats(self) -> dict[str, Any]:
        """Versions and devices, as the server states them."""
        return self._json("/system_stats")

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The server's node definitions, or that of one node; {} for a node it does not have."""
        return self._json("/object_info" if node is None else f"/object_info/{node}")

    def submit(self, workflow: Workflow, previews: bool = False) -> str:
        """Queue ``workflow`` and return its prompt id. Raises EngineError with what the server objects to.

        ``previews`` asks for pictures while it samples (servers before ComfyUI 0.3.70 go by their own setting).
        """
        with contextlib.suppress(OSError):  # events only add progress; without them wait() asks from time to time
            self._listen()
        body: dict[str, Any] = {"prompt": workflow, "client_id": self.client_id}
        if previews:
            body["extra_data"] = {"preview_method": "auto"}
        try:
            with self._open("/prompt", json.dumps(body).encode()) as answer:
                accepted = json.load(answer)
        except urllib.error.HTTPError as error:
            raise EngineError(f"The server refused the workflow: {_refusal(error.read())}.") from None
        prompt_id = accepted["prompt_id"]
        if accepted.get("node_errors"):  # the server would run the rest and leave part of the outputs out
            self.cancel(prompt_id)
            raise EngineError(f"The server refused part of the workflow: {_refusal(json.dumps(accepted).encode())}.")
        return prompt_id

    def wait(
        self,
        prompt_id: str,
        on_progress: OnProgress | None = None,
        timeout: float | None = None,
        on_picture: OnPicture | None = None,
    ) -> dict[str, Any]:
        """The history entry of ``prompt_id`` once it has finished; ``on_picture`` gets each preview.

        Raises EngineError with the failing node's own message, or after ``timeout`` seconds, when the prompt
        is cancelled.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            entry = self.history(prompt_id)
            if entry is not None and entry.get("status", {}).get("completed") is not None:
                return _completed(entry)
            if deadline is not None and time.monotonic() > deadline:
                self.cancel(prompt_id)
                raise EngineError(f"The workflow did not finish within {timeout:g} s and was cancelled: allow it more time.")
            self._follow(prompt_id, on_progress, POLL_SECONDS, on_picture)
            if entry is None and not self._queued(prompt_id) and self.history(prompt_id) is None:
                raise EngineError("The server no longer knows the workflow: it was restarted or its history was cleared.")

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What the server recorded about ``prompt_id``; None while it is waiting or running."""
        return self._json(f"/history/{prompt_id}").get(prompt_id)

    def cancel(self, prompt_id: str) -> None:
        """Take ``prompt_id`` out of the queue and stop it if it runs; quiet when the server is gone."""
        with contextlib.suppress(EngineError, OSError):
            self._post("/queue", {"delete": [prompt_id]})
        with contextlib.suppress(EngineError, OSError):
            self._post("/interrupt", {"prompt_id": prompt_id})

    def files(self, entry: dict[str, Any]) -> list[OutputFile]:
        """The files named in a history entry's outputs, in the order of its nodes."""
        return list(_files(entry))

    def texts(self, entry: dict[str, Any]) -> dict[str, str]:
        """What each node showed as text, such as Sage3 Report's, by node id."""
        outputs = entry.get("outputs", {})
        return {node: "\n".join(map(str, ui["text"])) for node, ui in outputs.items() if ui.get("text")}

    def download(self, file: OutputFile) -> bytes:
        """The content of ``file``."""
        query = urlencode({"filename": file.filename, "subfolder": file.subfolder, "type": file.kind})
        try:
            with self._open(f"/view?{query}") as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise EngineError(f"The server did not give {file.filename} (HTTP {error.code}): look into its log.") from None

    def _listen(self) -> WebSocket:
        if self._events is None:
            scheme, rest = self.url.split("://", 1)
            self._events = WebSocket(f"{'wss' if scheme == 'https' else 'ws'}://{rest}/ws?clientId={self.client_id}")
        return self._events

    def _follow(
        self, prompt_id: str, on_progress: OnProgress | None, seconds: float, on_picture: OnPicture | None = None
    ) -> None:
        """Handle events for ``seconds``, or until one says that the prompt is done."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                message = self._listen().read(left)
            except OSError:
                self.close()
                time.sleep(left)
                return
            if isinstance(message, bytes):
                picture = _picture(message)
                if on_picture is not None and picture:
                    on_picture(picture)
            elif message is not None and _ends(message, prompt_id, on_progress):
                return

    def _queued(self, prompt_id: str) -> bool:
        queue = self._json("/queue")
        return any(item[1] == prompt_id for name in ("queue_running", "queue_pending") for item in queue.get(name, ()))

    def _post(self, path: str, body: dict[str, Any]) -> None:
        with self._open(path, json.dumps(body).encode()):
            pass

    def _json(self, path: str) -> dict[str, Any]:
        try:
            with self._open(path) as answer:
                data = json.load(answer)
        except urllib.error.HTTPError as error:
            raise EngineError(f"{self.url}{path} answered HTTP {error.code}: is this a ComfyUI server?") from None
        except ValueError:
            raise EngineError(f"{self.url}{path} did not answer with JSON: is this a ComfyUI server?") from None
        return data

    def _open(self, path: str, body: bytes | None = None) -> Any:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError:
            raise
        except OSError as error:  # URLError, timeouts, refused and broken connections
            reason = getattr(error, "reason", None) or error
            raise EngineError(
                f"No ComfyUI server can be reached at {self.url} ({reason}): start it, or check the address."
            ) from None


def _picture(message: bytes) -> bytes:
    """The encoded picture in a binary message; empty where there is none."""
    if len(message) < 8:
        return b""
    kind, second = struct.unpack(">II", message[:8])  # then the picture's format, or the length of what is said of it
    if kind == _PICTURE:
        return message[8:]
    return message[8 + second :] if kind == _PICTURE_WITH_DATA else b""


def _ends(message: str, prompt_id: str, on_progress: OnProgress | None) -> bool:
    """Tell ``on_progress`` what the event says; True when it says that the prompt is done."""
    try:
        event = json.loads(message)
        kind, data = event["type"], event["data"]
    except (ValueError, KeyError, TypeError):
        return False
    if not isinstance(data, dict) or data.get("prompt_id") not in (None, prompt_id):
        return False
    node = data.get("node")
    if on_progress is not None and kind == "executing" and node is not None:
        on_progress(str(node), 0, 0)
    elif on_progress is not None and kind == "progress":
        on_progress(str(node or ""), float(data["value"]), float(data["max"]))
    ended = kind in ("execution_success", "execution_error", "execution_interrupted")
    return ended or (kind == "executing" and node is None)


def _completed(entry: dict[str, Any]) -> dict[str, Any]:
    status = entry["status"]
    if status.get("status_str") == "success":
        return entry
    for kind, data in status.get("messages", ()):
        if kind == "execution_error":
            message = _one_line(str(data.get("exception_message", "")))
            where = f"Node {data.get('node_id')} ({data.get('node_type')})"
            raise EngineError(f"{where} failed: {data.get('exception_type', 'error')}: {message}")
        if kind == "execution_interrupted":
            raise EngineError("The workflow was interrupted on the server: run it again.")
    raise EngineError("The workflow failed and the server does not say why: look into its log.")


def _files(entry: dict[str, Any]) -> Iterator[OutputFile]:
    for node, ui in entry.get("outputs", {}).items():
        for items in ui.values():
            for item in items if isinstance(items, list) else ():
                if isinstance(item, dict) and "filename" in item:
                    yield OutputFile(node, item["filename"], item.get("subfolder", ""), item.get("type", "output"))


def _one_line(text: str, limit: int = 300) -> str:
    """Some messages run to hundreds of lines (a state dict that does not fit); the server's log has all."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def _refusal(body: bytes) -> str:
    """What the server objects to, as one line: the nodes' own errors where there are any."""
    try:
        data = json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace").strip()[:300] or "no reason given"
    told = []
    for node, found in (data.get("node_errors") or {}).items():
        for error in found.get("errors", ()):
            text = ": ".join(x for x in (error.get("message"), error.get("details")) if x)
            told.append(f"node {node} ({found.get('class_type')}): {_one_line(text)}")
    error = data.get("error")
    if not told and isinstance(error, dict):
        told.append(": ".join(str(x) for x in (error.get("message"), error.get("details")) if x))
    return "; ".join(dict.fromkeys(told)).rstrip(".") or str(error)[:300]
