"""`inspect`, `verify` and `dump`: what they say of every kind of spool, and that they leave no trace."""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

import cloudpubsub
from cloudpubsub import Message, Spool
from cloudpubsub.__main__ import main
from cloudpubsub._dead_letters import DeadLetters
from cloudpubsub.inspect.owner import owner_pid
from tests.making import ROOT, Child
from tests.reader import crc32c, read_spool
from tests.spools import (
    ACKED,
    COUNT,
    DAMAGES,
    SMALL,
    Damage,
    append,
    copy,
    flip,
    make,
    published,
    read_all,
    tree,
    values,
)

COMMANDS = ["inspect", "verify", "dump"]
BY_NAME = {damage.name: damage for damage in DAMAGES}
#: Fills the ring, and the disk where its limits say so, then waits to be killed.
KILLED = """
import sys
from cloudpubsub import Spool
spool = Spool(sys.argv[1], ring_bytes=65536, segment_bytes=65536, spill_after=1000.0)
for number in range(int(sys.argv[2])):
    spool.append("a/%d" % number, b"%d" % number)
print("ready", flush=True)
sys.stdin.read()
"""
#: Publishes and drains for ever, with a limit that is reached again and again.
BUSY = """
import sys
from cloudpubsub import Spool
spool = Spool(sys.argv[1], ring_bytes=65536, segment_bytes=65536, max_spool_bytes=400_000, durability=sys.argv[2])
number = 0
print("ready", flush=True)
while True:
    for _ in range(100):
        spool.append("a", b"%010d" % number + bytes(200))
        number += 1
    for _ in range(number % 3):
        batch = spool.read(20_000)
        if batch:
            spool.ack(batch[-1].position)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "spool"
    make(path)
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A closed spool with a backlog on the disk."""
    return copy(original, tmp_path / "spool")


class Said:
    """What a command answered."""

    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.out)
        return document

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(command: str, *flags: object) -> Said:
        try:
            code: object = main([command, *map(str, flags)])
        except SystemExit as exc:
            code = exc.code
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


def shape(lines: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    """JSON lines of `dump`, like `published` of the same messages."""

    def raw(line: dict[str, Any], name: str) -> bytes:
        encoded = line.get(f"{name}_base64")
        return line[name].encode() if encoded is None else base64.b64decode(encoded)

    return [(it["position"], it["topic"], raw(it, "payload"), raw(it, "userdata"), it["retain"]) for it in lines]


# ---- a spool at rest


def test_the_oracle_reads_what_the_library_reads(path: Path) -> None:
    expected = values(read_spool(path).pending)
    assert len(expected) == COUNT - ACKED
    with Spool(path, **SMALL) as spool:
        assert published(read_all(spool)) == expected


def test_dump_prints_what_the_library_would_read(path: Path, run: Run) -> None:
    said = run("dump", path, "--json")
    assert (said.code, said.err) == (0, "")
    assert shape(said.lines) == values(read_spool(path).pending)


def test_dump_of_all_begins_with_what_was_acknowledged(path: Path, run: Run) -> None:
    everything = read_spool(path).messages
    said = run("dump", path, "--json", "--all")
    assert shape(said.lines) == values(everything)
    assert [line["epoch"] for line in said.lines] == [message.epoch for message in everything]
    assert [line["stamp_ms"] for line in said.lines] == [message.stamp_ms for message in everything]


def test_dump_can_start_anywhere_and_end_early(path: Path, run: Run) -> None:
    pending = read_spool(path).pending
    middle = pending[100].position
    assert shape(run("dump", path, "--json", "--from", middle, "--limit", 7).lines) == values(pending[100:107])
    assert shape(run("dump", path, "--json", "--from", middle - 1, "--limit", 1).lines) == values(pending[100:101])
    assert run("dump", path, "--json", "--limit", 0).out == ""
    assert run("dump", path, "--json", "--from", pending[-1].position + 1).out == ""
    assert run("dump", path, "--json", "--from", 0, "--limit", 1).lines[0]["position"] == pending[0].position


def test_dump_tells_when_a_message_was_published(path: Path, run: Run) -> None:
    made_ms = run("inspect", path, "--json").document["segments"][0]["made_ms"]
    first = run("dump", path, "--json", "--all").lines[0]
    assert abs(first["time_ms"] - made_ms) < 60_000


def test_a_dumped_message_is_one_line_whatever_is_in_it(tmp_path: Path, run: Run) -> None:
    with Spool(tmp_path / "spool", **SMALL) as spool:
        spool.append("t/\u00fc", "gr\u00fc\u00dfe\n\t\x1b[31m\\")
        spool.append("t", b"\xff\x00", userdata=b"\x01u", retain=True)
    lines = run("dump", tmp_path / "spool").out.splitlines()
    assert [line.split("\t")[2:] for line in lines] == [
        ["t/\u00fc", "gr\u00fc\u00dfe\\n\\t\\x1b[31m\\\\"],
        ["t", "\\xff\\x00", "retain", "userdata=\\x01u"],
    ]


def test_verify_finds_nothing_wrong_with_a_closed_spool(path: Path, run: Run) -> None:
    document = run("verify", path, "--json").document
    assert (document["ok"], document["damage"], document["notes"]) == (True, [], [])
    assert document["messages"] == len(read_spool(path).messages)
    said = run("verify", path)
    assert said.code == 0 and said.out.startswith("clean: ")


def test_inspect_tells_what_the_statistics_told(path: Path, run: Run) -> None:
    document = run("inspect", path, "--json").document
    read = read_spool(path)
    assert read.meta is not None
    assert document["spool_id"] == read.meta.spool_id.hex()
    assert document["in_use"] is False and document["ring"] is None
    assert (document["meta"]["clean"], document["meta"]["epoch"]) == (True, 1)
    assert document["meta"]["next_position"] == read.meta.next_position
    counters = document["counters"]
    assert (counters["from"], counters["published"], counters["acked"]) == ("meta", COUNT, ACKED)
    assert (counters["backlog_messages"], counters["dropped"]) == (COUNT - ACKED, 0)
    assert counters["head"] == read.pending[0].position
    found = [(it["base"], it["end"], it["messages"], it["sealed"]) for it in document["segments"]]
    assert found == [(it.base, it.end, len(it.messages), True) for it in read.segments]


def test_inspect_for_people_names_everything(path: Path, run: Run) -> None:
    said = run("inspect", path)
    assert said.code == 0
    for text in ("spool id", "not in use", "clean", "head", "backlog", "sealed", "losses", str(path)):
        assert text in said.out


def test_inspect_shows_dead_letters_and_quarantine(path: Path, run: Run) -> None:
    letters = DeadLetters(path)
    letters.add(Message("t", b"x"), "handler failed")
    letters.add(Message("t", b"y"), "handler failed")
    with open(path / "dead-letters.jsonl", "ab") as file:
        file.write(b'{"half')
    (path / "quarantine").mkdir(exist_ok=True)
    (path / "quarantine" / f"{16:016x}-{64:016x}.bytes").write_bytes(bytes(48))
    document = run("inspect", path, "--json").document
    assert document["dead_letters"]["messages"] == 2 and document["dead_letters"]["unreadable_lines"] == 1
    assert document["dead_letters"]["reasons"] == {"handler failed": 2}
    assert document["quarantine"] == [{"name": f"{16:016x}-{64:016x}.bytes", "bytes": 48, "first": 16, "end": 64}]
    assert "handler failed" in run("inspect", path).out


def test_inspect_shows_what_was_dropped_and_why(tmp_path: Path, run: Run) -> None:
    with Spool(tmp_path / "spool", max_spool_bytes=300_000, **SMALL) as spool:
        for number in range(3_000):
            append(spool, number)
        assert spool.stats()["dropped"]
        for _ in range(2):
            document, stats = run("inspect", tmp_path / "spool", "--json").document, spool.stats()
            (total,) = document["losses"]["by_reason"]
            assert (total["messages"], total["bytes"]) == (stats["dropped"], stats["dropped_bytes"])
            assert document["counters"]["dropped"] == stats["dropped"]
            assert sum(entry["messages"] for entry in document["losses"]["entries"]) == stats["dropped"]
            assert {entry["reason"] for entry in document["losses"]["entries"]} == {total["reason"]}
            spool.sync()
    document = run("inspect", tmp_path / "spool", "--json").document
    assert document["counters"]["from"] == "meta" and document["losses"]["by_reason"][0]["messages"] == stats["dropped"]
    assert "spool limit reached" in run("inspect", tmp_path / "spool").out
    assert run("verify", tmp_path / "spool").code == 0


def test_inspect_shows_where_counting_is_uncertain(tmp_path: Path, run: Run) -> None:
    with Child(KILLED.replace("spill_after", "durability='memory', spill_after"), tmp_path / "spool", 50) as child:
        assert child.line() == "ready"
    Spool(tmp_path / "spool", **SMALL).close()
    assert run("inspect", tmp_path / "spool", "--json").document["losses"]["uncertain"]
    assert "may be counted wrongly" in run("inspect", tmp_path / "spool").out


def test_a_record_larger_than_a_chunk_is_read(tmp_path: Path, run: Run) -> None:
    payload = bytes(range(256)) * 12_000
    sizes = {"ring_bytes": 16 << 20, "segment_bytes": 16 << 20, "max_payload_bytes": 4_000_000}
    with Spool(tmp_path / "spool", **sizes) as spool:
        spool.append("small", b"x")
        spool.append("large", payload)
        spool.append("small", b"y")
        assert shape(run("dump", tmp_path / "spool", "--json").lines)[1][2] == payload
    assert shape(run("dump", tmp_path / "spool", "--json").lines)[1][2] == payload
    assert run("verify", tmp_path / "spool").code == 0
    (file,) = (tmp_path / "spool" / "log").iterdir()
    flip(file, 3_000_000)
    assert [line["payload"] for line in run("dump", tmp_path / "spool", "--json").lines] == ["x", "y"]
    (finding,) = run("verify", tmp_path / "spool", "--json").document["damage"]
    assert finding["messages"] == 1 and finding["bytes"] > len(payload)


def test_a_large_spool_is_looked_at_with_little_memory(tmp_path: Path, run: Run) -> None:
    with Spool(tmp_path / "spool", segment_bytes=16 << 20) as spool:
        for _ in range(520):
            spool.append("t", b"x" * 60_000)
    flip(max((tmp_path / "spool" / "log").iterdir()), 200_000)
    for command in ("verify", "inspect", "dump"):
        tracemalloc.start()
        try:
            run(command, tmp_path / "spool", *(["--from", 30_000_000] if command == "dump" else []))
            assert tracemalloc.get_traced_memory()[1] < 12 << 20, command
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("is_arranged_otherwise", [False, True])
def test_a_spool_of_a_newer_version_is_left_alone(is_arranged_otherwise: bool, path: Path, run: Run) -> None:
    data = bytearray((path / "meta").read_bytes())
    for at in (0, 4096):
        data[at + 8] = 2
        if is_arranged_otherwise:  # to what no number of ours can be
            data[at + 40 : at + 512] = b"\xff" * (512 - 40)
        data[at + 4092 : at + 4096] = crc32c(bytes(data[at : at + 4092])).to_bytes(4, "little")
    (path / "meta").write_bytes(data)
    before = tree(path)
    for command in (*COMMANDS, "repair"):
        said = run(command, path)
        assert said.code == 1 and "version 2 is not known" in said.err
    with pytest.raises(cloudpubsub.SpoolError):
        cloudpubsub.Spool(path)
    assert tree(path) == before


def test_dump_ends_quietly_when_nobody_reads(path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "cloudpubsub", "dump", path]
    done = subprocess.run(command, check=False, stdout=writer, stderr=PIPE, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_empty_spool_is_clean_and_empty(tmp_path: Path, run: Run) -> None:
    Spool(tmp_path / "spool").close()
    document = run("inspect", tmp_path / "spool", "--json").document
    assert document["segments"] == [] and document["counters"]["published"] == 0
    assert run("verify", tmp_path / "spool").code == 0
    assert run("dump", tmp_path / "spool").out == ""


@pytest.mark.parametrize("names", [["lock"], ["lock", "log/"], ["lock", "log/", "meta"]])
def test_a_spool_whose_first_open_was_killed_is_clean(names: list[str], tmp_path: Path, run: Run) -> None:
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    assert run("verify", tmp_path).code == 0
    assert (run("dump", tmp_path).code, run("inspect", tmp_path, "--json").document["segments"]) == (0, [])


@pytest.mark.parametrize("command", [*COMMANDS, "repair"])
def test_what_is_no_spool_is_refused(command: str, path: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    for name, why in (("nowhere", "no such directory"), ("empty", "not a spool"), ("file", "not a directory")):
        said = run(command, tmp_path / name, "--json")
        assert (said.code, said.out) == (1, "") and why in said.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "flags",
    [
        *([command] for command in (*COMMANDS, "repair")),
        ["dump", ".", "--limit", "-1"],
        ["dump", ".", "--from", "x"],
        ["verify", ".", "."],
        ["repair", ".", "--ring-dir", "x"],
    ],
)
def test_wrong_usage_ends_with_2(flags: list[str], run: Run) -> None:
    said = run(*flags)
    assert (said.code, said.out) == (2, "") and said.err


# ---- damage


@pytest.fixture(params=DAMAGES, ids=lambda damage: damage.name)
def damaged(request: pytest.FixtureRequest, path: Path) -> Path:
    damage: Damage = request.param
    damage.do(path)
    return path


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_verify_finds_it_and_says_what_it_is(damage: Damage, path: Path, run: Run) -> None:
    before = len(read_spool(path).messages)
    damage.do(path)
    document = run("verify", path, "--json").document
    assert document["ok"] is False
    assert {finding["kind"] for finding in document["damage"]} == damage.kinds
    if "meta" not in damage.kinds and "overlap" not in damage.kinds:
        # After a clean close it is known how many there should be.
        assert sum(finding["messages"] for finding in document["damage"]) == before - len(read_spool(path).messages)
    said = run("verify", path)
    assert said.code == 1 and "damaged in" in said.out.splitlines()[-1]


def test_verify_says_where_damage_is(path: Path, run: Run) -> None:
    BY_NAME["length"].do(path)
    (finding,) = run("verify", path, "--json").document["damage"]
    (segment,) = (it for it in read_spool(path).segments if it.damage)
    ((first, end),) = segment.damage
    assert (finding["file"], finding["first"], finding["end"]) == (f"log/{segment.path.name}", first, end)
    assert (finding["offset"], finding["bytes"]) == (128 + first - segment.base, end - first)
    assert f"positions {first} to {end}" in run("verify", path).out


def test_dump_gives_everything_that_is_still_valid(damaged: Path, run: Run) -> None:
    read = read_spool(damaged)
    assert shape(run("dump", damaged, "--json").lines) == values(read.pending)
    assert shape(run("dump", damaged, "--json", "--all").lines) == values(read.messages)


def test_dump_fails_when_messages_that_should_be_there_are_damaged(path: Path, run: Run) -> None:
    BY_NAME["payload"].do(path)
    said = run("dump", path)
    assert said.code == 1 and "are damaged" in said.err


def test_blocks_that_the_disk_does_not_give_back_cost_no_more(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = read_spool(path).segments[1]
    pread = os.pread

    def broken(fd: int, size: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == str(segment.path) and offset < 12_288 and offset + size > 8_192:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, size, offset)

    expected = [it for it in values(read_spool(path).pending)]
    gone = {it.position for it in segment.places if it.offset < 12_288 and it.offset + it.span > 8_192}
    monkeypatch.setattr(os, "pread", broken)
    assert shape(run("dump", path, "--json").lines) == [it for it in expected if it[0] not in gone]
    kinds = {finding["kind"] for finding in run("verify", path, "--json").document["damage"]}
    assert kinds == {"records", "unreadable"}
    assert run("repair", path, "--json").document["lost_messages"] == len(gone)
    assert run("verify", path).code == 0


def test_looking_opens_nothing_for_writing(path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    system_open = os.open

    def watched(name: str, flags: int, *args: Any, **more: Any) -> int:
        assert not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), name
        opened.append(name)
        return system_open(name, flags, *args, **more)

    monkeypatch.setattr(os, "open", watched)
    for command in COMMANDS:
        assert run(command, path).code == 0
    assert str(path / "meta") in opened


def test_looking_changes_nothing(damaged: Path, run: Run) -> None:
    before = tree(damaged)
    for command in (["inspect"], ["verify"], ["dump"], ["dump", "--all"], ["repair", "--dry-run"]):
        for flags in ([], ["--json"]):
            run(command[0], damaged, *command[1:], *flags)
    assert tree(damaged) == before


# ---- what kills leave


@pytest.mark.parametrize("count", [50, 2_000], ids=["ring", "disk and ring"])
def test_the_spool_of_a_killed_process_is_clean_and_whole(count: int, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "spool"
    with Child(KILLED, path, count) as child:
        assert child.line() == "ready"
    before = tree(path)
    verified = run("verify", path, "--json").document
    assert verified["ok"] and verified["messages"] + verified["ring_messages"] >= count
    assert [line["payload"] for line in run("dump", path, "--json").lines] == [str(number) for number in range(count)]
    document = run("inspect", path, "--json").document
    assert document["in_use"] is False and document["ring"] is not None
    assert document["counters"]["from"] == "ring" and document["counters"]["backlog_messages"] == count
    assert tree(path) == before
    with Spool(path, **SMALL) as spool:
        assert len(read_all(spool)) == count


def test_a_torn_tail_is_no_damage(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "spool"
    with Child(KILLED, path, 2_000) as child:
        assert child.line() == "ready"
    last = read_spool(path).segments[-1]
    assert last.footer is None
    with open(last.path, "r+b") as file:
        file.seek(128 + last.end - last.base)
        file.write(b"half a record")
    document = run("verify", path, "--json").document
    assert document["ok"]
    assert any(last.path.name in note and "13 bytes of a torn write" in note for note in document["notes"])


def test_a_second_try_after_a_kill_is_no_damage(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "spool"
    with Child(KILLED, path, 2_000) as child:
        assert child.line() == "ready"
    last = read_spool(path).segments[-1]
    assert last.footer is None
    place = last.places[len(last.places) // 2]
    header = bytearray(last.path.read_bytes()[:124])
    header[48:64] = struct.pack("<IIQ", last.epoch + 1, 0, place.position)
    again = last.path.with_name(f"{place.position:016x}-{last.epoch + 1:08x}-00000000.seg")
    records = last.path.read_bytes()[place.offset : 128 + last.end - last.base]
    again.write_bytes(header + struct.pack("<I", crc32c(bytes(header))) + records)
    document = run("verify", path, "--json").document
    assert {finding["kind"] for finding in document["damage"]} <= {"meta"}  # which knows of no such epoch
    assert any(again.name in note and "anew" in note for note in document["notes"])
    assert len(run("dump", path).out.splitlines()) == 2_000


def test_a_ring_elsewhere_is_found_when_it_is_named(
    tmp_path: Path, ring_directory: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spool"
    with Child(KILLED, path, 50) as child:
        assert child.line() == "ready"
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    assert run("dump", path).out == ""
    document = run("inspect", path, "--json").document
    assert document["ring"] is None and document["ring_missing"]
    assert len(run("dump", path, "--ring-dir", ring_directory).out.splitlines()) == 50


def test_the_ring_of_another_boot_or_run_is_not_believed(tmp_path: Path, ring_directory: str, run: Run) -> None:
    path = tmp_path / "spool"
    with Child(KILLED, path, 50) as child:
        assert child.line() == "ready"
    (ring,) = Path(ring_directory).iterdir()
    for offset, why in ((17, "earlier boot"), (33, "not of the last"), (57, "not of the last"), (8, "another version")):
        data = bytearray(ring.read_bytes())
        data[offset] ^= 1
        changed = tmp_path / f"ring{offset}"
        changed.mkdir()
        (changed / ring.name).write_bytes(data)
        assert why in run("inspect", path, "--json", "--ring-dir", changed).document["ring_missing"]
        assert run("dump", path, "--ring-dir", changed).out == ""


# ---- a spool in use


def test_inspect_tells_who_owns_a_spool_and_how_it_stands(tmp_path: Path, run: Run) -> None:
    with Spool(tmp_path / "spool", **SMALL) as spool:
        for number in range(COUNT):
            append(spool, number)
        spool.ack(spool.read(2_000)[-1].position or 0)
        document, stats = run("inspect", tmp_path / "spool", "--json").document, spool.stats()
        assert document["in_use"] is True
        assert document["owner_pid"] in (os.getpid(), None)  # not every file system's locks can be told apart
        assert document["counters"]["from"] == "ring" and document["ring"]["writer_pid"] == os.getpid()
        for name in ("published", "published_bytes", "acked", "acked_bytes", "backlog_messages", "backlog_bytes"):
            assert document["counters"][name] == stats[name]
        assert "in use" in run("inspect", tmp_path / "spool").out
    assert run("inspect", tmp_path / "spool", "--json").document["in_use"] is False


def test_an_owner_that_the_kernel_does_not_list_is_seen(path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudpubsub.inspect.owner.owner_pid", lambda directory: None)
    assert run("inspect", path, "--json").document["in_use"] is False
    with Spool(path, **SMALL):
        assert run("inspect", path, "--json").document["in_use"] is True


def test_looking_at_a_free_spool_does_not_keep_its_lock(path: Path, run: Run) -> None:
    for command in COMMANDS:
        run(command, path)
        Spool(path).close()


def test_dump_of_a_spool_in_use_reads_disk_and_ring_as_one(tmp_path: Path, run: Run) -> None:
    with Spool(tmp_path / "spool", **SMALL) as spool:
        for number in range(1_000):
            append(spool, number)
        said = run("dump", tmp_path / "spool", "--json")
        assert spool.stats()["spool_segments"]
        assert (said.code, shape(said.lines)) == (0, published(read_all(spool)))


def test_a_ring_that_only_its_owner_knows_is_found(
    tmp_path: Path, ring_directory: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Spool(tmp_path / "spool", ring_dir=ring_directory, **SMALL) as spool:
        spool.append("t", b"x")
        if owner_pid(str(tmp_path / "spool")) is None:
            pytest.skip("the kernel does not tell who holds a lock on this file system")
        monkeypatch.setenv("RUNTIME_DIRECTORY", "")
        assert len(run("dump", tmp_path / "spool").out.splitlines()) == 1


@pytest.mark.parametrize("durability", ["memory", "process", "power"])
def test_a_busy_owner_is_not_in_the_way(durability: str, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "spool"
    with Child(BUSY, path, durability) as child:
        assert child.line() == "ready"
        for _ in range(8):
            said = run("verify", path, "--json")
            assert (said.code, said.document["damage"]) == (0, [])
            document = run("inspect", path, "--json").document
            assert document["in_use"] is True and document["counters"]["backlog_messages"] >= 0
            said = run("dump", path, "--json", "--all")
            assert said.code == 0, said.err
            positions = [line["position"] for line in said.lines]
            assert positions == sorted(set(positions))
            numbers = [int(re.match(r"\d+", line["payload"])[0]) for line in said.lines]  # type: ignore[index]
            assert numbers == sorted(set(numbers))
        assert child.process.poll() is None


def test_a_copy_of_a_spool_in_use_can_be_looked_at(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with Spool(tmp_path / "spool", **SMALL) as spool:
        for number in range(1_000):
            append(spool, number)
        there = copy(tmp_path / "spool", tmp_path / "copy")
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    assert run("verify", there, "--json").document["ok"]
    assert shape(run("dump", there, "--json").lines) == values(read_spool(there).pending)
    document = run("inspect", there, "--json").document
    assert (document["in_use"], document["ring"], document["counters"]["from"]) == (False, None, "meta")
