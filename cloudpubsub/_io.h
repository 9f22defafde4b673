/* Every operating-system call of the core, behind one table.
 *
 * The ring, the segments and the log reach files, mappings and clocks through a `const cps_io *` that they are given at
 * open, so that a test build can inject faults and cut the power at any call.  Nothing else in the core includes
 * <sys/mman.h> or <fcntl.h>.
 *
 * Threads: the functions of `cps_io_system()` may be called from any thread.  Ownership: a handle is owned by whoever
 * opened it.  Errors: CPS_IO with the errno in `*error` (never NULL); no function raises a signal.  None retries for
 * ever: EINTR is retried, a short write is continued.  None of them allocates. */
#ifndef CPS_IO_H
#define CPS_IO_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "_status.h"

enum cps_io_open {
    CPS_IO_READ,       /* an existing file, read only */
    CPS_IO_READ_WRITE, /* an existing file */
    CPS_IO_CREATE,     /* a new file, mode 0600; EEXIST if it is there */
    CPS_IO_ENSURE,     /* an existing file, or a new one */
};

typedef struct cps_io_facts { /* of an open file */
    uint64_t size_bytes;
    uint64_t allocated_bytes;
    uint32_t owner_uid;
    uint32_t mode;     /* permission bits */
    bool is_regular;   /* a plain file, not a directory, link or device */
    bool is_in_memory; /* lies on tmpfs or ramfs */
} cps_io_facts;

typedef struct cps_io cps_io;
struct cps_io {
    void *context; /* first argument of every call; the system's own ignores it */

    /* Open `name`; symbolic links are refused; closed on exec. */
    enum cps_status (*open)(void *context, const char *path, enum cps_io_open how, int *handle, int *error);
    void (*close)(void *context, int handle);
    enum cps_status (*facts)(void *context, int handle, cps_io_facts *out, int *error);
    /* Read up to `size` bytes; `*got` is less only at the end of the file. */
    enum cps_status (*read)(void *context, int handle, void *bytes, size_t size, uint64_t offset, size_t *got,
                            int *error);
    /* Write all `size` bytes or fail; after a failure any part may be there. */
    enum cps_status (*write)(void *context, int handle, const void *bytes, size_t size, uint64_t offset, int *error);
    /* Reserve real blocks for [0, size), as zeros, so that writing there cannot meet a full disk. */
    enum cps_status (*allocate)(void *context, int handle, uint64_t size, int *error);
    enum cps_status (*truncate)(void *context, int handle, uint64_t size, int *error);
    /* Until data and size are on stable storage (fdatasync). */
    enum cps_status (*sync)(void *context, int handle, int *error);
    /* Make creations, renames and removals in a directory durable. */
    enum cps_status (*sync_directory)(void *context, const char *path, int *error);
    enum cps_status (*make_directory)(void *context, const char *path, int *error); /* 0700; CPS_OK if it is there */
    enum cps_status (*remove)(void *context, const char *path, int *error); /* CPS_OK also if it is not there */
    enum cps_status (*rename)(void *context, const char *from, const char *to, int *error);
    /* Call `each` once for every name in a directory but `.` and `..`, in no order; it may not change the directory. */
    enum cps_status (*list)(void *context, const char *path, void (*each)(void *user, const char *name), void *user,
                            int *error);
    /* Free bytes for unprivileged users on the file system of `path`. */
    enum cps_status (*free_space)(void *context, const char *path, uint64_t *bytes, int *error);
    /* Take an exclusive lock that ends with the handle or the process; CPS_LOCKED if another handle has it. */
    enum cps_status (*lock)(void *context, int handle, int *error);

    /* Of this machine: 4 KiB, on ARM also 16 or 64 KiB.  A power of two. */
    size_t (*page_bytes)(void *context);
    /* Map [0, size) of a file, shared, writable, not inherited by fork: the ring's home in tmpfs.  `size` here and below is
     * a multiple of the page. */
    enum cps_status (*map)(void *context, int handle, size_t size, uint8_t **bytes, int *error);
    /* Anonymous zeroed memory, not inherited by fork. */
    enum cps_status (*map_memory)(void *context, size_t size, uint8_t **bytes, int *error);
    void (*unmap)(void *context, uint8_t *bytes, size_t size);

    uint64_t (*monotonic_ms)(void *context); /* for time limits; stops while the machine sleeps */
    uint64_t (*tick_ms)(void *context);      /* the same, a few milliseconds late and five times cheaper */
    uint64_t (*boottime_ms)(void *context);  /* for age; goes on while the machine sleeps */
    uint64_t (*wall_ms)(void *context);      /* since 1970; may jump; only ever shown, never compared */
    /* Wait on a condition, made with CLOCK_MONOTONIC, whose `lock` is held.  False: `monotonic_ms` has passed
     * `deadline_ms`.  May return true for no reason, as every wait on a condition may. */
    bool (*wait_until)(void *context, pthread_cond_t *condition, pthread_mutex_t *lock, uint64_t deadline_ms);
    void (*boot_id)(void *context, uint8_t id[16]); /* zeros where the system has none */
    void (*random)(void *context, void *bytes, size_t size);
};

/* The real operating system. */
const cps_io *cps_io_system(void);

/* The multiple of the page size that is at least `size`. */
static inline size_t cps_io_round_to_page(const cps_io *io, size_t size) {
    size_t page = io->page_bytes(io->context);
    return (size + page - 1) & ~(page - 1);
}

#endif
