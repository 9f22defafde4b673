"""`cloudpubsub demo`."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from dataclasses import asdict
from typing import Any

from cloudpubsub.cli.common import DONE, FAILED, USAGE, add_help, say, write_json
from cloudpubsub.cli.stop import Stop

__all__ = ["add_flags", "run"]

_NEEDED = ("iotcore", "psutil", "rich")
_SECONDS_MIN, _SECONDS_MAX = 8.0, 300.0
_RATE_MIN, _RATE_MAX = 100.0, 20_000.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_help(parser)
    parser.add_argument("--seconds", type=_seconds, default=32.0, help="about how long it takes, 8 to 300 (32)")
    parser.add_argument("--rate", type=_rate, default=4_000.0, help="readings a second, 100 to 20000 (4000)")
    parser.add_argument("--json", action="store_true", help="verdict on stdout as JSON, progress on stderr")


def _number(text: str, least: float, most: float) -> float:
    value = float(text)
    if not (math.isfinite(value) and least <= value <= most):
        raise argparse.ArgumentTypeError(f"{text} is not {least:g} to {most:g}")
    return value


def _seconds(text: str) -> float:
    return _number(text, _SECONDS_MIN, _SECONDS_MAX)


def _rate(text: str) -> float:
    return _number(text, _RATE_MIN, _RATE_MAX)


def run(args: argparse.Namespace) -> int:
    """Tell the story.  0 if nothing was lost or out of order, 1 otherwise; 128 and the number of a signal that came."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        say(f"the demo needs {', '.join(missing)}, which come with: pip install 'cloudpubsub[demo]'")
        return USAGE
    from cloudpubsub.demo.screen import LiveScreen, PlainScreen, verdict_lines
    from cloudpubsub.demo.story import DemoError, Interrupted, Story

    document: dict[str, Any] = {"ok": False}
    code = FAILED
    is_live = not args.json and sys.stdout.isatty()
    with Stop() as stop:
        screen = LiveScreen() if is_live else PlainScreen(sys.stderr if args.json else sys.stdout)
        try:
            with screen:
                story = Story(args.seconds, args.rate, stop, screen.show)
                verdict = story.tell()
            is_good = verdict.is_good and bool(story.figures["is_flushed"])
            code = DONE if is_good else FAILED
            document = {"ok": is_good, **asdict(verdict), **story.figures}
            if not args.json:
                screen.tell(verdict_lines(verdict, story.figures, is_good), is_good)
        except Interrupted:
            assert stop.signal is not None
            code = 128 + stop.signal
            document["interrupted"] = stop.signal.name
            say(f"ended by {stop.signal.name}, without a verdict")
        except (DemoError, RuntimeError, OSError) as exc:
            document["error"] = str(exc)
            say(f"the demo failed: {exc}")
    if args.json:
        write_json(document)
    return code
