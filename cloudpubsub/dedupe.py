"""For consumers: removes the duplicates that at-least-once delivery brings, and tells of gaps.

Every published message has an id that stays the same however often it is sent, also after restarts: the incarnation of
the spool and the message's place in its log.  With protocol "5" and `message_ids=True` it travels as the user property
"cloudpubsub-id"; under 3.1.1 a `payload_hook` can put it into the payload.

    >>> seen = Filter(on_gap=lambda gap: print("missing:", gap))
    >>> def on_message(message):
    ...     if seen.accept(dict(message.user_properties)["cloudpubsub-id"]):
    ...         store(message)

Nothing here needs the rest of the package, so a consumer may copy the file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Filter", "Gap", "MessageId"]

_JUMP = 1 << 32  # positions that no padding can explain: the sender's process lost what was in memory
_FIELDS = 4


class MessageId(NamedTuple):
    """The identity of a published message.  `str()` is how it travels: "spool/position/end/after"."""

    #: Incarnation of the spool: 32 hex digits.  Another directory, or an emptied one, is another.
    spool: str
    #: Place in its log; with `spool` it is the identity.  Rises in the order of publishing.
    position: int
    #: Where the message ends in the log.
    end: int
    #: Where the message sent before it ended.
    after: int

    def __str__(self) -> str:
        return f"{self.spool}/{self.position}/{self.end}/{self.after}"

    @classmethod
    def parse(cls, text: str) -> MessageId:
        """From its text.  Raises ValueError."""
        parts = text.split("/")
        if len(parts) != _FIELDS or not parts[0] or not all(part.isascii() and part.isdigit() for part in parts[1:]):
            raise ValueError(f"{text[:100]!r} is no message id")
        return cls(parts[0], int(parts[1]), int(parts[2]), int(parts[3]))


class Gap(NamedTuple):
    """Places `[first, end)` of a log from which nothing has come yet.

    The sender dropped or lost what was there, or (under MQTT 5) sends it later because the broker had refused it.
    """

    spool: str
    first: int
    end: int


class _Log:
    """What came from one spool."""

    __slots__ = ("end", "floor", "seen")

    def __init__(self, floor: int = 0, end: int = 0, seen: tuple[int, ...] = ()) -> None:
        self.floor = floor  # everything below it counts as seen
        self.end = end  # of the furthest message
        self.seen: OrderedDict[int, None] = OrderedDict.fromkeys(seen)


class Filter:
    """Lets each message through once.  Not for several threads at a time.

    Args:
        remember: Messages of each spool that are known one by one; older ones count as seen.  At least as many as the
            sender may have in flight (`max_inflight`), so that no message that is late is taken for a duplicate; where
            it sends live data beside a backlog (`order`), as many as go out until the backlog has gone.
        spools: Spools that are known; the one that was silent longest is forgotten first.
        on_gap: Called with each `Gap` when the message behind it comes, before `accept` returns.
        state: What `state()` of an earlier filter returned, to go on after a restart.

    Memory: about 100 bytes a remembered message.
    """

    def __init__(
        self,
        *,
        remember: int = 65_536,
        spools: int = 1_000,
        on_gap: Callable[[Gap], object] | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        for name, value in (("remember", remember), ("spools", spools)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {value!r} is not allowed; expected an int of at least 1")
        self._remember = remember
        self._spools = spools
        self._on_gap = on_gap
        self._logs: OrderedDict[str, _Log] = OrderedDict()
        #: Messages that were let through, and those that were not.
        self.accepted = 0
        self.duplicates = 0
        for spool, (floor, end, seen) in (state or {}).items():
            self._logs[spool] = _Log(floor, end, tuple(seen))

    def accept(self, message_id: MessageId | str) -> bool:
        """Whether the message is new.  Raises ValueError for a text that is no id."""
        if isinstance(message_id, str):
            message_id = MessageId.parse(message_id)
        spool, position, end, after = message_id
        log = self._logs.get(spool)
        is_first = log is None
        if log is None:
            log = self._logs[spool] = _Log()
            if len(self._logs) > self._spools:
                self._logs.popitem(last=False)
        self._logs.move_to_end(spool)
        if position < log.floor or position in log.seen:
            self.duplicates += 1
            return False
        log.seen[position] = None
        if len(log.seen) > self._remember:
            lowest = min(log.seen) if position < log.end else next(iter(log.seen))
            del log.seen[lowest]
            log.floor = max(log.floor, lowest + 1)
        known_to, log.end = log.end, max(log.end, end)
        self.accepted += 1
        has_gap = position >= known_to and (after > known_to or position - after >= _JUMP)
        if has_gap and not is_first and self._on_gap is not None:
            self._on_gap(Gap(spool, known_to, position))
        return True

    def state(self) -> dict[str, Any]:
        """Everything that is remembered, as values that JSON can carry."""
        return {spool: [log.floor, log.end, list(log.seen)] for spool, log in self._logs.items()}
