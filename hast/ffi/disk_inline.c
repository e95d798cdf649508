/*
 * INLINE: the pump makes the calls itself, one after the other. Right where the component is memory and never blocks, since
 * nothing is faster than not handing the work to anybody.
 *
 * Invariant: completions are held back for at most DISK_BATCH calls or DISK_BATCH_BYTES bytes.
 */
#include <errno.h>
#include <poll.h>

#include "disk_io.h"
#include "doorbell.h"

#define LOOK_AROUND 64u		/* turns without a wait after which the control socket is looked at */

int
disk_poll(struct hast_disk *d, int block)
{
	struct pollfd fd[2] = { { d->opt.own_bell, POLLIN, 0 }, { d->opt.control, POLLIN, 0 } };

	if (!block && ++d->turns % LOOK_AROUND != 0)
		return 0;
	if (poll(fd, 2, block ? -1 : 0) == -1)
		return -errno;
	if (fd[1].revents != 0)
		d->control = 1;
	if (fd[0].revents == 0)
		return 0;
	hast_doorbell_cancel(d->bell);
	return (fd[0].revents & POLLIN) != 0 ? hast_doorbell_drain(d->opt.own_bell) : -EBADF;
}

static int
inline_open(struct hast_disk *d)
{
	d->limit = DISK_BATCH;
	return 0;
}

static void
inline_close(struct hast_disk *d)
{
	(void)d;
}

static void
inline_start(struct hast_disk *d, struct disk_op *op)
{
	disk_list_add(&d->ready, op);
}

static void
inline_reap(struct hast_disk *d)
{
	uint64_t bytes = 0;

	for (uint32_t n = 0; n < DISK_BATCH && bytes < DISK_BATCH_BYTES; n++) {
		struct disk_op *op = disk_list_take(&d->ready);

		if (op == NULL)
			return;
		if (op->call == DISK_READ || op->call == DISK_WRITE || op->call == DISK_ZERO)
			bytes += op->piece;
		if (op != d->sync_op)
			hast_trace(d->arena, HAST_STAGE_DISK, HAST_TRACE_START, d->bio[op->slot].seq);
		disk_result(d, op, disk_perform(d, op));
	}
}

const struct disk_engine disk_inline = {
	.open = inline_open,
	.close = inline_close,
	.start = inline_start,
	.wait = disk_poll,
	.reap = inline_reap,
};
