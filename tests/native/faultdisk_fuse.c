/* The fault disk as FUSE sees it: one file is mounted. What concerns data becomes a job, all else is answered here. */
#include "faultdisk.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define BUFFER (MAX_WRITE + 4096u)

#ifndef FOPEN_PARALLEL_DIRECT_WRITES
#define FOPEN_PARALLEL_DIRECT_WRITES (1 << 6)
#endif
#ifndef FOPEN_NOFLUSH
#define FOPEN_NOFLUSH (1 << 5)
#endif

void
mount_it(struct disk *d)
{
	char options[128];

	d->fuse = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (d->fuse == -1)
		die("/dev/fuse");
	(void)snprintf(options, sizeof(options), "fd=%d,rootmode=100600,user_id=0,group_id=0,allow_other,max_read=%u",
	    d->fuse, MAX_WRITE);
	if (mount("faultdisk", d->mountpoint, "fuse.faultdisk", MS_NOSUID | MS_NODEV | MS_NOATIME, options) == -1)
		die(d->mountpoint);
}

void
reply(const struct disk *d, uint64_t unique, int error, const void *data, size_t size)
{
	struct fuse_out_header out = { .unique = unique, .error = -error };
	struct iovec iov[2] = { { &out, sizeof(out) }, { (void *)(uintptr_t)data, size } };

	if (error != 0)
		size = 0;
	out.len = (uint32_t)(sizeof(out) + size);
	/* ENOENT: whoever asked is gone. ENODEV: unmounted. */
	if (writev(d->fuse, iov, size > 0 ? 2 : 1) == -1 && errno != ENOENT && errno != ENODEV)
		fprintf(stderr, "faultdisk: answer: %s\n", strerror(errno));
}

static void
do_init(const struct disk *d, const struct fuse_in_header *in, const struct fuse_init_in *args)
{
	struct fuse_init_out out = {
		.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION, .max_readahead = args->max_readahead,
		.flags = args->flags & (FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_BIG_WRITES | FUSE_MAX_PAGES),
		.max_background = 256, .congestion_threshold = 256, .max_write = MAX_WRITE, .time_gran = 1,
		.max_pages = MAX_WRITE / 4096,
	};

	reply(d, in->unique, 0, &out, sizeof(out));
}

static void
do_getattr(const struct disk *d, const struct fuse_in_header *in)
{
	struct fuse_attr_out out = {
		.attr_valid = 3600,
		.attr = { .ino = FUSE_ROOT_ID, .size = d->size, .blocks = d->size / SECTOR, .mode = S_IFREG | 0600,
			.nlink = 1, .blksize = 4096 },
	};

	reply(d, in->unique, 0, &out, sizeof(out));
}

static void
do_statfs(const struct disk *d, const struct fuse_in_header *in)
{
	struct fuse_statfs_out out = {
		.st = { .blocks = d->size / 4096, .files = 1, .bsize = 4096, .frsize = 4096, .namelen = 255 },
	};

	reply(d, in->unique, 0, &out, sizeof(out));
}

static void
do_open(struct disk *d, const struct fuse_in_header *in, const struct fuse_open_in *args)
{
	struct fuse_open_out out = { .open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES | FOPEN_NOFLUSH };
	int readonly;

	pthread_mutex_lock(&d->lock);
	readonly = d->readonly;
	pthread_mutex_unlock(&d->lock);
	if (readonly && (args->flags & O_ACCMODE) != O_RDONLY)
		reply(d, in->unique, EROFS, NULL, 0);
	else
		reply(d, in->unique, 0, &out, sizeof(out));
}

static void
take(struct disk *d, const char *buffer)
{
	const struct fuse_in_header *in = (const void *)buffer;
	const void *args = buffer + sizeof(*in);
	const struct fuse_write_in *wr = args;
	const struct fuse_read_in *rd = args;
	const struct fuse_fallocate_in *fa = args;
	const struct fuse_setattr_in *sa = args;

	switch (in->opcode) {
	case FUSE_INIT:
		do_init(d, in, args);
		break;
	case FUSE_GETATTR:
		do_getattr(d, in);
		break;
	case FUSE_SETATTR:
		if ((sa->valid & FATTR_SIZE) != 0 && sa->size != d->size)
			reply(d, in->unique, EPERM, NULL, 0);
		else
			do_getattr(d, in);
		break;
	case FUSE_STATFS:
		do_statfs(d, in);
		break;
	case FUSE_OPEN:
		do_open(d, in, args);
		break;
	case FUSE_READ:
		add_job(d, in, READ, rd->offset, rd->size < MAX_WRITE ? rd->size : MAX_WRITE, 0, NULL);
		break;
	case FUSE_WRITE:
		if (wr->size != in->len - sizeof(*in) - sizeof(*wr) || wr->offset + wr->size > d->size)
			reply(d, in->unique, ENOSPC, NULL, 0);
		else
			add_job(d, in, WRITE, wr->offset, wr->size, 0, (const char *)(wr + 1));
		break;
	case FUSE_FSYNC:
		add_job(d, in, FLUSH, 0, 0, 0, NULL);
		break;
	case FUSE_FALLOCATE:
		if ((fa->mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)) == 0)
			reply(d, in->unique, EOPNOTSUPP, NULL, 0);
		else
			add_job(d, in, DELETE, fa->offset, fa->length, fa->mode, NULL);
		break;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
		break;
	case FUSE_ACCESS:
	case FUSE_FLUSH:
	case FUSE_RELEASE:
	case FUSE_DESTROY:
		reply(d, in->unique, 0, NULL, 0);
		break;
	default:
		/* Also for INTERRUPT: the kernel does not ask again what is answered so. */
		reply(d, in->unique, ENOSYS, NULL, 0);
	}
}

void *
serve(void *argument)
{
	struct disk *d = argument;
	char *buffer = aligned_alloc(4096, BUFFER + 4096 - BUFFER % 4096);

	if (buffer == NULL)
		die("memory");
	for (;;) {
		ssize_t n = read(d->fuse, buffer, BUFFER);

		if (n == -1 && (errno == EINTR || errno == ENOENT || errno == EAGAIN))
			continue;
		if (n < (ssize_t)sizeof(struct fuse_in_header))
			_exit(0);	/* unmounted or aborted */
		take(d, buffer);
	}
	return NULL;
}
