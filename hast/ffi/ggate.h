/* The ggate stage's pump: serves the ports (NBD clients, the FUSE channel), runs the sequencer, and speaks with the secondary. */
#ifndef HAST_GGATE_H
#define HAST_GGATE_H

#include <stdint.h>

#include "conn.h"

/* cffi: begin */
struct hast_ggate;

/* The stage's context; its epoll descriptor is its own. disk_bell: eventfd of the disk stage, -1 where there is none. NULL and
   errno on failure. */
struct hast_ggate *hast_ggate_new(void *arena, int own_bell, int control, int disk_bell);
void hast_ggate_free(struct hast_ggate *g);
/* The component, without O_DIRECT: what takes no waiting there is done by this stage itself (direct.h). -1: not any more. */
void hast_ggate_direct(struct hast_ggate *g, int fd);
/* While there is work the processors are to be ready within `limit` us (awake.h); fd: an open /dev/cpu_dma_latency, -1: they may
   sleep. It stays the caller's. */
void hast_ggate_awake(struct hast_ggate *g, int fd, int32_t limit);
/* Runs until something has to be decided: enum hast_pump_result or -errno. */
int hast_ggate_pump(struct hast_ggate *g);
/* The connection to the secondary, whose requests the sequencer is about to push (hast_seq_connect()); options as in conn.h, those of
   a primary, without bells. It owns the two descriptors from then on. 0 or -errno (EISCONN: there is one already). */
int hast_ggate_connect(struct hast_ggate *g, const struct hast_conn_options *options);
/* Closes it, if there is one. What it has received is in RING_RECV_DONE. */
void hast_ggate_disconnect(struct hast_ggate *g);
/* Why HAST_PUMP_LOST was returned, which it is once for each connection: an errno, and a sentence for people. */
int hast_ggate_lost(const struct hast_ggate *g);
const char *hast_ggate_why(const struct hast_ggate *g);
/* Number of NBD clients now. */
uint32_t hast_ggate_clients(struct hast_ggate *g);
/* 0: DELETE is not what the component can do; who asks for it is told so (EOPNOTSUPP), and nothing else comes of it. */
void hast_ggate_deletes(struct hast_ggate *g, int on);
/* Takes no more requests (0: again); answers go on. */
void hast_ggate_freeze(struct hast_ggate *g, int on);
/* Closes all NBD clients: what they asked for is done, but not answered. For those that hold up the end. */
void hast_ggate_drop_clients(struct hast_ggate *g);
/* Why HAST_PUMP_DEVICE was returned: errno of the device that is gone. */
int hast_ggate_device_error(const struct hast_ggate *g);
/* 1 when no request is under way. */
int hast_ggate_quiet(struct hast_ggate *g);
/* cffi: end */

#endif
