"""A broker told as a script: does what a real one does only when a test asks for it, and notes what it gets.

MQTT 3.1.1 on 127.0.0.1, one thread.  CONNECT, SUBSCRIBE, UNSUBSCRIBE and PINGREQ are answered at once, PUBLISH of QoS 1
too unless `acknowledges` is off.
"""

from __future__ import annotations

import socket
import threading
from io import BufferedIOBase
from typing import NamedTuple

DEADLINE_S = 60.0
CONNECT, PUBLISH, PUBACK, SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT = 1, 3, 4, 8, 10, 12, 14


class Packet(NamedTuple):
    """A packet that came: its type, its flags, and what follows the fixed header."""

    type: int
    flags: int
    body: bytes

    @property
    def id(self) -> int:
        return int.from_bytes(self.body[:2], "big")

    @property
    def filters(self) -> list[str]:
        """Of a SUBSCRIBE or an UNSUBSCRIBE."""
        found, at, tail = [], 2, 1 if self.type == SUBSCRIBE else 0
        while at < len(self.body):
            size = int.from_bytes(self.body[at : at + 2], "big")
            found.append(self.body[at + 2 : at + 2 + size].decode())
            at += 2 + size + tail
        return found

    @property
    def is_clean(self) -> bool:
        """Of a CONNECT."""
        return bool(self.body[7] & 2)


def frame(first: int, body: bytes) -> bytes:
    size, length = len(body), bytearray()
    while True:
        size, low = divmod(size, 128)
        length.append(low | (128 if size else 0))
        if not size:
            return bytes([first]) + length + body


class Peer:
    """Listens, serves one connection after the other, each in a thread; `packets` is everything that came, in order."""

    def __init__(self, *, session_present: bool = False, suback: int = 1, acknowledges: bool = True) -> None:
        self.session_present = session_present
        self.suback = suback
        self.acknowledges = acknowledges
        self.packets: list[Packet] = []
        self.connections = 0
        self.closed = 0
        self._changed = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._subscriber: socket.socket | None = None
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(DEADLINE_S)

    # ---- for tests

    def publish(self, packet_id: int, topic: str, payload: bytes, *, dup: bool = False) -> None:
        """Send a PUBLISH of QoS 1 on the connection that subscribed last."""
        name = topic.encode()
        body = len(name).to_bytes(2, "big") + name + packet_id.to_bytes(2, "big") + payload
        assert self._subscriber is not None, "nobody has subscribed"
        self._subscriber.sendall(frame(0x32 | (8 if dup else 0), body))

    def hang_up(self) -> None:
        """Close all connections."""
        for each in self._sockets:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client was faster

    def of_type(self, kind: int) -> list[Packet]:
        with self._changed:
            return [packet for packet in self.packets if packet.type == kind]

    def wait(self, kind: int, count: int, deadline_s: float = DEADLINE_S) -> list[Packet]:
        """The packets of a type, when there are `count`."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: sum(packet.type == kind for packet in self.packets) >= count, deadline_s
            ), f"{[packet.type for packet in self.packets]}"
        return self.of_type(kind)

    def wait_closed(self, count: int, deadline_s: float = DEADLINE_S) -> None:
        """Until so many connections have ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.closed >= count, deadline_s), "still open"

    # ---- threads

    def _accept(self) -> None:
        while True:
            try:
                taken, _ = self._listener.accept()
            except OSError:
                return
            taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.append(taken)
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(taken,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, taken: socket.socket) -> None:
        with taken, taken.makefile("rb") as stream:
            try:
                while (packet := _read(stream)) is not None:
                    if packet.type == SUBSCRIBE:
                        self._subscriber = taken
                    answer = self._answer(packet)
                    if answer:
                        taken.sendall(answer)
                    with self._changed:
                        self.packets.append(packet)
                        self._changed.notify_all()
            except OSError:
                pass  # reset: it is over, like an end
        with self._changed:
            self.closed += 1
            self._changed.notify_all()

    def _answer(self, packet: Packet) -> bytes:
        if packet.type == CONNECT:
            return bytes([0x20, 2, int(self.session_present and not packet.is_clean), 0])
        if packet.type == SUBSCRIBE:
            return frame(0x90, packet.body[:2] + bytes([self.suback]) * len(packet.filters))
        if packet.type == UNSUBSCRIBE:
            return frame(0xB0, packet.body[:2])
        if packet.type == PINGREQ:
            return b"\xd0\x00"
        if packet.type == PUBLISH and packet.flags & 2 and self.acknowledges:
            size = int.from_bytes(packet.body[:2], "big")
            return b"\x40\x02" + packet.body[2 + size : 4 + size]
        return b""


def _read(stream: BufferedIOBase) -> Packet | None:
    read = stream.read
    first = read(1)
    if not first:
        return None
    size = shift = 0
    while True:
        byte = read(1)
        if not byte:
            return None
        size |= (byte[0] & 127) << shift
        shift += 7
        if byte[0] < 128:
            break
    body = read(size)
    return Packet(first[0] >> 4, first[0] & 15, body) if len(body) == size else None
