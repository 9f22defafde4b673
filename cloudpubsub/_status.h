/* Results of every function of the core that can fail.
 *
 * A status never carries a value and a value never carries a status: values leave through out-pointers.  Where the
 * operating system refused something, the errno is kept in the object that asked (see its header). */
#ifndef CPS_STATUS_H
#define CPS_STATUS_H

enum cps_status {
    CPS_OK = 0,
    CPS_FULL = -1,         /* no room now; room may come */
    CPS_EMPTY = -2,        /* nothing there now; more may come */
    CPS_TIMEOUT = -3,      /* the time limit passed first */
    CPS_TOO_LARGE = -4,    /* it can never fit */
    CPS_CLOSED = -5,       /* the object was closed, or is closing */
    CPS_LOCKED = -6,       /* another process, or another object of this one, owns it */
    CPS_DAMAGED = -7,      /* bytes from outside are not what the format says */
    CPS_IO = -8,           /* the operating system refused; see the errno beside it */
    CPS_NO_MEMORY = -9,    /* malloc or mmap refused */
    CPS_DROPPED = -10,     /* the drop policy took it; it is counted */
    CPS_UNKNOWN = -11,     /* no such packet id, position or name */
    CPS_BUSY = -12,        /* would have to wait, and the caller asked not to */
    CPS_FOREIGN = -13,     /* belongs to another client id */
};

#if defined(__GNUC__) || defined(__clang__)
#define CPS_MUST_CHECK __attribute__((warn_unused_result))
#define CPS_LIKELY(x) __builtin_expect(!!(x), 1)
#define CPS_UNLIKELY(x) __builtin_expect(!!(x), 0)
#else
#define CPS_MUST_CHECK
#define CPS_LIKELY(x) (x)
#define CPS_UNLIKELY(x) (x)
#endif

/* A broken invariant of our own ends the process before it can reach the disk.  Cheap, so it stays on in release
 * builds; never used on bytes that came from a file or a socket. */
#include <stdio.h>
#include <stdlib.h>
#define CPS_ASSERT(condition)                                                                                          \
    do {                                                                                                               \
        if (CPS_UNLIKELY(!(condition))) {                                                                              \
            fprintf(stderr, "cloudpubsub: broken invariant %s (%s:%d)\n", #condition, __FILE__, __LINE__);             \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#endif
