"""Delays between attempts to connect."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudpubsub._backoff import Backoff

seconds = st.floats(0.001, 1e6)


@given(seconds, seconds, st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=50))
def test_every_delay_is_between_floor_and_cap(first: float, second: float, numbers: list[float]) -> None:
    low, high = sorted((first, second))
    source = iter(numbers)
    backoff = Backoff(low, high, lambda: next(source))
    for attempt, number in enumerate(numbers):
        ceiling = min(high, low * 2.0 ** (attempt + 1))
        delay = backoff.next_s()
        assert low <= delay <= high
        assert delay == pytest.approx(low + number * (ceiling - low))
    assert backoff.attempts == len(numbers)


def test_the_ceiling_doubles_up_to_the_cap() -> None:
    backoff = Backoff(1, 60, lambda: 1.0)
    assert [backoff.next_s() for _ in range(8)] == [2, 4, 8, 16, 32, 60, 60, 60]


def test_reset_starts_again_from_the_floor() -> None:
    backoff = Backoff(1, 60, lambda: 1.0)
    assert [backoff.next_s(), backoff.next_s()] == [2, 4]
    backoff.reset()
    assert backoff.attempts == 0
    assert backoff.next_s() == 2


def test_a_million_attempts_do_not_overflow() -> None:
    backoff = Backoff(1, 60, lambda: 1.0)
    for _ in range(1_000_000):
        last = backoff.next_s()
    assert last == 60


def test_two_clients_that_lose_a_broker_together_come_back_apart() -> None:
    first = {Backoff(1, 60).next_s() for _ in range(50)}
    assert len(first) == 50


@pytest.mark.parametrize("limits", [(0, 1), (-1, 1), (2, 1), (float("nan"), 1)])
def test_wrong_limits_are_refused(limits: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="min_s"):
        Backoff(*limits)
