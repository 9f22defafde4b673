/* CRC-32C (Castagnoli, polynomial 0x1EDC6F41 reflected), as in iSCSI, RFC 3720 appendix B.4.
 *
 * The CPU's own instruction where it has one (x86 SSE 4.2, ARMv8 CRC), chosen once at run time; slicing-by-8 tables
 * otherwise.  Any thread.  `cps_crc32c(0, ...)` starts; feeding a result back in continues. */
#ifndef CPS_CRC32C_H
#define CPS_CRC32C_H

#include <stddef.h>
#include <stdint.h>

uint32_t cps_crc32c(uint32_t crc, const uint8_t *bytes, size_t size);

/* The portable way, whatever the CPU has; for tests. */
uint32_t cps_crc32c_table(uint32_t crc, const uint8_t *bytes, size_t size);

/* "sse4.2", "armv8-crc" or "table". */
const char *cps_crc32c_name(void);

#endif
