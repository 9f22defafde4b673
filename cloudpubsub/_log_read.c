/* The log's reader: batches of records from the disk first, then from the ring, and single records on request. */
#include <errno.h>

#include "_log_inside.h"

/* The reader leaves the segment that it holds.  With the lock held, but for the closing. */
void cps_log_leave_segment(cps_log *log) {
    cps_segment *segment = log->reading;
    if (segment == NULL) return;
    log->reading = NULL;
    (void)pthread_mutex_unlock(&log->lock);
    cps_segment_rest(segment); /* only the reader touches that handle */
    (void)pthread_mutex_lock(&log->lock);
    segment->users--;
    if (segment->retired) (void)pthread_cond_signal(&log->work);
}

/* Hold the segment that `position`, or what comes next behind it, stands in, and leave any other; NULL: that is in the
 * ring, for which a `live` reader leaves none: the next turn may be the backlog's.  With the lock held, which is let go to
 * leave a segment; so everything is looked at again until nothing moved. */
static cps_segment *hold(cps_log *log, uint64_t *position, bool live) {
    for (;;) {
        *position = cps_log_next(log, *position);
        cps_segment *segment = NULL;
        if (*position < log->settled.spilled) segment = cps_store_find(&log->store, *position);
        if (segment == log->reading || (segment == NULL && live)) return segment;
        if (segment != NULL) segment->users++; /* before the lock is let go */
        cps_log_leave_segment(log);
        log->reading = segment;
    }
}

/* Under the lock, which is let go to keep the bytes aside: [position, end) of the disk is lost; the reader passes over it. */
static void lose_range(cps_log *log, cps_segment *segment, uint64_t position, uint64_t end, uint64_t messages,
                       enum cps_reason reason) {
    uint64_t bytes = end - position;
    bool is_exact = reason == CPS_REASON_DAMAGED && segment->toll.is_known;
    if (is_exact) cps_segment_take_toll(segment, position, end, &messages, &bytes);
    if (position < segment->lost_below) return; /* read again after a lost connection: it was counted */
    segment->lost_below = end;
    uint64_t left = segment->messages - segment->settled_messages;
    uint64_t left_bytes = segment->message_bytes - segment->settled_bytes;
    log->damaged_ranges++;
    log->damaged_bytes += end - position;
    if (messages > left) messages = left;
    if (bytes > left_bytes) bytes = left_bytes;
    if (messages == 0) bytes = 0; /* it was a pad alone */
    segment->settled_messages += messages;
    segment->settled_bytes += bytes;
    log->settled.dropped_messages += messages;
    log->settled.dropped_bytes += bytes;
    log->estimated_messages += is_exact ? 0 : messages;
    log->estimated_bytes += is_exact ? 0 : bytes;
    if (messages > 0) {
        cps_log_lose(log, position, end, messages, bytes, reason);
        /* Before the counters: after a kill in between, what the ledger has is not counted when it is read again. */
        cps_shared_commit_ledger(log->home.shared, &log->ledger);
    }
    cps_log_commit(log);
    if (reason == CPS_REASON_UNREADABLE) {
        segment->kept_aside = true; /* when it goes */
        segment->given_up_from = position;
    }
    if (reason != CPS_REASON_DAMAGED || segment->read_handle < 0) return;
    (void)pthread_mutex_unlock(&log->lock); /* only the reader closes its handle */
    cps_quarantine_copy(&log->quarantine, segment->read_handle,
                        CPS_SEGMENT_HEADER_BYTES + position - segment->base, position, end);
    (void)pthread_mutex_lock(&log->lock);
}

/* Under the lock: reading failed.  True: so often, and for a reason that will not pass, that the file counts as lost. */
static bool is_given_up(cps_log *log, int error) {
    uint64_t now = log->io->monotonic_ms(log->io->context);
    log->storage_error = error;
    if (error == EMFILE || error == ENFILE || error == ENOMEM || error == EINTR || error == EAGAIN) return false;
    if (log->read_failures > 0 && now < log->read_failed_ms + CPS_RETRY_MIN_MS) return false;
    log->read_failed_ms = now;
    if (++log->read_failures < CPS_READ_TRIES) return false;
    log->read_failures = 0;
    return true;
}

/* Under the lock: what was to be read up to `end` was taken back, and cut off, while we looked; it is in the ring again. */
static bool was_taken_back(const cps_segment *segment, uint64_t end, enum cps_status status, const cps_span *span) {
    return segment->end < end && (status != CPS_OK || span->size == 0);
}

/* CPS_BUSY: look again where it is now. */
static CPS_MUST_CHECK enum cps_status read_disk(cps_log *log, cps_segment *segment, uint64_t position,
                                                size_t max_bytes, cps_batch *batch) {
    CPS_ASSERT(segment->base <= position && position < segment->end);
    bool live = log->reading_live;
    uint64_t end = segment->end;
    if (end > log->settled.spilled) end = log->settled.spilled;
    if (end > cps_log_next_ahead(log, position)) end = cps_log_next_ahead(log, position);
    *cps_log_cursor(log, live) = end; /* nothing of it may be dropped while we look */
    bool sealed = segment->sealed;
    (void)pthread_mutex_unlock(&log->lock);
    cps_span span;
    int error = 0, ignored;
    enum cps_status status = cps_segment_span(segment, position, end, max_bytes, &log->scratch, &span, &error);
    if (status == CPS_OK && span.size == 0 && sealed && !segment->toll.is_known) /* failing that, the estimate will do */
        (void)!cps_segment_count_toll(segment, position, position, &log->scratch, &ignored);
    (void)pthread_mutex_lock(&log->lock);
    if (was_taken_back(segment, end, status, &span)) {
        *cps_log_cursor(log, live) = position;
        return CPS_BUSY;
    }
    if (status == CPS_OK) {
        log->read_failures = 0;
        if (span.size > 0 && position >= segment->given_up_from && position < segment->lost_below)
            segment->kept_aside = false; /* back, after a rewind */
        if (span.size == 0)
            lose_range(log, segment, position, span.lost_end, span.lost_messages, CPS_REASON_DAMAGED);
    } else if (status == CPS_IO) {
        if (!is_given_up(log, error)) {
            *cps_log_cursor(log, live) = position;
            return CPS_IO;
        }
        span.size = 0;
        span.lost_end = end;
        lose_range(log, segment, position, end, segment->messages - segment->settled_messages, CPS_REASON_UNREADABLE);
    } else {
        *cps_log_cursor(log, live) = position;
        return status;
    }
    batch->bytes = span.size > 0 ? span.bytes : NULL;
    batch->size = span.size;
    batch->lost_end = span.size > 0 ? 0 : span.lost_end;
    batch->earlier_boot = segment->earlier_boot;
    unsigned stream = live && log->is_split;
    log->pads[stream].from = span.size > 0 ? position + span.messages_size : 0;
    log->pads[stream].end = span.size > 0 ? position + span.size : 0;
    return CPS_OK;
}

/* With the lock held: see cps_batch. */
static uint64_t dup_below(const cps_log *log, uint64_t position) {
    uint64_t below = log->dup_below;
    for (uint64_t i = 0; i < log->settled.ahead_count && log->settled.ahead[i].first <= position; i++)
        if (log->ahead_dup_below[i] > below) below = log->ahead_dup_below[i];
    return below;
}

static CPS_MUST_CHECK enum cps_status read_stream(cps_log *log, bool live, size_t max_bytes, cps_batch *batch) {
    enum cps_status status;
    (void)pthread_mutex_lock(&log->lock);
    CPS_ASSERT(!log->reading_ring);
    uint64_t position;
    cps_segment *segment;
    log->reading_live = live;
    do {
        do { /* `sent` may move over a dropped range while the lock is let go */
            position = *cps_log_cursor(log, live);
            segment = hold(log, &position, live && log->is_split);
        } while (position != cps_log_next(log, *cps_log_cursor(log, live)));
        batch->position = log->read_from = position;
        batch->dup_below = dup_below(log, position);
        if (CPS_UNLIKELY(!live && position >= cps_log_live_first(log))) { /* the rest is the live stream's */
            cps_log_join(log);
            cps_log_commit(log);
            status = CPS_EMPTY;
            break;
        }
        status = segment != NULL ? read_disk(log, segment, position, max_bytes, batch) : CPS_OK;
    } while (status == CPS_BUSY);
    if (segment == NULL && status == CPS_OK) {
        status = cps_ring_view(log->ring, position, &batch->bytes, &batch->size);
        if (status == CPS_OK) {
            uint64_t limit = cps_log_next_ahead(log, position);
            if (batch->size > limit - position) batch->size = (size_t)(limit - position);
            cps_ring_pin(log->ring, CPS_PIN_READER, position);
            log->reading_ring = true;
            *cps_log_cursor(log, live) = position + batch->size;
            batch->lost_end = 0;
            batch->earlier_boot = false;
        }
    }
    (void)pthread_mutex_unlock(&log->lock);
    return status;
}

enum cps_status cps_log_read(cps_log *log, size_t max_bytes, cps_batch *batch) {
    return read_stream(log, false, max_bytes, batch);
}

enum cps_status cps_log_read_live(cps_log *log, size_t max_bytes, cps_batch *batch) {
    return read_stream(log, true, max_bytes, batch);
}

/* With the lock held: up to where the live stream was read. */
static void live_read_done(cps_log *log, uint64_t read_to) {
    cps_ahead *range = cps_log_live_range(log);
    CPS_ASSERT(read_to <= log->live);
    log->live = read_to > range->end ? read_to : range->end;
    bool is_moved = log->live > range->sent;
    if (is_moved) range->sent = log->live;
    uint64_t end = range->end < log->live ? cps_log_over_pads(log, true, range->end) : range->end;
    if (end != range->end && end == log->live) {
        range->end = end;
        cps_log_normalise(log);
        cps_log_commit(log);
    } else if (is_moved) {
        cps_shared_commit_settled(log->home.shared, &log->settled);
    }
}

void cps_log_read_done(cps_log *log, uint64_t consumed_bytes) {
    (void)pthread_mutex_lock(&log->lock);
    if (log->reading_ring) {
        cps_ring_unpin(log->ring, CPS_PIN_READER);
        log->reading_ring = false;
        if (log->producers_waiting > 0) (void)pthread_cond_broadcast(&log->room);
    }
    if (CPS_UNLIKELY(log->reading_live && log->is_split)) {
        live_read_done(log, log->read_from + consumed_bytes);
        (void)pthread_mutex_unlock(&log->lock);
        return;
    }
    CPS_ASSERT(log->read_from + consumed_bytes <= log->sent);
    log->sent = log->read_from + consumed_bytes;
    if (log->sent < log->settled.head) log->sent = log->settled.head;
    if (log->sent > log->settled.sent_max) {
        log->settled.sent_max = log->sent;
        cps_shared_commit_settled(log->home.shared, &log->settled);
        CPS_CRASH_POINT("read-noted");
    }
    if (log->settled.head < log->sent && cps_log_over_pads(log, false, log->settled.head) == log->sent) {
        log->settled.head = log->sent;
        cps_log_normalise(log);
        cps_log_join(log);
        cps_log_commit(log);
    }
    (void)pthread_mutex_unlock(&log->lock);
}

bool cps_log_arm(cps_log *log) {
    (void)pthread_mutex_lock(&log->lock);
    uint64_t next = cps_log_next(log, log->sent);
    bool empty = next >= log->settled.spilled && cps_ring_arm(log->ring, CPS_WAKE_READER, next);
    (void)pthread_mutex_unlock(&log->lock);
    return empty;
}

bool cps_log_arm_live(cps_log *log, bool also_backlog) {
    (void)pthread_mutex_lock(&log->lock);
    uint64_t next = cps_log_next(log, *cps_log_cursor(log, true));
    bool empty = !(also_backlog && log->is_split) || cps_log_next(log, log->sent) >= cps_log_live_first(log);
    empty = empty && next >= log->settled.spilled && cps_ring_arm(log->ring, CPS_WAKE_READER, next);
    (void)pthread_mutex_unlock(&log->lock);
    return empty;
}

void cps_log_rewind(cps_log *log) {
    (void)pthread_mutex_lock(&log->lock);
    cps_log_leave_segment(log); /* without a link nobody reads for long; a dropped file must not wait for that */
    log->sent = log->settled.head;
    if (log->is_split) log->live = cps_log_live_range(log)->end;
    if (log->settled.sent_max > log->dup_below) log->dup_below = log->settled.sent_max;
    for (uint64_t i = 0; i < log->settled.ahead_count; i++) log->ahead_dup_below[i] = log->settled.ahead[i].sent;
    if (log->storage == CPS_STORAGE_FULL) { /* what was in flight may be dropped now, where that is the policy */
        log->retry_at_ms = 0;
        (void)pthread_cond_signal(&log->work);
    }
    cps_log_normalise(log);
    cps_log_join(log);
    cps_log_commit(log);
    (void)pthread_mutex_unlock(&log->lock);
}

/* `view`, but for CPS_BUSY: again. */
static CPS_MUST_CHECK enum cps_status look_once(cps_log *log, uint64_t *position, size_t max_bytes, cps_span *span) {
    cps_segment *segment = hold(log, position, false);
    uint64_t limit = cps_log_next_ahead(log, *position);
    span->position = *position;
    span->lost_end = 0;
    span->size = 0;
    if (segment == NULL) {
        enum cps_status found = cps_ring_view(log->ring, *position, &span->bytes, &span->size);
        if (found == CPS_OK && span->size > limit - *position) span->size = (size_t)(limit - *position);
        return found;
    }
    uint64_t end = segment->end < limit ? segment->end : limit;
    int error = 0;
    if (segment->kept_aside && *position >= segment->given_up_from && *position < segment->lost_below) {
        span->size = 0; /* counted as lost and never read, though it could be by now */
        span->lost_end = segment->lost_below;
        return CPS_OK;
    }
    (void)pthread_mutex_unlock(&log->lock);
    enum cps_status status = cps_segment_span(segment, *position, end, max_bytes, &log->scratch, span, &error);
    (void)pthread_mutex_lock(&log->lock);
    if (was_taken_back(segment, end, status, span)) return CPS_BUSY;
    if (status == CPS_IO && *position < segment->lost_below) { /* given up and counted by cps_log_read */
        span->size = 0;
        span->lost_end = segment->lost_below;
        status = CPS_OK;
    }
    return status;
}

/* Verified bytes at `position` or the next behind it, which `*position` becomes; in flight, so nobody drops them.  The
 * bytes are valid while the lock is held, and those of a segment until the reader moves on.  span->size is 0 for damage.
 * With the lock held, which is let go to read a file.  CPS_OK; CPS_EMPTY; CPS_IO; CPS_NO_MEMORY. */
static CPS_MUST_CHECK enum cps_status view(cps_log *log, uint64_t *position, size_t max_bytes, cps_span *span) {
    enum cps_status status;
    do status = look_once(log, position, max_bytes, span);
    while (status == CPS_BUSY);
    return status;
}

/* The message at `position`, which is in flight, as a run that starts with it.  With the lock held.  CPS_OK;
 * CPS_UNKNOWN; CPS_IO; CPS_NO_MEMORY. */
static CPS_MUST_CHECK enum cps_status find(cps_log *log, uint64_t position, cps_record *record, cps_span *span) {
    uint64_t there = position;
    uint64_t read_to = position >= cps_log_live_first(log) ? log->live : log->sent;
    if (position < log->settled.head || position >= read_to || position % CPS_RECORD_ALIGN != 0) return CPS_UNKNOWN;
    if (cps_log_next(log, position) != position) return CPS_UNKNOWN;
    enum cps_status status = view(log, &there, CPS_RECORD_HEADER_BYTES, span);
    if (status == CPS_EMPTY) return CPS_UNKNOWN;
    if (status != CPS_OK) return status;
    if (there != position || cps_record_load(span->bytes, span->size, position, record) != CPS_OK) return CPS_UNKNOWN;
    return record->is_pad ? CPS_UNKNOWN : CPS_OK;
}

enum cps_status cps_log_look(cps_log *log, uint64_t position, cps_record *record, const uint8_t **at) {
    cps_span span;
    (void)pthread_mutex_lock(&log->lock);
    enum cps_status status = find(log, position, record, &span);
    if (status == CPS_OK && log->reading == NULL) {
        /* From the ring, where the flusher may free its place at any moment: a copy. */
        size_t whole = (size_t)cps_record_span(record->length_bytes);
        status = cps_scratch_grow(&log->scratch, whole);
        if (status == CPS_OK) span.bytes = memcpy(log->scratch.bytes, span.bytes, whole);
    }
    *at = span.bytes;
    (void)pthread_mutex_unlock(&log->lock);
    return status;
}

/* Count a verified run from `*here` up to and including the message at `position`.  CPS_OK: it is in there, and `*here` is its
 * end; CPS_EMPTY: the run ends before it; CPS_UNKNOWN: no message starts there. */
static CPS_MUST_CHECK enum cps_status count_run(const cps_span *span, uint64_t position, uint64_t *here,
                                                uint64_t *messages, uint64_t *bytes) {
    for (size_t i = 0; i < span->size;) {
        cps_record record;
        CPS_ASSERT(cps_record_load(span->bytes + i, span->size - i, *here, &record) == CPS_OK); /* it was verified */
        uint64_t whole = cps_record_span(record.length_bytes);
        if (*here > position || (*here == position && record.is_pad)) return CPS_UNKNOWN;
        bool found = *here == position;
        *messages += !record.is_pad;
        *bytes += record.is_pad ? 0 : whole;
        i += (size_t)whole;
        *here += whole;
        if (found) return CPS_OK;
    }
    return CPS_EMPTY;
}

enum cps_status cps_log_settle_through(cps_log *log, uint64_t position) {
    uint64_t messages = 0, bytes = 0;
    (void)pthread_mutex_lock(&log->lock);
    uint64_t here = log->settled.head;
    enum cps_status status = CPS_EMPTY;
    if (position < here || position >= log->sent || position % CPS_RECORD_ALIGN != 0) status = CPS_UNKNOWN;
    while (status == CPS_EMPTY) {
        cps_span span;
        status = view(log, &here, CPS_STAGING_BYTES, &span);
        if (status == CPS_EMPTY || (status == CPS_OK && here > position)) status = CPS_UNKNOWN;
        if (status != CPS_OK) break;
        if (span.size > 0) {
            status = count_run(&span, position, &here, &messages, &bytes);
            continue;
        }
        /* Damage.  What was passed over when it was read is counted already; what has been damaged since was read. */
        if (log->reading == NULL || here >= log->reading->lost_below) {
            messages += span.lost_messages;
            bytes += span.lost_end - here;
        }
        here = span.lost_end;
        status = here > position ? CPS_OK : CPS_EMPTY;
    }
    if (status == CPS_OK && here > log->sent) here = log->sent;
    (void)pthread_mutex_unlock(&log->lock);
    if (status == CPS_OK) cps_log_settle(log, here, messages, bytes, NULL, 0);
    return status;
}
