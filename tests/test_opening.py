"""Opening a large spool: little is read, little memory is taken, and nothing but the log holds what waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest

from cloudpubsub import Spool
from tests.brokers import Rumqttd
from tests.collector import Collector
from tests.making import Child, eventually
from tests.publishing import LIMIT, client_to, number_of, publish_numbers

KIB, MIB = 1024, 1 << 20
NOBODY = 1
SIZES: dict[str, Any] = {"ring_bytes": MIB, "segment_bytes": 8 * MIB, "max_spool_bytes": 1 << 30}
COUNT, PAYLOAD_BYTES = 200_000, 800  # 170 MB

FILL = """
import sys, cloudpubsub
path, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
spool = cloudpubsub.Spool(path, ring_bytes=1 << 20, segment_bytes=8 << 20, max_spool_bytes=1 << 30)
payload = bytes(size)
for number in range(count):
    spool.append("numbers", payload)
spool.sync(60)
print("filled", flush=True)
sys.stdin.readline()
spool.close(60)
print("closed", flush=True)
"""

# The most memory that a process took that opens a spool, and one that reads it as well.
OPEN = """
import sys, cloudpubsub
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
spool = cloudpubsub.Spool(sys.argv[1], ring_bytes=1 << 20, segment_bytes=8 << 20, max_spool_bytes=1 << 30)
opened = peak()
found = spool.recovery
count = 0
while batch := spool.read():
    count += len(batch)
print(opened, peak(), found.bytes_read, found.segments, count, flush=True)
"""


def opened(path: Path) -> list[int]:
    with Child(OPEN, path) as child:
        return [int(number) for number in child.line().split()]


def fill(path: Path, is_killed: bool) -> None:
    with Child(FILL, path, COUNT, PAYLOAD_BYTES) as child:
        assert child.line() == "filled"
        if not is_killed:
            child.tell("close")
            assert child.line() == "closed"


@pytest.mark.parametrize("is_killed", [False, True], ids=["closed", "killed"])
def test_a_large_backlog_takes_no_memory_and_its_sealed_files_are_not_read(is_killed: bool, tmp_path: Path) -> None:
    with Spool(tmp_path / "empty", **SIZES):
        pass
    fill(tmp_path / "large", is_killed)
    without = opened(tmp_path / "empty")
    opening, reading, bytes_read, segments, count = opened(tmp_path / "large")
    assert count == COUNT
    assert segments > 10
    assert opening - without[0] <= 4 * MIB
    assert reading - without[1] <= 10 * MIB
    # Headers and footers, and of a killed process the files that it had not sealed.
    unsealed = 0 if not is_killed else 8 * SIZES["segment_bytes"]
    assert bytes_read <= segments * KIB + unsealed


def test_paho_never_holds_a_message(rumqttd: Rumqttd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[object] = []
    monkeypatch.setattr(paho.Client, "publish", lambda *_, **__: handed.append(0))
    with Collector(rumqttd.port, "numbers", key=number_of) as collector:
        with client_to(NOBODY, tmp_path / "spool", **SIZES) as client:
            publish_numbers(client, range(70_000))  # more than there are packet ids
            assert client.stats().backlog_messages == 70_000
        in_flight: list[int] = []

        def is_sent() -> bool:
            stats = client.stats()
            in_flight.append(stats.inflight)
            return stats.backlog_messages == 0

        with client_to(rumqttd.port, tmp_path / "spool", max_inflight=500, **SIZES) as client:
            eventually(is_sent, "everything is sent")
            assert 0 < max(in_flight) <= 500
        collector.wait_for(70_000, LIMIT)
        assert collector.first_deliveries() == list(range(70_000))
    assert handed == []


def test_what_is_subscribed_and_taken_back_without_a_link_leaves_nothing_behind() -> None:
    with client_to(NOBODY, None) as client:
        for _ in range(5_000):
            client.subscribe("t", print)
            client.unsubscribe("t", print)
        assert len(client._subscriber._requests) <= 10
