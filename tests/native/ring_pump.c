#include "ring_pump.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <time.h>

static uint32_t
next_random(uint32_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 17;
	*state ^= *state << 5;
	return *state;
}

static uint32_t
value_of(uint32_t lane, uint32_t index)
{
	return (index + lane * 0x61c88647u) * 2654435761u;
}

static uint32_t
payload_entries(uint32_t entries)
{
	/* The consumer lags behind head by at most a batch, the producer is ahead of it by at most a ring. */
	return 4 * (entries > MAX_BATCH ? entries : MAX_BATCH);
}

size_t
bench_size(uint32_t nlanes, uint32_t entries)
{
	return sizeof(struct bench) + nlanes * (hast_ring_size(entries) + payload_entries(entries) * sizeof(uint64_t));
}

struct hast_ring *
bench_ring(struct bench *b, uint32_t lane)
{
	return (struct hast_ring *)((char *)b + b->lane[lane].ring_off);
}

static uint64_t *
payload(struct bench *b, uint32_t lane, uint32_t index)
{
	return (uint64_t *)((char *)b + b->lane[lane].payload_off) + (index & b->payload_mask);
}

void
bench_init(struct bench *b, uint32_t nlanes, uint32_t entries, uint32_t first, uint64_t target,
    uint32_t timeout_ms, int efd, const int *space_efd)
{
	uint64_t at = sizeof(*b);

	hast_doorbell_init(&b->bell);
	b->efd = efd;
	b->nlanes = nlanes;
	b->entries = entries;
	b->payload_mask = payload_entries(entries) - 1;
	b->timeout_ms = timeout_ms;
	for (uint32_t i = 0; i < nlanes; i++) {
		struct lane *lane = &b->lane[i];
		struct hast_ring *ring;

		hast_doorbell_init(&lane->space);
		lane->space_efd = space_efd[i];
		lane->target = target;
		lane->first = first;
		lane->ring_off = at;
		lane->payload_off = at + hast_ring_size(entries);
		at = lane->payload_off + payload_entries(entries) * sizeof(uint64_t);
		ring = bench_ring(b, i);
		hast_ring_init(ring, entries);
		ring->head = ring->tail = ring->head_seen = ring->tail_seen = first;
	}
}

static int
wait_at(struct hast_doorbell *bell, int efd, uint32_t timeout_ms)
{
	int done;

	if (efd < 0) {
		done = hast_doorbell_wait(bell, (int)timeout_ms);
		return done == 0 || done == -EINTR ? BENCH_OK : done == 1 ? BENCH_LOST_WAKE : BENCH_SYSTEM_CALL;
	}
	struct pollfd fd = { .fd = efd, .events = POLLIN };

	done = poll(&fd, 1, (int)timeout_ms);
	hast_doorbell_cancel(bell);
	if (done == 0)
		return BENCH_LOST_WAKE;
	if ((done == -1 && errno != EINTR) || hast_doorbell_drain(efd) != 0)
		return BENCH_SYSTEM_CALL;
	return BENCH_OK;
}

static int
push_one(struct hast_ring *ring, uint32_t value)
{
#ifdef HAST_TEST_BREAK_PUSH
	uint32_t tail = ring->tail;

	if (hast_ring_room(ring, 1) == 0)
		return 0;
	ring->entry[tail & ring->mask] = value;
	__atomic_store_n(&ring->tail, tail + 1, __ATOMIC_RELAXED);
	return 1;
#else
	return hast_ring_push(ring, value);
#endif
}

static int
pop_one(struct hast_ring *ring, uint32_t *value)
{
#ifdef HAST_TEST_BREAK_POP
	uint32_t head = ring->head;
	uint32_t ready = hast_ring_ready(ring);

	if (ready == 0 || ready == UINT32_MAX)
		return ready == 0 ? 0 : -1;
	__atomic_store_n(&ring->head, head + 1, __ATOMIC_RELEASE);
	*value = ring->entry[head & ring->mask];
	return 1;
#else
	return hast_ring_pop(ring, value);
#endif
}

/* Half of the time as one batch, half of the time one by one. Entries pushed, or -1. */
static int
push_batch(struct bench *b, uint32_t lane, uint32_t n, uint32_t *seed)
{
	struct hast_ring *ring = bench_ring(b, lane);
	uint32_t index = ring->tail, value[MAX_BATCH];
	int done = 0;

	/* Payload may be written only where there is room: the consumer may still read what stands there. */
	uint32_t room = hast_ring_room(ring, n);

	n = room < n ? room : n;
	for (uint32_t i = 0; i < n; i++) {
		value[i] = value_of(lane, index + i);
		*payload(b, lane, index + i) = (uint64_t)value[i] << 32 | lane;
	}
#ifndef HAST_TEST_BREAK_PUSH
	if ((next_random(seed) & 1) != 0)
		return hast_ring_push_some(ring, value, n);
#endif
	(void)seed;
	for (uint32_t i = 0; i < n; i++)
		done += push_one(ring, value[i]);
	return done;
}

static int
pop_batch(struct hast_ring *ring, uint32_t *value, uint32_t n, uint32_t *seed)
{
	uint32_t done = 0;
	int one;

#ifndef HAST_TEST_BREAK_POP
	if ((next_random(seed) & 1) != 0)
		return hast_ring_pop_some(ring, value, n);
#endif
	(void)seed;
	while (done < n) {
		one = pop_one(ring, &value[done]);
		if (one < 0)
			return -1;
		if (one == 0)
			break;
		done++;
	}
	return (int)done;
}

static void
pause_sometimes(uint32_t *seed)
{
	uint32_t r = next_random(seed);
	struct timespec ts = { 0, (long)(r >> 16 & 0x7fff) };

	if ((r & 1023) == 0)
		(void)nanosleep(&ts, NULL);
}

/* Stays in the windows between the steps of the protocol, so that the others get into them. */
static void
linger(uint32_t *seed)
{
	uint32_t r = next_random(seed);

	if ((r & 3) == 0)
		for (uint32_t n = r >> 16 & 1023; n > 0; n--)
			__atomic_signal_fence(__ATOMIC_SEQ_CST);
	if ((r & 255) == 4)
		(void)sched_yield();
}

static int
wait_for_room(struct bench *b, uint32_t lane, uint32_t *seed)
{
	struct lane *l = &b->lane[lane];

	linger(seed);
	hast_doorbell_announce(&l->space);
	linger(seed);
	if (hast_ring_room(bench_ring(b, lane), 1) != 0 || __atomic_load_n(&b->stop, __ATOMIC_ACQUIRE)) {
		hast_doorbell_cancel(&l->space);
		return BENCH_OK;
	}
	__atomic_fetch_add(&l->waits, 1, __ATOMIC_RELAXED);
	return wait_at(&l->space, l->space_efd, b->timeout_ms);
}

int
bench_produce(struct bench *b, uint32_t lane, uint32_t seed, int successor)
{
	struct lane *l = &b->lane[lane];
	struct hast_ring *ring = bench_ring(b, lane);
	uint64_t pushed = l->pushed;
	uint32_t gap = ring->tail - (l->first + (uint32_t)pushed);
	int done, error;

	if (gap > MAX_BATCH)
		return BENCH_GAP;
	pushed += gap;
#ifndef HAST_TEST_BREAK_FORCE
	if (successor && hast_doorbell_force(&b->bell, b->efd) != 0)
		return BENCH_SYSTEM_CALL;
#else
	(void)successor;
#endif
	while (pushed < l->target && !__atomic_load_n(&b->stop, __ATOMIC_ACQUIRE)) {
		uint32_t n = 1 + next_random(&seed) % MAX_BATCH;

		if (n > l->target - pushed)
			n = (uint32_t)(l->target - pushed);
		done = push_batch(b, lane, n, &seed);
		if (done < 0)
			return BENCH_CORRUPT;
		pushed += (uint32_t)done;
		__atomic_store_n(&l->pushed, pushed, __ATOMIC_RELEASE);
		if (done > 0 && hast_doorbell_ring(&b->bell, b->efd) != 0)
			return BENCH_SYSTEM_CALL;
		if (done == 0) {
			error = wait_for_room(b, lane, &seed);
			if (error != BENCH_OK)
				return error;
		}
		pause_sometimes(&seed);
	}
	__atomic_store_n(&l->pushed, pushed, __ATOMIC_RELEASE);
	return BENCH_OK;
}

/* What a consumer that died had taken and not checked is known from head and `processed`; and it may have
   died between taking a producer's announcement and waking it. */
static int
take_over(struct bench *b)
{
	for (uint32_t i = 0; i < b->nlanes; i++) {
		struct lane *l = &b->lane[i];
		uint32_t gap = bench_ring(b, i)->head - (l->first + (uint32_t)(l->processed + l->lost));

		if (gap > MAX_BATCH)
			return BENCH_GAP;
		__atomic_store_n(&l->lost, l->lost + gap, __ATOMIC_RELEASE);
		if (hast_doorbell_force(&l->space, l->space_efd) != 0)
			return BENCH_SYSTEM_CALL;
	}
	return BENCH_OK;
}

/* Takes one batch from one lane. Entries, or minus an enum bench_result. */
static int
consume_lane(struct bench *b, uint32_t lane, uint32_t *seed)
{
	struct lane *l = &b->lane[lane];
	uint32_t value[MAX_BATCH];
	uint32_t index = l->first + (uint32_t)(l->processed + l->lost);
	int n = pop_batch(bench_ring(b, lane), value, 1 + next_random(seed) % MAX_BATCH, seed);

	if (n < 0)
		return -BENCH_CORRUPT;
	for (uint32_t i = 0; i < (uint32_t)n; i++) {
		uint32_t want = value_of(lane, index + i);

		if (value[i] != want || *payload(b, lane, index + i) != ((uint64_t)want << 32 | lane))
			return -BENCH_WRONG_ENTRY;
		__atomic_store_n(&l->processed, l->processed + 1, __ATOMIC_RELEASE);
	}
	if (n > 0 && hast_doorbell_ring(&l->space, l->space_efd) != 0)
		return -BENCH_SYSTEM_CALL;
	return n;
}

static int
any_ready(struct bench *b)
{
#ifndef HAST_TEST_BREAK_RECHECK
	for (uint32_t i = 0; i < b->nlanes; i++)
		if (hast_ring_ready(bench_ring(b, i)) != 0)
			return 1;
#endif
	return __atomic_load_n(&b->closed, __ATOMIC_ACQUIRE) != 0;
}

int
bench_consume(struct bench *b, uint32_t seed)
{
	int error = take_over(b);

	while (error == BENCH_OK) {
		uint32_t closed = __atomic_load_n(&b->closed, __ATOMIC_ACQUIRE);
		uint32_t found = 0;

		for (uint32_t i = 0; i < b->nlanes; i++) {
			int n = consume_lane(b, i, &seed);

			if (n < 0)
				return -n;
			found += (uint32_t)n;
		}
		if (found > 0)
			continue;
		if (closed)
			return BENCH_OK;
		linger(&seed);
		hast_doorbell_announce(&b->bell);
		linger(&seed);
		if (any_ready(b)) {
			hast_doorbell_cancel(&b->bell);
			continue;
		}
		__atomic_fetch_add(&b->waits, 1, __ATOMIC_RELAXED);
		error = wait_at(&b->bell, b->efd, b->timeout_ms);
	}
	return error;
}

void
bench_die_before_wake(struct bench *b, uint32_t lane)
{
	uint32_t seed = 1;

	(void)push_batch(b, lane, 1, &seed);
	if (__atomic_exchange_n(&b->bell.sleeping, 0, __ATOMIC_ACQ_REL) == 1)
		(void)raise(SIGKILL);
}

int
bench_stop(struct bench *b)
{
	int error = 0;

	__atomic_store_n(&b->stop, 1, __ATOMIC_RELEASE);
	for (uint32_t i = 0; i < b->nlanes && error == 0; i++)
		error = hast_doorbell_force(&b->lane[i].space, b->lane[i].space_efd);
	return error;
}

int
bench_close(struct bench *b)
{
	__atomic_store_n(&b->closed, 1, __ATOMIC_RELEASE);
	return hast_doorbell_force(&b->bell, b->efd);
}

uint64_t
bench_pushed(const struct bench *b, uint32_t lane)
{
	return __atomic_load_n(&b->lane[lane].pushed, __ATOMIC_ACQUIRE);
}

uint64_t
bench_processed(const struct bench *b, uint32_t lane)
{
	return __atomic_load_n(&b->lane[lane].processed, __ATOMIC_ACQUIRE);
}

uint64_t
bench_lost(const struct bench *b, uint32_t lane)
{
	return __atomic_load_n(&b->lane[lane].lost, __ATOMIC_ACQUIRE);
}

uint64_t
bench_waits(const struct bench *b)
{
	return __atomic_load_n(&b->waits, __ATOMIC_ACQUIRE);
}

uint32_t
bench_used(struct bench *b, uint32_t lane)
{
	return hast_ring_used(bench_ring(b, lane));
}

uint32_t
bench_sleeping(const struct bench *b)
{
	return __atomic_load_n(&b->bell.sleeping, __ATOMIC_ACQUIRE);
}

void
bench_damage_tail(struct bench *b, uint32_t lane, uint32_t by)
{
	__atomic_fetch_add(&bench_ring(b, lane)->tail, by, __ATOMIC_RELEASE);
}
