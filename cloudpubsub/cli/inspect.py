"""`cloudpubsub inspect`: tell what is in a spool, which may be in use."""

from __future__ import annotations

import argparse
from typing import Any

from cloudpubsub.cli.common import (
    DONE,
    add_help,
    add_ring_flag,
    add_spool_flags,
    count,
    shown,
    time_of,
    write_json,
    writing,
)
from cloudpubsub.inspect.report import report
from cloudpubsub.inspect.spool import SpoolDirectory

__all__ = ["add_flags", "run"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_help(parser)
    add_spool_flags(parser)
    add_ring_flag(parser)


def run(args: argparse.Namespace) -> int:
    document = report(SpoolDirectory(args.directory, args.ring_dir))
    if args.json:
        write_json(document)
        return DONE
    with writing():
        for title, lines in _sections(document):
            print(title)
            for line in lines:
                print(f"  {line}")
    return DONE


def _sections(document: dict[str, Any]) -> list[tuple[str, list[str]]]:
    segments, quarantine, letters = document["segments"], document["quarantine"], document["dead_letters"]
    title = f"segments: {count(len(segments), 'file')}, {document['segment_bytes']:,} bytes"
    sections = [
        ("spool", _spool(document)),
        ("messages", _counters(document)),
        ("ring", _ring(document)),
        (f"{title}, {count(document['segment_messages'])}", [_segment(segment) for segment in segments]),
        ("losses", _losses(document.get("losses"))),
    ]
    if quarantine:
        sections.append(
            (
                f"quarantine: {count(len(quarantine), 'file')}, {sum(file['bytes'] for file in quarantine):,} bytes",
                [f"{shown(file['name'].encode(errors='surrogateescape'))}  {file['bytes']:,}" for file in quarantine],
            )
        )
    if letters["files"]:
        sections.append(("dead letters", _dead_letters(letters)))
    return sections


def _spool(document: dict[str, Any]) -> list[str]:
    meta = document["meta"]
    owner = {True: "in use", False: "not in use", None: "nobody can tell whether it is in use"}[document["in_use"]]
    if document["owner_pid"] is not None:
        owner += f", by process {document['owner_pid']}"
    lines = [f"directory      {document['directory']}", f"owner          {owner}"]
    lines.append(f"spool id       {document['spool_id'] or '-'}")
    if "epoch" not in meta:
        return [*lines, f"meta file      no valid slot ({' and '.join(meta['slots'])})"]
    closed = "clean" if meta["clean"] else "not clean: it is open, or was not closed"
    return [
        *lines,
        f"identity       {shown(document['identity'].encode()) or '-'}",
        f"epoch          {meta['epoch']} (times it was opened), generation {meta['generation']}",
        f"next position  {meta['next_position']}: nothing at or above it was ever issued",
        f"last close     {closed}",
        f"meta file      save {meta['sequence']}; slots {' and '.join(meta['slots'])}",
    ]


def _counters(document: dict[str, Any]) -> list[str]:
    counters = document["counters"]
    if counters is None:
        return ["not known"]
    source = "from the ring" if counters["from"] == "ring" else "from the meta file"
    if counters["from"] == "meta" and not document["meta"]["clean"]:
        source += ", as of its last save"
    lines = [source]
    for name, key in (
        ("published", "published"),
        ("acknowledged", "acked"),
        ("dropped", "dropped"),
        ("dead-lettered", "dead_lettered"),
    ):
        lines.append(f"{name:<14} {counters[key]:,} ({counters[key + '_bytes']:,} bytes)")
    lines.append(f"{'backlog':<14} {counters['backlog_messages']:,} ({counters['backlog_bytes']:,} bytes)")
    if counters["refused"]:
        lines.append(f"{'refused':<14} {counters['refused']:,} of those dropped ({counters['refused_bytes']:,} bytes)")
    cursors = ("head", "spilled", "position", "sent_max")
    lines.append(f"{'cursors':<14} {', '.join(f'{name} {counters[name]}' for name in cursors)}")
    ahead = ", ".join(f"{first} to {end}" for first, end in counters["settled_ahead"])
    return [*lines, f"{'settled ahead':<14} {ahead}"] if ahead else lines


def _ring(document: dict[str, Any]) -> list[str]:
    ring = document["ring"]
    if ring is None:
        return [f"none: {document['ring_missing']}"]
    share = 100 * ring["used_bytes"] // ring["bytes"]
    return [
        f"{ring['path']}, written by process {ring['writer_pid']}",
        f"{ring['used_bytes']:,} of {ring['bytes']:,} bytes in use ({share} %)",
        f"positions {ring['first']} to {ring['end']}",
    ]


def _segment(segment: dict[str, Any]) -> str:
    name = shown(segment["name"].encode(errors="surrogateescape"))
    if segment["kind"] != "segment":
        why = f": {segment['why']}" if "why" in segment else ""
        return f"{name}  {segment['kind']}{why}; {segment['file_bytes']:,} bytes"
    state = "sealed" if segment["sealed"] else "not sealed"
    if segment.get("torn_bytes"):
        state += f", {segment['torn_bytes']:,} torn bytes"
    if segment["damaged_bytes"]:
        state += f", {segment['damaged_bytes']:,} damaged bytes"
    return (
        f"{name}  {segment['base']} to {segment['end']}, {count(segment['messages'])}, {segment['bytes']:,} bytes, "
        f"{state}, file of {segment['file_bytes']:,} bytes, made {time_of(segment['made_ms'])}"
    )


def _losses(losses: dict[str, Any] | None) -> list[str]:
    if losses is None:
        return ["not known"]
    lines = [
        f"total  {count(total['messages'])}, {total['bytes']:,} bytes: {total['reason']}"
        for total in losses["by_reason"]
    ]
    if losses["uncertain"] is not None:
        first, end = losses["uncertain"]
        lines.append(f"positions {first} to {end} may be counted wrongly: what was in memory was lost")
    for loss in losses["entries"]:
        lines.append(
            f"{time_of(loss['time_ms'])}  {loss['first']} to {loss['end']}, {count(loss['messages'])}, "
            f"{loss['bytes']:,} bytes: {loss['reason']}"
        )
    return lines or ["none"]


def _dead_letters(letters: dict[str, Any]) -> list[str]:
    first, last = (None if letters[key] is None else round(1000 * letters[key]) for key in ("first_time", "last_time"))
    lines = [f"{count(letters['messages'])}, {letters['bytes']:,} bytes, {time_of(first)} to {time_of(last)}"]
    if letters["unreadable_lines"]:
        lines.append(f"{count(letters['unreadable_lines'], 'line')} cannot be read")
    return lines + [f"{number:,}: {shown(reason.encode())}" for reason, number in letters["reasons"].items()]
