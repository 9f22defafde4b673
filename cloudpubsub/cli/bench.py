"""`cloudpubsub bench`: how fast this library is on this machine, with your settings."""

from __future__ import annotations

import argparse
from pathlib import Path

from cloudpubsub.bench import _flags
from cloudpubsub.cli.common import DONE, USAGE, add_help, say


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_help(parser)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which questions; `--list` names them (default: all)")
    parser.add_argument("--list", action="store_true", help="name the questions and exit")
    parser.add_argument(
        "--peers", action="store_true", help="measure other libraries too, where they are installed (about ten minutes)"
    )
    parser.add_argument("--broker", metavar="BROKER", help="mosquitto, rumqttd, sink, or mqtt://HOST:PORT")
    parser.add_argument("--tls", action="store_true", help="over TLS (not with mqtt://HOST:PORT)")
    parser.add_argument("--messages", type=int, metavar="N", help="per measurement")
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep results.json, results.md and plots there")
    _flags.add_flags(parser)


def run(args: argparse.Namespace) -> int:
    from cloudpubsub.bench import _suite

    if args.list:
        for name in _suite.QUESTIONS:
            print(f"{name:12} {_suite.title_of(name)}")
        return DONE
    wrong = sorted(set(args.names) - set(_suite.QUESTIONS))
    if wrong:
        say(f"no such benchmark: {', '.join(wrong)}; there are: {', '.join(_suite.QUESTIONS)}")
        return USAGE
    code: int = _suite.run(args)
    return code
