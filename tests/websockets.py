"""The server's side of a WebSocket, told as a script: `FrameSocket` stands where `tests.fake_broker` has a socket.

    def serve(connection: Connection) -> None:
        ws = FrameSocket.accept(connection.sock)
        script(Connection(ws, connection.number))
"""

from __future__ import annotations

import base64
import hashlib
import socket
import struct
from typing import Any

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def frame(opcode: int, data: bytes = b"", *, final: bool = True, key: bytes = b"", wide: int = 0) -> bytes:
    """A frame, masked with `key` if there is one; `wide` asks for 2 or 8 bytes of length where fewer would do."""
    size, mask = len(data), 0x80 if key else 0
    if size <= 125 and not wide:
        length = bytes([mask | size])
    elif size <= 0xFFFF and wide < 8:
        length = struct.pack("!BH", mask | 126, size)
    else:
        length = struct.pack("!BQ", mask | 127, size)
    return bytes([(0x80 if final else 0) | opcode]) + length + key + (unmask(data, key) if key else data)


def unmask(data: bytes, key: bytes) -> bytes:
    stream = (key * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(data), "big")


def first_frame(data: bytes) -> tuple[int, bytes, int] | None:
    """Opcode, payload and size of the client's frame at the front; None if it is not whole yet.

    AssertionError for what a client may not send.
    """
    if len(data) < 2:
        return None
    assert data[0] & 0xF0 == 0x80, "not final, or reserved bits"
    opcode, size, at = data[0] & 0x0F, data[1] & 0x7F, 2
    assert opcode in (BINARY, CLOSE, PING, PONG), opcode
    assert data[1] & 0x80, "a client's frame that is not masked"
    if size >= 126:
        assert opcode == BINARY, "a control frame of more than 125 bytes"
        width = 2 if size == 126 else 8
        if len(data) < at + width:
            return None
        size = int.from_bytes(data[at : at + width], "big")
        assert size > (125 if width == 2 else 0xFFFF), "a length that is longer than it need be"
        at += width
    if len(data) < at + 4 + size:
        return None
    return opcode, unmask(data[at + 4 : at + 4 + size], data[at : at + 4]), at + 4 + size


def request_of(sock: Any) -> tuple[str, dict[str, str]]:
    """First line and headers, with names in small letters, of the request that comes."""
    text = b""
    while not text.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        if not byte:
            raise ConnectionResetError("hung up in the handshake")
        text += byte
    first, *lines = text.decode().rstrip("\r\n").split("\r\n")
    return first, {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def agreement(headers: dict[str, str]) -> bytes:
    """The answer to a request for a WebSocket."""
    accept = base64.b64encode(hashlib.sha1(headers["sec-websocket-key"].encode() + _MAGIC).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
    )


class FrameSocket:
    """What goes in and out is MQTT.  `others` are the control frames that came, in order."""

    def __init__(self, sock: Any, request: str = "", headers: dict[str, str] | None = None) -> None:
        self.raw = sock
        self.request, self.headers = request, headers or {}
        self.others: list[tuple[int, bytes]] = []
        self.frames = 0  # with payload
        self._received = b""
        self._payload = b""

    @classmethod
    def accept(cls, sock: Any) -> FrameSocket:
        """Shake hands."""
        request, headers = request_of(sock)
        assert headers["upgrade"].lower() == "websocket" and headers["sec-websocket-version"] == "13"
        assert headers["sec-websocket-protocol"] == "mqtt"
        sock.sendall(agreement(headers))
        return cls(sock, request, headers)

    def sendall(self, data: bytes) -> None:
        if data:
            self.raw.sendall(frame(BINARY, data))

    def send_frame(self, opcode: int, data: bytes = b"", **how: Any) -> None:
        self.raw.sendall(frame(opcode, data, **how))

    def recv(self, size: int) -> bytes:
        while not self._payload and self._read_frame():
            pass
        taken, self._payload = self._payload[:size], self._payload[size:]
        return taken

    def _read_frame(self) -> bool:
        """False at the end of the stream."""
        while (found := first_frame(self._received)) is None:
            data = self.raw.recv(1 << 16)
            if not data:
                return False
            self._received += data
        opcode, payload, size = found
        self._received = self._received[size:]
        if opcode == BINARY:
            self._payload += payload
            self.frames += 1
        else:
            self.others.append((opcode, payload))
        return True

    def wait_other(self, opcode: int) -> bytes:
        """Read until such a control frame has come, and take it.  ConnectionResetError at the end of the stream."""
        while True:
            for number, (found, payload) in enumerate(self.others):
                if found == opcode:
                    del self.others[number]
                    return payload
            if not self._read_frame():
                raise ConnectionResetError("hung up")

    def setsockopt(self, *option: Any) -> None:
        self.raw.setsockopt(*option)

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        self.raw.shutdown(how)

    def close(self) -> None:
        self.raw.close()
