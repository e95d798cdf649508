/* NBD clients in the transmission phase. */
#ifndef HAST_NBD_H
#define HAST_NBD_H

#include "ggate.h"

/* cffi: begin */
#define HAST_NBD_STRUCTURED 1	/* structured replies were negotiated */
#define HAST_NBD_READONLY 2

/* So many at a time: each has a descriptor and buffers of 70 kB. */
#define HAST_NBD_CLIENTS_MAX 256

/* A client that has finished negotiating. Takes the descriptor over, also on failure. 0 or -errno, -EUSERS: too many. */
int hast_nbd_add(struct hast_ggate *g, int fd, int flags);
/* cffi: end */

#endif
