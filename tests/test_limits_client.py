"""The limits of a `Client` that is offline: who goes, who is told, and what arrives when a broker appears."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import Client, ClosedError, DeliveryFailed, Drop, SpoolFull, Stats
from cloudpubsub.demo.relay import Relay
from tests.brokers import Broker
from tests.collector import Collector
from tests.fake_broker import Connection, FakeBroker, puback
from tests.making import Inbox
from tests.publishing import LIMIT, client_to, until

KIB = 1024
QUOTA = 300_000
REFUSED = 1 << 63  # positions from here on name messages that were refused
SPAN = 344  # bytes of a record made here
SMALL: dict[str, Any] = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}
FLOOD = 3_000  # records; a megabyte, three times the quota
BY_BYTES: dict[str, Any] = {"max_spool_bytes": QUOTA}
BY_MESSAGES: dict[str, Any] = {"max_spool_messages": 200}
NOBODY = 1  # a port where nobody listens
WINDOW = 50
OLDEST = "spool limit reached, oldest dropped"
OLDEST_OF_RING = "memory full and no storage, oldest dropped"
NEWEST = "full, newest dropped"

each_limit = pytest.mark.parametrize("limit", [BY_BYTES, BY_MESSAGES], ids=["bytes", "messages"])
each_home = pytest.mark.parametrize("in_memory", [False, True], ids=["spool", "memory"])


@dataclass
class Offline:
    """A client whose link is cut, and who looks at it from the other side."""

    client: Client
    drops: Inbox
    relay: Relay
    collector: Collector


@contextmanager
def offline(broker: Broker, spool: Path | None, on_full: str, **settings: Any) -> Iterator[Offline]:
    """A started client that finds nobody at its broker's port until `relay.restore()`."""
    drops = Inbox()
    with Collector(broker.port, key=number_of) as collector, Relay(broker.port) as relay:
        relay.cut()
        with client_to(relay.port, spool, **{**SMALL, "on_full": on_full, "on_drop": drops, **settings}) as client:
            yield Offline(client, drops, relay, collector)


@contextmanager
def started(client: Client) -> Iterator[Client]:
    """For a client without a link: closing waits for none."""
    try:
        client.start()
        yield client
    finally:
        client.close(0.5)


@contextmanager
def silent_broker() -> Iterator[FakeBroker]:
    """Takes everything and acknowledges nothing; nobody is at its port once it is closed."""

    def serve(connection: Connection) -> None:
        connection.accept()
        connection.until_gone()

    with FakeBroker(serve) as broker:
        yield broker


def number_of(topic: str, payload: bytes) -> int:
    return int(payload[:10])


def publish(client: Client, number: int) -> int:
    return client.publish("numbers", b"%010d" % number + bytes(295))


def flood(client: Client, count: int = FLOOD, start: int = 0) -> list[int]:
    return [publish(client, number) for number in range(start, start + count)]


def publish_until_full(client: Client) -> int:
    """Publish until the policy raises; returns the first number that was not stored."""
    for number in range(FLOOD):
        try:
            publish(client, number)
        except SpoolFull:
            return number
    raise AssertionError("never full")


def is_full(client: Client) -> bool:
    """Whether nothing can be published with on_full="block"."""
    stats = client.stats()
    return stats.storage in ("full", "memory") and stats.ring_used_bytes > SMALL["ring_bytes"] - SPAN


def gone(positions: list[int], drops: list[Drop]) -> list[int]:
    """Numbers whose positions a report names."""
    return [
        number for number, position in enumerate(positions) if any(drop.first <= position < drop.end for drop in drops)
    ]


def check_ledger(stats: Stats) -> Stats:
    assert stats.published == stats.acked + stats.dropped + stats.dead_lettered + stats.backlog_messages
    ended = stats.acked_bytes + stats.dropped_bytes + stats.dead_lettered_bytes
    assert stats.published_bytes == ended + stats.backlog_bytes == SPAN * stats.published
    return stats


def check_reports(client: Client, reports: Inbox) -> list[Drop]:
    """The reports, when they have come; they account for every drop."""
    until(lambda: sum(drop.count for drop in reports.first) == client.stats().dropped)
    stats = check_ledger(client.stats())
    drops: list[Drop] = reports.first
    assert sum(drop.bytes for drop in drops) == stats.dropped_bytes
    assert all(drop.first < drop.end and drop.count > 0 for drop in drops)
    return drops


def disk_bytes(path: Path) -> int:
    """What `du` says about the segments."""

    def size(name: str) -> int:
        try:
            return os.stat(path / "log" / name).st_blocks * 512
        except FileNotFoundError:
            return 0  # removed since it was listed

    return sum(size(name) for name in os.listdir(path / "log"))


# ---- dropping ----


@each_limit
@pytest.mark.parametrize(("on_full", "reason"), [("drop_oldest", OLDEST), ("drop_newest", NEWEST)])
def test_each_drop_is_reported_and_the_rest_arrives_in_order(
    on_full: str, reason: str, limit: dict[str, Any], broker: Broker, tmp_path: Path
) -> None:
    with offline(broker, tmp_path / "spool", on_full, **limit) as it:
        positions = flood(it.client)
        it.relay.restore()
        lost = it.client.flush(LIMIT)
        drops = check_reports(it.client, it.drops)
        dropped = gone(positions, drops)
        kept = sorted(set(range(FLOOD)) - set(dropped))
        assert lost == len(dropped) == it.client.stats().dropped > 0
        assert {drop.reason for drop in drops} == {reason}
        it.collector.wait_for(len(kept), LIMIT)
        assert it.collector.arrivals() == kept


@pytest.mark.parametrize(("on_full", "reason"), [("drop_oldest", OLDEST_OF_RING), ("drop_newest", NEWEST)])
def test_without_a_spool_the_ring_is_the_limit(on_full: str, reason: str, mosquitto: Broker) -> None:
    with offline(mosquitto, None, on_full) as it:
        positions = flood(it.client)
        drops = check_reports(it.client, it.drops)
        dropped = gone(positions, drops)
        kept = sorted(set(range(FLOOD)) - set(dropped))
        assert {drop.reason for drop in drops} == {reason}
        it.relay.restore()
        assert it.client.flush(LIMIT) == len(dropped) == it.client.stats().dropped
        it.collector.wait_for(len(kept), LIMIT)
        assert it.collector.arrivals() == kept == list(range(kept[0], kept[-1] + 1))
        assert (kept[0] == 0) == (on_full == "drop_newest")


@each_home
@pytest.mark.parametrize("on_full", ["drop_oldest", "drop_newest"])
def test_waiting_for_a_dropped_message_tells_why_it_failed(on_full: str, in_memory: bool, tmp_path: Path) -> None:
    reason = NEWEST if on_full == "drop_newest" else OLDEST_OF_RING if in_memory else OLDEST
    spool = None if in_memory else tmp_path / "spool"
    limit = {} if in_memory else BY_BYTES
    with started(client_to(NOBODY, spool, **SMALL, **limit, on_full=on_full)) as client:
        positions = flood(client)
        victim = positions[-1] if on_full == "drop_newest" else positions[0]
        assert (victim >= REFUSED) == (on_full == "drop_newest")
        with pytest.raises(DeliveryFailed, match=reason) as caught:
            client.wait(victim, LIMIT)
        assert (caught.value.position, caught.value.reason) == (victim, reason)


def test_who_waits_already_is_told_when_the_message_goes(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool, client_to(NOBODY, tmp_path / "spool", **SMALL, **BY_BYTES) as client:
        waiting = pool.submit(client.wait, publish(client, 0), LIMIT)
        flood(client)
        with pytest.raises(DeliveryFailed, match=OLDEST):
            waiting.result(LIMIT)


def test_every_dropped_message_fails_and_every_other_succeeds(mosquitto: Broker, tmp_path: Path) -> None:
    with offline(mosquitto, tmp_path / "spool", "drop_oldest", **BY_BYTES) as it:
        positions = flood(it.client)
        it.relay.restore()
        it.client.flush(LIMIT)
        dropped = gone(positions, check_reports(it.client, it.drops))
        failed: list[int] = []
        for number, position in enumerate(positions):
            try:
                it.client.wait(position, LIMIT)
            except DeliveryFailed:
                failed.append(number)
        assert failed == dropped


@pytest.mark.parametrize("position", [REFUSED, REFUSED + 800, 1 << 64])
def test_waiting_for_a_refused_message_that_never_was_is_a_mistake(position: int, tmp_path: Path) -> None:
    with client_to(NOBODY, tmp_path / "spool") as client:
        with pytest.raises(ValueError, match=str(position)):
            client.wait(position, LIMIT)


def test_flush_tells_of_each_drop_once(mosquitto: Broker, tmp_path: Path) -> None:
    with offline(mosquitto, tmp_path / "spool", "drop_newest", **BY_BYTES) as it:
        refused = sum(position >= REFUSED for position in flood(it.client))
        it.relay.restore()
        assert it.client.flush(LIMIT) == refused > 0
        assert it.client.flush(LIMIT) == 0
    with client_to(mosquitto.port, tmp_path / "spool") as client:
        publish(client, 0)
        assert client.flush(LIMIT) == 0
        assert client.stats().dropped == refused


# ---- not dropping ----


@each_home
def test_raise_refuses_and_what_was_taken_arrives(in_memory: bool, mosquitto: Broker, tmp_path: Path) -> None:
    spool = None if in_memory else tmp_path / "spool"
    with offline(mosquitto, spool, "raise", **({} if in_memory else BY_BYTES)) as it:
        full_at = publish_until_full(it.client)
        stats = check_ledger(it.client.stats())
        assert (stats.published, stats.backlog_messages, stats.dropped) == (full_at, full_at, 0)
        it.relay.restore()
        assert it.client.flush(LIMIT) == 0
        publish(it.client, full_at)
        it.collector.wait_for(full_at + 1, LIMIT)
        assert it.collector.arrivals() == list(range(full_at + 1))
        assert it.drops.calls == []


@each_home
def test_block_waits_for_the_broker_and_loses_nothing(in_memory: bool, mosquitto: Broker, tmp_path: Path) -> None:
    spool = None if in_memory else tmp_path / "spool"
    with ThreadPoolExecutor(1) as pool:
        with offline(mosquitto, spool, "block", **({} if in_memory else BY_BYTES)) as it:
            flooding = pool.submit(flood, it.client)
            until(lambda: is_full(it.client))
            assert not flooding.done()
            it.relay.restore()
            positions = flooding.result(LIMIT)
            assert it.client.flush(LIMIT) == 0
            it.collector.wait_for(FLOOD, LIMIT)
            assert it.collector.arrivals() == list(range(FLOOD))
            assert positions == sorted(set(positions)) and check_ledger(it.client.stats()).acked == FLOOD


@each_home
def test_block_gives_up_after_its_time_limit(in_memory: bool, mosquitto: Broker, tmp_path: Path) -> None:
    spool = None if in_memory else tmp_path / "spool"
    with offline(mosquitto, spool, "block", block_timeout=0.05, **({} if in_memory else BY_BYTES)) as it:
        full_at = publish_until_full(it.client)
        assert check_ledger(it.client.stats()).published == full_at
        it.relay.restore()
        it.collector.wait_for(full_at, LIMIT)
        assert it.client.flush(LIMIT) == 0
        assert it.collector.arrivals() == list(range(full_at))


@each_home
def test_closing_ends_a_blocked_publish(in_memory: bool, tmp_path: Path) -> None:
    spool = None if in_memory else tmp_path / "spool"
    with ThreadPoolExecutor(1) as pool:
        limit = {} if in_memory else BY_BYTES
        with started(client_to(NOBODY, spool, on_full="block", **SMALL, **limit)) as client:
            flooding = pool.submit(flood, client)
            until(lambda: is_full(client))
            assert client.close(0.5) > 0
        with pytest.raises(ClosedError):
            flooding.result(LIMIT)


# ---- reports ----


def test_a_callback_that_raises_changes_nothing(mosquitto: Broker, tmp_path: Path) -> None:
    def fail(drop: Drop) -> None:
        raise RuntimeError("a mistake of the user")

    with offline(mosquitto, tmp_path / "spool", "drop_newest", **BY_BYTES, on_drop=fail) as it:
        kept = sum(position < REFUSED for position in flood(it.client))
        until(lambda: it.client.stats().callback_errors > 0)
        it.relay.restore()
        assert it.client.flush(LIMIT) == FLOOD - kept
        it.collector.wait_for(kept, LIMIT)


def test_drops_are_logged_but_do_not_flood_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drops = Inbox()
    with caplog.at_level(logging.WARNING, "cloudpubsub"):
        with client_to(NOBODY, tmp_path / "spool", **SMALL, **BY_BYTES, on_drop=drops) as client:
            flood(client)
            check_reports(client, drops)
            said = [record.getMessage() for record in caplog.records if "messages lost" in record.getMessage()]
    assert len(said) == 1 and OLDEST in said[0]


def test_what_closing_drops_is_reported_too(tmp_path: Path) -> None:
    drops = Inbox()
    with client_to(NOBODY, tmp_path / "spool", max_spool_messages=100, on_drop=drops) as client:
        positions = flood(client, 1_000)
        assert client.stats().dropped == 0, "they are in the ring"
    with client_to(NOBODY, tmp_path / "spool", max_spool_messages=100) as after:
        dropped = 1_000 - after.recovery.records
        assert after.stats().dropped == dropped > 0
    assert check_ledger(client.stats()).dropped == dropped
    assert gone(positions, drops.first) == list(range(dropped))


def test_what_was_dropped_before_the_start_is_reported(tmp_path: Path) -> None:
    drops = Inbox()
    client = client_to(NOBODY, tmp_path / "spool", **SMALL, **BY_BYTES, on_drop=drops)
    positions = flood(client)
    client.wait_synced(positions[-1], LIMIT)
    with client:
        dropped = gone(positions, check_reports(client, drops))
        assert dropped == list(range(len(dropped))) and dropped


def test_a_client_that_is_never_started_reports_its_drops_when_it_closes() -> None:
    drops = Inbox()
    client = client_to(NOBODY, None, ring_bytes=64 * KIB, on_drop=drops)
    positions = flood(client)
    dropped = client.stats().dropped
    assert client.close(LIMIT) == FLOOD - dropped
    assert gone(positions, drops.first) == list(range(dropped)) and dropped


# ---- in flight ----


@each_limit
def test_what_is_on_the_wire_is_never_a_victim(limit: dict[str, Any], tmp_path: Path) -> None:
    arrived: list[int] = []
    go_on = threading.Event()

    def serve(connection: Connection) -> None:
        connection.accept()
        first = connection.publishes(WINDOW)
        assert go_on.wait(LIMIT)
        connection.send(puback(*[one.packet_id for one in first]))
        arrived.extend(number_of(one.topic, one.payload) for one in first)
        while True:
            one = connection.publish()
            arrived.append(number_of(one.topic, one.payload))
            connection.send(puback(one.packet_id))

    drops = Inbox()
    with FakeBroker(serve) as broker:
        with client_to(broker.port, tmp_path / "spool", max_inflight=WINDOW, **SMALL, **limit, on_drop=drops) as client:
            positions = flood(client, WINDOW)
            until(lambda: client.stats().inflight == WINDOW)
            positions += flood(client, FLOOD, WINDOW)
            until(lambda: client.stats().dropped > 0)
            go_on.set()
            lost = client.flush(LIMIT)
            dropped = gone(positions, check_reports(client, drops))
            assert client.stats().resent == 0
    assert lost == len(dropped) and min(dropped) >= WINDOW
    assert arrived == sorted(set(range(WINDOW + FLOOD)) - set(dropped))


def test_without_a_link_nothing_is_in_flight(tmp_path: Path) -> None:
    with silent_broker() as broker, client_to(broker.port, tmp_path / "spool") as client:
        flood(client, WINDOW)
        until(lambda: client.stats().inflight == WINDOW)
        broker.close()
        until(lambda: not client.stats().connected)
        until(lambda: client.stats().inflight == 0)
        assert check_ledger(client.stats()).backlog_messages == WINDOW


@each_home
def test_what_was_in_flight_when_the_link_was_lost_goes_first(in_memory: bool, tmp_path: Path) -> None:
    drops = Inbox()
    # More on the wire than the quota, or a part of the ring.
    window = WINDOW if in_memory else QUOTA // SPAN + 500
    sizes: dict[str, Any] = {"ring_bytes": 64 * KIB} if in_memory else {"ring_bytes": 1024 * KIB, **BY_BYTES}
    spool = None if in_memory else tmp_path / "spool"
    with silent_broker() as broker:
        with started(client_to(broker.port, spool, **sizes, on_drop=drops, spill_timeout=2.0)) as client:
            positions = flood(client, window)
            until(lambda: client.stats().inflight == window)
            broker.close()
            until(lambda: not client.stats().connected)
            for number in range(2 * FLOOD):
                positions.append(publish(client, window + number))
                assert positions[-1] < REFUSED, "a new one was refused, and publish() waited for that"
            dropped = gone(positions, check_reports(client, drops))
            assert dropped[:window] == list(range(window))


# ---- the disk ----


def test_the_disk_never_holds_more_than_the_quota(mosquitto: Broker, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    with offline(mosquitto, spool, "drop_oldest", **BY_BYTES) as it:
        for round_ in range(100):
            flood(it.client, 100, round_ * 100)
            assert disk_bytes(spool) <= QUOTA
            if round_ % 20 == 9:
                it.relay.restore()
            if round_ % 20 == 19:
                it.relay.cut()
        it.relay.restore()
        it.client.flush(LIMIT)
        stats = check_ledger(it.client.stats())
        assert stats.dropped > 0 and stats.backlog_messages == 0
        check_reports(it.client, it.drops)
    assert disk_bytes(spool) == 0
