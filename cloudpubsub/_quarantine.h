/* The folder where damaged bytes and files that cannot be used are kept aside, for people; bounded.
 *
 * Ranges are files named FIRST-END.bytes (positions, 16 hex digits each), files keep their names.  What would pass the
 * bound is not kept.  What is in the folder is never read again.
 *
 * Threads: one may copy ranges while another moves files, and anybody may look at `bytes`; every function does input and
 * output.  Owns nothing between calls. */
#ifndef CPS_QUARANTINE_H
#define CPS_QUARANTINE_H

#include <stdatomic.h>

#include "_home.h" /* CPS_PATH_MAX */
#include "_io.h"

typedef struct cps_quarantine {
    const cps_io *io;
    char path[CPS_PATH_MAX];
    _Atomic uint64_t bytes; /* that its files take from the quota; it orders nothing else */
    uint64_t max_bytes;
} cps_quarantine;

static inline uint64_t cps_quarantine_bytes(cps_quarantine *q) {
    /* no model: a number for the quota, and nothing behind it */
    return atomic_load_explicit(&q->bytes, memory_order_relaxed);
}

/* Look what is in `directory`/quarantine.  CPS_OK; CPS_TOO_LARGE: the path is too long. */
CPS_MUST_CHECK enum cps_status cps_quarantine_open(cps_quarantine *q, const cps_io *io, const char *directory,
                                                   uint64_t max_bytes);

/* Copy [first, end), which stands at `offset` in the open file `handle`.  Best effort. */
void cps_quarantine_copy(cps_quarantine *q, int handle, uint64_t offset, uint64_t first, uint64_t end);

/* Move a file of `size_bytes` here, or remove it where it would not fit.  CPS_OK; CPS_IO. */
CPS_MUST_CHECK enum cps_status cps_quarantine_move(cps_quarantine *q, const char *path, uint64_t size_bytes, int *error);

#endif
