"""What a broker's refusal of a message (a PUBACK of MQTT 5 with a reason of 0x80 or above) means for it.

A table, and the few counts that it needs; no I/O, no clock, no threads.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

__all__ = ["Refusals", "Verdict", "reason_name"]

_TRIES = 5  # of a message that is refused for a reason that says nothing


class Verdict(Enum):
    AGAIN = "again"  # later, and nothing else before it
    DEAD = "dead"  # it goes to the dead letters


# MQTT 5, 3.4.2.1.  Those with tries are given up after so many.
_UNSPECIFIED, _IMPLEMENTATION, _PACKET_ID_IN_USE, _QUOTA = 0x80, 0x83, 0x91, 0x97
_TRIED_AGAIN = {_QUOTA: None, _PACKET_ID_IN_USE: None, _UNSPECIFIED: _TRIES, _IMPLEMENTATION: _TRIES}


def reason_name(code: int, packet: int = PacketTypes.PUBACK) -> str:
    """The standard's name of a reason code, with the number."""
    try:
        return f"{ReasonCode(packet, identifier=code).getName().lower()} ({code:#04x})"
    except (AssertionError, KeyError):
        return f"reason code {code:#04x}"


class Refusals:
    """Which refused messages are tried again, and how often they were."""

    def __init__(self) -> None:
        self._tries: dict[int, int] = {}  # by position; of messages that are held now, so bounded by the window

    def judge(self, position: int, code: int) -> Verdict:
        """What becomes of the message at `position`.  Anything that is not known to pass goes to the dead letters."""
        tries = self._tries.get(position, 0) + 1
        limit = _TRIED_AGAIN.get(code, 0)
        if limit is not None and tries > limit:
            self._tries.pop(position, None)
            return Verdict.DEAD
        self._tries[position] = tries
        return Verdict.AGAIN

    def __len__(self) -> int:
        return len(self._tries)

    @property
    def newest(self) -> int | None:
        """Highest position of them; None: there is none."""
        return max(self._tries, default=None)

    def moved(self, front: Callable[[int], int]) -> None:
        """`front` tells of a position up to where everything of its stream is settled."""
        for position in [one for one in self._tries if one < front(one)]:
            del self._tries[position]
