"""A message is acknowledged when its handlers have returned, in order, and not before."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cloudpubsub import Client, Message, WrongThreadError
from tests.brokers import Mosquitto
from tests.making import DEADLINE_S, Gate, Inbox, eventually, receiver, send, url
from tests.peer import PUBACK, Peer


def connect(peer: Peer, handler: object, **settings: object) -> Client:
    client = Client(url(peer.port), client_id="c", reconnect_min=0.01, reconnect_max=0.02, **settings)
    client.subscribe("#", handler)  # type: ignore[arg-type]
    client.start()
    client.wait_subscribed(DEADLINE_S)
    eventually(lambda: client.stats().connects == 2)
    return client


def test_no_acknowledgement_leaves_while_the_handler_runs() -> None:
    gate = Gate()
    with Peer() as peer:
        client = connect(peer, gate)
        peer.publish(7, "t", b"")
        assert gate.entered.wait(DEADLINE_S)
        # A subscription made now is answered on the same connection: an acknowledgement would have come before it.
        client.subscribe("other", print)
        client.wait_subscribed(DEADLINE_S)
        assert peer.of_type(PUBACK) == []
        gate.opened.set()
        assert [packet.id for packet in peer.wait(PUBACK, 1)] == [7]
        client.close()


def test_acknowledgements_keep_the_order_of_arrival() -> None:
    inbox = Inbox()
    ids = [9, 3, 65535, 1, 40, 2, *range(100, 1100)]
    with Peer() as peer:
        client = connect(peer, inbox)
        for packet_id in ids:
            peer.publish(packet_id, f"t/{packet_id}", b"")
        assert [packet.id for packet in peer.wait(PUBACK, len(ids))] == ids
        client.close()


def test_messages_without_a_handler_are_acknowledged_in_turn_and_counted() -> None:
    inbox = Inbox()
    with Peer() as peer:
        client = connect(peer, inbox)
        client.subscribe("$SYS/x", inbox)
        for packet_id, topic in enumerate(["a", "$SYS/y", "b", "$z"], 1):
            peer.publish(packet_id, topic, b"")
        assert [packet.id for packet in peer.wait(PUBACK, 4)] == [1, 2, 3, 4]
        assert (client.stats().received, client.stats().unmatched) == (4, 2)
        assert inbox.topics == ["a", "b"]
        client.close()


def test_a_handler_that_ends_its_subscription_gets_nothing_behind_and_all_is_acknowledged() -> None:
    gate, seen = Gate(), list[bytes]()

    def handler(message: Message) -> None:
        if not seen:
            gate(message)  # until all the others have come, many at once
        seen.append(message.payload)
        if message.payload == b"500":
            with pytest.raises(WrongThreadError):
                client.close()
            client.unsubscribe("#")

    with Peer() as peer:
        client = connect(peer, handler)
        for packet_id in range(1, 1001):
            peer.publish(packet_id, "t", b"%d" % packet_id)
        assert gate.entered.wait(DEADLINE_S)
        eventually(lambda: client.stats().received == 1000)
        gate.opened.set()
        assert [packet.id for packet in peer.wait(PUBACK, 1000)] == list(range(1, 1001))
        assert seen == [b"%d" % packet_id for packet_id in range(1, 501)]
        assert (client.stats().unmatched, client.stats().handler_errors) == (500, 0)
        client.close()


def test_close_acknowledges_what_the_last_handler_did_and_nothing_behind_it() -> None:
    gate = Gate()
    with Peer() as peer:
        client = connect(peer, gate)
        peer.publish(1, "t", b"")
        peer.publish(2, "t", b"")
        assert gate.entered.wait(DEADLINE_S)
        eventually(lambda: client.stats().received == 2)
        closing = threading.Thread(target=client.close)
        closing.start()
        eventually(client._dispatcher._interrupt.is_set, "close() waits for the handler")
        gate.opened.set()
        closing.join(DEADLINE_S)
        peer.wait_closed(2)
        assert [packet.id for packet in peer.of_type(PUBACK)] == [1]
    assert len(gate.inbox.calls) == 1


def test_a_handler_that_returns_long_after_close_does_no_harm() -> None:
    gate = Gate()
    with Peer() as peer:
        client = connect(peer, gate)
        peer.publish(1, "t", b"")
        assert gate.entered.wait(DEADLINE_S)
        assert client.close(timeout=0.2) == 0
        gate.opened.set()
        gate.inbox.wait(1)
        peer.wait_closed(2)
        assert peer.of_type(PUBACK) == []


def test_acknowledgements_of_an_older_connection_are_forgotten() -> None:
    gate = Gate()
    with Peer(session_present=True) as peer:
        client = connect(peer, gate)
        peer.publish(1, "t", b"first")
        assert gate.entered.wait(DEADLINE_S)
        peer.hang_up()
        eventually(lambda: client.stats().reconnects >= 2)
        client.wait_subscribed(DEADLINE_S)
        gate.opened.set()
        gate.inbox.wait(1)
        peer.publish(5, "t", b"again", dup=True)
        assert [packet.id for packet in peer.wait(PUBACK, 1)] == [5]
        assert gate.inbox.wait(2)[1].duplicate
        client.close()


def test_a_spool_does_not_change_what_is_delivered(mosquitto: Mosquitto, tmp_path: Path) -> None:
    inbox = Inbox()

    def echo(message: Message) -> None:
        if message.topic == "in":
            client.publish("out", message.payload)

    with receiver(mosquitto, ("in", echo), ("out", inbox), spool=tmp_path / "spool") as client:
        send(mosquitto, [("in", b"%d" % number) for number in range(500)])
        inbox.wait(500)
    assert inbox.payloads == [b"%d" % number for number in range(500)]
