/* The benchmark's load: a closed loop of pipelined requests over non-blocking sockets, in one thread.
 *
 *     load unix:PATH|tcp:PORT CONNECTIONS DEPTH WARMUP SECONDS REQUESTS SAMPLES [spin]
 *
 * Each connection keeps DEPTH of the lines in the file REQUESTS under way, one after the other and from the start again,
 * and sends the next for each reply. When there are as many lines as connections, or a multiple, each connection has its
 * own share of them; else all send the same. Every reply must begin with {"status":"ok"; the last
 * one of each connection is written to the file SAMPLES, to be decrypted.
 *
 * What arrives in the SECONDS after the WARMUP is counted; only `total` counts all. Latency runs from before the send to
 * after the receive. The result is one JSON object on stdout, times in seconds; `waited` is for how long of the counted
 * time there was nothing to do: while that is not near 0, this program is not what limits the rate.
 *
 * With `spin` it waits by polling without pause: what is measured is then the server, and not how long a virtual machine
 * takes to wake an idle core, which was more than half of a round trip and came in two sizes. It needs a core of its own.
 *
 * In C, since a load generator in Python would be as slow as the server it measures.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static const char OK[] = "{\"status\":\"ok\"";
enum { OK_BYTES = sizeof OK - 1, READ_BYTES = 1 << 18, DRAIN_SECONDS = 10 };

struct script {
    char *cycle; /* some lines, DEPTH + 1 times over: any run of unsent bytes is one piece of it */
    size_t cycle_bytes;
    size_t *line_ends, lines; /* where each line of the cycle ends */
};

struct connection {
    int fd;
    const struct script *script;
    int wants_to_send, is_served;
    uint64_t *queued_at; /* a ring of `depth` times, one for each request under way */
    unsigned oldest, under_way;
    size_t next;   /* the line to queue next */
    size_t offset; /* where in the cycle of its lines the socket has to go on */
    size_t unsent; /* bytes of queued requests that the socket has not taken */
    char *line;    /* the reply that is not yet whole */
    size_t line_bytes, line_room;
    char *last;
    size_t last_bytes, last_room;
};

static unsigned depth;
static int epoll;

/* Latencies in ns: 64 buckets for each power of two, so a figure is right to 1.6 %. */
static uint64_t histogram[64 * 64];
static uint64_t counted, total, slowest;

static void fail(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, errno ? strerror(errno) : "not what was expected");
    exit(1);
}

static void *room(void *old, size_t bytes) {
    void *new = realloc(old, bytes);
    if (!new) fail("memory");
    return new;
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static unsigned bucket(uint64_t ns) {
    if (ns < 64) return (unsigned)ns;
    unsigned power = 63u - (unsigned)__builtin_clzll(ns);
    return (power - 5) * 64 + (unsigned)((ns >> (power - 6)) & 63);
}

static double quantile(double q) {
    uint64_t rank = (uint64_t)((double)counted * q), passed = 0;
    for (unsigned i = 0; i < sizeof histogram / sizeof *histogram; i++) {
        passed += histogram[i];
        if (passed > rank) {
            if (i < 64) return i / 1e9;
            return (double)((uint64_t)(64 + i % 64) << (i / 64 - 1)) / 1e9;
        }
    }
    return (double)slowest / 1e9;
}

static int connect_to(const char *address) {
    int fd;
    if (!strncmp(address, "unix:", 5)) {
        struct sockaddr_un a = {.sun_family = AF_UNIX};
        strncpy(a.sun_path, address + 5, sizeof a.sun_path - 1);
        fd = socket(AF_UNIX, SOCK_STREAM, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a)) fail("connect");
    } else {
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(address + 4))};
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        int yes = 1;
        fd = socket(AF_INET, SOCK_STREAM, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a)) fail("connect");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    }
    if (fcntl(fd, F_SETFL, O_NONBLOCK)) fail("fcntl");
    return fd;
}

static void watch(struct connection *c, int for_sending) {
    struct epoll_event e = {.events = EPOLLIN | (for_sending ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &e)) fail("epoll");
    c->wants_to_send = for_sending;
}

static void send_queued(struct connection *c) {
    while (c->unsent) {
        ssize_t sent = send(c->fd, c->script->cycle + c->offset, c->unsent, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno != EAGAIN) fail("send");
            break;
        }
        c->unsent -= (size_t)sent;
        c->offset = (c->offset + (size_t)sent) % c->script->cycle_bytes;
    }
    if ((c->unsent != 0) != c->wants_to_send) watch(c, c->unsent != 0);
}

static void queue(struct connection *c, unsigned count, uint64_t at) {
    for (unsigned i = 0; i < count; i++) {
        c->queued_at[(c->oldest + c->under_way++) % depth] = at;
        c->unsent += c->script->line_ends[c->next] - (c->next ? c->script->line_ends[c->next - 1] : 0);
        c->next = (c->next + 1) % c->script->lines;
    }
    send_queued(c);
}

static void reply(struct connection *c, const char *line, size_t bytes, uint64_t at, int count) {
    if (bytes < OK_BYTES || memcmp(line, OK, OK_BYTES)) {
        fprintf(stderr, "load: a reply is not ok: %.*s\n", (int)(bytes < 200 ? bytes : 200), line);
        exit(1);
    }
    if (!c->under_way) {
        errno = 0;
        fail("a reply that nobody asked for");
    }
    uint64_t took = at - c->queued_at[c->oldest];
    c->oldest = (c->oldest + 1) % depth;
    c->under_way--;
    total++;
    if (count) {
        histogram[bucket(took)]++;
        counted++;
        if (took > slowest) slowest = took;
    }
}

static void append(char **to, size_t *bytes, size_t *has, const char *from, size_t more) {
    if (*bytes + more > *has) *to = room(*to, *has = (*bytes + more) * 2);
    memcpy(*to + *bytes, from, more);
    *bytes += more;
}

/* Take what has arrived; returns how many replies that was. */
static unsigned receive(struct connection *c, uint64_t *at, uint64_t from, uint64_t until) {
    static char buffer[READ_BYTES];
    ssize_t got = recv(c->fd, buffer, sizeof buffer, 0);
    if (got < 0 && errno == EAGAIN) return 0;
    if (got <= 0) {
        if (!got) errno = 0;
        fail("the connection ended");
    }
    *at = now();
    int count = *at >= from && *at < until;
    unsigned replies = 0;
    const char *start = buffer, *end = buffer + got, *line_end, *last = NULL;
    size_t last_bytes = 0;
    while ((line_end = memchr(start, '\n', (size_t)(end - start)))) {
        last = start;
        last_bytes = (size_t)(line_end - start);
        if (c->line_bytes) {
            append(&c->line, &c->line_bytes, &c->line_room, start, last_bytes);
            last = c->line;
            last_bytes = c->line_bytes;
        }
        reply(c, last, last_bytes, *at, count);
        replies++;
        c->line_bytes = 0;
        start = line_end + 1;
    }
    if (last) {
        c->last_bytes = 0;
        append(&c->last, &c->last_bytes, &c->last_room, last, last_bytes);
    }
    if (start < end) append(&c->line, &c->line_bytes, &c->line_room, start, (size_t)(end - start));
    return replies;
}

static char *read_file(const char *path, size_t *bytes) {
    int file = open(path, O_RDONLY);
    struct stat state;
    if (file < 0 || fstat(file, &state) || !state.st_size) fail(path);
    *bytes = (size_t)state.st_size;
    char *text = room(NULL, *bytes);
    if (read(file, text, *bytes) != (ssize_t)*bytes || text[*bytes - 1] != '\n') fail(path);
    close(file);
    return text;
}

/* The script of the next `lines` lines of the text; the text goes on behind them. */
static struct script script_of(const char **text, size_t lines) {
    struct script s = {.lines = lines, .line_ends = room(NULL, lines * sizeof(size_t))};
    for (size_t i = 0; i < lines; i++) {
        s.cycle_bytes = (size_t)(strchr(*text + s.cycle_bytes, '\n') + 1 - *text);
        s.line_ends[i] = s.cycle_bytes;
    }
    s.cycle = room(NULL, s.cycle_bytes * (depth + 1));
    for (unsigned i = 0; i <= depth; i++) memcpy(s.cycle + i * s.cycle_bytes, *text, s.cycle_bytes);
    *text += s.cycle_bytes;
    return s;
}

int main(int argc, char **argv) {
    if (argc < 8) {
        fprintf(stderr, "usage: load unix:PATH|tcp:PORT CONNECTIONS DEPTH WARMUP SECONDS REQUESTS SAMPLES [spin]\n");
        return 2;
    }
    unsigned connections = (unsigned)atoi(argv[2]);
    depth = (unsigned)atoi(argv[3]);
    size_t bytes, lines = 0;
    const char *text = read_file(argv[6], &bytes);
    for (size_t i = 0; i < bytes; i++) lines += text[i] == '\n';
    unsigned scripts = lines % connections ? 1 : connections;
    struct script *script = calloc(scripts, sizeof *script);
    if (!script) fail("memory");
    for (unsigned i = 0; i < scripts; i++) script[i] = script_of(&text, lines / scripts);

    epoll = epoll_create1(0);
    struct connection *all = calloc(connections, sizeof *all);
    struct epoll_event *events = calloc(connections, sizeof *events);
    if (!all || !events) fail("memory");
    for (unsigned i = 0; i < connections; i++) {
        all[i].fd = connect_to(argv[1]);
        all[i].script = &script[i % scripts];
        all[i].queued_at = room(NULL, depth * sizeof(uint64_t));
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &all[i]};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, all[i].fd, &e)) fail("epoll");
    }

    uint64_t at = now(), from = UINT64_MAX, until = UINT64_MAX;
    uint64_t waited = 0, active = at, idle_since = at;
    int pause = argc > 8 ? 0 : 1000;
    unsigned under_way = connections * depth, silent = connections;
    for (unsigned i = 0; i < connections; i++) queue(&all[i], depth, at);
    while (under_way) {
        int ready = epoll_wait(epoll, events, (int)connections, pause);
        if (ready < 0) fail("epoll");
        at = now();
        if (idle_since >= from && at < until) waited += at - idle_since;
        idle_since = at;
        if (!ready) {
            if (at - active > (uint64_t)DRAIN_SECONDS * 1000000000u) fail("no reply");
            continue;
        }
        active = at;
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            if (events[i].events & EPOLLOUT) send_queued(c);
            if (!(events[i].events & ~(uint32_t)EPOLLOUT)) continue;
            unsigned replies = receive(c, &at, from, until);
            if (replies && !c->is_served) {
                c->is_served = 1;
                /* Only when all have been accepted does the load have its shape, and the warm-up begin. */
                if (!--silent) {
                    from = at + (uint64_t)(atof(argv[4]) * 1e9);
                    until = from + (uint64_t)(atof(argv[5]) * 1e9);
                }
            }
            if (replies && at < until)
                queue(c, replies, at);
            else
                under_way -= replies;
        }
        idle_since = now();
    }

    FILE *samples = fopen(argv[7], "w");
    if (!samples) fail(argv[7]);
    for (unsigned i = 0; i < connections; i++) fprintf(samples, "%.*s\n", (int)all[i].last_bytes, all[i].last);
    if (fclose(samples)) fail(argv[7]);
    double seconds = (double)(until - from) / 1e9;
    printf("{\"total\":%llu,\"rate\":%.1f,\"p50\":%.9f,\"p99\":%.9f,\"max\":%.9f,\"waited\":%.6f}\n",
           (unsigned long long)total, (double)counted / seconds, quantile(0.50), quantile(0.99), (double)slowest / 1e9, (double)waited / 1e9);
    return 0;
}
