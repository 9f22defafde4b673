"""A close that cannot wait for the disk: the flusher goes on alone, and the spool is free when it is through."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from .disk import DURABILITIES, Disk, Log

COUNT = 20
DEADLINE_S = 60.0
KINDS = ["WRITE", "SYNC", "ALLOCATE", "OPEN", "SYNC_DIRECTORY", "TRUNCATE"]


def open_when_free(open_log: Callable[..., Log], **chosen: object) -> Log:
    deadline = time.monotonic() + DEADLINE_S
    while (log := open_log(**chosen)).status == log.lib.CPS_LOCKED:
        assert time.monotonic() < deadline, "the spool is never free again"
        time.sleep(0.001)
    log.ok(log.status)
    return log


def payloads(log: Log) -> list[int]:
    return [int(record.payload) for record in log.drain()]


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_hangs_and_comes_back_ends_what_could_not_be_waited_for(
    kind: str, durability: str, disk: Disk, open_log: Callable[..., Log]
) -> None:
    log = open_log(durability=durability, sync_interval_ms=3_600_000)
    positions = [log.append(b"%d" % number) for number in range(COUNT)]
    disk.hang(kind)
    unsaved = log.close(60)
    assert 0 <= unsaved <= COUNT and (kind != "WRITE" or unsaved == COUNT)
    log.until(lambda: disk.hanging() > 0)
    assert kind == "OPEN" or open_log(durability=durability).status == log.lib.CPS_LOCKED
    disk.come_back()
    log = open_when_free(open_log, durability=durability)
    assert log.opened.clean and not log.opened.ring_adopted, "everything was saved after all"
    done = log.drain()
    assert [record.position for record in done] == positions
    log.settle(done)
    assert log.check().pending_messages == 0


@pytest.mark.parametrize("durability", ["process", "power"])
def test_what_a_disk_that_comes_back_refuses_stays_in_the_ring(
    durability: str, disk: Disk, open_log: Callable[..., Log]
) -> None:
    log = open_log(durability=durability, sync_interval_ms=3_600_000)
    for number in range(COUNT):
        log.append(b"%d" % number)
    disk.hang("ALLOCATE")
    assert log.close(60) == COUNT
    log.until(lambda: disk.hanging() > 0)
    disk.fail("ALLOCATE", 5, sticky=True)
    disk.come_back()
    log = open_when_free(open_log, durability=durability)
    disk.heal()
    assert log.opened.ring_adopted and not log.opened.clean
    assert payloads(log) == list(range(COUNT))
    log.check()


def test_whoever_closed_is_not_told_anything_afterwards(disk: Disk, open_log: Callable[..., Log]) -> None:
    told: list[int] = []
    settings = {"on_full": "drop_oldest", "spool_bytes_max": 16_384, "segment_bytes": 4096, "durability": "memory"}
    log = open_log()
    notify = log.ffi.callback("void(void *, bool)", lambda *_: told.append(1))
    log.close()
    log = open_log(notify=notify, **settings)
    number = 0
    while log.stats().settled.dropped_messages == 0:  # it drops, and will again
        assert log.append(b"%0500d" % number) >= 0
        number += 1
    disk.hang("ALLOCATE")
    log.append(b"%0500d" % number)
    log.close(0)
    before = len(told)
    disk.come_back()
    open_when_free(open_log, **settings).close()
    assert len(told) == before


def test_closing_with_no_time_again_and_again_loses_nothing(open_log: Callable[..., Log]) -> None:
    """At whatever moment the flusher is, when it is left alone or just through."""
    expected: list[int] = []
    for number in range(200):
        log = open_when_free(open_log, durability="memory", ring_bytes=4096)
        found = payloads(log)
        assert found == expected
        if number % 20 == 19:
            log.rewind()
            log.settle(log.drain())
            expected = []
        log.append(b"%d" % number)
        expected.append(number)
        log.close(number % 3)
    assert payloads(open_when_free(open_log)) == expected
