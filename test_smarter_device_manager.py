"""Tests of smarter_device_manager.py: real processes, real sockets, real files.

The daemon runs as a process of its own on a made-up /dev, /sys and plugin directory; the stand-in kubelet (the class of
the script, made to misbehave where a test asks for it) runs on a thread here. Pure functions are tested as functions.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import pytest

import smarter_device_manager as sdm

sdm.load_grpc()
import grpc  # noqa: E402

import api_pb2 as pb  # noqa: E402

SCRIPT = Path(sdm.__file__).resolve()
HERE = SCRIPT.parent
PATIENCE = 20.0  # seconds that a condition may take; it takes less, but machines are slow at times
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making device nodes takes root (mknod(2))")


def wait_for(condition: Callable[[], Any], what: str = "", patience: float = PATIENCE) -> Any:
    """Wait until CONDITION is true, and return what it gave."""
    give_up = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > give_up:
            raise AssertionError(f"not within {patience} s: {what or condition}")
        time.sleep(0.01)


class Node:
    """A made-up node: its /dev, /sys, plugin directory and conf file, all below one short path (socket paths are)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.dev, self.sys, self.plugins = root / "dev", root / "sys", root / "p"
        self.conf = root / "conf.yaml"
        for folder in (self.dev, self.sys / "devices", self.sys / "dev/char", self.sys / "dev/block", self.plugins):
            folder.mkdir(parents=True, mode=0o755)
        self.minor = 0

    def rules(self, text: str) -> None:
        """Replace the conf file, as an editor does."""
        new = self.root / "conf.new"
        new.write_text(text)
        new.rename(self.conf)

    def plug(self, path: str, major: int = 240, minor: int | None = None, block: bool = False) -> Path:
        """Make a device node below /dev, with a number of its own unless MINOR says which."""
        self.minor += 1
        node = self.dev / path
        node.parent.mkdir(parents=True, exist_ok=True)
        number = os.makedev(major, self.minor if minor is None else minor)
        os.mknod(node, (stat.S_IFBLK if block else stat.S_IFCHR) | 0o600, number)
        return node

    def link(self, path: str, target: str) -> Path:
        """Make a symbolic link below /dev, in place of what was there."""
        link = self.dev / path
        link.parent.mkdir(parents=True, exist_ok=True)
        new = link.with_name(".new")
        new.symlink_to(target)
        new.rename(link)
        return link

    def unplug(self, path: str) -> None:
        """Remove a name below /dev."""
        (self.dev / path).unlink()

    def sysfs(self, path: str, attributes: Mapping[str, str], node: Path | None = None) -> Path:
        """Make a device's folder below /sys/devices with ATTRIBUTES, and NODE's link to it under /sys/dev."""
        folder = self.sys / "devices" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in attributes.items():
            (folder / name).write_text(value + "\n")
        if node is not None:
            found = node.lstat()
            kind = "block" if stat.S_ISBLK(found.st_mode) else "char"
            link = self.sys / "dev" / kind / f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(folder, link.parent))
        return folder

    def options(self) -> list[str]:
        """The options that lead the script here."""
        paths = {"--conf": self.conf, "--plugin-dir": self.plugins, "--dev-dir": self.dev, "--sys-dir": self.sys}
        return [part for option, path in paths.items() for part in (option, str(path))]

    def run(self, *more: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run the script to its end on this node."""
        command = [sys.executable, str(SCRIPT), *self.options(), *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


class Daemon:
    """The script as a running daemon, and its log."""

    def __init__(self, node: Node, *more: str, through: Sequence[str] = (), **kwargs: Any) -> None:
        """Start it with the options MORE, THROUGH a command such as setpriv(1) where one is given.

        No preexec_fn: with grpc's threads in this process, one child in a hundred crashes before its exec.
        """
        self.node = node
        descriptor, self._log = tempfile.mkstemp(dir=node.root, prefix="log-")
        command = [*through, sys.executable, str(SCRIPT), *node.options(), "--interval", "0.1", *more]
        with os.fdopen(descriptor, "w") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, **kwargs)

    @property
    def log(self) -> str:
        return Path(self._log).read_text()

    def says(self, pattern: str) -> re.Match[str]:
        """Wait until the log has PATTERN."""
        return wait_for(lambda: re.search(pattern, self.log), f"{pattern!r} in the log:\n{self.log}")

    def hang_up(self) -> None:
        """Have conf and devices read again."""
        self.process.send_signal(signal.SIGHUP)

    def stop(self, patience: float = PATIENCE) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience)

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait(PATIENCE)


class Kubelet(sdm.StandInKubelet):
    """The stand-in kubelet on a thread of its own, and faults for it to show."""

    loop: asyncio.AbstractEventLoop  # one for all of them: grpc.aio wants it so

    def __init__(self, node: Node, domain: str = sdm.DEFAULT_DOMAIN) -> None:
        super().__init__(str(node.plugins))
        self.domain = domain
        self.refused: dict[str, str] = {}  # what to say to the registration of these resources
        self.delay = 0.0  # seconds before a registration is looked at
        self.opens_streams = True
        self.refusals: list[tuple[str, float]] = []

    def do(self, work: Any, patience: float = PATIENCE) -> Any:
        """Run the coroutine WORK on the kubelet's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(patience)

    def up(self) -> Kubelet:
        self.do(self.start())
        return self

    def down(self) -> None:
        self.do(self.stop())

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.Empty:
        await asyncio.sleep(self.delay)
        return await super().Register(request, context)

    def find_problem(self, request: pb.RegisterRequest) -> str:
        problem = self.refused.get(request.resource_name.partition("/")[2], "") or super().find_problem(request)
        if problem:
            self.refusals.append((request.resource_name, time.monotonic()))
        return problem

    async def _watch(self, client: sdm.Client) -> None:
        if self.opens_streams:
            await super()._watch(client)

    def name(self, resource: str) -> str:
        return f"{self.domain}/{resource}"

    def health(self, resource: str) -> Mapping[str, str]:
        """Each ID's health, as kubelet has it now."""
        return self.devices(self.name(resource))

    def wait_for(self, resource: str, **health: int) -> None:
        """Wait until RESOURCE has so many slots of each health: Healthy=2, Unhealthy=0."""

        def counts() -> bool:
            found = list(self.health(resource).values())
            return self.name(resource) in self.clients and all(
                found.count(word) == count for word, count in health.items()
            )

        wait_for(counts, f"{resource} with {health}; kubelet has {dict(self.health(resource))}")

    def take(self, resource: str, *ids: str) -> pb.ContainerAllocateResponse:
        """Allocate these IDs (the first Healthy one where none is named) to one container."""
        client = self.clients[self.name(resource)]
        chosen = ids or [slot for slot, health in sorted(self.health(resource).items()) if health == sdm.HEALTHY][:1]

        async def allocate() -> pb.AllocateResponse:
            request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=chosen)])
            return await client.stub.Allocate(request, timeout=PATIENCE)

        return self.do(allocate()).container_responses[0]

    def gives(self, resource: str, *ids: str) -> dict[str, str]:
        """The nodes that a container with these IDs is given: container path -> host path."""
        return {spec.container_path: spec.host_path for spec in self.take(resource, *ids).devices}


@pytest.fixture(scope="session", autouse=True)
def kubelet_loop() -> Iterator[None]:
    loop = Kubelet.loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield
    loop.call_soon_threadsafe(loop.stop)
    thread.join(PATIENCE)


@pytest.fixture
def node() -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="sdm-") as folder:
        yield Node(Path(folder))


@pytest.fixture
def kubelet(node: Node) -> Iterator[Kubelet]:
    kubelet = Kubelet(node).up()
    yield kubelet
    kubelet.down()


@pytest.fixture
def start(node: Node) -> Iterator[Callable[..., Daemon]]:
    """Start daemons on the node; each is stopped at the end, and must not have shown a traceback."""
    daemons: list[Daemon] = []

    def start(*more: str, **kwargs: Any) -> Daemon:
        daemons.append(Daemon(node, *more, **kwargs))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.stop()
        assert "Traceback" not in daemon.log, daemon.log


# ---------------------------------------------------------------------------------------------------------------------
# Kubelet
# ---------------------------------------------------------------------------------------------------------------------


@needs_root
def test_a_device_goes_all_the_way(node: Node, kubelet: Kubelet, start: Callable[..., Daemon]) -> None:
    node.plug("video0")
    node.rules("- devicematch: ^video[0-9]*$\n  nummaxdevices: 2\n")
    daemon = start()
    kubelet.wait_for("video0", Healthy=2)
    assert kubelet.gives("video0", "1") == {"/dev/video0": "/dev/video0"}
    assert daemon.stop() == 0
