/*
 * One bio on the component, as a run of system calls. Pure bookkeeping but for disk_perform(): the engine makes the calls.
 *
 * Invariants: those of disk.h about ranges, short transfers and zeros. A range is checked as [offset, offset + length) without
 * ever adding two numbers that were not compared with a limit first.
 */
#include <errno.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include "disk_io.h"

#define PUNCH (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
#define ZERO_RANGE FALLOC_FL_ZERO_RANGE

static void
fail(struct disk_op *op, int error)
{
	op->error = error;
	op->call = DISK_DONE;
}

/* The best way left to get zeros without writing them; 0 when there is none. */
static int
zero_mode(const struct hast_disk *d, const struct disk_op *op)
{
	int may_punch = op->cmd == HAST_CMD_DELETE || (op->flags & HAST_BIO_NOHOLE) == 0;

	if (may_punch && !d->no_punch)
		return PUNCH;
	return d->no_zero_range ? 0 : ZERO_RANGE;
}

/* The next call of an op that leaves zeros in [at, end). */
static void
plan_zeros(struct hast_disk *d, struct disk_op *op)
{
	uint64_t left = op->end - op->at;
	uint64_t head = (d->block - op->at % d->block) % d->block;

	op->mode = zero_mode(d, op);
	if (left == 0) {
		op->call = DISK_DONE;
	} else if (op->mode != 0 && head == 0 && left >= d->block) {
		op->call = DISK_FALLOCATE;
		op->piece = left - left % d->block;
	} else {
		/* All of it, or an end that is no whole block. */
		op->call = DISK_ZERO;
		op->piece = op->mode != 0 && head != 0 && head < left ? head : left;
		if (op->piece > DISK_ZEROS)
			op->piece = DISK_ZEROS;
	}
}

static int
data_range_ok(const struct hast_disk *d, const struct disk_op *op, uint64_t offset, uint64_t length)
{
	int has_data = op->cmd == HAST_CMD_READ || (op->cmd == HAST_CMD_WRITE && (op->flags & HAST_BIO_ZERO) == 0);

	if (length == 0 || length > d->geo.datasize || offset > d->geo.datasize - length)
		return 0;
	if (offset % HAST_SECTOR != 0 || length % HAST_SECTOR != 0)
		return 0;
	return !has_data || length <= d->geo.slab_size;
}

static int
map_range_ok(const struct hast_disk *d, uint64_t offset, uint64_t length)
{
	return length > 0 && length <= d->geo.mapsize && offset <= d->geo.mapsize - length &&
	    length <= d->geo.slab_size;
}

void
disk_op_begin(struct hast_disk *d, struct disk_op *op)
{
	const struct hast_bio *bio = &d->bio[op->slot];
	uint64_t offset = bio->offset;
	uint64_t length = bio->length;
	int ok;

	op->cmd = bio->cmd;
	op->flags = bio->flags;
	op->error = 0;
	op->tries = 0;
	op->mode = 0;
	if (op->cmd == HAST_CMD_FLUSH) {
		op->call = DISK_SYNC;
		return;
	}
	if (op->cmd == HAST_CMD_MAP)
		ok = map_range_ok(d, offset, length);
	else
		ok = op->cmd >= HAST_CMD_READ && op->cmd <= HAST_CMD_DELETE && data_range_ok(d, op, offset, length);
	/* From here on the sum fits: geometry bounds data_offset and datasize by 2^60 each. */
	op->at = ok ? offset + (op->cmd == HAST_CMD_MAP ? HAST_MAP_OFFSET : d->geo.data_offset) : 0;
	if (!ok || (op->at | length) % d->opt.align != 0) {
		fail(op, EINVAL);
		return;
	}
	op->end = op->at + length;
	op->piece = length;
	op->data = d->slab + (uint64_t)op->slot * d->geo.slab_size;
	if (op->cmd == HAST_CMD_DELETE || (op->cmd == HAST_CMD_WRITE && (op->flags & HAST_BIO_ZERO) != 0))
		plan_zeros(d, op);
	else
		op->call = op->cmd == HAST_CMD_READ ? DISK_READ : DISK_WRITE;
}

static void
failed_call(struct hast_disk *d, struct disk_op *op, int error)
{
	if (op->call != DISK_FALLOCATE || (error != EOPNOTSUPP && error != ENOSYS)) {
		fail(op, error);
		return;
	}
	/* Not asked again: the component will not learn it while we have it open. */
	if (op->mode == PUNCH)
		d->no_punch = 1;
	else
		d->no_zero_range = 1;
	plan_zeros(d, op);
}

/* So many bytes of the piece were transferred. */
static void
moved(struct hast_disk *d, struct disk_op *op, uint64_t bytes)
{
	if (bytes < op->piece)
		bytes -= bytes % d->opt.align;
	/* Nothing: a read behind the end of a file that was cut, or a device that takes no more without saying why. */
	if (bytes == 0 || bytes > op->piece) {
		fail(op, EIO);
		return;
	}
	op->at += bytes;
	if (op->call == DISK_ZERO) {
		plan_zeros(d, op);
		return;
	}
	op->data += bytes;
	op->piece -= bytes;
	if (op->piece == 0)
		op->call = op->cmd == HAST_CMD_MAP && (op->flags & HAST_BIO_DURABLE) != 0 ? DISK_SYNC : DISK_DONE;
}

void
disk_op_next(struct hast_disk *d, struct disk_op *op, long result)
{
	if (result == -EINTR || result == -EAGAIN) {
		if (++op->tries > DISK_TRIES)
			fail(op, EIO);
		return;
	}
	op->tries = 0;
	if (result < 0) {
		failed_call(d, op, (int)-result);
	} else if (op->call == DISK_SYNC) {
		op->call = DISK_DONE;
	} else if (op->call == DISK_FALLOCATE) {
		op->at += op->piece;
		plan_zeros(d, op);
	} else {
		moved(d, op, (uint64_t)result);
	}
}

long
disk_perform(const struct hast_disk *d, const struct disk_op *op)
{
	const struct timespec pause = { 0, 1000000 };
	long result = -1;

	errno = EINVAL;
	switch (op->call) {
	case DISK_READ:
		result = pread(d->opt.fd, op->data, op->piece, (off_t)op->at);
		break;
	case DISK_WRITE:
		result = pwrite(d->opt.fd, op->data, op->piece, (off_t)op->at);
		break;
	case DISK_ZERO:
		result = pwrite(d->opt.fd, d->zeros, op->piece, (off_t)op->at);
		break;
	case DISK_FALLOCATE:
		result = fallocate(d->opt.fd, op->mode, (off_t)op->at, (off_t)op->piece);
		break;
	case DISK_SYNC:
		result = fdatasync(d->opt.fd);
		break;
	}
	if (result >= 0)
		return result;
	result = -errno;
	/* Short of something: a moment may help, and keeps DISK_TRIES from being over in no time. */
	if (result == -EAGAIN)
		(void)nanosleep(&pause, NULL);
	return result;
}
