"""How much may be sent per second, and how long the backlog will take.  Knows no clock and no socket."""

from __future__ import annotations

import math
from collections import deque

__all__ = ["Bucket", "Drain"]

_BURST_S = 0.1  # how much may be saved up
_WINDOW_S = 60.0  # over which rates of publishing and sending are measured,
_SAMPLE_S = 1.0  # from samples so far apart


class Bucket:
    """A token bucket for one rate; one thread's own, but for `rate`, which any thread may set.

    It fills at `rate` units a second (None: there is no limit) up to what a tenth of a second brings, and at least to
    twice `least`, so that nothing is lost between the moment when the next unit may go and the moment when it goes.  It
    may be overdrawn: what is taken too much is waited for.

    Source: the meter of ITU-T I.371 (generic cell rate algorithm), in its leaky-bucket form.
    """

    __slots__ = ("_at_s", "_least", "_tokens", "rate")

    def __init__(self, rate: float | None, least: float = 1.0) -> None:
        self.rate = rate
        self._least = least
        self._tokens = 0.0
        self._at_s = -math.inf

    def available(self, now_s: float) -> float:
        """How many units may be taken now; not above 0: none."""
        rate = self.rate
        if rate is None:
            return math.inf
        full = max(2 * self._least, rate * _BURST_S)
        earned = 0.0 if now_s < self._at_s else self._least if math.isinf(self._at_s) else (now_s - self._at_s) * rate
        self._tokens = min(full, self._tokens + earned)
        self._at_s = now_s
        return self._tokens

    def take(self, units: float) -> None:
        if self.rate is not None:
            self._tokens -= units

    def due_s(self, enough: float = 1.0) -> float:
        """When `enough` units will be there, by the clock of the last `available`."""
        rate = self.rate
        if rate is None or self._tokens >= enough:
            return -math.inf
        return self._at_s + (enough - self._tokens) / rate


class Drain:
    """How long the backlog will take at the rates of the last minute.

    `note` and `seconds` may be called from several threads: each works on what it finds, and a lost sample matters
    little.
    """

    __slots__ = ("_samples",)

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=int(_WINDOW_S / _SAMPLE_S) + 1)

    def is_due(self, now_s: float) -> bool:
        """Whether the last sample is old enough for another."""
        return not self._samples or now_s - self._samples[-1][0] >= _SAMPLE_S

    def note(self, now_s: float, published: int, ended: int) -> None:
        """So many messages have ever been published, and have ended in one way or another."""
        self._samples.append((now_s, published, ended))

    def seconds(self, now_s: float, published: int, ended: int) -> float:
        """0.0 without a backlog; infinite if it does not shrink."""
        backlog = published - ended
        if backlog <= 0:
            return 0.0
        samples = [sample for sample in tuple(self._samples) if now_s - sample[0] <= _WINDOW_S]
        if not samples or now_s - samples[0][0] <= 0:
            return math.inf
        since_s, published_then, ended_then = samples[0]
        shrinks = (ended - ended_then) - (published - published_then)
        return math.inf if shrinks <= 0 else backlog * (now_s - since_s) / shrinks

    def covers(self, now_s: float) -> bool:
        """Whether the samples reach back far enough for a judgement."""
        return bool(self._samples) and now_s - self._samples[0][0] >= _WINDOW_S / 2
