"""Tests of the status: document, metrics, page, the server of them, --status, and what the log says."""

from __future__ import annotations

import contextlib
import ctypes
import html.parser
import http.client
import math
import shutil
import socket
import statistics
import struct
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as some
from prometheus_client.parser import text_string_to_metric_families

from test_smarter_device_manager import *  # noqa: F403
from test_smarter_device_manager import (
    HERE,
    PATIENCE,
    Any,
    Callable,
    Daemon,
    Kubelet,
    Mapping,
    Node,
    Path,
    asyncio,
    grpc,
    json,
    needs_root,
    os,
    pytest,
    re,
    sdm,
    signal,
    subprocess,
    tempfile,
    threading,
    time,
    wait_for,
)

POD = "0b8c1f6e-5d9a-4b7e-9c38-4f2d5d1f7a10"
GPUS = "- devicematch: nvidia-gpu\n  nummaxdevices: 4\n"  # devices that take no root: they are folders of /sys


# ---------------------------------------------------------------------------------------------------------------------
# Helpers: a client of the status server, and what else a test of it needs
# ---------------------------------------------------------------------------------------------------------------------


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
        self.address = sdm.tell_address((self.host, self.port))

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
            with contextlib.suppress(ConnectionError):  # it may have had enough before the last byte
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
    return {
        (name, *sample.labels.values()) if sample.labels else name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        for name in [sample.name.replace(sdm.PREFIX, "")]
    }


def checkpoint(node: Node, *entries: tuple[str, str, str, Any]) -> None:
    """Write kubelet's checkpoint: of each entry the resource's whole name, the pod, the container and its IDs."""
    document = {
        "Data": {
            "PodDeviceEntries": [
                {"PodUID": pod, "ContainerName": container, "ResourceName": name, "DeviceIDs": ids, "AllocResp": "Cg=="}
                for name, pod, container, ids in entries
            ]
            or None,
            "RegisteredDevices": {"smarter-devices/nvidia-gpu0": ["0", "1", "2", "3"]},
        },
        "Checksum": 12345678901234567890,
    }
    write_checkpoint(node, json.dumps(document))


def write_checkpoint(node: Node, text: str) -> None:
    new = node.plugins / "checkpoint.new"
    new.write_text(text)
    new.rename(node.plugins / "kubelet_internal_checkpoint")


class Tracer:
    """Stops single threads of a child process, as a hang would (ptrace(2)); a context manager."""

    SEIZE, INTERRUPT, DETACH, WALL = 0x4206, 0x4207, 17, 0x40000000

    def __init__(self, thread: int) -> None:
        self.thread = thread

    def _do(self, request: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(request, self.thread, None, None) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")

    def __enter__(self) -> Tracer:
        try:
            self._do(self.SEIZE)
        except PermissionError:
            pytest.skip("ptrace(2) of a child is not allowed here")
        self._do(self.INTERRUPT)
        os.waitpid(self.thread, self.WALL)
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self.DETACH)


@pytest.fixture
def gpu(node: Node) -> Path:
    """One device, with four slots, that takes no root to make: its folder."""
    node.rules(GPUS)
    return node.sysfs("gpu.0", {})


@pytest.fixture
def served(gpu: Path, kubelet: Kubelet, start: Callable[..., Daemon]) -> Status:
    """A daemon that has its one resource registered, and serves its status."""
    status = Status(start("--listen", "127.0.0.1:0"))
    status.wait_for("/readyz", 200)
    return status


# ---------------------------------------------------------------------------------------------------------------------
# The document
# ---------------------------------------------------------------------------------------------------------------------


@given(
    some.recursive(
        some.none() | some.booleans() | some.integers() | some.text(),
        lambda inner: (
            some.lists(inner)
            | some.dictionaries(
                some.sampled_from(["Data", "PodDeviceEntries", "PodUID", "ContainerName", "ResourceName", "DeviceIDs"]),
                inner,
            )
            | inner.map(lambda value: {"Data": {"PodDeviceEntries": value}})
        ),
    )
)
def test_a_foreign_checkpoint_is_unknown_and_no_error(value: Any) -> None:
    holders = sdm.find_holders(value, "smarter-devices")
    assert holders is None or isinstance(holders, dict)


@pytest.mark.parametrize(
    ("ids", "slots"),
    [
        ({"-1": ["0", "2"]}, ["0", "2"]),
        ({"0": ["0"], "1": ["3", "1"]}, ["0", "3", "1"]),
        (["1", "0"], ["1", "0"]),  # kubelet before 1.20
        ({"-1": None}, []),
        (None, []),
        ({}, []),
    ],
)
def test_both_shapes_of_device_ids_are_read(ids: Any, slots: list[str]) -> None:
    entry = {"PodUID": POD, "ContainerName": "c", "ResourceName": "smarter-devices/video0", "DeviceIDs": ids}
    other = {**entry, "ResourceName": "example.org/video0"}
    found = sdm.find_holders({"Data": {"PodDeviceEntries": [other, entry]}}, "smarter-devices")
    assert found == {"video0": [sdm.Holder(slot, POD, "c") for slot in slots]}


@pytest.mark.parametrize(
    "change",
    [{"PodUID": 1}, {"ContainerName": None}, {"ResourceName": []}, {"DeviceIDs": "01"}, {"DeviceIDs": [0]}],
)
def test_one_entry_of_a_strange_shape_makes_all_unknown(change: Mapping[str, Any]) -> None:
    entry = {"PodUID": POD, "ContainerName": "c", "ResourceName": "smarter-devices/video0", "DeviceIDs": ["0"]}
    assert sdm.find_holders({"Data": {"PodDeviceEntries": [entry, {**entry, **change}]}}, "smarter-devices") is None


def test_the_checkpoint_is_cached_by_the_identity_of_its_file(node: Node) -> None:
    checkpoint(node, ("smarter-devices/a", POD, "c", ["0"]))
    path = node.plugins / "kubelet_internal_checkpoint"
    os.utime(path, (1, 1))
    found = sdm.Checkpoint(str(node.plugins), "smarter-devices")
    assert found.holders() == {"a": [sdm.Holder("0", POD, "c")]}
    path.write_text(path.read_text().replace('["0"]', '["7"]'))
    os.utime(path, (1, 1))
    assert found.holders() == {"a": [sdm.Holder("0", POD, "c")]}, "nothing of the file's identity changed"
    os.utime(path, (2, 2))
    assert found.holders() == {"a": [sdm.Holder("7", POD, "c")]}
    path.unlink()
    assert found.holders() is None


def test_a_checkpoint_that_was_just_written_is_not_trusted_to_stay(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """File times move once a tick of the kernel: within one, two contents can have the same identity."""
    monkeypatch.setattr(sdm, "FRESH_NS", 60_000_000_000)  # as if it ticked once a minute
    found = sdm.Checkpoint(str(node.plugins), "smarter-devices")
    path = node.plugins / "kubelet_internal_checkpoint"
    checkpoint(node, ("smarter-devices/a", POD, "c", ["0"]))
    tick = path.stat().st_mtime_ns
    assert found.holders() == {"a": [sdm.Holder("0", POD, "c")]}
    path.write_text(path.read_text().replace('["0"]', '["7"]'))
    os.utime(path, ns=(tick, tick))
    assert found.holders() == {"a": [sdm.Holder("7", POD, "c")]}


BREAKING: Mapping[str, Callable[[Node, Path], object]] = {
    "missing": lambda node, path: path.unlink(),
    "empty": lambda node, path: write_checkpoint(node, ""),
    "no JSON": lambda node, path: write_checkpoint(node, '{"Data": '),
    "no UTF-8": lambda node, path: path.write_bytes(b'{"Data": "\xff"}'),
    "foreign": lambda node, path: write_checkpoint(node, '{"kind": "Pod"}'),
    "too deep": lambda node, path: write_checkpoint(node, "[" * 100_000),
    "a huge number": lambda node, path: write_checkpoint(node, "9" * 1_000_000),
    "too long": lambda node, path: write_checkpoint(node, '{"Data": {"PodDeviceEntries": null}}' + " " * (2 << 20)),
    "a FIFO": lambda node, path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda node, path: (path.unlink(), path.mkdir()),
    "a circle": lambda node, path: (path.unlink(), path.symlink_to(path)),
}


@pytest.mark.parametrize("how", BREAKING)
def test_what_is_no_checkpoint_is_unknown(node: Node, how: str) -> None:
    checkpoint(node, ("smarter-devices/a", POD, "c", ["0"]))
    found = sdm.Checkpoint(str(node.plugins), "smarter-devices")
    assert found.holders()
    path = node.plugins / "kubelet_internal_checkpoint"
    BREAKING[how](node, path)
    assert found.holders() is None
    assert found.holders() is None
    if not path.is_dir():
        checkpoint(node)
        assert found.holders() == {}


def test_slots_in_use_and_their_holders(node: Node, served: Status) -> None:
    resource = served.resource("nvidia-gpu0")
    assert resource["in_use"] is None
    assert resource["holders"] is None
    assert ("slots_in_use", "smarter-devices/nvidia-gpu0") not in served.metrics()
    assert "use unknown" in served.ask("/").body
    checkpoint(
        node,
        ("smarter-devices/nvidia-gpu0", POD, "detect", {"-1": ["3", "0"]}),
        ("example.org/nvidia-gpu0", "other", "other", {"-1": ["1"]}),
    )
    wait_for(lambda: served.resource("nvidia-gpu0")["in_use"] == 2)
    held = [
        (holder["slot"], holder["pod"], holder["container"], holder["device"])
        for holder in served.resource("nvidia-gpu0")["holders"]
    ]
    assert held == [("0", POD, "detect", "nvidia-gpu0"), ("3", POD, "detect", "nvidia-gpu0")]
    assert served.metrics()["slots_in_use", "smarter-devices/nvidia-gpu0"] == 2
    page = served.ask("/").body
    assert "2 of 4 in use" in page
    assert 'width="50%"' in page
    assert re.search(rf"slots 0, 3: <strong>detect</strong>.*{POD}", page)
    write_checkpoint(node, "gone mad")
    wait_for(lambda: served.resource("nvidia-gpu0")["in_use"] is None)


def test_the_checkpoint_is_read_when_asked_and_never_else(node: Node, served: Status) -> None:
    checkpoint(node, ("smarter-devices/nvidia-gpu0", POD, "c", ["0"]))
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(node.plugins / "kubelet_internal_checkpoint"), 0x20) > 0  # IN_OPEN

    def was_opened() -> bool:
        try:
            return bool(os.read(watch, 4096))
        except BlockingIOError:
            return False

    try:
        beat = time.monotonic()
        wait_for(lambda: time.monotonic() > beat + 1 and served.ask("/healthz").status == 200)  # ten turns
        assert served.ask("/readyz").status == 200
        assert not was_opened()
        served.ask("/metrics")
        assert was_opened()
    finally:
        os.close(watch)


def test_list_json_and_status_json_have_the_same_shapes(node: Node, gpu: Path, start: Callable[..., Daemon]) -> None:
    node.link("video9", "/etc/passwd")
    node.rules(GPUS + "- devicematch: ^video\n- devicematch: ^nothing$\n")
    status = Status(start("--listen", "127.0.0.1:0"))
    listed, told = json.loads(node.run("--list", "--json").stdout), status.document()
    assert listed["left_out"] == told["left_out"]
    assert listed["left_out"][0]["path"] == "/dev/video9"
    assert listed["unused"] == told["unused"] == [{"line": 4, "pattern": "^nothing$"}]
    assert len(listed["resources"]) == len(told["resources"]) == 1
    for document in (listed, told):
        document["resources"][0]["devices"][0].pop("since")  # each saw it appear for itself
    assert listed["resources"][0].items() <= told["resources"][0].items()


def test_node_name_and_conf_and_times_are_in_the_document(node: Node, gpu: Path, start: Callable[..., Daemon]) -> None:
    status = Status(start("--listen", "127.0.0.1:0", env={**os.environ, "NODE_NAME": "greenhouse"}))
    document = status.document()
    assert document["node"] == "greenhouse"
    assert document["conf"]["path"] == str(node.conf)
    assert document["conf"]["rules"] == 1
    now = sdm.utc(time.time())
    for stamp in (document["time"], document["conf"]["read_at"], document["resources"][0]["devices"][0]["since"]):
        assert sdm.utc(time.time() - 60) < stamp <= now
    assert document["healthy"]
    assert not document["ready"], "there is no kubelet"
    assert "kubelet does not answer" in document["problems"][0]
    assert str(node.plugins) in document["problems"][0]


def test_events_are_told_newest_first_and_no_more_than_100(node: Node, served: Status, kubelet: Kubelet) -> None:
    def events() -> list[str]:
        return [event["event"] for event in served.document()["events"]]

    wait_for(lambda: "registered" in events())
    assert [event for event in events() if "kubelet" not in event] == ["registered", "plugged", "started", "listening"]
    node.rules("- devicematch: [\n")
    wait_for(lambda: events()[0] == "conf-refused")
    node.rules(GPUS + "# better\n")
    wait_for(lambda: "conf-reloaded" in events())
    kubelet.down()
    wait_for(lambda: "kubelet-gone" in events())
    kubelet.up()
    wait_for(lambda: "kubelet-restarted" in events())
    kubelet.wait_for("nvidia-gpu0", Healthy=4)
    for _ in range(120):
        kubelet.take("nvidia-gpu0", "0")
    wait_for(lambda: events() == ["allocated"] * 100)
    times = [event["time"] for event in served.document()["events"]]
    assert times == sorted(times, reverse=True)


def test_an_event_of_a_long_text_is_cut(node: Node, gpu: Path, start: Callable[..., Daemon]) -> None:
    kubelet = Kubelet(node)
    kubelet.refused["nvidia-gpu0"] = "no " * 1000
    kubelet.up()
    try:
        status = Status(start("--listen", "127.0.0.1:0"))

        def refused() -> list[dict[str, Any]]:
            return [event for event in status.document()["events"] if event["event"] == "refused"]

        message = wait_for(refused)[0]["message"]
        assert "kubelet refused its registration (UNKNOWN): no no no" in message
        assert len(message) == sdm.MOST_EVENT_TEXT + len("...")
    finally:
        kubelet.down()


# ---------------------------------------------------------------------------------------------------------------------
# Health and readiness
# ---------------------------------------------------------------------------------------------------------------------


def test_healthz_is_503_while_the_device_side_hangs(served: Status, start: Callable[..., Daemon], node: Node) -> None:
    status, daemon = served, served.daemon
    assert status.wait_for("/healthz", 200).body == "ok\n"
    with Tracer(daemon.process.pid):  # its main thread, and no other
        answer = status.wait_for("/healthz", 503)
        assert re.fullmatch(r"the device side hangs: its last turn was \d+\.\d s ago\n", answer.body)
        document = status.document()
        assert not document["healthy"]
        assert document["problems"][0].startswith("the device side hangs")
        assert "the device side hangs" in status.ask("/").body
        assert status.ask("/readyz").status == 200
    status.wait_for("/healthz", 200)


def test_a_daemon_that_was_stopped_goes_on(served: Status) -> None:
    served.daemon.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: "State:\tT" in Path(f"/proc/{served.daemon.process.pid}/status").read_text())
    time.sleep(0.5)  # longer than its interval: it was to have woken meanwhile
    served.daemon.process.send_signal(signal.SIGCONT)
    served.wait_for("/healthz", 200)
    beat = served.metrics()["conf_last_good_timestamp_seconds"]
    served.daemon.hang_up()
    wait_for(lambda: served.metrics()["conf_last_good_timestamp_seconds"] > beat)


def test_a_thread_is_said_to_hang_after_ten_turns() -> None:
    beats = {"device side": 100.0, "kubelet side": 105.0}
    assert sdm.find_hanging(beats, 10.0, 110.0) == []
    assert sdm.find_hanging(beats, 10.0, 110.1) == ["the device side hangs: its last turn was 10.1 s ago"]
    assert len(sdm.find_hanging(beats, 10.0, 116.0)) == 2


@pytest.mark.parametrize(("interval", "seconds"), [("0.01", 1.0), ("0.5", 5.0), ("1", 10.0)])
def test_ten_turns_are_ten_intervals_but_not_less_than_ten_of_the_kubelet_sides(
    gpu: Path, start: Callable[..., Daemon], interval: str, seconds: float
) -> None:
    status = Status(start("--listen", "127.0.0.1:0", "--interval", interval))
    assert [thread["most_seconds"] for thread in status.document()["threads"]] == [pytest.approx(seconds)] * 2
    assert all(0 <= thread["seconds_since_turn"] < PATIENCE for thread in status.document()["threads"])


def test_readyz_lists_what_is_not_registered(node: Node, gpu: Path, start: Callable[..., Daemon]) -> None:
    node.sysfs("gpu.1", {})
    status = Status(start("--listen", "127.0.0.1:0"))
    answer = status.wait_for("/readyz", 503)
    names = ["smarter-devices/nvidia-gpu0", "smarter-devices/nvidia-gpu1"]
    assert [line.partition(": ")[0] for line in answer.body.splitlines()] == names
    kubelet = Kubelet(node)
    kubelet.refused["nvidia-gpu1"] = "not on my watch"
    kubelet.up()
    try:
        told = "smarter-devices/nvidia-gpu1: not registered with kubelet: kubelet refused .*not on my watch\n"
        wait_for(lambda: re.fullmatch(told, status.ask("/readyz").body))
        assert status.ask("/readyz").status == 503
        wait_for(lambda: re.search(r"nvidia-gpu1: not registered.*not on my watch", status.document()["problems"][0]))
        metrics = status.metrics()
        assert metrics["registered", names[0]] == 1
        assert metrics["registered", names[1]] == 0
        assert metrics["registrations_refused_total", names[1]] >= 1
        kubelet.refused.clear()
        assert status.wait_for("/readyz", 200).body == "ok\n"
        assert wait_for(lambda: status.document()["ready"])
    finally:
        kubelet.down()
    status.wait_for("/readyz", 503)


def test_ready_takes_an_open_stream(node: Node, gpu: Path, start: Callable[..., Daemon]) -> None:
    kubelet = Kubelet(node)
    kubelet.opens_streams = False
    kubelet.up()
    try:
        status = Status(start("--listen", "127.0.0.1:0"))
        wait_for(lambda: status.metrics()["registrations_total", "smarter-devices/nvidia-gpu0"] >= 1)
        assert status.ask("/readyz").status == 503
        wait_for(lambda: status.metrics()["stream_losses_total", "smarter-devices/nvidia-gpu0"] >= 1)
        assert "opened no stream" in status.ask("/readyz").body
    finally:
        kubelet.down()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def test_metrics_are_read_back_by_prometheus(served: Status) -> None:
    answer = served.ask("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {family.name: family for family in text_string_to_metric_families(answer.body)}
    for family in sdm.FAMILIES:
        name = sdm.metric_name(family)
        parsed = found.pop(name.removesuffix("_total") if family.kind == "counter" else name)
        assert (parsed.type, parsed.documentation) == (family.kind, family.told)
        assert all(sample.name == name and math.isfinite(sample.value) for sample in parsed.samples)
        if family.name != "slots_in_use":
            assert parsed.samples
    assert not found
    lines = answer.body.splitlines()
    assert len([line for line in lines if line.startswith("# HELP ")]) == len(sdm.FAMILIES)
    assert len([line for line in lines if line.startswith("# TYPE ")]) == len(sdm.FAMILIES)


def test_metrics_follow_the_naming_rules() -> None:
    for family in sdm.FAMILIES:
        name = sdm.metric_name(family)
        assert re.fullmatch(r"(smarter_device_manager|process)_[a-z]+(_[a-z]+)*", name)
        assert (family.kind == "counter") == name.endswith("_total")
        assert not re.search(r"_(count|sum|bucket|ms|milliseconds|kib|mib|percent)$", name)
        assert family.told.endswith(".")
    names = [sdm.metric_name(family) for family in sdm.FAMILIES]
    assert len(set(names)) == len(names)


def test_metrics_tell_what_happened(node: Node, served: Status, kubelet: Kubelet, gpu: Path) -> None:
    name = "smarter-devices/nvidia-gpu0"
    first = served.metrics()
    assert first["slots", name] == 4
    assert first["devices", name, "present"] == 1
    assert first["devices", name, "absent"] == 0
    assert first["registered", name] == first["registrations_total", name] == 1
    assert first["allocations_total", name] == first["kubelet_restarts_total"] == 0
    assert first["conf_good"] == first["kubelet_answering"] == 1
    assert abs(first["conf_last_good_timestamp_seconds"] - time.time()) < 60
    assert 0 < first["scan_duration_seconds"] < PATIENCE
    for _ in range(3):
        kubelet.take("nvidia-gpu0", "1")
    wait_for(lambda: served.metrics()["allocations_total", name] == 3)
    node.rules("nonsense: [\n")
    wait_for(lambda: served.metrics()["conf_refused_total"] == 1)
    assert served.metrics()["conf_good"] == 0
    assert "the conf file is refused" in served.document()["problems"][0]
    node.rules(GPUS.replace("4", "5"))
    wait_for(lambda: served.metrics()["slots", name] == 5)
    last = served.metrics()
    assert (last["conf_good"], last["conf_reloads_total"], last["conf_refused_total"]) == (1, 1, 1)
    assert last["conf_last_good_timestamp_seconds"] > first["conf_last_good_timestamp_seconds"]
    kubelet.down()
    wait_for(lambda: served.metrics()["kubelet_answering"] == 0)
    assert served.metrics()["registered", name] == 0
    kubelet.up()
    wait_for(lambda: served.metrics()["registrations_total", name] == 2)
    assert served.metrics()["kubelet_restarts_total"] == 1


def test_a_device_that_went_is_absent(node: Node, served: Status, gpu: Path, start: Callable[..., Daemon]) -> None:
    gpu.rmdir()
    served.daemon.hang_up()
    name = "smarter-devices/nvidia-gpu0"
    wait_for(lambda: served.metrics()["devices", name, "absent"] == 1)
    assert served.metrics()["devices", name, "present"] == 0
    assert served.metrics()["slots", name] == 4
    document = served.document()
    assert document["problems"] == ["nvidia-gpu0: it is gone"]
    assert document["ready"], "it is registered, with Unhealthy slots"
    page = served.ask("/").body
    assert "1 thing is wrong" in page
    assert page.index("nvidia-gpu0: it is gone") < page.index("<h2>Resources</h2>")


def test_process_metrics_are_the_kernels_own(served: Status, start: Callable[..., Daemon]) -> None:
    import psutil

    process = psutil.Process(served.daemon.process.pid)
    before = process.cpu_times()
    told = served.metrics()
    after = process.cpu_times()
    assert before.user + before.system - 0.1 <= told["process_cpu_seconds_total"] <= after.user + after.system + 0.1
    assert told["process_resident_memory_bytes"] == pytest.approx(process.memory_info().rss, rel=0.2)
    assert told["process_start_time_seconds"] == pytest.approx(process.create_time(), abs=1.1)


def test_labels_are_escaped() -> None:
    hostile = 'a"b\\c\nd{}=,'
    family = sdm.Family("x", "gauge", "Help.", lambda document: [({"name": hostile}, 1.5), ({"name": "b"}, True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdm, "FAMILIES", (family,))
        text = "".join(sdm.render_metrics({}))
    assert samples(text) == {("x", hostile): 1.5, ("x", "b"): 1}


def test_paths_left_out_are_counted_by_reason(node: Node, start: Callable[..., Daemon]) -> None:
    (node.dev / "plain").write_text("")
    (node.dev / "empty").mkdir()
    (node.dev / "---").mkdir()
    node.link("dangling", "nowhere")
    node.link("outside", "/etc/passwd")
    node.link("around", "around")
    os.mkfifo(node.dev / "pipe")
    node.rules("- devicematch: .*\n")
    counts = {key[1]: value for key, value in Status(start("--listen", ":0")).metrics().items() if key[0] == "left_out"}
    assert counts.pop("link") == 3
    assert counts.pop("folder") == 2
    assert counts.pop("not_a_device") == 2
    assert len(counts) == 6
    assert set(counts.values()) == {0}


@pytest.mark.parametrize(
    ("reason", "label"),
    [
        ("a link to /dev/x, which is not there", "link"),
        ("a link in the folder /dev/x, where others than root may make links", "link"),
        ("a path through /dev/x, which is a plain file", "link"),
        ("another file system", "file_system"),
        ("a folder that cannot be listed (Permission denied), not a device", "folder"),
        ("a socket, not a device", "not_a_device"),
        ("its resource's name net_tun is taken by /dev/net/tun", "name_taken"),
        (str(sdm.clash(sdm.Rule(1, re.compile(""), ""), sdm.Rule(2, re.compile(""), ""), "tun")), "name_taken"),
        ("its name is not UTF-8", "bad_name"),
        ("no letter or digit is left to name a resource by", "bad_name"),
        ('its path in a container would be "/dev/../x"', "container_path"),
        ('its idVendor is "1\n2" (asked for: 3); its serial is not there (asked for: x)', "attributes"),
        ("something new", "other"),
    ],
)
def test_each_reason_has_its_label(reason: str, label: str) -> None:
    assert sdm.reason_label(reason) == label


# ---------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------

PATHS = ("/", "/healthz", "/readyz", "/metrics", "/status.json")


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_has_the_right_head(served: Status, path: str) -> None:
    answer, head = served.ask(path), served.ask(path, "HEAD")
    for given_ in (answer, head):
        assert given_.status == 200
        assert given_.headers["connection"] == "close"
        assert given_.headers["cache-control"] == "no-store"
        assert given_.headers["x-content-type-options"] == "nosniff"
        assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", given_.headers["date"])
        policy = given_.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "script" not in policy
        assert "unsafe" not in policy
        for directive in ("base-uri", "form-action", "frame-ancestors"):
            assert f"{directive} 'none'" in policy
    assert head.body == ""
    assert int(answer.headers["content-length"]) == len(answer.body.encode())
    assert int(head.headers["content-length"]) > 0
    kind = {"/": "text/html; charset=utf-8", "/status.json": "application/json"}.get(path, "text/plain")
    assert answer.headers["content-type"].startswith(kind)
    assert served.ask(f"{path}?x=1#y").status == 200


GOOD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (GOOD + b"\r\n", 200),
        (GOOD.replace(b"\r", b"") + b"\n", 200),  # RFC 9112, 2.2: a lone LF may be taken for a line's end
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
        (b"GET http://node:8080/healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET http://node HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.7\r\nHost: x\r\nX-Long: " + b"y" * 7000 + b"\r\n\r\n", 200),
        (GOOD + b"Content-Length: 100000\r\n\r\n" + b"z" * 50_000, 200),
        (GOOD + b"\r\n" + GOOD + b"\r\n", 200),  # a second request is not answered
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /healthz/ HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET //healthz HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + b"z" * 60_000, 405),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: x\r\nhost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\0y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\rX: y\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTPS/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nnonsense\r\nHost: x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),  # TLS
        (b" GET / HTTP/1.1\r\n\r\n", 400),
        (b"\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", 505),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (GOOD + b"X: " + b"y" * 9000 + b"\r\n\r\n", 431),
        (GOOD + b"X: y\r\n" * 10_000 + b"\r\n", 431),
    ],
)
def test_each_request_gets_its_status(served: Status, data: bytes, status: int) -> None:
    answer = served.say(data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.1 %d [A-Z]" % status, head), answer[:200]
    assert answer.count(b"HTTP/1.1") == 1
    assert b"\r\nConnection: close" in head
    assert int(re.search(rb"Content-Length: (\d+)", head)[1]) == len(body)
    assert (b"\r\nAllow: GET, HEAD\r\n" in head) == (status == 405)


def test_what_a_client_still_says_is_read_or_it_would_lose_the_answer(served: Status) -> None:
    with served.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 30000\r\n\r\n")
        assert received(connection).startswith(b"HTTP/1.1 405 ")
        for _ in range(30):
            connection.sendall(b"z" * 1000)  # a server that has closed would answer the first with a reset
            time.sleep(0.01)

        def is_cut() -> bool:
            try:
                connection.sendall(b"z" * 1000)
            except ConnectionError:
                return True
            return False

        wait_for(is_cut, patience=sdm.REQUEST_SECONDS - 1)  # not for ever: by the bytes, not by the time


@pytest.mark.parametrize("data", [b"", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_a_request_that_ends_early_is_bad(served: Status, data: bytes) -> None:
    assert served.say(data, is_done=True).startswith(b"HTTP/1.1 400 ")


@given(
    some.binary(max_size=300)
    | some.lists(
        some.sampled_from(
            [b"GET ", b"HEAD", b"/", b" HTTP/1.1", b"\r\n", b"\n", b"Host: x", b":", b" ", b"\0", b"http://"]
        )
    ).map(b"".join)
)
def test_any_bytes_are_a_request_or_unanswerable(head: bytes) -> None:
    try:
        request = sdm.parse_request(head)
    except sdm.Unanswerable as error:
        assert 400 <= error.status <= 505
    else:
        assert request.method in ("GET", "HEAD")


def test_no_input_makes_it_hang_or_fail(served: Status, kubelet: Kubelet, start: Callable[..., Daemon]) -> None:
    pieces = [
        b"GET ",
        b"POST ",
        b"/",
        b"/metrics",
        b" HTTP/1.1",
        b"\r\n",
        b"\n",
        b"Host: x",
        b"\r\n\r\n",
        b"\0",
        b"\xff",
    ]

    @settings(max_examples=200, deadline=None)
    @given(some.binary(max_size=100) | some.lists(some.sampled_from(pieces), max_size=12).map(b"".join))
    def feed(data: bytes) -> None:
        answer = served.say(data, is_done=True)
        assert re.match(rb"HTTP/1\.1 (200|400|404|405|414|431|505) ", answer)

    feed()
    assert served.ask("/healthz").status == 200
    assert "Traceback" not in served.daemon.log


def test_a_client_has_five_seconds_for_its_request(served: Status) -> None:
    connections = [served.connect() for _ in range(3)]
    idle, partial, trickle = connections
    begin = time.monotonic()
    partial.sendall(GOOD)
    trickle.settimeout(0.1)
    dripping = b"G"
    answer = b""
    while time.monotonic() < begin + PATIENCE and not answer:
        with contextlib.suppress(TimeoutError, ConnectionError):
            trickle.sendall(dripping)
            answer = trickle.recv(1 << 16)
    waited = time.monotonic() - begin
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert waited > sdm.REQUEST_SECONDS - 0.5
    assert received(idle).startswith(b"HTTP/1.1 408 ")
    assert received(partial).startswith(b"HTTP/1.1 408 ")
    for connection in connections:
        connection.close()


def open_sockets(daemon: Daemon) -> int:
    """How many TCP connections the daemon has."""
    import psutil

    return len([item for item in psutil.Process(daemon.process.pid).net_connections("tcp") if item.raddr])


def test_of_many_connections_the_oldest_go_so_that_idle_ones_keep_nobody_out(
    served: Status, start: Callable[..., Daemon]
) -> None:
    daemon = served.daemon
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(served.connect()) for _ in range(3 * sdm.MOST_CONNECTIONS)]
        wait_for(lambda: open_sockets(daemon) >= sdm.MOST_CONNECTIONS)
        assert served.ask("/healthz").status == 200
        assert open_sockets(daemon) <= sdm.MOST_CONNECTIONS
        assert received(idle[0]) == b""
        newest = idle[-1]
        newest.sendall(GOOD + b"\r\n")
        assert received(newest).startswith(b"HTTP/1.1 200 ")


def test_a_slow_reader_keeps_nobody_waiting_and_is_cut_off(
    node: Node, served: Status, start: Callable[..., Daemon]
) -> None:
    checkpoint(node, ("smarter-devices/nvidia-gpu0", POD, "c", [str(number) for number in range(100_000)]))
    wait_for(lambda: served.resource("nvidia-gpu0")["in_use"] == 100_000)
    daemon = served.daemon
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            slow = stack.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((served.host, served.port))
            slow.sendall(b"GET /status.json HTTP/1.0\r\n\r\n")
        wait_for(lambda: open_sockets(daemon) >= 8)
        begin = time.monotonic()
        assert served.ask("/healthz").status == 200
        assert time.monotonic() - begin < sdm.REQUEST_SECONDS
        wait_for(lambda: open_sockets(daemon) == 0)
    assert served.ask("/healthz").status == 200


class Flood:
    """Threads that do to the status server what clients may do; a context manager."""

    def __init__(self, *works: Callable[[], object]) -> None:
        self._works = works
        self._is_over = False
        self.count = 0

    def __enter__(self) -> Flood:
        self._threads = [threading.Thread(target=self._run, args=(work,)) for work in self._works]
        for thread in self._threads:
            thread.start()
        return self

    def _run(self, work: Callable[[], object]) -> None:
        while not self._is_over:
            with contextlib.suppress(OSError, http.client.HTTPException):
                work()
                self.count += 1

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join()


def allocate_times(kubelet: Kubelet, count: int) -> list[float]:
    """The seconds that each of COUNT Allocates took."""
    stub = kubelet.clients[kubelet.name("nvidia-gpu0")].stub
    request = sdm.pb.AllocateRequest(container_requests=[sdm.pb.ContainerAllocateRequest(devices_ids=["0"])])

    async def allocate() -> list[float]:
        times = []
        for _ in range(count):
            begin = time.monotonic()
            await stub.Allocate(request, timeout=PATIENCE)
            times.append(time.monotonic() - begin)
        return times

    return kubelet.do(allocate(), 5 * PATIENCE)


def test_clients_of_the_status_server_do_not_delay_kubelet(
    node: Node, kubelet: Kubelet, start: Callable[..., Daemon]
) -> None:
    for number in range(200):
        node.sysfs(f"gpu.{number}", {})
    node.rules(GPUS)
    status = Status(start("--listen", "127.0.0.1:0"))
    status.wait_for("/readyz", 200)
    alone = allocate_times(kubelet, 100)
    with contextlib.ExitStack() as stack:
        for _ in range(sdm.MOST_CONNECTIONS):
            stack.enter_context(status.connect())
        idle = allocate_times(kubelet, 100)
    with Flood(lambda: status.ask("/"), lambda: status.say(b"nonsense\r\n\r\n")) as flood:
        wait_for(lambda: flood.count > 10)
        flooded = allocate_times(kubelet, 100)
    told = {
        name: f"{statistics.median(times) * 1000:.1f} ms, {max(times) * 1000:.1f} ms at most"
        for name, times in (("alone", alone), ("idle connections", idle), ("flooded", flooded))
    }
    print(told)
    assert statistics.median(idle) < 10 * statistics.median(alone) + 0.05, told
    assert statistics.median(flooded) < 10 * statistics.median(alone) + 0.05, told


def test_rendering_lets_others_have_their_turn() -> None:
    turns: list[float] = []

    async def others() -> None:
        while True:
            turns.append(time.monotonic())
            await asyncio.sleep(0)

    async def both() -> list[int]:
        other = asyncio.ensure_future(others())
        made = await sdm.in_slices(number for number in range(100) if not time.sleep(0.001))
        other.cancel()
        return made

    assert asyncio.run(both()) == list(range(100))
    assert len(turns) >= 25


def test_what_is_made_serves_all_who_ask_within_a_second(served: Status) -> None:
    """One nonce, one time: the page was made once for all of these, and is made anew later."""
    pages = [served.ask("/").body for _ in range(10)]
    assert len(set(pages)) <= 5
    wait_for(lambda: served.ask("/").body not in pages)


@pytest.mark.parametrize(
    ("address", "hosts"),
    [
        (":0", ["127.0.0.1", "::1"]),
        ("[::]:0", ["127.0.0.1", "::1"]),
        ("0.0.0.0:0", ["127.0.0.1"]),
        ("127.0.0.1:0", ["127.0.0.1"]),
        ("[::1]:0", ["::1"]),
        ("localhost:0", ["127.0.0.1"]),
    ],
)
def test_it_listens_where_it_is_told_to(
    gpu: Path, start: Callable[..., Daemon], address: str, hosts: list[str]
) -> None:
    if "::1" in hosts and not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    status = Status(start("--listen", address))
    for host in hosts:
        assert status.ask("/healthz", host=host).status == 200
    for host in {"127.0.0.1", "::1"} - set(hosts):
        with pytest.raises(OSError):
            status.ask("/healthz", host=host)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "no.such.host.invalid:8080", "a..b:80", "256.1.1.1:80"])
def test_an_address_that_cannot_be_had_is_logged_and_the_daemon_goes_on(
    gpu: Path, kubelet: Kubelet, start: Callable[..., Daemon], address: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = address.format(port=taken.getsockname()[1])
        daemon = start("--listen", address)
        kubelet.wait_for("nvidia-gpu0", Healthy=4)
    lines = [line for line in daemon.log.splitlines() if "listen" in line]
    assert len(lines) == 1
    assert re.search(rf" ERROR cannot listen on {re.escape(address)}: .+; going on without a status page", lines[0])
    assert daemon.stop() == 0


def test_without_listen_there_is_no_server(gpu: Path, kubelet: Kubelet, start: Callable[..., Daemon]) -> None:
    import psutil

    daemon = start()
    kubelet.wait_for("nvidia-gpu0", Healthy=4)
    assert psutil.Process(daemon.process.pid).net_connections("inet") == []


def test_it_serves_without_modules_that_it_has_no_use_for(
    gpu: Path, kubelet: Kubelet, start: Callable[..., Daemon]
) -> None:
    daemon = start("--listen", "127.0.0.1:0", env={**os.environ, "PYTHONVERBOSE": "1"})
    status = Status(daemon)
    status.wait_for("/readyz", 200)
    for path in PATHS:
        assert status.ask(path).status == 200
    assert "import 'asyncio'" in daemon.log
    loaded = set(re.findall(r"^import '([\w.]+)'", daemon.log, re.MULTILINE))
    assert not loaded & {
        "http.server",
        "http.client",
        "http",
        "urllib.request",
        "socketserver",
        "html",
        "ssl",
        "hashlib",
    }


def broken_daemon(node: Node, fault: str) -> Daemon:
    """A daemon with FAULT, a statement that is run before all else; so its log may show a traceback."""
    driver = node.root / "driver.py"
    driver.write_text(
        f"import smarter_device_manager as sdm, sys\ndef fail(*_):\n    raise KeyError('nobody foresaw this')\n"
        f"{fault}\nsys.exit(sdm.main())\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_smarter_device_manager.SCRIPT", driver)
        return Daemon(node, "--listen", "127.0.0.1:0", env={**os.environ, "PYTHONPATH": str(HERE)})


def test_a_bug_in_what_is_shown_is_a_500_and_nothing_worse(node: Node, gpu: Path, kubelet: Kubelet) -> None:
    daemon = broken_daemon(node, "sdm.render_page = fail")
    status = Status(daemon)
    assert status.ask("/").status == 500
    daemon.says("CRITICAL the status page failed; this is a bug\nTraceback")
    assert status.ask("/metrics").status == 200
    kubelet.wait_for("nvidia-gpu0", Healthy=4)
    assert daemon.stop() == 0


def test_a_bug_in_the_server_ends_the_process(node: Node, gpu: Path, kubelet: Kubelet) -> None:
    """Half a daemon is worse than one that its supervisor starts again."""
    daemon = broken_daemon(node, "sdm.StatusServer._welcome = fail")
    status = Status(daemon)
    kubelet.wait_for("nvidia-gpu0", Healthy=4)
    with contextlib.suppress(OSError):
        status.connect().close()
    assert daemon.process.wait(PATIENCE) == 1
    assert daemon.log.count("Traceback") == 1
    assert [path.name for path in node.plugins.iterdir()] == ["kubelet.sock"]


def test_sigterm_ends_it_in_good_order_with_clients_connected(served: Status, start: Callable[..., Daemon]) -> None:
    daemon = served.daemon
    with served.connect() as idle, served.connect() as partial:
        partial.sendall(GOOD)
        wait_for(lambda: open_sockets(daemon) == 2)
        begin = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - begin < 2
        assert received(idle) == received(partial) == b""
    assert not re.search(r"Traceback|destroyed|never retrieved", daemon.log)


def test_no_descriptor_leaks(served: Status, start: Callable[..., Daemon]) -> None:
    folder = f"/proc/{served.daemon.process.pid}/fd"
    served.ask("/")
    before = len(os.listdir(folder))
    for number in range(100):
        served.say((GOOD + b"\r\n", b"x\r\n\r\n", b"", GOOD)[number % 4], is_done=True)
    wait_for(lambda: len(os.listdir(folder)) <= before)


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)>&amp;'\"</style><script>alert(2)</script>\x1b[31m\udcff"


class Tags(html.parser.HTMLParser):
    """What tags and attributes a page has, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_document() -> dict[str, Any]:
    """A document whose every text is hostile."""
    device = sdm.Device(
        path=HOSTILE, line=1, slots=2, parts=(), permissions="rw", env=(), numa=(), identity=(),
        specs=(sdm.Spec(HOSTILE, HOSTILE, "rw"),), problem="", since=1.0,
    )  # fmt: skip
    gone = sdm.dataclasses.replace(device, problem=HOSTILE)
    plan = sdm.Plan(
        {HOSTILE: sdm.Resource(HOSTILE, True, (device, gone))},
        (sdm.LeftOut(HOSTILE, 1, HOSTILE),),
        (sdm.Rule(1, re.compile(""), HOSTILE),),
        (),
    )
    moment = sdm.Moment(1e9, 100.0)
    state = sdm.State(
        moment=moment, node=HOSTILE, domain=HOSTILE, plan=plan,
        figures=sdm.Figures(0.0, HOSTILE, 1, 1, 1, 1e9, HOSTILE, HOSTILE, 0.1),
        beats={"device side": 0.0}, most_age=1.0, is_answering=True, kubelet_restarts=1, plugin_dir=HOSTILE,
        process={"resident_memory_bytes": 1, "cpu_seconds": 1.0, "start_time_seconds": 1.0},
        events=[{"time": sdm.utc(1e9), "level": "info", "event": HOSTILE, "message": HOSTILE, "more": "x" + HOSTILE}],
    )  # fmt: skip
    holders = {HOSTILE: [sdm.Holder(f"{path}:0", HOSTILE, HOSTILE) for path in (HOSTILE, "other")]}
    link = sdm.Link(False, HOSTILE)
    return sdm.describe_daemon(
        state, [sdm.describe_offer(resource, HOSTILE, moment, link, holders) for resource in plan.resources.values()]
    )


def test_the_page_escapes_everything() -> None:
    page = "".join(sdm.render_page(hostile_document(), "nonce"))
    page.encode()
    found = Tags(page)
    allowed = (
        "html head meta title link style body header h1 h2 h3 p span ul ol li div dl dt dd small section article svg"
    )
    assert found.tags <= {*allowed.split(), "rect", "code", "strong", "time", "footer", "a"}
    assert not any(name.startswith("on") for name in found.attributes)
    assert "style" not in found.attributes, "the policy would forbid it"
    shown = "<img src=x onerror=alert(1)>&amp;'\"</style><script>alert(2)</script>\\x1b[31m\\udcff"
    assert found.text.count(shown) >= 15
    for outside in ("http:", "https:", "//", "url(", "@import"):
        assert outside not in page.replace("http://www.w3.org/2000/svg", "")


def test_json_metrics_and_terminal_bear_hostile_texts_too() -> None:
    document = hostile_document()
    assert json.loads(json.dumps(document))["node"] == HOSTILE
    text = sdm.render_status(document)
    assert "\x1b" not in text
    text.encode()
    names = {key[1] for key in samples("".join(sdm.render_metrics(document))) if key[0] == "slots"}
    assert names == {f"{HOSTILE}/{HOSTILE}"}


@needs_root
def test_hostile_names_on_the_node_are_text_on_the_page(
    node: Node, kubelet: Kubelet, start: Callable[..., Daemon]
) -> None:
    name = "<img src=x onerror=alert(1)>"
    node.plug(name)
    node.rules("- devicematch: img\n")
    checkpoint(node, (f"smarter-devices/{sdm.resource_name(name)}", "<script>alert(2)</script>", "<b>", {"-1": ["0"]}))
    status = Status(start("--listen", "127.0.0.1:0", env={**os.environ, "NODE_NAME": "<i>node</i>"}))
    page = status.ask("/").body
    found = Tags(page)
    assert not found.tags & {"img", "script", "b", "i"}
    for text in (f"/dev/{name}", "<script>alert(2)</script>", "<b>", "<i>node</i>"):
        assert text in found.text


def test_the_page_says_what_is_wrong_first_and_refreshes_itself(served: Status, kubelet: Kubelet) -> None:
    page = served.ask("/").body
    assert "all is well" in page
    assert re.search(r'<meta http-equiv="refresh" content="\d+">', page)
    assert "<script" not in page
    kubelet.down()
    page = wait_for(lambda: "1 thing is wrong" in (body := served.ask("/").body) and body)
    assert page.index("kubelet does not answer") < page.index("<h2>Resources</h2>") < page.index("<h2>Last events</h2>")


def test_the_page_without_a_device_says_so(node: Node, start: Callable[..., Daemon]) -> None:
    node.rules("- devicematch: ^nothing$\n")
    status = Status(start("--listen", "127.0.0.1:0"))
    assert "No device is offered" in status.ask("/").body
    assert status.ask("/readyz").status == 200
    assert "No device is offered" in node.run("--status", status.address).stdout


# In Chromium

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")


def chromium(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Chromium without a screen, on a profile of its own."""
    quiet = "--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    options = [*quiet.split(), "--disable-component-update", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # root has to
    with tempfile.TemporaryDirectory(prefix="sdm-chromium-", ignore_cleanup_errors=True) as profile:
        command = [str(CHROMIUM), *options, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=5 * PATIENCE, check=True)


def seen_in_chromium(status: Status) -> Tags:
    run = chromium("--dump-dom", f"http://{status.address}/")
    assert not re.search(r"Content Security Policy|CONSOLE", run.stderr), run.stderr
    return Tags(run.stdout)


def plug_a_greenhouse(node: Node) -> None:
    """What a small node of the field has: good for a picture."""
    for path in ("video0", "ttyACM0", "i2c-1", "gpiochip0", "snd/controlC0", "snd/pcmC0D0p"):
        node.plug(path)
    node.link("ttyUSB9", "ttyUSB7")
    node.rules(
        "- devicematch: ^video[0-9]*$\n  nummaxdevices: 20\n- devicematch: ^snd$\n  nummaxdevices: 20\n"
        "- devicematch: ^gpiochip[0-9]*$\n  nummaxdevices: 4\n- devicematch: ^i2c-[0-9]*$\n"
        "- devicematch: ^tty(USB|ACM)[0-9]*$\n  nummaxdevices: 1\n- devicematch: ^hci[0-9]*$\n"
    )
    checkpoint(
        node,
        ("smarter-devices/video0", "0b8c1f6e-5d9a-4b7e-9c38-4f2d5d1f7a10", "detector", {"-1": ["0", "1", "2"]}),
        ("smarter-devices/video0", "c51b2f80-7a07-4d57-8a0e-53c1b0c6f2d9", "recorder", {"-1": ["3"]}),
        ("smarter-devices/i2c-1", "7e4a9b1d-22c6-4f0a-b1de-9f0b6f0c3c55", "climate", {"-1": ["0"]}),
        ("smarter-devices/ttyACM0", "7e4a9b1d-22c6-4f0a-b1de-9f0b6f0c3c55", "climate", {"-1": ["0"]}),
        ("smarter-devices/gpiochip0", "f3c6d2aa-0b64-4b8c-8f6e-1d2a4d7e9b02", "valves", {"-1": ["0"]}),
    )


@needs_chromium
@needs_root
def test_chromium_shows_a_device_appear_an_unhealthy_one_and_a_used_slot(
    node: Node, kubelet: Kubelet, start: Callable[..., Daemon], tmp_path: Path
) -> None:
    """The pictures of README.md are made by this: STATUS_PICTURES=docs pytest -k chromium_shows."""
    plug_a_greenhouse(node)
    daemon = start("--listen", "127.0.0.1:0", env={**os.environ, "NODE_NAME": "greenhouse-pi"})
    status = Status(daemon)
    status.wait_for("/readyz", 200)
    found = seen_in_chromium(status)
    assert "all is well" in found.text
    assert "4 of 20 in use" in found.text
    assert "detector" in found.text
    assert "ttyUSB0" not in found.text
    node.plug("ttyUSB0")
    wait_for(lambda: "ttyUSB0" in status.ask("/").body)
    assert "/dev/ttyUSB0" in seen_in_chromium(status).text
    node.unplug("ttyACM0")
    wait_for(lambda: status.document()["problems"])
    wait_for(lambda: "is wrong" in status.ask("/").body)
    found = seen_in_chromium(status)
    assert "1 thing is wrong" in found.text
    assert "/dev/ttyACM0: it is gone, in use by climate" in found.text
    folder = Path(os.environ.get("STATUS_PICTURES", tmp_path))
    for name, size, more in (
        ("status.png", "1100,1170", ()),
        ("status-dark.png", "1100,1170", ("--blink-settings=preferredColorScheme=0",)),
        ("status-phone.png", "500,1400", ()),
    ):
        picture = (tmp_path if "phone" in name else folder) / name
        run = chromium(f"--window-size={size}", f"--screenshot={picture}", *more, f"http://{status.address}/")
        assert "Content Security Policy" not in run.stderr
        colours = colours_of(picture)
        assert picture.stat().st_size < 200_000
        back = (0x0F, 0x13, 0x18) if "dark" in name else (0xF4, 0xF5, 0xF7)
        wrong = (0xFF, 0x7F, 0x7F) if "dark" in name else (0xC0, 0x2B, 0x30)
        used = (0x6A, 0xA1, 0xFF) if "dark" in name else (0x2F, 0x6F, 0xDB)
        assert {back, wrong, used} <= colours, "the style is in force: the page's ground, what is wrong, a slot in use"


def colours_of(picture: Path) -> set[tuple[int, ...]]:
    """The colours of a PNG of 8-bit RGB or RGBA that is not interlaced (PNG specification, 9 and 11)."""
    import zlib

    data = picture.read_bytes()
    width, _, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    assert (depth, interlaced) == (8, 0)
    size = {2: 3, 6: 4}[kind]
    packed, position = b"", 8
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        if data[position + 4 : position + 8] == b"IDAT":
            packed += data[position + 8 : position + 8 + length]
        position += length + 12
    raw = zlib.decompress(packed)
    stride = width * size
    before = bytearray(stride)
    colours: set[tuple[int, ...]] = set()
    for start in range(0, len(raw), stride + 1):
        line = bytearray(raw[start + 1 : start + 1 + stride])
        for index in range(stride):
            left = line[index - size] if index >= size else 0
            corner = before[index - size] if index >= size else 0
            line[index] = (line[index] + _predicted(raw[start], left, before[index], corner)) & 255
        colours |= set(zip(line[0::size], line[1::size], line[2::size]))
        before = line
    return colours


def _predicted(filtered: int, left: int, above: int, corner: int) -> int:
    if filtered < 4:
        return (0, left, above, (left + above) // 2)[filtered]
    guess = left + above - corner
    return min((left, above, corner), key=lambda value: abs(guess - value))


@needs_chromium
@needs_root
def test_chromium_runs_nothing_that_a_name_says(node: Node, kubelet: Kubelet, start: Callable[..., Daemon]) -> None:
    node.plug("<img src=x onerror=document.title='taken'>")
    node.rules("- devicematch: img\n")
    status = Status(start("--listen", "127.0.0.1:0", env={**os.environ, "NODE_NAME": "</title><script>x</script>"}))
    status.wait_for("/readyz", 200)
    found = seen_in_chromium(status)
    assert not found.tags & {"img", "script"}
    assert "<img src=x onerror=document.title='taken'>" in found.text


# ---------------------------------------------------------------------------------------------------------------------
# --status
# ---------------------------------------------------------------------------------------------------------------------


def test_status_prints_a_running_daemons_state(
    node: Node, served: Status, gpu: Path, start: Callable[..., Daemon]
) -> None:
    checkpoint(node, ("smarter-devices/nvidia-gpu0", POD, "detect", {"-1": ["3", "0"]}))
    wait_for(lambda: served.resource("nvidia-gpu0")["in_use"] == 2)
    run = node.run("--status", served.address)
    assert run.returncode == 0
    assert re.match(r"\S+: well, as of \d{4}-", run.stdout)
    assert re.search(r"^2/4 +smarter-devices/nvidia-gpu0 +yes +nvidia-gpu0$", run.stdout, re.MULTILINE)
    assert re.search(rf"^ +3  nvidia-gpu0 +{POD}  detect$", run.stdout, re.MULTILINE)
    assert "1 device: offered" in run.stdout or "nvidia-gpu0: offered" in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 80
    assert json.loads(node.run("--status", served.address, "--json").stdout)["node"] == served.document()["node"]
    gpu.rmdir()
    served.daemon.hang_up()
    wait_for(lambda: served.document()["problems"])
    told = node.run("--status", served.address).stdout
    assert re.match(r"\S+: not well, as of .*\n  - nvidia-gpu0: it is gone, in use by detect\n", told)


def test_status_looks_where_listen_says(node: Node, served: Status) -> None:
    for address in (served.address, f":{served.port}", f"0.0.0.0:{served.port}", f"[::]:{served.port}"):
        assert node.run("--status", "--listen", address).returncode == 0
    assert node.run("--status", env={**os.environ, "SMARTER_DEVICE_MANAGER_LISTEN": served.address}).returncode == 0


def test_status_needs_no_more_than_the_image_has(node: Node, served: Status) -> None:
    """The image has no http, email or urllib (Dockerfile); kubectl exec POD -- ... --status is to work in it."""
    run = node.run("--status", served.address, env={**os.environ, "PYTHONVERBOSE": "1"})
    assert run.returncode == 0
    assert not re.search("^import '(http|email|html|ssl|grpc|asyncio|urllib.request)'", run.stderr, re.MULTILINE)


def test_status_without_a_daemon_says_how_to_reach_one(node: Node) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        run = node.run("--status", f"127.0.0.1:{port}")
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith(
        f"smarter_device_manager.py: no daemon answers on 127.0.0.1:{port} (Connection refused)"
    )
    for way in ("--listen", "--status ADDRESS:PORT", f"kubectl -n kube-system port-forward POD {port}"):
        assert way in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n\xff",
        b"220 mail.example.org ESMTP\r\n",
        b"",
    ],
)
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_status_of_something_else_is_refused(node: Node, answer: bytes, more: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        run = node.run("--status", f"127.0.0.1:{server.getsockname()[1]}", *more)
        thread.join()
    assert run.returncode == 1
    assert re.search("is no smarter-device-manager|no daemon answers", run.stderr)
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("address", ["", "8080", "node", ":70000", "http://node:8080/"])
def test_status_of_no_address_is_a_usage_error(node: Node, address: str) -> None:
    run = node.run("--status", address)
    assert run.returncode == 2
    assert f'"{address}" is no ADDRESS:PORT, such as' in run.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The log
# ---------------------------------------------------------------------------------------------------------------------


def test_the_log_as_json_is_an_object_a_line(
    node: Node, gpu: Path, kubelet: Kubelet, start: Callable[..., Daemon]
) -> None:
    daemon = start("--log-format", "json", "--listen", "127.0.0.1:0")
    kubelet.wait_for("nvidia-gpu0", Healthy=4)
    kubelet.take("nvidia-gpu0", "1")
    with pytest.raises(grpc.RpcError):
        kubelet.take("nvidia-gpu0", "99")
    node.rules("- devicematch: [\n")
    daemon.says("conf-refused")
    assert daemon.stop() == 0
    records = [json.loads(line) for line in daemon.log.splitlines()]
    for record in records:
        assert {"time", "level", "event", "message"} <= record.keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
    by_event = {record["event"]: record for record in records}
    assert by_event["allocated"]["ids"] == "1"
    assert by_event["refused"]["level"] == "warning"
    assert by_event["refused"]["resource"] == "smarter-devices/nvidia-gpu0"
    assert by_event["refused"]["status"] == "INVALID_ARGUMENT"
    assert by_event["conf-refused"]["level"] == "error"
    assert {"listening", "started", "plugged", "registered", "stopping"} <= by_event.keys()


def test_the_log_as_text_is_a_sentence_and_its_fields(
    gpu: Path, kubelet: Kubelet, start: Callable[..., Daemon]
) -> None:
    daemon = start()
    kubelet.wait_for("nvidia-gpu0", Healthy=4)
    kubelet.take("nvidia-gpu0", "1", "2")
    daemon.says("allocated")
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    line = next(line for line in daemon.log.splitlines() if "allocated" in line)
    assert re.fullmatch(
        rf"{stamp} INFO allocated to a container resource=smarter-devices/nvidia-gpu0 ids=1,2 devices=(\"\")?", line
    )
    for line in daemon.log.splitlines():
        assert re.fullmatch(rf'{stamp} (INFO|WARNING) [^=]+( [a-z]+=(\S*|"[^"]*"))*', line)


def test_what_was_refused_is_logged_at_any_level_and_nothing_else(
    node: Node, gpu: Path, start: Callable[..., Daemon]
) -> None:
    node.sysfs("gpu.1", {})
    kubelet = Kubelet(node)
    kubelet.refused["nvidia-gpu1"] = "not on my watch"
    kubelet.up()
    try:
        daemon = start("--log-level", "error", "--listen", "127.0.0.1:0")
        kubelet.wait_for("nvidia-gpu0", Healthy=4)
        with pytest.raises(grpc.RpcError):
            kubelet.take("nvidia-gpu0", "99")
        daemon.says(r'WARNING Allocate refused: no device ID "99"')
        daemon.says(r"WARNING smarter-devices/nvidia-gpu1: kubelet refused its registration .*not on my watch")
        assert daemon.stop() == 0
        assert all("refused" in line for line in daemon.log.splitlines()), daemon.log
    finally:
        kubelet.down()


def test_events_are_told_whatever_the_logs_level(
    gpu: Path, kubelet: Kubelet, start: Callable[..., Daemon], node: Node
) -> None:
    import psutil

    daemon = start("--log-level", "error", "--listen", "127.0.0.1:0")
    listening = wait_for(lambda: psutil.Process(daemon.process.pid).net_connections("inet"))

    def events() -> set[str]:
        run = node.run("--status", f"127.0.0.1:{listening[0].laddr.port}", "--json")
        return {event["event"] for event in json.loads(run.stdout)["events"]}

    wait_for(lambda: {"registered", "plugged", "started"} <= events())
    assert daemon.log == ""
