"""Whose the ring in tmpfs is (_home.c), over kills at any moment of several opens.

An open announces its generation in the page, saves it in the meta file, and commits it in the page.  What the next
process finds in tmpfs is believed if it is what the meta file says, so it must be, whatever moment the last one was
killed at.
"""

from __future__ import annotations

from typing import Any

from .machine import Model, Program, Violation, change, load, peek, read, store, write
from .source import follows

PLACES = {"page": 0, "magic": 0, "generation": 0, "next": 0}


@follows(
    "_home.c",
    "cps_home_make",
    "s->ring_bytes = ring_bytes",
    "cps_shared_commit_produced(s, &produced)",
    "atomic_store_explicit(&s->magic, CPS_SHARED_MAGIC",
)
def make(variant: str = "") -> Program:
    if variant == "the magic goes first":
        yield store("magic", 1, "home.magic.store")
    yield write("page", 1)
    if variant != "the magic goes first":
        yield store("magic", 1, "home.magic.store")


@follows(
    "_home.c",
    "is_ours",
    "atomic_load_explicit(&s->magic",
    "s->version != CPS_SHARED_VERSION",
    "own = atomic_load_explicit(&s->generation",
    "next = atomic_load_explicit(&s->next_generation",
    "generation != 0 && (own == generation || next == generation)",
)
def is_ours(generation: int) -> Program:
    if (yield load("magic", "home.magic.load")) == 0:
        return False
    if (yield read("page")) == 0:
        raise Violation("believed before it was filled")
    own = yield load("generation", "home.generation.load")
    announced = yield load("next", "home.announced.load")
    return generation != 0 and generation in (own, announced)


@follows(
    "_home.c",
    "cps_home_announce",
    "next = atomic_load_explicit(&home->shared->next_generation",
    "next != 0 && next == current",
    "atomic_store_explicit(&home->shared->generation, next",
    "atomic_store_explicit(&home->shared->next_generation, generation",
)
def announce(current: int, generation: int, variant: str = "") -> Program:
    announced = yield load("next", "home.next.load")
    if announced != 0 and announced == current and variant != "what was announced is forgotten":
        yield store("generation", announced, "home.promote", depends=True)
    yield store("next", generation, "home.announce", depends=True)


@follows(
    "_home.c",
    "cps_home_commit",
    "atomic_store_explicit(&home->shared->generation, generation",
    "atomic_store_explicit(&home->shared->next_generation, 0",
)
def commit(generation: int, variant: str = "") -> Program:
    if variant == "the announcement goes first":
        yield store("next", 0, "home.committed")
    yield store("generation", generation, "home.commit")
    if variant != "the announcement goes first":
        yield store("next", 0, "home.committed")


@follows("_log.c", "save_opening", "cps_home_announce(", "cps_meta_save(meta, true)", "cps_home_commit(")
def take_over(current: int, generation: int, variant: str = "") -> Program:
    yield from announce(current, generation, variant)
    yield change("meta", lambda _: generation)
    yield from commit(generation, variant)


def opens(variant: str = "") -> Model:
    def first() -> Program:
        yield from make(variant)
        yield from take_over(0, 1, variant)

    def then(generation: int) -> Any:
        @follows("_log.c", "adopt_ring", "cps_home_find(log->io, config->ring_directory")
        def opens() -> Program:
            current = yield peek("meta")
            if (yield from is_ours(current)):
                yield from take_over(current, generation, variant)
            elif current != 0:
                raise Violation("a ring that is current is not believed, and lost")

        return opens

    return Model([[first], [then(2)], [then(3)], [then(4)]], PLACES, {"meta": 0}, frozenset({"meta"}))


MODELS = {"home.opens": opens}
VARIANTS = {
    "home.opens": ["the magic goes first", "what was announced is forgotten", "the announcement goes first"],
}
