"""The machine itself, on the small programs that memory models are told apart by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from .machine import (
    Counterexample,
    Late,
    Model,
    Program,
    Violation,
    add,
    await_,
    change,
    explore,
    load,
    lock,
    peek,
    read,
    signal,
    store,
    unlock,
    wait,
    write,
)  # fmt: skip

ORDERS = {"rlx": "relaxed", "acq": "acquire", "rel": "release"}


def stores(*all_: tuple[str, int, str]) -> Callable[[], Program]:
    def program() -> Program:
        for place, value, order in all_:
            yield store(place, value, order)

    return program


def loads(*all_: tuple[str, str]) -> Callable[[], Program]:
    def program() -> Program:
        values = []
        for place, order in all_:
            values.append((yield load(place, order)))
        return tuple(values)

    return program


def outcomes(*programs: Callable[[], Program], places: str = "xy") -> tuple[set[tuple[Any, ...]], set[tuple[Any, ...]]]:
    """What the programs can return, and what can stand in memory at the end."""
    results, memories = set(), set()

    def note(memory: Mapping[str, Any], returned: Sequence[Any]) -> None:
        results.add(tuple(value for value in returned if value is not None))
        memories.add(tuple(memory.values()))

    explore(Model([programs], dict.fromkeys(places, 0), end=note), ORDERS)
    return results, memories


def may_fail(*programs: Callable[[], Program], places: str, **kernel: Any) -> bool:
    try:
        explore(Model([programs], dict.fromkeys(places, 0), kernel), ORDERS)
    except Counterexample:
        return True
    return False


@pytest.mark.parametrize(("put", "get", "may_be"), [("rlx", "acq", True), ("rel", "rlx", True), ("rel", "acq", False)])
def test_message_passing_needs_both_sides(put: str, get: str, may_be: bool) -> None:
    results, _ = outcomes(stores(("x", 1, "rlx"), ("y", 1, put)), loads(("y", get), ("x", "rlx")))
    assert (((1, 0),) in results) == may_be
    assert {((0, 0),), ((0, 1),), ((1, 1),)} <= results


@pytest.mark.parametrize(("put", "get"), [("rlx", "rlx"), ("rel", "acq")])
def test_a_load_overtakes_a_store_whatever_release_and_acquire_say(put: str, get: str) -> None:
    def program(mine: str, other: str) -> Callable[[], Program]:
        def run() -> Program:
            yield store(mine, 1, put)
            return (yield load(other, get))

        return run

    results, _ = outcomes(program("x", "y"), program("y", "x"))
    assert results == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_one_place_is_seen_in_one_order() -> None:
    results, _ = outcomes(stores(("x", 1, "rlx"), ("x", 2, "rlx")), loads(("x", "rlx"), ("x", "rlx")))
    assert results == {((a, b),) for a in range(3) for b in range(3) if a <= b}


def test_two_places_are_seen_in_two_orders() -> None:
    results, _ = outcomes(
        stores(("x", 1, "rel")),
        stores(("y", 1, "rel")),
        loads(("x", "acq"), ("y", "acq")),
        loads(("y", "acq"), ("x", "acq")),
    )
    assert ((1, 0), (1, 0)) in results


def test_what_was_seen_is_passed_on() -> None:
    def middle(get: str, put: str) -> Callable[[], Program]:
        def run() -> Program:
            seen = yield load("x", get)
            if seen:
                yield store("y", 1, put, depends=True)

        return run

    first, last = stores(("z", 1, "rlx"), ("x", 1, "rel")), loads(("y", "acq"), ("z", "rlx"))
    for get, put, may_be in [("acq", "rel", False), ("rlx", "rel", True), ("acq", "rlx", True)]:
        assert (((1, 0),) in outcomes(first, middle(get, put), last, places="xyz")[0]) == may_be


def test_what_one_thread_saw_of_a_place_is_not_unseen_by_those_it_tells() -> None:
    def middle() -> Program:
        if (yield load("x", "rlx")):
            yield store("y", 1, "rel")

    assert ((1, 0),) not in outcomes(stores(("x", 1, "rlx")), middle, loads(("y", "acq"), ("x", "rlx")))[0]


def test_stores_leave_in_another_order_unless_released() -> None:
    def both(order: str) -> set[tuple[Any, ...]]:
        return outcomes(stores(("x", 1, "rlx"), ("y", 2, order)), stores(("y", 1, "rlx"), ("x", 2, order)))[1]

    assert (1, 1) in both("rlx")
    assert (1, 1) not in both("rel")
    # A release holds up nothing that comes after it.
    later = [stores(("x", 1, "rel"), ("y", 2, "rlx")), stores(("y", 1, "rel"), ("x", 2, "rlx"))]
    assert (1, 1) in outcomes(*later)[1]


def test_a_thread_sees_its_own_store_before_others_do() -> None:
    def program() -> Program:
        yield store("x", 1, "rlx")
        seen = yield load("x", "rlx")
        yield store("y", seen, "rlx", depends=True)

    left = set()

    def survivor() -> Program:
        left.add(((yield load("x", "rlx")), (yield load("y", "rlx"))))

    explore(Model([[program], [survivor]], {"x": 0, "y": 0}), ORDERS)
    assert left == {(0, 0), (1, 0), (0, 1), (1, 1)}


def test_a_relaxed_store_behind_a_relaxed_load_is_refused() -> None:
    def program() -> Program:
        yield load("x", "rlx")
        yield store("y", 1, "rlx")

    with pytest.raises(Late):
        outcomes(program)


def test_additions_are_not_lost_and_pass_on_what_was_released() -> None:
    def adds() -> Program:
        yield add("y", 1, "rlx")

    assert {memory[1] for memory in outcomes(adds, adds)[1]} == {2}
    results, _ = outcomes(stores(("x", 1, "rlx"), ("y", 1, "rel")), adds, loads(("y", "acq"), ("x", "rlx")))
    assert ((2, 0),) not in results
    assert ((1, 0),) in results  # the addition alone


@pytest.mark.parametrize(("put", "get", "fails"), [("rlx", "acq", True), ("rel", "rlx", True), ("rel", "acq", False)])
def test_a_plain_place_that_nothing_hands_over_is_a_race(put: str, get: str, fails: bool) -> None:
    def writes() -> Program:
        yield write("x", 1)
        yield store("y", 1, put)

    def reads() -> Program:
        if (yield load("y", get)) and (yield read("x")) != 1:
            raise Violation("old")

    def overwrites() -> Program:
        if (yield load("y", get)):
            yield write("x", 2)

    def reads_first() -> Program:
        yield read("x")
        yield store("y", 1, put, depends=True)

    assert may_fail(writes, reads, places="xy") == fails
    assert may_fail(writes, overwrites, places="xy") == fails
    assert may_fail(reads_first, overwrites, places="xy") == fails


def test_a_lock_hands_over_what_was_done_under_it() -> None:
    def locked() -> Program:
        yield lock("l")
        yield write("x", (yield read("x")) + 1)
        yield unlock("l")

    def unlocked() -> Program:
        yield write("x", (yield read("x")) + 1)

    assert not may_fail(locked, locked, places="x", l=None)
    assert may_fail(locked, unlocked, places="x", l=None)


@pytest.mark.parametrize("is_under_lock", [True, False])
def test_a_signal_without_the_lock_is_lost(is_under_lock: bool) -> None:
    def sleeper() -> Program:
        yield lock("l")
        while not (yield load("x", "acq")):
            yield from wait("c", "l")
        yield unlock("l")

    def waker() -> Program:
        yield store("x", 1, "rel")
        if is_under_lock:
            yield lock("l")
        yield signal("c")
        if is_under_lock:
            yield unlock("l")

    assert may_fail(sleeper, waker, places="x", l=None, c=()) != is_under_lock


def test_flags_with_release_and_acquire_lose_a_wake_up() -> None:
    """What would need sequentially consistent fences, and the C core does under a lock."""

    def sleeper() -> Program:
        yield store("y", 1, "rel")
        if not (yield load("x", "acq")):
            yield await_("bell", bool)

    def waker() -> Program:
        yield store("x", 1, "rel")
        if (yield load("y", "acq")):
            yield change("bell", lambda n: n + 1)

    assert may_fail(sleeper, waker, places="xy", bell=0)


def test_reading_a_clock_orders_nothing() -> None:
    def writes() -> Program:
        yield store("x", 1, "rlx")
        yield change("clock", lambda n: n + 1)

    def reads() -> Program:
        return ((yield peek("clock")), (yield load("x", "rlx")))

    results = set()
    model = Model([[writes, reads]], {"x": 0}, {"clock": 0}, end=lambda _, returned: results.add(returned[1]))
    explore(model, ORDERS)
    assert results == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize(("order", "torn"), [("rlx", True), ("rel", False)])
def test_a_kill_tears_apart_what_is_not_ordered(order: str, torn: bool) -> None:
    left = set()

    def survivor() -> Program:
        return ((yield read("x")), (yield load("y", "rlx")))

    def writes() -> Program:
        yield write("x", 1)
        yield store("y", 1, order)

    explore(Model([[writes], [survivor]], {"x": 0, "y": 0}, end=lambda _, returned: left.add(returned[0])), ORDERS)
    assert ((0, 1) in left) == torn
    assert {(0, 0), (1, 0), (1, 1)} <= left


def test_a_counterexample_tells_the_way() -> None:
    def program() -> Program:
        yield store("x", 1, "rlx")
        raise Violation("that was wrong")

    with pytest.raises(Counterexample, match=r"^that was wrong\n0: x := 1, into the buffer$"):
        explore(Model([[program]], {"x": 0}), ORDERS)
