"""Messages reach the handlers that want them, whole and in order, on both brokers."""

from __future__ import annotations

import pytest

from cloudpubsub import Client, Message, TopicError
from tests.brokers import Broker, Mosquitto
from tests.making import DEADLINE_S, Inbox, eventually, receiver, send, url


def test_several_handlers_of_one_filter_are_called_in_order(broker: Broker) -> None:
    calls: list[str] = []
    second = Inbox(lambda _: calls.append("second"))
    with receiver(broker, ("t", lambda _: calls.append("first")), ("t", second)):
        send(broker, [("t", b"1"), ("t", b"2")])
        second.wait(2)
        eventually(lambda: len(calls) == 4)
    assert calls == ["first", "second"] * 2


def test_messages_of_qos_0_are_delivered(mosquitto: Mosquitto) -> None:
    inbox = Inbox()
    with receiver(mosquitto, ("t", inbox)):
        send(mosquitto, [("t", b"1"), ("t", b"2")], qos=0)
        messages = inbox.wait(2)
    assert [(message.payload, message.qos) for message in messages] == [(b"1", 0), (b"2", 0)]


def test_subscribing_works_offline_and_before_start(mosquitto: Mosquitto) -> None:
    before, offline, sentinel = Inbox(), Inbox(), Inbox()
    mosquitto.stop()
    client = Client(url(mosquitto.port), client_id="receiver", reconnect_min=0.05, reconnect_max=0.2)
    client.subscribe("before", before)
    with client:
        client.subscribe("offline", offline)
        eventually(lambda: client.stats().last_error, "an attempt that failed")
        mosquitto.start()
        client.wait_subscribed(DEADLINE_S)
        client.subscribe("online", sentinel)
        client.wait_subscribed(DEADLINE_S)
        send(mosquitto, [("before", b"1"), ("offline", b"2"), ("online", b"3")])
        sentinel.wait(1)
    assert (before.payloads, offline.payloads) == ([b"1"], [b"2"])


def test_a_handler_may_subscribe_and_unsubscribe(broker: Broker) -> None:
    inbox = Inbox()

    def once(message: Message) -> None:
        client.subscribe("second", inbox)
        client.unsubscribe("first", once)

    with receiver(broker, ("first", once)) as client:
        send(broker, [("first", b"")])
        eventually(lambda: client._matcher.filters() == ("second",))
        client.wait_subscribed(DEADLINE_S)
        send(broker, [("second", b"1")])
        assert inbox.wait(1)[0].payload == b"1"


def test_a_second_filter_of_the_same_handler_does_not_call_it_twice(mosquitto: Mosquitto) -> None:
    inbox, sentinel = Inbox(), Inbox()
    with receiver(mosquitto, ("t/+", inbox), ("t/#", inbox), ("end", sentinel)):
        send(mosquitto, [("t/x", b"1"), ("end", b"")])
        sentinel.wait(1)
    # Mosquitto sends overlapping subscriptions as one message.
    assert inbox.payloads == [b"1"]


@pytest.mark.parametrize("topic_filter", ["", "a/#/b", "a+", "a\0", "x" * 65_536])
def test_a_bad_filter_is_refused_at_once(topic_filter: str) -> None:
    client = Client("mqtt://127.0.0.1:1", client_id="x")
    with pytest.raises(TopicError):
        client.subscribe(topic_filter, print)
    with pytest.raises(TypeError, match="callable"):
        client.subscribe("a", "not a handler")  # type: ignore[arg-type]
    assert client.close() == 0
