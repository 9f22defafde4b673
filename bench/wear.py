"""How many bytes does the disk see?

On a file system of its own (ext4 on a loop device, as root; its statistics say what reached the device) a client
publishes over a healthy link, publishes without a link until everything is on the disk, and the same with
`durability="power"`.  Bytes are compared with those of topic, payload and the fixed header of MQTT.  Where no file
system can be made, what this process handed to writing calls is reported instead.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import cloudpubsub

from . import _brokers, _harness
from ._harness import TOPIC, Meter, Report, Sample, Subject, check
from ._peers import connected_client, payload_of

_MODULE = _harness.module_name("wear")
_FIXED_HEADER_BYTES = 4
_SECTOR_BYTES = 512
_IMAGE_BYTES = 768 << 20
_PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
_TOOLS = ("mkfs.ext4", "mount", "umount")


class NoFileSystem(Exception):
    """None of our own can be made; the text says why."""


def _run(tool: str, *arguments: object) -> None:
    command, environment = [tool, *map(str, arguments)], {**os.environ, "PATH": _PATH}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    if done.returncode != 0:
        raise NoFileSystem(f"{tool}: {done.stderr.strip() or done.returncode}")


@contextlib.contextmanager
def file_system() -> Iterator[Path]:
    """A mounted ext4 that nobody else uses, in memory where there is tmpfs.  Raises NoFileSystem."""
    if os.geteuid() != 0:
        raise NoFileSystem("not root")
    lacking = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    if lacking:
        raise NoFileSystem(f"{', '.join(lacking)} not installed")
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="cloudpubsub-bench-", dir=shm) as directory:
        image, path = Path(directory) / "image", Path(directory) / "mounted"
        path.mkdir()
        with image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        # Without the initialisation that the kernel else goes on with in the background.
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
        _run("mount", "-o", "loop,noatime", image, path)
        try:
            yield path
        finally:
            _run("umount", path)


def _written_bytes(order: dict[str, Any]) -> int:
    """To the device of that file system so far, or by this process."""
    if not order["device"]:
        found = re.search(r"^wchar: (\d+)$", Path("/proc/self/io").read_text(), re.M)
        return int(found[1]) if found else 0
    fd = os.open(order["directory"], os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    os.sync()
    number = os.stat(order["directory"]).st_dev
    fields = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat").read_text().split()
    return int(fields[6]) * _SECTOR_BYTES


def _sample(order: dict[str, Any], meter: Meter, before: int) -> Sample:
    n, after = order["messages"], _written_bytes(order)
    useful = n * (len(payload_of(order)) + len(TOPIC) + _FIXED_HEADER_BYTES)
    return meter.sample(n, written_bytes=after - before, written_per_message_byte=(after - before) / useful)


def healthy(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], payload_of(order)
    client = connected_client(order, order["directory"])
    client.publish(TOPIC, payload)
    check(client.flush(60) == 0, "a message was lost")
    before = _written_bytes(order)
    with Meter() as meter:
        for done in range(0, n, 1_000):
            for _ in repeat(None, min(1_000, n - done)):
                client.publish(TOPIC, payload)
            check(client.flush(60) == 0, "some were lost")
    sample = _sample(order, meter, before)
    client.close()
    return sample


def spilling(order: dict[str, Any]) -> Sample:
    logging.getLogger("cloudpubsub").setLevel(logging.ERROR)
    n, payload = order["messages"], payload_of(order)
    settings = {**order.get("settings", {}), "durability": order["durability"]}
    client = cloudpubsub.Client(
        "mqtt://127.0.0.1:1", client_id="bench", spool=order["directory"], spill_after=3600.0, **settings
    )
    before = _written_bytes(order)
    with Meter() as meter:
        for _ in repeat(None, n):
            client.publish(TOPIC, payload)
        client.flush_now(60.0)
    sample = _sample(order, meter, before)
    check(client.stats().backlog_messages == n, "not all is in the backlog")
    client.close(60.0)
    return sample


_KINDS: dict[str, Subject] = {"healthy link": healthy, "spilling": spilling}
SUBJECTS = _KINDS
_SIZES = (64, 1_024)


def run(arguments: argparse.Namespace) -> Report:
    sizes = [arguments.payload_bytes] if arguments.payload_bytes else list(_SIZES)
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(_brokers.running(_brokers.default()))
        given = getattr(arguments, "directory", None)
        why, within = "", given
        if given is None:
            try:
                within = stack.enter_context(file_system())
            except NoFileSystem as exc:
                why = str(exc)
        else:
            why = "a directory was given, whose device others may use"
        subjects = {}
        for size in sizes:
            n = 5_000 if arguments.quick else max(1_000, 100_000_000 // (size + 64))
            same = {
                **_harness.common_order(arguments),
                **broker.order,
                **({"within": str(within)} if within else {}),
                "device": not why,
                "payload_bytes": size,
            }
            subjects[f"healthy link, {size} B"] = {**same, "kind": "healthy link", "messages": min(n, 20_000)}
            for durability in ("process", "power"):
                subjects[f"spilling, {durability}, {size} B"] = {
                    **same, "kind": "spilling", "durability": durability, "messages": n,
                }
        samples = _harness.in_turns(_MODULE, subjects, _harness.rounds_of(arguments, 3), _harness.note_to_stderr)
    return {
        "bench": "wear",
        "parameters": {"measured": "at the device" if not why else f"as handed to the kernel ({why})"},
        "missing": samples.missing,
        "subjects": _harness.summary(samples),
        "ratios": {},
    }


def show(report: Report) -> str:
    rows = [
        [
            name,
            f"{one['messages']:,}",
            _harness.span(one["written_bytes"]),
            _harness.span(one["written_per_message_byte"], "{:.3f}"),
        ]
        for name, one in report["subjects"].items()
    ]
    where = report["parameters"]["measured"]
    head = [f"bytes written, {where}", "messages", "bytes", "for each byte of topic, payload and fixed header"]
    return _harness.table(head, rows)


def main() -> None:
    _harness.main(_harness.parser(_MODULE, __doc__).parse_args(), SUBJECTS, run, show)


if __name__ == "__main__":
    main()
