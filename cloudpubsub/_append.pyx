# cython: language_level=3, binding=True, embedsignature=True
"""The way into the log: from Python's objects to a record in the ring.

No algorithm lives here either, but it is the path of every message, so nothing in it is Python that need not be: the
arguments are looked at where they lie, and one C call copies them.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memset

from cloudpubsub._core cimport *
from cloudpubsub._spool cimport Log, check_status

from cloudpubsub._errors import ClosedError, PayloadTooLarge, SpoolFull
from cloudpubsub._topic import check_topic

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef enum:
    WAIT_SLICE_MS = 100  # between looks for Ctrl-C
    KEEP_GIL_BYTES = 4096


cdef const uint8_t *_topic_bytes(object topic, uint16_t *size) except NULL:
    """The UTF-8 bytes of a valid topic, held by `topic`; `check_topic` says what is wrong with any other."""
    cdef Py_ssize_t n = 0
    cdef const char *text = NULL
    cdef bint good = type(topic) is str
    if good:
        try:
            text = PyUnicode_AsUTF8AndSize(topic, &n)
        except UnicodeEncodeError:
            good = False
    if not good or not 0 < n <= 65535 or memchr(text, c"+", n) or memchr(text, c"#", n) or memchr(text, 0, n):
        check_topic(topic)
        text = PyUnicode_AsUTF8AndSize(topic, &n)  # a subclass of str with a valid topic
    size[0] = <uint16_t>n
    return <const uint8_t *>text


cdef const uint8_t *_text_bytes(object payload, Py_ssize_t *size) except NULL:
    try:
        return <const uint8_t *>PyUnicode_AsUTF8AndSize(payload, size)
    except UnicodeEncodeError:
        raise ValueError("payload: a str with lone surrogates is not allowed; it has no UTF-8") from None


cdef int _get_buffer(object value, Py_buffer *view, name, expected) except -1:
    try:
        return PyObject_GetBuffer(value, view, PyBUF_SIMPLE)
    except TypeError:
        raise TypeError(f"{name}: a {type(value).__name__} is not allowed; expected {expected}") from None


cdef int _raise_append(cps_status status, uint32_t payload_bytes) except -1:
    if status == CPS_TOO_LARGE:
        raise PayloadTooLarge(
            f"payload: with {payload_bytes} bytes the record is more than a quarter of ring_bytes or segment_bytes")
    if status == CPS_FULL:
        raise SpoolFull("the spool's limits or a failed storage refuse more messages")
    return check_status(status)


cdef object _append(Log log, object topic, object payload, bint retain, object userdata, bytes properties,
                    uint64_t ttl_ms, bint may_block):
    cdef cps_message message
    cdef cps_patience patience
    cdef cps_status status
    cdef uint64_t position = 0
    cdef Py_buffer payload_view, userdata_view
    cdef bint has_payload_view = False, has_userdata_view = False
    cdef Py_ssize_t size
    log.check()
    message.flags = CPS_RECORD_RETAIN if retain else 0
    if properties is not None or ttl_ms != 0:
        message.flags |= CPS_RECORD_EXTRAS
        message.properties_bytes = 0 if properties is None else <uint16_t>PyBytes_GET_SIZE(properties)
        message.properties = NULL if properties is None else <const uint8_t *>PyBytes_AS_STRING(properties)
        message.ttl_ms = min(ttl_ms, CPS_RECORD_TTL_MAX)
        if ttl_ms != 0:
            log.ttl_seen = True
    message.topic = _topic_bytes(topic, &message.topic_bytes)
    try:
        if type(payload) is bytes:
            message.payload = <const uint8_t *>PyBytes_AS_STRING(payload)
            size = PyBytes_GET_SIZE(payload)
        elif isinstance(payload, str):
            message.payload = _text_bytes(payload, &size)
        else:
            _get_buffer(payload, &payload_view, "payload", "bytes-like or str")
            has_payload_view = True
            message.payload = <const uint8_t *>payload_view.buf
            size = payload_view.len
        if size > log.payload_max:
            raise PayloadTooLarge(f"payload: {size} bytes, at most max_payload_bytes={log.payload_max} are allowed")
        message.payload_bytes = <uint32_t>size
        if type(userdata) is bytes:
            message.userdata = <const uint8_t *>PyBytes_AS_STRING(userdata)
            size = PyBytes_GET_SIZE(userdata)
        else:
            _get_buffer(userdata, &userdata_view, "userdata", "bytes-like")
            has_userdata_view = True
            message.userdata = <const uint8_t *>userdata_view.buf
            size = userdata_view.len
        if size > 65535:
            raise PayloadTooLarge(f"userdata: {size} bytes, at most 65535 are allowed")
        message.userdata_bytes = <uint16_t>size
        log.check()  # the arguments may have run Python code, which may have closed the log
        status = CPS_BUSY
        if message.payload_bytes <= KEEP_GIL_BYTES:
            status = log.c_append(&message, NULL, &position)
        if status == CPS_BUSY:
            log.enter()
            try:
                memset(&patience, 0, sizeof(patience))
                patience.slice_ms = WAIT_SLICE_MS
                patience.never_block = not may_block
                while status == CPS_BUSY:
                    with nogil:
                        status = log.c_append(&message, &patience, &position)
                    if status == CPS_BUSY:
                        PyErr_CheckSignals()
            finally:
                log.leave()
    finally:
        if has_payload_view:
            PyBuffer_Release(&payload_view)
        if has_userdata_view:
            PyBuffer_Release(&userdata_view)
    if status != CPS_OK and status != CPS_DROPPED:
        _raise_append(status, message.payload_bytes)
    return position


def append(Log log not None, topic, payload, bint retain=False, userdata=b"", bytes properties=None, uint64_t ttl_ms=0,
           bint may_block=True):
    """Append one message to `log` and return its position.  See `Client.publish`.

    `properties` are MQTT 5 properties as they are sent; with `ttl_ms` > 0 the message expires.
    """
    return _append(log, topic, payload, retain, userdata, properties, ttl_ms, may_block)


cdef class Producer:
    """What publishes into a log: the base of `Client`, which sets the fields."""

    cdef public Log _log
    cdef public uint64_t _ttl_ms  # of messages that do not say one; 0: for ever
    cdef public object _may_block  # asked before each message whether it may wait for room; None: it may

    def publish(self, topic, payload, *, bint retain=False, userdata=b"", ttl=None, user_properties=None, wait=None):
        """Put a message into the log and return its position, which names it for `wait` and in reports.

        Never waits for the network, and may be called before `start`.  When the memory ring is full it waits for the
        disk, at most `spill_timeout` seconds; what happens when there is no room at all is said by `on_full`.  (With
        "block" a handler or callback is not blocked but gets SpoolFull: the room may depend on its return.)  A position
        of 2**63 or above names a message that `on_full="drop_newest"` refused.

        Args:
            topic: 1 to 65,535 bytes of UTF-8, no wildcards, no NUL.
            payload: At most `max_payload_bytes`; a str is encoded as UTF-8.
            retain: The broker keeps it for later subscribers.
            userdata: At most 65,535 bytes, stored beside the message and given back to `on_publish`; never sent.
            ttl: Seconds after which it is dropped, and counted as expired, if it could not be sent; under MQTT 5 the
                broker is told what is left of them.  Time that the machine was off does not count.  None: as `ttl` of
                the client says.
            user_properties: Pairs of text, at most 65,535 bytes in all, stored with the message; sent under MQTT 5.
            wait: "synced" returns only when the message survives a power cut, as `wait_synced` does: a write and a sync
                for each call, unless several threads share them.  None: returns at once.

        Raises TopicError, PayloadTooLarge, SpoolFull, ClosedError, ForkedError; nothing is stored then.  With `wait`
        also what `wait_synced` raises; the message is in the log then.
        """
        cdef bint may_block
        if self._log is None:
            raise ClosedError("closed")
        if ttl is None and user_properties is None and wait is None and self._ttl_ms == 0:
            may_block = True if self._may_block is None else self._may_block()
            return _append(self._log, topic, payload, retain, userdata, None, 0, may_block)
        return self._publish_with(topic, payload, retain, userdata, ttl, user_properties, wait)
