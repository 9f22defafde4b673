/* What the fuzz targets share: the entry point, a cursor over the input, numbers made from a number, and checks.
 *
 * A cursor never ends: behind the input it gives zeros, so every input means something and a shortened one means about
 * the same.  Nothing here, and nothing in a target, depends on anything but the input: time and chance would make a
 * crash that nobody can repeat. */
#ifndef CPS_FUZZ_H
#define CPS_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What has to be so whatever the input is. */
#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "fuzz: not so: %s (%s:%d)\n", #condition, __FILE__, __LINE__);                             \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

typedef struct input {
    const uint8_t *at;
    size_t left;
} input;

static inline uint8_t take8(input *in) {
    if (in->left == 0) return 0;
    in->left--;
    return *in->at++;
}

static inline uint16_t take16(input *in) {
    uint16_t low = take8(in);
    return (uint16_t)(low | take8(in) << 8);
}

static inline uint64_t take64(input *in) {
    uint64_t value = 0;
    for (unsigned i = 0; i < 8; i++) value |= (uint64_t)take8(in) << (8 * i);
    return value;
}

/* Up to `size` bytes as they stand in the input. */
static inline size_t take_bytes(input *in, size_t size, const uint8_t **bytes) {
    if (size > in->left) size = in->left;
    *bytes = in->at;
    in->at += size;
    in->left -= size;
    return size;
}

static inline uint64_t scramble(uint64_t *state) { /* splitmix64 */
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* The same bytes for the same seed. */
static inline void fill(uint8_t *bytes, size_t size, uint64_t seed) {
    uint64_t word = 0;
    for (size_t i = 0; i < size; i++) {
        if (i % 8 == 0) word = scramble(&seed);
        bytes[i] = (uint8_t)(word >> (8 * (i % 8)));
    }
}

#endif
