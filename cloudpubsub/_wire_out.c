/* Records of the log to PUBLISH packets; see _wire.h. */
#include "_bytes.h"
#include "_crc32c.h"
#include "_record.h"
#include "_wire.h"

enum {
    FIRST_BYTE_PUBLISH_QOS1 = 0x32,
    FLAG_RETAIN = 0x01,
    FLAG_DUP = 0x08,
    PROPERTY_EXPIRY = 0x02,
    PROPERTY_ALIAS = 0x23,
    PROPERTY_USER = 0x26,
    ID_KEY_BYTES = sizeof CPS_WIRE_ID_KEY - 1,
    CREDIT_MAX = 3,
    DECIMAL_MAX = 20, /* digits of a 64-bit number */
};

typedef struct outgoing { /* one packet, measured before anything is written */
    const uint8_t *topic;
    const uint8_t *payload;
    const uint8_t *properties; /* the record's own */
    uint32_t payload_bytes;
    uint16_t topic_bytes; /* 0 where an alias stands for it */
    uint16_t properties_bytes;
    uint16_t alias; /* 0: none */
    uint16_t id_bytes; /* of the value of that property */
    bool has_expiry;
    uint32_t expiry_s;
    uint32_t all_properties_bytes;
    uint32_t remaining;
    uint32_t packet_bytes;
    uint8_t id[CPS_WIRE_ID_PREFIX_MAX + 3 * DECIMAL_MAX + 2];
} outgoing;

static uint32_t wire_length_bytes(uint32_t remaining) {
    return remaining < 0x80 ? 1 : remaining < 0x4000 ? 2 : remaining < 0x200000 ? 3 : 4;
}

static uint8_t *wire_put_length(uint8_t *p, uint32_t length) {
    while (length >= 0x80) {
        *p++ = (uint8_t)(length | 0x80);
        length >>= 7;
    }
    *p++ = (uint8_t)length;
    return p;
}

static uint8_t *wire_put(uint8_t *p, const uint8_t *from, size_t n) {
    if (n != 0) memcpy(p, from, n);
    return p + n;
}

enum cps_status cps_wire_packet_bytes(uint64_t topic_bytes, uint64_t payload_bytes, uint8_t level,
                                      uint32_t *size_bytes) {
    /* Each part is judged before the sum, so that the sum cannot wrap. */
    if (topic_bytes > UINT16_MAX || payload_bytes > CPS_WIRE_REMAINING_MAX) return CPS_TOO_LARGE;
    uint64_t remaining = 2 + topic_bytes + 2 + (level >= CPS_WIRE_LEVEL_5) + payload_bytes;
    if (remaining > CPS_WIRE_REMAINING_MAX) return CPS_TOO_LARGE;
    *size_bytes = (uint32_t)remaining + 1 + wire_length_bytes((uint32_t)remaining);
    return CPS_OK;
}

/* ---- topic aliases ---- */

void cps_wire_aliases_reset(cps_wire_aliases *aliases, uint16_t limit) {
    memset(aliases, 0, sizeof *aliases);
    aliases->count = limit < CPS_WIRE_ALIASES ? limit : CPS_WIRE_ALIASES;
}

/* The alias that this topic has, or may have now; 0: none. */
static uint16_t wire_alias(cps_wire_aliases *aliases, const uint8_t *topic, uint16_t topic_bytes, bool *is_known) {
    *is_known = false;
    if (aliases == NULL || aliases->count == 0 || topic_bytes > CPS_WIRE_ALIAS_TOPIC_MAX) return 0;
    uint32_t slot = cps_crc32c(0, topic, topic_bytes) % aliases->count;
    *is_known = aliases->entries[slot].topic_bytes == topic_bytes &&
                memcmp(aliases->entries[slot].topic, topic, topic_bytes) == 0;
    uint8_t *credit = &aliases->entries[slot].credit;
    if (*is_known) {
        if (*credit < CREDIT_MAX) ++*credit;
    } else if (*credit > 0) {
        --*credit;
        return 0;
    }
    return (uint16_t)(slot + 1);
}

static void wire_note_alias(cps_wire_aliases *aliases, const outgoing *packet) {
    aliases->entries[packet->alias - 1].topic_bytes = packet->topic_bytes;
    aliases->entries[packet->alias - 1].credit = 1;
    memcpy(aliases->entries[packet->alias - 1].topic, packet->topic, packet->topic_bytes);
}

/* ---- one packet ---- */

static uint8_t *put_decimal(uint8_t *p, uint64_t value) {
    uint8_t digits[DECIMAL_MAX];
    unsigned n = 0;
    do digits[n++] = (uint8_t)('0' + value % 10);
    while ((value /= 10) > 0);
    while (n > 0) *p++ = digits[--n];
    return p;
}

/* Sum up the sizes.  CPS_TOO_LARGE: MQTT cannot carry it. */
static CPS_MUST_CHECK enum cps_status wire_sum(outgoing *packet, uint8_t level) {
    uint64_t remaining = 4u + (uint64_t)packet->topic_bytes + packet->payload_bytes;
    if (level >= CPS_WIRE_LEVEL_5) {
        packet->all_properties_bytes = (packet->has_expiry ? 5u : 0u) + (packet->alias != 0 ? 3u : 0u) +
                                       packet->properties_bytes +
                                       (packet->id_bytes > 0 ? 5u + ID_KEY_BYTES + packet->id_bytes : 0u);
        remaining += wire_length_bytes(packet->all_properties_bytes) + packet->all_properties_bytes;
    }
    if (remaining > CPS_WIRE_REMAINING_MAX) return CPS_TOO_LARGE;
    packet->remaining = (uint32_t)remaining;
    packet->packet_bytes = packet->remaining + 1 + wire_length_bytes(packet->remaining);
    return CPS_OK;
}

/* Put the packet together; CPS_TOO_LARGE. */
static CPS_MUST_CHECK enum cps_status wire_measure(const cps_wire_source *source, const cps_wire_record *from,
                                                   uint64_t age_ms, outgoing *packet) {
    const cps_record *record = from->record;
    packet->topic = cps_record_topic(from->at);
    packet->topic_bytes = record->topic_bytes;
    packet->payload = from->payload;
    packet->payload_bytes = from->payload_bytes;
    packet->properties_bytes = packet->alias = packet->id_bytes = 0;
    packet->has_expiry = false;
    packet->all_properties_bytes = 0;
    if (source->level < CPS_WIRE_LEVEL_5) return wire_sum(packet, source->level);
    packet->properties = cps_record_properties(from->at, record);
    packet->properties_bytes = record->properties_bytes;
    if (record->ttl_ms != 0) {
        uint64_t left_s = (record->ttl_ms - age_ms + 999) / 1000;
        packet->has_expiry = true;
        packet->expiry_s = left_s < UINT32_MAX ? (uint32_t)left_s : UINT32_MAX;
    }
    if (source->id_prefix != NULL) {
        uint8_t *p = wire_put(packet->id, source->id_prefix, source->id_prefix_bytes);
        p = put_decimal(p, record->position);
        *p++ = '/';
        p = put_decimal(p, record->position + cps_record_span(record->length_bytes));
        *p++ = '/';
        p = put_decimal(p, *source->after);
        packet->id_bytes = (uint16_t)(p - packet->id);
    }
    bool is_known;
    packet->alias = wire_alias(source->aliases, packet->topic, packet->topic_bytes, &is_known);
    if (is_known) packet->topic_bytes = 0;
    enum cps_status status = wire_sum(packet, source->level);
    if (status != CPS_OK || is_known || packet->alias == 0 || packet->packet_bytes <= source->packet_bytes_max)
        return status;
    packet->alias = 0; /* too large for the three bytes of a new alias, and perhaps not without them */
    return wire_sum(packet, source->level);
}

static const uint8_t *wire_write(uint8_t *p, const outgoing *packet, const cps_record *record, uint16_t packet_id,
                                 bool dup, uint8_t level) {
    uint8_t first = FIRST_BYTE_PUBLISH_QOS1;
    if (dup) first |= FLAG_DUP;
    if (record->flags & CPS_RECORD_RETAIN) first |= FLAG_RETAIN;
    *p++ = first;
    p = wire_put_length(p, packet->remaining);
    cps_store16be(p, packet->topic_bytes);
    p = wire_put(p + 2, packet->topic, packet->topic_bytes);
    cps_store16be(p, packet_id);
    p += 2;
    if (level >= CPS_WIRE_LEVEL_5) {
        p = wire_put_length(p, packet->all_properties_bytes);
        if (packet->has_expiry) {
            *p++ = PROPERTY_EXPIRY;
            cps_store32be(p, packet->expiry_s);
            p += 4;
        }
        if (packet->alias != 0) {
            *p++ = PROPERTY_ALIAS;
            cps_store16be(p, packet->alias);
            p += 2;
        }
        if (packet->id_bytes > 0) {
            *p++ = PROPERTY_USER;
            cps_store16be(p, ID_KEY_BYTES);
            p = wire_put(p + 2, (const uint8_t *)CPS_WIRE_ID_KEY, ID_KEY_BYTES);
            cps_store16be(p, packet->id_bytes);
            p = wire_put(p + 2, packet->id, packet->id_bytes);
        }
        p = wire_put(p, packet->properties, packet->properties_bytes);
    }
    return wire_put(p, packet->payload, packet->payload_bytes);
}

/* ---- records ---- */

static enum cps_status wire_hold(const cps_wire_record *from, uint64_t end, cps_window *window, cps_wire_framed *framed) {
    framed->stop = CPS_WIRE_WINDOW_FULL;
    if (cps_window_hold(window, from->record->position, end) != CPS_OK) return CPS_FULL;
    framed->held++;
    return CPS_OK;
}

static enum cps_status wire_skip(const cps_wire_record *from, uint64_t end, enum cps_fate fate, cps_window *window,
                                 cps_wire_framed *framed) {
    framed->stop = CPS_WIRE_WINDOW_FULL;
    if (cps_window_skip(window, from->record->position, end, fate) != CPS_OK) return CPS_FULL;
    framed->skipped++;
    return CPS_OK;
}

enum cps_status cps_wire_frame_one(const cps_wire_source *source, const cps_wire_record *from, cps_window *window,
                                   uint8_t *out, size_t room_bytes, cps_wire_framed *framed) {
    const cps_record *record = from->record;
    uint64_t position = record->position;
    uint64_t end = position + cps_record_span(record->length_bytes);
    if (CPS_UNLIKELY(record->topic_bytes == 0 || (record->flags & ~CPS_RECORD_FLAGS_KNOWN) != 0)) return CPS_DAMAGED;
    enum cps_fate fate;
    if (CPS_UNLIKELY(cps_window_recall(window, position, &fate) == CPS_OK))
        return wire_skip(from, end, fate, window, framed);
    uint64_t age_ms = 0;
    if (CPS_UNLIKELY(record->ttl_ms != 0)) {
        age_ms = cps_record_age_ms(record, source->boot_ms, source->earlier_boot);
        if (age_ms >= record->ttl_ms) return wire_skip(from, end, CPS_FATE_EXPIRED, window, framed);
    }
    if (CPS_UNLIKELY(framed->held < source->hold_messages)) return wire_hold(from, end, window, framed);
    outgoing packet;
    enum cps_status status = wire_measure(source, from, age_ms, &packet);
    if (CPS_UNLIKELY(status != CPS_OK)) return status;
    if (CPS_UNLIKELY(packet.packet_bytes > source->packet_bytes_max ||
                     (source->no_retain && (record->flags & CPS_RECORD_RETAIN)))) {
        status = wire_hold(from, end, window, framed);
        if (status == CPS_OK) {
            framed->unsendable = packet.packet_bytes > source->packet_bytes_max ? CPS_WIRE_OVERSIZE : CPS_WIRE_RETAINED;
            framed->unsendable_position = position;
        }
        return status;
    }
    framed->stop = CPS_WIRE_LIMIT;
    if (framed->messages >= source->messages_max) return CPS_FULL;
    if (framed->produced_bytes >= source->bytes_max) return CPS_FULL;
    if (packet.packet_bytes > room_bytes) {
        framed->stop = CPS_WIRE_OUTPUT_FULL;
        framed->packet_bytes = packet.packet_bytes;
        return CPS_FULL;
    }
    framed->stop = CPS_WIRE_WINDOW_FULL;
    uint16_t packet_id;
    if (cps_window_push(window, position, end, packet.packet_bytes, source->now_ms, &packet_id) != CPS_OK) return CPS_FULL;
    bool dup = position < source->dup_below;
    const uint8_t *packet_end = wire_write(out, &packet, record, packet_id, dup, source->level);
    CPS_ASSERT(packet_end == out + packet.packet_bytes);
    if (packet.alias != 0 && packet.topic_bytes != 0) wire_note_alias(source->aliases, &packet);
    framed->produced_bytes += packet.packet_bytes;
    framed->messages++;
    framed->resent += dup;
    return CPS_OK;
}

enum cps_status cps_wire_frame(const cps_wire_source *source, cps_window *window, uint8_t *out, size_t capacity_bytes,
                               cps_wire_framed *framed) {
    *framed = (cps_wire_framed){0};
    while (framed->consumed_bytes < source->size_bytes) {
        const uint8_t *at = source->bytes + framed->consumed_bytes;
        uint64_t position = source->position + framed->consumed_bytes;
        cps_record record;
        enum cps_status status = cps_record_load(at, source->size_bytes - framed->consumed_bytes, position, &record);
        if (status == CPS_OK) status = cps_record_load_extras(at, &record);
        if (status == CPS_OK && !record.is_pad) {
            cps_wire_record from = {.at = at, .record = &record, .payload = cps_record_payload(at, &record),
                                    .payload_bytes = record.payload_bytes};
            status = cps_wire_frame_one(source, &from, window, out + framed->produced_bytes,
                                        capacity_bytes - framed->produced_bytes, framed);
            if (status == CPS_OK && source->after != NULL)
                *source->after = position + cps_record_span(record.length_bytes);
        }
        if (status == CPS_FULL) return CPS_OK;
        if (CPS_UNLIKELY(status != CPS_OK)) {
            framed->stop = CPS_WIRE_REFUSED;
            return status;
        }
        framed->consumed_bytes += (size_t)cps_record_span(record.length_bytes);
        if (CPS_UNLIKELY(framed->unsendable != CPS_WIRE_SENDABLE)) {
            framed->stop = CPS_WIRE_HELD;
            return CPS_OK;
        }
    }
    framed->stop = CPS_WIRE_SPAN_END;
    return CPS_OK;
}
