"""How a connection, or the attempt to make one, can end, and what the broker says when it is the one who ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paho.mqtt.packettypes import PacketTypes

from cloudpubsub._refusal import reason_name

if TYPE_CHECKING:
    from cloudpubsub._link import _Inbound

__all__ = ["ClosedByBroker", "Ended", "Refused", "ended_by"]

_UNAVAILABLE = 3
_FAILURE_5 = 0x80
# Of the reasons of an MQTT 5 CONNACK those that somebody has to do something about; the others pass.
_REFUSED_5 = {0x81, 0x82, 0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C, 0x90, 0x95, 0x99, 0x9A, 0x9B}
_REFUSED = {
    1: "refused: the broker does not speak this protocol version",
    2: "refused: client id rejected",
    3: "refused: broker unavailable",
    4: "refused: bad user name or password",
    5: "refused: not authorised",
}


class Ended(Exception):
    """The connection, or the attempt to make it, is over; the text says why."""


class Refused(Ended):
    """CONNACK said no, for a reason that will not pass by itself."""


class ClosedByBroker(Ended):
    """By it, or by somebody on the way to it."""

    def __init__(self, why: str = "") -> None:
        super().__init__(f"closed by the broker{why}")


def ended_by(inbound: _Inbound) -> Ended:
    """What the broker's CONNACK, or its DISCONNECT, or its silence before it closed, means."""
    code, said = inbound.connack, inbound.reason_string
    tail = f": {said}" if said else ""
    if code <= 0:
        code = inbound.disconnect
        return ClosedByBroker("" if code < 0 else f": {reason_name(code, PacketTypes.DISCONNECT)}{tail}")
    if code >= _FAILURE_5:
        reason = f"refused: {reason_name(code, PacketTypes.CONNACK)}{tail}"
        return Refused(reason) if code in _REFUSED_5 else Ended(reason)
    reason = _REFUSED.get(code, f"refused: code {code}")
    return Ended(reason) if code == _UNAVAILABLE else Refused(reason)
