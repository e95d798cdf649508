/*
 * The pump of the connection, in both roles, in one thread, for sanitizers: conn_stress SEED ROUNDS.
 *
 * Its control socket is always readable, so that each call of the pump is a turn or two that never wait: the whole run follows
 * from the seed. Each round is one connection of a secondary and one of a primary, fed with messages of which some are
 * damaged, in pieces of any size; and one pair of nodes that is left in peace. Exit code 0 when all was right.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "arena.h"
#include "conn.h"
#include "pump.h"
#include "ring.h"
#include "seq.h"
#include "transform.h"
#include "wire.h"

#define SLOTS 12u
#define SLAB 65536u
#define AREA (SLOTS * SLAB)
#define MESSAGES 120
#define STREAM (MESSAGES * (SLAB + 1024u))

struct node {
	struct hast_arena *arena;
	uint64_t size;
	struct hast_link *link;
	int bell, out, in;		/* our ends of the connections */
	int control[2];
	unsigned char disk[AREA];	/* secondary: the component */
};

static unsigned seed, lazy = 1;	/* lazy: the disk works in one turn of so many */
static int small;			/* no large reads and writes */
static struct hast_transform *transform[3][3];
static unsigned char stream[STREAM], slab[SLAB], scratch[SLAB + 4], model[AREA];

static void
must(int ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "conn_stress: %s (errno %d)\n", what, errno);
	exit(1);
}

static unsigned
roll(unsigned sides)
{
	return (unsigned)rand_r(&seed) % sides;
}

/* ---- a node ---- */

static void
node_open(struct node *n, int secondary, int out, int in, unsigned version, unsigned how)
{
	struct hast_geometry geo = { .datasize = AREA, .data_offset = 8192, .extentsize = 4096, .mapsize = 4096,
	    .keepdirty = 4, .nclient = SLOTS, .nsync = 0, .slab_size = SLAB };
	struct hast_conn_options opt = { .secondary = (uint32_t)secondary, .version = version, .compression = how % 3,
	    .checksum = how / 3 % 3, .keepalive_ms = 1000000, .timeout_ms = 1000000, .silence_ms = 1000000, .sector = 512,
	    .max_io = SLAB };

	n->size = hast_arena_size(&geo);
	n->arena = mmap(NULL, n->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(n->arena != MAP_FAILED && hast_arena_init(n->arena, &geo) == 0, "arena");
	n->bell = eventfd(0, EFD_NONBLOCK);
	must(n->bell >= 0 && socketpair(AF_UNIX, SOCK_SEQPACKET, 0, n->control) == 0, "control");
	must(write(n->control[1], "x", 1) == 1, "control");
	opt.own_bell = opt.seq_bell = opt.disk_bell = n->bell;
	opt.control = n->control[0];
	opt.out = n->out = out;
	opt.in = n->in = in;
	n->link = hast_link_new(n->arena, &opt);
	must(n->link != NULL, "pump");
}

static void
node_close(struct node *n)
{
	hast_link_free(n->link);
	(void)close(n->bell);
	(void)close(n->control[0]);
	(void)close(n->control[1]);
	(void)close(n->out);
	(void)close(n->in);
	(void)munmap(n->arena, n->size);
}

/* 1 when it has nothing more to do. */
static int
step(struct node *n)
{
	int result = hast_link_pump(n->link);

	must(result == HAST_PUMP_CONTROL || result == HAST_PUMP_LOST || result == HAST_PUMP_QUIET ||
	    result == HAST_PUMP_EVENT, "pump");
	must(result != HAST_PUMP_LOST || (hast_link_error(n->link) > 0 && hast_link_why(n->link)[0] != 0), "why");
	return result == HAST_PUMP_QUIET;
}

/* The secondary's disk does some of what it has. */
static void
disk(struct node *n, int all)
{
	static uint32_t held[SLOTS];
	static unsigned nheld;
	struct hast_ring *ring = hast_arena_ring(n->arena, HAST_RING_DISK);
	struct hast_ring *done = hast_arena_ring(n->arena, HAST_RING_DISK_DONE);

	if (!all && roll(lazy) != 0)
		return;
	while (nheld < SLOTS && hast_ring_pop(ring, &held[nheld]) == 1)
		nheld++;
	while (nheld > 0 && (all || roll(3) > 0)) {
		unsigned which = roll(nheld);
		struct hast_bio *bio = hast_arena_bio(n->arena, held[which]);
		unsigned char *data = hast_arena_slab(n->arena, held[which]), *at = n->disk + bio->offset;

		if (bio->cmd != HAST_CMD_FLUSH)
			must(bio->length > 0 && bio->length <= AREA && bio->offset <= AREA - bio->length, "range");
		if (bio->cmd == HAST_CMD_READ)
			memcpy(data, at, bio->length);
		else if (bio->cmd == HAST_CMD_DELETE || (bio->flags & HAST_BIO_ZERO) != 0)
			memset(at, 0, bio->length);
		else if (bio->cmd == HAST_CMD_WRITE)
			memcpy(at, data, bio->length);
		bio->error[HAST_LOCAL] = 0;
		must(hast_ring_push(done, held[which]) == 1, "disk done");
		held[which] = held[--nheld];
	}
}

/* ---- messages, some of them damaged ---- */

static void
fill_slab(size_t length)
{
	unsigned kind = roll(3);

	for (size_t i = 0; i < length; i++)
		slab[i] = kind == 0 ? 0 : kind == 1 ? (unsigned char)(i / 16) : (unsigned char)rand_r(&seed);
}

static uint32_t
random_length(void)
{
	return 512u * (roll(4) == 0 && !small ? 1 + roll(SLAB / 512) : 1 + roll(8));
}

static size_t
append(size_t at, const uint8_t *header, int size, const uint8_t *data, uint32_t length)
{
	must(size > 0 && at + (size_t)size + length <= STREAM, "stream");
	memcpy(stream + at, header, (size_t)size);
	if (length > 0)
		memcpy(stream + at + size, data, length);
	return at + (size_t)size + length;
}

static size_t
put_request(size_t at)
{
	struct hast_wire_request r = { .seq = 1 + roll(5), .cmd = (uint8_t)(1 + roll(4)), .length = random_length() };
	uint8_t header[HAST_WIRE_HEADER_MAX];
	const uint8_t *data = NULL;

	if (roll(40) == 0)
		r.cmd = (uint8_t)roll(256);
	r.offset = 512u * roll(AREA / 512);
	if (r.offset + r.length > AREA && roll(20) > 0)
		r.offset = AREA - r.length;
	if (r.cmd == HAST_WIRE_WRITE) {
		r.memsync = (uint8_t)roll(2);
		fill_slab(r.length);
		data = hast_transform_pack(transform[roll(3)][roll(3)], slab, (uint32_t)r.length, 0, scratch, &r.data);
		if (roll(60) == 0)
			r.length = random_length();
	}
	return append(at, header, hast_wire_encode_request(&r, 2, header, sizeof(header)), data, r.data.size);
}

static size_t
put_reply(size_t at, struct hast_arena *a)
{
	struct hast_bio *bio = hast_arena_bio(a, roll(SLOTS));
	struct hast_wire_reply r = { .seq = bio->seq, .received = roll(4) == 0, .error = roll(8) == 0 ? 5 : 0 };
	uint8_t header[HAST_WIRE_HEADER_MAX];
	const uint8_t *data = NULL;

	if (roll(100) == 0)
		r.seq += roll(3) << 16;
	if (bio->cmd == HAST_CMD_READ && r.error == 0) {
		r.received = 0;
		fill_slab(bio->length);
		data = hast_transform_pack(transform[roll(3)][roll(3)], slab, (uint32_t)bio->length, 0, scratch, &r.data);
	}
	return append(at, header, hast_wire_encode_reply(&r, 2, header, sizeof(header)), data, r.data.size);
}

static size_t
damage(size_t length)
{
	for (unsigned n = roll(4); n > 0 && length > 0; n--) {
		size_t at = roll((unsigned)length), count = 1 + roll(16);

		switch (roll(4)) {
		case 0:
			stream[at] ^= (unsigned char)(1u << roll(8));
			break;
		case 1:
			stream[at] = (unsigned char)rand_r(&seed);
			break;
		case 2:
			length = roll(4) == 0 ? at : length;
			break;
		default:
			if (at + count > length)
				count = length - at;
			memmove(stream + at, stream + at + count, length - at - count);
			length -= count;
		}
	}
	return length;
}

/* Feeds the stream in pieces, with turns between; then the end of it. */
static void
feed(struct node *n, int in, int replies, size_t length)
{
	static const unsigned largest[] = { 300, 5000, 200000 };
	unsigned most = largest[roll(3)], turns = 0;
	size_t at = 0;

	while (at < length && hast_link_error(n->link) == 0 && ++turns < 200000) {
		size_t piece = 1 + roll(most);
		ssize_t sent;

		if (piece > length - at)
			piece = length - at;
		sent = send(in, stream + at, piece, MSG_NOSIGNAL | MSG_DONTWAIT);
		at += sent > 0 ? (size_t)sent : 0;
		(void)step(n);
		disk(n, 0);
		while (replies >= 0 && recv(replies, scratch, sizeof(scratch), MSG_DONTWAIT) > 0)
			;
	}
	must(turns < 200000, "the stream is not taken");
	(void)close(in);
}

static void
attack_secondary(void)
{
	static struct node n;
	int one[2], two[2], quiet = 0;
	size_t length = 0;

	must(socketpair(AF_UNIX, SOCK_STREAM, 0, one) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, two) == 0, "sockets");
	node_open(&n, 1, two[0], one[0], 1 + roll(2), roll(9));
	for (int i = 0; i < MESSAGES; i++)
		length = put_request(length);
	feed(&n, one[1], two[1], damage(length));
	(void)close(two[1]);
	hast_link_finish(n.link);
	for (int turns = 0; turns < 1000 && (!quiet || hast_link_free_slots(n.link) < SLOTS); turns++) {
		disk(&n, 1);
		quiet |= step(&n);
	}
	must(quiet, "it does not come to its end");
	must(hast_link_free_slots(n.link) == SLOTS, "a slot is lost");
	node_close(&n);
}

static void
attack_primary(void)
{
	static struct node n;
	static const uint8_t cmd[] = { HAST_CMD_READ, HAST_CMD_READ, HAST_CMD_WRITE, HAST_CMD_FLUSH };
	int one[2], two[2], finals[SLOTS] = { 0 }, received[SLOTS] = { 0 };
	uint32_t entry;
	size_t length = 0;

	must(socketpair(AF_UNIX, SOCK_STREAM, 0, one) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, two) == 0, "sockets");
	node_open(&n, 0, one[0], two[0], 2, 0);
	for (uint32_t slot = 0; slot < SLOTS; slot++) {
		struct hast_bio *bio = hast_arena_bio(n.arena, slot);

		bio->cmd = cmd[roll(4)];
		bio->flags = roll(2) ? HAST_BIO_MEMSYNC : 0;
		bio->length = random_length();
		bio->seq = bio->sent = (uint64_t)(1 + roll(100)) << 16 | slot;
		bio->pending = 1u << HAST_REMOTE;
	}
	for (int i = 0; i < 8; i++)
		length = put_reply(length, n.arena);
	feed(&n, two[1], -1, damage(length));
	for (int turns = 0; turns < 20; turns++)
		(void)step(&n);
	while (hast_ring_pop(hast_arena_ring(n.arena, HAST_RING_RECV_DONE), &entry) == 1) {
		uint32_t slot = entry & ~(uint32_t)HAST_EVENT_RECEIVED;

		must(slot < SLOTS, "a slot that is not there");
		if (entry == slot)
			must(++finals[slot] == 1, "answered twice");
		else
			must(++received[slot] == 1 && finals[slot] == 0, "received twice, or late");
	}
	(void)close(one[1]);
	node_close(&n);
}

/* ---- two nodes in peace ---- */

static uint32_t
ask(struct node *p, uint32_t slot, uint64_t number)
{
	struct hast_bio *bio = hast_arena_bio(p->arena, slot);

	bio->cmd = (uint8_t)(1 + roll(4));
	bio->flags = 0;
	bio->length = random_length();
	bio->offset = 512u * roll((AREA - (unsigned)bio->length) / 512 + 1);
	bio->seq = number << 16 | slot;
	bio->pending = 1u << HAST_REMOTE;
	if (bio->cmd == HAST_CMD_WRITE) {
		bio->flags = (uint8_t)((roll(2) ? HAST_BIO_MEMSYNC : 0) | (roll(4) == 0 ? HAST_BIO_ZERO : 0));
		fill_slab(bio->length);
		memcpy(hast_arena_slab(p->arena, slot), slab, bio->length);
		if ((bio->flags & HAST_BIO_ZERO) != 0)
			memset(slab, 0, bio->length);
		memcpy(model + bio->offset, slab, bio->length);
	} else if (bio->cmd == HAST_CMD_DELETE) {
		memset(model + bio->offset, 0, bio->length);
	}
	return slot;
}

static void
peace(void)
{
	static struct node p, s;
	static unsigned char expected[SLOTS][SLAB];
	int one[2], two[2], busy[SLOTS] = { 0 };
	unsigned asked = 0, answered = 0, turns = 0;
	uint32_t entry;

	must(socketpair(AF_UNIX, SOCK_STREAM, 0, one) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, two) == 0, "sockets");
	node_open(&p, 0, one[0], two[0], 1 + roll(2), roll(9));
	node_open(&s, 1, two[1], one[1], 2, roll(9));
	memset(model, 0, sizeof(model));
	memset(s.disk, 0, sizeof(s.disk));
	while (answered < 300) {
		uint32_t slot = roll(SLOTS);

		must(++turns < 1000000, "the nodes hang");
		if (asked < 300 && !busy[slot]) {
			struct hast_bio *bio = hast_arena_bio(p.arena, ask(&p, slot, ++asked));

			busy[slot] = 1;
			if (bio->cmd == HAST_CMD_READ)
				memcpy(expected[slot], model + bio->offset, bio->length);
			must(hast_ring_push(hast_arena_ring(p.arena, HAST_RING_SEND), slot) == 1, "send ring");
		}
		(void)step(&p);
		(void)step(&s);
		disk(&s, 0);
		while (hast_ring_pop(hast_arena_ring(p.arena, HAST_RING_RECV_DONE), &entry) == 1) {
			struct hast_bio *bio = hast_arena_bio(p.arena, entry & 0xffff);

			if ((entry & HAST_EVENT_RECEIVED) != 0)
				continue;
			must(busy[entry] && bio->error[HAST_REMOTE] == 0, "answer");
			if (bio->cmd == HAST_CMD_READ)
				must(memcmp(hast_arena_slab(p.arena, entry), expected[entry], bio->length) == 0, "read");
			busy[entry] = 0;
			answered++;
		}
	}
	must(hast_link_error(p.link) == 0, "primary");
	must(hast_link_error(s.link) == 0, "secondary");
	must(memcmp(model, s.disk, AREA) == 0, "the nodes differ");
	node_close(&p);
	node_close(&s);
}

int
main(int argc, char **argv)
{
	int rounds = argc == 3 ? atoi(argv[2]) : 0;

	must(rounds > 0, "usage: conn_stress SEED ROUNDS");
	seed = (unsigned)atoi(argv[1]);
	for (uint32_t i = 0; i < 9; i++) {
		transform[i / 3][i % 3] = hast_transform_new(i / 3, i % 3, 1);
		must(transform[i / 3][i % 3] != NULL, "transform");
	}
	for (int i = 0; i < rounds; i++) {
		lazy = roll(2) ? 1 : 50;
		small = roll(2) != 0;
		attack_secondary();
		attack_primary();
		if (i % 8 == 0)
			peace();
	}
	for (int i = 0; i < 9; i++)
		hast_transform_free(transform[i / 3][i % 3]);
	return 0;
}
