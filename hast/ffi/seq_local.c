/*
 * The sequencer while the local component is out of date: because it has failed, or because the secondary was primary meanwhile.
 *
 * Then the secondary's disk is the truth (sync_remote). That is stored before anything is acknowledged because of it, and after
 * a restart all that the map marks is taken from there. So nothing may be acknowledged that only this node has:
 * - a mutation is acknowledged when the secondary has it durably: its write has completed there, and a flush since;
 * - nothing is read there that it could lose again: when it comes, it flushes first (confirming);
 * - what cannot be done without the secondary waits for it, and fails when hast_seq_give_up() says so;
 * - a mutation that the secondary did not get is launched once more when it is back, its range is locked until then.
 *
 * A component that fails (turning): possible only while the secondary has every acknowledged write (peer_whole). First a flush
 * makes that durable there, while nothing is acknowledged that it does not cover; then HAST_SEQ_LOCAL_FAILED has it stored;
 * then those who have waited are answered as if nothing had happened. Where that is not possible they get the local error.
 */
#include <errno.h>

#include "seq.h"
#include "seq_internal.h"

#define REMOTE (1u << HAST_REMOTE)

int
seq_peer_there(struct hast_arena *a)
{
	const struct hast_seq *s = seq_of(a);

	return s->connected && (s->asked & HAST_SEQ_REMOTE_FAILED) == 0;
}

int
seq_held(struct hast_arena *a)
{
	const struct hast_seq *s = seq_of(a);

	return s->joining || (s->sync_remote && !s->given_up && (!seq_peer_there(a) || s->confirming));
}

/* A read that is not to be believed here waits also while it comes to light that the secondary can't take this component's place:
   then it is done here after all. */
int
seq_read_held(struct hast_arena *a)
{
	const struct hast_seq *s = seq_of(a);

	return seq_held(a) || (s->turning && !s->sync_remote && !seq_peer_there(a));
}

int
seq_hopeless(struct hast_arena *a)
{
	const struct hast_seq *s = seq_of(a);

	return s->sync_remote && s->given_up && !s->connected;
}

int
seq_strict(struct hast_arena *a)
{
	const struct hast_seq *s = seq_of(a);

	return s->sync_remote || s->turning;
}

/* ---- those who wait until the secondary has what they wrote ---- */

#define NEVER UINT64_MAX		/* the secondary has not done it: nothing that it flushes makes it durable there */

void
seq_durable_wait(struct hast_arena *a, struct hast_bio *bio, int remote_ok)
{
	struct hast_seq *s = seq_of(a);

	bio->state = HAST_BIO_DURABLEWAIT;
	if (!remote_ok)
		bio->durable_epoch = NEVER;
	seq_list_append(a, &s->durable_head, &s->durable_tail, bio->slot);
	if (remote_ok)
		(void)seq_own_flush(a);
}

/* The secondary has not done it, or is not to be relied on any more: as if that came to light now. */
static void
resolve(struct hast_arena *a, struct hast_bio *bio)
{
	bio->state = HAST_BIO_RUNNING;
	if (bio->error[HAST_REMOTE] == 0)
		bio->error[HAST_REMOTE] = ENOTCONN;
	if (is_mutation(bio))
		seq_mutation_step(a, bio);
	else
		seq_flush_over(a, bio, bio->error[HAST_LOCAL], 0);
}

/* The answer does not depend on the local component, or that was fine. */
static int
may_be_answered(const struct hast_seq *s, const struct hast_bio *bio)
{
	if (bio->durable_epoch > s->flushed_remote)
		return 0;
	return bio->error[HAST_LOCAL] == 0 || (s->sync_remote && !s->turning && !s->settling);
}

static void
answer(struct hast_arena *a, struct hast_bio *bio, int result)
{
	seq_acknowledge(a, bio, result);
	if (is_mutation(bio))
		seq_mutation_over(a, bio, bio->error[HAST_LOCAL] == 0 && !seq_of(a)->detached);
	else
		seq_finish(a, bio);
}

/* Takes the list away: what is done with its bios may put others into it. */
static uint32_t
take_all(struct hast_seq *s)
{
	uint32_t slot = s->durable_head;

	s->durable_head = HAST_NONE;
	return slot;
}

void
seq_durable_go_on(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	uint32_t slot = take_all(s);
	int flush = 0;

	while (slot != HAST_NONE) {
		struct hast_bio *bio = bio_of(a, slot);

		slot = bio->next;
		if (may_be_answered(s, bio)) {
			answer(a, bio, 0);
			continue;
		}
		if (bio->durable_epoch == NEVER && !s->turning) {
			resolve(a, bio);
			continue;
		}
		/* This component is not out of date any more, or is not when that is stored, and is not going to be: it counts
		   what it has failed. */
		if (bio->error[HAST_LOCAL] != 0 && (!seq_strict(a) || (s->settling && s->no_turn && !s->turning))) {
			answer(a, bio, bio->error[HAST_LOCAL]);
			continue;
		}
		flush |= bio->durable_epoch > s->flushed_remote && bio->durable_epoch != NEVER;
		seq_list_append(a, &s->durable_head, &s->durable_tail, bio->slot);
	}
	if (s->turning && !s->turn_told) {
		flush |= s->turn_epoch > s->flushed_remote;
		/* The whole map is going to be written: nobody else may be writing it. */
		if (s->turn_epoch <= s->flushed_remote && !(s->turn_detach && s->map_busy)) {
			s->turn_told = 1;
			seq_raise(a, HAST_SEQ_LOCAL_FAILED);
		}
	}
	flush |= (int)s->confirming;
	if (flush && seq_peer_there(a))
		(void)seq_own_flush(a);
}

void
seq_confirm(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	if (!s->sync_remote)
		return;
	s->confirming = 1;
	s->confirm_epoch = s->epoch;
}

void
seq_durable_lost(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	uint32_t slot = take_all(s);

	while (slot != HAST_NONE) {
		struct hast_bio *bio = bio_of(a, slot);

		slot = bio->next;
		resolve(a, bio);
	}
}

/* ---- the secondary takes the component's place ---- */

int
seq_turn(struct hast_arena *a, int detach)
{
	struct hast_seq *s = seq_of(a);

	if (s->detached || (s->sync_remote && !s->settling && !detach && (!s->detach_on_error || s->no_turn)))
		return 1;	/* known already; or it can't be given up, but is out of date all the same */
	if (!seq_peer_there(a) || s->no_turn || !(s->peer_whole || s->sync_remote))
		return 0;
	/* As long as the worker has not said what becomes of it: it is to write the whole map only where nobody else is writing it. */
	if (!(s->turning && s->turn_told && s->map_busy))
		s->turn_detach |= (uint32_t)(detach || s->detach_on_error);
	if (!s->turning) {
		s->turning = 1;
		s->turn_told = 0;
		s->turn_epoch = s->epoch;
		/* What is being copied comes out of a component that is not to be trusted, or goes into one. */
		seq_sync_stop(a);
		(void)seq_own_flush(a);
	}
	return 1;
}

static void
turned(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	s->turning = s->turn_detach = s->turn_told = s->cache_lost = 0;
	s->asked &= ~(uint32_t)HAST_SEQ_LOCAL_FAILED;
}

void
hast_seq_outdated(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	turned(a);
	s->settling = 0;
	s->sync_remote = 1;
	seq_grant_void(a);
	/* First those who have waited: they mark what is to be copied. */
	seq_durable_go_on(a);
	if (s->connected)
		hast_seq_sync_start(a, 1);
	seq_map_wake(a);
}

void
hast_seq_detach(struct hast_arena *a)
{
	seq_of(a)->detached = 1;
	seq_map_detach(a);
	hast_seq_outdated(a);
}

/* What has failed here and did not fail there is told all the same; the rest is done on both. */
void
hast_seq_local_refused(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	uint32_t slot;

	seq_heed_loss(a);
	turned(a);
	s->no_turn = 1;
	slot = take_all(s);
	while (slot != HAST_NONE) {
		struct hast_bio *bio = bio_of(a, slot);

		slot = bio->next;
		if (bio->durable_epoch == NEVER)
			resolve(a, bio);
		else if (s->sync_remote && !s->settling)
			seq_list_append(a, &s->durable_head, &s->durable_tail, bio->slot);
		else
			answer(a, bio, bio->error[HAST_LOCAL]);
	}
	seq_durable_go_on(a);
	seq_sync_again(a);
	seq_map_start(a);
	seq_map_wake(a);
}

void
hast_seq_current(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	if (!s->settling)
		return;
	s->settling = 0;
	s->sync_remote = 0;
	seq_durable_go_on(a);
	seq_map_wake(a);
	seq_flush_resume(a);
}

void
hast_seq_give_up(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	if (!s->sync_remote || s->connected || s->joining)
		return;
	s->given_up = 1;
	seq_map_wake(a);
	seq_flush_resume(a);
}
