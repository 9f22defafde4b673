/* A simulated disk behind _io.h, for tests: files in memory with a volatile and a durable version, faults, power cuts.
 *
 * Every file has two versions of each page of 4 KiB, of its size and of its directory entry: what programs see, and what
 * survives a power cut.  `sync` copies one file's bytes and size, `sync_directory` the entries of one directory.  At a cut,
 * a seeded choice decides for each sector of 512 bytes, size and entry that differ which version is found afterwards.
 * Paths below "/shm/" are tmpfs: they survive a kill and no power cut.
 *
 * With `real` files are the system's own; counting, failing and the clock work all the same, cuts and kills do not.
 *
 * Threads: any; one lock inside.  A file holds at most SIM_FILE_BYTES_MAX.  Mappings are the simulated file itself. */
#ifndef CPS_TEST_IO_SIM_H
#define CPS_TEST_IO_SIM_H

#include "_io.h"

enum sim_kind {
    SIM_OPEN, SIM_CLOSE, SIM_FACTS, SIM_READ, SIM_WRITE, SIM_ALLOCATE, SIM_TRUNCATE, SIM_SYNC, SIM_SYNC_DIRECTORY,
    SIM_MAKE_DIRECTORY, SIM_REMOVE, SIM_RENAME, SIM_LIST, SIM_FREE_SPACE, SIM_LOCK, SIM_MAP, SIM_MAP_MEMORY,
    SIM_CREATE, /* an open that made the file, also counted as SIM_OPEN */
    SIM_KINDS,
    SIM_CHANGES, /* for sim_fail and sim_calls: everything that changes the disk */
};
enum { SIM_FILE_BYTES_MAX = 4 << 20 };

typedef struct sim sim;

sim *sim_new(bool real);
void sim_free(sim *s); /* nothing may be open any more */
const cps_io *sim_io(sim *s);

/* The `nth` call of this kind from now on (1: the next) fails with `error`; `sticky`: all after it too. */
void sim_fail(sim *s, enum sim_kind kind, uint64_t nth, int error, bool sticky);
void sim_heal(sim *s); /* ... no more */
uint64_t sim_failed(sim *s); /* calls that failed so since sim_new */

/* Calls of this kind hang from now on, each in its thread, until the disk comes back. */
void sim_hang(sim *s, enum sim_kind kind);
void sim_come_back(sim *s);
unsigned sim_hanging(sim *s); /* calls that hang now */
uint64_t sim_calls(sim *s, enum sim_kind kind); /* since sim_new */

/* Pages of that size, before anything is open; a mapping must then be whole pages, of the machine's own size at least. */
void sim_pages(sim *s, size_t bytes);

void sim_space(sim *s, uint64_t bytes); /* room for all files outside tmpfs */
uint64_t sim_used(sim *s);              /* of it */
void sim_advance(sim *s, uint64_t ms);  /* both clocks jump ahead */

/* From the `nth` changing call on (1: the next; 0: now) nothing reaches the disk and every call fails. */
void sim_cut(sim *s, uint64_t nth);
bool sim_is_cut(sim *s);
/* Like sim_cut(s, 0), and tmpfs is kept as it is at this instant, whatever other threads are about. */
void sim_kill(sim *s);
/* After a cut or a kill, and with everything closed: the disk works again.  `power`: as a power cut leaves it. */
void sim_restart(sim *s, bool power, uint64_t seed);

/* The file itself, for looking and damaging; CPS_UNKNOWN: no such file. */
enum cps_status sim_peek(sim *s, const char *path, uint8_t **bytes, uint64_t *size_bytes);
enum cps_status sim_put(sim *s, const char *path, const uint8_t *bytes, uint64_t size_bytes); /* durable at once */
enum cps_status sim_resize(sim *s, const char *path, uint64_t size_bytes);
void sim_erase(sim *s, const char *path);
/* Name of the `index`th file in creation order; NULL: there are no more. */
const char *sim_name(sim *s, unsigned index);

#endif
