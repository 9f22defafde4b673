/* Threads on a ring and on a whole log, each record checked byte for byte where it arrives; and plain loops to time.
 *
 * The functions block until their threads have ended.  They return NULL, or what was wrong (a literal). */
#ifndef CPS_TEST_STRESS_H
#define CPS_TEST_STRESS_H

#include "_log.h"
#include "_ring.h"
#include "io_sim.h"

typedef struct stress_report {
    uint64_t messages; /* checked at their arrival */
    uint64_t wraps;    /* pads seen */
    uint64_t full;     /* pushes that found no room */
    uint64_t rewinds;
    cps_log_stats stats; /* at the end, everything settled */
} stress_report;

/* `producers` threads push; a flusher-like and a publisher-like reader each pin, check and unpin, and space is released
 * behind the slower one. */
const char *stress_ring(uint64_t ring_bytes, uint64_t start, unsigned producers, uint64_t duration_ms,
                        stress_report *report);

/* `producers` threads append to an open log while the caller reads, settles in odd steps, rewinds and switches the link;
 * then everything is drained.  `lossless`: no message may be missing. */
const char *stress_log(cps_log *log, unsigned producers, uint64_t duration_ms, bool lossless, uint64_t seed,
                       stress_report *report);

/* Kill the process, as far as files can tell: the ring's file is as it was at an instant between two log operations.
 * Returns how many losses nobody had taken at that instant, written to `losses`, which has room for 64, and `spilled`: what
 * lies from there on is in the ring, though some of it may be in files too. */
size_t stress_kill(cps_log *log, sim *s, cps_loss *losses, uint64_t *spilled);

/* The ledger as it is now. */
void stress_ledger(cps_log *log, cps_ledger *out);

/* As if all but `bytes` of the reserved positions had been issued. */
void stress_use_up(cps_log *log, uint64_t bytes);

/* Append `count` messages of this size; CPS_OK or the first other status. */
enum cps_status stress_append(cps_log *log, uint64_t count, uint32_t payload_bytes, uint64_t *position);

/* Read everything, settling behind it; checks that positions grow.  `*messages` is how many came. */
enum cps_status stress_drain(cps_log *log, size_t batch_bytes, uint64_t *messages);

#endif
