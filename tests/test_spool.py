"""`Spool`, the durable queue alone: order, acknowledging, restarts, owners and threads."""

from __future__ import annotations

import gc
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import (
    ClosedError,
    Message,
    OptionError,
    PayloadTooLarge,
    Spool,
    SpoolError,
    SpoolFull,
    SpoolLockedError,
    TopicError,
)
from tests.making import DEADLINE_S, ROOT, Child, eventually

KIB = 1024
SMALL: dict[str, Any] = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}
DURABILITIES = ["memory", "process", "power"]
MANY = 3_000  # records of 40 bytes: more than the small ring and one small segment hold
HEADER_BYTES = 128  # of a segment


def numbers(count: int, start: int = 0) -> list[bytes]:
    return [b"%07d" % number for number in range(start, start + count)]


def append_all(spool: Spool, payloads: list[bytes]) -> list[int]:
    return [spool.append("t", payload) for payload in payloads]


def read_all(spool: Spool, max_bytes: int = 65_536) -> list[Message]:
    """Whatever can be read now, batch by batch; nothing is acknowledged."""
    found: list[Message] = []
    while batch := spool.read(max_bytes):
        found += batch
    return found


def payloads_of(messages: list[Message]) -> list[bytes]:
    return [message.payload for message in messages]


def segments(path: Path) -> list[Path]:
    return sorted((path / "log").iterdir())


def ledger_holds(spool: Spool) -> bool:
    stats: dict[str, Any] = spool.stats()
    return all(
        stats["published" + unit] == sum(stats[name + unit] for name in ("acked", "dropped", "dead_lettered")) + backlog
        for unit, backlog in (("", stats["backlog_messages"]), ("_bytes", stats["backlog_bytes"]))
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def spool(path: Path) -> Iterator[Spool]:
    """A small one: a little more than a thousand records and it goes to the disk."""
    with Spool(path, **SMALL) as spool:
        yield spool


# ---- reading and acknowledging ----


def test_what_was_appended_is_read_in_order(spool: Spool) -> None:
    positions = append_all(spool, numbers(100))
    found = read_all(spool)
    assert payloads_of(found) == numbers(100)
    assert [message.position for message in found] == positions == sorted(set(positions))


def test_an_empty_spool_gives_nothing(spool: Spool) -> None:
    assert spool.read() == []
    assert spool.stats()["published"] == spool.stats()["backlog_messages"] == 0


def test_a_message_is_read_once_and_stays_pending(spool: Spool) -> None:
    spool.append("t", b"once")
    assert len(spool.read()) == 1
    assert spool.read() == []
    assert spool.stats()["backlog_messages"] == 1


def test_reading_goes_on_with_what_comes_later(spool: Spool) -> None:
    for number in range(3):
        spool.append("t", b"%d" % number)
        assert payloads_of(spool.read()) == [b"%d" % number]


def test_an_ack_settles_everything_before_it(spool: Spool) -> None:
    positions = append_all(spool, numbers(10))
    read_all(spool)
    spool.ack(positions[6])
    stats = spool.stats()
    assert (stats["acked"], stats["backlog_messages"]) == (7, 3)
    assert ledger_holds(spool)


def test_rewound_reading_starts_at_the_oldest_that_is_not_acknowledged(spool: Spool) -> None:
    positions = append_all(spool, numbers(10))
    first = read_all(spool)
    spool.rewind()
    assert read_all(spool) == first
    spool.ack(positions[3])
    spool.rewind()
    assert read_all(spool) == first[4:]


def test_only_what_was_read_and_is_pending_can_be_acknowledged(spool: Spool) -> None:
    positions = append_all(spool, numbers(10))
    spool.ack(read_all(spool)[4].position or 0)
    later = spool.append("t", b"not read")
    for wrong in (positions[4], positions[0], positions[5] + 8, positions[5] + 1, later, later + 4096, 1 << 63):
        with pytest.raises(ValueError, match=str(wrong)):
            spool.ack(wrong)
    assert spool.stats()["acked"] == 5
    spool.ack(positions[9])


@pytest.mark.parametrize("wrong", [-1, 1 << 64])
def test_a_number_that_is_no_position_cannot_be_acknowledged(wrong: int, spool: Spool) -> None:
    append_all(spool, numbers(1))
    spool.read()
    with pytest.raises(ValueError):
        spool.ack(wrong)


def test_a_batch_is_about_as_large_as_asked(spool: Spool) -> None:
    append_all(spool, numbers(100))
    assert len(spool.read(1)) == 1  # at least one
    assert len(spool.read(400)) == 10
    assert len(read_all(spool, 4_000)) == 89


def test_a_batch_of_no_bytes_does_not_hang(path: Path) -> None:
    program = "import sys, cloudpubsub\ns = cloudpubsub.Spool(sys.argv[1]); s.append('t', b'')\ns.read(0)"
    command = [sys.executable, "-c", program, str(path)]
    ended = subprocess.run(command, check=False, cwd=ROOT, timeout=60, capture_output=True)
    assert ended.returncode == 0 or b"ValueError" in ended.stderr


def test_disk_and_ring_are_read_as_one(spool: Spool, path: Path) -> None:
    positions = append_all(spool, numbers(MANY))
    eventually(lambda: spool.stats()["spool_segments"])
    found = read_all(spool)
    assert payloads_of(found) == numbers(MANY)
    assert [message.position for message in found] == positions
    assert 0 < spool.stats()["spilled"] < positions[-1], "not in both homes"


def test_disk_and_ring_are_read_again_after_rewinding_in_the_middle(spool: Spool) -> None:
    positions = append_all(spool, numbers(MANY))
    read_all(spool)
    spool.ack(positions[MANY // 2])
    spool.rewind()
    assert payloads_of(read_all(spool, 1_000)) == numbers(MANY - MANY // 2 - 1, MANY // 2 + 1)
    assert ledger_holds(spool)


def test_files_go_when_their_messages_are_acknowledged(spool: Spool, path: Path) -> None:
    append_all(spool, numbers(MANY))
    eventually(lambda: len(segments(path)) > 1)
    spool.ack(read_all(spool)[-1].position or 0)
    eventually(lambda: not segments(path))
    assert spool.stats()["spool_bytes"] == 0 and spool.stats()["backlog_messages"] == 0


def test_nothing_is_on_the_disk_while_the_reader_keeps_up(spool: Spool, path: Path) -> None:
    for start in range(0, 20_000, 100):
        append_all(spool, numbers(100, start))
        found = read_all(spool)
        assert payloads_of(found) == numbers(100, start)
        spool.ack(found[-1].position or 0)
        assert not segments(path)
    assert spool.stats()["spilled_bytes"] == 0
    assert spool.stats()["acked_bytes"] == 20_000 * 40 > 10 * SMALL["ring_bytes"]


def test_a_reader_that_keeps_up_for_longer_than_spill_after_keeps_the_disk_clean(path: Path) -> None:
    with Spool(path, spill_after=2.0) as spool:
        until_s = time.monotonic() + 2.3
        position = spool.append("t", b"first")
        while time.monotonic() < until_s:
            # There is always one message pending, and none for long.
            newer = spool.append("t", b"newer")
            spool.read()
            spool.ack(position)
            position = newer
        assert spool.stats()["spilled_bytes"] == 0


def test_what_the_reader_leaves_for_spill_after_goes_to_the_disk(path: Path) -> None:
    with Spool(path, spill_after=0.02) as spool:
        position = spool.append("t", b"left")
        eventually(lambda: spool.stats()["spilled"] > position)
        assert len(segments(path)) == 1
        assert payloads_of(spool.read()) == [b"left"]


# ---- messages ----


def test_topic_payload_userdata_and_retain_come_back(spool: Spool) -> None:
    spool.append("a/b", b"payload", userdata=b"user\0data", retain=True)
    spool.append("Straße/温度", b"", userdata=bytearray(b"array"))
    first, second = spool.read()
    assert (first.topic, first.payload, first.userdata, first.retain) == ("a/b", b"payload", b"user\0data", True)
    assert (second.topic, second.payload, second.userdata, second.retain) == ("Straße/温度", b"", b"array", False)


def test_topic_payload_userdata_and_retain_come_back_from_the_disk(path: Path) -> None:
    with Spool(path, **SMALL) as spool:
        for number in range(50):
            spool.append(f"t/{number}", b"p" * number, userdata=b"u" * (50 - number), retain=number % 2 == 0)
    with Spool(path, **SMALL) as spool:
        for number, message in enumerate(read_all(spool)):
            assert (message.topic, message.payload) == (f"t/{number}", b"p" * number)
            assert (message.userdata, message.retain) == (b"u" * (50 - number), number % 2 == 0)
        assert number == 49


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (b"bytes", b"bytes"),
        (bytearray(b"bytearray"), b"bytearray"),
        (memoryview(b"_view_")[1:-1], b"view"),
        ("text ü", "text ü".encode()),
        (b"", b""),
        ("", b""),
    ],
    ids=lambda one: f"{type(one).__name__}{len(one)}",
)
def test_every_kind_of_payload_is_stored_as_its_bytes(given: Any, stored: bytes, spool: Spool) -> None:
    spool.append("t", given)
    assert payloads_of(spool.read()) == [stored]


def test_a_bytearray_changed_later_changes_nothing(spool: Spool) -> None:
    payload, userdata = bytearray(b"before"), bytearray(b"before")
    spool.append("t", payload, userdata=userdata)
    payload[:] = userdata[:] = b"after!"
    (message,) = spool.read()
    assert message.payload == message.userdata == b"before"


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TopicError, ("", b"")),
        (TopicError, ("a/+", b"")),
        (TopicError, ("x" * 65_536, b"")),
        (PayloadTooLarge, ("t", bytes(64 * KIB))),
        (PayloadTooLarge, ("t" * 15_000, bytes(10_000))),
        (TypeError, ("t", 1)),
        (TypeError, (b"t", b"")),
    ],
)
def test_what_cannot_be_stored_is_refused_whole(error: type[Exception], arguments: Any, spool: Spool) -> None:
    with pytest.raises(error):
        spool.append(*arguments)
    assert spool.stats()["published"] == spool.stats()["position"] == 0
    assert spool.read() == []


def test_the_largest_payload_makes_the_round_by_the_disk(path: Path) -> None:
    largest = 64 * KIB // 4 - 32 - 1024
    written = [bytes([number]) * largest for number in range(30)]
    with Spool(path, **SMALL) as spool:
        append_all(spool, written)
        with pytest.raises(PayloadTooLarge):
            spool.append("t", bytes(largest + 1))
    with Spool(path, **SMALL) as spool:
        assert payloads_of(read_all(spool)) == written


# ---- closing ----


def test_a_closed_spool_refuses_everything(path: Path) -> None:
    spool = Spool(path)
    position = spool.append("t", b"")
    spool.close()
    calls: list[Callable[[], object]] = [
        lambda: spool.append("t", b""),
        spool.read,
        spool.rewind,
        lambda: spool.ack(position),
        spool.sync,
        spool.stats,
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()


def test_closing_again_does_nothing(path: Path) -> None:
    spool = Spool(path)
    spool.append("t", b"")
    assert spool.close() == 0
    assert spool.close() == 0
    with Spool(path) as again:
        assert spool.close() == 0
        assert payloads_of(again.read()) == [b""]


def test_a_with_block_closes_also_when_it_raises(path: Path) -> None:
    with pytest.raises(KeyError), Spool(path) as spool:
        spool.append("t", b"kept")
        raise KeyError
    with pytest.raises(ClosedError):
        spool.stats()
    with Spool(path) as spool:
        assert payloads_of(spool.read()) == [b"kept"]


def test_closing_ends_a_wait_for_room(path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with Spool(path, **SMALL, max_spool_bytes=256 * KIB, on_full="block") as spool:
            waiting = pool.submit(append_all, spool, numbers(20_000))
            eventually(lambda: spool.stats()["storage"] == "full")
        with pytest.raises(ClosedError):
            waiting.result(DEADLINE_S)


def test_closing_beside_busy_threads_is_safe(path: Path) -> None:
    def work(call: Callable[[], object]) -> None:
        with pytest.raises(ClosedError):
            while True:
                call()

    with ThreadPoolExecutor(4) as pool:
        with Spool(path, **SMALL) as spool:
            calls = [lambda: spool.append("t", b"x"), lambda: spool.append("t", bytes(5_000)), spool.read, spool.stats]
            working = [pool.submit(work, call) for call in calls]
            eventually(lambda: spool.stats()["spool_segments"])
        for one in working:
            one.result(DEADLINE_S)


def test_a_forgotten_spool_saves_its_messages(path: Path) -> None:
    spool = Spool(path, durability="memory")
    append_all(spool, numbers(100))
    del spool
    gc.collect()
    with Spool(path) as spool:
        assert payloads_of(read_all(spool)) == numbers(100)


# ---- restarts ----


@pytest.mark.parametrize("durability", DURABILITIES)
def test_pending_messages_are_there_after_a_restart(durability: str, path: Path) -> None:
    with Spool(path, durability=durability, **SMALL) as spool:
        positions = append_all(spool, numbers(MANY))
        assert spool.recovery.records == 0
    with Spool(path, durability=durability, **SMALL) as spool:
        assert (spool.recovery.records, spool.recovery.ring_records) == (MANY, 0)
        assert [message.position for message in read_all(spool)] == positions
        assert spool.stats()["backlog_messages"] == MANY
        assert ledger_holds(spool)


@pytest.mark.parametrize("durability", DURABILITIES)
def test_only_what_was_not_acknowledged_comes_again(durability: str, path: Path) -> None:
    with Spool(path, durability=durability, **SMALL) as spool:
        append_all(spool, numbers(MANY))
        spool.ack(read_all(spool)[MANY // 3].position or 0)
    with Spool(path, durability=durability, **SMALL) as spool:
        assert payloads_of(read_all(spool)) == numbers(MANY - MANY // 3 - 1, MANY // 3 + 1)
        stats = spool.stats()
        assert (stats["published"], stats["acked"]) == (MANY, MANY // 3 + 1)
        assert ledger_holds(spool)


def test_a_drained_spool_leaves_no_segment(path: Path) -> None:
    with Spool(path, **SMALL) as spool:
        append_all(spool, numbers(MANY))
        spool.ack(read_all(spool)[-1].position or 0)
    assert not segments(path)
    with Spool(path, **SMALL) as spool:
        assert spool.recovery.records == 0 and spool.read() == []
        assert spool.stats()["acked"] == MANY


def test_positions_rise_over_restarts(path: Path) -> None:
    positions: list[int] = []
    for _ in range(4):
        with Spool(path) as spool:
            positions += append_all(spool, numbers(3))
            spool.ack(spool.read()[0].position or 0)
    assert positions == sorted(set(positions))


def test_old_messages_come_before_new_ones(path: Path) -> None:
    for start in (0, 10, 20):
        with Spool(path) as spool:
            append_all(spool, numbers(10, start))
    with Spool(path) as spool:
        append_all(spool, numbers(10, 30))
        assert payloads_of(read_all(spool)) == numbers(40)


def test_a_spool_may_be_opened_with_other_sizes_and_another_durability(path: Path) -> None:
    expected: list[bytes] = []
    for round_, durability in enumerate([*DURABILITIES, "memory"]):
        with Spool(path, ring_bytes=64 * KIB << round_, segment_bytes=64 * KIB, durability=durability) as spool:
            append_all(spool, numbers(MANY, round_ * MANY))
            expected += numbers(MANY, round_ * MANY)
    with Spool(path, **SMALL) as spool:
        assert payloads_of(read_all(spool)) == expected


# What a child process does before it ends in one way or another; it prints "ready" when it has appended.
APPEND = """
import sys
import cloudpubsub
path, durability, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
spool = cloudpubsub.Spool(path, durability=durability, ring_bytes=64 * 1024, segment_bytes=64 * 1024)
for number in range(count):
    spool.append("t", b"%07d" % number, userdata=b"u")
"""
WAIT = "print('ready', flush=True)\nsys.stdin.readline()\n"


def killed_after(path: Path, durability: str, count: int, then: str = "") -> None:
    """A process that appended `count` messages and was killed with SIGKILL."""
    with Child(APPEND + then + WAIT, path, durability, count) as child:
        assert child.line() == "ready"
        child.kill()
        assert child.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_killed_process_loses_nothing(durability: str, path: Path) -> None:
    killed_after(path, durability, MANY)
    with Spool(path, durability=durability, **SMALL) as spool:
        assert spool.recovery.records == MANY
        assert payloads_of(read_all(spool)) == numbers(MANY)
        stats = spool.stats()
        assert (stats["published"], stats["backlog_messages"]) == (MANY, MANY)
        assert ledger_holds(spool)


def test_what_never_left_the_ring_is_found_in_it_after_a_kill(path: Path) -> None:
    killed_after(path, "process", 10)
    assert not segments(path)
    with Spool(path, **SMALL) as spool:
        assert (spool.recovery.records, spool.recovery.ring_records, spool.recovery.bytes) == (10, 10, 480)
        assert [message.userdata for message in read_all(spool)] == [b"u"] * 10


def test_in_memory_mode_a_kill_costs_the_ring_and_nothing_else(path: Path) -> None:
    killed_after(path, "memory", MANY, "while not spool.stats()['spilled_bytes']: pass\n")
    with Spool(path, durability="memory", **SMALL) as spool:
        found = payloads_of(read_all(spool))
        assert 0 < len(found) < MANY
        assert found == numbers(len(found)), "a hole"
        assert spool.recovery.records == len(found) and ledger_holds(spool)


@pytest.mark.parametrize("durability", DURABILITIES)
def test_what_was_synced_is_on_the_disk_whatever_happens(durability: str, path: Path) -> None:
    killed_after(path, durability, 100, "spool.sync(30)\n")
    with Spool(path, durability=durability, ring_dir=path, **SMALL) as spool:  # where no ring is found
        assert payloads_of(read_all(spool)) == numbers(100)
        assert spool.recovery.ring_records == 0


def test_after_a_kill_only_what_was_not_acknowledged_comes_again(path: Path) -> None:
    killed_after(path, "process", MANY, "for m in spool.read(40 * 500): spool.ack(m.position)\n")
    with Spool(path, **SMALL) as spool:
        acked: Any = spool.stats()["acked"]
        assert 0 < acked < MANY
        assert payloads_of(read_all(spool)) == numbers(MANY - acked, acked)
        assert ledger_holds(spool)


@pytest.mark.parametrize(
    ("ending", "durability"),
    [("", "memory"), ("", "process"), ("", "power"), ("raise KeyError", "memory"), ("sys.exit(3)", "memory")],
)
def test_an_interpreter_that_ends_without_closing_saves_everything(ending: str, durability: str, path: Path) -> None:
    command = [sys.executable, "-c", APPEND + ending, str(path), durability, str(MANY)]
    subprocess.run(command, check=False, cwd=ROOT, timeout=DEADLINE_S, stderr=subprocess.DEVNULL)
    with Spool(path, **SMALL) as spool:
        assert (spool.recovery.records, spool.recovery.ring_records) == (MANY, 0)
        assert payloads_of(read_all(spool)) == numbers(MANY)


# ---- recovery ----


def test_recovery_of_a_clean_spool_finds_everything_and_no_damage(path: Path) -> None:
    with Spool(path) as spool:
        assert spool.recovery.records == spool.recovery.bytes == spool.recovery.segments == 0
        append_all(spool, numbers(100))
    with Spool(path) as spool:
        found = spool.recovery
        assert (found.records, found.bytes, found.segments) == (100, 4_000, 1)
        assert (found.torn_bytes, found.damaged_ranges, found.damaged_bytes) == (0, 0, 0)
        assert found.duration_s >= 0


def test_bytes_behind_the_last_record_of_a_killed_process_are_torn(path: Path) -> None:
    killed_after(path, "memory", 100, "spool.sync(30)\n")
    (segment,) = segments(path)
    with segment.open("r+b") as file:
        file.seek(HEADER_BYTES + 100 * 48)
        file.write(b"\x55" * 24)
    with Spool(path, **SMALL) as spool:
        assert spool.recovery.torn_bytes == 24
        assert (spool.recovery.records, spool.recovery.damaged_ranges) == (100, 0)
        assert payloads_of(read_all(spool)) == numbers(100)


def test_a_damaged_record_of_a_killed_process_is_skipped_and_counted(path: Path) -> None:
    killed_after(path, "memory", 100, "spool.sync(30)\n")
    (segment,) = segments(path)
    with segment.open("r+b") as file:
        file.seek(HEADER_BYTES + 50 * 48 + 40)
        file.write(b"\xff")
    with Spool(path, **SMALL) as spool:
        assert (spool.recovery.damaged_ranges, spool.recovery.damaged_bytes) == (1, 48)
        assert payloads_of(read_all(spool)) == numbers(50) + numbers(49, 51)
        assert ledger_holds(spool)


def test_a_damaged_record_of_a_closed_spool_is_skipped_and_counted(path: Path) -> None:
    with Spool(path) as spool:
        append_all(spool, numbers(100))
    (segment,) = segments(path)
    content = bytearray(segment.read_bytes())
    content[HEADER_BYTES + 50 * 40 + 36] ^= 1
    segment.write_bytes(content)
    with Spool(path) as spool:
        found = read_all(spool)
        assert payloads_of(found) == numbers(50) + numbers(49, 51)
        assert (spool.stats()["damaged_ranges"], spool.stats()["dropped"]) == (1, 1)
        spool.ack(found[-1].position or 0)
        assert spool.stats()["acked"] == 99 and ledger_holds(spool)


# ---- syncing ----


@pytest.mark.parametrize("durability", DURABILITIES)
def test_sync_brings_everything_to_the_disk(durability: str, path: Path) -> None:
    with Spool(path, durability=durability, **SMALL) as spool:
        append_all(spool, numbers(10))
        spool.sync()
        stats = spool.stats()
        assert stats["synced"] == stats["spilled"] == stats["position"]
        assert len(segments(path)) == 1
        spool.sync()


def test_there_may_be_nothing_to_sync(spool: Spool, path: Path) -> None:
    spool.sync()
    append_all(spool, numbers(10))
    spool.ack(read_all(spool)[-1].position or 0)
    spool.sync()
    assert not segments(path)


def test_power_mode_syncs_by_itself(path: Path) -> None:
    with Spool(path, durability="power", sync_interval=0.01) as spool:
        position = spool.append("t", b"")
        eventually(lambda: spool.stats()["synced"] > position)


def test_a_spool_at_its_limit_says_that_it_cannot_sync(path: Path) -> None:
    with Spool(path, **SMALL, max_spool_bytes=256 * KIB, on_full="raise") as spool:
        with pytest.raises(SpoolFull):
            append_all(spool, numbers(20_000))
        with pytest.raises(SpoolError, match="limits"):
            spool.sync(DEADLINE_S)


# ---- owners ----


def test_a_second_object_is_refused_at_once(spool: Spool, path: Path) -> None:
    spool.append("t", b"mine")
    with pytest.raises(SpoolLockedError, match="owns"):
        Spool(path)
    assert payloads_of(spool.read()) == [b"mine"]


def test_a_second_process_is_refused_at_once(spool: Spool, path: Path) -> None:
    spool.append("t", b"mine")
    program = (
        "import sys, cloudpubsub\ntry: cloudpubsub.Spool(sys.argv[1])\n"
        "except cloudpubsub.SpoolLockedError as error: print(type(error).__name__, isinstance(error, OSError))"
    )
    with Child(program, path) as child:
        assert child.line() == "SpoolLockedError True"
    assert payloads_of(spool.read()) == [b"mine"]


def test_a_spool_is_free_when_its_owner_has_closed_it_or_died(path: Path) -> None:
    with Child(APPEND + WAIT, path, "process", 10) as child:
        assert child.line() == "ready"
        with pytest.raises(SpoolLockedError):
            Spool(path)
    for _ in range(2):
        with Spool(path) as spool:
            assert payloads_of(read_all(spool)) == numbers(10)


def test_two_spools_do_not_know_of_each_other(tmp_path: Path) -> None:
    with Spool(tmp_path / "one") as one, Spool(tmp_path / "two") as two:
        one.append("t", b"1")
        two.append("t", b"2")
        assert payloads_of(one.read()) == [b"1"] and payloads_of(two.read()) == [b"2"]


# ---- opening ----


def test_missing_directories_are_made_and_nobody_else_can_look(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "spool"
    with Spool(str(path)) as spool:
        spool.append("t", b"secret")
        spool.sync()
        files = [path / "lock", path / "meta", *segments(path)]
        assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600] * 3
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((path / "log").stat().st_mode) == 0o700


def test_the_rings_file_lives_in_tmpfs_until_the_spool_is_closed(path: Path, ring_directory: str) -> None:
    with Spool(path) as spool:
        spool.append("t", b"")
        (ring,) = os.listdir(ring_directory)
        assert stat.S_IMODE(os.stat(os.path.join(ring_directory, ring)).st_mode) == 0o600
    assert os.listdir(ring_directory) == []


def test_rings_may_lie_elsewhere(path: Path, ring_directory: str) -> None:
    elsewhere = os.path.join(ring_directory, "elsewhere")
    os.mkdir(elsewhere)
    with Spool(path, ring_dir=elsewhere):
        assert os.listdir(ring_directory) == ["elsewhere"]
        assert len(os.listdir(elsewhere)) == 1


def test_what_is_no_directory_cannot_be_a_spool(path: Path) -> None:
    path.write_bytes(b"")
    with pytest.raises(SpoolError, match="spool"):
        Spool(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ring_bytes", 100_000), ("max_spool_bytes", 1), ("on_full", "burst"), ("spill_after", -1)],
)
def test_a_wrong_setting_is_named_and_nothing_is_made(name: str, value: Any, path: Path) -> None:
    with pytest.raises(OptionError, match=name):
        Spool(path, **{name: value})
    assert not path.exists()


# ---- threads ----

THREADS = 4
EACH = 4_000


def append_from(spool: Spool, thread: int) -> list[int]:
    return [spool.append(f"thread/{thread}", b"%d" % number) for number in range(EACH)]


def test_threads_append_beside_a_reader(spool: Spool) -> None:
    found: list[Message] = []
    with ThreadPoolExecutor(THREADS) as pool:
        appending = [pool.submit(append_from, spool, thread) for thread in range(THREADS)]
        until_s = time.monotonic() + DEADLINE_S
        while len(found) < THREADS * EACH:
            assert time.monotonic() < until_s, f"{len(found)} messages"
            if batch := spool.read(4_096):
                spool.ack(batch[-1].position or 0)
                found += batch
        positions = [one.result(DEADLINE_S) for one in appending]
    assert [message.position for message in found] == sorted(chain(*positions))
    for thread in range(THREADS):
        of_one = [int(message.payload) for message in found if message.topic == f"thread/{thread}"]
        assert of_one == list(range(EACH))
    assert spool.stats()["acked"] == THREADS * EACH and ledger_holds(spool)


def test_threads_append_and_everything_waits_for_a_late_reader(spool: Spool) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        positions = list(pool.map(append_from, [spool] * THREADS, range(THREADS)))
    assert [message.position for message in read_all(spool)] == sorted(chain(*positions))
    assert all(of_one == sorted(of_one) for of_one in positions)


def test_of_several_readers_each_message_has_one(spool: Spool) -> None:
    def take(_: int) -> list[int | None]:
        return [message.position for message in read_all(spool, 1_000)]

    positions = append_all(spool, numbers(MANY))
    with ThreadPoolExecutor(THREADS) as pool:
        taken = list(pool.map(take, range(THREADS)))
    assert sorted(chain(*taken)) == positions
    assert all(of_one == sorted(of_one) for of_one in taken)


def test_threads_may_sync_and_look_while_others_append(spool: Spool) -> None:
    def look(_: int) -> None:
        for _ in range(20):
            spool.sync(DEADLINE_S)
            assert ledger_holds(spool)

    with ThreadPoolExecutor(THREADS) as pool:
        appending = [pool.submit(append_from, spool, thread) for thread in range(2)]
        list(pool.map(look, range(2)))
        for one in appending:
            one.result(DEADLINE_S)
    assert len(read_all(spool)) == 2 * EACH
