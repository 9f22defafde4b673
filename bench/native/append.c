/* Appending from native threads: `append THREADS MESSAGES PAYLOAD_BYTES` prints the seconds that it took for all of them
 * together.  The log is in memory; what was appended is taken out again between the rounds, which is not part of it. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "_log.h"

enum { THREADS_MAX = 64, RING_BYTES = 16 << 20 };
#define TOPIC "gateway-17/telemetry"

static cps_log *the_log;
static pthread_barrier_t begin, end;
static uint32_t each, size;
static bool over;
static const uint8_t payload[RING_BYTES / 4];

static void need(bool good, const char *what) {
    if (good) return;
    fprintf(stderr, "append: %s\n", what);
    exit(1);
}

static double now_s(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void *produce(void *argument) {
    (void)argument;
    cps_message message = {.topic = (const uint8_t *)TOPIC, .topic_bytes = sizeof(TOPIC) - 1, .payload = payload,
                           .payload_bytes = size};
    cps_patience patience;
    for (;;) {
        (void)pthread_barrier_wait(&begin);
        if (over) return NULL;
        for (uint32_t i = 0; i < each; i++) {
            uint64_t position;
            memset(&patience, 0, sizeof patience);
            patience.slice_ms = CPS_NO_LIMIT_MS;
            need(cps_log_append(the_log, &message, &patience, &position) == CPS_OK, "an append failed");
        }
        (void)pthread_barrier_wait(&end);
    }
}

static void empty(uint64_t messages) {
    uint64_t head = 0, before;
    cps_batch batch;
    cps_log_stats stats;
    cps_log_stats_now(the_log, &stats);
    need(stats.pending_messages == messages, "not all of it is there");
    before = stats.pending_bytes;
    while (cps_log_read(the_log, 1 << 20, &batch) == CPS_OK) {
        head = batch.position + batch.size;
        cps_log_read_done(the_log, batch.size);
    }
    cps_log_settle(the_log, head, messages, before, NULL, 0);
}

int main(int argc, char **argv) {
    need(argc == 4, "THREADS MESSAGES PAYLOAD_BYTES");
    uint32_t threads = (uint32_t)atoi(argv[1]), n = (uint32_t)strtoul(argv[2], NULL, 10);
    size = (uint32_t)strtoul(argv[3], NULL, 10);
    need(threads >= 1 && threads <= THREADS_MAX && size < RING_BYTES / 8, "out of range");
    cps_log_config config = {.io = cps_io_system(), .durability = CPS_DURABILITY_MEMORY, .on_full = CPS_ON_FULL_RAISE,
                             .ring_bytes = RING_BYTES, .segment_bytes = RING_BYTES, .spool_bytes_max = RING_BYTES,
                             .spill_after_ms = CPS_NO_LIMIT_MS / 2, .spill_timeout_ms = 60000};
    cps_opened opened;
    need(cps_log_open(&config, &the_log, &opened) == CPS_OK, "the log cannot be opened");
    uint32_t fits = RING_BYTES / 2 / (size + 64), round = n < fits ? n : fits;
    each = round / threads;
    need(each > 0, "too few messages");
    (void)pthread_barrier_init(&begin, NULL, threads + 1);
    (void)pthread_barrier_init(&end, NULL, threads + 1);
    pthread_t workers[THREADS_MAX];
    for (uint32_t i = 0; i < threads; i++) need(pthread_create(&workers[i], NULL, produce, NULL) == 0, "no thread");
    double total_s = 0;
    uint64_t done = 0;
    for (int warm = 2; warm > 0 || done < n; warm--) { /* two rounds touch every page of the ring first */
        double began_s = now_s();
        (void)pthread_barrier_wait(&begin);
        (void)pthread_barrier_wait(&end);
        if (warm <= 0) {
            total_s += now_s() - began_s;
            done += (uint64_t)each * threads;
        }
        empty((uint64_t)each * threads);
    }
    over = true;
    (void)pthread_barrier_wait(&begin);
    for (uint32_t i = 0; i < threads; i++) (void)pthread_join(workers[i], NULL);
    uint64_t unsaved;
    cps_log_close(the_log, 1000, &unsaved);
    printf("%.9f %llu\n", total_s, (unsigned long long)done);
    return 0;
}
