"""What the tests of publishing have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cloudpubsub

CLIENT_ID = "gateway"
LIMIT = 60.0  # seconds that no wait of a test may take


def client_to(port: int, spool: Path | None, **settings: Any) -> cloudpubsub.Client:
    """A client that connects again quickly.  Not started."""
    defaults: dict[str, Any] = {
        "client_id": CLIENT_ID,
        "spool": spool,
        "reconnect_min": 0.02,
        "reconnect_max": 0.1,
    }
    broker = settings.pop("broker", f"mqtt://127.0.0.1:{port}")
    return cloudpubsub.Client(broker, **{**defaults, **settings})


def publish_numbers(client: cloudpubsub.Client, numbers: Sequence[int], topic: str = "numbers") -> list[int]:
    """Publish each number as its own message; returns the positions."""
    return [client.publish(topic, b"%d" % number) for number in numbers]


def number_of(topic: str, payload: bytes) -> int:
    """For a collector: the number that was published."""
    return int(payload)


def until(holds: Callable[[], object], timeout: float = LIMIT) -> None:
    """Look until it holds; TimeoutError."""
    deadline = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not after {timeout} s")
        time.sleep(0.002)


def greatest_step_back(arrivals: Sequence[int]) -> int:
    """How far an arrival was behind the furthest one before it, at most."""
    furthest, step = -1, 0
    for number in arrivals:
        step = max(step, furthest - number)
        furthest = max(furthest, number)
    return step
