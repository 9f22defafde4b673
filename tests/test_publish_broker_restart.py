"""Brokers that stop, die, and are not there yet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cloudpubsub
from tests.brokers import Broker, Mosquitto
from tests.collector import Collector
from tests.publishing import LIMIT, client_to, number_of, publish_numbers, until

COUNT = 20_000


@contextmanager
def publishing(
    client: cloudpubsub.Client, count: int, topic: str = "numbers", limit: float = LIMIT
) -> Iterator[None]:
    """Numbers are published on a thread meanwhile, and at the end all are settled."""
    thread = threading.Thread(target=publish_numbers, args=(client, range(count), topic))
    with client:
        thread.start()
        yield
        thread.join(limit)
        assert not thread.is_alive()
        assert client.flush(limit) == 0


def test_mosquitto_restarts_in_mid_stream(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with Collector(mosquitto.port, key=number_of) as collector:
        client = client_to(mosquitto.port, tmp_path / "spool", max_publish_rate=20_000)
        with publishing(client, COUNT):
            for restarts, share in ((1, 16), (2, 4)):
                collector.wait_for(COUNT // share, LIMIT)
                mosquitto.restart()
                # The collector may be behind, and all be acknowledged already.
                until(lambda restarts=restarts: client.stats().reconnects >= restarts)
        collector.wait_for(COUNT, LIMIT)
        assert collector.first_deliveries() == list(range(COUNT))
        assert client.stats().reconnects >= 2


def test_what_a_killed_broker_had_not_acknowledged_is_sent_again(mosquitto: Mosquitto, tmp_path: Path) -> None:
    client = client_to(mosquitto.port, tmp_path / "spool", max_publish_rate=20_000)
    with publishing(client, COUNT):
        until(lambda: client.stats().acked > COUNT // 4)
        mosquitto.kill()
        until(lambda: not client.stats().connected)
        mosquitto.start()
    # What it had acknowledged is the broker's affair, and gone with it; everything else was sent until acknowledged.
    assert client.stats().acked == client.stats().published == COUNT


def test_a_broker_that_is_down_at_start_is_found_later(broker: Broker, tmp_path: Path) -> None:
    broker.stop()
    with client_to(broker.port, tmp_path / "spool") as client:
        publish_numbers(client, range(100))
        until(lambda: client.stats().last_error)
        assert not client.stats().connected
        assert "refused" in client.stats().last_error
        broker.start()
        assert client.flush(LIMIT) == 0
        assert client.stats().acked == 100
