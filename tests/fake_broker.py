"""A broker that does what a test tells it, right or wrong: a listening socket and one small thread.

The test gives a function that serves one connection; it is called for each connection in turn, on the thread.  What it
raises, a client that hangs up aside, fails the test when the broker is closed.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

CONNECT, PUBLISH, PINGREQ, DISCONNECT = 1, 3, 12, 14
CONNACK_ACCEPTED = b"\x20\x02\x00\x00"
PINGRESP = b"\xd0\x00"
_LIMIT = 10.0


class Gone(Exception):
    """The client has closed the connection."""


@dataclass(frozen=True)
class Publish:
    """A PUBLISH packet of QoS 1."""

    topic: str
    payload: bytes
    packet_id: int
    dup: bool
    retain: bool


def puback(*packet_ids: int) -> bytes:
    return b"".join(struct.pack("!BBH", 0x40, 2, packet_id) for packet_id in packet_ids)


class Connection:
    """One accepted connection.  ``number`` counts from 1."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock, self.number = sock, number
        self._received = b""

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise Gone from error

    def send_byte_by_byte(self, data: bytes) -> None:
        for value in data:
            self.send(bytes([value]))

    def _exactly(self, size: int) -> bytes:
        while len(self._received) < size:
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                raise Gone
            self._received += data
        taken, self._received = self._received[:size], self._received[size:]
        return taken

    def packet(self) -> tuple[int, bytes]:
        """First byte and body of the next packet.  ``Gone``; ``TimeoutError`` after 10 s."""
        first = self._exactly(1)[0]
        length = shift = 0
        while True:
            value = self._exactly(1)[0]
            length |= (value & 0x7F) << shift
            shift += 7
            if value < 0x80:
                return first, self._exactly(length)

    def accept(self) -> bytes:
        """Take CONNECT and answer that it is accepted.  Returns the body of CONNECT."""
        first, body = self.packet()
        assert first >> 4 == CONNECT
        self.send(CONNACK_ACCEPTED)
        return body

    def publish(self) -> Publish:
        """The next PUBLISH; pings before it are answered.  ``Gone`` also for a DISCONNECT."""
        while True:
            first, body = self.packet()
            if first >> 4 == PINGREQ:
                self.send(PINGRESP)
            elif first >> 4 == DISCONNECT:
                raise Gone
            else:
                break
        assert first >> 4 == PUBLISH and first & 0x06 == 0x02, hex(first)
        (size,) = struct.unpack_from("!H", body)
        (packet_id,) = struct.unpack_from("!H", body, 2 + size)
        return Publish(body[2 : 2 + size].decode(), body[4 + size :], packet_id, bool(first & 8), bool(first & 1))

    def publishes(self, count: int) -> list[Publish]:
        return [self.publish() for _ in range(count)]

    def until_gone(self) -> None:
        """Read, and answer nothing, until the client hangs up."""
        try:
            while True:
                self.packet()
        except Gone:
            pass


class FakeBroker:
    """``serve(connection)`` on a thread for each connection, one after the other.  A context manager."""

    def __init__(self, serve: Callable[[Connection], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.connected_at: list[float] = []  # monotonic
        self._error: BaseException | None = None
        self._closing = False
        self._current: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="fake-broker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(_LIMIT)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._current = sock
                self.connections += 1
                self.connected_at.append(time.monotonic())
                try:
                    self._serve(Connection(sock, self.connections))
                except Gone:
                    pass
                except BaseException as error:
                    if not self._closing:
                        self._error = self._error or error

    def close(self) -> None:
        self._closing = True
        for sock in (self._listener, self._current):
            if sock is not None and sock.fileno() >= 0:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # not connected any more
        self._listener.close()
        self._thread.join(_LIMIT)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> FakeBroker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except BaseException:
            if kind is None:
                raise
