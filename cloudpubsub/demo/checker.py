"""Whether every message arrived, in order: arithmetic alone, fed with sequence numbers as they come."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Checker", "Verdict"]

_RANGES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the messages."""

    #: Messages whose `publish()` returned.
    sent: int
    #: Of these, arrived at least once.
    received: int
    #: Of these, not arrived.
    lost: int
    #: Messages whose first arrival came after that of a later message.
    out_of_order: int
    #: Arrivals of a message that had arrived before.
    duplicates: int
    #: Arrivals that nobody sent: unreadable, or with a number that was never used.
    unexpected: int
    #: Messages whose `publish()` was cut short by the kill, and that arrived; they may or may not.
    unpromised: int
    #: The first of the ranges of numbers that were lost, as `(first, end)`.
    lost_ranges: tuple[tuple[int, int], ...]

    @property
    def is_good(self) -> bool:
        return self.sent > 0 and not (self.lost or self.out_of_order or self.unexpected)


class Checker:
    """Takes the arrivals one by one.

    Sequence numbers are 0, 1, 2, …  One thread feeds it; the counters may be read by any.
    """

    def __init__(self) -> None:
        self._arrived = bytearray()  # one byte for each number
        #: Every number below this one has arrived, or is excused.
        self.front = 0
        self._excused: frozenset[int] = frozenset()
        self.received = 0
        self.out_of_order = 0
        self.duplicates = 0
        self.unreadable = 0

    def take(self, number: object) -> None:
        """A message with this number has arrived."""
        if type(number) is not int or not 0 <= number < 1 << 32:
            self.unreadable += 1
            return
        arrived = self._arrived
        if number < len(arrived):
            if arrived[number]:
                self.duplicates += 1
                return
            # A later one has been here already, or the array would be shorter.
            self.out_of_order += 1
        else:
            arrived.extend(bytes(number + 1 - len(arrived)))
        arrived[number] = 1
        self.received += 1
        while self.front < len(arrived) and (arrived[self.front] or self.front in self._excused):
            self.front += 1

    def excuse(self, number: int) -> None:
        """This number may be missing: nothing was promised about it.  From any thread, before later ones arrive."""
        self._excused |= {number}

    def verdict(self, used: int) -> Verdict:
        """Compare with what was sent: the numbers below `used`."""
        arrived = self._arrived[:used].ljust(used, b"\0")
        loose = {number for number in self._excused if number < used}
        loose_arrived = sum(arrived[number] for number in loose)
        for number in loose:
            arrived[number] = 1
        lost = arrived.count(0)
        sent = used - len(loose)
        return Verdict(
            sent=sent,
            received=sent - lost,
            lost=lost,
            out_of_order=self.out_of_order,
            duplicates=self.duplicates,
            unexpected=self.unreadable + sum(self._arrived[used:]),
            unpromised=loose_arrived,
            lost_ranges=_gaps(arrived),
        )


def _gaps(arrived: bytearray) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    first = arrived.find(0)
    while first >= 0 and len(ranges) < _RANGES_SHOWN:
        end = arrived.find(1, first)
        end = len(arrived) if end < 0 else end
        ranges.append((first, end))
        first = arrived.find(0, end)
    return tuple(ranges)
