/* The log: its life from open to close.  What it finds at open is counted in _log_account.c; producers and waiters are in
 * _log_write.c, the reader in _log_read.c. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "_log.h"

#include <signal.h>
#include <stdlib.h>
#include <time.h>

#include "_log_inside.h"

static CPS_MUST_CHECK enum cps_status join_path(char out[CPS_PATH_MAX], const char *directory, const char *name) {
    int n = snprintf(out, CPS_PATH_MAX, "%s/%s", directory, name);
    return n > 0 && n < CPS_PATH_MAX ? CPS_OK : CPS_TOO_LARGE;
}

static void init_waits(cps_log *log) {
    pthread_condattr_t attributes;
    CPS_ASSERT(pthread_mutex_init(&log->lock, NULL) == 0);
    CPS_ASSERT(pthread_condattr_init(&attributes) == 0);
    CPS_ASSERT(pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC) == 0); /* no time limit follows the wall clock */
    CPS_ASSERT(pthread_cond_init(&log->work, &attributes) == 0);
    CPS_ASSERT(pthread_cond_init(&log->room, &attributes) == 0);
    CPS_ASSERT(pthread_cond_init(&log->settled_moved, &attributes) == 0);
    (void)pthread_condattr_destroy(&attributes);
}

/* ---- forks ---- */

/* All logs, each from before its lock file is opened until after it is closed.  A child that inherits a lock file's handle
 * shares its lock, so whoever forks must know every one, also of a log that is just being opened or closed.  The mutex is
 * held for no more than opening or closing these files, and over a fork. */
static pthread_mutex_t logs_lock = PTHREAD_MUTEX_INITIALIZER;
static cps_log *logs;

static void before_fork(void) { (void)pthread_mutex_lock(&logs_lock); }
static void after_fork_in_parent(void) { (void)pthread_mutex_unlock(&logs_lock); }

/* Close the handles without touching anything that the parent sees. */
static void let_go(const cps_log *log) {
    const cps_io *io = log->io;
    if (log->lock_handle >= 0) io->close(io->context, log->lock_handle);
    if (log->home.handle >= 0) io->close(io->context, log->home.handle);
    if (!log->has_store) return;
    io->close(io->context, log->meta.handle);
    /* No lock is taken: another thread of the parent may have held it when the child was made.  The lists can be walked
     * at any moment, and a handle that was just being closed is already forgotten. */
    const cps_segment *lists[] = {log->store.first, log->retired};
    for (size_t i = 0; i < 2; i++)
        for (const cps_segment *s = lists[i]; s != NULL; s = s->next) {
            if (s->handle >= 0) io->close(io->context, s->handle);
            if (s->read_handle >= 0) io->close(io->context, s->read_handle);
        }
}

static void after_fork_in_child(void) {
    for (const cps_log *log = logs; log != NULL; log = log->next) let_go(log);
    logs = NULL; /* their numbers may be somebody else's when this child forks in turn */
    (void)pthread_mutex_unlock(&logs_lock);
}

static void watch_forks(void) { CPS_ASSERT(pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) == 0); }

static void enter_list(cps_log *log) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    (void)pthread_once(&once, watch_forks);
    (void)pthread_mutex_lock(&logs_lock);
    log->next = logs;
    logs = log;
    (void)pthread_mutex_unlock(&logs_lock);
}

static void leave_list(cps_log *log) {
    (void)pthread_mutex_lock(&logs_lock);
    cps_log **link = &logs;
    while (*link != log) link = &(*link)->next;
    *link = log->next;
    if (log->lock_handle >= 0) log->io->close(log->io->context, log->lock_handle);
    (void)pthread_mutex_unlock(&logs_lock);
}

static void close_home(cps_log *log, bool remove) {
    (void)pthread_mutex_lock(&logs_lock);
    cps_home_close(&log->home, remove);
    (void)pthread_mutex_unlock(&logs_lock);
}

static CPS_MUST_CHECK enum cps_status open_lock(cps_log *log, const char *path, int *error) {
    const cps_io *io = log->io;
    int handle = -1;
    (void)pthread_mutex_lock(&logs_lock);
    enum cps_status status = io->open(io->context, path, CPS_IO_ENSURE, &handle, error);
    if (status == CPS_OK) log->lock_handle = handle;
    (void)pthread_mutex_unlock(&logs_lock);
    return status;
}

/* Lock, meta file, segments. */
static CPS_MUST_CHECK enum cps_status open_store(cps_log *log, cps_opened *opened) {
    const cps_log_config *config = &log->config;
    const cps_io *io = log->io;
    char path[CPS_PATH_MAX];
    opened->where = "the lock file";
    enum cps_status status = join_path(path, config->directory, "lock");
    if (status == CPS_OK) status = open_lock(log, path, &opened->error);
    if (status != CPS_OK) return status;
    status = io->lock(io->context, log->lock_handle, &opened->error);
    if (status != CPS_OK) return status;
    CPS_CRASH_POINT("open-locked");
    opened->where = "the folder for segments";
    status = join_path(path, config->directory, "log");
    if (status == CPS_OK) status = io->make_directory(io->context, path, &opened->error);
    if (status != CPS_OK) return status;
    memcpy(log->directory, path, sizeof path);
    CPS_CRASH_POINT("open-folder");
    opened->where = "the meta file";
    status = join_path(path, config->directory, "meta");
    if (status == CPS_OK) status = cps_meta_open(io, path, &log->meta, &opened->meta_damaged, &opened->error);
    if (status != CPS_OK) return status;
    log->has_store = true;
    CPS_CRASH_POINT("open-meta");
    cps_meta *meta = &log->meta;
    opened->identity_bytes = meta->identity_bytes;
    memcpy(opened->identity, meta->identity, meta->identity_bytes);
    if (config->identity != NULL) {
        bool same = config->identity_bytes == meta->identity_bytes &&
                    memcmp(config->identity, meta->identity, meta->identity_bytes) == 0;
        if (meta->identity_bytes != 0 && !same && !config->adopt) return CPS_FOREIGN;
        if (config->identity_bytes > CPS_META_IDENTITY_MAX) return CPS_TOO_LARGE;
        meta->identity_bytes = config->identity_bytes;
        memcpy(meta->identity, config->identity, config->identity_bytes);
    }
    opened->where = "the segments";
    if (meta->epoch == 0 && cps_store_identify(io, log->directory, meta->spool_id, &meta->epoch))
        opened->meta_damaged = true; /* lost, rather: the segments tell whose they are and what may not be used again */
    status = cps_quarantine_open(&log->quarantine, io, config->directory, config->spool_bytes_max / CPS_QUARANTINE_SHARE);
    if (status != CPS_OK) return status;
    return cps_store_recover(&log->store, io, log->directory, meta->spool_id, &log->quarantine, &opened->recovery,
                             &opened->error);
}

/* Segments that were dropped and counted, but whose removal nobody saw. */
static void finish_drops(cps_log *log, cps_opened *opened) {
    for (unsigned i = 0; i < CPS_VICTIMS; i++) {
        uint64_t base = log->settled.victims[i] - 1;
        cps_segment *segment = log->settled.victims[i] != 0 ? cps_store_find(&log->store, base) : NULL;
        if (segment == NULL || segment->base != base) {
            log->settled.victims[i] = 0;
            continue;
        }
        opened->recovery.scan.records -= segment->messages;
        cps_log_retire(log, segment);
    }
}

static uint64_t next_block(uint64_t position) { return (position / CPS_POSITION_BLOCK + 1) * CPS_POSITION_BLOCK; }

/* Segments that the killed process was writing: the ring still has what they hold from `spilled` on, and nobody knows
 * whether a write or a sync of theirs had failed.  So that part is written anew, to another file. */
static CPS_MUST_CHECK enum cps_status forget_unsaid(cps_log *log, cps_opened *opened) {
    uint64_t from = cps_log_low(log);
    enum cps_status status = CPS_OK;
    while (status == CPS_OK && log->store.last != NULL && log->store.last->end > from) {
        cps_segment *last = log->store.last;
        cps_store_take(&log->store, last);
        opened->recovery.scan.records -= last->messages;
        if (last->base < from) status = cps_segment_trim(last, from, &log->scratch, &opened->error);
        if (last->base < from) opened->recovery.scan.records += last->messages;
        if (status == CPS_OK && last->base < from && last->end > last->base) {
            cps_segment_cut(last); /* the ring may drop what was behind it, and then it must not come back */
            CPS_CRASH_POINT("adopt-cut");
            cps_store_add(&log->store, last);
            break;
        }
        if (status != CPS_OK) {
            cps_segment_close(last);
            break;
        }
        /* Nothing that stands before it can be read: what is kept aside ends there all the same. */
        last->kept_aside = last->base < from;
        last->end = last->kept_aside ? from : last->base;
        cps_segment_cut(last);
        last->end = last->base;
        cps_log_discard(log, last);
    }
    return status;
}

/* Take over the ring that the last process left, if it is the last one's.  CPS_OK; CPS_EMPTY: there is none; CPS_LOCKED;
 * CPS_IO; CPS_NO_MEMORY. */
static CPS_MUST_CHECK enum cps_status adopt_ring(cps_log *log, cps_opened *opened) {
    const cps_log_config *config = &log->config;
    if (config->ring_directory == NULL || !log->has_store) return CPS_EMPTY;
    (void)pthread_mutex_lock(&logs_lock); /* its file is locked too */
    enum cps_status status = cps_home_find(log->io, config->ring_directory, log->meta.spool_id, log->meta.generation,
                                           &log->home, &opened->error);
    (void)pthread_mutex_unlock(&logs_lock);
    if (status != CPS_OK) return status;
    cps_produced produced;
    cps_shared_read_produced(log->home.shared, &produced);
    cps_shared_read_settled(log->home.shared, &log->settled);
    cps_shared_read_ledger(log->home.shared, &log->ledger);
    cps_ledger_tame(&log->ledger);
    cps_log_tame_ahead(&log->settled, produced.published);
    uint64_t disk_end = log->store.last != NULL ? log->store.last->end : 0;
    if (disk_end > produced.published) { /* the disk knows more: not the ring of the last process after all */
        close_home(log, false);
        return CPS_EMPTY;
    }
    opened->ring_adopted = true;
    CPS_CRASH_POINT("adopt-found");
    return forget_unsaid(log, opened);
}

/* No ring survived: what is on the disk is all there is, and positions start where none was ever issued. */
static CPS_MUST_CHECK enum cps_status start_ring(cps_log *log, cps_opened *opened) {
    const cps_log_config *config = &log->config;
    uint64_t start = log->meta.next_position;
    uint64_t disk_end = log->store.last != NULL ? log->store.last->end : 0;
    if (disk_end > start) start = next_block(disk_end);
    log->settled = log->meta.settled;
    log->ledger = log->meta.ledger;
    if (log->settled.head > start) log->settled.head = start;
    if (opened->meta_damaged) log->settled.head = log->store.first != NULL ? log->store.first->base : start;
    log->settled.spilled = start;
    if (opened->meta_damaged) log->settled.ahead_count = 0;
    cps_log_tame_ahead(&log->settled, start);
    if (!opened->clean) cps_ledger_doubt(&log->ledger, log->settled.head, start);
    const char *directory = config->durability != CPS_DURABILITY_MEMORY && log->has_store ? config->ring_directory : NULL;
    enum cps_status status = CPS_UNKNOWN;
    (void)pthread_mutex_lock(&logs_lock);
    if (directory != NULL)
        status = cps_home_make(log->io, directory, log->meta.spool_id, config->ring_bytes, start, &log->home,
                               &opened->error);
    if (status != CPS_OK) /* no tmpfs to be had: plain memory, and the caller says so to the user */
        status = cps_home_make(log->io, NULL, log->meta.spool_id, config->ring_bytes, start, &log->home, &opened->error);
    (void)pthread_mutex_unlock(&logs_lock);
    return status;
}

/* Durably: this open, its generation, and a block of positions that it may issue. */
static CPS_MUST_CHECK enum cps_status save_opening(cps_log *log, cps_opened *opened) {
    cps_meta *meta = &log->meta;
    cps_produced produced;
    cps_shared_read_produced(log->home.shared, &produced);
    uint64_t current = meta->generation;
    do log->io->random(log->io->context, &meta->generation, sizeof meta->generation);
    while (meta->generation == 0); /* 0 means none */
    cps_home_announce(&log->home, current, meta->generation);
    log->reserved_end = next_block(produced.published) + CPS_POSITION_BLOCK;
    meta->epoch = log->epoch;
    meta->next_position = log->reserved_end < CPS_NEXT_POSITION_MAX ? log->reserved_end
                                                                    : CPS_NEXT_POSITION_MAX - CPS_RECORD_ALIGN;
    meta->clean = false;
    meta->produced = produced;
    meta->settled = log->settled;
    meta->ledger = log->ledger;
    opened->where = "the meta file";
    CPS_CRASH_POINT("opening-announced");
    enum cps_status status = cps_meta_save(meta, true);
    CPS_CRASH_POINT("opening-saved");
    /* Twice, so that no slot is left from before this open: it may say "clean", and a bit may flip in the newer one. */
    if (status == CPS_OK) status = cps_meta_save(meta, true);
    CPS_CRASH_POINT("opening-saved-twice");
    opened->error = meta->error;
    if (status == CPS_OK)
        status = log->io->sync_directory(log->io->context, log->config.directory, &opened->error);
    CPS_CRASH_POINT("opening-named");
    /* The names of files that a killed process had sealed may not be durable yet. */
    if (status == CPS_OK) status = log->io->sync_directory(log->io->context, log->directory, &opened->error);
    CPS_CRASH_POINT("opening-segments-named");
    if (status == CPS_OK) cps_home_commit(&log->home, meta->generation);
    return status;
}

void cps_log_reserved(cps_log *log, uint64_t end) {
    log->reserved_end = end;
    cps_ring_bound(log->ring, end < CPS_POSITION_MAX ? end : CPS_POSITION_MAX); /* behind that no reader takes a record */
    if (log->producers_waiting > 0) (void)pthread_cond_broadcast(&log->room);
}

static void release(cps_log *log, bool remove_home) {
    bool has_store = log->has_store;
    log->has_store = false; /* a child that is forked from here on closes the lock and leaks the rest at worst */
    CPS_CRASH_POINT("release-begin");
    if (log->ring != NULL) cps_ring_close(log->ring);
    close_home(log, remove_home);
    cps_store_close(&log->store);
    while (log->retired != NULL) {
        cps_segment *segment = log->retired;
        log->retired = segment->next;
        (void)!cps_segment_remove(segment); /* if it stays, the next open finds it settled */
        cps_segment_close(segment);
    }
    CPS_CRASH_POINT("release-files");
    if (has_store) cps_meta_close(&log->meta);
    CPS_CRASH_POINT("release-meta");
    leave_list(log); /* and close the lock.  Last: the spool is free from here on */
    cps_scratch_close(&log->scratch);
    free(log->staging);
    (void)pthread_cond_destroy(&log->settled_moved);
    (void)pthread_cond_destroy(&log->room);
    (void)pthread_cond_destroy(&log->work);
    (void)pthread_mutex_destroy(&log->lock);
    free(log);
}

static CPS_MUST_CHECK enum cps_status start_flusher(cps_log *log) {
    log->staging_bytes = CPS_STAGING_BYTES;
    if (log->staging_bytes < cps_ring_record_max(log->home.ring_bytes))
        log->staging_bytes = (size_t)cps_ring_record_max(log->home.ring_bytes);
    log->staging = malloc(log->staging_bytes);
    if (log->staging == NULL) return CPS_NO_MEMORY;
    sigset_t all, before; /* signals are for the threads that the program knows of */
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    log->flusher_runs = pthread_create(&log->flusher, NULL, cps_flusher_run, log) == 0;
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return log->flusher_runs ? CPS_OK : CPS_NO_MEMORY;
}

static CPS_MUST_CHECK enum cps_status open_all(cps_log *log, cps_opened *opened) {
    enum cps_status status = CPS_OK;
    if (log->config.directory != NULL) status = open_store(log, opened);
    if (status != CPS_OK) return status;
    memcpy(opened->spool_id, log->meta.spool_id, sizeof opened->spool_id);
    opened->clean = log->meta.clean || log->meta.epoch == 0;
    log->epoch = log->meta.epoch + 1;
    opened->where = "the ring";
    CPS_CRASH_POINT("open-store");
    status = adopt_ring(log, opened);
    bool adopted = status == CPS_OK;
    if (status == CPS_EMPTY) status = start_ring(log, opened);
    CPS_CRASH_POINT("open-ring");
    if (status == CPS_OK) finish_drops(log, opened);
    CPS_CRASH_POINT("open-drops");
    if (status == CPS_OK) status = cps_log_count(log, &opened->error);
    if (status != CPS_OK) return status;
    opened->ring_in_file = log->home.in_file;
    CPS_CRASH_POINT("open-counted");
    cps_log_start_counters(log, adopted);
    CPS_CRASH_POINT("open-balanced");
    if (log->has_store) status = save_opening(log, opened);
    if (status != CPS_OK) return status;
    opened->where = "memory";
    status = cps_ring_open(log->home.ring, log->home.ring_bytes, log->home.shared, log->epoch, cps_log_low(log),
                           &log->ring);
    if (status != CPS_OK) return status;
    if (log->has_store) cps_log_reserved(log, log->reserved_end);
    log->sent = log->settled.head;
    log->dup_below = log->settled.sent_max;
    for (uint64_t i = 0; i < log->settled.ahead_count; i++) log->ahead_dup_below[i] = log->settled.ahead[i].sent;
    log->ahead_moved = log->settled.ahead_count > 0;
    log->storage = log->has_store ? CPS_STORAGE_OK : CPS_STORAGE_NONE;
    log->checkpoint_head = log->settled.head;
    (void)pthread_mutex_lock(&log->lock);
    CPS_CRASH_POINT("open-reading");
    cps_log_reconcile(log);
    CPS_CRASH_POINT("open-reconciled");
    cps_log_normalise(log);
    cps_log_commit(log);
    /* What a killed process told.  no model: as in cps_shared_tell_storage */
    atomic_store_explicit(&log->home.shared->outlook, 0, memory_order_relaxed);
    cps_shared_tell_storage(log->home.shared, log->storage, 0);
    CPS_CRASH_POINT("open-committed");
    (void)pthread_mutex_unlock(&log->lock);
    uint64_t ignored;
    if (adopted) opened->ring_messages = cps_log_count_ring(log, cps_log_low(log), &ignored);
    return log->has_store ? start_flusher(log) : CPS_OK;
}

enum cps_status cps_log_open(const cps_log_config *config, cps_log **out, cps_opened *opened) {
    memset(opened, 0, sizeof *opened);
    cps_log *log = calloc(1, sizeof *log);
    if (log == NULL) return CPS_NO_MEMORY;
    log->config = *config;
    log->io = config->io;
    log->lock_handle = log->home.handle = -1;
    init_waits(log);
    enter_list(log);
    enum cps_status status = open_all(log, opened);
    log->config.directory = log->config.ring_directory = NULL; /* were borrowed */
    log->config.identity = NULL;
    if (status != CPS_OK) {
        release(log, !opened->ring_adopted && log->home.in_file);
        return status;
    }
    *out = log;
    return CPS_OK;
}

void cps_log_shut(cps_log *log) {
    cps_ring_shut(log->ring);
    (void)pthread_mutex_lock(&log->lock);
    CPS_CRASH_POINT("shut");
    log->shut = true;
    (void)pthread_cond_broadcast(&log->room);
    (void)pthread_cond_broadcast(&log->settled_moved);
    (void)pthread_mutex_unlock(&log->lock);
}

bool cps_log_finish(cps_log *log, uint64_t timeout_ms) {
    uint64_t deadline = cps_log_after(log, timeout_ms);
    cps_log_shut(log);
    (void)pthread_mutex_lock(&log->lock);
    if (log->reading != NULL) log->reading->users--;
    log->reading = NULL;
    if (!log->closing) log->last_tries = CPS_LAST_TRIES;
    log->closing = true;
    log->retry_at_ms = 0; /* a storage that failed gets one more chance */
    (void)pthread_cond_broadcast(&log->work);
    while (log->flusher_runs && !log->stopped)
        if (!cps_log_timed_wait(log, &log->settled_moved, deadline)) break;
    bool finished = !log->flusher_runs || log->stopped;
    (void)pthread_mutex_unlock(&log->lock);
    return finished;
}

/* A ring whose records or counters are nowhere else stays for the next open. */
static void end(cps_log *log, uint64_t unsaved) {
    CPS_CRASH_POINT("close-stopped");
    release(log, (unsaved == 0 && log->told) || !log->has_store);
}

void cps_log_end(cps_log *log) {
    uint64_t ignored;
    (void)pthread_mutex_lock(&log->lock);
    uint64_t unsaved = cps_log_count_ring(log, cps_log_low(log), &ignored);
    (void)pthread_mutex_unlock(&log->lock);
    end(log, unsaved);
}

void cps_log_close(cps_log *log, uint64_t timeout_ms, uint64_t *unsaved) {
    (void)cps_log_finish(log, timeout_ms);
    (void)pthread_mutex_lock(&log->lock);
    bool finished = !log->flusher_runs || log->stopped; /* it may have come to that just now */
    uint64_t ignored;
    uint64_t from = cps_log_low(log), held = cps_ring_low(log->ring);
    if (held < log->settled.head) held = log->settled.head;
    bool is_power = log->config.durability == CPS_DURABILITY_POWER;
    if (!finished && is_power && held < from) from = held; /* written, and not confirmed */
    *unsaved = cps_log_count_ring(log, from, &ignored);
    if (!finished) {
        /* The disk takes longer, or hangs.  The flusher still uses everything, and is the owner from here on: when it is
         * through it ends the log.  Nothing may be touched when the lock is open. */
        log->config.notify = NULL; /* whom it would tell is gone when we return */
        log->left = true;
        (void)pthread_detach(log->flusher);
    }
    (void)pthread_mutex_unlock(&log->lock);
    if (!finished) return;
    if (log->flusher_runs) (void)pthread_join(log->flusher, NULL);
    end(log, *unsaved);
}

void cps_log_check(cps_log *log) {
    (void)pthread_mutex_lock(&log->lock);
    uint64_t published = cps_ring_published(log->ring);
    CPS_ASSERT(log->settled.head <= log->sent);
    CPS_ASSERT(log->sent <= published);
    uint64_t at = log->settled.head;
    for (uint64_t i = 0; i < log->settled.ahead_count; i++) {
        const cps_ahead *one = &log->settled.ahead[i];
        bool is_live = log->is_split && i + 1 == log->settled.ahead_count;
        CPS_ASSERT(one->first > at || (is_live && one->first == at));
        CPS_ASSERT(one->end > one->first || (is_live && one->end == one->first));
        CPS_ASSERT(one->end <= one->sent && one->sent <= published);
        for (const cps_segment *s = log->store.first; s != NULL; s = s->next)
            CPS_ASSERT(s->base >= one->first || s->end <= one->first);
        at = one->end;
    }
    CPS_ASSERT(!log->is_split || (log->settled.ahead_count > 0 && log->live >= at && log->live <= published));
    CPS_ASSERT(!log->is_split || log->sent <= cps_log_live_first(log));
    CPS_ASSERT(cps_log_low(log) <= published);
    CPS_ASSERT(cps_log_synced(log) <= cps_log_low(log));
    CPS_ASSERT(cps_ring_low(log->ring) <= cps_log_low(log));
    cps_store_check(&log->store);
    cps_ring_check(log->ring);
    (void)pthread_mutex_unlock(&log->lock);
}
