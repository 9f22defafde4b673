"""What the gateway has promised, readable after it was killed.

A file mapped into both processes: what one wrote is there for the other the moment after, and a SIGKILL takes nothing
back.
"""

from __future__ import annotations

import mmap
from pathlib import Path

__all__ = ["Promise"]

_BYTES = 16


class Promise:
    """Two counters of sequence numbers, which start at 0 and have no gaps.

    `begun` is one more than the last number that was used, written before its `publish()`; `kept` follows after that
    returned.  A killed gateway leaves them equal, or one apart: then that number may or may not be in the spool.
    The writer is one process at a time.
    """

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            if file.seek(0, 2) < _BYTES:
                file.truncate(_BYTES)
            self._map = mmap.mmap(file.fileno(), _BYTES)
        # Aligned 64-bit words: each is written at once or not at all.
        self._words = memoryview(self._map).cast("Q")

    @property
    def begun(self) -> int:
        return int(self._words[0])

    @begun.setter
    def begun(self, value: int) -> None:
        self._words[0] = value

    @property
    def kept(self) -> int:
        return int(self._words[1])

    @kept.setter
    def kept(self, value: int) -> None:
        self._words[1] = value

    def close(self) -> None:
        self._words.release()
        self._map.close()
