"""A publishing process that is killed at random moments, again and again, on the same spool.

A failure prints its seed; the moment of a kill is the machine's, so a seed gives a similar run, not the same.
``CLOUDPUBSUB_KILL_ROUNDS=N`` makes every run N times as long.
"""

from __future__ import annotations

import os
import random
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub.demo.relay import Relay
from tests.brokers import Broker
from tests.collector import Collector
from tests.killed_publisher import Publisher
from tests.publishing import CLIENT_ID, client_to, until

TIMES = int(os.environ.get("CLOUDPUBSUB_KILL_ROUNDS", "1"))
ROUNDS = 50 * TIMES
KIB = 1024
SIZES = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}  # small, so that the disk is used while the link is cut


def round_and_number(topic: str, payload: bytes) -> tuple[int, int]:
    number, done = payload.split(b":")
    return int(number), int(done)


def live_and_die(publisher: Publisher, relay: Relay, broker: Broker, chance: random.Random, round_number: int,
                 settings: dict[str, Any]) -> None:  # fmt: skip
    is_cut = chance.random() < 0.4
    if is_cut:
        relay.cut()
    publisher.start(round_number, **settings)
    until(lambda: publisher.done > 0)
    if not is_cut and broker.name == "rumqttd":
        # rumqttd 0.20 takes no connection any more once a client was gone between CONNECT and CONNACK: the next one
        # with that client id panics and poisons a lock.
        until(lambda: publisher.was_connected)
    time.sleep(chance.uniform(0, 0.15))  # the random moment
    publisher.kill()
    if is_cut:
        relay.restore()


@pytest.mark.timeout(300 + 10 * TIMES)
@pytest.mark.parametrize("durability", ["process", "power", "memory"])
def test_kill_9_loses_nothing_that_was_promised(broker: Broker, durability: str, tmp_path: Path) -> None:
    seed = time.time_ns() & 0xFFFF
    chance = random.Random(seed)
    returned: list[int] = []  # calls of publish(), by round
    last_position = -1
    with Relay(broker.port) as relay, Publisher() as publisher:
        with Collector(broker.port, key=round_and_number) as collector:
            settings: dict[str, Any] = {
                "broker": f"mqtt://127.0.0.1:{relay.port}",
                "client_id": CLIENT_ID,
                "spool": str(tmp_path / "spool"),
                "durability": durability,
                "spill_after": 0.05,  # seconds without a link, after which the disk has it in every mode
                "reconnect_min": 0.01,
                "reconnect_max": 0.05,
                **SIZES,
            }
            for number in range(ROUNDS):
                live_and_die(publisher, relay, broker, chance, number, settings)
                returned.append(publisher.done)
                assert publisher.last_position > last_position, "a position was issued twice"
                last_position = publisher.last_position
            # This one publishes nothing.
            with client_to(relay.port, tmp_path / "spool", durability=durability, **SIZES) as client:
                assert client.flush(60) == 0
                stats = client.stats()
                if durability == "memory":
                    client.publish("rounds", b"%d:0" % ROUNDS)  # when it arrives, everything before it has
                    client.flush(60)
                    until(lambda: (ROUNDS, 0) in collector.arrivals())
                else:
                    collector.wait_for(sum(returned), 60)
            duplicates, arrived = collector.duplicates, collector.first_deliveries()
    arrived = [key for key in arrived if key[0] < ROUNDS]
    lost = sum(returned) - len(arrived)
    print(f"\nseed {seed}, {broker.name}, {durability}: {ROUNDS} kills, {sum(returned)} published, "
          f"{max(lost, 0)} lost, {duplicates} duplicates")  # fmt: skip
    assert arrived == sorted(arrived), "not in order"
    for number, group in groupby(arrived, key=lambda key: key[0]):
        numbers = [done for _, done in group]
        assert numbers == list(range(len(numbers))), f"a gap in round {number}"
        # The last call may have stored its message without having returned.
        assert len(numbers) <= returned[number] + 1, f"round {number}"
        if durability != "memory":
            assert returned[number] <= len(numbers), f"round {number}"
    if durability != "memory":
        assert len({number for number, _ in arrived}) == ROUNDS
        assert (stats.published, stats.acked) == (len(arrived), len(arrived)), "the ledger does not balance"
        assert (stats.dropped, stats.backlog_messages) == (0, 0)
