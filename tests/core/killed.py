"""A seeded user of a log that is killed at a named point of the core, and what it may expect after that.

Everything that it does is one call at a time, so that a kill leaves at most one call in doubt: it has happened, or it
has not.  The flusher works beside it all the while; so the same seed meets a point in about the same state, not in
exactly the same.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .disk import Disk, Log, Loss, Record

REFUSED = 2  # the reason
STEPS = 30
TRIES = 50  # to open: each may be killed


@dataclass(frozen=True)
class Setting:
    """A way to use a log."""

    name: str
    durability: str
    faults: bool = False  # the disk refuses now and then
    cut: bool = False  # the kill takes the power along, more often than not
    first_kill: tuple[str, int] = ("", 0)  # point and time at which the life before ended
    link_up: float = 0.5  # how often
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """The ring, with its counters, outlives a kill."""
        return self.durability != "memory" and not self.cut


class Killed(Exception):
    """The machine stands still; nothing that a call returned since means anything."""


class User:
    def __init__(self, seed: int, setting: Setting) -> None:
        self.random = random.Random(f"{seed}/{setting.name}")
        self.setting = setting
        self.disk = Disk()
        self.lib = self.disk.lib
        self.ever: dict[int, bytes] = {}  # whatever was published, by position
        self.pending: list[int] = []  # positions, oldest first ...
        self.flight: list[Record] = []  # ... of which these were read
        self.published = self.acked = self.dropped = self.refused = 0
        self.reasons: Counter[int] = Counter()
        self.gone: list[int] = []  # positions of what was dropped
        self.in_doubt: tuple[str, Any] = ("", None)
        self.last = -1  # no position up to here may be given out again
        self.safe = 0  # what stands before it is on the disk
        self.unclear: list[Loss] = []  # losses that nobody knows to be from before or after the kill
        self.torn: set[tuple[int, int]] = set()  # ranges of damage that a power cut made
        self.saved = False  # the last life ended with everything on the disk
        self.kills = 0
        self.waits = False
        self.log: Log

    # ---- being killed ----

    def watch(self, point: str = "", nth: int = 1) -> None:
        self.point = self.disk.ffi.new("char[]", point.encode())
        self.lib.crash_watch(self.disk.c, self.point if point else self.disk.ffi.NULL, nth)

    def counted(self) -> dict[str, int]:
        """How often each point was reached since it was watched."""
        found: dict[str, int] = {}
        while (name := self.lib.crash_name(len(found))) != self.disk.ffi.NULL:
            found[self.disk.ffi.string(name).decode()] = self.lib.crash_hits(len(found))
        return found

    def alive(self) -> None:
        """What came before this call came before any kill."""
        if self.lib.sim_is_cut(self.disk.c):
            raise Killed

    def bury(self) -> None:
        if self.log.c is not None:
            self.unclear += self.log.losses()
        self.log.close()
        self.disk.heal()
        # A process that only was killed leaves files that the next one may take to be more durable than they are.
        cut = self.setting.cut and self.random.random() < 0.6
        self.lib.sim_restart(self.disk.c, cut, self.random.randrange(1 << 60))
        self.kills += 1
        self.saved = False
        self.flight = []

    # ---- a life ----

    def open(self) -> None:
        """Open, and look at what is there, until a look was not disturbed."""
        chosen = {"spill_after_ms": 0, "durability": self.setting.durability} | self.setting.chosen
        for _ in range(TRIES):
            self.log = Log(self.disk, **chosen)
            try:
                self.alive()
                self.log.ok(self.log.status)
                self.look()
                return
            except Killed:
                self.bury()
                if self.waits:
                    raise
        raise AssertionError("killed at every try to open")

    def live(self, steps: int = STEPS) -> None:
        """Open, work, end; with ``waits`` without opening again after a kill."""
        try:
            self.open()
        except Killed:
            return
        try:
            for _ in range(steps):
                self.step()
                self.alive()
                self.note()
            if self.random.random() < 0.3:
                self.lib.sim_kill(self.disk.c)
            else:
                self.close()
            self.alive()
        except Killed:
            self.bury()

    def close(self) -> None:
        if self.random.random() < 0.8:
            self.disk.heal()
        self.lib.cps_log_shut(self.log.c)
        self.note()
        last = self.log.finish()
        if self.lib.sim_is_cut(self.disk.c):
            self.unclear += last
            raise Killed
        self.lose(last)
        unsaved = self.log.close()
        self.alive()
        assert unsaved == 0 or self.setting.faults or self.setting.chosen.get("spool_bytes_max")
        self.saved = unsaved == 0 and not self.setting.faults
        if self.saved:  # closed is synced
            self.safe = max(self.safe, self.last + 1)
        self.flight = []
        self.disk.heal()

    def end(self) -> None:
        """Take everything, and see it all add up."""
        self.lib.crash_stop()
        self.open()
        self.read(1 << 20)
        self.log.settle(self.flight)
        stats = self.log.check()
        assert stats.pending_messages == 0
        self.lib.sim_advance(self.disk.c, 100_000)
        self.log.until(lambda: not self.disk.names())
        assert self.log.close() == 0
        self.disk.close()

    # ---- what it does ----

    def step(self) -> None:
        dice = self.random.random()
        if dice < 0.45:
            for _ in range(self.random.randrange(1, 6)):
                self.append()
        elif dice < 0.53:
            self.log.link(self.random.random() < self.setting.link_up)
        elif dice < 0.68:
            self.read(self.random.choice([1, 500, 5000]))
        elif dice < 0.80:
            self.settle()
        elif dice < 0.86:
            self.log.rewind()
            self.flight = []
        elif dice < 0.93:
            self.sync()
        elif dice < 0.96 or not self.setting.faults:
            self.lib.sim_advance(self.disk.c, 2000)
        elif self.random.random() < 0.5:
            kind = self.random.choice(["WRITE", "SYNC", "ALLOCATE", "SYNC_DIRECTORY"])
            error = self.random.choice([errno.EIO, errno.ENOSPC])
            self.disk.fail(kind, error, self.random.randrange(1, 3), self.random.random() < 0.5)
        else:
            self.disk.heal()

    def append(self) -> None:
        size = self.random.choice([0, 8, 60, 300, self.random.randrange(980)])
        payload = self.random.randbytes(size)
        self.in_doubt = ("append", payload)
        position = self.log.append(payload)
        self.alive()
        self.in_doubt = ("", None)
        if position == self.lib.CPS_FULL:
            assert self.setting.chosen.get("on_full", "raise") == "raise"
            return
        assert position >= 0, position
        self.published += 1
        if position >= 1 << 63:
            self.refused += 1
            return
        assert position > self.last
        self.last = position
        self.ever[position] = payload
        self.pending.append(position)

    def read(self, max_bytes: int) -> None:
        """One batch, or, when so much is asked for, all there is."""
        while True:
            got = self.log.read(max_bytes)
            losses = self.log.losses()
            if self.lib.sim_is_cut(self.disk.c):
                self.unclear += losses
                raise Killed
            self.lose(losses)
            if got == self.lib.CPS_EMPTY:
                assert len(self.flight) == len(self.pending)
                return
            if not isinstance(got, list):
                assert got in self.torn, got
                continue
            expected = self.pending[len(self.flight) :][: len(got)]
            assert [one.position for one in got] == expected
            assert [one.payload for one in got] == [self.ever[at] for at in expected]
            self.flight += got
            if max_bytes < 1 << 20:
                return

    def settle(self) -> None:
        count = self.random.randrange(len(self.flight) + 1)
        self.in_doubt = ("settle", count)
        if count > 0 and self.random.random() < 0.3:
            self.lib.cps_log_settle_through(self.log.c, self.flight[count - 1].position)
        else:
            self.log.settle(self.flight[:count])
        self.alive()
        self.in_doubt = ("", None)
        self.acked += count
        del self.flight[:count], self.pending[:count]

    def sync(self) -> None:
        if not self.pending:
            return
        position = self.pending[-1]
        status = self.lib.cps_log_wait_synced(self.log.c, position, 2000)
        self.alive()
        limited = self.setting.faults or "spool_bytes_max" in self.setting.chosen
        assert status == self.lib.CPS_OK or (limited and status == self.lib.CPS_IO), status
        if status == self.lib.CPS_OK:
            self.safe = max(self.safe, position + 1)

    # ---- what it may expect ----

    def note(self) -> None:
        losses, stats = self.log.losses(), self.log.stats()
        if self.lib.sim_is_cut(self.disk.c):
            self.unclear += losses
            raise Killed
        self.lose(losses)
        assert stats.produced.messages == self.published
        assert stats.settled.acked_messages == self.acked
        assert stats.produced.refused == self.refused
        self.safe = max(self.safe, stats.synced if self.setting.cut else stats.settled.spilled)

    def lose(self, losses: list[Loss]) -> None:
        for loss in losses:
            self.reasons[loss.reason] += loss.messages
            if loss.reason == REFUSED:
                continue
            gone = [at for at in self.pending if loss.first <= at < loss.end]
            assert len(gone) == loss.messages, (loss, gone)
            assert not any(loss.first <= record.position < loss.end for record in self.flight)
            self.pending = [at for at in self.pending if not loss.first <= at < loss.end]
            self.gone += gone
            self.dropped += loss.messages

    def look(self) -> None:
        """Everything that there is, without acknowledging any of it."""
        self.log.check()
        seen: list[Record] = []
        while not isinstance(got := self.log.read(1 << 16), int):
            self.alive()
            if isinstance(got, list):
                seen += got
            else:  # a torn write: some of its sectors are there, others are not
                assert self.setting.cut and (got in self.torn or got[0] >= self.safe), got
                self.torn.add(got)
        self.alive()
        assert got == self.lib.CPS_EMPTY, got
        # All of it is in flight now, so nothing can be dropped any more.
        stats, losses = self.log.check(), self.log.losses()
        ledger = self.disk.ffi.new("cps_ledger *")
        self.lib.stress_ledger(self.log.c, ledger)
        self.alive()
        positions = [record.position for record in seen]
        assert positions == sorted(set(positions))
        if self.setting.exact or self.saved:
            self.expect_everything(seen, stats)
            self.expect_losses(stats, ledger)
        else:
            self.expect_what_is_safe(seen, losses)
            self.published, self.refused = stats.produced.messages, stats.produced.refused
            self.acked, self.dropped = stats.settled.acked_messages, stats.settled.dropped_messages
            self.reasons.clear()
            self.gone.clear()
        assert len(self.pending) == stats.pending_messages == len(seen)
        self.in_doubt = ("", None)
        self.unclear = []
        self.last = max([self.last, stats.produced.published - 1, *positions])
        self.log.rewind()
        self.alive()

    def newcomer(self, seen: list[Record]) -> list[int]:
        """Position of the message whose publishing was in progress, if it is there."""
        new = [record for record in seen if record.position not in self.ever]
        assert len(new) <= 1
        for record in new:
            assert self.in_doubt == ("append", record.payload) and record.position > self.last
            self.ever[record.position] = record.payload
        for record in seen:
            assert self.ever[record.position] == record.payload
        return [record.position for record in new]

    def expect_everything(self, seen: list[Record], stats: Any) -> None:
        doubt, value = self.in_doubt
        if doubt == "settle" and stats.settled.acked_messages != self.acked:
            self.acked += value
            del self.pending[:value]
        assert stats.settled.acked_messages == self.acked
        new = self.newcomer(seen)
        lost_newcomer = 0
        if stats.produced.messages != self.published:
            assert doubt == "append" and stats.produced.messages == self.published + 1
            self.published += 1
            if stats.produced.refused != self.refused:
                assert stats.produced.refused == self.refused + 1
                self.refused += 1
            else:
                lost_newcomer = 1 - len(new)  # published, and dropped at once
        else:
            assert not new
        assert stats.produced.refused == self.refused
        self.pending += new
        positions = {record.position for record in seen}
        missing = [at for at in self.pending if at not in positions]
        assert stats.settled.dropped_messages - self.dropped == len(missing) + lost_newcomer, missing
        assert missing == [] or self.setting.chosen.get("on_full") == "drop_oldest"
        self.gone += missing
        self.dropped = stats.settled.dropped_messages
        self.pending = [at for at in self.pending if at in positions]
        assert self.pending == [record.position for record in seen]

    def expect_losses(self, stats: Any, ledger: Any) -> None:
        """The ledger and the counters say the same, and its ranges cover what is gone."""
        totals = ledger.totals
        ended = [reason for reason in range(len(totals)) if reason != REFUSED]
        assert sum(totals[reason].messages for reason in ended) == stats.settled.dropped_messages
        assert sum(totals[reason].bytes for reason in ended) == stats.settled.dropped_bytes
        assert totals[REFUSED].messages == stats.produced.refused
        assert totals[REFUSED].bytes == stats.produced.refused_bytes
        for reason, messages in self.reasons.items():
            assert totals[reason].messages >= messages
        entries = [one for one in ledger.entries[0 : ledger.used] if one.when >> 48 != REFUSED]
        for at in self.gone:
            assert any(one.first <= at < one.end for one in entries), at
        self.reasons = Counter({reason: totals[reason].messages for reason in range(len(totals))})

    def expect_what_is_safe(self, seen: list[Record], losses: list[Loss]) -> None:
        new = self.newcomer(seen)
        doubt, value = self.in_doubt
        must = self.pending[value if doubt == "settle" else 0 :]
        positions = {record.position for record in seen}
        lost = [at for at in must if at < self.safe and at not in positions]
        ranges = self.unclear + losses
        assert not [at for at in lost if not any(loss.first <= at < loss.end for loss in ranges)]
        assert not new or seen[-1].position == new[0]
        self.pending = [record.position for record in seen]
