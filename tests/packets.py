"""The packets of MQTT 3.1.1 and 5 as values: built, parsed, and refused where the OASIS text says so.

An oracle for the tests: plain Python that shares nothing with the library or with paho.  ``build(packet, version)``
gives bytes, ``split`` and ``parse(first, body, version)`` the way back; ``version`` is the protocol level of CONNECT, 4
or 5.  Neither lets through what the standard calls malformed or a protocol error: `Malformed`.  What a test wants wrong
it makes from bytes, with ``frame``.  QoS 2's handshake and AUTH are not known here.

Properties are keyword-like: ``{"receive_maximum": 10, "user_property": (("a", "b"),)}``.  Those that may come more than
once, ``user_property`` and, in PUBLISH, ``subscription_identifier``, are tuples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 1, 2, 3, 4, 8, 9
UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT = 10, 11, 12, 13, 14
WILL = 0  # not a packet, but it has properties
MAX_VARINT = 268_435_455

Properties: TypeAlias = Mapping[str, Any]


class Malformed(ValueError):
    """Not allowed by the standard."""


@dataclass(frozen=True)
class Kind:
    """A property: its number, the type of its value, its least and greatest value, the packets it may be in."""

    number: int
    type: str  # "byte", "two", "four", "varint", "text", "binary", "pair"
    packets: tuple[int, ...]
    least: int = 0
    most: int | None = None


_MESSAGE = (PUBLISH, WILL)
_ANSWERS = (CONNACK, PUBACK, SUBACK, UNSUBACK, DISCONNECT)
KINDS = {
    "payload_format": Kind(1, "byte", _MESSAGE, most=1),
    "message_expiry": Kind(2, "four", _MESSAGE),
    "content_type": Kind(3, "text", _MESSAGE),
    "response_topic": Kind(8, "text", _MESSAGE),
    "correlation_data": Kind(9, "binary", _MESSAGE),
    "subscription_identifier": Kind(11, "varint", (PUBLISH, SUBSCRIBE), least=1),
    "session_expiry": Kind(17, "four", (CONNECT, CONNACK, DISCONNECT)),
    "assigned_client_id": Kind(18, "text", (CONNACK,)),
    "server_keep_alive": Kind(19, "two", (CONNACK,)),
    "authentication_method": Kind(21, "text", (CONNECT, CONNACK)),
    "authentication_data": Kind(22, "binary", (CONNECT, CONNACK)),
    "request_problem_information": Kind(23, "byte", (CONNECT,), most=1),
    "will_delay": Kind(24, "four", (WILL,)),
    "request_response_information": Kind(25, "byte", (CONNECT,), most=1),
    "response_information": Kind(26, "text", (CONNACK,)),
    "server_reference": Kind(28, "text", (CONNACK, DISCONNECT)),
    "reason_string": Kind(31, "text", _ANSWERS),
    "receive_maximum": Kind(33, "two", (CONNECT, CONNACK), least=1),
    "topic_alias_maximum": Kind(34, "two", (CONNECT, CONNACK)),
    "topic_alias": Kind(35, "two", (PUBLISH,), least=1),
    "maximum_qos": Kind(36, "byte", (CONNACK,), most=1),
    "retain_available": Kind(37, "byte", (CONNACK,), most=1),
    "user_property": Kind(38, "pair", (CONNECT, PUBLISH, WILL, SUBSCRIBE, UNSUBSCRIBE, *_ANSWERS)),
    "maximum_packet_size": Kind(39, "four", (CONNECT, CONNACK), least=1),
    "wildcard_available": Kind(40, "byte", (CONNACK,), most=1),
    "subscription_identifiers_available": Kind(41, "byte", (CONNACK,), most=1),
    "shared_available": Kind(42, "byte", (CONNACK,), most=1),
}
_NAMES = {kind.number: name for name, kind in KINDS.items()}

# The reason codes that a packet may carry.
_FAILURES = (0x80, 0x83, 0x87)
REASONS: dict[int, frozenset[int]] = {
    CONNACK: frozenset(
        (0, *range(0x80, 0x8B), 0x8C, 0x90, 0x95, 0x97, 0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9F),
    ),
    PUBACK: frozenset((0, 0x10, *_FAILURES, 0x90, 0x91, 0x97, 0x99)),
    SUBACK: frozenset((0, 1, 2, *_FAILURES, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2)),
    UNSUBACK: frozenset((0, 0x11, *_FAILURES, 0x8F, 0x91)),
    DISCONNECT: frozenset(
        # 0x8C is in the table of all reasons (2.4) and not in that of DISCONNECT (3.14.2.1).
        (0, 4, 0x80, 0x81, 0x82, 0x83, 0x87, 0x89, *range(0x8B, 0x91), *range(0x93, 0xA3)),
    ),
}
_OLD_REASONS = {CONNACK: frozenset(range(6)), SUBACK: frozenset((0, 1, 2, 0x80))}


# ---- the packets


@dataclass(frozen=True)
class Will:
    """The will in a CONNECT."""

    topic: str
    payload: bytes = b""
    qos: int = 0
    retain: bool = False
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True)
class Connect:
    client_id: str
    clean: bool = True
    keep_alive: int = 60
    username: str | None = None
    password: bytes | None = None
    will: Will | None = None
    properties: Properties = field(default_factory=dict)
    version: int = 5


@dataclass(frozen=True)
class Connack:
    reason: int = 0
    session_present: bool = False
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True)
class Publish:
    topic: str
    payload: bytes = b""
    packet_id: int = 0  # of QoS 0: 0
    dup: bool = False
    retain: bool = False
    qos: int = 1
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True)
class Puback:
    """``form`` is the remaining length: 2, 3 (with the reason), 4 or more (with properties); 0: as short as can be."""

    packet_id: int
    reason: int = 0
    properties: Properties = field(default_factory=dict)
    form: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Subscription:
    filter: str
    qos: int = 1
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0


@dataclass(frozen=True)
class Subscribe:
    packet_id: int
    subscriptions: tuple[Subscription, ...]
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True)
class Suback:
    packet_id: int
    reasons: tuple[int, ...]
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True)
class Unsubscribe:
    packet_id: int
    filters: tuple[str, ...]
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True)
class Unsuback:
    """Under 3.1.1 there are no reasons."""

    packet_id: int
    reasons: tuple[int, ...] = ()
    properties: Properties = field(default_factory=dict)


@dataclass(frozen=True)
class Pingreq:
    pass


@dataclass(frozen=True)
class Pingresp:
    pass


@dataclass(frozen=True)
class Disconnect:
    """``form`` is the remaining length: 1 (with the reason), 2 or more (with properties); 0: as short as can be."""

    reason: int = 0
    properties: Properties = field(default_factory=dict)
    form: int = field(default=0, compare=False)


Packet: TypeAlias = (
    Connect | Connack | Publish | Puback | Subscribe | Suback | Unsubscribe | Unsuback | Pingreq | Pingresp | Disconnect
)


def _need(holds: object, why: str) -> None:
    if not holds:
        raise Malformed(why)


# ---- from values to bytes


def varint(value: int) -> bytes:
    _need(0 <= value <= MAX_VARINT, f"{value} is no variable byte integer")
    out = bytearray()
    while True:
        value, low = divmod(value, 128)
        out.append(low | (128 if value else 0))
        if not value:
            return bytes(out)


def number(value: int, size: int) -> bytes:
    _need(0 <= value < 1 << 8 * size, f"{value} does not fit in {size} bytes")
    return value.to_bytes(size, "big")


def binary(value: bytes) -> bytes:
    _need(len(value) < 1 << 16, f"{len(value)} bytes where at most 65,535 fit")
    return number(len(value), 2) + value


def text(value: str) -> bytes:
    _need("\0" not in value, "NUL in a text")
    try:
        return binary(value.encode())
    except UnicodeEncodeError as error:
        raise Malformed("a lone surrogate in a text") from error


def frame(first: int, body: bytes) -> bytes:
    """A packet of these parts, whatever they are."""
    return bytes([first]) + varint(len(body)) + body


def _build_value(type_: str, value: Any) -> bytes:
    match type_:
        case "byte":
            return number(value, 1)
        case "two":
            return number(value, 2)
        case "four":
            return number(value, 4)
        case "varint":
            return varint(value)
        case "text":
            return text(value)
        case "binary":
            return binary(value)
    return text(value[0]) + text(value[1])


def _may_repeat(name: str, packet: int) -> bool:
    return name == "user_property" or (name == "subscription_identifier" and packet == PUBLISH)


def build_properties(packet: int, properties: Properties) -> bytes:
    """The properties of a packet of this type, with their length in front."""
    _check_properties(packet, properties)
    out = bytearray()
    for name, value in properties.items():
        for each in value if _may_repeat(name, packet) else (value,):
            out += varint(KINDS[name].number) + _build_value(KINDS[name].type, each)
    return varint(len(out)) + bytes(out)


def build(packet: Packet, version: int) -> bytes:
    """The bytes of a packet.  CONNECT has its own version.  `Malformed` if the standard forbids it."""
    if isinstance(packet, Connect):
        version = packet.version
    _need(version in (4, 5), f"version {version}")
    check(packet, version)
    first, body = _parts(packet, version)
    return frame(first, body)


def _parts(packet: Packet, version: int) -> tuple[int, bytes]:
    def props(kind: int, properties: Properties) -> bytes:
        return build_properties(kind, properties) if version == 5 else b""

    match packet:
        case Connect():
            return CONNECT << 4, _build_connect(packet)
        case Connack(reason, present, properties):
            return CONNACK << 4, bytes([present, reason]) + props(CONNACK, properties)
        case Publish(topic, payload, packet_id, dup, retain, qos, properties):
            head = text(topic) + (number(packet_id, 2) if qos else b"") + props(PUBLISH, properties)
            return PUBLISH << 4 | dup << 3 | qos << 1 | retain, head + payload
        case Puback(packet_id, reason, properties):
            tail = _build_tail(PUBACK, reason, properties, packet.form - 2) if version == 5 else b""
            return PUBACK << 4, number(packet_id, 2) + tail
        case Disconnect(reason, properties):
            return DISCONNECT << 4, _build_tail(DISCONNECT, reason, properties, packet.form) if version == 5 else b""
        case Subscribe(packet_id, subscriptions, properties):
            body = number(packet_id, 2) + props(SUBSCRIBE, properties)
            body += b"".join(text(each.filter) + bytes([_bits(each)]) for each in subscriptions)
            return SUBSCRIBE << 4 | 2, body
        case Suback(packet_id, reasons, properties):
            return SUBACK << 4, number(packet_id, 2) + props(SUBACK, properties) + bytes(reasons)
        case Unsubscribe(packet_id, filters, properties):
            body = number(packet_id, 2) + props(UNSUBSCRIBE, properties)
            return UNSUBSCRIBE << 4 | 2, body + b"".join(text(each) for each in filters)
        case Unsuback(packet_id, reasons, properties):
            return UNSUBACK << 4, number(packet_id, 2) + props(UNSUBACK, properties) + bytes(reasons)
        case Pingreq():
            return PINGREQ << 4, b""
    return PINGRESP << 4, b""


def _bits(each: Subscription) -> int:
    return each.qos | each.no_local << 2 | each.retain_as_published << 3 | each.retain_handling << 4


def _build_tail(kind: int, reason: int, properties: Properties, form: int) -> bytes:
    """Reason and properties, which may be left out from the end: ``form`` 1 and 2 say how much is there at least."""
    if properties or form >= 2:
        return bytes([reason]) + build_properties(kind, properties)
    return bytes([reason]) if reason or form == 1 else b""


def _build_connect(packet: Connect) -> bytes:
    will = packet.will
    flags = packet.clean << 1 | (packet.password is not None) << 6 | (packet.username is not None) << 7
    if will is not None:
        flags |= 4 | will.qos << 3 | will.retain << 5
    out = text("MQTT") + bytes([packet.version, flags]) + number(packet.keep_alive, 2)
    out += build_properties(CONNECT, packet.properties) if packet.version == 5 else b""
    out += text(packet.client_id)
    if will is not None:
        out += build_properties(WILL, will.properties) if packet.version == 5 else b""
        out += text(will.topic) + binary(will.payload)
    out += b"" if packet.username is None else text(packet.username)
    return out + (b"" if packet.password is None else binary(packet.password))


# ---- what the standard forbids in a value


def _check_properties(packet: int, properties: Properties) -> None:
    for name, value in properties.items():
        _need(name in KINDS, f"no property {name!r}")
        kind = KINDS[name]
        _need(packet in kind.packets, f"{name} in a packet of type {packet}")
        for each in value if _may_repeat(name, packet) else (value,):
            if isinstance(each, int):
                _need(each >= kind.least and (kind.most is None or each <= kind.most), f"{name} is {each}")
    if "response_topic" in properties:
        check_topic(properties["response_topic"])
    _need("authentication_data" not in properties or "authentication_method" in properties, "data without a method")


def check_topic(topic: str) -> None:
    """That it is the name of a topic."""
    _need(topic, "an empty topic")
    _need("+" not in topic and "#" not in topic, f"wildcard in the topic {topic!r}")


def check_filter(filter_: str, version: int) -> None:
    """That it is a topic filter; a shared one is one of version 5 only, and any filter to 3.1.1."""
    _need(filter_, "an empty filter")
    levels = filter_.split("/")
    for at, level in enumerate(levels):
        _need("#" not in level or (level == "#" and at == len(levels) - 1), f"misplaced # in {filter_!r}")
        _need("+" not in level or level == "+", f"misplaced + in {filter_!r}")
    if version == 5 and filter_.startswith("$share/"):
        _need(len(levels) > 2 and levels[1] not in ("", "+", "#"), f"no share name or no filter in {filter_!r}")
        _need("/".join(levels[2:]), f"no filter in {filter_!r}")


def _check_reason(kind: int, reason: int, version: int) -> None:
    allowed = REASONS[kind] if version == 5 else _OLD_REASONS.get(kind, frozenset((0,)))
    _need(reason in allowed, f"reason {reason:#x} in a packet of type {kind}")


def check(packet: Packet, version: int) -> None:
    """`Malformed` if the standard forbids what the packet says."""
    if version != 5:
        _need(not getattr(packet, "properties", None), "properties under 3.1.1")
    if isinstance(packet, Publish):
        _need(bool(packet.packet_id) == (packet.qos > 0), "packet id 0 above QoS 0, or another at QoS 0")
    elif hasattr(packet, "packet_id"):
        _need(packet.packet_id, "packet id 0")
    match packet:
        case Connect():
            if packet.will is not None:
                _need(packet.will.qos in (0, 1, 2), "QoS of the will")
                _need(version == 5 or not packet.will.properties, "properties under 3.1.1")
                check_topic(packet.will.topic)
            old_and_bare = version != 5 and packet.username is None
            _need(not (old_and_bare and packet.password is not None), "a password without a user name")
        case Connack():
            _check_reason(CONNACK, packet.reason, version)
            _need(not (packet.session_present and packet.reason), "a session present at a refused connection")
        case Publish():
            _need(packet.qos in (0, 1, 2), "QoS 3")
            _need(packet.qos or not packet.dup, "DUP at QoS 0")
            if packet.topic or "topic_alias" not in packet.properties:
                check_topic(packet.topic)
        case Puback():
            _check_reason(PUBACK, packet.reason, version)
        case Disconnect():
            _check_reason(DISCONNECT, packet.reason, version)
        case Subscribe():
            _need(packet.subscriptions, "nothing to subscribe to")
            for each in packet.subscriptions:
                check_filter(each.filter, version)
                _need(each.qos in (0, 1, 2), "QoS 3")
                _need(each.retain_handling in (0, 1, 2), "retain handling 3")
                _need(version == 5 or _bits(each) < 4, "options of version 5")
                _need(not (each.no_local and each.filter.startswith("$share/")), "no local on a shared subscription")
        case Suback():
            _need(packet.reasons, "nothing answered")
            for reason in packet.reasons:
                _check_reason(SUBACK, reason, version)
        case Unsubscribe():
            _need(packet.filters, "nothing to unsubscribe")
            for filter_ in packet.filters:
                check_filter(filter_, version)
        case Unsuback():
            _need(bool(packet.reasons) == (version == 5), "reasons are of version 5, and needed there")
            for reason in packet.reasons:
                _check_reason(UNSUBACK, reason, version)


# ---- from bytes to values


class Reader:
    """Takes bytes from the front; `Malformed` where there are too few."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        _need(size <= self.left, f"{size} bytes wanted, {self.left} there")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def varint(self, minimal: bool = True) -> int:
        value = 0
        for at in range(4):
            byte = self.number(1)
            value |= (byte & 127) << 7 * at
            if byte < 128:
                _need(byte or not at or not minimal, "a variable byte integer longer than it need be")
                return value
        raise Malformed("a variable byte integer of more than four bytes")

    def binary(self) -> bytes:
        return self.take(self.number(2))

    def text(self) -> str:
        try:
            value = self.binary().decode()
        except UnicodeDecodeError as error:
            raise Malformed("not UTF-8") from error
        _need("\0" not in value, "NUL in a text")
        return value

    def flag(self) -> bool:
        value = self.number(1)
        _need(value < 2, "a reserved flag")
        return bool(value)

    def properties(self, packet: int) -> dict[str, Any]:
        inner = Reader(self.take(self.varint()))
        found: dict[str, Any] = {}
        while inner.left:
            identifier = inner.varint()
            _need(identifier in _NAMES, f"no property {identifier}")
            name = _NAMES[identifier]
            value = inner._value(KINDS[name].type)
            if _may_repeat(name, packet):
                found[name] = (*found.get(name, ()), value)
            else:
                _need(name not in found, f"{name} twice")
                found[name] = value
        _check_properties(packet, found)
        return found

    def _value(self, type_: str) -> Any:
        match type_:
            case "byte":
                return self.number(1)
            case "two":
                return self.number(2)
            case "four":
                return self.number(4)
            case "varint":
                return self.varint()
            case "text":
                return self.text()
            case "binary":
                return self.binary()
        return self.text(), self.text()


def split(data: bytes) -> tuple[int, bytes, bytes]:
    """First byte and body of the packet at the front, and what follows it."""
    reader = Reader(data)
    first = reader.number(1)
    body = reader.take(reader.varint())
    return first, body, data[len(data) - reader.left :]


def parse(first: int, body: bytes, version: int) -> Packet:
    """A packet from its first byte and its body.  CONNECT tells its version itself.  `Malformed`."""
    kind, flags = first >> 4, first & 15
    if kind != PUBLISH:
        _need(flags == (2 if kind in (SUBSCRIBE, UNSUBSCRIBE) else 0), f"flags {flags:#x} in a packet of type {kind}")
    reader = Reader(body)
    packet = _read(kind, flags, reader, version)
    _need(not reader.left, f"{reader.left} bytes too many")
    check(packet, packet.version if isinstance(packet, Connect) else version)
    return packet


def parse_all(data: bytes, version: int) -> list[Packet]:
    """All packets in a stream that ends with a packet's end."""
    found = []
    while data:
        first, body, data = split(data)
        found.append(parse(first, body, version))
    return found


def _read(kind: int, flags: int, reader: Reader, version: int) -> Packet:
    def props() -> dict[str, Any]:
        return reader.properties(kind) if version == 5 else {}

    match kind:
        case 1:
            return _read_connect(reader)
        case 2:
            present = reader.flag()
            return Connack(reader.number(1), present, props())
        case 3:
            return _read_publish(flags, reader, version)
        case 4:
            size = reader.left
            packet_id = reader.number(2)
            return Puback(packet_id, *_read_tail(PUBACK, reader, version), form=min(size, 4))
        case 8:
            packet_id, properties = reader.number(2), props()
            return Subscribe(packet_id, _read_subscriptions(reader), properties)
        case 9:
            packet_id, properties = reader.number(2), props()
            return Suback(packet_id, tuple(reader.take(reader.left)), properties)
        case 10:
            packet_id, properties = reader.number(2), props()
            filters = []
            while reader.left:
                filters.append(reader.text())
            return Unsubscribe(packet_id, tuple(filters), properties)
        case 11:
            packet_id, properties = reader.number(2), props()
            return Unsuback(packet_id, tuple(reader.take(reader.left)), properties)
        case 12:
            return Pingreq()
        case 13:
            return Pingresp()
        case 14:
            size = reader.left
            return Disconnect(*_read_tail(DISCONNECT, reader, version), form=min(size, 2))
    raise Malformed(f"a packet of type {kind}")


def _read_tail(kind: int, reader: Reader, version: int) -> tuple[int, dict[str, Any]]:
    if version != 5:
        return 0, {}  # what is left over is noticed by `parse`
    reason = reader.number(1) if reader.left else 0
    return reason, reader.properties(kind) if reader.left else {}


def _read_publish(flags: int, reader: Reader, version: int) -> Publish:
    qos = flags >> 1 & 3
    topic = reader.text()
    packet_id = reader.number(2) if qos else 0
    properties = reader.properties(PUBLISH) if version == 5 else {}
    return Publish(topic, reader.take(reader.left), packet_id, bool(flags & 8), bool(flags & 1), qos, properties)


def _read_subscriptions(reader: Reader) -> tuple[Subscription, ...]:
    found = []
    while reader.left:
        filter_, bits = reader.text(), reader.number(1)
        _need(bits < 64, "reserved bits of a subscription")
        found.append(Subscription(filter_, bits & 3, bool(bits & 4), bool(bits & 8), bits >> 4))
    return tuple(found)


def _read_connect(reader: Reader) -> Connect:
    _need(reader.text() == "MQTT", "another protocol's name")
    version, flags = reader.number(1), reader.number(1)
    _need(version in (4, 5), f"version {version}")
    _need(not flags & 1, "the reserved flag")
    _need(flags & 4 or not flags & 0x38, "QoS or retain without a will")
    keep_alive = reader.number(2)
    properties = reader.properties(CONNECT) if version == 5 else {}
    client_id = reader.text()
    will = None
    if flags & 4:
        will_properties = reader.properties(WILL) if version == 5 else {}
        topic, payload = reader.text(), reader.binary()
        will = Will(topic, payload, flags >> 3 & 3, bool(flags & 0x20), will_properties)
    username = reader.text() if flags & 0x80 else None
    password = reader.binary() if flags & 0x40 else None
    return Connect(client_id, bool(flags & 2), keep_alive, username, password, will, properties, version)
