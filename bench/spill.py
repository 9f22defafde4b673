"""How fast does a backlog go to the disk and come back?

Spill: `publish()` at full speed without a connection, into ring and segment files; and with `close()`, which writes and
syncs what is left.  Beside it the same bytes of topics and payloads written to one file in big chunks, nothing synced.

Replay: such a backlog, found again in the page cache, framed into MQTT packets by the sender as for a connection;
alone, and with acknowledgements, which are made here and taken like a broker's.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import time
from itertools import repeat
from pathlib import Path
from typing import Any

import cloudpubsub
from bench import _harness
from bench._harness import TOPIC, Meter, Report, Sample, Subject, check
from cloudpubsub._sender import Sender

_MODULE = "bench.spill"
_CHUNK_BYTES = 1 << 18
_FIXED_HEADER_BYTES = 4
_RING_BYTES = 4 << 20
_SIZES = (64, 1_024)


def spill(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], bytes(order["payload_bytes"])
    client = _offline(order["directory"])
    publish, before = client.publish, _io_bytes()
    with Meter() as meter:
        for _ in repeat(None, n):
            publish(TOPIC, payload)
    began_s = time.perf_counter()
    unsaved = client.close(60.0)
    total_s = meter.seconds + time.perf_counter() - began_s
    after, stats = _io_bytes(), client.stats()
    check(unsaved == 0, f"{unsaved} were not saved")
    check(stats.published == n and stats.dropped == 0, f"{stats.published} published, {stats.dropped} dropped")
    check(stats.backlog_messages == n, f"{stats.backlog_messages} in the backlog")
    return meter.sample(
        n,
        with_close_per_second=n / total_s,
        payload_mb_per_second=n * len(payload) / meter.seconds / 1e6,
        **_written(n, len(payload), after["wchar"] - before["wchar"], after["write_bytes"] - before["write_bytes"]),
    )


def plain_file(order: dict[str, Any]) -> Sample:
    n, size = order["messages"], order["payload_bytes"]
    chunk = bytes(_CHUNK_BYTES)
    count = -(-n * (size + len(TOPIC)) // len(chunk))
    before = _io_bytes()
    fd = os.open(Path(order["directory"]) / "plain", os.O_WRONLY | os.O_CREAT, 0o600)
    with Meter() as meter:
        for _ in repeat(None, count):
            check(os.write(fd, chunk) == len(chunk), "a short write")
    os.close(fd)
    after = _io_bytes()
    return meter.sample(
        n,
        with_close_per_second=n / meter.seconds,
        payload_mb_per_second=n * size / meter.seconds / 1e6,
        **_written(n, size, after["wchar"] - before["wchar"], after["write_bytes"] - before["write_bytes"]),
    )


def replay(order: dict[str, Any]) -> Sample:
    n, payload, directory = order["messages"], bytes(range(64)) * (order["payload_bytes"] // 64), order["directory"]
    client = _offline(directory)
    for _ in repeat(None, n):
        client.publish(TOPIC, payload)
    check(client.close(60.0) == 0, "the backlog was not saved")
    client = _offline(directory)
    check(client.recovery.records == n, f"{client.recovery.records} of {n} were found again")
    sender = Sender(client._log, 65_534, 1 << 30)
    sender.restart()
    meter, framed, frame_bytes, clock = Meter(), 0, 0, time.perf_counter
    frame_s = 0.0
    with meter:
        while framed < n:
            began_s = clock()
            messages = sender.frame(framed, 0)
            frame_s += clock() - began_s
            check(messages > 0, f"the log ended after {framed} of {n}")
            packets = sender.unsent()
            acks = _acknowledge(packets, messages, payload)
            frame_bytes += len(packets)
            sender.sent(len(packets))
            room = sender.space(len(acks))
            room[: len(acks)] = acks
            sender.received(len(acks))
            _, settled, _ = sender.take(False)
            check(settled == messages, f"{settled} of {messages} acknowledgements were taken")
            framed += messages
    stats = client.stats()
    check(framed == n and stats.acked == n and stats.backlog_messages == 0, f"{stats.acked} of {n} drained")
    client.close()
    return meter.sample(n, frame_per_second=n / frame_s, frame_mb_per_second=frame_bytes / frame_s / 1e6)


def _acknowledge(packets: memoryview, messages: int, payload: bytes) -> bytearray:
    """The PUBACKs for packets that are all of one length.  The first and the last packet are looked at."""
    length = len(packets) // messages
    check(length * messages == len(packets), "packets of different lengths")
    # Behind the fixed header, of which the remaining length is what varies.
    id_at = length - len(payload) - 2
    for at in (0, len(packets) - length):
        packet = bytes(packets[at : at + length])
        check(packet.endswith(payload), "a packet without the payload")
        check(packet[:id_at].endswith(TOPIC.encode()), "a packet without the topic")
    acks = bytearray(4 * messages)
    acks[0::4] = b"\x40" * messages
    acks[1::4] = b"\x02" * messages
    acks[2::4] = packets[id_at::length]
    acks[3::4] = packets[id_at + 1 :: length]
    return acks


def _offline(directory: str) -> cloudpubsub.Client:
    """A client that is never started."""
    logging.getLogger("cloudpubsub").setLevel(logging.ERROR)
    return cloudpubsub.Client(
        "mqtt://127.0.0.1:1", client_id="bench", spool=directory, ring_bytes=_RING_BYTES, max_spool_bytes=8 << 30
    )


def _io_bytes() -> dict[str, int]:
    """This process's account at the kernel: `wchar` handed to writing calls, `write_bytes` for the device."""
    text = Path("/proc/self/io").read_text()
    return {name: int(value) for name, value in re.findall(r"^(\w+): (\d+)$", text, re.M)}


def _written(n: int, payload_bytes: int, wchar: int, device: int) -> dict[str, float]:
    return {
        "written_per_payload_byte": wchar / (n * payload_bytes),
        "written_per_message_byte": wchar / (n * (payload_bytes + len(TOPIC) + _FIXED_HEADER_BYTES)),
        "device_per_payload_byte": device / (n * payload_bytes),
    }


_KINDS: dict[str, Subject] = {"spill": spill, "plain file": plain_file, "replay": replay}
SUBJECTS: dict[str, Subject] = {f"{kind}, {size} B": subject for size in _SIZES for kind, subject in _KINDS.items()}


def run(arguments: argparse.Namespace) -> Report:
    quick = arguments.quick
    subjects = {}
    for size in _SIZES:
        messages = 50_000 if quick else 1_000_000 if size == 64 else 200_000
        for kind in _KINDS:
            subjects[f"{kind}, {size} B"] = {"messages": messages, "payload_bytes": size}
    samples = _harness.in_turns(_MODULE, subjects, _harness.rounds_of(arguments), _harness.note_to_stderr)
    return {
        "bench": "spill",
        "parameters": {
            "topic_bytes": len(TOPIC),
            "ring_bytes": _RING_BYTES,
            "chunk_bytes": _CHUNK_BYTES,
            "rounds": len(next(iter(samples.values()))),
        },
        "subjects": _harness.summary(samples),
        "ratios": {
            f"spill / plain file, {size} B": _harness.ratio(samples, f"spill, {size} B", f"plain file, {size} B")
            for size in _SIZES
        },
    }


def show(report: Report) -> str:
    rows = []
    for name, figures in report["subjects"].items():
        if "with_close_per_second" in figures:
            rates = [figures["with_close_per_second"], figures["payload_mb_per_second"]]
            written = f"{figures['written_per_payload_byte']['median']:.2f}"
        else:
            rates = [figures["frame_per_second"], figures["frame_mb_per_second"]]
            written = ""
        rows.append(
            [
                name,
                _harness.span(figures["per_second"]),
                _harness.span(rates[0]),
                _harness.span(rates[1]),
                _harness.span(figures["cpu_s_per_million"], "{:.2f}"),
                written,
                _harness.mib(figures["rss_growth_bytes"]),
            ]
        )
    head = [
        "without a network",
        "messages/s, median (min-max)",
        "with close() / framing alone",
        "MB/s",
        "CPU s per million",
        "bytes written per payload byte",
        "RSS growth",
    ]
    return _harness.table(head, rows)


if __name__ == "__main__":
    _harness.main(_harness.parser(_MODULE, __doc__).parse_args(), SUBJECTS, run, show)
