#include "ring.h"

#include <string.h>

size_t
hast_ring_size(uint32_t entries)
{
	size_t size = sizeof(struct hast_ring) + (size_t)entries * sizeof(uint32_t);

	return (size + 63) & ~(size_t)63;
}

void
hast_ring_init(struct hast_ring *ring, uint32_t entries)
{
	memset(ring, 0, sizeof(*ring));
	ring->mask = entries - 1;
}

int
hast_ring_push_some(struct hast_ring *ring, const uint32_t *from, uint32_t n)
{
	uint32_t tail = ring->tail;
	uint32_t room = hast_ring_room(ring, n);

	if (tail - ring->head_seen > ring->mask + 1)
		return -1;
	if (n > room)
		n = room;
	for (uint32_t i = 0; i < n; i++)
		ring->entry[(tail + i) & ring->mask] = from[i];
	__atomic_store_n(&ring->tail, tail + n, __ATOMIC_RELEASE);
	return (int)n;
}

int
hast_ring_pop_some(struct hast_ring *ring, uint32_t *to, uint32_t n)
{
	uint32_t head = ring->head;
	uint32_t ready = hast_ring_ready(ring);

	if (ready == UINT32_MAX)
		return -1;
	if (n > ready)
		n = ready;
	for (uint32_t i = 0; i < n; i++)
		to[i] = ring->entry[(head + i) & ring->mask];
	__atomic_store_n(&ring->head, head + n, __ATOMIC_RELEASE);
	return (int)n;
}

uint32_t
hast_ring_used(const struct hast_ring *ring)
{
	uint32_t size = ring->mask + 1;
	/* The head first: one that ran past an older tail would make the difference wrap. */
	uint32_t head = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE);
	uint32_t used = __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE) - head;

	return used > size ? size : used;
}
