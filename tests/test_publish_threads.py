"""Several threads publish through one client."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.brokers import Broker
from tests.collector import Collector
from tests.publishing import LIMIT, client_to

THREADS = 8
COUNT = 2_500  # of each


def thread_and_number(topic: str, payload: bytes) -> tuple[int, int]:
    thread, number = payload.split(b":")
    return int(thread), int(number)


def test_each_threads_order_is_kept_and_nothing_is_lost(broker: Broker, tmp_path: Path) -> None:
    positions: list[list[int]] = [[] for _ in range(THREADS)]
    barrier = threading.Barrier(THREADS)
    with Collector(broker.port, key=thread_and_number) as collector:
        with client_to(broker.port, tmp_path / "spool", ring_bytes=64 * 1024) as client:

            def publish(thread: int) -> None:
                barrier.wait(LIMIT)
                for number in range(COUNT):
                    positions[thread].append(client.publish(f"thread/{thread}", b"%d:%d" % (thread, number)))

            threads = [threading.Thread(target=publish, args=(thread,)) for thread in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LIMIT)
            assert client.flush(LIMIT) == 0
        collector.wait_for(THREADS * COUNT, LIMIT)
        arrived = collector.arrivals()
    for thread in range(THREADS):
        assert [number for which, number in arrived if which == thread] == list(range(COUNT))
        assert positions[thread] == sorted(positions[thread])
    assert len({position for of_one in positions for position in of_one}) == THREADS * COUNT


def test_arrival_is_in_the_order_of_positions_over_all_threads(mosquitto: Broker, tmp_path: Path) -> None:
    keys: dict[int, tuple[int, int]] = {}
    with Collector(mosquitto.port, key=thread_and_number) as collector:
        with client_to(mosquitto.port, tmp_path / "spool") as client:

            def publish(thread: int) -> None:
                for number in range(1_000):
                    keys[client.publish("one", b"%d:%d" % (thread, number))] = (thread, number)

            threads = [threading.Thread(target=publish, args=(thread,)) for thread in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LIMIT)
            assert client.flush(LIMIT) == 0
        collector.wait_for(THREADS * 1_000, LIMIT)
        assert collector.arrivals() == [keys[position] for position in sorted(keys)]
