"""Topics as MQTT allows them, and as it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from tests.brokers import Broker
from tests.collector import Collector
from tests.publishing import LIMIT, client_to

GOOD = [
    "a",
    "/",
    "a//b",
    "/leading/and/trailing/",
    " blank ",
    "température/Küche/世界/🌍",
    "$not-sys",
    "x" * 1_000,
]


def test_every_valid_topic_arrives_unchanged(mosquitto: Broker, tmp_path: Path) -> None:
    topics = [topic for topic in GOOD if not topic.startswith("$")]  # "#" does not match those
    with Collector(mosquitto.port, key=lambda topic, payload: topic) as collector:
        with client_to(mosquitto.port, tmp_path / "spool") as client:
            for topic in GOOD:
                client.publish(topic, b"")
            assert client.flush(LIMIT) == 0
        collector.wait_for(len(topics), LIMIT)
        assert collector.arrivals() == topics


def test_the_longest_topic_is_stored_and_sent(mosquitto: Broker, tmp_path: Path) -> None:
    topic = "é" * 32_767 + "x"  # 65,535 bytes
    with Collector(mosquitto.port, key=lambda topic, payload: topic) as collector:
        with client_to(mosquitto.port, tmp_path / "spool") as client:
            client.publish(topic, b"")
            assert client.flush(LIMIT) == 0
        collector.wait_for(1, LIMIT)
        assert collector.arrivals() == [topic]


@pytest.mark.parametrize(
    "topic",
    ["", "a/+/b", "+", "#", "a/#", "a+", "a\0b", "\0", "x" * 65_536, "é" * 32_768, "\ud800"],
    ids=lambda topic: ascii(topic)[:20],
)
def test_an_invalid_topic_is_refused_and_nothing_is_stored(topic: str, tmp_path: Path) -> None:
    with client_to(1, tmp_path / "spool") as client:
        with pytest.raises(cloudpubsub.TopicError):
            client.publish(topic, b"payload")
        assert client.stats().published == 0


@pytest.mark.parametrize("topic", [None, 1, b"bytes"])
def test_a_topic_that_is_no_text_is_a_type_error(topic: Any, tmp_path: Path) -> None:
    with client_to(1, tmp_path / "spool") as client:
        with pytest.raises(TypeError):
            client.publish(topic, b"payload")
        assert client.stats().published == 0
