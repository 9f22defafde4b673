"""The values that travel between the client and its user: messages, reports and figures.

Plain data: no I/O, no threads, no locks.  Everything may be shared between threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloudpubsub._application_message import Message
from cloudpubsub._errors import OptionError, TopicError
from cloudpubsub._topic import check_topic

__all__ = ["Drop", "Health", "Message", "Recovery", "Stats", "Will"]

_WILL_PAYLOAD_MAX = 65_535


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes, at QoS 1, when the publish connection is lost without a goodbye.

    Args:
        topic: Topic to publish to.
        payload: At most 65,535 bytes; a str is encoded as UTF-8.
        retain: True: the broker keeps it for later subscribers.

    Raises OptionError for what MQTT does not allow.
    """

    topic: str
    payload: bytes | str = b""
    retain: bool = False

    def __post_init__(self) -> None:
        try:
            check_topic(self.topic)
        except (TopicError, TypeError) as exc:
            raise OptionError("will.topic", repr(self.topic)[:200], str(exc)) from None
        payload: object = self.payload
        if isinstance(payload, str):
            try:
                payload = payload.encode()
            except UnicodeEncodeError:
                raise OptionError("will.payload", "a str with lone surrogates", "expected valid Unicode") from None
        if not isinstance(payload, (bytes, bytearray, memoryview)):
            raise OptionError("will.payload", f"a {type(payload).__name__}", "expected bytes or str")
        payload = bytes(payload)
        if len(payload) > _WILL_PAYLOAD_MAX:
            raise OptionError("will.payload", f"{len(payload)} bytes", "at most 65535 bytes")
        object.__setattr__(self, "payload", payload)
        if not isinstance(self.retain, bool):
            raise OptionError("will.retain", repr(self.retain), "expected True or False")

    @property
    def payload_bytes(self) -> bytes:
        """The payload as it is sent."""
        return self.payload.encode() if isinstance(self.payload, str) else self.payload


@dataclass(frozen=True, slots=True)
class Drop:
    """Messages that a limit took out of the log before they were delivered.

    `count` messages of `bytes` bytes in all (as records, header included), every one at a position in
    `[first, end)`.  `reason` says which limit.
    """

    first: int
    end: int
    count: int
    bytes: int
    reason: str

    def merged(self, other: Drop) -> Drop:
        """One report for both.  The caller makes sure that the reasons are the same."""
        return Drop(
            min(self.first, other.first),
            max(self.end, other.end),
            self.count + other.count,
            self.bytes + other.bytes,
            self.reason,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a client has done and how it stands: one consistent picture per call of `stats()`.

    Where `uncertain` is None, `published == acked + dropped + dead_lettered + backlog_messages`, and the same in bytes.
    Counters of the log go on across restarts of the same spool; those of connections and handlers start at 0 with the
    client.
    """

    #: Messages (and bytes of their records) that `publish()` has taken.
    published: int
    published_bytes: int
    #: Of these, acknowledged by the broker.
    acked: int
    acked_bytes: int
    #: Taken out by a limit that the user set.
    dropped: int
    dropped_bytes: int
    #: Of those dropped, because their time to live was over.
    expired: int
    #: Refused by the broker for good and moved to the dead letters.
    dead_lettered: int
    dead_lettered_bytes: int
    #: Still to be acknowledged, those in flight included.
    backlog_messages: int
    backlog_bytes: int
    #: Seconds until the backlog is sent, at the rates of the last minute; 0.0 without one, infinite if it grows.
    drain_seconds: float
    #: Sent again after a reconnect.
    resent: int
    #: Refused by the broker; each refusal counts.
    refused_by_broker: int
    #: On the wire and not yet acknowledged, now.
    inflight: int
    #: Age of the oldest message of the backlog, in seconds; 0.0 without one.
    oldest_age_seconds: float
    #: Bytes of the ring in use, now.
    ring_used_bytes: int
    #: Bytes and number of segment files on the disk, now.
    spool_bytes: int
    spool_segments: int
    #: Bytes written to segments by this process.
    spilled_bytes: int
    #: "ok", "memory" (no spool), or what is wrong with the storage.
    storage: str
    #: Damage found in the spool: ranges skipped, and their bytes.
    damaged_ranges: int
    damaged_bytes: int
    #: Positions `[first, end)` whose messages may be counted wrongly, because volatile state was lost; else None.
    uncertain: tuple[int, int] | None
    #: Whether the publish connection is up.
    connected: bool
    #: How the publish and the subscribe connection are: "up", "idle" (not wanted yet), or why not: "refused" (by the
    #: broker: credentials, client id), "certificate expired" (the broker's or ours), "certificate not accepted",
    #: "clock wrong" (of this machine: a certificate is not valid yet), "down" (anything that may pass by itself).
    publish_link: str
    subscribe_link: str
    #: Connections made, and those of them that came after a loss; both connections together.
    connects: int
    reconnects: int
    #: Why a connection or an attempt ended last; "" if none did.
    last_error: str
    #: Acknowledgements for a packet id that was not in flight.
    unknown_acks: int
    #: Packets that broke the protocol; each ended its connection.
    malformed: int
    #: Messages received on subscriptions.
    received: int
    #: Received messages that matched no handler; they were acknowledged.
    unmatched: int
    #: Received messages given up after the handler failed too often.
    dead_lettered_inbound: int
    #: Exceptions out of handlers (each try counts) and out of callbacks.
    handler_errors: int
    callback_errors: int


@dataclass(frozen=True, slots=True)
class Health:
    """What somebody should look at.  An outage of the network is none of it: that is what the log is for.

    `problems` has a line for each; `ok` says that there is none.  `needs_restart`: a thread has ended or is stuck,
    which only another process cures; a watchdog that looks at nothing but `ok` would restart for a broker that refuses
    us, or for a disk that is full, to no end.
    """

    problems: tuple[str, ...] = ()
    needs_restart: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What opening a spool found."""

    #: Messages found, and bytes of their records.
    records: int
    bytes: int
    #: Bytes after the last good record of a file that was being written; a crash leaves them, nothing is lost.
    torn_bytes: int
    #: Ranges that held messages and cannot be read, and their bytes.
    damaged_ranges: int
    damaged_bytes: int
    #: Segment files looked at.
    segments: int
    #: Of `records`, those found in the memory ring of a process that ended without closing.
    ring_records: int
    #: Bytes read to find that out: headers and footers, and segments that were not sealed.
    bytes_read: int
    #: How long it took, in seconds.
    duration_s: float
