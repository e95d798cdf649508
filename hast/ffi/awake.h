/*
 * Keeps the processors of this machine from falling asleep while there is work under way: a request of depth 1 waits for several
 * wake-ups one after the other, and a processor that sleeps takes longer to wake than all the rest of it. The kernel is told how
 * long a wake-up may take, through an open /dev/cpu_dma_latency (PM QoS); an idle processor then looks for work instead of
 * sleeping, which takes nothing from anybody who has work for it.
 *
 * Invariants:
 * - nothing is asked of the kernel HAST_AWAKE_MS after the last thing happened to the stage, nor by a stage that never did
 *   anything: what is paid in electricity ends with the work;
 * - the kernel takes the demand back when the descriptor is closed, so also when the stage is killed;
 * - it is asked for before a wait, when what the stage has for others is on its way already: on a machine with many processors asking
 *   takes a while, as each that sleeps is told;
 * - without a descriptor, or with one that cannot be written any more, all is as without it.
 */
#ifndef HAST_AWAKE_H
#define HAST_AWAKE_H

#include <stdint.h>

#define HAST_AWAKE_MS 1

struct hast_awake {
	int fd;				/* -1: nothing is asked of the kernel */
	int32_t limit;			/* us that a wake-up may take while there is work */
	int busy;			/* something has happened since the last wait that ended without */
	int held;			/* the kernel has been asked */
};

/* fd: stays the caller's. What the one before had asked for ends when its descriptor is closed. */
void hast_awake_init(struct hast_awake *a, int fd, int32_t limit);
/* Before a wait of at most `timeout` ms (-1: without limit): how long to wait instead. */
int hast_awake_patience(struct hast_awake *a, int timeout);
/* After a wait of at most `timeout` ms in which n things have happened. */
void hast_awake_waited(struct hast_awake *a, int n, int timeout);

#endif
