/* The ledger of losses; see the header. */
#include "_ledger.h"

#include <stdbool.h>
#include <string.h>

#include "_status.h"

static void cover(cps_ledger_entry *into, const cps_ledger_entry *other) {
    if (other->first < into->first) into->first = other->first;
    if (other->end > into->end) into->end = other->end;
    into->messages += other->messages;
    into->bytes += other->bytes;
    if ((other->when & CPS_LEDGER_TIME_MASK) > (into->when & CPS_LEDGER_TIME_MASK)) into->when = other->when;
}

/* All places are taken, by fewer reasons than places: the two oldest neighbours of one reason become one. */
static void make_place(cps_ledger *ledger) {
    unsigned last[CPS_LEDGER_REASONS];
    bool seen[CPS_LEDGER_REASONS] = {false};
    for (unsigned i = 0; i < ledger->used; i++) {
        unsigned reason = cps_ledger_reason(&ledger->entries[i]) % CPS_LEDGER_REASONS;
        if (seen[reason]) {
            cover(&ledger->entries[last[reason]], &ledger->entries[i]);
            memmove(&ledger->entries[i], &ledger->entries[i + 1], (size_t)(ledger->used - i - 1) * sizeof ledger->entries[0]);
            ledger->used--;
            return;
        }
        seen[reason] = true;
        last[reason] = i;
    }
    CPS_ASSERT(false); /* more places than reasons */
}

void cps_ledger_add(cps_ledger *ledger, uint64_t first, uint64_t end, uint64_t messages, uint64_t bytes, unsigned reason,
                    uint64_t wall_ms) {
    CPS_ASSERT(reason < CPS_LEDGER_REASONS);
    cps_ledger_entry entry = {.first = first, .end = end, .messages = messages, .bytes = bytes,
                              .when = (wall_ms & CPS_LEDGER_TIME_MASK) | (uint64_t)reason << 48};
    ledger->totals[reason].messages += messages;
    ledger->totals[reason].bytes += bytes;
    cps_ledger_entry *last = ledger->used > 0 ? &ledger->entries[ledger->used - 1] : NULL;
    if (last != NULL && cps_ledger_reason(last) == reason && last->end == first) {
        cover(last, &entry);
        return;
    }
    if (ledger->used == CPS_LEDGER_ENTRIES) make_place(ledger);
    ledger->entries[ledger->used++] = entry;
}

static uint64_t take_back(uint64_t *amount, uint64_t *total, uint64_t over) {
    uint64_t back = over < *amount ? over : *amount;
    if (back > *total) back = *total;
    *amount -= back;
    *total -= back;
    return over - back;
}

void cps_ledger_correct(cps_ledger *ledger, unsigned reason, unsigned other, uint64_t messages, uint64_t bytes) {
    CPS_ASSERT(reason < CPS_LEDGER_REASONS && other < CPS_LEDGER_REASONS);
    uint64_t over = messages > INT64_MAX ? 0 - messages : 0, over_bytes = bytes > INT64_MAX ? 0 - bytes : 0;
    if (over == 0) ledger->totals[reason].messages += messages;
    if (over_bytes == 0) ledger->totals[reason].bytes += bytes;
    bool may_add = over == 0 || over_bytes == 0;
    for (uint64_t i = ledger->used; i-- > 0 && (may_add || over > 0 || over_bytes > 0);) {
        cps_ledger_entry *entry = &ledger->entries[i];
        unsigned is = cps_ledger_reason(entry);
        if (is != reason && is != other) continue;
        if (may_add && is == reason) {
            entry->messages += messages > INT64_MAX ? 0 : messages;
            entry->bytes += bytes > INT64_MAX ? 0 : bytes;
            may_add = false;
        }
        over = take_back(&entry->messages, &ledger->totals[is].messages, over);
        over_bytes = take_back(&entry->bytes, &ledger->totals[is].bytes, over_bytes);
    }
}

void cps_ledger_doubt(cps_ledger *ledger, uint64_t first, uint64_t end) {
    bool none = ledger->uncertain_end == 0;
    if (none || first < ledger->uncertain_first) ledger->uncertain_first = first;
    if (none || end > ledger->uncertain_end) ledger->uncertain_end = end;
}

void cps_ledger_sum(const cps_ledger *ledger, unsigned refused, uint64_t *messages, uint64_t *bytes) {
    *messages = *bytes = 0;
    for (unsigned i = 0; i < CPS_LEDGER_REASONS; i++) {
        if (i == refused) continue;
        *messages += ledger->totals[i].messages;
        *bytes += ledger->totals[i].bytes;
    }
}

void cps_ledger_tame(cps_ledger *ledger) {
    if (ledger->used > CPS_LEDGER_ENTRIES) ledger->used = 0;
}
