"""Messages that were given up, kept in a bounded file where a person can look at them.

One JSON object a line: `{"direction", "topic", "payload" (base64), "payload_bytes", "reason", "time"}` (seconds since
1970).  Direction "received": its handlers failed.  "published": the broker would not take it; then also `"position"`,
and where there are any `"retain", "userdata" (base64), "user_properties"`.

When the file has reached its size it becomes `….1`, replacing the one before; so at most twice the size is kept.  Of a
message that is too large for a file, only the beginning of the payload is kept (`payload_bytes` tells).  Without a
directory, or where the disk refuses, the latest are kept in memory, up to the same size.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
import time
from collections import deque

from cloudpubsub._message import Message
from cloudpubsub._report import RateLimitedLog

__all__ = ["DeadLetters", "append_letter", "dead_letters_bytes"]

_FILE_BYTES = 1 << 20
_ENVELOPE_BYTES = 16 << 10
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_REASON_MAX = 1_000


def dead_letters_bytes(max_spool_bytes: int, max_payload_bytes: int) -> int:
    """How large a file may become: a sixteenth of the quota, at most 1 MiB, but with room for the largest payload."""
    return max(min(_FILE_BYTES, max_spool_bytes // 16), max_payload_bytes * 4 // 3 + _ENVELOPE_BYTES)


def append_letter(path: str | os.PathLike[str], line: bytes, *, is_synced: bool) -> None:
    """Write one line at the end of a file, or nothing of it.  OSError."""
    fd = os.open(path, _FLAGS, 0o600)
    try:
        size = os.fstat(fd).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(fd, line[written:])
            if is_synced:
                os.fdatasync(fd)
        except OSError:
            # Half a line would spoil the next one.
            os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)


class DeadLetters:
    """Bounded store of dead letters.  Any thread; `add` writes to the disk when there is a directory."""

    def __init__(
        self, directory: str | os.PathLike[str] | None, file_bytes: int = _FILE_BYTES, *, is_synced: bool = False
    ) -> None:
        self._is_synced = is_synced
        # An absolute path: the program may change its directory.
        self._path = None if directory is None else os.path.join(os.path.abspath(directory), "dead-letters.jsonl")
        self._file_bytes = file_bytes
        self._lock = threading.Lock()  # guards everything below and the file
        self._log = RateLimitedLog(logging.getLogger("cloudpubsub"))
        self._lines_bytes = 0
        #: Messages added, whatever became of them.
        self.count = 0
        #: Lines that are in no file.
        self.lines: deque[bytes] = deque()

    def add(self, message: Message, reason: str) -> None:
        """Keep `message`.  A disk that refuses is logged: the message is then in memory alone."""
        line = self._line(message, reason[:_REASON_MAX])
        with self._lock:
            self.count += 1
            if self._path is not None:
                try:
                    self._append(self._path, line)
                    return
                except OSError as exc:
                    self._log.log(logging.ERROR, "dead letter", "a dead letter cannot be written: %s", exc)
            self.lines.append(line)
            self._lines_bytes += len(line)
            while self._lines_bytes > self._file_bytes:
                self._lines_bytes -= len(self.lines.popleft())

    def _line(self, message: Message, reason: str) -> bytes:
        # base64 makes 4 of 3, and in JSON a byte of the topic can become 6.
        room = max(0, (self._file_bytes - 1_024 - 6 * len(message.topic) - 6 * len(reason)) // 4 * 3)
        letter: dict[str, object] = {
            "direction": "received" if message.position is None else "published",
            "topic": message.topic,
            "payload": base64.b64encode(message.payload[:room]).decode(),
            "payload_bytes": len(message.payload),
            "reason": reason,
            "time": round(time.time(), 3),
        }
        if message.position is not None:
            letter["position"] = message.position
        if message.retain:
            letter["retain"] = True
        if message.userdata:
            letter["userdata"] = base64.b64encode(message.userdata).decode()
        if message.user_properties:
            letter["user_properties"] = message.user_properties
        return json.dumps(letter).encode() + b"\n"

    def _append(self, path: str, line: bytes) -> None:
        try:
            size = os.stat(path, follow_symlinks=False).st_size
        except FileNotFoundError:
            size = 0
        if size > 0 and size + len(line) > self._file_bytes:
            os.replace(path, f"{path}.1")
            size = 0
        append_letter(path, line, is_synced=self._is_synced)
