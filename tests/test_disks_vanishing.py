"""Files that go while they are in use: removed, cut short, moved away.  And a quota that holds at every moment.

What is gone is counted, everything else arrives in order, and the process lives: above all it never dies of SIGBUS.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloudpubsub import Drop
from cloudpubsub.demo.relay import Relay
from tests.brokers import Rumqttd
from tests.collector import Collector
from tests.making import DEADLINE_S, eventually
from tests.publishing import client_to
from tests.trial import KIB, MANY, RING_HOLDS, SEGMENT_HOLDS, SMALL, Trial, Worker, number_of, payload_of

MIB = 1 << 20
SOAK_S = float(os.environ.get("CLOUDPUBSUB_SOAK_SECONDS", "3"))
QUOTA, SPARE = 4 * MIB, 256 * KIB
# Meta file and lock file, and the blocks of the directories, which grow with names and do not shrink.
ALLOWANCE = 64 * KIB
BIG = {"size": 8_000, "ring_bytes": MIB, "segment_bytes": MIB, "max_spool_bytes": 1 << 30}
BIG_COUNT = 26_000  # more than 200 MB


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """A thread does it again and again."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            act()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# ---- files that go ----


def to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def to_the_middle(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "lost"),
    [(to_nothing, SEGMENT_HOLDS), (to_the_middle, SEGMENT_HOLDS // 2 + 1)],
    ids=["cut to nothing", "cut to the middle"],
)
def test_a_file_that_is_damaged_costs_what_was_in_it(
    damage: Callable[[Path], None], lost: int, tmp_path: Path
) -> None:
    with Trial(tmp_path / "spool") as trial:
        trial.put()
        damage(tmp_path / "spool" / "log" / trial.files()[1])
        trial.take_patiently()
        missing = sorted(set(range(MANY)) - set(trial.taken))
        assert lost - 2 <= len(missing) <= lost + 2
        assert missing == list(range(missing[0], missing[-1] + 1)), "one range"
        trial.return_to_disk()
        trial.finish()


def test_a_file_that_is_gone_costs_what_was_in_it_and_takes_no_quota(tmp_path: Path) -> None:
    with Trial(tmp_path / "spool", on_full="drop_newest", max_spool_bytes=MIB) as trial:
        trial.put(RING_HOLDS + SEGMENT_HOLDS)
        os.unlink(tmp_path / "spool" / "log" / trial.files()[0])
        trial.take_patiently()
        assert trial.taken == list(range(SEGMENT_HOLDS, trial.count))
        trial.put(4 * MANY)
        eventually(lambda: trial.storage() == "full")
        assert len(trial.files()) == MIB // SMALL["segment_bytes"]
        trial.finish()


def test_a_directory_that_is_removed_is_done_without(tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        trial = worker.trial("a")
        trial.put(RING_HOLDS)  # one file, since each is waited for
        shutil.rmtree(tmp_path / "a")
        trial.put(RING_HOLDS + SEGMENT_HOLDS)
        assert trial.storage() == "failed"
        trial.take_patiently()
        trial.put(50)
        assert trial.take() == 50
        dropped, count, taken = trial.stats()["dropped"], trial.count(), trial.taken()
        assert taken == sorted(set(taken))
        assert len(taken) + dropped == count
        assert trial.close() == 0
        assert worker.end() == 0


def test_a_directory_that_comes_back_is_returned_to(tmp_path: Path) -> None:
    with Trial(tmp_path / "spool") as trial:
        trial.put()
        (tmp_path / "spool").rename(tmp_path / "away")
        trial.put(2 * RING_HOLDS)
        assert trial.storage() == "failed"
        (tmp_path / "away").rename(tmp_path / "spool")
        trial.return_to_disk()
        trial.finish()


def test_files_cut_under_the_feet_of_the_reader_never_end_the_process(tmp_path: Path) -> None:
    with Worker(tmp_path) as worker:
        trial = worker.trial("a", **BIG)
        trial.put(BIG_COUNT)
        log = tmp_path / "a" / "spool" / "log"

        def hammer() -> None:
            try:
                damage = random.choice([to_nothing, to_the_middle])
                damage(log / random.choice(sorted(os.listdir(log))[:4]))  # about where the reader is
            except (FileNotFoundError, IndexError):
                pass  # drained
            time.sleep(0.001)

        with meanwhile(hammer):
            trial.take_patiently()
        taken, stats = trial.taken(), trial.stats()
        assert taken == sorted(set(taken)), "not in order"
        assert 0 < BIG_COUNT - len(taken) <= stats["dropped"]
        trial.put(50)
        trial.take()
        assert trial.taken()[-50:] == list(range(BIG_COUNT, BIG_COUNT + 50))
        assert trial.close() == 0
        assert worker.end() == 0


def test_a_client_reports_what_a_damaged_file_cost(rumqttd: Rumqttd, tmp_path: Path) -> None:
    drops: list[Drop] = []
    with Relay(rumqttd.port) as relay, Collector(rumqttd.port, key=lambda _, payload: number_of(payload)) as collector:
        with client_to(relay.port, tmp_path / "spool", **SMALL, on_drop=drops.append) as client:
            eventually(lambda: client.stats().connected)
            relay.cut()
            for number in range(MANY):
                client.publish("numbers", payload_of(number))
            log = tmp_path / "spool" / "log"
            to_the_middle(log / sorted(os.listdir(log))[1])
            relay.restore()
            lost = client.flush(DEADLINE_S)
            collector.wait_for(MANY - lost, DEADLINE_S)
        arrived = collector.first_deliveries()
    assert 0 < lost <= SEGMENT_HOLDS
    assert sum(drop.count for drop in drops) == lost
    assert arrived == sorted(arrived)
    assert len(arrived) == MANY - lost


# ---- the quota ----


def disk_usage(directory: Path) -> int | None:
    """What `du` says in bytes; None if files came or went meanwhile, since then it would be no one moment's."""

    def look() -> dict[Path, tuple[int, int]]:
        found = {}
        for path in [directory, *directory.rglob("*")]:
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue
            found[path] = (facts.st_ino, facts.st_blocks * 512)
        return found

    before, after = look(), look()
    same = {path: one[0] for path, one in before.items()} == {path: one[0] for path, one in after.items()}
    return max(sum(size for _, size in one.values()) for one in (before, after)) if same else None


@pytest.mark.timeout(300 + SOAK_S)
def test_the_disk_never_holds_more_than_the_quota_and_gives_all_back(tmp_path: Path) -> None:
    samples: list[int] = []

    def sample() -> None:
        used = disk_usage(tmp_path / "a")
        if used is not None:
            samples.append(used)
        time.sleep(0.0005)

    with Worker(tmp_path) as worker:
        trial = worker.trial("a", max_spool_bytes=QUOTA, segment_bytes=SPARE, ring_bytes=256 * KIB)
        with meanwhile(sample):
            trial.overload(SOAK_S)
            full = len(samples)
            trial.take()
        assert full > 2 * SOAK_S
        assert max(samples) <= QUOTA + ALLOWANCE
        assert max(samples) > QUOTA * 3 // 4, "it was never near the quota"
        eventually(lambda: (disk_usage(tmp_path / "a") or QUOTA) <= SPARE + ALLOWANCE, "given back")
        trial.finish()
        assert worker.end() == 0
