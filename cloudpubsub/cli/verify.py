"""`cloudpubsub verify`: check every byte of a spool, which may be in use, and list what is damaged."""

from __future__ import annotations

import argparse

from cloudpubsub.cli.common import (
    DONE,
    FAILED,
    add_help,
    add_ring_flag,
    add_spool_flags,
    count,
    write_json,
    writing,
)
from cloudpubsub.inspect.check import Finding, SpoolCheck, check_spool
from cloudpubsub.inspect.spool import SpoolDirectory

__all__ = ["add_flags", "run", "write_check"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_help(parser)
    add_spool_flags(parser)
    add_ring_flag(parser)


def run(args: argparse.Namespace) -> int:
    """0 if nothing is damaged, 1 otherwise.  What a crash leaves and the next open deals with is no damage."""
    check = check_spool(SpoolDirectory(args.directory, args.ring_dir))
    if args.json:
        write_json(
            {
                "ok": check.is_clean,
                "files": check.files,
                "bytes": check.bytes,
                "messages": check.messages,
                "ring_messages": check.ring_messages,
                "damage": [finding._asdict() for finding in check.findings],
                "more_damage": check.more_findings,
                "notes": check.notes,
            }
        )
    else:
        write_check(check)
    return DONE if check.is_clean else FAILED


def write_check(check: SpoolCheck) -> None:
    """For people."""
    with writing():
        for finding in check.findings:
            print(_line(finding))
        if check.more_findings:
            print(f"... and {check.more_findings:,} more")
        for note in check.notes:
            print(f"note: {note}")
        looked = f"{count(check.messages)} in {count(check.files, 'file')}, {check.bytes:,} bytes"
        if check.ring_messages:
            looked += f"; {count(check.ring_messages)} in the ring"
        number = len(check.findings) + check.more_findings
        print(f"clean: {looked}" if check.is_clean else f"damaged in {count(number, 'place')}: {looked}")


def _line(finding: Finding) -> str:
    parts = [finding.what]
    if finding.first is not None:
        parts.append(f"positions {finding.first} to {finding.end}")
    if finding.offset is not None:
        parts.append(f"{count(finding.bytes, 'byte')} at offset {finding.offset:,}")
    if finding.messages:
        parts.append(f"about {count(finding.messages)} lost")
    return f"{finding.file}: {'; '.join(parts)}"
