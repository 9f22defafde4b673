"""Spools to look into, whole and damaged, and what tests of the tools ask of them."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cloudpubsub import Message as Published
from cloudpubsub import Spool
from tests.reader import FOOTER, SEGMENT_HEADER, SLOT, Message, Place, Segment, crc32c, read_spool

SMALL: dict[str, Any] = {"ring_bytes": 64 << 10, "segment_bytes": 64 << 10}
COUNT = 600
ACKED = 20


def make(path: Path, count: int = COUNT, acked: int = ACKED, **settings: Any) -> None:
    """A closed spool of several sealed segments, pads in them, whose head stands in the middle of the first."""
    with Spool(path, **{**SMALL, **settings}) as spool:
        for number in range(count):
            append(spool, number)
        read = read_all(spool)
        if acked:
            spool.ack(read[acked - 1].position or 0)


def append(spool: Spool, number: int) -> int:
    """Records of all kinds of lengths."""
    payload, userdata = b"%03d" % number * (4 * (number % 60)), b"\x00\xff" * (number % 5)
    return spool.append(f"a/{number}", payload, userdata=userdata, retain=number % 7 == 0)


def read_all(spool: Spool) -> list[Published]:
    found: list[Published] = []
    while batch := spool.read():
        found += batch
    return found


def copy(path: Path, to: Path) -> Path:
    """As `cp -a` makes it, with the times."""
    shutil.copytree(path, to, symlinks=True)
    return to


def values(messages: list[Message]) -> list[tuple[object, ...]]:
    """What an oracle's messages are, in the order of `published`."""
    return [(each.position, each.topic.decode(), each.payload, each.userdata, each.retain) for each in messages]


def published(messages: list[Published]) -> list[tuple[object, ...]]:
    return [(each.position, each.topic, each.payload, each.userdata, each.retain) for each in messages]


def tree(path: Path) -> dict[str, tuple[object, ...]]:
    """Everything under `path`: kind, mode, size, times of change and content."""
    found: dict[str, tuple[object, ...]] = {}
    for each in [path, *path.rglob("*")]:
        facts = each.lstat()
        content = hashlib.sha256(each.read_bytes()).hexdigest() if stat.S_ISREG(facts.st_mode) else ""
        found[str(each.relative_to(path))] = (
            facts.st_mode,
            facts.st_size,
            facts.st_mtime_ns,
            facts.st_ctime_ns,
            content,
        )
    return found


def contents(path: Path) -> set[bytes]:
    return {each.read_bytes() for each in path.rglob("*") if each.is_file() and not each.is_symlink()}


# ---- damage


class Damage(NamedTuple):
    """Something done to a spool, and the kinds of findings that `verify` must come to."""

    name: str
    do: Callable[[Path], object]
    kinds: set[str]


def flip(path: Path, offset: int, mask: int = 0x10) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def _segment(path: Path, number: int = 1) -> Segment:
    return read_spool(path).segments[number]


def _place(path: Path, *, is_pad: bool = False) -> tuple[Path, Place]:
    """A message with all parts in the middle of a file, or a pad."""
    for segment in read_spool(path).segments[1:]:
        for place in segment.places if is_pad else segment.places[3:-3]:
            message = place.message
            if message is None if is_pad else message is not None and len(message.payload) > 40 and message.userdata:
                return segment.path, place
    raise AssertionError("there is none")


def _flip_in_record(at: Callable[[Place], int], *, is_pad: bool = False) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        file, place = _place(path, is_pad=is_pad)
        flip(file, place.offset + at(place))

    return do


def _flip_in_segment(at: Callable[[int], int]) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        file = _segment(path).path
        flip(file, at(file.stat().st_size))

    return do


def _cut(path: Path, keep: Callable[[Segment], int]) -> None:
    segment = _segment(path)
    os.truncate(segment.path, keep(segment))


def _zero_tail(path: Path, size: int) -> None:
    file = _segment(path).path
    data = file.read_bytes()
    file.write_bytes(data[:-size] + bytes(size))


def _zero_middle(path: Path) -> None:
    file = _segment(path).path
    data = file.read_bytes()
    file.write_bytes(data[:4096] + bytes(2048) + data[6144:])


def _zero_records(path: Path) -> None:
    file = _segment(path).path
    data = file.read_bytes()
    file.write_bytes(data[:SEGMENT_HEADER] + bytes(len(data) - SEGMENT_HEADER - FOOTER) + data[-FOOTER:])


def _flip_at_head(path: Path, step: int) -> None:
    """The record at the head, or so many behind it."""
    read = read_spool(path)
    places = [place for place in read.segments[0].places if place.message is not None]
    at = next(i for i, place in enumerate(places) if place.message == read.pending[0])
    flip(read.segments[0].path, places[at + step].offset + 5)


def _garbage(path: Path) -> None:
    file = _segment(path).path
    file.write_bytes(hashlib.shake_128(b"noise").digest(file.stat().st_size))


def _another_version(path: Path) -> None:
    file = _segment(path).path
    data = bytearray(file.read_bytes())
    data[8:12] = struct.pack("<I", 2)
    data[124:128] = struct.pack("<I", crc32c(bytes(data[:124])))
    file.write_bytes(data)


def _duplicate(path: Path) -> None:
    segment = _segment(path)
    shutil.copy2(segment.path, segment.path.with_name(f"{segment.base:016x}-{segment.epoch:08x}-00000063.seg"))


def _duplicate_and_damage(path: Path) -> None:
    """Each copy has lost another record."""
    _duplicate(path)
    first, second = read_spool(path).segments[1:3]
    assert first.base == second.base
    flip(first.path, first.places[10].offset + 40)
    flip(second.path, second.places[20].offset + 40)


def _overlap(path: Path) -> None:
    """The second half of a file again, not sealed, as a second try after a failed write leaves it."""
    segment = _segment(path)
    data = segment.path.read_bytes()
    place = segment.places[len(segment.places) // 2]
    name = f"{place.position:016x}-{segment.epoch:08x}-00000063.seg"
    segment.path.with_name(name).write_bytes(bytes(SEGMENT_HEADER) + data[place.offset : -FOOTER])


def _from_elsewhere(path: Path) -> None:
    other = path.with_name("other")
    make(other, 30)
    file = _segment(other, 0).path
    shutil.copy2(file, path / "log" / f"{1 << 50:016x}-00000001-00000000.seg")
    shutil.rmtree(other)


def _damage_slots(path: Path, *slots: int) -> None:
    for slot in slots:
        flip(path / "meta", SLOT * slot + 100)


DAMAGES = [
    Damage("length", _flip_in_record(lambda place: 4), {"records"}),
    Damage("length beyond the file", _flip_in_record(lambda place: 6), {"records"}),
    Damage("pad bit", _flip_in_record(lambda place: 7), {"records"}),
    Damage("position", _flip_in_record(lambda place: 8), {"records"}),
    Damage("epoch", _flip_in_record(lambda place: 19), {"records"}),
    Damage("flags", _flip_in_record(lambda place: 20), {"records"}),
    Damage("length of the topic", _flip_in_record(lambda place: 23), {"records"}),
    Damage("stamp", _flip_in_record(lambda place: 27), {"records"}),
    Damage("topic", _flip_in_record(lambda place: 33), {"records"}),
    Damage("payload", _flip_in_record(lambda place: 60), {"records"}),
    Damage("crc", _flip_in_record(lambda place: 2), {"records"}),
    Damage("pad length", _flip_in_record(lambda place: 4, is_pad=True), {"records"}),
    Damage("pad crc", _flip_in_record(lambda place: 1, is_pad=True), {"records"}),
    Damage("header", _flip_in_segment(lambda size: 60), {"header"}),
    Damage("spool id in the header", _flip_in_segment(lambda size: 17), {"header"}),
    Damage("footer", _flip_in_segment(lambda size: size - 40), {"footer"}),
    Damage("magic of the footer", _flip_in_segment(lambda size: size - 64), {"footer"}),
    Damage("crc of the footer", _flip_in_segment(lambda size: size - 1), {"footer"}),
    Damage("zeros in the middle", _zero_middle, {"records"}),
    Damage("zeros for all records", _zero_records, {"records"}),
    Damage("record at the head", lambda path: _flip_at_head(path, 0), {"records"}),
    Damage("record before the head", lambda path: _flip_at_head(path, -1), {"records"}),
    Damage("zero tail behind a footer", lambda path: _zero_tail(path, FOOTER), {"unsealed"}),
    Damage("zero tail", lambda path: _zero_tail(path, 3000), {"unsealed", "missing"}),
    Damage("cut in a record", lambda path: _cut(path, lambda it: it.places[20].offset + 21), {"unsealed", "missing"}),
    Damage("cut between records", lambda path: _cut(path, lambda it: it.places[20].offset), {"unsealed", "missing"}),
    Damage("cut in the header", lambda path: _cut(path, lambda it: 77), {"missing"}),
    Damage("empty file", lambda path: _cut(path, lambda it: 0), {"missing"}),
    Damage("missing file", lambda path: _segment(path).path.unlink(), {"missing"}),
    Damage("garbage", _garbage, {"unreadable", "header", "missing"}),
    Damage("unknown version", _another_version, {"unreadable", "missing"}),
    Damage("file of another spool", _from_elsewhere, {"foreign"}),
    Damage("no segment", lambda path: (path / "log" / "notes.txt").write_text("hello"), {"foreign"}),
    Damage("wrong name", lambda path: (path / "log" / "123.seg").write_text("hello"), {"unreadable"}),
    Damage("directory", lambda path: (path / "log" / f"{8:016x}-00000001-00000000.seg").mkdir(), {"unreadable"}),
    Damage("link", lambda path: (path / "log" / f"{8:016x}-00000001-00000000.seg").symlink_to("x"), {"unreadable"}),
    Damage("pipe", lambda path: os.mkfifo(path / "log" / f"{8:016x}-00000001-00000000.seg"), {"unreadable"}),
    Damage("duplicate", _duplicate, {"header", "overlap"}),
    Damage("damaged duplicates", _duplicate_and_damage, {"header", "overlap", "records"}),
    Damage("overlap", _overlap, {"header", "overlap", "unsealed"}),
    Damage("first slot of meta", lambda path: _damage_slots(path, 0), {"meta"}),
    Damage("second slot of meta", lambda path: _damage_slots(path, 1), {"meta"}),
    Damage("both slots of meta", lambda path: _damage_slots(path, 0, 1), {"meta"}),
    Damage("no meta", lambda path: (path / "meta").unlink(), {"meta"}),
    Damage("empty meta", lambda path: os.truncate(path / "meta", 0), {"meta"}),
    Damage("cut meta", lambda path: os.truncate(path / "meta", 3000), {"meta"}),
]
