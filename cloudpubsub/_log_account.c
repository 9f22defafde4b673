/* What a log finds at open, counted: what is pending in files and ring, what was lost, and what the counters say of it.
 *
 * Counters and ledger survive a kill beside the ring, and are a checkpoint where the ring is gone.  Files may have been
 * damaged, removed or put back meanwhile.  So three accounts are made to agree here: counters, ledger, and what is there. */
#include "_log_inside.h"

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t rest(uint64_t whole, uint64_t part) { return whole > part ? whole - part : 0; }

/* ---- what is there ---- */

/* Messages of the first segment that lie before `*to`, the head or the end of a range; when a record reaches over it, it cannot
 * be right and all of them are sent again.  Damage before it is left to count_damage. */
static CPS_MUST_CHECK enum cps_status count_before(cps_log *log, uint64_t *to, int *error) {
    cps_segment *segment = cps_store_find(&log->store, *to);
    if (segment == NULL || segment->base >= *to) return CPS_OK;
    uint64_t at = segment->base, messages = 0, bytes = 0;
    enum cps_status status = CPS_OK;
    bool in_record = false;
    while (status == CPS_OK && at < *to) {
        cps_span span;
        status = cps_segment_span(segment, at, segment->end, CPS_STAGING_BYTES, &log->scratch, &span, error);
        if (status != CPS_OK) break;
        in_record = span.size > 0;
        if (span.size == 0) {
            segment->patchy_before = true;
            at = span.lost_end;
        }
        for (size_t i = 0; i < span.size && at < *to;) {
            cps_record record;
            CPS_ASSERT(cps_record_load(span.bytes + i, span.size - i, at, &record) == CPS_OK); /* span verified it */
            uint64_t here = cps_record_span(record.length_bytes);
            messages += !record.is_pad;
            bytes += record.is_pad ? 0 : here;
            i += (size_t)here;
            at += here;
        }
    }
    cps_segment_rest(segment);
    if (status == CPS_OK && at != *to && in_record) {
        *to = segment->base;
        segment->patchy_before = false;
    } else if (status == CPS_OK) {
        segment->settled_messages = messages < segment->messages ? messages : segment->messages;
        segment->settled_bytes = bytes < segment->message_bytes ? bytes : segment->message_bytes;
    }
    return status == CPS_IO ? CPS_OK : status; /* an unreadable file is the reader's to report; nothing is lost here */
}

/* Ranges that no log of ours could have written: a file begins where a range does, or elsewhere than in it. */
static bool is_cut_by_range(const cps_log *log) {
    for (uint64_t i = 0; i < log->settled.ahead_count; i++) {
        const cps_ahead *one = &log->settled.ahead[i];
        const cps_segment *segment = cps_store_find(&log->store, one->first);
        if (segment != NULL && segment->base < one->first) return true;
    }
    return false;
}

static CPS_MUST_CHECK enum cps_status count_settled(cps_log *log, int *error) {
    cps_settled *s = &log->settled;
    enum cps_status status = count_before(log, &s->head, error);
    if (is_cut_by_range(log)) s->ahead_count = 0;
    for (uint64_t i = 0; status == CPS_OK && i < s->ahead_count; i++)
        status = count_before(log, &s->ahead[i].end, error);
    cps_log_tame_ahead(s, UINT64_MAX / CPS_RECORD_ALIGN * CPS_RECORD_ALIGN); /* one may have become empty */
    if (status != CPS_OK) return status;
    for (cps_segment *segment = log->store.first; segment != NULL && s->ahead_count > 0; segment = segment->next)
        if (cps_log_settled_in(log, segment) == segment->end) {
            segment->settled_messages = segment->messages;
            segment->settled_bytes = segment->message_bytes;
        }
    return CPS_OK;
}

/* What was read, found lost and counted before the last process ended must not be counted when it is read again.  The
 * reader goes in order, so all damage before the end of an entry was counted, however far it reaches by merging. */
static void recall_damage(cps_log *log) {
    for (unsigned i = 0; i < log->ledger.used; i++) {
        const cps_ledger_entry *entry = &log->ledger.entries[i];
        unsigned reason = cps_ledger_reason(entry);
        if (entry->first >= entry->end || (entry->first | entry->end) % CPS_RECORD_ALIGN != 0)
            continue; /* nobody knew where they were */
        cps_segment *segment = cps_store_find(&log->store, entry->first);
        if (reason == CPS_REASON_DAMAGED) {
            for (; segment != NULL && segment->base < entry->end; segment = segment->next) {
                uint64_t end = entry->end < segment->end ? entry->end : segment->end;
                if (end > segment->lost_below && end > log->settled.head) segment->lost_below = end;
            }
        } else if (reason == CPS_REASON_UNREADABLE && segment != NULL && entry->first >= segment->base &&
                   entry->end <= segment->end && entry->first >= cps_log_settled_in(log, segment)) {
            uint64_t left = segment->messages - segment->settled_messages;
            uint64_t left_bytes = segment->message_bytes - segment->settled_bytes;
            segment->settled_messages += entry->messages < left ? entry->messages : left;
            segment->settled_bytes += entry->bytes < left_bytes ? entry->bytes : left_bytes;
            if (entry->end > segment->lost_below) segment->lost_below = entry->end;
        }
    }
}

/* What is pending in segments with damage: all that is valid behind head, and what is lost there and not counted yet. */
static CPS_MUST_CHECK enum cps_status count_damage(cps_log *log, int *error) {
    recall_damage(log);
    for (cps_segment *s = log->store.first; s != NULL; s = s->next) {
        uint64_t from = cps_log_settled_in(log, s);
        bool is_patchy = s->patchy || s->lost_below > from || (s->base < from && s->patchy_before);
        if (s->end <= from || !is_patchy) continue;
        uint64_t before = s->messages;
        enum cps_status status =
            cps_segment_count_toll(s, from, s->lost_below > from ? s->lost_below : from, &log->scratch, error);
        cps_segment_rest(s);
        log->store.messages += s->messages - before; /* unsigned arithmetic wraps back when they are less */
        if (status == CPS_IO) continue; /* the reader will say so */
        if (status != CPS_OK) return status;
        s->settled_messages = s->messages - smaller(s->messages, s->toll.pending_messages);
        s->settled_bytes = s->message_bytes - smaller(s->message_bytes, s->toll.pending_bytes);
    }
    return CPS_OK;
}

static void pending_on_disk(const cps_log *log, uint64_t *messages, uint64_t *bytes) {
    *messages = *bytes = 0;
    for (const cps_segment *s = log->store.first; s != NULL; s = s->next) {
        if (s->end <= cps_log_settled_in(log, s)) continue;
        *messages += s->messages - s->settled_messages;
        *bytes += s->message_bytes - s->settled_bytes;
    }
}

enum cps_status cps_log_count(cps_log *log, int *error) {
    enum cps_status status = count_settled(log, error);
    return status == CPS_OK ? count_damage(log, error) : status;
}

uint64_t cps_log_count_ring(cps_log *log, uint64_t from, uint64_t *spans) {
    uint64_t at = from, messages = 0;
    const uint8_t *bytes;
    size_t size;
    *spans = 0;
    while (cps_ring_view(log->ring, at = cps_log_over_ahead(log, at), &bytes, &size) == CPS_OK) {
        cps_record record;
        CPS_ASSERT(cps_record_load(bytes, size, at, &record) == CPS_OK);
        messages += !record.is_pad;
        *spans += record.is_pad ? 0 : cps_record_span(record.length_bytes);
        at += cps_record_span(record.length_bytes);
    }
    return messages;
}

/* ---- the counters ---- */

void cps_log_start_counters(cps_log *log, bool adopted) {
    cps_produced produced;
    cps_shared_read_produced(log->home.shared, &produced);
    if (!adopted) {
        const cps_settled *s = &log->settled;
        uint64_t start = produced.published;
        produced = log->meta.produced;
        produced.published = start;
        uint64_t ended = s->acked_messages + s->dropped_messages + s->dead_messages + produced.refused;
        uint64_t ended_bytes = s->acked_bytes + s->dropped_bytes + s->dead_bytes + produced.refused_bytes;
        if (!log->meta.clean || ended > produced.messages || ended_bytes > produced.bytes) {
            uint64_t messages, bytes;
            pending_on_disk(log, &messages, &bytes);
            produced.messages = s->acked_messages + s->dropped_messages + s->dead_messages + produced.refused + messages;
            produced.bytes = s->acked_bytes + s->dropped_bytes + s->dead_bytes + produced.refused_bytes + bytes;
        }
        /* Before the home is announced: from then on the next open may believe it, and it must not say that all is settled. */
        cps_shared_commit_settled(log->home.shared, s);
        cps_shared_commit_ledger(log->home.shared, &log->ledger);
    }
    cps_shared_commit_produced(log->home.shared, &produced);
}

typedef struct hole { /* positions above head that no segment and no ring has, and that are not settled */
    uint64_t first, end;
} hole;

/* The next hole behind `from`, of those that are small or of those that are as wide as a reserved block, which positions
 * skip when nobody knows where they stood.  False: there is none. */
static bool next_hole(const cps_log *log, uint64_t from, bool wide, hole *out) {
    uint64_t low = cps_log_low(log), at = from;
    const cps_segment *s = log->store.first;
    while ((at = cps_log_over_ahead(log, at)) < low) {
        while (s != NULL && s->end <= at) s = s->next;
        uint64_t stored = s != NULL && s->base < low ? s->base : low;
        uint64_t end = smaller(stored, cps_log_next_ahead(log, at));
        if (end > at && (end - at >= CPS_POSITION_BLOCK / 2) == wide) {
            *out = (hole){at, end};
            return true;
        }
        at = end < stored || stored == low ? end : s->end;
    }
    return false;
}

/* Messages that were published and are nowhere: they stood where the holes are, and are reported there, each hole with its
 * share.  What no hole has room for was in a file that is there and claims less than it should. */
static void lose_holes(cps_log *log, uint64_t messages, uint64_t bytes) {
    const uint64_t least = CPS_RECORD_HEADER_BYTES + CPS_RECORD_ALIGN; /* a message has a topic */
    for (int wide = 0; wide < 2 && messages > 0; wide++) {
        uint64_t room = 0, at;
        hole one;
        for (at = log->settled.head; next_hole(log, at, wide != 0, &one); at = one.end) room += one.end - one.first;
        for (at = log->settled.head; messages > 0 && next_hole(log, at, wide != 0, &one); at = one.end) {
            uint64_t size = one.end - one.first;
            double part = (double)size / (double)room;
            uint64_t count = size == room ? messages : (uint64_t)((double)messages * part + 0.5);
            if (count == 0) count = 1;
            if (count > size / least) count = size / least;
            if (count > messages) count = messages;
            uint64_t taken = count == messages ? bytes : (uint64_t)((double)bytes * ((double)count / (double)messages));
            if (taken > bytes) taken = bytes; /* a double has 53 bits */
            room -= size;
            messages -= count;
            bytes -= taken;
            if (count > 0) cps_log_lose(log, one.first, one.end, count, taken, CPS_REASON_UNREADABLE);
        }
    }
    uint64_t head = log->settled.head;
    if (messages > 0) cps_log_lose(log, head, head, messages, bytes, CPS_REASON_UNREADABLE);
}

/* Under the lock, at open: counters and ledger must agree.  A kill may have come between the two. */
static void reconcile_ledger(cps_log *log, const cps_produced *produced) {
    cps_settled *s = &log->settled;
    cps_ledger *ledger = &log->ledger;
    uint64_t messages, bytes, now = log->io->wall_ms(log->io->context);
    cps_ledger_sum(ledger, CPS_REASON_REFUSED, &messages, &bytes);
    if (messages > s->dropped_messages) { /* damage is entered first, and known by that when it is read again */
        s->dropped_messages = messages;
        s->dropped_bytes = bytes;
    } else if (messages < s->dropped_messages) { /* all else is counted first */
        cps_ledger_add(ledger, 0, produced->published, s->dropped_messages - messages, rest(s->dropped_bytes, bytes),
                       CPS_REASON_QUOTA, now);
    }
    cps_ledger_sum(ledger, CPS_REASON_REFUSED, &messages, &bytes);
    cps_ledger_correct(ledger, CPS_REASON_DAMAGED, CPS_REASON_UNREADABLE, 0, s->dropped_bytes - bytes);
    messages = ledger->totals[CPS_REASON_REFUSED].messages;
    bytes = ledger->totals[CPS_REASON_REFUSED].bytes;
    if (produced->refused > messages)
        cps_ledger_add(ledger, CPS_REFUSED_POSITION + messages * CPS_RECORD_ALIGN,
                       CPS_REFUSED_POSITION + produced->refused * CPS_RECORD_ALIGN, produced->refused - messages,
                       rest(produced->refused_bytes, bytes), CPS_REASON_REFUSED, now);
    log->ledger_moved = true;
}

/* Counters and files say differently how much is pending: where there is damage, the counters know better. */
static void believe_counters(cps_log *log, uint64_t messages, uint64_t bytes, uint64_t *pending, uint64_t *pending_bytes) {
    const uint64_t least = CPS_RECORD_HEADER_BYTES + CPS_RECORD_ALIGN; /* a message has a topic */
    hole ignored;
    bool is_whole = !next_hole(log, log->settled.head, false, &ignored); /* else more may have been in other files */
    for (cps_segment *s = log->store.first; s != NULL; s = s->next) {
        uint64_t left, left_bytes, behind = s->toll.damaged_bytes - s->toll.passed_bytes;
        if (!s->toll.is_known || behind == 0) continue;
        cps_segment_toll_left(&s->toll, &left, &left_bytes);
        uint64_t others = *pending - left, others_bytes = *pending_bytes - left_bytes;
        uint64_t fits = rest(messages, others), fits_bytes = rest(bytes, others_bytes);
        uint64_t most = s->sealed ? s->toll.messages : is_whole ? behind / least : left;
        uint64_t most_bytes = s->sealed ? s->toll.message_bytes : is_whole ? behind : left_bytes;
        fits = smaller(fits, most);
        fits_bytes = smaller(fits_bytes, most_bytes);
        if (fits == left && fits_bytes == left_bytes) continue;
        cps_segment_set_toll_left(&s->toll, fits, fits_bytes);
        if (s->sealed) {
            s->settled_messages = s->settled_messages + left - fits;
            s->settled_bytes = s->settled_bytes + left_bytes - fits_bytes;
        } else {
            s->messages = s->messages - left + fits;
            s->message_bytes = s->message_bytes - left_bytes + fits_bytes;
            log->store.messages = log->store.messages - left + fits;
        }
        *pending = others + fits;
        *pending_bytes = others_bytes + fits_bytes;
    }
}

/* Whole files may be missing, or be back. */
void cps_log_reconcile(cps_log *log) {
    cps_produced produced;
    cps_settled *s = &log->settled;
    uint64_t messages, bytes, pending, pending_bytes, spans;
    cps_shared_read_produced(log->home.shared, &produced);
    reconcile_ledger(log, &produced);
    pending_on_disk(log, &pending, &pending_bytes);
    pending += cps_log_count_ring(log, cps_log_low(log), &spans);
    pending_bytes += spans;
    messages = rest(produced.messages, produced.refused + s->acked_messages + s->dropped_messages + s->dead_messages);
    bytes = rest(produced.bytes, produced.refused_bytes + s->acked_bytes + s->dropped_bytes + s->dead_bytes);
    believe_counters(log, messages, bytes, &pending, &pending_bytes);
    if (messages < pending || bytes < pending_bytes) { /* more than was known: files that were given up are back */
        cps_ring_correct(log->ring, messages < pending ? pending - messages : 0,
                         bytes < pending_bytes ? pending_bytes - bytes : 0);
    }
    if (messages > pending) {
        uint64_t lost_bytes = bytes > pending_bytes ? bytes - pending_bytes : 0;
        s->dropped_messages += messages - pending;
        s->dropped_bytes += lost_bytes;
        lose_holes(log, messages - pending, lost_bytes);
    }
}

const char *cps_reason_name(enum cps_reason reason) {
    switch (reason) {
    case CPS_REASON_QUOTA: return "spool limit reached, oldest dropped";
    case CPS_REASON_RING_FULL: return "memory full and no storage, oldest dropped";
    case CPS_REASON_REFUSED: return "full, newest dropped";
    case CPS_REASON_DAMAGED: return "damaged on disk";
    case CPS_REASON_UNREADABLE: return "unreadable on disk";
    case CPS_REASON_EXPIRED: return "expired";
    case CPS_REASON_DEAD: return "moved to the dead letters";
    case CPS_REASONS: break;
    }
    return "unknown";
}
