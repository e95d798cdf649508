/* Micro-benchmarks of ring and doorbell. The round trips are between two threads, each of which sleeps in between. */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "doorbell.h"
#include "micro.h"
#include "ring.h"

#define ENTRIES 1024u

static struct hast_ring *ring[2];
static struct hast_doorbell bell[2];
static int efd[2];

void
micro_shm_set_up(void)
{
	for (int i = 0; i < 2; i++) {
		ring[i] = micro_pages(hast_ring_size(ENTRIES));
		hast_ring_init(ring[i], ENTRIES);
		hast_doorbell_init(&bell[i]);
		efd[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		MUST(efd[i] >= 0);
	}
}

static void
ring_one(uint64_t n)
{
	uint32_t value = 0;

	for (uint64_t i = 0; i < n; i++) {
		(void)hast_ring_push(ring[0], (uint32_t)i);
		(void)hast_ring_pop(ring[0], &value);
		micro_use(value);
	}
}

static void
ring_32(uint64_t n)
{
	uint32_t value = 0;

	for (uint64_t i = 0; i < n; i += 32) {
		for (uint32_t k = 0; k < 32; k++)
			(void)hast_ring_push(ring[0], k);
		for (uint32_t k = 0; k < 32; k++)
			(void)hast_ring_pop(ring[0], &value);
		micro_use(value);
	}
}

static void
ring_some(uint64_t n)
{
	uint32_t value[32] = { 0 };

	for (uint64_t i = 0; i < n; i += 32) {
		(void)hast_ring_push_some(ring[0], value, 32);
		(void)hast_ring_pop_some(ring[0], value, 32);
		micro_use(value[31]);
	}
}

/* The consumer is awake. */
static void
bell_awake(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		(void)hast_doorbell_ring(&bell[0], efd[0]);
}

static void
bell_announce(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++) {
		hast_doorbell_announce(&bell[0]);
		micro_use(hast_ring_ready(ring[0]));
		hast_doorbell_cancel(&bell[0]);
	}
}

/* The consumer sleeps on an eventfd that nobody waits for: what the producer's system call costs, and the drain. */
static void
bell_eventfd(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++) {
		hast_doorbell_announce(&bell[0]);
		MUST(hast_doorbell_ring(&bell[0], efd[0]) == 0);
		MUST(hast_doorbell_drain(efd[0]) == 0);
	}
}

/* ---- round trips ---- */

struct trip {
	uint64_t n;
	int side;
	int use_efd;
	int cpu;			/* -1: wherever */
};

static void
sleep_for(struct hast_doorbell *b, int fd)
{
	struct pollfd p = { fd, POLLIN, 0 };

	if (fd == -1) {
		int error = hast_doorbell_wait(b, -1);

		MUST(error == 0 || error == -EINTR);
		return;
	}
	MUST(poll(&p, 1, -1) == 1 || errno == EINTR);
	hast_doorbell_cancel(b);
	MUST(hast_doorbell_drain(fd) == 0);
}

static uint32_t
take(struct hast_ring *r, struct hast_doorbell *b, int fd)
{
	uint32_t value;

	for (;;) {
		if (hast_ring_pop(r, &value) == 1)
			return value;
		hast_doorbell_announce(b);
		if (hast_ring_ready(r) != 0) {
			hast_doorbell_cancel(b);
			/* Rung meanwhile or not: what is in the eventfd would end the next wait at once, which is no harm. */
			continue;
		}
		sleep_for(b, fd);
	}
}

static void
give(int side, uint32_t value, int use_efd)
{
	MUST(hast_ring_push(ring[side], value) == 1);
	MUST(hast_doorbell_ring(&bell[side], use_efd ? efd[side] : -1) == 0);
}

static void *
play(void *of)
{
	struct trip *t = of;
	int me = t->side;

	if (t->cpu >= 0) {
		cpu_set_t set;

		CPU_ZERO(&set);
		CPU_SET((size_t)t->cpu, &set);
		MUST(sched_setaffinity(0, sizeof(set), &set) == 0);
	}
	for (uint64_t i = 0; i < t->n; i++) {
		if (me == 0)
			give(1, (uint32_t)i, t->use_efd);
		MUST(take(ring[me], &bell[me], t->use_efd ? efd[me] : -1) == (uint32_t)i);
		if (me == 1)
			give(0, (uint32_t)i, t->use_efd);
	}
	return NULL;
}

/* From the first processor that this process may use, to the one so many further on. */
static int
processor(int number)
{
	cpu_set_t set;

	MUST(sched_getaffinity(0, sizeof(set), &set) == 0);
	number %= CPU_COUNT(&set);
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET((size_t)cpu, &set) && number-- == 0)
			return cpu;
	return -1;
}

static void
round_trips(uint64_t n, int use_efd, int apart)
{
	struct trip t[2];
	pthread_t thread[2];

	for (int i = 0; i < 2; i++) {
		t[i] = (struct trip){ n, i, use_efd, processor(apart ? i : 0) };
		MUST(pthread_create(&thread[i], NULL, play, &t[i]) == 0);
	}
	for (int i = 0; i < 2; i++)
		MUST(pthread_join(thread[i], NULL) == 0);
}

static void
trip_futex(uint64_t n)
{
	round_trips(n, 0, 0);
}

static void
trip_eventfd(uint64_t n)
{
	round_trips(n, 1, 0);
}

static void
trip_apart(uint64_t n)
{
	round_trips(n, 1, 1);
}

const struct micro micro_shm[] = {
	{ "ring: push and pop", ring_one, 0 },
	{ "ring: push and pop, 32 at a time", ring_32, 0 },
	{ "ring: push_some and pop_some of 32, each", ring_some, 0 },
	{ "doorbell: ring, consumer awake", bell_awake, 0 },
	{ "doorbell: announce, look, cancel", bell_announce, 0 },
	{ "doorbell: ring and drain an eventfd", bell_eventfd, 0 },
	{ "round trip: futex, one processor", trip_futex, 1 },
	{ "round trip: eventfd, one processor", trip_eventfd, 1 },
	{ "round trip: eventfd, two processors", trip_apart, 1 },
	{ NULL, NULL, 0 }
};
