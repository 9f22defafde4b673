/* Preloaded into a process under test: the wall clock jumps ten years back or forth, or stays, at every look.
 *
 * The clocks that no administrator can set (monotonic, boot time) are right.  A wait until a time of the wall clock lasts
 * as long as its caller meant: it is shifted back by what this thread was last told wrong.  (Python 3.10 waits so.) */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define TEN_YEARS (10L * 365 * 86400)
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static _Thread_local long told_wrong;

static long next_jump(void) {
    static _Atomic unsigned looks;
    told_wrong = ((long)(atomic_fetch_add(&looks, 1) * 2654435761u >> 16) % 3 - 1) * TEN_YEARS;
    return told_wrong;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int rc = REAL(clock_gettime)(clock, now);
    if (rc == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += next_jump();
    return rc;
}

#if defined(__GLIBC__) && __TIMESIZE == 32 /* what clock_gettime is called in code that was compiled for 64-bit times */
struct time64 {
    int64_t seconds;
    int32_t nanoseconds, pad;
};
int __clock_gettime64(clockid_t clock, struct time64 *now);
int __clock_gettime64(clockid_t clock, struct time64 *now) {
    int rc = REAL(__clock_gettime64)(clock, now);
    if (rc == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->seconds += next_jump();
    return rc;
}
#endif

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out != NULL) *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *now, void *zone) {
    int rc = REAL(gettimeofday)(now, zone);
    if (rc == 0) now->tv_sec += next_jump();
    return rc;
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    struct timespec right = *until;
    right.tv_sec -= told_wrong;
    return REAL(sem_timedwait)(semaphore, &right);
}
