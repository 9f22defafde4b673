"""Flags of the benchmarks.  Imports nothing that takes time: the command line makes them at each start."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

NUMBERS = ("ring_bytes", "segment_bytes", "max_inflight", "max_inflight_bytes")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those that every question takes."""
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows that it runs, not how fast")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each subject is measured, in turns")
    settings = parser.add_argument_group("settings", "of this library; not every one matters here")
    settings.add_argument("--payload-bytes", type=int, metavar="N", help="size of each payload")
    settings.add_argument("--directory", type=Path, metavar="DIR", help="where spools are made, and removed after")
    settings.add_argument("--durability", choices=("memory", "process", "power"))
    for name in NUMBERS:
        settings.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    settings.add_argument("--protocol", choices=("3.1.1", "5"))


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords for `cloudpubsub.Client` that the user gave."""
    names = ("durability", "protocol", *NUMBERS)
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
