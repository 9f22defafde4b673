"""A spool's directory: its meta file, the files of its log and what each of them is, its ring."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace

from cloudpubsub._errors import SpoolError
from cloudpubsub.inspect.layout import HEADER_BYTES, META_SLOT_BYTES, Footer, Header, Meta, SegmentName
from cloudpubsub.inspect.owner import owner_pid, ring_of
from cloudpubsub.inspect.ring import Ring, ring_name
from cloudpubsub.inspect.segment import SegmentFile, open_to_read, read_at

__all__ = ["SEGMENT_VERSION", "LogFile", "MetaFile", "SpoolDirectory"]

SEGMENT_VERSION = 1
_META_TRIES = 20


@dataclass(frozen=True, slots=True)
class MetaFile:
    """What the meta file holds: `slots` says of each of its two "valid", "damaged" or "unused"."""

    is_there: bool
    slots: tuple[str, str]
    best: Meta | None  # the valid slot that counts
    at: int = 0  # which one that is


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFile:
    """One file of the log's directory.

    `kind`: "segment"; "empty", no record was ever written to it; "foreign", of another spool, or not a segment at all;
    "unreadable".  `why` says more about the last two.
    """

    name: str
    path: str
    kind: str
    why: str = ""
    parsed: SegmentName | None = None
    file_bytes: int = 0
    header: Header | None = None
    footer: Footer | None = None
    was_sealed: bool = False  # without a footer, but with what is left of one

    @property
    def segment(self) -> SegmentName:
        assert self.parsed is not None
        return self.parsed

    @property
    def clock_ms(self) -> int | None:
        """How far the wall clock was ahead of CLOCK_BOOTTIME when it was made; None where that is not known."""
        if self.header is None or not any(self.header.boot_id):
            return None
        return self.header.wall_ms - self.header.boottime_ms

    @property
    def reach(self) -> int:
        """No record in it stands at or behind this position."""
        if self.footer is not None:
            return self.footer.end
        return self.segment.base + max(0, self.file_bytes - HEADER_BYTES)

    def open(self) -> SegmentFile:
        """Raises OSError."""
        return SegmentFile(self.path, self.segment)


class SpoolDirectory:
    """A directory that holds a spool.  Raises SpoolError if it does not.  Keeps nothing open."""

    def __init__(self, path: str | os.PathLike[str], ring_directory: str | None = None) -> None:
        self.path = os.path.abspath(path)
        self._ring_directory = ring_directory
        if not os.path.isdir(self.path):
            what = "not a directory" if os.path.lexists(self.path) else "no such directory"
            raise SpoolError(f"{path}: {what}")
        try:
            names = set(os.listdir(self.path))
        except OSError as exc:
            raise SpoolError(f"{path}: {exc.strerror}") from exc
        # The lock file comes first: whoever dies right after making it leaves an empty spool.
        if not names & {"meta", "log"} and names != {"lock"}:
            raise SpoolError(f"{path}: not a spool: there is neither a meta file nor a log in it")

    def __str__(self) -> str:
        return self.path

    def file(self, *names: str) -> str:
        return os.path.join(self.path, *names)

    def meta(self) -> MetaFile:
        """Read the meta file.  Its owner may be writing to it, so damage is looked at more than once."""
        for _ in range(_META_TRIES):
            try:
                fd = open_to_read(self.file("meta"))
            except FileNotFoundError:
                return MetaFile(False, ("unused", "unused"), None)
            try:
                data = [read_at(fd, slot * META_SLOT_BYTES, META_SLOT_BYTES) for slot in range(2)]
            finally:
                os.close(fd)
            try:
                found = [Meta.decode(slot) for slot in data]
            except ValueError as exc:
                raise SpoolError(f"{self.path}: the meta file was written by another version: {exc}") from None
            if all(meta is not None or not any(slot) for meta, slot in zip(found, data, strict=True)):
                break
        state = ["valid" if found[i] else "damaged" if any(data[i]) else "unused" for i in (0, 1)]
        at = max((0, 1), key=lambda i: (-1 if (meta := found[i]) is None else meta.sequence, i))
        return MetaFile(True, (state[0], state[1]), found[at], at)

    def files(self, spool_id: bytes | None = None) -> list[LogFile]:
        """All files of the log, by position.  Those that are not of the spool `spool_id`, if it is known, are foreign;
        if it is not, it is that of most of them."""
        try:
            names = sorted(os.listdir(self.file("log")))
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise SpoolError(f"{self.file('log')}: {exc.strerror}") from exc
        found = [file for name in names if (file := self._look(name)) is not None]
        own = spool_id or self.spool_id(found)
        return [_claimed(file, own) for file in found]

    def again(self, file: LogFile, spool_id: bytes | None) -> LogFile | None:
        """Look at a file anew; None: it has gone."""
        now = self._look(file.name)
        return None if now is None else _claimed(now, spool_id)

    def spool_id(self, files: list[LogFile]) -> bytes | None:
        """The spool that most of these files say they belong to."""
        ids = Counter(file.header.spool_id for file in files if file.header is not None)
        return ids.most_common(1)[0][0] if ids else None

    def _look(self, name: str) -> LogFile | None:
        """What is the file `name`?  None: it has gone."""
        path = self.file("log", name)
        parsed = SegmentName.parse(name)
        if not name.endswith(".seg"):
            return LogFile(name=name, path=path, kind="foreign", why="not a segment", file_bytes=_size(path))
        if parsed is None:
            why = "its name is not that of a segment"
            return LogFile(name=name, path=path, kind="unreadable", why=why, file_bytes=_size(path))
        try:
            with SegmentFile(path, parsed) as file:
                pass
        except FileNotFoundError:
            return None
        except OSError as exc:
            why = exc.strerror or "cannot be read"
            return LogFile(name=name, path=path, kind="unreadable", why=why, parsed=parsed, file_bytes=_size(path))
        kind, why = "segment", ""
        if file.file_bytes <= HEADER_BYTES:
            kind = "empty"
        elif file.header is not None and file.header.version != SEGMENT_VERSION:
            kind, why = "unreadable", f"format version {file.header.version} is not known"
        return LogFile(
            name=name,
            path=path,
            kind=kind,
            why=why,
            parsed=parsed,
            file_bytes=file.file_bytes,
            header=file.header,
            footer=file.footer,
            was_sealed=file.was_sealed,
        )

    def ring(self, meta: Meta | None) -> tuple[Ring | None, str]:
        """The current ring of the spool, or None and why there is none."""
        if meta is None:
            return None, "without a meta file nobody can tell which ring is the spool's"
        name = ring_name(meta.spool_id)
        if self._ring_directory is not None:
            paths = [os.path.join(self._ring_directory, name)]
        else:
            own = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
            paths = [os.path.join(directory, name) for directory in (own, "/dev/shm") if directory]
            pid = owner_pid(self.path)
            mapped = None if pid is None else ring_of(pid, name)
            paths = [mapped, *paths] if mapped is not None else paths
        why = f"none is in {' or '.join(os.path.dirname(path) for path in paths)}"
        for path in paths:
            try:
                return Ring(path, meta.spool_id, meta.generation), ""
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as exc:
                why = f"{path}: {exc.strerror if isinstance(exc, OSError) else exc}"
        return None, why


def _claimed(file: LogFile, own: bytes | None) -> LogFile:
    """`file`, foreign if a whole header says that it is not of the spool `own`."""
    if file.kind != "segment" or file.header is None or own is None or file.header.spool_id == own:
        return file
    why = f"it belongs to the spool {file.header.spool_id.hex()}"
    return replace(file, kind="foreign", why=why)


def _size(path: str) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError:
        return 0
