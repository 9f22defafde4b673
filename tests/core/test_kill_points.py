"""A kill at each instruction that matters, in the thread that executes it, and a power cut there.

``CLOUDPUBSUB_KILL_ROUNDS=n`` makes it n seeds, every setting and more occurrences, which takes minutes.  A failure ends
with the line that repeats it: ``python -m tests.core.kill_sweep SEED SETTING POINT NTH``.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .build import ROOT
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
