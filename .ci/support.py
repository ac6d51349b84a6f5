"""What tests, chaos, bench, fuzz and install share: a made-up node, the daemon on it, and a kubelet and an API server.

Kubelet and API server talk over real sockets, and do to a device plugin and to a DRA driver what the real ones do. They
must not be more lenient than these, or they would hide faults of the daemon. The simulated ones come first; Kubelet,
ApiServer and DraKubelet are these on a thread of the test process, with faults that a test can ask for.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import http.client
import itertools
import json
import math
import os
import random
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import smarter_device_manager as sdm

# Python 3.9 starts processes with fork(2), and one start in a hundred hangs in what grpc's core does around that.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
sdm.load_grpc()
import grpc  # noqa: E402

import api_pb2 as pb  # noqa: E402
import api_pb2_grpc as rpc  # noqa: E402

DIAL_SECONDS = 10.0
DRA_CALL_SECONDS = 45.0
PATIENCE = 20.0  # seconds to wait for a condition, which is far more than it needs unless the machine is busy
SCRIPT = Path(sdm.__file__).resolve()
HERE = SCRIPT.parent
NODE_NAME = "node-1"
NODE_PATH = f"/api/v1/nodes/{NODE_NAME}"
API = "/apis/resource.k8s.io/v1"
LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
HEALTHY, UNHEALTHY = "Healthy", "Unhealthy"


class Client:
    """The simulated kubelet's connection to a plugin whose registration it accepted."""

    def __init__(self, name: str, endpoint: str, channel: grpc.aio.Channel, options: pb.DevicePluginOptions) -> None:
        self.name = name
        self.endpoint = endpoint
        self.options = options
        self.stub = rpc.DevicePluginStub(channel)
        self.lists: list[Mapping[str, pb.Device]] = []  # every list that came, by ID
        self.is_open = True  # the stream
        self.closed_at = math.inf  # time.monotonic() of its end
        self.stream: Optional[grpc.aio.UnaryStreamCall] = None
        self._channel = channel

    async def disconnect(self) -> None:
        """End the stream and the connection. With grpcio 1.51, closing the channel does not end the stream."""
        self.is_open = False
        self.closed_at = min(self.closed_at, time.monotonic())
        if self.stream:
            self.stream.cancel()
        await self._channel.close()


class SimulatedKubelet:
    """A kubelet whose directory for device plugins is FOLDER."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.clients: dict[str, Client] = {}  # the newest one per resource, by its name
        self.registrations: list[str] = []  # names of resources, in order
        self._server: Optional[grpc.aio.Server] = None
        self._watchers: dict[Client, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Remove every socket in the folder, as the kubelet does when it starts, and listen on kubelet.sock."""
        for item in os.scandir(self.folder):
            try:
                if stat.S_ISSOCK(item.stat(follow_symlinks=False).st_mode):
                    os.unlink(item.path)
            except FileNotFoundError:
                continue  # a plugin moved it into place, or removed it, just now
        self._server = grpc.aio.server()
        rpc.add_RegistrationServicer_to_server(self, self._server)
        # grpc removes the socket that it made when it stops, but the kubelet leaves its own behind: rename it.
        self._server.add_insecure_port(sdm.unix_target(f"{self.folder}/.kubelet"))
        await self._server.start()
        os.rename(f"{self.folder}/.kubelet", f"{self.folder}/kubelet.sock")

    async def stop(self) -> None:
        """End every connection and leave a dead kubelet.sock behind."""
        if self._server:
            await self._server.stop(None)
        for watcher in self._watchers.values():
            watcher.cancel()
        await asyncio.gather(*self._watchers.values(), return_exceptions=True)
        self._watchers.clear()

    async def Register(self, request: pb.RegisterRequest, context: grpc.aio.ServicerContext) -> pb.Empty:
        problem = self.find_problem(request)
        if problem:
            await context.abort(grpc.StatusCode.UNKNOWN, problem)
        # Like the real one, do not share a connection that an older channel still has with a server that is ending.
        own = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.aio.insecure_channel(sdm.unix_target(f"{self.folder}/{request.endpoint}"), own)
        try:
            options = await rpc.DevicePluginStub(channel).GetDevicePluginOptions(pb.Empty(), timeout=DIAL_SECONDS)
        except grpc.RpcError as error:
            await channel.close()
            await context.abort(grpc.StatusCode.UNKNOWN, f"failed to dial device plugin: {error.details()}")
        client = Client(request.resource_name, request.endpoint, channel, options)
        self.registrations.append(client.name)
        self.clients[client.name] = client
        self._watchers[client] = asyncio.ensure_future(self._watch(client))
        return pb.Empty()

    def find_problem(self, request: pb.RegisterRequest) -> str:
        """Why the kubelet would refuse this registration; empty if it would not."""
        domain, _, name = request.resource_name.partition("/")
        if request.version != "v1beta1":
            return f"requested API version {request.version!r} is not supported by kubelet"
        if not sdm.is_domain(domain):
            return f"the ResourceName {request.resource_name!r} is invalid: its domain"
        if len(name) > 63 or not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?", name):
            return f"the ResourceName {request.resource_name!r} is invalid: its name"
        return ""

    async def _watch(self, client: Client) -> None:
        """Read the list stream of CLIENT. At its end, disconnect the newest client of that resource, whichever that is.

        The real kubelet does so, too.
        """
        client.stream = client.stub.ListAndWatch(pb.Empty())
        try:
            async for message in client.stream:
                client.lists.append({device.ID: device for device in message.devices})
        except grpc.RpcError as error:
            sdm.log.debug("the stream of %s ended: %s", client.name, error.code())
        finally:
            self._watchers.pop(client, None)
            await client.disconnect()
            await self.clients.get(client.name, client).disconnect()

    def devices(self, name: str) -> Mapping[str, str]:
        """The health of each ID of the resource NAME; all are Unhealthy when the stream has ended."""
        client = self.clients.get(name)
        if client is None or not client.lists:
            return {}
        return {slot_id: device.health if client.is_open else UNHEALTHY for slot_id, device in client.lists[-1].items()}

    async def allocate(self, name: str, count: int = 1) -> tuple[list[str], pb.ContainerAllocateResponse]:
        """Allocate COUNT slots of the resource NAME to one container; the IDs, and the plugin's answer.

        Raises sdm.Problem if there are too few Healthy slots, and grpc.RpcError if the plugin refuses.
        """
        client = self.clients[name]
        free = sorted(slot_id for slot_id, health in self.devices(name).items() if health == HEALTHY)
        if len(free) < count:
            raise sdm.Problem(f"{name} has {sdm.pluralize(len(free), 'Healthy slot')}, fewer than {count}")
        ids = free[:count]
        if client.options.get_preferred_allocation_available:
            asked = pb.PreferredAllocationRequest()
            asked.container_requests.add(available_deviceIDs=free, allocation_size=count)
            preferred = await client.stub.GetPreferredAllocation(asked)
            ids = list(preferred.container_responses[0].deviceIDs)
        request = pb.AllocateRequest()
        request.container_requests.add(devices_ids=ids)
        response = await client.stub.Allocate(request)
        return ids, response.container_responses[0]

    async def start_container(self, name: str, ids: Iterable[str]) -> None:
        """Ask whether a container with IDS of the resource NAME may start, as the kubelet does before each start.

        Raises grpc.RpcError if the plugin refuses.
        """
        client = self.clients[name]
        if client.options.pre_start_required:
            await client.stub.PreStartContainer(pb.PreStartContainerRequest(devices_ids=ids))


class SimulatedApiServer:
    """An API server that has the Node NODE and what a DRA driver needs, on a port of the loopback address."""

    def __init__(self, node: str) -> None:
        self.url = ""
        self.objects: dict[str, sdm.Document] = {}  # by path
        self._versions = itertools.count(1)
        self._server: Optional[asyncio.AbstractServer] = None
        self.put(f"/api/v1/nodes/{node}", {"metadata": {"name": node, "uid": "11111111-2222-4333-8444-555555555555"}})

    async def start(self, port: int = 0, tls: Optional[ssl.SSLContext] = None) -> None:
        """Listen on PORT, or on a free port; with TLS if it is given."""
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", port, ssl=tls)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stop listening."""
        if self._server:
            self._server.close()
            await self._server.wait_closed()

    def put(self, path: str, item: sdm.Document) -> sdm.Document:
        """Store ITEM under PATH with a new resourceVersion, and return it."""
        metadata = {**item["metadata"], "resourceVersion": str(next(self._versions))}
        self.objects[path] = {**item, "metadata": metadata}
        return self.objects[path]

    def list(self, path: str) -> list[sdm.Document]:
        """The objects of the collection PATH."""
        return [item for key, item in list(self.objects.items()) if key.rpartition("/")[0] == path]

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            method, target, _, body = await self.read_request(reader)
            status, document = self.respond(method, target, body)
            writer.write(self.format_answer(status, document))
            await writer.drain()
        writer.close()

    async def read_request(self, reader: asyncio.StreamReader) -> tuple[str, str, str, sdm.Document]:
        """The method, target, whole head and body of the next request from READER."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"\r\ncontent-length: ([0-9]+)\r", head, re.IGNORECASE)
        data = await reader.readexactly(int(length[1]) if length else 0)
        method, target, _ = head.split(" ", 2)
        return method, target, head, json.loads(data) if data else {}

    def format_answer(self, status: int, document: sdm.Document, header: str = "") -> bytes:
        """The bytes of an answer; HEADER is one more header line."""
        content = json.dumps(document).encode()
        return f"HTTP/1.1 {status} Status\r\nContent-Length: {len(content)}\r\n{header}\r\n".encode() + content

    def respond(self, method: str, target: str, body: sdm.Document) -> tuple[int, sdm.Document]:
        """Handle a request; the HTTP status and the document that answer it."""
        path = target.partition("?")[0]
        if method == "POST":
            path += f"/{body['metadata']['name']}"
        old = self.objects.get(path)
        if method == "GET" and path == f"{sdm._API}/resourceslices":
            items, query = self.list(path), dict(re.findall("[?&](limit|continue)=([0-9]+)", target))
            start = int(query.get("continue", 0))
            end = start + int(query.get("limit", len(items)))
            return 200, {"metadata": {"continue": str(end)} if end < len(items) else {}, "items": items[start:end]}
        if old is None and method != "POST":
            kind, name = path.split("/")[-2:]
            details = {"name": name, "group": "resource.k8s.io", "kind": kind}
            found = {"kind": "Status", "status": "Failure", "reason": "NotFound", "details": details, "code": 404}
            return 404, {**found, "message": f'{kind} "{name}" not found'}
        if old is not None and method == "POST":
            return 409, {"message": f"{path} exists"}
        if method == "PUT" and old and body["metadata"]["resourceVersion"] != old["metadata"]["resourceVersion"]:
            return 409, {"message": f"{path} has been modified"}
        if method == "DELETE":
            return 200, self.objects.pop(path)
        if method in ("POST", "PUT"):
            self.put(path, body)
        return 201 if method == "POST" else 200, self.objects[path]


class SimulatedDraKubelet:
    """A kubelet whose own directory is FOLDER, for DRA drivers: it registers them, and has them prepare claims."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.drivers: dict[str, grpc.aio.Channel] = {}  # by name
        for name in ("plugins", "plugins_registry"):
            os.makedirs(f"{folder}/{name}", exist_ok=True)

    async def register(self, name: str) -> pb.PluginInfo:
        """Register the driver whose socket in plugins_registry is NAME. Raises grpc.RpcError."""
        async with grpc.aio.insecure_channel(f"unix:{self.folder}/plugins_registry/{name}") as channel:
            info = await self.call(channel, sdm.PLUGIN_REGISTRATION, "GetInfo", pb.InfoRequest())
            self.drivers[info.name] = grpc.aio.insecure_channel(f"unix:{info.endpoint}")
            status = pb.RegistrationStatus(plugin_registered=True)
            await self.call(channel, sdm.PLUGIN_REGISTRATION, "NotifyRegistrationStatus", status)
        return info

    async def stop(self) -> None:
        """End every connection."""
        for channel in self.drivers.values():
            await channel.close()

    async def prepare(self, driver: str, *claims: pb.Claim) -> pb.NodePrepareResourcesResponse:
        """Have DRIVER prepare CLAIMS. Raises grpc.RpcError."""
        request = pb.NodePrepareResourcesRequest(claims=claims)
        return await self.call(self.drivers[driver], sdm.DRA_PLUGIN, "NodePrepareResources", request)

    async def unprepare(self, driver: str, *claims: pb.Claim) -> pb.NodeUnprepareResourcesResponse:
        """Have DRIVER unprepare CLAIMS. Raises grpc.RpcError."""
        request = pb.NodeUnprepareResourcesRequest(claims=claims)
        return await self.call(self.drivers[driver], sdm.DRA_PLUGIN, "NodeUnprepareResources", request)

    async def call(self, channel: grpc.aio.Channel, service: str, method: str, request: Any) -> Any:
        """Call METHOD of SERVICE. Raises grpc.RpcError."""
        answer = getattr(pb, sdm.DRA_METHODS[method][2])
        call = channel.unary_unary(f"/{service}/{method}", type(request).SerializeToString, answer.FromString)
        return await call(request, timeout=DRA_CALL_SECONDS)


def wait_for(condition: Callable[[], Any], what: str | Callable[[], str] = "", patience: float = PATIENCE) -> Any:
    """Wait until CONDITION returns something true, and return that. The failure says WHAT was missing; where that is a
    function, it is called after the wait."""
    give_up = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > give_up:
            missing = what() if callable(what) else what or condition
            raise AssertionError(f"not within {patience} s: {missing}")
        time.sleep(0.01)


AS_A_MODULE = "import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {here!r})\n"
AS_A_MODULE += "import smarter_device_manager as sdm\n{fault}\nsys.exit(sdm.main())"
FAIL = "def fail(*_):\n    raise KeyError('nobody foresaw this')\n"  # for a fault such as "sdm.render_page = fail"


def script_command(fault: str = "") -> list[str]:
    """A command that runs the script as a module, because Python keeps what it has compiled of a module, and compiling
    is most of a start. FAULT is statements that are run before all else."""
    code = AS_A_MODULE.format(here=str(HERE), fault=FAIL + fault if fault else "")
    return [sys.executable, "-c", code, str(SCRIPT)]


def keeping_byte_code(environment: Mapping[str, str] | None) -> dict[str, str]:
    """ENVIRONMENT, or that of this process, without what keeps Python from keeping what it has compiled."""
    found = dict(os.environ if environment is None else environment)
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    return found


class Node:
    """A made-up node: its /dev, /sys, plugin directory and config file, below a path short enough for sockets."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.dev, self.sys, self.plugins = root / "dev", root / "sys", root / "p"
        self.conf = root / "conf.yaml"
        self.pod_resources = root / "pod-resources.sock"
        for folder in (self.dev, self.sys / "devices", self.sys / "dev/char", self.sys / "dev/block", self.plugins):
            folder.mkdir(parents=True, mode=0o755)
        self.minor = 0

    def rules(self, text: str) -> None:
        """Replace the config file, as an editor does."""
        new = self.root / "conf.new"
        new.write_text(text)
        new.rename(self.conf)

    def plug(self, path: str, major: int = 240, minor: int | None = None, block: bool = False) -> Path:
        """Make a device node below /dev; without MINOR it has a number of its own."""
        self.minor += 1
        node = self.dev / path
        node.parent.mkdir(parents=True, exist_ok=True)
        number = os.makedev(major, self.minor if minor is None else minor)
        os.mknod(node, (stat.S_IFBLK if block else stat.S_IFCHR) | 0o600, number)
        return node

    def link(self, path: str, target: str) -> Path:
        """Make a symbolic link below /dev; it replaces what was there."""
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
        """Make the folder of a device below /sys/devices, with ATTRIBUTES, and NODE's link to it in /sys/dev."""
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
        """The options that make the script use this node."""
        paths = {
            "--conf": self.conf,
            "--plugin-dir": self.plugins,
            "--pod-resources-socket": self.pod_resources,
            "--dev-dir": self.dev,
            "--sys-dir": self.sys,
        }
        return [part for option, path in paths.items() for part in (option, str(path))]

    def run(self, *more: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run the script on this node until it exits."""
        command = [*script_command(), *self.options(), *more]
        environment = keeping_byte_code(kwargs.pop("env", None))
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=environment, **kwargs
        )


class Daemon:
    """A daemon: a process that runs the script, and its log."""

    def __init__(
        self,
        node: Node,
        *more: str,
        through: Sequence[str] = (),
        stderr: int | None = None,
        fault: str = "",
        command: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """Start it with the options MORE, through the command THROUGH (setpriv(1), say), with its log on the descriptor
        STDERR instead of in a file. FAULT is statements that are run before all else. COMMAND runs the script instead
        of script_command(), as a node does.

        Do not use preexec_fn: this process has grpc's threads, and one child in a hundred crashes before its exec.
        """
        self.node = node
        self.fault = fault
        descriptor, self._log = tempfile.mkstemp(dir=node.root, prefix="log-")
        words = command or [*through, *script_command(fault), "--interval", "0.1"]
        environment = keeping_byte_code(kwargs.pop("env", None))
        with os.fdopen(descriptor, "w") as log:
            words = [*words, *node.options(), *more]
            self.process = subprocess.Popen(words, stderr=stderr or log, stdout=log, env=environment, **kwargs)

    @property
    def log(self) -> str:
        return Path(self._log).read_text()

    def says(self, pattern: str, patience: float = PATIENCE) -> re.Match[str]:
        """Wait until PATTERN matches in the log."""
        return wait_for(lambda: re.search(pattern, self.log), lambda: f"{pattern!r} in the log:\n{self.log}", patience)

    def hang_up(self) -> None:
        """Send SIGHUP: the daemon reads the config file and all devices again."""
        self.process.send_signal(signal.SIGHUP)

    def stop(self, patience: float = PATIENCE) -> int:
        """Send SIGTERM, and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience)

    def kill(self) -> None:
        """Send SIGKILL, which ends it as a crash would."""
        self.process.kill()
        self.process.wait(PATIENCE)


def with_constants(**constants: float) -> list[str]:
    """A command through which a daemon has other values of the script's CONSTANTS, so that a test need not wait."""
    changes = "".join(f"sdm.{name} = {value}; " for name, value in constants.items())
    code = AS_A_MODULE.replace("argv[1:]", "argv[4:]").format(here=str(HERE), fault=changes)  # of the command itself
    return [sys.executable, "-c", code]


def holders_message(*entries: tuple[str, str, Sequence[str]]) -> pb.ListPodResourcesResponse:
    """The kubelet's answer about who holds which slots. An entry is a resource with its domain, namespace/pod/container
    and the IDs. The answer has a pod per entry, as the real one may."""
    response = pb.ListPodResourcesResponse()
    for name, who, ids in entries:
        namespace, pod, container = who.split("/")
        found = response.pod_resources.add(namespace=namespace, name=pod).containers.add(name=container)
        for slot_id in ids:  # the real one has an item per NUMA node, or per ID
            found.devices.add(resource_name=name, device_ids=[slot_id])
    return response


class PodResources:
    """The kubelet's PodResources API, on the node's socket for it. The answer is bytes, so that a test can break it."""

    def __init__(self, node: Node) -> None:
        self.path = str(node.pod_resources)
        self.answer: bytes = b""
        self.delay = 0.0  # seconds before it answers
        self.count = 0  # of calls
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(self._list, pb.ListPodResourcesRequest.FromString)
        handlers = grpc.method_handlers_generic_handler("v1.PodResourcesLister", {"List": handler})
        self._server.add_generic_rpc_handlers((handlers,))
        self._server.add_insecure_port(f"unix:{self.path}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server:
            await self._server.stop(None)

    async def _list(self, request: pb.ListPodResourcesRequest, context: Any) -> bytes:
        self.count += 1
        await asyncio.sleep(self.delay)
        return self.answer


class Kubelet(SimulatedKubelet):
    """The simulated kubelet on a thread of its own, with faults that a test can ask for."""

    loop: asyncio.AbstractEventLoop  # shared by all of them, as grpc.aio requires

    def __init__(self, node: Node, domain: str = sdm.DEFAULT_DOMAIN) -> None:
        super().__init__(str(node.plugins))
        self.domain = domain
        self.refused: dict[str, str] = {}  # why to refuse the registration of a resource, by its name
        self.delay = 0.0  # seconds before it answers a registration
        self.opens_streams = True
        self.ends_streams = False  # after the first list
        self.while_registering: Callable[[pb.RegisterRequest], Any] | None = None
        self.refusals: list[str] = []  # names of resources, in order
        self.requests: list[tuple[float, pb.RegisterRequest]] = []
        self.open_calls = self.most_open_calls = 0
        self.streams: dict[str, list[tuple[float, Client]]] = {}  # per resource: when each one was opened
        self.trapped: list[str] = []  # resources whose older stream ended while a newer one was open
        self.pod_resources = PodResources(node)

    def __enter__(self) -> Kubelet:
        return self.up()

    def __exit__(self, *_: object) -> None:
        self.down()

    def do(self, work: Any, patience: float = PATIENCE) -> Any:
        """Run the coroutine WORK on the kubelet's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(patience)

    def up(self) -> Kubelet:
        self.do(self.start())
        return self

    def down(self) -> None:
        self.do(self.stop())

    async def start(self) -> None:
        await super().start()
        await self.pod_resources.start()

    async def stop(self) -> None:
        await self.pod_resources.stop()
        await super().stop()

    def hold(self, *entries: tuple[str, str, Sequence[str]]) -> None:
        """From now on, answer with these ENTRIES: the resource, namespace/pod/container, and the IDs of its slots."""
        self.pod_resources.answer = holders_message(
            *((self.name(resource), who, ids) for resource, who, ids in entries)
        ).SerializeToString()

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.Empty:
        self.requests.append((time.monotonic(), request))
        self.open_calls += 1
        self.most_open_calls = max(self.most_open_calls, self.open_calls)
        try:
            if self.while_registering:
                await self.while_registering(request)
            await asyncio.sleep(self.delay)
            return await super().Register(request, context)
        finally:
            self.open_calls -= 1

    def find_problem(self, request: pb.RegisterRequest) -> str:
        problem = self.refused.get(request.resource_name.partition("/")[2], "") or super().find_problem(request)
        if problem:
            self.refusals.append(request.resource_name)
        return problem

    async def _watch(self, client: Client) -> None:
        if not self.opens_streams:
            return
        self.streams.setdefault(client.name, []).append((time.monotonic(), client))
        ending = asyncio.ensure_future(self._disconnect_after_list(client)) if self.ends_streams else None
        await super()._watch(client)
        if ending:
            await ending
        if self.clients.get(client.name) is not client:
            self.trapped.append(client.name)

    async def _disconnect_after_list(self, client: Client) -> None:
        while not client.lists:
            await asyncio.sleep(0.01)
        await client.disconnect()

    def client(self, resource: str) -> Client:
        return self.clients[self.name(resource)]

    def end_stream(self, resource: str) -> None:
        """Disconnect from RESOURCE, as the kubelet does when something goes wrong."""
        self.do(self.client(resource).disconnect())

    def times(self, resource: str) -> list[float]:
        """When RESOURCE asked to be registered."""
        return [when for when, request in self.requests if request.resource_name == self.name(resource)]

    def count(self, resource: str) -> int:
        """How often RESOURCE asked to be registered."""
        return len(self.times(resource))

    def name(self, resource: str) -> str:
        return f"{self.domain}/{resource}"

    def health(self, resource: str) -> Mapping[str, str]:
        """The health of each ID, as the kubelet knows it."""
        return self.devices(self.name(resource))

    def wait_for(self, resource: str, **health: int) -> None:
        """Wait until RESOURCE has this many slots of each health: Healthy=2, Unhealthy=0."""

        def counts() -> bool:
            found = list(self.health(resource).values())
            return self.name(resource) in self.clients and all(
                found.count(word) == count for word, count in health.items()
            )

        wait_for(counts, lambda: f"{resource} with {health}; kubelet has {dict(self.health(resource))}")

    def take(self, resource: str, *ids: str) -> pb.ContainerAllocateResponse:
        """Allocate these IDs to one container; without any, the first Healthy one."""
        client = self.clients[self.name(resource)]
        chosen = ids or [slot for slot, health in sorted(self.health(resource).items()) if health == HEALTHY][:1]

        async def allocate() -> pb.AllocateResponse:
            request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=chosen)])
            return await client.stub.Allocate(request, timeout=PATIENCE)

        return self.do(allocate()).container_responses[0]

    def starts(self, resource: str, *ids: str) -> None:
        """Ask whether a container with these IDs may start, as the kubelet does before each start."""
        self.do(self.start_container(self.name(resource), ids))

    def gives(self, resource: str, *ids: str) -> dict[str, str]:
        """The devices that a container with these IDs is given: container path -> host path."""
        return {spec.container_path: spec.host_path for spec in self.take(resource, *ids).devices}


def run_kubelets() -> None:
    """Have kubelets and API servers run on a thread from now on."""
    Kubelet.loop = asyncio.new_event_loop()
    threading.Thread(target=Kubelet.loop.run_forever, daemon=True).start()


def refuse_without_root(program: str, purpose: str) -> None:
    """Say plainly what is missing if device nodes cannot be made."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.mknod(f"{folder}/node", 0o20600, os.makedev(240, 0))
        except OSError as error:
            raise SystemExit(
                f"{program}: cannot make device nodes ({error.strerror}), and without them there is nothing to "
                f"{purpose}: run it as root, with CAP_MKNOD"
            ) from None


def longest_gap(streams: Sequence[tuple[float, float]]) -> float:
    """How long at the most there was no open stream between the first and the last, each being open FROM and UNTIL."""
    gaps, covered = [], min(streams)[0]
    for opened, closed in sorted(streams):
        gaps.append(opened - covered)
        covered = max(covered, closed)
    return max(gaps)


def answer_bytes(status: int, body: object, *headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return "\r\n".join([f"HTTP/1.0 {status} Status", *headers, "", ""]).encode() + content


def result_of(device: str, request: str = "r", **more: str) -> dict[str, str]:
    return {"request": request, "driver": "smarter-devices", "pool": NODE_NAME, "device": device, **more}


RIGHTS = {
    *(("resourceslices", verb) for verb in ("get", "list", "create", "update", "delete")),
    ("resourceclaims", "get"), ("deviceclasses", "get"), ("deviceclasses", "create"), ("nodes", "get"),
}  # fmt: skip
VERBS = {"POST": "create", "PUT": "update", "DELETE": "delete"}


class ApiCall(NamedTuple):
    when: float
    verb: str
    kind: str
    name: str
    status: int


class ApiServer(SimulatedApiServer):
    """The simulated API server on the kubelets' thread, and the faults that a test has it show."""

    def __init__(self, folder: Path) -> None:
        super().__init__(NODE_NAME)
        self.folder = folder
        self.calls: list[ApiCall] = []
        self.rights = set(RIGHTS)
        self.tokens = {"one"}
        self.drops_taints = False  # as before 1.36
        self.keeps_open = self.sends_chunks = False  # of a connection, and of an answer
        self.fault: Callable[[str, str], bytes | float | None] = lambda verb, kind: None  # bytes, or seconds of silence
        self.before_write: Callable[[str], Any] | None = None
        self.port = 0

    def up(self, certificate: str = "server") -> ApiServer:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.folder / f"{certificate}.crt", self.folder / f"{certificate}.key")
        Kubelet.do(self, self.start(self.port, tls))
        self.port = int(self.url.rpartition(":")[2])
        return self

    def down(self) -> None:
        Kubelet.do(self, self.stop())

    loop = property(lambda self: Kubelet.loop)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            method, target, head, body = await self.read_request(reader)
            match = re.match(r".*?/v1(?:/namespaces/[^/]+)?/([a-z]+)/?([^?]*)", target)
            assert match, target
            kind, name = match.groups()
            verb = VERBS.get(method) or ("get" if name else "list")
            fault = self.fault(verb, kind)
            if isinstance(fault, float):
                await asyncio.sleep(fault)
            token = re.search(r"\r\nAuthorization: Bearer (\S+)", head)
            if " HTTP/1.1\r\n" not in head:
                status, answer = 426, self.format_answer(426, {"message": "Upgrade Required"})
            elif isinstance(fault, bytes):
                status, answer = int((re.search(rb" (\d+)", fault) or [b"", b"0"])[1]), fault
            elif not token or token[1] not in self.tokens:
                status, answer = 401, self.format_answer(401, {"message": "Unauthorized"})
            elif (kind, verb) not in self.rights:
                message = f'{kind} is forbidden: User "sdm" cannot {verb} resource "{kind}"'
                status, answer = 403, self.format_answer(403, {"message": message})
            else:
                status, document = self.respond(method, target, body)
                answer = self.format_answer(status, document)
            self.calls.append(ApiCall(time.monotonic(), verb, kind, name, status))
            writer.write(answer)
            await writer.drain()
            if self.keeps_open:
                await reader.read()
        writer.close()

    def format_answer(self, status: int, document: dict[str, Any], header: str = "") -> bytes:
        answer = super().format_answer(status, document, header)
        if not self.sends_chunks:
            return answer
        body = answer.partition(b"\r\n\r\n")[2]
        chunks = [b"%X\r\n%s\r\n" % (len(part), part) for part in (body[:9], body[9:]) if part]
        return answer_bytes(status, b"".join([*chunks, b"0\r\n\r\n"]), "Transfer-Encoding: chunked")

    def respond(self, method: str, target: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if method in ("POST", "PUT"):
            if self.before_write:
                self.before_write(target)
            problem = self.find_problem(body)
            if problem:
                return 422, {"message": problem}
        return super().respond(method, target, body)

    def put(self, path: str, item: dict[str, Any]) -> dict[str, Any]:
        item = json.loads(json.dumps(item))
        for device in (item.get("spec") or {}).get("devices", ()):
            if self.drops_taints:
                device.pop("taints", None)
            for taint in device.get("taints", ()):
                taint.setdefault("timeAdded", "2026-01-01T00:00:00Z")
        item["metadata"] = {**item["metadata"], "creationTimestamp": "2026-01-01T00:00:00Z", "generation": 7}
        return super().put(path, item)

    def find_problem(self, body: dict[str, Any]) -> str:
        """Why a real API server would not have BODY."""
        if body["kind"] != "ResourceSlice":
            return ""
        spec, owner = body["spec"], body["metadata"]["ownerReferences"]
        devices = spec["devices"]
        limit = 64 if any(device.get("taints") for device in devices) else 128
        if len(devices) > limit or len({device["name"] for device in devices}) < len(devices):
            return f"more than {limit} devices, or one twice"
        for device in devices:
            texts = [value["string"] for value in device["attributes"].values() if "string" in value]
            if not re.fullmatch(LABEL, device["name"]) or any(len(text.encode()) > 64 for text in texts):
                return f"the device {device} is invalid"
        if owner != [{"apiVersion": "v1", "kind": "Node", "name": NODE_NAME, "uid": self.node_uid}]:
            return f"the owner {owner} is invalid"
        return "" if 0 < spec["pool"]["generation"] < 1 << 63 and spec["pool"]["name"] else "the pool is invalid"

    @property
    def node_uid(self) -> str:
        return str(self.objects[NODE_PATH]["metadata"]["uid"])

    def slices(self) -> list[dict[str, Any]]:
        return self.list(f"{API}/resourceslices")

    def devices(self) -> dict[str, dict[str, Any]]:
        """The devices as the scheduler sees them: of the newest generation, and only if all its slices are there."""
        slices = self.slices()
        newest = max((item["spec"]["pool"]["generation"] for item in slices), default=0)
        current = [item for item in slices if item["spec"]["pool"]["generation"] == newest]
        if any(item["spec"]["pool"]["resourceSliceCount"] != len(current) for item in current):
            return {}
        return {device["name"]: device for item in current for device in item["spec"]["devices"]}

    def tainted(self) -> set[str]:
        return {name for name, device in self.devices().items() if device.get("taints")}

    def classes(self) -> dict[str, dict[str, Any]]:
        return {item["metadata"]["name"]: item for item in self.list(f"{API}/deviceclasses")}

    def writes(self) -> list[tuple[str, str]]:
        return [(call.verb, call.kind) for call in self.calls if call.verb in ("create", "update", "delete")]

    def remove_slices(self) -> None:
        for item in self.slices():
            del self.objects[f"{API}/resourceslices/{item['metadata']['name']}"]


class DraKubelet(SimulatedDraKubelet):
    """The simulated kubelet for DRA drivers, on the kubelets' thread: it registers every socket that appears."""

    loop = property(lambda self: Kubelet.loop)

    def __init__(self, folder: Path, api: ApiServer) -> None:
        super().__init__(str(folder))
        self.api = api
        self.infos: list[pb.PluginInfo] = []
        self._seen: dict[str, tuple[int, int]] = {}
        self._watcher: asyncio.Task[None] | None = None

    def up(self) -> DraKubelet:
        """Start, or start again."""
        self.down()
        self.do(self._remove_slices())
        self._seen.clear()
        self._watcher = asyncio.run_coroutine_threadsafe(self._watch(), self.loop)  # type: ignore[assignment]
        return self

    def down(self) -> None:
        if self._watcher:
            self._watcher.cancel()
        Kubelet.do(self, self.stop())
        self.drivers.clear()

    async def _remove_slices(self) -> None:
        """What the kubelet does when it starts."""
        self.api.remove_slices()

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(OSError, grpc.RpcError):  # it went just now, or nobody listens
                for name, socket_file in self._sockets().items():
                    if self._seen.get(name) != socket_file:
                        self.infos.append(await self.register(name))
                        self._seen[name] = socket_file
            await asyncio.sleep(0.01)

    def _sockets(self) -> dict[str, tuple[int, int]]:
        """What stands in plugins_registry: inode and time of change by name. Raises OSError."""
        items = [item for item in os.scandir(f"{self.folder}/plugins_registry") if not item.name.startswith(".")]
        return {item.name: (found.st_ino, found.st_ctime_ns) for item in items for found in [item.stat()]}

    def find_unregistered(self) -> set[str]:
        """The sockets that are there and not registered."""
        sockets = self._sockets().items()
        return {name for name, _ in sockets - self._seen.items()}

    def do(self, work: Any) -> Any:
        return Kubelet.do(self, work)  # type: ignore[arg-type]


class Cluster:
    """A node, its API server and its kubelet, for a DRA driver."""

    def __init__(self, node: Node, certificates: Path) -> None:
        self.node = node
        self.api = ApiServer(certificates).up()
        self.kubelet = DraKubelet(node.root / "k", self.api).up()
        self.cdi = node.root / "cdi"
        self.token = node.root / "token"
        self.token.write_text("one\n")
        self.count = 0

    def options(self, **changes: str) -> list[str]:
        options = {
            "api": "dra", "kubelet-dir": self.kubelet.folder, "cdi-dir": str(self.cdi), "node-name": NODE_NAME,
            "kube-api": self.api.url, "kube-token-file": str(self.token), "kube-ca-file": f"{self.api.folder}/ca.crt",
        }  # fmt: skip
        return [part for key, value in {**options, **changes}.items() for part in (f"--{key}", value)]

    def serve(self, start: Callable[..., Daemon], *more: str, **constants: float) -> Daemon:
        """A driver for video0 with two slots, with CONSTANTS of its own; and wait until it is ready."""
        daemon = start(*self.options(), *more, through=with_constants(**constants) if constants else ())
        self.ready("video0-0", "video0-1")
        return daemon

    def claim(self, *devices: str | dict[str, Any], requests: Mapping[str, str] | None = None) -> pb.Claim:
        """A claim that was allocated these DEVICES, by one request if REQUESTS (request by device) do not say which.

        A device may be a whole result of the allocation."""
        self.count += 1
        claim = pb.Claim(namespace="default", name=f"claim-{self.count}", uid=f"0000-{self.count:04}")
        results = [
            result_of(device, (requests or {}).get(device, "r")) if isinstance(device, str) else device
            for device in devices
        ]
        status = {"allocation": {"devices": {"results": [*results, result_of("x", driver="gpu.example.com")]}}}
        self.api.put(self.path(claim), {"metadata": {"name": claim.name, "uid": claim.uid}, "status": status})
        return claim

    def start_again(self, start: Callable[..., Daemon], daemon: Daemon, **constants: float) -> Daemon:
        """Kill DAEMON, and start another one with CONSTANTS of its own; it is registered when this returns."""
        daemon.kill()
        daemon = start(*self.options(), through=with_constants(**constants))
        daemon.says("registered with the kubelet")
        return daemon

    def give(self, *devices: str | dict[str, Any]) -> pb.Claim:
        """A claim that was allocated these DEVICES, and prepared."""
        claim = self.claim(*devices)
        self.gives(claim)
        return claim

    def path(self, claim: pb.Claim) -> str:
        return f"{API}/namespaces/{claim.namespace}/resourceclaims/{claim.name}"

    def prepare(self, claim: pb.Claim) -> pb.NodePrepareResourceResponse:
        response = self.kubelet.do(self.kubelet.prepare("smarter-devices", claim))
        assert list(response.claims) == [claim.uid]
        return response.claims[claim.uid]

    @contextlib.contextmanager
    def preparing(self, *claims: pb.Claim) -> Iterator[Callable[[], list[str]]]:
        """Have CLAIMS prepared by one call meanwhile; yields what waits for its end and returns their errors."""
        call = asyncio.run_coroutine_threadsafe(self.kubelet.prepare("smarter-devices", *claims), self.kubelet.loop)
        yield lambda: [call.result(50).claims[claim.uid].error for claim in claims]
        call.result(50)

    def unprepare(self, *claims: pb.Claim) -> None:
        response = self.kubelet.do(self.kubelet.unprepare("smarter-devices", *claims))
        assert {uid: answer.error for uid, answer in response.claims.items()} == {claim.uid: "" for claim in claims}

    def file(self, claim: pb.Claim) -> Path:
        return self.cdi / f"smarter-devices_{claim.uid}.json"

    def files(self) -> set[str]:
        """The names in the CDI folder that a container runtime reads."""
        return {path.name for path in self.cdi.glob("[!.]*")}

    def gives(self, claim: pb.Claim, *requests: str) -> tuple[dict[str, str], list[str]]:
        """What a container runtime gives to a container with CLAIM: nodes (path -> host path), and env."""
        prepared = self.prepare(claim)
        assert not prepared.error, prepared.error
        return self.edits(claim, [item for device in prepared.devices for item in device.cdi_device_ids])

    def edits(self, claim: pb.Claim, ids: Sequence[str]) -> tuple[dict[str, str], list[str]]:
        document = json.loads(self.file(claim).read_text())
        by_id = {f"{document['kind']}={device['name']}": device["containerEdits"] for device in document["devices"]}
        nodes: dict[str, str] = {}
        env: list[str] = []
        for cdi_id in ids:
            nodes.update((node["path"], node["hostPath"]) for node in by_id[cdi_id].get("deviceNodes", ()))
            env = by_id[cdi_id].get("env", env)
        return nodes, env

    def taints(self) -> dict[str, str]:
        """The taint of each device that has one: key:effect, the key without the domain."""
        taints = {name: taint for name, device in self.api.devices().items() for taint in device.get("taints", ())}
        return {name: f"{taint['key'].partition('/')[2]}:{taint['effect']}" for name, taint in taints.items()}

    def wait_for_devices(self, *names: str) -> dict[str, dict[str, Any]]:
        wait_for(lambda: set(self.api.devices()) == set(names), lambda: f"{names}, not {list(self.api.devices())}")
        return self.api.devices()

    def ready(self, *names: str) -> None:
        """Wait until the driver is registered and has published the devices NAMES, and the classes."""
        self.wait_for_devices(*names)
        resources = {device["attributes"]["resource"]["string"] for device in self.api.devices().values()}
        wait_for(lambda: "smarter-devices" in self.kubelet.drivers and len(self.api.classes()) > len(resources))


def make_certificates(folder: Path) -> Path:
    """Make in FOLDER a CA, another CA, and one between the first and a server; certificates of theirs for a server at
    127.0.0.1, and one for another host."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    def certify(ca: str, name: str, extension: str) -> None:
        (folder / "extensions").write_text(f"{extension}\n")
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ["-CA", f"{ca}.crt", "-CAkey", f"{ca}.key", "-CAcreateserial", "-days", "9", "-extfile", "extensions"]
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.crt")

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for ca in ("ca", "other-ca"):
        openssl("req", "-x509", *key, "-keyout", f"{ca}.key", "-out", f"{ca}.crt", "-subj", f"/CN={ca}", "-days", "9")
    certify("ca", "between", "basicConstraints=CA:TRUE")
    for ca, server, address in [
        ("ca", "server", "127.0.0.1,DNS:localhost"), ("other-ca", "other", "127.0.0.1"), ("ca", "wrong", "::1"),
        ("between", "below", "127.0.0.1"),
    ]:  # fmt: skip
        certify(ca, server, f"subjectAltName=IP:{address}")
    os.mkfifo(folder / "fifo")
    return folder


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: str


class Status:
    """The status server of a daemon, as a client sees it."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        host, _, port = daemon.says(r"serving health.* address=(\S+)")[1].rpartition(":")
        self.host = {"[::]": "127.0.0.1"}.get(host, host.strip("[]"))
        self.port = int(port)
        self.address = sdm.address_text((self.host, self.port))
        self.url = f"http://{self.address}/"

    def connect(self, host: str = "") -> socket.socket:
        return socket.create_connection((host or self.host, self.port), PATIENCE)

    def ask(self, path: str, method: str = "GET", host: str = "") -> Answer:
        connection = http.client.HTTPConnection(host or self.host, self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read().decode()
            return Answer(response.status, {key.lower(): value for key, value in response.getheaders()}, body)

    def say(self, data: bytes, is_done: bool = False) -> bytes:
        """Send DATA, and the end of it where IS_DONE; all that comes back until the server closes."""
        with self.connect() as connection:
            with contextlib.suppress(OSError):  # it may have had enough before the last byte
                connection.sendall(data)
                if is_done:
                    connection.shutdown(socket.SHUT_WR)
            return received(connection)

    def document(self) -> dict[str, Any]:
        answer = self.ask("/status.json")
        assert answer.status == 200
        return json.loads(answer.body)

    def resource(self, name: str) -> dict[str, Any]:
        found = [resource for resource in self.document()["resources"] if resource["name"].endswith(f"/{name}")]
        return found[0] if found else {}

    def metrics(self) -> dict[Any, float]:
        return samples(self.ask("/metrics").body)

    def wait_for(self, path: str, status: int) -> Answer:
        return wait_for(lambda: (answer := self.ask(path)).status == status and answer, f"{path}: {status}")


def received(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(1 << 16):
            data += chunk
    return data


def samples(text: str) -> dict[Any, float]:
    """Each sample's value by its name, or by that and its labels' values; names are without the prefix."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (name, *sample.labels.values()) if sample.labels else name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        for name in [sample.name.replace(sdm.PREFIX, "")]
    }


class Manager:
    """The socket of a service manager at ADDRESS, which begins with "@" if it is abstract, and what came there."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def environment(self, watchdog: str) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": watchdog}

    def hear(self, patience: float = PATIENCE) -> str:
        """The next message; "" if none comes in that time."""
        self._socket.settimeout(patience)
        try:
            self.heard.append(self._socket.recv(1000).decode())
        except socket.timeout:
            return ""
        return self.heard[-1]

    def wait_for_silence(self, seconds: float) -> None:
        wait_for(lambda: not self.hear(seconds), "silence")

    def close(self) -> None:
        self._socket.close()


class FullPipe:
    """A full pipe for the log of a daemon: a write into it waits until somebody reads."""

    def __init__(self, is_blocking: bool = True) -> None:
        self.reader, self.writer = os.pipe()
        self.text = ""  # that was read
        fcntl.fcntl(self.writer, 1031, 4096)  # F_SETPIPE_SZ, which has no name before Python 3.10
        os.set_blocking(self.writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writer, b"-\n" * 64)
        os.set_blocking(self.writer, is_blocking)

    def waits(self) -> bool:
        """Read what there is; whether there was something."""
        if not select.select([self.reader], [], [], 0.2)[0]:
            return False
        data = os.read(self.reader, 1 << 16)
        self.text += data.decode()
        return bool(data)

    def read(self) -> bool:
        """Read what there is; true."""
        self.waits()
        return True

    def read_to_the_end(self) -> str:
        """All that comes until the daemon has ended."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1
        wait_for(lambda: not (select.select([self.reader], [], [], PATIENCE)[0] and self.waits()))
        return self.text

    def __enter__(self) -> FullPipe:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self.reader, self.writer):
            if descriptor >= 0:
                os.close(descriptor)


CHROMIUM = shutil.which("chromium")


class Chromium:
    """Chromium without a screen, on a profile of its own; a context manager.

    It takes commands of the DevTools protocol as its descriptor 3 and answers on 4, JSON that ends with a NUL.
    """

    def __init__(self) -> None:
        quiet = "--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
        options = [*quiet.split(), "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # root has to
        self._profile = tempfile.mkdtemp(prefix="sdm-chromium-")
        theirs, ours = os.pipe(), os.pipe()  # what they read, what we read
        code = f"import os, sys; os.dup2({theirs[0]}, 3); os.dup2({ours[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(CHROMIUM), *options, f"--user-data-dir={self._profile}"],
            pass_fds=(theirs[0], ours[1]),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs[0])
        os.close(ours[1])
        self._commands, self._answers = os.fdopen(theirs[1], "wb", buffering=0), os.fdopen(ours[0], "rb")
        self._number = 0
        self._session: dict[str, str] = {}
        self.complaints: list[Any] = []  # of the page: its console, exceptions, what the policy forbids

    def __enter__(self) -> Chromium:
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.close()
        self._process.terminate()
        self._process.wait(PATIENCE)
        self._answers.close()
        shutil.rmtree(self._profile, ignore_errors=True)  # a process of it may be writing still

    def do(self, method: str, **parameters: Any) -> Any:
        """Have it do METHOD; the result."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters, **self._session}
        self._commands.write(json.dumps(command).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.complaints.append(answer["params"])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> Any:
        data = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "Chromium is gone"
            data += byte
        return json.loads(data)

    def show(self, url: str, width: int = 1280, is_dark: bool = False) -> None:
        """Load a page in a window of WIDTH."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.do("Page.navigate", url=url)
        wait_for(lambda: self.run("location.href != 'about:blank' && document.readyState == 'complete'"))

    def run(self, code: str) -> Any:
        """The value of CODE, an expression of JavaScript, or of what it promises."""
        result = self.do("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self) -> str:
        """What is to be read on the page."""
        return self.run("document.body.innerText")

    def picture(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        size = self.do("Page.getLayoutMetrics")["cssContentSize"]
        clip = {**size, "scale": 1}
        shot = self.do("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))


def typed(value: Any) -> Any:
    """VALUE in a form in which == tells True from 1, and one order of keys from another."""
    if isinstance(value, dict):
        return "mapping", [(typed(key), typed(item)) for key, item in value.items()]
    if isinstance(value, list):
        return "list", [typed(item) for item in value]
    return type(value), value


def parse_yaml(text: str) -> Any:
    """What yaml.safe_load() should return for TEXT, by the product's parser."""

    def plain(node: sdm.Node) -> Any:
        if isinstance(node.value, dict):
            return {key: plain(item) for key, (_, item) in node.value.items()}
        return [plain(item) for item in node.value] if isinstance(node.value, list) else node.value

    return plain(sdm.YamlParser(text).document())


def obeys_the_law(text: str) -> bool:
    """Check that TEXT is read as PyYAML reads it, or refused at a place in it; whether it was read."""
    try:
        found = parse_yaml(text)
    except sdm.ConfigError as error:
        lines = text.replace("\r\n", "\n").split("\n")
        assert 1 <= error.line <= len(lines), (text, str(error))
        assert 1 <= error.column <= len(lines[error.line - 1]) + 1, (text, str(error))
        assert re.fullmatch(r"line \d+, column \d+: .{10,}", str(error), re.DOTALL)
        return False
    import yaml

    assert typed(found) == typed(yaml.safe_load(text)), text
    return True


def cut(text: str, sign: str | None = None) -> list[str]:
    """The parts of TEXT between SIGNs, or between blanks."""
    return text.split(sign)


WORDS = cut(r"""a x:y a#b ^video[0-9]*$ /dev/x -a -- é a,b a\b it's 1.2.3 yes No ON y Null NULL null ~ true True FALSE 0
    7 -1 +5 -0 012 0o7 0x1F 0b1 1_000 1e3 1.5 .5 1. .inf -.INF .nan 12:30 190:20:30.15 = 2001-01-01 2001-12-14t21:59:43Z
    << 123456789012345678 1234567890123456789 ?x :x - ? : | > %x @x `x &a *a !x !!str""")
WORDS += ["b c", "\U0001f600", "2001-12-14 21:59:43.10 -5", "9" * 30]
SIGNS = [*"-?:,[]{}#&*!|>'\"%@`\\ \t\n\r\0\x07\x7f\x85\xa0\u2028\u2029\ufeff\ud800\ufffe\uffff"]
SIGNS += cut(r"""--- ... '' "a": 'a' [a,] [,] {a} #c \x41 \u00e9 \U0001F600 \ud800 \U00110000""")
SIGNS += [f"\\{char}" for char in '0abt\tnvfre "\\/N_LPxuU\n']
SIGNS += cut(
    "- @: @ #@\n- @\n  @\n    @  @--- @\n---\n@\r\n@a: b@- a\n@\na: @\n  b: @[a, b]@{a: b}@[a: b]@? a@%YAML 1.1\n", "@"
)
SIGNS += ["|\n a", ">-\n a", "&a a", "!!int 1", "<<: ", "# c\n"]

GROWN_FROM = [
    (HERE / "conf.yaml").read_text()[:700],
    "---\n- devicematch: ^snd$ # sound\n  nummaxdevices: 20\n",
    '- devicematch: "^ttyUSB[0-9]*$"\n  attributes: {idVendor: \'10c4\', serial: ".*A5\\"XK.*"}\n  with: [a,\n  c]\n',
    "a:\n  b: [1, 2, {c: d}]\n  'q': \"\\x41\\u00e9\\n\"\ne: ~\nf:\n- 1\n- -2\n",
    "- - - a\n    - b\n  - c\n-\n  - d: e\n    f:\n    - g\n",
    "\ufeff# c\r\n---\r\na: b\r\nc:\r\n",
]


ATOMS = [*"abAkKsS_079-/.^$|()*+?[]{} #~&\néÉ\x7f\xa0"]
ATOMS += cut(r"""(?: (?i) (?i: (?s) (?m) (?-i) (?i-s: (?P<n> (?<m> (?) *? +? ?? {2} {0} {0,} {1,2} {1,3} {2,} {,2} {01}
    {1,2 [a-c] [^a] []a] [^]a] [a-] [a--] [a&&b] [a||b] [a~~b] [[a] [[:a] [a-\d] [+-[:digit:]] [\w-] [\d-z] [^\W]
    [^[:upper:][:digit:]] [[:foo:]] \x41 \x{e9} \x7 \101 \12 \18 \x{110000} \pL""")
ATOMS += [f"[[:{hat}{name}:]]" for name in sdm._POSIX_CLASSES for hat in ("", "^")]
ATOMS += [f"\\{char}" for char in "dDwWsSbBAzZantvfr.-_/1078yé"]
NESTED_ATOMS = (*"abks^$.", "", *cut(r"\b \B [ab] [^a] \d (?i:k) (?i:[a-s]) (?i:\W) (?i:[[:^lower:]]) (?m:^) (?m:$)"))
NESTED_REPEATS = cut("* + ? *? +? ?? {2} {0} {1} {0,1} {1,2} {1,2}? {0,2} {1,3} {2,} {0,} {1,}?")


def nested_expression(rng: random.Random, depth: int = 5) -> str:
    """An expression of nested groups, alternatives and repeats over few characters."""
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(NESTED_ATOMS)
    inner, other = nested_expression(rng, depth - 1), nested_expression(rng, depth - 1)
    kind = rng.choice(("both", "either", "group", "repeat", "repeat"))
    if kind == "both":
        return inner + other
    if kind == "either":
        return f"(?:{inner}|{other})"
    group = f"({inner})" if len(inner) > 1 or kind == "group" else inner
    return group if kind == "group" else group.replace("(", rng.choice(("(", "(?:")), 1) + rng.choice(NESTED_REPEATS)
