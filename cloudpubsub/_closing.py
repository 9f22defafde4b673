"""What is still open when the interpreter exits is closed like any other, so that its ring reaches the disk.

A forked child owns nothing of what its parent has open: log and sockets are let go of where they are made.
"""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from typing import Protocol

__all__ = ["register", "unregister"]

_EXIT_TIMEOUT_S = 5.0


class _Closable(Protocol):
    def close(self, timeout: float = ...) -> int: ...

_open: weakref.WeakSet[_Closable] = weakref.WeakSet()


def register(closable: _Closable) -> None:
    _open.add(closable)


def unregister(closable: _Closable) -> None:
    _open.discard(closable)


def _close_all() -> None:
    for closable in list(_open):
        try:
            closable.close(_EXIT_TIMEOUT_S)
        except BaseException:  # also Ctrl-C: the others are closed all the same
            logging.getLogger("cloudpubsub").exception("closing at exit failed")


atexit.register(_close_all)
os.register_at_fork(after_in_child=_open.clear)
