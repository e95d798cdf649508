/*
 * What a primary may send: recv.c, recv_secondary.c and send.c as they run on a secondary, on socket pairs, with a disk in memory
 * that answers in any order and fails at times.
 *
 * Checked: nothing reaches the disk that is out of range; every reply can be read and answers a request; while the primary keeps to
 * the protocol it is not thrown out, and gets one final answer for each request; in the end all slots are back.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "conn.h"
#include "pump.h"
#include "rig.h"
#include "transform.h"

#define DATASIZE (1u << 20)
#define SLAB 32768u
#define SLOTS 8u
#define REQUESTS 512
#define PATIENCE 4000

struct rig {
	struct rig_control control;
	struct hast_arena *arena;
	struct rig_disk disk;
	struct hast_link *link;
	int out, in;			/* connections 1 and 2, the primary's ends */
	int mine[2];			/* the secondary's ends */
	int lawful;
	int ended;			/* the primary has said that nothing more comes */
	unsigned version;
	uint64_t sent;			/* requests; seqs are 1 to sent */
	uint64_t open;			/* final answers to come */
	uint8_t waits[REQUESTS + 1];
	uint8_t received[REQUESTS + 1];	/* memsync: 1 may come, 2 has come */
	uint8_t buffer[1 << 17];	/* of replies */
	size_t have;
};

static struct hast_transform *ways[9];
static uint8_t scratch[SLAB + 8], data[SLAB + 8];	/* more than their data: a header may say so */

/* ---- replies ---- */

static void
one_reply(struct rig *r, const struct hast_wire_reply *reply)
{
	must(reply->seq >= 1, "seq");
	if (!r->lawful)
		return;
	must(reply->seq <= r->sent && r->waits[reply->seq], "a reply to nothing");
	if (reply->received) {
		must(r->received[reply->seq] == 1, "received twice, or not asked for");
		r->received[reply->seq] = 2;
		return;
	}
	r->waits[reply->seq] = 0;
	r->open--;
}

/* A reply at the beginning of the buffer. Its bytes, or 0. */
static size_t
parse(struct rig *r)
{
	struct hast_wire_reply reply;
	uint8_t version;
	uint32_t size;
	size_t whole;

	if (r->have < HAST_WIRE_MAIN_SIZE)
		return 0;
	must(hast_wire_parse_main(r->buffer, r->have, 2, HAST_WIRE_HEADER_MAX, &version, &size) == 0, "a reply's header");
	must(version == r->version, "version of a reply");
	whole = HAST_WIRE_MAIN_SIZE + size;
	if (r->have < whole)
		return 0;
	must(hast_wire_decode_reply(r->buffer + HAST_WIRE_MAIN_SIZE, size, &reply) == 0, "a reply cannot be read");
	must(reply.data.size <= SLAB + 4, "data of a reply");
	whole += reply.data.size;
	if (r->have < whole)
		return 0;
	one_reply(r, &reply);
	return whole;
}

static void
take_replies(struct rig *r)
{
	ssize_t n;
	size_t one;

	while ((n = recv(r->in, r->buffer + r->have, sizeof(r->buffer) - r->have, MSG_DONTWAIT)) > 0) {
		r->have += (size_t)n;
		while ((one = parse(r)) > 0) {
			memmove(r->buffer, r->buffer + one, r->have - one);
			r->have -= one;
		}
	}
}

/* ---- turns ---- */

/* 1 when it has nothing more to do. */
static int
pump(struct rig *r)
{
	int result = hast_link_pump(r->link);

	must(result == HAST_PUMP_CONTROL || result == HAST_PUMP_LOST || result == HAST_PUMP_QUIET ||
	    result == HAST_PUMP_EVENT, "it ends");
	if (result == HAST_PUMP_LOST) {
		must(hast_link_error(r->link) > 0 && hast_link_why(r->link)[0] != 0, "lost, and no reason");
		must(!r->lawful || r->ended, "a primary that kept to the protocol was thrown out");
	}
	return result == HAST_PUMP_QUIET;
}

static void
everything(struct rig *r)
{
	(void)pump(r);
	(void)rig_disk_all(&r->disk);
	take_replies(r);
}

static void
push(struct rig *r, const uint8_t *at, size_t n)
{
	int turns = 0;

	while (n > 0 && !r->ended && hast_link_error(r->link) == 0) {
		ssize_t sent = send(r->out, at, n, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (sent > 0) {
			at += sent;
			n -= (size_t)sent;
			continue;
		}
		must(errno == EAGAIN, "connection");
		must(++turns < PATIENCE, "what the primary sends is not taken");
		everything(r);
	}
}

/* ---- requests ---- */

/* Fields that nearly always make sense. */
static void
compose(struct rig *r, struct input *in, struct hast_wire_request *q)
{
	uint8_t kind = take8(in);
	uint16_t where = take16(in);
	uint32_t sectors = 1 + take8(in) % 80;	/* up to 40 KiB: more than is taken, at times */

	memset(q, 0, sizeof(*q));
	q->cmd = kind < 0xf0 ? 1 + kind % 5 : take8(in);
	q->memsync = kind >> 4 & 1;
	q->length = 512u * sectors;
	q->offset = where < 0xff00 ? 512u * (where % (DATASIZE / 512)) : take64(in);
	if (q->length > SLAB && where % 4 != 0)
		q->length = SLAB;
	if (q->offset <= DATASIZE && q->offset + q->length > DATASIZE && where % 4 != 0)
		q->offset = DATASIZE - q->length;
	if (q->cmd == HAST_WIRE_FLUSH)
		q->offset = q->length = 0;
	q->seq = r->sent + 1;
}

static void
ask(struct rig *r, struct input *in)
{
	struct hast_wire_request q;
	uint8_t header[HAST_WIRE_HEADER_MAX];
	const uint8_t *payload = NULL;
	uint8_t way, damage;
	int size;

	if (r->sent == REQUESTS)
		return;
	compose(r, in, &q);
	way = take8(in);
	damage = take8(in);
	if (q.cmd == HAST_WIRE_WRITE) {
		uint32_t length = q.length <= SLAB ? (uint32_t)q.length : SLAB;

		fill(data, length, way);
		payload = hast_transform_pack(ways[way % 9], data, length, 0, scratch, &q.data);
	}
	if (damage >= 0xf0) {	/* something that is not as it was said */
		r->lawful = 0;
		q.length += damage & 1 ? 512 : 0;
		q.data.hash[3] ^= damage & 2;
		q.data.size += damage & 4;
		q.data.compression = damage & 8 ? take8(in) % 3 : q.data.compression;
		q.seq = damage == 0xf0 ? take8(in) : q.seq;
	}
	size = hast_wire_encode_request(&q, 2, header, sizeof(header));
	must(size > 0, "encode");
	if (hast_wire_check_request(&q, DATASIZE, 512, SLAB) != 0 && q.data.size > 0)
		r->lawful = 0;	/* it is answered, but where the next message begins nobody knows */
	if (q.cmd != HAST_WIRE_KEEPALIVE && r->lawful) {
		r->sent++;
		r->waits[q.seq] = 1;
		r->received[q.seq] = q.cmd == HAST_WIRE_WRITE && q.memsync && r->version == 2;
		r->open++;
	}
	push(r, header, (size_t)size);
	if (payload != NULL)
		push(r, payload, q.data.size <= SLAB + 4 ? q.data.size : SLAB + 4);
}

static void
raw(struct rig *r, struct input *in, size_t n)
{
	size_t got;
	const uint8_t *at = take_bytes(in, n, &got);

	if (got == 0)
		return;
	r->lawful = 0;
	push(r, at, got);
}

/* A header of any nv: the main header is given, what is in it is not. */
static void
raw_header(struct rig *r, struct input *in)
{
	size_t got;
	const uint8_t *at = take_bytes(in, take8(in), &got);
	uint8_t main_header[HAST_WIRE_MAIN_SIZE] = { 2, (uint8_t)got };

	r->lawful = 0;
	push(r, main_header, sizeof(main_header));
	push(r, at, got);
}

/* ---- one input ---- */

static void
start(struct rig *r, uint8_t options)
{
	struct hast_geometry geo = { .datasize = DATASIZE, .data_offset = 8192, .extentsize = 65536, .mapsize = 4096,
	    .keepdirty = 2, .nclient = SLOTS, .nsync = 0, .slab_size = SLAB };
	struct hast_conn_options opt = { .secondary = 1, .compression = options % 3, .checksum = options / 4 % 3,
	    .keepalive_ms = 1000000, .timeout_ms = 1000000, .silence_ms = 1000000, .sector = 512, .max_io = SLAB };
	int one[2], two[2];

	memset(r, 0, sizeof(*r));
	rig_control_open(&r->control);
	r->arena = rig_arena(&geo);
	rig_disk_open(&r->disk, r->arena);
	rig_pair(SOCK_STREAM, one);
	rig_pair(SOCK_STREAM, two);
	r->version = opt.version = options & 0x80 ? 1 : 2;
	r->mine[0] = opt.in = one[0];
	r->out = one[1];
	r->mine[1] = opt.out = two[0];
	r->in = two[1];
	opt.own_bell = opt.seq_bell = opt.disk_bell = r->control.bell;
	opt.control = r->control.end[0];
	r->link = hast_link_new(r->arena, &opt);
	must(r->link != NULL, "pump");
	r->lawful = 1;
}

static void
finish(struct rig *r)
{
	int turns, quiet = 0;

	for (turns = 0; r->lawful && r->open > 0; turns++) {
		must(turns < PATIENCE, "a request is not answered");
		everything(r);
	}
	(void)close(r->out);
	r->ended = 1;
	hast_link_finish(r->link);
	for (turns = 0; !quiet || hast_link_free_slots(r->link) < SLOTS; turns++) {
		must(turns < PATIENCE, "it does not come to its end");
		(void)rig_disk_all(&r->disk);
		quiet |= pump(r);
		take_replies(r);
	}
	hast_link_free(r->link);
	rig_control_close(&r->control);
	(void)close(r->in);
	(void)close(r->mine[0]);
	(void)close(r->mine[1]);
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

		switch (op & 15) {
		case 8:
			raw(&r, &in, op >> 4);
			break;
		case 9:
			raw_header(&r, &in);
			break;
		case 10: case 11:
			(void)pump(&r);
			break;
		case 12: case 13:
			(void)rig_disk_one(&r.disk, take8(&in));
			break;
		case 14:
			take_replies(&r);
			break;
		case 15:
			if ((op & 0xf0) == 0xf0) {
				(void)shutdown(r.out, SHUT_WR);
				r.ended = 1;
				r.lawful = 0;
			}
			break;
		default:
			ask(&r, &in);
		}
	}
	finish(&r);
	return 0;
}
