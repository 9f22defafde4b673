/* Paho C's asynchronous client: `paho_c URI MESSAGES PAYLOAD_BYTES MAX_INFLIGHT WAITING [CA]` publishes at QoS 1 as fast as it can,
 * and prints the seconds from the first message to the last acknowledgement. */
#include <MQTTAsync.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int waiting_max; /* handed over and not acknowledged: the time it needs for each grows with their number */
#define TOPIC "gateway-17/telemetry"

static sem_t connected, room;

static void fail(const char *what, int code) {
    fprintf(stderr, "paho_c: %s: %d\n", what, code);
    exit(1);
}

static void on_connect(void *context, MQTTAsync_successData *response) {
    (void)context, (void)response;
    (void)sem_post(&connected);
}
static void on_failure(void *context, MQTTAsync_failureData *response) {
    (void)context;
    fail("no connection", response != NULL ? response->code : 0);
}
static void on_lost(void *context, char *cause) {
    (void)context, (void)cause;
    fail("the connection was lost", 0);
}
static int on_message(void *context, char *topic, int size, MQTTAsync_message *message) {
    (void)context, (void)size;
    MQTTAsync_freeMessage(&message);
    MQTTAsync_free(topic);
    return 1;
}
static void on_delivered(void *context, MQTTAsync_token token) {
    (void)context, (void)token;
    (void)sem_post(&room);
}

static double now_s(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

int main(int argc, char **argv) {
    if (argc < 6) fail("URI MESSAGES PAYLOAD_BYTES MAX_INFLIGHT WAITING [CA]", argc);
    waiting_max = atoi(argv[5]);
    long messages = strtol(argv[2], NULL, 10);
    int size = atoi(argv[3]);
    MQTTAsync client;
    MQTTAsync_connectOptions options = MQTTAsync_connectOptions_initializer;
    MQTTAsync_SSLOptions tls = MQTTAsync_SSLOptions_initializer;
    char *payload = malloc((size_t)size);
    int code;
    if (payload == NULL) fail("no memory", 0);
    for (int i = 0; i < size; i++) payload[i] = (char)i;
    (void)sem_init(&connected, 0, 0);
    (void)sem_init(&room, 0, (unsigned)waiting_max);
    if ((code = MQTTAsync_create(&client, argv[1], "bench-paho-c", MQTTCLIENT_PERSISTENCE_NONE, NULL)) != 0)
        fail("no client", code);
    if ((code = MQTTAsync_setCallbacks(client, NULL, on_lost, on_message, on_delivered)) != 0) fail("no callbacks", code);
    options.keepAliveInterval = 60;
    options.cleansession = 1;
    options.MQTTVersion = MQTTVERSION_3_1_1;
    options.maxInflight = atoi(argv[4]);
    options.onSuccess = on_connect;
    options.onFailure = on_failure;
    if (argc > 6) {
        tls.trustStore = argv[6];
        options.ssl = &tls;
    }
    if ((code = MQTTAsync_connect(client, &options)) != 0) fail("no connection", code);
    (void)sem_wait(&connected);
    double began_s = now_s();
    for (long i = 0; i < messages; i++) {
        (void)sem_wait(&room);
        code = MQTTAsync_send(client, TOPIC, size, payload, 1, 0, NULL);
        if (code != MQTTASYNC_SUCCESS) fail("a message was not taken", code);
    }
    for (int i = 0; i < waiting_max; i++) (void)sem_wait(&room); /* all are back */
    printf("%.9f\n", now_s() - began_s);
    (void)fflush(stdout);
    _Exit(0); /* its own end waits for seconds */
}
