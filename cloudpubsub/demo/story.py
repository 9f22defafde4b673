"""The story that the demo tells: broker, bad link, gateway and witness, and what is done to them.

Everything runs on the thread that calls `Story.tell`, except that the relay, paho and the reader of the gateway's
reports have threads of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloudpubsub.cli.stop import Stop
from cloudpubsub.demo.broker import Broker
from cloudpubsub.demo.checker import Verdict
from cloudpubsub.demo.child import Child
from cloudpubsub.demo.gateway import RING_BYTES
from cloudpubsub.demo.promise import Promise
from cloudpubsub.demo.relay import Relay
from cloudpubsub.demo.scene import PHASES, Event, Scene
from cloudpubsub.demo.witness import Witness

__all__ = ["DemoError", "Interrupted", "Story"]

_TICK_S = 0.1
_GATEWAY_START_S = 15.0
_GATEWAY_END_S = 90.0
_DRAIN_LIMIT_S = 60.0
_STALL_S = 10.0  # at the end: no arrival for so long, and the rest is lost
_CAUGHT_UP_S = 0.25  # the newest arrival was read so lately: no backlog any more
_RECORD_BYTES = 160  # about what a reading takes in the spool


class Interrupted(Exception):
    """A signal asked for the end."""


class DemoError(Exception):
    """A part of the demo did not do its work; the text says which and what it said."""


class _Gateway:
    """The gateway's process, and its last report."""

    def __init__(self, directory: Path, port: int, rate: float) -> None:
        settings = {
            "port": port,
            "spool": str(directory / "spool"),
            "promise": str(directory / "promise"),
            "rate": rate,
        }
        self.report: dict[str, Any] = {}
        self.recovery: dict[str, Any] = {}
        self.child = Child("cloudpubsub.demo.gateway", [json.dumps(settings)], directory / "gateway.log")
        self._reader = threading.Thread(target=self._read, name="demo-reports", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.child.stdout:
            with contextlib.suppress(ValueError):  # a kill may leave half a line
                report = json.loads(line)
                self.recovery = report.get("recovery", self.recovery)
                self.report = report

    def kill(self) -> None:
        """SIGKILL; the reports it wrote before that are all read."""
        self.child.kill()
        self._reader.join()
        self.child.stdout.close()

    @property
    def complaint(self) -> str:
        return f"the gateway ended with {self.child.exit_code()}: {self.child.errors()}"


class Story:
    """Tell it once: `tell`, then look at `verdict` and `figures`.

    Args:
        seconds: About how long it takes; the drains take what they take.
        rate: Readings a second.
        stop: Ends it early, with Interrupted.
        show: Called about ten times a second with the scene.
    """

    def __init__(self, seconds: float, rate: float, stop: Stop, show: Callable[[Scene], None]) -> None:
        self.scene = Scene(planned_s=seconds, rate=rate, ring_bytes=RING_BYTES)
        offline_s = seconds * sum(phase.share or 0 for phase in PHASES[1:4])
        self.scene.spool_bytes_planned = max(1, int(offline_s * rate * _RECORD_BYTES))
        self.verdict: Verdict | None = None
        self.figures: dict[str, Any] = {"outages": [], "kills": 0}
        self._seconds, self._rate = seconds, rate
        self._stop, self._show = stop, show
        self._spilled_bytes = 0
        self._peaks = {"backlog_peak": 0, "spool_bytes_peak": 0, "spool_segments_peak": 0}
        self._gateway: _Gateway | None = None
        self._started_s = time.monotonic()

    def tell(self) -> Verdict:
        """Everything, in order; blocks until the end.  Nothing is left behind, however it ends.

        Raises Interrupted, DemoError, OSError.
        """
        # Not the default: that may be tmpfs, and this is about a disk.
        place = None if os.environ.get("TMPDIR") or not os.access("/var/tmp", os.W_OK) else "/var/tmp"
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cloudpubsub-demo-", dir=place)))
            self._directory = directory
            self._promise = Promise(directory / "promise")
            stack.callback(self._promise.close)
            self._broker = Broker(directory)
            stack.callback(self._broker.close)
            self._broker.start()
            self._witness = Witness(self._broker.port)
            stack.callback(self._witness.stop)
            self._witness.start()
            self._relay = stack.enter_context(Relay(self._broker.port))
            stack.callback(self._end_gateway)
            self._tell()
            self._witness.stop()
            self.verdict = self._witness.checker.verdict(self._promise.begun)
        self._sum_up()
        return self.verdict

    # ---- the phases ----

    def _tell(self) -> None:
        self._start_gateway()
        self._wait(lambda: self._witness.arrivals > 0, _GATEWAY_START_S, "the first message did not arrive")
        self._begin("steady", f"{self._rate:,.0f} readings of this host a second, over a good link")
        self._witness.keeps_delays = True
        self._last_out()
        self._witness.keeps_delays = False

        self._begin("cut", "link cut: the ring fills, then the disk")
        cut_s = self._cut()
        self._last_out()
        self._begin("kill", "gateway killed with SIGKILL, while offline")
        self._kill_gateway()
        self._last_out()
        self._restart_gateway()
        self._last_out()
        self._begin("drain", "link back: the oldest go first, new readings queue behind")
        self._restore(cut_s)

        self._begin("steady again")
        self._last_out()
        self._begin("second cut", "link cut again")
        cut_s = self._cut()
        self._last_out()
        self._begin("second drain", "link back")
        self._restore(cut_s)
        self._begin("end", "gateway told to end: it flushes and closes")
        self._finish()

    def _restart_gateway(self) -> None:
        self._start_gateway()
        gateway = self._gateway
        assert gateway is not None
        self._wait(lambda: bool(gateway.recovery), _GATEWAY_START_S, "the gateway hangs")
        found = self.figures["recovery"] = gateway.recovery
        milliseconds = found["seconds"] * 1000
        self._begin("restart", f"restarted: {found['messages']:,} messages found in {milliseconds:.0f} ms")

    def _begin(self, name: str, text: str = "") -> None:
        self.scene.phase = next(number for number, phase in enumerate(PHASES) if phase.name == name)
        if text:
            self._note(text)

    def _note(self, text: str) -> None:
        self.scene.events.append(Event(time.monotonic() - self._started_s, text))

    def _last_out(self) -> None:
        """Let the present phase last as long as it is meant to."""
        end_s = time.monotonic() + self._seconds * (PHASES[self.scene.phase].share or 0)
        while (left_s := end_s - time.monotonic()) > 0:
            self._turn(left_s)

    def _cut(self) -> float:
        self._relay.cut()
        self.scene.is_linked = False
        return time.monotonic()

    def _restore(self, cut_s: float) -> None:
        """Mend the link, and wait until the backlog is delivered and the stream is live again."""
        waiting, received = self._promise.kept, self._witness.checker.received
        restored_s = time.monotonic()
        self._relay.restore()
        self.scene.is_linked = True
        checker = self._witness.checker

        def is_live() -> bool:
            return checker.front >= waiting and self._witness.delay_s < _CAUGHT_UP_S

        self._wait(is_live, _DRAIN_LIMIT_S, None)
        drained_s = time.monotonic()
        outage = {
            "outage_s": round(restored_s - cut_s, 2),
            "backlog": waiting - received,
            "drain_s": round(drained_s - restored_s, 2) if is_live() else None,
            "delivered": checker.received - received,
        }
        self.figures["outages"].append(outage)
        self._note(
            f"{outage['backlog']:,} waiting messages delivered, live after {drained_s - restored_s:.1f} s"
            if outage["drain_s"] is not None
            else f"the backlog is not delivered after {drained_s - restored_s:.0f} s"
        )

    def _finish(self) -> None:
        gateway = self._gateway
        assert gateway is not None
        gateway.child.tell("end")
        self.scene.gateway = "closing"
        end_s = time.monotonic() + _GATEWAY_END_S
        while gateway.child.exit_code() is None and time.monotonic() < end_s:
            self._turn(_TICK_S, may_end=True)
        code = gateway.child.exit_code()
        gateway.kill()
        if code not in (0, None):
            self._note(gateway.complaint)
        self.scene.gateway = "ended"
        self.figures["gateway_exit_code"] = code
        self._look()
        # Acknowledged by the broker means that the broker has it; the witness may be a moment behind.
        moved_s, arrivals = time.monotonic(), -1
        while self._witness.checker.front < self._promise.begun and time.monotonic() - moved_s < _STALL_S:
            if self._witness.arrivals != arrivals:
                moved_s, arrivals = time.monotonic(), self._witness.arrivals
            self._turn(_TICK_S, may_end=True)

    # ---- the gateway ----

    def _start_gateway(self) -> None:
        self._gateway = _Gateway(self._directory, self._relay.port, self._rate)
        self.scene.gateway, self.scene.gateway_pid = "running", self._gateway.child.pid
        self.scene.gateway_run += 1

    def _kill_gateway(self) -> None:
        assert self._gateway is not None
        self._gateway.kill()
        self._look()
        self._spilled_bytes += self._gateway.report.get("spilled_bytes", 0)
        self._gateway = None
        self.scene.gateway = "killed"
        self.figures["kills"] += 1
        if self._promise.begun > self._promise.kept:
            # Its publish() did not return: nothing was promised, and nothing forbids that it arrives.
            self._witness.checker.excuse(self._promise.kept)

    def _end_gateway(self) -> None:
        if self._gateway is not None:
            self._gateway.kill()

    # ---- time passes ----

    def _wait(self, is_true: Callable[[], bool], limit_s: float, complaint: str | None) -> None:
        end_s = time.monotonic() + limit_s
        while not is_true():
            if time.monotonic() >= end_s:
                if complaint is None:
                    return
                raise DemoError(f"{complaint}; {self._gateway.child.errors() if self._gateway else ''}")
            self._turn(_TICK_S)

    def _turn(self, limit_s: float, *, may_end: bool = False) -> None:
        """One tick: look, show, and see whether everything is alive."""
        if self._stop.wait(min(_TICK_S, limit_s)):
            raise Interrupted
        self._look()
        self._show(self.scene)
        if not self._broker.is_running:
            raise DemoError("the broker ended")
        if not may_end and self._gateway is not None and self._gateway.child.exit_code() is not None:
            raise DemoError(self._gateway.complaint)

    def _look(self) -> None:
        scene, checker = self.scene, self._witness.checker
        scene.elapsed_s = time.monotonic() - self._started_s
        scene.received = checker.received  # before `sent`, or it might be larger
        scene.sent = self._promise.kept
        scene.front, scene.out_of_order, scene.duplicates = checker.front, checker.out_of_order, checker.duplicates
        scene.delay_s = self._witness.delay_s
        scene.report = self._gateway.report if self._gateway is not None else {}
        scene.sample()
        for peak, now in (
            ("backlog_peak", scene.backlog),
            ("spool_bytes_peak", scene.report.get("spool_bytes", 0)),
            ("spool_segments_peak", scene.report.get("spool_segments", 0)),
        ):
            self._peaks[peak] = max(self._peaks[peak], now)

    def _sum_up(self) -> None:
        report = self._gateway.report if self._gateway is not None else {}
        delays_s = sorted(self._witness.delays_s)
        self.figures |= {
            "seconds": round(time.monotonic() - self._started_s, 1),
            "rate": self._rate,
            "spilled_bytes": self._spilled_bytes + report.get("spilled_bytes", 0),
            **self._peaks,
            "dropped": report.get("dropped", 0),
            "is_flushed": report.get("is_flushed", False),
            "delay_ms": {
                name: round(delays_s[int(len(delays_s) * part)] * 1000, 2)
                for name, part in (("p50", 0.5), ("p99", 0.99))
                if delays_s
            },
        }
