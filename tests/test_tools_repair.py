"""`repair`: exactly the valid records are left, nothing is deleted, and a crash in the middle costs nothing."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import Spool
from cloudpubsub.inspect.check import check_spool
from cloudpubsub.inspect.repair import repair
from cloudpubsub.inspect.spool import SpoolDirectory
from tests.making import Child
from tests.reader import read_segment, read_spool
from tests.spools import (
    ACKED,
    COUNT,
    DAMAGES,
    SMALL,
    Damage,
    append,
    contents,
    copy,
    flip,
    make,
    published,
    read_all,
    tree,
    values,
)
from tests.test_tools import KILLED, Run, original, path, run

__all__ = ["original", "path", "run"]  # fixtures

BLOCK = 1 << 40
BY_NAME = {damage.name: damage for damage in DAMAGES}
SOME = [
    "payload",
    "zeros in the middle",
    "damaged duplicates",
    "overlap",
    "both slots of meta",
    "file of another spool",
]


def log_contents(path: Path) -> set[bytes]:
    return {file.read_bytes() for file in (path / "log").iterdir() if file.is_file() and not file.is_symlink()}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_exactly_the_valid_records_are_left(damage: Damage, path: Path, run: Run) -> None:
    damage.do(path)
    before, files = read_spool(path), log_contents(path)
    said = run("repair", path, "--json")
    assert (said.code, said.err) == (0, "")
    assert len(said.document["made"]) <= 3, "no more files than there are holes"
    assert run("verify", path).code == 0
    after = read_spool(path)
    assert values(after.messages) == values(before.messages)
    assert all(segment.footer is not None and not segment.damage for segment in after.segments if segment.places)
    assert files <= contents(path), "something was deleted"
    with Spool(path, **SMALL) as spool:
        assert published(read_all(spool)) == values(before.pending)
        assert append(spool, 0) >= max(segment.end for segment in before.segments)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_what_was_lost_is_told_and_stays_in_the_account(damage: Damage, path: Path, run: Run) -> None:
    damage.do(path)
    read = read_spool(path)
    said = run("repair", path, "--json").document
    assert said["kept_messages"] == len(read.messages)
    if "meta" in damage.kinds:
        return
    lost = COUNT - ACKED - len(read.pending)
    assert said["lost_messages"] == lost
    document = run("inspect", path, "--json").document
    assert sum(total["messages"] for total in document["losses"]["by_reason"]) == lost
    with Spool(path, **SMALL) as spool:
        stats = spool.stats()
        assert (stats["published"], stats["acked"], stats["dropped"]) == (COUNT, ACKED, lost)
        assert stats["backlog_messages"] == len(read_all(spool)) == len(read.pending)


@pytest.mark.parametrize(
    "name", ["payload", "zeros in the middle", "damaged duplicates", "garbage", "both slots of meta"]
)
def test_a_dry_run_tells_what_would_be_done(name: str, path: Path, run: Run) -> None:
    BY_NAME[name].do(path)
    before = tree(path)
    planned = run("repair", path, "--json", "--dry-run").document
    assert tree(path) == before
    done = run("repair", path, "--json").document
    assert (planned.pop("dry_run"), done.pop("dry_run")) == (True, False)
    assert planned == done


@pytest.mark.parametrize("name", SOME)
def test_there_is_nothing_to_repair_the_second_time(name: str, path: Path, run: Run) -> None:
    BY_NAME[name].do(path)
    assert run("repair", path).code == 0
    before = tree(path)
    said = run("repair", path)
    assert said.code == 0 and "nothing to repair" in said.out
    assert tree(path) == before


def test_a_whole_spool_is_left_as_it_is(path: Path, run: Run) -> None:
    before = tree(path)
    assert "nothing to repair" in run("repair", path).out
    assert tree(path) == before


def test_a_spool_in_use_is_refused(path: Path, run: Run) -> None:
    with Spool(path, **SMALL):
        before = tree(path)
        for flags in ([], ["--dry-run"]):
            said = run("repair", path, *flags)
            assert said.code == 1 and "a process owns the spool" in said.err
        assert tree(path) == before


def test_a_damaged_range_is_cut_out_and_kept(path: Path, run: Run) -> None:
    BY_NAME["zeros in the middle"].do(path)
    (segment,) = (it for it in read_spool(path).segments if it.damage)
    ((first, end),) = segment.damage
    data = segment.path.read_bytes()
    assert run("repair", path).code == 0
    kept = path / "quarantine" / "repair" / f"{first:016x}-{end:016x}.bytes"
    assert kept.read_bytes() == data[128 + first - segment.base : 128 + end - segment.base]
    assert (path / "quarantine" / "repair" / segment.path.name).read_bytes() == data
    assert end in [it.base for it in read_spool(path).segments], "a hole starts another file"


def test_a_file_in_quarantine_is_never_overwritten(path: Path, run: Run) -> None:
    for text in ("first", "second", "third"):
        (path / "log" / "123.seg").write_text(text)
        assert run("repair", path).code == 0
    kept = sorted((path / "quarantine" / "repair").iterdir())
    assert [(file.name, file.read_text()) for file in kept] == [
        ("123.seg", "first"),
        ("123.seg.1", "second"),
        ("123.seg.2", "third"),
    ]


@pytest.mark.parametrize("name", ["both slots of meta", "no meta", "empty meta"])
def test_a_lost_meta_file_is_made_anew_from_the_segments(name: str, path: Path, run: Run) -> None:
    before = read_spool(path)
    assert before.meta is not None
    BY_NAME[name].do(path)
    assert run("repair", path).code == 0
    after = read_spool(path).meta
    assert after is not None
    assert (after.spool_id, after.epoch) == (before.meta.spool_id, before.meta.epoch)
    end = max(segment.end for segment in before.segments)
    assert after.next_position % BLOCK == 0 and after.next_position >= end + BLOCK
    assert after.head == before.segments[0].base


def test_with_nothing_but_records_a_spool_is_made_anew(path: Path, run: Run) -> None:
    (path / "meta").unlink()
    before = read_spool(path)
    for segment in before.segments:
        flip(segment.path, 20)
        flip(segment.path, segment.path.stat().st_size - 1)
    assert run("repair", path).code == 0
    after = read_spool(path)
    assert values(after.messages) == values(before.messages)
    assert {segment.spool_id for segment in after.segments} == {after.meta and after.meta.spool_id}


@pytest.mark.parametrize("has_ring", [True, False], ids=["here", "elsewhere"])
def test_the_spool_of_a_killed_process_is_repaired(
    has_ring: bool, tmp_path: Path, ring_directory: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spool"
    with Child(KILLED, path, 2_000) as child:
        assert child.line() == "ready"
    flip(*_payload_of(path, number=300))
    on_disk = read_spool(path).pending
    if not has_ring:
        monkeypatch.setenv("RUNTIME_DIRECTORY", tempfile.mkdtemp(dir=ring_directory))
    assert run("repair", path, "--json").document["lost_messages"] == 1
    assert run("verify", path).code == 0
    with Spool(path, **SMALL) as spool:
        found = read_all(spool)
        assert published(found)[: len(on_disk)] == values(on_disk)
        assert len(found) == (1_999 if has_ring else len(on_disk))
        spool.ack(found[-1].position or 0)
        stats = spool.stats()
        assert (stats["acked"], stats["dropped"], stats["backlog_messages"]) == (len(found), 1, 0)
        assert stats["published"] == len(found) + 1


def _payload_of(path: Path, number: int) -> tuple[Path, int]:
    """The file that holds the message of this number, and the offset of its payload."""
    for segment in read_spool(path).segments:
        for place in segment.places:
            if place.message is not None and place.message.payload == b"%d" % number:
                return segment.path, place.offset + 32 + len(place.message.topic)
    raise AssertionError("it is not on the disk")


class Killed(BaseException):
    pass


class Killer:
    """From the `at`-th change of the disk on, nothing is changed any more."""

    CHANGES = ("write", "rename", "unlink", "mkdir", "fsync", "open")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.left = at
        for name in self.CHANGES:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            if call.__name__ == "open" and not args[1] & os.O_CREAT:
                return call(*args, **more)
            self.left -= 1
            if self.left < 0:
                raise Killed
            return call(*args, **more)

        return wrapped


@pytest.mark.parametrize("name", SOME)
def test_a_repair_that_was_killed_is_done_by_the_next(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BY_NAME[name].do(path)
    expected, files = values(read_spool(path).messages), log_contents(path)
    is_over, at = False, 0
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        while not is_over:
            damaged = copy(path, Path(directory) / "spool")
            with monkeypatch.context() as patch:
                Killer(patch, at)
                try:
                    repair(SpoolDirectory(damaged))
                    is_over = True
                except Killed:
                    pass
            assert values(read_spool(damaged).messages) == expected, at
            repair(SpoolDirectory(damaged))
            assert check_spool(SpoolDirectory(damaged)).is_clean, at
            assert values(read_spool(damaged).messages) == expected, at
            assert files <= contents(damaged), at
            shutil.rmtree(damaged)
            at += 1
    assert at > 5


def test_a_full_disk_ends_a_repair_and_costs_nothing(path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    BY_NAME["payload"].do(path)
    before = {name: facts for name, facts in tree(path / "log").items() if name != "."}

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        said = run("repair", path)
    assert said.code == 1 and "No space left on device" in said.err
    assert {name: facts for name, facts in tree(path / "log").items() if name != "."} == before
    assert run("repair", path).code == 0


# ---- every byte


@pytest.fixture
def tiny() -> Iterator[Path]:
    """A closed spool of one short segment; not on a disk, because it is repaired hundreds of times."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory) / "spool"
        make(path, 6, 1)
        yield path


def _check_all(damaged: Path, is_damaged: bool, expected: list[tuple[object, ...]]) -> None:
    """`damaged` is found to be so, repaired, and then holds what was expected."""
    assert check_spool(SpoolDirectory(damaged)).is_clean is not is_damaged
    repair(SpoolDirectory(damaged))
    assert check_spool(SpoolDirectory(damaged)).is_clean
    assert values(read_spool(damaged).messages) == expected
    shutil.rmtree(damaged)


def test_every_byte_of_a_segment_flipped(tiny: Path) -> None:
    whole = read_spool(tiny)
    size = whole.segments[0].path.stat().st_size
    for offset in range(size):
        damaged = copy(tiny, tiny.with_name("damaged"))
        file = damaged / "log" / whole.segments[0].path.name
        flip(file, offset, 1 << offset % 8)
        segment = read_segment(file)
        assert segment is not None
        is_damaged = bool(segment.damage) or segment.spool_id is None or segment.footer is None
        assert len(segment.messages) >= len(whole.messages) - 1
        _check_all(damaged, is_damaged, values(segment.messages))


def test_every_byte_of_the_meta_file_flipped(tiny: Path) -> None:
    expected = values(read_spool(tiny).messages)
    for offset in range(0, 8192, 37):
        damaged = copy(tiny, tiny.with_name("damaged"))
        flip(damaged / "meta", offset)
        _check_all(damaged, True, expected)


def test_a_segment_cut_anywhere(tiny: Path) -> None:
    name = read_spool(tiny).segments[0].path.name
    for size in range((tiny / "log" / name).stat().st_size):
        damaged = copy(tiny, tiny.with_name("damaged"))
        os.truncate(damaged / "log" / name, size)
        _check_all(damaged, True, values(read_spool(damaged).messages))
