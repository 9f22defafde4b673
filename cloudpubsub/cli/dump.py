"""`cloudpubsub dump`: print the messages of a spool, which may be in use, oldest first."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice

from cloudpubsub._properties import decode_user_properties
from cloudpubsub.cli.common import (
    DONE,
    FAILED,
    add_help,
    add_ring_flag,
    add_spool_flags,
    say,
    shown,
    time_of,
    whole_number,
    writing,
)
from cloudpubsub.inspect.check import pending_from
from cloudpubsub.inspect.layout import Meta, message_of
from cloudpubsub.inspect.records import spool_records
from cloudpubsub.inspect.ring import Ring, clocks_ms
from cloudpubsub.inspect.segment import Record
from cloudpubsub.inspect.spool import SpoolDirectory

__all__ = ["add_flags", "run"]

_WRITE_BYTES = 1 << 16  # at once: stdout may not be buffered


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_help(parser)
    add_spool_flags(parser)
    parser.add_argument(
        "--from", dest="first", metavar="POSITION", type=whole_number, default=0, help="start at this position"
    )
    parser.add_argument("--limit", metavar="COUNT", type=whole_number, help="end after this many messages")
    parser.add_argument(
        "--all", action="store_true", help="everything that is there, also what was acknowledged or dropped already"
    )
    add_ring_flag(parser)


def run(args: argparse.Namespace) -> int:
    """0, or 1 if messages that should be there are damaged."""
    spool = SpoolDirectory(args.directory, args.ring_dir)
    meta = spool.meta().best
    ring, _ = spool.ring(meta)
    try:
        dump = _Dump(spool, meta, ring, args)
        with writing():
            lines, size = [], 0
            for line in islice(dump.lines(_as_json if args.json else _as_text), args.limit):
                lines.append(line)
                size += len(line)
                if size >= _WRITE_BYTES:
                    sys.stdout.write("".join(lines))
                    lines, size = [], 0
            sys.stdout.write("".join(lines))
        return FAILED if dump.is_damaged else DONE
    finally:
        if ring is not None:
            ring.close()


class _Dump:
    def __init__(self, spool: SpoolDirectory, meta: Meta | None, ring: Ring | None, args: argparse.Namespace) -> None:
        self._spool = spool
        self._meta = meta
        self._ring = ring
        self._first: int = args.first
        self._is_all: bool = args.all
        self.is_damaged = False

    def lines(self, shape: Callable[[Record, int | None], str]) -> Iterator[str]:
        """One line a message.  Damage between them is told on stderr."""
        settled = None if self._meta is None else self._meta.settled
        if self._ring is not None:
            settled = self._ring.state().settled
        first = self._first
        if settled is not None and not self._is_all:
            first = max(first, settled.head)
        ring_clock_ms = clocks_ms()
        spool_id = None if self._meta is None else self._meta.spool_id
        for file, item in spool_records(self._spool, spool_id, self._ring, first):
            if settled is not None and not self._is_all:
                first_pending = settled.pending_from(item[0]) if file is None else pending_from(settled, file)
                if item[0] < first_pending:
                    continue
            if not isinstance(item, Record):
                self.is_damaged = True
                where = "the ring" if file is None else f"log/{file.name}"
                say(f"{where}: positions {item.first} to {item.end} are damaged")
            elif not item.is_pad:
                yield shape(item, ring_clock_ms if file is None else file.clock_ms)


def _as_text(record: Record, clock_ms: int | None) -> str:
    """Position, time of publishing, topic and payload, and what is special, with tabs between."""
    message = message_of(record.raw)
    parts = [
        str(message.position),
        time_of(None if clock_ms is None else clock_ms + message.stamp_ms),
        shown(message.topic),
        shown(message.payload),
    ]
    if message.retain:
        parts.append("retain")
    if message.userdata:
        parts.append(f"userdata={shown(message.userdata)}")
    if message.ttl_ms:
        parts.append(f"ttl={message.ttl_ms / 1000:g}s")
    parts += [f"{name}={value}" for name, value in decode_user_properties(message.properties)]
    return "\t".join(parts) + "\n"


def _as_json(record: Record, clock_ms: int | None) -> str:
    message = message_of(record.raw)
    document: dict[str, object] = {
        "position": message.position,
        "topic": message.topic.decode("utf-8", "replace"),
        **_bytes("payload", message.payload),
        **_bytes("userdata", message.userdata),
        "retain": message.retain,
        "ttl_ms": message.ttl_ms or None,
        "user_properties": decode_user_properties(message.properties),
        "epoch": message.epoch,
        "stamp_ms": message.stamp_ms,
        "time_ms": None if clock_ms is None else clock_ms + message.stamp_ms,
    }
    return json.dumps(document) + "\n"


def _bytes(name: str, data: bytes) -> dict[str, str]:
    """As text; what is no UTF-8 as base64, under a name that says so."""
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}
