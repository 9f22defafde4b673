/* The ordered set of segments; see the header. */
#include "_store.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef struct names {
    char (*name)[CPS_SEGMENT_NAME_BYTES];
    size_t count;
    size_t room;
    bool failed;
} names;

static void collect(void *user, const char *name) {
    names *list = user;
    size_t length = strlen(name);
    if (length < 4 || length >= CPS_SEGMENT_NAME_BYTES || strcmp(name + length - 4, ".seg") != 0) return;
    if (list->count == list->room) {
        size_t room = list->room ? 2 * list->room : 64;
        void *grown = realloc(list->name, room * sizeof *list->name);
        if (grown == NULL) {
            list->failed = true;
            return;
        }
        list->name = grown;
        list->room = room;
    }
    memcpy(list->name[list->count++], name, length + 1);
}

static int by_name(const void *a, const void *b) { return strcmp(a, b); }

/* A file that is not used: nothing may find it in the log again. */
static void set_aside(cps_quarantine *quarantine, cps_segment *segment) {
    int ignored; /* where it stays, the next open finds it, and the same again */
    (void)!cps_quarantine_move(quarantine, segment->path, segment->file_bytes, &ignored);
    cps_segment_close(segment);
}

static bool is_later(const cps_segment *a, const cps_segment *b) {
    return a->epoch > b->epoch || (a->epoch == b->epoch && a->serial > b->serial);
}

/* The segment that was loaded last reaches into `next`.  Positions are never issued twice, so both hold the same records
 * there: one is a second try after a failed write or sync, or a copy made by hand.  What was written later counts: what
 * the failed file holds behind the last good sync was never promised, and may be half there; but a record that is whole
 * there, and damaged in the later file, is the record.  False in `*keep`: `next` brings nothing new. */
static CPS_MUST_CHECK enum cps_status untangle(cps_store *store, cps_segment *next, cps_scratch *scratch,
                                               cps_quarantine *quarantine, bool *keep, int *error) {
    cps_segment *last = store->last;
    enum cps_status status;
    *keep = is_later(next, last) || (next->end > last->end && !is_later(last, next));
    if (!*keep) {
        cps_store_take(store, last); /* its counts may change */
        status = cps_segment_mend(last, next, scratch, error);
        cps_store_add(store, last);
        return status == CPS_NO_MEMORY ? status : CPS_OK;
    }
    status = cps_segment_mend(next, last, scratch, error);
    if (status == CPS_NO_MEMORY) return status;
    status = CPS_OK;
    cps_store_take(store, last);
    if (next->base > last->base) status = cps_segment_trim(last, next->base, scratch, error);
    if (status == CPS_OK && next->base > last->base && last->end > last->base) cps_store_add(store, last);
    else set_aside(quarantine, last);
    return status;
}

static CPS_MUST_CHECK bool path_of(const cps_store *store, const char *name, char out[CPS_PATH_MAX]) {
    int n = snprintf(out, CPS_PATH_MAX, "%s/%s", store->directory, name);
    return n > 0 && n < CPS_PATH_MAX;
}

static uint64_t size_of(const cps_store *store, const char *path) {
    const cps_io *io = store->io;
    cps_io_facts facts = {0};
    int handle, ignored; /* what cannot be opened has no size that anybody could know */
    if (io->open(io->context, path, CPS_IO_READ, &handle, &ignored) != CPS_OK) return 0;
    if (io->facts(io->context, handle, &facts, &ignored) != CPS_OK) facts.allocated_bytes = 0;
    io->close(io->context, handle);
    return facts.allocated_bytes;
}

/* Load one file and hang it behind the others.  Names sort by position, so order is right already. */
static CPS_MUST_CHECK enum cps_status load(cps_store *store, const char *name, const uint8_t spool_id[16],
                                           cps_scratch *scratch, cps_quarantine *quarantine, cps_recovery *recovery,
                                           bool is_last, int *error) {
    cps_segment *segment;
    char path[CPS_PATH_MAX];
    uint64_t torn = recovery->scan.torn_bytes;
    enum cps_status status =
        cps_segment_load(store->io, store->directory, name, spool_id, scratch, &segment, &recovery->scan, error);
    if (status == CPS_NO_MEMORY) return status;
    if (status == CPS_EMPTY && recovery->scan.torn_bytes == torn) return CPS_OK;
    if (status == CPS_EMPTY && is_last) {
        /* Nothing valid follows, so this is not damage: it is the end of the log, cut off in its first write. */
        if (path_of(store, name, path)) (void)!store->io->remove(store->io->context, path, error);
        return CPS_OK;
    }
    bool passes = *error == EMFILE || *error == ENFILE || *error == ENOMEM;
    if (status == CPS_IO && passes) return status; /* passed over, it would count as settled when it can be read again */
    if (status != CPS_OK) {
        recovery->unreadable++;
        /* Not what belongs to another spool; that is somebody else's to move. */
        if (status != CPS_UNKNOWN && path_of(store, name, path))
            (void)!cps_quarantine_move(quarantine, path, size_of(store, path), error);
        return CPS_OK;
    }
    bool keep = true;
    if (store->last != NULL && segment->base < store->last->end) {
        recovery->overlapping++;
        status = untangle(store, segment, scratch, quarantine, &keep, error);
    }
    if (status == CPS_OK && !keep) {
        set_aside(quarantine, segment);
        return CPS_OK;
    }
    if (status != CPS_OK) {
        cps_segment_close(segment);
        return status;
    }
    cps_store_add(store, segment);
    return CPS_OK;
}

static CPS_MUST_CHECK enum cps_status list_names(const cps_io *io, const char *directory, names *list, int *error) {
    memset(list, 0, sizeof *list);
    enum cps_status status = io->list(io->context, directory, collect, list, error);
    if (status == CPS_OK && list->failed) status = CPS_NO_MEMORY;
    if (list->count > 1) qsort(list->name, list->count, sizeof *list->name, by_name);
    return status;
}

enum cps_status cps_store_recover(cps_store *store, const cps_io *io, const char *directory,
                                  const uint8_t spool_id[16], cps_quarantine *quarantine, cps_recovery *recovery,
                                  int *error) {
    memset(store, 0, sizeof *store);
    memset(recovery, 0, sizeof *recovery);
    store->io = io;
    size_t length = strlen(directory);
    if (length >= sizeof store->directory) return CPS_TOO_LARGE;
    memcpy(store->directory, directory, length + 1);
    names list;
    enum cps_status status = list_names(io, directory, &list, error);
    cps_scratch scratch = {0};
    for (size_t i = 0; status == CPS_OK && i < list.count; i++)
        status =
            load(store, list.name[i], spool_id, &scratch, quarantine, recovery, i + 1 == list.count, error);
    recovery->segments = store->segments;
    cps_scratch_close(&scratch);
    free(list.name);
    if (status != CPS_OK) cps_store_close(store);
    return status;
}

bool cps_store_identify(const cps_io *io, const char *directory, uint8_t spool_id[16], uint32_t *epoch) {
    names list;
    int ignored; /* a folder that cannot be listed is reported by cps_store_recover */
    bool known = false;
    size_t lead = 0; /* most files decide (the majority vote of Boyer and Moore): a stray one may lie among them */
    uint8_t id[16];
    uint32_t found;
    if (list_names(io, directory, &list, &ignored) == CPS_OK) {
        for (size_t i = 0; i < list.count; i++) {
            if (!cps_segment_identify(io, directory, list.name[i], id, &found)) continue;
            if (lead == 0) memcpy(spool_id, id, sizeof id);
            if (memcmp(spool_id, id, sizeof id) == 0) lead++;
            else lead--;
            known = true;
        }
        for (size_t i = 0; known && i < list.count; i++) /* what a stray one says of epochs means nothing here */
            if (cps_segment_identify(io, directory, list.name[i], id, &found) && memcmp(spool_id, id, sizeof id) == 0 &&
                found > *epoch && found < CPS_LAST_EPOCH_MAX)
                *epoch = found;
    }
    free(list.name);
    return known;
}

void cps_store_add(cps_store *store, cps_segment *segment) {
    CPS_ASSERT(segment->next == NULL);
    if (store->last != NULL) store->last->next = segment;
    else store->first = segment;
    store->last = segment;
    if (store->unsealed == NULL) store->unsealed = segment;
    store->segments++;
    store->file_bytes += segment->file_bytes;
    store->messages += segment->messages;
}

void cps_store_take(cps_store *store, cps_segment *segment) {
    cps_segment **link = &store->first;
    cps_segment *before = NULL;
    while (*link != segment) {
        CPS_ASSERT(*link != NULL);
        before = *link;
        link = &before->next;
    }
    *link = segment->next;
    if (store->last == segment) store->last = before;
    if (store->unsealed == segment) store->unsealed = segment->next;
    segment->next = NULL;
    store->segments--;
    store->file_bytes -= segment->file_bytes;
    store->messages -= segment->messages;
}

void cps_store_resize(cps_store *store, cps_segment *segment, uint64_t file_bytes) {
    store->file_bytes += file_bytes - segment->file_bytes; /* unsigned arithmetic wraps back when it shrinks */
    segment->file_bytes = file_bytes;
}

cps_segment *cps_store_find(const cps_store *store, uint64_t position) {
    cps_segment *segment = store->first;
    while (segment != NULL && segment->end <= position) segment = segment->next;
    return segment;
}

cps_segment *cps_store_unsealed(cps_store *store) {
    while (store->unsealed != NULL && (store->unsealed->sealed || store->unsealed->poison != CPS_OK))
        store->unsealed = store->unsealed->next;
    return store->unsealed;
}

void cps_store_close(cps_store *store) {
    while (store->first != NULL) {
        cps_segment *segment = store->first;
        cps_store_take(store, segment);
        cps_segment_close(segment);
    }
}

void cps_store_check(const cps_store *store) {
    uint64_t segments = 0, file_bytes = 0, messages = 0;
    const cps_segment *before = NULL;
    for (const cps_segment *s = store->first; s != NULL; s = s->next) {
        CPS_ASSERT(s->base <= s->end);
        CPS_ASSERT(before == NULL || before->base < s->base);
        CPS_ASSERT(!s->retired);
        segments++;
        file_bytes += s->file_bytes;
        messages += s->messages;
        before = s;
    }
    CPS_ASSERT(before == store->last);
    CPS_ASSERT(segments == store->segments);
    CPS_ASSERT(file_bytes == store->file_bytes);
    CPS_ASSERT(messages == store->messages);
}
