"""When to test a link that is silent, and when to give it up.  Knows no clock and no socket."""

from __future__ import annotations

import math

__all__ = ["KeepAlive"]


class KeepAlive:
    """The times that matter for one connection after the other, in monotonic seconds.

    A ping is due when nothing was sent, or nothing received, for half a keep-alive; in a silence one ping is enough.
    The link is given up after one and a half keep-alives without a received byte.  One thread's own.
    """

    __slots__ = ("_half_s", "_pinged_s", "_received_s", "_sent_s")

    def __init__(self, seconds: float) -> None:
        self._half_s = seconds / 2
        self.restart(0.0)

    def restart(self, now_s: float) -> None:
        """A new connection begins."""
        self._sent_s = self._received_s = now_s
        self._pinged_s = -math.inf

    def sent(self, now_s: float) -> None:
        self._sent_s = now_s

    def pinged(self, now_s: float) -> None:
        self._sent_s = self._pinged_s = now_s

    def received(self, now_s: float) -> None:
        self._received_s = now_s

    def is_lost(self, now_s: float) -> bool:
        return now_s - self._received_s >= 3 * self._half_s

    def ping_is_due(self, now_s: float) -> bool:
        return now_s >= self._ping_at_s()

    def _ping_at_s(self) -> float:
        idle_s = self._sent_s + self._half_s
        return min(idle_s, self._received_s + self._half_s) if self._pinged_s <= self._received_s else idle_s

    def next_s(self, can_write: bool) -> float:
        """When to look again: to ping, if that is possible at all, or to give up."""
        lost_s = self._received_s + 3 * self._half_s
        return min(lost_s, self._ping_at_s()) if can_write else lost_s
