#include "rig.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "seq.h"

void
must(int ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "fuzz: %s (errno %d)\n", what, errno);
	abort();
}

/* ---- input ---- */

uint8_t
take8(struct input *in)
{
	if (in->left == 0)
		return 0;
	in->left--;
	return *in->at++;
}

uint16_t
take16(struct input *in)
{
	uint16_t low = take8(in);

	return (uint16_t)(low | take8(in) << 8);
}

uint32_t
take32(struct input *in)
{
	uint32_t low = take16(in);

	return low | (uint32_t)take16(in) << 16;
}

uint64_t
take64(struct input *in)
{
	uint64_t low = take32(in);

	return low | (uint64_t)take32(in) << 32;
}

const uint8_t *
take_bytes(struct input *in, size_t n, size_t *got)
{
	const uint8_t *at = in->at;

	*got = n < in->left ? n : in->left;
	in->at += *got;
	in->left -= *got;
	return at;
}

void
fill(uint8_t *to, size_t n, unsigned kind)
{
	uint32_t noise = kind * 2654435761u + 1;

	if (kind % 3 == 0) {
		memset(to, 0, n);
		return;
	}
	for (size_t i = 0; i < n; i++) {
		noise = noise * 1664525u + 1013904223u;
		to[i] = (uint8_t)(kind % 3 == 1 ? i / 16 + kind : noise >> 24);
	}
}

/* ---- the arena ---- */

struct hast_arena *
rig_arena(const struct hast_geometry *geo)
{
	static void *arena;		/* of all inputs: a target has one geometry, and new memory is slow */
	static uint64_t size;

	if (arena == NULL) {
		size = hast_arena_size(geo);
		arena = size == 0 ? NULL : aligned_alloc(4096, size);
	}
	must(arena != NULL && hast_arena_size(geo) == size, "arena");
	memset(arena, 0, size);
	must(hast_arena_init(arena, geo) == 0, "arena");
	/* Extents are cleared as soon as they may be. */
	hast_arena_seq(arena)->dirty_max = 0;
	return arena;
}

void
rig_decide(struct hast_arena *arena)
{
	struct hast_seq *seq = hast_arena_seq(arena);
	uint32_t events = seq->events;

	seq->events = 0;
	if ((events & HAST_SEQ_NEED_DEGRADED) != 0)
		hast_seq_grant_degraded(arena);
}

/* ---- the disk ---- */

void
rig_disk_open(struct rig_disk *d, struct hast_arena *arena)
{
	static uint8_t *data;		/* of all inputs: what it holds decides nothing */
	static uint64_t size;

	if (data == NULL) {
		size = arena->geo.datasize;
		data = calloc(1, size);
	}
	must(data != NULL && size == arena->geo.datasize, "disk");
	memset(d, 0, sizeof(*d));
	d->arena = arena;
	d->data = data;
}

static void
check(const struct rig_disk *d, const struct hast_bio *bio)
{
	const struct hast_geometry *geo = &d->arena->geo;
	uint64_t end = bio->cmd == HAST_CMD_MAP ? geo->mapsize : geo->datasize;

	must(bio->cmd >= HAST_CMD_READ && bio->cmd <= HAST_CMD_MAP, "disk: a command that there is not");
	if (bio->cmd == HAST_CMD_FLUSH)
		return;
	must(bio->length > 0 && bio->length <= end && bio->offset <= end - bio->length, "disk: out of range");
	if (bio->cmd != HAST_CMD_MAP)
		must((bio->offset | bio->length) % HAST_SECTOR == 0, "disk: not whole sectors");
	if (bio->cmd != HAST_CMD_DELETE && (bio->flags & HAST_BIO_ZERO) == 0)
		must(bio->length <= geo->slab_size, "disk: more than a slab holds");
}

static void
do_bio(struct rig_disk *d, uint32_t slot, int error)
{
	struct hast_bio *bio = hast_arena_bio(d->arena, slot);
	uint8_t *slab = hast_arena_slab(d->arena, slot);

	check(d, bio);
	if (bio->cmd == HAST_CMD_MAP)
		error = 0;	/* what follows from that is Python's to decide */
	d->errors += error != 0;
	bio->error[HAST_LOCAL] = error;
	if (error != 0)
		return;
	if (bio->cmd == HAST_CMD_READ)
		memcpy(slab, d->data + bio->offset, bio->length);
	else if (bio->cmd == HAST_CMD_DELETE || (bio->cmd == HAST_CMD_WRITE && (bio->flags & HAST_BIO_ZERO) != 0))
		memset(d->data + bio->offset, 0, bio->length);
	else if (bio->cmd == HAST_CMD_WRITE)
		memcpy(d->data + bio->offset, slab, bio->length);
}

int
rig_disk_one(struct rig_disk *d, uint8_t how)
{
	struct hast_ring *ring = hast_arena_ring(d->arena, HAST_RING_DISK);
	struct hast_ring *done = hast_arena_ring(d->arena, HAST_RING_DISK_DONE);
	unsigned which;
	uint32_t slot;

	while (d->nheld < RIG_SLOTS && hast_ring_pop(ring, &d->held[d->nheld]) == 1)
		must(d->held[d->nheld++] < d->arena->nslots, "disk: a slot that there is not");
	if (d->nheld == 0)
		return 0;
	which = (how & 63) % d->nheld;
	slot = d->held[which];
	d->held[which] = d->held[--d->nheld];
	do_bio(d, slot, how >> 6 == 3 ? EIO : 0);
	must(hast_ring_push(done, slot) == 1, "disk: no room for a completion");
	return 1;
}

int
rig_disk_all(struct rig_disk *d)
{
	int n = 0;

	while (rig_disk_one(d, 0))
		n++;
	return n;
}

/* ---- descriptors ---- */

void
rig_control_open(struct rig_control *c)
{
	c->bell = eventfd(0, EFD_NONBLOCK);
	must(c->bell >= 0 && socketpair(AF_UNIX, SOCK_SEQPACKET, 0, c->end) == 0, "control");
	must(write(c->end[1], "x", 1) == 1, "control");
}

void
rig_control_close(struct rig_control *c)
{
	(void)close(c->bell);
	(void)close(c->end[0]);
	(void)close(c->end[1]);
}

void
rig_pair(int type, int pair[2])
{
	must(socketpair(AF_UNIX, type, 0, pair) == 0, "sockets");
	must(fcntl(pair[1], F_SETFL, O_NONBLOCK) == 0, "sockets");
}
