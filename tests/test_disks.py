"""Real file systems that are full, read-only, broken, or lie on a device that has run out.

Nobody who publishes notices, memory takes over, what is on the disk is delivered and freed, and the spool returns to
the disk by itself.  Only root can mount: see tests/mounts.py.
"""

from __future__ import annotations

import errno
import logging
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudpubsub import Drop, SpoolError
from cloudpubsub.demo.relay import Relay
from tests.brokers import Broker
from tests.collector import Collector
from tests.making import DEADLINE_S, eventually
from tests.mounts import Mount, covered_read_only, ext4, ext4_image, make_image, tmpfs
from tests.publishing import client_to
from tests.trial import MANY, RING_HOLDS, SEGMENT_HOLDS, SMALL, Trial, number_of, payload_of

MIB = 1 << 20
DISK_BYTES = 24 * MIB
POLICIES = ["drop_oldest", "drop_newest", "block", "raise"]
MORE = RING_HOLDS + SEGMENT_HOLDS + 50  # more than memory takes, and a file that has its room already
KINDS = {"tmpfs": tmpfs, "ext4": ext4}
DURABLE = [{"durability": "process"}, {"durability": "power", "sync_interval": 0.05}]

each_durability = pytest.mark.parametrize("settings", DURABLE, ids=["process", "power"])


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on tmpfs, which is fast; rings, those of child processes too, lie in its folder `run`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        (Path(directory) / "run").mkdir(mode=0o700)
        monkeypatch.setenv("RUNTIME_DIRECTORY", f"{directory}/run")
        yield Path(directory)


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, memory: Path) -> Iterator[Mount]:
    """A small file system, of each kind in turn."""
    with KINDS[request.param](memory / "disk", DISK_BYTES) as mounted:
        yield mounted


def numbers_in(spool: Path) -> list[int]:
    """What is in a spool, when nothing but its directory is left."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere, Trial(spool, ring_dir=elsewhere) as trial:
        trial.take()
        return trial.taken


# ---- full ----


def test_a_full_disk_is_done_without_and_returned_to(disk: Mount) -> None:
    trials = {policy: Trial(disk.path / policy, on_full=policy, block_timeout=0.001) for policy in POLICIES}
    for trial in trials.values():
        trial.put()
    with disk.full():
        for policy, trial in trials.items():
            trial.put(MORE)
            assert trial.refused or trial.stats()["dropped"] > 0
            # The oldest that go make room, even on a disk like this.
            assert trial.storage() in (["ok", "failed"] if policy == "drop_oldest" else ["full", "failed"])
        for trial in trials.values():
            trial.take()
            eventually(lambda trial=trial: trial.files() == [], "segments are removed")
            trial.put(50)
            assert trial.take() == 50
    for trial in trials.values():
        trial.return_to_disk()
        trial.finish()


def test_a_full_disk_opens_an_old_spool_and_takes_no_new_one(disk: Mount) -> None:
    old = Trial(disk.path / "old")
    old.put()
    old.close()
    with disk.full():
        with pytest.raises(SpoolError) as caught:
            Trial(disk.path / "new")
        assert caught.value.errno == errno.ENOSPC
        old.reopen()
        assert old.take() == MANY
    old.return_to_disk()
    old.finish()


def test_what_a_full_disk_refuses_at_close_is_there_at_the_next_open(disk: Mount) -> None:
    trial = Trial(disk.path / "spool", on_full="drop_newest")
    trial.put()
    with disk.full():
        trial.put(MORE)
        assert 0 < trial.close() <= RING_HOLDS
        trial.reopen()
        trial.take(MANY // 2)
        trial.close()
        trial.reopen()  # and knows what was acknowledged
        trial.finish()
    trial.reopen()
    trial.return_to_disk()
    trial.finish()


def test_the_reserve_is_left_to_others(memory: Path) -> None:
    settings = {"on_full": "drop_newest", "min_free_bytes": 8 * MIB}
    with ext4(memory / "disk", DISK_BYTES) as disk, Trial(disk.path / "spool", **settings) as trial:
        while trial.stats()["dropped"] == 0:
            trial.put()
        assert trial.storage() == "full"
        assert disk.free_bytes() >= 8 * MIB
        trial.take()
        trial.return_to_disk()
        trial.finish()


def test_nothing_is_dropped_for_a_reserve_that_cannot_be_had(memory: Path) -> None:
    with tmpfs(memory / "disk", DISK_BYTES) as disk, Trial(disk.path / "spool", min_free_bytes=8 * MIB) as trial:
        trial.put()
        oldest = trial.files()[0]
        with disk.full():
            trial.put(MORE)
            assert trial.storage() == "full"
            assert trial.files()[0] == oldest
        trial.return_to_disk()
        trial.finish()
        assert trial.taken[0] == 0


def test_the_ring_has_its_memory_before_others_take_the_rest(memory: Path) -> None:
    with tmpfs(memory / "small", MIB) as small, Trial(memory / "spool", ring_dir=small.path) as trial:
        with small.full():
            trial.put()  # several times round
        trial.finish()


def test_a_full_ring_directory_is_done_without(memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tmpfs(memory / "small", MIB) as small, small.full(), caplog.at_level(logging.WARNING):
        with Trial(memory / "spool", ring_dir=small.path) as trial:
            trial.put()
            trial.finish()
    assert "is not a usable tmpfs" in caplog.text


def test_an_outage_on_a_full_disk_costs_what_is_reported_and_no_order(broker: Broker, memory: Path) -> None:
    drops: list[Drop] = []
    with Relay(broker.port) as relay, Collector(broker.port, key=lambda _, payload: number_of(payload)) as collector:
        with tmpfs(memory / "disk", DISK_BYTES) as disk:
            settings = {**SMALL, "on_full": "drop_newest", "on_drop": drops.append}
            with client_to(relay.port, disk.path / "spool", **settings) as client:
                eventually(lambda: client.stats().connected)  # rumqttd must not see it go before
                relay.cut()
                for number in range(MANY):
                    client.publish("numbers", payload_of(number))
                with disk.full():
                    for number in range(MANY, 2 * MANY):
                        client.publish("numbers", payload_of(number))
                    relay.restore()
                    lost = client.flush(DEADLINE_S)
                assert client.stats().backlog_messages == 0
            collector.wait_for(2 * MANY - lost, DEADLINE_S)
            arrived = collector.first_deliveries()
    assert MANY - MORE < lost < MANY
    assert arrived == sorted(arrived)
    assert len(arrived) == 2 * MANY - lost
    assert sum(drop.count for drop in drops) == lost


# ---- read-only ----


def test_a_backlog_is_delivered_from_a_disk_that_was_remounted_read_only(memory: Path) -> None:
    # Of the folder for segments alone: a file system with files open for writing cannot be remounted.
    (memory / "spool").mkdir()
    with tmpfs(memory / "spool" / "log", DISK_BYTES) as log, Trial(memory / "spool") as trial:
        trial.put()
        trial.close()
        trial.reopen()
        with log.read_only():
            check_read_only(trial)
        check_writable_again(trial)


def test_a_backlog_is_delivered_from_a_directory_that_became_read_only(memory: Path) -> None:
    with ext4(memory / "disk", DISK_BYTES), Trial(memory / "disk" / "spool") as trial:
        trial.put()  # and a segment stays open for writing
        with covered_read_only(trial.path):
            check_read_only(trial)
        check_writable_again(trial)


def check_read_only(trial: Trial) -> None:
    files = trial.files()
    trial.put(MORE)
    assert trial.storage() == "failed"
    trial.take()
    assert trial.files() == files, "nothing can be removed"
    trial.put(50)
    assert trial.take() == 50


def check_writable_again(trial: Trial) -> None:
    eventually(lambda: trial.files() == [], "drained segments are removed")
    trial.return_to_disk()
    trial.finish()


@each_durability
def test_a_file_system_that_breaks_costs_nothing_that_was_synced(settings: dict[str, object], memory: Path) -> None:
    image, mount_point = memory / "image", memory / "disk"
    make_image(image, DISK_BYTES)
    with ext4_image(mount_point, image, "noatime,errors=remount-ro") as disk:
        trial = Trial(mount_point / "spool", **settings)
        trial.put()
        assert trial.sync()
        disk.break_file_system()
        trial.put(RING_HOLDS - 50)
        trial.take(MANY // 2)  # from the disk, as before
        assert not trial.sync()
        assert trial.storage() == "failed"
        assert trial.close() == RING_HOLDS - 50
        with pytest.raises(SpoolError) as caught:
            trial.reopen()
        assert caught.value.errno == errno.EROFS
    with ext4_image(mount_point, image):
        trial.reopen()
        trial.return_to_disk()
        trial.finish()
        assert len(trial.taken) == trial.count


# ---- a device that has run out ----


def put_until_sync_fails(trial: Trial) -> int:
    """Returns how many numbers are said to be durable."""
    for _ in range(50):
        synced = trial.count
        trial.put(100)
        if not trial.sync():
            return synced
    raise AssertionError("every sync was said to have worked")


@each_durability
def test_what_is_called_synced_is_on_a_device_that_ran_out(settings: dict[str, object], memory: Path) -> None:
    cuts: list[tuple[Path, int]] = []  # what a power cut would leave, and how much was said to survive it

    def cut_power(image: Path, synced: int) -> None:
        cuts.append((memory / f"image {len(cuts)}", synced))
        subprocess.run(["cp", "--sparse=always", image, cuts[-1][0]], check=True)

    with tmpfs(memory / "small", 16 * MIB) as small:
        image = small.path / "image"
        make_image(image, 48 * MIB)
        with ext4_image(memory / "disk", image) as disk:
            disk.write_by_pages()
            with Trial(disk.path / "spool", ring_bytes=4 * SMALL["ring_bytes"], **settings) as trial:
                trial.put()
                assert trial.sync()
                with small.full():
                    synced = put_until_sync_fails(trial)
                    cut_power(image, synced)
                    # The kernel has reported the lost pages once, and calls them clean from here on.
                    assert not trial.sync()
                    assert trial.stats()["synced"] <= trial.stats()["spilled"]
                trial.return_to_disk()
                # What memory still holds is written anew; what is only in the file that failed never counts as synced.
                assert trial.sync() == (settings["durability"] == "power")
                cut_power(image, trial.count if settings["durability"] == "power" else synced)
        with ext4_image(memory / "disk", image):
            count, lost = trial.count, set(range(trial.count)) - set(numbers_in(disk.path / "spool"))
    assert not lost or settings["durability"] == "process"
    assert lost <= set(range(synced, count))
    for image, synced in cuts:
        with ext4_image(memory / "disk", image):
            assert set(numbers_in(memory / "disk" / "spool")) >= set(range(synced))
