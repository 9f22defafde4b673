"""Messages reach the handlers that want them, whole and in order, on both brokers."""

from __future__ import annotations

import pytest

from cloudpubsub import Client, Message, TopicError
from tests.brokers import Broker, Mosquitto
from tests.making import DEADLINE_S, Inbox, eventually, receiver, send, url


def test_handlers_get_what_their_filters_match(broker: Broker) -> None:
    one, rest, exact, other = Inbox(), Inbox(), Inbox(), Inbox()
    with receiver(broker, ("a/+/c", one), ("a/#", rest), ("a/b/c", exact), ("z", other)):
        send(broker, [("a/b/c", b"1"), ("a/x/c", b"2"), ("a", b"3"), ("a/b/c/d", b"4"), ("z", b"5")])
        # Where filters overlap, a broker may send a message once, or once for each of them: rumqttd does the latter.
        eventually(lambda: [len(set(box.payloads)) for box in (one, rest, exact, other)] == [2, 4, 1, 1])
    assert set(one.payloads) == {b"1", b"2"}
    assert set(rest.payloads) == {b"1", b"2", b"3", b"4"}
    assert set(exact.payloads) == {b"1"}
    assert other.payloads == [b"5"]


def test_messages_come_in_the_order_of_publishing(broker: Broker) -> None:
    inbox = Inbox()
    with receiver(broker, ("t/#", inbox)) as client:
        numbers = [str(number).encode() for number in range(3000)]
        send(broker, [(f"t/{number[-1:].decode()}", number) for number in numbers])
        inbox.wait(3000)
        assert client.stats().received == 3000
    assert inbox.payloads == numbers


def test_several_handlers_of_one_filter_are_called_in_order(broker: Broker) -> None:
    calls: list[str] = []
    second = Inbox(lambda _: calls.append("second"))
    with receiver(broker, ("t", lambda _: calls.append("first")), ("t", second)):
        send(broker, [("t", b"1"), ("t", b"2")])
        second.wait(2)
        eventually(lambda: len(calls) == 4)
    assert calls == ["first", "second"] * 2


def test_payloads_are_not_touched(broker: Broker) -> None:
    inbox = Inbox()
    payloads = [bytes(range(256)) * 3, b"", b"\0", "grün".encode()]
    with receiver(broker, ("u/+", inbox)):
        send(broker, [("u/x", payload) for payload in payloads])
        messages = inbox.wait(len(payloads))
    assert [message.payload for message in messages] == payloads
    assert {(message.topic, message.qos, message.retain) for message in messages} == {("u/x", 1, False)}


def test_topics_may_be_any_unicode(mosquitto: Mosquitto) -> None:
    inbox = Inbox()
    with receiver(mosquitto, ("grün/+/🌡", inbox)):
        send(mosquitto, [("grün/東京/🌡", b"1")])  # rumqttd ends when it gets such a topic
        assert inbox.wait(1)[0].topic == "grün/東京/🌡"


def test_a_message_of_one_mebibyte_arrives(broker: Broker) -> None:
    inbox = Inbox()
    payload = bytes(range(256)) * 4096
    with receiver(broker, ("big", inbox), ring_bytes=8 << 20, max_payload_bytes=1 << 20) as client:
        client.publish("big", payload)
        assert client.flush(DEADLINE_S) == 0
        inbox.wait(1)
    assert inbox.payloads == [payload]


def test_messages_of_qos_0_are_delivered(mosquitto: Mosquitto) -> None:
    inbox = Inbox()
    with receiver(mosquitto, ("t", inbox)):
        send(mosquitto, [("t", b"1"), ("t", b"2")], qos=0)
        messages = inbox.wait(2)
    assert [(message.payload, message.qos) for message in messages] == [(b"1", 0), (b"2", 0)]


def test_a_retained_message_says_so(broker: Broker) -> None:
    send(broker, [("t", b"kept")], retain=True)
    inbox = Inbox()
    with receiver(broker, ("t", inbox)):
        inbox.wait(1)
        send(broker, [("t", b"live")])
        kept, live = inbox.wait(2)
    assert (kept.payload, kept.retain) == (b"kept", True)
    assert (live.payload, live.retain) == (b"live", False)


def test_what_is_published_retained_is_kept_by_the_broker(mosquitto: Mosquitto) -> None:
    with Client(url(mosquitto.port), client_id="source") as client:
        client.wait(client.publish("t", b"kept", retain=True), DEADLINE_S)
    inbox = Inbox()
    with receiver(mosquitto, ("t", inbox)):
        assert inbox.wait(1)[0].retain


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


def test_a_handler_may_publish(broker: Broker) -> None:
    inbox = Inbox()
    def answer(message: Message) -> None:
        client.publish("answer/" + message.topic[4:], message.payload)

    with receiver(broker, ("ask/+", answer), ("answer/#", inbox)) as client:
        send(broker, [(f"ask/{number}", b"%d" % number) for number in range(200)])
        inbox.wait(200)
    assert inbox.topics == [f"answer/{number}" for number in range(200)]


def test_unsubscribed_handlers_are_not_called(broker: Broker) -> None:
    stays, goes, sentinel = Inbox(), Inbox(), Inbox()
    with receiver(broker, ("t", stays), ("t", goes), ("u", goes), ("end", sentinel)) as client:
        client.unsubscribe("t", goes)
        client.unsubscribe("u")
        send(broker, [("t", b"1"), ("u", b"2"), ("end", b"3")])
        sentinel.wait(1)
        stays.wait(1)
        with pytest.raises(KeyError):
            client.unsubscribe("u")
        with pytest.raises(KeyError):
            client.unsubscribe("t", goes)
    assert (stays.payloads, goes.payloads) == ([b"1"], [])


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
