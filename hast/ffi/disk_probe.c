/* What can be done with a component: questions that Python cannot ask the system itself. Nothing is changed. */
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/major.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

#include "disk.h"

#define PAGE 4096

int
hast_disk_memory_backed(int fd)
{
	struct stat st;
	struct statfs fs;

	if (fstat(fd, &st) == -1)
		return -errno;
	if (S_ISBLK(st.st_mode))
		return major(st.st_rdev) == RAMDISK_MAJOR;
	if (fstatfs(fd, &fs) == -1)
		return -errno;
	return fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC;
}

int
hast_disk_can_punch(int fd)
{
	struct stat st;
	off_t behind;

	if (fstat(fd, &st) == -1)
		return -errno;
	/* Behind the end there is nothing to lose. */
	behind = (st.st_size / PAGE + 2) * PAGE;
	while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, behind, PAGE) == -1) {
		if (errno == EINTR)
			continue;
		/* Anything else says that it cannot be done here, in words that differ between file systems. */
		return errno == EIO || errno == EBADF ? -errno : 0;
	}
	return 1;
}
