/*
 * Replies of the secondary, on the primary. Invariants: conn.h.
 *
 * bio.pending and bio.seq are the sequencer's, who may not have taken an answer that was given to it a moment ago: what was
 * answered already is therefore remembered here. A seq never comes twice, so remembering the last one of each slot is enough.
 *
 * How long a request has been with the secondary is known from looking at all of them once in a tick: nothing is measured when
 * one is sent or answered.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "conn_internal.h"
#include "seq.h"
#include "trace.h"

struct recv_primary {
	struct hast_seq *seq;
	struct hast_ring *done_ring;
	struct answered *answered;
	int64_t looked;			/* ms: when all that is outstanding was looked at */
	uint8_t pushed;
};

/* The last seq of a slot that was answered, that was said to be received, and that was seen to be outstanding. */
struct answered {
	uint64_t final;
	uint64_t received;
	uint64_t seen;
	int64_t since;			/* ms: since when it is seen */
};

static enum recv_message
push(struct hast_recv *r, uint32_t entry)
{
	if (hast_ring_push(r->primary->done_ring, entry) != 1) {
		r->broken = 1;
		return RECV_END;
	}
	r->primary->pushed = 1;
	return RECV_TAKEN;
}

/* FreeBSD's hastd passes on what a disk without a cache, or a file, says to a flush. */
static int
knows_no_flush(const struct hast_recv *r, const struct hast_bio *bio, int error)
{
	return r->c.opt.foreign && bio->cmd == HAST_CMD_FLUSH &&
	    (error == EOPNOTSUPP || error == ENOTTY || error == ENOSYS || error == ENODEV);
}

static enum recv_message
complete(struct hast_recv *r, uint32_t slot, struct hast_bio *bio, int error)
{
	hast_trace(r->c.arena, HAST_STAGE_RECV, HAST_TRACE_IN, bio->seq);
	if (knows_no_flush(r, bio, error)) {
		r->primary->seq->no_flushes = 1;
		error = 0;
	}
	bio->error[HAST_REMOTE] = error;
	r->primary->answered[slot].final = bio->seq;
	return push(r, slot);
}

/* The bio that the secondary may answer with this seq, or NULL. */
static struct hast_bio *
outstanding(struct hast_recv *r, uint64_t seq)
{
	uint32_t slot = seq & 0xffff;
	struct hast_bio *bio;

	if (slot >= r->c.nslots || r->primary->answered[slot].final == seq)
		return NULL;
	bio = hast_arena_bio(r->c.arena, slot);
	if (__atomic_load_n(&bio->sent, __ATOMIC_ACQUIRE) != seq || __atomic_load_n(&bio->seq, __ATOMIC_RELAXED) != seq ||
	    (__atomic_load_n(&bio->pending, __ATOMIC_RELAXED) & 1u << HAST_REMOTE) == 0)
		return NULL;
	return bio;
}

static enum recv_message
refuse(struct hast_recv *r, const char *what, uint64_t seq)
{
	return (enum recv_message)conn_lost(&r->c, EPROTO, "the secondary sent a reply that cannot be: %s (seq %" PRIu64 ")",
	    what, seq);
}

static enum recv_message
received(struct hast_recv *r, const struct hast_wire_reply *reply, uint32_t slot, const struct hast_bio *bio)
{
	struct answered *a = &r->primary->answered[slot];

	if ((bio->flags & HAST_BIO_MEMSYNC) == 0 || r->c.opt.version < CONN_MEMSYNC_VERSION)
		return refuse(r, "received, and nobody asked for that", reply->seq);
	if (a->received == reply->seq)
		return refuse(r, "received twice", reply->seq);
	if (reply->error != 0 || reply->data.size != 0)
		return refuse(r, "received, with an error or with data", reply->seq);
	hast_trace(r->c.arena, HAST_STAGE_RECV, HAST_TRACE_FIRST, reply->seq);
	a->received = reply->seq;
	return push(r, slot | HAST_EVENT_RECEIVED);
}

static enum recv_message
primary_message(struct hast_recv *r, const uint8_t *nv, uint32_t size, uint32_t behind)
{
	struct hast_wire_reply reply;
	struct hast_bio *bio;
	uint32_t slot;
	int error = hast_wire_decode_reply(nv, size, &reply);

	if (error != 0)
		return (enum recv_message)conn_lost(&r->c, EPROTO, "the secondary sent a reply that cannot be read: %s",
		    hast_wire_error_text(error));
	slot = reply.seq & 0xffff;
	bio = outstanding(r, reply.seq);
	if (bio == NULL)
		return refuse(r, "the secondary has no such request", reply.seq);
	if (reply.received)
		return received(r, &reply, slot, bio);
	if (bio->cmd != HAST_CMD_READ || reply.error != 0) {
		if (reply.data.size != 0)
			return refuse(r, "data, and nobody asked for that", reply.seq);
		return complete(r, slot, bio, reply.error);
	}
	if (bio->length > r->c.arena->geo.slab_size || !hast_transform_fits(&reply.data, bio->length))
		return refuse(r, "the data of the read is not as long as it must be", reply.seq);
	if (recv_gathers(reply.data.size, behind))
		return RECV_LATER;
	r->info = reply.data;
	r->slot = slot;
	r->raw = reply.data.compression == HAST_WIRE_COMPRESSION_NONE ? hast_arena_slab(r->c.arena, slot) : r->scratch;
	return RECV_DATA;
}

static enum recv_message
primary_payload(struct hast_recv *r, const uint8_t *wire)
{
	struct hast_bio *bio = hast_arena_bio(r->c.arena, r->slot);

	if (hast_transform_unpack(r->transform, &r->info, wire, hast_arena_slab(r->c.arena, r->slot),
	    (uint32_t)bio->length) != 0)
		return (enum recv_message)conn_lost(&r->c, EBADMSG,
		    "data from the secondary was damaged on its way: its checksum or its length is not what was announced");
	return complete(r, r->slot, bio, 0);
}

static void
primary_give_up(struct hast_recv *r)
{
	(void)r;		/* the bio is the sequencer's, who will be told that the secondary is gone */
}

static void
primary_rings(struct hast_recv *r)
{
	(void)r;
}

static int
primary_bells(struct hast_recv *r)
{
	if (!r->primary->pushed)
		return 0;
	r->primary->pushed = 0;
	if (r->c.opt.seq_bell == -1)
		return 0;
	return hast_doorbell_ring(&r->c.arena->bell[HAST_STAGE_GGATE], r->c.opt.seq_bell);
}

static int
primary_ready(struct hast_recv *r)
{
	(void)r;
	return 0;
}

static int
primary_expecting(const struct hast_recv *r)
{
	return __atomic_load_n(&r->primary->seq->nremote, __ATOMIC_RELAXED) > 0;
}

static int
primary_late(struct hast_recv *r)
{
	struct recv_primary *p = r->primary;
	uint32_t limit = r->c.opt.timeout_ms;
	int64_t now = conn_now(), gap = now - p->looked;
	int paused = gap >= (int64_t)(limit / 2);	/* several ticks were left out */

	if (gap < conn_tick(limit))
		return 0;
	p->looked = now;
	for (uint32_t slot = 0; slot < r->c.nslots; slot++) {
		struct answered *a = &p->answered[slot];
		uint64_t seq = __atomic_load_n(&hast_arena_bio(r->c.arena, slot)->sent, __ATOMIC_ACQUIRE);

		if (seq == 0 || outstanding(r, seq) == NULL)
			continue;
		if (a->seen != seq) {
			a->seen = seq;
			a->since = now;
		} else if (paused) {
			/* It was this process, or its machine, that did nothing: what the secondary has answered is not read yet. */
			a->since += gap;
		} else if (now - a->since >= (int64_t)limit) {
			return 1;
		}
	}
	return 0;
}

static int
primary_idle(const struct hast_recv *r)
{
	(void)r;
	return 1;
}

static void
primary_free(struct hast_recv *r)
{
	if (r->primary != NULL)
		free(r->primary->answered);
	free(r->primary);
}

int
recv_primary_new(struct hast_recv *r)
{
	r->primary = calloc(1, sizeof(*r->primary));
	if (r->primary == NULL)
		return -ENOMEM;
	r->primary->answered = calloc(r->c.nslots, sizeof(*r->primary->answered));
	if (r->primary->answered == NULL)
		return -ENOMEM;
	r->primary->seq = hast_arena_seq(r->c.arena);
	r->primary->done_ring = hast_arena_ring(r->c.arena, HAST_RING_RECV_DONE);
	return 0;
}

const struct recv_role recv_primary_role = {
	.message = primary_message,
	.payload = primary_payload,
	.give_up = primary_give_up,
	.rings = primary_rings,
	.bells = primary_bells,
	.ready = primary_ready,
	.expecting = primary_expecting,
	.late = primary_late,
	.idle = primary_idle,
	.free = primary_free,
};
