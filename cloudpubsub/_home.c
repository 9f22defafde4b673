/* The ring's home; see the header. */
#include "_home.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "_record.h"
#include "_ring.h"

static size_t page_bytes(const cps_io *io) { return cps_io_round_to_page(io, CPS_SHARED_BYTES); }

static size_t home_bytes(const cps_io *io, uint64_t ring_bytes) {
    return page_bytes(io) + cps_io_round_to_page(io, (size_t)ring_bytes);
}

static CPS_MUST_CHECK enum cps_status name_path(cps_home *home, const char *directory, const uint8_t spool_id[16]) {
    char hex[33];
    for (size_t i = 0; i < 16; i++) (void)snprintf(hex + 2 * i, 3, "%02x", spool_id[i]);
    int n = snprintf(home->path, sizeof home->path, "%s/cloudpubsub-%s.ring", directory, hex);
    return n > 0 && (size_t)n < sizeof home->path ? CPS_OK : CPS_TOO_LARGE;
}

static void take_mapping(cps_home *home, uint8_t *mapping, size_t size) {
    home->mapping = mapping;
    home->mapping_bytes = size;
    home->shared = (cps_shared *)(void *)mapping; /* a mapping starts on a page, so it is aligned */
    home->ring = mapping + page_bytes(home->io);
}

/* Walk the records; `*whole` is where the chain ends, which is `published` unless memory was damaged. */
static uint64_t walk(const cps_home *home, uint64_t low, uint64_t published) {
    uint64_t at = low;
    while (at != published) {
        uint64_t offset = at & (home->ring_bytes - 1);
        uint64_t rest = home->ring_bytes - offset;
        uint64_t held = published - at;
        cps_record record;
        if (cps_record_load(home->ring + offset, rest < held ? rest : held, at, &record) != CPS_OK) break;
        if (cps_record_span(record.length_bytes) > home->ring_bytes / CPS_RING_RECORD_SHARE) break;
        at += cps_record_span(record.length_bytes);
    }
    return at;
}

static bool is_ours(cps_home *home, const cps_io_facts *facts, const uint8_t spool_id[16], uint64_t generation) {
    cps_shared *s = home->shared;
    uint8_t boot[16];
    home->io->boot_id(home->io->context, boot);
    /* Relaxed, all of these: we hold the lock of the file, so whoever wrote the page is dead, or has closed it. */
    /* model: home.magic.load */
    if (atomic_load_explicit(&s->magic, memory_order_relaxed) != CPS_SHARED_MAGIC) return false;
    if (s->version != CPS_SHARED_VERSION || memcmp(s->boot_id, boot, 16) != 0) return false;
    if (memcmp(s->spool_id, spool_id, 16) != 0) return false;
    uint64_t size = s->ring_bytes;
    if (size < 128 || (size & (size - 1)) != 0 || size > facts->size_bytes) return false;
    if (facts->size_bytes != home_bytes(home->io, size)) return false;
    home->ring_bytes = size;
    uint64_t own = atomic_load_explicit(&s->generation, memory_order_relaxed);       /* model: home.generation.load */
    uint64_t next = atomic_load_explicit(&s->next_generation, memory_order_relaxed); /* model: home.announced.load */
    return generation != 0 && (own == generation || next == generation);
}

static bool cursors_hold(cps_home *home) {
    cps_produced produced;
    cps_settled settled;
    cps_shared_read_produced(home->shared, &produced);
    cps_shared_read_settled(home->shared, &settled);
    uint64_t low = settled.head > settled.spilled ? settled.head : settled.spilled;
    if (low > produced.published || produced.published - low > home->ring_bytes) return false;
    return low % CPS_RECORD_ALIGN == 0 && walk(home, low, produced.published) == produced.published;
}

enum cps_status cps_home_find(const cps_io *io, const char *directory, const uint8_t spool_id[16], uint64_t generation,
                              cps_home *home, int *error) {
    memset(home, 0, sizeof *home);
    home->io = io;
    enum cps_status status = name_path(home, directory, spool_id);
    if (status != CPS_OK) return status;
    home->handle = -1;
    int handle;
    if (io->open(io->context, home->path, CPS_IO_READ_WRITE, &handle, error) != CPS_OK) {
        /* Only where there is nothing of ours may another be made in its place: any other error may pass. */
        bool is_none = *error == ENOENT || *error == ENOTDIR || *error == ELOOP || *error == EISDIR;
        return is_none ? CPS_EMPTY : CPS_IO;
    }
    cps_io_facts facts;
    status = io->facts(io->context, handle, &facts, error);
    if (status == CPS_OK) status = io->lock(io->context, handle, error);
    if (status == CPS_OK && (!facts.is_regular || !facts.is_in_memory || facts.owner_uid != geteuid() ||
                             (facts.mode & 077) != 0 || facts.size_bytes <= page_bytes(io) ||
                             facts.size_bytes > SIZE_MAX / 2 || facts.allocated_bytes < facts.size_bytes))
        status = CPS_EMPTY; /* not what we make: a sparse file could raise SIGBUS, somebody else's could lie */
    if (status == CPS_OK) {
        uint8_t *mapping;
        status = io->map(io->context, handle, (size_t)facts.size_bytes, &mapping, error);
        if (status == CPS_OK) {
            take_mapping(home, mapping, (size_t)facts.size_bytes);
            home->in_file = true;
            if (!is_ours(home, &facts, spool_id, generation) || !cursors_hold(home)) {
                io->unmap(io->context, mapping, home->mapping_bytes);
                status = CPS_EMPTY;
            }
        }
    }
    if (status == CPS_OK) home->handle = handle;
    else io->close(io->context, handle);
    return status;
}

static CPS_MUST_CHECK enum cps_status map_file(const cps_io *io, cps_home *home, size_t size, uint8_t **mapping,
                                               int *error) {
    int handle;
    enum cps_status status = io->remove(io->context, home->path, error);
    if (status != CPS_OK) return status;
    CPS_CRASH_POINT("home-cleared");
    status = io->open(io->context, home->path, CPS_IO_CREATE, &handle, error);
    if (status != CPS_OK) return status;
    CPS_CRASH_POINT("home-created");
    cps_io_facts facts;
    status = io->facts(io->context, handle, &facts, error);
    if (status == CPS_OK && !facts.is_in_memory) status = CPS_UNKNOWN;
    if (status == CPS_OK) status = io->allocate(io->context, handle, size, error);
    CPS_CRASH_POINT("home-allocated");
    if (status == CPS_OK) status = io->lock(io->context, handle, error);
    if (status == CPS_OK) status = io->map(io->context, handle, size, mapping, error);
    if (status == CPS_OK) {
        home->handle = handle;
    } else {
        io->close(io->context, handle);
        int ignored; /* the first error is the one to report */
        (void)!io->remove(io->context, home->path, &ignored);
    }
    return status;
}

enum cps_status cps_home_make(const cps_io *io, const char *directory, const uint8_t spool_id[16], uint64_t ring_bytes,
                              uint64_t position, cps_home *home, int *error) {
    memset(home, 0, sizeof *home);
    home->io = io;
    home->handle = -1;
    if (ring_bytes > SIZE_MAX / 2) return CPS_NO_MEMORY; /* more than addresses go */
    size_t size = home_bytes(io, ring_bytes);
    uint8_t *mapping;
    enum cps_status status;
    if (directory != NULL) {
        status = name_path(home, directory, spool_id);
        if (status == CPS_OK) status = map_file(io, home, size, &mapping, error);
    } else {
        status = io->map_memory(io->context, size, &mapping, error);
        if (status == CPS_IO) status = CPS_NO_MEMORY;
    }
    if (status != CPS_OK) return status;
    home->in_file = directory != NULL;
    take_mapping(home, mapping, size);
    home->ring_bytes = ring_bytes;
    cps_shared *s = home->shared;
    CPS_ASSERT(atomic_is_lock_free(&s->magic)); /* see _shared.h.  no model: it asks about the platform, not the word */
    s->version = CPS_SHARED_VERSION;
    io->boot_id(io->context, s->boot_id);
    memcpy(s->spool_id, spool_id, 16);
    s->ring_bytes = ring_bytes;
    s->writer_pid = (uint32_t)getpid();
    cps_produced produced = {.published = position};
    cps_settled settled = {.head = position, .spilled = position};
    cps_shared_commit_produced(s, &produced);
    cps_shared_commit_settled(s, &settled);
    CPS_CRASH_POINT("home-filled");
    /* model: home.magic.store; release: after a kill it is not there without the rest of the page. */
    atomic_store_explicit(&s->magic, CPS_SHARED_MAGIC, memory_order_release);
    CPS_CRASH_POINT("home-made");
    return CPS_OK;
}

void cps_home_announce(cps_home *home, uint64_t current, uint64_t generation) {
    /* model: home.next.load; ours alone. */
    uint64_t next = atomic_load_explicit(&home->shared->next_generation, memory_order_relaxed);
    CPS_CRASH_POINT("announce-begin");
    /* The last take-over was killed, or failed, between saving and committing: it is the current one all the same. */
    if (next != 0 && next == current) {
        /* model: home.promote; there is nothing that must be there before it. */
        atomic_store_explicit(&home->shared->generation, next, memory_order_relaxed);
        CPS_CRASH_POINT("announce-promoted");
    }
    /* model: home.announce; release: after a kill it does not stand in the place of what was not promoted yet. */
    atomic_store_explicit(&home->shared->next_generation, generation, memory_order_release);
    CPS_CRASH_POINT("announce-done");
    home->shared->writer_pid = (uint32_t)getpid();
}

void cps_home_commit(cps_home *home, uint64_t generation) {
    CPS_CRASH_POINT("home-commit-begin");
    /* model: home.commit; the meta file was saved before it, by system calls. */
    atomic_store_explicit(&home->shared->generation, generation, memory_order_relaxed);
    CPS_CRASH_POINT("home-commit-half");
    /* model: home.committed; release: after a kill the announcement is not gone without what it announced. */
    atomic_store_explicit(&home->shared->next_generation, 0, memory_order_release);
    CPS_CRASH_POINT("home-commit-done");
}

void cps_home_close(cps_home *home, bool remove) {
    if (home->mapping == NULL) return;
    int ignored; /* a file that stays is recognised as stale by the next open */
    CPS_CRASH_POINT("home-close-begin");
    if (remove && home->in_file) (void)!home->io->remove(home->io->context, home->path, &ignored);
    CPS_CRASH_POINT("home-closed");
    home->io->unmap(home->io->context, home->mapping, home->mapping_bytes);
    home->mapping = NULL;
    if (home->handle >= 0) home->io->close(home->io->context, home->handle);
    home->handle = -1;
}
