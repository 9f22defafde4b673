/* The in-flight window: which records were sent on this connection and are not acknowledged yet.
 *
 * What it is: a ring of entries in sending order.  Packet ids are dealt one after the other, 1..65535 and round again,
 * so the id of an acknowledgement is an index, and since at most 65,534 entries are in the ring an id comes back only
 * after its PUBACK.  Entries acknowledged out of order stay as done-marks until everything before them is done too.
 * A record that is not to be sent now, or that the broker has refused, is held: it is neither in flight nor done, and the
 * head waits for it.
 * Over a lost connection it remembers which records had ended one by one, and how, so that they are not sent again.
 * It can be split for two streams, whose records are told apart by a position: entries still stand in the order of sending,
 * and each stream has a head of its own.
 *
 * Threads: one, the owner of the connection; no lock, no atomics.
 * Owns: its memory, taken once in _open (24 bytes an entry, 16 a remembered position).
 * Never does: touch a record, a socket, a clock or a file; allocate after _open. */
#ifndef CPS_WINDOW_H
#define CPS_WINDOW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "_status.h"

enum { CPS_WINDOW_MESSAGES_MAX = 65534, CPS_WINDOW_ENDINGS = 16 };

typedef struct cps_window cps_window;

enum cps_fate { /* how a record ended */
    CPS_FATE_ACKED,
    CPS_FATE_DEAD,    /* in the dead letters */
    CPS_FATE_EXPIRED, /* its time to live was over */
};

typedef struct cps_ending { /* records that the head has passed and that ended otherwise than by an acknowledgement */
    uint64_t first; /* all of [first, end) */
    uint64_t end;
    uint64_t messages;
    uint64_t bytes; /* of the log */
    enum cps_fate fate;
} cps_ending;

/* Make a window for up to `messages_max` (1..CPS_WINDOW_MESSAGES_MAX) entries, which is also its first limit, and
 * `bytes_max` bytes of packets in flight.  The caller closes it.
 * CPS_TOO_LARGE: messages_max is out of range.  CPS_NO_MEMORY. */
CPS_MUST_CHECK enum cps_status cps_window_open(uint32_t messages_max, uint64_t bytes_max, cps_window **out);

/* Free it; NULL is allowed. */
void cps_window_close(cps_window *window);

/* Set other limits, at any time.  `messages_max` is brought into 1..(that of _open), so that a broker's Receive Maximum
 * can be handed on as it is.  What is in flight above a lowered limit stays; only _push obeys. */
void cps_window_limit(cps_window *window, uint32_t messages_max, uint64_t bytes_max);

/* Deal packet ids from `next_id` (not 0) on.  Only while no entry is in the window. */
void cps_window_renumber(cps_window *window, uint16_t next_id);

/* Two streams from here on, while no entry is in the window: what lies below `live_first`, which _head and _push are about then,
 * and what does not, the live one. */
void cps_window_split(cps_window *window, uint64_t live_first);

/* With two streams: what is entered next is of the live one, or of the other. */
void cps_window_turn(cps_window *window, bool live);

/* One stream again, the live one: no entry of the other is left. */
void cps_window_join(cps_window *window);

/* With two streams, since the split: the end of the last record of the live one up to which all of it is done, how many of
 * the records that _settled counts were its own, and their bytes.  CPS_EMPTY: there is no such record. */
CPS_MUST_CHECK enum cps_status cps_window_live(const cps_window *window, uint64_t *head, uint64_t *messages,
                                               uint64_t *span_bytes);

/* Enter a record that is about to be sent: [position, end) in the log, `packet_bytes` (not 0) on the wire, `now_ms` of
 * whatever clock the caller judges time limits by.  Positions only rise between two restarts, in each stream.
 * CPS_FULL: a limit would be passed, nothing was entered.  A packet larger than the limit of bytes is let through while
 * nothing is in flight, since it would never go otherwise. */
CPS_MUST_CHECK enum cps_status cps_window_push(cps_window *window, uint64_t position, uint64_t end,
                                               uint32_t packet_bytes, uint64_t now_ms, uint16_t *packet_id);

/* Enter a record that has ended already and is not sent: it is done from the start.
 * CPS_FULL: no free entry (the limits of messages and bytes in flight do not matter). */
CPS_MUST_CHECK enum cps_status cps_window_skip(cps_window *window, uint64_t position, uint64_t end,
                                               enum cps_fate fate);

/* Enter a record that is not sent now: it is held.  CPS_FULL: no free entry. */
CPS_MUST_CHECK enum cps_status cps_window_hold(cps_window *window, uint64_t position, uint64_t end);

/* Enter a stretch of the log in which there is nothing to send (lost on the disk, and counted there): the head passes over
 * it in its turn, and it counts as nothing.  CPS_FULL: no free entry. */
CPS_MUST_CHECK enum cps_status cps_window_pass(cps_window *window, uint64_t position, uint64_t end);

/* Settle the record that was sent with `packet_id` and tell which one that was.
 * CPS_UNKNOWN: no such id is in flight; counted, the out-pointers are not written. */
CPS_MUST_CHECK enum cps_status cps_window_ack(cps_window *window, uint16_t packet_id, uint64_t *position,
                                              uint64_t *end);

/* The record that was sent with `packet_id` was refused by the broker: it is held from now on.  CPS_UNKNOWN: as _ack. */
CPS_MUST_CHECK enum cps_status cps_window_refuse(cps_window *window, uint16_t packet_id, uint64_t *position);

/* The record at `position`, held or in flight, has ended.  CPS_UNKNOWN: no such record is there. */
CPS_MUST_CHECK enum cps_status cps_window_end(cps_window *window, uint64_t position, enum cps_fate fate);

/* The end of the last record up to which everything entered since the last restart is done.
 * CPS_EMPTY: nothing was settled from the front since then. */
CPS_MUST_CHECK enum cps_status cps_window_head(const cps_window *window, uint64_t *head);

/* The connection is gone, or sending starts again: nothing is in flight or held any more.  Records that ended behind a gap
 * are remembered, together with those remembered earlier that the head has not passed.  Sending is expected to start
 * again at the oldest unsettled record. */
void cps_window_restart(cps_window *window);

/* Did the record at `position` end before the last restart, behind a gap, and how?  Constant time while positions rise
 * from call to call; right for any order.  Forgets nothing.  CPS_OK; CPS_UNKNOWN: it did not. */
CPS_MUST_CHECK enum cps_status cps_window_recall(cps_window *window, uint64_t position, enum cps_fate *fate);

/* Records below `position` will not be asked for again (dropped or settled otherwise). */
void cps_window_forget_below(cps_window *window, uint64_t position);

/* Records in [first, end) will not be asked for again. */
void cps_window_forget(cps_window *window, uint64_t first, uint64_t end);

/* Acknowledged records that the head has passed, and the bytes of the log that they took; both since _open. */
void cps_window_settled(const cps_window *window, uint64_t *messages, uint64_t *span_bytes);

/* What the head has passed since the last _told that ended otherwise; `*count` is at most CPS_WINDOW_ENDINGS.  The head
 * stands still while that many wait to be told. */
const cps_ending *cps_window_endings(const cps_window *window, size_t *count);
void cps_window_told(cps_window *window);

uint32_t cps_window_inflight_messages(const cps_window *window); /* sent and not answered */
uint32_t cps_window_held(const cps_window *window);              /* records that are held */
uint64_t cps_window_inflight_bytes(const cps_window *window);    /* their packets on the wire */
uint64_t cps_window_unknown_acks(const cps_window *window);      /* since _open */
uint32_t cps_window_remembered(const cps_window *window);        /* positions remembered over restarts */

/* The oldest record in flight and the time that was given to its _push.  CPS_EMPTY: nothing is in flight. */
CPS_MUST_CHECK enum cps_status cps_window_oldest(const cps_window *window, uint64_t *position, uint64_t *sent_ms);

/* With two streams: the record of the live one, or of the other, that was sent first of those in flight.  CPS_EMPTY: none is. */
CPS_MUST_CHECK enum cps_status cps_window_oldest_of(const cps_window *window, bool live, uint64_t *position);

/* End the process if an invariant is broken.  Walks everything: for tests. */
void cps_window_check(const cps_window *window);

#endif
