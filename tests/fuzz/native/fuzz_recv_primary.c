/*
 * What a secondary may answer: link.c, recv.c and recv_primary.c as they run on a primary, on socket pairs. Nothing is sent.
 *
 * Checked: an answer is believed only for what is out there, once; the data of a read is all there before it is; nothing else
 * comes out of RECV_DONE.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "conn.h"
#include "pump.h"
#include "rig.h"
#include "seq.h"
#include "transform.h"

#define DATASIZE (1u << 20)
#define SLAB 32768u
#define SLOTS 8u
#define PATIENCE 4000

struct rig {
	struct rig_control control;
	struct hast_arena *arena;
	struct hast_link *link;
	int fd, mine[2], sink;
	uint64_t seq[SLOTS];		/* what is out there; 0: nothing */
	uint64_t finals[SLOTS];		/* the last seq that was answered */
	uint64_t received[SLOTS];
	uint64_t number;
};

static struct hast_transform *ways[9];
static uint8_t scratch[SLAB + 8], data[SLAB + 8];	/* more than their data: a header may say so */

/* ---- what comes out ---- */

static void
take_done(struct rig *r)
{
	struct hast_ring *ring = hast_arena_ring(r->arena, HAST_RING_RECV_DONE);
	uint32_t entry;

	while (hast_ring_pop(ring, &entry) == 1) {
		uint32_t slot = entry & ~(uint32_t)HAST_EVENT_RECEIVED;
		struct hast_bio *bio;

		must(slot < SLOTS && r->seq[slot] != 0, "an answer for a slot that is not out there");
		bio = hast_arena_bio(r->arena, slot);
		if (entry != slot) {
			must((bio->flags & HAST_BIO_MEMSYNC) != 0, "received, and nobody asked for that");
			must(r->received[slot] != bio->seq && r->finals[slot] != bio->seq, "received twice, or late");
			r->received[slot] = bio->seq;
			continue;
		}
		must(r->finals[slot] != bio->seq, "answered twice");
		must(bio->error[HAST_REMOTE] >= 0, "an error that is none");
		r->finals[slot] = bio->seq;
		__atomic_store_n(&bio->pending, 0, __ATOMIC_RELAXED);
		r->seq[slot] = 0;
	}
}

static void
pump(struct rig *r)
{
	int result = hast_link_pump(r->link);

	must(result == HAST_PUMP_CONTROL || result == HAST_PUMP_LOST, "it ends");
	must(result != HAST_PUMP_LOST || (hast_link_error(r->link) > 0 && hast_link_why(r->link)[0] != 0), "no reason");
}

static void
push(struct rig *r, const uint8_t *at, size_t n)
{
	int turns = 0;

	while (n > 0 && hast_link_error(r->link) == 0) {
		ssize_t sent = send(r->fd, at, n, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (sent > 0) {
			at += sent;
			n -= (size_t)sent;
			continue;
		}
		if (errno == EPIPE)
			return;	/* it has said that nothing more comes */
		must(errno == EAGAIN, "connection");
		must(++turns < PATIENCE, "what the secondary sends is not taken");
		pump(r);
		take_done(r);
	}
}

/* ---- requests that went out, and answers ---- */

static void
ask(struct rig *r, struct input *in)
{
	static const uint8_t cmds[] = { HAST_CMD_READ, HAST_CMD_READ, HAST_CMD_WRITE, HAST_CMD_DELETE, HAST_CMD_FLUSH };
	uint8_t which = take8(in);
	uint32_t slot = which % SLOTS;
	struct hast_bio *bio = hast_arena_bio(r->arena, slot);

	if (r->seq[slot] != 0)
		return;
	bio->cmd = cmds[which / SLOTS % 5];
	bio->flags = which & 0x80 ? HAST_BIO_MEMSYNC : 0;
	bio->length = 512u * (1 + take8(in) % (SLAB / 512));
	bio->seq = ++r->number << 16 | slot;
	bio->error[HAST_REMOTE] = 0;
	bio->pending = 1u << HAST_REMOTE;
	/* Not sent yet, at times: then no answer may be believed. */
	bio->sent = (which & 0x40) != 0 ? 0 : bio->seq;
	r->seq[slot] = bio->seq;
	hast_arena_seq(r->arena)->nremote = 1;
}

static void
answer(struct rig *r, struct input *in)
{
	uint8_t which = take8(in), how = take8(in), damage = take8(in), header[HAST_WIRE_HEADER_MAX];
	struct hast_bio *bio = hast_arena_bio(r->arena, which % SLOTS);
	struct hast_wire_reply reply = { .seq = bio->seq, .received = which >> 7, .error = which & 0x40 ? how : 0 };
	const uint8_t *payload = NULL;
	int size;

	if (reply.seq == 0 || damage == 0xff)
		reply.seq = take64(in);
	if (bio->cmd == HAST_CMD_READ && reply.error == 0 && !reply.received && bio->length > 0) {
		fill(data, bio->length, how);
		payload = hast_transform_pack(ways[how % 9], data, (uint32_t)bio->length, 0, scratch, &reply.data);
	}
	if (damage >= 0xf0) {
		reply.data.hash[1] ^= damage & 1;
		reply.data.size += damage & 2;
		reply.data.compression = damage & 4 ? take8(in) % 3 : reply.data.compression;
	}
	size = hast_wire_encode_reply(&reply, 2, header, sizeof(header));
	must(size > 0, "encode");
	push(r, header, (size_t)size);
	if (payload == NULL)
		return;
	/* All of it, or the connection ends in the middle. */
	push(r, payload, damage == 0xfe ? reply.data.size / 2 : reply.data.size <= SLAB + 4 ? reply.data.size : SLAB + 4);
	if (damage == 0xfe)
		(void)shutdown(r->fd, SHUT_WR);
}

static void
raw(struct rig *r, struct input *in, size_t n)
{
	size_t got;
	const uint8_t *at = take_bytes(in, n, &got);

	push(r, at, got);
}

static void
raw_header(struct rig *r, struct input *in)
{
	size_t got;
	const uint8_t *at = take_bytes(in, take8(in), &got);
	uint8_t main_header[HAST_WIRE_MAIN_SIZE] = { 2, (uint8_t)got };

	push(r, main_header, sizeof(main_header));
	push(r, at, got);
}

/* ---- one input ---- */

static void
start(struct rig *r, uint8_t options)
{
	struct hast_geometry geo = { .datasize = DATASIZE, .data_offset = 8192, .extentsize = 65536, .mapsize = 4096,
	    .keepdirty = 2, .nclient = SLOTS, .nsync = 0, .slab_size = SLAB };
	struct hast_conn_options opt = { .version = options & 0x80 ? 1 : 2, .keepalive_ms = 1000000, .timeout_ms = 1000000,
	    .silence_ms = 1000000 };
	int one[2], two[2];

	memset(r, 0, sizeof(*r));
	rig_control_open(&r->control);
	r->arena = rig_arena(&geo);
	rig_pair(SOCK_STREAM, one);
	rig_pair(SOCK_STREAM, two);
	r->mine[0] = opt.in = one[0];
	r->fd = one[1];
	r->mine[1] = opt.out = two[0];
	r->sink = two[1];
	opt.own_bell = opt.seq_bell = opt.disk_bell = r->control.bell;
	opt.control = r->control.end[0];
	r->link = hast_link_new(r->arena, &opt);
	must(r->link != NULL, "pump");
}

static void
finish(struct rig *r)
{
	for (int turns = 0; turns < 4; turns++) {
		pump(r);
		take_done(r);
	}
	(void)close(r->fd);
	for (int turns = 0; hast_link_error(r->link) == 0; turns++) {
		must(turns < PATIENCE, "the end of the connection is not seen");
		pump(r);
		take_done(r);
	}
	pump(r);
	take_done(r);
	hast_link_free(r->link);
	(void)close(r->mine[0]);
	(void)close(r->mine[1]);
	(void)close(r->sink);
	rig_control_close(&r->control);
}

int
LLVMFuzzerTestOneInput(const uint8_t *at, size_t size)
{
	static struct rig r;
	struct input in = { at, size };

	for (uint32_t i = 0; i < 9 && ways[i] == NULL; i++)
		must((ways[i] = hast_transform_new(i / 3, i % 3, 1)) != NULL, "transform");
	start(&r, take8(&in));
	while (in.left > 0) {
		uint8_t op = take8(&in);

		switch (op & 7) {
		case 0: case 1:
			ask(&r, &in);
			break;
		case 2: case 3: case 4:
			answer(&r, &in);
			break;
		case 5:
			pump(&r);
			take_done(&r);
			break;
		case 6:
			raw_header(&r, &in);
			break;
		default:
			raw(&r, &in, op >> 3);
		}
	}
	finish(&r);
	return 0;
}
