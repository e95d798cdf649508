/*
 * NBD clients in the transmission phase: replies out. (doc/proto.md of the NBD project, "Transmission phase".)
 *
 * A request that has something to say stands in the client's queue. From there it is laid down as pieces in the
 * order of the wire, and the pieces go out many at a time, data straight from the slabs.
 *
 * Invariants:
 * - a piece, once laid down, goes out whole and in its place, or the connection is closed;
 * - after the header of a simple reply to a read nothing else goes out before the last of its data: a failure in
 *   between can only be told by closing the connection;
 * - the DONE flag stands on the last chunk only, and after it the request is ended;
 * - a slab is given back when its last byte has gone to the socket, not before.
 */
#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "nbd_internal.h"

#define SIMPLE_MAGIC 0x67446698u
#define CHUNK_MAGIC 0x668e33efu
#define CHUNK_DONE 1u
#define CHUNK_OFFSET_DATA 1u
#define CHUNK_ERROR 32769u
#define ERROR_PAYLOAD 6u		/* error and the length of a text that we do not send */

/* ---- a read's parts ----
 * device[0] is the last slot that was laid down, above it the number of those laid down and not sent. */

static uint32_t
parts_down(const struct hast_req *req)
{
	return (uint32_t)(req->device[0] >> 32);
}

/* The next part that is to be laid down, when it is answered; else HAST_NONE. */
static uint32_t
next_part(struct hast_ggate *g, const struct hast_req *req)
{
	struct hast_arena *a = hast_ggate_arena(g);
	uint32_t slot = req->first;

	if (parts_down(req) > 0)
		slot = hast_arena_bio(a, (uint32_t)req->device[0])->part_next;
	return slot != HAST_NONE && hast_arena_bio(a, slot)->acked ? slot : HAST_NONE;
}

uint64_t
nbd_whole_max(struct hast_ggate *g, const struct nbd_client *c)
{
	uint32_t parts = c->port.limit < HAST_REQ_WINDOW ? c->port.limit : HAST_REQ_WINDOW;

	return (uint64_t)parts * hast_ggate_arena(g)->geo.slab_size;
}

/* Until all of it is there. */
static int
waits(const struct hast_req *req)
{
	return (req->device[1] & (NBD_REQ_WHOLE | NBD_REQ_EARLY)) == NBD_REQ_WHOLE;
}

/* ---- pieces ---- */

static uint32_t
nbd_errno(int error)
{
	switch (error) {
	case 0:
	case EPERM:
	case EIO:
	case ENOMEM:
	case EINVAL:
	case ENOSPC:
	case EOVERFLOW:
	case ESHUTDOWN:
		return (uint32_t)error;		/* Linux's numbers are the protocol's */
	case EROFS:
		return EPERM;
	case EDQUOT:
	case EFBIG:
		return ENOSPC;
	case EOPNOTSUPP:
		return EINVAL;			/* ENOTSUP has a meaning of its own there */
	default:
		return EIO;
	}
}

static uint8_t *
put(uint8_t *to, const void *from, size_t n)
{
	memcpy(to, from, n);
	return to + n;
}

static uint8_t
simple_head(uint8_t *to, const struct hast_req *req)
{
	uint32_t word[2] = { htobe32(SIMPLE_MAGIC), htobe32(nbd_errno(req->error)) };

	(void)put(put(to, word, 8), &req->cookie, 8);
	return 16;
}

static uint8_t *
chunk_head(uint8_t *to, const struct hast_req *req, uint16_t flags, uint16_t type, uint32_t length)
{
	uint32_t magic = htobe32(CHUNK_MAGIC), size = htobe32(length);
	uint16_t half[2] = { htobe16(flags), htobe16(type) };

	return put(put(put(put(to, &magic, 4), half, 4), &req->cookie, 8), &size, 4);
}

static uint8_t
data_head(uint8_t *to, const struct hast_req *req, int done, uint64_t offset, uint64_t length)
{
	uint64_t at = htobe64(offset);

	(void)put(chunk_head(to, req, done ? CHUNK_DONE : 0, CHUNK_OFFSET_DATA, (uint32_t)length + 8), &at, 8);
	return 28;
}

static uint8_t
error_head(uint8_t *to, const struct hast_req *req)
{
	uint32_t error = htobe32(nbd_errno(req->error));
	uint16_t text = 0;

	(void)put(put(chunk_head(to, req, CHUNK_DONE, CHUNK_ERROR, ERROR_PAYLOAD), &error, 4), &text, 2);
	return 26;
}

static struct nbd_piece *
new_piece(struct nbd_client *c, struct hast_req *req)
{
	struct nbd_piece *p = &c->piece[(c->piece_first + c->pieces++) % NBD_PIECES];

	p->head_length = p->last = 0;
	p->slot = HAST_NONE;
	p->length = 0;
	p->req = req;
	return p;
}

/* An answer without data: it is the last piece. */
static void
lay_answer(struct nbd_client *c, struct hast_req *req)
{
	struct nbd_piece *p = new_piece(c, req);

	p->head_length = c->structured && req->error != 0 ? error_head(p->head, req) : simple_head(p->head, req);
	p->last = 1;
}

static void
lay_part(struct hast_ggate *g, struct nbd_client *c, struct hast_req *req, uint32_t slot)
{
	struct hast_bio *bio = hast_arena_bio(hast_ggate_arena(g), slot);
	struct nbd_piece *p = new_piece(c, req);
	int last = bio->offset + bio->length == req->offset + req->length;

	if (c->structured && (req->device[1] & NBD_REQ_WHOLE) == 0) {
		p->head_length = data_head(p->head, req, last, bio->offset, bio->length);
	} else if ((req->device[1] & NBD_REQ_STARTED) == 0) {
		req->device[1] |= NBD_REQ_STARTED;
		req->urgent = 1;
		p->head_length = c->structured ? data_head(p->head, req, 1, req->offset, req->length) :
		    simple_head(p->head, req);
	}
	p->slot = slot;
	p->length = (uint32_t)bio->length;
	p->last = (uint8_t)last;
	req->device[0] = ((uint64_t)parts_down(req) + 1) << 32 | slot;
}

/* Lays down what the request has to say. 1 when the next one may speak, 0 when that has to wait. */
static int
lay(struct hast_ggate *g, struct nbd_client *c, struct hast_req *req)
{
	int started = (req->device[1] & NBD_REQ_STARTED) != 0;

	if (req->error != 0 && started) {
		hast_port_kill(g, &c->port, EIO);
		return 0;
	}
	if (req->cmd != HAST_CMD_READ || req->error != 0) {
		if (req->finished)
			lay_answer(c, req);
		return 1;
	}
	while (c->pieces < NBD_PIECES) {
		uint32_t slot = next_part(g, req);

		if (slot == HAST_NONE)
			return c->structured && (req->device[1] & NBD_REQ_WHOLE) == 0;
		lay_part(g, c, req, slot);
		if (c->piece[(c->piece_first + c->pieces - 1) % NBD_PIECES].last)
			return 1;
	}
	return 0;
}

/* ---- the queue ---- */

void
nbd_queue(struct hast_ggate *g, struct nbd_client *c, struct hast_req *req)
{
	hast_port_dirty(g, &c->port);
	if ((req->device[1] & NBD_REQ_QUEUED) != 0)
		return;
	req->device[1] |= NBD_REQ_QUEUED;
	req->next = NULL;
	if (c->queue_head == NULL)
		c->queue_head = req;
	else
		c->queue_tail->next = req;
	c->queue_tail = req;
}

static void
fill(struct hast_ggate *g, struct nbd_client *c)
{
	while (c->queue_head != NULL && c->pieces < NBD_PIECES) {
		struct hast_req *req = c->queue_head;

		if (!lay(g, c, req))
			return;
		c->queue_head = req->next;
		req->device[1] &= ~(uint64_t)NBD_REQ_QUEUED;
	}
}

void
nbd_data(struct hast_ggate *g, struct hast_port *port, struct hast_req *req)
{
	/* It would wait for those who do not read, holding its own slots: an error can then only be told by breaking off. */
	if (waits(req) && hast_req_crowded(g, req))
		req->device[1] |= NBD_REQ_EARLY;
	if (!waits(req))
		nbd_queue(g, (struct nbd_client *)port, req);
}

/* ---- sending ---- */

static int
gather(struct hast_ggate *g, struct nbd_client *c, struct iovec *iov, size_t *total)
{
	uint64_t skip = c->sent;
	int n = 0;

	*total = 0;
	for (uint32_t i = 0; i < c->pieces; i++) {
		struct nbd_piece *p = &c->piece[(c->piece_first + i) % NBD_PIECES];

		if (skip < p->head_length)
			iov[n++] = (struct iovec){ p->head + skip, p->head_length - skip };
		skip = skip > p->head_length ? skip - p->head_length : 0;
		if (p->length > 0)
			iov[n++] = (struct iovec){ (char *)hast_part_data(g, p->slot) + skip, p->length - skip };
		*total += p->head_length + p->length;
		skip = 0;
	}
	*total -= c->sent;
	return n;
}

static void
piece_sent(struct hast_ggate *g, struct nbd_client *c, struct nbd_piece *p)
{
	struct hast_req *req = p->req;

	if (p->slot != HAST_NONE) {
		req->device[0] -= (uint64_t)1 << 32;
		hast_part_sent(g, req);
	}
	if (p->last)
		hast_req_end(g, req);
	else if (req->error == 0 && !waits(req) && next_part(g, req) != HAST_NONE)
		nbd_queue(g, c, req);
}

static void
account(struct hast_ggate *g, struct nbd_client *c, size_t n)
{
	while (n > 0) {
		struct nbd_piece *p = &c->piece[c->piece_first];
		uint64_t rest = p->head_length + p->length - c->sent;

		if (n < rest) {
			c->sent += n;
			return;
		}
		n -= rest;
		c->sent = 0;
		c->piece_first = (c->piece_first + 1) % NBD_PIECES;
		c->pieces--;
		piece_sent(g, c, p);
	}
}

/* The socket takes no more for now. */
static int
block(struct hast_ggate *g, struct nbd_client *c)
{
	c->port.want_write = 1;
	hast_port_rearm(g, &c->port);
	return 0;
}

int
nbd_writable(struct hast_ggate *g, struct hast_port *port)
{
	port->want_write = 0;
	hast_port_dirty(g, port);
	return 0;
}

int
nbd_flush(struct hast_ggate *g, struct hast_port *port)
{
	struct nbd_client *c = (struct nbd_client *)port;
	struct iovec iov[2 * NBD_PIECES];

	if (port->want_write)
		return 0;
	for (;;) {
		struct msghdr msg = { .msg_iov = iov };
		size_t total;
		ssize_t n;

		fill(g, c);
		if (port->dead)
			return 0;
		if (c->pieces == 0)
			break;
		msg.msg_iovlen = (size_t)gather(g, c, iov, &total);
		n = sendmsg(port->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n == -1 && errno == EINTR)
			continue;
		if (n == -1)
			return errno == EAGAIN ? block(g, c) : -errno;
		account(g, c, (size_t)n);
		if ((size_t)n < total)
			return block(g, c);
	}
	hast_port_rearm(g, port);
	if (c->leaving && port->reqs == 0)
		hast_port_kill(g, port, 0);
	return 0;
}
