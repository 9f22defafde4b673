"""How long to wait before the next attempt to connect.

One object belongs to one connection and one thread; two connections never share one, so that trouble on one side does
not slow the other.  It knows no clock and never sleeps.
"""

from __future__ import annotations

import random
from collections.abc import Callable

__all__ = ["Backoff"]


class Backoff:
    """Exponential delays with full jitter between a floor and a hard cap.

    The n-th delay in a row (from 0) is spread evenly over `[min_s, min(max_s, min_s * 2 ** (n + 1))]`: never below the
    floor, never above the cap, and spread from the first one on, because all gateways lose a broker at the same moment.

    `reset()` is called by the owner when a connection has proved itself (it stayed up for a while and carried data),
    not when it merely opened: a broker that accepts and at once closes must not be hammered.
    """

    __slots__ = ("_ceiling_s", "_max_s", "_min_s", "_random", "attempts")

    def __init__(self, min_s: float, max_s: float, random: Callable[[], float] = random.random) -> None:
        """`0 < min_s <= max_s`, in seconds.  `random` gives numbers in [0, 1)."""
        if not 0 < min_s <= max_s:
            raise ValueError(f"expected 0 < min_s <= max_s, got {min_s!r} and {max_s!r}")
        self._min_s = min_s
        self._max_s = max_s
        self._random = random
        self._ceiling_s = min_s
        #: Delays given since the last reset.
        self.attempts = 0

    def next_s(self) -> float:
        """The next delay, in seconds.  The ceiling is doubled up to the cap, so no number of attempts overflows."""
        self._ceiling_s = min(self._max_s, self._ceiling_s * 2)
        self.attempts += 1
        delay_s = self._min_s + self._random() * (self._ceiling_s - self._min_s)
        return min(self._max_s, max(self._min_s, delay_s))

    def reset(self) -> None:
        """Start again from the floor."""
        self._ceiling_s = self._min_s
        self.attempts = 0
