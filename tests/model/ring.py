"""The ring (_ring.c, and what the log does with it): records go in under the ring's lock, out under the log's.

The bytes of the ring are two cells, of one record each, that are read and written as plain memory.  The record at
position p is p + 1, in cell p modulo 2; a cell is written anew while its record is read, if anything lets it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .machine import Model, Program, Violation, change, load, lock, peek, read, store, unlock, write
from .page import PLACES as PAGE
from .page import check_whole, get, put
from .source import follows

CELLS = 2
PINS = 2
PLACES = {
    "cell0": 0,
    "cell1": 0,
    "published": 0,
    "reclaim": 0,
    # Under the ring's lock:
    "produced": 0,
    "reclaim_seen": 0,
    # Under the log's lock:
    "sent": 0,
    "spilled": 0,
    "limit": 0,
    "pin0": None,
    "pin1": None,
}
LOCKS = {"ring": None, "log": None}


@follows(
    "_ring.c",
    "find_room",
    "<= ring->ring_bytes)) return true",
    "ring->reclaim_seen = atomic_load_explicit(&ring->reclaim",
    "<= ring->ring_bytes",
)
def find_room(produced: int) -> Program:
    if produced + 1 - (yield read("reclaim_seen")) <= CELLS:
        return True
    seen = yield load("reclaim", "ring.reclaim.load")
    yield write("reclaim_seen", seen)
    return produced + 1 - seen <= CELLS


@follows(
    "_ring.c",
    "cps_ring_push",
    "pthread_mutex_trylock(&ring->lock)",
    "pthread_mutex_lock(&ring->lock)",
    "find_room(ring, pad + span)",
    "copy_record(ring, message, start",
    "ring->produced.published = start + span",
    "cps_shared_commit_produced(ring->shared, &ring->produced)",
    "atomic_store_explicit(&ring->published, ring->produced.published",
    "pthread_mutex_unlock(&ring->lock)",
)
def push(page: str = "", variant: str = "") -> Program:
    """Its position, or None: full.  With `page`, of two words, the counters are put there too."""
    yield lock("ring")
    produced = yield read("produced")
    if not (yield from find_room(produced)):
        yield unlock("ring")
        return None
    if variant == "published before it is copied":
        yield store("published", produced + 1, "ring.published.store")
    if variant == "counted before it is copied":
        yield from put((produced + 1, produced + 1), page)
    yield write(f"cell{produced % CELLS}", produced + 1)
    yield write("produced", produced + 1)
    if page and variant != "counted before it is copied":
        yield from put((produced + 1, produced + 1), page)
    if variant != "published before it is copied":
        yield store("published", produced + 1, "ring.published.store")
    yield unlock("ring")
    return produced


@follows(
    "_ring.c",
    "move_reclaim",
    "lowest = ring->limit",
    "ring->pin_used[i] && ring->pin_position[i] < lowest",
    "atomic_store_explicit(&ring->reclaim, lowest",
)
def move_reclaim(variant: str = "") -> Program:
    lowest = yield read("limit")
    for pin in range(PINS):
        at = yield read(f"pin{pin}")
        if at is not None and at < lowest and variant != "a pin does not hold":
            lowest = at
    yield store("reclaim", lowest, "ring.reclaim.store")


@follows("_ring.c", "cps_ring_unpin", "ring->pin_used[pin] = false", "move_reclaim(ring)")
def unpin(pin: int, variant: str = "") -> Program:
    yield write(f"pin{pin}", None)
    yield from move_reclaim(variant)


@follows("_ring.c", "cps_ring_release", "limit <= ring->limit) return", "ring->limit = limit", "move_reclaim(ring)")
def release(limit: int, variant: str = "") -> Program:
    if limit > (yield read("limit")):
        yield write("limit", limit)
        yield from move_reclaim(variant)


def check_record(position: int) -> Program:
    found = yield read(f"cell{position % CELLS}")
    if found != position + 1:
        raise Violation(f"position {position} holds record {found}")


@follows(
    "_log_read.c",
    "read_stream",
    "pthread_mutex_lock(&log->lock)",
    "cps_ring_view(log->ring, position",
    "cps_ring_pin(log->ring, CPS_PIN_READER, position)",
    "*cps_log_cursor(log, live) = position + batch->size",
    "pthread_mutex_unlock(&log->lock)",
)
@follows(
    "_log_read.c",
    "cps_log_read_done",
    "pthread_mutex_lock(&log->lock)",
    "cps_ring_unpin(log->ring, CPS_PIN_READER)",
    "pthread_mutex_unlock(&log->lock)",
)
@follows(
    "_ring.c",
    "cps_ring_view",
    "published = cps_ring_published(ring)",
    "position >= atomic_load_explicit(&ring->reclaim",
    "position == published) return CPS_EMPTY",
)
def read_batch(variant: str = "") -> Program:
    """Copies what was published to the socket; how much that was."""
    yield lock("log")
    position = max((yield read("sent")), (yield read("spilled")))  # what stands before it is read from the disk
    published = yield load("published", "ring.published.load")
    if position < (yield load("reclaim", "ring.reclaim.view")):
        raise Violation("a reader's place may be written over")
    if position == published:
        yield unlock("log")
        return 0
    yield write("pin0", position)
    yield write("sent", published)
    if variant == "the pin goes before the copy":
        yield from unpin(0)
    yield unlock("log")
    for i in range(position, published):
        yield from check_record(i)
    if variant != "the pin goes before the copy":
        yield lock("log")
        yield from unpin(0, variant)
        yield unlock("log")
    return published - position


@follows(
    "_log_write.c", "settle", "pthread_mutex_lock(&log->lock)", "cps_log_commit(log)", "pthread_mutex_unlock("
)
@follows("_log_write.c", "cps_log_commit", "cps_shared_commit_settled(", "cps_ring_release(log->ring, keep)")
def settle(variant: str = "") -> Program:
    """All that was sent is acknowledged."""
    yield lock("log")
    yield from release((yield read("sent")), variant)
    yield unlock("log")


@follows(
    "_flusher.c",
    "stage",
    "cps_ring_pin(log->ring, CPS_PIN_FLUSHER, position)",
    "cps_ring_view(log->ring, position + staged",
    "pthread_mutex_unlock(&log->lock)",
    "memcpy(log->staging + staged, bytes, whole)",
    "pthread_mutex_lock(&log->lock)",
    "cps_ring_unpin(log->ring, CPS_PIN_FLUSHER)",
)
@follows(
    "_flusher.c",
    "spill_batch",
    "size = stage(log, position",
    "pthread_mutex_unlock(&log->lock)",
    "cps_segment_append(active",
    "pthread_mutex_lock(&log->lock)",
    "take_in(log, size",
    "cps_log_commit(log)",
)
def spill(variant: str = "") -> Program:
    """Copies what was published to the disk, from where its place may come free."""
    yield lock("log")
    position = max((yield read("spilled")), (yield read("limit")))
    published = yield load("published", "ring.published.load")
    if position < published:
        yield write("pin1", position)
        yield unlock("log")
        for i in range(position, published):
            yield from check_record(i)
        yield lock("log")
        yield from unpin(1, variant)
        yield write("spilled", published)
        yield from release(published, variant)
    yield unlock("log")


def passed_on(variant: str = "") -> Model:
    """Two producers and a reader: each record is read once, whole, in order."""

    def producer() -> Program:
        for _ in range(2):
            yield from push(variant=variant)

    def reader() -> Program:
        for _ in range(2):
            if (yield from read_batch(variant)):
                yield from settle(variant)

    return Model([[producer, producer, reader]], PLACES, LOCKS)


def both_readers(variant: str = "") -> Model:
    """A producer, the reader and the flusher, which frees places while the reader is still at them."""

    def producer() -> Program:
        for _ in range(3):
            yield from push(variant=variant)

    def reader() -> Program:
        yield from read_batch(variant)

    def flusher() -> Program:
        for _ in range(2):
            yield from spill(variant)

    def end(memory: Mapping[str, Any], _: Sequence[Any]) -> None:
        if memory["reclaim"] != memory["limit"]:
            raise Violation("a place is held by nobody, and not free")

    return Model([[producer, reader, flusher]], PLACES, LOCKS, end=end)


PRODUCED, SETTLED = "produced.", "settled."


def killed(variant: str = "") -> Model:
    """Killed at any moment: what the page says is in the ring is there, and all that a producer was told of is said."""
    places = dict(PLACES)
    for at in (PRODUCED, SETTLED):
        places |= {at + name: value for name, value in PAGE.items()}

    def producer() -> Program:
        for _ in range(3):
            position = yield from push(PRODUCED, variant)
            if position is not None:
                yield change("told", lambda _, position=position: position + 1)

    def settler() -> Program:
        for _ in range(2):
            yield lock("log")
            published = yield load("published", "ring.published.load")
            if variant == "room is given before that is noted":
                yield from release(published)
            yield from put((published, published), SETTLED)
            if variant != "room is given before that is noted":
                yield from release(published)
            yield unlock("log")

    @follows(
        "_home.c",
        "cursors_hold",
        "cps_shared_read_produced(home->shared, &produced)",
        "cps_shared_read_settled(home->shared, &settled)",
        "walk(home, low, produced.published) == produced.published",
    )
    def survivor() -> Program:
        produced = yield from get(2, PRODUCED)
        settled = yield from get(2, SETTLED)
        check_whole(produced, (yield peek("told")))
        check_whole(settled)
        if not settled[0] <= produced[0] <= settled[0] + CELLS:
            raise Violation(f"[{settled[0]}, {produced[0]}) is not what a ring can hold")
        for i in range(settled[0], produced[0]):
            yield from check_record(i)

    return Model([[producer, settler], [survivor]], places, {**LOCKS, "told": 0}, frozenset({"told"}))


def watched(variant: str = "") -> Model:
    """Another process looks: never has more been settled than was published."""
    places = dict(PLACES)
    for at in (PRODUCED, SETTLED):
        places |= {at + name: value for name, value in PAGE.items()}

    def producer() -> Program:
        yield from push(PRODUCED)
        yield from push(PRODUCED)

    def settler() -> Program:
        for _ in range(2):
            yield lock("log")
            published = yield load("published", "ring.published.load")
            yield from put((published, published), SETTLED)
            yield unlock("log")

    @follows("inspect/ring.py", "state", "self._copy(_AT_SETTLED", "self._copy(_AT_PRODUCED")
    @follows("_shared.h", "cps_shared_look", "cps_shared_get(")
    def watcher() -> Program:
        if variant == "what was published is looked at first":
            produced = yield from get(2, PRODUCED)
            settled = yield from get(2, SETTLED)
        else:
            settled = yield from get(2, SETTLED)
            produced = yield from get(2, PRODUCED)
        if settled and produced and settled[0] > produced[0]:
            raise Violation(f"{settled[0]} settled of {produced[0]}")

    return Model([[producer, settler, watcher]], places, LOCKS)


MODELS = {
    "ring.passed_on": passed_on,
    "ring.both_readers": both_readers,
    "ring.killed": killed,
    "ring.watched": watched,
}
VARIANTS = {
    "ring.passed_on": ["published before it is copied"],
    "ring.both_readers": ["a pin does not hold", "the pin goes before the copy"],
    "ring.watched": ["what was published is looked at first"],
    "ring.killed": ["counted before it is copied", "room is given before that is noted"],
}
