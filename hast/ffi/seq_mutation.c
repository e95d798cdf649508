/*
 * The sequencer's mutations: range locks (invariant 3), the way to the components, the ack rule (invariants 5 and 7).
 */
#include <errno.h>

#include "seq.h"
#include "seq_internal.h"

#define LOCAL (1u << HAST_LOCAL)
#define REMOTE (1u << HAST_REMOTE)

static int
overlap(const struct hast_bio *x, const struct hast_bio *y)
{
	return x->offset < y->offset + y->length && y->offset < x->offset + x->length;
}

void
seq_launch(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	bio->state = HAST_BIO_RUNNING;
	bio->pending = LOCAL;
	if (s->connected) {
		if (bio->cmd == HAST_CMD_WRITE && s->mode == HAST_MODE_MEMSYNC)
			bio->flags |= HAST_BIO_MEMSYNC;
		seq_push_remote(a, bio);
	}
	bio->used = bio->pending;
	seq_push(a, HAST_RING_DISK, bio->slot);
}

/* May the secondary be asked for this range? Where it may be the older one, or has just failed to write, never. */
int
seq_remote_readable(struct hast_arena *a, const struct hast_bio *bio)
{
	const struct hast_seq *s = seq_of(a);

	if (!s->connected || (s->asked & HAST_SEQ_REMOTE_FAILED) != 0)
		return 0;
	return s->sync_remote || !seq_sync_marked(a, bio);
}

/* A read that the local component cannot answer. It holds the range lock, so that it sees all writes before it, also
   those that are acknowledged and not stored there yet. */
void
seq_read_remote(struct hast_arena *a, struct hast_bio *bio)
{
	if (!seq_remote_readable(a, bio)) {
		seq_acknowledge(a, bio, bio->error[HAST_LOCAL] != 0 ? bio->error[HAST_LOCAL] : EIO);
		seq_unlock(a, bio);
		seq_finish(a, bio);
		return;
	}
	bio->state = HAST_BIO_RUNNING;
	bio->used |= REMOTE;
	seq_push_remote(a, bio);
}

/* No earlier overlapping mutation is left: mark its extents, and go as soon as they are marked on disk. */
static void
activate(struct hast_arena *a, struct hast_bio *bio)
{
	if ((bio->flags & HAST_BIO_SYNC) != 0)
		seq_sync_start_chunk(a, bio);
	else if (bio->cmd == HAST_CMD_READ && seq_of(a)->joining)
		seq_map_wait(a, bio);
	else if (bio->cmd == HAST_CMD_READ)
		seq_read_remote(a, bio);
	else if (seq_map_enter(a, bio) && !seq_of(a)->joining)
		seq_launch(a, bio);
	else
		seq_map_wait(a, bio);
}

void
seq_lock(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);
	uint32_t *active = active_of(a);

	bio->order = ++s->order;
	bio->blockers = 0;
	for (uint32_t i = 0; i < s->nactive; i++)
		bio->blockers += (uint32_t)overlap(bio_of(a, active[i]), bio);
	active[s->nactive++] = bio->slot;
	if (bio->blockers == 0)
		activate(a, bio);
	else
		bio->state = HAST_BIO_BLOCKED;
}

/* The mutation is over everywhere: those that waited for it alone may start. */
void
seq_unlock(struct hast_arena *a, const struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);
	uint32_t *active = active_of(a);
	uint32_t at = 0;

	while (at < s->nactive && active[at] != bio->slot)
		at++;
	if (at == s->nactive)
		return;
	s->nactive--;
	for (uint32_t i = at; i < s->nactive; i++)
		active[i] = active[i + 1];
	/* Only later ones counted it. activate() adds none to the list, but may take out this one and some behind it. */
	for (uint32_t i = at; i < s->nactive;) {
		struct hast_bio *later = bio_of(a, active[i]);

		if (later->blockers > 0 && overlap(bio, later) && --later->blockers == 0)
			activate(a, later);
		if (i < s->nactive && active[i] == later->slot)
			i++;
	}
}

void
seq_refuse(struct hast_arena *a, struct hast_bio *bio, int error)
{
	seq_map_leave(a, bio, 1);
	seq_acknowledge(a, bio, error);
	seq_unlock(a, bio);
	seq_finish(a, bio);
}

/* Whether the secondary has what the mode wants it to have. -1: not yet, 0: it never will, 1: yes. */
static int
remote_verdict(const struct hast_seq *s, const struct hast_bio *bio)
{
	if ((bio->used & REMOTE) == 0)
		return 0;
	if ((bio->pending & REMOTE) == 0)
		return bio->error[HAST_REMOTE] == 0;
	if (s->mode == HAST_MODE_ASYNC || (s->mode == HAST_MODE_MEMSYNC && bio->received))
		return 1;
	return -1;
}

/* The ack rule, invariants 5 and 7. */
void
seq_mutation_try_ack(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);
	int verdict = remote_verdict(s, bio);

	if (bio->answered || bio->state == HAST_BIO_GRANTWAIT || (bio->pending & LOCAL) != 0)
		return;
	if (bio->error[HAST_LOCAL] != 0) {
		/* Answered when the other side is settled too, so that a retry finds nothing under way. */
		if (bio->pending == 0)
			seq_acknowledge(a, bio, bio->error[HAST_LOCAL]);
		return;
	}
	if (verdict < 0)
		return;
	if (verdict == 0 && !s->degraded_ok) {
		bio->state = HAST_BIO_GRANTWAIT;
		seq_list_append(a, &s->grant_head, &s->grant_tail, bio->slot);
		return;
	}
	seq_acknowledge(a, bio, 0);
}

void
seq_mutation_step(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	seq_mutation_try_ack(a, bio);
	if (bio->pending != 0)
		return;

	int remote_ok = (bio->used & REMOTE) != 0 && bio->error[HAST_REMOTE] == 0;

	if (!remote_ok && !s->degraded_ok)
		seq_raise(a, HAST_SEQ_NEED_DEGRADED);
	if (s->connected && bio->error[HAST_REMOTE] != 0)
		seq_raise(a, HAST_SEQ_REMOTE_FAILED);
	seq_map_leave(a, bio, remote_ok && bio->error[HAST_LOCAL] == 0);
	seq_unlock(a, bio);
	if (bio->state != HAST_BIO_GRANTWAIT)
		seq_finish(a, bio);
}

void
hast_seq_grant_degraded(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	uint32_t slot = s->grant_head;

	/* While connected it is for those who wait now: a resynchronisation may make localcnt equal again at any time. */
	s->degraded_ok = !s->connected;
	s->asked &= ~(uint32_t)HAST_SEQ_NEED_DEGRADED;
	s->grant_head = HAST_NONE;
	while (slot != HAST_NONE) {
		struct hast_bio *bio = bio_of(a, slot);

		slot = bio->next;
		seq_acknowledge(a, bio, bio->error[HAST_LOCAL]);
		seq_finish(a, bio);
	}
}
