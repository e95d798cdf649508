"""The ucarp hooks of etc/ucarp with a node of their own: settings, calls, and what came of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.e2e.node import ROOT, Node

HOOKS = ROOT / "etc" / "ucarp"
DONE, FAILED, OVERTAKEN = 0, 1, 75
# A service is a script that notes its start or end; the settings may name another one.
SERVICE = """#!/bin/sh
echo "$1 $2" >>"{directory}/services"
[ "$2 $1" != "slow stop" ] || exec sleep 600
"""


class Hooks:
    """vip-up and vip-down for one node, whose resource "disk" has a file system on `point`; `more` are further lines
    of the settings. Without a network: the interface is `-`."""

    def __init__(self, node: Node, more: str = "") -> None:
        self.node = node
        self.point = node.directory / "mnt"
        self.point.mkdir(exist_ok=True)
        self.settings = node.directory / "hast-ucarp.conf"
        self.log = node.directory / "ucarp.log"
        self.arguments = ["-", "10.0.0.10", str(self.settings)]
        service = node.directory / "service"
        service.write_text(SERVICE.format(directory=node.directory))
        service.chmod(0o755)
        self.settings.write_text(
            f"""
            resources="
            {node.name()} {node.device()} {self.point} ext4 noatime
            "
            hastctl={ROOT}/bin/hastctl hast_conf={node.conf} down_role=init
            start_service="{service} start" stop_service="{service} stop" services="one two"
            state={node.directory}/ucarp log_file={self.log}
            role_timeout=60 device_timeout=30 umount_timeout=10 service_timeout=10 term_timeout=1
            {more}
            """
        )

    def start(self, verb: str, *options: str) -> subprocess.Popen[str]:
        """Call a hook as ucarp does, or with -w."""
        command: list[str | Path] = [HOOKS / f"vip-{verb}", *options, *self.arguments]
        return subprocess.Popen(
            command, env=self.node.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    def call(self, verb: str, *options: str) -> int:
        """Call a hook and wait for its end, which is not that of the work unless -w is given; its exit code."""
        return self.start(verb, *options).wait(150)

    def up(self) -> int:
        return self.call("up", "-w")

    def down(self) -> int:
        return self.call("down", "-w")

    def status(self) -> str:
        done = self.node.run(HOOKS / "hast-ucarp.sh", "status", self.settings, check=False)
        return done.stdout.strip()

    def processes(self, text: str) -> list[int]:
        """Those of the node with this text in their command line."""
        return [pid for pid, title in self.node.titles().items() if text in title.replace("\0", " ")]

    def mounted(self) -> bool:
        return str(self.point) in self.node.mounts()

    def services(self) -> list[str]:
        """What the services were told, in order: "start one"..."""
        path = self.node.directory / "services"
        return path.read_text().splitlines() if path.exists() else []

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def is_up(self) -> bool:
        """All of it, and the file system is on the device that is there now."""
        if not self.mounted() or self.node.status()["role"] != "primary":
            return False
        return self.point.stat().st_dev == self.node.device().stat().st_rdev

    def is_down(self, role: str = "init") -> bool:
        return not self.mounted() and self.node.status()["role"] == role
