/*
 * The sequencer's way in and out: what is submitted, what has completed and what a read does then, and the secondary that comes
 * and goes. Invariants: seq.h.
 */
#include "seq.h"

#include <errno.h>

#include "direct.h"
#include "seq_internal.h"

#define LOCAL (1u << HAST_LOCAL)
#define REMOTE (1u << HAST_REMOTE)

/* ---- small things ---- */

struct hast_seq *
hast_arena_seq(struct hast_arena *a)
{
	return seq_of(a);
}

/* There is room for every slot that can be in a ring, so a full one means that its consumer has damaged it. */
void
seq_push(struct hast_arena *a, int ring, uint32_t slot)
{
	if (!hast_ring_push(hast_arena_ring(a, (uint32_t)ring), slot))
		seq_of(a)->broken = 1;
	seq_of(a)->pushed |= 1u << ring;
}

void
seq_push_local(struct hast_arena *a, const struct hast_bio *bio)
{
	seq_push(a, seq_of(a)->direct && hast_direct_may(bio) ? HAST_RING_DIRECT : HAST_RING_DISK, bio->slot);
}

void
hast_seq_to_disk(struct hast_arena *a, uint32_t slot)
{
	seq_push(a, HAST_RING_DISK, slot);
}

void
seq_push_remote(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	bio->pending |= REMOTE;
	/* Read by recv, which watches that the secondary goes on answering. */
	__atomic_store_n(&s->nremote, s->nremote + 1, __ATOMIC_RELAXED);
	seq_push(a, HAST_RING_SEND, bio->slot);
}

void
seq_raise(struct hast_arena *a, uint32_t event)
{
	struct hast_seq *s = seq_of(a);

	if ((s->asked & event) == 0) {
		s->asked |= event;
		s->events |= event;
	}
}

void
seq_list_append(struct hast_arena *a, uint32_t *head, uint32_t *tail, uint32_t slot)
{
	bio_of(a, slot)->next = HAST_NONE;
	if (*head == HAST_NONE)
		*head = slot;
	else
		bio_of(a, *tail)->next = slot;
	*tail = slot;
}

void
hast_seq_init(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	s->grant_head = s->mapwait_head = s->flushq_head = HAST_NONE;
	s->flush_running = s->durable_head = HAST_NONE;
	s->epoch = 1;
	/* Nobody knows what was written before this arena, and whether both have flushed it. */
	s->last_epoch = 1;
	s->metaflush = 1;
	s->dirty_max = seq_map_dirty_max(&a->geo);
	seq_slots_init(a);
	seq_map_init(a);
}

/* ---- what goes in ---- */

void
seq_prepare(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	bio->seq = ++s->seq << 16 | bio->slot;
	bio->error[HAST_LOCAL] = bio->error[HAST_REMOTE] = 0;
	bio->result = 0;
	bio->order = 0;
	bio->answered = bio->acked = bio->received = bio->used = bio->pending = 0;
	bio->flags &= (uint8_t)~HAST_BIO_MEMSYNC;
	s->inuse++;
}

static int
request_ok(const struct hast_arena *a, const struct hast_bio *bio)
{
	if (bio->cmd == HAST_CMD_FLUSH)
		return 1;
	if (bio->cmd != HAST_CMD_READ && !is_mutation(bio))
		return 0;
	if (bio->length == 0 || (bio->offset | bio->length) % HAST_SECTOR != 0)
		return 0;
	if (bio->cmd != HAST_CMD_DELETE && bio->length > a->geo.slab_size)
		return 0;
	return bio->length <= a->geo.datasize && bio->offset <= a->geo.datasize - bio->length;
}

int
hast_seq_submit(struct hast_arena *a, uint32_t slot)
{
	struct hast_seq *s = seq_of(a);
	struct hast_bio *bio = bio_of(a, slot);

	if (bio->state != HAST_BIO_CLAIMED || !request_ok(a, bio))
		return -EINVAL;
	seq_heed_loss(a);	/* what is begun after it is no part of it */
	seq_prepare(a, bio);
	switch (bio->cmd) {
	case HAST_CMD_READ:
		s->stats.read++;
		if (seq_strict(a) && seq_sync_marked(a, bio)) {
			seq_lock(a, bio);
			break;
		}
		bio->state = HAST_BIO_RUNNING;
		bio->pending = bio->used = LOCAL;
		seq_push_local(a, bio);
		break;
	case HAST_CMD_FLUSH:
		s->stats.flush++;
		seq_flush_submit(a, bio);
		break;
	default:
		if (bio->cmd == HAST_CMD_WRITE)
			s->stats.write++;
		else
			s->stats.del++;
		seq_lock(a, bio);
		break;
	}
	return 0;
}

/* ---- completions ---- */

/* To the secondary; the range is locked only once. */
static void
read_there(struct hast_arena *a, struct hast_bio *bio)
{
	if (bio->order == 0)
		seq_lock(a, bio);
	else if (seq_read_held(a))
		seq_map_wait(a, bio);
	else
		seq_read_remote(a, bio);
}

static void
read_answer(struct hast_arena *a, struct hast_bio *bio, int error)
{
	seq_acknowledge(a, bio, error);
	if (bio->order != 0)
		seq_unlock(a, bio);
	seq_finish(a, bio);
}

static void
read_here_done(struct hast_arena *a, struct hast_bio *bio)
{
	int error = bio->error[HAST_LOCAL];

	/* Where the component cannot be read, it gets its data from the secondary again. */
	if (error != 0 && seq_turn(a, 0)) {
		seq_map_suspect_read(a, bio);
		seq_sync_again(a);
	}
	/* Marked: a flush has failed meanwhile, and what was read may be what was there before. */
	if (error != 0 ? seq_remote_readable(a, bio) : seq_strict(a) && seq_sync_marked(a, bio))
		read_there(a, bio);
	else
		read_answer(a, bio, error);
}

static void
read_there_done(struct hast_arena *a, struct hast_bio *bio)
{
	const struct hast_seq *s = seq_of(a);
	int error = bio->error[HAST_REMOTE];

	/* It has failed something: a flush, perhaps, and with it lost what it should have read. */
	if (error == 0 && s->connected && (s->asked & HAST_SEQ_REMOTE_FAILED) != 0)
		error = EIO;
	/* The secondary is lost, and with it what this node has not: until it is back. */
	if (error != 0 && seq_read_held(a)) {
		bio->seq = ++seq_of(a)->seq << 16 | bio->slot;
		seq_map_wait(a, bio);
	} else if (error != 0) {
		seq_read_here(a, bio);
	} else {
		read_answer(a, bio, 0);
	}
}

/* The secondary cannot be asked. What it was to be asked for only because this component seemed to fail is here. */
void
seq_read_here(struct hast_arena *a, struct hast_bio *bio)
{
	if (bio->error[HAST_LOCAL] != 0 || seq_strict(a)) {
		read_answer(a, bio, bio->error[HAST_LOCAL] != 0 ? bio->error[HAST_LOCAL] : EIO);
		return;
	}
	bio->state = HAST_BIO_RUNNING;
	bio->pending |= LOCAL;
	bio->used |= LOCAL;
	seq_push_local(a, bio);
}

/* Of the local component, also where the secondary does instead. */
void
seq_count_error(struct hast_arena *a, const struct hast_bio *bio)
{
	struct hast_seq_stats *st = &seq_of(a)->stats;

	switch (bio->cmd) {
	case HAST_CMD_READ: st->read_error++; break;
	case HAST_CMD_WRITE: st->write_error++; break;
	case HAST_CMD_DELETE: st->delete_error++; break;
	case HAST_CMD_FLUSH: st->flush_error++; break;
	default: break;			/* map updates are counted where they fail */
	}
}

static void
settle(struct hast_arena *a, struct hast_bio *bio, int component)
{
	struct hast_seq *s = seq_of(a);

	bio->pending &= (uint8_t)~(1u << component);
	if (component == HAST_LOCAL && __atomic_load_n(&s->loss, __ATOMIC_RELAXED) != HAST_SEQ_LOSS_NONE)
		seq_flush_distrusted(bio);
	if (component == HAST_LOCAL && bio->error[HAST_LOCAL] != 0)
		seq_count_error(a, bio);
	if (component == HAST_REMOTE)
		__atomic_store_n(&s->nremote, s->nremote - 1, __ATOMIC_RELAXED);
	if ((bio->flags & HAST_BIO_SYNC) != 0) {
		seq_sync_chunk_done(a, bio, component);
		return;
	}
	switch (bio->cmd) {
	case HAST_CMD_READ:
		if (component == HAST_LOCAL)
			read_here_done(a, bio);
		else
			read_there_done(a, bio);
		break;
	case HAST_CMD_MAP:
		seq_finish(a, bio);
		seq_map_done(a, bio->error[HAST_LOCAL]);
		break;
	case HAST_CMD_FLUSH:
		if (bio->error[component] != 0)
			seq_flush_failed(a, bio, component);
		if (bio->pending == 0)
			seq_flush_done(a, bio);
		break;
	default:
		/* Now, and not when the local component is through: then it may be another connection's. */
		if (component == HAST_REMOTE && bio->error[HAST_REMOTE] != 0 && s->connected)
			seq_raise(a, HAST_SEQ_REMOTE_FAILED);
		seq_mutation_step(a, bio);
		break;
	}
}

int
hast_seq_complete(struct hast_arena *a, int component, uint32_t entry)
{
	uint32_t slot = entry & ~(uint32_t)HAST_EVENT_RECEIVED;
	struct hast_bio *bio;

	if (slot >= a->nslots)
		return -EPROTO;
	bio = bio_of(a, slot);
	if (bio->state != HAST_BIO_RUNNING || (bio->pending & 1u << component) == 0 ||
	    bio->error[component] < 0)
		return -EPROTO;
	seq_heed_loss(a);
	if (entry != slot) {
		if (component != HAST_REMOTE || (bio->flags & HAST_BIO_MEMSYNC) == 0 || bio->received)
			return -EPROTO;
		bio->received = 1;
		seq_mutation_try_ack(a, bio);
		return 0;
	}
	settle(a, bio, component);
	seq_sync_turn(a);
	return 0;
}

static int
drain_ring(struct hast_arena *a, int ring, int component)
{
	struct hast_ring *r = hast_arena_ring(a, (uint32_t)ring);
	uint32_t entry;
	int n = 0, got;

	while ((got = hast_ring_pop(r, &entry)) == 1) {
		if (hast_seq_complete(a, component, entry) != 0)
			return -EPROTO;
		n++;
	}
	return got < 0 ? -EPROTO : n;
}

int
hast_seq_drain(struct hast_arena *a)
{
	static const struct { int ring, component; } from[] = {
		{ HAST_RING_DISK_DONE, HAST_LOCAL },
		{ HAST_RING_RECV_DONE, HAST_REMOTE },
		{ HAST_RING_SEND_DONE, HAST_REMOTE },
	};
	int total = 0;

	for (size_t i = 0; i < sizeof(from) / sizeof(from[0]); i++) {
		int n = drain_ring(a, from[i].ring, from[i].component);

		if (n < 0)
			return n;
		total += n;
	}
	return total;
}

/* ---- the secondary comes and goes ---- */

void
hast_seq_load_map(struct hast_arena *a, const uint8_t *map)
{
	(void)seq_map_merge(a, map, 1);
}

void
hast_seq_connect(struct hast_arena *a, const uint8_t *map)
{
	struct hast_seq *s = seq_of(a);

	s->asked = 0;
	s->given_up = s->no_turn = s->settling = s->join_failed = 0;
	s->joining = 1;
	s->merged = map != NULL ? seq_map_merge(a, map, 0) : 0;
	/* Also when nothing was merged: what an earlier failure left changed has to be durable now. */
	seq_map_start(a);
	if (!s->map_busy)
		seq_map_done(a, 0);
}

void
hast_seq_disconnect(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	s->connected = s->joining = s->degraded_ok = s->asked = s->flush_whole = 0;
	s->peer_whole = s->turning = s->turn_detach = s->cache_lost = s->sync_begun = s->confirming = 0;
	s->no_deletes = s->no_flushes = s->join_failed = 0;
	seq_sync_stop(a);
	/* What was to be said of this connection must not be taken for the next one's. */
	s->events &= ~(uint32_t)(HAST_SEQ_REMOTE_FAILED | HAST_SEQ_CONNECTED | HAST_SEQ_LOCAL_FAILED);
	hast_ring_init(hast_arena_ring(a, HAST_RING_SEND), a->ring_entries);
	hast_ring_init(hast_arena_ring(a, HAST_RING_SEND_DONE), a->ring_entries);
	hast_ring_init(hast_arena_ring(a, HAST_RING_RECV_DONE), a->ring_entries);
	for (uint32_t i = 0; i < a->nslots; i++) {
		struct hast_bio *bio = bio_of(a, i);

		if (bio->state != HAST_BIO_RUNNING || (bio->used & REMOTE) == 0)
			continue;
		/* Also when it has completed there: with the local disk still busy nobody has been told, and it is not flushed. */
		bio->error[HAST_REMOTE] = ENOTCONN;
		if ((bio->pending & REMOTE) != 0)
			settle(a, bio, HAST_REMOTE);
	}
	seq_durable_lost(a);
	seq_distrust(a);
	/* A joining that broke off leaves writes waiting for a map that may be durable already. */
	seq_map_done(a, 0);
}

int
hast_seq_idle(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	if (!seq_peer_there(a) || s->map_busy)
		return 0;
	if (seq_map_clean(a) > 0 && seq_own_flush(a))
		return 1;
	seq_map_start(a);
	return (int)s->map_busy;
}

int
hast_seq_quiet(struct hast_arena *a)
{
	return seq_of(a)->inuse == 0;
}
