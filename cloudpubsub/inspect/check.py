"""Checking a spool: every record, header and footer, the meta file, the order of the files.  Finds damage, and notes.

A note is what a crash or a kill leaves and the next open deals with without any loss: a torn tail, an empty file.
Damage is found twice in a file before it counts, because its owner may be writing to it while we look.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cloudpubsub.inspect.layout import FOOTER_BYTES, HEADER_BYTES, META_SLOT_BYTES, Meta, Settled, backlog
from cloudpubsub.inspect.ring import Ring
from cloudpubsub.inspect.segment import Damage, Record, Walk
from cloudpubsub.inspect.spool import LogFile, MetaFile, SpoolDirectory

__all__ = ["FileCheck", "Finding", "SpoolCheck", "check_file", "check_spool", "is_retry", "pending_from"]

FINDINGS_MAX = 10_000  # kept; the others are counted


class Finding(NamedTuple):
    """One thing that is wrong.

    `kind`: "records", "header", "footer", "foreign", "unreadable", "overlap", "order", "unsealed", "missing", "meta" or
    "ring".  `file` is relative to the spool.  Where a range of positions is concerned it is `[first, end)`; `messages`
    is the best estimate of how many were lost.
    """

    kind: str
    file: str
    what: str
    offset: int | None = None
    bytes: int = 0
    first: int | None = None
    end: int | None = None
    messages: int = 0


@dataclass(slots=True)
class FileCheck:
    """One file of the log, gone through."""

    file: LogFile
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    end: int = 0  # position behind its last record
    messages: int = 0
    message_bytes: int = 0
    pending: int = 0  # of these, at or above the head that was asked for
    pending_bytes: int = 0
    torn_bytes: int = 0

    @property
    def has_records(self) -> bool:
        return self.file.kind == "segment" and self.end > self.file.segment.base

    def _add(self, kind: str, what: str, offset: int | None = None, size: int = 0, **more: int) -> None:
        self.findings.append(Finding(kind, f"log/{self.file.name}", what, offset, size, **more))

    def _note(self, text: str) -> None:
        self.notes.append(f"log/{self.file.name}: {text}")


def is_retry(earlier: LogFile, later: LogFile) -> bool:
    """`later` begins in `earlier`.  Was that given up, and the rest of it written anew after a failure or a kill?"""
    was_given_up = earlier.footer is None and not earlier.was_sealed
    return was_given_up and later.segment[1:] > earlier.segment[1:]


def pending_from(settled: Settled | None, file: LogFile) -> int:
    """The position from which on the records of a file are pending; of a file that was dropped, none is."""
    if settled is None:
        return 0
    if file.parsed is not None and file.parsed.base + 1 in settled.victims:
        return 1 << 64
    return settled.head if file.parsed is None else settled.pending_from(file.parsed.base)


def check_file(file: LogFile, *, head: int = 0, is_last: bool = False, is_clean: bool = False) -> FileCheck:
    """Go through a file.  `is_last`: no other segment follows; `is_clean`: the spool was closed with everything sealed.

    Raises FileNotFoundError when it has gone.
    """
    check = FileCheck(file)
    if file.kind in ("foreign", "unreadable"):
        check._add(file.kind, file.why, 0, file.file_bytes)
    elif file.kind == "empty":
        check.end = file.segment.base
        check._note("nothing was ever written to it; the next open removes it")
    else:
        try:
            _check_segment(check, head)
        except FileNotFoundError:
            raise
        except OSError as exc:
            check._add("unreadable", exc.strerror or "cannot be read", 0, file.file_bytes)
        else:
            _check_ends(check, is_last, is_clean)
    return check


def _check_segment(check: FileCheck, head: int) -> None:
    file = check.file
    if file.header is None:
        check._add("header", "the header is not whole; base and epoch are taken from the name", 0, HEADER_BYTES)
    elif (file.header.base, file.header.epoch, file.header.serial) != tuple(file.segment):
        check._add("header", "the header is that of another name", 0, HEADER_BYTES)
    with file.open() as opened:
        walk = opened.walk()
        for item in walk:
            if isinstance(item, Record):
                if item.position >= head and not item.is_pad:
                    check.pending += 1
                    check.pending_bytes += item.span
            else:
                offset = opened.offset_of(item.first)
                check._add("records", "no valid record", offset, item.end - item.first, **item._asdict())
    _take(check, walk)
    if opened.unreadable:
        check._add("unreadable", f"the disk does not give back {len(opened.unreadable)} blocks of 4096 bytes of it")


def _take(check: FileCheck, walk: Walk) -> None:
    check.end, check.messages, check.message_bytes = walk.end, walk.messages, walk.message_bytes
    check.torn_bytes = walk.torn_bytes
    footer = check.file.footer
    if footer is None:
        return
    ranges = [i for i, finding in enumerate(check.findings) if finding.kind == "records"]
    if not ranges and (footer.messages, footer.message_bytes) != (walk.messages, walk.message_bytes):
        what = f"it says {footer.messages} messages of {footer.message_bytes} bytes"
        check._add(
            "footer",
            f"{what}, there are {walk.messages} of {walk.message_bytes}",
            check.file.file_bytes - FOOTER_BYTES,
            FOOTER_BYTES,
        )
    # How many are missing is known; where, only as far as headers can be told.
    missing = max(0, footer.messages - walk.messages)
    for i in ranges:
        finding = check.findings[i]
        lost = missing if i == ranges[-1] else min(missing, finding.messages)
        check.findings[i] = finding._replace(messages=lost)
        missing -= lost


def _check_ends(check: FileCheck, is_last: bool, is_clean: bool) -> None:
    file = check.file
    if file.was_sealed:
        what = "the footer is not whole; the end is where the records end"
        check._add("footer", what, file.file_bytes - FOOTER_BYTES, FOOTER_BYTES)
    elif file.footer is None and check.end == file.segment.base:
        if check.torn_bytes and not is_last:
            check._add("unreadable", "no valid record in it", HEADER_BYTES, check.torn_bytes)
        elif check.torn_bytes:
            check._note(f"{check.torn_bytes} bytes of a first write that was cut off; the next open removes it")
        else:
            check._note("no record was ever written to it; the next open removes it")
    elif file.footer is None and is_clean:
        what = "the spool was closed cleanly, but this file has no footer: its end is missing"
        check._add("unsealed", what, HEADER_BYTES + check.end - file.segment.base, check.torn_bytes)
    elif file.footer is None:
        torn = f", behind its last record {check.torn_bytes} bytes of a torn write" if check.torn_bytes else ""
        check._note(f"not sealed{torn}")


@dataclass(slots=True)
class SpoolCheck:
    """A spool, gone through."""

    findings: list[Finding] = field(default_factory=list)
    more_findings: int = 0  # that were not kept
    notes: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    messages: int = 0
    ring_messages: int = 0

    @property
    def is_clean(self) -> bool:
        return not self.findings

    def add(self, *findings: Finding) -> None:
        room = FINDINGS_MAX - len(self.findings)
        self.findings += findings[:room]
        self.more_findings += max(0, len(findings) - room)


def check_spool(spool: SpoolDirectory) -> SpoolCheck:
    """Go through a spool.  Raises SpoolError, OSError."""
    result = SpoolCheck()
    meta_file = spool.meta()
    meta = meta_file.best
    spool_id = None if meta is None else meta.spool_id
    files = spool.files(spool_id)
    segments = [file for file in files if file.name.endswith(".seg")]
    is_clean = meta is not None and meta.clean
    line = _Line(result, meta)
    for file in files:
        head = pending_from(None if meta is None else meta.settled, file)
        check = _checked_twice(spool, spool_id, file, head, file in segments[-1:], is_clean)
        if check is None:
            continue
        result.files += 1
        result.bytes += file.file_bytes
        result.messages += check.messages
        result.add(*check.findings)
        result.notes += check.notes
        if check.has_records:
            line.pass_by(check, spool)
    _check_meta(result, meta_file, line)
    ring, why = spool.ring(meta)
    if ring is not None:
        try:
            _check_ring(result, ring)
        finally:
            ring.close()
    elif meta is not None and not meta.clean:
        result.notes.append(f"the spool was not closed, and its ring was not looked at: {why}")
    return result


def _checked_twice(
    spool: SpoolDirectory, spool_id: bytes | None, file: LogFile, head: int, is_last: bool, is_clean: bool
) -> FileCheck | None:
    """None: the file has gone."""
    try:
        check = check_file(file, head=head, is_last=is_last, is_clean=is_clean)
        if not check.findings:
            return check
        now = spool.again(file, spool_id)
        if now is None:
            return None
        again = check_file(now, head=head, is_last=is_last, is_clean=is_clean)
    except FileNotFoundError:
        return None
    known = {(finding.kind, finding.first) for finding in check.findings}
    again.findings = [finding for finding in again.findings if (finding.kind, finding.first) in known]
    return again


class _Line:
    """The segments one behind the other."""

    def __init__(self, result: SpoolCheck, meta: Meta | None) -> None:
        self._result = result
        self._meta = meta
        self._last: FileCheck | None = None  # the one that reaches furthest
        self.epoch = 0
        self.end = 0
        self.pending = 0
        self.lost = 0
        self.overlaps = False

    def pass_by(self, check: FileCheck, spool: SpoolDirectory) -> None:
        segment, last = check.file.segment, self._last
        where = f"log/{check.file.name}"
        if last is not None and segment.base < last.end and spool.again(last.file, None) is not None:
            self.overlaps = True
            end = min(check.end, last.end)
            if is_retry(last.file, check.file):
                what = f"it holds positions {segment.base} to {end} of log/{last.file.name} anew"
                self._result.notes.append(f"{where}: {what}, which had not been written to the end")
            else:
                what = f"its positions are in log/{last.file.name} too"
                offset, size = HEADER_BYTES, end - segment.base
                self._result.add(Finding("overlap", where, what, offset, size, segment.base, end))
        elif last is not None and segment.base > last.end and segment.epoch == last.file.segment.epoch:
            self._note_gap(last, check)
        if segment.epoch < self.epoch:
            what = f"it is of epoch {segment.epoch}, and a file before it of epoch {self.epoch}"
            self._result.add(Finding("order", where, what))
        self.epoch = max(self.epoch, segment.epoch)
        self.end = max(self.end, check.end)
        self.pending += check.pending
        self.lost += sum(finding.messages for finding in check.findings)
        if last is None or check.end > last.end:
            self._last = check

    def _note_gap(self, last: FileCheck, check: FileCheck) -> None:
        """Records are missing, or were settled before they were written: a crash leaves a head that is too low."""
        first, end = last.end, check.file.segment.base
        if self._meta is None or self._meta.settled.pending_from(first) != first:
            return
        if any(loss.first < end and first < loss.end for loss in self._meta.ledger.losses):
            return
        what = "settled before they were written, or lost"
        self._result.notes.append(f"log: no messages are at positions {first} to {end}: {what}")


def _check_meta(result: SpoolCheck, meta_file: MetaFile, line: _Line) -> None:
    for i, state in enumerate(meta_file.slots):
        if state == "damaged":
            what = f"slot {i} is not whole"
            result.add(Finding("meta", "meta", what, i * META_SLOT_BYTES, META_SLOT_BYTES))
    meta = meta_file.best
    if meta is None:
        what = "there is no valid slot" if meta_file.is_there else "there is none"
        if line.end > 0 or "damaged" in meta_file.slots:
            what += ": whose spool it is and which positions were issued is not known"
            result.add(Finding("meta", "meta", what))
        else:
            result.notes.append(f"meta: {what}: the spool was never opened to the end")
        return
    if line.epoch > meta.epoch:
        result.add(Finding("meta", "meta", f"it is older than the segments: epoch {meta.epoch}, theirs {line.epoch}"))
    if line.end > meta.next_position:
        what = f"it is older than the segments: positions up to {meta.next_position}, theirs to {line.end}"
        result.add(Finding("meta", "meta", what))
    if meta.settled.head > meta.next_position:
        what = f"the head {meta.settled.head} is beyond every position that was issued, {meta.next_position}"
        result.add(Finding("meta", "meta", what))
    if meta.clean and not line.overlaps:
        _check_count(result, meta, line)


def _check_count(result: SpoolCheck, meta: Meta, line: _Line) -> None:
    """After a clean close the number of pending messages is known."""
    expected, _ = backlog(meta.produced, meta.settled)
    missing = expected - line.pending - line.lost
    if missing > 0:
        what = f"{expected} messages were pending when the spool was closed, {line.pending} are there"
        result.add(Finding("missing", "log", what, messages=missing))
    elif line.pending > expected:
        result.notes.append(f"log: {line.pending} pending messages, {expected} when the spool was closed")


def _check_ring(result: SpoolCheck, ring: Ring) -> None:
    state = ring.state()
    for item in ring.records(state.low, state.produced.published):
        if isinstance(item, Damage):
            what = "its chain of records is broken"
            result.add(Finding("ring", ring.path, what, None, item.end - item.first, item.first, item.end, 1))
        elif not item.is_pad and state.settled.pending_from(item.position) == item.position:
            result.ring_messages += 1
