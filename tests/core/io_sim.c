/* The simulated disk; see the header. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "io_sim.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { NODES = 1024, HANDLES = 256, PATH_BYTES = 256, SECTOR_BYTES = 512, CLOCK_LOOK_MS = 5 };

typedef struct node {
    char path[PATH_BYTES];
    uint8_t *seen; /* what programs see; NULL: this place is free */
    uint8_t *kept; /* what survives; of tmpfs: as it was when the process was killed */
    uint64_t seen_bytes;
    uint64_t kept_bytes;
    uint64_t taken_bytes; /* allocated or written once */
    bool seen_entry;
    bool kept_entry;
    bool is_directory;
    bool in_memory;
    bool locked;
    unsigned users; /* handles and mappings */
} node;

struct sim {
    pthread_mutex_t lock;
    cps_io table;
    const cps_io *system;
    bool real;
    node nodes[NODES];
    node *handles[HANDLES];
    bool holds_lock[HANDLES];
    uint64_t calls[SIM_KINDS + 1];
    uint64_t changes;
    uint64_t fail_in[SIM_KINDS + 2]; /* 0: not at all */
    int fail_error[SIM_KINDS + 2];
    bool fail_sticky[SIM_KINDS + 2];
    uint64_t failed;
    bool hangs[SIM_KINDS + 2];
    unsigned hanging;
    pthread_cond_t came_back;
    uint64_t space_bytes;
    size_t page_bytes;
    uint64_t cut_in; /* 0: not at all */
    bool is_cut;
    uint64_t clock_ms;
};

static uint64_t scramble(uint64_t *state) { /* splitmix64 */
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* ---- faults: with the lock held ---- */

static bool due(sim *s, unsigned at) {
    if (s->fail_in[at] == 0) return false;
    if (s->fail_in[at] > 1) {
        s->fail_in[at]--;
        return false;
    }
    if (!s->fail_sticky[at]) s->fail_in[at] = 0;
    return true;
}

/* Lets the lock go while the call hangs. */
static void hang(sim *s, enum sim_kind kind, bool changes) {
    s->hanging++;
    while (s->hangs[kind] || (changes && s->hangs[SIM_CHANGES])) (void)pthread_cond_wait(&s->came_back, &s->lock);
    s->hanging--;
}

/* Count one call; CPS_IO if it is to fail. */
static enum cps_status enter(sim *s, enum sim_kind kind, bool changes, int *error) {
    s->calls[kind]++;
    if (changes) s->changes++;
    if (changes && s->cut_in > 0 && --s->cut_in == 0) s->is_cut = true;
    if (s->is_cut) {
        *error = EIO;
        return CPS_IO;
    }
    unsigned at = SIM_KINDS + 2;
    if (due(s, kind)) at = kind;
    if (changes && due(s, SIM_CHANGES)) at = SIM_CHANGES;
    if (at == SIM_KINDS + 2) return CPS_OK;
    s->failed++;
    *error = s->fail_error[at];
    return CPS_IO;
}

static enum cps_status leave(sim *s, enum cps_status status) {
    (void)pthread_mutex_unlock(&s->lock);
    return status;
}

static enum cps_status fail(int *error, int number) {
    *error = number;
    return CPS_IO;
}

#define ENTER(kind, changes)                                                                                           \
    sim *s = context;                                                                                                  \
    (void)pthread_mutex_lock(&s->lock);                                                                                \
    hang(s, kind, changes);                                                                                            \
    enum cps_status status = enter(s, kind, changes, error);                                                           \
    if (status != CPS_OK) return leave(s, status)

/* ---- nodes: with the lock held ---- */

static node *find(sim *s, const char *path) {
    for (unsigned i = 0; i < NODES; i++)
        if (s->nodes[i].seen != NULL && s->nodes[i].seen_entry && strcmp(s->nodes[i].path, path) == 0)
            return &s->nodes[i];
    return NULL;
}

static uint8_t *reserve(void) {
    void *memory = mmap(NULL, SIM_FILE_BYTES_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                        -1, 0);
    CPS_ASSERT(memory != MAP_FAILED);
    return memory;
}

static node *make(sim *s, const char *path) {
    node *n = s->nodes;
    while (n->seen != NULL) CPS_ASSERT(++n < s->nodes + NODES);
    memset(n, 0, sizeof *n);
    CPS_ASSERT(strlen(path) < sizeof n->path);
    memcpy(n->path, path, strlen(path) + 1);
    n->seen = reserve();
    n->kept = reserve();
    n->seen_entry = true;
    n->in_memory = strncmp(path, "/shm/", 5) == 0;
    return n;
}

static void drop_if_gone(node *n) {
    if (n->seen_entry || n->kept_entry || n->users > 0) return;
    (void)munmap(n->seen, SIM_FILE_BYTES_MAX);
    (void)munmap(n->kept, SIM_FILE_BYTES_MAX);
    n->seen = NULL;
}

static uint64_t used(const sim *s) {
    uint64_t sum = 0;
    for (unsigned i = 0; i < NODES; i++)
        if (s->nodes[i].seen != NULL && !s->nodes[i].in_memory && (s->nodes[i].seen_entry || s->nodes[i].users > 0))
            sum += s->nodes[i].taken_bytes;
    return sum;
}

static enum cps_status take(sim *s, node *n, uint64_t size, int *error) {
    if (size > SIM_FILE_BYTES_MAX) return fail(error, EFBIG);
    if (size <= n->taken_bytes) return CPS_OK;
    if (!n->in_memory && used(s) + size - n->taken_bytes > s->space_bytes) return fail(error, ENOSPC);
    n->taken_bytes = size;
    return CPS_OK;
}

static node *at(sim *s, int handle) {
    CPS_ASSERT(handle >= 0 && handle < HANDLES && s->handles[handle] != NULL);
    return s->handles[handle];
}

static bool is_in(const char *path, const char *directory) {
    size_t length = strlen(directory);
    return strncmp(path, directory, length) == 0 && path[length] == '/' && strchr(path + length + 1, '/') == NULL;
}

/* ---- the table ---- */

static enum cps_status sim_do_open(void *context, const char *path, enum cps_io_open how, int *handle, int *error) {
    sim *self = context;
    (void)pthread_mutex_lock(&self->lock);
    bool may_create = how == CPS_IO_CREATE || how == CPS_IO_ENSURE;
    hang(self, SIM_OPEN, may_create);
    node *n = self->real ? NULL : find(self, path);
    bool creates = self->real ? may_create : n == NULL && may_create;
    enum cps_status status = enter(self, SIM_OPEN, creates, error);
    if (status != CPS_OK) return leave(self, status);
    if (creates) self->calls[SIM_CREATE]++;
    if (self->real) {
        (void)leave(self, CPS_OK);
        return self->system->open(NULL, path, how, handle, error);
    }
    if (n == NULL && !may_create) return leave(self, fail(error, ENOENT));
    if (n != NULL && how == CPS_IO_CREATE) return leave(self, fail(error, EEXIST));
    if (n != NULL && n->is_directory) return leave(self, fail(error, EISDIR));
    if (n == NULL) n = make(self, path);
    int free_handle = 0;
    while (self->handles[free_handle] != NULL) CPS_ASSERT(++free_handle < HANDLES);
    self->handles[free_handle] = n;
    n->users++;
    *handle = free_handle;
    return leave(self, CPS_OK);
}

static void sim_do_close(void *context, int handle) {
    sim *s = context;
    if (s->real) {
        s->system->close(NULL, handle);
        return;
    }
    (void)pthread_mutex_lock(&s->lock);
    node *n = at(s, handle);
    s->handles[handle] = NULL;
    if (s->holds_lock[handle]) n->locked = s->holds_lock[handle] = false;
    n->users--;
    drop_if_gone(n);
    (void)leave(s, CPS_OK);
}

static enum cps_status sim_do_facts(void *context, int handle, cps_io_facts *out, int *error) {
    ENTER(SIM_FACTS, false);
    if (s->real) return leave(s, s->system->facts(NULL, handle, out, error));
    const node *n = at(s, handle);
    *out = (cps_io_facts){.size_bytes = n->seen_bytes, .allocated_bytes = n->taken_bytes, .owner_uid = geteuid(),
                          .mode = 0600, .is_regular = true, .is_in_memory = n->in_memory};
    return leave(s, CPS_OK);
}

static enum cps_status sim_do_read(void *context, int handle, void *bytes, size_t size, uint64_t offset, size_t *got,
                                   int *error) {
    ENTER(SIM_READ, false);
    if (s->real) return leave(s, s->system->read(NULL, handle, bytes, size, offset, got, error));
    const node *n = at(s, handle);
    *got = 0;
    if (offset < n->seen_bytes) *got = n->seen_bytes - offset < size ? (size_t)(n->seen_bytes - offset) : size;
    memcpy(bytes, n->seen + offset, *got);
    return leave(s, CPS_OK);
}

static enum cps_status sim_do_write(void *context, int handle, const void *bytes, size_t size, uint64_t offset,
                                    int *error) {
    sim *s = context;
    (void)pthread_mutex_lock(&s->lock);
    hang(s, SIM_WRITE, true);
    bool was_cut = s->is_cut;
    enum cps_status status = enter(s, SIM_WRITE, true, error);
    if (s->real) {
        if (status == CPS_OK) status = s->system->write(NULL, handle, bytes, size, offset, error);
        return leave(s, status);
    }
    node *n = at(s, handle);
    if (status != CPS_OK) size /= 2; /* a write that fails or is cut may have got half way */
    if (was_cut) return leave(s, status);
    if (status == CPS_OK) status = take(s, n, offset + size, error);
    if (offset + size <= n->taken_bytes) {
        /* A mapping is the file itself here: who reads there may go on while the same bytes are written once more. */
        if (memcmp(n->seen + offset, bytes, size) != 0) memcpy(n->seen + offset, bytes, size);
        if (offset + size > n->seen_bytes) n->seen_bytes = offset + size;
    }
    return leave(s, status);
}

static enum cps_status sim_do_allocate(void *context, int handle, uint64_t size, int *error) {
    ENTER(SIM_ALLOCATE, true);
    if (s->real) return leave(s, s->system->allocate(NULL, handle, size, error));
    node *n = at(s, handle);
    status = take(s, n, size, error);
    if (status == CPS_OK && size > n->seen_bytes) n->seen_bytes = size;
    return leave(s, status);
}

static enum cps_status sim_do_truncate(void *context, int handle, uint64_t size, int *error) {
    ENTER(SIM_TRUNCATE, true);
    if (s->real) return leave(s, s->system->truncate(NULL, handle, size, error));
    node *n = at(s, handle);
    if (size < n->seen_bytes) memset(n->seen + size, 0, (size_t)(n->seen_bytes - size));
    n->seen_bytes = n->taken_bytes = size;
    return leave(s, CPS_OK);
}

static enum cps_status sim_do_sync(void *context, int handle, int *error) {
    ENTER(SIM_SYNC, true);
    if (s->real) return leave(s, s->system->sync(NULL, handle, error));
    node *n = at(s, handle);
    if (n->in_memory) return leave(s, CPS_OK);
    uint64_t larger = n->seen_bytes > n->kept_bytes ? n->seen_bytes : n->kept_bytes;
    memcpy(n->kept, n->seen, (size_t)larger);
    n->kept_bytes = n->seen_bytes;
    return leave(s, CPS_OK);
}

static enum cps_status sim_do_sync_directory(void *context, const char *path, int *error) {
    ENTER(SIM_SYNC_DIRECTORY, true);
    if (s->real) return leave(s, s->system->sync_directory(NULL, path, error));
    for (node *n = s->nodes; n < s->nodes + NODES; n++) {
        if (n->seen == NULL || !is_in(n->path, path)) continue;
        n->kept_entry = n->seen_entry;
        drop_if_gone(n);
    }
    return leave(s, CPS_OK);
}

static enum cps_status sim_do_make_directory(void *context, const char *path, int *error) {
    ENTER(SIM_MAKE_DIRECTORY, true);
    if (s->real) return leave(s, s->system->make_directory(NULL, path, error));
    if (find(s, path) == NULL) make(s, path)->is_directory = true;
    return leave(s, CPS_OK);
}

static enum cps_status sim_do_remove(void *context, const char *path, int *error) {
    ENTER(SIM_REMOVE, true);
    if (s->real) return leave(s, s->system->remove(NULL, path, error));
    node *n = find(s, path);
    if (n == NULL) return leave(s, CPS_OK);
    n->seen_entry = false;
    if (n->in_memory) n->kept_entry = false;
    drop_if_gone(n);
    return leave(s, CPS_OK);
}

/* Its new name is durable with the next sync of its new directory, the end of the old one with that of the old one: for a
 * move between two directories that is one entry here, so it is durable with the former. */
static enum cps_status sim_do_rename(void *context, const char *from, const char *to, int *error) {
    ENTER(SIM_RENAME, true);
    if (s->real) return leave(s, s->system->rename(NULL, from, to, error));
    node *n = find(s, from), *old = find(s, to);
    if (n == NULL) return leave(s, fail(error, ENOENT));
    if (old != NULL) {
        old->seen_entry = old->kept_entry = false;
        drop_if_gone(old);
    }
    CPS_ASSERT(strlen(to) < sizeof n->path);
    memcpy(n->path, to, strlen(to) + 1);
    return leave(s, CPS_OK);
}

static enum cps_status sim_do_list(void *context, const char *path, void (*each)(void *user, const char *name),
                                   void *user, int *error) {
    ENTER(SIM_LIST, false);
    if (s->real) return leave(s, s->system->list(NULL, path, each, user, error));
    for (node *n = s->nodes; n < s->nodes + NODES; n++)
        if (n->seen != NULL && n->seen_entry && is_in(n->path, path)) each(user, n->path + strlen(path) + 1);
    return leave(s, CPS_OK);
}

static enum cps_status sim_do_free_space(void *context, const char *path, uint64_t *bytes, int *error) {
    ENTER(SIM_FREE_SPACE, false);
    if (s->real) return leave(s, s->system->free_space(NULL, path, bytes, error));
    *bytes = s->space_bytes - used(s);
    return leave(s, CPS_OK);
}

static enum cps_status sim_do_lock(void *context, int handle, int *error) {
    ENTER(SIM_LOCK, false);
    if (s->real) return leave(s, s->system->lock(NULL, handle, error));
    node *n = at(s, handle);
    if (n->locked) return leave(s, CPS_LOCKED);
    n->locked = s->holds_lock[handle] = true;
    return leave(s, CPS_OK);
}

static size_t sim_do_page_bytes(void *context) {
    const sim *s = context;
    return s->page_bytes;
}

static enum cps_status sim_do_map(void *context, int handle, size_t size, uint8_t **bytes, int *error) {
    ENTER(SIM_MAP, false);
    CPS_ASSERT(size > 0 && size % s->page_bytes == 0);
    if (s->real) return leave(s, s->system->map(NULL, handle, size, bytes, error));
    node *n = at(s, handle);
    n->users++;
    *bytes = n->seen;
    return leave(s, CPS_OK);
}

static enum cps_status sim_do_map_memory(void *context, size_t size, uint8_t **bytes, int *error) {
    ENTER(SIM_MAP_MEMORY, false);
    CPS_ASSERT(size > 0 && size % s->page_bytes == 0);
    return leave(s, s->system->map_memory(NULL, size, bytes, error));
}

static node *node_of(sim *s, const uint8_t *bytes) {
    for (node *n = s->nodes; n < s->nodes + NODES; n++)
        if (n->seen != NULL && bytes >= n->seen && bytes < n->seen + SIM_FILE_BYTES_MAX) return n;
    return NULL;
}

static void sim_do_unmap(void *context, uint8_t *bytes, size_t size) {
    sim *s = context;
    CPS_ASSERT(size > 0 && size % s->page_bytes == 0);
    (void)pthread_mutex_lock(&s->lock);
    node *n = s->real ? NULL : node_of(s, bytes);
    if (n != NULL) {
        n->users--;
        drop_if_gone(n);
    } else {
        s->system->unmap(NULL, bytes, size);
    }
    (void)leave(s, CPS_OK);
}

static uint64_t jump(sim *s) {
    (void)pthread_mutex_lock(&s->lock);
    uint64_t ms = s->clock_ms;
    (void)leave(s, CPS_OK);
    return ms;
}

static uint64_t sim_do_monotonic(void *context) {
    sim *s = context;
    return s->system->monotonic_ms(NULL) + jump(s);
}

/* A jump of the clock wakes nobody, so a sleeper looks at it now and then. */
static bool sim_do_wait_until(void *context, pthread_cond_t *condition, pthread_mutex_t *lock, uint64_t deadline_ms) {
    sim *s = context;
    uint64_t now = sim_do_monotonic(s);
    if (now >= deadline_ms) return false;
    uint64_t slice = deadline_ms - now < CLOCK_LOOK_MS ? deadline_ms - now : CLOCK_LOOK_MS;
    bool woken = s->system->wait_until(NULL, condition, lock, s->system->monotonic_ms(NULL) + slice);
    return woken || sim_do_monotonic(s) < deadline_ms;
}

static uint64_t sim_do_tick(void *context) {
    sim *s = context;
    return s->system->tick_ms(NULL) + jump(s);
}

static uint64_t sim_do_boottime(void *context) {
    sim *s = context;
    return s->system->boottime_ms(NULL) + jump(s);
}

static uint64_t sim_do_wall(void *context) {
    sim *s = context;
    return s->system->wall_ms(NULL) + jump(s);
}

static void sim_do_boot_id(void *context, uint8_t id[16]) {
    sim *s = context;
    s->system->boot_id(NULL, id);
}

static void sim_do_random(void *context, void *bytes, size_t size) {
    sim *s = context;
    s->system->random(NULL, bytes, size);
}

/* ---- tests' side ---- */

sim *sim_new(bool real) {
    sim *s = calloc(1, sizeof *s);
    CPS_ASSERT(s != NULL && pthread_mutex_init(&s->lock, NULL) == 0 && pthread_cond_init(&s->came_back, NULL) == 0);
    s->system = cps_io_system();
    s->real = real;
    s->space_bytes = UINT64_MAX / 2;
    s->page_bytes = s->system->page_bytes(NULL);
    s->table = (cps_io){
        .context = s, .open = sim_do_open, .close = sim_do_close, .facts = sim_do_facts, .read = sim_do_read,
        .write = sim_do_write, .allocate = sim_do_allocate, .truncate = sim_do_truncate, .sync = sim_do_sync,
        .sync_directory = sim_do_sync_directory, .make_directory = sim_do_make_directory, .remove = sim_do_remove, .rename = sim_do_rename,
        .list = sim_do_list, .free_space = sim_do_free_space, .lock = sim_do_lock, .page_bytes = sim_do_page_bytes,
        .map = sim_do_map, .map_memory = sim_do_map_memory, .unmap = sim_do_unmap,
        .monotonic_ms = sim_do_monotonic, .tick_ms = sim_do_tick, .boottime_ms = sim_do_boottime,
        .wall_ms = sim_do_wall, .wait_until = sim_do_wait_until, .boot_id = sim_do_boot_id, .random = sim_do_random,
    };
    return s;
}

void sim_pages(sim *s, size_t bytes) { s->page_bytes = bytes; }

void sim_free(sim *s) {
    for (node *n = s->nodes; n < s->nodes + NODES; n++) {
        if (n->seen == NULL) continue;
        CPS_ASSERT(n->users == 0);
        n->seen_entry = n->kept_entry = false;
        drop_if_gone(n);
    }
    (void)pthread_cond_destroy(&s->came_back);
    (void)pthread_mutex_destroy(&s->lock);
    free(s);
}

const cps_io *sim_io(sim *s) { return &s->table; }

void sim_fail(sim *s, enum sim_kind kind, uint64_t nth, int error, bool sticky) {
    (void)pthread_mutex_lock(&s->lock);
    s->fail_in[kind] = nth;
    s->fail_error[kind] = error;
    s->fail_sticky[kind] = sticky;
    (void)leave(s, CPS_OK);
}

void sim_heal(sim *s) {
    (void)pthread_mutex_lock(&s->lock);
    memset(s->fail_in, 0, sizeof s->fail_in);
    (void)leave(s, CPS_OK);
}

void sim_hang(sim *s, enum sim_kind kind) {
    (void)pthread_mutex_lock(&s->lock);
    s->hangs[kind] = true;
    (void)leave(s, CPS_OK);
}

void sim_come_back(sim *s) {
    (void)pthread_mutex_lock(&s->lock);
    memset(s->hangs, 0, sizeof s->hangs);
    (void)pthread_cond_broadcast(&s->came_back);
    (void)leave(s, CPS_OK);
}

unsigned sim_hanging(sim *s) {
    (void)pthread_mutex_lock(&s->lock);
    unsigned n = s->hanging;
    (void)leave(s, CPS_OK);
    return n;
}

uint64_t sim_failed(sim *s) {
    (void)pthread_mutex_lock(&s->lock);
    uint64_t n = s->failed;
    (void)leave(s, CPS_OK);
    return n;
}

uint64_t sim_calls(sim *s, enum sim_kind kind) {
    (void)pthread_mutex_lock(&s->lock);
    uint64_t n = kind == SIM_CHANGES ? s->changes : s->calls[kind];
    (void)leave(s, CPS_OK);
    return n;
}

void sim_space(sim *s, uint64_t bytes) {
    (void)pthread_mutex_lock(&s->lock);
    s->space_bytes = bytes;
    (void)leave(s, CPS_OK);
}

uint64_t sim_used(sim *s) {
    (void)pthread_mutex_lock(&s->lock);
    uint64_t bytes = used(s);
    (void)leave(s, CPS_OK);
    return bytes;
}

void sim_advance(sim *s, uint64_t ms) {
    (void)pthread_mutex_lock(&s->lock);
    s->clock_ms += ms;
    (void)leave(s, CPS_OK);
}

void sim_cut(sim *s, uint64_t nth) {
    (void)pthread_mutex_lock(&s->lock);
    s->cut_in = nth;
    if (nth == 0) s->is_cut = true;
    (void)leave(s, CPS_OK);
}

bool sim_is_cut(sim *s) {
    (void)pthread_mutex_lock(&s->lock);
    bool is_cut = s->is_cut;
    (void)leave(s, CPS_OK);
    return is_cut;
}

/* Other threads write to it all the while.  A copy that is still true when all of it was made is how the file was at the
 * instant between copying and comparing: nothing in a ring's file ever goes back to what it was. */
__attribute__((no_sanitize("thread"))) static void keep_as_it_is(node *n) {
    const volatile uint64_t *from = (const volatile uint64_t *)(const void *)n->seen; /* a mapping starts on a page */
    uint64_t *to = (uint64_t *)(void *)n->kept;
    size_t words = (size_t)(n->seen_bytes / 8);
    for (bool moved = true; moved;) {
        moved = false;
        for (size_t i = 0; i < words; i++) to[i] = from[i];
        atomic_thread_fence(memory_order_seq_cst);
        for (size_t i = 0; i < words; i++) moved = moved || to[i] != from[i];
    }
}

void sim_kill(sim *s) {
    (void)pthread_mutex_lock(&s->lock);
    s->is_cut = true;
    for (node *n = s->nodes; n < s->nodes + NODES; n++) {
        if (n->seen == NULL || !n->in_memory) continue;
        keep_as_it_is(n);
        n->kept_bytes = n->seen_bytes;
        n->kept_entry = n->seen_entry;
    }
    (void)leave(s, CPS_OK);
}

/* One file as the power cut leaves it: each sector old or new, as is its size. */
static void survive(node *n, uint64_t *seed) {
    uint64_t larger = n->seen_bytes > n->kept_bytes ? n->seen_bytes : n->kept_bytes;
    for (uint64_t from = 0; from < larger; from += SECTOR_BYTES)
        if (memcmp(n->seen + from, n->kept + from, SECTOR_BYTES) != 0 && (scramble(seed) & 1) != 0)
            memcpy(n->kept + from, n->seen + from, SECTOR_BYTES);
    if (n->seen_bytes != n->kept_bytes && (scramble(seed) & 1) != 0) n->kept_bytes = n->seen_bytes;
    memset(n->kept + n->kept_bytes, 0, SIM_FILE_BYTES_MAX > larger && larger > n->kept_bytes ? (size_t)(larger - n->kept_bytes) : 0);
    memcpy(n->seen, n->kept, (size_t)larger);
    n->seen_bytes = n->taken_bytes = n->kept_bytes;
}

static bool parent_is_gone(sim *s, const node *n) {
    for (const node *d = s->nodes; d < s->nodes + NODES; d++)
        if (d->seen != NULL && d->is_directory && !d->seen_entry && is_in(n->path, d->path)) return true;
    return false;
}

void sim_restart(sim *s, bool power, uint64_t seed) {
    (void)pthread_mutex_lock(&s->lock);
    s->is_cut = false;
    s->cut_in = 0;
    for (node *n = s->nodes; n < s->nodes + NODES; n++) {
        if (n->seen == NULL) continue;
        CPS_ASSERT(n->users == 0 && !n->locked);
        if (power && n->in_memory) {
            n->kept_entry = n->seen_entry = false;
        } else if (n->in_memory) {
            memcpy(n->seen, n->kept, (size_t)n->kept_bytes);
            n->seen_entry = n->kept_entry;
        } else if (power) {
            if (n->seen_entry != n->kept_entry && (scramble(&seed) & 1) != 0) n->kept_entry = n->seen_entry;
            n->seen_entry = n->kept_entry;
            survive(n, &seed);
        }
    }
    for (node *n = s->nodes; power && n < s->nodes + NODES; n++)
        if (n->seen != NULL && parent_is_gone(s, n)) n->seen_entry = n->kept_entry = false;
    for (node *n = s->nodes; n < s->nodes + NODES; n++)
        if (n->seen != NULL) drop_if_gone(n);
    (void)leave(s, CPS_OK);
}

enum cps_status sim_peek(sim *s, const char *path, uint8_t **bytes, uint64_t *size_bytes) {
    (void)pthread_mutex_lock(&s->lock);
    node *n = find(s, path);
    if (n == NULL) return leave(s, CPS_UNKNOWN);
    *bytes = n->seen;
    *size_bytes = n->seen_bytes;
    return leave(s, CPS_OK);
}

enum cps_status sim_put(sim *s, const char *path, const uint8_t *bytes, uint64_t size_bytes) {
    (void)pthread_mutex_lock(&s->lock);
    node *n = find(s, path);
    if (size_bytes > SIM_FILE_BYTES_MAX) return leave(s, CPS_TOO_LARGE);
    if (n == NULL) n = make(s, path);
    uint64_t larger = n->seen_bytes > size_bytes ? n->seen_bytes : size_bytes;
    memset(n->seen, 0, (size_t)larger);
    memcpy(n->seen, bytes, (size_t)size_bytes);
    memcpy(n->kept, n->seen, (size_t)larger);
    n->seen_bytes = n->kept_bytes = n->taken_bytes = size_bytes;
    n->kept_entry = true;
    return leave(s, CPS_OK);
}

enum cps_status sim_resize(sim *s, const char *path, uint64_t size_bytes) {
    (void)pthread_mutex_lock(&s->lock);
    node *n = find(s, path);
    if (n == NULL) return leave(s, CPS_UNKNOWN);
    if (size_bytes < n->seen_bytes) memset(n->seen + size_bytes, 0, (size_t)(n->seen_bytes - size_bytes));
    n->seen_bytes = size_bytes;
    return leave(s, CPS_OK);
}

void sim_erase(sim *s, const char *path) {
    (void)pthread_mutex_lock(&s->lock);
    node *n = find(s, path);
    if (n != NULL) {
        n->seen_entry = n->kept_entry = false;
        drop_if_gone(n);
    }
    (void)leave(s, CPS_OK);
}

const char *sim_name(sim *s, unsigned index) {
    const char *name = NULL;
    (void)pthread_mutex_lock(&s->lock);
    for (node *n = s->nodes; n < s->nodes + NODES && name == NULL; n++)
        if (n->seen != NULL && n->seen_entry && !n->is_directory && index-- == 0) name = n->path;
    (void)leave(s, CPS_OK);
    return name;
}
