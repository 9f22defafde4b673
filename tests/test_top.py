"""`cloudpubsub top`: what it shows of a client that runs in another process, and that it leaves that one alone."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cloudpubsub
from cloudpubsub.__main__ import main
from cloudpubsub.inspect.watch import Watch
from tests.brokers import Broker, Rumqttd
from tests.making import ROOT, Child, eventually, url
from tests.spools import make, tree

NOBODY = "mqtt://127.0.0.1:1"
#: A client that does what it is told, line by line, and answers each line with its own statistics.
CLIENT = """
import dataclasses, json, sys
from cloudpubsub import Client
client = Client(
    sys.argv[1], client_id="gateway", spool=sys.argv[2], ring_bytes=65536, segment_bytes=65536, spill_after=1000.0,
    reconnect_min=0.02, reconnect_max=0.1, **json.loads(sys.argv[3]),
)
client.start()
for line in sys.stdin:
    what, _, number = line.strip().partition(" ")
    if what == "publish":
        for _ in range(int(number)):
            client.publish("a", bytes(100))
    elif what == "flush":
        client.flush(60)
    elif what == "close":
        client.close()
    elif what != "look":
        raise ValueError(what)
    print(json.dumps(dataclasses.asdict(client.stats())), flush=True)
"""
#: Publishes and drains for ever, with a limit that is reached again and again.
BUSY = """
import sys
from cloudpubsub import Spool
spool = Spool(sys.argv[1], ring_bytes=65536, segment_bytes=65536, max_spool_bytes=400_000)
print("ready", flush=True)
number = 0
while True:
    number += 1
    for _ in range(100):
        spool.append("a", bytes(200))
    for _ in range(number % 3):
        batch = spool.read(20_000)
        if batch:
            spool.ack(batch[-1].position)
"""


class Gateway(Child):
    def __init__(self, broker: str, spool: Path, **settings: Any) -> None:
        super().__init__(CLIENT, broker, spool, json.dumps(settings))

    def do(self, order: str) -> dict[str, Any]:
        """Its statistics after that."""
        self.tell(order)
        stats: dict[str, Any] = json.loads(self.line())
        return stats


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What `top --json --count 1` says."""

    def look(path: Path, *flags: str) -> dict[str, Any]:
        assert main(["top", str(path), "--json", "--count", "1", *flags]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return look


def text_of(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["top", str(path), "--count", "1"]) == 0
    return capsys.readouterr().out


def start(*flags: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cloudpubsub", "top", *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


COUNTED = ("published", "acked", "dropped", "dead_lettered")
SAME = (*COUNTED, "published_bytes", "acked_bytes", "backlog_messages", "backlog_bytes")


def test_with_a_link_it_shows_what_the_client_counts(
    rumqttd: Rumqttd, tmp_path: Path, look: Callable[..., dict[str, Any]], ring_directory: str
) -> None:
    with Gateway(url(rumqttd.port), tmp_path / "spool") as gateway:
        gateway.do("publish 300")
        stats = gateway.do("flush")
        seen = look(tmp_path / "spool")
        assert {name: seen["counters"][name] for name in SAME} == {name: stats[name] for name in SAME}
        assert (seen["in_use"], seen["owner_pid"], seen["from"]) == (True, gateway.pid, "ring")
        assert (seen["link"], seen["storage"], seen["storage_errno"]) == ("up", "ok", 0)
        assert (seen["identity"], seen["epoch"], seen["rates"]) == ("gateway", 1, None)
        assert seen["ring"]["path"].startswith(ring_directory) and seen["ring"]["bytes"] == 65536
        assert (seen["ring"]["used_bytes"], seen["segments"], seen["segment_bytes"]) == (0, 0, 0)
        assert seen["oldest_age_seconds"] is None  # there is none


def test_without_a_link_it_shows_the_backlog_in_ring_and_spool(
    rumqttd: Rumqttd, tmp_path: Path, look: Callable[..., dict[str, Any]]
) -> None:
    with Gateway(url(rumqttd.port), tmp_path / "spool") as gateway:
        gateway.do("publish 5")
        gateway.do("flush")
        rumqttd.kill()
        eventually(lambda: look(tmp_path / "spool")["link"] == "down", "the link is told to be down")
        stats = gateway.do("publish 100")
        seen = look(tmp_path / "spool")
        assert {name: seen["counters"][name] for name in SAME} == {name: stats[name] for name in SAME}
        assert seen["ring"]["used_bytes"] == stats["ring_used_bytes"] > 0
        assert seen["segments"] == 0
        eventually(lambda: look(tmp_path / "spool")["oldest_age_seconds"] > 0.01)
        gateway.do("publish 1000")  # more than the ring holds
        stats = gateway.do("look")
        seen = look(tmp_path / "spool")
        assert (seen["segments"], seen["segment_bytes"]) == (stats["spool_segments"], stats["spool_bytes"])
        assert seen["segments"] >= 1
        assert abs(gateway.do("look")["oldest_age_seconds"] - look(tmp_path / "spool")["oldest_age_seconds"]) < 20
        assert seen["oldest_age_seconds"] >= 0.01  # now read on the disk
        rumqttd.start()
        gateway.do("flush")
        assert look(tmp_path / "spool")["link"] == "up"


def test_rates_are_for_each_second_between_two_looks(tmp_path: Path) -> None:
    now_s = 100.0
    with Gateway(NOBODY, tmp_path) as gateway:
        gateway.do("publish 10")
        with Watch(tmp_path, clock=lambda: now_s) as watch:
            assert watch.look()["rates"] is None
            before = gateway.do("look")
            after = gateway.do("publish 50")
            now_s += 4
            seen = watch.look()
            assert seen["rates"]["published"] == 50 / 4
            assert seen["rates"]["published_bytes"] == (after["published_bytes"] - before["published_bytes"]) / 4
            assert (seen["rates"]["acked"], seen["drain_seconds"]) == (0, None)


def test_how_long_draining_takes_is_told(rumqttd: Rumqttd, tmp_path: Path) -> None:
    now_s = 0.0
    rumqttd.kill()
    with Gateway(url(rumqttd.port), tmp_path, max_publish_rate=20.0) as gateway:
        gateway.do("publish 300")
        with Watch(tmp_path, clock=lambda: now_s) as watch:
            watch.look()
            rumqttd.start()
            eventually(lambda: gateway.do("look")["acked"] >= 20)
            now_s += 10
            seen = watch.look()
        acked = seen["rates"]["acked"] * 10
        assert acked >= 20
        assert seen["drain_seconds"] == pytest.approx((300 - acked) / (acked / 10))


def test_without_a_ring_in_tmpfs_it_says_so_and_shows_what_the_files_say(
    tmp_path: Path, look: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    with Gateway(NOBODY, tmp_path, durability="memory") as gateway:
        gateway.do("publish 1000")
        seen = look(tmp_path)
        assert (seen["in_use"], seen["owner_pid"], seen["from"], seen["ring"]) == (True, gateway.pid, "meta", None)
        assert (seen["link"], seen["storage"]) == (None, None)
        assert seen["counters"] is not None and seen["segments"] == gateway.do("look")["spool_segments"] >= 1
        text = text_of(tmp_path, capsys)
        assert 'durability "memory"' in text and "as of the last save" in text
        assert f"in use by process {gateway.pid}, link not known" in text


def test_a_storage_that_refuses_is_shown(tmp_path: Path, look: Callable[..., dict[str, Any]]) -> None:
    with Gateway(NOBODY, tmp_path, max_spool_bytes=262_144, on_full="drop_newest") as gateway:
        stats = gateway.do("publish 4000")
        assert stats["storage"] == "full"
        seen = look(tmp_path)
        assert (seen["storage"], seen["link"]) == ("full", "down")
        assert seen["counters"]["dropped"] == stats["dropped"] > 0
        assert seen["lost_by_reason"][0]["messages"] == stats["dropped"]


def test_a_closed_spool_is_shown_as_not_in_use(
    tmp_path: Path, look: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "spool", count=50, acked=10)
    before = tree(tmp_path)
    seen = look(tmp_path / "spool")
    assert (seen["in_use"], seen["owner_pid"], seen["from"], seen["closed_clean"]) == (False, None, "meta", True)
    assert (seen["counters"]["backlog_messages"], seen["link"], seen["storage"]) == (40, None, None)
    assert seen["oldest_age_seconds"] >= 0
    text = text_of(tmp_path / "spool", capsys)
    assert "NOT IN USE\n" in text and "last save" not in text
    assert tree(tmp_path) == before


def test_what_a_killed_process_left_is_shown(
    tmp_path: Path, look: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    with Gateway(NOBODY, tmp_path) as gateway:
        stats = gateway.do("publish 100")
        gateway.kill()
        seen = look(tmp_path)
        assert (seen["in_use"], seen["from"], seen["closed_clean"]) == (False, "ring", False)
        assert (seen["link"], seen["storage"]) == (None, None)  # of then, not of now
        assert {name: seen["counters"][name] for name in SAME} == {name: stats[name] for name in SAME}
        assert "NOT IN USE: its last owner ended without closing it" in text_of(tmp_path, capsys)


def test_it_follows_the_spool_to_its_next_owner(tmp_path: Path) -> None:
    with Watch(tmp_path) as watch:
        with Gateway(NOBODY, tmp_path) as first:
            first.do("publish 10")
            assert watch.look()["owner_pid"] == first.pid
            first.kill()
            assert (watch.look()["in_use"], watch.look()["from"]) == (False, "ring")
        with Gateway(NOBODY, tmp_path) as second:
            second.do("publish 5")
            seen = watch.look()
            assert (seen["owner_pid"], seen["epoch"], seen["counters"]["published"]) == (second.pid, 2, 15)
            assert seen["rates"]["published"] > 0
            second.do("close")
            seen = watch.look()
            assert (seen["in_use"], seen["from"], seen["counters"]["backlog_messages"]) == (False, "meta", 15)


def test_no_lock_is_tried_while_the_kernel_names_the_owner_and_later_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    flock = fcntl.flock

    def note(fd: int, operation: int) -> None:
        tried.append(operation)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", note)
    with Gateway(NOBODY, tmp_path) as gateway:
        gateway.do("look")
        with Watch(tmp_path) as watch:
            for _ in range(3):
                assert watch.look()["in_use"]
            gateway.kill()
            for _ in range(3):
                assert watch.look()["in_use"] is False
        assert tried == []
    with Watch(tmp_path) as watch:
        for _ in range(3):
            assert watch.look()["in_use"] is False
    assert tried == [fcntl.LOCK_SH | fcntl.LOCK_NB, fcntl.LOCK_UN]


def test_every_look_at_a_busy_spool_is_consistent(tmp_path: Path) -> None:
    with Child(BUSY, tmp_path) as child, Watch(tmp_path) as watch:
        assert child.line() == "ready"
        last: dict[str, Any] | None = None
        for _ in range(300):
            seen = watch.look()
            now = seen["counters"]
            ended = now["acked"] + now["dropped"] + now["dead_lettered"]
            assert now["published"] == ended + now["backlog_messages"]
            assert now["head"] <= now["position"] and now["spilled"] <= now["position"]
            assert 0 <= seen["ring"]["used_bytes"] <= seen["ring"]["bytes"]
            assert (seen["in_use"], seen["owner_pid"]) == (True, child.pid)
            if last is not None:
                assert all(now[name] >= last[name] for name in ("published", "acked", "dropped", "head", "position"))
            last = now
        assert last is not None and last["dropped"] > 0


def test_a_directory_that_is_no_spool_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", str(tmp_path / "none")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "none: no such directory" in said.err
    assert main(["top", str(tmp_path)]) == 1
    assert "not a spool" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--interval", "0"), ("--interval", "nan"), ("--count", "0"), ("--count", "x")])
def test_wrong_usage(flags: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["top", str(tmp_path), *flags])
    assert raised.value.code == 2


def test_it_ends_by_itself_after_count_looks(tmp_path: Path) -> None:
    with Gateway(NOBODY, tmp_path) as gateway:
        gateway.do("publish 10")
        with start(tmp_path, "--json", "--interval", "0.05", "--count", "3") as top:
            out, err = top.communicate(timeout=60)
        assert (top.returncode, err) == (0, "")
        seen = [json.loads(line) for line in out.splitlines()]
        assert [each["counters"]["published"] for each in seen] == [10, 10, 10]
        assert [each["rates"] is None for each in seen] == [True, False, False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_0_when_it_is_told_to(number: signal.Signals, tmp_path: Path) -> None:
    make(tmp_path / "spool", count=5, acked=2)
    with start(tmp_path / "spool", "--json", "--interval", "3600") as top:
        assert top.stdout is not None
        assert json.loads(top.stdout.readline())["in_use"] is False
        top.send_signal(number)
        out, err = top.communicate(timeout=60)
    assert (top.returncode, out, err) == (0, "", "")


def test_it_ends_when_nobody_reads_any_more(tmp_path: Path) -> None:
    make(tmp_path / "spool", count=5, acked=2)
    with start(tmp_path / "spool", "--json", "--interval", "0.05") as top:
        assert top.stdout is not None and top.stderr is not None
        top.stdout.readline()
        top.stdout.close()
        assert top.wait(60) == 0
        assert top.stderr.read() == ""


def test_on_a_terminal_each_look_takes_the_place_of_the_last(tmp_path: Path) -> None:
    make(tmp_path / "spool", count=5, acked=2)
    ours, its = os.openpty()
    flags = ["--interval", "0.05", "--count", "2"]
    command = [sys.executable, "-m", "cloudpubsub", "top", str(tmp_path / "spool"), *flags]
    with subprocess.Popen(command, stdout=its, stderr=subprocess.PIPE, cwd=ROOT) as top:
        os.close(its)
        shown = b""
        try:
            while data := os.read(ours, 65536):
                shown += data
        except OSError:
            pass  # the other end is closed
        assert top.wait(60) == 0
    os.close(ours)
    assert shown.count(b"\x1b[H\x1b[J") == 2 and shown.count(b"NOT IN USE") == 2


def test_the_page_for_people(rumqttd: Broker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Gateway(url(rumqttd.port), tmp_path / "spool") as gateway:
        gateway.do("publish 1234")
        gateway.do("flush")
        lines = text_of(tmp_path / "spool", capsys).splitlines()
        assert lines[0].startswith(f"{tmp_path / 'spool'}  20")
        assert lines[1] == f"in use by process {gateway.pid}, link up, storage ok"
        fields = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
        assert fields["published"][:2] == ["1,234", "-"] and fields["acknowledged"][0] == "1,234"
        assert fields["backlog"] == ["0", "0"]
        assert fields["spool"] == ["0", "segments,", "0", "bytes"]
        assert "of 65,536 bytes (0 %)" in text_of(tmp_path / "spool", capsys)


def test_a_spool_alone_tells_of_no_link(tmp_path: Path, look: Callable[..., dict[str, Any]]) -> None:
    with cloudpubsub.Spool(tmp_path) as spool:
        spool.append("a", b"1")
        seen = look(tmp_path)
        assert (seen["in_use"], seen["link"], seen["storage"]) == (True, None, "ok")
        assert seen["counters"]["backlog_messages"] == 1
