"""What publish and subscribe connection have in common: a thread that owns a connection and makes it anew.

The thread connects (see `_connecting`), then runs a `poll` loop: write what is due, read what came, keep the link
alive, until the connection ends; then it waits with growing, jittered delays and tries again.  Only this thread touches
the socket, and no lock is held while it does.

Other threads reach it by setting a flag and calling `wake`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from cloudpubsub._backoff import Backoff
from cloudpubsub._connecting import Attempt, LinkState, explain, state_after
from cloudpubsub._ended import ClosedByBroker, Ended, Refused, ended_by
from cloudpubsub._keep_alive import KeepAlive
from cloudpubsub._paho import WOULD_BLOCK, BrokerLimits, Control, Stage, waits_for
from cloudpubsub._report import RateLimitedLog
from cloudpubsub._spool import CALL
from cloudpubsub._websocket import WebSocketError

if TYPE_CHECKING:
    from cloudpubsub._link import _Inbound
    from cloudpubsub._options import Options

__all__ = ["STRETCH_MS", "Connection"]

STRETCH_MS = 50  # that work at a stretch may last once something has moved, before the loop looks at what that means
_IDLE_MS_MAX = 3_600_000
_PINGREQ = b"\xc0\x00"
_KICKED_S = 30.0  # closed by the broker within this time of CONNACK,
_KICKS = 3  # so often in a row: somebody else may have taken our client id
_IDLE_S = 1.0  # between calls of `_idle`
_WRITES = 4  # batches written before the socket is read again
_READS = 1024  # before what they brought is worked off; of TLS each brings one record, perhaps one acknowledgement
_READ_BYTES = 64 * 1024
_READ_AHEAD_BYTES = 512 * 1024
_CONNECTORS = 2  # helper threads that may hang in name resolution at the same time
_LINGER_S = 1.0  # for the broker to take our last packets and close
_DRAIN_SHARE = 0.6  # of the time to stop: to wait for acknowledgements,
_GOODBYE_SHARE = 0.9  # and to have said goodbye; the rest is for the thread to end
_HUNG_UP = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class Connection(ABC):
    """The thread that keeps one connection.

    Args:
        options: The client's settings.
        name: Of the thread, and in log lines.
        client_id: Of this connection.
        inbound: Parser of the incoming stream; this object's thread is its owner from `start` on.
        wake_fd: An eventfd that others write to when there is something to do.  A duplicate of it is kept, so the
            caller may close it when no thread of his writes to it any more.
        on_up, on_down: Called on this thread with the broker's URL, or the reason.  They must not block.
    """

    def __init__(
        self,
        options: Options,
        name: str,
        client_id: str,
        inbound: _Inbound,
        wake_fd: int,
        on_up: Callable[[str], None],
        on_down: Callable[[str], None],
    ) -> None:
        self._options = options
        self._name = name
        self._client_id = client_id
        self._inbound = inbound
        self._wake_fd = wake_fd
        self._wake_lock = threading.Lock()  # guards the next field
        self._own_wake_fd = os.dup(wake_fd)  # -1: closed
        self._on_up = on_up
        self._on_down = on_down
        self._log = RateLimitedLog(logging.getLogger("cloudpubsub"))
        self._backoff = Backoff(options.reconnect_min, options.reconnect_max)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._drain_by_s = self._stop_by_s = 0.0  # monotonic; set before the next field
        self._stopping = False  # set by any thread
        self._abandoned: list[Attempt] = []
        self._next_address = 0
        self._failures = 0  # attempts and connections that have ended
        self._was_closed = False  # the last connection ended by the broker's doing, or by somebody's on the way
        self._kicks = 0  # connections in a row that the broker closed soon
        self._hurry = False  # set by any thread
        self._idle_due_s = time.monotonic() + _IDLE_S
        self._control: Control | None = None
        self._alive = KeepAlive(options.keep_alive)
        self._pending: memoryview | None = None  # being written
        self._pending_is_ping = False
        self._read_waits_for_write = False  # TLS may have to write before it can read, a WebSocket to answer
        self._busy_since_s: float | None = None
        #: Read by any thread.
        self.connects = 0
        self.malformed = 0
        self.last_error = ""
        self.state: LinkState = "idle"
        #: Set at the first connection, or when every address was tried once; `is_up` and `last_error` say which.
        self.first_attempt = threading.Event()

    # ---- for other threads ----

    def start(self) -> None:
        self._thread.start()

    @property
    def is_up(self) -> bool:
        return self.state == "up"

    @property
    def busy_since_s(self) -> float | None:
        """Since when the thread has been at work without waiting for an event (monotonic); None: it waits."""
        return self._busy_since_s

    @property
    def was_started(self) -> bool:
        return self._thread.ident is not None

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        """Have `_woken` called soon.  Does nothing when the thread has ended."""
        self._signal(CALL)

    def _signal(self, value: int) -> None:
        # The lock: the number of a closed descriptor may be somebody else's file a moment later.
        with self._wake_lock:
            if self._own_wake_fd >= 0:
                os.eventfd_write(self._own_wake_fd, value)

    def hurry(self) -> None:
        """Cut the pause before the next attempt to connect short, also that after an attempt that is being made."""
        self._hurry = True
        self.wake()

    def _close_wake(self) -> None:
        with self._wake_lock:
            fd, self._own_wake_fd = self._own_wake_fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        # One that was never started and never stopped; a running thread keeps its object.
        if hasattr(self, "_own_wake_fd"):
            self._close_wake()

    def stop(self, timeout_s: float) -> bool:
        """End with a goodbye if there is time.  Returns whether the thread ended; it is left behind otherwise."""
        now_s = time.monotonic()
        if not self._stopping:
            self._drain_by_s = now_s + _DRAIN_SHARE * timeout_s
            self._stop_by_s = now_s + _GOODBYE_SHARE * timeout_s
            self._stopping = True
        if self._thread.ident is None:
            self._close_wake()
            return True
        self.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ---- what the two kinds differ in; all but `_open` on the owner's thread ----

    @abstractmethod
    def _open(self, address_index: int, timeout_s: float, on_stage: Callable[[Stage], None]) -> Control:
        """Connect TCP, TLS and WebSocket; runs on a helper thread."""

    @abstractmethod
    def _has_carried(self) -> bool:
        """Whether the broker has acknowledged something on this connection."""

    @abstractmethod
    def _restart(self) -> None:
        """A new connection begins."""

    @abstractmethod
    def _established(self, control: Control, limits: BrokerLimits) -> None:
        """The broker accepted the connection.  May raise Ended, where it is of no use to us."""

    @abstractmethod
    def _next_bytes(self) -> memoryview | None:
        """Something to write, if there is: whole packets; unchanged until `_wrote` has counted all of it."""

    @abstractmethod
    def _wrote(self, n: int) -> None:
        """The socket took `n` of those bytes."""

    @abstractmethod
    def _take(self) -> tuple[bytearray, bool]:
        """Work off what was received.  Returns the bytes for paho, and whether to call again at once."""

    @abstractmethod
    def _may_sleep(self) -> bool:
        """Whether nothing is to be written before the next event.  Called right before the poll."""

    @abstractmethod
    def _woken(self) -> None:
        """Somebody called `wake`; also while offline."""

    def _idle(self) -> bool:
        """Called about once a second while offline, and not in the first one: connecting does not wait for it.

        Returns whether there is more to do at once.
        """
        return False

    def _wants_to_read(self) -> bool:
        return True

    def _rounds(self, control: Control, now_s: float) -> float:
        """At a stretch, what needs little Python, and waiting for it.  Returns the time, `now_s` if there is none."""
        return now_s

    def _patience_s(self) -> float:
        """How long to leave what comes where it is, before looking for it."""
        return 0.0

    def _next_deadline_s(self) -> float | None:
        """When the loop must turn without an event, besides keep-alive."""
        return None

    @abstractmethod
    def _check(self, now_s: float) -> None:
        """Raise Ended if the connection must be given up.  Called after what the socket holds was read."""

    def _is_drained(self) -> bool:
        """On the way out: whether nothing is left to wait for."""
        return True

    @abstractmethod
    def _lost(self) -> None:
        """The connection, or the attempt to make it, is over."""

    # ---- the thread ----

    def _run(self) -> None:
        try:
            while not self._stopping:
                try:
                    self._live_once()
                except Exception as exc:
                    # Nothing but `stop` may end this thread: not even a bug at the end of a connection.
                    self._say_surprise(exc)
                    poller = select.poll()
                    poller.register(self._own_wake_fd, select.POLLIN)
                    poller.poll(self._options.reconnect_min * 1000)
        finally:
            self.first_attempt.set()  # there will be none any more
            self._log.flush()
            self._close_wake()

    def _live_once(self) -> None:
        """One connection, or the attempt to make it, and the pause after it."""
        address = self._options.addresses[self._next_address % len(self._options.addresses)]
        up_since_s: float | None = None
        state: LinkState = "down"
        try:
            control = self._connect()
            up_since_s = time.monotonic()
            self._went_up(control, address.url)
            self._serve(control)
            reason, was_closed = "closed", False
        except Ended as exc:
            reason, was_closed = str(exc), isinstance(exc, ClosedByBroker)
            if isinstance(exc, Refused):
                state = "refused"
        except Exception as exc:
            # A bug or a surprise of the network must not end the thread: this connection is over, the next may do.
            reason, was_closed, state = explain(exc), isinstance(exc, _HUNG_UP), state_after(exc)
            if not isinstance(exc, OSError):
                self._say_surprise(exc)
        lasted_s = -1.0 if up_since_s is None else time.monotonic() - up_since_s
        self._was_closed = was_closed
        self._kicks = self._kicks + 1 if was_closed and 0 <= lasted_s < _KICKED_S else 0
        if self._kicks >= _KICKS:
            reason += f", again and again soon after accepting us: does another client use the id {self._client_id!r}?"
        if lasted_s >= self._options.min_stable and self._has_carried():
            self._backoff.reset()
        # The addresses are an order of preference: one that lasted, busy or idle, sends us back to the first.
        self._next_address = 0 if lasted_s >= self._options.min_stable else self._next_address + 1
        self._went_down(reason, state, address.url)
        if not self._stopping:
            deadline_s = time.monotonic() + self._backoff.next_s()
            self._wait_offline(lambda: self._stopping or self._hurry, deadline_s)
            self._hurry = False

    def _say_surprise(self, exc: Exception) -> None:
        if not self._stopping:  # then the log that it wanted to use was closed under it
            self._log.log(logging.ERROR, "surprise", "%s: %s", self._name, explain(exc), exc_info=exc)

    def _went_up(self, control: Control, url: str) -> None:
        limits = control.limits or BrokerLimits()
        # What the broker says is the most that it waits for us; how long we wait for it is ours to say.
        self._alive = KeepAlive(min(limits.server_keep_alive or math.inf, self._options.keep_alive))
        self._alive.restart(time.monotonic())
        self._established(control, limits)
        self.connects += 1
        self.state = "up"
        self.first_attempt.set()
        self._on_up(url)

    def _went_down(self, reason: str, state: LinkState, url: str) -> None:
        if self.is_up:
            self._hurry = False  # what was heard while the connection was up is old; what comes from here on is not
        if self.is_up:
            self._idle_due_s = time.monotonic() + _IDLE_S
        was_up, self.state = self.is_up, state
        self._pending = None
        if self._control is not None:
            self._control.hang_up()
            self._control = None
        if not self._stopping:
            self.last_error = reason
            self._log.log(logging.WARNING, f"down {reason}", "%s: %s: %s", self._name, url, reason)
        self._lost()
        if was_up:
            self._on_down(reason)
        self._failures += 1
        if self._failures >= len(self._options.addresses):
            self.first_attempt.set()

    def _wait_offline(self, is_over: Callable[[], bool], deadline_s: float) -> None:
        """Until `is_over`, of which `wake` tells, or the deadline; calls of `wake` are served."""
        poller = select.poll()
        poller.register(self._own_wake_fd, select.POLLIN)
        while not is_over():
            self._busy_since_s = now_s = time.monotonic()
            if now_s >= deadline_s:
                return
            if now_s >= self._idle_due_s:
                self._idle_due_s = now_s if self._idle() else now_s + _IDLE_S
            self._busy_since_s = None
            if poller.poll((min(deadline_s, self._idle_due_s) - now_s) * 1000 + 1):
                self._busy_since_s = time.monotonic()
                self._clear_wake()
                self._woken()

    def _clear_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # another wake was cleared by the same read
            os.eventfd_read(self._own_wake_fd)

    # ---- connecting ----

    def _connect(self) -> Control:
        """TCP, TLS, WebSocket and CONNACK within `connect_timeout`."""
        timeout_s = self._options.connect_timeout
        deadline_s = time.monotonic() + timeout_s
        self._control = control = self._connect_socket(timeout_s, deadline_s)
        self._restart()
        self._alive.restart(time.monotonic())
        self._read_waits_for_write = False
        connack_by_s = min(deadline_s, time.monotonic() + self._options.connack_timeout)
        self._loop(control, lambda: self._stopping or self._inbound.connack >= 0, connack_by_s)
        if self._inbound.connack > 0:
            raise ended_by(self._inbound)
        if self._inbound.connack < 0:
            raise Ended("closed" if self._stopping else "no CONNACK in time")
        return control

    def _has_moved(self, attempt: Attempt, stage: tuple[Stage, float]) -> bool:
        return self._stopping or attempt.is_over or attempt.stage is not stage

    def _stage_ends_s(self, attempt: Attempt) -> float:
        stage, since_s = attempt.stage
        limits = {"name resolution": self._options.dns_timeout, "TCP": self._options.tcp_timeout}
        return since_s + limits.get(stage, self._options.tls_timeout)

    def _connect_socket(self, timeout_s: float, deadline_s: float) -> Control:
        self._abandoned = [attempt for attempt in self._abandoned if not attempt.is_over]
        if len(self._abandoned) >= _CONNECTORS:
            raise Ended("name resolution or a handshake still hangs")
        index = self._next_address
        try:
            attempt = Attempt(
                lambda attempt: self._open(index, timeout_s, attempt.note_stage), self.wake, f"{self._name}-connector"
            )
        except RuntimeError as exc:  # none may be started while the interpreter exits
            raise Ended(str(exc)) from None
        control: Control | None = None
        try:
            while not (self._stopping or attempt.is_over) and time.monotonic() < deadline_s:
                ends_s = min(deadline_s, self._stage_ends_s(attempt))
                if time.monotonic() >= ends_s:
                    break
                self._wait_offline(partial(self._has_moved, attempt, attempt.stage), ends_s)
            control = attempt.result()
        except TimeoutError:
            raise Ended(f"{attempt.stage[0]} timed out") from None
        finally:
            if control is None:
                attempt.abandon()
                self._abandoned.append(attempt)
        if control is None:
            raise Ended("closed" if self._stopping else f"{attempt.stage[0]} timed out")
        return control

    # ---- connected ----

    def _serve(self, control: Control) -> None:
        self._loop(control, lambda: self._stopping, None)
        self._loop(control, self._is_drained, self._drain_by_s)
        self._say_goodbye(control)

    def _say_goodbye(self, control: Control) -> None:
        """DISCONNECT, behind what is half out; without it the broker would publish the will."""
        assert control.tap is not None
        control.tap.linger_s = _LINGER_S
        control.tap.linger_until_s = self._stop_by_s
        control.disconnect()
        with contextlib.suppress(Ended):  # paho closes when it is out
            self._loop(control, lambda: control.is_closed, self._stop_by_s)

    def _loop(self, control: Control, is_over: Callable[[], bool], deadline_s: float | None) -> None:
        """Turn until `is_over` or the deadline.  Raises Ended or OSError when the connection has ended."""
        assert control.tap is not None
        poller = select.poll()
        poller.register(self._own_wake_fd, select.POLLIN)
        poller.register(control.tap, 0)
        while not is_over():
            self._busy_since_s = now_s = time.monotonic()
            if deadline_s is not None and now_s >= deadline_s:
                return
            if self.is_up:
                now_s = self._rounds(control, now_s)
            blocked_on = self._write_or_hear_why(control, now_s)
            wants_to_read = not self.is_up or self._wants_to_read()
            if not wants_to_read:
                self._alive.received(now_s)  # it is we who are silent
            mask = (select.POLLIN if wants_to_read else 0) | blocked_on
            if self._read_waits_for_write and wants_to_read:
                mask |= select.POLLOUT
            poller.modify(control.tap, mask)
            # What was just written may have been the last thing to wait for, and no event may follow it.
            sleeps = (blocked_on or not self.is_up or self._may_sleep()) and not is_over()
            timeout_ms = self._sleep_ms(now_s, deadline_s, not blocked_on) if sleeps else 0
            self._busy_since_s = None
            if sleeps and (patience_s := self._patience_s()) > 0:
                time.sleep(patience_s)
            events = poller.poll(timeout_ms)
            self._busy_since_s = time.monotonic()
            for fd, event in events:
                if fd == self._own_wake_fd:
                    self._clear_wake()
                    self._woken()
                elif control.is_closed:
                    break  # by what was woken
                elif wants_to_read and (event & ~select.POLLOUT or self._read_waits_for_write):
                    self._read(control)
                elif event & (select.POLLHUP | select.POLLERR):
                    raise ClosedByBroker()  # what it still sent will be sent again
            if control.is_closed:
                raise ended_by(self._inbound)
            # Only now, when all that had come is read: this process may have been stopped for a while.
            self._check_alive(time.monotonic())

    def _sleep_ms(self, now_s: float, deadline_s: float | None, can_write: bool) -> float:
        """How long nothing is to be done, if there is no event."""
        times = [] if deadline_s is None else [deadline_s]
        if self.is_up:
            times.append(self._alive.next_s(can_write))
            own_s = self._next_deadline_s()
            if own_s is not None:
                times.append(own_s)
        return max(0.0, min(times) - now_s) * 1000 + 1

    def _idle_ms(self, now_s: float) -> int:
        """The same of a connection that is up, for waiting at a stretch."""
        return int(min(_IDLE_MS_MAX, self._sleep_ms(now_s, None, True)))

    def _check_alive(self, now_s: float) -> None:
        if not self.is_up:
            return  # `connect_timeout` decides
        if self._alive.is_lost(now_s):
            raise Ended("the broker has been silent for one and a half keep-alives")
        self._check(now_s)

    # ---- out ----

    def _write_or_hear_why(self, control: Control, now_s: float) -> int:
        try:
            return self._write(control, now_s)
        except OSError:
            # The broker hung up.  What it said before that is still to be read: acknowledgements, or a better reason.
            if not control.is_closed and self._wants_to_read():
                self._read(control)
            raise

    def _write(self, control: Control, now_s: float) -> int:
        """Write what is due.  Returns the event that the socket waits for before it takes more, 0 for none."""
        assert control.tap is not None
        for _ in range(_WRITES):
            if self._pending is None:
                if control.want_write():
                    control.loop_write()
                    if control.is_closed:
                        raise control.tap.error or Ended("closed while writing")
                    if control.want_write():
                        return control.tap.waits_for  # nobody else may write before the rest of that packet
                if not self.is_up:
                    return 0
                self._pending_is_ping = self._alive.ping_is_due(now_s)
                self._pending = memoryview(_PINGREQ) if self._pending_is_ping else self._next_bytes()
                if self._pending is None:
                    return 0
                control.tap.is_writing = True
            try:
                n = control.tap.sock.send(self._pending)
            except WOULD_BLOCK as exc:
                return waits_for(exc)
            self._count_sent(n, now_s)
            self._pending = self._pending[n:] if n < len(self._pending) else None
            control.tap.is_writing = self._pending is not None
        return 0 if self._pending is None else select.POLLOUT

    def _count_sent(self, n: int, now_s: float) -> None:
        if self._pending_is_ping:
            self._alive.pinged(now_s)
        else:
            self._alive.sent(now_s)
            self._wrote(n)

    # ---- in ----

    def _read(self, control: Control) -> None:
        """Read what is there and work it off; then raise Ended or OSError if that was all for ever."""
        assert control.tap is not None
        sock = control.tap.sock
        error: OSError | Ended | None = None
        is_heard = False  # a WebSocket's server that only sends pings, with its MQTT gone, is none that we hear
        self._read_waits_for_write = False
        for _ in range(_READS):
            view = self._inbound.space(_READ_BYTES)
            try:
                n = sock.recv_into(view)
            except WOULD_BLOCK as exc:
                self._read_waits_for_write = isinstance(exc, ssl.SSLWantWriteError)
                break
            except OSError as exc:
                error = exc
                break
            if n == 0:
                error = Ended("")
                break
            self._inbound.received(n)
            is_heard = True
            if control.tap.tells_when_empty and n < len(view):
                break
            if self._inbound.waiting_bytes() >= _READ_AHEAD_BYTES:
                break
        if is_heard:
            self._alive.received(time.monotonic())
        if not control.tap.is_tls and error is None:
            # Brokers that leave Nagle on send the next acknowledgements only when these are acknowledged.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._work_off(control)
        self.malformed += isinstance(error, WebSocketError)
        if isinstance(error, (Ended, ssl.SSLEOFError)):
            raise ended_by(self._inbound)
        if error is not None:
            raise error

    def _work_off(self, control: Control) -> None:
        again = True
        while again and not control.is_closed:
            try:
                data, again = self._take()
                if data:
                    control.pump(data)
            except ValueError as exc:
                self.malformed += 1
                raise Ended(str(exc)) from None
