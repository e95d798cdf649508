#include "doorbell.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long
futex(uint32_t *word, int op, uint32_t value, const struct timespec *timeout)
{
	/* Not FUTEX_PRIVATE: the word is shared between processes. */
	return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

void
hast_doorbell_init(struct hast_doorbell *bell)
{
	__atomic_store_n(&bell->sleeping, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&bell->word, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&bell->wakes, 0, __ATOMIC_RELEASE);
}

void
hast_doorbell_announce(struct hast_doorbell *bell)
{
	__atomic_store_n(&bell->sleeping, 1, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

void
hast_doorbell_cancel(struct hast_doorbell *bell)
{
	__atomic_store_n(&bell->sleeping, 0, __ATOMIC_RELAXED);
}

int
hast_doorbell_wait(struct hast_doorbell *bell, int timeout_ms)
{
	struct timespec ts = { timeout_ms / 1000, (long)(timeout_ms % 1000) * 1000000L };
	uint32_t word = __atomic_load_n(&bell->word, __ATOMIC_ACQUIRE);
	int result = 0;

	/* A ring between the announcement and this load took the announcement: do not wait for another. */
	if (__atomic_load_n(&bell->sleeping, __ATOMIC_ACQUIRE) == 0)
		return 0;
	if (futex(&bell->word, FUTEX_WAIT, word, timeout_ms < 0 ? NULL : &ts) == -1 && errno != EAGAIN)
		result = errno == ETIMEDOUT ? 1 : -errno;
	hast_doorbell_cancel(bell);
	return result;
}

static int
wake(struct hast_doorbell *bell, int efd)
{
	__atomic_fetch_add(&bell->wakes, 1, __ATOMIC_RELAXED);
	__atomic_fetch_add(&bell->word, 1, __ATOMIC_RELEASE);
	if (efd < 0)
		return futex(&bell->word, FUTEX_WAKE, INT_MAX, NULL) == -1 ? -errno : 0;

	uint64_t one = 1;
	ssize_t done;

	do
		done = write(efd, &one, sizeof(one));
	while (done == -1 && errno == EINTR);
	/* EAGAIN: the counter is full, so it is readable, which is all that a wake-up has to achieve. (Where nobody drains it, that
	   takes 2^64 wake-ups.) */
	return done == -1 && errno != EAGAIN ? -errno : 0;
}

int
hast_doorbell_ring_out(struct hast_doorbell *bell, int efd)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_exchange_n(&bell->sleeping, 0, __ATOMIC_ACQ_REL) == 0)
		return 0;
	return wake(bell, efd);
}

int
hast_doorbell_force(struct hast_doorbell *bell, int efd)
{
	__atomic_store_n(&bell->sleeping, 0, __ATOMIC_RELEASE);
	return wake(bell, efd);
}

int
hast_doorbell_drain(int efd)
{
	uint64_t count;
	ssize_t done;

	do
		done = read(efd, &count, sizeof(count));
	while (done == -1 && errno == EINTR);
	return done == -1 && errno != EAGAIN ? -errno : 0;
}
