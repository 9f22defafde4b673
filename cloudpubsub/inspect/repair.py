"""Making a damaged copy of a spool clean: every valid record stays at its position, everything else goes to quarantine.

Damaged segments are written anew as sealed ones that hold exactly the valid records; a hole starts another file.  The
meta file is made anew from the segments when nothing of it is left; otherwise what was lost is entered in its ledger.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from operator import itemgetter
from typing import NamedTuple

from cloudpubsub.inspect.check import FileCheck, check_file, is_retry, pending_from
from cloudpubsub.inspect.layout import (
    META_SLOT_BYTES,
    POSITION_BLOCK,
    Header,
    Loss,
    Meta,
    Produced,
    SegmentName,
    Settled,
    backlog,
)
from cloudpubsub.inspect.records import merged
from cloudpubsub.inspect.segment import Damage, Record, open_to_read, read_at
from cloudpubsub.inspect.spool import SEGMENT_VERSION, LogFile, MetaFile, SpoolDirectory
from cloudpubsub.inspect.writing import Quarantine, locked, write_meta, write_segment

__all__ = ["Repaired", "repair"]

_DAMAGED = 3  # the reason in the ledger


@dataclass(slots=True)
class Repaired:
    """What was done, or would be."""

    kept_messages: int = 0
    kept_bytes: int = 0
    lost_messages: int = 0  # pending ones, best estimate
    lost_bytes: int = 0
    damaged_ranges: int = 0
    damaged_bytes: int = 0
    quarantined: list[str] = field(default_factory=list)
    quarantined_bytes: int = 0
    rewritten: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    meta: str = "kept"  # "kept", "cleaned" (a slot, or figures that cannot be), "updated" (with losses), "made anew"

    @property
    def has_done(self) -> bool:
        """Was there anything to do?"""
        return bool(self.quarantined or self.rewritten) or self.meta != "kept"


class _Piece(NamedTuple):
    """A run of records of one file without a hole; the file to be made of it."""

    base: int
    source: LogFile


def repair(spool: SpoolDirectory, *, is_dry: bool = False) -> Repaired:
    """Make the spool clean; with `is_dry` nothing is changed, and the figures tell what would be.

    Raises SpoolLockedError when a process owns it, SpoolError, OSError; what was done until then stays done, nothing is
    lost by it, and repairing again goes on from there.
    """
    with locked(spool, make=not is_dry):
        return _Repair(spool, is_dry).run()


class _Repair:
    def __init__(self, spool: SpoolDirectory, is_dry: bool) -> None:
        self._spool = spool
        self._is_dry = is_dry
        self._meta_file: MetaFile = spool.meta()
        self._meta = self._meta_file.best
        self._settled = None if self._meta is None else self._meta.settled
        self._files = spool.files(None if self._meta is None else self._meta.spool_id)
        known = self._meta.spool_id if self._meta is not None else spool.spool_id(self._files)
        self._spool_id = known or os.urandom(16)
        self._quarantine = Quarantine(spool, is_dry=is_dry)
        self._result = Repaired()
        self._serials: dict[int, int] = {}  # the next one of each epoch
        for file in self._files:
            if file.parsed is not None:
                self._serials[file.parsed.epoch] = max(self._serials.get(file.parsed.epoch, 0), file.parsed.serial + 1)
        self._epoch = 0  # highest of the files so far
        self._base: int | None = None  # of the first segment that stays
        self._end = 0  # behind every position that is known
        self._pending = 0
        self._pending_bytes = 0
        self._lost: list[Damage] = []  # pending ranges

    def run(self) -> Repaired:
        is_clean = self._meta is not None and self._meta.clean
        segments = [file for file in self._files if file.name.endswith(".seg")]
        checks = []
        for file in self._files:
            head = pending_from(self._settled, file)
            check = check_file(file, head=head, is_last=file in segments[-1:], is_clean=is_clean)
            if check.has_records:
                checks.append(check)
            elif check.findings:
                self._quarantine.move(file.path, file.file_bytes)
        for cluster in _clusters(checks):
            self._settle(cluster)
        self._mend_meta()
        self._result.quarantined = self._quarantine.taken
        self._result.quarantined_bytes = self._quarantine.bytes
        return self._result

    # ---- segments

    def _settle(self, cluster: list[FileCheck]) -> None:
        """Make a file, or several whose positions overlap, clean."""
        epoch = max(self._epoch, *(check.file.segment.epoch for check in cluster))
        self._end = max(self._end, *(check.end for check in cluster))
        is_sound = self._is_sound(cluster)
        if not is_sound:
            used = self._note_damage(cluster)
            spare = [check for check in cluster if check.file.name not in used]
            if used and spare:  # the others have all of it
                cluster = [check for check in cluster if check.file.name in used]
                is_sound = self._is_sound(cluster)
                for check in spare:
                    self._retire(check)
        if is_sound:
            self._keep(cluster)
        else:
            self._rewrite(cluster, epoch)
        self._epoch = epoch

    def _note_damage(self, cluster: list[FileCheck]) -> set[str]:
        """Note what is lost; returns the names of the files that have anything to give."""
        estimates = {
            (check.file.name, finding.first): finding.messages for check in cluster for finding in check.findings
        }
        used: set[str] = set()
        for file, item in merged([check.file for check in cluster]):
            if isinstance(item, Record):
                used.add(file.name)
                continue
            self._result.damaged_ranges += 1
            self._result.damaged_bytes += item.end - item.first
            if item.end > pending_from(self._settled, file):
                self._lost.append(item._replace(messages=estimates.get((file.name, item.first), item.messages)))
        return used

    def _is_sound(self, cluster: list[FileCheck]) -> bool:
        epoch, last = self._epoch, None
        for check in cluster:
            if check.findings or check.file.segment.epoch < epoch:
                return False
            if last is not None and check.file.segment.base < last.end and not is_retry(last.file, check.file):
                return False
            epoch = check.file.segment.epoch
            last = check if last is None or check.end > last.end else last
        return True

    def _keep(self, cluster: list[FileCheck]) -> None:
        self._note_base(cluster[0].file.segment.base)
        if len(cluster) == 1:
            (check,) = cluster
            self._result.kept_messages += check.messages
            self._result.kept_bytes += check.message_bytes
            self._pending += check.pending
            self._pending_bytes += check.pending_bytes
            return
        for file, item in merged([check.file for check in cluster]):
            if isinstance(item, Record):
                self._count(item, pending_from(self._settled, file))

    def _note_base(self, base: int) -> None:
        self._base = base if self._base is None else min(base, self._base)

    def _count(self, record: Record, head: int) -> None:
        if record.is_pad:
            return
        self._result.kept_messages += 1
        self._result.kept_bytes += record.span
        if record.position >= head:
            self._pending += 1
            self._pending_bytes += record.span

    def _retire(self, check: FileCheck) -> None:
        """A file goes to quarantine, and so does what is damaged in it, by itself, with the positions that it had."""
        ranges = [finding for finding in check.findings if finding.first is not None and finding.end is not None]
        if ranges:
            with check.file.open() as opened:
                for finding in ranges:
                    self._quarantine.keep_range(opened, finding.first or 0, finding.end or 0)
        self._quarantine.move(check.file.path, check.file.file_bytes)

    def _rewrite(self, cluster: list[FileCheck], epoch: int) -> None:
        for piece, items in groupby(self._pieces(cluster), key=itemgetter(0)):
            records = _with_a_message(record for _, record in items)
            if records is None:
                continue
            serial = self._serials.get(epoch, 0)
            self._serials[epoch] = serial + 1
            name = SegmentName(piece.base, epoch, serial)
            header = self._header(piece.source, name)
            write_segment(self._spool, name, header, records, is_dry=self._is_dry)
            self._result.made.append(str(name))
            self._note_base(name.base)
        for check in cluster:
            self._retire(check)
            self._result.rewritten.append(check.file.name)

    def _pieces(self, cluster: list[FileCheck]) -> Iterator[tuple[_Piece, Record]]:
        """The valid records, each with the piece that it belongs to."""
        piece: _Piece | None = None
        end = 0
        for file, item in merged([check.file for check in cluster]):
            if isinstance(item, Damage):
                continue
            if piece is None or item.position != end or file.name != piece.source.name:
                piece = _Piece(item.position, file)
            self._count(item, pending_from(self._settled, file))
            end = item.position + item.span
            yield piece, item

    def _header(self, source: LogFile, name: SegmentName) -> Header:
        if source.header is not None:
            _, _, boot_id, _, _, _, wall_ms, boottime_ms = source.header
        else:  # of no boot that anybody can name
            boot_id, wall_ms, boottime_ms = bytes(16), os.stat(source.path).st_mtime_ns // 1_000_000, 0
        return Header(
            SEGMENT_VERSION, self._spool_id, boot_id, name.epoch, name.serial, name.base, wall_ms, boottime_ms
        )

    # ---- the meta file

    def _mend_meta(self) -> None:
        meta, slots = self._meta, self._meta_file.slots
        if meta is None and self._base is None and "damaged" not in slots and not self._quarantine.taken:
            return  # never opened to the end
        if meta is None:
            mended = self._new_meta()
            self._result.meta = "made anew"
        else:
            mended = self._corrected(meta)
            self._result.meta = "cleaned" if mended != meta or "damaged" in slots else "kept"
        accounted = self._accounted(mended)
        if accounted != mended and self._result.meta == "kept":
            self._result.meta = "updated"
        if self._result.meta == "kept":
            return
        if "damaged" in slots:
            self._quarantine.keep("meta", _read_meta(self._spool))
        if not self._is_dry:
            write_meta(self._spool, replace(accounted, sequence=accounted.sequence + 1), self._meta_file.at)

    def _new_meta(self) -> Meta:
        """What the segments tell; the rest is lost: the identity, the counters, how far messages were acknowledged."""
        own = [file for file in self._files if file.parsed is not None and file.kind != "foreign"]
        position = _above(max([self._end, *(file.reach for file in own)]))
        return Meta(
            epoch=max([1, self._epoch, *(file.header.epoch for file in own if file.header is not None)]),
            sequence=0,
            spool_id=self._spool_id,
            generation=0,  # of no ring
            next_position=position,
            clean=False,
            produced=Produced(position, self._pending, self._pending_bytes, 0, 0),
            settled=Settled(
                position if self._base is None else self._base, position, 0, 0, 0, 0, 0, 0, 0, (0, 0, 0, 0)
            ),
            identity=b"",
        )

    def _corrected(self, meta: Meta) -> Meta:
        """`meta` without what cannot be, given the segments."""
        if self._epoch <= meta.epoch and self._end <= meta.next_position >= meta.settled.head:
            return meta
        position = meta.next_position if self._end <= meta.next_position else _above(self._end)
        head = meta.settled.head
        if head > position:
            head = position if self._base is None else self._base
        return replace(
            meta,
            epoch=max(meta.epoch, self._epoch),
            next_position=position,
            clean=False,
            settled=meta.settled._replace(head=head).tamed(position),
        )

    def _accounted(self, meta: Meta) -> Meta:
        """`meta` with what was lost counted as dropped."""
        settled = meta.settled
        messages, size = sum(lost.messages for lost in self._lost), sum(lost.end - lost.first for lost in self._lost)
        if meta.clean:
            # How much was pending is known, so what is not there any more was lost.
            expected, expected_bytes = backlog(meta.produced, settled)
            messages, size = max(0, expected - self._pending), max(0, expected_bytes - self._pending_bytes)
        if messages == 0:
            return meta
        self._result.lost_messages, self._result.lost_bytes = messages, size
        first = min((lost.first for lost in self._lost), default=settled.head)
        end = max((lost.end for lost in self._lost), default=meta.next_position)
        loss = Loss(first, end, messages, size, _DAMAGED, time.time_ns() // 1_000_000)
        dropped = settled.dropped_messages + messages, settled.dropped_bytes + size
        return replace(
            meta,
            settled=settled._replace(dropped_messages=dropped[0], dropped_bytes=dropped[1]),
            ledger=meta.ledger.plus(loss),
        )


def _with_a_message(records: Iterator[Record]) -> Iterator[Record] | None:
    """The same records; None if they are pads and nothing else."""
    first = []
    for record in records:
        first.append(record)
        if not record.is_pad:
            return chain(first, records)
    return None


def _clusters(checks: list[FileCheck]) -> Iterator[list[FileCheck]]:
    """Files that hold the same positions, together; each other by itself; by position."""
    cluster: list[FileCheck] = []
    end = 0
    for check in sorted(checks, key=lambda check: check.file.segment):
        if cluster and check.file.segment.base >= end:
            yield cluster
            cluster = []
        cluster.append(check)
        end = max(end, check.end)
    if cluster:
        yield cluster


def _above(position: int) -> int:
    """Where positions start that were never issued, when `position` was: an open reserves up to two blocks."""
    return (position // POSITION_BLOCK + 2) * POSITION_BLOCK


def _read_meta(spool: SpoolDirectory) -> bytes:
    fd = open_to_read(spool.file("meta"))
    try:
        return read_at(fd, 0, 4 * META_SLOT_BYTES)
    finally:
        os.close(fd)
