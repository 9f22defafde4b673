# cython: language_level=3, binding=True, embedsignature=True
"""`Message`, which is made for every message that is received, read or reported: native, because that is often."""

cimport cython

from cloudpubsub._properties import decode_user_properties

cdef enum:
    SHOWN_BYTES = 64


@cython.freelist(64)
@cython.no_gc  # text, bytes and numbers make no cycles
cdef class Message:
    """One message, received or published.  Read-only.

    Attributes:
        topic: Topic that it was published to.
        payload: Its bytes.
        position: Its place in the log; None for a received message.
        userdata: What `publish()` stored beside it; never goes over the network.
        retain: Published: keep it at the broker.  Received: it was kept there.
        duplicate: Received: the broker may have delivered it before.
        qos: 0 or 1.
        user_properties: Pairs of text that travel beside the payload under MQTT 5; () under 3.1.1.
    """

    __match_args__ = ("topic", "payload", "position")

    def __cinit__(self, str topic not None, bytes payload not None, position=None, bytes userdata not None=b"",
                  retain=False, duplicate=False, qos=1, bytes properties not None=b""):
        self.topic = topic
        self.payload = payload
        self.position = position
        self.userdata = userdata
        self.retain = retain
        self.duplicate = duplicate
        self.qos = qos
        self.properties = properties

    @property
    def user_properties(self):
        return decode_user_properties(self.properties)

    cdef tuple values(self):
        return (self.topic, self.payload, self.position, self.userdata, self.retain, self.duplicate, self.qos,
                self.properties)

    def __eq__(self, other):
        return self.values() == (<Message>other).values() if isinstance(other, Message) else NotImplemented

    def __hash__(self):
        return hash(self.values())

    def __reduce__(self):
        return type(self), self.values()

    def __repr__(self):
        shown = repr(self.payload[:SHOWN_BYTES])
        if len(self.payload) > SHOWN_BYTES:
            shown += f"… ({len(self.payload)} bytes)"
        flags = "".join([f", {name}=True" for name in ("retain", "duplicate") if getattr(self, name)])
        place = "" if self.position is None else f", position={self.position}"
        return f"Message({self.topic!r}, {shown}{place}, qos={self.qos}{flags})"
