"""Positions are issued only where they were reserved, and only where a reader takes them."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from .disk import POLICIES, Disk, Log
from .test_log_damage import edit_meta, spool_of

MINUTE_MS = 60_000
POSITION_MAX = (1 << 63) - (1 << 48)
REFUSED = 1 << 63


@pytest.mark.parametrize("on_full", POLICIES)
def test_where_nothing_more_can_be_reserved_the_policy_decides(
    on_full: str, disk: Disk, open_log: Callable[..., Log]
) -> None:
    log = open_log(on_full=on_full, block_timeout_ms=50, ring_bytes=65_536)
    taken = [log.append(b"x" * 100)]
    disk.fail("CHANGES", errno.EIO, sticky=True)
    log.lib.stress_use_up(log.c, 1000)
    end = log.lib.cps_log_published(log.c) + 1000
    log.until(lambda: log.stats().storage_error == errno.EIO)
    while 0 <= (position := log.append(b"x" * 100)) < REFUSED:
        taken.append(position)
        assert position + 136 <= end, "a position was issued that is not reserved"
    assert len(taken) == 1 + 1000 // 136
    assert position == log.lib.CPS_FULL if on_full in ("raise", "block") else position == REFUSED
    stats = log.check()
    assert stats.storage == log.lib.CPS_STORAGE_FAILED
    assert stats.settled.dropped_messages == 0, "none that is older makes place"
    disk.heal()
    log.until(lambda: disk.lib.sim_advance(disk.c, MINUTE_MS) or log.append(b"x" * 100) < REFUSED)
    log.until(lambda: log.stats().storage == log.lib.CPS_STORAGE_OK or log.append(b"y") < 0)
    assert [record.position for record in log.drain() if record.payload[:1] == b"x"][: len(taken)] == taken
    log.check()


def test_a_block_that_is_half_used_is_followed_by_the_next(disk: Disk, open_log: Callable[..., Log]) -> None:
    log = open_log(on_full="block")
    log.lib.stress_use_up(log.c, 100)
    for _ in range(100):
        assert log.append(b"x" * 100) >= 0
        log.settle(log.drain())
    log.check()


@pytest.mark.parametrize("room", [-8, 0, 8, 1000])
def test_at_the_end_of_all_positions_messages_are_refused_and_none_is_lost(room: int) -> None:
    spool = spool_of(5, 5)
    edit_meta(spool, 48, (POSITION_MAX - room).to_bytes(8, "little"))
    edit_meta(spool, 56, b"\0")  # nobody knows where it stood, so it starts there
    taken = []
    for _ in range(3):
        log = Log(spool.disk, **spool.chosen)
        log.ok(log.status)
        taken += [position for _ in range(10) if (position := log.append(b"x" * 100)) >= 0]
        log.check()
        log.close()
    log = Log(spool.disk, **spool.chosen)
    assert [record.position for record in log.drain()] == taken
    log.check()
    log.close()
    spool.disk.close()
