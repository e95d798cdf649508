/*
 * The disk stage's pump: takes bios from RING_DISK, does them on the local component, puts them into RING_DISK_DONE.
 *
 * Invariants:
 * - each slot taken is given back exactly once, with error[HAST_LOCAL] 0 or a positive errno: never after a
 *   short transfer, which is continued, nor with EINTR or EAGAIN, which are tried again;
 * - a FLUSH is complete when everything completed before it was taken is durable (fdatasync);
 * - once an fdatasync has failed, here or elsewhere (hast_disk_flush_failed()), every later FLUSH and durable MAP fails with
 *   the same errno: the kernel tells of lost pages only once, and what they held is not durable because a later call
 *   succeeds. extra[0] of the stage's line has that errno, so that the next context on the same component is begun with it.
 *   Before anybody is told of the failure the file `note`, which may say that nothing of the cache was lost, says the contrary;
 *   extra[1] is not 0 from before an fdatasync begins until that is done;
 * - a MAP bio with HAST_BIO_DURABLE is complete when it is written and durable;
 * - nothing outside [data_offset, data_offset + datasize) is written by READ, WRITE, DELETE, nothing outside the map by MAP:
 *   checked here again, whatever the ring says;
 * - a DELETE reads back as zeros afterwards or has failed. Where the component cannot do better they are written: clients of a
 *   primary whose component is such a one are not offered it, but a secondary's may be one (a refusal would be a failure
 *   there, and the end of the connection).
 */
#ifndef HAST_DISK_H
#define HAST_DISK_H

#include <stdint.h>

/* cffi: begin */
/* How the pump does its I/O. Chosen in Python, by what the component is. */
enum hast_disk_engine {
	HAST_DISK_INLINE,		/* plain system calls in the pump: memory-backed components, which never block */
	HAST_DISK_URING,
	HAST_DISK_THREADS
};

struct hast_disk_options {
	int fd;				/* the component; O_DIRECT or not as Python decided */
	int own_bell;			/* eventfd */
	int control;			/* control socket */
	int done_bell;			/* eventfd of the stage that takes the completions */
	uint32_t done_stage;		/* enum hast_stage_id of that stage: its doorbell */
	uint32_t engine;
	uint32_t depth;			/* URING: bios under way at once; THREADS: threads; 1 to 4096 */
	uint32_t align;			/* O_DIRECT alignment in bytes of offset and length, 1 without */
	uint32_t follow;		/* 1: move to the processor of the stage that takes the completions */
	int sync_error;			/* of an fdatasync of the component that has failed before, positive, or 0 */
	int witness;			/* URING: a descriptor that is held until nothing is under way any more; 0: none */
	const char *note;		/* path of a file that is to say when an fdatasync fails, or NULL; copied */
};

struct hast_disk;

/*
 * Context, with its threads or io_uring set up; descriptors stay the caller's. It belongs to the thread that made it.
 * NULL and errno on failure (ENOSYS, EPERM, ENOMEM with URING: no io_uring here, take THREADS).
 */
struct hast_disk *hast_disk_new(void *arena, const struct hast_disk_options *options);
/* Waits for what is under way and puts it into RING_DISK_DONE, then frees. What was not taken stays in RING_DISK. */
void hast_disk_free(struct hast_disk *d);
/* Runs until something has to be decided: enum hast_pump_result or -errno; -EINTR: a signal came, call again. */
int hast_disk_pump(struct hast_disk *d);
/* Between two runs: an fdatasync of the component that somebody else has tried has failed, with this errno. */
void hast_disk_flush_failed(struct hast_disk *d, int error);
/* 1 when io_uring can be set up here. */
int hast_disk_uring_works(void);
/* 1 when the file or device lives in memory (tmpfs, ramfs, a RAM disk), 0 when not, or -errno. */
int hast_disk_memory_backed(int fd);
/* 1 when holes can be punched into this regular file, 0 when not, or -errno. Changes nothing. */
int hast_disk_can_punch(int fd);
/* cffi: end */

#endif
