"""The publish connection: sends the log, in order, and settles what the broker acknowledges.

Messages never become Python objects on their way out: the `Sender` frames batches of records natively into one buffer,
this thread hands the buffer to the socket, and the acknowledgements go natively back into the log.  The session is
clean: the broker keeps nothing for a publisher, the log is the session.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cloudpubsub._connection import Connection, Ended
from cloudpubsub._dispatcher import CallEach, Dispatcher
from cloudpubsub._errors import ClosedError, SpoolError
from cloudpubsub._link import Sender
from cloudpubsub._message import Drop
from cloudpubsub._paho import Control, open_control

if TYPE_CHECKING:
    from cloudpubsub._options import Options
    from cloudpubsub._spool import Log

__all__ = ["Publisher"]

_PACKET_MAX = 1 << 20  # what a broker has to say to a publisher is tiny
_READ_RETRY_S = 1.0
_REPORTED = 1024  # acknowledged messages that the Sender reports at once
_HEAD_LOOKS = 0.05  # of `ack_timeout`: how exactly the movement of the head is known
_BURST_S = 0.1  # how much of `max_publish_rate` may be saved up


class Publisher(Connection):
    """Owner of the publish connection and only reader of the log.  See `Connection` for the threads."""

    def __init__(
        self,
        options: Options,
        log: Log,
        dispatcher: Dispatcher,
        on_up: Callable[[str], None],
        on_down: Callable[[str], None],
    ) -> None:
        self._sender = Sender(log, options.max_inflight, options.max_inflight_bytes, _PACKET_MAX)
        super().__init__(
            options, "cloudpubsub-publish", options.client_id, self._sender, log.wake_fd, on_up, on_down
        )
        self._spool_log = log
        self._dispatcher = dispatcher
        self._storage = log.storage()[0]  # as last reported
        self._reports = options.on_publish is not None
        self._held: CallEach | None = None  # a report for which the dispatcher had no room
        self._oldest_s: float | None = None  # when the oldest message in flight was framed
        self._head = -1  # of the log, when last looked at,
        self._head_moved_s = 0.0  # and when it was last found to have moved
        self._read_again_s = 0.0
        self._was_acked = False  # on this connection
        self._rate = options.max_publish_rate
        self._tokens = 0.0
        self._tokens_at_s = 0.0
        #: Set whenever acknowledgements came.
        self.acked = threading.Event()
        #: Read by any thread.
        self.inflight = 0
        self.resent = 0
        self.unknown_acks = 0

    def _open(self, address_index: int, timeout_s: float) -> Control:
        addresses = self._options.addresses
        return open_control(
            self._options,
            addresses[address_index % len(addresses)],
            self._client_id,
            clean_session=True,
            with_will=True,
            timeout_s=timeout_s,
        )

    def _has_carried(self) -> bool:
        return self._was_acked

    def _restart(self) -> None:
        self._sender.restart()
        self._was_acked = False
        self._head_moved_s = time.monotonic()
        self._note_inflight()

    def _established(self, control: Control) -> None:
        self._spool_log.link(True)

    def _lost(self) -> None:
        try:
            # Nothing is in flight without a link, and may be dropped where that is the policy.
            self._restart()
            self._spool_log.link(False)
        except ClosedError:
            pass  # closed while we hung; there is nothing to tell any more

    # ---- out ----

    def _next_bytes(self) -> memoryview | None:
        now_s = time.monotonic()
        if self._stopping or now_s < self._read_again_s:
            return None
        room = self._take_tokens(now_s)
        if room <= 0:
            return None
        try:
            framed = self._sender.frame(int(now_s * 1000), room)
        except SpoolError as exc:
            self._read_again_s = now_s + _READ_RETRY_S
            self._log.log(logging.ERROR, "read", "the spool cannot be read (tried again every second): %s", exc)
            return None
        self._tokens -= framed
        self._note_inflight()
        return self._sender.unsent() if self._sender.has_unsent() else None

    def _take_tokens(self, now_s: float) -> int:
        """How many messages may go now."""
        if self._rate is None:
            return 0xFFFFFFFF
        full = max(1.0, self._rate * _BURST_S)
        self._tokens = min(full, self._tokens + (now_s - self._tokens_at_s) * self._rate)
        self._tokens_at_s = now_s
        return int(self._tokens)

    def _wrote(self, n: int) -> None:
        self._sender.sent(n)

    def _may_sleep(self) -> bool:
        if self._stopping or self._sender.window_full or time.monotonic() < self._read_again_s:
            return True
        if self._rate is not None and self._tokens < 1:
            return True
        return self._spool_log.arm()

    def _next_deadline_s(self) -> float | None:
        times = []
        if self._oldest_s is not None and self._held is None:
            times.append(max(self._oldest_s, self._head_moved_s) + self._options.ack_timeout)
        if self._rate is not None and self._tokens < 1:
            times.append(self._tokens_at_s + (1 - self._tokens) / self._rate)
        if self._read_again_s > time.monotonic():
            times.append(self._read_again_s)
        return min(times, default=None)

    def _is_drained(self) -> bool:
        return self.inflight == 0 and self._pending is None

    # ---- in ----

    def _take(self) -> tuple[bytearray, bool]:
        if self._held is not None and self.is_up:
            return bytearray(), False
        reported, settled, control = self._sender.take(self._reports)
        self._note_inflight()
        if settled:
            self._was_acked = True
            self._note_head()
            self.acked.set()
        if reported:
            assert self._options.on_publish is not None
            self._held = CallEach(self._options.on_publish, reported)
            self._report_held()
        return control, self._reports and settled >= _REPORTED and self._held is None

    def _report_held(self) -> bool:
        """Give the dispatcher the report that waits.  Returns whether none waits now."""
        if self._held is not None and self._dispatcher.put(self._held):
            self._held = None
        return self._held is None

    def _wants_to_read(self) -> bool:
        return self._held is None

    def _check(self, now_s: float) -> None:
        if self._oldest_s is None or self._held is not None:
            return
        # What counts is the oldest message: without its acknowledgement the log cannot move on, however many others
        # come.  On a slow link the head moves with each acknowledgement, so nothing is given up that only takes long.
        if now_s - max(self._oldest_s, self._head_moved_s) >= self._options.ack_timeout:
            raise Ended(f"no acknowledgement for {self._options.ack_timeout:g} s")

    def _note_head(self) -> None:
        now_s = time.monotonic()
        if self._oldest_s is None:
            self._head_moved_s = now_s
        elif now_s - self._head_moved_s >= self._options.ack_timeout * _HEAD_LOOKS:
            head = self._spool_log.stats()["head"]
            if head != self._head:
                self._head, self._head_moved_s = head, now_s

    def _note_inflight(self) -> None:
        self.inflight, _, oldest_ms = self._sender.inflight()
        self._oldest_s = None if oldest_ms is None else oldest_ms / 1000
        self.resent = self._sender.resent
        self.unknown_acks = self._sender.unknown_acks()

    # ---- on request ----

    def _woken(self) -> None:
        if self._held is not None and self._report_held() and self._control is not None:
            self._work_off(self._control)  # what waited behind the report
        self.report_losses()

    def report_losses(self) -> None:
        """Tell about messages that ended without an acknowledgement, and about the storage, since the last call."""
        try:
            self._report_storage()
            while losses := self._spool_log.take_losses():
                for loss in losses:
                    self._report_loss(*loss)
        except ClosedError:
            pass  # closed while we hung

    def _report_storage(self) -> None:
        storage, error = self._spool_log.storage()
        if storage == self._storage:
            return
        self._storage = storage
        if storage == "ok":
            self._log.log(logging.INFO, "storage ok", "the storage works again")
        elif storage == "full":
            self._log.log(logging.WARNING, "storage full", "the storage is full: the spool's limits refuse more data")
        else:
            self._log.log(
                logging.WARNING, "storage failed", "the storage failed: %s; it is tried again", os.strerror(error)
            )

    def _report_loss(self, first: int, end: int, count: int, size: int, reason: str) -> None:
        self._log.log(
            logging.WARNING, f"loss {reason}", "%d messages lost, positions %d to %d: %s", count, first, end, reason
        )
        self._dispatcher.report_drop(Drop(first, end, count, size, reason))
