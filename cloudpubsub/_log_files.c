/* The log's files, but for writing records to them: syncing, sealing, taking back, removing; and how the storage is.
 *
 * All but the first two are for the flusher, the only thread that calls them, with the log's lock held; what reaches for the
 * disk lets it go meanwhile. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "_log_inside.h"

/* ---- storage state ---- */

void cps_storage_is(cps_log *log, enum cps_storage storage) {
    bool changes = log->storage != storage;
    log->storage = storage;
    cps_shared_tell_storage(log->home.shared, storage, log->storage_error);
    if (changes && log->config.notify != NULL) log->config.notify(log->config.notify_user, false);
}

enum cps_storage cps_log_storage(cps_log *log, int *error) {
    (void)pthread_mutex_lock(&log->lock);
    enum cps_storage storage = log->storage;
    *error = log->storage_error;
    (void)pthread_mutex_unlock(&log->lock);
    return storage;
}

void cps_storage_failed(cps_log *log, int error) {
    log->storage_error = error;
    cps_storage_is(log, CPS_STORAGE_FAILED);
    log->retry_delay_ms = log->retry_delay_ms == 0 ? CPS_RETRY_MIN_MS : log->retry_delay_ms * 2;
    if (log->retry_delay_ms > CPS_RETRY_MAX_MS) log->retry_delay_ms = CPS_RETRY_MAX_MS;
    log->retry_at_ms = cps_log_now(log) + log->retry_delay_ms;
    (void)pthread_cond_broadcast(&log->room); /* the policy decides from here on */
    (void)pthread_cond_broadcast(&log->settled_moved);
}

void cps_storage_full(cps_log *log) {
    cps_storage_is(log, CPS_STORAGE_FULL);
    log->retry_at_ms = CPS_NO_LIMIT_MS; /* until a segment goes */
    (void)pthread_cond_broadcast(&log->room);
    (void)pthread_cond_broadcast(&log->settled_moved);
}

void cps_storage_works(cps_log *log) {
    cps_storage_is(log, CPS_STORAGE_OK);
    log->retry_delay_ms = 0;
}

/* ---- syncing, sealing, removing ---- */

/* Under the lock: a file that failed is not trusted again; one with nothing in it goes at once. */
void cps_log_give_up(cps_log *log, cps_segment *segment) {
    segment->full = segment->given_up = true;
    if (log->active == segment) log->active = NULL;
    if (segment->end == segment->base && !segment->retired) cps_log_retire(log, segment);
}

/* A write or sync failed in power mode.  The ring still holds everything that was not confirmed, at the same positions, so the
 * segment ends where it was confirmed, what came behind it goes, and the rest is written anew to another file. */
void cps_log_take_back(cps_log *log, cps_segment *segment) {
    uint64_t end = segment->synced_end;
    uint64_t from = end > log->settled.head ? end : log->settled.head;
    /* What an earlier process wrote is not in the ring: it stays where it is, readable but never known to be durable. */
    if (!cps_log_is_power(log) || segment->retired || end == segment->end || cps_ring_low(log->ring) > from) return;
    CPS_CRASH_POINT("take-back-begin");
    while (log->store.last != segment) {
        cps_segment *last = log->store.last;
        cps_log_retire(log, last);
        last->end = last->base;
        last->overlong = true;
    }
    log->store.messages -= segment->messages - segment->synced_messages;
    segment->messages = segment->synced_messages;
    segment->message_bytes = segment->synced_message_bytes;
    if (segment->settled_messages > segment->messages) segment->settled_messages = segment->messages;
    if (segment->settled_bytes > segment->message_bytes) segment->settled_bytes = segment->message_bytes;
    segment->end = end;
    segment->overlong = true;
    log->settled.spilled = end;
    CPS_CRASH_POINT("take-back-done");
}

static cps_segment *overlong_one(const cps_log *log) {
    cps_segment *lists[] = {log->store.first, log->retired};
    for (size_t i = 0; i < 2; i++)
        for (cps_segment *s = lists[i]; s != NULL; s = s->next)
            if (s->overlong) return s;
    return NULL;
}

/* What was taken back, and is known to be, goes from the files too: dropped from the ring, it must not come back with the
 * next open.  Lets the lock go, and nothing is dropped meanwhile. */
void cps_log_cut_off(cps_log *log) {
    cps_segment *segment;
    bool spilling = log->spilling;
    while ((segment = overlong_one(log)) != NULL) {
        segment->overlong = false;
        segment->users++;
        log->spilling = true;
        (void)pthread_mutex_unlock(&log->lock);
        cps_segment_cut(segment);
        CPS_CRASH_POINT("cut-off");
        (void)pthread_mutex_lock(&log->lock);
        log->spilling = spilling;
        segment->users--;
    }
}

/* Make one segment durable; a full one is sealed.  Lets the lock go.  False: it failed. */
bool cps_log_sync_segment(cps_log *log, cps_segment *segment) {
    const cps_io *io = log->io;
    uint64_t end = segment->end, file_bytes = segment->file_bytes;
    bool seal = segment->full && !segment->sealed;
    segment->users++;
    (void)pthread_mutex_unlock(&log->lock);
    CPS_CRASH_POINT("sync-begin");
    enum cps_status status = seal ? cps_segment_seal(segment, &file_bytes) : cps_segment_sync(segment);
    CPS_CRASH_POINT("sync-data");
    if (status == CPS_OK && !segment->named) {
        status = io->sync_directory(io->context, log->directory, &segment->error);
        segment->poison = status; /* its bytes are safe, its name is not */
        segment->named = status == CPS_OK;
        CPS_CRASH_POINT("sync-named");
    }
    (void)pthread_mutex_lock(&log->lock);
    segment->users--;
    log->syncs++;
    if (status != CPS_OK) {
        cps_storage_failed(log, segment->error);
        cps_log_take_back(log, segment); /* does nothing where nothing was unsynced and only the footer failed */
        cps_log_give_up(log, segment);
        if (log->closing && log->last_tries > 0) { /* the ring has it again: once more, to another file */
            log->last_tries--;
            log->retry_at_ms = 0;
        }
    } else {
        segment->synced_end = end;
        segment->synced_messages = segment->messages;
        segment->synced_message_bytes = segment->message_bytes;
        segment->sealed = seal || segment->sealed;
        if (!segment->retired) cps_store_resize(&log->store, segment, file_bytes);
        if (log->storage == CPS_STORAGE_FAILED) cps_storage_works(log);
        if (log->storage == CPS_STORAGE_FULL && seal) log->retry_at_ms = 0; /* the file has shrunk: there may be room */
    }
    cps_log_normalise(log);
    cps_log_commit(log);
    CPS_CRASH_POINT("sync-committed");
    if (status != CPS_OK) cps_log_cut_off(log);
    return status == CPS_OK;
}

/* Seal a full segment that takes clearly more room than it needs.  Lets the lock go.  CPS_EMPTY: there is none; CPS_IO:
 * the storage failed. */
enum cps_status cps_log_shrink_one(cps_log *log) {
    for (cps_segment *s = log->store.first; s != NULL; s = s->next) {
        if (!s->full || s->sealed || s->poison != CPS_OK || s->end == s->base) continue;
        if (s->file_bytes <= cps_segment_sealed_bytes(s)) continue;
        return cps_log_sync_segment(log, s) ? CPS_OK : CPS_IO;
    }
    return CPS_EMPTY;
}

/* Remove one retired segment that nobody reads.  Lets the lock go.  False: there is none. */
bool cps_log_remove_one(cps_log *log) {
    cps_segment *segment = log->retired;
    while (segment != NULL && segment->users > 0) segment = segment->next;
    if (segment == NULL || cps_log_now(log) < log->remove_due_ms) return false;
    (void)pthread_mutex_unlock(&log->lock);
    CPS_CRASH_POINT("remove-begin");
    enum cps_status status =
        segment->kept_aside ? cps_quarantine_move(&log->quarantine, segment->path, segment->file_bytes, &segment->error)
                            : cps_segment_remove(segment);
    CPS_CRASH_POINT("remove-unlinked");
    (void)pthread_mutex_lock(&log->lock);
    if (status != CPS_OK) { /* a file system gone read-only: the file goes on counting against the quota */
        log->remove_due_ms = cps_log_now(log) + CPS_RETRY_MIN_MS;
        return false;
    }
    cps_segment **link = &log->retired; /* others may have come in front of it */
    while (*link != segment) link = &(*link)->next;
    *link = segment->next;
    log->retired_bytes -= segment->file_bytes;
    for (unsigned i = 0; i < CPS_VICTIMS; i++)
        if (log->settled.victims[i] == segment->base + 1) log->settled.victims[i] = 0;
    CPS_CRASH_POINT("remove-unlisted");
    cps_shared_commit_settled(log->home.shared, &log->settled);
    CPS_CRASH_POINT("remove-committed");
    cps_segment_close(segment);
    log->unlinked = true;
    if (log->storage == CPS_STORAGE_FULL) cps_storage_works(log);
    if (log->producers_waiting > 0) (void)pthread_cond_broadcast(&log->room);
    return true;
}

/* Everything before it is durable, or settled, or in a file that failed and will never be synced; only what is behind it
 * is worth a sync. */
uint64_t cps_log_confirmed(cps_log *log) {
    for (const cps_segment *s = cps_store_unsealed(&log->store); s != NULL; s = s->next) {
        if (s->poison != CPS_OK || s->synced_end == s->end || s->end <= log->settled.head) continue;
        return s->synced_end > log->settled.head ? s->synced_end : log->settled.head;
    }
    return cps_log_low(log);
}

/* The next segment to sync now: power mode and requests want all, otherwise full ones when they are old enough or many. */
cps_segment *cps_log_due_for_sync(cps_log *log, uint64_t now, bool all) {
    cps_segment *first = NULL;
    unsigned waiting = 0;
    for (cps_segment *s = cps_store_unsealed(&log->store); s != NULL; s = s->next) {
        if (s->sealed || s->poison != CPS_OK || s->end <= log->settled.head) continue;
        if (s->synced_end == s->end && !(s->full && all)) continue;
        if (all || (s->full && now >= s->unsynced_since_ms + log->config.seal_after_ms)) return s;
        if (first == NULL) first = s;
        if (s->full && ++waiting > CPS_UNSEALED_MAX) return first;
    }
    return NULL;
}
