/* What the machine can do at best: `limits WAY BYTES RECORD_BYTES PATH` copies BYTES in records of RECORD_BYTES and prints
 * the seconds.  WAY: `memcpy` to memory that is there already; `pwrite` of staged chunks into a preallocated file; `map`:
 * stores into the fresh mapping of a preallocated file; `map-again`: into one whose pages are there already. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK_BYTES = 256 * 1024, FILE_BYTES = 8 << 20 };

static void need(int good, const char *what) {
    if (good) return;
    perror(what);
    exit(1);
}

static double now_s(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void copy(uint8_t *to, const uint8_t *from, size_t bytes, size_t record) {
    for (size_t at = 0; at + record <= bytes; at += record) memcpy(to + at, from + at, record);
    __asm__ volatile("" : : "r"(to) : "memory");
}

int main(int argc, char **argv) {
    need(argc == 5, "WAY BYTES RECORD_BYTES PATH");
    const char *way = argv[1], *path = argv[4];
    size_t bytes = strtoull(argv[2], NULL, 10), record = strtoull(argv[3], NULL, 10);
    uint8_t *from = malloc(FILE_BYTES), *to = malloc(FILE_BYTES), *staging = malloc(CHUNK_BYTES);
    need(from != NULL && to != NULL && staging != NULL && record > 0 && record <= CHUNK_BYTES, "memory");
    memset(from, 7, FILE_BYTES);
    memset(to, 1, FILE_BYTES);
    memset(staging, 1, CHUNK_BYTES);
    size_t files = (bytes + FILE_BYTES - 1) / FILE_BYTES;
    double total_s = 0;
    for (size_t i = 0; i < files; i++) {
        double began_s;
        if (strcmp(way, "memcpy") == 0) {
            began_s = now_s();
            copy(to, from, FILE_BYTES, record);
            total_s += now_s() - began_s;
            continue;
        }
        int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        need(fd >= 0, path);
        need(posix_fallocate(fd, 0, FILE_BYTES) == 0, "posix_fallocate");
        if (strcmp(way, "pwrite") == 0) {
            size_t chunk = CHUNK_BYTES / record * record;
            began_s = now_s();
            for (size_t at = 0; at + chunk <= FILE_BYTES; at += chunk) {
                copy(staging, from + at, chunk, record);
                need(pwrite(fd, staging, chunk, (off_t)at) == (ssize_t)chunk, "pwrite");
            }
        } else {
            uint8_t *map = mmap(NULL, FILE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            need(map != MAP_FAILED, "mmap");
            if (strcmp(way, "map-again") == 0) memset(map, 1, FILE_BYTES);
            else need(strcmp(way, "map") == 0, "no such way");
            began_s = now_s();
            copy(map, from, FILE_BYTES, record);
            (void)munmap(map, FILE_BYTES);
        }
        total_s += now_s() - began_s;
        (void)close(fd);
        need(unlink(path) == 0, "unlink");
    }
    printf("%.9f %zu\n", total_s, files * FILE_BYTES);
    return 0;
}
