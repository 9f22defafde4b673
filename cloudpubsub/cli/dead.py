"""`cloudpubsub dead`: print the dead letters of a spool, which may be in use, or publish them again."""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloudpubsub._client import Client
from cloudpubsub._dead_letters import append_letter
from cloudpubsub._errors import ClosedError, DeliveryFailed, Error, SpoolFull, WaitTimeout
from cloudpubsub.cli.common import (
    DONE,
    FAILED,
    add_connection_flags,
    add_help,
    add_spool_flags,
    connection_settings,
    count,
    make_client,
    say,
    seconds,
    shown,
    time_of,
    write_json,
    writing,
)

__all__ = ["add_flags", "run"]

_FILES = ("dead-letters.jsonl.1", "dead-letters.jsonl")  # oldest first
_SENDING = ".sending"  # behind the name of a file whose letters are being published again
_CLOSE_S = 1.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_help(parser)
    add_spool_flags(parser)
    parser.add_argument(
        "--republish",
        action="store_true",
        help="publish those that the broker had refused again, and remove the ones that are acknowledged now",
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, default=30.0, help="how long to wait for acknowledgements (30)"
    )
    add_connection_flags(parser)


def run(args: argparse.Namespace) -> int:
    """0; with --republish 1 if letters are left that should have been delivered."""
    directory = Path(args.directory)
    if not directory.is_dir():
        say(f"{directory}: there is no such directory")
        return FAILED
    if args.republish:
        return _republish(directory, args)
    with writing():
        for name in (*(f"{name}{_SENDING}" for name in _FILES), *_FILES):
            for line in _lines(directory / name):
                print(line.decode().rstrip("\n") if args.json else _text(line))
    return DONE


def _lines(path: Path) -> Iterator[bytes]:
    """Whole lines; a crash may have left the last one half written."""
    try:
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
    except FileNotFoundError:
        return


def _text(line: bytes) -> str:
    """Time, direction, topic, payload, and why it is here."""
    try:
        letter = json.loads(line)
        payload = base64.b64decode(letter["payload"])
        when = time_of(round(letter["time"] * 1000))
        parts = [when, letter["direction"], letter["topic"], shown(payload), letter["reason"]]
    except (ValueError, KeyError, TypeError, binascii.Error):
        return f"not a dead letter: {shown(line)}"
    return "\t".join(parts)


# ---- again


def _republish(directory: Path, args: argparse.Namespace) -> int:
    broker, settings = connection_settings(args)
    settings.update(client_id=args.id or f"cloudpubsub-dead-{secrets.token_hex(4)}", on_full="block")
    settings["block_timeout"] = args.timeout
    done = left = 0
    client = make_client(broker, settings)
    with contextlib.closing(_Closing(client)), _alone(directory) as is_alone:
        if not is_alone:
            say(f"{directory}: another process is publishing these letters again")
            return FAILED
        client.start()
        for name in _FILES:
            for path in _set_aside(directory / name):
                lines = list(_lines(path))
                delivered, kept = _send(client, lines, args.timeout)
                # A gateway that had the file open when it got its other name may have written to it since.
                late = list(_lines(path))[len(lines) :]
                # Only what is in the file again may go from here.
                for line in (*kept, *late):
                    append_letter(directory / _FILES[-1], line, is_synced=True)
                path.unlink()
                done += delivered
                left += sum(_is_published(line) for line in (*kept, *late))
    error = client.stats().last_error
    if args.json:
        write_json({"ok": not left, "delivered": done, "left": left, "last_error": error})
    else:
        print(f"{count(done)} delivered, {left:,} left" + (f" ({error})" if left and error else ""))
    return FAILED if left else DONE


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[bool]:
    """Whether no other run is at these letters, which would send them twice and remove what this one has set aside."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


class _Closing:
    def __init__(self, client: Client) -> None:
        self._client = client

    def close(self) -> None:
        self._client.close(_CLOSE_S)


def _set_aside(path: Path) -> Iterator[Path]:
    """What an earlier run left behind, then this file under another name: a gateway that runs may go on writing."""
    aside = path.with_name(path.name + _SENDING)
    if aside.exists():
        yield aside
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    yield aside


def _is_published(line: bytes) -> bool:
    try:
        return bool(json.loads(line)["direction"] == "published")
    except (ValueError, KeyError, TypeError):
        return False


def _send(client: Client, lines: list[bytes], timeout_s: float) -> tuple[int, list[bytes]]:
    """How many were delivered, and the lines to keep."""
    sent: list[tuple[int, bytes]] = []
    kept: list[bytes] = []
    is_full = False  # of memory, which nobody empties: the rest would wait in vain too
    for line in lines:
        try:
            if is_full:
                kept.append(line)
                continue
            sent.append((_publish(client, json.loads(line)), line))
        except (Error, ValueError, KeyError, TypeError, binascii.Error) as exc:
            is_full = isinstance(exc, SpoolFull)
            if _is_published(line):
                say(f"not sent again: {exc}")
            kept.append(line)
    with contextlib.suppress(WaitTimeout, ClosedError):
        client.flush(timeout_s)
    for position, line in sent:
        try:
            client.wait(position, 0)
        except (DeliveryFailed, WaitTimeout, ClosedError):
            kept.append(line)
    return len(lines) - len(kept), kept


def _publish(client: Client, letter: dict[str, Any]) -> int:
    if letter["direction"] != "published":
        raise ValueError("it was received, not published")
    payload = base64.b64decode(letter["payload"], validate=True)
    if len(payload) != letter["payload_bytes"]:
        raise ValueError(f"only {len(payload):,} of {letter['payload_bytes']:,} bytes of its payload were kept")
    properties = [(name, value) for name, value in letter.get("user_properties", ())]
    return client.publish(
        letter["topic"],
        payload,
        retain=letter.get("retain", False),
        user_properties=properties or None,
    )
