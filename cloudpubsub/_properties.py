"""MQTT 5 user properties: pairs of text that travel beside a payload.

They are kept as bytes, ready to be sent, from `publish()` to the broker, and decoded when somebody looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from paho.mqtt import MQTTException
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties, VariableByteIntegers

__all__ = ["UserProperties", "decode_user_properties", "encode_user_properties"]

UserProperties = Mapping[str, str] | Iterable[tuple[str, str]]

_USER_PROPERTY = 0x26
_TEXT_MAX = 65_535
_ALL_MAX = 65_535  # what a record has room for


def encode_user_properties(properties: UserProperties) -> bytes:
    """The bytes of a PUBLISH's property list.  Raises TypeError and ValueError, which name what is wrong."""
    out = bytearray()
    for name, value in properties.items() if isinstance(properties, Mapping) else properties:
        out.append(_USER_PROPERTY)
        for text in (name, value):
            if not isinstance(text, str) or "\0" in text:
                raise TypeError(f"user_properties: {text!r} is not allowed; expected str without NUL")
            data = text.encode()
            if len(data) > _TEXT_MAX:
                raise ValueError(f"user_properties: {len(data)} bytes in one text, at most {_TEXT_MAX} are allowed")
            out += len(data).to_bytes(2, "big") + data
    if len(out) > _ALL_MAX:
        raise ValueError(f"user_properties: {len(out)} bytes in all, at most {_ALL_MAX} are allowed")
    return bytes(out)


def decode_user_properties(data: bytes) -> tuple[tuple[str, str], ...]:
    """The user properties in a PUBLISH's property list; those of what cannot be read are left out."""
    if not data:
        return ()
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    try:
        properties.unpack(VariableByteIntegers.encode(len(data)) + data)  # type: ignore[no-untyped-call]
    except (MQTTException, UnicodeDecodeError, IndexError, ValueError):
        return ()
    return tuple(tuple(pair) for pair in getattr(properties, "UserProperty", ()))
