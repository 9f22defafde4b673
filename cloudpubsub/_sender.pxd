# What `_rounds.pyx` needs of the sender.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from cloudpubsub._core cimport cps_status, cps_window, cps_wire_aliases, cps_wire_framed, cps_wire_source
from cloudpubsub._link cimport _Inbound
from cloudpubsub._spool cimport Log

cdef enum:
    TAKE_MAX = 1024  # acknowledgements at once where each is reported


cdef class Sender(_Inbound):
    cdef Log log
    cdef cps_window *window
    cdef cps_wire_aliases aliases
    cdef uint8_t *out
    cdef size_t out_size, out_start, out_end
    cdef uint64_t told_head, told_messages, told_bytes
    # Of each stream (where there is one, the first counts):
    cdef uint64_t after[2]  # where the message before the next one ended,
    cdef uint64_t read_end[2]  # and where reading has got to; they differ by pads
    cdef bint is_split  # as the log is, and the window
    cdef uint64_t live_first  # where the live stream began
    cdef uint64_t told_live_head, told_live_messages, told_live_bytes
    cdef uint32_t live_share
    cdef uint32_t credit  # hundredths of messages that the backlog has earned
    cdef int only  # BOTH, or the only stream that is sent,
    cdef bint only_to_hold  # until as many of it are held as are to be
    cdef bint backlog_empty  # when it was last looked at
    cdef int stop  # a cps_wire_stop: why the last batch ended
    cdef uint32_t max_inflight
    cdef uint64_t max_inflight_bytes
    cdef uint32_t broker_packet_max
    cdef uint32_t to_hold
    cdef bint no_retain
    cdef bytes id_prefix
    cdef bint carry_ids
    cdef object hook
    cdef bint hooked
    cdef readonly unsigned long long resent  # messages sent again, over all connections
    cdef readonly unsigned long long sent_messages
    cdef readonly unsigned long long framed_bytes  # since restart
    cdef readonly bint window_full  # the last `frame` stopped for it
    cdef list refusals
    #: Written without the GIL and read by any thread, so it is one word of 32 bits, which nothing has to be seen in order
    #: with: since when `rounds` has been at work (monotonic ms, of which the lowest 32 bits, never 0); 0: it waits.
    cdef readonly uint32_t at_work_ms
    #: (position, why) of a message that can never be sent on this connection and is held; None: there is none.
    cdef readonly object unsendable
    cdef uint64_t positions[TAKE_MAX]

    cdef int begin_streams(self) except -1
    cdef bint join_if_over(self) noexcept nogil
    cdef int stream_now(self) noexcept nogil
    cdef int fill(self, cps_wire_source *source, uint64_t now_ms, uint64_t boot_ms) except -1
    cdef cps_status frame_turn(self, cps_wire_source *source, uint32_t *messages) noexcept nogil
    cdef cps_status frame_batch(self, cps_wire_source *source, uint32_t *messages, bint live) noexcept nogil
    cdef cps_status frame_hooked(self, cps_wire_source *source, cps_wire_framed *framed) noexcept
    cdef bint expire_batch(self, uint64_t boot_ms, uint64_t *total) noexcept nogil
    cdef void tell_head(self) noexcept nogil
    cdef bint much_in_flight(self) noexcept nogil
    cdef void tell_heads(self) noexcept nogil
