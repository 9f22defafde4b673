"""What does a flash card get to write?

Bytes, write operations and cache flushes, as the kernel counts them for a block device: a file system of our own (ext4
with blocks of 4 KiB on a loop device, which takes root), or with --directory the device that a directory lies on, where
nobody else may write meanwhile.  What the kernel holds back is counted too: the file system is synced before and after.

Little here depends on how fast or how busy the machine is, so this one may run beside others.  It takes some minutes
and is not part of `python -m bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cloudpubsub

from . import _brokers, _harness
from ._harness import TOPIC, Report, check

_DEVICE_BYTES = 256 << 20
_PAYLOAD = bytes(200)
_SECTOR_BYTES = 512  # in `stat`, whatever the device's own are
_SYSTEM_PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
_TICK_S = 0.1
_OPERATION_KIB = 512  # what an eMMC usually takes at once
_LIMIT_S = 300.0


class Counts(NamedTuple):
    written_bytes: int
    writes: int
    flushes: int

    def since(self, before: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


def _sys_of(path: Path) -> Path:
    """What the kernel tells of the block device that `path` lies on."""
    device = os.stat(path).st_dev
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


class Device:
    """The block device that `path` lies on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stat = _sys_of(path) / "stat"
        check(self._stat.exists(), f"{path} does not lie on a block device")
        first, second = self._settled(), self._settled()
        self._own = second.since(first)  # what counting itself costs: a flush

    def _settled(self) -> Counts:
        _run("sync", "-f", self.path)
        words = [int(word) for word in self._stat.read_text().split()]
        return Counts(words[6] * _SECTOR_BYTES, words[4], words[15])

    def counts(self) -> Counts:
        return self._settled()

    def since(self, before: Counts) -> Counts:
        return self._settled().since(before).since(self._own)


def _run(tool: str, *args: object) -> None:
    environment = {**os.environ, "PATH": _SYSTEM_PATH}
    done = subprocess.run([tool, *map(str, args)], check=False, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{tool}: {done.stderr.strip() or done.returncode}")


@contextlib.contextmanager
def _as_large_as_a_card_takes(limit: Path) -> Iterator[None]:
    """A loop device may cut everything into pages, and the number of operations would mean nothing."""
    before = limit.read_text()
    limit.write_text(str(_OPERATION_KIB))
    try:
        yield
    finally:
        limit.write_text(before)


@contextlib.contextmanager
def _own_device() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="cloudpubsub-bench-flash-"))
    image, mount_point = directory / "image", directory / "flash"
    mount_point.mkdir()
    try:
        with image.open("wb") as file:
            file.truncate(_DEVICE_BYTES)
        # Nothing is left for the kernel to do later, and reading writes nothing.
        _run("mkfs.ext4", "-q", "-b", 4096, "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
        _run("mount", "-t", "ext4", "-o", "loop,noatime", image, mount_point)
        try:
            with _as_large_as_a_card_takes(_sys_of(mount_point) / "queue" / "max_sectors_kb"):
                yield mount_point
        finally:
            _run("umount", mount_point)
    finally:
        shutil.rmtree(directory)


# ---- what is measured


@dataclass(frozen=True)
class Place:
    """Where a subject works."""

    directory: Path
    broker: _brokers.Target
    quick: bool

    def client(self, *, with_link: bool, **settings: Any) -> cloudpubsub.Client:
        """Not started."""
        # Port 1 takes no connection.
        broker = f"mqtt://127.0.0.1:{self.broker.port if with_link else 1}"
        return cloudpubsub.Client(broker, client_id="bench", spool=self.directory / "spool", **settings)


class Done(NamedTuple):
    messages: int
    syncs: int | None = None  # group commits; None: does not apply


def _paced(client: cloudpubsub.Client, per_second: float, seconds: float) -> int:
    """Publish at that rate, so many messages in each tick."""
    began_s, sent = time.monotonic(), 0
    while (past_s := time.monotonic() - began_s) < seconds:
        while sent < min(per_second * past_s, per_second * seconds):
            client.publish(TOPIC, _PAYLOAD)
            sent += 1
        time.sleep(_TICK_S)
    return sent


def _with_link(per_second: float, seconds: float, **settings: Any) -> Callable[[Place, Device], tuple[Done, Counts]]:
    """Steady publishing, after the connection is there; opening and closing are not counted."""

    def measure(place: Place, device: Device) -> tuple[Done, Counts]:
        with place.client(with_link=True, **settings) as client:
            client.publish(TOPIC, _PAYLOAD)
            client.flush(_LIMIT_S)
            before, syncs = device.counts(), client._log.stats()["syncs"]
            sent = _paced(client, per_second, 0.5 if place.quick else seconds)
            client.flush(_LIMIT_S)
            found, syncs = device.since(before), client._log.stats()["syncs"] - syncs
            check(client.stats().connects == 1, "the link broke")
        return Done(sent, syncs), found

    return measure


def _outage(messages: int, drain: bool) -> Callable[[Place, Device], tuple[Done, Counts]]:
    """A backlog at full speed, which goes to the disk; and the same with sending it afterwards."""

    def measure(place: Place, device: Device) -> tuple[Done, Counts]:
        count = messages // 10 if place.quick else messages
        place.client(with_link=False).close()  # the spool is there
        before = device.counts()
        client = place.client(with_link=False)
        for _ in range(count):
            client.publish(TOPIC, _PAYLOAD)
        check(client.close(_LIMIT_S) == 0, "the backlog was not saved")
        if drain:
            with place.client(with_link=True) as client:
                client.flush(_LIMIT_S)
                check(client.stats().acked == count, "the backlog was not sent")
        return Done(count), device.since(before)

    return measure


def _trickle(per_second: float, seconds: float, **settings: Any) -> Callable[[Place, Device], tuple[Done, Counts]]:
    """Little comes while the link is down for long; what the kernel writes by itself meanwhile is counted."""

    def measure(place: Place, device: Device) -> tuple[Done, Counts]:
        with place.client(with_link=False, **settings) as client:
            client.publish(TOPIC, _PAYLOAD, wait="synced")  # the segment is there
            before, syncs = device.counts(), client._log.stats()["syncs"]
            sent = _paced(client, per_second, 0.5 if place.quick else seconds)
            found, syncs = device.since(before), client._log.stats()["syncs"] - syncs
            return Done(sent, syncs or None), found

    return measure


def _wait_synced(messages: int) -> Callable[[Place, Device], tuple[Done, Counts]]:
    def measure(place: Place, device: Device) -> tuple[Done, Counts]:
        count = messages // 10 if place.quick else messages
        with place.client(with_link=False) as client:
            client.publish(TOPIC, _PAYLOAD, wait="synced")
            before = device.counts()
            for _ in range(count):
                client.publish(TOPIC, _PAYLOAD, wait="synced")
            return Done(count, count), device.since(before)

    return measure


def _open_and_close(place: Place, device: Device) -> tuple[Done, Counts]:
    place.client(with_link=False).close()
    before = device.counts()
    place.client(with_link=False).close()
    return Done(0), device.since(before)


def _sqlite(messages: int) -> Callable[[Place, Device], tuple[Done, Counts]]:
    def measure(place: Place, device: Device) -> tuple[Done, Counts]:
        count = messages // 10 if place.quick else messages
        with contextlib.closing(sqlite3.connect(place.directory / "queue.db")) as database:
            database.execute("CREATE TABLE queue (id INTEGER PRIMARY KEY, topic TEXT, payload BLOB)")
            database.commit()
            before = device.counts()
            for _ in range(count):
                with database:
                    database.execute("INSERT INTO queue (topic, payload) VALUES (?, ?)", (TOPIC, _PAYLOAD))
            return Done(count, count), device.since(before)

    return measure


def _appended_file(messages: int) -> Callable[[Place, Device], tuple[Done, Counts]]:
    def measure(place: Place, device: Device) -> tuple[Done, Counts]:
        count = messages // 10 if place.quick else messages
        with (place.directory / "file").open("ab", buffering=0) as file:
            before = device.counts()
            for _ in range(count):
                file.write(TOPIC.encode() + _PAYLOAD)
                os.fsync(file.fileno())
            return Done(count, count), device.since(before)

    return measure


SUBJECTS: dict[str, Callable[[Place, Device], tuple[Done, Counts]]] = {
    "link up, memory, 100/s": _with_link(100, 10, durability="memory"),
    "link up, process, 100/s": _with_link(100, 10),
    "link up, process, 1,000/s": _with_link(1000, 10),
    "link up, power, sync_interval 1 s, 10/s": _with_link(10, 20, durability="power"),
    "link up, power, sync_interval 1 s, 1,000/s": _with_link(1000, 20, durability="power"),
    "no link, process, all at once": _outage(100_000, drain=False),
    "no link, process, all at once, then sent": _outage(100_000, drain=True),
    "no link, process, 10/s": _trickle(10, 60),
    "no link, power, sync_interval 10 s, 10/s": _trickle(10, 60, durability="power", sync_interval=10.0),
    "no link, power, sync_interval 1 s, 10/s": _trickle(10, 30, durability="power"),
    "no link, power, sync_interval 0.1 s, 10/s": _trickle(10, 30, durability="power", sync_interval=0.1),
    'wait="synced" for each message': _wait_synced(500),
    "opening and closing an empty spool": _open_and_close,
    "for comparison: SQLite, a commit for each message": _sqlite(500),
    "for comparison: a file, fsync for each message": _appended_file(500),
}


def run(arguments: argparse.Namespace) -> Report:
    logging.getLogger("cloudpubsub").setLevel(logging.CRITICAL)  # that there is no broker is what some are about
    found: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        if arguments.directory is None:
            if os.geteuid() != 0:
                raise SystemExit("only root can make a file system of its own; otherwise give --directory")
            root = stack.enter_context(_own_device())
        else:
            made = stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.directory, prefix="cloudpubsub-"))
            root = Path(made)
        broker = stack.enter_context(_brokers.running(_brokers.default()))
        device = Device(root)
        for name, measure in SUBJECTS.items():
            _harness.note_to_stderr(name)
            directory = root / "run"
            directory.mkdir()
            done, counts = measure(Place(directory, broker, arguments.quick), device)
            shutil.rmtree(directory)
            found[name] = {**done._asdict(), "payload_bytes": done.messages * len(_PAYLOAD), **counts._asdict()}
    own = arguments.directory is None
    parameters = {"topic_bytes": len(TOPIC), "payload_bytes": len(_PAYLOAD), "own_device": own}
    return {"bench": "flash", "parameters": parameters, "subjects": found}


def show(report: Report) -> str:
    rows = []
    for name, figures in report["subjects"].items():
        messages, size, syncs = figures["messages"], figures["written_bytes"], figures["syncs"]
        rows.append(
            [
                name,
                f"{messages:,}",
                f"{size:,}",
                f"{size / figures['payload_bytes']:.2f}" if messages else "",
                f"{figures['writes']:,}",
                f"{figures['flushes']:,}",
                f"{size / syncs:,.0f}" if syncs else "",
            ]
        )
    head = [
        "payload of 200 bytes",
        "messages",
        "bytes written",
        "per byte of payload",
        "write operations",
        "flushes",
        "bytes a commit",
    ]
    return _harness.table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_harness.module_name('flash')}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="shows that it runs; what is paced means little then")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    parser.add_argument("--directory", type=Path, help="measure the device of this directory, where nobody else writes")
    arguments = parser.parse_args()
    report = run(arguments)
    if arguments.json:
        print(json.dumps({"environment": _harness.environment(), **report}, indent=1))
    else:
        print(f"{show(report)}\n\n{_harness.environment_line(_harness.environment())}")


if __name__ == "__main__":
    main()
