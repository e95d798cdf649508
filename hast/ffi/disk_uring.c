/*
 * URING: io_uring by its system calls alone. One io_uring_enter() submits what was started and waits for everything
 * there is to wait for: results, the doorbell, the control socket.
 *
 * Invariants:
 * - an op has at most one entry in the submission queue or with the kernel, and there are never more than `limit`
 *   of them and OTHERS: the queue cannot be full, and the completion queue, twice as large, cannot overflow;
 * - the doorbell's eventfd is polled once and for all (multishot): each write to it gives a completion whether it was
 *   drained or not, so it is not drained; the control socket is polled anew by each call of the pump, so that a
 *   message that Python has left there is seen again;
 * - the component is not registered with the ring: the kernel takes a ring down some time after its process has ended, and
 *   a registered file, with the lock on it, would be held until then;
 * - the witness is, for that very reason: when its last copy is closed, no write of this ring can reach the component any more,
 *   also when the process was killed (one that is in the device already is not waited for by the kernel).
 */
#include <errno.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "disk_io.h"
#include "doorbell.h"

#define TAG_BELL ((uint64_t)1 << 32)
#define TAG_CONTROL ((uint64_t)2 << 32)
#define OTHERS 3u		/* entries that are no bio's: both polls and the fdatasync */

struct uring {
	int fd;
	void *ring;			/* both queues in one mapping */
	size_t ring_size;
	struct io_uring_sqe *sqe;
	size_t sqe_size;
	uint32_t *sq_head;
	uint32_t *sq_tail;
	uint32_t sq_mask;
	uint32_t *cq_head;
	uint32_t *cq_tail;
	uint32_t cq_mask;
	struct io_uring_cqe *cqe;
	uint8_t bell_armed;
	uint8_t control_armed;
};

static int
enter(const struct uring *u, uint32_t submit, uint32_t wait)
{
	long r = syscall(SYS_io_uring_enter, u->fd, submit, wait, IORING_ENTER_GETEVENTS, NULL, 0);

	return r == -1 ? -errno : (int)r;
}

/* ---- setting up ---- */

static int
setup_fd(uint32_t entries, struct io_uring_params *p)
{
	/* From the best to what every kernel takes that has the rest. */
	static const uint32_t flags[] = {
		IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
		IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN,
		0,
	};
	/* Multishot poll is as old as RSRC_TAGS; the others are older. */
	const uint32_t needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_RSRC_TAGS;

	for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
		memset(p, 0, sizeof(*p));
		p->flags = flags[i] | IORING_SETUP_CLAMP;
		long fd = syscall(SYS_io_uring_setup, entries, p);

		if (fd == -1 && errno == EINVAL)
			continue;
		if (fd == -1)
			return -errno;
		if ((p->features & needed) == needed)
			return (int)fd;
		(void)close((int)fd);
		return -ENOSYS;
	}
	return -EINVAL;
}

static int
map_queues(struct uring *u, const struct io_uring_params *p)
{
	size_t sq = p->sq_off.array + p->sq_entries * sizeof(uint32_t);
	size_t cq = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
	char *ring;

	u->ring_size = sq > cq ? sq : cq;
	u->ring = mmap(NULL, u->ring_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, u->fd, IORING_OFF_SQ_RING);
	if (u->ring == MAP_FAILED)
		return -errno;
	u->sqe_size = p->sq_entries * sizeof(struct io_uring_sqe);
	u->sqe = mmap(NULL, u->sqe_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, u->fd, IORING_OFF_SQES);
	if (u->sqe == MAP_FAILED)
		return -errno;
	ring = u->ring;
	u->sq_head = (uint32_t *)(ring + p->sq_off.head);
	u->sq_tail = (uint32_t *)(ring + p->sq_off.tail);
	u->sq_mask = p->sq_entries - 1;
	u->cq_head = (uint32_t *)(ring + p->cq_off.head);
	u->cq_tail = (uint32_t *)(ring + p->cq_off.tail);
	u->cq_mask = p->cq_entries - 1;
	u->cqe = (struct io_uring_cqe *)(ring + p->cq_off.cqes);
	for (uint32_t i = 0; i < p->sq_entries; i++)
		((uint32_t *)(ring + p->sq_off.array))[i] = i;
	return 0;
}

static void
tear_down(struct uring *u)
{
	if (u->sqe != NULL && u->sqe != MAP_FAILED)
		(void)munmap(u->sqe, u->sqe_size);
	if (u->ring != NULL && u->ring != MAP_FAILED)
		(void)munmap(u->ring, u->ring_size);
	if (u->fd >= 0)
		(void)close(u->fd);
}

static void
uring_close(struct hast_disk *d)
{
	tear_down(d->state);
	free(d->state);
	d->state = NULL;
}

static int
uring_open(struct hast_disk *d)
{
	struct uring *u = calloc(1, sizeof(*u));
	struct io_uring_params p;
	int error;

	if (u == NULL)
		return -ENOMEM;
	d->state = u;
	u->fd = setup_fd(d->opt.depth + OTHERS, &p);
	error = u->fd < 0 ? u->fd : map_queues(u, &p);
	if (error != 0) {
		uring_close(d);
		return error;
	}
	if (d->opt.witness > 0 &&
	    syscall(SYS_io_uring_register, u->fd, IORING_REGISTER_FILES, &d->opt.witness, 1) == -1) {
		error = -errno;
		uring_close(d);
		return error;
	}
	d->limit = d->opt.depth < p.sq_entries - OTHERS ? d->opt.depth : p.sq_entries - OTHERS;
	return 0;
}

int
hast_disk_uring_works(void)
{
	struct uring u = { .fd = -1 };
	struct io_uring_params p;
	int error;

	u.fd = setup_fd(4, &p);
	error = u.fd < 0 ? u.fd : map_queues(&u, &p);
	tear_down(&u);
	return error == 0;
}

/* ---- submission ---- */

/* The next entry, zeroed. It goes out with the next enter(). */
static struct io_uring_sqe *
queue(struct uring *u, uint8_t opcode, uint64_t tag)
{
	uint32_t tail = *u->sq_tail;
	struct io_uring_sqe *sqe = &u->sqe[tail & u->sq_mask];

	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = opcode;
	sqe->user_data = tag;
	/* The kernel looks at it in enter() only, which comes when the entry is filled in. */
	__atomic_store_n(u->sq_tail, tail + 1, __ATOMIC_RELEASE);
	return sqe;
}

static void
poll_for_input(struct uring *u, int fd, uint64_t tag, uint32_t flags)
{
	struct io_uring_sqe *sqe = queue(u, IORING_OP_POLL_ADD, tag);

	sqe->fd = fd;
	sqe->len = flags;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	sqe->poll32_events = (uint32_t)POLLIN << 16;
#else
	sqe->poll32_events = POLLIN;
#endif
}

static void
uring_start(struct hast_disk *d, struct disk_op *op)
{
	static const uint8_t opcode[] = {
		[DISK_READ] = IORING_OP_READ,
		[DISK_WRITE] = IORING_OP_WRITE,
		[DISK_ZERO] = IORING_OP_WRITE,
		[DISK_FALLOCATE] = IORING_OP_FALLOCATE,
		[DISK_SYNC] = IORING_OP_FSYNC,
	};
	struct io_uring_sqe *sqe = queue(d->state, opcode[op->call], op->slot);

	sqe->fd = d->opt.fd;
	/* Something tried before is better off where it may block. */
	sqe->flags = op->tries > 0 ? IOSQE_ASYNC : 0;
	if (op->call == DISK_SYNC) {
		sqe->fsync_flags = IORING_FSYNC_DATASYNC;
	} else if (op->call == DISK_FALLOCATE) {
		sqe->off = op->at;
		sqe->addr = op->piece;
		sqe->len = (uint32_t)op->mode;
	} else {
		sqe->off = op->at;
		sqe->addr = (uint64_t)(uintptr_t)(op->call == DISK_ZERO ? d->zeros : op->data);
		sqe->len = (uint32_t)op->piece;
	}
}

static uint32_t
completions(const struct uring *u)
{
	return __atomic_load_n(u->cq_tail, __ATOMIC_ACQUIRE) - *u->cq_head;
}

static int
uring_wait(struct hast_disk *d, int block)
{
	struct uring *u = d->state;
	uint32_t submit;
	int r;

	if (!u->bell_armed) {
		poll_for_input(u, d->opt.own_bell, TAG_BELL, IORING_POLL_ADD_MULTI);
		u->bell_armed = 1;
	}
	if (!u->control_armed && d->opt.control >= 0) {
		poll_for_input(u, d->opt.control, TAG_CONTROL, 0);
		u->control_armed = 1;
	}
	submit = *u->sq_tail - __atomic_load_n(u->sq_head, __ATOMIC_ACQUIRE);
	r = enter(u, submit, block && completions(u) == 0);
	/* No memory for so many: what is under way frees some, and the rest goes out next time. */
	if (r == -EAGAIN || r == -EBUSY) {
		if (completions(u) == 0)
			(void)poll(NULL, 0, 1);
		return 0;
	}
	if (r < 0)
		return r;
	/* A signal ends the wait without an error when something was submitted. */
	return block && completions(u) == 0 && (uint32_t)r == submit ? -EINTR : 0;
}

/* ---- completion ---- */

static void
polled(struct hast_disk *d, const struct io_uring_cqe *cqe)
{
	struct uring *u = d->state;

	if (cqe->user_data == TAG_CONTROL) {
		u->control_armed = 0;
		d->control = 1;
	} else if (cqe->user_data == TAG_BELL && (cqe->flags & IORING_CQE_F_MORE) == 0) {
		u->bell_armed = 0;
	}
}

static void
uring_reap(struct hast_disk *d)
{
	struct uring *u = d->state;
	uint32_t head = *u->cq_head;
	uint32_t tail = __atomic_load_n(u->cq_tail, __ATOMIC_ACQUIRE);

	for (; head != tail; head++) {
		const struct io_uring_cqe *cqe = &u->cqe[head & u->cq_mask];

		if (cqe->user_data <= d->nslots)
			disk_result(d, &d->op[cqe->user_data], cqe->res);
		else
			polled(d, cqe);
	}
	__atomic_store_n(u->cq_head, head, __ATOMIC_RELEASE);
}

const struct disk_engine disk_uring = {
	.open = uring_open,
	.close = uring_close,
	.start = uring_start,
	.wait = uring_wait,
	.reap = uring_reap,
};
