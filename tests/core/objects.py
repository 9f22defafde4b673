"""Objects of the C core with Python results, for tests."""

from __future__ import annotations

from typing import Any

from .build import load

ANY_BYTES = (1 << 64) - 1


class Window:
    """The C window with Python results: a value where there is one, else the status."""

    def __init__(self, messages_max: int, bytes_max: int = ANY_BYTES, next_id: int = 1) -> None:
        self.ffi, self.lib = load()
        out = self.ffi.new("cps_window **")
        assert self.lib.cps_window_open(messages_max, bytes_max, out) == self.lib.CPS_OK
        self.c = out[0]
        self.lib.cps_window_renumber(self.c, next_id)
        self.a, self.b = self.ffi.new("uint64_t *"), self.ffi.new("uint64_t *")
        self.id = self.ffi.new("uint16_t *")

    def close(self) -> None:
        self.lib.cps_window_close(self.c)

    def push(self, position: int, end: int, packet_bytes: int = 10, now_ms: int = 0) -> int:
        """Packet id, or CPS_FULL, which is negative."""
        status: int = self.lib.cps_window_push(self.c, position, end, packet_bytes, now_ms, self.id)
        return int(self.id[0]) if status == self.lib.CPS_OK else status

    def skip(self, position: int, end: int, fate: int = 0) -> int:
        return int(self.lib.cps_window_skip(self.c, position, end, fate))

    def hold(self, position: int, end: int) -> int:
        return int(self.lib.cps_window_hold(self.c, position, end))

    def refuse(self, packet_id: int) -> int | None:
        """The position, None if that id is not in flight."""
        status = self.lib.cps_window_refuse(self.c, packet_id, self.a)
        assert status in (self.lib.CPS_OK, self.lib.CPS_UNKNOWN)
        return self.a[0] if status == self.lib.CPS_OK else None

    def end(self, position: int, fate: int) -> bool:
        status = self.lib.cps_window_end(self.c, position, fate)
        assert status in (self.lib.CPS_OK, self.lib.CPS_UNKNOWN)
        return bool(status == self.lib.CPS_OK)

    def endings(self) -> list[tuple[int, int, int, int, int]]:
        """(first, end, messages, bytes, fate) of what the head has passed, taken."""
        count = self.ffi.new("size_t *")
        at = self.lib.cps_window_endings(self.c, count)
        seen = [(at[i].first, at[i].end, at[i].messages, at[i].bytes, at[i].fate) for i in range(count[0])]
        self.lib.cps_window_told(self.c)
        return seen

    def ack(self, packet_id: int) -> tuple[int, int] | None:
        status = self.lib.cps_window_ack(self.c, packet_id, self.a, self.b)
        assert status in (self.lib.CPS_OK, self.lib.CPS_UNKNOWN)
        return (self.a[0], self.b[0]) if status == self.lib.CPS_OK else None

    def head(self) -> int | None:
        return self.a[0] if self.lib.cps_window_head(self.c, self.a) == self.lib.CPS_OK else None

    def oldest(self) -> tuple[int, int] | None:
        status = self.lib.cps_window_oldest(self.c, self.a, self.b)
        return (self.a[0], self.b[0]) if status == self.lib.CPS_OK else None

    def recall(self, position: int) -> int | None:
        """Its fate, None if it is not remembered."""
        fate = self.ffi.new("enum cps_fate *")
        return int(fate[0]) if self.lib.cps_window_recall(self.c, position, fate) == self.lib.CPS_OK else None

    def was_acked(self, position: int) -> bool:
        return self.recall(position) == self.lib.CPS_FATE_ACKED

    def restart(self) -> None:
        self.lib.cps_window_restart(self.c)

    @property
    def inflight(self) -> tuple[int, int]:
        """Messages and bytes."""
        return self.lib.cps_window_inflight_messages(self.c), self.lib.cps_window_inflight_bytes(self.c)


class Stream:
    """The C stream, with packets copied out as plain values."""

    def __init__(self, initial: int = 64, packet_max: int = 1 << 20, level: int = 4) -> None:
        self.ffi, self.lib = load()
        out = self.ffi.new("cps_stream **")
        assert self.lib.cps_stream_open(initial, packet_max, level, out) == self.lib.CPS_OK
        self.c = out[0]
        self.at, self.room = self.ffi.new("uint8_t **"), self.ffi.new("size_t *")
        self.packet, self.acks = self.ffi.new("cps_packet *"), self.ffi.new("cps_wire_acks *")

    def close(self) -> None:
        self.lib.cps_stream_close(self.c)

    def space(self, least: int) -> int:
        return int(self.lib.cps_stream_space(self.c, least, self.at, self.room))

    def feed(self, data: bytes) -> None:
        assert self.space(max(len(data), 1)) == self.lib.CPS_OK
        assert self.room[0] >= len(data)
        self.ffi.memmove(self.at[0], data, len(data))
        self.lib.cps_stream_commit(self.c, len(data))

    def next(self) -> dict[str, Any] | int:
        """The next packet as a dictionary, or the status."""
        status: int = self.lib.cps_stream_next(self.c, self.packet)
        if status != self.lib.CPS_OK:
            return status
        p = self.packet
        seen: dict[str, Any] = {"type": p.type, "bytes": bytes(self.ffi.buffer(p.bytes, p.size_bytes))}
        for name in ("topic", "payload", "properties"):
            at = getattr(p, name)
            seen[name] = None if at == self.ffi.NULL else bytes(self.ffi.buffer(at, getattr(p, f"{name}_bytes")))
        for name in ("packet_id", "flags", "qos", "reason", "dup", "retain", "session_present"):
            seen[name] = getattr(p, name)
        return seen

    def drain(self) -> tuple[list[dict[str, Any]], int]:
        """All whole packets and the status that ended them."""
        seen = []
        while isinstance(one := self.next(), dict):
            seen.append(one)
        return seen, one

    def take(self, window: Window, capacity: int | None = 100) -> tuple[int, list[int], int]:
        """Status, positions settled, and packets taken."""
        positions = self.ffi.NULL if capacity is None else self.ffi.new("uint64_t[]", capacity + 1)
        status = self.lib.cps_wire_take_acks(self.c, window.c, positions, capacity or 0, self.acks)
        self.lib.cps_window_check(window.c)
        settled = [] if capacity is None else list(positions[0 : self.acks.settled])
        return status, settled, self.acks.packets
