"""What a broker should do, except where a test says otherwise: a function for `tests.fake_broker.FakeBroker`.

    with FakeBroker(Script(withhold(3), connack=Connack(properties={"receive_maximum": 1}))) as broker: ...
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from tests import packets
from tests.fake_broker import ACCEPTED, Connection, Gone
from tests.packets import (
    Connack,
    Connect,
    Disconnect,
    Malformed,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Publish,
    Suback,
    Subscribe,
    Unsuback,
    Unsubscribe,
)

_LIMIT = 60.0


@dataclass(frozen=True)
class Cut:
    """Send the beginning ``data``, then hang up, by a reset or by the end of the stream."""

    data: bytes = b""
    reset: bool = False


WITHHOLD = b""
HANG_UP = Cut()
Reply: TypeAlias = bytes | Cut | Packet | Iterable[Packet]


@dataclass(frozen=True)
class Event:
    """A packet that came, and what a broker should answer.

    ``number`` counts the packets of its type from 1, over all connections.  ``packet`` is as it came; ``topic`` is that
    of a PUBLISH, also where only an alias came.
    """

    connection: Connection
    number: int
    packet: Packet
    usual: tuple[Packet, ...]
    topic: str = ""

    @property
    def usual_bytes(self) -> bytes:
        return b"".join(packets.build(each, self.connection.version) for each in self.usual)


Instead: TypeAlias = Callable[[Event], Reply | None]
Some = TypeVar("Some", bound=Packet)


class Script:
    """Serves a connection: answers every packet as a broker should, except where ``instead`` says otherwise.

    Args:
        instead: asked about every packet.  ``None``: the usual answer; else what to send in its place: packets, bytes
            (`WITHHOLD`: nothing) or a `Cut`.
        connack: the usual answer to CONNECT.  Its limits are enforced: a client that sends more than Receive Maximum
            publishes ahead of their PUBACKs, a packet above Maximum Packet Size, an alias above Topic Alias Maximum, a
            QoS above Maximum QoS or a retained message where there are none, fails the test.
        grant: at most this QoS is granted by SUBACK; 0x80 and above refuse.

    What came is in `events`, in order; `publishes` has the topics filled in.  Safe with ``parallel``.
    """

    def __init__(self, instead: Instead | None = None, *, connack: Connack = ACCEPTED, grant: int = 2) -> None:
        self._instead = instead
        self._connack = connack
        self._grant = grant
        self._changed = threading.Condition()
        self._counts: dict[type[Any], int] = {}
        self._unacknowledged: dict[int, set[int]] = {}  # packet ids by connection
        self.events: list[Event] = []
        self.ended = 0  # connections
        self.most_in_flight = 0

    def __call__(self, connection: Connection) -> None:
        try:
            while True:
                event = self._take(connection)
                reply = self._instead(event) if self._instead is not None else None
                self._answer(event, event.usual if reply is None else reply)
                if isinstance(event.packet, Disconnect):
                    raise Gone
        finally:
            with self._changed:
                self.ended += 1
                self._changed.notify_all()

    # ---- for tests

    @property
    def publishes(self) -> list[Publish]:
        with self._changed:
            return [replace(e.packet, topic=e.topic) for e in self.events if isinstance(e.packet, Publish)]

    def of_type(self, kind: type[Some]) -> list[Some]:
        """The packets of a type that came."""
        with self._changed:
            return [event.packet for event in self.events if isinstance(event.packet, kind)]

    def wait(self, kind: type[Some], count: int = 1, timeout: float = _LIMIT) -> list[Some]:
        """The packets of a type, when so many have come.  TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._counts.get(kind, 0) >= count, timeout):
                raise TimeoutError(f"{self._counts.get(kind, 0)} of {count} {kind.__name__} after {timeout} s")
        return self.of_type(kind)

    def wait_ended(self, count: int = 1, timeout: float = _LIMIT) -> None:
        """Until so many connections have ended.  TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.ended >= count, timeout):
                raise TimeoutError(f"{self.ended} of {count} ended after {timeout} s")

    # ---- the thread of a connection

    def _take(self, connection: Connection) -> Event:
        first, body = connection.packet()
        limits = connection.connack.properties if connection.connack is not None else {}
        size = len(packets.frame(first, body))
        assert size <= limits.get("maximum_packet_size", size), f"a packet of {size} bytes"
        packet = packets.parse(first, body, connection.version)
        assert isinstance(packet, Connect) == (connection.connect is None), f"{packet} at the wrong time"
        topic = ""
        if isinstance(packet, Connect):
            connection.connect, connection.version = packet, packet.version
        elif isinstance(packet, Publish):
            topic = connection.topic_of(packet)
            self._check_publish(connection, packet, limits)
        with self._changed:
            number = self._counts[type(packet)] = self._counts.get(type(packet), 0) + 1
            event = Event(connection, number, packet, self._usual(packet, connection.version), topic)
            self.events.append(event)
            self._changed.notify_all()
        return event

    def _check_publish(self, connection: Connection, publish: Publish, limits: packets.Properties) -> None:
        assert publish.qos <= limits.get("maximum_qos", 2), publish
        assert limits.get("retain_available", 1) or not publish.retain, publish
        if publish.qos:
            with self._changed:
                flying = self._unacknowledged.setdefault(connection.number, set())
                flying.add(publish.packet_id)
                self.most_in_flight = max(self.most_in_flight, len(flying))
            assert len(flying) <= limits.get("receive_maximum", 65535), f"{len(flying)} in flight"

    def _usual(self, packet: Packet, version: int) -> tuple[Packet, ...]:
        match packet:
            case Connect():
                return (self._connack,)
            case Publish(packet_id=packet_id, qos=1):
                return (Puback(packet_id),)
            case Subscribe(packet_id, subscriptions):
                grant = self._grant
                return (Suback(packet_id, tuple(grant if grant > 2 else min(s.qos, grant) for s in subscriptions)),)
            case Unsubscribe(packet_id, filters):
                return (Unsuback(packet_id, (0,) * len(filters) if version == 5 else ()),)
            case Pingreq():
                return (Pingresp(),)
        return ()

    def _answer(self, event: Event, reply: Reply) -> None:
        connection = event.connection
        if isinstance(reply, Cut):
            connection.send(reply.data)
            connection.hang_up(reset=reply.reset)
        elif isinstance(reply, bytes):
            self._settle(connection, reply)
            connection.send(reply)
        else:
            several = tuple(reply) if isinstance(reply, Iterable) else (reply,)
            for each in several:
                if isinstance(each, Connack):
                    connection.connack = each
            data = b"".join(packets.build(each, connection.version) for each in several)
            self._settle(connection, data)
            connection.send(data)

    def _settle(self, connection: Connection, data: bytes) -> None:
        """Note which publishes these bytes acknowledge, before the client can know."""
        try:
            while data:
                first, body, data = packets.split(data)
                packet = packets.parse(first, body, connection.version)
                if isinstance(packet, Puback):
                    with self._changed:
                        self._unacknowledged.get(connection.number, set()).discard(packet.packet_id)
        except Malformed:
            pass  # which may be what the test is about


def first_of(*several: Instead) -> Instead:
    """The answer of the first that has one."""

    def instead(event: Event) -> Reply | None:
        return next((reply for each in several if (reply := each(event)) is not None), None)

    return instead


def withhold(*numbers: int, kind: type[Packet] = Publish) -> Instead:
    """No answer to the packets of this type with these numbers, or to any."""
    return lambda e: WITHHOLD if isinstance(e.packet, kind) and (not numbers or e.number in numbers) else None


def refuse(reason: int, *numbers: int, **properties: Any) -> Instead:
    """A PUBACK with this reason for the publishes with these numbers, or for all."""

    def instead(event: Event) -> Reply | None:
        if isinstance(event.packet, Publish) and event.packet.qos and (not numbers or event.number in numbers):
            return Puback(event.packet.packet_id, reason, properties)
        return None

    return instead


def in_reverse(count: int) -> Instead:
    """Every ``count`` publishes on a connection are acknowledged at once, the newest first."""
    held: dict[int, list[Packet]] = {}

    def instead(event: Event) -> Reply | None:
        if not isinstance(event.packet, Publish) or not event.packet.qos:
            return None
        waiting = held.setdefault(event.connection.number, [])
        waiting[:0] = event.usual
        return held.pop(event.connection.number) if len(waiting) == count else WITHHOLD

    return instead
