/* CRC-32C; see the header.  The slicing-by-8 method is from Kounavis and Berry, "A Systematic Approach to Building High
 * Performance Software-Based CRC Generators" (2005). */
#include "_crc32c.h"

#include <pthread.h>
#include <stdbool.h>

#include "_bytes.h"

#if defined(__x86_64__) || defined(__i386__)
#include <nmmintrin.h>
#elif defined(__aarch64__) || defined(__arm__)
#include <sys/auxv.h> /* getauxval: what the kernel says that this CPU has */
#endif

static uint32_t tables[8][256];
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

static void make_tables(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78u : 0);
        tables[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int t = 1; t < 8; t++) tables[t][i] = (tables[t - 1][i] >> 8) ^ tables[0][tables[t - 1][i] & 0xff];
}

uint32_t cps_crc32c_table(uint32_t crc, const uint8_t *bytes, size_t size) {
    (void)pthread_once(&tables_once, make_tables);
    crc = ~crc;
    while (size >= 8) {
        uint64_t word = cps_load64(bytes) ^ crc;
        crc = tables[7][word & 0xff] ^ tables[6][(word >> 8) & 0xff] ^ tables[5][(word >> 16) & 0xff] ^
              tables[4][(word >> 24) & 0xff] ^ tables[3][(word >> 32) & 0xff] ^ tables[2][(word >> 40) & 0xff] ^
              tables[1][(word >> 48) & 0xff] ^ tables[0][word >> 56];
        bytes += 8;
        size -= 8;
    }
    while (size-- > 0) crc = (crc >> 8) ^ tables[0][(crc ^ *bytes++) & 0xff];
    return ~crc;
}

#if defined(__x86_64__)
#define CPS_CRC_NAME "sse4.2"
__attribute__((target("sse4.2"))) static uint32_t crc_hardware(uint32_t crc, const uint8_t *bytes, size_t size) {
    uint64_t wide = ~crc;
    for (; size >= 8; size -= 8, bytes += 8) wide = _mm_crc32_u64(wide, cps_load64(bytes));
    crc = (uint32_t)wide;
    while (size-- > 0) crc = _mm_crc32_u8(crc, *bytes++);
    return ~crc;
}
static bool has_hardware(void) { return __builtin_cpu_supports("sse4.2") != 0; }
#elif defined(__aarch64__)
#define CPS_CRC_NAME "armv8-crc"
#define CPS_HWCAP_CRC32 (1UL << 7) /* HWCAP_CRC32 of the arm64 kernel interface */
/* Instructions by name: the compiler flag for them must not leak into code that runs on every CPU. */
static uint32_t crc_hardware(uint32_t crc, const uint8_t *bytes, size_t size) {
    crc = ~crc;
    for (; size >= 8; size -= 8, bytes += 8) {
        uint64_t word = cps_load64(bytes);
        __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(word));
    }
    while (size-- > 0) {
        uint32_t byte = *bytes++;
        __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"(byte));
    }
    return ~crc;
}
static bool has_hardware(void) { return (getauxval(AT_HWCAP) & CPS_HWCAP_CRC32) != 0; }
#elif defined(__arm__) && defined(__ARM_PCS_VFP) && !defined(__clang__) && __GNUC__ >= 8
/* A 32-bit system on a CPU of 64 bits, as on many Raspberry Pi.  clang (14) has no such attribute for ARM: the table. */
#define CPS_CRC_NAME "armv8-crc"
#define CPS_HWCAP2_CRC32 (1UL << 4) /* HWCAP2_CRC32 of the arm kernel interface */
__attribute__((target("arch=armv8-a+crc+simd"))) static uint32_t crc_hardware(uint32_t crc, const uint8_t *bytes,
                                                                              size_t size) {
    crc = ~crc;
    for (; size >= 4; size -= 4, bytes += 4) crc = __builtin_arm_crc32cw(crc, cps_load32(bytes));
    while (size-- > 0) crc = __builtin_arm_crc32cb(crc, *bytes++);
    return ~crc;
}
static bool has_hardware(void) { return (getauxval(AT_HWCAP2) & CPS_HWCAP2_CRC32) != 0; }
#endif

#ifdef CPS_CRC_NAME
typedef uint32_t (*crc_function)(uint32_t, const uint8_t *, size_t);
static crc_function chosen = cps_crc32c_table;
static pthread_once_t chosen_once = PTHREAD_ONCE_INIT;

static void choose(void) {
    if (has_hardware()) chosen = crc_hardware;
}

uint32_t cps_crc32c(uint32_t crc, const uint8_t *bytes, size_t size) {
    (void)pthread_once(&chosen_once, choose);
    return chosen(crc, bytes, size);
}

const char *cps_crc32c_name(void) {
    (void)pthread_once(&chosen_once, choose);
    return chosen == crc_hardware ? CPS_CRC_NAME : "table";
}
#else
uint32_t cps_crc32c(uint32_t crc, const uint8_t *bytes, size_t size) { return cps_crc32c_table(crc, bytes, size); }
const char *cps_crc32c_name(void) { return "table"; }
#endif
