# What `_sender.pyx` needs of the wire.
from libc.stdint cimport uint32_t

from cloudpubsub._core cimport cps_packet, cps_stream

cdef str reason_string(const cps_packet *packet)

cdef class _Inbound:
    cdef cps_stream *stream
    cdef readonly int level  # protocol level: 4 for MQTT 3.1.1, 5 for MQTT 5
    cdef readonly int connack  # return code of the CONNACK, -1: none has come
    cdef readonly bint session_present
    cdef readonly int disconnect  # reason code of a DISCONNECT of the broker, -1: none has come
    cdef readonly str reason_string  # that came with the last of the two
    cdef readonly int pingresps  # since restart
    cdef readonly unsigned long long received_bytes  # since restart

    cdef int open_stream(self, uint32_t packet_max, int level) except -1
    cdef int restart_stream(self) except -1
    cdef int note(self, const cps_packet *packet, bytearray control) except -1
