/* What the sequencer's files share: seq*.c. */
#ifndef HAST_SEQ_INTERNAL_H
#define HAST_SEQ_INTERNAL_H

#include "seq.h"

static inline struct hast_seq *
seq_of(struct hast_arena *a)
{
	return (struct hast_seq *)((char *)a + a->seq_off);
}

static inline struct hast_bio *
bio_of(struct hast_arena *a, uint32_t slot)
{
	return (struct hast_bio *)((char *)a + a->bio_off) + slot;
}

static inline uint32_t
map_slot(const struct hast_arena *a)
{
	return a->nslots - 2;
}

static inline uint32_t
own_flush_slot(const struct hast_arena *a)
{
	return a->nslots - 1;
}

static inline int
bit_test(const uint8_t *map, uint64_t n)
{
	return map[n >> 3] >> (n & 7) & 1;
}

/* Mutations under way or waiting, in order of arrival. */
static inline uint32_t *
active_of(struct hast_arena *a)
{
	return (uint32_t *)((char *)a + a->active_off);
}

static inline int
is_mutation(const struct hast_bio *bio)
{
	return bio->cmd == HAST_CMD_WRITE || bio->cmd == HAST_CMD_DELETE;
}

/* Whatever the stage does next, it does it knowing what another process has been told by the disk. */
static inline void
seq_heed_loss(struct hast_arena *a)
{
	if (__builtin_expect(__atomic_load_n(&seq_of(a)->loss, __ATOMIC_ACQUIRE) == HAST_SEQ_LOSS_TOLD, 0))
		hast_seq_local_flush_failed(a);
}

/* ---- seq.c ---- */

void seq_push(struct hast_arena *a, int ring, uint32_t slot);
/* A client's bio, to the local component. */
void seq_push_local(struct hast_arena *a, const struct hast_bio *bio);
void seq_raise(struct hast_arena *a, uint32_t event);
void seq_list_append(struct hast_arena *a, uint32_t *head, uint32_t *tail, uint32_t slot);
/* The mutation's extents are durable in the map: to the components. */
void seq_launch(struct hast_arena *a, struct hast_bio *bio);
/* The mutation never reached a component and is answered with this error. */
void seq_refuse(struct hast_arena *a, struct hast_bio *bio, int error);
/* A read that the secondary cannot be asked for. */
void seq_read_here(struct hast_arena *a, struct hast_bio *bio);
void seq_count_error(struct hast_arena *a, const struct hast_bio *bio);

/* ---- seq_slots.c ---- */

/* All of them are free. */
void seq_slots_init(struct hast_arena *a);
/* What the client is told; the slot is done when `finish` was called, too. */
void seq_acknowledge(struct hast_arena *a, struct hast_bio *bio, int result);
/* The sequencer has nothing more to do with it. */
void seq_finish(struct hast_arena *a, struct hast_bio *bio);

/* ---- seq_mutation.c ---- */

/* May the read go to the secondary: is it there, and is what it has there new enough? */
int seq_remote_readable(struct hast_arena *a, const struct hast_bio *bio);
/* 0, or why the mutation is not going to be possible. */
int seq_impossible(struct hast_arena *a, const struct hast_bio *bio);
/* 1: it has to wait for an overlapping one that came before it, and has to be done once more. */
int seq_must_wait(struct hast_arena *a, struct hast_bio *bio);
/* Acknowledges the mutation if that may be done now. */
void seq_mutation_try_ack(struct hast_arena *a, struct hast_bio *bio);
/* A component has completed it. */
void seq_mutation_step(struct hast_arena *a, struct hast_bio *bio);
/* It is acknowledged without the secondary as soon as that is granted. */
void seq_grant_wait(struct hast_arena *a, struct hast_bio *bio);
/* Those who wait for the grant are done once more, with the secondary: only an out-of-date component has what they did. */
void seq_grant_void(struct hast_arena *a);
/* A connection begins: what is under way here alone is to be copied. */
void seq_mark_local(struct hast_arena *a);
/* Both have everything, durably: those who wait for the grant need it no more. */
void seq_grant_settled(struct hast_arena *a);
/* All over: counted out of the map, its range free. */
void seq_mutation_over(struct hast_arena *a, struct hast_bio *bio, int clean);

/* ---- seq_flush.c ---- */

void seq_flush_submit(struct hast_arena *a, struct hast_bio *bio);
/* A client's flush that both have done with; local: the component's error, remote_ok: the secondary has done it. */
void seq_flush_over(struct hast_arena *a, struct hast_bio *bio, int local, int remote_ok);
/* Flushes that had to wait for the secondary go on. */
void seq_flush_resume(struct hast_arena *a);
void seq_flush_done(struct hast_arena *a, struct hast_bio *bio);
/* A component has failed a flush. */
void seq_flush_failed(struct hast_arena *a, const struct hast_bio *bio, int component);
void seq_flush_distrusted(struct hast_bio *bio);
/* What was written to both and not flushed since is not to be relied on any more. */
void seq_distrust(struct hast_arena *a);
/* A flush of the sequencer's own, unless one is under way. 1 when it was started. */
int seq_own_flush(struct hast_arena *a);

void seq_push_remote(struct hast_arena *a, struct hast_bio *bio);
/* Number, errors and flags of a bio that enters the sequencer. */
void seq_prepare(struct hast_arena *a, struct hast_bio *bio);
/* A read of what only the secondary has, or has whole; it holds the range lock. */
void seq_read_remote(struct hast_arena *a, struct hast_bio *bio);
/* Takes the range lock, and goes on as soon as nothing earlier overlaps. */
void seq_lock(struct hast_arena *a, struct hast_bio *bio);
void seq_unlock(struct hast_arena *a, const struct hast_bio *bio);

/* hast_seq.dirty_max for such a component. */
uint32_t seq_map_dirty_max(const struct hast_geometry *geo);

/* ---- seq_sync.c ---- */

/* The chunk has its range lock. */
void seq_sync_start_chunk(struct hast_arena *a, struct hast_bio *bio);
void seq_sync_chunk_done(struct hast_arena *a, struct hast_bio *bio, int component);
/* Hands out chunks as far as the window goes. */
void seq_sync_pump(struct hast_arena *a);
/* A completion was taken: a chunk may have waited for it. */
void seq_sync_turn(struct hast_arena *a);
/* A flush has completed, or failed on one of the nodes. */
void seq_sync_flushed(struct hast_arena *a, int failed);
void seq_sync_stop(struct hast_arena *a);
/* Something failed on the extent: what is being copied of it does not count. */
void seq_sync_spoil(struct hast_arena *a, uint64_t extent);
void seq_sync_spoil_all(struct hast_arena *a);
/* Does the bio touch an extent that may differ between the nodes? */
int seq_sync_marked(struct hast_arena *a, const struct hast_bio *bio);

/* Is any extent marked? */
int seq_sync_any(struct hast_arena *a);
/* Something was marked while nothing is being copied: begins with the next tick. */
void seq_sync_again(struct hast_arena *a);
/* May it be copied from the node that has the newer data? */
int seq_sync_source(const struct hast_seq *s);

/* ---- seq_sync_time.c ---- */

/* A resynchronisation begins. */
void seq_sync_time_start(struct hast_seq *s);
/* A flush has completed, or failed on one of the nodes. */
void seq_sync_saved(struct hast_arena *a, int failed);

/* ---- seq_local.c ---- */

/* 1 when the secondary is connected and has not failed. */
int seq_peer_there(struct hast_arena *a);
/* 1 when mutations and reads that need the secondary wait for it (or for the merged map). */
int seq_held(struct hast_arena *a);
/* The same for reads, which wait also while it is being decided whose data counts. */
int seq_read_held(struct hast_arena *a);
/* 1 when the local component is out of date, and the secondary has not come back in time. */
int seq_hopeless(struct hast_arena *a);
/* 1 when a mutation is acknowledged only once the secondary has it durably. */
int seq_strict(struct hast_arena *a);
/* The local component has failed. 1: the secondary takes its place, or has done so; the bio is to wait, or may go on. 0: it cannot.
   detach: it cannot be used any more at all. */
int seq_turn(struct hast_arena *a, int detach);
/* Done, and to be acknowledged when the secondary has it durably; or (remote_ok 0) when it is decided who has the truth. */
void seq_durable_wait(struct hast_arena *a, struct hast_bio *bio, int remote_ok);
/* Acknowledges those that may be; asks for a flush if one is needed. */
void seq_durable_go_on(struct hast_arena *a);
/* The secondary is there: before anything is read there, it is to be durable. The caller asks for a flush if `confirming`. */
void seq_confirm(struct hast_arena *a);
/* The secondary is lost: none of them is acknowledged because of it any more. */
void seq_durable_lost(struct hast_arena *a);

/* ---- seq_map.c, seq_map_update.c ---- */

/* The extent has been copied and is not marked in sync any more. */
void seq_map_copied(struct hast_arena *a, uint64_t extent);

void seq_map_init(struct hast_arena *a);
/* Counts the mutation in on its extents, which become dirty. */
void seq_map_enter(struct hast_arena *a, const struct hast_bio *bio);
/* Are its extents dirty on disk, or need not be? */
int seq_map_durable(struct hast_arena *a, const struct hast_bio *bio);
/* Counts it out. clean: it has completed on both nodes, or never started. */
void seq_map_leave(struct hast_arena *a, const struct hast_bio *bio, int clean);
/* All extents are marked, and need no map any more. */
void seq_map_detach(struct hast_arena *a);
/* The mutation's extents may differ between the nodes from now on. */
void seq_map_suspect_bio(struct hast_arena *a, const struct hast_bio *bio);
/* The same for a read that has failed here: its extents need not be dirty yet. */
void seq_map_suspect_read(struct hast_arena *a, const struct hast_bio *bio);
/* Does the map on disk say that the extent is dirty? */
int seq_map_ondisk(struct hast_arena *a, uint64_t extent);
/* So may all extents with completed mutations that the nodes have not both flushed since. */
void seq_map_suspect(struct hast_arena *a);
/* Puts the mutation into the list of those who wait for the map, and starts an update if none is under way. */
void seq_map_wait(struct hast_arena *a, struct hast_bio *bio);
/* The map update has completed. */
void seq_map_done(struct hast_arena *a, int error);
/* Extents that are dirty or out of sync in map (mapsize bytes) become so here too. 1: there are any. */
uint32_t seq_map_merge(struct hast_arena *a, const uint8_t *map, int ondisk);
/* Clears what may be cleared. Number of extents that only a flush keeps from being cleared. */
uint64_t seq_map_clean(struct hast_arena *a);
void seq_map_start(struct hast_arena *a);
/* Those who waited for the map or the secondary go, as far as they may. */
void seq_map_wake(struct hast_arena *a);

#endif
