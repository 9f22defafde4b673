/* The small durable facts of a spool: who it belongs to, which positions may have been issued, the last checkpoint.
 *
 * `meta` is one file of two slots of 4096 bytes; the valid slot with the higher sequence counts.  A synced save writes
 * the slot that does not hold the last synced state, syncs, and makes it the anchor; an advisory save writes the same
 * slot without a sync.  So a torn or lost save falls back to the last synced state, which is stale (duplicates), never
 * wrong.  Bytes of a slot, little-endian:
 *
 *   0 magic "CPSMETA1"   8 u32 version   12 u32 epoch   16 u64 sequence   24 spool id[16]   40 u64 generation
 *   48 u64 next_position   56 u8 clean   57 reserved[7]   64 cps_produced, cps_settled as u64 words in their order
 *   208 u64 `sent` of up to six ranges settled ahead   256 the ledger's words up to its entries
 *   416 u64 first, end of these ranges; 0, 0 behind the last   512 u16 identity length, identity (at most 1024 bytes)
 *   1600 the ledger's entries   4092 u32 crc32c of [0, 4092)
 *
 * A failed save may be tried again: it writes its slot anew as a whole, so nothing that a failed sync left in doubt is
 * believed, and it never touches the slot of the last synced state.
 *
 * Threads: the caller serialises.  Owns the handle. */
#ifndef CPS_META_H
#define CPS_META_H

#include <stdbool.h>

#include "_io.h"
#include "_shared.h"

enum { CPS_META_SLOT_BYTES = 4096, CPS_META_IDENTITY_MAX = 1024, CPS_META_VERSION = 1 };

typedef struct cps_meta {
    /* What is kept. */
    uint32_t epoch;         /* of the last open; 0: never opened */
    uint8_t spool_id[16];   /* random, for the life of the spool */
    uint64_t generation;    /* random, of the last open */
    uint64_t next_position; /* nothing at or above it was ever issued */
    bool clean;             /* closed with everything on the disk; the counters below are exact */
    cps_produced produced;
    cps_settled settled;
    cps_ledger ledger;
    uint16_t identity_bytes;
    uint8_t identity[CPS_META_IDENTITY_MAX];

    /* How. */
    const cps_io *io;
    int handle;
    uint64_t sequence;
    unsigned anchor;         /* slot of the last synced state */
    bool anchor_is_durable;  /* after a kill the newest slot may never have been synced; it is, before the first save */
    int error;               /* errno of the last failure */
} cps_meta;

/* Open `path`, made when it is missing.  A file with no valid slot is treated as missing (`*damaged` says so): all
 * fields are then zero but the spool id, which is new.  CPS_OK; CPS_IO; CPS_DAMAGED: not a regular file; CPS_UNKNOWN: made
 * by a newer version. */
CPS_MUST_CHECK enum cps_status cps_meta_open(const cps_io *io, const char *path, cps_meta *meta, bool *damaged,
                                             int *error);

/* Write what is kept; with `synced` it is durable on return.  CPS_OK; CPS_IO (errno in meta->error). */
CPS_MUST_CHECK enum cps_status cps_meta_save(cps_meta *meta, bool synced);

void cps_meta_close(cps_meta *meta);

#endif
