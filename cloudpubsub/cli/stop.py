"""How a command is asked to end: SIGTERM, Ctrl-C, or another of its threads."""

from __future__ import annotations

import select
import signal
import socket
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Stop"]


class Stop:
    """A flag that a signal or a thread raises and the main thread waits for; a context manager, on the main thread.

    An event of `threading` would not do: a signal handler that sets it can run while the same thread holds its lock.
    Here the kernel keeps the flag, so `set` may be called from any thread at any moment.  A signal that the parent
    process told us to ignore (a shell's background job and Ctrl-C) stays ignored.
    """

    def __init__(self) -> None:
        #: The signal that came, if one did.
        self.signal: signal.Signals | None = None
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1

    def __enter__(self) -> Stop:
        # Python's own handlers run only when the main thread runs; this byte wakes it whichever thread got the signal.
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._reader.close()
        self._writer.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        self.set()

    def set(self) -> None:
        """Ask for the end.  Any thread, any number of times; after the `with` block it does nothing."""
        try:
            self._writer.send(b"\0")
        except OSError:
            pass  # full of such bytes already, or everything is over

    def fileno(self) -> int:
        """A descriptor that is readable once the end was asked for."""
        return self._reader.fileno()

    @property
    def is_set(self) -> bool:
        return self.wait(0)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the request, at most `timeout_s` seconds (None: no limit).  Returns whether it came."""
        poller = select.poll()
        poller.register(self._reader, select.POLLIN)
        return bool(poller.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000))
