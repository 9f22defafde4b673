# What `_link.pyx` needs of deliveries.
from libc.stdint cimport int64_t, uint16_t

from cloudpubsub._application_message cimport Message

cdef enum:
    MESSAGES_MAX = 256  # messages in one

cdef class Handling:
    cdef int64_t since_ns  # 0: nothing runs
    cdef public bint is_interrupted  # no handler is called any more
    cdef public bint has_drops  # reports of drops wait, which are told between two messages

    cdef void begin(self) noexcept

cdef class Pubacks:
    cdef bytearray packets

    cdef bint add(self, uint16_t packet_id) except -1

cdef class Batch:
    cdef readonly size_t weight
    cdef readonly size_t at  # the next message
    cdef list messages
    cdef uint16_t *ids
    cdef size_t count, capacity
    cdef object matcher
    cdef Pubacks acks
    cdef object wake

    cdef int add(self, Message message, uint16_t packet_id, size_t weight) except -1
    cdef int grow(self) except -1
    cdef tuple known_handlers(self, Message message)
