# cython: language_level=3, binding=True, embedsignature=True
"""Received messages on their way to their handlers: what each of them goes through on the dispatcher thread, natively.

A batch gives its messages to their handlers one after the other for as long as nothing needs a decision; whatever does
(a handler that raised, a topic that is not known yet, the end) is left to the dispatcher, which knows all cases, and then
the batch goes on.  All of it runs under the GIL, which is what guards the fields here.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE, PyByteArray_Resize
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t
from libc.stdlib cimport free, realloc
from posix.time cimport clock_gettime, timespec

from cloudpubsub._application_message cimport Message
from cloudpubsub._core cimport CPS_WIRE_PUBACK_BYTES, cps_wire_puback
from cloudpubsub._spool cimport check_status

cdef extern from "Python.h":
    PyObject *PyDict_GetItemWithError(object mapping, object key) except? NULL

cdef extern from "time.h" nogil:
    int CLOCK_MONOTONIC_COARSE

BATCH_MAX = MESSAGES_MAX
PUBACK_BYTES = CPS_WIRE_PUBACK_BYTES


cdef class Handling:
    """What the dispatcher thread is at, for others to see; and what others want of it, for it to see between two messages."""

    cdef void begin(self) noexcept:
        # Coarse: it is asked for each message, and looked at by who counts seconds.
        cdef timespec now
        clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
        self.since_ns = <int64_t>now.tv_sec * 1000000000 + now.tv_nsec

    def begins(self):
        """A handler or callback is about to be called."""
        self.begin()

    def ends(self):
        """Nothing runs."""
        self.since_ns = 0

    @property
    def busy_since_s(self):
        """Since when the same handler or callback has been running (monotonic, to a few milliseconds); None: none runs."""
        return None if self.since_ns == 0 else self.since_ns / 1e9


cdef class Pubacks:
    """Acknowledgements of one connection on their way out: each is a packet already."""

    def __cinit__(self):
        self.packets = bytearray()

    def __len__(self):
        return PyByteArray_GET_SIZE(self.packets) // CPS_WIRE_PUBACK_BYTES

    cdef bint add(self, uint16_t packet_id) except -1:
        """Returns whether it is the first, so that who sends them is to be woken."""
        cdef Py_ssize_t size = PyByteArray_GET_SIZE(self.packets)
        cdef size_t produced
        PyByteArray_Resize(self.packets, size + CPS_WIRE_PUBACK_BYTES)
        check_status(cps_wire_puback(<uint8_t *>PyByteArray_AS_STRING(self.packets) + size, CPS_WIRE_PUBACK_BYTES,
                                     &packet_id, 1, &produced))
        return size == 0

    def take(self):
        """All of them, in order, as bytes to send."""
        cdef bytearray packets = self.packets
        self.packets = bytearray()
        return packets


cdef class Batch:
    """Messages to be given to their handlers, one after the other.

    Args:
        messages: Pairs of a message and its packet id, at most `BATCH_MAX`.
        weight: Of all of them in the queue; large messages are to weigh more, so that they cannot take all memory.
        matcher, acks, wake: What `run` needs: it looks handlers up in what `matcher` has found before, puts the packet ids
            of messages that are done into `acks`, and calls `wake()` where there were none.  Without, `run` does nothing.
    """

    def __cinit__(self, *args, **kwargs):
        self.messages = []
        self.ids = NULL

    def __dealloc__(self):
        free(self.ids)

    def __init__(self, messages=(), size_t weight=0, *, matcher=None, Pubacks acks=None, wake=None):
        for message, packet_id in messages:
            self.add(message, packet_id, 0)
        self.weight = weight
        self.matcher, self.wake = matcher, wake
        self.acks = acks if acks is not None else Pubacks()

    cdef int add(self, Message message, uint16_t packet_id, size_t weight) except -1:
        if self.count == self.capacity:
            self.grow()
        self.messages.append(message)
        self.ids[self.count] = packet_id
        self.count += 1
        self.weight += weight
        return 0

    cdef int grow(self) except -1:
        """By doubling: most batches are of one message where few come, and of as many as there can be where many do."""
        cdef size_t capacity = self.capacity * 2 if self.capacity > 0 else 1
        cdef uint16_t *ids
        if capacity > MESSAGES_MAX:
            raise ValueError(f"more than {MESSAGES_MAX} messages at once")
        ids = <uint16_t *>realloc(self.ids, capacity * sizeof(uint16_t))
        if ids == NULL:
            raise MemoryError("no memory for packet ids")
        self.ids, self.capacity = ids, capacity
        return 0

    def __len__(self):
        return self.count

    def next(self):
        """The message whose turn it is, and its packet id; None: all have had theirs."""
        return (self.messages[self.at], self.ids[self.at]) if self.at < self.count else None

    def step(self):
        """That one has had its turn."""
        self.at += 1

    def acknowledge(self, uint16_t packet_id):
        """The message is done, and so are all before it."""
        if self.acks.add(packet_id):
            # The owner takes all of them at once.  If an older one is still there after ours went in, it will find
            # ours too; looking before going in could miss that it has just gone to sleep.
            self.wake()

    def run(self, Handling handling not None):
        """Give the next messages to their handlers and acknowledge them, until there is something to decide.

        Returns None, or, where that is in the middle of a message, its handlers, which of them is next, and what that one
        raised when it was tried (None: it was not).
        """
        cdef Message message
        cdef tuple handlers
        cdef Py_ssize_t i
        while self.at < self.count and not handling.has_drops:
            message = <Message>self.messages[self.at]
            handlers = self.known_handlers(message)
            if handlers is None:
                break
            for i in range(len(handlers)):
                if handling.is_interrupted:
                    return handlers, i, None
                handling.begin()
                try:
                    handlers[i](message)
                except BaseException as exc:
                    return handlers, i, exc
            self.at += 1
            if self.ids[self.at - 1] != 0:
                self.acknowledge(self.ids[self.at - 1])
        return None

    cdef tuple known_handlers(self, Message message):
        """What was found for the topic before, if it is still so and there are any; else None."""
        cdef PyObject *found
        if self.matcher is None:
            return None
        # Looked up anew for each message: a handler may be added or removed at any time.
        found = PyDict_GetItemWithError(self.matcher.found, message.topic)
        return <tuple>found if found != NULL and len(<tuple>found) > 0 else None
