"""For consumers: removes the duplicates that at-least-once delivery brings, and tells of gaps.

Every published message has an id that stays the same however often it is sent, also after restarts: the incarnation of
the spool and the message's place in its log.  With protocol "5" and `message_ids=True` it travels as the user property
"cloudpubsub-id"; under 3.1.1 a `payload_hook` can put it into the payload.

    >>> seen = Filter(on_gap=lambda gap: print("missing:", gap))
    >>> def on_message(message):
    ...     message_id = dict(message.user_properties)["cloudpubsub-id"]
    ...     if not seen.has(message_id):
    ...         store(message)  # where it raises, the message comes again
    ...         seen.accept(message_id)

Nothing here needs the rest of the package, so a consumer may copy the file.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["Filter", "Gap", "MessageId"]

_SPAN_MAX = 1 << 29  # positions that a message or a padding may take; more was lost with the sender's memory
_FIELDS = 4
_CLOSED_SHARE = 4


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

    The sender dropped or lost what was there, or sends it later: because the broker had refused it (under MQTT 5), or
    because live data goes beside the backlog (`order`).
    """

    spool: str
    first: int
    end: int


class _Log:
    """What came from one spool: runs of places without a gap, in order, none touching the next."""

    __slots__ = ("ends", "starts")

    def __init__(self, runs: Sequence[Sequence[int]] = ()) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        for start, end in runs:
            self.add(int(start), int(end))

    def has(self, position: int) -> bool:
        at = bisect_right(self.starts, position) - 1
        return at >= 0 and position < self.ends[at]

    def add(self, first: int, end: int) -> None:
        """Places `[first, end)` have come."""
        if self.ends and first == self.ends[-1]:  # as nearly all do
            self.ends[-1] = end
            return
        low, high = bisect_left(self.ends, first), bisect_right(self.starts, end)
        if low < high:  # it touches the runs between
            first, end = min(first, self.starts[low]), max(end, self.ends[high - 1])
        self.starts[low:high] = [first]
        self.ends[low:high] = [end]

    def forget(self, runs_max: int) -> None:
        """Where the runs are too many, the narrowest holes count as seen: the widest is what a backlog leaves."""
        if len(self.starts) <= runs_max:
            return
        holes = sorted(range(1, len(self.starts)), key=lambda at: self.starts[at] - self.ends[at - 1])
        closed = set(holes[: max(1, len(holes) // _CLOSED_SHARE)])  # many at once, for sorting takes long
        self.starts = [start for at, start in enumerate(self.starts) if at not in closed]
        self.ends = [end for at, end in enumerate(self.ends) if at + 1 not in closed]


class Filter:
    """Lets each message through once.  Not for several threads at a time.

    It remembers which places of the sender's log have come, as runs without a gap: one is enough for a sender that
    loses nothing and sends in order.  More are there while something is missing, late, or sent ahead of a backlog.

    Args:
        remember: Runs of each spool; of more, the narrowest holes between them count as seen.  Who subscribes to a part
            of the topics gets a run for nearly every message.
        spools: Spools that are known; the one that was silent longest is forgotten first.
        on_gap: Called with each `Gap` when the message behind it comes, before `accept` returns.
        state: What `state()` of an earlier filter returned, to go on after a restart.

    Memory: about 100 bytes a run.
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
        for spool, runs in (state or {}).items():
            self._logs[spool] = _Log(runs)

    def accept(self, message_id: MessageId | str) -> bool:
        """Whether the message is new; from now on it is not.

        Where what is done with a message can fail, ask `has` first, and accept it when it is done.  What `on_gap`
        raises goes through, and the message stays new.  Raises ValueError for a text that is no id.
        """
        if isinstance(message_id, str):
            message_id = MessageId.parse(message_id)
        spool, position, end, after = message_id
        log = self._logs.get(spool)
        if log is not None and log.has(position):
            self._logs.move_to_end(spool)
            self.duplicates += 1
            return False
        # From where the message before it ended there is nothing but padding.
        first = after if 0 <= position - after < _SPAN_MAX else position
        known_to = log.ends[-1] if log is not None else first
        if first > known_to and self._on_gap is not None:
            self._on_gap(Gap(spool, known_to, position))
        if log is None:
            log = self._logs[spool] = _Log()
            if len(self._logs) > self._spools:
                self._logs.popitem(last=False)
        self._logs.move_to_end(spool)
        log.add(first, end if 0 < end - position < _SPAN_MAX else position + 1)
        log.forget(self._remember)
        self.accepted += 1
        return True

    def has(self, message_id: MessageId | str) -> bool:
        """Whether the message was accepted before; changes nothing.  Raises ValueError for a text that is no id."""
        if isinstance(message_id, str):
            message_id = MessageId.parse(message_id)
        log = self._logs.get(message_id.spool)
        return log is not None and log.has(message_id.position)

    def state(self) -> dict[str, Any]:
        """Everything that is remembered, as values that JSON can carry: runs `[first, end)` of each spool."""
        return {spool: [list(run) for run in zip(log.starts, log.ends, strict=True)]
                for spool, log in self._logs.items()}  # fmt: skip
