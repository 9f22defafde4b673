"""What comes back in `on_publish`, and what the broker keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

import cloudpubsub
from tests.brokers import Broker
from tests.collector import Collector
from tests.publishing import LIMIT, client_to, until


def test_on_publish_tells_every_message_once_in_order_with_its_userdata(broker: Broker, tmp_path: Path) -> None:
    told: list[cloudpubsub.Message] = []
    count = 5_000
    with client_to(broker.port, tmp_path / "spool", on_publish=told.append) as client:
        positions = [
            client.publish("topic", b"payload %d" % number, userdata=b"row %d" % number) for number in range(count)
        ]
        assert client.flush(LIMIT) == 0
        until(lambda: len(told) == count)
    assert [message.position for message in told] == positions
    assert [message.userdata for message in told] == [b"row %d" % number for number in range(count)]
    assert told[7].topic == "topic" and told[7].payload == b"payload 7"


def test_userdata_comes_back_after_a_restart_and_is_never_sent(mosquitto: Broker, tmp_path: Path) -> None:
    rows = [b"", b"\0\xff", bytearray(b"array"), memoryview(b"view"), b"x" * 65_535]
    with client_to(1, tmp_path / "spool") as client:
        positions = [client.publish("topic", b"p", userdata=row, retain=row == b"\0\xff") for row in rows]
    told: list[cloudpubsub.Message] = []
    with Collector(mosquitto.port) as collector:
        with client_to(mosquitto.port, tmp_path / "spool", on_publish=told.append) as client:
            assert client.flush(LIMIT) == 0
            until(lambda: len(told) == len(rows))
        until(lambda: len(collector.arrivals()) == len(rows))
        assert set(collector.arrivals()) == {b"p"}
    assert [message.userdata for message in told] == [bytes(row) for row in rows]
    assert [message.position for message in told] == positions
    assert [message.retain for message in told] == [False, True, False, False, False]


def test_userdata_that_is_too_long_is_refused_and_nothing_is_stored(tmp_path: Path) -> None:
    with client_to(1, tmp_path / "spool") as client:
        with pytest.raises(cloudpubsub.PayloadTooLarge, match="userdata"):
            client.publish("topic", b"", userdata=bytes(65_536))
        assert client.stats().published == 0


def test_a_callback_that_raises_stops_nothing(mosquitto: Broker, tmp_path: Path) -> None:
    def fail(message: cloudpubsub.Message) -> None:
        raise RuntimeError("a mistake of the user")

    with client_to(mosquitto.port, tmp_path / "spool", on_publish=fail) as client:
        for _ in range(3):
            client.wait(client.publish("topic", b""), LIMIT)
        until(lambda: client.stats().callback_errors == 3)


def test_a_slow_callback_slows_nothing_but_itself(mosquitto: Broker, tmp_path: Path) -> None:
    import threading

    go_on = threading.Event()
    told: list[int | None] = []

    def slow(message: cloudpubsub.Message) -> None:
        go_on.wait(LIMIT)
        told.append(message.position)

    with client_to(
        mosquitto.port, tmp_path / "spool", on_publish=slow, handler_queue=10, keep_alive=2, ack_timeout=2.0
    ) as client:
        positions = [client.publish("topic", b"%d" % number) for number in range(20_000)]
        until(lambda: client.stats().acked > 0)
        # Longer than keep-alive and ack_timeout: it is we who do not read.
        with pytest.raises(cloudpubsub.WaitTimeout):
            client.wait(positions[-1], 4.5)
        assert client.stats().reconnects == 0
        go_on.set()
        assert client.flush(LIMIT) == 0
        until(lambda: len(told) == len(positions))
    assert told == positions
