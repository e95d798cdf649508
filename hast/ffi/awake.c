#include "awake.h"

#include <unistd.h>

#define ANY 2000000000		/* us: no demand, as the kernel has it (PM_QOS_CPU_LATENCY_DEFAULT_VALUE) */

void
hast_awake_init(struct hast_awake *a, int fd, int32_t limit)
{
	a->fd = fd;
	a->limit = limit;
	a->busy = a->held = 0;
}

static void
ask(struct hast_awake *a, int held)
{
	int32_t us = held ? a->limit : ANY;

	if (write(a->fd, &us, sizeof(us)) != (ssize_t)sizeof(us)) {
		a->fd = -1;
		held = 0;
	}
	a->held = held;
}

int
hast_awake_patience(struct hast_awake *a, int timeout)
{
	if (a->busy && !a->held && a->fd != -1)
		ask(a, 1);
	return a->held && (timeout == -1 || timeout > HAST_AWAKE_MS) ? HAST_AWAKE_MS : timeout;
}

void
hast_awake_waited(struct hast_awake *a, int n, int timeout)
{
	if (n > 0) {
		a->busy = 1;
	} else if (timeout != 0) {
		a->busy = 0;
		if (a->held)
			ask(a, 0);
	}
}
