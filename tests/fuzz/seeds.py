"""Make the inputs that fuzzing starts from: real files of real logs, described ones, and packets of every kind.

    python -m tests.fuzz.seeds build/fuzz/seeds

writes ``recovery`` and ``stream`` below the directory.  The corpus in the repository is what is left of these and of
what long runs found, with one input for each edge of the library's code:

    for target in recovery stream; do
        mkdir -p build/fuzz/merged/$target
        build/fuzz/fuzz_$target -merge=1 -use_counters=0 build/fuzz/merged/$target \\
            tests/fuzz/corpus/$target build/fuzz/seeds/$target build/fuzz/corpus/$target
    done

``files.h`` says what the bytes of a recovery input mean, ``fuzz_stream.c`` those of the other.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.core.disk import Disk, Log
from tests.core.plain import packet, puback, publish

META, META_RAW, SEGMENT, SEGMENT_RAW, DAMAGE, CUT, NAME, FOLDER = range(8)
SLOT_BYTES = 4096
DIRECTORY = "/spool/log/"


# ---- recovery ----


def options(*chosen: int) -> bytes:
    """Durability and policies, sizes, the share that is settled, appends, what else is done."""
    return bytes(chosen).ljust(8, b"\0")


def place(near: int, steps: int = 0) -> bytes:
    return struct.pack("<Bh", near, steps)


def at(position: int) -> bytes:
    return place(6) + struct.pack("<Q", position)


def raw_meta(data: bytes, mend: bool) -> bytes:
    """Both slots of a meta file as they are."""
    out = b""
    for slot in range(2):
        body = data[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
        if mend:
            body = body[:-4]
        body = body.rstrip(b"\0")
        out += struct.pack("<BBH", META_RAW, slot | mend << 1, len(body)) + body
    return out


def raw_segment(name: str, data: bytes, mend: int) -> bytes:
    base, epoch, serial = (int(part, 16) for part in name.removesuffix(".seg").split("-"))
    body = data.rstrip(b"\0")
    head = struct.pack("<BB", epoch, serial) + struct.pack("<BHH", mend, len(data), len(body))
    return bytes([SEGMENT_RAW]) + at(base) + head + body


def spool(disk: Disk, mend: int) -> bytes:
    """All files of a spool on the simulated disk; `mend`: their checksums are made right after every mutation."""
    out = raw_meta(disk.content("/spool/meta"), mend != 0)
    for path in disk.names(DIRECTORY):
        out += raw_segment(path.removeprefix(DIRECTORY), disk.content(path), mend)
    return out


def real_spools() -> Iterator[bytes]:
    """Spools as a close, a kill and a power cut leave them."""
    for end in ("close", "kill", "cut"):
        disk = Disk()
        log = Log(disk, segment_bytes=4096, spill_after_ms=0)
        for i in range(24):
            assert log.append(bytes([i]) * (i * 13 % 200), b"a/b", b"u" * (i % 3)) >= 0
            if i == 11:
                log.settle(log.drain()[:5])
        log.ok(log.lib.cps_log_wait_synced(log.c, (1 << 63) - 1, 10_000))
        for i in range(9):
            assert log.append(bytes([i]) * 30, b"c") >= 0
        log.until(lambda log=log: log.stats().settled.spilled == log.stats().produced.published)
        if end == "close":
            log.close()
        elif end == "kill":
            log.kill()
        else:
            log.cut(1)
        for mend in (0, 2, 6):
            yield spool(disk, mend)
        disk.close()


def message(payload: int, kind: int = 0, topic: int = 3, more: bytes = b"") -> bytes:
    return bytes([kind, topic, payload]) + more


def segment(
    where: bytes, records: list[bytes], *, epoch: int = 2, serial: int = 0, how: int = 0, tail: bytes = b"\4"
) -> bytes:
    return bytes([SEGMENT]) + where + bytes([epoch, serial, how, len(records)]) + b"".join(records) + tail


def meta(
    next_: bytes, head: bytes, *, how: int = 0, epoch: int = 3, counts: tuple[int, ...] = (5, 0, 0, 0, 4)
) -> bytes:
    return bytes([META, how, epoch, 7, 9]) + next_ + bytes(counts) + head + place(0) + place(0)


def described_spools() -> Iterator[bytes]:
    good = [message(n * 7 % 90) for n in range(12)]
    long = [message(200, 0x08) for _ in range(4)]
    pad, gap, large_gap = b"\3\6", b"\x15\xff", b"\x7f\0"
    damaged, wrong = message(30, 4, more=b"\x28\1"), message(30, 6, more=b"\3\1")
    start, behind = place(3, 0), place(1)
    clean = meta(place(3, 1000), place(3, 0), how=8)
    sealed = {"how": 0x0C, "tail": b""}
    yield segment(start, good)
    yield clean + segment(start, good, **sealed)
    middle = segment(behind, good, serial=1, **sealed)
    yield clean + segment(start, good, **sealed) + middle + segment(behind, long, serial=2)
    yield clean + segment(start, good, **sealed) + segment(place(1, 20), [pad, *good, pad], serial=1)
    yield clean + segment(start, [*good[:4], damaged, *good[:4], wrong, *good[:2]], **sealed)
    yield segment(start, [*good[:4], damaged, gap, *good[:4], wrong, large_gap, *good[:2]])
    yield segment(start, [*good[:2], *[large_gap] * 5, *good[:2]], **sealed)
    yield segment(start, good) + segment(place(2), good[:5], serial=1)  # a second try of the same records
    yield segment(start, good) + segment(place(2), [*good, *long], serial=1, **sealed)
    yield segment(start, long, **sealed) + segment(place(1, -26), long, epoch=3)
    yield segment(start, good, how=1, tail=b"\4") + segment(behind, good, how=0x10)  # a lost header, this boot
    yield segment(start, good, how=2) + segment(behind, good)  # a foreign file
    yield segment(start, good, how=4, tail=b"\x50") + segment(behind, [], tail=b"\0") + segment(behind, good, serial=2)
    yield segment(start, good, how=8, tail=b"\1") + bytes([DAMAGE, 200, 0, 1])
    yield segment(start, good) + bytes([CUT, 60, 0]) + segment(behind, good, serial=3) + bytes([CUT, 9, 0x80])
    yield segment(start, good) + bytes([NAME, 40]) + b"0000010000000000-00000002-00000000.SEG.x"
    yield segment(start, good) + bytes([FOLDER]) + behind + bytes([2, 1]) + segment(behind, good)
    yield clean + meta(place(3, 500), place(3, 9), how=1, counts=(0, 1, 2, 3, 4)) + segment(start, good)
    yield clean + meta(place(3, 500), place(3, 9), how=3) + segment(start, good)
    yield meta(place(3, 2000), place(3, 5), how=0x19) + segment(start, good)
    yield meta(place(3, -2000), place(3, 5), how=0x21) + segment(start, good)
    yield meta(place(4, 0), place(4, 0)) + segment(place(4, -600), good)


def recovery_seeds() -> Iterator[bytes]:
    chosen = [
        options(0x04, 0x02, 128, 5, 0), options(0x05, 0x4B, 255, 9, 7), options(0x84, 0x03, 64, 40, 9),
        options(0x26, 0x90, 0, 0, 2), options(0x65, 0x06, 200, 3, 0x0F), options(0x9D, 0x3A, 128, 70, 5),
    ]  # fmt: skip
    for i, body in enumerate((*real_spools(), *described_spools())):
        yield chosen[i % len(chosen)] + body
        yield chosen[(i + 2) % len(chosen)] + body


# ---- streams ----


def broker_bytes(level: int) -> Iterator[bytes]:
    five = level == 5
    connack = packet(0x20, b"\x01\x00" + (b"\x03\x21\x00\x14" if five else b""))
    some = b"\x26\x00\x01a\x00\x01b" if five else b""
    acks = b"".join(puback(i) for i in range(1, 40))
    others = b"\x50\x02\x00\x09\x62\x02\x00\x09\x70\x02\x00\x09\x90\x03\x00\x0a\x01\xb0\x02\x00\x0b\xd0\x00"
    publishes = b"".join(
        publish(topic, payload, 77, qos=qos, dup=qos & 1, retain=len(topic) & 1, level=level, properties=some)
        for topic, payload, qos in ((b"t", b"", 0), (b"a/b", b"hello", 1), (b"c" * 40, b"p" * 300, 1), (b"q2", b"x", 2))
    )
    yield connack + acks
    yield connack + acks[:40] + publishes + acks[40:] + others + b"\xe0\x00"
    yield connack + b"".join(puback(i) for i in (3, 2, 9, 1, 1, 4, 200, 5)) + b"\xd0\x00" + acks
    yield publishes + others + packet(0x20, b"\x00\x05")
    yield acks + b"\x40\x02\x00\x00"  # no packet has id 0
    yield connack + b"\x30\xff\xff\xff\x7f" + acks  # larger than anything may be
    yield connack + b"\x30\xff\xff\xff\xff\x01"  # no length
    yield publish(b"", b"x", 5, level=level, properties=b"") + acks
    if five:
        yield connack + puback(7, 0x10) + puback(8, 0x97, 0) + puback(9, 0x87, 4, 0x1F, 0, 1, 65) + acks
        yield acks + b"\xe0\x01\x8e" + b"\xe0\x02\x8b\x00" + b"\xf0\x02\x18\x00"
        yield puback(3, 0, 0x80, 0x80, 0x80, 0x80, 1) + publish(b"t", b"", 1, level=5, properties=b"")[:-1]


def stream_seeds() -> Iterator[bytes]:
    for level in (4, 5):
        for i, body in enumerate(broker_bytes(level)):
            for breaks in (0, 4):
                shape = (level == 5) | 2 | breaks | (i % 8) << 4
                sizes = i % 3 | ((i + breaks) % 4) << 2
                first = (1, 65530)[i % 2]
                head = bytes([shape, sizes, (60, 5, 127)[i % 3], (15, 200)[i % 2]])
                yield head + struct.pack("<HHHH", 1000 + i, first, 4096, (0, 3000)[i % 2]) + body


def write(directory: Path, seeds: Iterator[bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (directory / hashlib.sha1(seed).hexdigest()).write_bytes(seed)


def main() -> None:
    directory = Path(sys.argv[1])
    write(directory / "recovery", recovery_seeds())
    write(directory / "stream", stream_seeds())


if __name__ == "__main__":
    main()
