/*
 * What is received: bytes of a connection into messages, for both roles; recv_primary.c and recv_secondary.c know what they mean.
 *
 * One buffer takes many small messages with one call. Large data goes past it, straight into the slab where it belongs (or into
 * the scratch buffer when it is compressed), and what comes behind it begins in the buffer again.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "conn_internal.h"
#include "pump.h"
#include "trace.h"

#define SMALL 16384u			/* data up to this is gathered in the buffer */
#define LOOK_AHEAD 4096u		/* what is received behind large data: the next header, and little that has to be copied */
/* So that a message with the largest header and SMALL data always fits behind the middle. */
#define BUFFER (2 * (HAST_WIRE_MAIN_SIZE + HAST_WIRE_REQUEST_LIMIT + SMALL))

static uint32_t
buffered(const struct hast_recv *r)
{
	return r->end - r->begin;
}

int
recv_gathers(uint32_t size, uint32_t behind)
{
	return size > behind && size <= SMALL;
}

/* ---- bytes in ---- */

static void
came(struct hast_recv *r, uint32_t n)
{
	uint32_t past = n < r->want ? n : r->want;

	/* Between messages there is no raw, and nothing may be added to that, not even 0. */
	if (past > 0)
		r->raw += past;
	r->want -= past;
	r->end += n - past;
	r->silence.running = 0;
	conn_count(&r->c.line->bytes, n);
}

/* One call's worth of bytes. */
static void
receive(struct hast_recv *r)
{
	struct iovec iov[2];
	struct msghdr msg = { .msg_iov = iov };
	uint32_t room;
	ssize_t n;

	if (r->begin == r->end) {
		r->begin = r->end = 0;
	} else if (r->begin > BUFFER / 2) {
		memmove(r->buffer, r->buffer + r->begin, buffered(r));
		r->end -= r->begin;
		r->begin = 0;
	}
	room = BUFFER - r->end;
	/* Full of messages that waited for slots: they come first. No bytes asked for would look like the end. */
	if (room == 0 && r->want == 0)
		return;
	if ((r->want > 0 || r->large) && room > LOOK_AHEAD)
		room = LOOK_AHEAD;
	if (r->want > 0)
		iov[msg.msg_iovlen++] = (struct iovec){ r->raw, r->want };
	iov[msg.msg_iovlen++] = (struct iovec){ r->buffer + r->end, room };
	n = recvmsg(r->c.fd, &msg, MSG_DONTWAIT);
	hast_trace(r->c.arena, HAST_STAGE_RECV, HAST_TRACE_GOT, 0);
	/* Less than there was room for: the socket is empty, and poll() says when it is not. */
	r->readable = n > 0 && (uint32_t)n == r->want + room;
	if (n > 0) {
		came(r, (uint32_t)n);
	} else if (n == 0) {
		r->ended = 1;
		(void)conn_lost(&r->c, ECONNRESET, "%s closed the connection%s", conn_peer(&r->c),
		    r->want > 0 || (buffered(r) > 0 && !r->starved) ? " in the middle of a message" : "");
	} else if (errno != EAGAIN && errno != EINTR) {
		r->ended = 1;
		(void)conn_lost(&r->c, errno, "the connection to %s broke: %s", conn_peer(&r->c), strerror(errno));
	}
}

/* ---- messages ---- */

/* Data follows the message that was just taken from the buffer. */
static enum recv_message
begin_data(struct hast_recv *r)
{
	uint32_t here = buffered(r), size = r->info.size;
	uint8_t *at = r->buffer + r->begin;

	r->large = size > SMALL;
	if (here >= size) {
		r->begin += size;
		r->raw = NULL;
		return r->role->payload(r, at);
	}
	memcpy(r->raw, at, here);
	r->begin = r->end = 0;
	r->raw += here;
	r->want = size - here;
	return RECV_TAKEN;
}

static enum recv_message
take_header(struct hast_recv *r)
{
	const uint8_t *at = r->buffer + r->begin;
	enum recv_message taken;
	uint8_t version;
	uint32_t size;
	int error;

	if (buffered(r) < HAST_WIRE_MAIN_SIZE)
		return RECV_LATER;
	error = hast_wire_parse_main(at, buffered(r), CONN_VERSION, HAST_WIRE_REQUEST_LIMIT, &version, &size);
	if (error != 0) {
		(void)conn_lost(&r->c, EPROTO, "%s sent what is no message: %s", conn_peer(&r->c),
		    hast_wire_error_text(error));
		return RECV_END;
	}
	if (buffered(r) - HAST_WIRE_MAIN_SIZE < size)
		return RECV_LATER;
	taken = r->role->message(r, at + HAST_WIRE_MAIN_SIZE, size, buffered(r) - HAST_WIRE_MAIN_SIZE - size);
	if (taken != RECV_TAKEN && taken != RECV_DATA)
		return taken;
	r->begin += HAST_WIRE_MAIN_SIZE + size;
	conn_count(&r->c.line->ops, 1);
	r->large = 0;
	return taken == RECV_DATA ? begin_data(r) : RECV_TAKEN;
}

static enum recv_message
take(struct hast_recv *r)
{
	uint8_t *wire = r->raw;

	if (wire == NULL)
		return take_header(r);
	if (r->want > 0)
		return RECV_LATER;
	r->raw = NULL;
	return r->role->payload(r, wire - r->info.size);
}

static void
take_all(struct hast_recv *r)
{
	enum recv_message taken;

	if (r->deaf)
		return;
	do
		taken = take(r);
	while (taken == RECV_TAKEN);
	if (taken == RECV_END)
		r->deaf = r->ended = 1;
	if (!r->ended && !r->finishing)
		return;
	/* The rest of it will never come, or nobody waits for it. */
	r->ended = 1;
	if (r->raw != NULL && r->want > 0) {
		r->role->give_up(r);
		r->raw = NULL;
		r->want = 0;
		r->deaf = 1;
	}
}

/* ---- for link.c ---- */

static int
reading(const struct hast_recv *r)
{
	return !r->ended && !r->starved;
}

int
recv_step(struct hast_recv *r)
{
	int error;

	r->role->rings(r);
	if (r->readable && reading(r))
		receive(r);
	take_all(r);
	error = r->role->bells(r);
	if (r->broken)
		return HAST_PUMP_BROKEN;
	if (error != 0 || !r->event)
		return error;
	r->event = 0;
	return HAST_PUMP_EVENT;
}

int
recv_ready(struct hast_recv *r)
{
	return (r->readable && reading(r)) || r->role->ready(r);
}

short
recv_wants(const struct hast_recv *r)
{
	return reading(r) ? POLLIN : -1;
}

void
recv_event(struct hast_recv *r, short revents)
{
	if (revents != 0)
		r->readable = 1;
}

void
recv_tick(struct hast_recv *r)
{
	uint32_t limit = r->c.opt.secondary ? r->c.opt.silence_ms : r->c.opt.timeout_ms;

	if (r->c.error != 0 || r->ended)
		return;
	if (r->readable || !r->role->expecting(r))
		r->silence.running = 0;
	else if (conn_timer_due(&r->silence, limit))
		(void)conn_lost(&r->c, ETIMEDOUT, "%s has %s for %g s", conn_peer(&r->c),
		    r->c.opt.secondary ? "sent nothing" : "answered nothing", limit / 1000.0);
	if (r->c.error == 0 && r->role->late != NULL && r->role->late(r))
		(void)conn_lost(&r->c, ETIMEDOUT, "%s has had a request for %g s without answering it", conn_peer(&r->c),
		    limit / 1000.0);
	if (r->c.error != 0)
		r->ended = 1;
}

int64_t
recv_calm(const struct hast_recv *r)
{
	int64_t left;

	if (r->c.error != 0 || r->ended || r->readable || r->starved)
		return 0;
	/* A primary waits for nothing then; a secondary for the next sign of life. */
	if (!r->c.opt.secondary)
		return r->role->expecting(r) ? 0 : INT32_MAX;
	left = conn_timer_left(&r->silence, r->c.opt.silence_ms);
	return left > 0 ? left : 0;
}

/* ---- life ---- */

static int
set_up(struct hast_recv *r)
{
	uint32_t largest = r->c.opt.secondary ? r->c.opt.max_io : r->c.arena->geo.slab_size;

	r->transform = hast_transform_new(HAST_WIRE_COMPRESSION_NONE, HAST_WIRE_CHECKSUM_NONE, 1);
	if (r->transform == NULL)
		return -errno;
	r->buffer = malloc(BUFFER);
	r->scratch = malloc((size_t)largest + 4);
	if (r->buffer == NULL || r->scratch == NULL)
		return -ENOMEM;
	r->role = r->c.opt.secondary ? &recv_secondary_role : &recv_primary_role;
	return r->c.opt.secondary ? recv_secondary_new(r) : recv_primary_new(r);
}

struct hast_recv *
recv_new(void *arena, const struct hast_conn_options *options)
{
	struct hast_recv *r = calloc(1, sizeof(*r));
	int error;

	if (r == NULL)
		return NULL;
	error = conn_init(&r->c, arena, options, HAST_STAGE_RECV, options->in);
	if (error == 0)
		error = set_up(r);
	if (error != 0) {
		recv_free(r);
		errno = -error;
		return NULL;
	}
	return r;
}

void
recv_free(struct hast_recv *r)
{
	if (r == NULL)
		return;
	if (r->role != NULL)
		r->role->free(r);
	hast_transform_free(r->transform);
	free(r->buffer);
	free(r->scratch);
	free(r);
}
