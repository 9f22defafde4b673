/* Every state of a small ring; see the header. */
#include "exhaust.h"

#include <stdlib.h>
#include <string.h>

#include "_record.h"

enum { CANARY = 0xee, RING_MAX = 2048 };

typedef struct place {
    uint64_t ring_bytes;
    uint8_t *memory;
    cps_shared *shared;
    uint8_t payload[RING_MAX];
    uint64_t states;
} place;

/* The plain model: bytes [low, published) are taken.  Where would a record of `span` go?  False: nowhere. */
static bool model(const place *p, uint64_t low, uint64_t published, uint64_t span, uint64_t *position) {
    bool taken[RING_MAX] = {false};
    uint64_t n = p->ring_bytes;
    for (uint64_t at = low; at < published; at++) taken[at % n] = true;
    uint64_t start = published;
    while (start % n + span > n) start += CPS_RECORD_ALIGN; /* to the next place where it does not wrap */
    for (uint64_t at = published; at < start + span; at++)
        if (at - low >= n || taken[at % n]) return false;
    *position = start;
    return true;
}

static const char *push(place *p, cps_ring *ring, uint64_t low, uint64_t published, uint64_t length) {
    uint8_t before[RING_MAX];
    uint64_t n = p->ring_bytes, span = cps_record_span(length), expected = 0, position = 0;
    memset(p->memory, CANARY, (size_t)n);
    memcpy(before, p->memory, (size_t)n);
    cps_message m = {.topic = p->payload, .topic_bytes = 0, .payload = p->payload,
                     .payload_bytes = (uint32_t)length - CPS_RECORD_HEADER_BYTES};
    unsigned wake;
    p->states++;
    bool fits = model(p, low, published, span, &expected);
    bool has_room = cps_ring_has_room(ring, span);
    enum cps_status status = cps_ring_push(ring, &m, false, &position, &wake);
    if (has_room != fits) return "has_room says something else than the model";
    if (status != (fits ? CPS_OK : CPS_FULL)) return "push says something else than the model";
    if (!fits) return memcmp(before, p->memory, (size_t)n) == 0 ? NULL : "a push that was refused wrote something";
    if (position != expected) return "the position differs";
    if (cps_ring_published(ring) != expected + span) return "published differs";
    for (uint64_t at = low; at < published; at++)
        if (p->memory[at % n] != CANARY) return "bytes that are held were overwritten";
    cps_record r;
    if (expected != published) {
        uint64_t pad = expected - published;
        if (cps_record_load(p->memory + published % n, pad, published, &r) != CPS_OK || !r.is_pad ||
            r.length_bytes != pad)
            return "the pad differs";
    }
    const uint8_t *at = p->memory + expected % n;
    if (cps_record_load(at, span, expected, &r) != CPS_OK || r.is_pad || r.length_bytes != length)
        return "the record differs";
    if (memcmp(cps_record_payload(at, &r), p->payload, r.payload_bytes) != 0) return "the payload differs";
    for (uint64_t i = length; i < span; i++)
        if (at[i] != 0) return "the padding is not zero";
    for (uint64_t i = expected + span; i < low + n; i++)
        if (p->memory[i % n] != CANARY) return "free bytes behind the record were written";
    return NULL;
}

static cps_ring *open_at(place *p, uint64_t low, uint64_t published) {
    cps_ring *ring;
    cps_produced produced = {.published = published};
    cps_shared_commit_produced(p->shared, &produced);
    CPS_ASSERT(cps_ring_open(p->memory, p->ring_bytes, p->shared, 1, low, &ring) == CPS_OK);
    return ring;
}

static const char *plain_push(place *p, uint64_t low, uint64_t published, uint64_t length) {
    cps_ring *ring = open_at(p, low, published);
    const char *wrong = push(p, ring, low, published, length);
    cps_ring_close(ring);
    return wrong;
}

/* Everything was released but for what a pin at `pinned` holds; then the pin goes and there is room. */
static const char *pinned_push(place *p, uint64_t low, uint64_t published, uint64_t pinned, uint64_t length) {
    cps_ring *ring = open_at(p, low, published);
    cps_ring_pin(ring, 1, pinned);
    cps_ring_release(ring, published);
    const char *wrong = cps_ring_low(ring) != published ? "the release was not taken" : NULL;
    if (wrong == NULL) wrong = push(p, ring, pinned, published, length);
    uint64_t now = cps_ring_published(ring);
    cps_ring_unpin(ring, 1);
    if (wrong == NULL && now == published) wrong = push(p, ring, published, published, length);
    cps_ring_close(ring);
    return wrong;
}

static const char *pushes(place *p, uint64_t low, uint64_t published, bool every_length) {
    const char *wrong = NULL;
    uint64_t longest = cps_ring_record_max(p->ring_bytes);
    for (uint64_t length = CPS_RECORD_HEADER_BYTES; length <= longest && wrong == NULL; length += 4)
        wrong = plain_push(p, low, published, length);
    uint64_t step = every_length || longest == CPS_RECORD_HEADER_BYTES ? 8 : (longest - CPS_RECORD_HEADER_BYTES) / 2;
    for (uint64_t pinned = low; pinned <= published && wrong == NULL; pinned += every_length ? 8 : 40)
        for (uint64_t length = CPS_RECORD_HEADER_BYTES; length <= longest && wrong == NULL; length += step)
            wrong = pinned_push(p, low, published, pinned, length);
    return wrong;
}

const char *exhaust_ring(uint64_t ring_bytes, uint64_t base, bool every_length, uint64_t *states) {
    place *p = calloc(1, sizeof *p);
    CPS_ASSERT(p != NULL && ring_bytes <= RING_MAX);
    p->ring_bytes = ring_bytes;
    p->memory = malloc((size_t)ring_bytes);
    p->shared = aligned_alloc(64, CPS_SHARED_BYTES);
    CPS_ASSERT(p->memory != NULL && p->shared != NULL);
    memset(p->shared, 0, CPS_SHARED_BYTES);
    for (unsigned i = 0; i < RING_MAX; i++) p->payload[i] = (uint8_t)(i % 200 + 1); /* neither 0 nor the canary */
    const char *wrong = NULL;
    uint64_t fill_step = every_length ? 8 : 24;
    for (uint64_t head = 0; head < ring_bytes && wrong == NULL; head += every_length ? 8 : 40)
        for (uint64_t fill = 0; fill <= ring_bytes && wrong == NULL; fill += fill == 0 ? 32 : fill_step)
            wrong = pushes(p, base + head, base + head + fill, every_length);
    *states = p->states;
    free(p->shared);
    free(p->memory);
    free(p);
    return wrong;
}
