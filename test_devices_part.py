"""The tests of the script's chapters Devices and Plan: what a device is, what it is called, what is given of it."""
# ruff: noqa: F405

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import resource
import shutil
import socket

from hypothesis import example, given
from hypothesis import strategies as st

from test_smarter_device_manager import *  # noqa: F403
from test_smarter_device_manager import (
    HERE,
    SCRIPT,
    Daemon,
    Kubelet,
    Node,
    grpc,
    needs_root,
    sdm,
    wait_for,
)

Starter = Callable[..., Daemon]

# ---------------------------------------------------------------------------------------------------------------------
# Devices: what is one. A made-up /dev is a mapping from path to what stands there; each case holds for plain data, for
# the scanner's look at real files, and for the look of an Allocate.
# ---------------------------------------------------------------------------------------------------------------------

KINDS = {
    "char": sdm.CHAR,
    "block": sdm.BLOCK,
    "folder": sdm.FOLDER,
    "shared": sdm.FOLDER,
    "file": "plain file",
    "fifo": "FIFO",
    "socket": "socket",
}


def snapshot_of(tree: Mapping[str, str]) -> sdm.Snapshot:
    """TREE as plain data. Values: a kind, "char 81:0" for a number, "-> target" for a link."""
    entries: dict[str, sdm.Entry] = {"": sdm.Entry(sdm.FOLDER)}
    for serial, (path, told) in enumerate(sorted(tree.items()), 1000):
        for depth in range(1, path.count("/") + 1):
            entries.setdefault("/".join(path.split("/")[:depth]), sdm.Entry(sdm.FOLDER))
        kind, _, number = told.partition(" ")
        if kind == "->":
            entries[path] = sdm.Entry(sdm.LINK, target=number, serial=serial)
        else:
            major, _, minor = (number or f"240:{serial}").partition(":")
            device = os.makedev(int(major), int(minor)) if KINDS[kind] in sdm.NODES else 0
            entries[path] = sdm.Entry(KINDS[kind], device, serial, shared=kind == "shared", serial=serial)
    folders: dict[str, list[str]] = {path: [] for path, entry in entries.items() if entry.kind == sdm.FOLDER}
    for path in sorted(entries):
        if path:
            folders[path.rpartition("/")[0]].append(path.rpartition("/")[2])
    return sdm.Snapshot(entries, folders)


def build(dev: Path, tree: Mapping[str, str]) -> None:
    """Make TREE below DEV; nodes take root."""
    for minor, (path, told) in enumerate(tree.items(), 1):
        place = dev / os.fsdecode(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        kind, _, number = told.partition(" ")
        if kind == "->":
            place.symlink_to(number)
        elif kind in ("char", "block"):
            first, _, second = (number or f"240:{minor}").partition(":")
            os.mknod(
                place, (stat.S_IFCHR if kind == "char" else stat.S_IFBLK) | 0o600, os.makedev(int(first), int(second))
            )
        elif kind in ("folder", "shared"):
            place.mkdir(exist_ok=True)
            place.chmod(0o777 if kind == "shared" else 0o755)
        elif kind == "fifo":
            os.mkfifo(place)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(place))
        else:
            place.write_text("no device\n")


@dataclasses.dataclass
class Case:
    """What PATH in a made-up TREE stands for: its nodes as path -> suffix, or why it is no device."""

    id: str
    tree: Mapping[str, str]
    path: str
    found: Mapping[str, str] | str


CASES = [
    Case("a character device", {"video0": "char"}, "video0", {"video0": ""}),
    Case("a block device", {"sda": "block"}, "sda", {"sda": ""}),
    Case("a node in a folder", {"net/tun": "char"}, "net/tun", {"net/tun": ""}),
    Case(
        "a folder",
        {"snd/seq": "char", "snd/controlC0": "char", "snd/by/id/x": "block", "snd/note": "file", "snd/l": "-> seq"},
        "snd",
        {"snd/by/id/x": "/by/id/x", "snd/controlC0": "/controlC0", "snd/seq": "/seq"},
    ),
    Case("a folder with no node", {"snd/note": "file", "a": "char", "snd/l": "-> ../a"}, "snd", "holds no device node"),
    Case("an empty folder", {"snd": "folder"}, "snd", "holds no device node"),
    Case("a plain file", {"file": "file"}, "file", "a plain file, not a device"),
    Case("a socket", {"log": "socket"}, "log", "a socket, not a device"),
    Case("a FIFO", {"initctl": "fifo"}, "initctl", "a FIFO, not a device"),
    Case("a name that is not there", {"a": "char"}, "b", "it is gone"),
    Case("a link", {"by-id/x": "-> ../ttyUSB0", "ttyUSB0": "char"}, "by-id/x", {"ttyUSB0": ""}),
    Case("a link of links", {"a": "-> b", "b": "-> d/c", "d/c": "-> ./../n", "n": "char"}, "a", {"n": ""}),
    Case("a link to a folder", {"sound": "-> snd", "snd/seq": "char"}, "sound", {"snd/seq": "/seq"}),
    Case("a path through a link", {"sound": "-> snd", "snd/seq": "char"}, "sound/seq", {"snd/seq": ""}),
    Case(
        "a link that climbs inside",
        {"a/b/x": "-> ../../c/d/../e", "c/d/f": "file", "c/e": "char"},
        "a/b/x",
        {"c/e": ""},
    ),
    Case("an absolute link", {"a": "-> /dev/b", "b": "char"}, "a", {"b": ""}),
    Case("an absolute link in a folder", {"d/a": "-> /dev/b", "b": "char", "d/b": "file"}, "d/a", {"b": ""}),
    Case("an absolute link that climbs inside", {"a": "-> /dev//c/../b", "b": "char", "c": "folder"}, "a", {"b": ""}),
    Case("a dangling link", {"a": "-> b/c", "b": "folder"}, "a", "a link to /dev/b/c, which is not there"),
    Case("a link to itself", {"a": "-> a"}, "a", "leads in a circle"),
    Case("a circle of links", {"a": "-> d/b", "d/b": "-> ../a"}, "a", "leads in a circle"),
    Case("40 links", {"n": "char", **{f"l{n}": f"-> l{n + 1}" for n in range(39)}, "l39": "-> n"}, "l0", {"n": ""}),
    Case("41 links", {"n": "char", **{f"l{n}": f"-> l{n + 1}" for n in range(40)}, "l40": "-> n"}, "l0", "in a circle"),
    Case("a link out of /dev", {"a": "-> ../null"}, "a", "a link that leaves /dev"),
    Case("a link far out of /dev", {"d/a": "-> ../../../../../../../dev/null"}, "d/a", "a link that leaves /dev"),
    Case("a link out of /dev and back", {"a": "-> ../dev/b", "b": "char"}, "a", "a link that leaves /dev"),
    Case("an absolute link out", {"a": "-> /etc/passwd"}, "a", "a link to /etc/passwd, which leaves /dev"),
    Case("an absolute link that climbs out", {"a": "-> /dev/../etc/passwd"}, "a", "a link that leaves /dev"),
    Case("a link to a like name", {"a": "-> /devices/b"}, "a", "a link to /devices/b, which leaves /dev"),
    Case("stdin", {"stdin": "-> /proc/self/fd/0"}, "stdin", "a link to /proc/self/fd/0, which leaves /dev"),
    Case("fd", {"fd": "-> /proc/self/fd"}, "fd", "which leaves /dev"),
    Case("the log", {"log": "-> /run/systemd/journal/dev-log"}, "log", "which leaves /dev"),
    Case("a link to all of /dev", {"d/a": "-> ..", "n": "char"}, "d/a", "a link to all of /dev"),
    Case("an absolute link to all of /dev", {"a": "-> /dev/", "n": "char"}, "a", "a link to all of /dev"),
    Case("a link to a plain file", {"a": "-> f", "f": "file"}, "a", "a plain file, not a device"),
    Case("a link through a file", {"a": "-> f/b", "f": "file"}, "a", "a path through /dev/f, which is a plain file"),
    Case(
        "a link through a node", {"a": "-> n/b", "n": "char"}, "a", "a path through /dev/n, which is a character device"
    ),
    Case("a node in a shared folder", {"pub": "shared", "pub/n": "char"}, "pub/n", {"pub/n": ""}),
    Case(
        "a planted link",
        {"pub": "shared", "pub/n": "-> ../sda", "sda": "block"},
        "pub/n",
        "below /dev/pub, where others",
    ),
    Case(
        "an absolute planted link", {"pub": "shared", "pub/n": "-> /dev/sda", "sda": "block"}, "pub/n", "where others"
    ),
    Case(
        "a link to a planted one",
        {"a": "-> pub/n", "pub": "shared", "pub/n": "-> ../s", "s": "block"},
        "a",
        "where others",
    ),
    Case(
        "a folder planted below", {"pub": "shared", "pub/d/n": "-> ../../s", "s": "block"}, "pub/d/n", "below /dev/pub,"
    ),
    Case(
        "a folder with a planted link",
        {"pub": "shared", "pub/a": "char", "pub/b": "-> ../s", "s": "block"},
        "pub",
        {"pub/a": "/a"},
    ),
    Case("a link with a name of bytes", {"a\udcff": "-> n", "n": "char"}, "a\udcff", "is not UTF-8"),
    Case("a link to a name of bytes", {"a": "-> n\udcff", "n\udcff": "char"}, "a", "is not UTF-8"),
    Case("a folder with a name of bytes in it", {"d/ok": "char", "d/n\udcff": "char"}, "d", "is not UTF-8"),
]


def outcome(tree: sdm.Tree, path: str, dev_dir: str) -> Mapping[str, str] | str:
    try:
        return {node.path: node.suffix for node in sdm.resolve(tree, path, dev_dir)}
    except sdm.NotADevice as error:
        return str(error)


def check_case(case: Case, found: Mapping[str, str] | str) -> None:
    if isinstance(case.found, str):
        assert isinstance(found, str) and case.found in found
    else:
        assert found == case.found
        assert list(found) == sorted(found)


def real_cases() -> list[Any]:
    return [
        pytest.param(case, id=case.id, marks=[needs_root] if {"char", "block"} & set(case.tree.values()) else [])
        for case in CASES
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_is_a_device_in_plain_data(case: Case) -> None:
    check_case(case, outcome(snapshot_of(case.tree), case.path, "/dev"))


@pytest.mark.parametrize("case", real_cases())
def test_what_is_a_device_to_the_scanner(case: Case, node: Node) -> None:
    build(node.dev, case.tree)
    snapshot, flapped = sdm.Scanner(str(node.dev)).scan()
    check_case(case, outcome(snapshot, case.path, str(node.dev)))
    assert not flapped


@pytest.mark.parametrize("case", real_cases())
def test_what_is_a_device_to_an_allocate(case: Case, node: Node) -> None:
    build(node.dev, case.tree)
    before = set(os.listdir("/proc/self/fd"))
    with sdm.LiveTree(str(node.dev)) as tree:
        check_case(case, outcome(tree, case.path, str(node.dev)))
    assert set(os.listdir("/proc/self/fd")) == before


def test_absolute_links_are_seen_from_where_the_host_dev_is(node: Node) -> None:
    build(node.dev, {"a": f"-> {node.dev}/f", "b": "-> /dev/f", "c": f"-> {node.dev}2/f", "f": "file"})
    with sdm.LiveTree(str(node.dev)) as tree:
        assert outcome(tree, "a", str(node.dev)) == outcome(tree, "b", str(node.dev)) == "a plain file, not a device"
        assert "leaves /dev" in outcome(tree, "c", str(node.dev))
        assert "leaves /dev" in outcome(tree, "a", "/dev")


@needs_root
def test_the_owner_and_the_group_of_a_folder_say_who_may_plant_links(node: Node) -> None:
    build(node.dev, {"n": "char", **{f"{name}/l": "-> ../n" for name in ("root", "disk", "group", "user", "sticky")}})
    for name, mode, uid, gid in (
        ("root", 0o775, 0, 0),
        ("disk", 0o755, 0, 6),
        ("group", 0o775, 0, 6),
        ("user", 0o755, 1000, 0),
        ("sticky", 0o1777, 0, 0),
    ):
        os.chown(node.dev / name, uid, gid)
        (node.dev / name).chmod(mode)
    snapshot, _ = sdm.Scanner(str(node.dev)).scan()
    with sdm.LiveTree(str(node.dev)) as live:
        for tree in (snapshot, live):
            assert outcome(tree, "root/l", "/dev") == outcome(tree, "disk/l", "/dev") == {"n": ""}
            for name in ("group", "user", "sticky"):
                assert f"below /dev/{name}, where others than root may make links" in outcome(tree, f"{name}/l", "/dev")


def test_names_too_long_for_a_file_are_not_there(node: Node) -> None:
    with sdm.LiveTree(str(node.dev)) as tree:
        assert tree.look("n" * 256) is None
        assert outcome(tree, "n" * 256, "/dev") == "it is gone"


def test_a_path_of_the_live_tree_ends_at_what_is_no_folder(node: Node) -> None:
    build(node.dev, {"f": "file", "l": "-> d", "d/x": "file"})
    with sdm.LiveTree(str(node.dev)) as tree:
        assert tree.look("f/x") is tree.look("l/x") is tree.look("nowhere/x") is None
        assert tree.look("d/x") is not None


def mounted(node: Node, script: str, *code: str) -> str:
    """What the command CODE prints where the shell SCRIPT has mounted things, in a mount namespace of its own."""
    probe = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none {node.root} && mount -t tmpfs none {node.root}"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("mounting a file system in a namespace of its own is not possible here (unshare(1), mount(8))")
    command = ["unshare", "--mount", "sh", "-ec", f'cd {node.dev}\n{script}\nexec "$@"', "sh", *code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return done.stdout


MOUNTS = """
mkdir shm both both/pts
mknod video0 c 240 1
mknod both/n c 240 2
mount -t tmpfs -o mode=755 none shm
mount -t tmpfs -o mode=755 none both/pts
mknod shm/evil c 240 3
mkdir shm/deep
mknod shm/deep/evil c 240 4
mknod both/pts/0 c 240 5
ln -s shm/evil link
ln -s ../video0 shm/back
"""


@needs_root
def test_other_file_systems_are_not_looked_into(node: Node) -> None:
    node.rules("- devicematch: .\n")
    command = [sys.executable, str(SCRIPT), *node.options(), "--list", "--json"]
    document = json.loads(mounted(node, MOUNTS, *command))
    assert {found["name"] for found in document["resources"]} == {
        "smarter-devices/" + name for name in ("video0", "both", "both_n")
    }
    folder = next(found for found in document["resources"] if found["name"].endswith("both"))
    assert [spec["host"] for spec in folder["devices"][0]["nodes"]] == ["/dev/both/n"]
    assert {left["path"]: left["reason"] for left in document["left_out"]} == {
        "/dev/shm": "another file system",
        "/dev/both/pts": "another file system",
        "/dev/link": "a path through /dev/shm, which is a mount",
    }


@needs_root
def test_an_allocate_does_not_look_into_other_file_systems(node: Node) -> None:
    code = f"""
import smarter_device_manager as sdm
with sdm.LiveTree({str(node.dev)!r}) as tree:
    for path in ("shm", "shm/evil", "shm/deep", "link", "shm/back", "both/pts/0", "both"):
        try:
            print(path, *[found.path for found in sdm.resolve(tree, path, "/dev")])
        except sdm.NotADevice:
            print(path, "refused")
"""
    told = mounted(node, MOUNTS, sys.executable, "-c", code)
    assert told.splitlines() == [
        *(f"{path} refused" for path in ("shm", "shm/evil", "shm/deep", "link", "shm/back", "both/pts/0")),
        "both both/n",
    ]


@needs_root
def test_a_file_system_that_is_mounted_while_the_daemon_runs_hides_what_was_there(node: Node) -> None:
    code = f"""
import subprocess
import smarter_device_manager as sdm
scanner = sdm.Scanner({str(node.dev)!r})
for command in ("true", "mount -t tmpfs none d && mknod d/evil c 240 1", "umount d"):
    subprocess.run(command, shell=True, check=True, cwd={str(node.dev)!r})
    for full in (False, True):
        found, _ = scanner.scan(full)
        print(*found.entries, found.entries["d"].kind)
"""
    told = mounted(node, "mkdir d; mknod d/n c 240 1; sleep 0.05", sys.executable, "-c", code)
    there, hidden = [" d d/n folder"] * 2, [" d folder", " d mount"]
    assert told.splitlines() == [*there, *hidden, " d mount", there[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Polling
# ---------------------------------------------------------------------------------------------------------------------


class Calls:
    """Counts the folders that are opened to be listed, while it is on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dev: Path) -> None:
        self.listed: list[str] = []
        real = os.open

        def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_DIRECTORY and str(path).startswith(str(dev)):
                self.listed.append(str(path)[len(str(dev)) + 1 :])
            return real(path, flags, *rest, **more)

        monkeypatch.setattr(os, "open", opened)

    def of(self, work: Callable[[], Any]) -> list[str]:
        self.listed.clear()
        work()
        return sorted(self.listed)


def settle(scanner: sdm.Scanner) -> None:
    """Scan until the times of all folders are old enough to be trusted."""
    time.sleep(2 * sdm.FRESH_NS / 1e9)  # no condition to wait for: the time itself is what counts
    scanner.scan()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, node: Node) -> Calls:
    return Calls(monkeypatch, node.dev)


def test_only_what_changed_is_listed(node: Node, calls: Calls) -> None:
    build(node.dev, {"a/b/f": "file", "c/f": "file", "f": "file"})
    scanner = sdm.Scanner(str(node.dev))
    assert calls.of(scanner.scan) == ["", "a", "a/b", "c"]
    settle(scanner)
    before, _ = scanner.scan()
    assert calls.of(scanner.scan) == []
    assert scanner.scan() == (before, []) and scanner.scan()[0] is before
    build(node.dev, {"a/b/g": "file"})
    assert calls.of(scanner.scan) == ["a/b"]
    after, flapped = scanner.scan()
    assert "a/b/g" in after.entries and not flapped
    assert after.entries["a/b/f"] is before.entries["a/b/f"]
    settle(scanner)
    assert calls.of(lambda: scanner.scan(full=True)) == ["", "a", "a/b", "c"]
    assert scanner.scan()[0] is after


STRACE = """
import os, sys, time
import smarter_device_manager as sdm
side = sdm.DeviceSide({conf!r}, {dev!r}, {sys!r})
side.start()
for turn in range(3):
    time.sleep(0.05)
    side.turn()
for turn in range(10):
    os.access("/a-turn-begins", os.F_OK)
    assert side.turn() == []
os.access("/a-turn-begins", os.F_OK)
"""


def test_a_poll_is_a_stat_of_each_folder(node: Node) -> None:
    if not shutil.which("strace") or subprocess.run(["strace", "true"], capture_output=True).returncode:
        pytest.skip("strace(1) is not installed, or may not trace here")
    build(node.dev, {f"bus/{number % 3}/f{number}": "file" for number in range(30)})
    node.rules("- devicematch: f[0-9]\n- devicematch: ^bus$\n  attributes: {name: x}\n")
    code = STRACE.format(conf=str(node.conf), dev=str(node.dev), sys=str(node.sys))
    trace = node.root / "trace"
    command = ["strace", "-f", "-o", str(trace), "-e", "trace=file,desc", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=HERE)
    assert done.returncode == 0, done.stderr
    turns = trace.read_text().split("a-turn-begins")[1:]
    assert len(turns) == 11
    for turn in turns[:-1]:
        asked = sorted(re.findall(r'stat[a-z0-9]*\((?:AT_FDCWD, )?"([^"]*)"', turn))
        folders = [str(node.dev), *(f"{node.dev}/bus{rest}" for rest in ("", "/0", "/1", "/2"))]
        assert asked == sorted([str(node.conf), *folders])
        assert not re.search(r"\b(open|openat|getdents64|read|readlink)\(", turn)


TICK_NS = 10_000_000  # of a kernel with CONFIG_HZ=100


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """File times as of a kernel before 6.13, such as a Raspberry Pi has: they move once a tick."""

    def coarse(found: os.stat_result) -> os.stat_result:
        names = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")
        times = {name: getattr(found, name) // TICK_NS * TICK_NS for name in names}
        rest = {name: getattr(found, name) for name in ("st_rdev", "st_blksize", "st_blocks")}
        return os.stat_result(tuple(found), {**rest, **times})

    for name in ("stat", "lstat", "fstat"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, real=real, **more: coarse(real(*given, **more)))


def test_changes_within_one_tick_of_the_clock_are_seen(node: Node, ticks: None) -> None:
    """Hundreds of changes with no pause, each seen at once though the folder's time does not move between many."""
    scanner = sdm.Scanner(str(node.dev))
    (node.dev / "d").mkdir()
    scanner.scan()
    stamps = set()
    for number in range(500):
        (node.dev / "d" / str(number)).touch()
        assert f"d/{number}" in scanner.scan()[0].entries
        stamps.add(os.stat(node.dev / "d").st_mtime_ns)
    assert len(stamps) < 500


@pytest.mark.parametrize("seconds", [-1e9, 1e9], ids=["back", "forward"])
def test_times_that_were_set_hide_nothing(node: Node, calls: Calls, ticks: None, seconds: float) -> None:
    """Whoever sets a folder's time back to what it was (cp -a, tar) hides no change, and forces no listing."""
    scanner = sdm.Scanner(str(node.dev))
    when = time.time_ns() + int(seconds * 1e9)
    for number in range(300):
        (node.dev / str(number)).touch()
        os.utime(node.dev, ns=(when, when))
        assert str(number) in scanner.scan()[0].entries
    settle(scanner)
    assert calls.of(scanner.scan) == []


def test_a_clock_that_was_set_back_costs_nothing_and_hides_nothing(
    node: Node, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanner = sdm.Scanner(str(node.dev))
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3600 * 10**9)
    scanner.scan()
    assert calls.of(scanner.scan) == []  # the folder's time is an hour to come
    (node.dev / "new").touch()
    time.sleep(2 * sdm.FRESH_NS / 1e9)
    assert "new" in scanner.scan()[0].entries


def test_files_that_a_thread_makes_meanwhile_are_all_seen(node: Node) -> None:
    scanner = sdm.Scanner(str(node.dev))
    names = [f"d{number % 7}/f{number}" for number in range(1500)]

    def make() -> None:
        for name in names:
            build(node.dev, {name: "file"})

    thread = threading.Thread(target=make)
    thread.start()
    while thread.is_alive():
        scanner.scan()
    thread.join()
    assert set(names) <= set(scanner.scan()[0].entries)


def names_that_flap(node: Node, change: Callable[[], Any], dev: Path | None = None, full: bool = False) -> list[str]:
    """Which names the scanner says stand for something else after CHANGE, at a FULL look or the usual one."""
    scanner = sdm.Scanner(str(dev or node.dev))
    scanner.scan()
    settle(scanner)
    before, _ = scanner.scan()
    change()
    after, flapped = scanner.scan(full)
    for path in flapped:
        assert after.entries[path].serial != before.entries[path].serial
    for path in set(before.entries) & set(after.entries) - set(flapped):
        assert after.entries[path] == before.entries[path]
    assert scanner.scan()[1] == []
    return sorted(flapped)


def test_a_name_that_stands_for_something_else_is_noticed(node: Node) -> None:
    build(node.dev, {"l": "-> f", "f": "file", "g": "file", "h": "file", "d/x": "file"})

    def change() -> None:
        node.link("l", "g")
        (node.dev / "h").rename(node.dev / "g")
        (node.dev / "f").unlink()
        os.mkfifo(node.dev / "f")

    assert names_that_flap(node, change) == ["f", "g", "l"]


def test_folders_that_were_swapped_are_noticed_with_all_that_is_in_them(node: Node) -> None:
    build(node.dev, {"a/x": "file", "a/s/y": "file", "b/x": "file", "b/only": "file", "c/x": "file"})

    def change() -> None:
        (node.dev / "a").rename(node.root / "was-a")
        (node.dev / "b").rename(node.dev / "a")
        (node.root / "was-a").rename(node.dev / "b")

    assert names_that_flap(node, change) == ["a", "a/x", "b", "b/x"]
    found, _ = sdm.Scanner(str(node.dev)).scan()
    assert {"a/only", "b/s/y"} <= set(found.entries)


@needs_root
def test_a_node_made_anew_between_two_polls_is_noticed(node: Node) -> None:
    build(
        node.dev, {"other": "char", "same": "char 240:1", "number": "char 240:2", "kind": "char 240:3", "moved": "char"}
    )

    def change() -> None:
        for path, told in {"same": "char 240:1", "number": "char 240:4", "kind": "block 240:3"}.items():
            node.unplug(path)
            build(node.dev, {path: told})
        build(node.dev, {"new": "char 240:9"})
        (node.dev / "new").rename(node.dev / "moved")

    assert names_that_flap(node, change) == ["kind", "moved", "number", "same"]


@needs_root
def test_a_node_that_udev_touches_is_the_same_still(node: Node) -> None:
    build(node.dev, {"a": "char", "b": "char"})

    def touch() -> None:
        os.chown(node.dev / "a", 0, 6)
        (node.dev / "a").chmod(0o660)
        os.utime(node.dev / "a")

    assert names_that_flap(node, touch) == []
    assert names_that_flap(node, touch, full=True) == []


@needs_root
def test_in_memory_even_a_touch_of_all_and_a_new_node_are_told_from_one_made_anew(node: Node) -> None:
    """As "udevadm trigger" does it while something is plugged in. tmpfs and devtmpfs never use an inode twice."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or sdm.reuses_inodes(shm.stat().st_dev):
        pytest.skip("/dev/shm is no tmpfs here")
    with tempfile.TemporaryDirectory(prefix="sdm-", dir=shm) as name:
        dev = Path(name)
        build(dev, {"a": "char 240:1", "b": "char 240:2"})

        def change() -> None:
            os.utime(dev / "a")
            os.utime(dev / "b")
            build(dev, {"c": "char 240:3"})

        assert names_that_flap(node, change, dev) == []

        def replug() -> None:
            (dev / "a").unlink()
            build(dev, {"a": "char 240:1"})

        assert names_that_flap(node, replug, dev) == ["a"]


def test_which_file_systems_use_an_inode_number_again() -> None:
    assert sdm.reuses_inodes(os.makedev(0, 0xFFFFF))  # none has this number: not known
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    types = {tuple(map(int, fields[2].split(":"))): fields[fields.index("-") + 1] for fields in mounts}
    assert types
    for (major, minor), kind in types.items():
        assert sdm.reuses_inodes(os.makedev(major, minor)) == (kind not in ("devtmpfs", "tmpfs"))


def test_a_folder_that_goes_takes_what_is_in_it_along(node: Node) -> None:
    build(node.dev, {"a/b/f": "file", "g": "file"})
    scanner = sdm.Scanner(str(node.dev))
    assert "a/b/f" in scanner.scan()[0].entries
    shutil.rmtree(node.dev / "a")
    found, flapped = scanner.scan()
    assert set(found.entries) == {"", "g"} and not flapped
    build(node.dev, {"a/b/f": "file"})
    assert "a/b/f" in scanner.scan()[0].entries


def test_a_folder_that_becomes_a_link_is_not_followed(node: Node) -> None:
    build(node.dev, {"a/f": "file"})
    build(node.root, {"out/secret": "file"})
    scanner = sdm.Scanner(str(node.dev))
    scanner.scan()
    (node.dev / "a").rename(node.root / "was-a")
    (node.dev / "a").symlink_to(node.root / "out")
    found, flapped = scanner.scan()
    assert "a/secret" not in found.entries and flapped == ["a"]


def test_a_folder_swapped_for_a_link_while_it_is_looked_at_is_not_listed(node: Node) -> None:
    build(node.dev, {"a/b/f": "file"})
    build(node.root, {"out/b/secret": "file"})
    (node.dev / "l").symlink_to(node.root / "out")
    (node.dev / "ll").symlink_to(node.root / "out/b")
    folder, root = (node.dev / "a/b").lstat(), node.dev.stat()
    assert list(sdm._read_folder(f"{node.dev}/a/b", folder, root)) == ["f"]
    for path in ("l/b", "ll", "a", "nowhere"):  # what stands there now is another one
        with pytest.raises(OSError):
            sdm._read_folder(f"{node.dev}/{path}", folder, root)


def test_who_may_write_into_a_folder_is_looked_at_once_a_minute(node: Node) -> None:
    """A chmod leaves no trace in the times of the folder above; a full look finds it."""
    build(node.dev, {"d/l": "-> f", "d/f": "file"})
    scanner = sdm.Scanner(str(node.dev))
    settle(scanner)
    (node.dev / "d").chmod(0o777)
    assert not scanner.scan()[0].entries["d"].shared
    assert scanner.scan(full=True)[0].entries["d"].shared


def test_a_full_look_comes_once_a_minute(node: Node, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    node.rules("- devicematch: x\n")
    side = sdm.DeviceSide(str(node.conf), str(node.dev), str(node.sys))
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    side.start()
    time.sleep(2 * sdm.FRESH_NS / 1e9)
    side.turn()
    assert sdm.FULL_LOOK_SECONDS == 60
    for seconds, listed in ((0, []), (59, []), (1, [""]), (0, []), (59.5, []), (1, [""])):
        clock[0] += seconds
        assert calls.of(side.turn) == listed
    assert calls.of(lambda: side.turn(reread=True)) == [""]


def test_without_descriptors_what_was_seen_still_counts(node: Node) -> None:
    build(node.dev, {"f": "file", "d/g": "file"})
    scanner = sdm.Scanner(str(node.dev))
    before = set(scanner.scan()[0].entries)
    build(node.dev, {"h": "file", "d/i": "file"})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        found, flapped = scanner.scan()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(found.entries) == before and not flapped
    assert set(scanner.scan()[0].entries) == before | {"h", "d/i"}


def test_a_folder_that_must_not_be_listed_is_told(node: Node) -> None:
    """Root has no such folder, but root without capabilities, as the daemon runs in its pod, has."""
    build(node.dev, {"d/f": "file", "e/f": "file"})
    node.rules("- devicematch: ^d$\n- devicematch: ^e$\n")
    without = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"] if os.geteuid() == 0 else []
    (node.dev / "d").chmod(0)
    command = [*without, sys.executable, str(SCRIPT), *node.options(), "--list", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    (node.dev / "d").chmod(0o755)
    assert {left["path"]: left["reason"] for left in json.loads(done.stdout)["left_out"]} == {
        "/dev/d": "a folder that cannot be listed (Permission denied), not a device",
        "/dev/e": "a folder that holds no device node",
    }


def test_a_dev_that_goes_and_comes_back(node: Node) -> None:
    build(node.dev, {"f": "file"})
    scanner = sdm.Scanner(str(node.dev))
    scanner.scan()
    node.dev.rename(node.root / "away")
    with pytest.raises(FileNotFoundError):
        scanner.scan()
    (node.root / "away").rename(node.dev)
    assert "f" in scanner.scan()[0].entries


# ---------------------------------------------------------------------------------------------------------------------
# A path that changes between a look and an Allocate
# ---------------------------------------------------------------------------------------------------------------------


class Swapping:
    """Does CHANGES over and over, in a thread, while the block runs."""

    def __init__(self, *changes: Callable[[], Any]) -> None:
        self._changes = changes
        self._is_over = False
        self._thread = threading.Thread(target=self._run)
        self.rounds = 0
        self.error: BaseException | None = None

    def _run(self) -> None:
        try:
            while not self._is_over:
                for change in self._changes:
                    change()
                self.rounds += 1
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Swapping:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()
        assert self.error is None
        assert self.rounds > 0


def tries(least: int, is_enough: Callable[[], bool]) -> Iterator[int]:
    """At LEAST so many, and more until it IS_ENOUGH, but not for ever."""
    give_up = time.monotonic() + PATIENCE
    for number in itertools.count():
        if number >= least and (is_enough() or time.monotonic() > give_up):
            return
        yield number


def offered(conf: str, snapshot: sdm.Snapshot, sys_dir: str = "/nowhere", gpus: Sequence[str] = ()) -> sdm.Plan:
    """The plan of a first look."""
    matcher = sdm.Matcher(sdm.parse_rules(conf))
    sightings, left_out = sdm.sight({}, snapshot, gpus, matcher, "/dev", 0.0)
    return sdm.make_plan(sightings, left_out, snapshot, sdm.Sysfs(sys_dir), matcher, "/dev")


def granted(resource: sdm.Resource, dev: Path) -> str:
    """The host path that a container with the first slot of RESOURCE is given now, or the reason why none."""
    try:
        with sdm.LiveTree(str(dev)) as tree:
            given = sdm.grant(resource, [sdm.slots_of(resource)[0].id], tree, str(dev))
    except sdm.Refused as error:
        assert error.code == "UNAVAILABLE"
        return str(error)
    return " ".join(spec.host for spec in given.specs)


@needs_root
def test_a_link_that_is_swapped_again_and_again_is_resolved_inside_dev_or_refused(node: Node) -> None:
    build(node.dev, {"one/a": "char", "two/b": "char", "cam": "-> one/a"})
    build(node.root, {"outside/b": "char"})
    device = offered("- devicematch: ^cam$\n", snapshot_of({"one/a": "char", "cam": "-> one/a"})).resources["cam"]
    targets = ["one/a", "../outside/b", "two/b", "/etc/passwd", "one", "two/none", f"{node.root}/outside/b", "cam"]
    good = {"/dev/one/a", "/dev/two/b"}
    bad = {f"/dev/cam: a link {told}" for told in ("that leaves /dev", "to /etc/passwd, which leaves /dev")}
    seen = set()
    with Swapping(*(lambda target=target: node.link("cam", target) for target in targets)):
        for _ in tries(3000, lambda: good | bad <= seen):
            seen.add(granted(device, node.dev))
    assert good | bad <= seen
    assert all(told.startswith("/dev/cam: ") for told in seen - good)


@needs_root
def test_a_folder_that_is_swapped_for_a_link_leads_nowhere_else(node: Node) -> None:
    build(node.dev, {"d/n": "char", "d/deep/n": "char", "other/n": "char"})
    build(node.root, {"outside/n": "char", "outside/deep/n": "char", "outside/stolen": "char"})
    conf = "- devicematch: ^d/n$\n- devicematch: ^d/deep/n$\n- devicematch: ^d$\n"
    plan = offered(conf, snapshot_of({"d/n": "char", "d/deep/n": "char"}))
    assert set(plan.resources) == {"d_n", "d_deep_n", "d"}

    def swap() -> None:
        (node.dev / "d").rename(node.root / "d")
        (node.dev / "d").symlink_to(node.root / "outside")

    def swap_back() -> None:
        (node.dev / "d").unlink()
        (node.root / "d").rename(node.dev / "d")

    hosts = {"d_n": "/dev/d/n", "d_deep_n": "/dev/d/deep/n", "d": "/dev/d/deep/n /dev/d/n"}
    seen: dict[str, set[str]] = {name: set() for name in hosts}
    with Swapping(swap, swap_back):
        for _ in tries(1000, lambda: all(len(told) > 1 and hosts[name] in told for name, told in seen.items())):
            for name, found in plan.resources.items():
                seen[name].add(granted(found, node.dev))
    for name, told in seen.items():
        assert hosts[name] in told and len(told) > 1
        told.remove(hosts[name])
        assert all(re.search(": (it is gone|a link to /|a folder that holds no)", reason) for reason in told)


def test_the_machines_own_dev_is_not_reached_through_a_folder_that_is_swapped(node: Node) -> None:
    build(node.dev, {"d/null": "file"})
    away = os.path.relpath("/dev", os.path.realpath(node.dev))

    def swap() -> None:
        (node.dev / "d").rename(node.root / "d")
        (node.dev / "d").symlink_to(away)

    def swap_back() -> None:
        (node.dev / "d").unlink()
        (node.root / "d").rename(node.dev / "d")

    wanted = {"a plain file, not a device", "a link that leaves /dev"}
    seen = set()
    with Swapping(swap, swap_back):
        for _ in tries(3000, lambda: wanted <= seen):
            with sdm.LiveTree(str(node.dev)) as tree:
                found = outcome(tree, "d/null", str(node.dev))
                assert isinstance(found, str), found
                seen.add(found)
    assert wanted <= seen


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

KUBELETS = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")  # KUBELET.md, 5


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("video0", "video0"),
        ("net/tun", "net_tun"),
        ("spidev0.0", "spidev0_0"),
        ("i2c-1", "i2c-1"),
        ("serial/by-id/usb-X_Y-if00-port0", "serial_by-id_usb-X_Y-if00-port0"),
        ("a:b@c d\n", "a_b_c_d"),
        ("_-_x-_-", "x"),
        ("ä/ß", ""),
        ("été", "t"),
        ("...", ""),
        ("-", ""),
        ("n" * 63, "n" * 63),
        ("n" * 64, "n" * 54 + "-" + hashlib.sha256(b"n" * 64).hexdigest()[:8]),
        ("_" + "n" * 63 + "-", "n" * 63),
        ("d/" * 40, ("d_" * 27) + "-" + hashlib.sha256(b"d/" * 40).hexdigest()[:8]),
        ("é" + "n" * 70, "n" * 54 + "-" + hashlib.sha256(("é" + "n" * 70).encode()).hexdigest()[:8]),
    ],
)
def test_how_a_path_names_its_resource(path: str, name: str) -> None:
    assert sdm.resource_name(path) == name


@given(st.text(max_size=200))
def test_every_name_is_one_that_kubelet_takes(path: str) -> None:
    name = sdm.resource_name(path)
    assert name == "" or KUBELETS.fullmatch(name)
    assert bool(name) == bool(re.search("[A-Za-z0-9]", path))


def listed(plan: sdm.Plan) -> dict[str, list[str]]:
    """Path (or what stands for it) of each device, by resource."""
    return {name: [device.path for device in found.devices] for name, found in plan.resources.items()}


def left(plan: sdm.Plan) -> dict[str, str]:
    return {found.path: found.reason for found in plan.left_out}


def test_of_two_paths_with_one_name_the_first_in_sorted_order_has_it() -> None:
    tree = {"a_b": "char", "a b": "char", "a/b": "char", "a.b": "char"}
    plan = offered("- devicematch: ^a.b$\n", snapshot_of(tree))
    assert listed(plan) == {"a_b": ["a b"]}  # " " < "." < "/" < "_"
    assert left(plan) == dict.fromkeys(("a.b", "a/b", "a_b"), "its resource's name a_b is taken by /dev/a b")


def test_a_path_without_a_letter_or_digit_is_left_out() -> None:
    plan = offered("- devicematch: ^[._-]*$\n", snapshot_of({"...": "char", "_": "char", "._a": "char"}))
    assert plan.resources == {}
    assert left(plan) == dict.fromkeys(("...", "_"), "no letter or digit is left to name a resource by")


def test_the_last_rule_that_names_a_device_counts() -> None:
    conf = "- devicematch: ^video\n  nummaxdevices: 2\n- devicematch: ^video1\n  nummaxdevices: 3\n- devicematch: x\n"
    plan = offered(conf, snapshot_of({"video0": "char", "video1": "char", "video10": "char"}))
    slots = {name: (found.devices[0].slots, found.devices[0].line) for name, found in plan.resources.items()}
    assert slots == {"video0": (2, 1), "video1": (3, 3), "video10": (3, 3)}
    assert [rule.pattern for rule in plan.unused] == ["x"]


def test_rules_on_one_line_are_told_apart() -> None:
    plan = offered("[{devicematch: a}, {devicematch: b, nummaxdevices: 2}]\n", snapshot_of({"b": "char"}))
    assert listed(plan) == {"b": ["b"]} and [rule.pattern for rule in plan.unused] == ["a"]


def test_a_rule_that_only_names_what_is_no_device_is_not_unused() -> None:
    plan = offered("- devicematch: ^log$\n", snapshot_of({"log": "socket"}))
    assert plan.unused == () and left(plan) == {"log": "a socket, not a device"}


@pytest.mark.parametrize("slots", [0, 1, 10_000])
def test_slots_are_numbered_from_0(slots: int) -> None:
    plan = offered(f"- devicematch: a\n  nummaxdevices: {slots}\n", snapshot_of({"a": "char"}))
    assert [slot.id for slot in sdm.slots_of(plan.resources["a"])] == [str(number) for number in range(slots)]


@needs_root
def test_odd_names_are_shown_without_harm(node: Node) -> None:
    """Names with line breaks, escapes and bytes that are no UTF-8: neither --list nor the log lets them act."""
    for name in ("cam\n\x1b[31m0", "cam\udcff", "cam\u202e1"):
        build(node.dev, {name: "char"})
    node.rules("- devicematch: ^cam\n")
    for more in (["--list"], ["--list", "--json"], ["--dry-run"]):
        done = node.run(*more)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout and "\u202e" not in done.stdout
    text = node.run("--list").stdout
    assert r"/dev/cam\n\x1b[31m0" in text
    assert re.search(r"1 +/dev/cam\\udcff +the name /dev/cam\\udcff is not UTF-8", text)
    for path in node.dev.iterdir():
        path.unlink()
    (node.dev / "cam\n\x1b[31m2").touch()
    done = node.run("--dry-run")
    assert done.returncode == 1 and r"/dev/cam\n\x1b[31m2: a plain file, not a device" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Sysfs
# ---------------------------------------------------------------------------------------------------------------------


class Board:
    """A made-up board: /dev as plain data, or as root as real nodes; /sys as real files."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.tree: dict[str, str] = {}

    def has(
        self, path: str, number: str, folder: str, attributes: Mapping[str, str] | None = None, kind: str = "char"
    ) -> None:
        """A node PATH with NUMBER, whose folder in /sys/devices has these ATTRIBUTES."""
        self.tree[path] = f"{kind} {number}"
        self.device(folder, attributes or {})
        link = self.node.sys / "dev" / kind / number
        link.unlink(missing_ok=True)
        link.symlink_to(f"../../devices/{folder}")

    def device(self, folder: str, attributes: Mapping[str, str]) -> None:
        """A folder in /sys/devices with ATTRIBUTES; those with "-> " are links."""
        place = self.node.sys / "devices" / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, value in attributes.items():
            if value.startswith("-> "):
                (place / name).symlink_to(value[3:])
            else:
                (place / name).write_text(value + "\n")

    def plan(self, conf: str, gpus: Sequence[str] = ()) -> sdm.Plan:
        return offered(conf, snapshot_of(self.tree), str(self.node.sys), gpus)


@pytest.fixture
def board(node: Node) -> Board:
    return Board(node)


def usb_serial(
    board: Board, tty: str, number: str, port: str, vendor: str, product: str, told: str, serial: str
) -> None:
    """A serial adapter in a USB port of a Raspberry Pi 4, as its sysfs shows it."""
    usb = f"platform/scb/fd500000.pcie/pci0000:00/0000:00:00.0/0000:01:00.0/usb1/1-1/{port}"
    board.device(
        "platform/scb/fd500000.pcie/pci0000:00/0000:00:00.0/0000:01:00.0/usb1", {"idVendor": "1d6b", "serial": "x"}
    )
    board.device(
        usb,
        {"idVendor": vendor, "idProduct": product, "product": told, "serial": serial, "bcdDevice": "0100"},
    )
    is_acm = tty.startswith("ttyACM")
    driver = "cdc_acm" if is_acm else "cp210x"
    board.device(
        f"{usb}/{port}:1.0", {"bInterfaceNumber": "00", "driver": f"-> ../../../../../../../../../bus/{driver}"}
    )
    inner = f"{usb}/{port}:1.0" + ("" if is_acm else f"/{tty}")
    board.has(tty, number, f"{inner}/tty/{tty}", {"dev": number})


def test_attributes_hold_for_the_device_or_one_and_the_same_of_its_parents(board: Board) -> None:
    usb_serial(board, "ttyUSB0", "188:0", "1-1.2", "10c4", "ea60", "CP2102 USB to UART Bridge Controller", "A5XK3RJT")
    for attributes, holds in (
        ('{idVendor: "10c4"}', True),
        ('{idVendor: "10c"}', False),  # whole
        ('{idVendor: "10c4", idProduct: ea60, serial: ".*A5XK.*"}', True),
        ('{idVendor: "1d6b", serial: x}', True),
        ('{idVendor: "1d6b", serial: "A5XK3RJT"}', False),  # each holds, but not in one folder
        ('{idVendor: "10c4", bInterfaceNumber: "00"}', False),
        ("{driver: cp210x}", True),
        ('{dev: "188:0"}', True),
        ("{nothing: .*}", False),
    ):
        plan = board.plan(f"- devicematch: ^ttyUSB\n  attributes: {attributes}\n")
        assert bool(plan.resources) == holds, attributes


def test_a_rule_whose_attributes_do_not_hold_leaves_the_device_to_an_earlier_one(board: Board) -> None:
    usb_serial(board, "ttyUSB0", "188:0", "1-1.2", "10c4", "ea60", "CP2102", "0001")
    usb_serial(board, "ttyUSB1", "188:1", "1-1.3", "1a86", "7523", "CH340", "")
    conf = """
- devicematch: ^ttyUSB
  nummaxdevices: 2
- devicematch: ^ttyUSB
  nummaxdevices: 3
  attributes: {idVendor: "10c4", nowhere: x}
- devicematch: ^ttyUSB
  nummaxdevices: 4
  attributes: {idVendor: "10c4"}
"""
    plan = board.plan(conf)
    assert {name: found.devices[0].line for name, found in plan.resources.items()} == {"ttyUSB0": 7, "ttyUSB1": 2}
    assert [(found.path, found.line, found.reason) for found in plan.left_out] == [
        (
            "ttyUSB1",
            4,
            'its idVendor is "1a86" or "1d6b" (asked for: 10c4); its nowhere is not there (asked for: x)',
        ),
        ("ttyUSB1", 7, 'its idVendor is "1a86" or "1d6b" (asked for: 10c4)'),
    ]
    assert [rule.line for rule in plan.unused] == []


def test_block_devices_have_attributes_too(board: Board) -> None:
    board.device("pci0/usb2/2-1", {"serial": "disk"})
    board.has("sda1", "8:1", "pci0/usb2/2-1/host0/block/sda/sda1", {"partition": "1"}, kind="block")
    board.has("tty8", "8:1", "virtual/tty8", {"serial": "no"})
    assert set(board.plan('- devicematch: .\n  attributes: {serial: "disk"}\n').resources) == {"sda1"}


def test_what_sysfs_does_not_know_has_no_attributes(board: Board) -> None:
    board.tree["a"] = "char 1:1"
    (board.node.sys / "dev/char/1:2").symlink_to("../../../outside")
    (board.node.root / "outside/deep").mkdir(parents=True)
    board.tree["b"] = "char 1:2"
    (board.node.root / "name").write_text("above sysfs\n")
    (board.node.sys / "devices/name").write_text("above all devices\n")
    board.has("c", "1:3", "virtual/c")
    plan = board.plan("- devicematch: ^.$\n  attributes: {name: .*}\n")
    assert plan.resources == {} and left(plan) == dict.fromkeys("abc", "its name is not there (asked for: .*)")


def test_numa_nodes_are_looked_for_upwards(board: Board) -> None:
    board.device("pci0000:80", {"numa_node": "1"})
    board.device("pci0000:80/gpu", {"numa_node": "-1"})
    board.has("nvidia0", "195:0", "pci0000:80/gpu/drm")
    board.device("pci0000:00", {"numa_node": "0"})
    board.has("nvidia1", "195:1", "pci0000:00/gpu", {"numa_node": "2"})
    board.has("snd/a", "116:1", "pci0000:00/a")
    board.has("snd/b", "116:2", "pci0000:80/b")
    board.has("snd/c", "116:3", "pci0000:80/c")
    board.has("none", "1:1", "virtual/none", {"numa_node": "-1"})
    board.has("odd", "1:2", "virtual/odd", {"numa_node": "\u00b2"})
    board.tree["unknown"] = "char 1:4"
    plan = board.plan("- devicematch: ^(nvidia.|snd|none|odd|unknown)$\n")
    assert {name: found.devices[0].numa for name, found in plan.resources.items()} == {
        "nvidia0": (1,),
        "nvidia1": (2,),
        "snd": (0, 1),
        "none": (),
        "odd": (),
        "unknown": (),
    }
    assert sdm.slots_of(plan.resources["snd"]) == (sdm.Slot("0", True, (0, 1)),)


class Reads:
    """Counts the reads of sysfs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sys_dir: Path) -> None:
        self.paths: list[str] = []
        real = os.open

        def opened(path: Any, *rest: Any, **more: Any) -> int:
            if str(path).startswith(str(sys_dir)):
                self.paths.append(os.path.relpath(path, sys_dir))
            return real(path, *rest, **more)

        monkeypatch.setattr(os, "open", opened)

    def of(self, work: Callable[[], Any]) -> int:
        self.paths.clear()
        work()
        return len(self.paths)


class Clock:
    """A monotonic clock that stands still until told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def device_side(node: Node, conf: str) -> sdm.DeviceSide:
    node.rules(conf)
    return sdm.DeviceSide(str(node.conf), str(node.dev), str(node.sys))


STICK = '- devicematch: ^stick\n  attributes: {idVendor: "10c4", idProduct: ea60}\n'


@needs_root
def test_sysfs_is_read_when_a_device_appears_and_not_on_every_poll(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    for name in ("stick0", "stick1", "stick2"):
        node.sysfs(f"usb1/{name}", {"idVendor": "10c4", "idProduct": "ea60"}, node.plug(name))
    node.sysfs("usb1/other", {"idVendor": "1a86"}, node.plug("stick3"))
    side = device_side(node, STICK)
    reads = Reads(monkeypatch, node.sys)
    assert reads.of(side.start) > 0
    assert set(side.plan.resources) == {"stick0", "stick1", "stick2"}
    for _ in range(4):  # what stick3 lacks may still come; nothing else is read again
        clock.now += 1
        assert reads.of(side.turn) > 0
        assert not [path for path in reads.paths if "stick" in path]
    clock.now += 2
    side.turn()
    for _ in range(5):
        clock.now += 1
        assert reads.of(side.turn) == 0
    node.plug("unrelated")
    assert reads.of(side.turn) == 0
    node.sysfs("usb1/new", {"idVendor": "10c4", "idProduct": "ea60"}, node.plug("stick4"))
    assert reads.of(side.turn) > 0
    assert not [path for path in reads.paths if "stick" in path or "other" in path]
    assert "stick4" in side.plan.resources


@needs_root
@pytest.mark.parametrize("seconds", [0.0, 4.0])
def test_attributes_that_come_after_the_node_are_found(
    node: Node, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    clock = Clock(monkeypatch)
    side = device_side(node, STICK)
    side.start()
    stick = node.plug("stick0")
    side.turn()
    assert side.plan.resources == {}
    clock.now += seconds
    node.sysfs("usb1/1-1", {"idVendor": "10c4", "idProduct": "ea60"}, stick)
    assert len(side.turn()) == 1
    assert set(side.plan.resources) == {"stick0"}
    assert left(side.plan) == {}


@needs_root
def test_attributes_that_come_much_later_are_found_at_a_full_look(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stick = node.plug("stick0")
    side = device_side(node, STICK)
    side.start()
    clock.now += 10
    side.turn()
    node.sysfs("usb1/1-1", {"idVendor": "10c4", "idProduct": "ea60"}, stick)
    reads = Reads(monkeypatch, node.sys)
    for _ in range(40):
        clock.now += 1
        assert reads.of(side.turn) == 0  # not on every poll for ever
    clock.now += 20
    side.turn()
    assert set(side.plan.resources) == {"stick0"}


@needs_root
def test_another_device_under_the_same_name_and_number_is_asked_for_its_own_attributes(node: Node) -> None:
    stick = node.plug("stick0", minor=7)
    node.sysfs("usb1/1-1", {"idVendor": "10c4", "idProduct": "ea60"}, stick)
    side = device_side(node, STICK)
    side.start()
    assert not side.plan.resources["stick0"].devices[0].problem
    node.unplug("stick0")
    node.sysfs("usb1/1-2", {"idVendor": "1a86", "idProduct": "7523"}, node.plug("stick0", minor=7))
    plans = side.turn()
    assert [plan.resources.get("stick0") and plan.resources["stick0"].devices[0].problem for plan in plans] == [
        "it is gone",
        None,
    ]
    assert "1a86" in left(side.plan)["stick0"]


@needs_root
def test_a_device_that_was_chosen_by_its_attributes_is_not_granted_when_another_stands_there(node: Node) -> None:
    for number, name in enumerate(("stick0", "bus/a", "bus/b")):
        node.sysfs(f"usb1/{number}", {"idVendor": "10c4", "idProduct": "ea60"}, node.plug(name))
    side = device_side(node, STICK + STICK.replace("^stick", "^bus$"))
    side.start()
    found = side.plan.resources
    assert granted(found["stick0"], node.dev) == "/dev/stick0"
    assert granted(found["bus"], node.dev) == "/dev/bus/a /dev/bus/b"
    node.plug("new").rename(node.dev / "stick0")
    node.plug("bus/c")
    for name in ("stick0", "bus"):
        assert granted(found[name], node.dev) == f"/dev/{name}: another device stands there since just now"


def test_what_sysfs_was_asked_is_forgotten_with_the_node(board: Board) -> None:
    usb_serial(board, "ttyUSB0", "188:0", "1-1.2", "10c4", "ea60", "CP2102", "0001")
    (rule,) = sdm.parse_rules('- devicematch: x\n  attributes: {idVendor: "10c4"}\n')
    sysfs = sdm.Sysfs(str(board.node.sys))
    entry = snapshot_of(board.tree).entries["ttyUSB0"]
    for serial in range(1000):
        assert not sysfs.misfit(rule.attributes, sdm.DeviceNode("ttyUSB0", "", entry._replace(serial=serial)))
        sysfs.numa(sdm.DeviceNode("ttyUSB0", "", entry._replace(serial=serial)))
        sysfs.forget([serial])
    assert max(len(vars(sysfs)[name]) for name in ("_numa", "_misfits", "_asked")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# --list --attributes
# ---------------------------------------------------------------------------------------------------------------------


def plug_board(board: Board) -> None:
    build(board.node.dev, board.tree)


@needs_root
def test_the_attributes_of_a_device_are_shown_to_write_a_rule_from(board: Board) -> None:
    usb_serial(board, "ttyUSB0", "188:0", "1-1.2", "10c4", "ea60", "It's a CP2102 (v1.0)", "A5XK+3RJT")
    usb = "platform/scb/fd500000.pcie/pci0000:00/0000:00:00.0/0000:01:00.0/usb1/1-1/1-1.2"
    place = board.node.sys / "devices" / usb
    board.device(usb, {"on": "a word", "big": "x" * 5000})
    (place / "descriptors").write_bytes(b"\x12\x01\x00\x02\xff\xfe")
    (place / "bytes").write_bytes(b"\xff\xfe\n")
    (place / "two").write_text("lines\nare two\n")
    (place / "empty").write_text("\n")
    (place / "secret").write_text("not to be read\n")
    (place / "secret").chmod(0o200)
    (place / "power").mkdir()
    board.tree["serial/by-id/usb-x"] = "-> ../../ttyUSB0"
    plug_board(board)
    shown = board.node.run("--list", "--attributes", "/dev/ttyUSB0").stdout
    for path in ("ttyUSB0", f"{board.node.dev}/ttyUSB0", "/dev//./ttyUSB0"):
        assert board.node.run("--list", "--attributes", path).stdout == shown
    assert "- devicematch: '^ttyUSB0$'\n" in shown
    top = os.path.realpath(board.node.sys)
    block = shown.partition(f"# {top}/devices/{usb}\n")[2].partition("\n\n")[0]
    assert block.splitlines() == [
        "  attributes:",
        "    bcdDevice: '0100'",
        "    idProduct: 'ea60'",
        "    idVendor: '10c4'",
        "    'on': 'a word'",
        r"    product: 'It''s a CP2102 \(v1\.0\)'",
        r"    serial: 'A5XK\+3RJT'",
    ]
    assert (
        f"# {top}/devices/{usb}/1-1.2:1.0\n  attributes:\n    bInterfaceNumber: '00'\n    driver: 'cp210x'\n" in shown
    )
    by_link = board.node.run("--list", "--attributes", "serial/by-id/usb-x").stdout
    assert by_link == shown.replace("^ttyUSB0$", "^serial/by-id/usb-x$")
    document = json.loads(board.node.run("--list", "--json", "--attributes", "ttyUSB0").stdout)
    assert document[1]["attributes"]["product"] == "It's a CP2102 (v1.0)"


@needs_root
def test_each_block_of_attributes_is_a_rule_that_holds(board: Board) -> None:
    usb_serial(board, "ttyUSB0", "188:0", "1-1.2", "10c4", "ea60", "It's: {a} #CP2102 [v1.0]^$|*+?", "  \\\"'null")
    plug_board(board)
    head, *blocks = board.node.run("--list", "--attributes", "ttyUSB0").stdout.split("\n\n")
    assert len(blocks) == 3
    for block in blocks:
        plan = board.plan(f"{head}\n{block}\n")
        assert listed(plan) == {"ttyUSB0": ["ttyUSB0"]}


FILE_NAMES = st.text(st.characters(exclude_characters="/\0"), min_size=1).filter(lambda name: name not in (".", ".."))


@given(st.dictionaries(FILE_NAMES, st.text(min_size=1), min_size=1, max_size=3), FILE_NAMES)
@example({"name": "value"}, "cam\n\x1b\U00018d090")
def test_what_is_shown_of_attributes_means_just_them(attributes: Mapping[str, str], path: str) -> None:
    telling = {name: value for name, value in attributes.items() if value.isprintable() and name.isprintable()}
    text = sdm.render_attributes(path, [("/sys/devices/x", telling)] if telling else [])
    (rule,) = sdm.parse_rules(text)
    assert rule.match.search(path) and not rule.match.search(path + "x") and not rule.match.search("x" + path)
    assert {found.name for found in rule.attributes} == set(telling)
    for found in rule.attributes:
        assert found.match.fullmatch(telling[found.name]) and not found.match.fullmatch(telling[found.name] + "x")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nothing0", "nothing0 is not in {dev}; give a path such as /dev/video0 or video0"),
        ("/etc/passwd", "/etc/passwd is not in {dev}; give a path such as /dev/video0 or video0"),
        ("../dev/f", "../dev/f is not in {dev}; give a path such as /dev/video0 or video0"),
        ("/dev", "/dev is not in {dev}; give a path such as /dev/video0 or video0"),
        ("", " is not in {dev}; give a path such as /dev/video0 or video0"),
        ("f", "/dev/f is no device: a plain file, not a device"),
        ("d", "/dev/d is no device: a folder that holds no device node"),
        ("loop", "/dev/loop is no device: a link that leads in a circle"),
    ],
)
def test_what_has_no_attributes_is_said_in_one_sentence(node: Node, path: str, told: str) -> None:
    build(node.dev, {"f": "file", "d": "folder", "loop": "-> loop"})
    done = node.run("--list", "--attributes", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"smarter_device_manager.py: {told.format(dev=node.dev)}\n"


@needs_root
def test_a_folder_and_what_sysfs_does_not_know_have_no_attributes_to_show(node: Node) -> None:
    build(node.dev, {"snd/a": "char", "snd/b": "block 8:3"})
    done = node.run("--list", "--attributes", "snd")
    assert "/dev/snd is a folder; name one of its nodes: /dev/snd/a, /dev/snd/b\n" in done.stderr
    done = node.run("--list", "--attributes", "/dev/snd/b")
    assert (
        f"{node.sys} knows nothing of /dev/snd/b (block device 8:3); --sys-dir names the host's /sys\n" in done.stderr
    )


def test_attributes_go_with_list(node: Node) -> None:
    done = node.run("--attributes", "video0")
    assert done.returncode == 2 and "--attributes goes with --list" in done.stderr


def test_attributes_are_shown_by_a_bare_python(node: Node) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-I", str(SCRIPT), "--list", "--attributes", "/dev/null"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "knows nothing" in done.stderr:
        pytest.skip("this machine's sysfs does not know /dev/null")
    assert done.returncode == 0 and "subsystem: 'mem'" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Plan: templates, companions, pools
# ---------------------------------------------------------------------------------------------------------------------

Given = Mapping[str, str]  # container path -> host path and, where they are not "rw", permissions


def at(*names: str) -> Given:
    """Nodes that a container sees where the host has them."""
    return {f"/dev/{name}": f"/dev/{name}" for name in names}


def given_to(found: sdm.Resource, tree: sdm.Tree, *ids: str) -> tuple[Given, Given]:
    """The nodes and the variables of a container with these slots of FOUND, the first one if none is named."""
    grant = sdm.grant(found, ids or [sdm.slots_of(found)[0].id], tree, "/dev")
    nodes = {
        spec.container: spec.host + ("" if spec.permissions == "rw" else f" {spec.permissions}") for spec in grant.specs
    }
    assert len(nodes) == len(grant.specs)
    return nodes, dict(grant.env)


def refused(found: sdm.Resource, tree: sdm.Tree, *ids: str) -> tuple[str, str]:
    with pytest.raises(sdm.Refused) as caught:
        sdm.grant(found, ids, tree, "/dev")
    return caught.value.code, str(caught.value)


def ids_of(found: sdm.Resource, healthy: bool = True) -> list[str]:
    return [slot.id for slot in sdm.slots_of(found) if slot.healthy == healthy]


SOUND = {"snd/pcmC1D0c": "char", "snd/controlC1": "char", "snd/timer": "char", "video0": "char", "cam": "-> video0"}


@pytest.mark.parametrize(
    ("rule", "nodes", "env"),
    [
        ("devicematch: ^video0$", {"/dev/video0": "/dev/video0"}, {}),
        ("devicematch: ^cam$", {"/dev/cam": "/dev/video0"}, {}),
        (
            "devicematch: ^snd$",
            {f"/dev/snd/{name}": f"/dev/snd/{name}" for name in ("controlC1", "pcmC1D0c", "timer")},
            {},
        ),
        ("{devicematch: ^video0$, permissions: r}", {"/dev/video0": "/dev/video0 r"}, {}),
        ("{devicematch: ^video0$, permissions: mwr}", {"/dev/video0": "/dev/video0 rwm"}, {}),
        (r"{devicematch: '^video([0-9])$', containerpath: '/dev/cam\1'}", {"/dev/cam0": "/dev/video0"}, {}),
        (r"{devicematch: ^video, containerpath: '/dev/c/\g<0>/x'}", {"/dev/c/video/x": "/dev/video0"}, {}),
        ("{devicematch: ^video0$, containerpath: /dev/x/}", {"/dev/x/video0": "/dev/video0"}, {}),
        ("{devicematch: ^cam$, containerpath: /dev/x/}", {"/dev/x/cam": "/dev/video0"}, {}),
        ("{devicematch: ^video0$, containerpath: /dev//x///y}", {"/dev/x/y": "/dev/video0"}, {}),
        (
            "{devicematch: ^snd$, containerpath: /dev/card}",
            {f"/dev/card/{name}": f"/dev/snd/{name}" for name in ("controlC1", "pcmC1D0c", "timer")},
            {},
        ),
        (
            r"{devicematch: 'pcmC(\d+)D0c$', containerpath: /dev/mic, with: ['snd/controlC\1', 'snd/timer?', 'none?']}",
            {
                f"/dev/{place}": f"/dev/snd/{name}"
                for place, name in (("mic", "pcmC1D0c"), ("snd/controlC1", "controlC1"), ("snd/timer", "timer"))
            },
            {},
        ),
        (
            r"{devicematch: 'pcmC(\d+)D0c$', containerpath: /dev/mic/, with: ['snd/controlC\1', cam], permissions: r}",
            {
                "/dev/mic/pcmC1D0c": "/dev/snd/pcmC1D0c r",
                "/dev/mic/controlC1": "/dev/snd/controlC1 r",
                "/dev/mic/cam": "/dev/video0 r",
            },
            {},
        ),
        (
            "{devicematch: ^video0$, with: [snd, video0, cam]}",
            {
                "/dev/video0": "/dev/video0",
                "/dev/cam": "/dev/video0",
                **{f"/dev/snd/{name}": f"/dev/snd/{name}" for name in ("controlC1", "pcmC1D0c", "timer")},
            },
            {},
        ),
        (
            r"{devicematch: '^vi(?P<kind>d|D)eo(\d)?', env: {A: '/dev/\g<0>', B: '\2\g<kind>x', C_1: plain}}",
            {"/dev/video0": "/dev/video0"},
            {"A": "/dev/video0", "B": "0dx", "C_1": "plain"},
        ),
    ],
)
def test_what_a_container_is_given(rule: str, nodes: Given, env: Given) -> None:
    snapshot = snapshot_of(SOUND)
    (found,) = offered(f"- {rule}\n", snapshot).resources.values()
    assert given_to(found, snapshot) == (nodes, env)
    assert {spec.container for spec in found.devices[0].specs} == set(nodes)  # as --list shows it


def test_resources_are_named_by_templates() -> None:
    snapshot = snapshot_of({"video0": "char", "video1": "char", "audio1": "char", "d/x": "char"})
    plan = offered(
        r"""
- {devicematch: '^(?P<kind>[a-z]+)([0-9])$', resource: 'my.\g<kind>s'}
- {devicematch: '^d/(.)(y)?$', resource: 'd \1\2'}
""",
        snapshot,
    )
    assert listed(plan) == {"d_x": ["d/x"], "my_audios": ["audio1"], "my_videos": ["video0", "video1"]}
    assert all(found.pool for found in plan.resources.values())


def test_a_place_in_the_container_must_be_one() -> None:
    snapshot = snapshot_of({"a": "char", "b.c": "char"})
    plan = offered(r"- {devicematch: '^(a)(.*)$', containerpath: '/dev/x/\2.'}" "\n", snapshot)
    assert left(plan) == {"a": 'its path in a container would be "/dev/x/."'}
    plan = offered(r"- {devicematch: '^a()$', containerpath: '/dev/\1/x'}" "\n", snapshot)
    assert given_to(plan.resources["a"], snapshot)[0] == {"/dev/x": "/dev/a"}
    plan = offered(r"- {devicematch: '^a()$', containerpath: '/dev/\1'}" "\n", snapshot)
    assert given_to(plan.resources["a"], snapshot)[0] == {"/dev/a": "/dev/a"}


def test_a_device_without_its_companions_is_unhealthy_until_they_come() -> None:
    conf = "- {devicematch: ^nvidia0$, with: [nvidiactl, 'nvidia-modeset?']}\n"
    matcher = sdm.Matcher(sdm.parse_rules(conf))
    sightings: sdm.Sightings = {}
    for tree, problem in (
        ({}, "it goes with /dev/nvidiactl: it is gone"),
        ({"nvidiactl": "file"}, "it goes with /dev/nvidiactl: a plain file, not a device"),
        (
            {"nvidiactl": "shared", "nvidiactl/x": "-> ../nvidia0"},
            "it goes with /dev/nvidiactl: a folder that holds no",
        ),
        ({"nvidiactl": "char"}, ""),
        ({"nvidiactl": "char", "nvidia-modeset": "char"}, ""),
        ({}, "it goes with /dev/nvidiactl: it is gone"),
    ):
        snapshot = snapshot_of({"nvidia0": "char", **tree})
        sightings, left_out = sdm.sight(sightings, snapshot, (), matcher, "/dev", 0.0)
        plan = sdm.make_plan(sightings, left_out, snapshot, sdm.Sysfs("/nowhere"), matcher, "/dev")
        device = plan.resources["nvidia0"].devices[0]
        assert device.problem.startswith(problem) and bool(device.problem) == bool(problem)
        assert ids_of(plan.resources["nvidia0"], not problem) == ["0"]
        if problem:
            code, told = refused(plan.resources["nvidia0"], snapshot, "0")
            assert code == "UNAVAILABLE" and told.startswith(f"/dev/nvidia0: {problem}")
        else:
            assert set(given_to(plan.resources["nvidia0"], snapshot)[0]) == {
                "/dev/nvidia0",
                *(f"/dev/{n}" for n in tree),
            }


def test_a_planted_companion_is_not_given() -> None:
    snapshot = snapshot_of({"a": "char", "sda": "block", "pub": "shared", "pub/b": "-> ../sda"})
    plan = offered("- {devicematch: ^a$, with: [pub/b]}\n", snapshot)
    assert "where others than root may make links" in plan.resources["a"].devices[0].problem
    plan = offered("- {devicematch: ^a$, with: ['pub/b?']}\n", snapshot)
    assert given_to(plan.resources["a"], snapshot)[0] == {"/dev/a": "/dev/a"}


def test_two_nodes_of_a_device_at_one_place_in_the_container_make_it_unhealthy() -> None:
    snapshot = snapshot_of({"a/x": "char", "b/x": "char"})
    plan = offered("- {devicematch: ^a/x$, containerpath: /dev/c/, with: [b/x]}\n", snapshot)
    assert plan.resources["a_x"].devices[0].problem == "/dev/a/x and /dev/b/x would both be /dev/c/x in the container"


CAMERAS = "- {devicematch: '^video[0-9]+$', resource: camera, nummaxdevices: 2}\n"


def test_the_slots_of_a_pool_name_their_device() -> None:
    tree = {"video0": "char", "video10": "char", "video2": "char"}
    (found,) = offered(CAMERAS, snapshot_of(tree)).resources.values()
    assert ids_of(found) == ["video0:0", "video0:1", "video10:0", "video10:1", "video2:0", "video2:1"]
    less = offered(CAMERAS, snapshot_of({"video2": "char", "video9": "char"})).resources["camera"]
    assert ids_of(less) == ["video2:0", "video2:1", "video9:0", "video9:1"]  # hot-plug and restart: the same IDs
    assert given_to(found, snapshot_of(tree), "video10:1")[0] == {"/dev/video10": "/dev/video10"}


def test_a_device_of_a_pool_that_goes_takes_only_its_own_slots_along() -> None:
    matcher = sdm.Matcher(sdm.parse_rules(CAMERAS))
    sightings: sdm.Sightings = {}
    for names in (("video0", "video1"), ("video1",)):
        snapshot = snapshot_of(dict.fromkeys(names, "char"))
        sightings, left_out = sdm.sight(sightings, snapshot, (), matcher, "/dev", 0.0)
    plan = sdm.make_plan(sightings, left_out, snapshot, sdm.Sysfs("/nowhere"), matcher, "/dev")
    assert ids_of(plan.resources["camera"], healthy=False) == ["video0:0", "video0:1"]
    assert ids_of(plan.resources["camera"]) == ["video1:0", "video1:1"]
    assert refused(plan.resources["camera"], snapshot, "video0:1") == ("UNAVAILABLE", "/dev/video0: it is gone")
    assert given_to(plan.resources["camera"], snapshot, "video1:1")[0] == {"/dev/video1": "/dev/video1"}


def test_what_is_no_id_of_a_pool_is_refused_by_name() -> None:
    snapshot = snapshot_of({"video0": "char"})
    found = offered(CAMERAS, snapshot).resources["camera"]
    for wrong in (
        "0",
        "video0",
        "video0:",
        "video0:2",
        "video0:00",
        "video0:-1",
        "video1:0",
        ":0",
        "/dev/video0:0",
        "video0:\u0661",
    ):
        assert refused(found, snapshot, "video0:0", wrong) == ("INVALID_ARGUMENT", f'no device ID "{wrong}"')
    own = offered("- devicematch: .\n", snapshot).resources["video0"]
    for wrong in ("1", "video0:0", ":0", "", "00", "0\n", "9" * 5000):
        assert refused(own, snapshot, wrong) == ("INVALID_ARGUMENT", f'no device ID "{wrong[: sdm.MOST_SHOWN]}"')


def test_several_devices_of_a_pool_in_one_container() -> None:
    snapshot = snapshot_of({"ttyACM1": "char", "ttyACM0": "char", "hub": "char"})
    rule = r"devicematch: '^ttyACM(\d)$', resource: esp, nummaxdevices: 3, with: [hub]"
    found = offered(f"- {{{rule}, env: {{PORTS: '/dev/\\g<0>', ALL: x}}}}\n", snapshot).resources["esp"]
    nodes, env = given_to(found, snapshot, "ttyACM1:0", "ttyACM0:2", "ttyACM1:2")
    assert nodes == at("ttyACM0", "ttyACM1", "hub")
    assert env == {"PORTS": "/dev/ttyACM0,/dev/ttyACM1", "ALL": "x"}


def test_two_devices_of_a_pool_at_one_place_in_a_container_are_refused() -> None:
    snapshot = snapshot_of({"ttyUSB0": "char", "ttyUSB1": "char"})
    conf = "- {devicematch: ^ttyUSB, resource: zigbee, containerpath: /dev/zigbee, nummaxdevices: 2}\n"
    found = offered(conf, snapshot).resources["zigbee"]
    told = "/dev/ttyUSB0 and /dev/ttyUSB1 would both be /dev/zigbee in the container"
    assert refused(found, snapshot, "ttyUSB1:0", "ttyUSB0:0") == ("FAILED_PRECONDITION", told)
    assert given_to(found, snapshot, "ttyUSB1:0", "ttyUSB1:1")[0] == {"/dev/zigbee": "/dev/ttyUSB1"}


def test_rules_share_a_pool_each_with_slots_and_paths_of_its_own() -> None:
    snapshot = snapshot_of({"ttyUSB0": "char", "ttyACM0": "char", "x": "char"})
    plan = offered(
        """
- {devicematch: ^ttyUSB, resource: stick, nummaxdevices: 2, containerpath: /dev/usb, permissions: r, env: {KIND: usb}}
- {devicematch: ^ttyACM, resource: stick, containerpath: /dev/acm/, env: {KIND: acm}}
- {devicematch: x, resource: stick, nummaxdevices: 0}
""",
        snapshot,
    )
    found = plan.resources["stick"]
    assert ids_of(found) == ["ttyACM0:0", "ttyUSB0:0", "ttyUSB0:1"]
    assert {device.path: device.line for device in found.devices} == {"ttyUSB0": 2, "ttyACM0": 3, "x": 4}
    assert given_to(found, snapshot, "ttyUSB0:0", "ttyACM0:0") == (
        {"/dev/usb": "/dev/ttyUSB0 r", "/dev/acm/ttyACM0": "/dev/ttyACM0"},
        {"KIND": "acm,usb"},
    )


def test_a_pool_with_the_name_of_a_device_that_is_plugged_in_later_is_an_error_with_both_lines() -> None:
    conf = "- devicematch: ^video[0-9]$\n- {devicematch: '^cam', resource: video1}\n"
    assert listed(offered(conf, snapshot_of({"video0": "char", "cam": "char"}))) == {
        "video0": ["video0"],
        "video1": ["cam"],
    }
    plan = offered(conf, snapshot_of({"video1": "char", "cam": "char"}))
    assert listed(plan) == {"video1": ["cam"]}
    (error,) = plan.clashes
    assert error.line == 2
    assert 'the pool "video1" has the name of the device /dev/video1, which line 1 offers' in str(error)
    assert left(plan) == {"video1": str(error)}


def test_a_pool_with_the_name_of_a_device_that_a_rule_names_is_an_error_wherever_that_is() -> None:
    conf = "- {devicematch: ^cam, resource: net tun}\n- devicematch: x\n- devicematch: ^net/tun$\n"
    with pytest.raises(sdm.ConfigError) as caught:
        sdm.parse_rules(conf)
    assert caught.value.line == 1
    assert 'the pool "net_tun" has the name of the device /dev/net/tun, which line 3 offers' in caught.value.message
    sdm.parse_rules(conf + "- {devicematch: tun$, resource: tunnel}\n")  # so the last rule that names it is another


@needs_root
def test_such_a_conf_is_refused_at_the_start_and_told_when_it_happens_later(node: Node) -> None:
    conf = "- devicematch: ^video[0-9]$\n- {devicematch: '^cam', resource: video1}\n"
    build(node.dev, {"cam": "char"})
    side = device_side(node, conf)
    side.start()
    assert listed(side.plan) == {"video1": ["cam"]}
    build(node.dev, {"video1": "char"})
    side.turn()
    assert listed(side.plan) == {"video1": ["cam"]}
    assert "which line 1 offers" in left(side.plan)["video1"]
    done = node.run("--check")
    assert done.returncode == 1
    assert done.stderr == (
        f'smarter_device_manager.py: {node.conf}:2:1: the pool "video1" has the name of the device /dev/video1, '
        "which line 1 offers; rename it\n"
    )


@pytest.mark.parametrize(
    ("in_use", "must", "size", "wanted"),
    [
        ([], [], 1, ["a:0"]),
        ([], [], 2, ["a:0", "b:0"]),
        ([], [], 3, ["a:0", "b:0", "c:0"]),
        ([], [], 4, ["a:0", "b:0", "c:0", "a:1"]),
        ([], [], 6, ["a:0", "b:0", "c:0", "a:1", "b:1", "c:1"]),
        (["a:0"], [], 1, ["b:0"]),
        (["a:1"], [], 3, ["b:0", "c:0", "a:0"]),
        (["a:0", "b:1"], [], 2, ["c:0", "a:1"]),
        (["a:0", "a:1"], [], 2, ["b:0", "c:0"]),
        ([], ["b:1"], 1, ["b:1"]),
        ([], ["b:1"], 2, ["b:1", "a:0"]),
        ([], ["b:1", "b:0"], 3, ["b:1", "b:0", "a:0"]),
        ([], ["a:0"], 4, ["a:0", "b:0", "c:0", "a:1"]),
        (["b:0"], ["a:0"], 2, ["a:0", "c:0"]),
        ([], [], 0, []),
    ],
)
def test_a_pool_prefers_different_devices_and_the_least_used(
    in_use: list[str], must: list[str], size: int, wanted: list[str]
) -> None:
    conf = "- {devicematch: ^.$, resource: pool, nummaxdevices: 2}\n"
    found = offered(conf, snapshot_of(dict.fromkeys("abc", "char"))).resources["pool"]
    available = [slot_id for slot_id in ids_of(found) if slot_id not in in_use]
    assert sdm.prefer(found, available, must, size) == wanted
    assert sdm.prefer(found, reversed(available), must, size) == wanted
    strange = [*available, "z:0", "a:7", "junk"]
    assert sdm.prefer(found, strange, must, size) == wanted


@given(st.data())
def test_what_is_preferred_is_available_and_spread(data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 4))
    conf = f"- {{devicematch: ^.$, resource: pool, nummaxdevices: {slots}}}\n"
    found = offered(conf, snapshot_of(dict.fromkeys("abcde", "char"))).resources["pool"]
    available = data.draw(st.lists(st.sampled_from(ids_of(found)), unique=True, min_size=1))
    must = data.draw(st.lists(st.sampled_from(available), unique=True))
    size = data.draw(st.integers(len(must), len(available)))
    preferred = sdm.prefer(found, available, must, size)
    assert len(preferred) == len(set(preferred)) == size
    assert preferred[: len(must)] == must and set(preferred) <= set(available)
    devices = {slot_id[0] for slot_id in available}
    fixed = {slot_id[0] for slot_id in must}
    assert len({slot_id[0] for slot_id in preferred}) == min(len(devices), len(fixed) + size - len(must))


# ---------------------------------------------------------------------------------------------------------------------
# Ten minutes, Tegra
# ---------------------------------------------------------------------------------------------------------------------


class Looks:
    """One look after the other under a conf that may change."""

    def __init__(self) -> None:
        self.sightings: sdm.Sightings = {}
        self.plan = sdm.EMPTY_PLAN

    def look(self, now: float, conf: str, names: Sequence[str] = (), gpus: Sequence[str] = ()) -> dict[str, str]:
        """The problem of each resource's device."""
        matcher = sdm.Matcher(sdm.parse_rules(conf))
        snapshot = snapshot_of(dict.fromkeys(names, "char"))
        self.sightings, left_out = sdm.sight(self.sightings, snapshot, gpus, matcher, "/dev", now)
        self.plan = sdm.make_plan(self.sightings, left_out, snapshot, sdm.Sysfs("/nowhere"), matcher, "/dev")
        return {name: found.devices[0].problem for name, found in self.plan.resources.items()}


def test_a_device_that_is_gone_for_ten_minutes_is_retired() -> None:
    looks, conf = Looks(), "- devicematch: ^video\n"
    assert looks.look(0, conf, ["video0"]) == {"video0": ""}
    assert looks.look(100, conf) == {"video0": "it is gone"}
    assert looks.plan.resources["video0"].devices[0].since == 100
    assert looks.look(699, conf) == {"video0": "it is gone"}
    assert looks.look(700, conf) == {}
    assert looks.look(800, conf, ["video0"]) == {"video0": ""}
    assert looks.look(900, conf) == {"video0": "it is gone"}
    assert looks.look(1400, conf, ["video0"]) == {"video0": ""}  # back: its ten minutes begin anew
    assert looks.plan.resources["video0"].devices[0].since == 1400
    assert looks.look(1500, conf, ["video0"]) == {"video0": ""}
    assert looks.plan.resources["video0"].devices[0].since == 1400
    assert looks.look(1600, conf) == {"video0": "it is gone"}
    assert looks.look(2199, conf) == {"video0": "it is gone"}
    assert looks.look(2200, conf) == {}


@needs_root
def test_a_device_is_retired_when_its_time_is_over_and_not_at_some_later_look(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdm, "RETIRE_SECONDS", 1.0)
    node.plug("video0")
    node.rules("- devicematch: ^video\n")
    side = sdm.DeviceSide(str(node.conf), str(node.dev), str(node.sys))
    side.start()
    node.unplug("video0")
    wait_for(lambda: side.turn() and side.plan.resources["video0"].devices[0].problem)
    went = side.plan.resources["video0"].devices[0].since
    side.turn(True)  # the next full look, by itself, is a minute away
    wait_for(lambda: side.turn() and not side.plan.resources)
    assert 1.0 <= time.monotonic() - went < 20.0


def test_what_no_rule_names_any_more_leaves_the_plan_at_once() -> None:
    looks = Looks()
    looks.look(0, "- devicematch: ^video\n", ["video0", "video1"], ["0"])
    assert looks.look(1, "- devicematch: ^video\n", ["video0"]) == {"video0": "", "video1": "it is gone"}
    assert looks.look(2, "- devicematch: ^video0$\n", ["video0"]) == {"video0": ""}
    assert looks.look(3, "- devicematch: ^audio$\n", ["video0"]) == {}


def test_an_edit_of_the_conf_changes_slots_and_paths_at_once() -> None:
    looks = Looks()
    looks.look(0, "- devicematch: a\n", ["a"])
    looks.look(1, "- {devicematch: a, nummaxdevices: 3, containerpath: /dev/b}\n", ["a"])
    assert ids_of(looks.plan.resources["a"]) == ["0", "1", "2"]
    assert looks.plan.resources["a"].devices[0].specs == (sdm.Spec("/dev/a", "/dev/b", "rw"),)
    looks.look(2, "- {devicematch: a, resource: b}\n", ["a"])
    assert listed(looks.plan) == {"b": ["a"]}


TEGRA = "- {devicematch: nvidia-gpu, nummaxdevices: 2}\n"


def test_the_gpus_of_a_tegra_are_named_by_nvidia_gpu() -> None:
    looks = Looks()
    assert looks.look(0, TEGRA, ["nvidia-gpu7", "x"], ["0", "12"]) == {"nvidia-gpu0": "", "nvidia-gpu12": ""}
    assert [rule.pattern for rule in looks.plan.unused] == []
    found = looks.plan.resources["nvidia-gpu12"]
    assert ids_of(found) == ["0", "1"] and sdm.device_path(found.devices[0]) == "nvidia-gpu12"
    assert given_to(found, snapshot_of({})) == ({}, {"NVIDIA_VISIBLE_DEVICES": "12"})
    assert looks.look(1, TEGRA, [], ["0"]) == {"nvidia-gpu0": "", "nvidia-gpu12": "it is gone"}
    assert refused(looks.plan.resources["nvidia-gpu12"], snapshot_of({}), "0") == (
        "UNAVAILABLE",
        "nvidia-gpu12: it is gone",
    )
    assert looks.look(2, TEGRA, [], ["0", "12"]) == {"nvidia-gpu0": "", "nvidia-gpu12": ""}
    assert looks.look(3, "- devicematch: ^nvidia\n", [], ["0", "12"]) == {}
    looks.look(4, TEGRA)
    assert [rule.pattern for rule in looks.plan.unused] == ["nvidia-gpu"]


def test_the_last_rule_counts_for_a_tegra_too_and_its_gpus_can_be_a_pool() -> None:
    conf = (
        TEGRA
        + "- {devicematch: nvidia-gpu, resource: gpu, with: [nvmap, 'nvhost?'],"
        + r" env: {GPU: '\1', NVIDIA_VISIBLE_DEVICES: all}}"
    )
    looks = Looks()
    assert looks.look(0, conf + "\n", ["nvmap"], ["0", "1"]) == {"gpu": ""}
    assert ids_of(looks.plan.resources["gpu"]) == ["nvidia-gpu0:0", "nvidia-gpu1:0"]
    nodes, env = given_to(looks.plan.resources["gpu"], snapshot_of({"nvmap": "char"}), "nvidia-gpu0:0", "nvidia-gpu1:0")
    assert nodes == {"/dev/nvmap": "/dev/nvmap"} and env == {"GPU": "0,1", "NVIDIA_VISIBLE_DEVICES": "all"}
    assert looks.look(1, conf + "\n", [], ["0"]) == {"gpu": "it goes with /dev/nvmap: it is gone"}
    assert refused(looks.plan.resources["gpu"], snapshot_of({}), "nvidia-gpu0:0")[0] == "UNAVAILABLE"


def test_a_tegra_has_no_attributes() -> None:
    looks = Looks()
    assert looks.look(0, "- {devicematch: nvidia-gpu, attributes: {a: b}}\n", [], ["0"]) == {}
    assert left(looks.plan) == {"nvidia-gpu0": "a Tegra's GPU has no attributes"}


def test_where_the_gpus_of_a_tegra_are_found(node: Node) -> None:
    for path in ("gpu.0", "gpu.10", "platform/gpu.2", "gpu.x", "platform/17000000.gpu", "platform/gpu.2x", "xgpu.3"):
        (node.sys / "devices" / path).mkdir(parents=True)
    assert sdm.Sysfs(str(node.sys)).tegra_gpus() == ["0", "2", "10"]
    assert sdm.Sysfs("/nowhere").tegra_gpus() == []


# ---------------------------------------------------------------------------------------------------------------------
# The original's conf, and the README's examples
# ---------------------------------------------------------------------------------------------------------------------

ORIGINAL = """
- devicematch: ^snd$
  nummaxdevices: 20
- devicematch: ^gpiomem$
  nummaxdevices: 40
- devicematch: ^gpiochip[0-9]*$
  nummaxdevices: 20
- devicematch: ^hci[0-9]*$
  nummaxdevices: 1
- devicematch: ^i2c-[0-9]*$
  nummaxdevices: 1
- devicematch: ^rtc0$
  nummaxdevices: 20
- devicematch: ^video[0-9]*$
  nummaxdevices: 20
- devicematch: ^vchiq$
  nummaxdevices: 20
- devicematch: ^vcsm.*$
  nummaxdevices: 20
- devicematch: ^ttyUSB[0-9]*$
  nummaxdevices: 1
- devicematch: ^ttyACM[0-9]*$
  nummaxdevices: 1
- devicematch: ^ttyTHS[0-9]*$
  nummaxdevices: 1
- devicematch: ^ttyS[0-9]*$
  nummaxdevices: 1
- devicematch: nvidia-gpu
  nummaxdevices: 10
"""
ITS_DEVICES = {
    "gpiochip0": 20,
    "gpiochip10": 20,
    "gpiomem": 40,
    "hci0": 1,
    "i2c-1": 1,
    "i2c-20": 1,
    "nvidia-gpu0": 10,
    "rtc0": 20,
    "snd": 20,
    "ttyACM0": 1,
    "ttyS0": 1,
    "ttyTHS2": 1,
    "ttyUSB0": 1,
    "ttyUSB15": 1,
    "vchiq": 20,
    "vcsm-cma": 20,
    "vcsm": 20,
    "video": 20,
    "video0": 20,
    "video31": 20,
}


@pytest.mark.parametrize("digit", ["[0-9]", "[[:digit:]]", r"\d"])
def test_the_originals_conf_means_what_it_meant(digit: str) -> None:
    tree = {name: "char" for name in ITS_DEVICES if name not in ("snd", "nvidia-gpu0")}
    others = (
        "gpiomem0",
        "tty0",
        "ttyprintk",
        "ttyS0x",
        "video0a",
        "xvideo0",
        "v4l/video0",
        "rtc",
        "rtc1",
        "i2c1",
        "vcs",
    )
    snapshot = snapshot_of({**tree, **dict.fromkeys(others, "char"), "snd/controlC0": "char", "snd/timer": "char"})
    plan = offered(ORIGINAL.replace("[0-9]", digit), snapshot, gpus=["0"])
    assert {name: len(sdm.slots_of(found)) for name, found in plan.resources.items()} == ITS_DEVICES
    for name, found in plan.resources.items():
        nodes, env = given_to(found, snapshot)
        if name == "snd":
            assert nodes == at("snd/controlC0", "snd/timer")
        elif name == "nvidia-gpu0":
            assert (nodes, env) == ({}, {"NVIDIA_VISIBLE_DEVICES": "0"})
        else:
            assert nodes == {f"/dev/{name}": f"/dev/{name}"}


def readme_conf(name: str) -> str:
    """The conf that README.md shows after <!-- example: NAME -->."""
    found = re.search(rf"<!-- example: {name} -->\n```yaml\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert found, name
    return found[1]


def video(board: Board, number: int, folder: str, name: str, index: int = 0) -> None:
    board.has(
        f"video{number}", f"81:{number}", f"{folder}/video4linux/video{number}", {"name": name, "index": str(index)}
    )


def zigbee(board: Board) -> None:
    usb_serial(board, "ttyUSB0", "188:0", "1-1.1", "10c4", "ea60", "CP2102 USB to UART Bridge Controller", "A5XK3RJT")
    usb_serial(board, "ttyUSB1", "188:1", "1-1.2", "10c4", "ea60", "Sonoff Zigbee 3.0 USB Dongle Plus", "0001")
    usb_serial(board, "ttyUSB2", "188:2", "1-1.3", "10c4", "ea60", "SkyConnect v1.0", "72d0")
    usb_serial(board, "ttyACM0", "166:0", "1-1.4", "1cf1", "0030", "ConBee II", "DE2401")
    usb_serial(board, "ttyACM1", "166:1", "1-1.5", "2341", "0043", "Arduino Uno", "85")
    usb_serial(board, "ttyUSB3", "188:3", "1-1.6", "10c4", "ea60", "CP2102N USB to UART Bridge Controller", "zzz")


def esp(board: Board) -> None:
    usb_serial(board, "ttyACM0", "166:0", "1-1.1", "303a", "1001", "USB JTAG/serial debug unit", "34:85:18:00:00:01")
    usb_serial(board, "ttyACM1", "166:1", "1-1.4", "1cf1", "0030", "ConBee II", "DE2401")
    usb_serial(board, "ttyUSB0", "188:0", "1-1.2", "1a86", "7523", "USB Serial", "")
    usb_serial(board, "ttyUSB1", "188:1", "1-1.3", "10c4", "ea60", "CP2102", "0001")
    usb_serial(board, "ttyUSB2", "188:2", "1-1.5", "0403", "6001", "FT232R", "A1")


def camera(board: Board) -> None:
    """A Raspberry Pi 4 with its camera port, its codecs, and a webcam."""
    soc = "platform/soc"
    video(board, 0, f"{soc}/fe801000.csi", "unicam-image")
    video(board, 1, f"{soc}/fe801000.csi", "unicam-embedded", 1)
    usb = "platform/scb/fd500000.pcie/pci0000:00/0000:00:00.0/0000:01:00.0/usb1/1-1/1-1.3"
    board.device(usb, {"idVendor": "046d", "idProduct": "0825", "product": "HD Webcam C270"})
    board.device(f"{usb}/1-1.3:1.0", {"driver": "-> ../../uvcvideo"})
    video(board, 2, f"{usb}/1-1.3:1.0", "HD Webcam C270: HD Webcam C270")
    video(board, 3, f"{usb}/1-1.3:1.0", "HD Webcam C270: HD Webcam C270", 1)
    for number, name in ((10, "decode"), (11, "encode"), (12, "isp"), (18, "image_fx"), (31, "encode_image")):
        video(board, number, f"{soc}/fe00b840.mailbox/bcm2835-codec", f"bcm2835-codec-{name}")
    for number in (13, 14, 15, 16):
        video(
            board,
            number,
            f"{soc}/fe00b840.mailbox/bcm2835-isp",
            f"bcm2835-isp-{'output' if number == 13 else 'capture'}0",
        )
    video(board, 19, f"{soc}/feb00000.codec", "rpivid")


def camera_pi5(board: Board) -> None:
    """A Raspberry Pi 5: each stage of the camera is a video node, and the names are others."""
    for number, name in enumerate(("csi2_ch0", "csi2_ch1", "csi2_ch2", "csi2_ch3", "fe_image0", "fe_config")):
        video(board, number, "platform/axi/1000120000.pcie/1f00110000.csi", f"rp1-cfe-{name}", number)
    for number in range(20, 36):
        video(board, number, "platform/axi/1000880000.pisp_be", "pispbe-input", number - 20)
    video(board, 19, "platform/axi/1000800000.codec", "rpi-hevc-dec")
    video(board, 8, "platform/axi/usb1/1-2/1-2:1.0", "Arducam B0478 (USB3 48MP): Arduc")


def sound_folder(board: Board, card: int, where: str, names: Sequence[tuple[str, int]]) -> None:
    for name, minor in names:
        board.has(f"snd/{name}", f"116:{minor}", f"{where}/sound/card{card}/{name}", {"uevent": f"DEVNAME=snd/{name}"})


def capture(board: Board) -> None:
    """A Raspberry Pi's own sound, which cannot capture, and a USB sound card, which can."""
    sound_folder(board, 0, "platform/soc/bcm2835_audio", [("controlC0", 0), ("pcmC0D0p", 16)])
    sound_folder(board, 1, "platform/usb1/1-1.2/1-1.2:1.0", [("controlC1", 32), ("pcmC1D0c", 56), ("pcmC1D0p", 48)])
    board.has("snd/timer", "116:33", "virtual/sound/timer")
    board.has("snd/seq", "116:1", "virtual/sound/seq")


def coral(board: Board) -> None:
    board.has("apex_0", "120:0", "pci0000:00/0000:01:00.0/apex/apex_0", {"status": "ALIVE"})
    board.device("pci0000:00/0000:01:00.0", {"vendor": "0x1ac1", "device": "0x089a"})
    for number, port, vendor, product in (
        (1, "usb2", "1d6b", "0003"),
        (3, "2-1", "1a6e", "089a"),
        (4, "2-2", "18d1", "9302"),
    ):
        folder = "platform/usb2" + (f"/{port}" if port != "usb2" else "")
        attributes = {"idVendor": vendor, "idProduct": product}
        board.has(f"bus/usb/002/{number:03}", f"189:{127 + number}", folder, attributes)
    board.has("bus/usb/002/005", "189:132", "platform/usb2/2-3", {"idVendor": "18d1", "idProduct": "4ee7"})


def hailo(board: Board) -> None:
    board.has("hailo0", "511:0", "platform/axi/1000110000.pcie/pci0001:00/0001:01:00.0/hailo_chardev/hailo0")
    board.has("hailo_", "511:1", "platform/axi/x")


def render(board: Board) -> None:
    for number, slot, driver in ((128, "02.0", "i915"), (129, "03.0", "amdgpu"), (130, "04.0", "nouveau")):
        pci = f"pci0000:00/0000:00:{slot}"
        board.device(pci, {"vendor": "0x8086", "driver": f"-> ../../../bus/pci/drivers/{driver}"})
        board.has(
            f"dri/renderD{number}", f"226:{number}", f"{pci}/drm/renderD{number}", {"subsystem": "-> ../../../x/drm"}
        )
        board.has(f"dri/card{number - 128}", f"226:{number - 128}", f"{pci}/drm/card{number - 128}")


def nvidia(board: Board) -> None:
    for number in (0, 1):
        board.device(f"pci0000:4{number}/0000:41:00.0", {"numa_node": str(number)})
        board.tree[f"nvidia{number}"] = f"char 195:{number}"  # no link in /sys/dev: the driver makes no class device
    for name, number in (("nvidiactl", "195:255"), ("nvidia-modeset", "195:254"), ("nvidia-uvm", "511:0")):
        board.tree[name] = f"char {number}"
    board.tree["nvidia-caps/nvidia-cap1"] = "char 510:1"


def tegra(board: Board) -> None:
    board.device("platform/gpu.0", {})
    for minor, name in enumerate(("nvmap", "nvhost-ctrl-gpu", "nvhost-gpu", "nvhost-as-gpu", "nvhost-prof-gpu")):
        board.tree[name] = f"char 504:{minor}"


EXAMPLES: Sequence[tuple[str, Callable[[Board], None], Mapping[str, tuple[int, Given, Given]], Mapping[str, str]]] = [
    (
        "zigbee",
        zigbee,
        {
            "zigbee ttyACM0": (1, {"/dev/zigbee": "/dev/ttyACM0"}, {}),
            "zigbee ttyUSB1": (1, {"/dev/zigbee": "/dev/ttyUSB1"}, {}),
            "zigbee ttyUSB2": (1, {"/dev/zigbee": "/dev/ttyUSB2"}, {}),
            "zwave ttyUSB0": (1, {"/dev/zwave": "/dev/ttyUSB0"}, {}),
        },
        {"ttyUSB3": 'its product is "CP2102N USB', "ttyACM1": 'its product is "Arduino Uno"'},
    ),
    (
        "esp",
        esp,
        {
            "esp ttyACM0": (1, at("ttyACM0"), {}),
            "esp ttyUSB0": (1, at("ttyUSB0"), {"ESP_PORT": "/dev/ttyUSB0"}),
            "esp ttyUSB1": (1, at("ttyUSB1"), {"ESP_PORT": "/dev/ttyUSB1"}),
        },
        {"ttyACM1": 'its idVendor is "1cf1"', "ttyUSB2": 'its idVendor is "0403"'},
    ),
    (
        "camera",
        camera,
        {
            "camera video0": (1, {"/dev/video0": "/dev/video0"}, {}),
            "camera video2": (1, {"/dev/video0": "/dev/video2"}, {}),
            "h264-decoder video10": (4, {"/dev/video10": "/dev/video10"}, {}),
        },
        {"video1": 'its index is "1" (asked for: 0)', "video3": 'its index is "1"', "video19": 'its name is "rpivid"'},
    ),
    (
        "camera",
        camera_pi5,
        {"camera video8": (1, {"/dev/video0": "/dev/video8"}, {})},
        {"video0": 'is "rp1-cfe-csi2_ch0"'},
    ),
    (
        "capture",
        capture,
        {"microphone snd/pcmC1D0c": (1, at("snd/pcmC1D0c", "snd/controlC1", "snd/timer"), {"ALSA_CARD": "1"})},
        {},
    ),
    (
        "coral",
        coral,
        {
            "coral apex_0": (1, at("apex_0"), {}),
            "coral-usb bus/usb/002/003": (1, at("bus/usb/002/003"), {}),
            "coral-usb bus/usb/002/004": (1, at("bus/usb/002/004"), {}),
        },
        {"bus/usb/002/005": 'its idProduct is "4ee7"'},
    ),
    ("hailo", hailo, {"hailo hailo0": (4, at("hailo0"), {})}, {}),
    (
        "render",
        render,
        {
            "render dri/renderD128": (8, at("dri/renderD128"), {}),
            "render-amd dri/renderD129": (8, at("dri/renderD129"), {}),
        },
        {"dri/renderD130": 'its driver is "nouveau"'},
    ),
    (
        "nvidia",
        nvidia,
        {
            f"nvidia nvidia{number}": (
                1,
                at(f"nvidia{number}", "nvidiactl", "nvidia-uvm", "nvidia-modeset"),
                {"NVIDIA_VISIBLE_DEVICES": str(number), "NVIDIA_DRIVER_CAPABILITIES": "all"},
            )
            for number in (0, 1)
        },
        {},
    ),
    (
        "tegra",
        tegra,
        {
            "nvidia-gpu0 nvidia-gpu0": (
                10,
                at("nvmap", "nvhost-ctrl-gpu", "nvhost-gpu", "nvhost-as-gpu"),
                {"NVIDIA_VISIBLE_DEVICES": "0", "NVIDIA_DRIVER_CAPABILITIES": "all"},
            )
        },
        {},
    ),
]


@pytest.mark.parametrize(
    ("name", "made", "wanted", "not_wanted"), EXAMPLES, ids=[found[1].__name__ for found in EXAMPLES]
)
def test_the_examples_of_the_readme_find_what_they_say(
    name: str,
    made: Callable[[Board], None],
    wanted: Mapping[str, tuple[int, Given, Given]],
    not_wanted: Mapping[str, str],
    board: Board,
) -> None:
    made(board)
    plan = board.plan(readme_conf(name), sdm.Sysfs(str(board.node.sys)).tegra_gpus())
    snapshot = snapshot_of(board.tree)
    assert {
        f"{found.name} {device.path}": (device.slots, *given_to(one, snapshot))
        for found in plan.resources.values()
        for device in found.devices
        for one in [dataclasses.replace(found, devices=(device,))]
    } == wanted
    reasons = {path: [one.reason for one in plan.left_out if one.path == path] for path in not_wanted}
    for path, reason in not_wanted.items():
        assert any(reason in told for told in reasons[path]), (path, reasons[path])
    paths = {line.rpartition(" ")[2] for line in wanted}
    assert not paths & not_wanted.keys() and not plan.clashes


def test_every_example_of_the_readme_is_tested() -> None:
    shown = re.findall(r"<!-- example: (.*) -->", (HERE / "README.md").read_text())
    assert sorted(shown) == sorted({found[0] for found in EXAMPLES}) == sorted(set(shown))


def test_the_table_of_keys_in_the_readme_is_whole_and_its_examples_are_good() -> None:
    rows = dict(re.findall(r"^\| `([a-z]+)` \| .* \| `(.*)` \|$", (HERE / "README.md").read_text(), re.MULTILINE))
    assert list(rows) == list(sdm._KEYS)
    for key, value in rows.items():
        more = "" if key == "devicematch" else "\n  devicematch: ^(.)$"
        (rule,) = sdm.parse_rules(f"- {key}: {value}{more}\n")
        assert getattr(rule, sdm._KEYS[key].name)


@needs_root
@pytest.mark.parametrize(("name", "made", "wanted", "_"), EXAMPLES, ids=[found[1].__name__ for found in EXAMPLES])
def test_the_examples_are_offered_by_the_daemon_on_real_nodes(
    name: str, made: Callable[[Board], None], wanted: Mapping[str, tuple[int, Given, Given]], _: Any, board: Board
) -> None:
    made(board)
    build(board.node.dev, board.tree)
    board.node.rules(readme_conf(name))
    document = json.loads(board.node.run("--list", "--json").stdout)
    listed_there = {
        f"{found['name'].partition('/')[2]} {device['path'].removeprefix('/dev/')}": (
            device["slots"],
            {spec["container"]: spec["host"] for spec in device["nodes"]},
            device["env"],
        )
        for found in document["resources"]
        for device in found["devices"]
    }
    assert listed_there == wanted


# ---------------------------------------------------------------------------------------------------------------------
# With a daemon and a kubelet
# ---------------------------------------------------------------------------------------------------------------------


def lists_of(kubelet: Kubelet, resource: str) -> list[dict[str, str]]:
    """Every list that RESOURCE sent since it was registered last: health by ID."""
    lists = kubelet.clients[kubelet.name(resource)].lists
    return [{slot_id: device.health for slot_id, device in sent.items()} for sent in lists]


@needs_root
def test_a_pool_all_the_way(node: Node, kubelet: Kubelet, start: Starter) -> None:
    for number in (0, 1):
        node.sysfs(f"pci/gpu{number}", {"numa_node": str(number), "vendor": "0x10de"}, node.plug(f"nvidia{number}"))
    node.plug("nvidiactl")
    node.rules(r"""
- devicematch: ^nvidia([0-9])$
  resource: gpu
  nummaxdevices: 2
  containerpath: /dev/gpu/
  attributes: {vendor: "0x10de"}
  with: [nvidiactl]
  env: {GPUS: '\1'}
""")
    daemon = start()
    kubelet.wait_for("gpu", Healthy=4, Unhealthy=0)
    client = kubelet.clients[kubelet.name("gpu")]
    assert client.options.get_preferred_allocation_available
    topology = {slot_id: [numa.ID for numa in sent.topology.nodes] for slot_id, sent in client.lists[-1].items()}
    assert topology == {"nvidia0:0": [0], "nvidia0:1": [0], "nvidia1:0": [1], "nvidia1:1": [1]}
    ids, given = kubelet.do(kubelet.allocate(kubelet.name("gpu"), 2))
    assert ids == ["nvidia0:0", "nvidia1:0"] and given.envs == {"GPUS": "0,1"}
    assert {spec.container_path: (spec.host_path, spec.permissions) for spec in given.devices} == {
        f"/dev/gpu/{name}": (f"/dev/{name}", "rw") for name in ("nvidia0", "nvidia1", "nvidiactl")
    }
    node.unplug("nvidia1")
    kubelet.wait_for("gpu", Healthy=2, Unhealthy=2)
    assert kubelet.health("gpu")["nvidia1:0"] == "Unhealthy"
    node.sysfs("pci/gpu1", {}, node.plug("nvidia1"))
    kubelet.wait_for("gpu", Healthy=4, Unhealthy=0)
    node.unplug("nvidiactl")
    kubelet.wait_for("gpu", Healthy=0, Unhealthy=4)
    daemon.says(r"2 devices: Unhealthy: it goes with /dev/nvidiactl: it is gone")
    node.plug("nvidiactl")
    kubelet.wait_for("gpu", Healthy=4, Unhealthy=0)
    assert kubelet.registrations == [kubelet.name("gpu")]
    daemon.stop()
    start()
    kubelet.wait_for("gpu", Healthy=4)
    assert set(kubelet.health("gpu")) == set(topology)


@needs_root
def test_the_reason_of_a_refused_allocate_reaches_the_user(node: Node, kubelet: Kubelet, start: Starter) -> None:
    for name in ("ttyUSB0", "ttyUSB1"):
        node.plug(name)
    node.rules("- {devicematch: ^ttyUSB, resource: zigbee, containerpath: /dev/zigbee}\n")
    daemon = start()
    kubelet.wait_for("zigbee", Healthy=2)
    with pytest.raises(grpc.RpcError) as caught:
        kubelet.take("zigbee", "ttyUSB0:0", "ttyUSB1:0")
    told = "/dev/ttyUSB0 and /dev/ttyUSB1 would both be /dev/zigbee in the container"
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == f"smarter-devices/zigbee: {told}"
    daemon.says(f"Allocate refused: {told}")


@needs_root
def test_a_device_that_flaps_between_two_polls_is_unhealthy_and_healthy_again(
    node: Node, kubelet: Kubelet, start: Starter
) -> None:
    for name in ("video0", "video1"):
        node.plug(name)
    node.rules("- devicematch: ^video\n")
    daemon = start()
    for name in ("video0", "video1"):
        kubelet.wait_for(name, Healthy=1)
    node.plug("new").rename(node.dev / "video0")
    wait_for(lambda: len(lists_of(kubelet, "video0")) == 3)
    assert lists_of(kubelet, "video0") == [{"0": "Healthy"}, {"0": "Unhealthy"}, {"0": "Healthy"}]
    assert lists_of(kubelet, "video1") == [{"0": "Healthy"}]
    assert len(kubelet.registrations) == 2
    daemon.says("video0: Healthy again")


@needs_root
def test_an_edit_of_the_conf_sends_new_lists_and_registers_only_what_is_new(
    node: Node, kubelet: Kubelet, start: Starter
) -> None:
    node.plug("video0")
    node.rules("- devicematch: ^video\n")
    start()
    kubelet.wait_for("video0", Healthy=1)
    node.rules("- {devicematch: ^video, nummaxdevices: 3}\n")
    kubelet.wait_for("video0", Healthy=3)
    node.rules("- {devicematch: ^video, nummaxdevices: 0}\n")
    kubelet.wait_for("video0", Healthy=0, Unhealthy=0)
    assert kubelet.registrations == [kubelet.name("video0")]
    node.rules("- {devicematch: ^video, resource: video0}\n")  # a pool is registered as one
    wait_for(lambda: set(kubelet.health("video0")) == {"video0:0"})
    assert kubelet.clients[kubelet.name("video0")].options.get_preferred_allocation_available


def test_the_gpus_of_a_tegra_come_and_go_with_a_full_look(node: Node, kubelet: Kubelet, start: Starter) -> None:
    (node.sys / "devices/gpu.0").mkdir()
    node.rules("- {devicematch: nvidia-gpu, nummaxdevices: 10}\n")
    daemon = start()
    kubelet.wait_for("nvidia-gpu0", Healthy=10)
    given = kubelet.take("nvidia-gpu0")
    assert (list(given.devices), dict(given.envs)) == ([], {"NVIDIA_VISIBLE_DEVICES": "0"})
    (node.sys / "devices/platform/gpu.1").mkdir(parents=True)
    (node.sys / "devices/gpu.0").rmdir()
    daemon.hang_up()
    kubelet.wait_for("nvidia-gpu1", Healthy=10)
    kubelet.wait_for("nvidia-gpu0", Unhealthy=10)


@needs_root
def test_a_link_planted_after_the_look_is_refused_at_the_allocate(node: Node, kubelet: Kubelet, start: Starter) -> None:
    build(node.dev, {"by-id/cam": "-> ../video0", "video0": "char", "sda": "block", "pub/x": "char"})
    (node.dev / "pub").chmod(0o777)
    node.rules("- devicematch: ^by-id/cam$\n- devicematch: ^pub/x$\n")
    start("--interval", "3600")
    kubelet.wait_for("by-id_cam", Healthy=1)
    kubelet.wait_for("pub_x", Healthy=1)
    assert kubelet.gives("by-id_cam") == {"/dev/by-id/cam": "/dev/video0"}
    node.link("by-id/cam", "../../outside")
    node.link("pub/x", "../sda")
    for name, told in (
        ("by-id_cam", "/dev/by-id/cam: a link that leaves /dev"),
        ("pub_x", "/dev/pub/x: a link below /dev/pub, where others than root may make links"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            kubelet.gives(name)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == f"smarter-devices/{name}: {told}"


@needs_root
def test_a_dev_that_cannot_be_seen_for_a_while(node: Node, kubelet: Kubelet, start: Starter) -> None:
    node.plug("video0")
    node.rules("- devicematch: ^video\n")
    daemon = start()
    kubelet.wait_for("video0", Healthy=1)
    node.dev.rename(node.root / "away")
    kubelet.wait_for("video0", Unhealthy=1)
    with pytest.raises(grpc.RpcError) as caught:
        kubelet.take("video0", "0")
    assert caught.value.details() == "smarter-devices/video0: cannot look at /dev: No such file or directory"
    (node.root / "away").rename(node.dev)
    kubelet.wait_for("video0", Healthy=1)
    assert daemon.log.count(f"cannot look at {node.dev}: No such file or directory") == 1


def test_names_that_never_return_do_not_pile_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    side = device_side(node, "- devicematch: ^bus/\n")
    side.start()
    for number in range(200):
        build(node.dev, {f"bus/{number}": "file"})
        side.turn()
        node.unplug(f"bus/{number}")
    assert left(side.plan) == {"bus/199": "a plain file, not a device"}
    clock.now += sdm.FULL_LOOK_SECONDS
    side.turn()
    assert left(side.plan) == {}
    assert len(side._matcher._matches) <= 3 and not side._sightings
