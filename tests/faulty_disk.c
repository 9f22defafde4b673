/* Preloaded into a process under test: system calls on files fail on request.
 *
 * Everything below $FAULTY_BELOW/NAME answers to the control file $FAULTY_BELOW/NAME.fault, as long as that is there.  It
 * holds the calls that fail, and the errno, or the word `hang`: then they sleep until the file is gone (a minute at most,
 * for nobody else may end them), and go on as if nothing had been.  "pwrite,open 5"; "fdatasync hang".
 *
 *   open            files, for reading or writing
 *   pwrite          and ftruncate
 *   pread           and mmap, so that nothing can be read by any way
 *   fdatasync       and fsync
 *   posix_fallocate
 *   unlink
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Straight to the kernel: the functions of these names are ours. */
static int raw_open(const char *path, int flags, int mode) {
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

/* What the control file for `path` says; false if there is none. */
static int read_control(const char *path, char *text, size_t size) {
    const char *root = getenv("FAULTY_BELOW");
    size_t length = root != NULL ? strlen(root) : 0;
    if (length == 0 || strncmp(path, root, length) != 0 || path[length] != '/') return 0;
    const char *rest = strchr(path + length + 1, '/');
    char control[PATH_MAX];
    if (rest == NULL) return 0;
    if (snprintf(control, sizeof control, "%.*s.fault", (int)(rest - path), path) >= (int)sizeof control) return 0;
    int fd = raw_open(control, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0) return 0;
    ssize_t n = read(fd, text, size - 1);
    close(fd);
    text[n > 0 ? n : 0] = '\0';
    return n > 0;
}

/* The errno with which `call` on `path` is to fail; 0: it is not.  Sleeps while it is to hang. */
static int fault(const char *call, const char *path) {
    char text[256], calls[128], how[32];
    int saved = errno, asked = 0;
    for (int slept_ms = 0; slept_ms < 60000; slept_ms += 2) {
        asked = 0;
        if (!read_control(path, text, sizeof text)) break;
        if (sscanf(text, "%127s %31s", calls, how) != 2) break;
        for (char *rest = calls, *one; (one = strsep(&rest, ",")) != NULL;) asked |= strcmp(one, call) == 0;
        if (!asked || strcmp(how, "hang") != 0) break;
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    }
    errno = saved;
    return asked ? atoi(how) : 0;
}

static int fault_at(const char *call, int fd) {
    char link[64], path[PATH_MAX];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (n <= 0) return 0;
    path[n] = '\0';
    return fault(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_AS(error, result) \
    do {                       \
        int e_ = (error);      \
        if (e_ != 0) {         \
            errno = e_;        \
            return (result);   \
        }                      \
    } while (0)

#define OPEN(name)                                          \
    int name(const char *path, int flags, ...) {            \
        mode_t mode = 0;                                    \
        if (flags & (O_CREAT | O_TMPFILE)) {                \
            va_list rest;                                   \
            va_start(rest, flags);                          \
            mode = va_arg(rest, mode_t);                    \
            va_end(rest);                                   \
        }                                                   \
        FAIL_AS(fault("open", path), -1);                   \
        return raw_open(path, flags, (int)mode);            \
    }
OPEN(open)
OPEN(open64)

#define PWRITE(name, type)                                                  \
    ssize_t name(int fd, const void *bytes, size_t size, type offset) {     \
        FAIL_AS(fault_at("pwrite", fd), -1);                                \
        return REAL(name)(fd, bytes, size, offset);                         \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define PREAD(name, type)                                           \
    ssize_t name(int fd, void *bytes, size_t size, type offset) {   \
        FAIL_AS(fault_at("pread", fd), -1);                         \
        return REAL(name)(fd, bytes, size, offset);                 \
    }
PREAD(pread, off_t)
PREAD(pread64, off64_t)

#define MMAP(name, type)                                                                        \
    void *name(void *at, size_t size, int protection, int flags, int fd, type offset) {         \
        if (fd >= 0) FAIL_AS(fault_at("pread", fd), MAP_FAILED);                                \
        return REAL(name)(at, size, protection, flags, fd, offset);                             \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

#define TRUNCATE(name, type)                    \
    int name(int fd, type size) {               \
        FAIL_AS(fault_at("pwrite", fd), -1);    \
        return REAL(name)(fd, size);            \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define ALLOCATE(name, type)                            \
    int name(int fd, type from, type size) {            \
        int error = fault_at("posix_fallocate", fd);    \
        if (error != 0) return error;                   \
        return REAL(name)(fd, from, size);              \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

#define SYNC(name)                              \
    int name(int fd) {                          \
        FAIL_AS(fault_at("fdatasync", fd), -1); \
        return REAL(name)(fd);                  \
    }
SYNC(fdatasync)
SYNC(fsync)

int unlink(const char *path) {
    FAIL_AS(fault("unlink", path), -1);
    return REAL(unlink)(path);
}
