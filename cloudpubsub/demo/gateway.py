"""The demo's gateway: a program as a user of the package would write it, in a process of its own that can be killed.

Run as a module, with its settings as JSON in the first argument: it publishes readings of this host until it
reads a line on stdin, then flushes and closes; when stdin ends it just closes.  It tells how it stands in JSON lines on
stdout, and never waits for their reader.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

from cloudpubsub import Client, WaitTimeout
from cloudpubsub.demo.promise import Promise
from cloudpubsub.demo.readings import readings

__all__ = ["REPORT_S", "RING_BYTES"]

RING_BYTES = 512 << 10  # small, so that an outage of seconds reaches the disk
REPORT_S = 0.1
_TICK_S = 0.01
_LATE_S = 0.5  # a gateway that was held up this long does not try to catch up
_FLUSH_S = 60.0


def _report(client: Client, **more: Any) -> None:
    stats = client.stats()
    line: dict[str, Any] = {
        "connected": stats.connected,
        "backlog": stats.backlog_messages,
        "ring_used_bytes": stats.ring_used_bytes,
        "spool_bytes": stats.spool_bytes,
        "spool_segments": stats.spool_segments,
        "spilled_bytes": stats.spilled_bytes,
        "oldest_age_seconds": stats.oldest_age_seconds,
        "dropped": stats.dropped + stats.dead_lettered,
        "resent": stats.resent,
        "reconnects": stats.reconnects,
        "storage": stats.storage,
        **more,
    }
    try:
        os.write(1, json.dumps(line).encode() + b"\n")  # short enough for a pipe to take all or nothing
    except (BlockingIOError, BrokenPipeError):
        pass  # the reader is behind or gone; the next report says more than this one


def _publish_until_told(client: Client, promise: Promise, rate: float) -> None:
    """Publish `rate` readings a second until there is something on stdin."""
    source = readings()
    number = promise.begun  # goes on where the last run ended, however that was
    due_s = report_s = time.monotonic()
    poller = select.poll()
    poller.register(0, select.POLLIN | select.POLLHUP)
    while not poller.poll(_TICK_S * 1000):
        now_s = time.monotonic()
        due_s = max(due_s, now_s - _LATE_S)
        while due_s < now_s:
            topic, value = next(source)
            payload = f'{{"seq":{number},"value":{value!r},"t":{time.monotonic():.6f}}}'
            promise.begun = number + 1
            client.publish(topic, payload)
            promise.kept = number = number + 1
            due_s += 1 / rate
        if now_s >= report_s:
            report_s = now_s + REPORT_S
            _report(client)


def _flush(client: Client) -> bool:
    """Until everything is acknowledged.  Returns False if stdin ended, or the time, before that."""
    deadline_s = time.monotonic() + _FLUSH_S
    poller = select.poll()
    poller.register(0, select.POLLIN | select.POLLHUP)
    while time.monotonic() < deadline_s and not poller.poll(0):
        try:
            client.flush(REPORT_S)
            return True
        except WaitTimeout:
            _report(client)
    return False


def _main() -> int:
    settings = json.loads(sys.argv[1])
    os.set_blocking(1, False)
    client = Client(
        f"mqtt://127.0.0.1:{settings['port']}",
        client_id="demo-gateway",
        spool=settings["spool"],
        ring_bytes=RING_BYTES,
        segment_bytes=1 << 20,
        spill_after=1.0,
        reconnect_min=0.1,
        reconnect_max=0.5,
    )
    found = client.recovery
    promise = Promise(Path(settings["promise"]))
    with client:
        _report(
            client,
            recovery={
                "messages": found.records,
                "from_memory": found.ring_records,
                "torn_bytes": found.torn_bytes,
                "damaged_ranges": found.damaged_ranges,
                "seconds": found.duration_s,
            },
        )
        _publish_until_told(client, promise, settings["rate"])
        is_flushed = bool(sys.stdin.readline()) and _flush(client)
    _report(client, is_flushed=is_flushed)
    promise.close()
    return 0 if is_flushed else 1


if __name__ == "__main__":
    sys.exit(_main())
