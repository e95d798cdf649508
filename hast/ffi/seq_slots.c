/*
 * The sequencer's slots: free, claimed by the device, on their way, answered, given back.
 *
 * Invariants:
 * - 9 one owner: a slot comes back to the free list exactly once, when the sequencer has nothing more to do with it, the
 *   device holds it no more, and its answer, if there is one, was taken out of the ack ring;
 * - it is in the ack ring once at most, so there is room for all of them.
 */
#include "seq.h"
#include "seq_internal.h"

#define REMOTE (1u << HAST_REMOTE)

static struct hast_ring *
ack_ring(struct hast_arena *a)
{
	return (struct hast_ring *)((char *)a + a->ack_off);
}

void
seq_slots_init(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	s->free_head = HAST_NONE;
	s->sync_free_head = HAST_NONE;
	/* From the top down, so that the first slots, and only they, are used while there is little to do. */
	for (uint32_t i = a->geo.nclient; i-- > 0;) {
		bio_of(a, i)->next = s->free_head;
		s->free_head = i;
	}
	for (uint32_t i = a->geo.nclient + a->geo.nsync; i-- > a->geo.nclient;) {
		bio_of(a, i)->next = s->sync_free_head;
		s->sync_free_head = i;
	}
	s->nfree = a->geo.nclient;
	hast_ring_init(ack_ring(a), a->ring_entries);
}

uint32_t
hast_seq_claim(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	uint32_t slot = s->free_head;

	if (slot == HAST_NONE)
		return HAST_NONE;

	struct hast_bio *bio = bio_of(a, slot);

	s->free_head = bio->next;
	s->nfree--;
	bio->state = HAST_BIO_CLAIMED;
	bio->held = 1;
	bio->cmd = HAST_CMD_NONE;
	bio->flags = 0;
	return slot;
}

static void
slot_free(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	bio->state = HAST_BIO_FREE;
	bio->cmd = HAST_CMD_NONE;
	if (bio->slot >= a->geo.nclient)
		return;			/* the sequencer's own slots are in no list */
	/* Last in, first out: the slab used last is the one in the processor's cache. */
	bio->next = s->free_head;
	s->free_head = bio->slot;
	s->nfree++;
	s->freed++;
}

/* Its slot is in the ack ring: it must not be anybody else's before it is taken out there. */
static int
answer_waits(const struct hast_bio *bio)
{
	return bio->answered && !bio->acked;
}

void
seq_finish(struct hast_arena *a, struct hast_bio *bio)
{
	seq_of(a)->inuse--;
	seq_of(a)->finished += bio->slot < a->geo.nclient;
	bio->state = HAST_BIO_DONE;
	if (!bio->held && !answer_waits(bio))
		slot_free(a, bio);
}

void
seq_acknowledge(struct hast_arena *a, struct hast_bio *bio, int result)
{
	struct hast_seq *s = seq_of(a);

	if (result == 0 && s->connected && bio->slot < a->geo.nclient && (bio->used & REMOTE) != 0)
		s->served++;
	bio->answered = 1;
	bio->acked = !bio->held;
	bio->result = result;
	if (bio->held)
		(void)hast_ring_push(ack_ring(a), bio->slot);
}

uint32_t
hast_seq_acked(struct hast_arena *a)
{
	uint32_t slot;

	while (hast_ring_pop(ack_ring(a), &slot) == 1) {
		struct hast_bio *bio = bio_of(a, slot);

		bio->acked = 1;
		if (bio->held)
			return slot;
		/* Released before it was answered: nobody wants to know. */
		if (bio->state == HAST_BIO_DONE)
			slot_free(a, bio);
	}
	return HAST_NONE;
}

void
hast_seq_release(struct hast_arena *a, uint32_t slot)
{
	struct hast_bio *bio = bio_of(a, slot);

	if (!bio->held)
		return;
	bio->held = 0;
	if (bio->state == HAST_BIO_CLAIMED || (bio->state == HAST_BIO_DONE && bio->acked))
		slot_free(a, bio);
}
