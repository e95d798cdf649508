/*
 * Doorbell: how a consumer of rings sleeps, and how a producer wakes it only when it does sleep.
 *
 * Invariants:
 * - the consumer announces (sleeping = 1), then looks at all its rings once more, and only then waits;
 *   the producer pushes, then looks at sleeping: one of the two always sees the other (both have a full
 *   fence between their store and their load), so no wake-up is lost;
 * - of several producers exactly one takes the announcement (1 -> 0) and makes the system call;
 * - a producer may die between taking the announcement and waking: whoever takes its place must
 *   call hast_doorbell_force() before anything else.
 *
 * Two ways to wait: on the futex word, where rings are all that is waited for, or in epoll, poll or
 * io_uring on an eventfd, where descriptors are waited for too. efd is -1 for the futex kind; an eventfd has to be
 * non-blocking, or a drain that comes before the wake-up would hang. With it the consumer cancels, drains, and
 * only then looks at its rings. In an edge-triggered epoll nobody has to drain: each wake-up's write is an event, whatever the
 * counter was, and one that comes for an announcement that is over ends the next wait early, no more.
 */
#ifndef HAST_DOORBELL_H
#define HAST_DOORBELL_H

#include <stdint.h>

/* cffi: begin */
struct hast_doorbell {
	uint32_t sleeping;		/* 1: the consumer is about to wait or waits */
	uint32_t word;			/* futex word, changed by each wake-up */
	uint32_t wakes;			/* system calls made to wake; relaxed, for status */
	uint32_t pad[13];
};

void hast_doorbell_init(struct hast_doorbell *bell);
/* Says that the consumer is about to wait. Look at every ring after this and before waiting. */
void hast_doorbell_announce(struct hast_doorbell *bell);
/* Work was found after all, or the wait is over. */
void hast_doorbell_cancel(struct hast_doorbell *bell);
/* Waits on the futex until rung, at most so many milliseconds (-1: for ever). 0 rung or stale
   announcement, 1 time is up, -errno (-EINTR). */
int hast_doorbell_wait(struct hast_doorbell *bell, int timeout_ms);
/* Rings for those who are not inlined. */
int hast_doorbell_ring_out(struct hast_doorbell *bell, int efd);
/* Wakes whether it sleeps or not. 0 or -errno. */
int hast_doorbell_force(struct hast_doorbell *bell, int efd);
/* Empties the eventfd after its wait. 0 or -errno. */
int hast_doorbell_drain(int efd);
/* cffi: end */

/* Call after pushing. 0, or -errno of the wake-up call. */
static inline int
hast_doorbell_ring(struct hast_doorbell *bell, int efd)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&bell->sleeping, __ATOMIC_RELAXED) == 0)
		return 0;
	return hast_doorbell_ring_out(bell, efd);
}

#endif
