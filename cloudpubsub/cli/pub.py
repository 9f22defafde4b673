"""`cloudpubsub pub`: publish a message, or each line of stdin, through a durable spool."""

from __future__ import annotations

import argparse
import os
import select
import time
from collections.abc import Iterator
from typing import Any

from cloudpubsub._client import Client
from cloudpubsub._errors import SpoolFull, WaitTimeout
from cloudpubsub._topic import check_topic
from cloudpubsub.cli.common import (
    DONE,
    FAILED,
    add_connection_flags,
    add_help,
    connection_settings,
    count,
    make_client,
    say,
    seconds,
    write_json,
)
from cloudpubsub.cli.stop import Stop

__all__ = ["add_flags", "run"]

_CHUNK_BYTES = 64 * 1024
_SLICE_S = 0.2  # between looks for a request to end
_INTERRUPTED_WAIT_S = 1.0
_CLOSE_S = 10.0
_CLOSE_WITHOUT_SPOOL_S = 1.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_help(parser)
    parser.add_argument("-t", "--topic", metavar="TOPIC", required=True, help="topic to publish to")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-l", "--stdin-line", dest="lines", action="store_true", help="each line of stdin is a message")
    what.add_argument("-m", "--message", metavar="MESSAGE", help="publish this one message")
    parser.add_argument(
        "-r", "--retain", action="store_true", help="the broker keeps the message for later subscribers"
    )
    parser.add_argument(
        "--spool",
        metavar="DIR",
        help="keep what is not acknowledged in this directory, through crashes too, and send what is there from "
        "earlier runs; without it messages are in memory only",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=30.0,
        help="how long to wait for acknowledgements after the last message (30)",
    )
    parser.add_argument("--json", action="store_true", help="report on stdout as JSON")
    add_connection_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Publish.  0 when everything, also from earlier runs, is acknowledged; else 1."""
    check_topic(args.topic)
    broker, settings = connection_settings(args)
    settings["on_full"] = "block"
    settings["block_timeout"] = _SLICE_S
    if args.id is not None:
        settings["client_id"] = args.id
    if args.spool is not None:
        settings["spool"] = args.spool
    with Stop() as stop:
        client = make_client(broker, settings)
        try:
            tally = _Tally(client, args)
            client.start()
            tally.publish_all(stop)
            tally.wait(stop, args.timeout)
        finally:
            # Without a spool all the waiting was done above, as long as the user wanted it.
            unsaved = client.close(_CLOSE_S if args.spool is not None else _CLOSE_WITHOUT_SPOOL_S)
        return tally.report(unsaved)


class _Tally:
    """What a run read, and what became of it."""

    def __init__(self, client: Client, args: argparse.Namespace) -> None:
        self._client = client
        self._args = args
        self._before = client.stats()
        self._is_waiting = False
        self.published = 0
        self.too_long = 0
        self.not_taken = 0

    def publish_all(self, stop: Stop) -> None:
        """Until the input ends or `stop` is set.  What the spool has no room for waits, and so does the input."""
        limit_bytes = self._client.options.max_payload_bytes
        lines = _lines(stop, limit_bytes) if self._args.lines else iter([os.fsencode(self._args.message)])
        for line in lines:
            if line is None or len(line) > limit_bytes:
                self.too_long += 1
                say(f"message {self.published + self.too_long:,} left out: longer than {limit_bytes:,} bytes")
            elif not self._publish(line, stop):
                self.not_taken += 1
                return

    def _publish(self, line: bytes, stop: Stop) -> bool:
        while True:
            try:
                self._client.publish(self._args.topic, line, retain=self._args.retain)
            except SpoolFull:
                if not self._is_waiting:
                    self._is_waiting = True
                    say(f"no room for more messages; reading goes on when there is ({self._state()})")
                if stop.is_set:
                    return False
                continue
            self._is_waiting = False
            self.published += 1
            return True

    def wait(self, stop: Stop, timeout_s: float) -> None:
        """Until everything is acknowledged; a signal makes it short."""
        deadline_s = time.monotonic() + timeout_s
        is_short = False
        while True:
            now_s = time.monotonic()
            if not is_short and stop.is_set:
                is_short = True
                deadline_s = min(deadline_s, now_s + _INTERRUPTED_WAIT_S)
            try:
                self._client.flush(min(_SLICE_S, max(0.0, deadline_s - now_s)))
                return
            except WaitTimeout:
                if now_s >= deadline_s:
                    return

    def _state(self) -> str:
        stats = self._client.stats()
        return "connected" if stats.connected else f"offline: {stats.last_error or 'not connected yet'}"

    def report(self, unsaved: int) -> int:
        """Say what is not acknowledged.  Returns the exit code; the client is closed."""
        now, before = self._client.stats(), self._before
        ended = now.dropped + now.dead_lettered - before.dropped - before.dead_lettered
        unacknowledged = now.backlog_messages
        spool = self._client.options.spool
        lost = unsaved if spool is not None else unacknowledged
        code = FAILED if unacknowledged or ended or self.too_long or self.not_taken else DONE
        why = f" ({now.last_error})" if now.last_error else ""
        if unacknowledged > lost:
            say(f"{count(unacknowledged - lost)} not acknowledged: kept in {spool} for the next run{why}")
        if lost:
            say(f"{count(lost)} not acknowledged and lost{why}")
        if ended:
            say(f"{count(ended)} given up")
        if self.not_taken:
            say("stopped with a line for which there was no room; it was not published")
        if self._args.json:
            self._write(code, now.acked - before.acked, unacknowledged, lost, ended, now.last_error)
        return code

    def _write(self, code: int, acked: int, unacknowledged: int, lost: int, ended: int, error: str) -> None:
        document: dict[str, Any] = {
            "ok": code == DONE,
            "published": self.published,
            "from_earlier_runs": self._before.backlog_messages,
            "acknowledged": acked,
            "unacknowledged": unacknowledged,
            "lost": lost,
            "given_up": ended,
            "too_long": self.too_long,
            "not_taken": self.not_taken,
            "last_error": error,
        }
        write_json(document)


def _lines(stop: Stop, limit_bytes: int) -> Iterator[bytes | None]:
    """Lines of descriptor 0 as they come, without the newline; None for one of more than `limit_bytes`.

    Never holds much more than the longest line allowed.  Ends with the input or when `stop` is set.
    """
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(stop, select.POLLIN)
    held: list[bytes] = []  # the line that has not ended yet
    held_bytes = 0
    while True:
        ready = [descriptor for descriptor, _ in poller.poll()]
        if 0 not in ready or stop.fileno() in ready:
            break
        try:
            data = os.read(0, _CHUNK_BYTES)
        except OSError as exc:
            say(f"stdin: {exc.strerror}")
            break
        if not data:
            break
        first, *others = data.split(b"\n")
        for number, part in enumerate([first, *others]):
            if number:
                yield b"".join(held) if held_bytes <= limit_bytes else None
                held, held_bytes = [], 0
            held_bytes += len(part)
            if held_bytes <= limit_bytes and part:
                held.append(part)
            elif part:
                held.clear()
    if held_bytes and not stop.is_set:
        yield b"".join(held) if held_bytes <= limit_bytes else None
