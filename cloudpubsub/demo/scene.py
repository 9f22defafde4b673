"""What is going on, as the story tells it and the screen shows it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PHASES", "Event", "Phase", "Scene"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the story.  `share` of the time is spent in it; None: it lasts until the backlog is delivered."""

    name: str
    title: str
    share: float | None


PHASES: tuple[Phase, ...] = (
    Phase("steady", "steady", 0.17),
    Phase("cut", "link cut", 0.24),
    Phase("kill", "kill -9", 0.03),
    Phase("restart", "restart", 0.12),
    Phase("drain", "drain", None),
    Phase("steady again", "steady", 0.10),
    Phase("second cut", "cut", 0.10),
    Phase("second drain", "drain", None),
    Phase("end", "end", None),
)
_HISTORY = 600
_RATE_S = 1.0  # rates are averages over this time


@dataclass(frozen=True, slots=True)
class Event:
    """Something worth a line, `at_s` seconds after the start."""

    at_s: float
    text: str


@dataclass(slots=True)
class Scene:
    """One state for all: the story writes it and the screen reads it, on the same thread."""

    planned_s: float
    rate: float
    elapsed_s: float = 0.0
    phase: int = 0
    is_linked: bool = True
    #: "starting", "running", "killed", "closing" or "ended".
    gateway: str = "starting"
    gateway_pid: int = 0
    gateway_run: int = 0
    sent: int = 0
    received: int = 0
    front: int = 0
    out_of_order: int = 0
    duplicates: int = 0
    delay_s: float = 0.0
    ring_bytes: int = 0
    spool_bytes_planned: int = 1
    #: The gateway's last report.
    report: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    #: Messages sent and not yet received, about ten times a second.
    history: deque[int] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)

    @property
    def backlog(self) -> int:
        """Messages that were sent and have not arrived, as sender and receiver count them."""
        return max(0, self.sent - self.received)

    def sample(self) -> None:
        """Note the counters as they are now, for rates and history."""
        self.history.append(self.backlog)
        self._samples.append((self.elapsed_s, self.sent, self.received))
        while self._samples[0][0] < self.elapsed_s - _RATE_S and len(self._samples) > 2:
            self._samples.popleft()

    def rates(self) -> tuple[float, float]:
        """Messages sent and received a second, over the last second."""
        if len(self._samples) < 2:
            return 0.0, 0.0
        (since_s, sent, received), (now_s, sent_now, received_now) = self._samples[0], self._samples[-1]
        span_s = max(0.001, now_s - since_s)
        return (sent_now - sent) / span_s, (received_now - received) / span_s
