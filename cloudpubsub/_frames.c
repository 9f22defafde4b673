#include "_frames.h"

#include <string.h>

#include "_status.h"

enum { FINAL = 0x80, RESERVED_BITS = 0x70, OPCODE = 0x0f, IS_CONTROL = 0x08, MASK = 0x80, SIZE = 0x7f };

static void mask(uint8_t *out, const uint8_t *data, size_t n, const uint8_t key[4]) {
    uint64_t both, word;
    size_t i = 0;
    memcpy(&both, key, 4);
    memcpy((uint8_t *)&both + 4, key, 4);
    for (; n - i >= 8; i += 8) {
        memcpy(&word, data + i, 8);
        word ^= both;
        memcpy(out + i, &word, 8);
    }
    for (; i < n; i++) {
        out[i] = data[i] ^ key[i % 4];
    }
}

size_t cps_frames_make(uint8_t *out, uint8_t opcode, const uint8_t *data, size_t n, const uint8_t key[4]) {
    size_t at = 0;
    out[at++] = (uint8_t)(FINAL | opcode);
    int size_bytes = n < 126 ? 0 : n <= 0xffff ? 2 : 8;
    out[at++] = (uint8_t)(MASK | (size_bytes == 0 ? n : size_bytes == 2 ? 126 : 127));
    for (int i = size_bytes - 1; i >= 0; i--) {
        out[at++] = (uint8_t)((uint64_t)n >> (8 * i));
    }
    memcpy(out + at, key, 4);
    at += 4;
    mask(out + at, data, n, key);
    return at + n;
}

static uint8_t judge_first(const cps_frames *frames, uint8_t first) {
    uint8_t opcode = first & OPCODE;
    if (first & RESERVED_BITS) {
        return CPS_FRAMES_RESERVED;
    }
    switch (opcode) {
    case CPS_FRAMES_TEXT:
        return CPS_FRAMES_IS_TEXT;
    case CPS_FRAMES_CONTINUATION:
        return frames->in_message ? CPS_FRAMES_FINE : CPS_FRAMES_SEQUENCE;
    case CPS_FRAMES_BINARY:
        return frames->in_message ? CPS_FRAMES_SEQUENCE : CPS_FRAMES_FINE;
    case CPS_FRAMES_CLOSE:
    case CPS_FRAMES_PING:
    case CPS_FRAMES_PONG:
        return first & FINAL ? CPS_FRAMES_FINE : CPS_FRAMES_CONTROL;
    default:
        return CPS_FRAMES_RESERVED;
    }
}

static void end_frame(cps_frames *frames, bool was_empty) {
    uint8_t opcode = frames->header[0] & OPCODE;
    frames->in_payload = false;
    frames->header_bytes = 0;
    if (!(opcode & IS_CONTROL)) {
        frames->in_message = !(frames->header[0] & FINAL);
        frames->idle_frames += was_empty;
        return;
    }
    frames->idle_frames++;
    if (opcode == CPS_FRAMES_PING) {
        memcpy(frames->ping, frames->control, frames->control_bytes);
        frames->ping_bytes = frames->control_bytes;
        frames->has_ping = true;
    }
    frames->is_closed = opcode == CPS_FRAMES_CLOSE;
}

/* The next byte of a header. */
static void take_header(cps_frames *frames, uint8_t byte) {
    frames->header[frames->header_bytes++] = byte;
    if (frames->header_bytes == 1) {
        frames->fault = judge_first(frames, byte);
        return;
    }
    uint8_t size = frames->header[1] & SIZE;
    if (frames->header_bytes == 2) {
        if (byte & MASK) {
            frames->fault = CPS_FRAMES_MASKED;
        } else if ((frames->header[0] & IS_CONTROL) && size > CPS_FRAMES_CONTROL_MAX) {
            frames->fault = CPS_FRAMES_CONTROL;
        }
    }
    int more = size == 126 ? 2 : size == 127 ? 8 : 0;
    if (frames->fault != CPS_FRAMES_FINE || frames->header_bytes < 2 + more) {
        return;
    }
    frames->left = more ? 0 : size;
    for (int i = 0; i < more; i++) {
        frames->left = frames->left << 8 | frames->header[2 + i];
    }
    if (frames->left >> 63) {
        frames->fault = CPS_FRAMES_TOO_LARGE;
        return;
    }
    frames->control_bytes = 0;
    frames->in_payload = true;
    if (frames->left == 0) {
        end_frame(frames, true);
    }
}

size_t cps_frames_take(cps_frames *frames, uint8_t *bytes, size_t n) {
    size_t from = 0, kept = 0;
    while (from < n && !frames->is_closed && frames->fault == CPS_FRAMES_FINE) {
        if (!frames->in_payload) {
            take_header(frames, bytes[from++]);
            continue;
        }
        size_t some = frames->left < n - from ? (size_t)frames->left : n - from;
        if (frames->header[0] & IS_CONTROL) {
            CPS_ASSERT(frames->control_bytes + some <= CPS_FRAMES_CONTROL_MAX);
            memcpy(frames->control + frames->control_bytes, bytes + from, some);
            frames->control_bytes = (uint8_t)(frames->control_bytes + some);
        } else {
            memmove(bytes + kept, bytes + from, some);
            kept += some;
        }
        from += some;
        frames->left -= some;
        if (frames->left == 0) {
            end_frame(frames, false);
        }
    }
    return kept;
}
