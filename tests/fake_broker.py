"""A broker that does what a test tells it, right or wrong: a listening socket and a thread for what is connected.

The test gives a function that serves one connection; `tests.script` has one for the common case.  Connections are
served one after the other, on one thread, or with ``parallel`` each at once on its own.  What the function raises, a
client that hangs up aside, fails the test when the broker is closed.  Packets are those of `tests.packets`, MQTT 3.1.1
and 5.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from tests import packets
from tests.packets import (
    CONNECT,
    DISCONNECT,
    PINGREQ,
    PUBLISH,
    Connack,
    Connect,
    Disconnect,
    Malformed,
    Packet,
    Pingreq,
    Publish,
)

__all__ = [
    "ACCEPTED", "CONNACK_ACCEPTED", "CONNECT", "DISCONNECT", "PINGREQ", "PINGRESP", "PUBLISH", "Connection",
    "FakeBroker", "Gone", "Publish", "puback",
]  # fmt: skip

ACCEPTED = Connack()
CONNACK_ACCEPTED = b"\x20\x02\x00\x00"
PINGRESP = b"\xd0\x00"
_LIMIT = 60.0
_LINGER_RESET = struct.pack("ii", 1, 0)


class Gone(Exception):
    """The client has closed the connection, or the test has."""


def puback(*packet_ids: int) -> bytes:
    """Of both versions: under MQTT 5 the short form, which means success."""
    return b"".join(struct.pack("!BBH", 0x40, 2, packet_id) for packet_id in packet_ids)


class Connection:
    """One accepted connection.  ``number`` counts from 1; ``connect`` and ``version`` are known once CONNECT came."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock, self.number = sock, number
        self.version = 4
        self.connect: Connect | None = None
        self.connack: Connack | None = None
        self._received = b""
        self._aliases: dict[int, str] = {}

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise Gone from error

    def send_byte_by_byte(self, data: bytes) -> None:
        for value in data:
            self.send(bytes([value]))

    def send_packets(self, *several: Packet) -> None:
        """In one piece, in the connection's version."""
        if several and isinstance(several[0], Connack):
            self.connack = several[0]
        self.send(b"".join(packets.build(each, self.version) for each in several))

    def hang_up(self, *, reset: bool = False) -> NoReturn:
        """End the connection, by a reset on request.  Raises `Gone`, as nothing more can be done."""
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            self.sock.close()
        else:
            try:
                self.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client was faster
        raise Gone

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
        """First byte and body of the next packet.  ``Gone``; ``TimeoutError`` if nothing comes."""
        first = self._exactly(1)[0]
        length = shift = 0
        while True:
            value = self._exactly(1)[0]
            length |= (value & 0x7F) << shift
            shift += 7
            if value < 0x80:
                return first, self._exactly(length)
            if shift > 21:
                raise Malformed("a length of more than four bytes")

    def receive(self) -> Packet:
        """The next packet, parsed.  ``Gone``; ``Malformed``; ``TimeoutError`` if nothing comes."""
        first, body = self.packet()
        packet = packets.parse(first, body, self.version)
        if isinstance(packet, Connect):
            self.connect, self.version = packet, packet.version
        return packet

    def receive_connect(self) -> Connect:
        packet = self.receive()
        assert isinstance(packet, Connect), packet
        return packet

    def accept(self, connack: Connack = ACCEPTED) -> Connect:
        """Take CONNECT and answer, by default that it is accepted."""
        connect = self.receive_connect()
        self.send_packets(connack)
        return connect

    def topic_of(self, publish: Publish) -> str:
        """The topic that a PUBLISH means, by what it says or by its alias; to be asked for each, in their order.

        ``Malformed`` where an alias is unknown, or above the Topic Alias Maximum that CONNACK told.
        """
        alias = publish.properties.get("topic_alias")
        if alias is None:
            return publish.topic
        most = self.connack.properties.get("topic_alias_maximum", 0) if self.connack is not None else 0
        if alias > most:
            raise Malformed(f"topic alias {alias}, allowed are {most}")
        if publish.topic:
            self._aliases[alias] = publish.topic
        if alias not in self._aliases:
            raise Malformed(f"topic alias {alias} stands for nothing")
        return self._aliases[alias]

    def publish(self) -> Publish:
        """The next PUBLISH, which must be of QoS 1; pings before it are answered.  ``Gone`` also for a DISCONNECT."""
        while True:
            packet = self.receive()
            if isinstance(packet, Pingreq):
                self.send(PINGRESP)
            elif isinstance(packet, Disconnect):
                raise Gone
            else:
                break
        assert isinstance(packet, Publish) and packet.qos == 1, packet
        return packet

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
    """``serve(connection)`` on a thread for each connection, one after the other or all at once.  A context manager.

    ``timeout`` is how many seconds a client may say nothing before that is an error.
    """

    def __init__(
        self, serve: Callable[[Connection], None], *, parallel: bool = False, timeout: float = _LIMIT
    ) -> None:
        self._serve = serve
        self._parallel = parallel
        self._timeout = timeout
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.connected_at: list[float] = []  # monotonic
        self._error: BaseException | None = None
        self._closing = False
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()  # guards _open, and _closing against what is just being accepted
        self._threads = [threading.Thread(target=self._run, name="fake-broker", daemon=True)]
        self._threads[0].start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._closing:
                    sock.close()
                    return
                self._open.add(sock)
            self.connections += 1
            self.connected_at.append(time.monotonic())
            if self._parallel:
                thread = threading.Thread(target=self._one, args=(sock, self.connections), daemon=True)
                self._threads = [each for each in self._threads if each.is_alive()] + [thread]
                thread.start()
            else:
                self._one(sock, self.connections)

    def _one(self, sock: socket.socket, number: int) -> None:
        try:
            sock.settimeout(self._timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._serve(Connection(sock, number))
        except Gone:
            pass
        except BaseException as error:
            if not self._closing:
                self._error = self._error or error
        finally:
            with self._lock:
                self._open.discard(sock)
                sock.close()

    def close(self) -> None:
        with self._lock:
            self._closing = True
            for sock in (self._listener, *self._open):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # not connected any more
        self._listener.close()
        for thread in self._threads:
            thread.join(_LIMIT)
            assert not thread.is_alive()
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
