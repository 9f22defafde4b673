"""MQTT 5 on both connections: what the broker says of itself is obeyed, and what only version 5 has works."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from cloudpubsub import Message
from tests.brokers import Mosquitto
from tests.collector import Collector
from tests.fake_broker import FakeBroker
from tests.packets import Connack, Connect, Disconnect, Puback, Publish, Subscribe
from tests.publishing import LIMIT, client_to, number_of, publish_numbers, until
from tests.script import Event, Script, in_reverse

FIVE: dict[str, Any] = {"protocol": "5"}


def connack(**limits: Any) -> Connack:
    return Connack(properties=limits)


def test_everything_arrives_in_order_through_restarts_of_a_real_broker(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with Collector(mosquitto.port, key=number_of) as collector:
        with client_to(mosquitto.port, tmp_path, **FIVE) as client:
            publish_numbers(client, range(1000))
            collector.wait_for(500, LIMIT)
            mosquitto.restart()
            publish_numbers(client, range(1000, 2000))
            assert client.flush(LIMIT) == 0
        collector.wait_for(2000, LIMIT)
        assert collector.first_deliveries() == list(range(2000))


def test_a_message_and_its_properties_come_back(mosquitto: Mosquitto) -> None:
    came: list[Message] = []
    done = threading.Event()

    def on_message(message: Message) -> None:
        came.append(message)
        done.set()

    with client_to(mosquitto.port, None, client_id="five", message_ids=True, **FIVE) as client:
        client.subscribe("a/#", on_message)
        client.wait_subscribed(LIMIT)
        position = client.publish("a/b", "text", user_properties={"unit": "°C", "sensor": "7"})
        assert done.wait(LIMIT)
    assert (came[0].topic, came[0].payload, came[0].qos) == ("a/b", b"text", 1)
    assert came[0].user_properties[1:] == (("unit", "°C"), ("sensor", "7"))
    name, text = came[0].user_properties[0]
    assert name == "cloudpubsub-id"
    assert cloudpubsub.MessageId.parse(text)[:2] == (client.spool_id, position)


def test_properties_are_kept_on_the_disk_and_given_to_on_publish(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with client_to(1, tmp_path, **FIVE) as client:
        client.publish("a", b"p", userdata=b"u", user_properties=[("k", "1"), ("k", "2")], retain=True)
    seen: list[Message] = []
    with client_to(mosquitto.port, tmp_path, on_publish=seen.append, **FIVE) as client:
        assert client.flush(LIMIT) == 0
        until(lambda: seen)
    assert (seen[0].payload, seen[0].userdata, seen[0].retain) == (b"p", b"u", True)
    assert seen[0].user_properties == (("k", "1"), ("k", "2"))


@pytest.mark.parametrize("properties", [{"k": 5}, {5: "v"}, {"k\0": "v"}, [("k", "x" * 65_536)], {"k": "x" * 65_533}])
def test_wrong_user_properties_are_refused_and_nothing_is_stored(properties: Any) -> None:
    with client_to(1, None, **FIVE) as client:
        with pytest.raises((TypeError, ValueError), match="user_properties"):
            client.publish("a", b"", user_properties=properties)
        assert client.stats().published == 0


def test_no_more_is_in_flight_than_receive_maximum_says(tmp_path: Path) -> None:
    """The script fails on one too many; acknowledgements come late and in reverse, and once the link is lost."""
    with client_to(1, tmp_path, **FIVE) as client:
        publish_numbers(client, range(100))
    script = Script(in_reverse(5), connack=connack(receive_maximum=5))
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, **FIVE) as client:
        assert client.flush(LIMIT) == 0
    assert script.most_in_flight == 5


@pytest.mark.parametrize("maximum", [0, 1, 3, 65_535])
def test_topic_aliases_never_exceed_what_the_broker_allows(maximum: int, tmp_path: Path) -> None:
    script = Script(connack=connack(topic_alias_maximum=maximum))
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, **FIVE) as client:
        for number in range(60):
            client.publish(f"gateway/sensor/{number % 6}", b"%d" % number)
        assert client.flush(LIMIT) == 0
    assert [publish.topic for publish in script.publishes] == [f"gateway/sensor/{n % 6}" for n in range(60)]
    aliased = [event.packet for event in script.events if isinstance(event.packet, Publish) and not event.packet.topic]
    assert bool(aliased) == (maximum >= 3)


def test_aliases_are_told_anew_on_every_connection_and_never_stored(tmp_path: Path) -> None:
    def hang_up_once(event: Event) -> Any:
        return Disconnect(0x8B) if isinstance(event.packet, Publish) and event.number == 20 else None

    script = Script(hang_up_once, connack=connack(topic_alias_maximum=10, receive_maximum=10))
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, **FIVE) as client:
        for number in range(50):
            client.publish("one/topic", b"%d" % number)
        until(lambda: broker.connections >= 1)
        assert client.flush(LIMIT) == 0
    assert {publish.topic for publish in script.publishes} == {"one/topic"}


def test_the_brokers_keep_alive_counts(tmp_path: Path) -> None:
    with FakeBroker(Script(connack=connack(server_keep_alive=1))) as broker:
        with client_to(broker.port, tmp_path, keep_alive=3600, **FIVE) as client:
            until(lambda: client.stats().connected)
            assert client._publisher._alive._half_s == 0.5


@pytest.mark.parametrize("seconds", [0, 30, 65_535])
def test_a_broker_that_waits_longer_for_us_does_not_make_us_wait_longer_for_it(seconds: int, tmp_path: Path) -> None:
    with FakeBroker(Script(connack=connack(server_keep_alive=seconds))) as broker:
        with client_to(broker.port, tmp_path, keep_alive=20, **FIVE) as client:
            until(lambda: client.stats().connected)
            assert client._publisher._alive._half_s == 10


def test_a_broker_that_takes_no_packet_at_all_is_named_and_nothing_is_given_up(tmp_path: Path) -> None:
    with FakeBroker(Script(connack=connack(maximum_packet_size=7))) as broker:
        with client_to(broker.port, tmp_path, **FIVE) as client:
            client.publish("a", b"")
            until(lambda: "Maximum Packet Size of 7" in client.stats().last_error)
            assert client.stats().publish_link == "refused"
        assert (client.stats().backlog_messages, client.stats().dead_lettered) == (1, 0)
    with FakeBroker(Script(connack=connack(maximum_packet_size=8))) as broker:
        with client_to(broker.port, tmp_path, **FIVE) as client:
            assert client.flush(LIMIT) == 0


def test_a_broker_without_qos_1_is_named(tmp_path: Path) -> None:
    with FakeBroker(Script(connack=connack(maximum_qos=0))) as broker:
        with client_to(broker.port, tmp_path, **FIVE) as client:
            until(lambda: "QoS 1" in client.stats().last_error)
            assert client.stats().publish_link == "refused"
            client.publish("a", b"1")
        assert client.stats().backlog_messages == 1


@pytest.mark.parametrize(
    ("reason", "text", "state"),
    [(0x86, "bad user name or password", "refused"), (0x88, "server unavailable", "down"),
     (0x84, "unsupported", "refused")],
)  # fmt: skip
def test_a_refused_connection_is_named(reason: int, text: str, state: str, tmp_path: Path) -> None:
    refusal = Connack(reason, properties={"reason_string": "says the script"})
    with FakeBroker(Script(connack=refusal)) as broker, client_to(broker.port, tmp_path, **FIVE) as client:
        until(lambda: text in client.stats().last_error)
        assert "says the script" in client.stats().last_error
        assert client.stats().publish_link == state


@pytest.mark.parametrize("last", [1, 1500])
def test_the_reason_of_a_disconnect_is_told(last: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []
    over = threading.Event()

    def on_disconnect(reason: str) -> None:
        said.append(reason)
        over.set()

    def take_over(event: Event) -> Any:
        return Disconnect(0x8E) if isinstance(event.packet, Publish) and event.number == last else None

    with FakeBroker(Script(take_over)) as broker:
        with client_to(broker.port, tmp_path, on_disconnect=on_disconnect, **FIVE) as client:
            for _ in range(3 * last):  # there is more to send and to be acknowledged when it comes
                client.publish("a", b"")
            assert over.wait(LIMIT)
    assert "session taken over (0x8e)" in said[0]
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    ("limits", "topic_filter"),
    [
        ({"wildcard_available": 0}, "a/#"),
        ({"wildcard_available": 0}, "$share/g/a/+"),
        ({"shared_available": 0}, "$share/g/a"),
    ],
)
def test_a_subscription_that_the_broker_does_not_have_raises(limits: Any, topic_filter: str) -> None:
    script = Script(connack=connack(**limits))
    with FakeBroker(script, parallel=True) as broker, client_to(broker.port, None, client_id="c", **FIVE) as client:
        client.subscribe("plain", print)
        client.subscribe(topic_filter, print)
        with pytest.raises(cloudpubsub.TopicError, match="refused"):
            client.wait_subscribed(LIMIT)
        assert [s.filter for packet in script.of_type(Subscribe) for s in packet.subscriptions] == ["plain"]


def test_the_subscriber_says_how_much_it_takes_and_how_long_its_session_lives() -> None:
    script = Script()
    with FakeBroker(script, parallel=True) as broker:
        settings = {"client_id": "c", "handler_queue": 7, "session_expiry": 123}
        with client_to(broker.port, None, **settings, **FIVE) as client:
            client.subscribe("a", print)
            client.wait_subscribed(LIMIT)
            connects = {packet.client_id: packet for packet in script.wait(Connect, 2)}
        publish, subscribe = connects["c"], connects["c-sub"]
    assert publish.clean and "session_expiry" not in publish.properties
    assert not subscribe.clean
    assert subscribe.properties["receive_maximum"] == 7
    assert subscribe.properties["session_expiry"] == 123


@pytest.mark.parametrize("present", [True, False])
def test_what_is_retained_is_not_asked_for_again_where_the_session_was_kept(present: bool) -> None:
    script = Script(connack=Connack(session_present=present))
    with FakeBroker(script, parallel=True) as broker, client_to(broker.port, None, client_id="c", **FIVE) as client:
        client.subscribe("a", print)
        client.wait_subscribed(LIMIT)
    (subscribe,) = script.of_type(Subscribe)
    assert [s.retain_handling for s in subscribe.subscriptions] == [1 if present else 0]


def test_what_is_left_of_its_life_travels_with_a_message(tmp_path: Path) -> None:
    script = Script()
    with client_to(1, tmp_path, **FIVE) as client:
        client.publish("a", b"short", ttl=100)
        client.publish("a", b"long", ttl=1e11)
        client.publish("a", b"for ever")
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, **FIVE) as client:
        assert client.flush(LIMIT) == 0
    short, long, for_ever = script.publishes
    assert 80 < short.properties["message_expiry"] <= 100
    assert long.properties["message_expiry"] == 0xFFFF_FFFF
    assert "message_expiry" not in for_ever.properties


@pytest.mark.parametrize("form", [2, 3, 4])
def test_an_acknowledgement_of_any_length_counts(form: int, tmp_path: Path) -> None:
    def answer(event: Event) -> Any:
        return Puback(event.packet.packet_id, 0x10, form=form) if isinstance(event.packet, Publish) else None

    with FakeBroker(Script(answer if form > 2 else None)) as broker, client_to(broker.port, tmp_path, **FIVE) as client:
        publish_numbers(client, range(10))
        assert client.flush(LIMIT) == 0
        assert client.stats().acked == 10
