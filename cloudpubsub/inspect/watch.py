"""A spool that is in use, looked at again and again: what `cloudpubsub top` shows.

Everything comes from the page of cursors beside the ring, which costs its owner nothing, and from the names and sizes
of the files.  No lock of the owner's is taken, but for the instant described in `Watch`.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

from cloudpubsub.inspect.layout import Meta, SegmentName, message_of
from cloudpubsub.inspect.owner import is_listed, is_owned, owner_pid
from cloudpubsub.inspect.report import counters_of, losses_of, ring_facts
from cloudpubsub.inspect.ring import Ring, RingState, boot_id
from cloudpubsub.inspect.segment import Record, SegmentFile
from cloudpubsub.inspect.spool import SpoolDirectory

__all__ = ["Watch"]

_COUNTERS = ("published", "acked", "dropped", "dead_lettered")
_RATES = (*_COUNTERS, *(f"{name}_bytes" for name in _COUNTERS))
_OVERLAPS = 4  # files that may hold one position: what a crash or a failed disk made write twice


class Watch:
    """Looks at the spool in `path` whenever `look` is called, and works out rates from one look to the next.

    Whether somebody has the spool open is read in the kernel's list of locks.  Only where that list has never named an
    owner is the lock tried, as `is_owned` does, and once at most for each time that the spool was opened: an owner that
    opened it in that very instant would find it taken.

    A context manager.  Not thread-safe.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        ring_directory: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._clock = clock
        self._ring_directory = ring_directory
        self._ring: Ring | None = None
        self._generation = 0  # that the ring, and what is known of the owner, belong to
        self._is_list_good = False
        self._is_free = False
        self._before: tuple[float, dict[str, Any]] | None = None  # when, and the counters then
        self._oldest: tuple[int, int, int | None] | None = None  # head, stamp of the message there, its clock

    def look(self) -> dict[str, Any]:
        """How things are now, as plain values.  Raises SpoolError where there is no spool, OSError."""
        spool = SpoolDirectory(self._path, self._ring_directory)
        meta = spool.meta().best
        is_owned = self._is_owned(spool, meta)
        ring, missing = self._current_ring(spool, meta)
        now_s = self._clock()
        state = RingState(meta.produced, meta.settled) if meta is not None else None
        ledger = None if meta is None else meta.ledger
        if ring is not None:
            state, ledger = ring.state(), ring.ledger()
        outlook = ring.outlook() if ring is not None and is_owned else None
        counters = None if state is None else counters_of(*state)
        segments = _segments(spool)
        age_s = None
        if meta is not None and state is not None:
            age_s = self._oldest_age_s(spool, ring, state, segments, meta.spool_id)
        document = {
            "time_ms": time.time_ns() // 1_000_000,
            "directory": spool.path,
            "spool_id": None if meta is None else meta.spool_id.hex(),
            "identity": None if meta is None else meta.identity.decode("utf-8", "replace"),
            "epoch": None if meta is None else meta.epoch,
            "in_use": is_owned,
            "owner_pid": owner_pid(spool.path),
            "closed_clean": None if meta is None else meta.clean,
            "from": "ring" if ring is not None else "meta" if meta is not None else None,
            "ring_missing": missing,
            "counters": counters,
            "rates": self._rates(now_s, counters),
            "ring": None if ring is None or state is None else ring_facts(ring, *state),
            "segments": len(segments),
            "segment_bytes": sum(segment.file_bytes for segment in segments),
            "oldest_age_seconds": age_s,
            "drain_seconds": None,
            "storage": None if outlook is None else outlook.storage,
            "storage_errno": None if outlook is None else outlook.storage_errno,
            "link": None if outlook is None else outlook.link,
            "lost_by_reason": [] if ledger is None else losses_of(ledger)["by_reason"],
        }
        rates = document["rates"]
        if rates is not None and counters is not None and rates["acked"] > rates["published"]:
            document["drain_seconds"] = counters["backlog_messages"] / (rates["acked"] - rates["published"])
        return document

    def _is_owned(self, spool: SpoolDirectory, meta: Meta | None) -> bool | None:
        if is_listed(spool.path):
            self._is_list_good, self._is_free = True, False
            return True
        generation = 0 if meta is None else meta.generation
        if self._is_list_good or (self._is_free and generation == self._generation):
            return False
        found = is_owned(spool.path)
        self._is_free = found is False
        return found

    def _current_ring(self, spool: SpoolDirectory, meta: Meta | None) -> tuple[Ring | None, str]:
        generation = 0 if meta is None else meta.generation
        if self._ring is not None and generation == self._generation and self._ring.is_at_its_path():
            return self._ring, ""
        self.close()
        self._generation = generation
        self._ring, missing = spool.ring(meta)
        return self._ring, missing

    def _rates(self, now_s: float, counters: dict[str, Any] | None) -> dict[str, float] | None:
        """For each second since the last look.  None: there was none, or the counters began anew."""
        before, self._before = self._before, None if counters is None else (now_s, counters)
        if before is None or counters is None or now_s <= before[0]:
            return None
        moved = {name: counters[name] - before[1][name] for name in _RATES}
        if any(change < 0 for change in moved.values()):
            return None
        return {name: change / (now_s - before[0]) for name, change in moved.items()}

    def _oldest_age_s(
        self, spool: SpoolDirectory, ring: Ring | None, state: RingState, segments: list[_Segment], spool_id: bytes
    ) -> float | None:
        """Seconds since the oldest pending message was published; None: there is none, or it cannot be told."""
        head, published = state.settled.head, state.produced.published
        if head >= published:
            return None
        if self._oldest is None or self._oldest[0] != head:
            found: tuple[int, int | None] | None
            if ring is not None and head >= state.low:
                found = _first_in_ring(ring, head, published)
            else:
                found = _first_on_disk(spool, head, segments, spool_id)
            if found is None or found[0] == 0:
                return None
            self._oldest = (head, *found)
        _, stamp_ms, clock_ms = self._oldest
        if clock_ms is None:
            return max(0, time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000 - stamp_ms) / 1000
        return max(0, time.time_ns() // 1_000_000 - clock_ms - stamp_ms) / 1000

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Segment(NamedTuple):
    name: SegmentName
    file_name: str
    file_bytes: int


def _segments(spool: SpoolDirectory) -> list[_Segment]:
    """The files of the log; none of them is opened."""
    found = []
    try:
        entries = list(os.scandir(spool.file("log")))
    except (FileNotFoundError, NotADirectoryError):
        return []
    for entry in entries:
        name = SegmentName.parse(entry.name)
        if name is None:
            continue
        try:
            found.append(_Segment(name, entry.name, entry.stat(follow_symlinks=False).st_size))
        except FileNotFoundError:
            continue  # drained meanwhile
    return sorted(found)


def _first_in_ring(ring: Ring, head: int, published: int) -> tuple[int, None] | None:
    for item in ring.records(head, published):
        if isinstance(item, Record) and not item.is_pad:
            return message_of(item.raw).stamp_ms, None
    return None


def _first_on_disk(
    spool: SpoolDirectory, head: int, segments: list[_Segment], spool_id: bytes
) -> tuple[int, int | None] | None:
    """Stamp of the first pending message, and how far the wall clock was ahead of that clock, if that was another boot.

    The head stands in the last segment that begins at or before it, or in a hole in front of the next one.  What stays
    unsettled there is damaged: the age is not known then.
    """
    at = bisect_right(segments, head, key=lambda segment: segment.name.base)
    for segment in [*reversed(segments[max(0, at - _OVERLAPS) : at]), *segments[at : at + 1]]:
        try:
            with SegmentFile(spool.file("log", segment.file_name), segment.name) as file:
                header, record = file.header, file.first_message(max(head, segment.name.base))
        except OSError:
            continue  # drained meanwhile, or it cannot be read
        if record is None or header is None or header.spool_id != spool_id:
            continue
        is_this_boot = any(header.boot_id) and header.boot_id == boot_id()
        return message_of(record.raw).stamp_ms, None if is_this_boot else header.wall_ms - header.boottime_ms
    return None
