"""`cloudpubsub sub`: print what arrives, and acknowledge it after it was printed."""

from __future__ import annotations

import argparse
import base64
import json
import logging
import os
import time

from cloudpubsub._errors import OptionError, TopicError, WaitTimeout
from cloudpubsub._message import Message
from cloudpubsub._topic import check_filter
from cloudpubsub.cli.common import (
    DONE,
    FAILED,
    add_connection_flags,
    add_help,
    connection_settings,
    count,
    make_client,
    positive_integer,
    say,
    seconds,
)
from cloudpubsub.cli.stop import Stop

__all__ = ["add_flags", "run"]

_LOOK_S = 0.5  # between looks for a refused subscription
_CLOSE_S = 5.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_help(parser)
    parser.add_argument(
        "-t", "--topic", metavar="FILTER", action="append", required=True, help="topic filter; may be repeated"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("-v", "--verbose", action="store_true", help="print the topic before the payload")
    shape.add_argument("--json", action="store_true", help="print a JSON object for each message")
    parser.add_argument("-C", metavar="COUNT", type=positive_integer, help="end after this many messages")
    parser.add_argument(
        "-W", metavar="SECONDS", type=seconds, help="end after this time; that is a failure if -C was not reached"
    )
    parser.add_argument(
        "-c",
        "--disable-clean-session",
        dest="keep_session",
        action="store_true",
        help="the broker keeps messages for us between runs; needs -i",
    )
    add_connection_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print until told to end.  0, or 1 if a subscription is refused, stdout fails, or -W comes before -C."""
    for topic_filter in args.topic:
        check_filter(topic_filter)
    if args.keep_session and args.id is None:
        raise OptionError("-c", "without -i", "a session that stays needs a client id to be found again")
    broker, settings = connection_settings(args)
    settings |= {
        # The id is that of the connection that subscribes.  A gateway's own settings in the environment are not ours.
        "client_id": None if args.id is None else f"{args.id}-pub",
        "subscribe_client_id": args.id,
        "clean_session": not args.keep_session,
        "session_expiry": None,
        "spool": None,
        "durability": "memory",
        "will": None,
        # A message that was not printed is never given up: see _Printer.
        "handler_retries": 1000,
    }
    if settings.get("clean_session") is False or (settings.get("session_expiry") or 0) > 0:
        settings["on_handler_failure"] = "disconnect"  # a clean session would not deliver it again
    with Stop() as stop:
        client = make_client(broker, settings)
        printer = _Printer(args, stop)
        try:
            for topic_filter in dict.fromkeys(args.topic):
                client.subscribe(topic_filter, printer.print)
            client.start()
            deadline_s = None if args.W is None else time.monotonic() + args.W
            while not stop.wait(_LOOK_S if deadline_s is None else min(_LOOK_S, deadline_s - time.monotonic())):
                if deadline_s is not None and time.monotonic() >= deadline_s:
                    break
                try:
                    client.wait_subscribed(0)
                except WaitTimeout:
                    pass  # offline; the client keeps trying and says so
                except TopicError as exc:
                    say(str(exc))
                    return FAILED
        finally:
            client.close(_CLOSE_S)
        return printer.code(is_signalled=stop.signal is not None)


class _End(Exception):
    """Raised in the handler so that the message is not acknowledged: it was not printed."""


class _Printer:
    """Writes messages to stdout, on the thread that runs handlers.

    When the count is reached or stdout is gone, it refuses every message.  The client would try again, and finds itself
    closed: those messages stay unacknowledged, and a session that is kept has them for the next run.
    """

    def __init__(self, args: argparse.Namespace, stop: Stop) -> None:
        self._format = _as_json if args.json else _with_topic if args.verbose else _plain
        self._count_max: int | None = args.C
        self._stop = stop
        self._is_over = False
        self._error: OSError | None = None
        self._last: Message | None = None
        self.printed = 0

    def print(self, message: Message) -> None:
        if message is self._last:
            return  # it matches several filters, and each of them calls
        if self._is_over:
            raise _End
        data = self._format(message)
        try:
            # Not through sys.stdout: a thread that hangs in it would keep the interpreter from ending.
            while data:
                data = data[os.write(1, data) :]
        except OSError as exc:
            self._error = exc
            self._end()
            raise _End from None
        self._last = message
        self.printed += 1
        if self.printed == self._count_max:
            self._end()

    def _end(self) -> None:
        self._is_over = True
        logging.getLogger("cloudpubsub").setLevel(logging.CRITICAL + 1)  # refusing is no news from here on
        self._stop.set()

    def code(self, *, is_signalled: bool) -> int:
        if self._error is not None and not isinstance(self._error, BrokenPipeError):
            say(f"stdout: {self._error.strerror}")
            return FAILED
        if self._error is not None or is_signalled:
            return DONE
        if self._count_max is not None and self.printed < self._count_max:
            say(f"only {count(self.printed)} of {self._count_max:,} came in time")
            return FAILED
        return DONE


def _plain(message: Message) -> bytes:
    return message.payload + b"\n"


def _with_topic(message: Message) -> bytes:
    return message.topic.encode() + b" " + message.payload + b"\n"


def _as_json(message: Message) -> bytes:
    document: dict[str, object] = {"topic": message.topic}
    try:
        document["payload"] = message.payload.decode()
    except UnicodeDecodeError:
        document["payload_base64"] = base64.b64encode(message.payload).decode()
    document |= {"qos": message.qos, "retain": message.retain}
    return json.dumps(document).encode() + b"\n"
