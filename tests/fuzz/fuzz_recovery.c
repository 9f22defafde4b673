/* Recovery on the files of any spool: what a reader meets on a disk that lied, or that somebody edited.
 *
 * The input becomes a meta file and segments (files.h).  First the modules alone recover and read them.  Then a log
 * opens the spool, reads to the end, settles a part, appends, and closes or is killed; a second log has to find exactly
 * what the first had left, and nothing damaged that was not; a third one finds nothing at all. */
#include "_bytes.h"
#include "_crc32c.h"
#include "_log.h"
#include "_log_inside.h"
#include "_meta.h"
#include "_record.h"
#include "expect.h"
#include "files.h"
#include "fuzz.h"

enum { OPTIONS = 8, TOPIC_BYTES = 5, PATIENCE_MS = 60000 };

/* ---- a disk without chance ---- */

static sim *disk;
static cps_io io;
static uint64_t chance;

static void do_random(void *context, void *bytes, size_t size) {
    (void)context;
    fill(bytes, size, scramble(&chance));
}

static void do_boot_id(void *context, uint8_t id[16]) {
    (void)context;
    memset(id, 0, 16);
    id[0] = 1;
}

static uint64_t do_boottime(void *context) {
    (void)context;
    return 5000;
}

/* What lies behind the end of a file is not zeros but whatever stood there. */
static enum cps_status do_read(void *context, int handle, void *bytes, size_t size, uint64_t offset, size_t *got,
                               int *error) {
    enum cps_status status = sim_io(disk)->read(context, handle, bytes, size, offset, got, error);
    if (status == CPS_OK) memset((uint8_t *)bytes + *got, 0x5a, size - *got);
    return status;
}

static void make_disk(void) {
    disk = sim_new(false);
    io = *sim_io(disk);
    io.random = do_random;
    io.boot_id = do_boot_id;
    io.boottime_ms = io.wall_ms = do_boottime;
    io.read = do_read;
    chance = 1;
}

/* ---- the modules alone ---- */

static void read_segment(cps_segment *segment, size_t batch, cps_scratch *scratch) {
    uint64_t at = segment->base, messages = 0;
    bool is_exact = !segment->sealed; /* else a footer said how many there are, and it may not know */
    int error;
    while (at < segment->end) {
        cps_span span;
        CHECK(cps_segment_span(segment, at, segment->end, batch, scratch, &span, &error) == CPS_OK);
        CHECK(span.position == at);
        if (span.size == 0) {
            CHECK(span.lost_end > at && span.lost_end <= segment->end && span.lost_messages > 0);
            at = span.lost_end;
            is_exact = false;
        }
        for (size_t i = 0; i < span.size;) {
            cps_record record;
            CHECK(cps_record_load(span.bytes + i, span.size - i, at, &record) == CPS_OK);
            i += (size_t)cps_record_span(record.length_bytes);
            at += cps_record_span(record.length_bytes);
            messages += !record.is_pad;
        }
        CHECK(at <= segment->end);
    }
    CHECK(!is_exact || messages == segment->messages);
    cps_segment_rest(segment);
}

static void use_modules(const fuzz_spool *spool, size_t batch) {
    cps_meta meta;
    cps_store store;
    cps_quarantine quarantine;
    cps_recovery recovery;
    cps_scratch scratch = {0};
    bool damaged;
    uint32_t epoch;
    int error;
    enum cps_status status = cps_meta_open(&io, FUZZ_DIRECTORY "/meta", &meta, &damaged, &error);
    if (status == CPS_UNKNOWN && fuzz_spool_is_newer(spool)) return;
    CHECK(status == CPS_OK);
    CHECK(meta.identity_bytes <= CPS_META_IDENTITY_MAX);
    if (meta.epoch == 0) (void)cps_store_identify(&io, FUZZ_DIRECTORY "/log", meta.spool_id, &epoch);
    CHECK(cps_quarantine_open(&quarantine, &io, FUZZ_DIRECTORY, batch * 64) == CPS_OK);
    status = cps_store_recover(&store, &io, FUZZ_DIRECTORY "/log", meta.spool_id, &quarantine, &recovery, &error);
    CHECK(status == CPS_OK);
    cps_store_check(&store);
    CHECK(recovery.segments == store.segments);
    uint64_t reached = 0;
    for (cps_segment *s = store.first; s != NULL; s = s->next) {
        CHECK(s->base >= reached && s->end >= s->base);
        reached = s->end;
        read_segment(s, batch, &scratch);
    }
    cps_scratch_close(&scratch);
    cps_store_close(&store);
    cps_meta_close(&meta);
}

/* ---- the log ---- */

static void check_log(cps_log *log, cps_log_stats *out) {
    cps_log_stats stats;
    cps_log_check(log);
    cps_log_stats_now(log, &stats);
    const cps_settled *s = &stats.settled;
    uint64_t ended = stats.produced.refused + s->acked_messages + s->dropped_messages + s->dead_messages;
    uint64_t ended_bytes = stats.produced.refused_bytes + s->acked_bytes + s->dropped_bytes + s->dead_bytes;
    CHECK(stats.produced.messages == ended + stats.pending_messages);
    CHECK(stats.produced.bytes == ended_bytes + stats.pending_bytes);
    CHECK(stats.pending_messages < UINT64_MAX / 4); /* it did not fall below 0 */
    CHECK(stats.pending_bytes < UINT64_MAX / 4);
    CHECK(s->head <= stats.sent && stats.sent <= stats.produced.published);
    CHECK(stats.produced.published < CPS_REFUSED_POSITION);
    if (out != NULL) *out = stats;
}

static void check_drained(cps_log *log) {
    cps_log_stats stats;
    check_log(log, &stats);
    CHECK(stats.settled.head == stats.produced.published);
    CHECK(stats.pending_messages == 0 && stats.pending_bytes == 0);
}

/* Read to the end, which is returned, in batches of about `batch` bytes, of which at most `take` messages are taken at
 * once. */
static uint64_t read_all(cps_log *log, const fuzz_spool *spool, size_t batch, unsigned take, fuzz_records *out) {
    uint64_t reached = 0;
    cps_batch got;
    enum cps_status status;
    while ((status = cps_log_read(log, batch, &got)) == CPS_OK) {
        CHECK(got.position >= reached);
        if (got.size == 0) {
            CHECK(got.lost_end > got.position);
            cps_log_read_done(log, got.lost_end - got.position);
            reached = got.lost_end;
            continue;
        }
        size_t at = 0;
        for (unsigned taken = 0; at < got.size && taken < take;) {
            cps_record record;
            uint64_t position = got.position + at;
            CHECK(cps_record_load(got.bytes + at, got.size - at, position, &record) == CPS_OK);
            uint64_t span = cps_record_span(record.length_bytes);
            if (!record.is_pad) {
                if (spool != NULL) CHECK(fuzz_is_genuine(spool, position, got.bytes + at, record.length_bytes));
                fuzz_add(out, (fuzz_record){position, position + span, fuzz_digest(got.bytes + at)});
                taken++;
            }
            at += (size_t)span;
        }
        reached = got.position + at;
        cps_log_read_done(log, at);
    }
    CHECK(status == CPS_EMPTY);
    return reached;
}

static bool is_same(const fuzz_record *a, const fuzz_record *b) {
    return a->position == b->position && a->end == b->end && a->digest == b->digest;
}

/* Nothing is missing of what was wanted `from` there on. */
static void check_contains(const fuzz_records *seen, const fuzz_records *wanted, size_t from) {
    size_t found = from;
    for (size_t i = 0; i < seen->count && found < wanted->count; i++)
        found += is_same(&seen->list[i], &wanted->list[found]);
    CHECK(found == wanted->count);
}

/* The log delivers what was wanted `from` there on, no more and no less. */
static void check_same(const fuzz_records *seen, const fuzz_records *wanted, size_t from) {
    CHECK(seen->count == wanted->count - from);
    check_contains(seen, wanted, from);
}

/* Acknowledge these, which are the oldest of what was read. */
static void settle(cps_log *log, const fuzz_record *list, size_t count, bool through) {
    uint64_t bytes = 0;
    if (count == 0) return;
    for (size_t i = 0; i < count; i++) bytes += list[i].end - list[i].position;
    if (through) CHECK(cps_log_settle_through(log, list[count - 1].position) == CPS_OK);
    else cps_log_settle(log, list[count - 1].end, count, bytes, NULL, 0);
}

static void append(cps_log *log, size_t payload_bytes, fuzz_records *out) {
    uint8_t whole[32 + TOPIC_BYTES + 1024] = {0};
    uint8_t *payload = whole + 32 + TOPIC_BYTES;
    memcpy(whole + 32, "topic", TOPIC_BYTES);
    fill(payload, payload_bytes, out->count);
    cps_message message = {.topic = whole + 32, .topic_bytes = TOPIC_BYTES, .payload = payload,
                           .payload_bytes = (uint32_t)payload_bytes, .flags = CPS_RECORD_RETAIN};
    cps_store32(whole + 4, (uint32_t)(32 + TOPIC_BYTES + payload_bytes));
    whole[20] = CPS_RECORD_RETAIN;
    cps_store16(whole + 22, TOPIC_BYTES);
    uint64_t position, last = cps_log_published(log);
    cps_patience patience = {.slice_ms = CPS_NO_LIMIT_MS};
    CHECK(cps_log_append(log, &message, &patience, &position) == CPS_OK);
    CHECK(position >= last && position < CPS_REFUSED_POSITION);
    uint64_t end = position + cps_record_span(32 + TOPIC_BYTES + payload_bytes);
    fuzz_add(out, (fuzz_record){position, end, fuzz_digest(whole)});
}

static void close_log(cps_log *log, bool kill) {
    uint64_t unsaved;
    if (kill) { /* between two operations of the log: a real kill is an instant, copying the ring's file is not */
        (void)pthread_mutex_lock(&log->lock);
        sim_kill(disk);
        (void)pthread_mutex_unlock(&log->lock);
    }
    CHECK(cps_log_finish(log, PATIENCE_MS));
    cps_log_close(log, PATIENCE_MS, &unsaved);
    if (kill) sim_restart(disk, false, 0);
    else CHECK(unsaved == 0);
}

typedef struct plan { /* what the options say */
    cps_log_config config;
    size_t batch;
    unsigned take;
    uint8_t settle_share;
    unsigned appends;
    size_t append_bytes;
    bool rewinds, settles_through, syncs, kills;
} plan;

static plan read_plan(const uint8_t options[OPTIONS]) {
    static const uint16_t batches[8] = {1, 40, 64, 500, 4096, 16384, 65535, 8};
    plan p = {.batch = batches[options[1] & 7], .take = (options[1] & 8) != 0 ? 1 : UINT32_MAX,
              .settle_share = options[2], .appends = options[3] & 31, .append_bytes = (size_t)(options[3] >> 5) * 128};
    p.config = (cps_log_config){
        .io = &io, .directory = FUZZ_DIRECTORY, .ring_directory = (options[0] & 4) != 0 ? "/shm" : NULL,
        .durability = (enum cps_durability)((options[0] & 3) % 3), .on_full = (enum cps_on_full)(options[0] >> 3 & 3),
        .ring_bytes = 4096u << (options[1] >> 4 & 3), .segment_bytes = 4096u << (options[1] >> 6), .adopt = true,
        .spool_bytes_max = (uint64_t)1 << 40, .spill_after_ms = PATIENCE_MS, .spill_timeout_ms = PATIENCE_MS,
        .block_timeout_ms = PATIENCE_MS, .sync_interval_ms = PATIENCE_MS, .seal_after_ms = PATIENCE_MS,
    };
    if ((options[0] & 0x20) != 0) {
        p.config.identity = (const uint8_t *)"client";
        p.config.identity_bytes = 6;
        p.config.adopt = (options[0] & 0x40) != 0;
    }
    p.rewinds = (options[4] & 1) != 0;
    p.settles_through = (options[4] & 2) != 0;
    p.syncs = (options[4] & 4) != 0;
    /* Only a ring in tmpfs outlives a kill with all its records. */
    p.kills = (options[4] & 8) != 0 && p.config.durability != CPS_DURABILITY_MEMORY && p.config.ring_directory != NULL;
    return p;
}

/* Nothing may be passed over: all that the files hold is read, but what the meta file says is settled. */
static enum fuzz_clarity check_complete(const fuzz_spool *spool, const cps_opened *opened, uint64_t head,
                                        const fuzz_records *seen) {
    uint8_t *meta;
    uint64_t size;
    CHECK(sim_peek(disk, FUZZ_DIRECTORY "/meta", &meta, &size) == CPS_OK);
    const uint8_t *slot = fuzz_spool_slot(meta, (size_t)size);
    CHECK(slot != NULL); /* opening has saved it */
    fuzz_records expected = {0};
    enum fuzz_clarity clarity = fuzz_expect(spool, slot + 24, &expected);
    if (clarity == FUZZ_CLEAR && !fuzz_spool_has_victims(spool)) {
        size_t settled = 0;
        while (settled < expected.count && expected.list[settled].position < head) settled++;
        uint64_t said = opened->meta_damaged ? 0 : fuzz_spool_head(spool);
        CHECK(settled == 0 || expected.list[settled - 1].position < said);
        check_same(seen, &expected, settled);
    }
    fuzz_records_free(&expected);
    return clarity;
}

static void use_log(const fuzz_spool *spool, const plan *p) {
    cps_opened first, second;
    cps_log *log;
    cps_log_stats stats;
    fuzz_records seen = {0}, again = {0};
    enum cps_status status = cps_log_open(&p->config, &log, &first);
    if (status == CPS_FOREIGN && !p->config.adopt) return;
    if (status == CPS_UNKNOWN && fuzz_spool_is_newer(spool)) return;
    CHECK(status == CPS_OK);
    check_log(log, &stats);
    uint64_t head = stats.settled.head;
    (void)read_all(log, spool, p->batch, p->take, &seen);
    check_log(log, NULL);
    enum fuzz_clarity clarity = check_complete(spool, &first, head, &seen);
    if (p->rewinds) {
        cps_log_rewind(log);
        (void)read_all(log, spool, p->batch, UINT32_MAX, &again);
        check_same(&again, &seen, 0);
        check_log(log, NULL);
    }
    size_t settled = seen.count * p->settle_share / UINT8_MAX;
    settle(log, seen.list, settled, p->settles_through);
    check_log(log, NULL);
    for (unsigned i = 0; i < p->appends; i++) append(log, p->append_bytes, &seen);
    if (p->syncs) CHECK(cps_log_wait_synced(log, UINT64_MAX / 2, PATIENCE_MS) == CPS_OK);
    check_log(log, NULL);
    close_log(log, p->kills);

    CHECK(cps_log_open(&p->config, &log, &second) == CPS_OK);
    CHECK(!second.meta_damaged && second.clean == !p->kills);
    CHECK(second.recovery.unreadable <= first.recovery.unreadable);
    CHECK(second.recovery.overlapping <= first.recovery.overlapping);
    /* Once the file that counted is gone, another one with the same positions may show more of them, and more damage. */
    if (first.recovery.overlapping == 0) {
        CHECK(second.recovery.scan.damaged_ranges <= first.recovery.scan.damaged_ranges);
        CHECK(second.recovery.scan.damaged_bytes <= first.recovery.scan.damaged_bytes);
    }
    check_log(log, NULL);
    again.count = 0;
    uint64_t reached = read_all(log, NULL, p->batch, UINT32_MAX, &again);
    if (clarity == FUZZ_CLEAR) check_same(&again, &seen, settled);
    if (clarity == FUZZ_OVERLAPPING) check_contains(&again, &seen, settled);
    settle(log, again.list, again.count, p->settles_through);
    check_log(log, &stats);
    if (reached > stats.settled.head) cps_log_settle(log, reached, 0, 0, NULL, 0); /* what is lost behind the last message */
    check_drained(log);
    close_log(log, false);

    CHECK(cps_log_open(&p->config, &log, &second) == CPS_OK);
    /* Of files that overlapped one is left to this open to remove; all others are gone. */
    CHECK(second.clean && (first.recovery.overlapping > 0 || second.recovery.scan.damaged_ranges == 0));
    again.count = 0;
    (void)read_all(log, NULL, p->batch, UINT32_MAX, &again);
    check_drained(log);
    check_log(log, &stats);
    CHECK(again.count == 0 && stats.spool_segments == 0);
    close_log(log, false);
    fuzz_records_free(&seen);
    fuzz_records_free(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size <= OPTIONS) return 0;
    input in = {data + OPTIONS, size - OPTIONS};
    fuzz_spool spool;
    fuzz_spool_build(&spool, &in);
    if (getenv("FUZZ_SHOW") != NULL) fuzz_spool_show(&spool);
    make_disk();
    plan p = read_plan(data);
    fuzz_spool_put(&spool, disk);
    use_modules(&spool, p.batch);
    fuzz_spool_put(&spool, disk); /* recovery has removed what was empty */
    use_log(&spool, &p);
    sim_free(disk);
    fuzz_spool_free(&spool);
    return 0;
}
