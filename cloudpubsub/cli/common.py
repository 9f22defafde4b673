"""Flags and manners that the commands share.  The letters are those of mosquitto's clients."""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from cloudpubsub._address import redact
from cloudpubsub._client import Client
from cloudpubsub._errors import OptionError
from cloudpubsub._tls import TLS

__all__ = [
    "DONE",
    "FAILED",
    "USAGE",
    "add_connection_flags",
    "add_help",
    "add_ring_flag",
    "add_spool_flags",
    "connection_settings",
    "count",
    "make_client",
    "positive_integer",
    "say",
    "seconds",
    "shown",
    "time_of",
    "whole_number",
    "write_json",
    "writing",
]

DONE, FAILED, USAGE = 0, 1, 2


def add_help(parser: argparse.ArgumentParser) -> None:
    """`--help` without a letter: `-h` is the host."""
    parser.add_argument("--help", action="help", help="show this text and end")


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "connection",
        "What is not given is taken from CLOUDPUBSUB_* variables: CLOUDPUBSUB_PASSWORD, for one, or CLOUDPUBSUB_BROKER "
        "with a URL that also says wss:// for a WebSocket.",
    )
    group.add_argument("-h", "--host", metavar="HOST", help="broker (localhost)")
    group.add_argument("-p", "--port", metavar="PORT", type=int, help="its port (1883; 8883 with TLS)")
    group.add_argument("-i", "--id", metavar="ID", help="MQTT client id")
    group.add_argument("-u", "--username", metavar="USER", help="user name")
    group.add_argument("-P", "--pw", metavar="PASSWORD", dest="password", help="password; others see it in `ps`")
    group.add_argument("--cafile", metavar="FILE", help="use TLS and trust the certificates in this file")
    group.add_argument("--cert", metavar="FILE", help="use TLS with this client certificate")
    group.add_argument("--key", metavar="FILE", help="private key of --cert, if it is in a file of its own")
    group.add_argument("--tls-use-os-certs", action="store_true", help="use TLS and trust what the system trusts")


def add_spool_flags(parser: argparse.ArgumentParser) -> None:
    """A spool to look into."""
    parser.add_argument("directory", metavar="DIR", help="the spool's directory, in use or not, or a copy of it")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_ring_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ring-dir",
        metavar="DIR",
        help="where the ring of the spool lies; without it, where its owner has it, $RUNTIME_DIRECTORY and /dev/shm",
    )


def connection_settings(args: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """Broker URL (None: from the environment) and settings of `Options` as the flags say."""
    settings: dict[str, Any] = {}
    if args.username is not None:
        settings["username"] = args.username
    if args.password is not None:
        settings["password"] = args.password
    uses_tls = bool(args.cafile or args.cert or args.key or args.tls_use_os_certs)
    if uses_tls:
        settings["tls"] = TLS(ca=args.cafile, cert=args.cert, key=args.key)
    is_given = args.host is not None or args.port is not None or uses_tls
    if not is_given and os.environ.get("CLOUDPUBSUB_BROKER"):
        return None, settings
    host = args.host if args.host is not None else "localhost"
    if not host or any(letter in host for letter in "/@?#"):
        raise OptionError("--host", repr(redact(host)), "expected a host name or an IP address")
    host = f"[{host}]" if ":" in host else host
    port = args.port if args.port is not None else 8883 if uses_tls else 1883
    return f"{'mqtts' if uses_tls else 'mqtt'}://{host}:{port}", settings


def make_client(broker: str | None, settings: dict[str, Any]) -> Client:
    """A client that talks on stderr.  That it has no spool is what the command said, so it is not said again."""
    logger = logging.getLogger("cloudpubsub")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.WARNING if settings.get("spool") else logging.ERROR)
    try:
        return Client(broker, **settings)
    finally:
        logger.setLevel(logging.WARNING)


def say(text: str) -> None:
    """A line to the human, on stderr."""
    try:
        print(f"cloudpubsub: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody reads; the exit code still tells


@contextmanager
def writing() -> Iterator[None]:
    """For a block that prints: it is written out at the end, and left early when nobody reads any more."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no reason to fail
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever asked is gone.  Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def write_json(document: object) -> None:
    """One line of JSON on stdout."""
    with writing():
        print(json.dumps(document))


def shown(data: bytes) -> str:
    """Bytes on one line of a terminal: text as it is, anything else, and the backslash, escaped as in Python."""
    text = data.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(letter if letter.isprintable() and letter != "\\" else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    number = ord(letter)
    # What is no UTF-8 was decoded to these.
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else letter.encode("unicode_escape").decode()


def time_of(milliseconds: int | None) -> str:
    """A time since 1970, in UTC; `-` for one that is not known, or that no calendar has."""
    try:
        if milliseconds is None:
            return "-"
        at = datetime.fromtimestamp(milliseconds / 1000, timezone.utc)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return "-"


def count(number: int, what: str = "message") -> str:
    """`1 message`, `2,000 messages`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def seconds(text: str) -> float:
    """A finite number of seconds, 0 or more; for argparse."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError
    return value


def whole_number(text: str) -> int:
    """0 or more; for argparse."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def positive_integer(text: str) -> int:
    """1 or more; for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value
