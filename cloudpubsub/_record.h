/* The record: what one published message is, in the ring and on the disk alike.
 *
 *   offset size
 *        0    4  crc32c      of bytes [4, length); filled in only on the way to the disk, 0 in the ring
 *        4    4  length      of the record in bytes, header included, padding to 8 excluded; top bit: this is a pad
 *        8    8  position    of its own first byte in the log
 *       16    4  epoch       number of the open that wrote it
 *       20    1  flags       CPS_RECORD_RETAIN, CPS_RECORD_EXTRAS; the others are reserved and 0
 *       21    1  reserved    0
 *       22    2  topic       length in bytes
 *       24    2  userdata    length in bytes
 *       26    6  stamp       milliseconds of CLOCK_BOOTTIME when it was published
 *       32       topic, payload, userdata; with CPS_RECORD_EXTRAS also MQTT 5 properties (ready to be sent) and then 8
 *                bytes: the length of these properties (2), time to live in milliseconds (6; 0: none); then zeros up
 *                to a multiple of 8
 *
 * Everything is little-endian.  A pad fills the rest before the ring wraps.  It can be as short as 8 bytes, so only
 * its first two fields exist; on the disk its CRC covers length, position and epoch, which the reader knows.
 *
 * This header knows the bytes and nothing else.  All functions are pure and safe on any bytes. */
#ifndef CPS_RECORD_H
#define CPS_RECORD_H

#include <stdbool.h>
#include <stddef.h>

#include "_bytes.h"
#include "_status.h"

enum {
    CPS_RECORD_ALIGN = 8,
    CPS_RECORD_HEADER_BYTES = 32,
    CPS_RECORD_RETAIN = 0x01,
    CPS_RECORD_EXTRAS = 0x02,
    CPS_RECORD_FLAGS_KNOWN = CPS_RECORD_RETAIN | CPS_RECORD_EXTRAS,
    CPS_RECORD_EXTRAS_BYTES = 8, /* behind the properties */
};
#define CPS_RECORD_TTL_MAX 0xffffffffffffu /* ms: 8,900 years */
#define CPS_RECORD_PAD 0x80000000u
#define CPS_POSITION_MAX 0x7fff000000000000u     /* records lie below it, */
#define CPS_NEXT_POSITION_MAX 0x7fff800000000000u /* and what was reserved for them below this */
#define CPS_EPOCH_MAX 0xff000000u /* epochs of records lie below it, */
#define CPS_LAST_EPOCH_MAX 0xfe000000u /* and that of the last open below this; no spool is opened so often */
#define CPS_RECORD_LENGTH_MAX 0x10000000u /* 256 MiB, above what MQTT can carry */

typedef struct cps_record {
    uint64_t position;
    uint64_t stamp_ms;
    uint64_t ttl_ms; /* 0: lives for ever */
    uint32_t epoch;
    uint32_t crc;
    uint32_t length_bytes; /* without padding */
    uint32_t payload_bytes;
    uint16_t topic_bytes;
    uint16_t userdata_bytes;
    uint16_t properties_bytes;
    uint8_t flags;
    bool is_pad; /* then only position, length_bytes and crc mean anything */
} cps_record;

/* Room that a record of `length_bytes` takes in the log. */
static inline uint64_t cps_record_span(uint64_t length_bytes) {
    return (length_bytes + (CPS_RECORD_ALIGN - 1)) & ~(uint64_t)(CPS_RECORD_ALIGN - 1);
}

/* Length of the record that would hold these parts.  64 bits, so that no sum of sizes can wrap. */
static inline uint64_t cps_record_length(uint64_t topic_bytes, uint64_t payload_bytes, uint64_t userdata_bytes) {
    return CPS_RECORD_HEADER_BYTES + topic_bytes + payload_bytes + userdata_bytes;
}

/* Write a header; the CRC field becomes 0.  `at` has room for 32 bytes. */
static inline void cps_record_store(uint8_t *at, const cps_record *r) {
    cps_store32(at, 0);
    cps_store32(at + 4, r->length_bytes);
    cps_store64(at + 8, r->position);
    cps_store32(at + 16, r->epoch);
    at[20] = r->flags;
    at[21] = 0;
    cps_store16(at + 22, r->topic_bytes);
    cps_store16(at + 24, r->userdata_bytes);
    cps_store16(at + 26, (uint16_t)r->stamp_ms);
    cps_store32(at + 28, (uint32_t)(r->stamp_ms >> 16));
}

/* Write the last 8 bytes of a record with CPS_RECORD_EXTRAS. */
static inline void cps_record_store_extras(uint8_t *at, uint16_t properties_bytes, uint64_t ttl_ms) {
    cps_store16(at, properties_bytes);
    cps_store16(at + 2, (uint16_t)ttl_ms);
    cps_store32(at + 4, (uint32_t)(ttl_ms >> 16));
}

/* Write a pad of `span_bytes` (a multiple of 8, at least 8); only its first 8 bytes are touched. */
static inline void cps_record_store_pad(uint8_t *at, uint32_t span_bytes) {
    cps_store32(at, 0);
    cps_store32(at + 4, span_bytes | CPS_RECORD_PAD);
}

/* Read the header that stands at `at`; the record may reach as far as `available_bytes`, and the log says position `position` is.
 * CPS_DAMAGED: no record can look like that (also when it would reach past `available_bytes`).
 * Looks at the first 8 bytes of a pad and 32 of a message; what CPS_RECORD_EXTRAS promises is left to the next function.
 * Says nothing about the CRC; see cps_record_crc. */
static inline CPS_MUST_CHECK enum cps_status cps_record_load(const uint8_t *at, uint64_t available_bytes,
                                                             uint64_t position, cps_record *out) {
    if (available_bytes < CPS_RECORD_ALIGN) return CPS_DAMAGED;
    uint32_t length = cps_load32(at + 4);
    out->crc = cps_load32(at);
    out->position = position;
    out->is_pad = (length & CPS_RECORD_PAD) != 0;
    length &= ~CPS_RECORD_PAD;
    out->length_bytes = length;
    if (length > CPS_RECORD_LENGTH_MAX || cps_record_span(length) > available_bytes) return CPS_DAMAGED;
    if (out->is_pad) return length >= CPS_RECORD_ALIGN && length % CPS_RECORD_ALIGN == 0 ? CPS_OK : CPS_DAMAGED;
    if (length < CPS_RECORD_HEADER_BYTES || cps_load64(at + 8) != position) return CPS_DAMAGED;
    out->epoch = cps_load32(at + 16);
    out->flags = at[20];
    out->topic_bytes = cps_load16(at + 22);
    out->userdata_bytes = cps_load16(at + 24);
    out->stamp_ms = cps_load16(at + 26) | (uint64_t)cps_load32(at + 28) << 16;
    out->properties_bytes = 0;
    out->ttl_ms = 0;
    uint32_t parts = CPS_RECORD_HEADER_BYTES + (uint32_t)out->topic_bytes + out->userdata_bytes;
    if (out->flags & CPS_RECORD_EXTRAS) parts += CPS_RECORD_EXTRAS_BYTES;
    if (parts > length) return CPS_DAMAGED;
    out->payload_bytes = length - parts;
    return CPS_OK;
}

/* Read what stands behind the parts, where the whole record can be looked at; the payload becomes shorter by it.
 * CPS_DAMAGED: the properties would be longer than there is room. */
static inline CPS_MUST_CHECK enum cps_status cps_record_load_extras(const uint8_t *at, cps_record *r) {
    if (CPS_LIKELY(!(r->flags & CPS_RECORD_EXTRAS) || r->is_pad)) return CPS_OK;
    const uint8_t *extras = at + r->length_bytes - CPS_RECORD_EXTRAS_BYTES;
    uint32_t room = r->length_bytes - CPS_RECORD_HEADER_BYTES - r->topic_bytes - r->userdata_bytes - CPS_RECORD_EXTRAS_BYTES;
    uint16_t properties_bytes = cps_load16(extras);
    if (properties_bytes > room) return CPS_DAMAGED;
    r->properties_bytes = properties_bytes;
    r->payload_bytes = room - properties_bytes;
    r->ttl_ms = cps_load16(extras + 2) | (uint64_t)cps_load32(extras + 4) << 16;
    return CPS_OK;
}

/* How long ago it was published by the clock of its stamp, or less where that cannot be known: what was published before
 * this boot is at least as old as the boot. */
static inline uint64_t cps_record_age_ms(const cps_record *r, uint64_t boot_ms, bool earlier_boot) {
    if (earlier_boot) return boot_ms;
    return boot_ms > r->stamp_ms ? boot_ms - r->stamp_ms : 0;
}

/* Parts of a loaded message; pointers into the same bytes. */
static inline const uint8_t *cps_record_topic(const uint8_t *at) { return at + CPS_RECORD_HEADER_BYTES; }
static inline const uint8_t *cps_record_payload(const uint8_t *at, const cps_record *r) {
    return at + CPS_RECORD_HEADER_BYTES + r->topic_bytes;
}
static inline const uint8_t *cps_record_userdata(const uint8_t *at, const cps_record *r) {
    return cps_record_payload(at, r) + r->payload_bytes;
}
static inline const uint8_t *cps_record_properties(const uint8_t *at, const cps_record *r) {
    return cps_record_userdata(at, r) + r->userdata_bytes;
}

#endif
