/*
 * Micro-benchmarks of the sequencer and its activemap: a component of 1 TiB with extents of 2 MiB, that is 524288 extents in a
 * map of 64 KiB.
 */
#include <string.h>

#include "arena.h"
#include "micro.h"
#include "seq.h"
#include "seq_internal.h"
#include "trace.h"

#define EXTENT ((uint64_t)2 << 20)
#define EXTENTS 524288u
#define MAP (EXTENTS / 8)

static struct hast_arena *arena;	/* connected, memsync, with nothing marked */
static struct hast_arena *maps;		/* for the map alone: never connected, no bio goes through it */
static uint8_t *sparse;			/* one extent in a hundred */
static uint8_t *full;
static uint32_t random_state = 3;

static struct hast_arena *
new_arena(void)
{
	struct hast_geometry g = { .datasize = EXTENTS * EXTENT, .data_offset = HAST_MAP_OFFSET + MAP, .extentsize = EXTENT,
	    .mapsize = MAP, .keepdirty = 64, .nclient = 256, .nsync = 32, .slab_size = 131072 };
	uint64_t size = hast_arena_size(&g);
	void *base;

	MUST(size > 0);
	base = micro_pages(size);
	MUST(hast_arena_init(base, &g) == 0);
	return base;
}

/* What disk, secondary and device do. Number of bios that were given to the disk. */
static uint32_t
serve(struct hast_arena *a)
{
	uint32_t slot, n = 0;

	while (hast_ring_pop(hast_arena_ring(a, HAST_RING_DISK), &slot) == 1) {
		MUST(hast_ring_push(hast_arena_ring(a, HAST_RING_DISK_DONE), slot) == 1);
		n++;
	}
	while (hast_ring_pop(hast_arena_ring(a, HAST_RING_SEND), &slot) == 1) {
		if ((hast_arena_bio(a, slot)->flags & HAST_BIO_MEMSYNC) != 0)
			MUST(hast_ring_push(hast_arena_ring(a, HAST_RING_RECV_DONE), slot | HAST_EVENT_RECEIVED) == 1);
		MUST(hast_ring_push(hast_arena_ring(a, HAST_RING_RECV_DONE), slot) == 1);
	}
	MUST(hast_seq_drain(a) >= 0);
	while ((slot = hast_seq_acked(a)) != HAST_NONE)
		hast_seq_release(a, slot);
	return n;
}

static void
admit(struct hast_arena *a, uint8_t cmd, uint64_t offset)
{
	uint32_t slot = hast_seq_claim(a);
	struct hast_bio *bio;

	MUST(slot != HAST_NONE);
	bio = hast_arena_bio(a, slot);
	bio->cmd = cmd;
	bio->offset = offset;
	bio->length = 4096;
	MUST(hast_seq_submit(a, slot) == 0);
}

void
micro_seq_set_up(void)
{
	sparse = micro_pages(MAP);
	full = micro_pages(MAP);
	memset(full, 0xff, MAP);
	for (uint32_t n = 0; n < EXTENTS; n += 100)
		sparse[n >> 3] |= (uint8_t)(1u << (n & 7));
	arena = new_arena();
	hast_arena_seq(arena)->mode = HAST_MODE_MEMSYNC;
	hast_seq_connect(arena, NULL);
	MUST(hast_arena_seq(arena)->connected);
	/* As after a synchronisation. */
	hast_arena_seq(arena)->peer_whole = 1;
	/* The hot extents' map update. */
	for (uint32_t i = 0; i < 64; i++)
		admit(arena, HAST_CMD_WRITE, (uint64_t)i * EXTENT);
	while (serve(arena) > 0)
		;
	MUST(hast_seq_quiet(arena));
	maps = new_arena();
	/* Every extent has been written to, in the first epoch. */
	for (uint32_t n = 0; n < EXTENTS; n++)
		((struct hast_extent *)((char *)maps + maps->extent_off))[n].epoch = 1;
}

/* ---- the sequencer ---- */

static void
writes(uint64_t n, uint32_t depth)
{
	for (uint64_t i = 0; i < n; i += depth) {
		for (uint32_t k = 0; k < depth; k++)
			admit(arena, HAST_CMD_WRITE, (micro_random(&random_state) % 16384) * 4096 % (64 * EXTENT));
		do
			(void)serve(arena);
		while (!hast_seq_quiet(arena));
	}
}

static void
write_1(uint64_t n)
{
	writes(n, 1);
}

static void
write_32(uint64_t n)
{
	writes(n, 32);
}

static void
read_32(uint64_t n)
{
	for (uint64_t i = 0; i < n; i += 32) {
		for (uint32_t k = 0; k < 32; k++)
			admit(arena, HAST_CMD_READ, (micro_random(&random_state) % 16384) * 4096);
		(void)serve(arena);
	}
}

static void
flush(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++) {
		uint32_t slot = hast_seq_claim(arena);

		hast_arena_bio(arena, slot)->cmd = HAST_CMD_FLUSH;
		MUST(hast_seq_submit(arena, slot) == 0);
		(void)serve(arena);
	}
}

/* ---- tracing ---- */

static void
trace_off(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		hast_trace(maps, HAST_STAGE_DISK, HAST_TRACE_IN, i);
}

static void
trace_on(uint64_t n)
{
	hast_trace_switch(maps, 1);
	trace_off(n);
	hast_trace_switch(maps, 0);
}

/* ---- the map ---- */

static void
mark_hot(uint64_t n)
{
	struct hast_bio bio = { .cmd = HAST_CMD_WRITE, .length = 4096, .used = 1 };

	for (uint64_t i = 0; i < n; i++) {
		bio.offset = (i & 31) * EXTENT;
		seq_map_enter(maps, &bio);
		micro_use((uint64_t)seq_map_durable(maps, &bio));
		seq_map_leave(maps, &bio, 1);
	}
}

static void
mark_anywhere(uint64_t n)
{
	struct hast_bio bio = { .cmd = HAST_CMD_WRITE, .length = 4096, .used = 1 };

	for (uint64_t i = 0; i < n; i++) {
		bio.offset = (micro_random(&random_state) % EXTENTS) * EXTENT;
		seq_map_enter(maps, &bio);
		micro_use((uint64_t)seq_map_durable(maps, &bio));
		seq_map_leave(maps, &bio, 1);
	}
}

/* The maps as they are when the component is opened and its map on disk says this. */
static void
opened(const uint8_t *map)
{
	memset((uint8_t *)maps + maps->dirty_off, 0, MAP);
	memset((uint8_t *)maps + maps->ondisk_off, 0, MAP);
	memset((uint8_t *)maps + maps->sync_off, 0, MAP);
	hast_seq_load_map(maps, map);
}

static void
merge_sparse(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		opened(sparse);
}

static void
merge_full(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		opened(full);
}

/* Everything that is dirty may be cleared: both nodes have flushed it. */
static void
clear(uint64_t n, const uint8_t *map)
{
	struct hast_seq *s = hast_arena_seq(maps);

	s->connected = 1;
	s->flushed = s->epoch;
	memset((uint8_t *)maps + maps->sync_off, 0, MAP);
	for (uint64_t i = 0; i < n; i++) {
		memcpy((uint8_t *)maps + maps->dirty_off, map, MAP);
		micro_use(seq_map_clean(maps));
	}
	s->connected = 0;
}

static void
clear_sparse(uint64_t n)
{
	clear(n, sparse);
}

static void
clear_full(uint64_t n)
{
	clear(n, full);
}

static void
look_up(uint64_t n)
{
	struct hast_bio bio = { .cmd = HAST_CMD_READ, .length = 4096 };
	uint64_t found = 0;

	memcpy((uint8_t *)maps + maps->sync_off, sparse, MAP);
	for (uint64_t i = 0; i < n; i++) {
		bio.offset = i % EXTENTS * EXTENT;
		found += (uint64_t)seq_sync_marked(maps, &bio);
	}
	micro_use(found);
}

/* Nothing is marked: the whole map is looked at. */
static void
scan_empty(uint64_t n)
{
	memset((uint8_t *)maps + maps->sync_off, 0, MAP);
	for (uint64_t i = 0; i < n; i++)
		micro_use((uint64_t)seq_sync_any(maps));
}

/* What the loss of the secondary takes: no dirty extent was flushed by both. */
static void
suspect_sparse(uint64_t n)
{
	memcpy((uint8_t *)maps + maps->dirty_off, sparse, MAP);
	hast_arena_seq(maps)->flushed = 0;
	for (uint64_t i = 0; i < n; i++) {
		memset((uint8_t *)maps + maps->sync_off, 0, MAP);
		seq_map_suspect(maps);
	}
}

const struct micro micro_seq[] = {
	{ "sequencer: a memsync write, alone", write_1, 0 },
	{ "sequencer: a memsync write, of 32", write_32, 0 },
	{ "sequencer: a read, of 32", read_32, 0 },
	{ "sequencer: a flush", flush, 0 },
	{ "trace: an event, switched off", trace_off, 0 },
	{ "trace: an event, switched on", trace_on, 0 },
	{ "map: mark and leave, hot extents", mark_hot, 0 },
	{ "map: mark and leave, anywhere", mark_anywhere, 0 },
	{ "map: look an extent up", look_up, 0 },
	{ "map: load 64 KiB, 1% dirty", merge_sparse, 0 },
	{ "map: load 64 KiB, all dirty", merge_full, 0 },
	{ "map: clear 64 KiB, 1% dirty", clear_sparse, 0 },
	{ "map: clear 64 KiB, all dirty", clear_full, 0 },
	{ "map: look for a marked extent in 64 KiB of none", scan_empty, 0 },
	{ "map: suspect 64 KiB, 1% dirty", suspect_sparse, 0 },
	{ NULL, NULL, 0 }
};
