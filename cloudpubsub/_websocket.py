"""MQTT through a WebSocket, the client's side of RFC 6455: paho's handshake, held in bounds, and frames of our own.

A `WebSocket` stands where a connection would have its socket.  Frames are made and taken apart natively (`_link`); the
payload of what was read lies where the caller wanted it, so nothing that could be handed out stays behind in here.

One thread at a time, as in `_paho`.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl

from cloudpubsub._deadline import left_s
from cloudpubsub._link import FRAME_HEADER_MAX, Frames, make_frame

__all__ = ["Handshake", "WebSocket", "WebSocketError"]

_WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_BINARY, _CLOSE, _PONG = 2, 8, 10
_NORMAL, _BROKEN = b"\x03\xe8", b"\x03\xea"  # reasons to close: 1000, and 1002 for an error in the protocol
# Of payload in a frame.  Some brokers take no frame above 128 KiB, and what is half out cannot be counted as sent.
_FRAME_MAX = 64 * 1024
_IDLE_MAX = 1000  # frames without payload that are read at one go
_ANSWER_MAX = 16 * 1024  # of the server's to the handshake
_SHOWN = 80
_FAULTS = {
    1: "a frame with reserved bits or an unknown opcode",
    2: "a text frame, and MQTT is binary",
    3: "a masked frame",
    4: "a control frame that is in fragments or too long",
    5: "fragments in an order that makes no message",
    6: "a frame of more than 2^63 bytes",
}


class WebSocketError(OSError):
    """The server broke the protocol, in the handshake or after it."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EPROTO, f"websocket: {text}")


class WebSocket:
    """A socket, plain or TLS, seen through the frames of a WebSocket.  Non-blocking, as that socket is.

    `send` is all or nothing: it counts the payload of a frame when all of the frame is out, and raises until then.
    As with TLS the caller repeats the same bytes; nothing else gets in between.
    """

    def __init__(self, raw: socket.socket) -> None:
        #: The socket below.
        self.raw = raw
        self._frames = Frames()
        self._out = memoryview(bytearray(_FRAME_MAX + FRAME_HEADER_MAX))
        self._rest = self._out[:0]  # of the frame that is on its way,
        self._payload_bytes = 0  # which has so much payload that `send` has not counted yet, 0 for a control frame
        # Answers that are owed.  One pong: the last ping is the one to answer, however many there were.
        self._pong: bytes | None = None
        self._close: bytes | None = None
        self._has_closed = False  # nothing may follow a close frame
        self._error: WebSocketError | None = None

    # ---- out ----

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send what fits in one frame.  Returns how much that is; raises BlockingIOError, SSLWant…, another OSError."""
        if not self._payload_bytes:
            self._flush()
            if self._has_closed:
                raise BrokenPipeError(errno.EPIPE, "websocket: closed")
            payload = memoryview(data)[:_FRAME_MAX]
            self._begin(_BINARY, payload)
            self._payload_bytes = len(payload)
        self._push()
        counted, self._payload_bytes = self._payload_bytes, 0
        return counted

    def _begin(self, opcode: int, payload: bytes | memoryview) -> None:
        self._rest = self._out[: make_frame(self._out, opcode, payload, os.urandom(4))]

    def _push(self) -> None:
        """The rest of the frame that is on its way; raises if it does not all go."""
        while self._rest:
            # TLS wants the same bytes again after it was blocked: they lie in `_out`, which nobody touches until then.
            self._rest = self._rest[self.raw.send(self._rest) :]

    def _flush(self) -> None:
        """That rest, and the answers that are owed behind it; raises if it does not all go."""
        self._push()
        while self._pong is not None and not self._has_closed:
            pong, self._pong = self._pong, None
            self._begin(_PONG, pong)
            self._push()
        while self._close is not None and not self._has_closed:
            self._has_closed = True
            self._begin(_CLOSE, self._close)
            self._push()

    def _owes(self) -> bool:
        is_answering = len(self._rest) > 0 and not self._payload_bytes
        return is_answering or (not self._has_closed and (self._pong is not None or self._close is not None))

    def _answer(self) -> OSError | None:
        """Send what is owed, if anything is.  Returns what it was blocked by."""
        if self._owes():
            try:
                self._flush()
            except _WOULD_BLOCK as exc:
                return exc
            except OSError:
                self._pong = self._close = None  # the link is broken; what is still to be read says how
        return None

    # ---- in ----

    def recv_into(self, view: memoryview | bytearray) -> int:
        """Read payload.  0: the end, by a close frame or without.

        Raises WebSocketError once all before the error was handed out; SSLWantWriteError when an answer that is owed
        waits for room on its way out, and calling again sends it.
        """
        blocked, idle = self._answer(), 0
        while True:
            if self._error is not None:
                raise self._error
            if self._frames.closing is not None:
                return 0
            try:
                n = self.raw.recv_into(view)
            except _WOULD_BLOCK:
                if blocked is not None and not isinstance(blocked, ssl.SSLWantReadError):
                    raise ssl.SSLWantWriteError from None
                raise
            if n == 0:
                return 0
            payload_bytes = self._frames.take(view, n)
            idle += self._frames.take_idle()
            if self._frames.has_news or idle > _IDLE_MAX:
                self._heed(idle)
                blocked = self._answer()
            if payload_bytes:
                return payload_bytes

    def _heed(self, idle: int) -> None:
        """What the frames said that is no payload; `idle` of them in a row brought none."""
        ping = self._frames.take_ping()
        if ping is not None:
            self._pong = ping
        if self._frames.closing is not None:
            self._close = self._frames.closing[:2]  # the reason, not the words
        elif self._frames.fault:
            self._fail(f"the server sent {_FAULTS[self._frames.fault]}")
        elif idle > _IDLE_MAX:  # or it could keep us here for ever
            self._fail(f"the server sent more than {_IDLE_MAX} frames without payload at one go")

    def _fail(self, text: str) -> None:
        self._error = WebSocketError(text)
        self._close = _BROKEN

    def recv(self, size: int) -> bytes:
        data = bytearray(size)
        return bytes(data[: self.recv_into(data)])

    # ---- the rest of a socket ----

    def shutdown(self, how: int) -> None:
        """Also says goodbye with a close frame, if nothing is half out and there is room."""
        if how != socket.SHUT_RD and not self._rest and self._close is None:
            self._close = _NORMAL
            self._answer()
        self.raw.shutdown(how)

    def fileno(self) -> int:
        return self.raw.fileno()

    def setblocking(self, flag: bool) -> None:
        self.raw.setblocking(flag)

    def settimeout(self, value: float | None) -> None:
        self.raw.settimeout(value)

    def setsockopt(self, level: int, name: int, value: int) -> None:
        self.raw.setsockopt(level, name, value)

    def pending(self) -> int:
        """Bytes that TLS has read and not given out; none are kept here."""
        return self.raw.pending() if isinstance(self.raw, ssl.SSLSocket) else 0

    def close(self) -> None:
        self.raw.close()


class Handshake:
    """The socket that paho shakes hands on.

    paho would wait for each byte as long as for all of them, take an answer of any length, and say of what went wrong
    no more than that it did.
    """

    def __init__(self, raw: socket.socket, deadline_s: float) -> None:
        #: The socket below.
        self.raw = raw
        self._deadline_s = deadline_s  # monotonic
        self._answer = bytearray()

    def settimeout(self, value: float | None) -> None:
        """The deadline holds, whatever paho thinks."""

    def send(self, data: bytes) -> int:
        self.raw.settimeout(left_s(self._deadline_s))
        self.raw.sendall(data)
        return len(data)

    def recv(self, size: int) -> bytes:
        if len(self._answer) >= _ANSWER_MAX:
            raise WebSocketError(f"the server's answer to the handshake is longer than {_ANSWER_MAX} bytes")
        self.raw.settimeout(left_s(self._deadline_s))
        data = self.raw.recv(size)
        self._answer += data
        return data

    def close(self) -> None:
        self.raw.close()

    def finish(self) -> WebSocket:
        """The handshake has succeeded, as paho sees it, which does not look at the first line."""
        if self._status() != 101:
            raise self._error()
        return WebSocket(self.raw)

    def _status(self) -> int:
        match = re.match(rb"HTTP/1\.[01] ([0-9]{3})\b", self._answer)
        return int(match[1]) if match else 0

    def _error(self) -> WebSocketError:
        first = bytes(self._answer[:_SHOWN]).partition(b"\r")[0].partition(b"\n")[0]
        shown = "".join(letter if letter.isprintable() else "?" for letter in first.decode("ascii", "replace"))
        if not self._answer:
            return WebSocketError("the server hung up without an answer to the handshake")
        if self._status() == 101:
            return WebSocketError("the server agreed to the handshake, but not as the protocol says")
        return WebSocketError(f"the server answered {shown!r} to the handshake")

    def explain(self, error: Exception) -> Exception:
        """What paho raised, in words that help.  Time limits and errors of TLS and network speak for themselves."""
        is_ours = isinstance(error, WebSocketError)
        is_paho = not isinstance(error, OSError) or (isinstance(error, ConnectionError) and error.errno is None)
        return self._error() if is_paho and not is_ours else error
