/*
 * The connection to the secondary within the ggate stage of a primary (conn.h): it is sent to and received from in the stage's
 * own turn, so that a write costs no wake-up between the client's request and the request to the secondary, nor between the reply
 * and the answer.
 */
#include <errno.h>
#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "conn_internal.h"
#include "ggate_internal.h"
#include "pump.h"

static int
changed(struct hast_ggate *g, struct ggate_end *end, short wanted)
{
	/* The bits of poll() and epoll are the same. */
	struct epoll_event ev = { .events = (uint32_t)wanted, .data.ptr = end };
	int op = end->armed == -1 ? EPOLL_CTL_ADD : wanted == -1 ? EPOLL_CTL_DEL : EPOLL_CTL_MOD;

	if (wanted == end->armed)
		return 0;
	end->armed = wanted;
	return epoll_ctl(g->epoll, op, end->fd, &ev) == -1 ? -errno : 0;
}

int
ggate_link_arm(struct hast_ggate *g)
{
	short in, out;
	int error;

	link_wants(g->link, &in, &out);
	error = changed(g, &g->in, in);
	return error != 0 ? error : changed(g, &g->out, out);
}

int
ggate_link_event(struct hast_ggate *g, const void *who, uint32_t events)
{
	if (who != &g->in && who != &g->out)
		return 0;
	if (g->link != NULL)
		link_events(g->link, who == &g->in ? (short)events : 0, who == &g->out ? (short)events : 0);
	return 1;
}

int
hast_ggate_connect(struct hast_ggate *g, const struct hast_conn_options *options)
{
	struct hast_conn_options own = *options;

	own.own_bell = own.control = own.disk_bell = own.seq_bell = -1;
	if (g->link != NULL)
		return -EISCONN;
	g->link = hast_link_new(g->arena, &own);
	if (g->link == NULL)
		return -errno;
	g->in = (struct ggate_end){ .fd = own.in, .armed = -1 };
	g->out = (struct ggate_end){ .fd = own.out, .armed = -1 };
	return 0;
}

void
hast_ggate_disconnect(struct hast_ggate *g)
{
	if (g->link == NULL)
		return;
	/* Not left to close(): who has made the connection may not have closed its own descriptors yet. */
	(void)changed(g, &g->in, -1);
	(void)changed(g, &g->out, -1);
	hast_link_free(g->link);
	g->link = NULL;
	(void)close(g->in.fd);
	(void)close(g->out.fd);
}

int
hast_ggate_lost(const struct hast_ggate *g)
{
	return g->link != NULL ? hast_link_error(g->link) : 0;
}

const char *
hast_ggate_why(const struct hast_ggate *g)
{
	return g->link != NULL ? hast_link_why(g->link) : "";
}
