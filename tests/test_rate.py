"""Limits of messages and bytes a second, and how long a backlog will take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from cloudpubsub import OptionError, Options
from cloudpubsub._rate import Bucket, Drain
from tests.fake_broker import FakeBroker
from tests.publishing import LIMIT, client_to, publish_numbers, until
from tests.script import Script


def taken_in(bucket: Bucket, seconds: float, unit: float = 1.0, step_s: float = 0.01) -> float:
    """By one who takes all he can, looking every `step_s` of a simulated clock."""
    taken, now_s = 0.0, 1000.0
    while now_s < 1000.0 + seconds:
        while bucket.available(now_s) >= unit:
            bucket.take(unit)
            taken += unit
        now_s += step_s
    return taken


@pytest.mark.parametrize("rate", [0.5, 10, 100, 5_000])
def test_a_rate_is_held_within_5_percent_over_a_hundred_messages(rate: float) -> None:
    seconds = max(10.0, 100 / rate)
    assert taken_in(Bucket(rate), seconds) == pytest.approx(rate * seconds, rel=0.05, abs=1)


def test_a_unit_larger_than_the_bucket_is_paid_for_afterwards() -> None:
    bucket, now_s, sent = Bucket(1_000), 0.0, 0
    for _ in range(3_000):  # 30 s of packets of 5,000 bytes
        if bucket.available(now_s) > 0:
            bucket.take(5_000)
            sent += 5_000
        now_s += 0.01
    assert 30_000 <= sent <= 35_000


def test_a_long_silence_saves_up_a_tenth_of_a_second_only() -> None:
    bucket = Bucket(100)
    bucket.available(0.0)
    assert bucket.available(3600.0) == 10


def test_a_bucket_knows_when_the_next_is_due() -> None:
    bucket = Bucket(10)
    assert bucket.available(100.0) == 1
    bucket.take(1)
    assert bucket.due_s() == pytest.approx(100.1)
    assert bucket.available(100.1) == pytest.approx(1)
    assert bucket.due_s(0.5) == -math.inf
    assert Bucket(None).available(1.0) == math.inf and Bucket(None).due_s() == -math.inf


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    bucket = Bucket(10)
    bucket.available(100.0)
    bucket.take(1)
    assert bucket.available(100.0) == bucket.available(50.0) == 0


@pytest.mark.parametrize("limits", [{"messages": 0.001}, {"bytes": 1}])
def test_a_rate_can_be_changed_while_it_holds_everything_up(limits: dict[str, float], tmp_path: Path) -> None:
    with FakeBroker(Script()) as broker, client_to(broker.port, tmp_path) as client:
        client.set_rate(**limits)
        publish_numbers(client, range(100))
        until(lambda: client.stats().inflight or client.stats().acked)  # the first one is let through
        assert client.stats().backlog_messages > 0
        client.set_rate()
        assert client.flush(LIMIT) == 0


def test_both_rates_are_settings(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_publish_rate": 1e6, "max_publish_bytes_rate": 1e8}
    with FakeBroker(Script()) as broker, client_to(broker.port, tmp_path, **settings) as client:
        publish_numbers(client, range(1000))
        assert client.flush(LIMIT) == 0


@pytest.mark.parametrize("limits", [{"messages": 0}, {"messages": "5"}, {"bytes": -1}, {"bytes": float("nan")}])
def test_a_wrong_rate_is_refused_and_changes_nothing(limits: Any) -> None:
    with client_to(1, None, max_publish_rate=7) as client:
        with pytest.raises(OptionError, match="max_publish"):
            client.set_rate(**limits)
        assert client._publisher.messages_rate.rate == 7


def test_a_preset_fills_in_what_is_not_given() -> None:
    url = "mqtts://example.iot.eu-west-1.amazonaws.com"
    options = Options(broker=url, preset="aws-iot-core")
    assert (options.max_publish_rate, options.max_publish_bytes_rate) == (100, 512 << 10)
    assert (options.max_inflight, options.max_payload_bytes) == (100, 128 << 10)
    options = Options(broker=url, preset="aws-iot-core", max_publish_rate=5, max_inflight=7, max_payload_bytes=1000)
    assert (options.max_publish_rate, options.max_inflight, options.max_payload_bytes) == (5, 7, 1000)


# ---- time to drain


def test_time_to_drain_follows_from_the_rates() -> None:
    drain = Drain()
    for second in range(31):
        drain.note(second, 1_000 + second * 10, second * 30)
    assert drain.seconds(30, 1_300, 900) == pytest.approx(20)  # 400 left, shrinking by 20 a second
    assert drain.seconds(30, 1_300, 1_300) == 0


def test_a_backlog_that_grows_never_drains() -> None:
    drain = Drain()
    drain.note(0, 100, 0)
    assert drain.seconds(10, 300, 150) == math.inf
    assert Drain().seconds(10, 5, 0) == math.inf


def test_old_samples_do_not_count() -> None:
    drain = Drain()
    for second in range(200):
        drain.note(second, 10_000, second if second < 100 else 100 + 10 * (second - 100))
    assert drain.seconds(199, 10_000, 1_090) == pytest.approx(891)
    assert drain.covers(199) and not Drain().covers(0)


def test_a_client_says_how_long_its_backlog_will_take(tmp_path: Path) -> None:
    with FakeBroker(Script()) as broker, client_to(broker.port, tmp_path, max_publish_rate=50) as client:
        assert client.stats().drain_seconds == 0
        publish_numbers(client, range(10_000))
        until(lambda: 0 < client.stats().drain_seconds < math.inf)
        assert client.stats().drain_seconds > 60


def test_stats_are_public() -> None:
    assert "drain_seconds" in cloudpubsub.Stats.__dataclass_fields__


@pytest.mark.parametrize("limits", [{"max_publish_rate": 3_000}, {"max_publish_bytes_rate": 60_000}])
def test_a_limited_client_never_stands_still(limits: dict[str, Any], tmp_path: Path) -> None:
    """Thousands of times what is due next is due between two looks at the clock."""
    with FakeBroker(Script()) as broker, client_to(broker.port, tmp_path, **limits) as client:
        publish_numbers(client, range(3_000))
        assert client.flush(LIMIT) == 0
