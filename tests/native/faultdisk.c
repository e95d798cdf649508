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
 *   cache SEED               remember from now on what was not flushed, for `lose`
 *   fail KINDS ERRNO [count N] [range FROM TO] [half] [lose]
 *                            the next N (else all) that touch the range (else any) fail; half: a write is half done;
 *                            lose: a flush loses some of what was not flushed before
 *   delay KINDS MS           each takes that much longer; 0: no more
 *   hang KINDS               they wait until heal (or release)
 *   release                  what hangs goes on
 *   full | readonly          writes fail with ENOSPC; writes and deletes with EROFS
 *   heal                     no fault any more, what hangs goes on
 *   stats                    "ok reads writes flushes deletes failed waiting": how many of each, and wait in a hang now
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
#include "faultdisk.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define WORKERS 64			/* so many can be delayed at once */

void
die(const char *what)
{
	fprintf(stderr, "faultdisk: %s: %s\n", what, strerror(errno));
	exit(1);
}

uint64_t
now(void)
{
	struct timespec t;

	if (clock_gettime(CLOCK_MONOTONIC, &t) == -1)
		die("clock_gettime");
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void
unmount_and_end(const struct disk *d)
{
	/* The lazy one: nobody who still has it open can hold it up; they get errors when this process is gone. */
	(void)umount2(d->mountpoint, MNT_DETACH);
	(void)unlink(d->socket);
	_exit(0);
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
