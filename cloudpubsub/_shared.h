/* Cursors, counters and losses, in front of the ring.
 *
 * In a tmpfs file it outlives the process: after a kill it says exactly which bytes of the ring are records, and any
 * other process can watch it read-only.  Otherwise it is plain memory.
 *
 * Two sides write it, each under its own lock: producers commit `cps_produced` (ring lock), readers and flusher commit
 * `cps_settled` (log lock).  What belongs together is committed together: a side writes the slot that is not current,
 * then makes it current with one store.  A kill between any two instructions leaves the old or the new state, never a
 * mixture, and a watcher that saw the sequence move reads again. */
#ifndef CPS_SHARED_H
#define CPS_SHARED_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "_crash_point.h"
#include "_ledger.h"

#define CPS_SHARED_MAGIC 0x31474e4952535043ull /* "CPSRING1" */
enum { CPS_SHARED_BYTES = 8192, CPS_SHARED_VERSION = 3, CPS_VICTIMS = 4, CPS_AHEAD_MAX = 6 };

typedef struct cps_produced { /* by producers; bytes are record spans, as in positions */
    uint64_t published;       /* cursor: everything before it is committed */
    uint64_t messages;        /* ever published in the life of the spool, refused ones (drop_newest) included */
    uint64_t bytes;
    uint64_t refused;         /* of these, refused storage and never given bytes in the log */
    uint64_t refused_bytes;
} cps_produced;

typedef struct cps_ahead { /* a range of positions that was settled ahead of the head */
    uint64_t first;        /* everything in [first, end) is settled */
    uint64_t end;
    uint64_t sent; /* [end, sent) was handed to a connection */
} cps_ahead;

typedef struct cps_settled { /* by readers and the flusher */
    uint64_t head;           /* cursor: everything before it is settled */
    uint64_t spilled;        /* cursor: everything before it is in a segment, or settled */
    uint64_t sent_max;       /* highest position that was ever handed to a connection */
    uint64_t acked_messages;
    uint64_t acked_bytes;
    uint64_t dropped_messages;
    uint64_t dropped_bytes;
    uint64_t dead_messages;
    uint64_t dead_bytes;
    uint64_t victims[CPS_VICTIMS]; /* base + 1 of dropped segments whose files may still be there; 0: none */
    uint64_t ahead_count;
    cps_ahead ahead[CPS_AHEAD_MAX]; /* rising, disjoint, all behind `head`; what is behind `ahead_count` means nothing */
} cps_settled;

enum { CPS_OUTLOOK_STORAGE = 0xff, CPS_OUTLOOK_LINK = 0xff00, CPS_OUTLOOK_ERROR_SHIFT = 16 };

enum {
    CPS_PRODUCED_WORDS = sizeof(cps_produced) / 8,
    CPS_SETTLED_WORDS = sizeof(cps_settled) / 8,
    CPS_AHEAD_WORDS = sizeof(cps_ahead) / 8,
    CPS_SETTLED_PLAIN_WORDS = CPS_SETTLED_WORDS - CPS_AHEAD_MAX * CPS_AHEAD_WORDS, /* before the ranges */
};

typedef struct cps_shared {
    _Atomic uint64_t magic; /* stored last when a home is made */
    uint32_t version;
    uint32_t writer_pid; /* shown to people, never used for locking */
    uint8_t boot_id[16];
    uint8_t spool_id[16];
    uint64_t ring_bytes;
    _Atomic uint64_t generation;      /* of the open that the ring belongs to; see _home.h */
    _Atomic uint64_t next_generation; /* of an open that is taking it over */
    _Alignas(64) _Atomic uint32_t produced_sequence; /* of each slot, see cps_shared_put */
    _Atomic uint64_t produced[2][CPS_PRODUCED_WORDS];
    _Alignas(64) _Atomic uint32_t settled_sequence;
    _Atomic uint64_t settled[2][CPS_SETTLED_WORDS];
    /* Committed after the counters; an open that finds less in it than they say enters the rest. */
    _Alignas(64) _Atomic uint32_t ledger_sequence;
    _Atomic uint64_t ledger[2][CPS_LEDGER_WORDS];
    /* How storage and link are, for watchers: nothing depends on it.  A single word needs no slots.  Bits 0-7: 1 + enum
     * cps_storage; 8-15: the link, 1 down, 2 up; 16-31: errno of the storage's last failure.  0: never told. */
    _Alignas(64) _Atomic uint32_t outlook;
} cps_shared;

/* Cursors and counters are 64 bits everywhere, and a word must not be seen half written: by another process, or after a
 * kill between its halves.  ARMv7 has an instruction for it (LDREXD).  1, for ARMv6: libatomic asks the kernel for it, and
 * cps_home_make asserts that it does. */
_Static_assert(ATOMIC_LLONG_LOCK_FREE >= 1 && sizeof(_Atomic uint64_t) == 8, "64-bit words must be lock-free");
_Static_assert(ATOMIC_INT_LOCK_FREE == 2 && sizeof(_Atomic uint32_t) == 4, "32-bit words must be lock-free");
_Static_assert(sizeof(cps_shared) <= CPS_SHARED_BYTES, "the page of cursors has outgrown its place");

/* `used`: of the words of a slot, what is in use; what stands behind it means nothing. */
static inline void cps_shared_put(_Atomic uint32_t *sequence, _Atomic uint64_t *slots, unsigned words,
                                  const uint64_t *from, unsigned used) {
    /* model: page.own; one writer at a time, under a lock: it is our side's last store, whatever the order. */
    uint32_t now = atomic_load_explicit(sequence, memory_order_relaxed) + 1;
    _Atomic uint64_t *slot = slots + (now & 1) * words;
    for (unsigned i = 0; i < used; i++) {
        /* model: page.slot.put; pairs with page.slot.get: who sees one of these words sees the sequence that stood before
         * it too, and so notices that the slot it copies is being written again.  And after a kill none of them is there
         * without that sequence, which had made the other slot current. */
        atomic_store_explicit(&slot[i], from[i], memory_order_release);
        CPS_CRASH_POINT(words == CPS_PRODUCED_WORDS  ? "slot-produced"
                        : words == CPS_SETTLED_WORDS ? "slot-settled"
                                                     : "slot-ledger");
    }
    /* model: page.sequence.put; pairs with page.sequence.get: who sees it sees the slot, and after a kill it is not there
     * without the slot, nor, in the ring, without the bytes of the record that it counts. */
    atomic_store_explicit(sequence, now, memory_order_release);
}

static inline void cps_shared_get(_Atomic uint32_t *sequence, _Atomic uint64_t *slots, unsigned words, uint64_t *to) {
    for (;;) {
        /* model: page.sequence.get; pairs with page.sequence.put: the words below are at least as new. */
        uint32_t before = atomic_load_explicit(sequence, memory_order_acquire);
        _Atomic uint64_t *slot = slots + (before & 1) * words;
        /* model: page.slot.get; pairs with page.slot.put, and the load below comes after these. */
        for (unsigned i = 0; i < words; i++) to[i] = atomic_load_explicit(&slot[i], memory_order_acquire);
        /* model: page.again; relaxed, for nothing that follows depends on it. */
        if (atomic_load_explicit(sequence, memory_order_relaxed) == before) return;
    }
}

static inline void cps_shared_commit_produced(cps_shared *s, const cps_produced *from) {
    cps_shared_put(&s->produced_sequence, &s->produced[0][0], CPS_PRODUCED_WORDS, (const uint64_t *)from,
                   CPS_PRODUCED_WORDS);
}
static inline void cps_shared_read_produced(cps_shared *s, cps_produced *to) {
    cps_shared_get(&s->produced_sequence, &s->produced[0][0], CPS_PRODUCED_WORDS, (uint64_t *)to);
}
static inline void cps_shared_commit_settled(cps_shared *s, const cps_settled *from) {
    unsigned used = CPS_SETTLED_PLAIN_WORDS + (unsigned)from->ahead_count * CPS_AHEAD_WORDS;
    cps_shared_put(&s->settled_sequence, &s->settled[0][0], CPS_SETTLED_WORDS, (const uint64_t *)from, used);
}
static inline void cps_shared_read_settled(cps_shared *s, cps_settled *to) {
    cps_shared_get(&s->settled_sequence, &s->settled[0][0], CPS_SETTLED_WORDS, (uint64_t *)to);
}
static inline void cps_shared_commit_ledger(cps_shared *s, const cps_ledger *from) {
    cps_shared_put(&s->ledger_sequence, &s->ledger[0][0], CPS_LEDGER_WORDS, (const uint64_t *)from, CPS_LEDGER_WORDS);
}
static inline void cps_shared_read_ledger(cps_shared *s, cps_ledger *to) {
    cps_shared_get(&s->ledger_sequence, &s->ledger[0][0], CPS_LEDGER_WORDS, (uint64_t *)to);
}

/* For a watcher, who may have copied bytes of the ring before, and now looks whether their place was given away. */
static inline void cps_shared_look(const void *sequence, const void *slots, unsigned words, uint64_t *to) {
    /* no model: a copy by the kernel is outside of what C11 orders; on every machine its loads come before those below. */
    atomic_thread_fence(memory_order_acquire);
    cps_shared_get((_Atomic uint32_t *)(uintptr_t)sequence, (_Atomic uint64_t *)(uintptr_t)slots, words, to);
}

/* Under the log's lock.  Relaxed: a watcher reads this word alone, and orders nothing by it. */
static inline void cps_shared_tell_storage(cps_shared *s, unsigned storage, int error) {
    /* no model: see above */
    uint32_t link = atomic_load_explicit(&s->outlook, memory_order_relaxed) & CPS_OUTLOOK_LINK;
    uint32_t told = (storage + 1) | (uint32_t)(error & 0xffff) << CPS_OUTLOOK_ERROR_SHIFT;
    atomic_store_explicit(&s->outlook, told | link, memory_order_relaxed); /* no model: see above */
}
static inline void cps_shared_tell_link(cps_shared *s, bool up) {
    /* no model: see above */
    uint32_t rest = atomic_load_explicit(&s->outlook, memory_order_relaxed) & ~(uint32_t)CPS_OUTLOOK_LINK;
    atomic_store_explicit(&s->outlook, rest | (up ? 0x200u : 0x100u), memory_order_relaxed); /* no model: see above */
}

#endif
