/* The memory home of the log: a byte ring of records, many producers, readers that pin.
 *
 * A record at position p lies at offset p modulo the size, a power of two; it never wraps: the rest before the end is
 * filled with a pad.  Positions are 64-bit offsets that stay below 2^63 and are never reset.
 *
 * Threads: `cps_ring_push` and `cps_ring_refuse` from any number of threads (one lock inside covers claim, copy and
 * commit, so a returned position is always covered by `published`).  Everything under "readers" must be serialised by
 * the caller, the log, under its own lock; only the bytes of a pinned range may be read without it.  A pin keeps its
 * range from being overwritten; it is held for a copy, never across a wait for a file or a socket.
 * Ownership: the memory and the shared page are the caller's and outlive the ring.
 * Never: touches files, calls back, allocates after open, or waits (but for its own short lock). */
#ifndef CPS_RING_H
#define CPS_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "_record.h"
#include "_shared.h"
#include "_status.h"

typedef struct cps_ring cps_ring;

enum { CPS_RING_PINS = 3, CPS_RING_BYTES_MIN = 128, CPS_RING_RECORD_SHARE = 4 };

enum cps_ring_waker { CPS_WAKE_FLUSHER, CPS_WAKE_READER, CPS_RING_WAKERS };

typedef struct cps_message { /* what a producer publishes; borrowed for the call */
    const uint8_t *topic;
    const uint8_t *payload;
    const uint8_t *userdata;
    uint32_t payload_bytes;
    uint16_t topic_bytes;
    uint16_t userdata_bytes;
    uint16_t properties_bytes; /* with CPS_RECORD_EXTRAS */
    uint8_t flags;
    const uint8_t *properties; /* with CPS_RECORD_EXTRAS: MQTT 5 properties as they are sent, without their length */
    uint64_t ttl_ms;           /* with CPS_RECORD_EXTRAS: at most CPS_RECORD_TTL_MAX; 0: lives for ever */
    uint64_t stamp_ms;
} cps_message;

/* Length of the record that will hold it. */
static inline uint64_t cps_message_length(const cps_message *m) {
    uint64_t extras = m->flags & CPS_RECORD_EXTRAS ? (uint64_t)CPS_RECORD_EXTRAS_BYTES + m->properties_bytes : 0;
    return cps_record_length(m->topic_bytes, m->payload_bytes, m->userdata_bytes) + extras;
}

/* A ring over `memory` of `ring_bytes` (a power of two, at least CPS_RING_BYTES_MIN) that already holds
 * [low, produced.published); both are multiples of 8 and equal for an empty ring.
 * CPS_OK, CPS_NO_MEMORY. */
CPS_MUST_CHECK enum cps_status cps_ring_open(uint8_t *memory, uint64_t ring_bytes, cps_shared *shared, uint32_t epoch,
                                             uint64_t low, cps_ring **out);
void cps_ring_close(cps_ring *ring);

/* Largest record, in bytes of span, that a ring of this size takes. */
uint64_t cps_ring_record_max(uint64_t ring_bytes);

/* ---- producers ---- */

/* Append one record.  `*position` is its first byte.  `*wake` gets a bit (1 << enum cps_ring_waker) for each armed
 * waker whose threshold was reached; the caller must then wake it.  Waits at most for another producer's copy; with
 * `try_only` not even that.
 * CPS_OK; CPS_FULL; CPS_BUSY (only with try_only); CPS_TOO_LARGE; CPS_CLOSED. */
CPS_MUST_CHECK enum cps_status cps_ring_push(cps_ring *ring, const cps_message *message, bool try_only,
                                             uint64_t *position, unsigned *wake);

/* No position at or above `limit` may be issued; to begin with there is no limit.  Pushes return CPS_FULL. */
void cps_ring_bound(cps_ring *ring, uint64_t limit);

/* Count a message that is published and dropped in the same moment (policy drop_newest); it gets no bytes. */
void cps_ring_refuse(cps_ring *ring, const cps_message *message, cps_produced *after);

/* More messages turned up on the disk than were known to be published (only after a crash that took the ring along, and
 * damage): count them as published. */
void cps_ring_correct(cps_ring *ring, uint64_t messages, uint64_t bytes);

/* After this every push returns CPS_CLOSED; returns when none is in progress. */
void cps_ring_shut(cps_ring *ring);

/* Wake `waker` when `published` passes `threshold`.  False: it has passed it already, nothing is armed. */
bool cps_ring_arm(cps_ring *ring, enum cps_ring_waker waker, uint64_t threshold);

/* ---- readers (serialised by the caller) ---- */

uint64_t cps_ring_published(const cps_ring *ring); /* any thread, no lock */
uint64_t cps_ring_low(const cps_ring *ring);       /* lowest position still held */

/* The longest contiguous run of whole records that starts at `position`, in [low, published], or in what a pin still
 * holds.  CPS_EMPTY at the end. */
CPS_MUST_CHECK enum cps_status cps_ring_view(const cps_ring *ring, uint64_t position, const uint8_t **bytes,
                                             size_t *size);

void cps_ring_pin(cps_ring *ring, unsigned pin, uint64_t position);
void cps_ring_unpin(cps_ring *ring, unsigned pin);

/* Everything before `limit` is no longer needed; space comes free up to there or the lowest pin.  Monotone. */
void cps_ring_release(cps_ring *ring, uint64_t limit);

/* True if a record of `span` bytes would find room now. */
bool cps_ring_has_room(const cps_ring *ring, uint64_t span);

/* True if it may have the next position.  Bounds are set by the caller too. */
bool cps_ring_may_issue(const cps_ring *ring, uint64_t span);

/* Abort unless the invariants hold and [low, published) is a chain of whole records. */
void cps_ring_check(cps_ring *ring);

#endif
