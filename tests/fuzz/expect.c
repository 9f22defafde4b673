/* The rules of the format, applied to the files that the input described; see the header. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* memmem */
#endif
#include "expect.h"

#include "_bytes.h"
#include "_crc32c.h"

enum { HEADER_BYTES = 128, FOOTER_BYTES = 64, RECORD_BYTES = 32 };
#define PAD_BIT 0x80000000u
#define POSITION_END 0x7fff000000000000u /* no log comes near 2^63, from where positions name refused messages */

void fuzz_add(fuzz_records *records, fuzz_record record) {
    if (records->count == records->room) {
        records->room = records->room > 0 ? 2 * records->room : 64;
        records->list = realloc(records->list, records->room * sizeof *records->list);
        CHECK(records->list != NULL);
    }
    records->list[records->count++] = record;
}

void fuzz_records_free(fuzz_records *records) {
    free(records->list);
    memset(records, 0, sizeof *records);
}

uint32_t fuzz_digest(const uint8_t *at) {
    /* Flags and lengths of the parts, then the parts. */
    return cps_crc32c_table(cps_crc32c_table(0, at + 20, 6), at + RECORD_BYTES, cps_load32(at + 4) - RECORD_BYTES);
}

static bool covers(const uint8_t *bytes, size_t size) {
    return cps_load32(bytes + size) == cps_crc32c_table(0, bytes, size);
}

/* Rule 1, for a message. */
static bool is_message(const fuzz_file *file, size_t at, size_t end) {
    const uint8_t *record = file->bytes + at;
    if (end - at < RECORD_BYTES) return false;
    uint64_t length = cps_load32(record + 4);
    if (length < RECORD_BYTES || ((length + 7) & ~(uint64_t)7) > end - at) return false;
    if (cps_load64(record + 8) != file->base + at - HEADER_BYTES || cps_load32(record + 16) > file->epoch) return false;
    uint64_t parts = (uint64_t)RECORD_BYTES + cps_load16(record + 22) + cps_load16(record + 24);
    bool has_extras = (record[20] & 2) != 0;
    if (parts + (has_extras ? 8 : 0) > length) return false;
    if (cps_load32(record) != cps_crc32c_table(0, record + 4, (size_t)length - 4)) return false;
    return !has_extras || parts + 8 + cps_load16(record + length - 8) <= length;
}

/* The length of the pad at `at`, or 0. */
static size_t pad_at(const fuzz_file *file, size_t at, size_t end) {
    uint32_t word = cps_load32(file->bytes + at + 4);
    size_t length = word & ~PAD_BIT;
    uint8_t known[16];
    if ((word & PAD_BIT) == 0 || length < 8 || length % 8 != 0 || length > end - at) return 0;
    cps_store32(known, word);
    cps_store64(known + 4, file->base + at - HEADER_BYTES);
    cps_store32(known + 12, file->epoch);
    return cps_load32(file->bytes + at) == cps_crc32c_table(0, known, sizeof known) ? length : 0;
}

/* The offset behind the last record of a sealed file; 0: it is not sealed. */
static size_t sealed_end(const fuzz_file *file) {
    if (file->size < HEADER_BYTES + FOOTER_BYTES) return 0;
    size_t at = file->size - FOOTER_BYTES;
    const uint8_t *footer = file->bytes + at;
    if (memcmp(footer, "CPSFOOT1", 8) != 0 || !covers(footer, FOOTER_BYTES - 4)) return 0;
    if (cps_load64(footer + 8) != file->base || cps_load32(footer + 40) != file->epoch) return 0;
    if (cps_load64(footer + 32) > at - HEADER_BYTES || cps_load64(footer + 24) > cps_load64(footer + 32) / 8)
        return 0; /* no file of this size holds that much */
    return cps_load64(footer + 16) == file->base + at - HEADER_BYTES && at % 8 == 0 ? at : 0;
}

/* Of another spool, or of a version to come. */
static bool is_foreign(const fuzz_file *file, const uint8_t id[16]) {
    return memcmp(file->bytes, "CPSSEGM1", 8) == 0 && covers(file->bytes, HEADER_BYTES - 4) &&
           (cps_load32(file->bytes + 8) != 1 || memcmp(file->bytes + 16, id, 16) != 0);
}

/* Rule 2.  The position behind the last record is returned; messages are added. */
static uint64_t walk(const fuzz_file *file, fuzz_records *out) {
    size_t sealed = sealed_end(file);
    size_t end = sealed != 0 ? sealed : HEADER_BYTES + ((file->size - HEADER_BYTES) & ~(size_t)7);
    uint64_t last = file->base;
    bool in_chain = true; /* a pad tells too little to start a chain again */
    for (size_t at = HEADER_BYTES; at + 8 <= end;) {
        size_t span = in_chain ? pad_at(file, at, end) : 0;
        uint64_t position = file->base + at - HEADER_BYTES;
        if (span == 0 && is_message(file, at, end)) {
            span = (cps_load32(file->bytes + at + 4) + 7) & ~(size_t)7;
            fuzz_add(out, (fuzz_record){position, position + span, fuzz_digest(file->bytes + at)});
        }
        in_chain = span != 0;
        at += in_chain ? span : 8;
        if (in_chain) last = position + span;
    }
    return sealed != 0 ? file->base + sealed - HEADER_BYTES : last;
}

/* The next file by name, as the library takes them; NULL: that was the last. */
static const fuzz_file *next_by_name(const fuzz_spool *spool, const fuzz_file *before) {
    const fuzz_file *next = NULL;
    for (unsigned i = 0; i < spool->count; i++) {
        const fuzz_file *file = &spool->files[i];
        if (before != NULL && strcmp(file->name, before->name) <= 0) continue;
        if (next == NULL || strcmp(file->name, next->name) < 0) next = file;
    }
    return next;
}

/* Would a message that is put between these tell a position twice, and differently? */
static bool contradicts(const fuzz_records *records, size_t count, const fuzz_record *one) {
    for (size_t i = 0; i < count; i++) {
        const fuzz_record *other = &records->list[i];
        if (other->end <= one->position || one->end <= other->position) continue;
        if (other->position != one->position || other->end != one->end || other->digest != one->digest) return true;
    }
    return false;
}

enum fuzz_clarity fuzz_expect(const fuzz_spool *spool, const uint8_t id[16], fuzz_records *out) {
    uint64_t reached = 0;
    enum fuzz_clarity clarity = FUZZ_CLEAR;
    for (const fuzz_file *file = NULL; (file = next_by_name(spool, file)) != NULL;) {
        if (file->is_renamed || file->base % 8 != 0 || file->base >= POSITION_END || file->epoch >= 0xff000000u)
            return FUZZ_UNCLEAR;
        if (file->is_folder || file->size <= HEADER_BYTES || is_foreign(file, id)) continue;
        size_t before = out->count;
        uint64_t end = walk(file, out);
        if (end == file->base || file->base >= reached) {
            reached = end > reached ? end : reached;
            continue;
        }
        clarity = FUZZ_OVERLAPPING;
        for (size_t i = before; i < out->count; i++)
            if (contradicts(out, before, &out->list[i])) return FUZZ_UNCLEAR;
        reached = end > reached ? end : reached;
    }
    return clarity;
}

bool fuzz_is_genuine(const fuzz_spool *spool, uint64_t position, const uint8_t *at, size_t length) {
    if (cps_load64(at + 8) != position || cps_load32(at) != cps_crc32c_table(0, at + 4, length - 4)) return false;
    for (unsigned i = 0; i < spool->count; i++) {
        const fuzz_file *file = &spool->files[i];
        uint64_t offset = HEADER_BYTES + position - file->base;
        if (offset < file->size && length <= file->size - offset && memcmp(file->bytes + offset, at, length) == 0)
            return true;
    }
    for (unsigned i = 0; i < spool->count; i++) { /* a name that was changed may give another base */
        const fuzz_file *file = &spool->files[i];
        if (file->is_renamed && memmem(file->bytes, file->size, at, length) != NULL) return true;
    }
    return false;
}
