"""A thousand gateways lose the same broker at the same moment: how their attempts to connect are spread.

Only `Backoff` and a simulated clock: nobody connects, nobody sleeps.  The numbers come from seeded generators, so each
run computes the same attempts to the last bit and cannot be flaky: the bounds only say what "spread" means, and would
hold with other seeds as well (the first is crossed by one seed in a thousand, the others by far fewer).

* First pauses: the Kolmogorov-Smirnov distance to an even spread between the floor and twice the floor.
* Later, when all pauses have reached the cap: attempts in each second, their index of dispersion (variance over mean, 1
  where each client comes when it likes, and larger where they come in groups) and the greatest of them.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable

import pytest

from cloudpubsub import Options
from cloudpubsub._backoff import Backoff

CLIENTS = 1000
OUTAGE_S = 600.0
FLOOR_S, CAP_S = 1.0, 60.0
seeds = pytest.mark.parametrize("seed", [1, 2, 3, 2026])


def attempts_of(backoff: Backoff, until_s: float) -> list[float]:
    """The moments at which it tries, from the loss at 0 to the first at or after `until_s`."""
    moments = []
    now_s = 0.0
    while now_s < until_s:
        now_s += backoff.next_s()
        moments.append(now_s)
    return moments


def fleet(new_random: Callable[[int], Callable[[], float]], until_s: float = OUTAGE_S) -> list[list[float]]:
    return [attempts_of(Backoff(FLOOR_S, CAP_S, new_random(client)), until_s) for client in range(CLIENTS)]


def seeded(seed: int) -> Callable[[int], Callable[[], float]]:
    return lambda client: random.Random(f"{seed} {client}").random


def in_step(client: int) -> Callable[[], float]:
    """What no client may do: exponential pauses without jitter."""
    return lambda: 1.0


def per_second(moments: list[float], from_s: float, to_s: float) -> list[int]:
    counts = Counter(math.floor(moment) for moment in moments)
    return [counts[second] for second in range(int(from_s), int(to_s))]


def dispersion(counts: list[int]) -> float:
    return statistics.pvariance(counts) / statistics.mean(counts)


def distance_to_even(numbers: list[float], low: float, high: float) -> float:
    """Kolmogorov-Smirnov: the greatest difference between the shares that are below a number, found and expected."""
    found = sorted((number - low) / (high - low) for number in numbers)
    count = len(found)
    return max(max((rank + 1) / count - x, x - rank / count) for rank, x in enumerate(found))


def test_the_limits_here_are_those_of_the_package() -> None:
    defaults = {each.name: each.default for each in dataclasses.fields(Options)}
    assert (defaults["reconnect_min"], defaults["reconnect_max"]) == (FLOOR_S, CAP_S)


@seeds
def test_no_pause_is_below_the_floor_or_above_the_cap(seed: int) -> None:
    for client in range(CLIENTS):
        backoff = Backoff(FLOOR_S, CAP_S, seeded(seed)(client))
        pauses = [backoff.next_s() for _ in range(40)]
        ceilings = [min(CAP_S, FLOOR_S * 2 ** (number + 1)) for number in range(40)]
        assert all(FLOOR_S <= pause <= ceiling for pause, ceiling in zip(pauses, ceilings, strict=True))


@seeds
def test_the_first_attempts_are_spread_already(seed: int) -> None:
    first = [moments[0] for moments in fleet(seeded(seed), FLOOR_S)]
    assert distance_to_even(first, FLOOR_S, 2 * FLOOR_S) < 1.95 / math.sqrt(CLIENTS)
    hundredths = Counter(math.floor(moment * 100) for moment in first)
    assert max(hundredths.values()) < 3 * CLIENTS / 100


@seeds
def test_a_long_outage_becomes_an_even_trickle(seed: int) -> None:
    moments = [moment for each in fleet(seeded(seed)) for moment in each]
    counts = per_second(moments, 3 * CAP_S, OUTAGE_S)
    expected = CLIENTS / ((FLOOR_S + CAP_S) / 2)  # one attempt for each mean pause
    assert statistics.mean(counts) == pytest.approx(expected, rel=0.03)
    assert 0.5 < dispersion(counts) < 1.5
    assert expected / 4 < min(counts) and max(counts) < 2 * expected


@seeds
def test_no_second_wave_is_like_the_first(seed: int) -> None:
    moments = [moment for each in fleet(seeded(seed)) for moment in each]
    assert per_second(moments, 0, FLOOR_S) == [0]
    counts = per_second(moments, 0, OUTAGE_S)
    assert counts[1] == CLIENTS  # each once, evenly: see above
    assert [max(counts[after:]) < limit for after, limit in ((2, 500), (8, 280), (16, 170), (32, 110))] == [True] * 4
    # The longer the outage, the fewer attempts a second.
    rates = [statistics.mean(counts[low:high]) for low, high in ((1, 2), (2, 8), (8, 16), (16, 32), (32, 64))]
    assert rates == sorted(rates, reverse=True)


@seeds
@pytest.mark.parametrize("back_s", [90.0, 300.0, OUTAGE_S])
def test_they_come_back_one_by_one(seed: int, back_s: float) -> None:
    """The broker is there again: each is accepted at its next attempt."""
    accepted = [moments[-1] for moments in fleet(seeded(seed), back_s)]
    assert min(accepted) >= back_s and max(accepted) <= back_s + CAP_S
    counts = per_second([moment - back_s for moment in accepted], 0, CAP_S)
    assert sum(counts) == CLIENTS
    assert max(counts) < 2 * CLIENTS / ((FLOOR_S + CAP_S) / 2)
    # Neither all at once nor all at the end.
    assert CAP_S / 6 < statistics.median(accepted) - back_s < CAP_S / 2


def test_clients_in_step_would_be_noticed() -> None:
    moments = [moment for each in fleet(in_step) for moment in each]
    counts = per_second(moments, 3 * CAP_S, OUTAGE_S)
    assert dispersion(counts) > 100 and max(counts) == CLIENTS
    first = [each[0] for each in fleet(in_step, FLOOR_S)]
    assert distance_to_even(first, FLOOR_S, 2 * FLOOR_S) > 0.9
