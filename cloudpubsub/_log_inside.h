/* Inside of the log, shared by _log.c (life), _log_account.c (what is found at open), _log_ahead.c (what is settled ahead of
 * the head), _log_write.c (producers, waiters), _log_read.c (reader), _flusher.c and _log_files.c (the thread that writes to the disk) only. */
#ifndef CPS_LOG_INSIDE_H
#define CPS_LOG_INSIDE_H

#include <pthread.h>

#include "_home.h"
#include "_log.h"
#include "_meta.h"
#include "_quarantine.h"

enum {
    CPS_LOSSES_MAX = 64,
    CPS_LOSSES_KNOWN = 256, /* remembered for cps_log_outcome */
    CPS_PIN_FLUSHER = 0,
    CPS_PIN_READER = 1,
    CPS_STAGING_BYTES = 256 * 1024,
    CPS_READ_TRIES = 3, /* at least a second apart */
    CPS_LAST_TRIES = 2,
    CPS_QUARANTINE_SHARE = 16, /* of the quota */
    CPS_UNSEALED_MAX = 64, /* full segments that may wait for their sync: each has a file open */
    CPS_STREAMS = 2,       /* with is_split: 0 the backlog's, 1 the live one */
};
#define CPS_RETRY_MIN_MS 1000u
#define CPS_RETRY_MAX_MS 60000u
#define CPS_CHECKPOINT_MS 1000u

struct cps_log {
    cps_log_config config; /* strings in it are gone after open */
    const cps_io *io;
    bool has_store;
    char directory[CPS_PATH_MAX];
    int lock_handle; /* -1: none */
    struct cps_log *next; /* of all that are open in this process */
    cps_home home;
    cps_ring *ring;
    uint32_t epoch;
    _Atomic uint64_t stamp_tick_ms; /* see stamp_now in _log_write.c */
    _Atomic uint64_t stamp_ms;

    pthread_mutex_t lock; /* guards everything below but what is said to be somebody's own */
    pthread_cond_t work;    /* the flusher waits for something to do */
    pthread_cond_t room;    /* producers wait for room in the ring */
    pthread_cond_t settled_moved; /* waiters for head, synced and the end of the flusher */

    cps_settled settled; /* the truth; each change is committed to the shared page */
    uint64_t sent;       /* also covers what the reader holds right now */
    uint64_t dup_below;  /* what lies below it may have been sent before the last rewind */
    bool is_split;       /* the last range of `settled.ahead` is the live stream's, which goes on at `live`; changed by the
                            reader alone, with the lock held */
    uint64_t live;       /* with is_split: as `sent`; [end of that range, live) is in flight */
    uint64_t ahead_dup_below[CPS_AHEAD_MAX]; /* as `dup_below`, of what stands behind each range */
    bool ahead_moved;    /* a range grew: segments may lie in it as a whole */

    cps_store store;
    cps_quarantine quarantine; /* without the lock: the reader copies, the flusher moves files */
    cps_segment *active;  /* flusher's; NULL: the next batch starts a new one */
    cps_segment *retired; /* out of the store, to be removed when nobody reads them */
    uint64_t retired_bytes; /* of their files, which still count against the quota */
    uint64_t remove_due_ms; /* when removing may be tried again after it failed */
    bool unlinked;          /* the directory is to be synced for a removal */
    bool vain_drops;        /* dropping did not help: what is missing is not what our files take */
    bool stalled;           /* the flusher hangs in the disk; cleared when it comes back */
    uint32_t serial;
    bool spilling; /* the flusher is copying or writing: the low end of the ring may not be dropped */
    uint64_t spill_goal; /* somebody wants everything below it on the disk */
    uint64_t sync_goal;  /* ... and durable */
    unsigned producers_waiting;
    enum cps_storage storage;
    int storage_error;
    uint64_t retry_at_ms;
    uint64_t retry_delay_ms;

    bool link_up;
    uint64_t offline_goal; /* where the log ended when that clock was started */
    uint64_t offline_due_ms; /* when what the ring holds is to be spilled for want of a link; 0: not set */
    uint64_t sync_due_ms;    /* power mode: next group commit; 0: nothing to commit */
    uint64_t checkpoint_due_ms;
    bool checkpoint_timed; /* the flusher will look at the cursor by itself */
    uint64_t checkpoint_head;
    uint64_t checkpoint_ahead; /* end of the last range then */
    cps_meta meta; /* the flusher's own while it runs */
    uint64_t reserved_end; /* positions below it are reserved in the meta file, and may be issued */
    uint64_t reserve_due_ms; /* when reserving may be tried again */

    bool shut;    /* no new records */
    bool closing; /* the flusher is to finish */
    unsigned last_tries; /* ... and may try again so often when a sync fails */
    bool stopped; /* it has */
    bool told;    /* ... and its last cursors and counters are in the meta file */
    bool left;    /* by whoever closed, who could not wait: the flusher is the owner, alone, and ends the log */
    pthread_t flusher;
    bool flusher_runs;
    uint8_t *staging; /* flusher's own */
    size_t staging_bytes;

    cps_loss losses[CPS_LOSSES_MAX]; /* not yet taken */
    size_t losses_used;
    cps_ledger ledger;
    bool ledger_moved;   /* since it was last in the shared page */
    bool ledger_unsaved; /* since it was last in the meta file */
    cps_loss known[CPS_LOSSES_KNOWN]; /* ring of the last ones */
    size_t known_next;
    uint64_t damaged_ranges;
    uint64_t damaged_bytes;
    uint64_t estimated_messages; /* lost to damage, by estimate; see cps_log_commit */
    uint64_t estimated_bytes;
    uint64_t spilled_bytes;
    uint64_t syncs;

    /* Reader's own. */
    cps_segment *reading; /* held as a user until the reader moves on */
    bool reading_ring;    /* the pin is set */
    bool reading_live;    /* the last batch was of the live stream */
    uint64_t read_from;
    struct {
        uint64_t from; /* the last batch from the disk ended in pads, which nobody settles: [from, end) */
        uint64_t end;
    } pads[CPS_STREAMS];
    cps_scratch scratch;
    unsigned read_failures;
    uint64_t read_failed_ms; /* when the last of them was counted */
};

/* All of these: with the log's lock held. */

static inline uint64_t cps_log_low(const cps_log *log) { /* lowest position that has its home in the ring */
    return log->settled.head > log->settled.spilled ? log->settled.head : log->settled.spilled;
}

static inline cps_ahead *cps_log_live_range(cps_log *log) { /* with is_split */
    return &log->settled.ahead[log->settled.ahead_count - 1];
}

static inline uint64_t cps_log_live_first(const cps_log *log) { /* where the live stream begins; without one, never */
    return log->is_split ? log->settled.ahead[log->settled.ahead_count - 1].first : UINT64_MAX;
}

/* Up to where a stream was read.  `live` means nothing where there is one stream. */
static inline uint64_t *cps_log_cursor(cps_log *log, bool live) { return live && log->is_split ? &log->live : &log->sent; }

/* A batch from the disk may end in pads whose record was lost with the ring: they are settled with what stands before. */
static inline uint64_t cps_log_over_pads(cps_log *log, bool live, uint64_t settled_to) {
    unsigned stream = live && log->is_split;
    bool is_there = settled_to == log->pads[stream].from && *cps_log_cursor(log, live) == log->pads[stream].end;
    return is_there ? log->pads[stream].end : settled_to;
}

/* What is settled ahead of the head, in _log_ahead.c. */

/* What a file or a killed process says of ranges: forget all of them unless they can be true.  None of them ends above `limit`. */
void cps_log_tame_ahead(cps_settled *settled, uint64_t limit);
uint64_t cps_log_over_ahead(const cps_log *log, uint64_t position); /* the end of the range that it lies in, or itself */
uint64_t cps_log_next_ahead(const cps_log *log, uint64_t position); /* where the next range behind it begins; UINT64_MAX */
uint64_t cps_log_settled_in(const cps_log *log, const cps_segment *segment); /* up to there, from its base on */
void cps_log_pass_ahead(cps_log *log); /* cursors pass over ranges; segments in them retire */
void cps_log_join(cps_log *log);       /* the reader's: one stream again, where the head has come to the live one */

static inline bool cps_log_is_settled(const cps_log *log, uint64_t position) {
    return position < log->settled.head || (log->settled.ahead_count > 0 && cps_log_over_ahead(log, position) != position);
}

void cps_log_commit(cps_log *log);     /* publish `settled` to the shared page; free the ring; wake who waits for it */
uint64_t cps_log_next(const cps_log *log, uint64_t position); /* where the next record at or behind it stands */
void cps_log_normalise(cps_log *log);  /* head passes over holes; drained segments retire */
void cps_log_lose(cps_log *log, uint64_t first, uint64_t end, uint64_t messages, uint64_t bytes, enum cps_reason reason);
uint64_t cps_log_synced(const cps_log *log);
cps_segment *cps_log_victim(const cps_log *log); /* oldest one with nothing in flight; NULL: there is none */
void cps_log_drop_segment(cps_log *log, cps_segment *victim);
void cps_log_retire(cps_log *log, cps_segment *segment); /* out of the log; the flusher removes it when nobody holds it */
void cps_log_discard(cps_log *log, cps_segment *segment); /* the same for one that is not in the store */
void cps_log_leave_segment(cps_log *log); /* the reader's; lets the lock go */
bool cps_log_hopeless(const cps_log *log, uint64_t goal); /* a file below `goal` will never be synced */
uint64_t cps_log_after(const cps_log *log, uint64_t timeout_ms); /* a deadline */
uint64_t cps_log_age_ms(const cps_log *log, uint64_t position); /* of the record there, or about; 0 if it is not known */
void cps_log_reserved(cps_log *log, uint64_t end); /* positions below it may be issued, now that the meta file says so */
bool cps_log_timed_wait(cps_log *log, pthread_cond_t *condition, uint64_t deadline_ms); /* false: it has passed */

/* What is counted at open, in _log_account.c. */

/* Before the counters are there: what is settled of each segment, and what was lost there and counted before.  CPS_OK;
 * CPS_NO_MEMORY. */
CPS_MUST_CHECK enum cps_status cps_log_count(cps_log *log, int *error);

/* The counters of this open: those that lie beside the ring, if it was `adopted`, else those of the last checkpoint, made to
 * agree with what is there. */
void cps_log_start_counters(cps_log *log, bool adopted);

/* With the lock held: what counters, ledger and files say must agree. */
void cps_log_reconcile(cps_log *log);

/* With the lock held: messages of the ring from `from` on, and their bytes. */
uint64_t cps_log_count_ring(cps_log *log, uint64_t from, uint64_t *bytes);

void *cps_flusher_run(void *log);
void cps_log_end(cps_log *log); /* for the flusher of a log that was left to it, as its last act; without the lock */

/* What the flusher does with files, in _log_files.c.  All of these: with the log's lock held, by the flusher. */

static inline uint64_t cps_log_now(const cps_log *log) { return log->io->monotonic_ms(log->io->context); }

static inline bool cps_log_is_power(const cps_log *log) { return log->config.durability == CPS_DURABILITY_POWER; }

void cps_storage_is(cps_log *log, enum cps_storage storage); /* from any thread; a change is told */
void cps_storage_failed(cps_log *log, int error); /* it is tried again, later and later */
void cps_storage_full(cps_log *log);              /* until a segment goes */
void cps_storage_works(cps_log *log);
void cps_log_give_up(cps_log *log, cps_segment *segment);
void cps_log_take_back(cps_log *log, cps_segment *segment);
void cps_log_cut_off(cps_log *log);                                 /* lets the lock go */
bool cps_log_sync_segment(cps_log *log, cps_segment *segment);      /* lets the lock go */
CPS_MUST_CHECK enum cps_status cps_log_shrink_one(cps_log *log);    /* lets the lock go */
bool cps_log_remove_one(cps_log *log);                              /* lets the lock go */
uint64_t cps_log_confirmed(cps_log *log);
cps_segment *cps_log_due_for_sync(cps_log *log, uint64_t now, bool all);


#endif
