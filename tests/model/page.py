"""The page of cursors and counters (_shared.h): written under a lock, read without one, and after a kill.

Two words stand for all that a slot holds; a writer always puts the same number in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .machine import Model, Program, Violation, change, load, lock, peek, read, store, unlock, write
from .source import follows

PLACES = {"sequence": 0, "slot0.0": 0, "slot0.1": 0, "slot1.0": 0, "slot1.1": 0}


@follows(
    "_shared.h",
    "cps_shared_put",
    "now = atomic_load_explicit(sequence",
    "slots + (now & 1) * words",
    "atomic_store_explicit(&slot[i], from[i]",
    "atomic_store_explicit(sequence, now",
)
def put(words: Sequence[Any], at: str = "", variant: str = "") -> Program:
    now = (yield load(f"{at}sequence", "page.own")) + 1
    slot = now & 1 if variant != "the slot that is current is written" else 1 - now & 1
    if variant == "the sequence moves first":
        yield store(f"{at}sequence", now, "page.sequence.put")
    for i, word in enumerate(words):
        yield store(f"{at}slot{slot}.{i}", word, "page.slot.put")
    if variant != "the sequence moves first":
        yield store(f"{at}sequence", now, "page.sequence.put")


@follows(
    "_shared.h",
    "cps_shared_get",
    "before = atomic_load_explicit(sequence",
    "slots + (before & 1) * words",
    "to[i] = atomic_load_explicit(&slot[i]",
    "atomic_load_explicit(sequence, memory_order_relaxed) == before) return",
)
def get(words: int, at: str = "", tries: int = 1, variant: str = "") -> Program:
    """None: not in so many tries."""
    for _ in range(tries):
        before = yield load(f"{at}sequence", "page.sequence.get")
        found = []
        for i in range(words):
            found.append((yield load(f"{at}slot{before & 1}.{i}", "page.slot.get")))
        if variant == "the sequence is not looked at again" or (yield load(f"{at}sequence", "page.again")) == before:
            return tuple(found)
    return None


def check_whole(found: Sequence[Any] | None, least: int = 0) -> None:
    if found is None:
        return
    if len(set(found)) != 1:
        raise Violation(f"a mixture: {found}")
    if found[0] < least:
        raise Violation(f"{found[0]} after {least}")


def watched(variant: str = "") -> Model:
    """Another process, or thread, looks twice while a writer puts three times."""

    def writer() -> Program:
        for n in (1, 2, 3):
            yield from put((n, n), variant=variant)

    def watcher() -> Program:
        first = yield from get(2, variant=variant)
        check_whole(first)
        second = yield from get(2, variant=variant)
        check_whole(second, first[0] if first else 0)

    return Model([[writer, watcher]], PLACES)


def two_writers(variant: str = "") -> Model:
    """Two producers put under their lock, and somebody looks without it."""

    def writer() -> Program:
        if variant != "without the lock":
            yield lock("lock")
        now = (yield read("count")) + 1
        yield write("count", now)
        yield from put((now, now))
        if variant != "without the lock":
            yield unlock("lock")

    def watcher() -> Program:
        check_whole((yield from get(2)))

    def end(memory: Mapping[str, Any], _: Sequence[Any]) -> None:
        if memory["sequence"] != 2:
            raise Violation("one put is lost")

    return Model([[writer, writer, watcher]], {**PLACES, "count": 0}, {"lock": None}, end=end)


def killed(variant: str = "") -> Model:
    """Killed at any moment of three puts, two of them in one hold of the lock; `told` is what a caller was told."""

    def writer() -> Program:
        yield lock("lock")
        yield from put((1, 1), variant=variant)
        yield from put((2, 2), variant=variant)
        yield unlock("lock")
        yield change("told", lambda _: 2)
        yield lock("lock")
        yield from put((3, 3), variant=variant)
        yield unlock("lock")
        yield change("told", lambda _: 3)

    def survivor() -> Program:
        check_whole((yield from get(2)), (yield peek("told")))

    return Model([[writer], [survivor]], PLACES, {"lock": None, "told": 0}, frozenset({"told"}))


MODELS = {"page.watched": watched, "page.two_writers": two_writers, "page.killed": killed}
VARIANTS = {
    "page.watched": [
        "the slot that is current is written",
        "the sequence moves first",
        "the sequence is not looked at again",
    ],
    "page.two_writers": ["without the lock"],
    "page.killed": ["the slot that is current is written", "the sequence moves first"],
}
