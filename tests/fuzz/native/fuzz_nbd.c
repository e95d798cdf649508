/*
 * NBD clients in the transmission phase: nbd.c, nbd_reply.c and request.c under the real ggate pump and the sequencer, on socket
 * pairs, with a disk in memory that answers in any order and fails at times.
 *
 * Checked: every reply is well-formed and answers a request that was asked and not answered; a client that kept to the
 * protocol gets all its answers; in the end all slots and requests are back.
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "ggate.h"
#include "nbd.h"
#include "pump.h"
#include "rig.h"
#include "seq.h"

#define DATASIZE (1u << 20)
#define SLAB 40960u			/* above half of a client's buffer: a large payload goes past that */
#define NCLIENT 16u
#define WHOLE (NCLIENT / 4 * SLAB)	/* a longer simple reply begins before all of the data is there */
#define CLIENTS 2
#define COOKIES 1024
#define PAYLOAD 140000u			/* at most for one write, bytes */
#define PATIENCE 4000			/* turns */

enum { READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, TYPES };

struct client {
	int fd;				/* -1: closed */
	int structured;
	int lawful;			/* so far: whole requests, no raw bytes */
	int left;			/* it said DISC */
	int long_read;			/* asked for more than is answered in one */
	uint32_t sent;			/* requests; cookies are 1 to sent */
	uint32_t answered;
	uint32_t length[COOKIES + 1];	/* of a read, else 0 */
	uint8_t open[COOKIES + 1];	/* asked and not answered */
	uint8_t head[20];		/* of the reply that comes in */
	uint32_t got;
	uint64_t skip;			/* bytes of its payload */
	uint32_t pending;		/* bytes of a write's payload that it has not sent yet */
};

struct rig {
	struct rig_control control;
	struct hast_arena *arena;
	struct hast_ggate *ggate;
	struct rig_disk disk;
	struct client client[CLIENTS];
};

/* ---- replies ---- */

static uint64_t
big(const uint8_t *at, unsigned bytes)
{
	uint64_t value = 0;

	while (bytes-- > 0)
		value = value << 8 | *at++;
	return value;
}

static void
finished(struct client *c, uint64_t cookie)
{
	must(cookie >= 1 && cookie <= c->sent && c->open[cookie], "an answer to nothing");
	c->open[cookie] = 0;
	c->answered++;
}

static void
simple_head(struct client *c)
{
	uint64_t cookie = big(c->head + 8, 8);

	must(big(c->head, 4) == 0x67446698u, "magic of a simple reply");
	finished(c, cookie);
	c->skip = big(c->head + 4, 4) == 0 ? c->length[cookie] : 0;
}

static void
chunk_head(struct client *c)
{
	uint64_t flags = big(c->head + 4, 2), type = big(c->head + 6, 2), cookie = big(c->head + 8, 8);
	uint64_t length = big(c->head + 16, 4);

	must(big(c->head, 4) == 0x668e33efu, "magic of a chunk");
	must(flags <= 1 && length <= DATASIZE + 8, "chunk");
	must(type == 0 ? flags == 1 && length == 0 : type == 1 ? length > 8 : type == 32769 && length >= 6, "type of a chunk");
	must(cookie >= 1 && cookie <= c->sent && c->open[cookie], "a chunk for nothing");
	must(type != 1 || (c->length[cookie] != 0 && length - 8 <= c->length[cookie]), "more data than was asked for");
	if (flags == 1)
		finished(c, cookie);
	c->skip = length;
}

static void
take_reply(struct client *c, const uint8_t *at, size_t n)
{
	/* Replies to reads are as long as what was asked; who sent raw bytes has asked anything. */
	uint32_t size = c->structured ? 20 : 16;

	while (n > 0 && c->lawful) {
		if (c->skip > 0) {
			size_t some = n < c->skip ? n : c->skip;

			c->skip -= some;
			at += some;
			n -= some;
			continue;
		}
		c->head[c->got++] = *at++;
		n--;
		/* Without structured replies all are simple; with them, only those to other commands than reads are. */
		if (c->got == 16 && big(c->head, 4) == 0x67446698u) {
			c->got = 0;
			must(!c->structured || c->length[big(c->head + 8, 8) % COOKIES] == 0, "a simple reply to a read");
			simple_head(c);
		} else if (c->got == size) {
			c->got = 0;
			if (c->structured)
				chunk_head(c);
			else
				simple_head(c);
		}
	}
}

static void
hang_up(struct client *c)
{
	if (c->fd >= 0)
		(void)close(c->fd);
	c->fd = -1;
}

/* The server has closed the connection. After the header of a simple reply there is no other way to say that a read failed. */
static void
thrown_out(const struct rig *r, struct client *c)
{
	int read_failed = !c->structured && c->long_read && r->disk.errors > 0;

	must(!c->lawful || c->left || read_failed, "a client that kept to the protocol was thrown out");
	hang_up(c);
}

static void
drain(const struct rig *r, struct client *c, size_t most)
{
	static uint8_t buffer[65536];
	ssize_t n;

	while (c->fd >= 0 && most > 0) {
		n = recv(c->fd, buffer, most < sizeof(buffer) ? most : sizeof(buffer), MSG_DONTWAIT);
		if (n == 0 || (n == -1 && errno != EAGAIN))
			thrown_out(r, c);
		if (n <= 0)
			return;
		take_reply(c, buffer, (size_t)n);
		most -= (size_t)n;
	}
}

/* ---- turns ---- */

static void
pump(struct rig *r)
{
	int result = hast_ggate_pump(r->ggate);

	rig_decide(r->arena);
	must(result == HAST_PUMP_CONTROL || result == HAST_PUMP_QUIET || result == HAST_PUMP_EVENT, "the pump ends");
}

static void
everything(struct rig *r)
{
	pump(r);
	(void)rig_disk_all(&r->disk);
	for (int i = 0; i < CLIENTS; i++)
		drain(r, &r->client[i], SIZE_MAX);
}

static void
push(struct rig *r, struct client *c, const uint8_t *at, size_t n)
{
	int turns = 0;

	while (n > 0 && c->fd >= 0) {
		ssize_t sent = send(c->fd, at, n, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (sent > 0) {
			at += sent;
			n -= (size_t)sent;
			continue;
		}
		if (errno != EAGAIN) {
			thrown_out(r, c);
			return;
		}
		must(++turns < PATIENCE, "what a client sends is not taken");
		hast_ggate_freeze(r->ggate, 0);	/* while it is frozen nothing has to be taken */
		everything(r);
	}
}

/* ---- requests ---- */

static uint64_t
choose_offset(struct input *in)
{
	uint16_t n = take16(in);

	if (n < 0xf000)
		return (uint64_t)(n % (DATASIZE / 512 + 2)) * 512;
	return n & 1 ? take64(in) : take32(in);
}

static uint32_t
choose_length(struct input *in)
{
	static const uint32_t lengths[] = { 0, 1, 512, 1024, 4096, SLAB, SLAB + 512, 2 * SLAB, 16384, 32768, 33280, 65536, 69632,
	    131072, DATASIZE, DATASIZE + 512, 32u << 20, (32u << 20) + 512, 0x7fffffff, 0xffffffff };
	uint8_t n = take8(in);

	if (n < 0xf0)
		return n & 1 ? 512u * (n >> 1) : lengths[(n >> 1) % (sizeof(lengths) / sizeof(lengths[0]))];
	return take32(in);
}

/* Some of the payload that is owed. */
static void
go_on(struct rig *r, struct client *c, uint32_t most)
{
	static uint8_t payload[PAYLOAD];
	uint32_t n = c->pending < most ? c->pending : most;

	fill(payload, n, c->sent);
	c->pending -= n;
	push(r, c, payload, n);
}

static void
ask(struct rig *r, struct client *c, struct input *in)
{
	uint8_t kind = take8(in), head[28];
	uint16_t flags = take8(in), type = kind & 7;
	uint64_t offset = choose_offset(in), cookie;
	uint32_t length = choose_length(in), magic = htobe32(0x25609513u);

	if (c->sent == COOKIES || c->left)
		return;
	go_on(r, c, UINT32_MAX);
	if (type == 7)
		type = take16(in);
	flags = flags < 0xf0 ? flags & (flags >> 4) & 7 : take16(in);
	if (type == DISC && (kind & 0xf8) != 0)
		type = WRITE;	/* else most inputs would be over soon */
	if (type == FLUSH && (kind & 0x80) == 0)
		offset = length = 0;
	if (type == WRITE && length > PAYLOAD)
		c->lawful = 0;	/* it will not send all of that */
	cookie = ++c->sent;
	c->open[cookie] = type != DISC;
	c->length[cookie] = type == READ ? length : 0;
	c->left = type == DISC;
	c->long_read |= type == READ && length > WHOLE;
	flags = htobe16(flags);
	memcpy(head, &magic, 4);
	memcpy(head + 4, &flags, 2);
	type = htobe16(type);
	memcpy(head + 6, &type, 2);
	cookie = htobe64(cookie);
	memcpy(head + 8, &cookie, 8);
	offset = htobe64(offset);
	memcpy(head + 16, &offset, 8);
	magic = htobe32(length);
	memcpy(head + 24, &magic, 4);
	push(r, c, head, sizeof(head));
	if (be16toh(type) != WRITE)
		return;
	c->pending = length < PAYLOAD ? length : PAYLOAD;
	go_on(r, c, kind & 0x40 ? 600u * take8(in) : UINT32_MAX);
}

static void
raw(struct rig *r, struct client *c, struct input *in)
{
	size_t got;
	const uint8_t *at = take_bytes(in, take8(in), &got);

	if (got == 0)
		return;
	c->lawful = 0;
	push(r, c, at, got);
}

/* ---- one input ---- */

static void
start(struct rig *r, uint8_t options)
{
	struct hast_geometry geo = { .datasize = DATASIZE, .data_offset = 8192, .extentsize = 65536, .mapsize = 4096,
	    .keepdirty = 2, .nclient = NCLIENT, .nsync = 0, .slab_size = SLAB };
	int nclients = options & 4 ? 2 : 1;

	memset(r, 0, sizeof(*r));
	rig_control_open(&r->control);
	r->arena = rig_arena(&geo);
	rig_disk_open(&r->disk, r->arena);
	r->ggate = hast_ggate_new(r->arena, r->control.bell, r->control.end[0], -1);
	must(r->ggate != NULL, "ggate");
	for (int i = 0; i < CLIENTS; i++)
		r->client[i].fd = -1;
	for (int i = 0; i < nclients; i++) {
		struct client *c = &r->client[i];
		int pair[2], flags = (options >> (4 * i)) & 3;

		rig_pair(SOCK_STREAM, pair);
		c->fd = pair[1];
		c->structured = (flags & HAST_NBD_STRUCTURED) != 0;
		c->lawful = 1;
		must(hast_nbd_add(r->ggate, pair[0], flags) == 0, "client");
	}
}

static void
finish(struct rig *r)
{
	uint32_t free_before = NCLIENT, turns = 0;

	hast_ggate_freeze(r->ggate, 0);
	for (int i = 0; i < CLIENTS; i++) {
		struct client *c = &r->client[i];

		if (c->lawful)
			go_on(r, c, UINT32_MAX);
		for (turns = 0; c->fd >= 0 && c->lawful && c->answered + (uint32_t)c->left < c->sent; turns++) {
			must(turns < PATIENCE, "a client that kept to the protocol does not get its answers");
			everything(r);
		}
		hang_up(c);
	}
	for (turns = 0; hast_ggate_clients(r->ggate) > 0 || !hast_ggate_quiet(r->ggate); turns++) {
		must(turns < PATIENCE, "it does not come to its end");
		everything(r);
	}
	must(hast_arena_seq(r->arena)->nfree == free_before, "a slot is lost");
	must(!hast_arena_seq(r->arena)->broken, "broken");
	hast_ggate_free(r->ggate);
	rig_control_close(&r->control);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct rig r;
	struct input in = { data, size };
	struct client *c = r.client;

	start(&r, take8(&in));
	while (in.left > 0) {
		uint8_t op = take8(&in);

		switch (op & 15) {
		case 0: case 1: case 2: case 3: case 4: case 5: case 6: case 7:
			ask(&r, c, &in);
			break;
		case 8:
			if ((op & 0x10) != 0)
				raw(&r, c, &in);
			else
				go_on(&r, c, 600u * take8(&in));
			break;
		case 9:
			pump(&r);
			break;
		case 10:	/* nobody reads for a while */
			for (int i = 0; i <= op; i++) {
				pump(&r);
				(void)rig_disk_all(&r.disk);
			}
			break;
		case 11: case 12:
			(void)rig_disk_one(&r.disk, take8(&in));
			break;
		case 13:
			drain(&r, c, (size_t)(op >> 4) * 4096 + 1);
			break;
		case 14:
			c = c == r.client && r.client[1].fd >= 0 ? &r.client[1] : r.client;
			break;
		default:
			if ((op & 0x80) != 0 && (op & 0x40) != 0)
				hang_up(c);
			else
				hast_ggate_freeze(r.ggate, op & 0x10);
		}
	}
	finish(&r);
	return 0;
}
