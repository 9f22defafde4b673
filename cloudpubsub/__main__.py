"""The command line: `cloudpubsub COMMAND`, also `python -m cloudpubsub COMMAND`.

Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Protocol

from cloudpubsub import Error, OptionError, TopicError, __version__
from cloudpubsub.cli import bench, dead, dump, inspect, pub, repair, sub, top, verify
from cloudpubsub.cli.common import FAILED, USAGE, say
from cloudpubsub.demo import command as demo

__all__ = ["main"]


class _Command(Protocol):
    def add_flags(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> int: ...


_COMMANDS: dict[str, tuple[_Command, str]] = {
    "demo": (demo, "the whole story on an embedded broker: outages, kill -9, a restart, and a verdict"),
    "pub": (pub, "publish a message, or each line of stdin, durably"),
    "sub": (sub, "print messages, and acknowledge them after that"),
    "top": (top, "watch a spool that is in use"),
    "inspect": (inspect, "tell what is in a spool, in use or not"),
    "verify": (verify, "check every byte of a spool, in use or not"),
    "dump": (dump, "print the messages of a spool, in use or not"),
    "dead": (dead, "print the dead letters of a spool, or publish them again"),
    "bench": (bench, "measure how fast this library is on this machine, with your settings"),
    "repair": (repair, "make a damaged copy of a spool clean"),
}


def _open_standard_files() -> None:
    """Where one of the three is closed, the next file that is opened would take its place."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - for good


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (argparse itself ends wrong usage with 2)."""
    parser = argparse.ArgumentParser(
        prog="cloudpubsub",
        description="Reliable MQTT transfer of telemetry over unreliable networks.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cloudpubsub {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, (module, text) in _COMMANDS.items():
        # Each command says its own --help, because -h is the host.
        module.add_flags(
            commands.add_parser(
                name, help=text, description=f"{text[0].upper()}{text[1:]}.", add_help=False, allow_abbrev=False
            )
        )
    _open_standard_files()
    args = parser.parse_args(argv)
    try:
        return _COMMANDS[args.command][0].run(args)
    except (OptionError, TopicError) as exc:
        say(str(exc))
        return USAGE
    except (Error, OSError) as exc:
        say(str(exc))
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
