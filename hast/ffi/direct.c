#include "direct.h"

#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

#include "disk.h"

void
hast_direct_init(struct hast_direct *d, const struct hast_arena *a, int fd)
{
	d->fd = fd;
	d->memory = fd >= 0 && hast_disk_memory_backed(fd) == 1;
	d->refused[0] = d->refused[1] = 0;
	d->geo = a->geo;
}

static int
range_ok(const struct hast_geometry *geo, uint64_t offset, uint64_t length)
{
	return length > 0 && length <= geo->slab_size && length <= geo->datasize && offset <= geo->datasize - length;
}

static ssize_t
transfer(const struct hast_direct *d, int write, void *slab, size_t length, off_t at)
{
	struct iovec iov = { slab, length };

	if (d->memory)
		return write ? pwrite(d->fd, slab, length, at) : pread(d->fd, slab, length, at);
	return write ? pwritev2(d->fd, &iov, 1, at, RWF_NOWAIT) : preadv2(d->fd, &iov, 1, at, RWF_NOWAIT);
}

int
hast_direct_try(struct hast_direct *d, struct hast_bio *bio, void *slab)
{
	uint64_t offset = bio->offset, length = bio->length;
	int write = bio->cmd == HAST_CMD_WRITE;
	ssize_t n;

	if (d->fd < 0 || d->refused[write] || !hast_direct_may(bio) || !range_ok(&d->geo, offset, length))
		return 0;
	n = transfer(d, write, slab, length, (off_t)(d->geo.data_offset + offset));
	if (n == -1 && !d->memory && (errno == EOPNOTSUPP || errno == ENOSYS))
		d->refused[write] = 1;
	if (n < 0 || (uint64_t)n != length)
		return 0;
	bio->error[HAST_LOCAL] = 0;
	return 1;
}
