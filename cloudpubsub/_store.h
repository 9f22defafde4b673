/* The disk home of the log: the ordered set of segments in one directory.
 *
 * Threads: every function here is called with the log's lock held, or before the log's threads exist; none of them does
 * input or output but `cps_store_recover`.  Owns the segments in its list.  Never: decides what to drop. */
#ifndef CPS_STORE_H
#define CPS_STORE_H

#include "_quarantine.h"
#include "_segment.h"

typedef struct cps_store {
    const cps_io *io;
    char directory[CPS_PATH_MAX];
    cps_segment *first; /* lowest position */
    cps_segment *last;
    uint64_t segments;
    uint64_t file_bytes; /* of all files, to hold against the quota */
    uint64_t messages;   /* in all segments, settled ones included */
    cps_segment *unsealed; /* nothing before it is left to be sealed; see cps_store_unsealed */
} cps_store;

typedef struct cps_recovery { /* what opening found */
    cps_scan scan;
    uint64_t segments;
    uint64_t unreadable; /* files with a segment's name that could not be used */
    uint64_t overlapping; /* of these, whose positions another segment holds */
} cps_recovery;

/* Load every segment in `directory`.  Foreign files are left alone; what cannot be read, or is whole in another file, goes
 * to the quarantine and is counted.  CPS_OK; CPS_IO:
 * the directory cannot be listed; CPS_NO_MEMORY; CPS_TOO_LARGE. */
CPS_MUST_CHECK enum cps_status cps_store_recover(cps_store *store, const cps_io *io, const char *directory,
                                                 const uint8_t spool_id[16], cps_quarantine *quarantine, cps_recovery *recovery,
                                                 int *error);

/* Which spool do the segments in `directory` belong to, and what is the highest epoch among its own, if above `*epoch`?  For a
 * spool whose own record of that is gone.  False: none of them can tell. */
bool cps_store_identify(const cps_io *io, const char *directory, uint8_t spool_id[16], uint32_t *epoch);

void cps_store_add(cps_store *store, cps_segment *segment); /* behind the last */

/* Take a segment out of the list; it is the caller's then. */
void cps_store_take(cps_store *store, cps_segment *segment);

/* The file of a segment changed its size. */
void cps_store_resize(cps_store *store, cps_segment *segment, uint64_t file_bytes);

/* The segment that holds `position`, or the first behind it; NULL if there is none. */
cps_segment *cps_store_find(const cps_store *store, uint64_t position);

/* The first segment that is not sealed and can be; NULL if there is none. */
cps_segment *cps_store_unsealed(cps_store *store);

/* Free all segments, files stay. */
void cps_store_close(cps_store *store);

void cps_store_check(const cps_store *store);

#endif
