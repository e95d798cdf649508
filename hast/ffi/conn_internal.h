/* What the files of the connection share: conn.c, link.c, send.c, recv.c, recv_primary.c,
   recv_secondary.c and recv_order.c (whose own header is recv_secondary.h); and ggate.c. */
#ifndef HAST_CONN_INTERNAL_H
#define HAST_CONN_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "arena.h"
#include "conn.h"
#include "transform.h"

#define CONN_VERSION 2u			/* the highest that we speak */
#define CONN_MEMSYNC_VERSION 2u		/* the first that has memsync */
#define CONN_WHY 160
#define CONN_TICKS 8u
#define CONN_LOOK 64u			/* turns without waiting, then a look at the control socket */

/* ---- conn.c ---- */

/* One of the two connections. */
struct conn {
	struct hast_conn_options opt;
	struct hast_arena *arena;
	struct hast_stage_line *line;
	uint32_t nslots;
	int fd;
	int error;			/* why it is lost; 0: it is not */
	char why[CONN_WHY];
};

/* How long something lasts, looked at in ticks. */
struct conn_timer {
	int64_t since;			/* ms */
	int running;
};

/* 0, or -EINVAL when arena or options cannot be. */
int conn_init(struct conn *c, void *arena, const struct hast_conn_options *options, uint32_t stage, int fd);
/* How the peer is called in sentences. */
const char *conn_peer(const struct conn *c);
/* The connection is at its end; the first reason stands. Always -1. */
int conn_lost(struct conn *c, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* Because poll() says so. */
void conn_hung_up(struct conn *c);
/* ms between two looks at a timer of so many ms. */
int conn_tick(uint32_t limit_ms);
/* Called in ticks while something lasts: 1 when it has for limit_ms at least. Whoever ends it clears t->running. */
int conn_timer_due(struct conn_timer *t, uint32_t limit_ms);
/* ms until it is due; -1: it does not run. */
int64_t conn_timer_left(const struct conn_timer *t, uint32_t limit_ms);
/* ms, of a clock that is cheap to read and a few ms behind. */
int64_t conn_now(void);
void conn_count(uint64_t *counter, uint64_t more);

/* ---- send.c ---- */

struct hast_send;

/* NULL and errno on failure. */
struct hast_send *send_new(void *arena, const struct hast_conn_options *options);
void send_free(struct hast_send *s);
/* Sends what is in RING_SEND, as far as the socket takes it. 0, HAST_PUMP_BROKEN or -errno. */
int send_step(struct hast_send *s);
/* What poll() is to look for; -1: nothing at all. */
short send_wants(const struct hast_send *s);
void send_event(struct hast_send *s, short revents);
/* A tick has passed. */
void send_tick(struct hast_send *s);
/* ms in which nothing becomes due; 0: the next tick is needed. */
int64_t send_calm(const struct hast_send *s);
/* 1 when there is something to be sent and nothing in the way. */
int send_ready(struct hast_send *s);
/* 1 when all is sent, or never will be. */
int send_idle(struct hast_send *s);
const struct conn *send_conn(const struct hast_send *s);

/* ---- recv.c ---- */

struct hast_recv;

/* What a role made of the message at the beginning of the buffer. */
enum recv_message {
	RECV_END = -1,			/* the connection is lost, or r->broken */
	RECV_LATER,			/* it stays in the buffer */
	RECV_TAKEN,
	RECV_DATA			/* taken; r->info describes the data behind it, r->raw is where it may be put */
};

struct recv_role {
	/* behind: bytes of the message's data that are in the buffer, or more. */
	enum recv_message (*message)(struct hast_recv *r, const uint8_t *nv, uint32_t size, uint32_t behind);
	/* The data of the message taken last, r->info.size bytes. RECV_TAKEN or RECV_END. */
	enum recv_message (*payload)(struct hast_recv *r, const uint8_t *wire);
	/* It will not come to its end. */
	void (*give_up)(struct hast_recv *r);
	/* Takes what is in the rings. */
	void (*rings)(struct hast_recv *r);
	/* Wakes the stages that were given something. 0 or -errno. */
	int (*bells)(struct hast_recv *r);
	/* 1 when something is in the rings that is waited for; after the doorbell was announced. */
	int (*ready)(struct hast_recv *r);
	/* 1 when silence of the peer is to be measured now. */
	int (*expecting)(const struct hast_recv *r);
	/* 1 when the peer has had a request for too long. NULL: it is not asked for anything. Called in every turn that waits. */
	int (*late)(struct hast_recv *r);
	/* 1 when nothing is under way. */
	int (*idle)(const struct hast_recv *r);
	void (*free)(struct hast_recv *r);
};

struct hast_recv {
	struct conn c;
	const struct recv_role *role;
	struct recv_primary *primary;
	struct recv_secondary *secondary;
	struct hast_transform *transform;
	struct conn_timer silence;
	uint8_t *buffer;
	uint32_t begin, end;		/* what is in the buffer */
	uint8_t readable;		/* the socket may have more */
	uint8_t finishing;		/* nobody waits for more */
	uint8_t ended;			/* nothing more is read */
	uint8_t deaf;			/* nor is anything in the buffer looked at: it is not a stream of messages any more */
	uint8_t large;			/* the last message's data was */
	uint8_t starved;		/* a message waits in the buffer for a slot */
	uint8_t event;			/* HAST_PUMP_EVENT is to be returned */
	uint8_t broken;			/* the shared memory holds nonsense */
	/* Data on its way past the buffer. */
	struct hast_wire_data info;
	uint8_t *scratch;		/* compressed data */
	uint8_t *raw;
	uint32_t want;			/* bytes still to come */
	uint32_t slot;			/* of the message whose data it is */
};

extern const struct recv_role recv_primary_role, recv_secondary_role;

/* NULL and errno on failure. */
struct hast_recv *recv_new(void *arena, const struct hast_conn_options *options);
void recv_free(struct hast_recv *r);
/* Takes what is in the rings and, with one call, what the socket has; wakes others. 0, HAST_PUMP_EVENT, HAST_PUMP_BROKEN or
   -errno. */
int recv_step(struct hast_recv *r);
/* As those of send. */
short recv_wants(const struct hast_recv *r);
void recv_event(struct hast_recv *r, short revents);
void recv_tick(struct hast_recv *r);
int64_t recv_calm(const struct hast_recv *r);
int recv_ready(struct hast_recv *r);

/* 0 or -errno. */
int recv_primary_new(struct hast_recv *r);
int recv_secondary_new(struct hast_recv *r);
/* 1 when data of this size is to be waited for in the buffer. */
int recv_gathers(uint32_t size, uint32_t behind);
/* Secondary: see conn.h. */
void recv_direct(struct hast_recv *r, int fd);
uint32_t recv_free_slots(const struct hast_recv *r);

/* ---- link.c: for a stage with a wait of its own ---- */

/* What a turn does. 0, HAST_PUMP_EVENT (secondary), HAST_PUMP_BROKEN or -errno. */
int link_receive(struct hast_link *l);
int link_send(struct hast_link *l);
/* 1, once, when the connection is lost. */
int link_lost(struct hast_link *l);
/* 1 when there is no reason to wait. */
int link_ready(struct hast_link *l);
/* What poll() is to look for at both; -1: nothing at all. And what it has found. */
void link_wants(const struct hast_link *l, short *in, short *out);
void link_events(struct hast_link *l, short in, short out);
/* Called after each wait, which may be this many ms: a tick, and more while nothing is under way. */
void link_clock(struct hast_link *l);
int link_patience(const struct hast_link *l);
/* 1 when all is sent, or never will be. */
int link_idle(struct hast_link *l);

#endif
