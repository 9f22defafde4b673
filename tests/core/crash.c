/* Kills at named points; see the header. */
#include "crash.h"

#include <stdatomic.h>
#include <string.h>

#include "_crash_point.h"

enum { POINTS_MAX = 256 };

static atomic_bool watching; /* without it a point costs a load */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static sim *machine;
static const char *chosen;
static uint64_t hits_left;
static atomic_bool happened;
static const char *names[POINTS_MAX];
static uint64_t hits[POINTS_MAX];
static unsigned used;

void cps_crash_point(const char *name) {
    if (!atomic_load_explicit(&watching, memory_order_relaxed)) return;
    (void)pthread_mutex_lock(&lock);
    if (atomic_load_explicit(&watching, memory_order_relaxed)) {
        unsigned i = 0;
        while (i < used && names[i] != name && strcmp(names[i], name) != 0) i++;
        CPS_ASSERT(i < POINTS_MAX);
        if (i == used) names[used++] = name;
        hits[i]++;
        if (chosen != NULL && strcmp(chosen, name) == 0 && --hits_left == 0) {
            sim_kill(machine);
            atomic_store_explicit(&happened, true, memory_order_relaxed);
            atomic_store_explicit(&watching, false, memory_order_relaxed);
        }
    }
    (void)pthread_mutex_unlock(&lock);
}

void crash_watch(sim *s, const char *name, uint64_t nth) {
    (void)pthread_mutex_lock(&lock);
    machine = s;
    chosen = name;
    hits_left = nth;
    memset(hits, 0, sizeof hits);
    used = 0;
    atomic_store_explicit(&happened, false, memory_order_relaxed);
    atomic_store_explicit(&watching, true, memory_order_relaxed);
    (void)pthread_mutex_unlock(&lock);
}

void crash_stop(void) {
    (void)pthread_mutex_lock(&lock);
    atomic_store_explicit(&watching, false, memory_order_relaxed);
    (void)pthread_mutex_unlock(&lock);
}

bool crash_happened(void) { return atomic_load_explicit(&happened, memory_order_relaxed); }

const char *crash_name(unsigned index) { return index < used ? names[index] : NULL; }

uint64_t crash_hits(unsigned index) { return hits[index]; }
