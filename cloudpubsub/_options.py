"""`Options`: every setting of a client, checked before anything starts.

Immutable, so it may be shared between threads.  Checking touches no file and no network.
"""

# `setting` makes a dataclass field, which is not shared between instances.
# ruff: noqa: RUF009

from __future__ import annotations

import importlib
import logging
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from cloudpubsub._address import Address, parse_url, redact
from cloudpubsub._errors import OptionError
from cloudpubsub._fields import Callback, Choice, Flag, Integer, Kind, Path, ProxyURL, Seconds, Text, setting
from cloudpubsub._message import Drop, Message, Will
from cloudpubsub._tls import TLS
from cloudpubsub.dedupe import MessageId

__all__ = ["Options"]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_SEGMENT_UNIT = 64 * KIB
_RECORD_HEADER_BYTES = 32
_TOPIC_ALLOWANCE_BYTES = 1_024
_SESSION_EXPIRY_S = 86_400
_ENV_PREFIX = "CLOUDPUBSUB_"
_DAY_S = 86_400.0
_PAYLOAD_MAX: dict[str | None, int] = {"aws-iot-core": 128 * KIB}
_PRESETS: dict[str, dict[str, Any]] = {
    # docs.aws.amazon.com/general/latest/gr/iot-core.html: limits of a connection
    "aws-iot-core": {
        "max_publish_rate": 100.0,
        "max_publish_bytes_rate": 512.0 * KIB,
        "max_inflight": 100,
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """All settings of a client; the comment at each field gives unit, limits, special values and cost.

    Fields described as *derived* may be left out (or None); after construction they hold the value in force.  A wrong
    value raises OptionError, which names the field, the value and what is allowed.  Passwords never show in repr.
    """

    #: Broker URL, or several in the order in which they are tried (one broker's fail-over addresses: all get the same
    #: credentials).  `mqtt://[user[:password]@]host[:1883]` or `mqtts://…[:8883]`, and through a WebSocket
    #: `ws://…[:80][/mqtt]` or `wss://…[:443][/mqtt]`.  Afterwards a tuple without credentials.
    broker: str | Sequence[str]
    #: MQTT client id of the publish connection, and the owner of the spool.  Derived: "cloudpubsub-<hostname>-<spool>",
    #: the same at each start on this host with this spool path; random without a spool.  Give one wherever it matters.
    client_id: str = setting(Text(), None, derived=True)
    #: Client id of the subscribe connection; differs from `client_id`.  Derived: `client_id` + "-sub".
    subscribe_client_id: str = setting(Text(), None, derived=True)
    #: User name, or a callable asked at every connect.  None: taken from the URL, or none.
    username: str | Callable[[], str] | None = setting(Text(asked=True, optional=True), None)
    #: Password, or a callable asked at every connect (rotating tokens).  Needs a user name.
    password: str | Callable[[], str] | None = setting(Text(asked=True, optional=True, secret=True), None, shown=False)
    #: How mqtts:// and wss:// connections are verified.  None: by the certificates of the operating system.
    tls: TLS | None = None
    #: Proxy for all connections: `socks5://[user:password@]host:port` or `socks4://[user@]host:port` (both need the
    #: extra `cloudpubsub[proxy]`), or `http://[user:password@]host:port`, which must allow CONNECT.  The proxy resolves
    #: the broker's name.  Never shown, like a password.  None: none, whatever variables like http_proxy say.
    proxy: str | None = setting(ProxyURL(optional=True), None, shown=False)
    #: Published by the broker when the publish connection is lost without a goodbye.
    will: Will | None = None
    #: MQTT version, on both connections.
    protocol: Literal["3.1.1", "5"] = setting(Choice("3.1.1", "5"), "3.1.1")
    #: Limits of a known service, for those of `max_publish_rate`, `max_publish_bytes_rate`, `max_inflight` and
    #: `max_payload_bytes` that are not given.  "aws-iot-core": 100 messages/s, 512 KiB/s, 100 in flight, 128 KiB.
    preset: Literal["aws-iot-core"] | None = setting(Choice("aws-iot-core", optional=True), None)
    #: Seconds of silence after which the link is tested; it is given up after one and a half times as long.
    keep_alive: int = setting(Integer(1, 65_535, "seconds"), 60)

    #: Directory of the durable spool; it belongs to one process.  None: memory only, lost with the process.
    spool: str | os.PathLike[str] | None = setting(Path(optional=True), None)
    #: True: take over a spool that belongs to another client id, with the messages in it.  False: IdentityError then.
    adopt: bool = setting(Flag(), False)
    #: What survives.  "process": everything published survives a crash of the process (kill -9); sealed segments
    #: survive a power cut after at most 30 s.  "power": what is older than `sync_interval` survives a power cut too, at
    #: the cost of writing what is not acknowledged by then.  "memory": a crash loses what is only in the ring; a clean
    #: close loses nothing.
    #: Derived: "process" with a spool, "memory" (the only one possible) without.
    durability: Literal["process", "memory", "power"] = setting(
        Choice("process", "memory", "power"), None, derived=True
    )
    #: Seconds between group commits with durability="power": the longest a power cut can reach back.  Less wears flash.
    sync_interval: float = setting(Seconds(0.001, 3_600), 1.0)
    #: With durability="power": bytes waiting for a group commit that bring it forward.  None: `sync_interval` alone.
    sync_bytes: int | None = setting(Integer(1, GIB, "bytes", optional=True), None)
    #: Memory for the newest messages: a power of two, 64 KiB to 1 GiB.  A record is at most a quarter of it.
    ring_bytes: int = setting(Integer(64 * KIB, GIB, "bytes", power_of_two=True), 4 * MIB)
    #: Directory (on tmpfs) of the ring's file.  None: $RUNTIME_DIRECTORY, else /dev/shm.
    ring_dir: str | os.PathLike[str] | None = setting(Path(optional=True), None)
    #: Size of a segment file: a multiple of 4 KiB, 64 KiB to 1 GiB, at most a quarter of `max_spool_bytes`.
    #: Derived: 8 MiB, or as much less as the quota asks for.
    segment_bytes: int = setting(Integer(64 * KIB, GIB, "bytes", multiple=4 * KIB), None, derived=True)
    #: Quota for the spool's segments in bytes, at least 256 KiB.
    max_spool_bytes: int = setting(Integer(4 * _SEGMENT_UNIT, 1 << 60, "bytes"), GIB)
    #: Quota for the messages on the disk; those in the ring come on top.  None: bytes alone count.
    max_spool_messages: int | None = setting(Integer(1, 1 << 60, "messages", optional=True), None)
    #: Largest payload.  At most a quarter of ring and of segment, less 1,056 bytes for header and topic (a longer topic
    #: or userdata leaves less).  Derived: 256 KiB, or as much less as ring and segment ask for.
    max_payload_bytes: int = setting(Integer(1, 256 * MIB, "bytes"), None, derived=True)
    #: Bytes that a new segment must leave free on the file system for others; 0: none.
    min_free_bytes: int = setting(Integer(0, 1 << 60, "bytes"), 16 * MIB)
    #: What happens when the quota, the free-space reserve or a failed storage refuses data: the oldest messages go, the
    #: new one goes, publish() waits up to `block_timeout`, or it raises SpoolFull.
    on_full: Literal["drop_oldest", "drop_newest", "block", "raise"] = setting(
        Choice("drop_oldest", "drop_newest", "block", "raise"), "drop_oldest"
    )
    #: Seconds that publish() waits with on_full="block" before it raises SpoolFull.  None: without limit.
    block_timeout: float | None = setting(Seconds(0, 365 * _DAY_S, optional=True), None)
    #: Seconds offline after which the ring is written to the disk too.  Longer saves flash, shorter saves messages.
    spill_after: float = setting(Seconds(0, _DAY_S), 10.0)
    #: Seconds that publish() may wait for a healthy disk while the ring is full.
    spill_timeout: float = setting(Seconds(0, _DAY_S), 10.0)

    #: Seconds after which a message that could not be sent is dropped and counted as expired.  `publish(ttl=…)` says it
    #: for one message.  None: never.  Time that the machine was off does not count.
    ttl: float | None = setting(Seconds(0.001, 365 * _DAY_S, optional=True), None)

    #: What goes out first.  "strict": everything in the order of publishing.  The others send what is published while a
    #: backlog drains (live data) beside it: a backlog is what is 10 s old, or more than fits in `max_inflight_bytes`,
    #: when a connection comes up.  "live_first": live data whenever there is any, the backlog with what is left.
    #: "share": `live_share` of what is sent is live data.  Live data and each backlog arrive in order in themselves.
    #: Without a spool, what was sent ahead takes memory until the backlog before it is gone.
    order: Literal["strict", "live_first", "share"] = setting(Choice("strict", "live_first", "share"), "strict")
    #: With order="share": at least so much of what is sent is live data, while there is both; the rest is backlog.
    live_share: int = setting(Integer(1, 99, "per cent of the messages"), 50)
    #: Messages on the wire without acknowledgement, 1 to 65,534.  Derived: 10,000, or what `preset` says.
    max_inflight: int = setting(Integer(1, 65_534, "messages"), None, derived=True)
    #: Bytes on the wire without acknowledgement, so that a slow link is not taken for a dead one.  Afterwards the value
    #: in force, which is at most half of `ring_bytes`.
    max_inflight_bytes: int = setting(Integer(KIB, GIB, "bytes"), MIB)
    #: Messages sent per second.  None: as fast as the link takes them.
    max_publish_rate: float | None = setting(Seconds(0.001, 1e9, unit="messages/s", optional=True), None)
    #: Bytes of packets sent per second, apart from what the network adds.  None: as fast as the link takes them.
    max_publish_bytes_rate: float | None = setting(Seconds(1, 1e12, unit="bytes/s", optional=True), None)
    #: Seconds after which the acknowledgement of a message that the peer's TCP has taken is overdue: where none came
    #: for so long, or one for a later message came so long ago.  The link is given up then.
    ack_timeout: float = setting(Seconds(0.1, _DAY_S), 30.0)
    #: A message is moved to the dead letters when the link drops within so many seconds of sending it alone, three
    #: times, and each time in between a link that carries another in its place stays up for as long.  None: never.
    poison_window: float | None = setting(Seconds(0.1, _DAY_S, optional=True), 10.0)
    #: With protocol "5": each message carries its id (`MessageId`) as the user property "cloudpubsub-id".
    message_ids: bool = setting(Flag(), False)
    #: Seconds for one attempt to connect, from name resolution to the broker's answer.
    connect_timeout: float = setting(Seconds(0.1, _DAY_S), 30.0)
    #: Of these, for each of its parts: name resolution, TCP (each address), the TLS handshake, the broker's answer.
    dns_timeout: float = setting(Seconds(0.1, _DAY_S), 10.0)
    tcp_timeout: float = setting(Seconds(0.1, _DAY_S), 10.0)
    tls_timeout: float = setting(Seconds(0.1, _DAY_S), 20.0)
    connack_timeout: float = setting(Seconds(0.1, _DAY_S), 20.0)
    #: Seconds between attempts to connect: from `reconnect_min`, doubling with jitter, never above `reconnect_max`.
    reconnect_min: float = setting(Seconds(0.001, _DAY_S), 1.0)
    reconnect_max: float = setting(Seconds(0.001, _DAY_S), 60.0)
    #: Seconds that a connection must have lasted, and carried an acknowledgement, before the next delay is short again.
    min_stable: float = setting(Seconds(0, _DAY_S), 5.0)
    #: True: start() raises ConnectError if no address takes the first connection.  False: it starts offline and keeps
    #: trying.
    connect_first: bool = setting(Flag(), False)

    #: Seconds that the broker keeps subscriptions and messages for us while we are away; 0: not at all.  MQTT 3.1.1 can
    #: only say keep or not.  Derived: a day, or 0 if `clean_session` says so or the client id is random.
    session_expiry: int = setting(Integer(0, 0xFFFF_FFFF, "seconds"), None, derived=True)
    #: Short form: True is session_expiry=0.  Derived: from `session_expiry`.
    clean_session: bool = setting(Flag(), None, derived=True)
    #: How often a handler that raised is called again before its message is given up.
    handler_retries: int = setting(Integer(0, 1_000), 3)
    #: Received messages that may wait for handlers; when full, no more are read from the network.  Each 4 KiB of
    #: payload count as a message, so the default takes at most 4 MiB and one message.  The batch at hand, a quarter of
    #: it and 256 messages at most, comes on top.
    handler_queue: int = setting(Integer(1, 1_000_000, "messages"), 1_000)
    #: A message whose handler failed for good: "ack" keeps it in the dead-letter store and acknowledges it,
    #: "disconnect" closes the connection so that the broker delivers it again (needs a session that stays; a message of
    #: QoS 0 is never delivered again and goes to the dead-letter store).
    on_handler_failure: Literal["ack", "disconnect"] = setting(Choice("ack", "disconnect"), "ack")

    #: Callbacks, run on the dispatcher thread.  A connection was made; the argument is the broker's URL.
    on_connect: Callable[[str], object] | None = setting(Callback(optional=True), None)
    #: A connection ended; the argument is the reason.
    on_disconnect: Callable[[str], object] | None = setting(Callback(optional=True), None)
    #: The broker acknowledged a message.
    on_publish: Callable[[Message], object] | None = setting(Callback(optional=True), None)
    #: A limit took messages out of the log.
    on_drop: Callable[[Drop], object] | None = setting(Callback(optional=True), None)
    #: A message, published or received, was moved to the dead letters; the second argument is the reason.
    on_dead_letter: Callable[[Message, str], object] | None = setting(Callback(optional=True), None)

    #: Called on the publish connection's thread for every message that is sent, with the message and its `MessageId`;
    #: what it returns (bytes) is sent as the payload.  So a payload can carry the id under 3.1.1.  It must return
    #: the same each time, quickly; an exception is logged and counted, and the payload stays as it is.
    payload_hook: Callable[[Message, MessageId], bytes] | None = setting(Callback(optional=True), None)

    #: `broker`, taken apart.
    addresses: tuple[Address, ...] = field(init=False, repr=False, compare=False)
    #: Whether `client_id` was worked out here.  Then a spool that knows its owner is right and this id is not.
    client_id_derived: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for item in fields(self):
            kind = item.metadata.get("kind")
            if kind is None:
                continue
            value = getattr(self, item.name)
            if value is not None:
                self._set(item.name, kind.check(item.name, value))
            elif not (kind.optional or item.metadata["derived"]):
                raise kind.refuse(item.name, value)
        self._resolve_preset()
        self._resolve_broker()
        self._resolve_identity()
        self._resolve_sizes()
        self._resolve_session()
        given: Any = self  # as it was given, where the types above say what it becomes
        if given.durability is None:
            self._set("durability", "process" if self.spool is not None else "memory")
        elif self.spool is None and self.durability != "memory":
            raise OptionError("durability", repr(self.durability), 'without a spool only "memory" can be promised')
        if self.reconnect_min > self.reconnect_max:
            raise OptionError("reconnect_min", repr(self.reconnect_min), f"at most reconnect_max={self.reconnect_max}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _resolve_preset(self) -> None:
        values = _PRESETS[self.preset] if self.preset is not None else {}
        for name, value in {"max_inflight": 10_000, **values}.items():
            if getattr(self, name) is None:
                self._set(name, value)
        if self.message_ids and self.protocol != "5":
            raise OptionError("message_ids", "True", 'MQTT 3.1.1 has no user properties; protocol="5", or payload_hook')

    @classmethod
    def check_setting(cls, name: str, value: Any) -> Any:
        """`value` in its stored form, if the setting `name` by itself allows it."""
        kind: Kind = next(item.metadata["kind"] for item in fields(cls) if item.name == name)
        return None if value is None and kind.optional else kind.check(name, value)

    @property
    def protocol_level(self) -> int:
        """As CONNECT carries it."""
        return 5 if self.protocol == "5" else 4

    def _resolve_broker(self) -> None:
        urls, username, password = _split_broker(self.broker)
        for name, found in (("username", username), ("password", password)):
            given = getattr(self, name)
            if found is not None and given is not None and given != found:
                raise OptionError(name, "the given value", "it differs from the one in the broker URL; give it once")
            if found is not None:
                self._set(name, found)
        if self.password is not None and self.username is None:
            raise OptionError("password", "a password without username", "MQTT 3.1.1 needs a username with it")
        self._set("broker", urls)
        self._set("addresses", tuple(parse_url(url).address for url in urls))
        has_tls = any(address.tls for address in self.addresses)
        tls: Any = self.tls
        will: Any = self.will
        if tls is not None and not isinstance(tls, TLS):
            raise OptionError("tls", repr(type(tls).__name__), "expected a TLS object or None")
        if self.tls is not None and not has_tls:
            raise OptionError("tls", "given", "no broker URL is mqtts:// or wss://, so it would protect nothing")
        if self.tls is None and has_tls:
            self._set("tls", TLS())
        if will is not None and not isinstance(will, Will):
            raise OptionError("will", repr(type(will).__name__), "expected a Will object or None")

    def _resolve_identity(self) -> None:
        given: Any = self
        self._set("client_id_derived", given.client_id is None)
        if given.client_id is None:
            host = re.sub(r"[^A-Za-z0-9-]", "-", os.uname().nodename.partition(".")[0])[:63] or "host"
            # Another spool on this host is another gateway to the broker: one id for both would have them
            # take the connection away from each other for ever.
            tail = f"{zlib.crc32(os.fsencode(self.spool)):08x}" if self.spool is not None else os.urandom(8).hex()
            self._set("client_id", f"cloudpubsub-{host}-{tail}")
        if given.subscribe_client_id is None:
            self._set("subscribe_client_id", Text().check("subscribe_client_id", self.client_id + "-sub"))
        if self.subscribe_client_id == self.client_id:
            raise OptionError("subscribe_client_id", repr(self.subscribe_client_id), "it must differ from client_id")

    def _resolve_sizes(self) -> None:
        given: Any = self
        quarter_bytes = self.max_spool_bytes // 4
        if given.segment_bytes is None:
            self._set("segment_bytes", min(8 * MIB, quarter_bytes // _SEGMENT_UNIT * _SEGMENT_UNIT))
        elif self.segment_bytes > quarter_bytes:
            allowed = f"at most a quarter of max_spool_bytes={self.max_spool_bytes}"
            raise OptionError("segment_bytes", repr(self.segment_bytes), allowed)
        record_max = min(self.ring_bytes, self.segment_bytes) // 4
        payload_max = record_max - _RECORD_HEADER_BYTES - _TOPIC_ALLOWANCE_BYTES
        if given.max_payload_bytes is None:
            usual = _PAYLOAD_MAX.get(self.preset, 256 * KIB)
            self._set("max_payload_bytes", min(usual, payload_max))
        elif self.max_payload_bytes > payload_max:
            allowed = (
                f"at most {payload_max}, a quarter of the smaller of ring_bytes={self.ring_bytes} and "
                f"segment_bytes={self.segment_bytes}, less header and topic"
            )
            raise OptionError("max_payload_bytes", repr(self.max_payload_bytes), allowed)
        self._set("max_inflight_bytes", min(self.max_inflight_bytes, self.ring_bytes // 2))

    def _resolve_session(self) -> None:
        given: Any = self
        is_random = self.client_id_derived and self.spool is None
        if given.session_expiry is None:
            clean = is_random if given.clean_session is None else self.clean_session
            self._set("session_expiry", 0 if clean else _SESSION_EXPIRY_S)
        elif given.clean_session is not None and self.clean_session != (self.session_expiry == 0):
            allowed = f"it contradicts session_expiry={self.session_expiry}"
            raise OptionError("clean_session", repr(self.clean_session), allowed)
        if is_random and self.session_expiry > 0:
            raise OptionError("session_expiry", repr(self.session_expiry), "a session that stays needs a client_id")
        self._set("clean_session", self.session_expiry == 0)
        if self.clean_session and self.on_handler_failure == "disconnect":
            allowed = "without a session that stays the broker would not deliver again, and the message would be lost"
            raise OptionError("on_handler_failure", repr(self.on_handler_failure), allowed)

    def credentials(self) -> tuple[str | None, str | None]:
        """User name and password for one attempt to connect.

        Asks the callables, so it runs user code and may block as long as that does; call it with no lock held.  What
        they return is checked like the settings themselves (OptionError); what they raise is passed on.
        """
        answers: list[str | None] = []
        for name, value in (("username", self.username), ("password", self.password)):
            kind = Text(optional=True, secret=name == "password")
            answer = value() if callable(value) else value
            answers.append(None if answer is None else kind.check(name, answer))
        return answers[0], answers[1]

    @classmethod
    def build(
        cls,
        broker: str | Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Options:
        """Options from explicit settings, and from `CLOUDPUBSUB_*` variables for whatever is not given.

        `environ` is `os.environ` if None.  Raises OptionError also for an unknown setting.
        """
        explicit = dict(settings or {})
        if broker is not None:
            explicit["broker"] = broker
        found = _read_environ(os.environ if environ is None else environ)
        if "broker" in explicit:
            # The credentials in that URL belong to that broker; they must not go to another one.
            found.pop("broker", None)
        return cls._from_settings({**_take_credentials(found), **_take_credentials(explicit)})

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Options:
        """Options from `CLOUDPUBSUB_<FIELD>` variables alone.

        Several brokers are separated by commas; sizes may be written 4MiB, switches true or false, no limit none.
        `CLOUDPUBSUB_TLS_CA`, `…_TLS_CERT`, `…_WILL_TOPIC` and so on fill `tls` and `will`.  An empty variable counts as
        not set; an unknown one is logged.
        """
        return cls.build(environ=environ)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Options:
        """Options from a TOML file: its table `[cloudpubsub]` if it has one, else the whole file.

        `tls` and `will` are tables.  Reads the file; the environment plays no part.  Raises OptionError, OSError if the
        file cannot be read, and ImportError on Python 3.10 where the package tomli is not installed.
        """
        tomllib = _toml_module()
        with open(path, "rb") as file:
            try:
                document = tomllib.load(file)
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
                raise OptionError(os.fspath(path), "its content", f"expected TOML: {exc}") from None
        settings = document.get("cloudpubsub", document)
        if not isinstance(settings, dict):
            raise OptionError("cloudpubsub", repr(type(settings).__name__), "expected a table")
        settings = dict(settings)
        for name, made in (("tls", TLS), ("will", Will)):
            if isinstance(settings.get(name), dict):
                settings[name] = _make(name, made, settings[name])
        return cls._from_settings(settings)

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any]) -> Options:
        known = [item.name for item in fields(cls) if item.init]
        for name in settings:
            if name not in known:
                raise _unknown(name, known)
        if settings.get("broker") is None:
            raise OptionError("broker", "None", "expected at least one mqtt://, mqtts://, ws:// or wss:// URL")
        return cls(**settings)


def _split_broker(broker: object) -> tuple[tuple[str, ...], str | None, str | None]:
    """The URLs without credentials, and the credentials, on which those that have them must agree."""
    urls = [broker] if isinstance(broker, str) else broker
    if not isinstance(urls, Sequence) or isinstance(urls, (bytes, bytearray)) or not urls:
        raise OptionError("broker", repr(type(broker).__name__), "expected a URL or a non-empty sequence of URLs")
    parsed = [parse_url(url) for url in urls]
    pairs = {(item.username, item.password) for item in parsed if item.username is not None}
    if len(pairs) > 1:
        shown = repr([redact(url) for url in urls])
        raise OptionError("broker", shown, "the URLs are one broker's addresses and must have the same credentials")
    username, password = pairs.pop() if pairs else (None, None)
    return tuple(item.address.url for item in parsed), username, password or None


def _take_credentials(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings with the credentials of the URL as settings of their own, so that they can be overridden."""
    if settings.get("broker") is None:
        return settings
    urls, username, password = _split_broker(settings["broker"])
    taken = {name: value for name, value in (("username", username), ("password", password)) if value is not None}
    for name, value in taken.items():
        if settings.get(name) not in (None, value):
            raise OptionError(name, "the given value", "it differs from the one in the broker URL; give it once")
    return {**settings, "broker": urls, **taken}


def _read_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    kinds: dict[str, Kind] = {item.name: item.metadata["kind"] for item in fields(Options) if "kind" in item.metadata}
    settings: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {"tls": {}, "will": {}}
    makers: dict[str, type] = {"tls": TLS, "will": Will}
    for variable, text in environ.items():
        if not variable.startswith(_ENV_PREFIX) or not text:
            continue
        name = variable[len(_ENV_PREFIX) :].lower()
        group, _, part = name.partition("_")
        if name == "broker":
            settings[name] = [url.strip() for url in text.split(",") if url.strip()]
        elif name in kinds:
            settings[name] = kinds[name].parse(variable, text)
        elif group in parts and part in {item.name for item in fields(makers[group])}:
            parts[group][part] = _parse_part(variable, part, text)
        else:
            known = ["broker", *kinds]
            logging.getLogger("cloudpubsub").warning("%s is no setting%s", variable, _hint(name, known))
    for group, values in parts.items():
        if values:
            settings[group] = _make(group, makers[group], values)
    return settings


def _parse_part(variable: str, part: str, text: str) -> Any:
    if part in ("insecure", "retain"):
        return Flag().parse(variable, text)
    return tuple(name.strip() for name in text.split(",")) if part == "alpn" else text


def _make(name: str, made: type, values: Mapping[str, Any]) -> Any:
    known = [item.name for item in fields(made)]
    for part in values:
        if part not in known:
            raise _unknown(f"{name}.{part}", [f"{name}.{item}" for item in known])
    if made is Will and "topic" not in values:
        raise OptionError("will.topic", "None", "a will needs a topic")
    return made(**values)


def _unknown(name: str, known: Sequence[str]) -> OptionError:
    return OptionError(str(name), "this setting", f"there is no setting of that name{_hint(str(name), known)}")


def _hint(name: str, known: Sequence[str]) -> str:
    import difflib  # only for who made a mistake

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _toml_module() -> Any:
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("Options.from_toml() needs Python 3.11 or newer, or the package tomli")
