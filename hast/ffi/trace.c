#include "trace.h"

#include <time.h>

_Static_assert(sizeof(struct hast_trace_log) % 64 == 0, "logs stand on cache lines");
_Static_assert((HAST_TRACE_EVENTS & (HAST_TRACE_EVENTS - 1)) == 0, "the count may wrap");

struct hast_trace_log *
hast_arena_trace(struct hast_arena *arena, uint32_t stage)
{
	return (struct hast_trace_log *)((char *)arena + arena->trace_off) + stage;
}

void
hast_trace_switch(struct hast_arena *arena, int on)
{
	for (int i = 0; i < HAST_STAGES; i++)
		__atomic_store_n(&arena->stage[i].trace, (uint16_t)(on != 0), __ATOMIC_RELAXED);
}

/* Out of the way of those who are not traced. */
__attribute__((cold, noinline)) void
hast_trace_note(struct hast_arena *arena, uint32_t stage, uint32_t point, uint64_t key)
{
	struct hast_trace_log *log = hast_arena_trace(arena, stage);
	struct hast_trace_event *event = &log->event[log->count % HAST_TRACE_EVENTS];
	struct timespec ts;

	(void)clock_gettime(CLOCK_MONOTONIC, &ts);
	event->ns = (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
	event->key = key;
	event->point = point;
	__atomic_store_n(&log->count, log->count + 1, __ATOMIC_RELEASE);
}
