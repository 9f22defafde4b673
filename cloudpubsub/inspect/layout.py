"""The bytes of a spool, as docs/format.md gives them: decoding and encoding.  Knows no files."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from cloudpubsub._spool import crc32c

__all__ = [
    "ALIGN",
    "FOOTER_BYTES",
    "HEADER_BYTES",
    "LEDGER_WORDS",
    "LOSSES_MAX",
    "META_SLOT_BYTES",
    "PAD",
    "POSITION_BLOCK",
    "REASONS",
    "RECORD",
    "RECORD_HEADER_BYTES",
    "RECORD_LENGTH_MAX",
    "Footer",
    "Header",
    "Ledger",
    "Loss",
    "Message",
    "Meta",
    "Produced",
    "SegmentName",
    "Settled",
    "backlog",
    "decode_ledger",
    "looks_like_footer",
    "message_of",
    "pad_crc",
    "reason_name",
    "settled_of",
]

ALIGN = 8
RECORD_HEADER_BYTES = 32
RECORD_LENGTH_MAX = 1 << 28
EXTRAS = 2  # in the flags: properties and 8 bytes more stand at the end
EXTRAS_BYTES = 8
PAD = 1 << 31  # in the word that holds the length
HEADER_BYTES = 128
FOOTER_BYTES = 64
META_SLOT_BYTES = 4096
IDENTITY_MAX = 1024
POSITION_BLOCK = 1 << 40  # positions are reserved in blocks of this many

#: CRC, length, position, epoch, flags, 0, topic, userdata, stamp (low 16 bits, high 32 bits).
RECORD = struct.Struct("<IIQIBBHHHI")
_EXTRAS = struct.Struct("<HHI")  # length of the properties, time to live (low 16 bits, high 32 bits)
_PAD_KNOWN = struct.Struct("<IQI")
_HEADER = struct.Struct("<8sII16s16sIIQQQ44xI")
_FOOTER = struct.Struct("<8sQQQQI16xI")
_META = struct.Struct("<8sIIQ16sQQB7x5Q13Q")
_NAME = re.compile(r"([0-9a-fA-F]{16})-([0-9a-fA-F]{8})-([0-9a-fA-F]{8})\.seg")

_SEGMENT_MAGIC = b"CPSSEGM1"
_FOOTER_MAGIC = b"CPSFOOT1"
_META_MAGIC = b"CPSMETA1"
_VERSION = 1
_POSITION_MAX = 2**63 - 2**48  # what bounds names and meta files; see docs/format.md
_NEXT_POSITION_MAX = 2**63 - 2**47
_LAST_EPOCH_MAX = 0xFE000000
_EPOCH_MAX = 0xFF000000
_COUNT_MAX = 2**59

#: Why messages ended without an acknowledgement, by code.
REASONS = (
    "spool limit reached, oldest dropped",
    "memory full and no storage, oldest dropped",
    "full, newest dropped",
    "damaged on disk",
    "unreadable on disk",
    "expired",
)


def reason_name(code: int) -> str:
    return REASONS[code] if code < len(REASONS) else f"reason {code}"


# ---- records


class Message(NamedTuple):
    """The parts of one record."""

    position: int
    topic: bytes
    payload: bytes
    userdata: bytes
    retain: bool
    epoch: int
    stamp_ms: int  # CLOCK_BOOTTIME of the boot in which it was published
    properties: bytes  # of MQTT 5, as they are sent
    ttl_ms: int  # 0: it lives for ever


def message_of(raw: memoryview) -> Message:
    """The parts of a record that is known to be valid; `raw` is as long as the record, without padding."""
    _, length, position, epoch, flags, _, topic_bytes, userdata_bytes, low, high = RECORD.unpack_from(raw)
    topic_end = RECORD_HEADER_BYTES + topic_bytes
    properties_end = length - (EXTRAS_BYTES if flags & EXTRAS else 0)
    properties_bytes, ttl_low, ttl_high = _EXTRAS.unpack_from(raw, properties_end) if flags & EXTRAS else (0, 0, 0)
    userdata_end = properties_end - properties_bytes
    payload_end = userdata_end - userdata_bytes
    return Message(
        position,
        bytes(raw[RECORD_HEADER_BYTES:topic_end]),
        bytes(raw[topic_end:payload_end]),
        bytes(raw[payload_end:userdata_end]),
        bool(flags & 1),
        epoch,
        low | high << 16,
        bytes(raw[userdata_end:properties_end]),
        ttl_low | ttl_high << 16,
    )


def parts_fit(header: memoryview, offset: int = 0) -> bool:
    """Whether the parts that a record's header names are not longer than the record."""
    _, length, _, _, flags, _, topic_bytes, userdata_bytes, _, _ = RECORD.unpack_from(header, offset)
    extras_bytes = EXTRAS_BYTES if flags & EXTRAS else 0
    return bool(RECORD_HEADER_BYTES + topic_bytes + userdata_bytes + extras_bytes <= length)


def extras_fit(raw: memoryview) -> bool:
    """The same with the properties, of a record that is there whole, without padding."""
    _, length, _, _, flags, _, topic_bytes, userdata_bytes, _, _ = RECORD.unpack_from(raw)
    if not flags & EXTRAS:
        return True
    properties_bytes = _EXTRAS.unpack_from(raw, length - EXTRAS_BYTES)[0]
    return bool(RECORD_HEADER_BYTES + topic_bytes + userdata_bytes + properties_bytes + EXTRAS_BYTES <= length)


def pad_crc(length_word: int, position: int, epoch: int) -> int:
    """What a pad must carry in a segment of `epoch`."""
    return crc32c(_PAD_KNOWN.pack(length_word, position, epoch))


# ---- segments


class SegmentName(NamedTuple):
    base: int
    epoch: int
    serial: int

    @classmethod
    def parse(cls, name: str) -> SegmentName | None:
        """None: no segment is called that."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        base, epoch, serial = (int(part, 16) for part in found.groups())
        is_ours = base % ALIGN == 0 and base < _POSITION_MAX and epoch < _EPOCH_MAX
        return cls(base, epoch, serial) if is_ours else None

    def __str__(self) -> str:
        return f"{self.base:016x}-{self.epoch:08x}-{self.serial:08x}.seg"


class Header(NamedTuple):
    """The first 128 bytes of a segment."""

    version: int
    spool_id: bytes
    boot_id: bytes
    epoch: int
    serial: int
    base: int
    wall_ms: int
    boottime_ms: int

    @classmethod
    def decode(cls, data: bytes) -> Header | None:
        """None: it is not whole."""
        if len(data) < HEADER_BYTES:
            return None
        magic, version, _, spool_id, boot_id, epoch, serial, base, wall_ms, boottime_ms, crc = _HEADER.unpack_from(data)
        if magic != _SEGMENT_MAGIC or crc != crc32c(data[: HEADER_BYTES - 4]):
            return None
        return cls(version, spool_id, boot_id, epoch, serial, base, wall_ms, boottime_ms)

    def encode(self) -> bytes:
        parts = (_SEGMENT_MAGIC, self.version, HEADER_BYTES, *self[1:])
        return _sealed(_HEADER.pack(*parts, 0))


class Footer(NamedTuple):
    """The last 64 bytes of a sealed segment."""

    base: int
    end: int
    messages: int
    message_bytes: int
    epoch: int

    @classmethod
    def decode(cls, data: bytes) -> Footer | None:
        """None: it is not whole."""
        if len(data) != FOOTER_BYTES:
            return None
        magic, base, end, messages, message_bytes, epoch, crc = _FOOTER.unpack(data)
        if magic != _FOOTER_MAGIC or crc != crc32c(data[: FOOTER_BYTES - 4]):
            return None
        return cls(base, end, messages, message_bytes, epoch)

    def encode(self) -> bytes:
        return _sealed(_FOOTER.pack(_FOOTER_MAGIC, *self, 0))

    def fits(self, name: SegmentName, file_bytes: int) -> bool:
        """Is it the footer of a file of this name and size?"""
        data_bytes = file_bytes - HEADER_BYTES - FOOTER_BYTES
        is_possible = self.message_bytes <= data_bytes and self.messages <= self.message_bytes // ALIGN
        return is_possible and (self.base, self.epoch, self.end) == (name.base, name.epoch, name.base + data_bytes)


def looks_like_footer(data: bytes, name: SegmentName) -> bool:
    """Are these 64 bytes, which are no valid footer, what is left of one?  Then the file was sealed once."""
    if len(data) != FOOTER_BYTES or not any(data):
        return False
    magic, base, end, messages, message_bytes, epoch, crc = _FOOTER.unpack(data)
    hints = (
        magic == _FOOTER_MAGIC,
        crc == crc32c(data[: FOOTER_BYTES - 4]),
        base == name.base,
        epoch == name.epoch,
        0 <= end - name.base < 1 << 40 and 0 < message_bytes <= end - name.base and messages <= message_bytes,
    )
    return hints.count(True) >= 3


def _sealed(data: bytes) -> bytes:
    """`data` with its last four bytes made the CRC of those before."""
    return data[:-4] + struct.pack("<I", crc32c(data[:-4]))


# ---- cursors, counters, losses


class Produced(NamedTuple):
    """By producers; bytes are record spans, as in positions."""

    published: int  # cursor
    messages: int  # refused ones included
    bytes: int
    refused: int
    refused_bytes: int


class Ahead(NamedTuple):
    """A range of positions `[first, end)` that is settled though the head has not come there."""

    first: int
    end: int
    sent: int  # up to there it was handed to a connection


class Settled(NamedTuple):
    """By readers and the flusher."""

    head: int  # cursors
    spilled: int
    sent_max: int
    acked_messages: int
    acked_bytes: int
    dropped_messages: int
    dropped_bytes: int
    dead_messages: int
    dead_bytes: int
    victims: tuple[int, int, int, int]  # bases, plus 1, of files that were dropped and may not be removed yet; 0: none
    ahead: tuple[Ahead, ...] = ()  # rising

    def pending_from(self, position: int) -> int:
        """Where from `position` on the first that is not settled stands."""
        position = max(position, self.head)
        for one in self.ahead:
            if one.first <= position < one.end:
                position = one.end
        return position

    def tamed(self, limit: int) -> Settled:
        """Without ranges that cannot be: those of a log rise from the head to `limit`."""
        at = self.head
        for one in self.ahead:
            if not at <= one.first < one.end <= one.sent <= limit or any(place % ALIGN for place in one):
                return self._replace(ahead=())
            at = one.end
        return self


def backlog(produced: Produced, settled: Settled) -> tuple[int, int]:
    """Messages that are still to be settled, and their bytes."""
    ended = produced.refused + settled.acked_messages + settled.dropped_messages + settled.dead_messages
    ended_bytes = produced.refused_bytes + settled.acked_bytes + settled.dropped_bytes + settled.dead_bytes
    return produced.messages - ended, produced.bytes - ended_bytes


class Loss(NamedTuple):
    """Messages that ended without an acknowledgement, all in `[first, end)`."""

    first: int
    end: int
    messages: int
    bytes: int
    reason: int
    time_ms: int  # wall clock


LEDGER_WORDS = 329
LOSSES_MAX = 62


class Ledger(NamedTuple):
    """All losses: totals for each reason, and the entries there was room for."""

    totals: tuple[tuple[int, int], ...]  # messages, bytes; by reason code
    uncertain: tuple[int, int] | None  # positions that may be counted wrongly
    losses: tuple[Loss, ...]

    def plus(self, loss: Loss) -> Ledger:
        """With one more loss.  Where there is no room, the two oldest of one reason become one."""
        totals = list(self.totals)
        messages, size = totals[loss.reason]
        totals[loss.reason] = messages + loss.messages, size + loss.bytes
        losses = list(self.losses)
        if len(losses) == LOSSES_MAX:
            _merge_oldest(losses)
        return Ledger(tuple(totals), self.uncertain, (*losses, loss))


def _merge_oldest(losses: list[Loss]) -> None:
    first_of: dict[int, int] = {}
    for i, loss in enumerate(losses):
        if loss.reason in first_of:
            other = losses[first_of[loss.reason]]
            losses[first_of[loss.reason]] = Loss(
                min(loss.first, other.first),
                max(loss.end, other.end),
                loss.messages + other.messages,
                loss.bytes + other.bytes,
                loss.reason,
                max(loss.time_ms, other.time_ms),
            )
            del losses[i]
            return
        first_of[loss.reason] = i


_EMPTY_LEDGER = Ledger(((0, 0),) * 8, None, ())
_TOTAL_REASONS = 8
_LOSS_WORDS = 5
_TIME_BITS = 48


AHEAD_MAX = 6


def settled_of(words: tuple[int, ...], ahead: tuple[Ahead, ...] = ()) -> Settled:
    """From its 13 words, and the ranges that were settled ahead."""
    return Settled._make((*words[:9], words[9:13], ahead))


def decode_ledger(words: tuple[int, ...]) -> Ledger:
    """From its words: 16 of totals, 2 of the uncertain range, the number of entries, and the entries."""
    totals = tuple((words[2 * i], words[2 * i + 1]) for i in range(_TOTAL_REASONS))
    first, end, count = words[16:19]
    losses = []
    for i in range(count if count <= LOSSES_MAX else 0):
        at = 19 + _LOSS_WORDS * i
        *parts, last = words[at : at + _LOSS_WORDS]
        losses.append(Loss._make((*parts, last >> _TIME_BITS, last & (1 << _TIME_BITS) - 1)))
    return Ledger(totals, (first, end) if first or end else None, tuple(losses))


def _ledger_words(ledger: Ledger) -> list[int]:
    words = [word for total in ledger.totals for word in total]
    words += [*(ledger.uncertain or (0, 0)), len(ledger.losses)]
    for loss in ledger.losses:
        words += [*loss[:4], loss.reason << _TIME_BITS | loss.time_ms]
    return words + [0] * (LEDGER_WORDS - len(words))


# ---- the meta file

_AT_AHEAD_SENT, _AT_LEDGER, _AT_AHEAD, _AT_IDENTITY, _AT_LOSSES = 208, 256, 416, 512, 1600
_LEDGER_HEAD_WORDS = 19


def _decode_ahead(slot: bytes) -> tuple[Ahead, ...]:
    ends = struct.unpack_from(f"<{2 * AHEAD_MAX}Q", slot, _AT_AHEAD)
    sent = struct.unpack_from(f"<{AHEAD_MAX}Q", slot, _AT_AHEAD_SENT)
    found = [Ahead(ends[2 * i], ends[2 * i + 1], sent[i]) for i in range(AHEAD_MAX)]
    return tuple(takewhile(lambda one: one.end != 0, found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """One slot of the meta file."""

    epoch: int
    sequence: int
    spool_id: bytes
    generation: int
    next_position: int
    clean: bool
    produced: Produced
    settled: Settled
    identity: bytes
    ledger: Ledger = _EMPTY_LEDGER

    @classmethod
    def decode(cls, slot: bytes) -> Meta | None:
        """None: it is not whole.  Raises ValueError if it is, and of a version that is not known here."""
        if len(slot) != META_SLOT_BYTES:
            return None
        magic, version, epoch, sequence, spool_id, generation, next_position, clean, *words = _META.unpack_from(slot)
        (identity_bytes,) = struct.unpack_from("<H", slot, _AT_IDENTITY)
        (crc,) = struct.unpack_from("<I", slot, META_SLOT_BYTES - 4)
        if magic != _META_MAGIC or crc != crc32c(slot[: META_SLOT_BYTES - 4]):
            return None
        if version != _VERSION:
            raise ValueError(f"format version {version} is not known")
        is_possible = next_position < _NEXT_POSITION_MAX and next_position % ALIGN == words[5] % ALIGN == 0
        is_possible = is_possible and all(count < _COUNT_MAX for count in (*words[1:5], *words[8:14]))
        if identity_bytes > IDENTITY_MAX or epoch >= _LAST_EPOCH_MAX or not is_possible:
            return None
        ledger_words = struct.unpack_from(f"<{_LEDGER_HEAD_WORDS}Q", slot, _AT_LEDGER) + struct.unpack_from(
            f"<{LEDGER_WORDS - _LEDGER_HEAD_WORDS}Q", slot, _AT_LOSSES
        )
        return cls(
            epoch=epoch,
            sequence=sequence,
            spool_id=spool_id,
            generation=generation,
            next_position=next_position,
            clean=clean != 0,
            produced=Produced(*words[:5]),
            settled=settled_of(tuple(words[5:]), _decode_ahead(slot)).tamed(next_position),
            identity=slot[_AT_IDENTITY + 2 : _AT_IDENTITY + 2 + identity_bytes],
            ledger=decode_ledger(ledger_words),
        )

    def encode(self) -> bytes:
        slot = bytearray(META_SLOT_BYTES)
        settled = (*self.settled[:9], *self.settled.victims)
        head = (_META_MAGIC, _VERSION, self.epoch, self.sequence, self.spool_id, self.generation, self.next_position)
        _META.pack_into(slot, 0, *head, self.clean, *self.produced, *settled)
        for i, one in enumerate(self.settled.ahead):
            struct.pack_into("<QQ", slot, _AT_AHEAD + 16 * i, one.first, one.end)
            struct.pack_into("<Q", slot, _AT_AHEAD_SENT + 8 * i, one.sent)
        words = _ledger_words(self.ledger)
        struct.pack_into(f"<{_LEDGER_HEAD_WORDS}Q", slot, _AT_LEDGER, *words[:_LEDGER_HEAD_WORDS])
        struct.pack_into(f"<H{len(self.identity)}s", slot, _AT_IDENTITY, len(self.identity), self.identity)
        struct.pack_into(f"<{len(words) - _LEDGER_HEAD_WORDS}Q", slot, _AT_LOSSES, *words[_LEDGER_HEAD_WORDS:])
        return _sealed(bytes(slot))
