"""Logging that cannot flood a disk, and drop reports that cannot flood memory.

Both may be used from any thread.  No lock is held while user code (a logging handler is user code) runs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from cloudpubsub._message import Drop

__all__ = ["DropReports", "RateLimitedLog"]

_KEYS_MAX = 256


class _Series:
    __slots__ = ("last_s", "level", "suppressed")

    def __init__(self, last_s: float) -> None:
        self.last_s = last_s
        self.suppressed = 0
        self.level = logging.WARNING


class RateLimitedLog:
    """A logger that says a thing at once and then repeats it at most once in `interval_s` seconds, with a count.

    Things are told apart by `key`.  At most 256 keys are remembered; the one that was quiet longest is forgotten
    first.  An exception raised by a logging handler is swallowed: logging must not end a thread of ours.
    """

    def __init__(
        self, logger: logging.Logger, interval_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()  # guards _series
        self._series: dict[str, _Series] = {}

    def log(
        self, level: int, key: str, message: str, *args: object, exc_info: BaseException | None = None
    ) -> bool:
        """Log `message % args`, or count it.  Returns whether it was logged."""
        now_s = self._clock()
        evicted = None
        with self._lock:
            series = self._series.pop(key, None)
            if series is not None and now_s - series.last_s < self._interval_s:
                series.suppressed += 1
                series.level = level
                self._series[key] = series
                return False
            suppressed = series.suppressed if series is not None else 0
            if len(self._series) >= _KEYS_MAX:
                oldest = next(iter(self._series))
                evicted = (oldest, self._series.pop(oldest))
            self._series[key] = _Series(now_s)
        if evicted is not None:
            self._tell_suppressed(*evicted)
        if suppressed:
            message += " (and %d more like it since the last report)"
            args = (*args, suppressed)
        self._emit(level, message, args, exc_info)
        return True

    def flush(self) -> None:
        """Report what was counted and not yet said; for the end of a program."""
        with self._lock:
            pending = list(self._series.items())
            self._series.clear()
        for key, series in pending:
            self._tell_suppressed(key, series)

    def _tell_suppressed(self, key: str, series: _Series) -> None:
        if series.suppressed:
            self._emit(series.level, "%s: %d more since the last report", (key, series.suppressed), None)

    def _emit(self, level: int, message: str, args: tuple[object, ...], exc_info: BaseException | None) -> None:
        # Where the log itself fails nowhere is left to say it; the counters of the caller still moved.
        with contextlib.suppress(Exception):
            self._logger.log(level, message, *args, exc_info=exc_info)


class DropReports:
    """Reports on their way to `on_drop`, in bounded memory, with exact sums.

    Up to `capacity` reports are kept one by one.  A further one is merged with a neighbour of the same reason, where
    there is none with the newest of its reason: `count` and `bytes` stay exact, and `[first, end)` covers every dropped
    record (and may then cover records that were not dropped).  The bound is `capacity` plus the number of reasons.
    """

    def __init__(self, capacity: int = 256) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity!r}")
        self._capacity = capacity
        self._lock = threading.Lock()  # guards _waiting
        self._waiting: deque[Drop] = deque()

    def add(self, drop: Drop) -> None:
        """Keep a report.  Never blocks for long and never fails."""
        with self._lock:
            waiting = self._waiting
            if len(waiting) < self._capacity:
                waiting.append(drop)
                return
            for index in range(len(waiting) - 1, -1, -1):
                if waiting[index].reason == drop.reason:
                    waiting[index] = waiting[index].merged(drop)
                    return
            waiting.append(drop)

    def take(self) -> Drop | None:
        """The oldest report, or None."""
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def __len__(self) -> int:
        return len(self._waiting)
