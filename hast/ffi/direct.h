/*
 * Direct I/O: the stage that decides about a bio does it itself, where that takes no waiting, instead of waking the disk stage
 * and being woken by it. ggate on the primary, recv on the secondary.
 *
 * Invariants:
 * - nothing waits in here: a component in memory never does, but for a page of it that was swapped out; others are asked with
 *   RWF_NOWAIT, and with O_DIRECT not at all;
 * - a bio is done whole and without an error, or it is the disk stage's, as if nothing had been tried: errors, short transfers,
 *   and what is to become of them are decided there and nowhere else. A write that is done twice is the same write;
 * - reads and writes with data only: what a flush is to cover has completed before it is asked for, whoever has done it;
 * - nothing outside [data_offset, data_offset + datasize) is touched: checked here again, whatever the bio says.
 */
#ifndef HAST_DIRECT_H
#define HAST_DIRECT_H

#include <stdint.h>

#include "arena.h"

struct hast_direct {
	int fd;				/* the component; -1: everything is the disk stage's */
	uint8_t memory;			/* it lives in memory, and has no need of RWF_NOWAIT */
	uint8_t refused[2];		/* RWF_NOWAIT is not known there: for reads, for writes */
	struct hast_geometry geo;	/* a private copy: see disk_io.h */
};

/* fd: the component, without O_DIRECT, or -1; it stays the caller's. */
void hast_direct_init(struct hast_direct *d, const struct hast_arena *a, int fd);
/* 1: done. 0: it is the disk stage's. */
int hast_direct_try(struct hast_direct *d, struct hast_bio *bio, void *slab);

/* Whether it is of the kind that may be done here. */
static inline int
hast_direct_may(const struct hast_bio *bio)
{
	return bio->cmd == HAST_CMD_READ || (bio->cmd == HAST_CMD_WRITE && (bio->flags & HAST_BIO_ZERO) == 0);
}

#endif
