/*
 * The sequencer's flushes: one under way at a time, those that come meanwhile wait as one batch (invariant 5), and what
 * a flush that both nodes have completed says about extents that may be cleared (invariant 2).
 */
#include <errno.h>

#include "seq.h"
#include "seq_internal.h"

#define LOCAL (1u << HAST_LOCAL)
#define REMOTE (1u << HAST_REMOTE)

/* bio is the first of a batch linked by next; it stands for all of them. */
static void
flush_launch(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	s->flush_running = bio->slot;
	s->flush_cover = s->epoch++;
	s->flush_whole = s->connected;
	bio->state = HAST_BIO_RUNNING;
	bio->pending = LOCAL;
	if (s->connected)
		seq_push_remote(a, bio);
	bio->used = bio->pending;
	seq_push(a, HAST_RING_DISK, bio->slot);
}

void
seq_flush_submit(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	if (s->flush_running == HAST_NONE) {
		bio->next = HAST_NONE;
		flush_launch(a, bio);
		return;
	}
	/* The one under way may have passed writes that this one has to cover: one more, for all who wait. */
	bio->state = HAST_BIO_QUEUED;
	seq_list_append(a, &s->flushq_head, &s->flushq_tail, bio->slot);
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
		int done = bio->state == HAST_BIO_GRANTWAIT ||
		    (bio->state == HAST_BIO_RUNNING && (bio->pending & LOCAL) == 0);

		if (done && is_mutation(bio) && !bio->answered && bio->error[HAST_LOCAL] == 0)
			bio->error[HAST_LOCAL] = error;
	}
}

/* At once, and not when the other component is through too: a resynchronisation may be relying on that cache. */
void
seq_flush_failed(struct hast_arena *a, const struct hast_bio *bio, int component)
{
	if (component == HAST_LOCAL)
		spoil_unanswered(a, bio->error[HAST_LOCAL]);
	else if (seq_of(a)->connected)
		seq_raise(a, HAST_SEQ_REMOTE_FAILED);
	seq_distrust(a);
}

void
seq_flush_done(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);
	int result = bio->error[HAST_LOCAL];
	int failed = result != 0 || bio->error[HAST_REMOTE] != 0;
	uint32_t slot = bio->slot;

	if (!failed && s->flush_whole)
		s->flushed = s->flush_cover;
	while (slot != HAST_NONE) {
		struct hast_bio *one = bio_of(a, slot);

		slot = one->next;
		seq_acknowledge(a, one, result);
		seq_finish(a, one);
	}
	s->flush_running = HAST_NONE;
	if (s->flushq_head != HAST_NONE) {
		struct hast_bio *next = bio_of(a, s->flushq_head);

		s->flushq_head = HAST_NONE;
		flush_launch(a, next);
	}
	seq_sync_flushed(a, failed);
}

int
seq_own_flush(struct hast_arena *a)
{
	struct hast_bio *bio = bio_of(a, own_flush_slot(a));

	if (bio->state != HAST_BIO_FREE)
		return 0;
	bio->cmd = HAST_CMD_FLUSH;
	bio->flags = 0;
	bio->held = 0;
	bio->offset = bio->length = 0;
	seq_prepare(a, bio);
	seq_flush_submit(a, bio);
	return 1;
}
