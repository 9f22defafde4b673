/* Reading segments: verified spans for replay, resynchronisation behind damage, and the scan of unsealed files. */
#include <inttypes.h>
#include <stdlib.h>

#include "_crc32c.h"
#include "_segment_bytes.h"

enum { READ_AHEAD_BYTES = 256 * 1024 };

static CPS_MUST_CHECK enum cps_status open_for_reading(cps_segment *segment, int *error) {
    const cps_io *io = segment->io;
    if (segment->read_handle >= 0) return CPS_OK;
    enum cps_status status = io->open(io->context, segment->path, CPS_IO_READ, &segment->read_handle, error);
    if (status != CPS_OK) segment->read_handle = -1;
    return status;
}

/* Bytes of positions [position, position + size) as far as the file has them: `*got` may be less.  Read, not mapped: a page of
 * a mapping that somebody truncates, or that the disk cannot give any more, is a SIGBUS, and looking first leaves a gap. */
static CPS_MUST_CHECK enum cps_status fetch(cps_segment *segment, uint64_t position, size_t size, cps_scratch *scratch,
                                            const uint8_t **bytes, size_t *got, int *error) {
    const cps_io *io = segment->io;
    enum cps_status status = open_for_reading(segment, error);
    if (status != CPS_OK) return status;
    uint64_t offset = CPS_SEGMENT_HEADER_BYTES + position - segment->base;
    status = cps_scratch_grow(scratch, size);
    if (status != CPS_OK) return status;
    *bytes = scratch->bytes;
    return io->read(io->context, segment->read_handle, scratch->bytes, size, offset, got, error);
}

/* What stands at `at`?  `held`: bytes at hand; `rest`: bytes to the end of the segment.  CPS_OK; CPS_EMPTY: `*want`
 * bytes are needed to tell; CPS_DAMAGED. */
static CPS_MUST_CHECK enum cps_status judge(const cps_segment *segment, const uint8_t *at, size_t held, uint64_t rest,
                                            uint64_t position, cps_record *record, size_t *want) {
    if (held < CPS_RECORD_HEADER_BYTES && held < rest) {
        *want = rest < CPS_RECORD_HEADER_BYTES ? (size_t)rest : CPS_RECORD_HEADER_BYTES;
        return CPS_EMPTY;
    }
    if (held < CPS_RECORD_HEADER_BYTES && (held < CPS_RECORD_ALIGN || !(cps_load32(at + 4) & CPS_RECORD_PAD)))
        return CPS_DAMAGED; /* only a pad is shorter than a header */
    if (cps_record_load(at, rest, position, record) != CPS_OK) return CPS_DAMAGED;
    uint64_t span = cps_record_span(record->length_bytes);
    if (span > segment->capacity_bytes) return CPS_DAMAGED;
    if (span > held) {
        *want = (size_t)span;
        return CPS_EMPTY;
    }
    if (!record->is_pad && record->epoch > segment->epoch) return CPS_DAMAGED;
    if (cps_record_crc(at, record, segment->epoch) != record->crc) return CPS_DAMAGED;
    return cps_record_load_extras(at, record);
}

/* One record at `position`, whatever its size.  CPS_OK; CPS_DAMAGED; CPS_IO; CPS_NO_MEMORY. */
static CPS_MUST_CHECK enum cps_status read_one(cps_segment *segment, uint64_t position, uint64_t end, size_t held,
                                               cps_scratch *scratch, cps_record *record, const uint8_t **bytes,
                                               size_t *got, int *error) {
    uint64_t rest = end - position;
    if (held > rest) held = (size_t)rest;
    for (;;) {
        enum cps_status status = fetch(segment, position, held, scratch, bytes, got, error);
        if (status != CPS_OK) return status;
        if (*got < held) rest = *got; /* the file is shorter than it should be: nothing can reach behind its end */
        size_t want = 0;
        status = judge(segment, *bytes, *got, rest, position, record, &want);
        if (status != CPS_EMPTY) return status;
        CPS_ASSERT(want > held);
        held = want;
    }
}

/* Behind damage at `position`: the first place where a valid record stands, or `end`.  Estimates the messages lost. */
static CPS_MUST_CHECK enum cps_status resynchronise(cps_segment *segment, uint64_t position, uint64_t end,
                                                    cps_scratch *scratch, cps_span *span, uint64_t *last_set,
                                                    int *error) {
    uint64_t plausible_next = position; /* where a header that may be right says that the next record is */
    uint64_t window_start = position;
    span->lost_messages = 0;
    span->lost_end = end;
    while (window_start < end) {
        const uint8_t *bytes;
        size_t got;
        size_t size = end - window_start < READ_AHEAD_BYTES ? (size_t)(end - window_start) : READ_AHEAD_BYTES;
        enum cps_status status = fetch(segment, window_start, size, scratch, &bytes, &got, error);
        if (status != CPS_OK) return status;
        size_t at = 0;
        for (; at + CPS_RECORD_HEADER_BYTES <= got; at += CPS_RECORD_ALIGN) {
            uint64_t here = window_start + at;
            if (cps_load64(bytes + at) != 0) *last_set = here + CPS_RECORD_ALIGN;
            if (cps_load64(bytes + at + 8) != here) continue; /* no message says that it stands here */
            cps_record record;
            if (here >= plausible_next && cps_record_load(bytes + at, end - here, here, &record) == CPS_OK) {
                span->lost_messages++;
                plausible_next = here + cps_record_span(record.length_bytes);
            }
            if (here == position) continue; /* known to be damaged */
            size_t whole;
            status = read_one(segment, here, end, CPS_RECORD_HEADER_BYTES, scratch, &record, &bytes, &whole, error);
            if (status == CPS_OK) {
                span->lost_end = here;
                if (span->lost_messages > 1 && plausible_next == here + cps_record_span(record.length_bytes))
                    span->lost_messages--; /* the good one was counted too */
                if (span->lost_messages == 0) span->lost_messages = 1;
                return CPS_OK;
            }
            if (status != CPS_DAMAGED) return status;
            status = fetch(segment, window_start, size, scratch, &bytes, &got, error); /* read_one used the scratch */
            if (status != CPS_OK) return status;
        }
        for (; at + 8 <= got; at += 8)
            if (cps_load64(bytes + at) != 0) *last_set = window_start + at + 8;
        if (got < size || end - window_start <= READ_AHEAD_BYTES) break;
        window_start += READ_AHEAD_BYTES - CPS_RECORD_HEADER_BYTES; /* headers that straddle the border are seen whole */
    }
    if (span->lost_messages == 0) span->lost_messages = 1;
    return CPS_OK;
}

enum cps_status cps_segment_span(cps_segment *segment, uint64_t position, uint64_t end, size_t max_bytes,
                                 cps_scratch *scratch, cps_span *span, int *error) {
    CPS_ASSERT(position >= segment->base && position < end);
    cps_record record;
    const uint8_t *bytes;
    size_t got;
    span->position = position;
    span->size = 0;
    enum cps_status status =
        read_one(segment, position, end, max_bytes, scratch, &record, &bytes, &got, error);
    if (status == CPS_DAMAGED) {
        uint64_t ignored = 0;
        return resynchronise(segment, position, end, scratch, span, &ignored, error);
    }
    if (status != CPS_OK) return status;
    size_t at = (size_t)cps_record_span(record.length_bytes);
    uint64_t rest = end - position;
    size_t want;
    span->messages_size = record.is_pad ? 0 : at;
    while (at < got && judge(segment, bytes + at, got - at, rest - at, position + at, &record, &want) == CPS_OK) {
        at += (size_t)cps_record_span(record.length_bytes);
        if (!record.is_pad) span->messages_size = at;
    }
    span->bytes = bytes;
    span->size = at;
    return CPS_OK;
}

/* `part` of `whole` as a share of `amount`. */
static uint64_t share(uint64_t amount, uint64_t part, uint64_t whole) {
    if (part >= whole) return amount;
    while (whole > UINT32_MAX) { /* no spool writes such files */
        whole >>= 1;
        part >>= 1;
    }
    return amount > UINT32_MAX ? amount / whole * part : amount * part / whole;
}

/* Messages lost in all ranges that were passed.  Headers are believed where they tell too little, and what they do not tell
 * goes by size: a long stretch without a header held many.  Where they tell too much, some of it was padding. */
static uint64_t lost_so_far(const cps_toll *toll) {
    if (toll->messages < toll->estimate) return share(toll->messages, toll->passed_estimate, toll->estimate);
    uint64_t untold = toll->messages - toll->estimate;
    uint64_t lost = toll->passed_estimate + share(untold, toll->passed_bytes, toll->damaged_bytes);
    return lost < toll->messages ? lost : toll->messages;
}

static uint64_t lost_bytes_so_far(const cps_toll *toll) {
    if (lost_so_far(toll) >= toll->messages) return toll->message_bytes;
    return share(toll->message_bytes, toll->passed_bytes, toll->damaged_bytes);
}

/* Count what is valid in [from, end), and add what is not to the ranges of `toll`. */
static CPS_MUST_CHECK enum cps_status count_part(cps_segment *segment, uint64_t from, uint64_t end, cps_toll *toll,
                                                 uint64_t *messages, uint64_t *bytes, cps_scratch *scratch, int *error) {
    for (uint64_t at = from; at < end;) {
        cps_span span;
        enum cps_status status =
            cps_segment_span(segment, at, segment->end, READ_AHEAD_BYTES, scratch, &span, error);
        if (status == CPS_OK && span.size == 0 && span.lost_end > end) /* as the reader that stopped there saw it */
            status = cps_segment_span(segment, at, end, READ_AHEAD_BYTES, scratch, &span, error);
        if (status != CPS_OK) return status;
        if (span.size == 0) {
            toll->estimate += span.lost_messages;
            toll->damaged_bytes += span.lost_end - at;
            at = span.lost_end;
        }
        for (size_t offset = 0; offset < span.size && at < end;) {
            cps_record record;
            CPS_ASSERT(cps_record_load(span.bytes + offset, span.size - offset, at, &record) == CPS_OK);
            uint64_t span_bytes = cps_record_span(record.length_bytes);
            *messages += !record.is_pad;
            *bytes += record.is_pad ? 0 : span_bytes;
            offset += (size_t)span_bytes;
            at += span_bytes;
        }
    }
    return CPS_OK;
}

enum cps_status cps_segment_count_toll(cps_segment *segment, uint64_t head, uint64_t passed, cps_scratch *scratch,
                                       int *error) {
    cps_toll toll = {.passed = passed};
    uint64_t before = 0, before_bytes = 0, behind = 0, behind_bytes = 0;
    CPS_ASSERT(segment->base <= head && head <= passed && passed <= segment->end);
    enum cps_status status =
        count_part(segment, segment->base, head, &toll, &before, &before_bytes, scratch, error);
    if (status == CPS_OK) status = count_part(segment, head, passed, &toll, &behind, &behind_bytes, scratch, error);
    toll.passed_estimate = toll.estimate;
    toll.passed_bytes = toll.damaged_bytes;
    if (status == CPS_OK)
        status = count_part(segment, passed, segment->end, &toll, &behind, &behind_bytes, scratch, error);
    if (status != CPS_OK) return status;
    if (segment->patchy && !segment->sealed) {
        segment->messages = before + behind + toll.estimate;
        segment->message_bytes = before_bytes + behind_bytes + toll.damaged_bytes;
    }
    if (segment->messages > before + behind) toll.messages = segment->messages - before - behind;
    if (segment->message_bytes > before_bytes + behind_bytes)
        toll.message_bytes = segment->message_bytes - before_bytes - behind_bytes;
    toll.told_bytes = lost_bytes_so_far(&toll);
    toll.is_known = true;
    cps_segment_toll_left(&toll, &toll.pending_messages, &toll.pending_bytes);
    toll.pending_messages += behind;
    toll.pending_bytes += behind_bytes;
    segment->toll = toll;
    return CPS_OK;
}

void cps_segment_toll_left(const cps_toll *toll, uint64_t *messages, uint64_t *bytes) {
    *messages = toll->messages - lost_so_far(toll);
    *bytes = toll->message_bytes > toll->told_bytes ? toll->message_bytes - toll->told_bytes : 0;
}

void cps_segment_set_toll_left(cps_toll *toll, uint64_t messages, uint64_t bytes) {
    toll->messages = messages;
    toll->message_bytes = bytes;
    toll->estimate = toll->estimate > toll->passed_estimate ? toll->estimate - toll->passed_estimate : 0;
    toll->damaged_bytes = toll->damaged_bytes > toll->passed_bytes ? toll->damaged_bytes - toll->passed_bytes : 0;
    toll->passed_estimate = toll->passed_bytes = toll->told_bytes = 0;
}

void cps_segment_take_toll(cps_segment *segment, uint64_t position, uint64_t end, uint64_t *messages, uint64_t *bytes) {
    cps_toll *toll = &segment->toll;
    uint64_t before = lost_so_far(toll);
    *bytes = 0;
    if (position >= toll->passed) {
        toll->passed_estimate += *messages;
        toll->passed_bytes += end - position;
        toll->passed = end;
    }
    uint64_t after = lost_so_far(toll);
    *messages = after - before;
    if (after == before) return;
    uint64_t told = lost_bytes_so_far(toll);
    *bytes = told > toll->told_bytes ? told - toll->told_bytes : 0;
    toll->told_bytes += *bytes;
}

/* Find the end of an unsealed segment, counting what is in it. */
static CPS_MUST_CHECK enum cps_status scan_records(cps_segment *segment, uint64_t data_bytes, cps_scratch *scratch,
                                                   cps_scan *scan, int *error) {
    uint64_t limit = segment->base + data_bytes;
    uint64_t at = segment->base;
    uint64_t damage_from = 0, damage_messages = 0; /* a bad stretch that is damage only if records follow */
    uint64_t last_set = 0;
    bool in_damage = false;
    segment->end = segment->base;
    while (at < limit) {
        cps_span span;
        cps_record record;
        const uint8_t *bytes;
        size_t got;
        enum cps_status status =
            read_one(segment, at, limit, READ_AHEAD_BYTES, scratch, &record, &bytes, &got, error);
        if (status == CPS_DAMAGED) {
            span.position = at;
            status = resynchronise(segment, at, limit, scratch, &span, &last_set, error);
            if (status != CPS_OK) return status;
            in_damage = true;
            damage_from = at;
            damage_messages = span.lost_messages;
            at = span.lost_end;
            continue;
        }
        if (status != CPS_OK) return status;
        if (in_damage) {
            scan->damaged_ranges++;
            scan->damaged_bytes += at - damage_from;
            segment->messages += damage_messages;
            segment->message_bytes += at - damage_from;
            segment->patchy = true;
            in_damage = false;
        }
        size_t walked = 0, want;
        do {
            uint64_t span_bytes = cps_record_span(record.length_bytes);
            if (!record.is_pad) {
                segment->messages++;
                segment->message_bytes += span_bytes;
                scan->records++;
            }
            walked += (size_t)span_bytes;
        } while (walked < got && judge(segment, bytes + walked, got - walked, limit - at - walked, at + walked, &record,
                                       &want) == CPS_OK);
        at += walked;
        segment->end = at;
    }
    if (last_set > segment->end) scan->torn_bytes += last_set - segment->end;
    return CPS_OK;
}

static bool parse_name(const char *name, cps_segment *segment) {
    unsigned long long base;
    unsigned epoch, serial;
    int used = 0;
    if (sscanf(name, "%16llx-%8x-%8x.seg%n", &base, &epoch, &serial, &used) != 3) return false;
    if (used != 16 + 1 + 8 + 1 + 8 + 4 || name[used] != '\0' || base % CPS_RECORD_ALIGN != 0) return false;
    if (base >= CPS_POSITION_MAX || epoch >= CPS_EPOCH_MAX) return false;
    segment->base = base;
    segment->epoch = epoch;
    segment->serial = serial;
    return true;
}

static bool load_footer(cps_segment *segment, uint64_t file_bytes, int *error) {
    uint8_t footer[CPS_SEGMENT_FOOTER_BYTES];
    size_t got;
    const cps_io *io = segment->io;
    if (file_bytes < CPS_SEGMENT_HEADER_BYTES + sizeof footer) return false;
    uint64_t at = file_bytes - sizeof footer;
    if (io->read(io->context, segment->read_handle, footer, sizeof footer, at, &got, error) != CPS_OK) return false;
    if (got != sizeof footer || memcmp(footer, cps_footer_magic, 8) != 0) return false;
    if (cps_load32(footer + 60) != cps_crc32c(0, footer, 60)) return false;
    if (cps_load64(footer + 8) != segment->base || cps_load32(footer + 40) != segment->epoch) return false;
    uint64_t end = cps_load64(footer + 16);
    if (end < segment->base || end - segment->base != at - CPS_SEGMENT_HEADER_BYTES) return false;
    if (end % CPS_RECORD_ALIGN != 0 || end >= CPS_POSITION_MAX) return false;
    uint64_t messages = cps_load64(footer + 24), message_bytes = cps_load64(footer + 32);
    /* Damage of a few bytes may have been counted as a message, so no more can be asked. */
    if (message_bytes > end - segment->base || messages > message_bytes / CPS_RECORD_ALIGN) return false;
    segment->end = end;
    segment->messages = messages;
    segment->message_bytes = message_bytes;
    return true;
}

static bool header_holds(const uint8_t *header, size_t got) {
    return got == CPS_SEGMENT_HEADER_BYTES && memcmp(header, cps_segment_magic, 8) == 0 &&
           cps_load32(header + 124) == cps_crc32c(0, header, 124);
}

/* Believe the header if it is whole; without one the file name says what matters.  False: another spool's, or version's. */
static bool load_header(cps_segment *segment, const uint8_t spool_id[16], int *error) {
    uint8_t header[CPS_SEGMENT_HEADER_BYTES], boot[16];
    size_t got;
    const cps_io *io = segment->io;
    if (io->read(io->context, segment->read_handle, header, sizeof header, 0, &got, error) != CPS_OK) return true;
    if (!header_holds(header, got)) return true;
    if (cps_load32(header + 8) != CPS_SEGMENT_VERSION) return false; /* of a newer version of this library */
    if (memcmp(header + 16, spool_id, 16) != 0) return false;
    io->boot_id(io->context, boot);
    segment->oldest_wall_ms = cps_load64(header + 64);
    segment->earlier_boot = memcmp(header + 32, boot, 16) != 0;
    if (!segment->earlier_boot) segment->oldest_stamp_ms = cps_load64(header + 72);
    return true;
}

enum cps_status cps_segment_load(const cps_io *io, const char *directory, const char *name, const uint8_t spool_id[16],
                                 cps_scratch *scratch, cps_segment **out, cps_scan *scan, int *error) {
    cps_segment *segment;
    enum cps_status status = cps_segment_new(io, directory, name, &segment);
    if (status != CPS_OK) return status;
    cps_io_facts facts;
    uint64_t torn_before = scan->torn_bytes;
    if (!parse_name(name, segment)) status = CPS_UNKNOWN;
    if (status == CPS_OK) status = open_for_reading(segment, error);
    if (status == CPS_OK) status = io->facts(io->context, segment->read_handle, &facts, error);
    if (status == CPS_OK && !facts.is_regular) status = CPS_UNKNOWN;
    if (status == CPS_OK && facts.size_bytes <= CPS_SEGMENT_HEADER_BYTES) status = CPS_EMPTY;
    if (status == CPS_OK && !load_header(segment, spool_id, error)) status = CPS_UNKNOWN;
    if (status == CPS_OK) {
        uint64_t data_bytes = facts.size_bytes - CPS_SEGMENT_HEADER_BYTES;
        segment->full = true;
        segment->file_bytes = facts.allocated_bytes > facts.size_bytes ? facts.allocated_bytes : facts.size_bytes;
        segment->capacity_bytes = data_bytes;
        segment->sealed = load_footer(segment, facts.size_bytes, error);
        scan->bytes_read += CPS_SEGMENT_HEADER_BYTES + CPS_SEGMENT_FOOTER_BYTES;
        if (segment->sealed) {
            segment->synced_end = segment->end;
            scan->records += segment->messages;
        } else {
            scan->bytes_read += data_bytes;
            segment->synced_end = segment->base;
            segment->unsynced_since_ms = io->monotonic_ms(io->context);
            status = scan_records(segment, data_bytes & ~(uint64_t)(CPS_RECORD_ALIGN - 1), scratch, scan, error);
        }
        /* A write that failed may have left it shorter than it will be when it is sealed. */
        uint64_t sealed_bytes = cps_segment_sealed_bytes(segment);
        if (segment->file_bytes < sealed_bytes) segment->file_bytes = sealed_bytes;
        if (status == CPS_OK && segment->end == segment->base) status = CPS_EMPTY;
    }
    if (status == CPS_OK) {
        segment->named = segment->sealed;
        cps_segment_rest(segment);
        *out = segment;
    } else {
        /* Nothing was ever written to it; if it stays, the next open tries again. */
        if (status == CPS_EMPTY && scan->torn_bytes == torn_before) (void)!cps_segment_remove(segment);
        cps_segment_close(segment);
    }
    return status;
}

enum cps_status cps_segment_trim(cps_segment *segment, uint64_t end, cps_scratch *scratch, int *error) {
    cps_scan ignored = {0}; /* what is in there was counted when it was loaded */
    CPS_ASSERT(end >= segment->base && end <= segment->end);
    segment->messages = segment->message_bytes = 0;
    segment->patchy = false;
    enum cps_status status = open_for_reading(segment, error);
    if (status == CPS_OK) status = scan_records(segment, end - segment->base, scratch, &ignored, error);
    if (segment->synced_end > segment->end) segment->synced_end = segment->end;
    cps_segment_rest(segment);
    return status;
}

/* [at, end) of `segment` is damaged: what `other` has of it goes there. */
static CPS_MUST_CHECK enum cps_status mend_range(cps_segment *segment, cps_segment *other, uint64_t at, uint64_t end,
                                                 int handle, cps_scratch *scratch, int *error) {
    const cps_io *io = segment->io;
    while (at < end) {
        cps_span span;
        uint64_t messages, bytes;
        enum cps_status status = cps_segment_span(other, at, end, READ_AHEAD_BYTES, scratch, &span, error);
        if (status == CPS_OK && span.size > 0) {
            uint8_t *records = scratch->bytes; /* which the span lies in; a pad's CRC tells of the segment */
            cps_segment_prepare(segment, records, span.size, at, &messages, &bytes);
            status = io->write(io->context, handle, records, span.size, CPS_SEGMENT_HEADER_BYTES + at - segment->base,
                               error);
        }
        if (status != CPS_OK) return status;
        at = span.size > 0 ? at + span.size : span.lost_end;
    }
    return CPS_OK;
}

enum cps_status cps_segment_mend(cps_segment *segment, cps_segment *other, cps_scratch *scratch, int *error) {
    const cps_io *io = segment->io;
    uint64_t at = segment->base, end = other->end < segment->end ? other->end : segment->end;
    int handle = -1;
    enum cps_status status = CPS_OK;
    while (status == CPS_OK && at < end) {
        cps_span span;
        status = cps_segment_span(segment, at, end, READ_AHEAD_BYTES, scratch, &span, error);
        if (status != CPS_OK) break;
        uint64_t from = at > other->base ? at : other->base;
        at = span.size > 0 ? at + span.size : span.lost_end;
        if (span.size > 0 || from >= at) continue;
        if (handle < 0) status = io->open(io->context, segment->path, CPS_IO_READ_WRITE, &handle, error);
        if (status != CPS_OK) handle = -1;
        if (status == CPS_OK) status = mend_range(segment, other, from, at, handle, scratch, error);
    }
    if (handle >= 0) {
        int ignored; /* the other file goes now; a sync that fails leaves no more damage than there was */
        (void)!io->sync(io->context, handle, &ignored);
        io->close(io->context, handle);
        if (!segment->sealed) status = cps_segment_trim(segment, segment->end, scratch, error);
    }
    cps_segment_rest(segment);
    cps_segment_rest(other);
    return status;
}

bool cps_segment_identify(const cps_io *io, const char *directory, const char *name, uint8_t spool_id[16],
                          uint32_t *epoch) {
    cps_segment *segment;
    int ignored; /* a file that tells nothing is no help, whatever the reason */
    uint8_t header[CPS_SEGMENT_HEADER_BYTES];
    size_t got;
    if (cps_segment_new(io, directory, name, &segment) != CPS_OK) return false;
    bool known = parse_name(name, segment) && open_for_reading(segment, &ignored) == CPS_OK &&
                 io->read(io->context, segment->read_handle, header, sizeof header, 0, &got, &ignored) == CPS_OK &&
                 header_holds(header, got);
    if (known) {
        memcpy(spool_id, header + 16, 16);
        *epoch = segment->epoch;
    }
    cps_segment_close(segment);
    return known;
}
