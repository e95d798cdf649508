/*
 * Rings and doorbells between threads, for ThreadSanitizer: ring_tsan LANES ENTRIES COUNT futex|eventfd TIMEOUT_MS.
 * Ends with an enum bench_result; the sanitizer ends it with a code of its own when it finds a race.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "ring_pump.h"

struct thread {
	pthread_t id;
	struct bench *b;
	uint32_t lane;
	int result;
};

static void *
producer(void *arg)
{
	struct thread *t = arg;

	t->result = bench_produce(t->b, t->lane, 0x9e3779b9u + t->lane, 0);
	return NULL;
}

static void *
consumer(void *arg)
{
	struct thread *t = arg;

	t->result = bench_consume(t->b, 0x2545f491u);
	return NULL;
}

/* Starts all, waits for all. A consumer that stops early leaves producers waiting for room: they are told. */
static int
run(struct bench *b, uint32_t nlanes)
{
	struct thread p[MAX_LANES], c = { .b = b };
	int result = BENCH_OK;

	if (pthread_create(&c.id, NULL, consumer, &c) != 0)
		return BENCH_SYSTEM_CALL;
	for (uint32_t i = 0; i < nlanes; i++) {
		p[i] = (struct thread){ .b = b, .lane = i };
		if (pthread_create(&p[i].id, NULL, producer, &p[i]) != 0)
			return BENCH_SYSTEM_CALL;
	}
	for (uint32_t i = 0; i < nlanes; i++) {
		(void)pthread_join(p[i].id, NULL);
		result = result == BENCH_OK ? p[i].result : result;
	}
	if (bench_close(b) != 0)
		return BENCH_SYSTEM_CALL;
	(void)pthread_join(c.id, NULL);
	/* The consumer's finding explains those of the producers. */
	return c.result != BENCH_OK ? c.result : result;
}

int
main(int argc, char **argv)
{
	int fd[MAX_LANES + 1], result;
	uint32_t nlanes, entries;
	uint64_t count;
	size_t size;
	struct bench *b;

	if (argc != 6)
		return 2;
	nlanes = (uint32_t)atoi(argv[1]);
	entries = (uint32_t)atoi(argv[2]);
	count = strtoull(argv[3], NULL, 10);
	if (nlanes == 0 || nlanes > MAX_LANES)
		return 2;
	for (uint32_t i = 0; i <= MAX_LANES; i++)
		fd[i] = strcmp(argv[4], "eventfd") == 0 ? eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC) : -1;
	size = (bench_size(nlanes, entries) + 63) & ~(size_t)63;
	b = aligned_alloc(64, size);
	if (b == NULL)
		return 2;
	memset(b, 0, size);
	bench_init(b, nlanes, entries, UINT32_MAX - 1000, count, (uint32_t)atoi(argv[5]), fd[MAX_LANES], fd);
	result = run(b, nlanes);
	for (uint32_t i = 0; i < nlanes && result == BENCH_OK; i++)
		if (bench_processed(b, i) != count || bench_used(b, i) != 0)
			result = BENCH_WRONG_ENTRY;
	printf("result %d, consumer waited %llu times, woken %u times\n", result, (unsigned long long)bench_waits(b),
	    b->bell.wakes);
	for (uint32_t i = 0; i <= MAX_LANES; i++)
		if (fd[i] >= 0)
			(void)close(fd[i]);
	free(b);
	return result;
}
