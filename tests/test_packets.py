"""The oracle for MQTT packets: against itself, against the text of the standard, and against paho."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt import properties as paho_properties
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from tests import packets
from tests.packets import (
    KINDS,
    REASONS,
    Connack,
    Connect,
    Disconnect,
    Malformed,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Publish,
    Reader,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    Will,
    build,
    parse,
    parse_all,
    split,
)

VERSIONS = (4, 5)

# ---- how packets are drawn

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
topics = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0+#"), min_size=1, max_size=20)
ids = st.integers(1, 65535)
levels = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0+#/$"), max_size=5) | st.just("+")
filters = st.one_of(
    st.lists(levels, min_size=1, max_size=4).map("/".join).filter(bool),
    st.lists(levels, max_size=4).map(lambda names: "/".join([*names, "#"])),
)


def values(name: str) -> st.SearchStrategy[Any]:
    kind = KINDS[name]
    if name == "response_topic":
        return topics
    if kind.type == "text":
        return texts
    if kind.type == "binary":
        return st.binary(max_size=20)
    if kind.type == "pair":
        return st.lists(st.tuples(texts, texts), min_size=1, max_size=3).map(tuple)
    top = {"byte": 255, "two": 65535, "four": (1 << 32) - 1, "varint": packets.MAX_VARINT}[kind.type]
    return st.integers(kind.least, top if kind.most is None else kind.most)


def properties(packet: int, version: int = 5) -> st.SearchStrategy[dict[str, Any]]:
    if version != 5:
        return st.just({})
    optional = {name: values(name) for name, kind in KINDS.items() if packet in kind.packets}
    if packet == packets.PUBLISH:
        optional["subscription_identifier"] = st.lists(
            st.integers(1, packets.MAX_VARINT), min_size=1, max_size=3
        ).map(tuple)  # fmt: skip
    drawn: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries({}, optional=optional)
    return drawn.filter(lambda found: "authentication_data" not in found or "authentication_method" in found)


@st.composite
def connects(draw: st.DrawFn, version: int) -> Connect:
    will = draw(
        st.none()
        | st.builds(
            Will, topics, st.binary(max_size=20), st.sampled_from([0, 1, 2]), st.booleans(),
            properties(packets.WILL, version),
        )
    )  # fmt: skip
    username = draw(st.none() | texts)
    password = draw(st.none() | st.binary(max_size=20)) if username is not None or version == 5 else None
    found = draw(properties(packets.CONNECT, version))
    return Connect(
        draw(texts), draw(st.booleans()), draw(st.integers(0, 65535)), username, password, will, found, version
    )


@st.composite
def publishes(draw: st.DrawFn, version: int) -> Publish:
    qos = draw(st.sampled_from([0, 1, 2]))
    found = draw(properties(packets.PUBLISH, version))
    topic = draw(topics | st.just("") if "topic_alias" in found else topics)
    return Publish(
        topic, draw(st.binary(max_size=50)), draw(ids) if qos else 0, draw(st.booleans()) if qos else False,
        draw(st.booleans()), qos, found,
    )  # fmt: skip


def subscriptions(version: int) -> st.SearchStrategy[Subscription]:
    qos = st.sampled_from([0, 1, 2])
    if version != 5:
        return st.builds(Subscription, filters, qos)
    shared = filters.map(lambda filter_: f"$share/group/{filter_}")
    flag = st.booleans()
    handling = st.sampled_from([0, 1, 2])
    return st.one_of(
        st.builds(Subscription, filters, qos, flag, flag, handling),
        st.builds(Subscription, shared, qos, st.just(False), flag, handling),
    )


def any_packet(version: int) -> st.SearchStrategy[Packet]:
    new = version == 5

    def reason(kind: int) -> st.SearchStrategy[int]:
        return st.sampled_from(sorted(REASONS[kind] if new else packets._OLD_REASONS.get(kind, {0})))

    def found(kind: int) -> st.SearchStrategy[dict[str, Any]]:
        return properties(kind, version)

    wanted = st.lists(subscriptions(version), min_size=1, max_size=3).map(tuple)
    some = st.lists(reason(packets.SUBACK), min_size=1, max_size=4).map(tuple)
    some_unsubscribed = st.lists(reason(packets.UNSUBACK), min_size=1, max_size=4).map(tuple) if new else st.just(())
    return st.one_of(
        connects(version),
        st.builds(Connack, reason(packets.CONNACK), st.just(False), found(packets.CONNACK)),
        st.builds(Connack, st.just(0), st.just(True), found(packets.CONNACK)),
        publishes(version),
        st.builds(Puback, ids, reason(packets.PUBACK), found(packets.PUBACK), st.sampled_from([0, 2, 3, 4])),
        st.builds(Subscribe, ids, wanted, found(packets.SUBSCRIBE)),
        st.builds(Suback, ids, some, found(packets.SUBACK)),
        st.builds(Unsubscribe, ids, st.lists(filters, min_size=1, max_size=3).map(tuple), found(packets.UNSUBSCRIBE)),
        st.builds(Unsuback, ids, some_unsubscribed, found(packets.UNSUBACK)),
        st.just(Pingreq()),
        st.just(Pingresp()),
        st.builds(Disconnect, reason(packets.DISCONNECT), found(packets.DISCONNECT), st.sampled_from([0, 1, 2])),
    )


versioned = st.sampled_from(VERSIONS).flatmap(lambda version: st.tuples(any_packet(version), st.just(version)))


# ---- against itself


@given(versioned)
def test_what_is_built_is_parsed(drawn: tuple[Packet, int]) -> None:
    packet, version = drawn
    data = build(packet, version)
    first, body, rest = split(data + b"rest")
    assert rest == b"rest"
    again = parse(first, body, version)
    assert again == packet
    assert build(again, version) == data, "the form it had is kept"


@given(st.lists(any_packet(5), max_size=5))
def test_a_stream_is_split(several: list[Packet]) -> None:
    assert parse_all(b"".join(build(each, 5) for each in several), 5) == several


@given(versioned, st.data())
def test_a_spoilt_packet_is_refused_or_another(drawn: tuple[Packet, int], data: st.DataObject) -> None:
    packet, version = drawn
    spoilt = bytearray(build(packet, version))
    for _ in range(data.draw(st.integers(1, 3))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    try:
        first, body, _ = split(bytes(spoilt))
        other = parse(first, body, version)
    except Malformed:
        return
    again = build(other, version)
    assert parse(*split(again)[:2], version) == other


@given(versioned)
def test_what_is_cut_short_never_parses_as_the_same(drawn: tuple[Packet, int]) -> None:
    packet, version = drawn
    data = build(packet, version)
    first, body, _ = split(data)
    for size in range(len(data)):
        with pytest.raises(Malformed):
            split(data[:size])
    for size in range(len(body)):
        try:
            shorter = parse(first, body[:size], version)
        except Malformed:
            continue
        # Payloads, lists and optional tails are shorter, and only they.
        assert shorter != packet or isinstance(packet, Puback | Disconnect)


@given(st.integers(0, 255), st.binary(max_size=60), st.sampled_from(VERSIONS))
def test_no_bytes_raise_anything_else(first: int, body: bytes, version: int) -> None:
    try:
        parse(first, body, version)
    except Malformed:
        pass


# ---- against the text


def h(text: str) -> bytes:
    return bytes.fromhex(text)


@pytest.mark.parametrize(
    ("packet", "version", "data"),
    [
        (Pingreq(), 5, "c000"), (Pingresp(), 4, "d000"), (Disconnect(), 4, "e000"), (Disconnect(), 5, "e000"),
        (Disconnect(0x8E), 5, "e0018e"), (Disconnect(0, {"session_expiry": 0}), 5, "e007000511 00000000"),
        (Disconnect(form=1), 5, "e00100"), (Disconnect(form=2), 5, "e0020000"),
        (Connack(), 4, "20020000"), (Connack(5), 4, "20020005"), (Connack(0, True), 5, "2003010000"),
        (Connack(0, False, {"receive_maximum": 1, "maximum_qos": 0}), 5, "2008000005 210001 2400"),
        (Puback(1), 4, "40020001"), (Puback(1), 5, "40020001"), (Puback(1, form=3), 5, "4003000100"),
        (Puback(1, form=4), 5, "400400010000"), (Puback(1, 0x97), 5, "4003000197"),
        (Puback(1, 0x10, {"reason_string": "x"}), 5, "4008000110041f000178"),
        (Publish("a/b", b"p", 10), 4, "32080003612f62000a70"),  # figure 3.11's topic and id
        (Publish("a/b", b"p", 10), 5, "32090003612f62000a0070"),
        (Publish("", b"", 0, qos=0, retain=True, properties={"topic_alias": 3}), 5, "3106 0000 03 230003"),
        (Publish("t", b"", 1, True, False, 2), 4, "3c05 000174 0001"),
        (Subscribe(10, (Subscription("a/b", 1), Subscription("c/d", 2))), 4, "820e000a0003612f62010003632f6402"),
        (Subscribe(10, (Subscription("a", 1, True, True, 2),)), 5, "8207000a00000161 2d"),
        (Subscribe(10, (Subscription("a"),), {"subscription_identifier": 300}), 5, "820a000a030bac02000161 01"),
        (Suback(10, (0, 2, 0x80)), 4, "9005000a000280"), (Suback(10, (0x87,)), 5, "9004000a0087"),
        (Unsubscribe(10, ("a/b", "c/d")), 4, "a20c000a0003612f620003632f64"), (Unsuback(10), 4, "b002000a"),
        (Unsuback(10, (0x11,)), 5, "b004000a0011"),
        (Connect("c", False, 10, "u", b"p", version=4), 4, "1013 00044d51545404c0000a 000163 000175 000170"),
        (Connect("", True, 0, will=Will("w", b"x", 1, True), properties={"receive_maximum": 2}), 5,
         "1017 00044d515454052e0000 03210002 0000 00 000177 000178"),
    ],
)  # fmt: skip
def test_bytes_written_by_hand(packet: Packet, version: int, data: str) -> None:
    assert build(packet, version).hex() == h(data).hex()
    assert parse(*split(h(data))[:2], version) == packet


@pytest.mark.parametrize(
    ("data", "version", "why"),
    [
        ("00 ", 5, "type 0"), ("f0 ", 5, "type 15"), ("50 0001", 5, "type 5"), ("c1 ", 4, "flags"),
        ("80 000a0000016101", 5, "flags"), ("d0 00", 4, "too many"), ("e0 00", 4, "too many"),
        ("20 000000", 4, "too many"), ("20 0006", 4, "reason"), ("20 000600", 5, "reason"),
        ("20 018700", 5, "session"), ("20 020000", 5, "reserved"), ("20 0000", 5, "wanted"),
        ("20 000003210000", 5, "receive_maximum is 0"), ("20 000006210001210001", 5, "twice"),
        ("20 0000022402", 5, "maximum_qos"), ("20 000003230001", 5, "topic_alias in"),
        ("20 0000027f00", 5, "no prop"), ("20 0000052700000000", 5, "maximum_packet_size"),
        ("20 00000121", 5, "wanted"), ("20 000082002400", 5, "longer than"), ("40 0000", 4, "packet id 0"),
        ("40 000100", 4, "too many"), ("40 000101", 5, "reason"), ("40 00", 5, "wanted"), ("36 000161", 4, "wanted"),
        ("36 0001610001", 4, "QoS 3"), ("38 000161", 4, "DUP"), ("32 0001610000", 4, "packet id 0"),
        ("30 00012b", 4, "wildcard"), ("30 000123", 4, "wildcard"), ("30 0000", 4, "empty topic"),
        ("30 000000", 5, "empty topic"), ("30 000100", 4, "NUL"), ("30 0001ff", 4, "UTF-8"),
        ("30 0003eda080", 4, "UTF-8"), ("30 00016103230000", 5, "topic_alias is 0"),
        ("30 000161020102", 5, "payload_format"), ("30 000161040800012b", 5, "wildcard"), ("82 000a", 4, "nothing"),
        ("82 000a00016103", 4, "QoS 3"), ("82 000a00016104", 4, "version 5"), ("82 000a0000016140", 5, "reserved"),
        ("82 000a0000016130", 5, "handling"), ("82 000000016101", 4, "packet id"),
        ("82 000a0002612301", 4, "misplaced #"), ("82 000a0002612b01", 4, "misplaced +"),
        ("82 000a0003232f6101", 4, "misplaced #"), ("82 000a0000072473686172652f01", 5, "share"),
        ("82 000a0000092473686172652f2f6101", 5, "share"), ("82 000a0000092473686172652f612f01", 5, "no filter"),
        ("82 000a00000a2473686172652f612f6205", 5, "no local"), ("a2 000a", 4, "nothing"), ("90 000a", 4, "nothing"),
        ("90 000a03", 4, "reason"), ("b0 000a00", 4, "reasons"), ("b0 000a00", 5, "reasons"), ("e0 03", 5, "reason"),
        ("10 00044d515454040300000000", 4, "reserved"), ("10 00044d515454030200000000", 4, "version 3"),
        ("10 00044d51545a040200000000", 4, "name"), ("10 00044d515454040a00000000", 4, "without a will"),
        ("10 00044d5154540442000000000000", 4, "without a user"), ("10 00044d51545404020000000000", 4, "too many"),
    ],
)  # fmt: skip
def test_what_the_standard_forbids(data: str, version: int, why: str) -> None:
    first, *body = h(data)
    with pytest.raises(Malformed, match=why):
        parse(first, bytes(body), version)


def test_what_only_looks_forbidden() -> None:
    for filter_ in ("$sharea", "$share", "$share/a/+/#", "/", "//", "+/+", "#", "/#", "$SYS/#", " "):
        packets.check_filter(filter_, 5)
        packets.check_filter(filter_, 4)
    packets.check_filter("$share//a", 4)
    for topic in ("/", "a//b", "$SYS/a", "$share/a/b", "\ufeff", "\uffff"):
        data = build(Publish(topic, b"", 1), 5)
        assert parse(*split(data)[:2], 5) == Publish(topic, b"", 1)


@pytest.mark.parametrize(
    ("packet", "version"),
    [
        (Puback(0), 5), (Puback(65536), 5), (Puback(1, 0x42), 5), (Puback(1, 0x87), 4), (Puback(1, 0, {"a": 1}), 5),
        (Puback(1, 0, {"reason_string": "x"}), 4), (Publish("a", b"", 1, qos=0), 5), (Publish("a", b"", 0), 5),
        (Publish("a" * 65536, b"", 1), 4), (Publish("\ud800", b"", 1), 4), (Connack(1), 5), (Pingreq(), 3),
        (Connect("c", password=b"p", version=4), 4),
        (Connect("c", will=Will("w", properties={"will_delay": 1}), version=4), 4),
        (Connack(0, False, {"authentication_data": b"x"}), 5), (Connack(0, False, {"server_keep_alive": 65536}), 5),
    ],
)  # fmt: skip
def test_what_is_forbidden_is_not_built(packet: Packet, version: int) -> None:
    with pytest.raises(Malformed):
        build(packet, version)


def test_variable_byte_integers_of_the_wrong_length_are_refused() -> None:
    assert Reader(h("ffffff7f")).varint() == packets.MAX_VARINT
    for wrong in ("ffffffff7f", "8080808001", "8000", "ff", ""):
        with pytest.raises(Malformed):
            Reader(h(wrong)).varint()
    for wrong_value in (-1, packets.MAX_VARINT + 1):
        with pytest.raises(Malformed):
            packets.varint(wrong_value)


# ---- against paho

# Without types.
PahoProperties: Any = paho_properties.Properties
VariableByteIntegers: Any = paho_properties.VariableByteIntegers
PAHO_KINDS = {
    packets.CONNECT: PacketTypes.CONNECT,
    packets.CONNACK: PacketTypes.CONNACK,
    packets.PUBLISH: PacketTypes.PUBLISH,
    packets.PUBACK: PacketTypes.PUBACK,
    packets.SUBSCRIBE: PacketTypes.SUBSCRIBE,
    packets.SUBACK: PacketTypes.SUBACK,
    packets.UNSUBSCRIBE: PacketTypes.UNSUBSCRIBE,
    packets.UNSUBACK: PacketTypes.UNSUBACK,
    packets.DISCONNECT: PacketTypes.DISCONNECT,
    packets.WILL: PacketTypes.WILLMESSAGE,
}


def paho_name(name: str) -> str:
    table: dict[str, int] = PahoProperties(PacketTypes.CONNECT).names
    return next(each for each, number in table.items() if number == KINDS[name].number).replace(" ", "")


def test_paho_knows_the_same_properties() -> None:
    table: dict[int, tuple[int, list[int]]] = PahoProperties(PacketTypes.CONNECT).properties
    assert set(table) == {kind.number for kind in KINDS.values()}
    types = ["byte", "two", "four", "varint", "binary", "text", "pair"]
    known = set(PAHO_KINDS.values())
    for kind in KINDS.values():
        type_, where = table[kind.number]
        assert types[type_] == kind.type
        assert {PAHO_KINDS[each] for each in kind.packets} == set(where) & known


def test_paho_knows_the_same_reasons() -> None:
    table: Any = ReasonCode(PacketTypes.CONNACK).names
    for kind, reasons in REASONS.items():
        theirs = {code for code, names in table.items() if any(PAHO_KINDS[kind] in each for each in names.values())}
        if kind == packets.CONNACK:
            theirs.add(0x99)  # of the will; in the standard's table, not in paho's
        assert theirs == reasons, kind


@given(st.sampled_from(sorted(PAHO_KINDS)).flatmap(lambda kind: st.tuples(st.just(kind), properties(kind))))
def test_paho_packs_and_unpacks_the_same_properties(drawn: tuple[int, dict[str, Any]]) -> None:
    kind, found = drawn
    if "\ufeff" in repr(found) or found.get("maximum_packet_size", 0) > packets.MAX_VARINT:
        return  # paho refuses both; the standard does not
    theirs = PahoProperties(PAHO_KINDS[kind])
    for name, value in found.items():
        setattr(theirs, paho_name(name), list(value) if packets._may_repeat(name, kind) else value)
    assert Reader(bytes(theirs.pack())).properties(kind) == found
    data = packets.build_properties(kind, found)
    back = PahoProperties(PAHO_KINDS[kind])
    back.unpack(data)
    for name, value in found.items():
        got = getattr(back, paho_name(name))
        assert got == value or tuple(got) == value or got == [value], name
    assert len(data) == len(theirs.pack())


@given(st.integers(0, packets.MAX_VARINT))
def test_paho_counts_the_same(value: int) -> None:
    assert packets.varint(value) == VariableByteIntegers.encode(value)
    assert Reader(packets.varint(value)).varint() == value
