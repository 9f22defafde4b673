/* Threads on a ring and on a whole log; see the header. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "stress.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "_log_inside.h"
#include "_record.h"

enum { PRODUCERS_MAX = 8, PAYLOAD_MAX = 200, FLIGHT_MAX = 4096 };

typedef struct making { /* one producer */
    cps_log *log;
    cps_ring *ring;
    uint32_t number;
    uint64_t count;
    uint64_t full;
    uint64_t until_ms;
    uint32_t payload_max;
    pthread_t thread;
    const char *wrong;
} making;

static uint64_t scramble(uint64_t *state) { /* splitmix64 */
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint64_t now_ms(void) { return cps_io_system()->monotonic_ms(NULL); }

/* The nth message of a producer: everything in it follows from the two numbers. */
static void compose(uint32_t producer, uint64_t n, uint32_t payload_max, uint8_t topic[4], uint8_t *payload,
                    uint8_t userdata[8], cps_message *m) {
    uint64_t state = (uint64_t)producer << 48 ^ n;
    uint64_t dice = scramble(&state);
    uint32_t size = 12 + (uint32_t)(dice % (payload_max - 12 + 1));
    memcpy(topic, "a/b", 4);
    topic[3] = (uint8_t)('0' + producer);
    cps_store32(payload, producer);
    cps_store64(payload + 4, n);
    for (uint32_t i = 12; i < size; i++) payload[i] = (uint8_t)(dice >> (i % 56));
    cps_store64(userdata, ~n);
    *m = (cps_message){.topic = topic, .payload = payload, .userdata = userdata, .topic_bytes = 4,
                       .payload_bytes = size, .userdata_bytes = (uint16_t)(dice >> 60), .stamp_ms = n & 0xffff,
                       .flags = (uint8_t)(dice >> 40 & 1)};
    if (m->userdata_bytes > 8) m->userdata_bytes = 8;
}

/* Is the record what its producer composed?  Returns its number and producer. */
static const char *check(const uint8_t *at, const cps_record *r, uint32_t payload_max, uint32_t *producer, uint64_t *n) {
    uint8_t topic[4], payload[PAYLOAD_MAX], userdata[8];
    cps_message m;
    if (r->payload_bytes < 12) return "a payload is too short";
    *producer = cps_load32(cps_record_payload(at, r));
    *n = cps_load64(cps_record_payload(at, r) + 4);
    if (*producer >= PRODUCERS_MAX) return "a payload is of nobody";
    compose(*producer, *n, payload_max, topic, payload, userdata, &m);
    if (r->topic_bytes != 4 || memcmp(cps_record_topic(at), topic, 4) != 0) return "a topic differs";
    if (r->payload_bytes != m.payload_bytes || memcmp(cps_record_payload(at, r), payload, m.payload_bytes) != 0)
        return "a payload differs";
    if (r->userdata_bytes != m.userdata_bytes || memcmp(cps_record_userdata(at, r), userdata, m.userdata_bytes) != 0)
        return "userdata differ";
    if (r->flags != m.flags) return "flags differ";
    for (uint64_t i = r->length_bytes; i < cps_record_span(r->length_bytes); i++)
        if (at[i] != 0) return "padding is not zero";
    return NULL;
}

static void *produce(void *argument) {
    making *p = argument;
    uint8_t topic[4], payload[PAYLOAD_MAX], userdata[8];
    uint64_t last = 0;
    while (now_ms() < p->until_ms && p->wrong == NULL) {
        for (unsigned i = 0; i < 64 && p->wrong == NULL;) {
            cps_message m;
            uint64_t position = 0;
            unsigned due;
            cps_patience patience = {.slice_ms = CPS_NO_LIMIT_MS};
            compose(p->number, p->count, p->payload_max, topic, payload, userdata, &m);
            enum cps_status status = p->log != NULL ? cps_log_append(p->log, &m, (p->count & 1) != 0 ? NULL : &patience, &position)
                                                    : cps_ring_push(p->ring, &m, false, &position, &due);
            if (p->log != NULL && status == CPS_BUSY) status = cps_log_append(p->log, &m, &patience, &position);
            if (status == CPS_FULL) {
                p->full++;
                if (now_ms() >= p->until_ms) break;
                (void)sched_yield();
                continue;
            }
            if (status != CPS_OK && status != CPS_DROPPED) p->wrong = "a push failed";
            if (status == CPS_OK && p->count > 0 && position <= last) p->wrong = "positions do not grow";
            if (status == CPS_OK) last = position;
            p->count++;
            i++;
        }
    }
    return NULL;
}

static void start(making *all, unsigned producers, cps_log *log, cps_ring *ring, uint64_t until_ms,
                  uint32_t payload_max) {
    for (unsigned i = 0; i < producers; i++) {
        all[i] = (making){.log = log, .ring = ring, .number = i, .until_ms = until_ms, .payload_max = payload_max};
        CPS_ASSERT(pthread_create(&all[i].thread, NULL, produce, &all[i]) == 0);
    }
}

static const char *join(making *all, unsigned producers, stress_report *report) {
    const char *wrong = NULL;
    for (unsigned i = 0; i < producers; i++) {
        (void)pthread_join(all[i].thread, NULL);
        if (all[i].wrong != NULL) wrong = all[i].wrong;
        report->full += all[i].full;
    }
    return wrong;
}

/* ---- ring ---- */

typedef struct reading { /* one reader of the ring */
    cps_ring *ring;
    pthread_mutex_t *lock; /* of the log, as far as the ring can tell */
    uint64_t *cursors;     /* of both, under the lock */
    unsigned pin;
    uint64_t next[PRODUCERS_MAX];
    uint64_t messages;
    uint64_t wraps;
    bool *stop; /* under the lock */
    uint32_t payload_max;
    const char *wrong;
    pthread_t thread;
} reading;

static const char *check_run(reading *r, const uint8_t *bytes, size_t size, uint64_t position) {
    for (size_t at = 0; at < size;) {
        cps_record record;
        uint32_t producer;
        uint64_t n;
        if (cps_record_load(bytes + at, size - at, position + at, &record) != CPS_OK) return "the chain is broken";
        const char *wrong = record.is_pad ? NULL : check(bytes + at, &record, r->payload_max, &producer, &n);
        if (wrong != NULL) return wrong;
        if (!record.is_pad && r->next[producer]++ != n) return "a message is missing, or came twice";
        r->messages += !record.is_pad;
        r->wraps += record.is_pad;
        at += (size_t)cps_record_span(record.length_bytes);
    }
    return NULL;
}

static void *read_ring(void *argument) {
    reading *r = argument;
    (void)pthread_mutex_lock(r->lock);
    while (r->wrong == NULL) {
        uint64_t position = r->cursors[r->pin];
        const uint8_t *bytes;
        size_t size;
        if (cps_ring_view(r->ring, position, &bytes, &size) == CPS_EMPTY) {
            if (*r->stop) break;
            (void)pthread_mutex_unlock(r->lock);
            (void)sched_yield();
            (void)pthread_mutex_lock(r->lock);
            continue;
        }
        cps_ring_pin(r->ring, r->pin, position);
        (void)pthread_mutex_unlock(r->lock);
        r->wrong = check_run(r, bytes, size, position);
        (void)pthread_mutex_lock(r->lock);
        r->cursors[r->pin] = position + size;
        /* The other one's place is ours to free as well: whoever is faster releases, the pin of the slower one holds. */
        uint64_t low = r->cursors[0] < r->cursors[1] ? r->cursors[0] : r->cursors[1];
        cps_ring_release(r->ring, low);
        cps_ring_unpin(r->ring, r->pin);
    }
    (void)pthread_mutex_unlock(r->lock);
    return NULL;
}

const char *stress_ring(uint64_t ring_bytes, uint64_t start_at, unsigned producers, uint64_t duration_ms,
                        stress_report *report) {
    making makers[PRODUCERS_MAX];
    reading readers[2];
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    uint64_t cursors[2] = {start_at, start_at};
    bool stop = false;
    uint32_t payload_max = ring_bytes / 4 - 48 < PAYLOAD_MAX ? (uint32_t)(ring_bytes / 4) - 48 : PAYLOAD_MAX;
    memset(report, 0, sizeof *report);
    cps_shared *shared = aligned_alloc(64, CPS_SHARED_BYTES);
    uint8_t *memory = malloc((size_t)ring_bytes);
    CPS_ASSERT(shared != NULL && memory != NULL && producers <= PRODUCERS_MAX && ring_bytes >= 256);
    memset(shared, 0, CPS_SHARED_BYTES);
    cps_produced produced = {.published = start_at};
    cps_shared_commit_produced(shared, &produced);
    cps_ring *ring;
    CPS_ASSERT(cps_ring_open(memory, ring_bytes, shared, 1, start_at, &ring) == CPS_OK);
    for (unsigned i = 0; i < 2; i++) {
        readers[i] = (reading){.ring = ring, .lock = &lock, .cursors = cursors, .pin = i, .stop = &stop,
                               .payload_max = payload_max};
        CPS_ASSERT(pthread_create(&readers[i].thread, NULL, read_ring, &readers[i]) == 0);
    }
    start(makers, producers, NULL, ring, now_ms() + duration_ms, payload_max);
    const char *wrong = join(makers, producers, report);
    (void)pthread_mutex_lock(&lock);
    stop = true;
    (void)pthread_mutex_unlock(&lock);
    for (unsigned i = 0; i < 2; i++) {
        (void)pthread_join(readers[i].thread, NULL);
        if (readers[i].wrong != NULL) wrong = readers[i].wrong;
        for (unsigned p = 0; p < producers && wrong == NULL; p++)
            if (readers[i].next[p] != makers[p].count) wrong = "the last messages are missing";
    }
    report->messages = readers[0].messages;
    report->wraps = readers[0].wraps;
    cps_shared_read_produced(shared, &produced);
    if (wrong == NULL && produced.messages != report->messages) wrong = "the counter differs";
    cps_ring_check(ring);
    cps_ring_close(ring);
    free(memory);
    free(shared);
    return wrong;
}

/* ---- log ---- */

typedef struct flight { /* what was read and is not settled */
    uint64_t end;
    uint64_t span;
    uint64_t n;
    uint32_t producer;
} flight;

typedef struct following { /* the log's reader */
    cps_log *log;
    bool lossless;
    uint64_t seed;
    uint64_t last_end;
    uint64_t seen[PRODUCERS_MAX];    /* next number of each producer */
    uint64_t settled[PRODUCERS_MAX]; /* the same, as of head */
    flight flights[FLIGHT_MAX];
    unsigned in_flight;
    stress_report *report;
} following;

static const char *take_batch(following *f, const cps_batch *batch, size_t *consumed) {
    *consumed = 0;
    while (*consumed < batch->size && f->in_flight < FLIGHT_MAX) {
        const uint8_t *at = batch->bytes + *consumed;
        uint64_t position = batch->position + *consumed;
        cps_record r;
        if (cps_record_load(at, batch->size - *consumed, position, &r) != CPS_OK) return "the chain is broken";
        uint64_t span = cps_record_span(r.length_bytes);
        *consumed += (size_t)span;
        if (r.is_pad) {
            f->report->wraps++;
            continue;
        }
        flight *one = &f->flights[f->in_flight];
        const char *wrong = check(at, &r, PAYLOAD_MAX, &one->producer, &one->n);
        if (wrong != NULL) return wrong;
        if (position < f->last_end) return "positions go back";
        if (one->n < f->seen[one->producer]) return "a message came twice";
        if (f->lossless && one->n != f->seen[one->producer]) return "a message is missing";
        f->seen[one->producer] = one->n + 1;
        f->last_end = one->end = position + span;
        one->span = span;
        f->in_flight++;
        f->report->messages++;
    }
    return NULL;
}

static void settle(following *f, unsigned count) {
    uint64_t bytes = 0;
    if (count == 0) return;
    for (unsigned i = 0; i < count; i++) {
        bytes += f->flights[i].span;
        f->settled[f->flights[i].producer] = f->flights[i].n + 1;
    }
    cps_log_settle(f->log, f->flights[count - 1].end, count, bytes, NULL, 0);
    f->in_flight -= count;
    memmove(f->flights, f->flights + count, f->in_flight * sizeof *f->flights);
}

static void rewind_all(following *f) {
    f->last_end = 0;
    f->in_flight = 0;
    memcpy(f->seen, f->settled, sizeof f->seen);
    cps_log_rewind(f->log);
    f->report->rewinds++;
}

/* One step of the reader.  `*idle`: there was nothing to do. */
static const char *follow(following *f, bool drain, bool *idle) {
    uint64_t dice = scramble(&f->seed);
    cps_batch batch;
    *idle = false;
    if (!drain && dice % 61 == 0) cps_log_link(f->log, dice % 2 == 0);
    if (!drain && dice % 97 == 0) rewind_all(f);
    if (!drain && dice % 67 == 0) { /* an outage: until the producers are well ahead, or cannot go on */
        uint64_t enough = cps_log_published(f->log) + dice % 65536, end = now_ms() + 20;
        while (cps_log_published(f->log) < enough && now_ms() < end) (void)sched_yield();
    }
    if (f->in_flight > 0 && dice % 3 == 0) {
        uint64_t position = f->flights[f->in_flight - 1].end - f->flights[f->in_flight - 1].span;
        cps_record record;
        const uint8_t *at;
        uint32_t producer;
        uint64_t n;
        if (cps_log_look(f->log, position, &record, &at) != CPS_OK) return "a message in flight cannot be looked at";
        const char *wrong = check(at, &record, PAYLOAD_MAX, &producer, &n);
        if (wrong != NULL) return wrong;
    }
    enum cps_status status = cps_log_read(f->log, 1 + (size_t)(dice % 8192), &batch);
    if (status == CPS_OK) {
        size_t consumed;
        const char *wrong = take_batch(f, &batch, &consumed);
        cps_log_read_done(f->log, batch.size > 0 ? consumed : batch.lost_end - batch.position);
        if (wrong != NULL) return wrong;
        if (batch.size == 0) return "something was damaged";
        if (consumed == batch.size && !drain && dice % 5 != 0) return NULL;
    } else if (status != CPS_EMPTY) {
        return "a read failed";
    }
    *idle = status == CPS_EMPTY && (f->in_flight == 0 || !drain);
    settle(f, drain || f->in_flight == FLIGHT_MAX ? f->in_flight : (unsigned)(dice >> 32) % (f->in_flight + 1));
    return NULL;
}

const char *stress_log(cps_log *log, unsigned producers, uint64_t duration_ms, bool lossless, uint64_t seed,
                       stress_report *report) {
    making makers[PRODUCERS_MAX];
    following *f = calloc(1, sizeof *f);
    CPS_ASSERT(f != NULL && producers <= PRODUCERS_MAX);
    memset(report, 0, sizeof *report);
    *f = (following){.log = log, .lossless = lossless, .seed = seed, .report = report};
    uint64_t until = now_ms() + duration_ms;
    const char *wrong = NULL;
    bool idle;
    cps_log_link(log, true);
    start(makers, producers, log, NULL, until, PAYLOAD_MAX);
    while (wrong == NULL && now_ms() < until) {
        wrong = follow(f, false, &idle);
        if (idle) (void)sched_yield();
    }
    rewind_all(f);
    uint64_t give_up = now_ms() + 20000;
    bool joined = false;
    while (wrong == NULL) { /* producers may still wait for room */
        wrong = follow(f, true, &idle);
        if (idle && joined) break;
        if (idle && !joined && cps_log_arm(log)) {
            wrong = join(makers, producers, report);
            joined = true;
        }
        if (now_ms() > give_up) wrong = "draining takes for ever";
    }
    if (!joined) {
        cps_log_shut(log);
        (void)join(makers, producers, report);
    }
    cps_log_check(log);
    cps_log_stats_now(log, &report->stats);
    for (unsigned p = 0; p < producers && lossless && wrong == NULL; p++)
        if (f->settled[p] != makers[p].count) wrong = "the last messages are missing";
    free(f);
    return wrong;
}

size_t stress_kill(cps_log *log, sim *s, cps_loss *losses, uint64_t *spilled) {
    (void)pthread_mutex_lock(&log->lock);
    sim_kill(s);
    *spilled = log->settled.spilled;
    size_t count = log->losses_used;
    memcpy(losses, log->losses, count * sizeof *losses);
    (void)pthread_mutex_unlock(&log->lock);
    return count;
}

void stress_ledger(cps_log *log, cps_ledger *out) {
    (void)pthread_mutex_lock(&log->lock);
    *out = log->ledger;
    (void)pthread_mutex_unlock(&log->lock);
}

void stress_use_up(cps_log *log, uint64_t bytes) {
    (void)pthread_mutex_lock(&log->lock);
    cps_log_reserved(log, cps_ring_published(log->ring) + bytes);
    (void)pthread_cond_signal(&log->work);
    (void)pthread_mutex_unlock(&log->lock);
}

enum cps_status stress_append(cps_log *log, uint64_t count, uint32_t payload_bytes, uint64_t *position) {
    uint8_t *payload = malloc(payload_bytes + 1u);
    CPS_ASSERT(payload != NULL);
    memset(payload, 'x', payload_bytes);
    cps_message m = {.topic = (const uint8_t *)"gateway/sensors/temp", .topic_bytes = 20, .payload = payload,
                     .payload_bytes = payload_bytes};
    enum cps_status status = CPS_OK;
    while (count-- > 0 && status == CPS_OK) {
        cps_patience patience = {.slice_ms = CPS_NO_LIMIT_MS};
        status = cps_log_append(log, &m, &patience, position);
    }
    free(payload);
    return status;
}

enum cps_status stress_drain(cps_log *log, size_t batch_bytes, uint64_t *messages) {
    uint64_t last = 0;
    *messages = 0;
    for (;;) {
        cps_batch batch;
        enum cps_status status = cps_log_read(log, batch_bytes, &batch);
        if (status != CPS_OK) return status == CPS_EMPTY ? CPS_OK : status;
        uint64_t count = 0, bytes = 0;
        for (size_t at = 0; at < batch.size;) {
            cps_record r;
            if (cps_record_load(batch.bytes + at, batch.size - at, batch.position + at, &r) != CPS_OK) return CPS_DAMAGED;
            uint64_t span = cps_record_span(r.length_bytes);
            count += !r.is_pad;
            bytes += r.is_pad ? 0 : span;
            at += (size_t)span;
        }
        if (batch.position < last) return CPS_DAMAGED;
        last = batch.size > 0 ? batch.position + batch.size : batch.lost_end;
        cps_log_read_done(log, last - batch.position);
        cps_log_settle(log, last, count, bytes, NULL, 0);
        *messages += count;
    }
}
