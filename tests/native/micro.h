/* What the micro-benchmarks share: micro.c times what the tables of the other files name. */
#ifndef MICRO_H
#define MICRO_H

#include <stddef.h>
#include <stdint.h>

/* One benchmark. `run` does the operation n times. */
struct micro {
	const char *name;
	void (*run)(uint64_t n);
	int sleeps;			/* it is the clock on the wall that counts, not the processor's time */
};

/* Tables, each ended by a NULL name. set_up: memory and state, once, before anything is timed. */
extern const struct micro micro_shm[], micro_wire[], micro_seq[];
void micro_shm_set_up(void);
void micro_wire_set_up(void);
void micro_seq_set_up(void);

/* Ends the program, with the line, unless it is so. */
#define MUST(what) micro_must((what) != 0, __FILE__, __LINE__, #what)
void micro_must(int true, const char *file, int line, const char *what);
/* Memory of whole pages, zeroed and touched. */
void *micro_pages(size_t size);
/* The same numbers in each run. */
uint32_t micro_random(uint32_t *state);
/* Makes the compiler believe that somebody reads it. */
static inline void
micro_use(uint64_t value)
{
	__asm__ volatile("" : : "r"(value) : "memory");
}

#endif
