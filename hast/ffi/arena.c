#include "arena.h"

#include <errno.h>
#include <string.h>

#include "seq.h"
#include "trace.h"

_Static_assert(sizeof(struct hast_bio) == 128, "a bio is two cache lines");
_Static_assert(sizeof(struct hast_doorbell) == 64, "a doorbell is one cache line");
_Static_assert(sizeof(struct hast_stage_line) == 64, "a stage's line is one cache line");
_Static_assert(offsetof(struct hast_arena, bell) % 64 == 0, "doorbells stand on cache lines");
_Static_assert(offsetof(struct hast_bio, order) == 64, "the sequencer has a line of its own");

#define MAX_SLOTS 65536u

static uint64_t
align_up(uint64_t value, uint64_t to)
{
	return (value + to - 1) & ~(to - 1);
}

static int
geometry_ok(const struct hast_geometry *g)
{
	uint64_t extents;

	if (g->extentsize < HAST_SECTOR || (g->extentsize & (g->extentsize - 1)) != 0)
		return 0;
	if (g->datasize == 0 || g->datasize % HAST_SECTOR != 0 || g->datasize > (uint64_t)1 << 60)
		return 0;
	if (g->mapsize == 0 || g->mapsize % 64 != 0)
		return 0;
	extents = (g->datasize + g->extentsize - 1) / g->extentsize;
	if ((extents + 7) / 8 > g->mapsize)
		return 0;
	if (g->data_offset < (uint64_t)HAST_MAP_OFFSET + g->mapsize || g->data_offset % HAST_SECTOR != 0 ||
	    g->data_offset > (uint64_t)1 << 60)
		return 0;
	if (g->slab_size < HAST_MAP_BLOCK || g->slab_size % 4096 != 0 || g->slab_size > 64u << 20)
		return 0;
	return g->nclient > 0 && g->nclient <= MAX_SLOTS / 2 && g->nsync <= MAX_SLOTS / 4 &&
	    g->keepdirty > 0 && g->keepdirty <= 1u << 24;
}

/* Fills in everything that follows from the geometry; the arena's own memory is not needed for it. */
static void
layout(struct hast_arena *a, const struct hast_geometry *g)
{
	uint64_t at = align_up(sizeof(*a), 64);

	a->geo = *g;
	a->nslots = g->nclient + g->nsync + 2;
	a->extent_shift = (uint32_t)__builtin_ctz(g->extentsize);
	a->nextents = (g->datasize + g->extentsize - 1) >> a->extent_shift;
	/* Each slot is at most twice in a ring (a memsync write's two replies): so no push can ever fail. */
	a->ring_entries = 4;
	while (a->ring_entries < 2 * a->nslots)
		a->ring_entries *= 2;

	uint64_t *const offset[] = { &a->bio_off, &a->seq_off, &a->active_off, &a->ack_off, &a->keep_off,
	    &a->extent_off, &a->dirty_off, &a->ondisk_off, &a->sync_off, &a->changed_off };
	const uint64_t size[] = { (uint64_t)a->nslots * sizeof(struct hast_bio), sizeof(struct hast_seq),
	    (uint64_t)a->nslots * sizeof(uint32_t), hast_ring_size(a->ring_entries),
	    ((uint64_t)g->keepdirty + 1) * sizeof(struct hast_keep), a->nextents * sizeof(struct hast_extent),
	    g->mapsize, g->mapsize, g->mapsize, ((uint64_t)g->mapsize + HAST_MAP_BLOCK - 1) / HAST_MAP_BLOCK };

	for (size_t i = 0; i < sizeof(size) / sizeof(size[0]); i++) {
		*offset[i] = at;
		at = align_up(at + size[i], 64);
	}
	for (int i = 0; i < HAST_RINGS; i++) {
		a->ring_off[i] = at;
		at += hast_ring_size(a->ring_entries);
	}
	a->slab_off = align_up(at, 4096);
	a->trace_off = a->slab_off + (uint64_t)a->nslots * g->slab_size;
	a->size = a->trace_off + hast_trace_size();
}

uint64_t
hast_trace_size(void)
{
	return align_up(HAST_STAGES * sizeof(struct hast_trace_log), 4096);
}

uint64_t
hast_arena_size(const struct hast_geometry *geo)
{
	struct hast_arena a;

	if (!geometry_ok(geo))
		return 0;
	memset(&a, 0, sizeof(a));
	layout(&a, geo);
	return a.size;
}

int
hast_arena_init(void *base, const struct hast_geometry *geo)
{
	struct hast_arena *a = base;

	if (!geometry_ok(geo))
		return -EINVAL;
	layout(a, geo);
	a->version = HAST_ARENA_VERSION;
	for (uint32_t i = 0; i < a->nslots; i++)
		hast_arena_bio(a, i)->slot = i;
	for (int i = 0; i < HAST_RINGS; i++)
		hast_ring_init(hast_arena_ring(a, (uint32_t)i), a->ring_entries);
	for (int i = 0; i < HAST_STAGES; i++)
		hast_doorbell_init(&a->bell[i]);
	hast_seq_init(a);
	__atomic_store_n(&a->magic, HAST_ARENA_MAGIC, __ATOMIC_RELEASE);
	return 0;
}

int
hast_arena_check(const void *base, uint64_t size)
{
	const struct hast_arena *a = base;
	struct hast_arena want;

	if ((uintptr_t)base % 4096 != 0 || size < sizeof(*a))
		return -EINVAL;
	if (__atomic_load_n(&a->magic, __ATOMIC_ACQUIRE) != HAST_ARENA_MAGIC || a->version != HAST_ARENA_VERSION)
		return -EINVAL;
	/* All that is used as an offset follows from the geometry: it is compared, not trusted. */
	memset(&want, 0, sizeof(want));
	want.magic = HAST_ARENA_MAGIC;
	want.version = HAST_ARENA_VERSION;
	want.geo = a->geo;
	if (!geometry_ok(&want.geo))
		return -EINVAL;
	layout(&want, &want.geo);
	if (want.size != size || memcmp(a, &want, offsetof(struct hast_arena, pad)) != 0)
		return -EINVAL;
	for (int i = 0; i < HAST_RINGS; i++) {
		const struct hast_ring *ring = (const void *)((const char *)base + want.ring_off[i]);

		if (ring->mask != want.ring_entries - 1)
			return -EINVAL;
	}
	return 0;
}

struct hast_bio *
hast_arena_bio(struct hast_arena *arena, uint32_t slot)
{
	return (struct hast_bio *)((char *)arena + arena->bio_off) + slot;
}

void *
hast_arena_slab(struct hast_arena *arena, uint32_t slot)
{
	return (char *)arena + arena->slab_off + (uint64_t)slot * arena->geo.slab_size;
}

struct hast_ring *
hast_arena_ring(struct hast_arena *arena, uint32_t ring)
{
	return (struct hast_ring *)((char *)arena + arena->ring_off[ring]);
}
