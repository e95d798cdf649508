/*
 * Both connections to the peer as one: what is sent and what is received take turns, and one wait is for both. Invariants: conn.h.
 *
 * It is lost when one of the two is. But what the peer had sent before the other way broke is taken first, as far as it is there
 * now: a primary that dies leaves behind what it had sent and nobody will send again.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "awake.h"
#include "conn_internal.h"
#include "pump.h"
#include "trace.h"

#define REST_BYTES (16u << 20)	/* more than sockets hold: then the peer lives, and sends on what has no answer */

enum { STATE_STOPPED, STATE_WORKING, STATE_WAITING };

struct hast_link {
	struct hast_conn_options opt;
	struct hast_arena *arena;
	struct hast_doorbell *bell;
	struct hast_stage_line *line;
	struct hast_send *send;
	struct hast_recv *recv;
	const struct conn *lost;	/* which of the two, NULL: none */
	uint8_t told;			/* link_lost() was 1 */
	uint8_t deserted;		/* nothing can be sent any more, what was received is still taken */
	uint8_t finishing;
	uint8_t control;		/* the control socket has something */
	uint32_t looked;		/* turns since the control socket was looked at */
	uint64_t rest;			/* bytes received when it was deserted */
	struct conn_timer alone;	/* since it is deserted */
	int64_t ticked;			/* ms: when timers were last looked at */
	int tick;			/* ms */
	struct hast_awake awake;
};

/* ---- losing it ---- */

/* Nothing can be sent any more: 1 while there is something that the peer has sent before. */
static int
takes_rest(struct hast_link *l)
{
	if (!l->deserted) {
		l->deserted = 1;
		l->rest = l->line->bytes;
		/* Whether there is something or not poll() may not have said. */
		l->recv->readable = 1;
	}
	/* One that has no slots goes on when the disk has done something. */
	return (l->recv->readable || l->recv->starved) && !l->recv->ended && l->line->bytes - l->rest < REST_BYTES;
}

static void
look(struct hast_link *l)
{
	if (l->lost != NULL)
		return;
	if (l->recv->c.error != 0) {
		l->lost = &l->recv->c;
	} else if (send_conn(l->send)->error != 0 && !takes_rest(l)) {
		l->lost = send_conn(l->send);
		l->recv->ended = 1;
	}
}

int
link_lost(struct hast_link *l)
{
	look(l);
	if (l->lost == NULL || l->told)
		return 0;
	l->told = 1;
	return 1;
}

/* ---- for a stage with a wait of its own ---- */

int
link_receive(struct hast_link *l)
{
	return recv_step(l->recv);
}

int
link_send(struct hast_link *l)
{
	return send_step(l->send);
}

int
link_ready(struct hast_link *l)
{
	return recv_ready(l->recv) || send_ready(l->send);
}

void
link_wants(const struct hast_link *l, short *in, short *out)
{
	*in = recv_wants(l->recv);
	*out = send_wants(l->send);
}

void
link_events(struct hast_link *l, short in, short out)
{
	recv_event(l->recv, in);
	send_event(l->send, out);
}

void
link_clock(struct hast_link *l)
{
	int64_t now = conn_now();

	if (now - l->ticked < l->tick)
		return;
	l->ticked = now;
	send_tick(l->send);
	if (send_conn(l->send)->error == 0)
		recv_tick(l->recv);
	if (l->deserted && l->lost == NULL && conn_timer_due(&l->alone, l->opt.timeout_ms)) {
		l->lost = send_conn(l->send);
		l->recv->ended = 1;
	}
}

int
link_patience(const struct hast_link *l)
{
	int64_t in = recv_calm(l->recv), out = in > l->tick ? send_calm(l->send) : 0;
	int64_t calm = in < out ? in : out;

	return l->deserted || calm < l->tick ? l->tick : (int)calm;
}

int
link_idle(struct hast_link *l)
{
	return send_idle(l->send);
}

/* ---- the pump ---- */

static int
wait_turn(struct hast_link *l)
{
	struct pollfd fd[4] = {
		{ .fd = l->opt.own_bell, .events = POLLIN },
		{ .fd = l->opt.control, .events = POLLIN },
		{ .fd = l->opt.in },
		{ .fd = l->opt.out },
	};
	int timeout = hast_awake_patience(&l->awake, link_patience(l)), n;

	l->looked = 0;
	hast_doorbell_announce(l->bell);
	if (link_ready(l))
		timeout = 0;
	link_wants(l, &fd[2].events, &fd[3].events);
	for (int i = 2; i < 4; i++) {
		if (fd[i].events == -1)
			fd[i].fd = -1;
	}
	if (timeout != 0)
		conn_count(&l->line->sleeps, 1);
	__atomic_store_n(&l->line->state, STATE_WAITING, __ATOMIC_RELAXED);
	n = poll(fd, 4, timeout);
	__atomic_store_n(&l->line->state, STATE_WORKING, __ATOMIC_RELAXED);
	hast_doorbell_cancel(l->bell);
	hast_trace(l->arena, HAST_STAGE_RECV, HAST_TRACE_WOKE, 0);
	if (n == -1)
		return errno == EINTR ? 0 : -errno;
	hast_awake_waited(&l->awake, n, timeout);
	if (fd[0].revents != 0)
		(void)hast_doorbell_drain(l->opt.own_bell);
	if (fd[1].revents != 0)
		l->control = 1;
	link_events(l, fd[2].revents, fd[3].revents);
	link_clock(l);
	return 0;
}

/* What somebody has to decide, or 0. */
static int
verdict(struct hast_link *l)
{
	if (link_lost(l))
		return HAST_PUMP_LOST;
	if (l->control) {
		l->control = 0;
		return HAST_PUMP_CONTROL;
	}
	if (l->finishing && l->recv->role->idle(l->recv) && send_idle(l->send))
		return HAST_PUMP_QUIET;
	return 0;
}

static int
turn(struct hast_link *l)
{
	int event = link_receive(l), result;

	if (event != 0 && event != HAST_PUMP_EVENT)
		return event;
	result = link_send(l);
	return result != 0 ? result : event;
}

int
hast_link_pump(struct hast_link *l)
{
	for (;;) {
		int result = turn(l);

		conn_count(&l->line->heartbeat, 1);
		if (result == 0)
			result = verdict(l);
		if (result != 0)
			return result;
		if (link_ready(l) && ++l->looked < CONN_LOOK)
			continue;
		result = wait_turn(l);
		if (result != 0)
			return result;
	}
}

/* ---- life ---- */

static int
set_up(struct hast_link *l, void *arena)
{
	const struct hast_conn_options *o = &l->opt;
	uint32_t shortest = o->timeout_ms;

	l->send = send_new(arena, o);
	if (l->send == NULL)
		return -errno;
	l->recv = recv_new(arena, o);
	if (l->recv == NULL)
		return -errno;
	l->arena = arena;
	l->bell = &l->arena->bell[HAST_STAGE_RECV];
	l->line = &l->arena->stage[HAST_STAGE_RECV];
	if (o->keepalive_ms < shortest && !o->secondary)
		shortest = o->keepalive_ms;
	if (o->silence_ms < shortest && o->secondary)
		shortest = o->silence_ms;
	l->tick = conn_tick(shortest);
	l->ticked = conn_now();
	return 0;
}

struct hast_link *
hast_link_new(void *arena, const struct hast_conn_options *options)
{
	struct hast_link *l = calloc(1, sizeof(*l));
	int error;

	if (l == NULL)
		return NULL;
	l->opt = *options;
	hast_awake_init(&l->awake, -1, 0);
	error = set_up(l, arena);
	if (error != 0) {
		hast_link_free(l);
		errno = -error;
		return NULL;
	}
	return l;
}

void
hast_link_free(struct hast_link *l)
{
	if (l == NULL)
		return;
	if (l->line != NULL)
		__atomic_store_n(&l->line->state, STATE_STOPPED, __ATOMIC_RELAXED);
	recv_free(l->recv);
	send_free(l->send);
	free(l);
}

void
hast_link_direct(struct hast_link *l, int fd)
{
	recv_direct(l->recv, fd);
}

void
hast_link_awake(struct hast_link *l, int fd, int32_t limit)
{
	hast_awake_init(&l->awake, fd, limit);
}

void
hast_link_finish(struct hast_link *l)
{
	l->finishing = l->recv->finishing = 1;
}

int
hast_link_error(const struct hast_link *l)
{
	return l->lost != NULL ? l->lost->error : 0;
}

const char *
hast_link_why(const struct hast_link *l)
{
	return l->lost != NULL ? l->lost->why : "";
}

uint32_t
hast_link_free_slots(const struct hast_link *l)
{
	return recv_free_slots(l->recv);
}
