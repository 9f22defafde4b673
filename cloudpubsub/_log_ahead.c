/* What is settled ahead of the head: a few ranges of positions, and the live stream that makes the last of them grow.
 *
 * A split gives the reader two streams.  The backlog's goes from the head on and passes over the ranges; the live one began
 * where the log ended at the split, and the range that begins there grows with what of it is settled.  When the head comes to
 * that range they are one stream again.  A later split, behind another outage, begins another range.
 *
 * No segment reaches from before a range into it: one that is being written ends where a range begins.  So what is settled
 * of a segment is always its beginning.  Where there is no range nothing of this is ever looked at. */
#include "_log_inside.h"

void cps_log_tame_ahead(cps_settled *settled, uint64_t limit) {
    uint64_t at = settled->head;
    uint64_t count = settled->ahead_count <= CPS_AHEAD_MAX ? settled->ahead_count : 0;
    uint64_t kept = 0;
    for (uint64_t i = 0; i < count; i++) {
        cps_ahead one = settled->ahead[i];
        bool is_possible = one.first >= at && one.end >= one.first && one.end <= limit && one.sent >= one.end &&
                           one.sent <= limit && (one.first | one.end | one.sent) % CPS_RECORD_ALIGN == 0;
        if (!is_possible) {
            settled->ahead_count = 0; /* whoever wrote that wrote the others too */
            return;
        }
        at = one.end;
        if (one.end > one.first) settled->ahead[kept++] = one;
    }
    settled->ahead_count = kept;
}

uint64_t cps_log_over_ahead(const cps_log *log, uint64_t position) {
    for (uint64_t i = 0; i < log->settled.ahead_count; i++) {
        const cps_ahead *one = &log->settled.ahead[i];
        if (position >= one->first && position < one->end) position = one->end; /* the next one may begin there */
    }
    return position;
}

uint64_t cps_log_next_ahead(const cps_log *log, uint64_t position) {
    for (uint64_t i = 0; i < log->settled.ahead_count; i++)
        if (log->settled.ahead[i].first > position) return log->settled.ahead[i].first;
    return UINT64_MAX;
}

uint64_t cps_log_settled_in(const cps_log *log, const cps_segment *segment) {
    uint64_t to = segment->base > log->settled.head ? segment->base : log->settled.head;
    if (log->settled.ahead_count > 0) to = cps_log_over_ahead(log, to);
    return to < segment->end ? to : segment->end;
}

/* The first range goes: the head is behind it, or at it. */
static void take_first(cps_log *log) {
    cps_settled *s = &log->settled;
    const cps_ahead gone = s->ahead[0];
    if (gone.end > s->head) s->head = gone.end;
    if (log->sent < s->head) log->sent = s->head;
    if (gone.sent > s->sent_max) s->sent_max = gone.sent;
    if (log->ahead_dup_below[0] > log->dup_below) log->dup_below = log->ahead_dup_below[0];
    s->ahead_count--;
    const size_t left = (size_t)s->ahead_count;
    memmove(&s->ahead[0], &s->ahead[1], left * sizeof s->ahead[0]);
    memmove(&log->ahead_dup_below[0], &log->ahead_dup_below[1], left * sizeof log->ahead_dup_below[0]);
}

/* Segments that lie in a range go before their turn. */
static void retire_settled(cps_log *log) {
    log->ahead_moved = false;
    if (log->store.last == NULL) return;
    for (uint64_t i = 0; i < log->settled.ahead_count; i++) {
        const cps_ahead range = log->settled.ahead[i];
        if (log->store.last == NULL || log->store.last->end <= range.first) return;
        cps_segment *segment = cps_store_find(&log->store, range.first);
        while (segment != NULL && segment->end <= range.end) {
            cps_segment *next = segment->next;
            bool is_busy = segment == log->active && log->spilling; /* its next records are on their way */
            if (segment->base >= range.first && !is_busy) cps_log_retire(log, segment);
            if (is_busy) log->ahead_moved = true;
            segment = next;
        }
    }
}

void cps_log_pass_ahead(cps_log *log) {
    cps_settled *s = &log->settled;
    /* The live stream's range stays until its reader joins the streams, who knows what of it is in flight. */
    while (s->ahead_count > (log->is_split ? 1u : 0u) && s->ahead[0].first <= s->head) take_first(log);
    uint64_t low = cps_log_low(log), over = cps_log_over_ahead(log, low);
    if (over != low) s->spilled = over; /* settled before it was written: it need not be */
    if (log->ahead_moved) retire_settled(log);
}

void cps_log_join(cps_log *log) {
    if (!log->is_split || log->settled.head < cps_log_live_first(log)) return;
    CPS_ASSERT(log->settled.ahead_count == 1 && log->settled.head == cps_log_live_first(log));
    log->is_split = false;
    take_first(log);
    if (log->sent < log->live) log->sent = log->live;
    log->pads[0] = log->pads[1];
    cps_log_normalise(log);
}

enum cps_split cps_log_split(cps_log *log, uint64_t age_ms, uint64_t bytes, bool may_begin) {
    cps_settled *s = &log->settled;
    (void)pthread_mutex_lock(&log->lock);
    CPS_ASSERT(log->sent == s->head && (!log->is_split || log->live == cps_log_live_range(log)->end));
    uint64_t published = cps_ring_published(log->ring);
    if (may_begin && log->is_split && cps_log_live_range(log)->first == cps_log_live_range(log)->end) {
        s->ahead_count--; /* nothing came of it */
        log->is_split = false;
    }
    cps_log_normalise(log);
    /* What stands behind all that was settled ahead is the live stream's own, unless that is a backlog too. */
    uint64_t from = cps_log_next(log, s->ahead_count > 0 ? s->ahead[s->ahead_count - 1].end : s->head);
    bool is_backlog = from < published && (published - from > bytes || cps_log_age_ms(log, from) >= age_ms);
    enum cps_split split = s->ahead_count > 0 ? CPS_SPLIT_GOES_ON : CPS_SPLIT_NONE;
    if (is_backlog && may_begin && s->ahead_count == CPS_AHEAD_MAX) split = CPS_SPLIT_FULL;
    if (is_backlog && may_begin && s->ahead_count < CPS_AHEAD_MAX) {
        split = CPS_SPLIT_BEGUN;
        log->ahead_dup_below[s->ahead_count] = 0;
        s->ahead[s->ahead_count++] = (cps_ahead){.first = published, .end = published, .sent = published};
    }
    log->is_split = s->ahead_count > 0;
    if (log->is_split) {
        log->live = cps_log_live_range(log)->end;
        log->pads[1].from = log->pads[1].end = 0;
    }
    cps_log_commit(log);
    (void)pthread_mutex_unlock(&log->lock);
    return split;
}

bool cps_log_is_split(const cps_log *log) { return log->is_split; }

void cps_log_fronts(cps_log *log, cps_fronts *out) {
    (void)pthread_mutex_lock(&log->lock);
    memset(out, 0, sizeof *out);
    out->head = log->settled.head;
    out->sent = log->sent;
    out->live_first = cps_log_live_first(log);
    out->live_end = log->is_split ? cps_log_live_range(log)->end : UINT64_MAX;
    out->live_sent = log->is_split ? log->live : UINT64_MAX;
    (void)pthread_mutex_unlock(&log->lock);
}
