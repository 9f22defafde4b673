"""What `repair` writes: sealed segments, a meta file, and the quarantine.  Nothing else in this package writes.

Every file is written under another name, synced, renamed and its directory synced, so that a crash at any moment leaves
a spool that the next repair deals with.  Nothing is ever deleted but our own unfinished files.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

from cloudpubsub._errors import SpoolLockedError
from cloudpubsub.inspect.layout import ALIGN, META_SLOT_BYTES, PAD, Footer, Header, Meta, SegmentName, pad_crc
from cloudpubsub.inspect.segment import Record, SegmentFile
from cloudpubsub.inspect.spool import SpoolDirectory

__all__ = ["PART", "Quarantine", "locked", "write_meta", "write_segment"]

PART = ".part"  # at the end of the name of a file that is being written
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_BUFFER_BYTES = 1 << 20


@contextmanager
def locked(spool: SpoolDirectory, *, make: bool) -> Iterator[None]:
    """Own the spool.  With `make` its lock file is made where it is missing; without, nothing is.

    Raises SpoolLockedError, OSError.
    """
    path = spool.file("lock")
    flags = os.O_RDWR | os.O_CREAT if make else os.O_RDONLY
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except FileNotFoundError:
        yield
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise SpoolLockedError(exc.errno, "a process owns the spool; repair works on a copy", spool.path) from None
        yield
    finally:
        os.close(fd)


def sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Quarantine:
    """DIR/quarantine/repair: what cannot be used goes there, under its own name, or as the range of positions it is.

    A folder of its own, because what lies directly in the quarantine counts against the spool's quota, and messages
    that were saved must not be dropped for the sake of files that are kept for people to look at.
    """

    def __init__(self, spool: SpoolDirectory, *, is_dry: bool) -> None:
        self._spool = spool
        self._is_dry = is_dry
        #: Names in there, relative to the spool, and their bytes.
        self.taken: list[str] = []
        self.bytes = 0

    def _place(self, name: str) -> str:
        """A path for `name` that nothing has yet."""
        parent, directory = self._spool.file("quarantine"), self._spool.file("quarantine", "repair")
        for folder in (parent, directory):
            if not self._is_dry and not os.path.isdir(folder):
                os.mkdir(folder, 0o700)
                sync_directory(os.path.dirname(folder))
        number, path = 0, os.path.join(directory, name)
        while os.path.lexists(path):
            number += 1
            path = os.path.join(directory, f"{name}.{number}")
        return path

    def _note(self, path: str, size: int) -> None:
        self.taken.append(os.path.relpath(path, self._spool.path))
        self.bytes += size

    def move(self, path: str, size: int) -> None:
        """Take a file of the log."""
        place = self._place(os.path.basename(path))
        if not self._is_dry:
            os.rename(path, place)
            sync_directory(os.path.dirname(place))
            sync_directory(os.path.dirname(path))
        self._note(place, size)

    def keep_range(self, file: SegmentFile, first: int, end: int) -> None:
        """A copy of the bytes at positions `[first, end)` of a segment."""
        place = self._place(f"{first:016x}-{end:016x}.bytes")
        if not self._is_dry:
            with _NewFile(place) as copy:
                at = first
                while at < end and (data := file.read(file.offset_of(at), min(_BUFFER_BYTES, end - at))):
                    copy.write(data)
                    at += len(data)
        self._note(place, end - first)

    def keep(self, name: str, data: bytes) -> None:
        """A copy of a small file."""
        place = self._place(name)
        if not self._is_dry:
            with _NewFile(place) as copy:
                copy.write(data)
        self._note(place, len(data))


class _NewFile:
    """A file at `path` that is whole and durable after the block, or not there.  Without a path nothing is written."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._buffer = bytearray()
        self._fd = -1
        if path is not None:
            if os.path.lexists(path + PART):
                os.unlink(path + PART)  # of a repair that was killed
            self._fd = os.open(path + PART, _CREATE, 0o600)

    def write(self, data: bytes | memoryview) -> None:
        if self._path is not None:
            self._buffer += data
            if len(self._buffer) >= _BUFFER_BYTES:
                self._flush()

    def _flush(self) -> None:
        view = memoryview(self._buffer)
        done = 0
        while done < len(view):
            done += os.write(self._fd, view[done:])
        view.release()
        self._buffer.clear()

    def __enter__(self) -> _NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._path is None:
            return
        part = self._path + PART
        try:
            try:
                if kind is None:
                    self._flush()
                    os.fsync(self._fd)
            finally:
                os.close(self._fd)
            if kind is None:
                os.rename(part, self._path)
                part = ""
                sync_directory(os.path.dirname(self._path))
        finally:
            if part:
                os.unlink(part)


def write_segment(
    spool: SpoolDirectory, name: SegmentName, header: Header, records: Iterable[Record], *, is_dry: bool
) -> None:
    """Make the sealed segment `name` of records that follow one another without a hole, from its base on."""
    end, messages, message_bytes = name.base, 0, 0
    with _NewFile(None if is_dry else spool.file("log", str(name))) as file:
        file.write(header.encode())
        for record in records:
            assert record.position == end
            end += record.span
            if record.is_pad:
                word = PAD | record.span
                # The epoch of the file is in it, and may be another one now.
                crc = pad_crc(word, record.position, name.epoch)
                file.write(struct.pack("<II", crc, word) + bytes(record.span - ALIGN))
            else:
                messages += 1
                message_bytes += record.span
                file.write(record.raw)
                file.write(bytes(record.span - len(record.raw)))
        file.write(Footer(name.base, end, messages, message_bytes, name.epoch).encode())


def write_meta(spool: SpoolDirectory, meta: Meta, slot: int) -> None:
    """Make `meta` all that the meta file holds."""
    data = [bytes(META_SLOT_BYTES), bytes(META_SLOT_BYTES)]
    data[slot] = meta.encode()
    with _NewFile(spool.file("meta")) as file:
        file.write(b"".join(data))
