"""A telemetry gateway: readings of this host go to the cloud, commands come back and are answered.

    gateway.py CONFIGURATION.toml

The file's table [gateway] is described in `Settings`, [cloudpubsub] in `cloudpubsub.Options`.

Topics, under the client id or `topic`:
    …/telemetry/GROUP   a JSON object: `run` and `number` say which sweep it belongs to, so that a consumer sees gaps
    …/command/NAME      for us: a JSON object with an `id`; NAME is `interval` (with `seconds`), `read` or `stats`
    …/answer            a JSON object with that `id`: `ok`, and `result` or `error`

Signals: SIGTERM and SIGINT save what could not be sent and end; SIGPWR (the supply fails) brings all that is in memory
to the disk at once; SIGUSR1 (the network is back, says a hook) ends the pause before the next attempt to connect.

Exit codes: 0 everything is sent or saved, 1 it is not, 2 the configuration is wrong.
"""

from __future__ import annotations

import json
import logging
import queue
import secrets
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from notify import notify, watchdog_s
from readings import Readings

import cloudpubsub

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

log = logging.getLogger("gateway")

_SIGNALS: dict[int, str] = {
    signal.SIGTERM: "stop",
    signal.SIGINT: "stop",
    signal.SIGPWR: "power fails",
    signal.SIGUSR1: "network",
}


@dataclass(frozen=True)
class Settings:
    """The table [gateway] of the configuration.  Raises ValueError for what is not allowed."""

    #: Seconds between two sweeps over all readings; the command `interval` changes it until the next start.
    interval: float = 10.0
    #: What topics begin with.  None: the client id.
    topic: str | None = None
    #: Seconds that the end may take; well below TimeoutStopSec of the unit.
    stop_timeout: float = 20.0
    #: Seconds without a single acknowledgement on a connection that is up, with messages waiting, after which the
    #: watchdog is not fed any more.
    stall_after: float = 300.0
    #: Seconds that one thread of the client may be at the same thing before that happens.
    stuck_after: float = 60.0
    #: Where /proc and /sys are.
    root: str = "/"

    def __post_init__(self) -> None:
        for name in ("interval", "stop_timeout", "stall_after", "stuck_after"):
            object.__setattr__(self, name, seconds(name, getattr(self, name)))
        is_text = isinstance(self.topic, str) and self.topic != ""
        if self.topic is not None and (not is_text or set("#+\0") & set(self.topic)):
            raise ValueError(f"topic: {self.topic!r} is not allowed; expected text without wildcards")

    @classmethod
    def from_toml(cls, path: str) -> Settings:
        with open(path, "rb") as file:
            table = tomllib.load(file).get("gateway", {})
        known = {field.name for field in fields(cls)}
        if unknown := set(table) - known:
            raise ValueError(f"[gateway]: {', '.join(sorted(unknown))}: not known; there is {', '.join(sorted(known))}")
        return cls(**table)


def seconds(name: str, value: object) -> float:
    """A setting in seconds.  Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.05 <= value <= 86_400:
        raise ValueError(f"{name}: {value!r} is not allowed; expected 0.05 to 86400 seconds")
    return float(value)


class PublishPath:
    """Whether messages still get out, as far as that is in our hands: what the watchdog is fed for.

    An outage is no reason for a restart, nor is a broker that refuses us or a disk that fails: a restart would change
    nothing and cost readings.  A thread that has ended or is stuck is, and so is a connection that is up and on which,
    with messages waiting, nothing is acknowledged for `stall_after` seconds.
    """

    def __init__(
        self, client: cloudpubsub.Client, settings: Settings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._settings = settings
        self._clock = clock
        self._acked = -1
        self._moved_s = 0.0

    def problem(self) -> str | None:
        """Why a restart is called for; None: it is not."""
        health = self._client.health(self._settings.stuck_after)
        if health.needs_restart:
            return "; ".join(health.problems)
        stats = self._client.stats()
        now_s = self._clock()
        waits = stats.connected and stats.backlog_messages > 0
        if not waits or stats.acked != self._acked:
            self._acked, self._moved_s = stats.acked, now_s
        if now_s - self._moved_s < self._settings.stall_after:
            return None
        return f"connected, but nothing was acknowledged for {now_s - self._moved_s:.0f} s"


class Gateway:
    """Runs on the main thread; handlers and signals only put a word into its queue, which both may do at any moment."""

    def __init__(self, settings: Settings, options: cloudpubsub.Options) -> None:
        self._settings = settings
        self._topic = settings.topic or options.client_id
        self._interval_s = settings.interval
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._readings = Readings(settings.root, options.spool or "/")
        self._run = secrets.token_hex(4)
        self._number = 0
        self._client = cloudpubsub.Client(options=options)
        self._path = PublishPath(self._client, settings)
        self._problem: str | None = None

    def run(self) -> int:
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        self._client.subscribe(f"{self._topic}/command/+", self._on_command)
        self._client.start()  # without a broker too: it keeps trying
        watchdog = watchdog_s()
        pause_s = min(5.0, watchdog / 4 if watchdog else 5.0)
        notify("READY=1", self._status())
        sweep_s = feed_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            if now_s >= feed_s:
                self._feed(watchdog is not None)
                feed_s = now_s + pause_s
            if now_s >= sweep_s:
                self._sweep()
                sweep_s = max(sweep_s + self._interval_s, time.monotonic())  # what was missed is not made up for
            try:
                event = self._events.get(timeout=max(0.0, min(sweep_s, feed_s) - time.monotonic()))
            except queue.Empty:
                continue
            if event == "stop":
                return self._stop()
            if event == "power fails":
                self._save_now()
            elif event == "network":
                self._client.network_changed()
            else:  # "read", or another interval: now, and then at that pace
                sweep_s = time.monotonic()

    def _on_signal(self, number: int, _frame: object) -> None:
        self._events.put(_SIGNALS[number])

    def _sweep(self) -> None:
        self._number += 1
        head = {"run": self._run, "number": self._number, "time_ms": time.time_ns() // 1_000_000}
        for name, values in self._readings.sweep():
            self._publish(f"telemetry/{name}", {**head, **values})

    def _publish(self, topic: str, document: dict[str, Any]) -> None:
        try:
            self._client.publish(f"{self._topic}/{topic}", json.dumps(document))
        except (cloudpubsub.SpoolFull, cloudpubsub.PayloadTooLarge, cloudpubsub.TopicError) as exc:
            log.error("%s: not published: %s", topic, exc)

    def _on_command(self, message: cloudpubsub.Message) -> None:
        """On the thread for handlers.  It may come twice, as every message at QoS 1: all of them can be done again."""
        command, asked = message.topic.rsplit("/", 1)[1], None
        try:
            asked = json.loads(message.payload)
            answer: dict[str, Any] = {"ok": True, "result": self._do(command, asked)}
        except (ValueError, TypeError, KeyError) as exc:
            answer = {"ok": False, "error": f"{type(exc).__name__}: {exc}"[:500]}
        request = asked.get("id") if isinstance(asked, dict) else None
        self._publish("answer", {"id": request, "command": command, **answer})

    def _do(self, command: str, asked: dict[str, Any]) -> Any:
        if command == "interval":
            self._interval_s = seconds("seconds", asked["seconds"])
            self._events.put("read")
            return {"seconds": self._interval_s}
        if command == "read":
            self._events.put("read")
            return None
        if command == "stats":
            stats = self._client.stats()
            return {field.name: getattr(stats, field.name) for field in fields(stats)} | {
                "drain_seconds": min(stats.drain_seconds, 1e9),  # JSON has no infinity
                "interval": self._interval_s,
            }
        raise ValueError(f"{command}: no such command")

    def _feed(self, is_watched: bool) -> None:
        problem = self._path.problem()
        if problem != self._problem and problem is not None:
            log.error("the watchdog is not fed any more: %s", problem)
        self._problem = problem
        lines = [self._status()]
        if is_watched and problem is None:
            lines.append("WATCHDOG=1")
        notify(*lines)

    def _status(self) -> str:
        """A line for `systemctl status`."""
        stats, problems = self._client.stats(), self._client.health(self._settings.stuck_after).problems
        line = f"{'connected' if stats.connected else 'offline'}, {stats.backlog_messages} messages waiting"
        if stats.oldest_age_seconds >= 1:
            line += f", the oldest for {stats.oldest_age_seconds:.0f} s"
        return "STATUS=" + "; ".join([line, *problems]).replace("\n", " ")

    def _save_now(self) -> None:
        try:
            log.warning("the supply fails: all is on the disk after %.3f s", self._client.flush_now(timeout=5.0))
        except (cloudpubsub.Error, ValueError) as exc:
            log.error("the supply fails, and not all could be brought to the disk: %s", exc)

    def _stop(self) -> int:
        notify("STOPPING=1", "STATUS=saving what could not be sent")
        unsaved = self._client.close(self._settings.stop_timeout)
        if unsaved:
            log.error("%d messages are in no file", unsaved)
        return 1 if unsaved else 0


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(levelname)s: %(message)s")
    if len(sys.argv) != 2:
        print("usage: gateway.py CONFIGURATION.toml", file=sys.stderr)
        return 2
    try:
        settings, options = Settings.from_toml(sys.argv[1]), cloudpubsub.Options.from_toml(sys.argv[1])
    except (ValueError, TypeError, OSError, cloudpubsub.OptionError) as exc:
        log.error("%s: %s", sys.argv[1], exc)
        return 2
    try:
        return Gateway(settings, options).run()
    except (cloudpubsub.Error, OSError) as exc:  # the spool is in use, or its disk cannot be written to
        log.error("%s", exc)
        return 1


if __name__ == "__main__":
    sys.exit(main())
