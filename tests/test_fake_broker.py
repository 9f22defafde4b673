"""The scripted broker, by hand and with paho: it does what a broker should, and what it is told instead."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from tests import packets
from tests.fake_broker import Connection, FakeBroker, puback
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
    Subscription,
    Unsuback,
    Unsubscribe,
    Will,
)
from tests.script import HANG_UP, WITHHOLD, Cut, Event, Reply, Script, first_of, in_reverse, refuse, withhold

LIMIT = 60.0
VERSIONS = (4, 5)
new_properties: Any = Properties  # without types


class Hand:
    """A client of a few lines: sends what it is told, reads packets."""

    def __init__(self, broker: FakeBroker, version: int = 5, connect: Connect | None = None) -> None:
        self.sock = socket.create_connection(("127.0.0.1", broker.port), timeout=LIMIT)
        self._connection = Connection(self.sock, 0)
        self._connection.version = version
        self.send(connect or Connect("hand", version=version))

    def send(self, *several: Packet) -> None:
        self._connection.send(b"".join(packets.build(each, self._connection.version) for each in several))

    def read(self) -> Packet:
        return packets.parse(*self._connection.packet(), self._connection.version)

    def rest(self) -> bytes:
        """What comes until the end or a reset."""
        got = self._connection._received
        try:
            while data := self.sock.recv(65536):
                got += data
        except ConnectionResetError:
            pass
        return got

    def __enter__(self) -> Hand:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


@contextmanager
def by_hand(script: Script, version: int = 5) -> Iterator[Hand]:
    """A client that is connected."""
    with FakeBroker(script) as broker, Hand(broker, version) as hand:
        assert isinstance(hand.read(), Connack)
        yield hand


def numbered(*ids: int) -> list[Packet]:
    return [Publish("t", b"%d" % each, each) for each in ids]


# ---- what a broker should do


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_is_answered(version: int) -> None:
    script = Script(grant=1)
    with by_hand(script, version) as hand:
        asked: list[tuple[Packet, Packet]] = [
            (Publish("t", b"x", 7), Puback(7)),
            (Subscribe(8, (Subscription("a", 0), Subscription("b", 2))), Suback(8, (0, 1))),
            (Unsubscribe(9, ("a", "b")), Unsuback(9, (0, 0) if version == 5 else ())),
            (Pingreq(), Pingresp()),
        ]
        for question, answer in asked:
            hand.send(question)
            assert hand.read() == answer
        hand.send(Publish("t", b"unanswered", qos=0), Disconnect())
        assert hand.rest() == b""
        script.wait_ended()
    assert [type(event.packet) for event in script.events] == [
        Connect, Publish, Subscribe, Unsubscribe, Pingreq, Publish, Disconnect,
    ]  # fmt: skip


def test_numbers_count_over_connections() -> None:
    script = Script()
    with FakeBroker(script) as broker:
        for round_ in (1, 2):
            with Hand(broker) as hand:
                hand.send(*numbered(1, 2))
                assert [hand.read() for _ in range(3)] == [Connack(), Puback(1), Puback(2)]
            script.wait_ended(round_)
    assert [event.number for event in script.events if isinstance(event.packet, Publish)] == [1, 2, 3, 4]
    assert [event.number for event in script.events if isinstance(event.packet, Connect)] == [1, 2]


def test_topics_are_filled_in_for_aliases() -> None:
    script = Script(connack=Connack(properties={"topic_alias_maximum": 2}))
    with by_hand(script) as hand:
        hand.send(
            Publish("one", b"", 1, properties={"topic_alias": 1}),
            Publish("", b"", 2, properties={"topic_alias": 1}),
            Publish("two", b"", 3, properties={"topic_alias": 1}),
            Publish("", b"", 4, properties={"topic_alias": 1}),
        )
        script.wait(Publish, 4)
    assert [publish.topic for publish in script.publishes] == ["one", "one", "two", "two"]
    assert [publish.topic for publish in script.of_type(Publish)] == ["one", "", "two", ""]


@pytest.mark.parametrize(
    ("limits", "several", "error"),
    [
        ({"receive_maximum": 2}, numbered(1, 2, 3), AssertionError),
        ({"maximum_packet_size": 9}, [Publish("t", b"1234", 1)], AssertionError),
        ({"maximum_qos": 0}, numbered(1), AssertionError),
        ({"retain_available": 0}, [Publish("t", b"", 1, retain=True)], AssertionError),
        ({}, [Publish("t", b"", 1, properties={"topic_alias": 1})], Malformed),
        ({"topic_alias_maximum": 5}, [Publish("", b"", 1, properties={"topic_alias": 5})], Malformed),
        ({"topic_alias_maximum": 5}, [Publish("t", b"", 1, properties={"topic_alias": 6})], Malformed),
        ({}, [Connect("again")], AssertionError),
    ],
)
def test_a_client_beyond_the_limits_fails_the_test(
    limits: dict[str, Any], several: list[Packet], error: type[Exception]
) -> None:
    script = Script(withhold(), connack=Connack(properties=limits))
    with pytest.raises(error), by_hand(script) as hand:
        hand.send(*several)
        script.wait_ended()


def test_a_client_within_receive_maximum_is_fine() -> None:
    script = Script(connack=Connack(properties={"receive_maximum": 1}))
    with by_hand(script) as hand:
        for each in numbered(1, 2, 3):
            hand.send(each)
            hand.read()
    assert script.most_in_flight == 1


def test_a_malformed_client_fails_the_test() -> None:
    script = Script()
    with pytest.raises(Malformed, match="QoS 3"), by_hand(script) as hand:
        hand.sock.sendall(b"\x36\x06\x00\x01t\x00\x01\x00")
        script.wait_ended()


# ---- what it is told instead


def test_withhold() -> None:
    with by_hand(Script(withhold(2))) as hand:
        hand.send(*numbered(1, 2, 3))
        assert [hand.read(), hand.read()] == [Puback(1), Puback(3)]


def test_in_reverse() -> None:
    with by_hand(Script(in_reverse(3))) as hand:
        hand.send(*numbered(1, 2, 3, 4))
        assert [hand.read() for _ in range(3)] == [Puback(3), Puback(2), Puback(1)]
        hand.send(*numbered(5, 6))
        assert hand.read() == Puback(6)


def test_refuse_and_first_of() -> None:
    with by_hand(Script(first_of(refuse(0x97, 1, reason_string="full"), withhold(2), refuse(0x87, 2, 3)))) as hand:
        hand.send(*numbered(1, 2, 3, 4))
        told = {"reason_string": "full"}
        assert [hand.read() for _ in range(3)] == [Puback(1, 0x97, told), Puback(3, 0x87), Puback(4)]


def test_every_form_of_puback() -> None:
    def forms(event: Event) -> Reply | None:
        return Puback(event.number, form=event.number + 1) if isinstance(event.packet, Publish) else None

    with by_hand(Script(forms)) as hand:
        hand.send(*numbered(1, 2, 3))
        assert [hand._connection.packet()[1] for _ in range(3)] == [b"\0\1", b"\0\2\0", b"\0\3\0\0"]


def test_unknown_ids_and_malformed_bytes() -> None:
    def wrong(event: Event) -> Reply | None:
        if not isinstance(event.packet, Publish):
            return None
        return [Puback(event.packet.packet_id + 1000), *event.usual] if event.number == 1 else b"\x41\x00"

    with by_hand(Script(wrong)) as hand:
        hand.send(*numbered(1, 2))
        assert [hand.read(), hand.read()] == [Puback(1001), Puback(1)]
        with pytest.raises(Malformed):
            hand.read()


@pytest.mark.parametrize("reset", [True, False])
def test_cut_anywhere(reset: bool) -> None:
    data = packets.build(Connack(properties={"reason_string": "hello"}), 5)
    for size in range(len(data) + 1):
        with FakeBroker(Script(lambda event, size=size: Cut(data[:size], reset))) as broker, Hand(broker) as hand:  # type: ignore[misc]
            assert hand.rest() == data[:size]


def test_refused_connections_and_disconnects() -> None:
    def plan(event: Event) -> Reply | None:
        if isinstance(event.packet, Connect):
            replies: list[Reply] = [Connack(0x89), Connack(), WITHHOLD, HANG_UP]
            return replies[event.number - 1]
        return Disconnect(0x8E) if isinstance(event.packet, Pingreq) else None

    with FakeBroker(Script(plan)) as broker:
        with Hand(broker) as hand:
            assert hand.read() == Connack(0x89)
        with Hand(broker) as hand:
            assert hand.read() == Connack()
            hand.send(Pingreq())
            assert hand.read() == Disconnect(0x8E)
        with Hand(broker) as hand:
            hand.send(Disconnect())
            assert hand.rest() == b""
        with Hand(broker) as hand:
            assert hand.rest() == b""


# ---- connections


def test_connections_in_parallel() -> None:
    script = Script()
    with FakeBroker(script, parallel=True) as broker, Hand(broker) as first, Hand(broker, 4) as second:
        for hand in (second, first):
            hand.read()
            hand.send(*numbered(1))
            assert hand.read() == Puback(1)
    assert {event.connection.version for event in script.events} == {4, 5}


def test_serving_by_hand() -> None:
    taken: queue.Queue[object] = queue.Queue()

    def serve(connection: Connection) -> None:
        taken.put(connection.accept(Connack(properties={"topic_alias_maximum": 1})))
        for publish in connection.publishes(2):
            taken.put(connection.topic_of(publish))
        connection.send_byte_by_byte(puback(1, 2))
        connection.send_packets(Publish("down", b"x", 5), Disconnect(0x8B))
        taken.put(connection.receive())
        connection.until_gone()

    will = Will("w", b"x", 1, True, {"will_delay": 3})
    connect = Connect("c", False, 30, "user", b"pass", will, {"session_expiry": 9})
    with FakeBroker(serve) as broker, Hand(broker, connect=connect) as hand:
        hand.send(Publish("up", b"", 1, properties={"topic_alias": 1}), Pingreq())
        hand.send(Publish("", b"", 2, properties={"topic_alias": 1}))
        got = [hand.read() for _ in range(6)]
        assert got[1:] == [Pingresp(), Puback(1), Puback(2), Publish("down", b"x", 5), Disconnect(0x8B)]
        hand.send(Puback(5, 0x83))
        assert [taken.get(timeout=LIMIT) for _ in range(4)] == [connect, "up", "up", Puback(5, 0x83)]


def test_what_a_script_raises_fails_the_test() -> None:
    def wrong(event: Event) -> Reply | None:
        raise LookupError("as planned")

    with pytest.raises(LookupError, match="as planned"), FakeBroker(Script(wrong)) as broker, Hand(broker) as hand:
        assert hand.rest() == b""


# ---- with paho


class Told:
    """A paho client that notes what it is told."""

    def __init__(self, version: MQTTProtocolVersion) -> None:
        self.notes: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.client = Client(CallbackAPIVersion.VERSION2, "paho", protocol=version)
        self.client.on_connect = self._note("connack")
        self.client.on_publish = self._note("puback")
        self.client.on_subscribe = self._note("suback")
        self.client.on_unsubscribe = self._note("unsuback")
        self.client.on_message = self._note("message")
        self.client.on_disconnect = self._note("disconnect")
        self.thread = threading.Thread(target=self._run)

    def _note(self, name: str) -> Any:
        return lambda client, userdata, *rest: self.notes.put((name, *rest))

    def _run(self) -> None:
        while self.client.loop(0.1) == 0:
            pass

    def next(self, name: str) -> tuple[Any, ...]:
        kind, *rest = self.notes.get(timeout=LIMIT)
        assert kind == name, (kind, rest)
        return tuple(rest)

    def start(self, port: int, **settings: Any) -> None:
        self.client.connect("127.0.0.1", port, **settings)
        self.thread.start()


def test_paho_speaks_5_with_it() -> None:
    def plan(event: Event) -> Reply | None:
        match event.packet:
            case Connect():
                limits = {"receive_maximum": 9, "server_keep_alive": 55, "maximum_qos": 1}
                return Connack(0, True, {"assigned_client_id": "x", **limits})
            case Publish():
                return Puback(event.packet.packet_id, 0x87, {"reason_string": "no", "user_property": (("a", "b"),)})
            case Subscribe(packet_id):
                return [Suback(packet_id, (1, 0x87)), Publish("d/é", b"\xff", 3, properties={"message_expiry": 60})]
            case Puback():
                return Disconnect(0x8E, {"reason_string": "another"})
        return None

    script = Script(plan)
    told = Told(MQTTProtocolVersion.MQTTv5)
    told.client.username_pw_set("user", "pass")
    will = new_properties(PacketTypes.WILLMESSAGE)
    will.WillDelayInterval = 4
    told.client.will_set("will", b"x", 1, True, will)
    connecting = new_properties(PacketTypes.CONNECT)
    connecting.SessionExpiryInterval, connecting.ReceiveMaximum = 100, 20
    with FakeBroker(script) as broker:
        told.start(broker.port, keepalive=33, clean_start=False, properties=connecting)
        flags, reason, found = told.next("connack")
        assert (flags.session_present, reason, found.ReceiveMaximum, found.ServerKeepAlive) == (True, 0, 9, 55)
        publishing = new_properties(PacketTypes.PUBLISH)
        publishing.MessageExpiryInterval, publishing.ContentType, publishing.PayloadFormatIndicator = 7, "text", 1
        publishing.UserProperty = [("k", "v"), ("k", "w")]
        told.client.publish("u/ü", "x", 1, True, publishing)
        _, reason, found = told.next("puback")
        assert (reason, found.ReasonString, found.UserProperty) == (0x87, "no", [("a", "b")])
        told.client.subscribe([("d/#", SubscribeOptions(1, True, True, 2)), ("e", SubscribeOptions(0))])
        _, reasons, _ = told.next("suback")
        assert reasons == [1, 0x87]
        (message,) = told.next("message")
        assert (message.topic, message.payload, message.properties.MessageExpiryInterval) == ("d/é", b"\xff", 60)
        _, reason, found = told.next("disconnect")
        assert (reason, found.ReasonString) == (0x8E, "another")
        told.thread.join(LIMIT)
    (connect,), (publish,), (subscribe,) = script.of_type(Connect), script.of_type(Publish), script.of_type(Subscribe)
    assert connect == Connect(
        "paho", False, 33, "user", b"pass", Will("will", b"x", 1, True, {"will_delay": 4}),
        {"session_expiry": 100, "receive_maximum": 20},
    )  # fmt: skip
    assert publish == Publish(
        "u/ü", b"x", 1, False, True, 1,
        {"payload_format": 1, "message_expiry": 7, "content_type": "text", "user_property": (("k", "v"), ("k", "w"))},
    )  # fmt: skip
    assert subscribe.subscriptions == (Subscription("d/#", 1, True, True, 2), Subscription("e", 0))


def test_paho_speaks_3_1_1_with_it() -> None:
    script = Script(grant=0x80, connack=Connack(0, True))
    told = Told(MQTTProtocolVersion.MQTTv311)
    with FakeBroker(script) as broker:
        told.start(broker.port)
        assert told.next("connack")[0].session_present
        told.client.publish("t", b"x", 1)
        told.next("puback")
        told.client.subscribe("a/+", 1)
        assert told.next("suback")[1] == [0x80]
        told.client.unsubscribe("a/+")
        told.next("unsuback")
        told.client.disconnect()
        assert told.next("disconnect")[1] == 0
        told.thread.join(LIMIT)
        script.wait(Disconnect)
    assert script.of_type(Connect) == [Connect("paho", version=4)]
    assert script.of_type(Unsubscribe)[0].filters == ("a/+",)
