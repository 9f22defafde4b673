"""One segment file, read as the rules in docs/format.md say: its records, what is damaged between them, its torn tail.

By `pread` in chunks, never through a mapping: a file that its owner cuts while we read would raise SIGBUS there.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from array import array
from collections.abc import Iterator
from itertools import compress
from operator import eq
from types import TracebackType
from typing import NamedTuple

from cloudpubsub._spool import crc32c
from cloudpubsub.inspect.layout import (
    ALIGN,
    FOOTER_BYTES,
    HEADER_BYTES,
    PAD,
    RECORD,
    RECORD_HEADER_BYTES,
    RECORD_LENGTH_MAX,
    Footer,
    Header,
    SegmentName,
    extras_fit,
    looks_like_footer,
    pad_crc,
    parts_fit,
)

__all__ = ["Damage", "NotAFile", "Record", "SegmentFile", "Walk", "open_to_read", "read_at"]

_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 4096  # of a disk
# Not the file that a symbolic link names, and without waiting for somebody to write to a pipe.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class NotAFile(OSError):
    """Something else stands where a file should be."""


def open_to_read(path: str) -> int:
    """A descriptor of the regular file `path`.  Raises OSError."""
    fd = os.open(path, _FLAGS)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotAFile(0, "not a regular file", path)
    return fd


def read_at(fd: int, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`, fewer where the file ends."""
    data = os.pread(fd, size, offset)
    while data and len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


class Record(NamedTuple):
    """A valid record; `raw` is as long as the record says, without padding (of a pad, its first 8 bytes).

    `raw` is part of a chunk that it keeps in memory.
    """

    position: int
    span: int
    raw: memoryview
    is_pad: bool


class Damage(NamedTuple):
    """Positions `[first, end)` of a segment at which no valid record stands, though there were records."""

    first: int
    end: int
    messages: int  # lost in it, as far as headers can be told; at least 1


class SegmentFile:
    """An open segment.  A context manager.

    Raises OSError when it cannot be opened or read.  `header` and `footer` are None where they are not whole.
    """

    def __init__(self, path: str, name: SegmentName) -> None:
        self.path = path
        self.name = name
        self._fd = open_to_read(path)
        try:
            self.file_bytes = os.fstat(self._fd).st_size
            #: Numbers of the blocks that the disk does not give back.
            self.unreadable: set[int] = set()
            self.header = Header.decode(self.read(0, HEADER_BYTES))
            self.footer: Footer | None = None
            #: The end of the file is what is left of a footer.
            self.was_sealed = False
            if self.file_bytes >= HEADER_BYTES + FOOTER_BYTES:
                data = self.read(self.file_bytes - FOOTER_BYTES, FOOTER_BYTES)
                footer = Footer.decode(data)
                if footer is not None and footer.fits(name, self.file_bytes):
                    self.footer = footer
                else:
                    self.was_sealed = looks_like_footer(data, name)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def limit(self) -> int:
        """No record reaches behind this position."""
        footer_bytes = FOOTER_BYTES if self.is_whole else 0
        return self.name.base + max(0, self.file_bytes - HEADER_BYTES - footer_bytes) // ALIGN * ALIGN

    @property
    def is_whole(self) -> bool:
        """It was sealed, so that it ends where its records do: nothing in it can be torn."""
        return self.footer is not None or self.was_sealed

    def offset_of(self, position: int) -> int:
        return HEADER_BYTES + position - self.name.base

    def read(self, offset: int, size: int) -> bytes:
        """As `read_at`; blocks that the disk does not give back are zeros, which are no records."""
        try:
            return read_at(self._fd, offset, size)
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
        data = b""
        while len(data) < size and (block := self._read_block(offset + len(data), size - len(data))):
            data += block
        return data

    def _read_block(self, offset: int, size: int) -> bytes:
        size = min(size, _BLOCK_BYTES - offset % _BLOCK_BYTES, max(0, self.file_bytes - offset))
        try:
            return os.pread(self._fd, size, offset)
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
            self.unreadable.add(offset // _BLOCK_BYTES)
            return bytes(size)

    def walk(self) -> Walk:
        return Walk(self)

    def first_message(self, position: int) -> Record | None:
        """The first message at `position` or right behind pads that stand there; None: there is none that is valid."""
        walk = Walk(self, _BLOCK_BYTES)
        while (record := walk.at(position)) is not None and record.is_pad:
            position += record.span
        return record

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> SegmentFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Walk:
    """Goes through a segment once: an iterable of records and damage, in order.  The figures are whole at its end."""

    def __init__(self, file: SegmentFile, chunk_bytes: int = _CHUNK_BYTES) -> None:
        self._file = file
        self._chunk_bytes = chunk_bytes  # read at once
        self._base = file.name.base
        self._epoch = file.name.epoch
        self._limit = file.limit
        self._data = memoryview(b"")
        self._start = 0  # position of the first byte of `_data`
        #: Position behind the last valid record; of a sealed file, its end.
        self.end = self._base
        self.messages = 0
        self.message_bytes = 0
        self.damaged_bytes = 0
        self.damaged_messages = 0
        #: Bytes behind the last valid record of an unsealed file that are not zero, up to the last such.
        self.torn_bytes = 0

    def __iter__(self) -> Iterator[Record | Damage]:
        at = self._base
        while at < self._limit:
            record = self._judge(at)
            if record is not None:
                yield record
                at += record.span
                self.end = at
                if not record.is_pad:
                    self.messages += 1
                    self.message_bytes += record.span
                continue
            damage, is_followed = self._resynchronise(at)
            if is_followed:
                # Its owner writes from front to back: when we looked first, that may not have come so far.
                self._fetch(at, RECORD_HEADER_BYTES)
                if self._judge(at) is not None:
                    continue
            if not is_followed and not self._file.is_whole:
                self.torn_bytes = self._set_bytes(at)
                return
            self.damaged_bytes += damage.end - damage.first
            self.damaged_messages += damage.messages
            at = self.end = damage.end
            yield damage

    def at(self, position: int) -> Record | None:
        """The record that starts at `position`, if a valid one does."""
        return self._judge(position) if self._base <= position < self._limit else None

    def _fetch(self, position: int, size: int) -> None:
        """Bring the bytes at `position`, at least `size` of them as far as the file goes, to the start of `_data`."""
        size = min(max(size, self._chunk_bytes), self._limit - position)
        self._data = memoryview(self._file.read(self._file.offset_of(position), size))
        self._start = position
        if len(self._data) < size:  # it was cut since we looked
            self._limit = position + len(self._data) // ALIGN * ALIGN

    def _judge(self, at: int) -> Record | None:
        """Rule 1: the record at `at`, if it is valid."""
        index = at - self._start
        if index < 0 or len(self._data) - index < RECORD_HEADER_BYTES:
            self._fetch(at, RECORD_HEADER_BYTES)
            index = 0
        data, rest = self._data, self._limit - at
        if rest < ALIGN:
            return None
        word = int.from_bytes(data[index + 4 : index + 8], "little")
        if word & PAD:
            span = word ^ PAD
            good = ALIGN <= span <= min(rest, RECORD_LENGTH_MAX) and span % ALIGN == 0
            if not good or int.from_bytes(data[index : index + 4], "little") != pad_crc(word, at, self._epoch):
                return None
            return Record(at, span, data[index : index + 8], True)
        if rest < RECORD_HEADER_BYTES:
            return None
        crc, length, position, epoch = RECORD.unpack_from(data, index)[:4]
        span = (length + ALIGN - 1) & -ALIGN
        if position != at or epoch > self._epoch or span > rest or length > RECORD_LENGTH_MAX:
            return None
        if not parts_fit(data, index):
            return None
        if index + length > len(data):
            if span > _CHUNK_BYTES and not self._large_holds(at, length, crc):
                return None
            self._fetch(at, span)
            data, index = self._data, 0
            if length > len(data):
                return None
        raw = data[index : index + length]
        return Record(at, span, raw, False) if crc32c(raw[4:]) == crc and extras_fit(raw) else None

    def _large_holds(self, at: int, length: int, crc: int) -> bool:
        """Is this the CRC of a record of more than a chunk?  A damaged length shall not cost its size in memory."""
        done, found = 4, 0
        while done < length:
            part = self._file.read(self._file.offset_of(at) + done, min(_CHUNK_BYTES, length - done))
            if not part:
                return False
            found = crc32c(part, found)
            done += len(part)
        return found == crc

    def _resynchronise(self, position: int) -> tuple[Damage, bool]:
        """Rule 2: how far the damage at `position` reaches, and whether a valid record follows it."""
        plausible_next = position  # where a header that may be right says that the next record is
        messages = 0
        start = position
        while start < self._limit:
            self._fetch(start, _CHUNK_BYTES)
            data = self._data
            for here in _claims(data, start):
                header = data[here - start : here - start + RECORD_HEADER_BYTES]
                span = _plausible_span(header, self._limit - here)
                if here >= plausible_next and span:
                    messages += 1
                    plausible_next = here + span
                if here == position or not span or self._judge(here) is None:
                    continue
                if messages > 1 and plausible_next == here + span:
                    messages -= 1  # the good one was counted too
                return Damage(position, here, max(1, messages)), True
            if len(data) < RECORD_HEADER_BYTES or start + len(data) >= self._limit:
                break
            start += len(data) // ALIGN * ALIGN - RECORD_HEADER_BYTES + ALIGN  # what straddles the border is seen whole
        return Damage(position, self._limit, max(1, messages)), False

    def _set_bytes(self, position: int) -> int:
        """How many bytes from `position` on it takes to reach the last one that is not zero."""
        found = 0
        offset = self._file.offset_of(position)
        at = offset
        while part := self._file.read(at, _CHUNK_BYTES):
            held = len(part.rstrip(b"\0"))
            if held:
                found = at + held - offset
            at += len(part)
        return found


def _claims(data: memoryview, start: int) -> Iterator[int]:
    """Positions in `data`, which starts at `start`, where a message says that it stands."""
    words = array("Q")
    words.frombytes(data[: len(data) // ALIGN * ALIGN])
    if sys.byteorder == "big":
        words.byteswap()
    places = range(start, start + ALIGN * (len(words) - RECORD_HEADER_BYTES // ALIGN + 1), ALIGN)
    return compress(places, map(eq, memoryview(words)[1:], places))


def _plausible_span(header: memoryview, rest: int) -> int:
    """The room of the message whose header this may be; 0 if it cannot be one."""
    length = RECORD.unpack(header)[1]
    span: int = (length + ALIGN - 1) & -ALIGN
    if length > RECORD_LENGTH_MAX or span > rest or not parts_fit(header):
        return 0
    return span
