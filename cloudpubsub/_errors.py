"""Every exception that the package raises on purpose.

All derive from `Error`; where Python has a fitting type they derive from that too, so that a caller who knows only the
standard types still catches them.  Each docstring says when it is raised, whose move it is and what to do.  No message
ever contains a password or a key.
"""

from __future__ import annotations

__all__ = [
    "ClosedError",
    "ConnectError",
    "DeliveryFailed",
    "Error",
    "ForkedError",
    "IdentityError",
    "OptionError",
    "PayloadTooLarge",
    "SpoolError",
    "SpoolFull",
    "SpoolLockedError",
    "TLSFileError",
    "TopicError",
    "WaitTimeout",
    "WrongThreadError",
]


class Error(Exception):
    """Base of every exception of this package."""


class TopicError(Error, ValueError):
    """A topic or a topic filter breaks the MQTT rules.  Nothing was stored.  The caller corrects the topic."""


class PayloadTooLarge(Error, ValueError):
    """A message can never fit: its payload is above `max_payload_bytes`, or the whole record above a quarter of ring or
    segment.  Nothing was stored.  The caller splits the message, or raises `max_payload_bytes` and `ring_bytes`."""


class OptionError(Error, ValueError):
    """A setting has a value that is not allowed.  Raised before anything starts; the caller corrects the setting.

    `field` is the setting, `shown` the value as text (a secret is never shown), `allowed` what may stand there.
    """

    def __init__(self, field: str, shown: str, allowed: str) -> None:
        super().__init__(field, shown, allowed)
        self.field = field
        self.shown = shown
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.field}: {self.shown} is not allowed; {self.allowed}"


class SpoolFull(Error):
    """The quota, the free-space reserve or a failed storage refuses data, and `on_full` says to raise (or a "block" ran
    out of time).  Nothing was stored.  The caller keeps the message and tries later, or gives it up."""


class SpoolLockedError(Error, OSError):
    """Another process, or another object of this process, owns the spool.  The operator stops the other owner or gives
    this one a directory of its own; there is nothing to retry before that."""


class SpoolError(Error, OSError):
    """The storage failed; `errno`, `strerror` and `filename` say how and where.  The operator looks at disk and file
    permissions.  What was stored before stays readable as far as the disk gives it back."""


class IdentityError(Error):
    """The spool holds messages of another client id.  The operator gives the right `spool` or the right `client_id`;
    sending one gateway's messages under another's name would be worse than not sending them."""


class ClosedError(Error, RuntimeError):
    """The client or spool was closed, or is closing.  Nothing was stored.  The caller opens a new one."""


class ForkedError(Error, RuntimeError):
    """A client or spool that was opened before a fork is used in the child.  The child holds nothing of it; it opens a
    client of its own, with another spool and another client id."""


class WrongThreadError(Error, RuntimeError):
    """A call that waits for handlers was made by a handler or callback, where it could never end.  The program makes it
    from another thread."""


class DeliveryFailed(Error):
    """A message that was waited for ended without an acknowledgement: dropped by a limit, or moved to the dead letters.

    `position` names the message and `reason` says why.  It will not be sent any more: the caller decides whether to
    publish it again.
    """

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(position, reason)
        self.position = position
        self.reason = reason

    def __str__(self) -> str:
        return f"the message at position {self.position} was not delivered: {self.reason}"


class ConnectError(Error, ConnectionError):
    """With `connect_first`: the first connection failed, so `start()` did.  The text says what the broker or the
    network answered.  The operator corrects address, credentials or certificates; or the program starts without
    `connect_first` and the client keeps trying."""


class TLSFileError(Error, OSError):
    """A certificate or key file cannot be read or does not hold what it should; `filename` names it.  A running client
    tries again with the next connection, because files are being replaced when certificates are renewed."""


class WaitTimeout(Error, TimeoutError):
    """The time limit of a call passed first.  Nothing is lost: the message stays in the log and is sent when the link
    allows.  The caller may wait again."""
