"""The part of making a connection that can block for longer than anybody wants to wait: names, TCP, proxies, TLS,
WebSockets.

It runs on a helper thread of its own, which the owner of the connection leaves behind when time is up: nothing can end
a name resolution that hangs.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Literal

from cloudpubsub._paho import Control, Stage

__all__ = ["Attempt", "LinkState", "explain", "state_after"]

#: How a connection is: "up", "idle" (not wanted yet), or why it is not up, where that asks for somebody to act.
LinkState = Literal["up", "idle", "down", "refused", "certificate expired", "certificate not accepted", "clock wrong"]

_NOT_YET_VALID, _EXPIRED = 9, 10  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED
_NO_SOONER_S = 1_735_689_600  # 2025: a clock that says less was never set


class Attempt:
    """One attempt.  Begins at once; calls `wake` (on the helper thread) when `is_over` has become true.

    The owner calls either `result`, when it is over, or `abandon`.
    """

    def __init__(self, connect: Callable[[Attempt], Control], wake: Callable[[], None], name: str) -> None:
        self._connect = connect
        #: What it is at, and since when (monotonic); replaced as a whole, so any thread may look.
        self.stage: tuple[Stage, float] = ("name resolution", time.monotonic())
        self._wake = wake
        self._lock = threading.Lock()  # guards the four fields below
        self._control: Control | None = None
        self._error: BaseException | None = None
        self._is_over = False
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        control: Control | None = None
        error: BaseException | None = None
        try:
            control = self._connect(self)
        except BaseException as exc:
            error = exc
        with self._lock:
            is_wanted = not self._is_abandoned
            if is_wanted:
                self._control, self._error = control, error
            self._is_over = True
        if is_wanted:
            self._wake()
        elif control is not None:
            control.hang_up()

    def note_stage(self, stage: Stage) -> None:
        """On the helper thread."""
        self.stage = (stage, time.monotonic())
        self._wake()

    @property
    def is_over(self) -> bool:
        with self._lock:
            return self._is_over

    def result(self) -> Control | None:
        """The connection, which is the caller's from now on, or None if it is not there yet; raises what went wrong.

        What is no Exception (a credentials callable may raise SystemExit) comes as RuntimeError: it must not end the
        thread that asks.
        """
        with self._lock:
            error, self._error = self._error, None
            control, self._control = self._control, None
        if isinstance(error, Exception):
            raise error
        if error is not None:
            raise RuntimeError(f"connecting raised {type(error).__name__}: {error}") from error
        return control

    def abandon(self) -> None:
        """Nobody waits any more; a connection that still comes is closed."""
        with self._lock:
            self._is_abandoned = True
            control, self._control = self._control, None
        if control is not None:
            control.hang_up()


def state_after(error: BaseException) -> LinkState:
    """What a connection error says about what has to be done.

    A certificate that is not valid yet speaks of a clock that is behind: gateways without a battery start in the past.
    """
    if not isinstance(error, ssl.SSLError):
        return "down"
    if isinstance(error, ssl.SSLCertVerificationError):
        code = getattr(error, "verify_code", 0)  # OpenSSL's; an error that Python code made has none
        if code == _NOT_YET_VALID or time.time() < _NO_SOONER_S:
            return "clock wrong"
        return "certificate expired" if code == _EXPIRED else "certificate not accepted"
    reason = getattr(error, "reason", None) or ""  # what the broker thinks of ours
    if "CERTIFICATE_EXPIRED" in reason:
        return "certificate expired"
    return "certificate not accepted" if "ALERT" in reason and ("CERT" in reason or "UNKNOWN_CA" in reason) else "down"


def explain(error: BaseException) -> str:
    """A connection error in words that name the state."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: certificate not accepted: {getattr(error, 'verify_message', error)}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {getattr(error, 'reason', None) or error}"
    if isinstance(error, socket.gaierror):
        return f"name not resolved: {error.strerror}"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
