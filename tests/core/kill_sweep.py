"""Kill a seeded user of the log at every named point of the core, at several of the times that it is reached.

    python -m tests.core.kill_sweep power                        # every point that a user of that durability reaches
    python -m tests.core.kill_sweep power spill-taken            # only this one, with several seeds
    python -m tests.core.kill_sweep SEED SETTING POINT NTH       # one kill again

Each kill is announced on a line of its own before it happens, so that the last line names the one that ended the
process.
The flusher is a thread of its own: a kill that depends on its timing may take some repetitions to show again.
"""

from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from .build import CORE, sanitizers
from .killed import Setting, User

SMALL = {"segment_bytes": 4096}
CROWDED = SMALL | {"spool_bytes_max": 20_000, "spill_timeout_ms": 5}
DURABILITIES = ("memory", "process", "power")
LIVES = 3


def settings(group: str) -> list[Setting]:
    """Ways to use a log; a group is a durability, or ``cut``: power lost at each point with ``power``."""
    if group == "cut":
        return [
            Setting("cut", "power", cut=True, chosen=SMALL),
            Setting("cut-oldest", "power", cut=True, link_up=0.2, chosen=CROWDED | {"on_full": "drop_oldest"}),
        ]
    ways = [
        Setting(f"plain-{group}", group, chosen=SMALL),
        Setting(f"oldest-{group}", group, link_up=0.2, chosen=CROWDED | {"on_full": "drop_oldest"}),
        Setting(f"newest-{group}", group, link_up=0.2, chosen=CROWDED | {"on_full": "drop_newest"}),
        Setting(f"faulty-{group}", group, faults=True,
                chosen=SMALL | {"on_full": "drop_oldest", "spill_timeout_ms": 5}),
    ]  # fmt: skip
    if group != "memory":
        # An open that was killed when it had said in the meta file, but not in the ring's, that the ring is its own.
        ways.append(Setting(f"takeover-{group}", group, first_kill=("opening-saved", 2), chosen=SMALL))
        # A batch that is in a file, and nowhere is it said.
        ways.append(Setting(f"unsaid-{group}", group, first_kill=("spill-appended", 3), chosen=SMALL))
    return ways


def points() -> set[str]:
    """Names of the points in the source."""
    source = "".join(path.read_text() for path in CORE.glob("_*.[ch]"))
    calls = re.findall(r"CPS_CRASH_POINT\(([^;]*)\);", source)
    return {name for call in calls for name in re.findall(r'"([a-z-]+)"', call)}


def begin(seed: int, setting: Setting) -> User:
    user = User(seed, setting)
    user.waits = True
    user.watch(*setting.first_kill)
    while setting.first_kill[0] and not user.lib.crash_happened():
        user.live()
    user.waits = False
    return user


def count(seed: int, setting: Setting) -> dict[str, int]:
    """How often the lives that are to be ended reach each point."""
    user = begin(seed, setting)
    user.watch()
    for _ in range(LIVES):
        user.live()
    counted = user.counted()
    user.end()
    return counted


def kill(seed: int, setting: Setting, point: str, nth: int) -> bool:
    """Live until killed there, see what is left, go on and be killed somewhere else.  False: it was never reached."""
    user = begin(seed, setting)
    user.watch(point, nth)
    for _ in range(LIVES):
        user.live()
        if user.lib.crash_happened():
            break
    happened = bool(user.lib.crash_happened())
    user.watch(user.random.choice(sorted(points())), user.random.choice([1, 1, 2, 5]))
    user.live()
    user.end()
    return happened


@dataclass
class Report:
    kills: int = 0
    missed: int = 0


def occurrences(hits: int, dice: random.Random, group: str, long: bool) -> list[int]:
    chosen = {dice.randrange(hits) + 1}
    if long or not sanitizers():
        chosen.add(hits)
    if long or (group in ("process", "power") and not sanitizers()):
        chosen |= {1, (hits + 1) // 2}
    return sorted(chosen)


def plan(group: str, seed: int, long: bool, only: list[str]) -> Iterator[tuple[Setting, str, int]]:
    """Each point at some of the times that it is reached: in all settings, or, in the short form, in one of them."""
    dice = random.Random(f"{group}/{seed}")
    counted = [(setting, count(seed, setting)) for setting in settings(group)]
    for point in only or sorted({name for _, hits in counted for name in hits}):
        ways = [(setting, hits[point]) for setting, hits in counted if point in hits]
        for setting, hits in ways if long else [dice.choice(ways)]:
            for nth in occurrences(hits, dice, group, long):
                yield setting, point, nth


def sweep(group: str, seed: int, long: bool, only: list[str]) -> Report:
    report = Report()
    for setting, point, nth in plan(group, seed, long, only):
        while True:
            print(seed, setting.name, point, nth, flush=True)
            if kill(seed, setting, point, nth):
                report.kills += 1
                break
            if nth == 1:
                report.missed += 1
                break
            nth //= 2  # noqa: PLW2901  # the flusher was slower, or had less to do
    return report


def main(arguments: list[str]) -> None:
    if arguments[0].isdigit():
        seed, name, point, nth = arguments
        (setting,) = [way for group in (*DURABILITIES, "cut") for way in settings(group) if way.name == name]
        print("killed" if kill(int(seed), setting, point, int(nth)) else "not reached")
        return
    only = arguments[1:]
    rounds = int(os.environ.get("CLOUDPUBSUB_KILL_ROUNDS", "5" if only else "0"))
    seeds = range(1, rounds + 1) if rounds else [int(os.environ.get("CLOUDPUBSUB_KILL_SEED", "1"))]
    for seed in seeds:
        report = sweep(arguments[0], seed, rounds > 0, only)
        print("done", seed, report.kills, report.missed, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
