"""The in-flight window against a plain model, and its promises one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from .objects import Window


@dataclass
class Entry:
    position: int
    end: int
    packet_bytes: int
    sent_ms: int
    packet_id: int
    done: bool
    held: bool = False
    fate: int = 0


class WindowMachine(RuleBasedStateMachine):
    """One log of records, sent over connections that break; ids start near their wrap."""

    @initialize(capacity=st.integers(1, 9), first_id=st.sampled_from([1, 65528, 65534, 65535]), data=st.data())
    def begin(self, capacity: int, first_id: int, data: st.DataObject) -> None:
        sizes = data.draw(st.lists(st.sampled_from([40, 48, 200]), min_size=30, max_size=30))
        gaps = data.draw(st.lists(st.sampled_from([0, 0, 8]), min_size=30, max_size=30))
        self.records: list[tuple[int, int]] = []  # (position, end), pads between some
        at = 1 << 40
        for size, gap in zip(sizes, gaps, strict=True):
            self.records.append((at + gap, at + gap + size))
            at += gap + size
        self.window = Window(capacity, 500, first_id)
        self.capacity, self.messages_max, self.bytes_max = capacity, capacity, 500
        self.next_id = first_id
        self.entries: list[Entry] = []
        self.head: int | None = None
        self.settled = 0  # records before it are settled in order
        self.next = 0  # record to be sent next
        self.ended: dict[int, int] = {}  # fates of positions that ended
        self.known: dict[int, int] = {}  # of them, when the last connection broke
        self.passed: list[tuple[int, int, int]] = []  # (position, end, fate) that the head passed, not acknowledged
        self.settled_acks = 0
        self.unknown = 0

    def teardown(self) -> None:
        if hasattr(self, "window"):
            self.window.close()

    def deal(self) -> int:
        dealt, self.next_id = self.next_id, self.next_id % 65535 + 1
        return dealt

    def pop(self) -> None:
        while self.entries and self.entries[0].done:
            entry = self.entries[0]
            if entry.fate:
                runs = self.runs()
                joins = bool(runs) and runs[-1][1] == entry.position and runs[-1][4] == entry.fate
                if len(runs) == self.window.lib.CPS_WINDOW_ENDINGS and not joins:
                    return
                self.passed.append((entry.position, entry.end, entry.fate))
            else:
                self.settled_acks += 1
            self.head = self.entries.pop(0).end
            self.settled += 1

    def runs(self) -> list[tuple[int, int, int, int, int]]:
        runs: list[tuple[int, int, int, int, int]] = []
        for position, end, fate in self.passed:
            if runs and runs[-1][1] == position and runs[-1][4] == fate:
                first, _, count, size, _ = runs.pop()
                runs.append((first, end, count + 1, size + end - position, fate))
            else:
                runs.append((position, end, 1, end - position, fate))
        return runs

    @rule()
    def tell(self) -> None:
        assert self.window.endings() == self.runs()
        self.passed = []
        self.pop()

    @property
    def flying(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.done and not entry.held]

    @precondition(lambda self: self.next < len(self.records))
    @rule(packet_bytes=st.sampled_from([1, 100, 600]), now_ms=st.integers(0, 1 << 50))
    def send(self, packet_bytes: int, now_ms: int) -> None:
        position, end = self.records[self.next]
        known = self.known.get(position)
        assert self.window.recall(position) == known
        if known is not None:
            status = self.window.skip(position, end, known)
            if len(self.entries) == self.capacity:
                assert status == self.window.lib.CPS_FULL
                return
            assert status == self.window.lib.CPS_OK
            self.entries.append(Entry(position, end, 0, 0, self.deal(), True, fate=known))
            self.pop()
        else:
            dealt = self.window.push(position, end, packet_bytes, now_ms)
            flying = self.flying
            too_much = sum(entry.packet_bytes for entry in flying) + packet_bytes > self.bytes_max and flying
            if len(self.entries) == self.capacity or len(flying) >= self.messages_max or too_much:
                assert dealt == self.window.lib.CPS_FULL
                return
            assert dealt == self.next_id
            self.entries.append(Entry(position, end, packet_bytes, now_ms, self.deal(), False))
        self.next += 1

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.flying))
        assert self.window.ack(entry.packet_id) == (entry.position, entry.end)
        entry.done = True
        self.ended[entry.position] = 0
        self.pop()

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.flying))
        assert self.window.refuse(entry.packet_id) == entry.position
        entry.held = True
        assert self.window.ack(entry.packet_id) is None  # it is in flight no more
        self.unknown += 1

    @precondition(lambda self: self.next < len(self.records) and self.records[self.next][0] not in self.known)
    @rule(fate=st.sampled_from([None, 2]))
    def hold_or_skip(self, fate: int | None) -> None:
        position, end = self.records[self.next]
        status = self.window.hold(position, end) if fate is None else self.window.skip(position, end, fate)
        if len(self.entries) == self.capacity:
            assert status == self.window.lib.CPS_FULL
            return
        assert status == self.window.lib.CPS_OK
        self.next += 1
        self.entries.append(Entry(position, end, 0, 0, self.deal(), fate is not None, fate is None, fate or 0))
        if fate is not None:
            self.ended[position] = fate
            self.pop()

    @precondition(lambda self: not all(entry.done for entry in self.entries))
    @rule(data=st.data(), fate=st.sampled_from([0, 1, 2]))
    def end(self, data: st.DataObject, fate: int) -> None:
        entry = data.draw(st.sampled_from([entry for entry in self.entries if not entry.done]))
        assert self.window.end(entry.position, fate)
        assert not self.window.end(entry.position, fate)
        entry.held, entry.done, entry.fate = False, True, fate
        self.ended[entry.position] = fate
        self.pop()

    @rule(packet_id=st.sampled_from([0, 1, 2, 3, 7, 40, 32768, 65527, 65530, 65533, 65534, 65535]))
    def ack_stray(self, packet_id: int) -> None:
        if packet_id in [entry.packet_id for entry in self.flying]:
            return
        assert self.window.ack(packet_id) is None
        self.unknown += 1

    @rule(messages_max=st.integers(0, 12), bytes_max=st.sampled_from([1, 150, 500]))
    def limit(self, messages_max: int, bytes_max: int) -> None:
        self.window.lib.cps_window_limit(self.window.c, messages_max, bytes_max)
        self.messages_max = min(max(messages_max, 1), self.capacity)
        self.bytes_max = bytes_max

    @rule()
    def restart(self) -> None:
        while self.passed:
            self.tell()
        self.window.restart()
        self.known = dict(self.ended)
        self.entries, self.head, self.next = [], None, self.settled

    @precondition(lambda self: not self.entries)
    @rule(count=st.integers(1, 3))
    def drop_oldest(self, count: int) -> None:
        """The drop policy takes records while nothing is in flight."""
        if self.settled + count >= len(self.records):
            return
        self.settled = self.next = self.settled + count
        self.window.lib.cps_window_forget_below(self.window.c, self.records[self.settled][0])

    @precondition(lambda self: self.next < len(self.records))
    @rule(data=st.data())
    def ask_ahead(self, data: st.DataObject) -> None:
        """Asking in any order forgets nothing."""
        position = self.records[data.draw(st.integers(self.next, len(self.records) - 1))][0]
        assert self.window.recall(position) == self.known.get(position)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "window"):
            return
        window, flying = self.window, self.flying
        window.lib.cps_window_check(window.c)
        assert window.inflight == (len(flying), sum(entry.packet_bytes for entry in flying))
        assert window.head() == self.head
        assert window.oldest() == ((flying[0].position, flying[0].sent_ms) if flying else None)
        assert window.lib.cps_window_unknown_acks(window.c) == self.unknown
        assert window.lib.cps_window_held(window.c) == sum(entry.held for entry in self.entries)
        window.lib.cps_window_settled(window.c, window.a, window.b)
        assert window.a[0] == self.settled_acks


TestWindowAgreesWithModel = WindowMachine.TestCase
TestWindowAgreesWithModel.settings = settings(max_examples=150, stateful_step_count=60)


def test_capacity_is_1_to_65534(core: tuple[Any, Any]) -> None:
    ffi, lib = core
    out = ffi.new("cps_window **")
    assert lib.CPS_WINDOW_MESSAGES_MAX == 65534
    for messages_max in (0, 65535, 1 << 31):
        assert lib.cps_window_open(messages_max, 1, out) == lib.CPS_TOO_LARGE
    assert out[0] == ffi.NULL


def test_ids_run_from_1_to_65535_and_round(open_window: Callable[..., Window]) -> None:
    window = open_window(1)
    for n in range(65535 + 3):
        packet_id = window.push(n * 8, n * 8 + 8)
        assert packet_id == n % 65535 + 1
        assert window.ack(packet_id) == (n * 8, n * 8 + 8)


def test_a_full_sized_window_deals_no_id_twice(open_window: Callable[..., Window]) -> None:
    window = open_window(65534, next_id=30000)
    ids = [window.push(n * 8, n * 8 + 8) for n in range(65534)]
    assert len(set(ids)) == 65534 and min(ids) == 1 and max(ids) == 65535
    assert window.push(65534 * 8, 65535 * 8) == window.lib.CPS_FULL
    assert all(window.ack(packet_id) == (n * 8, n * 8 + 8) for n, packet_id in reversed(list(enumerate(ids))))
    assert window.head() == 65534 * 8


def test_id_0_is_never_known(open_window: Callable[..., Window]) -> None:
    """Counted modulo 65535 it would be the id 65535."""
    window = open_window(4, next_id=65534)
    assert [window.push(n * 8, n * 8 + 8) for n in range(3)] == [65534, 65535, 1]
    assert window.ack(0) is None
    assert window.ack(65535) == (8, 16)


def test_head_waits_for_the_gap(open_window: Callable[..., Window]) -> None:
    window = open_window(4)
    first, second, third = (window.push(n * 104, n * 104 + 96) for n in range(3))
    assert window.ack(third) == (208, 304) and window.ack(second) == (104, 200)
    assert window.head() is None
    assert window.ack(first) == (0, 96)
    assert window.head() == 304


def test_second_ack_of_an_id_is_unknown(open_window: Callable[..., Window]) -> None:
    window = open_window(4)
    window.push(0, 8)
    second = window.push(8, 16)
    assert window.ack(second) == (8, 16)
    assert window.ack(second) is None
    assert window.lib.cps_window_unknown_acks(window.c) == 1


def test_oversized_packet_goes_alone(open_window: Callable[..., Window]) -> None:
    window = open_window(4, bytes_max=100)
    small = window.push(0, 8, packet_bytes=1)
    assert window.push(8, 16, packet_bytes=101) == window.lib.CPS_FULL
    assert window.ack(small)
    assert window.push(8, 16, packet_bytes=101) == 2
    assert window.push(16, 24, packet_bytes=1) == window.lib.CPS_FULL


def test_second_restart_in_the_middle_of_a_resend_forgets_nothing(open_window: Callable[..., Window]) -> None:
    window = open_window(8)
    ids = [window.push(n * 8, n * 8 + 8) for n in range(8)]
    for n in (2, 5, 7):
        assert window.ack(ids[n])
    window.restart()
    assert window.inflight == (0, 0)
    assert [n for n in range(8) if window.was_acked(n * 8)] == [2, 5, 7]
    resent = [window.push(n * 8, n * 8 + 8) for n in range(2)]
    assert window.skip(16, 24) == window.lib.CPS_OK
    assert window.ack(resent[1])
    window.restart()
    assert [n for n in range(8) if window.was_acked(n * 8)] == [1, 2, 5, 7]


def test_what_the_head_passed_is_not_remembered(open_window: Callable[..., Window]) -> None:
    window = open_window(4)
    ids = [window.push(n * 8, n * 8 + 8) for n in range(4)]
    assert window.ack(ids[1]) and window.ack(ids[3])
    window.restart()
    first = window.push(0, 8)
    assert window.skip(8, 16) == window.lib.CPS_OK
    assert window.ack(first)
    window.restart()
    assert window.lib.cps_window_remembered(window.c) == 1
    assert window.was_acked(24)


def test_what_lies_before_the_first_record_sent_again_is_forgotten(open_window: Callable[..., Window]) -> None:
    window = open_window(3)
    for n in (10, 100):
        ids = [window.push((n + i) * 8, (n + i + 1) * 8) for i in range(3)]
        assert window.ack(ids[1]) and window.ack(ids[2])
        window.restart()
    assert [n for n in (11, 12, 101, 102) if window.was_acked(n * 8)] == [101, 102]


def test_acknowledgement_of_the_last_connection_is_unknown(open_window: Callable[..., Window]) -> None:
    window = open_window(4)
    late = window.push(0, 8)
    window.restart()
    assert window.ack(late) is None
    assert window.push(0, 8) == late + 1


def test_two_streams_have_a_head_each_and_one_order_of_sending(open_window: Callable[..., Window]) -> None:
    window = open_window(8)
    lib, a, b, c = window.lib, window.a, window.b, window.ffi.new("uint64_t *")
    lib.cps_window_split(window.c, 800)
    first = window.push(0, 8)
    lib.cps_window_turn(window.c, True)
    live = [window.push(800 + 8 * n, 808 + 8 * n) for n in range(2)]
    lib.cps_window_turn(window.c, False)
    second = window.push(8, 16)
    assert window.ack(live[0]) == (800, 808)
    assert window.head() is None  # the one that was sent before it is not done
    assert lib.cps_window_live(window.c, a, b, c) == lib.CPS_EMPTY
    assert window.ack(first) == (0, 8)
    assert window.head() == 8
    assert lib.cps_window_live(window.c, a, b, c) == lib.CPS_OK
    assert (a[0], b[0], c[0]) == (808, 1, 8)
    assert window.ack(second) == (8, 16)
    assert window.head() == 8
    assert window.end(808, lib.CPS_FATE_DEAD)
    lib.cps_window_check(window.c)
    assert window.head() == 16
    assert window.endings() == [(808, 816, 1, 8, lib.CPS_FATE_DEAD)]
    lib.cps_window_join(window.c)
    assert window.head() == 816
    assert window.push(816, 824) == second + 1
    lib.cps_window_check(window.c)


def test_endings_of_two_streams_that_touch_are_told_apart(open_window: Callable[..., Window]) -> None:
    window = open_window(8)
    expired = window.lib.CPS_FATE_EXPIRED
    window.lib.cps_window_split(window.c, 16)
    assert window.skip(8, 16, expired) == window.lib.CPS_OK
    window.lib.cps_window_turn(window.c, True)
    assert window.skip(16, 24, expired) == window.lib.CPS_OK
    assert window.endings() == [(8, 16, 1, 8, expired), (16, 24, 1, 8, expired)]


def test_what_ended_in_two_streams_is_remembered_in_order_of_position(open_window: Callable[..., Window]) -> None:
    window = open_window(8)
    window.lib.cps_window_split(window.c, 800)
    ids = {}
    for n in range(4):
        window.lib.cps_window_turn(window.c, True)
        ids[800 + 8 * n] = window.push(800 + 8 * n, 808 + 8 * n)
        window.lib.cps_window_turn(window.c, False)
        ids[8 * n] = window.push(8 * n, 8 * n + 8)
    done = [8, 24, 808, 816]
    for position in done:
        assert window.ack(ids[position])
    window.restart()
    window.lib.cps_window_check(window.c)
    assert [at for at in ids if window.was_acked(at)] == [at for at in ids if at in done]
    window.lib.cps_window_forget(window.c, 800, 816)
    assert sorted(at for at in ids if window.was_acked(at)) == [8, 24, 816]


def test_memory_of_acknowledgements_is_bounded(open_window: Callable[..., Window]) -> None:
    """Even when the caller goes on elsewhere, the highest are forgotten, which costs duplicates only."""
    window = open_window(3)
    for n in (100, 10):
        ids = [window.push((n + i) * 8, (n + i + 1) * 8) for i in range(3)]
        assert window.ack(ids[1]) and window.ack(ids[2])
        window.restart()
    assert window.lib.cps_window_remembered(window.c) == 3
    assert [n for n in (11, 12, 101, 102) if window.was_acked(n * 8)] == [11, 12, 101]


def test_the_head_stands_still_while_too_many_endings_wait_to_be_told(open_window: Callable[..., Window]) -> None:
    window = open_window(100)
    most, dead = window.lib.CPS_WINDOW_ENDINGS, window.lib.CPS_FATE_DEAD
    for n in range(most + 1):
        assert window.skip(16 * n, 16 * n + 8, dead) == window.lib.CPS_OK
    assert window.head() == 16 * (most - 1) + 8
    assert window.endings() == [(16 * n, 16 * n + 8, 1, 8, dead) for n in range(most)]
    assert window.head() == 16 * most + 8
    assert window.endings() == [(16 * most, 16 * most + 8, 1, 8, dead)]


def test_oldest_in_flight_is_not_one_that_is_held(open_window: Callable[..., Window]) -> None:
    window = open_window(4)
    refused = window.push(0, 8, now_ms=1)
    window.push(8, 16, now_ms=2)
    assert window.refuse(refused) == 0
    assert window.oldest() == (8, 2)
    assert window.inflight[0] == 1
