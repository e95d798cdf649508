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
	bio->pending = s->detached ? 0 : LOCAL;
	if (s->connected && bio->cmd == HAST_CMD_DELETE && s->no_deletes) {
		/* Asked for before the secondary was there: the zeros are copied. */
		seq_map_suspect_bio(a, bio);
	} else if (s->connected) {
		/* Where it is acknowledged only when it is durable there, nobody wants to know that it has been received. */
		if (bio->cmd == HAST_CMD_WRITE && s->mode == HAST_MODE_MEMSYNC && !seq_strict(a))
			bio->flags |= HAST_BIO_MEMSYNC;
		seq_push_remote(a, bio);
	}
	bio->used = bio->pending;
	s->last_epoch = s->epoch;
	if (!s->detached)
		seq_push_local(a, bio);
}

/* May the secondary be asked for this range? Where it may be the older one, or has just failed to write, never. */
int
seq_remote_readable(struct hast_arena *a, const struct hast_bio *bio)
{
	const struct hast_seq *s = seq_of(a);

	if (!s->connected || (s->asked & HAST_SEQ_REMOTE_FAILED) != 0)
		return 0;
	return s->sync_remote || s->turning || s->peer_whole || !seq_sync_marked(a, bio);
}

/* A read that the local component cannot answer. It holds the range lock, so that it sees all writes before it, also
   those that are acknowledged and not stored there yet. */
void
seq_read_remote(struct hast_arena *a, struct hast_bio *bio)
{
	if (!seq_remote_readable(a, bio)) {
		seq_read_here(a, bio);
		return;
	}
	bio->state = HAST_BIO_RUNNING;
	bio->used |= REMOTE;
	seq_push_remote(a, bio);
}

int
seq_impossible(struct hast_arena *a, const struct hast_bio *bio)
{
	const struct hast_seq *s = seq_of(a);

	if (seq_hopeless(a))
		return EIO;
	/* Nothing is done without the secondary, and zeros cannot be copied from here. */
	return s->sync_remote && s->connected && s->no_deletes && bio->cmd == HAST_CMD_DELETE ? EOPNOTSUPP : 0;
}

/* How many of those before it in the list it has to wait for. */
static uint32_t
count_blockers(struct hast_arena *a, const struct hast_bio *bio, uint32_t at)
{
	const uint32_t *active = active_of(a);
	uint32_t n = 0;

	for (uint32_t i = 0; i < at; i++)
		n += (uint32_t)overlap(bio_of(a, active[i]), bio);
	return n;
}

int
seq_must_wait(struct hast_arena *a, struct hast_bio *bio)
{
	const struct hast_seq *s = seq_of(a);
	const uint32_t *active = active_of(a);
	uint32_t at = 0;

	if (bio->order > s->reordered)
		return 0;
	while (at < s->nactive && active[at] != bio->slot)
		at++;
	bio->blockers = count_blockers(a, bio, at);
	if (bio->blockers == 0)
		return 0;
	bio->state = HAST_BIO_BLOCKED;
	bio->flags |= HAST_BIO_ENTERED;
	return 1;
}

/* To the components, as soon as nothing is in the way. */
static void
start(struct hast_arena *a, struct hast_bio *bio)
{
	int error = seq_impossible(a, bio);

	if (error != 0)
		seq_refuse(a, bio, error);
	else if (seq_must_wait(a, bio))
		return;
	else if (!seq_held(a) && seq_map_durable(a, bio))
		seq_launch(a, bio);
	else
		seq_map_wait(a, bio);
}

/* No earlier overlapping mutation is left: mark its extents, and go as soon as they are marked on disk. */
static void
activate(struct hast_arena *a, struct hast_bio *bio)
{
	if ((bio->flags & HAST_BIO_SYNC) != 0)
		seq_sync_start_chunk(a, bio);
	else if (bio->cmd == HAST_CMD_READ && seq_read_held(a))
		seq_map_wait(a, bio);
	else if (bio->cmd == HAST_CMD_READ)
		seq_read_remote(a, bio);
	else {
		if ((bio->flags & HAST_BIO_ENTERED) == 0)
			seq_map_enter(a, bio);
		bio->flags &= (uint8_t)~HAST_BIO_ENTERED;
		start(a, bio);
	}
}

void
seq_lock(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);
	uint32_t *active = active_of(a);

	bio->order = ++s->order;
	bio->blockers = count_blockers(a, bio, s->nactive);
	active[s->nactive++] = bio->slot;
	if (bio->blockers == 0)
		activate(a, bio);
	else
		bio->state = HAST_BIO_BLOCKED;
}

/* It was over everywhere, so that later ones could begin, and is to be done once more: in the place that it had. Those that have
   begun, here alone, are done once more as well, and find it before them then; one that is over by now, on both nodes, is written over
   by it, which is unanswered still. Nothing starts before restart_blocked(). */
static void
lock_again(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);
	uint32_t *active = active_of(a);
	uint32_t at = s->nactive;

	while (at > 0 && bio_of(a, active[at - 1])->order > bio->order) {
		active[at] = active[at - 1];
		at--;
	}
	active[at] = bio->slot;
	s->nactive++;
	s->reordered = s->order;
	bio->state = HAST_BIO_BLOCKED;
}

static void
restart_blocked(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	const uint32_t *active = active_of(a);
	uint32_t next = 0;

	for (uint32_t i = 0; i < s->nactive; i++)
		if (bio_of(a, active[i])->state == HAST_BIO_BLOCKED)
			bio_of(a, active[i])->blockers = count_blockers(a, bio_of(a, active[i]), i);
	while (next < s->nactive) {
		struct hast_bio *bio = bio_of(a, active[next++]);

		if (bio->state == HAST_BIO_BLOCKED && bio->blockers == 0) {
			activate(a, bio);
			next = 0;	/* it may have taken others out of the list */
		}
	}
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
	seq_count_error(a, bio);
	seq_acknowledge(a, bio, error);
	seq_mutation_over(a, bio, 1);
}

void
seq_mutation_over(struct hast_arena *a, struct hast_bio *bio, int clean)
{
	seq_map_leave(a, bio, clean);
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

void
seq_grant_wait(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	bio->state = HAST_BIO_GRANTWAIT;
	seq_list_append(a, &s->grant_head, &s->grant_tail, bio->slot);
}

/* The ack rule, invariants 5 and 7, for one that the local component has done. */
static void
acknowledge_by_mode(struct hast_arena *a, struct hast_bio *bio)
{
	const struct hast_seq *s = seq_of(a);
	int verdict = remote_verdict(s, bio);

	if (verdict == 0 && !s->degraded_ok)
		seq_grant_wait(a, bio);
	else if (verdict >= 0)
		seq_acknowledge(a, bio, 0);
}

/* What fails here, or is to be durable there, is decided when both have done with it. */
void
seq_mutation_try_ack(struct hast_arena *a, struct hast_bio *bio)
{
	if (bio->answered || bio->state == HAST_BIO_GRANTWAIT || (bio->pending & LOCAL) != 0 ||
	    bio->error[HAST_LOCAL] != 0 || seq_strict(a))
		return;
	acknowledge_by_mode(a, bio);
}

/* The secondary does not have it, and it may not be acknowledged without: once more, when it is back. Nobody else gets its range
   meanwhile. */
static void
launch_again(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	seq_map_suspect_bio(a, bio);
	bio->seq = ++s->seq << 16 | bio->slot;
	bio->error[HAST_LOCAL] = bio->error[HAST_REMOTE] = 0;
	bio->used = bio->received = 0;
	bio->flags &= (uint8_t)~HAST_BIO_MEMSYNC;
	start(a, bio);
}

/* Both have done with it, and nobody was told. 1: it waits for something now. */
static int
waits(struct hast_arena *a, struct hast_bio *bio, int remote_ok)
{
	const struct hast_seq *s = seq_of(a);

	if (s->sync_remote && !remote_ok) {
		launch_again(a, bio);
		return 1;
	}
	/* Whether the secondary will be the one that counts is being decided: it does not have this. */
	if (s->turning && !remote_ok) {
		seq_durable_wait(a, bio, 0);
		return 1;
	}
	/* Answered with the local error when the other side is settled too, so that a retry finds nothing under way. */
	if (bio->error[HAST_LOCAL] != 0 && !(remote_ok && seq_turn(a, 0))) {
		seq_acknowledge(a, bio, bio->error[HAST_LOCAL]);
		return 0;
	}
	if (seq_strict(a) && remote_ok) {
		/* Marked now: nobody may find the nodes equal while it waits. */
		if (bio->error[HAST_LOCAL] != 0)
			seq_map_suspect_bio(a, bio);
		seq_durable_wait(a, bio, 1);
		return 1;
	}
	acknowledge_by_mode(a, bio);
	return 0;
}

void
seq_mutation_step(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);
	int remote_ok;

	seq_mutation_try_ack(a, bio);
	if (bio->pending != 0)
		return;
	remote_ok = (bio->used & REMOTE) != 0 && bio->error[HAST_REMOTE] == 0;
	/* A flush that begins from now on covers it. */
	bio->durable_epoch = s->epoch;
	if (!bio->answered && bio->state != HAST_BIO_GRANTWAIT && waits(a, bio, remote_ok))
		return;
	/* What was answered with an error is nothing that the secondary lacks: counted, it would make a split-brain that is none. */
	if (!remote_ok && !s->degraded_ok && !(bio->answered && bio->result != 0))
		seq_raise(a, HAST_SEQ_NEED_DEGRADED);
	if (!remote_ok)
		s->peer_whole = 0;
	seq_map_leave(a, bio, remote_ok && bio->error[HAST_LOCAL] == 0);
	seq_unlock(a, bio);
	if (bio->state != HAST_BIO_GRANTWAIT)
		seq_finish(a, bio);
}

/* What is under way here alone when the secondary comes is part of the synchronisation that makes it complete, and not something
   that is copied to a complete one later: then it would have newer data without older. */
void
seq_mark_local(struct hast_arena *a)
{
	const uint32_t *active = active_of(a);

	for (uint32_t i = 0; i < seq_of(a)->nactive; i++) {
		const struct hast_bio *bio = bio_of(a, active[i]);

		if (is_mutation(bio) && bio->state == HAST_BIO_RUNNING && (bio->used & REMOTE) == 0)
			seq_map_suspect_bio(a, bio);
	}
}

static void
answer_granted(struct hast_arena *a, int error)
{
	struct hast_seq *s = seq_of(a);
	uint32_t slot = s->grant_head;

	s->asked &= ~(uint32_t)HAST_SEQ_NEED_DEGRADED;
	s->grant_head = HAST_NONE;
	while (slot != HAST_NONE) {
		struct hast_bio *bio = bio_of(a, slot);

		slot = bio->next;
		seq_acknowledge(a, bio, error != 0 ? error : bio->error[HAST_LOCAL]);
		seq_finish(a, bio);
	}
}

void
seq_grant_settled(struct hast_arena *a)
{
	/* What was asked for before this is void: the counters are in step now. */
	seq_of(a)->sync_number++;
	seq_of(a)->events &= ~(uint32_t)HAST_SEQ_NEED_DEGRADED;
	answer_granted(a, 0);
}

/* The component that alone has it is out of date from now on: a mutation is done once more, with the secondary, and a flush as well.
   A grant that is on its way is void. */
void
seq_grant_void(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	uint32_t slot = s->grant_head, flushes = HAST_NONE, tail = HAST_NONE;

	s->sync_number++;
	s->events &= ~(uint32_t)HAST_SEQ_NEED_DEGRADED;
	s->asked &= ~(uint32_t)HAST_SEQ_NEED_DEGRADED;
	s->grant_head = HAST_NONE;
	while (slot != HAST_NONE) {
		struct hast_bio *bio = bio_of(a, slot);

		slot = bio->next;
		bio->seq = ++s->seq << 16 | bio->slot;
		bio->error[HAST_LOCAL] = bio->error[HAST_REMOTE] = 0;
		bio->used = bio->received = 0;
		bio->flags &= (uint8_t)~HAST_BIO_MEMSYNC;
		if (is_mutation(bio))
			lock_again(a, bio);
		else
			seq_list_append(a, &flushes, &tail, bio->slot);
	}
	restart_blocked(a);
	while (flushes != HAST_NONE) {
		struct hast_bio *bio = bio_of(a, flushes);

		flushes = bio->next;
		seq_flush_submit(a, bio);
	}
}

void
hast_seq_refuse_degraded(struct hast_arena *a)
{
	answer_granted(a, EIO);
}

void
hast_seq_grant_degraded(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	seq_heed_loss(a);	/* what waits is not there for certain if a flush has failed since this was said */
	/* While connected it is for those who wait now: a resynchronisation may make localcnt equal again at any time. */
	s->degraded_ok = !s->connected;
	answer_granted(a, 0);
}
