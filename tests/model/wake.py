"""Sleeping and waking: nobody sleeps on when there is something to do.

Each model ends when all its work is done; somebody who sleeps then was not woken.  No wait ends by itself: time
limits, and waits that end for no reason, are not needed for any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .machine import (
    Model,
    Program,
    Violation,
    await_,
    broadcast,
    change,
    load,
    lock,
    read,
    signal,
    store,
    unlock,
    wait,
    write,
)
from .ring import find_room
from .source import follows

NOT_ARMED = 99
PLACES = {
    "published": 0,
    "reclaim": 0,
    # Under the ring's lock:
    "produced": 0,
    "reclaim_seen": 0,
    "wake_at": NOT_ARMED,
    # Under the log's lock:
    "low": 0,
    "waiting": 0,
    "losses": 0,
    "closing": False,
}
LOCKS = {"ring": None, "log": None}
SIZE = 2


@follows(
    "_ring.c",
    "cps_ring_arm",
    "pthread_mutex_lock(&ring->lock)",
    "armed = ring->produced.published <= threshold",
    "ring->wake_at[waker] = armed ? threshold : NOT_ARMED",
    "pthread_mutex_unlock(&ring->lock)",
)
def arm(threshold: int, variant: str = "") -> Program:
    yield lock("ring")
    armed = variant == "armed without a look" or (yield read("produced")) <= threshold
    yield write("wake_at", threshold if armed else NOT_ARMED)
    yield unlock("ring")
    return armed


@follows(
    "_ring.c",
    "cps_ring_push",
    "pthread_mutex_lock(&ring->lock)",
    "find_room(ring, pad + span)",
    "ring->produced.published = start + span",
    "atomic_store_explicit(&ring->published, ring->produced.published",
    "*wake = take_due(ring)",
    "pthread_mutex_unlock(&ring->lock)",
)
@follows(
    "_ring.c",
    "take_due",
    "ring->produced.published <= ring->wake_at[i]",
    "ring->wake_at[i] = NOT_ARMED",
    "due |= 1u << i",
)
def push() -> Program:
    """None: full; else whether somebody is to be woken."""
    yield lock("ring")
    produced = yield read("produced")
    if not (yield from find_room(produced)):
        yield unlock("ring")
        return None
    due = produced + 1 > (yield read("wake_at"))
    if due:
        yield write("wake_at", NOT_ARMED)
    yield write("produced", produced + 1)
    yield store("published", produced + 1, "ring.published.store")
    yield unlock("ring")
    return due


@follows(
    "_log_write.c",
    "wake",
    "pthread_mutex_lock(&log->lock)",
    "pthread_cond_signal(&log->work)",
    "pthread_mutex_unlock(&log->lock)",
)
def wake_flusher(variant: str = "") -> Program:
    if variant != "a signal without the lock":
        yield lock("log")
    if variant != "no signal":
        yield signal("work")
    if variant != "a signal without the lock":
        yield unlock("log")


@follows(
    "_ring.c",
    "cps_ring_has_room",
    "cps_ring_published(ring)",
    "atomic_load_explicit(&ring->reclaim",
    "<= ring->ring_bytes",
)
def has_room() -> Program:
    """With the log's lock held.  Others may publish meanwhile, so it may say yes too often, and never no too often."""
    published = yield load("published", "ring.published.load")
    reclaim = yield load("reclaim", "ring.reclaim.room")
    return published + 1 - reclaim <= SIZE


@follows(
    "_log_write.c",
    "cps_log_append",
    "cps_ring_push(log->ring",
    "wake(log, due)",
    "pthread_mutex_lock(&log->lock)",
    "cps_ring_has_room(log->ring, span)",
    "make_room(log, span",
    "pthread_mutex_unlock(&log->lock)",
    "cps_ring_push(log->ring",
    "while (status == CPS_FULL)",
    "wake(log, due)",
)
@follows(
    "_log_write.c",
    "make_room",
    "log->producers_waiting++",
    "pthread_cond_signal(&log->work)",
    "cps_log_timed_wait(log, &log->room",
    "log->producers_waiting--",
)
def append(variant: str = "") -> Program:
    """Waits for room."""
    while (due := (yield from push())) is None:
        yield lock("log")
        while variant == "waits without a look" or not (yield from has_room()):
            yield write("waiting", (yield read("waiting")) + 1)
            yield signal("work")
            yield from wait("room", "log")
            yield write("waiting", (yield read("waiting")) - 1)
            if variant == "waits without a look":
                break
        yield unlock("log")
    if due:
        yield from wake_flusher(variant)


@follows(
    "_log_write.c",
    "cps_log_commit",
    "cps_ring_release(log->ring, keep)",
    "log->producers_waiting > 0) (void)pthread_cond_broadcast(&log->room)",
    "pthread_cond_broadcast(&log->settled_moved)",
)
def commit(low: int, variant: str = "") -> Program:
    yield write("low", low)
    if variant != "room is told of before it is there":
        yield store("reclaim", low, "ring.reclaim.store")
    if variant != "room is told to nobody" and (yield read("waiting")) > 0:
        yield (signal if variant == "room is told to one" else broadcast)("room")
    if variant == "room is told of before it is there":
        yield unlock("log")
        yield lock("log")
        yield store("reclaim", low, "ring.reclaim.store")


@follows(
    "_flusher.c",
    "cps_flusher_run",
    "pthread_mutex_lock(&log->lock)",
    "goal = spill_goal(log, now)",
    "spill_batch(log, goal)",
    "if (log->closing) break",
    "sleep_until_needed(log, now)",
    "finish(log)",
    "pthread_mutex_unlock(&log->lock)",
)
@follows("_flusher.c", "spill_goal", "log->closing) return published", "used > size / 2", "log->producers_waiting > 0")
@follows(
    "_flusher.c",
    "sleep_until_needed",
    "!cps_ring_arm(log->ring, CPS_WAKE_FLUSHER, threshold)) return",
    "cps_log_timed_wait(log, &log->work",
)
def flusher(variant: str = "", half: int = SIZE // 2) -> Program:
    """Writes to the disk what is in the ring when that is more than half full, when producers wait, and at the end."""
    yield lock("log")
    while True:
        low = yield read("low")
        used = (yield load("published", "ring.published.load")) - low
        closing = yield read("closing")
        if used > 0 and (closing or used > half or (yield read("waiting")) > 0):
            yield unlock("log")  # to write
            yield lock("log")
            yield from commit(low + used, variant)
        elif closing:
            break
        elif (yield from arm(low + half, variant)):
            if variant == "the lock is let go before the sleep":
                yield unlock("log")
                yield lock("log")
            yield from wait("work", "log")
    yield unlock("log")


@follows(
    "_log.c",
    "cps_log_finish",
    "pthread_mutex_lock(&log->lock)",
    "log->closing = true",
    "pthread_cond_broadcast(&log->work)",
    "pthread_mutex_unlock(&log->lock)",
)
def close(calls: int) -> Program:
    """When no other call is in progress any more."""
    yield await_("calls", lambda done: done == calls)
    yield lock("log")
    yield write("closing", True)
    yield broadcast("work")
    yield unlock("log")


def calls_append(variant: str) -> Program:
    yield from append(variant)
    yield change("calls", lambda done: done + 1)


def all_is_spilled(memory: Mapping[str, Any], _: Sequence[Any]) -> None:
    if memory["low"] != memory["produced"]:
        raise Violation("closed, and something is not on the disk")


def next_record(variant: str = "") -> Model:
    """The flusher sleeps until the next record; each wakes it as soon as it is there, whoever brings it."""

    def run() -> Program:
        yield lock("log")
        while (low := (yield read("low"))) < 2:
            published = yield load("published", "ring.published.load")
            if published > low:
                yield from commit(published)
            elif (yield from arm(low, variant)):
                if variant == "the lock is let go before the sleep":
                    yield unlock("log")
                    yield lock("log")
                yield from wait("work", "log")
        yield unlock("log")

    def producer() -> Program:
        yield from append(variant)

    return Model([[producer, producer, run]], PLACES, {**LOCKS, "work": (), "room": ()}, end=all_is_spilled)


def room(variant: str = "") -> Model:
    """Producers that wait for room in a full ring while the flusher makes some."""
    places = {**PLACES, "published": SIZE, "produced": SIZE}
    programs = [
        lambda: calls_append(variant),
        lambda: calls_append(variant),
        lambda: flusher(variant),
        lambda: close(2),
    ]
    return Model([programs], places, {**LOCKS, "work": (), "room": (), "calls": 0}, end=all_is_spilled)


CALL = 100  # more than there are records


@follows("_spool.pyx", "_notify", "eventfd_write(<int><Py_ssize_t>fd, 1 if data_came else CPS_CALL)")
def notify(data_came: bool) -> Any:
    return change("eventfd", lambda n: n + (1 if data_came else CALL))


@follows(
    "_log_write.c",
    "wake",
    "due & (1u << CPS_WAKE_READER)",
    "log->config.notify(log->config.notify_user, true)",
)
def publish() -> Program:
    if (yield from push()):
        yield notify(True)


@follows(
    "_log_write.c",
    "cps_log_lose",
    "log->losses[log->losses_used++] = loss",
    "log->config.notify(log->config.notify_user, false)",
)
def lose(variant: str = "") -> Program:
    yield lock("log")
    if variant == "told before it is there":
        yield notify(False)
        yield unlock("log")
        yield lock("log")
    yield write("losses", 1)
    if variant != "told before it is there":
        yield notify(variant == "a loss is told like a record")
    yield unlock("log")


@follows(
    "_log_read.c",
    "cps_log_arm",
    "pthread_mutex_lock(&log->lock)",
    "cps_ring_arm(log->ring, CPS_WAKE_READER, next)",
    "pthread_mutex_unlock(&log->lock)",
)
@follows(
    "_log_write.c",
    "cps_log_take_losses",
    "pthread_mutex_lock(&log->lock)",
    "log->losses_used -= n",
    "pthread_mutex_unlock(",
)
@follows(
    "_connection.py",
    "_loop",
    "self._write_or_hear_why(control, now_s)",
    "self._may_sleep()",
    "poller.poll(timeout_ms)",
    "self._clear_wake()",
    "self._woken()",
)
def publish_thread(variant: str = "") -> Program:
    """Sends what is in the log, tells of losses, and sleeps on the eventfd."""

    def sleep(sleeps: bool) -> Program:
        if variant == "cleared before the sleep":
            yield change("eventfd", lambda _: 0)
        if sleeps:
            yield await_("eventfd", bool)
        if variant == "cleared after the look":
            losses = yield from take_losses()
            yield change("eventfd", lambda _: 0)
            return losses
        return (yield from take_losses()) if (yield change("eventfd", lambda _: 0)) else 0

    yield from _until_through(sleep, variant)


@follows(
    "_rounds.pyx",
    "rounds",
    "frame_and_send(",
    "stretch.is_called",
    "sender.log.c_arm()",
    "wait(sender, waits",
)
@follows("_rounds.pyx", "wait", "poll(waits, 2", "eventfd_read(", "count >= CPS_CALL")
def rounds(variant: str = "") -> Program:
    """As `publish_thread`, where what is read from the eventfd tells records from calls."""

    def sleep(sleeps: bool) -> Program:
        if not sleeps:
            return 0
        yield await_("eventfd", bool)
        return (yield from take_losses()) if (yield change("eventfd", lambda _: 0)) >= CALL else 0

    yield from _until_through(sleep, variant)


def _until_through(sleep: Callable[[bool], Program], variant: str) -> Program:
    """Through after two records and a loss.  `sleep` returns the losses of which it was told."""
    losses = 0
    while True:
        yield lock("log")
        sent = yield load("published", "ring.published.load")
        yield unlock("log")
        if sent == 2 and losses == 1:
            break
        yield lock("log")
        sleeps = yield from arm(sent, variant)
        yield unlock("log")
        losses += yield from sleep(sleeps)


def take_losses() -> Program:
    yield lock("log")
    losses = yield read("losses")
    yield write("losses", 0)
    yield unlock("log")
    return losses


def eventfd(variant: str = "") -> Model:
    """The publish thread sleeps on an eventfd; records and losses come from others."""
    return _sleeping(lambda: publish_thread(variant), variant)


def eventfd_in_rounds(variant: str = "") -> Model:
    """The same where it sleeps without the GIL."""
    return _sleeping(lambda: rounds(variant), variant)


def _sleeping(thread: Callable[[], Program], variant: str) -> Model:
    def producer() -> Program:
        yield from publish()
        yield from publish()

    programs = [producer, lambda: lose(variant), thread]
    return Model([programs], PLACES, {**LOCKS, "eventfd": 0})


@follows(
    "_log_write.c",
    "cps_log_wait_settled",
    "pthread_mutex_lock(&log->lock)",
    "while (!is_over(log, position, all))",
    "if (log->shut) break",
    "cps_log_timed_wait(log, &log->settled_moved",
    "pthread_mutex_unlock(&log->lock)",
)
def wait_settled(position: int) -> Program:
    yield lock("log")
    while (yield read("head")) <= position:
        if (yield read("shut")):
            break
        yield from wait("settled_moved", "log")
    yield unlock("log")


@follows(
    "_log_write.c",
    "settle",
    "pthread_mutex_lock(&log->lock)",
    "*cursor = to",
    "cps_log_commit(log)",
    "pthread_mutex_unlock(&log->lock)",
)
def settle(head: int, variant: str = "") -> Program:
    yield lock("log")
    yield write("head", head)
    if variant == "one waiter is told":
        yield signal("settled_moved")
    else:
        yield broadcast("settled_moved")
    yield unlock("log")


@follows(
    "_log.c",
    "cps_log_shut",
    "cps_ring_shut(log->ring)",
    "pthread_mutex_lock(&log->lock)",
    "log->shut = true",
    "pthread_cond_broadcast(&log->room)",
    "pthread_cond_broadcast(&log->settled_moved)",
    "pthread_mutex_unlock(&log->lock)",
)
def shut(variant: str = "") -> Program:
    yield lock("log")
    yield write("shut", True)
    if variant == "waiters are not told of the end":
        yield unlock("log")
        return
    yield broadcast("settled_moved")
    yield unlock("log")


def settled(variant: str = "") -> Model:
    """Two wait for acknowledgements: one comes, and for the other there is the end."""
    programs = [lambda: wait_settled(0), lambda: wait_settled(1), lambda: settle(1, variant), lambda: shut(variant)]
    return Model([programs], {"head": 0, "shut": False}, {"log": None, "settled_moved": ()})


def both_settled(variant: str = "") -> Model:
    """Two wait for the same acknowledgement."""
    programs = [lambda: wait_settled(0), lambda: wait_settled(0), lambda: settle(1, variant)]
    return Model([programs], {"head": 0, "shut": False}, {"log": None, "settled_moved": ()})


MODELS = {
    "wake.next_record": next_record,
    "wake.room": room,
    "wake.eventfd": eventfd,
    "wake.eventfd_in_rounds": eventfd_in_rounds,
    "wake.settled": settled,
    "wake.both_settled": both_settled,
}
VARIANTS = {
    "wake.next_record": [
        "armed without a look",
        "a signal without the lock",
        "the lock is let go before the sleep",
        "no signal",
    ],
    "wake.room": [
        "room is told to nobody",
        "waits without a look",
        "room is told to one",
        "room is told of before it is there",
    ],
    "wake.settled": ["waiters are not told of the end"],
    "wake.both_settled": ["one waiter is told"],
    "wake.eventfd": [
        "armed without a look",
        "told before it is there",
        "cleared before the sleep",
        "cleared after the look",
    ],
    "wake.eventfd_in_rounds": [
        "armed without a look",
        "told before it is there",
        "a loss is told like a record",
    ],
}
