/* The native hot paths, each alone, for a program that counts instructions: `instructions PATH MESSAGES DIRECTORY`.
 *
 * Only what happens inside `measured_*` is meant to be counted, and for spilling only the flusher's thread.  What a path
 * needs before and after it is made outside.  Every result is checked: a path that does not do its work aborts. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "_log.h"
#include "_wire.h"

#define NOINLINE __attribute__((noinline))
#define TOPIC "gateway-17/telemetry"

enum { TOPIC_BYTES = sizeof(TOPIC) - 1, OUT_BYTES = 128 * 1024, READ_BYTES = 128 * 1024, ROUND = 10000, ROUND_1K = 1500 };

static uint8_t payload[1024], out[OUT_BYTES];

static void need(bool good, const char *what) {
    if (good) return;
    fprintf(stderr, "instructions: %s\n", what);
    exit(1);
}

static cps_log *open_log(const char *directory) {
    cps_log_config config = {
        .io = cps_io_system(),
        .directory = directory,
        .durability = CPS_DURABILITY_MEMORY,
        .on_full = CPS_ON_FULL_RAISE,
        .ring_bytes = 4 << 20,
        .segment_bytes = 8 << 20,
        .spool_bytes_max = 1 << 30,
        .spill_after_ms = CPS_NO_LIMIT_MS / 2,
        .spill_timeout_ms = 60000,
        .block_timeout_ms = 60000,
        .sync_interval_ms = 1000,
        .seal_after_ms = 3600000,
    };
    cps_opened opened;
    cps_log *log = NULL;
    need(cps_log_open(&config, &log, &opened) == CPS_OK, "the log cannot be opened");
    return log;
}

static void close_log(cps_log *log) {
    uint64_t unsaved;
    cps_log_close(log, 60000, &unsaved);
}

static NOINLINE uint64_t measured_append(cps_log *log, uint32_t n, uint32_t size) {
    uint64_t position = 0;
    for (uint32_t i = 0; i < n; i++) {
        cps_message message = {
            .topic = (const uint8_t *)TOPIC, .topic_bytes = TOPIC_BYTES, .payload = payload, .payload_bytes = size};
        need(cps_log_append(log, &message, NULL, &position) == CPS_OK, "an append failed");
    }
    return position;
}

/* The same outside of what is measured. */
static uint64_t append(cps_log *log, uint32_t n, uint32_t size) {
    uint64_t position = 0;
    for (uint32_t i = 0; i < n; i++) {
        cps_message message = {
            .topic = (const uint8_t *)TOPIC, .topic_bytes = TOPIC_BYTES, .payload = payload, .payload_bytes = size};
        need(cps_log_append(log, &message, NULL, &position) == CPS_OK, "an append failed");
    }
    return position;
}

/* What is to be read into packets, as the publish connection does it. */
static uint32_t NOINLINE measured_frame(cps_log *log, cps_window *window) {
    uint32_t messages = 0;
    size_t filled = 0;
    cps_batch batch;
    cps_wire_framed framed;
    cps_wire_source source = {.level = CPS_WIRE_LEVEL_311, .bytes_max = UINT64_MAX, .messages_max = UINT32_MAX,
                              .packet_bytes_max = CPS_WIRE_PACKET_MAX};
    while (cps_log_read(log, READ_BYTES, &batch) == CPS_OK) {
        source.bytes = batch.bytes;
        source.size_bytes = batch.size;
        source.position = batch.position;
        need(cps_wire_frame(&source, window, out + filled, OUT_BYTES - filled, &framed) == CPS_OK, "framing failed");
        need(framed.stop != CPS_WIRE_WINDOW_FULL, "the window is full");
        cps_log_read_done(log, framed.consumed_bytes);
        messages += framed.messages;
        filled = framed.stop == CPS_WIRE_OUTPUT_FULL ? 0 : filled + framed.produced_bytes;
    }
    return messages;
}

static void NOINLINE measured_acks(cps_log *log, cps_window *window, cps_stream *stream, const uint8_t *acks, size_t size) {
    for (size_t at = 0; at < size;) {
        uint8_t *to;
        size_t room, part = size - at;
        cps_wire_acks taken;
        need(cps_stream_space(stream, 16384, &to, &room) == CPS_OK, "no room");
        if (part > 16384) part = 16384;
        memcpy(to, acks + at, part);
        cps_stream_commit(stream, part);
        need(cps_wire_take_acks(stream, window, NULL, 0, &taken) == CPS_EMPTY, "not only acknowledgements");
        uint64_t head, messages, bytes;
        need(cps_window_head(window, &head) == CPS_OK, "nothing is settled");
        cps_window_settled(window, &messages, &bytes);
        cps_log_settle(log, head, taken.settled, taken.settled_bytes, NULL, 0);
        at += part;
    }
}

/* Acknowledge everything in the window, whose ids begin at `*next_id`. */
static void acknowledge(cps_log *log, cps_window *window, cps_stream *stream, uint32_t messages, uint16_t *next_id) {
    uint8_t *acks = malloc(4 * (size_t)messages);
    need(acks != NULL, "no memory");
    for (uint32_t i = 0; i < messages; i++) {
        uint8_t *ack = acks + 4 * (size_t)i;
        ack[0] = 0x40, ack[1] = 2, ack[2] = (uint8_t)(*next_id >> 8), ack[3] = (uint8_t)*next_id;
        *next_id = *next_id == 65535 ? 1 : (uint16_t)(*next_id + 1);
    }
    measured_acks(log, window, stream, acks, 4 * (size_t)messages);
    free(acks);
    need(cps_window_inflight_messages(window) == 0, "not all were acknowledged");
}

/* Rounds of all that a message of 64 bytes goes through; through the disk if there is a directory. */
static void whole_way(uint32_t n, const char *directory) {
    cps_log *log = open_log(directory);
    cps_window *window;
    cps_stream *stream;
    uint16_t next_id = 1;
    need(cps_window_open(CPS_WINDOW_MESSAGES_MAX, UINT64_MAX, &window) == CPS_OK, "no window");
    need(cps_stream_open(64 * 1024, 65536, CPS_WIRE_LEVEL_311, &stream) == CPS_OK, "no stream");
    cps_window_renumber(window, 1);
    for (uint32_t done = 0; done < n; done += ROUND) {
        uint64_t last = measured_append(log, ROUND, 64);
        if (directory != NULL) need(cps_log_wait_synced(log, last, 60000) == CPS_OK, "it does not get to the disk");
        need(measured_frame(log, window) == ROUND, "not all were framed");
        acknowledge(log, window, stream, ROUND, &next_id);
    }
    cps_log_stats stats;
    cps_log_stats_now(log, &stats);
    need(stats.pending_messages == 0, "not all were settled");
    cps_stream_close(stream);
    cps_window_close(window);
    close_log(log);
}

/* The flusher writes while nobody else does anything. */
static void spill(uint32_t n, const char *directory) {
    cps_log *log = open_log(directory);
    for (uint32_t done = 0; done < n; done += ROUND_1K) {
        uint64_t last = append(log, ROUND_1K, 1024);
        need(cps_log_wait_synced(log, last, 60000) == CPS_OK, "it does not get to the disk");
    }
    cps_log_stats stats;
    cps_log_stats_now(log, &stats);
    need(stats.spool_messages == stats.produced.messages, "not all is on the disk");
    close_log(log);
}

static uint32_t NOINLINE measured_inbound(cps_stream *stream, const uint8_t *packets, size_t size, uint8_t *acks, size_t acks_bytes) {
    uint32_t messages = 0;
    for (size_t at = 0; at < size;) {
        uint8_t *to;
        size_t room, part = size - at, produced, n = 0;
        uint16_t ids[1024];
        cps_packet packet;
        need(cps_stream_space(stream, 16384, &to, &room) == CPS_OK, "no room");
        if (part > 16384) part = 16384;
        memcpy(to, packets + at, part);
        cps_stream_commit(stream, part);
        at += part;
        while (cps_stream_next(stream, &packet) == CPS_OK) {
            need(packet.type == CPS_WIRE_PUBLISH && packet.payload_bytes == 64, "another packet");
            ids[n++] = packet.packet_id;
        }
        need(cps_wire_puback(acks, acks_bytes, ids, n, &produced) == CPS_OK, "no PUBACKs");
        messages += (uint32_t)n;
    }
    return messages;
}

static void inbound(uint32_t n) {
    enum { PACKET = 2 + 2 + TOPIC_BYTES + 2 + 64 };
    uint8_t *packets = malloc((size_t)n * PACKET), acks[4096];
    cps_stream *stream;
    need(packets != NULL, "no memory");
    for (uint32_t i = 0; i < n; i++) {
        uint8_t *at = packets + (size_t)i * PACKET;
        uint32_t id = i % 65535 + 1;
        at[0] = 0x32, at[1] = PACKET - 2, at[2] = 0, at[3] = TOPIC_BYTES;
        memcpy(at + 4, TOPIC, TOPIC_BYTES);
        at[4 + TOPIC_BYTES] = (uint8_t)(id >> 8), at[5 + TOPIC_BYTES] = (uint8_t)id;
        memcpy(at + 6 + TOPIC_BYTES, payload, 64);
    }
    need(cps_stream_open(64 * 1024, 65536, CPS_WIRE_LEVEL_311, &stream) == CPS_OK, "no stream");
    need(measured_inbound(stream, packets, (size_t)n * PACKET, acks, sizeof acks) == n, "not all were parsed");
    cps_stream_close(stream);
    free(packets);
}

int main(int argc, char **argv) {
    need(argc == 4, "PATH MESSAGES DIRECTORY");
    const char *path = argv[1], *directory = argv[3];
    uint32_t n = (uint32_t)strtoul(argv[2], NULL, 10);
    for (size_t i = 0; i < sizeof payload; i++) payload[i] = (uint8_t)i;
    if (strcmp(path, "ring") == 0) whole_way(n, NULL);
    else if (strcmp(path, "disk") == 0) whole_way(n, directory);
    else if (strcmp(path, "spill") == 0) spill(n, directory);
    else if (strcmp(path, "inbound") == 0) inbound(n);
    else need(false, "no such path");
    return 0;
}
