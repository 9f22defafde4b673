/* Little-endian loads and stores for the formats on disk, big-endian ones for MQTT.
 *
 * Through memcpy: no alignment is assumed (ARM faults on some unaligned accesses) and no aliasing rule is broken;
 * compilers turn each into one instruction.  Bytes are uint8_t, never char, whose sign differs on ARM. */
#ifndef CPS_BYTES_H
#define CPS_BYTES_H

#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define CPS_LE16(x) __builtin_bswap16(x)
#define CPS_LE32(x) __builtin_bswap32(x)
#define CPS_LE64(x) __builtin_bswap64(x)
#else
#define CPS_LE16(x) (x)
#define CPS_LE32(x) (x)
#define CPS_LE64(x) (x)
#endif

static inline uint16_t cps_load16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return (uint16_t)CPS_LE16(v);
}

static inline uint32_t cps_load32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return CPS_LE32(v);
}

static inline uint64_t cps_load64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return CPS_LE64(v);
}

static inline void cps_store16(uint8_t *p, uint16_t v) {
    v = (uint16_t)CPS_LE16(v);
    memcpy(p, &v, sizeof v);
}

static inline void cps_store32(uint8_t *p, uint32_t v) {
    v = CPS_LE32(v);
    memcpy(p, &v, sizeof v);
}

static inline void cps_store64(uint8_t *p, uint64_t v) {
    v = CPS_LE64(v);
    memcpy(p, &v, sizeof v);
}

static inline uint16_t cps_load16be(const uint8_t *p) { return (uint16_t)((p[0] << 8) | p[1]); }

static inline void cps_store16be(uint8_t *p, uint16_t v) {
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static inline void cps_store32be(uint8_t *p, uint32_t v) {
    cps_store16be(p, (uint16_t)(v >> 16));
    cps_store16be(p + 2, (uint16_t)v);
}

#endif
