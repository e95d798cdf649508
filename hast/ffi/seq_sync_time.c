/*
 * What time brings to a resynchronisation: its rate, its share beside clients, the saving of what was copied, and another try
 * for what failed. The sequencer has no clock: hast_seq_sync_tick() is told how much time has passed.
 *
 * Invariants:
 * - an interruption, of whatever kind, takes back no more than about a second of copying: that often both nodes flush what was
 *   copied, and the map on disk is cleared of it;
 * - beside clients it gets on, however long their requests take: FLOOR;
 * - what can't be copied is tried again, but no more than once per second while nothing else gets on.
 */
#include "seq.h"
#include "seq_internal.h"

/* What is issued beside clients in any case, bytes per ms: a request of theirs may take long. */
#define FLOOR 40000u
/* A rate of more bytes per second is none; so much time's share may be issued at once. */
#define FASTEST (UINT64_C(1) << 40)
#define CREDIT_MS 250u
/* Between two flushes of what was copied: few, but where connections last for moments only, it has to get on as well. */
#define FIRST_SAVE_MS 100u
#define SAVE_MS 1000u

void
seq_sync_time_start(struct hast_seq *s)
{
	s->sync_saved = s->sync_save = s->sync_unsaved_ms = 0;
	s->sync_pause_ms = FIRST_SAVE_MS;
	s->sync_tried = 0;
	s->sync_retry_ms = s->sync_waited_ms = 0;
}

/* ---- saving ---- */

/* So that an interruption does not cost all that was copied: both flush it, then it is cleared in the map. */
static void
save(struct hast_arena *a, uint32_t elapsed_ms)
{
	struct hast_seq *s = seq_of(a);

	s->sync_unsaved_ms += elapsed_ms;
	if (s->sync_unsaved_ms < s->sync_pause_ms || s->sync_save != 0 || s->sync_saved == s->sync_copied)
		return;
	s->sync_unsaved_ms = 0;
	s->sync_pause_ms = s->sync_pause_ms < SAVE_MS / 2 ? s->sync_pause_ms * 2 : SAVE_MS;
	s->sync_saved = s->sync_copied;
	s->sync_save = s->epoch;
	(void)seq_own_flush(a);
}

void
seq_sync_saved(struct hast_arena *a, int failed)
{
	struct hast_seq *s = seq_of(a);

	if (s->sync_save == 0)
		return;
	if (!failed && s->flushed < s->sync_save) {
		(void)seq_own_flush(a);		/* the one before it, which may have passed a copy */
		return;
	}
	s->sync_save = 0;
	if (failed)
		return;
	(void)seq_map_clean(a);
	seq_map_start(a);
}

/* ---- time ---- */

/* Extents that failed get another chance: soon while others can be copied, else after ever longer pauses. */
static void
retry(struct hast_seq *s, uint32_t elapsed_ms)
{
	if (s->sync_failed == 0 || s->sync_chunks != 0)
		return;
	s->sync_waited_ms += elapsed_ms;
	if (s->sync_waited_ms < s->sync_retry_ms)
		return;
	s->sync_waited_ms = 0;
	s->sync_retry_ms = s->sync_copied != s->sync_tried ? 0 : 2 * s->sync_retry_ms + HAST_SYNC_TICK_MS;
	if (s->sync_retry_ms > HAST_SYNC_STUCK_MS)
		s->sync_retry_ms = HAST_SYNC_STUCK_MS;
	s->sync_tried = s->sync_copied;
	s->sync_failed = 0;
	s->sync_cursor = 0;
}

/* Its share of the rate. Unused it does not pile up. */
static void
earn(struct hast_seq *s, uint32_t elapsed_ms)
{
	int64_t rate = (int64_t)(s->sync_rate < FASTEST ? s->sync_rate : FASTEST);
	int64_t most = rate * CREDIT_MS;

	s->sync_credit += rate * (elapsed_ms < CREDIT_MS ? elapsed_ms : CREDIT_MS);
	if (s->sync_credit > most)
		s->sync_credit = most;
}

void
hast_seq_sync_tick(struct hast_arena *a, uint32_t elapsed_ms)
{
	struct hast_seq *s = seq_of(a);

	if (!s->sync_on)
		return;
	retry(s, elapsed_ms);
	earn(s, elapsed_ms);
	s->sync_beside = s->finished != s->sync_finished;
	s->sync_finished = s->finished;
	/* One chunk at least. */
	s->sync_floor = FLOOR * (elapsed_ms < 1000 ? elapsed_ms : 1000) + 1;
	save(a, elapsed_ms);
	seq_sync_pump(a);
}

uint32_t
hast_seq_sync_patience(struct hast_arena *a)
{
	const struct hast_seq *s = seq_of(a);

	if (!s->sync_on)
		return 0;
	if (s->sync_chunks != 0)
		return HAST_SYNC_TICK_MS;
	if (!seq_peer_there(a) || !seq_sync_source(s))
		return HAST_SYNC_STUCK_MS;
	return s->sync_failed != 0 && s->sync_retry_ms == HAST_SYNC_STUCK_MS ? HAST_SYNC_STUCK_MS : HAST_SYNC_TICK_MS;
}
