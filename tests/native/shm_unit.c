/*
 * Every function of ring.c, doorbell.c and arena.c once over memory that ends where the arena ends, for
 * AddressSanitizer and UndefinedBehaviorSanitizer. Ends with 0, or with 1 and the line of the first thing that is wrong.
 *
 * HAST_TEST_BREAK_SIZE gives a ring one entry less of memory than it takes.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "arena.h"
#include "seq.h"

#define CHECK(what) do { if (!(what)) { printf("line %d: %s\n", __LINE__, #what); return 1; } } while (0)

#ifdef HAST_TEST_BREAK_SIZE
#define SHORT_BY sizeof(uint32_t)
#else
#define SHORT_BY 0
#endif

static int
ring_at(struct hast_ring *ring, uint32_t entries, uint32_t first)
{
	uint32_t value[40], i;

	hast_ring_init(ring, entries);
	ring->head = ring->tail = ring->head_seen = ring->tail_seen = first;
	CHECK(hast_ring_used(ring) == 0 && hast_ring_pop(ring, &i) == 0);
	for (i = 0; i < 40; i++)
		value[i] = i;
	CHECK(hast_ring_push_some(ring, value, 40) == (int)entries);
	CHECK(hast_ring_push(ring, 1) == 0 && hast_ring_used(ring) == entries);
	memset(value, 0, sizeof(value));
	CHECK(hast_ring_pop(ring, &i) == 1 && i == 0);
	CHECK(hast_ring_pop_some(ring, value, 40) == (int)entries - 1);
	for (i = 1; i < entries; i++)
		CHECK(value[i - 1] == i);
	CHECK(hast_ring_push_some(ring, value, 0) == 0 && hast_ring_pop_some(ring, value, 0) == 0);
	/* A producer that left nonsense, a consumer that did. */
	ring->tail = ring->head + entries + 1;
	CHECK(hast_ring_pop(ring, &i) == -1 && hast_ring_pop_some(ring, value, 40) == -1);
	CHECK(hast_ring_used(ring) <= entries);
	ring->tail = first;
	ring->head = ring->head_seen = first + 1;
	CHECK(hast_ring_push(ring, 1) == 0 && hast_ring_push_some(ring, value, 40) == -1 && ring->tail == first);
	return 0;
}

static int
rings(void)
{
	for (uint32_t entries = 1; entries <= 32; entries *= 2) {
		/* Entries end where the memory ends. */
		size_t size = sizeof(struct hast_ring) + entries * sizeof(uint32_t) - SHORT_BY;
		struct hast_ring *ring = malloc(size);

		CHECK(ring != NULL && size + SHORT_BY <= hast_ring_size(entries) && hast_ring_size(entries) % 64 == 0);
		CHECK(ring_at(ring, entries, 0) == 0);
		CHECK(ring_at(ring, entries, UINT32_MAX - entries / 2) == 0);
		free(ring);
	}
	return 0;
}

static int
doorbells(void)
{
	struct hast_doorbell bell;
	uint64_t full = UINT64_MAX - 1;
	int efd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);

	CHECK(efd >= 0);
	hast_doorbell_init(&bell);
	CHECK(hast_doorbell_ring(&bell, -1) == 0 && bell.wakes == 0);
	hast_doorbell_announce(&bell);
	CHECK(hast_doorbell_wait(&bell, 1) == 1 && bell.sleeping == 0);
	CHECK(hast_doorbell_wait(&bell, -1) == 0);
	hast_doorbell_announce(&bell);
	CHECK(hast_doorbell_ring(&bell, -1) == 0 && bell.wakes == 1 && bell.sleeping == 0);
	CHECK(hast_doorbell_wait(&bell, -1) == 0);
	hast_doorbell_announce(&bell);
	CHECK(hast_doorbell_force(&bell, -1) == 0 && hast_doorbell_wait(&bell, -1) == 0);

	CHECK(hast_doorbell_drain(efd) == 0);
	hast_doorbell_announce(&bell);
	CHECK(hast_doorbell_ring(&bell, efd) == 0 && hast_doorbell_ring(&bell, efd) == 0 && bell.wakes == 3);
	CHECK(read(efd, &full, sizeof(full)) == sizeof(full) && full == 1);
	full = UINT64_MAX - 1;
	CHECK(write(efd, &full, sizeof(full)) == sizeof(full));
	CHECK(hast_doorbell_force(&bell, efd) == 0 && hast_doorbell_drain(efd) == 0);
	CHECK(close(efd) == 0);
	CHECK(hast_doorbell_force(&bell, efd) == -EBADF && hast_doorbell_drain(efd) == -EBADF);
	return 0;
}

static int
fill(struct hast_arena *a)
{
	struct hast_geometry *g = &a->geo;

	for (uint32_t i = 0; i < a->nslots; i++) {
		CHECK(hast_arena_bio(a, i)->slot == i);
		memset(hast_arena_slab(a, i), (int)i, g->slab_size);
	}
	for (uint32_t i = 0; i < HAST_RINGS; i++)
		for (uint32_t n = 0; n < a->ring_entries; n++)
			CHECK(hast_ring_push(hast_arena_ring(a, i), n) == 1);
	memset((char *)a + a->dirty_off, 0xff, g->mapsize);
	memset((char *)a + a->ondisk_off, 0xff, g->mapsize);
	memset((char *)a + a->sync_off, 0xff, g->mapsize);
	/* Nothing of it stood where something else stands. */
	for (uint32_t i = 0; i < a->nslots; i++)
		CHECK(hast_arena_bio(a, i)->slot == i && *(unsigned char *)hast_arena_slab(a, i) == (unsigned char)i);
	return 0;
}

static int
arena(const struct hast_geometry *g)
{
	uint64_t size = hast_arena_size(g);
	void *base = NULL;
	uint64_t *word;

	CHECK(size > 0 && posix_memalign(&base, 4096, size) == 0);
	memset(base, 0, size);
	CHECK(hast_arena_check(base, size) == -EINVAL);
	CHECK(hast_arena_init(base, g) == 0 && hast_arena_check(base, size) == 0);
	CHECK(hast_arena_check(base, size - 4096) == -EINVAL && hast_arena_check(base, 8) == -EINVAL);
	CHECK(fill(base) == 0);
	CHECK(hast_arena_check(base, size) == 0);
	/* Whatever is changed of what the layout says, it is no arena any more. */
	for (word = base; (char *)word < (char *)base + offsetof(struct hast_arena, pad); word++)
		for (int bit = 0; bit < 64; bit++) {
			*word ^= (uint64_t)1 << bit;
			/* Numbers of the geometry that the layout does not depend on may differ. */
			if (hast_arena_check(base, size) == 0)
				CHECK((char *)word - (char *)base >= (long)offsetof(struct hast_arena, geo) &&
				    (char *)word - (char *)base < (long)offsetof(struct hast_arena, extent_shift));
			*word ^= (uint64_t)1 << bit;
		}
	CHECK(hast_arena_check(base, size) == 0);
	free(base);
	return 0;
}

static int
refused(void)
{
	const struct hast_geometry good = { 1 << 20, 8192, 65536, 4096, 4, 4, 2, 4096 };
	struct hast_geometry g;
	char none[1];

#define REFUSED(field, value) do { \
	g = good; \
	g.field = (value); \
	CHECK(hast_arena_size(&g) == 0 && hast_arena_init(none, &g) == -EINVAL); \
} while (0)
	CHECK(hast_arena_size(&good) != 0);
	REFUSED(datasize, 0);
	REFUSED(datasize, 513);
	REFUSED(datasize, UINT64_MAX - 511);
	REFUSED(datasize, (uint64_t)65536 * 4096 * 8 + 512);
	REFUSED(data_offset, 8191);
	REFUSED(data_offset, 7680);
	REFUSED(data_offset, UINT64_MAX - 511);
	REFUSED(extentsize, 0);
	REFUSED(extentsize, 256);
	REFUSED(extentsize, 65537);
	REFUSED(mapsize, 0);
	REFUSED(mapsize, 63);
	REFUSED(mapsize, 8192);
	REFUSED(keepdirty, 0);
	REFUSED(keepdirty, UINT32_MAX);
	REFUSED(nclient, 0);
	REFUSED(nclient, UINT32_MAX);
	REFUSED(nsync, UINT32_MAX);
	REFUSED(slab_size, 0);
	REFUSED(slab_size, 4097);
	REFUSED(slab_size, UINT32_MAX - 4095);
	return 0;
}

int
main(void)
{
	const struct hast_geometry small = { 512, 4096 + 512, 512, 512, 1, 1, 0, 4096 };
	const struct hast_geometry medium = { 100 << 20, 1 << 20, 65536, 8192, 64, 61, 5, 12288 };

	CHECK(rings() == 0);
	CHECK(doorbells() == 0);
	CHECK(refused() == 0);
	CHECK(arena(&small) == 0);
	CHECK(arena(&medium) == 0);
	return 0;
}
