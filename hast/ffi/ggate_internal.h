/* What request.c, ggate.c and fuse.c share. */
#ifndef HAST_GGATE_INTERNAL_H
#define HAST_GGATE_INTERNAL_H

#include "device.h"
#include "direct.h"
#include "ggate.h"
#include "seq.h"

#define GGATE_REQS 2048u		/* requests of all ports */
#define GGATE_FUSE_REQS 512u		/* of them never given to NBD clients */
#define GGATE_PORT_REQS 256u		/* at most for one port */

struct hast_ggate {
	struct hast_arena *arena;
	struct hast_seq *seq;
	int epoll;
	int own_bell;
	int control;
	int bell[HAST_STAGES];		/* eventfds of the other stages, -1 where there is none */
	struct hast_direct direct;
	struct hast_port *ports;
	struct hast_port *dirty;	/* ports with something to flush */
	uint32_t ndead;
	uint32_t nclients;
	uint32_t nstarved;
	uint8_t frozen;
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

void request_init(struct hast_ggate *g);
/* Handles all answers of the sequencer. Number of them. */
int request_answers(struct hast_ggate *g);
/* Goes on with the requests that waited for slots. */
void request_unstall(struct hast_ggate *g);
/* The port is gone: its requests end by themselves, unanswered. */
void request_orphan(struct hast_ggate *g, struct hast_port *port);
void port_starve(struct hast_ggate *g, struct hast_port *port);

#endif
