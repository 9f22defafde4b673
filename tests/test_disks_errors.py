"""Every call of the disk that can fail fails, with every errno that disks have, or hangs: preloaded into a process.

`faulty_disk.c` makes calls below a directory fail while a control file says so.  A process has many spools, and each
its own fault, so that they wait for their next try at the same time.
"""

from __future__ import annotations

import errno
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import Rumqttd
from tests.making import DEADLINE_S, Child, eventually, url
from tests.preload import preloaded
from tests.trial import MANY, RING_HOLDS, SEGMENT_HOLDS, SMALL, RemoteTrial, Trial, Worker

CALLS = ["open", "pwrite", "pread", "fdatasync", "posix_fallocate", "unlink"]
WRITING = ["open", "pwrite", "posix_fallocate"]  # without which nothing more can be written
SAVING = [*WRITING, "fdatasync"]
OPENING = ["open", "pread", "pwrite", "fdatasync"]
ERRORS = [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT]
IN_MEMORY = RING_HOLDS - 10
MORE = RING_HOLDS + SEGMENT_HOLDS + 50  # more than memory takes, and a file that has its room already
POWER: dict[str, Any] = {"durability": "power", "sync_interval": 0.05}
SLACK_S = 30.0  # of a loaded machine

# Publishes before there is a link, so that all of it is still there.
CLIENT = """
import json, sys, time
import cloudpubsub
from tests.trial import payload_of

broker, spool, settings, count, with_link = *sys.argv[1:3], json.loads(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
client = cloudpubsub.Client(broker, client_id="gateway", spool=spool, **settings)
for number in range(count):
    client.publish("numbers", payload_of(number))
print("published", flush=True)
sys.stdin.readline()
client.start()
while with_link == "True" and not client.stats().connected:
    time.sleep(0.005)
print("started", flush=True)
sys.stdin.readline()
began = time.monotonic()
print(json.dumps([client.close(1.0), time.monotonic() - began]), flush=True)
"""

each_durability = pytest.mark.parametrize("settings", [{"durability": "process"}, POWER], ids=["process", "power"])


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on tmpfs, which is fast; rings, those of child processes too, lie in its folder `run`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        (Path(directory) / "run").mkdir(mode=0o700)
        monkeypatch.setenv("RUNTIME_DIRECTORY", f"{directory}/run")
        yield Path(directory)


def start_worker(root: Path) -> Worker:
    return Worker(root, **preloaded("faulty_disk"), FAULTY_BELOW=str(root))


@pytest.fixture
def worker(memory: Path) -> Iterator[Worker]:
    with start_worker(memory) as running:
        yield running


@contextmanager
def faulty(directory: Path, calls: str, how: int | str) -> Iterator[None]:
    """Meanwhile `calls` on files below `directory` fail with the errno `how`, or "hang"."""
    control, draft = directory.with_suffix(".fault"), directory.with_suffix(".draft")
    draft.write_text(f"{calls} {how}")
    draft.rename(control)  # at once
    try:
        yield
    finally:
        control.unlink()


def found_in(directory: Path) -> list[int]:
    """What the next open finds, with nothing failing."""
    with Trial(directory / "spool") as trial:
        trial.take()
        return trial.taken


# ---- calls that fail ----


@each_durability
def test_whatever_fails_is_done_without_and_returned_to(settings: dict[str, Any], worker: Worker) -> None:
    trials: dict[tuple[str, int], RemoteTrial] = {}
    with ExitStack() as faults:
        for call, error in product(CALLS, ERRORS):
            trial = trials[call, error] = worker.trial(f"{call}-{error}", on_full="drop_newest", **settings)
            trial.put()
            faults.enter_context(faulty(trial.directory, call, error))
        for (call, error), trial in trials.items():
            trial.put(MORE)
            if call in WRITING:
                eventually(lambda trial=trial: trial.storage() == "failed", call)
                assert trial.stats()["storage_error"] == error
            assert call not in ("pread", "open") or not trial.try_to_take(), call
    for trial in trials.values():
        trial.return_to_disk()
        trial.finish()
    assert worker.end() == 0


def test_a_backlog_stays_when_dropping_it_would_not_help(worker: Worker) -> None:
    for error in ERRORS:
        trial = worker.trial(str(error))
        trial.put()
        files = trial.files()
        with faulty(trial.directory, "posix_fallocate", error):
            trial.put(MORE)
            eventually(lambda trial=trial: trial.storage() == "failed")
            # Where room is what is missing, the oldest file may go, once.
            assert set(trial.files()) >= set(files[1 if error in (errno.ENOSPC, errno.EDQUOT) else 0 :])


def test_what_is_given_up_as_unreadable_is_counted_for_good(worker: Worker) -> None:
    trial = worker.trial("a")
    trial.put()
    with faulty(trial.directory, "open", errno.EIO):
        eventually(lambda: trial.try_to_take() or trial.stats()["dropped"] > 0)
    trial.take_patiently()  # what comes behind it
    assert trial.stats()["dropped"] >= SEGMENT_HOLDS
    trial.return_to_disk()
    trial.finish()


def test_a_sync_that_failed_is_not_called_done(worker: Worker) -> None:
    trials = {error: worker.trial(str(error), **POWER) for error in ERRORS}
    for error, trial in trials.items():
        trial.put()
        assert trial.sync()
        synced = trial.stats()["synced"]
        with faulty(trial.directory, "fdatasync", error):
            trial.put(100)
            assert not trial.sync()
            assert trial.stats()["synced"] == synced
    for trial in trials.values():
        trial.return_to_disk()
        assert trial.sync()
        trial.finish()


def test_what_cannot_be_saved_at_close_is_counted_and_found_by_the_next_open(worker: Worker) -> None:
    with ExitStack() as faults:
        for call in SAVING:
            trial = worker.trial(call, **POWER)
            trial.put()
            assert trial.sync()
            faults.enter_context(faulty(trial.directory, call, errno.EIO))
            trial.put(IN_MEMORY)
            assert 0 < trial.close() <= IN_MEMORY, call  # the last file may have room for a part of it
        assert worker.end() == 0
    for call in SAVING:
        assert found_in(worker.root / call) == list(range(MANY + IN_MEMORY)), call


def test_an_open_that_fails_says_so_and_costs_nothing(worker: Worker) -> None:
    for call in OPENING:
        worker.trial(call).put()
    worker.kill()  # a part is on the disk, the rest in the ring
    with start_worker(worker.root) as second:
        for call in OPENING:
            with faulty(worker.root / call, call, errno.EIO):
                assert second.cannot_open(call) == errno.EIO, call
            trial = second.trial(call)
            assert trial.take() == MANY, call
            assert trial.taken() == list(range(MANY))


# ---- calls that hang ----


def test_a_disk_that_hangs_holds_up_neither_publishing_nor_closing(worker: Worker) -> None:
    with ExitStack() as faults:
        for call in SAVING:
            trial = worker.trial(call, durability="power", sync_interval=3600)
            faults.enter_context(faulty(trial.directory, call, "hang"))
            began = time.monotonic()
            trial.put(IN_MEMORY)
            assert trial.close(0.3) == IN_MEMORY, call
            assert time.monotonic() - began < 0.3 + SLACK_S, call
        worker.kill()
    for call in SAVING:
        assert found_in(worker.root / call) == list(range(IN_MEMORY)), call


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_a_client_closes_on_time_when_the_disk_hangs(call: str, rumqttd: Rumqttd, memory: Path) -> None:
    has_link = call != "pwrite"  # then the backlog is read
    broker = url(rumqttd.port if has_link else 1)
    settings = json.dumps({**SMALL, "reconnect_min": 0.02})
    environment = {**preloaded("faulty_disk"), "FAULTY_BELOW": str(memory)}
    (memory / "a").mkdir()
    with Child(CLIENT, broker, memory / "a" / "spool", settings, MANY, has_link, **environment) as child:
        assert child.line() == "published"
        with faulty(memory / "a", call, "hang"):
            child.tell("start")
            assert child.line() == "started"
            child.tell("close")
            unsaved, took = json.loads(child.line())
            assert 0 < unsaved <= MANY
            assert took < 1.0 + SLACK_S
            assert child.process.wait(DEADLINE_S) == 0
    assert found_in(memory / "a") == list(range(MANY))


def test_a_disk_that_hangs_while_it_is_read_does_not_hold_up_closing(worker: Worker) -> None:
    trial = worker.trial("a")
    trial.put()
    with faulty(trial.directory, "pread", "hang"):
        trial.start_reading()
        began = time.monotonic()
        assert 0 < trial.close(0.3) <= MANY
        assert time.monotonic() - began < 0.3 + SLACK_S
    eventually(trial.can_reopen, "the call that hung has closed the spool")
    trial.finish()
    assert worker.end() == 0


def test_a_process_ends_though_a_call_hangs_in_the_disk(worker: Worker) -> None:
    trial = worker.trial("a")
    trial.put()
    with faulty(trial.directory, "pread", "hang"):
        trial.start_reading()
        assert 0 < trial.close(0.3) <= MANY
        assert worker.end() == 0


def test_a_disk_that_hung_and_goes_on_costs_nothing(worker: Worker) -> None:
    trial = worker.trial("a")
    trial.put()
    assert trial.sync()  # memory is empty
    with faulty(trial.directory, "pwrite,posix_fallocate", "hang"):
        trial.put(IN_MEMORY)
    trial.put()
    assert trial.stats()["dropped"] == 0
    trial.finish()
    assert worker.end() == 0


def test_a_disk_that_hangs_is_said_to_have_failed_and_waited_for_once(worker: Worker) -> None:
    trial = worker.trial("a", on_full="drop_newest", spill_timeout=0.5)
    with faulty(trial.directory, "posix_fallocate", "hang"):
        began = time.monotonic()
        trial.put(RING_HOLDS + 20)
        assert time.monotonic() - began < 0.5 + SLACK_S
        assert trial.storage() == "failed"
    trial.return_to_disk()
    trial.finish()
