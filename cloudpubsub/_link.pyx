# cython: language_level=3, binding=True, embedsignature=True
"""The thin face of the wire: what both connections take in, `Receiver` for the subscribe connection, `Frames` for either of
them where it goes through a WebSocket.  `Sender`, for the publish connection, is in `_sender.pyx`.

It stands between a socket, which the caller reads and writes, and the C core: bytes go in and out through buffers of
the core.  What is not for the data plane comes back as `control` bytes, to be given to paho.  Each object belongs to one
thread, the owner of its connection.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBUF_WRITE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp, memset

from cloudpubsub._application_message cimport Message
from cloudpubsub._core cimport *
from cloudpubsub._delivery cimport Batch
from cloudpubsub._spool cimport check_status


cdef enum:
    IN_BYTES = 64 * 1024
    WEIGHT_BYTES = 4096
    REASON_STRING = 0x1F  # MQTT 5 property

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8(object text) except NULL

PACKET_MAX = CPS_WIRE_PACKET_MAX
FRAME_HEADER_MAX = CPS_FRAMES_HEADER_MAX


cdef str reason_string(const cps_packet *packet):
    """What a broker says in words, where that is its first property."""
    cdef uint32_t size
    if packet.properties == NULL or packet.properties_bytes < 3 or packet.properties[0] != REASON_STRING:
        return ""
    size = packet.properties[1] << 8 | packet.properties[2]
    if size > packet.properties_bytes - 3:
        return ""
    return PyUnicode_DecodeUTF8(<const char *>packet.properties + 3, size, "replace")


cdef class _Inbound:
    """The incoming bytes of one connection after the other.  Its fields are in `_link.pxd`."""

    def __cinit__(self, *args, **kwargs):
        self.stream = NULL
        self.connack = -1

    def __dealloc__(self):
        cps_stream_close(self.stream)

    cdef int open_stream(self, uint32_t packet_max, int level) except -1:
        self.level = level
        return check_status(cps_stream_open(IN_BYTES, packet_max, <uint8_t>level, &self.stream))

    cdef int restart_stream(self) except -1:
        cps_stream_reset(self.stream)
        self.connack = self.disconnect = -1
        self.session_present = False
        self.reason_string = ""
        self.pingresps = 0
        self.received_bytes = 0
        return 0

    def space(self, size_t minimum=16384):
        """A writable view for the next bytes of the socket; valid until the next call of any method but `received`."""
        cdef uint8_t *at
        cdef size_t room
        check_status(cps_stream_space(self.stream, minimum, &at, &room))
        return PyMemoryView_FromMemory(<char *>at, room, PyBUF_WRITE)

    def received(self, size_t n):
        """`n` bytes were read into the view."""
        cps_stream_commit(self.stream, n)
        self.received_bytes += n

    def waiting_bytes(self):
        """Bytes received and not yet taken."""
        return cps_stream_waiting_bytes(self.stream)

    cdef int note(self, const cps_packet *packet, bytearray control) except -1:
        """Keep what we want to know of a packet that is not data, and pass it on where paho must see it."""
        if packet.type == CPS_WIRE_PINGRESP:
            self.pingresps += 1
            return 0
        if packet.type == CPS_WIRE_CONNACK:
            self.connack = packet.reason
            self.session_present = packet.session_present
            self.reason_string = reason_string(packet)
        if packet.type == CPS_WIRE_DISCONNECT:
            self.disconnect = packet.reason
            self.reason_string = reason_string(packet)
        control += packet.bytes[:packet.size_bytes]
        return 0


cdef class Receiver(_Inbound):
    """Subscribe connection: QoS 0 and 1 messages taken out of the stream."""

    cdef str topic  # of the last message
    cdef uint32_t topic_bytes

    def __init__(self, uint32_t packet_max, int level=CPS_WIRE_LEVEL_311):
        self.open_stream(packet_max, level)
        self.topic = ""
        self.topic_bytes = 0

    def restart(self):
        """A new connection begins."""
        self.restart_stream()

    def take(self, Batch batch not None, size_t messages_max, size_t weight_max):
        """Work off what was received: at most `messages_max` messages into the batch, and none more when it weighs
        `weight_max`.

        Returns (how many of them are to be acknowledged, control bytes for paho, whether more may wait).  The packet id is
        0 for QoS 0.  A message weighs 1, and 1 more for each `WEIGHT_BYTES` of payload.  Raises ValueError if the broker
        broke the protocol.
        """
        cdef cps_packet packet
        cdef cps_status status = CPS_OK
        cdef bytearray control = bytearray()
        cdef size_t acknowledged = 0
        while batch.count < messages_max and batch.weight < weight_max:
            status = cps_stream_next(self.stream, &packet)
            if status != CPS_OK:
                break
            if packet.type != CPS_WIRE_PUBLISH or packet.qos == 2:
                self.note(&packet, control)
                continue
            if packet.topic_bytes == 0:
                raise ValueError("the broker sent a topic alias, which it was not allowed")
            batch.add(self.message_of(&packet), packet.packet_id, 1 + packet.payload_bytes // WEIGHT_BYTES)
            acknowledged += packet.packet_id != 0
        if status != CPS_OK and status != CPS_EMPTY:
            raise ValueError("the broker sent what no MQTT broker may send")
        return acknowledged, control, status == CPS_OK

    cdef Message message_of(self, const cps_packet *packet):
        # Messages come in runs of one topic.
        if self.topic_bytes != packet.topic_bytes or memcmp(
                PyUnicode_AsUTF8(self.topic), packet.topic, packet.topic_bytes) != 0:
            try:
                self.topic = PyUnicode_DecodeUTF8(<const char *>packet.topic, packet.topic_bytes, NULL)
            except UnicodeDecodeError:
                raise ValueError("the broker sent a topic that is not UTF-8") from None
            self.topic_bytes = packet.topic_bytes
        return Message(self.topic, PyBytes_FromStringAndSize(<const char *>packet.payload, packet.payload_bytes),
                       None, b"", bool(packet.retain), bool(packet.dup), packet.qos,
                       PyBytes_FromStringAndSize(<const char *>packet.properties, packet.properties_bytes)
                       if packet.properties_bytes else b"")


cdef class Frames:
    """WebSocket frames of one incoming stream.  See `_websocket` for who answers what they say."""

    cdef cps_frames frames

    def __cinit__(self):
        memset(&self.frames, 0, sizeof(self.frames))

    def take(self, data, size_t n):
        """`n` bytes were read into `data`.  Returns how many of them are payload, which is now at its beginning."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_WRITABLE)
        try:
            if n > <size_t>view.len:
                raise ValueError(f"{n} bytes do not fit in {view.len}")
            return cps_frames_take(&self.frames, <uint8_t *>view.buf, n)
        finally:
            PyBuffer_Release(&view)

    @property
    def has_news(self):
        """Whether something stands in `fault`, `ping` or `closing`."""
        return self.frames.has_ping or self.frames.is_closed or self.frames.fault != CPS_FRAMES_FINE

    @property
    def fault(self):
        """A `cps_frames_fault`; 0: none."""
        return self.frames.fault

    @property
    def closing(self):
        """What the server's close frame carried; None: none came."""
        if not self.frames.is_closed:
            return None
        return PyBytes_FromStringAndSize(<const char *>self.frames.control, self.frames.control_bytes)

    def take_ping(self):
        """What the latest ping that was not taken yet carried; None: there is none."""
        if not self.frames.has_ping:
            return None
        self.frames.has_ping = False
        return PyBytes_FromStringAndSize(<const char *>self.frames.ping, self.frames.ping_bytes)

    def take_idle(self):
        """How many frames since the last call brought no payload."""
        cdef uint32_t idle = self.frames.idle_frames
        self.frames.idle_frames = 0
        return idle


def make_frame(out, uint8_t opcode, data, bytes key not None):
    """Write a frame with `data`, masked with the 4 bytes of `key`, to `out`.  Returns its size."""
    cdef Py_buffer to, source
    PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(out, &to, PyBUF_WRITABLE)
        try:
            if len(key) != 4 or to.len < source.len + CPS_FRAMES_HEADER_MAX:
                raise ValueError("a frame needs a key of 4 bytes, and room for its header")
            return cps_frames_make(<uint8_t *>to.buf, opcode, <const uint8_t *>source.buf, source.len,
                                   <const uint8_t *>PyBytes_AS_STRING(key))
        finally:
            PyBuffer_Release(&to)
    finally:
        PyBuffer_Release(&source)
