/* MQTT on the wire; see _wire.h. */
#include "_wire.h"

#include "_bytes.h"

enum {
    FIRST_BYTE_PUBACK = 0x40,
    FLAG_RETAIN = 0x01,
    FLAG_DUP = 0x08,
    REASON_REFUSED = 0x80, /* reasons from here on are failures */
};

/* ---- outbound: acknowledgements; publishing is in _wire_out.c ---- */

enum cps_status cps_wire_puback(uint8_t *out, size_t capacity_bytes, const uint16_t *packet_ids, size_t n,
                                size_t *produced_bytes) {
    size_t fits = capacity_bytes / CPS_WIRE_PUBACK_BYTES;
    size_t framed = n < fits ? n : fits;
    for (size_t i = 0; i < framed; i++) {
        uint8_t *p = out + i * CPS_WIRE_PUBACK_BYTES;
        p[0] = FIRST_BYTE_PUBACK;
        p[1] = 2;
        cps_store16be(p + 2, packet_ids[i]);
    }
    *produced_bytes = framed * CPS_WIRE_PUBACK_BYTES;
    return framed == n ? CPS_OK : CPS_FULL;
}

/* ---- inbound: the buffer ---- */

struct cps_stream {
    uint8_t *buffer;
    size_t capacity_bytes;
    size_t begin; /* bytes [begin, end) wait to be taken */
    size_t end;
    size_t initial_bytes;
    uint32_t packet_bytes_max;
    enum cps_status failure; /* CPS_OK, or what _next says from now on */
    uint8_t level;
};

enum cps_status cps_stream_open(size_t initial_bytes, uint32_t packet_bytes_max, uint8_t level, cps_stream **out) {
    if (initial_bytes == 0 || initial_bytes > CPS_WIRE_PACKET_MAX) return CPS_TOO_LARGE;
    if (packet_bytes_max == 0 || packet_bytes_max > CPS_WIRE_PACKET_MAX) return CPS_TOO_LARGE;
    cps_stream *stream = calloc(1, sizeof *stream);
    if (stream == NULL) return CPS_NO_MEMORY;
    stream->buffer = malloc(initial_bytes);
    if (stream->buffer == NULL) {
        free(stream);
        return CPS_NO_MEMORY;
    }
    stream->capacity_bytes = initial_bytes;
    stream->initial_bytes = initial_bytes;
    stream->packet_bytes_max = packet_bytes_max;
    stream->level = level;
    *out = stream;
    return CPS_OK;
}

void cps_stream_close(cps_stream *stream) {
    if (stream == NULL) return;
    free(stream->buffer);
    free(stream);
}

/* Change the capacity; what waits begins at 0 and fits.  On refusal everything stays as it was. */
static bool stream_resize(cps_stream *stream, size_t capacity_bytes) {
    uint8_t *buffer = realloc(stream->buffer, capacity_bytes);
    if (buffer == NULL) return false;
    stream->buffer = buffer;
    stream->capacity_bytes = capacity_bytes;
    return true;
}

void cps_stream_reset(cps_stream *stream) {
    stream->begin = 0;
    stream->end = 0;
    stream->failure = CPS_OK;
    /* A refusal to shrink leaves a larger buffer, which serves as well. */
    if (stream->capacity_bytes > stream->initial_bytes) (void)stream_resize(stream, stream->initial_bytes);
}

enum cps_status cps_stream_space(cps_stream *stream, size_t min_bytes, uint8_t **at, size_t *room_bytes) {
    CPS_ASSERT(min_bytes > 0 && min_bytes <= CPS_WIRE_SPACE_MAX);
    size_t waiting = stream->end - stream->begin;
    if (waiting > stream->packet_bytes_max) return CPS_FULL;
    size_t need = waiting + min_bytes;
    bool may_shrink = stream->capacity_bytes > stream->initial_bytes && need <= stream->initial_bytes;
    if (waiting == 0 || may_shrink || stream->capacity_bytes - stream->end < min_bytes) {
        if (waiting > 0) memmove(stream->buffer, stream->buffer + stream->begin, waiting);
        stream->begin = 0;
        stream->end = waiting;
    }
    if (may_shrink) (void)stream_resize(stream, stream->initial_bytes);
    if (stream->capacity_bytes < need) {
        /* Doubling keeps the copying in proportion to the bytes received; no packet needs more than the bound. */
        size_t bound = (size_t)stream->packet_bytes_max + min_bytes;
        size_t wish = stream->capacity_bytes * 2 < bound ? stream->capacity_bytes * 2 : bound;
        if (!stream_resize(stream, wish > need ? wish : need)) return CPS_NO_MEMORY;
    }
    *at = stream->buffer + stream->end;
    *room_bytes = stream->capacity_bytes - stream->end;
    return CPS_OK;
}

void cps_stream_commit(cps_stream *stream, size_t n) {
    CPS_ASSERT(n <= stream->capacity_bytes - stream->end);
    stream->end += n;
}

size_t cps_stream_waiting_bytes(const cps_stream *stream) { return stream->end - stream->begin; }
size_t cps_stream_buffer_bytes(const cps_stream *stream) { return stream->capacity_bytes; }

/* ---- inbound: packets ---- */

/* Which flags a broker may set for each type, one bit for each of the 16 values; 0: a broker never sends the type.
 * PUBLISH takes all but QoS 3. */
static const uint16_t FLAGS_ALLOWED[16] = {
    [CPS_WIRE_CONNACK] = 1u << 0,    [CPS_WIRE_PUBLISH] = 0x3f3f,  [CPS_WIRE_PUBACK] = 1u << 0,
    [CPS_WIRE_PUBREC] = 1u << 0,     [CPS_WIRE_PUBREL] = 1u << 2,  [CPS_WIRE_PUBCOMP] = 1u << 0,
    [CPS_WIRE_SUBACK] = 1u << 0,     [CPS_WIRE_UNSUBACK] = 1u << 0, [CPS_WIRE_PINGRESP] = 1u << 0,
    [CPS_WIRE_DISCONNECT] = 1u << 0, [CPS_WIRE_AUTH] = 1u << 0,
};

typedef struct wire_cursor { /* what is left of a packet's body */
    const uint8_t *at;
    uint32_t left_bytes;
} wire_cursor;

/* Read a variable byte integer.  CPS_EMPTY: it goes on behind what is there.  CPS_DAMAGED: more than four bytes. */
static enum cps_status wire_take_length(wire_cursor *cursor, uint32_t *value) {
    *value = 0;
    for (uint32_t i = 0; i < 4; i++) {
        if (cursor->left_bytes == 0) return CPS_EMPTY;
        uint8_t byte = *cursor->at++;
        cursor->left_bytes--;
        *value |= (uint32_t)(byte & 0x7f) << (7 * i);
        if (byte < 0x80) return CPS_OK;
    }
    return CPS_DAMAGED;
}

static bool wire_take16(wire_cursor *cursor, uint16_t *value) {
    if (cursor->left_bytes < 2) return false;
    *value = cps_load16be(cursor->at);
    cursor->at += 2;
    cursor->left_bytes -= 2;
    return true;
}

static bool wire_take_properties(wire_cursor *cursor, cps_packet *out) {
    uint32_t bytes;
    if (wire_take_length(cursor, &bytes) != CPS_OK || bytes > cursor->left_bytes) return false;
    out->properties = cursor->at;
    out->properties_bytes = bytes;
    cursor->at += bytes;
    cursor->left_bytes -= bytes;
    return true;
}

/* The reason byte and properties that end a level 5 PUBACK or DISCONNECT, each of which may be left out. */
static bool wire_take_reason(wire_cursor *cursor, uint8_t level, cps_packet *out) {
    if (level < CPS_WIRE_LEVEL_5 || cursor->left_bytes == 0) return true;
    out->reason = *cursor->at++;
    cursor->left_bytes--;
    return cursor->left_bytes == 0 || wire_take_properties(cursor, out);
}

static bool wire_take_publish(wire_cursor *cursor, uint8_t level, cps_packet *out) {
    out->qos = (out->flags >> 1) & 3;
    out->dup = (out->flags & FLAG_DUP) != 0;
    out->retain = (out->flags & FLAG_RETAIN) != 0;
    if (!wire_take16(cursor, &out->topic_bytes) || out->topic_bytes > cursor->left_bytes) return false;
    if (out->topic_bytes == 0 && level < CPS_WIRE_LEVEL_5) return false;
    out->topic = cursor->at;
    cursor->at += out->topic_bytes;
    cursor->left_bytes -= out->topic_bytes;
    if (out->qos > 0 && (!wire_take16(cursor, &out->packet_id) || out->packet_id == 0)) return false;
    if (level >= CPS_WIRE_LEVEL_5 && !wire_take_properties(cursor, out)) return false;
    out->payload = cursor->at;
    out->payload_bytes = cursor->left_bytes;
    return true;
}

static bool wire_take_connack(wire_cursor *cursor, uint8_t level, cps_packet *out) {
    if (cursor->left_bytes < 2 || cursor->at[0] > 1) return false;
    out->session_present = cursor->at[0] == 1;
    out->reason = cursor->at[1];
    cursor->at += 2;
    cursor->left_bytes -= 2;
    /* A broker that knows only 3.1.1 refuses level 5 in its own format, without properties. */
    return level < CPS_WIRE_LEVEL_5 || cursor->left_bytes == 0 || wire_take_properties(cursor, out);
}

/* Parse the body of a whole packet into `out`, where type and flags stand already. */
static bool wire_take_body(wire_cursor *cursor, uint8_t level, cps_packet *out) {
    switch (out->type) {
    case CPS_WIRE_PUBLISH:
        return wire_take_publish(cursor, level, out);
    case CPS_WIRE_CONNACK:
        return wire_take_connack(cursor, level, out);
    case CPS_WIRE_PINGRESP:
        return cursor->left_bytes == 0;
    case CPS_WIRE_DISCONNECT:
        return wire_take_reason(cursor, level, out);
    case CPS_WIRE_AUTH:
        return level >= CPS_WIRE_LEVEL_5;
    default: /* every other type starts with a packet id */
        if (!wire_take16(cursor, &out->packet_id) || out->packet_id == 0) return false;
        return out->type != CPS_WIRE_PUBACK || wire_take_reason(cursor, level, out);
    }
}

/* Look at the next packet without taking it; statuses of cps_stream_next, but nothing is remembered. */
static enum cps_status stream_parse(const cps_stream *stream, cps_packet *out) {
    size_t waiting = stream->end - stream->begin;
    if (waiting == 0) return CPS_EMPTY;
    const uint8_t *at = stream->buffer + stream->begin;
    *out = (cps_packet){.bytes = at, .type = at[0] >> 4, .flags = at[0] & 15};
    if ((FLAGS_ALLOWED[out->type] >> out->flags & 1) == 0) return CPS_DAMAGED;
    wire_cursor cursor = {.at = at + 1, .left_bytes = waiting > 5 ? 4 : (uint32_t)waiting - 1};
    uint32_t remaining;
    enum cps_status status = wire_take_length(&cursor, &remaining);
    if (status != CPS_OK) return status;
    uint32_t header_bytes = (uint32_t)(cursor.at - at);
    out->size_bytes = header_bytes + remaining;
    if (out->size_bytes > stream->packet_bytes_max) return CPS_TOO_LARGE;
    if (out->size_bytes > waiting) return CPS_EMPTY;
    cursor.left_bytes = remaining;
    return wire_take_body(&cursor, stream->level, out) ? CPS_OK : CPS_DAMAGED;
}

/* Keep what no later byte can mend. */
static enum cps_status stream_keep(cps_stream *stream, enum cps_status status) {
    if (status == CPS_DAMAGED || status == CPS_TOO_LARGE) stream->failure = status;
    return status;
}

enum cps_status cps_stream_next(cps_stream *stream, cps_packet *out) {
    if (stream->failure != CPS_OK) return stream->failure;
    enum cps_status status = stream_parse(stream, out);
    if (status == CPS_OK) stream->begin += out->size_bytes;
    return stream_keep(stream, status);
}

enum cps_status cps_wire_take_acks(cps_stream *stream, cps_window *window, uint64_t *positions, size_t capacity,
                                   cps_wire_acks *acks) {
    *acks = (cps_wire_acks){0};
    if (stream->failure != CPS_OK) return stream->failure;
    for (;;) {
        const uint8_t *at = stream->buffer + stream->begin;
        uint32_t size_bytes = CPS_WIRE_PUBACK_BYTES;
        uint16_t packet_id = 0;
        if (CPS_LIKELY(stream->end - stream->begin >= size_bytes && at[0] == FIRST_BYTE_PUBACK && at[1] == 2)) {
            packet_id = cps_load16be(at + 2);
        }
        if (CPS_UNLIKELY(packet_id == 0)) { /* cut, longer, damaged, or something else */
            cps_packet packet;
            enum cps_status status = stream_parse(stream, &packet);
            if (status != CPS_OK) return stream_keep(stream, status);
            if (packet.type != CPS_WIRE_PUBACK || packet.reason >= REASON_REFUSED) return CPS_OK;
            packet_id = packet.packet_id;
            size_bytes = packet.size_bytes;
        }
        if (positions != NULL && acks->settled == capacity) return CPS_FULL;
        uint64_t position, end;
        if (cps_window_ack(window, packet_id, &position, &end) == CPS_OK) {
            if (positions != NULL) positions[acks->settled] = position;
            acks->settled++;
            acks->settled_bytes += end - position;
        }
        acks->packets++;
        stream->begin += size_bytes;
    }
}
