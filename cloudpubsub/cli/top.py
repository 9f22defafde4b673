"""`cloudpubsub top`: a live view of a spool that is in use, from another process."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from cloudpubsub.cli.common import (
    DONE,
    add_help,
    add_ring_flag,
    add_spool_flags,
    count,
    positive_integer,
    seconds,
    shown,
    time_of,
)
from cloudpubsub.cli.stop import Stop
from cloudpubsub.inspect.watch import Watch

__all__ = ["add_flags", "run"]

_INTERVAL_MIN_S = 0.05
_BAR = 30  # characters
_CLEAR = "\x1b[H\x1b[J"  # cursor to the first line, and nothing below it


def _interval(text: str) -> float:
    value = seconds(text)
    if value < _INTERVAL_MIN_S:
        raise ValueError
    return value


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_help(parser)
    add_spool_flags(parser)
    parser.add_argument(
        "--interval",
        metavar="SECONDS",
        type=_interval,
        default=1.0,
        help=f"time between two looks (1; at least {_INTERVAL_MIN_S})",
    )
    parser.add_argument("--count", metavar="COUNT", type=positive_integer, help="end after so many looks")
    add_ring_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Until --count looks, Ctrl-C or SIGTERM, all of which are 0.  With --json each look is a line."""
    looks = 0
    due_s = time.monotonic()
    with Stop() as stop, Watch(args.directory, args.ring_dir) as watch:
        while True:
            document = watch.look()
            if not _write(json.dumps(document) if args.json else _page(document)):
                return DONE
            looks += 1
            if looks == args.count:
                return DONE
            due_s = max(due_s + args.interval, time.monotonic())  # a look that was late is not made up for
            if stop.wait(due_s - time.monotonic()):
                return DONE


def _write(text: str) -> bool:
    """False: nobody reads any more."""
    try:
        print(text, flush=True)
        return True
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain again when it flushes at exit
        return False


def _page(document: dict[str, Any]) -> str:
    lines = [*_head(document), *_table(document), *_sizes(document), *_losses(document)]
    return (_CLEAR if sys.stdout.isatty() else "") + "\n".join(lines) + ("" if sys.stdout.isatty() else "\n")


def _head(document: dict[str, Any]) -> list[str]:
    where = shown(document["directory"].encode(errors="surrogateescape"))
    lines = [f"{where}  {time_of(document['time_ms'])}"]
    if document["in_use"]:
        pid = document["owner_pid"]
        state = "in use" if pid is None else f"in use by process {pid}"
        lines.append(f"{state}, link {document['link'] or 'not known'}, storage {_storage(document)}")
    elif document["in_use"] is None:
        lines.append("nobody can tell whether it is in use")
    elif document["closed_clean"] is False:
        lines.append("NOT IN USE: its last owner ended without closing it")
    else:
        lines.append("NOT IN USE")
    if document["from"] == "ring":
        return lines
    if document["in_use"] is not False:
        lines += [
            f"no ring to look at: {document['ring_missing']}",
            'With durability "memory", or without tmpfs, cursors and counters are in memory of that process alone;',
            "where its ring lies elsewhere, give --ring-dir.",
        ]
    if document["from"] == "meta" and not document["closed_clean"]:
        lines.append("Shown is what the files say, as of the last save, which may be long ago.")
    return lines


def _storage(document: dict[str, Any]) -> str:
    storage = document["storage"] or "not known"
    if storage != "failed" or not document["storage_errno"]:
        return storage
    return f"FAILED: {os.strerror(document['storage_errno'])}"


def _table(document: dict[str, Any]) -> list[str]:
    counters, rates = document["counters"], document["rates"]
    if counters is None:
        return ["", "no counters: the meta file has no valid slot"]
    lines = ["", f"{'':<14}{'messages':>18}{'per second':>16}{'bytes':>22}{'per second':>18}"]
    for name, key in (
        ("published", "published"),
        ("acknowledged", "acked"),
        ("dropped", "dropped"),
        ("dead-lettered", "dead_lettered"),
    ):
        speed = "-" if rates is None else f"{rates[key]:,.1f}"
        byte_speed = "-" if rates is None else f"{rates[key + '_bytes']:,.0f}"
        lines.append(f"{name:<14}{counters[key]:>18,}{speed:>16}{counters[key + '_bytes']:>22,}{byte_speed:>18}")
    lines.append(f"{'backlog':<14}{counters['backlog_messages']:>18,}{'':>16}{counters['backlog_bytes']:>22,}")
    return lines


def _sizes(document: dict[str, Any]) -> list[str]:
    age_s, drain_s, ring, counters = (
        document[key] for key in ("oldest_age_seconds", "drain_seconds", "ring", "counters")
    )
    lines = [""]
    if counters is not None and counters["backlog_messages"]:
        lines.append(
            f"oldest    {'age not known' if age_s is None else f'{age_s:,.1f} s old'}"
            + ("" if drain_s is None else f"; at these rates all is sent in {drain_s:,.0f} s")
        )
    if ring is not None:
        used, size = ring["used_bytes"], ring["bytes"]
        bar = "#" * (_BAR * used // size)
        lines.append(f"ring      [{bar:<{_BAR}}] {used:,} of {size:,} bytes ({100 * used // size} %)")
    lines.append(f"spool     {count(document['segments'], 'segment')}, {document['segment_bytes']:,} bytes")
    if counters is not None:
        cursors = ("head", "spilled", "position", "sent_max")
        lines.append("cursors   " + ", ".join(f"{name} {counters[name]}" for name in cursors))
    return lines


def _losses(document: dict[str, Any]) -> list[str]:
    return [f"lost      {count(loss['messages'])}: {loss['reason']}" for loss in document["lost_by_reason"]]
