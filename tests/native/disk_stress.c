/*
 * The disk pump in one thread, the sequencer's part in another, for sanitizers: disk_stress FILE ENGINE ROUNDS.
 * Each round fills slots with bios that do not overlap, pushes them in batches of random size, and checks what comes
 * back: reads against a model, each slot once. Exit code 0 when all was right.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "arena.h"
#include "disk.h"
#include "doorbell.h"
#include "pump.h"
#include "ring.h"

#define SLOTS 48u
#define STRETCH 65536u
#define DATA_OFFSET 8192u

struct pump {
	struct hast_arena *arena;
	struct hast_disk_options options;
	int result;
};

static unsigned char model[SLOTS * STRETCH];

static void
must(int ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "disk_stress: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void *
run(void *arg)
{
	struct pump *p = arg;
	struct hast_disk *d = hast_disk_new(p->arena, &p->options);

	must(d != NULL, "hast_disk_new");
	do
		p->result = hast_disk_pump(d);
	while (p->result == -EINTR);
	hast_disk_free(d);
	return NULL;
}

static void
fill(struct hast_arena *a, uint32_t slot, unsigned *seed)
{
	struct hast_bio *bio = hast_arena_bio(a, slot);
	unsigned char *slab = hast_arena_slab(a, slot);
	uint64_t first = (unsigned)rand_r(seed) % 64 * HAST_SECTOR;
	unsigned kind = (unsigned)rand_r(seed) % 8;

	bio->offset = slot * (uint64_t)STRETCH + first;
	bio->length = (1 + (unsigned)rand_r(seed) % 64) * HAST_SECTOR;
	bio->flags = 0;
	bio->error[HAST_LOCAL] = -1;
	bio->cmd = kind == 0 ? HAST_CMD_FLUSH : kind < 4 ? HAST_CMD_READ : kind < 7 ? HAST_CMD_WRITE : HAST_CMD_DELETE;
	if (bio->cmd == HAST_CMD_WRITE) {
		memset(slab, rand_r(seed) & 0xff, bio->length);
		memcpy(model + bio->offset, slab, bio->length);
	} else if (bio->cmd == HAST_CMD_DELETE) {
		memset(model + bio->offset, 0, bio->length);
	}
}

static void
check(struct hast_arena *a, uint32_t slot)
{
	struct hast_bio *bio = hast_arena_bio(a, slot);

	errno = bio->error[HAST_LOCAL];
	must(bio->error[HAST_LOCAL] == 0, "bio failed");
	if (bio->cmd == HAST_CMD_READ)
		must(memcmp(hast_arena_slab(a, slot), model + bio->offset, bio->length) == 0, "wrong data read");
}

static void
collect(struct hast_arena *a, int bell, uint32_t want)
{
	struct hast_ring *ring = hast_arena_ring(a, HAST_RING_DISK_DONE);
	struct hast_doorbell *door = &a->bell[HAST_STAGE_GGATE];
	uint8_t seen[SLOTS] = { 0 };
	uint32_t slot;

	while (want > 0) {
		hast_doorbell_announce(door);
		if (hast_ring_ready(ring) == 0) {
			struct pollfd fd = { bell, POLLIN, 0 };

			must(poll(&fd, 1, 20000) == 1, "no completion");
		}
		hast_doorbell_cancel(door);
		must(hast_doorbell_drain(bell) == 0, "drain");
		while (hast_ring_pop(ring, &slot) == 1) {
			must(slot < SLOTS && !seen[slot], "slot twice");
			seen[slot] = 1;
			check(a, slot);
			want--;
		}
	}
}

static void
round_trip(struct hast_arena *a, const struct hast_disk_options *o, unsigned *seed)
{
	struct hast_ring *ring = hast_arena_ring(a, HAST_RING_DISK);
	uint32_t next = 0;

	while (next < SLOTS) {
		uint32_t n = 1 + (unsigned)rand_r(seed) % (SLOTS - next);

		for (uint32_t i = next; i < next + n; i++) {
			fill(a, i, seed);
			must(hast_ring_push(ring, i) == 1, "push");
		}
		must(hast_doorbell_ring(&a->bell[HAST_STAGE_DISK], o->own_bell) == 0, "ring");
		next += n;
	}
	collect(a, o->done_bell, SLOTS);
}

int
main(int argc, char **argv)
{
	struct hast_geometry geo = {
		.datasize = SLOTS * STRETCH, .data_offset = DATA_OFFSET, .extentsize = 65536, .mapsize = 512,
		.keepdirty = 4, .nclient = SLOTS, .nsync = 0, .slab_size = STRETCH,
	};
	struct pump p;
	pthread_t thread;
	int control[2];
	unsigned seed = 1;

	must(argc == 4, "usage: disk_stress FILE ENGINE ROUNDS");
	memset(&p, 0, sizeof(p));
	p.options.fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	must(p.options.fd >= 0 && ftruncate(p.options.fd, DATA_OFFSET + SLOTS * STRETCH) == 0, argv[1]);
	p.arena = mmap(NULL, hast_arena_size(&geo), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	must(p.arena != MAP_FAILED && hast_arena_init(p.arena, &geo) == 0, "arena");
	must(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, control) == 0, "socketpair");
	p.options.control = control[1];
	p.options.own_bell = eventfd(0, EFD_NONBLOCK);
	p.options.done_bell = eventfd(0, EFD_NONBLOCK);
	must(p.options.own_bell >= 0 && p.options.done_bell >= 0, "eventfd");
	p.options.done_stage = HAST_STAGE_GGATE;
	p.options.engine = (uint32_t)atoi(argv[2]);
	p.options.depth = 8;
	p.options.align = 1;
	must(pthread_create(&thread, NULL, run, &p) == 0, "thread");
	for (int i = atoi(argv[3]); i > 0; i--)
		round_trip(p.arena, &p.options, &seed);
	must(close(control[0]) == 0 && pthread_join(thread, NULL) == 0, "join");
	must(p.result == HAST_PUMP_CONTROL, "pump's end");
	return 0;
}
