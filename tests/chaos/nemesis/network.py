"""Two network namespaces, one for each node, with a cable between them that can be pulled.

A relay ends connections where a network loses packets. Here the kernels of both ends do what they do when a cable is
pulled or a router goes mad: send again, give up late, and meet the other's memory of connections long gone.
"""

from __future__ import annotations

import os
import subprocess

from tests import tools

ADDRESSES = {"hasta": "10.98.0.1", "hastb": "10.98.0.2"}
NOBODY = "02:00:00:00:00:99"


def ip(*arguments: str) -> None:
    done = subprocess.run([str(tools.find("ip")), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


class Network:
    """Two namespaces with a pair of interfaces between them, `eth0` in both."""

    def __init__(self, number: int) -> None:
        self.names = {node: f"hast-chaos-{os.getpid()}-{number}-{node}" for node in ADDRESSES}
        one, other = self.names.values()
        for name in self.names.values():
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", other)
        for node, name in self.names.items():
            ip("-n", name, "address", "add", f"{ADDRESSES[node]}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                ip("-n", name, "link", "set", interface, "up")

    def prefix(self, node: str) -> list[str]:
        return [str(tools.find("nsenter")), f"--net=/run/netns/{self.names[node]}"]

    def lose(self, node: str) -> None:
        """What this node sends is lost, and nobody tells it."""
        (other,) = (address for name, address in ADDRESSES.items() if name != node)
        ip("-n", self.names[node], "neigh", "replace", other, "lladdr", NOBODY, "dev", "eth0", "nud", "permanent")

    def pull(self, node: str) -> None:
        """The node's cable: neither end has a carrier."""
        ip("-n", self.names[node], "link", "set", "eth0", "down")

    def narrow(self, node: str, rate: str) -> None:
        tc = [str(tools.find("tc")), "-n", self.names[node], "qdisc"]
        shape = ["replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "16kb", "latency", "300ms"]
        assert subprocess.run([*tc, *shape], capture_output=True, check=False).returncode == 0, "tc"

    def heal(self) -> None:
        for node, name in self.names.items():
            (other,) = (address for peer, address in ADDRESSES.items() if peer != node)
            ip("-n", name, "link", "set", "eth0", "up")
            for command in (["ip", "-n", name, "neigh", "del", other, "dev", "eth0"],
                            ["tc", "-n", name, "qdisc", "del", "dev", "eth0", "root"]):  # fmt: skip
                subprocess.run([str(tools.find(command[0])), *command[1:]], capture_output=True, check=False)

    def close(self) -> None:
        for name in self.names.values():
            ip("netns", "del", name)
