/* What a reader has to find in the files of a spool: the rules of docs/format.md once more, in the plainest way, to
 * hold the library against. */
#ifndef CPS_FUZZ_EXPECT_H
#define CPS_FUZZ_EXPECT_H

#include "files.h"

typedef struct fuzz_record { /* a message */
    uint64_t position;
    uint64_t end;
    uint32_t digest; /* of what does not change on the way from the ring to the disk */
} fuzz_record;

typedef struct fuzz_records {
    fuzz_record *list;
    size_t count;
    size_t room;
} fuzz_records;

void fuzz_add(fuzz_records *records, fuzz_record record);
void fuzz_records_free(fuzz_records *records);

/* Of a whole record. */
uint32_t fuzz_digest(const uint8_t *at);

enum fuzz_clarity {
    FUZZ_CLEAR,       /* every position stands in one file at most: all these messages have to come */
    FUZZ_OVERLAPPING, /* files overlap and say the same: which of them counts is the library's choice */
    FUZZ_UNCLEAR,     /* no log writes that: a position with two contents, a changed name, a position out of reach */
};

/* All messages that can be read in segments of the spool `id`, file by file. */
enum fuzz_clarity fuzz_expect(const fuzz_spool *spool, const uint8_t id[16], fuzz_records *out);

/* Does this message stand in one of the files, and is it whole? */
bool fuzz_is_genuine(const fuzz_spool *spool, uint64_t position, const uint8_t *at, size_t length);

#endif
