"""Several threads publish through one client."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from tests.brokers import Broker
from tests.collector import Collector
from tests.publishing import LIMIT, client_to, number_of

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
        collector.wait_for(THREADS * 1_000, LIMIT)
        assert collector.arrivals() == [keys[position] for position in sorted(keys)]


@pytest.mark.parametrize("on_full", ["block", "drop_oldest"])
def test_a_signal_handler_may_publish_whatever_it_interrupts(broker: Broker, on_full: str, tmp_path: Path) -> None:
    """It comes between two calls and in the middle of one that waits for room; the message of each is stored once."""
    from_handler: dict[int, int] = {}  # position of each number
    signals = itertools.count(1)
    settings: dict[str, Any] = {"ring_bytes": 65_536, "segment_bytes": 65_536, "on_full": on_full, "max_inflight": 50}
    with Collector(broker.port, key=number_of) as collector:
        with client_to(broker.port, tmp_path / "spool", **settings) as client:

            def handle(_number: int, _frame: object) -> None:  # may interrupt itself too
                number = -next(signals)
                from_handler[number] = client.publish("numbers", b"%d" % number)

            before = signal.signal(signal.SIGALRM, handle)
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            try:
                numbers, deadline = 0, time.monotonic() + LIMIT
                while len(from_handler) < 50:
                    client.publish("numbers", b"%d" % numbers)
                    numbers += 1
                    assert time.monotonic() < deadline
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            assert client.flush(LIMIT) == 0
        collector.wait_for(numbers + len(from_handler), LIMIT)
        arrived = collector.first_deliveries()
    assert [number for number in arrived if number >= 0] == list(range(numbers))
    assert [number for number in arrived if number < 0] == sorted(from_handler, key=lambda number: from_handler[number])


def test_a_callback_may_publish(broker: Broker, tmp_path: Path) -> None:
    """Each acknowledgement of the first hundred publishes another message, on the dispatcher thread."""

    def follow_up(message: cloudpubsub.Message) -> None:
        if int(message.payload) < 100:
            client.publish("numbers", b"%d" % (int(message.payload) + 100))

    with Collector(broker.port, key=number_of) as collector:
        with client_to(broker.port, tmp_path / "spool", on_publish=follow_up) as client:
            for number in range(100):
                client.publish("numbers", b"%d" % number)
            collector.wait_for(200, LIMIT)
    assert sorted(collector.first_deliveries()) == list(range(200))
