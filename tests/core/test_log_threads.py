"""Producers, flusher, reader and a link that comes and goes, all at once on a small ring; each record is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .disk import Disk, Log

MILLISECONDS = 1000


def stress(log: Log, lossless: bool, seed: int) -> Any:
    report = log.ffi.new("stress_report *")
    wrong = log.lib.stress_log(log.c, 3, MILLISECONDS, lossless, seed, report)
    assert wrong == log.ffi.NULL, log.ffi.string(wrong)
    log.check()
    assert report.messages > 200
    assert report.rewinds > 0
    assert report.stats.pending_messages == 0
    return report


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("ring_bytes", [1024, 8192])
def test_nothing_is_lost_or_changed(open_log: Callable[..., Log], durability: str, ring_bytes: int) -> None:
    log = open_log(durability=durability, ring_bytes=ring_bytes, on_full="block", block_timeout_ms=(1 << 64) - 1,
                   segment_bytes=65_536, spool_bytes_max=8 << 20,  # on a fast machine producers get far ahead
                   spill_timeout_ms=60_000, spill_after_ms=0, sync_interval_ms=2)  # fmt: skip
    report = stress(log, True, ring_bytes)
    assert report.stats.spilled_bytes > 0 and report.wraps > 0
    assert report.stats.settled.dropped_messages == 0


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("on_full", ["drop_oldest", "drop_newest"])
def test_under_a_small_quota_nothing_is_changed_or_lost_uncounted(
    open_log: Callable[..., Log], durability: str, on_full: str
) -> None:
    log = open_log(durability=durability, on_full=on_full, spool_bytes_max=32_768, segment_bytes=4096,
                   spill_timeout_ms=20, spill_after_ms=0, sync_interval_ms=2)  # fmt: skip
    stats = stress(log, False, 7).stats
    lost = stats.settled.dropped_messages + stats.produced.refused
    assert lost > 0
    assert sum(loss.messages for loss in log.losses()) == lost


def test_the_disk_may_come_and_go_meanwhile(disk: Disk, open_log: Callable[..., Log]) -> None:
    log = open_log(on_full="drop_oldest", spool_bytes_max=65_536, spill_timeout_ms=20, spill_after_ms=0)
    disk.fail("CHANGES", 5, nth=50, sticky=True)
    stress(log, False, 11)
    assert log.stats().storage == log.lib.CPS_STORAGE_FAILED
