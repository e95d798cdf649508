/* What ggate.c, ggate_link.c, port.c, request.c and fuse.c share. */
#ifndef HAST_GGATE_INTERNAL_H
#define HAST_GGATE_INTERNAL_H

#include "awake.h"
#include "device.h"
#include "direct.h"
#include "ggate.h"
#include "seq.h"

#define GGATE_REQS 2048u		/* requests of all ports */
#define GGATE_FUSE_REQS 512u		/* of them never given to NBD clients */
#define GGATE_PORT_REQS 256u		/* at most for one port */

/* One of the two connections to the secondary. */
struct ggate_end {
	int fd;
	short armed;			/* what it is registered for; -1: it is not */
};

struct hast_ggate {
	struct hast_arena *arena;
	struct hast_seq *seq;
	int epoll;
	int own_bell;
	int control;
	int disk_bell;			/* eventfd, -1 where there is no disk stage */
	struct hast_link *link;		/* to the secondary, NULL: there is none */
	struct ggate_end in, out;	/* its ends */
	int idle_ms;			/* that nothing has happened */
	uint8_t settled;		/* nor is there anything to be done when nothing happens */
	struct hast_awake awake;
	struct hast_direct direct;
	struct hast_port *ports;
	struct hast_port *dirty;	/* ports with something to flush */
	uint32_t ndead;
	uint32_t nclients;
	uint32_t nstarved;
	uint8_t frozen;
	uint8_t deletes;		/* clients may ask for DELETE */
	uint8_t freed;			/* slots or requests came back in this turn */
	uint8_t control_ready;
	int device_error;
	uint64_t freed_seen;		/* hast_seq.freed when starved ports were last looked at */
	uint64_t sync_ms;		/* when the sequencer was last told the time; 0 never */
	struct hast_req *req;		/* GGATE_REQS of them */
	struct hast_req *req_free;
	uint32_t nbd_reqs;
	uint32_t nbd_slots;
	uint32_t nbd_slots_max;
	uint32_t nbd_filling;		/* see hast_ggate_filling() */
	uint32_t nreqs;
	struct hast_req *stalled_head;
	struct hast_req *stalled_tail;
};

/* ---- ggate_link.c; there is a connection ---- */

/* Registers what is to be waited for. 0 or -errno. */
int ggate_link_arm(struct hast_ggate *g);
/* 1 when the event was one of the connection; also when that is gone by now. */
int ggate_link_event(struct hast_ggate *g, const void *who, uint32_t events);

/* ---- request.c ---- */

void request_init(struct hast_ggate *g);
/* Handles all answers of the sequencer. Number of them. */
int request_answers(struct hast_ggate *g);
/* Goes on with the requests that waited for slots. */
void request_unstall(struct hast_ggate *g);
/* The port is gone: its requests end by themselves, unanswered. */
void request_orphan(struct hast_ggate *g, struct hast_port *port);

/* ---- port.c ---- */

void port_starve(struct hast_ggate *g, struct hast_port *port);
/* What epoll says of a port. */
void port_event(struct hast_ggate *g, struct hast_port *port, uint32_t events);
/* What came back in this turn may be what a port or a request has waited for. */
void ports_feed(struct hast_ggate *g);
/* What is queued for clients goes out. */
void ports_flush(struct hast_ggate *g);
/* Those that are dead are closed; or all. */
void ports_bury(struct hast_ggate *g);
void ports_close(struct hast_ggate *g);

#endif
