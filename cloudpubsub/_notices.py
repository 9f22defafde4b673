"""What the publish thread has to tell the user: dead letters, other messages that were lost, and how the storage is."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from typing import TYPE_CHECKING

from cloudpubsub._errors import ClosedError
from cloudpubsub._message import Drop

if TYPE_CHECKING:
    from cloudpubsub._dispatcher import Call, Dispatcher
    from cloudpubsub._report import RateLimitedLog
    from cloudpubsub._spool import Log

__all__ = ["Notices"]


class Notices:
    """Hands the dispatcher what it has room for and keeps the rest.  For the publish thread, and for whoever closes."""

    def __init__(self, spool_log: Log, dispatcher: Dispatcher, log: RateLimitedLog) -> None:
        self._spool_log = spool_log
        self._dispatcher = dispatcher
        self._log = log
        self._storage = spool_log.storage()[0]  # as last told
        self._dead: deque[Call] = deque()  # dead letters for which the dispatcher had no room

    @property
    def wait(self) -> bool:
        """Whether dead letters wait for room: before they are gone nothing is sent or read, or they would pile up."""
        return bool(self._dead)

    def add(self, dead_letter: Call) -> None:
        self._dead.append(dead_letter)
        self._give_dead()

    def give(self) -> None:
        """Tell about messages that ended without an acknowledgement, and about the storage, since the last call."""
        self._give_dead()
        try:
            self._give_storage()
            while losses := self._spool_log.take_losses():
                for loss in losses:
                    self._give_loss(*loss)
        except ClosedError:
            pass  # closed while we hung

    def give_rest(self, timeout_s: float) -> None:
        """The dead letters that still wait, at most `timeout_s` seconds."""
        deadline_s = time.monotonic() + timeout_s
        while self._dead and (left_s := deadline_s - time.monotonic()) > 0:
            if self._dispatcher.put(self._dead[0], left_s):
                self._dead.popleft()
        if self._dead:
            self._log.log(logging.ERROR, "rest", "%d dead letters could not be reported", len(self._dead))

    def _give_dead(self) -> None:
        while self._dead and self._dispatcher.put(self._dead[0]):
            self._dead.popleft()

    def _give_storage(self) -> None:
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

    def _give_loss(self, first: int, end: int, count: int, size: int, reason: str) -> None:
        self._log.log(
            logging.WARNING, f"loss {reason}", "%d messages lost, positions %d to %d: %s", count, first, end, reason
        )
        self._dispatcher.report_drop(Drop(first, end, count, size, reason))
