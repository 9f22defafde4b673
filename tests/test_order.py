"""`order`: what is published while a backlog drains, and the backlog, as an independent subscriber sees them."""

from __future__ import annotations

import os
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from cloudpubsub.demo.relay import Relay
from tests.brokers import Broker
from tests.collector import Collector
from tests.killed_publisher import Publisher
from tests.publishing import client_to, until

KIB = 1024
WAIT = 60.0  # seconds that anything may take on a busy machine
SIZES: dict[str, Any] = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}
PADDING = bytes(40)

Key = tuple[str, int]


def key_of(topic: str, payload: bytes) -> Key:
    return topic, int(payload[:8])


def publish(client: cloudpubsub.Client, topic: str, numbers: range) -> list[int]:
    return [client.publish(topic, b"%08d" % number + PADDING) for number in numbers]


def of(arrived: list[Key], topic: str) -> list[int]:
    return [number for kind, number in arrived if kind == topic]


def is_up(client: cloudpubsub.Client) -> bool:
    return client.stats().connected


def ledger_is_exact(stats: cloudpubsub.Stats) -> bool:
    return stats.published == stats.acked + stats.dropped + stats.dead_lettered + stats.backlog_messages


@pytest.mark.timeout(4 * WAIT)
@pytest.mark.parametrize("where", ["spool", "memory"])
@pytest.mark.parametrize("order", ["live_first", "share"])
def test_live_messages_do_not_wait_for_the_backlog(mosquitto: Broker, where: str, order: Any, tmp_path: Path) -> None:
    backlog, live = 20_000, 200
    spool = tmp_path / "spool" if where == "spool" else None
    sizes = SIZES if where == "spool" else {"ring_bytes": 8 << 20}
    with Relay(mosquitto.port) as relay, Collector(mosquitto.port, key=key_of) as collector:
        relay.cut()
        settings: dict[str, Any] = {"max_publish_rate": 500.0, "order": order, "max_inflight": 200, "protocol": "5"}
        with client_to(relay.port, spool, message_ids=True, **sizes, **settings) as client:
            publish(client, "backlog", range(backlog))
            relay.restore()
            until(lambda: collector.count >= 20, WAIT)  # the backlog has begun to go
            positions = publish(client, "live", range(live))
            client.wait(positions[-1], WAIT)  # it takes 40 s for all that was published before it
            stats = client.stats()
            assert stats.backlog_messages > backlog // 2
            assert ledger_is_exact(stats)
            with pytest.raises(cloudpubsub.WaitTimeout):
                client.flush(0)
            client.set_rate()
            assert client.flush(WAIT) == 0
            publish(client, "after", range(10))  # in one stream again
            assert client.flush(WAIT) == 0
            stats = client.stats()
            assert (stats.published, stats.acked, stats.resent) == (backlog + live + 10, backlog + live + 10, 0)
        collector.wait_for(backlog + live + 10, WAIT)
        arrived = collector.arrivals()
    assert of(arrived, "backlog") == list(range(backlog))
    assert of(arrived, "live") == list(range(live))
    assert arrived[-10:] == [("after", n) for n in range(10)]
    assert arrived.index(("live", live - 1)) < arrived.index(("backlog", backlog // 2))


@pytest.mark.timeout(4 * WAIT)
def test_strict_order_is_kept_whatever_waits(mosquitto: Broker, tmp_path: Path) -> None:
    with Relay(mosquitto.port) as relay, Collector(mosquitto.port, key=key_of) as collector:
        relay.cut()
        with client_to(relay.port, tmp_path / "spool", max_publish_rate=500.0, **SIZES) as client:
            publish(client, "backlog", range(3000))
            relay.restore()
            until(lambda: collector.count >= 20, WAIT)
            publish(client, "live", range(100))
            client.set_rate()
            assert client.flush(WAIT) == 0
        collector.wait_for(3100, WAIT)
        expected = [*(("backlog", n) for n in range(3000)), *(("live", n) for n in range(100))]
        assert collector.arrivals() == expected


@pytest.mark.timeout(4 * WAIT)
@pytest.mark.parametrize("share", [20, 50, 90])
def test_the_live_messages_have_their_share(mosquitto: Broker, share: int, tmp_path: Path) -> None:
    count = 2000
    with Relay(mosquitto.port) as relay, Collector(mosquitto.port, key=key_of) as collector:
        relay.cut()
        settings: dict[str, Any] = {"max_publish_rate": 100.0, "order": "share", "live_share": share}
        with client_to(relay.port, tmp_path / "spool", **SIZES, **settings) as client:
            publish(client, "backlog", range(count))
            relay.restore()
            until(lambda: collector.count >= 5, WAIT)
            publish(client, "live", range(count))
            client.set_rate(messages=2000)  # so high that it does not take long, and still a limit
            assert client.flush(WAIT) == 0
        collector.wait_for(2 * count, WAIT)
        arrived = collector.arrivals()
    assert of(arrived, "backlog") == of(arrived, "live") == list(range(count))
    first = arrived.index(("live", 0))
    both_end = min(arrived.index((kind, count - 1)) for kind in ("backlog", "live"))
    both = arrived[first:both_end]
    assert len(both) > count / 2
    sent_live = len(of(both, "live"))
    # A turn of the backlog is 16 messages, or what makes its share of one message of the other.
    turn = 16 + 100 / share
    assert len(both) * share / 100 - turn <= sent_live <= len(both) * share / 100 + turn * share / (100 - share) + 2


@pytest.mark.timeout(10 * WAIT)
@pytest.mark.parametrize("order", ["live_first", "share"])
def test_kill_9_in_the_middle_loses_nothing(mosquitto: Broker, order: str, tmp_path: Path) -> None:
    rounds = 12 * int(os.environ.get("CLOUDPUBSUB_KILL_ROUNDS", "1"))
    seed = time.time_ns() & 0xFFFF
    chance = random.Random(seed)
    window, returned = 40, 0
    with Relay(mosquitto.port) as relay, Publisher() as publisher:
        with Collector(mosquitto.port, key=lambda _topic, payload: tuple(map(int, payload.split(b":")))) as collector:
            settings: dict[str, Any] = {
                "broker": f"mqtt://127.0.0.1:{relay.port}", "client_id": "gateway", "spool": str(tmp_path / "spool"),
                "spill_after": 0.05, "reconnect_min": 0.01, "reconnect_max": 0.05, "order": order,
                "max_inflight": window, "max_inflight_bytes": KIB, "max_publish_rate": 3000.0, **SIZES,
            }  # fmt: skip
            last_position = -1
            for number in range(rounds):
                if is_cut := number % 3 == 0:
                    relay.cut()
                publisher.start(number, **settings)
                until(lambda: publisher.done > 100, WAIT)
                if not is_cut:
                    until(lambda: publisher.was_connected, WAIT)
                time.sleep(chance.uniform(0, 0.3))  # the random moment
                publisher.kill()
                if is_cut:
                    relay.restore()
                returned += publisher.done
                assert publisher.last_position > last_position, f"seed {seed}: a position was issued twice"
                last_position = publisher.last_position
            settings = {"order": order, "max_inflight_bytes": KIB, **SIZES}
            with client_to(relay.port, tmp_path / "spool", **settings) as client:
                assert client.flush(WAIT) == 0
                stats = client.stats()
                collector.wait_for(stats.published, WAIT)
            duplicates, arrived = collector.duplicates, collector.first_deliveries()
    print(f"\nseed {seed}: {rounds} kills, {returned} published, {duplicates} duplicates")
    # The last call of a round may have stored its message without having returned.
    assert returned <= len(arrived) <= returned + rounds, f"seed {seed}"
    assert (stats.published, stats.acked) == (len(arrived), len(arrived)), f"seed {seed}: the ledger does not balance"
    assert (stats.dropped, stats.backlog_messages) == (0, 0)
    assert duplicates <= window * rounds, f"seed {seed}"
    for number in range(rounds):
        done = [one for kind, one in arrived if kind == number]
        assert sorted(done) == list(range(len(done))), f"seed {seed}: a gap in round {number}"


@pytest.mark.timeout(6 * WAIT)
def test_more_outages_than_there_can_be_streams(
    mosquitto: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outages, window = 9, 50
    expected: list[Key] = []
    with Relay(mosquitto.port) as relay, Collector(mosquitto.port, key=key_of) as collector:
        relay.cut()
        settings: dict[str, Any] = {"max_publish_rate": 100.0, "order": "live_first", "max_inflight": window,
                                    "max_inflight_bytes": 4 * KIB}  # fmt: skip
        with client_to(relay.port, tmp_path / "spool", **SIZES, **settings) as client:
            for outage in range(outages):
                publish(client, f"backlog {outage}", range(300))
                relay.restore()
                until(lambda: is_up(client), WAIT)
                positions = publish(client, f"live {outage}", range(20))
                expected += [(f"backlog {outage}", n) for n in range(300)] + [(f"live {outage}", n) for n in range(20)]
                if outage < 6:
                    client.wait(positions[-1], WAIT)
                    assert client.stats().backlog_messages > 100 * outage
                relay.cut()
                until(lambda: not is_up(client), WAIT)
            relay.restore()
            client.set_rate()
            assert client.flush(WAIT) == 0
            stats = client.stats()
            assert (stats.published, stats.acked, stats.dropped) == (len(expected), len(expected), 0)
        collector.wait_for(len(expected), WAIT)
        first, duplicates = collector.first_deliveries(), collector.duplicates
    assert sorted(first) == sorted(expected)
    # A link that drops by itself while a topic is published parts it: what came before that is a backlog then.
    steps_back = 0
    for topic in {kind for kind, _ in expected}:
        numbers = of(first, topic)
        steps_back += sum(a > b for a, b in pairwise(numbers))
    assert steps_back <= stats.connects - (outages + 1)
    assert duplicates <= window * outages
    assert any("there are backlogs of 6 outages" in record.message for record in caplog.records)


@pytest.mark.timeout(4 * WAIT)
def test_a_drain_goes_on_after_closing_without_sending_anything_twice(mosquitto: Broker, tmp_path: Path) -> None:
    with Relay(mosquitto.port) as relay, Collector(mosquitto.port, key=key_of) as collector:
        settings: dict[str, Any] = {"max_publish_rate": 300.0, "order": "live_first", "max_inflight_bytes": 4 * KIB}
        relay.cut()
        with client_to(relay.port, tmp_path / "spool", **SIZES, **settings) as client:
            publish(client, "backlog", range(3000))
            relay.restore()
            until(lambda: is_up(client), WAIT)
            client.wait(publish(client, "live", range(50))[-1], WAIT)
            left = client.stats().backlog_messages
            assert left > 1000
        with client_to(relay.port, tmp_path / "spool", **SIZES, **settings) as client:
            assert client.stats().backlog_messages <= left
            client.wait(publish(client, "live", range(50, 80))[-1], WAIT)
            assert client.stats().backlog_messages > 0
            client.set_rate()
            assert client.flush(WAIT) == 0
            stats = client.stats()
            assert (stats.published, stats.acked) == (3080, 3080)
        collector.wait_for(3080, WAIT)
        arrived = collector.arrivals()
    assert of(arrived, "backlog") == list(range(3000))
    assert of(arrived, "live") == list(range(80))


@pytest.mark.timeout(4 * WAIT)
def test_a_quota_takes_the_oldest_of_the_backlog_while_live_messages_go(mosquitto: Broker, tmp_path: Path) -> None:
    drops: list[cloudpubsub.Drop] = []
    with Relay(mosquitto.port) as relay, Collector(mosquitto.port, key=key_of) as collector:
        settings: dict[str, Any] = {"max_publish_rate": 50.0, "order": "live_first", "max_inflight_bytes": 4 * KIB,
                                    "max_spool_bytes": 256 * KIB, "on_drop": drops.append,
                                    "min_free_bytes": 0}  # fmt: skip
        relay.cut()
        with client_to(relay.port, tmp_path / "spool", **SIZES, **settings) as client:
            publish(client, "backlog", range(2000))
            relay.restore()
            until(lambda: is_up(client), WAIT)
            client.wait(publish(client, "live", range(10))[-1], WAIT)
            publish(client, "live", range(10, 4000))  # more than the link may carry, and than the quota takes
            until(lambda: client.stats().dropped > 0, WAIT)
            client.set_rate()
            client.flush(WAIT)
            stats = client.stats()
            assert stats.dropped > 0 and stats.backlog_messages == 0
            assert ledger_is_exact(stats) and stats.published == 6000
        collector.wait_for(stats.acked, WAIT)
        arrived = collector.arrivals()
    assert len(arrived) == stats.acked
    for topic in ("backlog", "live"):
        assert of(arrived, topic) == sorted(set(of(arrived, topic)))
    assert sum(drop.count for drop in drops) == stats.dropped
