/* What a broker sends, however the network cuts it: the parser of the byte stream, and the window that takes the
 * acknowledgements.
 *
 * The input is 12 bytes of options, then what the broker sends.  The options say the protocol level, the sizes of
 * buffer, packets and window, and seed the order of everything else: how the bytes are cut, when records are framed and
 * sent, when packets are taken and how, when the connection breaks.  What was framed is parsed again and has to say
 * what the records say; a second parser that gets all bytes at once has to see the same packets; a plain list says what
 * the window has to say. */
#include "fuzz.h"

#include "_bytes.h"
#include "_record.h"
#include "_window.h"
#include "_wire.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HAS_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define HAS_ASAN 1
#endif
#ifdef HAS_ASAN
#include <sanitizer/asan_interface.h>
#define POISON(at, size) ASAN_POISON_MEMORY_REGION(at, size)
#define UNPOISON(at, size) ASAN_UNPOISON_MEMORY_REGION(at, size)
#else
#define POISON(at, size) ((void)(at), (void)(size))
#define UNPOISON(at, size) ((void)(at), (void)(size))
#endif

enum {
    OPTIONS = 12,
    LOG_BYTES = 32768,
    RECORDS_MAX = LOG_BYTES / CPS_RECORD_HEADER_BYTES,
    OUTPUT_BYTES = 4096,
    FRAME_BYTES = 2048, /* of the input, taken as records */
};

typedef struct known { /* a message of the log, and what the window has to know of it */
    uint64_t position;
    uint64_t end;
    uint16_t id; /* in flight under it; 0: not in flight */
    bool is_acked;
    bool is_lost; /* damaged on the disk: the window passes over it */
} known;

typedef struct side { /* a stream, and where the room for its next bytes is */
    cps_stream *stream;
    uint8_t *room;
    size_t room_bytes;
} side;

typedef struct run {
    uint64_t chance;
    uint64_t base;     /* position of the first byte of `log` */
    uint64_t now_ms;
    uint64_t unknown;  /* acknowledgements of nothing */
    uint64_t sent_max; /* records below it were sent before */
    size_t log_bytes;
    cps_window *window;
    side cut;   /* gets the bytes in pieces */
    side whole; /* got them at once */
    uint32_t packet_bytes_max;
    uint32_t known_count;
    uint32_t begin; /* where this connection began to send */
    uint32_t open;  /* first that is neither acknowledged nor lost: the head stands there */
    uint32_t next;  /* to be sent */
    uint8_t level;
    known known[RECORDS_MAX];
    uint8_t log[LOG_BYTES];
} run;

static uint64_t below(run *r, uint64_t limit) { return scramble(&r->chance) % limit; }

/* ---- packets ---- */

/* Is [at, at + size) inside of the packet? */
static bool is_inside(const cps_packet *p, const uint8_t *at, size_t size) {
    return at >= p->bytes && size <= p->size_bytes && (size_t)(at - p->bytes) <= p->size_bytes - size;
}

static void check_packet(const cps_packet *p, uint8_t level, uint32_t packet_bytes_max) {
    CHECK(p->size_bytes >= 2 && p->size_bytes <= packet_bytes_max);
    CHECK(p->type == p->bytes[0] >> 4 && p->flags == (p->bytes[0] & 15));
    /* The whole packet and nothing but: its own length says so. */
    uint32_t length = 0, at = 1;
    do {
        CHECK(at < 5 && at < p->size_bytes);
        length |= (uint32_t)(p->bytes[at] & 0x7f) << (7 * (at - 1));
    } while (p->bytes[at++] >= 0x80);
    CHECK(length == p->size_bytes - at);
    const uint8_t *end = p->bytes + p->size_bytes;
    if (p->properties != NULL) {
        CHECK(level == CPS_WIRE_LEVEL_5 && is_inside(p, p->properties, p->properties_bytes));
    } else {
        CHECK(p->properties_bytes == 0);
    }
    if (p->type == CPS_WIRE_PUBLISH) {
        CHECK(p->qos < 3 && p->qos == (p->flags >> 1 & 3) && (p->qos == 0) == (p->packet_id == 0));
        CHECK(p->topic == p->bytes + at + 2 && is_inside(p, p->topic, p->topic_bytes));
        CHECK(cps_load16be(p->topic - 2) == p->topic_bytes);
        CHECK(p->topic_bytes > 0 || level == CPS_WIRE_LEVEL_5);
        CHECK(is_inside(p, p->payload, p->payload_bytes) && p->payload + p->payload_bytes == end);
        const uint8_t *before = p->topic + p->topic_bytes + (p->qos > 0 ? 2 : 0);
        if (level == CPS_WIRE_LEVEL_5) {
            CHECK(p->properties > before && p->properties + p->properties_bytes == p->payload);
        } else {
            CHECK(p->payload == before && p->properties == NULL);
        }
    } else {
        CHECK(p->topic == NULL && p->payload == NULL && p->topic_bytes == 0 && p->payload_bytes == 0);
        CHECK(p->qos == 0 && !p->dup && !p->retain);
    }
    if (p->type >= CPS_WIRE_PUBACK && p->type <= CPS_WIRE_UNSUBACK) CHECK(p->packet_id != 0);
}

static bool same_bytes(const uint8_t *a, const uint8_t *b, size_t size) {
    return (a == NULL) == (b == NULL) && (size == 0 || memcmp(a, b, size) == 0);
}

static void check_same(const cps_packet *a, const cps_packet *b) {
    CHECK(a->size_bytes == b->size_bytes && same_bytes(a->bytes, b->bytes, a->size_bytes));
    CHECK(a->topic_bytes == b->topic_bytes && same_bytes(a->topic, b->topic, a->topic_bytes));
    CHECK(a->payload_bytes == b->payload_bytes && same_bytes(a->payload, b->payload, a->payload_bytes));
    CHECK(a->properties_bytes == b->properties_bytes && same_bytes(a->properties, b->properties, a->properties_bytes));
    CHECK(a->packet_id == b->packet_id && a->type == b->type && a->flags == b->flags && a->qos == b->qos);
    CHECK(a->reason == b->reason && a->dup == b->dup && a->retain == b->retain);
    CHECK(a->session_present == b->session_present);
}

/* ---- streams ---- */

/* Nobody may read the room behind what was committed. */
static void forget_room(side *s) {
    UNPOISON(s->room, s->room_bytes);
    s->room_bytes = 0;
}

static enum cps_status feed(side *s, const uint8_t *bytes, size_t size) {
    forget_room(s);
    enum cps_status status = cps_stream_space(s->stream, size, &s->room, &s->room_bytes);
    if (status != CPS_OK) {
        s->room_bytes = 0;
        return status;
    }
    CHECK(s->room_bytes >= size && s->room_bytes <= cps_stream_buffer_bytes(s->stream));
    size_t waiting = cps_stream_waiting_bytes(s->stream);
    memcpy(s->room, bytes, size);
    cps_stream_commit(s->stream, size);
    CHECK(cps_stream_waiting_bytes(s->stream) == waiting + size);
    s->room += size;
    s->room_bytes -= size;
    POISON(s->room, s->room_bytes);
    return CPS_OK;
}

static void open_side(side *s, size_t initial_bytes, uint32_t packet_bytes_max, uint8_t level) {
    *s = (side){.room_bytes = 0};
    CHECK(cps_stream_open(initial_bytes, packet_bytes_max, level, &s->stream) == CPS_OK);
}

static void close_side(side *s) {
    forget_room(s);
    cps_stream_close(s->stream);
}

/* ---- the window, and what it has to say ---- */

static void check_window(const run *r) {
    uint64_t head, position, sent_ms, messages, bytes, messages_wanted = 0, bytes_wanted = 0;
    uint32_t inflight = 0;
    cps_window_check(r->window);
    for (uint32_t i = 0; i < r->next; i++) {
        inflight += r->known[i].id != 0;
        if (i >= r->open || r->known[i].is_lost) continue;
        messages_wanted++;
        bytes_wanted += r->known[i].end - r->known[i].position;
    }
    CHECK(cps_window_inflight_messages(r->window) == inflight);
    CHECK((cps_window_inflight_bytes(r->window) == 0) == (inflight == 0));
    CHECK(cps_window_unknown_acks(r->window) == r->unknown);
    if (r->open > r->begin) CHECK(cps_window_head(r->window, &head) == CPS_OK && head == r->known[r->open - 1].end);
    else CHECK(cps_window_head(r->window, &head) == CPS_EMPTY);
    if (r->open < r->next) {
        CHECK(cps_window_oldest(r->window, &position, &sent_ms) == CPS_OK);
        CHECK(position == r->known[r->open].position && sent_ms <= r->now_ms);
    } else {
        CHECK(cps_window_oldest(r->window, &position, &sent_ms) == CPS_EMPTY);
    }
    cps_window_settled(r->window, &messages, &bytes);
    CHECK(messages == messages_wanted && bytes == bytes_wanted);
}

static void move_open(run *r) {
    while (r->open < r->next && (r->known[r->open].is_acked || r->known[r->open].is_lost)) r->open++;
}

/* What an acknowledgement means; NULL: nothing. */
static const known *acknowledge(run *r, uint16_t id) {
    for (uint32_t i = r->open; i < r->next; i++) {
        known *k = &r->known[i];
        if (id == 0 || k->id != id) continue;
        k->id = 0;
        k->is_acked = true;
        move_open(r);
        return k;
    }
    r->unknown++;
    return NULL;
}

/* Messages, and pads between them. */
static void make_log(run *r) {
    while (LOG_BYTES - r->log_bytes > 512) {
        uint8_t *at = r->log + r->log_bytes;
        uint64_t position = r->base + r->log_bytes;
        if (below(r, 8) == 0) {
            uint32_t span = 8 + 8 * (uint32_t)below(r, 4);
            cps_record_store_pad(at, span);
            r->log_bytes += span;
            continue;
        }
        cps_record record = {.position = position, .topic_bytes = (uint16_t)(1 + below(r, 20)),
                             .payload_bytes = (uint32_t)below(r, 300), .userdata_bytes = (uint16_t)below(r, 9),
                             .flags = (uint8_t)below(r, 2)};
        record.length_bytes =
            (uint32_t)cps_record_length(record.topic_bytes, record.payload_bytes, record.userdata_bytes);
        cps_record_store(at, &record);
        fill(at + CPS_RECORD_HEADER_BYTES, record.length_bytes - CPS_RECORD_HEADER_BYTES, position);
        r->log_bytes += (size_t)cps_record_span(record.length_bytes);
        r->known[r->known_count++] =
            (known){.position = position, .end = r->base + r->log_bytes, .is_lost = below(r, 32) == 0};
    }
}

/* What was framed, parsed again: a broker would send the same to a subscriber. */
static void check_framed(run *r, const uint8_t *packets, const cps_wire_source *from, const cps_wire_framed *framed) {
    side again;
    uint32_t sent = 0, skipped = 0, resent = 0;
    open_side(&again, 16, CPS_WIRE_PACKET_MAX, r->level);
    if (framed->produced_bytes > 0) CHECK(feed(&again, packets, framed->produced_bytes) == CPS_OK);
    for (; r->next < r->known_count; r->next++) {
        known *k = &r->known[r->next];
        if (k->is_lost || k->end > from->position + framed->consumed_bytes) break;
        if (k->is_acked) { /* in an earlier connection */
            skipped++;
            continue;
        }
        const uint8_t *at = r->log + (k->position - r->base);
        cps_record record;
        cps_packet packet;
        CHECK(cps_record_load(at, k->end - k->position, k->position, &record) == CPS_OK);
        CHECK(cps_stream_next(again.stream, &packet) == CPS_OK);
        check_packet(&packet, r->level, CPS_WIRE_PACKET_MAX);
        CHECK(packet.type == CPS_WIRE_PUBLISH && packet.qos == 1 && packet.dup == (k->position < from->dup_below));
        CHECK(packet.retain == ((record.flags & CPS_RECORD_RETAIN) != 0));
        CHECK(packet.topic_bytes == record.topic_bytes && packet.payload_bytes == record.payload_bytes);
        CHECK(memcmp(packet.topic, cps_record_topic(at), packet.topic_bytes) == 0);
        CHECK(same_bytes(packet.payload, cps_record_payload(at, &record), packet.payload_bytes));
        for (uint32_t i = r->begin; i < r->next; i++) CHECK(r->known[i].id != packet.packet_id); /* one at a time */
        k->id = packet.packet_id;
        sent++;
        resent += packet.dup;
        if (k->end > r->sent_max) r->sent_max = k->end;
    }
    cps_packet none;
    CHECK(cps_stream_next(again.stream, &none) == CPS_EMPTY && cps_stream_waiting_bytes(again.stream) == 0);
    CHECK(sent == framed->messages && skipped == framed->skipped && resent == framed->resent);
    close_side(&again);
}

/* Frame and send what comes next, up to the next loss, which is passed over. */
static void send_some(run *r) {
    uint8_t packets[OUTPUT_BYTES];
    if (r->next == r->known_count) return;
    const known *first = &r->known[r->next];
    r->now_ms++;
    if (first->is_lost) {
        if (cps_window_pass(r->window, first->position, first->end) == CPS_OK) r->next++;
    } else {
        uint32_t end = r->next;
        while (end < r->known_count && !r->known[end].is_lost && end - r->next < 40) end++;
        cps_wire_source from = {.bytes = r->log + (first->position - r->base), .position = first->position,
                                .size_bytes = (size_t)(r->known[end - 1].end - first->position),
                                .dup_below = r->sent_max, .now_ms = r->now_ms, .level = r->level,
                                .messages_max = (uint32_t)below(r, 20), .bytes_max = UINT64_MAX,
                                .packet_bytes_max = CPS_WIRE_PACKET_MAX};
        cps_wire_framed framed;
        size_t capacity = (size_t)below(r, OUTPUT_BYTES + 1);
        CHECK(cps_wire_frame(&from, r->window, packets, capacity, &framed) == CPS_OK);
        CHECK(framed.produced_bytes <= capacity && framed.consumed_bytes <= from.size_bytes);
        CHECK((framed.consumed_bytes == from.size_bytes) == (framed.stop == CPS_WIRE_SPAN_END));
        check_framed(r, packets, &from, &framed);
    }
    move_open(r);
    check_window(r);
}

/* Records whose bytes are the input: no packet comes of what no log can hold. */
static void frame_anything(run *r, const uint8_t *bytes, size_t size) {
    uint8_t packets[OUTPUT_BYTES];
    cps_window *window;
    cps_wire_framed framed;
    if (size > FRAME_BYTES) size = FRAME_BYTES;
    uint8_t *source = malloc(size + 1);
    CHECK(source != NULL);
    memcpy(source, bytes, size);
    for (size_t at = 0; below(r, 8) != 0 && at + 16 <= size;) { /* right positions: more than one is looked at */
        uint32_t word = cps_load32(source + at + 4), length = word & 0x1ff;
        cps_store32(source + at + 4, length | (word & CPS_RECORD_PAD));
        cps_store64(source + at + 8, at);
        at += length > 0 ? (size_t)cps_record_span(length) : 8;
    }
    CHECK(cps_window_open(1 + (uint32_t)below(r, 8), below(r, 2000), &window) == CPS_OK);
    cps_wire_source from = {.bytes = source, .size_bytes = size, .messages_max = UINT32_MAX, .level = r->level,
                            .bytes_max = UINT64_MAX, .packet_bytes_max = (uint32_t)below(r, 300)};
    enum cps_status status = cps_wire_frame(&from, window, packets, (size_t)below(r, OUTPUT_BYTES + 1), &framed);
    CHECK(status == CPS_OK || status == CPS_DAMAGED || status == CPS_TOO_LARGE);
    CHECK((status == CPS_OK) == (framed.stop != CPS_WIRE_REFUSED));
    CHECK(framed.consumed_bytes <= size && framed.messages == cps_window_inflight_messages(window));
    cps_window_check(window);
    cps_window_close(window);
    free(source);
}

/* ---- one connection after the other ---- */

/* Packets one by one, as the owner of the connection takes what is not a plain acknowledgement. */
static enum cps_status take_packet(run *r) {
    cps_packet packet, same;
    enum cps_status status = cps_stream_next(r->cut.stream, &packet);
    if (status != CPS_OK) return status;
    check_packet(&packet, r->level, r->packet_bytes_max);
    CHECK(cps_stream_next(r->whole.stream, &same) == CPS_OK);
    check_same(&packet, &same);
    if (packet.type == CPS_WIRE_PUBACK && below(r, 2) == 0) { /* refused; that settles it too */
        uint64_t position, end;
        status = cps_window_ack(r->window, packet.packet_id, &position, &end);
        const known *k = acknowledge(r, packet.packet_id);
        CHECK((status == CPS_OK) == (k != NULL));
        if (k != NULL) CHECK(position == k->position && end == k->end);
        check_window(r);
    }
    return CPS_OK;
}

static enum cps_status take_acks(run *r) {
    uint64_t positions[5], bytes = 0;
    size_t capacity = (size_t)below(r, 5), settled = 0, waiting = cps_stream_waiting_bytes(r->cut.stream);
    bool counts_only = below(r, 4) == 0;
    cps_wire_acks acks;
    cps_packet packet;
    enum cps_status status =
        cps_wire_take_acks(r->cut.stream, r->window, counts_only ? NULL : positions, capacity, &acks);
    for (size_t i = 0; i < acks.packets; i++) {
        CHECK(cps_stream_next(r->whole.stream, &packet) == CPS_OK);
        CHECK(packet.type == CPS_WIRE_PUBACK && packet.reason < 0x80);
        waiting -= packet.size_bytes;
        const known *k = acknowledge(r, packet.packet_id);
        if (k == NULL) continue;
        CHECK(counts_only || (settled < capacity && positions[settled] == k->position));
        settled++;
        bytes += k->end - k->position;
    }
    CHECK(acks.settled == settled && acks.settled_bytes == bytes);
    CHECK(cps_stream_waiting_bytes(r->cut.stream) == waiting);
    check_window(r);
    if (status == CPS_FULL) CHECK(!counts_only && settled == capacity);
    if (status == CPS_OK) {
        CHECK(cps_stream_next(r->cut.stream, &packet) == CPS_OK); /* something else, as it said */
        CHECK(packet.type != CPS_WIRE_PUBACK || packet.reason >= 0x80);
        CHECK(cps_stream_next(r->whole.stream, &packet) == CPS_OK);
    }
    return status;
}

/* Take what is there, or a part of it; the status that ended it, or CPS_OK. */
static enum cps_status take_some(run *r, bool everything) {
    enum cps_status status;
    do {
        status = below(r, 3) == 0 ? take_packet(r) : take_acks(r);
        if (below(r, 8) == 0) send_some(r);
    } while ((status == CPS_OK || status == CPS_FULL) && (everything || below(r, 8) != 0));
    return status == CPS_FULL ? CPS_OK : status;
}

/* Behind damage nothing comes any more, whatever is asked. */
static void check_over(run *r, enum cps_status status) {
    cps_packet packet;
    cps_wire_acks acks;
    CHECK(status == CPS_DAMAGED || status == CPS_TOO_LARGE);
    CHECK(cps_stream_next(r->cut.stream, &packet) == status);
    CHECK(cps_wire_take_acks(r->cut.stream, r->window, NULL, 0, &acks) == status && acks.packets == 0);
}

/* The bytes of one connection, of which the last may be cut off; returns how many were used. */
static size_t connect_once(run *r, const uint8_t *bytes, size_t size, size_t piece_max, bool breaks) {
    enum cps_status status = CPS_OK;
    size_t fed = 0;
    if (size > 0) CHECK(feed(&r->whole, bytes, size) == CPS_OK);
    send_some(r);
    while (fed < size && (status == CPS_OK || status == CPS_EMPTY)) {
        size_t piece = 1 + (size_t)below(r, piece_max);
        if (piece > size - fed) piece = size - fed;
        enum cps_status took_in = feed(&r->cut, bytes + fed, piece);
        bool is_full = took_in == CPS_FULL;
        CHECK(took_in == CPS_OK || (is_full && cps_stream_waiting_bytes(r->cut.stream) > r->packet_bytes_max));
        if (!is_full) fed += piece;
        if (is_full || below(r, 2) == 0) status = take_some(r, is_full);
        /* Room for more is left by taking what is there. */
        CHECK(!is_full || status != CPS_EMPTY || cps_stream_waiting_bytes(r->cut.stream) <= r->packet_bytes_max);
        if (below(r, 4) == 0) send_some(r);
        if (breaks && below(r, 64) == 0) return fed;
    }
    if (status == CPS_OK || status == CPS_EMPTY) status = take_some(r, true);
    if (status != CPS_EMPTY) {
        check_over(r, status);
        return size;
    }
    cps_packet packet;
    CHECK(cps_stream_next(r->whole.stream, &packet) == CPS_EMPTY);
    CHECK(cps_stream_waiting_bytes(r->cut.stream) == cps_stream_waiting_bytes(r->whole.stream));
    return size;
}

/* The connection is lost: sending begins again at what is not settled yet. */
static void reconnect(run *r) {
    forget_room(&r->cut);
    forget_room(&r->whole);
    cps_stream_reset(r->cut.stream);
    cps_stream_reset(r->whole.stream);
    CHECK(cps_stream_waiting_bytes(r->cut.stream) == 0);
    cps_window_restart(r->window);
    for (uint32_t i = r->open; i < r->next; i++) r->known[i].id = 0;
    r->begin = r->next = r->open;
    check_window(r);
}

/* Small numbers become ids of what is sent, so that the input can hit them wherever the ids begin. */
static void translate(uint8_t *bytes, size_t size, uint16_t first_id) {
    for (size_t i = 0; i + 4 <= size; i++) {
        if (bytes[i] != 0x40 || bytes[i + 1] < 2 || bytes[i + 2] != 0 || bytes[i + 3] == 0) continue;
        uint32_t id = first_id + bytes[i + 3] - 1u;
        cps_store16be(bytes + i + 2, (uint16_t)(id > UINT16_MAX ? id - UINT16_MAX : id));
        i += 3;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const uint32_t packet_sizes[4] = {CPS_WIRE_PACKET_MAX, 65536, 300, 20};
    static const size_t piece_sizes[4] = {1, 5, 100, 5000};
    if (size < OPTIONS) return 0;
    input in = {data, size};
    uint8_t shape = take8(&in), sizes = take8(&in), window = take8(&in), initial = take8(&in);
    run *r = calloc(1, sizeof *r);
    CHECK(r != NULL);
    r->chance = take16(&in);
    uint16_t first_id = take16(&in);
    if (first_id == 0) first_id = 1;
    r->base = ((uint64_t)take16(&in) << (shape >> 4)) & ~(uint64_t)7;
    uint64_t bytes_max = take16(&in);
    r->level = (shape & 1) != 0 ? CPS_WIRE_LEVEL_5 : CPS_WIRE_LEVEL_311;
    r->packet_bytes_max = packet_sizes[sizes & 3];
    size_t piece_max = piece_sizes[(sizes >> 2) & 3], left = size - OPTIONS, at = 0;
    uint8_t *bytes = malloc(left + 1);
    CHECK(bytes != NULL);
    memcpy(bytes, data + OPTIONS, left);
    if ((shape & 2) != 0) translate(bytes, left, first_id);
    make_log(r);
    CHECK(cps_window_open(1 + window % 128, bytes_max == 0 ? UINT64_MAX : bytes_max, &r->window) == CPS_OK);
    cps_window_renumber(r->window, first_id);
    open_side(&r->cut, 1 + (size_t)initial, r->packet_bytes_max, r->level);
    open_side(&r->whole, left + 1, r->packet_bytes_max, r->level);
    for (bool again = true; again;) {
        at += connect_once(r, bytes + at, left - at, piece_max, (shape & 4) != 0);
        again = at < left;
        if (again || below(r, 2) == 0) reconnect(r);
    }
    frame_anything(r, bytes, left);
    close_side(&r->cut);
    close_side(&r->whole);
    cps_window_close(r->window);
    free(bytes);
    free(r);
    return 0;
}
