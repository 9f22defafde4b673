"""Finding the one message for which a broker hangs up.  Knows no clock, no socket and no message.

MQTT 3.1.1 has no way to refuse a message but to close the connection, and then the next connection sends it again.  So
when connections end again and again with the same message the oldest in flight, fewer and fewer are sent at a time,
until that one is sent alone.  It is condemned when the link then dropped soon, several times, and each time in between
one that carried another message in its place stayed up and brought that one's acknowledgement: broker restarts condemn
nobody, and of bad links only those that break at random, and often, may condemn what takes as long as they last.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Suspicion"]

_NARROWING = 8
_STRIKES = 3
_CANDIDATES = 16  # messages behind the suspect that may stand in for it


class Suspicion:
    """What to send on the next connection, and who is guilty.  One thread's own.

    The owner sends at most `limit` messages at a time (None: as many as it likes).  While `is_control` it holds back
    the suspect and `skipped` messages behind it, sends the one after them alone, and calls `acquit` when that was
    acknowledged and the link stayed up.
    """

    def __init__(self) -> None:
        self._suspect: int | None = None  # position of the oldest in flight when the link dropped
        self._until = 0  # somewhere below it is the culprit
        self._strikes = 0
        self._controls = 0
        self._candidate = 0
        self.limit: int | None = None
        self.is_control = False

    @property
    def is_watching(self) -> bool:
        """Whether `moved` matters now."""
        return self._suspect is not None or self.limit is not None

    @property
    def skipped(self) -> int:
        return self._candidate

    def dropped(self, oldest: int | None, sent_end: int, inflight: int, soon: bool) -> int | None:
        """A link was lost that had been up.

        Args:
            oldest: Position of the oldest message in flight; None: nothing was.
            sent_end: Position behind what was sent.
            inflight: How many were in flight.
            soon: Whether it was lost soon after the oldest was sent.

        Returns the position of a message that is condemned, or None.
        """
        if self.is_control:
            self.is_control = False
            self._strikes = self._controls = 0  # the link drops without the suspect too; or the other one is no better
            self._candidate = (self._candidate + 1) % _CANDIDATES
            return None
        if oldest is None:
            return None
        if oldest != self._suspect:
            self._suspect, self._strikes, self._controls, self._candidate = oldest, 0, 0, 0
            self._until = max(self._until, sent_end)
            return None
        if inflight > 1:
            self.limit = max(1, inflight // _NARROWING)
            return None
        self.limit = 1
        if soon:
            self._strikes += 1
        else:
            self._strikes = self._controls = 0
        if self._strikes >= _STRIKES and self._controls >= _STRIKES - 1:
            return oldest
        self.is_control = self._strikes > self._controls
        return None

    def acquit(self) -> None:
        """The control's message was acknowledged, and the link stayed up: now the suspect, alone."""
        self.is_control = False
        self._controls += 1

    def give_up_control(self) -> None:
        """There is no message so far behind the suspect; next time the one right behind it may stand in."""
        self.is_control = False
        self._candidate = 0

    def convicted(self) -> None:
        """The suspect is gone."""
        self._suspect, self._strikes, self._controls, self._candidate = None, 0, 0, 0
        self.limit, self._until = None, 0

    @property
    def suspect(self) -> int | None:
        """Position of a message that was the oldest in flight more than once when the link dropped."""
        return self._suspect if self.limit is not None else None

    def moved(self, front: Callable[[int], int]) -> None:
        """`front` tells of a position up to where everything of its stream is settled."""
        if self._suspect is not None and front(self._suspect) > self._suspect:
            self._suspect, self._strikes, self._controls, self._candidate = None, 0, 0, 0
            self.is_control = False
        if self.limit is not None and (self._until == 0 or front(self._until - 1) >= self._until):
            self.limit = None
            self._until = 0
