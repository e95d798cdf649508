/*
 * The sequencer's resynchronisation: copies extents that are marked in `sync` from the node that has the newer data to the
 * other one, in chunks of a slab, a window of them under way.
 *
 * Invariants:
 * - a chunk holds the range lock from the start of its read until its write has completed (3 order): clients'
 *   mutations of that range come before or after it as a whole;
 * - an extent leaves `sync` when all its chunks were copied since it was chosen and nothing failed on it meanwhile; its dirty
 *   bit stays until both nodes have completed a flush (2 clean after durable);
 * - HAST_SEQ_SYNC_DONE is raised when `sync` is empty and both nodes have completed a flush after the last copy;
 * - beside clients only a few short chunks are under way, and between the beginnings of two as many client requests come to their
 *   end as there were in here at the first one's; but the copying always gets on;
 * - nothing is copied from a component that has failed a flush: what it has lost may be whole on the other node.
 */
#include <errno.h>
#include <string.h>

#include "seq.h"
#include "seq_internal.h"

/* While clients want the disks and the link as well: chunks under way, and which part of a slab they are; a request of
   theirs may have to wait for a whole one. */
#define BESIDE_CHUNKS 2u
#define BESIDE_PART 2u

static uint8_t *
sync_of(struct hast_arena *a)
{
	return (uint8_t *)a + a->sync_off;
}

static int
is_active(const struct hast_seq *s, uint64_t extent)
{
	for (int i = 0; i < HAST_SYNC_EXTENTS; i++)
		if (s->sync_extent[i].used && s->sync_extent[i].extent == extent)
			return 1;
	return 0;
}

/* The next marked extent from the cursor on that is not being copied, or nextents. */
static uint64_t
find_marked(struct hast_arena *a, uint64_t from)
{
	const uint8_t *sync = sync_of(a);

	for (uint64_t n = from; n < a->nextents; n++) {
		if (sync[n >> 3] == 0) {
			n |= 7;
			continue;
		}
		if (bit_test(sync, n) && !is_active(seq_of(a), n))
			return n;
	}
	return a->nextents;
}

int
seq_sync_marked(struct hast_arena *a, const struct hast_bio *bio)
{
	uint64_t last = (bio->offset + bio->length - 1) >> a->extent_shift;

	for (uint64_t n = bio->offset >> a->extent_shift; n <= last; n++)
		if (bit_test(sync_of(a), n))
			return 1;
	return 0;
}

/* ---- chunks ---- */

static void
chunk_free(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	bio->state = HAST_BIO_FREE;
	bio->cmd = HAST_CMD_NONE;
	bio->next = s->sync_free_head;
	s->sync_free_head = bio->slot;
	s->sync_chunks--;
	s->inuse--;
}

/* Does the chunk belong to the resynchronisation that runs now? One that an earlier one has left may be on its way in the
   other direction. */
static int
is_current(struct hast_arena *a, const struct hast_bio *bio)
{
	const struct hast_seq *s = seq_of(a);
	const struct hast_sync_extent *e = &s->sync_extent[bio->request];

	return s->sync_on && s->connected && e->used && e->epoch == bio->sync_epoch;
}

/* The extent that is copied in place i is through, or given up. */
static void
extent_over(struct hast_arena *a, struct hast_sync_extent *e)
{
	struct hast_seq *s = seq_of(a);

	e->used = 0;
	if (e->failed) {
		s->sync_failed++;
		return;
	}
	sync_of(a)[e->extent >> 3] &= (uint8_t)~(1u << (e->extent & 7));
	seq_map_copied(a, e->extent);
	s->sync_copied++;
}

static void
spoil(struct hast_arena *a, struct hast_sync_extent *e)
{
	if (!e->used)
		return;
	e->failed = 1;
	/* No chunk is there that would come back and find it failed. */
	if (e->out == 0)
		extent_over(a, e);
}

void
seq_sync_spoil(struct hast_arena *a, uint64_t extent)
{
	struct hast_seq *s = seq_of(a);

	for (int i = 0; i < HAST_SYNC_EXTENTS; i++)
		if (s->sync_extent[i].extent == extent)
			spoil(a, &s->sync_extent[i]);
}

void
seq_sync_spoil_all(struct hast_arena *a)
{
	for (int i = 0; i < HAST_SYNC_EXTENTS; i++)
		spoil(a, &seq_of(a)->sync_extent[i]);
}

static void
chunk_over(struct hast_arena *a, struct hast_bio *bio, int failed)
{
	struct hast_seq *s = seq_of(a);
	struct hast_sync_extent *e = &s->sync_extent[bio->request];
	int current = is_current(a, bio);

	seq_unlock(a, bio);
	chunk_free(a, bio);
	if (!current)
		return;		/* of a resynchronisation that was broken off */
	e->failed |= (uint8_t)failed;
	e->out--;
	if (e->out == 0 && (e->next == e->end || e->failed))
		extent_over(a, e);
	seq_sync_pump(a);
}

static void
chunk_push(struct hast_arena *a, struct hast_bio *bio, int component, uint8_t cmd)
{
	bio->cmd = cmd;
	bio->error[component] = 0;
	bio->used |= (uint8_t)(1u << component);
	if (component == HAST_REMOTE) {
		seq_push_remote(a, bio);
	} else {
		bio->pending |= 1u << HAST_LOCAL;
		seq_push(a, HAST_RING_DISK, bio->slot);
	}
}

/* Only the local component can be one that is not to be copied from: of the other node that is the end of the connection. */
int
seq_sync_source(const struct hast_seq *s)
{
	return s->sync_remote || !s->no_source;
}

void
seq_sync_start_chunk(struct hast_arena *a, struct hast_bio *bio)
{
	struct hast_seq *s = seq_of(a);

	bio->state = HAST_BIO_RUNNING;
	if (!is_current(a, bio) || !seq_sync_source(s)) {
		chunk_over(a, bio, 1);
		return;
	}
	chunk_push(a, bio, s->sync_remote ? HAST_REMOTE : HAST_LOCAL, HAST_CMD_READ);
}

void
seq_sync_chunk_done(struct hast_arena *a, struct hast_bio *bio, int component)
{
	struct hast_seq *s = seq_of(a);
	int error = bio->error[component];

	if (error != 0 && component == HAST_REMOTE && s->connected)
		seq_raise(a, HAST_SEQ_REMOTE_FAILED);
	if (error != 0 && component == HAST_LOCAL)
		(void)seq_turn(a, 0);
	if (error == 0 && bio->cmd == HAST_CMD_READ && component == HAST_LOCAL && !seq_sync_source(s))
		error = EIO;	/* it may have been lost before it was read */
	if (error == 0 && bio->cmd == HAST_CMD_READ && !seq_peer_there(a))
		error = EIO;	/* it has failed a flush, perhaps, and lost this; or it gets nothing any more */
	if (error == 0 && bio->cmd == HAST_CMD_READ && is_current(a, bio)) {
		s->sync_bytes += bio->length;
		chunk_push(a, bio, component == HAST_LOCAL ? HAST_REMOTE : HAST_LOCAL, HAST_CMD_WRITE);
		return;
	}
	chunk_over(a, bio, error != 0 || bio->cmd == HAST_CMD_READ);
}

/* Requests in here that are no chunks. */
static uint32_t
clients(const struct hast_seq *s)
{
	return s->inuse - s->sync_chunks;
}

/* Are there clients, or were there a moment ago? */
static int
beside(const struct hast_seq *s)
{
	return clients(s) > 0 || s->sync_beside;
}

/* Those that the last chunk met here have gone before this one, or get nowhere: they may wait for this very copying. */
static int
has_turn(const struct hast_seq *s)
{
	return clients(s) == 0 || !s->sync_beside || s->finished >= s->sync_turn;
}

static void
chunk_issue(struct hast_arena *a, uint32_t place)
{
	struct hast_seq *s = seq_of(a);
	struct hast_sync_extent *e = &s->sync_extent[place];
	struct hast_bio *bio = bio_of(a, s->sync_free_head);
	uint32_t most = beside(s) ? a->geo.slab_size / BESIDE_PART : a->geo.slab_size;

	s->sync_free_head = bio->next;
	bio->cmd = HAST_CMD_READ;
	bio->flags = HAST_BIO_SYNC;
	bio->held = 0;
	bio->request = place;
	bio->sync_epoch = e->epoch;
	bio->offset = e->next;
	bio->length = e->end - e->next < most ? e->end - e->next : most;
	e->next += bio->length;
	e->out++;
	if (s->sync_rate != 0)
		s->sync_credit -= (int64_t)bio->length * 1000;
	if (!has_turn(s))
		s->sync_floor -= s->sync_floor < bio->length ? s->sync_floor : (uint32_t)bio->length;
	s->sync_turn = s->finished + clients(s);
	s->sync_chunks++;
	seq_prepare(a, bio);
	seq_lock(a, bio);
}

/* ---- which extent, and when ---- */

/* A place with chunks to hand out, choosing a new extent when there is room for one; HAST_SYNC_EXTENTS when there is nothing. */
static uint32_t
choose_place(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	uint32_t unused = HAST_SYNC_EXTENTS;
	uint64_t extent;

	for (uint32_t i = 0; i < HAST_SYNC_EXTENTS; i++) {
		const struct hast_sync_extent *e = &s->sync_extent[i];

		if (e->used && !e->failed && e->next < e->end)
			return i;
		if (!e->used)
			unused = i;
	}
	if (unused == HAST_SYNC_EXTENTS)
		return HAST_SYNC_EXTENTS;
	extent = find_marked(a, s->sync_cursor);
	s->sync_cursor = extent < a->nextents ? extent + 1 : extent;
	if (extent == a->nextents)
		return HAST_SYNC_EXTENTS;
	if (!seq_map_ondisk(a, extent)) {
		/* After the next tick. Who has marked it may have met an update under way, and nobody else writes its bit. */
		seq_map_start(a);
		s->sync_failed++;
		return HAST_SYNC_EXTENTS;
	}

	struct hast_sync_extent *e = &s->sync_extent[unused];

	memset(e, 0, sizeof(*e));
	e->used = 1;
	e->epoch = ++s->sync_epoch;
	e->extent = extent;
	e->next = extent << a->extent_shift;
	e->end = e->next + a->geo.extentsize;
	if (e->end > a->geo.datasize)
		e->end = a->geo.datasize;
	return unused;
}

/* Nothing is under way and the cursor is at the end: again from the start, or done. */
static void
pass_over(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	for (int i = 0; i < HAST_SYNC_EXTENTS; i++)
		if (s->sync_extent[i].used)
			return;
	if (s->sync_cursor < a->nextents || s->sync_failed != 0)
		return;
	if (find_marked(a, 0) < a->nextents) {
		s->sync_cursor = 0;	/* marked while we were further on */
		s->sync_flush = 0;
		seq_sync_pump(a);
		return;
	}
	/* What was copied has to be durable on both before anybody relies on it. */
	if (s->sync_flush == 0)
		s->sync_flush = s->epoch;
	if (s->flushed < s->sync_flush)
		(void)seq_own_flush(a);
}

void
seq_sync_pump(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);
	uint32_t window = beside(s) ? BESIDE_CHUNKS : a->geo.nsync;

	s->sync_held = 0;
	/* A secondary that has failed something is going to be lost, and no target of a synchronisation that it knows of. */
	if (!s->sync_on || !seq_peer_there(a) || !seq_sync_source(s))
		return;
	while (s->sync_chunks < window && s->sync_free_head != HAST_NONE &&
	    (s->sync_rate == 0 || s->sync_credit > 0)) {
		uint32_t place;

		if (!has_turn(s) && s->sync_floor == 0) {
			s->sync_held = 1;
			return;
		}
		place = choose_place(a);
		if (place == HAST_SYNC_EXTENTS) {
			pass_over(a);
			return;
		}
		chunk_issue(a, place);
	}
}

void
seq_sync_turn(struct hast_arena *a)
{
	if (seq_of(a)->sync_held && has_turn(seq_of(a)))
		seq_sync_pump(a);
}

void
seq_sync_flushed(struct hast_arena *a, int failed)
{
	struct hast_seq *s = seq_of(a);

	if (!s->sync_on)
		return;
	seq_sync_saved(a, failed);
	if (s->sync_flush == 0)
		return;
	if (failed) {
		/* The next tick tries again: at once it might go on like this as fast as the disk can fail. */
		s->sync_flush = 0;
		s->sync_failed = 1;
		return;
	}
	if (find_marked(a, 0) < a->nextents) {
		s->sync_flush = 0;
		s->sync_cursor = 0;
		seq_sync_pump(a);
	} else if (s->flushed >= s->sync_flush) {
		s->sync_on = 0;
		s->sync_save = 0;
		s->peer_whole = 1;
		s->settling = s->sync_remote;
		seq_grant_settled(a);
		s->events |= HAST_SEQ_SYNC_DONE;
	} else {
		(void)seq_own_flush(a);
	}
}

void
hast_seq_sync_start(struct hast_arena *a, int from_remote)
{
	struct hast_seq *s = seq_of(a);

	s->sync_begun = 1;
	/* The local component is failing at this moment: it is decided soon what is to be copied, and whither. */
	if (s->turning)
		return;
	memset(s->sync_extent, 0, sizeof(s->sync_extent));
	s->sync_remote = from_remote != 0;
	s->sync_on = !s->detached;
	s->sync_cursor = 0;
	s->sync_flush = 0;
	s->sync_failed = 0;
	s->sync_copied = 0;
	s->sync_bytes = 0;
	seq_sync_time_start(s);
	seq_sync_pump(a);
}

/* A new connection starts anew; until then reads of marked extents still belong to the other node. */
void
seq_sync_stop(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	s->sync_on = 0;
	s->sync_save = 0;
	memset(s->sync_extent, 0, sizeof(s->sync_extent));
}

void
hast_seq_sync_end(struct hast_arena *a)
{
	seq_sync_stop(a);
	seq_of(a)->sync_begun = 0;
}

int
seq_sync_any(struct hast_arena *a)
{
	const uint8_t *sync = sync_of(a);

	for (uint64_t n = 0; n < (a->nextents + 7) / 8; n++)
		if (sync[n] != 0)
			return 1;
	return 0;
}

void
seq_sync_again(struct hast_arena *a)
{
	struct hast_seq *s = seq_of(a);

	if (!s->sync_begun || !s->connected || s->sync_on || s->turning || s->detached || find_marked(a, 0) == a->nextents)
		return;
	s->sync_on = 1;
	s->sync_cursor = 0;
	s->sync_flush = 0;
	s->sync_failed = 1;	/* not at once: whatever has failed may go on failing */
}
