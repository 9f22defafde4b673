/* The in-flight window; see _window.h. */
#include "_window.h"

#include <stddef.h>

#define ID_COUNT 65535u /* ids are 1..65535 */
#define NO_RECORD UINT64_MAX /* as sent_ms of a done entry: a stretch without a record */

typedef struct window_entry {
    uint64_t position;
    uint64_t sent_ms;
    uint32_t span_bytes;   /* end of the record minus its position */
    uint32_t packet_bytes; /* on the wire; 0 once it is done, which no packet has */
} window_entry;

_Static_assert(sizeof(window_entry) == 24, "the header says how much memory an entry takes");
_Static_assert(CPS_WINDOW_MESSAGES_MAX < ID_COUNT, "two entries would share an id");

struct cps_window {
    window_entry *ring;
    uint32_t mask;     /* slots of the ring, a power of two, minus 1 */
    uint32_t first;    /* slot of the oldest entry, which is never done; runs freely, masked on use */
    uint32_t count;    /* entries, done or in flight */
    uint32_t inflight; /* of them in flight */
    uint32_t capacity; /* entries at most; not more than slots */
    uint32_t messages_max;
    uint64_t bytes_max;
    uint64_t inflight_bytes;
    uint64_t unknown_acks;
    uint64_t settled_messages; /* popped since open, stretches without a record aside */
    uint64_t settled_bytes;
    uint64_t head;     /* valid if has_head */
    uint64_t tail_end; /* end of the newest entry since the restart, 0 before the first */
    uint16_t first_id; /* packet id of `first`; without entries, of the next one */
    bool has_head;

    uint64_t *remembered; /* positions acknowledged before the restart, rising */
    uint64_t *merged;     /* room to build the next `remembered`; swapped with it */
    uint32_t remembered_count;
    uint32_t walk; /* all remembered before it were below the last position asked for */
};

static window_entry *window_at(const cps_window *window, uint32_t offset) {
    return &window->ring[(window->first + offset) & window->mask];
}

enum cps_status cps_window_open(uint32_t messages_max, uint64_t bytes_max, cps_window **out) {
    if (messages_max < 1 || messages_max > CPS_WINDOW_MESSAGES_MAX) return CPS_TOO_LARGE;
    uint32_t slots = 1;
    while (slots < messages_max) slots *= 2;
    cps_window *window = calloc(1, sizeof *window);
    if (window == NULL) return CPS_NO_MEMORY;
    window->ring = calloc(slots, sizeof *window->ring);
    window->remembered = calloc(messages_max, sizeof *window->remembered);
    window->merged = calloc(messages_max, sizeof *window->merged);
    if (window->ring == NULL || window->remembered == NULL || window->merged == NULL) {
        cps_window_close(window);
        return CPS_NO_MEMORY;
    }
    window->mask = slots - 1;
    window->capacity = messages_max;
    window->messages_max = messages_max;
    window->bytes_max = bytes_max;
    window->first_id = 1;
    *out = window;
    return CPS_OK;
}

void cps_window_close(cps_window *window) {
    if (window == NULL) return;
    free(window->ring);
    free(window->remembered);
    free(window->merged);
    free(window);
}

void cps_window_limit(cps_window *window, uint32_t messages_max, uint64_t bytes_max) {
    if (messages_max < 1) messages_max = 1;
    window->messages_max = messages_max < window->capacity ? messages_max : window->capacity;
    window->bytes_max = bytes_max;
}

void cps_window_renumber(cps_window *window, uint16_t next_id) {
    CPS_ASSERT(window->count == 0);
    CPS_ASSERT(next_id != 0);
    window->first_id = next_id;
}

/* Put an entry behind the newest and tell its id.  There is room. */
static uint16_t window_append(cps_window *window, uint64_t position, uint64_t end, uint32_t packet_bytes,
                              uint64_t now_ms) {
    CPS_ASSERT(position >= window->tail_end);
    CPS_ASSERT(end > position && end - position <= UINT32_MAX);
    window_entry *entry = window_at(window, window->count);
    entry->position = position;
    entry->sent_ms = now_ms;
    entry->span_bytes = (uint32_t)(end - position);
    entry->packet_bytes = packet_bytes;
    uint32_t id = window->first_id + window->count;
    window->count++;
    window->tail_end = end;
    return (uint16_t)(id <= ID_COUNT ? id : id - ID_COUNT);
}

/* Let the head pass over what is done. */
static void window_pop_done(cps_window *window) {
    while (window->count > 0) {
        const window_entry *entry = window_at(window, 0);
        if (entry->packet_bytes != 0) break;
        window->head = entry->position + entry->span_bytes;
        window->has_head = true;
        if (entry->sent_ms != NO_RECORD) {
            window->settled_messages++;
            window->settled_bytes += entry->span_bytes;
        }
        window->first++;
        window->count--;
        window->first_id = (uint16_t)(window->first_id < ID_COUNT ? window->first_id + 1 : 1);
    }
}

enum cps_status cps_window_push(cps_window *window, uint64_t position, uint64_t end, uint32_t packet_bytes,
                                uint64_t now_ms, uint16_t *packet_id) {
    CPS_ASSERT(packet_bytes != 0);
    if (window->count == window->capacity || window->inflight >= window->messages_max) return CPS_FULL;
    uint64_t bytes = window->inflight_bytes + packet_bytes;
    if (bytes > window->bytes_max && window->inflight > 0) return CPS_FULL;
    *packet_id = window_append(window, position, end, packet_bytes, now_ms);
    window->inflight++;
    window->inflight_bytes = bytes;
    return CPS_OK;
}

enum cps_status cps_window_skip(cps_window *window, uint64_t position, uint64_t end) {
    if (window->count == window->capacity) return CPS_FULL;
    (void)window_append(window, position, end, 0, 0);
    window_pop_done(window);
    return CPS_OK;
}

enum cps_status cps_window_pass(cps_window *window, uint64_t position, uint64_t end) {
    if (window->count == window->capacity) return CPS_FULL;
    (void)window_append(window, position, end, 0, NO_RECORD);
    window_pop_done(window);
    return CPS_OK;
}

enum cps_status cps_window_ack(cps_window *window, uint16_t packet_id, uint64_t *position, uint64_t *end) {
    uint32_t offset = packet_id >= window->first_id ? (uint32_t)packet_id - window->first_id
                                                    : (uint32_t)packet_id + ID_COUNT - window->first_id;
    window_entry *entry = window_at(window, offset);
    if (CPS_UNLIKELY(packet_id == 0 || offset >= window->count || entry->packet_bytes == 0)) {
        window->unknown_acks++;
        return CPS_UNKNOWN;
    }
    *position = entry->position;
    *end = entry->position + entry->span_bytes;
    window->inflight--;
    window->inflight_bytes -= entry->packet_bytes;
    entry->packet_bytes = 0;
    entry->sent_ms = 0;
    if (offset == 0) window_pop_done(window);
    return CPS_OK;
}

enum cps_status cps_window_head(const cps_window *window, uint64_t *head) {
    if (!window->has_head) return CPS_EMPTY;
    *head = window->head;
    return CPS_OK;
}

/* The first remembered position that is at least `position`, as an index. */
static uint32_t window_walk_to(cps_window *window, uint64_t position) {
    uint32_t walk = window->walk;
    while (walk < window->remembered_count && window->remembered[walk] < position) walk++;
    while (walk > 0 && window->remembered[walk - 1] >= position) walk--;
    window->walk = walk;
    return walk;
}

bool cps_window_was_acked(cps_window *window, uint64_t position) {
    if (CPS_LIKELY(window->remembered_count == 0)) return false;
    uint32_t walk = window_walk_to(window, position);
    return walk < window->remembered_count && window->remembered[walk] == position;
}

void cps_window_forget_below(cps_window *window, uint64_t position) {
    uint32_t gone = window_walk_to(window, position);
    for (uint32_t i = gone; i < window->remembered_count; i++) window->remembered[i - gone] = window->remembered[i];
    window->remembered_count -= gone;
    window->walk = 0;
}

/* Merge the done entries with the remembered positions, both rising, without repeats.  When the caller starts again
 * where he should, all of them lie among the records of one window and fit; if not, the highest are forgotten, which
 * costs duplicates and no data. */
static void window_remember(cps_window *window) {
    uint32_t old = 0, offset = 0, n = 0;
    while (n < window->capacity) {
        while (offset < window->count && window_at(window, offset)->packet_bytes != 0) offset++;
        uint64_t position;
        bool has_old = old < window->remembered_count;
        if (offset < window->count) {
            position = window_at(window, offset)->position;
            if (has_old && window->remembered[old] <= position) position = window->remembered[old];
        } else if (has_old) {
            position = window->remembered[old];
        } else {
            break;
        }
        if (has_old && window->remembered[old] == position) old++;
        if (offset < window->count && window_at(window, offset)->position == position) offset++;
        window->merged[n++] = position;
    }
    uint64_t *was = window->remembered;
    window->remembered = window->merged;
    window->merged = was;
    window->remembered_count = n;
}

void cps_window_restart(cps_window *window) {
    if (window->count > 0) {
        cps_window_forget_below(window, window_at(window, 0)->position);
    } else if (window->has_head) {
        cps_window_forget_below(window, window->head);
    }
    window_remember(window);
    uint32_t id = window->first_id + window->count;
    window->first_id = (uint16_t)(id <= ID_COUNT ? id : id - ID_COUNT);
    window->walk = 0;
    window->first = 0;
    window->count = 0;
    window->inflight = 0;
    window->inflight_bytes = 0;
    window->tail_end = 0;
    window->has_head = false;
}

void cps_window_settled(const cps_window *window, uint64_t *messages, uint64_t *span_bytes) {
    *messages = window->settled_messages;
    *span_bytes = window->settled_bytes;
}

uint32_t cps_window_inflight_messages(const cps_window *window) { return window->inflight; }
uint64_t cps_window_inflight_bytes(const cps_window *window) { return window->inflight_bytes; }
uint64_t cps_window_unknown_acks(const cps_window *window) { return window->unknown_acks; }
uint32_t cps_window_remembered(const cps_window *window) { return window->remembered_count; }

enum cps_status cps_window_oldest(const cps_window *window, uint64_t *position, uint64_t *sent_ms) {
    if (window->count == 0) return CPS_EMPTY;
    *position = window_at(window, 0)->position;
    *sent_ms = window_at(window, 0)->sent_ms;
    return CPS_OK;
}

void cps_window_check(const cps_window *window) {
    CPS_ASSERT((window->mask & (window->mask + 1)) == 0);
    CPS_ASSERT(window->capacity <= window->mask + 1);
    CPS_ASSERT(window->count <= window->capacity);
    CPS_ASSERT(window->messages_max >= 1 && window->messages_max <= window->capacity);
    CPS_ASSERT(window->first_id != 0);
    CPS_ASSERT(window->count == 0 || window_at(window, 0)->packet_bytes != 0);
    uint32_t inflight = 0;
    uint64_t bytes = 0, end = window->has_head ? window->head : 0;
    for (uint32_t offset = 0; offset < window->count; offset++) {
        const window_entry *entry = window_at(window, offset);
        CPS_ASSERT(entry->position >= end);
        end = entry->position + entry->span_bytes;
        inflight += entry->packet_bytes != 0;
        bytes += entry->packet_bytes;
    }
    CPS_ASSERT(end == window->tail_end || window->tail_end == 0);
    CPS_ASSERT(inflight == window->inflight);
    CPS_ASSERT(bytes == window->inflight_bytes);
    CPS_ASSERT(window->remembered_count <= window->capacity);
    CPS_ASSERT(window->walk <= window->remembered_count);
    for (uint32_t i = 1; i < window->remembered_count; i++) {
        CPS_ASSERT(window->remembered[i - 1] < window->remembered[i]);
    }
}
