/* The FUSE channel: one file that is the resource, under a loop device. */
#ifndef HAST_FUSE_H
#define HAST_FUSE_H

#include "ggate.h"

/* cffi: begin */
/* fd: an open /dev/fuse whose mount has been made; taken over, also on failure. resend 1: a former ggate served it
   before, have the kernel send its unanswered requests again. 0 or -errno. */
int hast_fuse_add(struct hast_ggate *g, int fd, int resend);
/* 1 when the kernel's FUSE_INIT was answered (or resend was set). */
int hast_fuse_ready(struct hast_ggate *g);
/* cffi: end */

#endif
