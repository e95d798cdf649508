/* What both connections have in common, in both roles: how they measure time, and how they are lost. */

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "conn_internal.h"

static int
options_ok(const struct hast_arena *a, const struct hast_conn_options *o)
{
	if (o->in < 0 || o->out < 0 || o->version == 0 || o->version > CONN_VERSION || o->timeout_ms == 0 ||
	    o->keepalive_ms == 0 || o->silence_ms == 0 || o->timeout_ms > INT32_MAX || o->keepalive_ms > INT32_MAX ||
	    o->silence_ms > INT32_MAX)
		return 0;
	/* A primary's bio is one request, and its seq names the slot in 16 bits. */
	return o->secondary || (a->geo.slab_size <= HAST_CONN_MAX_SENT && a->nslots <= 65536);
}

int
conn_init(struct conn *c, void *arena, const struct hast_conn_options *options, uint32_t stage, int fd)
{
	struct hast_arena *a = arena;

	if (hast_arena_check(a, a->size) != 0 || !options_ok(a, options))
		return -EINVAL;
	memset(c, 0, sizeof(*c));
	c->opt = *options;
	c->arena = a;
	c->line = &a->stage[stage];
	c->nslots = a->nslots;
	c->fd = fd;
	__atomic_store_n(&c->line->pid, (uint32_t)getpid(), __ATOMIC_RELAXED);
	return 0;
}

const char *
conn_peer(const struct conn *c)
{
	return c->opt.secondary ? "the primary" : "the secondary";
}

int
conn_lost(struct conn *c, int error, const char *format, ...)
{
	va_list args;

	if (c->error != 0)
		return -1;
	c->error = error;
	va_start(args, format);
	(void)vsnprintf(c->why, sizeof(c->why), format, args);
	va_end(args);
	conn_count(&c->line->errors, 1);
	return -1;
}

void
conn_hung_up(struct conn *c)
{
	int error = 0;
	socklen_t size = sizeof(error);

	if (getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error != 0)
		(void)conn_lost(c, error, "the connection to %s broke: %s", conn_peer(c), strerror(error));
	else
		(void)conn_lost(c, ECONNRESET, "%s closed the connection", conn_peer(c));
}

/* ---- time ---- */

int
conn_tick(uint32_t limit_ms)
{
	return (int)(limit_ms / CONN_TICKS) + 1;
}

#ifdef CLOCK_MONOTONIC_COARSE
#define CHEAP_CLOCK CLOCK_MONOTONIC_COARSE
#else
#define CHEAP_CLOCK CLOCK_MONOTONIC_FAST
#endif

int64_t
conn_now(void)
{
	struct timespec ts;

	(void)clock_gettime(CHEAP_CLOCK, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

int
conn_timer_due(struct conn_timer *t, uint32_t limit_ms)
{
	struct timespec ts;
	int64_t now;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts);
	now = (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
	if (!t->running) {
		t->running = 1;
		t->since = now;
		return 0;
	}
	return now - t->since >= (int64_t)limit_ms;
}

int64_t
conn_timer_left(const struct conn_timer *t, uint32_t limit_ms)
{
	int64_t left = t->since + (int64_t)limit_ms - conn_now();

	return !t->running ? -1 : left > 0 ? left : 0;
}

/* ---- what is told ---- */

/* One writer, read by others at any time. */
void
conn_count(uint64_t *counter, uint64_t more)
{
	__atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}
