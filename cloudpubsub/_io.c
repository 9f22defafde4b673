/* The real operating system behind _io.h: Linux, plain system calls. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
/* 64-bit offsets and times also where `long` has 32 bits; before glibc 2.34 the second does nothing there. */
#define _FILE_OFFSET_BITS 64
#define _TIME_BITS 64

#include "_io.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TMPFS_FILE_SYSTEM 0x01021994u
#define RAMFS_FILE_SYSTEM 0x858458f6u

_Static_assert(sizeof(off_t) == 8, "files of 2 GiB and more need 64-bit offsets");

static enum cps_status failed(int *error) {
    *error = errno;
    return CPS_IO;
}

static enum cps_status system_open(void *context, const char *path, enum cps_io_open how, int *handle, int *error) {
    (void)context;
    int flags = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK; /* a FIFO of that name must not hold us up; files do not care */
    switch (how) {
    case CPS_IO_READ: flags |= O_RDONLY; break;
    case CPS_IO_READ_WRITE: flags |= O_RDWR; break;
    case CPS_IO_CREATE: flags |= O_RDWR | O_CREAT | O_EXCL; break;
    case CPS_IO_ENSURE: flags |= O_RDWR | O_CREAT; break;
    }
    int fd;
    do fd = open(path, flags, 0600);
    while (fd < 0 && errno == EINTR);
    if (fd < 0) return failed(error);
    *handle = fd;
    return CPS_OK;
}

static void system_close(void *context, int handle) {
    (void)context;
    (void)close(handle); /* what matters was synced before; EINTR on Linux has closed it all the same */
}

static enum cps_status system_facts(void *context, int handle, cps_io_facts *out, int *error) {
    (void)context;
    struct stat st;
    struct statfs fs;
    if (fstat(handle, &st) != 0 || fstatfs(handle, &fs) != 0) return failed(error);
    out->size_bytes = (uint64_t)st.st_size;
    out->allocated_bytes = (uint64_t)st.st_blocks * 512;
    out->owner_uid = st.st_uid;
    out->mode = st.st_mode & 07777;
    out->is_regular = S_ISREG(st.st_mode);
    uint32_t type = (uint32_t)fs.f_type; /* signed, unsigned, of 32 or 64 bits: it differs */
    out->is_in_memory = type == TMPFS_FILE_SYSTEM || type == RAMFS_FILE_SYSTEM;
    return CPS_OK;
}

static enum cps_status system_read(void *context, int handle, void *bytes, size_t size, uint64_t offset, size_t *got,
                                   int *error) {
    (void)context;
    size_t done = 0;
    while (done < size) {
        ssize_t n = pread(handle, (uint8_t *)bytes + done, size - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return failed(error);
        if (n == 0) break;
        done += (size_t)n;
    }
    *got = done;
    return CPS_OK;
}

static enum cps_status system_write(void *context, int handle, const void *bytes, size_t size, uint64_t offset,
                                    int *error) {
    (void)context;
    size_t done = 0;
    while (done < size) {
        ssize_t n = pwrite(handle, (const uint8_t *)bytes + done, size - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return failed(error);
        if (n == 0) {
            *error = ENOSPC; /* POSIX leaves 0 for a regular file to devices that are full */
            return CPS_IO;
        }
        done += (size_t)n;
    }
    return CPS_OK;
}

static enum cps_status system_allocate(void *context, int handle, uint64_t size, int *error) {
    (void)context;
    int rc;
    do rc = posix_fallocate(handle, 0, (off_t)size);
    while (rc == EINTR);
    if (rc == 0) return CPS_OK;
    *error = rc; /* posix_fallocate returns the error and leaves errno alone */
    return CPS_IO;
}

static enum cps_status system_truncate(void *context, int handle, uint64_t size, int *error) {
    (void)context;
    int rc;
    do rc = ftruncate(handle, (off_t)size);
    while (rc != 0 && errno == EINTR);
    return rc == 0 ? CPS_OK : failed(error);
}

static enum cps_status system_sync(void *context, int handle, int *error) {
    (void)context;
    return fdatasync(handle) == 0 ? CPS_OK : failed(error); /* never retried: a second one may lie */
}

static enum cps_status system_sync_directory(void *context, const char *path, int *error) {
    (void)context;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return failed(error);
    enum cps_status status = fsync(fd) == 0 ? CPS_OK : failed(error);
    (void)close(fd);
    return status;
}

static enum cps_status system_make_directory(void *context, const char *path, int *error) {
    (void)context;
    return mkdir(path, 0700) == 0 || errno == EEXIST ? CPS_OK : failed(error);
}

static enum cps_status system_remove(void *context, const char *path, int *error) {
    (void)context;
    return unlink(path) == 0 || errno == ENOENT ? CPS_OK : failed(error);
}

static enum cps_status system_rename(void *context, const char *from, const char *to, int *error) {
    (void)context;
    return rename(from, to) == 0 ? CPS_OK : failed(error);
}

static enum cps_status system_list(void *context, const char *path, void (*each)(void *user, const char *name),
                                   void *user, int *error) {
    (void)context;
    DIR *directory = opendir(path);
    if (directory == NULL) return failed(error);
    enum cps_status status = CPS_OK;
    for (;;) {
        errno = 0; /* readdir tells its end and its errors apart by errno only */
        struct dirent *entry = readdir(directory);
        if (entry == NULL) {
            if (errno != 0) status = failed(error);
            break;
        }
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) each(user, entry->d_name);
    }
    (void)closedir(directory);
    return status;
}

static enum cps_status system_free_space(void *context, const char *path, uint64_t *bytes, int *error) {
    (void)context;
    struct statvfs st;
    if (statvfs(path, &st) != 0) return failed(error);
    *bytes = (uint64_t)st.f_bavail * st.f_frsize;
    return CPS_OK;
}

static enum cps_status system_lock(void *context, int handle, int *error) {
    (void)context;
    if (flock(handle, LOCK_EX | LOCK_NB) == 0) return CPS_OK;
    *error = errno;
    return errno == EWOULDBLOCK ? CPS_LOCKED : CPS_IO;
}

static size_t system_page_bytes(void *context) {
    (void)context;
    return (size_t)sysconf(_SC_PAGESIZE);
}

static enum cps_status finish_map(void *memory, size_t size, uint8_t **bytes, int *error) {
    if (memory == MAP_FAILED) return failed(error);
    if (madvise(memory, size, MADV_DONTFORK) != 0) {
        enum cps_status status = failed(error);
        (void)munmap(memory, size);
        return status;
    }
    *bytes = memory;
    return CPS_OK;
}

static enum cps_status system_map(void *context, int handle, size_t size, uint8_t **bytes, int *error) {
    (void)context;
    return finish_map(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0), size, bytes, error);
}

static enum cps_status system_map_memory(void *context, size_t size, uint8_t **bytes, int *error) {
    (void)context;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return finish_map(memory, size, bytes, error);
}

static void system_unmap(void *context, uint8_t *bytes, size_t size) {
    (void)context;
    (void)munmap(bytes, size);
}

static uint64_t clock_ms(clockid_t clock) {
    struct timespec now = {0};
    (void)clock_gettime(clock, &now); /* fails only where the wall clock has passed the end of a 32-bit time_t */
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static uint64_t system_monotonic_ms(void *context) {
    (void)context;
    return clock_ms(CLOCK_MONOTONIC);
}

static bool system_wait_until(void *context, pthread_cond_t *condition, pthread_mutex_t *lock, uint64_t deadline_ms) {
    (void)context;
    if (deadline_ms / 1000 > INT32_MAX) deadline_ms = (uint64_t)INT32_MAX * 1000; /* 68 years of uptime fit any time_t */
    struct timespec until = {.tv_sec = (time_t)(deadline_ms / 1000), .tv_nsec = (long)(deadline_ms % 1000) * 1000000};
    return pthread_cond_timedwait(condition, lock, &until) != ETIMEDOUT;
}

static uint64_t system_tick_ms(void *context) {
    (void)context;
    return clock_ms(CLOCK_MONOTONIC_COARSE);
}

static uint64_t system_boottime_ms(void *context) {
    (void)context;
    return clock_ms(CLOCK_BOOTTIME);
}

static uint64_t system_wall_ms(void *context) {
    (void)context;
#ifdef SYS_clock_gettime64 /* 32 bit: a time_t of that size ends in 2038, a date that a lost clock may show today */
    struct { int64_t tv_sec, tv_nsec; } now;
    if (sizeof(time_t) < 8 && syscall(SYS_clock_gettime64, CLOCK_REALTIME, &now) == 0)
        return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
#endif
    return clock_ms(CLOCK_REALTIME);
}

static int hex_value(uint8_t c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return -1;
}

static void system_boot_id(void *context, uint8_t id[16]) {
    (void)context;
    uint8_t text[64];
    memset(id, 0, 16);
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    ssize_t n = read(fd, text, sizeof text);
    (void)close(fd);
    size_t digit = 0;
    for (ssize_t i = 0; i < n && digit < 32; i++) {
        int value = hex_value(text[i]);
        if (value < 0) continue; /* the dashes */
        id[digit / 2] = (uint8_t)(id[digit / 2] << 4 | value);
        digit++;
    }
}

static void system_random(void *context, void *bytes, size_t size) {
    (void)context;
    size_t done = 0;
    while (done < size) {
        ssize_t n = getrandom((uint8_t *)bytes + done, size - done, 0);
        if (n > 0) done += (size_t)n;
        else CPS_ASSERT(errno == EINTR); /* the kernel's pool cannot fail otherwise */
    }
}

static const cps_io system_io = {
    .open = system_open,
    .close = system_close,
    .facts = system_facts,
    .read = system_read,
    .write = system_write,
    .allocate = system_allocate,
    .truncate = system_truncate,
    .sync = system_sync,
    .sync_directory = system_sync_directory,
    .make_directory = system_make_directory,
    .remove = system_remove,
    .rename = system_rename,
    .list = system_list,
    .free_space = system_free_space,
    .lock = system_lock,
    .page_bytes = system_page_bytes,
    .map = system_map,
    .map_memory = system_map_memory,
    .unmap = system_unmap,
    .monotonic_ms = system_monotonic_ms,
    .wait_until = system_wait_until,
    .tick_ms = system_tick_ms,
    .boottime_ms = system_boottime_ms,
    .wall_ms = system_wall_ms,
    .boot_id = system_boot_id,
    .random = system_random,
};

const cps_io *cps_io_system(void) { return &system_io; }
