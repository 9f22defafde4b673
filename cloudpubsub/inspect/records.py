"""The messages of a spool in order: those on the disk, each once however many files hold it, then those in the ring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cloudpubsub._errors import SpoolError
from cloudpubsub.inspect.ring import Ring
from cloudpubsub.inspect.segment import Damage, Record, SegmentFile
from cloudpubsub.inspect.spool import LogFile, SpoolDirectory

__all__ = ["merged", "spool_records"]

_TRIES = 1000


@dataclass(slots=True)
class _Source:
    """A file that is being walked, and what comes next in it."""

    file: LogFile
    opened: SegmentFile
    items: Iterator[Record | Damage] = field(init=False)
    item: Record | Damage | None = None

    def __post_init__(self) -> None:
        self.items = iter(self.opened.walk())

    def step(self) -> bool:
        """On to the next item; False at the end, with the file closed."""
        self.item = next(self.items, None)
        if self.item is None:
            self.opened.close()
        return self.item is not None

    def rank(self, last: _Source | None) -> tuple[int, bool, bool, int, int]:
        """With the same position: a record before damage, then the file that was read from last, then the later one."""
        item, name = self.item, self.file.segment
        assert item is not None
        return item[0], isinstance(item, Damage), self is not last, -name.epoch, -name.serial


def merged(files: Sequence[LogFile], first: int = 0) -> Iterator[tuple[LogFile, Record | Damage]]:
    """The records of all segments among `files` in order of position, pads included, and what is damaged between them.

    Starts with the segment that holds `first`.  Where files overlap, a record that is whole in any of them counts.  At
    most as many files are open at a time as hold one position.  A file that has gone since it was listed is left out:
    its records are settled.
    """
    waiting = [file for file in files if file.kind == "segment" and file.reach > first]
    waiting.sort(key=lambda file: file.segment, reverse=True)
    active: list[_Source] = []
    last: _Source | None = None  # that a record was taken from
    done = 0  # everything below was given out
    try:
        while active or waiting:
            current = active[0] if active else None
            if len(active) > 1:
                current = min(active, key=lambda source: source.rank(last))
            if waiting and (current is None or waiting[-1].segment.base <= _first(current)):
                source = _start(waiting.pop())
                if source is not None:
                    active.append(source)
                continue
            assert current is not None
            item = current.item
            if isinstance(item, Record) and item.position >= done:
                yield current.file, item
                done = item.position + item.span
                last = current
            elif isinstance(item, Damage) and item.end > done:
                yield current.file, Damage(max(item.first, done), item.end, item.messages)
            if not current.step():
                active.remove(current)
    finally:
        for source in active:
            source.opened.close()


def _first(source: _Source) -> int:
    assert source.item is not None
    return source.item[0]


def _start(file: LogFile) -> _Source | None:
    try:
        source = _Source(file, file.open())
    except FileNotFoundError:
        return None
    try:
        return source if source.step() else None
    except BaseException:
        source.opened.close()
        raise


def spool_records(
    spool: SpoolDirectory, spool_id: bytes | None, ring: Ring | None, first: int
) -> Iterator[tuple[LogFile | None, Record | Damage]]:
    """What stands at `first` and behind it, up to what was published when this was called.

    The file is None for what is in the ring.  The owner goes on working: what it settles meanwhile may be left out, and
    nothing else.
    """
    if ring is None:
        yield from _on_disk(spool, spool_id, first)
        return
    at, end, tries = first, ring.state().produced.published, 0
    while at < end:
        before, low = at, ring.state().low
        if at < low:
            for file, item in _on_disk(spool, spool_id, at):
                if item[0] >= low:
                    break
                yield file, item
                at = max(at, _end(item))
            # A failed sync takes records back from the disk: then they are in the ring again.
            at = max(at, min(low, ring.state().low))
        for item in ring.records(at, end) if at < end else ():
            yield None, item
            at = _end(item)
        tries = tries + 1 if at == before else 0
        if tries > _TRIES:
            raise SpoolError(f"{ring.path}: the ring cannot be read")
    yield from _on_disk(spool, spool_id, max(at, end))


def _on_disk(spool: SpoolDirectory, spool_id: bytes | None, first: int) -> Iterator[tuple[LogFile, Record | Damage]]:
    for file, item in merged(spool.files(spool_id), first):
        if isinstance(item, Record):
            if item.position >= first:
                yield file, item
        elif item.end > first:
            yield file, Damage(max(item.first, first), item.end, item.messages)


def _end(item: Record | Damage) -> int:
    return item.position + item.span if isinstance(item, Record) else item.end
