/*
 * The disk stage's pump: rings in, engine, fdatasync groups, rings out. Invariants: disk.h and disk_io.h.
 *
 * One turn: take what is in RING_DISK and start it; wait (or only look, when there is more to do); deliver results; push
 * completions and ring the bell once. So nothing that is finished is held back while the pump waits.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "disk_io.h"
#include "doorbell.h"
#include "pump.h"
#include "ring.h"

#define LOST "lost\n"			/* as in hast/boot.py */

#define MAX_DEPTH 4096u

enum { STATE_STOPPED, STATE_WORKING, STATE_WAITING };

/* ---- statistics: one writer, read by others at any time ---- */

static void
count(uint64_t *counter, uint64_t more)
{
	__atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

static void
set_state(struct hast_disk *d, uint32_t state)
{
	__atomic_store_n(&d->line->state, state, __ATOMIC_RELAXED);
}

/* ---- ops ---- */

static void
finish(struct hast_disk *d, struct disk_op *op)
{
	d->bio[op->slot].error[HAST_LOCAL] = op->error;
	hast_trace(d->arena, HAST_STAGE_DISK, HAST_TRACE_OUT, d->bio[op->slot].seq);
	op->busy = 0;
	d->inflight--;
	d->batch[d->nbatch++] = op->slot;
	count(&d->line->ops, 1);
	if (op->error != 0)
		count(&d->line->errors, 1);
}

/* What the note said is void. Not being there says nearly the same, and not being written for want of space is no failure. */
static void
spoil_note(const char *path)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	if (fd == -1) {
		(void)unlink(path);
		return;
	}
	(void)!write(fd, LOST, sizeof(LOST) - 1);
	(void)close(fd);
}

/* For the rest of this component's life; 0: it has not. */
static void
sync_failed(struct hast_disk *d, int error)
{
	d->sync_error = error;
	/* Who writes the note anew looks at this line afterwards, so one of the two sees what the other one has done. */
	__atomic_store_n(&d->line->extra[0], (uint64_t)error, __ATOMIC_SEQ_CST);
	if (error != 0 && d->note != NULL)
		spoil_note(d->note);
}

/* While it is so the worker does not kill this stage: what becomes of the fdatasync would be told to nobody. */
static void
set_syncing(struct hast_disk *d, uint64_t syncing)
{
	__atomic_store_n(&d->line->extra[1], syncing, __ATOMIC_SEQ_CST);
}

/* One fdatasync for all that have asked up to now. */
static void
sync_begin(struct hast_disk *d)
{
	if (d->syncing.head != NULL || d->unsynced.head == NULL)
		return;
	d->syncing = d->unsynced;
	d->unsynced.head = NULL;
	d->sync_op->call = DISK_SYNC;
	d->sync_op->error = 0;
	set_syncing(d, 1);
	d->engine->start(d, d->sync_op);
}

static void
sync_end(struct hast_disk *d, long result)
{
	struct disk_list group = d->syncing;
	struct disk_op *op;

	disk_op_next(d, d->sync_op, result);
	if (d->sync_op->call == DISK_SYNC) {
		d->engine->start(d, d->sync_op);
		return;
	}
	if (d->sync_error == 0)
		sync_failed(d, d->sync_op->error);
	d->syncing.head = NULL;
	while ((op = disk_list_take(&group)) != NULL) {
		op->error = d->sync_error;
		finish(d, op);
	}
	sync_begin(d);
	if (d->syncing.head == NULL)
		set_syncing(d, 0);
}

static void
go_on(struct hast_disk *d, struct disk_op *op)
{
	if (op->call == DISK_DONE) {
		finish(d, op);
	} else if (op->call == DISK_SYNC) {
		disk_list_add(&d->unsynced, op);
		sync_begin(d);
	} else {
		d->engine->start(d, op);
	}
}

void
disk_result(struct hast_disk *d, struct disk_op *op, long result)
{
	if (op == d->sync_op) {
		sync_end(d, result);
		return;
	}
	if (result > 0 && op->call != DISK_FALLOCATE)
		count(&d->line->bytes, (uint64_t)result);
	disk_op_next(d, op, result);
	go_on(d, op);
}

/* ---- rings ---- */

/* Starts what is in the ring. Number of bios, or -1 when ring or slot is nonsense. */
static int
take(struct hast_disk *d)
{
	uint32_t slot;
	int taken = 0;

	while (d->inflight < d->limit) {
		int r = hast_ring_pop(d->ring, &slot);

		if (r == 0)
			break;
		if (r < 0 || slot >= d->nslots || d->op[slot].busy)
			return -1;
		hast_trace(d->arena, HAST_STAGE_DISK, HAST_TRACE_IN, d->bio[slot].seq);
		d->op[slot].busy = 1;
		d->inflight++;
		taken++;
		disk_op_begin(d, &d->op[slot]);
		go_on(d, &d->op[slot]);
	}
	return taken;
}

/* Gives back what is finished. 0, -EPROTO when the ring has no room (it has room for all slots), or -errno. */
static int
publish(struct hast_disk *d)
{
	uint32_t n = d->nbatch;

	if (n == 0)
		return 0;
	d->nbatch = 0;
	if (hast_ring_push_some(d->done_ring, d->batch, n) != (int)n)
		return -EPROTO;
	return hast_doorbell_ring(d->done_bell, d->opt.done_bell);
}

/* Nothing to start and nothing that could be performed at once. */
static int
may_block(struct hast_disk *d)
{
	if (d->ready.head != NULL || d->nbatch != 0)
		return 0;
	return d->inflight >= d->limit || hast_ring_ready(d->ring) == 0;
}

/* Waking somebody on another processor costs ten times what it costs on the same one. */
static void
follow(struct hast_disk *d)
{
	uint64_t cpu;
	cpu_set_t set;

	if (d->opt.follow == 0)
		return;
	cpu = __atomic_load_n(d->leader, __ATOMIC_RELAXED);
	if (cpu == 0 || cpu == d->cpu || cpu > CPU_SETSIZE)
		return;
	d->cpu = cpu;
	CPU_ZERO(&set);
	CPU_SET(cpu - 1, &set);
	/* Not allowed there: stay, and ask no more. */
	if (sched_setaffinity(0, sizeof(set), &set) == -1)
		d->opt.follow = 0;
}

/* Announces, looks again, waits. 0 or -errno. */
static int
wait_turn(struct hast_disk *d)
{
	int block, error;

	hast_doorbell_announce(d->bell);
	block = may_block(d);
	if (block) {
		count(&d->line->sleeps, 1);
		set_state(d, STATE_WAITING);
	} else {
		hast_doorbell_cancel(d->bell);
	}
	error = d->engine->wait(d, block);
	if (block) {
		hast_trace(d->arena, HAST_STAGE_DISK, HAST_TRACE_WOKE, 0);
		hast_doorbell_cancel(d->bell);
		set_state(d, STATE_WORKING);
		follow(d);
	}
	return error;
}

static int
turn(struct hast_disk *d)
{
	int error;

	count(&d->line->heartbeat, 1);
	if (take(d) < 0)
		return HAST_PUMP_BROKEN;
	error = wait_turn(d);
	if (error != 0)
		return error;
	d->engine->reap(d);
	error = publish(d);
	if (error != 0)
		return error == -EPROTO ? HAST_PUMP_BROKEN : error;
	if (d->control == 0)
		return 0;
	d->control = 0;
	return HAST_PUMP_CONTROL;
}

int
hast_disk_pump(struct hast_disk *d)
{
	int result;

	set_state(d, STATE_WORKING);
	do
		result = turn(d);
	while (result == 0);
	return result;
}

void
hast_disk_flush_failed(struct hast_disk *d, int error)
{
	if (d->sync_error == 0)
		sync_failed(d, error);
}

/* ---- life ---- */

static const struct disk_engine *
engine_of(const struct hast_disk_options *opt)
{
	switch (opt->engine) {
	case HAST_DISK_INLINE:
		return &disk_inline;
	case HAST_DISK_URING:
		return &disk_uring;
	case HAST_DISK_THREADS:
		return &disk_threads;
	}
	return NULL;
}

static int
options_ok(const struct hast_disk_options *opt)
{
	return opt->depth >= 1 && opt->depth <= MAX_DEPTH && opt->done_stage < HAST_STAGES &&
	    opt->align >= 1 && opt->align <= 4096 && (opt->align & (opt->align - 1)) == 0 && engine_of(opt) != NULL;
}

/* What fallocate needs to know of the component. 0 or -errno. */
static int
look_at_component(struct hast_disk *d)
{
	struct stat st;
	int sector = 0;

	d->block = 1;
	if (fstat(d->opt.fd, &st) == -1)
		return -errno;
	if (!S_ISBLK(st.st_mode))
		return 0;
	if (ioctl(d->opt.fd, BLKSSZGET, &sector) == -1)
		return -errno;
	if (sector < HAST_SECTOR || (sector & (sector - 1)) != 0)
		return -EINVAL;
	d->is_block = 1;
	d->block = (uint32_t)sector;
	return 0;
}

static void
attach(struct hast_disk *d, struct hast_arena *a, const struct hast_disk_options *opt)
{
	d->opt = *opt;
	d->opt.note = NULL;		/* the caller's: `note` is ours */
	d->engine = engine_of(opt);
	d->geo = a->geo;
	d->nslots = a->nslots;
	d->arena = a;
	d->bio = hast_arena_bio(a, 0);
	d->slab = hast_arena_slab(a, 0);
	d->ring = hast_arena_ring(a, HAST_RING_DISK);
	d->done_ring = hast_arena_ring(a, HAST_RING_DISK_DONE);
	d->bell = &a->bell[HAST_STAGE_DISK];
	d->done_bell = &a->bell[opt->done_stage];
	d->line = &a->stage[HAST_STAGE_DISK];
	d->leader = &a->stage[opt->done_stage].extra[0];
	sync_failed(d, opt->sync_error);
	set_syncing(d, 0);
}

static void
release(struct hast_disk *d)
{
	if (d->zeros != NULL && d->zeros != MAP_FAILED)
		(void)munmap(d->zeros, DISK_ZEROS);
	free(d->op);
	free(d->batch);
	free(d->note);
	free(d);
}

/* 0 or -errno. */
static int
set_up(struct hast_disk *d)
{
	int error = look_at_component(d);

	if (error != 0)
		return error;
	d->op = calloc((size_t)d->nslots + 1, sizeof(*d->op));
	d->batch = calloc(d->nslots, sizeof(*d->batch));
	d->zeros = mmap(NULL, DISK_ZEROS, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (d->op == NULL || d->batch == NULL || d->zeros == MAP_FAILED)
		return -ENOMEM;
	for (uint32_t i = 0; i <= d->nslots; i++)
		d->op[i].slot = i;
	d->sync_op = &d->op[d->nslots];
	return d->engine->open(d);
}

struct hast_disk *
hast_disk_new(void *arena, const struct hast_disk_options *options)
{
	struct hast_arena *a = arena;
	struct hast_disk *d;
	int error;

	if (!options_ok(options) || hast_arena_check(a, a->size) != 0) {
		errno = EINVAL;
		return NULL;
	}
	d = calloc(1, sizeof(*d));
	if (d == NULL)
		return NULL;
	if (options->note != NULL) {
		d->note = strdup(options->note);
		if (d->note == NULL) {
			free(d);
			errno = ENOMEM;
			return NULL;
		}
	}
	attach(d, a, options);
	error = set_up(d);
	if (error != 0) {
		release(d);
		errno = -error;
		return NULL;
	}
	__atomic_store_n(&d->line->pid, (uint32_t)getpid(), __ATOMIC_RELAXED);
	return d;
}

void
hast_disk_free(struct hast_disk *d)
{
	int error = 0;

	if (d == NULL)
		return;
	/* The control socket may be at its end: it would keep the wait from waiting. */
	d->opt.control = -1;
	while (d->inflight > 0 && (error == 0 || error == -EINTR)) {
		hast_doorbell_announce(d->bell);
		error = d->engine->wait(d, d->ready.head == NULL);
		hast_doorbell_cancel(d->bell);
		d->engine->reap(d);
	}
	(void)publish(d);
	d->engine->close(d);
	set_state(d, STATE_STOPPED);
	release(d);
}
