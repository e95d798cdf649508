/*
 * A disk that records and fails: one file, mounted through /dev/fuse over a regular file, kept in a plain file.
 *
 *   faultdisk BACKING MOUNTPOINT CONTROL
 *
 * It says "ready" when it is mounted. CONTROL is a Unix socket on which it takes commands, one a line, and answers each
 * with "ok ..." or "error ...". KINDS is a list of read,write,flush,delete or "all"; OFFSETS are bytes of the file:
 *
 *   record PATH              log every mutation and flush from now on, in the order of completion; see struct entry
 *   record off
 *   fail KINDS ERRNO [count N] [range FROM TO] [half]
 *                            the next N (else all) that touch the range (else any) fail; half: a write is half done
 *   delay KINDS MS           each takes that much longer; 0: no more
 *   hang KINDS               they wait until heal (or release)
 *   release                  what hangs goes on
 *   full | readonly          writes fail with ENOSPC; writes and deletes with EROFS
 *   heal                     no fault any more, what hangs goes on
 *   stats                    "ok reads writes flushes deletes failed waiting": how many of each, and waiting in a hang now
 *   die                      ends at once: whoever uses the file gets errors from now on
 *   quit                     unmounts and ends; so does SIGTERM
 *
 * Invariants:
 * - nothing that is asked of the disk is done before its begin stamp or after its end stamp (CLOCK_MONOTONIC,
 *   nanoseconds), and no answer goes out before the end stamp: stamps of several disks on one machine can be compared;
 * - mutations are applied to BACKING one at a time, in the order of the log;
 * - what waits in a hang needs no thread: attributes, other kinds and commands are answered meanwhile. But the kernel
 *   holds a lock on the file while it flushes or deletes, so writes wait for those (reads do not).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_WRITE (1u << 20)
#define BUFFER (MAX_WRITE + 4096u)
#define WORKERS 64			/* so many can be delayed at once */
#define RULES 32
#define LINE 4200
#define SECTOR 512u
#define ENTRY_MAGIC 0x4b534446u		/* "FDSK" */

#ifndef FOPEN_PARALLEL_DIRECT_WRITES
#define FOPEN_PARALLEL_DIRECT_WRITES (1 << 6)
#endif
#ifndef FOPEN_NOFLUSH
#define FOPEN_NOFLUSH (1 << 5)
#endif

enum kind { READ, WRITE, FLUSH, DELETE, KINDS };

static const char *const kind_name[KINDS] = { "read", "write", "flush", "delete" };

/* One entry of the log; `stored` bytes of data follow a write: what was applied, less than length if it failed. A delete
   has applied `stored` bytes of zeros, which do not follow. */
struct entry {
	uint32_t magic;
	uint32_t kind;
	int32_t error;
	uint32_t mode;			/* of a delete, fallocate(2)'s */
	uint64_t begin, end;
	uint64_t offset, length;
	uint64_t stored;
};

struct rule {
	uint32_t kinds;			/* bit mask; 0: not in use */
	int error;
	int64_t count;			/* left; -1: all */
	uint64_t from, to;
	int half;
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
	pthread_mutex_t io;		/* backing and log, see the second invariant */
};

static void
die(const char *what)
{
	fprintf(stderr, "faultdisk: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t
now(void)
{
	struct timespec t;

	if (clock_gettime(CLOCK_MONOTONIC, &t) == -1)
		die("clock_gettime");
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- answers ---- */

static void
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

/* ---- what is done to the disk ---- */

static uint64_t
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

static void
record(const struct disk *d, const struct job *job, int error, uint64_t stored)
{
	struct entry entry = {
		.magic = ENTRY_MAGIC, .kind = job->kind, .error = error, .mode = job->mode, .begin = job->begin,
		.end = now(), .offset = job->offset, .length = job->length, .stored = stored,
	};
	struct iovec iov[2] = { { &entry, sizeof(entry) }, { (void *)(uintptr_t)job->data, stored } };
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
do_mutation(struct disk *d, struct job *job, int error, int half)
{
	struct fuse_write_out out = { .size = (uint32_t)job->length };
	uint64_t length = job->length, stored = 0;
	int failed = 0;

	if (error != 0)
		length = half ? length / 2 / SECTOR * SECTOR : 0;
	pthread_mutex_lock(&d->io);
	if (job->kind == WRITE)
		stored = put(d, job->data, job->offset, length, &failed);
	else if (job->kind == DELETE && length > 0)
		stored = zero(d, job->offset, length, &failed);
	if (error == 0)
		error = failed;
	record(d, job, error, stored);
	pthread_mutex_unlock(&d->io);
	reply(d, job->unique, error, &out, job->kind == WRITE ? sizeof(out) : 0);
}

/* The error that the job is to have; a rule that applies is used up by one. Under the lock. */
static int
verdict(struct disk *d, const struct job *job, int *half)
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
		*half = rule->half;
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

static void *
work(void *argument)
{
	struct disk *d = argument;

	for (;;) {
		struct job *job;
		struct timespec pause;
		uint64_t ms;
		int error, half = 0;

		pthread_mutex_lock(&d->lock);
		while ((job = next_job(d)) == NULL)
			pthread_cond_wait(&d->more, &d->lock);
		ms = d->delay[job->kind];
		error = verdict(d, job, &half);
		pthread_mutex_unlock(&d->lock);
		pause.tv_sec = (time_t)(ms / 1000);
		pause.tv_nsec = (long)(ms % 1000) * 1000000;
		if (ms > 0)
			(void)nanosleep(&pause, NULL);
		if (job->kind == READ)
			do_read(d, job, error);
		else
			do_mutation(d, job, error, half);
		free(job);
	}
	return NULL;
}

/* ---- requests of the kernel ---- */

static void
add_job(struct disk *d, const struct fuse_in_header *in, enum kind kind, uint64_t offset, uint64_t length, uint32_t mode,
    const char *data)
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

static void *
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

/* ---- commands ---- */

static int
parse_kinds(const char *text, uint32_t *kinds)
{
	char copy[64], *rest = copy, *word;

	if (text == NULL || strlen(text) >= sizeof(copy))
		return 0;
	(void)strcpy(copy, text);
	*kinds = 0;
	while ((word = strsep(&rest, ",")) != NULL) {
		uint32_t before = *kinds;

		for (int i = 0; i < KINDS; i++)
			if (strcmp(word, kind_name[i]) == 0 || strcmp(word, "all") == 0)
				*kinds |= 1u << i;
		if (*kinds == before)
			return 0;
	}
	return 1;
}

static int
number(char **rest, uint64_t *value)
{
	char *word = strsep(rest, " "), *end;

	if (word == NULL || *word < '0' || *word > '9')
		return 0;
	errno = 0;
	*value = strtoull(word, &end, 10);
	return errno == 0 && *end == '\0';
}

static int
add_rule(struct disk *d, struct rule rule)
{
	for (int i = 0; i < RULES; i++)
		if (d->rule[i].kinds == 0) {
			d->rule[i] = rule;
			return 1;
		}
	return 0;
}

static int
do_fail(struct disk *d, char *rest)
{
	struct rule rule = { .count = -1, .to = UINT64_MAX };
	uint64_t value;
	char *word;

	if (!parse_kinds(strsep(&rest, " "), &rule.kinds) || !number(&rest, &value) || value == 0 || value > 511)
		return 0;
	rule.error = (int)value;
	while ((word = strsep(&rest, " ")) != NULL) {
		if (strcmp(word, "half") == 0) {
			rule.half = 1;
		} else if (strcmp(word, "count") == 0 && number(&rest, &value) && value > 0 && value < INT64_MAX) {
			rule.count = (int64_t)value;
		} else if (strcmp(word, "range") != 0 || !number(&rest, &rule.from) || !number(&rest, &rule.to)) {
			return 0;
		}
	}
	return add_rule(d, rule);
}

static int
do_record(struct disk *d, const char *path)
{
	int ok, fd = -1;

	if (path == NULL)
		return 0;
	if (strcmp(path, "off") != 0 && (fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) == -1)
		return 0;
	pthread_mutex_lock(&d->io);
	ok = d->log == -1 || close(d->log) == 0;
	d->log = fd;
	pthread_mutex_unlock(&d->io);
	return ok;
}

static int
do_delay(struct disk *d, char *rest)
{
	uint32_t kinds;
	uint64_t ms;

	if (!parse_kinds(strsep(&rest, " "), &kinds) || !number(&rest, &ms) || ms > 3600000)
		return 0;
	for (int i = 0; i < KINDS; i++)
		if ((kinds >> i & 1) != 0)
			d->delay[i] = ms;
	return 1;
}

static int
do_hang(struct disk *d, char *rest)
{
	uint32_t kinds;

	if (!parse_kinds(strsep(&rest, " "), &kinds))
		return 0;
	d->hung |= kinds;
	return 1;
}

static int
heal(struct disk *d)
{
	memset(d->rule, 0, sizeof(d->rule));
	memset(d->delay, 0, sizeof(d->delay));
	d->hung = 0;
	d->readonly = 0;
	return 1;
}

static void
unmount_and_end(const struct disk *d)
{
	/* The lazy one: nobody who still has it open can hold it up; they get errors when this process is gone. */
	(void)umount2(d->mountpoint, MNT_DETACH);
	(void)unlink(d->socket);
	_exit(0);
}

static void
stats(const struct disk *d, char *answer, size_t size)
{
	uint64_t waiting = 0;

	for (const struct job *job = d->head; job != NULL; job = job->next)
		waiting += d->hung >> job->kind & 1;
	(void)snprintf(answer, size, "ok %ju %ju %ju %ju %ju %ju\n", (uintmax_t)d->count[READ], (uintmax_t)d->count[WRITE],
	    (uintmax_t)d->count[FLUSH], (uintmax_t)d->count[DELETE], (uintmax_t)d->failed, (uintmax_t)waiting);
}

/* One command; its answer. */
static void
obey(struct disk *d, char *line, char *answer, size_t size)
{
	char *rest = line, *word = strsep(&rest, " ");
	int ok = 0;

	if (strcmp(word, "die") == 0)
		_exit(0);
	if (strcmp(word, "quit") == 0)
		unmount_and_end(d);
	if (strcmp(word, "record") == 0) {
		ok = do_record(d, rest);
		(void)snprintf(answer, size, "%s\n", ok ? "ok" : "error cannot record there");
		return;
	}
	pthread_mutex_lock(&d->lock);
	if (strcmp(word, "fail") == 0)
		ok = do_fail(d, rest);
	else if (strcmp(word, "delay") == 0)
		ok = do_delay(d, rest);
	else if (strcmp(word, "hang") == 0)
		ok = do_hang(d, rest);
	else if (strcmp(word, "release") == 0)
		ok = (d->hung = 0, 1);
	else if (strcmp(word, "full") == 0)
		ok = add_rule(d, (struct rule){ .kinds = 1u << WRITE, .error = ENOSPC, .count = -1, .to = UINT64_MAX });
	else if (strcmp(word, "readonly") == 0)
		ok = d->readonly = 1;
	else if (strcmp(word, "heal") == 0)
		ok = heal(d);
	(void)snprintf(answer, size, "%s\n", ok ? "ok" : "error no such command, or too many");
	if (strcmp(word, "stats") == 0)
		stats(d, answer, size);
	pthread_cond_broadcast(&d->more);
	pthread_mutex_unlock(&d->lock);
}

static void *
converse(void *argument)
{
	struct disk *d = argument;

	for (;;) {
		char line[LINE], answer[256];
		int fd = accept4(d->control, NULL, NULL, SOCK_CLOEXEC);
		FILE *in;

		if (fd == -1)
			continue;
		in = fdopen(fd, "r");
		while (in != NULL && fgets(line, sizeof(line), in) != NULL) {
			line[strcspn(line, "\n")] = '\0';
			obey(d, line, answer, sizeof(answer));
			if (send(fd, answer, strlen(answer), MSG_NOSIGNAL) == -1)
				break;
		}
		if (in != NULL)
			(void)fclose(in);
		else
			(void)close(fd);
	}
	return NULL;
}

/* ---- life ---- */

static void
listen_on(struct disk *d)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	if (strlen(d->socket) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		die(d->socket);
	}
	(void)strcpy(address.sun_path, d->socket);
	d->control = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (d->control == -1 || bind(d->control, (struct sockaddr *)&address, sizeof(address)) == -1 ||
	    listen(d->control, 16) == -1)
		die(d->socket);
}

static void
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

static void
start(void *(*body)(void *), struct disk *d)
{
	pthread_t thread;
	int error = pthread_create(&thread, NULL, body, d);

	if (error != 0) {
		errno = error;
		die("thread");
	}
}

int
main(int argc, char **argv)
{
	static struct disk d = { .log = -1, .lock = PTHREAD_MUTEX_INITIALIZER, .io = PTHREAD_MUTEX_INITIALIZER,
		.more = PTHREAD_COND_INITIALIZER };
	sigset_t ends;
	int number_;

	if (argc != 4) {
		fprintf(stderr, "usage: faultdisk BACKING MOUNTPOINT CONTROL\n");
		return 64;
	}
	d.tail = &d.head;
	d.mountpoint = argv[2];
	d.socket = argv[3];
	d.backing = open(argv[1], O_RDWR | O_CLOEXEC);
	if (d.backing == -1)
		die(argv[1]);
	d.size = (uint64_t)lseek(d.backing, 0, SEEK_END);
	(void)sigemptyset(&ends);
	(void)sigaddset(&ends, SIGTERM);
	(void)sigaddset(&ends, SIGINT);
	if (pthread_sigmask(SIG_BLOCK, &ends, NULL) != 0 || prctl(PR_SET_PDEATHSIG, SIGTERM) == -1)
		die("signals");
	listen_on(&d);
	mount_it(&d);
	start(serve, &d);
	start(converse, &d);
	for (int i = 0; i < WORKERS; i++)
		start(work, &d);
	printf("ready\n");
	(void)fflush(stdout);
	(void)sigwait(&ends, &number_);
	unmount_and_end(&d);
	return 0;
}
