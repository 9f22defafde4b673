"""How fast does a backlog go to the disk and come back?

Spill: `publish()` at full speed without a connection, into ring and segment files; and with `close()`, which writes and
syncs what is left; and the slowest calls while publishing goes on at half that rate.  Beside it what the machine can do
with the same bytes of topics and payloads: one file written in big chunks, and, in C, chunks staged and written
(`pwrite`) into preallocated files, stores into their fresh mapping, and a copy in memory; nothing synced.

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
from cloudpubsub._sender import Sender

from . import _harness, _native
from ._harness import TOPIC, Meter, Report, Sample, Subject, check

_MODULE = _harness.module_name("spill")
_CHUNK_BYTES = 1 << 18
_FIXED_HEADER_BYTES = 4
_RING_BYTES = 4 << 20
_SIZES = (64, 1_024)
_PERCENTILES = ("p50_us", "p99_us", "p99.9_us", "max_us")


def spill(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], bytes(order["payload_bytes"])
    client = offline(order)
    publish, before = client.publish, io_bytes()
    with Meter() as meter:
        for _ in repeat(None, n):
            publish(TOPIC, payload)
    began_s = time.perf_counter()
    unsaved = client.close(60.0)
    total_s = meter.seconds + time.perf_counter() - began_s
    after, stats = io_bytes(), client.stats()
    check(unsaved == 0, f"{unsaved} were not saved")
    check(stats.published == n and stats.dropped == 0, f"{stats.published} published, {stats.dropped} dropped")
    check(stats.backlog_messages == n, f"{stats.backlog_messages} in the backlog")
    return meter.sample(
        n,
        with_close_per_second=n / total_s,
        payload_mb_per_second=n * len(payload) / meter.seconds / 1e6,
        **_written(n, len(payload), after["wchar"] - before["wchar"], after["write_bytes"] - before["write_bytes"]),
    )


def steady(order: dict[str, Any]) -> Sample:
    """How long calls take while the disk is written at half the rate of which it is capable."""
    n, payload = order["messages"], bytes(order["payload_bytes"])
    client = offline(order)
    publish, clock = client.publish, time.perf_counter_ns
    for _ in repeat(None, n):  # at full speed
        publish(TOPIC, payload)
    client.flush_now(60.0)
    with Meter() as full:
        for _ in repeat(None, n):
            publish(TOPIC, payload)
        client.flush_now(60.0)
    burst = 32
    pause_ns = int(2 * full.seconds * 1e9 / n * burst)
    taken_ns = []
    due_ns = clock()
    with Meter() as meter:
        for _ in range(n // burst):
            while clock() < due_ns:
                time.sleep(0.0002)
            for _ in repeat(None, burst):
                began_ns = clock()
                publish(TOPIC, payload)
                taken_ns.append(clock() - began_ns)
            due_ns += pause_ns
    stats = client.stats()
    client.close(60.0)
    check(stats.dropped == 0 and stats.spilled_bytes > n * len(payload), "it did not spill, or dropped something")
    taken_ns.sort()
    return meter.sample(
        len(taken_ns),
        **{f"p{part:g}_us": taken_ns[int(len(taken_ns) * part / 100)] / 1e3 for part in (50, 99, 99.9)},
        max_us=taken_ns[-1] / 1e3,
    )


def limit(way: str) -> Subject:
    """In C, with no queue around it."""

    def copy(order: dict[str, Any]) -> Sample:
        program = _native.build("limits")
        n, size = order["messages"], order["payload_bytes"] + len(TOPIC)
        command = [str(program), way, str(n * size), str(size), str(Path(order["directory"]) / "file")]
        text, _, cpu_s, peak_bytes = _harness.program(command)
        seconds, done_bytes = text.split()
        return Sample(int(done_bytes) // size, float(seconds), cpu_s, peak_bytes, peak_bytes)

    return copy


def plain_file(order: dict[str, Any]) -> Sample:
    n, size = order["messages"], order["payload_bytes"]
    chunk = bytes(_CHUNK_BYTES)
    count = -(-n * (size + len(TOPIC)) // len(chunk))
    before = io_bytes()
    fd = os.open(Path(order["directory"]) / "plain", os.O_WRONLY | os.O_CREAT, 0o600)
    with Meter() as meter:
        for _ in repeat(None, count):
            check(os.write(fd, chunk) == len(chunk), "a short write")
    os.close(fd)
    after = io_bytes()
    return meter.sample(
        n,
        with_close_per_second=n / meter.seconds,
        payload_mb_per_second=n * size / meter.seconds / 1e6,
        **_written(n, size, after["wchar"] - before["wchar"], after["write_bytes"] - before["write_bytes"]),
    )


def replay(order: dict[str, Any]) -> Sample:
    n, payload = order["messages"], bytes(range(64)) * (order["payload_bytes"] // 64)
    client = offline(order)
    for _ in repeat(None, n):
        client.publish(TOPIC, payload)
    check(client.close(60.0) == 0, "the backlog was not saved")
    client = offline(order)
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


def offline(order: dict[str, Any]) -> cloudpubsub.Client:
    """A client that is never started."""
    logging.getLogger("cloudpubsub").setLevel(logging.ERROR)
    settings = {"ring_bytes": _RING_BYTES, "max_spool_bytes": 8 << 30, **order.get("settings", {})}
    return cloudpubsub.Client("mqtt://127.0.0.1:1", client_id="bench", spool=order["directory"], **settings)


def io_bytes() -> dict[str, int]:
    """This process's account at the kernel: `wchar` handed to writing calls, `write_bytes` for the device."""
    text = Path("/proc/self/io").read_text()
    return {name: int(value) for name, value in re.findall(r"^(\w+): (\d+)$", text, re.M)}


def _written(n: int, payload_bytes: int, wchar: int, device: int) -> dict[str, float]:
    return {
        "written_per_payload_byte": wchar / (n * payload_bytes),
        "written_per_message_byte": wchar / (n * (payload_bytes + len(TOPIC) + _FIXED_HEADER_BYTES)),
        "device_per_payload_byte": device / (n * payload_bytes),
    }


_KINDS: dict[str, Subject] = {
    "spill": spill,
    "plain file": plain_file,
    "pwrite": limit("pwrite"),
    "stores into a fresh mapping": limit("map"),
    "stores into a mapping that is there": limit("map-again"),
    "memcpy": limit("memcpy"),
    "replay": replay,
    "publish at half that rate": steady,
}
SUBJECTS: dict[str, Subject] = {f"{kind}, {size} B": subject for size in _SIZES for kind, subject in _KINDS.items()}
_LIMITS = ("plain file", "pwrite", "stores into a fresh mapping", "stores into a mapping that is there", "memcpy")


def run(arguments: argparse.Namespace) -> Report:
    quick, rounds = arguments.quick, _harness.rounds_of(arguments, 9)
    sizes = [arguments.payload_bytes // 64 * 64 or 64] if arguments.payload_bytes else list(_SIZES)
    subjects, others = {}, set()
    for size in sizes:
        messages = 40_000 if quick else max(2_000, min(1_000_000, 200_000_000 // size))
        for kind, subject in _KINDS.items():
            name = f"{kind}, {size} B"
            SUBJECTS[name] = subject
            if kind in _LIMITS:
                if arguments.own_only or (kind != "plain file" and size < max(sizes)):
                    continue  # one size says how the machine does it
                others.add(name)
            part = 10 if kind == "publish at half that rate" else 1
            subjects[name] = {
                **_harness.common_order(arguments),
                "kind": kind,
                "messages": messages // part,
                "payload_bytes": size,
            }
    samples = _harness.in_turns(_MODULE, subjects, rounds, _harness.note_to_stderr, others=others)
    ratios = {}
    for size in sizes:
        for kind in _LIMITS:
            if f"{kind}, {size} B" in samples:
                name = f"spill / {kind}, {size} B"
                ratios[name] = _harness.ratio(samples, f"spill, {size} B", f"{kind}, {size} B")
    return {
        "bench": "spill",
        "parameters": {
            "topic_bytes": len(TOPIC),
            "ring_bytes": _RING_BYTES,
            "chunk_bytes": _CHUNK_BYTES,
            "settings": _harness.settings_of(arguments),
        },
        "missing": samples.missing,
        "subjects": _harness.summary(samples),
        "ratios": ratios,
    }


def show(report: Report) -> str:
    rows, slow = [], []
    for name, figures in report["subjects"].items():
        if "p99.9_us" in figures:
            slow.append([name, *(_harness.span(figures[key], "{:.1f}") for key in _PERCENTILES)])
            continue
        rates, written = ["", ""], ""
        if "with_close_per_second" in figures:
            rates = [_harness.span(figures[key]) for key in ("with_close_per_second", "payload_mb_per_second")]
            written = f"{figures['written_per_payload_byte']['median']:.2f}"
        elif "frame_per_second" in figures:
            rates = [_harness.span(figures[key]) for key in ("frame_per_second", "frame_mb_per_second")]
        rows.append(
            [
                name,
                _harness.span(figures["per_second"]),
                *rates,
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
    text = _harness.table(head, rows)
    text += "\n\n" + _harness.table(["one call of publish(), µs", "median", "p99", "p99.9", "longest"], slow)
    for name, ratio in report["ratios"].items():
        text += f"\n\n{name}: {_harness.bounds(ratio)}."
    return text


def main() -> None:
    _harness.main(_harness.parser(_MODULE, __doc__).parse_args(), _KINDS, run, show)


if __name__ == "__main__":
    main()
