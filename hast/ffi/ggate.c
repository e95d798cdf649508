/*
 * The ggate stage's pump. One turn: take replies and completions, send requests to the secondary, ring the disk stage, answer
 * requests, let those go on who waited, send what is queued, then wait for rings and descriptors. Everything a turn has produced
 * goes out in one go at its end.
 */
#include "ggate.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "conn_internal.h"
#include "ggate_internal.h"
#include "pump.h"
#include "trace.h"

#define EVENTS 64
#define IDLE_MS 1000			/* after how long a quiet, connected resource looks for extents to clear */
#define FUSE_RESERVE 32u		/* slots that NBD clients never get */

/* ---- life ---- */

static int
watch(struct hast_ggate *g, int fd, void *who, uint32_t events)
{
	struct epoll_event ev = { .events = events, .data.ptr = who };

	return epoll_ctl(g->epoll, EPOLL_CTL_ADD, fd, &ev);
}

struct hast_ggate *
hast_ggate_new(void *arena, int own_bell, int control, int disk_bell)
{
	struct hast_ggate *g = calloc(1, sizeof(*g));
	uint32_t nclient = ((struct hast_arena *)arena)->geo.nclient;

	if (g == NULL)
		return NULL;
	g->arena = arena;
	g->seq = hast_arena_seq(arena);
	g->own_bell = own_bell;
	g->control = control;
	g->disk_bell = disk_bell;
	g->deletes = 1;
	hast_direct_init(&g->direct, g->arena, -1);
	hast_awake_init(&g->awake, -1, 0);
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

void
hast_ggate_free(struct hast_ggate *g)
{
	if (g == NULL)
		return;
	ports_close(g);
	hast_ggate_disconnect(g);
	if (g->epoll >= 0)
		(void)close(g->epoll);
	free(g->req);
	free(g);
}

/* ---- the turn ---- */

/* What the sequencer has pushed goes its way. late: answers are out. 0 or what the pump is to return. */
static int
pass_on(struct hast_ggate *g, int late)
{
	uint32_t pushed = g->seq->pushed;
	int result = 0;

	g->seq->pushed = 0;
	/* First the other node: it takes longest. But not where clients do not wait for it. */
	if (g->link != NULL && (late || g->seq->mode != HAST_MODE_ASYNC))
		result = link_send(g->link);
	if (result == 0 && (pushed & 1u << HAST_RING_DISK) != 0 && g->disk_bell != -1) {
		result = hast_doorbell_ring(&g->arena->bell[HAST_STAGE_DISK], g->disk_bell);
		hast_trace(g->arena, HAST_STAGE_GGATE, HAST_TRACE_RANG, 0);
	}
	return result;
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

/* 0 or what somebody has to decide. */
static int
verdict(struct hast_ggate *g)
{
	if (g->device_error != 0)
		return HAST_PUMP_DEVICE;
	if (g->link != NULL && link_lost(g->link))
		return HAST_PUMP_LOST;
	if (g->seq->events != 0)
		return HAST_PUMP_EVENT;
	return g->frozen && hast_ggate_quiet(g) ? HAST_PUMP_QUIET : 0;
}

/* Everything that can be done without waiting. 0 or why the pump has to come back. */
static int
turn(struct hast_ggate *g)
{
	int error, taken;

	do {
		error = g->link != NULL ? link_receive(g->link) : 0;
		if (error != 0)
			return error;
		taken = hast_seq_drain(g->arena);
		if (taken < 0 || g->seq->broken)
			return HAST_PUMP_BROKEN;
		if (taken > 0)
			g->settled = 0;
		/* First the others, who work meanwhile. */
		error = pass_on(g, 0);
		if (error == 0)
			error = direct_io(g);
		if (error != 0)
			return error;
		(void)request_answers(g);
		/* A slot answered early, before the secondary had done it, comes back from the sequencer alone. */
		if (g->freed || g->seq->freed != g->freed_seen) {
			g->freed_seen = g->seq->freed;
			ports_feed(g);
		}
		ports_flush(g);
		if (g->ndead > 0)
			ports_bury(g);
	} while ((g->freed && (g->stalled_head != NULL || g->nstarved > 0)) || direct_ready(g));
	error = pass_on(g, 1);
	return error != 0 ? error : verdict(g);
}

static int
completions_ready(struct hast_ggate *g)
{
	if (hast_ring_ready(hast_arena_ring(g->arena, HAST_RING_DISK_DONE)) != 0)
		return 1;
	return g->link != NULL && link_ready(g->link);
}

/* Milliseconds to wait at most; -1: no limit. */
static int
patience(const struct hast_ggate *g)
{
	if (g->seq->sync_on)
		return (int)hast_seq_sync_patience(g->arena);
	return g->seq->connected && !g->settled ? IDLE_MS : -1;
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
	/* After a time without one it begins with a moment's share. */
	if (g->sync_ms == 0 || ms - g->sync_ms > 2 * HAST_SYNC_STUCK_MS)
		g->sync_ms = ms - HAST_SYNC_TICK_MS;
	if (ms - g->sync_ms < HAST_SYNC_TICK_MS)
		return;
	hast_seq_sync_tick(g->arena, (uint32_t)(ms - g->sync_ms));
	g->sync_ms = ms;
}

static void
take_event(struct hast_ggate *g, const struct epoll_event *ev)
{
	if (ev->data.ptr == &g->own_bell || ggate_link_event(g, ev->data.ptr, ev->events))
		return;
	if (ev->data.ptr == &g->control)
		g->control_ready = 1;
	else
		port_event(g, ev->data.ptr, ev->events);
}

/* Nothing but time has passed since the last events. */
static void
idle(struct hast_ggate *g, int timeout)
{
	g->idle_ms += timeout;
	if (g->idle_ms < IDLE_MS)
		return;
	g->idle_ms = 0;
	/* There is no more to clear until something happens; an update that is under way ends with an event. */
	g->settled = hast_seq_idle(g->arena) == 0;
}

static int
wait_for_events(struct hast_ggate *g)
{
	struct hast_doorbell *bell = &g->arena->bell[HAST_STAGE_GGATE];
	struct hast_stage_line *line = &g->arena->stage[HAST_STAGE_GGATE];
	struct epoll_event ev[EVENTS];
	int timeout = patience(g), quiet = timeout == IDLE_MS && !g->seq->sync_on, calm;
	int n = g->link != NULL ? ggate_link_arm(g) : 0;

	if (n != 0)
		return n;
	calm = g->link != NULL ? link_patience(g->link) : -1;
	if (calm != -1 && (timeout == -1 || timeout > calm))
		timeout = calm;
	timeout = hast_awake_patience(&g->awake, timeout);
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
	hast_awake_waited(&g->awake, n, timeout);
	/* Where the disk stage is to run: on this processor a wake-up costs a tenth of what it costs across. */
	line->extra[0] = (uint64_t)(sched_getcpu() + 1);
	tell_time(g);
	if (n > 0 || timeout == 0)
		g->settled = 0;
	if (n > 0 || !quiet || timeout == 0)
		g->idle_ms = 0;
	else
		idle(g, timeout);
	for (int i = 0; i < n; i++)
		take_event(g, &ev[i]);
	if (g->link != NULL)
		link_clock(g->link);
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

void
hast_ggate_deletes(struct hast_ggate *g, int on)
{
	g->deletes = (uint8_t)(on != 0);
}

void
hast_ggate_awake(struct hast_ggate *g, int fd, int32_t limit)
{
	hast_awake_init(&g->awake, fd, limit);
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
	return g->nreqs == 0 && hast_seq_quiet(g->arena) && (g->link == NULL || link_idle(g->link));
}
