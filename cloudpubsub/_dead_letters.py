"""Messages that were given up, kept in a bounded file where a person can look at them.

One JSON object a line: `{"topic", "payload" (base64), "reason", "time" (seconds since 1970)}`.  When the file has
reached its size it becomes `….1`, replacing the one before; so at most twice the size is kept.  Without a directory the
latest are kept in memory.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path

from cloudpubsub._message import Message
from cloudpubsub._report import RateLimitedLog

__all__ = ["DeadLetters"]

_FILE_BYTES = 1 << 20
_KEPT_IN_MEMORY = 100


class DeadLetters:
    """Bounded store of dead letters.  Any thread; `add` writes to the disk when there is a directory."""

    def __init__(self, directory: str | os.PathLike[str] | None, file_bytes: int = _FILE_BYTES) -> None:
        self._path = None if directory is None else Path(directory) / "dead-letters.jsonl"
        self._file_bytes = file_bytes
        self._lock = threading.Lock()
        self._log = RateLimitedLog(logging.getLogger("cloudpubsub"))
        self.count = 0
        self.latest: deque[tuple[Message, str]] = deque(maxlen=_KEPT_IN_MEMORY)

    def add(self, message: Message, reason: str) -> None:
        """Keep `message`.  A disk that refuses is logged: the message is then in memory alone."""
        line = json.dumps(
            {
                "topic": message.topic,
                "payload": base64.b64encode(message.payload).decode(),
                "reason": reason,
                "time": round(time.time(), 3),
            }
        )
        with self._lock:
            self.count += 1
            self.latest.append((message, reason))
            if self._path is None:
                return
            try:
                self._append(self._path, line.encode() + b"\n")
            except OSError as exc:
                self._log.log(logging.ERROR, "dead letter", "a dead letter cannot be written: %s", exc)

    def _append(self, path: Path, line: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size > 0 and size + len(line) > self._file_bytes:
                os.replace(path, f"{path}.1")
                os.close(fd)
                fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            os.write(fd, line)
        finally:
            os.close(fd)
