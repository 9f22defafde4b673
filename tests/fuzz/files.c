/* From the input to the files of a spool; see the header.  Offsets are those of docs/format.md, written down again on
 * purpose: what this says and what the library says have to meet. */
#include "files.h"

#include <inttypes.h>

#include "_bytes.h"
#include "_crc32c.h"

enum {
    HEADER_BYTES = 128,
    FOOTER_BYTES = 64,
    RECORD_BYTES = 32,
    RECORDS_MAX = 64, /* in one described segment */
    CHUNKS_MAX = 40,
    UNIT_BYTES = 4096, /* of large gaps */
};
#define PAD_BIT 0x80000000u
#define BLOCK 0x10000000000u /* positions are reserved in blocks of this size */

static const uint8_t spool_id[16] = {0xf0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* ---- places ---- */

/* A position: a byte that says what it is near to, and how near. */
static uint64_t take_place(const fuzz_spool *spool, input *in) {
    uint8_t near = take8(in);
    int16_t steps = (int16_t)take16(in);
    uint64_t offset = (uint64_t)(int64_t)steps * 8, base = 0, end = 0;
    const fuzz_file *last = spool->count > 0 ? &spool->files[spool->count - 1] : NULL;
    if (last != NULL) {
        base = last->base;
        end = base + (last->size > HEADER_BYTES ? last->size - HEADER_BYTES : 0);
        if (last->size >= HEADER_BYTES + FOOTER_BYTES &&
            memcmp(last->bytes + last->size - FOOTER_BYTES, "CPSFOOT1", 8) == 0)
            end -= FOOTER_BYTES;
        end &= ~(uint64_t)7;
    }
    switch (near & 7) {
    case 0: return offset;
    case 1: return end + offset;
    case 2: return base + offset;
    case 3: return BLOCK * ((near >> 3) + 1u) + offset;
    case 4: return ((uint64_t)1 << 63) + offset;
    case 5: return end + (uint64_t)(int64_t)steps; /* where no record can stand */
    case 6: return take64(in);
    default: return spool->count > 0 ? spool->files[0].base + offset : offset;
    }
}

/* ---- bytes of a file ---- */

/* `size` more bytes, zeros; NULL: that would be too much. */
static uint8_t *extend(fuzz_spool *spool, fuzz_file *file, size_t size) {
    if (size > spool->room) return NULL;
    spool->room -= size;
    uint8_t *grown = realloc(file->bytes, file->size + size + 1);
    CHECK(grown != NULL);
    file->bytes = grown;
    uint8_t *at = grown + file->size;
    memset(at, 0, size);
    file->size += size;
    return at;
}

static fuzz_file *add_file(fuzz_spool *spool, input *in) {
    if (spool->count == FUZZ_FILES_MAX) return NULL;
    fuzz_file file = {.base = take_place(spool, in), .epoch = take8(in), .bytes = NULL};
    if (file.epoch == UINT8_MAX) file.epoch = UINT32_MAX;
    (void)snprintf(file.name, sizeof file.name, "%016" PRIx64 "-%08" PRIx32 "-%08x.seg", file.base, file.epoch,
                   take8(in));
    for (unsigned i = 0; i < spool->count; i++)
        if (strcmp(spool->files[i].name, file.name) == 0) return NULL;
    (void)extend(spool, &file, 0); /* never without bytes */
    spool->files[spool->count] = file;
    return &spool->files[spool->count++];
}

/* Behind the bytes that it covers. */
static void put_crc(uint8_t *bytes, size_t covered) {
    cps_store32(bytes + covered, cps_crc32c_table(0, bytes, covered));
}

static void put_header(const fuzz_file *file, uint8_t *at, bool same_boot) {
    memcpy(at, "CPSSEGM1", 8);
    cps_store32(at + 8, 1);
    cps_store32(at + 12, HEADER_BYTES);
    memcpy(at + 16, spool_id, 16);
    at[32] = same_boot; /* the target's boot id is 1 and zeros */
    cps_store32(at + 48, file->epoch);
    cps_store64(at + 56, file->base);
    cps_store64(at + 64, 1000);
    cps_store64(at + 72, 1000);
    put_crc(at, HEADER_BYTES - 4);
}

static void put_footer(const fuzz_file *file, uint8_t *at, uint64_t messages, uint64_t bytes) {
    memcpy(at, "CPSFOOT1", 8);
    cps_store64(at + 8, file->base);
    cps_store64(at + 16, file->base + (uint64_t)(at - file->bytes) - HEADER_BYTES);
    cps_store64(at + 24, messages);
    cps_store64(at + 32, bytes);
    cps_store32(at + 40, file->epoch);
    put_crc(at, FOOTER_BYTES - 4);
}

static uint64_t position_of(const fuzz_file *file, const uint8_t *at) {
    return file->base + (uint64_t)(at - file->bytes) - HEADER_BYTES;
}

/* The CRC that the record at `at` needs. */
static void put_record_crc(const fuzz_file *file, uint8_t *at, size_t held) {
    uint32_t word = cps_load32(at + 4);
    if ((word & PAD_BIT) != 0) {
        uint8_t known[16];
        cps_store32(known, word);
        cps_store64(known + 4, position_of(file, at));
        cps_store32(known + 12, file->epoch);
        cps_store32(at, cps_crc32c_table(0, known, sizeof known));
    } else if (word >= 4 && word <= held) {
        cps_store32(at, cps_crc32c_table(0, at + 4, word - 4));
    }
}

/* ---- segments by description ---- */

void fuzz_content(uint8_t *bytes, size_t size, uint64_t position) { fill(bytes, size, position); }

enum { /* kinds of a described record; everything else is a good message */
    RECORD_PAD = 3, RECORD_DAMAGED = 4, RECORD_GAP = 5, RECORD_WRONG = 6, RECORD_LARGE_GAP = 7,
};

static void put_gap(fuzz_spool *spool, fuzz_file *file, size_t size, uint8_t pattern) {
    uint8_t *at = extend(spool, file, size);
    if (at == NULL) return;
    if (pattern == UINT8_MAX) fill(at, size, size);
    else memset(at, pattern, size);
}

/* Change the fields that a reader looks at, before the CRC is made. */
static void spoil_fields(uint8_t *at, input *in) {
    uint8_t which = take8(in), by = take8(in);
    static const uint8_t fields[8] = {4, 5, 8, 16, 20, 22, 24, 7};
    at[fields[which & 7]] = (uint8_t)(at[fields[which & 7]] + by);
}

static void put_message(fuzz_spool *spool, fuzz_file *file, input *in, uint8_t how, uint64_t *messages,
                        uint64_t *bytes) {
    size_t topic = take8(in) & 31, payload = take8(in), userdata = (how & 0x10) != 0 ? take8(in) & 15 : 0;
    if ((how & 0x08) != 0) payload *= 64;
    size_t length = RECORD_BYTES + topic + payload + userdata, span = (length + 7) & ~(size_t)7;
    uint8_t *at = extend(spool, file, span);
    if (at == NULL) return;
    cps_store32(at + 4, (uint32_t)length);
    cps_store64(at + 8, position_of(file, at));
    cps_store32(at + 16, file->epoch - (how >> 6));
    at[20] = (how >> 5) & 1;
    cps_store16(at + 22, (uint16_t)topic);
    cps_store16(at + 24, (uint16_t)userdata);
    cps_store16(at + 26, 900);
    fuzz_content(at + RECORD_BYTES, length - RECORD_BYTES, position_of(file, at));
    if ((how & 7) == RECORD_WRONG) spoil_fields(at, in);
    put_record_crc(file, at, span);
    if ((how & 7) == RECORD_DAMAGED) at[take8(in) % span] ^= (uint8_t)(take8(in) | 1);
    *messages += 1;
    *bytes += span;
}

static void put_pad(fuzz_spool *spool, fuzz_file *file, input *in) {
    size_t span = (take8(in) + 1u) * 8;
    uint8_t *at = extend(spool, file, span);
    if (at == NULL) return;
    cps_store32(at + 4, (uint32_t)span | PAD_BIT);
    put_record_crc(file, at, span);
}

static void put_tail(fuzz_spool *spool, fuzz_file *file, input *in, unsigned how, uint64_t messages, uint64_t bytes) {
    size_t more = take8(in);
    switch (how & 3) {
    case 0: put_gap(spool, file, more * 64, 0); return; /* room that was never written to */
    case 1: put_gap(spool, file, more, UINT8_MAX); return;
    case 2: /* counts that need not be right */
        messages += more;
        bytes -= (uint64_t)more * 8;
        break;
    default: break;
    }
    uint8_t *at = extend(spool, file, FOOTER_BYTES);
    if (at != NULL) put_footer(file, at, messages, bytes);
}

static void take_segment(fuzz_spool *spool, input *in) {
    fuzz_file *file = add_file(spool, in);
    if (file == NULL) return;
    uint8_t how = take8(in);
    unsigned records = take8(in) % (RECORDS_MAX + 1);
    uint64_t messages = 0, bytes = 0;
    uint8_t *header = extend(spool, file, HEADER_BYTES);
    if (header == NULL) return;
    put_header(file, header, (how & 0x10) != 0);
    if ((how & 3) == 1) file->bytes[take8(in) % HEADER_BYTES] ^= 1; /* the header is lost */
    if ((how & 3) == 2) { /* another spool's */
        file->bytes[16] ^= 1;
        put_crc(file->bytes, HEADER_BYTES - 4);
    }
    while (records-- > 0 && in->left > 0) {
        uint8_t kind = take8(in);
        switch (kind & 7) {
        case RECORD_PAD: put_pad(spool, file, in); break;
        case RECORD_GAP: put_gap(spool, file, (size_t)(kind >> 3) * 8 + 8, take8(in)); break;
        case RECORD_LARGE_GAP: put_gap(spool, file, (size_t)(kind >> 3) * UNIT_BYTES, take8(in)); break;
        default: put_message(spool, file, in, kind, &messages, &bytes);
        }
    }
    put_tail(spool, file, in, how >> 2, messages, bytes);
}

/* ---- segments byte by byte ---- */

/* Give every record of the chain its position and CRC. */
static void mend_records(fuzz_file *file, size_t end, uint64_t *messages, uint64_t *bytes) {
    for (size_t at = HEADER_BYTES; at + 8 <= end;) {
        uint8_t *record = file->bytes + at;
        uint32_t word = cps_load32(record + 4);
        bool is_pad = (word & PAD_BIT) != 0;
        size_t span = ((word & ~PAD_BIT) + 7) & ~(size_t)7;
        if (span < (is_pad ? 8u : RECORD_BYTES) || span > end - at) {
            at += 8; /* no record; the next one may stand behind it */
            continue;
        }
        if (!is_pad) {
            cps_store64(record + 8, position_of(file, record));
            *messages += 1;
            *bytes += span;
        }
        put_record_crc(file, record, end - at);
        at += span;
    }
}

static void take_raw_segment(fuzz_spool *spool, input *in) {
    fuzz_file *file = add_file(spool, in);
    if (file == NULL) return;
    uint8_t mend = take8(in);
    size_t size = take16(in);
    const uint8_t *bytes;
    size_t given = take_bytes(in, take16(in), &bytes);
    uint8_t *at = extend(spool, file, size > given ? size : given);
    if (at == NULL) return;
    memcpy(at, bytes, given);
    size_t end = file->size;
    uint64_t messages = 0, message_bytes = 0;
    if ((mend & 4) != 0 && end >= HEADER_BYTES + FOOTER_BYTES) end -= FOOTER_BYTES;
    if ((mend & 1) != 0 && end >= HEADER_BYTES) put_header(file, file->bytes, true);
    if ((mend & 2) != 0) mend_records(file, end, &messages, &message_bytes);
    if (end < file->size) put_footer(file, file->bytes + end, messages, message_bytes);
}

/* ---- what happens to a file afterwards ---- */

static void damage(fuzz_spool *spool, input *in) {
    uint16_t at = take16(in);
    uint8_t by = take8(in);
    if (spool->count == 0) return;
    fuzz_file *file = &spool->files[spool->count - 1];
    if (file->size > 0) file->bytes[at % file->size] ^= by;
}

static void cut(fuzz_spool *spool, input *in) {
    uint16_t by = take16(in);
    if (spool->count == 0) return;
    fuzz_file *file = &spool->files[spool->count - 1];
    if ((by & 0x8000) != 0) (void)extend(spool, file, by & 0x7fff);
    else file->size -= by < file->size ? by : file->size;
}

static void rename_last(fuzz_spool *spool, input *in) {
    const uint8_t *bytes;
    size_t size = take_bytes(in, take8(in) % (FUZZ_NAME_BYTES - 1), &bytes);
    if (spool->count == 0) return;
    fuzz_file *file = &spool->files[spool->count - 1];
    char name[FUZZ_NAME_BYTES] = {0};
    for (size_t i = 0; i < size; i++) name[i] = (char)(bytes[i] == '/' || bytes[i] == 0 ? '_' : bytes[i]);
    for (unsigned i = 0; i < spool->count; i++)
        if (strcmp(spool->files[i].name, name) == 0) return;
    if (name[0] == 0) return;
    memcpy(file->name, name, sizeof name);
    file->is_renamed = true;
}

/* ---- the meta file ---- */

/* Each count with bytes that fit it. */
static void put_count(uint8_t *at, uint64_t messages) {
    cps_store64(at, messages);
    cps_store64(at + 8, messages * 40);
}

/* Dropped segments whose files may still be there, and the ledger. */
static void put_losses(const fuzz_spool *spool, input *in, uint8_t *slot) {
    for (size_t i = 0; i < 2; i++) cps_store64(slot + 176 + 8 * i, take_place(spool, in) + 1);
    cps_store64(slot + 384, take_place(spool, in));
    cps_store64(slot + 392, take_place(spool, in));
    uint8_t entries = take8(in);
    cps_store64(slot + 400, entries);
    for (size_t i = 0; i < (entries & 3u); i++) {
        uint8_t *at = slot + 1600 + 40 * i;
        cps_store64(at, take_place(spool, in));
        cps_store64(at + 8, take_place(spool, in));
        uint8_t messages = take8(in), reason = take8(in);
        put_count(at + 16, messages);
        cps_store64(at + 32, (uint64_t)reason << 48 | 1);
        if (reason < 8) put_count(slot + 256 + 16 * (size_t)reason, messages);
    }
}

static void take_meta(fuzz_spool *spool, input *in) {
    uint8_t how = take8(in);
    uint8_t *slot = spool->meta + (size_t)(how & 1) * FUZZ_SLOT_BYTES;
    memset(slot, 0, FUZZ_SLOT_BYTES);
    memcpy(slot, "CPSMETA1", 8);
    cps_store32(slot + 8, 1);
    uint8_t epoch = take8(in);
    cps_store32(slot + 12, epoch == UINT8_MAX ? UINT32_MAX : epoch);
    cps_store64(slot + 16, take8(in));
    memcpy(slot + 24, spool_id, 16);
    cps_store64(slot + 40, take8(in));
    uint64_t next = take_place(spool, in);
    cps_store64(slot + 48, next);
    slot[56] = (how >> 3) & 1;
    uint64_t acked = take8(in), dropped = take8(in), dead = take8(in), refused = take8(in), pending = take8(in);
    cps_store64(slot + 64, next);
    put_count(slot + 72, acked + dropped + dead + refused + pending);
    put_count(slot + 88, refused);
    cps_store64(slot + 104, take_place(spool, in)); /* head */
    cps_store64(slot + 112, take_place(spool, in)); /* spilled */
    cps_store64(slot + 120, take_place(spool, in)); /* highest position ever sent */
    put_count(slot + 128, acked);
    put_count(slot + 144, dropped);
    put_count(slot + 160, dead);
    if ((how & 4) != 0) cps_store64(slot + 64 + (size_t)(take8(in) % 14) * 8, take64(in)); /* one that does not fit */
    if ((how & 0x10) != 0) {
        cps_store16(slot + 512, 6);
        memcpy(slot + 514, "client", 6);
    }
    if ((how & 0x20) != 0) slot[24] ^= 1; /* another spool's */
    if ((how & 0x40) != 0) cps_store32(slot + 8, 1 + take8(in) % 3u); /* another version's */
    if ((how & 0x80) != 0) put_losses(spool, in, slot);
    put_crc(slot, FUZZ_SLOT_BYTES - 4);
    if ((how & 2) != 0) slot[take16(in) % FUZZ_SLOT_BYTES] ^= 1;
    spool->meta_size = sizeof spool->meta;
}

static void take_raw_meta(fuzz_spool *spool, input *in) {
    uint8_t how = take8(in);
    const uint8_t *bytes;
    size_t size = take_bytes(in, take16(in) % (FUZZ_SLOT_BYTES + 1), &bytes);
    uint8_t *slot = spool->meta + (size_t)(how & 1) * FUZZ_SLOT_BYTES;
    memset(slot, 0, FUZZ_SLOT_BYTES);
    memcpy(slot, bytes, size);
    if ((how & 2) != 0) put_crc(slot, FUZZ_SLOT_BYTES - 4);
    spool->meta_size = sizeof spool->meta;
    if ((how & 4) != 0) spool->meta_size -= take16(in) % sizeof spool->meta;
}

/* ---- all of it ---- */

void fuzz_spool_build(fuzz_spool *spool, input *in) {
    memset(spool, 0, sizeof *spool);
    spool->room = FUZZ_BYTES_MAX;
    for (unsigned chunks = 0; chunks < CHUNKS_MAX && in->left > 0; chunks++) {
        switch (take8(in) % FUZZ_KINDS) {
        case FUZZ_META: take_meta(spool, in); break;
        case FUZZ_META_RAW: take_raw_meta(spool, in); break;
        case FUZZ_SEGMENT: take_segment(spool, in); break;
        case FUZZ_SEGMENT_RAW: take_raw_segment(spool, in); break;
        case FUZZ_DAMAGE: damage(spool, in); break;
        case FUZZ_CUT: cut(spool, in); break;
        case FUZZ_NAME: rename_last(spool, in); break;
        default: {
            fuzz_file *file = add_file(spool, in);
            if (file != NULL) file->is_folder = true;
        }
        }
    }
}

void fuzz_spool_free(fuzz_spool *spool) {
    for (unsigned i = 0; i < spool->count; i++) free(spool->files[i].bytes);
}

void fuzz_spool_put(const fuzz_spool *spool, sim *s) {
    const cps_io *io = sim_io(s);
    const char *name;
    int error;
    while ((name = sim_name(s, 0)) != NULL) sim_erase(s, name);
    CHECK(io->make_directory(io->context, FUZZ_DIRECTORY "/log", &error) == CPS_OK);
    if (spool->meta_size > 0)
        CHECK(sim_put(s, FUZZ_DIRECTORY "/meta", spool->meta, spool->meta_size) == CPS_OK);
    for (unsigned i = 0; i < spool->count; i++) {
        const fuzz_file *file = &spool->files[i];
        char path[FUZZ_NAME_BYTES + 16];
        (void)snprintf(path, sizeof path, FUZZ_DIRECTORY "/log/%s", file->name);
        if (file->is_folder) CHECK(io->make_directory(io->context, path, &error) == CPS_OK);
        else CHECK(sim_put(s, path, file->bytes, file->size) == CPS_OK);
    }
}

static bool is_whole(const uint8_t *meta, size_t size, size_t slot) {
    const uint8_t *at = meta + slot * FUZZ_SLOT_BYTES;
    return size >= (slot + 1) * FUZZ_SLOT_BYTES && memcmp(at, "CPSMETA1", 8) == 0 &&
           cps_load32(at + 4092) == cps_crc32c_table(0, at, 4092);
}

static bool slot_holds(const uint8_t *meta, size_t size, size_t slot) {
    const uint8_t *at = meta + slot * FUZZ_SLOT_BYTES;
    return is_whole(meta, size, slot) && cps_load32(at + 8) == 1 && cps_load16(at + 512) <= 1024;
}

bool fuzz_spool_is_newer(const fuzz_spool *spool) {
    bool is_newer = false;
    for (size_t i = 0; i < 2; i++)
        is_newer |= is_whole(spool->meta, spool->meta_size, i) &&
                    cps_load32(spool->meta + i * FUZZ_SLOT_BYTES + 8) != 1;
    return is_newer;
}

const uint8_t *fuzz_spool_slot(const uint8_t *meta, size_t size) {
    const uint8_t *best = NULL;
    for (size_t i = 0; i < 2; i++) {
        const uint8_t *at = meta + i * FUZZ_SLOT_BYTES;
        if (slot_holds(meta, size, i) && (best == NULL || cps_load64(at + 16) >= cps_load64(best + 16))) best = at;
    }
    return best;
}

bool fuzz_spool_has_victims(const fuzz_spool *spool) {
    static const uint8_t none[32];
    bool has_victims = false;
    for (size_t i = 0; i < 2; i++)
        has_victims |= slot_holds(spool->meta, spool->meta_size, i) &&
                       memcmp(spool->meta + i * FUZZ_SLOT_BYTES + 176, none, sizeof none) != 0;
    return has_victims;
}

uint64_t fuzz_spool_head(const fuzz_spool *spool) {
    uint64_t head = 0;
    for (size_t i = 0; i < 2; i++) {
        uint64_t said = cps_load64(spool->meta + i * FUZZ_SLOT_BYTES + 104);
        if (slot_holds(spool->meta, spool->meta_size, i) && said > head) head = said;
    }
    return head;
}

static void show_numbers(const char *title, const uint8_t *at, size_t count) {
    fprintf(stderr, "  %s", title);
    for (size_t i = 0; i < count; i++) fprintf(stderr, " %" PRIx64, cps_load64(at + 8 * i));
    fputc('\n', stderr);
}

void fuzz_spool_show(const fuzz_spool *spool) {
    const uint8_t *best = fuzz_spool_slot(spool->meta, spool->meta_size);
    fprintf(stderr, "meta: %zu bytes\n", spool->meta_size);
    if (best != NULL) {
        fprintf(stderr, "  epoch %" PRIu32 ", sequence %" PRIu64 ", clean %d\n", cps_load32(best + 12),
                cps_load64(best + 16), best[56]);
        show_numbers("next position", best + 48, 1);
        show_numbers("published, messages, bytes, refused, refused bytes", best + 64, 5);
        show_numbers("head, spilled, sent, then acked, dropped, dead with bytes", best + 104, 9);
    }
    for (unsigned i = 0; i < spool->count; i++) {
        const fuzz_file *file = &spool->files[i];
        fprintf(stderr, "%s: %zu bytes%s\n", file->name, file->size, file->is_folder ? ", a folder" : "");
        for (size_t at = HEADER_BYTES; at + RECORD_BYTES <= file->size && at < HEADER_BYTES + 4096; at += 8) {
            const uint8_t *record = file->bytes + at;
            uint32_t word = cps_load32(record + 4);
            if ((word & PAD_BIT) != 0 && (word & ~PAD_BIT) <= file->size)
                fprintf(stderr, "  %" PRIx64 " a pad? of %" PRIu32 "\n", position_of(file, record), word & ~PAD_BIT);
            if (cps_load64(record + 8) == position_of(file, record))
                fprintf(stderr, "  %" PRIx64 " a message? of %" PRIu32 "%s\n", position_of(file, record), word,
                        word >= RECORD_BYTES && word <= file->size - at &&
                        cps_load32(record) == cps_crc32c_table(0, record + 4, word - 4) ? ", whole" : "");
        }
        if (file->size < HEADER_BYTES + FOOTER_BYTES) continue;
        const uint8_t *footer = file->bytes + file->size - FOOTER_BYTES;
        if (memcmp(footer, "CPSFOOT1", 8) == 0) show_numbers("footer: base, end, messages, bytes", footer + 8, 4);
    }
}
