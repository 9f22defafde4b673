"""Machines whose pages are larger than ours: ARM has 16 and 64 KiB too.

The simulated disk refuses to map anything but whole pages.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cloudpubsub.inspect.ring import Ring

from .disk import Disk, Log

KIB = 1024
PAGES = [size for size in (4 * KIB, 16 * KIB, 64 * KIB) if size >= mmap.PAGESIZE]
RINGS = [4 * KIB, 64 * KIB, 256 * KIB]
COUNT = 8


def payloads(log: Log) -> list[bytes]:
    return [record.payload for record in log.drain()]


@pytest.mark.parametrize("ring_bytes", RINGS)
@pytest.mark.parametrize("page_bytes", PAGES)
def test_a_ring_is_found_again_after_a_kill(
    page_bytes: int, ring_bytes: int, disk: Disk, open_log: Callable[..., Log]
) -> None:
    disk.pages(page_bytes)
    log = open_log(ring_bytes=ring_bytes)
    for number in range(COUNT):
        log.append(b"%d" % number)
    (name,) = disk.names("/shm/")
    assert len(disk.content(name)) == max(8 * KIB, page_bytes) + max(ring_bytes, page_bytes)
    log.kill()
    log = open_log(ring_bytes=ring_bytes)
    assert log.opened.ring_adopted
    assert log.stats().ring_bytes == ring_bytes
    assert payloads(log) == [b"%d" % number for number in range(COUNT)]


@pytest.mark.parametrize("page_bytes", PAGES)
def test_a_log_works_on_the_disk_and_without_one(page_bytes: int, disk: Disk, open_log: Callable[..., Log]) -> None:
    disk.pages(page_bytes)
    expected = [b"%d" % number * 50 for number in range(200)]  # several rings, several segments
    log = open_log(ring_directory=None)
    for payload in expected:
        assert log.append(payload) >= 0
    assert log.close() == 0
    assert payloads(open_log(ring_directory=None)) == expected
    memory = open_log(directory=None, ring_directory=None)
    assert memory.append(b"only here") >= 0
    assert payloads(memory) == [b"only here"]


@pytest.mark.parametrize("ring_bytes", RINGS)
@pytest.mark.parametrize("page_bytes", PAGES)
def test_the_tools_find_the_ring_behind_pages_of_that_size(
    page_bytes: int, ring_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(real=True)
    disk.pages(page_bytes)
    (tmp_path / "spool").mkdir()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        log = Log(disk, str(tmp_path / "spool"), memory, ring_bytes=ring_bytes)
        try:
            log.ok(log.status)
            for number in range(COUNT):
                log.append(b"%d" % number)
            spool_id = bytes(log.opened.spool_id)
            (path,) = Path(memory).iterdir()
            generation = int.from_bytes(path.read_bytes()[56:64], "little")
            monkeypatch.setattr(mmap, "PAGESIZE", page_bytes)
            ring = Ring(str(path), spool_id, generation)
            assert ring.ring_bytes == ring_bytes
            assert ring.state().produced.messages == COUNT
            ring.close()
        finally:
            log.close()
    disk.close()
