/* What is done to the fault disk, by threads that take jobs in their order: each is delayed, or fails, and is logged. */
#include "faultdisk.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define ENTRY_MAGIC 0x4b534446u		/* "FDSK" */

/* One entry of the log; `stored` bytes of data follow a write: what was applied, less than length if it failed. A
   delete has applied `stored` bytes of zeros, which do not follow. */
struct entry {
	uint32_t magic;
	uint32_t kind;
	int32_t error;
	uint32_t mode;			/* of a delete, fallocate(2)'s */
	uint64_t begin, end;
	uint64_t offset, length;
	uint64_t stored;
};

uint64_t
put(const struct disk *d, const char *data, uint64_t offset, uint64_t length, int *error)
{
	uint64_t done = 0;

	while (done < length) {
		ssize_t n = pwrite(d->backing, data + done, length - done, (off_t)(offset + done));

		if (n == -1 && errno == EINTR)
			continue;
		if (n <= 0) {
			*error = n == 0 ? EIO : errno;
			break;
		}
		done += (uint64_t)n;
	}
	return done;
}

/* Zeros in [offset, offset + length), as far as the file goes; a file system that cannot punch gets them written. */
static uint64_t
zero(const struct disk *d, uint64_t offset, uint64_t length, int *error)
{
	static const char zeros[65536];
	uint64_t end = offset + length < d->size ? offset + length : d->size, at = offset;

	if (offset >= end)
		return 0;
	if (fallocate(d->backing, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)(end - offset)) == 0)
		return end - offset;
	while (at < end && *error == 0) {
		uint64_t piece = end - at < sizeof(zeros) ? end - at : sizeof(zeros);

		at += put(d, zeros, at, piece, error);
	}
	return at - offset;
}

void
record(const struct disk *d, const struct job *job, const char *data, int error, uint64_t stored)
{
	struct entry entry = {
		.magic = ENTRY_MAGIC, .kind = job->kind, .error = error, .mode = job->mode, .begin = job->begin,
		.end = now(), .offset = job->offset, .length = job->length, .stored = stored,
	};
	struct iovec iov[2] = { { &entry, sizeof(entry) }, { (void *)(uintptr_t)data, stored } };
	int n = job->kind == WRITE && stored > 0 ? 2 : 1;
	size_t size = sizeof(entry) + (n == 2 ? stored : 0);

	if (d->log != -1 && writev(d->log, iov, n) != (ssize_t)size) {
		fprintf(stderr, "faultdisk: the log cannot be written\n");
		_exit(1);
	}
}

static void
do_read(struct disk *d, struct job *job, int error)
{
	char *data = malloc(job->length > 0 ? job->length : 1);
	ssize_t n = 0;

	if (data == NULL)
		error = ENOMEM;
	if (error == 0)
		n = pread(d->backing, data, job->length, (off_t)job->offset);
	if (n == -1)
		error = errno;
	reply(d, job->unique, error, data, n > 0 ? (size_t)n : 0);
	free(data);
}

static void
do_mutation(struct disk *d, struct job *job, int error, const struct rule *rule)
{
	struct fuse_write_out out = { .size = (uint32_t)job->length };
	uint64_t length = job->length, stored = 0;
	int failed = 0;

	if (error != 0)
		length = rule->half ? length / 2 / SECTOR * SECTOR : 0;
	pthread_mutex_lock(&d->io);
	remember(d, job->offset, length);
	if (job->kind == WRITE)
		stored = put(d, job->data, job->offset, length, &failed);
	else if (job->kind == DELETE && length > 0)
		stored = zero(d, job->offset, length, &failed);
	written(d);
	if (error == 0)
		error = failed;
	record(d, job, job->data, error, stored);
	if (job->kind == FLUSH && error == 0)
		flushed(d, job->begin);
	/* Whoever is told of a loss is told of it before anybody can see it. */
	reply(d, job->unique, error, &out, job->kind == WRITE ? sizeof(out) : 0);
	if (job->kind == FLUSH && error != 0 && rule->lose)
		lose(d);
	pthread_mutex_unlock(&d->io);
}

/* The error that the job is to have, and the rule that says so; one that applies is used up by one. Under the lock. */
static int
verdict(struct disk *d, const struct job *job, struct rule *why)
{
	int touches;

	d->count[job->kind]++;
	for (int i = 0; i < RULES; i++) {
		struct rule *rule = &d->rule[i];

		touches = job->kind == FLUSH || (job->offset < rule->to && job->offset + job->length > rule->from);
		if ((rule->kinds >> job->kind & 1) == 0 || !touches)
			continue;
		if (rule->count > 0 && --rule->count == 0)
			rule->kinds = 0;
		*why = *rule;
		d->failed++;
		return rule->error;
	}
	if (d->readonly && (job->kind == WRITE || job->kind == DELETE)) {
		d->failed++;
		return EROFS;
	}
	return 0;
}

/* The first job that does not hang; NULL: none. Under the lock. */
static struct job *
next_job(struct disk *d)
{
	for (struct job **link = &d->head; *link != NULL; link = &(*link)->next) {
		struct job *job = *link;

		if ((d->hung >> job->kind & 1) != 0)
			continue;
		*link = job->next;
		if (job->next == NULL)
			d->tail = link;
		return job;
	}
	return NULL;
}

void *
work(void *argument)
{
	struct disk *d = argument;

	for (;;) {
		struct job *job;
		struct timespec pause;
		struct rule why = { .kinds = 0 };
		uint64_t ms;
		int error;

		pthread_mutex_lock(&d->lock);
		while ((job = next_job(d)) == NULL)
			pthread_cond_wait(&d->more, &d->lock);
		ms = d->delay[job->kind];
		error = verdict(d, job, &why);
		pthread_mutex_unlock(&d->lock);
		pause.tv_sec = (time_t)(ms / 1000);
		pause.tv_nsec = (long)(ms % 1000) * 1000000;
		if (ms > 0)
			(void)nanosleep(&pause, NULL);
		if (job->kind == READ)
			do_read(d, job, error);
		else
			do_mutation(d, job, error, &why);
		free(job);
	}
	return NULL;
}

void
add_job(struct disk *d, const struct fuse_in_header *in, enum kind kind, uint64_t offset, uint64_t length,
    uint32_t mode, const char *data)
{
	struct job *job = malloc(sizeof(*job) + (data != NULL ? length : 0));

	if (job == NULL) {
		reply(d, in->unique, ENOMEM, NULL, 0);
		return;
	}
	*job = (struct job){ .kind = kind, .unique = in->unique, .begin = now(), .offset = offset, .length = length,
		.mode = mode };
	if (data != NULL)
		memcpy(job->data, data, length);
	pthread_mutex_lock(&d->lock);
	*d->tail = job;
	d->tail = &job->next;
	pthread_cond_signal(&d->more);
	pthread_mutex_unlock(&d->lock);
}
