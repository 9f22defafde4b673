"""How long does opening a spool take, over its size?

A process appends a backlog and closes, or is killed with SIGKILL; then fresh processes open the spool, with its files
in the page cache and, where this may be arranged (as root), without.  What opening read and how much memory it took
comes with it.
Ten million records of 1 KiB take 11 GB of disk, so `python -m bench` opens smaller ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cloudpubsub

from . import _harness
from ._harness import TOPIC, Meter, Report, Sample, Samples, check

_MODULE = _harness.module_name("recovery")
_SIZES = (64, 1_024)
_QUOTA_BYTES = 1 << 40
_SEGMENT_BYTES = 8 << 20
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")

_WRITER = """
import sys
from itertools import repeat
from cloudpubsub import Spool
path, topic, count, size, quota, segment_bytes, synced = *sys.argv[1:3], *map(int, sys.argv[3:])
spool = Spool(path, max_spool_bytes=quota, segment_bytes=segment_bytes, spill_timeout=600)
append, payload = spool.append, bytes(size)
for _ in repeat(None, count):
    append(topic, payload)
if synced:
    spool.sync(600)
print("appended", flush=True)
sys.stdin.readline()
spool.close(600)
"""


def opened(order: dict[str, Any]) -> tuple[cloudpubsub.Spool, Sample]:
    settings = {"max_spool_bytes": _QUOTA_BYTES, "segment_bytes": order.get("segment_bytes", _SEGMENT_BYTES)}
    with Meter() as meter:
        spool = cloudpubsub.Spool(order["path"], spill_after=3600, **settings)
    found = spool.recovery
    check(found.records == order["messages"], f"{found.records} of {order['messages']} records found")
    check(found.damaged_ranges == 0, f"{found.damaged_ranges} damaged ranges")
    return spool, meter.sample(
        order["messages"], opening_s=meter.seconds, mib_read=found.bytes_read / 2**20, segments=found.segments
    )


def opening(order: dict[str, Any]) -> Sample:
    _spool, sample = opened(order)
    # Without a goodbye, so that the next one finds the same: a killed process's spool stays one.
    print(json.dumps(asdict(sample)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def write(
    path: Path, messages: int, size: int, *, killed: bool, segment_bytes: int = _SEGMENT_BYTES, synced: bool = False
) -> None:
    """Make a backlog of so many messages, in another process.  `synced`: it waits for the disk before it ends."""
    numbers = (messages, size, _QUOTA_BYTES, segment_bytes, int(synced))
    command = [sys.executable, "-c", _WRITER, str(path), TOPIC, *map(str, numbers)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        check(writer.stdout.readline() == b"appended\n", "the writer failed")
        if killed:
            writer.kill()
        writer.stdin.close()
        writer.wait()


@contextlib.contextmanager
def ring_directory() -> Iterator[None]:
    """What killed processes leave in tmpfs goes, too."""
    if not os.access("/dev/shm", os.W_OK):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="cloudpubsub-bench-", dir="/dev/shm") as directory:
        before = os.environ.get("RUNTIME_DIRECTORY")
        os.environ["RUNTIME_DIRECTORY"] = directory
        try:
            yield
        finally:
            del os.environ["RUNTIME_DIRECTORY"]
            if before is not None:
                os.environ["RUNTIME_DIRECTORY"] = before


def _forget_pages() -> bool:
    try:
        os.sync()
        _DROP_CACHES.write_text("3\n")
    except OSError:
        return False
    return True


def _open_in_child(path: Path, messages: int) -> Sample:
    order = {"subject": "open", "path": str(path), "messages": messages}
    child = subprocess.run(
        [sys.executable, "-m", _MODULE, "--one", json.dumps(order)],
        capture_output=True,
        text=True,
        check=False,
        cwd=_harness.child_directory(_MODULE),
    )
    check(child.returncode == -signal.SIGKILL, child.stderr)
    return Sample(**json.loads(child.stdout))


def run(arguments: argparse.Namespace) -> Report:
    messages = arguments.messages or (20_000 if arguments.quick else 10_000_000)
    samples = Samples()
    for size in _SIZES:
        for ending in ("closed", "killed"):
            with ring_directory(), tempfile.TemporaryDirectory(
                prefix="cloudpubsub-bench-", dir=arguments.directory
            ) as directory:
                path = Path(directory) / "spool"
                _harness.note_to_stderr(f"{messages:,} records of {size} B, {ending}")
                write(path, messages, size, killed=ending == "killed")
                for cache in ("warm", "cold"):
                    if cache == "cold" and not _forget_pages():
                        _harness.note_to_stderr("the page cache cannot be emptied: as root only")
                        continue
                    sample = _open_in_child(path, messages)
                    samples.setdefault(f"{size} B, {ending}, {cache}", []).append(sample)
                    if ending == "closed":
                        # Killed by now; a clean end again, for the next one.
                        with cloudpubsub.Spool(path, max_spool_bytes=_QUOTA_BYTES, segment_bytes=_SEGMENT_BYTES):
                            pass
    return {
        "bench": "recovery",
        "parameters": {"messages": messages},
        "missing": {},
        "subjects": _harness.summary(samples),
        "ratios": {},
    }


def show(report: Report) -> str:
    rows = [
        [
            name,
            f"{one['opening_s']['median']:.3f}",
            f"{one['mib_read']['median']:,.1f}",
            f"{one['segments']['median']:,.0f}",
            _harness.mib(one["rss_growth_bytes"]),
        ]
        for name, one in report["subjects"].items()
    ]
    messages = report["parameters"]["messages"]
    head = [f"{messages:,} records", "seconds to open", "MiB read", "segments", "memory grew by"]
    return _harness.table(head, rows)


def parser() -> argparse.ArgumentParser:
    made = _harness.parser(_MODULE, __doc__)
    made.add_argument("--messages", type=int, help="records (default: 10 million)")
    return made


def main() -> None:
    _harness.main(parser().parse_args(), {"open": opening}, run, show)


if __name__ == "__main__":
    main()
