"""While the link keeps up, nothing is written to the disk: counted by the kernel, on a block device of its own.

The device is a file behind a loop device, with ext4 on it, which root alone can make.  Elsewhere these tests are
skipped; a CI that runs as root may not skip them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudpubsub import Client
from tests.brokers import Broker
from tests.making import eventually
from tests.publishing import LIMIT, client_to, publish_numbers

COUNT, AT_ONCE = 200_000, 500
DEVICE_BYTES = 64 << 20
SYSTEM_PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"  # not on every user's PATH
TOOLS = ("losetup", "mkfs.ext4", "mount", "umount")
SECTORS_WRITTEN = 6  # column of a block device's `stat`; a sector there is 512 bytes


class Flash:
    """A mounted file system on a device that nothing else uses."""

    def __init__(self, mount_point: Path) -> None:
        self.path = mount_point
        device = os.stat(mount_point).st_dev
        self._sys = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")

    def sectors_written(self) -> int:
        """By the device so far, with all that the kernel still had in memory."""
        run("sync", "-f", self.path)
        return int((self._sys / "stat").read_text().split()[SECTORS_WRITTEN])

    def files(self) -> dict[str, tuple[int, int, int]]:
        """What is there, with size, blocks and time of the last change."""
        found = {}
        for path in [self.path, *self.path.rglob("*")]:
            facts = path.stat()
            found[str(path.relative_to(self.path))] = (facts.st_size, facts.st_blocks, facts.st_mtime_ns)
        return found

    def is_attached(self) -> bool:
        return (self._sys / "loop" / "backing_file").exists()


def run(tool: str, *args: object) -> None:
    command, environment = [tool, *map(str, args)], {**os.environ, "PATH": SYSTEM_PATH}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=environment)
    if done.returncode != 0:
        raise OSError(f"{tool}: {done.stderr.strip() or done.returncode}")


def _cannot(why: str) -> None:
    """Skip, but in a CI that could."""
    may_skip = os.environ.get("CI", "").lower() in ("", "0", "false") or os.geteuid() != 0
    if may_skip or shutil.which("losetup", path=SYSTEM_PATH) is None:
        pytest.skip(f"no file system on a loop device: {why}")
    pytest.fail(f"no file system on a loop device, and in CI as root this may not be skipped: {why}")


@pytest.fixture
def flash(tmp_path: Path) -> Iterator[Flash]:
    if os.geteuid() != 0:
        _cannot("this is not root")
    missing = [tool for tool in TOOLS if shutil.which(tool, path=SYSTEM_PATH) is None]
    if missing:
        _cannot(f"{', '.join(missing)} not found")
    image, mount_point = tmp_path / "image", tmp_path / "flash"
    mount_point.mkdir()
    with image.open("wb") as file:
        file.truncate(DEVICE_BYTES)
    # Nothing is left for the kernel to do later, and reading writes nothing.
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
    try:
        run("mount", "-t", "ext4", "-o", "loop,noatime", image, mount_point)  # frees the device when it is unmounted
    except OSError as error:
        _cannot(str(error))
    made = Flash(mount_point)
    try:
        yield made
    finally:
        try:
            run("umount", mount_point)
        except OSError:
            run("umount", "-l", mount_point)  # somebody still holds a file; it goes when he does
            raise
        eventually(lambda: not made.is_attached(), "the loop device is free again")
        image.unlink()


def publish_paced(client: Client, first: int, end: int) -> None:
    """No faster than the broker acknowledges: at most 2 * `AT_ONCE` messages wait at any moment."""
    before = None
    for number in range(first, end, AT_ONCE):
        positions = publish_numbers(client, range(number, number + AT_ONCE))
        if before is not None:
            client.wait(before, LIMIT)
        before = positions[-1]
    assert client.flush(LIMIT) == 0


def test_nothing_is_written_while_the_link_keeps_up(broker: Broker, flash: Flash) -> None:
    with client_to(broker.port, flash.path / "spool") as client:
        publish_paced(client, 0, AT_ONCE)
        sectors, files = flash.sectors_written(), flash.files()
        publish_paced(client, AT_ONCE, COUNT + AT_ONCE)
        assert flash.sectors_written() - sectors == 0
        assert flash.files() == files
        assert not any((flash.path / "spool" / "log").iterdir())
        stats = client.stats()
        assert (stats.acked, stats.connects, stats.spilled_bytes) == (COUNT + AT_ONCE, 1, 0)


def test_the_same_count_shows_what_is_written_without_a_link(broker: Broker, flash: Flash) -> None:
    with client_to(broker.port, flash.path / "spool", spill_after=0.01) as client:
        publish_paced(client, 0, AT_ONCE)
        sectors, files = flash.sectors_written(), flash.files()
        broker.stop()
        publish_numbers(client, range(100))
        eventually(lambda: client.stats().spilled_bytes > 0)
        assert flash.sectors_written() - sectors > 0
        assert flash.files() != files
        assert any((flash.path / "spool" / "log").iterdir())


def test_the_count_is_zero_when_nobody_writes_and_not_for_one_byte(flash: Flash) -> None:
    sectors = flash.sectors_written()
    assert flash.sectors_written() == sectors
    (flash.path / "file").write_bytes(b"1")
    assert flash.sectors_written() > sectors
