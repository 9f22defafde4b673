"""The limits of a `Spool`: what each policy does when they are reached, and that nothing goes uncounted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import ClosedError, Message, Spool, SpoolFull
from tests.making import DEADLINE_S, Child, eventually

KIB = 1024
QUOTA = 300_000
REFUSED = 1 << 63  # positions from here on name messages that were refused
SPAN = 344  # bytes of a record made here
SMALL: dict[str, Any] = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}
RING_HOLDS = SMALL["ring_bytes"] // SPAN
FLOOD = 3_000  # records; a megabyte, three times the quota
MESSAGES = 200
BY_BYTES: dict[str, Any] = {"max_spool_bytes": QUOTA}
BY_MESSAGES: dict[str, Any] = {"max_spool_messages": MESSAGES}
DURABILITIES = ["memory", "process", "power"]
POLICIES = ["drop_oldest", "drop_newest", "block", "raise"]

each_limit = pytest.mark.parametrize("limit", [BY_BYTES, BY_MESSAGES], ids=["bytes", "messages"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def open_spool(path: Path, on_full: str, limit: dict[str, Any], **settings: Any) -> Spool:
    """A small spool of this policy, which waits for no room unless told to."""
    return Spool(path, **{**SMALL, "on_full": on_full, "block_timeout": 0.05, **limit, **settings})


def append(spool: Spool, number: int) -> int:
    return spool.append("numbers", b"%010d" % number + bytes(295))


def flood(spool: Spool, count: int = FLOOD, start: int = 0) -> list[int]:
    return [append(spool, number) for number in range(start, start + count)]


def settle(spool: Spool) -> dict[str, Any]:
    """Wait until everything is on the disk: no more is dropped then before the next append."""
    spool.sync(DEADLINE_S)
    return check_ledger(spool)


def append_until_full(spool: Spool, start: int = 0) -> int:
    """Append until the policy raises; returns the first number that was not stored."""
    for number in range(start, start + FLOOD):
        try:
            append(spool, number)
        except SpoolFull:
            return number
    raise AssertionError("never full")


def number_of(message: Message) -> int:
    return int(message.payload[:10])


def read_all(spool: Spool) -> list[Message]:
    found: list[Message] = []
    while batch := spool.read():
        found += batch
    return found


def drain(spool: Spool) -> list[int]:
    """Read and acknowledge everything; returns the numbers in order."""
    found = read_all(spool)
    if found:
        spool.ack(found[-1].position or 0)
    return [number_of(message) for message in found]


def check_ledger(spool: Spool) -> dict[str, Any]:
    """The statistics, in which every message is accounted for."""
    stats: dict[str, Any] = spool.stats()
    for unit, backlog in (("", "backlog_messages"), ("_bytes", "backlog_bytes")):
        ended = sum(stats[name + unit] for name in ("acked", "dropped", "dead_lettered"))
        assert stats["published" + unit] == ended + stats[backlog]
    assert stats["published_bytes"] == SPAN * stats["published"]
    return stats


def disk_bytes(path: Path) -> int:
    """What `du` says about the segments."""

    def size(name: str) -> int:
        try:
            return os.stat(path / "log" / name).st_blocks * 512
        except FileNotFoundError:
            return 0  # removed since it was listed

    return sum(size(name) for name in os.listdir(path / "log"))


# ---- drop_oldest ----


@each_limit
@pytest.mark.parametrize("durability", DURABILITIES)
def test_the_oldest_go_and_the_newest_stay_in_order(durability: str, limit: dict[str, Any], path: Path) -> None:
    with open_spool(path, "drop_oldest", limit, durability=durability) as spool:
        positions = flood(spool)
        assert max(positions) < REFUSED, "a new one was refused"
        dropped = settle(spool)["dropped"]
        survivors = drain(spool)
        assert dropped > 0
        assert survivors == list(range(dropped, FLOOD))
        stats = check_ledger(spool)
        assert (stats["acked"], stats["dropped"], stats["backlog_messages"]) == (FLOOD - dropped, dropped, 0)


@each_limit
def test_dropping_the_oldest_leaves_most_of_the_quota_in_use(limit: dict[str, Any], path: Path) -> None:
    with open_spool(path, "drop_oldest", limit) as spool:
        flood(spool)
    with open_spool(path, "drop_oldest", limit) as spool:
        share = spool.recovery.records / MESSAGES if limit is BY_MESSAGES else spool.recovery.bytes / QUOTA
        assert 0.5 < share <= 1


def test_no_more_than_the_limit_of_messages_is_kept_on_the_disk(path: Path) -> None:
    for most in (1, 7, 8, 100):
        with open_spool(path, "drop_oldest", {"max_spool_messages": most}) as spool:
            last = flood(spool, 500)[-1]
            assert check_ledger(spool)["backlog_messages"] <= most + RING_HOLDS
        with open_spool(path, "drop_oldest", {"max_spool_messages": most}) as spool:
            assert 1 <= spool.recovery.records <= most
            messages = read_all(spool)
            assert messages[-1].position == last, "the newest is not there"
            check_ledger(spool)
            spool.ack(last)


def test_both_limits_hold_at_once(path: Path) -> None:
    with open_spool(path, "drop_oldest", {**BY_BYTES, **BY_MESSAGES}) as spool:
        flood(spool)
    with open_spool(path, "drop_oldest", {**BY_BYTES, **BY_MESSAGES}) as spool:
        assert 0 < spool.recovery.records <= MESSAGES
        assert disk_bytes(path) <= QUOTA


def test_there_is_room_again_after_drops(path: Path) -> None:
    with open_spool(path, "drop_oldest", BY_BYTES) as spool:
        for round_ in range(3):
            flood(spool, FLOOD, round_ * FLOOD)
            assert drain(spool)[-1] == (round_ + 1) * FLOOD - 1
        dropped = settle(spool)["dropped"]
        assert spool.stats()["storage"] == "ok"
        flood(spool, 10, 3 * FLOOD)
        assert drain(spool) == list(range(3 * FLOOD, 3 * FLOOD + 10))
        assert check_ledger(spool)["dropped"] == dropped


def test_a_slow_reader_beside_drops_sees_rising_numbers_each_once(path: Path) -> None:
    with ThreadPoolExecutor(1) as pool, open_spool(path, "drop_oldest", BY_BYTES) as spool:
        flooding = pool.submit(flood, spool, 30_000)
        seen: list[int] = []
        until_s = time.monotonic() + DEADLINE_S
        while not flooding.done():
            assert time.monotonic() < until_s
            if batch := spool.read(2_000):
                spool.ack(batch[-1].position or 0)
                seen += map(number_of, batch)
        seen += drain(spool)
        assert max(flooding.result()) < REFUSED
        stats = check_ledger(spool)
    assert seen == sorted(set(seen)) and seen[-1] == 29_999
    assert (stats["acked"], stats["dropped"]) == (len(seen), 30_000 - len(seen))


def test_records_of_any_size_keep_the_quota(path: Path) -> None:
    sizes = [(number * 7_919) % 15_000 for number in range(500)]
    with open_spool(path, "drop_oldest", BY_BYTES) as spool:
        for number, size in enumerate(sizes):
            spool.append("t", b"%010d" % number + bytes(size))
            assert disk_bytes(path) <= QUOTA
        spool.sync(DEADLINE_S)
        found = [(number_of(message), len(message.payload) - 10) for message in read_all(spool)]
        stats: dict[str, Any] = spool.stats()
    assert found == list(enumerate(sizes))[stats["dropped"] :]
    assert stats["published_bytes"] == stats["dropped_bytes"] + stats["backlog_bytes"]


# ---- what is in flight ----


@each_limit
def test_what_was_read_is_never_a_victim(limit: dict[str, Any], path: Path) -> None:
    with open_spool(path, "drop_oldest", limit) as spool:
        flood(spool, 100)
        in_flight = spool.read(40 * SPAN)
        flood(spool, FLOOD, 100)
        dropped = settle(spool)["dropped"]
        for message in in_flight:
            spool.ack(message.position or 0)
        assert dropped > 0
        assert check_ledger(spool)["acked"] == len(in_flight)
        rest = drain(spool)
        # From the segment that was being read the rest may be there too; behind it is one hole.
        hole = [b - a for a, b in zip([number_of(in_flight[-1]), *rest], rest, strict=False) if b != a + 1]
        assert len(hole) == 1 and rest == sorted(rest) and rest[-1] == FLOOD + 99
        assert hole[0] - 1 == check_ledger(spool)["dropped"] == dropped


def test_where_everything_is_in_flight_the_new_one_goes(path: Path) -> None:
    in_flight: list[Message] = []
    with open_spool(path, "drop_oldest", BY_BYTES, spill_timeout=0.05) as spool:
        while append(spool, len(in_flight)) < REFUSED:
            in_flight += spool.read()
        assert check_ledger(spool)["dropped"] == 1
        assert [number_of(message) for message in in_flight] == list(range(len(in_flight)))
        spool.ack(in_flight[-1].position or 0)
        assert check_ledger(spool)["acked"] == len(in_flight)
        assert append(spool, 0) < REFUSED


def test_after_rewinding_the_oldest_may_go(path: Path) -> None:
    with open_spool(path, "drop_oldest", BY_BYTES) as spool:
        flood(spool, 500)
        (oldest, *_) = spool.read()
        spool.rewind()
        flood(spool, FLOOD, 500)
        dropped = settle(spool)["dropped"]
        with pytest.raises(ValueError):
            spool.ack(oldest.position or 0)
        assert drain(spool) == list(range(dropped, FLOOD + 500))


# ---- drop_newest ----


@each_limit
@pytest.mark.parametrize("durability", DURABILITIES)
def test_the_newest_go_and_the_oldest_stay_in_order(durability: str, limit: dict[str, Any], path: Path) -> None:
    with open_spool(path, "drop_newest", limit, durability=durability) as spool:
        positions = flood(spool)
        kept = [number for number, position in enumerate(positions) if position < REFUSED]
        stats = check_ledger(spool)
        assert kept[:100] == list(range(100))
        assert stats["dropped"] == FLOOD - len(kept) > 0
        assert drain(spool) == kept
        assert check_ledger(spool)["acked"] == len(kept)


def test_each_refused_message_has_a_position_of_its_own(path: Path) -> None:
    refused: list[int] = []
    for _ in range(2):
        with open_spool(path, "drop_newest", BY_BYTES) as spool:
            refused += [position for position in flood(spool) if position >= REFUSED]
    assert refused == sorted(set(refused))
    assert FLOOD < len(refused) < 2 * FLOOD


@pytest.mark.parametrize("on_full", ["drop_newest", "raise"])
def test_a_drained_spool_takes_messages_again(on_full: str, path: Path) -> None:
    with open_spool(path, on_full, BY_BYTES) as spool:
        for _ in range(3):
            try:
                flood(spool)
            except SpoolFull:
                assert on_full == "raise"
            assert drain(spool)[0] == 0
            assert append(spool, 7) < REFUSED
            assert drain(spool) == [7]
            check_ledger(spool)


# ---- raise, and block with a time limit ----


@each_limit
@pytest.mark.parametrize("on_full", ["raise", "block"])
@pytest.mark.parametrize("durability", DURABILITIES)
def test_full_is_an_error_and_nothing_is_stored(durability: str, on_full: str, limit: Any, path: Path) -> None:
    with open_spool(path, on_full, limit, durability=durability) as spool:
        full_at = append_until_full(spool)
        stats = check_ledger(spool)
        assert (stats["published"], stats["backlog_messages"], stats["dropped"]) == (full_at, full_at, 0)
        assert drain(spool) == list(range(full_at))


@pytest.mark.parametrize("on_full", ["raise", "block", "drop_newest"])
def test_a_full_spool_is_there_again_after_a_restart(on_full: str, path: Path) -> None:
    with open_spool(path, on_full, BY_BYTES) as spool:
        if on_full == "drop_newest":
            flood(spool)
        else:
            append_until_full(spool)
        before = check_ledger(spool)
        # What the quota keeps from the disk stays in the ring's file.
        assert 0 < spool.close() <= RING_HOLDS
    with open_spool(path, on_full, BY_BYTES) as spool:
        after = check_ledger(spool)
        assert [after[name] for name in ("published", "dropped", "backlog_messages")] == [
            before[name] for name in ("published", "dropped", "backlog_messages")
        ]
        assert drain(spool) == list(range(before["backlog_messages"]))


def test_in_memory_mode_closing_tells_how_many_the_quota_kept_from_the_disk(path: Path) -> None:
    with open_spool(path, "raise", BY_BYTES, durability="memory") as spool:
        full_at = append_until_full(spool)
        unsaved = spool.close()
    with open_spool(path, "raise", BY_BYTES, durability="memory") as spool:
        assert 0 < unsaved <= RING_HOLDS
        assert drain(spool) == list(range(full_at - unsaved))


# ---- block ----


@each_limit
@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_blocked_append_goes_on_when_another_thread_acknowledges(durability: str, limit: Any, path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with open_spool(path, "block", limit, block_timeout=None, durability=durability) as spool:
            flooding = pool.submit(flood, spool)
            eventually(lambda: spool.stats()["storage"] == "full")
            assert not flooding.done()
            seen: list[int] = []
            until_s = time.monotonic() + DEADLINE_S
            while len(seen) < FLOOD:
                assert time.monotonic() < until_s, f"{len(seen)} numbers"
                seen += drain(spool)
            positions = flooding.result(DEADLINE_S)
            stats = check_ledger(spool)
    assert seen == list(range(FLOOD)) and positions == sorted(set(positions))
    assert (stats["acked"], stats["dropped"]) == (FLOOD, 0)


def test_several_blocked_threads_go_on_and_lose_nothing(path: Path) -> None:
    threads = 4
    with ThreadPoolExecutor(threads) as pool:
        with open_spool(path, "block", BY_BYTES, block_timeout=None) as spool:
            flooding = [pool.submit(flood, spool, FLOOD, FLOOD * thread) for thread in range(threads)]
            eventually(lambda: spool.stats()["storage"] == "full")
            seen: list[int] = []
            until_s = time.monotonic() + DEADLINE_S
            while len(seen) < threads * FLOOD:
                assert time.monotonic() < until_s, f"{len(seen)} numbers"
                seen += drain(spool)
            for one in flooding:
                one.result(DEADLINE_S)
    for thread in range(threads):
        assert [number for number in seen if number // FLOOD == thread] == list(
            range(FLOOD * thread, FLOOD * (thread + 1))
        )


def test_closing_ends_a_blocked_append_which_stores_nothing(path: Path) -> None:
    stored: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        with open_spool(path, "block", BY_BYTES, block_timeout=None) as spool:
            blocked = pool.submit(lambda: [stored.append(append(spool, number)) for number in range(FLOOD)])
            eventually(lambda: spool.stats()["storage"] == "full")
        with pytest.raises(ClosedError):
            blocked.result(DEADLINE_S)
    with open_spool(path, "block", BY_BYTES) as spool:
        assert drain(spool) == list(range(len(stored)))


# ---- the disk ----


def _keep_reading(spool: Spool) -> None:
    try:
        flood(spool, 100)
    except SpoolFull:
        found = spool.read(50_000)
        spool.ack(found[-1].position or 0)


def _only_append(spool: Spool) -> None:
    flood(spool, 100)


def _read_and_let_go(spool: Spool) -> None:
    flood(spool, 100)
    spool.read(50_000)
    spool.rewind()


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize(
    ("on_full", "work"),
    [
        ("drop_oldest", _only_append),
        ("drop_oldest", _read_and_let_go),
        ("drop_newest", _only_append),
        ("drop_newest", _read_and_let_go),
        ("block", _keep_reading),
        ("raise", _keep_reading),
    ],
)
def test_the_disk_never_holds_more_than_the_quota(
    on_full: str, work: Callable[[Spool], None], durability: str, path: Path
) -> None:
    most = 0
    with open_spool(path, on_full, BY_BYTES, block_timeout=0.001, durability=durability) as spool:
        for _ in range(60):
            work(spool)
            most = max(most, disk_bytes(path))
            assert most <= QUOTA
            assert 0 <= int(str(spool.stats()["spool_bytes"])) <= QUOTA
        check_ledger(spool)
    assert most > QUOTA // 2
    assert disk_bytes(path) <= QUOTA


def test_the_disk_never_holds_more_than_the_quota_at_any_moment(path: Path) -> None:
    with ThreadPoolExecutor(1) as pool, open_spool(path, "drop_oldest", BY_BYTES) as spool:
        flooding = pool.submit(flood, spool, 20_000)
        looks = 0
        while not flooding.done():
            assert disk_bytes(path) <= QUOTA
            looks += 1
        assert looks > 1 and flooding.result(DEADLINE_S)


# ---- restarts ----


@each_limit
def test_drops_stay_counted_over_restarts(limit: dict[str, Any], path: Path) -> None:
    dropped = 0
    for round_ in range(3):
        with open_spool(path, "drop_oldest", limit) as spool:
            stats = check_ledger(spool)
            assert stats["published"] == round_ * FLOOD and stats["dropped"] >= dropped
            flood(spool, FLOOD, round_ * FLOOD)
            dropped = check_ledger(spool)["dropped"]
    with open_spool(path, "drop_oldest", limit) as spool:
        stats = check_ledger(spool)
        assert stats["dropped"] >= dropped
        assert drain(spool) == list(range(stats["dropped"], 3 * FLOOD))


@pytest.mark.parametrize("on_full", ["drop_oldest", "drop_newest"])
@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_kill_leaves_the_account_exact(durability: str, on_full: str, path: Path) -> None:
    program = f"""
import sys
from tests.test_limits import *
spool = open_spool(Path(sys.argv[1]), {on_full!r}, BY_BYTES, durability={durability!r})
flood(spool)
print("ready", flush=True)
while True:
    flood(spool, 1, FLOOD)
"""
    with Child(program, path) as child:
        assert child.line() == "ready"
        child.kill()
        assert child.process.returncode == -signal.SIGKILL
    with open_spool(path, on_full, BY_BYTES, durability=durability) as spool:
        stats = check_ledger(spool)
        assert stats["published"] >= FLOOD and stats["dropped"] > 0
        found = drain(spool)
        assert len(found) == stats["backlog_messages"] and found == sorted(found)
        assert found[0] == 0 if on_full == "drop_newest" else found[-1] == FLOOD or found[-1] == FLOOD - 1


def test_a_smaller_quota_after_a_restart_takes_the_oldest(path: Path) -> None:
    with open_spool(path, "drop_oldest", {"max_spool_bytes": 4 * QUOTA}) as spool:
        flood(spool)
        assert check_ledger(spool)["dropped"] == 0
    with open_spool(path, "drop_oldest", BY_BYTES) as spool:
        assert spool.recovery.records == FLOOD, "dropped before there was a need to"
        flood(spool, FLOOD, FLOOD)
        assert disk_bytes(path) <= QUOTA
        dropped = settle(spool)["dropped"]
        assert drain(spool) == list(range(dropped, 2 * FLOOD))


@pytest.mark.parametrize("on_full", ["drop_newest", "raise"])
def test_a_smaller_quota_after_a_restart_costs_nothing_stored(on_full: str, path: Path) -> None:
    with open_spool(path, on_full, {"max_spool_bytes": 4 * QUOTA}) as spool:
        flood(spool)
    with open_spool(path, on_full, BY_BYTES) as spool:
        stored = FLOOD
        try:
            stored += sum(position < REFUSED for position in flood(spool, FLOOD, FLOOD))
        except SpoolFull:
            stored = check_ledger(spool)["published"]
        assert FLOOD < stored < FLOOD + 2 * RING_HOLDS
        assert drain(spool) == list(range(stored))
        check_ledger(spool)


def test_policies_may_change_over_restarts(path: Path) -> None:
    start, expected = 0, 0
    for on_full in [*POLICIES, "drop_oldest"]:
        with open_spool(path, on_full, BY_BYTES) as spool:
            try:
                flood(spool, FLOOD, start)
            except SpoolFull:
                pass
            stats = check_ledger(spool)
            assert stats["published"] >= expected
            start, expected = start + FLOOD, stats["published"]
    with open_spool(path, "drop_oldest", BY_BYTES) as spool:
        found = drain(spool)
        assert found == sorted(set(found)) and found[-1] == start - 1
        check_ledger(spool)


def test_a_spool_gives_out_what_it_dropped_once(tmp_path: Path) -> None:
    with Spool(tmp_path / "spool", ring_bytes=64 * KIB, max_spool_bytes=256 * KIB) as spool:
        for _ in range(1000):
            spool.append("topic", bytes(KIB))
        eventually(lambda: spool.stats()["dropped"])
        drops = spool.losses()
        assert {drop.reason for drop in drops} == {"spool limit reached, oldest dropped"}
        assert drops[0].first == 0 and drops[0].count > 0
        assert not [drop for drop in spool.losses() if drop.first == 0]
