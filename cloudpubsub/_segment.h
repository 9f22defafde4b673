/* One file of the log: a preallocated run of records, each with its CRC, then a footer.
 *
 *   header, 128 bytes
 *     0 magic "CPSSEGM1"   8 u32 version   12 u32 header bytes   16 spool id[16]   32 boot id[16]
 *    48 u32 epoch   52 u32 serial   56 u64 base   64 u64 wall ms   72 u64 boottime ms   80 reserved   124 u32 crc32c
 *   records, from position `base` on; the record at position p lies at 128 + p - base
 *   footer, the last 64 bytes of the file, written only after the records were synced
 *     0 magic "CPSFOOT1"   8 u64 base   16 u64 end   24 u64 messages   32 u64 message bytes   40 u32 epoch
 *    44 reserved   60 u32 crc32c
 *
 * Name: base (16 hex digits), epoch (8), serial (8), joined by `-`, then `.seg`; so names sort by position, and a
 * header that was damaged can be done without.  A file without a valid footer was not sealed: its end is where the
 * chain of valid records ends.
 *
 * Threads: one appender (the flusher) calls append, sync, seal; one reader at a time calls span; the fields under
 * "extent" change only under the log's lock.  Owns handles.  After a failed write or sync the segment is
 * poisoned: it is never written, synced or sealed again, and what was in it but not durable is the caller's to save. */
#ifndef CPS_SEGMENT_H
#define CPS_SEGMENT_H

#include <stdbool.h>

#include "_home.h" /* CPS_PATH_MAX */
#include "_io.h"
#include "_record.h"

enum {
    CPS_SEGMENT_HEADER_BYTES = 128,
    CPS_SEGMENT_FOOTER_BYTES = 64,
    CPS_SEGMENT_VERSION = 1,
    CPS_SEGMENT_NAME_BYTES = 64,
    CPS_SEGMENT_BYTES_MIN = 4096,
    CPS_SEGMENT_RECORD_SHARE = 4, /* a record is at most this part of a segment */
};

typedef struct cps_toll { /* what the damage in a segment has cost, and where */
    bool is_known;
    uint64_t messages, message_bytes;        /* that all damaged ranges together have cost */
    uint64_t estimate, damaged_bytes;        /* messages, as far as headers tell, and bytes, of these ranges */
    uint64_t passed_estimate, passed_bytes;  /* of these, in the ranges below `passed` */
    uint64_t passed;
    uint64_t told_bytes; /* already given to ranges */
    uint64_t pending_messages, pending_bytes; /* from `head` on, when it was counted: valid ones and lost ones not passed */
} cps_toll;

typedef struct cps_segment {
    const cps_io *io;
    uint64_t base;
    uint32_t epoch;
    uint32_t serial;
    uint64_t capacity_bytes; /* of records */

    /* Extent; changed under the log's lock only. */
    uint64_t end;           /* position behind the last record */
    uint64_t messages;      /* records that are not pads; where damaged, the best estimate */
    uint64_t message_bytes; /* their spans */
    uint64_t settled_messages; /* of these, no longer pending */
    uint64_t settled_bytes;
    uint64_t lost_below;       /* damage that starts below it was counted */
    uint64_t given_up_from; /* with kept_aside: from here to lost_below nothing was read */
    uint64_t synced_end;       /* everything before it survives a power cut */
    uint64_t synced_messages;  /* what the two counts above were then */
    uint64_t synced_message_bytes;
    uint64_t file_bytes;    /* that the file takes from the quota; sealing never makes it more */
    bool full;              /* never appended to again */
    bool sealed;            /* footer written */
    bool named;             /* its entry in the directory is durable */
    bool kept_aside;        /* to go to the quarantine instead of being removed */
    bool given_up;          /* poisoned, as everybody but the appender is told */
    bool overlong;          /* its file holds records behind `end` that were taken back */
    bool retired;           /* taken out of the log, to be removed once nobody reads it */
    bool patchy;            /* scanned, with damage in it: what was lost there is an estimate */
    bool patchy_before;     /* at open: there is damage in that beginning of it that is settled */
    unsigned users;         /* readers and appenders that hold it outside the lock */
    uint64_t unsynced_since_ms; /* monotonic; when the oldest byte that may not be durable was written */
    uint64_t oldest_stamp_ms;   /* of the first record (boottime), if it was written in this boot; else 0 */
    bool earlier_boot;          /* its stamps are of the clock of a boot that is over */
    uint64_t oldest_wall_ms;    /* about the same by the wall clock of then; for people */

    /* Appender's. */
    int handle; /* -1: not open */
    enum cps_status poison;
    int error; /* errno of the first failure */

    /* Reader's. */
    int read_handle; /* -1: not open */
    cps_toll toll;

    struct cps_segment *next; /* in the store's list, by position */

    char path[]; /* a large backlog has thousands of segments */
} cps_segment;

typedef struct cps_segment_identity { /* what a new segment is told */
    uint8_t spool_id[16];
    uint32_t epoch;
    uint32_t serial;
    uint64_t base;
} cps_segment_identity;

typedef struct cps_span { /* a verified run of whole records */
    const uint8_t *bytes; /* valid until the next span of this segment, or its rest */
    size_t size;
    size_t messages_size;   /* of it, up to the last message; pads behind that lead nowhere if the log ends here */
    uint64_t position;
    uint64_t lost_end;      /* when size is 0: [position, lost_end) is damaged */
    uint64_t lost_messages; /* records in it, as far as headers can be told; at least 1 */
} cps_span;

typedef struct cps_scratch { /* growing buffer for reads that cannot be mapped; owned by the reader */
    uint8_t *bytes;
    size_t size;
} cps_scratch;

typedef struct cps_scan { /* what loading one segment found */
    uint64_t bytes_read;
    uint64_t records;
    uint64_t torn_bytes; /* behind the last valid record */
    uint64_t damaged_ranges;
    uint64_t damaged_bytes;
} cps_scan;

/* Make a file of `file_bytes` in `directory`, allocated in full, header written.  CPS_OK; CPS_IO (errno in *error);
 * CPS_NO_MEMORY; CPS_TOO_LARGE: path too long.  After CPS_IO `*out` is NULL, or a segment with nothing in it whose file
 * could not be removed again. */
CPS_MUST_CHECK enum cps_status cps_segment_create(const cps_io *io, const char *directory,
                                                  const cps_segment_identity *identity, uint64_t file_bytes,
                                                  cps_segment **out, int *error);

/* Open an existing file by its name; scans the records only if the footer is missing.  CPS_OK; CPS_UNKNOWN: not a
 * segment of this spool; CPS_IO; CPS_NO_MEMORY; CPS_TOO_LARGE; CPS_EMPTY: no record in it (removed if
 * nothing was ever written; scan->torn_bytes grew if something was). */
CPS_MUST_CHECK enum cps_status cps_segment_load(const cps_io *io, const char *directory, const char *name,
                                                const uint8_t spool_id[16], cps_scratch *scratch, cps_segment **out,
                                                cps_scan *scan, int *error);

/* Fill in the CRCs of the records in [bytes, bytes + size), which will stand at `position`; count the messages. */
void cps_segment_prepare(const cps_segment *segment, uint8_t *bytes, size_t size, uint64_t position,
                         uint64_t *messages, uint64_t *message_bytes);

/* Write prepared records behind `end`; the caller then moves `end` under the lock.  CPS_OK; CPS_IO: what part of them may
 * have reached the file is cut off again, if the file lets us. */
CPS_MUST_CHECK enum cps_status cps_segment_append(cps_segment *segment, const uint8_t *bytes, size_t size);

CPS_MUST_CHECK enum cps_status cps_segment_sync(cps_segment *segment);

/* What the file takes from the quota once it is sealed. */
uint64_t cps_segment_sealed_bytes(const cps_segment *segment);

/* Sync the records, then write and sync the footer; the file shrinks to what it holds.  The caller then sets `sealed`
 * and `file_bytes` under the lock. */
CPS_MUST_CHECK enum cps_status cps_segment_seal(cps_segment *segment, uint64_t *file_bytes);

/* A verified run of records from `position` (in [base, end)) on, about `max_bytes` long but at least one record.
 * CPS_OK, with span->size 0 where the bytes are damaged; CPS_IO; CPS_NO_MEMORY. */
CPS_MUST_CHECK enum cps_status cps_segment_span(cps_segment *segment, uint64_t position, uint64_t end,
                                                size_t max_bytes, cps_scratch *scratch, cps_span *span, int *error);

/* Count what a segment has lost: what its footer says less what is valid in it; where it has none, as far as headers tell, and
 * `messages` and `message_bytes` follow.  What lies below `passed` is accounted for already.  head <= passed; both are at
 * the border of a record or range.  Reads the whole file.  CPS_OK; CPS_IO; CPS_NO_MEMORY. */
CPS_MUST_CHECK enum cps_status cps_segment_count_toll(cps_segment *segment, uint64_t head, uint64_t passed,
                                                      cps_scratch *scratch, int *error);

/* Of it, what is not given to ranges yet. */
void cps_segment_toll_left(const cps_toll *toll, uint64_t *messages, uint64_t *bytes);

/* It is known better: so much is left for the ranges that are not passed. */
void cps_segment_set_toll_left(cps_toll *toll, uint64_t messages, uint64_t bytes);

/* The share of it that the damaged range [position, end) has, which is the next one that is accounted for.  `*messages` is
 * the estimate before and the share after; 0: it was padding. */
void cps_segment_take_toll(cps_segment *segment, uint64_t position, uint64_t end, uint64_t *messages, uint64_t *bytes);

/* Forget what a loaded segment holds from `end` on; another file has it.  May leave it empty. */
CPS_MUST_CHECK enum cps_status cps_segment_trim(cps_segment *segment, uint64_t end, cps_scratch *scratch, int *error);

/* Write into a loaded segment what is damaged there and whole in `other`, which holds the same records.  Best effort: what
 * cannot be written stays damaged.  CPS_OK; CPS_IO; CPS_NO_MEMORY. */
CPS_MUST_CHECK enum cps_status cps_segment_mend(cps_segment *segment, cps_segment *other, cps_scratch *scratch,
                                                int *error);

/* Try to end the file where the segment ends: a later open would take what stands behind, and was given up, for records. */
void cps_segment_cut(cps_segment *segment);

/* Which spool wrote this file, and in which epoch?  False: nobody can tell. */
bool cps_segment_identify(const cps_io *io, const char *directory, const char *name, uint8_t spool_id[16],
                          uint32_t *epoch);

/* The reader moves on: close. */
void cps_segment_rest(cps_segment *segment);

/* Close and remove the file of a segment that nobody holds; may be tried again.  CPS_OK; CPS_IO. */
CPS_MUST_CHECK enum cps_status cps_segment_remove(cps_segment *segment);

/* Free it; the file stays.  The caller makes sure that nobody holds it. */
void cps_segment_close(cps_segment *segment);

/* Room for a record of `span` bytes. */
static inline bool cps_segment_has_room(const cps_segment *segment, uint64_t span) {
    return !segment->full && segment->end - segment->base + span <= segment->capacity_bytes;
}

CPS_MUST_CHECK enum cps_status cps_scratch_grow(cps_scratch *scratch, size_t size);
void cps_scratch_close(cps_scratch *scratch);

#endif
