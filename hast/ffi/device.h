/*
 * The ggate stage: what devices (NBD clients, the FUSE channel) and the sequencer have in between.
 *
 * A port is one source of requests with one descriptor. It turns bytes into requests (struct hast_req) and requests
 * back into bytes; what happens to a request is the same for every kind of port (request.c): it is cut into parts, one bio
 * each of at most slab_size bytes, a window of parts is kept under way, and the errors are joined.
 *
 * Invariants:
 * - a request is finished exactly once, when none of its parts is under way, also when its port is gone;
 * - a part's slot is released exactly once: when it is answered, or, for a read, when its data was sent;
 * - a port never holds more than `limit` slots, all NBD ports together never more than nclient less a
 *   reserve for FUSE, so that a client that stops reading or writing cannot starve the others;
 * - nothing is allocated per request.
 */
#ifndef HAST_DEVICE_H
#define HAST_DEVICE_H

#include <stddef.h>
#include <stdint.h>

#include "arena.h"

#define HAST_REQ_WINDOW 16u	/* parts of one request under way at once */

/* req.flags */
#define HAST_REQ_FUA 1		/* flush after the mutation, before the answer */
#define HAST_REQ_ZERO 2		/* WRITE of zeros without payload */
#define HAST_REQ_NOHOLE 4

struct hast_ggate;
struct hast_port;

struct hast_req {
	struct hast_port *port;		/* NULL: the port is gone, nobody to answer */
	struct hast_req *next;		/* free list; or the port's own list */
	struct hast_req *next_stalled;	/* waits for slots */
	uint32_t index;			/* in the table: bio.request */
	uint64_t cookie;		/* the client's name for it */
	uint64_t offset;		/* bytes */
	uint64_t length;		/* bytes */
	uint64_t issued;		/* bytes handed out to parts so far */
	uint64_t answered;		/* bytes whose parts are answered */
	uint32_t parts;			/* parts under way */
	int32_t error;			/* first error, positive errno */
	uint8_t cmd;			/* enum hast_cmd */
	uint8_t flags;
	uint8_t flushing;		/* the flush of a FUA request is under way */
	uint8_t finished;
	uint8_t aborted;		/* no more parts will be handed out */
	uint8_t stalled;		/* in the list of those who wait for slots */
	uint8_t urgent;			/* the port's: its reply is being sent, others wait behind it, so it may pass the limits */
	uint8_t is_nbd;
	uint32_t held;			/* slots it holds */
	uint32_t first;			/* READ: parts in order of offset, through bio.part_next; HAST_NONE */
	uint32_t last;
	uint64_t device[2];		/* the port's own */
};

struct hast_port_ops {
	/* The descriptor is readable (or has hung up). -errno closes the port. */
	int (*readable)(struct hast_ggate *g, struct hast_port *port);
	/* Room to write again; called only while want_write is set. */
	int (*writable)(struct hast_ggate *g, struct hast_port *port);
	/* Slots or requests are free again: go on where -EAGAIN stopped it. May equal readable. */
	int (*resume)(struct hast_ggate *g, struct hast_port *port);
	/* READ only: the head part is answered (hast_part_ready()) and may be sent; release it with hast_part_sent().
	   Called when an answer makes the head ready, again when it is and the request has to wait for slots, and not at all once
	   req->error is set. NULL: wait for finished. */
	void (*data)(struct hast_ggate *g, struct hast_port *port, struct hast_req *req);
	/* Everything is answered: queue the reply (req->error tells which), then call hast_req_end() when it needs the request
	   no more. READ parts not sent yet are still there. */
	void (*finished)(struct hast_ggate *g, struct hast_port *port, struct hast_req *req);
	/* End of a batch: bytes queued for the client go out now, in as few calls as possible. -errno closes. */
	int (*flush)(struct hast_ggate *g, struct hast_port *port);
	/* The port is being closed: drop claimed parts that were not submitted and free what hangs on it. Its
	   requests, its descriptor and its own memory (a port is the first member of one malloc'ed object) go after that. */
	void (*closed)(struct hast_ggate *g, struct hast_port *port);
};

struct hast_port {
	const struct hast_port_ops *ops;
	struct hast_port *next;		/* all ports of the stage */
	struct hast_port *next_dirty;	/* ports with something to flush */
	int fd;
	uint8_t is_fuse;
	uint8_t dirty;			/* in the list of ports to flush */
	uint8_t starved;		/* waits for slots or requests: see resume */
	uint8_t want_write;		/* EPOLLOUT is wanted */
	uint8_t paused;			/* EPOLLIN is not wanted */
	uint8_t dead;			/* to be closed at the end of the turn */
	uint8_t midway;			/* in the middle of a request: read on even while frozen */
	uint32_t armed;			/* the epoll events it is registered for */
	uint32_t slots;			/* held now */
	uint32_t limit;			/* at most */
	uint32_t reqs;			/* requests not ended */
	int error;			/* why it is dead: 0 or positive errno */
};

/* ---- requests: request.c ---- */

/* A request for this port, or NULL when the table is full (the port is then marked starved). */
struct hast_req *hast_req_new(struct hast_ggate *g, struct hast_port *port);
/* 0, or the errno to answer: EINVAL for what is out of range or not a multiple of 512, in one place for all devices. */
int hast_req_check(struct hast_ggate *g, uint8_t cmd, uint64_t offset, uint64_t length);
/* 1 for a DELETE that the component can do and the secondary can't: where it is but a hint it may be answered without being done. */
int hast_req_idle(const struct hast_ggate *g, uint8_t cmd);
/* READ, DELETE, FLUSH and WRITE with ZERO: starts the request; all further parts follow by themselves. */
void hast_req_start(struct hast_ggate *g, struct hast_req *req);
/* WRITE with payload: a slot for the part that starts at offset + issued. HAST_NONE: none to be had now, the port is marked
   starved. The payload goes to hast_part_data(), at most slab_size bytes. */
uint32_t hast_part_claim(struct hast_ggate *g, struct hast_req *req);
void *hast_part_data(struct hast_ggate *g, uint32_t slot);
/* The part has its length bytes (a multiple of 512): off it goes. After the last one the request finishes by itself.
   Also for all parts of a READ at once, by a device that has claimed the slots for them and does not call hast_req_start(). */
void hast_part_submit(struct hast_ggate *g, struct hast_req *req, uint32_t slot, uint64_t length);
/* A claimed part that is not going to be submitted (the client left in the middle of its payload). */
void hast_part_drop(struct hast_ggate *g, struct hast_req *req, uint32_t slot);
/* The head part of a READ when it is answered, else HAST_NONE. */
uint32_t hast_part_ready(struct hast_ggate *g, struct hast_req *req);
/* 1 for a request that waits for slots, more than half of which others hold: it may be that they never let go. */
int hast_req_crowded(const struct hast_ggate *g, const struct hast_req *req);
/* The head part of a READ has been sent or is not wanted. */
void hast_part_sent(struct hast_ggate *g, struct hast_req *req);
/* A slot for a part of a request that is not known yet (FUSE reads headers and payload in one call); the port is marked
   starved when there is none. It is given to a request with hast_part_adopt(), then submitted, or given back. */
uint32_t hast_port_claim(struct hast_ggate *g, struct hast_port *port);
void hast_port_unclaim(struct hast_ggate *g, struct hast_port *port, uint32_t slot);
void hast_part_adopt(struct hast_ggate *g, struct hast_req *req, uint32_t slot);
/* After finished: the request's remaining READ parts are released and the request is free again. */
void hast_req_end(struct hast_ggate *g, struct hast_req *req);
/* A write that is given up in the middle (protocol error): no more parts will come; it ends when those under way are answered. */
void hast_req_abort(struct hast_ggate *g, struct hast_req *req);

/* ---- the stage: ggate.c, port.c ---- */

struct hast_arena *hast_ggate_arena(struct hast_ggate *g);
/* 1 while no new request may be taken; a port has its resume() called when that is over. */
int hast_ggate_frozen(const struct hast_ggate *g);
/* A counter of the NBD clients: those that hold a slot whose payload is not complete. */
uint32_t *hast_ggate_filling(struct hast_ggate *g);
/* Registers the port and its descriptor (non-blocking; the stage owns it from now on). 0 or -errno. */
int hast_port_add(struct hast_ggate *g, struct hast_port *port);
/* Something is queued for this port: flush() is called at the end of the turn. */
void hast_port_dirty(struct hast_ggate *g, struct hast_port *port);
/* To be called after want_write or paused was changed. */
void hast_port_rearm(struct hast_ggate *g, struct hast_port *port);
/* The port is closed at the end of the turn; error 0: the client left in good order. */
void hast_port_kill(struct hast_ggate *g, struct hast_port *port, int error);


#endif
