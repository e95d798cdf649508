/* What every pump is given and why a pump comes back to Python. */
#ifndef HAST_PUMP_H
#define HAST_PUMP_H

/* cffi: begin */
enum hast_pump_result {
	HAST_PUMP_CONTROL = 1,		/* the control socket is readable or closed */
	HAST_PUMP_EVENT = 2,		/* hast_seq.events is not zero */
	HAST_PUMP_BROKEN = 3,		/* the shared memory holds nonsense */
	HAST_PUMP_DEVICE = 4,		/* the device is gone or needs Python: see the pump's state */
	HAST_PUMP_QUIET = 5,		/* it was told to take nothing more, and nothing is under way */
	HAST_PUMP_LOST = 6		/* the connection to the peer is lost or the peer broke the protocol */
};
/* A pump returns one of these, or -errno when a system call that cannot fail did. */
/* cffi: end */

#endif
