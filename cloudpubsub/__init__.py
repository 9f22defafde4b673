"""Reliable MQTT transfer of telemetry over unreliable networks: `Client`, and `Spool`, its durable queue alone."""

try:
    from cloudpubsub import _link as _link
    from cloudpubsub import _sender as _sender
    from cloudpubsub import _spool as _spool
except ImportError as exc:
    raise ImportError(
        "cloudpubsub's native part is missing; build it with `pip install .` (or `pip install -e .`) in its directory"
    ) from exc

from cloudpubsub._client import Client
from cloudpubsub._errors import (
    ClosedError,
    ConnectError,
    DeliveryFailed,
    Error,
    ForkedError,
    IdentityError,
    OptionError,
    PayloadTooLarge,
    SpoolError,
    SpoolFull,
    SpoolLockedError,
    TLSFileError,
    TopicError,
    WaitTimeout,
    WrongThreadError,
)
from cloudpubsub._message import Drop, Health, Message, Recovery, Stats, Will
from cloudpubsub._options import Options
from cloudpubsub._queue import Spool
from cloudpubsub._tls import TLS
from cloudpubsub.dedupe import MessageId

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "Client",
    "ClosedError",
    "ConnectError",
    "DeliveryFailed",
    "Drop",
    "Error",
    "ForkedError",
    "Health",
    "IdentityError",
    "Message",
    "MessageId",
    "OptionError",
    "Options",
    "PayloadTooLarge",
    "Recovery",
    "Spool",
    "SpoolError",
    "SpoolFull",
    "SpoolLockedError",
    "Stats",
    "TLSFileError",
    "TopicError",
    "WaitTimeout",
    "Will",
    "WrongThreadError",
    "__version__",
]
