/*
 * NBD clients in the transmission phase: requests in. (doc/proto.md of the NBD project, "Transmission phase".)
 *
 * Invariants:
 * - a client that stops in the middle of a message holds at most one slot, and all such clients together at most
 *   half of them: a small payload is copied when it is complete, a large one goes straight into a slab, and
 *   where too many do that, through the buffer;
 * - the payload of a write is taken from the stream to its last byte whatever becomes of the request, and the answer
 *   is given after that: clients do not expect one while they are still sending;
 * - nothing that a client says is used as a size or an offset before validate() has passed it.
 */
#include "nbd.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "nbd_internal.h"
#include "trace.h"

#define REQUEST_MAGIC 0x25609513u
#define REQUEST_SIZE 28u
#define MAX_DATA (32u << 20)		/* bytes of one read or write: what the negotiation promised */
#define SMALL (NBD_BUFFER / 2)		/* payloads up to this are collected in the buffer */
#define LOOK_AHEAD 4096u		/* bytes received into the buffer after a large payload */
#define READS_PER_TURN 16		/* then the others have their turn */
#define SEND_BUFFER (1 << 20)

enum { CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES };

#define FLAG_FUA 1u
#define FLAG_NO_HOLE 2u
#define FLAG_DF 4u

struct request {
	uint16_t flags;
	uint16_t type;
	uint64_t cookie;		/* as it came: it only goes back */
	uint64_t offset;
	uint32_t length;
};

static uint32_t
buffered(const struct nbd_client *c)
{
	return c->end - c->begin;
}

/* ---- one request ---- */

static int
parse(const uint8_t *at, struct request *r)
{
	uint32_t magic;

	memcpy(&magic, at, 4);
	memcpy(&r->flags, at + 4, 2);
	memcpy(&r->type, at + 6, 2);
	memcpy(&r->cookie, at + 8, 8);
	memcpy(&r->offset, at + 16, 8);
	memcpy(&r->length, at + 24, 4);
	r->flags = be16toh(r->flags);
	r->type = be16toh(r->type);
	r->offset = be64toh(r->offset);
	r->length = be32toh(r->length);
	return be32toh(magic) == REQUEST_MAGIC;
}

/* FUA is to be accepted with every command. */
static uint16_t
flags_of(const struct nbd_client *c, uint16_t type)
{
	if (type == CMD_WRITE_ZEROES)
		return FLAG_FUA | FLAG_NO_HOLE;
	if (type == CMD_READ && c->structured)
		return FLAG_FUA | FLAG_DF;
	return FLAG_FUA;
}

static uint8_t
command_of(uint16_t type)
{
	switch (type) {
	case CMD_READ:
		return HAST_CMD_READ;
	case CMD_WRITE:
	case CMD_WRITE_ZEROES:
		return HAST_CMD_WRITE;
	case CMD_TRIM:
		return HAST_CMD_DELETE;
	case CMD_FLUSH:
		return HAST_CMD_FLUSH;
	default:
		return HAST_CMD_NONE;
	}
}

/* Everything that can be wrong with a request in itself: 0 or the errno to answer. */
static int
validate(struct hast_ggate *g, const struct nbd_client *c, const struct request *r)
{
	uint8_t cmd = command_of(r->type);
	uint64_t size = hast_ggate_arena(g)->geo.datasize;

	if (cmd == HAST_CMD_NONE || (r->flags & ~flags_of(c, r->type)) != 0)
		return EINVAL;
	if (cmd == HAST_CMD_FLUSH)
		return r->offset == 0 && r->length == 0 ? 0 : EINVAL;
	if (c->readonly && cmd != HAST_CMD_READ)
		return EPERM;
	if ((r->type == CMD_READ || r->type == CMD_WRITE) && r->length > MAX_DATA)
		return EINVAL;
	if (cmd == HAST_CMD_WRITE && (r->offset > size || r->length > size - r->offset))
		return ENOSPC;
	if ((r->flags & FLAG_DF) != 0 && r->length > nbd_whole_max(g, c))
		return EOVERFLOW;
	return hast_req_check(g, cmd, r->offset, r->length);
}

static void
describe(struct hast_ggate *g, const struct nbd_client *c, const struct request *r, struct hast_req *req)
{
	req->cookie = r->cookie;
	req->cmd = command_of(r->type);
	req->offset = r->offset;
	req->length = r->length;
	if (req->cmd != HAST_CMD_READ && (r->flags & FLAG_FUA) != 0)
		req->flags |= HAST_REQ_FUA;
	if (r->type == CMD_WRITE_ZEROES)
		req->flags |= (uint8_t)(HAST_REQ_ZERO | ((r->flags & FLAG_NO_HOLE) != 0 ? HAST_REQ_NOHOLE : 0));
	if ((r->flags & FLAG_DF) != 0 || (!c->structured && r->length <= nbd_whole_max(g, c)))
		req->device[1] = NBD_REQ_WHOLE;
}

/* The client wants no more, or is gone in good order: what is under way is answered, then the port is closed. */
static void
leave(struct hast_ggate *g, struct nbd_client *c)
{
	c->leaving = 1;
	c->begin = c->end = 0;
	c->port.paused = 1;
	hast_port_rearm(g, &c->port);
	hast_port_dirty(g, &c->port);
}

/* Takes a request from the buffer. 1 taken, 0 not now, -errno. */
static int
take_request(struct hast_ggate *g, struct nbd_client *c)
{
	struct hast_req *req;
	struct request r;

	if (buffered(c) < REQUEST_SIZE || hast_ggate_frozen(g))
		return 0;
	if (!parse(c->buffer + c->begin, &r))
		return -EPROTO;
	if (r.type == CMD_DISC) {
		leave(g, c);
		return 1;
	}
	c->large = r.type == CMD_WRITE && r.length > SMALL;
	if (r.type == CMD_WRITE && !c->large && buffered(c) < REQUEST_SIZE + r.length)
		return 0;
	req = hast_req_new(g, &c->port);
	if (req == NULL)
		return 0;
	c->begin += REQUEST_SIZE;
	describe(g, c, &r, req);
	req->error = validate(g, c, &r);
	req->finished = req->error != 0;
	if (req->error == EOPNOTSUPP && hast_req_idle(g, req->cmd))
		req->error = 0;		/* a trim promises nothing */
	if (r.type == CMD_WRITE && r.length > 0) {
		c->write = req;
		c->left = r.length;
		c->draining = req->finished;
	} else if (req->finished) {
		nbd_queue(g, c, req);
	} else {
		hast_req_start(g, req);
	}
	return 1;
}

/* ---- payloads ---- */

static void
stop_filling(struct hast_ggate *g, struct nbd_client *c)
{
	*hast_ggate_filling(g) -= c->filling;
	c->filling = 0;
	c->slot = HAST_NONE;
}

/* The slot is full: off it goes. */
static void
submit(struct hast_ggate *g, struct nbd_client *c)
{
	struct hast_req *req = c->write;
	uint32_t slot = c->slot;

	stop_filling(g, c);
	if (c->left == 0)
		c->write = NULL;
	hast_part_submit(g, req, slot, c->part);
}

/* Bytes of the next part, or 0 when more of it has to come first. */
static uint32_t
choose_part(struct hast_ggate *g, const struct nbd_client *c)
{
	const struct hast_geometry *geo = &hast_ggate_arena(g)->geo;
	uint32_t part = c->left < geo->slab_size ? (uint32_t)c->left : geo->slab_size;

	if (buffered(c) >= part)
		return part;
	if (part <= SMALL)
		return 0;
	if (*hast_ggate_filling(g) < geo->nclient / 2)
		return part;
	return buffered(c) >= SMALL ? buffered(c) / HAST_SECTOR * HAST_SECTOR : 0;
}

/* Goes on with the payload of c->write. 1 when it took something, 0 not now. */
static int
take_payload(struct hast_ggate *g, struct nbd_client *c)
{
	uint32_t n;

	if (c->slot == HAST_NONE) {
		uint32_t part = choose_part(g, c);

		if (part == 0)
			return 0;
		c->slot = hast_part_claim(g, c->write);
		if (c->slot == HAST_NONE)
			return 0;
		c->part = part;
		c->got = 0;
		c->filling = 1;
		*hast_ggate_filling(g) += 1;
	}
	n = c->part - c->got;
	if (n > buffered(c))
		n = buffered(c);
	memcpy((char *)hast_part_data(g, c->slot) + c->got, c->buffer + c->begin, n);
	c->begin += n;
	c->got += n;
	c->left -= n;
	if (c->got == c->part)
		submit(g, c);
	return n > 0;
}

/* Throws the rest of a payload away; after it the client is told. */
static int
drain_payload(struct hast_ggate *g, struct nbd_client *c)
{
	uint32_t n = c->left < buffered(c) ? (uint32_t)c->left : buffered(c);
	struct hast_req *req = c->write;

	c->begin += n;
	c->left -= n;
	if (c->left > 0)
		return 0;
	c->write = NULL;
	c->draining = 0;
	nbd_queue(g, c, req);
	return 1;
}

static void
nbd_finished(struct hast_ggate *g, struct hast_port *port, struct hast_req *req)
{
	struct nbd_client *c = (struct nbd_client *)port;

	if (req != c->write) {
		nbd_queue(g, c, req);
		return;
	}
	/* It has failed, and its payload is not all here yet. */
	c->draining = 1;
	if (c->slot != HAST_NONE) {
		hast_part_drop(g, req, c->slot);
		stop_filling(g, c);
	}
}

/* ---- the stream ---- */

static int
take_all(struct hast_ggate *g, struct nbd_client *c)
{
	int result = 1;

	while (result > 0 && !c->leaving && !c->port.starved && !c->port.dead) {
		if (c->write == NULL)
			result = take_request(g, c);
		else if (c->draining)
			result = drain_payload(g, c);
		else
			result = take_payload(g, c);
	}
	/* Not to be cut off in the middle of a message when the stage is to become quiet. */
	if (c->port.midway != (c->write != NULL)) {
		c->port.midway = c->write != NULL;
		hast_port_rearm(g, &c->port);
	}
	return result < 0 ? result : 0;
}

/* One receive: into the slot that is being filled, what follows into the buffer. Bytes, 0 end of file, -errno.
   *asked: bytes that there was room for. */
static ssize_t
receive(struct hast_ggate *g, struct nbd_client *c, size_t *asked)
{
	struct iovec iov[2];
	int n = 0;
	ssize_t got;
	size_t room, direct = 0;

	if (c->begin > 0) {
		memmove(c->buffer, c->buffer + c->begin, buffered(c));
		c->end -= c->begin;
		c->begin = 0;
	}
	if (c->slot != HAST_NONE) {
		direct = c->part - c->got;
		iov[n++] = (struct iovec){ (char *)hast_part_data(g, c->slot) + c->got, direct };
	}
	/* After one large write comes another: what the buffer takes of it has to be copied. */
	room = NBD_BUFFER - c->end;
	if (c->large && room > LOOK_AHEAD)
		room = LOOK_AHEAD;
	iov[n++] = (struct iovec){ c->buffer + c->end, room };
	*asked = direct + room;
	do {
		got = readv(c->port.fd, iov, n);
	} while (got == -1 && errno == EINTR);
	if (got <= 0)
		return got == 0 ? 0 : -errno;
	hast_trace(hast_ggate_arena(g), HAST_STAGE_GGATE, HAST_TRACE_GOT, 0);
	if (direct > (size_t)got)
		direct = (size_t)got;
	c->got += (uint32_t)direct;
	c->left -= direct;
	c->end += (uint32_t)((size_t)got - direct);
	if (c->slot != HAST_NONE && c->got == c->part)
		submit(g, c);
	return got;
}

static int
end_of_file(struct hast_ggate *g, struct nbd_client *c)
{
	if (c->write != NULL || buffered(c) > 0)
		return -ECONNRESET;
	leave(g, c);
	return 0;
}

static int
nbd_readable(struct hast_ggate *g, struct hast_port *port)
{
	struct nbd_client *c = (struct nbd_client *)port;

	for (int i = 0; i < READS_PER_TURN; i++) {
		size_t asked;
		ssize_t got;
		int error;

		if (c->leaving || port->starved || port->dead || (c->write == NULL && hast_ggate_frozen(g)))
			return 0;
		got = receive(g, c, &asked);
		if (got == 0)
			return end_of_file(g, c);
		if (got < 0)
			return got == -EAGAIN ? 0 : (int)got;
		error = take_all(g, c);
		if (error < 0 || (size_t)got < asked)
			return error;
	}
	return 0;
}

static int
nbd_resume(struct hast_ggate *g, struct hast_port *port)
{
	return take_all(g, (struct nbd_client *)port);
}

static void
nbd_closed(struct hast_ggate *g, struct hast_port *port)
{
	struct nbd_client *c = (struct nbd_client *)port;

	if (c->slot != HAST_NONE) {
		hast_part_drop(g, c->write, c->slot);
		stop_filling(g, c);
	}
}

static const struct hast_port_ops nbd_ops = {
	.readable = nbd_readable,
	.writable = nbd_writable,
	.resume = nbd_resume,
	.data = nbd_data,
	.finished = nbd_finished,
	.flush = nbd_flush,
	.closed = nbd_closed,
};

static int
prepare(int fd)
{
	int flags = fcntl(fd, F_GETFL), size = SEND_BUFFER;

	if (flags == -1 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) == -1)
		return -errno;
	/* Data in the socket's buffer holds no slot. The kernel's default is enough to work. */
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)) == -1)
		(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	return 0;
}

int
hast_nbd_add(struct hast_ggate *g, int fd, int flags)
{
	struct nbd_client *c = NULL;
	int error = hast_ggate_clients(g) < HAST_NBD_CLIENTS_MAX ? 0 : -EUSERS;

	if (error == 0) {
		c = calloc(1, sizeof(*c));
		error = c == NULL ? -ENOMEM : prepare(fd);
	}
	if (error == 0) {
		c->port.ops = &nbd_ops;
		c->port.fd = fd;
		c->structured = (flags & HAST_NBD_STRUCTURED) != 0;
		c->readonly = (flags & HAST_NBD_READONLY) != 0;
		c->slot = HAST_NONE;
		error = hast_port_add(g, &c->port);
	}
	if (error != 0) {
		free(c);
		(void)close(fd);
	}
	return error;
}
