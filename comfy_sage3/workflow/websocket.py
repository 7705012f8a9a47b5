"""Just enough of a WebSocket client (RFC 6455) to read ComfyUI's events, from the standard library alone."""

from __future__ import annotations

import base64
import os
import select
import socket
import ssl
import struct
from urllib.parse import urlsplit

_TEXT, _BINARY, _CLOSE, _PING, _PONG = 1, 2, 8, 9, 10
MAX_FRAME = 256 * 2**20  # a preview frame is a few MB; more means that we lost step with the stream


class WebSocket:
    """An open connection. Raises OSError (ConnectionError among them) when it cannot be made or breaks."""

    def __init__(self, url: str, timeout: float = 10.0) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "wss"
        host, port = parts.hostname or "", parts.port or (443 if secure else 80)
        self._socket: socket.socket = socket.create_connection((host, port), timeout)
        try:
            if secure:
                self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=host)
            self._buffer = self._handshake(parts.netloc, f"{parts.path or '/'}?{parts.query}")
        except BaseException:
            self._socket.close()
            raise

    def read(self, timeout: float) -> str | bytes | None:
        """The next message, text or binary, or None when none begins within ``timeout`` seconds."""
        message, kind = b"", 0
        while True:
            if not message and not self._waiting(timeout):
                return None
            final, opcode, payload = self._frame()
            if opcode == _CLOSE:
                raise ConnectionError("the server closed the connection")
            if opcode == _PING:
                self._send(_PONG, payload)
            elif opcode < _CLOSE:
                kind, message = opcode or kind, message + payload
                if final:
                    return message.decode("utf-8", "replace") if kind == _TEXT else message

    def close(self) -> None:
        """Close without ceremony; the server treats that as leaving."""
        self._socket.close()

    def _handshake(self, netloc: str, resource: str) -> bytes:
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {resource} HTTP/1.1\r\nHost: {netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        answer = b""
        while b"\r\n\r\n" not in answer:
            chunk = self._socket.recv(4096)
            if not chunk or len(answer) > 65536:
                raise ConnectionError("the server did not answer the WebSocket handshake")
            answer += chunk
        head, _, rest = answer.partition(b"\r\n\r\n")
        if b" 101 " not in head.split(b"\r\n", 1)[0]:
            raise ConnectionError("the server refused the WebSocket handshake")
        return rest

    def _waiting(self, timeout: float) -> bool:
        pending = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()
        return bool(self._buffer or pending or select.select([self._socket], [], [], timeout)[0])

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            chunk = self._socket.recv(65536)
            if not chunk:
                raise ConnectionError("the server closed the connection")
            self._buffer += chunk
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _frame(self) -> tuple[bool, int, bytes]:
        first, second = self._take(2)
        length = second & 0x7F
        if length == 126:
            (length,) = struct.unpack(">H", self._take(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self._take(8))
        if length > MAX_FRAME:
            raise ConnectionError(f"a frame of {length} bytes is too large")
        return bool(first & 0x80), first & 0x0F, self._take(length)

    def _send(self, opcode: int, payload: bytes) -> None:
        """A client masks what it sends; only pongs are sent, whose payload is at most 125 bytes."""
        mask = os.urandom(4)
        body = bytes(b ^ mask[i % 4] for i, b in enumerate(payload))
        self._socket.sendall(bytes((0x80 | opcode, 0x80 | len(payload))) + mask + body)
