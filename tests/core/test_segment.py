"""One segment file: its bytes against a plain encoder, and what is left of it after damage."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest

from .build import load
from .disk import Disk, Record, records
from .plain import pad, record

SPOOL_ID = bytes(range(16))
BASE = 1 << 40
EPOCH, SERIAL = 9, 3
NAME = "0000010000000000-00000009-00000003.seg"
PATH = f"/log/{NAME}"
FILE_BYTES = 4096


def crc(data: bytes) -> int:
    """CRC-32C in plain Python."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def with_crc(raw: bytes, position: int) -> bytes:
    """A record as it lies on the disk: the padding of pads is zero, and the checksum is there."""
    (word,) = struct.unpack_from("<I", raw, 4)
    if word >> 31:
        return struct.pack("<I", crc(raw[4:8] + struct.pack("<QI", position, EPOCH))) + raw[4:8] + bytes(len(raw) - 8)
    return struct.pack("<I", crc(raw[4:word])) + raw[4:]


def some_records() -> list[bytes]:
    """Records as they lie in the ring, a long and two short pads among them."""
    made: list[bytes] = []
    at = BASE
    for kind in (0, 5, "pad 40", 300, 1, "pad 8", 64, 33, "pad 16", 2):
        if isinstance(kind, str):
            made.append(pad(int(kind[4:])))
        else:
            made.append(record(at, b"topic/\xc3\xa4", bytes(i * 7 & 255 for i in range(kind)), b"user"[: kind % 5]))
        at += len(made[-1])
    return made


def on_disk(raw: list[bytes]) -> list[bytes]:
    at, out = BASE, []
    for one in raw:
        out.append(with_crc(one, at))
        at += len(one)
    return out


class Segment:
    """A segment of the C core."""

    def __init__(self, disk: Disk) -> None:
        self.ffi, self.lib, self.disk = disk.ffi, disk.lib, disk
        self.out, self.error = self.ffi.new("cps_segment **"), self.ffi.new("int *")
        self.scan, self.scratch = self.ffi.new("cps_scan *"), self.ffi.new("cps_scratch *")
        self.size, self.span = self.ffi.new("uint64_t *"), self.ffi.new("cps_span *")

    @property
    def c(self) -> Any:
        return self.out[0]

    def create(self, file_bytes: int = FILE_BYTES) -> int:
        identity = self.ffi.new("cps_segment_identity *", {"epoch": EPOCH, "serial": SERIAL, "base": BASE})
        identity.spool_id[0:16] = SPOOL_ID
        return int(self.lib.cps_segment_create(self.disk.io, b"/log", identity, file_bytes, self.out, self.error))

    def append(self, data: bytes) -> int:
        counts = self.ffi.new("uint64_t[2]")
        buffer = self.ffi.new("uint8_t[]", data)
        self.lib.cps_segment_prepare(self.c, buffer, len(data), self.c.end, counts, counts + 1)
        status: int = self.lib.cps_segment_append(self.c, buffer, len(data))
        if status == self.lib.CPS_OK:
            self.c.end += len(data)
            self.c.messages += counts[0]
            self.c.message_bytes += counts[1]
        return status

    def seal(self) -> int:
        return int(self.lib.cps_segment_seal(self.c, self.size))

    def load(self, spool_id: bytes = SPOOL_ID, name: str = NAME) -> int:
        return int(self.lib.cps_segment_load(
            self.disk.io, b"/log", name.encode(), spool_id, self.scratch, self.out, self.scan, self.error
        ))  # fmt: skip

    def read(self, max_bytes: int = 500) -> tuple[list[Record], list[tuple[int, int, int]]]:
        """All messages, and what is lost: first, end, messages."""
        found: list[Record] = []
        lost: list[tuple[int, int, int]] = []
        at, end, span = int(self.c.base), int(self.c.end), self.span
        while at < end:
            status = self.lib.cps_segment_span(self.c, at, end, max_bytes, self.scratch, span, self.error)
            assert status == self.lib.CPS_OK
            assert span.position == at
            if span.size == 0:
                assert at < span.lost_end <= end
                lost.append((at, int(span.lost_end), int(span.lost_messages)))
                at = int(span.lost_end)
            else:
                found += [one for one in records(bytes(self.ffi.buffer(span.bytes, span.size)), at) if not one.is_pad]
                at += span.size
        return found, lost

    def close(self) -> None:
        self.lib.cps_segment_close(self.c)
        self.lib.cps_scratch_close(self.scratch)


def write(disk: Disk, sealed: bool) -> bytes:
    """A segment with some records; its bytes."""
    segment = Segment(disk)
    assert segment.create() == disk.lib.CPS_OK
    raw = some_records()
    assert segment.append(b"".join(raw[:4])) == disk.lib.CPS_OK
    assert segment.append(b"".join(raw[4:])) == disk.lib.CPS_OK
    if sealed:
        assert segment.seal() == disk.lib.CPS_OK
    segment.close()
    return disk.content(PATH)


def look(disk: Disk, data: bytes) -> tuple[int, list[Record], list[tuple[int, int, int]], Any]:
    """What opening and reading these bytes gives; nothing of it may end the process."""
    disk.put(PATH, data)
    segment = Segment(disk)
    status = segment.load()
    found: list[Record] = []
    lost: list[tuple[int, int, int]] = []
    if status == disk.lib.CPS_OK:
        found, lost = segment.read()
        segment.close()
    disk.lib.cps_scratch_close(segment.scratch)
    return status, found, lost, segment.scan


def messages() -> list[Record]:
    return [one for one in records(b"".join(some_records()), BASE) if not one.is_pad]


def test_the_file_has_exactly_the_bytes_of_the_format(disk: Disk) -> None:
    data = write(disk, True)
    body = b"".join(on_disk(some_records()))
    assert data[128 : 128 + len(body)] == body
    head = struct.unpack("<8sII16s16sIIQQQ", data[:80])
    assert head[:4] == (b"CPSSEGM1", 1, 128, SPOOL_ID) and head[5:8] == (EPOCH, SERIAL, BASE)
    assert data[80:124] == bytes(44) and struct.unpack("<I", data[124:128]) == (crc(data[:124]),)
    spans = sum(one.span for one in messages())
    foot = struct.pack("<8sQQQQI16x", b"CPSFOOT1", BASE, BASE + len(body), len(messages()), spans, EPOCH)
    assert data[128 + len(body) :] == foot + struct.pack("<I", crc(foot))


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("max_bytes", [1, 100, 1 << 20])
def test_what_was_written_is_read(disk: Disk, sealed: bool, max_bytes: int) -> None:
    data = write(disk, sealed)
    assert (len(data) == FILE_BYTES) is not sealed
    segment = Segment(disk)
    assert segment.load() == disk.lib.CPS_OK
    assert segment.c.sealed == sealed and segment.c.messages == len(messages())
    assert segment.scan.torn_bytes == segment.scan.damaged_ranges == 0
    assert segment.read(max_bytes) == (messages(), [])
    segment.close()


@pytest.mark.parametrize("sealed", [True, False])
def test_each_flipped_byte_costs_at_most_its_own_record(disk: Disk, sealed: bool) -> None:
    data = write(disk, sealed)
    raw = on_disk(some_records())
    end = 128 + sum(map(len, raw))
    owner: list[int] = []
    for number, one in enumerate(raw):
        owner += [number] * len(one)
    for at in range(len(data) if sealed else end + 64):
        status, found, lost, scan = look(disk, data[:at] + bytes([data[at] ^ 0x81]) + data[at + 1 :])
        if 16 <= at < 32 and status == disk.lib.CPS_UNKNOWN:
            raise AssertionError("a damaged spool id hides the records")
        assert status == disk.lib.CPS_OK, at
        hit = raw[owner[at - 128]] if 128 <= at < end else b""
        is_pad = bool(hit) and hit[7] >> 7 == 1
        start = BASE + sum(map(len, raw[: owner[at - 128]])) if hit else -1
        inside = hit and at - 128 - (start - BASE) < (8 if is_pad else struct.unpack_from("<I", hit, 4)[0])
        gone = [] if is_pad or not inside else [start]
        assert [one.position for one in found] == [one.position for one in messages() if one.position not in gone], at
        is_tail = bool(gone) and owner[at - 128] == len(raw) - 1
        if inside and not (is_tail and not sealed):
            assert [(first, count) for first, _, count in lost] == [(start, 1)], at
        elif not sealed and is_tail:
            assert lost == [] and scan.torn_bytes > 0


@pytest.mark.parametrize("sealed", [True, False])
def test_each_truncation_leaves_the_whole_records_before_it(disk: Disk, sealed: bool) -> None:
    data = write(disk, sealed)
    for size in range(128 + sum(map(len, some_records())), -1, -1):
        status, found, lost, _ = look(disk, data[:size])
        whole = [one for one in messages() if 128 + one.end - BASE <= size]
        assert found == whole and lost == [], size
        assert status in (disk.lib.CPS_OK, disk.lib.CPS_EMPTY)


def test_damage_before_valid_records_is_told_apart_from_a_torn_tail(disk: Disk) -> None:
    data = bytearray(write(disk, False))
    end = 128 + sum(map(len, some_records()))
    data[end : end + 20] = b"\xff" * 20
    _, found, lost, scan = look(disk, bytes(data))
    assert found == messages() and lost == []
    assert scan.damaged_ranges == 0 and scan.torn_bytes == 24  # in steps of 8
    data[200] ^= 1
    _, found, lost, scan = look(disk, bytes(data))
    assert len(lost) == scan.damaged_ranges == 1 and scan.damaged_bytes == lost[0][1] - lost[0][0]


def test_a_hole_of_many_records_is_counted_as_one_range(disk: Disk) -> None:
    data = bytearray(write(disk, True))
    raw = some_records()
    start = 128 + len(raw[0])
    data[start : start + sum(map(len, raw[1:7]))] = bytes(sum(map(len, raw[1:7])))
    _, found, lost, _ = look(disk, bytes(data))
    assert [(first, end) for first, end, _ in lost] == [(BASE + len(raw[0]), BASE + sum(map(len, raw[:7])))]
    first, end, _ = lost[0]
    assert [one.position for one in found] == [one.position for one in messages() if not first <= one.position < end]


def test_a_file_without_a_header_is_read_by_its_name(disk: Disk) -> None:
    data = write(disk, True)
    assert look(disk, bytes(128) + data[128:])[1] == messages()


def test_a_file_of_another_spool_is_left_alone(disk: Disk) -> None:
    write(disk, True)
    segment = Segment(disk)
    assert segment.load(bytes(16)) == disk.lib.CPS_UNKNOWN
    assert disk.names("/log/") == [PATH]


@pytest.mark.parametrize(
    "name", ["x.seg", "0000010000000000-00000009-0000000g.seg", "0000010000000001-00000009-00000003.seg"]
)
def test_a_foreign_name_is_left_alone(disk: Disk, name: str) -> None:
    disk.put(f"/log/{name}", write(disk, True))
    assert Segment(disk).load(name=name) == disk.lib.CPS_UNKNOWN


@pytest.mark.parametrize("payload", [300, 3700, 4096 - 128 - 32 - 8])
def test_a_file_that_a_failed_write_cut_off_counts_for_what_it_takes_when_sealed(disk: Disk, payload: int) -> None:
    """Else sealing it after a restart would go beyond the quota."""
    segment = Segment(disk)
    assert segment.create(8192) == disk.lib.CPS_OK
    assert segment.append(record(BASE, b"t", bytes(payload), b"")) == disk.lib.CPS_OK
    disk.fail("WRITE", errno.EIO)
    assert segment.append(record(int(segment.c.end), b"t", bytes(300), b"")) == disk.lib.CPS_IO
    segment.close()
    again = Segment(disk)
    assert again.load() == disk.lib.CPS_OK
    counted = int(again.c.file_bytes)
    assert again.seal() == disk.lib.CPS_OK
    assert len(disk.content(PATH)) <= again.size[0] <= counted


def test_a_file_with_nothing_in_it_goes(disk: Disk) -> None:
    segment = Segment(disk)
    assert segment.create() == disk.lib.CPS_OK
    segment.close()
    assert Segment(disk).load() == disk.lib.CPS_EMPTY
    assert disk.names("/log/") == []


@pytest.mark.parametrize(
    ("kind", "error"), [("CREATE", errno.EACCES), ("ALLOCATE", errno.ENOSPC), ("WRITE", errno.EIO)]
)
def test_a_segment_that_cannot_be_made_leaves_no_file(disk: Disk, kind: str, error: int) -> None:
    disk.fail("OPEN" if kind == "CREATE" else kind, error)
    segment = Segment(disk)
    assert segment.create() == disk.lib.CPS_IO and segment.error[0] == error
    assert disk.names("/log/") == []


def test_a_failed_write_poisons_the_segment_and_is_cut_off(disk: Disk) -> None:
    segment = Segment(disk)
    assert segment.create() == disk.lib.CPS_OK
    first, second = some_records()[:2]
    assert segment.append(first) == disk.lib.CPS_OK
    disk.fail("WRITE", errno.EIO)
    assert segment.append(second) == disk.lib.CPS_IO
    assert segment.append(second) == segment.seal() == disk.lib.cps_segment_sync(segment.c) == disk.lib.CPS_IO
    assert segment.c.error == errno.EIO
    assert len(disk.content(PATH)) == 128 + len(first)
    segment.close()


def test_a_file_that_was_shortened_while_it_is_read_is_damage(disk: Disk) -> None:
    data = write(disk, True)
    segment = Segment(disk)
    assert segment.load() == disk.lib.CPS_OK
    assert segment.read(1)[1] == []
    assert disk.lib.sim_resize(disk.c, PATH.encode(), 300) == disk.lib.CPS_OK
    found, lost = segment.read()
    assert found == [one for one in messages() if 128 + one.end - BASE <= 300] and len(lost) == 1
    segment.close()
    assert len(data) > 300


def test_a_trimmed_segment_keeps_what_lies_before(disk: Disk) -> None:
    write(disk, False)
    segment = Segment(disk)
    assert segment.load() == disk.lib.CPS_OK
    keep = messages()[:3]
    status = disk.lib.cps_segment_trim(segment.c, keep[-1].end, segment.scratch, segment.error)
    assert status == disk.lib.CPS_OK
    assert segment.c.end == keep[-1].end and segment.c.messages == 3
    assert segment.read() == (keep, [])
    segment.close()


def seal_and_cut(nth: int, seed: int) -> bool:
    """The power goes at the n-th call while several pages are sealed.  Returns whether it did."""
    disk = Disk()
    segment = Segment(disk)
    assert segment.create(1 << 16) == disk.lib.CPS_OK
    at, raw = BASE, []
    for number in range(40):
        raw.append(record(at, b"topic", bytes([number + 1]) * 900, b""))
        at += len(raw[-1])
    assert segment.append(b"".join(raw)) == disk.lib.CPS_OK
    assert disk.io.sync_directory(disk.io.context, b"/log", segment.error) == disk.lib.CPS_OK
    disk.lib.sim_cut(disk.c, nth)
    segment.seal()
    was_cut = bool(disk.lib.sim_is_cut(disk.c))
    segment.close()
    disk.lib.sim_cut(disk.c, 0)
    disk.lib.sim_restart(disk.c, True, seed)
    after = Segment(disk)
    if after.load() == disk.lib.CPS_OK:
        found, lost = after.read(1 << 16)
        if after.c.sealed:
            assert (len(found), lost) == (len(raw), []), "there is a footer, and not what it speaks of"
        after.close()
    else:
        disk.lib.cps_scratch_close(after.scratch)
    disk.close()
    return was_cut


def test_a_footer_is_there_only_after_all_that_it_speaks_of() -> None:
    nth = 1
    while any([seal_and_cut(nth, seed) for seed in range(40)]):
        nth += 1
    assert nth > 3


def test_no_plain_checksum_agrees_by_chance() -> None:
    _, lib = load()
    assert lib.cps_crc32c(0, b"some bytes", 10) == crc(b"some bytes")
