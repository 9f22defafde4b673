"""What a closed or lost client left in its spool is sent by the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.brokers import Broker
from tests.collector import Collector
from tests.fake_broker import Connection, FakeBroker, puback
from tests.publishing import LIMIT, client_to, number_of, publish_numbers, until

KIB = 1024
SLOT_BYTES = 4096  # of the file `meta`, which has two
SMALL = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}
COUNT = 5_000
NOBODY = 1  # a port where nobody listens


def test_what_was_spilled_is_sent_first_without_a_new_publish(broker: Broker, tmp_path: Path) -> None:
    with client_to(NOBODY, tmp_path / "spool", **SMALL) as client:
        publish_numbers(client, range(COUNT))
    with Collector(broker.port, key=number_of) as collector:
        client = client_to(broker.port, tmp_path / "spool", **SMALL)
        assert client.recovery.records == COUNT
        assert client.stats().spool_segments > 1
        with client:
            collector.wait_for(COUNT, LIMIT)
            assert client.flush(LIMIT) == 0
            until(lambda: client.stats().spool_bytes <= SMALL["segment_bytes"])
        assert collector.arrivals() == list(range(COUNT))


def test_disk_goes_before_ring(broker: Broker, tmp_path: Path) -> None:
    with client_to(NOBODY, tmp_path / "spool", **SMALL) as client:
        publish_numbers(client, range(COUNT))
    with Collector(broker.port, key=number_of) as collector:
        client = client_to(broker.port, tmp_path / "spool", **SMALL)
        publish_numbers(client, range(COUNT, COUNT + 100))
        with client:
            publish_numbers(client, range(COUNT + 100, COUNT + 200))
            assert client.flush(LIMIT) == 0
        collector.wait_for(COUNT + 200, LIMIT)
        assert collector.arrivals() == list(range(COUNT + 200))


def _acknowledge_half(connection: Connection) -> None:
    connection.accept()
    for _ in range(COUNT // 2):
        connection.send(puback(connection.publish().packet_id))
    connection.until_gone()


def _damage_nothing(meta: Path, old: bytes) -> None:
    pass


def _lose_file(meta: Path, old: bytes) -> None:
    meta.unlink()


def _lose_first_slot(meta: Path, old: bytes) -> None:
    meta.write_bytes(bytes(SLOT_BYTES) + meta.read_bytes()[SLOT_BYTES:])


def _lose_second_slot(meta: Path, old: bytes) -> None:
    meta.write_bytes(meta.read_bytes()[:SLOT_BYTES] + b"\xff" * SLOT_BYTES)


def _lose_both_slots(meta: Path, old: bytes) -> None:
    meta.write_bytes(bytes(2 * SLOT_BYTES))


def _cut_file(meta: Path, old: bytes) -> None:
    meta.write_bytes(meta.read_bytes()[:100])


def _bring_back_old_file(meta: Path, old: bytes) -> None:
    meta.write_bytes(old)


@pytest.mark.parametrize(
    "damage",
    [
        _damage_nothing,
        _lose_file,
        _lose_first_slot,
        _lose_second_slot,
        _lose_both_slots,
        _cut_file,
        _bring_back_old_file,
    ],
)
def test_a_lost_or_stale_cursor_costs_duplicates_never_data(damage, mosquitto: Broker, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    with client_to(NOBODY, spool, **SMALL) as client:
        publish_numbers(client, range(COUNT))
    old = (spool / "meta").read_bytes()
    with FakeBroker(_acknowledge_half) as half, client_to(half.port, spool, max_inflight=COUNT, **SMALL) as client:
        until(lambda: client.stats().acked == COUNT // 2)
    damage(spool / "meta", old)
    with Collector(mosquitto.port, key=number_of) as collector:
        with client_to(mosquitto.port, spool, **SMALL) as client:
            # The positions of the lost file must not come again: this one is behind all.
            position = client.publish("numbers", b"%d" % COUNT)
            client.wait(position, LIMIT)
        until(lambda: COUNT in collector.arrivals()[-1:])  # the newest comes last
        arrivals = collector.arrivals()
    assert arrivals == sorted(arrivals), "not in order"
    assert set(range(COUNT // 2, COUNT + 1)) <= set(arrivals), "something is missing"
    if damage is _damage_nothing:
        assert arrivals == list(range(COUNT // 2, COUNT + 1))
