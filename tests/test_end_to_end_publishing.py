"""Publishing, the same on every way to every broker: nothing is lost, the order holds, whatever breaks."""

from __future__ import annotations

import threading
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import TLS, Will
from cloudpubsub.demo.relay import Relay
from tests.killed_publisher import Publisher
from tests.links import SECURE_WAYS, Link, Way
from tests.making import Inbox
from tests.publishing import LIMIT, number_of, publish_numbers, until
from tests.test_publish_kill import round_and_number

KIB = 1024
SMALL: dict[str, Any] = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}  # so that the disk is used
COUNT = 1_200
KILLS = 3


def topic_and_payload(topic: str, payload: bytes) -> tuple[str, bytes]:
    return topic, payload


def test_messages_arrive_in_order_and_are_acknowledged(link: Link, tmp_path: Path) -> None:
    with link.collector(key=number_of) as collector:
        with link.client(tmp_path / "spool") as client:
            publish_numbers(client, range(COUNT), link.topic())
            assert client.flush(LIMIT) == 0
            assert (client.stats().acked, client.stats().resent) == (COUNT, 0)
        collector.wait_for(COUNT, LIMIT)
        assert collector.arrivals() == list(range(COUNT))


def test_what_nobody_wants_is_acknowledged(link: Link, tmp_path: Path) -> None:
    with link.client(tmp_path / "spool") as client:
        publish_numbers(client, range(100), link.topic())
        assert client.flush(LIMIT) == 0


def test_payloads_from_nothing_to_more_than_a_mebibyte_arrive_unchanged(link: Link, tmp_path: Path) -> None:
    sizes = (0, 1, 127, 128, 4_095, 4_097, 65_536, 1_100_000)
    payloads = [(bytes(range(256)) * (size // 256 + 1))[:size] for size in sizes]
    settings = {"ring_bytes": 8 << 20, "segment_bytes": 8 << 20, "max_payload_bytes": max(sizes)}
    with link.collector(key=topic_and_payload) as collector:
        with link.client(tmp_path / "spool", **settings) as client:
            for payload in payloads:
                client.publish(link.topic(f"size/{len(payload)}"), payload)
            assert client.flush(LIMIT) == 0
        collector.wait_for(len(payloads), LIMIT)
        assert collector.arrivals() == [(link.topic(f"size/{len(payload)}"), payload) for payload in payloads]


def test_topics_beyond_ascii_arrive(link: Link) -> None:
    topic = link.topic("température/Küche/世界/🌍")
    with link.collector(key=topic_and_payload) as collector:
        with link.client() as client:
            client.publish(topic, "größer")
            assert client.flush(LIMIT) == 0
        collector.wait_for(1, LIMIT)
        assert collector.arrivals() == [(topic, "größer".encode())]


def test_on_publish_tells_every_message_once_in_order(link: Link) -> None:
    told = Inbox()
    with link.client(on_publish=told) as client:
        rows = [b"row %d" % number for number in range(500)]
        positions = [client.publish(link.topic(), b"", userdata=row) for row in rows]
        assert client.flush(LIMIT) == 0
        told.wait(len(rows))
    assert [(message.position, message.userdata) for message in told.first] == list(zip(positions, rows, strict=True))


def test_an_outage_is_made_up_for_in_order(link: Link, tmp_path: Path) -> None:
    with link.collector(key=number_of) as collector, Relay(link.port) as relay:
        with link.client(tmp_path / "spool", port=relay.port, spill_after=0, **SMALL) as client:
            publish_numbers(client, range(COUNT // 4), link.topic())
            assert client.flush(LIMIT) == 0
            relay.cut()
            publish_numbers(client, range(COUNT // 4, COUNT), link.topic())
            until(lambda: client.stats().spilled_bytes > 0)
            relay.restore()
            assert client.flush(LIMIT) == 0
        collector.wait_for(COUNT, LIMIT)
        assert collector.first_deliveries() == list(range(COUNT))


def test_cuts_in_mid_stream_lose_and_reorder_nothing(link: Link, tmp_path: Path) -> None:
    with link.collector(key=number_of) as collector, Relay(link.port) as relay:
        with link.client(tmp_path / "spool", port=relay.port, max_inflight=200) as client:
            publisher = threading.Thread(target=publish_numbers, args=(client, range(COUNT), link.topic()))
            publisher.start()
            for cuts, share in ((1, 8), (2, 2)):
                until(lambda share=share: client.stats().acked >= COUNT // share)
                relay.cut()
                relay.restore()
                # rumqttd is broken by a client that is gone between CONNECT and CONNACK.
                until(lambda cuts=cuts: client.stats().reconnects >= cuts)
            publisher.join(LIMIT)
            assert client.flush(LIMIT) == 0
            assert client.stats().acked == COUNT
        collector.wait_for(COUNT, LIMIT)
        assert collector.first_deliveries() == list(range(COUNT))


def test_what_a_client_left_in_its_spool_is_sent_by_the_next(link: Link, tmp_path: Path) -> None:
    with link.client(tmp_path / "spool", broker="mqtt://127.0.0.1:1", tls=None, **SMALL) as client:
        publish_numbers(client, range(COUNT), link.topic())
    with link.collector(key=number_of) as collector:
        with link.client(tmp_path / "spool", **SMALL) as client:
            assert client.recovery.records == COUNT
            assert client.flush(LIMIT) == 0
        collector.wait_for(COUNT, LIMIT)
        assert collector.arrivals() == list(range(COUNT))


@pytest.mark.parametrize(
    "link",
    [Way("mosquitto", True, "5"), Way("rumqttd", True, "5"), Way("nats", True), Way("rabbitmq", True)],
    ids=lambda way: way.name,
    indirect=True,
)
def test_a_publisher_that_is_killed_again_and_again_loses_nothing(link: Link, tmp_path: Path) -> None:
    returned: list[int] = []  # calls of publish(), by round
    settings = {**link.settings(), "spool": str(tmp_path / "spool"), "topic": link.topic(), **SMALL}
    if link.way.secure:
        settings["tls"] = {"ca": link.files.ca}
    with Publisher() as publisher, link.collector(key=round_and_number) as collector:
        for number in range(KILLS):
            publisher.start(number, **settings)
            until(lambda: publisher.done > 100 and publisher.was_connected)
            publisher.kill()
            returned.append(publisher.done)
        with link.client(tmp_path / "spool", **SMALL) as client:
            assert client.flush(LIMIT) == 0
        collector.wait_for(sum(returned), LIMIT)
        arrived = collector.first_deliveries()
    assert arrived == sorted(arrived), "not in order"
    counts = [len(list(of_round)) for _, of_round in groupby(arrived, key=lambda key: key[0])]
    # The last call may have stored its message without having returned.
    assert all(told <= came <= told + 1 for told, came in zip(returned, counts, strict=True))


def test_the_will_comes_when_the_link_is_lost_and_not_when_the_client_leaves(link: Link) -> None:
    inbox = Inbox()
    with link.receiver(("will", inbox)), Relay(link.port) as relay:
        will = Will(link.topic("will"), "gone")
        with link.client(port=relay.port, will=will) as client:
            client.wait(client.publish(link.topic(), b""), LIMIT)
            relay.cut()
            inbox.wait(1)
            relay.restore()
            client.wait(client.publish(link.topic(), b""), LIMIT)
        link.send(("will", b"end"))  # everything before it has come when it has
        until(lambda: b"end" in inbox.payloads)
    assert inbox.payloads == [b"gone", b"end"]


@pytest.mark.parametrize("link", SECURE_WAYS, ids=lambda way: way.name, indirect=True)
def test_an_unknown_authority_is_refused(link: Link, tmp_path: Path) -> None:
    with link.client(tmp_path / "spool", tls=TLS(ca=link.files.foreign_ca)) as client:
        client.subscribe(link.topic(), print)
        client.publish(link.topic(), b"")
        until(lambda: client.stats().publish_link == client.stats().subscribe_link == "certificate not accepted")
        assert client.stats().acked == 0
