"""The time stamp that producers share (stamp_now in _log_write.c).

One clock stands for both: its time is a tick, and the stamp that is read for it.  A stamp may be as old as the tick
that its producer saw, and no older: a message with a time to live would expire early.
"""

from __future__ import annotations

from .machine import Model, Program, Violation, cas, change, load, peek, store
from .source import follows


@follows(
    "_log_write.c",
    "stamp_now",
    "tick = io->tick_ms(io->context)",
    "atomic_load_explicit(&log->stamp_tick_ms",
    "return atomic_load_explicit(&log->stamp_ms",
    "stamp = io->boottime_ms(io->context)",
    "atomic_load_explicit(&log->stamp_ms",
    "while (seen < stamp",
    "atomic_compare_exchange_weak_explicit(&log->stamp_ms, &seen, stamp",
    "atomic_store_explicit(&log->stamp_tick_ms, tick",
    "return stamp",
)
def stamp_now(variant: str = "") -> Program:
    tick = yield peek("clock")
    if (yield load("tick", "stamp.tick.load")) == tick:
        stamp = yield load("stamp", "stamp.load")
    else:
        stamp = yield peek("clock")
        if variant == "the tick goes first":
            yield store("tick", tick, "stamp.tick.store")
        if variant == "a stamp may go back":
            yield store("stamp", stamp, "stamp.seen", depends=True)
        else:
            seen = yield load("stamp", "stamp.seen")
            while seen < stamp:
                there = yield cas("stamp", seen, stamp, "stamp.raise")
                if there == seen:
                    break
                seen = there
        if variant != "the tick goes first":
            yield store("tick", tick, "stamp.tick.store")
    if stamp < tick:
        raise Violation(f"stamped {stamp} at {tick}")


def shared(variant: str = "") -> Model:
    def clock() -> Program:
        yield change("clock", lambda now: now + 1)

    def producer() -> Program:
        yield from stamp_now(variant)

    return Model([[producer, producer, producer, clock]], {"tick": -1, "stamp": -1}, {"clock": 0})


MODELS = {"stamp.shared": shared}
VARIANTS = {"stamp.shared": ["a stamp may go back", "the tick goes first"]}
