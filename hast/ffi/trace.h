/*
 * Where a bio spends its time: each stage notes in a log of its own, in the arena, when it takes a bio and when it hands it
 * on. hast/shm/trace.py reads the logs of both nodes and puts them together by the bios' seq.
 *
 * Invariants:
 * - switched off (the default) it costs a branch on a word of the stage's own cache line: no clock is read, nothing is
 *   written, and the logs take no memory;
 * - a log has one writer, its stage, and a fixed size: the newest events replace the oldest; nobody waits for a reader, and a stage
 *   that dies leaves at worst a half-written event behind the count;
 * - nothing is decided by what stands in a log.
 */
#ifndef HAST_TRACE_H
#define HAST_TRACE_H

#include <stdint.h>

#include "arena.h"

/* cffi: begin */
#define HAST_TRACE_EVENTS 4096		/* of each log */

/* An event is of one bio (its key is the bio's seq), or of a turn of the pump (key 0): then it is about all bios that the
   stage has in hand at that moment. */
enum hast_trace_point {
	HAST_TRACE_NONE,
	HAST_TRACE_WOKE,		/* turn: the wait is over */
	HAST_TRACE_GOT,			/* turn: bytes were received, or looked for: one for each call (nbd: that got some) */
	HAST_TRACE_ADMIT,		/* ggate: to the sequencer; the key is the slot, a seq comes with the next IN */
	HAST_TRACE_IN,			/* ggate: the sequencer has it. Others: taken from the ring, or read from the connection */
	HAST_TRACE_FIRST,		/* send on the secondary, recv on the primary: the same for a memsync write's first reply */
	HAST_TRACE_START,		/* disk (engine INLINE), or who does its work instead: the system call begins */
	HAST_TRACE_DID,			/* who does the disk stage's work instead: the system call has done it */
	HAST_TRACE_OUT,			/* ggate: to be answered. disk: done. recv on the secondary: the disk has done it */
	HAST_TRACE_RANG,		/* turn, ggate: a stage that was given something has been woken, if it slept */
	HAST_TRACE_SENDING,		/* turn: what was laid out begins to be sent, or to be answered */
	HAST_TRACE_SENT			/* turn: and has been */
};

struct hast_trace_event {
	uint64_t ns;			/* CLOCK_MONOTONIC */
	uint64_t key;
	uint32_t point;			/* enum hast_trace_point */
	uint32_t pad;
};

struct hast_trace_log {
	uint64_t count;			/* events ever; event n stands in place n % HAST_TRACE_EVENTS */
	uint64_t pad[7];
	struct hast_trace_event event[4096];
};

/* In arena.c: bytes at the end of each arena that are for the logs, a multiple of 4096. */
uint64_t hast_trace_size(void);
struct hast_trace_log *hast_arena_trace(struct hast_arena *arena, uint32_t stage);
/* For all stages; before it is switched on the logs have to have memory. */
void hast_trace_switch(struct hast_arena *arena, int on);
/* Notes an event, switched on or not. */
void hast_trace_note(struct hast_arena *arena, uint32_t stage, uint32_t point, uint64_t key);
/* cffi: end */

static inline void
hast_trace(struct hast_arena *arena, uint32_t stage, uint32_t point, uint64_t key)
{
	if (__builtin_expect(__atomic_load_n(&arena->stage[stage].trace, __ATOMIC_RELAXED) != 0, 0))
		hast_trace_note(arena, stage, point, key);
}

#endif
