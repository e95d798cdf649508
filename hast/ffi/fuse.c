/*
 * The FUSE channel: a file system whose root is one regular file, the resource itself.
 *
 * Invariants:
 * - a request is taken from the kernel only when all slots that it can need are in hand (p->claimed), so no request
 *   ever holds some slots and waits for more: reads and writes of max_write bytes cannot starve each other;
 * - payload goes straight into the slabs and straight out of them: readv() and writev(), no copy in between;
 * - nothing that the kernel sends is used before it is checked, lengths first;
 * - each request taken is answered exactly once, except those that have no answer (FORGET); one that dies with this
 *   process is sent again by the kernel to the next one (FUSE_NOTIFY_RESEND).
 *
 * The protocol is that of linux/fuse.h, version 7.28 and later.
 */
#include "fuse.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fuse_internal.h"
#include "trace.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define NOTIFY_RESEND 7			/* FUSE_NOTIFY_RESEND, Linux 6.9 */
#define MAX_WRITE (1u << 20)		/* bytes; more than that the kernel does not send */
#define BATCH 32			/* requests taken in one turn */

static struct fuse_port *
fuse_of(struct hast_port *port)
{
	return (struct fuse_port *)port;
}

static uint32_t
smaller(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

/* ---- answers ---- */

static void
answer(struct hast_ggate *g, struct fuse_port *p, struct iovec *iov, int n)
{
	struct hast_arena *arena = hast_ggate_arena(g);
	ssize_t done;

	hast_trace(arena, HAST_STAGE_GGATE, HAST_TRACE_SENDING, 0);
	do
		done = writev(p->port.fd, iov, n);
	while (done == -1 && errno == EINTR);
	/* ENOENT: whoever asked does not wait any more. Everything else leaves somebody without an answer: the device
	   is given up, so that he gets an error. */
	if (done == -1 && errno != ENOENT)
		hast_port_kill(g, &p->port, errno);
	hast_trace(arena, HAST_STAGE_GGATE, HAST_TRACE_SENT, 0);
}

static void
reply(struct hast_ggate *g, struct fuse_port *p, uint64_t unique, int error, const void *data, size_t size)
{
	struct fuse_out_header out = { .unique = unique };
	struct iovec iov[2] = { { &out, sizeof(out) }, { (void *)(uintptr_t)data, size } };

	if (error != 0)
		size = 0;
	/* The kernel knows errors up to 511. */
	out.error = error < 0 || error > 511 ? -EIO : -error;
	out.len = (uint32_t)(sizeof(out) + size);
	answer(g, p, iov, size > 0 ? 2 : 1);
}

void
fuse_reply(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call, int error, const void *data,
    size_t size)
{
	reply(g, p, call->in->unique, error, data, size);
}

static void
reply_read(struct hast_ggate *g, struct fuse_port *p, struct hast_req *req)
{
	struct fuse_out_header out = { .unique = req->cookie, .len = (uint32_t)(sizeof(out) + req->length) };
	struct iovec iov[1 + MAX_SLABS] = { { &out, sizeof(out) } };
	struct hast_arena *arena = hast_ggate_arena(g);
	uint32_t slot = req->first;
	int n = 1;

	while (slot != HAST_NONE && n <= (int)MAX_SLABS) {
		struct hast_bio *bio = hast_arena_bio(arena, slot);

		iov[n].iov_base = hast_part_data(g, slot);
		iov[n++].iov_len = bio->length;
		slot = bio->part_next;
	}
	answer(g, p, iov, n);
}

static void
fuse_finished(struct hast_ggate *g, struct hast_port *port, struct hast_req *req)
{
	struct fuse_port *p = fuse_of(port);
	struct fuse_write_out written = { .size = (uint32_t)req->length };

	if (req->error == 0 && req->cmd == HAST_CMD_READ)
		reply_read(g, p, req);
	else if (req->cmd == HAST_CMD_WRITE && (req->flags & HAST_REQ_ZERO) == 0)
		reply(g, p, req->cookie, req->error, &written, sizeof(written));
	else
		reply(g, p, req->cookie, req->error, NULL, 0);
	hast_req_end(g, req);
}

/* ---- reads, writes, and what else goes to the disks ---- */

static struct hast_req *
new_request(struct hast_ggate *g, struct fuse_port *p, uint8_t cmd, uint64_t offset, uint64_t length)
{
	uint64_t unique = ((const struct fuse_in_header *)p->head)->unique;
	int error = hast_req_check(g, cmd, offset, length);
	struct hast_req *req = error == 0 ? hast_req_new(g, &p->port) : NULL;

	if (req == NULL) {
		/* That the table has room was seen before the request was taken. */
		reply(g, p, unique, error != 0 ? error : EIO, NULL, 0);
		return NULL;
	}
	req->cmd = cmd;
	req->cookie = unique;
	req->offset = offset;
	req->length = length;
	return req;
}

/* Starts a READ or WRITE of at most max_write bytes on the slots in hand. */
static void
start_transfer(struct hast_ggate *g, struct fuse_port *p, struct hast_req *req)
{
	uint64_t left = req->length, slab = hast_ggate_arena(g)->geo.slab_size;
	uint32_t n = 0;

	while (left > 0 && n < p->nclaimed && !req->aborted) {
		uint64_t length = left < slab ? left : slab;

		left -= length;
		hast_part_adopt(g, req, p->claimed[n]);
		hast_part_submit(g, req, p->claimed[n++], length);
	}
	p->nclaimed -= n;
	memmove(p->claimed, p->claimed + n, p->nclaimed * sizeof(p->claimed[0]));
}

/* Starts what needs no slab. One slot in hand is given back for it, so it cannot wait for slots that wait here. */
static void
start_plain(struct hast_ggate *g, struct fuse_port *p, uint8_t cmd, uint8_t flags, uint64_t offset, uint64_t length)
{
	struct hast_req *req = new_request(g, p, cmd, offset, length);

	if (req == NULL)
		return;
	req->flags = flags;
	hast_port_unclaim(g, &p->port, p->claimed[--p->nclaimed]);
	hast_req_start(g, req);
}

static void
do_read(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call)
{
	const struct fuse_read_in *in = (const void *)call->args;
	uint64_t size = hast_ggate_arena(g)->geo.datasize, length = in->size;
	struct hast_req *req;

	if (in->offset >= size) {
		fuse_reply(g, p, call, 0, NULL, 0);
		return;
	}
	if (length > size - in->offset)
		length = size - in->offset;
	if (length > p->max_write) {
		fuse_reply(g, p, call, EINVAL, NULL, 0);
		return;
	}
	req = new_request(g, p, HAST_CMD_READ, in->offset, length);
	if (req != NULL)
		start_transfer(g, p, req);
}

static void
do_write(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call)
{
	const struct fuse_write_in *in = (const void *)call->args;
	struct hast_req *req;

	if (in->size != call->nargs - sizeof(*in) || in->size > p->max_write) {
		fuse_reply(g, p, call, EINVAL, NULL, 0);
		return;
	}
	req = new_request(g, p, HAST_CMD_WRITE, in->offset, in->size);
	if (req != NULL)
		start_transfer(g, p, req);
}

static void
do_fallocate(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call)
{
	const struct fuse_fallocate_in *in = (const void *)call->args;

	if (in->mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE))
		start_plain(g, p, HAST_CMD_DELETE, 0, in->offset, in->length);
	else if ((in->mode & ~(uint32_t)FALLOC_FL_KEEP_SIZE) == FALLOC_FL_ZERO_RANGE)
		start_plain(g, p, HAST_CMD_WRITE, HAST_REQ_ZERO | HAST_REQ_NOHOLE, in->offset, in->length);
	else
		fuse_reply(g, p, call, EOPNOTSUPP, NULL, 0);
}

static void
do_fsync(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call)
{
	(void)call;
	start_plain(g, p, HAST_CMD_FLUSH, 0, 0, 0);
}

/* ---- requests come in ---- */

static void
do_nothing(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call)
{
	if (call->in->opcode != FUSE_FORGET && call->in->opcode != FUSE_BATCH_FORGET)
		fuse_reply(g, p, call, 0, NULL, 0);
}

static const struct {
	void (*run)(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call);
	uint32_t nargs;			/* bytes at least; those that no kernel leaves out */
} calls[] = {
	[FUSE_FORGET] = { do_nothing, 0 },
	[FUSE_BATCH_FORGET] = { do_nothing, 0 },
	[FUSE_INIT] = { fuse_do_init, 16 },
	[FUSE_DESTROY] = { do_nothing, 0 },
	[FUSE_GETATTR] = { fuse_do_getattr, 0 },
	[FUSE_SETATTR] = { fuse_do_setattr, sizeof(struct fuse_setattr_in) },
	[FUSE_ACCESS] = { do_nothing, 0 },
	[FUSE_STATFS] = { fuse_do_statfs, 0 },
	[FUSE_OPEN] = { fuse_do_open, sizeof(struct fuse_open_in) },
	[FUSE_FLUSH] = { do_nothing, 0 },
	[FUSE_RELEASE] = { do_nothing, 0 },
	[FUSE_READ] = { do_read, sizeof(struct fuse_read_in) },
	[FUSE_WRITE] = { do_write, sizeof(struct fuse_write_in) },
	[FUSE_FSYNC] = { do_fsync, sizeof(struct fuse_fsync_in) },
	[FUSE_FALLOCATE] = { do_fallocate, sizeof(struct fuse_fallocate_in) },
};

/* A request of n bytes: the first HEAD of them in head, what comes after in the slabs in hand. */
static int
take(struct hast_ggate *g, struct fuse_port *p, size_t n)
{
	struct fuse_call call = { .in = (const void *)p->head };
	uint32_t in_head;

	if (n < sizeof(*call.in) || call.in->len != n)
		return -EPROTO;
	if (call.in->opcode >= sizeof(calls) / sizeof(calls[0]) || calls[call.in->opcode].run == NULL) {
		/* Also for INTERRUPT: the kernel does not ask again what is answered so. */
		fuse_reply(g, p, &call, ENOSYS, NULL, 0);
		return 0;
	}
	call.nargs = (uint32_t)(n - sizeof(*call.in));
	if (call.nargs < calls[call.in->opcode].nargs) {
		fuse_reply(g, p, &call, EINVAL, NULL, 0);
		return 0;
	}
	in_head = smaller(call.nargs, HEAD - sizeof(*call.in));
	memcpy(call.args, p->head + sizeof(*call.in), in_head);
	/* Of a write that is the payload, for which the slab is the right place. */
	if (call.in->opcode != FUSE_WRITE)
		memcpy(call.args + in_head, hast_part_data(g, p->claimed[0]), smaller(call.nargs, ARGS) - in_head);
	calls[call.in->opcode].run(g, p, &call);
	return 0;
}

/* 1 when all that the next request can need is in hand; else the port is starved and resume() comes. */
static int
prepared(struct hast_ggate *g, struct fuse_port *p)
{
	if (p->port.reqs >= GGATE_PORT_REQS) {
		port_starve(g, &p->port);
		return 0;
	}
	while (p->nclaimed < p->nslabs) {
		uint32_t slot = hast_port_claim(g, &p->port);

		if (slot == HAST_NONE)
			return 0;
		p->claimed[p->nclaimed++] = slot;
	}
	return 1;
}

static int
fuse_readable(struct hast_ggate *g, struct hast_port *port)
{
	struct fuse_port *p = fuse_of(port);
	struct iovec iov[1 + MAX_SLABS] = { { p->head, HEAD } };

	for (int i = 0; i < BATCH && !port->dead && !hast_ggate_frozen(g) && prepared(g, p); i++) {
		ssize_t n;
		int error;

		for (uint32_t k = 0; k < p->nslabs; k++) {
			iov[1 + k].iov_base = hast_part_data(g, p->claimed[k]);
			iov[1 + k].iov_len = hast_ggate_arena(g)->geo.slab_size;
		}
		n = readv(port->fd, iov, (int)(1 + p->nslabs));
		hast_trace(hast_ggate_arena(g), HAST_STAGE_GGATE, HAST_TRACE_GOT, 0);
		if (n == -1 && (errno == EINTR || errno == ENOENT))
			continue;	/* ENOENT: it was given up while it was being read */
		if (n == -1)
			return errno == EAGAIN ? 0 : -errno;
		error = take(g, p, (size_t)n);
		if (error != 0)
			return error;
	}
	return 0;
}

/* The descriptor itself says whether there is something to read, as soon as it is watched again. */
static int
fuse_resume(struct hast_ggate *g, struct hast_port *port)
{
	(void)prepared(g, fuse_of(port));
	return 0;
}

static int
fuse_nothing(struct hast_ggate *g, struct hast_port *port)
{
	(void)g;
	(void)port;
	return 0;
}

static void
fuse_closed(struct hast_ggate *g, struct hast_port *port)
{
	struct fuse_port *p = fuse_of(port);

	while (p->nclaimed > 0)
		hast_port_unclaim(g, port, p->claimed[--p->nclaimed]);
	/* That is how epoll reports a channel that was unmounted or aborted. */
	if (port->error == ECONNRESET)
		port->error = ENODEV;
}

static const struct hast_port_ops fuse_ops = {
	.readable = fuse_readable,
	.writable = fuse_nothing,
	.resume = fuse_resume,
	.finished = fuse_finished,
	.flush = fuse_nothing,
	.closed = fuse_closed,
};

/* ---- life ---- */

/* Has the kernel send again what it has no answer for. */
static int
ask_again(int fd)
{
	struct fuse_out_header out = { .len = sizeof(out), .error = NOTIFY_RESEND };

	if (write(fd, &out, sizeof(out)) != -1)
		return 0;
	return errno == EINVAL ? -EOPNOTSUPP : -errno;
}

/*
 * The kernel copies into memory that is there without asking; for memory that is not, it asks for pages, and gets none
 * when this process is being killed: the request it was copying would then fail, instead of being sent again.
 */
static int
populate(struct hast_arena *arena, struct fuse_port *p)
{
	p->head[0] = p->head[HEAD - 1] = 1;
	if (madvise((char *)arena + arena->slab_off, arena->size - arena->slab_off, MADV_POPULATE_WRITE) == 0)
		return 0;
	/* EINVAL: Linux before 5.14; there the pages come when they are used. */
	return errno == EINVAL ? 0 : -ENOMEM;
}

int
hast_fuse_add(struct hast_ggate *g, int fd, int resend)
{
	const struct hast_geometry *geo = &hast_ggate_arena(g)->geo;
	struct fuse_port *p = calloc(1, sizeof(*p));
	int flags = fcntl(fd, F_GETFL), error;

	if (p == NULL || flags == -1 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) == -1) {
		error = p == NULL ? -ENOMEM : -errno;
		goto failed;
	}
	p->port.ops = &fuse_ops;
	p->port.fd = fd;
	p->port.is_fuse = 1;
	p->nslabs = smaller(smaller((MAX_WRITE + geo->slab_size - 1) / geo->slab_size, MAX_SLABS), geo->nclient);
	p->max_write = smaller(p->nslabs * geo->slab_size, MAX_WRITE);
	p->ready = (uint8_t)(resend != 0);
	error = populate(hast_ggate_arena(g), p);
	if (error == 0 && resend != 0)
		error = ask_again(fd);
	if (error == 0)
		error = hast_port_add(g, &p->port);
	if (error == 0)
		return 0;
failed:
	free(p);
	(void)close(fd);
	return error;
}

int
hast_fuse_ready(struct hast_ggate *g)
{
	for (struct hast_port *port = g->ports; port != NULL; port = port->next)
		if (port->is_fuse && !port->dead && fuse_of(port)->ready)
			return 1;
	return 0;
}
