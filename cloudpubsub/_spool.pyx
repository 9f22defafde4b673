# cython: language_level=3, binding=True, embedsignature=True
"""The thin face of the log: ring and segments for Python.

No algorithm lives here.  Every method checks that its object is open, converts its arguments, makes one C call (without
the GIL when it can wait, touches the disk or copies more than a few KiB; a short append keeps the GIL and only tries the
lock) and turns the status into an exception.
"""

import os
import threading
import time
import weakref

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from cloudpubsub._application_message cimport Message
from cloudpubsub._core cimport *

from cloudpubsub._errors import (
    ClosedError,
    ForkedError,
    IdentityError,
    SpoolError,
    SpoolLockedError,
    WaitTimeout,
)

cdef enum:
    WAIT_SLICE_MS = 100  # between looks for Ctrl-C
    LOSSES = 64

# ---- from Python to C ----


cdef uint64_t _ms(object seconds) except? 0:
    """Milliseconds; None is no limit."""
    if seconds is None:
        return CPS_NO_LIMIT_MS
    return <uint64_t>(max(0.0, min(float(seconds), 1e12)) * 1000)


cdef void _notify(void *fd, c_bool data_came) noexcept nogil:
    eventfd_write(<int><Py_ssize_t>fd, 1 if data_came else CPS_CALL)


#: What is added to the eventfd of a connection to call its thread.
CALL = CPS_CALL

_DURABILITY = {"memory": CPS_DURABILITY_MEMORY, "process": CPS_DURABILITY_PROCESS, "power": CPS_DURABILITY_POWER}
_ON_FULL = {
    "drop_oldest": CPS_ON_FULL_DROP_OLDEST,
    "drop_newest": CPS_ON_FULL_DROP_NEWEST,
    "block": CPS_ON_FULL_BLOCK,
    "raise": CPS_ON_FULL_RAISE,
}
_STORAGE = {CPS_STORAGE_NONE: "memory", CPS_STORAGE_OK: "ok", CPS_STORAGE_FULL: "full", CPS_STORAGE_FAILED: "failed"}



# ---- from C to Python ----


cdef object message_at(const uint8_t *at, cps_record *record):
    """A `Message` made of a record that lies there whole."""
    if cps_record_load_extras(at, record) != CPS_OK:
        raise RuntimeError(f"position {record.position}: no record")
    return Message(
        PyUnicode_DecodeUTF8(<const char *>cps_record_topic(at), record.topic_bytes, NULL),
        PyBytes_FromStringAndSize(<const char *>cps_record_payload(at, record), record.payload_bytes),
        record.position,
        PyBytes_FromStringAndSize(<const char *>cps_record_userdata(at, record), record.userdata_bytes),
        bool(record.flags & CPS_RECORD_RETAIN),
        False,
        1,
        PyBytes_FromStringAndSize(<const char *>cps_record_properties(at, record), record.properties_bytes),
    )


cdef int check_status(cps_status status) except -1:
    """The exception for a status that no caller has dealt with."""
    if status == CPS_OK:
        return 0
    if status == CPS_CLOSED:
        raise ClosedError("closed")
    if status == CPS_NO_MEMORY:
        raise MemoryError("no memory for a buffer of the spool")
    if status == CPS_IO:
        raise SpoolError("the spool cannot be read; see the storage state in stats()")
    raise RuntimeError(f"unexpected status {<int>status} of the core")


cdef int _raise_opening(cps_status status, cps_opened *opened, object directory, object identity) except -1:
    where = opened.where.decode() if opened.where != NULL else "it"
    if status == CPS_LOCKED:
        raise SpoolLockedError(opened.error, "another process or another object of this one owns the spool", directory)
    if status == CPS_FOREIGN:
        owner = opened.identity[:opened.identity_bytes].decode("utf-8", "replace")
        raise IdentityError(f"spool {directory}: it holds the messages of {owner!r}, not of {identity!r}; "
                            "give another directory, the client id that owns it, or adopt=True")
    if status == CPS_IO:
        raise SpoolError(opened.error, f"cannot open {where}: {os.strerror(opened.error)}", directory)
    if status == CPS_UNKNOWN:
        raise SpoolError(f"spool {directory}: {where} was written by a newer version of this library")
    if status == CPS_DAMAGED:
        raise SpoolError(f"spool {directory}: {where} is not a regular file")
    if status == CPS_TOO_LARGE:
        raise SpoolError(f"spool {directory}: {where}: the path or the client id (at most 1024 bytes) is too long")
    return check_status(status)


def crc32c(data, unsigned int start=0):
    """CRC-32C (Castagnoli) of a bytes-like object; `start` is that of what came before it."""
    cdef const uint8_t[::1] view = data
    cdef uint32_t crc = start
    cdef size_t size = view.shape[0]
    if size > 0:
        with nogil:
            crc = cps_crc32c(crc, &view[0], size)
    return crc


def shared_slot(const uint8_t[::1] page, Py_ssize_t at_sequence, Py_ssize_t at_slots, unsigned words):
    """The current one of two slots of another process's page of cursors, `words` of 8 bytes, in the machine's order.

    All of one moment: read again for as long as a writer moves the sequence meanwhile.
    """
    if not (0 <= at_sequence <= page.shape[0] - 4 and 0 <= at_slots <= page.shape[0] - 16 * words):
        raise ValueError("the page ends before the slots do")
    found = PyBytes_FromStringAndSize(NULL, 8 * words)
    cps_shared_look(&page[at_sequence], &page[at_slots], words, <uint64_t *>PyBytes_AS_STRING(found))
    return found


# After a fork the child holds nothing: see Log._let_go.
_open_logs = weakref.WeakSet()


def _after_fork_in_child():
    for log in list(_open_logs):
        log._let_go()
    _open_logs.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


cdef class Log:
    """Ring and segments as one durable sequence of messages; see `_log.h`.

    Thread safety: every method from any thread, but `Sender`, or whoever reads, is one thread at a time.  `close` is safe
    beside running calls: it ends their waits and waits for them.
    """

    def __cinit__(self):
        self.log = NULL
        self.wake_fd = -1

    def __init__(self, *, directory, ring_directory, identity, adopt, durability, on_full, ring_bytes, segment_bytes,
                 spool_bytes_max, spool_messages_max, min_free_bytes, spill_after_s, spill_timeout_s, block_timeout_s,
                 sync_interval_s, sync_bytes, seal_after_s, payload_max):
        cdef cps_log_config config
        cdef cps_opened opened
        cdef cps_status status
        memset(&config, 0, sizeof(config))
        cdef bytes directory_bytes = None if directory is None else os.fsencode(directory)
        cdef bytes ring_bytes_path = None if ring_directory is None else os.fsencode(ring_directory)
        cdef bytes identity_bytes = None if identity is None else identity.encode()
        self.payload_max = payload_max
        self.idle = threading.Condition()
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        config.io = cps_io_system()
        if directory_bytes is not None:
            config.directory = directory_bytes
        if ring_bytes_path is not None:
            config.ring_directory = ring_bytes_path
        if identity_bytes is not None:
            config.identity = <const uint8_t *>PyBytes_AS_STRING(identity_bytes)
            config.identity_bytes = <uint16_t>min(len(identity_bytes), 65535)
        config.adopt = adopt
        config.durability = _DURABILITY[durability]
        config.on_full = _ON_FULL[on_full]
        config.ring_bytes = ring_bytes
        config.segment_bytes = segment_bytes
        config.spool_bytes_max = spool_bytes_max
        config.spool_messages_max = spool_messages_max or 0
        config.min_free_bytes = min_free_bytes
        config.sync_bytes = sync_bytes or 0
        config.spill_after_ms = _ms(spill_after_s)
        config.spill_timeout_ms = _ms(spill_timeout_s)
        config.block_timeout_ms = _ms(block_timeout_s)
        config.sync_interval_ms = _ms(sync_interval_s)
        config.seal_after_ms = _ms(seal_after_s)
        config.notify = _notify
        config.notify_user = <void *><Py_ssize_t>self.wake_fd
        started = time.monotonic()
        with nogil:
            status = cps_log_open(&config, &self.log, &opened)
        if status != CPS_OK:
            self.log = NULL
            os.close(self.wake_fd)
            self.wake_fd = -1
            _raise_opening(status, &opened, directory, identity)
        self.spool_id = bytes(opened.spool_id[:16])
        self.found = {
            "records": opened.recovery.scan.records + opened.ring_messages,
            "record_bytes": self.stats()["backlog_bytes"],
            "bytes_read": opened.recovery.scan.bytes_read,
            "torn_bytes": opened.recovery.scan.torn_bytes,
            "damaged_ranges": opened.recovery.scan.damaged_ranges,
            "damaged_bytes": opened.recovery.scan.damaged_bytes,
            "segments": opened.recovery.segments,
            "unreadable": opened.recovery.unreadable,
            "ring_records": opened.ring_messages,
            "ring_in_file": opened.ring_in_file,
            "clean": opened.clean,
            "meta_damaged": opened.meta_damaged,
            "duration_s": time.monotonic() - started,
        }
        _open_logs.add(self)

    def __dealloc__(self):
        # Only an object that was never closed gets here with a log.  It is closed like any other, within a second: the
        # ring goes to the disk.
        cdef uint64_t unsaved
        if self.log != NULL and not self.forked and not self.left:
            with nogil:
                cps_log_close(self.log, 1000, &unsaved)
        if self.wake_fd >= 0:
            os.close(self.wake_fd)

    def _let_go(self):
        """In a forked child: let go of everything, touching nothing that the parent sees."""
        self.forked = True
        self.idle = threading.Condition()  # the parent's may be held for ever

    # For `Producer` and `Sender`, which may run without the GIL between `enter` and `leave`.

    cdef cps_status c_append(self, cps_message *message, cps_patience *patience, uint64_t *position) noexcept nogil:
        return cps_log_append(self.log, message, patience, position)

    cdef cps_status c_read(self, size_t max_bytes, cps_batch *batch) noexcept nogil:
        return cps_log_read(self.log, max_bytes, batch)

    cdef void c_read_done(self, uint64_t consumed) noexcept nogil:
        cps_log_read_done(self.log, consumed)

    cdef void c_settle(self, uint64_t head, uint64_t messages, uint64_t span_bytes, const cps_loss *ended,
                       size_t n) noexcept nogil:
        cps_log_settle(self.log, head, messages, span_bytes, ended, n)

    cdef cps_status c_read_live(self, size_t max_bytes, cps_batch *batch) noexcept nogil:
        return cps_log_read_live(self.log, max_bytes, batch)

    cdef void c_settle_live(self, uint64_t end, uint64_t messages, uint64_t span_bytes, const cps_loss *ended,
                            size_t n) noexcept nogil:
        cps_log_settle_live(self.log, end, messages, span_bytes, ended, n)

    cdef cps_split c_split(self, uint64_t age_ms, uint64_t limit, bint may_begin) noexcept nogil:
        return cps_log_split(self.log, age_ms, limit, may_begin)

    cdef bint c_is_split(self) noexcept nogil:
        return cps_log_is_split(self.log)

    cdef void c_fronts(self, cps_fronts *fronts) noexcept nogil:
        cps_log_fronts(self.log, fronts)

    cpdef object look(self, uint64_t position):
        """The message at `position`, which was read and is not settled; None if it cannot be had."""
        cdef cps_record record
        cdef const uint8_t *at
        cdef cps_status status
        with nogil:
            status = cps_log_look(self.log, position, &record, &at)
        return message_at(at, &record) if status == CPS_OK else None

    cdef int check(self) except -1:
        if self.forked:
            raise ForkedError("opened before a fork: the child process must open a client and spool of its own")
        if self.log == NULL or self.closing:
            raise ClosedError("closed")
        return 0

    cdef int enter(self) except -1:
        self.check()
        self.calls += 1
        return 0

    cdef int leave(self) except -1:
        cdef cps_log *log
        cdef uint64_t unsaved
        self.calls -= 1
        if not self.closing or self.calls > 0:
            return 0
        if self.left and not self.forked:  # `close` could not wait for us
            log = self.log
            self.log = NULL
            with nogil:
                cps_log_close(log, 0, &unsaved)
            _open_logs.discard(self)
        with self.idle:
            self.idle.notify_all()
        return 0

    def published(self):
        """The cursor `published`: everything before it is committed."""
        self.check()
        return cps_log_published(self.log)

    cdef cps_status wait(self, uint64_t position, object timeout_s, bint synced, bint all_before) except *:
        """Wait in slices, so that Ctrl-C is served in between."""
        cdef cps_status status = CPS_TIMEOUT
        cdef uint64_t slice_ms
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.enter()
        try:
            while status == CPS_TIMEOUT:
                slice_ms = WAIT_SLICE_MS
                if deadline is not None:
                    slice_ms = min(slice_ms, _ms(deadline - time.monotonic()) + 1)
                with nogil:
                    if synced:
                        status = cps_log_wait_synced(self.log, position, slice_ms)
                    else:
                        status = cps_log_wait_settled(self.log, position, all_before, slice_ms)
                PyErr_CheckSignals()
                if status == CPS_TIMEOUT and deadline is not None and time.monotonic() >= deadline:
                    raise WaitTimeout(f"position {position} not {'synced' if synced else 'settled'} after {timeout_s} s")
        finally:
            self.leave()
        return status

    def wait_settled(self, uint64_t position, timeout_s, bint all_before=False):
        """Until the message at `position`, with `all_before` everything before it too, is settled; WaitTimeout, ClosedError."""
        check_status(self.wait(position, timeout_s, False, all_before))

    def wait_synced(self, uint64_t position, timeout_s):
        """Spill and sync until the cursor `synced` has passed `position`; WaitTimeout, SpoolError, ClosedError."""
        cdef cps_status status = self.wait(position, timeout_s, True, False)
        if status == CPS_IO:
            error = self.stats()["storage_error"]
            raise SpoolError(error, os.strerror(error) if error else "the spool's limits refuse more data")
        check_status(status)

    def outcome(self, uint64_t position):
        """None: acknowledged, or too long ago to know.  Else why the settled message at `position` was not delivered."""
        cdef cps_reason reason
        self.check()
        if cps_log_outcome(self.log, position, &reason) == CPS_OK:
            return None
        return cps_reason_name(reason).decode()

    def take_losses(self):
        """List of (first, end, messages, bytes, reason) since the last call."""
        cdef cps_loss losses[LOSSES]
        cdef size_t i, n
        self.check()
        n = cps_log_take_losses(self.log, losses, LOSSES)
        return [(losses[i].first, losses[i].end, losses[i].messages, losses[i].bytes,
                 cps_reason_name(losses[i].reason).decode()) for i in range(n)]

    def storage(self):
        """How the storage is, as in `stats`, and the errno of its last failure."""
        cdef int error
        self.check()
        storage = cps_log_storage(self.log, &error)
        return _STORAGE[storage], error

    def link(self, bint up):
        """Tell whether there is a link; without one for `spill_after`, the ring is written to the disk."""
        self.check()
        cps_log_link(self.log, up)

    cdef bint c_arm(self) noexcept nogil:
        return cps_log_arm(self.log)

    def arm(self):
        """True: there is nothing to read, and `wake_fd` becomes readable with the next message."""
        self.check()
        return self.c_arm()

    def arm_live(self, bint also_backlog):
        """As `arm`, of the live stream; with `also_backlog` of both."""
        self.check()
        return cps_log_arm_live(self.log, also_backlog)

    def wake(self):
        """Make `wake_fd` readable, for a call."""
        if self.wake_fd >= 0:
            eventfd_write(self.wake_fd, CPS_CALL)

    def rewind(self):
        """Reading starts again at the oldest unsettled message."""
        self.check()
        cps_log_rewind(self.log)

    def read(self, size_t max_bytes):
        """The next messages after those already read, as a list of `Message`; empty at the end of the log."""
        cdef cps_batch batch
        cdef cps_status status
        cdef cps_record record
        cdef list messages = []
        cdef size_t at
        self.enter()
        try:
            while not messages:
                with nogil:
                    status = cps_log_read(self.log, max_bytes, &batch)
                if status == CPS_EMPTY:
                    break
                if status != CPS_OK:
                    check_status(status)
                if batch.size == 0:  # lost on the disk, and counted
                    cps_log_read_done(self.log, batch.lost_end - batch.position)
                    continue
                at = 0
                try:
                    while at < batch.size and (at == 0 or at < max_bytes):
                        if cps_record_load(batch.bytes + at, batch.size - at, batch.position + at, &record) != CPS_OK:
                            raise RuntimeError(f"position {batch.position + at}: no record")
                        if not record.is_pad:
                            messages.append(message_at(batch.bytes + at, &record))
                        at += cps_record_span(record.length_bytes)
                finally:
                    cps_log_read_done(self.log, at)
        finally:
            self.leave()
        return messages

    def settle_through(self, uint64_t position):
        """Everything up to and including the message at `position`, which was read, is settled."""
        cdef cps_status status
        self.enter()
        try:
            with nogil:
                status = cps_log_settle_through(self.log, position)
        finally:
            self.leave()
        if status == CPS_UNKNOWN:
            raise ValueError(f"position: {position} is not that of a message that was read and is not acknowledged yet")
        check_status(status)

    def stats(self):
        """A dict of the core's figures."""
        cdef cps_log_stats s
        self.check()
        cps_log_stats_now(self.log, &s)
        return {
            "published": s.produced.messages, "published_bytes": s.produced.bytes,
            "acked": s.settled.acked_messages, "acked_bytes": s.settled.acked_bytes,
            "dropped": s.settled.dropped_messages + s.produced.refused,
            "dropped_bytes": s.settled.dropped_bytes + s.produced.refused_bytes,
            "dead_lettered": s.settled.dead_messages, "dead_lettered_bytes": s.settled.dead_bytes,
            "backlog_messages": s.pending_messages, "backlog_bytes": s.pending_bytes,
            "oldest_age_seconds": s.oldest_age_ms / 1000.0,
            "ring_used_bytes": s.ring_used_bytes, "spool_bytes": s.spool_bytes, "spool_segments": s.spool_segments,
            "spilled_bytes": s.spilled_bytes, "damaged_ranges": s.damaged_ranges, "damaged_bytes": s.damaged_bytes,
            "quarantine_bytes": s.quarantine_bytes, "expired": s.expired_messages,
            "uncertain": (s.uncertain_first, s.uncertain_end) if s.uncertain_end else None,
            "storage": _STORAGE[s.storage], "storage_error": s.storage_error,
            "head": s.settled.head, "sent": s.sent, "spilled": s.settled.spilled, "synced": s.synced,
            "position": s.produced.published, "sent_max": s.settled.sent_max, "refused": s.produced.refused,
            "ring_bytes": s.ring_bytes, "syncs": s.syncs,
        }

    def shut(self):
        """Refuse new messages and end all waits; reading and settling go on."""
        self.check()
        cps_log_shut(self.log)

    def finish(self, timeout_s):
        """Save what is pending as `close` does, which must follow, but leave losses and statistics to be looked at.

        The reader must have ended.  False: time was too short.
        """
        cdef bint finished
        cdef uint64_t timeout_ms = _ms(timeout_s)
        self.enter()
        try:
            with nogil:
                finished = cps_log_finish(self.log, timeout_ms)
        finally:
            self.leave()
        return finished

    def close(self, timeout_s):
        """Save what is pending, within `timeout_s`; returns how many messages are in no file yet.  Idempotent.

        Where the time is too short the core goes on alone, and has the spool until it is through.  If a call hangs in the
        disk for longer than that, the log is left to it, which closes it when it returns.
        """
        cdef uint64_t unsaved = 0
        cdef cps_log_stats s
        cdef cps_log *log
        cdef uint64_t timeout_ms
        if self.forked or self.log == NULL or self.closing:
            return 0
        deadline = time.monotonic() + timeout_s
        self.closing = True
        cps_log_shut(self.log)
        self.wake()  # a reader that waits for messages
        log = self.log
        interrupt = None
        with self.idle:
            try:
                self.idle.wait_for(lambda: self.calls == 0, timeout_s)
            except BaseException as exc:  # Ctrl-C: what can be saved is saved all the same
                interrupt = exc
        if self.calls > 0:
            self.left = True  # to the call that hangs, which still uses it
            cps_log_stats_now(log, &s)
            if interrupt is not None:
                raise interrupt
            return s.pending_messages
        self.log = NULL
        timeout_ms = _ms(deadline - time.monotonic())
        with nogil:
            cps_log_close(log, timeout_ms, &unsaved)
        _open_logs.discard(self)
        # Only now: the core may have written to it until here.
        os.close(self.wake_fd)
        self.wake_fd = -1
        if interrupt is not None:
            raise interrupt
        return unsaved
