/* Where the ring lives: a file in tmpfs that a killed process leaves behind for the next one, or plain memory.
 *
 * The file is `cloudpubsub-<spool id>.ring`, mode 0600: the page of _shared.h, rounded up to whole pages, then the
 * ring.  It is believed only if it is a regular file of ours on tmpfs, of this boot, of this spool, and of the very
 * last open of the spool.  The last is told by generation, a random number that each open writes durably to the spool's
 * meta file: a home is current if its `generation`, or the `next_generation` that a take-over announced, is the one in
 * the meta file.  The order of a take-over is therefore: announce in the home, save the meta file, commit in the home;
 * a kill between any two steps leaves a current home, and any run in between, with or without a home, makes it stale.
 *
 * The file is locked while it is in use, because a copy of a spool's directory finds the same one.
 *
 * Threads: the opener only.  Owns the mapping and the file.  Never: touches the records. */
#ifndef CPS_HOME_H
#define CPS_HOME_H

#include <stdbool.h>

#include "_io.h"
#include "_shared.h"

enum { CPS_PATH_MAX = 4096 };

typedef struct cps_home {
    const cps_io *io;
    cps_shared *shared;
    uint8_t *ring;
    uint64_t ring_bytes;
    uint8_t *mapping;
    size_t mapping_bytes;
    bool in_file;
    int handle; /* of the file, with its lock; -1: none */
    char path[CPS_PATH_MAX];
} cps_home;

/* Find the current home of a spool in `directory`.  CPS_OK: `home` holds what the last process left; CPS_EMPTY: there is
 * none, or a stale or foreign one; CPS_LOCKED: a process that runs uses it (this spool is a copy of its spool); CPS_IO: it
 * cannot be told, so nothing may be done to it; CPS_TOO_LARGE: the path is too long. */
CPS_MUST_CHECK enum cps_status cps_home_find(const cps_io *io, const char *directory, const uint8_t spool_id[16],
                                             uint64_t generation, cps_home *home, int *error);

/* Make an empty home whose log starts at `position`; in tmpfs when `directory` is not NULL, replacing a stale file.
 * CPS_OK; CPS_UNKNOWN: `directory` is not on tmpfs; CPS_LOCKED; CPS_IO; CPS_NO_MEMORY; CPS_TOO_LARGE. */
CPS_MUST_CHECK enum cps_status cps_home_make(const cps_io *io, const char *directory, const uint8_t spool_id[16],
                                             uint64_t ring_bytes, uint64_t position, cps_home *home, int *error);

/* Before the meta file, which says `current`, is saved with `generation`. */
void cps_home_announce(cps_home *home, uint64_t current, uint64_t generation);
void cps_home_commit(cps_home *home, uint64_t generation);   /* after it */

/* Unmap; with `remove` the file goes too (everything in it has a home on the disk). */
void cps_home_close(cps_home *home, bool remove);

#endif
