/* Every state of a small ring against a plain model: a map of which bytes are taken. */
#ifndef CPS_TEST_EXHAUST_H
#define CPS_TEST_EXHAUST_H

#include "_ring.h"

/* For each place of the oldest byte and each fill: a push of each length, without a pin, and with a pin at each place
 * after everything was released.  `every_length`: all of them with each pin, else the shortest, some and the longest.
 * Returns NULL, or what was wrong (a literal).  `*states` is how many pushes were tried. */
const char *exhaust_ring(uint64_t ring_bytes, uint64_t base, bool every_length, uint64_t *states);

#endif
