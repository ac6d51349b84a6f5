"""The tests of the script's chapters Plugin, Kubelet side and Stand-in kubelet, and of the main loop."""
# ruff: noqa: F405

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import socket

from test_smarter_device_manager import *  # noqa: F403
from test_smarter_device_manager import (
    HERE,
    PATIENCE,
    SCRIPT,
    Daemon,
    Kubelet,
    Node,
    grpc,
    needs_root,
    pb,
    sdm,
    wait_for,
)

# ---------------------------------------------------------------------------------------------------------------------
# Kubelet
# ---------------------------------------------------------------------------------------------------------------------

NAMES = ("full", "null", "random", "urandom", "zero")  # that every /dev has: an ordinary user can serve these
Starter = Callable[..., Daemon]


class Witness(Kubelet):
    """A kubelet that takes down what it is sent, and has more faults to show."""

    def __init__(self, node: Node, domain: str = sdm.DEFAULT_DOMAIN) -> None:
        super().__init__(node, domain)
        self.requests: list[tuple[float, pb.RegisterRequest]] = []
        self.open_calls = self.most_open_calls = 0
        self.trapped: list[str] = []  # resources of which an older stream ended while a newer one was open
        self.ends_streams = False
        self.while_registering: Callable[[pb.RegisterRequest], Any] | None = None

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.Empty:
        self.requests.append((time.monotonic(), request))
        self.open_calls += 1
        self.most_open_calls = max(self.most_open_calls, self.open_calls)
        try:
            if self.while_registering:
                await self.while_registering(request)
            return await super().Register(request, context)
        finally:
            self.open_calls -= 1

    async def _watch(self, client: sdm.Client) -> None:
        if self.ends_streams:
            asyncio.ensure_future(self._disconnect_after_list(client))
        await super()._watch(client)
        if self.clients.get(client.name) is not client:
            self.trapped.append(client.name)

    async def _disconnect_after_list(self, client: sdm.Client) -> None:
        while not client.lists:
            await asyncio.sleep(0.01)
        await client.disconnect()

    def client(self, resource: str) -> sdm.Client:
        return self.clients[self.name(resource)]

    def end_stream(self, resource: str) -> None:
        """Disconnect from RESOURCE, as kubelet does when something goes wrong."""
        self.do(self.client(resource).disconnect())

    def times(self, resource: str) -> list[float]:
        """When RESOURCE was registered, or tried to be."""
        return [when for when, request in self.requests if request.resource_name == self.name(resource)]

    def count(self, resource: str) -> int:
        """How often RESOURCE was registered, refused ones included."""
        return len(self.times(resource))


@pytest.fixture
def kubelet(node: Node) -> Iterator[Witness]:
    kubelet = Witness(node).up()
    yield kubelet
    kubelet.down()
    assert not kubelet.trapped, "registered while an earlier stream was open"


def offer(node: Node, *names: str, slots: int = 1) -> None:
    """Have NAMES served: made-up nodes, or for an ordinary user those of the real /dev."""
    if os.geteuid() == 0:
        for name in names:
            node.plug(name)
    else:
        node.dev = Path("/dev")
    node.rules("".join(f"- devicematch: ^{name}$\n  nummaxdevices: {slots}\n" for name in names))


def offer_many(node: Node, count: int) -> list[str]:
    """Have COUNT made-up nodes served: their names."""
    names = [f"video{number}" for number in range(count)]
    for name in names:
        node.plug(name)
    node.rules("- devicematch: ^video\n")
    return names


def all_ready(kubelet: Kubelet, names: Sequence[str]) -> bool:
    """Whether kubelet has an open stream of each, with a list."""
    found = [kubelet.clients.get(kubelet.name(name)) for name in names]
    return all(client and client.is_open and client.lists for client in found)


def wait_ready(kubelet: Kubelet, names: Sequence[str], patience: float = PATIENCE) -> None:
    wait_for(lambda: all_ready(kubelet, names), f"{len(names)} resources ready", patience)


def sockets(node: Node) -> dict[str, int]:
    """The sockets in the plugin directory but kubelet's, and their inodes."""
    found = {item.name: item.lstat() for item in node.plugins.iterdir() if item.name != "kubelet.sock"}
    return {name: what.st_ino for name, what in found.items() if stat.S_ISSOCK(what.st_mode)}


def settle(daemon: Daemon, seconds: float = 0.5) -> None:
    """Give the daemon the time to do what it should not do: there is no condition to wait for."""
    with pytest.raises(subprocess.TimeoutExpired):
        daemon.process.wait(seconds)


def stops_well(daemon: Daemon, node: Node, signum: int = signal.SIGTERM) -> None:
    """SIGNUM ends the daemon within 2 s, with exit status 0, and its sockets are gone."""
    began = time.monotonic()
    daemon.process.send_signal(signum)
    assert daemon.process.wait(PATIENCE) == 0
    assert time.monotonic() - began < 2.0
    assert not sockets(node)


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


@contextlib.contextmanager
def plugin_stub(node: Node, name: str) -> Iterator[Any]:
    """A client of a plugin's socket that is not kubelet."""
    with grpc.insecure_channel(f"unix:{node.plugins}/smarter-{name}.sock") as channel:
        yield sdm.rpc.DevicePluginStub(channel)


def refusal(kubelet: Kubelet, resource: str, *ids: str) -> tuple[str, str]:
    """The status and the words with which Allocate of IDS is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        kubelet.take(resource, *ids)
    return caught.value.code().name, caught.value.details()


# How it registers


def test_it_serves_before_it_registers_and_answers_while_it_registers(
    node: Node, kubelet: Witness, start: Starter
) -> None:
    answered = []

    async def ask(request: pb.RegisterRequest) -> None:
        async with grpc.aio.insecure_channel(f"unix:{node.plugins}/{request.endpoint}") as channel:
            stub = sdm.rpc.DevicePluginStub(channel)
            answered.append(await stub.GetDevicePluginOptions(pb.Empty(), timeout=PATIENCE))
            one = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["0"])])
            answered.append(await stub.Allocate(one, timeout=PATIENCE))

    kubelet.while_registering = ask
    offer(node, "null")
    start()
    kubelet.wait_for("null", Healthy=1)
    assert answered[0] == kubelet.client("null").options
    assert [spec.host_path for spec in answered[1].container_responses[0].devices] == ["/dev/null"]
    assert kubelet.count("null") == 1


def test_all_register_at_once(node: Node, kubelet: Witness, start: Starter) -> None:
    kubelet.delay = 1.0
    offer(node, *NAMES)
    start()
    wait_ready(kubelet, NAMES)
    assert kubelet.most_open_calls == len(NAMES)
    assert max(when for when, _ in kubelet.requests) - min(when for when, _ in kubelet.requests) < 0.9


def test_what_a_registration_says(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, "null", "zero")
    node.rules("- devicematch: ^null$\n- devicematch: ^zero$\n  resource: pool\n")
    start()
    wait_ready(kubelet, ["null", "pool"])
    for name, prefers in (("null", False), ("pool", True)):
        request = next(request for _, request in kubelet.requests if request.resource_name == kubelet.name(name))
        assert request.version == "v1beta1"
        assert request.endpoint == f"smarter-{name}.sock"
        assert request.options == kubelet.client(name).options  # what GetDevicePluginOptions said
        assert request.options.get_preferred_allocation_available == prefers
        assert not request.options.pre_start_required


def test_the_domain_of_the_resources(node: Node, start: Starter) -> None:
    kubelet = Witness(node, "example.org").up()
    try:
        offer(node, "null")
        start("--domain", "example.org")
        kubelet.wait_for("null", Healthy=1)
        assert list(sockets(node)) == ["smarter-null.example.org.sock"]
    finally:
        kubelet.down()


@pytest.mark.parametrize("domain", ["kubernetes.io", "a.kubernetes.io", "requests.example.org", "a" * 245, "A", "a_b"])
def test_a_domain_that_kubelet_would_refuse_is_refused_at_once(node: Node, domain: str) -> None:
    offer(node, "null")
    done = node.run("--domain", domain)
    assert done.returncode == 2
    assert domain in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": "v1beta2"},
        {"resource_name": "null"},
        {"resource_name": "/null"},
        {"resource_name": "node.kubernetes.io/null"},
        {"resource_name": "requests.example.org/null"},
        {"resource_name": "Example.org/null"},
        {"resource_name": f"{'a' * 245}/null"},
        {"resource_name": "example.org/_null"},
        {"resource_name": "example.org/n@ll"},
        {"resource_name": f"example.org/{'n' * 64}"},
        {"endpoint": "nobody.sock"},
    ],
)
def test_the_stand_in_refuses_what_kubelet_refuses(node: Node, kubelet: Witness, wrong: dict[str, str]) -> None:
    good = {"version": "v1beta1", "resource_name": "example.org/null", "endpoint": "null.sock"}
    channel = grpc.insecure_channel(f"unix:{node.plugins}/kubelet.sock")
    with channel, pytest.raises(grpc.RpcError) as caught:
        sdm.rpc.RegistrationStub(channel).Register(pb.RegisterRequest(**{**good, **wrong}), timeout=PATIENCE)
    assert caught.value.code() == grpc.StatusCode.UNKNOWN
    words = {"version": "v1beta2", "resource_name": "is invalid", "endpoint": "failed to dial device plugin"}
    assert words[next(iter(wrong))] in caught.value.details()
    assert not kubelet.registrations


def test_device_ids_are_0_to_n_less_1(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, *NAMES[:3])
    node.rules(
        "- devicematch: ^full$\n- devicematch: ^null$\n  nummaxdevices: 3\n"
        "- devicematch: ^random$\n  nummaxdevices: 0\n"
    )
    start()
    wait_ready(kubelet, NAMES[:3])
    assert kubelet.health("full") == {"0": "Healthy"}
    assert kubelet.health("null") == {"0": "Healthy", "1": "Healthy", "2": "Healthy"}
    assert kubelet.health("random") == {}


def test_sockets_are_for_root_alone_from_their_first_moment_on(node: Node, kubelet: Witness, start: Starter) -> None:
    modes: dict[str, set[int]] = {}
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            for item in os.scandir(node.plugins):
                with contextlib.suppress(FileNotFoundError):
                    if item.name != "kubelet.sock":
                        modes.setdefault(item.name, set()).add(stat.S_IMODE(item.stat(follow_symlinks=False).st_mode))

    offer(node, *NAMES)
    thread = threading.Thread(target=look)
    thread.start()
    try:
        start(umask=0)
        wait_ready(kubelet, NAMES)
    finally:
        is_over.set()
        thread.join(PATIENCE)
    assert set(sockets(node)) <= modes.keys()
    assert set.union(*modes.values()) == {0o600}


def lengthen(node: Node, length: int) -> None:
    """Have the node's plugin directory at a path of LENGTH bytes."""
    node.plugins = node.plugins / "x".ljust(length - len(str(node.plugins)) - 1, "x")
    node.plugins.mkdir()
    assert len(str(node.plugins)) == length


@pytest.mark.parametrize("length", [60, 83])
def test_a_socket_path_is_no_longer_than_unix_has_it(node: Node, start: Starter, length: int) -> None:
    lengthen(node, length)
    kubelet = Witness(node).up()
    try:
        offer(node, "null", "urandom")
        node.rules("- devicematch: ^null$\n- devicematch: ^urandom$\n  resource: a_name_of_some_length_for_a_device\n")
        start()
        wait_ready(kubelet, ["null", "a_name_of_some_length_for_a_device"])
        names = sorted(sockets(node))
        assert names[1] == "smarter-null.sock"
        assert re.fullmatch(r"smarter-a[a-z_]*-[0-9a-f]{8}\.sock", names[0])
        assert len(f"{node.plugins}/{names[0]}") == 107
        assert kubelet.gives("a_name_of_some_length_for_a_device") == {"/dev/urandom": "/dev/urandom"}
    finally:
        kubelet.down()


@pytest.mark.parametrize("length", [84, 115])
def test_a_plugin_directory_too_long_for_any_socket_is_said(node: Node, length: int) -> None:
    offer(node, "null")
    lengthen(node, length)
    done = node.run()
    assert done.returncode == 1
    assert f"the path {node.plugins} is {length - 83} bytes too long" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_plugin_directory_is_an_error_that_names_it(node: Node) -> None:
    offer(node, "null")
    done = node.run("--plugin-dir", f"{node.root}/nowhere")
    assert done.returncode == 1
    assert f"{node.root}/nowhere" in done.stderr and "--dry-run" in done.stderr


# Allocate


@needs_root
def test_a_node_once_a_container_whatever_its_slots(node: Node, kubelet: Witness, start: Starter) -> None:
    node.plug("snd/controlC0")
    node.plug("snd/pcmC0D0p")
    node.rules("- devicematch: ^snd$\n  nummaxdevices: 4\n")
    start()
    kubelet.wait_for("snd", Healthy=4)
    given = kubelet.take("snd", "0", "1", "3")
    assert [(spec.host_path, spec.container_path, spec.permissions) for spec in given.devices] == [
        ("/dev/snd/controlC0", "/dev/snd/controlC0", "rw"),
        ("/dev/snd/pcmC0D0p", "/dev/snd/pcmC0D0p", "rw"),
    ]
    with plugin_stub(node, "snd") as stub:
        asked = [pb.ContainerAllocateRequest(devices_ids=["0"]), pb.ContainerAllocateRequest(devices_ids=["1", "2"])]
        both = stub.Allocate(pb.AllocateRequest(container_requests=asked), timeout=PATIENCE).container_responses
    assert [len(one.devices) for one in both] == [2, 2]


def test_an_unknown_id_is_refused_and_named(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, "null", slots=2)
    daemon = start()
    kubelet.wait_for("null", Healthy=2)
    for wrong in ("2", "00", "-1", "null:0", "", "\u0661", "1\n", "9" * 5000):
        status, words = refusal(kubelet, "null", "0", wrong)
        assert status == "INVALID_ARGUMENT"
        assert words == f'smarter-devices/null: no device ID "{wrong[:200]}"'
    assert kubelet.gives("null", "1") == {"/dev/null": "/dev/null"}
    daemon.says(r'WARNING Allocate refused: no device ID "2" resource=smarter-devices/null ids=0,2 ')


@needs_root
def test_a_device_that_is_gone_is_unavailable_and_named(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, "null")
    start("--interval", "3600")
    kubelet.wait_for("null", Healthy=1)
    node.unplug("null")
    status, words = refusal(kubelet, "null", "0")
    assert status == "UNAVAILABLE"
    assert "/dev/null" in words and "gone" in words


@needs_root
def test_links_and_folders_are_resolved_at_that_moment(node: Node, kubelet: Witness, start: Starter) -> None:
    node.plug("ttyUSB0")
    node.plug("ttyUSB1")
    node.plug("snd/controlC0")
    node.link("serial/by-id/usb-a", "../../ttyUSB0")
    node.rules("- devicematch: ^serial/by-id/usb-a$\n- devicematch: ^snd$\n")
    start("--interval", "3600")
    kubelet.wait_for("serial_by-id_usb-a", Healthy=1)
    kubelet.wait_for("snd", Healthy=1)
    assert kubelet.gives("serial_by-id_usb-a") == {"/dev/serial/by-id/usb-a": "/dev/ttyUSB0"}
    node.link("serial/by-id/usb-a", "../../ttyUSB1")
    node.plug("snd/controlC1")
    assert kubelet.gives("serial_by-id_usb-a") == {"/dev/serial/by-id/usb-a": "/dev/ttyUSB1"}
    assert sorted(kubelet.gives("snd")) == ["/dev/snd/controlC0", "/dev/snd/controlC1"]


# The list


@needs_root
def test_gone_is_unhealthy_and_back_is_healthy_without_a_registration(
    node: Node, kubelet: Witness, start: Starter
) -> None:
    offer(node, "null", slots=2)
    start()
    kubelet.wait_for("null", Healthy=2)
    node.unplug("null")
    kubelet.wait_for("null", Unhealthy=2)
    node.plug("null")
    kubelet.wait_for("null", Healthy=2)
    assert kubelet.count("null") == 1
    assert len(kubelet.client("null").lists) == 3


@needs_root
def test_no_list_is_sent_that_changes_nothing(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, "null", "zero")
    daemon = start()
    wait_ready(kubelet, ["null", "zero"])
    (node.dev / "null").chmod(0o666)
    daemon.hang_up()
    node.rules("- devicematch: ^null$\n- devicematch: ^zero$\n- devicematch: ^full$\n")
    node.plug("full")
    wait_ready(kubelet, ["full"])
    node.unplug("zero")
    kubelet.wait_for("zero", Unhealthy=1)
    assert len(kubelet.client("null").lists) == 1
    assert len(kubelet.client("zero").lists) == 2
    assert [kubelet.count(name) for name in ("null", "zero", "full")] == [1, 1, 1]


def test_a_device_that_no_rule_names_any_more_is_retired_at_once(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, "null", "zero")
    start()
    wait_ready(kubelet, ["null", "zero"])
    node.rules("- devicematch: ^null$\n")
    wait_for(lambda: not kubelet.client("zero").is_open)
    assert list(sockets(node)) == ["smarter-null.sock"]
    assert len(kubelet.client("null").lists) == 1


def test_named_and_not_named_in_quick_succession(node: Node, kubelet: Witness, start: Starter) -> None:
    """An old server has ended before the next of its name registers, however fast the rules flip."""
    offer(node, "null", "zero")
    daemon = start("--interval", "0.01")
    wait_ready(kubelet, ["null", "zero"])
    usual = descriptors(daemon)
    for turn in range(60):
        node.rules("- devicematch: ^null$\n" if turn % 2 else "- devicematch: ^(null|zero)$\n")
        daemon.hang_up()
        time.sleep(0.01 * (turn % 5))
    node.rules("- devicematch: ^(null|zero)$\n")
    wait_for(lambda: all_ready(kubelet, ["null", "zero"]) and len(sockets(node)) == 2)
    assert kubelet.count("null") == 1
    wait_for(lambda: descriptors(daemon) <= usual)
    stops_well(daemon, node)


@needs_root
def test_a_list_longer_than_kubelet_takes_is_not_sent(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, "null", *(f"{'x' * 100}{number}" for number in range(4)))
    node.rules("- devicematch: ^null$\n- devicematch: ^x\n  resource: pool\n  nummaxdevices: 10000\n")
    daemon = start()
    daemon.says("smarter-devices/pool: its list of slots is longer than kubelet takes .*; lower its nummaxdevices")
    kubelet.wait_for("null", Healthy=1)
    assert kubelet.count("pool") == 0


# kubelet comes and goes


def test_no_kubelet_is_one_line_and_waiting(node: Node, start: Starter) -> None:
    offer(node, *NAMES)
    daemon = start()
    daemon.says("INFO .*offers 5 resources")
    daemon.says("kubelet is not there: no .*/kubelet.sock; waiting for it")
    settle(daemon)
    assert daemon.log.count("kubelet") == 2  # in one line
    kubelet = Witness(node).up()
    wait_ready(kubelet, NAMES)
    kubelet.down()


def test_a_dead_kubelet_sock_is_a_kubelet_that_is_down(node: Node, start: Starter) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{node.plugins}/kubelet.sock")
    offer(node, *NAMES)
    daemon = start()
    daemon.says("kubelet does not answer on .*/kubelet.sock; waiting for it")
    settle(daemon)
    assert daemon.log.count("kubelet does not answer") == 1
    kubelet = Witness(node).up()
    wait_ready(kubelet, NAMES)
    assert [kubelet.count(name) for name in NAMES] == [1] * 5
    kubelet.down()


def test_kubelet_down_tears_nothing_down(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, *NAMES)
    daemon = start()
    wait_ready(kubelet, NAMES)
    before = sockets(node)
    kubelet.down()
    daemon.says("kubelet does not answer")
    settle(daemon, 2.0)
    assert sockets(node) == before
    assert daemon.log.count("WARNING") == 1
    with plugin_stub(node, "null") as stub:
        assert next(iter(stub.ListAndWatch(pb.Empty(), timeout=PATIENCE))).devices[0].health == "Healthy"
    kubelet.up()
    wait_ready(kubelet, NAMES, 2.0)
    assert [kubelet.count(name) for name in NAMES] == [2] * 5


def test_kubelet_sock_away_for_a_moment_changes_nothing(node: Node, kubelet: Witness, start: Starter) -> None:
    """The streams are open still: kubelet.sock gone says nothing against them."""
    offer(node, *NAMES)
    daemon = start("--log-format", "json")
    wait_ready(kubelet, NAMES)
    before = sockets(node)
    (node.plugins / "kubelet.sock").rename(node.plugins / "elsewhere")
    daemon.says("kubelet is not there")
    (node.plugins / "elsewhere").rename(node.plugins / "kubelet.sock")
    wait_for(lambda: daemon.log.count("kubelet answers") == 2)
    settle(daemon)
    assert sockets(node) == before
    assert all_ready(kubelet, NAMES)
    assert [kubelet.count(name) for name in NAMES] == [1] * 5
    assert daemon.log.count('"kubelet-found"') == 2 and "kubelet-restarted" not in daemon.log
    kubelet.down()
    kubelet.up()
    wait_for(lambda: daemon.log.count('"kubelet-restarted"') == 1)


@pytest.mark.parametrize("is_seen_down", [False, True])
def test_a_new_kubelet_has_everything_at_once(node: Node, kubelet: Witness, start: Starter, is_seen_down: bool) -> None:
    offer(node, *NAMES)
    daemon = start()
    wait_ready(kubelet, NAMES)
    kubelet.down()
    if is_seen_down:
        daemon.says("kubelet does not answer")
    kubelet.delay = 0.3
    kubelet.most_open_calls = 0
    began = time.monotonic()
    kubelet.up()
    wait_ready(kubelet, NAMES, 2.0)
    assert time.monotonic() - began < 2.0
    assert kubelet.most_open_calls == len(NAMES)
    assert [kubelet.count(name) for name in NAMES] == [2] * 5
    assert kubelet.gives("null") == {"/dev/null": "/dev/null"}
    daemon.says(r"(?s)kubelet answers; registering.*kubelet answers; registering")


def test_a_new_kubelet_sock_may_have_the_inode_of_the_old(node: Node, kubelet: Witness, start: Starter) -> None:
    """ext4 gives it to the next file at once; then the time tells that it is another kubelet."""
    offer(node, *NAMES)
    start()
    wait_ready(kubelet, NAMES)
    os.utime(node.plugins / "kubelet.sock")
    wait_for(lambda: [kubelet.count(name) for name in NAMES] == [2] * 5)
    wait_ready(kubelet, NAMES)


def test_kubelet_crashes_while_it_registers(node: Node, kubelet: Witness, start: Starter) -> None:
    kubelet.delay = 60.0
    offer(node, *NAMES)
    daemon = start()
    wait_for(lambda: kubelet.open_calls == 5)
    kubelet.down()
    daemon.says("kubelet does not answer")
    kubelet.delay = 0.0
    kubelet.up()
    wait_ready(kubelet, NAMES, 2.0)
    assert [kubelet.count(name) for name in NAMES] == [2] * 5
    assert "refused its registration" not in daemon.log


def test_a_kubelet_that_is_replaced_while_it_registers(node: Node, kubelet: Witness, start: Starter) -> None:
    """The new kubelet.sock counts at once, though calls to the old kubelet are open still."""
    kubelet.delay = 60.0
    offer(node, *NAMES)
    start()
    wait_for(lambda: kubelet.open_calls == 5)
    other = Witness(node).up()
    try:
        wait_ready(other, NAMES, 2.0)
        assert [other.count(name) for name in NAMES] == [1] * 5
    finally:
        other.down()


@needs_root
def test_200_resources_that_lose_one_kubelet_are_one_line(node: Node, kubelet: Witness, start: Starter) -> None:
    names = offer_many(node, 200)
    daemon = start()
    wait_ready(kubelet, names)
    daemon.says("200 resources: registered with kubelet")
    before = daemon.log
    kubelet.down()
    daemon.says("kubelet does not answer")
    settle(daemon, 1.0)
    assert daemon.log[len(before) :].count("\n") == 1
    kubelet.up()
    wait_ready(kubelet, names, 3.0)
    daemon.says("(?s)200 resources: registered with kubelet.*200 resources: registered with kubelet")
    assert daemon.log[len(before) :].count("\n") == 3
    assert len(kubelet.requests) == 400
    stops_well(daemon, node)


# What goes wrong with one resource


@pytest.mark.parametrize("lost", [["null"], list(NAMES)])
def test_a_deleted_socket_is_put_back_and_registered(
    node: Node, kubelet: Witness, start: Starter, lost: list[str]
) -> None:
    offer(node, *NAMES)
    daemon = start()
    wait_ready(kubelet, NAMES)
    for turn in (2, 3):
        streams = [kubelet.client(name) for name in lost]
        for name in lost:
            (node.plugins / f"smarter-{name}.sock").unlink()
        wait_for(lambda streams=streams: not any(client.is_open for client in streams))
        wait_ready(kubelet, NAMES)
        assert len(sockets(node)) == 5
        assert [kubelet.count(name) for name in NAMES] == [turn if name in lost else 1 for name in NAMES]
    daemon.says("its socket file was deleted")


def test_a_stream_that_kubelet_ends_is_registered_anew(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, *NAMES)
    daemon = start()
    wait_ready(kubelet, NAMES)
    kubelet.end_stream("null")
    wait_ready(kubelet, NAMES)
    wait_for(lambda: kubelet.count("null") == 2)
    assert [kubelet.count(name) for name in NAMES] == [1, 2, 1, 1, 1]
    daemon.says("WARNING smarter-devices/null: kubelet ended its stream")


def test_streams_that_end_again_and_again_have_growing_pauses(node: Node, kubelet: Witness, start: Starter) -> None:
    kubelet.ends_streams = True
    offer(node, "null", "zero")
    start()
    wait_for(lambda: min(kubelet.count("null"), kubelet.count("zero")) == 3)
    for name in ("null", "zero"):
        first, second, third = kubelet.times(name)
        assert 0.9 < second - first < 1.9
        assert 1.9 < third - second < 3.9
    kubelet.ends_streams = False
    wait_ready(kubelet, ["null", "zero"])


def test_pauses_grow_from_1_s_to_30_s_and_begin_anew_once_a_stream_has_held(node: Node) -> None:
    side = sdm.KubeletSide(str(node.plugins), sdm.DEFAULT_DOMAIN, "/dev", asyncio.new_event_loop())
    session = sdm.Session(sdm.Resource("null", False, ()), side, None)
    pauses = []
    for _ in range(7):
        session.back_off(100.0)
        pauses.append(session.retry_at - 100.0)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    session.stream, session.stream_since = object(), 100.0
    session.back_off(120.0)
    assert session.retry_at == 150.0
    session.back_off(131.0)
    assert session.retry_at == 132.0
    side._loop.close()


def test_registered_and_no_stream_within_5_seconds(node: Node, kubelet: Witness, start: Starter) -> None:
    kubelet.opens_streams = False
    offer(node, "null")
    daemon = start()
    wait_for(lambda: any(task.done() for task in list(kubelet._watchers.values())))  # it has opened none
    kubelet.opens_streams = True
    kubelet.wait_for("null", Healthy=1)
    first, second = kubelet.times("null")
    assert 5.0 < second - first < 8.0
    assert daemon.log.count("kubelet opened no stream in 5 s") == 1


def test_a_refused_registration_is_told_and_tried_again_and_the_others_are_served(
    node: Node, kubelet: Witness, start: Starter
) -> None:
    kubelet.refused["null"] = "no room\nat the inn"
    offer(node, *NAMES)
    daemon = start()
    wait_ready(kubelet, [name for name in NAMES if name != "null"], 3.0)
    wait_for(lambda: kubelet.count("null") == 3)
    first, second, third = kubelet.times("null")
    assert 0.9 < second - first < 1.9
    assert 1.9 < third - second < 3.9
    wait_for(lambda: "no room" in daemon.log)
    assert daemon.log.count("no room") == 1
    daemon.says(r"WARNING smarter-devices/null: kubelet refused its registration \(UNKNOWN\): no room\\nat the inn")
    assert sum(kubelet.count(name) for name in NAMES) == 7
    kubelet.refused.clear()
    kubelet.down()
    kubelet.up()  # another kubelet: what the last one refused is forgotten, and so are the pauses
    wait_ready(kubelet, NAMES, 2.0)


def test_a_slow_kubelet_has_no_registration_twice(node: Node, kubelet: Witness, start: Starter) -> None:
    kubelet.delay = 3.0
    offer(node, *NAMES)
    daemon = start()
    wait_ready(kubelet, NAMES)
    assert [kubelet.count(name) for name in NAMES] == [1] * 5
    assert "WARNING" not in daemon.log


# Other instances


def test_another_instance_is_left_alone_and_taken_over_from_later(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, "null", "zero")
    first = start()
    wait_ready(kubelet, ["null", "zero"])
    before = sockets(node)
    second = start()
    second.says("2 resources: another instance serves it")
    settle(second)
    assert sockets(node) == before
    assert len(kubelet.requests) == 2
    assert second.log.count("another instance") == 1
    stopping = time.monotonic()
    assert first.stop() == 0
    wait_ready(kubelet, ["null", "zero"])
    assert time.monotonic() - stopping < 12.0
    assert second.log.count("another instance") == 1


def test_dead_sockets_are_replaced_after_a_crash(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, *NAMES)
    first = start()
    wait_ready(kubelet, NAMES)
    first.kill()
    assert len(sockets(node)) == 5
    second = start()
    wait_for(lambda: len(kubelet.requests) == 10)
    wait_ready(kubelet, NAMES)
    assert "another instance" not in second.log
    stops_well(second, node)


def test_instances_with_other_rules_or_domains_share_a_node(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, "null", "zero")
    rules = node.conf.read_text().splitlines(keepends=True)
    other = node.root / "other.yaml"
    node.rules("".join(rules[:2]))
    other.write_text("".join(rules[2:]))
    first = start()
    second = start("--conf", str(other))
    third = start("--domain", "example.org")
    wait_ready(kubelet, ["null", "zero"])
    wait_for(lambda: "example.org/null" in kubelet.clients)
    assert sorted(sockets(node)) == ["smarter-null.example.org.sock", "smarter-null.sock", "smarter-zero.sock"]
    kubelet.down()
    kubelet.up()
    wait_for(lambda: len(kubelet.requests) == 6)
    assert first.stop() == second.stop() == 0
    assert list(sockets(node)) == ["smarter-null.example.org.sock"]
    assert third.stop() == 0
    assert not sockets(node)


@needs_root
def test_instances_in_containers_of_their_own_share_a_node(node: Node, kubelet: Witness) -> None:
    """Each is process 1 there. They see one kubelet restart at one moment, and must not take each other's sockets."""
    alone = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("unshare(1) may not make a PID namespace here")
    offer_many(node, 30)
    domains = ("a", "b", "c")
    parents = []
    try:
        for domain in domains:
            command = [*alone, sys.executable, str(SCRIPT), *node.options(), "--domain", domain]
            with (node.root / domain).open("w") as log:
                parents.append(subprocess.Popen(command, stderr=log))
        for turn in (1, 2, 3):
            wait_for(lambda turn=turn: len(kubelet.requests) == 90 * turn)
            wait_for(lambda: all(client.is_open and client.lists for client in kubelet.clients.values()))
            assert len(sockets(node)) == 90
            kubelet.down()
            kubelet.up()
        for parent in parents:  # unshare(1) passes no signal on
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
            os.kill(int(children), signal.SIGTERM)
            assert parent.wait(PATIENCE) == 0
    finally:
        for parent in parents:
            parent.kill()
            parent.wait(PATIENCE)
    logs = "".join((node.root / domain).read_text() for domain in domains)
    assert "cannot listen" not in logs and "was deleted" not in logs
    assert not sockets(node)


# Signals, and the end


def test_hang_up_reads_conf_and_devices_now(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, "null", "zero")
    node.rules("- devicematch: ^null$\n")
    daemon = start("--interval", "3600")
    wait_ready(kubelet, ["null"])
    node.rules("- devicematch: ^(null|zero)$\n")
    daemon.hang_up()
    wait_ready(kubelet, ["null", "zero"])
    if os.geteuid() == 0:
        node.unplug("null")
        daemon.hang_up()
        kubelet.wait_for("null", Unhealthy=1)
    node.rules("- devicematch: [\n")
    daemon.hang_up()
    daemon.says("ERROR .*conf.yaml:[0-9]+:[0-9]+: .*; the last good rules stay in force")
    assert kubelet.count("null") == kubelet.count("zero") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_good_order(node: Node, kubelet: Witness, start: Starter, signum: int) -> None:
    offer(node, *NAMES)
    daemon = start()
    wait_ready(kubelet, NAMES)
    is_open = threading.Event()

    async def read() -> grpc.StatusCode:
        async with grpc.aio.insecure_channel(f"unix:{node.plugins}/smarter-null.sock") as channel:
            stream = sdm.rpc.DevicePluginStub(channel).ListAndWatch(pb.Empty())
            async for _ in stream:
                is_open.set()
            return await stream.code()

    reading = asyncio.run_coroutine_threadsafe(read(), kubelet.loop)
    assert is_open.wait(PATIENCE)
    stops_well(daemon, node, signum)
    assert reading.result(PATIENCE) == grpc.StatusCode.OK
    wait_for(lambda: not any(client.is_open for client in kubelet.clients.values()))
    assert "WARNING" not in daemon.log


def test_it_ends_while_kubelet_is_down(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, *NAMES)
    never_met = start()
    wait_ready(kubelet, NAMES)
    kubelet.down()
    never_met.says("kubelet does not answer")
    stops_well(never_met, node)
    early = start()
    early.says("kubelet does not answer")
    stops_well(early, node)


def test_it_ends_while_it_registers_at_a_slow_kubelet(node: Node, kubelet: Witness, start: Starter) -> None:
    kubelet.delay = 60.0
    offer(node, *NAMES)
    daemon = start()
    wait_for(lambda: kubelet.open_calls == 5)
    stops_well(daemon, node)
    wait_for(lambda: kubelet.open_calls == 0)


@needs_root
def test_200_resources_start_over_dead_sockets_and_end(node: Node, kubelet: Witness, start: Starter) -> None:
    names = offer_many(node, 200)
    crashed = start()
    wait_ready(kubelet, names)
    crashed.kill()
    assert len(sockets(node)) == 200
    daemon = start()
    wait_for(lambda: len(kubelet.requests) == 400)
    wait_ready(kubelet, names)
    assert len(os.listdir(f"/proc/{daemon.process.pid}/task")) <= 16
    stops_well(daemon, node)


@needs_root
def test_more_resources_than_there_are_descriptors_at_first(node: Node, kubelet: Witness, start: Starter) -> None:
    names = offer_many(node, 40)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    start(through=["prlimit", f"--nofile=64:{most}"])
    wait_ready(kubelet, names)


STARTS = {
    "script": [str(SCRIPT)],
    "script in its folder": [SCRIPT.name],
    "module": ["-m", SCRIPT.stem],
    "installed command": ["-c", f"import sys, {SCRIPT.stem}; sys.exit({SCRIPT.stem}.main())"],  # as pip makes it
    "isolated": ["-I", str(SCRIPT)],
}


@pytest.mark.parametrize("how", STARTS)
def test_every_way_to_start_it_serves(node: Node, kubelet: Witness, how: str) -> None:
    offer(node, "null")
    command = [sys.executable, *STARTS[how], *node.options()]
    process = subprocess.Popen(command, cwd=HERE, stderr=subprocess.PIPE, text=True)
    try:
        kubelet.wait_for("null", Healthy=1)
    finally:
        process.terminate()
        _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told
    assert "Traceback" not in told


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_it_starts(node: Node, kubelet: Witness, start: Starter, signum: int) -> None:
    """In a container the daemon is process 1, which loses signals that it has not asked for: they are held back."""
    offer(node, "null")
    daemon = start()
    held = Path(f"/proc/{daemon.process.pid}/status")
    wait_for(lambda: int(re.search("SigBlk:\t(.*)", held.read_text())[1], 16) & 1 << (signum - 1))
    assert "offers" not in daemon.log  # it has not started yet
    daemon.process.send_signal(signum)
    if signum == signal.SIGHUP:
        kubelet.wait_for("null", Healthy=1)
    else:
        assert daemon.process.wait(PATIENCE) == 0
        assert not sockets(node)


def test_a_conf_that_is_no_file_is_not_waited_for(node: Node, kubelet: Witness, start: Starter) -> None:
    """The writer of a FIFO may never come, and whoever waits for it hears no signal."""
    os.mkfifo(node.root / "fifo")
    done = node.run("--conf", str(node.root / "fifo"))
    assert done.returncode == 1
    assert f"{node.root}/fifo:1:1: this is no plain file" in done.stderr and "Traceback" not in done.stderr
    offer(node, "null")
    daemon = start()
    kubelet.wait_for("null", Healthy=1)
    (node.root / "fifo").rename(node.conf)
    daemon.says("this is no plain file; .* the last good rules stay in force")
    stops_well(daemon, node)


CRASHES = {
    "device side": "sdm.Scanner.scan = fail",
    "device side, later": "sdm.DeviceSide._forget = fail",
    "kubelet side": "sdm.KubeletSide._look_at_sockets = fail",
    "kubelet side, a plan": "sdm.slots_of = fail",
    "kubelet side, a resource": "sdm.Session.find_trouble = fail",
}


@pytest.mark.parametrize("where", CRASHES)
def test_a_thread_that_fails_ends_the_process(node: Node, kubelet: Witness, where: str) -> None:
    offer(node, "null")
    driver = node.root / "driver.py"
    driver.write_text(
        "import smarter_device_manager as sdm, sys, time\n"
        "began = time.monotonic()\n"
        "def fail(*_):\n"
        "    raise KeyError('nobody foresaw this')\n"
        "start = sdm.KubeletThread.start\n"
        f"def later(thread):\n    start(thread)\n    {CRASHES[where]}\n"
        "sdm.KubeletThread.start = later\n"
        "sys.exit(sdm.main())\n"
    )
    command = [sys.executable, str(driver), *node.options(), "--interval", "0.1"]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    if where == "device side, later":
        wait_ready(kubelet, ["null"])
        process.send_signal(signal.SIGHUP)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, told
    assert told.count("Traceback") == 1 and "nobody foresaw this" in told
    assert not sockets(node)


# Whoever else talks to a plugin, or to the daemon in kubelet's place


def test_idle_and_flooding_clients_starve_nobody(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, "null", "zero")
    node.rules("- devicematch: ^null$\n  nummaxdevices: 2\n")
    daemon = start()
    wait_ready(kubelet, ["null"])
    path = f"{node.plugins}/smarter-null.sock"
    is_over = threading.Event()

    def flood() -> None:
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["x" * 1000] * 100)])
        with plugin_stub(node, "null") as stub:
            while not is_over.is_set():
                calls = [stub.Allocate.future(request) for _ in range(20)]
                for call in calls:
                    call.exception()

    with contextlib.ExitStack() as stack:
        for number in range(100):
            idle = stack.enter_context(socket.socket(socket.AF_UNIX))
            idle.connect(path)
            if number % 2:
                idle.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        stub = stack.enter_context(plugin_stub(node, "null"))
        streams = [stub.ListAndWatch(pb.Empty()) for _ in range(20)]  # which nobody reads
        thread = threading.Thread(target=flood)
        thread.start()
        stack.callback(thread.join, PATIENCE)
        stack.callback(is_over.set)
        wait_for(lambda: "Allocate refused" in daemon.log)
        began = time.monotonic()
        assert kubelet.gives("null") == {"/dev/null": "/dev/null"}
        node.rules("- devicematch: ^(null|zero)$\n  nummaxdevices: 3\n")
        kubelet.wait_for("null", Healthy=3)
        wait_ready(kubelet, ["null", "zero"])
        assert time.monotonic() - began < 3.0
        assert kubelet.count("null") == 1
        stops_well(daemon, node)
        del streams


def test_the_stream_of_a_stranger_is_not_kubelets(node: Node, kubelet: Witness, start: Starter) -> None:
    """Somebody who listens in must not hide that kubelet's own stream has ended, nor look like it when he leaves."""
    offer(node, "null")
    daemon = start()
    wait_ready(kubelet, ["null"])
    with plugin_stub(node, "null") as stub:
        stranger = stub.ListAndWatch(pb.Empty())
        assert next(stranger).devices
        kubelet.end_stream("null")
        wait_for(lambda: kubelet.count("null") == 2)
        wait_ready(kubelet, ["null"])
    with plugin_stub(node, "null") as stub:
        stranger = stub.ListAndWatch(pb.Empty())
        assert next(stranger).devices
    settle(daemon, 1.5)
    assert kubelet.count("null") == 2


METHODS = ("GetDevicePluginOptions", "ListAndWatch", "GetPreferredAllocation", "Allocate", "PreStartContainer")


def test_any_bytes_are_an_error_or_an_answer_and_never_a_dead_server(
    node: Node, kubelet: Witness, start: Starter
) -> None:
    offer(node, "null", "zero")
    node.rules("- devicematch: ^null$\n- devicematch: ^zero$\n  resource: pool\n")
    daemon = start()
    wait_ready(kubelet, ["null", "pool"])
    rng = random.Random(1)
    good = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["0", "zero:0"])])
    seeds = [good.SerializeToString(), b"\n\x0a\n\x03abc\x12\x03abc\x18\xff\xff\xff\xff\x07", b""]
    statuses = set()
    for name in ("null", "pool"):
        path = f"{node.plugins}/smarter-{name}.sock"
        with grpc.insecure_channel(f"unix:{path}") as channel:
            for turn in range(300):
                data = bytearray(rng.choice(seeds) if turn % 3 else rng.randbytes(rng.randrange(40)))
                for _ in range(rng.randrange(4)):
                    data.insert(rng.randrange(len(data) + 1), rng.randrange(256))
                call = channel.unary_stream(f"/v1beta1.DevicePlugin/{METHODS[turn % 5]}")
                answers = call(bytes(data), timeout=PATIENCE)
                try:
                    next(answers, None)
                    answers.cancel()
                except grpc.RpcError as error:
                    statuses.add(error.code().name)
        for turn in range(50):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(path)
                with contextlib.suppress(OSError):
                    raw.sendall((b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if turn % 2 else b"") + rng.randbytes(200))
    assert "DEADLINE_EXCEEDED" not in statuses and "INVALID_ARGUMENT" in statuses
    assert kubelet.gives("null") == {"/dev/null": "/dev/null"}
    assert kubelet.gives("pool", "zero:0") == {"/dev/zero": "/dev/zero"}
    assert all_ready(kubelet, ["null", "pool"])
    assert kubelet.count("null") == kubelet.count("pool") == 1
    assert "Traceback" not in daemon.log


def test_hostile_requests_for_a_preference(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, "null", "zero")
    node.rules("- devicematch: ^(null|zero)$\n  nummaxdevices: 3\n  resource: pool\n")
    start()
    wait_ready(kubelet, ["pool"])
    with plugin_stub(node, "pool") as stub:

        def prefer(available: list[str], must: list[str], size: int) -> list[str]:
            asked = pb.PreferredAllocationRequest()
            asked.container_requests.add(
                available_deviceIDs=available, must_include_deviceIDs=must, allocation_size=size
            )
            return list(stub.GetPreferredAllocation(asked, timeout=PATIENCE).container_responses[0].deviceIDs)

        assert sorted(prefer(["null:0", "null:1", "zero:0"], [], 2)) == ["null:0", "zero:0"]
        assert prefer([], [], 2**31 - 1) == []
        assert prefer(["null:0", "null:0", "nobody:0", ""], ["null:0"], -(2**31)) == ["null:0"]
        assert prefer(["null:0", "null:9", "x" * 100_000], [], 5) == ["null:0"]
        assert sorted(prefer(["null:0", "null:1", "zero:2"] * 100_000, [], 9)) == ["null:0", "null:1", "zero:2"]
        kept = [f"nobody:{number}" for number in range(100_000)]
        assert prefer(kept, kept, 2) == kept


def test_requests_that_would_take_long_delay_nobody(node: Node, kubelet: Witness, start: Starter) -> None:
    """All that fits into 4 MiB: others wait for the answer to it, so that has to be quick."""
    offer(node, "null", "zero")
    node.rules("- devicematch: ^null$\n  nummaxdevices: 2\n- devicematch: ^zero$\n  resource: pool\n")
    daemon = start()
    wait_ready(kubelet, ["null", "pool"])
    many = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest()] * 2_000_000)
    repeated = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["0", "1"] * 600_000)])
    asked = pb.PreferredAllocationRequest(container_requests=[pb.ContainerPreferredAllocationRequest()] * 2_000_000)
    with plugin_stub(node, "null") as null, plugin_stub(node, "pool") as pool:
        calls = [(null.Allocate, many), (pool.GetPreferredAllocation, asked), (null.Allocate, repeated)]
        began = time.monotonic()
        running = [call.future(request, timeout=PATIENCE) for call, request in calls]
        assert kubelet.gives("null") == {"/dev/null": "/dev/null"}
        assert time.monotonic() - began < 5.0
        for call in running[:2]:
            assert call.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "asked for 2000000 containers at once" in call.details()
        assert len(running[2].result().container_responses[0].devices) == 1
    assert kubelet.count("null") == kubelet.count("pool") == 1
    assert len(daemon.log) < 10_000


@pytest.mark.parametrize("answer", [b"\xff\xff\xff", b"not gRPC at all", b""])
def test_a_kubelet_that_answers_anything(node: Node, kubelet: Witness, start: Starter, answer: bytes) -> None:
    """Bytes that are no message, a listener that is no gRPC server, one that hangs up at once."""
    kubelet.down()
    (node.plugins / "kubelet.sock").unlink()

    async def register(request: bytes, context: Any) -> bytes:
        return answer

    async def up() -> Any:
        server = grpc.aio.server()
        handler = grpc.method_handlers_generic_handler(
            "v1beta1.Registration", {"Register": grpc.unary_unary_rpc_method_handler(register)}
        )
        server.add_generic_rpc_handlers((handler,))
        server.add_insecure_port(f"unix:{node.plugins}/kubelet.sock")
        await server.start()
        return server

    async def reply(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    if answer.startswith(b"\xff"):
        server = kubelet.do(up())
    else:
        server = kubelet.do(asyncio.start_unix_server(reply, f"{node.plugins}/kubelet.sock"))
    offer(node, "null", "zero")
    daemon = start()
    if answer.startswith(b"\xff"):
        daemon.says("WARNING what a client or kubelet sent is no message")
    else:
        daemon.says("WARNING 2 resources: kubelet refused its registration")
    if answer.startswith(b"\xff"):
        kubelet.do(server.stop(None))
    else:
        kubelet.loop.call_soon_threadsafe(server.close)
    kubelet.up()
    wait_ready(kubelet, ["null", "zero"], 3.0)


# What the node runs out of


WITHOUT_OVERRIDE = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-all"]  # root as others are


@contextlib.contextmanager
def descriptors_limited(daemon: Daemon, count: int) -> Iterator[None]:
    """Let the daemon have no descriptors from COUNT on."""
    pid = daemon.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("has_room", [False, True])
def test_a_full_table_of_descriptors(node: Node, kubelet: Witness, start: Starter, has_room: bool) -> None:
    """Full for everything; or with room for as many as it has, so that it gets stuck halfway."""
    offer(node, *NAMES)
    daemon = start()
    wait_ready(kubelet, NAMES)
    usual = descriptors(daemon)
    with descriptors_limited(daemon, usual - 1 if has_room else 3):
        kubelet.down()
        kubelet.up()
        if has_room:
            settle(daemon, 2.0)
        else:
            daemon.says("kubelet does not answer .*Too many open files")
    wait_ready(kubelet, NAMES)
    wait_for(lambda: descriptors(daemon) <= usual)
    assert kubelet.gives("null") == {"/dev/null": "/dev/null"}
    assert daemon.log.count("\n") < 20, daemon.log


def test_allocate_with_a_full_table_of_descriptors(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, "null")
    daemon = start("--interval", "3600")
    wait_ready(kubelet, ["null"])
    with descriptors_limited(daemon, 3):
        status, words = refusal(kubelet, "null", "0")
    assert (status, words) == ("UNAVAILABLE", "smarter-devices/null: cannot look at /dev: Too many open files")
    assert kubelet.gives("null") == {"/dev/null": "/dev/null"}


def test_a_plugin_directory_that_cannot_be_written(node: Node, kubelet: Witness, start: Starter) -> None:
    offer(node, *NAMES)
    daemon = start(through=WITHOUT_OVERRIDE if os.geteuid() == 0 else [])
    wait_ready(kubelet, NAMES)
    node.plugins.chmod(0o555)
    try:
        for name in NAMES:
            kubelet.end_stream(name)
        daemon.says(f"5 resources: cannot listen on a socket in {node.plugins}: Permission denied")
        settle(daemon, 2.5)  # more tries, of which nothing is told
    finally:
        node.plugins.chmod(0o755)
    wait_ready(kubelet, NAMES)
    assert daemon.log.count("cannot listen") == 1, daemon.log
    stops_well(daemon, node)


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_plugin_directory_that_vanishes(node: Node, kubelet: Witness, start: Starter, comes_back: bool) -> None:
    """Away for a while; or gone for good, and a new kubelet makes another."""
    offer(node, *NAMES)
    daemon = start()
    wait_ready(kubelet, NAMES)
    node.plugins.rename(node.root / "q")
    daemon.says("kubelet is not there")
    settle(daemon, 1.0)
    if comes_back:
        (node.root / "q").rename(node.plugins)
        wait_for(lambda: daemon.log.count("kubelet answers") == 2)
        settle(daemon)
    else:
        kubelet.down()
        shutil.rmtree(node.root / "q")
        node.plugins.mkdir()
        kubelet.up()
        wait_for(lambda: len(kubelet.requests) == 10)
    wait_ready(kubelet, NAMES)
    assert [kubelet.count(name) for name in NAMES] == [1 if comes_back else 2] * 5
    stops_well(daemon, node)
