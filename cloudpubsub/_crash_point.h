/* Places where a kill would be most awkward, each with a name.
 *
 * The test build defines CPS_CRASH_POINTS and kills its simulated machine at a chosen one, in whatever thread comes by;
 * everywhere else there is nothing here.  A name is a string literal, and used in one place of the source. */
#ifndef CPS_CRASH_POINT_H
#define CPS_CRASH_POINT_H

#ifdef CPS_CRASH_POINTS
void cps_crash_point(const char *name); /* from any thread, with any lock held; takes none of the core's */
#define CPS_CRASH_POINT(name) cps_crash_point(name)
#else
#define CPS_CRASH_POINT(name) ((void)0)
#endif

#endif
