"""Payloads of every size and type."""

from __future__ import annotations

import array
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from tests.brokers import Broker
from tests.collector import Collector
from tests.publishing import LIMIT, client_to

MAX = 10_000


def topic_and_payload(topic: str, payload: bytes) -> tuple[str, bytes]:
    return topic, payload


def test_a_payload_larger_than_the_socket_takes_at_once_arrives(mosquitto: Broker, tmp_path: Path) -> None:
    payloads = [bytes([number]) * 8_000_000 for number in range(3)]
    with Collector(mosquitto.port) as collector:
        with client_to(
            mosquitto.port, tmp_path / "spool", ring_bytes=64 << 20, segment_bytes=64 << 20, max_payload_bytes=8_000_000
        ) as client:
            for payload in payloads:
                client.publish("large", payload)
            assert client.flush(LIMIT) == 0
        collector.wait_for(len(payloads), LIMIT)
        assert collector.arrivals() == payloads


def test_one_byte_too_many_is_refused_and_nothing_is_stored(tmp_path: Path) -> None:
    with client_to(1, tmp_path / "spool", max_payload_bytes=MAX) as client:
        for payload in (bytes(MAX + 1), bytearray(MAX + 1), "x" * (MAX + 1), "é" * (MAX // 2 + 1)):
            with pytest.raises(cloudpubsub.PayloadTooLarge, match=str(MAX)):
                client.publish("topic", payload)
        assert client.stats().published == client.stats().backlog_messages == 0


def test_bytes_like_objects_and_text_arrive_as_their_bytes(broker: Broker, tmp_path: Path) -> None:
    numbers = array.array("I", range(10))
    published: list[tuple[Any, bytes]] = [
        (b"bytes", b"bytes"),
        (bytearray(b"bytearray"), b"bytearray"),
        (memoryview(b"_memoryview_")[1:-1], b"memoryview"),
        (memoryview(bytearray(b"writable")), b"writable"),
        (numbers, numbers.tobytes()),
        ("text", b"text"),
        ("Grüße, 世界 🌍", "Grüße, 世界 🌍".encode()),
    ]
    with Collector(broker.port) as collector:
        with client_to(broker.port, tmp_path / "spool") as client:
            for payload, _ in published:
                client.publish("types", payload)
            assert client.flush(LIMIT) == 0
        collector.wait_for(len(published), LIMIT)
        assert collector.arrivals() == [expected for _, expected in published]


def test_a_changed_bytearray_changes_nothing_that_was_published(mosquitto: Broker, tmp_path: Path) -> None:
    with Collector(mosquitto.port) as collector:
        client = client_to(mosquitto.port, tmp_path / "spool")
        payload = bytearray(b"before")
        client.publish("topic", payload)
        payload[:] = b"after!"
        with client:
            collector.wait_for(1, LIMIT)
        assert collector.arrivals() == [b"before"]


@pytest.mark.parametrize(
    "payload", [None, 1, 1.5, ["x"], object(), memoryview(b"abcd")[::2]], ids=lambda one: type(one).__name__
)
def test_other_types_are_refused_and_nothing_is_stored(payload: Any, tmp_path: Path) -> None:
    with client_to(1, tmp_path / "spool") as client:
        with pytest.raises((TypeError, BufferError)):
            client.publish("topic", payload)
        assert client.stats().published == 0


def test_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    with client_to(1, tmp_path / "spool") as client:
        with pytest.raises(ValueError):
            client.publish("topic", "\ud800")
        assert client.stats().published == 0
