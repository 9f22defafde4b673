"""Everything at once, at random: faults on the link, restarts of the broker, kill -9 of the publisher, at a high rate.

``CLOUDPUBSUB_CHAOS_SECONDS=N`` (``make chaos``) makes it longer.  A failure prints its seed; the moments are the
machine's, so a seed gives a similar run, not the same.
"""

from __future__ import annotations

import os
import random
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import Mosquitto
from tests.collector import Collector
from tests.fault_relay import FINE, FaultRelay, storm
from tests.killed_publisher import Publisher
from tests.publishing import CLIENT_ID, client_to, until
from tests.test_publish_kill import round_and_number

SECONDS = float(os.environ.get("CLOUDPUBSUB_CHAOS_SECONDS", "5"))
WINDOW = 1_000
KIB = 1024


class Chaos:
    """The events, and what the publishers were promised."""

    def __init__(self, seed: int, broker: Mosquitto, relay: FaultRelay, publisher: Publisher, settings: Any) -> None:
        self.chance = random.Random(seed)
        self.broker, self.relay, self.publisher, self.settings = broker, relay, publisher, settings
        self.returned: list[int] = []  # calls of publish(), by round
        self.restarts = self.storms = 0

    def begin_round(self) -> None:
        self.publisher.start(len(self.returned), **self.settings)
        until(lambda: self.publisher.done > 0)

    def end_round(self) -> None:
        self.publisher.kill()
        self.returned.append(self.publisher.done)

    def happen(self) -> None:
        event = self.chance.choices(("storm", "calm", "kill", "broker"), (4, 3, 3, 1))[0]
        if event == "storm":
            self.storms += 1
            seed = self.chance.randrange(1 << 30)
            self.relay.set_plan(storm(seed, bytes_between=200_000, latency=0.01, fine_share=0.3))
            self.relay.reset()
        elif event == "calm":
            self.relay.set_plan(FINE)
            self.relay.reset()
        elif event == "kill":
            self.end_round()
            self.begin_round()
        else:
            self.restarts += 1
            self.broker.restart()


@pytest.mark.timeout(180 + 12 * SECONDS)
@pytest.mark.parametrize("protocol", ["3.1.1", "5"])
def test_in_chaos_nothing_is_lost_and_order_holds(mosquitto: Mosquitto, protocol: str, tmp_path: Path) -> None:
    seed = time.time_ns() & 0xFFFF
    spool: dict[str, Any] = {
        "protocol": protocol, "max_inflight": WINDOW, "ring_bytes": 256 * KIB, "segment_bytes": 256 * KIB,
    }  # fmt: skip
    with FaultRelay(mosquitto.port, seed=seed) as relay, Publisher() as publisher:
        settings = {
            "broker": f"mqtt://127.0.0.1:{relay.port}", "client_id": CLIENT_ID, "spool": str(tmp_path / "spool"),
            "reconnect_min": 0.01, "reconnect_max": 0.1, "keep_alive": 1, "ack_timeout": 0.5, "connect_timeout": 0.5,
            "spill_after": 0.1, **spool,
        }  # fmt: skip
        with Collector(mosquitto.port, key=round_and_number) as collector:
            chaos = Chaos(seed, mosquitto, relay, publisher, settings)
            chaos.begin_round()
            ends_s = time.monotonic() + SECONDS
            while time.monotonic() < ends_s:
                time.sleep(chaos.chance.uniform(0, 0.4))  # the random moment
                chaos.happen()
            chaos.end_round()
            relay.set_plan(FINE)
            relay.reset()
            with client_to(relay.port, tmp_path / "spool", **spool) as client:
                assert client.flush(60 + 4 * SECONDS) == 0
                stats = client.stats()
            collector.wait_for(sum(chaos.returned), 60 + 4 * SECONDS)
            arrived, links = collector.first_deliveries(), relay.accepted
            duplicates, resent = collector.duplicates, collector.resent
    print(f"\nseed {seed}, MQTT {protocol}: {len(arrived)} messages, {len(chaos.returned)} kills,"
          f" {chaos.storms} storms, {chaos.restarts} broker restarts, {links} connections, {duplicates} duplicates,"
          f" {resent} of them ours"
          )  # fmt: skip
    assert arrived == sorted(arrived), "not in order"
    for number, group in groupby(arrived, key=lambda key: key[0]):
        numbers = [done for _, done in group]
        assert numbers == list(range(len(numbers))), f"a gap in round {number}"
        # The last call may have stored its message without having returned.
        assert chaos.returned[number] <= len(numbers) <= chaos.returned[number] + 1, f"round {number}"
    assert (stats.published, stats.acked) == (len(arrived), len(arrived)), "the ledger does not balance"
    assert (stats.dropped, stats.dead_lettered, stats.backlog_messages) == (0, 0, 0)
    # A broker that restarts delivers again what its subscribers had not acknowledged: those are not the publisher's.
    assert resent <= links * WINDOW
