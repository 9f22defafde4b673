"""An oracle: reads a spool's directory as docs/format.md says, in the plainest way, with nothing of the package.

Slow, whole files at a time, and every record on its own merits.  `read_spool` gives what is there; `Segment` where it
stands in a file, so that tests know which byte they damage.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

SEGMENT_HEADER, FOOTER, SLOT = 128, 64, 4096
PAD_BIT = 0x80000000


def _make_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _make_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


class Message(NamedTuple):
    position: int
    topic: bytes
    payload: bytes
    userdata: bytes
    retain: bool
    epoch: int
    stamp_ms: int
    properties: bytes
    ttl_ms: int


class Place(NamedTuple):
    """A valid record in a file; `message` is None for a pad."""

    position: int
    offset: int
    span: int
    message: Message | None


class Segment(NamedTuple):
    path: Path
    base: int
    epoch: int
    serial: int
    spool_id: bytes | None  # None: the header is not whole
    footer: tuple[int, int, int] | None  # end, messages, their bytes; None: not sealed
    places: list[Place]
    damage: list[tuple[int, int]]  # positions
    end: int

    @property
    def messages(self) -> list[Message]:
        return [place.message for place in self.places if place.message is not None]


class Meta(NamedTuple):
    sequence: int
    epoch: int
    spool_id: bytes
    generation: int
    next_position: int
    clean: bool
    words: tuple[int, ...]  # published, messages, bytes, refused, refused bytes; head, spilled, sent_max, ...
    identity: bytes
    totals: tuple[tuple[int, int], ...]  # messages and bytes lost, by reason
    uncertain: tuple[int, int]
    losses: list[tuple[int, int, int, int, int, int]]  # first, end, messages, bytes, reason, ms since 1970

    @property
    def head(self) -> int:
        return self.words[5]


class Read(NamedTuple):
    meta: Meta | None
    segments: list[Segment]  # of this spool, by position
    messages: list[Message]  # each position once

    @property
    def pending(self) -> list[Message]:
        head = 0 if self.meta is None else self.meta.head
        return [message for message in self.messages if message.position >= head]


def read_spool(path: Path) -> Read:
    meta = read_meta(path / "meta")
    found = [segment for name in sorted((path / "log").iterdir()) if (segment := read_segment(name)) is not None]
    ids = Counter(segment.spool_id for segment in found if segment.spool_id is not None)
    own = meta.spool_id if meta is not None else ids.most_common(1)[0][0] if ids else None
    segments = [segment for segment in found if segment.spool_id in (None, own)]
    by_position = {message.position: message for segment in segments for message in segment.messages}
    return Read(meta, segments, [by_position[position] for position in sorted(by_position)])


def read_meta(path: Path) -> Meta | None:
    """The valid slot with the higher sequence."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    slots = [_slot(data[at : at + SLOT]) for at in (0, SLOT)]
    return max((slot for slot in slots if slot is not None), key=lambda slot: slot.sequence, default=None)


def _slot(data: bytes) -> Meta | None:
    if len(data) != SLOT or data[:8] != b"CPSMETA1" or struct.unpack_from("<I", data, 4092)[0] != crc32c(data[:4092]):
        return None
    version, epoch, sequence = struct.unpack_from("<IIQ", data, 8)
    generation, next_position = struct.unpack_from("<QQ", data, 40)
    (length,) = struct.unpack_from("<H", data, 512)
    if version != 1 or length > 1024 or epoch >= 0xFE000000 or next_position >= 2**63 - 2**47 or next_position % 8 != 0:
        return None
    words = struct.unpack_from("<18Q", data, 64)
    if words[5] % 8 != 0 or any(count >= 2**59 for count in (*words[1:5], *words[8:14])):
        return None
    ledger = struct.unpack_from("<19Q", data, 256)
    totals = tuple(zip(ledger[0:16:2], ledger[1:16:2], strict=True))
    losses = []
    for number in range(ledger[18]):
        *parts, last = struct.unpack_from("<5Q", data, 1600 + 40 * number)
        losses.append((*parts, last >> 48, last & (1 << 48) - 1))
    identity = data[514 : 514 + length]
    known = (sequence, epoch, data[24:40], generation, next_position, data[56] == 1, words, identity)
    return Meta(*known, totals, (ledger[16], ledger[17]), losses)


def read_segment(path: Path) -> Segment | None:
    """None: no segment of this version, or there is no room for a record in it."""
    named = re.fullmatch(r"([0-9a-f]{16})-([0-9a-f]{8})-([0-9a-f]{8})\.seg", path.name)
    if named is None or not path.is_file():
        return None
    base, epoch, serial = (int(part, 16) for part in named.groups())
    found = _parsed(base, epoch, path.read_bytes())
    return None if found is None else Segment(path, base, epoch, serial, *found)


_Parsed = tuple["bytes | None", "tuple[int, int, int] | None", "list[Place]", "list[tuple[int, int]]", int]


@lru_cache(maxsize=256)  # tests look at the same bytes again and again
def _parsed(base: int, epoch: int, data: bytes) -> _Parsed | None:
    if base % 8 != 0 or base >= 2**63 - 2**48 or epoch >= 0xFF000000 or len(data) <= SEGMENT_HEADER:
        return None
    header = data[:SEGMENT_HEADER]
    whole = header[:8] == b"CPSSEGM1" and struct.unpack_from("<I", header, 124)[0] == crc32c(header[:124])
    if whole and struct.unpack_from("<I", header, 8)[0] != 1:
        return None
    footer = _footer(data, base, epoch)
    limit = footer[0] if footer is not None else base + (len(data) - SEGMENT_HEADER) // 8 * 8
    places, damage, end = _records(data, base, epoch, limit, footer is not None)
    return header[16:32] if whole else None, footer, places, damage, end


def _footer(data: bytes, base: int, epoch: int) -> tuple[int, int, int] | None:
    footer = data[-FOOTER:]
    if len(data) < SEGMENT_HEADER + FOOTER or footer[:8] != b"CPSFOOT1":
        return None
    its_base, end, messages, size, its_epoch = struct.unpack_from("<QQQQI", footer, 8)
    if struct.unpack_from("<I", footer, 60)[0] != crc32c(footer[:60]) or (its_base, its_epoch) != (base, epoch):
        return None
    is_possible = messages <= size // 8 and size <= end - base == len(data) - SEGMENT_HEADER - FOOTER
    return (end, messages, size) if is_possible else None


def _records(
    data: bytes, base: int, epoch: int, limit: int, is_sealed: bool
) -> tuple[list[Place], list[tuple[int, int]], int]:
    """Rules 1 and 2.  In a sealed file everything up to its end was a record once."""
    places: list[Place] = []
    damage: list[tuple[int, int]] = []
    at = end = base
    while at < limit:
        place = _record(data, SEGMENT_HEADER + at - base, at, epoch, limit)
        # A pad is so short that it is only believed where the chain of records leads to it.
        if place is None or (at != end and place.message is None):
            at += 8
            continue
        if at != end:
            damage.append((end, at))
        places.append(place)
        at = end = at + place.span
    if is_sealed and end < limit:
        damage.append((end, limit))
        end = limit
    return places, damage, end


def _record(data: bytes, offset: int, position: int, epoch: int, limit: int) -> Place | None:
    if limit - position < 8:
        return None
    crc, word = struct.unpack_from("<II", data, offset)
    length = word & ~PAD_BIT
    span = -(-length // 8) * 8
    if span > limit - position:
        return None
    if word & PAD_BIT:
        good = length >= 8 and length % 8 == 0 and crc == crc32c(struct.pack("<IQI", word, position, epoch))
        return Place(position, offset, span, None) if good else None
    if length < 32:
        return None
    (its_position, its_epoch, flags, _, topic_bytes, userdata_bytes) = struct.unpack_from("<QIBBHH", data, offset + 8)
    extras = 8 if flags & 2 else 0
    if its_position != position or its_epoch > epoch or 32 + topic_bytes + userdata_bytes + extras > length:
        return None
    if crc != crc32c(data[offset + 4 : offset + length]):
        return None
    stamp_ms = int.from_bytes(data[offset + 26 : offset + 32], "little")
    topic = data[offset + 32 : offset + 32 + topic_bytes]
    end, properties, ttl_ms = offset + length, b"", 0
    if extras:
        end -= 8
        size, ttl_ms = int.from_bytes(data[end : end + 2], "little"), int.from_bytes(data[end + 2 : end + 8], "little")
        if 32 + topic_bytes + userdata_bytes + 8 + size > length:
            return None
        properties, end = data[end - size : end], end - size
    payload = data[offset + 32 + topic_bytes : end - userdata_bytes]
    userdata = data[end - userdata_bytes : end]
    message = Message(
        position, topic, payload, userdata, bool(flags & 1), its_epoch, stamp_ms, properties, ttl_ms
    )
    return Place(position, offset, span, message)
