/* What the files of the secondary's pump share: recv_secondary.c, and recv_order.c, which decides what may go to disk. */
#ifndef HAST_RECV_SECONDARY_H
#define HAST_RECV_SECONDARY_H

#include "conn_internal.h"
#include "direct.h"
#include "seq.h"

enum state { FREE, FILLING, QUEUED, BLOCKED, DISK, REPLY };

struct item {
	uint64_t begin, end;		/* bytes */
	uint32_t blockers;		/* earlier active ones that it has to wait for */
	uint32_t next;			/* in the queue */
	uint8_t state;
	uint8_t cmd;
};

struct recv_secondary {
	struct hast_bio *bio;
	struct hast_seq *seq;		/* its counters: status reads them */
	struct hast_ring *disk, *disk_done, *send, *send_done;
	struct item *item;
	uint32_t *free;			/* a stack */
	uint32_t nfree;
	uint32_t nslots;
	uint32_t *active;		/* in order of arrival */
	uint32_t nactive;
	uint32_t queue_head, queue_tail;
	uint32_t flushing;		/* the flush that is with the disk, or HAST_NONE */
	uint8_t to_disk;		/* something was pushed */
	struct hast_direct direct;
	uint32_t *here;			/* active, and to be tried here before they go to disk */
	uint32_t nhere;
	uint8_t first;			/* a request was received */
};

/* ---- recv_secondary.c ---- */

/* Nothing holds it up any more. */
void recv_to_disk(struct hast_recv *r, uint32_t slot);

/* ---- recv_order.c ---- */

/* A request that is all there. */
void recv_order_submit(struct hast_recv *r, uint32_t slot);
/* The disk is through with it: those behind it that waited for it alone go. */
void recv_order_done(struct hast_recv *r, uint32_t slot);
/* What nothing holds up any more leaves the queue. */
void recv_order_run(struct hast_recv *r);

#endif
