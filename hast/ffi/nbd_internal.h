/* What the two halves of an NBD client share: nbd.c (requests in) and nbd_reply.c (replies out). */
#ifndef HAST_NBD_INTERNAL_H
#define HAST_NBD_INTERNAL_H

#include "device.h"

#define NBD_BUFFER 65536u		/* receive buffer of one client, bytes */
#define NBD_PIECES 64u			/* pieces of replies in the order of the wire, a power of two */
#define NBD_HEAD 28u			/* longest reply header: a chunk's, with its offset */

/* hast_req.device[1] */
#define NBD_REQ_QUEUED 1u		/* stands in the list of requests with something to say */
#define NBD_REQ_WHOLE 2u		/* a read that is answered in one, when all of it is there */
#define NBD_REQ_STARTED 4u		/* a read whose one header is on its way */
#define NBD_REQ_EARLY 8u		/* one that is answered in one and yet begun before: others hold the slots that it lacks */

/* A header, the data of one part of a read, or both, as they follow each other on the wire. */
struct nbd_piece {
	uint8_t head[NBD_HEAD];
	uint8_t head_length;
	uint8_t last;			/* the request ends with it */
	uint32_t slot;			/* HAST_NONE: no data */
	uint32_t length;		/* bytes of data */
	struct hast_req *req;
};

struct nbd_client {
	struct hast_port port;		/* first: the stage frees it as a whole */
	uint8_t structured;
	uint8_t readonly;
	uint8_t leaving;		/* no more requests will come: close when all are answered */
	uint8_t large;			/* the last request had a payload that goes past the buffer */
	uint8_t draining;		/* the payload under way is not wanted */
	uint8_t filling;		/* counted among those who hold a slot that is not full */
	/* The write whose payload is under way; NULL between messages. */
	struct hast_req *write;
	uint64_t left;			/* bytes of its payload that have not been taken from the stream */
	uint32_t slot;			/* claimed and not full, or HAST_NONE */
	uint32_t part;			/* bytes that the slot is to hold */
	uint32_t got;			/* bytes that it holds */
	/* Requests with something to say, in the order in which they had it; linked through req.next. */
	struct hast_req *queue_head;
	struct hast_req *queue_tail;
	uint32_t piece_first;
	uint32_t pieces;		/* in the ring */
	uint64_t sent;			/* bytes of the first piece */
	struct nbd_piece piece[NBD_PIECES];
	uint32_t begin;			/* the bytes buffer[begin..end) have not been taken */
	uint32_t end;
	uint8_t buffer[NBD_BUFFER];
};

/* The request has something to say: an answer, an error, or data that is ready. */
void nbd_queue(struct hast_ggate *g, struct nbd_client *c, struct hast_req *req);
/* Longest read that is answered in one: all its parts can be there at the same time. Bytes. */
uint64_t nbd_whole_max(struct hast_ggate *g, const struct nbd_client *c);

/* Port operations of nbd_reply.c. */
void nbd_data(struct hast_ggate *g, struct hast_port *port, struct hast_req *req);
int nbd_writable(struct hast_ggate *g, struct hast_port *port);
int nbd_flush(struct hast_ggate *g, struct hast_port *port);

#endif
