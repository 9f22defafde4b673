"""A limit for several steps together: a point on the monotonic clock."""

from __future__ import annotations

import time

__all__ = ["left_s"]


def left_s(deadline_s: float) -> float:
    """Seconds until then, for a socket's `settimeout`; TimeoutError if there are none."""
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
