/*
 * THREADS: a pool of threads makes the calls, where there is no io_uring.
 *
 * Invariants:
 * - a thread touches an op only between taking it from `todo` and putting it into `finished`, and of the context only what
 *   never changes; shared memory (rings, bios) is the pump's alone, but for the slab of its op and the doorbell;
 * - signals are the pump's: the threads block them all.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "disk_io.h"
#include "doorbell.h"

struct pool {
	struct hast_disk *d;
	pthread_mutex_t lock;
	pthread_cond_t work;
	struct disk_list todo;
	struct disk_list finished;
	int stop;
	uint32_t nthreads;
	pthread_t thread[];
};

static void *
worker(void *arg)
{
	struct pool *pool = arg;
	struct hast_disk *d = pool->d;

	(void)pthread_mutex_lock(&pool->lock);
	for (;;) {
		struct disk_op *op = disk_list_take(&pool->todo);

		if (op == NULL && pool->stop)
			break;
		if (op == NULL) {
			(void)pthread_cond_wait(&pool->work, &pool->lock);
			continue;
		}
		(void)pthread_mutex_unlock(&pool->lock);
		op->result = disk_perform(d, op);
		(void)pthread_mutex_lock(&pool->lock);
		disk_list_add(&pool->finished, op);
		(void)pthread_mutex_unlock(&pool->lock);
		/* A failure here means a bad descriptor, and the pump fails on the same one. */
		(void)hast_doorbell_ring(d->bell, d->opt.own_bell);
		(void)pthread_mutex_lock(&pool->lock);
	}
	(void)pthread_mutex_unlock(&pool->lock);
	return NULL;
}

static void
threads_close(struct hast_disk *d)
{
	struct pool *pool = d->state;

	(void)pthread_mutex_lock(&pool->lock);
	pool->stop = 1;
	(void)pthread_cond_broadcast(&pool->work);
	(void)pthread_mutex_unlock(&pool->lock);
	for (uint32_t i = 0; i < pool->nthreads; i++)
		(void)pthread_join(pool->thread[i], NULL);
	(void)pthread_cond_destroy(&pool->work);
	(void)pthread_mutex_destroy(&pool->lock);
	free(pool);
	d->state = NULL;
}

static int
threads_open(struct hast_disk *d)
{
	struct pool *pool = calloc(1, sizeof(*pool) + d->opt.depth * sizeof(pthread_t));
	sigset_t all, old;
	int error = 0;

	if (pool == NULL)
		return -ENOMEM;
	pool->d = d;
	if (pthread_mutex_init(&pool->lock, NULL) != 0 || pthread_cond_init(&pool->work, NULL) != 0) {
		free(pool);
		return -ENOMEM;
	}
	d->state = pool;
	d->limit = d->nslots;
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &old);
	while (error == 0 && pool->nthreads < d->opt.depth) {
		error = pthread_create(&pool->thread[pool->nthreads], NULL, worker, pool);
		if (error == 0)
			pool->nthreads++;
	}
	(void)pthread_sigmask(SIG_SETMASK, &old, NULL);
	/* Fewer than wanted will do. */
	if (pool->nthreads > 0)
		return 0;
	threads_close(d);
	return -error;
}

static void
threads_start(struct hast_disk *d, struct disk_op *op)
{
	struct pool *pool = d->state;

	(void)pthread_mutex_lock(&pool->lock);
	disk_list_add(&pool->todo, op);
	(void)pthread_cond_signal(&pool->work);
	(void)pthread_mutex_unlock(&pool->lock);
}

/* The threads ring the doorbell, as the sequencer does: so what they finished before it was announced is looked for now. */
static int
threads_wait(struct hast_disk *d, int block)
{
	struct pool *pool = d->state;

	if (block) {
		(void)pthread_mutex_lock(&pool->lock);
		block = pool->finished.head == NULL;
		(void)pthread_mutex_unlock(&pool->lock);
	}
	return disk_poll(d, block);
}

static void
threads_reap(struct hast_disk *d)
{
	struct pool *pool = d->state;
	struct disk_list finished;
	struct disk_op *op;

	(void)pthread_mutex_lock(&pool->lock);
	finished = pool->finished;
	pool->finished.head = NULL;
	(void)pthread_mutex_unlock(&pool->lock);
	while ((op = disk_list_take(&finished)) != NULL)
		disk_result(d, op, op->result);
}

const struct disk_engine disk_threads = {
	.open = threads_open,
	.close = threads_close,
	.start = threads_start,
	.wait = threads_wait,
	.reap = threads_reap,
};
