"""A link that is cut while messages are on it."""

from __future__ import annotations

from pathlib import Path

from cloudpubsub.demo.relay import Relay
from tests.brokers import Broker
from tests.collector import Collector
from tests.publishing import LIMIT, client_to, greatest_step_back, number_of, publish_numbers, until

COUNT = 200_000
CUTS = 5
WINDOW = 2_000


def test_five_cuts_lose_and_reorder_nothing(broker: Broker, tmp_path: Path) -> None:
    with Collector(broker.port, key=number_of) as collector, Relay(broker.port) as relay:
        client = client_to(relay.port, tmp_path / "spool", max_inflight=WINDOW)
        with client:
            for cut in range(CUTS):
                start, end = COUNT * cut // CUTS, COUNT * (cut + 1) // CUTS
                publish_numbers(client, range(start, (start + end) // 2))
                # Somewhere in the middle: what is on the way now is lost.
                collector.wait_for(start + 1, LIMIT)
                until(lambda: client.stats().connected)
                relay.cut()
                publish_numbers(client, range((start + end) // 2, end))
                relay.restore()
            collector.wait_for(COUNT, 2 * LIMIT)
            assert client.flush(LIMIT) == 0
            stats = client.stats()
    assert collector.first_deliveries() == list(range(COUNT))
    assert stats.reconnects >= CUTS
    # Only what was in flight when the link was cut can come twice.
    assert greatest_step_back(collector.arrivals()) <= WINDOW
    assert collector.duplicates <= stats.resent <= stats.reconnects * WINDOW
    assert stats.published == stats.acked == COUNT
