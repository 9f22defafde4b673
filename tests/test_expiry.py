"""Messages that live for a limited time: dropped and counted in ring, spool and at send time, never too early."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from cloudpubsub import Drop
from tests.fake_broker import FakeBroker
from tests.publishing import LIMIT, client_to, publish_numbers, until
from tests.script import Script

NOBODY = 1  # a port where nobody listens


def check_ledger(stats: cloudpubsub.Stats) -> cloudpubsub.Stats:
    assert stats.published == stats.acked + stats.dropped + stats.dead_lettered + stats.backlog_messages
    assert stats.published_bytes == (
        stats.acked_bytes + stats.dropped_bytes + stats.dead_lettered_bytes + stats.backlog_bytes
    )
    return stats


def payloads(script: Script) -> list[int]:
    return [int(publish.payload) for publish in script.publishes]


def test_what_expired_in_the_ring_goes_while_there_is_no_link(tmp_path: Path) -> None:
    drops: list[Drop] = []
    with client_to(NOBODY, tmp_path, ttl=0.2, on_drop=drops.append) as client:
        positions = publish_numbers(client, range(50))
        until(lambda: client.stats().expired == 50)
        stats = check_ledger(client.stats())
        assert (stats.dropped, stats.backlog_messages, stats.ring_used_bytes) == (50, 0, 0)
        with pytest.raises(cloudpubsub.DeliveryFailed, match="expired"):
            client.wait(positions[0], LIMIT)
        until(lambda: sum(drop.count for drop in drops) == 50)
    assert {drop.reason for drop in drops} == {"expired"}


def test_what_expired_on_the_disk_goes_with_its_files(tmp_path: Path) -> None:
    small: dict[str, Any] = {"ring_bytes": 64 << 10, "segment_bytes": 64 << 10, "spill_after": 0}
    with client_to(NOBODY, tmp_path, **small) as client:
        for _ in range(500):
            client.publish("a", b"x" * 1000, ttl=1.0)
        until(lambda: client.stats().expired == 500)
        until(lambda: client.stats().spool_bytes == 0)
        check_ledger(client.stats())


def test_what_expired_goes_from_one_file_to_the_next_over_their_pads_while_there_is_no_link(tmp_path: Path) -> None:
    """Of these not two fit where a batch ends, so that every pad is looked at on its own."""
    small: dict[str, Any] = {"ring_bytes": 64 << 10, "segment_bytes": 64 << 10, "spill_after": 0}
    with client_to(NOBODY, tmp_path, **small) as client:
        for _ in range(100):
            client.publish("a", b"x" * 5000, ttl=1.0)
        until(lambda: client.stats().expired == 100)
        assert check_ledger(client.stats()).backlog_messages == 0


def test_what_expired_behind_damage_goes_while_there_is_no_link(tmp_path: Path) -> None:
    small: dict[str, Any] = {"ring_bytes": 64 << 10, "segment_bytes": 64 << 10, "spill_after": 0}
    with client_to(NOBODY, tmp_path, **small) as client:
        for _ in range(200):
            client.publish("a", b"x" * 1000, ttl=2.0)
    first = min((tmp_path / "log").iterdir())
    data = bytearray(first.read_bytes())
    data[5_000:9_000] = bytes(4_000)
    first.write_bytes(data)
    with client_to(NOBODY, tmp_path, **small) as client:
        until(lambda: client.stats().backlog_messages == 0, 8)
        stats = check_ledger(client.stats())
        assert 190 <= stats.expired < stats.dropped == 200


def test_only_what_is_left_is_sent(tmp_path: Path) -> None:
    with client_to(NOBODY, tmp_path) as client:
        for number in range(30):
            client.publish("a", b"%d" % number, ttl=0.001 if number % 3 else None)
    time.sleep(0.01)  # so that time passes, which is what this is about
    script = Script()
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path) as client:
        assert client.flush(LIMIT) in (20, 0)  # what had expired before is counted before the first flush
        stats = check_ledger(client.stats())
        assert (stats.acked, stats.expired, stats.dropped) == (10, 20, 20)
    assert payloads(script) == list(range(0, 30, 3))


def test_the_clients_time_to_live_is_for_those_that_have_none_of_their_own(tmp_path: Path) -> None:
    with client_to(NOBODY, tmp_path, ttl=0.05) as client:
        client.publish("a", b"1")
        client.publish("a", b"2", ttl=3600)
        until(lambda: client.stats().expired == 1)
    script = Script()
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path) as client:
        client.flush(LIMIT)
    assert payloads(script) == [2]


def test_what_may_still_live_is_kept_over_a_restart(tmp_path: Path) -> None:
    with client_to(NOBODY, tmp_path) as client:
        client.publish("a", b"1", ttl=3600)
    with client_to(NOBODY, tmp_path) as client:
        assert client.stats().backlog_messages == 1
    assert cloudpubsub.Spool(tmp_path).close() == 0
    script = Script()
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path) as client:
        assert client.flush(LIMIT) == 0
    assert payloads(script) == [1]


def test_expired_messages_behind_a_gap_are_counted_once_over_reconnects(tmp_path: Path) -> None:
    """The first is not acknowledged, so the head cannot pass the expired ones behind it; then the link is given up."""

    def withhold_at_first(event: Any) -> Any:
        is_first = event.connection.number == 1 and getattr(event.packet, "payload", b"") == b"0"
        return b"" if is_first else None

    with client_to(NOBODY, tmp_path) as client:
        client.publish("a", b"0")
        for number in range(1, 20):
            client.publish("a", b"%d" % number, ttl=0.001 if number % 2 else None)
    time.sleep(0.01)
    script = Script(withhold_at_first)
    with FakeBroker(script) as broker, client_to(broker.port, tmp_path, ack_timeout=1.5) as client:
        client.flush(LIMIT)
        stats = check_ledger(client.stats())
        assert (stats.acked, stats.expired, stats.connects) == (10, 10, 2)
    assert payloads(script) == [*range(0, 20, 2), 0]


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), "5", True])
def test_a_wrong_time_to_live_is_refused(ttl: Any) -> None:
    with client_to(NOBODY, None) as client:
        with pytest.raises(ValueError, match="ttl"):
            client.publish("a", b"", ttl=ttl)
        assert client.stats().published == 0
