/*
 * The order in which a secondary's requests go to its disk. Invariants (3 and 4 in conn.h):
 * - of two requests that overlap, one of them a mutation, the later one goes when the earlier one has completed;
 * - only what is active is compared; what came after a flush waits in the queue, and a flush is with the disk only while
 *   nothing is active.
 */
#include "recv_secondary.h"

static int
conflict(const struct item *x, const struct item *y)
{
	if (x->cmd == HAST_CMD_READ && y->cmd == HAST_CMD_READ)
		return 0;
	return x->begin < y->end && y->begin < x->end;
}

static void
activate(struct hast_recv *r, uint32_t slot)
{
	struct recv_secondary *s = r->secondary;
	struct item *item = &s->item[slot];

	item->blockers = 0;
	for (uint32_t i = 0; i < s->nactive; i++)
		item->blockers += (uint32_t)conflict(&s->item[s->active[i]], item);
	s->active[s->nactive++] = slot;
	if (item->blockers == 0)
		recv_to_disk(r, slot);
	else
		item->state = BLOCKED;
}

/* It is over: those behind it that waited for it alone go. */
static void
deactivate(struct hast_recv *r, uint32_t slot)
{
	struct recv_secondary *s = r->secondary;
	uint32_t at = 0;

	while (s->active[at] != slot)
		at++;
	s->nactive--;
	for (uint32_t i = at; i < s->nactive; i++)
		s->active[i] = s->active[i + 1];
	for (uint32_t i = at; i < s->nactive; i++) {
		struct item *later = &s->item[s->active[i]];

		if (later->blockers > 0 && conflict(&s->item[slot], later) && --later->blockers == 0)
			recv_to_disk(r, s->active[i]);
	}
}

void
recv_order_run(struct hast_recv *r)
{
	struct recv_secondary *s = r->secondary;

	while (s->queue_head != HAST_NONE && s->flushing == HAST_NONE) {
		uint32_t slot = s->queue_head;
		int flush = s->item[slot].cmd == HAST_CMD_FLUSH;

		if (flush && s->nactive > 0)
			return;
		s->queue_head = s->item[slot].next;
		if (flush) {
			s->flushing = slot;
			recv_to_disk(r, slot);
		} else {
			activate(r, slot);
		}
	}
}

void
recv_order_submit(struct hast_recv *r, uint32_t slot)
{
	struct recv_secondary *s = r->secondary;
	struct item *item = &s->item[slot];
	const struct hast_bio *bio = &s->bio[slot];

	item->cmd = bio->cmd;
	item->begin = bio->offset;
	item->end = bio->offset + bio->length;
	item->state = QUEUED;
	item->next = HAST_NONE;
	if (s->queue_head == HAST_NONE)
		s->queue_head = slot;
	else
		s->item[s->queue_tail].next = slot;
	s->queue_tail = slot;
	recv_order_run(r);
}

void
recv_order_done(struct hast_recv *r, uint32_t slot)
{
	struct recv_secondary *s = r->secondary;

	if (slot == s->flushing)
		s->flushing = HAST_NONE;
	else
		deactivate(r, slot);
}
