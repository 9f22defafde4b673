/* The flusher: the one thread that writes to the disk.
 *
 * It sleeps until there is a reason to work, then does the first of these that is due: spill a batch of the ring, sync,
 * seal a full segment, remove drained ones, save a checkpoint.  While the link keeps up none of them is ever due, and
 * nothing is written.  Every reason is a deadline or a state under the lock, so nothing is lost between look and sleep. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>

#include "_log_inside.h"

#define NEVER CPS_NO_LIMIT_MS

/* ---- spilling ---- */

/* Up to where the ring should be written out now; 0: it need not be. */
static uint64_t spill_goal(const cps_log *log, uint64_t now) {
    uint64_t low = cps_log_low(log), published = cps_ring_published(log->ring);
    uint64_t used = published - low, size = log->home.ring_bytes;
    if (used == 0) return 0;
    if (log->storage != CPS_STORAGE_OK && now < log->retry_at_ms) return 0;
    if (log->closing) return published;
    if (log->storage == CPS_STORAGE_FAILED) return low + 1; /* one record, to see whether it works again */
    uint64_t asked = log->sync_goal > log->spill_goal ? log->sync_goal : log->spill_goal;
    if (asked > low) return asked;
    if (used > size / 2) return published - size / 4;
    if (log->producers_waiting > 0) return low + used / 2 + 1;
    return 0;
}

/* Drop the oldest segment, if that is the policy.  May let the lock go.  CPS_OK: look again; CPS_EMPTY: none may go; CPS_IO:
 * the storage failed. */
static CPS_MUST_CHECK enum cps_status drop_one(cps_log *log) {
    if (log->config.on_full != CPS_ON_FULL_DROP_OLDEST) return CPS_EMPTY;
    cps_segment *victim = cps_log_victim(log);
    if (victim == NULL) return CPS_EMPTY;
    /* In power mode the ring holds what is not synced, as one run: no hole may come into it. */
    cps_segment *unsynced = cps_log_is_power(log) && cps_log_confirmed(log) < victim->end ? cps_log_due_for_sync(log, cps_log_now(log), true) : NULL;
    if (unsynced != NULL) return cps_log_sync_segment(log, unsynced) ? CPS_OK : CPS_IO;
    cps_log_drop_segment(log, victim);
    return CPS_OK;
}

/* Make room within the user's limits for one more message and a file of `file_bytes` (0: no new one).  Lets the lock go.
 * False: there is none. */
static bool keep_limits(cps_log *log, uint64_t file_bytes) {
    const cps_log_config *config = &log->config;
    uint64_t messages_max = config->spool_messages_max;
    for (;;) {
        uint64_t taken = log->store.file_bytes + log->retired_bytes + cps_quarantine_bytes(&log->quarantine);
        bool crowded = messages_max != 0 && log->store.messages >= messages_max;
        bool large = file_bytes != 0 && taken + file_bytes > config->spool_bytes_max;
        if (!crowded && !large) return true;
        if (cps_log_remove_one(log)) continue;
        enum cps_status shrunk = large ? cps_log_shrink_one(log) : CPS_EMPTY;
        if (shrunk == CPS_OK) continue;
        if (shrunk == CPS_IO) return false; /* how long to wait after that is known already */
        /* Files that are waiting to be removed are no reason to drop others. */
        bool may_drop = crowded || log->store.file_bytes + cps_quarantine_bytes(&log->quarantine) + file_bytes > config->spool_bytes_max;
        enum cps_status dropped = may_drop ? drop_one(log) : CPS_EMPTY;
        if (dropped == CPS_OK) continue;
        if (dropped == CPS_IO) return false;
        cps_storage_full(log);
        return false;
    }
}

/* Drop the oldest segment where `missing` bytes can be had in this way, of which `*freed` were.  Not for room that our files
 * do not take, or that others take as soon as it is there: all would be lost for nothing.  May let the lock go. */
static bool drop_for_room(cps_log *log, uint64_t missing, uint64_t *freed) {
    uint64_t before = log->store.file_bytes;
    if (*freed >= missing) log->vain_drops = true;
    if (log->vain_drops || before + log->retired_bytes + *freed < missing) return false;
    if (drop_one(log) != CPS_OK) return false;
    *freed += before - log->store.file_bytes;
    return true;
}

/* Leave `min_free_bytes` to others.  Lets the lock go.  False: there is not so much; it is looked at again later. */
static bool keep_reserve(cps_log *log, uint64_t file_bytes) {
    const cps_io *io = log->io;
    uint64_t reserve = log->config.min_free_bytes, space, missing = 0, freed = 0;
    if (reserve == 0) return true;
    for (;;) {
        int error = 0;
        (void)pthread_mutex_unlock(&log->lock);
        enum cps_status status = io->free_space(io->context, log->directory, &space, &error);
        (void)pthread_mutex_lock(&log->lock);
        if (status != CPS_OK) { /* creating a file will say more */
            log->storage_error = error;
            return true;
        }
        if (space >= reserve && space - reserve >= file_bytes) return true;
        if (missing == 0) missing = reserve + file_bytes - space;
        if (cps_log_remove_one(log) || drop_for_room(log, missing, &freed)) continue;
        cps_storage_full(log);
        log->retry_at_ms = cps_log_now(log) + CPS_RETRY_MIN_MS; /* others may give some back */
        return false;
    }
}

/* A new segment at `position` that takes a record of `span` bytes.  Lets the lock go.  False: it cannot be. */
static bool start_segment(cps_log *log, uint64_t position, uint64_t span) {
    uint64_t file_bytes = span + CPS_SEGMENT_HEADER_BYTES + CPS_SEGMENT_FOOTER_BYTES;
    uint64_t freed = 0;
    if (file_bytes < log->config.segment_bytes) file_bytes = log->config.segment_bytes;
    while (keep_limits(log, file_bytes) && keep_reserve(log, file_bytes)) {
        cps_segment_identity identity = {.epoch = log->epoch, .serial = log->serial++, .base = position};
        memcpy(identity.spool_id, log->meta.spool_id, 16);
        cps_segment *segment = NULL;
        int error = 0;
        (void)pthread_mutex_unlock(&log->lock);
        CPS_CRASH_POINT("roll-begin");
        enum cps_status status =
            cps_segment_create(log->io, log->directory, &identity, file_bytes, &segment, &error);
        CPS_CRASH_POINT("roll-created");
        (void)pthread_mutex_lock(&log->lock);
        if (status == CPS_OK) {
            cps_store_add(&log->store, segment);
            log->active = segment;
            CPS_CRASH_POINT("roll-added");
            log->vain_drops = false;
            return true;
        }
        if (segment != NULL) cps_log_discard(log, segment);
        bool no_space = status == CPS_IO && (error == ENOSPC || error == EDQUOT);
        if (no_space && drop_for_room(log, file_bytes, &freed)) {
            while (cps_log_remove_one(log)) {}
            continue; /* the disk is smaller than the quota: the oldest make room for the newest all the same */
        }
        cps_storage_failed(log, status == CPS_IO ? error : ENOMEM);
        return false;
    }
    return false;
}

/* Make sure that `active` takes a record of `span` bytes at `position`.  Lets the lock go.  False: it cannot be. */
static bool provide_segment(cps_log *log, uint64_t position, uint64_t span) {
    cps_segment *active = log->active;
    uint64_t messages_max = log->config.spool_messages_max;
    bool crowded = active != NULL && messages_max != 0 && active->messages > 0 && active->messages >= messages_max / 8;
    bool fits = active != NULL && active->end == position && cps_segment_has_room(active, span) &&
                active->poison == CPS_OK;
    /* No segment reaches into a range from before it: see _log_ahead.c. */
    fits = fits && (active->base == position || cps_log_next_ahead(log, position - 1) != position);
    if (active != NULL && (!fits || crowded)) {
        active->full = true;
        log->active = NULL;
        CPS_CRASH_POINT("roll-full");
    }
    if (log->active != NULL && !keep_limits(log, 0)) return false;
    return log->active != NULL || start_segment(log, position, span);
}

/* Copy whole records from the ring, from `position` on, into the staging buffer: at most `room` bytes, to `goal`. */
static size_t stage(cps_log *log, uint64_t position, uint64_t goal, uint64_t room, uint64_t messages_room) {
    size_t staged = 0;
    uint64_t messages = 0;
    if (room > log->staging_bytes) room = log->staging_bytes;
    cps_ring_pin(log->ring, CPS_PIN_FLUSHER, position);
    while (position + staged < goal && messages < messages_room) {
        const uint8_t *bytes;
        size_t size, whole = 0;
        if (cps_ring_view(log->ring, position + staged, &bytes, &size) != CPS_OK) break;
        (void)pthread_mutex_unlock(&log->lock);
        while (whole < size && position + staged + whole < goal && messages < messages_room) {
            cps_record record;
            CPS_ASSERT(cps_record_load(bytes + whole, size - whole, position + staged + whole, &record) == CPS_OK);
            size_t span = (size_t)cps_record_span(record.length_bytes);
            if (staged + whole + span > room) break;
            messages += !record.is_pad;
            whole += span;
        }
        memcpy(log->staging + staged, bytes, whole);
        (void)pthread_mutex_lock(&log->lock);
        staged += whole;
        if (whole < size) break;
    }
    cps_ring_unpin(log->ring, CPS_PIN_FLUSHER);
    return staged;
}

static uint64_t first_span(const cps_log *log, uint64_t position) {
    const uint8_t *bytes;
    size_t size;
    cps_record record;
    CPS_ASSERT(cps_ring_view(log->ring, position, &bytes, &size) == CPS_OK);
    CPS_ASSERT(cps_record_load(bytes, size, position, &record) == CPS_OK);
    return cps_record_span(record.length_bytes);
}

/* Under the lock: the staged batch at `position` is in the active segment. */
static void take_in(cps_log *log, size_t size, uint64_t position, uint64_t messages, uint64_t bytes) {
    cps_segment *active = log->active;
    if (active->synced_end == active->end) active->unsynced_since_ms = cps_log_now(log);
    for (size_t at = 0; at < size;) {
        cps_record record;
        CPS_ASSERT(cps_record_load(log->staging + at, size - at, position + at, &record) == CPS_OK);
        uint64_t span = cps_record_span(record.length_bytes);
        if (!record.is_pad && active->oldest_stamp_ms == 0) active->oldest_stamp_ms = record.stamp_ms;
        if (!cps_log_is_settled(log, position + at)) break;
        active->settled_messages += !record.is_pad; /* acknowledged on its way here */
        active->settled_bytes += record.is_pad ? 0 : span;
        at += (size_t)span;
    }
    active->end = position + size;
    active->messages += messages;
    active->message_bytes += bytes;
    log->store.messages += messages;
    log->spilled_bytes += size;
    if (log->settled.spilled < position + size) log->settled.spilled = position + size; /* it may have passed over a range */
    log->ahead_moved |= log->settled.ahead_count > 0;
    cps_storage_works(log);
}

/* Write one batch.  False: the storage refused. */
static bool spill_batch(cps_log *log, uint64_t goal) {
    log->spilling = true;
    uint64_t position = cps_log_low(log);
    if (goal > cps_log_next_ahead(log, position)) goal = cps_log_next_ahead(log, position);
    bool done = provide_segment(log, position, first_span(log, position));
    CPS_CRASH_POINT("spill-provided");
    if (done && cps_log_low(log) == position) { /* the reader may have settled it while the lock was open */
        cps_segment *active = log->active;
        uint64_t room = active->capacity_bytes - (active->end - active->base);
        uint64_t max = log->config.spool_messages_max;
        uint64_t messages_room = max == 0 ? UINT64_MAX : max - log->store.messages;
        if (max != 0 && messages_room > max / 8 + 1) messages_room = max / 8 + 1;
        size_t size = stage(log, position, goal, room, messages_room);
        CPS_ASSERT(size > 0);
        uint64_t messages, bytes;
        (void)pthread_mutex_unlock(&log->lock);
        CPS_CRASH_POINT("spill-staged");
        cps_segment_prepare(active, log->staging, size, position, &messages, &bytes);
        enum cps_status status = cps_segment_append(active, log->staging, size);
        CPS_CRASH_POINT("spill-appended");
        (void)pthread_mutex_lock(&log->lock);
        if (status == CPS_OK) {
            take_in(log, size, position, messages, bytes);
            CPS_CRASH_POINT("spill-taken");
        } else {
            cps_storage_failed(log, active->error);
            cps_log_take_back(log, active);
            cps_log_give_up(log, active); /* what memory still holds goes to a new file */
            done = false;
        }
    } else if (log->active != NULL && log->active->end == log->active->base) {
        cps_log_retire(log, log->active); /* made for a position that is not the next one any more */
    }
    log->spilling = false;
    cps_log_normalise(log);
    CPS_CRASH_POINT("spill-normalised");
    cps_log_commit(log);
    CPS_CRASH_POINT("spill-committed");
    if (!done) cps_log_cut_off(log);
    return done;
}

/* ---- what is due ---- */

static bool wants_sync(cps_log *log) {
    if (log->closing || log->sync_goal > cps_log_confirmed(log)) return true;
    /* In power mode the ring gives room only for what is synced. */
    uint64_t held = cps_ring_low(log->ring);
    bool crowded = log->producers_waiting > 0 || cps_ring_published(log->ring) - held > log->home.ring_bytes / 2;
    return cps_log_is_power(log) && crowded && held < cps_log_low(log);
}

/* Sync and seal what is due.  Lets the lock go.  False: nothing was, or it failed. */
static bool sync_due(cps_log *log) {
    cps_segment *segment;
    bool any = false;
    while ((segment = cps_log_due_for_sync(log, cps_log_now(log), wants_sync(log))) != NULL) {
        if (!cps_log_sync_segment(log, segment)) return false;
        any = true;
    }
    return any;
}

/* ---- keeping house ---- */

/* Make removals durable, a burst of them at once.  Lets the lock go. */
static void sync_removals(cps_log *log) {
    int ignored; /* a file that comes back after a power cut is settled, and removed again */
    log->unlinked = false;
    (void)pthread_mutex_unlock(&log->lock);
    CPS_CRASH_POINT("removals-begin");
    (void)!log->io->sync_directory(log->io->context, log->directory, &ignored);
    CPS_CRASH_POINT("removals-synced");
    (void)pthread_mutex_lock(&log->lock);
}

static CPS_MUST_CHECK enum cps_status save_meta(cps_log *log, bool synced) {
    cps_meta *meta = &log->meta;
    cps_shared_read_produced(log->home.shared, &meta->produced);
    meta->settled = log->settled;
    meta->ledger = log->ledger;
    log->ledger_unsaved = false;
    (void)pthread_mutex_unlock(&log->lock);
    enum cps_status status = cps_meta_save(meta, synced);
    (void)pthread_mutex_lock(&log->lock);
    if (status != CPS_OK) {
        log->storage_error = meta->error;
        log->ledger_unsaved = true;
    }
    return status;
}

static uint64_t ahead_end(const cps_log *log) {
    uint64_t count = log->settled.ahead_count;
    return count > 0 ? log->settled.ahead[count - 1].end : 0;
}

/* The acknowledgement cursor is advisory; it is kept near while segments drain, so that a kill costs few duplicates. */
static void checkpoint(cps_log *log, uint64_t now) {
    log->checkpoint_head = log->settled.head;
    log->checkpoint_ahead = ahead_end(log);
    /* A failure costs duplicates after a crash and nothing else, so it does not stop the storage. */
    CPS_CRASH_POINT("checkpoint-begin");
    bool saved = save_meta(log, false) == CPS_OK;
    CPS_CRASH_POINT("checkpoint-saved");
    log->checkpoint_due_ms = now + (saved ? CPS_CHECKPOINT_MS : CPS_RETRY_MAX_MS);
}

static bool checkpoint_wanted(const cps_log *log) {
    bool moved = log->settled.head != log->checkpoint_head || ahead_end(log) != log->checkpoint_ahead;
    return log->ledger_unsaved || (log->store.first != NULL && moved);
}

static bool reservation_short(const cps_log *log) {
    uint64_t published = cps_ring_published(log->ring), end = log->reserved_end;
    return end < CPS_POSITION_MAX && (end < published || end - published < CPS_POSITION_BLOCK / 2);
}

/* Half a block, 2^39 bytes, is left until it must work; then nothing more is taken until it does. */
static void reserve(cps_log *log, uint64_t now) {
    uint64_t end = log->reserved_end + CPS_POSITION_BLOCK;
    log->meta.next_position = end;
    if (save_meta(log, true) == CPS_OK) cps_log_reserved(log, end);
    else log->reserve_due_ms = now + CPS_RETRY_MAX_MS;
}

/* What must not wait for the end of a long spill.  Each lets the lock go, so it ends the round: only a look that was not
 * interrupted may end in sleep.  False: nothing was due. */
static bool keep_house(cps_log *log, uint64_t now) {
    cps_segment *overdue;
    if (cps_log_remove_one(log)) return true;
    bool asked = log->sync_goal > cps_log_confirmed(log) && cps_log_low(log) >= log->sync_goal; /* it is all in files */
    if (checkpoint_wanted(log) && now >= log->checkpoint_due_ms) checkpoint(log, now);
    else if (reservation_short(log) && now >= log->reserve_due_ms) reserve(log, now);
    else if ((overdue = cps_log_due_for_sync(log, now, asked)) != NULL) (void)cps_log_sync_segment(log, overdue);
    else return false;
    return true;
}

/* Last act: everything is on the disk, or cannot be brought there. */
static void finish(cps_log *log) {
    CPS_CRASH_POINT("finish-begin");
    if (log->active != NULL) log->active->full = true;
    log->active = NULL;
    (void)sync_due(log);
    CPS_CRASH_POINT("finish-synced");
    log->remove_due_ms = 0; /* one more chance */
    while (cps_log_remove_one(log)) {}
    CPS_CRASH_POINT("finish-removed");
    uint64_t published = cps_ring_published(log->ring);
    bool everything = cps_log_low(log) == published && cps_log_synced(log) == published;
    log->meta.clean = everything;
    if (everything) log->meta.next_position = published;
    log->told = save_meta(log, true) == CPS_OK;
    CPS_CRASH_POINT("finish-saved");
    if (log->told && log->unlinked) sync_removals(log);
    CPS_CRASH_POINT("finish-done");
}

/* ---- the loop ---- */

static uint64_t earlier(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Power mode: has the next group commit to be timed? */
static bool sync_clock_wanted(const cps_log *log) {
    return cps_log_is_power(log) && log->sync_due_ms == 0 && log->sync_goal == 0;
}

/* Start the clocks of what waits in the ring; one that has run out sets a goal.  The goal is where the log ends at that
 * moment, so that what is published while it is written waits for the next round, and batches stay large. */
static void run_clocks(cps_log *log, uint64_t now) {
    uint64_t published = cps_ring_published(log->ring);
    bool waiting = published > cps_log_low(log);
    if (log->offline_due_ms != 0 && now >= log->offline_due_ms) {
        log->offline_due_ms = 0;
        /* What waited when the clock was started; a reader that has taken all of that keeps up. */
        if (cps_log_low(log) < log->offline_goal) log->spill_goal = published;
    }
    if (log->sync_due_ms != 0 && now >= log->sync_due_ms) {
        log->sync_due_ms = 0;
        if (published > log->sync_goal) log->sync_goal = published;
    }
    if (!log->link_up && log->offline_due_ms == 0 && waiting) {
        log->offline_due_ms = now + log->config.spill_after_ms;
        log->offline_goal = published;
    }
    if (sync_clock_wanted(log) && published > cps_log_confirmed(log)) log->sync_due_ms = now + log->config.sync_interval_ms;
    if (cps_log_is_power(log) && log->config.sync_bytes != 0 && published - cps_log_confirmed(log) >= log->config.sync_bytes) {
        log->sync_due_ms = 0;
        if (published > log->sync_goal) log->sync_goal = published;
    }
}

static uint64_t next_deadline(cps_log *log, uint64_t now, bool waiting) {
    uint64_t deadline = NEVER;
    bool works = log->storage == CPS_STORAGE_OK;
    if (!works && now < log->retry_at_ms) deadline = log->retry_at_ms;
    if (works && log->offline_due_ms != 0 && waiting) deadline = earlier(deadline, log->offline_due_ms);
    if (log->sync_due_ms != 0) deadline = earlier(deadline, log->sync_due_ms);
    if (log->retired != NULL && now < log->remove_due_ms) deadline = earlier(deadline, log->remove_due_ms);
    if (reservation_short(log)) deadline = earlier(deadline, log->reserve_due_ms);
    log->checkpoint_timed = checkpoint_wanted(log);
    if (log->checkpoint_timed) deadline = earlier(deadline, log->checkpoint_due_ms);
    for (const cps_segment *s = cps_store_unsealed(&log->store); s != NULL; s = s->next)
        if (s->full && !s->sealed && s->poison == CPS_OK && s->synced_end < s->end)
            deadline = earlier(deadline, s->unsynced_since_ms + log->config.seal_after_ms);
    return deadline;
}

/* Producers wake us when `published` passes a threshold: the next record where it starts a clock, else a ring half full.
 * Arming fails when it has passed already, so that a record that comes just now is not overlooked. */
static void sleep_until_needed(cps_log *log, uint64_t now) {
    uint64_t low = cps_log_low(log), synced = cps_log_confirmed(log);
    bool waiting = cps_ring_published(log->ring) > low;
    uint64_t threshold = low + log->home.ring_bytes / 2;
    if (!log->link_up && (!waiting || log->offline_due_ms == 0)) threshold = low;
    if (sync_clock_wanted(log) && synced < threshold) threshold = synced;
    bool sync_sized = cps_log_is_power(log) && log->config.sync_bytes != 0;
    if (sync_sized && synced + log->config.sync_bytes - 1 < threshold) threshold = synced + log->config.sync_bytes - 1;
    if (log->storage == CPS_STORAGE_FAILED) threshold = low; /* the next record is a try */
    bool may_write = log->storage == CPS_STORAGE_OK || now >= log->retry_at_ms;
    if (may_write && !cps_ring_arm(log->ring, CPS_WAKE_FLUSHER, threshold)) return;
    (void)cps_log_timed_wait(log, &log->work, next_deadline(log, now, waiting));
}

void *cps_flusher_run(void *argument) {
    cps_log *log = argument;
    (void)pthread_mutex_lock(&log->lock);
    for (;;) {
        uint64_t now = cps_log_now(log);
        log->stalled = false;
        run_clocks(log, now);
        if (!log->closing && keep_house(log, now)) continue;
        uint64_t goal = spill_goal(log, now);
        if (goal != 0 && (spill_batch(log, goal) || !log->closing)) continue;
        if (log->sync_goal <= cps_log_confirmed(log)) log->sync_goal = 0;
        if (cps_log_due_for_sync(log, now, wants_sync(log)) != NULL && (sync_due(log) || !log->closing || log->retry_at_ms == 0))
            continue;
        if (log->closing) break;
        if (log->unlinked) sync_removals(log); /* lets the lock go, so what was looked at may have changed */
        else sleep_until_needed(log, now);
    }
    finish(log);
    log->stopped = true;
    bool left = log->left; /* else whoever closes may free the log as soon as the lock is open */
    (void)pthread_cond_broadcast(&log->settled_moved);
    (void)pthread_mutex_unlock(&log->lock);
    if (left) cps_log_end(log);
    return NULL;
}
