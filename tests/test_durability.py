"""What survives what, and the calls that make it so: sync, `wait="synced"`, `flush_now`, the free-space reserve."""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from cloudpubsub import Client, Spool, SpoolError
from tests.publishing import LIMIT, client_to, until

NOBODY = 1  # a port on which nothing listens
KIB = 1024
SMALL: dict[str, Any] = {"ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB}

CHILD = """
import os, sys
from cloudpubsub import Spool
spool = Spool(sys.argv[1], durability=sys.argv[2], ring_bytes=65536, segment_bytes=65536, spill_after=1000)
for number in range(int(sys.argv[3])):
    spool.append("numbers", b"%d" % number)
print("ready", flush=True)
sys.stdin.read()
"""


def offline(spool: Path | None, **settings: Any) -> Client:
    return client_to(NOBODY, spool, **{**SMALL, "spill_after": 1000.0, **settings})


def segments(spool: Path) -> list[str]:
    return sorted(os.listdir(spool / "log"))


def numbers_in(path: Path, **settings: Any) -> list[int]:
    with Spool(path, **{**SMALL, **settings}) as spool:
        found: list[int] = []
        while messages := spool.read():
            found += [int(message.payload) for message in messages]
        return found


def leave_killed(path: Path, durability: str, count: int) -> None:
    """A process appends numbers to a spool and is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), durability, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)
        child.wait(LIMIT)


# ---- on request


@pytest.mark.parametrize("durability", ["memory", "process", "power"])
def test_flush_now_brings_the_ring_to_the_disk_and_says_how_long_it_took(tmp_path: Path, durability: str) -> None:
    with offline(tmp_path, durability=durability, sync_interval=1000.0) as client:
        client.publish("numbers", b"0")
        assert segments(tmp_path) == []
        took = client.flush_now(LIMIT)
        assert len(segments(tmp_path)) == 1
        assert 0 < took < LIMIT


def test_flush_now_of_nothing_does_nothing(tmp_path: Path) -> None:
    with offline(tmp_path) as client:
        assert client.flush_now() >= 0
        assert segments(tmp_path) == []


def test_flush_now_needs_a_spool() -> None:
    with offline(None) as client, pytest.raises(ValueError, match="spool"):
        client.publish("numbers", b"0")
        client.flush_now()


def test_a_publish_that_waits_returns_when_its_message_is_on_the_disk(tmp_path: Path) -> None:
    with offline(tmp_path, durability="power", sync_interval=1000.0) as client:
        for number in range(3):
            position = client.publish("numbers", b"%d" % number, wait="synced")
            assert client._log.stats()["synced"] > position
        copy = tmp_path.with_name("copy")
        shutil.copytree(tmp_path, copy)  # what the disk holds at this moment
    assert numbers_in(copy, ring_dir=tmp_path) == [0, 1, 2]


def test_what_to_wait_for_is_checked(tmp_path: Path) -> None:
    with offline(tmp_path) as client:
        with pytest.raises(ValueError, match="wait: 'acked' is not allowed"):
            client.publish("numbers", b"0", wait="acked")  # type: ignore[arg-type]
        assert client.stats().published == 0


def test_a_refused_message_cannot_be_waited_for(tmp_path: Path) -> None:
    sizes = {"max_spool_bytes": 256 * KIB, "max_spool_messages": 1, "on_full": "drop_newest"}
    with offline(tmp_path, **sizes) as client, pytest.raises((SpoolError, cloudpubsub.DeliveryFailed)):
        for _ in range(10_000):
            client.publish("numbers", bytes(KIB), wait="synced")


# ---- group commits


def test_a_group_commit_comes_with_the_interval(tmp_path: Path) -> None:
    with offline(tmp_path, durability="power", sync_interval=0.05) as client:
        position = client.publish("numbers", b"0")
        until(lambda: client._log.stats()["synced"] > position)


def test_enough_bytes_bring_the_group_commit_forward(tmp_path: Path) -> None:
    with offline(tmp_path, durability="power", sync_interval=1000.0, sync_bytes=2 * KIB) as client:
        first = client.publish("numbers", bytes(KIB))
        assert segments(tmp_path) == []
        client.publish("numbers", bytes(KIB))
        until(lambda: client._log.stats()["synced"] > first)


@pytest.mark.parametrize("durability", ["memory", "process"])
def test_without_power_nothing_is_written_while_the_ring_has_room(tmp_path: Path, durability: str) -> None:
    with offline(tmp_path, durability=durability, sync_interval=0.001, sync_bytes=1) as client:
        for _ in range(10):
            client.publish("numbers", bytes(KIB))
        assert client._log.stats()["syncs"] == 0
        assert segments(tmp_path) == []


# ---- a killed process


@pytest.mark.parametrize("durability", ["process", "power"])
def test_the_ring_of_a_killed_process_is_found_again(tmp_path: Path, durability: str) -> None:
    leave_killed(tmp_path / "spool", durability, 100)
    assert numbers_in(tmp_path / "spool") == list(range(100))


def test_in_memory_only_the_ring_is_lost_and_that_is_said(tmp_path: Path) -> None:
    leave_killed(tmp_path / "spool", "memory", 5000)
    with Spool(tmp_path / "spool", **SMALL) as spool:
        uncertain = spool.stats()["uncertain"]
        found = [int(message.payload) for message in spool.read(1 << 30)]
    assert found == list(range(len(found))) and 0 < len(found) < 5000
    assert isinstance(uncertain, tuple) and uncertain[0] == 0 and uncertain[1] > 0


def test_a_clean_end_leaves_no_doubt(tmp_path: Path) -> None:
    for _ in range(2):
        with offline(tmp_path) as client:
            client.publish("numbers", b"0")
            assert client.stats().uncertain is None


@pytest.mark.parametrize("between", ["process", "memory"])
def test_a_stale_ring_is_not_raised_from_the_dead(tmp_path: Path, between: str) -> None:
    path, rings = tmp_path / "spool", Path("/dev/shm") / f"cloudpubsub-test-{os.getpid()}"
    rings.mkdir()
    try:
        with Spool(path, ring_dir=rings, **SMALL) as spool:
            spool.append("numbers", b"0")
            (ring,) = rings.iterdir()
            stale = ring.read_bytes()
            spool.ack(spool.read()[0].position)
        with Spool(path, ring_dir=rings, durability=between, **SMALL):
            pass
        ring.write_bytes(stale)
        ring.chmod(0o600)
        assert numbers_in(path, ring_dir=rings) == []
    finally:
        shutil.rmtree(rings)


def test_without_a_tmpfs_the_ring_is_memory_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as disk:  # where /tmp may be a tmpfs, that is not
        with Spool(tmp_path / "spool", ring_dir=disk, **SMALL) as spool:
            spool.append("numbers", b"0")
        assert os.listdir(disk) == []
    assert "is not a usable tmpfs" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["spool"]
    assert numbers_in(tmp_path / "spool") == [0]


def test_the_ring_of_a_killed_process_may_have_another_size(tmp_path: Path) -> None:
    leave_killed(tmp_path / "spool", "process", 100)
    with Spool(tmp_path / "spool", ring_bytes=1024 * KIB, segment_bytes=1024 * KIB) as spool:
        spool.append("numbers", b"100".ljust(100 * KIB))  # too large for the old one
        found = [int(message.payload) for message in spool.read(1 << 30)]
    assert (spool.recovery.ring_records, spool.recovery.records) == (100, 100)
    assert found[:100] == list(range(100))


@pytest.fixture
def rings() -> Iterator[Path]:
    """A directory for rings, on tmpfs, gone after the test."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_without_the_directory_for_rings_a_client_works_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Spool(tmp_path / "spool", ring_dir=tmp_path / "no" / "dev" / "shm", **SMALL) as spool:
        for number in range(3000):
            spool.append("numbers", b"%d" % number)
    assert "is not a usable tmpfs" in caplog.text
    assert numbers_in(tmp_path / "spool") == list(range(3000))


def test_the_first_of_several_runtime_directories_holds_the_ring(
    tmp_path: Path, rings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{rings}:{tmp_path}")
    with Spool(tmp_path / "spool", **SMALL):
        assert len(list(rings.iterdir())) == 1


def test_a_ring_that_is_removed_while_it_is_in_use_costs_a_running_process_nothing(tmp_path: Path, rings: Path) -> None:
    """As logind does to a user who logs out."""
    with Spool(tmp_path / "spool", ring_dir=rings, **SMALL) as spool:
        for number in range(3000):
            spool.append("numbers", b"%d" % number)
            if number == 1000:
                (ring,) = rings.iterdir()
                ring.unlink()
        assert spool.stats()["backlog_messages"] == 3000
    assert list(rings.iterdir()) == []
    assert numbers_in(tmp_path / "spool", ring_dir=rings) == list(range(3000))


def test_a_ring_that_is_removed_before_a_kill_costs_what_was_in_it_and_that_is_said(
    tmp_path: Path, rings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(rings))
    leave_killed(tmp_path / "spool", "process", 5000)
    (ring,) = rings.iterdir()
    ring.unlink()
    with Spool(tmp_path / "spool", **SMALL) as spool:
        uncertain = spool.stats()["uncertain"]
        found = [int(message.payload) for message in spool.read(1 << 30)]
        assert found == list(range(len(found))) and 0 < len(found) < 5000
        assert isinstance(uncertain, tuple) and uncertain[1] > uncertain[0]
        position = spool.append("numbers", b"5000")
        assert position >= uncertain[0], "a position was issued twice"


@pytest.mark.parametrize("what", ["emptied", "cut", "filled with zeros", "filled with noise", "of another", "a link"])
def test_a_ring_that_cannot_be_believed_is_not(what: str, tmp_path: Path, rings: Path, monkeypatch: Any) -> None:
    """What is on the disk comes, nothing is invented, and the process does not crash."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(rings))
    leave_killed(tmp_path / "spool", "process", 5000)
    (ring,) = rings.iterdir()
    size = ring.stat().st_size
    if what == "emptied":
        os.truncate(ring, 0)
    elif what == "cut":
        os.truncate(ring, size // 2)
    elif what == "filled with zeros":
        ring.write_bytes(bytes(size))
    elif what == "filled with noise":
        ring.write_bytes(random.Random(1).randbytes(size))
    elif what == "a link":
        ring.symlink_to(ring.rename(rings / "elsewhere"))
    else:
        leave_killed(tmp_path / "other", "process", 10)
        (other,) = (it for it in rings.iterdir() if it != ring)
        ring.write_bytes(other.read_bytes())
    found = numbers_in(tmp_path / "spool")
    assert found == list(range(len(found))) and 0 < len(found) < 5000


def test_nobody_else_can_look_whatever_the_umask(tmp_path: Path, rings: Path) -> None:
    before = os.umask(0)
    try:
        with Spool(tmp_path / "spool", ring_dir=rings, **SMALL) as spool:
            for number in range(3000):
                spool.append("numbers", b"%d" % number)
            spool.sync(LIMIT)
            made = [tmp_path / "spool", *(tmp_path / "spool").rglob("*"), *rings.iterdir()]
    finally:
        os.umask(before)
    modes = (
        {stat.S_IMODE(it.stat().st_mode) for it in made if it.is_file()},
        {stat.S_IMODE(it.stat().st_mode) for it in made if it.is_dir()},
    )
    assert modes == ({0o600}, {0o700})


def test_syncs_come_no_more_often_than_they_are_asked_for(tmp_path: Path) -> None:
    with Spool(
        tmp_path / "spool", **{**SMALL, "ring_bytes": 1024 * KIB}, durability="power", sync_interval=0.1
    ) as spool:
        began_s = time.monotonic()
        number = 0
        while time.monotonic() - began_s < 1 or int(spool.stats()["syncs"]) < 3:
            spool.append("numbers", b"%d" % number)
            number += 1
            time.sleep(0.001)
        syncs = spool.stats()["syncs"]
        most = (time.monotonic() - began_s) / 0.1
    assert isinstance(syncs, int) and 3 <= syncs <= 2 * most + 10, "each group has one, and its file its own"


def test_a_backlog_costs_the_disk_little_more_than_its_bytes(tmp_path: Path) -> None:
    """Counted as what the process wrote, by all calls."""
    with Spool(tmp_path / "spool", ring_bytes=64 * KIB, segment_bytes=1024 * KIB) as spool:
        before = written_by_us()
        for _ in range(20_000):
            spool.append("numbers", bytes(200))
        spool.sync(LIMIT)
        stats = spool.stats()
        wrote = written_by_us() - before
    bytes_of_records = stats["published_bytes"]
    assert isinstance(bytes_of_records, int)
    assert bytes_of_records <= wrote <= 1.05 * bytes_of_records


def written_by_us() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


# ---- the reserve


def test_the_reserve_is_left_to_others(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    reserve = {"min_free_bytes": free * 2, "on_full": "raise", "spill_timeout": 0.1}
    with Spool(tmp_path / "spool", **SMALL, **reserve) as spool:
        with pytest.raises(cloudpubsub.SpoolFull):
            for _ in range(1000):
                spool.append("numbers", bytes(KIB))
        assert spool.stats()["storage"] == "full"
        assert segments(tmp_path / "spool") == []
        spool.ack(spool.read(1 << 20)[-1].position)  # what the ring holds is served all the same
        spool.append("numbers", bytes(KIB))
