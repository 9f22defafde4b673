"""A damaged spool opens by itself: the exact loss is told, and all else is delivered in order.

What must be left is what the oracle reads, which follows docs/format.md and knows nothing of the library.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import Drop, Spool
from cloudpubsub.__main__ import main
from tests.reader import FOOTER, SEGMENT_HEADER, SLOT, Message, read_spool
from tests.spools import ACKED, COUNT, DAMAGES, SMALL, Damage, append, copy, flip, make, published, read_all, values

MIB = 1 << 20
PAGE = 4096
RECORD_BYTES_MIN = 40
FEW, FEW_ACKED = 8, 2
QUOTA = 4 * MIB
QUARANTINE_SHARE = 16  # of the quota
IN_FILES = [damage for damage in DAMAGES if "meta" not in damage.kinds]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory that is not on a disk, for spools that are opened hundreds of times."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def open_spool(path: Path, **settings: Any) -> Spool:
    return Spool(path, **{**SMALL, "durability": "memory", "spill_after": 1000.0, **settings})


def check_account(spool: Spool) -> dict[str, Any]:
    stats: dict[str, Any] = spool.stats()
    for unit, backlog in (("", "backlog_messages"), ("_bytes", "backlog_bytes")):
        ended = sum(stats[name + unit] for name in ("acked", "dropped", "dead_lettered"))
        assert stats["published" + unit] == ended + stats[backlog], stats
    return stats


def covers(losses: list[Drop], positions: set[int]) -> bool:
    """Whether the ranges of `losses` hold all of `positions`."""
    return all(any(drop.first <= position < drop.end for drop in losses) for position in positions)


def delivered_from(path: Path) -> list[Message]:
    """What has to come: of two files with the same positions what is whole in either."""
    found: dict[int, Message] = {}
    read = read_spool(path)
    for segment in sorted(read.segments, key=lambda it: (it.epoch, it.serial)):
        found |= {message.position: message for message in segment.messages}
    head = 0 if read.meta is None else read.meta.head
    return [found[position] for position in sorted(found) if position >= head]


def check_damaged(path: Path, whole: set[int], lost: int | None = None) -> None:
    """`path` opens and delivers what the oracle says; `lost` of the positions `whole` are told as lost, and where."""
    left = read_spool(path).pending
    gone = whole - {message.position for message in left}
    with open_spool(path) as spool:
        found = read_all(spool)
        assert published(found) == values(left)
        check_account(spool)
        if found:
            spool.ack(found[-1].position or 0)
        stats = check_account(spool)
        assert stats["backlog_messages"] == 0
        if lost is not None:
            assert len(gone) == stats["dropped"] == lost
            assert covers(spool.losses(), gone)
        position = append(spool, 0)
        assert position > max(whole), "a position was issued twice"
        assert [message.position for message in read_all(spool)] == [position]
        spool.ack(position)
        check_account(spool)
    shutil.rmtree(path)


# ---- one byte, one length


@pytest.fixture(scope="module")
def sealed() -> Iterator[Path]:
    """A spool of one short segment, closed."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        make(Path(directory) / "spool", FEW, FEW_ACKED, durability="memory")
        yield Path(directory) / "spool"


@pytest.fixture(scope="module")
def unsealed() -> Iterator[Path]:
    """The same as a power cut leaves it: synced, not sealed, and nothing acknowledged."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        with open_spool(Path(directory) / "spool") as spool:
            for number in range(FEW):
                append(spool, number)
            spool.sync(20)
            made = copy(Path(directory) / "spool", Path(directory) / "copy")
        # A shorter rest than was allocated: it is read hundreds of times.
        os.truncate(segment_of(made), SEGMENT_HEADER + read_spool(made).segments[0].end + 256)
        yield made


def segment_of(path: Path) -> Path:
    (segment,) = (path / "log").iterdir()
    return segment


def pending_in(path: Path) -> set[int]:
    return {message.position for message in read_spool(path).pending}


def test_every_byte_of_a_closed_spool_flipped_once_costs_its_record_alone(sealed: Path, memory: Path) -> None:
    whole, segment = pending_in(sealed), segment_of(sealed)
    places = read_spool(sealed).segments[0].places
    for offset in range(segment.stat().st_size):
        damaged = copy(sealed, memory / "damaged")
        flip(damaged / "log" / segment.name, offset, 1 << offset % 8)
        # Padding belongs to no message; what was acknowledged is lost to nobody.
        hit = [it for it in places if it.message is not None and it.offset <= offset < it.offset + it.span]
        left = pending_in(damaged)
        lost = len(whole) - len(left)
        assert lost <= len(hit) and whole - left <= {it.position for it in hit}
        check_damaged(damaged, whole, lost)


def test_a_closed_spool_cut_at_every_length_costs_what_was_behind_the_cut(sealed: Path, memory: Path) -> None:
    whole, segment = pending_in(sealed), segment_of(sealed)
    places = read_spool(sealed).segments[0].places
    for size in range(segment.stat().st_size):
        damaged = copy(sealed, memory / "damaged")
        os.truncate(damaged / "log" / segment.name, size)
        behind = {it.position for it in places if it.offset + it.span > size}
        check_damaged(damaged, whole, len(whole & behind))


def test_every_byte_of_an_unsealed_file_flipped_once_costs_its_record_alone(unsealed: Path, memory: Path) -> None:
    whole, segment = pending_in(unsealed), segment_of(unsealed)
    assert len(whole) == FEW
    used = SEGMENT_HEADER + read_spool(unsealed).segments[0].end
    for offset in range(used + 64):
        damaged = copy(unsealed, memory / "damaged")
        flip(damaged / "log" / segment.name, offset, 1 << offset % 8)
        assert len(whole - pending_in(damaged)) <= 1
        check_damaged(damaged, whole)


def test_an_unsealed_file_cut_at_every_length_costs_what_was_behind_the_cut(unsealed: Path, memory: Path) -> None:
    whole, segment = pending_in(unsealed), segment_of(unsealed)
    places = read_spool(unsealed).segments[0].places
    for size in range(places[-1].offset + places[-1].span + 9):
        damaged = copy(unsealed, memory / "damaged")
        os.truncate(damaged / "log" / segment.name, size)
        behind = {it.position for it in places if it.offset + it.span > size}
        assert pending_in(damaged) == whole - behind
        check_damaged(damaged, whole)


def test_every_byte_of_the_meta_file_flipped_once_costs_no_message(sealed: Path, memory: Path) -> None:
    whole = pending_in(sealed)
    data = (sealed / "meta").read_bytes()
    # Every byte that says something, and of the long runs of zeros one in a hundred.
    offsets = [at for at in range(len(data)) if data[at] or at % 100 == 0 or at % SLOT < 128]
    for offset in offsets:
        damaged = copy(sealed, memory / "damaged")
        flip(damaged / "meta", offset, 1 << offset % 8)
        assert pending_in(damaged) >= whole
        check_damaged(damaged, whole)


def test_a_meta_file_of_any_length_costs_no_message(sealed: Path, memory: Path) -> None:
    whole = pending_in(sealed)
    for size in [*range(0, 2 * SLOT, 61), SLOT - 1, SLOT, SLOT + 1, 2 * SLOT - 1, 2 * SLOT + 1, 3 * SLOT]:
        damaged = copy(sealed, memory / "damaged")
        os.truncate(damaged / "meta", size)
        assert pending_in(damaged) >= whole
        check_damaged(damaged, whole)


# ---- whatever may happen to files


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "spool"
    make(path, durability="memory")
    return path


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_a_damaged_spool_opens_and_goes_on(
    damage: Damage, original: Path, memory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = copy(original, memory / "spool")
    whole = pending_in(damaged)
    damage.do(damaged)
    left = delivered_from(damaged)
    is_counted = "meta" not in damage.kinds
    with caplog.at_level(logging.INFO, "cloudpubsub"), open_spool(damaged) as spool:
        assert f"spool {damaged}: found" in caplog.text
        assert published(read_all(spool)) == values(left)
        if is_counted:
            assert covers(spool.losses(), whole - {message.position for message in left})
        check_account(spool)
        more = [append(spool, number) for number in range(COUNT)]
        assert min(more) > max(whole)
        spool.sync(20)
    with open_spool(damaged) as spool:
        found = read_all(spool)
        assert [message.position for message in found] == [message.position for message in left] + more
        spool.ack(more[-1])
        stats = check_account(spool)
        if is_counted:
            assert (stats["published"], stats["dropped"]) == (2 * COUNT, len(whole) - len(left))
            assert stats["acked"] == 2 * COUNT - stats["dropped"]
    with open_spool(damaged) as spool:
        assert read_all(spool) == [] and check_account(spool)["backlog_messages"] == 0


@pytest.mark.parametrize("damage", IN_FILES, ids=lambda damage: damage.name)
def test_what_is_told_as_lost_is_what_was_lost(damage: Damage, original: Path, memory: Path) -> None:
    """In the reports and in the ledger that stays."""
    damaged = copy(original, memory / "spool")
    whole = pending_in(damaged)
    damage.do(damaged)
    lost = len(whole) - len(delivered_from(damaged))
    with open_spool(damaged) as spool:
        if found := read_all(spool):
            spool.ack(found[-1].position or 0)
        losses = spool.losses()
        assert spool.stats()["dropped"] == lost
    assert sum(drop.count for drop in losses) == lost
    meta = read_spool(damaged).meta
    assert meta is not None and sum(messages for messages, _ in meta.totals) == lost


@pytest.mark.parametrize("damage", IN_FILES, ids=lambda damage: damage.name)
def test_no_report_counts_more_messages_than_have_room_in_its_range(
    damage: Damage, original: Path, memory: Path
) -> None:
    damaged = copy(original, memory / "spool")
    damage.do(damaged)
    with open_spool(damaged) as spool:
        if found := read_all(spool):
            spool.ack(found[-1].position or 0)
        losses = spool.losses()
    assert all(drop.end - drop.first >= drop.count * RECORD_BYTES_MIN for drop in losses), losses


def test_what_does_not_belong_to_a_spool_is_left_where_it_is(original: Path, memory: Path) -> None:
    damaged = copy(original, memory / "spool")
    for name in ("log/notes.txt", "notes.txt", "core"):
        (damaged / name).write_text("hello")
    with open_spool(damaged) as spool:
        assert len(read_all(spool)) == COUNT - ACKED
    assert {(damaged / name).read_text() for name in ("log/notes.txt", "notes.txt", "core")} == {"hello"}


@pytest.mark.parametrize("seed", range(12))
def test_damage_of_many_pages_costs_what_the_oracle_cannot_read(seed: int, original: Path, memory: Path) -> None:
    damaged = copy(original, memory / "spool")
    whole, chance = pending_in(damaged), random.Random(seed)
    for segment in read_spool(damaged).segments:
        data = bytearray(segment.path.read_bytes())
        for _ in range(chance.randrange(6)):
            at = chance.randrange(-(-len(data) // PAGE)) * PAGE
            noise = bytes(PAGE) if chance.random() < 0.5 else chance.randbytes(PAGE)
            size = min(PAGE, len(data) - at)
            data[at : at + size] = noise[:size]
        segment.path.write_bytes(data)
    check_damaged(damaged, whole, len(whole) - len(pending_in(damaged)))


def test_each_of_many_damaged_records_is_lost_alone_and_told(memory: Path) -> None:
    path = memory / "spool"
    with open_spool(path) as spool:
        for number in range(COUNT):
            append(spool, number)
    chosen: set[int] = set()
    for segment in read_spool(path).segments:
        data = bytearray(segment.path.read_bytes())
        for place in segment.places[1:-1:5]:
            if place.message is not None:
                data[place.offset + 33] ^= 1
                chosen.add(place.position)
        segment.path.write_bytes(data)
    with open_spool(path) as spool:
        found = {message.position for message in read_all(spool)}
        losses = spool.losses()
        assert len(found) == COUNT - len(chosen) and not found & chosen
        assert sum(drop.count for drop in losses) == check_account(spool)["dropped"] == len(chosen)
        assert covers(losses, chosen)
        assert spool.stats()["damaged_ranges"] == len(chosen)


# ---- the quarantine


def test_the_bytes_of_a_damaged_record_are_kept_for_people_and_nobody_else(original: Path, memory: Path) -> None:
    damaged = copy(original, memory / "spool")
    segment = read_spool(damaged).segments[1]
    place = next(it for it in segment.places[3:] if it.message is not None)
    flip(segment.path, place.offset + 20)
    data = segment.path.read_bytes()[place.offset : place.offset + place.span]
    with open_spool(damaged) as spool:
        read_all(spool)
    kept = damaged / "quarantine" / f"{place.position:016x}-{place.position + place.span:016x}.bytes"
    assert kept.read_bytes() == data
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


def on_disk(path: Path) -> int:
    """What `du` says."""
    return sum(each.lstat().st_blocks * 512 for each in [path, *path.rglob("*")])


def test_the_quarantine_keeps_within_its_share_of_the_quota(memory: Path) -> None:
    path = memory / "spool"
    sizes: dict[str, Any] = {"segment_bytes": MIB, "max_spool_bytes": QUOTA}
    with open_spool(path, **sizes) as spool:
        for number in range(20_000):
            spool.append("t", b"%07d" % number)
    for segment in read_spool(path).segments:
        data = bytearray(segment.path.read_bytes())
        for place in segment.places[1::3]:
            data[place.offset + 36] ^= 1
        segment.path.write_bytes(data)
    with open_spool(path, **sizes) as spool:
        assert 0 < len(read_all(spool)) < 20_000
        assert check_account(spool)["damaged_ranges"] > 1_000
    # The blocks of the files, not their bytes: many are small.
    kept = sum(each.stat().st_blocks * 512 for each in (path / "quarantine").iterdir())
    assert 0 < kept <= QUOTA // QUARANTINE_SHARE


def test_a_large_unusable_file_does_not_burst_the_quarantine(original: Path, memory: Path) -> None:
    path = memory / "spool"
    copy(original, path)
    for number in range(20):
        name = f"{1 << 50:016x}-00000001-{number:08x}.seg"
        (path / "log" / name).write_bytes(random.Random(number).randbytes(100_000))
    with open_spool(path, max_spool_bytes=QUOTA) as spool:
        assert len(read_all(spool)) == COUNT - ACKED
    kept = sum(each.stat().st_size for each in (path / "quarantine").iterdir())
    assert 0 < kept <= QUOTA // QUARANTINE_SHARE


# ---- the file of the cursors


def _unlink(meta: Path, _: bytes) -> None:
    meta.unlink()


def _tear_newest(meta: Path, _: bytes) -> None:
    """A save that was cut in the middle of the slot."""
    data = bytearray(meta.read_bytes())
    sequences = [int.from_bytes(data[at + 16 : at + 24], "little") for at in (0, SLOT)]
    newest = SLOT * sequences.index(max(sequences))
    data[newest + 512 : newest + SLOT] = bytes(SLOT - 512)
    meta.write_bytes(data)


def _replace_with_old(meta: Path, old: bytes) -> None:
    meta.write_bytes(old)


def _fill_with_noise(meta: Path, _: bytes) -> None:
    meta.write_bytes(random.Random(1).randbytes(2 * SLOT))


@pytest.mark.parametrize("do", [_unlink, _tear_newest, _replace_with_old, _fill_with_noise])
def test_without_a_current_cursor_messages_come_again_but_none_is_missing(
    do: Callable[[Path, bytes], None], memory: Path
) -> None:
    path = memory / "spool"
    make(path, COUNT, 0, durability="memory")
    old = (path / "meta").read_bytes()
    with open_spool(path) as spool:
        positions = [message.position or 0 for message in read_all(spool)]
        spool.ack(positions[COUNT // 2])
    stored = [message.position for message in read_spool(path).messages]
    do(path / "meta", old)
    with open_spool(path) as spool:
        found = [message.position or 0 for message in read_all(spool)]
        assert found == sorted(set(found)), "not in order"
        assert found[-(COUNT - COUNT // 2 - 1) :] == positions[COUNT // 2 + 1 :], "something is missing"
        assert set(found) <= set(stored)
        assert append(spool, 0) > positions[-1], "a position was issued twice"
        check_account(spool)


# ---- what the tool says


def test_verify_ends_with_1_and_the_list_of_all_damage(
    original: Path, memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = copy(original, memory / "spool")
    assert main(["verify", str(damaged)]) == 0
    capsys.readouterr()
    segments = read_spool(damaged).segments[:3]
    for segment in segments[:2]:
        flip(segment.path, segment.places[5].offset + 20)
    os.truncate(segments[2].path, segments[2].path.stat().st_size - FOOTER)
    assert main(["verify", str(damaged)]) == 1
    said = capsys.readouterr().out
    assert all(segment.path.name in said for segment in segments)
