"""Records and MQTT packets in plain Python: the oracle of the C core's framing."""

from __future__ import annotations

import struct
from typing import Any


def align(size: int) -> int:
    return (size + 7) & ~7


def record(
    position: int, topic: bytes, payload: bytes, userdata: bytes = b"", retain: bool = False, *,
    properties: bytes | None = None, ttl_ms: int = 0, stamp_ms: int = 0,
) -> bytes:  # fmt: skip
    """A record of the log, its padding included."""
    extras, flags = b"", int(retain)
    if properties is not None or ttl_ms:
        properties = properties or b""
        extras = properties + struct.pack("<H", len(properties)) + ttl_ms.to_bytes(6, "little")
        flags |= 2
    length = 32 + len(topic) + len(payload) + len(userdata) + len(extras)
    head = struct.pack("<IIQIBBHH", 0, length, position, 7, flags, 0, len(topic), len(userdata))
    head += stamp_ms.to_bytes(6, "little")
    return (head + topic + payload + userdata + extras).ljust(align(length), b"\0")


def pad(size: int) -> bytes:
    return struct.pack("<II", 0, size | 1 << 31).ljust(size, b"\xaa")


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def packet(first: int, body: bytes) -> bytes:
    return bytes([first]) + varint(len(body)) + body


def publish(
    topic: bytes, payload: bytes, packet_id: int = 0, *, qos: int = 1, dup: int = 0, retain: int = 0, level: int = 4,
    properties: bytes = b"",
) -> bytes:  # fmt: skip
    body = struct.pack(">H", len(topic)) + topic + (struct.pack(">H", packet_id) if qos else b"")
    body += varint(len(properties)) + properties if level == 5 else b""
    return packet(0x30 | dup << 3 | qos << 1 | retain, body + payload)


def puback(packet_id: int, *rest: int) -> bytes:
    return packet(0x40, struct.pack(">H", packet_id) + bytes(rest))


def decode(data: bytes, level: int) -> tuple[list[dict[str, Any]], bytes]:
    """Plain decoder of QoS 1 PUBLISH packets."""
    seen = []
    while data:
        assert data[0] & 0xF6 == 0x32
        length, at = 0, 1
        while True:
            length |= (data[at] & 0x7F) << 7 * (at - 1)
            at += 1
            if data[at - 1] < 0x80:
                break
        assert at <= 5
        body, rest = data[at : at + length], data[at + length :]
        assert len(body) == length
        (size,) = struct.unpack_from(">H", body)
        (packet_id,) = struct.unpack_from(">H", body, 2 + size)
        after = 4 + size
        properties = b""
        if level == 5:
            count = shift = 0
            while True:
                count |= (body[after] & 0x7F) << shift
                shift, after = shift + 7, after + 1
                if body[after - 1] < 0x80:
                    break
            properties, after = body[after : after + count], after + count
        seen.append({
            "topic": body[2 : 2 + size], "payload": body[after:], "packet_id": packet_id,
            "retain": data[0] & 1, "dup": data[0] >> 3 & 1, "properties": properties,
        })  # fmt: skip
        data = rest
    return seen, data
