# What `_append.pyx`, `_sender.pyx` and `_link.pyx` need of the log.
from libc.stdint cimport uint8_t, uint64_t

from cloudpubsub._core cimport (
    cps_batch, cps_fronts, cps_log, cps_loss, cps_message, cps_patience, cps_record, cps_split, cps_status,
)

cdef object message_at(const uint8_t *at, cps_record *record)
cdef int check_status(cps_status status) except -1

cdef class Log:
    cdef cps_log *log
    cdef unsigned calls  # inside the core without the GIL; guarded by the GIL
    cdef bint closing
    cdef Py_ssize_t payload_max
    cdef bint forked
    cdef bint left  # closed while a call hung in the disk
    cdef object idle  # condition: `calls` has fallen to 0
    cdef readonly bint ttl_seen  # a message that expires was appended
    cdef readonly int wake_fd  # an eventfd; readable when `arm` was called and there is something to read, or a loss waits
    cdef readonly bytes spool_id  # 16 bytes, zeros without a directory
    cdef readonly object found  # dict: what opening found
    cdef object __weakref__

    cdef int check(self) except -1
    cdef int enter(self) except -1
    cdef int leave(self) except -1
    cdef cps_status c_append(self, cps_message *message, cps_patience *patience, uint64_t *position) noexcept nogil
    cdef cps_status c_read(self, size_t max_bytes, cps_batch *batch) noexcept nogil
    cdef bint c_arm(self) noexcept nogil
    cdef void c_read_done(self, uint64_t consumed) noexcept nogil
    cdef void c_settle(self, uint64_t head, uint64_t messages, uint64_t span_bytes, const cps_loss *ended,
                       size_t n) noexcept nogil
    cdef cps_status c_read_live(self, size_t max_bytes, cps_batch *batch) noexcept nogil
    cdef void c_settle_live(self, uint64_t end, uint64_t messages, uint64_t span_bytes, const cps_loss *ended,
                            size_t n) noexcept nogil
    cdef cps_split c_split(self, uint64_t age_ms, uint64_t limit, bint may_begin) noexcept nogil
    cdef bint c_is_split(self) noexcept nogil
    cdef void c_fronts(self, cps_fronts *fronts) noexcept nogil
    cpdef object look(self, uint64_t position)
    cdef cps_status wait(self, uint64_t position, object timeout_s, bint synced, bint all_before) except *
