/*
 * What the stress tests of rings and doorbells run: producers with a ring each, one consumer, one doorbell to wake
 * it, and one doorbell per producer to wake that one when there is room again. The same code runs between processes
 * (from test_ring_processes.py) and between threads (ring_tsan.c).
 *
 * Checked, each by the one who would see it: every entry once and in order, with what was written
 * before its push; indices that only move by what was pushed or taken; no wait that is not ended by a ring.
 *
 * HAST_TEST_BREAK_* build it wrong on purpose, to show that the tests see it:
 *   PUSH     an entry is published without release
 *   POP      a place is given back before it was read
 *   RECHECK  the consumer does not look again after its announcement
 *   FORCE    the successor of a dead producer does not force the doorbell
 */
#ifndef HAST_TEST_RING_PUMP_H
#define HAST_TEST_RING_PUMP_H

#include <stddef.h>
#include <stdint.h>

#include "doorbell.h"
#include "ring.h"

#define MAX_LANES 4
#define MAX_BATCH 64

enum bench_result {
	BENCH_OK = 0,
	BENCH_LOST_WAKE = 10,		/* a wait ran into its time limit */
	BENCH_WRONG_ENTRY = 11,		/* lost, doubled, out of order or not what was written */
	BENCH_CORRUPT = 12,		/* the other side's index cannot be */
	BENCH_GAP = 13,			/* a predecessor left more undone than it can have had in hand */
	BENCH_SYSTEM_CALL = 14
};

struct lane {
	struct hast_doorbell space;	/* where the producer waits for room */
	int32_t space_efd;
	uint32_t first;			/* the index at which head and tail began */
	uint64_t ring_off;
	uint64_t payload_off;		/* uint64_t[payload_mask + 1], handed over with the entries */
	uint64_t pad0[5];
	uint64_t pushed;		/* by the producer */
	uint64_t target;
	uint64_t pad1[6];
	uint64_t processed;		/* by the consumer: taken and checked */
	uint64_t lost;			/* taken by a consumer that died before it had checked them */
	uint64_t waits;			/* of the producer */
	uint64_t pad2[5];
};

struct bench {
	struct hast_doorbell bell;
	int32_t efd;
	uint32_t nlanes;
	uint32_t entries;
	uint32_t payload_mask;
	uint32_t timeout_ms;
	uint32_t stop;			/* producers are to end */
	uint32_t closed;		/* there are none any more: the consumer ends when it has everything */
	uint32_t pad;
	uint64_t waits;			/* of the consumer */
	uint64_t pad1[3];
	struct lane lane[MAX_LANES];
};

size_t bench_size(uint32_t nlanes, uint32_t entries);
/* base: zeroed memory of that size, aligned to 64. first: where the indices begin. efd, space_efd[n]: -1 for futex. */
void bench_init(struct bench *b, uint32_t nlanes, uint32_t entries, uint32_t first, uint64_t target,
    uint32_t timeout_ms, int efd, const int *space_efd);
struct hast_ring *bench_ring(struct bench *b, uint32_t lane);
/* Both: enum bench_result. successor: 1 when the one before was killed. */
int bench_produce(struct bench *b, uint32_t lane, uint32_t seed, int successor);
int bench_consume(struct bench *b, uint32_t seed);
/* Pushes one entry, takes the announcement of the sleeping consumer, and dies before it wakes it. */
void bench_die_before_wake(struct bench *b, uint32_t lane);
int bench_stop(struct bench *b);
int bench_close(struct bench *b);
/* For those outside. */
uint64_t bench_pushed(const struct bench *b, uint32_t lane);
uint64_t bench_processed(const struct bench *b, uint32_t lane);
uint64_t bench_lost(const struct bench *b, uint32_t lane);
uint64_t bench_waits(const struct bench *b);
uint32_t bench_used(struct bench *b, uint32_t lane);
uint32_t bench_sleeping(const struct bench *b);
void bench_damage_tail(struct bench *b, uint32_t lane, uint32_t by);

#endif
