/* The bare reader: takes what a walsender sends and decodes nothing.
 *
 * Usage: bare_reader HOST PORT USER DATABASE SLOT PUBLICATION END_LSN PAUSE_US RECEIVE_BUFFER_BYTES
 * HOST is an IPv4 address, or the folder of a Unix socket. END_LSN is a decimal number.
 *
 * It speaks the protocol itself (trust authentication, no TLS). Of each message it looks at the type, the length and,
 * in a row's case, at the one byte that says what it is: so it knows how many rows came, which keepalive wants an
 * answer, and the end: anything from END_LSN on. PAUSE_US > 0 sleeps so long before each read. RECEIVE_BUFFER_BYTES > 0 is set as SO_RCVBUF before
 * connecting (set later, it would not move the window's scale).
 *
 * Prints one line of JSON: rows, bytes, reads, seconds (from the request to start to the end), and ends with 0.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER_BYTES = 4 << 20, STATUS_SECONDS = 10 };

static unsigned char buffer[BUFFER_BYTES];
static int fd;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static uint32_t get32(const unsigned char *p) {
    return (uint32_t)p[0] << 24 | p[1] << 16 | p[2] << 8 | p[3];
}

static uint64_t get64(const unsigned char *p) {
    return (uint64_t)get32(p) << 32 | get32(p + 4);
}

static void put32(unsigned char *p, uint32_t n) {
    p[0] = n >> 24, p[1] = n >> 16, p[2] = n >> 8, p[3] = n;
}

static void put(const void *data, size_t bytes) {
    const char *p = data;
    while (bytes) {
        ssize_t n = send(fd, p, bytes, MSG_NOSIGNAL);
        if (n < 0) die("send");
        p += n, bytes -= n;
    }
}

static void size_buffer(int receive_buffer_bytes) {
    if (!receive_buffer_bytes) return;
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer_bytes, sizeof receive_buffer_bytes) < 0) die("SO_RCVBUF");
}

static void connect_to(const char *host, int port, int receive_buffer_bytes) {
    if (host[0] == '/') {
        struct sockaddr_un a = {.sun_family = AF_UNIX};
        snprintf(a.sun_path, sizeof a.sun_path, "%s/.s.PGSQL.%d", host, port);
        fd = socket(AF_UNIX, SOCK_STREAM, 0);
        size_buffer(receive_buffer_bytes);
        if (connect(fd, (struct sockaddr *)&a, sizeof a) < 0) die("connect");
    } else {
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
        inet_pton(AF_INET, host, &a.sin_addr);
        fd = socket(AF_INET, SOCK_STREAM, 0);
        size_buffer(receive_buffer_bytes);
        if (connect(fd, (struct sockaddr *)&a, sizeof a) < 0) die("connect");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    }
}

static void start_up(const char *user, const char *database) {
    unsigned char m[512];
    size_t n = 8;
    const char *words[] = {"user", user, "database", database, "replication", "database", NULL};
    put32(m + 4, 196608);
    for (const char **w = words; *w; w++) {
        size_t bytes = strlen(*w) + 1;
        if (n + bytes + 1 > sizeof m) exit(2);
        memcpy(m + n, *w, bytes);
        n += bytes;
    }
    m[n++] = 0;
    put32(m, n);
    put(m, n);
}

static void query(const char *text) {
    unsigned char head[5] = {'Q'};
    put32(head + 1, 4 + strlen(text) + 1);
    put(head, 5);
    put(text, strlen(text) + 1);
}

/* Nothing is confirmed: the position is 0. */
static void send_status(void) {
    unsigned char m[5 + 34] = {'d'};
    put32(m + 1, 4 + 34);
    m[5] = 'r';
    put(m, sizeof m);
}

int main(int argc, char **argv) {
    if (argc != 10) return 2;
    uint64_t end_lsn = strtoull(argv[7], NULL, 10), rows = 0, bytes = 0, reads = 0;
    long pause_us = atol(argv[8]);
    struct timespec pause = {pause_us / 1000000, pause_us % 1000000 * 1000};
    char start[512];
    double began = 0, status_sent = now();
    size_t have = 0;
    int ended = 0;

    connect_to(argv[1], atoi(argv[2]), atoi(argv[9]));
    start_up(argv[3], argv[4]);
    snprintf(start, sizeof start,
             "START_REPLICATION SLOT \"%s\" LOGICAL 0/0 (proto_version '1', publication_names '\"%s\"')", argv[5], argv[6]);
    while (!ended) {
        if (began && pause_us) nanosleep(&pause, NULL);
        ssize_t n = recv(fd, buffer + have, BUFFER_BYTES - have, 0);
        if (n < 0) die("recv");
        if (n == 0) return fprintf(stderr, "the server closed the connection\n"), 1;
        have += n, bytes += n, reads++;
        size_t at = 0;
        while (have - at >= 5) {
            const unsigned char *m = buffer + at;
            size_t size = 1 + (size_t)get32(m + 1);
            if (size > BUFFER_BYTES) return fprintf(stderr, "a message of %zu bytes\n", size), 1;
            if (have - at < size) break;
            at += size;
            if (m[0] == 'd' && m[5] == 'w') {
                unsigned char kind = m[30];
                rows += kind == 'I' || kind == 'U' || kind == 'D';
                ended |= get64(m + 6) >= end_lsn;
            } else if (m[0] == 'd' && m[5] == 'k') {
                ended |= get64(m + 6) >= end_lsn;
                if (m[22]) send_status();
            } else if (m[0] == 'E') {
                return fprintf(stderr, "%.*s\n", (int)(size - 5), m + 5), 1;
            } else if (m[0] == 'Z') {
                began = now();
                query(start);
            }
        }
        memmove(buffer, buffer + at, have - at);
        have -= at;
        if (now() - status_sent > STATUS_SECONDS) send_status(), status_sent = now();
    }
    double seconds = now() - began;
    printf("{\"rows\": %llu, \"bytes\": %llu, \"reads\": %llu, \"seconds\": %.6f}\n", (unsigned long long)rows,
           (unsigned long long)bytes, (unsigned long long)reads, seconds);
    close(fd);
    return 0;
}
