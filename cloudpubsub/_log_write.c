/* The log's producers, its policies when there is no room, waiters, and statistics. */
#include <errno.h>

#include "_log_inside.h"

bool cps_log_timed_wait(cps_log *log, pthread_cond_t *condition, uint64_t deadline_ms) {
    if (deadline_ms == CPS_NO_LIMIT_MS) {
        (void)pthread_cond_wait(condition, &log->lock);
        return true;
    }
    return log->io->wait_until(log->io->context, condition, &log->lock, deadline_ms);
}

uint64_t cps_log_after(const cps_log *log, uint64_t timeout_ms) {
    uint64_t now = log->io->monotonic_ms(log->io->context);
    return timeout_ms >= CPS_NO_LIMIT_MS - now ? CPS_NO_LIMIT_MS : now + timeout_ms;
}

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Messages that stand before `to` in a segment count as settled there, so that the rest is what is pending. */
static void settle_in_segments(cps_log *log, uint64_t from, uint64_t to, uint64_t messages, uint64_t bytes) {
    for (cps_segment *s = cps_store_find(&log->store, from); s != NULL && s->base < to; s = s->next) {
        uint64_t left = s->messages - s->settled_messages, left_bytes = s->message_bytes - s->settled_bytes;
        if (s->end > to) {
            left = smaller(left, messages);
            left_bytes = smaller(left_bytes, bytes);
        }
        s->settled_messages += left;
        s->settled_bytes += left_bytes;
        messages -= smaller(messages, left);
        bytes -= smaller(bytes, left_bytes);
    }
}

/* No more can have ended than was published, and where nothing is pending, no less.  It is so, but where damage hid how
 * much a file held and an estimate was counted, or a footer said too little; now it shows.  What is still open at the end
 * was lost too and is reported. */
static void balance(cps_log *log, const cps_produced *produced) {
    cps_settled *s = &log->settled;
    uint64_t ended = s->acked_messages + s->dropped_messages + s->dead_messages + produced->refused;
    uint64_t ended_bytes = s->acked_bytes + s->dropped_bytes + s->dead_bytes + produced->refused_bytes;
    bool drained = s->head == produced->published;
    if (!drained && ended <= produced->messages && ended_bytes <= produced->bytes) return;
    if (ended == produced->messages && ended_bytes == produced->bytes) return;
    uint64_t lost = drained && produced->messages > ended ? produced->messages - ended : 0;
    uint64_t lost_bytes = drained && produced->bytes > ended_bytes ? produced->bytes - ended_bytes : 0;
    uint64_t over = ended > produced->messages ? ended - produced->messages : 0;
    uint64_t over_bytes = ended_bytes > produced->bytes ? ended_bytes - produced->bytes : 0;
    uint64_t back = smaller(over, log->estimated_messages), back_bytes = smaller(over_bytes, log->estimated_bytes);
    s->dropped_messages += lost - back;
    s->dropped_bytes += lost_bytes - back_bytes;
    log->estimated_messages = drained ? 0 : log->estimated_messages - back;
    log->estimated_bytes = drained ? 0 : log->estimated_bytes - back_bytes;
    cps_ring_correct(log->ring, over - back, over_bytes - back_bytes);
    if (lost > 0) cps_log_lose(log, s->head, s->head, lost, lost_bytes, CPS_REASON_DAMAGED);
    cps_ledger_correct(&log->ledger, CPS_REASON_DAMAGED, CPS_REASON_UNREADABLE, 0 - back,
                       (lost > 0 ? 0 : lost_bytes) - back_bytes);
    log->ledger_moved = log->ledger_unsaved = true;
}

/* The first position at or above `from` that is on the disk and may not survive a power cut; where the ring begins, if
 * there is none. */
static uint64_t first_unsynced(const cps_log *log, uint64_t from) {
    for (const cps_segment *s = log->store.first; s != NULL; s = s->next)
        if (s->synced_end < s->end && s->end > from) return s->synced_end > from ? s->synced_end : from;
    return cps_log_low(log);
}

uint64_t cps_log_synced(const cps_log *log) { return first_unsynced(log, log->settled.head); }

void cps_log_commit(cps_log *log) {
    cps_produced produced;
    cps_settled *s = &log->settled;
    cps_shared_read_produced(log->home.shared, &produced);
    balance(log, &produced);
    CPS_CRASH_POINT("commit-begin");
    cps_shared_commit_settled(log->home.shared, s);
    CPS_CRASH_POINT("commit-settled");
    if (log->ledger_moved) cps_shared_commit_ledger(log->home.shared, &log->ledger);
    log->ledger_moved = false;
    CPS_CRASH_POINT("commit-ledger");
    uint64_t keep = cps_log_low(log);
    if (log->config.durability == CPS_DURABILITY_POWER && log->has_store) {
        /* What an earlier process wrote, or a failed file holds, is not in the ring and needs no place there. */
        uint64_t held = cps_ring_low(log->ring) > s->head ? cps_ring_low(log->ring) : s->head;
        keep = first_unsynced(log, held);
    }
    cps_ring_release(log->ring, keep);
    CPS_CRASH_POINT("commit-released");
    if (log->producers_waiting > 0) (void)pthread_cond_broadcast(&log->room);
    (void)pthread_cond_broadcast(&log->settled_moved);
}

static inline uint64_t next_stored(const cps_log *log, uint64_t position) {
    if (position < log->settled.spilled) {
        const cps_segment *segment = cps_store_find(&log->store, position);
        if (segment != NULL && segment->base < log->settled.spilled)
            return segment->base > position ? segment->base : position;
    }
    uint64_t low = cps_log_low(log);
    return position > low ? position : low;
}

static uint64_t next_pending(const cps_log *log, uint64_t position) {
    uint64_t there = next_stored(log, position);
    while ((position = cps_log_over_ahead(log, there)) != there) there = next_stored(log, position);
    return there;
}

uint64_t cps_log_next(const cps_log *log, uint64_t position) {
    if (CPS_UNLIKELY(log->settled.ahead_count > 0)) return next_pending(log, position);
    return next_stored(log, position);
}

void cps_log_normalise(cps_log *log) {
    if (log->sent == log->settled.head) {
        /* Nothing is in flight, so what comes next is the oldest. */
        uint64_t next = log->settled.spilled > log->settled.head ? cps_log_next(log, log->settled.head) : log->settled.head;
        if (log->is_split) next = smaller(next, cps_log_live_first(log)); /* see cps_log_join */
        log->settled.head = log->sent = next;
    }
    if (log->settled.ahead_count > 0) cps_log_pass_ahead(log);
    while (log->store.first != NULL && log->store.first->end <= log->settled.head) {
        cps_segment *segment = log->store.first;
        if (segment == log->active && log->spilling) break; /* its next records are on their way */
        cps_log_retire(log, segment);
    }
}

void cps_log_retire(cps_log *log, cps_segment *segment) {
    cps_store_take(&log->store, segment);
    if (log->active == segment) log->active = NULL;
    cps_log_discard(log, segment);
}

void cps_log_discard(cps_log *log, cps_segment *segment) {
    CPS_CRASH_POINT("retire");
    segment->retired = true;
    segment->next = log->retired;
    log->retired = segment;
    log->retired_bytes += segment->file_bytes;
    (void)pthread_cond_signal(&log->work);
}

static void merge(cps_loss *into, const cps_loss *loss) {
    if (loss->first < into->first) into->first = loss->first;
    if (loss->end > into->end) into->end = loss->end;
    into->messages += loss->messages;
    into->bytes += loss->bytes;
}

/* What `wait` wants to know of a position. */
static void remember(cps_log *log, const cps_loss *loss) {
    cps_loss *known = &log->known[(log->known_next + CPS_LOSSES_KNOWN - 1) % CPS_LOSSES_KNOWN];
    if (known->messages > 0 && known->reason == loss->reason && known->end == loss->first) merge(known, loss);
    else log->known[log->known_next++ % CPS_LOSSES_KNOWN] = *loss;
}

void cps_log_lose(cps_log *log, uint64_t first, uint64_t end, uint64_t messages, uint64_t bytes,
                  enum cps_reason reason) {
    cps_loss loss = {.first = first, .end = end, .messages = messages, .bytes = bytes, .reason = reason};
    cps_loss *last = log->losses_used > 0 ? &log->losses[log->losses_used - 1] : NULL;
    if (last != NULL && last->reason == reason && last->end == first) {
        merge(last, &loss);
    } else if (log->losses_used < CPS_LOSSES_MAX - CPS_REASONS) {
        log->losses[log->losses_used++] = loss;
    } else { /* nobody takes them: one entry a reason from here on, for which places are kept */
        size_t i = log->losses_used;
        while (i > 0 && log->losses[i - 1].reason != reason) i--;
        if (i > 0) merge(&log->losses[i - 1], &loss);
        else log->losses[log->losses_used++] = loss;
    }
    remember(log, &loss);
    cps_ledger_add(&log->ledger, first, end, messages, bytes, reason, log->io->wall_ms(log->io->context));
    log->ledger_moved = log->ledger_unsaved = true;
    if (!log->checkpoint_timed) (void)pthread_cond_signal(&log->work); /* to have it saved soon */
    log->checkpoint_timed = true;
    if (log->config.notify != NULL) log->config.notify(log->config.notify_user, false);
}

/* Is something of it on the wire? */
static bool is_in_flight(const cps_log *log, const cps_segment *segment) {
    if (segment->base < log->sent && log->sent != log->settled.head) return true;
    if (!log->is_split) return false;
    uint64_t from = log->settled.ahead[log->settled.ahead_count - 1].end;
    return from != log->live && segment->base < log->live && segment->end > from;
}

cps_segment *cps_log_victim(const cps_log *log) {
    cps_segment *victim = log->store.first;
    while (victim != NULL && is_in_flight(log, victim)) victim = victim->next;
    if (victim == log->active) return NULL;
    for (unsigned i = 0; i < CPS_VICTIMS; i++)
        if (log->settled.victims[i] == 0) return victim;
    return NULL; /* so many dropped files cannot be removed: dropping more would free nothing */
}

void cps_log_drop_segment(cps_log *log, cps_segment *victim) {
    uint64_t first = cps_log_settled_in(log, victim);
    uint64_t messages = victim->messages - victim->settled_messages;
    uint64_t bytes = victim->message_bytes - victim->settled_bytes;
    uint64_t end = victim->end;
    unsigned place = 0;
    while (log->settled.victims[place] != 0) CPS_ASSERT(++place < CPS_VICTIMS); /* cps_log_victim saw to it */
    log->settled.victims[place] = victim->base + 1; /* counted now, removed later: a kill in between shows nothing twice */
    CPS_CRASH_POINT("drop-victim");
    cps_log_retire(log, victim);
    log->settled.dropped_messages += messages;
    log->settled.dropped_bytes += bytes;
    cps_log_lose(log, first, end, messages, bytes, CPS_REASON_QUOTA);
    CPS_CRASH_POINT("drop-entered");
    cps_log_normalise(log);
    cps_log_commit(log);
    CPS_CRASH_POINT("drop-committed");
}

/* Under the lock: drop the oldest records of the ring until one of `span` bytes fits.  False: they are in flight or on
 * their way to the disk. */
static bool drop_from_ring(cps_log *log, uint64_t span) {
    uint64_t low = cps_log_low(log), published = cps_ring_published(log->ring);
    bool nothing_in_flight = log->sent == log->settled.head;
    if (log->spilling || (log->sent > low && !nothing_in_flight) || log->reading_ring) return false;
    if (low >= cps_log_live_first(log) && log->live > low) return false; /* in flight too */
    if (cps_ring_low(log->ring) < low) return false; /* power mode: written, and waiting for its sync */
    uint64_t at = low, messages = 0, bytes = 0, limit = cps_log_next_ahead(log, low); /* what is settled is not dropped */
    uint64_t needed = span + cps_ring_record_max(log->home.ring_bytes); /* with the pad that may come before it */
    while (at < limit && published + needed - at > log->home.ring_bytes) {
        const uint8_t *view;
        size_t size;
        cps_record record;
        if (cps_ring_view(log->ring, at, &view, &size) != CPS_OK) break;
        CPS_ASSERT(cps_record_load(view, size, at, &record) == CPS_OK);
        uint64_t here = cps_record_span(record.length_bytes);
        at += here;
        if (!record.is_pad) {
            messages++;
            bytes += here;
        }
        if (messages > 0 && published - at + span <= log->home.ring_bytes / 2) break; /* enough in any case */
    }
    if (at == low) return false;
    /* The disk holds older ones: a hole behind them.  Nor does the head pass a live stream that has not been joined. */
    if (log->settled.head < low || low >= cps_log_live_first(log)) log->settled.spilled = at;
    else log->settled.head = log->sent = at;
    log->settled.dropped_messages += messages;
    log->settled.dropped_bytes += bytes;
    cps_log_lose(log, low, at, messages, bytes, CPS_REASON_RING_FULL);
    CPS_CRASH_POINT("ring-drop-entered");
    cps_log_normalise(log);
    cps_log_commit(log);
    CPS_CRASH_POINT("ring-drop-committed");
    return true;
}

/* Under the lock, ring full: wait or make room as the policy says; CPS_BUSY when the slice is over.  CPS_OK: try again; CPS_CLOSED; CPS_FULL;
 * CPS_DROPPED: the new message is the one to go. */
static CPS_MUST_CHECK enum cps_status make_room(cps_log *log, uint64_t span, const cps_patience *patience,
                                                uint64_t slice_until) {
    bool healthy = log->storage == CPS_STORAGE_OK;
    uint64_t now = log->io->monotonic_ms(log->io->context);
    uint64_t until = patience->healthy_until_ms;
    if (healthy && now >= until) { /* it hangs, and is not waited for again */
        healthy = false;
        log->stalled = true;
        log->storage_error = ETIMEDOUT;
        cps_storage_is(log, CPS_STORAGE_FAILED);
    }
    bool may_issue = cps_ring_may_issue(log->ring, span);
    if (!may_issue) { /* the next positions could not be reserved */
        healthy = false;
        if (log->has_store) cps_storage_is(log, CPS_STORAGE_FAILED);
    }
    if (!healthy || now >= patience->healthy_until_ms) {
        switch (log->config.on_full) {
        case CPS_ON_FULL_RAISE: return CPS_FULL;
        case CPS_ON_FULL_DROP_NEWEST: return CPS_DROPPED;
        case CPS_ON_FULL_BLOCK:
            if (now >= patience->block_until_ms) return CPS_FULL;
            until = patience->block_until_ms;
            break;
        case CPS_ON_FULL_DROP_OLDEST:
            if (!may_issue) return CPS_DROPPED; /* no other makes place for it */
            if (drop_from_ring(log, span)) return CPS_OK;
            if (log->stalled || now >= patience->healthy_until_ms) return CPS_DROPPED; /* nothing may go that is older */
            break;
        }
    }
    if (now >= slice_until) return CPS_BUSY;
    log->producers_waiting++;
    (void)pthread_cond_signal(&log->work);
    (void)cps_log_timed_wait(log, &log->room, smaller(until, slice_until));
    log->producers_waiting--;
    return CPS_OK;
}

static void wake(cps_log *log, unsigned due) {
    if (due & (1u << CPS_WAKE_FLUSHER)) {
        (void)pthread_mutex_lock(&log->lock);
        (void)pthread_cond_signal(&log->work);
        (void)pthread_mutex_unlock(&log->lock);
    }
    if ((due & (1u << CPS_WAKE_READER)) && log->config.notify != NULL) log->config.notify(log->config.notify_user, true);
}

static CPS_MUST_CHECK enum cps_status refuse(cps_log *log, const cps_message *message, uint64_t *position) {
    cps_produced now;
    uint64_t span = cps_record_span(cps_message_length(message));
    cps_ring_refuse(log->ring, message, &now);
    CPS_CRASH_POINT("refuse-counted");
    *position = CPS_REFUSED_POSITION + (now.refused - 1) * CPS_RECORD_ALIGN;
    (void)pthread_mutex_lock(&log->lock);
    cps_log_lose(log, *position, *position + CPS_RECORD_ALIGN, 1, span, CPS_REASON_REFUSED);
    cps_shared_commit_ledger(log->home.shared, &log->ledger);
    CPS_CRASH_POINT("refuse-entered");
    (void)pthread_mutex_unlock(&log->lock);
    return CPS_DROPPED;
}

/* When a message is published: CLOCK_BOOTTIME, read anew only when the kernel's tick has moved, since reading it costs as
 * much as all the rest of an append.  As old as a tick at most; a machine that slept sees a new tick first. */
static uint64_t stamp_now(cps_log *log) {
    const cps_io *io = log->io;
    uint64_t tick = io->tick_ms(io->context);
    /* model: stamp.tick.load; pairs with stamp.tick.store: who sees the tick sees a stamp that was read for it. */
    if (CPS_LIKELY(atomic_load_explicit(&log->stamp_tick_ms, memory_order_acquire) == tick))
        return atomic_load_explicit(&log->stamp_ms, memory_order_relaxed); /* model: stamp.load; after the tick's acquire */
    uint64_t stamp = io->boottime_ms(io->context);
    /* It never goes back: a thread that was held up since it read the clock may come with an old one, when others have
     * stored the tick of today.  Relaxed: it is the tick that orders.  model: stamp.seen */
    uint64_t seen = atomic_load_explicit(&log->stamp_ms, memory_order_relaxed);
    while (seen < stamp &&
           /* model: stamp.raise */
           !atomic_compare_exchange_weak_explicit(&log->stamp_ms, &seen, stamp, memory_order_relaxed, memory_order_relaxed)) {}
    atomic_store_explicit(&log->stamp_tick_ms, tick, memory_order_release); /* model: stamp.tick.store */
    return stamp;
}

enum cps_status cps_log_append(cps_log *log, cps_message *message, cps_patience *patience, uint64_t *position) {
    unsigned due = 0;
    uint64_t span = cps_record_span(cps_message_length(message));
    if (log->has_store && span > log->config.segment_bytes / CPS_SEGMENT_RECORD_SHARE) return CPS_TOO_LARGE;
    message->stamp_ms = stamp_now(log);
    enum cps_status status = cps_ring_push(log->ring, message, patience == NULL, position, &due);
    if (CPS_LIKELY(status == CPS_OK)) {
        if (CPS_UNLIKELY(due != 0)) wake(log, due);
        return CPS_OK;
    }
    if (status == CPS_FULL && patience == NULL) return CPS_BUSY;
    if (status != CPS_FULL) return status;
    if (!patience->begun) {
        patience->healthy_until_ms = cps_log_after(log, log->config.spill_timeout_ms);
        patience->block_until_ms = cps_log_after(log, patience->never_block ? 0 : log->config.block_timeout_ms);
        patience->begun = true;
    }
    uint64_t slice_until = cps_log_after(log, patience->slice_ms);
    do {
        enum cps_status verdict = CPS_OK;
        (void)pthread_mutex_lock(&log->lock);
        while (verdict == CPS_OK && !log->shut &&
               !(cps_ring_has_room(log->ring, span) && cps_ring_may_issue(log->ring, span)))
            verdict = make_room(log, span, patience, slice_until);
        (void)pthread_mutex_unlock(&log->lock);
        if (verdict == CPS_DROPPED) return refuse(log, message, position);
        if (verdict != CPS_OK) return verdict;
        status = cps_ring_push(log->ring, message, false, position, &due); /* another producer may have been faster */
    } while (status == CPS_FULL);
    if (status == CPS_OK && due != 0) wake(log, due);
    return status;
}

uint64_t cps_log_published(const cps_log *log) { return cps_ring_published(log->ring); }

void cps_log_link(cps_log *log, bool up) {
    (void)pthread_mutex_lock(&log->lock);
    if (log->link_up && !up) {
        log->offline_due_ms = cps_log_after(log, log->config.spill_after_ms);
        log->offline_goal = CPS_NO_LIMIT_MS;
    }
    log->link_up = up;
    cps_shared_tell_link(log->home.shared, up);
    if (up) log->offline_due_ms = log->spill_goal = 0; /* what has not been written yet need not be */
    (void)pthread_cond_signal(&log->work);
    (void)pthread_mutex_unlock(&log->lock);
}

/* Under the lock: records that the head passes and that ended without an acknowledgement. */
static void end_otherwise(cps_log *log, const cps_loss *loss) {
    if (loss->reason == CPS_REASON_DEAD) {
        log->settled.dead_messages += loss->messages;
        log->settled.dead_bytes += loss->bytes;
        remember(log, loss);
        return;
    }
    log->settled.dropped_messages += loss->messages;
    log->settled.dropped_bytes += loss->bytes;
    cps_log_lose(log, loss->first, loss->end, loss->messages, loss->bytes, loss->reason);
}

/* `live`: of the live stream, where there are two. */
static void settle(cps_log *log, bool live, uint64_t to, uint64_t messages, uint64_t bytes, const cps_loss *ended, size_t n) {
    uint64_t all = messages, all_bytes = bytes;
    for (size_t i = 0; i < n; i++) {
        all += ended[i].messages;
        all_bytes += ended[i].bytes;
    }
    (void)pthread_mutex_lock(&log->lock);
    bool is_ahead = live && log->is_split;
    uint64_t *cursor = is_ahead ? &cps_log_live_range(log)->end : &log->settled.head;
    CPS_ASSERT(to >= *cursor);
    CPS_ASSERT(to <= *cps_log_cursor(log, live));
    to = cps_log_over_pads(log, live, to);
    CPS_CRASH_POINT("settle-begin");
    settle_in_segments(log, *cursor, to, all, all_bytes);
    *cursor = to;
    log->ahead_moved |= is_ahead;
    log->settled.acked_messages += messages;
    log->settled.acked_bytes += bytes;
    for (size_t i = 0; i < n; i++) end_otherwise(log, &ended[i]);
    if (log->store.first != NULL && !log->checkpoint_timed) {
        log->checkpoint_timed = true; /* one wake-up a checkpoint, not one a batch */
        (void)pthread_cond_signal(&log->work);
    }
    cps_log_normalise(log);
    if (log->is_split) cps_log_join(log);
    cps_log_commit(log);
    CPS_CRASH_POINT("settle-committed");
    if (log->reading != NULL && log->reading->retired) cps_log_leave_segment(log); /* so that its file can go */
    (void)pthread_mutex_unlock(&log->lock);
}

void cps_log_settle(cps_log *log, uint64_t head, uint64_t messages, uint64_t bytes, const cps_loss *ended, size_t n) {
    settle(log, false, head, messages, bytes, ended, n);
}

void cps_log_settle_live(cps_log *log, uint64_t end, uint64_t messages, uint64_t bytes, const cps_loss *ended, size_t n) {
    settle(log, true, end, messages, bytes, ended, n);
}

/* Under the lock: with `all` everything before it too. */
static bool is_over(const cps_log *log, uint64_t position, bool all) {
    return all ? position < log->settled.head : cps_log_is_settled(log, position);
}

enum cps_status cps_log_wait_settled(cps_log *log, uint64_t position, bool all, uint64_t timeout_ms) {
    uint64_t deadline = cps_log_after(log, timeout_ms);
    enum cps_status status = CPS_OK;
    (void)pthread_mutex_lock(&log->lock);
    while (!is_over(log, position, all)) {
        status = CPS_CLOSED;
        if (log->shut) break;
        status = CPS_TIMEOUT;
        if (!cps_log_timed_wait(log, &log->settled_moved, deadline)) break;
        status = CPS_OK;
    }
    if (is_over(log, position, all)) status = CPS_OK;
    (void)pthread_mutex_unlock(&log->lock);
    return status;
}

bool cps_log_hopeless(const cps_log *log, uint64_t goal) {
    for (const cps_segment *s = log->store.first; s != NULL && s->base < goal; s = s->next)
        if (s->given_up && s->synced_end < s->end && s->end > log->settled.head) return true;
    return false;
}

enum cps_status cps_log_wait_synced(cps_log *log, uint64_t position, uint64_t timeout_ms) {
    uint64_t deadline = cps_log_after(log, timeout_ms);
    enum cps_status status = CPS_OK;
    if (!log->has_store) return CPS_UNKNOWN;
    (void)pthread_mutex_lock(&log->lock);
    uint64_t goal = position < cps_ring_published(log->ring) ? position + 1 : cps_ring_published(log->ring);
    if (goal > log->sync_goal) log->sync_goal = goal;
    (void)pthread_cond_signal(&log->work);
    while (cps_log_synced(log) < goal) {
        if (log->storage != CPS_STORAGE_OK || cps_log_hopeless(log, goal)) status = CPS_IO;
        else if (log->shut) status = CPS_CLOSED;
        else if (!cps_log_timed_wait(log, &log->settled_moved, deadline)) status = CPS_TIMEOUT;
        if (status != CPS_OK) break;
    }
    if (cps_log_synced(log) >= goal) status = CPS_OK;
    (void)pthread_mutex_unlock(&log->lock);
    return status;
}

enum cps_status cps_log_outcome(cps_log *log, uint64_t position, enum cps_reason *reason) {
    enum cps_status status = CPS_OK;
    (void)pthread_mutex_lock(&log->lock);
    for (size_t i = 0; i < CPS_LOSSES_KNOWN; i++) {
        const cps_loss *loss = &log->known[i];
        if (loss->messages == 0 || position < loss->first || position >= loss->end) continue;
        *reason = loss->reason;
        status = CPS_DROPPED;
    }
    (void)pthread_mutex_unlock(&log->lock);
    return status;
}

size_t cps_log_take_losses(cps_log *log, cps_loss *out, size_t room) {
    (void)pthread_mutex_lock(&log->lock);
    size_t n = log->losses_used < room ? log->losses_used : room;
    memcpy(out, log->losses, n * sizeof *out);
    memmove(log->losses, log->losses + n, (log->losses_used - n) * sizeof *out);
    log->losses_used -= n;
    (void)pthread_mutex_unlock(&log->lock);
    return n;
}

uint64_t cps_log_age_ms(const cps_log *log, uint64_t position) {
    const cps_io *io = log->io;
    uint64_t now = io->boottime_ms(io->context), stamp = 0;
    if (position < log->settled.spilled) {
        const cps_segment *segment = cps_store_find(&log->store, position);
        if (segment != NULL && segment->oldest_stamp_ms == 0) {
            uint64_t wall = io->wall_ms(io->context); /* of another boot: only the wall clock spans both */
            return segment->oldest_wall_ms != 0 && wall > segment->oldest_wall_ms ? wall - segment->oldest_wall_ms : 0;
        }
        if (segment != NULL) stamp = segment->oldest_stamp_ms;
    } else {
        uint64_t at = position;
        const uint8_t *bytes;
        size_t size;
        cps_record record = {.is_pad = true};
        while (record.is_pad && cps_ring_view(log->ring, at, &bytes, &size) == CPS_OK) {
            if (cps_record_load(bytes, size, at, &record) != CPS_OK) break;
            at += cps_record_span(record.length_bytes);
        }
        if (!record.is_pad) stamp = record.stamp_ms;
    }
    return stamp != 0 && now > stamp ? now - stamp : 0;
}

void cps_log_stats_now(cps_log *log, cps_log_stats *out) {
    (void)pthread_mutex_lock(&log->lock);
    memset(out, 0, sizeof *out);
    cps_shared_read_produced(log->home.shared, &out->produced);
    const cps_settled *s = &log->settled;
    out->settled = *s;
    out->sent = log->sent;
    out->synced = cps_log_synced(log);
    out->ring_bytes = log->home.ring_bytes;
    out->ring_used_bytes = out->produced.published - cps_ring_low(log->ring);
    out->spool_bytes = log->store.file_bytes;
    out->spool_segments = log->store.segments;
    out->spool_messages = log->store.messages;
    out->pending_messages = out->produced.messages - out->produced.refused - s->acked_messages - s->dropped_messages -
                            s->dead_messages;
    out->pending_bytes = out->produced.bytes - out->produced.refused_bytes - s->acked_bytes - s->dropped_bytes - s->dead_bytes;
    out->oldest_age_ms = cps_log_age_ms(log, s->head);
    out->spilled_bytes = log->spilled_bytes;
    out->syncs = log->syncs;
    out->damaged_ranges = log->damaged_ranges;
    out->damaged_bytes = log->damaged_bytes;
    out->quarantine_bytes = cps_quarantine_bytes(&log->quarantine);
    out->expired_messages = log->ledger.totals[CPS_REASON_EXPIRED].messages;
    out->uncertain_first = log->ledger.uncertain_first;
    out->uncertain_end = log->ledger.uncertain_end;
    out->storage = log->storage;
    out->storage_error = log->storage_error;
    (void)pthread_mutex_unlock(&log->lock);
}
