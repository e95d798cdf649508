"""Live events: what happens, as it happens, on the socket <rundir>/events.sock (see hastd(8)).

A ZeroMQ PUB socket: each message has two frames, the resource's name as the topic, and a JSON object with
`time` (seconds since the epoch), `resource`, `event` and what belongs to that event.

Invariants:
- Publishing never waits and never fails a caller: a subscriber that does not keep up loses events.
- ZeroMQ has threads, so this is imported in main only, and never in a process that forks.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import zmq

log = logging.getLogger(__name__)

SOCKET_NAME = "events.sock"
QUEUED = 1000  # events for one slow subscriber before it loses some
LINGER_MS = 200  # for the last events to leave when hastd ends


class Events:
    """The publisher. Without a usable socket it drops everything, and says so once."""

    def __init__(self, rundir: Path) -> None:
        self.path = rundir / SOCKET_NAME
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        socket = self._context.socket(zmq.PUB)
        socket.setsockopt(zmq.SNDHWM, QUEUED)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        try:
            socket.bind(f"ipc://{self.path}")
        except zmq.ZMQError as error:
            log.error("no live events: cannot bind %s: %s", self.path, error)
            socket.close(0)
            return
        self._socket = socket

    def publish(self, resource: str, event: str, **details: Any) -> None:
        """Tell all subscribers of `resource` that `event` happened. Never waits, never raises."""
        if self._socket is None:
            return
        message = {"time": round(time.time(), 6), "resource": resource, "event": event, **details}
        try:
            self._socket.send_multipart([os.fsencode(resource), json.dumps(message).encode()], zmq.NOBLOCK)
        except (zmq.ZMQError, TypeError, ValueError) as error:
            log.debug("event %s of %s is lost: %s", event, resource, error)

    def close(self) -> None:
        """Send what is queued, for a moment at most, and remove the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self.path.unlink(missing_ok=True)
        self._context.term()
