"""The simulated disk and the log of the C core, with Python results, for tests."""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .build import load

PAD = 1 << 31
POLICIES = {"drop_oldest": 0, "drop_newest": 1, "block": 2, "raise": 3}
DURABILITIES = {"memory": 0, "process": 1, "power": 2}
ANY_TIME = (1 << 64) - 1
DISK_ERRORS = [errno.EIO, errno.ENOSPC, errno.EROFS]


@dataclass(frozen=True)
class Record:
    """One record as it lies in the log."""

    position: int
    end: int
    topic: bytes
    payload: bytes
    userdata: bytes
    is_pad: bool

    @property
    def span(self) -> int:
        return self.end - self.position


@dataclass(frozen=True)
class Loss:
    """A range of positions whose messages ended without an acknowledgement."""

    first: int
    end: int
    messages: int
    reason: int


def records(data: bytes, position: int) -> Iterator[Record]:
    """Take a run of records apart, in plain Python; fails on anything that is not one."""
    at = 0
    while at < len(data):
        (word,) = struct.unpack_from("<I", data, at + 4)
        length = word & ~PAD
        end = at + (length + 7) // 8 * 8
        assert length >= 8 and end <= len(data), (position + at, length)
        if word & PAD:
            yield Record(position + at, position + end, b"", b"", b"", True)
        else:
            own, _, _, _, topic, userdata = struct.unpack_from("<QIBBHH", data, at + 8)
            assert own == position + at
            body = data[at + 32 : at + length]
            payload = body[topic : len(body) - userdata]
            yield Record(own, position + end, body[:topic], payload, body[len(body) - userdata :], False)
        at = end


class Disk:
    """The simulated disk; with ``real`` only its counters, faults and clock."""

    def __init__(self, real: bool = False) -> None:
        self.ffi, self.lib = load()
        self.c = self.lib.sim_new(real)
        self.real = real

    def close(self) -> None:
        self.lib.sim_free(self.c)

    @property
    def io(self) -> Any:
        return self.lib.sim_io(self.c)

    def pages(self, size_bytes: int) -> None:
        """Of a machine with other pages than this one, before anything is open."""
        self.lib.sim_pages(self.c, size_bytes)

    def calls(self, kind: str) -> int:
        """How often a kind of call was made: ``"WRITE"``, ``"CHANGES"`` for all that change the disk."""
        return int(self.lib.sim_calls(self.c, getattr(self.lib, f"SIM_{kind}")))

    def fail(self, kind: str, error: int, nth: int = 1, sticky: bool = False) -> None:
        self.lib.sim_fail(self.c, getattr(self.lib, f"SIM_{kind}"), nth, error, sticky)

    def heal(self) -> None:
        self.lib.sim_heal(self.c)

    def hang(self, kind: str) -> None:
        """Calls of a kind hang until the disk comes back."""
        self.lib.sim_hang(self.c, getattr(self.lib, f"SIM_{kind}"))

    def come_back(self) -> None:
        self.lib.sim_come_back(self.c)

    def hanging(self) -> int:
        return int(self.lib.sim_hanging(self.c))

    def names(self, directory: str = "/spool/log/") -> list[str]:
        """Paths of the files below a directory, sorted."""
        found = []
        index = 0
        while (name := self.lib.sim_name(self.c, index)) != self.ffi.NULL:
            found.append(self.ffi.string(name).decode())
            index += 1
        return sorted(name for name in found if name.startswith(directory))

    def content(self, path: str) -> bytes:
        return bytes(self.view(path))

    def view(self, path: str) -> Any:
        """The bytes of a file, to be changed in place."""
        at, size = self.ffi.new("uint8_t **"), self.ffi.new("uint64_t *")
        assert self.lib.sim_peek(self.c, path.encode(), at, size) == self.lib.CPS_OK
        return memoryview(self.ffi.buffer(at[0], size[0]))

    def put(self, path: str, data: bytes) -> None:
        assert self.lib.sim_put(self.c, path.encode(), data, len(data)) == self.lib.CPS_OK


class Log:
    """An open log.  Calls return what the C functions give out; an unexpected status raises."""

    def __init__(
        self, disk: Disk, directory: str | None = "/spool", ring_directory: str | None = "/shm", **chosen: Any
    ) -> None:
        self.ffi, self.lib = load()
        self.disk = disk
        config = self.config = self.ffi.new("cps_log_config *")
        keep = [text.encode() if text is not None else None for text in (directory, ring_directory)]
        names = [self.ffi.NULL if text is None else self.ffi.new("char[]", text) for text in keep]
        config.io, config.directory, config.ring_directory = disk.io, names[0], names[1]
        identity = chosen.pop("identity", None)
        if identity is not None:
            buffer = self.ffi.from_buffer("uint8_t[]", identity)
            config.identity, config.identity_bytes = buffer, len(identity)
        config.durability = DURABILITIES[chosen.pop("durability", "process")]
        config.on_full = POLICIES[chosen.pop("on_full", "raise")]
        defaults = {
            "ring_bytes": 4096, "segment_bytes": 8192, "spool_bytes_max": 1 << 30, "spool_messages_max": 0,
            "spill_after_ms": ANY_TIME // 4, "spill_timeout_ms": 10_000, "block_timeout_ms": 10_000,
            "sync_interval_ms": 0, "sync_bytes": 0, "min_free_bytes": 0, "seal_after_ms": 30_000, "adopt": False,
        }  # fmt: skip
        for name, value in (defaults | chosen).items():
            setattr(config, name, value)
        out, self.opened = self.ffi.new("cps_log **"), self.ffi.new("cps_opened *")
        self.status: int = self.lib.cps_log_open(config, out, self.opened)
        self.c = out[0] if self.status == self.lib.CPS_OK else None
        self.number = self.ffi.new("uint64_t *")
        self.batch = self.ffi.new("cps_batch *")

    def ok(self, status: int) -> None:
        assert status == self.lib.CPS_OK, status

    def close(self, timeout_ms: int = 10_000) -> int:
        """Messages that could not be saved."""
        if self.c is None:
            return 0
        self.lib.cps_log_close(self.c, timeout_ms, self.number)
        self.c = None
        return int(self.number[0])

    def kill(self) -> list[Loss]:
        """As ``kill -9``: what is in files and in tmpfs stays as it is.  Losses that nobody had taken until then."""
        out, spilled = self.ffi.new("cps_loss[64]"), self.ffi.new("uint64_t *")
        count = self.lib.stress_kill(self.c, self.disk.c, out, spilled)
        #: What lies from there on is in the ring that was left, perhaps in files too.
        self.ring_from = int(spilled[0])
        self.close()
        self.lib.sim_restart(self.disk.c, False, 0)
        return [Loss(x.first, x.end, x.messages, x.reason) for x in out[0:count]]

    def finish(self) -> list[Loss]:
        """Stop the flusher; the last losses."""
        assert self.lib.cps_log_finish(self.c, 10_000)
        return self.losses()

    def cut(self, seed: int) -> None:
        """Cut the power now."""
        self.lib.sim_cut(self.disk.c, 0)
        self.after_cut(seed)

    def after_cut(self, seed: int) -> None:
        """The power came back, after a cut that has happened."""
        self.close()
        self.lib.sim_restart(self.disk.c, True, seed)

    def append(self, payload: bytes, topic: bytes = b"t", userdata: bytes = b"", try_only: bool = False) -> int:
        """Position, or the status, which is negative."""
        parts = [self.ffi.from_buffer("uint8_t[]", part) for part in (topic, payload, userdata)]
        message = self.ffi.new("cps_message *")
        message.topic, message.payload, message.userdata = parts
        message.topic_bytes, message.payload_bytes, message.userdata_bytes = len(topic), len(payload), len(userdata)
        patience = self.ffi.NULL if try_only else self.ffi.new("cps_patience *", {"slice_ms": ANY_TIME})
        status: int = self.lib.cps_log_append(self.c, message, patience, self.number)
        return int(self.number[0]) if status in (self.lib.CPS_OK, self.lib.CPS_DROPPED) else status

    def read(
        self, max_bytes: int = 1 << 16, take: int | None = None, live: bool = False
    ) -> list[Record] | int | tuple[int, int]:
        """Messages of one batch (at most ``take`` of them consumed), a lost range, or a status."""
        read = self.lib.cps_log_read_live if live else self.lib.cps_log_read
        status: int = read(self.c, max_bytes, self.batch)
        if status != self.lib.CPS_OK:
            return status
        batch = self.batch
        if batch.size == 0:
            self.lib.cps_log_read_done(self.c, batch.lost_end - batch.position)
            return batch.position, batch.lost_end
        seen, consumed = [], 0
        for record in records(bytes(self.ffi.buffer(batch.bytes, batch.size)), batch.position):
            if take is not None and len(seen) == take:
                break
            consumed = record.end - batch.position
            if not record.is_pad:
                seen.append(record)
        self.lib.cps_log_read_done(self.c, consumed)
        return seen

    def drain(self, max_bytes: int = 1 << 16) -> list[Record]:
        """Read all there is; lost ranges are passed over."""
        seen: list[Record] = []
        while not isinstance(got := self.read(max_bytes), int):
            seen += got if isinstance(got, list) else []
        assert got == self.lib.CPS_EMPTY, got
        return seen

    def settle(self, done: list[Record], ended: dict[int, int] | None = None, live: bool = False) -> None:
        """Acknowledge the oldest of what was read (of the live stream), but for those that `ended` gives a reason."""
        if not done:
            return
        ended = ended or {}
        losses = [(one.position, one.end, 1, one.span, ended[one.position]) for one in done if one.position in ended]
        acked = [record.span for record in done if record.position not in ended]
        out = self.ffi.new("cps_loss[]", losses)
        settle = self.lib.cps_log_settle_live if live else self.lib.cps_log_settle
        settle(self.c, done[-1].end, len(acked), sum(acked), out, len(losses))

    def rewind(self) -> None:
        self.lib.cps_log_rewind(self.c)

    def split(self, backlog_bytes: int = 0, may_begin: bool = True) -> int:
        """What is published from now on need not wait for what is pending, where that is more than so much."""
        return int(self.lib.cps_log_split(self.c, ANY_TIME, backlog_bytes, may_begin))

    @property
    def is_split(self) -> bool:
        return bool(self.lib.cps_log_is_split(self.c))

    def fronts(self) -> Any:
        out = self.ffi.new("cps_fronts *")
        self.lib.cps_log_fronts(self.c, out)
        return out[0]

    def ranges(self) -> list[tuple[int, int]]:
        """What is settled ahead of the head."""
        settled = self.stats().settled
        return [(one.first, one.end) for one in settled.ahead[0 : settled.ahead_count]]

    def link(self, up: bool) -> None:
        self.lib.cps_log_link(self.c, up)

    def losses(self) -> list[Loss]:
        """What was lost since the last call."""
        out = self.ffi.new("cps_loss[64]")
        count = self.lib.cps_log_take_losses(self.c, out, 64)
        return [Loss(x.first, x.end, x.messages, x.reason) for x in out[0:count]]

    def stats(self) -> Any:
        out = self.ffi.new("cps_log_stats *")
        self.lib.cps_log_stats_now(self.c, out)
        return out[0]

    def check(self) -> Any:
        """All invariants of the log and of its counters."""
        self.lib.cps_log_check(self.c)
        stats = self.stats()
        for total, refused, *ended, pending in (
            (stats.produced.messages, stats.produced.refused, stats.settled.acked_messages,
             stats.settled.dropped_messages, stats.settled.dead_messages, stats.pending_messages),
            (stats.produced.bytes, stats.produced.refused_bytes, stats.settled.acked_bytes,
             stats.settled.dropped_bytes, stats.settled.dead_bytes, stats.pending_bytes),
        ):  # fmt: skip
            assert total == refused + sum(ended) + pending
            assert pending < 1 << 60  # it did not go below zero
        assert stats.settled.head <= stats.sent <= stats.produced.published
        return stats

    def until(self, true: Any, timeout_s: float = 60.0) -> None:
        """Wait for the flusher to reach a state; it has no event that Python could wait for."""
        deadline = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.001)
