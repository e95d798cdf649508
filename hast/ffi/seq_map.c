/*
 * The sequencer's activemap: which extents are dirty, and which are so on disk for certain. Map updates:
 * seq_map_update.c. Invariants 1 and 2: see seq.h.
 *
 * Three bitmaps, one bit an extent: `dirty` is what the map on disk should say, `ondisk` what it says whatever happens now
 * (a bit that an update under way is about to clear is not in it any more), `sync` which extents may differ between
 * the nodes. sync is a part of dirty; each extent with mutations in flight is in dirty.
 */
#include <string.h>

#include "seq.h"
#include "seq_internal.h"
#include "seq_map_internal.h"

/* ---- extents kept dirty: least recently used first out ---- */

static struct hast_keep *
keep_of(struct hast_arena *a)
{
	return (struct hast_keep *)((char *)a + a->keep_off);
}

static void
keep_unlink(struct hast_keep *keep, uint32_t i)
{
	keep[keep[i].prev].next = keep[i].next;
	keep[keep[i].next].prev = keep[i].prev;
}

static void
keep_to_front(struct hast_keep *keep, uint32_t i)
{
	keep[i].prev = 0;
	keep[i].next = keep[0].next;
	keep[keep[0].next].prev = i;
	keep[0].next = i;
}

static void
keep_touch(struct hast_arena *a, uint64_t extent)
{
	struct hast_seq *s = seq_of(a);
	struct hast_keep *keep = keep_of(a);
	struct hast_extent *e = extent_of(a, extent);
	uint32_t i = e->keep;

	if (i != 0) {
		if (keep[0].next == i)
			return;
		keep_unlink(keep, i);
	} else if (s->nkeep < a->geo.keepdirty) {
		i = ++s->nkeep;
	} else {
		i = keep[0].prev;
		keep_unlink(keep, i);
		extent_of(a, keep[i].extent)->keep = 0;
	}
	keep[i].extent = extent;
	e->keep = i;
	keep_to_front(keep, i);
}

void
seq_map_init(struct hast_arena *a)
{
	keep_of(a)[0].prev = keep_of(a)[0].next = 0;
}

/* ---- mutations come and go ---- */

int
seq_map_durable(struct hast_arena *a, const struct hast_bio *bio)
{
	const uint8_t *ondisk = ondisk_of(a);

	if (seq_of(a)->detached)
		return 1;
	for (uint64_t n = first_extent(a, bio); n <= last_extent(a, bio); n++)
		if (!bit_test(ondisk, n))
			return 0;
	return 1;
}

void
seq_map_enter(struct hast_arena *a, const struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);
	uint8_t *dirty = dirty_of(a);

	for (uint64_t n = first_extent(a, bio); n <= last_extent(a, bio); n++) {
		struct hast_extent *e = extent_of(a, n);

		if (e->inflight++ == 0 && !bit_test(sync_of(a), n))
			s->ndirty++;
		/* A delete says that a range is used no more: it is no reason to push hot extents out. */
		if (bio->cmd == HAST_CMD_WRITE)
			keep_touch(a, n);
		if (!bit_test(dirty, n)) {
			dirty[n >> 3] |= (uint8_t)(1u << (n & 7));
			mark_changed(a, n);
		}
	}
}

void
seq_map_leave(struct hast_arena *a, const struct hast_bio *bio, int clean)
{
	struct hast_seq *s = seq_of(a);
	uint8_t *sync = sync_of(a);

	for (uint64_t n = first_extent(a, bio); n <= last_extent(a, bio); n++) {
		struct hast_extent *e = extent_of(a, n);

		if (bio->used != 0)
			e->epoch = s->last_epoch = s->epoch;
		e->inflight--;
		if (!clean) {
			sync[n >> 3] |= (uint8_t)(1u << (n & 7));
			seq_sync_spoil(a, n);
		}
		if (e->inflight == 0 && !bit_test(sync, n))
			s->ndirty--;
	}
	if (!clean)
		seq_sync_again(a);
}

static void
mark_sync(struct hast_arena *a, uint64_t n)
{
	uint8_t *sync = sync_of(a);

	if (bit_test(sync, n))
		return;
	sync[n >> 3] |= (uint8_t)(1u << (n & 7));
	if (extent_of(a, n)->inflight == 0)
		seq_of(a)->ndirty++;
}

void
seq_map_suspect_bio(struct hast_arena *a, const struct hast_bio *bio)
{
	for (uint64_t n = first_extent(a, bio); n <= last_extent(a, bio); n++) {
		mark_sync(a, n);
		seq_sync_spoil(a, n);
	}
}

void
seq_map_suspect_read(struct hast_arena *a, const struct hast_bio *bio)
{
	uint8_t *dirty = dirty_of(a);

	for (uint64_t n = first_extent(a, bio); n <= last_extent(a, bio); n++) {
		if (!bit_test(dirty, n)) {
			dirty[n >> 3] |= (uint8_t)(1u << (n & 7));
			mark_changed(a, n);
		}
	}
	seq_map_suspect_bio(a, bio);
	seq_map_start(a);
}

int
seq_map_ondisk(struct hast_arena *a, uint64_t extent)
{
	return bit_test(ondisk_of(a), extent);
}

void
hast_seq_metaflush(struct hast_arena *a, uint32_t on)
{
	struct hast_seq *s = seq_of(a);
	int begins = on && !s->metaflush && !s->detached;

	s->metaflush = on;
	if (!begins)
		return;
	/* What was written without a flush may only be in the disk's cache: all of it once more. */
	memset(ondisk_of(a), 0, a->geo.mapsize);
	memset(changed_of(a), 1, (a->geo.mapsize + HAST_MAP_BLOCK - 1) / HAST_MAP_BLOCK);
	s->map_dirty = s->again = 1;
	seq_map_start(a);
}

void
seq_map_detach(struct hast_arena *a)
{
	for (uint64_t n = 0; n < a->nextents; n++) {
		dirty_of(a)[n >> 3] |= (uint8_t)(1u << (n & 7));
		mark_sync(a, n);
	}
}

void
seq_map_suspect(struct hast_arena *a)
{
	const uint8_t *dirty = dirty_of(a);

	for (uint64_t n = 0; n < a->nextents; n++) {
		if (dirty[n >> 3] == 0)
			n |= 7;
		else if (bit_test(dirty, n) && extent_of(a, n)->epoch > seq_of(a)->flushed)
			mark_sync(a, n);
	}
}

void
seq_map_copied(struct hast_arena *a, uint64_t extent)
{
	struct hast_extent *e = extent_of(a, extent);

	e->epoch = seq_of(a)->epoch;
	if (e->inflight == 0)
		seq_of(a)->ndirty--;
}

void
seq_map_wait(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	bio->state = HAST_BIO_MAPWAIT;
	seq_list_append(a, &s->mapwait_head, &s->mapwait_tail, bio->slot);
	seq_map_start(a);
}

uint32_t
seq_map_merge(struct hast_arena *a, const uint8_t *map, int ondisk)
{
	uint32_t found = 0;

	for (uint64_t n = 0; n < a->nextents; n++) {
		uint8_t bit = (uint8_t)(1u << (n & 7));

		if (map[n >> 3] == 0) {
			n |= 7;
			continue;
		}
		if (!bit_test(map, n))
			continue;
		if (ondisk)
			ondisk_of(a)[n >> 3] |= bit;
		/* Without metaflush one that is there already may not be durable. */
		if (!ondisk && (!bit_test(dirty_of(a), n) || !seq_of(a)->metaflush))
			mark_changed(a, n);
		dirty_of(a)[n >> 3] |= bit;
		mark_sync(a, n);
		found = 1;
	}
	return found;
}
