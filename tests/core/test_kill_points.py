"""A kill at each instruction that matters, in the thread that executes it, and a power cut there.

``CLOUDPUBSUB_KILL_ROUNDS=n`` makes it n seeds, every setting and more occurrences, which takes minutes.  A failure ends
with the line that repeats it: ``python -m tests.core.kill_sweep SEED SETTING POINT NTH``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from .build import ROOT
from .disk import Disk, Log
from .kill_sweep import DURABILITIES, count, points, settings

LONG = int(os.environ.get("CLOUDPUBSUB_KILL_ROUNDS", "0"))
GROUPS = (*DURABILITIES, "cut")
SEEDS = 30


def test_every_point_in_the_source_is_reached() -> None:
    missing = points()
    assert len(missing) > 90
    for seed in range(SEEDS):
        for group in GROUPS:
            for setting in settings(group):
                missing -= count(seed, setting).keys()
        if not missing:
            return
    pytest.fail(f"never reached: {', '.join(sorted(missing))}")


@pytest.mark.timeout(120 + 900 * LONG)
@pytest.mark.parametrize("group", GROUPS)
def test_a_kill_at_any_point_costs_nothing_that_was_promised(group: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.kill_sweep", group],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    last = lines[-1] if lines else "nothing"
    assert done.returncode == 0, f"python -m tests.core.kill_sweep {last}\n{done.stderr}"
    for line in lines:
        if line.startswith("done"):
            _, seed, kills, missed = line.split()
            print(f"seed {seed}: {kills} kills; {missed} points that the flusher did not come by again")
            assert int(kills) > 60 and int(missed) < int(kills) / 10


@pytest.mark.parametrize("point", ["slot-settled", "slot-produced"])
def test_a_kill_between_two_words_of_the_counters_leaves_them_as_they_were(
    disk: Disk, open_log: Callable[..., Log], point: str
) -> None:
    """The flusher has nothing to do here, so each word of each commit has its turn."""
    name = disk.ffi.new("char[]", point.encode())
    published = acked = 0
    nth, happened = 1, True
    while happened:
        log = open_log(on_full="drop_newest")
        log.link(True)
        messages = [log.append(b"x" * 40) for _ in range(3)]
        seen = log.drain()
        assert [one.position for one in seen] == [*(one.position for one in seen[:-3]), *messages]
        published, pending = published + 3, len(seen)
        disk.lib.crash_watch(disk.c, name, nth)
        log.append(b"y" * 40)
        log.settle(seen[:2])
        happened = bool(disk.lib.crash_happened())
        disk.lib.crash_stop()
        log.close() if happened else log.kill()
        disk.lib.sim_restart(disk.c, False, 0)
        log = open_log(on_full="drop_newest")
        stats = log.check()
        came, went = stats.produced.messages - published, stats.settled.acked_messages - acked
        assert (came, went) in [(0, 0), (1, 0), (1, 2)] and stats.settled.dropped_messages == 0
        assert len(log.drain()) == pending + came - went
        published, acked = published + came, acked + went
        assert log.close() == 0
        nth += 1
    assert nth > 5
