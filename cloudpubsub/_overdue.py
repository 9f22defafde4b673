"""When an acknowledgement is overdue.  Knows no clock and no socket.

On a slow link a message can wait in the kernel's send queue for longer than any sensible time limit, and the link is
alive all the same.  So a message is overdue when `limit_s` has passed since the peer's TCP took it, and either no
acknowledgement at all came for so long, or one for a message sent after it came so long ago.  What the peer's TCP does
not take is for keep-alive to judge.
"""

from __future__ import annotations

import math
from collections import deque

__all__ = ["Overdue"]

_MARKS = 64  # how finely the time limit is divided


class Overdue:
    """The times that matter for the oldest message in flight, in monotonic seconds.  One thread's own."""

    __slots__ = ("_acked_s", "_left", "_limit_s", "_marks", "_oldest", "_overtaken_s", "_written")

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.restart(0.0)

    def restart(self, now_s: float) -> None:
        """A new connection begins."""
        self._acked_s = now_s
        self._oldest: int | None = None  # position
        self._overtaken_s = math.inf  # when a later message than the oldest was acknowledged first
        self._written = 0  # bytes that the socket took
        # (first and last time of a stretch of writing, bytes written until its end) that the peer has not taken yet,
        self._marks: deque[tuple[float, float, int]] = deque()
        # and (last time of a stretch, when the peer was seen to have taken it).
        self._left: deque[tuple[float, float]] = deque()

    def wrote(self, n: int, now_s: float) -> None:
        self._written += n
        first_s = now_s
        if self._marks and now_s - self._marks[-1][0] < self._limit_s / _MARKS:
            first_s = self._marks.pop()[0]
        self._marks.append((first_s, now_s, self._written))

    @property
    def waits(self) -> bool:
        """Whether the next call of `queue` matters."""
        return bool(self._marks)

    def queue(self, waiting_bytes: int, now_s: float) -> None:
        """So many bytes were written and are not acknowledged by the peer's TCP."""
        taken = self._written - waiting_bytes
        while self._marks and self._marks[0][2] <= taken:
            self._left.append((self._marks.popleft()[1], now_s))
        while len(self._left) > 2 * _MARKS:
            self._left.popleft()

    def acked(self, now_s: float) -> None:
        """Acknowledgements came."""
        self._acked_s = now_s

    def read_again(self, now_s: float) -> None:
        """For a while the socket was not read: acknowledgements that wait there could not be seen."""
        self._acked_s = now_s
        self._overtaken_s = max(self._overtaken_s, now_s)

    def oldest(self, position: int | None, now_s: float, was_acked: bool) -> None:
        """The oldest message in flight; `was_acked`: after acknowledgements came, which were of others then."""
        if position != self._oldest:
            self._oldest = position
            self._overtaken_s = math.inf
        elif was_acked and position is not None:
            self._overtaken_s = min(self._overtaken_s, now_s)

    def due_s(self, framed_s: float) -> float:
        """When the oldest message, framed at `framed_s`, will be overdue; never, while the peer has not taken it."""
        while len(self._left) > 1 and self._left[0][0] < framed_s:
            self._left.popleft()
        if not self._left or self._left[0][0] < framed_s:
            return math.inf
        return max(self._left[0][1], min(self._acked_s, self._overtaken_s)) + self._limit_s
