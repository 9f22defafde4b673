/* The input of fuzz_recovery as the files of a spool.
 *
 * The input is 8 bytes of options, which are the target's, then chunks, each a byte of kind and what the kind takes:
 *
 *   META        a slot of the meta file by its fields, small numbers and places, with or without a right CRC
 *   META_RAW    the same, byte by byte
 *   SEGMENT     a segment described record by record: good ones, pads, gaps, damage, right CRCs over wrong fields
 *   SEGMENT_RAW a segment byte by byte; on request header, records and footer are made right afterwards
 *   DAMAGE      a byte of the last segment is changed
 *   CUT         the last segment is shortened, or grows by zeros
 *   NAME        the last segment gets another name, byte by byte
 *   FOLDER      a folder with a segment's name
 *
 * So the fuzzer changes what a file means, not only its bytes, and gets behind the checksums.  What stands in a record
 * that is made here depends on its position alone: two files that overlap hold the same, as the format says. */
#ifndef CPS_FUZZ_FILES_H
#define CPS_FUZZ_FILES_H

#include "fuzz.h"
#include "io_sim.h"

enum {
    FUZZ_META, FUZZ_META_RAW, FUZZ_SEGMENT, FUZZ_SEGMENT_RAW, FUZZ_DAMAGE, FUZZ_CUT, FUZZ_NAME, FUZZ_FOLDER, FUZZ_KINDS,
};
enum {
    FUZZ_FILES_MAX = 8,
    FUZZ_BYTES_MAX = 384 * 1024, /* of all files; more than the reader takes in at once, but not slow */
    FUZZ_SLOT_BYTES = 4096,
    FUZZ_NAME_BYTES = 80,
};
#define FUZZ_DIRECTORY "/spool"

typedef struct fuzz_file {
    char name[FUZZ_NAME_BYTES];
    uint8_t *bytes;
    size_t size;
    uint64_t base; /* as the name was made; renaming does not change it */
    uint32_t epoch;
    bool is_renamed;
    bool is_folder;
} fuzz_file;

typedef struct fuzz_spool {
    fuzz_file files[FUZZ_FILES_MAX]; /* below log/ */
    unsigned count;
    size_t room; /* bytes that may still be added */
    uint8_t meta[2 * FUZZ_SLOT_BYTES];
    size_t meta_size; /* 0: there is none */
} fuzz_spool;

void fuzz_spool_build(fuzz_spool *spool, input *in);
/* Tell people what is in it. */
void fuzz_spool_show(const fuzz_spool *spool);
void fuzz_spool_free(fuzz_spool *spool);

/* Everything on the simulated disk becomes what `spool` says. */
void fuzz_spool_put(const fuzz_spool *spool, sim *s);

/* The slot with the highest sequence whose checksum holds; NULL: there is none. */
const uint8_t *fuzz_spool_slot(const uint8_t *meta, size_t size);

/* Does a whole slot say that it is of a version to come? */
bool fuzz_spool_is_newer(const fuzz_spool *spool);

/* Does the meta file name segments that were dropped, and counted, before? */
bool fuzz_spool_has_victims(const fuzz_spool *spool);

/* Up to where records are settled, as the meta file says at most; 0: it says nothing. */
uint64_t fuzz_spool_head(const fuzz_spool *spool);

/* The message payload, and all else in a record, that stands at a position. */
void fuzz_content(uint8_t *bytes, size_t size, uint64_t position);

#endif
