/* The webhook's receiver: takes POSTs over kept connections, answers each at once, and counts what came.
 *
 * Usage: receiver PORT [LATENCIES]
 *
 * It listens on 127.0.0.1. A message is counted for each commit_timestamp in a body. With LATENCIES, the name of a file,
 * two numbers of 64 bits are written for each message: when its request was complete, and when it was committed, both
 * in microseconds since 1970. GET answers {"requests": ..., "messages": ..., "bytes": ...}, after LATENCIES is written.
 *
 * One thread, so that it never takes more than a core. It knows as much of HTTP as it needs and ends when it meets
 * something else: a missing Content-Length, a head above 64 kB.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_LIMIT_BYTES = 64 << 10, EVENTS = 64, TIMESTAMP_BYTES = 27 };

static const char NEEDLE[] = "\"commit_timestamp\":\"";
static const char OK[] = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";

struct connection {
    int fd;
    char *data;
    size_t have, room;
};

static uint64_t requests, messages, bytes;
static FILE *latencies;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* 2026-01-01T00:00:00.123456Z */
static int64_t timestamp_us(const char *text) {
    static char day[10];
    static int64_t day_seconds;
    int hour, minute, second, micros;
    if (text[26] != 'Z' || sscanf(text + 11, "%2d:%2d:%2d.%6d", &hour, &minute, &second, &micros) != 4) {
        fprintf(stderr, "not a commit_timestamp: %.30s\n", text);
        exit(1);
    }
    if (memcmp(day, text, 10) != 0) {
        struct tm t = {.tm_year = atoi(text) - 1900, .tm_mon = atoi(text + 5) - 1, .tm_mday = atoi(text + 8)};
        day_seconds = timegm(&t);
        memcpy(day, text, 10);
    }
    return (day_seconds + hour * 3600 + minute * 60 + second) * 1000000 + micros;
}

static void take(const char *body, size_t size) {
    int64_t pair[2] = {now_us(), 0};
    const char *end = body + size, *at = body;
    requests++, bytes += size;
    while ((at = memmem(at, end - at, NEEDLE, sizeof NEEDLE - 1))) {
        at += sizeof NEEDLE - 1;
        messages++;
        if (latencies && end - at >= TIMESTAMP_BYTES) {
            pair[1] = timestamp_us(at);
            if (fwrite(pair, sizeof pair, 1, latencies) != 1) die("fwrite");
        }
    }
}

static void answer(int fd, const char *data, size_t size) {
    while (size) {
        ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
        if (n < 0) return; /* the client has gone; its connection ends at the next read */
        data += n, size -= n;
    }
}

static void tell(int fd) {
    char body[128], whole[256];
    if (latencies && fflush(latencies) != 0) die("fflush");
    int size = snprintf(body, sizeof body, "{\"requests\": %llu, \"messages\": %llu, \"bytes\": %llu}",
                        (unsigned long long)requests, (unsigned long long)messages, (unsigned long long)bytes);
    size = snprintf(whole, sizeof whole, "HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s", size, body);
    answer(fd, whole, size);
}

/* Takes one request off the front; 0 when it is not whole yet. */
static size_t exchange(struct connection *c) {
    char *end = memmem(c->data, c->have, "\r\n\r\n", 4);
    if (!end) {
        if (c->have > HEAD_LIMIT_BYTES) fprintf(stderr, "a head of %zu bytes\n", c->have), exit(1);
        return 0;
    }
    size_t head = end + 4 - c->data, size = 0;
    int get = c->have > 4 && memcmp(c->data, "GET ", 4) == 0;
    if (!get) {
        *end = 0;
        const char *length = strcasestr(c->data, "\r\ncontent-length:");
        *end = '\r';
        if (!length) fprintf(stderr, "no Content-Length: %.*s\n", (int)head, c->data), exit(1);
        size = strtoull(length + 17, NULL, 10);
    }
    if (head + size > c->room) {
        c->room = head + size + HEAD_LIMIT_BYTES;
        c->data = realloc(c->data, c->room);
        if (!c->data) die("realloc");
    }
    if (c->have < head + size) return 0;
    if (get) {
        tell(c->fd);
    } else {
        take(c->data + head, size);
        answer(c->fd, OK, sizeof OK - 1);
    }
    return head + size;
}

static void serve(struct connection *c) {
    ssize_t n = recv(c->fd, c->data + c->have, c->room - c->have, 0);
    if (n <= 0) {
        close(c->fd);
        free(c->data);
        free(c);
        return;
    }
    c->have += n;
    size_t done;
    while (c->have && (done = exchange(c))) {
        memmove(c->data, c->data + done, c->have - done);
        c->have -= done;
    }
}

int main(int argc, char **argv) {
    if (argc != 2 && argc != 3) return 2;
    if (argc == 3 && !(latencies = fopen(argv[2], "wb"))) die(argv[2]);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    inet_pton(AF_INET, "127.0.0.1", &a.sin_addr);
    int listening = socket(AF_INET, SOCK_STREAM, 0), epoll = epoll_create1(0);
    setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (bind(listening, (struct sockaddr *)&a, sizeof a) < 0 || listen(listening, 64) < 0) die("listen");
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[EVENTS];
    epoll_ctl(epoll, EPOLL_CTL_ADD, listening, &event);
    for (;;) {
        int n = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr) {
                serve(events[i].data.ptr);
                continue;
            }
            struct connection *c = calloc(1, sizeof *c);
            if (!c) die("calloc");
            c->room = 2 * HEAD_LIMIT_BYTES;
            c->data = malloc(c->room);
            c->fd = accept(listening, NULL, NULL);
            if (!c->data || c->fd < 0) die("accept");
            setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
            event.data.ptr = c;
            epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
        }
    }
}
