"""The end of a broker, and where the four differ in topics and answers; docs/brokers.md has what was found."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cloudpubsub import Client, TopicError
from cloudpubsub.demo.relay import Relay
from tests import packets
from tests.brokers import HOST, Ability, Rumqttd
from tests.collector import Collector
from tests.links import PLAIN_WAYS, Link, Way
from tests.making import Gate, Inbox, eventually, receiver, send, url
from tests.more_brokers import Nats
from tests.packets import Connack, Connect
from tests.publishing import LIMIT, client_to, number_of, publish_numbers, until
from tests.test_publish_broker_restart import publishing

COUNT = 3_000
# RabbitMQ takes its time to start again.
SLOW = (pytest.mark.slow_brokers, pytest.mark.timeout(600))
on_each_broker = pytest.mark.parametrize("link", PLAIN_WAYS, ids=lambda way: way.name, indirect=True)
on_each_broker_that_ends = pytest.mark.parametrize(
    "link",
    [pytest.param(way, id=way.name, marks=SLOW if way.kind == "rabbitmq" else ()) for way in PLAIN_WAYS],
    indirect=True,
)


# ---- the end of a broker


@on_each_broker_that_ends
def test_nothing_is_lost_when_the_broker_is_killed(link: Link, tmp_path: Path) -> None:
    """One that forgets: if the subscriber is back before the publisher.  One that does not: in mid-stream."""
    if link.can(Ability.SESSION_AFTER_KILL):
        _killed_in_mid_stream(link, tmp_path)
    else:
        _forgetful_broker_ends(link, tmp_path)


def _killed_in_mid_stream(link: Link, tmp_path: Path) -> None:
    """What it had acknowledged it still has: a subscriber who was away gets what is stored, in that order."""
    with link.collector(key=number_of):
        pass
    client = link.client(tmp_path / "spool", max_publish_rate=5_000)
    with publishing(client, COUNT, link.topic()):
        until(lambda: client.stats().acked > COUNT // 4)
        link.broker.kill()
        until(lambda: not client.stats().connected)
        # NATS acknowledges what it has in memory: once in hundreds of kills that is lost (docs/brokers.md).
        kept_from = client.stats().acked if link.way.kind == "nats" else 0
        link.broker.start()
        until(lambda: client.stats().connected)
    assert client.stats().acked == client.stats().published == COUNT
    with link.collector(key=number_of) as collector:
        until(lambda: collector.first_deliveries()[-1:] == [COUNT - 1])
    arrived = collector.first_deliveries()
    assert arrived == sorted(arrived)
    assert set(arrived) >= set(range(kept_from, COUNT))


def _forgetful_broker_ends(link: Link, tmp_path: Path) -> None:
    third = COUNT // 3
    with Relay(link.port) as relay, link.collector(key=number_of) as collector:
        with link.client(tmp_path / "spool", port=relay.port, max_inflight=500) as client:
            publish_numbers(client, range(third), link.topic())
            assert client.flush(LIMIT) == 0
            collector.wait_for(third, LIMIT)
            relay.cut()
            publish_numbers(client, range(third, 2 * third), link.topic())
            before = collector.connects
            link.broker.kill()
            publish_numbers(client, range(2 * third, 3 * third), link.topic())
            link.broker.start()
            until(lambda: collector.connects > before)
            collector.wait_subscribed(LIMIT)
            relay.restore()
            assert client.flush(LIMIT) == 0
        collector.wait_for(COUNT, LIMIT)
        assert collector.first_deliveries() == list(range(COUNT))


@on_each_broker_that_ends
@pytest.mark.parametrize("end", ["restart", "kill"])
def test_what_is_kept_when_the_broker_ends(end: str, link: Link) -> None:
    keeps_session = link.can(Ability.SESSION_AFTER_STOP if end == "restart" else Ability.SESSION_AFTER_KILL)
    retained = Ability.RETAINED_AFTER_STOP if end == "restart" else Ability.RETAINED_AFTER_KILL
    with link.collector("x"):
        pass
    with link.client() as client:
        client.publish(link.topic("x"), b"waits")
        client.publish(link.topic("kept"), b"kept", retain=True)
        assert client.flush(LIMIT) == 0
    if end == "kill":
        link.broker.kill()
        link.broker.start()
    else:
        link.broker.restart()
    with link.collector("x") as collector:
        link.send(("x", b"after"))
        collector.wait_for(2 if keeps_session else 1, LIMIT)
        assert collector.first_deliveries() == ([b"waits", b"after"] if keeps_session else [b"after"])
    if retained not in link.broker.unsure:
        with link.collector("kept", "other") as collector:
            link.send(("kept", b"after"))
            collector.wait_for(2 if link.can(retained) else 1, LIMIT)
            assert collector.first_deliveries() == ([b"kept", b"after"] if link.can(retained) else [b"after"])


# ---- versions


@on_each_broker
def test_what_mqtt_5_is_answered(link: Link) -> None:
    port = link.broker.port_for(secure=False, protocol="5")
    with socket.create_connection((HOST, port), timeout=LIMIT) as sock, sock.makefile("rb") as answers:
        sock.sendall(packets.build(Connect(link.word), 5))
        first = answers.read(4)
        if link.can(Ability.VERSION_5):
            assert (first[0], first[3]) == (0x20, 0)
        elif isinstance(link.broker, Nats):
            assert packets.parse_all(first, 4) == [Connack(1)]
            assert answers.read() == b""
        else:
            assert first == b""  # it hangs up


@pytest.mark.parametrize("link", [Way("mosquitto", protocol="5")], ids=lambda way: way.name, indirect=True)
def test_a_subscriber_of_3_1_1_gets_what_mqtt_5_published(link: Link) -> None:
    with link.collector(protocol="3.1.1") as collector, link.client() as client:
        publish_numbers(client, range(10), link.topic())
        collector.wait_for(10, LIMIT)


def test_rumqttd_hangs_up_on_a_subscriber_of_3_1_1_that_is_to_get_what_mqtt_5_published(rumqttd: Rumqttd) -> None:
    """Its thread panics at a property, here a topic alias; the message is acknowledged all the same."""
    with Collector(rumqttd.port) as collector, client_to(rumqttd.v5_port, None, protocol="5") as client:
        client.wait(client.publish("t", b"1"), LIMIT)
        until(lambda: not collector.is_subscribed)
        with pytest.raises(TimeoutError):  # and it is not taken back
            collector.wait_subscribed(2)
        assert collector.count == 0


# ---- topics


ODD = {"dot": "a.b", "space": "a b", "star": "a*b"}
NEEDS = {"dot": Ability.DOT_IN_TOPIC, "space": Ability.SPACE_IN_TOPIC, "star": Ability.STAR_IN_TOPIC}
ARRIVES_FROM_RABBITMQ = {"dot": "a/b", "star": "a+b"}


@on_each_broker
@pytest.mark.parametrize("kind", ODD)
def test_a_topic_with_a_dot_a_space_or_a_star(kind: str, link: Link) -> None:
    if isinstance(link.broker, Nats) and not link.can(NEEDS[kind]):
        # It hangs up on the publisher, each time anew, until the message is set aside.
        with link.client(poison_window=0.3, min_stable=0) as client:
            for number in range(50):
                client.publish(link.topic(ODD[kind] if number == 20 else "x"), b"%d" % number)
            assert client.flush(LIMIT) == 1
            assert (client.stats().acked, client.stats().dead_lettered) == (49, 1)
        return
    inbox = Inbox()
    with link.receiver(("#", inbox)):
        link.send((ODD[kind], b""))
        inbox.wait(1)
    arrives = ODD if link.can(NEEDS[kind]) else ARRIVES_FROM_RABBITMQ
    assert inbox.topics == [link.topic(arrives[kind])]


@pytest.mark.parametrize("link", [Way("rabbitmq")], ids=lambda way: way.name, indirect=True)
def test_rabbitmq_delivers_a_topic_with_a_dot_under_a_name_that_no_handler_asked_for(
    link: Link,
) -> None:
    inbox = Inbox()
    with link.receiver(("a.x", inbox)) as client:
        link.send(("a.x", b""))
        until(lambda: client.stats().unmatched == 1)
        assert inbox.calls == []


def test_nats_refuses_filters_with_a_dot_or_a_space(nats: Nats) -> None:
    for topic_filter in ("a.b/#", "a b"):
        with Client(url(nats.port), client_id="c") as client:
            client.subscribe(topic_filter, print)
            with pytest.raises(TopicError, match="refused"):
                client.wait_subscribed(LIMIT)


def test_nats_sends_its_own_traffic_to_a_filter_for_everything(nats: Nats) -> None:
    inbox = Inbox()
    with receiver(nats, ("#", inbox)) as client:
        send(nats, [("t", b"1")])
        until(lambda: client.stats().unmatched > 0)
        inbox.wait(1)
    assert inbox.topics == ["t"]  # topics that begin with $ are not for such a filter, and reach no handler


@pytest.mark.usefixtures("need_nats")
def test_nats_repeats_what_a_handler_holds_for_long(tmp_path: Path) -> None:
    """On the same connection, after its `ack_wait` (30 s unless set): such a handler sees messages twice."""
    gate = Gate()
    with Nats(tmp_path / "nats", ack_wait="300ms") as nats, receiver(nats, ("t", gate)) as client:
        send(nats, [("t", b"1")])
        assert gate.entered.wait(LIMIT)
        eventually(lambda: client.stats().received >= 2)
        gate.opened.set()
        gate.inbox.wait(2)
        assert set(gate.inbox.payloads) == {b"1"} and client.stats().reconnects == 0
