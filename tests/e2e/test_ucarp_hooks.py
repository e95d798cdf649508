"""etc/ucarp: a node goes up and down as ucarp tells it, whatever the order, the hurry, and what is broken."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hast import config, keeping, workers
from hast.device import fuse
from tests import tools
from tests.e2e.hookrig import DONE, FAILED, HOOKS, OVERTAKEN, Hooks
from tests.e2e.node import MIB, ROOT, Node, eventually

MakeHooks = Callable[..., Hooks]


@pytest.fixture
def make_hooks(make_node: Callable[..., Node]) -> MakeHooks:
    """Makes a node that runs, with an ext4 on its resource, in the role init."""
    tools.need_root()
    tools.need("mkfs.ext4")
    reason = fuse.usable()
    if reason is not None:
        pytest.skip(reason)

    def make(more: str = "") -> Hooks:
        node = make_node(device="fuse")
        node.primary()
        node.run(str(tools.find("mkfs.ext4")), "-q", node.device())
        node.role("init")
        return Hooks(node, more)

    return make


@pytest.fixture
def hooks(make_hooks: MakeHooks) -> Hooks:
    return make_hooks()


pytestmark = pytest.mark.root


def test_up_and_down_twice_each(hooks: Hooks) -> None:
    assert hooks.up() == DONE, hooks.said()
    assert hooks.is_up()
    assert hooks.status() == "up"
    (hooks.point / "file").write_text("content")
    assert hooks.up() == DONE, hooks.said()
    assert hooks.is_up()
    assert hooks.services() == ["start one", "start two"] * 2
    assert hooks.down() == DONE, hooks.said()
    assert hooks.is_down()
    assert hooks.status() == "down"
    assert hooks.down() == DONE, hooks.said()
    assert hooks.services()[4:] == ["stop two", "stop one"] * 2
    assert hooks.up() == DONE, hooks.said()
    assert (hooks.point / "file").read_text() == "content"
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    assert "noatime" in next(line for line in lines if f" {hooks.point} " in line)
    assert hooks.down() == DONE


def test_hooks_return_at_once(make_hooks: MakeHooks) -> None:
    """ucarp waits for its hooks, and is silent meanwhile: they return while the work, which cannot end, goes on."""
    hooks = make_hooks("services=slow service_timeout=3")
    assert hooks.call("up") == DONE
    eventually(lambda: hooks.status() == "up", "up")
    assert hooks.call("down") == DONE
    assert hooks.status() == "going down"
    eventually(lambda: hooks.status() == "down has failed", "down")  # the service did not end in its time


@pytest.mark.slow
def test_last_call_wins(hooks: Hooks) -> None:
    """Calls in quick succession, at random moments of each other's work; the state is in the end what the last one
    wanted, and every runner has ended."""
    rng = random.Random(7)
    for _ in range(8):
        verb = ""
        for _ in range(rng.randrange(2, 7)):
            verb = rng.choice(["up", "down"])
            assert hooks.call(verb) == DONE
            time.sleep(rng.random() * rng.choice([0, 0.1, 0.6]))  # the moment: nothing is waited for
        eventually(lambda verb=verb: hooks.status() == verb, f"{verb}; {hooks.said()[-3000:]}")
        assert hooks.is_up() if verb == "up" else hooks.is_down()
    assert "failed" not in hooks.said()
    assert hooks.down() == DONE
    eventually(lambda: not hooks.processes("hast-ucarp.sh"), "runners end")


@pytest.mark.slow
def test_calls_at_the_same_time(hooks: Hooks) -> None:
    """Six at once: each gets a number, the highest wins, those that wait are told how it went for what they wanted."""
    for _ in range(4):
        calls = [(verb, hooks.start(verb, "-w")) for verb in ["up", "down"] * 3]
        codes: dict[str, set[int]] = {"up": set(), "down": set()}
        for verb, call in calls:
            codes[verb].add(call.wait(150))
        number, verb = (hooks.node.directory / "ucarp" / "request").read_text().split()[:2]
        assert int(number) % 6 == 0
        assert hooks.status() == verb
        assert hooks.is_up() if verb == "up" else hooks.is_down()
        assert codes[verb] <= {DONE, OVERTAKEN} and DONE in codes[verb]
        assert codes["down" if verb == "up" else "up"] <= {DONE, OVERTAKEN}
    assert hooks.down() == DONE


def test_down_cancels_an_up_that_waits_for_the_device(make_hooks: MakeHooks) -> None:
    hooks = make_hooks("device_timeout=1000")
    settings = hooks.settings.read_text()
    hooks.settings.write_text(settings.replace(str(hooks.node.device()), "/dev/hast/never-there"))
    up = hooks.start("up", "-w")
    eventually(lambda: hooks.node.status()["role"] == "primary", "the role")
    assert hooks.down() == DONE
    assert up.wait(60) == OVERTAKEN
    assert hooks.is_down()
    assert "overtaken" in hooks.said()


def test_down_cancels_a_command_of_an_up(make_hooks: MakeHooks) -> None:
    """A service that takes ten minutes to start: down ends it, and does not wait for its time to be over."""
    hooks = make_hooks("service_timeout=1000 start_service=sleep services=600")
    up = hooks.start("up", "-w")
    eventually(lambda: hooks.processes("sleep 600"), "the service")
    hooks.settings.write_text(hooks.settings.read_text() + "services=\n")
    assert hooks.down() == DONE
    assert up.wait(60) == OVERTAKEN
    assert hooks.is_down()
    assert not hooks.processes("sleep 600")


SLOW_SERVICE = """#!/bin/sh
here=$(dirname "$0")
[ ! -e "$here/again" ] || exit 0
trap ': >"$here/told"; until [ -e "$here/again" ]; do sleep 0.02; done; exit 1' TERM
: >"$here/begun"
while :; do sleep 0.02; done
"""


def test_up_whose_command_was_ended_by_a_down_that_is_overtaken_has_not_failed(make_hooks: MakeHooks) -> None:
    """The command ends because of the down, when that is not what is wanted any more: it is done once more."""
    hooks = make_hooks()
    where = hooks.node.directory
    service = where / "slow-service"
    service.write_text(SLOW_SERVICE)
    service.chmod(0o755)
    hooks.settings.write_text(hooks.settings.read_text() + f"\nstart_service={service}\nservices=one\n")
    up = hooks.start("up", "-w")
    eventually((where / "begun").exists, "the service is being started")
    assert hooks.call("down") == DONE
    eventually((where / "told").exists, "the down has it ended")
    assert hooks.call("up") == DONE
    (where / "again").touch()
    assert up.wait(60) == DONE, hooks.said()
    eventually(lambda: hooks.status() == "up", "up")
    assert "failed" not in hooks.said() and "overtaken" in hooks.said()
    assert hooks.down() == DONE


def test_a_file_system_that_cannot_be_repaired(hooks: Hooks) -> None:
    """Nothing is mounted, what was taken is given up, and it is said why."""
    node = hooks.node
    node.role("primary")
    with node.device().open("r+b") as device:
        device.write(bytes(4 * MIB))
    node.role("init")
    assert hooks.up() == FAILED
    assert hooks.is_down()
    assert hooks.status() == "up has failed"
    assert "needs a person" in hooks.said()
    assert hooks.services() == ["stop two", "stop one"]


def test_without_hastd(hooks: Hooks) -> None:
    hooks.node.stop()
    assert hooks.up() == FAILED
    assert not hooks.mounted()
    assert hooks.down() == FAILED
    assert "hastd" in hooks.said()
    hooks.node.start()
    assert hooks.node.run(HOOKS / "hast-ucarp.sh", "again", "-w", hooks.settings).returncode == DONE
    assert hooks.status() == "down"


@pytest.mark.parametrize("obstinate", [False, True])
def test_users_of_the_file_system_are_killed(hooks: Hooks, obstinate: bool) -> None:
    assert hooks.up() == DONE, hooks.said()
    script = f"{'trap : TERM;' if obstinate else ''} exec 3>file; echo ready; while :; do sleep 1000; done"
    user = subprocess.Popen(
        ["sh", "-c", script], cwd=hooks.point, env=hooks.node.env, stdout=subprocess.PIPE, text=True
    )
    assert user.stdout is not None and user.stdout.readline() == "ready\n"
    assert hooks.down() == DONE, hooks.said()
    assert user.wait(60) == -(signal.SIGKILL if obstinate else signal.SIGTERM)
    user.stdout.close()
    assert hooks.is_down()
    assert hooks.up() == DONE, hooks.said()
    assert (hooks.point / "file").exists()
    assert hooks.down() == DONE


def test_after_a_kill_of_the_node_the_dead_mount_is_replaced(hooks: Hooks) -> None:
    """hastd dies and is started again; the file system of before has no device any more. up makes it good, fsck
    replays the journal, and what was synced is there."""
    assert hooks.up() == DONE, hooks.said()
    (hooks.point / "file").write_text("content")
    hooks.node.run("sync", "-f", hooks.point)
    (hooks.point / "later").write_text("content")
    hooks.node.kill()
    hooks.node.start()
    assert not hooks.is_up()
    assert hooks.up() == DONE, hooks.said()
    assert hooks.is_up()
    assert (hooks.point / "file").read_text() == "content"
    assert hooks.down() == DONE


def test_a_runner_that_was_killed(make_hooks: MakeHooks) -> None:
    """It does not look as if all was well, and the next call does its work."""
    hooks = make_hooks("service_timeout=1000 start_service=sleep services=600")
    hooks.start("up")
    # Not the logger that says so, nor timeout before it has started it.
    (service,) = eventually(lambda: [p for p, t in hooks.node.titles().items() if t == "sleep\x00600"], "the service")
    runner = min(hooks.processes("hast-ucarp.sh"))
    hooks.node.run("kill", "-9", str(runner))
    # The service lives on, and who watches it; neither has the runner's lock.
    eventually(lambda: hooks.status() == "going up was interrupted", "the runner's end")
    assert hooks.processes("hast-ucarp.sh")
    hooks.node.run("kill", "-9", str(service))
    eventually(lambda: not hooks.processes("hast-ucarp.sh"), "its watcher ends with it")
    hooks.settings.write_text(hooks.settings.read_text() + "services=\n")
    assert hooks.down() == DONE, hooks.said()
    assert hooks.is_down()


def test_no_file_system_only_the_role(make_hooks: MakeHooks) -> None:
    hooks = make_hooks()
    hooks.settings.write_text(hooks.settings.read_text() + f'resources="{hooks.node.name()}"\n')
    assert hooks.up() == DONE
    assert hooks.node.status()["role"] == "primary"
    assert not hooks.mounted()
    assert hooks.down() == DONE


UCARP = """#!/bin/sh
trap 'echo told' USR2
{hooks}/vip-up -w {arguments}
echo up
while :; do sleep 0.1; done
"""


def test_ucarp_is_told_when_hastd_gives_up_what_is_to_be_up(make_hooks: MakeHooks) -> None:
    """And not when that was asked for, when it is no resource of the hooks, or when the role is another one."""
    hooks = make_hooks()
    node, name = hooks.node, hooks.node.name()
    hooks.settings.write_text(hooks.settings.read_text() + f'resources="\nother\n{name}\n"\nhastctl=true\n')
    script = node.directory / "ucarp-bin" / "ucarp"
    script.parent.mkdir()
    script.write_text(UCARP.format(hooks=HOOKS, arguments=" ".join(hooks.arguments)))
    script.chmod(0o755)

    def event(*words: str) -> None:
        node.run(HOOKS / "hast-ucarp.sh", "event", hooks.settings, *words)

    with subprocess.Popen([script], env=node.env, stdout=subprocess.PIPE, text=True) as ucarp:
        assert ucarp.stdout is not None and ucarp.stdout.readline() == "up\n", hooks.said()
        for words in (["connect", name], ["role", name, "init", "primary"], ["role", "stranger", "primary", "init"]):
            event(*words)
        assert "cannot serve" not in hooks.said()
        event("role", name, "primary", "init")
        assert ucarp.stdout.readline() == "told\n"
        assert f"{name}: hastd cannot serve it" in hooks.said()
        assert hooks.down() == DONE
        before = hooks.said()
        event("role", name, "primary", "init")
        assert hooks.said() == before
        ucarp.kill()


def test_wrong_use() -> None:
    for arguments in ([], ["up"], ["up", "eth0"], ["sideways"], ["event", "settings", "role"]):
        done = subprocess.run(
            [HOOKS / "hast-ucarp.sh", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        assert done.returncode == 64
        assert done.stderr.startswith("usage:")


def test_shell_scripts_are_clean() -> None:
    tools.need("shellcheck")
    scripts = [*HOOKS.iterdir(), ROOT / "tools" / "requirements.sh", ROOT / "bin" / "hastd", ROOT / "bin" / "hastctl"]
    done = subprocess.run(
        [str(tools.find("shellcheck")), "--severity=warning", *scripts], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_systemd_waits_until_hastd_has_ended() -> None:
    """For its workers, the spawner's word, and the keeper. Who sets another `timeout` is told to add what is named."""
    unit = (ROOT / "etc" / "systemd" / "hastd.service").read_text()
    manual = (ROOT / "docs" / "hast.conf.5").read_text()
    more = workers.STOP_SECONDS + workers.TERM_SECONDS + workers.REPORT_SECONDS + keeping.END_SECONDS
    assert more <= 40 and "and 40 seconds" in unit and "at least 40 seconds longer" in manual
    assert f"TimeoutStopSec={config.DEFAULT_TIMEOUT + 40}\n" in unit


def test_systemd_unit(tmp_path: Path) -> None:
    analyze = tools.find("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "hastd.service"
    text = (ROOT / "etc" / "systemd" / "hastd.service").read_text()
    unit.write_text(text.replace("/usr/local/sbin/hastd", str(ROOT / "bin" / "hastd")))
    done = subprocess.run([analyze, "--man=no", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
