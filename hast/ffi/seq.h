/*
 * The sequencer: the rules by which bios reach the two components and are acknowledged.
 *
 * A pure state machine over the arena: a request, a completion or a connection event goes in, ring pushes and
 * acknowledgements come out. No system call, no clock, no memory of its own, so that tests and simulations
 * drive the very code that runs in production. One process at a time may call it.
 *
 * Invariants kept here (numbers as in docs/architecture.md):
 * 1 dirty before write: a mutation is pushed only when every extent it touches is set in `ondisk`, and a
 *   bit is set in `ondisk` only by a map update that the disk stage has reported durable;
 * 2 clean after durable: a dirty bit is cleared only while connected, for an extent without mutations in flight, not
 *   marked in `sync`, not kept hot, and older than the last flush that both components completed;
 * 3 order: of two overlapping mutations the later is pushed when the earlier has completed everywhere;
 * 5 acknowledge: by the replication mode; a flush when all connected components have done it;
 * 6 no stale read: a read that the local component cannot answer goes to the secondary only where that cannot be the
 *   older one, and after all earlier mutations of its range;
 * 7 degraded first: without the secondary no mutation, and no flush of what the secondary may not have durably, is
 *   acknowledged before hast_seq_grant_degraded(); while the local component is out of date (sync_remote), never: then
 *   the secondary's disk is the truth, and what is acknowledged is durable there (seq_local.c);
 * 9 one owner: a slot is free, or the device's, or in here; `pending` says which components have it, and a
 *   completion from one that has not is refused.
 */
#ifndef HAST_SEQ_H
#define HAST_SEQ_H

#include <stdint.h>

#include "arena.h"

/* cffi: begin */
enum hast_bio_state {
	HAST_BIO_FREE,
	HAST_BIO_CLAIMED,		/* the device fills it */
	HAST_BIO_BLOCKED,		/* waits for an earlier overlapping mutation */
	HAST_BIO_MAPWAIT,		/* waits until its extents are dirty on disk */
	HAST_BIO_RUNNING,		/* with the components */
	HAST_BIO_QUEUED,		/* a flush that waits for the one before it */
	HAST_BIO_GRANTWAIT,		/* done, but may not be acknowledged without the secondary yet */
	HAST_BIO_DONE,			/* acknowledged and complete; the device still holds it */
	HAST_BIO_DURABLEWAIT		/* done, and acknowledged when the secondary has it durably and this node knows that
					   its own component is out of date, if it is */
};

enum hast_mode {
	HAST_MODE_FULLSYNC,
	HAST_MODE_MEMSYNC,
	HAST_MODE_ASYNC
};

#define HAST_SYNC_TICK_MS 50		/* how often a resynchronisation is told of time */
#define HAST_SYNC_STUCK_MS 1000		/* the same, while it does not get on */

/* hast_seq.events: what Python is to decide */
#define HAST_SEQ_NEED_DEGRADED 1	/* raise localcnt, store it, then grant */
#define HAST_SEQ_REMOTE_FAILED 2	/* the secondary answered with an error: drop it */
#define HAST_SEQ_MAP_FAILED 4		/* the activemap could not be written */
#define HAST_SEQ_SYNC_DONE 16	/* both nodes have the same data, durable */
#define HAST_SEQ_CONNECTED 8		/* the merged map is durable: requests go to the secondary from now on */
#define HAST_SEQ_LOCAL_FAILED 32	/* the local component failed and the secondary has everything, durably: store that this
					   component is out of date, then hast_seq_outdated() or hast_seq_detach() */

struct hast_extent {
	uint64_t epoch;			/* flush epoch of the last mutation that completed */
	uint32_t inflight;		/* mutations activated and not completed */
	uint32_t keep;			/* index into the keep list, 0 not kept */
};

struct hast_keep {
	uint64_t extent;
	uint32_t prev;			/* towards the most recently used; 0 is the list's head */
	uint32_t next;
};

#define HAST_SYNC_EXTENTS 4		/* extents that a resynchronisation copies at once */

struct hast_sync_extent {
	uint64_t extent;
	uint64_t next;			/* bytes: the next chunk */
	uint64_t end;
	uint32_t out;			/* chunks under way */
	uint32_t epoch;			/* which use of this place it is */
	uint8_t used;
	uint8_t failed;			/* something failed on it: it stays marked */
	uint8_t pad[6];
};

/* What was in the component's cache: nobody has said that it is lost; somebody has; that is heeded. */
enum hast_seq_loss {
	HAST_SEQ_LOSS_NONE,
	HAST_SEQ_LOSS_TOLD,
	HAST_SEQ_LOSS_HEEDED
};

struct hast_seq_stats {
	uint64_t read;
	uint64_t write;
	uint64_t del;
	uint64_t flush;
	uint64_t map_update;
	uint64_t read_error;
	uint64_t write_error;
	uint64_t delete_error;
	uint64_t flush_error;
	uint64_t map_error;
};

struct hast_seq {
	uint32_t mode;			/* enum hast_mode */
	uint32_t connected;
	uint32_t joining;		/* connected as soon as the merged map is durable; mutations wait */
	uint32_t degraded_ok;
	uint32_t asked;			/* events raised and not settled yet: not to be raised again */
	uint32_t metaflush;
	uint32_t events;
	uint32_t pushed;		/* bit r: something was pushed to ring r; the pump rings and clears */
	uint32_t nfree;
	uint32_t free_head;
	uint32_t sync_free_head;
	uint32_t nactive;
	uint64_t order;
	uint32_t again;			/* all of the map is written once more: metaflush was switched on */
	uint64_t reordered;		/* mutations up to this order may have to let earlier ones pass that were under way before */
	uint64_t seq;
	uint32_t grant_head;
	uint32_t grant_tail;
	uint32_t mapwait_head;
	uint32_t mapwait_tail;
	uint32_t map_busy;		/* a map update is under way */
	uint32_t map_dirty;		/* some block of the map may be changed and not written */
	uint32_t map_next;		/* block at which the search for changed ones begins */
	uint32_t flush_running;		/* slot of the flush under way, or HAST_NONE */
	uint32_t flushq_head;		/* flushes that it does not cover, as one batch */
	uint32_t flushq_tail;
	uint32_t flush_whole;		/* the flush under way still counts for cleaning */
	uint32_t flush_early;		/* when it was sent the secondary may have lacked something acknowledged */
	uint64_t epoch;			/* current flush epoch */
	uint64_t flush_cover;		/* mutations up to this epoch are covered by the flush under way */
	uint64_t flushed;		/* mutations up to this epoch are durable on both nodes */
	uint64_t ndirty;		/* extents with mutations in flight or out of sync */
	uint32_t nkeep;
	uint32_t inuse;			/* submitted and not finished */
	uint32_t nremote;		/* with the secondary now */
	uint64_t freed;			/* slots that came back to the free list, ever */
	uint32_t broken;		/* a ring does not take what it must: the shared memory is damaged */
	uint32_t sync_on;		/* a resynchronisation runs */
	uint32_t sync_remote;		/* the local component is out of date, and the metadata says so: marked extents are
					   read on the secondary, which has everything that was acknowledged durably */
	uint32_t sync_chunks;		/* under way */
	uint32_t sync_failed;		/* extents that could not be copied in this pass */
	uint32_t sync_epoch;
	uint64_t sync_cursor;		/* extent */
	uint64_t sync_flush;		/* epoch whose flush ends it; 0 while there is something to copy */
	uint64_t sync_copied;		/* extents, since it began */
	uint64_t sync_bytes;		/* read from the source, since it began */
	uint64_t sync_saved;		/* of these, those that a flush was begun for: an interruption does not take them back */
	uint64_t sync_save;		/* epoch whose flush makes them durable; 0: none is under way */
	uint64_t sync_unsaved_ms;	/* time since */
	uint64_t sync_pause_ms;		/* until the next one: grows from the beginning of a connection on */
	uint64_t sync_rate;		/* bytes per second at most; 0: no limit */
	int64_t sync_credit;		/* what may be issued now, in thousandths of a byte */
	uint64_t finished;		/* client requests, ever */
	uint64_t sync_turn;		/* how many have to be, until the next chunk may be issued beside clients */
	uint64_t sync_finished;		/* how many were at the last tick */
	uint32_t sync_beside;		/* there were some between the last two ticks */
	uint32_t sync_floor;		/* bytes that may be issued before their turn */
	uint32_t sync_held;		/* the next chunk waits for its turn */
	uint32_t sync_retry_ms;		/* how long what failed has to wait for another try */
	uint64_t sync_waited_ms;	/* how long it has waited */
	uint64_t sync_tried;		/* sync_copied at the last try */
	/* A local component that fails: seq_local.c. */
	uint32_t peer_whole;		/* the secondary has every acknowledged write */
	uint32_t turning;		/* the local component has failed, the secondary is to take its place */
	uint32_t turn_told;		/* HAST_SEQ_LOCAL_FAILED was raised */
	uint32_t turn_detach;		/* it cannot be used any more: not a read or write, but a flush or the map has failed */
	uint32_t no_turn;		/* that was tried on this connection, and could not be stored */
	uint32_t settling;		/* synchronised from the secondary, hast_seq_current() is awaited */
	uint32_t given_up;		/* out of date and alone for too long: what needs the secondary fails */
	uint32_t detached;		/* the local component is not used */
	uint32_t sync_begun;		/* on this connection */
	uint32_t sync_number;		/* of synchronisations that were completed: a grant that was asked for before one is void */
	uint32_t direct;		/* setting: reads and writes of clients go to RING_DIRECT first */
	uint32_t confirming;		/* out of date: the secondary flushes first, so that nothing is read there that it may lose */
	uint32_t cache_lost;		/* a flush of the local component has failed, and it is not settled what becomes of that */
	uint32_t no_source;		/* a flush of it has failed, in this arena or before it: nothing is copied from it */
	uint32_t loss;			/* enum hast_seq_loss: set from outside, at once when another process's flush of it has failed */
	uint32_t dirty_max;		/* dirty extents from which on cold ones are cleared also beside clients; before, in quiet moments */
	uint32_t detach_on_error;	/* setting: any failure of the local component ends its use */
	uint32_t durable_head;
	uint32_t durable_tail;
	uint32_t merged;		/* the secondary's own map says something that this node's has to say as well */
	uint32_t join_failed;		/* and that could not be written: told with HAST_SEQ_MAP_FAILED */
	uint32_t no_deletes;		/* the secondary's DELETE does not promise zeros: none is sent there */
	uint32_t no_flushes;		/* the secondary has said that it has no cache to be flushed */
	uint32_t awaited;		/* somebody waited for the secondary when the last connection was made, */
	uint64_t served;		/* and that many requests of clients were answered with its help: see hast/alone.py */
	uint64_t turn_epoch;		/* the secondary has everything when it has flushed this */
	uint64_t confirm_epoch;
	uint64_t flushed_remote;	/* mutations up to this epoch are durable on the secondary */
	uint64_t last_epoch;		/* of the last mutation that completed; 1 for what may have been before this arena */
	struct hast_sync_extent sync_extent[4];
	struct hast_seq_stats stats;
};

/* Done by hast_arena_init(). */
void hast_seq_init(struct hast_arena *a);
struct hast_seq *hast_arena_seq(struct hast_arena *a);
/* Takes the map as read from disk, mapsize bytes: its extents are dirty, and out of sync. Before any I/O. */
void hast_seq_load_map(struct hast_arena *a, const uint8_t *map);

/* A slot for the device to fill (cmd, flags, offset, length, request, data in the slab), or HAST_NONE. */
uint32_t hast_seq_claim(struct hast_arena *a);
/* Hands a claimed slot over. 0, or -EINVAL when the request is not possible (the slot stays claimed). */
int hast_seq_submit(struct hast_arena *a, uint32_t slot);
/* The next slot that is to be answered (bio.result says with what), or HAST_NONE. */
uint32_t hast_seq_acked(struct hast_arena *a);
/* The device is done with a slot, in whatever state: what nobody waits for any more is not answered. */
void hast_seq_release(struct hast_arena *a, uint32_t slot);

/* An entry of component c's completion ring. 0, or -EPROTO when no such slot is out there: the
   shared memory can no longer be trusted and the pipeline has to be taken down. */
int hast_seq_complete(struct hast_arena *a, int component, uint32_t entry);
/* An entry of RING_DIRECT that could not be done there: it is the disk stage's. */
void hast_seq_to_disk(struct hast_arena *a, uint32_t slot);
/* Takes everything from all completion rings. Number of entries, or -EPROTO. */
int hast_seq_drain(struct hast_arena *a);

/* localcnt is raised and durable: acknowledgements without the secondary may go out. */
void hast_seq_grant_degraded(struct hast_arena *a);
/* It cannot be raised: those who wait for it are told so. The next one asks again. */
void hast_seq_refuse_degraded(struct hast_arena *a);
/* The secondary is there; map (mapsize bytes, may be NULL) is its own, to be merged. Durable before the first request
   goes out: writes wait for it as for any map update. */
void hast_seq_connect(struct hast_arena *a, const uint8_t *map);
/* Begins to copy the extents that may differ, from the secondary when from_remote, else to it. After HAST_SEQ_CONNECTED. */
void hast_seq_sync_start(struct hast_arena *a, int from_remote);
/* The role ends: what is under way of it is the last. */
void hast_seq_sync_end(struct hast_arena *a);
/* Time has passed: a resynchronisation with a rate gets its share, extents that failed are tried again. */
void hast_seq_sync_tick(struct hast_arena *a, uint32_t elapsed_ms);
/* After how many ms the next tick is wanted: HAST_SYNC_TICK_MS, HAST_SYNC_STUCK_MS while nothing can be copied; 0: none. */
uint32_t hast_seq_sync_patience(struct hast_arena *a);
/* After HAST_SEQ_LOCAL_FAILED: it is stored durably that this component is out of date, where it is marked. */
void hast_seq_outdated(struct hast_arena *a);
/* The same, and it is stored that it is so everywhere: from now on the local component is not used. Also at the start. */
void hast_seq_detach(struct hast_arena *a);
/* After HAST_SEQ_LOCAL_FAILED: it could not be stored. What has failed is answered so. */
void hast_seq_local_refused(struct hast_arena *a);
/* A flush of the local component has failed that was not the sequencer's: as if it had been. The disk stage, which is to be told
   before this, fails the one that may be under way, and all later ones. Where `loss` was set to TOLD before, that has done the
   same already, if anything was completed since: the word is there before a message is, and no read may be believed between. */
void hast_seq_local_flush_failed(struct hast_arena *a);
/* After HAST_SEQ_SYNC_DONE: it is stored that this component is not out of date any more. */
void hast_seq_current(struct hast_arena *a);
/* Out of date and without the secondary for too long: whoever waits for it is told, and so is everybody until it is there. */
void hast_seq_give_up(struct hast_arena *a);
/* The secondary is gone, and the connection is closed; what it has received is drained. */
void hast_seq_disconnect(struct hast_arena *a);
/* The setting `metaflush`, while it runs: nothing that was written without a flush counts as durable once it is on. */
void hast_seq_metaflush(struct hast_arena *a, uint32_t on);
/* A quiet moment: clears extents that may be cleared. 1 when it started some I/O. */
int hast_seq_idle(struct hast_arena *a);
/* No bio is in the sequencer (the device may hold answered ones). */
int hast_seq_quiet(struct hast_arena *a);
/* cffi: end */

#endif
