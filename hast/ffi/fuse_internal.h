/* What the FUSE port's files share: fuse.c (the channel, and what goes to the disks), fuse_file.c (the file as such). */
#ifndef HAST_FUSE_INTERNAL_H
#define HAST_FUSE_INTERNAL_H

#include <linux/fuse.h>

#include "ggate_internal.h"

#define MAX_SLABS 16u			/* for one request */
#define HEAD (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))
#define ARGS 256u			/* bytes; the arguments of all requests that are understood fit in */

struct fuse_port {
	struct hast_port port;
	uint32_t nslabs;		/* slots in hand before a request is taken */
	uint32_t nclaimed;		/* slots in hand now */
	uint32_t claimed[MAX_SLABS];
	uint32_t max_write;		/* bytes */
	uint8_t ready;
	_Alignas(8) uint8_t head[HEAD];
};

struct fuse_call {
	const struct fuse_in_header *in;
	uint32_t nargs;			/* bytes behind the header; args has the first ARGS of them */
	_Alignas(8) uint8_t args[ARGS];
};

/* Answers a request that holds no slots: error is 0 or a positive errno, with 0 there may be data. */
void fuse_reply(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call, int error, const void *data,
    size_t size);

/* ---- fuse_file.c ---- */

void fuse_do_init(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call);
void fuse_do_getattr(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call);
void fuse_do_setattr(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call);
void fuse_do_open(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call);
void fuse_do_statfs(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call);

#endif
