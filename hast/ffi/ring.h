/*
 * Single-producer single-consumer ring of 32-bit entries in shared memory.
 *
 * Invariants:
 * - tail is written by the producer only, head by the consumer only; both run freely and wrap at 2^32,
 *   the difference is the number of entries in the ring and never above mask + 1;
 * - an entry is read only after the tail that covers it was acquired, and overwritten only after the head
 *   that passed it was acquired;
 * - a peer's index is untrusted after a crash: a difference above mask + 1 is reported, never followed.
 *
 * Each side keeps a copy of the other's index on its own cache line, so that in steady state a push or a
 * pop touches the other side's line once per batch and not once per entry.
 */
#ifndef HAST_RING_H
#define HAST_RING_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
struct hast_ring {
	uint32_t mask;			/* entries - 1, entries a power of two */
	uint32_t pad0[15];
	uint32_t tail;			/* producer's line */
	uint32_t head_seen;
	uint32_t pad1[14];
	uint32_t head;			/* consumer's line */
	uint32_t tail_seen;
	uint32_t pad2[14];
	uint32_t entry[];
};

/* Bytes that a ring of so many entries takes, a multiple of 64. */
size_t hast_ring_size(uint32_t entries);
/* entries: a power of two. */
void hast_ring_init(struct hast_ring *ring, uint32_t entries);
/* The same operations for those who are not inlined: Python, tests. -1 when the ring is corrupt. */
int hast_ring_push_some(struct hast_ring *ring, const uint32_t *from, uint32_t n);
int hast_ring_pop_some(struct hast_ring *ring, uint32_t *to, uint32_t n);
/* For those who look from outside: never above the size of the ring, also while both sides are moving. */
uint32_t hast_ring_used(const struct hast_ring *ring);
/* cffi: end */

/* Room for new entries, as the producer sees it. Looks at the consumer's line only when it seems full. */
static inline uint32_t
hast_ring_room(struct hast_ring *ring, uint32_t want)
{
	uint32_t size = ring->mask + 1;
	uint32_t used = ring->tail - ring->head_seen;

	if (used > size || size - used < want) {
		ring->head_seen = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE);
		used = ring->tail - ring->head_seen;
	}
	return used > size ? 0 : size - used;
}

/* 1 when pushed, 0 when full or when the consumer left nonsense (hast_ring_push_some() then says -1). */
static inline int
hast_ring_push(struct hast_ring *ring, uint32_t value)
{
	uint32_t tail = ring->tail;

	if (hast_ring_room(ring, 1) == 0)
		return 0;
	ring->entry[tail & ring->mask] = value;
	__atomic_store_n(&ring->tail, tail + 1, __ATOMIC_RELEASE);
	return 1;
}

/* Entries ready to be taken, as the consumer sees it. UINT32_MAX when the producer left nonsense. */
static inline uint32_t
hast_ring_ready(struct hast_ring *ring)
{
	uint32_t ready = ring->tail_seen - ring->head;

	if (ready == 0 || ready > ring->mask + 1) {
		ring->tail_seen = __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE);
		ready = ring->tail_seen - ring->head;
	}
	return ready > ring->mask + 1 ? UINT32_MAX : ready;
}

/* 1 when one was taken, 0 when empty, -1 when the ring is corrupt. */
static inline int
hast_ring_pop(struct hast_ring *ring, uint32_t *value)
{
	uint32_t head = ring->head;
	uint32_t ready = hast_ring_ready(ring);

	if (ready == 0)
		return 0;
	if (ready == UINT32_MAX)
		return -1;
	*value = ring->entry[head & ring->mask];
	__atomic_store_n(&ring->head, head + 1, __ATOMIC_RELEASE);
	return 1;
}

#endif
