/* Runs a fuzz target once on each file named, without a fuzzer: for the tests, and where only gcc is at hand. */
#include "fuzz.h"

static bool replay(const char *path) {
    uint8_t *bytes = NULL;
    size_t size = 0, got;
    FILE *file = fopen(path, "rb");
    if (file == NULL) return false;
    do {
        uint8_t *grown = realloc(bytes, size + 65536);
        CHECK(grown != NULL);
        bytes = grown;
        got = fread(bytes + size, 1, 65536, file);
        size += got;
    } while (got > 0);
    bool whole = ferror(file) == 0;
    (void)fclose(file);
    /* In memory of exactly its size, so that a read behind its end is seen. */
    uint8_t *exact = malloc(size > 0 ? size : 1);
    CHECK(exact != NULL);
    memcpy(exact, bytes, size);
    free(bytes);
    if (whole) (void)LLVMFuzzerTestOneInput(exact, size);
    free(exact);
    return whole;
}

int main(int count, char **arguments) {
    for (int i = 1; i < count; i++) {
        fprintf(stderr, "%s\n", arguments[i]); /* the last line before a crash says which file it was */
        if (!replay(arguments[i])) {
            fprintf(stderr, "cannot be read\n");
            return 2;
        }
    }
    return 0;
}
