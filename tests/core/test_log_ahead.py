"""What is settled ahead of the head outlives kills and closing, and what a file says of it is not believed blindly."""

from __future__ import annotations

import random
from typing import Any

import pytest

from .disk import Disk, Log, Record
from .test_meta import Meta

AHEAD_MAX = 6


def publish(log: Log, numbers: range) -> list[int]:
    return [log.append(b"%06d" % number + bytes(120)) for number in numbers]


def number_of(record: Record) -> int:
    return int(record.payload[:6])


def split_with(log: Log, backlog: range, live: range) -> list[Record]:
    """A backlog, then live messages, which are read and given back."""
    publish(log, backlog)
    log.rewind()
    assert log.split() == log.lib.CPS_SPLIT_BEGUN
    publish(log, live)
    got = read_live(log)
    assert [number_of(one) for one in got] == list(live)
    return got


def read_live(log: Log) -> list[Record]:
    seen: list[Record] = []
    while isinstance(got := log.read(live=True), list):
        seen += got
    assert got == log.lib.CPS_EMPTY
    return seen


def numbers(log: Log) -> list[int]:
    return [number_of(one) for one in log.drain()]


def end(log: Log, how: str) -> None:
    if how == "kill":
        log.kill()
        return
    log.lib.cps_log_shut(log.c)
    log.finish()
    assert log.close() == 0


@pytest.mark.parametrize("how", ["kill", "close"])
@pytest.mark.parametrize("durability", ["process", "power"])
def test_what_was_settled_ahead_is_not_sent_again(disk: Disk, how: str, durability: str) -> None:
    log = Log(disk, durability=durability, spill_after_ms=0)
    live = split_with(log, range(100), range(100, 110))
    log.settle(live[:7], live=True)
    end(log, how)
    log = Log(disk, durability=durability, spill_after_ms=0)
    assert log.check().pending_messages == 103
    assert numbers(log) == [*range(100), 107, 108, 109]
    log.close()


@pytest.mark.parametrize("nth", [1, 2, 15, 16, 17])  # the first word of a slot that belongs to a range is the 15th
@pytest.mark.parametrize("point", ["settle-begin", "slot-settled", "commit-settled", "settle-committed"])
def test_a_kill_while_live_messages_are_settled_leaves_the_old_state_or_the_new_one(
    disk: Disk, point: str, nth: int
) -> None:
    log = Log(disk, spill_after_ms=0)
    live = split_with(log, range(30), range(30, 50))
    name = disk.ffi.new("char[]", point.encode())  # has to live while it is watched for
    disk.lib.crash_watch(disk.c, name, nth)
    done = 0
    while not disk.lib.crash_happened():
        done += 1
        log.settle(live[done - 1 : done], live=True)
    disk.lib.crash_stop()
    log.close()
    disk.lib.sim_restart(disk.c, False, 0)
    log = Log(disk, spill_after_ms=0)
    stats = log.check()
    assert stats.settled.acked_messages in (done - 1, done)
    assert stats.settled.dropped_messages == 0
    assert numbers(log) == [*range(30), *range(30 + stats.settled.acked_messages, 50)]
    log.close()


def test_the_streams_are_one_again_when_the_backlog_is_settled(disk: Disk) -> None:
    log = Log(disk)
    live = split_with(log, range(5), range(5, 9))
    backlog = log.read()
    assert isinstance(backlog, list) and [number_of(one) for one in backlog] == list(range(5))
    assert log.read() == log.lib.CPS_EMPTY  # what comes next is the live stream's
    log.settle(live[:2], live=True)
    assert log.ranges() == [(live[0].position, live[1].end)]
    log.settle(backlog)
    assert not log.is_split and log.ranges() == []
    assert log.stats().settled.head == live[1].end
    publish(log, range(9, 11))
    assert numbers(log) == [9, 10]
    log.settle(live[2:], live=True)  # told by one who has not noticed yet
    assert log.check().pending_messages == 2
    log.close()


def test_who_waits_for_a_live_message_waits_for_nothing_else(disk: Disk) -> None:
    log = Log(disk)
    live = split_with(log, range(5), range(5, 9))
    log.settle(live[:2], live=True)
    wait = log.lib.cps_log_wait_settled
    assert wait(log.c, live[1].position, False, 0) == log.lib.CPS_OK
    assert wait(log.c, live[1].position, True, 0) == log.lib.CPS_TIMEOUT
    assert wait(log.c, live[2].position, False, 0) == log.lib.CPS_TIMEOUT
    log.close()


def test_live_messages_that_are_settled_in_time_are_not_written(disk: Disk) -> None:
    log = Log(disk, ring_bytes=4096)
    publish(log, range(100))  # much more than the ring takes
    start = log.stats().settled.head
    log.rewind()
    assert log.split() == log.lib.CPS_SPLIT_BEGUN
    backlog_bytes = log.fronts().live_first - start
    for number in range(100, 1000):
        publish(log, range(number, number + 1))
        got = log.read(live=True)
        assert isinstance(got, list)
        log.settle(got, live=True)
    assert log.stats().spilled_bytes <= backlog_bytes
    assert len(log.ranges()) == 1
    log.check()
    assert numbers(log) == list(range(100))
    log.close()


def test_each_outage_begins_one_more_until_there_are_too_many(disk: Disk) -> None:
    log = Log(disk, spill_after_ms=0)
    lib = log.lib
    expected: list[int] = []
    for outage in range(AHEAD_MAX):
        start = 100 * outage
        live = split_with(log, range(start, start + 20), range(start + 20, start + 30))
        log.settle(live[:5], live=True)
        expected += [*range(start, start + 20), *range(start + 25, start + 30)]
    publish(log, range(900, 920))
    log.rewind()
    assert log.split() == lib.CPS_SPLIT_FULL
    assert log.split(may_begin=False) == lib.CPS_SPLIT_GOES_ON
    assert [number_of(one) for one in read_live(log)] == [*range(525, 530), *range(900, 920)]
    log.kill()
    log = Log(disk, spill_after_ms=0)
    assert len(log.ranges()) == AHEAD_MAX
    drained = log.drain()
    assert [number_of(one) for one in drained] == [*expected, *range(900, 920)]
    log.settle(drained)
    assert log.check().pending_messages == 0 and log.ranges() == []
    log.close()


def test_a_short_outage_goes_on_with_the_last_stream(disk: Disk) -> None:
    log = Log(disk)
    live = split_with(log, range(20), range(20, 30))
    log.settle(live[:4], live=True)
    publish(log, range(30, 33))
    log.rewind()
    assert log.split(backlog_bytes=5000) == log.lib.CPS_SPLIT_GOES_ON
    assert [number_of(one) for one in read_live(log)] == list(range(24, 33))
    log.close()


def test_dup_is_only_for_what_may_have_been_sent(disk: Disk) -> None:
    log = Log(disk)
    live = split_with(log, range(20), range(20, 30))
    backlog = log.read(take=3)
    assert isinstance(backlog, list)
    log.settle(live[:4], live=True)
    publish(log, range(30, 40))
    log.rewind()
    assert log.split() == log.lib.CPS_SPLIT_BEGUN  # another outage: what came meanwhile is a backlog too
    resent = []
    while isinstance(got := log.read(max_bytes=1, take=1), list):
        resent += [number_of(one) for one in got if one.position < log.batch.dup_below]
    assert resent == [0, 1, 2, *range(24, 30)]
    log.close()


@pytest.mark.parametrize("backlog", [5, 100])
def test_without_room_the_oldest_go_and_nothing_that_was_settled_is_counted(disk: Disk, backlog: int) -> None:
    """In memory, and on the disk."""
    directory = None if backlog == 5 else "/spool"
    log = Log(disk, directory, on_full="drop_oldest", ring_bytes=4096, segment_bytes=4096, spool_bytes_max=40_000)
    live = split_with(log, range(backlog), range(backlog, backlog + 4))
    log.settle(live[:3], live=True)
    if directory is None:
        log.rewind()  # of what is in flight nothing goes, nor of what came after it
    losses = log.losses()
    for number in range(1000, 1400):
        publish(log, range(number, number + 1))
        losses += log.losses()
    stats = log.check()
    lost = sum(loss.messages for loss in losses)
    assert lost == stats.settled.dropped_messages > 0
    assert stats.settled.acked_messages == 3
    for loss in losses:
        if loss.first < 1 << 63:
            assert not any(loss.first <= one.position < loss.end for one in live[:3])
    log.rewind()
    seen: list[int] = []
    for _ in range(3):  # the backlog's, then what has become the only stream
        rest = log.drain()
        seen += [number_of(one) for one in rest]
        log.settle(rest)
    assert seen == sorted(seen)
    assert log.check().pending_messages == 0
    assert stats.produced.messages == lost + 3 + len(seen)
    log.close()


@pytest.mark.parametrize("seed", range(60))
def test_ranges_that_nobody_can_have_settled_harm_nothing(disk: Disk, seed: int) -> None:
    chance = random.Random(seed)
    log = Log(disk, spill_after_ms=0)
    live = split_with(log, range(60), range(60, 90))
    log.settle(live[:10], live=True)
    head, published = log.stats().settled.head, log.stats().produced.published
    end(log, "close")
    meta = Meta(disk)
    count = chance.randrange(1, AHEAD_MAX + 1)
    meta.c.settled.ahead_count = count

    def place() -> int:
        kind = chance.randrange(4)
        if kind == 0:
            return chance.randrange(1 << 64)
        at = chance.randrange(head, published + 1)
        return at if kind == 1 else at // 8 * 8

    ranges: list[tuple[int, int, int]] = []
    for i in range(count):
        ranges.append((place(), place(), place()))
        if chance.random() < 0.5:
            first, last = sorted(ranges[-1][:2])
            ranges[-1] = first, last, last
        meta.c.settled.ahead[i].first, meta.c.settled.ahead[i].end, meta.c.settled.ahead[i].sent = ranges[-1]
    assert meta.save(meta.c.epoch, True) == disk.lib.CPS_OK
    assert meta.save(meta.c.epoch, True) == disk.lib.CPS_OK
    meta.close()
    log = Log(disk, spill_after_ms=0)
    log.ok(log.status)
    seen = log.drain()
    log.check()
    got = [number_of(one) for one in seen]
    assert got == sorted(set(got))
    log.settle(seen)
    log.rewind()
    assert log.check().pending_messages == 0
    assert log.ranges() == []
    fresh = publish(log, range(500, 510))
    assert fresh[0] >= published, "what was issued is issued again"
    assert numbers(log) == list(range(500, 510)), "a range holds for what was published after it was settled"
    log.close()


def test_a_range_that_begins_inside_a_file_is_not_believed(disk: Disk) -> None:
    log = Log(disk, spill_after_ms=0)
    positions = publish(log, range(20))
    end(log, "close")
    meta = Meta(disk)
    settled: Any = meta.c.settled
    settled.ahead_count = 1
    settled.ahead[0].first, settled.ahead[0].end, settled.ahead[0].sent = positions[5], positions[9], positions[9]
    assert meta.save(meta.c.epoch, True) == disk.lib.CPS_OK
    meta.close()
    log = Log(disk, spill_after_ms=0)
    assert numbers(log) == list(range(20))
    log.close()


def test_damage_before_what_is_pending_of_a_live_stream_costs_nothing(disk: Disk) -> None:
    log = Log(disk, spill_after_ms=0, ring_bytes=4096)
    publish(log, range(30))
    log.rewind()
    assert log.split() == log.lib.CPS_SPLIT_BEGUN
    publish(log, range(30, 90))  # the disk has much of it
    live = read_live(log)
    log.settle(live[:3], live=True)
    end(log, "close")
    (name,) = [name for name in disk.names() if int(name.rpartition("/")[2][:16], 16) == live[0].position]
    disk.view(name)[128 + 60] ^= 1  # in the first live message
    log = Log(disk, spill_after_ms=0)
    assert log.check().pending_messages == 87
    assert numbers(log) == [*range(30), *range(33, 90)]
    assert log.losses() == []
    log.close()
