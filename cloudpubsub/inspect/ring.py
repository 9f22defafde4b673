"""The ring of a spool, watched from outside: its page of cursors and counters, and the records in it.

Its bytes are described in cloudpubsub/_shared.h and _home.h.  A ring is believed only if the library would believe it:
on this machine, of this boot, of this spool, and of the very last open.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from cloudpubsub._spool import shared_slot
from cloudpubsub.inspect.layout import (
    AHEAD_MAX,
    ALIGN,
    LEDGER_WORDS,
    PAD,
    RECORD,
    RECORD_HEADER_BYTES,
    Ahead,
    Ledger,
    Produced,
    Settled,
    decode_ledger,
    parts_fit,
    settled_of,
)
from cloudpubsub.inspect.segment import Damage, Record, open_to_read, read_at

__all__ = ["Outlook", "Ring", "RingState", "boot_id", "clocks_ms", "ring_name"]

_MAGIC = b"CPSRING1"
_VERSION = 3
_PAGE = struct.Struct("=8sII16s16sQQQ")
_PAGE_BYTES = 8192  # rounded up to whole pages of the machine
_AT_PRODUCED, _AT_SETTLED, _AT_LEDGER, _AT_OUTLOOK = 128, 256, 832, 6144
_STORAGE = (None, "memory", "ok", "full", "failed")
_LINK = (None, "down", "up")
_PRODUCED_WORDS, _SETTLED_WORDS, _AHEAD_WORDS = 5, 32, 3
_AT_AHEAD_COUNT = 13  # word; the ranges are behind it
_RECORD_SHARE = 4  # a record is at most this part of the ring
_CHUNK_BYTES = 1 << 20


def ring_name(spool_id: bytes) -> str:
    return f"cloudpubsub-{spool_id.hex()}.ring"


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def clocks_ms() -> int:
    """How far the wall clock is ahead of CLOCK_BOOTTIME, in milliseconds: what makes a time of a stamp of this boot."""
    return (time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) // 1_000_000


class RingState(NamedTuple):
    """Cursors and counters of one moment."""

    produced: Produced
    settled: Settled

    @property
    def low(self) -> int:
        """The lowest position that has its home in the ring."""
        return max(self.settled.head, self.settled.spilled)


class Outlook(NamedTuple):
    """What the process that has the spool open says of its surroundings; None: it has not said."""

    storage: str | None  # as in the statistics of a client
    storage_errno: int  # of its last failure; 0: there was none
    link: str | None  # of the publish connection: "up" or "down"


class Ring:
    """An open ring.  Raises OSError, or ValueError with the reason why the file at `path` is not to be believed."""

    def __init__(self, path: str, spool_id: bytes, generation: int) -> None:
        self.path = path
        page_bytes = _whole_pages(_PAGE_BYTES)
        self._at_ring = page_bytes
        self._fd = open_to_read(path)
        try:
            facts = os.fstat(self._fd)
            # A file that was never allocated in full is not ours, and to touch a part that is not there raises SIGBUS.
            if facts.st_size <= page_bytes or facts.st_blocks * 512 < facts.st_size:
                raise ValueError("it is of another version, or not whole")
            self._page = mmap.mmap(self._fd, page_bytes, prot=mmap.PROT_READ)
            self._check(spool_id, generation, facts.st_size - page_bytes)
        except BaseException:
            os.close(self._fd)
            raise

    def _check(self, spool_id: bytes, generation: int, rest_bytes: int) -> None:
        magic, version, self.writer_pid, its_boot_id, its_id, its_bytes, own, announced = _PAGE.unpack_from(self._page)
        self.ring_bytes = its_bytes
        is_whole = its_bytes & (its_bytes - 1) == 0 and _whole_pages(its_bytes) == rest_bytes
        if magic != _MAGIC or version != _VERSION or not is_whole:
            raise ValueError("it is of another version, or not whole")
        if its_boot_id != boot_id():
            raise ValueError("it is of an earlier boot")
        if its_id != spool_id or generation == 0 or generation not in (own, announced):
            raise ValueError("it is not of the last process that opened this spool")

    def _copy(self, at_sequence: int, at_slots: int, words: int) -> tuple[int, ...]:
        """The current one of two slots.  A writer fills the other one and then moves the sequence."""
        return struct.unpack(f"={words}Q", shared_slot(self._page, at_sequence, at_slots, words))

    def state(self) -> RingState:
        # What is settled first: it is never ahead of what was published before.
        words = self._copy(_AT_SETTLED, _AT_SETTLED + ALIGN, _SETTLED_WORDS)
        count = words[_AT_AHEAD_COUNT] if words[_AT_AHEAD_COUNT] <= AHEAD_MAX else 0
        at = [_AT_AHEAD_COUNT + 1 + _AHEAD_WORDS * i for i in range(count)]
        ahead = tuple(one for one in (Ahead(*words[i : i + _AHEAD_WORDS]) for i in at) if one.first < one.end)
        settled = settled_of(words, ahead).tamed(1 << 63)
        return RingState(Produced(*self._copy(_AT_PRODUCED, _AT_PRODUCED + ALIGN, _PRODUCED_WORDS)), settled)

    def outlook(self) -> Outlook:
        word = int.from_bytes(self._page[_AT_OUTLOOK : _AT_OUTLOOK + 4], sys.byteorder)
        storage, link = word & 0xFF, word >> 8 & 0xFF
        return Outlook(
            _STORAGE[storage] if storage < len(_STORAGE) else None,
            word >> 16,
            _LINK[link] if link < len(_LINK) else None,
        )

    def is_at_its_path(self) -> bool:
        """False: it was removed, or another one was made in its place."""
        try:
            facts = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        own = os.fstat(self._fd)
        return (facts.st_dev, facts.st_ino) == (own.st_dev, own.st_ino)

    def ledger(self) -> Ledger:
        return decode_ledger(self._copy(_AT_LEDGER, _AT_LEDGER + ALIGN, LEDGER_WORDS))

    def records(self, first: int, end: int) -> Iterator[Record | Damage]:
        """The records from `first` on, which must not be below `low`, to `end`.

        Ends early when the place of the next one was given to newer records meanwhile: it is on the disk or settled.
        """
        at, size = first, _CHUNK_BYTES
        while at < end:
            room = min(end - at, self.ring_bytes - at % self.ring_bytes)
            data = memoryview(read_at(self._fd, self._at_ring + at % self.ring_bytes, min(size, room)))
            if self.state().low > at:
                return
            start, size = at, _CHUNK_BYTES
            while at - start < len(data):
                record = _record(data[at - start :], at, min(room - (at - start), self.ring_bytes // _RECORD_SHARE))
                if record is None:
                    yield Damage(at, end, 1)
                    return
                if len(data) - (at - start) < record.span:
                    size = max(size, record.span)
                    break
                yield record
                at += record.span

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._page.close()
            os.close(fd)


def _record(data: memoryview, at: int, room: int) -> Record | None:
    """What stands at `at`, with `room` bytes left; it may reach behind `data`.  None: no record looks like that."""
    if len(data) < ALIGN:
        return None
    word = int.from_bytes(data[4:8], "little")
    if word & PAD:
        span = word ^ PAD
        return Record(at, span, data[:ALIGN], True) if ALIGN <= span <= room and span % ALIGN == 0 else None
    span = (word + ALIGN - 1) & -ALIGN
    if not RECORD_HEADER_BYTES <= word <= room or span > room:
        return None
    if len(data) < RECORD_HEADER_BYTES:
        return Record(at, span, data, False)  # read again, in full
    if RECORD.unpack_from(data)[2] != at or not parts_fit(data):
        return None
    return Record(at, span, data[:word], False)


def boot_id() -> bytes:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)
