"""Loads for `bench.knobs` that no other question has: a sink that stands still now and then, publishing at a fixed rate
without a link, and a spool that is opened after its process was killed."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

from . import _brokers, recovery
from ._harness import TOPIC, Meter, Sample, check
from ._peers import connected_client, payload_of
from .spill import io_bytes, offline

_RECORD_HEADER_BYTES = 32
_BETWEEN_PAUSES_S = 0.15
_NAP_S = 0.001
_WAIT_S = 60.0


def record_bytes(payload_bytes: int) -> int:
    """What a message takes in ring and spool."""
    return -(-(_RECORD_HEADER_BYTES + len(TOPIC) + payload_bytes) // 8) * 8


def _paced(call: Callable[[], object], per_second: float, seconds: float) -> int:
    """Call at that rate, a few at a time; returns how often."""
    began_s, done = time.perf_counter(), 0
    while (past_s := time.perf_counter() - began_s) < seconds:
        while done < per_second * past_s:
            call()
            done += 1
        time.sleep(_NAP_S)
    return done


def pauses(order: dict[str, Any]) -> Sample:
    """A steady load, while the sink stands still for each of `pauses_s`.  What a pause brought to the disk is told as a
    share of what was published in it."""
    payload, rate = payload_of(order), order["per_second"]
    shares: dict[str, float] = {}
    published = 0
    with _brokers.pausing_sink() as (port, pause):
        client = connected_client({**order, "host": _brokers.HOST, "port": port}, order["directory"])

        def publish() -> None:
            client.publish(TOPIC, payload)

        with Meter() as meter:
            for pause_s in order["pauses_s"]:
                published += _paced(publish, rate, _BETWEEN_PAUSES_S)
                check(client.flush(_WAIT_S) == 0, "some were lost")
                before = client.stats().spilled_bytes
                with pause():
                    n = _paced(publish, rate, pause_s)
                check(client.flush(_WAIT_S) == 0, "some were lost")
                spilled = client.stats().spilled_bytes - before
                shares[pause_share(pause_s)] = 100 * spilled / (n * record_bytes(len(payload)))
                published += n
        stats = client.stats()
        client.close()
    check(stats.acked == published and stats.reconnects == 0, f"{stats.acked} of {published} were acknowledged")
    return meter.sample(published, **shares)


def pause_share(pause_s: float) -> str:
    """The name of its figure."""
    return f"share_on_disk_{pause_s:g}_s"


def level(order: dict[str, Any]) -> Sample:
    """Publishing into the spool as fast as it takes it; then, at a fixed rate, how long each call takes."""
    n, payload, clock = order["messages"], payload_of(order), time.perf_counter_ns
    client = offline(order)
    publish = client.publish
    with Meter() as meter:
        for _ in repeat(None, n):
            publish(TOPIC, payload)
    client.flush_now(_WAIT_S)
    taken_ns: list[int] = []

    def timed() -> None:
        began_ns = clock()
        publish(TOPIC, payload)
        taken_ns.append(clock() - began_ns)

    n += _paced(timed, order["per_second"], order["seconds"])
    stats = client.stats()
    check(client.close(_WAIT_S) == 0 and stats.dropped == 0 and stats.published == n, "some were lost")
    taken_ns.sort()
    return meter.sample(
        order["messages"],
        **{f"p{part:g}_us": taken_ns[int(len(taken_ns) * part / 100)] / 1e3 for part in (50, 99.9)},
        max_us=taken_ns[-1] / 1e3,
    )


def trickle(order: dict[str, Any]) -> Sample:
    """A steady load without a link: commits, and what this process gave the disk to write."""
    payload = payload_of(order)
    client = offline(order)
    before, syncs = io_bytes()["write_bytes"], client._log.stats()["syncs"]
    with Meter() as meter:
        n = _paced(lambda: client.publish(TOPIC, payload), order["per_second"], order["seconds"])
    written, syncs = io_bytes()["write_bytes"] - before, client._log.stats()["syncs"] - syncs
    check(client.close(_WAIT_S) == 0, "some were lost")
    return meter.sample(
        n, syncs_per_second=syncs / meter.seconds, written_bytes_per_second=written / meter.seconds
    )


def reopened(order: dict[str, Any]) -> Sample:
    """Opening a backlog whose process was killed, at once or when all of it was synced."""
    path, size = Path(order["directory"]) / "spool", order["settings"]["segment_bytes"]
    with recovery.ring_directory():
        recovery.write(
            path, order["messages"], order["payload_bytes"], killed=True, segment_bytes=size, synced=order["synced"]
        )
        spool, sample = recovery.opened({"path": str(path), "messages": order["messages"], "segment_bytes": size})
        spool.close(_WAIT_S)
    return sample
