/* The ledger of losses: which messages ended without an acknowledgement, why, and when; bounded, with exact totals.
 *
 * It is a plain block of 64-bit words, so that it can lie in the shared page beside the ring (where it survives a kill) and
 * in a slot of the meta file (where it survives a power cut) alike.  A new loss next to the last one of its reason extends
 * it; when all places are taken two entries of one reason become one that covers both.
 *
 * Threads: the caller serialises.  Owns nothing, calls nothing. */
#ifndef CPS_LEDGER_H
#define CPS_LEDGER_H

#include <stdint.h>

enum { CPS_LEDGER_REASONS = 8, CPS_LEDGER_ENTRIES = 62 };
#define CPS_LEDGER_TIME_MASK 0xffffffffffffu /* 48 bits of milliseconds: until the year 10889 */

typedef struct cps_ledger_entry {
    uint64_t first; /* range of positions [first, end) that covers them */
    uint64_t end;
    uint64_t messages;
    uint64_t bytes;
    uint64_t when; /* wall clock of the last of them, ms since 1970, in the low 48 bits; the reason above */
} cps_ledger_entry;

typedef struct cps_ledger {
    struct {
        uint64_t messages;
        uint64_t bytes;
    } totals[CPS_LEDGER_REASONS]; /* exact, over the life of the spool */
    uint64_t uncertain_first; /* positions [first, end) whose messages may be counted wrongly, because volatile state */
    uint64_t uncertain_end;   /* was lost; both 0: none */
    uint64_t used;
    cps_ledger_entry entries[CPS_LEDGER_ENTRIES];
} cps_ledger;

enum { CPS_LEDGER_WORDS = sizeof(cps_ledger) / 8, CPS_LEDGER_HEAD_WORDS = CPS_LEDGER_WORDS - CPS_LEDGER_ENTRIES * 5 };

_Static_assert(sizeof(cps_ledger) == 8 * (2 * CPS_LEDGER_REASONS + 3 + 5 * CPS_LEDGER_ENTRIES), "the ledger has a hole");

static inline unsigned cps_ledger_reason(const cps_ledger_entry *entry) { return (unsigned)(entry->when >> 48); }

/* Enter a loss of `messages` > 0 in [first, end).  `reason` is below CPS_LEDGER_REASONS. */
void cps_ledger_add(cps_ledger *ledger, uint64_t first, uint64_t end, uint64_t messages, uint64_t bytes, unsigned reason,
                    uint64_t wall_ms);

/* What was entered by estimate was not quite so: `messages` and `bytes` more, or less (in two's complement).  Takes back from
 * the newest entries of the two reasons, and adds to the first. */
void cps_ledger_correct(cps_ledger *ledger, unsigned reason, unsigned other, uint64_t messages, uint64_t bytes);

/* Volatile state was lost while [first, end) was, or may have been, in use. */
void cps_ledger_doubt(cps_ledger *ledger, uint64_t first, uint64_t end);

/* Messages and bytes that were in the log and ended by loss: all reasons but `refused`, which never were in it. */
void cps_ledger_sum(const cps_ledger *ledger, unsigned refused, uint64_t *messages, uint64_t *bytes);

/* Bytes from a file: can they be a ledger?  Cuts `used` to what there can be. */
void cps_ledger_tame(cps_ledger *ledger);

#endif
