/*
 * The ports of the ggate stage: what is waited for at each, which of them wait for slots, and how they end. Invariants: device.h.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "ggate_internal.h"
#include "trace.h"

static uint32_t
wanted(const struct hast_ggate *g, const struct hast_port *port)
{
	uint32_t events = 0;

	if (!port->paused && !port->starved && (!g->frozen || port->midway))
		events |= EPOLLIN;
	if (port->want_write)
		events |= EPOLLOUT;
	return events;
}

int
hast_port_add(struct hast_ggate *g, struct hast_port *port)
{
	struct epoll_event ev = { .events = wanted(g, port), .data.ptr = port };

	if (epoll_ctl(g->epoll, EPOLL_CTL_ADD, port->fd, &ev) == -1)
		return -errno;
	port->armed = ev.events;
	if (port->limit == 0)
		port->limit = g->arena->geo.nclient / (port->is_fuse ? 1 : 4);
	g->nclients += !port->is_fuse;
	port->next = g->ports;
	g->ports = port;
	return 0;
}

void
hast_port_rearm(struct hast_ggate *g, struct hast_port *port)
{
	struct epoll_event ev = { .events = wanted(g, port), .data.ptr = port };

	if (port->dead || ev.events == port->armed)
		return;
	if (epoll_ctl(g->epoll, EPOLL_CTL_MOD, port->fd, &ev) == -1)
		hast_port_kill(g, port, errno);
	port->armed = ev.events;
}

void
hast_port_dirty(struct hast_ggate *g, struct hast_port *port)
{
	if (port->dirty)
		return;
	port->dirty = 1;
	port->next_dirty = g->dirty;
	g->dirty = port;
}

void
hast_port_kill(struct hast_ggate *g, struct hast_port *port, int error)
{
	if (port->dead)
		return;
	port->dead = 1;
	port->error = error;
	g->ndead++;
}

void
port_starve(struct hast_ggate *g, struct hast_port *port)
{
	if (port->starved)
		return;
	port->starved = 1;
	g->nstarved++;
	hast_port_rearm(g, port);
}

static void
port_result(struct hast_ggate *g, struct hast_port *port, int result)
{
	if (result < 0)
		hast_port_kill(g, port, -result);
}

void
ports_feed(struct hast_ggate *g)
{
	g->freed = 0;
	if (g->stalled_head != NULL)
		request_unstall(g);
	if (g->nstarved == 0)
		return;
	for (struct hast_port *port = g->ports; port != NULL; port = port->next) {
		if (!port->starved || port->dead)
			continue;
		port->starved = 0;
		g->nstarved--;
		port_result(g, port, port->ops->resume(g, port));
		hast_port_rearm(g, port);
	}
}

void
ports_flush(struct hast_ggate *g)
{
	while (g->dirty != NULL) {
		struct hast_port *port = g->dirty;

		g->dirty = port->next_dirty;
		port->dirty = 0;
		hast_trace(g->arena, HAST_STAGE_GGATE, HAST_TRACE_SENDING, 0);
		if (!port->dead)
			port_result(g, port, port->ops->flush(g, port));
		hast_trace(g->arena, HAST_STAGE_GGATE, HAST_TRACE_SENT, 0);
	}
}

static void
port_close(struct hast_ggate *g, struct hast_port *port)
{
	int fd = port->fd;

	/* First the parts that the port has claimed and not submitted, then the requests that they belong to. */
	port->ops->closed(g, port);
	request_orphan(g, port);
	if (port->starved)
		g->nstarved--;
	if (port->is_fuse)
		g->device_error = port->error != 0 ? port->error : ENODEV;
	else
		g->nclients--;
	/* Not left to close(): the worker may have the same open file, which would keep it in epoll. */
	(void)epoll_ctl(g->epoll, EPOLL_CTL_DEL, fd, NULL);
	(void)close(fd);
	free(port);
}

void
ports_close(struct hast_ggate *g)
{
	while (g->ports != NULL) {
		struct hast_port *port = g->ports;

		g->ports = port->next;
		port_close(g, port);
	}
}

void
ports_bury(struct hast_ggate *g)
{
	for (struct hast_port **at = &g->ports; *at != NULL && g->ndead > 0;) {
		struct hast_port *port = *at;

		if (!port->dead) {
			at = &port->next;
			continue;
		}
		*at = port->next;
		g->ndead--;
		port_close(g, port);
	}
}

void
port_event(struct hast_ggate *g, struct hast_port *port, uint32_t events)
{
	if (port->dead)
		return;
	if ((events & EPOLLOUT) != 0)
		port_result(g, port, port->ops->writable(g, port));
	if (port->dead)
		return;
	if ((events & EPOLLIN) != 0 && (port->armed & EPOLLIN) != 0)
		port_result(g, port, port->ops->readable(g, port));
	else if ((events & (EPOLLHUP | EPOLLERR)) != 0)
		hast_port_kill(g, port, ECONNRESET);
}
