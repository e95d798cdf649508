/*
 * The connection to the peer: the pumps of the send and recv stages, in both roles (docs/protocol.md sections 1, 2 and 4).
 *
 *   primary:    RING_SEND -> [send] ~ connection 1 ~ secondary ~ connection 2 ~ [recv] -> RING_RECV_DONE
 *   secondary:  connection 1 ~ [recv] -> RING_DISK -> disk -> RING_DISK_DONE -> [recv] -> RING_SEND -> [send] ~ connection 2
 *               or without the disk stage, where that takes no waiting (direct.h)
 *               [send] -> RING_SEND_DONE -> [recv]: the slot is free again
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
 * - what was received completely before the connection was lost still goes to disk;
 * - nothing is allocated per bio, and no clock is read while bytes move.
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
	int fd;				/* the connection, the stage's own; a stream socket, blocking or not */
	int own_bell;			/* eventfd */
	int control;			/* control socket */
	int seq_bell;			/* recv on the primary: eventfd of ggate */
	int disk_bell;			/* recv on the secondary */
	int send_bell;			/* recv on the secondary */
	int recv_bell;			/* send on the secondary: replies are out, slots are free */
	uint32_t secondary;		/* 1: the secondary's side */
	uint32_t version;		/* negotiated, of the main header */
	uint32_t compression;		/* send: enum hast_wire_compression */
	uint32_t checksum;		/* send: enum hast_wire_checksum */
	uint32_t keepalive_ms;		/* send on the primary: silence after which a keepalive goes out (10000) */
	uint32_t timeout_ms;		/* send: nothing could be written for so long; recv on the primary: no byte came while the
					   secondary had requests, or it did not answer one of them; recv on the secondary: no byte came (20000) */
	uint32_t sector;		/* recv on the secondary: bytes, a power of two */
	uint32_t max_io;		/* recv on the secondary: largest read or write taken, at most slab_size */
};

struct hast_send;
struct hast_recv;

/* Contexts; NULL and errno on failure (EINVAL: options that cannot be; on the primary, slabs above HAST_CONN_MAX_SENT). */
struct hast_send *hast_send_new(void *arena, const struct hast_conn_options *options);
struct hast_recv *hast_recv_new(void *arena, const struct hast_conn_options *options);
void hast_send_free(struct hast_send *s);
void hast_recv_free(struct hast_recv *r);
/* Secondary: the component, without O_DIRECT: what takes no waiting there recv does itself (direct.h). It stays the caller's. */
void hast_recv_direct(struct hast_recv *r, int fd);
/* Run until something has to be decided: enum hast_pump_result or -errno. HAST_PUMP_LOST comes once, see _error and _why; after
   that the pump may and should be called again: it leaves the socket alone, but on the secondary what is with the disk
   completes and slots come back. */
int hast_send_pump(struct hast_send *s);
int hast_recv_pump(struct hast_recv *r);
/* Nothing more is taken from the connection; the pump returns HAST_PUMP_QUIET as soon as everything handed to the disk has
   completed (recv on the secondary), or everything in RING_SEND is sent or the connection lost (send). */
void hast_send_finish(struct hast_send *s);
void hast_recv_finish(struct hast_recv *r);
/* Why the connection is lost: 0, or an errno (ETIMEDOUT, ECONNRESET, EPROTO, EBADMSG...), and a sentence for people. */
int hast_send_error(const struct hast_send *s);
int hast_recv_error(const struct hast_recv *r);
const char *hast_send_why(const struct hast_send *s);
const char *hast_recv_why(const struct hast_recv *r);
/* Secondary: 1 once the first request (not a keepalive) was received; the pump returned HAST_PUMP_EVENT for it, before
   that request has gone anywhere: it goes when the pump is called again. */
int hast_recv_first(const struct hast_recv *r);
/* Secondary: slots in the free list, of nclient + nsync. */
uint32_t hast_recv_free_slots(const struct hast_recv *r);
/* cffi: end */

#endif
