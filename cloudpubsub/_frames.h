/* WebSocket frames, the client's side of RFC 6455: payload into a masked frame, a server's bytes back into payload.
 *
 * What it is: one pure function that makes a frame, and `cps_frames`, the state of one incoming stream that may be cut
 * anywhere.  The payload of data frames is a stream too (MQTT does not care where frames end), so it is handed on as it
 * comes, in the place where it lies; of control frames the latest ping and the close are kept.
 *
 * Threads: one, the owner of the connection.  Owns nothing: all memory is the caller's, and no frame, however long,
 * takes more of it than a `cps_frames`.
 * Never does: touch a socket, choose a key, trust a byte that it was given. */
#ifndef CPS_FRAMES_H
#define CPS_FRAMES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { CPS_FRAMES_HEADER_MAX = 14, CPS_FRAMES_CONTROL_MAX = 125 };

enum cps_frames_opcode {
    CPS_FRAMES_CONTINUATION = 0,
    CPS_FRAMES_TEXT = 1,
    CPS_FRAMES_BINARY = 2,
    CPS_FRAMES_CLOSE = 8,
    CPS_FRAMES_PING = 9,
    CPS_FRAMES_PONG = 10,
};

enum cps_frames_fault { /* why a stream is over */
    CPS_FRAMES_FINE = 0,
    CPS_FRAMES_RESERVED = 1,  /* a reserved bit or opcode, where no extension was agreed on */
    CPS_FRAMES_IS_TEXT = 2,   /* MQTT is binary */
    CPS_FRAMES_MASKED = 3,    /* only clients mask */
    CPS_FRAMES_CONTROL = 4,   /* a control frame in fragments, or one that is too long */
    CPS_FRAMES_SEQUENCE = 5,  /* a continuation of nothing, or a message begun inside another one */
    CPS_FRAMES_TOO_LARGE = 6, /* 2^63 bytes or more */
};

typedef struct cps_frames { /* zero it for a new connection */
    uint64_t left;          /* payload bytes of the present frame that are still to come */
    uint32_t idle_frames;   /* frames that brought no payload; the caller sets it back */
    uint8_t fault;          /* enum cps_frames_fault; once set, nothing is taken any more */
    uint8_t header_bytes;   /* so many of the present header are there, */
    uint8_t header[10];     /* here */
    uint8_t control_bytes;
    uint8_t control[CPS_FRAMES_CONTROL_MAX]; /* payload of the present control frame, or of the close */
    uint8_t ping_bytes;
    uint8_t ping[CPS_FRAMES_CONTROL_MAX]; /* payload of the latest ping */
    bool in_payload;                      /* the present header is complete */
    bool in_message;                      /* fragments are still to come */
    bool has_ping;                        /* for the caller to answer and to set back */
    bool is_closed;                       /* a close frame came; nothing behind it is taken */
} cps_frames;

/* Make a final, masked frame of `n` bytes of `data` at `out`, which has room for `n` + CPS_FRAMES_HEADER_MAX and does not
 * overlap it.  Returns the size of the frame. */
size_t cps_frames_make(uint8_t *out, uint8_t opcode, const uint8_t *data, size_t n, const uint8_t key[4]);

/* Take `n` bytes of the stream.  Returns how many bytes of payload were in them; they are now the first at `bytes`.
 * Says the rest in `frames`: a ping, a close, a fault.  What came before those is payload all the same. */
size_t cps_frames_take(cps_frames *frames, uint8_t *bytes, size_t n);

#endif
