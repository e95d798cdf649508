/*
 * The arena: everything that the stages of one resource share, in one mapping.
 *
 * Invariants:
 * - the layout is computed once, by hast_arena_init(), from the geometry; every offset lies in the arena and is
 *   a multiple of 64 (slabs: of 4096);
 * - a slot number is an index into both the bio table and the slabs: bio n owns slab n for ever;
 * - slots [0, nclient) are for devices, [nclient, nclient + nsync) for the resync scanner, the last
 *   two for the sequencer's own map updates and flushes;
 * - each bio field has one writer at a time: the sequencer, except error[c] and (for reads) the slab, which belong
 *   to component c's stage between the push to its ring and the push to its completion ring.
 *
 * Nothing in here is a pointer: the stages may map it anywhere.
 */
#ifndef HAST_ARENA_H
#define HAST_ARENA_H

#include <stddef.h>
#include <stdint.h>

#include "doorbell.h"
#include "ring.h"

/* cffi: begin */
#define HAST_ARENA_MAGIC 0x414E455241545348
#define HAST_ARENA_VERSION 2
#define HAST_NONE 0xFFFFFFFF
#define HAST_MAP_OFFSET 4096		/* where the activemap stands in the component */
#define HAST_MAP_BLOCK 4096		/* unit of activemap updates, in bytes of map */
#define HAST_SECTOR 512
#define HAST_EVENT_RECEIVED 0x80000000	/* in RECV_DONE: first of the two replies to a memsync write */

enum hast_stage_id {
	HAST_STAGE_GGATE,
	HAST_STAGE_DISK,
	HAST_STAGE_SEND,
	HAST_STAGE_RECV,
	HAST_STAGE_SYNC,
	HAST_STAGES
};

/* Primary: the sequencer is ggate, and so are send and recv (link.c). Secondary: recv takes the sequencer's part in DISK, SEND and
   their DONEs, and sends as well. */
enum hast_ring_id {
	HAST_RING_DISK,			/* sequencer -> disk */
	HAST_RING_SEND,			/* sequencer -> send */
	HAST_RING_SYNC,			/* sequencer -> sync: finished sync bios */
	HAST_RING_DISK_DONE,		/* disk -> sequencer */
	HAST_RING_SEND_DONE,		/* send -> sequencer */
	HAST_RING_RECV_DONE,		/* recv -> sequencer */
	HAST_RING_DIRECT,		/* sequencer -> its own stage: what may be done without the disk stage (direct.h) */
	HAST_RINGS
};

enum hast_cmd {
	HAST_CMD_NONE,
	HAST_CMD_READ,			/* numbers as on the wire */
	HAST_CMD_WRITE,
	HAST_CMD_DELETE,
	HAST_CMD_FLUSH,
	HAST_CMD_MAP			/* activemap update: offset is within the map, data in the slab */
};

enum hast_component {
	HAST_LOCAL,
	HAST_REMOTE,
	HAST_COMPONENTS
};

/* bio.flags */
#define HAST_BIO_ZERO 1		/* WRITE: the payload is all zeros, the slab is not used */
#define HAST_BIO_NOHOLE 2	/* with ZERO: blocks stay allocated */
#define HAST_BIO_SYNC 4		/* part of a resynchronisation */
#define HAST_BIO_MEMSYNC 8	/* the secondary answers twice */
#define HAST_BIO_DURABLE 16	/* MAP: flush the disk after writing */
#define HAST_BIO_ENTERED 32	/* its extents are marked already: it has lost its turn to one that came before it */

struct hast_bio {
	/* What is to be done, and what came of it. */
	uint8_t cmd;
	uint8_t flags;
	uint8_t state;			/* sequencer: enum hast_bio_state */
	uint8_t pending;		/* sequencer: bit c is set while component c has it */
	uint32_t slot;
	uint64_t offset;		/* bytes, from the start of the data area (MAP: of the map) */
	uint64_t length;		/* bytes; READ, WRITE without ZERO and MAP: at most slab_size */
	uint64_t seq;			/* number << 16 | slot: never 0, never used twice */
	int32_t error[2];		/* per component: 0 or a positive errno, written by the component's stage */
	uint32_t request;		/* the device's own, not touched by the sequencer */
	uint32_t part_next;		/* the device's own: next part of the same request */
	uint64_t sent;			/* primary: the seq that was laid out to be sent; no reply is believed before */
	uint64_t pad1;
	/* The sequencer's own line. */
	uint64_t order;			/* arrival among mutations */
	uint32_t blockers;		/* earlier overlapping mutations not completed */
	uint32_t next;			/* list link */
	uint8_t held;			/* the device has not released it */
	uint8_t acked;			/* the device has been told: result and a read's data are there */
	uint8_t used;			/* components it was given to */
	uint8_t received;		/* memsync: the secondary has it in memory */
	int32_t result;			/* what the client is told: 0 or a positive errno */
	uint32_t sync_epoch;		/* resync chunk: of the extent's place when it was issued */
	uint8_t answered;		/* the result is settled, the device has perhaps not taken it yet */
	uint8_t pad3[3];
	uint64_t durable_epoch;		/* a flush of this epoch or a later one makes it durable on the secondary */
	uint32_t pad2[6];
};

struct hast_stage_line {
	uint64_t heartbeat;		/* raised by each turn of the pump */
	uint32_t pid;
	uint16_t state;			/* 0 not running, 1 working, 2 waiting */
	uint16_t trace;			/* trace.h: 1 while events are noted; set from outside at any time */
	uint64_t ops;
	uint64_t bytes;
	uint64_t sleeps;
	uint64_t errors;
	uint64_t extra[2];
};

struct hast_geometry {
	uint64_t datasize;		/* bytes, a multiple of 512 */
	uint64_t data_offset;		/* bytes, where the data stands in the component */
	uint32_t extentsize;		/* bytes, a power of two */
	uint32_t mapsize;		/* bytes, on disk */
	uint32_t keepdirty;		/* extents */
	uint32_t nclient;		/* slots for devices */
	uint32_t nsync;			/* slots for resync */
	uint32_t slab_size;		/* bytes, a multiple of 4096 */
};

struct hast_arena {
	uint64_t magic;
	uint32_t version;
	uint32_t nslots;		/* nclient + nsync + 2 */
	uint64_t size;			/* bytes, of the whole arena */
	struct hast_geometry geo;
	uint32_t extent_shift;
	uint32_t ring_entries;
	uint64_t nextents;
	uint64_t bio_off;
	uint64_t slab_off;
	uint64_t seq_off;
	uint64_t active_off;		/* uint32_t[nslots]: mutations in order of arrival */
	uint64_t ack_off;		/* a ring: finished for the device */
	uint64_t keep_off;		/* struct hast_keep[keepdirty + 1] */
	uint64_t extent_off;		/* struct hast_extent[nextents] */
	uint64_t dirty_off;		/* uint8_t[mapsize]: what the map on disk should say */
	uint64_t ondisk_off;		/* uint8_t[mapsize]: what it says for certain */
	uint64_t sync_off;		/* uint8_t[mapsize]: extents that differ, or may, between the nodes */
	uint64_t changed_off;		/* uint8_t[blocks of the map]: 1 where dirty was changed and not written */
	uint64_t ring_off[7];		/* HAST_RINGS */
	uint64_t trace_off;		/* struct hast_trace_log[HAST_STAGES]: the arena's end, without memory while it is not used */
	uint64_t pad[3];
	struct hast_doorbell bell[5];	/* HAST_STAGES */
	struct hast_stage_line stage[5];
};

/* Bytes that an arena of this geometry takes, a multiple of 4096; 0 when the geometry is not possible. */
uint64_t hast_arena_size(const struct hast_geometry *geo);
/* base: zeroed memory of that size, aligned to 4096. 0 or -EINVAL. */
int hast_arena_init(void *base, const struct hast_geometry *geo);
/* 0 when base is an arena of this build with that size, else -EINVAL. */
int hast_arena_check(const void *base, uint64_t size);
struct hast_bio *hast_arena_bio(struct hast_arena *arena, uint32_t slot);
void *hast_arena_slab(struct hast_arena *arena, uint32_t slot);
struct hast_ring *hast_arena_ring(struct hast_arena *arena, uint32_t ring);
/* cffi: end */

#endif
