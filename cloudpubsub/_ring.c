/* The byte ring; see the header for what it promises. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "_ring.h"

#include <pthread.h>
#include <stdlib.h>


#define NOT_ARMED UINT64_MAX

struct cps_ring {
    /* Set at open, read by everybody. */
    uint8_t *memory;
    uint64_t ring_bytes;
    cps_shared *shared;
    uint32_t epoch;

    /* Producers' side, guarded by `lock`. */
    _Alignas(64) pthread_mutex_t lock;
    cps_produced produced;
    uint64_t reclaim_seen; /* copy of `reclaim`, read again only when it leaves no room */
    uint64_t wake_at[CPS_RING_WAKERS];
    uint64_t position_limit; /* written with the readers serialised too, who may read it without the lock */
    bool shut;
    _Atomic uint64_t published; /* stored under `lock`, read without it: whoever sees it sees the bytes before it */

    /* Readers' side, serialised by the caller. */
    _Alignas(64) _Atomic uint64_t reclaim; /* producers may overwrite below it: a reader's last load of the bytes comes
                                              before a producer's first store over them */
    uint64_t limit; /* what the log has released; `reclaim` stays behind it while a pin lies lower */
    uint64_t pin_position[CPS_RING_PINS];
    bool pin_used[CPS_RING_PINS];
};

static void init_lock(pthread_mutex_t *lock) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_t *chosen = NULL;
    CPS_ASSERT(pthread_mutexattr_init(&attributes) == 0);
#ifdef PTHREAD_ADAPTIVE_MUTEX_INITIALIZER_NP
    /* Copies under the lock take tens of nanoseconds: a short spin is cheaper than a sleep. */
    CPS_ASSERT(pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ADAPTIVE_NP) == 0);
#endif
    chosen = &attributes;
    CPS_ASSERT(pthread_mutex_init(lock, chosen) == 0);
    (void)pthread_mutexattr_destroy(&attributes);
}

enum cps_status cps_ring_open(uint8_t *memory, uint64_t ring_bytes, cps_shared *shared, uint32_t epoch, uint64_t low,
                              cps_ring **out) {
    CPS_ASSERT(ring_bytes >= CPS_RING_BYTES_MIN);
    CPS_ASSERT((ring_bytes & (ring_bytes - 1)) == 0);
    void *place = NULL;
    if (posix_memalign(&place, 64, sizeof(cps_ring)) != 0) return CPS_NO_MEMORY;
    cps_ring *ring = place;
    memset(ring, 0, sizeof *ring);
    ring->memory = memory;
    ring->ring_bytes = ring_bytes;
    ring->shared = shared;
    ring->epoch = epoch;
    cps_shared_read_produced(shared, &ring->produced);
    CPS_ASSERT(low % CPS_RECORD_ALIGN == 0);
    CPS_ASSERT(ring->produced.published % CPS_RECORD_ALIGN == 0);
    CPS_ASSERT(ring->produced.published - low <= ring_bytes);
    init_lock(&ring->lock);
    ring->reclaim_seen = low;
    ring->limit = low;
    ring->position_limit = UINT64_MAX;
    atomic_init(&ring->reclaim, low);                          /* no model: no other thread has the ring yet */
    atomic_init(&ring->published, ring->produced.published); /* no model: the same */
    for (unsigned i = 0; i < CPS_RING_WAKERS; i++) ring->wake_at[i] = NOT_ARMED;
    *out = ring;
    return CPS_OK;
}

void cps_ring_close(cps_ring *ring) {
    (void)pthread_mutex_destroy(&ring->lock);
    free(ring);
}

uint64_t cps_ring_record_max(uint64_t ring_bytes) { return ring_bytes / CPS_RING_RECORD_SHARE; }

/* Under the lock: how many bytes of pad must precede a record of `span` bytes. */
static uint64_t pad_before(const cps_ring *ring, uint64_t published, uint64_t span) {
    uint64_t rest = ring->ring_bytes - (published & (ring->ring_bytes - 1));
    return span > rest ? rest : 0;
}

/* Under the lock: whether `total` more bytes fit. */
static bool find_room(cps_ring *ring, uint64_t total) {
    uint64_t published = ring->produced.published;
    if (CPS_LIKELY(published + total - ring->reclaim_seen <= ring->ring_bytes)) return true;
    /* model: ring.reclaim.load; pairs with ring.reclaim.store: our stores come after the reader's last loads.  A producer
     * that finds room by `reclaim_seen` alone has this from the one before it, by the lock. */
    ring->reclaim_seen = atomic_load_explicit(&ring->reclaim, memory_order_acquire);
    return published + total - ring->reclaim_seen <= ring->ring_bytes;
}

static void copy_record(cps_ring *ring, const cps_message *m, uint64_t position, uint32_t length) {
    uint8_t *at = ring->memory + (position & (ring->ring_bytes - 1));
    cps_record record = {
        .position = position,
        .stamp_ms = m->stamp_ms,
        .epoch = ring->epoch,
        .length_bytes = length,
        .topic_bytes = m->topic_bytes,
        .userdata_bytes = m->userdata_bytes,
        .flags = m->flags,
    };
    cps_store64(at + cps_record_span(length) - CPS_RECORD_ALIGN, 0); /* the padding to 8, before what covers it */
    cps_record_store(at, &record);
    CPS_CRASH_POINT("push-header");
    at += CPS_RECORD_HEADER_BYTES;
    memcpy(at, m->topic, m->topic_bytes);
    at += m->topic_bytes;
    if (m->payload_bytes != 0) memcpy(at, m->payload, m->payload_bytes);
    at += m->payload_bytes;
    if (m->userdata_bytes != 0) memcpy(at, m->userdata, m->userdata_bytes);
    if (CPS_LIKELY(!(m->flags & CPS_RECORD_EXTRAS))) return;
    at += m->userdata_bytes;
    if (m->properties_bytes != 0) memcpy(at, m->properties, m->properties_bytes);
    cps_record_store_extras(at + m->properties_bytes, m->properties_bytes, m->ttl_ms);
}

/* Under the lock: which wakers are due; each is told once. */
static unsigned take_due(cps_ring *ring) {
    unsigned due = 0;
    for (unsigned i = 0; i < CPS_RING_WAKERS; i++) {
        if (CPS_LIKELY(ring->produced.published <= ring->wake_at[i])) continue;
        ring->wake_at[i] = NOT_ARMED;
        due |= 1u << i;
    }
    return due;
}

enum cps_status cps_ring_push(cps_ring *ring, const cps_message *message, bool try_only, uint64_t *position,
                              unsigned *wake) {
    uint64_t length = cps_message_length(message);
    uint64_t span = cps_record_span(length);
    if (span > cps_ring_record_max(ring->ring_bytes)) return CPS_TOO_LARGE;
    if (pthread_mutex_trylock(&ring->lock) != 0) {
        if (try_only) return CPS_BUSY;
        CPS_ASSERT(pthread_mutex_lock(&ring->lock) == 0);
    }
    enum cps_status status = CPS_OK;
    uint64_t pad = pad_before(ring, ring->produced.published, span);
    if (CPS_UNLIKELY(ring->shut)) {
        status = CPS_CLOSED;
    } else if (CPS_UNLIKELY(!find_room(ring, pad + span) || ring->produced.published + pad + span > ring->position_limit)) {
        status = CPS_FULL;
    } else {
        uint64_t start = ring->produced.published + pad;
        CPS_CRASH_POINT("push-begin");
        if (pad != 0) {
            cps_record_store_pad(ring->memory + (ring->produced.published & (ring->ring_bytes - 1)), (uint32_t)pad);
            CPS_CRASH_POINT("push-pad");
        }
        copy_record(ring, message, start, (uint32_t)length);
        CPS_CRASH_POINT("push-copied");
        ring->produced.published = start + span;
        ring->produced.messages++;
        ring->produced.bytes += span;
        cps_shared_commit_produced(ring->shared, &ring->produced);
        CPS_CRASH_POINT("push-committed");
        /* model: ring.published.store; pairs with ring.published.load: the bytes are there. */
        atomic_store_explicit(&ring->published, ring->produced.published, memory_order_release);
        CPS_CRASH_POINT("push-published");
        *position = start;
        *wake = take_due(ring);
    }
    (void)pthread_mutex_unlock(&ring->lock);
    return status;
}

void cps_ring_bound(cps_ring *ring, uint64_t limit) {
    CPS_ASSERT(pthread_mutex_lock(&ring->lock) == 0);
    ring->position_limit = limit;
    (void)pthread_mutex_unlock(&ring->lock);
}

void cps_ring_refuse(cps_ring *ring, const cps_message *message, cps_produced *after) {
    uint64_t length = cps_message_length(message);
    uint64_t span = cps_record_span(length);
    CPS_ASSERT(pthread_mutex_lock(&ring->lock) == 0);
    ring->produced.messages++;
    ring->produced.bytes += span;
    ring->produced.refused++;
    ring->produced.refused_bytes += span;
    cps_shared_commit_produced(ring->shared, &ring->produced);
    *after = ring->produced;
    (void)pthread_mutex_unlock(&ring->lock);
}

void cps_ring_correct(cps_ring *ring, uint64_t messages, uint64_t bytes) {
    CPS_ASSERT(pthread_mutex_lock(&ring->lock) == 0);
    ring->produced.messages += messages;
    ring->produced.bytes += bytes;
    cps_shared_commit_produced(ring->shared, &ring->produced);
    (void)pthread_mutex_unlock(&ring->lock);
}

void cps_ring_shut(cps_ring *ring) {
    CPS_ASSERT(pthread_mutex_lock(&ring->lock) == 0);
    ring->shut = true;
    (void)pthread_mutex_unlock(&ring->lock);
}

bool cps_ring_arm(cps_ring *ring, enum cps_ring_waker waker, uint64_t threshold) {
    CPS_ASSERT(pthread_mutex_lock(&ring->lock) == 0);
    bool armed = ring->produced.published <= threshold;
    ring->wake_at[waker] = armed ? threshold : NOT_ARMED;
    (void)pthread_mutex_unlock(&ring->lock);
    return armed;
}

uint64_t cps_ring_published(const cps_ring *ring) {
    /* model: ring.published.load; pairs with ring.published.store, for those who go on to read the bytes. */
    return atomic_load_explicit(&ring->published, memory_order_acquire);
}

uint64_t cps_ring_low(const cps_ring *ring) { return ring->limit; }

enum cps_status cps_ring_view(const cps_ring *ring, uint64_t position, const uint8_t **bytes, size_t *size) {
    uint64_t published = cps_ring_published(ring);
    CPS_ASSERT(position <= published);
    /* Not below what is released or, where a pin holds what is released, below the pin. */
    /* model: ring.reclaim.view; the caller serialises us with those who store it. */
    CPS_ASSERT(position >= atomic_load_explicit(&ring->reclaim, memory_order_relaxed));
    if (position == published) return CPS_EMPTY;
    uint64_t offset = position & (ring->ring_bytes - 1);
    uint64_t rest = ring->ring_bytes - offset;
    uint64_t held = published - position;
    *bytes = ring->memory + offset;
    *size = (size_t)(held < rest ? held : rest);
    return CPS_OK;
}

/* The one place that lets producers overwrite. */
static void move_reclaim(cps_ring *ring) {
    uint64_t lowest = ring->limit;
    for (unsigned i = 0; i < CPS_RING_PINS; i++)
        if (ring->pin_used[i] && ring->pin_position[i] < lowest) lowest = ring->pin_position[i];
    /* model: ring.reclaim.store; pairs with ring.reclaim.load: our reads of what lies below are over before it can be
     * overwritten, and what says that it may be is in the shared page before, for after a kill. */
    atomic_store_explicit(&ring->reclaim, lowest, memory_order_release);
}

void cps_ring_pin(cps_ring *ring, unsigned pin, uint64_t position) {
    CPS_ASSERT(pin < CPS_RING_PINS);
    CPS_ASSERT(!ring->pin_used[pin]);
    CPS_ASSERT(position >= ring->limit);
    ring->pin_used[pin] = true;
    ring->pin_position[pin] = position;
}

void cps_ring_unpin(cps_ring *ring, unsigned pin) {
    CPS_ASSERT(pin < CPS_RING_PINS);
    CPS_ASSERT(ring->pin_used[pin]);
    ring->pin_used[pin] = false;
    move_reclaim(ring);
}

void cps_ring_release(cps_ring *ring, uint64_t limit) {
    if (limit <= ring->limit) return;
    CPS_ASSERT(limit <= cps_ring_published(ring));
    ring->limit = limit;
    move_reclaim(ring);
}

bool cps_ring_may_issue(const cps_ring *ring, uint64_t span) {
    uint64_t published = cps_ring_published(ring);
    return published + pad_before(ring, published, span) + span <= ring->position_limit;
}

bool cps_ring_has_room(const cps_ring *ring, uint64_t span) {
    uint64_t published = cps_ring_published(ring);
    /* model: ring.reclaim.room; the caller serialises us with those who store it. */
    uint64_t reclaim = atomic_load_explicit(&ring->reclaim, memory_order_relaxed);
    return published + pad_before(ring, published, span) + span - reclaim <= ring->ring_bytes;
}

void cps_ring_check(cps_ring *ring) {
    CPS_ASSERT(pthread_mutex_lock(&ring->lock) == 0);
    uint64_t published = ring->produced.published;
    uint64_t reclaim = atomic_load_explicit(&ring->reclaim, memory_order_relaxed); /* no model: under both locks */
    CPS_ASSERT(published == cps_ring_published(ring));
    CPS_ASSERT(ring->reclaim_seen <= reclaim);
    CPS_ASSERT(reclaim <= ring->limit);
    CPS_ASSERT(ring->limit <= published);
    CPS_ASSERT(published - reclaim <= ring->ring_bytes);
    for (uint64_t at = ring->limit; at != published;) {
        uint64_t offset = at & (ring->ring_bytes - 1);
        uint64_t rest = ring->ring_bytes - offset;
        cps_record record;
        CPS_ASSERT(cps_record_load(ring->memory + offset, rest < published - at ? rest : published - at, at, &record) ==
                   CPS_OK);
        at += cps_record_span(record.length_bytes);
    }
    (void)pthread_mutex_unlock(&ring->lock);
}
