"""The quarantine's share of the quota (_quarantine.c): two threads take of it and give back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .machine import Model, Program, Violation, add, cas, load, store
from .source import follows

MAX = 2


@follows(
    "_quarantine.c",
    "take_place",
    "taken = atomic_load_explicit(&q->bytes",
    "taken > q->max_bytes - in_blocks(size)) return false",
    "atomic_compare_exchange_weak_explicit(&q->bytes, &taken, taken + in_blocks(size)",
    "make_directory",
    "give_back(q, size)",
)
def take(size: int, variant: str = "") -> Program:
    taken = yield load("bytes", "share.seen")
    while taken <= MAX - size:
        if variant == "looked at, then stored":
            yield store("bytes", taken + size, "share.take", depends=True)
            return True
        there = yield cas("bytes", taken, taken + size, "share.take")
        if there == taken:
            return True
        taken = there
    return False


@follows("_quarantine.c", "give_back", "atomic_fetch_sub_explicit(&q->bytes, in_blocks(size)")
def give_back(size: int) -> Program:
    yield add("bytes", -size, "share.give")


def bounded(variant: str = "") -> Model:
    def keeps() -> Program:
        first = yield from take(1, variant)
        second = yield from take(1, variant)
        return first + second

    def fails() -> Program:
        if (yield from take(1, variant)):
            yield from give_back(1)
        return 0

    def end(memory: Mapping[str, Any], results: Sequence[Any]) -> None:
        if memory["bytes"] != sum(results) or memory["bytes"] > MAX:
            raise Violation(f"{results} were taken, and {memory['bytes']} are counted")

    return Model([[keeps, keeps, fails]], {"bytes": 0}, end=end)


MODELS = {"share.bounded": bounded}
VARIANTS = {"share.bounded": ["looked at, then stored"]}
