/* Shared by _segment.c and _segment_read.c only: the bytes of a segment that both must agree on. */
#ifndef CPS_SEGMENT_BYTES_H
#define CPS_SEGMENT_BYTES_H

#include "_segment.h"

extern const uint8_t cps_segment_magic[8];
extern const uint8_t cps_footer_magic[8];

/* An object for `directory`/`name` with nothing in it. */
CPS_MUST_CHECK enum cps_status cps_segment_new(const cps_io *io, const char *directory, const char *name,
                                               cps_segment **out);

/* The CRC that a record must carry in a segment of this epoch. */
uint32_t cps_record_crc(const uint8_t *at, const cps_record *record, uint32_t segment_epoch);

#endif
