"""The two streams of `order="live_first"` where log and window meet: what the broker does is played by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub._append import append
from cloudpubsub._sender import Sender
from cloudpubsub._spool import Log
from tests import packets
from tests.packets import Publish

KIB = 1024
OLD_MS = 200


def memory_log(**settings: Any) -> Log:
    usual: dict[str, Any] = {
        "directory": None, "ring_directory": None, "identity": None, "adopt": False, "durability": "memory",
        "on_full": "drop_oldest", "ring_bytes": 64 * KIB, "segment_bytes": 64 * KIB, "spool_bytes_max": 1 << 20,
        "spool_messages_max": None, "min_free_bytes": 0, "spill_after_s": 10.0, "spill_timeout_s": 1.0,
        "block_timeout_s": None, "sync_interval_s": 1.0, "sync_bytes": None, "seal_after_s": 30.0, "payload_max": 4096,
    }  # fmt: skip
    return Log(**{**usual, **settings})


def sent(sender: Sender) -> list[Publish]:
    """Everything that may be sent now."""
    data = b""
    while True:
        sender.frame(int(time.monotonic() * 1000), 0)
        if not sender.has_unsent():
            break
        some = bytes(sender.unsent())
        sender.sent(len(some))
        data += some
    return [one for one in packets.parse_all(data, 4) if isinstance(one, Publish)]


def acknowledge(sender: Sender, published: list[Publish]) -> int:
    data = b"".join(b"\x40\x02" + one.packet_id.to_bytes(2, "big") for one in published)
    sender.space(len(data))[: len(data)] = data
    sender.received(len(data))
    return sender.take(False)[1]


def settled(log: Log) -> tuple[int, int, int]:
    stats = log.stats()
    return stats["acked"], stats["dropped"], stats["backlog_messages"]


def test_a_backlog_that_is_none_any_more_at_the_next_connection_leaves_one_stream() -> None:
    log = memory_log()
    sender = Sender(log, 100, 1 << 20, live_share=100)
    append(log, "t", b"old")
    time.sleep(1.5 * OLD_MS / 1000)  # it gets old
    append(log, "t", b"young")
    sender.restart()
    sender.split(OLD_MS)
    assert acknowledge(sender, sent(sender)[:1]) == 1
    sender.restart()  # the link was lost, and what is left is younger than a backlog
    sender.split(10_000)
    assert acknowledge(sender, sent(sender)) == 1
    for number in range(5):
        append(log, "t", b"%d" % number)
    assert acknowledge(sender, sent(sender)) == 5
    assert settled(log) == (7, 0, 0)
    log.close(1.0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["memory", "full disk"])
def test_dropping_goes_on_behind_a_backlog_that_was_dropped_as_a_whole(where: str, tmp_path: Path) -> None:
    log = memory_log()
    if where == "full disk":
        log.close(1.0)
        log = memory_log(directory=str(tmp_path), min_free_bytes=1 << 60, spill_timeout_s=0.01)
    sender = Sender(log, 100, 1000, live_share=100)
    backlog, live = 40, 1000
    for _ in range(backlog):
        append(log, "t", bytes(200))
    sender.restart()
    sender.split(0)
    sent(sender)
    sender.restart()  # the link was lost before anything was acknowledged
    for _ in range(live):
        append(log, "t", bytes(200))
    acked, dropped, pending = settled(log)
    assert (acked, dropped + pending) == (0, backlog + live)
    sender.restart()
    while some := sent(sender):
        assert acknowledge(sender, some) == len(some)
    assert settled(log) == (pending, dropped, 0)
    log.close(1.0)
