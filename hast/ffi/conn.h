/*
 * The connection to the peer, which is two: the pump of both, in both roles (docs/protocol.md sections 1, 2 and 4).
 *
 *   primary:    RING_SEND -> send ~ connection 1 ~ secondary ~ connection 2 ~ recv -> RING_RECV_DONE, all within the ggate stage
 *   secondary:  connection 1 ~ recv -> RING_DISK -> disk stage -> RING_DISK_DONE -> recv -> RING_SEND -> send ~ connection 2,
 *               or without the disk stage, where that takes no waiting (direct.h)
 *               send -> RING_SEND_DONE -> recv: the slot is free again
 *
 * Both ends are in one stage, on each node, because a hand-over to a stage that sleeps costs more than what it would do.
 *
 * Invariants:
 * - primary: requests go out in the order of RING_SEND; a reply is believed only when its seq names a slot that the
 *   secondary has (bio.pending), is that bio's seq, was sent (bio.sent), and was not answered before; a memsync write's
 *   first reply is RECV_DONE's slot | HAST_EVENT_RECEIVED, the final one its slot with error[HAST_REMOTE]; a read's data is
 *   in the slab before that;
 * - secondary, order: of two requests that overlap, one of them a mutation, the later one goes to disk when the earlier one
 *   has completed there; 4 barrier: nothing received after a flush goes to disk before that flush has completed, and the flush
 *   goes when everything received before it has completed;
 * - secondary, slots: recv owns the free list; a slot is taken for each request and comes back through RING_SEND_DONE once
 *   its last reply has been sent, or given up because the connection is lost; without slots nothing more is read from the
 *   connection;
 * - 11 the wire is untrusted: sizes, offsets and lengths are checked before they are used; a hash that does not match, a
 *   transformation that does not give exactly `length` bytes, an unknown seq, a malformed header end the connection;
 * - a seq is only echoed: the original's synchronisation writes all have the same one, nothing is keyed by it here on the secondary;
 * - what was received completely before the connection was lost still goes to disk; where the other way broke first, that
 *   is all that had been sent, up to a limit;
 * - nothing is allocated per bio, and no clock but the cheap one is read, once for each wait.
 *
 * Time is measured in ticks of an eighth: what is to happen after t of silence happens between t and 9/8 t of it, and a request
 * that the secondary does not answer is found between t and 10/8 t after it was sent.
 */
#ifndef HAST_CONN_H
#define HAST_CONN_H

#include <stdint.h>

/* cffi: begin */
#define HAST_CONN_MAX_SENT 131072	/* bytes: the largest read or write that every peer takes */

struct hast_conn_options {
	int in;				/* what the peer sends comes here; a stream socket, blocking or not */
	int out;			/* what is sent goes there */
	int own_bell;			/* eventfd */
	int control;			/* control socket */
	int seq_bell;			/* primary: eventfd of who takes RING_RECV_DONE, -1: the caller does */
	int disk_bell;			/* secondary */
	uint32_t secondary;		/* 1: the secondary's side */
	uint32_t version;		/* negotiated, of the main header */
	uint32_t compression;		/* of what is sent: enum hast_wire_compression */
	uint32_t checksum;		/* of what is sent: enum hast_wire_checksum */
	uint32_t keepalive_ms;		/* primary: silence after which a keepalive goes out (10000) */
	uint32_t timeout_ms;		/* nothing could be written for so long; on the primary: no byte came while the secondary had
					   requests, or it did not answer one of them */
	uint32_t silence_ms;		/* secondary: no byte came for so long (20000) */
	uint32_t foreign;		/* primary: the secondary is not one of ours: a flush that its disk does not know is none that failed */
	uint32_t sector;		/* secondary: bytes, a power of two */
	uint32_t max_io;		/* secondary: largest read or write taken, at most slab_size */
};

struct hast_link;

/* The context; NULL and errno on failure (EINVAL: options that cannot be; on the primary, slabs above HAST_CONN_MAX_SENT). The
   descriptors stay the caller's. */
struct hast_link *hast_link_new(void *arena, const struct hast_conn_options *options);
void hast_link_free(struct hast_link *l);
/* Secondary: the component, without O_DIRECT: what takes no waiting there is done here (direct.h). It stays the caller's. */
void hast_link_direct(struct hast_link *l, int fd);
/* As hast_ggate_awake(). */
void hast_link_awake(struct hast_link *l, int fd, int32_t limit);
/* Run until something has to be decided: enum hast_pump_result or -errno. HAST_PUMP_LOST comes once, see _error and _why; after
   that the pump may and should be called again: on the secondary what is with the disk completes and slots come back. Rings are
   announced at the recv stage's bell. */
int hast_link_pump(struct hast_link *l);
/* Nothing more is taken from the connection; the pump returns HAST_PUMP_QUIET as soon as everything handed to the disk has
   completed, and everything in RING_SEND is sent, or that connection lost. */
void hast_link_finish(struct hast_link *l);
/* Why the connection is lost: 0, or an errno (ETIMEDOUT, ECONNRESET, EPROTO, EBADMSG...), and a sentence for people. */
int hast_link_error(const struct hast_link *l);
const char *hast_link_why(const struct hast_link *l);
/* Secondary: slots in the free list, of nclient + nsync. */
uint32_t hast_link_free_slots(const struct hast_link *l);
/* cffi: end */

#endif
