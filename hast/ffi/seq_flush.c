/*
 * The sequencer's flushes: one under way at a time, those that come meanwhile wait as one batch (invariant 5), and what
 * a flush that both nodes have completed says about extents that may be cleared (invariant 2).
 */
#include <errno.h>

#include "seq.h"
#include "seq_internal.h"

#define LOCAL (1u << HAST_LOCAL)
#define REMOTE (1u << HAST_REMOTE)

/* While the secondary is brought up to date it may lack, in all modes but fullsync, something acknowledged that only the map
   speaks of. */
static int
lacking(const struct hast_seq *s, struct hast_arena *a)
{
	return !s->peer_whole && s->mode != HAST_MODE_FULLSYNC && seq_sync_any(a);
}

/* bio is the first of a batch linked by next; it stands for all of them. */
static void
flush_launch(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	s->flush_running = bio->slot;
	s->flush_cover = s->epoch++;
	s->flush_whole = s->connected;
	s->flush_early = lacking(s, a);
	bio->state = HAST_BIO_RUNNING;
	bio->pending = s->detached ? 0 : LOCAL;
	if (s->connected)
		seq_push_remote(a, bio);
	bio->used = bio->pending;
	if (!s->detached)
		seq_push(a, HAST_RING_DISK, bio->slot);
}

static void
flush_answer(struct hast_arena *a, struct hast_bio *bio, int result)
{
	seq_acknowledge(a, bio, result);
	seq_finish(a, bio);
}

/* One that comes while another is under way gets one of its own, with all who wait: that one may have passed writes that it has to
   cover. */
void
seq_flush_submit(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	bio->state = HAST_BIO_QUEUED;
	seq_list_append(a, &s->flushq_head, &s->flushq_tail, bio->slot);
	seq_flush_resume(a);
}

void
seq_flush_resume(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	uint32_t slot = s->flushq_head;

	if (s->flush_running != HAST_NONE || slot == HAST_NONE || (seq_held(a) && !(s->confirming && seq_peer_there(a))))
		return;
	s->flushq_head = HAST_NONE;
	if (!seq_hopeless(a)) {
		flush_launch(a, bio_of(a, slot));
		return;
	}
	while (slot != HAST_NONE) {
		struct hast_bio *bio = bio_of(a, slot);

		slot = bio->next;
		flush_answer(a, bio, EIO);
	}
}

/* A node may have lost what was only in its cache: nothing that was written and not flushed is the same on both for
   certain, and no later flush makes it so. */
void
seq_distrust(struct hast_arena *a)
{
	const uint32_t *active = active_of(a);

	seq_map_suspect(a);
	seq_sync_spoil_all(a);
	for (uint32_t i = 0; i < seq_of(a)->nactive; i++) {
		const struct hast_bio *bio = bio_of(a, active[i]);

		if (is_mutation(bio) && bio->used != bio->pending)
			seq_map_suspect_bio(a, bio);
	}
}

/* A local flush has failed: what is in the cache may be lost, and no later flush would say so again. A mutation that is not
   answered yet is not answered as if it were there. */
static void
spoil_unanswered(struct hast_arena *a, int error)
{
	for (uint32_t i = 0; i < a->nslots; i++) {
		struct hast_bio *bio = bio_of(a, i);
		int done = bio->state == HAST_BIO_GRANTWAIT || bio->state == HAST_BIO_DURABLEWAIT ||
		    (bio->state == HAST_BIO_RUNNING && (bio->pending & LOCAL) == 0);

		if (done && is_mutation(bio) && !bio->answered && bio->error[HAST_LOCAL] == 0)
			bio->error[HAST_LOCAL] = error;
	}
}

static void
local_flush_failed(struct hast_arena *a, int error)
{
	/* A component that has failed a flush fails all later ones: it has lost something, and may not say what. */
	seq_of(a)->no_source = 1;
	seq_of(a)->cache_lost = (uint32_t)seq_turn(a, 1);
	spoil_unanswered(a, error);
}

/* At once, and not when the other component is through too: a resynchronisation may be relying on that cache. */
void
seq_flush_failed(struct hast_arena *a, const struct hast_bio *bio, int component)
{
	if (component == HAST_LOCAL)
		local_flush_failed(a, bio->error[HAST_LOCAL]);
	else if (seq_of(a)->connected)
		seq_raise(a, HAST_SEQ_REMOTE_FAILED);
	seq_distrust(a);
	seq_sync_again(a);
}

void
hast_seq_local_flush_failed(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	uint32_t loss = __atomic_load_n(&s->loss, __ATOMIC_ACQUIRE);

	if (s->detached || loss == HAST_SEQ_LOSS_HEEDED)
		return;
	if (loss == HAST_SEQ_LOSS_TOLD)
		__atomic_store_n(&s->loss, HAST_SEQ_LOSS_HEEDED, __ATOMIC_RELAXED);
	local_flush_failed(a, EIO);
	seq_distrust(a);
	seq_sync_again(a);
}

/* A flush that the disk has done after it had told another process that what was in its cache is lost. The disk stage may not know that
   yet: from now on it fails them. */
void
seq_flush_distrusted(struct hast_bio *bio)
{
	int flushed = bio->cmd == HAST_CMD_FLUSH || (bio->cmd == HAST_CMD_MAP && (bio->flags & HAST_BIO_DURABLE) != 0);

	if (flushed && bio->error[HAST_LOCAL] == 0)
		bio->error[HAST_LOCAL] = EIO;
}

/* Something that was acknowledged is perhaps durable here alone from now on, and somebody relies on it: localcnt has to say so.
   With the secondary that is possible while it is brought up to date: what is copied after it was sent the flush is not covered
   by that. When it is lost then, it still lacks it. */
static int
needs_grant(struct hast_arena *a, int remote_ok)
{
	const struct hast_seq *s = seq_of(a);

	if (s->degraded_ok || s->sync_remote)
		return 0;
	if (!remote_ok)
		return s->last_epoch > s->flushed || seq_sync_any(a);
	return s->flush_early || lacking(s, a);
}

/* One flush of a batch that both have done with. */
void
seq_flush_over(struct hast_arena *a, struct hast_bio *bio, int local, int remote_ok)
{
	struct hast_seq *s = seq_of(a);

	bio->error[HAST_LOCAL] = local;
	if (bio->slot == own_flush_slot(a)) {
		flush_answer(a, bio, local);
	} else if (s->sync_remote && !remote_ok) {
		bio->state = HAST_BIO_QUEUED;
		seq_list_append(a, &s->flushq_head, &s->flushq_tail, bio->slot);
	} else if (local != 0 && remote_ok && seq_strict(a)) {
		bio->state = HAST_BIO_DURABLEWAIT;
		bio->durable_epoch = s->flush_cover;
		seq_list_append(a, &s->durable_head, &s->durable_tail, bio->slot);
	} else if (s->turning && !remote_ok) {
		seq_durable_wait(a, bio, 0);
	} else if (local == 0 && needs_grant(a, remote_ok)) {
		seq_grant_wait(a, bio);
		seq_raise(a, HAST_SEQ_NEED_DEGRADED);
	} else {
		flush_answer(a, bio, local);
	}
}

void
seq_flush_done(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);
	int local = bio->error[HAST_LOCAL];
	/* One that has failed something acknowledged may have done the flush all the same. */
	int remote_ok = (bio->used & REMOTE) != 0 && bio->error[HAST_REMOTE] == 0 && s->flush_whole && seq_peer_there(a);
	uint32_t slot = bio->slot;
	int confirmed;

	/* A component that has failed a flush has lost something, also when it does not say so a second time. */
	if (s->turning && s->cache_lost && local == 0)
		local = EIO;
	if (remote_ok)
		s->flushed_remote = s->flush_cover;
	confirmed = s->confirming && s->confirm_epoch <= s->flushed_remote;
	if (confirmed)
		s->confirming = 0;
	if (remote_ok && local == 0 && !s->detached)
		s->flushed = s->flush_cover;
	s->flush_running = HAST_NONE;
	while (slot != HAST_NONE) {
		struct hast_bio *one = bio_of(a, slot);

		slot = one->next;
		seq_flush_over(a, one, local, remote_ok);
	}
	seq_flush_resume(a);
	seq_durable_go_on(a);
	if (confirmed)
		seq_map_wake(a);
	seq_sync_flushed(a, local != 0 || bio->error[HAST_REMOTE] != 0);
}

int
seq_own_flush(struct hast_arena *a)
{
	struct hast_bio *bio = bio_of(a, own_flush_slot(a));

	if (bio->state != HAST_BIO_FREE || (seq_of(a)->detached && !seq_of(a)->connected))
		return 0;
	bio->cmd = HAST_CMD_FLUSH;
	bio->flags = 0;
	bio->held = 0;
	bio->offset = bio->length = 0;
	seq_prepare(a, bio);
	seq_flush_submit(a, bio);
	return 1;
}
