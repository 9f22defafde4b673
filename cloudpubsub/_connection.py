"""What publish and subscribe connection have in common: a thread that owns a connection and makes it anew.

The thread connects (in a helper thread, because name resolution and TLS can block for longer than anybody wants to
wait), then runs a `poll` loop: write what is due, read what came, keep the link alive, until the connection ends; then
it waits with growing, jittered delays and tries again.  Only this thread touches the socket, and no lock is held while it does.

Other threads reach it by setting a flag and calling `wake`.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from cloudpubsub._backoff import Backoff
from cloudpubsub._paho import WOULD_BLOCK, Control
from cloudpubsub._report import RateLimitedLog

if TYPE_CHECKING:
    from cloudpubsub._link import _Inbound
    from cloudpubsub._options import Options

__all__ = ["Connection", "Ended"]

_PINGREQ = b"\xc0\x00"
_STABLE_S = 5.0  # a connection that lasted this long was a good one: the next delay is short again
_WRITES = 4  # batches written before the socket is read again
_READS = 64  # reads before what they brought is worked off
_READ_BYTES = 64 * 1024
_LINGER_S = 1.0  # for the broker to take our last packets and close
_READ_AHEAD_BYTES = 512 * 1024
_CONNECTORS = 2  # helper threads that may hang in name resolution at the same time
_REFUSED = {
    1: "refused: the broker does not speak this protocol version",
    2: "refused: client id rejected",
    3: "refused: broker unavailable",
    4: "refused: bad user name or password",
    5: "refused: not authorised",
}


class Ended(Exception):
    """The connection, or the attempt to make it, is over; the text says why."""


class _Attempt:
    """TCP and TLS, on a helper thread that may be left behind."""

    def __init__(self, connect: Callable[[], Control], wake: Callable[[], None], name: str) -> None:
        self._connect = connect
        self._wake = wake
        self._lock = threading.Lock()  # guards the three fields below
        self._control: Control | None = None
        self._error: BaseException | None = None
        self._is_over = False
        self._is_abandoned = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        control: Control | None = None
        error: BaseException | None = None
        try:
            control = self._connect()
        except BaseException as exc:
            error = exc
        with self._lock:
            self._is_over = True
            self._control, self._error = control, error
            abandoned = self._is_abandoned
        if abandoned:
            if control is not None:
                control.hang_up()
        else:
            self._wake()

    def result(self) -> Control | None:
        """The connection, None if it is not there yet; raises what went wrong."""
        with self._lock:
            if self._error is not None:
                raise self._error
            return self._control

    def abandon(self) -> None:
        with self._lock:
            self._is_abandoned = True
            control = self._control
        if control is not None:
            control.hang_up()


def _reason(error: BaseException) -> str:
    """A connection error in words that name the state."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: certificate not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, socket.gaierror):
        return f"name not resolved: {error.strerror}"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"


class Connection(ABC):
    """The thread that keeps one connection.

    Args:
        options: The client's settings.
        name: Of the thread, and in log lines.
        client_id: Of this connection.
        inbound: Parser of the incoming stream; this object's thread is its owner from `start` on.
        wake_fd: An eventfd that others write to when there is something to do.
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
        self._on_up = on_up
        self._on_down = on_down
        self._log = RateLimitedLog(logging.getLogger("cloudpubsub"))
        self._backoff = Backoff(options.reconnect_min, options.reconnect_max)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._stopping = False  # set by any thread
        self._stop_by_s = 0.0  # monotonic; for the goodbye
        self._hung: list[threading.Thread] = []
        self._next_address = 0
        self._control: Control | None = None
        self._pending: memoryview | None = None  # being written
        self._pending_is_ping = False
        self._last_sent_s = 0.0
        self._last_received_s = 0.0
        #: Read by any thread.
        self.is_up = False
        self.connects = 0
        self.malformed = 0
        self.last_error = ""
        #: Set when the first attempt has ended, either way; `is_up` and `last_error` say how.
        self.first_attempt = threading.Event()

    # ---- for other threads ----

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        try:
            os.eventfd_write(self._wake_fd, 1)
        except OSError:
            pass  # closed: there is nobody to wake

    def stop(self, timeout_s: float) -> bool:
        """End with a goodbye if there is time.  Returns whether the thread ended; it is left behind otherwise."""
        self._stop_by_s = time.monotonic() + timeout_s
        self._stopping = True
        self.wake()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ---- what the two kinds differ in; all on the owner's thread ----

    @abstractmethod
    def _open(self, address_index: int, timeout_s: float) -> Control:
        """Connect TCP and TLS; runs on a helper thread."""

    @abstractmethod
    def _restart(self) -> None:
        """A new connection begins."""

    @abstractmethod
    def _established(self, control: Control) -> None:
        """The broker accepted the connection."""

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

    def _wants_to_read(self) -> bool:
        return True

    def _next_deadline_s(self) -> float | None:
        """When the loop must turn without an event, besides keep-alive."""
        return None

    @abstractmethod
    def _check(self, now_s: float) -> None:
        """Raise Ended if the connection must be given up."""

    def _is_drained(self) -> bool:
        """On the way out: whether nothing is left to wait for."""
        return True

    @abstractmethod
    def _lost(self) -> None:
        """The connection, or the attempt to make it, is over."""

    # ---- the thread ----

    def _run(self) -> None:
        while not self._stopping:
            address = self._options.addresses[self._next_address % len(self._options.addresses)]
            up_since_s: float | None = None
            try:
                control = self._connect()
                up_since_s = time.monotonic()
                self._went_up(control, address.url)
                self._serve(control)
                reason = "closed"
            except Ended as exc:
                reason = str(exc)
            except Exception as exc:
                # A bug or a surprise of the network must not end the thread: this connection is over, the next may do.
                reason = _reason(exc)
                if not isinstance(exc, OSError):
                    self._log.log(logging.ERROR, "surprise", "%s: %s", self._name, reason, exc_info=exc)
            self._went_down(reason, address.url)
            if up_since_s is not None and time.monotonic() - up_since_s >= _STABLE_S:
                self._backoff.reset()
            if not self._stopping:
                self._pause(self._backoff.next_s())

    def _went_up(self, control: Control, url: str) -> None:
        self._established(control)
        self.connects += 1
        self.is_up = True
        self.first_attempt.set()
        self._on_up(url)

    def _went_down(self, reason: str, url: str) -> None:
        was_up, self.is_up = self.is_up, False
        if self._control is not None:
            self._control.hang_up()
            self._control = None
        self._pending = None
        if not self._stopping:
            self.last_error = reason
            self._next_address += 1
            self._log.log(logging.WARNING, f"down {reason}", "%s: %s: %s", self._name, url, reason)
        self._lost()
        if was_up:
            self._on_down(reason)
        self.first_attempt.set()

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; `stop` cuts it short, other calls of `wake` are served."""
        deadline_s = time.monotonic() + seconds
        self._wait_offline(lambda: self._stopping or time.monotonic() >= deadline_s, deadline_s)

    def _wait_offline(self, is_over: Callable[[], bool], deadline_s: float) -> None:
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        while not is_over():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return
            if poller.poll(left_s * 1000 + 1):
                self._clear_wake()
                self._woken()

    def _clear_wake(self) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass  # another wake was cleared by the same read

    # ---- connecting ----

    def _connect(self) -> Control:
        """TCP, TLS and CONNACK within `connect_timeout`."""
        deadline_s = time.monotonic() + self._options.connect_timeout
        self._hung = [thread for thread in self._hung if thread.is_alive()]
        if len(self._hung) >= _CONNECTORS:
            raise Ended("name resolution or TLS still hangs")
        index = self._next_address
        timeout_s = self._options.connect_timeout
        attempt = _Attempt(lambda: self._open(index, timeout_s), self.wake, f"{self._name}-connector")
        control: Control | None = None
        try:
            self._wait_offline(lambda: self._stopping or not attempt.thread.is_alive(), deadline_s)
            # The thread wakes us a moment before it ends.
            attempt.thread.join(0.0 if self._stopping else max(0.0, min(0.2, deadline_s - time.monotonic())))
            control = attempt.result()
            if control is None:
                raise Ended("closed" if self._stopping else "timed out")
        finally:
            if control is None:
                attempt.abandon()
                self._hung.append(attempt.thread)
        self._control = control
        self._restart()
        self._last_sent_s = self._last_received_s = time.monotonic()
        self._loop(control, lambda: self._inbound.connack >= 0, deadline_s)
        if self._inbound.connack > 0:
            raise Ended(self._closed_reason())
        if self._inbound.connack < 0:
            raise Ended("no CONNACK in time" if time.monotonic() >= deadline_s else "closed")
        return control

    # ---- connected ----

    def _serve(self, control: Control) -> None:
        self._loop(control, lambda: False, None)
        self._say_goodbye(control)

    def _loop(self, control: Control, is_over: Callable[[], bool], deadline_s: float | None) -> None:
        """Turn until `is_over`, the deadline or `stop`.  Raises Ended or OSError when the connection has ended."""
        assert control.tap is not None
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        poller.register(control.tap, 0)
        while not is_over():
            now_s = time.monotonic()
            if deadline_s is not None and now_s >= deadline_s:
                return
            if self._stopping and (not self.is_up or self._is_drained() or now_s >= self._stop_by_s):
                return
            self._check_alive(now_s)
            is_blocked = self._write(control, now_s)
            wants_to_read = self._wants_to_read()
            if not wants_to_read:
                self._last_received_s = now_s  # it is we who are silent
            mask = (select.POLLIN if wants_to_read else 0) | (select.POLLOUT if is_blocked else 0)
            poller.modify(control.tap, mask)
            sleeps = is_blocked or not self.is_up or self._may_sleep()
            for fd, event in poller.poll(self._sleep_ms(now_s, deadline_s) if sleeps else 0):
                if fd == self._wake_fd:
                    self._clear_wake()
                    self._woken()
                elif event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    if not wants_to_read and not event & select.POLLIN:
                        raise Ended("closed by the broker")  # what it still sent will be sent again
                    self._read(control)
            if control.is_closed:
                raise Ended(self._closed_reason())

    def _closed_reason(self) -> str:
        code = self._inbound.connack
        return _REFUSED.get(code, f"refused: code {code}") if code > 0 else "closed by the broker"

    def _sleep_ms(self, now_s: float, deadline_s: float | None) -> float:
        half_s = self._options.keep_alive / 2
        times = [min(self._last_sent_s, self._last_received_s) + half_s, self._last_received_s + 3 * half_s]
        if self._last_sent_s >= self._last_received_s + half_s:
            times = times[1:]  # the ping is out
        if deadline_s is not None:
            times.append(deadline_s)
        if self._stopping:
            times.append(self._stop_by_s)
        own_s = self._next_deadline_s() if self.is_up else None
        if own_s is not None:
            times.append(own_s)
        return max(0.0, min(times) - now_s) * 1000 + 1

    def _check_alive(self, now_s: float) -> None:
        if now_s - self._last_received_s >= 1.5 * self._options.keep_alive:
            raise Ended("the broker has been silent for one and a half keep-alives")
        if self.is_up:
            self._check(now_s)

    def _ping_is_due(self, now_s: float) -> bool:
        half_s = self._options.keep_alive / 2
        if now_s - self._last_sent_s >= half_s:
            return True
        # One ping a half keep-alive: after it, the time without a byte received decides.
        return now_s - self._last_received_s >= half_s and self._last_sent_s - self._last_received_s < half_s

    def _write(self, control: Control, now_s: float) -> bool:
        """Write what is due.  Returns whether the socket takes no more now."""
        assert control.tap is not None
        for _ in range(_WRITES):
            if self._pending is None:
                if control.want_write():
                    control.loop_write()
                    if control.is_closed:
                        raise Ended("closed while writing")
                    if control.want_write():
                        return True  # and nobody else may write before the rest of that packet
                if not self.is_up:
                    return False
                self._pending_is_ping = self._ping_is_due(now_s)
                self._pending = memoryview(_PINGREQ) if self._pending_is_ping else self._next_bytes()
                if self._pending is None:
                    return False
                control.tap.is_writing = True
            try:
                n = control.tap.sock.send(self._pending)
            except WOULD_BLOCK:
                return True
            self._last_sent_s = now_s
            if not self._pending_is_ping:
                self._wrote(n)
            self._pending = self._pending[n:] if n < len(self._pending) else None
            control.tap.is_writing = self._pending is not None
        return False

    def _read(self, control: Control) -> None:
        assert control.tap is not None
        sock = control.tap.sock
        is_tls = isinstance(sock, ssl.SSLSocket)
        is_at_end = False
        for _ in range(_READS):
            view = self._inbound.space(_READ_BYTES)
            try:
                n = sock.recv_into(view)
            except WOULD_BLOCK:
                break
            except ssl.SSLEOFError:
                n = 0
            if n == 0:
                is_at_end = True
                break
            self._inbound.received(n)
            # TLS hands out one record a call, so only "would block" means that there is no more.
            if not is_tls and n < len(view):
                break
            if self._inbound.waiting_bytes() >= _READ_AHEAD_BYTES:
                break
        if not is_tls and not is_at_end:
            # Brokers that leave Nagle on send the next acknowledgements only when these are acknowledged.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._last_received_s = time.monotonic()
        self._work_off(control)
        if is_at_end:
            raise Ended(self._closed_reason())

    def _work_off(self, control: Control) -> None:
        again = True
        while again and not control.is_closed:
            try:
                data, again = self._take()
            except ValueError as exc:
                self.malformed += 1
                raise Ended(str(exc)) from None
            if data:
                control.pump(data)

    def _say_goodbye(self, control: Control) -> None:
        """DISCONNECT, unless a batch is half out: then the broker just sees the end."""
        if self._pending is not None or control.tap is None or control.is_closed:
            return
        control.tap.linger_s = max(0.0, min(_LINGER_S, self._stop_by_s - time.monotonic()))
        control.disconnect()
        control.loop_write()
