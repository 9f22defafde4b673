/* Kills at the points that the core names with CPS_CRASH_POINT: in one process, at one instruction of one thread.
 *
 * One log at a time is watched, in whatever thread it works.  Counting stops with the kill; so what a life does behind
 * it is not counted. */
#ifndef CPS_TEST_CRASH_H
#define CPS_TEST_CRASH_H

#include "io_sim.h"

/* Count from now on, from 0; at the `nth` time (1: the first) that `name` is reached, kill the machine of `s`.  Without a
 * name only count.  `name` is borrowed until the next call, or crash_stop. */
void crash_watch(sim *s, const char *name, uint64_t nth);
void crash_stop(void);
bool crash_happened(void); /* the kill, since crash_watch */

/* What was reached since crash_watch, in order of arrival: the name of the `index`th point (NULL: there are no more). */
const char *crash_name(unsigned index);
uint64_t crash_hits(unsigned index);

#endif
