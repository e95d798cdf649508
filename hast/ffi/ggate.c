/*
 * The ggate stage's pump. One turn: take completions, answer requests, let those go on who waited, send what is queued, ring
 * the other stages, then wait for rings and descriptors. Everything a turn has produced goes out in one go at its end.
 */
#include "ggate.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "ggate_internal.h"
#include "pump.h"
#include "trace.h"

#define EVENTS 64
#define IDLE_MS 1000			/* how often a quiet, connected resource looks for extents to clear */
#define SYNC_MS 50			/* how often a resynchronisation with a rate gets its share */
#define FUSE_RESERVE 32u		/* slots that NBD clients never get */

/* ---- life ---- */

static int
watch(struct hast_ggate *g, int fd, void *who, uint32_t events)
{
	struct epoll_event ev = { .events = events, .data.ptr = who };

	return epoll_ctl(g->epoll, EPOLL_CTL_ADD, fd, &ev);
}

struct hast_ggate *
hast_ggate_new(void *arena, int own_bell, int control, int disk_bell, int send_bell, int sync_bell)
{
	struct hast_ggate *g = calloc(1, sizeof(*g));
	uint32_t nclient = ((struct hast_arena *)arena)->geo.nclient;

	if (g == NULL)
		return NULL;
	g->arena = arena;
	g->seq = hast_arena_seq(arena);
	g->own_bell = own_bell;
	g->control = control;
	for (int i = 0; i < HAST_STAGES; i++)
		g->bell[i] = -1;
	g->bell[HAST_STAGE_DISK] = disk_bell;
	g->bell[HAST_STAGE_SEND] = send_bell;
	g->bell[HAST_STAGE_SYNC] = sync_bell;
	hast_direct_init(&g->direct, g->arena, -1);
	g->nbd_slots_max = nclient > 4 * FUSE_RESERVE ? nclient - FUSE_RESERVE : nclient - nclient / 4;
	g->req = calloc(GGATE_REQS, sizeof(*g->req));
	g->epoll = epoll_create1(EPOLL_CLOEXEC);
	/* Edge-triggered: each write to the bell is an event, whether it was drained or not, so it is not drained. */
	if (g->req == NULL || g->epoll == -1 || watch(g, own_bell, &g->own_bell, EPOLLIN | EPOLLET) == -1 ||
	    watch(g, control, &g->control, EPOLLIN) == -1) {
		int error = errno;

		hast_ggate_free(g);
		errno = error;
		return NULL;
	}
	request_init(g);
	g->arena->stage[HAST_STAGE_GGATE].pid = (uint32_t)getpid();
	return g;
}

static void
port_close(struct hast_ggate *g, struct hast_port *port)
{
	int fd = port->fd;

	/* First the parts that the port has claimed and not submitted, then the requests that they belong to. */
	port->ops->closed(g, port);
	request_orphan(g, port);
	if (port->starved)
		g->nstarved--;
	if (port->is_fuse)
		g->device_error = port->error != 0 ? port->error : ENODEV;
	else
		g->nclients--;
	/* Not left to close(): the worker may have the same open file, which would keep it in epoll. */
	(void)epoll_ctl(g->epoll, EPOLL_CTL_DEL, fd, NULL);
	(void)close(fd);
	free(port);
}

void
hast_ggate_free(struct hast_ggate *g)
{
	if (g == NULL)
		return;
	while (g->ports != NULL) {
		struct hast_port *port = g->ports;

		g->ports = port->next;
		port_close(g, port);
	}
	if (g->epoll >= 0)
		(void)close(g->epoll);
	free(g->req);
	free(g);
}

/* ---- ports ---- */

static uint32_t
wanted(const struct hast_ggate *g, const struct hast_port *port)
{
	uint32_t events = 0;

	if (!port->paused && !port->starved && (!g->frozen || port->midway))
		events |= EPOLLIN;
	if (port->want_write)
		events |= EPOLLOUT;
	return events;
}

int
hast_port_add(struct hast_ggate *g, struct hast_port *port)
{
	struct epoll_event ev = { .events = wanted(g, port), .data.ptr = port };

	if (epoll_ctl(g->epoll, EPOLL_CTL_ADD, port->fd, &ev) == -1)
		return -errno;
	port->armed = ev.events;
	if (port->limit == 0)
		port->limit = g->arena->geo.nclient / (port->is_fuse ? 1 : 4);
	g->nclients += !port->is_fuse;
	port->next = g->ports;
	g->ports = port;
	return 0;
}

void
hast_port_rearm(struct hast_ggate *g, struct hast_port *port)
{
	struct epoll_event ev = { .events = wanted(g, port), .data.ptr = port };

	if (port->dead || ev.events == port->armed)
		return;
	if (epoll_ctl(g->epoll, EPOLL_CTL_MOD, port->fd, &ev) == -1)
		hast_port_kill(g, port, errno);
	port->armed = ev.events;
}

void
hast_port_dirty(struct hast_ggate *g, struct hast_port *port)
{
	if (port->dirty)
		return;
	port->dirty = 1;
	port->next_dirty = g->dirty;
	g->dirty = port;
}

void
hast_port_kill(struct hast_ggate *g, struct hast_port *port, int error)
{
	if (port->dead)
		return;
	port->dead = 1;
	port->error = error;
	g->ndead++;
}

void
port_starve(struct hast_ggate *g, struct hast_port *port)
{
	if (port->starved)
		return;
	port->starved = 1;
	g->nstarved++;
	hast_port_rearm(g, port);
}

static void
port_result(struct hast_ggate *g, struct hast_port *port, int result)
{
	if (result < 0)
		hast_port_kill(g, port, -result);
}

/* What came back in this turn may be what a port or a request has waited for. */
static void
feed_starved(struct hast_ggate *g)
{
	g->freed = 0;
	if (g->stalled_head != NULL)
		request_unstall(g);
	if (g->nstarved == 0)
		return;
	for (struct hast_port *port = g->ports; port != NULL; port = port->next) {
		if (!port->starved || port->dead)
			continue;
		port->starved = 0;
		g->nstarved--;
		port_result(g, port, port->ops->resume(g, port));
		hast_port_rearm(g, port);
	}
}

static void
flush_ports(struct hast_ggate *g)
{
	while (g->dirty != NULL) {
		struct hast_port *port = g->dirty;

		g->dirty = port->next_dirty;
		port->dirty = 0;
		hast_trace(g->arena, HAST_STAGE_GGATE, HAST_TRACE_SENDING, 0);
		if (!port->dead)
			port_result(g, port, port->ops->flush(g, port));
		hast_trace(g->arena, HAST_STAGE_GGATE, HAST_TRACE_SENT, 0);
	}
}

static void
bury(struct hast_ggate *g)
{
	for (struct hast_port **at = &g->ports; *at != NULL && g->ndead > 0;) {
		struct hast_port *port = *at;

		if (!port->dead) {
			at = &port->next;
			continue;
		}
		*at = port->next;
		g->ndead--;
		port_close(g, port);
	}
}

/* ---- the turn ---- */

static int
ring_bells(struct hast_ggate *g)
{
	static const struct { int ring, stage; } to[] = {
		{ HAST_RING_DISK, HAST_STAGE_DISK },
		{ HAST_RING_SEND, HAST_STAGE_SEND },
		{ HAST_RING_SYNC, HAST_STAGE_SYNC },
	};
	uint32_t pushed = g->seq->pushed;

	g->seq->pushed = 0;
	for (size_t i = 0; pushed != 0 && i < sizeof(to) / sizeof(to[0]); i++) {
		int stage = to[i].stage, error;

		if ((pushed & 1u << to[i].ring) == 0 || g->bell[stage] == -1)
			continue;
		error = hast_doorbell_ring(&g->arena->bell[stage], g->bell[stage]);
		if (error != 0)
			return error;
		hast_trace(g->arena, HAST_STAGE_GGATE, HAST_TRACE_RANG, 0);
	}
	return 0;
}

/* What may be done here. 0 or HAST_PUMP_BROKEN. */
static int
direct_io(struct hast_ggate *g)
{
	struct hast_ring *ring = hast_arena_ring(g->arena, HAST_RING_DIRECT);
	struct hast_stage_line *line = &g->arena->stage[HAST_STAGE_GGATE];
	uint32_t slot;
	int got;

	while ((got = hast_ring_pop(ring, &slot)) == 1) {
		struct hast_bio *bio;

		if (slot >= g->arena->nslots)
			return HAST_PUMP_BROKEN;
		bio = hast_arena_bio(g->arena, slot);
		hast_trace(g->arena, HAST_STAGE_GGATE, HAST_TRACE_START, bio->seq);
		if (!hast_direct_try(&g->direct, bio, hast_arena_slab(g->arena, slot))) {
			hast_seq_to_disk(g->arena, slot);
			continue;
		}
		hast_trace(g->arena, HAST_STAGE_GGATE, HAST_TRACE_DID, bio->seq);
		__atomic_store_n(&line->ops, line->ops + 1, __ATOMIC_RELAXED);
		__atomic_store_n(&line->bytes, line->bytes + bio->length, __ATOMIC_RELAXED);
		if (hast_seq_complete(g->arena, HAST_LOCAL, slot) != 0)
			return HAST_PUMP_BROKEN;
	}
	return got < 0 ? HAST_PUMP_BROKEN : 0;
}

static int
direct_ready(struct hast_ggate *g)
{
	return hast_ring_ready(hast_arena_ring(g->arena, HAST_RING_DIRECT)) != 0;
}

/* Everything that can be done without waiting. 0 or why the pump has to come back. */
static int
turn(struct hast_ggate *g)
{
	int error;

	do {
		if (hast_seq_drain(g->arena) < 0 || g->seq->broken)
			return HAST_PUMP_BROKEN;
		/* First the others, who work meanwhile. */
		error = ring_bells(g);
		if (error == 0)
			error = direct_io(g);
		if (error != 0)
			return error;
		(void)request_answers(g);
		/* A slot answered early, before the secondary had done it, comes back from the sequencer alone. */
		if (g->freed || g->seq->freed != g->freed_seen) {
			g->freed_seen = g->seq->freed;
			feed_starved(g);
		}
		flush_ports(g);
		if (g->ndead > 0)
			bury(g);
	} while ((g->freed && (g->stalled_head != NULL || g->nstarved > 0)) || direct_ready(g));
	error = ring_bells(g);
	if (error != 0)
		return error;
	if (g->device_error != 0)
		return HAST_PUMP_DEVICE;
	if (g->seq->events != 0)
		return HAST_PUMP_EVENT;
	return g->frozen && hast_ggate_quiet(g) ? HAST_PUMP_QUIET : 0;
}

static int
completions_ready(struct hast_ggate *g)
{
	return hast_ring_ready(hast_arena_ring(g->arena, HAST_RING_DISK_DONE)) != 0 ||
	    hast_ring_ready(hast_arena_ring(g->arena, HAST_RING_RECV_DONE)) != 0 ||
	    hast_ring_ready(hast_arena_ring(g->arena, HAST_RING_SEND_DONE)) != 0;
}

static void
port_event(struct hast_ggate *g, struct hast_port *port, uint32_t events)
{
	if (port->dead)
		return;
	if ((events & EPOLLOUT) != 0)
		port_result(g, port, port->ops->writable(g, port));
	if (port->dead)
		return;
	if ((events & EPOLLIN) != 0 && (port->armed & EPOLLIN) != 0)
		port_result(g, port, port->ops->readable(g, port));
	else if ((events & (EPOLLHUP | EPOLLERR)) != 0)
		hast_port_kill(g, port, ECONNRESET);
}

/* Milliseconds to wait at most; -1: no limit. */
static int
patience(const struct hast_ggate *g)
{
	if (g->seq->sync_on && g->seq->sync_rate != 0)
		return SYNC_MS;
	return g->seq->connected ? IDLE_MS : -1;
}

/* The sequencer has no clock: it is told what time a resynchronisation may use. */
static void
tell_time(struct hast_ggate *g)
{
	struct timespec now;
	uint64_t ms;

	if (!g->seq->sync_on || clock_gettime(CLOCK_MONOTONIC_COARSE, &now) == -1)
		return;
	ms = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
	if (g->sync_ms == 0 || ms - g->sync_ms > IDLE_MS)
		g->sync_ms = ms - SYNC_MS;
	if (ms - g->sync_ms < SYNC_MS)
		return;
	hast_seq_sync_tick(g->arena, (uint32_t)(ms - g->sync_ms));
	g->sync_ms = ms;
}

static int
wait_for_events(struct hast_ggate *g)
{
	struct hast_doorbell *bell = &g->arena->bell[HAST_STAGE_GGATE];
	struct hast_stage_line *line = &g->arena->stage[HAST_STAGE_GGATE];
	struct epoll_event ev[EVENTS];
	int timeout = patience(g);
	int n;

	hast_doorbell_announce(bell);
	if (completions_ready(g))
		timeout = 0;
	else
		line->sleeps++;
	__atomic_store_n(&line->state, 2, __ATOMIC_RELAXED);
	n = epoll_wait(g->epoll, ev, EVENTS, timeout);
	__atomic_store_n(&line->state, 1, __ATOMIC_RELAXED);
	hast_doorbell_cancel(bell);
	hast_trace(g->arena, HAST_STAGE_GGATE, HAST_TRACE_WOKE, 0);
	if (n == -1)
		return errno == EINTR ? 0 : -errno;
	/* Where the disk stage is to run: on this processor a wake-up costs a tenth of what it costs across. */
	line->extra[0] = (uint64_t)(sched_getcpu() + 1);
	tell_time(g);
	if (n == 0 && timeout == IDLE_MS)
		(void)hast_seq_idle(g->arena);
	for (int i = 0; i < n; i++) {
		if (ev[i].data.ptr == &g->own_bell)
			continue;
		if (ev[i].data.ptr == &g->control)
			g->control_ready = 1;
		else
			port_event(g, ev[i].data.ptr, ev[i].events);
	}
	return 0;
}

int
hast_ggate_pump(struct hast_ggate *g)
{
	for (;;) {
		int result = turn(g);

		if (result == 0 && g->control_ready) {
			g->control_ready = 0;
			result = HAST_PUMP_CONTROL;
		}
		if (result == 0)
			result = wait_for_events(g);
		if (result != 0)
			return result;
		g->arena->stage[HAST_STAGE_GGATE].heartbeat++;
	}
}

/* ---- what Python asks ---- */

void
hast_ggate_direct(struct hast_ggate *g, int fd)
{
	hast_direct_init(&g->direct, g->arena, fd);
	g->seq->direct = fd >= 0;
}

uint32_t
hast_ggate_clients(struct hast_ggate *g)
{
	return g->nclients;
}

void
hast_ggate_freeze(struct hast_ggate *g, int on)
{
	g->frozen = (uint8_t)(on != 0);
	for (struct hast_port *port = g->ports; port != NULL; port = port->next) {
		if (!on)
			port_starve(g, port);	/* it may have requests that it has read already */
		hast_port_rearm(g, port);
	}
	if (!on)
		g->freed = 1;
}

int
hast_ggate_frozen(const struct hast_ggate *g)
{
	return g->frozen;
}

uint32_t *
hast_ggate_filling(struct hast_ggate *g)
{
	return &g->nbd_filling;
}

void
hast_ggate_drop_clients(struct hast_ggate *g)
{
	for (struct hast_port *port = g->ports; port != NULL; port = port->next) {
		if (!port->is_fuse)
			hast_port_kill(g, port, ESHUTDOWN);
	}
}

int
hast_ggate_device_error(const struct hast_ggate *g)
{
	return g->device_error;
}

int
hast_ggate_quiet(struct hast_ggate *g)
{
	return g->nreqs == 0 && hast_seq_quiet(g->arena);
}
