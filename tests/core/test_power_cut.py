"""Power cuts at any call that changes the disk.

Each seed stands for three lives with a cut each, at a call that the seed chooses, and a look at what is left; one more
test cuts at every call of one life in turn.  A failure names the seed, and ``CLOUDPUBSUB_CUT_SEED=N`` runs that seed
alone.  ``CLOUDPUBSUB_CUT_SEEDS=N`` runs so many instead of the few that are always run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from .build import sanitizers
from .disk import Disk, Log, Record

ROUNDS = int(os.environ.get("CLOUDPUBSUB_CUT_SEEDS", "40" if sanitizers() else "700"))
ONLY = os.environ.get("CLOUDPUBSUB_CUT_SEED")
SECONDS = 120 + ROUNDS  # of one test


class Session:
    """A writer, a reader, and what they may rely on across cuts."""

    def __init__(self, seed: int, durability: str, segment_bytes: int) -> None:
        self.random = random.Random(seed)
        self.disk = Disk()
        self.durability, self.segment_bytes = durability, segment_bytes
        self.published: dict[int, bytes] = {}
        self.acked: set[int] = set()
        self.synced = 0  # everything below it was said to survive
        self.last = -1  # highest position that was ever given out
        self.cuts = 0

    def open(self) -> Log | None:
        """None: the power went during the open."""
        log = Log(self.disk, durability=self.durability, segment_bytes=self.segment_bytes, spill_after_ms=0)
        if log.status == log.lib.CPS_OK:
            return log
        assert self.disk.lib.sim_is_cut(self.disk.c), log.status
        return None

    def arrive(self, seen: list[Record], everything: bool) -> None:
        """What was read was published, came in order, and nothing that had to be there is missing."""
        positions = [record.position for record in seen]
        assert positions == sorted(set(positions))
        for record in seen:
            assert self.published[record.position] == record.payload
        if everything:
            missing = self.published.keys() - self.acked - set(positions)
            assert not [at for at in missing if at < self.synced]
            for at in missing:  # not promised, and gone: a later promise about later positions is not about them
                del self.published[at]

    def step(self, log: Log, flight: list[Record]) -> None:
        dice = self.random.random()
        if dice < 0.6:
            payload = self.random.randbytes(self.random.randrange(1, 700))
            position = log.append(payload)
            if position >= 0:
                assert position > self.last
                self.last = position
                self.published[position] = payload
        elif dice < 0.75 and self.published:
            last = max(self.published)
            if log.lib.cps_log_wait_synced(log.c, last, 5000) == log.lib.CPS_OK:
                self.synced = max(self.synced, last + 1)
        elif dice < 0.85:
            got = log.read(4096)
            if isinstance(got, list):
                self.arrive(got, False)
                flight += got
        elif dice < 0.95:
            count = self.random.randrange(len(flight) + 1)
            log.settle(flight[:count])
            self.acked |= {record.position for record in flight[:count]}
            del flight[:count]
        else:
            self.rewind(log, flight)
        if self.durability == "power":
            self.synced = max(self.synced, log.stats().synced)

    def rewind(self, log: Log, flight: list[Record]) -> None:
        log.rewind()
        flight.clear()

    def live(self, calls: int = 0) -> bool:
        """Open, work, lose power at this or a random call, and look at what is left.  False: it was not reached."""
        self.disk.lib.sim_cut(self.disk.c, calls or self.random.randrange(1, 60))
        log = self.open()
        flight: list[Record] = []
        for _ in range(200):
            if log is None or self.disk.lib.sim_is_cut(self.disk.c):
                break
            self.step(log, flight)
        was_cut = bool(self.disk.lib.sim_is_cut(self.disk.c))
        self.disk.lib.sim_cut(self.disk.c, 0)
        if log is not None:
            log.close()
        self.disk.lib.sim_restart(self.disk.c, True, self.random.randrange(1 << 60))
        self.cuts += 1
        self.look()
        return was_cut

    def look(self) -> None:
        """A clean life, read to the end, of which only some is acknowledged."""
        log = self.open()
        assert log is not None
        seen = log.drain()
        self.arrive(seen, True)
        if seen:  # a cursor that never moves would keep every promise
            assert log.lib.cps_log_wait_synced(log.c, seen[-1].position, 5000) == log.lib.CPS_OK
            assert log.stats().synced >= seen[-1].end
        done = seen[: self.random.randrange(len(seen) + 1)]
        log.settle(done)
        self.acked |= {record.position for record in done}
        if self.random.random() < 0.5:
            assert log.close() == 0  # it all is on the disk, durable
            self.synced = max(self.synced, max((record.end for record in seen), default=0))
        else:
            log.cut(self.random.randrange(1 << 60))
            self.cuts += 1


class SplitSession(Session):
    """With a live stream beside the backlog's."""

    def open(self) -> Log | None:
        self.live_flight: list[Record] = []
        return super().open()

    def step(self, log: Log, flight: list[Record]) -> None:
        dice = self.random.random()
        was_split = log.is_split
        if dice < 0.1:
            self.rewind(log, flight)
            log.split(self.random.choice([0, 3000]))
        elif dice < 0.3:
            got = log.read(4096, live=True)
            if isinstance(got, list):
                self.arrive(got, False)
                (self.live_flight if log.is_split else flight).extend(got)
        elif dice < 0.45:
            count = self.random.randrange(len(self.live_flight) + 1)
            log.settle(self.live_flight[:count], live=True)
            self.acked |= {record.position for record in self.live_flight[:count]}
            del self.live_flight[:count]
        else:
            super().step(log, flight)
        if was_split and not log.is_split:
            assert not flight
            flight += self.live_flight
            self.live_flight.clear()

    def rewind(self, log: Log, flight: list[Record]) -> None:
        super().rewind(log, flight)
        self.live_flight.clear()


def run(seed: int, durability: str, segment_bytes: int, kind: type[Session] = Session) -> int:
    session = kind(seed, durability, segment_bytes)
    try:
        for _ in range(3):
            session.live()
        session.disk.close()
    except AssertionError as error:
        raise AssertionError(f"CLOUDPUBSUB_CUT_SEED={seed}, {durability}, segments of {segment_bytes} bytes") from error
    return session.cuts


def seeds() -> Iterator[int]:
    return iter([int(ONLY)] if ONLY else range(ROUNDS))


def expected_cuts() -> int:
    return 3 * len(list(seeds()))


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("segment_bytes", [4096, 16_384])
def test_what_was_said_to_be_synced_survives_every_cut(segment_bytes: int) -> None:
    assert sum(run(seed, "power", segment_bytes) for seed in seeds()) >= expected_cuts()


@pytest.mark.timeout(SECONDS)
def test_without_that_promise_the_log_still_opens_and_invents_nothing() -> None:
    assert sum(run(seed, "process", 4096) for seed in seeds()) >= expected_cuts()


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("durability", ["power", "process"])
def test_what_was_settled_ahead_of_a_backlog_costs_no_cut_anything(durability: str) -> None:
    assert sum(run(seed, durability, 4096, SplitSession) for seed in seeds()) >= expected_cuts()


@pytest.mark.parametrize("durability", ["power", "process"])
def test_what_was_said_to_be_synced_survives_a_cut_at_every_single_call(durability: str) -> None:
    """One life, whose dice fall the same each time, is cut at its first call, at its second, and so on to its last."""
    calls, reached = 0, True
    while reached:
        calls += 1
        session = Session(7, durability, 4096)
        reached = session.live(calls)
        session.disk.close()
    assert calls > 100
