/* The other end of a connection, as light as can be, so that the client is what is measured:
 *
 *     peer PORT MESSAGES WINDOW PAYLOAD_BYTES [CERTIFICATE KEY | STAMPS]
 *
 * listens on 127.0.0.1, prints its port, and serves any number of connections, each on a thread of its own: MQTT 3.1.1
 * and 5, QoS 1.  As a sink it parses PUBLISH packets and acknowledges what one read brought with one write.  A client
 * that subscribes gets MESSAGES messages, at most WINDOW of them unacknowledged, as fast as the socket takes them; the
 * acknowledgements must come in order.  With a certificate it speaks TLS (compiled with PEER_TLS; sink only).
 * With STAMPS, the path of a file, each payload begins with the nanoseconds of CLOCK_MONOTONIC when it was published; how
 * much later it was received is appended to the file, 8 bytes each, when the client says goodbye.
 * Ends with the process that started it. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef PEER_TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
static SSL_CTX *tls_context;
#endif

enum { IN_BYTES = 512 * 1024, OUT_BYTES = 256 * 1024, PACKET_MAX = 256 * 1024, STAMPS_MAX = 4000000 };
#define TOPIC "gateway-17/telemetry"
#define TOPIC_BYTES (sizeof(TOPIC) - 1)

static uint64_t messages;
static const char *stamps_path;
static uint32_t window, payload_bytes;

typedef struct peer {
    int fd;
#ifdef PEER_TLS
    SSL *tls;
#endif
    uint8_t *in, *out;
    size_t in_used, out_used;
    uint8_t level;
    bool subscribed;
    uint64_t acked; /* of what we send */
    uint64_t received_ns; /* when the last bytes came */
    int64_t *stamps;
    size_t stamps_used;
} peer;

static void fail(const char *what) {
    fprintf(stderr, "peer: %s\n", what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void keep_stamps(const peer *p) {
    FILE *file = fopen(stamps_path, "ab");
    if (file == NULL || fwrite(p->stamps, 8, p->stamps_used, file) != p->stamps_used || fclose(file) != 0)
        fail("the stamps cannot be kept");
}

static ssize_t get(peer *p, void *to, size_t size) {
#ifdef PEER_TLS
    if (p->tls != NULL) return SSL_read(p->tls, to, (int)size);
#endif
    return recv(p->fd, to, size, 0);
}

static bool put_all(peer *p, const uint8_t *bytes, size_t size) {
    while (size > 0) {
        ssize_t n;
#ifdef PEER_TLS
        if (p->tls != NULL) n = SSL_write(p->tls, bytes, (int)size);
        else
#endif
            n = send(p->fd, bytes, size, MSG_NOSIGNAL);
        if (n <= 0) return false;
        bytes += n;
        size -= (size_t)n;
    }
    return true;
}

static bool flush_out(peer *p) {
    bool good = put_all(p, p->out, p->out_used);
    p->out_used = 0;
    return good;
}

static bool answer(peer *p, const uint8_t *bytes, size_t size) {
    if (p->out_used + size > OUT_BYTES && !flush_out(p)) return false;
    memcpy(p->out + p->out_used, bytes, size);
    p->out_used += size;
    return true;
}

/* One whole packet.  False: the connection ends. */
static bool take(peer *p, const uint8_t *packet, const uint8_t *body, size_t size) {
    switch (packet[0] >> 4) {
    case 1: { /* CONNECT */
        if (size < 10) return false;
        p->level = body[6];
        uint8_t connack[5] = {0x20, p->level == 5 ? 3 : 2, 0, 0, 0};
        return answer(p, connack, p->level == 5 ? 5 : 4);
    }
    case 3: { /* PUBLISH */
        if ((packet[0] >> 1 & 3) != 1) return (packet[0] >> 1 & 3) == 0;
        if (size < 4) return false;
        size_t topic = (size_t)body[0] << 8 | body[1];
        if (size < 4 + topic) return false;
        if (stamps_path != NULL && size >= 12 + topic && p->stamps_used < STAMPS_MAX) {
            int64_t then;
            memcpy(&then, body + 4 + topic, 8);
            p->stamps[p->stamps_used++] = (int64_t)p->received_ns - then;
        }
        uint8_t puback[4] = {0x40, 2, body[2 + topic], body[3 + topic]};
        return answer(p, puback, 4);
    }
    case 4: /* PUBACK, in the order of sending */
        if (size < 2 || (((uint32_t)body[0] << 8) | body[1]) != p->acked % window + 1) fail("an acknowledgement out of order");
        p->acked++;
        return true;
    case 8: { /* SUBSCRIBE to one filter */
        if (size < 5) return false;
        uint8_t suback[6] = {0x90, p->level == 5 ? 4 : 3, body[0], body[1], p->level == 5 ? 0 : 1, 1};
        p->subscribed = true;
        return answer(p, suback, p->level == 5 ? 6 : 5);
    }
    case 10: { /* UNSUBSCRIBE */
        uint8_t unsuback[6] = {0xb0, p->level == 5 ? 4 : 2, body[0], body[1], 0, 0};
        return answer(p, unsuback, p->level == 5 ? 6 : 4);
    }
    case 12: /* PINGREQ */
        return answer(p, (const uint8_t[]){0xd0, 0}, 2);
    default: /* DISCONNECT */
        return false;
    }
}

/* Every whole packet of what was received.  False: the connection ends. */
static bool take_all(peer *p) {
    size_t at = 0;
    for (;;) {
        size_t size = 0, header = 1;
        unsigned shift = 0;
        bool whole = false;
        while (at + header < p->in_used && header < 5) {
            uint8_t byte = p->in[at + header++];
            size |= (size_t)(byte & 127) << shift;
            shift += 7;
            if (byte < 128) {
                whole = true;
                break;
            }
        }
        if (size > PACKET_MAX) return false;
        if (!whole || at + header + size > p->in_used) break;
        if (!take(p, p->in + at, p->in + at + header, size)) return false;
        at += header + size;
    }
    memmove(p->in, p->in + at, p->in_used - at);
    p->in_used -= at;
    return true;
}

static bool receive(peer *p, int flags) {
    ssize_t n = flags == 0 ? get(p, p->in + p->in_used, IN_BYTES - p->in_used)
                           : recv(p->fd, p->in + p->in_used, IN_BYTES - p->in_used, flags);
    if (n <= 0) return false;
    if (stamps_path != NULL) p->received_ns = now_ns();
    p->in_used += (size_t)n;
    return true;
}

/* Packets of one window, one after the other, with the ids 1..window. */
static uint8_t *make_packets(size_t *packet_bytes) {
    size_t size = 2 + TOPIC_BYTES + 2 + payload_bytes, header = 1;
    uint8_t head[5] = {0x32};
    for (size_t rest = size; header == 1 || rest > 0; header++) {
        head[header] = (uint8_t)(rest & 127);
        rest >>= 7;
        if (rest > 0) head[header] |= 128;
    }
    *packet_bytes = header + size;
    uint8_t *packets = malloc(*packet_bytes * window);
    if (packets == NULL) fail("no memory");
    for (uint32_t i = 0; i < window; i++) {
        uint8_t *at = packets + *packet_bytes * i;
        memcpy(at, head, header);
        at += header;
        at[0] = 0, at[1] = TOPIC_BYTES;
        memcpy(at + 2, TOPIC, TOPIC_BYTES);
        at[2 + TOPIC_BYTES] = (uint8_t)((i + 1) >> 8), at[3 + TOPIC_BYTES] = (uint8_t)(i + 1);
        for (uint32_t k = 0; k < payload_bytes; k++) at[4 + TOPIC_BYTES + k] = (uint8_t)k;
    }
    return packets;
}

/* All messages of the source.  A client of level 5 gets an empty list of properties only as level 3.1.1 does: none. */
static bool serve_messages(peer *p) {
    size_t packet_bytes, rest = 0;
    if (p->level != 4) fail("the source speaks 3.1.1 only");
    uint8_t *packets = make_packets(&packet_bytes);
    uint64_t sent = 0; /* messages handed to the socket, the one that is half out included */
    bool good = true;
    while (good && p->acked < messages) {
        while (sent < messages || rest > 0) {
            uint64_t free_places = window - (sent - p->acked), left = messages - sent, slot = sent % window;
            uint64_t n = free_places < left ? free_places : left;
            if (n > window - slot) n = window - slot;
            size_t size = rest + (size_t)n * packet_bytes;
            if (size == 0) break;
            if (size > OUT_BYTES) size = OUT_BYTES;
            /* What is half out ends where the next message begins, but for the last of the window. */
            const uint8_t *from = packets + (rest > 0 && slot == 0 ? window : slot) * packet_bytes - rest;
            if (rest > 0 && slot == 0 && size > rest) size = rest;
            ssize_t out = send(p->fd, from, size, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (out < 0) break;
            if ((size_t)out <= rest) {
                rest -= (size_t)out;
                if ((size_t)out < size) break;
                continue;
            }
            size_t fresh = (size_t)out - rest;
            uint64_t begun = (fresh + packet_bytes - 1) / packet_bytes;
            rest = (size_t)begun * packet_bytes - fresh;
            sent += begun;
            if ((size_t)out < size) break;
        }
        bool may_send = rest > 0 || (sent < messages && sent - p->acked < window);
        struct pollfd wanted = {.fd = p->fd, .events = (short)(POLLIN | (may_send ? POLLOUT : 0))};
        if (poll(&wanted, 1, 60000) <= 0) good = false;
        else if (wanted.revents & (POLLIN | POLLHUP | POLLERR)) good = receive(p, MSG_DONTWAIT) && take_all(p);
    }
    free(packets);
    return good;
}

static void *serve(void *argument) {
    peer *p = argument;
    int on = 1;
    (void)setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    p->in = malloc(IN_BYTES);
    p->out = malloc(OUT_BYTES);
    if (p->in == NULL || p->out == NULL) fail("no memory");
    if (stamps_path != NULL && (p->stamps = malloc(8 * (size_t)STAMPS_MAX)) == NULL) fail("no memory");
    bool good = true;
#ifdef PEER_TLS
    if (tls_context != NULL) {
        p->tls = SSL_new(tls_context);
        good = p->tls != NULL && SSL_set_fd(p->tls, p->fd) == 1 && SSL_accept(p->tls) == 1;
    }
#endif
    while (good) {
        good = receive(p, 0) && take_all(p);
        if (!flush_out(p)) good = false;
        if (good && p->subscribed) {
            p->subscribed = false;
            p->acked = 0;
            good = serve_messages(p);
        }
    }
#ifdef PEER_TLS
    if (p->tls != NULL) SSL_free(p->tls);
#endif
    if (p->stamps_used > 0) keep_stamps(p);
    (void)close(p->fd);
    free(p->stamps);
    free(p->in);
    free(p->out);
    free(p);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc < 5 || argc > 7) fail("PORT MESSAGES WINDOW PAYLOAD_BYTES [CERTIFICATE KEY | STAMPS]");
    if (argc == 6) stamps_path = argv[5];
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    (void)signal(SIGPIPE, SIG_IGN);
    messages = strtoull(argv[2], NULL, 10);
    window = (uint32_t)strtoul(argv[3], NULL, 10);
    payload_bytes = (uint32_t)strtoul(argv[4], NULL, 10);
    if (window == 0 || window > 65535) fail("WINDOW is 1 to 65535");
    if (argc == 7) {
#ifdef PEER_TLS
        tls_context = SSL_CTX_new(TLS_server_method());
        if (tls_context == NULL || SSL_CTX_use_certificate_chain_file(tls_context, argv[5]) != 1 ||
            SSL_CTX_use_PrivateKey_file(tls_context, argv[6], SSL_FILETYPE_PEM) != 1)
            fail("the certificate cannot be used");
#else
        fail("made without TLS");
#endif
    }
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1])),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    (void)setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, size) != 0 || listen(listener, 64) != 0 ||
        getsockname(listener, (struct sockaddr *)&address, &size) != 0)
        fail("cannot listen");
    printf("%d\n", ntohs(address.sin_port));
    (void)fflush(stdout);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) continue;
        peer *p = calloc(1, sizeof *p);
        pthread_t thread;
        if (p == NULL) fail("no memory");
        p->fd = fd;
        if (pthread_create(&thread, NULL, serve, p) != 0) fail("no thread");
        (void)pthread_detach(thread);
    }
}
