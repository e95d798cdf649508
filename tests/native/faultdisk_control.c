/* The fault disk's commands, as faultdisk.c lists them: one connection at a time, an answer for each line. */
#include "faultdisk.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define LINE 4200

static const char *const kind_name[KINDS] = { "read", "write", "flush", "delete" };

void
listen_on(struct disk *d)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	if (strlen(d->socket) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		die(d->socket);
	}
	(void)strcpy(address.sun_path, d->socket);
	d->control = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (d->control == -1 || bind(d->control, (struct sockaddr *)&address, sizeof(address)) == -1 ||
	    listen(d->control, 16) == -1)
		die(d->socket);
}

static int
parse_kinds(const char *text, uint32_t *kinds)
{
	char copy[64], *rest = copy, *word;

	if (text == NULL || strlen(text) >= sizeof(copy))
		return 0;
	(void)strcpy(copy, text);
	*kinds = 0;
	while ((word = strsep(&rest, ",")) != NULL) {
		uint32_t before = *kinds;

		for (int i = 0; i < KINDS; i++)
			if (strcmp(word, kind_name[i]) == 0 || strcmp(word, "all") == 0)
				*kinds |= 1u << i;
		if (*kinds == before)
			return 0;
	}
	return 1;
}

static int
number(char **rest, uint64_t *value)
{
	char *word = strsep(rest, " "), *end;

	if (word == NULL || *word < '0' || *word > '9')
		return 0;
	errno = 0;
	*value = strtoull(word, &end, 10);
	return errno == 0 && *end == '\0';
}

static int
add_rule(struct disk *d, struct rule rule)
{
	for (int i = 0; i < RULES; i++)
		if (d->rule[i].kinds == 0) {
			d->rule[i] = rule;
			return 1;
		}
	return 0;
}

static int
do_fail(struct disk *d, char *rest)
{
	struct rule rule = { .count = -1, .to = UINT64_MAX };
	uint64_t value;
	char *word;

	if (!parse_kinds(strsep(&rest, " "), &rule.kinds) || !number(&rest, &value) || value == 0 || value > 511)
		return 0;
	rule.error = (int)value;
	while ((word = strsep(&rest, " ")) != NULL) {
		if (strcmp(word, "half") == 0) {
			rule.half = 1;
		} else if (strcmp(word, "lose") == 0) {
			rule.lose = 1;
		} else if (strcmp(word, "count") == 0 && number(&rest, &value) && value > 0 && value < INT64_MAX) {
			rule.count = (int64_t)value;
		} else if (strcmp(word, "range") != 0 || !number(&rest, &rule.from) || !number(&rest, &rule.to)) {
			return 0;
		}
	}
	return add_rule(d, rule);
}

static int
do_record(struct disk *d, const char *path)
{
	int ok, fd = -1;

	if (path == NULL)
		return 0;
	if (strcmp(path, "off") != 0 && (fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) == -1)
		return 0;
	pthread_mutex_lock(&d->io);
	ok = d->log == -1 || close(d->log) == 0;
	d->log = fd;
	pthread_mutex_unlock(&d->io);
	return ok;
}

static int
do_cache(struct disk *d, char *rest)
{
	uint64_t seed;

	if (!number(&rest, &seed))
		return 0;
	pthread_mutex_lock(&d->io);
	begin_cache(d, seed);
	pthread_mutex_unlock(&d->io);
	return 1;
}

static int
do_delay(struct disk *d, char *rest)
{
	uint32_t kinds;
	uint64_t ms;

	if (!parse_kinds(strsep(&rest, " "), &kinds) || !number(&rest, &ms) || ms > 3600000)
		return 0;
	for (int i = 0; i < KINDS; i++)
		if ((kinds >> i & 1) != 0)
			d->delay[i] = ms;
	return 1;
}

static int
do_hang(struct disk *d, char *rest)
{
	uint32_t kinds;

	if (!parse_kinds(strsep(&rest, " "), &kinds))
		return 0;
	d->hung |= kinds;
	return 1;
}

static int
heal(struct disk *d)
{
	memset(d->rule, 0, sizeof(d->rule));
	memset(d->delay, 0, sizeof(d->delay));
	d->hung = 0;
	d->readonly = 0;
	return 1;
}

static void
stats(const struct disk *d, char *answer, size_t size)
{
	uint64_t waiting = 0;

	for (const struct job *job = d->head; job != NULL; job = job->next)
		waiting += d->hung >> job->kind & 1;
	(void)snprintf(answer, size, "ok %ju %ju %ju %ju %ju %ju\n", (uintmax_t)d->count[READ], (uintmax_t)d->count[WRITE],
	    (uintmax_t)d->count[FLUSH], (uintmax_t)d->count[DELETE], (uintmax_t)d->failed, (uintmax_t)waiting);
}

/* One command; its answer. */
static void
obey(struct disk *d, char *line, char *answer, size_t size)
{
	char *rest = line, *word = strsep(&rest, " ");
	int ok = 0;

	if (strcmp(word, "die") == 0)
		_exit(0);
	if (strcmp(word, "quit") == 0)
		unmount_and_end(d);
	if (strcmp(word, "record") == 0 || strcmp(word, "cache") == 0) {
		ok = *word == 'r' ? do_record(d, rest) : do_cache(d, rest);
		(void)snprintf(answer, size, "%s\n", ok ? "ok" : "error cannot do that there");
		return;
	}
	pthread_mutex_lock(&d->lock);
	if (strcmp(word, "fail") == 0)
		ok = do_fail(d, rest);
	else if (strcmp(word, "delay") == 0)
		ok = do_delay(d, rest);
	else if (strcmp(word, "hang") == 0)
		ok = do_hang(d, rest);
	else if (strcmp(word, "release") == 0)
		ok = (d->hung = 0, 1);
	else if (strcmp(word, "full") == 0)
		ok = add_rule(d, (struct rule){ .kinds = 1u << WRITE, .error = ENOSPC, .count = -1, .to = UINT64_MAX });
	else if (strcmp(word, "readonly") == 0)
		ok = d->readonly = 1;
	else if (strcmp(word, "heal") == 0)
		ok = heal(d);
	(void)snprintf(answer, size, "%s\n", ok ? "ok" : "error no such command, or too many");
	if (strcmp(word, "stats") == 0)
		stats(d, answer, size);
	pthread_cond_broadcast(&d->more);
	pthread_mutex_unlock(&d->lock);
}

void *
converse(void *argument)
{
	struct disk *d = argument;

	for (;;) {
		char line[LINE], answer[256];
		int fd = accept4(d->control, NULL, NULL, SOCK_CLOEXEC);
		FILE *in;

		if (fd == -1)
			continue;
		in = fdopen(fd, "r");
		while (in != NULL && fgets(line, sizeof(line), in) != NULL) {
			line[strcspn(line, "\n")] = '\0';
			obey(d, line, answer, sizeof(answer));
			if (send(fd, answer, strlen(answer), MSG_NOSIGNAL) == -1)
				break;
		}
		if (in != NULL)
			(void)fclose(in);
		else
			(void)close(fd);
	}
	return NULL;
}
