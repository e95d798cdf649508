/* The file that is the resource, apart from its data: version and limits of the channel, attributes. */
#include <errno.h>
#include <sys/stat.h>

#include "fuse_internal.h"

#ifndef FOPEN_PARALLEL_DIRECT_WRITES
#define FOPEN_PARALLEL_DIRECT_WRITES (1 << 6)
#endif
#ifndef FOPEN_NOFLUSH
#define FOPEN_NOFLUSH (1 << 5)
#endif

#define LOWEST_MINOR 28			/* FUSE_MAX_PAGES */
#define MAX_BACKGROUND 128		/* asynchronous requests under way: the depth of a loop device */
#define BLOCK 4096u			/* bytes; the loop device takes it as the granularity of discards */
#define FOREVER 86400u			/* seconds that attributes are valid: they never change */

void
fuse_do_init(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call)
{
	const struct fuse_init_in *in = (const void *)call->args;
	struct fuse_init_out out = {
		.major = FUSE_KERNEL_VERSION,
		.minor = FUSE_KERNEL_MINOR_VERSION,
		.max_readahead = in->max_readahead,
		/* No mmap of the file (FUSE_DIRECT_IO_ALLOW_MMAP): it would make the kernel send writes one by one. */
		.flags = in->flags & (FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_BIG_WRITES | FUSE_MAX_PAGES),
		.max_background = MAX_BACKGROUND,
		.congestion_threshold = MAX_BACKGROUND,
		.max_write = p->max_write,
		.time_gran = 1,
		.max_pages = (uint16_t)(p->max_write / BLOCK),
	};

	if (in->major < FUSE_KERNEL_VERSION || (in->major == FUSE_KERNEL_VERSION && in->minor < LOWEST_MINOR)) {
		fuse_reply(g, p, call, EPROTO, NULL, 0);
		return;
	}
	fuse_reply(g, p, call, 0, &out, sizeof(out));
	/* A newer kernel asks again, in our version's words. */
	if (in->major == FUSE_KERNEL_VERSION)
		p->ready = 1;
}

void
fuse_do_getattr(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call)
{
	uint64_t size = hast_ggate_arena(g)->geo.datasize;
	struct fuse_attr_out out = {
		.attr_valid = FOREVER,
		.attr = {
			.ino = FUSE_ROOT_ID,
			.size = size,
			.blocks = size / HAST_SECTOR,
			.mode = S_IFREG | 0600,
			.nlink = 1,
			.blksize = BLOCK,
		},
	};

	fuse_reply(g, p, call, 0, &out, sizeof(out));
}

void
fuse_do_setattr(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call)
{
	const struct fuse_setattr_in *in = (const void *)call->args;

	if ((in->valid & (FATTR_MODE | FATTR_UID | FATTR_GID)) != 0 ||
	    ((in->valid & FATTR_SIZE) != 0 && in->size != hast_ggate_arena(g)->geo.datasize))
		fuse_reply(g, p, call, EPERM, NULL, 0);
	else
		fuse_do_getattr(g, p, call);
}

void
fuse_do_open(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call)
{
	struct fuse_open_out out = {
		.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES | FOPEN_NOFLUSH
	};

	fuse_reply(g, p, call, 0, &out, sizeof(out));
}

void
fuse_do_statfs(struct hast_ggate *g, struct fuse_port *p, const struct fuse_call *call)
{
	struct fuse_statfs_out out = {
		.st = {
			.blocks = hast_ggate_arena(g)->geo.datasize / BLOCK,
			.files = 1,
			.bsize = BLOCK,
			.frsize = BLOCK,
			.namelen = 255,
		},
	};

	fuse_reply(g, p, call, 0, &out, sizeof(out));
}
