/*
 * The activemap's updates, one under way at a time: what is to be cleared, what is written, who waits for it, and what follows when
 * it is there, or has failed; the secondary's own map among them, which is merged before it is connected. Invariants 1 and 2: see seq.h.
 */
#include <errno.h>
#include <string.h>

#include "seq.h"
#include "seq_internal.h"
#include "seq_map_internal.h"

/* What is cleared may have to be marked again by the next write, which waits for that; what is not cleared has to be copied after a
   crash. Writes all over a component are to cost few updates, and a crash not more than so much, and keepdirty. */
#define COLD_BYTES (2ull << 30)

uint32_t
seq_map_dirty_max(const struct hast_geometry *geo)
{
	uint64_t cold = COLD_BYTES / geo->extentsize;

	if (cold < geo->keepdirty)
		cold = geo->keepdirty;
	cold += geo->keepdirty;
	return cold < UINT32_MAX ? (uint32_t)cold : UINT32_MAX;
}

static uint64_t
count_dirty(struct hast_arena *a)
{
	const uint8_t *dirty = dirty_of(a);
	uint64_t n = 0, eight;

	/* The map is a multiple of 512 bytes, and has no bits behind the last extent. */
	for (uint32_t i = 0; i < a->geo.mapsize; i += sizeof(eight)) {
		memcpy(&eight, dirty + i, sizeof(eight));
		n += (uint64_t)__builtin_popcountll(eight);
	}
	return n;
}

uint64_t
seq_map_clean(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	uint8_t *dirty = dirty_of(a);
	const uint8_t *sync = sync_of(a);
	uint64_t cold = 0;

	if (!s->connected)
		return 0;
	for (uint64_t n = 0; n < a->nextents; n++) {
		const struct hast_extent *e;

		if (dirty[n >> 3] == 0) {
			n |= 7;
			continue;
		}
		e = extent_of(a, n);
		if (!bit_test(dirty, n) || bit_test(sync, n) || e->inflight != 0 || e->keep != 0)
			continue;
		if (e->epoch > s->flushed) {
			cold++;
			continue;
		}
		dirty[n >> 3] &= (uint8_t)~(1u << (n & 7));
		mark_changed(a, n);
	}
	return cold;
}

/* A run of changed blocks that fits in a slab; length 0 when nothing is changed. Each search begins where the last run
   ended, so that a block that cannot be written keeps nobody from writing the others. */
static void
changed_run(struct hast_arena *a, uint64_t *offset, uint64_t *length)
{
	struct hast_seq *s = seq_of(a);
	const uint8_t *changed = changed_of(a);
	uint64_t blocks = (a->geo.mapsize + HAST_MAP_BLOCK - 1) / HAST_MAP_BLOCK;
	uint64_t first = s->map_next, end;

	for (uint64_t n = 0; n < blocks && !changed[first]; n++)
		first = first + 1 < blocks ? first + 1 : 0;
	end = first;
	while (end < blocks && changed[end] && (end + 1 - first) * HAST_MAP_BLOCK <= a->geo.slab_size)
		end++;
	s->map_next = (uint32_t)(end < blocks ? end : 0);
	*offset = first * HAST_MAP_BLOCK;
	*length = (end - first) * HAST_MAP_BLOCK;
	if (*length > 0 && *offset + *length > a->geo.mapsize)
		*length = a->geo.mapsize - *offset;
}

void
seq_map_start(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	struct hast_bio *bio = bio_of(a, map_slot(a));
	uint8_t *slab = hast_arena_slab(a, map_slot(a));
	uint8_t *ondisk = ondisk_of(a);

	if (s->map_busy || !s->map_dirty || s->detached || s->turn_detach)
		return;
	/* Too many: as the map is written anyway, cold ones are cleared with it; those that only lack a flush get one. */
	if (count_dirty(a) > s->dirty_max && seq_map_clean(a) > a->geo.keepdirty)
		(void)seq_own_flush(a);
	changed_run(a, &bio->offset, &bio->length);
	if (bio->length == 0) {
		s->map_dirty = 0;
		return;
	}
	memcpy(slab, dirty_of(a) + bio->offset, bio->length);
	memset(changed_of(a) + bio->offset / HAST_MAP_BLOCK, 0,
	    (bio->length + HAST_MAP_BLOCK - 1) / HAST_MAP_BLOCK);
	for (uint64_t i = 0; i < bio->length; i++)
		ondisk[bio->offset + i] &= slab[i];
	bio->cmd = HAST_CMD_MAP;
	/* The secondary clears its own map as soon as it knows that this one has been merged with it. */
	bio->flags = s->metaflush || s->joining ? HAST_BIO_DURABLE : 0;
	bio->state = HAST_BIO_RUNNING;
	bio->pending = bio->used = 1u << HAST_LOCAL;
	bio->error[HAST_LOCAL] = 0;
	bio->held = bio->acked = bio->answered = 0;
	bio->seq = ++s->seq << 16 | bio->slot;
	s->map_busy = 1;
	s->inuse++;
	s->stats.map_update++;
	seq_push(a, HAST_RING_DISK, bio->slot);
}

/* Was this update, of these bytes of the map, to make an extent dirty that the mutation waits for? */
static int
needed(struct hast_arena *a, const struct hast_bio *bio, uint64_t offset, uint64_t length)
{
	const uint8_t *update = hast_arena_slab(a, map_slot(a));
	uint64_t first = first_extent(a, bio), last = last_extent(a, bio);

	if (first < offset * 8)
		first = offset * 8;
	if (last >= (offset + length) * 8)
		last = (offset + length) * 8 - 1;
	for (uint64_t n = first; n <= last; n++)
		if (bit_test(update, n - offset * 8) && !bit_test(ondisk_of(a), n))
			return 1;
	return 0;
}

/* Those who waited go, or are refused when the update that they needed has failed, or when there is no hope. 1 when one of those who
   go on waiting needs a map update. */
static int
wake_waiters(struct hast_arena *a, int error, uint64_t offset, uint64_t length)
{
	struct hast_seq *s = seq_of(a);
	uint32_t slot = s->mapwait_head;
	uint32_t refused = HAST_NONE, tail = HAST_NONE;
	uint32_t reads = HAST_NONE, last_read = HAST_NONE;
	int need = 0;

	s->mapwait_head = HAST_NONE;
	while (slot != HAST_NONE) {
		struct hast_bio *bio = bio_of(a, slot);

		slot = bio->next;
		if (bio->cmd == HAST_CMD_READ) {
			seq_list_append(a, &reads, &last_read, bio->slot);
		} else if (seq_impossible(a, bio) != 0 || (error != 0 && needed(a, bio, offset, length))) {
			seq_list_append(a, &refused, &tail, bio->slot);
		} else if (!seq_map_durable(a, bio)) {
			need = 1;
			seq_list_append(a, &s->mapwait_head, &s->mapwait_tail, bio->slot);
		} else if (seq_held(a)) {
			seq_list_append(a, &s->mapwait_head, &s->mapwait_tail, bio->slot);
		} else if (!seq_must_wait(a, bio)) {
			seq_launch(a, bio);
		}
	}
	/* Only now, because this may start the next update, which overwrites the slab. */
	while (refused != HAST_NONE) {
		struct hast_bio *bio = bio_of(a, refused);
		int why = seq_impossible(a, bio);

		refused = bio->next;
		seq_refuse(a, bio, why != 0 ? why : error);
	}
	/* Reads of what only the secondary has wait for the connection, not for the map. */
	while (reads != HAST_NONE) {
		struct hast_bio *bio = bio_of(a, reads);

		reads = bio->next;
		if (seq_read_held(a))
			seq_list_append(a, &s->mapwait_head, &s->mapwait_tail, bio->slot);
		else
			seq_read_remote(a, bio);
	}
	return need;
}

void
seq_map_wake(struct hast_arena *a)
{
	if (wake_waiters(a, 0, 0, 0))
		seq_map_start(a);
}

/* Requests go to the secondary from now on. */
static void
join(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	s->joining = 0;
	s->connected = 1;
	s->degraded_ok = 0;
	s->events |= HAST_SEQ_CONNECTED;
	seq_mark_local(a);
	seq_confirm(a);
}

/* Is all that the secondary's own map says in this node's, and durable? It clears its own when it has the first request. */
static int
peers_map_kept(struct hast_arena *a)
{
	const struct hast_seq *s = seq_of(a);
	const uint8_t *sync = sync_of(a), *ondisk = ondisk_of(a);

	if (s->merged == 0)
		return 1;
	for (uint64_t i = 0; i < (a->nextents + 7) / 8; i++)
		if ((sync[i] & ~ondisk[i]) != 0)
			return 0;
	return s->metaflush != 0;	/* else it need not be durable */
}

/* The update has failed. What to tell those who needed it: 0: nothing, the secondary takes this component's place; or the worker is
   deciding that it is to, for its own map, and the newer data, can't be used otherwise. */
static int
map_failed(struct hast_arena *a, int error, uint64_t offset, uint64_t length)
{
	struct hast_seq *s = seq_of(a);
	int joins = s->joining && peers_map_kept(a), turned;

	memset(changed_of(a) + offset / HAST_MAP_BLOCK, 1, (length + HAST_MAP_BLOCK - 1) / HAST_MAP_BLOCK);
	s->map_dirty = 1;
	s->stats.map_error++;
	/* Where it was the flush that has failed, the disk has lost something, and is nothing to be copied from. */
	if (__atomic_load_n(&a->stage[HAST_STAGE_DISK].extra[0], __ATOMIC_SEQ_CST) != 0)
		s->no_source = 1;
	/* What this node alone wants to mark is no reason to leave the secondary, which is all the more wanted. */
	if (joins)
		join(a);
	turned = seq_turn(a, 1);
	if (joins && s->confirming)
		(void)seq_own_flush(a);
	if (turned)
		return 0;
	s->join_failed |= s->joining;
	s->joining = 0;
	seq_raise(a, HAST_SEQ_MAP_FAILED);
	return s->join_failed && seq_held(a) ? 0 : error;
}

void
seq_map_done(struct hast_arena *a, int error)
{
	struct hast_seq *s = seq_of(a);
	struct hast_bio *bio = bio_of(a, map_slot(a));
	uint64_t offset = bio->offset;
	uint64_t length = s->map_busy && bio->pending == 0 ? bio->length : 0;
	int failed = error != 0;

	if (length > 0) {
		s->map_busy = 0;
		if (error == 0) {
			/* Else metaflush was switched on meanwhile, and this is written once more. */
			if (!s->metaflush || (bio->flags & HAST_BIO_DURABLE) != 0)
				memcpy(ondisk_of(a) + offset, hast_arena_slab(a, bio->slot), length);
			s->asked &= ~(uint32_t)HAST_SEQ_MAP_FAILED;
		} else {
			error = map_failed(a, error, offset, length);
		}
	}
	if (error == 0 && s->joining) {
		seq_map_start(a);
		if (!s->map_busy) {
			join(a);
			if (s->confirming)
				(void)seq_own_flush(a);
		}
	}
	/* Those who are not told are not helped by another try either. */
	if (wake_waiters(a, error, offset, length) && (error != 0 || !failed))
		seq_map_start(a);
	/* metaflush was switched on: until all of it is written once more. */
	if (length > 0 && !failed && s->again) {
		seq_map_start(a);
		s->again = s->map_busy;
	}
	seq_flush_resume(a);
	if (s->turning)
		seq_durable_go_on(a);
}
