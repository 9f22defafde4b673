"""From one end to the other in a few seconds, once: what every architecture has to pass first."""

from __future__ import annotations

from pathlib import Path

from cloudpubsub.demo.relay import Relay
from tests.brokers import Mosquitto
from tests.collector import Collector
from tests.killed_publisher import Publisher
from tests.publishing import CLIENT_ID, client_to, until

KIB = 1024
PATIENCE_S = 120  # under emulation everything takes longer
SIZES = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}
ON_DISK = 5000  # messages: several times what the ring holds


def round_and_number(topic: str, payload: bytes) -> tuple[int, int]:
    number, done = payload.split(b":")
    return int(number), int(done)


def test_an_outage_and_two_kills_lose_nothing(mosquitto: Mosquitto, tmp_path: Path) -> None:
    settings = {"client_id": CLIENT_ID, "reconnect_min": 0.02, "reconnect_max": 0.1, **SIZES}
    with (
        Relay(mosquitto.port) as relay,
        Publisher() as publisher,
        Collector(mosquitto.port, key=round_and_number) as collector,
    ):
        started = {"broker": f"mqtt://127.0.0.1:{relay.port}", "spool": str(tmp_path / "spool"), **settings}
        publisher.start(0, **started)
        until(lambda: publisher.was_connected and len(collector.arrivals()) > 100, PATIENCE_S)
        relay.cut()
        cut_at = publisher.done
        until(lambda: publisher.done > cut_at + ON_DISK, PATIENCE_S)
        publisher.kill()
        returned = [publisher.done]

        publisher.start(1, **started)  # offline all its life, behind a backlog on the disk
        until(lambda: publisher.done > 100, PATIENCE_S)
        publisher.kill()
        returned.append(publisher.done)

        relay.restore()
        with client_to(relay.port, tmp_path / "spool", **SIZES) as client:
            assert client.flush(PATIENCE_S) == 0
            stats = client.stats()
            collector.wait_for(sum(returned), PATIENCE_S)
        arrived = collector.first_deliveries()
    assert arrived == sorted(arrived), "not in order"
    for number, count in enumerate(returned):
        numbers = [done for each, done in arrived if each == number]
        assert numbers == list(range(len(numbers))), f"a gap in round {number}"
        assert count <= len(numbers) <= count + 1  # the last call may have stored its message without having returned
    assert (stats.published, stats.acked, stats.dropped) == (len(arrived), len(arrived), 0)
