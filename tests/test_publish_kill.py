"""A publishing process that is killed at random moments, again and again, on the same spool."""

from __future__ import annotations

import random
import time
from itertools import groupby
from pathlib import Path
from typing import Any

from cloudpubsub.demo.relay import Relay
from tests.brokers import Broker
from tests.collector import Collector
from tests.killed_publisher import Publisher
from tests.publishing import CLIENT_ID, client_to, until

ROUNDS = 50
KIB = 1024


def round_and_number(topic: str, payload: bytes) -> tuple[int, int]:
    number, done = payload.split(b":")
    return int(number), int(done)


def test_kill_9_loses_nothing_that_publish_returned(broker: Broker, tmp_path: Path) -> None:
    seed = time.time_ns() & 0xFFFF
    print(f"seed {seed}")
    chance = random.Random(seed)
    returned: list[int] = []  # by round
    last_position = -1
    sizes = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}  # small, so that the disk is used while the link is cut
    with Relay(broker.port) as relay, Publisher() as publisher:
        collector = Collector(broker.port, key=round_and_number)
        with collector:
            settings: dict[str, Any] = {
                "broker": f"mqtt://127.0.0.1:{relay.port}",
                "client_id": CLIENT_ID,
                "spool": str(tmp_path / "spool"),
                "durability": "process",
                "reconnect_min": 0.01,
                "reconnect_max": 0.05,
                **sizes,
            }
            for number in range(ROUNDS):
                is_cut = chance.random() < 0.4
                if is_cut:
                    relay.cut()
                publisher.start(number, **settings)
                until(lambda: publisher.done > 0)
                if not is_cut and broker.name == "rumqttd":
                    # rumqttd 0.20 takes no connection any more once a client was gone between CONNECT and CONNACK: the
                    # next one with that client id panics and poisons a lock.
                    until(lambda: publisher.was_connected)
                time.sleep(chance.uniform(0, 0.15))  # the random moment
                publisher.kill()
                returned.append(publisher.done)
                assert publisher.last_position > last_position, "a position was issued twice"
                last_position = publisher.last_position
                if is_cut:
                    relay.restore()
            with client_to(relay.port, tmp_path / "spool", **sizes) as client:  # publishes nothing
                collector.wait_for(sum(returned), 60)
                assert client.flush(30) == 0
            arrived = collector.first_deliveries()
    assert arrived == sorted(arrived), "not in order"
    for number, group in groupby(arrived, key=lambda key: key[0]):
        numbers = [done for _, done in group]
        assert numbers == list(range(len(numbers))), f"a gap in round {number}"
        # The last call may have stored its message without having returned.
        assert returned[number] <= len(numbers) <= returned[number] + 1, f"round {number}"
    assert len({number for number, _ in arrived}) == ROUNDS
