/* The log: ring and segments as one endless sequence of records, with its cursors, limits and policies.
 *
 *     head ───────────── spilled ─────────────────────────── published
 *       │   disk segments    │          memory ring               │
 *
 * Always: head <= sent <= published, head <= max(head, spilled) <= published; the ring holds
 * [max(head, spilled), published), in power mode [max(head, synced), published).  A few ranges behind the head can be settled
 * too (_log_ahead.c).
 *
 * Threads: `append` from any; `wait_*`, `stats`, `link`, `spill` from any; the functions under "reader" from one thread at a
 * time, the reader (publisher thread or owner of a Spool).  A native thread of its own, the flusher, does all writing to
 * the disk.  Two locks: the ring's (producers) and the log's (everything else), taken in the order log, ring; neither
 * is held across input, output or a callback but `notify`, which must not block or call back.
 * Owns: ring, home, meta file, segments, flusher.  Never: touches Python, MQTT or sockets; installs signal handlers. */
#ifndef CPS_LOG_H
#define CPS_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "_io.h"
#include "_ring.h"
#include "_status.h"
#include "_store.h"

typedef struct cps_log cps_log;

enum cps_durability { CPS_DURABILITY_MEMORY, CPS_DURABILITY_PROCESS, CPS_DURABILITY_POWER };
enum cps_on_full { CPS_ON_FULL_DROP_OLDEST, CPS_ON_FULL_DROP_NEWEST, CPS_ON_FULL_BLOCK, CPS_ON_FULL_RAISE };
enum cps_storage {
    CPS_STORAGE_NONE,   /* memory only */
    CPS_STORAGE_OK,
    CPS_STORAGE_FULL,   /* a limit that the user set refuses more */
    CPS_STORAGE_FAILED, /* the operating system refuses; tried again with back-off */
};
enum cps_reason { /* why records ended without an acknowledgement */
    CPS_REASON_QUOTA,      /* drop_oldest, spool limit */
    CPS_REASON_RING_FULL,  /* drop_oldest, no storage to spill to */
    CPS_REASON_REFUSED,    /* drop_newest */
    CPS_REASON_DAMAGED,    /* bytes on the disk failed their checksum */
    CPS_REASON_UNREADABLE, /* the file cannot be read any more */
    CPS_REASON_EXPIRED,    /* its time to live was over before it could be sent */
    CPS_REASON_DEAD,       /* in the dead letters: counted apart, and not in the ledger */
    CPS_REASONS,
};
#define CPS_NO_LIMIT_MS UINT64_MAX
#define CPS_REFUSED_POSITION 0x8000000000000000u /* positions from here on name refused messages, never records */
#define CPS_POSITION_BLOCK 0x10000000000u        /* 2^40: reserved by one durable write */

typedef struct cps_log_config { /* strings are borrowed for the call of open only */
    const cps_io *io;           /* outlives the log, and the flusher of one whose close could not wait for it */
    const char *directory;      /* must exist; NULL: memory only */
    const char *ring_directory; /* on tmpfs; NULL: the ring is plain memory */
    const uint8_t *identity;    /* client id; NULL: take any spool as it is */
    uint16_t identity_bytes;
    bool adopt; /* take over a spool of another identity */
    enum cps_durability durability;
    enum cps_on_full on_full;
    uint64_t ring_bytes;
    uint64_t segment_bytes;
    uint64_t spool_bytes_max;
    uint64_t spool_messages_max; /* 0: no limit */
    uint64_t min_free_bytes; /* that a new segment leaves to others on the file system */
    uint64_t spill_after_ms;
    uint64_t spill_timeout_ms;
    uint64_t block_timeout_ms; /* CPS_NO_LIMIT_MS: until room comes */
    uint64_t sync_interval_ms;
    uint64_t sync_bytes; /* power mode: a group commit at the latest when so many wait for it; 0: no limit */
    uint64_t seal_after_ms; /* how long a full segment may stay unsynced outside power mode */
    /* Data was published while the reader was armed (`data_came`), or a loss waits, or the storage is another way; may be
     * NULL. */
    void (*notify)(void *user, bool data_came);
    void *notify_user;
} cps_log_config;

typedef struct cps_opened { /* what open found, or why it failed */
    cps_recovery recovery;
    uint64_t ring_messages; /* found in the ring that a killed process left */
    bool ring_adopted;
    bool ring_in_file;
    bool clean;        /* the last close was clean, or this is a new spool */
    bool meta_damaged; /* the meta file was unusable and made anew */
    int error;         /* errno of CPS_IO */
    const char *where; /* what could not be opened: a literal */
    uint8_t spool_id[16]; /* zeros without a directory */
    uint16_t identity_bytes;
    uint8_t identity[1024]; /* the spool's, with CPS_FOREIGN */
} cps_opened;

typedef struct cps_loss {
    uint64_t first; /* range of positions [first, end) */
    uint64_t end;
    uint64_t messages;
    uint64_t bytes;
    enum cps_reason reason;
} cps_loss;

typedef struct cps_log_stats {
    cps_produced produced;
    cps_settled settled;
    uint64_t sent;
    uint64_t synced;
    uint64_t ring_bytes;
    uint64_t ring_used_bytes;
    uint64_t spool_bytes;
    uint64_t spool_segments;
    uint64_t spool_messages;
    uint64_t pending_messages;
    uint64_t pending_bytes;
    uint64_t oldest_age_ms; /* of the oldest pending record; 0 if there is none or it is not known */
    uint64_t spilled_bytes; /* written to segments since open */
    uint64_t syncs;         /* since open */
    uint64_t damaged_ranges;
    uint64_t damaged_bytes;
    uint64_t quarantine_bytes;
    uint64_t expired_messages; /* of those dropped; over the life of the spool */
    uint64_t uncertain_first; /* see _ledger.h */
    uint64_t uncertain_end;
    enum cps_storage storage;
    int storage_error; /* errno of the last failure */
} cps_log_stats;

/* CPS_OK; CPS_LOCKED; CPS_FOREIGN; CPS_IO; CPS_DAMAGED: something is not a file; CPS_NO_MEMORY; CPS_TOO_LARGE.
 * `opened` is always written. */
CPS_MUST_CHECK enum cps_status cps_log_open(const cps_log_config *config, cps_log **out, cps_opened *opened);

/* Refuse new records, wake all waiters, spill and seal what is pending, stop the flusher: at most `timeout_ms`.
 * `*unsaved` is the number of messages that are in no file yet.  The log is gone afterwards: it may not be used again, and
 * `notify` is not called again.  Where the time was too short, or the disk hangs, the flusher goes on alone: it saves
 * what it can, then frees the log and lets go of the spool, which cannot be opened until then; it uses `io` all that time.
 * No other call may be in progress (cps_log_shut first). */
void cps_log_close(cps_log *log, uint64_t timeout_ms, uint64_t *unsaved);

/* The first part of cps_log_close, for a last look at losses and statistics before the log is gone.  False: time was too
 * short for the disk. */
bool cps_log_finish(cps_log *log, uint64_t timeout_ms);

/* Refuse new records and end all waits with CPS_CLOSED; the reader goes on. */
void cps_log_shut(cps_log *log);

/* ---- producers ---- */

typedef struct cps_patience { /* of one append, over several calls; zeros but for `slice_ms` to begin with */
    uint64_t slice_ms; /* how long one call may wait; CPS_NO_LIMIT_MS: to the end */
    bool never_block;  /* with the policy block: CPS_FULL at once, from a thread that others wait for */
    bool begun;
    uint64_t healthy_until_ms;
    uint64_t block_until_ms;
} cps_patience;

/* Waits for room as `on_full` and the time limits say; without `patience` not at all.  CPS_BUSY: not yet; call again, with
 * the same patience.  CPS_OK; CPS_TOO_LARGE; CPS_CLOSED; CPS_FULL (policies raise and block); CPS_DROPPED: taken and
 * dropped, `*position` is in the range of refused positions. */
CPS_MUST_CHECK enum cps_status cps_log_append(cps_log *log, cps_message *message, cps_patience *patience,
                                              uint64_t *position);

/* ---- reader ---- */

typedef struct cps_batch {
    const uint8_t *bytes; /* whole records; valid until cps_log_read_done */
    size_t size;          /* 0: [position, lost_end) is lost (counted already): pass over it */
    uint64_t position;
    uint64_t lost_end;
    uint64_t dup_below; /* records below it may have been sent before the last rewind */
    bool earlier_boot; /* stamped by the clock of a boot that is over */
} cps_batch;

/* The records from `sent` on, about `max_bytes` of them when they are on the disk.  They count as in flight until
 * read_done.  CPS_OK: read_done must follow; CPS_EMPTY; CPS_IO: try again later (the third time it is a loss). */
CPS_MUST_CHECK enum cps_status cps_log_read(cps_log *log, size_t max_bytes, cps_batch *batch);
void cps_log_read_done(cps_log *log, uint64_t consumed_bytes); /* moves `sent`; a lost range is consumed whole */

/* Is there nothing to read?  Then `notify` comes with the next record (or the next loss). */
bool cps_log_arm(cps_log *log);

/* The connection is gone: sending starts again at `head`. */
void cps_log_rewind(cps_log *log);

/* Everything before `head` is settled; of the records passed over, `messages` with `bytes` were acknowledged, and the
 * `n` ranges of `ended` (reasons EXPIRED and DEAD) ended otherwise. */
void cps_log_settle(cps_log *log, uint64_t head, uint64_t messages, uint64_t bytes, const cps_loss *ended, size_t n);

/* Settle every record up to and including the one at `position`, which was read.  CPS_OK; CPS_UNKNOWN: no pending
 * record that was read starts there; CPS_IO. */
CPS_MUST_CHECK enum cps_status cps_log_settle_through(cps_log *log, uint64_t position);

/* One pending record, which was read.  CPS_OK: `*at` is valid until the next reader's call; CPS_UNKNOWN; CPS_IO. */
CPS_MUST_CHECK enum cps_status cps_log_look(cps_log *log, uint64_t position, cps_record *record, const uint8_t **at);

/* Two streams, for a reader that does not want what is published now to wait for a long backlog: what is said above is about the
 * backlog's then, which ends where the live one began; each is in order in itself. */

enum cps_split {
    CPS_SPLIT_NONE,    /* one stream */
    CPS_SPLIT_BEGUN,   /* a live stream begins where the log ends now */
    CPS_SPLIT_GOES_ON, /* the last one goes on */
    CPS_SPLIT_FULL,    /* as before, though there is another backlog: there are CPS_AHEAD_MAX such streams already */
};

/* When a connection comes up, with nothing in flight since the rewind.  Records behind all that was settled ahead are a backlog
 * where the first is `age_ms` old, or they take more than `bytes`; with `may_begin` a live stream begins behind them. */
enum cps_split cps_log_split(cps_log *log, uint64_t age_ms, uint64_t bytes, bool may_begin);

/* Are there two now?  They become one in a call of the reader, when all of the backlog is settled.  Reader only. */
bool cps_log_is_split(const cps_log *log);

/* As cps_log_read, cps_log_settle and cps_log_arm, of the live stream, which is the only one where there is no other; with
 * `also_backlog` nothing is left to be read of either.  A cps_log_rewind takes both back to what is not settled. */
CPS_MUST_CHECK enum cps_status cps_log_read_live(cps_log *log, size_t max_bytes, cps_batch *batch);
void cps_log_settle_live(cps_log *log, uint64_t end, uint64_t messages, uint64_t bytes, const cps_loss *ended, size_t n);
bool cps_log_arm_live(cps_log *log, bool also_backlog);

typedef struct cps_fronts {
    uint64_t head, sent; /* [head, sent) of the backlog is in flight */
    uint64_t live_first; /* of the live stream, which begins here; without one all three are UINT64_MAX */
    uint64_t live_end, live_sent; /* [live_end, live_sent) is in flight */
} cps_fronts;

void cps_log_fronts(cps_log *log, cps_fronts *out);

/* ---- anybody ---- */

void cps_log_link(cps_log *log, bool up); /* tells when the time without a link began */

/* Until the record at `position` is settled; with `all` everything before it too (head > position).  CPS_OK; CPS_TIMEOUT;
 * CPS_CLOSED. */
CPS_MUST_CHECK enum cps_status cps_log_wait_settled(cps_log *log, uint64_t position, bool all, uint64_t timeout_ms);

/* Write the ring to the disk now and sync it; until synced > position.  CPS_OK; CPS_TIMEOUT; CPS_CLOSED; CPS_IO: the storage
 * failed or refuses; CPS_UNKNOWN: there is no storage. */
CPS_MUST_CHECK enum cps_status cps_log_wait_synced(cps_log *log, uint64_t position, uint64_t timeout_ms);

uint64_t cps_log_published(const cps_log *log);

/* How a settled position ended: CPS_OK acknowledged (or too long ago to know), CPS_DROPPED with the reason. */
CPS_MUST_CHECK enum cps_status cps_log_outcome(cps_log *log, uint64_t position, enum cps_reason *reason);

/* Losses since the last call, merged where they had to be; returns how many were written, at most `room`. */
size_t cps_log_take_losses(cps_log *log, cps_loss *out, size_t room);

/* `*error` is the errno of its last failure. */
enum cps_storage cps_log_storage(cps_log *log, int *error);

void cps_log_stats_now(cps_log *log, cps_log_stats *out);

/* Abort unless all invariants hold. */
void cps_log_check(cps_log *log);

const char *cps_reason_name(enum cps_reason reason);

#endif
