/*
 * Requests of the primary, on the secondary, and their way through the disk. Invariants: conn.h.
 *
 * A request with a slot is in one of these: being filled; in the queue, behind a flush (or it is one) that waits or runs;
 * active, which is blocked by earlier ones that overlap or with the disk; being answered. When it may go to the disk is decided in
 * recv_order.c.
 */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>

#include "recv_secondary.h"
#include "trace.h"

static void
push(struct hast_recv *r, struct hast_ring *ring, uint32_t entry)
{
	if (hast_ring_push(ring, entry) != 1)
		r->broken = 1;
}

static void
push_disk(struct hast_recv *r, uint32_t slot)
{
	push(r, r->secondary->disk, slot);
	r->secondary->to_disk = 1;
}

/* ---- slots ---- */

static uint32_t
slot_take(struct hast_recv *r)
{
	struct recv_secondary *s = r->secondary;
	uint32_t slot;

	if (s->nfree == 0)
		return HAST_NONE;
	slot = s->free[--s->nfree];
	s->item[slot].state = FILLING;
	__atomic_store_n(&s->seq->nfree, s->nfree, __ATOMIC_RELAXED);
	return slot;
}

static void
slot_free(struct recv_secondary *s, uint32_t slot)
{
	s->item[slot].state = FREE;
	/* Last in, first out: the slab used last is the one in the processor's cache. */
	s->free[s->nfree++] = slot;
	__atomic_store_n(&s->seq->nfree, s->nfree, __ATOMIC_RELAXED);
}

static void
answer(struct hast_recv *r, uint32_t slot)
{
	r->secondary->item[slot].state = REPLY;
	push(r, r->secondary->send, slot);
}

void
recv_to_disk(struct hast_recv *r, uint32_t slot)
{
	struct recv_secondary *s = r->secondary;

	s->item[slot].state = DISK;
	if (s->direct.fd >= 0 && hast_direct_may(&s->bio[slot]))
		s->here[s->nhere++] = slot;
	else
		push_disk(r, slot);
}

/* ---- requests ---- */

static void
count_request(struct hast_seq_stats *st, uint8_t cmd, int failed)
{
	switch (cmd) {
	case HAST_CMD_READ:
		conn_count(failed ? &st->read_error : &st->read, 1);
		break;
	case HAST_CMD_WRITE:
		conn_count(failed ? &st->write_error : &st->write, 1);
		break;
	case HAST_CMD_DELETE:
		conn_count(failed ? &st->delete_error : &st->del, 1);
		break;
	case HAST_CMD_FLUSH:
		conn_count(failed ? &st->flush_error : &st->flush, 1);
		break;
	}
}

static void
describe(struct hast_recv *r, struct hast_bio *bio, const struct hast_wire_request *request)
{
	int flush = request->cmd == HAST_WIRE_FLUSH;

	bio->cmd = request->cmd;
	bio->flags = 0;
	if (request->data.compression == HAST_WIRE_COMPRESSION_HOLE)
		bio->flags |= HAST_BIO_ZERO;
	/* A peer of version 1 does not know the element, whatever it means by it. */
	if (request->cmd == HAST_WIRE_WRITE && request->memsync && r->c.opt.version >= CONN_MEMSYNC_VERSION)
		bio->flags |= HAST_BIO_MEMSYNC;
	bio->offset = flush ? 0 : request->offset;
	bio->length = flush ? 0 : request->length;
	bio->seq = request->seq;
	bio->error[HAST_LOCAL] = 0;
}

/* A request that is not possible: answered, and after a write nobody knows where the next message begins. */
static enum recv_message
refuse(struct hast_recv *r, uint32_t slot, const struct hast_wire_request *request)
{
	struct hast_bio *bio = &r->secondary->bio[slot];

	bio->cmd = HAST_CMD_NONE;
	bio->seq = request->seq;
	bio->error[HAST_LOCAL] = EINVAL;
	answer(r, slot);
	if (request->data.size == 0)
		return RECV_TAKEN;
	return (enum recv_message)conn_lost(&r->c, EPROTO, "the primary sent a write that is not possible here");
}

/* Finds a slot for a request that is all there, or whose data goes past the buffer. */
static enum recv_message
admit(struct hast_recv *r, const struct hast_wire_request *request, int error)
{
	struct recv_secondary *s = r->secondary;
	uint32_t slot = slot_take(r);

	r->starved = slot == HAST_NONE;
	if (r->starved)
		return RECV_LATER;
	if (error != 0)
		return refuse(r, slot, request);
	describe(r, &s->bio[slot], request);
	count_request(&s->seq->stats, request->cmd, 0);
	if (request->cmd != HAST_WIRE_WRITE) {
		hast_trace(r->c.arena, HAST_STAGE_RECV, HAST_TRACE_IN, request->seq);
		recv_order_submit(r, slot);
		return RECV_TAKEN;
	}
	r->info = request->data;
	r->slot = slot;
	r->raw = request->data.compression == HAST_WIRE_COMPRESSION_NONE ? hast_arena_slab(r->c.arena, slot) : r->scratch;
	return RECV_DATA;
}

static enum recv_message
secondary_message(struct hast_recv *r, const uint8_t *nv, uint32_t size, uint32_t behind)
{
	const struct hast_conn_options *opt = &r->c.opt;
	struct recv_secondary *s = r->secondary;
	struct hast_wire_request request;
	int error = hast_wire_decode_request(nv, size, &request);

	r->starved = 0;
	if (error != 0)
		return (enum recv_message)conn_lost(&r->c, EPROTO, "the primary sent a request that cannot be read: %s",
		    hast_wire_error_text(error));
	if (request.cmd == HAST_WIRE_KEEPALIVE)
		return RECV_TAKEN;
	error = hast_wire_check_request(&request, r->c.arena->geo.datasize, opt->sector, opt->max_io);
	if (error == 0 && recv_gathers(request.data.size, behind))
		return RECV_LATER;
	if (!s->first) {
		s->first = r->event = 1;
		return RECV_LATER;
	}
	return admit(r, &request, error);
}

/* How many writes the primary was told, or is about to be told, that they are in memory, and that are not on the disk: for the worker,
   which outlives this stage. */
static void
unstored(struct hast_recv *r, uint64_t more)
{
	uint64_t *count = &r->c.line->extra[1];

	__atomic_store_n(count, *count + more, __ATOMIC_SEQ_CST);
}

static enum recv_message
secondary_payload(struct hast_recv *r, const uint8_t *wire)
{
	struct recv_secondary *s = r->secondary;
	struct hast_bio *bio = &s->bio[r->slot];
	uint8_t *slab = (bio->flags & HAST_BIO_ZERO) != 0 ? NULL : hast_arena_slab(r->c.arena, r->slot);

	if (hast_transform_unpack(r->transform, &r->info, wire, slab, (uint32_t)bio->length) != 0) {
		slot_free(s, r->slot);
		return (enum recv_message)conn_lost(&r->c, EBADMSG,
		    "data from the primary was damaged on its way: its checksum or its length is not what was announced");
	}
	hast_trace(r->c.arena, HAST_STAGE_RECV, HAST_TRACE_IN, bio->seq);
	if ((bio->flags & HAST_BIO_MEMSYNC) != 0) {
		unstored(r, 1);
		push(r, s->send, r->slot | HAST_EVENT_RECEIVED);
	}
	recv_order_submit(r, r->slot);
	return r->broken ? RECV_END : RECV_TAKEN;
}

static void
secondary_give_up(struct hast_recv *r)
{
	slot_free(r->secondary, r->slot);
}

/* ---- rings ---- */

static void
disk_done(struct hast_recv *r, uint32_t slot)
{
	struct recv_secondary *s = r->secondary;
	struct hast_bio *bio = &s->bio[slot];

	hast_trace(r->c.arena, HAST_STAGE_RECV, HAST_TRACE_OUT, bio->seq);
	/* The disk has told the worker that what was in its cache is lost, and says so only once. */
	if (bio->cmd == HAST_CMD_FLUSH && bio->error[HAST_LOCAL] == 0 &&
	    __atomic_load_n(&s->seq->loss, __ATOMIC_ACQUIRE) != HAST_SEQ_LOSS_NONE)
		bio->error[HAST_LOCAL] = EIO;
	if (bio->error[HAST_LOCAL] != 0)
		count_request(&s->seq->stats, s->item[slot].cmd, 1);
	else if ((bio->flags & HAST_BIO_MEMSYNC) != 0)
		unstored(r, (uint64_t)-1);
	recv_order_done(r, slot);
	answer(r, slot);
	recv_order_run(r);
}

/* The next slot in a ring that has to be in this state. 1, 0 when there is none, and when r->broken. */
static int
next_slot(struct hast_recv *r, struct hast_ring *ring, uint8_t state, uint32_t *slot)
{
	int got = hast_ring_pop(ring, slot);

	if (got == 0)
		return 0;
	if (got == 1 && *slot < r->secondary->nslots && r->secondary->item[*slot].state == state)
		return 1;
	r->broken = 1;
	return 0;
}

static void
secondary_rings(struct hast_recv *r)
{
	struct recv_secondary *s = r->secondary;
	uint32_t slot;

	while (next_slot(r, s->send_done, REPLY, &slot))
		slot_free(s, slot);
	while (next_slot(r, s->disk_done, DISK, &slot))
		disk_done(r, slot);
	if (s->nfree > 0)
		r->starved = 0;
}

/* What may be done here. One that is over may let others go, which come to the end of the list. */
static void
do_here(struct hast_recv *r)
{
	struct recv_secondary *s = r->secondary;

	for (uint32_t i = 0; i < s->nhere; i++) {
		uint32_t slot = s->here[i];

		hast_trace(r->c.arena, HAST_STAGE_RECV, HAST_TRACE_START, s->bio[slot].seq);
		if (!hast_direct_try(&s->direct, &s->bio[slot], hast_arena_slab(r->c.arena, slot))) {
			push_disk(r, slot);
			continue;
		}
		hast_trace(r->c.arena, HAST_STAGE_RECV, HAST_TRACE_DID, s->bio[slot].seq);
		disk_done(r, slot);
	}
	s->nhere = 0;
}

static int
secondary_bells(struct hast_recv *r)
{
	struct recv_secondary *s = r->secondary;
	struct hast_doorbell *bell = r->c.arena->bell;
	int error = 0;

	do_here(r);
	__atomic_store_n(&s->seq->inuse, s->nslots - s->nfree, __ATOMIC_RELAXED);
	if (s->to_disk)
		error = hast_doorbell_ring(&bell[HAST_STAGE_DISK], r->c.opt.disk_bell);
	s->to_disk = 0;
	/* Where the disk stage is to run: on this processor a wake-up costs a tenth of what it costs across. */
	__atomic_store_n(&r->c.line->extra[0], (uint64_t)(sched_getcpu() + 1), __ATOMIC_RELAXED);
	return error;
}

static int
secondary_ready(struct hast_recv *r)
{
	return hast_ring_ready(r->secondary->disk_done) != 0 ||
	    (r->starved && hast_ring_ready(r->secondary->send_done) != 0);
}

static int
secondary_expecting(const struct hast_recv *r)
{
	return !r->starved;
}

static int
secondary_idle(const struct hast_recv *r)
{
	const struct recv_secondary *s = r->secondary;

	return s->nactive == 0 && s->flushing == HAST_NONE && s->queue_head == HAST_NONE && !r->starved;
}

/* ---- life ---- */

static void
secondary_free(struct hast_recv *r)
{
	struct recv_secondary *s = r->secondary;

	if (s == NULL)
		return;
	free(s->item);
	free(s->free);
	free(s->active);
	free(s->here);
	free(s);
}

static int
options_ok(const struct hast_arena *a, const struct hast_conn_options *opt)
{
	return opt->sector >= HAST_SECTOR && (opt->sector & (opt->sector - 1)) == 0 && opt->max_io >= opt->sector &&
	    opt->max_io <= a->geo.slab_size;
}

static void
attach(struct recv_secondary *s, struct hast_arena *a)
{
	s->bio = hast_arena_bio(a, 0);
	s->seq = hast_arena_seq(a);
	s->disk = hast_arena_ring(a, HAST_RING_DISK);
	s->disk_done = hast_arena_ring(a, HAST_RING_DISK_DONE);
	s->send = hast_arena_ring(a, HAST_RING_SEND);
	s->send_done = hast_arena_ring(a, HAST_RING_SEND_DONE);
	s->queue_head = s->flushing = HAST_NONE;
	hast_direct_init(&s->direct, a, -1);
}

int
recv_secondary_new(struct hast_recv *r)
{
	struct hast_arena *a = r->c.arena;
	struct recv_secondary *s;

	if (!options_ok(a, &r->c.opt))
		return -EINVAL;
	s = r->secondary = calloc(1, sizeof(*s));
	if (s == NULL)
		return -ENOMEM;
	s->nslots = a->geo.nclient + a->geo.nsync;
	s->item = calloc(s->nslots, sizeof(*s->item));
	s->free = calloc(s->nslots, sizeof(*s->free));
	s->active = calloc(s->nslots, sizeof(*s->active));
	s->here = calloc(s->nslots, sizeof(*s->here));
	if (s->item == NULL || s->free == NULL || s->active == NULL || s->here == NULL)
		return -ENOMEM;
	attach(s, a);
	/* From the top down, so that the first slots, and only they, are used while there is little to do. */
	for (uint32_t slot = s->nslots; slot-- > 0;)
		slot_free(s, slot);
	return 0;
}

const struct recv_role recv_secondary_role = {
	.message = secondary_message,
	.payload = secondary_payload,
	.give_up = secondary_give_up,
	.rings = secondary_rings,
	.bells = secondary_bells,
	.ready = secondary_ready,
	.expecting = secondary_expecting,
	.idle = secondary_idle,
	.free = secondary_free,
};

void
recv_direct(struct hast_recv *r, int fd)
{
	if (r->secondary != NULL)
		hast_direct_init(&r->secondary->direct, r->c.arena, fd);
}

uint32_t
recv_free_slots(const struct hast_recv *r)
{
	return r->secondary != NULL ? r->secondary->nfree : 0;
}
