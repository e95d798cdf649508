/*
 * Inside the disk stage. A bio becomes an op: a run of system calls, one at a time, each chosen from the result of the one
 * before (disk_op.c). An engine only makes the calls; disk.c moves ops between rings, engine and fdatasync.
 *
 * Invariants:
 * - all of it but disk_perform() runs in the pump's thread;
 * - an op's bounds are a private copy of the bio's, checked, so that nothing written into shared memory later moves them;
 * - at most one fdatasync is under way, for all ops that asked before it began: its error, which the kernel
 *   gives to one caller only, reaches every op that it concerns.
 */
#ifndef HAST_DISK_IO_H
#define HAST_DISK_IO_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "arena.h"
#include "disk.h"
#include "trace.h"

#define DISK_ZEROS 262144u		/* bytes of zeros to write from */
#define DISK_TRIES 1000			/* EINTR or EAGAIN so often in a row is an error after all */
#define DISK_BATCH 16u			/* INLINE: bios done before their completions go out */
#define DISK_BATCH_BYTES 131072u	/* or so many bytes */

enum disk_call {
	DISK_DONE,			/* no more: error says how it ended */
	DISK_READ,
	DISK_WRITE,
	DISK_ZERO,			/* write from the page of zeros */
	DISK_FALLOCATE,
	DISK_SYNC
};

struct disk_op {
	struct disk_op *next;		/* of the list it is in: to do, to be synced, finished */
	char *data;			/* READ, WRITE: memory of the byte at `at` */
	uint64_t at;			/* where the call begins, bytes in the component */
	uint64_t piece;			/* bytes of this call */
	uint64_t end;			/* where the op ends */
	long result;			/* THREADS: of the call, or -errno */
	uint32_t slot;
	int32_t error;
	int mode;			/* of fallocate; 0: write zeros */
	uint16_t tries;
	uint8_t call;			/* enum disk_call */
	uint8_t cmd;
	uint8_t flags;
	uint8_t busy;			/* taken and not given back */
};

struct disk_list {
	struct disk_op *head;
	struct disk_op *tail;
};

struct disk_engine {
	/* 0 or -errno. Sets d->limit. */
	int (*open)(struct hast_disk *d);
	/* Nothing is under way. */
	void (*close)(struct hast_disk *d);
	/* Begins op->call; its result goes to disk_result() out of reap(), never from here. */
	void (*start)(struct hast_disk *d, struct disk_op *op);
	/* Submits what was started. With block set waits until there is something to reap or a bell or the control socket
	   speaks; sets d->control. 0, or -errno (-EINTR). */
	int (*wait)(struct hast_disk *d, int block);
	/* Delivers results. */
	void (*reap)(struct hast_disk *d);
};

struct hast_disk {
	const struct disk_engine *engine;
	void *state;			/* the engine's own */
	struct hast_disk_options opt;
	struct hast_geometry geo;	/* private copies: see above */
	uint32_t nslots;
	struct hast_arena *arena;	/* for trace.h only */
	struct hast_bio *bio;
	char *slab;
	struct hast_ring *ring;
	struct hast_ring *done_ring;
	struct hast_doorbell *bell;
	struct hast_doorbell *done_bell;
	struct hast_stage_line *line;
	const uint64_t *leader;		/* processor + 1 of the stage that takes the completions */
	struct disk_op *op;		/* one per slot, and sync_op */
	struct disk_op *sync_op;	/* the fdatasync under way */
	uint32_t *batch;		/* finished, not yet in done_ring */
	uint32_t nbatch;
	uint32_t inflight;		/* taken and not finished */
	uint32_t limit;			/* of inflight */
	uint32_t turns;
	struct disk_list ready;		/* INLINE: to be performed */
	struct disk_list syncing;	/* it is for these */
	struct disk_list unsynced;	/* for the next one */
	int sync_error;			/* of the first fdatasync that failed, positive */
	char *note;			/* options.note */
	char *zeros;
	uint32_t block;			/* fallocate's unit: sector of a block device, 1 for files */
	uint8_t is_block;
	uint8_t no_punch;		/* fallocate has refused these modes */
	uint8_t no_zero_range;
	uint8_t control;		/* the control socket is readable */
	uint64_t cpu;			/* last one followed, + 1 */
};

extern const struct disk_engine disk_inline;
extern const struct disk_engine disk_uring;
extern const struct disk_engine disk_threads;

static inline void
disk_list_add(struct disk_list *list, struct disk_op *op)
{
	op->next = NULL;
	if (list->head == NULL)
		list->head = op;
	else
		list->tail->next = op;
	list->tail = op;
}

static inline struct disk_op *
disk_list_take(struct disk_list *list)
{
	struct disk_op *op = list->head;

	if (op != NULL)
		list->head = op->next;
	return op;
}

/* disk_op.c: the first call for the bio in op->slot, or DISK_DONE with an error. */
void disk_op_begin(struct hast_disk *d, struct disk_op *op);
/* The next call after this one gave result (>= 0, or -errno). */
void disk_op_next(struct hast_disk *d, struct disk_op *op, long result);
/* Makes the call, in whatever thread: its result or -errno. */
long disk_perform(const struct hast_disk *d, const struct disk_op *op);

/* disk.c: an engine delivers a result. */
void disk_result(struct hast_disk *d, struct disk_op *op, long result);

/* disk_inline.c: waits in poll(2) for the doorbell and the control socket. */
int disk_poll(struct hast_disk *d, int block);

#endif
