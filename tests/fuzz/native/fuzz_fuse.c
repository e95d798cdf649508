/*
 * The FUSE channel: fuse.c, fuse_file.c and request.c under the real ggate pump and the sequencer. A socket pair of packets
 * stands in for /dev/fuse: one read is one request, one write one answer, as there.
 *
 * Checked: each request is answered exactly once (FORGET never), its answer as long as it says and as was asked; an end that
 * comes in the middle loses no slot.
 */
#include <errno.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuse.h"
#include "pump.h"
#include "rig.h"
#include "seq.h"

#define DATASIZE (1u << 20)
#define SLAB 4096u
#define NCLIENT 20u			/* 16 for one request, and a few */
#define MAX_WRITE (16 * SLAB)
#define REQUESTS 1024
#define PATIENCE 4000

struct rig {
	struct rig_control control;
	struct hast_arena *arena;
	struct hast_ggate *ggate;
	struct rig_disk disk;
	int fd;
	int ended;			/* the pump said that the device is gone */
	uint32_t sent;			/* uniques are 1 to sent */
	uint32_t open;			/* answers to come */
	uint8_t waits[REQUESTS + 1];
	uint32_t most[REQUESTS + 1];	/* bytes behind the header of an answer */
};

/* ---- answers ---- */

static void
take_answers(struct rig *r)
{
	static uint8_t packet[MAX_WRITE + 4096];
	ssize_t n;

	while ((n = recv(r->fd, packet, sizeof(packet), MSG_DONTWAIT)) > 0) {
		struct fuse_out_header out;

		must((size_t)n >= sizeof(out), "an answer without a header");
		memcpy(&out, packet, sizeof(out));
		must(out.len == (size_t)n, "an answer of another length than it says");
		must(out.error <= 0 && out.error > -512, "an error that the kernel does not know");
		must(out.error == 0 || (size_t)n == sizeof(out), "an error with data");
		must(out.unique >= 1 && out.unique <= r->sent && r->waits[out.unique], "an answer to nothing");
		must((size_t)n - sizeof(out) <= r->most[out.unique], "a longer answer than was asked for");
		r->waits[out.unique] = 0;
		r->open--;
	}
}

static void
pump(struct rig *r)
{
	int result = hast_ggate_pump(r->ggate);

	rig_decide(r->arena);
	if (result == HAST_PUMP_DEVICE)
		r->ended = 1;
	else
		must(result == HAST_PUMP_CONTROL || result == HAST_PUMP_QUIET || result == HAST_PUMP_EVENT, "the pump ends");
}

static void
everything(struct rig *r)
{
	pump(r);
	(void)rig_disk_all(&r->disk);
	take_answers(r);
}

/* ---- requests ---- */

static int
push(struct rig *r, const uint8_t *packet, size_t n)
{
	for (int turns = 0; !r->ended; turns++) {
		if (send(r->fd, packet, n, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)n)
			return 1;
		if (errno != EAGAIN && errno != ENOBUFS)
			return 0;	/* closed; the pump will say so */
		must(turns < PATIENCE, "requests are not taken");
		hast_ggate_freeze(r->ggate, 0);	/* while it is frozen nothing has to be taken */
		everything(r);
	}
	return 0;
}

static uint64_t
choose_offset(struct input *in)
{
	uint16_t n = take16(in);

	return n < 0xf000 ? (uint64_t)(n % (DATASIZE / 512 + 2)) * 512 : take64(in);
}

static uint32_t
choose_length(struct input *in)
{
	uint8_t n = take8(in);

	return n < 0xe0 ? 512u * n : take32(in);
}

/* Arguments for an opcode. Bytes of them. */
static size_t
arguments(struct input *in, uint32_t opcode, uint8_t *to, uint32_t *most)
{
	const uint8_t *at;
	size_t got;

	*most = 256;
	if (opcode == FUSE_READ) {
		struct fuse_read_in a = { .offset = choose_offset(in), .size = choose_length(in) };

		*most = a.size;
		memcpy(to, &a, sizeof(a));
		return sizeof(a);
	}
	if (opcode == FUSE_WRITE) {
		struct fuse_write_in a = { .offset = choose_offset(in), .size = choose_length(in) };
		size_t payload = a.size <= MAX_WRITE + SLAB ? a.size : SLAB;

		memcpy(to, &a, sizeof(a));
		fill(to + sizeof(a), payload, take8(in));
		return sizeof(a) + payload;
	}
	if (opcode == FUSE_FALLOCATE) {
		struct fuse_fallocate_in a = { .offset = choose_offset(in), .length = choose_length(in) };
		uint8_t mode = take8(in);

		a.mode = mode & 1 ? FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE : mode & 2 ? FALLOC_FL_ZERO_RANGE : mode >> 2;
		memcpy(to, &a, sizeof(a));
		return sizeof(a);
	}
	if (opcode == FUSE_INIT) {
		struct fuse_init_in a = { .major = 7, .minor = take8(in), .flags = take32(in) };

		if (a.minor > 200)
			a.major = take8(in);
		memcpy(to, &a, sizeof(a));
		return sizeof(a);
	}
	at = take_bytes(in, take8(in), &got);
	memcpy(to, at, got);
	return got;
}

static void
ask(struct rig *r, struct input *in)
{
	static const uint32_t opcodes[] = { FUSE_READ, FUSE_WRITE, FUSE_READ, FUSE_WRITE, FUSE_FSYNC, FUSE_FALLOCATE, FUSE_INIT,
	    FUSE_GETATTR, FUSE_SETATTR, FUSE_OPEN, FUSE_STATFS, FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_RELEASE, FUSE_INTERRUPT };
	static uint8_t packet[sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in) + MAX_WRITE + 2 * SLAB];
	struct fuse_in_header head = { .nodeid = FUSE_ROOT_ID };
	uint8_t kind = take8(in), damage = take8(in);
	uint32_t most;
	size_t size;

	if (r->sent == REQUESTS)
		return;
	head.opcode = (kind & 15) < 15 ? opcodes[kind & 15] : take16(in);
	size = sizeof(head) + arguments(in, head.opcode, packet + sizeof(head), &most);
	if (damage >= 0xf8)
		size -= damage & 7 && size > sizeof(head) ? (size_t)take16(in) % (size - sizeof(head) + 1) : 0;
	head.len = (uint32_t)size + (damage == 0xf0 ? take8(in) : 0);
	head.unique = ++r->sent;
	memcpy(packet, &head, sizeof(head));
	if (head.opcode != FUSE_FORGET && head.opcode != FUSE_BATCH_FORGET && head.len == size) {
		r->waits[head.unique] = 1;
		r->most[head.unique] = most;
		r->open++;
	}
	if (!push(r, packet, size) && r->waits[head.unique]) {
		r->waits[head.unique] = 0;
		r->open--;
	}
}

static void
raw(struct rig *r, struct input *in)
{
	static uint8_t packet[256];
	size_t got;
	const uint8_t *at = take_bytes(in, take8(in), &got);
	struct fuse_in_header head;

	/* No packet of no bytes: that is how the end looks. */
	if (got == 0 || r->sent == REQUESTS)
		return;
	memcpy(packet, at, got);
	if (got >= sizeof(head)) {
		memcpy(&head, packet, sizeof(head));
		head.unique = ++r->sent;
		memcpy(packet, &head, sizeof(head));
		if (head.len == got && head.opcode != FUSE_FORGET && head.opcode != FUSE_BATCH_FORGET) {
			r->waits[head.unique] = 1;
			r->most[head.unique] = MAX_WRITE;
			r->open++;
		}
	}
	(void)push(r, packet, got);
}

/* ---- one input ---- */

static void
start(struct rig *r)
{
	struct hast_geometry geo = { .datasize = DATASIZE, .data_offset = 8192, .extentsize = 65536, .mapsize = 4096,
	    .keepdirty = 2, .nclient = NCLIENT, .nsync = 0, .slab_size = SLAB };
	int pair[2], room = 4 * MAX_WRITE;

	memset(r, 0, sizeof(*r));
	rig_control_open(&r->control);
	r->arena = rig_arena(&geo);
	rig_disk_open(&r->disk, r->arena);
	r->ggate = hast_ggate_new(r->arena, r->control.bell, r->control.end[0], -1);
	must(r->ggate != NULL, "ggate");
	rig_pair(SOCK_SEQPACKET, pair);
	(void)setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
	(void)setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
	r->fd = pair[1];
	must(hast_fuse_add(r->ggate, pair[0], 0) == 0, "device");
}

static void
finish(struct rig *r)
{
	int turns;

	hast_ggate_freeze(r->ggate, 0);
	for (turns = 0; r->open > 0 && !r->ended; turns++) {
		must(turns < PATIENCE, "a request is not answered");
		everything(r);
	}
	(void)close(r->fd);
	r->fd = -1;
	for (turns = 0; !r->ended || !hast_ggate_quiet(r->ggate); turns++) {
		must(turns < PATIENCE, "it does not come to its end");
		pump(r);
		(void)rig_disk_all(&r->disk);
	}
	must(hast_arena_seq(r->arena)->nfree == NCLIENT, "a slot is lost");
	hast_ggate_free(r->ggate);
	rig_control_close(&r->control);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct rig r;
	struct input in = { data, size };

	start(&r);
	while (in.left > 0 && !r.ended) {
		uint8_t op = take8(&in);

		switch (op & 15) {
		case 8:
			raw(&r, &in);
			break;
		case 9: case 10:
			pump(&r);
			take_answers(&r);	/* the kernel takes each at once */
			break;
		case 11: case 12: case 13:
			(void)rig_disk_one(&r.disk, take8(&in));
			break;
		case 14:
			hast_ggate_freeze(r.ggate, op & 0x10);
			break;
		case 15:
			if ((op & 0xf0) == 0xf0) {
				(void)shutdown(r.fd, SHUT_RDWR);
				pump(&r);
			}
			break;
		default:
			ask(&r, &in);
		}
	}
	finish(&r);
	return 0;
}
