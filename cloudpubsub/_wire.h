/* MQTT on the wire, 3.1.1 and 5: records of the log to PUBLISH packets, bytes of the socket to packets.
 *
 * What it is: outbound, pure functions that frame a batch of records into a buffer of the caller and enter each into
 * the in-flight window; inbound, a `cps_stream` that splits the byte stream of one connection into packets, cut
 * anywhere, and takes acknowledgements straight into the window.
 *
 * Threads: one, the owner of the connection.  Different streams and windows are independent.
 * Owns: the input buffer of a stream, the only memory here that is allocated.
 * Never does: touch a file, a socket or a clock; check a CRC, or whether a topic is UTF-8; trust a byte that it was
 * given. */
#ifndef CPS_WIRE_H
#define CPS_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "_record.h"
#include "_status.h"
#include "_window.h"

enum {
    CPS_WIRE_LEVEL_311 = 4, /* protocol levels as CONNECT carries them */
    CPS_WIRE_LEVEL_5 = 5,
    CPS_WIRE_PUBACK_BYTES = 4,
    CPS_WIRE_SPACE_MAX = 0x1000000, /* what cps_stream_space can be asked for at most */
};
#define CPS_WIRE_REMAINING_MAX 268435455u /* what four bytes of remaining length can say */
#define CPS_WIRE_PACKET_MAX 268435460u    /* with the fixed header */

enum cps_wire_type { /* of a packet, as in its first byte */
    CPS_WIRE_CONNACK = 2,
    CPS_WIRE_PUBLISH = 3,
    CPS_WIRE_PUBACK = 4,
    CPS_WIRE_PUBREC = 5,
    CPS_WIRE_PUBREL = 6,
    CPS_WIRE_PUBCOMP = 7,
    CPS_WIRE_SUBACK = 9,
    CPS_WIRE_UNSUBACK = 11,
    CPS_WIRE_PINGRESP = 13,
    CPS_WIRE_DISCONNECT = 14,
    CPS_WIRE_AUTH = 15,
};

/* ---- outbound ---- */

/* Size of the QoS 1 PUBLISH packet for such a message at protocol `level`.
 * CPS_TOO_LARGE: MQTT cannot carry it; `*size_bytes` is not written. */
CPS_MUST_CHECK enum cps_status cps_wire_packet_bytes(uint64_t topic_bytes, uint64_t payload_bytes, uint8_t level,
                                                     uint32_t *size_bytes);

/* Topic aliases of one connection (level 5): which topic each number stands for.  A topic has one place where it can be.
 * One that is in use keeps its place: each use earns it credit, and another topic that needs the place takes a credit
 * away, or the place when there is none left. */
enum { CPS_WIRE_ALIASES = 64, CPS_WIRE_ALIAS_TOPIC_MAX = 254, CPS_WIRE_ID_PREFIX_MAX = 40 };
#define CPS_WIRE_ID_KEY "cloudpubsub-id" /* of the user property that carries a message's id */

typedef struct cps_wire_aliases {
    uint16_t count; /* that the broker allows */
    struct {
        uint16_t topic_bytes; /* 0: not in use */
        uint8_t credit;
        uint8_t topic[CPS_WIRE_ALIAS_TOPIC_MAX];
    } entries[CPS_WIRE_ALIASES];
} cps_wire_aliases;

/* A new connection, on which the broker takes aliases 1..`limit`. */
void cps_wire_aliases_reset(cps_wire_aliases *aliases, uint16_t limit);

typedef struct cps_wire_source { /* records as the log hands them out */
    const uint8_t *bytes;        /* begins and ends on a border of records; messages and pads */
    size_t size_bytes;
    uint64_t position;     /* in the log, of the first byte */
    uint64_t dup_below;    /* records below it may have been sent before: DUP is set and they count as resent */
    uint64_t now_ms;       /* for the window */
    uint64_t boot_ms;      /* the clock by which records are stamped, now */
    uint64_t bytes_max;    /* frame no further packet when there are so many */
    uint32_t messages_max; /* frame no more than this */
    uint32_t hold_messages; /* so many are held and not sent, before any other is framed */
    uint32_t packet_bytes_max; /* the broker takes no larger ones: these are held */
    uint16_t id_prefix_bytes;  /* at most CPS_WIRE_ID_PREFIX_MAX */
    uint8_t level;
    bool earlier_boot;         /* the stamps are of a boot that is over */
    bool no_retain;            /* the broker takes no retained messages: these are held */
    cps_wire_aliases *aliases; /* level 5; NULL: none */
    const uint8_t *id_prefix;  /* level 5: each packet carries "<prefix><position>/<end>/<after>"; NULL: none does */
    uint64_t *after;           /* where the message before the next one ended; kept up to date here; may be NULL without
                                  an id_prefix */
} cps_wire_source;

enum cps_wire_stop { /* why framing ended */
    CPS_WIRE_SPAN_END,
    CPS_WIRE_OUTPUT_FULL, /* the next packet needs `packet_bytes`, more than is left of the output */
    CPS_WIRE_WINDOW_FULL,
    CPS_WIRE_LIMIT,   /* messages_max packets or bytes_max bytes were framed */
    CPS_WIRE_HELD,    /* the last record consumed can never be sent on this connection: see `unsendable` */
    CPS_WIRE_REFUSED, /* the record at `consumed_bytes` cannot be sent; see the status */
};

enum cps_wire_unsendable { CPS_WIRE_SENDABLE, CPS_WIRE_OVERSIZE, CPS_WIRE_RETAINED };

typedef struct cps_wire_framed {
    size_t consumed_bytes; /* of the source; always a border of records */
    size_t produced_bytes; /* of the output; whole packets */
    uint32_t messages;     /* framed, `resent` among them */
    uint32_t resent;       /* framed with DUP */
    uint32_t skipped;      /* not framed, because ended before the reconnect, or expired */
    uint32_t held;         /* not framed and held */
    uint32_t packet_bytes; /* CPS_WIRE_OUTPUT_FULL: room that the next packet needs; else 0 */
    uint64_t unsendable_position;
    enum cps_wire_unsendable unsendable;
    enum cps_wire_stop stop;
} cps_wire_framed;

/* Append QoS 1 PUBLISH packets for the records of `source` to `out`, each entered into `window` under the packet id
 * that it carries.  `*framed` is always written; what it counts is framed and in the window, whatever the status.
 * CPS_OK: see `stop`.  CPS_DAMAGED: at `consumed_bytes` stands no record, one without topic, or one with flags that
 * this version does not know.  CPS_TOO_LARGE: the record there is more than MQTT can carry. */
CPS_MUST_CHECK enum cps_status cps_wire_frame(const cps_wire_source *source, cps_window *window, uint8_t *out,
                                              size_t capacity_bytes, cps_wire_framed *framed);

typedef struct cps_wire_record { /* one message, whose payload may be another than the record's */
    const uint8_t *at;
    const cps_record *record; /* loaded from there */
    const uint8_t *payload;
    uint32_t payload_bytes;
} cps_wire_record;

/* The same for one message, to the first `room_bytes` of `out`; `*framed` is added to.  CPS_FULL: not now, `framed->stop`
 * says why, nothing was changed.  `*source->after` is the caller's to move. */
CPS_MUST_CHECK enum cps_status cps_wire_frame_one(const cps_wire_source *source, const cps_wire_record *from,
                                                  cps_window *window, uint8_t *out, size_t room_bytes,
                                                  cps_wire_framed *framed);

/* Frame a PUBACK (4 bytes, in every protocol level) for each of `n` packet ids.
 * CPS_FULL: only the first `*produced_bytes / 4` of them found room. */
CPS_MUST_CHECK enum cps_status cps_wire_puback(uint8_t *out, size_t capacity_bytes, const uint16_t *packet_ids,
                                               size_t n, size_t *produced_bytes);

/* ---- inbound ---- */

typedef struct cps_stream cps_stream;

typedef struct cps_packet {
    const uint8_t *bytes;      /* the whole packet, fixed header included */
    const uint8_t *topic;      /* PUBLISH; empty only in level 5, where an alias stands for it */
    const uint8_t *payload;    /* PUBLISH */
    const uint8_t *properties; /* PUBLISH, PUBACK, CONNACK, DISCONNECT of level 5; without their length; else NULL */
    uint32_t size_bytes;
    uint32_t payload_bytes;
    uint32_t properties_bytes;
    uint16_t topic_bytes;
    uint16_t packet_id; /* 0 where the packet has none */
    uint8_t type;       /* enum cps_wire_type */
    uint8_t flags;      /* low half of the first byte */
    uint8_t qos;        /* PUBLISH */
    uint8_t reason;     /* PUBACK, CONNACK, DISCONNECT: 0 where the packet has none */
    bool dup;             /* PUBLISH */
    bool retain;          /* PUBLISH */
    bool session_present; /* CONNACK */
} cps_packet;

/* Make the stream of one connection after the other, all of protocol `level`.  Its buffer has `initial_bytes`, grows
 * for packets of up to `packet_bytes_max` (at most CPS_WIRE_PACKET_MAX) and shrinks again when it has drained.
 * CPS_TOO_LARGE: a size is 0 or too large.  CPS_NO_MEMORY. */
CPS_MUST_CHECK enum cps_status cps_stream_open(size_t initial_bytes, uint32_t packet_bytes_max, uint8_t level,
                                               cps_stream **out);

/* Free it; NULL is allowed. */
void cps_stream_close(cps_stream *stream);

/* A new connection: forget bytes and damage. */
void cps_stream_reset(cps_stream *stream);

/* Where the next bytes of the socket go: `*room_bytes` (at least `min_bytes`, 1..CPS_WIRE_SPACE_MAX) at `*at`, valid
 * until the next _commit, _space, _reset or _close.  Ends the validity of every packet taken before.
 * CPS_FULL: more than `packet_bytes_max` bytes wait already, take packets first.  CPS_NO_MEMORY. */
CPS_MUST_CHECK enum cps_status cps_stream_space(cps_stream *stream, size_t min_bytes, uint8_t **at,
                                                size_t *room_bytes);

/* `n` bytes were read to where _space said. */
void cps_stream_commit(cps_stream *stream, size_t n);

/* Take the next packet.  Pointers in `*out` are valid until the next _space, _reset or _close.
 * CPS_EMPTY: more bytes are needed.  CPS_DAMAGED: no broker may send this; the stream stays damaged until _reset.
 * CPS_TOO_LARGE: a packet larger than `packet_bytes_max` has begun; as lasting. */
CPS_MUST_CHECK enum cps_status cps_stream_next(cps_stream *stream, cps_packet *out);

/* Bytes that were committed and not taken yet. */
size_t cps_stream_waiting_bytes(const cps_stream *stream);
size_t cps_stream_buffer_bytes(const cps_stream *stream);

typedef struct cps_wire_acks {
    size_t packets;         /* PUBACKs taken from the stream */
    size_t settled;         /* of them known to the window; the positions written */
    uint64_t settled_bytes; /* of the log, in the records settled */
} cps_wire_acks;

/* Take PUBACKs that say success from the stream into the window, for as long as they follow one another.  `positions`
 * (NULL where only the head matters; then `capacity` is ignored) receives the records settled, in order of arrival.
 * `*acks` is always written and counts from 0.  Unknown ids are taken; the window counts them.
 * CPS_OK: another packet, or a PUBACK that refuses, is next: _next takes it.  CPS_EMPTY: more bytes are needed.
 * CPS_FULL: `positions` is full and a PUBACK is next.  CPS_DAMAGED, CPS_TOO_LARGE: as _next. */
CPS_MUST_CHECK enum cps_status cps_wire_take_acks(cps_stream *stream, cps_window *window, uint64_t *positions,
                                                  size_t capacity, cps_wire_acks *acks);

#endif
