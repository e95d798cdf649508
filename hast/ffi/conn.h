/*
 * The connection to the peer: the pumps of the send and recv stages, in both roles (docs/protocol.md sections 1, 2 and 4).
 *
 *   primary:    RING_SEND -> [send] ~ connection 1 ~ secondary ~ connection 2 ~ [recv] -> RING_RECV_DONE
 *   secondary:  connection 1 ~ [recv] -> RING_DISK -> disk -> RING_DISK_DONE -> [recv] -> RING_SEND -> [send] ~ connection 2
 *               [send] -> RING_SEND_DONE -> [recv]: the slot is free again
 *
 * Invariants:
 * - primary: requests go out in the order of RING_SEND; a reply is believed only when its seq names a slot that the
 *   secondary has (bio.pending) and is that bio's seq; a memsync write's first reply is RECV_DONE's slot |
 *   HAST_EVENT_RECEIVED, the final one its slot with error[HAST_REMOTE]; a read's data is in the slab before that;
 * - secondary, order: of two overlapping mutations, and of a mutation and an overlapping later read, the later one goes
 *   to disk when the earlier one has completed there; 4 barrier: nothing received after a flush goes to disk before that
 *   flush has completed, and the flush goes when everything received before it has completed;
 * - secondary, slots: recv owns the free list; a slot is taken for each request and comes back through RING_SEND_DONE once
 *   its last reply has been sent; without slots nothing more is read from the connection;
 * - 11 the wire is untrusted: sizes, offsets and lengths are checked before they are used; a hash that does not match, a
 *   transformation that does not give exactly `length` bytes, an unknown seq, a malformed header end the connection;
 * - a seq is only echoed: the original's synchronisation writes all have the same one, nothing is keyed by it here on the secondary.
 */
#ifndef HAST_CONN_H
#define HAST_CONN_H

#include <stdint.h>

/* cffi: begin */
struct hast_conn_options {
	int fd;				/* the connection, non-blocking; the stage's own */
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
	uint32_t timeout_ms;		/* primary: no progress for so long while something is outstanding; secondary recv: silence (20000) */
	uint32_t sector;		/* recv on the secondary: bytes */
	uint32_t max_io;		/* recv on the secondary: largest read or write taken, at most slab_size */
};

struct hast_send;
struct hast_recv;

/* Contexts; NULL and errno on failure. */
struct hast_send *hast_send_new(void *arena, const struct hast_conn_options *options);
struct hast_recv *hast_recv_new(void *arena, const struct hast_conn_options *options);
void hast_send_free(struct hast_send *s);
void hast_recv_free(struct hast_recv *r);
/* Run until something has to be decided: enum hast_pump_result (HAST_PUMP_LOST: see _error and _why) or -errno. */
int hast_send_pump(struct hast_send *s);
int hast_recv_pump(struct hast_recv *r);
/* Why the connection is lost: an errno (ETIMEDOUT, ECONNRESET, EPROTO, EBADMSG...), and a sentence for people. */
int hast_send_error(const struct hast_send *s);
int hast_recv_error(const struct hast_recv *r);
const char *hast_send_why(const struct hast_send *s);
const char *hast_recv_why(const struct hast_recv *r);
/* Secondary: 1 once the first request (not a keepalive) was received; the pump returned HAST_PUMP_EVENT for it, before
   that request has gone anywhere. */
int hast_recv_first(const struct hast_recv *r);
/* cffi: end */

#endif
