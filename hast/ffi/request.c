/* Requests: cut into parts, kept under way, joined again. The invariants stand in device.h. */
#include <errno.h>
#include <string.h>

#include "ggate_internal.h"
#include "trace.h"

/* Bytes, and how many of a request at a time: where zeros have to be written for them, each has to be done well before the
   connection's timeout. */
#define DELETE_PART ((uint64_t)64 << 20)
#define DELETE_WINDOW 2u

static void progress(struct hast_ggate *g, struct hast_req *req);

static struct hast_bio *
bio_at(struct hast_ggate *g, uint32_t slot)
{
	return hast_arena_bio(g->arena, slot);
}

void
request_init(struct hast_ggate *g)
{
	for (uint32_t i = GGATE_REQS; i-- > 0;) {
		g->req[i].index = i;
		g->req[i].next = g->req_free;
		g->req_free = &g->req[i];
	}
}

struct hast_arena *
hast_ggate_arena(struct hast_ggate *g)
{
	return g->arena;
}

struct hast_req *
hast_req_new(struct hast_ggate *g, struct hast_port *port)
{
	struct hast_req *req = g->req_free;
	uint32_t index;

	if (req == NULL || port->reqs >= GGATE_PORT_REQS ||
	    (!port->is_fuse && port->reqs >= GGATE_REQS - GGATE_FUSE_REQS - g->nbd_reqs)) {
		port_starve(g, port);
		return NULL;
	}
	g->req_free = req->next;
	index = req->index;
	memset(req, 0, sizeof(*req));
	req->index = index;
	req->port = port;
	req->is_nbd = !port->is_fuse;
	req->first = req->last = HAST_NONE;
	g->nbd_reqs += req->is_nbd;
	g->nreqs++;
	port->reqs++;
	return req;
}

int
hast_req_check(struct hast_ggate *g, uint8_t cmd, uint64_t offset, uint64_t length)
{
	uint64_t size = g->arena->geo.datasize;

	if (cmd == HAST_CMD_FLUSH)
		return 0;
	if (cmd == HAST_CMD_DELETE && !g->deletes)
		return EOPNOTSUPP;
	if (length == 0 || (offset | length) % HAST_SECTOR != 0)
		return EINVAL;
	if (length > size || offset > size - length)
		return EINVAL;
	return cmd == HAST_CMD_DELETE && g->seq->no_deletes ? EOPNOTSUPP : 0;
}

int
hast_req_idle(const struct hast_ggate *g, uint8_t cmd)
{
	return cmd == HAST_CMD_DELETE && g->deletes && g->seq->no_deletes;
}

/* ---- slots ---- */

/* A client may hold as many slots (and requests) as are left over for others: so each of several that never let go gets only half of what
   the one before it left, and there is something for the next. */
static int
may_claim(const struct hast_ggate *g, const struct hast_port *port)
{
	return port->is_fuse ||
	    (port->slots < port->limit && g->nbd_slots < g->nbd_slots_max &&
	    port->slots < g->nbd_slots_max - g->nbd_slots);
}

static void
count_slot(struct hast_ggate *g, struct hast_req *req, int by)
{
	req->held += (uint32_t)by;
	if (req->port != NULL)
		req->port->slots += (uint32_t)by;
	if (req->is_nbd)
		g->nbd_slots += (uint32_t)by;
}

/* A slot for the request itself, within the limits of its port, or past them when others wait behind it and it
   has nothing at all. */
static uint32_t
request_claim(struct hast_ggate *g, struct hast_req *req)
{
	uint32_t slot;

	if (req->port != NULL && !may_claim(g, req->port) && !(req->urgent && req->held == 0))
		return HAST_NONE;
	slot = hast_seq_claim(g->arena);
	if (slot == HAST_NONE)
		return HAST_NONE;
	bio_at(g, slot)->request = req->index;
	bio_at(g, slot)->part_next = HAST_NONE;
	count_slot(g, req, 1);
	return slot;
}

static void
request_release(struct hast_ggate *g, struct hast_req *req, uint32_t slot)
{
	count_slot(g, req, -1);
	hast_seq_release(g->arena, slot);
	g->freed = 1;
}

uint32_t
hast_port_claim(struct hast_ggate *g, struct hast_port *port)
{
	uint32_t slot = may_claim(g, port) ? hast_seq_claim(g->arena) : HAST_NONE;

	if (slot == HAST_NONE) {
		port_starve(g, port);
		return HAST_NONE;
	}
	bio_at(g, slot)->request = HAST_NONE;
	bio_at(g, slot)->part_next = HAST_NONE;
	port->slots++;
	g->nbd_slots += !port->is_fuse;
	return slot;
}

void
hast_port_unclaim(struct hast_ggate *g, struct hast_port *port, uint32_t slot)
{
	port->slots--;
	g->nbd_slots -= !port->is_fuse;
	hast_seq_release(g->arena, slot);
	g->freed = 1;
}

void
hast_part_adopt(struct hast_ggate *g, struct hast_req *req, uint32_t slot)
{
	bio_at(g, slot)->request = req->index;
	req->held++;
}

uint32_t
hast_part_claim(struct hast_ggate *g, struct hast_req *req)
{
	uint32_t slot = request_claim(g, req);

	if (slot == HAST_NONE && req->port != NULL)
		port_starve(g, req->port);
	return slot;
}

void *
hast_part_data(struct hast_ggate *g, uint32_t slot)
{
	return hast_arena_slab(g->arena, slot);
}

/* ---- parts go out ---- */

static void
submit_part(struct hast_ggate *g, struct hast_req *req, uint32_t slot, uint8_t cmd, uint64_t length)
{
	struct hast_bio *bio = bio_at(g, slot);

	bio->cmd = cmd;
	bio->flags = 0;
	if (cmd == HAST_CMD_WRITE && (req->flags & HAST_REQ_ZERO) != 0)
		bio->flags = HAST_BIO_ZERO | ((req->flags & HAST_REQ_NOHOLE) != 0 ? HAST_BIO_NOHOLE : 0);
	bio->offset = cmd == HAST_CMD_FLUSH ? 0 : req->offset + req->issued;
	bio->length = length;
	req->issued += length;
	req->parts++;
	hast_trace(g->arena, HAST_STAGE_GGATE, HAST_TRACE_ADMIT, slot);
	if (hast_seq_submit(g->arena, slot) != 0) {
		/* Only a device that skipped hast_req_check() gets here. */
		req->parts--;
		req->aborted = 1;
		if (req->error == 0)
			req->error = EINVAL;
		request_release(g, req, slot);
		return;
	}
	hast_trace(g->arena, HAST_STAGE_GGATE, HAST_TRACE_IN, bio->seq);
	if (cmd != HAST_CMD_READ)
		return;
	if (req->first == HAST_NONE)
		req->first = slot;
	else
		bio_at(g, req->last)->part_next = slot;
	req->last = slot;
}

static void
stall(struct hast_ggate *g, struct hast_req *req)
{
	if (req->stalled)
		return;
	req->stalled = 1;
	req->next_stalled = NULL;
	if (g->stalled_head == NULL)
		g->stalled_head = req;
	else
		g->stalled_tail->next_stalled = req;
	g->stalled_tail = req;
}

static uint64_t
part_length(const struct hast_ggate *g, const struct hast_req *req)
{
	uint64_t most = req->cmd == HAST_CMD_DELETE ? DELETE_PART : g->arena->geo.slab_size;
	uint64_t left = req->length - req->issued;

	return left < most ? left : most;
}

/* Hands out what can be handed out without the device. */
static void
issue(struct hast_ggate *g, struct hast_req *req)
{
	int by_device = req->cmd == HAST_CMD_WRITE && (req->flags & HAST_REQ_ZERO) == 0;
	uint32_t window = req->cmd == HAST_CMD_DELETE ? DELETE_WINDOW : HAST_REQ_WINDOW;

	while (!by_device && !req->aborted && req->error == 0 && req->issued < req->length &&
	    req->parts < window) {
		uint32_t slot = request_claim(g, req);

		if (slot == HAST_NONE) {
			stall(g, req);
			return;
		}
		submit_part(g, req, slot, req->cmd, part_length(g, req));
	}
}

static int
wants_flush(const struct hast_req *req)
{
	if (req->error != 0 || req->aborted || req->flushing == 2)
		return 0;
	return req->cmd == HAST_CMD_FLUSH || (req->flags & HAST_REQ_FUA) != 0;
}

/* Nothing of the request is under way: flush, if that is still owed, else it is finished. */
static void
conclude(struct hast_ggate *g, struct hast_req *req)
{
	if (req->parts > 0 || req->finished)
		return;
	if (req->error == 0 && !req->aborted && req->issued < req->length)
		return;
	if (wants_flush(req)) {
		uint32_t slot = request_claim(g, req);

		if (slot == HAST_NONE) {
			stall(g, req);
			return;
		}
		req->flushing = 1;
		submit_part(g, req, slot, HAST_CMD_FLUSH, 0);
		return;
	}
	req->finished = 1;
	if (req->port != NULL)
		req->port->ops->finished(g, req->port, req);
	else
		hast_req_end(g, req);
}

static void
progress(struct hast_ggate *g, struct hast_req *req)
{
	issue(g, req);
	if (!req->stalled)
		conclude(g, req);
}

void
hast_req_start(struct hast_ggate *g, struct hast_req *req)
{
	if (req->cmd == HAST_CMD_FLUSH)
		req->offset = req->length = 0;
	progress(g, req);
}

void
hast_part_submit(struct hast_ggate *g, struct hast_req *req, uint32_t slot, uint64_t length)
{
	submit_part(g, req, slot, req->cmd, length);
	conclude(g, req);
}

void
hast_part_drop(struct hast_ggate *g, struct hast_req *req, uint32_t slot)
{
	request_release(g, req, slot);
}

void
hast_req_abort(struct hast_ggate *g, struct hast_req *req)
{
	req->aborted = 1;
	if (req->error == 0)
		req->error = ECONNABORTED;
	conclude(g, req);
}

/* ---- parts come back ---- */

uint32_t
hast_part_ready(struct hast_ggate *g, struct hast_req *req)
{
	return req->first != HAST_NONE && bio_at(g, req->first)->acked ? req->first : HAST_NONE;
}

int
hast_req_crowded(const struct hast_ggate *g, const struct hast_req *req)
{
	return req->stalled && req->port != NULL && (g->nbd_slots - req->port->slots) * 2 > g->nbd_slots_max;
}

void
hast_part_sent(struct hast_ggate *g, struct hast_req *req)
{
	uint32_t slot = req->first;

	if (slot == HAST_NONE)
		return;
	req->first = bio_at(g, slot)->part_next;
	if (req->first == HAST_NONE)
		req->last = HAST_NONE;
	request_release(g, req, slot);
}

static void
say_data(struct hast_ggate *g, struct hast_req *req)
{
	if (req->port != NULL && req->port->ops->data != NULL)
		req->port->ops->data(g, req->port, req);
}

static void
part_answered(struct hast_ggate *g, uint32_t slot)
{
	struct hast_bio *bio = bio_at(g, slot);
	struct hast_req *req = &g->req[bio->request];

	hast_trace(g->arena, HAST_STAGE_GGATE, HAST_TRACE_OUT, bio->seq);
	req->parts--;
	req->answered += bio->length;
	if (bio->result != 0 && req->error == 0)
		req->error = bio->result;
	if (bio->cmd == HAST_CMD_FLUSH)
		req->flushing = 2;
	if (bio->cmd != HAST_CMD_READ)
		request_release(g, req, slot);
	else if (req->error == 0 && req->first == slot)
		say_data(g, req);
	/* A request that has failed waits for no slot any more, and nobody else may be there to free one. */
	if (req->error != 0 && req->stalled)
		g->freed = 1;
	progress(g, req);
}

int
request_answers(struct hast_ggate *g)
{
	uint32_t slot;
	int n = 0;

	while ((slot = hast_seq_acked(g->arena)) != HAST_NONE) {
		part_answered(g, slot);
		n++;
	}
	return n;
}

void
hast_req_end(struct hast_ggate *g, struct hast_req *req)
{
	while (req->first != HAST_NONE)
		hast_part_sent(g, req);
	if (req->port != NULL)
		req->port->reqs--;
	g->nbd_reqs -= req->is_nbd;
	g->nreqs--;
	g->freed = 1;
	req->port = NULL;
	req->next = g->req_free;
	g->req_free = req;
}

void
request_unstall(struct hast_ggate *g)
{
	struct hast_req *req = g->stalled_head;

	g->stalled_head = g->stalled_tail = NULL;
	while (req != NULL) {
		struct hast_req *next = req->next_stalled;

		req->stalled = 0;
		progress(g, req);
		if (req->stalled && req->error == 0 && hast_part_ready(g, req) != HAST_NONE)
			say_data(g, req);
		req = next;
	}
}

void
request_orphan(struct hast_ggate *g, struct hast_port *port)
{
	for (uint32_t i = 0; i < GGATE_REQS; i++) {
		struct hast_req *req = &g->req[i];

		if (req->port != port)
			continue;
		port->slots -= req->held;
		port->reqs--;
		req->port = NULL;
		if (req->finished) {
			hast_req_end(g, req);
		} else if (!req->stalled) {
			hast_req_abort(g, req);
		} else {
			/* request_unstall() ends it, which it comes to in this turn, whether anybody frees a slot or not. */
			req->aborted = 1;
			g->freed = 1;
		}
	}
}
