/* The meta file; see the header. */
#include "_meta.h"

#include <string.h>

#include "_bytes.h"
#include "_crc32c.h"
#include "_record.h"

static const uint8_t magic[8] = {'C', 'P', 'S', 'M', 'E', 'T', 'A', '1'};

enum { AT_WORDS = 64, AT_AHEAD_SENT = 208, AT_LEDGER = 256, AT_AHEAD = 416, AT_IDENTITY = 512, AT_ENTRIES = 1600, AT_CRC = CPS_META_SLOT_BYTES - 4 };

#define CPS_COUNT_MAX 0x0800000000000000u /* 2^59: no counter comes near */

enum { COUNTER_WORDS = CPS_SETTLED_PLAIN_WORDS - 1 }; /* without the number of ranges */

_Static_assert(AT_WORDS + 8 * (CPS_PRODUCED_WORDS + COUNTER_WORDS) <= AT_AHEAD_SENT, "counters reach the ranges");
_Static_assert(AT_AHEAD_SENT + 8 * CPS_AHEAD_MAX <= AT_LEDGER, "the ranges reach the ledger");
_Static_assert(AT_LEDGER + 8 * CPS_LEDGER_HEAD_WORDS <= AT_AHEAD, "the ledger reaches the ranges");
_Static_assert(AT_AHEAD + 16 * CPS_AHEAD_MAX <= AT_IDENTITY, "the ranges reach the identity");
_Static_assert(AT_ENTRIES + 40 * CPS_LEDGER_ENTRIES <= AT_CRC, "the losses reach the checksum");
_Static_assert(AT_IDENTITY + 2 + CPS_META_IDENTITY_MAX <= AT_ENTRIES, "identity reaches the losses");

static void store_words(uint8_t *at, const void *from, unsigned words) {
    uint64_t value;
    for (unsigned i = 0; i < words; i++) {
        memcpy(&value, (const uint8_t *)from + 8 * (size_t)i, 8);
        cps_store64(at + 8 * (size_t)i, value);
    }
}

static void load_words(const uint8_t *at, void *to, unsigned words) {
    for (unsigned i = 0; i < words; i++) {
        uint64_t value = cps_load64(at + 8 * (size_t)i);
        memcpy((uint8_t *)to + 8 * (size_t)i, &value, 8);
    }
}

static void encode_ahead(const cps_settled *settled, uint8_t slot[CPS_META_SLOT_BYTES]) {
    size_t at = 0;
    for (uint64_t i = 0; i < settled->ahead_count; i++) {
        const cps_ahead *ahead = &settled->ahead[i];
        if (ahead->first == ahead->end) continue; /* nothing is settled there yet */
        cps_store64(slot + AT_AHEAD + 16 * at, ahead->first);
        cps_store64(slot + AT_AHEAD + 16 * at + 8, ahead->end);
        cps_store64(slot + AT_AHEAD_SENT + 8 * at, ahead->sent);
        at++;
    }
}

/* What they say is believed only after cps_log_tame_ahead. */
static void decode_ahead(const uint8_t slot[CPS_META_SLOT_BYTES], cps_settled *settled) {
    size_t at = 0;
    for (; at < CPS_AHEAD_MAX && cps_load64(slot + AT_AHEAD + 16 * at + 8) != 0; at++)
        settled->ahead[at] = (cps_ahead){.first = cps_load64(slot + AT_AHEAD + 16 * at),
                                         .end = cps_load64(slot + AT_AHEAD + 16 * at + 8),
                                         .sent = cps_load64(slot + AT_AHEAD_SENT + 8 * at)};
    settled->ahead_count = at;
}

static void encode(const cps_meta *meta, uint8_t slot[CPS_META_SLOT_BYTES]) {
    memset(slot, 0, CPS_META_SLOT_BYTES);
    memcpy(slot, magic, 8);
    cps_store32(slot + 8, CPS_META_VERSION);
    cps_store32(slot + 12, meta->epoch);
    cps_store64(slot + 16, meta->sequence);
    memcpy(slot + 24, meta->spool_id, 16);
    cps_store64(slot + 40, meta->generation);
    cps_store64(slot + 48, meta->next_position);
    slot[56] = meta->clean;
    store_words(slot + AT_WORDS, &meta->produced, CPS_PRODUCED_WORDS);
    store_words(slot + AT_WORDS + 8 * CPS_PRODUCED_WORDS, &meta->settled, COUNTER_WORDS);
    encode_ahead(&meta->settled, slot);
    store_words(slot + AT_LEDGER, &meta->ledger, CPS_LEDGER_HEAD_WORDS);
    store_words(slot + AT_ENTRIES, meta->ledger.entries, CPS_LEDGER_WORDS - CPS_LEDGER_HEAD_WORDS);
    cps_store16(slot + AT_IDENTITY, meta->identity_bytes);
    memcpy(slot + AT_IDENTITY + 2, meta->identity, meta->identity_bytes);
    cps_store32(slot + AT_CRC, cps_crc32c(0, slot, AT_CRC));
}

/* Could a log have written these?  The rest of the core counts on it. */
static bool is_possible(const uint8_t slot[CPS_META_SLOT_BYTES]) {
    const uint8_t *settled = slot + AT_WORDS + 8 * CPS_PRODUCED_WORDS;
    uint64_t next = cps_load64(slot + 48), head = cps_load64(settled);
    if (cps_load16(slot + AT_IDENTITY) > CPS_META_IDENTITY_MAX || cps_load32(slot + 12) >= CPS_LAST_EPOCH_MAX) return false;
    if (next >= CPS_NEXT_POSITION_MAX || next % CPS_RECORD_ALIGN != 0 || head % CPS_RECORD_ALIGN != 0) return false;
    for (unsigned i = 1; i < CPS_PRODUCED_WORDS; i++) /* all but `published` */
        if (cps_load64(slot + AT_WORDS + 8 * (size_t)i) >= CPS_COUNT_MAX) return false;
    for (unsigned i = 3; i < 9; i++) /* messages and bytes that have ended */
        if (cps_load64(settled + 8 * (size_t)i) >= CPS_COUNT_MAX) return false;
    return true;
}

static bool slot_holds(const uint8_t slot[CPS_META_SLOT_BYTES]) {
    return memcmp(slot, magic, 8) == 0 && cps_load32(slot + AT_CRC) == cps_crc32c(0, slot, AT_CRC);
}

static void decode(const uint8_t slot[CPS_META_SLOT_BYTES], cps_meta *meta) {
    meta->epoch = cps_load32(slot + 12);
    meta->sequence = cps_load64(slot + 16);
    memcpy(meta->spool_id, slot + 24, 16);
    meta->generation = cps_load64(slot + 40);
    meta->next_position = cps_load64(slot + 48);
    meta->clean = slot[56] != 0;
    load_words(slot + AT_WORDS, &meta->produced, CPS_PRODUCED_WORDS);
    load_words(slot + AT_WORDS + 8 * CPS_PRODUCED_WORDS, &meta->settled, COUNTER_WORDS);
    decode_ahead(slot, &meta->settled);
    load_words(slot + AT_LEDGER, &meta->ledger, CPS_LEDGER_HEAD_WORDS);
    load_words(slot + AT_ENTRIES, meta->ledger.entries, CPS_LEDGER_WORDS - CPS_LEDGER_HEAD_WORDS);
    cps_ledger_tame(&meta->ledger);
    meta->identity_bytes = cps_load16(slot + AT_IDENTITY);
    memcpy(meta->identity, slot + AT_IDENTITY + 2, meta->identity_bytes);
}

static CPS_MUST_CHECK enum cps_status load_best(cps_meta *meta, bool *found, int *error) {
    uint8_t slot[CPS_META_SLOT_BYTES];
    *found = false;
    for (unsigned i = 0; i < 2; i++) {
        size_t got;
        enum cps_status status = meta->io->read(meta->io->context, meta->handle, slot, sizeof slot,
                                                (uint64_t)i * CPS_META_SLOT_BYTES, &got, error);
        if (status != CPS_OK) return status;
        if (got != sizeof slot || !slot_holds(slot)) continue;
        if (cps_load32(slot + 8) != CPS_META_VERSION) return CPS_UNKNOWN; /* whole, and not ours to overwrite */
        if (!is_possible(slot)) continue; /* after the version: another one may have other things there */
        if (*found && cps_load64(slot + 16) < meta->sequence) continue;
        decode(slot, meta);
        meta->anchor = i;
        *found = true;
    }
    return CPS_OK;
}

enum cps_status cps_meta_open(const cps_io *io, const char *path, cps_meta *meta, bool *damaged, int *error) {
    memset(meta, 0, sizeof *meta);
    meta->io = io;
    enum cps_status status = io->open(io->context, path, CPS_IO_ENSURE, &meta->handle, error);
    if (status != CPS_OK) return status;
    cps_io_facts facts;
    bool found = false;
    status = io->facts(io->context, meta->handle, &facts, error);
    if (status == CPS_OK && !facts.is_regular) status = CPS_DAMAGED;
    if (status == CPS_OK) status = load_best(meta, &found, error);
    if (status != CPS_OK) {
        io->close(io->context, meta->handle);
        return status;
    }
    *damaged = !found && facts.size_bytes > 0;
    meta->anchor_is_durable = !found;
    if (!found) io->random(io->context, meta->spool_id, sizeof meta->spool_id);
    return CPS_OK;
}

enum cps_status cps_meta_save(cps_meta *meta, bool synced) {
    const cps_io *io = meta->io;
    enum cps_status status = CPS_OK;
    if (!meta->anchor_is_durable) status = io->sync(io->context, meta->handle, &meta->error);
    if (status != CPS_OK) return status;
    CPS_CRASH_POINT("meta-begin");
    meta->anchor_is_durable = true;
    uint8_t slot[CPS_META_SLOT_BYTES];
    unsigned other = meta->anchor ^ 1u;
    meta->sequence++;
    encode(meta, slot);
    status = io->write(io->context, meta->handle, slot, sizeof slot, (uint64_t)other * CPS_META_SLOT_BYTES, &meta->error);
    CPS_CRASH_POINT("meta-written");
    if (status != CPS_OK || !synced) return status;
    status = io->sync(io->context, meta->handle, &meta->error);
    CPS_CRASH_POINT("meta-synced");
    if (status == CPS_OK) meta->anchor = other;
    return status;
}

void cps_meta_close(cps_meta *meta) { meta->io->close(meta->io->context, meta->handle); }
