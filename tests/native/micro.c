/*
 * Micro-benchmarks: micro SAMPLE_US ROUNDS. For each sample a line on stdout: "<ns of an operation> <ns of a step of the
 * calibration loop> <name>"; perf/micro.py makes medians and ratios of them.
 *
 * Processor time is measured, so that a sample that was interrupted is not a slow one; only where sleep is what is measured, it is
 * the time that has passed. Each sample stands between two runs of the calibration loop, a chain of dependent multiplications that depends on nothing but
 * the processor's speed at that moment; what is printed is the mean of the two.
 */
#include "micro.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define CALIBRATION 100000u		/* steps: about 0.1 ms */
#define TRIPS 500u			/* of a sample that sleeps: how long they take depends on who else is awake */

void
micro_must(int true, const char *file, int line, const char *what)
{
	if (true)
		return;
	fprintf(stderr, "%s:%d: %s\n", file, line, what);
	exit(1);
}

void *
micro_pages(size_t size)
{
	void *base = NULL;

	MUST(posix_memalign(&base, 4096, size) == 0);
	memset(base, 0, size);
	return base;
}

uint32_t
micro_random(uint32_t *state)
{
	*state = *state * 1664525u + 1013904223u;
	return *state >> 8;
}

static double
now(clockid_t clock)
{
	struct timespec ts;

	MUST(clock_gettime(clock, &ts) == 0);
	return (double)ts.tv_sec * 1e9 + (double)ts.tv_nsec;
}

/* ns of a step. */
static double
calibrate(void)
{
	double begin = now(CLOCK_PROCESS_CPUTIME_ID);
	uint64_t x = 1;

	for (uint32_t i = 0; i < CALIBRATION; i++) {
		x = x * 6364136223846793005u + 1442695040888963407u;
		micro_use(x);
	}
	return (now(CLOCK_PROCESS_CPUTIME_ID) - begin) / CALIBRATION;
}

static double
timed(const struct micro *m, uint64_t n)
{
	clockid_t clock = m->sleeps ? CLOCK_MONOTONIC : CLOCK_PROCESS_CPUTIME_ID;
	double begin = now(clock);

	m->run(n);
	return now(clock) - begin;
}

/* How often makes a sample of so many ns. */
static uint64_t
enough(const struct micro *m, double sample)
{
	uint64_t n = 1;
	double took = timed(m, n);

	while (took < sample / 4 && n < (uint64_t)1 << 32) {
		n *= 2;
		took = timed(m, n);
	}
	n = (uint64_t)((double)n * sample / took);
	return n > 0 ? n : 1;
}

/* ---- what the others are to be seen beside ---- */

static uint8_t *from, *to;

static void
copy_4k(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++) {
		memcpy(to, from, 4096);
		micro_use((uintptr_t)to);
	}
}

static void
copy_128k(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++) {
		memcpy(to, from, 131072);
		micro_use((uintptr_t)to);
	}
}

static void
system_call(uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		micro_use((uint64_t)syscall(SYS_getppid));
}

static void
clock_read(uint64_t n)
{
	struct timespec ts;

	for (uint64_t i = 0; i < n; i++) {
		(void)clock_gettime(CLOCK_MONOTONIC, &ts);
		micro_use((uint64_t)ts.tv_nsec);
	}
}

static const struct micro micro_base[] = {
	{ "memcpy 4 KiB", copy_4k, 0 },
	{ "memcpy 128 KiB", copy_128k, 0 },
	{ "system call (getppid)", system_call, 0 },
	{ "clock_gettime", clock_read, 0 },
	{ NULL, NULL, 0 }
};

int
main(int argc, char **argv)
{
	const struct micro *const table[] = { micro_base, micro_shm, micro_wire, micro_seq };
	enum { TABLES = sizeof(table) / sizeof(table[0]), MOST = 100 };
	double sample = argc == 3 ? atof(argv[1]) * 1e3 : 0;
	int rounds = argc == 3 ? atoi(argv[2]) : 0, k;
	static uint64_t times[MOST];

	if (sample <= 0 || rounds <= 0) {
		fprintf(stderr, "usage: micro SAMPLE_US ROUNDS\n");
		return 64;
	}
	from = micro_pages(131072);
	to = micro_pages(131072);
	micro_shm_set_up();
	micro_wire_set_up();
	micro_seq_set_up();
	for (int round = 0; round < rounds; round++) {
		k = 0;
		for (int t = 0; t < TABLES; t++)
			for (const struct micro *m = table[t]; m->name != NULL; m++, k++) {
				double before, took, after;

				MUST(k < MOST);
				if (round == 0)
					times[k] = m->sleeps ? TRIPS : enough(m, sample);
				before = calibrate();
				took = timed(m, times[k]);
				after = calibrate();
				printf("%.4f %.5f %s\n", took / (double)times[k], (before + after) / 2, m->name);
			}
	}
	return 0;
}
