/*
 * The disk stage's pump: takes bios from RING_DISK, does them on the local component, puts them into RING_DISK_DONE.
 *
 * Invariants:
 * - each slot taken is given back exactly once, with error[HAST_LOCAL] 0 or a positive errno: never after a
 *   short transfer, which is continued, nor with EINTR or EAGAIN, which are tried again;
 * - a FLUSH is complete when everything completed before it was taken is durable (fdatasync);
 * - a MAP bio with HAST_BIO_DURABLE is complete when it is written and durable;
 * - nothing outside [data_offset, data_offset + datasize) is written by READ, WRITE, DELETE, nothing outside the map by MAP:
 *   checked here again, whatever the ring says;
 * - a DELETE reads back as zeros afterwards or has failed.
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
	uint32_t depth;			/* URING: entries; THREADS: threads */
	uint32_t align;			/* O_DIRECT alignment in bytes of offset and length, 1 without */
	uint32_t follow;		/* 1: move to the processor of the stage that takes the completions */
};

struct hast_disk;

/* Context, with its threads or io_uring set up. NULL and errno on failure (ENOSYS, EPERM: no io_uring here). */
struct hast_disk *hast_disk_new(void *arena, const struct hast_disk_options *options);
/* Waits for what is under way, then frees. */
void hast_disk_free(struct hast_disk *d);
/* Runs until something has to be decided: enum hast_pump_result or -errno. */
int hast_disk_pump(struct hast_disk *d);
/* 1 when io_uring can be set up here. */
int hast_disk_uring_works(void);
/* cffi: end */

#endif
