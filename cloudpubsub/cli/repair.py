"""`cloudpubsub repair`: make a damaged copy of a spool clean, and say what that costs."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from cloudpubsub.cli.common import DONE, FAILED, add_help, add_spool_flags, count, write_json, writing
from cloudpubsub.cli.verify import write_check
from cloudpubsub.inspect.check import SpoolCheck, check_spool
from cloudpubsub.inspect.repair import Repaired, repair
from cloudpubsub.inspect.spool import SpoolDirectory

__all__ = ["add_flags", "run"]

_META = {
    "kept": "kept as it is",
    "cleaned": "a damaged slot, or figures that the segments prove wrong, are mended",
    "updated": "what was lost is in its ledger",
    "made anew": "made anew from the segments; the identity, the counters and how far it was acknowledged are lost",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_help(parser)
    add_spool_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="change nothing, and tell what would be done")


def run(args: argparse.Namespace) -> int:
    """0 when the spool is clean now (or would be); 1 if a process owns it, or the disk fails."""
    spool = SpoolDirectory(args.directory)
    done = repair(spool, is_dry=args.dry_run)
    check = None if args.dry_run else check_spool(spool)
    is_clean = check is None or check.is_clean
    if args.json:
        write_json({"ok": is_clean, "dry_run": args.dry_run, **asdict(done)})
    else:
        _write(done, args.dry_run, check)
    return DONE if is_clean else FAILED


def _write(done: Repaired, is_dry: bool, check: SpoolCheck | None) -> None:
    with writing():
        if not done.has_done:
            print("nothing to repair")
        for name in done.rewritten:
            print(f"log/{name}: {'to be written' if is_dry else 'written'} anew without what is damaged")
        for name in done.made:
            print(f"log/{name}: {'would be made' if is_dry else 'made'}")
        for name in done.quarantined:
            print(f"{name}: {'would be put there' if is_dry else 'put there'}")
        if done.meta != "kept":
            print(f"meta: {_META[done.meta]}")
        print(f"kept: {count(done.kept_messages)}, {done.kept_bytes:,} bytes")
        ranges = f"; {count(done.damaged_ranges, 'damaged range')} of {done.damaged_bytes:,} bytes"
        counted = ", counted as dropped" if done.lost_messages else ""
        print(f"lost: about {count(done.lost_messages)}, {done.lost_bytes:,} bytes{counted}{ranges}")
        print(f"quarantined: {count(len(done.quarantined), 'file')}, {done.quarantined_bytes:,} bytes")
    if check is not None and not check.is_clean:
        write_check(check)
