/*
 * What is sent: requests of the primary on the first connection, replies of the secondary on the second.
 *
 * What is in RING_SEND is laid out as one batch, as many messages as one sendmsg() may well take: headers side by side in a
 * buffer, data where it is (a slab, the zeros), or in the scratch buffer where it was compressed. A batch is sent to its last
 * byte before the next one is laid out, so that its memory is used again and again, and a slot of it goes back only then.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "conn_internal.h"
#include "pump.h"
#include "trace.h"
#include "wire.h"

#define BATCH 64u			/* messages */
#define BATCH_BYTES (256u << 10)	/* then it is enough: the peer may begin while the next batch is compressed */

struct hast_send {
	struct conn c;
	struct hast_ring *ring;
	struct hast_ring *done_ring;
	struct hast_transform *transform;
	uint8_t *zeros;			/* what a write of zeros is without compression; slab_size bytes */
	uint8_t *head;			/* BATCH headers */
	uint8_t *scratch;
	uint32_t head_used;
	uint32_t scratch_used;
	struct iovec iov[2 * BATCH];
	uint32_t first, niov;		/* what is left of the batch */
	size_t left;			/* bytes */
	uint32_t done[BATCH];		/* secondary: slots whose last reply is in the batch */
	uint32_t ndone;
	uint8_t blocked;		/* the socket takes no more for now */
	struct conn_timer stuck;
	struct conn_timer quiet;
};

/* ---- laying out ---- */

static void
put(struct hast_send *s, const uint8_t *data, size_t length)
{
	struct iovec *last = &s->iov[s->niov];

	s->left += length;
	if (s->niov > 0 && (uint8_t *)last[-1].iov_base + last[-1].iov_len == data) {
		last[-1].iov_len += length;
		return;
	}
	last->iov_base = (uint8_t *)(uintptr_t)data;
	last->iov_len = length;
	s->niov++;
}

/* The message's data, transformed. */
static const uint8_t *
pack(struct hast_send *s, const uint8_t *data, uint32_t length, int zero, struct hast_wire_data *info)
{
	uint8_t *scratch = s->scratch + s->scratch_used;
	const uint8_t *wire = hast_transform_pack(s->transform, data, length, zero, scratch, info);

	if (wire == scratch)
		s->scratch_used += info->size;
	return wire;
}

/* The header in its place, size bytes of it or a negative error, then its data. 0 or -1. */
static int
put_message(struct hast_send *s, int size, const uint8_t *wire, uint32_t wire_size)
{
	if (size < 0)
		return -1;
	put(s, s->head + s->head_used, (size_t)size);
	s->head_used += (uint32_t)size;
	if (wire_size > 0)
		put(s, wire, wire_size);
	conn_count(&s->c.line->ops, 1);
	return 0;
}

static int
put_request(struct hast_send *s, const struct hast_wire_request *request, const uint8_t *wire)
{
	int size = hast_wire_encode_request(request, (uint8_t)s->c.opt.version, s->head + s->head_used,
	    HAST_WIRE_HEADER_MAX);

	return put_message(s, size, wire, request->data.size);
}

static int
has_payload(const struct hast_bio *bio)
{
	return bio->cmd == HAST_CMD_WRITE || bio->cmd == HAST_CMD_READ;
}

/* 0, or -1: nothing that a sequencer would want to be sent. */
static int
lay_request(struct hast_send *s, uint32_t slot)
{
	struct hast_bio *bio = slot < s->c.nslots ? hast_arena_bio(s->c.arena, slot) : NULL;
	struct hast_wire_request request;
	const uint8_t *wire = NULL;

	if (bio == NULL || bio->cmd < HAST_CMD_READ || bio->cmd > HAST_CMD_FLUSH || bio->seq == 0 ||
	    (has_payload(bio) && (bio->length == 0 || bio->length > s->c.arena->geo.slab_size)))
		return -1;
	hast_trace(s->c.arena, HAST_STAGE_SEND, HAST_TRACE_IN, bio->seq);
	memset(&request, 0, sizeof(request));
	request.cmd = bio->cmd;
	request.seq = bio->seq;
	if (bio->cmd != HAST_CMD_FLUSH) {
		request.offset = bio->offset;
		request.length = bio->length;
	}
	if (bio->cmd == HAST_CMD_WRITE) {
		int zero = (bio->flags & HAST_BIO_ZERO) != 0;
		const uint8_t *data = zero ? s->zeros : hast_arena_slab(s->c.arena, slot);

		request.memsync = (bio->flags & HAST_BIO_MEMSYNC) != 0 && s->c.opt.version >= CONN_MEMSYNC_VERSION;
		wire = pack(s, data, (uint32_t)bio->length, zero, &request.data);
	}
	/* From here on a reply may come. */
	__atomic_store_n(&bio->sent, bio->seq, __ATOMIC_RELEASE);
	return put_request(s, &request, wire);
}

static int
lay_reply(struct hast_send *s, uint32_t entry)
{
	uint32_t slot = entry & ~(uint32_t)HAST_EVENT_RECEIVED;
	const struct hast_bio *bio = slot < s->c.nslots ? hast_arena_bio(s->c.arena, slot) : NULL;
	struct hast_wire_reply reply;
	const uint8_t *wire = NULL;
	int size;

	if (bio == NULL)
		return -1;
	hast_trace(s->c.arena, HAST_STAGE_SEND, entry != slot ? HAST_TRACE_FIRST : HAST_TRACE_IN, bio->seq);
	memset(&reply, 0, sizeof(reply));
	reply.seq = bio->seq;
	if (entry != slot) {
		reply.received = 1;
	} else {
		reply.error = bio->error[HAST_LOCAL];
		if (bio->cmd == HAST_CMD_READ && reply.error == 0) {
			if (bio->length == 0 || bio->length > s->c.arena->geo.slab_size)
				return -1;
			wire = pack(s, hast_arena_slab(s->c.arena, slot), (uint32_t)bio->length, 0, &reply.data);
		}
		s->done[s->ndone++] = slot;
	}
	size = hast_wire_encode_reply(&reply, (uint8_t)s->c.opt.version, s->head + s->head_used, HAST_WIRE_HEADER_MAX);
	return put_message(s, size, wire, reply.data.size);
}

static void
new_batch(struct hast_send *s)
{
	s->first = s->niov = 0;
	s->head_used = s->scratch_used = 0;
}

/* Number of messages, or -1 when the ring holds nonsense. */
static int
lay_batch(struct hast_send *s)
{
	uint32_t entry, n = 0;

	new_batch(s);
	while (n < BATCH && s->left < BATCH_BYTES) {
		int got = hast_ring_pop(s->ring, &entry);

		if (got == 0)
			break;
		if (got < 0 || (s->c.opt.secondary ? lay_reply(s, entry) : lay_request(s, entry)) != 0)
			return -1;
		n++;
	}
	return (int)n;
}

static void
lay_keepalive(struct hast_send *s)
{
	struct hast_wire_request request;

	new_batch(s);
	memset(&request, 0, sizeof(request));
	request.cmd = HAST_WIRE_KEEPALIVE;
	(void)put_request(s, &request, NULL);
}

/* ---- sending ---- */

static void
advance(struct hast_send *s, size_t sent)
{
	s->left -= sent;
	while (sent > 0) {
		struct iovec *iov = &s->iov[s->first];

		if (sent < iov->iov_len) {
			iov->iov_base = (uint8_t *)iov->iov_base + sent;
			iov->iov_len -= sent;
			return;
		}
		sent -= iov->iov_len;
		s->first++;
	}
}

/* As much of the batch as the socket takes. */
static void
transmit(struct hast_send *s)
{
	struct msghdr msg = { .msg_iov = s->iov + s->first, .msg_iovlen = s->niov - s->first };
	ssize_t n;

	hast_trace(s->c.arena, HAST_STAGE_SEND, HAST_TRACE_SENDING, 0);
	do
		n = sendmsg(s->c.fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
	while (n == -1 && errno == EINTR);
	if (n == -1 && errno != EAGAIN) {
		(void)conn_lost(&s->c, errno, "cannot send to %s: %s", conn_peer(&s->c), strerror(errno));
		return;
	}
	hast_trace(s->c.arena, HAST_STAGE_SEND, HAST_TRACE_SENT, 0);
	if (n > 0) {
		advance(s, (size_t)n);
		conn_count(&s->c.line->bytes, (uint64_t)n);
		s->stuck.running = s->quiet.running = 0;
	}
	s->blocked = s->left > 0;
}

/* The slots of the batch are free. 0 or HAST_PUMP_BROKEN: the ring has room for all. */
static int
publish(struct hast_send *s)
{
	uint32_t n = s->ndone;

	if (n == 0)
		return 0;
	s->ndone = 0;
	return hast_ring_push_some(s->done_ring, s->done, n) == (int)n ? 0 : HAST_PUMP_BROKEN;
}

/* The secondary's replies that nobody will get: their slots go back all the same. */
static int
discard(struct hast_send *s)
{
	int result = publish(s);

	s->left = 0;
	s->blocked = 0;
	if (!s->c.opt.secondary)
		return result;
	while (result == 0) {
		uint32_t entry;
		int got = hast_ring_pop(s->ring, &entry);

		if (got == 0)
			return publish(s);
		if (got < 0 || (entry & ~(uint32_t)HAST_EVENT_RECEIVED) >= s->c.nslots)
			return HAST_PUMP_BROKEN;
		if ((entry & HAST_EVENT_RECEIVED) == 0)
			s->done[s->ndone++] = entry;
		if (s->ndone == BATCH)
			result = publish(s);
	}
	return result;
}

/* ---- for link.c ---- */

/* A batch that is sent as a whole is followed by the next one, but not for ever: others wait. */
int
send_step(struct hast_send *s)
{
	for (uint32_t n = 0; n < CONN_LOOK && !s->blocked && s->c.error == 0; n++) {
		int result;

		if (s->left == 0) {
			int laid = lay_batch(s);

			if (laid <= 0)
				return laid == 0 ? 0 : HAST_PUMP_BROKEN;
		}
		transmit(s);
		result = s->left == 0 ? publish(s) : 0;
		if (result != 0)
			return result;
	}
	return s->c.error != 0 ? discard(s) : 0;
}

int
send_idle(struct hast_send *s)
{
	return s->c.error != 0 || (s->left == 0 && hast_ring_ready(s->ring) == 0);
}

int
send_ready(struct hast_send *s)
{
	return !s->blocked && (s->c.error == 0 || s->c.opt.secondary) && hast_ring_ready(s->ring) != 0;
}

short
send_wants(const struct hast_send *s)
{
	if (s->c.error != 0)
		return -1;
	return s->blocked ? POLLOUT | POLLRDHUP : POLLRDHUP;
}

void
send_event(struct hast_send *s, short revents)
{
	if ((revents & ~POLLOUT) != 0)
		conn_hung_up(&s->c);
	else if (revents != 0)
		s->blocked = 0;
}

void
send_tick(struct hast_send *s)
{
	const struct hast_conn_options *opt = &s->c.opt;

	if (s->c.error != 0)
		return;
	if (s->blocked) {
		if (conn_timer_due(&s->stuck, opt->timeout_ms))
			(void)conn_lost(&s->c, ETIMEDOUT, "%s has taken no data for %g s", conn_peer(&s->c),
			    opt->timeout_ms / 1000.0);
	} else if (!opt->secondary && s->left == 0 && conn_timer_due(&s->quiet, opt->keepalive_ms)) {
		lay_keepalive(s);
		transmit(s);
	}
}

int64_t
send_calm(const struct hast_send *s)
{
	int64_t left;

	if (s->c.error != 0 || s->blocked)
		return 0;
	if (s->c.opt.secondary)
		return INT32_MAX;
	left = conn_timer_left(&s->quiet, s->c.opt.keepalive_ms);
	return left > 0 ? left : 0;
}

const struct conn *
send_conn(const struct hast_send *s)
{
	return &s->c;
}

/* ---- life ---- */

static int
set_up(struct hast_send *s)
{
	size_t slab = s->c.arena->geo.slab_size;

	s->ring = hast_arena_ring(s->c.arena, HAST_RING_SEND);
	s->done_ring = hast_arena_ring(s->c.arena, HAST_RING_SEND_DONE);
	s->transform = hast_transform_new(s->c.opt.compression, s->c.opt.checksum, 1);
	if (s->transform == NULL)
		return -errno;
	s->head = malloc((size_t)BATCH * HAST_WIRE_HEADER_MAX);
	s->scratch = malloc(BATCH_BYTES + slab);
	s->zeros = mmap(NULL, slab, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	return s->head == NULL || s->scratch == NULL || s->zeros == MAP_FAILED ? -ENOMEM : 0;
}

struct hast_send *
send_new(void *arena, const struct hast_conn_options *options)
{
	struct hast_send *s = calloc(1, sizeof(*s));
	int error;

	if (s == NULL)
		return NULL;
	error = conn_init(&s->c, arena, options, HAST_STAGE_SEND, options->out);
	if (error == 0)
		error = set_up(s);
	if (error != 0) {
		send_free(s);
		errno = -error;
		return NULL;
	}
	return s;
}

void
send_free(struct hast_send *s)
{
	if (s == NULL)
		return;
	if (s->zeros != NULL && s->zeros != MAP_FAILED)
		(void)munmap(s->zeros, s->c.arena->geo.slab_size);
	hast_transform_free(s->transform);
	free(s->head);
	free(s->scratch);
	free(s);
}
