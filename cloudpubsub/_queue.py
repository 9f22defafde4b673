"""`Spool`: the durable queue alone, without MQTT."""

from __future__ import annotations

import os
import threading
from types import TracebackType

from cloudpubsub._append import append
from cloudpubsub._closing import register, unregister
from cloudpubsub._errors import ForkedError
from cloudpubsub._fields import check_seconds
from cloudpubsub._message import Drop, Message, Recovery
from cloudpubsub._open import open_log, recovery_of
from cloudpubsub._options import Options

__all__ = ["Spool"]


class Spool:
    """A durable first-in first-out queue of messages in a directory, with the newest in a ring of memory.

    Nothing is written to the disk while the reader keeps up; what it is behind goes to segment files, and everything
    pending is there again after a restart, a crash included (see `durability` of `Options`).

    Args:
        path: Directory; made when it is missing.  One object of one process owns it: SpoolLockedError otherwise.
        ring_bytes, segment_bytes, max_spool_bytes, max_spool_messages, min_free_bytes, on_full, durability, ring_dir,
        spill_after, spill_timeout, block_timeout, sync_interval, sync_bytes, max_payload_bytes: As in `Options`, with
        the same defaults.

    Thread safety: `append`, `sync` and `stats` from any thread; `read` and `ack` exclude each other.  Errors:
    SpoolLockedError, SpoolError, OptionError when opening; ClosedError and ForkedError afterwards.

    Example:
        >>> with cloudpubsub.Spool("/var/lib/gateway/spool") as spool:
        ...     position = spool.append("temperature", b"21.5")
        ...     for message in spool.read():
        ...         print(message.topic, message.payload)
        ...         spool.ack(message.position)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        ring_bytes: int = 4 << 20,
        segment_bytes: int | None = None,
        max_spool_bytes: int = 1 << 30,
        max_spool_messages: int | None = None,
        min_free_bytes: int = 16 << 20,
        on_full: str = "drop_oldest",
        durability: str = "process",
        ring_dir: str | os.PathLike[str] | None = None,
        spill_after: float = 10.0,
        spill_timeout: float = 10.0,
        block_timeout: float | None = None,
        sync_interval: float = 1.0,
        sync_bytes: int | None = None,
        max_payload_bytes: int | None = None,
    ) -> None:
        # The same checks and derived sizes as for a client; the broker is never used.
        options = Options._from_settings(
            {
                "broker": "mqtt://localhost",
                "spool": path,
                "ring_bytes": ring_bytes,
                "segment_bytes": segment_bytes,
                "max_spool_bytes": max_spool_bytes,
                "max_spool_messages": max_spool_messages,
                "min_free_bytes": min_free_bytes,
                "on_full": on_full,
                "durability": durability,
                "ring_dir": ring_dir,
                "spill_after": spill_after,
                "spill_timeout": spill_timeout,
                "block_timeout": block_timeout,
                "sync_interval": sync_interval,
                "sync_bytes": sync_bytes,
                "max_payload_bytes": max_payload_bytes,
            }
        )
        self._read_lock = threading.Lock()
        self._pid = os.getpid()
        self._log = open_log(options, identity=None)
        #: What opening found.
        self.recovery: Recovery = recovery_of(self._log)
        register(self)

    def append(
        self,
        topic: str,
        payload: bytes | bytearray | memoryview | str,
        *,
        userdata: bytes | bytearray | memoryview = b"",
        retain: bool = False,
    ) -> int:
        """Append a message and return its position, which is unique in the life of the spool and rises.

        Waits only when the ring is full, as `spill_timeout` and `on_full` say.  Raises TopicError, PayloadTooLarge,
        SpoolFull, ClosedError, ForkedError; nothing is stored then.
        """
        return append(self._log, topic, payload, retain, userdata)

    def read(self, max_bytes: int = 65_536) -> list[Message]:
        """The messages behind those already read, oldest first, about `max_bytes` of them; [] when there is none.

        They stay in the spool until they are acknowledged, and are read again after a restart.  May read the disk.
        """
        self._check_process()
        with self._read_lock:
            return self._log.read(max_bytes)

    def rewind(self) -> None:
        """`read` starts again at the oldest message that is not acknowledged."""
        self._check_process()
        with self._read_lock:
            self._log.rewind()

    def ack(self, position: int) -> None:
        """Everything up to and including the message at `position`, which was read, may be deleted.

        Raises ValueError if no pending message that was read starts there.
        """
        self._check_process()
        if not 0 <= position < 1 << 63:
            raise ValueError(f"position: {position} was never returned by append()")
        with self._read_lock:
            self._log.settle_through(position)

    def sync(self, timeout: float | None = None) -> None:
        """Write everything appended so far to stable storage; it survives a power cut afterwards.

        Raises WaitTimeout after `timeout` seconds, SpoolError if the disk fails.
        """
        check_seconds("timeout", timeout, optional=True)
        published = self._log.published()
        if published > 0:
            self._log.wait_synced(published - 1, timeout)

    def losses(self) -> list[Drop]:
        """What ended without being acknowledged since the last call: dropped by a limit, or damaged on the disk."""
        return [Drop(*loss) for loss in self._log.take_losses()]

    def stats(self) -> dict[str, object]:
        """Figures of the log: counters, cursors, bytes in ring and spool, state of the storage."""
        return dict(self._log.stats())

    def close(self, timeout: float = 10.0) -> int:
        """Write what is only in memory to the disk, within `timeout` seconds.  Idempotent.

        Returns how many messages could not be saved: 0 unless the disk fails, hangs or is at its limit.
        """
        check_seconds("timeout", timeout)
        unregister(self)
        return self._log.close(timeout)

    def _check_process(self) -> None:
        # Before any lock: at the fork another thread of the parent may have held it.
        if self._pid != os.getpid():
            raise ForkedError("opened before a fork: the child process must open a spool of its own")

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
