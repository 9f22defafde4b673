"""The same on four brokers: Mosquitto, rumqttd, NATS with JetStream and RabbitMQ, MQTT 3.1.1; and where they differ.

What was found is told in docs/brokers.md, each line with its test.
"""

from __future__ import annotations

import socket
import uuid
from pathlib import Path

import pytest

from cloudpubsub import TLS, Client, TopicError, Will
from cloudpubsub.demo.relay import Relay
from tests import packets
from tests.brokers import HOST, Broker, Mosquitto, Rumqttd, TlsFiles
from tests.collector import Collector
from tests.making import Gate, Inbox, eventually, receiver, send, url
from tests.more_brokers import Nats, RabbitMQ
from tests.packets import Connack, Connect
from tests.publishing import LIMIT, client_to, number_of, publish_numbers, until
from tests.test_publish_broker_restart import forgetful_broker_goes_away, publishing

ALL = ["mosquitto", "rumqttd", "nats", "rabbitmq"]
COUNT = 3_000


def _slow(kind: str) -> tuple[pytest.MarkDecorator, ...]:
    """RabbitMQ takes its time to start again."""
    return (pytest.mark.slow_brokers, pytest.mark.timeout(300)) if kind == "rabbitmq" else ()


@pytest.fixture
def word() -> str:
    """For client ids and topics: RabbitMQ keeps what other tests left."""
    return f"w{uuid.uuid4().hex[:10]}"


@pytest.fixture(params=ALL)
def each(request: pytest.FixtureRequest) -> Broker:
    """Each of the four in turn, running."""
    running: Broker = request.getfixturevalue(request.param)
    return running


# ---- publishing


def test_what_is_published_arrives_in_order_and_is_acknowledged(each: Broker, word: str, tmp_path: Path) -> None:
    with Collector(each.port, f"{word}/#", client_id=f"{word}-c", key=number_of) as collector:
        with client_to(each.port, tmp_path / "spool", client_id=word) as client:
            publish_numbers(client, range(COUNT), f"{word}/x")
            assert client.flush(LIMIT) == 0
            assert (client.stats().acked, client.stats().resent) == (COUNT, 0)
        collector.wait_for(COUNT, LIMIT)
        assert collector.arrivals() == list(range(COUNT))


def test_what_nobody_wants_is_acknowledged(each: Broker, word: str, tmp_path: Path) -> None:
    with client_to(each.port, tmp_path / "spool", client_id=word) as client:
        publish_numbers(client, range(100), f"{word}/x")
        assert client.flush(LIMIT) == 0


def test_a_message_of_more_than_a_mebibyte_arrives(each: Broker, word: str) -> None:
    inbox = Inbox()
    payload = bytes(range(256)) * 4400
    settings = {"client_id": word, "ring_bytes": 8 << 20, "max_payload_bytes": len(payload)}
    with receiver(each, (f"{word}/x", inbox), **settings) as client:
        client.publish(f"{word}/x", payload)
        assert client.flush(LIMIT) == 0
        inbox.wait(1)
    assert inbox.payloads == [payload]


def test_the_will_comes_when_the_link_is_lost(each: Broker, word: str, tmp_path: Path) -> None:
    inbox = Inbox()
    with receiver(each, (f"{word}/will", inbox), client_id=f"{word}-r"), Relay(each.port) as relay:
        with client_to(relay.port, None, client_id=word, will=Will(f"{word}/will", "gone")) as client:
            client.wait(client.publish(f"{word}/x", b""), LIMIT)
            relay.cut()
            inbox.wait(1)
            relay.restore()
            client.wait(client.publish(f"{word}/x", b""), LIMIT)
    assert inbox.payloads == [b"gone"]


def _killed_in_mid_stream(broker: Broker, word: str, tmp_path: Path) -> None:
    """What it had acknowledged it still has: a subscriber who was away gets what is stored, in that order."""
    away = {"client_id": f"{word}-away", "key": number_of}
    with Collector(broker.port, f"{word}/#", **away):
        pass
    client = client_to(broker.port, tmp_path / "spool", client_id=word, max_publish_rate=5_000)
    with publishing(client, COUNT, f"{word}/x"):
        until(lambda: client.stats().acked > COUNT // 4)
        broker.kill()
        until(lambda: not client.stats().connected)
        broker.start()
        until(lambda: client.stats().connected, 60)
    assert client.stats().acked == client.stats().published == COUNT
    with Collector(broker.port, f"{word}/#", **away) as collector:
        collector.wait_for(COUNT, 60)
    assert collector.first_deliveries() == list(range(COUNT))


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=_slow(kind)) for kind in ALL])
def test_nothing_is_lost_when_the_broker_is_killed(
    kind: str, request: pytest.FixtureRequest, word: str, tmp_path: Path
) -> None:
    broker = request.getfixturevalue(kind)
    if kind in ("mosquitto", "rumqttd"):
        forgetful_broker_goes_away(broker, tmp_path, kill=True)
    else:
        _killed_in_mid_stream(broker, word, tmp_path)


# ---- subscribing


def test_a_client_receives_in_order(each: Broker, word: str) -> None:
    inbox = Inbox()
    with receiver(each, (f"{word}/#", inbox), client_id=word):
        send(each, [(f"{word}/{number % 7}", b"%d" % number) for number in range(COUNT)], name=f"{word}-s")
        inbox.wait(COUNT)
    assert inbox.payloads == [b"%d" % number for number in range(COUNT)]
    assert {message.qos for message in inbox.first} == {1}


def test_a_session_that_stays_keeps_what_comes_meanwhile(each: Broker, word: str) -> None:
    inbox = Inbox()
    with receiver(each, (f"{word}/x", inbox), client_id=word):
        pass
    send(each, [(f"{word}/x", b"%d" % number) for number in range(200)], name=f"{word}-s")
    with receiver(each, (f"{word}/x", inbox), client_id=word):
        inbox.wait(200)
    assert inbox.payloads == [b"%d" % number for number in range(200)]


def test_a_session_that_does_not_stay_is_forgotten(each: Broker, word: str) -> None:
    inbox = Inbox()
    with receiver(each, (f"{word}/x", inbox), client_id=word, clean_session=True):
        pass
    send(each, [(f"{word}/x", b"meanwhile")], name=f"{word}-s")
    with receiver(each, (f"{word}/x", inbox), client_id=word, clean_session=True):
        send(each, [(f"{word}/x", b"live")], name=f"{word}-s")
        inbox.wait(1)
    assert inbox.payloads == [b"live"]


# What is still there after the end of the broker: sessions with their messages, and what was retained.
KEPT = {
    ("mosquitto", "restart"): (True, True),
    ("mosquitto", "kill"): (False, False),
    ("rumqttd", "restart"): (False, False),
    ("rumqttd", "kill"): (False, False),
    ("nats", "restart"): (True, True),
    ("nats", "kill"): (True, True),
    ("rabbitmq", "restart"): (True, True),
    ("rabbitmq", "kill"): (True, None),  # it writes what is retained to the disk now and then
}


@pytest.mark.parametrize("case", [pytest.param(key, id="-".join(key), marks=_slow(key[0])) for key in KEPT])
def test_what_is_kept_when_the_broker_ends(case: tuple[str, str], request: pytest.FixtureRequest, word: str) -> None:
    kind, end = case
    keeps_session, keeps_retained = KEPT[case]
    broker: Broker = request.getfixturevalue(kind)
    session = {"client_id": f"{word}-c"}
    with Collector(broker.port, f"{word}/x", **session):
        pass
    with client_to(broker.port, None, client_id=word) as client:
        client.publish(f"{word}/x", b"waits")
        client.publish(f"{word}/kept", b"kept", retain=True)
        assert client.flush(LIMIT) == 0
    if end == "kill":
        broker.kill()
        broker.start()
    else:
        broker.restart()
    with Collector(broker.port, f"{word}/x", **session) as collector:
        send(broker, [(f"{word}/x", b"after")], name=f"{word}-s")
        collector.wait_for(2 if keeps_session else 1, LIMIT)
        assert collector.first_deliveries() == ([b"waits", b"after"] if keeps_session else [b"after"])
    if keeps_retained is not None:
        with Collector(broker.port, f"{word}/kept", client_id=f"{word}-k") as collector:
            send(broker, [(f"{word}/kept", b"after")], name=f"{word}-s")
            collector.wait_for(2 if keeps_retained else 1, LIMIT)
            assert collector.first_deliveries() == ([b"kept", b"after"] if keeps_retained else [b"after"])


@pytest.mark.parametrize("wildcard", [False, True], ids=["exact", "wildcard"])
def test_retained_messages(wildcard: bool, each: Broker, word: str) -> None:
    with client_to(each.port, None, client_id=f"{word}-p") as client:
        client.wait(client.publish(f"{word}/x", b"kept", retain=True), LIMIT)
    inbox = Inbox()
    with receiver(each, (f"{word}/#" if wildcard else f"{word}/x", inbox), client_id=word):
        if wildcard and isinstance(each, RabbitMQ):  # it looks for a retained message of just the filter's name
            send(each, [(f"{word}/x", b"live")], name=f"{word}-s")
            assert inbox.wait(1)[0].payload == b"live"
        else:
            kept = inbox.wait(1)[0]
            assert (kept.topic, kept.payload, kept.retain) == (f"{word}/x", b"kept", True)


# ---- TLS


@pytest.fixture(params=ALL)
def each_with_tls(request: pytest.FixtureRequest, tls_files: TlsFiles, tmp_path: Path):
    if request.param == "rabbitmq":
        yield request.getfixturevalue("rabbitmq")
        return
    kinds: dict[str, type[Broker]] = {"mosquitto": Mosquitto, "rumqttd": Rumqttd, "nats": Nats}
    if request.param in ("mosquitto", "nats"):
        request.getfixturevalue(f"need_{request.param}")
    with kinds[request.param](tmp_path / "broker", tls=tls_files) as broker:
        yield broker


def test_tls_both_ways(each_with_tls: Broker, tls_files: TlsFiles, word: str) -> None:
    inbox = Inbox()
    there = f"mqtts://{HOST}:{each_with_tls.tls_port}"
    client = Client(there, client_id=word, tls=TLS(ca=tls_files.ca))
    client.subscribe(f"{word}/#", inbox)
    with client:
        client.wait_subscribed(LIMIT)
        publish_numbers(client, range(COUNT), f"{word}/x")
        assert client.flush(LIMIT) == 0
        inbox.wait(COUNT)
    assert [int(payload) for payload in inbox.payloads] == list(range(COUNT))


def test_tls_of_an_unknown_authority_is_refused(each_with_tls: Broker, tls_files: TlsFiles, word: str) -> None:
    there = f"mqtts://{HOST}:{each_with_tls.tls_port}"
    with Client(there, client_id=word, tls=TLS(ca=tls_files.foreign_ca)) as client:
        client.subscribe(f"{word}/x", print)
        until(lambda: client.stats().subscribe_link == "certificate not accepted")


# ---- where they differ


def test_a_shared_subscription(each: Broker, word: str) -> None:
    """NATS and RabbitMQ grant it like any other and then deliver nothing."""
    delivers = isinstance(each, (Mosquitto, Rumqttd))
    with (
        Collector(each.port, f"$share/group/{word}/#", client_id=f"{word}-1") as shared,
        Collector(each.port, f"{word}/#", client_id=f"{word}-2") as plain,
    ):
        send(each, [(f"{word}/x", b"%d" % number) for number in range(100)], name=f"{word}-s")
        plain.wait_for(100, LIMIT)
        if delivers:
            shared.wait_for(100, LIMIT)
        assert shared.count == (100 if delivers else 0)


def test_what_mqtt_5_is_answered(each: Broker, word: str) -> None:
    port = each.v5_port if isinstance(each, Rumqttd) else each.port
    with socket.create_connection((HOST, port), timeout=LIMIT) as sock, sock.makefile("rb") as answers:
        sock.sendall(packets.build(Connect(word), 5))
        first = answers.read(4)
        if isinstance(each, Nats):
            assert packets.parse_all(first, 4) == [Connack(1)]
            assert answers.read() == b""
        elif isinstance(each, RabbitMQ):
            assert first == b""  # it hangs up
        else:
            assert (first[0], first[3]) == (0x20, 0)


ODD = {"dot": "a.b", "space": "a b", "star": "a*b"}
REFUSED_BY_NATS = ("dot", "space")
ARRIVES_FROM_RABBITMQ = {"dot": "a/b", "space": "a b", "star": "a+b"}


@pytest.mark.parametrize("kind", ODD)
def test_a_topic_with_a_dot_a_space_or_a_star(kind: str, each: Broker, word: str) -> None:
    if isinstance(each, Nats) and kind in REFUSED_BY_NATS:
        # It hangs up on the publisher, each time anew, until the message is set aside.
        with client_to(each.port, None, client_id=word, poison_window=0.3, min_stable=0) as client:
            numbers = [client.publish(f"{word}/{ODD[kind]}" if n == 20 else f"{word}/x", b"%d" % n) for n in range(50)]
            assert client.flush(60) == 1
            assert (client.stats().acked, client.stats().dead_lettered) == (len(numbers) - 1, 1)
        return
    inbox = Inbox()
    with receiver(each, (f"{word}/#", inbox), client_id=word):
        send(each, [(f"{word}/{ODD[kind]}", b"")], name=f"{word}-s")
        inbox.wait(1)
    arrived = ARRIVES_FROM_RABBITMQ if isinstance(each, RabbitMQ) else ODD
    assert inbox.topics == [f"{word}/{arrived[kind]}"]


def test_rabbitmq_delivers_a_topic_with_a_dot_under_a_name_that_no_handler_asked_for(
    rabbitmq: RabbitMQ, word: str
) -> None:
    inbox = Inbox()
    with receiver(rabbitmq, (f"{word}.x", inbox), client_id=word) as client:
        send(rabbitmq, [(f"{word}.x", b"")], name=f"{word}-s")
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
