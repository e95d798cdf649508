/* The bitmaps and extents of the sequencer's activemap, for seq_map.c, where extents become dirty and clean, and
   seq_map_update.c, which writes that to the disk. */
#ifndef HAST_SEQ_MAP_INTERNAL_H
#define HAST_SEQ_MAP_INTERNAL_H

#include "seq.h"
#include "seq_internal.h"

#define EXTENTS_PER_BLOCK ((uint64_t)HAST_MAP_BLOCK * 8)

static inline uint8_t *
dirty_of(struct hast_arena *a)
{
	return (uint8_t *)a + a->dirty_off;
}

static inline uint8_t *
ondisk_of(struct hast_arena *a)
{
	return (uint8_t *)a + a->ondisk_off;
}

static inline uint8_t *
sync_of(struct hast_arena *a)
{
	return (uint8_t *)a + a->sync_off;
}

static inline uint8_t *
changed_of(struct hast_arena *a)
{
	return (uint8_t *)a + a->changed_off;
}

static inline struct hast_extent *
extent_of(struct hast_arena *a, uint64_t n)
{
	return (struct hast_extent *)((char *)a + a->extent_off) + n;
}

static inline uint64_t
first_extent(const struct hast_arena *a, const struct hast_bio *bio)
{
	return bio->offset >> a->extent_shift;
}

static inline uint64_t
last_extent(const struct hast_arena *a, const struct hast_bio *bio)
{
	return (bio->offset + bio->length - 1) >> a->extent_shift;
}

static inline void
mark_changed(struct hast_arena *a, uint64_t extent)
{
	changed_of(a)[extent / EXTENTS_PER_BLOCK] = 1;
	seq_of(a)->map_dirty = 1;
}

#endif
