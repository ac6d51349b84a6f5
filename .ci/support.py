"""A kubelet and an API server for tests, over real sockets: what tests, chaos, bench, fuzz and install share.

They do to a device plugin and to a DRA driver what the real ones do. They must not be more lenient than these, or they
would hide faults of the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import re
import ssl
import stat
import sys
import time
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import smarter_device_manager as sdm

sdm.load_grpc()
import grpc  # noqa: E402

import api_pb2 as pb  # noqa: E402
import api_pb2_grpc as rpc  # noqa: E402

DIAL_SECONDS = 10.0
DRA_CALL_SECONDS = 45.0
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
        answer = getattr(pb, sdm._DRA_SERVICES[service][method][1])
        call = channel.unary_unary(f"/{service}/{method}", type(request).SerializeToString, answer.FromString)
        return await call(request, timeout=DRA_CALL_SECONDS)
