/* The folder for what is damaged; see the header. */
#include "_quarantine.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COPY_BYTES = 16 * 1024, NAME_BYTES = 64, SAME_NAMES_MAX = 100, BLOCK_BYTES = 4096 };

/* What a file of `size` bytes takes of the disk, on any file system that gateways have, or a little more. */
static uint64_t in_blocks(uint64_t size) { return (size + BLOCK_BYTES - 1) / BLOCK_BYTES * BLOCK_BYTES; }

static CPS_MUST_CHECK bool file_path(const cps_quarantine *q, const char *name, char out[CPS_PATH_MAX]) {
    int n = snprintf(out, CPS_PATH_MAX, "%s/%s", q->path, name);
    return n > 0 && n < CPS_PATH_MAX;
}

static void count_file(void *user, const char *name) {
    cps_quarantine *q = user;
    char path[CPS_PATH_MAX];
    int handle, ignored; /* what cannot be looked at takes no room that could be known */
    cps_io_facts facts;
    if (!file_path(q, name, path) || q->io->open(q->io->context, path, CPS_IO_READ, &handle, &ignored) != CPS_OK) return;
    if (q->io->facts(q->io->context, handle, &facts, &ignored) == CPS_OK)
        (void)atomic_fetch_add_explicit( /* no model: at open, before there is another thread */
            &q->bytes, in_blocks(facts.allocated_bytes > facts.size_bytes ? facts.allocated_bytes : facts.size_bytes),
            memory_order_relaxed);
    q->io->close(q->io->context, handle);
}

typedef struct names {
    char (*name)[NAME_BYTES];
    size_t used, room;
} names;

/* `list` may hold a lock of its own, so the files are looked at afterwards. */
static void note_name(void *user, const char *name) {
    names *all = user;
    size_t length = strlen(name);
    if (length >= NAME_BYTES) return;
    if (all->used == all->room) {
        size_t room = all->room == 0 ? 64 : 2 * all->room;
        void *grown = realloc(all->name, room * sizeof *all->name);
        if (grown == NULL) return; /* what is not counted may be kept beyond the share: better than no log */
        all->name = grown;
        all->room = room;
    }
    memcpy(all->name[all->used++], name, length + 1);
}

enum cps_status cps_quarantine_open(cps_quarantine *q, const cps_io *io, const char *directory, uint64_t max_bytes) {
    memset(q, 0, sizeof *q);
    q->io = io;
    q->max_bytes = max_bytes;
    int n = snprintf(q->path, sizeof q->path, "%s/quarantine", directory), ignored;
    if (n < 0 || (size_t)n >= sizeof q->path) return CPS_TOO_LARGE;
    names all = {0};
    (void)!io->list(io->context, q->path, note_name, &all, &ignored); /* there may be none yet */
    for (size_t i = 0; i < all.used; i++) count_file(q, all.name[i]);
    free(all.name);
    return CPS_OK;
}

static void give_back(cps_quarantine *q, uint64_t size) {
    (void)atomic_fetch_sub_explicit(&q->bytes, in_blocks(size), memory_order_relaxed); /* model: share.give */
}

/* Take room for `size` bytes; and there is the folder.  Two threads may ask at once: together they stay within the bound.
 * Relaxed, as everywhere here: it is a number, and nothing is handed over with it. */
static CPS_MUST_CHECK bool take_place(cps_quarantine *q, uint64_t size) {
    int ignored;
    uint64_t taken = atomic_load_explicit(&q->bytes, memory_order_relaxed); /* model: share.seen */
    if (size > q->max_bytes || in_blocks(size) > q->max_bytes) return false;
    do {
        if (taken > q->max_bytes - in_blocks(size)) return false;
        /* model: share.take */
    } while (!atomic_compare_exchange_weak_explicit(&q->bytes, &taken, taken + in_blocks(size), memory_order_relaxed,
                                                    memory_order_relaxed));
    if (q->io->make_directory(q->io->context, q->path, &ignored) == CPS_OK) return true;
    give_back(q, size);
    return false;
}

void cps_quarantine_copy(cps_quarantine *q, int handle, uint64_t offset, uint64_t first, uint64_t end) {
    const cps_io *io = q->io;
    char name[NAME_BYTES], path[CPS_PATH_MAX];
    uint8_t some[COPY_BYTES];
    int out, ignored; /* an aid for people: a failure costs them that, and nobody else anything */
    (void)snprintf(name, sizeof name, "%016" PRIx64 "-%016" PRIx64 ".bytes", first, end);
    if (!file_path(q, name, path) || !take_place(q, end - first)) return;
    if (io->open(io->context, path, CPS_IO_CREATE, &out, &ignored) != CPS_OK) { /* it was kept before, perhaps */
        give_back(q, end - first);
        return;
    }
    for (uint64_t at = 0; at < end - first;) {
        size_t want = end - first - at < sizeof some ? (size_t)(end - first - at) : sizeof some, got = 0;
        if (io->read(io->context, handle, some, want, offset + at, &got, &ignored) != CPS_OK || got == 0) break;
        if (io->write(io->context, out, some, got, at, &ignored) != CPS_OK) break;
        at += got;
    }
    io->close(io->context, out);
}

/* A path for `name` that nothing has yet: what is kept is never written over. */
static bool free_path(const cps_quarantine *q, const char *name, char out[CPS_PATH_MAX]) {
    char tried[CPS_PATH_MAX];
    for (unsigned i = 0; i < SAME_NAMES_MAX; i++) {
        int handle, error = 0;
        int n = i == 0 ? snprintf(tried, sizeof tried, "%s", name) : snprintf(tried, sizeof tried, "%s.%u", name, i);
        if (n < 0 || (size_t)n >= sizeof tried || !file_path(q, tried, out)) return false;
        if (q->io->open(q->io->context, out, CPS_IO_READ, &handle, &error) == CPS_OK) q->io->close(q->io->context, handle);
        else if (error == ENOENT) return true;
    }
    return false;
}

enum cps_status cps_quarantine_move(cps_quarantine *q, const char *path, uint64_t size_bytes, int *error) {
    char target[CPS_PATH_MAX];
    const char *name = strrchr(path, '/');
    if (name == NULL || !take_place(q, size_bytes)) return q->io->remove(q->io->context, path, error);
    if (free_path(q, name + 1, target) && q->io->rename(q->io->context, path, target, error) == CPS_OK) return CPS_OK;
    give_back(q, size_bytes); /* gone already, or no place for its name */
    return q->io->remove(q->io->context, path, error);
}
