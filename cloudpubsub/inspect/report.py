"""What is in a spool, as one document of plain values: what `cloudpubsub inspect` prints."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from typing import Any

from cloudpubsub.inspect.layout import Ledger, Meta, Produced, Settled, backlog, reason_name
from cloudpubsub.inspect.owner import is_owned, owner_pid
from cloudpubsub.inspect.ring import Ring
from cloudpubsub.inspect.segment import open_to_read
from cloudpubsub.inspect.spool import LogFile, SpoolDirectory

__all__ = ["counters_of", "losses_of", "report", "ring_facts"]

_LINE_BYTES_MAX = 4 << 20
_REASONS_MAX = 100
_RANGE = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.bytes")


def report(spool: SpoolDirectory) -> dict[str, Any]:
    """Raises SpoolError, OSError."""
    meta_file = spool.meta()
    meta = meta_file.best
    files = spool.files(None if meta is None else meta.spool_id)
    spool_id = meta.spool_id if meta is not None else spool.spool_id(files)
    ring, why = spool.ring(meta)
    document: dict[str, Any] = {
        "directory": spool.path,
        "spool_id": None if spool_id is None else spool_id.hex(),
        "identity": None if meta is None else meta.identity.decode("utf-8", "replace"),
        "in_use": is_owned(spool.path),
        "owner_pid": owner_pid(spool.path),
        "meta": {"slots": list(meta_file.slots)} | ({} if meta is None else _meta(meta)),
        "counters": None,
        "ring": None,
        "ring_missing": why,
    }
    produced, settled, ledger = (None, None, None) if meta is None else (meta.produced, meta.settled, meta.ledger)
    if ring is not None:
        try:
            (produced, settled), ledger = ring.state(), ring.ledger()
            document["ring"] = ring_facts(ring, produced, settled)
        finally:
            ring.close()
    if produced is not None and settled is not None and ledger is not None:
        document["counters"] = {"from": "meta" if ring is None else "ring", **counters_of(produced, settled)}
        document["losses"] = losses_of(ledger)
    segments = [_segment(file) for file in files]
    document["segments"] = segments
    document["segment_bytes"] = sum(segment["file_bytes"] for segment in segments)
    document["segment_messages"] = sum(segment.get("messages", 0) for segment in segments)
    document["quarantine"] = _quarantine(spool)
    document["dead_letters"] = _dead_letters(spool)
    return document


def _meta(meta: Meta) -> dict[str, Any]:
    return {
        "sequence": meta.sequence,
        "epoch": meta.epoch,
        "generation": f"{meta.generation:016x}",
        "next_position": meta.next_position,
        "clean": meta.clean,
    }


def ring_facts(ring: Ring, produced: Produced, settled: Settled) -> dict[str, Any]:
    low = max(settled.head, settled.spilled)
    return {
        "path": ring.path,
        "bytes": ring.ring_bytes,
        "used_bytes": min(max(0, produced.published - low), ring.ring_bytes),  # they are not of the same instant
        "writer_pid": ring.writer_pid,
        "first": low,
        "end": produced.published,
    }


def counters_of(produced: Produced, settled: Settled) -> dict[str, Any]:
    """Names as in the statistics of a client: refused messages count as dropped too."""
    messages, size = backlog(produced, settled)
    return {
        "published": produced.messages,
        "published_bytes": produced.bytes,
        "acked": settled.acked_messages,
        "acked_bytes": settled.acked_bytes,
        "dropped": settled.dropped_messages + produced.refused,
        "dropped_bytes": settled.dropped_bytes + produced.refused_bytes,
        "dead_lettered": settled.dead_messages,
        "dead_lettered_bytes": settled.dead_bytes,
        "refused": produced.refused,
        "refused_bytes": produced.refused_bytes,
        "backlog_messages": messages,
        "backlog_bytes": size,
        "position": produced.published,
        "head": settled.head,
        "spilled": settled.spilled,
        "sent_max": settled.sent_max,
        "settled_ahead": [[one.first, one.end] for one in settled.ahead],
        "victims": [base - 1 for base in settled.victims if base],
    }


def losses_of(ledger: Ledger) -> dict[str, Any]:
    return {
        "by_reason": [
            {"reason": reason_name(code), "messages": messages, "bytes": size}
            for code, (messages, size) in enumerate(ledger.totals)
            if messages or size
        ],
        "uncertain": None if ledger.uncertain is None else list(ledger.uncertain),
        "entries": [{**loss._asdict(), "reason": reason_name(loss.reason)} for loss in ledger.losses],
    }


def _segment(file: LogFile) -> dict[str, Any]:
    document: dict[str, Any] = {"name": file.name, "kind": file.kind, "file_bytes": file.file_bytes}
    if file.why:
        document["why"] = file.why
    if file.kind != "segment":
        return document
    document |= {"base": file.segment.base, "epoch": file.segment.epoch, "sealed": file.footer is not None}
    document["made_ms"] = None if file.header is None else file.header.wall_ms
    if file.footer is not None:
        _, end, messages, size, _ = file.footer
        return document | {"end": end, "messages": messages, "bytes": size, "damaged_bytes": None}
    try:
        with file.open() as opened:
            walk = opened.walk()
            for _ in walk:
                pass
    except OSError as exc:
        gone = isinstance(exc, FileNotFoundError)
        return document | {"kind": "gone" if gone else "unreadable", "why": exc.strerror or "cannot be read"}
    return document | {
        "end": walk.end,
        "messages": walk.messages,
        "bytes": walk.message_bytes,
        "damaged_bytes": walk.damaged_bytes,
        "torn_bytes": walk.torn_bytes,
    }


def _quarantine(spool: SpoolDirectory) -> list[dict[str, Any]]:
    """What the library set aside, and below `repair` what repairing did."""
    found = []
    for folder in ((), ("repair",)):
        try:
            entries = sorted(os.scandir(spool.file("quarantine", *folder)), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    continue
                size = entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
            document: dict[str, Any] = {"name": "/".join((*folder, entry.name)), "bytes": size}
            if (parts := _RANGE.match(entry.name)) is not None:
                document |= {"first": int(parts[1], 16), "end": int(parts[2], 16)}
            found.append(document)
    return found


def _dead_letters(spool: SpoolDirectory) -> dict[str, Any]:
    """How many messages were given up, why and when; unreadable lines are what a kill in the middle of one leaves."""
    files = size = letters = unreadable = 0
    times: list[float] = []
    reasons: Counter[str] = Counter()
    for name in ("dead-letters.jsonl.1", "dead-letters.jsonl"):
        try:
            fd = open_to_read(spool.file(name))
        except OSError:
            continue
        files += 1
        with open(fd, "rb") as lines:
            while line := lines.readline(_LINE_BYTES_MAX):
                size += len(line)
                try:
                    letter = json.loads(line)
                    reason, at = str(letter["reason"]), float(letter["time"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    unreadable += 1
                    continue
                letters += 1
                times = [min([at, *times]), max([at, *times])]
                if reason in reasons or len(reasons) < _REASONS_MAX:
                    reasons[reason] += 1
    return {
        "files": files,
        "bytes": size,
        "messages": letters,
        "unreadable_lines": unreadable,
        "first_time": times[0] if times else None,
        "last_time": times[1] if times else None,
        "reasons": dict(reasons.most_common()),
    }
