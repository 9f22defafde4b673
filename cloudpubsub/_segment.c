/* One segment file: making, appending, sealing.  Reading and scanning are in _segment_read.c. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "_segment.h"

#include <inttypes.h>
#include <stdlib.h>

#include "_crash_point.h"
#include "_crc32c.h"
#include "_segment_bytes.h"

const uint8_t cps_segment_magic[8] = {'C', 'P', 'S', 'S', 'E', 'G', 'M', '1'};
const uint8_t cps_footer_magic[8] = {'C', 'P', 'S', 'F', 'O', 'O', 'T', '1'};

enum { CPS_DISK_BLOCK_BYTES = 4096 }; /* what file systems give out */

enum cps_status cps_segment_new(const cps_io *io, const char *directory, const char *name, cps_segment **out) {
    size_t path_bytes = strlen(directory) + 1 + strlen(name) + 1;
    if (path_bytes > CPS_PATH_MAX) return CPS_TOO_LARGE;
    cps_segment *segment = calloc(1, sizeof *segment + path_bytes);
    if (segment == NULL) return CPS_NO_MEMORY;
    char *at = mempcpy(segment->path, directory, strlen(directory));
    *at++ = '/';
    memcpy(at, name, strlen(name) + 1);
    segment->io = io;
    segment->handle = segment->read_handle = -1;
    *out = segment;
    return CPS_OK;
}

static void encode_header(const cps_segment *segment, const uint8_t spool_id[16],
                          uint8_t header[CPS_SEGMENT_HEADER_BYTES]) {
    const cps_io *io = segment->io;
    memset(header, 0, CPS_SEGMENT_HEADER_BYTES);
    memcpy(header, cps_segment_magic, 8);
    cps_store32(header + 8, CPS_SEGMENT_VERSION);
    cps_store32(header + 12, CPS_SEGMENT_HEADER_BYTES);
    memcpy(header + 16, spool_id, 16);
    io->boot_id(io->context, header + 32);
    cps_store32(header + 48, segment->epoch);
    cps_store32(header + 52, segment->serial);
    cps_store64(header + 56, segment->base);
    cps_store64(header + 64, io->wall_ms(io->context));
    cps_store64(header + 72, io->boottime_ms(io->context));
    cps_store32(header + 124, cps_crc32c(0, header, 124));
}

enum cps_status cps_segment_create(const cps_io *io, const char *directory, const cps_segment_identity *identity,
                                   uint64_t file_bytes, cps_segment **out, int *error) {
    CPS_ASSERT(file_bytes >= CPS_SEGMENT_BYTES_MIN);
    CPS_ASSERT(identity->base % CPS_RECORD_ALIGN == 0);
    char name[CPS_SEGMENT_NAME_BYTES];
    (void)snprintf(name, sizeof name, "%016" PRIx64 "-%08" PRIx32 "-%08" PRIx32 ".seg", identity->base,
                   identity->epoch, identity->serial);
    cps_segment *segment;
    enum cps_status status = cps_segment_new(io, directory, name, &segment);
    if (status != CPS_OK) return status;
    segment->base = segment->end = segment->synced_end = identity->base;
    segment->oldest_wall_ms = io->wall_ms(io->context);
    segment->unsynced_since_ms = io->monotonic_ms(io->context);
    segment->epoch = identity->epoch;
    segment->serial = identity->serial;
    segment->file_bytes = file_bytes;
    segment->capacity_bytes = file_bytes - CPS_SEGMENT_HEADER_BYTES - CPS_SEGMENT_FOOTER_BYTES;
    uint8_t header[CPS_SEGMENT_HEADER_BYTES];
    encode_header(segment, identity->spool_id, header);
    status = io->open(io->context, segment->path, CPS_IO_CREATE, &segment->handle, error);
    if (status != CPS_OK) {
        segment->handle = -1;
        cps_segment_close(segment);
        *out = NULL;
        return status;
    }
    CPS_CRASH_POINT("create-named");
    status = io->allocate(io->context, segment->handle, file_bytes, error);
    CPS_CRASH_POINT("create-allocated");
    if (status == CPS_OK) status = io->write(io->context, segment->handle, header, sizeof header, 0, error);
    CPS_CRASH_POINT("create-headed");
    *out = segment;
    if (status != CPS_OK && cps_segment_remove(segment) == CPS_OK) {
        cps_segment_close(segment);
        *out = NULL;
    }
    return status;
}

uint32_t cps_record_crc(const uint8_t *at, const cps_record *record, uint32_t segment_epoch) {
    if (!record->is_pad) return cps_crc32c(0, at + 4, record->length_bytes - 4);
    uint8_t known[16];
    cps_store32(known, cps_load32(at + 4));
    cps_store64(known + 4, record->position);
    cps_store32(known + 12, segment_epoch);
    return cps_crc32c(0, known, sizeof known);
}

void cps_segment_prepare(const cps_segment *segment, uint8_t *bytes, size_t size, uint64_t position,
                         uint64_t *messages, uint64_t *message_bytes) {
    *messages = 0;
    *message_bytes = 0;
    for (size_t at = 0; at < size;) {
        cps_record record;
        CPS_ASSERT(cps_record_load(bytes + at, size - at, position + at, &record) == CPS_OK); /* came from our ring */
        uint64_t span = cps_record_span(record.length_bytes);
        if (record.is_pad) {
            memset(bytes + at + CPS_RECORD_ALIGN, 0, (size_t)span - CPS_RECORD_ALIGN); /* no old bytes reach the disk */
        } else {
            *messages += 1;
            *message_bytes += span;
        }
        cps_store32(bytes + at, cps_record_crc(bytes + at, &record, segment->epoch));
        at += (size_t)span;
    }
}

/* Forgotten first, then closed: a child that is forked in between leaks a handle at worst, and closes no stranger's. */
static void shut_handle(const cps_io *io, int *handle) {
    int closing = *handle;
    *handle = -1;
    if (closing >= 0) io->close(io->context, closing);
}

/* After a failure nothing is written through the handle again. */
static enum cps_status poisoned(cps_segment *segment, enum cps_status status) {
    if (status == CPS_OK) return CPS_OK;
    segment->poison = status;
    shut_handle(segment->io, &segment->handle);
    return status;
}

enum cps_status cps_segment_append(cps_segment *segment, const uint8_t *bytes, size_t size) {
    if (segment->poison != CPS_OK) return segment->poison;
    CPS_ASSERT(cps_segment_has_room(segment, size));
    const cps_io *io = segment->io;
    uint64_t offset = CPS_SEGMENT_HEADER_BYTES + segment->end - segment->base;
    enum cps_status status = io->write(io->context, segment->handle, bytes, size, offset, &segment->error);
    int ignored; /* best effort: the next open tells the same records apart by their positions anyway */
    if (status != CPS_OK) (void)!io->truncate(io->context, segment->handle, offset, &ignored);
    return poisoned(segment, status);
}

enum cps_status cps_segment_sync(cps_segment *segment) {
    if (segment->poison != CPS_OK) return segment->poison;
    return poisoned(segment, segment->io->sync(segment->io->context, segment->handle, &segment->error));
}

uint64_t cps_segment_sealed_bytes(const cps_segment *segment) {
    uint64_t size = CPS_SEGMENT_HEADER_BYTES + (segment->end - segment->base) + CPS_SEGMENT_FOOTER_BYTES;
    return (size + CPS_DISK_BLOCK_BYTES - 1) / CPS_DISK_BLOCK_BYTES * CPS_DISK_BLOCK_BYTES;
}

static void encode_footer(const cps_segment *segment, uint8_t footer[CPS_SEGMENT_FOOTER_BYTES]) {
    memset(footer, 0, CPS_SEGMENT_FOOTER_BYTES);
    memcpy(footer, cps_footer_magic, 8);
    cps_store64(footer + 8, segment->base);
    cps_store64(footer + 16, segment->end);
    cps_store64(footer + 24, segment->messages);
    cps_store64(footer + 32, segment->message_bytes);
    cps_store32(footer + 40, segment->epoch);
    cps_store32(footer + 60, cps_crc32c(0, footer, 60));
}

/* Write [0, size) of the file over itself.  Another process wrote it, and a sync that failed there would go unnoticed here:
 * the kernel reports a write error once, and then calls the lost page clean. */
static CPS_MUST_CHECK enum cps_status write_again(cps_segment *segment, uint64_t size) {
    const cps_io *io = segment->io;
    uint8_t some[CPS_DISK_BLOCK_BYTES];
    for (uint64_t at = 0; at < size;) {
        size_t want = size - at < sizeof some ? (size_t)(size - at) : sizeof some, got;
        enum cps_status status = io->read(io->context, segment->handle, some, want, at, &got, &segment->error);
        if (status == CPS_OK && got == 0) break; /* shorter than it was: the reader will find out */
        if (status == CPS_OK) status = io->write(io->context, segment->handle, some, got, at, &segment->error);
        if (status != CPS_OK) return status;
        at += got;
    }
    return CPS_OK;
}

enum cps_status cps_segment_seal(cps_segment *segment, uint64_t *file_bytes) {
    const cps_io *io = segment->io;
    uint64_t data_end = CPS_SEGMENT_HEADER_BYTES + segment->end - segment->base;
    uint8_t footer[CPS_SEGMENT_FOOTER_BYTES];
    if (segment->poison != CPS_OK) return segment->poison;
    if (segment->handle < 0) { /* loaded after a crash and at rest */
        enum cps_status status =
            io->open(io->context, segment->path, CPS_IO_READ_WRITE, &segment->handle, &segment->error);
        if (status != CPS_OK) segment->handle = -1;
        if (status == CPS_OK) status = write_again(segment, data_end);
        CPS_CRASH_POINT("seal-rewritten");
        if (status != CPS_OK) return poisoned(segment, status);
    }
    enum cps_status status = cps_segment_sync(segment);
    if (status != CPS_OK) return status;
    CPS_CRASH_POINT("seal-synced");
    encode_footer(segment, footer);
    status = io->truncate(io->context, segment->handle, data_end, &segment->error); /* cuts torn bytes and spare room */
    CPS_CRASH_POINT("seal-cut");
    if (status == CPS_OK)
        status = io->write(io->context, segment->handle, footer, sizeof footer, data_end, &segment->error);
    CPS_CRASH_POINT("seal-footed");
    if (status == CPS_OK) status = io->sync(io->context, segment->handle, &segment->error);
    CPS_CRASH_POINT("seal-done");
    *file_bytes = cps_segment_sealed_bytes(segment);
    shut_handle(io, &segment->handle);
    return poisoned(segment, status);
}

void cps_segment_cut(cps_segment *segment) {
    const cps_io *io = segment->io;
    int handle, ignored; /* where it cannot be, the records are found again: duplicates, no loss */
    if (io->open(io->context, segment->path, CPS_IO_READ_WRITE, &handle, &ignored) != CPS_OK) return;
    (void)!io->truncate(io->context, handle, CPS_SEGMENT_HEADER_BYTES + segment->end - segment->base, &ignored);
    io->close(io->context, handle);
}

void cps_segment_rest(cps_segment *segment) {
    shut_handle(segment->io, &segment->read_handle);
}

enum cps_status cps_segment_remove(cps_segment *segment) {
    const cps_io *io = segment->io;
    cps_segment_rest(segment);
    shut_handle(io, &segment->handle);
    return io->remove(io->context, segment->path, &segment->error);
}

void cps_segment_close(cps_segment *segment) {
    cps_segment_rest(segment);
    shut_handle(segment->io, &segment->handle);
    free(segment);
}

enum cps_status cps_scratch_grow(cps_scratch *scratch, size_t size) {
    if (scratch->size >= size) return CPS_OK;
    uint8_t *bytes = realloc(scratch->bytes, size);
    if (bytes == NULL) return CPS_NO_MEMORY;
    scratch->bytes = bytes;
    scratch->size = size;
    return CPS_OK;
}

void cps_scratch_close(cps_scratch *scratch) {
    free(scratch->bytes);
    scratch->bytes = NULL;
    scratch->size = 0;
}
