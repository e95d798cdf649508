/* The fault disk's volatile cache: a flush that fails may lose what was not flushed before. Off until `cache`.

   A kernel that could not write pages back counts them as clean afterwards: it tells so once, to whoever flushes, and may
   show what was there before from then on. So does this disk, sector by sector; what it has not lost then it never does. */
#include "faultdisk.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static void
forget(struct before **link)
{
	while (*link != NULL) {
		struct before *before = *link;

		*link = before->next;
		free(before);
	}
}

void
begin_cache(struct disk *d, uint64_t seed)
{
	forget(&d->before);
	d->caching = 1;
	d->chance = seed != 0 ? seed : 1;
}

static uint64_t
draw(struct disk *d)
{
	d->chance ^= d->chance << 13;
	d->chance ^= d->chance >> 7;
	d->chance ^= d->chance << 17;
	return d->chance;
}

void
remember(struct disk *d, uint64_t offset, uint64_t length)
{
	uint64_t end = offset + length < d->size ? offset + length : d->size, at;
	struct before *before;

	if (!d->caching || offset >= end)
		return;
	before = malloc(sizeof(*before) + (end - offset));
	if (before == NULL)
		die("memory");
	*before = (struct before){ .next = d->before, .end = UINT64_MAX, .offset = offset, .length = end - offset };
	for (at = 0; at < before->length;) {
		ssize_t n = pread(d->backing, before->data + at, before->length - at, (off_t)(offset + at));

		if (n <= 0 && errno != EINTR)
			die("backing");
		at += n > 0 ? (uint64_t)n : 0;
	}
	d->before = before;
}

void
written(struct disk *d)
{
	if (d->before != NULL && d->before->end == UINT64_MAX)
		d->before->end = now();
}

void
flushed(struct disk *d, uint64_t begin)
{
	struct before **link = &d->before;

	/* Their ends are in order, as they are written one at a time. */
	while (*link != NULL && (*link)->end >= begin)
		link = &(*link)->next;
	forget(link);
}

/* The sectors [from, to) of what was written are lost. */
static void
restore(const struct disk *d, const struct before *before, uint64_t from, uint64_t to)
{
	uint64_t end = to * SECTOR < before->length ? to * SECTOR : before->length;
	struct job job = { .kind = WRITE, .begin = now(), .offset = before->offset + from * SECTOR };
	const char *data = before->data + from * SECTOR;
	int error = 0;

	job.length = end - from * SECTOR;
	if (put(d, data, job.offset, job.length, &error) != job.length)
		die("backing");
	record(d, &job, data, 0, job.length);
}

void
lose(struct disk *d)
{
	for (struct before *before = d->before; before != NULL; before = before->next) {
		uint64_t sectors = (before->length + SECTOR - 1) / SECTOR, how = draw(d) % 8, from = 0;

		if (how < 4) {
			restore(d, before, 0, sectors);
			continue;
		}
		for (uint64_t at = 0; how < 6 && at < sectors; at++) {
			if ((draw(d) >> 20 & 1) != 0)
				continue;
			if (from < at)
				restore(d, before, from, at);
			from = at + 1;
		}
		if (how < 6 && from < sectors)
			restore(d, before, from, sectors);
	}
	forget(&d->before);
}
