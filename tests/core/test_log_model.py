"""The log, driven at random through faults, kills and restarts, against a plain list."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from .build import load, sanitizers
from .disk import DISK_ERRORS, Disk, Log, Loss, Record

META_BYTES = 8192
NO_STREAM = (1 << 64) - 1
AHEAD_MAX = 6
REFUSED = 2


class Queue(RuleBasedStateMachine):
    """The model: messages that are pending, oldest first, of which the first are in flight; with two streams also the
    first of those that stand at ``live_first`` or behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.lib = load()[1]
        self.disk = Disk()
        self.pending: list[tuple[int, bytes]] = []
        self.flight: list[Record] = []
        self.live_flight: list[Record] = []
        self.live_first = NO_STREAM
        self.made = self.published = self.acked = self.dropped = self.refused = self.dead = 0
        self.reasons: Counter[int] = Counter()  # messages that were reported as lost, by reason
        self.gone: list[tuple[int, int]] = []  # position and reason of each that was in the log
        self.last = -1
        self.faulty = False
        self.log: Log

    @initialize(
        on_full=st.sampled_from(["drop_oldest", "drop_newest", "block", "raise"]),
        durability=st.sampled_from(["process", "power"]),
        quota=st.sampled_from([1 << 30, 40_000, 16_384]),
        messages=st.sampled_from([0, 40, 7]),
        segment=st.sampled_from([4096, 16_384]),
    )
    def begin(self, on_full: str, durability: str, quota: int, messages: int, segment: int) -> None:
        self.chosen: dict[str, Any] = {
            "on_full": on_full, "durability": durability, "spool_bytes_max": quota, "spool_messages_max": messages,
            "segment_bytes": segment, "spill_after_ms": 1000, "block_timeout_ms": 20, "spill_timeout_ms": 2000,
            "sync_interval_ms": 5,
        }  # fmt: skip
        self.open()

    def open(self) -> None:
        self.log = Log(self.disk, **self.chosen)
        self.log.ok(self.log.status)
        self.flight, self.live_flight, self.live_first = [], [], NO_STREAM

    def stream(self, live: bool) -> tuple[list[Record], list[tuple[int, bytes]]]:
        """What is in flight and what is pending of one of the streams."""
        if live:
            return self.live_flight, [one for one in self.pending if one[0] >= self.live_first]
        return self.flight, [one for one in self.pending if one[0] < self.live_first]

    def look_whether_joined(self) -> bool:
        """With the end of the backlog there is one stream again, the live one."""
        if self.live_first == NO_STREAM or self.log.is_split:
            return False
        assert not self.flight and not any(one[0] < self.live_first for one in self.pending)
        self.flight, self.live_flight, self.live_first = self.live_flight, [], NO_STREAM
        return True

    def lose(self, losses: list[Loss]) -> None:
        """Take out of the model what the log says that it dropped, and nothing else."""
        for loss in losses:
            self.reasons[loss.reason] += loss.messages
            if loss.first >= 1 << 63:
                assert loss.messages == (loss.end - loss.first) // 8
                continue
            gone = [one for one in self.pending if loss.first <= one[0] < loss.end]
            assert len(gone) == loss.messages, (loss, len(gone))
            flight = self.flight + self.live_flight
            assert not any(loss.first <= record.position < loss.end for record in flight)
            self.pending = [one for one in self.pending if not loss.first <= one[0] < loss.end]
            self.gone += [(position, loss.reason) for position, _ in gone]
            self.dropped += loss.messages

    def ledger_is_true(self) -> None:
        """It says by reason what was reported, in all that the counters say, and its ranges cover each message."""
        stats = self.log.stats()  # first: what comes behind it is in the ledger, and the next look will tell
        ledger = self.disk.ffi.new("cps_ledger *")
        self.log.lib.stress_ledger(self.log.c, ledger)
        self.lose(self.log.losses())
        if stats.settled.dropped_messages != self.dropped:
            return  # another one came between these calls; the next look will tell
        for reason, total in enumerate(ledger.totals):
            assert total.messages == self.reasons[reason]
        ended = [total for reason, total in enumerate(ledger.totals) if reason != REFUSED]
        assert sum(total.messages for total in ended) == stats.settled.dropped_messages
        assert sum(total.bytes for total in ended) == stats.settled.dropped_bytes
        assert ledger.totals[REFUSED].messages == stats.produced.refused
        assert ledger.totals[REFUSED].bytes == stats.produced.refused_bytes
        entries = [(one.when >> 48, one.first, one.end) for one in ledger.entries[0 : ledger.used]]
        for position, reason in self.gone:
            assert any(why == reason and first <= position < end for why, first, end in entries)

    @rule(size=st.one_of(st.integers(0, 60), st.integers(0, 980)), count=st.integers(1, 12))
    def append(self, size: int, count: int) -> None:
        for _ in range(count):
            self.made += 1
            payload = hashlib.shake_128(str(self.made).encode()).digest(size)
            position = self.log.append(payload, b"topic", b"u" * (self.made % 3))
            if position == self.lib.CPS_FULL:
                assert self.chosen["on_full"] in ("raise", "block")
                continue
            if size > 1024 - 32 - 5 - 2 and position == self.lib.CPS_TOO_LARGE:
                continue
            assert position >= 0, position
            self.published += 1
            if position >= 1 << 63:
                self.refused += 1
                assert self.chosen["on_full"].startswith("drop")
                continue
            assert position > self.last
            self.last = position
            self.pending.append((position, payload))

    @rule(max_bytes=st.sampled_from([1, 500, 5000, 1 << 16]), take=st.one_of(st.none(), st.integers(0, 8)),
          live=st.booleans())  # fmt: skip
    def read(self, max_bytes: int, take: int | None, live: bool = False) -> None:
        got = self.log.read(max_bytes, take, live)
        self.lose(self.log.losses())
        joined = self.look_whether_joined()
        live = live and self.log.is_split
        flight, pending = self.stream(live)
        if got == self.lib.CPS_EMPTY:
            assert len(flight) == len(pending) or joined  # in this call
            return
        assert isinstance(got, list), got
        at = len(flight)
        came = [(one.position, one.payload) for one in got]
        assert came == pending[at : at + len(got)], (came, at, pending)
        flight += got

    @rule(share=st.floats(0, 1), live=st.booleans())
    def settle(self, share: float, live: bool = False) -> None:
        self.look_whether_joined()
        live = live and self.log.is_split
        count = round(len(self.stream(live)[0]) * share)
        self.log.settle(self.stream(live)[0][:count], live=live)
        self.forget(count, live)

    @rule(fates=st.lists(st.sampled_from(["acked", "expired", "dead"]), min_size=1, max_size=16), live=st.booleans())
    def settle_with_other_ends(self, fates: list[str], live: bool) -> None:
        self.look_whether_joined()
        live = live and self.log.is_split
        flight = self.stream(live)[0]
        done = flight[: len(fates)]
        reasons = {"acked": 0, "expired": self.lib.CPS_REASON_EXPIRED, "dead": self.lib.CPS_REASON_DEAD}
        chosen = [reasons[fate] for fate in fates[: len(done)]]
        ended = {one.position: reason for one, reason in zip(done, chosen, strict=True) if reason}
        self.log.settle(done, ended, live)
        del flight[: len(done)]
        dead = {position for position, reason in ended.items() if reason == self.lib.CPS_REASON_DEAD}
        acked = {one.position for one in done} - set(ended)
        self.dead += len(dead)
        self.acked += len(acked)
        self.pending = [one for one in self.pending if one[0] not in dead | acked]
        self.lose(self.log.losses())  # the expired ones
        self.look_whether_joined()
        assert not any(one[0] in ended for one in self.pending)

    @rule(share=st.floats(0, 1))
    def settle_through(self, share: float) -> None:
        self.look_whether_joined()
        if self.flight and not self.log.is_split:
            count = min(int(len(self.flight) * share), len(self.flight) - 1)
            self.log.ok(self.log.lib.cps_log_settle_through(self.log.c, self.flight[count].position))
            self.forget(count + 1)

    def forget(self, count: int, live: bool = False) -> None:
        flight, _ = self.stream(live)
        done = {one.position for one in flight[:count]}
        self.acked += count
        del flight[:count]
        self.pending = [one for one in self.pending if one[0] not in done]
        self.look_whether_joined()

    @rule()
    def rewind(self) -> None:
        self.log.rewind()
        self.flight, self.live_flight = [], []
        self.look_whether_joined()

    @rule(backlog_bytes=st.sampled_from([0, 0, 400, 4000]), may_begin=st.booleans())
    def split(self, backlog_bytes: int, may_begin: bool) -> None:
        self.rewind()
        before = self.log.ranges()
        kind = self.log.split(backlog_bytes, may_begin)
        self.live_first = self.log.fronts().live_first
        assert self.log.is_split == (self.live_first != NO_STREAM)
        if kind == self.lib.CPS_SPLIT_BEGUN:
            assert may_begin and self.live_first > self.last
            assert self.log.ranges()[-1] == (self.live_first, self.live_first)
        if kind == self.lib.CPS_SPLIT_FULL:
            assert len(before) == len(self.log.ranges()) == AHEAD_MAX
        # Nothing that is pending is in a range.
        for first, end in self.log.ranges():
            assert not any(first <= one[0] < end for one in self.pending)

    @rule(up=st.booleans())
    def link(self, up: bool) -> None:
        self.log.link(up)

    @rule(ms=st.sampled_from([500, 2000, 61_000]))
    def time_passes(self, ms: int) -> None:
        self.disk.lib.sim_advance(self.disk.c, ms)

    @rule()
    def sync(self) -> None:
        if self.pending and not self.faulty:
            status = self.log.lib.cps_log_wait_synced(self.log.c, self.pending[-1][0], 2000)
            # A limit, or a fault that is over, may have refused it a moment ago.
            limited = self.chosen["spool_bytes_max"] < 1 << 30 or self.chosen["spool_messages_max"] > 0
            may_fail = limited or self.disk.lib.sim_failed(self.disk.c) > 0
            assert status == self.lib.CPS_OK or (may_fail and status == self.lib.CPS_IO)

    @rule(kind=st.sampled_from(["WRITE", "ALLOCATE", "SYNC", "SYNC_DIRECTORY", "CREATE", "CHANGES"]),
          error=st.sampled_from(DISK_ERRORS), nth=st.integers(1, 3), sticky=st.booleans())  # fmt: skip
    def break_disk(self, kind: str, error: int, nth: int, sticky: bool) -> None:
        self.faulty = True
        self.disk.fail(kind, error, nth, sticky)

    @rule()
    def heal_disk(self) -> None:
        self.disk.heal()
        self.faulty = False

    @rule()
    def kill(self) -> None:
        self.disk.heal()
        self.faulty = False
        self.lose(self.log.losses())
        self.lose(self.log.kill())
        self.open()
        assert self.log.opened.ring_adopted
        self.ledger_is_true()

    @rule()
    def close_and_open(self) -> None:
        self.log.lib.cps_log_shut(self.log.c)
        self.lose(self.log.losses())
        self.lose(self.log.finish())
        unsaved = self.log.close()
        if not self.faulty and self.chosen["spool_bytes_max"] == 1 << 30 and not self.chosen["spool_messages_max"]:
            assert unsaved == 0
        self.disk.heal()
        self.faulty = False
        self.open()
        self.ledger_is_true()

    @invariant()
    def counters_are_exact(self) -> None:
        if not hasattr(self, "log"):
            return
        self.lose(self.log.losses())
        stats = self.log.check()
        self.lose(self.log.losses())
        assert stats.produced.messages == self.published
        assert stats.produced.refused == self.refused
        assert stats.settled.acked_messages == self.acked
        assert stats.settled.dead_messages == self.dead
        assert stats.settled.dropped_messages <= self.dropped  # one more may have come just now
        assert stats.spool_bytes <= self.chosen["spool_bytes_max"]
        assert self.disk.lib.sim_used(self.disk.c) <= self.chosen["spool_bytes_max"] + META_BYTES

    def teardown(self) -> None:
        if not hasattr(self, "log"):
            return
        self.disk.heal()
        self.rewind()
        for _ in range(10_000):
            if not self.pending:
                break
            self.read(1 << 16, None)
            self.settle(1.0)
        stats = self.log.check()
        assert stats.pending_messages == 0
        assert stats.settled.dropped_messages == self.dropped
        # Drained segments are removed; what could not be removed is tried again.
        self.disk.lib.sim_advance(self.disk.c, 1000)
        self.log.until(lambda: not self.disk.names())
        assert self.log.close() == 0
        self.disk.close()


def test_the_log_is_a_queue_that_loses_nothing_silently() -> None:
    run_state_machine_as_test(
        Queue,
        settings=settings(
            max_examples=30 if sanitizers() else 150, stateful_step_count=40,
            suppress_health_check=list(HealthCheck),
        ),
    )
