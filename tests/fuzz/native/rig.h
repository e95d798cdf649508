/*
 * What the C fuzz targets have in common: input as a small program, a disk in memory, an arena, sockets.
 *
 * A target that speaks a protocol reads its input as a sequence of operations: "a request with these fields", "these raw
 * bytes", "a turn of the pump", "the disk completes one". So a mutation changes one thing, deep states are a few bytes away, and
 * every byte stream is still possible. What runs is the production code: the pumps, on real sockets.
 */
#ifndef FUZZ_RIG_H
#define FUZZ_RIG_H

#include <stddef.h>
#include <stdint.h>

#include "arena.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Ends the run as a finding when ok is 0. */
void must(int ok, const char *what);

/* ---- input; at its end everything reads as 0 ---- */

struct input {
	const uint8_t *at;
	size_t left;
};

uint8_t take8(struct input *in);
uint16_t take16(struct input *in);
uint32_t take32(struct input *in);
uint64_t take64(struct input *in);
/* At most n bytes, as many as there are; *got says how many. */
const uint8_t *take_bytes(struct input *in, size_t n, size_t *got);
/* Bytes that are zeros, a pattern that can be compressed, or noise. */
void fill(uint8_t *to, size_t n, unsigned kind);

/* ---- an arena of one process ---- */

/* Zeroed, initialised, of exactly the size that the geometry needs: what reaches past it is seen by AddressSanitizer. It is the same
   memory each time. */
struct hast_arena *rig_arena(const struct hast_geometry *geo);

/* What Python decides when the sequencer asks: writes may be acknowledged without a secondary. */
void rig_decide(struct hast_arena *arena);

/* ---- the disk stage, as far as the sequencer and recv see it ---- */

#define RIG_SLOTS 64

struct rig_disk {
	struct hast_arena *arena;
	uint8_t *data;			/* datasize bytes */
	uint32_t held[RIG_SLOTS];
	unsigned nheld;
	unsigned errors;		/* operations that were made to fail */
};

void rig_disk_open(struct rig_disk *d, struct hast_arena *arena);
/* Takes what is in RING_DISK. how: which one completes, and with an error when its top bits say so. 1 when one did. */
int rig_disk_one(struct rig_disk *d, uint8_t how);
/* Completes everything. Number of operations. */
int rig_disk_all(struct rig_disk *d);

/* ---- descriptors ---- */

/* A control socket that always has something, so that a pump returns after each turn. */
struct rig_control {
	int end[2];
	int bell;
};

void rig_control_open(struct rig_control *c);
void rig_control_close(struct rig_control *c);
void rig_pair(int type, int pair[2]);

#endif
