/* What all four pumps of the connection have in common: how they wait, how they measure time, how they lose it. */

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "conn_internal.h"
#include "pump.h"

enum { STATE_STOPPED, STATE_WORKING, STATE_WAITING };

static int
options_ok(const struct hast_arena *a, const struct hast_conn_options *o)
{
	if (o->fd < 0 || o->version == 0 || o->version > CONN_VERSION || o->timeout_ms == 0 || o->keepalive_ms == 0 ||
	    o->timeout_ms > INT32_MAX || o->keepalive_ms > INT32_MAX)
		return 0;
	/* A primary's bio is one request, and its seq names the slot in 16 bits. */
	return o->secondary || (a->geo.slab_size <= HAST_CONN_MAX_SENT && a->nslots <= 65536);
}

int
conn_init(struct conn *c, void *arena, const struct hast_conn_options *options, uint32_t stage)
{
	struct hast_arena *a = arena;

	if (hast_arena_check(a, a->size) != 0 || !options_ok(a, options))
		return -EINVAL;
	memset(c, 0, sizeof(*c));
	c->opt = *options;
	c->arena = a;
	c->bell = &a->bell[stage];
	c->line = &a->stage[stage];
	c->nslots = a->nslots;
	__atomic_store_n(&c->line->pid, (uint32_t)getpid(), __ATOMIC_RELAXED);
	__atomic_store_n(&c->line->state, STATE_WORKING, __ATOMIC_RELAXED);
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

	if (getsockopt(c->opt.fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error != 0)
		(void)conn_lost(c, error, "the connection to %s broke: %s", conn_peer(c), strerror(error));
	else
		(void)conn_lost(c, ECONNRESET, "%s closed the connection", conn_peer(c));
}

int
conn_wait(struct conn *c, int events, int timeout_ms)
{
	struct pollfd fd[3] = {
		{ .fd = c->opt.own_bell, .events = POLLIN },
		{ .fd = c->opt.control, .events = POLLIN },
		{ .fd = events < 0 ? -1 : c->opt.fd, .events = (short)events },
	};
	int n;

	if (timeout_ms != 0)
		conn_count(&c->line->sleeps, 1);
	__atomic_store_n(&c->line->state, STATE_WAITING, __ATOMIC_RELAXED);
	n = poll(fd, 3, timeout_ms);
	__atomic_store_n(&c->line->state, STATE_WORKING, __ATOMIC_RELAXED);
	hast_doorbell_cancel(c->bell);
	c->rang = 0;
	c->revents = 0;
	if (n == -1)
		return errno == EINTR ? 0 : -errno;
	if (fd[0].revents != 0) {
		c->rang = 1;
		(void)hast_doorbell_drain(c->opt.own_bell);
	}
	if (fd[1].revents != 0)
		c->control = 1;
	c->revents = fd[2].revents;
	return 0;
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
	return now - t->since >= (int64_t)limit_ms - conn_tick(limit_ms);
}

/* ---- what is told ---- */

/* One writer, read by others at any time. */
void
conn_count(uint64_t *counter, uint64_t more)
{
	__atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

int
conn_result(struct conn *c)
{
	if (c->error != 0 && !c->told) {
		c->told = 1;
		return HAST_PUMP_LOST;
	}
	if (!c->control)
		return 0;
	c->control = 0;
	return HAST_PUMP_CONTROL;
}
