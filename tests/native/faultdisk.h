/* What the parts of the fault disk share (faultdisk.c): the disk, and a job for each operation that is asked of it. */
#ifndef FAULTDISK_H
#define FAULTDISK_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_WRITE (1u << 20)
#define RULES 32
#define SECTOR 512u

struct fuse_in_header;

enum kind { READ, WRITE, FLUSH, DELETE, KINDS };

struct rule {
	uint32_t kinds;			/* bit mask; 0: not in use */
	int error;
	int64_t count;			/* left; -1: all */
	uint64_t from, to;
	int half, lose;
};

/* What stood where something was written that was not flushed since. */
struct before {
	struct before *next;		/* the one that was written before it */
	uint64_t end, offset, length;	/* end: of the write */
	char data[];
};

struct job {
	struct job *next;
	enum kind kind;
	uint64_t unique, begin, offset, length;
	uint32_t mode;
	char data[];
};

struct disk {
	int fuse, backing, log, control;
	uint64_t size;
	const char *mountpoint, *socket;
	pthread_mutex_t lock;		/* what follows */
	pthread_cond_t more;
	struct job *head, **tail;
	struct rule rule[RULES];
	uint64_t delay[KINDS];		/* ms */
	uint32_t hung;			/* mask of kinds */
	int readonly;
	uint64_t count[KINDS], failed;
	pthread_mutex_t io;		/* backing, log and what follows, see the second invariant of faultdisk.c */
	int caching;
	struct before *before;		/* the last one first */
	uint64_t chance;		/* state of the generator */
};

/* faultdisk.c: life. die() ends the program with errno's text; now() is CLOCK_MONOTONIC in nanoseconds. */
void die(const char *what);
uint64_t now(void);
void unmount_and_end(const struct disk *d);

/* faultdisk_fuse.c: what the kernel asks for. serve() is a thread. */
void reply(const struct disk *d, uint64_t unique, int error, const void *data, size_t size);
void mount_it(struct disk *d);
void *serve(void *argument);

/* faultdisk_jobs.c: what is done to the disk, and how it fails. work() is a thread, of several. */
void add_job(struct disk *d, const struct fuse_in_header *in, enum kind kind, uint64_t offset, uint64_t length,
    uint32_t mode, const char *data);
void *work(void *argument);
uint64_t put(const struct disk *d, const char *data, uint64_t offset, uint64_t length, int *error);
void record(const struct disk *d, const struct job *job, const char *data, int error, uint64_t stored);

/* faultdisk_cache.c: a volatile cache, all under the lock io. remember() before a write; written() after it; flushed()
   when a flush that began at `begin` has succeeded; lose() some of what was not flushed, and forget all of it. */
void begin_cache(struct disk *d, uint64_t seed);
void remember(struct disk *d, uint64_t offset, uint64_t length);
void written(struct disk *d);
void flushed(struct disk *d, uint64_t begin);
void lose(struct disk *d);

/* faultdisk_control.c: commands. converse() is a thread. */
void listen_on(struct disk *d);
void *converse(void *argument);

#endif
