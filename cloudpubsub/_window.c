/* The in-flight window; see _window.h. */
#include "_window.h"

#include <stddef.h>

#define ID_COUNT 65535u /* ids are 1..65535 */
/* What sent_ms says where it is no time. */
#define NO_RECORD UINT64_MAX /* of a done entry: a stretch without a record; of others that are done it is their fate */
#define HELD (UINT64_MAX - 1) /* of an entry that is not done: it is held */
#define FATE_MASK 7u /* positions are multiples of 8: what is remembered carries its fate there */

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
    uint32_t held;     /* of them held */
    uint32_t capacity; /* entries at most; not more than slots */
    uint32_t messages_max;
    uint64_t bytes_max;
    uint64_t inflight_bytes;
    uint64_t unknown_acks;
    uint64_t settled_messages; /* acknowledged and popped since open */
    uint64_t settled_bytes;
    cps_ending endings[CPS_WINDOW_ENDINGS]; /* popped and not told yet */
    size_t endings_used;
    uint64_t head;     /* valid if has_head */
    uint64_t tail_end; /* end of the newest entry since the restart, 0 before the first */
    uint16_t first_id; /* packet id of `first`; without entries, of the next one */
    bool has_head;

    /* With two streams. */
    bool is_split;
    bool live_turn;      /* whose the next entry is */
    bool has_live_head;
    uint64_t live_first; /* entries from here on are of the live stream */
    uint64_t live_head;
    uint64_t other_tail_end; /* `tail_end` of the stream whose turn it is not */
    uint64_t live_messages;  /* of `settled_messages` */
    uint64_t live_bytes;

    uint64_t *remembered; /* positions ended before the restart, rising, each with its fate in the low bits */
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
    CPS_ASSERT(position >= window->tail_end && (position & FATE_MASK) == 0);
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

/* Note an ending that the head passes.  False: there is no place before those that wait are told. */
static bool window_note_ending(cps_window *window, const window_entry *entry) {
    enum cps_fate fate = (enum cps_fate)entry->sent_ms;
    cps_ending *last = window->endings_used > 0 ? &window->endings[window->endings_used - 1] : NULL;
    bool is_other_stream = window->is_split && entry->position == window->live_first;
    if (last == NULL || last->fate != fate || last->end != entry->position || is_other_stream) {
        if (window->endings_used == CPS_WINDOW_ENDINGS) return false;
        last = &window->endings[window->endings_used++];
        *last = (cps_ending){.first = entry->position, .fate = fate};
    }
    last->end = entry->position + entry->span_bytes;
    last->messages++;
    last->bytes += entry->span_bytes;
    return true;
}

static void window_pass_live(cps_window *window, const window_entry *entry) {
    window->live_head = entry->position + entry->span_bytes;
    window->has_live_head = true;
    if (entry->sent_ms != CPS_FATE_ACKED) return;
    window->live_messages++;
    window->live_bytes += entry->span_bytes;
}

/* The first entry goes. */
static inline void window_drop_first(cps_window *window) {
    window->first++;
    window->count--;
    window->first_id = (uint16_t)(window->first_id < ID_COUNT ? window->first_id + 1 : 1);
}

/* Count what an entry that is done has settled.  False: the head has to wait. */
static inline bool window_count_done(cps_window *window, const window_entry *entry) {
    if (entry->sent_ms == CPS_FATE_ACKED) {
        window->settled_messages++;
        window->settled_bytes += entry->span_bytes;
        return true;
    }
    return entry->sent_ms == NO_RECORD || window_note_ending(window, entry);
}

static void window_pop_split(cps_window *window) {
    while (window->count > 0) {
        const window_entry *entry = window_at(window, 0);
        if (entry->packet_bytes != 0 || !window_count_done(window, entry)) break;
        if (entry->position >= window->live_first) {
            window_pass_live(window, entry);
        } else {
            window->head = entry->position + entry->span_bytes;
            window->has_head = true;
        }
        window_drop_first(window);
    }
}

/* Let the head pass over what is done. */
static void window_pop_done(cps_window *window) {
    if (CPS_UNLIKELY(window->is_split)) {
        window_pop_split(window);
        return;
    }
    while (window->count > 0) {
        const window_entry *entry = window_at(window, 0);
        if (entry->packet_bytes != 0 || !window_count_done(window, entry)) break;
        window->head = entry->position + entry->span_bytes;
        window->has_head = true;
        window_drop_first(window);
    }
}

void cps_window_split(cps_window *window, uint64_t live_first) {
    CPS_ASSERT(window->count == 0 && window->endings_used == 0);
    window->is_split = true;
    window->live_first = live_first;
    window->live_turn = window->has_live_head = false;
    window->other_tail_end = 0;
    window->live_messages = window->live_bytes = 0;
}

void cps_window_turn(cps_window *window, bool live) {
    CPS_ASSERT(window->is_split);
    if (live == window->live_turn) return;
    uint64_t tail_end = window->tail_end;
    window->tail_end = window->other_tail_end;
    window->other_tail_end = tail_end;
    window->live_turn = live;
}

void cps_window_join(cps_window *window) {
    for (uint32_t offset = 0; offset < window->count; offset++)
        CPS_ASSERT(window_at(window, offset)->position >= window->live_first);
    cps_window_turn(window, true);
    window->head = window->live_head;
    window->has_head = window->has_live_head;
    window->is_split = false;
}

enum cps_status cps_window_live(const cps_window *window, uint64_t *head, uint64_t *messages, uint64_t *span_bytes) {
    *messages = window->live_messages;
    *span_bytes = window->live_bytes;
    if (!window->has_live_head) return CPS_EMPTY;
    *head = window->live_head;
    return CPS_OK;
}

enum cps_status cps_window_push(cps_window *window, uint64_t position, uint64_t end, uint32_t packet_bytes,
                                uint64_t now_ms, uint16_t *packet_id) {
    CPS_ASSERT(packet_bytes != 0 && now_ms < HELD);
    if (window->count == window->capacity || window->inflight >= window->messages_max) return CPS_FULL;
    uint64_t bytes = window->inflight_bytes + packet_bytes;
    if (bytes > window->bytes_max && window->inflight > 0) return CPS_FULL;
    *packet_id = window_append(window, position, end, packet_bytes, now_ms);
    window->inflight++;
    window->inflight_bytes = bytes;
    return CPS_OK;
}

enum cps_status cps_window_skip(cps_window *window, uint64_t position, uint64_t end, enum cps_fate fate) {
    if (window->count == window->capacity) return CPS_FULL;
    (void)window_append(window, position, end, 0, fate);
    window_pop_done(window);
    return CPS_OK;
}

enum cps_status cps_window_hold(cps_window *window, uint64_t position, uint64_t end) {
    if (window->count == window->capacity) return CPS_FULL;
    (void)window_append(window, position, end, 1, HELD);
    window->held++;
    return CPS_OK;
}

enum cps_status cps_window_pass(cps_window *window, uint64_t position, uint64_t end) {
    if (window->count == window->capacity) return CPS_FULL;
    (void)window_append(window, position, end, 0, NO_RECORD);
    window_pop_done(window);
    return CPS_OK;
}

static bool is_inflight(const window_entry *entry) { return entry->packet_bytes != 0 && entry->sent_ms != HELD; }
static bool is_held(const window_entry *entry) { return entry->packet_bytes != 0 && entry->sent_ms == HELD; }

/* The entry in flight under `packet_id`; NULL and counted if there is none.  It is not in flight any more. */
static window_entry *window_land(cps_window *window, uint16_t packet_id, uint32_t *offset) {
    *offset = packet_id >= window->first_id ? (uint32_t)packet_id - window->first_id
                                            : (uint32_t)packet_id + ID_COUNT - window->first_id;
    window_entry *entry = window_at(window, *offset);
    if (CPS_UNLIKELY(packet_id == 0 || *offset >= window->count || !is_inflight(entry))) {
        window->unknown_acks++;
        return NULL;
    }
    window->inflight--;
    window->inflight_bytes -= entry->packet_bytes;
    return entry;
}

enum cps_status cps_window_ack(cps_window *window, uint16_t packet_id, uint64_t *position, uint64_t *end) {
    uint32_t offset;
    window_entry *entry = window_land(window, packet_id, &offset);
    if (CPS_UNLIKELY(entry == NULL)) return CPS_UNKNOWN;
    *position = entry->position;
    *end = entry->position + entry->span_bytes;
    entry->packet_bytes = 0;
    entry->sent_ms = CPS_FATE_ACKED;
    if (offset == 0) window_pop_done(window);
    return CPS_OK;
}

enum cps_status cps_window_refuse(cps_window *window, uint16_t packet_id, uint64_t *position) {
    uint32_t offset;
    window_entry *entry = window_land(window, packet_id, &offset);
    if (entry == NULL) return CPS_UNKNOWN;
    *position = entry->position;
    entry->packet_bytes = 1;
    entry->sent_ms = HELD;
    window->held++;
    return CPS_OK;
}

enum cps_status cps_window_end(cps_window *window, uint64_t position, enum cps_fate fate) {
    uint32_t low = 0, high = window->count; /* the first entry that is not below `position` */
    if (window->is_split) { /* in two orders at once */
        while (low < high && window_at(window, low)->position != position) low++;
        high = low;
    }
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (window_at(window, middle)->position < position) low = middle + 1;
        else high = middle;
    }
    if (low == window->count) return CPS_UNKNOWN;
    window_entry *entry = window_at(window, low);
    if (entry->position != position || entry->packet_bytes == 0) return CPS_UNKNOWN;
    if (is_held(entry)) {
        window->held--;
    } else {
        window->inflight--;
        window->inflight_bytes -= entry->packet_bytes;
    }
    entry->packet_bytes = 0;
    entry->sent_ms = fate;
    if (low == 0) window_pop_done(window);
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
    while (walk > 0 && window->remembered[walk - 1] >= position) walk--; /* with its fate it is not below its position */
    window->walk = walk;
    return walk;
}

enum cps_status cps_window_recall(cps_window *window, uint64_t position, enum cps_fate *fate) {
    if (CPS_LIKELY(window->remembered_count == 0)) return CPS_UNKNOWN;
    uint32_t walk = window_walk_to(window, position);
    if (walk == window->remembered_count || (window->remembered[walk] & ~(uint64_t)FATE_MASK) != position) return CPS_UNKNOWN;
    *fate = (enum cps_fate)(window->remembered[walk] & FATE_MASK);
    return CPS_OK;
}

void cps_window_forget(cps_window *window, uint64_t first, uint64_t end) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < window->remembered_count; i++) {
        uint64_t position = window->remembered[i] & ~(uint64_t)FATE_MASK;
        if (position < first || position >= end) window->remembered[kept++] = window->remembered[i];
    }
    window->remembered_count = kept;
    window->walk = 0;
}

void cps_window_forget_below(cps_window *window, uint64_t position) {
    uint32_t gone = window_walk_to(window, position);
    for (uint32_t i = gone; i < window->remembered_count; i++) window->remembered[i - gone] = window->remembered[i];
    window->remembered_count -= gone;
    window->walk = 0;
}

/* The next done entry at or behind `offset`: by position, the live stream's behind all of the other's. */
static uint32_t window_next_done(const cps_window *window, uint32_t offset) {
    uint32_t all = window->is_split ? 2 * window->count : window->count;
    for (; offset < all; offset++) {
        const window_entry *entry = window_at(window, offset % window->count);
        if (entry->packet_bytes != 0 || entry->sent_ms == NO_RECORD) continue;
        if (!window->is_split || (entry->position >= window->live_first) == (offset >= window->count)) return offset;
    }
    return UINT32_MAX;
}

/* Merge the done entries with the remembered positions, both rising, without repeats.  When the caller starts again
 * where he should, all of them lie among the records of one window and fit; if not, the highest are forgotten, which
 * costs duplicates and no data. */
static void window_remember(cps_window *window) {
    uint32_t old = 0, offset = 0, n = 0;
    while (n < window->capacity) {
        offset = window_next_done(window, offset);
        bool has_old = old < window->remembered_count, has_new = offset != UINT32_MAX;
        if (!has_old && !has_new) break;
        uint64_t was = has_old ? window->remembered[old] : UINT64_MAX, is = UINT64_MAX;
        const window_entry *entry = has_new ? window_at(window, offset % window->count) : NULL;
        if (has_new) is = entry->position | entry->sent_ms;
        window->merged[n++] = was < is ? was : is;
        if (has_old && was / (FATE_MASK + 1) <= is / (FATE_MASK + 1)) old++;
        if (has_new && is / (FATE_MASK + 1) <= was / (FATE_MASK + 1)) offset++;
    }
    uint64_t *was = window->remembered;
    window->remembered = window->merged;
    window->merged = was;
    window->remembered_count = n;
}

void cps_window_restart(cps_window *window) {
    CPS_ASSERT(window->endings_used == 0);
    if (window->is_split) {
        if (window->has_head) cps_window_forget_below(window, window->head);
    } else if (window->count > 0) {
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
    window->held = 0;
    window->inflight_bytes = 0;
    window->tail_end = 0;
    window->has_head = false;
    window->is_split = false;
}

void cps_window_settled(const cps_window *window, uint64_t *messages, uint64_t *span_bytes) {
    *messages = window->settled_messages;
    *span_bytes = window->settled_bytes;
}

uint32_t cps_window_inflight_messages(const cps_window *window) { return window->inflight; }
uint64_t cps_window_inflight_bytes(const cps_window *window) { return window->inflight_bytes; }
uint64_t cps_window_unknown_acks(const cps_window *window) { return window->unknown_acks; }
uint32_t cps_window_remembered(const cps_window *window) { return window->remembered_count; }

uint32_t cps_window_held(const cps_window *window) { return window->held; }

const cps_ending *cps_window_endings(const cps_window *window, size_t *count) {
    *count = window->endings_used;
    return window->endings;
}

void cps_window_told(cps_window *window) {
    window->endings_used = 0;
    window_pop_done(window);
}

enum cps_status cps_window_oldest(const cps_window *window, uint64_t *position, uint64_t *sent_ms) {
    if (window->inflight == 0) return CPS_EMPTY;
    uint32_t offset = 0;
    while (!is_inflight(window_at(window, offset))) offset++; /* not far: what stands before it is held or waits to be told */
    *position = window_at(window, offset)->position;
    *sent_ms = window_at(window, offset)->sent_ms;
    return CPS_OK;
}

enum cps_status cps_window_oldest_of(const cps_window *window, bool live, uint64_t *position) {
    for (uint32_t offset = 0; offset < window->count; offset++) {
        const window_entry *entry = window_at(window, offset);
        if (!is_inflight(entry) || (window->is_split && entry->position >= window->live_first) != live) continue;
        *position = entry->position;
        return CPS_OK;
    }
    return CPS_EMPTY;
}

void cps_window_check(const cps_window *window) {
    CPS_ASSERT((window->mask & (window->mask + 1)) == 0);
    CPS_ASSERT(window->capacity <= window->mask + 1);
    CPS_ASSERT(window->count <= window->capacity);
    CPS_ASSERT(window->messages_max >= 1 && window->messages_max <= window->capacity);
    CPS_ASSERT(window->first_id != 0);
    CPS_ASSERT(window->endings_used <= CPS_WINDOW_ENDINGS);
    CPS_ASSERT(window->count == 0 || window_at(window, 0)->packet_bytes != 0 ||
               window->endings_used == CPS_WINDOW_ENDINGS);
    uint32_t inflight = 0, held = 0;
    uint64_t bytes = 0, ends[2] = {window->has_head ? window->head : 0, window->has_live_head ? window->live_head : 0};
    for (uint32_t offset = 0; offset < window->count; offset++) {
        const window_entry *entry = window_at(window, offset);
        uint64_t *end = &ends[window->is_split && entry->position >= window->live_first];
        CPS_ASSERT(entry->position >= *end);
        *end = entry->position + entry->span_bytes;
        inflight += is_inflight(entry);
        held += is_held(entry);
        bytes += is_inflight(entry) ? entry->packet_bytes : 0;
    }
    unsigned turn = window->is_split && window->live_turn;
    CPS_ASSERT(ends[turn] == window->tail_end || window->tail_end == 0);
    CPS_ASSERT(inflight == window->inflight && held == window->held);
    CPS_ASSERT(bytes == window->inflight_bytes);
    CPS_ASSERT(window->remembered_count <= window->capacity);
    CPS_ASSERT(window->walk <= window->remembered_count);
    for (uint32_t i = 1; i < window->remembered_count; i++)
        CPS_ASSERT(window->remembered[i - 1] / (FATE_MASK + 1) < window->remembered[i] / (FATE_MASK + 1));
}
