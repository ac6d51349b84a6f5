"""Tests of smarter_device_manager.py: real processes, real sockets, real files.

Most tests start the daemon as a process of its own, on a made-up /dev, /sys and plugin directory. The simulated kubelet
runs on a thread of the test process. Both are in .ci/support.py. Pure functions are tested by calling them. The
chapters are those of the script. Tests that make device nodes are skipped unless root runs them.
"""

from __future__ import annotations

import ast
import asyncio
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import html
import html.parser
import http.client
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc  # noqa: F401 (pytest reports errors in finalizers by it; an alarm must not interrupt its import)
import warnings
import weakref
import zlib
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import psutil
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).resolve().parent / ".ci"))
import support

from support import (  # isort: skip
    API, ATOMS, CHROMIUM, GROWN_FROM, HERE, LABEL, NODE_NAME, NODE_PATH, PATIENCE, RIGHTS, SCRIPT, SIGNS, WORDS,
    Chromium, Cluster, Daemon, FullPipe, Kubelet, Manager, Node, PodResources, Status, answer_bytes, cut, grpc,
    holders_message, longest_gap, make_certificates, nested_expression, obeys_the_law, parse_yaml, pb, received,
    result_of, samples, sdm, typed, wait_for, with_constants,
)  # fmt: skip

CONFIG_PAGE = HERE / "docs/config.md"
MIB = 1 << 20
Starter = Callable[..., Daemon]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making device nodes takes root (mknod(2))")


NAMES = ("full", "null", "random", "urandom", "zero")  # that every /dev has: an ordinary user can serve these


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
    found = {}
    for item in os.scandir(node.plugins):
        with contextlib.suppress(FileNotFoundError):  # the daemon moved it into its place just now
            if item.name != "kubelet.sock" and stat.S_ISSOCK(item.stat(follow_symlinks=False).st_mode):
                found[item.name] = item.inode()
    return found


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
    window = [("grpc.http2.bdp_probe", 0)]  # else grpc lets more and more be under way, as it finds the line to be fast
    with grpc.insecure_channel(f"unix:{node.plugins}/smarter-{name}.sock", window) as channel:
        yield sdm.rpc.DevicePluginStub(channel)


def refusal(kubelet: Kubelet, resource: str, *ids: str) -> tuple[str, str]:
    """The status and the words with which Allocate of IDS is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        kubelet.take(resource, *ids)
    return caught.value.code().name, caught.value.details()


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
    """A node in a tmpfs, which gives no inode number twice, like /dev of a real node."""
    with tempfile.TemporaryDirectory(prefix="sdm-", dir="/dev/shm") as folder:
        yield Node(Path(folder))


@pytest.fixture
def kubelet(node: Node) -> Iterator[Kubelet]:
    kubelet = Kubelet(node).up()
    yield kubelet
    kubelet.down()
    assert not kubelet.trapped, "registered while an earlier stream was open"


@pytest.fixture
def start(node: Node) -> Iterator[Starter]:
    """Starts daemons on the node. At the end each one is stopped, and must not have logged a traceback unless it was
    given a fault."""
    daemons: list[Daemon] = []

    def start(*more: str, **kwargs: Any) -> Daemon:
        daemons.append(Daemon(node, *more, **kwargs))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.stop()
        assert daemon.fault or "Traceback" not in daemon.log, daemon.log


@pytest.fixture
def serve(node: Node, kubelet: Kubelet, start: Starter) -> Starter:
    """Starts a daemon that offers NAMES, or by RULES the resources of these names, and waits until the kubelet has
    them; the options are those of the daemon."""

    def serve(*names: str, slots: int = 1, rules: str = "", options: Sequence[str] = (), **kwargs: Any) -> Daemon:
        if rules:
            node.rules(rules)
        else:
            offer(node, *names, slots=slots)
        daemon = start(*options, **kwargs)
        wait_ready(kubelet, names)
        return daemon

    return serve


# ---------------------------------------------------------------------------------------------------------------------
# Kubelet
# ---------------------------------------------------------------------------------------------------------------------


@needs_root
def test_a_device_goes_all_the_way(node: Node, kubelet: Kubelet, start: Starter) -> None:
    node.plug("video0")
    node.rules("- devicematch: ^video[0-9]*$\n  nummaxdevices: 2\n")
    daemon = start()
    kubelet.wait_for("video0", Healthy=2)
    assert kubelet.gives("video0", "1") == {"/dev/video0": "/dev/video0"}
    assert daemon.stop() == 0


def test_a_missing_line_is_told_with_the_log_of_then(node: Node, start: Starter) -> None:
    """This file's own helper: the failures of all tests are read by what it shows."""
    node.rules("[]")
    daemon = start()
    daemon.process.wait(PATIENCE)
    Path(daemon._log).write_text("")
    threading.Timer(0.05, lambda: Path(daemon._log).write_text("the last line")).start()
    with pytest.raises(AssertionError, match="'no such line' in the log:\nthe last line"):
        daemon.says("no such line", patience=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# YAML
# ---------------------------------------------------------------------------------------------------------------------

settings.register_profile("busy", deadline=None)  # pytest-timeout bounds each test; a busy machine is late at any step
settings.load_profile("busy")
LAW_EXAMPLES = int(os.environ.get("EXAMPLES", "500"))  # of each law; fewer where .ci/run repeats the tests elsewhere
thorough = settings(max_examples=LAW_EXAMPLES, suppress_health_check=list(HealthCheck))
MANY_SECONDS = 60.0  # an algorithm that is linear takes 4 s, a quadratic one a day


pieces = st.one_of(st.sampled_from(WORDS), st.sampled_from(SIGNS), st.text(max_size=2))
joined_pieces = st.lists(pieces, max_size=8).map("".join)
one_scalar = st.sampled_from(WORDS) | st.from_regex(r"[-+.0-9_:a-fox]{1,8}", fullmatch=True) | joined_pieces
single_quoted = st.builds(lambda text: "'" + text.replace("'", "''") + "'", one_scalar)
places = cut("{}@- {}@a: {}@[{}]@[a, {} ,b]@{{a: {}}}@{{{}: a}}@{}: a@- {}: a@a: {} # c", "@")
placed_scalars = st.builds(
    str.format, st.sampled_from(places), one_scalar | single_quoted | one_scalar.map('"{}"'.format)
)


@st.composite
def grown_texts(draw: st.DrawFn) -> str:
    """A real config file with a few changes."""
    text = draw(st.sampled_from(GROWN_FROM))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.sampled_from([0, 0, 1, 1, 2, 5]))
        text = text[:start] + draw(pieces) + text[end:]
    return text


@settings(thorough, max_examples=LAW_EXAMPLES * 3)
@given(grown_texts() | joined_pieces | placed_scalars)
def test_yaml_law(text: str) -> None:
    obeys_the_law(text)


# Documents in the subset, each with its value, to find what the parser refuses without need.
words = cut('a@b c@x:y@a#b@^video[0-9]*$@-a@é@\U0001f600@/dev/x@it\'s@1.2.3@say "x"', "@")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
printable = texts.map(lambda text: "".join(filter(str.isprintable, text)))
ESCAPED = {char: f"\\{sign}" for sign, char in zip('0abtnvfre"\\N_LP', '\0\a\b\t\n\v\f\r\x1b"\\\x85\xa0\u2028\u2029')}


@st.composite
def double_quoted(draw: st.DrawFn) -> tuple[str, str]:
    """A text, and how it can be written in double quotes."""
    text = draw(texts)
    return '"' + "".join(draw(st.sampled_from(spellings(char))) for char in text) + '"', text


def spellings(char: str) -> list[str]:
    """The ways to write CHAR in double quotes."""
    ways = [f"\\U{ord(char):08x}"]
    ways += [f"\\u{ord(char):04X}"] * (ord(char) < 0x10000) + [f"\\x{ord(char):02x}"] * (ord(char) < 0x100)
    ways += [ESCAPED[char]] if char in ESCAPED else []
    ways += [f"\\{char}"] * (char in "/ ")
    return ways + [char] * (char.isprintable() and char not in '"\\')


scalars = st.one_of(
    st.integers(-(10**18) + 1, 10**18 - 1).map(lambda number: (str(number), number)),
    st.sampled_from([("true", True), ("false", False), ("null", None), ("~", None)]),
    st.sampled_from([(word if not set(word) & set("[]") else f"'{word}'", word) for word in words]),
    printable.map(lambda text: ("'" + text.replace("'", "''") + "'", text)),
    double_quoted(),
)


@st.composite
def flows(draw: st.DrawFn, depth: int) -> tuple[str, Any]:
    """A value in flow style, and what it is."""
    kind = draw(st.sampled_from(["scalar", "list", "mapping"])) if depth else "scalar"
    if kind == "scalar":
        return draw(scalars)
    gap = st.sampled_from(["", " ", "\n  ", " # c\n "])
    comma = draw(gap) + "," + draw(gap)
    items = draw(st.lists(flows(depth - 1), max_size=3))
    end = draw(st.sampled_from(["", "," if items else "", " "])) + draw(gap)
    if kind == "list":
        return "[" + draw(gap) + comma.join(text for text, _ in items) + end + "]", [value for _, value in items]
    keys = [draw(st.sampled_from([f"k{n}", f"'k{n}'", f'"k{n}"'])) for n in range(len(items))]
    colon = draw(st.sampled_from([": ", " : ", ":\n   "]))
    text = comma.join(key + colon + item for key, (item, _) in zip(keys, items))
    return "{" + draw(gap) + text + end + "}", {f"k{n}": value for n, (_, value) in enumerate(items)}


@st.composite
def blocks(draw: st.DrawFn, indent: int, depth: int) -> tuple[str, Any]:
    """A value in block style, as written after "-" or "key:" with more than INDENT, and what it is."""
    end = draw(st.sampled_from(["\n", " # c\n", "  \n", "\n\n", "\n# c\n", "\n   # c\n"]))
    kind = draw(st.sampled_from(["flow", "nothing", "list", "mapping"])) if depth else "flow"
    if kind == "nothing":
        return end, None
    if kind == "flow":
        text, value = draw(flows(2) | st.sampled_from([(word, word) for word in words]))
        return " " * draw(st.integers(1, 2)) + text + end, value
    own = indent + draw(st.integers(1, 4))
    items = [draw(blocks(own, depth - 1)) for _ in range(draw(st.integers(1, 3)))]
    if kind == "list":
        return end + "".join(" " * own + "-" + text for text, _ in items), [value for _, value in items]
    names = [f"{draw(st.sampled_from(words))}{n}" for n in range(len(items))]
    colon = draw(st.sampled_from([":", " :"]))
    text = end + "".join(" " * own + name + colon + item for name, (item, _) in zip(names, items))
    return text, {name: value for name, (_, value) in zip(names, items)}


@settings(thorough, max_examples=LAW_EXAMPLES // 2)
@given(blocks(-1, 3), st.sampled_from(["", "\ufeff", "---", "# c\n---  # c", "\n\n"]), st.booleans())
def test_the_subset_is_read(written: tuple[str, Any], head: str, crlf: bool) -> None:
    text, value = written
    text = head + ("\n" if "---" in head and not text.startswith(("\n", " #")) else "") + text
    assert typed(parse_yaml(text.replace("\n", "\r\n") if crlf else text)) == typed(value)
    assert typed(yaml.safe_load(text)) == typed(value)


DEEP = "- " * 49 + "[a]"
ACCEPTED = {
    "": None,
    "\n\n# only a comment": None,
    "---": None,
    "---\n": None,
    "# c\n\n--- # c\na": "a",
    "\ufeffa: b": {"a": "b"},
    "\ufeff---\r\n- a\r\n": ["a"],
    "a: b # c\n# c\n\n  # c\nc: d": {"a": "b", "c": "d"},
    "a: b#c": {"a": "b#c"},
    "a: '#'": {"a": "#"},
    "- a\n- b\n": ["a", "b"],
    "-\n-  \n- # c\n- a": [None, None, None, "a"],
    "- - - a\n    - b\n  - c": [[["a", "b"], "c"]],
    "-\n  - a\n- b: c\n  d: e": [["a"], {"b": "c", "d": "e"}],
    "-   b: c\n    d: e": [{"b": "c", "d": "e"}],
    "a:\n- b\n- c\nd:\n  - e": {"a": ["b", "c"], "d": ["e"]},
    "a:\n    b:\n     c: d\n    e:": {"a": {"b": {"c": "d"}, "e": None}},
    "a:\n\n\n  b": {"a": "b"},
    "a :  b": {"a": "b"},
    "a b: c d": {"a b": "c d"},
    "'a': b\n\"c\" : d": {"a": "b", "c": "d"},
    "'1': a\n\"true\": b\n'~': c": {"1": "a", "true": "b", "~": "c"},
    "a:b": "a:b",
    "a: b:c": {"a": "b:c"},
    "^ttyUSB[0-9]*$": "^ttyUSB[0-9]*$",
    "a: [0-9]": {"a": ["0-9"]},
    "a: -b": {"a": "-b"},
    'a: b\'s "c"': {"a": 'b\'s "c"'},
    "- 0\n- 7\n- -1\n- 20\n- 999999999999999999\n- -999999999999999999": [0, 7, -1, 20, 10**18 - 1, 1 - 10**18],
    "[true, false, null, ~]": [True, False, None, None],
    "['true', \"7\", '~', '']": ["true", "7", "~", ""],
    "[]": [],
    "{}": {},
    "a: []\nb: {}": {"a": [], "b": {}},
    "[a, b,]": ["a", "b"],
    "[ a , [b,c] , {d: e} ]": ["a", ["b", "c"], {"d": "e"}],
    "{a: b, c: , d:}": {"a": "b", "c": None, "d": None},
    "{\"a\":b, 'c':[d]}": {"a": "b", "c": ["d"]},
    "{a: {b: {c: [d]}},}": {"a": {"b": {"c": ["d"]}}},
    "a: [b,\nc, # d\n\n  e\n]": {"a": ["b", "c", "e"]},
    "a: {b: c,\n  d:\n  e}\nf: g": {"a": {"b": "c", "d": "e"}, "f": "g"},
    "'it''s'": "it's",
    "'a\\b'": "a\\b",
    r'"\0\a\b\t\n\v\f\r\e\ \"\/\\\N\_\L\P"': '\0\a\b\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029',
    '"\\\t"': "\t",
    r'"\x41\xe9\u20AC\U0001f600"': "A\xe9\u20ac\U0001f600",
    "é: \U0001f600": {"é": "\U0001f600"},
    DEEP: json.loads("[" * 50 + '"a"' + "]" * 50),
    "[" * 50 + "]" * 50: json.loads("[" * 50 + "]" * 50),
    f"{'k' * 1024}: a": {"k" * 1024: "a"},
    f"- {'v' * 5000}": ["v" * 5000],
}


@pytest.mark.parametrize("text", ACCEPTED)
def test_yaml_that_is_read(text: str) -> None:
    assert typed(parse_yaml(text)) == typed(ACCEPTED[text])
    assert obeys_the_law(text)


REFUSED = [
    # text, line, column, what the message must say
    ("a:\n\tb: c", 2, 1, "tab"),
    ("a:\tb", 1, 3, "tab"),
    ("- a\n -\tb", 2, 2, "belongs to none"),
    ("a: &x b", 1, 4, "anchors are not supported"),
    ("a: *x", 1, 4, "aliases are not supported"),
    ("a: !!str b", 1, 4, "tags are not supported"),
    ("a: |\n  b", 1, 4, "block texts are not supported"),
    ("a: >-\n  b", 1, 4, "block texts are not supported"),
    ("? a\n: b", 1, 1, "keys with '?' are not supported"),
    ("a: ?b", 1, 4, "quote"),
    (": a", 1, 1, "no key before"),
    ("%YAML 1.1\n---\na", 1, 1, "directives are not supported"),
    ("a\n---\nb", 2, 1, "only one '---'"),
    ("--- a", 1, 1, "only one '---'"),
    ("a: b\n...\n", 2, 1, "only one '---'"),
    ("a: b\nc: d\na: e", 3, 1, 'the key "a" is there twice'),
    ("a: b\n'a': c", 2, 1, 'the key "a" is there twice'),
    ("a: \0", 1, 4, "U+0000 is not allowed"),
    ("a\x85b", 1, 2, "U+0085 is not allowed"),
    ("a: b\rc: d", 1, 5, "U+000D is not allowed"),
    ("'\ud800'", 1, 2, "U+D800 is not allowed"),
    ("a\r\nb\x01", 2, 2, "U+0001 is not allowed"),
    ("- " * 50 + "[a]", 1, 101, "more than 50 levels"),
    ("[" * 51, 1, 51, "more than 50 levels"),
    ("{a: " * 51, 1, 201, "more than 50 levels"),
    (f"{'k' * 1025}: a", 1, 1, "longer than 1024 characters"),
    (f"{{{'k' * 1025}: a}}", 1, 2, "longer than 1024 characters"),
    ("1: a", 1, 1, "a key must be text: quote it"),
    ("{a}", 1, 2, "'key: value'"),
    ("a: b\nc", 2, 1, "'key: value'"),
    ("a: b\nc:d\n", 2, 1, "with the space"),
    ("[a: b]", 1, 3, "write {key: value}"),
    ("a: b: c", 1, 5, "quote the text"),
    ("a: [b", 1, 4, "this bracket is not closed: add ']'"),
    ("a: {b: c\nd: e", 2, 1, "expected ',' or '}'"),
    ("a: [b c\n  d]", 2, 3, "expected ',' or ']'"),
    ("a: [,]", 1, 5, "quote"),
    ("a: ]", 1, 4, "no text starts with ']'"),
    ("a: @b", 1, 4, "no text starts with '@'"),
    ("a: 'b", 1, 4, "no closing '"),
    ('a: "b\n  c"', 1, 4, 'no closing "'),
    (r'a: "^a\d$"', 1, 7, r"'\d' is not an escape: write '\\'"),
    (r'a: "\ud800"', 1, 5, "no character has this number"),
    (r'a: "\U00110000"', 1, 5, "no character has this number"),
    (r'a: "\x4"', 1, 5, "is not an escape"),
    ('a: "b" c', 1, 8, "only a comment may follow"),
    ("a: [0-9]+", 1, 9, "quote the whole text"),
    ("a: 'b'# c", 1, 7, "a comment needs a space"),
    ("a: b\n  c", 2, 3, "a text must be on one line"),
    ("a: b\n  c: d", 2, 3, "check its indentation"),
    ("- a\nb: c", 2, 1, "check its indentation"),
    ("- a: b\n c: d", 2, 2, "check its indentation"),
    ("a:\n  - b\n - c", 3, 2, "check its indentation"),
    ("- a:b\n  c: d", 2, 3, "a space after its ':'"),
    ("a: - b", 1, 4, "a line of its own"),
]


@pytest.mark.parametrize(("text", "line", "column", "message"), REFUSED)
def test_yaml_that_is_refused(text: str, line: int, column: int, message: str) -> None:
    with pytest.raises(sdm.ConfigError) as caught:
        parse_yaml(text)
    assert (caught.value.line, caught.value.column) == (line, column), str(caught.value)
    assert message in caught.value.message
    assert str(caught.value) == f"line {line}, column {column}: {caught.value.message}"
    assert isinstance(caught.value, ValueError)


NO_TEXT_TO_SOME = cut("""yes No ON y N off True FALSE Null NULL 0x1F 0o7 0b101 012 0042 00 08 1_000 +5 -0 1e3 1E-3 1.5
    .5 1. -.5e1 .inf -.Inf .NaN 12:30 1:2:3.4 2001-01-01 2001-12-14t21:59:43.10-05:00 = << 1234567890123456789 1,000""")


@pytest.mark.parametrize("word", [*NO_TEXT_TO_SOME, "2001-1-1 1:1:1"])
def test_what_some_yaml_reader_does_not_read_as_text_must_be_quoted(word: str) -> None:
    remedy = rf'quote it \("{re.escape(word)}"\)|in quotes: "{re.escape(word)}"'
    listed = (f"- {word}", 3) if "," in word else (f"[b, {word}]", 5)
    for text, column in ((f"a: {word}", 4), listed):
        with pytest.raises(sdm.ConfigError, match=remedy) as caught:
            parse_yaml(text)
        assert (caught.value.line, caught.value.column) == (1, column)
    assert parse_yaml(f'a: "{word}"') == {"a": word}


HOSTILE = cut(
    "\n@ @#@# c\n@  \n@a@a @:a@a:@ #@\"@\"\\n@'@''@- @-\n@[@{a: @a,@---\n@...\n@\r\n@\r@1@1_@1:@-.@\t@\\@'a@a: b\n@]",
    "@",
)


@pytest.mark.parametrize("piece", HOSTILE)
def test_yaml_of_a_mebibyte_is_read_in_time(piece: str) -> None:
    before = time.monotonic()
    for head in ("", "- ", '"', "["):
        text = (head + piece * (MIB // len(piece)))[: MIB // 4]
        try:
            parse_yaml(text)
        except sdm.ConfigError as error:
            assert len(error.message) < 300
    assert time.monotonic() - before < MANY_SECONDS


# ---------------------------------------------------------------------------------------------------------------------
# Expressions
# ---------------------------------------------------------------------------------------------------------------------

SAME = [
    # RE2 expression, what it matches, what it does not
    (r"^video[0-9]*$", ["video", "video0", "video10"], ["video0\n", "xvideo0", "video0a"]),
    (r"snd", ["snd", "a/snd/b"], ["sn"]),
    (r"^a[[:digit:]]+\z", ["a1"], ["a1\n", "a", "a\u0661"]),
    (r"^[^[:space:]]$", ["a", "\v"[:0] + "x"], [" ", "\t", "\v"]),
    (r"^[[:^alpha:]]$", ["1", "é"], ["a", "Z"]),
    (r"^[[:xdigit:]_]+$", ["aF09_"], ["g"]),
    (r"^[[:word:]-]+$", ["a-b_9"], ["a b"]),
    (r"^[[:punct:]]$", ["~", "!", "["], ["a", " "]),
    (r"^\d\w\s$", ["1_ "], ["\u0661_ ", "1é ", "1a\v", "1a\xa0"]),
    (r"^[\D]$", ["a", "\u0661"], ["1"]),
    (r"\bé", ["aé"], ["é"]),  # \b is ASCII's
    (r"^\B$", [""], ["a"]),
    (r"^a.c$", ["abc"], ["a\nc"]),
    (r"(?s)^a.c$", ["abc", "a\nc"], []),
    (r"a(?s).c", ["a\nc"], []),
    (r"(?m)^b$", ["a\nb\nc", "b"], ["ab"]),
    (r"(?m:^b)$", ["a\nb"], ["b\n"]),
    (r"(?i)^TTY", ["tty0", "TtY1"], ["ty"]),
    (r"^tty(?i)usb$", ["ttyUSB", "ttyuSb"], ["TTYusb"]),
    (r"^(?i:tty)USB$", ["TTYUSB"], ["TTYusb"]),
    (r"^(a(?i)b|c)d$", ["aBd", "Cd"], ["aBD", "Ad"]),
    (r"(?i)^a(?-i)b$", ["Ab"], ["AB"]),
    (r"(?i)^\W$", ["-", "é"], ["k", "K", "s", "S", "i"]),
    (r"(?i)^[[:^graph:]\W]$", [" ", "-"], ["k", "i", "I", "s"]),
    (r"(?i)^[[:^upper:]]$", ["1"], ["a", "A"]),
    (r"^a{,2}$", ["a{,2}"], ["a", "aa", ""]),
    (r"^a{01}$", ["a{01}"], ["a"]),
    (r"^a{2}b{1,}c{0,1}$", ["aab", "aabbc"], ["ab"]),
    (r"^\x41\x{e9}\x{1F600}\101\0$", ["Aé\U0001f600A\0"], []),
    (r"^\.\-\/\_\ $", [".-/_ "], [".-/_a"]),
    (r"^\a\f\t\n\r\v$", ["\a\f\t\n\r\v"], []),
    (r"^[]a]+[^]a]$", ["]ab"], ["]a]"]),
    (r"^[a-]$", ["-", "a"], ["b"]),
    (r"^[a-c-e]$", ["b", "-", "e"], ["d"]),
    (r"^[\d-z]$", ["-", "z", "5"], ["a"]),
    (r"^[+-[:digit:]]$", ["5]", "+]"], ["5"]),
    (r"^[[a]$", ["[", "a"], ["]"]),
    (r"^[a&&b]$", ["&", "a", "b"], ["c"]),
    (r"^[a||b~~+--d]$", ["|", "~", "+", ",", "d"], [".", "e"]),
    (r"^[:digit:]$", ["d", ":"], ["1"]),
    (r"^(?P<n>a)(?<m>b)$", ["ab"], []),
    (r"^(|a)$", ["", "a"], ["b", "aa"]),
    (r"^*tun$", ["tun", "xtun"], ["tunx"]),
    (r"^?a$*", ["a", "bab"], ["b"]),
    (r"^{1}a${2,}", ["a"], ["ba", "ab"]),
    (r"^{0}a(?:^)*b", ["ab", "cab"], ["a"]),
    (r"(^)*?()+(?:$|\b)??a", ["a", "ba"], ["b"]),
    (r"(?i)^[^k]$", ["j"], ["k", "K"]),
    (r"(?i)^[j-t]{2}$", ["KS"], ["ab"]),
    (r"^[\x00-\x{10FFFF}]$", ["a", "\n", "\U0010ffff"], [""]),
    (r"^[^\x00-\x{10FFFF}]$", [], ["a", "\n", ""]),
    (r"^(a{100}){10}$", ["a" * 1000], ["a" * 999]),
    (r"^a??b*?c+?$", ["abbc", "c"], ["a"]),
    (r"^a(?)b$", ["ab"], []),
    (r"^video(?!0$)", ["video10"], ["video0"]),  # look-around, which only Python has
    (r"(?<=/)event(?<!x)(?=\d)", ["input/event3"], []),
]
NOT_OF_RE2 = [
    # expression, what the message must say
    (r"\C", r"\C is not supported"),
    (r"\Qa.b\E", r"\Q is not supported"),
    (r"\pL", r"\p is not supported"),
    (r"[\p{Greek}]", r"\p is not supported"),
    (r"\PN", r"\P is not supported"),
    (r"(?U)a+", "(?U)"),
    (r"(?a)a", "i, m and s are"),
    (r"(?i", "does not begin a group"),
    (r"(?>a)", "(?> does not begin a group"),
    (r"(?P=n)", "(?P does not begin a group"),
    (r"(a)(?(1)b|c)", "(?( does not begin a group"),
    (r"(?P<1a>b)", "(?P does not begin a group"),
    (r"(?P<n>a)(?P<n>b)", "redefinition"),
    (r"(a)\1", "cannot refer to"),
    (r"[\1]", "cannot refer to"),
    (r"a\Z", r"for the end, write $ or \z"),
    (r"\y", r"for the character itself, write y"),
    (r"[\b]", r"\b is not an escape"),
    (r"\u00e9", r"\u is not an escape"),
    (r"\N{DASH}", r"\N is not an escape"),
    (r"\é", r"\é is not an escape"),
    (r"\x4", r"\x7f or \x{20ac}"),
    (r"\x{110000}", "beyond Unicode"),
    ("a\\", r"for a backslash, write \\"),
    (r"a++", "nothing before + to repeat"),
    (r"a{2}+", "nothing before + to repeat"),
    (r"*a", r"for the character itself, write \*"),
    (r"(?i)*", "nothing before * to repeat"),
    (r"a|{2}", "nothing before {2} to repeat"),
    (r"^**", "nothing before * to repeat"),
    (r"([a-c]*)*", "* repeats something that may be empty"),
    (r"(|a)+", "such as (a+)* for (a*)*"),
    (r"(?:a|b?){1,3}", "{1,3} repeats something that may be empty"),
    (r"(?i)[€-₯]", 'exclude "€" from it: (?-i:€)'),
    (r"a{2,99999999999}", "too large"),
    ("a{" + "1" * 5000 + "}", "too large"),
    (r"(?i)\x{e9}", "(?i) works with ASCII only"),
    (r"(?i)[a-é]", "(?i) works with ASCII only"),
    (r"a{2,1}", "min repeat greater than max repeat"),
    (r"[[:foo:]]", "the names are alnum, alpha"),
    (r"[[:a]:]", "is not a character class"),
    (r"[a-\d]", r"\d is not an escape"),
    (r"[z-a]", "bad character range z-a"),
    (r"[a", "unterminated character set"),
    (r"[]", "unterminated character set"),
    (r"(a", "unterminated subpattern"),
    (r"a)", "unbalanced parenthesis"),
    ("(" * 20000 + ")" * 20000, "too large"),
    ("(?i:" * 200000, "too large"),
]


def compiled(pattern: str) -> re.Pattern[str]:
    """PATTERN, compiled as in a rule. Raises ConfigError, and any warning of re as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sdm.parse_rules(f"- devicematch: {json.dumps(pattern)}\n")[0].match.compiled


@pytest.mark.parametrize(("pattern", "matches", "others"), SAME)
def test_expressions_of_re2_mean_the_same(pattern: str, matches: list[str], others: list[str]) -> None:
    expression = compiled(pattern)
    assert [text for text in [*matches, *others] if expression.search(text)] == matches


@pytest.mark.parametrize(("pattern", "message"), NOT_OF_RE2, ids=lambda text: text[:20])
def test_expressions_that_python_would_read_differently_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(sdm.ConfigError) as caught:
        compiled(pattern)
    assert message in caught.value.message
    assert len(caught.value.message) < 300
    assert (caught.value.line, caught.value.column) == (1, 16)


@st.composite
def flat_expressions(draw: st.DrawFn) -> str:
    pattern = "".join(draw(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=7)))
    return pattern + ")" * (len(re.findall(r"(?<!\\)\((?![^\[]*\])", pattern)) - len(re.findall(r"(?<!\\)\)", pattern)))


nested_expressions = st.randoms(use_true_random=False).map(nested_expression)
searched_names = st.text("aAbBcjkKsSéÉ_079-/.\n \t\v]{},2[^$:~&\x7f\xa0", max_size=6) | st.text("abkKs0 \n", max_size=5)


@settings(thorough, max_examples=LAW_EXAMPLES * 3)
@given(flat_expressions() | nested_expressions, st.lists(searched_names, min_size=8, max_size=8))
@example("(?:a|(?:|b))?c", ["ab"])
@example("^*tun$", ["xtun"])
def test_expressions_against_re2_itself(pattern: str, names: list[str]) -> None:
    """PATTERN matches NAMES as in RE2, or one of the two refuses it."""
    re2 = pytest.importorskip("re2", reason="google-re2 is not installed (no wheel for this Python)")
    options = re2.Options()
    options.log_errors = False
    try:
        ours = compiled(pattern)
        theirs = re2.compile(pattern, options)
    except (sdm.ConfigError, re2.error):
        return
    assert ours.groups == theirs.groups
    for name in [*names, "", "a", "video0"]:
        if not name.isascii() and r"\B" in pattern:
            continue  # RE2 in C++ finds \B inside a character
        found, expected = ours.search(name), theirs.search(name)
        spans = [[match.span(n) for n in range(ours.groups + 1)] if match else None for match in (found, expected)]
        assert spans[0] == spans[1], (pattern, name)


SLOW = r"^serial/by-id/([A-Za-z0-9_-]+)*-if00$"  # from issues of other projects: re would take years for SLOW_NAME
SLOW_NAME = "serial/by-id/usb-Silicon_Labs_CP2102N_USB_to_UART_Bridge_Controller_{:04}-if01-port0"


def cpu_seconds(work: Callable[[], Any]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def spin(seconds: float) -> bool:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_search_ends_though_its_alarm_rings_in_a_finalizer() -> None:
    class Referent:
        """Something that a weak reference can refer to."""

    def work() -> None:
        referent = Referent()
        reference = weakref.ref(referent, lambda _: spin(0.2))
        del referent  # the alarm rings in the call that this makes
        assert spin(60.0) and reference

    with pytest.raises(sdm.SearchTimeout):
        sdm.ALARM.limit(work, 0.05)


def test_a_search_that_takes_too_long_ends_and_is_not_repeated() -> None:
    expression = sdm.Expression(SLOW)

    def search() -> None:
        assert isinstance(expression.search(SLOW_NAME.format(1)), sdm.SearchTimeout)

    assert sdm.SEARCH_SECONDS <= cpu_seconds(search) < 4 * sdm.SEARCH_SECONDS
    assert cpu_seconds(search) < sdm.SEARCH_SECONDS / 10
    assert expression.search("serial/by-id/usb-1a86-if00")
    assert expression.search("serial/by-id/usb-1a86") is None


def test_slow_searches_get_less_time_and_are_forgotten_some_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdm.Expression, "MAX_SLOW_TEXTS", 30)
    expressions = [sdm.Expression("a"), sdm.Expression(SLOW), sdm.Expression("b")]

    def search() -> None:
        for number in range(40):
            first, second, third = sdm.search_all(expressions, SLOW_NAME.format(number))
            assert isinstance(second, sdm.SearchTimeout)
            assert isinstance(first, re.Match) and isinstance(third, re.Match)

    assert cpu_seconds(search) < 20 * sdm.SEARCH_SECONDS
    assert len(expressions[1].slow_texts) == 10


def test_an_alarm_interrupts_only_its_own_work() -> None:
    def is_done(seconds: float) -> bool:
        try:
            return sdm.ALARM.limit(lambda: spin(seconds), 0.004)
        except sdm.SearchTimeout:
            return False
        finally:
            assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)

    outcomes = []
    for step in range(60):  # from less than the work may take to much more: the timer counts by the clock's ticks
        outcomes.append(is_done(0.001 + step * 0.001))
        signal.raise_signal(signal.SIGPROF)  # one that comes late
    assert set(outcomes) == {False, True}
    with pytest.raises(ZeroDivisionError):
        sdm.ALARM.limit(lambda: 1 / 0, 1)
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    early = [lambda: signal.raise_signal(signal.SIGPROF)] * 3  # other threads have used the time
    assert sdm.ALARM.limit(lambda: [ring() for ring in early], 60) == [None] * 3


def slow_rules(*more: str) -> str:
    return f"- devicematch: ^serial/by-id/\n- devicematch: {SLOW}\n  nummaxdevices: 2\n" + "".join(more)


@needs_root
def test_names_that_take_too_long_do_not_delay_the_others(node: Node, kubelet: Kubelet, start: Starter) -> None:
    node.plug("video0")
    node.plug("ttyUSB0")
    node.rules("- devicematch: ^video\n" + slow_rules())
    daemon = start("--listen", "127.0.0.1:0", "--interval", "0.5")
    kubelet.wait_for("video0", Healthy=1)
    status = Status(daemon)
    for number in range(20):
        node.link("serial/by-id/" + os.path.basename(SLOW_NAME.format(number)), "../../ttyUSB0")
    node.link("serial/by-id/usb-good-if00", "../../ttyUSB0")
    slowest = 0.0
    while len(kubelet.clients) < 22:
        started = time.monotonic()
        kubelet.take("video0")
        assert status.ask("/healthz").status == 200
        slowest = max(slowest, time.monotonic() - started)
    assert slowest < 1.0
    kubelet.wait_for("serial_by-id_usb-good-if00", Healthy=2)
    wait_for(lambda: status.metrics()["left_out", "pattern_timeout"] == 20)
    daemon.says(r"left out: the expression took too long in this name: \^serial/by-id/\(")
    left_out = status.document()["left_out"]
    assert {(left["path"], left["line"]) for left in left_out} == {
        (f"/dev/{SLOW_NAME.format(number)}", 3) for number in range(20)
    }
    process = psutil.Process(daemon.process.pid)
    daemon.hang_up()
    before = sum(process.cpu_times()[:2])
    turns(daemon, 10)
    assert sum(process.cpu_times()[:2]) - before < 0.2  # they are not searched again
    done = node.run("--list", "--json")
    assert json.loads(done.stdout)["left_out"] == left_out
    assert node.run("--check").stdout.startswith(f"{node.conf}: good, 3 rules\n")
    assert daemon.log.count("took too long") == 1


@needs_root
def test_an_earlier_rule_gets_a_name_for_which_a_later_one_took_too_long(node: Node) -> None:
    node.plug(SLOW_NAME.format(1))
    side = device_side(node, slow_rules("- devicematch: ^serial/by-id/x\n"))
    side.start()
    device = side.plan.resources[sdm.resource_name(SLOW_NAME.format(1))].devices[0]
    assert (device.line, device.slots) == (1, 1)
    assert [(found.path, found.line) for found in side.plan.left_out] == [(SLOW_NAME.format(1), 2)]
    assert [rule.line for rule in side.plan.unused] == [4]
    node.rules(f"- devicematch: {SLOW}\n")
    side.turn()
    assert side.plan.resources == {}
    assert [(found.path, found.line) for found in side.plan.left_out] == [(SLOW_NAME.format(1), 1)]
    node.unplug(SLOW_NAME.format(1))
    assert cpu_seconds(side.turn) < sdm.SEARCH_SECONDS


@needs_root
def test_an_attribute_that_takes_too_long_is_not_matched_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    product = "Silicon_Labs_CP2102N_USB_to_UART_Bridge_Controller_0001"
    for name in ("stick0", "stick1"):
        node.sysfs(f"usb1/{name}", {"product": product, "serial": name}, node.plug(name))
    side = device_side(
        node, "- devicematch: stick1\n- devicematch: stick\n  attributes: {product: '(\\w+[ _-]?)+Zigbee'}\n"
    )
    assert cpu_seconds(side.start) < 3 * sdm.SEARCH_SECONDS  # one search: they have the same product
    assert set(side.plan.resources) == {"stick1"}
    reason = f'the expression took too long for its product, "{product}": (\\w+[ _-]?)+Zigbee; its product is'
    assert {found.path for found in side.plan.left_out if found.text.startswith(reason)} == {"stick0", "stick1"}
    for reread in (False, False, True):
        clock.now += 1
        assert cpu_seconds(lambda reread=reread: side.turn(reread=reread)) < sdm.SEARCH_SECONDS / 2
    node.sysfs("usb1/stick0", {"product": "Sonoff Zigbee"})
    clock.now += 1
    side.turn()
    assert side.plan.resources["stick0"].devices[0].line == 2


# ---------------------------------------------------------------------------------------------------------------------
# Rules: keys
# ---------------------------------------------------------------------------------------------------------------------

EVERYTHING = r"""# c
- devicematch: ^pcmC(?P<card>[0-9]+)D([0-9]+)([cp])$
  nummaxdevices: 0
  resource: sound-\g<card>
  containerpath: /dev/snd/
  permissions: mwr
  attributes: {idVendor: "10c4", "serial": '.*A5XK.*'}
  with: ['snd/controlC\1', "snd/timer?"]
  env:
    CARD: \1
    WHOLE: '[\g<0>]'
- devicematch: snd
- devicematch: ^(a)$
  resource: \g<attr:idVendor>-\g<attr:serial>
  with:
  - path: b\1
  - {path: 'c\g<attr:power/control>', containerpath: '/dev/x/\g<attr:serial>', optional: true, permissions: wr}
"""


def test_every_key_is_read() -> None:
    rule, other, third = sdm.parse_rules(EVERYTHING)
    assert (rule.line, rule.slots, rule.permissions, other.line) == (2, 0, "rwm", 12)
    assert rule.pattern == "^pcmC(?P<card>[0-9]+)D([0-9]+)([cp])$"
    assert [(one.name, one.match.pattern, one.fits({one.name: "xA5XKx"})) for one in rule.attributes] == [
        ("idVendor", "10c4", False),
        ("serial", ".*A5XK.*", True),
    ]
    assert rule.companions == (sdm.Companion("snd/controlC\\1"), sdm.Companion("snd/timer", optional=True))
    match = rule.match.search("pcmC2D0p")
    assert match
    assert sdm.expand(rule.resource, match, {}) == "sound-2"
    assert [(name, sdm.expand(text, match, {})) for name, text in rule.env] == [("CARD", "2"), ("WHOLE", "[pcmC2D0p]")]
    assert (other.slots, other.resource, other.containerpath, other.permissions) == (1, "", "", "rw")
    assert (other.attributes, other.companions, other.env, other.values) == ((), (), (), ())
    assert third.values == ("idVendor", "serial", "power/control")
    assert third.companions == (
        sdm.Companion(r"b\1"),
        sdm.Companion(r"c\g<attr:power/control>", True, r"/dev/x/\g<attr:serial>", "rw"),
    )
    match = third.match.search("a")
    assert match
    assert sdm.expand(third.resource, match, {"idVendor": "10c4", "serial": "A5 XK/3"}) == "10c4-A5_XK_3"


@pytest.mark.parametrize(
    ("template", "value", "text"),
    [
        (r"x\1\g<n>\g<2>y", "", "xccy"),  # a group outside the match is empty
        (r"x/\g<attr:serial>", "A5XK3RJT", "x/A5XK3RJT"),
        (r"x/\g<attr:serial>", "v1.0-rc_2", "x/v1.0-rc_2"),
        (r"x/\g<attr:serial>", "../../etc", "x/.._.._etc"),  # a value never spans parts of a path
        (r"x/\g<attr:serial>", "..", "x/__"),
        (r"x/\g<attr:serial>", ".", "x/_"),
        (r"x/\g<attr:serial>", "", "x/"),
        (r"x/\g<attr:serial>", "0000:00:14.0", "x/0000_00_14.0"),
        (r"x/\g<attr:serial>", "a\0b\nc\x1b d\"'\\xff", "x/a_b_c__d___xff"),
        (r"x/\g<attr:serial>", "é\u0661\u212a", "x/___"),
        (r"x/\g<attr:serial>", r"\1\g<0>", "x/_1_g_0_"),
    ],
)
def test_a_template_is_expanded(template: str, value: str, text: str) -> None:
    (rule,) = sdm.parse_rules(f"[{{devicematch: '^a(b)?(?<n>c)?$', resource: '{template}'}}]")
    assert sdm.expand(rule.resource, rule.match.search("ac"), {"serial": value}) == text


def test_the_shipped_conf_is_good() -> None:
    rules = sdm.parse_rules(sdm.read_conf(str(HERE / "conf.yaml")))
    assert [rule.slots for rule in rules if rule.match.search("video0")] == [20]


BAD_RULES = [
    # conf, line, column, what the message must say
    ("", 1, 1, "the file has no rules"),
    ("# only\n# comments\n", 1, 1, "the file has no rules"),
    ("[]", 1, 1, "has no rules"),
    ("devicematch: a", 1, 1, "expected a list of rules (- devicematch: ...), found a mapping"),
    ("a", 1, 1, 'expected a list of rules (- devicematch: ...), found a text ("a")'),
    ("\n42", 2, 1, "found a number (42)"),
    ("- a", 1, 3, "expected a rule (devicematch: ...), found a text"),
    ("- devicematch:^a$", 1, 3, "expected a rule"),
    ("-", 1, 2, "expected a rule (devicematch: ...), found nothing"),
    ("- devicematch: a\n- nummaxdevices: 1", 2, 3, "a rule needs devicematch"),
    ("- {}", 1, 3, "a rule needs devicematch"),
    ("- devicematch: a\n  nummaxdevice: 2", 2, 3, 'unknown key "nummaxdevice"; did you mean nummaxdevices?'),
    ("- devicematch: a\n  permision: r", 2, 3, "did you mean permissions?"),
    ("- DeviceMatch: a", 1, 3, "did you mean devicematch?"),
    ("- devicematch: a\n  '': {}", 2, 3, 'unknown key ""; the keys are devicematch, nummaxdevices, resource, '),
    ("- devicematch: a\n  limit: 2", 2, 3, 'unknown key "limit"; the keys are '),
    ("- devicematch: a\n  mounts: []", 2, 3, 'unknown key "mounts"; the keys are '),
    ("- devicematch: a\n  with: [{mounts: b}]", 2, 11, "the keys are path, containerpath, optional, permissions"),
    ("- devicematch: a\n  devicematch: b", 2, 3, 'the key "devicematch" is there twice'),
    ("- devicematch:", 1, 15, "expected a text, found nothing"),
    ("- devicematch: 42", 1, 16, 'put it in quotes, "42"'),
    ("- devicematch: true", 1, 16, "expected a text, found true or false"),
    ("- devicematch: '^a('", 1, 16, '"^a(" is not a regular expression: missing )'),
    ("- devicematch: a\n  nummaxdevices: -1", 2, 18, "-1 slots: must be 0 to 10000"),
    ("- devicematch: a\n  nummaxdevices: 10001", 2, 18, "10001 slots: must be 0 to 10000"),
    ("- devicematch: a\n  nummaxdevices: x", 2, 18, 'expected a whole number of slots, found a text ("x")'),
    ("- devicematch: a\n  nummaxdevices: '20'", 2, 18, 'a whole number of slots, found a text ("20")'),
    ("- devicematch: a\n  nummaxdevices: 0020", 2, 18, "0020: a number must be whole, and without zeros before it:"),
    ("- devicematch: a\n  nummaxdevices: 1.5", 2, 18, ': write 1; a text must be in quotes: "1.5"'),
    ("- devicematch: a\n  nummaxdevices: true", 2, 18, "expected a whole number of slots, found true or false"),
    ("- devicematch: a\n  nummaxdevices:", 2, 17, "expected a whole number of slots, found nothing"),
    ("- devicematch: a\n  resource: ''", 2, 13, "a text that is not empty"),
    ("- devicematch: a\n  resource: 5", 2, 13, "expected a text: put it in quotes"),
    ("- devicematch: a\n  resource: x\\1", 2, 13, r'"x\1": devicematch has no group \1'),
    ("- devicematch: (a)\n  resource: x\\2", 2, 13, r"devicematch has no group \2"),
    ("- devicematch: (a)\n  resource: \\g<n>", 2, 13, r"devicematch has no group \g<n>"),
    ("- devicematch: (a)\n  resource: \\g<2>", 2, 13, r"devicematch has no group \g<2>"),
    (f"- devicematch: (a)\n  resource: \\g<{'9' * 5000}>", 2, 13, "after a backslash, write a group"),
    ("- devicematch: a\n  resource: x\\y", 2, 13, "after a backslash, write a group of devicematch or an"),
    ("- devicematch: a\n  resource: x\\", 2, 13, "after a backslash, write a group of devicematch or an"),
    ("- devicematch: a\n  containerpath: video", 2, 18, '"video" must be an absolute path under /dev/'),
    ("- devicematch: a\n  containerpath: /sys/x", 2, 18, "under /dev/"),
    ("- devicematch: a\n  containerpath: /dev/a/../../x", 2, 18, 'must not have a ".."'),
    ('- devicematch: a\n  containerpath: "/dev/a\\0"', 2, 18, "expected a text without NUL"),
    ("- devicematch: a\n  containerpath: /dev/\\1", 2, 18, "has no group"),
    ("- devicematch: a\n  permissions: rwx", 2, 16, '"rwx" must be letters of r, w and m'),
    ("- devicematch: a\n  permissions: rr", 2, 16, "each once"),
    ("- devicematch: a\n  permissions: ''", 2, 16, "must be letters of r, w and m"),
    ("- devicematch: a\n  permissions: 7", 2, 16, "expected a text"),
    ("- devicematch: a\n  attributes: idVendor", 2, 15, 'a mapping of attributes, such as idVendor: "10c4"'),
    ("- devicematch: a\n  attributes: {}", 2, 15, "a mapping of attributes"),
    ("- devicematch: a\n  attributes: {idVendor: 1234}", 2, 26, 'put it in quotes, "1234"'),
    ("- devicematch: a\n  attributes: {idVendor: 0042}", 2, 26, 'a text must be in quotes: "0042"'),
    ("- devicematch: a\n  attributes: {idVendor: 1e04}", 2, 26, 'quote it ("1e04")'),
    ("- devicematch: a\n  attributes:\n    idVendor: '['", 3, 15, '"[" is not a regular expression'),
    ("- devicematch: a\n  attributes: {../x: a}", 2, 16, '"../x" is not an attribute of sysfs'),
    ("- devicematch: a\n  attributes: {'': a}", 2, 16, "is not an attribute of sysfs"),
    ("- devicematch: a\n  with: snd/timer", 2, 9, r'a list of paths below /dev, such as ["snd/controlC\1"]'),
    ("- devicematch: a\n  with: []", 2, 9, "a list of paths below /dev"),
    ("- devicematch: a\n  with: {b: c}", 2, 9, "a list of paths below /dev"),
    ("- devicematch: a\n  with: [b, /dev/c]", 2, 13, '"/dev/c" must be a path below /dev, such as snd/controlC0'),
    ("- devicematch: a\n  with:\n  - b/../../c", 3, 5, "must be a path below /dev"),
    ("- devicematch: a\n  with: ['?']", 2, 10, "a text that is not empty"),
    ("- devicematch: a\n  with: [b, c\\1]", 2, 13, "has no group"),
    ("- devicematch: a\n  with: [{}]", 2, 10, "expected a path below /dev, or a mapping with it"),
    ("- devicematch: a\n  with: [[b]]", 2, 10, "expected a path below /dev, or a mapping with it"),
    ("- devicematch: a\n  with: [{optional: true}]", 2, 10, "a companion needs a path"),
    ("- devicematch: a\n  with: [{path: b, optionl: true}]", 2, 20, 'unknown key "optionl"; did you mean optional?'),
    ("- devicematch: a\n  with: [{path: b, optional: 'yes'}]", 2, 30, "expected true or false, found a text"),
    ("- devicematch: a\n  with: [{path: 'b?'}]", 2, 17, 'write optional: true instead of the "?"'),
    ("- devicematch: a\n  with: [{path: /b}]", 2, 17, "must be a path below /dev"),
    ("- devicematch: a\n  with: [{path: a/../b}]", 2, 17, "must be a path below /dev"),
    ("- devicematch: a\n  with: [{path: b, containerpath: b}]", 2, 35, "must be an absolute path under /dev/"),
    ("- devicematch: a\n  with: [{path: b, containerpath: '/dev/\\1'}]", 2, 35, "has no group"),
    ("- devicematch: a\n  with: [{path: b, permissions: x}]", 2, 33, "must be letters of r, w and m"),
    ("- devicematch: a\n  resource: \\g<attr:>", 2, 13, "after a backslash, write a group of devicematch or an"),
    ("- devicematch: a\n  resource: \\g<attr:../b>", 2, 13, '"../b" is not an attribute of sysfs'),
    ("- devicematch: a\n  env: {A: '\\g<attr:/b>'}", 2, 12, '"/b" is not an attribute of sysfs'),
    ("- devicematch: a\n  with: [{path: '\\g<attr:a//b>'}]", 2, 17, '"a//b" is not an attribute of sysfs'),
    ("- devicematch: a\n  with: [7]", 2, 10, "expected a text: put it in quotes"),
    ("- devicematch: a\n  env: {}", 2, 8, r"a mapping of variables, such as CAMERA: /dev/\g<0>"),
    ("- devicematch: a\n  env: [A]", 2, 8, "a mapping of variables"),
    ("- devicematch: a\n  env: {A-B: c}", 2, 9, '"A-B" is not a name for a variable'),
    ("- devicematch: a\n  env: {A: 1}", 2, 12, 'put it in quotes, "1"'),
    ("- devicematch: a\n  env: {A: \\1}", 2, 12, "has no group"),
    ('- devicematch: a\n  env: {A: "b\\0"}', 2, 12, "a text without NUL"),
]


@pytest.mark.parametrize(("conf", "line", "column", "message"), BAD_RULES)
def test_a_bad_rule_is_refused_at_its_place(conf: str, line: int, column: int, message: str) -> None:
    with pytest.raises(sdm.ConfigError) as caught:
        sdm.parse_rules(conf)
    assert message in caught.value.message
    assert len(caught.value.message) < 300
    assert (caught.value.line, caught.value.column) == (line, column), str(caught.value)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["/dev/a\\1", "rw", "\\g<n>", "(a)"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(thorough, max_examples=LAW_EXAMPLES // 2)
@given(st.lists(st.dictionaries(st.sampled_from([*sdm._KEYS, "x"]), values, max_size=4) | values, max_size=3))
def test_any_document_is_rules_or_an_error_with_its_place(document: Any) -> None:
    try:
        rules = sdm.parse_rules(json.dumps(document, ensure_ascii=False))
    except sdm.ConfigError as error:
        assert error.line == 1
        return
    assert len(rules) == len(document)
    for rule in rules:
        hash(rule)
        for text in ("", "a", "video0"):
            match = rule.match.search(text)
            if match:
                for template in (rule.resource, rule.containerpath, *(text for _, text in rule.env)):
                    sdm.expand(template, match, dict.fromkeys(rule.values, "."))


def test_many_rules_are_read_in_time() -> None:
    before = time.monotonic()
    conf = "- devicematch: ^a$\n- devicematch: b\n  resource: a1\n" * (MIB // 50)
    assert len(sdm.parse_rules(conf)) == 2 * (MIB // 50)
    assert time.monotonic() - before < MANY_SECONDS


# ---------------------------------------------------------------------------------------------------------------------
# Command line: --check, --list, --dry-run, options and the environment
# ---------------------------------------------------------------------------------------------------------------------

GPU_RULE = "- devicematch: nvidia-gpu\n  nummaxdevices: {}\n"  # the one device that a test can make without root


def bare(*arguments: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script on a Python without site-packages, in 80 columns."""
    command = [sys.executable, "-I", "-S", str(script), *arguments]
    env = {"PATH": os.environ["PATH"], "COLUMNS": "80", **environment}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=env)


def test_check_says_that_a_conf_is_good_on_a_bare_python(node: Node) -> None:
    for rules, count in (("- devicematch: a\n", "1 rule"), ("- devicematch: a\n- devicematch: b\n", "2 rules")):
        node.rules(rules)
        done = bare(*node.options(), "--check")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{node.conf}: good, {count}\n", "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_conf_that_may_not_be_read(node: Node) -> None:
    node.rules("- devicematch: a\n")
    node.conf.chmod(0)
    done = node.run("--check")
    assert done.returncode == 1
    assert done.stderr == f"smarter_device_manager.py: cannot read the config file {node.conf}: Permission denied\n"


CONFIG_MAP = b"# Rules\napiVersion: v1\nkind: ConfigMap\ndata:\n  conf.yaml: |\n    - devicematch: ^video0$\n"
A_RULE = b"- devicematch: a\n"
BAD_KEY = b"# c\n- devicematch: ^a$\n  nummaxdevice: 5\n"
KEY_PROBLEM = 'unknown key "nummaxdevice"; did you mean nummaxdevices?'
REFUSED_COMMANDS = [
    # what stands at the config file's path (None: none is given), arguments, exit status, and the last line of stderr
    ("nothing", "--check", 1, "cannot read the config file CONF: No such file or directory"),
    ("folder", "--check", 1, "cannot read the config file CONF: Is a directory"),
    ("loop", "--check", 1, "cannot read the config file CONF: Too many levels of symbolic links"),
    (b"", "--check", 1, "CONF:1:1: the file has no rules; write a list: - devicematch: ^video[0-9]*$"),
    (A_RULE + b"# \xc3\xa9\xe9\n", "--check", 1, "CONF:2:4: this is not UTF-8; save the file as UTF-8"),
    ("- devicematch: a\n".encode("utf-16"), "--check", 1, "CONF:1:1: this is not UTF-8; save the file as UTF-8"),
    (A_RULE + b"#" * MIB, "--check", 1, "CONF:1:1: the file is longer than 1048576 bytes; is it a config file?"),
    (b"- devicematch: \x1b[31m\n", "--check", 1, "CONF:1:16: the character U+001B is not allowed: remove it"),
    (A_RULE + b'  permissions: "\\e[31m"\n', "--check", 1, r'CONF:2:16: "\x1b[31m" must be letters of r, w and m'),
    *[(BAD_KEY, mode, 1, f"CONF:3:3: {KEY_PROBLEM}") for mode in ("--check", "--list", "--dry-run", "")],
    (b"- devicematch: '('\n", "", 1, 'CONF:1:16: "(" is not a regular expression'),
    (CONFIG_MAP, "--check", 1, "CONF:2:1: this is a Kubernetes manifest; the config file is only the text under its "),
    (b"---\n" + CONFIG_MAP, "--check", 1, "CONF:3:1: this is a Kubernetes manifest; the config file"),
    (A_RULE + b"  resource: smarter-devices/zigbee\n", "--check", 1,
     'CONF:2:13: "smarter-devices/zigbee" must not have the domain, which --domain sets: write zigbee'),
    (A_RULE + b"  resource: example.com/zigbee\n", "--check", 1, '"example.com/zigbee" must not have the domain'),
    # Somebody may just have typed --conf, while --plugin-dir has its default; so the config file's error comes first.
    ("nothing", "--plugin-dir=/nowhere", 1, "cannot read the config file CONF: No such file or directory"),
    (A_RULE, "--plugin-dir=/nowhere", 1, "there is no directory /nowhere"),
    (A_RULE, "--plugin-dir=/nowhere", 1, "--dry-run"),
    (A_RULE, f"--plugin-dir={SCRIPT}", 1, f"there is no directory {SCRIPT} to use: Not a directory; is this a node"),
    (A_RULE, "", 1, "python3-grpcio"),
    *[(None, f"--status={address}", 2, f'"{address}" is not an ADDRESS:PORT, such as')
      for address in ("", "8080", "node", ":70000", "http://node:8080/")],
    *[(None, mode, 2, "error: --json goes with --list and --status")
      for mode in ("--json", "--check --json", "--dry-run --json")],
    (None, "--attributes=video0", 2, "--attributes goes with --list: --list --attributes /dev/video0"),
    (None, "--systemd-unit --conf=/home/pi/conf.yaml", 1, "/home/pi/conf.yaml is in a home folder"),
    (None, "--manifest --conf=/nowhere/conf.yaml", 1, "cannot read the config file /nowhere/conf.yaml: No such file"),
    (None, f"--manifest --conf={HERE}/daemonset.yaml", 1, f"{HERE}/daemonset.yaml:"),
    (None, "--manifest '--image=my image'", 2, '"my image" is not the name of an image, such as docker.io/'),
    (None, "--manifest --image=", 2, '"" is not the name of an image'),
    (None, "--manifest --namespace=Lab", 2, '"Lab" is not a namespace: lower-case letters'),
    *[(None, arguments, 2, "--image, --namespace, --pip-index and --pip-ca go with --manifest")
      for arguments in ("--list --namespace=lab", "--image=python", "--pip-ca=/ca.crt")],
    (None, "--manifest --pip-index=pypi.example.com", 2, '"pypi.example.com" is not a URL of an index that pip trusts'),
    (None, "--manifest --pip-ca=/nowhere/ca.crt", 1, "cannot read /nowhere/ca.crt: No such file or directory"),
    (None, f"--manifest --pip-ca={HERE}/conf.yaml", 1, f"{HERE}/conf.yaml has no CA certificate in PEM format"),
    (None, "--manifest --listen=127.0.0.1:80", 1, "--manifest does not take --listen 127.0.0.1:80: the kubelet probes"),
    (None, "--manifest --listen=:0", 1, "--manifest does not take --listen :0: the kubelet probes"),
    (None, "--manifest --node-name=pi", 1, "--manifest does not take --node-name: one manifest is for all nodes, and"),
    (None, "--manifest --cdi-dir=/c", 1, "--manifest does not take --cdi-dir: it goes with --api dra, which"),
    (None, "--manifest --list", 2, "not allowed with argument"),
]  # fmt: skip


@pytest.mark.parametrize(("conf", "arguments", "status", "problem"), REFUSED_COMMANDS)
def test_what_a_person_does_wrong_is_one_sentence(
    node: Node, conf: str | bytes | None, arguments: str, status: int, problem: str
) -> None:
    if isinstance(conf, bytes):
        node.conf.write_bytes(conf)
    elif conf == "folder":
        node.conf.mkdir()
    elif conf == "loop":
        node.conf.symlink_to(node.conf.name)
    done = bare(*(node.options() if conf is not None else ()), *shlex.split(arguments))
    assert (done.returncode, done.stdout) == (status, "")
    *usage, last = done.stderr.splitlines()
    assert last.startswith("smarter_device_manager.py: ") and problem.replace("CONF", str(node.conf)) in last
    assert bool(usage) == (status == 2), "the usage is shown for wrong options only"


def test_the_script_alone_has_the_rules_of_conf_yaml(node: Node) -> None:
    """Without a config file, the script says that it uses the built-in rules, which are those of conf.yaml."""
    assert yaml.safe_load(sdm.DEFAULT_CONF) == yaml.safe_load((HERE / "conf.yaml").read_text())
    alone = Path(shutil.copy(SCRIPT, node.root / "alone.py"))
    node.sysfs("gpu.0", {})
    run = functools.partial(bare, *node.options()[2:], script=alone)
    message = "alone.py: no config file is given, so the built-in default rules are used; --conf FILE names one\n"
    done = run("--check")
    assert (done.returncode, done.stdout) == (0, "the built-in default rules: good, 16 rules\n")
    assert done.stderr == message
    done = run("--list")
    assert "smarter-devices/nvidia-gpu0" in done.stdout and done.stderr == message
    (node.root / "conf.yaml").write_text("- devicematch: a\n")  # beside the script
    assert run("--check").stdout == f"{node.root}/conf.yaml: good, 1 rule\n"
    assert run("--check", "--conf", "/nowhere").stderr.startswith("alone.py: cannot read the config file /nowhere: ")


def test_usage_and_errors_begin_with_the_name_of_the_program(node: Node) -> None:
    called = node.root / "sdm"
    called.symlink_to(SCRIPT)
    assert bare(*node.options(), "--check", script=called).stderr.startswith("sdm: ")
    assert bare("--no-such-option", script=called).stderr.splitlines()[-1].startswith("sdm: ")
    assert "usage: sdm " in subprocess.run([called, "--help"], check=True, capture_output=True, text=True).stdout


def test_a_daemon_says_that_it_has_the_built_in_rules(node: Node) -> None:
    """And its errors begin with the name by which it was called, also after the restart as a module."""
    alone = node.root / "alone.py"
    for name in ("smarter_device_manager.py", "api_pb2.py", "api_pb2_grpc.py"):
        shutil.copy(HERE / name, node.root / ("alone.py" if name.startswith("smarter") else name))
    command = [sys.executable, str(alone), *node.options()[2:], "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        lines = []
        for line in daemon.stderr or ():
            lines.append(line)
            if "waiting for it" in line:
                break
        daemon.send_signal(signal.SIGHUP)  # which has nothing to read again
        daemon.terminate()
        lines += daemon.stderr or ()
    assert daemon.returncode == 0
    assert sum("the built-in default rules are used" in line for line in lines) == 1
    assert not any("read again" in line or "cannot" in line for line in lines)
    shutil.rmtree(node.plugins)
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.stderr.startswith("alone.py: there is no directory")


def test_list_shows_what_is_offered_and_what_is_left_out_and_why(node: Node) -> None:
    node.sysfs("gpu.0", {})
    (node.dev / "video0").write_text("")
    (node.dev / "odd").symlink_to("gone")
    node.rules(GPU_RULE.format(3) + "- devicematch: ^video\n- devicematch: ^odd$\n- devicematch: ^nothing$\n")
    done = bare(*node.options(), "--list")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [re.split(" {2,}", line.strip()) for line in done.stdout.splitlines()]
    assert ["3", "1", "smarter-devices/nvidia-gpu0"] in [row[:3] for row in rows]
    assert any(row[-1].startswith("a plain file") and "/dev/video0" in row and "3" in row for row in rows)
    assert any("which is not there" in row[-1] and "/dev/odd" in row and "4" in row for row in rows)
    assert ["5", "^nothing$"] in rows
    assert "^video" not in done.stdout


def test_dry_run_on_a_node_with_a_device(node: Node) -> None:
    node.sysfs("platform/gpu.7", {})
    node.rules(GPU_RULE.format(2))
    shutil.rmtree(node.plugins)  # a machine without Kubernetes
    done = node.run("--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "smarter-devices/nvidia-gpu7" in done.stdout
    assert "NVIDIA_VISIBLE_DEVICES=7" in done.stdout


@pytest.mark.parametrize(("mode", "status"), [("--list", 0), ("--dry-run", 1)])
def test_list_and_dry_run_say_so_when_there_is_nothing(node: Node, mode: str, status: int) -> None:
    node.rules("- devicematch: ^video\n- devicematch: ^snd$\n")
    done = bare(*node.options(), mode)
    assert (done.returncode, done.stderr) == (status, "")
    for message in ("No device would be offered", "^video", "^snd$"):
        assert message in done.stdout


def test_version_and_help() -> None:
    done = bare("--version")
    assert (done.returncode, done.stdout) == (0, f"smarter-device-manager {sdm.__version__}\n")
    done = bare("--help")
    assert done.returncode == 0
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    documented = {"--conf", "--config", "--plugin-dir", "--dev-dir", "--sys-dir", "--domain", "--interval"}
    documented |= {"--log-level", "--check", "--list", "--dry-run", "--version"}
    assert set(re.findall(r"--[a-z-]+", done.stdout)) >= documented


def test_the_environment_has_every_option_and_the_command_line_wins(node: Node) -> None:
    node.sysfs("gpu.0", {})
    node.rules(GPU_RULE.format(4))
    options = dict(zip(node.options()[::2], node.options()[1::2]))
    environment = {
        "SMARTER_DEVICE_MANAGER_" + name[2:].upper().replace("-", "_"): value for name, value in options.items()
    }
    environment |= {"SMARTER_DEVICE_MANAGER_DOMAIN": "example.org", "SMARTER_DEVICE_MANAGER_INTERVAL": "2"}
    assert "example.org/nvidia-gpu0" in bare("--list", **environment).stdout
    assert " other/nvidia-gpu0" in bare("--list", "--domain", "other", **environment).stdout
    other = node.root / "other.yaml"
    other.write_text("- devicematch: ^x$\n")
    for option in ("--conf", "--config"):
        assert bare("--check", option, str(other), **environment).stdout == f"{other}: good, 1 rule\n"
    assert bare("--check", **{**environment, "SMARTER_DEVICE_MANAGER_DOMAIN": ""}).returncode == 0  # as if not set


WRONG_VALUES = [
    *[("interval", value, f'"{value}" is not a number of seconds from 0.01 to 3600')
      for value in ("abc", "0", "nan", "-1", "3601")],
    *[("domain", value, f'"{value}" is not a domain that the kubelet accepts')
      for value in ("Bad_Domain", "x.kubernetes.io", "kubernetes.io", "requests.example.org", "a" * 245)],
    *[(option, "", '"" is not a path')
      for option in ("plugin-dir", "dev-dir", "sys-dir", "pod-resources-socket", "conf")],
    ("log-level", "loud", '"loud" is not a level: debug, info, warning, error'),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value", "message"), WRONG_VALUES)
def test_a_wrong_value_is_one_sentence(option: str, value: str, message: str) -> None:
    """It names the variable of the environment if the value is from there. An empty one counts as not set."""
    variable = "SMARTER_DEVICE_MANAGER_" + option.upper().replace("-", "_")
    for arguments, environment in (([f"--{option}={value}"], {}), ([], {variable: value} if value else None)):
        if environment is not None:
            done = bare("--check", *arguments, **environment)
            assert (done.returncode, done.stderr.count("\n")) == (2, 3)  # two lines of usage
            last = done.stderr.splitlines()[-1]
            assert re.search(f"argument --{option}(/--config)?: {re.escape(message)}", last)
            assert last.endswith(f"(from {variable})") == bool(environment)


def systemd_unit(node: Node, *arguments: str) -> dict[str, list[str]]:
    """The values per key of what --systemd-unit prints, with a Python that is not in a home folder."""
    python = node.root / "python3"
    if not python.is_symlink():
        python.symlink_to(os.path.realpath(sys.executable))
        shutil.copy(SCRIPT, node.root)
    command = [python, "-I", "-S", node.root / SCRIPT.name, "--systemd-unit", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    values: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            values.setdefault(key, []).append(value)
    return values


def test_the_unit_runs_this_script_with_the_options_beside_it(node: Node) -> None:
    unit = systemd_unit(node)
    assert unit["ExecStart"] == [f"{node.root}/python3 -m smarter_device_manager"]
    assert unit["WorkingDirectory"] == [str(node.root)]
    assert unit["ReadWritePaths"] == ["-/var/lib/kubelet/device-plugins"]
    assert (unit["Type"], unit["Restart"]) == (["notify"], ["on-failure"])
    assert {"kubelet.service", "k3s.service", "k3s-agent.service"} <= set(" ".join(unit["Before"]).split())
    options = {
        "--conf": "/etc/sdm.yaml", "--plugin-dir": "/p/50%", "--pod-resources-socket": "/r/kubelet.sock",
        "--dev-dir": "/d", "--sys-dir": "/s y", "--domain": "lab", "--interval": "0.50", "--log-level": "WARNING",
        "--log-format": "json", "--listen": ":1",
    }  # fmt: skip
    unit = systemd_unit(node, *(part for item in options.items() for part in item))
    assert unit["ReadWritePaths"] == ["-/p/50%%"]
    message = unit["ExecStart"][0].partition(" -m smarter_device_manager ")[2]
    shown = {**options, "--plugin-dir": "/p/50%%", "--interval": "0.5"}
    assert sorted(shlex.split(message)) == sorted(f"{name}={value}" for name, value in shown.items())
    environment = {  # every option that the daemon has, by the name of its variable in the environment
        action.option_strings[0]
        for action in sdm.build_parser()._actions
        if action.metavar and action.default is not None
    }
    dra_only = {"--api", "--kubelet-dir", "--cdi-dir", "--gone-grace"}
    dra_only |= {"--kube-api", "--kube-token-file", "--kube-ca-file"}
    assert environment - options.keys() - dra_only == {"--node-name"}


def test_the_unit_finds_pod_resources_and_grants_the_network_it_needs(node: Node) -> None:
    unit = systemd_unit(node, "--plugin-dir=/var/lib/k0s/kubelet/device-plugins")
    assert unit["ExecStart"][0].endswith(" --pod-resources-socket=/var/lib/k0s/kubelet/pod-resources/kubelet.sock")
    assert (unit["PrivateNetwork"], unit["RestrictAddressFamilies"]) == (["yes"], ["AF_UNIX"])
    unit = systemd_unit(node, "--listen=127.0.0.1:8080")
    assert unit["ExecStart"][0].endswith(" --listen=127.0.0.1:8080")
    assert (unit["IPAddressDeny"], unit["IPAddressAllow"]) == (["any"], ["localhost"])
    assert "PrivateNetwork" not in unit
    assert not {"PrivateNetwork", "IPAddressDeny"} & systemd_unit(node, "--listen=:8080").keys()


WORDS_OF_UNITS = {
    "/opt/a-b_c.d/@e:f=g,h+1": "/opt/a-b_c.d/@e:f=g,h+1", "100%": "100%%", "$HOME": "$$HOME", "a b": '"a b"',
    'a"b\\c': r'"a\"b\\c"', "it's;": '"it\'s;"', "é": '"é"',
}  # fmt: skip


@pytest.mark.parametrize("text", WORDS_OF_UNITS)
def test_quoting_in_a_unit(text: str) -> None:
    assert sdm._systemd_word(text, is_argument=True) == WORDS_OF_UNITS[text]
    assert sdm._systemd_word(text) == WORDS_OF_UNITS[text].replace("$$", "$")  # a path, in which $ begins no variable


def test_a_manifest_needs_the_stubs_and_daemonset_yaml(node: Node) -> None:
    script = Path(shutil.copy(SCRIPT, node.root))

    def fault() -> str:
        done = bare("--manifest", script=script)
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr.splitlines()[-1].partition(": ")[2]

    for name in ("api_pb2.py", "api_pb2_grpc.py", "daemonset.yaml"):
        assert fault().startswith(f"cannot read {node.root}/{name}: No such file or directory; the manifest is made")
        shutil.copy(HERE / name, node.root)
    daemonset = node.root / "daemonset.yaml"
    daemonset.write_text(daemonset.read_text().replace("containerPort: 8080", "containerPorts: 8080"))
    assert fault() == f"{daemonset} is not the one that came with this script: nothing in it matches containerPort: .*"


def test_every_option_has_its_place_in_a_manifest_and_in_a_unit(node: Node) -> None:
    modes = {"help", "check", "list", "dry_run", "status", "systemd_unit", "manifest", "version", "json", "attributes"}
    options = {action.dest: action.option_strings[0] for action in sdm.build_parser()._actions}
    assert sdm.MANIFEST_OPTIONS.keys() == options.keys() - modes
    for name, way in sdm.MANIFEST_OPTIONS.items():
        if way not in (sdm.ARGUMENT, sdm.PART):
            given = f"{options[name]}={1 if name == 'gone_grace' else '/x'}"
            refusal = bare("--manifest", given).stderr.splitlines()[-1]
            assert refusal.endswith(f"--manifest does not take {options[name]}: {way}")
            assert systemd_unit(node, given)["ExecStart"][0].endswith(f" {given}")


def test_a_manifest_takes_options_of_the_environment() -> None:
    done = bare("--manifest", SMARTER_DEVICE_MANAGER_LISTEN=":9100", SMARTER_DEVICE_MANAGER_INTERVAL="0.50")
    assert '            - --listen=:9100\n            - "--interval=0.5"\n' in done.stdout
    done = bare("--manifest", SMARTER_DEVICE_MANAGER_NODE_NAME="pi")
    assert (done.returncode, done.stdout) == (1, "")


def test_check_and_list_say_what_a_good_rule_means(node: Node) -> None:
    rules = [
        "devicematch: a\n  resource: My Zigbee!",
        "devicematch: /dev/video0",
        "devicematch: ^/dev/tty(USB|ACM)[0-9]*$",
        "devicematch: ^/dev/snd",
        "devicematch: ^(x)\n  resource: 'my \\1!'",  # what it becomes is known when there is a device
        "devicematch: ^dev/video0$\n  resource: zigbee",
    ]
    node.rules("".join(f"- {rule}\n" for rule in rules))
    notes = [
        'line 1: the resource "My Zigbee!" is offered as smarter-devices/My_Zigbee',
        "line 3: paths are matched without /dev/: write ^video0$",
        "line 4: paths are matched without /dev/: write ^tty(USB|ACM)[0-9]*$",
        "line 5: paths are matched without /dev/: write ^snd$",
    ]
    assert bare(*node.options(), "--check").stdout.splitlines()[1:] == notes
    assert bare(*node.options(), "--list").stdout.splitlines()[-4:] == notes
    assert bare(*node.options(), "--list", "--domain=lab").stdout.splitlines()[-4].endswith(" lab/My_Zigbee")
    json.loads(bare(*node.options(), "--list", "--json").stdout)
    node.rules("- devicematch: ^a$\n")
    assert "without /dev/" not in bare(*node.options(), "--list").stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may search every directory")
def test_a_plugin_directory_that_this_user_may_not_search(node: Node) -> None:
    node.rules(GPU_RULE.format(1))
    (node.plugins / "below").mkdir()
    node.plugins.chmod(0)
    for path in (node.plugins, node.plugins / "below"):
        done = bare(*node.options(), f"--plugin-dir={path}")
        message = f"smarter_device_manager.py: there is no directory {path} to use: Permission denied; "
        assert done.returncode == 1 and done.stderr.startswith(message) and "are you root?" in done.stderr
    node.plugins.chmod(0o700)


@pytest.mark.parametrize("mode", ["--list", "--list --json", "--check", "--manifest", "--help", "--version"])
@pytest.mark.parametrize("where", ["a reader that has gone", "a full disk", "nowhere"])
def test_output_that_cannot_be_written(node: Node, mode: str, where: str) -> None:
    """A reader goes when it has seen enough (head); a full disk is an error; a closed stdout is what somebody wants."""
    node.rules(GPU_RULE.format(1))
    command = [sys.executable, "-I", "-S", str(SCRIPT), *node.options(), *mode.split()]
    writer = os.open("/dev/full", os.O_WRONLY)
    if where == "a reader that has gone":
        reader, writer = os.pipe()
        os.close(reader)
    elif where == "nowhere":
        command = ["sh", "-c", '"$@" >&-', "sh", *command]
    done = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    full = "smarter_device_manager.py: cannot write the output: No space left on device\n"
    if where == "nowhere":
        assert done.returncode == 0 and "Traceback" not in done.stderr
    else:
        wanted = (1, full) if where == "a full disk" else (128 + signal.SIGPIPE, "")
        assert (done.returncode, done.stderr) == wanted


def test_a_relative_path_in_a_working_directory_that_is_gone(node: Node) -> None:
    command = ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", sys.executable, str(SCRIPT), "--check", "--conf=c.yaml"]
    (node.root / "cwd").mkdir()
    done = subprocess.run(command, check=False, cwd=node.root / "cwd", capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.endswith('"c.yaml" begins in the working directory, which is gone; write the whole path\n')


def test_a_daemon_that_offers_nothing_says_where_to_look(node: Node, start: Starter) -> None:
    node.rules("- devicematch: ^nothing$\n")
    daemon = start()
    daemon.says("WARNING no rule matches a device that can be offered; see --list\n")


def test_an_older_python_is_refused_in_one_line() -> None:
    """It must be able to read the whole file, and import all that comes before the check."""
    source = SCRIPT.read_text()
    for node in ast.walk(ast.parse(source, feature_version=(3, 7))):
        value = node.value if isinstance(node, ast.AnnAssign) else None
        if isinstance(value, ast.Tuple):  # which ast.parse() takes for 3.7, too
            assert (ast.get_source_segment(source, value) or "").startswith("("), value.lineno
    program = f"""
import __future__, pkgutil, runpy, sys
class NotThere:
    def find_spec(self, name, *_):
        raise AssertionError(f"Python 3.7 may not have {{name}}")
sys.meta_path.insert(0, NotThere())
for name in ("argparse", "typing", "dataclasses"):
    sys.modules.pop(name, None)
sys.version_info, sys.version = (3, 7, 17), "3.7.17 (default)"
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "smarter-device-manager needs Python 3.9 or newer; this is 3.7.17\n")


# ---------------------------------------------------------------------------------------------------------------------
# The conf file is followed
# ---------------------------------------------------------------------------------------------------------------------


def turns(daemon: Daemon, count: int) -> None:
    """Wait until the main thread of the daemon has polled COUNT times more; it sleeps in between."""
    status = Path(f"/proc/{daemon.process.pid}/status")

    def sleeps() -> int:
        found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)$", status.read_text(), re.MULTILINE)
        assert found
        return int(found[1])

    enough = sleeps() + count
    wait_for(lambda: sleeps() >= enough, f"{count} turns of the daemon")


@pytest.fixture
def gpu_daemon(node: Node, kubelet: Kubelet, start: Starter) -> Daemon:
    """A daemon that offers one GPU with one slot."""
    node.sysfs("gpu.0", {})
    node.rules(GPU_RULE.format(1))
    gpu_daemon = start()
    kubelet.wait_for("nvidia-gpu0", Healthy=1)
    return gpu_daemon


def test_a_conf_edited_in_place_or_replaced_is_followed(node: Node, kubelet: Kubelet, gpu_daemon: Daemon) -> None:
    """Also if neither its size nor its times tell."""
    node.conf.write_text(GPU_RULE.format(20))
    kubelet.wait_for("nvidia-gpu0", Healthy=20)
    node.rules(GPU_RULE.format(3))
    kubelet.wait_for("nvidia-gpu0", Healthy=3)
    before = node.conf.stat()
    for slots in range(4, 10):  # as fast as can be
        node.conf.write_text(GPU_RULE.format(slots))
        os.utime(node.conf, ns=(before.st_atime_ns, before.st_mtime_ns))
        kubelet.wait_for("nvidia-gpu0", Healthy=slots)
    assert kubelet.registrations.count("smarter-devices/nvidia-gpu0") == 1


def test_a_configmap_is_followed_by_its_link_swap(node: Node, kubelet: Kubelet, start: Starter) -> None:
    node.sysfs("gpu.0", {})
    folder = node.root / "config"
    folder.mkdir()

    def publish(version: int, text: str) -> None:
        """As kubelet's atomic writer does: a new folder, then the swap of ..data, then the old one goes."""
        (folder / f"..2026_{version}").mkdir()
        (folder / f"..2026_{version}/conf.yaml").write_text(text)
        (folder / "..data_tmp").symlink_to(f"..2026_{version}")
        (folder / "..data_tmp").rename(folder / "..data")
        shutil.rmtree(folder / f"..2026_{version - 1}", ignore_errors=True)

    publish(1, GPU_RULE.format(1))
    node.conf.symlink_to("config/conf.yaml")
    (folder / "conf.yaml").symlink_to("..data/conf.yaml")
    daemon = start()
    kubelet.wait_for("nvidia-gpu0", Healthy=1)
    for version in range(2, 5):
        publish(version, GPU_RULE.format(version))
        kubelet.wait_for("nvidia-gpu0", Healthy=version)
    assert "cannot read" not in daemon.log


def test_the_last_good_rules_stay_and_each_fault_is_one_line(node: Node, kubelet: Kubelet, gpu_daemon: Daemon) -> None:
    def refused() -> list[str]:
        return [line for line in gpu_daemon.log.splitlines() if "the last good rules stay in force" in line]

    node.rules("- devicematch: (\n")
    gpu_daemon.says(r"conf\.yaml:1:16: .* the last good rules stay in force")
    turns(gpu_daemon, 5)
    assert len(refused()) == 1
    node.rules("")
    gpu_daemon.says(r"conf\.yaml:1:1: the file has no rules.* the last good rules stay in force")
    node.conf.unlink()
    gpu_daemon.says(r"cannot read the config file .*: No such file or directory; the last good rules stay in force")
    node.conf.mkdir()
    gpu_daemon.says(r"cannot read the config file .*: Is a directory; the last good rules stay in force")
    turns(gpu_daemon, 5)
    assert len(refused()) == 4
    kubelet.wait_for("nvidia-gpu0", Healthy=1)
    node.conf.rmdir()
    node.rules(GPU_RULE.format(1))  # what is in force already
    gpu_daemon.says("the config file was read again")
    node.rules(GPU_RULE.format(5))
    kubelet.wait_for("nvidia-gpu0", Healthy=5)
    turns(gpu_daemon, 5)
    assert len(refused()) == 4
    assert gpu_daemon.log.count("the config file was read again") == 2
    assert kubelet.registrations.count("smarter-devices/nvidia-gpu0") == 1


def test_sighup_reads_the_config_file_at_once(node: Node, kubelet: Kubelet, start: Starter) -> None:
    node.sysfs("gpu.0", {})
    node.rules(GPU_RULE.format(1))
    daemon = start("--interval", "3600")
    kubelet.wait_for("nvidia-gpu0", Healthy=1)
    node.rules(GPU_RULE.format(2))
    node.sysfs("gpu.1", {})
    daemon.hang_up()
    kubelet.wait_for("nvidia-gpu0", Healthy=2)
    kubelet.wait_for("nvidia-gpu1", Healthy=2)


def test_a_broken_config_file_is_parsed_once_per_change(node: Node) -> None:
    good, bad = "- devicematch: ^a$\n", "- devicematch: ^a$\n" * 10000 + "- devicematch: (\n"
    node.rules(good)
    conf = sdm.ConfFile(str(node.conf))
    conf.follow()
    node.conf.write_text(bad)
    parsing = cpu_seconds(conf.follow)
    assert conf.error == f'{node.conf}:10001:16: "(" is not a regular expression: missing ), unterminated subpattern'
    assert cpu_seconds(conf.follow) < parsing / 200
    assert cpu_seconds(lambda: conf.follow(reread=True)) > parsing / 3
    assert (conf.failed_reloads, conf.reloads, len(conf.rules)) == (2, 0, 1)

    failures = 2
    for content, problem in (
        *[(f"{bad[:-2]}{character}\n", ":10001:16: ") for character in ")["],
        *[("", "No such file"), (f"{bad[:-2]}[\n", ":10001:16: ")],
        *[(good, ""), ("", "No such file"), (good, "")],  # these rules are in force
        ("\xff" * 900_000, ":1:1: this is not UTF-8"),
    ):
        node.conf.write_text(content, "latin-1") if content else node.conf.unlink()
        failures += bool(problem)
        assert not conf.follow() and problem in conf.error and bool(conf.error) == bool(problem)
        assert conf.failed_reloads == failures
    assert conf.reloads == 2
    assert cpu_seconds(conf.follow) < parsing / 200


def kept_conf(node: Node) -> Path:
    return node.plugins / f"smarter-device-manager-{sdm.DEFAULT_DOMAIN}.{zlib.crc32(os.fsencode(node.conf)):08x}.conf"


def test_the_last_good_rules_survive_a_restart(
    node: Node, kubelet: Kubelet, start: Starter, gpu_daemon: Daemon
) -> None:
    node.rules(GPU_RULE.format(2) + "# é\n")
    kubelet.wait_for("nvidia-gpu0", Healthy=2)
    assert stat.S_IMODE(kept_conf(node).stat().st_mode) == 0o600
    assert kept_conf(node).read_text() == GPU_RULE.format(2) + "# é\n"
    before = kept_conf(node).stat()
    node.rules(GPU_RULE.format(3) + "  nummaxdevice: 1\n")
    gpu_daemon.says("did you mean nummaxdevices.; the last good rules stay in force\n")
    gpu_daemon.stop()
    kubelet.down()
    kubelet.up()  # it removes sockets only
    again = start("--listen", "127.0.0.1:0")
    kubelet.wait_for("nvidia-gpu0", Healthy=2)
    again.says(f"ERROR .*conf.yaml:3:3: unknown key .* stay in force, from {kept_conf(node)}\n")
    status = Status(again)
    answer = status.wait_for("/readyz", 200)
    assert answer.body.splitlines()[0] == "ok"
    assert re.search("the config file is refused, the rules of .* stay in force: .*conf.yaml:3:3:", answer.body)
    assert status.metrics()["conf_good"] == 0
    conf = status.document()["conf"]
    assert ":3:3: unknown key" in conf["error"]
    assert abs(conf["read_at_seconds"] - before.st_mtime) < 1
    assert "the config file is refused, the rules of " in status.ask("/").body
    assert kept_conf(node).stat() == before
    assert "Traceback" not in again.log
    node.rules(GPU_RULE.format(4))
    kubelet.wait_for("nvidia-gpu0", Healthy=4)
    wait_for(lambda: status.metrics()["conf_good"] == 1)
    assert status.ask("/readyz").body == "ok\n"
    assert kept_conf(node).read_text().endswith(GPU_RULE.format(4))
    again.stop()
    node.conf.unlink()
    start()
    kubelet.wait_for("nvidia-gpu0", Healthy=4)


def test_only_a_kept_conf_that_is_good_is_used_and_not_by_modes(node: Node) -> None:
    node.sysfs("gpu.0", {})
    node.rules(GPU_RULE.format(1))
    for mode in ("--check", "--list", "--dry-run"):
        assert node.run(mode).returncode == 0
    assert not any(node.plugins.iterdir())
    kept = kept_conf(node)
    sdm.ConfFile(str(node.conf), str(kept)).follow()
    good = kept.read_bytes()
    node.rules("- devicematch: (\n")
    for mode in ("--check", "--list", "--dry-run"):
        assert node.run(mode).returncode == 1
    contents: Mapping[str, bytes | Callable[[Path], None]] = {
        "line 1, column 1: the file has no rules; .*": b"",
        "line 2, column .*": b"- devicematch: a\n  with",
        "line 1, column 16: this is not UTF-8; .*": b"- devicematch: \xff",
        f"line 1, column 1: the file is longer than {MIB} bytes; .*": good + b"#" * MIB,
        "Is a directory": Path.mkdir,
        "line 1, column 1: this is not a plain file; .*": os.mkfifo,
        "": lambda _: None,  # there is none
    }
    for problem, content in contents.items():
        kept.rmdir() if kept.is_dir() else kept.unlink()
        kept.write_bytes(content) if isinstance(content, bytes) else content(kept)
        done = node.run()
        *ignored, last = done.stderr.splitlines()
        assert done.returncode == 1 and f"{node.conf}:1:16: " in last
        pattern = f"WARNING the last good text of .*, kept in {kept}, is ignored: {problem}$"
        assert [bool(re.search(pattern, line)) for line in ignored] == [True] * bool(problem), done.stderr
    kept.write_bytes(good)
    conf = sdm.ConfFile(str(node.conf), str(kept))
    conf.follow()
    assert conf.text == GPU_RULE.format(1)


def test_a_conf_that_cannot_be_kept_is_one_warning(node: Node, kubelet: Kubelet, start: Starter) -> None:
    kept_conf(node).mkdir()
    node.sysfs("gpu.0", {})
    node.rules(GPU_RULE.format(1))
    daemon = start()
    for slots in (2, 3):
        node.rules(GPU_RULE.format(slots))
        kubelet.wait_for("nvidia-gpu0", Healthy=slots)
    daemon.says(f"WARNING cannot keep the last good text of .* for the next start: {kept_conf(node)}: Is a directory\n")
    assert daemon.log.count("cannot keep") == 1
    kept_conf(node).rmdir()
    node.rules(GPU_RULE.format(4))
    wait_for(lambda: kept_conf(node).exists() and kept_conf(node).read_text() == GPU_RULE.format(4))
    assert list(node.plugins.glob("smarter-device-manager-*")) == [kept_conf(node)]


def test_while_new_rules_cannot_be_kept_the_older_ones_stay(node: Node) -> None:
    """A disk that is full takes nobody's last good rules away, and they are better than none."""
    texts = [GPU_RULE.format(slots) for slots in (1, 2)]
    node.rules(texts[0])
    conf = sdm.ConfFile(str(node.conf), str(kept_conf(node)))
    conf.follow()
    assert kept_conf(node).read_text() == texts[0]
    node.rules(texts[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # as on a full disk, no file can be written
    try:
        assert conf.follow()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(node.plugins) == [kept_conf(node).name]
    node.rules("- devicematch: (\n")
    again = sdm.ConfFile(str(node.conf), str(kept_conf(node)))
    again.follow()
    assert again.text == texts[0]
    assert not conf.follow()
    assert kept_conf(node).read_text() == texts[1]
    for damage in (kept_conf(node).unlink, lambda: kept_conf(node).write_text(texts[0])):  # by another instance, say
        damage()
        conf.follow()
        assert kept_conf(node).read_text() == texts[1]
    before = kept_conf(node).stat()
    conf.follow(reread=True)
    assert kept_conf(node).stat() == before


@pytest.mark.parametrize(
    ("is_used", "text"),
    [
        *((False, text) for text in ("", "nothing", "7", "null", '"text"', '{"a": 1}', "[7]", '["x"]', "[{}]")),
        (False, "[" * 100_000),
        (False, '[{"resource": "r", "path": "p", "attributes": {}, "values": {}, "nodes": []}]'),  # of version 1.0.0
        (False, '[["r", "p", "b", [], 7, []]]'),
        (False, '[["r", "p", "b", [], [["a"]], []]]'),
        (False, '[["r", "p", "b", [], [[1, 2, 3]], []]]'),
        (False, '[["r", "p\\ud800", "b", [], [["serial", "1"]], []]]'),
        (True, '[[[], null, 8, 9, [[7, {}]], [["serial", 7.5]]]]'),
        (True, '[["r", "ttyUSB0", "b", [], {"serial": {"a": []}}, {"ab": 1}]]'),
        (True, "{}"),
    ],
)
def test_a_kept_file_of_any_content_does_not_end_the_start(
    node: Node, caplog: pytest.LogCaptureFixture, is_used: bool, text: str
) -> None:
    """It is used, or ignored with one line."""
    (node.plugins / "kept.devices").write_text(text)
    node.rules("- {devicematch: '', resource: pool, attributes: {serial: .*}}\n")
    side = sdm.DeviceSide(str(node.conf), str(node.dev), str(node.sys), str(node.plugins / "kept"))
    side.start()
    assert [record.event for record in caplog.records] == ["kept-devices-ignored"] * (not is_used)
    changes = sdm.ChangeLog()
    changes.take(side.plan)
    changes.flush(time.monotonic())
    for found in side.plan.resources.values():
        sdm._list_message(found).SerializeToString()


def test_the_kept_conf_of_a_long_domain_has_a_name_that_a_file_can_have() -> None:
    paths = {sdm.kept_path("/p", "a" * 240 + letter, "/conf") for letter in "bc"}
    assert len(paths) == 2
    assert all(len(os.path.basename(path)) < 220 for path in paths)


def test_a_config_file_that_takes_too_long_to_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f'- devicematch: "(?i){"k" * 20_000}"\n'
    monkeypatch.setattr(sdm, "PARSE_SECONDS", 0.01)
    with pytest.raises(sdm.ConfigError, match="takes more than 0 s to read; write fewer rules or shorter expressions"):
        sdm.parse_rules(text)
    assert sdm.parse_rules("- devicematch: good\n")


# ---------------------------------------------------------------------------------------------------------------------
# Devices: what is one. A made-up /dev is a mapping from path to what stands there; each case holds for plain data, for
# the scanner's look at real files, and for the look of an Allocate.
# ---------------------------------------------------------------------------------------------------------------------

KINDS = {"folder": sdm.FOLDER, "shared": sdm.FOLDER, "file": "plain file", "fifo": "FIFO", "socket": "socket"}
KINDS.update(char=sdm.CHAR, block=sdm.BLOCK)


def chars(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "char")


def snapshot_of(tree: Mapping[str, str]) -> sdm.Snapshot:
    """TREE as plain data. Values: a kind, "char 81:0" for a number, "-> target" for a link."""
    entries: dict[str, sdm.Entry] = {"": sdm.Entry(sdm.FOLDER)}
    for inode, (path, told) in enumerate(sorted(tree.items()), 1000):
        for depth in range(1, path.count("/") + 1):
            entries.setdefault("/".join(path.split("/")[:depth]), sdm.Entry(sdm.FOLDER))
        kind, _, number = told.partition(" ")
        if kind == "->":
            entries[path] = sdm.Entry(sdm.LINK, target=number)
        else:
            major, _, minor = (number or f"240:{inode}").partition(":")
            device = os.makedev(int(major), int(minor)) if KINDS[kind] in sdm.NODES else 0
            entries[path] = sdm.Entry(KINDS[kind], device, inode, untrusted=kind == "shared")
    folders: dict[str, list[str]] = {path: [] for path, entry in entries.items() if entry.kind == sdm.FOLDER}
    for path in sorted(filter(None, entries)):
        folders[path.rpartition("/")[0]].append(path.rpartition("/")[2])
    return sdm.Snapshot(entries, folders)


def build(dev: Path, tree: Mapping[str, str]) -> None:
    """Make TREE below DEV; nodes take root."""
    for own_minor, (path, told) in enumerate(tree.items(), 1):
        place = dev / os.fsdecode(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        kind, _, number = told.partition(" ")
        if kind == "->":
            place.symlink_to(number)
        elif kind in ("char", "block"):
            major, _, minor = (number or f"240:{own_minor}").partition(":")
            file_type = stat.S_IFCHR if kind == "char" else stat.S_IFBLK
            os.mknod(place, file_type | 0o600, os.makedev(int(major), int(minor)))
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


SHARED = "others than root may write in the folder /dev/pub"
# What a path in a made-up tree stands for: its nodes as path -> suffix, or why it is no device.
CASES: Sequence[tuple[str, Mapping[str, str], str, Mapping[str, str] | str]] = [
    ("a character device", {"video0": "char"}, "video0", {"video0": ""}),
    ("a block device", {"sda": "block"}, "sda", {"sda": ""}),
    ("a node in a folder", {"net/tun": "char"}, "net/tun", {"net/tun": ""}),
    (
        "a folder",
        {"snd/seq": "char", "snd/controlC0": "char", "snd/by/id/x": "block", "snd/note": "file", "snd/l": "-> seq"},
        "snd",
        {"snd/by/id/x": "/by/id/x", "snd/controlC0": "/controlC0", "snd/seq": "/seq"},
    ),
    ("a folder with no node", {"snd/note": "file", "a": "char", "snd/l": "-> ../a"}, "snd", "holds no device node"),
    ("an empty folder", {"snd": "folder"}, "snd", "holds no device node"),
    ("a plain file", {"file": "file"}, "file", "a plain file, not a device"),
    ("a socket", {"log": "socket"}, "log", "a socket, not a device"),
    ("a FIFO", {"initctl": "fifo"}, "initctl", "a FIFO, not a device"),
    ("a name that is not there", {"a": "char"}, "b", "it is gone"),
    ("a name too long for a file", {}, "n" * 256, "it is gone"),
    ("a path through a file", {"f": "file"}, "f/x", "a path through /dev/f, which is a plain file"),
    ("a link", {"by-id/x": "-> ../ttyUSB0", "ttyUSB0": "char"}, "by-id/x", {"ttyUSB0": ""}),
    ("a link of links", {"a": "-> b", "b": "-> d/c", "d/c": "-> ./../n", "n": "char"}, "a", {"n": ""}),
    ("a link to a folder", {"sound": "-> snd", "snd/seq": "char"}, "sound", {"snd/seq": "/seq"}),
    ("a path through a link", {"sound": "-> snd", "snd/seq": "char"}, "sound/seq", {"snd/seq": ""}),
    ("a climb inside", {"a/b/x": "-> ../../c/d/../e", "c/d/f": "file", "c/e": "char"}, "a/b/x", {"c/e": ""}),
    ("an absolute link", {"a": "-> /dev/b", "b": "char"}, "a", {"b": ""}),
    ("an absolute link in a folder", {"d/a": "-> /dev/b", "b": "char", "d/b": "file"}, "d/a", {"b": ""}),
    ("an absolute link that climbs inside", {"a": "-> /dev//c/../b", "b": "char", "c": "folder"}, "a", {"b": ""}),
    ("a dangling link", {"a": "-> b/c", "b": "folder"}, "a", "a link to /dev/b/c, which is not there"),
    ("a link to itself", {"a": "-> a"}, "a", "leads in a circle"),
    ("a circle of links", {"a": "-> d/b", "d/b": "-> ../a"}, "a", "leads in a circle"),
    ("40 links", {"n": "char", **{f"l{n}": f"-> l{n + 1}" for n in range(39)}, "l39": "-> n"}, "l0", {"n": ""}),
    ("41 links", {"n": "char", **{f"l{n}": f"-> l{n + 1}" for n in range(40)}, "l40": "-> n"}, "l0", "in a circle"),
    ("a link out of /dev", {"a": "-> ../null"}, "a", "a link that leaves /dev"),
    ("a link far out of /dev", {"d/a": "-> ../../../../../../../dev/null"}, "d/a", "a link that leaves /dev"),
    ("a link out of /dev and back", {"a": "-> ../dev/b", "b": "char"}, "a", "a link that leaves /dev"),
    ("an absolute link out", {"a": "-> /etc/passwd"}, "a", "a link to /etc/passwd, which leaves /dev"),
    ("an absolute link that climbs out", {"a": "-> /dev/../etc/passwd"}, "a", "a link that leaves /dev"),
    ("a link to a like name", {"a": "-> /devices/b"}, "a", "a link to /devices/b, which leaves /dev"),
    ("stdin", {"stdin": "-> /proc/self/fd/0"}, "stdin", "a link to /proc/self/fd/0, which leaves /dev"),
    ("the log", {"log": "-> /run/systemd/journal/dev-log"}, "log", "which leaves /dev"),
    ("a link to all of /dev", {"d/a": "-> ..", "n": "char"}, "d/a", "a link to all of /dev"),
    ("an absolute link to all of /dev", {"a": "-> /dev/", "n": "char"}, "a", "a link to all of /dev"),
    ("a link to a plain file", {"a": "-> f", "f": "file"}, "a", "a plain file, not a device"),
    ("a link through a file", {"a": "-> f/b", "f": "file"}, "a", "a path through /dev/f, which is a plain file"),
    ("a link through a node", {"a": "-> n/b", "n": "char"}, "a", "path through /dev/n, which is a character device"),
    ("a node in a shared folder", {"pub": "shared", "pub/n": "char"}, "pub/n", SHARED),
    ("a node deep in a shared folder", {"pub": "shared", "pub/d/n": "char"}, "pub/d/n", SHARED),
    ("a shared folder", {"pub": "shared", "pub/n": "char"}, "pub", SHARED),
    ("a shared folder in a folder", {"d/pub": "shared", "d/n": "char"}, "d", "write in the folder /dev/d/pub"),
    ("a link to a node in a shared folder", {"a": "-> pub/n", "pub": "shared", "pub/n": "char"}, "a", SHARED),
    ("a link through a shared folder", {"a": "-> pub/../n", "pub": "shared", "n": "char"}, "a", {"n": ""}),
    ("a planted link", {"pub": "shared", "pub/n": "-> ../sda", "sda": "block"}, "pub/n", SHARED),
    ("an absolute planted link", {"pub": "shared", "pub/n": "-> /dev/sda", "sda": "block"}, "pub/n", SHARED),
    ("a link to a planted one", {"a": "-> pub/n", "pub": "shared", "pub/n": "-> ../s", "s": "block"}, "a", SHARED),
    ("a folder planted below", {"pub": "shared", "pub/d/n": "-> ../../s", "s": "block"}, "pub/d/n", SHARED),
    ("a planted link in a folder", {"pub": "shared", "pub/a": "char", "pub/b": "-> ../s"}, "pub", SHARED),
    ("a link with a name of bytes", {"a\udcff": "-> n", "n": "char"}, "a\udcff", "is not UTF-8"),
    ("a link to a name of bytes", {"a": "-> n\udcff", "n\udcff": "char"}, "a", "is not UTF-8"),
    ("a folder with a name of bytes in it", {"d/ok": "char", "d/n\udcff": "char"}, "d", "is not UTF-8"),
]


def outcome(tree: sdm.Tree, path: str, dev_dir: str = "/dev") -> Mapping[str, str] | str:
    try:
        return {node.path: node.suffix for node in sdm.resolve(tree, path, dev_dir)}
    except sdm.NotADevice as error:
        return str(error)


@contextlib.contextmanager
def both_trees(dev: Path) -> Iterator[Sequence[sdm.Tree]]:
    """What the scanner sees in DEV, and what an Allocate does."""
    with sdm.LiveTree(str(dev)) as live:
        yield sdm.Scanner(str(dev)).scan(), live


@pytest.mark.parametrize("world", ["plain data", "scanner", "allocate"])
@pytest.mark.parametrize(("tree", "path", "wanted"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_is_a_device(
    world: str, tree: Mapping[str, str], path: str, wanted: Mapping[str, str] | str, node: Node
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    if world == "plain data":
        found = outcome(snapshot_of(tree), path)
    elif {"char", "block"} & set(tree.values()) and os.geteuid() != 0:
        pytest.skip("making device nodes takes root (mknod(2))")
    else:
        build(node.dev, tree)
        with both_trees(node.dev) as (scanned, live):
            found = outcome(scanned if world == "scanner" else live, path, str(node.dev))
    if isinstance(wanted, str):
        assert isinstance(found, str) and wanted in found
    else:
        assert found == wanted and list(found) == sorted(found)
    assert set(os.listdir("/proc/self/fd")) <= before  # what earlier tests left may be collected meanwhile


@needs_root
def test_a_node_made_again_with_the_same_inode_is_missing_once(tmp_path: Path) -> None:
    path = tmp_path / "ttyUSB0"
    os.mknod(path, stat.S_IFCHR | 0o600, 7)
    scanner = sdm.Scanner(str(tmp_path))
    before = scanner.scan().entry("ttyUSB0")
    wait_for(lambda: scanner.scan() is scanner.scan())
    path.touch()  # as udev does it
    assert scanner.scan(full=True).entry("ttyUSB0") == before
    time.sleep(2 * sdm.FRESH_NS / 1e9)  # a tick of the file system's clock
    path.unlink()
    os.mknod(path, stat.S_IFCHR | 0o600, 7)
    assert scanner.scan().entry("ttyUSB0") != before
    after = scanner.scan().entry("ttyUSB0")
    assert after and (after.kind, after.device) == (before.kind, before.device)
    assert scanner.scan().entry("ttyUSB0") == after


def test_absolute_links_are_seen_from_where_the_host_dev_is(tmp_path: Path) -> None:
    build(tmp_path / "d", {"a": f"-> {tmp_path}/d/f", "b": "-> /dev/f", "c": f"-> {tmp_path}/d2/f", "f": "file"})
    with sdm.LiveTree(f"{tmp_path}/d") as tree:
        for name in ("a", "b"):
            assert outcome(tree, name, f"{tmp_path}/d") == "a plain file, not a device"
        assert "leaves /dev" in outcome(tree, "c", f"{tmp_path}/d")
        assert "leaves /dev" in outcome(tree, "a", "/dev")


@needs_root
def test_owner_and_group_of_a_folder_say_who_may_plant_links(node: Node) -> None:
    folders = {
        "root": (0o775, 0, 0),
        "disk": (0o755, 0, 6),
        "group": (0o775, 0, 6),
        "user": (0o755, 1000, 0),
        "sticky": (0o1777, 0, 0),
    }
    build(node.dev, {"n": "char", **{f"{name}/l": "-> ../n" for name in folders}})
    for name, (mode, uid, gid) in folders.items():
        os.chown(node.dev / name, uid, gid)
        (node.dev / name).chmod(mode)
    with both_trees(node.dev) as trees:
        for tree in trees:
            assert outcome(tree, "root/l") == outcome(tree, "disk/l") == {"n": ""}
            for name in ("group", "user", "sticky"):
                assert outcome(tree, f"{name}/l") == f"others than root may write in the folder /dev/{name}"


def set_acl(folder: Path, user: tuple[int, int], group: tuple[int, int], mask: int) -> None:
    """Give FOLDER a POSIX ACL, as setfacl(1) does, for a USER and a GROUP: ID and permissions."""
    nobody = 0xFFFFFFFF
    entries = ((1, 7, nobody), (2, user[1], user[0]), (4, 5, nobody), (8, group[1], group[0]), (16, mask, nobody))
    acl = b"".join(struct.pack("<HHI", *entry) for entry in (*entries, (32, 5, nobody)))
    try:
        os.setxattr(folder, "system.posix_acl_access", struct.pack("<I", 2) + acl)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        pytest.skip("this file system has no ACLs")


@needs_root
def test_whom_an_acl_lets_write_may_plant_links_too(node: Node) -> None:
    """The group of the folder is root's, and its bits are the mask of the ACL."""
    acls = {
        "user": ((1000, 7), (1000, 5), 7),
        "group": ((1000, 5), (1000, 2), 7),
        "reader": ((1000, 5), (1000, 5), 7),
        "masked": ((1000, 7), (1000, 7), 5),
        "root": ((0, 7), (0, 7), 7),
    }
    build(node.dev, {"n": "char", **{f"{name}/l": "-> ../n" for name in acls}})
    for name, acl in acls.items():
        set_acl(node.dev / name, *acl)
        assert (node.dev / name).stat().st_mode & 0o77 == acl[2] << 3 | 5
    (node.root / "link").symlink_to(node.dev)
    for dev in (node.dev, node.root / "link"):
        with both_trees(dev) as trees:
            for tree, name in itertools.product(trees, acls):
                refused = f"others than root may write in the folder /dev/{name}"
                assert outcome(tree, f"{name}/l") == (refused if name in ("user", "group") else {"n": ""})
    set_acl(node.dev, (1000, 7), (0, 5), 7)
    with both_trees(node.dev) as trees:
        for tree in trees:
            assert outcome(tree, "n") == "others than root may write in the folder /dev/"


def test_the_live_tree_holds_few_folders_and_notices_swapped_ones(node: Node) -> None:
    build(node.dev, {"f": "file", **{f"many/{number}/a/b": "file" for number in range(99)}})
    before = len(os.listdir("/proc/self/fd"))
    with sdm.LiveTree(str(node.dev)) as tree:
        assert outcome(tree, "many") == "a folder that holds no device node"
        assert len(os.listdir("/proc/self/fd")) - before <= 4  # /dev, many, many/98 and many/98/a
        assert tree.names("many/3") == ["a"] and tree.entry("many/4/x") is None
        (node.dev / "many/5").rename(node.dev / "many/six")
        (node.dev / "many/5").mkdir()
        with pytest.raises(OSError, match="Stale file handle"):
            tree.names("many/5/a")


def mounted(node: Node, script: str, *code: str) -> str:
    """What the command CODE prints where the shell SCRIPT has mounted things, in a mount namespace of its own."""
    probe = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none {node.root} && mount -t tmpfs none {node.root}"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system in a namespace of its own is not possible here (unshare(1), mount(8))")
    command = ["unshare", "--mount", "sh", "-ec", f'cd {node.dev}\n{script}\nexec "$@"', "sh", *code]
    here = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=here, check=False)
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
    code = f"""
import smarter_device_manager as sdm
scanned = sdm.Scanner({str(node.dev)!r}).scan()
with sdm.LiveTree({str(node.dev)!r}) as live:
    for path in ("video0", "both/n", "shm", "shm/evil", "shm/deep", "link", "shm/back", "both/pts/0", "both"):
        for tree in (scanned, live):
            try:
                print(path, *[found.path for found in sdm.resolve(tree, path, "/dev")])
            except sdm.NotADevice as error:
                print(path, error)
"""
    inside = ("shm/evil", "shm/deep", "shm/back")  # which only the look of an Allocate could see
    told = dict.fromkeys(inside, "a path through /dev/shm, which is a mount") | {
        "video0": "video0",
        "both/n": "both/n",
        "shm": "another file system",
        "link": "a path through /dev/shm, which is a mount",
        "both/pts/0": "a path through /dev/both/pts, which is a mount",
        "both": "a folder with another file system in it, at /dev/both/pts",  # the runtime would look into it
    }
    found: dict[str, set[str]] = {}
    for line in mounted(node, MOUNTS, sys.executable, "-c", code).splitlines():
        path, _, outcome = line.partition(" ")
        found.setdefault(path, set()).add(outcome)
    for path, outcomes in found.items():
        assert told[path] in outcomes and outcomes <= {told[path], "it is gone"}, path
        assert len(outcomes) == 1 or path.startswith(("shm/", "both/pts/")), path
    assert found.keys() == told.keys()


@needs_root
def test_a_file_system_that_is_mounted_meanwhile_hides_what_was_there(node: Node) -> None:
    code = f"""
import subprocess
import smarter_device_manager as sdm
scanner = sdm.Scanner({str(node.dev)!r})
for command in ("true", "mount -t tmpfs none d && mknod d/evil c 240 1", "umount d"):
    subprocess.run(command, shell=True, check=True, cwd={str(node.dev)!r})
    for full in (False, True):
        found = scanner.scan(full)
        print(*found.entries, found.entries["d"].kind)
"""
    told = mounted(node, "mkdir d; mknod d/n c 240 1; sleep 0.05", sys.executable, "-c", code)
    there, hidden = [" d d/n folder"] * 2, [" d folder", " d mount"]
    assert told.splitlines() == [*there, *hidden, " d mount", there[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Polling
# ---------------------------------------------------------------------------------------------------------------------


class Opened:
    """Which files and folders below TOP are opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, top: Path) -> None:
        self._paths: list[str] = []
        real = os.open

        def opened(path: Any, *rest: Any, **more: Any) -> int:
            if str(path).startswith(str(top)):
                self._paths.append(os.path.relpath(path, top))
            return real(path, *rest, **more)

        monkeypatch.setattr(os, "open", opened)

    def by(self, work: Callable[[], Any]) -> list[str]:
        self._paths.clear()
        work()
        return sorted(self._paths)


class Clock:
    """A monotonic clock that stands still until told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def device_side(node: Node, conf: str) -> sdm.DeviceSide:
    node.rules(conf)
    return sdm.DeviceSide(str(node.conf), str(node.dev), str(node.sys))


def settle_times(scanner: sdm.Scanner) -> None:
    """Scan until the times of all folders are old enough to be trusted."""
    time.sleep(2 * sdm.FRESH_NS / 1e9)  # no condition to wait for: the time itself is what counts
    scanner.scan()


@pytest.fixture
def listed_folders(monkeypatch: pytest.MonkeyPatch, node: Node) -> Opened:
    return Opened(monkeypatch, node.dev)


def test_only_what_changed_is_listed(node: Node, listed_folders: Opened) -> None:
    build(node.dev, {"a/b/f": "file", "c/f": "file", "f": "file"})
    scanner = sdm.Scanner(str(node.dev))
    assert listed_folders.by(scanner.scan) == [".", "a", "a/b", "c"]
    settle_times(scanner)
    before = scanner.scan()
    assert listed_folders.by(scanner.scan) == []
    assert scanner.scan() is before
    build(node.dev, {"a/b/g": "file"})
    assert listed_folders.by(scanner.scan) == ["a/b"]
    after = scanner.scan()
    assert "a/b/g" in after.entries
    assert after.entries["a/b/f"] == before.entries["a/b/f"]
    settle_times(scanner)
    assert listed_folders.by(lambda: scanner.scan(full=True)) == [".", "a", "a/b", "c"]
    assert scanner.scan() is after


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
    assert side.turn() is None
os.access("/a-turn-begins", os.F_OK)
"""


def test_a_poll_is_a_stat_of_each_folder(node: Node) -> None:
    if not shutil.which("strace") or subprocess.run(["strace", "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace(1) is not installed, or may not trace here")
    build(node.dev, {f"bus/{number % 3}/f{number}": "file" for number in range(30)})
    node.rules("- devicematch: f[0-9]\n- devicematch: ^bus$\n  attributes: {name: x}\n")
    code = STRACE.format(conf=str(node.conf), dev=str(node.dev), sys=str(node.sys))
    trace = node.root / "trace"
    command = ["strace", "-f", "-o", str(trace), "-e", "trace=file,desc", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=HERE, check=False)
    assert done.returncode == 0, done.stderr
    turns = trace.read_text().split("a-turn-begins")[1:]
    assert len(turns) == 11
    for turn in turns[:-1]:
        asked = sorted(re.findall(r'stat[a-z0-9]*\((?:AT_FDCWD, )?"([^"]*)"', turn))
        folders = [str(node.dev), *(f"{node.dev}/bus{rest}" for rest in ("", "/0", "/1", "/2"))]
        assert asked == sorted(folders)
        assert re.findall(r'\b(?:open|openat)\((?:AT_FDCWD, )?"([^"]*)"', turn) == [str(node.conf)]
        assert not re.search(r"\b(getdents64|readlink)\(", turn)


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
        assert f"d/{number}" in scanner.scan().entries
        stamps.add(os.stat(node.dev / "d").st_mtime_ns)
    assert len(stamps) < 500


@pytest.mark.parametrize("seconds", [-1e9, 1e9], ids=["back", "forward"])
def test_times_that_were_set_hide_nothing(node: Node, listed_folders: Opened, ticks: None, seconds: float) -> None:
    """Whoever sets a folder's time back to what it was (cp -a, tar) hides no change, and forces no listing."""
    scanner = sdm.Scanner(str(node.dev))
    when = time.time_ns() + int(seconds * 1e9)
    for number in range(300):
        (node.dev / str(number)).touch()
        os.utime(node.dev, ns=(when, when))
        assert str(number) in scanner.scan().entries
    settle_times(scanner)
    assert listed_folders.by(scanner.scan) == []


def swap_links(node: Node) -> None:
    node.link("l", "g")
    (node.dev / "h").rename(node.dev / "g")
    (node.dev / "f").unlink()
    os.mkfifo(node.dev / "f")


def swap_folders(node: Node) -> None:
    (node.dev / "a").rename(node.root / "was-a")
    (node.dev / "b").rename(node.dev / "a")
    (node.root / "was-a").rename(node.dev / "b")


def swap_nodes(node: Node) -> None:
    for path, told in {"same": "char 240:1", "number": "char 240:4", "kind": "block 240:3"}.items():
        node.unplug(path)
        build(node.dev, {path: told})
    build(node.dev, {"new": "char 240:9"})
    (node.dev / "new").rename(node.dev / "moved")


def touch_node(node: Node) -> None:
    """As udev does it."""
    os.chown(node.dev / "same", 0, 6)
    (node.dev / "same").chmod(0o660)
    os.utime(node.dev / "same")


FILES = {"l": "-> f", "f": "file", "g": "file", "h": "file", "d/x": "file"}
FOLDERS = {"a/x": "file", "a/s/y": "file", "b/x": "file", "b/only": "file", "c/x": "file"}
CHARS = {"other": "char", "same": "char 240:1", "number": "char 240:2", "kind": "char 240:3", "moved": "char"}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("tree", "change", "changed"),
    [
        (FILES, swap_links, ["f", "g", "l"]),
        (FOLDERS, swap_folders, ["a", "a/x", "b", "b/x"]),
        pytest.param(CHARS, swap_nodes, ["kind", "moved", "number", "same"], marks=needs_root),
        pytest.param(CHARS, touch_node, [], marks=needs_root),
    ],
)
def test_a_name_that_stands_for_something_else_is_noticed(
    node: Node, tree: Mapping[str, str], change: Callable[[Node], None], changed: list[str], full: bool
) -> None:
    """At a full look and at the usual one; a node is missing in between."""
    build(node.dev, tree)
    scanner = sdm.Scanner(str(node.dev))
    scanner.scan()
    settle_times(scanner)
    before = scanner.scan().entries
    change(node)
    between, after = scanner.scan(full).entries, scanner.scan().entries
    there = before.keys() & after.keys()
    assert sorted(path for path in there if path not in between or before[path] != after[path]) == changed
    assert after == sdm.Scanner(str(node.dev)).scan().entries


def test_a_folder_that_goes_takes_what_is_in_it_along(node: Node) -> None:
    build(node.dev, {"a/b/f": "file", "g": "file"})
    build(node.root, {"out/secret": "file"})
    scanner = sdm.Scanner(str(node.dev))
    assert "a/b/f" in scanner.scan().entries
    shutil.rmtree(node.dev / "a")
    assert set(scanner.scan().entries) == {"", "g"}
    build(node.dev, {"a/b/f": "file"})
    assert "a/b/f" in scanner.scan().entries
    shutil.rmtree(node.dev / "a")
    (node.dev / "a").symlink_to(node.root / "out")
    found = scanner.scan().entries
    assert "a/secret" not in found and found["a"].kind == sdm.LINK
    node.dev.rename(node.root / "away")
    with pytest.raises(FileNotFoundError):
        scanner.scan()
    (node.root / "away").rename(node.dev)
    assert scanner.scan().entries == found


def test_a_folder_swapped_for_a_link_meanwhile_is_not_listed(node: Node) -> None:
    build(node.dev, {"a/b/f": "file"})
    build(node.root, {"out/b/secret": "file"})
    (node.dev / "l").symlink_to(node.root / "out")
    (node.dev / "ll").symlink_to(node.root / "out/b")
    folder, root = (node.dev / "a/b").lstat(), node.dev.stat()
    assert list(sdm._read_folder(f"{node.dev}/a/b", folder, root)[0]) == ["f"]
    for path in ("l/b", "ll", "a", "nowhere"):  # what stands there now is another one
        with pytest.raises(OSError):
            sdm._read_folder(f"{node.dev}/{path}", folder, root)


def test_who_may_write_into_a_folder_is_looked_at_once_a_minute(node: Node) -> None:
    """A chmod leaves no trace in the times of the folder above; a full look finds it."""
    build(node.dev, {"d/l": "-> f", "d/f": "file"})
    scanner = sdm.Scanner(str(node.dev))
    settle_times(scanner)
    (node.dev / "d").chmod(0o777)
    assert not scanner.scan().entries["d"].untrusted
    assert scanner.scan(full=True).entries["d"].untrusted


def test_a_full_look_comes_once_a_minute(node: Node, listed_folders: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    side = device_side(node, "- devicematch: x\n")
    side.start()
    time.sleep(2 * sdm.FRESH_NS / 1e9)
    side.turn()
    assert sdm.FULL_SCAN_SECONDS == 60
    for seconds, listed in ((0, []), (59, []), (1, ["."]), (0, []), (59.5, []), (1, ["."])):
        clock.now += seconds
        assert listed_folders.by(side.turn) == listed
    assert listed_folders.by(lambda: side.turn(reread=True)) == ["."]


@contextlib.contextmanager
def without_descriptors() -> Iterator[None]:
    """Let this process open nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_what_was_seen_still_counts(node: Node) -> None:
    build(node.dev, {"f": "file", "d/g": "file"})
    scanner = sdm.Scanner(str(node.dev))
    before = set(scanner.scan().entries)
    build(node.dev, {"h": "file", "d/i": "file"})
    with without_descriptors():
        found = scanner.scan()
    assert set(found.entries) == before
    assert set(scanner.scan().entries) == before | {"h", "d/i"}
    (node.sys / "devices/gpu.0").mkdir()
    side = device_side(node, "- devicematch: nvidia-gpu\n")
    side.start()
    with without_descriptors():
        assert side.turn(reread=True) is None and not problem_of(side, "nvidia-gpu0")


def test_a_folder_that_must_not_be_listed_is_told(node: Node) -> None:
    """Root has no such folder, but root without capabilities, as the daemon runs in its pod, has."""
    build(node.dev, {"d/f": "file", "e/f": "file"})
    node.rules("- devicematch: ^d$\n- devicematch: ^e$\n")
    without = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"] if os.geteuid() == 0 else []
    (node.dev / "d").chmod(0)
    command = [*without, sys.executable, str(SCRIPT), *node.options(), "--list", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    (node.dev / "d").chmod(0o755)
    assert {left["path"]: left["reason"] for left in json.loads(done.stdout)["left_out"]} == {
        "/dev/d": "a folder that cannot be listed, not a device",
        "/dev/e": "a folder that holds no device node",
    }


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
    return next_plan(sdm.EMPTY_PLAN, snapshot, matcher, 0.0, sys_dir, gpus)


def next_plan(
    previous: sdm.Plan,
    snapshot: sdm.Snapshot,
    matcher: sdm.Matcher,
    now: float = 0.0,
    sys_dir: str = "/nowhere",
    gpus: Sequence[str] = (),
) -> sdm.Plan:
    look = sdm.find_devices(snapshot, [f"nvidia-gpu{number}" for number in gpus], matcher, "/dev")
    sysfs = sdm.Sysfs(sys_dir)
    sysfs.refresh(look.wanted, [], False)
    return sdm.make_plan(previous, dataclasses.replace(look, chains=sysfs.chains, now=now))


def granted(resource: sdm.Resource, dev: Path) -> str:
    """The nodes that a container with the first slot of RESOURCE is given now, or the reason why none."""
    try:
        with sdm.LiveTree(str(dev)) as tree:
            given = sdm.allocate(resource, [sdm.slots_of(resource)[0].id], tree, str(dev))
    except sdm.AllocationError as error:
        assert error.code == "UNAVAILABLE"
        return str(error)
    return " ".join(host for spec in given.specs for host, _ in spec.nodes)


@needs_root
def test_a_link_that_is_swapped_again_and_again_leads_nowhere_else(node: Node) -> None:
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
    return {found.path: found.text for found in plan.left_out}


def test_of_paths_with_one_name_the_same_one_or_the_first_has_it() -> None:
    for winner, losers in (("a_b", ["a b", "a.b", "a/b"]), ("a b", ["a.b", "a/b"])):  # " " < "." < "/"
        plan = offered("- devicematch: ^a.b$\n", snapshot_of(chars(winner, *losers)))
        assert listed(plan) == {"a_b": [winner]}
        assert left(plan) == dict.fromkeys(losers, f"its resource's name a_b is taken by /dev/{winner}")


def test_a_path_without_a_letter_or_digit_is_left_out() -> None:
    plan = offered("- devicematch: ^[._-]*$\n", snapshot_of(chars("...", "_", "._a")))
    assert plan.resources == {}
    assert left(plan) == dict.fromkeys(("...", "_"), "its path has no letter or digit to make a resource name from")


def test_the_last_rule_that_names_a_device_counts() -> None:
    conf = "- devicematch: ^video\n  nummaxdevices: 2\n- devicematch: ^video1\n  nummaxdevices: 3\n- devicematch: x\n"
    plan = offered(conf, snapshot_of({"video0": "char", "video1": "char", "video10": "char"}))
    slots = {name: (found.devices[0].slots, found.devices[0].line) for name, found in plan.resources.items()}
    assert slots == {"video0": (2, 1), "video1": (3, 3), "video10": (3, 3)}
    assert [rule.pattern for rule in plan.unused] == ["x"]


def test_rules_without_effect_are_told() -> None:
    plan = offered("[{devicematch: a}, {devicematch: b, nummaxdevices: 2}]\n", snapshot_of(chars("b")))
    assert listed(plan) == {"b": ["b"]} and [rule.pattern for rule in plan.unused] == ["a"]
    plan = offered("- devicematch: ^log$\n", snapshot_of({"log": "socket"}))
    assert plan.unused == () and left(plan) == {"log": "a socket, not a device"}


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
    assert done.returncode == 1 and r"/dev/cam\n\x1b[31m2  a plain file, not a device" in done.stdout


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
    hub = "platform/scb/fd500000.pcie/pci0000:00/0000:00:00.0/0000:01:00.0/usb1"
    usb, interface = f"{hub}/1-1/{port}", f"{hub}/1-1/{port}/{port}:1.0"
    values = {"idVendor": vendor, "idProduct": product, "product": told, "serial": serial, "bcdDevice": "0100"}
    driver, inner = ("cdc_acm", interface) if tty.startswith("ttyACM") else ("cp210x", f"{interface}/{tty}")
    board.device(hub, {"idVendor": "1d6b", "serial": "x"})
    board.device(usb, values)
    board.device(interface, {"bInterfaceNumber": "00", "driver": f"-> ../../../../../../../../../bus/{driver}"})
    board.has(tty, number, f"{inner}/tty/{tty}", {"dev": number})


def test_attributes_hold_for_the_device_or_for_one_of_its_parents(board: Board) -> None:
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


def test_a_rule_that_does_not_fit_leaves_the_device_to_an_earlier_one(board: Board) -> None:
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
    told = 'its idVendor is "1a86" or "1d6b" (asked for: 10c4)'
    assert [(found.path, found.line, found.text) for found in plan.left_out] == [
        ("ttyUSB1", 4, f"{told}; its nowhere is not there (asked for: x)"),
        ("ttyUSB1", 7, told),
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
    board.device("pci0000:00", {"numa_node": "0"})
    devices = {
        "nvidia0": ("pci0000:80/gpu/drm", None, (1,)),
        "nvidia1": ("pci0000:00/gpu", "2", (2,)),
        "snd/a": ("pci0000:00/a", None, (0, 1)),
        "snd/b": ("pci0000:80/b", None, (0, 1)),
        "none": ("virtual/none", "-1", ()),
        "odd": ("virtual/odd", "\u00b2", ()),
        "huge": ("virtual/huge", str(2**63), ()),  # more than the API has bits for
        "long": ("pci0000:80/long", "9" * 4000, (1,)),
        "most": ("virtual/most", str(2**63 - 1), (2**63 - 1,)),
    }
    for minor, (path, (folder, value, _)) in enumerate(devices.items()):
        board.has(path, f"1:{minor}", folder, {} if value is None else {"numa_node": value})
    board.tree["unknown"] = "char 9:4"
    plan = board.plan("- devicematch: ^(snd|[a-z0-9]+)$\n")
    wanted = {path.partition("/")[0]: numa for path, (_, _, numa) in devices.items()} | {"unknown": ()}
    assert {name: found.devices[0].numa for name, found in plan.resources.items()} == wanted
    for found in plan.resources.values():
        sdm._list_message(found)


def problem_of(side: sdm.DeviceSide, resource: str) -> str:
    return side.plan.resources[resource].devices[0].problem


STICK = '- devicematch: ^stick\n  attributes: {idVendor: "10c4", idProduct: ea60}\n'


@needs_root
def test_sysfs_is_read_when_a_device_appears_and_not_on_every_poll(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    for name in ("stick0", "stick1", "stick2"):
        node.sysfs(f"usb1/{name}", {"idVendor": "10c4", "idProduct": "ea60"}, node.plug(name))
    node.sysfs("usb1/other", {"idVendor": "1a86"}, node.plug("stick3"))
    side = device_side(node, STICK)
    reads = Opened(monkeypatch, node.sys)
    assert reads.by(side.start)
    assert set(side.plan.resources) == {"stick0", "stick1", "stick2"}
    for _ in range(4):  # what stick3 lacks may still come; nothing else is read again
        clock.now += 1
        read = reads.by(side.turn)
        assert read and not [path for path in read if "stick" in path]
    clock.now += 2
    side.turn()
    for _ in range(5):
        clock.now += 1
        assert not reads.by(side.turn)
    node.plug("unrelated")
    assert not reads.by(side.turn)
    node.sysfs("usb1/new", {"idVendor": "10c4", "idProduct": "ea60"}, node.plug("stick4"))
    read = reads.by(side.turn)
    assert read and not [path for path in read if "stick" in path or "other" in path]
    assert "stick4" in side.plan.resources


@needs_root
@pytest.mark.parametrize("is_asked_again", [False, True])
def test_a_full_look_that_finds_nothing_new_sends_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch, is_asked_again: bool
) -> None:
    """Nor is a plan made for that, though all attributes are asked again."""
    node.plug("stick0")
    node.sysfs("usb1/1-1", {"idVendor": "10c4", "idProduct": "ea60"}, node.plug("stick1"))
    side = device_side(node, STICK if is_asked_again else "- devicematch: stick\n")
    side.start()
    before = side.plan
    reads = Opened(monkeypatch, node.sys)
    assert bool(reads.by(lambda: side.turn(reread=True))) == is_asked_again
    assert side.plan is before


@needs_root
def test_attributes_that_fitted_are_read_again_at_a_full_look(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    folder = node.sysfs("usb1/1-1", {"idVendor": "10c4", "idProduct": "ea60"}, node.plug("stick0"))
    side = device_side(node, STICK)
    side.start()
    (folder / "idProduct").write_text("eb00\n")
    clock.now += 59
    assert side.turn() is None
    clock.now += 1
    assert side.turn()
    assert problem_of(side, "stick0") == 'its idProduct is "eb00" and was "ea60"'
    (folder / "idProduct").write_text("ea60\n")
    clock.now += 60
    side.turn()
    assert problem_of(side, "stick0") == ""


@needs_root
@pytest.mark.parametrize("what", ["attribute", "device", "nothing"])
def test_a_device_that_its_attributes_chose_is_kept_for_ten_minutes(
    node: Node, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """When another device stands there, and when nothing does: Unhealthy in its place, so that what its pods are told
    comes from here. And for as long as its node is there, if that has another attribute."""
    clock = Clock(monkeypatch)
    folder = node.sysfs("usb1/1-1", {"idVendor": "10c4", "idProduct": "ea60"}, node.plug("stick0", minor=7))
    side = device_side(node, STICK + "- devicematch: ^other\n")
    side.start()
    chosen = side.plan.resources["stick0"].devices[0]
    if what != "attribute":
        node.unplug("stick0")
        shutil.rmtree(folder)
        side.turn()
        clock.now += 30
    if what == "attribute":
        (folder / "idProduct").write_text("eb00\n")
    elif what == "device":
        node.sysfs("usb1/1-2", {"idVendor": "1a86", "idProduct": "7523"}, node.plug("stick0", minor=7))
    began = clock.now if what == "attribute" else clock.now - 30
    side.turn(reread=True)
    for _ in range(2):
        lost = side.plan.resources["stick0"].devices[0]
        assert lost.problem and lost.since == began and bool(lost.specs) == (not lost.is_gone) == (what == "attribute")
        assert dataclasses.replace(lost, problem="", since=chosen.since, is_gone=False, specs=chosen.specs) == chosen
        assert "stick0" not in left(side.plan)
        clock.now = began + 599
        assert side.turn() is None
        node.rules("# another text\n" + STICK)
        side.turn(reread=True)
        chosen = dataclasses.replace(chosen, line=2)
    clock.now = began + 600
    assert bool(side.turn()) == (what != "attribute")
    assert bool(side.plan.resources) == (what == "attribute"), "its node is there"
    assert ("stick0" in left(side.plan)) == (what == "device")


@needs_root
def test_a_lost_device_goes_with_the_rule_that_chose_it(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = node.sysfs("usb1/1-1", {"idVendor": "10c4", "idProduct": "ea60"}, node.plug("stick0"))
    side = device_side(node, STICK)
    side.start()
    (folder / "idProduct").write_text("eb00\n")
    side.turn(reread=True)
    assert problem_of(side, "stick0")
    for rules in (STICK.replace("ea60", "ea61"), "- devicematch: ^stic$\n"):
        node.rules(rules)
        side.turn(reread=True)
        assert side.plan.resources == {}


@needs_root
def test_late_attributes_are_read_while_other_devices_come_and_go(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a stick with a loose contact."""
    clock = Clock(monkeypatch)
    folder = node.sysfs("usb1/stick0", {}, node.plug("stick0"))
    side = device_side(node, STICK)
    side.start()
    assert not side.plan.resources
    (folder / "idVendor").write_text("10c4")
    (folder / "idProduct").write_text("ea60")
    for name in ("loose0", "loose1"):
        clock.now += 1
        node.plug(name)
        side.turn()
    assert set(side.plan.resources) == {"stick0"}


@needs_root
def test_another_device_is_not_granted_for_one_chosen_by_attributes(node: Node) -> None:
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
        assert granted(found[name], node.dev) == f"/dev/{name}: another device has taken its place"


def test_what_sysfs_said_is_forgotten_with_the_node(board: Board) -> None:
    usb_serial(board, "ttyUSB0", "188:0", "1-1.2", "10c4", "ea60", "CP2102", "0001")
    sysfs = sdm.Sysfs(str(board.node.sys))
    entry = snapshot_of(board.tree).entries["ttyUSB0"]
    for inode in range(1000):
        node = entry._replace(inode=inode)
        sysfs.refresh({node: ("idVendor",)}, [], False)
        assert list(sysfs.chains) == [node] and "10c4" in sdm.values_of(sysfs.chains[node], "idVendor")
    assert max(len(found) for found in vars(sysfs).values() if isinstance(found, (dict, set))) == 1


# ---------------------------------------------------------------------------------------------------------------------
# --list --attributes
# ---------------------------------------------------------------------------------------------------------------------


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
    build(board.node.dev, board.tree)
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


FILE_NAMES = st.text(st.characters(exclude_characters="/\0"), min_size=1).filter(lambda name: name not in (".", ".."))


@given(st.dictionaries(FILE_NAMES, st.text(min_size=1), min_size=1, max_size=3), FILE_NAMES)
@example({"name": "value"}, "cam\n\x1b\U00018d090")
def test_what_is_shown_of_attributes_means_just_them(attributes: Mapping[str, str], path: str) -> None:
    telling = {name: value for name, value in attributes.items() if value.isprintable() and name.isprintable()}
    text = sdm.render_attributes(path, [{"folder": "/sys/devices/x", "attributes": telling}] if telling else [])
    (rule,) = sdm.parse_rules(text)
    assert rule.match.search(path) and not rule.match.search(path + "x") and not rule.match.search("x" + path)
    assert {found.name for found in rule.attributes} == set(telling)
    for found in rule.attributes:
        assert found.fits(telling) and not found.fits({found.name: telling[found.name] + "x"})


@needs_root
@pytest.mark.parametrize(
    ("path", "told"),
    [
        *[
            (path, path + " is not in {dev}; give a path such as /dev/video0 or video0")
            for path in ("nothing0", "/etc/passwd", "../sys", "/dev", "")
        ],
        ("f", "/dev/f is not a device: a plain file, not a device"),
        ("d", "/dev/d is not a device: a folder that holds no device node"),
        ("loop", "/dev/loop is not a device: a link that leads in a circle"),
        ("snd", "/dev/snd is a folder; name one of its nodes: /dev/snd/a, /dev/snd/b"),
        ("/dev/snd/b", "{sys} does not have /dev/snd/b (block device 8:3); --sys-dir names the host's /sys"),
    ],
)
def test_what_has_no_attributes_is_said_in_one_sentence(node: Node, path: str, told: str) -> None:
    build(node.dev, {"f": "file", "d": "folder", "loop": "-> loop", "snd/a": "char", "snd/b": "block 8:3"})
    done = node.run("--list", "--attributes", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"smarter_device_manager.py: {told.format(dev=node.dev, sys=node.sys)}\n"


def test_attributes_are_shown_by_a_bare_python() -> None:
    done = bare("--list", "--attributes", "/dev/null")
    if " does not have /dev/null (" in done.stderr:
        pytest.skip("this machine's sysfs does not have /dev/null")
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
    grant = sdm.allocate(found, ids or [sdm.slots_of(found)[0].id], tree, "/dev")
    nodes = {
        spec.container: spec.host + ("" if spec.permissions == "rw" else f" {spec.permissions}") for spec in grant.specs
    }
    assert len(nodes) == len(grant.specs)
    return nodes, dict(grant.env)


def refused(found: sdm.Resource, tree: sdm.Tree, *ids: str) -> tuple[str, str]:
    with pytest.raises(sdm.AllocationError) as caught:
        sdm.allocate(found, ids, tree, "/dev")
    return caught.value.code, str(caught.value)


def ids_of(found: sdm.Resource, healthy: bool = True) -> list[str]:
    return [slot.id for slot in sdm.slots_of(found) if (not slot.device.problem) == healthy]


SOUND = {"snd/pcmC1D0c": "char", "snd/controlC1": "char", "snd/timer": "char", "video0": "char", "cam": "-> video0"}
VIDEO = {"/dev/video0": "/dev/video0"}


@pytest.mark.parametrize(
    ("rule", "nodes", "env"),
    [
        ("devicematch: ^video0$", VIDEO, {}),
        ("devicematch: ^cam$", at("cam"), {}),
        ("devicematch: ^snd$", at("snd"), {}),
        ("{devicematch: ^video0$, permissions: r}", {"/dev/video0": "/dev/video0 r"}, {}),
        ("{devicematch: ^video0$, permissions: mwr}", {"/dev/video0": "/dev/video0 rwm"}, {}),
        (r"{devicematch: '^video([0-9])$', containerpath: '/dev/cam\1'}", {"/dev/cam0": "/dev/video0"}, {}),
        (r"{devicematch: ^video, containerpath: '/dev/c/\g<0>/x'}", {"/dev/c/video/x": "/dev/video0"}, {}),
        ("{devicematch: ^cam$, containerpath: /dev/x/}", {"/dev/x/cam": "/dev/cam"}, {}),
        ("{devicematch: ^video0$, containerpath: /dev//x///y}", {"/dev/x/y": "/dev/video0"}, {}),
        ("{devicematch: ^snd$, containerpath: /dev/card}", {"/dev/card": "/dev/snd"}, {}),
        ("{devicematch: ^cam$, containerpath: /dev/video0, with: [video0]}", {"/dev/video0": "/dev/cam"}, {}),
        (
            r"{devicematch: 'pcmC(\d+)D0c$', containerpath: /dev/mic, with: ['snd/controlC\1', 'snd/timer?', 'none?']}",
            {"/dev/mic": "/dev/snd/pcmC1D0c", **at("snd/controlC1", "snd/timer")},
            {},
        ),
        (
            r"{devicematch: 'pcmC(\d+)D0c$', containerpath: /dev/mic/, with: ['snd/controlC\1', cam], permissions: r}",
            {
                "/dev/mic/pcmC1D0c": "/dev/snd/pcmC1D0c r",
                "/dev/mic/controlC1": "/dev/snd/controlC1 r",
                "/dev/mic/cam": "/dev/cam r",
            },
            {},
        ),
        (
            r"{devicematch: 'pcmC(\d+)D0c$', containerpath: /dev/snd/pcmC0D0c, permissions: r, with: "
            r"[{path: 'snd/controlC\1', containerpath: /dev/snd/controlC0, permissions: rwm}, "
            r"{path: video0, containerpath: /dev/v/}, {path: none, optional: true}]}",
            {
                "/dev/snd/pcmC0D0c": "/dev/snd/pcmC1D0c r",
                "/dev/snd/controlC0": "/dev/snd/controlC1 rwm",
                "/dev/v/video0": "/dev/video0 r",
            },
            {},
        ),
        (
            r"{devicematch: ^video0$, containerpath: /dev/x/, with: [{path: snd, containerpath: /dev/card}, "
            r"{path: snd/timer, containerpath: '/dev/\g<0>//y/'}]}",
            {"/dev/x/video0": "/dev/video0", "/dev/card": "/dev/snd", "/dev/video0/y/timer": "/dev/snd/timer"},
            {},
        ),
        ("{devicematch: ^video0$, with: [snd, video0, cam]}", at("video0", "cam", "snd"), {}),
        (
            r"{devicematch: '^vi(?P<kind>d|D)eo(\d)?', env: {A: '/dev/\g<0>', B: '\2\g<kind>x', C_1: plain}}",
            VIDEO,
            {"A": "/dev/video0", "B": "0dx", "C_1": "plain"},
        ),
    ],
)
def test_what_a_container_is_given(rule: str, nodes: Given, env: Given) -> None:
    snapshot = snapshot_of(SOUND)
    (found,) = offered(f"- {rule}\n", snapshot).resources.values()
    assert given_to(found, snapshot) == (nodes, env)
    assert {spec.container for spec in found.devices[0].specs} == set(nodes)  # as --list shows it


@pytest.mark.parametrize(
    ("rule", "nodes"),
    [
        ("devicematch: ^cam$", {"/dev/cam": "/dev/video0"}),
        ("{devicematch: ^cam$, containerpath: /dev/x/}", {"/dev/x/cam": "/dev/video0"}),
        ("devicematch: ^snd$", at("snd/controlC1", "snd/pcmC1D0c", "snd/timer")),
        (
            "{devicematch: ^snd$, containerpath: /dev/card}",
            {f"/dev/card/{name}": f"/dev/snd/{name}" for name in ("controlC1", "pcmC1D0c", "timer")},
        ),
        (
            "{devicematch: ^video0$, with: [snd, snd/timer, cam]}",
            {**at("video0", "snd/controlC1", "snd/pcmC1D0c", "snd/timer"), "/dev/cam": "/dev/video0"},
        ),
    ],
)
def test_the_plan_knows_the_nodes_behind_links_and_in_folders(rule: str, nodes: Given) -> None:
    snapshot = snapshot_of(SOUND)
    (found,) = offered(f"- {rule}\n", snapshot).resources.values()
    grant = sdm.allocate(found, ["0"], snapshot, "/dev")
    assert {container: host for spec in grant.specs for host, container in spec.nodes} == nodes
    assert grant.specs == found.devices[0].specs


def test_resources_are_named_by_templates() -> None:
    conf = r"""
- {devicematch: '^(?P<kind>[a-z]+)([0-9])$', resource: 'my.\g<kind>s'}
- {devicematch: '^d/(.)(y)?$', resource: 'd \1\2'}
"""
    plan = offered(conf, snapshot_of(chars("video0", "video1", "audio1", "d/x")))
    assert listed(plan) == {"d_x": ["d/x"], "my_audios": ["audio1"], "my_videos": ["video0", "video1"]}
    assert all(found.pool for found in plan.resources.values())


def test_a_place_in_the_container_must_be_one() -> None:
    snapshot = snapshot_of(chars("a"))
    for template, place in ((r"/dev/\1/x", "/dev/x"), (r"/dev/\1", "/dev/a"), (r"/dev/x/\1.", "")):
        plan = offered(f"- {{devicematch: '^a()$', containerpath: '{template}'}}\n", snapshot)
        assert left(plan) == ({} if place else {"a": 'its path in a container would be "/dev/x/."'})
        assert not place or given_to(plan.resources["a"], snapshot)[0] == {place: "/dev/a"}


def test_the_place_of_a_companion_must_be_one_and_its_own() -> None:
    snapshot = snapshot_of({"a": "char", "b": "char", "c": "char"})
    conf = "- {{devicematch: '^(a).?$', with: [{{path: b, containerpath: {}}}, c]}}\n"
    for place, told in (("/dev/x/.", "/dev/x/."), ("'/dev/\\1/./y'", "/dev/a/./y")):
        plan = offered(conf.format(place), snapshot)
        assert left(plan) == {"a": f'its path in a container would be "{told}"'}
    with pytest.raises(sdm.ConfigError):
        offered(conf.format("/dev/.."), snapshot)
    for place, hosts in (("/dev/a", "/dev/a and /dev/b"), ("/dev/c", "/dev/b and /dev/c")):
        plan = offered(conf.format(place), snapshot)
        problem = f"{hosts} would both be {place} in the container"
        assert plan.resources["a"].devices[0].problem == problem
        assert refused(plan.resources["a"], snapshot, "0") == ("UNAVAILABLE", f"/dev/a: {problem}")


USB_SOUND = {
    "snd/controlC1": ("116:32", "usb1/1-1/1-1:1.0/sound/card1/controlC1", {}),
    "snd/pcmC1D0p": ("116:48", "usb1/1-1/1-1:1.0/sound/card1/pcmC1D0p", {"pcm_class": "generic"}),
}
BY_VALUES = r"""
- devicematch: ^snd/pcmC(\d)D0p$
  resource: card-\g<attr:id>
  containerpath: /dev/\g<attr:idVendor>/
  with: [{path: 'by/\g<attr:serial>', containerpath: '/dev/\g<attr:serial>/x', optional: true}]
  env: {SERIAL: '\g<attr:serial>', PORT: '\1\g<attr:serial>\g<attr:driver>'}
"""


def sound_card(board: Board, serial: str) -> None:
    for path, (number, folder, attributes) in USB_SOUND.items():
        board.has(path, number, folder, attributes)
    board.device("usb1/1-1/1-1:1.0", {"driver": "-> ../../../../bus/usb/drivers/snd-usb-audio"})
    board.device("usb1/1-1/1-1:1.0/sound/card1", {"id": "My Card"})
    board.device("usb1/1-1", {"idVendor": "0d8c", "serial": serial})
    board.device("usb1", {"idVendor": "1d6b", "serial": "fe980000.usb"})


def test_templates_hold_the_values_of_attributes(board: Board) -> None:
    sound_card(board, "A 1/b")
    board.tree["by/A_1_b"] = "char"
    plan = board.plan(BY_VALUES)
    snapshot = snapshot_of(board.tree)
    assert listed(plan) == {"card-My_Card": ["snd/pcmC1D0p"]}
    assert given_to(plan.resources["card-My_Card"], snapshot) == (
        {"/dev/0d8c/pcmC1D0p": "/dev/snd/pcmC1D0p", "/dev/A_1_b/x": "/dev/by/A_1_b"},
        {"SERIAL": "A_1_b", "PORT": "1A_1_bsnd-usb-audio"},
    )


def test_the_parent_in_which_attributes_hold_comes_first(board: Board) -> None:
    sound_card(board, "A1")
    conf = "- {devicematch: ^snd/pcm, env: {SERIAL: '\\g<attr:serial>', CARD: '\\g<attr:id>'}%s}\n"
    for attributes, serial in (("", "A1"), (', attributes: {idVendor: "1d6b"}', "fe980000.usb")):
        plan = board.plan(conf % attributes)
        assert dict(plan.resources["snd_pcmC1D0p"].devices[0].env) == {"SERIAL": serial, "CARD": "My_Card"}


def test_no_value_leads_out_of_its_place(board: Board) -> None:
    sound_card(board, "")
    told = {"snd/pcmC1D0p": r"its serial is longer than 200 characters (asked for: \g<attr:serial>)"}
    for serial in ("", "..", "\udcff/\x01", "x" * 200, "x" * 201):
        (board.node.sys / "devices/usb1/1-1/serial").write_bytes(os.fsencode(serial) + b"\n")
        plan = board.plan(BY_VALUES)
        assert left(plan) == (told if len(serial) > 200 else {})
        for found in plan.resources.values():
            for spec in found.devices[0].specs:
                assert os.path.normpath(spec.container) == spec.container
            assert all(re.fullmatch("[A-Za-z0-9_.-]*", value) for value in found.devices[0].env.values())


def test_a_device_without_an_attribute_of_a_template_is_left_out_whole(board: Board) -> None:
    board.has("ttyS0", "4:64", "platform/serial8250/tty/ttyS0", {"type": "4"})
    board.tree["ttyS1"] = "char 4:65"  # that sysfs does not know
    conf = "- devicematch: ^ttyS\n- {devicematch: ^ttyS, resource: 'x\\g<attr:serial>', env: {A: '\\g<attr:b/c>'}}\n"
    plan = board.plan(conf)
    assert plan.resources == {}
    told = r"its serial is not there (asked for: \g<attr:serial>); its b/c is not there (asked for: \g<attr:b/c>)"
    assert {(one.path, one.line, one.text, one.reason.label) for one in plan.left_out} == {
        (path, 2, told, "attributes") for path in ("ttyS0", "ttyS1")
    }
    plan = board.plan("- {devicematch: nvidia-gpu, env: {A: '\\g<attr:serial>'}}\n", gpus=["0"])
    assert left(plan) == {"nvidia-gpu0": "a Tegra's GPU has no attributes"}


@needs_root
def test_the_value_of_an_attribute_that_comes_late_is_found(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    side = device_side(node, "- {devicematch: ^stick, resource: 's\\g<attr:serial>'}\n")
    side.start()
    sticks = [node.plug("stick0"), node.plug("stick1")]
    side.turn()
    assert side.plan.resources == {}
    clock.now += 4
    node.sysfs("usb1/1-1", {"serial": "A1"}, sticks[0])
    assert side.turn()
    assert listed(side.plan) == {"sA1": ["stick0"]}
    clock.now += 10
    assert side.turn() is None
    node.sysfs("usb1/1-2", {"serial": "B2"}, sticks[1])
    assert side.turn() is None  # not asked for ever, but at every full look
    clock.now += sdm.FULL_SCAN_SECONDS
    side.turn()
    assert listed(side.plan) == {"sA1": ["stick0"], "sB2": ["stick1"]}
    node.unplug("stick0")
    shutil.rmtree(node.sys / "devices/usb1/1-1")
    clock.now += sdm.FULL_SCAN_SECONDS
    side.turn()
    assert side.plan.resources["sA1"].devices[0].problem == "it is gone"  # what it had is remembered


def test_the_document_of_a_conf_without_the_new_keys_is_what_it_was(board: Board) -> None:
    board.device("gpu.0", {})
    board.node.rules("- devicematch: nvidia-gpu\n- {devicematch: nvidia-gpu, env: {A: b}}\n- devicematch: ^x$\n")
    text = re.sub('"since": "[^"]*"', '"since": ""', board.node.run("--list", "--json").stdout)
    device = {
        "path": "nvidia-gpu0",
        "line": 2,
        "slots": 1,
        "healthy": True,
        "problem": "",
        "since": "",
        "numa": [],
        "nodes": [],
        "env": {"NVIDIA_VISIBLE_DEVICES": "0", "A": "b"},
    }
    document = {
        "resources": [{"name": "smarter-devices/nvidia-gpu0", "pool": False, "slots": 1, "devices": [device]}],
        "shared": [],
        "left_out": [],
        "unused": [{"line": 3, "pattern": "^x$"}],
    }
    assert text == json.dumps(document, indent=2) + "\n"


LINKED_STICK = {"ttyUSB0": "char 188:0", "serial/by-id/usb-x": "-> ../../ttyUSB0"}
CARD = {"snd/controlC0": "char", "snd/timer": "char", "video0": "char"}
BY_ID, BY_NUMBER = "- devicematch: ^serial/by-id/\n", "- {devicematch: ^ttyUSB, resource: zigbee}\n"


@pytest.mark.parametrize(
    ("tree", "conf", "wanted"),
    [
        (LINKED_STICK, BY_ID + BY_NUMBER, {"/dev/ttyUSB0": {("serial_by-id_usb-x", 1), ("zigbee", 2)}}),
        (
            LINKED_STICK,
            "- devicematch: usb\n- devicematch: USB\n",
            {"/dev/ttyUSB0": {("serial_by-id_usb-x", 1), ("ttyUSB0", 2)}},
        ),
        (LINKED_STICK, "- devicematch: (?i)usb\n", {"/dev/ttyUSB0": {("serial_by-id_usb-x", 1), ("ttyUSB0", 1)}}),
        (LINKED_STICK, "- {devicematch: '(?i)usb', resource: zigbee}\n", {}),  # a pool has it once
        (LINKED_STICK, "- devicematch: ^serial\n- {devicematch: ^serial/by, resource: z}\n", {}),  # the last counts
        (LINKED_STICK, BY_ID + BY_NUMBER.replace("}", ", nummaxdevices: 0}"), {}),  # no pod can have it
        (CARD, "- devicematch: ^snd$\n- devicematch: ^snd/t\n", {"/dev/snd/timer": {("snd", 1), ("snd_timer", 2)}}),
        (CARD, "- {devicematch: ^video0$, with: [snd/timer]}\n- devicematch: ^snd/t\n", {}),
        (CARD, "- {devicematch: ^video0$, with: [snd/timer]}\n- {devicematch: ^snd/c, with: [snd/timer]}\n", {}),
        (CARD, "- {devicematch: nvidia-gpu, with: [video0]}\n- devicematch: ^video0$\n", {}),
    ],
)
def test_a_node_that_several_resources_offer_is_found(
    board: Board, tree: dict[str, str], conf: str, wanted: Mapping[str, set[tuple[str, int]]]
) -> None:
    board.tree = tree
    shared = sdm.find_shared(board.plan(conf, ["0"]))
    assert {node: {(name, device.line) for name, device in offers} for node, offers in shared.items()} == wanted


def test_the_example_of_the_readme_offers_no_stick_twice(board: Board) -> None:
    usb_serial(board, "ttyUSB0", "188:0", "1-1.2", "10c4", "ea60", "Sonoff Zigbee 3.0 USB Dongle Plus", "A1")
    usb_serial(board, "ttyACM0", "166:0", "1-1.3", "2341", "0043", "Uno", "B2")
    board.tree |= {"serial/by-id/usb-z": "-> ../../ttyUSB0", "serial/by-id/usb-a": "-> ../../ttyACM0"}
    (conf,) = re.findall(r"```yaml\n(- devicematch: .*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    plan = board.plan(conf)
    assert listed(plan) == {"serial_by-id_usb-a": ["serial/by-id/usb-a"], "zigbee": ["serial/by-id/usb-z"]}
    assert not sdm.find_shared(plan)


@needs_root
def test_a_node_that_several_resources_offer_is_shown_and_logged_once(
    node: Node, kubelet: Kubelet, start: Starter
) -> None:
    build(node.dev, LINKED_STICK)
    node.rules(BY_ID + BY_NUMBER)
    daemon = start("--listen", "127.0.0.1:0")
    told = "/dev/ttyUSB0: several resources offer it (lines 1, 2), so several pods can have it at once"
    daemon.says(f"WARNING {re.escape(told)} devices=/dev/ttyUSB0\n")
    assert told in node.run("--check").stdout
    names = "smarter-devices/serial_by-id_usb-x, smarter-devices/zigbee"
    title = "Offered by several resources, so several pods can have it at once"
    assert f"\n{title}:\nLINE  NODE          RESOURCES\n1, 2  /dev/ttyUSB0  {names}\n" in node.run("--list").stdout
    status = Status(daemon)
    status.wait_for("/readyz", 200)
    shared = json.loads(node.run("--list", "--json").stdout)["shared"]
    assert shared == status.document()["shared"]
    assert shared[0]["offers"][0] == {"resource": names.split(",")[0], "path": "/dev/serial/by-id/usb-x", "line": 1}
    assert status.document()["problems"] == []
    assert f"<h2>{title}</h2>" in status.ask("/").body
    build(node.dev, {"ttyUSB1": "char 188:1"})
    node.link("serial/by-id/usb-y", "../../ttyUSB1")
    daemon.says("WARNING /dev/ttyUSB1: several resources")
    assert daemon.log.count(told) == 1


def test_what_rules_override(board: Board) -> None:
    for name in ("a", "b", "c"):
        board.tree[name] = "char"
    board.has("c", "240:7", "x/c", {"id": "1"})
    conf = "- devicematch: ^[a-c]$\n- devicematch: ^[ab]$\n- devicematch: ^a$\n- {devicematch: b, nummaxdevices: 2}\n"
    conf += "- {devicematch: ^c$, attributes: {id: '2'}}\n- {devicematch: '^[bc]$', env: {A: '\\g<attr:id>'}}\n"
    matcher = sdm.Matcher(sdm.parse_rules(conf))
    snapshot = snapshot_of(board.tree)
    plan = next_plan(sdm.EMPTY_PLAN, snapshot, matcher, 0.0, str(board.node.sys))
    shown = [" ".join(line.split()) for line in sdm.render_overridden(plan, matcher).splitlines()]
    # b lacks the attribute that line 6 puts into a variable, so nobody has it.
    assert shown[2:8] == ["LINE PATH BY LINE", "1 /dev/a 3", "1 /dev/c 6", "2 /dev/a 3", "5 /dev/c 6", ""]
    assert shown[9:] == ["LINE DEVICEMATCH BY LINE", "1 ^[a-c]$ 3, 6", "2 ^[ab]$ 3", "5 ^c$ 6"]


def test_a_device_without_its_companions_is_unhealthy_until_they_come() -> None:
    matcher = sdm.Matcher(sdm.parse_rules("- {devicematch: ^nvidia0$, with: [nvidiactl, 'nvidia-modeset?']}\n"))
    for tree, problem in (
        ({}, "it is gone"),
        ({"nvidiactl": "file"}, "a plain file, not a device"),
        ({"nvidiactl": "shared", "nvidiactl/x": "-> ../nvidia0"}, "others than root may write in the folder"),
        ({"nvidiactl": "char"}, ""),
        ({"nvidiactl": "char", "nvidia-modeset": "char"}, ""),
        ({}, "it is gone"),
    ):
        snapshot = snapshot_of({"nvidia0": "char", **tree})
        found = next_plan(sdm.EMPTY_PLAN, snapshot, matcher).resources["nvidia0"]
        assert ids_of(found, not problem) == ["0"]
        if problem:
            code, told = refused(found, snapshot, "0")
            assert code == "UNAVAILABLE" and told == f"/dev/nvidia0: {found.devices[0].problem}"
            assert told.startswith(f"/dev/nvidia0: it goes with /dev/nvidiactl: {problem}")
        else:
            assert set(given_to(found, snapshot)[0]) == {"/dev/nvidia0", *(f"/dev/{name}" for name in tree)}
            assert not found.devices[0].problem


def test_a_planted_companion_is_not_given() -> None:
    snapshot = snapshot_of({"a": "char", "sda": "block", "pub": "shared", "pub/b": "-> ../sda"})
    found = offered("- {devicematch: ^a$, with: [pub/b]}\n", snapshot).resources["a"]
    told = "it goes with /dev/pub/b: others than root may write in the folder /dev/pub"
    assert refused(found, snapshot, "0") == ("UNAVAILABLE", f"/dev/a: {told}") and found.devices[0].problem == told
    found = offered("- {devicematch: ^a$, with: ['pub/b?']}\n", snapshot).resources["a"]
    assert given_to(found, snapshot)[0] == at("a")


AB = {"a/x": "char", "b/x": "char"}


def test_a_device_with_two_nodes_at_one_place_is_unhealthy() -> None:
    for path, place, told in (("a/x", "/dev/c/", "/dev/c/x"), ("a", "/dev/b", "/dev/b/x")):
        conf = f"- {{devicematch: ^{path}$, containerpath: {place}, with: [b/x]}}\n"
        (found,) = offered(conf, snapshot_of(AB)).resources.values()
        assert found.devices[0].problem == f"/dev/a/x and /dev/b/x would both be {told} in the container"


def test_two_folders_at_one_place_in_the_container_are_refused() -> None:
    """Even with different names in them: kubelet would drop the second one."""
    snapshot = snapshot_of({"a/x": "char", "b/y": "char"})
    plan = offered("- {devicematch: '^[ab]$', resource: ab, containerpath: /dev/c}\n", snapshot)
    told = "/dev/a and /dev/b would both be /dev/c in the container"
    assert refused(plan.resources["ab"], snapshot, "a:0", "b:0") == ("FAILED_PRECONDITION", told)
    assert given_to(plan.resources["ab"], snapshot, "b:0")[0] == {"/dev/c": "/dev/b"}


CAMERAS = "- {devicematch: '^video[0-9]+$', resource: camera, nummaxdevices: 2}\n"


def test_the_slots_of_a_pool_name_their_device() -> None:
    tree = {"video0": "char", "video10": "char", "video2": "char"}
    (found,) = offered(CAMERAS, snapshot_of(tree)).resources.values()
    assert ids_of(found) == ["video0:0", "video0:1", "video10:0", "video10:1", "video2:0", "video2:1"]
    less = offered(CAMERAS, snapshot_of({"video2": "char", "video9": "char"})).resources["camera"]
    assert ids_of(less) == ["video2:0", "video2:1", "video9:0", "video9:1"]  # hot-plug and restart: the same IDs
    assert given_to(found, snapshot_of(tree), "video10:1")[0] == {"/dev/video10": "/dev/video10"}


def test_a_device_of_a_pool_that_goes_takes_only_its_own_slots_along() -> None:
    looks, snapshot = Looks(), snapshot_of(chars("video1"))
    looks.look(0, CAMERAS, ["video0", "video1"])
    looks.look(1, CAMERAS, ["video1"])
    found = looks.plan.resources["camera"]
    assert (ids_of(found, healthy=False), ids_of(found)) == (["video0:0", "video0:1"], ["video1:0", "video1:1"])
    assert refused(found, snapshot, "video0:1") == ("UNAVAILABLE", "/dev/video0: it is gone")
    assert given_to(found, snapshot, "video1:1")[0] == at("video1")


def test_what_is_no_id_of_a_pool_is_refused_by_name() -> None:
    snapshot = snapshot_of({"video0": "char"})
    found = offered(CAMERAS, snapshot).resources["camera"]
    for wrong in ("0", "video0", "video0:", "video0:2", "video0:00", "video0:-1", "video1:0", ":0", "video0:\u0661"):
        assert refused(found, snapshot, "video0:0", wrong) == ("INVALID_ARGUMENT", f'no device ID "{wrong}"')
    own = offered("- devicematch: .\n", snapshot).resources["video0"]
    for wrong in ("1", "video0:0", ":0", "", "00", "0\n", "9" * 5000):
        assert refused(own, snapshot, wrong) == ("INVALID_ARGUMENT", f'no device ID "{wrong[: sdm.MAX_SHOWN]}"')


def test_several_devices_of_a_pool_in_one_container() -> None:
    snapshot = snapshot_of({"ttyACM1": "char", "ttyACM0": "char", "hub": "char"})
    rule = r"devicematch: '^ttyACM(\d)$', resource: esp, nummaxdevices: 3, with: [hub]"
    found = offered(f"- {{{rule}, env: {{PORTS: '/dev/\\g<0>', ALL: x}}}}\n", snapshot).resources["esp"]
    nodes, env = given_to(found, snapshot, "ttyACM1:0", "ttyACM0:2", "ttyACM1:2")
    assert nodes == at("ttyACM0", "ttyACM1", "hub")
    assert env == {"PORTS": "/dev/ttyACM0,/dev/ttyACM1", "ALL": "x"}


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


def test_at_a_start_a_pool_comes_before_a_device_of_its_name() -> None:
    conf = "- devicematch: ^video[0-9]$\n- {devicematch: '^cam', resource: video1}\n"
    plan = offered(conf, snapshot_of(chars("video0", "video1", "cam")))
    assert listed(plan) == {"video0": ["video0"], "video1": ["cam"]} and plan.resources["video1"].pool
    assert left(plan) == {"video1": "its resource's name video1 is taken by the pool of line 2; rename the pool"}


@pytest.mark.parametrize("newcomer", ["cam.b", "a pool"])
def test_a_newcomer_does_not_take_over_the_name_of_another_device(newcomer: str) -> None:
    """Whatever it is, the holder keeps its name: while it is there, and in its ten minutes."""
    conf = "- devicematch: ^cam.b$\n- {devicematch: '^video', resource: cam_b}\n"
    other = {"cam.b": "cam.b", "a pool": "video0"}[newcomer]
    looks = Looks()
    assert looks.look(0, conf, ["cam_b"]) == {"cam_b": ""}
    assert looks.look(1, conf, ["cam_b", other]) == {"cam_b": ""}
    assert listed(looks.plan) == {"cam_b": ["cam_b"]}
    assert left(looks.plan) == {other: "its resource's name cam_b is taken by /dev/cam_b"}
    assert looks.look(2, conf, ["cam_b"]) == {"cam_b": ""} and left(looks.plan) == {}
    assert looks.look(3, conf, [other]) == {"cam_b": "it is gone"}
    assert listed(looks.plan) == {"cam_b": ["cam_b"]}
    assert looks.look(602, conf, ["cam_b", other]) == {"cam_b": ""} and listed(looks.plan) == {"cam_b": ["cam_b"]}
    assert looks.look(700, conf, [other]) == {"cam_b": "it is gone"}
    assert looks.look(1300, conf, [other]) == {"cam_b": ""} and listed(looks.plan) == {"cam_b": [other]}
    assert looks.look(1301, conf, ["cam_b", other]) == {"cam_b": ""} and listed(looks.plan) == {"cam_b": [other]}


def test_new_rules_leave_a_name_with_its_holder() -> None:
    looks = Looks()
    looks.look(0, "- devicematch: ^cam.b$\n", ["cam.b"])
    looks.look(1, "- devicematch: ^cam.b$\n  nummaxdevices: 2\n", ["cam.b", "cam_b"])
    assert listed(looks.plan) == {"cam_b": ["cam.b"]} and ids_of(looks.plan.resources["cam_b"]) == ["0", "1"]
    looks.look(2, "- devicematch: ^cam_b$\n", ["cam.b", "cam_b"])
    assert listed(looks.plan) == {"cam_b": ["cam_b"]}


def test_a_pool_offers_a_node_once_as_its_first_path() -> None:
    conf = "- {devicematch: '^(serial/|ttyUSB|snd)', resource: stick}\n"
    tree = {"serial/by-id/b": "-> ../../ttyUSB0", "ttyUSB0": "char", "ttyUSB1": "char", "serial/a": "-> ../ttyUSB0"}
    plan = offered(conf, snapshot_of({**tree, "snd/a": "char", "snd/b": "char"}))
    assert listed(plan) == {"stick": ["serial/a", "snd", "ttyUSB1"]}
    others = {"serial/by-id/b": "serial/a", "ttyUSB0": "serial/a", "snd/a": "snd", "snd/b": "snd"}
    told = {path: f"its pool offers the same node already, as /dev/{first}" for path, first in others.items()}
    assert left(plan) == {**told, "serial/by-id": "a folder that holds no device node"}
    own = offered("- devicematch: '^(serial/|ttyUSB)'\n", snapshot_of(tree))
    assert len(own.resources) == 4  # each by its own name, as ever


def test_a_node_is_in_a_pool_by_another_path_once_its_link_is_gone() -> None:
    matcher = sdm.Matcher(sdm.parse_rules("- {devicematch: '^(by-id/|tty)', resource: stick}\n"))
    plan = sdm.EMPTY_PLAN
    for tree, wanted in (
        ({"tty0": "char", "by-id/a": "-> ../tty0"}, {"by-id/a": ""}),
        ({"tty0": "char"}, {"by-id/a": "it is gone", "tty0": ""}),
        ({"tty0": "char", "by-id/b": "-> ../tty0"}, {"by-id/a": "it is gone", "by-id/b": ""}),
    ):
        snapshot = snapshot_of(tree)
        plan = next_plan(plan, snapshot, matcher)
        assert {device.path: device.problem for device in plan.resources["stick"].devices} == wanted


def test_a_pool_that_grows_beyond_its_list_leaves_the_newcomer_out() -> None:
    """What was offered stays, though it sorts last and becomes Unhealthy; and whatever still fits is taken."""
    conf = "- {devicematch: '^[a-z]+$', resource: pool, nummaxdevices: 10000}\n"
    there = [letter * 100 for letter in "bcd"]
    looks = Looks()
    looks.look(0, conf, there)
    assert listed(looks.plan) == {"pool": there}
    newcomer = "a" * 100
    looks.look(1, conf, [newcomer, *there, "e"])
    assert listed(looks.plan) == {"pool": [*there, "e"]}
    assert left(looks.plan) == {newcomer: "the list of its resource's slots would be longer than 4194304 bytes"}
    looks.look(2, conf, [newcomer])
    assert listed(looks.plan) == {"pool": [*there, "e"]}
    assert sdm._list_message(looks.plan.resources["pool"]).ByteSize() <= sdm.MAX_LIST_BYTES
    looks.look(602, conf, [newcomer])
    assert listed(looks.plan) == {"pool": [newcomer]}
    fresh = offered(conf, snapshot_of(dict.fromkeys([newcomer, *there], "char")))
    assert listed(fresh) == {"pool": [newcomer, *there[:2]]}


@pytest.mark.parametrize(
    ("in_use", "must", "size", "wanted"),
    [
        ([], [], 1, ["a:0"]),
        ([], [], 3, ["a:0", "b:0", "c:0"]),
        ([], [], 6, ["a:0", "b:0", "c:0", "a:1", "b:1", "c:1"]),
        (["a:0"], [], 1, ["b:0"]),
        (["a:1"], [], 3, ["b:0", "c:0", "a:0"]),
        (["a:0", "a:1"], [], 2, ["b:0", "c:0"]),
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
    assert sdm.preferred_allocation(found, available, must, size) == wanted
    assert sdm.preferred_allocation(found, reversed(available), must, size) == wanted
    strange = [*available, "z:0", "a:7", "junk"]
    assert sdm.preferred_allocation(found, strange, must, size) == wanted


@given(st.data())
def test_what_is_preferred_is_available_and_spread(data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 4))
    conf = f"- {{devicematch: ^.$, resource: pool, nummaxdevices: {slots}}}\n"
    found = offered(conf, snapshot_of(dict.fromkeys("abcde", "char"))).resources["pool"]
    available = data.draw(st.lists(st.sampled_from(ids_of(found)), unique=True, min_size=1))
    must = data.draw(st.lists(st.sampled_from(available), unique=True))
    size = data.draw(st.integers(len(must), len(available)))
    preferred = sdm.preferred_allocation(found, available, must, size)
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
        self.plan = sdm.EMPTY_PLAN

    def look(self, now: float, conf: str, names: Sequence[str] = (), gpus: Sequence[str] = ()) -> dict[str, str]:
        """The problem of each resource's device."""
        matcher = sdm.Matcher(sdm.parse_rules(conf))
        snapshot = snapshot_of(chars(*names))
        self.plan = next_plan(self.plan, snapshot, matcher, now, gpus=gpus)
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
def test_a_device_is_retired_as_soon_as_its_time_is_over(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdm, "EXPIRY_SECONDS", 1.0)
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
    assert looks.plan.resources["a"].devices[0].specs == (
        sdm.DeviceSpec("/dev/a", "/dev/b", "rw", (("/dev/a", "/dev/b"),)),
    )
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


def test_the_last_rule_counts_for_a_tegra_and_its_gpus_can_be_a_pool() -> None:
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


def test_where_the_gpus_of_a_tegra_are_found(node: Node) -> None:
    for path in ("gpu.0", "gpu.10", "platform/gpu.2", "gpu.x", "platform/17000000.gpu", "platform/gpu.2x", "xgpu.3"):
        (node.sys / "devices" / path).mkdir(parents=True)
    assert sdm.Sysfs(str(node.sys)).tegra_gpus() == ["nvidia-gpu0", "nvidia-gpu10", "nvidia-gpu2"]
    assert sdm.Sysfs("/nowhere").tegra_gpus() == []


# ---------------------------------------------------------------------------------------------------------------------
# The original's conf, and the examples of docs/config.md
# ---------------------------------------------------------------------------------------------------------------------

ORIGINAL = "".join(
    f"- devicematch: {pattern}\n  nummaxdevices: {slots}\n"
    for slots, patterns in (
        (20, "^snd$ ^gpiochip[0-9]*$ ^rtc0$ ^video[0-9]*$ ^vchiq$ ^vcsm.*$"),
        (40, "^gpiomem$"),
        (1, "^hci[0-9]*$ ^i2c-[0-9]*$ ^ttyUSB[0-9]*$ ^ttyACM[0-9]*$ ^ttyTHS[0-9]*$ ^ttyS[0-9]*$"),
        (10, "nvidia-gpu"),
    )
    for pattern in patterns.split()
)
ITS_DEVICES = {
    name: slots
    for slots, names in (
        (20, "gpiochip0 gpiochip10 rtc0 snd vchiq vcsm vcsm-cma video video0 video31"),
        (40, "gpiomem"),
        (1, "hci0 i2c-1 i2c-20 ttyACM0 ttyS0 ttyTHS2 ttyUSB0 ttyUSB15"),
        (10, "nvidia-gpu0"),
    )
    for name in names.split()
}


@pytest.mark.parametrize("digit", ["[0-9]", "[[:digit:]]", r"\d"])
def test_the_originals_conf_means_what_it_meant(digit: str) -> None:
    others = "gpiomem0 tty0 ttyprintk ttyS0x video0a xvideo0 v4l/video0 rtc rtc1 i2c1 vcs"
    names = ITS_DEVICES.keys() - {"snd", "nvidia-gpu0"} | {*others.split()} | {"snd/controlC0", "snd/timer"}
    snapshot = snapshot_of(chars(*names))
    plan = offered(ORIGINAL.replace("[0-9]", digit), snapshot, gpus=["0"])
    assert {name: len(sdm.slots_of(found)) for name, found in plan.resources.items()} == ITS_DEVICES
    for name, found in plan.resources.items():
        is_gpu = name == "nvidia-gpu0"
        assert given_to(found, snapshot) == (({}, {"NVIDIA_VISIBLE_DEVICES": "0"}) if is_gpu else (at(name), {}))


def page_conf(name: str) -> str:
    """The conf that docs/config.md shows after <!-- example: NAME -->."""
    found = re.search(rf"<!-- example: {name} -->\n```yaml\n(.*?)```", CONFIG_PAGE.read_text(), re.DOTALL)
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


def headset(board: Board) -> None:
    """A Raspberry Pi's own sound, and a USB headset that came first and so is card 0 now, or second and card 1."""
    sound_folder(board, 0, "platform/soc/bcm2835_audio", [("controlC0", 0), ("pcmC0D0p", 16)])
    board.device("platform/usb1/1-1.2", {"product": "Jabra EVOLVE 20 Headset"})
    sound_folder(board, 1, "platform/usb1/1-1.2/1-1.2:1.0", [("controlC1", 32), ("pcmC1D0c", 56), ("pcmC1D0p", 48)])
    board.has("snd/timer", "116:33", "virtual/sound/timer")


def webcam(board: Board) -> None:
    """A webcam with its metadata node, and another that has no name of its own."""
    for number, name, index in ((0, "046d_HD_Webcam_C270-video", 0), (1, "046d_HD_Webcam_C270-video", 1)):
        video(board, number, "platform/usb1/1-1.3/1-1.3:1.0", "HD Webcam C270", index)
        board.tree[f"v4l/by-id/usb-{name}-index{index}"] = f"-> ../../video{number}"
    video(board, 2, "platform/usb1/1-1.4/1-1.4:1.0", "old")
    board.tree["v4l/by-path/usb-old-video-index0"] = "-> ../../video2"


def modem(board: Board) -> None:
    usb_serial(board, "ttyUSB0", "188:0", "1-1.1", "0403", "6001", "FT232R", "A50285BI")
    usb_serial(board, "ttyUSB1", "188:1", "1-1.2", "0403", "6001", "FT232R", "B7/01 x")
    usb_serial(board, "ttyUSB2", "188:2", "1-1.3", "1a86", "7523", "USB Serial", "1")


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


EXAMPLES: Sequence[tuple[Callable[[Board], None], Mapping[str, tuple[int, Given, Given]], Mapping[str, str]]] = [
    (
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
        esp,
        {
            "esp ttyACM0": (1, at("ttyACM0"), {}),
            "esp ttyUSB0": (1, at("ttyUSB0"), {"ESP_PORT": "/dev/ttyUSB0"}),
            "esp ttyUSB1": (1, at("ttyUSB1"), {"ESP_PORT": "/dev/ttyUSB1"}),
        },
        {"ttyACM1": 'its idVendor is "1cf1"', "ttyUSB2": 'its idVendor is "0403"'},
    ),
    (
        camera,
        {
            "camera video0": (1, {"/dev/video0": "/dev/video0"}, {}),
            "camera video2": (1, {"/dev/video0": "/dev/video2"}, {}),
            "h264-decoder video10": (4, {"/dev/video10": "/dev/video10"}, {}),
        },
        {"video1": 'its index is "1" (asked for: 0)', "video3": 'its index is "1"', "video19": 'its name is "rpivid"'},
    ),
    (
        camera_pi5,
        {"camera video8": (1, {"/dev/video0": "/dev/video8"}, {})},
        {"video0": 'is "rp1-cfe-csi2_ch0"'},
    ),
    (
        capture,
        {"microphone snd/pcmC1D0c": (1, at("snd/pcmC1D0c", "snd/controlC1", "snd/timer"), {"ALSA_CARD": "1"})},
        {},
    ),
    (
        coral,
        {
            "coral apex_0": (1, at("apex_0"), {}),
            "coral-usb bus/usb/002/003": (1, at("bus/usb/002/003"), {}),
            "coral-usb bus/usb/002/004": (1, at("bus/usb/002/004"), {}),
        },
        {"bus/usb/002/005": 'its idProduct is "4ee7"'},
    ),
    (hailo, {"hailo hailo0": (4, at("hailo0"), {})}, {}),
    (
        headset,
        {
            "headset snd/pcmC1D0p": (
                1,
                {
                    "/dev/snd/pcmC0D0p": "/dev/snd/pcmC1D0p",
                    "/dev/snd/pcmC0D0c": "/dev/snd/pcmC1D0c",
                    "/dev/snd/controlC0": "/dev/snd/controlC1",
                    "/dev/snd/timer": "/dev/snd/timer",
                },
                {},
            )
        },
        {"snd/pcmC0D0p": "its product is not there"},
    ),
    (
        webcam,
        {
            "webcam v4l/by-id/usb-046d_HD_Webcam_C270-video-index0": (
                1,
                {
                    "/dev/video0": "/dev/v4l/by-id/usb-046d_HD_Webcam_C270-video-index0",
                    "/dev/video1": "/dev/v4l/by-id/usb-046d_HD_Webcam_C270-video-index1 r",
                },
                {},
            )
        },
        {},
    ),
    (
        modem,
        {
            "modem ttyUSB0": (1, {"/dev/modem": "/dev/ttyUSB0"}, {"MODEM_SERIAL": "A50285BI"}),
            "modem ttyUSB1": (1, {"/dev/modem": "/dev/ttyUSB1"}, {"MODEM_SERIAL": "B7_01_x"}),
        },
        {"ttyUSB2": 'its idVendor is "1a86"'},
    ),
    (
        render,
        {
            "render dri/renderD128": (8, at("dri/renderD128"), {}),
            "render-amd dri/renderD129": (8, at("dri/renderD129"), {}),
        },
        {"dri/renderD130": 'its driver is "nouveau"'},
    ),
    (
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


@pytest.mark.parametrize(("made", "wanted", "not_wanted"), EXAMPLES, ids=[found[0].__name__ for found in EXAMPLES])
def test_the_examples_of_the_page_find_what_they_say(
    made: Callable[[Board], None],
    wanted: Mapping[str, tuple[int, Given, Given]],
    not_wanted: Mapping[str, str],
    board: Board,
) -> None:
    made(board)
    plan = board.plan(
        page_conf(made.__name__.partition("_")[0]), [name[10:] for name in sdm.Sysfs(str(board.node.sys)).tegra_gpus()]
    )
    assert not sdm.find_shared(plan)
    snapshot = snapshot_of(board.tree)
    assert {
        f"{found.name} {device.path}": (device.slots, *given_to(one, snapshot))
        for found in plan.resources.values()
        for device in found.devices
        for one in [dataclasses.replace(found, devices=(device,))]
    } == wanted
    reasons = {path: [one.text for one in plan.left_out if one.path == path] for path in not_wanted}
    for path, reason in not_wanted.items():
        assert any(reason in told for told in reasons[path]), (path, reasons[path])
    paths = {line.rpartition(" ")[2] for line in wanted}
    assert not paths & not_wanted.keys()


def test_every_example_of_the_page_is_tested() -> None:
    shown = re.findall(r"<!-- example: (.*) -->", CONFIG_PAGE.read_text())
    assert sorted(shown) == sorted({found[0].__name__.partition("_")[0] for found in EXAMPLES}) == sorted(set(shown))


def test_the_table_of_keys_is_whole_and_its_examples_are_good() -> None:
    rows = dict(re.findall(r"^\| `([a-z]+)` \| .* \| `(.*)` \|$", CONFIG_PAGE.read_text(), re.MULTILINE))
    assert list(rows) == list(sdm._KEYS)
    for key, value in rows.items():
        more = "" if key == "devicematch" else "\n  devicematch: ^(.)$"
        (rule,) = sdm.parse_rules(f"- {key}: {value}{more}\n")
        assert getattr(rule, sdm._FIELDS.get(key, key))


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
    daemon.says(r"Unhealthy: it goes with /dev/nvidiactl: it is gone")
    node.plug("nvidiactl")
    kubelet.wait_for("gpu", Healthy=4, Unhealthy=0)
    assert kubelet.registrations == [kubelet.name("gpu")]
    daemon.stop()
    start()
    kubelet.wait_for("gpu", Healthy=4)
    assert set(kubelet.health("gpu")) == set(topology)


@needs_root
def test_a_device_that_flaps_between_two_polls_is_unhealthy_once(node: Node, kubelet: Kubelet, start: Starter) -> None:
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
def test_a_loose_contact_is_a_line_of_the_log_per_second(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    """With the number of changes that it stands for."""
    node.plug("video0")
    daemon = serve("video0", rules="- devicematch: ^video\n", options=("--interval", "3600"))
    began = time.monotonic()
    for _ in range(20):
        node.unplug("video0")
        kubelet.wait_for("video0", Unhealthy=1)
        node.plug("video0")
        kubelet.wait_for("video0", Healthy=1)

    def counts() -> list[int]:
        pattern = r"video0: (?:Unhealthy|Healthy)[^(\n]*(?:\((\d+) changes since its last line\))?"
        return [int(count or 1) for count in re.findall(pattern, daemon.log)]

    wait_for(lambda: sum(counts()) == 40, lambda: daemon.log)
    assert len(counts()) <= 2 + time.monotonic() - began


@needs_root
def test_an_edit_of_the_conf_registers_only_what_is_new(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    node.plug("video0")
    serve("video0", rules="- devicematch: ^video\n")
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
def test_a_dev_that_cannot_be_seen_for_a_while(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    node.plug("video0")
    daemon = serve("video0", rules="- devicematch: ^video\n")
    node.dev.rename(node.root / "away")
    kubelet.wait_for("video0", Unhealthy=1)
    with pytest.raises(grpc.RpcError) as caught:
        kubelet.take("video0", "0")
    assert caught.value.details() == "smarter-devices/video0: cannot look at /dev: No such file or directory"
    (node.root / "away").rename(node.dev)
    kubelet.wait_for("video0", Healthy=1)
    assert daemon.log.count(f"cannot look at {node.dev}: No such file or directory") == 1


def test_names_that_never_return_do_not_pile_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdm.Matcher, "MAX_REMEMBERED", 100)
    clock = Clock(monkeypatch)
    side = device_side(node, "- devicematch: ^bus/\n")
    side.start()
    for number in range(200):
        build(node.dev, {f"bus/{number}": "file"})
        side.turn()
        node.unplug(f"bus/{number}")
    assert left(side.plan) == {"bus/199": "a plain file, not a device"}
    clock.now += sdm.FULL_SCAN_SECONDS
    side.turn()
    assert left(side.plan) == {}
    assert not side._look.devices and not side._look.problems
    assert side._matcher.find.cache_info().currsize <= 100


# ---------------------------------------------------------------------------------------------------------------------
# Kubelet
# ---------------------------------------------------------------------------------------------------------------------


# How it registers


def test_it_answers_before_and_while_it_registers(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    answered = []

    async def ask(request: pb.RegisterRequest) -> None:
        async with grpc.aio.insecure_channel(f"unix:{node.plugins}/{request.endpoint}") as channel:
            stub = sdm.rpc.DevicePluginStub(channel)
            answered.append(await stub.GetDevicePluginOptions(pb.Empty(), timeout=PATIENCE))
            one = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["0"])])
            answered.append(await stub.Allocate(one, timeout=PATIENCE))

    kubelet.while_registering = ask
    serve("null")
    assert answered[0] == kubelet.client("null").options
    assert [spec.host_path for spec in answered[1].container_responses[0].devices] == ["/dev/null"]
    assert kubelet.count("null") == 1


def test_what_the_kubelet_is_told(node: Node, kubelet: Kubelet, start: Starter) -> None:
    offer(node, *NAMES[:4])
    node.rules(
        "- devicematch: ^full$\n- {devicematch: ^null$, nummaxdevices: 3}\n"
        "- {devicematch: ^random$, nummaxdevices: 0}\n- {devicematch: ^urandom$, resource: pool}\n"
    )
    start()
    lists = {"full": ["0"], "null": ["0", "1", "2"], "random": [], "pool": ["urandom:0"]}
    wait_ready(kubelet, list(lists))
    assert {name: list(kubelet.health(name)) for name in lists} == lists
    requests = {request.resource_name.partition("/")[2]: request for _, request in kubelet.requests}
    for name, request in requests.items():
        assert (request.version, request.endpoint) == ("v1beta1", f"smarter-{name}.sock")
        assert request.options == kubelet.client(name).options  # what GetDevicePluginOptions said
        assert request.options.get_preferred_allocation_available == (name == "pool")
        assert not request.options.pre_start_required


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
def test_the_stand_in_refuses_what_kubelet_refuses(node: Node, kubelet: Kubelet, wrong: dict[str, str]) -> None:
    good = {"version": "v1beta1", "resource_name": "example.org/null", "endpoint": "null.sock"}
    channel = grpc.insecure_channel(f"unix:{node.plugins}/kubelet.sock")
    with channel, pytest.raises(grpc.RpcError) as caught:
        sdm.rpc.RegistrationStub(channel).Register(pb.RegisterRequest(**{**good, **wrong}), timeout=PATIENCE)
    assert caught.value.code() == grpc.StatusCode.UNKNOWN
    words = {"version": "v1beta2", "resource_name": "is invalid", "endpoint": "failed to dial device plugin"}
    assert words[next(iter(wrong))] in caught.value.details()
    assert not kubelet.registrations


def test_sockets_are_for_root_alone_from_their_first_moment_on(node: Node, kubelet: Kubelet, start: Starter) -> None:
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
    with Kubelet(node) as kubelet:
        offer(node, "null", "urandom")
        node.rules("- devicematch: ^null$\n- devicematch: ^urandom$\n  resource: a_name_of_some_length_for_a_device\n")
        start()
        wait_ready(kubelet, ["null", "a_name_of_some_length_for_a_device"])
        names = sorted(sockets(node))
        assert names[1] == "smarter-null.sock"
        assert re.fullmatch(r"smarter-a[a-z_]*-[0-9a-f]{8}\.sock", names[0])
        assert len(f"{node.plugins}/{names[0]}") == 107
        assert kubelet.gives("a_name_of_some_length_for_a_device") == {"/dev/urandom": "/dev/urandom"}


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("/a,b", "{} has a comma"),
        (84, "the path {} is 1 bytes too long"),
        (115, "the path {} is 32 bytes too long"),
    ],
)
def test_an_impossible_plugin_directory_is_one_sentence(node: Node, where: str | int, problem: str) -> None:
    offer(node, "null")
    if isinstance(where, int):
        lengthen(node, where)
    else:
        node.plugins = Path(f"{node.root}{where}")
        node.plugins.mkdir()
    done = node.run()
    assert done.returncode == 1
    assert re.search(problem.format(re.escape(str(node.plugins))), done.stderr) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["a%41 50%b?c#d[@:;&=+$]\u00e9", "\udcff"])
def test_a_plugin_directory_may_have_any_name(node: Node, start: Starter, name: str) -> None:
    """gRPC is given a URI, in which two slashes at the beginning would be followed by the name of a host."""
    node.plugins = node.root / name
    node.plugins.mkdir()
    with Kubelet(node) as kubelet:
        offer(node, "null")
        start("--plugin-dir", f"/{node.plugins}")
        kubelet.wait_for("null", Healthy=1)
        assert kubelet.gives("null") == {"/dev/null": "/dev/null"}
        kubelet.down()
        kubelet.up()
        wait_for(lambda: kubelet.count("null") == 2)
        assert {path.name for path in node.plugins.glob("*.sock")} == {"kubelet.sock", "smarter-null.sock"}
        assert not list(node.root.glob("aA*"))


# Allocate


@needs_root
def test_a_node_once_a_container_whatever_its_slots(node: Node, kubelet: Kubelet, start: Starter) -> None:
    node.plug("snd/controlC0")
    node.plug("snd/pcmC0D0p")
    node.rules("- devicematch: ^snd$\n  nummaxdevices: 4\n")
    start()
    kubelet.wait_for("snd", Healthy=4)
    given = kubelet.take("snd", "0", "1", "3")
    assert [(spec.host_path, spec.container_path, spec.permissions) for spec in given.devices] == [
        ("/dev/snd", "/dev/snd", "rw"),
    ]
    with plugin_stub(node, "snd") as stub:
        asked = [pb.ContainerAllocateRequest(devices_ids=["0"]), pb.ContainerAllocateRequest(devices_ids=["1", "2"])]
        both = stub.Allocate(pb.AllocateRequest(container_requests=asked), timeout=PATIENCE).container_responses
    assert [len(one.devices) for one in both] == [1, 1]


def test_an_unknown_id_is_refused_and_named(kubelet: Kubelet, serve: Starter) -> None:
    daemon = serve("null", slots=2)
    for wrong in ("2", "00", "-1", "null:0", "", "\u0661", "1\n", "9" * 5000):
        status, words = refusal(kubelet, "null", "0", wrong)
        assert status == "INVALID_ARGUMENT"
        assert words == sdm.printable(f'smarter-devices/null: no device ID "{wrong[:200]}"')
    assert kubelet.gives("null", "1") == {"/dev/null": "/dev/null"}
    daemon.says(r'WARNING Allocate refused: no device ID "2" resource=smarter-devices/null ids=0,2 ')


@needs_root
def test_a_change_since_the_last_look_is_refused_and_named(node: Node, kubelet: Kubelet, start: Starter) -> None:
    """Links and folders are given as they are, for the runtime resolves what the kubelet keeps, at every start."""
    for path in ("video0", "video1", "sda", "pub/x", "snd/a", "snd2/a", "full"):
        node.plug(path)
    for name in "abc":
        node.link(f"by-id/{name}", "../video0")
    node.rules("- devicematch: ^(by-id/.|pub/x|snd2?|full)$\n")
    daemon = start("--interval", "3600")
    paths = {path.replace("/", "_"): path for path in ("by-id/a", "by-id/b", "by-id/c", "pub/x", "snd", "snd2", "full")}
    wait_ready(kubelet, list(paths))
    assert {name: kubelet.gives(name) for name in paths} == {name: at(path) for name, path in paths.items()}
    node.link("by-id/a", "../video1")
    assert kubelet.gives("by-id_a") == at("by-id/a")
    node.unplug("video1")
    node.link("by-id/b", "../../outside")
    node.link("by-id/c", "gone\udcff\x1b[31m")
    (node.dev / "pub").chmod(0o777)
    node.link("pub/x", "../sda")
    node.unplug("snd/a")
    node.plug("snd2/b\udcff")
    node.unplug("full")
    for name, problem in (
        ("by-id_a", "/dev/by-id/a: a link to /dev/video1, which is not there"),
        ("by-id_b", "/dev/by-id/b: a link that leaves /dev"),
        ("by-id_c", r"/dev/by-id/c: a link to /dev/by-id/gone\udcff\x1b[31m, which is not there"),
        ("pub_x", "/dev/pub/x: others than root may write in the folder /dev/pub"),
        ("snd", "/dev/snd: a folder that holds no device node"),
        ("full", "/dev/full: it is gone"),
    ):
        assert refusal(kubelet, name, "0") == ("UNAVAILABLE", f"smarter-devices/{name}: {problem}")
    assert r"the name /dev/snd2/b\udcff is not UTF-8" in refusal(kubelet, "snd2", "0")[1]
    daemon.says(r"Allocate refused: /dev/by-id/c: a link to /dev/by-id/gone\\udcff\\x1b\[31m, which")


@needs_root
def test_list_and_dry_run_and_status_show_link_and_target(node: Node, kubelet: Kubelet, start: Starter) -> None:
    node.plug("ttyUSB0")
    node.plug("snd/controlC0")
    node.link("serial/by-id/usb-a", "../../ttyUSB0")
    node.rules("- devicematch: ^serial/by-id/\n- devicematch: ^snd$\n- {devicematch: U, containerpath: /dev/tty}\n")
    link = "/dev/serial/by-id/usb-a -> /dev/ttyUSB0"
    told = node.run("--list").stdout
    assert link in told and "/dev/snd (1 node)\n" in told and "/dev/ttyUSB0 as /dev/tty\n" in told
    node.plug("snd/timer")
    told = node.run("--dry-run").stdout
    assert f"/dev/serial/by-id/usb-a rw (the host's {link})" in told
    assert "/dev/snd rw (the host's /dev/snd, 2 nodes)" in told and "/dev/tty rw (the host's /dev/ttyUSB0)" in told
    daemon = start("--listen", "127.0.0.1:0")
    kubelet.wait_for("snd", Healthy=1)
    status = Status(daemon)
    told = node.run("--status", status.address).stdout
    assert link in told and "/dev/snd (2 nodes)" in told
    page = html.unescape(status.ask("/").body)
    assert "-> /dev/ttyUSB0" in page and "(2 nodes)" in page
    path = "/dev/serial/by-id/usb-a"
    nodes = [{"host": path, "container": path, "permissions": "rw", "targets": ["/dev/ttyUSB0"]}]
    assert status.resource("serial_by-id_usb-a")["devices"][0]["nodes"] == nodes


# Starts of containers, of which the kubelet asks where a rule has attributes


STICKS = '- {devicematch: ^ttyUSB, attributes: {idVendor: "10c4", serial: "A.*"}}\n'
STICK_POOL = STICKS.replace("^ttyUSB,", "^ttyUSB, resource: sticks,")
CHANGED = 'its serial is "C1" and was "A1"'
NO_SUCH_ID = "the resource has no such ID"


def plug_stick(board: Board, tty: str, serial: str, port: str = "1-1.1", vendor: str = "10c4") -> None:
    """Plug a serial adapter into PORT, which gets the node TTY."""
    number = f"188:{tty[-1]}"
    usb_serial(board, tty, number, port, vendor, "ea60", "CP2102", serial)
    build(board.node.dev, {tty: f"char {number}"})


def unplug_stick(board: Board, tty: str) -> None:
    board.node.unplug(tty)
    link = board.node.sys / f"dev/char/188:{tty[-1]}"
    shutil.rmtree(link.resolve().parents[3])
    link.unlink()


def set_serial(board: Board, tty: str, serial: str) -> None:
    """Have the stick at the node TTY another serial number, as firmware can."""
    ((board.node.sys / f"dev/char/188:{tty[-1]}").resolve().parents[3] / "serial").write_text(serial + "\n")


def swap_stick(board: Board, tty: str, serial: str, port: str = "1-1.1") -> None:
    """Replace the stick at the node TTY by one with another SERIAL number, in PORT."""
    unplug_stick(board, tty)
    plug_stick(board, tty, serial, port)


def start_refusal(kubelet: Kubelet, resource: str, *ids: str) -> str:
    """The words with which the start of a container with IDS is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        kubelet.starts(resource, *ids)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    return caught.value.details()


def is_refused(kubelet: Kubelet, resource: str, problem: str, *ids: str, bad: int = 0, given: str = "") -> bool:
    """Whether the start of a container with IDS is refused for PROBLEM of the device of the one with the index BAD.
    GIVEN says which device that is, unless it is the one of this ID."""
    path = ids[bad].rpartition(":")[0] or resource
    given = given or f'/dev/{path} (ID "{ids[bad]}")'
    return start_refusal(kubelet, resource, *ids) == (
        f"smarter-devices/{resource}: the container was given {given}, but {problem}. It starts once the right "
        "device is back; or delete the pod: its replacement gets a device that is there"
    )


def may_start(kubelet: Kubelet, resource: str, *ids: str) -> bool:
    try:
        kubelet.starts(resource, *ids)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION, error
        return False
    return True


@needs_root
def test_only_rules_by_attributes_check_starts(board: Board, node: Node, kubelet: Kubelet, start: Starter) -> None:
    """And the given device is good, whether it is the only one of its name or one of a pool."""
    for name in ("null", "zero", "lp0"):
        node.plug(name)
    for tty, serial, port in (("ttyUSB0", "A1", "1-1.1"), ("ttyUSB1", "B1", "1-1.2"), ("ttyUSB2", "B2", "1-1.3")):
        plug_stick(board, tty, serial, port)
    plain = "- {devicematch: ^null$}\n- {devicematch: ^zero$, resource: zeros}\n"
    node.rules(plain + STICKS + STICK_POOL.replace("A.*", "B.*") + "- {devicematch: ^lp0$, resource: sticks}\n")
    daemon = start("--interval", "3600", "--listen", "127.0.0.1:0")
    wanted = {"null": (False, False), "zeros": (True, False), "ttyUSB0": (False, True), "sticks": (True, True)}
    wait_ready(kubelet, list(wanted))
    for name, (prefers, checks) in wanted.items():
        options = pb.DevicePluginOptions(get_preferred_allocation_available=prefers, pre_start_required=checks)
        requests = [request for _, request in kubelet.requests if request.resource_name == kubelet.name(name)]
        assert [request.options for request in requests] == [kubelet.client(name).options] == [options], name
    kubelet.starts("ttyUSB0", "0")
    kubelet.starts("sticks", "ttyUSB1:0", "ttyUSB2:0", "lp0:0")
    with plugin_stub(node, "null") as stub:  # nobody has to ask
        stub.PreStartContainer(pb.PreStartContainerRequest(devices_ids=["0"]), timeout=PATIENCE)
    assert Status(daemon).metrics()["starts_refused_total", kubelet.name("ttyUSB0")] == 0
    assert "refused" not in daemon.log


@needs_root
def test_a_start_with_another_device_is_refused(board: Board, node: Node, kubelet: Kubelet, start: Starter) -> None:
    """And counted. Each slot and each reason is logged once, until a start has been good."""
    plug_stick(board, "ttyUSB0", "A1")
    node.rules(STICKS.replace("}}", "}, nummaxdevices: 2}"))
    daemon = start("--interval", "3600", "--listen", "127.0.0.1:0")
    kubelet.wait_for("ttyUSB0", Healthy=2)
    swap_stick(board, "ttyUSB0", "C1", "1-1.2")
    assert is_refused(kubelet, "ttyUSB0", CHANGED, "0")
    kubelet.wait_for("ttyUSB0", Unhealthy=2)
    for _ in range(2):  # the device side has looked by now
        assert is_refused(kubelet, "ttyUSB0", CHANGED, "0")
        assert not may_start(kubelet, "ttyUSB0", "1")
    status = Status(daemon)
    assert status.resource("ttyUSB0")["start_refusals"] == 5
    assert status.metrics()["starts_refused_total", kubelet.name("ttyUSB0")] == 5
    daemon.says("WARNING start of a container refused: .*its serial is .* resource=smarter-devices/ttyUSB0")
    unplug_stick(board, "ttyUSB0")
    assert is_refused(kubelet, "ttyUSB0", "it is gone", "0")
    daemon.says("start of a container refused: .* it is gone")
    plug_stick(board, "ttyUSB0", "A1")
    wait_for(lambda: may_start(kubelet, "ttyUSB0", "0"))
    before = daemon.log.count("start of a container refused")
    assert before <= 4  # it may have been refused while the stick came back
    unplug_stick(board, "ttyUSB0")
    assert not may_start(kubelet, "ttyUSB0", "0")
    wait_for(lambda: daemon.log.count("start of a container refused") == before + 1)


@needs_root
@pytest.mark.parametrize("is_last", [False, True])
def test_a_stick_of_another_rule_leaves_the_resource_of_the_one_before(
    board: Board, kubelet: Kubelet, serve: Starter, is_last: bool
) -> None:
    """Otherwise the kubelet would say no more than that the endpoint has been stopped."""
    plug_stick(board, "ttyUSB0", "A1")
    rules = [STICK_POOL, STICK_POOL.replace("sticks", "others").replace("A.*", "B.*")]
    daemon = serve("sticks", rules="".join(reversed(rules) if is_last else rules), options=("--interval", "3600"))
    kubelet.take("sticks", "ttyUSB0:0")
    swap_stick(board, "ttyUSB0", "B1", "1-1.2")
    kubelet.wait_for("others", Healthy=1)
    kubelet.wait_for("sticks", Unhealthy=1)
    assert is_refused(kubelet, "sticks", 'its serial is "B1" and was "A1"', "ttyUSB0:0")
    kubelet.starts("others", "ttyUSB0:0")
    swap_stick(board, "ttyUSB0", "A1", "1-1.3")
    kubelet.wait_for("sticks", Healthy=1)
    kubelet.wait_for("others", Unhealthy=1)
    kubelet.starts("sticks", "ttyUSB0:0")
    assert kubelet.count("sticks") == kubelet.count("others") == 1 and "retired" not in daemon.log


@needs_root
def test_a_start_with_a_device_that_has_changed_is_never_refused(
    board: Board, node: Node, kubelet: Kubelet, start: Starter
) -> None:
    """Its node is the same, also over a restart of the daemon."""
    plug_stick(board, "ttyUSB0", "A1")
    node.rules(STICK_POOL)
    daemon = start()
    kubelet.wait_for("sticks", Healthy=1)
    set_serial(board, "ttyUSB0", "C1")
    kubelet.starts("sticks", "ttyUSB0:0")
    daemon.hang_up()
    kubelet.wait_for("sticks", Unhealthy=1)
    kubelet.starts("sticks", "ttyUSB0:0")
    daemon.kill()
    daemon = start()
    wait_for(lambda: kubelet.count("sticks") == 2)
    wait_ready(kubelet, ["sticks"])
    kubelet.wait_for("sticks", Unhealthy=1)
    kubelet.starts("sticks", "ttyUSB0:0")
    with pytest.raises(grpc.RpcError):
        kubelet.take("sticks", "ttyUSB0:0")
    node.unplug("ttyUSB0")
    build(node.dev, {"ttyUSB0": "char 188:0"})
    assert is_refused(kubelet, "sticks", CHANGED, "ttyUSB0:0")


@needs_root
@pytest.mark.parametrize("what", ["gone", "companion"])
def test_starts_wait_for_the_right_device(
    board: Board, node: Node, kubelet: Kubelet, serve: Starter, what: str
) -> None:
    """Nobody has to do anything but that."""
    plug_stick(board, "ttyUSB0", "A1")
    node.plug("lock")
    serve("ttyUSB0", rules=STICKS.replace("}}", "}, with: [lock]}"), options=("--interval", "3600"))
    if what == "gone":
        unplug_stick(board, "ttyUSB0")
        problem = "it is gone"
    else:
        node.unplug("lock")
        problem = "it goes with /dev/lock: it is gone"
    assert is_refused(kubelet, "ttyUSB0", problem, "0")
    kubelet.wait_for("ttyUSB0", Unhealthy=1)
    assert not may_start(kubelet, "ttyUSB0", "0")
    if what == "gone":
        plug_stick(board, "ttyUSB0", "A1", "1-1.4")
    else:
        node.plug("lock")
    kubelet.starts("ttyUSB0", "0")
    kubelet.wait_for("ttyUSB0", Healthy=1)
    assert kubelet.count("ttyUSB0") == 1


@needs_root
def test_an_old_plan_alone_refuses_no_start(board: Board, kubelet: Kubelet, serve: Starter) -> None:
    """The right device was pulled and is back, and the device side may have looked at any time meanwhile, or never."""
    plug_stick(board, "ttyUSB0", "A1")
    serve("ttyUSB0", rules=STICKS, options=("--interval", "3600"))
    for turn in range(20):
        swap_stick(board, "ttyUSB0", "A1", f"1-1.{turn % 4}")
        time.sleep(turn / 500)
        kubelet.starts("ttyUSB0", "0")


@needs_root
def test_another_fitting_device_is_taken_once_seen(board: Board, kubelet: Kubelet, serve: Starter) -> None:
    """The rule asks for no more; only what the plan has is compared, since expressions can take long."""
    plug_stick(board, "ttyUSB0", "A1")
    serve("ttyUSB0", rules=STICKS, options=("--interval", "3600"))
    swap_stick(board, "ttyUSB0", "A2")
    kubelet.starts("ttyUSB0", "0")
    assert kubelet.count("ttyUSB0") == 1


def kept_devices(node: Node) -> Path:
    (path,) = node.plugins.glob(f"smarter-device-manager-{sdm.DEFAULT_DOMAIN}.*.devices")
    return path


@needs_root
@pytest.mark.parametrize("damage", ["", "removed", "damaged"])
def test_starts_are_checked_right_after_a_restart_of_the_daemon(
    board: Board, node: Node, kubelet: Kubelet, start: Starter, damage: str
) -> None:
    """The ID says what is needed. What the daemon keeps over a restart only makes the refusal's words better."""
    plug_stick(board, "ttyUSB0", "A1")
    plug_stick(board, "ttyUSB1", "A2", "1-1.2")
    node.rules(STICK_POOL)
    daemon = start()
    kubelet.wait_for("sticks", Healthy=2)
    kubelet.take("sticks", "ttyUSB0:0", "ttyUSB1:0")
    kubelet.starts("sticks", "ttyUSB0:0", "ttyUSB1:0")
    daemon.kill()
    assert stat.S_IMODE(kept_devices(node).stat().st_mode) == 0o600
    if damage == "removed":
        kept_devices(node).unlink()
    elif damage == "damaged":
        kept_devices(node).write_text("[]")
    swap_stick(board, "ttyUSB0", "C1", "1-1.3")
    again = start()
    kubelet.wait_for("sticks", **({"Healthy": 1} if damage else {"Healthy": 1, "Unhealthy": 1}))
    problem, given = (NO_SUCH_ID, 'the ID "ttyUSB0:0"') if damage else (CHANGED, "")
    assert is_refused(kubelet, "sticks", problem, "ttyUSB0:0", given=given)
    assert is_refused(kubelet, "sticks", problem, "ttyUSB1:0", "ttyUSB0:0", bad=1, given=given)
    kubelet.starts("sticks", "ttyUSB1:0")
    unplug_stick(board, "ttyUSB0")
    assert is_refused(kubelet, "sticks", problem if damage else "it is gone", "ttyUSB0:0", given=given)
    plug_stick(board, "ttyUSB0", "A1", "1-1.3")
    wait_for(lambda: may_start(kubelet, "sticks", "ttyUSB0:0", "ttyUSB1:0"))
    assert "Traceback" not in again.log


@needs_root
@pytest.mark.parametrize(
    ("what", "rules"), [("another", STICKS.replace("}}", r"}, env: {SERIAL: '\g<attr:serial>'}}")), ("gone", STICKS)]
)
def test_the_only_device_that_a_rule_chose_is_remembered_over_restarts(
    board: Board, node: Node, kubelet: Kubelet, start: Starter, what: str, rules: str
) -> None:
    """Its resource has the path's name, so without that there would be nothing to refuse the start."""
    plug_stick(board, "ttyUSB0", "A1")
    node.plug("null")
    node.rules(rules + "- devicematch: ^null$\n")
    daemon = start()
    kubelet.wait_for("ttyUSB0", Healthy=1)
    for turn in range(2):
        daemon.kill()
        if not turn:
            unplug_stick(board, "ttyUSB0")
            if what == "another":
                plug_stick(board, "ttyUSB0", "C1", "1-1.2")
        daemon = start()
        wait_for(lambda turn=turn: kubelet.count("ttyUSB0") == turn + 2)
        wait_ready(kubelet, ["null", "ttyUSB0"])
        kubelet.wait_for("ttyUSB0", Unhealthy=1)
        assert is_refused(kubelet, "ttyUSB0", CHANGED if what == "another" else "it is gone", "0")
        with pytest.raises(grpc.RpcError):  # the kubelet would not ask for it, but may have asked just before
            kubelet.take("ttyUSB0", "0")
    if what == "another":
        unplug_stick(board, "ttyUSB0")
    plug_stick(board, "ttyUSB0", "A1", "1-1.4")
    kubelet.wait_for("ttyUSB0", Healthy=1)
    kubelet.starts("ttyUSB0", "0")
    daemon.stop()
    node.rules("- devicematch: ^null$\n")
    start()
    kubelet.wait_for("null", Healthy=1)
    wait_for(lambda: kept_devices(node).read_text().endswith("[]"))
    assert list(sockets(node)) == ["smarter-null.sock"]


@needs_root
def test_a_kept_device_leaves_its_name_to_one_that_is_there(node: Node, kubelet: Kubelet, start: Starter) -> None:
    """A daemon that goes on would keep the name for the device; one that starts offers what works."""
    node.sysfs("usb1/stick", {"serial": "A1"}, node.plug("sticks/0"))
    node.rules("- {devicematch: ^sticks/, attributes: {serial: A1}}\n- devicematch: ^sticks_\n")
    daemon = start()
    kubelet.wait_for("sticks_0", Healthy=1)
    daemon.kill()
    node.unplug("sticks/0")
    node.plug("sticks_0")
    start()
    wait_for(lambda: kubelet.count("sticks_0") == 2)
    kubelet.wait_for("sticks_0", Healthy=1)
    assert kubelet.gives("sticks_0") == {"/dev/sticks_0": "/dev/sticks_0"}


@needs_root
def test_a_start_with_an_unknown_id_is_refused(board: Board, kubelet: Kubelet, serve: Starter) -> None:
    plug_stick(board, "ttyUSB0", "A1")
    plug_stick(board, "ttyUSB1", "B1", "1-1.2")
    serve("ttyUSB0", "sticks", rules=STICKS + STICK_POOL.replace("A.*", "B.*"))
    for wrong in ("x", "00", "", "ttyUSB0:0", "\u0661", "a\n:0", "9" * 5000):
        given = f'the ID "{sdm.printable(wrong[:200])}"'
        assert is_refused(kubelet, "ttyUSB0", NO_SUCH_ID, wrong, given=given)
        assert is_refused(kubelet, "sticks", NO_SUCH_ID, "ttyUSB1:0", wrong, bad=1, given=given)
    kubelet.starts("sticks", "ttyUSB1:0")
    kubelet.starts("ttyUSB0", "0")
    kubelet.starts("sticks", "ttyUSB1:7")  # it may have had more slots when the container was given this one
    kubelet.starts("ttyUSB0", "7")


@needs_root
def test_only_so_many_refusals_are_remembered(board: Board, kubelet: Kubelet, serve: Starter) -> None:
    """Whoever may ask could name any number of IDs."""
    plug_stick(board, "ttyUSB0", "A1")
    daemon = serve("ttyUSB0", rules=STICKS, fault="sdm.Problems.MAX_SUBJECTS = 2")
    for slot_id in ("a", "b", "a", "b", "c", "a", "c"):
        assert not may_start(kubelet, "ttyUSB0", slot_id)
    daemon.says('"c".*\n.*"a"')
    logged = re.findall('start of a container refused: the container was given the ID "(.)"', daemon.log)
    assert logged == ["a", "b", "c", "a"]


HANGING_SYSFS = """
import os, time
read = sdm.read_attribute
def hang(folder, name):
    if os.path.exists({flag!r}):
        with open({stuck!r}, "a") as file:
            file.write("x")
        while os.path.exists({flag!r}):
            time.sleep(0.01)
    return read(folder, name)
sdm.read_attribute = hang
"""


@needs_root
def test_a_driver_that_keeps_a_reader_delays_nobody(board: Board, node: Node, kubelet: Kubelet, start: Starter) -> None:
    flag, stuck = node.root / "flag", node.root / "stuck"
    plug_stick(board, "ttyUSB0", "A1")
    plug_stick(board, "ttyUSB1", "A2", "1-1.2")
    node.rules(STICK_POOL + "- devicematch: ^null$\n")
    patch = HANGING_SYSFS.replace("if os.path.exists", "if '1-1.2' in folder and os.path.exists")
    flag.touch()
    daemon = start("--listen", "127.0.0.1:0", fault=patch.format(flag=str(flag), stuck=str(stuck)))
    kubelet.wait_for("sticks", Healthy=1)
    daemon.says("left out: sysfs does not answer, so its attributes cannot be read devices=/dev/ttyUSB1")
    status = Status(daemon)
    node.plug("null")
    kubelet.wait_for("null", Healthy=1)
    assert status.ask("/healthz").status == 200
    flag.unlink()
    kubelet.wait_for("sticks", Healthy=2)
    assert len(stuck.read_text()) == 1  # thread, however often the device side looked
    flag.touch()
    daemon.hang_up()
    wait_for(lambda: len(stuck.read_text()) == 2)
    node.plug("zero")
    node.rules(STICK_POOL + "- devicematch: ^(null|zero)$\n")
    kubelet.wait_for("zero", Healthy=1)
    assert list(kubelet.health("sticks").values()) == [support.HEALTHY] * 2  # what was known stays
    flag.unlink()


SLOW_SYSFS = """
import os, time
read = sdm.read_attribute
def slow(folder, name):
    time.sleep({seconds} if os.path.exists({flag!r}) and name == {name!r} else 0)
    return read(folder, name)
sdm.read_attribute = slow
"""


def slow_sysfs(node: Node, name: str, seconds: float) -> str:
    """A fault for which reads of the attribute NAME take SECONDS while the file "flag" is there, as it is now."""
    (node.root / "flag").touch()
    return SLOW_SYSFS.format(flag=str(node.root / "flag"), seconds=seconds, name=name)


@needs_root
def test_a_late_answer_of_sysfs_is_the_next_one(board: Board, node: Node, kubelet: Kubelet, start: Starter) -> None:
    plug_stick(board, "ttyUSB0", "A1")
    node.rules(STICKS)
    daemon = start(fault=slow_sysfs(node, "serial", 5 * sdm.SYSFS_SECONDS / 7))  # it is read in 7 folders
    kubelet.wait_for("ttyUSB0", Healthy=1)
    wait_for(lambda: may_start(kubelet, "ttyUSB0", "0"))
    assert "sysfs does not answer" in daemon.log


def test_without_file_descriptors_what_sysfs_said_stays_true(board: Board) -> None:
    """That none is left says nothing about a device."""
    usb_serial(board, "ttyUSB0", "188:0", "1-1.2", "10c4", "ea60", "CP2102", "A1")
    board.has("null", "1:3", "virtual/null", {"numa_node": "1"})
    stick, null = (snapshot_of(board.tree).entries[name] for name in ("ttyUSB0", "null"))
    sysfs = sdm.Sysfs(str(board.node.sys))
    sysfs.refresh({stick: ("idVendor",)}, [], False)
    before = sysfs.chains[stick]
    assert "10c4" in sdm.values_of(before, "idVendor")
    wanted: dict[sdm.Entry, sdm.Names] = {stick: ("idVendor",), null: ()}
    with without_descriptors():
        assert not sysfs.refresh(wanted, [], True)
        assert sysfs.chains == {stick: before}
    assert sysfs.refresh(wanted, [], False) and sysfs.chains[null][0] == {"numa_node": "1"}
    assert not sysfs.refresh(wanted, [], False)


@needs_root
def test_starts_of_resources_named_by_an_attribute(board: Board, node: Node, kubelet: Kubelet, start: Starter) -> None:
    """It is the one of the folder that fits the rule, whatever nearer folders have."""
    plug_stick(board, "ttyUSB0", "A1")
    nearer = (node.sys / "dev/char/188:0").resolve() / "serial"
    nearer.write_text("nearer\n")
    node.rules("- {devicematch: ^ttyUSB, attributes: {idVendor: '10c4'}, resource: 'stick-\\g<attr:serial>'}\n")
    start("--interval", "3600")
    kubelet.wait_for("stick-A1", Healthy=1)
    kubelet.starts("stick-A1", "ttyUSB0:0")
    swap_stick(board, "ttyUSB0", "C1")
    assert is_refused(kubelet, "stick-A1", CHANGED, "ttyUSB0:0")
    kubelet.wait_for("stick-C1", Healthy=1)


@needs_root
def test_two_daemons_keep_their_own_devices(board: Board, node: Node, kubelet: Kubelet, start: Starter) -> None:
    """And each writes anew what somebody deleted."""
    plug_stick(board, "ttyUSB0", "A1")
    plug_stick(board, "ttyUSB1", "B1", "1-1.2")
    node.rules(STICKS)
    other = node.root / "other.yaml"
    other.write_text(STICKS.replace("A.*", "B.*"))
    first, second = start(), start("--conf", str(other))
    wait_ready(kubelet, ["ttyUSB0", "ttyUSB1"])
    for path in node.plugins.glob("*.devices"):
        path.unlink()
    wait_for(lambda: len(list(node.plugins.glob("*.devices"))) == 2)
    first.kill()
    second.kill()
    swap_stick(board, "ttyUSB0", "C1", "1-1.3")
    start(), start("--conf", str(other))
    wait_for(lambda: (kubelet.count("ttyUSB0"), kubelet.count("ttyUSB1")) == (2, 2))
    wait_ready(kubelet, ["ttyUSB0", "ttyUSB1"])
    kubelet.wait_for("ttyUSB0", Unhealthy=1)
    wait_for(lambda: is_refused(kubelet, "ttyUSB0", CHANGED, "0"))


@needs_root
def test_a_start_is_answered_within_a_second(board: Board, node: Node, kubelet: Kubelet, start: Starter) -> None:
    """A driver may keep whoever reads an attribute for ever. One thread may be kept, and no call."""
    flag, stuck = node.root / "flag", node.root / "stuck"
    plug_stick(board, "ttyUSB0", "A1")
    plug_stick(board, "ttyUSB1", "B1", "1-1.2")
    node.plug("null")
    node.rules("- devicematch: ^null$\n" + STICKS + STICK_POOL.replace("A.*", "B.*"))
    daemon = start("--interval", "3600", fault=HANGING_SYSFS.format(flag=str(flag), stuck=str(stuck)))
    wait_ready(kubelet, ["null", "ttyUSB0", "sticks"])
    kubelet.starts("ttyUSB0", "0")
    threads = len(os.listdir(f"/proc/{daemon.process.pid}/task"))
    times = []
    for turn in range(3):
        stuck.write_text("")
        flag.touch()
        node.unplug("ttyUSB0")
        build(node.dev, {"ttyUSB0": "char 188:0"})
        with plugin_stub(node, "ttyUSB0") as stub, plugin_stub(node, "sticks") as pool:
            stub.GetDevicePluginOptions(pb.Empty(), timeout=PATIENCE)
            pool.GetDevicePluginOptions(pb.Empty(), timeout=PATIENCE)
            for number in range(4):
                asked, slot_id = (pool, "ttyUSB0:0") if (number + turn) % 2 else (stub, "0")
                began = time.monotonic()
                with pytest.raises(grpc.RpcError) as caught:
                    asked.PreStartContainer(pb.PreStartContainerRequest(devices_ids=[slot_id]), timeout=PATIENCE)
                times.append(time.monotonic() - began)
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert kubelet.gives("null") == {"/dev/null": "/dev/null"}
        assert len(os.listdir(f"/proc/{daemon.process.pid}/task")) <= threads + 4  # those of grpc come and go
        assert len(stuck.read_text()) <= 4  # of the starts, and of the device side: each node, also the one before
        flag.unlink()
        wait_for(lambda: may_start(kubelet, "ttyUSB0", "0"))
    assert statistics.median(times) < 1.0
    daemon.says("start of a container refused: .*but sysfs does not answer, so its attributes cannot be read. It")


@needs_root
def test_new_attributes_of_a_rule_register_it_again(board: Board, node: Node, kubelet: Kubelet, serve: Starter) -> None:
    """For the kubelet hears of the options only then. To be asked in vain is no reason for that."""
    plug_stick(board, "ttyUSB0", "A1")
    serve("ttyUSB0", rules="- devicematch: ^ttyUSB\n")
    node.rules(STICKS)
    wait_for(lambda: kubelet.count("ttyUSB0") == 2)
    kubelet.wait_for("ttyUSB0", Healthy=1)
    assert [request.options.pre_start_required for _, request in kubelet.requests] == [False, True]
    assert kubelet.client("ttyUSB0").options.pre_start_required
    swap_stick(board, "ttyUSB0", "C1")
    assert not may_start(kubelet, "ttyUSB0", "0")
    swap_stick(board, "ttyUSB0", "A1")
    node.rules("- {devicematch: ^ttyUSB, nummaxdevices: 2}\n")
    kubelet.wait_for("ttyUSB0", Healthy=2)
    swap_stick(board, "ttyUSB0", "C1")
    kubelet.starts("ttyUSB0", "0")
    assert kubelet.count("ttyUSB0") == 2


# The list


@needs_root
def test_a_list_is_sent_only_if_something_changed(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    daemon = serve("null", "zero", slots=2)
    (node.dev / "null").chmod(0o666)
    daemon.hang_up()
    node.rules(node.conf.read_text() + "- devicematch: ^full$\n")
    node.plug("full")
    wait_ready(kubelet, ["full"])
    node.unplug("zero")
    kubelet.wait_for("zero", Unhealthy=2)
    node.plug("zero")
    kubelet.wait_for("zero", Healthy=2)
    assert [len(kubelet.client(name).lists) for name in ("null", "zero", "full")] == [1, 3, 1]
    assert [kubelet.count(name) for name in ("null", "zero", "full")] == [1, 1, 1]


def test_a_device_that_no_rule_names_any_more_is_retired_at_once(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    serve("null", "zero")
    node.rules("- devicematch: ^null$\n")
    wait_for(lambda: not kubelet.client("zero").is_open)
    wait_for(lambda: list(sockets(node)) == ["smarter-null.sock"])
    assert len(kubelet.client("null").lists) == 1


def test_named_and_not_named_in_quick_succession(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    """An old server has ended before the next of its name registers, however fast the rules flip."""
    daemon = serve("null", "zero", options=("--interval", "0.01"))
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
def test_a_list_is_never_longer_than_the_kubelet_takes(node: Node, kubelet: Kubelet, start: Starter) -> None:
    """A newcomer that has no room is left out; what was offered stays."""
    names = [letter * 100 for letter in "bcd"]
    for name in names:
        node.plug(name)
    node.rules("- {devicematch: '^[a-z]+$', resource: pool, nummaxdevices: 10000}\n")
    daemon = start()
    kubelet.wait_for("pool", Healthy=30_000)
    node.plug("a" * 100)
    daemon.says("WARNING /dev/a+: left out: the list of its resource's slots would be longer than 4194304 bytes")
    node.unplug(names[0])
    kubelet.wait_for("pool", Healthy=20_000, Unhealthy=10_000)
    assert kubelet.gives("pool", f"{names[2]}:9999") == {f"/dev/{names[2]}": f"/dev/{names[2]}"}
    assert kubelet.count("pool") == 1


def counted(message: pb.ListAndWatchResponse) -> dict[tuple[str, str], int]:
    """How many slots of each device have each health; devices are named by their first letter."""
    counts: dict[tuple[str, str], int] = {}
    for device in message.devices:
        key = device.ID[0], device.health
        counts[key] = counts.get(key, 0) + 1
    return counts


@needs_root
def test_of_a_stream_that_is_not_read_only_the_newest_list_waits(node: Node, kubelet: Kubelet, start: Starter) -> None:
    names = {letter: letter * 200 for letter in "abc"}  # so that a list is more than the kernel takes for a reader
    slots = 4000
    for letter in "ab":
        node.plug(names[letter])
    node.rules(f"- {{devicematch: '^[a-c]+$', resource: pool, nummaxdevices: {slots}}}\n")
    start()
    kubelet.wait_for("pool", Healthy=2 * slots)
    with plugin_stub(node, "pool") as stub:
        stream = stub.ListAndWatch(pb.Empty(), timeout=10 * PATIENCE)
        list(stream.initial_metadata())  # it is open, and the first list is under way
        for _ in range(3):
            node.unplug(names["a"])
            kubelet.wait_for("pool", Healthy=slots, Unhealthy=slots)
            node.plug(names["a"])
            kubelet.wait_for("pool", Healthy=2 * slots)
        node.plug(names["c"])
        kubelet.wait_for("pool", Healthy=3 * slots)
        node.unplug(names["b"])
        kubelet.wait_for("pool", Healthy=2 * slots, Unhealthy=slots)
        newest = {("a", "Healthy"): slots, ("b", "Unhealthy"): slots, ("c", "Healthy"): slots}
        lists = [counted(next(stream))]
        while lists[-1] != newest:
            lists.append(counted(next(stream)))
        assert len(lists) <= 3  # of which two were under way when nothing was read any more
        node.plug(names["b"])
        assert counted(next(stream)) == {(letter, "Healthy"): slots for letter in "abc"}
    assert len(kubelet.client("pool").lists) >= 9


# kubelet comes and goes


@pytest.mark.parametrize("problem", ["is not there: no", "does not answer on"])
def test_without_a_kubelet_it_says_so_once_and_waits(node: Node, start: Starter, problem: str) -> None:
    if "answer" in problem:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(f"{node.plugins}/kubelet.sock")
    offer(node, *NAMES)
    daemon = start()
    daemon.says("INFO .*offers 5 resources")
    daemon.says(f"kubelet {problem} .*/kubelet.sock; waiting for it")
    settle(daemon)
    assert daemon.log.count("kubelet") == 2  # in one line
    with Kubelet(node) as kubelet:
        wait_ready(kubelet, NAMES)
        assert [kubelet.count(name) for name in NAMES] == [1] * 5


def test_kubelet_down_tears_nothing_down(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    daemon = serve(*NAMES)
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


def test_kubelet_sock_away_for_a_moment_changes_nothing(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    """The streams are open still: kubelet.sock gone says nothing against them."""
    daemon = serve(*NAMES, options=("--log-format", "json"))
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
def test_a_new_kubelet_has_everything_at_once(kubelet: Kubelet, serve: Starter, is_seen_down: bool) -> None:
    daemon = serve(*NAMES)
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


def test_streams_that_end_with_a_new_kubelet_there_are_no_trouble(node: Node, kubelet: Kubelet, start: Starter) -> None:
    """They end before kubelet.sock is looked at the next time, and tell of the new kubelet."""
    offer(node, *NAMES)
    daemon = start()
    for _ in range(5):
        wait_ready(kubelet, NAMES)
        old, kubelet = kubelet, Kubelet(node).up()
        old.down()
    wait_ready(kubelet, NAMES)
    kubelet.down()
    assert "ended its stream" not in daemon.log and "refused its registration" not in daemon.log


def test_a_new_kubelet_sock_may_have_the_inode_of_the_old(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    """ext4 gives it to the next file at once; then the time tells that it is another kubelet."""
    serve(*NAMES)
    os.utime(node.plugins / "kubelet.sock")
    wait_for(lambda: [kubelet.count(name) for name in NAMES] == [2] * 5)
    wait_ready(kubelet, NAMES)


@pytest.mark.parametrize("is_seen_down", [True, False])
def test_kubelet_is_replaced_while_it_registers(
    node: Node, kubelet: Kubelet, start: Starter, is_seen_down: bool
) -> None:
    """The new kubelet.sock counts at once, even if calls to the old kubelet are open still."""
    kubelet.delay = 60.0
    offer(node, *NAMES)
    daemon = start()
    wait_for(lambda: kubelet.open_calls == 5)
    if is_seen_down:
        kubelet.down()
        daemon.says("kubelet does not answer")
    with Kubelet(node) as other:
        wait_ready(other, NAMES, 2.0)
        assert [other.count(name) for name in NAMES] == [1] * 5
    assert "refused to register" not in daemon.log


# The kernel tells of changes in the plugin directory, and while kubelet answers there are few looks. These tests have
# an --interval of an hour: nothing else wakes the daemon, and the next look of its own is CALM_LOOK_SECONDS away.

CALM_LOOK_SECONDS = sdm.MAX_SILENCE_SECONDS / 2
AT_ONCE = CALM_LOOK_SECONDS / 2


OWN_THREADS = 3  # the device side, the log, the kubelet side


def wakes(daemon: Daemon) -> int:
    """How often the daemon's own threads have slept. They start before all threads of grpc, which sleep as they like;
    their names say nothing, for Python sets them only since 3.14."""
    threads = sorted(int(thread) for thread in os.listdir(f"/proc/{daemon.process.pid}/task"))[:OWN_THREADS]
    found = [Path(f"/proc/{daemon.process.pid}/task/{thread}/status").read_text() for thread in threads]
    return sum(int(re.search(r"^voluntary_ctxt_switches:\t(\d+)$", text, re.MULTILINE)[1]) for text in found)


def wait_calm(daemon: Daemon) -> None:
    """Wait until nothing has woken the daemon for the time of five looks at kubelet.sock."""

    def is_calm() -> bool:
        before = wakes(daemon)
        settle(daemon, 5 * sdm.CHECK_SECONDS)
        return wakes(daemon) == before

    wait_for(is_calm, "a daemon that sleeps")


def start_calm(start: Starter, node: Node, kubelet: Kubelet) -> Daemon:
    offer(node, *NAMES)
    daemon = start("--interval", "3600")
    wait_ready(kubelet, NAMES)
    wait_calm(daemon)
    return daemon


def test_a_calm_daemon_sleeps(node: Node, kubelet: Kubelet, start: Starter) -> None:
    daemon = start_calm(start, node, kubelet)
    before = wakes(daemon)
    settle(daemon, CALM_LOOK_SECONDS + 1.0)
    assert 1 <= wakes(daemon) - before <= 4


def test_a_calm_daemon_sees_each_change_at_once(node: Node, kubelet: Kubelet, start: Starter) -> None:
    """Of all these only the kernel tells: even when another kubelet comes, the streams of the first are open still."""
    daemon = start_calm(start, node, kubelet)
    sock, elsewhere = node.plugins / "kubelet.sock", node.plugins / "elsewhere"
    for turn in (1, 2):
        (node.plugins / "smarter-null.sock").unlink()
        wait_for(lambda turn=turn: kubelet.count("null") == turn + 1 and len(sockets(node)) == 5, patience=AT_ONCE)
        wait_ready(kubelet, NAMES)
        wait_calm(daemon)
        sock.rename(elsewhere)
        wait_for(lambda turn=turn: daemon.log.count("kubelet is not there") == turn, patience=AT_ONCE)
        elsewhere.rename(sock)
        wait_for(lambda turn=turn: daemon.log.count("kubelet answers") == turn + 1, patience=AT_ONCE)
        wait_calm(daemon)
    assert [kubelet.count(name) for name in NAMES] == [1, 3, 1, 1, 1]
    with Kubelet(node) as second:
        wait_ready(second, NAMES, AT_ONCE)
        wait_calm(daemon)
        with Kubelet(node) as third:
            wait_ready(third, NAMES, AT_ONCE)


@pytest.mark.parametrize("is_old_up", [True, False])
def test_a_calm_daemon_finds_that_its_directory_is_another(
    node: Node, kubelet: Kubelet, start: Starter, is_old_up: bool
) -> None:
    """No change in either of them tells of that; at most the streams end. But then the new one is watched."""
    daemon = start_calm(start, node, kubelet)
    node.plugins.rename(node.root / "q")
    if not is_old_up:
        kubelet.down()
    node.plugins.mkdir(0o755)
    with Kubelet(node) as other:
        wait_ready(other, NAMES, PATIENCE if is_old_up else AT_ONCE)
        wait_calm(daemon)
        (node.plugins / "smarter-null.sock").unlink()
        wait_for(lambda: other.count("null") == 2, patience=AT_ONCE)


def test_a_kubelet_that_does_not_answer_is_looked_at_again_soon(node: Node, start: Starter) -> None:
    """A socket is in its place before anybody listens on it, and no change in the directory tells of the latter."""
    offer(node, *NAMES)
    daemon = start("--interval", "3600")
    daemon.says("kubelet is not there")
    with socket.socket(socket.AF_UNIX) as kubelet:
        kubelet.bind(f"{node.plugins}/kubelet.sock")
        daemon.says("kubelet does not answer on .*/kubelet.sock; waiting for it")
        settle(daemon)
        kubelet.listen()
        wait_for(lambda: "kubelet answers; registering" in daemon.log, patience=AT_ONCE)
        stops_well(daemon, node)


def test_many_changes_are_few_looks(node: Node, kubelet: Kubelet, start: Starter) -> None:
    daemon = start_calm(start, node, kubelet)
    before, began = wakes(daemon), time.monotonic()
    for number in range(4000):
        (node.plugins / f"file{number}").touch()
        (node.plugins / f"file{number}").unlink()
    looks = (time.monotonic() - began) / sdm.GATHER_SECONDS
    wait_calm(daemon)
    # A look that comes of a change wakes the main thread and the loop, the one after it the loop again.
    assert 3 <= wakes(daemon) - before < 4 * looks + 20
    assert [kubelet.count(name) for name in NAMES] == [1] * 5


def test_a_kernel_that_does_not_tell_is_looked_after(node: Node, serve: Starter) -> None:
    """Linux without CONFIG_DNOTIFY answers EINVAL; then kubelet.sock is looked at ten times a second."""
    daemon = serve(*NAMES, options=("--interval", "3600"), fault="import fcntl\nfcntl.F_NOTIFY = 0x7FFF")
    with Kubelet(node) as other:
        wait_ready(other, NAMES, AT_ONCE)
    assert daemon.stop() == 0 and "Traceback" not in daemon.log


def told_registered(log: str) -> list[int]:
    """How many resources each line of LOG says to be registered: all in one, unless the machine is slow meanwhile."""
    found = re.findall(r"INFO (?:(\d+) resources|\S+): registered with the kubelet", log)
    return [int(count or 1) for count in found]


@needs_root
def test_200_resources_are_few_lines_and_survive_a_crash(node: Node, kubelet: Kubelet, start: Starter) -> None:
    names = offer_many(node, 200)
    daemon = start()
    wait_ready(kubelet, names)
    wait_for(lambda: sum(told_registered(daemon.log)) == 200)
    assert len(told_registered(daemon.log)) < 10
    before = len(daemon.log)
    kubelet.down()
    daemon.says("kubelet does not answer")
    settle(daemon, 1.0)
    assert daemon.log[before:].count("\n") == 1
    kubelet.up()
    wait_ready(kubelet, names)
    wait_for(lambda: sum(told_registered(daemon.log[before:])) == 200)
    assert daemon.log[before:].count("\n") < 12
    assert len(kubelet.requests) == 400
    daemon.kill()
    assert len(sockets(node)) == 200
    daemon = start()  # over dead sockets
    wait_for(lambda: len(kubelet.requests) == 600)
    wait_ready(kubelet, names)
    assert len(os.listdir(f"/proc/{daemon.process.pid}/task")) <= 16
    stops_well(daemon, node)


# The kernel tells of changes in the folders of /dev. Here, too, the --interval is an hour, so that no poll helps.


@needs_root
def test_a_plug_and_an_unplug_are_seen_at_once(node: Node, kubelet: Kubelet, start: Starter) -> None:
    node.rules("- {devicematch: '^(video|bus/usb/.*/|serial/|snd$)', resource: pool}\n")
    node.plug("bus/usb/001/001")
    daemon = start("--interval", "3600")
    kubelet.wait_for("pool", Healthy=1)
    for turn, work in enumerate(
        (
            lambda: node.plug("video0"),
            lambda: node.plug("bus/usb/001/002"),  # in a folder that was there
            lambda: node.plug("bus/usb/002/001"),  # in a new one
            lambda: node.plug("bus/usb/002/002"),  # that is watched by now
            lambda: node.link("serial/by-id/x", "../../ttyUSB0") and node.plug("ttyUSB0"),
            lambda: node.plug("snd/a"),
        ),
        2,
    ):
        work()
        kubelet.wait_for("pool", Healthy=turn)
    for turn, path in enumerate(("bus/usb/002/001", "video0", "bus/usb/001/001", "snd/a"), 1):
        node.unplug(path)
        kubelet.wait_for("pool", Healthy=7 - turn, Unhealthy=turn)
    shutil.rmtree(node.dev / "bus")
    kubelet.wait_for("pool", Healthy=1, Unhealthy=6)
    node.plug("bus/usb/001/001")  # all these folders are others now
    kubelet.wait_for("pool", Healthy=2, Unhealthy=5)
    node.plug("bus/usb/001/003")
    kubelet.wait_for("pool", Healthy=3, Unhealthy=5)
    assert kubelet.count("pool") == 1
    assert daemon.stop() == 0


@needs_root
def test_no_change_in_dev_is_lost(node: Node, kubelet: Kubelet, start: Starter) -> None:
    """However the changes fall between the looks and the ticks of the clock, the last ones are seen, too."""
    node.rules("- {devicematch: '^([abc]/)+[0-9]$', resource: pool}\n")
    node.plug("a/0")
    start("--interval", "3600")
    kubelet.wait_for("pool", Healthy=1)
    rng = random.Random(1)
    for _ in range(15):
        for _ in range(rng.randrange(1, 60)):
            path = "/".join([*rng.choices("abc", k=rng.randrange(1, 4)), str(rng.randrange(3))])
            if (node.dev / path).exists():
                node.unplug(path)
            else:
                node.plug(path)
            if rng.random() < 0.2:
                shutil.rmtree(node.dev / rng.choice("abc") / rng.choice("abc"), ignore_errors=True)
            time.sleep(rng.choice((0, 0, 0.001, 0.02)))
        found = {str(path.relative_to(node.dev)) for path in node.dev.rglob("[0-9]")}

        def is_seen(found: set[str] = found) -> bool:
            healthy = {slot for slot, health in kubelet.health("pool").items() if health == "Healthy"}
            return {slot.rpartition(":")[0] for slot in healthy} == found

        wait_for(is_seen, lambda found=found: f"{found}; kubelet has {dict(kubelet.health('pool'))}", patience=3.0)


@needs_root
def test_storms_in_dev_are_few_looks_and_starve_nobody(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    node.plug("video0")
    daemon = serve("pool", rules="- {devicematch: '^video', resource: pool}\n", options=("--interval", "3600"))
    wait_calm(daemon)
    storm = node.dev / "storm"
    before, used, began = wakes(daemon), psutil.Process(daemon.process.pid).cpu_times(), time.monotonic()
    with Swapping(storm.touch, storm.unlink):
        for number in range(1, 4):
            node.plug(f"video{number}")
            kubelet.wait_for("pool", Healthy=1 + number)
            assert kubelet.gives("pool", f"video{number}:0")
        kubelet.down()
        kubelet.up()
        wait_ready(kubelet, ["pool"], AT_ONCE)
        wait_for(lambda: time.monotonic() - began > 2.0)
        now = psutil.Process(daemon.process.pid).cpu_times()
        looks, seconds = wakes(daemon) - before, time.monotonic() - began
    assert looks < 4 * seconds / sdm.REST_SECONDS + 100  # a look wakes the main thread, and what it finds the others
    assert now.user + now.system - used.user - used.system < 0.5 * seconds
    wait_calm(daemon)


def watched(daemon: Daemon) -> list[str]:
    """The folders of /dev that the daemon holds open."""
    folder = f"/proc/{daemon.process.pid}/fd"
    paths = (os.path.realpath(f"{folder}/{name}") for name in os.listdir(folder))
    return [path for path in paths if f"{path}/".startswith(f"{daemon.node.dev}/")]


@needs_root
def test_folders_beyond_the_limit_are_left_to_the_poll(node: Node, kubelet: Kubelet, start: Starter) -> None:
    """Those in which rules name something come first."""
    count = sdm.MAX_WATCHED - 3  # and /dev, cpu, usb and usb/1
    for number in range(count):
        (node.dev / f"cpu/{number}").mkdir(parents=True)
    node.plug("usb/1/1")
    node.rules("- {devicematch: '^(usb/1/.|cpu/.*/x)$', resource: pool}\n")
    daemon = start("--interval", "3")
    kubelet.wait_for("pool", Healthy=1)
    wait_for(lambda: len(watched(daemon)) == sdm.MAX_WATCHED)
    assert str(node.dev / "usb/1") in watched(daemon)
    (far,) = {f"cpu/{number}" for number in range(count)} - {path[len(str(node.dev)) + 1 :] for path in watched(daemon)}
    began = time.monotonic()
    node.plug("usb/1/2")
    kubelet.wait_for("pool", Healthy=2)
    assert time.monotonic() - began < 1.0
    node.plug(f"{far}/x")
    kubelet.wait_for("pool", Healthy=3)


@needs_root
def test_the_watches_take_no_more_than_a_part_of_the_descriptors(node: Node, serve: Starter) -> None:
    for number in range(100):
        (node.dev / str(number)).mkdir()
    daemon = serve("null", through=["prlimit", "--nofile=256:256"])
    wait_for(lambda: len(watched(daemon)) == 16)
    assert str(node.dev) in watched(daemon)


# What goes wrong with one resource


def delete_socket(kubelet: Kubelet, resource: str) -> None:
    os.unlink(f"{kubelet.folder}/smarter-{resource}.sock")


@pytest.mark.parametrize(
    ("lose", "lost", "problem"),
    [
        (delete_socket, ["null"], "its socket file was deleted"),
        (delete_socket, NAMES, "its socket file was deleted"),
        (Kubelet.end_stream, ["null"], "the kubelet ended its stream"),
    ],
)
def test_a_resource_that_the_kubelet_has_lost_is_registered_again(
    node: Node, kubelet: Kubelet, serve: Starter, lose: Any, lost: Sequence[str], problem: str
) -> None:
    daemon = serve(*NAMES)
    for turn in (2, 3):
        streams = [kubelet.client(name) for name in lost]
        for name in lost:
            lose(kubelet, name)
        wait_for(lambda streams=streams: not any(client.is_open for client in streams))
        wait_ready(kubelet, NAMES)
        assert len(sockets(node)) == 5
        assert [kubelet.count(name) for name in NAMES] == [turn if name in lost else 1 for name in NAMES]
    daemon.says(f"WARNING .*: {problem}")


def test_streams_that_end_again_and_again_have_growing_pauses(node: Node, kubelet: Kubelet, start: Starter) -> None:
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


def test_pauses_grow_to_30_s_and_begin_again_once_a_stream_has_held() -> None:
    backoff = sdm.Backoff()
    pauses = []
    for _ in range(7):
        backoff.fail(100.0)
        pauses.append(backoff.retry_at - 100.0)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    backoff.reset()
    assert backoff.retry_at == 0.0
    backoff.fail(120.0, at_once=True)
    assert backoff.retry_at == 120.0
    backoff.fail(131.0, at_once=True)
    assert backoff.retry_at == 132.0


def test_registered_and_no_stream_within_5_seconds(node: Node, kubelet: Kubelet, start: Starter) -> None:
    kubelet.opens_streams = False
    offer(node, "null")
    daemon = start()
    wait_for(lambda: any(task.done() for task in list(kubelet._watchers.values())))  # it has opened none
    kubelet.opens_streams = True
    kubelet.wait_for("null", Healthy=1)
    first, second = kubelet.times("null")
    assert 5.0 < second - first < 8.0
    assert daemon.log.count("kubelet opened no stream within 5 s") == 1


def test_a_refused_registration_is_told_and_tried_again(node: Node, kubelet: Kubelet, start: Starter) -> None:
    kubelet.refused["null"] = "no room\nat the inn"
    offer(node, *NAMES)
    daemon = start()
    wait_ready(kubelet, [name for name in NAMES if name != "null"])
    wait_for(lambda: kubelet.count("null") == 3)
    first, second, third = kubelet.times("null")
    assert 0.9 < second - first < third - second  # 1 s, then 2 s, and what a busy machine adds
    assert 1.9 < third - second < 8.0
    wait_for(lambda: "no room" in daemon.log)
    assert daemon.log.count("no room") == 1
    daemon.says(r"WARNING smarter-devices/null: the kubelet refused to register it \(UNKNOWN\): no room\\nat the inn")
    assert sum(kubelet.count(name) for name in NAMES) == 7
    kubelet.refused["null"] = "no beds"  # another reason is news
    daemon.says("WARNING smarter-devices/null: the kubelet refused to register it .*no beds")
    kubelet.refused.clear()
    kubelet.down()
    kubelet.up()  # another kubelet: what the last one refused is forgotten, and so are the pauses
    wait_ready(kubelet, NAMES, 2.0)


# Other instances


def published(node: Node) -> dict[str, int]:
    """The sockets under the names that kubelet is given, and their inodes."""
    return {name: inode for name, inode in sockets(node).items() if name.startswith("smarter-")}


@needs_root
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_handover_is_a_moment_without_a_stream(node: Node, kubelet: Kubelet, start: Starter, signum: int) -> None:
    """.ci/bench measures it for 200 resources, where the goal is 0.3 s; here the machine may be busy."""
    names = offer_many(node, 20)
    first = start()
    wait_ready(kubelet, names)
    second = start()
    second.says(f"INFO 20 resources: {sdm.OTHER_INSTANCE}")
    before = published(node)
    settle(second)
    assert published(node) == before and len(kubelet.requests) == 20  # the other one is left alone
    first.process.send_signal(signum)
    wait_for(lambda: len(kubelet.requests) == 40)
    wait_ready(kubelet, names)
    assert first.process.wait(PATIENCE) == (0 if signum == signal.SIGTERM else -signum)
    settle(second)
    streams = [kubelet.streams[kubelet.name(name)] for name in names]
    gaps = [longest_gap([(opened, client.closed_at) for opened, client in each]) for each in streams]
    print(f"longest without a stream: {max(gaps):.3f} s")
    assert 0 < max(gaps) < 1.5
    assert [kubelet.count(name) for name in names] == [2] * 20  # none was registered in vain
    assert "WARNING" not in second.log and second.log.count("another instance") == 1
    stops_well(second, node)


def test_two_instances_share_a_new_kubelet_at_once(node: Node, kubelet: Kubelet, start: Starter) -> None:
    offer(node, *NAMES)
    daemons = [start()]
    wait_ready(kubelet, NAMES)
    daemons.append(start())
    daemons[1].says("5 resources: another instance")
    for turn in (2, 3, 4):
        kubelet.down()
        settle(daemons[0])
        kubelet.up()
        wait_for(lambda turn=turn: len(kubelet.requests) == 5 * turn, patience=3.0)
        wait_ready(kubelet, NAMES, 3.0)
        settle(daemons[0], 0.3)
    logs = "\n".join(daemon.log for daemon in daemons)
    assert len(kubelet.requests) == 20, logs  # each resource once, by one of them
    assert "cannot listen" not in logs
    daemons[0].kill()
    wait_for(lambda: len(kubelet.requests) == 25)
    wait_ready(kubelet, NAMES)
    assert daemons[1].stop() == 0
    assert not published(node)


def test_readyz_counts_what_another_instance_serves(kubelet: Kubelet, start: Starter, serve: Starter) -> None:
    """Or a roll-out would never end: the old pod is deleted only when the new one is ready."""
    first = serve("null", "zero")
    status = Status(start("--listen", "127.0.0.1:0"))
    names = ["smarter-devices/null", "smarter-devices/zero"]
    others = "".join(f"{name}: {sdm.OTHER_INSTANCE}\n" for name in names)
    assert status.wait_for("/readyz", 200).body == f"ok\n{others}"
    assert [status.metrics()["registered", name] for name in names] == [0, 0]
    assert status.resource("null")["served_by_other"] and not status.resource("null")["ready"]
    assert status.document()["ready"], "one truth for /readyz and /status.json"
    assert first.stop() == 0
    wait_for(lambda: status.ask("/readyz").body == "ok\n")
    wait_for(lambda: [status.metrics()["registered", name] for name in names] == [1, 1])
    kubelet.down()
    status.wait_for("/readyz", 503)


def test_an_instance_takes_over_from_each_of_several_others(node: Node, kubelet: Kubelet, start: Starter) -> None:
    """As when a roll-out overtakes another: the third instance waits for two, and has other rules."""
    offer(node, "null", "zero", "full")
    node.rules("- devicematch: ^(null|zero)$\n")
    one, three = node.root / "one.yaml", node.root / "three.yaml"
    one.write_text("- devicematch: ^null$\n")
    three.write_text("- {devicematch: ^(null|full)$, nummaxdevices: 3}\n")
    first = start("--conf", str(one))
    wait_ready(kubelet, ["null"])
    second = start()
    wait_ready(kubelet, ["null", "zero"])
    third = start("--conf", str(three))
    kubelet.wait_for("full", Healthy=3)
    third.says("smarter-devices/null: another instance")
    second.kill()
    kubelet.wait_for("zero", Unhealthy=1)
    assert kubelet.count("null") == 1
    assert first.stop() == 0
    kubelet.wait_for("null", Healthy=3)
    assert [kubelet.count(name) for name in ("null", "zero", "full")] == [2, 1, 1]
    assert third.stop() == 0


async def leases_of_two_instances(folder: str) -> None:
    """Two processes, since the locks of one do not conflict; the other has the names that it is given on its stdin."""
    paths = [f"{folder}/{name}.sock" for name in ("one", "two", "old")]
    script = "import sys, smarter_device_manager as sdm; leases = sdm.Leases(sys.argv[1])\n"
    script += "for line in sys.stdin: print(eval(line), flush=True)"
    command = [sys.executable, "-c", script, f"{folder}/lock"]
    other = await asyncio.create_subprocess_exec(
        *command, cwd=HERE, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )

    async def ask(text: str) -> bool:
        other.stdin.write(f"{text}\n".encode())
        return (await other.stdout.readline()) == b"True\n"

    leases = sdm.Leases(f"{folder}/lock")
    assert leases.take(paths[0]) and leases.take(paths[0])  # twice is once
    assert not await ask(f"leases.take({paths[0]!r})")
    assert await ask(f"leases.take({paths[1]!r})")
    assert not leases.take(paths[1])
    woken = asyncio.Event()
    leases.wait_for(paths[1], woken.set)
    assert await ask("leases.is_awaited()") and not leases.is_awaited()
    leases.give_back(paths[0])
    assert await ask(f"leases.take({paths[0]!r})")
    assert not woken.is_set()
    other.kill()
    await asyncio.wait_for(woken.wait(), PATIENCE)
    leases.wait_for(paths[1], woken.set)
    assert all(map(leases.take, paths))
    await asyncio.sleep(2 * leases.RETRY_SECONDS)
    assert leases._timer is None  # nobody waits any more
    server = sdm.UnixServer(paths[2], lambda server: None)  # of an instance that has no leases
    await server.start()
    server.publish()
    with without_descriptors():
        assert not leases.take(paths[2])
    assert not leases.take(paths[2])
    await server.stop()
    assert leases.take(paths[2])
    os.rename(f"{folder}/lock", f"{folder}/moved")
    assert leases.take(paths[2]) and os.path.exists(f"{folder}/lock")
    leases.close()


async def servers_of_one_path(folder: str) -> None:
    path = f"{folder}/some.sock"
    first, second = (sdm.UnixServer(path, lambda server: None) for _ in range(2))
    await first.start()
    assert not first.is_lost()  # it has nothing to lose yet
    first.publish()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert not first.is_lost()
    await second.start()
    second.publish()  # in place of the other's
    assert first.is_lost() and not second.is_lost()
    await first.stop()  # what is at the path is no longer its own
    assert sdm.connect_error(path) is None and not second.is_lost()
    os.unlink(path)
    assert second.is_lost()
    await second.stop()
    assert os.listdir(folder) == []


@pytest.mark.parametrize("work", [leases_of_two_instances, servers_of_one_path])
def test_instances_leave_alone_what_another_has(node: Node, work: Callable[[str], Any]) -> None:
    asyncio.run_coroutine_threadsafe(work(str(node.plugins)), Kubelet.loop).result(2 * PATIENCE)


def test_instances_with_other_rules_or_domains_share_a_node(node: Node, kubelet: Kubelet, start: Starter) -> None:
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


# Signals, and the end


def test_sighup_reads_config_file_and_devices_at_once(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    offer(node, "null", "zero")
    daemon = serve("null", rules="- devicematch: ^null$\n", options=("--interval", "3600"))
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
def test_a_signal_ends_it_in_good_order(node: Node, kubelet: Kubelet, serve: Starter, signum: int) -> None:
    daemon = serve(*NAMES)
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


@pytest.mark.parametrize("when", ["before kubelet", "kubelet registers slowly", "after kubelet"])
def test_it_ends_whatever_kubelet_does(node: Node, kubelet: Kubelet, start: Starter, when: str) -> None:
    offer(node, *NAMES)
    if when == "before kubelet":
        kubelet.down()
    elif when == "kubelet registers slowly":
        kubelet.delay = 60.0
    daemon = start()
    if when == "kubelet registers slowly":
        wait_for(lambda: kubelet.open_calls == 5)
    elif when == "after kubelet":
        wait_ready(kubelet, NAMES)
        kubelet.down()
    if when != "kubelet registers slowly":
        daemon.says("kubelet does not answer")
    stops_well(daemon, node)
    wait_for(lambda: kubelet.open_calls == 0)


APP = "app/smarter_device_manager.py"
MODULE = ["-m", "smarter_device_manager"]
FLAGS = ["-E", "-s", "-Wignore", "-X", "utf8"]
STARTS = {  # what Python is given in the node's root, and the flags of Python that starts again; None: it does not
    "script": ([APP], []),
    "flags": ([*FLAGS, APP], FLAGS),
    "link": (["link"], []),
    "no ending": (["app/no_ending"], []),
    "name of a built-in module": (["app/time.py"], []),
    "folder": (["app"], None),
    "folder without byte code": (["-B", "app"], ["-B"]),
    "isolated": (["-I", APP], ["-I"]),
    "module": (MODULE, None),
    "module without byte code": (["-B", *MODULE], ["-B"]),
    "installed command": (["installed"], None),  # as pip makes it
    "profiler": (["-m", "cProfile", "-o", os.devnull, APP], None),
}


@pytest.fixture
def app(node: Node) -> Path:
    """The script in a folder of its own, under several names; "cwd" has modules that must not be imported."""
    folder = node.root / "app"
    folder.mkdir()
    for name in ("api_pb2.py", "api_pb2_grpc.py", SCRIPT.name):
        shutil.copy(HERE / name, folder)
    for name in ("no_ending", "time.py", "__main__.py"):
        os.link(folder / SCRIPT.name, folder / name)
    (node.root / "link").symlink_to(APP)
    (node.root / "installed").write_text(f"import sys, {SCRIPT.stem}\nsys.exit({SCRIPT.stem}.main())\n")
    (node.root / "cwd").mkdir()
    for name in (SCRIPT.stem, "json", "asyncio", "grpc", "api_pb2"):
        (node.root / "cwd" / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    return folder


def shown(process: subprocess.Popen[str]) -> list[str]:
    """What ps(1) shows of PROCESS, without the interpreter."""
    return Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")[1:-1]


@pytest.mark.parametrize("how", STARTS)
def test_every_way_to_start_it_serves(node: Node, kubelet: Kubelet, app: Path, how: str) -> None:
    """And ps(1) shows a command line that a person on the node recognises; relative paths still work."""
    offer(node, "null")
    given, flags = STARTS[how]
    options = [*node.options()[2:], "--conf", node.conf.name]
    environment = {**os.environ, "PYTHONPATH": ":".join(["app", *filter(None, sys.path)])}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    process = subprocess.Popen(
        [sys.executable, *given, *options], cwd=node.root, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        kubelet.wait_for("null", Healthy=1)
        *before, begin = shown(process)[: -len(options)]
        assert shown(process)[-len(options) :] == options
        if flags is None:
            assert [*before, begin] == given
        else:
            assert before == [*flags, "-c"] and begin.startswith(f"__file__ = '{node.root}/")
        assert Path(f"/proc/{process.pid}/cwd").samefile(node.root)
    finally:
        process.terminate()
        _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, log
    assert "Traceback" not in log


@pytest.mark.parametrize("where", ["modules in it", "deleted"])
def test_the_working_directory_of_a_script_does_not_matter(node: Node, kubelet: Kubelet, app: Path, where: str) -> None:
    offer(node, "null")
    command = [sys.executable, str(app / SCRIPT.name), *node.options()]
    if where == "deleted":
        command = ["sh", "-c", 'rm -r "$PWD"; exec "$@"', "sh", *command]
    with subprocess.Popen(command, cwd=node.root / "cwd", stderr=subprocess.PIPE, text=True) as process:
        kubelet.wait_for("null", Healthy=1)
        assert f"__file__ = '{app / SCRIPT.name}'" in shown(process)[-1 - len(node.options())]
        process.terminate()
    assert process.returncode == 0


def test_a_restarted_script_keeps_its_name_and_environment(node: Node, app: Path) -> None:
    offer(node, "null")
    shutil.rmtree(node.plugins)
    modules = node.root / "modules"
    modules.mkdir()
    at_exit = "print(os.getcwd(), os.environ['PYTHONPATH'])"
    (modules / "sitecustomize.py").write_text(f"import atexit, os\natexit.register(lambda: {at_exit})\n")
    environment = {**os.environ, "PYTHONPATH": "modules"}
    command = [sys.executable, "link", *node.options()]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=node.root, env=environment)
    assert (done.returncode, done.stderr[:28]) == (1, "link: there is no directory ")
    assert done.stdout == f"{node.root} modules\n"


@needs_root
def test_a_script_takes_no_more_memory_than_a_module(node: Node, kubelet: Kubelet, app: Path) -> None:
    """Python does not give back what compiling takes, 20 MB."""
    offer(node, "null")

    def memory(*arguments: str) -> int:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(node.root / "cache")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        with subprocess.Popen(
            [sys.executable, *arguments, *node.options()], cwd=app, stderr=subprocess.DEVNULL, env=environment
        ) as process:
            kubelet.wait_for("null", Healthy=1)
            resident = psutil.Process(process.pid).memory_info().rss
            process.terminate()
        kubelet.wait_for("null", Healthy=0)
        return resident

    memory(*MODULE)  # leaves byte code
    assert memory(SCRIPT.name) < memory(*MODULE) + 3 * MIB
    shutil.rmtree(node.root / "cache")
    assert memory("-B", *MODULE) < memory(*MODULE) + 3 * MIB


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_it_starts(node: Node, kubelet: Kubelet, start: Starter, signum: int) -> None:
    """In a container the daemon is process 1, which loses signals without a handler; so they are blocked."""
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


def test_a_conf_that_is_no_file_is_not_waited_for(node: Node, serve: Starter) -> None:
    """The writer of a FIFO may never come; a daemon that waits for it would not react to signals."""
    os.mkfifo(node.root / "fifo")
    done = node.run("--conf", str(node.root / "fifo"))
    assert done.returncode == 1
    assert f"{node.root}/fifo:1:1: this is not a plain file" in done.stderr and "Traceback" not in done.stderr
    daemon = serve("null")
    (node.root / "fifo").rename(node.conf)
    daemon.says("this is not a plain file; .* the last good rules stay in force")
    stops_well(daemon, node)


CRASHES = {
    "device side": "sdm.Scanner.scan = fail",
    "device side, later": "sdm.Sysfs.tegra_gpus = fail",
    "kubelet side": "sdm.DevicePluginSide._check = fail",
    "kubelet side, a plan": "sdm.options_of = fail",
    "kubelet side, a resource": "sdm.Registration._watch = fail",
}
AFTER_THE_START = """
start = sdm.KubeletThread.start
def later(thread):
    start(thread)
    {fault}
sdm.KubeletThread.start = later
"""


@pytest.mark.parametrize("where", CRASHES)
def test_a_thread_that_fails_ends_the_process(node: Node, kubelet: Kubelet, start: Starter, where: str) -> None:
    offer(node, "null")
    daemon = start(fault=AFTER_THE_START.format(fault=CRASHES[where]))
    if where == "device side, later":
        wait_ready(kubelet, ["null"])
        daemon.hang_up()
    assert daemon.process.wait(PATIENCE) == 1
    assert daemon.log.count("Traceback") == 1 and "nobody foresaw this" in daemon.log
    assert not sockets(node)


# Whoever else talks to a plugin, or to the daemon in kubelet's place


def test_idle_and_flooding_clients_starve_nobody(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    offer(node, "null", "zero")
    daemon = serve("null", rules="- devicematch: ^null$\n  nummaxdevices: 2\n")
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


def test_the_stream_of_a_stranger_is_not_kubelets(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    """Somebody who listens in must not hide that kubelet's own stream has ended, nor look like it when he leaves."""
    daemon = serve("null")
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


def test_any_bytes_are_answered_or_refused(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    offer(node, "null", "zero")
    daemon = serve("null", "pool", rules="- devicematch: ^null$\n- devicematch: ^zero$\n  resource: pool\n")
    rng = random.Random(1)
    good = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["0", "zero:0"])])
    seeds = [good.SerializeToString(), b"\n\x0a\n\x03abc\x12\x03abc\x18\xff\xff\xff\xff\x07", b""]
    statuses = set()
    for name in ("null", "pool"):
        with grpc.insecure_channel(f"unix:{node.plugins}/smarter-{name}.sock") as channel:
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
    assert "DEADLINE_EXCEEDED" not in statuses and "INVALID_ARGUMENT" in statuses
    assert kubelet.gives("null") == {"/dev/null": "/dev/null"}
    assert kubelet.gives("pool", "zero:0") == {"/dev/zero": "/dev/zero"}
    assert all_ready(kubelet, ["null", "pool"])
    assert kubelet.count("null") == kubelet.count("pool") == 1
    assert "Traceback" not in daemon.log


@pytest.mark.parametrize(
    ("available", "must", "size", "wanted"),
    [
        ([], [], 2**31 - 1, []),
        (["null:0", "null:0", "nobody:0", ""], ["null:0"], -(2**31), ["null:0"]),
        (["null:0", "null:9", "x" * 100_000], [], 5, ["null:0"]),
        (["null:0", "null:1", "zero:2"] * 100_000, [], 9, ["null:0", "null:1", "zero:2"]),
    ],
)
def test_hostile_requests_for_a_preference(available: list[str], must: list[str], size: int, wanted: list[str]) -> None:
    conf = "- {devicematch: ^, nummaxdevices: 3, resource: pool}\n"
    found = offered(conf, snapshot_of({"null": "char", "zero": "char"})).resources["pool"]
    assert sorted(sdm.preferred_allocation(found, available, must, size)) == wanted


def test_requests_that_would_take_long_delay_nobody(node: Node, kubelet: Kubelet, start: Starter) -> None:
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
        process = psutil.Process(daemon.process.pid)
        before = sum(process.cpu_times()[:2])
        running = [call.future(request, timeout=PATIENCE) for call, request in calls]
        assert kubelet.gives("null") == {"/dev/null": "/dev/null"}
        assert sum(process.cpu_times()[:2]) - before < 5.0  # of CPU, for the machine may be busy with something else
        for call in running[:2]:
            assert call.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "asked for 2000000 containers at once" in call.details()
        assert len(running[2].result().container_responses[0].devices) == 1
    assert kubelet.count("null") == kubelet.count("pool") == 1
    assert len(daemon.log) < 10_000


@pytest.mark.parametrize("answer", [b"not gRPC at all", b""])
def test_a_kubelet_that_answers_anything(node: Node, kubelet: Kubelet, start: Starter, answer: bytes) -> None:
    """A listener that is no gRPC server, or one that hangs up at once."""
    kubelet.down()
    (node.plugins / "kubelet.sock").unlink()

    async def reply(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    server = kubelet.do(asyncio.start_unix_server(reply, f"{node.plugins}/kubelet.sock"))
    offer(node, "null", "zero")
    start().says("WARNING 2 resources: the kubelet refused to register it")
    kubelet.loop.call_soon_threadsafe(server.close)
    kubelet.up()
    wait_ready(kubelet, ["null", "zero"], 3.0)


# Every call is answered


def test_every_method_of_the_service_is_one_that_answers() -> None:
    methods = [name for name in vars(sdm.rpc.DevicePluginServicer) if not name.startswith("_")]
    assert sorted(methods) == sorted(METHODS)
    assert all(hasattr(getattr(sdm.Plugin, name), "__wrapped__") for name in methods)


UNFORESEEN = {  # a request of each method, and what fails when it is looked at
    "ListAndWatch": (pb.Empty(), "sdm._list_message"),
    "GetPreferredAllocation": (
        pb.PreferredAllocationRequest(container_requests=[pb.ContainerPreferredAllocationRequest()]),
        "sdm.preferred_allocation",
    ),
    "Allocate": (
        pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["video0:0"])]),
        "sdm.allocate",
    ),
    "PreStartContainer": (pb.PreStartContainerRequest(devices_ids=["video0:0"]), "sdm.HostDevices.find_start_problem"),
}


@needs_root
@pytest.mark.parametrize("method", UNFORESEEN)
def test_a_bug_is_answered_logged_and_counted(node: Node, kubelet: Kubelet, start: Starter, method: str) -> None:
    """The text of the exception is none that gRPC takes, nor one for a terminal; and it is long."""
    node.plug("video0")
    node.rules("- devicematch: video\n  resource: pool\n")
    request, failing = UNFORESEEN[method]
    text = r"nobody \udcff foresaw\x1b[31m\nINFO this" + " \u20ac" * 5000
    daemon = start("--listen", "127.0.0.1:0", fault=f"def fail(*_):\n    raise ValueError('{text}')\n{failing} = fail")
    wait_for(lambda: sockets(node) and kubelet.name("pool") in kubelet.clients)

    def answer() -> Any:
        with plugin_stub(node, "pool") as stub, pytest.raises(grpc.RpcError) as caught:
            list(itertools.chain(getattr(stub, method)(request, timeout=PATIENCE)))
        return caught.value if caught.value.code() is not grpc.StatusCode.UNAVAILABLE else None

    error = wait_for(answer)  # after a stream that failed, the kubelet's registration makes the socket again
    assert error.code() == grpc.StatusCode.INTERNAL
    words = error.details()
    assert words.startswith(
        f"smarter-devices/pool: {method} failed, which is a bug of the plugin: "
        r"ValueError: nobody \udcff foresaw\x1b[31m\nINFO this " + "\u20ac \u20ac"
    )
    assert re.search(r"[ \u20ac]\.\.\.$", words) and len(words.encode()) < 3000
    daemon.says(rf"CRITICAL smarter-devices/pool: {method} failed; this is a bug\n  Traceback \(most recent call last")
    assert r"  ValueError: nobody \udcff foresaw\x1b[31m" in daemon.log
    assert "\x1b" not in daemon.log and not re.search("^INFO", daemon.log, re.MULTILINE)
    status = Status(daemon)
    assert status.metrics()["internal_errors_total"] >= 1
    assert any(event["event"] == "internal-error" for event in status.document()["events"])
    assert daemon.stop() == 0


@needs_root
def test_a_client_that_goes_while_it_is_answered_is_no_bug(node: Node, kubelet: Kubelet, start: Starter) -> None:
    """grpc says so by an exception of its own, a moment before it cancels the call."""
    node.plug("video0")
    node.rules("- devicematch: video\n  resource: pool\n")
    gone = "from grpc._cython.cygrpc import ExecuteBatchError\ndef fail(*_):\n    raise ExecuteBatchError('gone')\n"
    daemon = start("--listen", "127.0.0.1:0", fault=f"{gone}sdm._list_message = fail")
    wait_for(lambda: sockets(node) and kubelet.name("pool") in kubelet.clients)
    with plugin_stub(node, "pool") as stub, pytest.raises(grpc.RpcError):
        list(stub.ListAndWatch(pb.Empty(), timeout=0.5))
    assert Status(daemon).metrics()["internal_errors_total"] == 0
    assert daemon.stop() == 0
    assert "bug" not in daemon.log and "ERROR" not in daemon.log and "Traceback" not in daemon.log


# A service manager: systemd starts the daemon before the kubelet, and restarts it if it hangs


@pytest.fixture
def manager(request: pytest.FixtureRequest, node: Node) -> Iterator[Manager]:
    manager = Manager(f"{node.root}/notify" if getattr(request, "param", "") == "path" else f"@{node.root}")
    yield manager
    manager.close()


@pytest.mark.parametrize("manager", ["path", "abstract"], indirect=True)
def test_the_daemon_first_and_kubelet_later(node: Node, start: Starter, manager: Manager) -> None:
    """It is ready without a kubelet, so that systemd starts one; then it registers everything soon."""
    names = offer_many(node, 10) if os.geteuid() == 0 else list(NAMES)
    if os.geteuid() != 0:
        offer(node, *names)
    own_pid = ["sh", "-c", 'WATCHDOG_PID=$$ exec "$@"', "sh"]
    daemon = start("--interval", "3600", through=own_pid, env={**os.environ, **manager.environment("400000")})
    assert manager.hear() == "READY=1"
    daemon.says("kubelet is not there")
    began = time.monotonic()
    assert [manager.hear() for _ in range(5)] == ["WATCHDOG=1"] * 5
    assert 0.7 < time.monotonic() - began < 3.0
    kubelet = Kubelet(node).up()
    began = os.stat(node.plugins / "kubelet.sock").st_ctime
    try:
        wait_ready(kubelet, names)
        last = max(streams[0][0] for streams in kubelet.streams.values()) + time.time() - time.monotonic()
        print(f"from kubelet.sock to the last registration: {last - began:.3f} s")
        assert last - began < 0.5  # the goal is 0.05 s, which .ci/bench measures; here the machine may be busy
        assert daemon.stop() == 0
    finally:
        kubelet.down()
    manager.wait_for_silence(0.5)
    assert set(manager.heard[:-1]) == {"READY=1", "WATCHDOG=1"} and manager.heard[-1] == "STOPPING=1"


HANGS = {
    "kubelet side": "deliver = sdm.DevicePluginSide.deliver\n"
    "sdm.DevicePluginSide.deliver = lambda side, plan: (deliver(side, plan), side._loop.call_later(1, hang))",
    "device side": "turn = sdm.DeviceSide.turn\n"
    "sdm.DeviceSide.turn = lambda devices, full=False, **more: hang() if full else turn(devices, full, **more)",
}


@pytest.mark.parametrize("side", HANGS)
def test_a_side_that_hangs_pings_no_watchdog(
    node: Node, kubelet: Kubelet, start: Starter, manager: Manager, side: str
) -> None:
    offer(node, "null")
    hang = "import time\nhang = lambda: time.sleep(3600)\n"
    daemon = start(fault=hang + HANGS[side], env={**os.environ, **manager.environment("100000")})
    wait_ready(kubelet, ["null"])
    wait_for(lambda: manager.hear() and manager.heard.count("WATCHDOG=1") == 3)
    if side == "device side":
        daemon.process.send_signal(sdm.SCAN_SIGNAL)
    manager.wait_for_silence(1.0)
    assert daemon.process.poll() is None
    daemon.kill()


# NOTIFY_SOCKET and WATCHDOG_USEC
INVALID_MANAGERS = {"/nowhere": "100000", "@": "9" * 5000, "relative": "-1", "/" * 500: "1e3", "\udcff": "0", "": "1"}


@pytest.mark.parametrize("address", INVALID_MANAGERS)
def test_invalid_variables_of_a_service_manager_are_ignored(node: Node, serve: Starter, address: str) -> None:
    variables = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": INVALID_MANAGERS[address]}
    daemon = serve("null", env={**os.environ, **variables})
    settle(daemon)
    stops_well(daemon, node)


def test_the_watchdog_of_others_is_not_pinged(node: Node, kubelet: Kubelet, start: Starter, manager: Manager) -> None:
    offer(node, "null")
    start(env={**os.environ, **manager.environment("100000"), "WATCHDOG_PID": "1"})
    assert manager.hear() == "READY=1"
    wait_ready(kubelet, ["null"])
    assert manager.hear(1.0) == ""


def test_a_full_queue_of_the_manager_is_told_later(
    node: Node, kubelet: Kubelet, start: Starter, manager: Manager
) -> None:
    """As while everything starts at boot. Otherwise systemd would end the daemon as one that does not start."""
    offer(node, "null")
    others = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, contextlib.suppress(BlockingIOError):
        other.setblocking(False)
        while True:
            other.sendto(b"X", f"\0{node.root}")
            others += 1
    start("--interval", "3600", env={**os.environ, "NOTIFY_SOCKET": manager.address})
    wait_ready(kubelet, ["null"])
    assert [manager.hear() for _ in range(others)] == ["X"] * others
    assert manager.hear() == "READY=1"
    manager.wait_for_silence(1.0)


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


@needs_root
def test_as_many_resources_as_there_are_descriptors_for(node: Node, kubelet: Kubelet, start: Starter) -> None:
    """Up to the hard limit. The first ones by name; the rest is named. Allocate and status server have a reserve."""
    names = sorted(offer_many(node, 120))
    daemon = start("--listen", "127.0.0.1:0", through=["prlimit", "--nofile=64:256"])
    status = Status(daemon)
    told = daemon.says(r"WARNING (\d+) resources: no file descriptors are left for it; raise the limit of this process")
    count = 120 - int(told[1])
    assert count == (256 - sdm.RESERVED_DESCRIPTORS) / 2
    wait_ready(kubelet, names[:count])
    settle(daemon)
    assert sorted(kubelet.clients) == sorted(kubelet.name(name) for name in names[:count])
    assert kubelet.gives(names[count - 1]) == {f"/dev/{names[count - 1]}": f"/dev/{names[count - 1]}"}
    unready = status.wait_for("/readyz", 503).body.splitlines()
    assert [line.partition(": ")[0] for line in unready] == [kubelet.name(name) for name in names[count:]]
    assert "no file descriptors are left for it" in unready[0]
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(status.connect()) for _ in range(sdm.StatusServer.MAX_CLIENTS)]
        wait_for(lambda: open_sockets(daemon) >= len(idle))
        assert kubelet.gives(names[0]) == {f"/dev/{names[0]}": f"/dev/{names[0]}"}
        assert status.ask("/healthz").status == 200
        kubelet.down()
        kubelet.up()
        wait_ready(kubelet, names[:count])
    node.rules(f"- devicematch: ^({'|'.join(names[3 : count + 3])})$\n")  # three go, and three may have their place
    wait_ready(kubelet, names[3 : count + 3])
    status.wait_for("/readyz", 200)
    node.rules("- devicematch: ^video\n")  # the first ones come back too late
    settle(daemon)
    assert all_ready(kubelet, names[3 : count + 3])


def test_a_limit_that_is_lowered_for_a_while_ends_nothing(node: Node, kubelet: Kubelet, serve: Starter) -> None:
    daemon = serve("null", "zero")
    node.rules("- devicematch: ^null$\n")
    daemon.says("zero: no longer offered")
    with descriptors_limited(daemon, descriptors(daemon)):
        node.rules("- devicematch: ^(null|zero)$\n")
        settle(daemon, 1.0)
        assert all_ready(kubelet, ["null"])
    wait_ready(kubelet, ["null", "zero"])
    assert kubelet.count("null") == 1


@pytest.mark.parametrize("has_room", [False, True])
def test_a_full_table_of_descriptors(kubelet: Kubelet, serve: Starter, has_room: bool) -> None:
    """Full for everything; or with room for as many as it has, so that it gets stuck halfway."""
    daemon = serve(*NAMES)
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


@pytest.mark.parametrize("path", ["/status.json", "/metrics"])
def test_status_pages_with_a_full_table_of_descriptors(serve: Starter, path: str) -> None:
    """A client is told so, for what the page says of the process cannot be read."""
    daemon = serve("null", options=("--listen", "127.0.0.1:0"))
    status = Status(daemon)
    with status.connect() as connection:
        wait_for(lambda: open_sockets(daemon) >= 1)
        with descriptors_limited(daemon, 3):
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert received(connection).startswith(b"HTTP/1.1 503 ")
    status.wait_for(path, 200)
    assert "this is a bug" not in daemon.log


def test_a_plugin_directory_that_cannot_be_written(node: Node, kubelet: Kubelet, start: Starter) -> None:
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


@needs_root
@pytest.mark.parametrize(
    ("how", "log"),
    [
        (
            ["sh", "-c", "until rm -r p; do :; done"],
            "the directory .*mounted was deleted, and only this mount keeps it; exiting",
        ),
        (["mv", "p", "away"], "the directory that is mounted at .*mounted was moved, from .*/p to .*/away; exiting"),
    ],
)
def test_a_plugin_directory_that_is_replaced_under_its_mount_ends_it(
    node: Node, kubelet: Kubelet, how: list[str], log: str
) -> None:
    """As in a container: the host makes another directory, and the mount is of the old one for ever. A full table of
    descriptors, with which nobody can read what is mounted, is no such thing."""
    mounted(node, "", "true")  # or skip
    offer(node, "null")
    there = node.root / "mounted"
    there.mkdir()
    enter = ["unshare", "--mount", "sh", "-ec", f'mount --bind {node.plugins} {there}\nexec "$@"', "sh"]
    daemon = Daemon(node, "--plugin-dir", str(there), through=enter)
    try:
        wait_ready(kubelet, ["null"])
        with descriptors_limited(daemon, 3):
            settle(daemon, 1.0)
        assert kubelet.gives("null") == {"/dev/null": "/dev/null"}
        subprocess.run(how, cwd=node.root, check=True)
        node.plugins.mkdir()
        assert daemon.process.wait(PATIENCE) == 1
        daemon.says(f"ERROR {log}")
        assert "Traceback" not in daemon.log
    finally:
        daemon.kill()


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_plugin_directory_that_vanishes(node: Node, kubelet: Kubelet, serve: Starter, comes_back: bool) -> None:
    """Away for a while; or gone for good, and a new kubelet makes another."""
    daemon = serve(*NAMES)
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


GPUS = "- devicematch: nvidia-gpu\n  nummaxdevices: 4\n"  # devices that take no root: they are folders of /sys


# ---------------------------------------------------------------------------------------------------------------------
# DRA: pure functions
# ---------------------------------------------------------------------------------------------------------------------


def device_of_path(path: str, **fields: Any) -> sdm.Device:
    values: dict[str, Any] = {
        "path": path, "line": 1, "is_pool": False, "slots": 1, "chosen_by": {}, "values": {}, "since": 0.0,
        "nodes": (sdm.DeviceNode(path, "", sdm.Entry(sdm.CHAR)),),
        "parts": (sdm.Part(path, f"/dev/{path}", False, "rw"),),
    }  # fmt: skip
    return sdm.Device(**{**values, **fields})


def plan_of(*devices: sdm.Device, pool: str = "") -> sdm.Plan:
    resources = {device.path: sdm.Resource(device.path, False, (device,)) for device in devices}
    return sdm.Plan({pool: sdm.Resource(pool, True, devices)} if pool else resources, (), ())


def slice_devices(plan: sdm.Plan) -> list[dict[str, Any]]:
    slots = sdm.slots_by_device_name(plan)
    return [sdm.slice_device(name, slot, "smarter-devices") for name, slot in slots.items()]


@settings(max_examples=300)
@given(st.lists(st.text("aAbB01-_/.:é", min_size=1, max_size=90), unique=True, min_size=1, max_size=30))
@example(["video-0", "video", "video-0-0", "VIDEO", "Video", "video_0", "a" * 58, "a" * 59, "-", "a-12345678"])
def test_names_of_devices_are_labels_and_unique(paths: list[str]) -> None:
    names = list(sdm.slots_by_device_name(plan_of(*(device_of_path(path, slots=3) for path in paths))))
    assert len(names) == 3 * len(paths)
    assert not [name for name in names if not re.fullmatch(LABEL, name)]
    assert len(list(sdm.slots_by_device_name(plan_of(device_of_path("a" * 200, slots=10000))))[-1]) == 63


def test_names_of_devices_are_the_same_tomorrow() -> None:
    for path, name in [
        ("video0", "video0-7"), ("ttyUSB0", "ttyusb0-8acffaea-7"), ("dri/renderD128", "dri-renderd128-78bc635c-7"),
        ("serial/by-id/usb-Silicon_Labs_CP2102_0001", "serial-by-id-usb-silicon-labs-cp2102-0001-57a571de-7"),
    ]:  # fmt: skip
        assert list(sdm.slots_by_device_name(plan_of(device_of_path(path, slots=8))))[-1] == name


def test_attributes_are_within_the_limits_of_the_api() -> None:
    facts = {"idVendor": "10c4", "serial": "é" * 200, "product": "x" * 64, "driver": "cp210x"}
    device = device_of_path("serial/" + "y" * 100, numa=(1,), facts=facts, slots=2)
    found = slice_devices(plan_of(device, pool="serial"))
    assert [item["attributes"]["slot"] for item in found] == [{"int": 0}, {"int": 1}]
    attributes = found[0]["attributes"]
    assert attributes["numaNode"] == {"int": 1}
    assert attributes["resource"] == attributes["pool"] == {"string": "serial"}
    assert attributes["path"] == {"string": ("/dev/serial/" + "y" * 100)[:64]}
    assert attributes["serial"] == {"string": "é" * 32}
    assert attributes["product"] == {"string": "x" * 64}
    assert all(re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,31}", name) for name in attributes)
    (alone,) = slice_devices(plan_of(device_of_path("video0", numa=(0, 1))))
    assert alone == {
        "name": "video0-0",
        "attributes": {"resource": {"string": "video0"}, "path": {"string": "/dev/video0"}, "slot": {"int": 0}},
    }
    for is_gone, what in ((True, "gone"), (False, "unhealthy")):
        (bad,) = slice_devices(plan_of(device_of_path("video0", problem="why", is_gone=is_gone)))
        assert bad["taints"] == [{"key": f"smarter-devices/{what}", "effect": "NoSchedule"}]


def test_names_of_slices_are_names_of_objects_and_unique() -> None:
    names = {
        sdm.slice_name(node, domain, index)
        for node, domain in [("a-b", "c"), ("a", "b-c"), ("n" * 253, "d" * 63), ("n" * 229 + "." + "m" * 20, "d")]
        for index in range(12)
    }
    assert len(names) == 48
    for name in names:
        assert len(name) <= 253
        assert re.fullmatch(rf"{LABEL}(\.{LABEL})*", re.sub("[nd]{64,}", "n", name)), name


def test_device_classes_are_as_in_the_facts() -> None:
    whole = sdm.device_class("smarter-devices")
    assert whole["metadata"]["name"] == "smarter-devices"
    assert whole["spec"] == {"selectors": [{"cel": {"expression": 'device.driver == "smarter-devices"'}}]}
    one = sdm.device_class("smarter-devices", "ttyUSB0")
    assert one["metadata"]["name"] == "ttyusb0-8acffaea.smarter-devices"
    assert one["spec"]["extendedResourceName"] == "smarter-devices/ttyUSB0"
    assert one["spec"]["selectors"][0]["cel"]["expression"] == (
        'device.driver == "smarter-devices" && device.attributes["smarter-devices"].resource == "ttyUSB0"'
    )
    for item in (whole, one):
        assert item["metadata"]["labels"] == {"app.kubernetes.io/managed-by": "smarter-device-manager"}
        assert (item["apiVersion"], item["kind"]) == ("resource.k8s.io/v1", "DeviceClass")
        assert len(item["metadata"]["name"]) <= 253
    assert len(sdm.device_class("d" * 63, "r" * 63)["metadata"]["name"]) <= 253


def test_what_a_claim_was_allocated_is_read() -> None:
    results = [result_of("a-0"), result_of("gpu-1", driver="gpu.example.com", pool="x"), result_of("b-0", "q/first")]
    results += [{**result_of("a-0", "watch"), "adminAccess": True}]
    claim = sdm.PreparedClaim("0-1", "default", "a")

    def read(results: Any, node: str = NODE_NAME, **metadata: str) -> sdm.PreparedClaim | None:
        status = {"allocation": {"devices": {"results": results}}} if results is not None else {}
        document = {"metadata": {"uid": "0-1", "name": "a", **metadata}, "status": status}
        return sdm.read_claim(document, claim, "smarter-devices", node)

    found = (sdm.ClaimedDevice("a-0", ("r", "watch")), sdm.ClaimedDevice("b-0", ("q",)))
    assert read(results) == claim._replace(devices=found)
    assert read(results, uid="0-2") is None
    with pytest.raises(sdm.AllocationError, match="a-0 is not of this node"):
        read(results, "node-2")
    for empty in ([], None):
        with pytest.raises(sdm.AllocationError, match="not allocated"):
            read(empty)
    for wrong, name in ((7, "a"), ([1], "a"), ([{}], "a"), (results, "b")):
        with pytest.raises(sdm.UNEXPECTED):
            read(wrong, name=name)


def test_a_cdi_file_is_read_back_and_any_other_is_refused() -> None:
    devices = (
        sdm.ClaimedDevice("a-0", ("r",), False, "a", "/dev/a", {"deviceNodes": [{"path": "/dev/a"}]}),
        sdm.ClaimedDevice("b-1", ("q", "s"), True, "b", "/dev/b", {"env": ["A=b"]}, "it is gone"),
    )
    claim = sdm.PreparedClaim("0-1", "default", "claim", devices)
    document = json.loads(json.dumps(sdm.cdi_document(claim, "d")))
    assert sdm.read_cdi_document(document, "d") == claim
    assert [device["name"] for device in document["devices"]] == ["0-1-a-0", "0-1-b-1:gone"]
    for path, value in [
        (("annotations", "d/claim-uid"), "0-2"), (("annotations", "d/claim-name"), "../x"), (("annotations",), None),
        (("annotations", "d/claim-uid"), 7), (("devices",), 7), (("devices",), [None]),
        (("devices", 0, "containerEdits"), []), (("devices", 0, "name"), "0-1-"), (("devices", 0, "annotations"), {}),
        (("devices", 0, "name"), "0-1-Video0-0"), (("devices", 0, "name"), "0-1-video0-\ud800"), (("devices",), []),
    ]:  # fmt: skip
        broken = json.loads(json.dumps(document))
        item = broken
        for key in path[:-1]:
            item = item[key]
        item[path[-1]] = value
        with pytest.raises(sdm.UNEXPECTED):
            sdm.read_cdi_document(broken, "d")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://10.96.0.1:443", (True, "10.96.0.1", 443, "")),
        ("https://[fd00::1]:6443/", (True, "fd00::1", 6443, "")),
        ("https://api.example.com/k8s/clusters/c-1/", (True, "api.example.com", 443, "/k8s/clusters/c-1")),
        ("http://127.0.0.1:8001", (False, "127.0.0.1", 8001, "")),
        ("http://localhost", (False, "localhost", 80, "")),
        ("http://[::1]:8001", (False, "::1", 8001, "")),
        ("https://[::ffff:10.0.0.1]", (True, "::ffff:10.0.0.1", 443, "")),
        (f"https://{'a' * 63}.example.", (True, f"{'a' * 63}.example.", 443, "")),
        *((url, "has no TLS") for url in ("http://10.96.0.1:443", "http://x.de", "http://127.0.0.1.example.com")),
        *((url, "is no URL such as") for url in (
            "ftp://127.0.0.1", "1.2.3.4:443", "https://", "https://a b", "https://x:99999", "https://x:y", "",
            "https://x?y", "https://u@x", "https://x/\n", "https://a..b", "https://.a", f"https://{'a' * 64}.example",
            "https://[..]", f"https://[{'a' * 64}]",
        )),
    ],
)  # fmt: skip
def test_urls_of_an_api_server(url: str, address: tuple[Any, ...] | str) -> None:
    with contextlib.nullcontext() if isinstance(address, tuple) else pytest.raises(ValueError, match=address):
        assert sdm.parse_api_url(url) == address


def read_answer(content: bytes) -> Any:
    """What a client reads in CONTENT, with which an API server answers its request."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(content)
        writer.close()

    async def read() -> Any:
        async with await asyncio.start_server(talk, "127.0.0.1") as server:
            api = sdm.ApiServer(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "", "")
            return await api.call("list", f"{API}/deviceclasses", read=lambda document: document["a"])

    return asyncio.run(read())


def test_answers_of_an_api_server() -> None:
    chunks = b'2;x=y\r\n{"\r\n0006\r\na": 1}\r\n0\r\n\r\n'
    for content in (
        answer_bytes(200, {"a": 1}),
        answer_bytes(200, b'{"a": 1}{', "content-length: 8"),
        answer_bytes(201, chunks, "transfer-encoding: chunked", "Content-Length: 3"),
    ):
        assert read_answer(content) == 1
    for status, body in ((429, {}), (503, b"<html>")):
        with pytest.raises(sdm.ApiError) as raised:
            read_answer(answer_bytes(status, body))
        assert raised.value.status == status
    too_long = sdm.MAX_API_ANSWER + 1
    for content, problem in [
        (b"", "hung up"), (b"SSH-2.0-OpenSSH\r\n", "speaks no HTTP"), (b"SSH-2.0 200\r\n\r\n", "speaks no HTTP"),
        (b"x" * (1 << 20), "speaks no HTTP"), (b"HTTP/1.1 200 OK", "hung up"), (b"HTTP/1.1 x\r\n\r\n", "no HTTP"),
        *(
            (answer_bytes(200, body), "answer to list .* is not one; is it an API server")
            for body in (b"{", [], [1], {}, {"b": 1}, b"[" * 40_000, b"\xff", {"a": [{}] * sdm.MAX_API_OBJECTS})
        ),
        (answer_bytes(200, b'{"a": 1}', "Content-Length: 7"), "is not one"),
        (answer_bytes(200, b"2\r\n{}\r\n", "Transfer-Encoding: chunked"), "is not one"),
        (answer_bytes(200, b"-1\r\n{}\r\n", "Transfer-Encoding: chunked"), "is not one"),
        (answer_bytes(200, b"{}", "Transfer-Encoding: chunked"), "is not one"),
        (answer_bytes(200, b" " * too_long), "longer than"),
        (answer_bytes(200, b" " * too_long, "Content-Length: 999999999"), "longer than"),
        (answer_bytes(200, b"fffffff\r\n" + b" " * (too_long + 1), "Transfer-Encoding: chunked"), "longer than"),
    ]:  # fmt: skip
        with pytest.raises(sdm.ApiError, match=problem):
            read_answer(content)


def test_what_an_api_server_refuses_is_said_in_words() -> None:
    for verb, path, status, text in [
        ("get", f"{API}/namespaces/nodes/resourceclaims/x", 403, 'the right "get" on "resourceclaims" (403): why'),
        ("create", f"{API}/deviceclasses", 404, "resource.k8s.io/v1 (404), which Kubernetes has since 1.34: why"),
        ("update", f"{API}/resourceslices/x", 500, "fails (500) to update resourceslices: why"),
    ]:
        assert text in sdm.api_problem(verb, path, status, "why")
        long = sdm.api_problem(verb, path, status, "\n" * 10_000)
        assert len(long) < 400 and "\n" not in long


# ---------------------------------------------------------------------------------------------------------------------
# DRA: an API server over TLS, with the checks and rights of a real one and faults to show; and a kubelet
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def cluster(node: Node, certificates: Path) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip(needs_root.kwargs["reason"])
    cluster = Cluster(node, certificates)
    yield cluster
    cluster.kubelet.down()
    cluster.api.down()


FORGETFUL = {"Claims.GONE_SECONDS": 0.0}  # for tests that need not wait until no pod can have a claim that is gone
IMPATIENT = {"Claims.PREPARE_SECONDS": 1.5}  # for tests of what a claim is refused for, which is said after a wait

VIDEO = "- devicematch: ^video[0-9]*$\n  nummaxdevices: 2\n"
SERIAL = "- devicematch: ^serial/\n"


@pytest.fixture
def camera(node: Node, cluster: Cluster) -> Cluster:
    """A cluster whose node has /dev/video0, with two slots."""
    node.plug("video0")
    node.rules(VIDEO)
    return cluster


# ---------------------------------------------------------------------------------------------------------------------
# DRA: what is published
# ---------------------------------------------------------------------------------------------------------------------


def test_devices_are_published_with_what_is_known_of_them(node: Node, cluster: Cluster, start: Starter) -> None:
    tty = node.plug("ttyUSB0")
    usb = {"idVendor": "10c4", "idProduct": "ea60", "serial": "0001"}
    usb.update(manufacturer="Silicon Labs", product="CP2102")
    node.sysfs("pci0/usb1", {"idVendor": "1d6b", "serial": "hub"})
    node.sysfs("pci0/usb1/1-1", {**usb, "numa_node": "1"})
    folder = node.sysfs("pci0/usb1/1-1/1-1:1.0/ttyUSB0/tty/ttyUSB0", {}, tty)
    for link, target in ((folder / "subsystem", "class/tty"), (folder.parents[1] / "driver", "bus/usb-serial/cp210x")):
        link.symlink_to(node.sys / target)
    node.plug("video0")
    node.rules(VIDEO + "- devicematch: ^ttyUSB\n  resource: serial\n")
    daemon = start(*cluster.options())
    name = "ttyusb0-8acffaea-0"
    cluster.ready("video0-0", "video0-1", name)
    values = {key: next(iter(value.values())) for key, value in cluster.api.devices()[name]["attributes"].items()}
    assert values == {
        **usb, "resource": "serial", "pool": "serial", "path": "/dev/ttyUSB0", "slot": 0, "numaNode": 1,
        "subsystem": "tty", "driver": "cp210x",
    }  # fmt: skip
    (item,) = cluster.api.slices()
    assert item["spec"]["driver"] == "smarter-devices"
    assert item["spec"]["nodeName"] == item["spec"]["pool"]["name"] == NODE_NAME
    assert (item["spec"]["pool"]["generation"], item["spec"]["pool"]["resourceSliceCount"]) == (1, 1)
    assert item["metadata"]["ownerReferences"][0]["uid"] == cluster.api.node_uid
    wait_for(lambda: len(cluster.api.classes()) == 3)
    assert cluster.api.classes().keys() == {"smarter-devices", "video0.smarter-devices", "serial.smarter-devices"}
    assert cluster.api.writes().count(("create", "resourceslices")) == 1
    assert len(cluster.api.writes()) == 4
    assert {(call.kind, call.verb) for call in cluster.api.calls} <= RIGHTS
    assert daemon.stop() == 0
    assert cluster.api.slices(), "they stay for whoever comes next"


def test_what_is_published_already_is_not_written_again(camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start)
    assert daemon.stop() == 0
    count, writes = len(camera.api.calls), camera.api.writes()
    daemon = camera.start_again(start, daemon)
    wait_for(lambda: [call.kind for call in camera.api.calls[count:]].count("deviceclasses") >= 2)
    assert daemon.stop() == 0
    assert camera.api.writes() == writes
    assert "published" not in daemon.log


@pytest.mark.parametrize("is_made_meanwhile", [False, True])
def test_classes_of_others_are_left_alone(is_made_meanwhile: bool, camera: Cluster, start: Starter) -> None:
    """Also those that another node makes at the same time."""

    def make(name: str) -> None:
        item = {"metadata": {"name": name}, "spec": {"mine": True}}
        support.SimulatedApiServer.put(camera.api, f"{API}/deviceclasses/{name}", item)

    theirs = "video0.smarter-devices"
    if is_made_meanwhile:
        camera.api.before_write = lambda target: make(theirs) if target.endswith("deviceclasses") else None
    else:
        make(theirs)
    daemon = start(*camera.options())
    daemon.says("made a DeviceClass name=smarter-devices")
    wait_for(lambda: ("get", theirs) in [(call.verb, call.name) for call in camera.api.calls])
    camera.node.rules("- devicematch: nothing\n")
    camera.wait_for_devices()
    assert daemon.stop() == 0
    assert "trying again" not in daemon.log
    assert camera.api.classes().keys() == {"smarter-devices", theirs}
    assert camera.api.classes()[theirs]["spec"] == {"mine": True}


def test_many_devices_are_several_slices_of_one_generation(node: Node, cluster: Cluster, start: Starter) -> None:
    for number in range(150):
        node.plug(f"video{number}")
    node.rules("- devicematch: ^video[0-9]*$\n")
    daemon = start(*cluster.options())
    cluster.wait_for_devices(*(f"video{number}-0" for number in range(150)))
    assert cluster.api.writes().count(("create", "resourceslices")) == 3
    node.unplug("video0")
    wait_for(lambda: cluster.api.tainted() == {"video0-0"})
    slices = cluster.api.slices()
    assert sorted(len(item["spec"]["devices"]) for item in slices) == [22, 64, 64]
    assert {item["spec"]["pool"]["generation"] for item in slices} == {2}
    for number in range(1, 100):
        node.unplug(f"video{number}")
    wait_for(lambda: len(cluster.api.tainted()) == 100)
    node.rules("- devicematch: ^video14.$\n")
    cluster.wait_for_devices(*(f"video{number}-0" for number in range(140, 150)))
    wait_for(lambda: len(cluster.api.slices()) == 1, "stale slices are removed")
    assert daemon.stop() == 0


OUR_SLICE = sdm.slice_name(NODE_NAME, "smarter-devices", 0)


@pytest.mark.parametrize(
    ("name", "generation", "then"), [("ours", 41, 42), ("ours", (1 << 63) - 1, 1), (OUR_SLICE, (1 << 63) - 1, 1)]
)
def test_stale_slices_of_ours_alone_are_removed(
    name: str, generation: int, then: int, camera: Cluster, start: Starter
) -> None:
    def old(name: str, **changes: Any) -> None:
        spec = {
            "driver": "smarter-devices", "nodeName": NODE_NAME, "devices": [],
            "pool": {"name": NODE_NAME, "generation": generation, "resourceSliceCount": 1}, **changes,
        }  # fmt: skip
        camera.api.put(f"{API}/resourceslices/{name}", {"metadata": {"name": name}, "spec": spec})

    old(name)
    old("other-node", nodeName="node-2")
    old("other-driver", driver="gpu.example.com")
    start(*camera.options()).says(f"published 2 devices in 1 ResourceSlice generation={then}")
    assert {item["metadata"]["name"] for item in camera.api.slices()} == {"other-node", "other-driver", OUR_SLICE}


def test_a_server_that_drops_taints_is_not_written_to_again_and_again(camera: Cluster, start: Starter) -> None:
    camera.api.drops_taints = True
    camera.serve(start, COMPARE_SECONDS=0.1, MIN_PUBLISH_SECONDS=0.05)
    camera.node.unplug("video0")
    wait_for(lambda: ("update", "resourceslices") in camera.api.writes())
    count = len(camera.api.calls)
    wait_for(lambda: len(camera.api.calls) > count + 5)
    assert camera.api.writes().count(("update", "resourceslices")) == 1


def test_a_node_that_was_made_anew_owns_the_slices(camera: Cluster, start: Starter) -> None:
    camera.serve(start, COMPARE_SECONDS=0.1, MIN_PUBLISH_SECONDS=0.05)
    camera.api.put(NODE_PATH, {"metadata": {"name": NODE_NAME, "uid": "another"}})
    camera.api.remove_slices()  # as the garbage collector does
    camera.wait_for_devices("video0-0", "video0-1")
    assert camera.api.slices()[0]["metadata"]["ownerReferences"][0]["uid"] == "another"
    camera.node.rules("- devicematch: ^video7$\n")
    camera.wait_for_devices()
    camera.api.put(NODE_PATH, {"metadata": {"name": NODE_NAME, "uid": "a third"}})
    camera.node.rules(VIDEO)
    camera.wait_for_devices("video0-0", "video0-1")
    assert camera.api.slices()[0]["metadata"]["ownerReferences"][0]["uid"] == "a third", "no slice had told of it"


# ---------------------------------------------------------------------------------------------------------------------
# DRA: prepare and unprepare
# ---------------------------------------------------------------------------------------------------------------------


def test_a_claim_is_prepared_and_unprepared_again_and_again(camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start)
    (info,) = camera.kubelet.infos
    assert (info.type, info.name, list(info.supported_versions)) == ("DRAPlugin", "smarter-devices", ["v1.DRAPlugin"])
    assert info.endpoint == f"{camera.kubelet.folder}/plugins/smarter-devices/dra.sock"
    assert stat.S_IMODE(os.stat(info.endpoint).st_mode) == 0o600
    claim = camera.claim("video0-1")
    for _ in range(2):
        (device,) = camera.prepare(claim).devices
        assert list(device.request_names) == ["r"]
        assert (device.pool_name, device.device_name) == (NODE_NAME, "video0-1")
        assert list(device.cdi_device_ids) == [f"smarter-devices/device={claim.uid}-video0-1"]
    document = json.loads(camera.file(claim).read_text())
    assert (document["cdiVersion"], document["kind"]) == ("0.6.0", "smarter-devices/device")
    assert document["devices"][0]["containerEdits"] == {
        "deviceNodes": [{"path": "/dev/video0", "hostPath": "/dev/video0", "permissions": "rw"}]
    }
    assert stat.S_IMODE(camera.file(claim).stat().st_mode) == 0o644
    assert camera.files() == {camera.file(claim).name}
    other = camera.claim("video0-0")
    assert camera.gives(other) == ({"/dev/video0": "/dev/video0"}, [])
    for _ in range(2):
        camera.unprepare(claim, other)
        assert not list(camera.cdi.iterdir())
    assert daemon.log.count("prepared for a pod") == 2
    assert not camera.gives(claim)[1]


def test_a_slot_is_refused_to_another_claim(camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start, **IMPATIENT)
    first, second = camera.claim("video0-0"), camera.claim("video0-0", "video0-1")
    camera.gives(first)
    for _ in range(3):
        error = camera.prepare(second).error
        assert error == f"smarter-devices: video0-0 is still prepared for the claim default/claim-1 (uid {first.uid})"
    assert daemon.log.count("is still prepared for the claim") == 1
    assert not camera.file(second).exists()
    assert not camera.gives(camera.claim("video0-1"))[1], "nothing of the second was taken"
    camera.unprepare(first)


def test_claims_that_cannot_be_prepared(camera: Cluster, start: Starter) -> None:
    """What no waiting helps is said at once."""
    for name in ("a1", "a2"):
        camera.node.plug(name)
    camera.node.rules(VIDEO + "- devicematch: ^a\n  resource: a\n  containerpath: /dev/a\n")
    start(*camera.options(), through=with_constants(**{"Claims.PREPARE_SECONDS": 3.0}))
    camera.ready("a1-0", "a2-0", "video0-0", "video0-1")
    unallocated, gone = camera.claim("video0-0"), camera.claim("video0-0")
    camera.api.put(camera.path(unallocated), {"metadata": {"name": unallocated.name, "uid": unallocated.uid}})
    names = {"namespace": "default", "name": gone.name, "uid": gone.uid}
    wrong = [{"uid": "../../x"}, {"uid": ""}, {"uid": "a/b"}, {"name": "../x"}, {"namespace": "a/b"}, {"name": "x?y"}]
    begin = time.monotonic()
    for claim, text in [
        (camera.claim("a1-0", "a2-0"), "would both be /dev/a in the container"),
        (camera.claim({**result_of("a1-0"), "pool": "node-2"}), "is not of this node"),
        (unallocated, "not allocated"),
        (pb.Claim(**{**names, "uid": "other"}), f"the API server has no claim default/{gone.name} with the uid other"),
        (pb.Claim(**{**names, "name": "no"}), f"the API server has no claim default/no with the uid {gone.uid}"),
        *((pb.Claim(**{**names, **changes}), "is not one") for changes in wrong),
    ]:
        assert text in camera.prepare(claim).error
    assert time.monotonic() - begin < 3
    camera.node.unplug("video0")
    for claim, text in [
        (camera.claim("video7-0"), 'this node offers no device "video7-0"'), (gone, "/dev/video0: it is gone"),
    ]:  # fmt: skip
        assert text in camera.prepare(claim).error
    answer = camera.prepare(camera.claim())
    assert (answer.error, list(answer.devices)) == ("", []), "it has no results of the driver"
    camera.unprepare(pb.Claim(uid="../x"))
    assert not camera.cdi.exists() or not list(camera.cdi.iterdir())


def test_what_is_given_is_as_with_the_device_plugin(node: Node, cluster: Cluster, start: Starter) -> None:
    node.plug("bus/ttyUSB7")
    node.link("serial/stick", "../bus/ttyUSB7")
    for name in ("snd/controlC0", "snd/pcmC0D0p", "video0", "media0"):
        node.plug(name)
    for name in ("gpu.0", "gpu.1"):
        node.sysfs(name, {})
    node.rules(
        SERIAL + "  containerpath: /dev/stick\n  permissions: r\n- devicematch: ^snd$\n"
        "- devicematch: ^video0$\n  with: [media0]\n  env: {CAMERA: '/dev/\\g<0>'}\n"
        "- devicematch: nvidia-gpu\n  resource: gpu\n"
    )
    start(*cluster.options())
    serial = "serial-stick-" + sdm.short_hash("serial/stick") + "-0"
    cluster.ready(serial, "snd-0", "video0-0", "nvidia-gpu0-0", "nvidia-gpu1-0")
    claim = cluster.claim(serial)
    assert cluster.gives(claim) == ({"/dev/stick": "/dev/bus/ttyUSB7"}, [])
    nodes = json.loads(cluster.file(claim).read_text())["devices"][0]["containerEdits"]["deviceNodes"]
    assert [item["permissions"] for item in nodes] == ["r"]
    sound = ("/dev/snd/controlC0", "/dev/snd/pcmC0D0p")
    assert cluster.gives(cluster.claim("snd-0"))[0] == dict(zip(sound, sound))
    camera = {"/dev/video0": "/dev/video0", "/dev/media0": "/dev/media0"}
    assert cluster.gives(cluster.claim("video0-0")) == (camera, ["CAMERA=/dev/video0"])
    gpus = cluster.claim("nvidia-gpu0-0", "nvidia-gpu1-0")
    assert cluster.gives(gpus) == ({}, ["NVIDIA_VISIBLE_DEVICES=0,1"]), "one request, so one container has both"
    cluster.unprepare(gpus)
    apart = cluster.claim("nvidia-gpu0-0", "nvidia-gpu1-0", requests={"nvidia-gpu0-0": "a", "nvidia-gpu1-0": "b"})
    first, second = cluster.prepare(apart).devices
    assert cluster.edits(apart, first.cdi_device_ids)[1] == ["NVIDIA_VISIBLE_DEVICES=0"]
    assert cluster.edits(apart, second.cdi_device_ids)[1] == ["NVIDIA_VISIBLE_DEVICES=1"]


def test_what_is_prepared_survives_a_crash(camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start)
    claim, gone, remade = (camera.claim(name) for name in ("video0-0", "video0-1", "video0-1"))
    ids = camera.prepare(claim).devices[0].cdi_device_ids
    camera.prepare(gone)
    before = camera.file(claim).stat()
    daemon.kill()
    text = camera.file(gone).read_text()
    camera.file(remade).write_text(text.replace(gone.uid, remade.uid).replace(gone.name, remade.name))
    camera.api.put(camera.path(remade), {"metadata": {"name": remade.name, "uid": "another"}})
    del camera.api.objects[camera.path(gone)]
    half = camera.cdi / f".smarter-devices_{claim.uid}.new"
    for name, text in ((half.name, "half"), ("foreign.json", "{broken"), ("other_0000-9.json", "{")):
        (camera.cdi / name).write_text(text)
    camera.api.down()
    daemon = start(*camera.options(), through=with_constants(**FORGETFUL))
    daemon.says("does not answer: Connection refused; trying again")
    assert camera.file(gone).exists(), "nobody knows yet"
    camera.api.up()
    wait_for(lambda: camera.files() == {camera.file(claim).name, "foreign.json", "other_0000-9.json"})
    assert camera.file(claim).stat().st_ino == before.st_ino, "not written again"
    assert camera.prepare(claim).devices[0].cdi_device_ids == ids
    camera.unprepare(claim)
    assert not camera.file(claim).exists() and not half.exists()


def test_the_cdi_file_of_a_gone_claim_is_removed_when_possible(camera: Cluster, start: Starter) -> None:
    looks = with_constants(COMPARE_SECONDS=0.1, MIN_PUBLISH_SECONDS=0.05, **FORGETFUL)
    daemon = camera.serve(start)
    claim = camera.give("video0-0")
    daemon.kill()
    del camera.api.objects[camera.path(claim)]
    camera.cdi.chmod(0o555)
    daemon = start(*camera.options(), through=["setpriv", "--bounding-set=-dac_override", *looks])
    daemon.says(f"cannot remove {camera.file(claim)}: Permission denied")
    count = len(camera.api.calls)
    wait_for(lambda: len(camera.api.calls) > count + 10)
    assert daemon.log.count("cannot remove") == 1
    camera.cdi.chmod(0o755)
    wait_for(lambda: not camera.file(claim).exists())
    assert camera.gives(camera.claim("video0-0")), "no dead claim holds it"


def test_nothing_is_prepared_once_the_next_instance_may_serve(camera: Cluster, start: Starter) -> None:
    """It has read the CDI files by then, and would not know of another."""
    daemon = camera.serve(start)
    camera.give("video0-0")
    claim = camera.claim("video0-1")

    def end(verb: str, kind: str) -> float:
        daemon.process.send_signal(signal.SIGTERM)
        return 0.15

    camera.api.fault = end
    assert "this instance of the driver has ended" in camera.prepare(claim).error
    assert not camera.file(claim).exists()
    assert daemon.stop() == 0


def test_a_prepared_device_without_a_rule_stays_until_it_is_gone(camera: Cluster, start: Starter) -> None:
    camera.serve(start, **IMPATIENT)
    claim = camera.claim("video0-1")
    given = camera.gives(claim)
    camera.node.rules("- devicematch: ^video7$\n")
    camera.wait_for_devices()
    assert camera.gives(claim) == given
    assert "offers no device" in camera.prepare(camera.claim("video0-0")).error
    camera.node.unplug("video0")
    camera.wait_for_devices("video0-1")
    assert camera.api.tainted() == {"video0-1"}
    assert ":gone" in camera.file(claim).read_text()
    assert camera.prepare(claim).error == "smarter-devices: /dev/video0: it is gone"
    camera.node.plug("video0")  # without a rule for it, nobody knows whether it is the same one
    swapped = "smarter-devices: /dev/video0: another device has taken its place"
    wait_for(lambda: camera.prepare(claim).error == swapped)
    assert ":gone" in camera.file(claim).read_text()
    camera.node.rules("- devicematch: ^video0$\n")
    camera.wait_for_devices("video0-0")
    assert camera.gives(claim) == given
    camera.node.unplug("video0")
    (camera.node.dev / "video0").touch()
    camera.wait_for_devices("video0-0", "video0-1")
    assert camera.api.tainted() == {"video0-0", "video0-1"}


def test_a_prepared_device_without_a_rule_costs_little(camera: Cluster, start: Starter) -> None:
    """It is looked at every second, as long as its pod runs."""
    many = "- devicematch: ^tty\n  nummaxdevices: 100\n"
    for number in range(40):
        camera.node.plug(f"tty{number}")
    camera.node.rules(many + VIDEO)
    daemon = start(*camera.options())
    wait_for(lambda: "video0-0" in camera.api.devices())
    camera.gives(camera.claim("video0-0"))
    camera.node.rules(many)
    wait_for(lambda: len(camera.api.devices()) == 4000 and len(camera.api.classes()) == 42)
    process = psutil.Process(daemon.process.pid)
    time.sleep(1.0)
    before = process.cpu_times()
    time.sleep(5.0)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.15, "3 % of a core"


def test_a_cdi_file_that_could_not_be_rewritten_is_rewritten_later(camera: Cluster, start: Starter) -> None:
    daemon = start(*camera.options(), through=["setpriv", "--bounding-set=-dac_override"])
    camera.ready("video0-0", "video0-1")
    claim = camera.give("video0-0")
    camera.cdi.chmod(0o555)
    camera.node.unplug("video0")
    daemon.says(f"cannot write {camera.file(claim)}: Permission denied")
    wait_for(lambda: len(camera.api.tainted()) == 2)
    assert ":gone" not in camera.file(claim).read_text()
    camera.cdi.chmod(0o755)
    wait_for(lambda: ":gone" in camera.file(claim).read_text())
    assert daemon.log.count("cannot write") == 1


def test_a_device_that_comes_back_with_another_number_is_given(node: Node, cluster: Cluster, start: Starter) -> None:
    node.plug("ttyUSB0")
    node.link("serial/stick", "../ttyUSB0")
    node.rules(SERIAL)
    name = "serial-stick-" + sdm.short_hash("serial/stick") + "-0"
    daemon = start(*cluster.options())
    cluster.ready(name)
    claim = cluster.claim(name)
    ids = cluster.prepare(claim).devices[0].cdi_device_ids
    assert cluster.edits(claim, ids)[0] == {"/dev/serial/stick": "/dev/ttyUSB0"}
    node.unplug("serial/stick")
    node.unplug("ttyUSB0")
    wait_for(lambda: cluster.api.tainted() == {name})
    assert cluster.taints() == {name: "gone:NoSchedule"}, "a short replug evicts no pod"
    with pytest.raises(KeyError):  # no container starts with what may come to stand there
        cluster.edits(claim, ids)
    node.plug("ttyUSB0")
    node.plug("ttyUSB1")
    node.link("serial/stick", "../ttyUSB1")
    wait_for(lambda: not cluster.api.tainted())
    wait_for(lambda: "ttyUSB1" in cluster.file(claim).read_text())
    assert cluster.edits(claim, ids)[0] == {"/dev/serial/stick": "/dev/ttyUSB1"}
    with cluster.file(claim).open() as old:
        node.link("serial/stick", "../ttyUSB0")
        wait_for(lambda: "ttyUSB0" in cluster.file(claim).read_text())
        assert "ttyUSB1" in old.read(), "another file was renamed into its place"
    daemon.kill()
    node.link("serial/stick", "../ttyUSB1")
    start(*cluster.options())
    wait_for(lambda: "ttyUSB1" in cluster.file(claim).read_text())


@pytest.mark.parametrize("is_for_b", [False, True])
def test_another_stick_in_the_place_of_a_prepared_one(
    node: Node, cluster: Cluster, start: Starter, is_for_b: bool
) -> None:
    node.sysfs("usb/1", {"serial": "A"}, node.plug("ttyUSB0"))
    rule = "- devicematch: ^ttyUSB\n  resource: a\n  attributes: {serial: A}\n"
    node.rules(rule + (rule.replace("a\n", "b\n").replace("A", "B") if is_for_b else ""))
    constants = with_constants(EXPIRY_SECONDS=2.0, FULL_SCAN_SECONDS=0.2)
    daemon = start(*cluster.options(**{"gone-grace": "0"}), through=constants)
    name = "ttyusb0-8acffaea-0"
    cluster.ready(name)
    claim = cluster.claim(name)
    ids = cluster.prepare(claim).devices[0].cdi_device_ids
    node.unplug("ttyUSB0")
    node.sysfs("usb/2", {"serial": "B"}, node.plug("ttyUSB0"))
    wait_for(lambda: cluster.taints() == {name: "gone:NoExecute"})
    wait_for(lambda: ":gone" in cluster.file(claim).read_text())
    daemon.says("/dev/ttyUSB0: no longer offered")
    node.plug("ttyUSB1")  # something new to publish
    node.rules(node.conf.read_text() + "- devicematch: ^ttyUSB1$\n")
    wait_for(lambda: len(cluster.api.devices()) == 2)
    assert cluster.taints() == {name: "gone:NoExecute"}
    assert cluster.api.devices()[name]["attributes"]["resource"] == {"string": "a"}
    with pytest.raises(KeyError):
        cluster.edits(claim, ids)
    cluster.unprepare(claim)
    if is_for_b:
        wait_for(lambda: cluster.api.devices()[name]["attributes"]["resource"] == {"string": "b"})
        assert not cluster.taints() and cluster.gives(cluster.claim(name))


def test_a_device_that_is_gone_is_tainted_and_comes_back(camera: Cluster, start: Starter) -> None:
    camera.serve(start, "--gone-grace", "1.5", EXPIRY_SECONDS=4.0, FULL_SCAN_SECONDS=0.2)
    claim = camera.give("video0-1")
    camera.node.unplug("video0")
    unplugged = time.monotonic()
    wait_for(lambda: camera.taints() == dict.fromkeys(("video0-0", "video0-1"), "gone:NoSchedule"))
    wait_for(lambda: camera.taints() == dict.fromkeys(("video0-0", "video0-1"), "gone:NoExecute"))
    assert time.monotonic() - unplugged >= 1.5
    camera.node.plug("video0")
    wait_for(lambda: not camera.api.tainted())
    camera.node.unplug("video0")
    wait_for(lambda: camera.taints() == dict.fromkeys(("video0-0", "video0-1"), "gone:NoExecute"))
    camera.wait_for_devices("video0-1")
    assert time.monotonic() - unplugged > 4
    assert camera.taints() == {"video0-1": "gone:NoExecute"}, "it is prepared"
    camera.unprepare(claim)
    camera.wait_for_devices()


def test_a_device_that_is_there_evicts_nobody(node: Node, cluster: Cluster, start: Starter) -> None:
    """Neither when it has changed, also over a restart of the daemon, nor when a companion is missing."""
    folder = node.sysfs("block/loop0", {"size": "0"}, node.plug("loop0", block=True))
    node.plug("cam0")
    node.plug("lock")
    node.rules(
        "- {devicematch: ^loop, resource: loops, attributes: {size: '0'}}\n- {devicematch: ^cam, with: [lock]}\n"
    )
    options = cluster.options(**{"gone-grace": "0"})
    daemon = start(*options, "--listen", "127.0.0.1:0", through=with_constants(**IMPATIENT))
    cluster.ready("loop0-0", "cam0-0")
    loop, cam = cluster.claim("loop0-0"), cluster.claim("cam0-0")
    given = cluster.gives(loop), cluster.gives(cam)
    (folder / "size").write_text("8\n")
    node.unplug("lock")
    daemon.hang_up()
    both = dict.fromkeys(("cam0-0", "loop0-0"), "unhealthy:NoSchedule")
    wait_for(lambda: cluster.taints() == both)
    metrics = Status(daemon).metrics()
    for name in ("smarter-devices/loops", "smarter-devices/cam0"):
        assert (metrics["devices", name, "absent"], metrics["devices", name, "unhealthy"]) == (0, 1)
    assert cluster.gives(loop) == given[0]
    assert "lock: it is gone" in cluster.prepare(cam).error
    daemon.kill()
    cluster.api.remove_slices()
    daemon = start(*options, through=with_constants(**IMPATIENT))
    wait_for(lambda: cluster.taints() == both)
    assert cluster.gives(loop) == given[0]
    cluster.unprepare(loop)
    assert 'its size is "8" and was "0"' in cluster.prepare(cluster.claim("loop0-0")).error
    (folder / "size").write_text("0\n")
    node.plug("lock")
    daemon.hang_up()
    wait_for(lambda: cluster.taints() == {})
    assert (cluster.gives(cluster.claim("loop0-0")), cluster.gives(cam)) == given


@pytest.mark.parametrize("is_away", [False, True])
def test_an_edit_of_the_config_file_costs_no_pod(is_away: bool, node: Node, cluster: Cluster, start: Starter) -> None:
    """The stick is the one that the claim was given; the rule asks for another one now."""
    node.sysfs("usb/1", {"serial": "A"}, node.plug("ttyUSB0"))
    rule = "- {devicematch: ^ttyUSB, resource: a, attributes: {serial: A}}\n"
    node.rules(rule)
    options = cluster.options(**{"gone-grace": "0"})
    daemon = start(*options)
    cluster.ready("ttyusb0-8acffaea-0")
    claim = cluster.claim("ttyusb0-8acffaea-0")
    given = cluster.gives(claim)
    if is_away:
        daemon.kill()
    node.rules(rule.replace("A}", "B}"))
    if is_away:
        daemon = start(*options)
        daemon.says("registered with the kubelet")
    cluster.wait_for_devices()
    assert cluster.gives(claim) == given
    assert not any("NoExecute" in taint for taint in cluster.taints().values())


def test_a_loose_contact_does_not_keep_the_api_server_busy(camera: Cluster, start: Starter) -> None:
    camera.serve(start, "--interval", "0.02")
    began, before = time.monotonic(), len(camera.api.writes())
    for _ in range(10):
        camera.node.unplug("video0")
        time.sleep(0.1)
        camera.node.plug("video0")
        time.sleep(0.1)
    camera.node.unplug("video0")
    wait_for(lambda: len(camera.api.tainted()) == 2)
    assert len(camera.api.writes()) - before <= 2 + time.monotonic() - began


def test_a_prepared_device_that_went_while_the_driver_was_away(camera: Cluster, start: Starter) -> None:
    camera.node.plug("video1")
    daemon = start(*camera.options())
    camera.ready("video0-0", "video0-1", "video1-0", "video1-1")
    claim, kept = camera.give("video0-0"), camera.give("video1-0")
    daemon.stop()
    camera.node.unplug("video0")
    camera.node.rules("- devicematch: ^video0$\n")
    start(*camera.options())
    assert camera.wait_for_devices("video0-0")["video0-0"]["attributes"]["resource"] == {"string": "video0"}
    # video1 is not offered any more, but there: its pod goes on
    assert camera.api.tainted() == {"video0-0"}
    assert ":gone" not in camera.file(kept).read_text()
    camera.unprepare(claim)
    camera.wait_for_devices()


DAMAGES: Mapping[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "moved": lambda path: path.rename(path.with_name("x")),
    "emptied": lambda path: path.write_text(""),
    "changed": lambda path: path.write_text(path.read_text().replace("/dev/video0", "/dev/video1")),
    "no devices": lambda path: path.write_text('{"kind": "smarter-devices/device", "devices": []}'),
    "wrong name": lambda path: path.write_text(path.read_text().replace("-video0-0", "-Video0-0")),
    "a link to itself": lambda path: path.unlink() or path.symlink_to(path),
}


@pytest.mark.parametrize("damage", ["deleted", "moved", "emptied", "changed"])
@pytest.mark.parametrize("by", ["signal", "look", "prepare"])
def test_a_cdi_file_that_somebody_changes_is_put_right(by: str, damage: str, camera: Cluster, start: Starter) -> None:
    if by != "look":
        camera.cdi.mkdir()  # one that is made later is watched from the next look on
    looks = {} if by == "look" else {"SOCKET_LOOK_SECONDS": 60.0}
    daemon = camera.serve(start, "--interval", "60", **looks)
    claim = camera.give("video0-0")
    content = camera.file(claim).read_text()
    for _ in range(2):
        DAMAGES[damage](camera.file(claim))
        if by == "prepare":
            camera.gives(claim)
            assert camera.file(claim).read_text() == content
        wait_for(lambda: camera.file(claim).exists() and camera.file(claim).read_text() == content)
    daemon.says("went, came back or changed|it does not hold what was written just now")


def test_a_cdi_file_that_changes_all_the_time_is_a_line_a_second(camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start)
    claim = camera.give("video0-0")
    began = time.monotonic()
    for _ in range(30):
        camera.file(claim).unlink()
        camera.gives(claim)
    seconds = time.monotonic() - began
    daemon.says("came back or changed" + (r" \(\d+ times since its last line\)" if seconds > 2.5 else ""))
    assert 1 <= daemon.log.count("went, came back or changed") <= 1 + seconds


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - {"moved", "changed"}))
def test_a_cdi_file_that_cannot_be_read_keeps_its_devices_taken(damage: str, camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start)
    claim, other, same = camera.give("video0-0"), camera.claim("video0-1"), camera.claim("video0-0")
    content = camera.file(claim).read_text()
    daemon.kill()
    DAMAGES[damage](camera.file(claim))
    camera.api.fault = lambda verb, kind: answer_bytes(503, {}) if (verb, kind) != ("get", "resourceclaims") else None
    daemon = camera.start_again(start, daemon, COMPARE_SECONDS=3600, **IMPATIENT)
    daemon.says("this CDI file cannot be read, so no device is given that its claim may have")
    camera.api.fault = lambda verb, kind: None
    wait_for(lambda: "is still prepared for the claim default/claim-1" in camera.prepare(same).error)
    assert camera.file(claim).read_text() == content, "the API server has told whose they are"
    assert camera.gives(other)


@pytest.mark.parametrize("end", ["prepare", "unprepare", "remove"])
def test_a_cdi_file_of_an_unknown_claim_keeps_all_devices_taken(end: str, camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start)
    claim, other = camera.give("video0-0"), camera.claim("video0-1")
    daemon.kill()
    camera.file(claim).write_text("")
    for link in camera.cdi.glob("*.claim"):
        link.unlink()
    daemon = camera.start_again(start, daemon, **{"Claims.PREPARE_SECONDS": 2.0})
    assert f"{camera.file(claim)} cannot be read, and its claim may have this device" in camera.prepare(other).error
    if end == "prepare":
        camera.gives(claim)
    elif end == "unprepare":
        camera.unprepare(claim)
    else:
        camera.file(claim).unlink()
    assert camera.gives(other)
    assert daemon.log.count("cannot be read, so") == 1


def test_a_cdi_file_that_another_instance_has_written_counts(camera: Cluster, start: Starter) -> None:
    """It does not know yet that this one serves."""
    daemon = camera.serve(start, **IMPATIENT)
    claim, foreign, other = camera.give("video0-0"), camera.claim("video0-1"), camera.claim("video0-1")
    text = camera.file(claim).read_text().replace(claim.uid, foreign.uid).replace(claim.name, foreign.name)
    camera.file(foreign).write_text(text.replace("video0-0", "video0-1"))
    assert f"still prepared for the claim default/{foreign.name}" in camera.prepare(other).error
    camera.unprepare(foreign)
    assert not camera.file(foreign).exists()
    assert camera.gives(other)
    wait_for(lambda: daemon.log.count("prepared for a pod") == 2)


def test_a_cdi_file_is_on_the_disk_before_it_has_its_name(camera: Cluster, start: Starter) -> None:
    trace = camera.node.root / "trace"
    through = with_constants()
    note = f"lambda text, file={str(trace)!r}: open(file, 'a').write(text + chr(10))"
    through[-1] = (
        f"import os; note = {note}; sync, rename = os.fsync, os.rename; "
        "os.fsync = lambda fd: (sync(fd), note('sync ' + os.readlink('/proc/self/fd/' + str(fd)))); "
        f"os.rename = lambda old, new: (rename(old, new), note('rename ' + new)); {through[-1]}"
    )
    start(*camera.options(), through=through)
    camera.ready("video0-0", "video0-1")
    claim = camera.give("video0-0")
    before, name, after = (line for line in trace.read_text().splitlines() if str(camera.cdi) in line)
    assert before.startswith(f"sync {camera.cdi}/.smarter-devices_")
    assert (name, after) == (f"rename {camera.file(claim)}", f"sync {camera.cdi}")


def test_a_cdi_file_that_cannot_be_written_is_an_error_of_the_claim(camera: Cluster, start: Starter) -> None:
    for number in range(100):
        camera.node.plug(f"many/{number}")
    camera.node.rules(f"{VIDEO}- devicematch: ^many$\n")
    start(*camera.options(), through=with_constants(MAX_FILE_BYTES=6000))
    camera.ready("many-0", "video0-0", "video0-1")
    error = camera.prepare(camera.claim("many-0")).error
    assert re.search("cannot write a CDI file: it would have .* bytes, and more than 6000 are not read again", error)
    assert not camera.cdi.exists() or not list(camera.cdi.iterdir())
    if camera.cdi.exists():
        camera.cdi.rmdir()
    camera.cdi.write_text("in the way")
    claim = camera.claim("video0-0")
    assert camera.prepare(claim).error == "smarter-devices: cannot write a CDI file: File exists"
    camera.cdi.unlink()
    assert camera.gives(claim)[0]


def test_admin_access_takes_a_device_from_nobody(camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start, **IMPATIENT)
    watch = {**result_of("video0-0", "watch"), "adminAccess": True}
    before, owner, after = (camera.claim(*names) for names in ([watch], ["video0-0"], [watch]))
    for claim in (before, owner, after):
        assert camera.gives(claim)[0] == {"/dev/video0": "/dev/video0"}
    assert "is still prepared for the claim default/claim-2" in camera.prepare(camera.claim("video0-0")).error
    camera.start_again(start, daemon, **IMPATIENT)
    assert "is still prepared for the claim default/claim-2" in camera.prepare(camera.claim("video0-0")).error
    camera.unprepare(owner)
    assert camera.gives(camera.claim("video0-0"))


@pytest.mark.parametrize("more", [{"adminAccess": True}, {"shareID": "11111111-2222-4333-8444-555555555555"}])
def test_a_device_with_two_requests_is_one_of_cdi(more: dict[str, Any], camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start, **IMPATIENT)
    claim = camera.claim("video0-0", {**result_of("video0-0", "q"), **more})
    for _ in range(2):
        (device,) = camera.prepare(claim).devices
        assert (device.device_name, list(device.request_names)) == ("video0-0", ["r", "q"])
        names = [item["name"] for item in json.loads(camera.file(claim).read_text())["devices"]]
        assert names == [f"{claim.uid}-video0-0"]
        assert "is still prepared" in camera.prepare(camera.claim("video0-0")).error
        daemon = camera.start_again(start, daemon, **IMPATIENT)


WAITS: Mapping[str, tuple[str, Callable[[Cluster, pb.Claim], object]]] = {
    "its last claim": ("video0-0", lambda camera, last: camera.unprepare(last)),
    "a device that is gone": ("video1-0", lambda camera, last: camera.node.plug("video1")),
    "a device that is not offered yet": ("video2-0", lambda camera, last: camera.node.plug("video2")),
    "the API server": ("video0-1", lambda camera, last: setattr(camera.api, "fault", lambda verb, kind: None)),
}


@pytest.mark.parametrize("what", WAITS)
def test_prepare_waits_for(what: str, camera: Cluster, start: Starter) -> None:
    camera.node.plug("video1")
    start(*camera.options())
    camera.ready("video0-0", "video0-1", "video1-0", "video1-1")
    last = camera.give("video0-0")
    camera.node.unplug("video1")
    wait_for(lambda: camera.api.tainted() == {"video1-0", "video1-1"})
    name, end = WAITS[what]
    claim, beside = camera.claim(name), camera.claim("video0-0" if name == "video0-1" else "video0-1")
    if what == "the API server":
        camera.api.fault = lambda verb, kind: answer_bytes(404, b"default backend - 404")
        beside = last
    begin = time.monotonic()
    with camera.preparing(claim, beside) as errors:
        wait_for(lambda: camera.file(beside).exists())
        time.sleep(1)  # long enough for a daemon that does not wait to say so
        end(camera, last)
        ended = time.monotonic()
        assert errors() == ["", ""]
    assert time.monotonic() - ended < 5 and ended - begin < 20
    assert camera.gives(claim)


@pytest.mark.parametrize("is_away", [False, True])
def test_the_device_of_a_gone_claim_is_given_after_a_while(is_away: bool, camera: Cluster, start: Starter) -> None:
    """Also if the claim went while the driver was away, and nobody wants the device."""
    constants = {"Claims.GONE_SECONDS": 2.0, "Claims.PREPARE_SECONDS": 0.5}
    daemon = camera.serve(start, **constants)
    forced, claim = camera.give("video0-0"), camera.claim("video0-0")
    if is_away:
        daemon.kill()
    else:
        assert "still prepared" in camera.prepare(claim).error
    camera.api.objects[camera.path(forced)]["metadata"]["uid"] = "another"
    begin = time.monotonic()
    if is_away:
        daemon = camera.start_again(start, daemon, **constants)
        wait_for(lambda: not camera.file(forced).exists())
    wait_for(lambda: not camera.prepare(claim).error)
    assert time.monotonic() - begin > 2, "its containers may still run"
    assert not camera.file(forced).exists()
    daemon.says("the API server has no such claim any more")


def not_found(name: str, kind: str = "resourceclaims", reason: str = "NotFound") -> bytes:
    details = {"name": name, "group": "resource.k8s.io", "kind": kind}
    return answer_bytes(404, {"kind": "Status", "status": "Failure", "reason": reason, "details": details, "code": 404})


@pytest.mark.parametrize(
    "fault",
    [
        lambda verb, kind: answer_bytes(404, b"default backend - 404") if kind == "resourceclaims" else None,
        lambda verb, kind: answer_bytes(404, {"kind": "Status"}) if kind == "resourceclaims" else None,
        lambda verb, kind: answer_bytes(404, b"404 page not found"),
        lambda verb, kind: not_found("claim-2") if kind == "resourceclaims" else None,
        lambda verb, kind: not_found("claim-1", "pods") if kind == "resourceclaims" else None,
        lambda verb, kind: not_found("claim-1", reason="Unknown") if kind == "resourceclaims" else None,
        lambda verb, kind: not_found("claim-1") if kind == "resourceclaims" else answer_bytes(404, b"{}"),
        lambda verb, kind: answer_bytes(200, {"metadata": {"name": "x", "uid": "y"}}) if kind[8:] == "claims" else None,
    ],
    ids=range(8),
)
def test_only_a_404_about_the_claim_says_that_it_is_gone(
    fault: Callable[[str, str], bytes | None], camera: Cluster, start: Starter
) -> None:
    daemon = camera.serve(start)
    claim = camera.give("video0-0")
    daemon.kill()
    camera.api.fault = fault
    count = len(camera.api.calls)
    rounds = with_constants(COMPARE_SECONDS=0.05, MIN_PUBLISH_SECONDS=0.05, MIN_BACKOFF_SECONDS=0.05, **FORGETFUL)
    start(*camera.options(), through=rounds)
    wait_for(lambda: len(camera.api.calls) > count + 8)
    assert camera.gives(claim), "it is prepared"
    del camera.api.objects[camera.path(claim)]
    camera.api.fault = lambda verb, kind: None
    wait_for(lambda: not camera.file(claim).exists())


# ---------------------------------------------------------------------------------------------------------------------
# DRA: an API server that does not do what it is asked
# ---------------------------------------------------------------------------------------------------------------------


def test_the_api_server_may_be_late_and_away(camera: Cluster, start: Starter) -> None:
    camera.api.down()
    daemon = start(*camera.options(), "--listen", "127.0.0.1:0")
    daemon.says("does not answer: Connection refused; trying again")
    status = Status(daemon)
    wait_for(lambda: "not published: the API server at" in status.wait_for("/readyz", 503).body)
    assert status.ask("/healthz").status == 200
    camera.api.up()
    camera.ready("video0-0", "video0-1")
    daemon.says("publishing works again")
    claim = camera.give("video0-0")
    camera.api.down()
    assert camera.gives(claim), "it is prepared"
    waiting = camera.claim("video0-1")
    with camera.preparing(waiting) as errors:
        time.sleep(2)  # long enough for a daemon that does not wait to say so
        camera.api.up()
        assert errors() == [""]
    assert camera.gives(waiting)


def test_a_right_that_is_missing_is_named_once(camera: Cluster, start: Starter) -> None:
    camera.kubelet.down()  # a registration would have it tried at once
    camera.api.rights -= {("resourceslices", "create"), ("deviceclasses", "create")}
    daemon = start(*camera.options())
    for kind in ("resourceslices", "deviceclasses"):
        daemon.says(rf'lacks the right "create" on "{kind}" \(403\): {kind} is forbidden')
    wait_for(lambda: [call.status for call in camera.api.calls if call.kind == "resourceslices"].count(403) == 3)
    assert daemon.log.count("(403)") == 2
    times = [call.when for call in camera.api.calls if call.kind == "resourceslices" and call.status == 403]
    assert times[1] - times[0] > 0.9
    assert times[2] - times[1] > 1.9, "the pauses grow"
    camera.api.rights |= RIGHTS
    camera.wait_for_devices("video0-0", "video0-1")


def test_a_lost_device_is_tainted_before_all_classes_are_made(camera: Cluster, start: Starter) -> None:
    for number in range(1, 40):
        camera.node.plug(f"video{number}")
    camera.api.fault = lambda verb, kind: 0.1
    start(*camera.options())
    wait_for(camera.api.devices)
    camera.node.unplug("video0")
    wait_for(lambda: camera.api.tainted() == {"video0-0", "video0-1"})
    assert len(camera.api.classes()) < 40
    wait_for(lambda: len(camera.api.classes()) == 41)


@pytest.mark.parametrize("sends_chunks", [False, True])
def test_a_connection_that_stays_open_costs_no_time(sends_chunks: bool, camera: Cluster, start: Starter) -> None:
    camera.api.keeps_open, camera.api.sends_chunks = True, sends_chunks
    daemon = camera.serve(start)
    assert camera.gives(camera.claim("video0-0"))
    assert "did not answer" not in daemon.log


def test_an_address_that_does_not_answer_does_not_hide_the_next(camera: Cluster, start: Starter) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as dead, contextlib.ExitStack() as clients:
        for _ in range(3):  # those who wait for accept(); from then on, nobody gets an answer
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(dead.getsockname())
        ports = [dead.getsockname()[1], camera.api.port]
        found = f"lambda *_, **__: [(2, 1, 6, '', ('127.0.0.1', port)) for port in {ports}]"
        through = with_constants()
        through[-1] = f"import socket; socket.getaddrinfo = {found}; {through[-1]}"
        daemon = start(*camera.options(**{"kube-api": f"https://localhost:{camera.api.port}"}), through=through)
        camera.ready("video0-0", "video0-1")
        assert "did not answer" not in daemon.log


@pytest.mark.timeout(300)  # alone on the machine, it takes 15 s
def test_thirty_thousand_slots_fit_into_the_memory_of_the_chart(node: Node, cluster: Cluster, start: Starter) -> None:
    for number in range(3):
        node.plug(f"video{number}")
    node.rules(VIDEO.replace("2", "10000"))
    daemon = start(*cluster.options(), through=with_constants(COMPARE_SECONDS=0.5))
    wait_for(lambda: len(cluster.api.devices()) == 30_000, patience=200)
    lists = [call for call in cluster.api.calls if call.verb == "list"]
    pages = math.ceil(30_000 / sdm.MAX_SLICE_DEVICES / sdm.Publisher.SLICES_AT_ONCE)
    more = len(lists) + 2 * pages
    wait_for(lambda: [call.verb for call in cluster.api.calls].count("list") > more, patience=200)
    assert [call.status for call in cluster.api.calls if call.verb in ("update", "delete")] == []
    assert peak_memory(daemon) < MEMORY_LIMIT


def test_a_conflict_is_solved(camera: Cluster, start: Starter) -> None:
    camera.serve(start)
    conflicts = 2

    def write_first(target: str) -> None:
        nonlocal conflicts
        if conflicts:
            conflicts -= 1
            path = target if target in camera.api.objects else ""
            support.SimulatedApiServer.put(camera.api, path, camera.api.objects[path])

    wait_for(lambda: len(camera.api.classes()) == 2)
    camera.api.before_write = write_first
    camera.node.unplug("video0")
    wait_for(lambda: len(camera.api.tainted()) == 2)
    assert [call.status for call in camera.api.calls if call.verb == "update"] == [409, 409, 200]


MEMORY_LIMIT = 192 << 20  # of charts/smarter-device-manager/values.yaml and daemonset.yaml


def peak_memory(daemon: Daemon) -> int:
    """The most memory that the process of DAEMON has had, in bytes."""
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{daemon.process.pid}/status").read_text())
    return int(kilobytes) << 10


NONSENSE: Mapping[str, bytes] = {
    "no HTTP": b"\0" * 5000,
    "other types": answer_bytes(200, {"items": {"a": 1}, "metadata": 7, "status": {"allocation": 1}}),
    "other items": answer_bytes(200, {"items": [1, {"metadata": {"name": 7}, "spec": []}], "metadata": []}),
    "cut": answer_bytes(200, b"{" + b'"a": ' * 300_000),
    "elsewhere": answer_bytes(302, {}, "Location: https://127.0.0.1:1/"),
    "too long": answer_bytes(200, b"x" * (sdm.MAX_API_ANSWER + 100)),
    "too many": answer_bytes(200, b'{"items": [' + b"{}," * ((sdm.MAX_API_ANSWER - 20) // 3) + b"{}]}"),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_survived(kind: str, camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start, **IMPATIENT)
    claim = camera.claim("video0-0")
    camera.api.fault = lambda *_: NONSENSE[kind]
    assert camera.prepare(claim).error
    camera.api.remove_slices()
    count = len(camera.api.calls)
    camera.kubelet.up()
    wait_for(lambda: len(camera.api.calls) >= count + 2)
    camera.api.fault = lambda verb, kind: None
    camera.kubelet.up()
    camera.ready("video0-0", "video0-1")
    assert camera.gives(claim)
    assert peak_memory(daemon) < MEMORY_LIMIT


def test_a_server_that_never_answers_keeps_nobody_waiting_for_long(camera: Cluster, start: Starter) -> None:
    constants = {"API_SECONDS": 0.5, "Claims.PREPARE_SECONDS": 2.5}
    daemon = camera.serve(start, "--listen", "127.0.0.1:0", **constants)
    claim = camera.claim("video0-0")
    camera.api.fault = lambda verb, kind: 30.0
    begin = time.monotonic()
    with camera.preparing(claim, *(camera.claim("video0-1") for _ in range(11))) as errors:
        assert all("did not answer within 0 s" in error for error in errors())
    assert 2.0 < time.monotonic() - begin < 4.0, "side by side"
    assert Status(daemon).ask("/healthz").status == 200
    camera.api.fault = lambda verb, kind: None
    assert camera.gives(claim)
    camera.api.fault = lambda verb, kind: 30.0
    camera.kubelet.up()
    begin = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - begin < 3.0


def test_a_token_that_was_replaced_is_read_anew(camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start, **IMPATIENT)
    camera.api.tokens = {"two"}
    camera.token.write_text("two")
    assert camera.gives(camera.claim("video0-0"))
    camera.api.tokens = {"three"}
    asked = len(camera.api.calls)

    def replace(verb: str, kind: str) -> None:
        if kind == "resourceclaims":  # the classes may be looked for at the same time
            camera.token.write_text("three")  # when the request with the old one is on its way

    camera.api.fault = replace
    assert camera.gives(camera.claim("video0-1"))
    assert [call.status for call in camera.api.calls[asked:] if call.kind == "resourceclaims"] == [401, 200]
    camera.api.fault = lambda verb, kind: None
    camera.api.tokens = {"four"}
    assert "does not accept the token (401)" in camera.prepare(camera.claim("video0-1")).error
    camera.token.write_text(" \n")
    assert "holds no token" in camera.prepare(camera.claim("video0-1")).error
    camera.token.unlink()
    assert f"cannot read {camera.token}: No such file" in camera.prepare(camera.claim("video0-1")).error
    assert daemon.process.poll() is None


@pytest.mark.parametrize(
    ("certificate", "ca", "problem"),
    [
        ("other", "ca.crt", "has a certificate that is not signed by a CA in .*ca.crt: "),
        ("wrong", "ca.crt", "has a certificate that is not signed by a CA in .*ca.crt: IP address mismatch"),
        ("server", "other-ca.crt", "has a certificate that is not signed by a CA in .*other-ca.crt: "),
        ("server", "nothing.crt", "cannot read .*nothing.crt: No such file"),
        ("server", "extensions", "the CA file .*extensions holds no certificate"),
        ("server", "fifo", "the CA file .*fifo holds no certificate"),
        ("below", "ca.crt", "has a certificate that is not signed by a CA in .*ca.crt: "),
        ("below", "between.crt", ""),  # some clusters give their pods the certificate of an intermediate CA alone
    ],
)
def test_tls_is_verified_always(certificate: str, ca: str, problem: str, camera: Cluster, start: Starter) -> None:
    camera.api.down()
    camera.api.up(certificate)
    daemon = start(*camera.options(**{"kube-ca-file": f"{camera.api.folder}/{ca}"}))
    if problem or sys.version_info < (3, 10):  # which trusts none but root CAs
        daemon.says(problem or "has a certificate that is not signed")
        assert daemon.stop() == 0
        assert not camera.api.calls, "nobody has seen the token"
    else:
        camera.ready("video0-0", "video0-1")


def test_an_api_server_that_is_replaced_by_another_is_found(camera: Cluster, start: Starter) -> None:
    ca = camera.node.root / "ca.crt"
    ca.write_bytes((camera.api.folder / "ca.crt").read_bytes())
    daemon = camera.serve(start, "--kube-ca-file", str(ca), COMPARE_SECONDS=0.1, MIN_PUBLISH_SECONDS=0.05)
    camera.api.down()
    daemon.says("does not answer")
    camera.api.objects = {NODE_PATH: {"metadata": {"name": NODE_NAME, "uid": "another"}}}
    ca.write_bytes((camera.api.folder / "other-ca.crt").read_bytes())
    camera.api.up("other")
    camera.wait_for_devices("video0-0", "video0-1")


def test_a_wrong_name_of_the_node_and_an_old_server_are_named(camera: Cluster, start: Starter) -> None:
    daemon = start(*camera.options(**{"node-name": "node-9"}))
    daemon.says(r"there is no Node node-9 \(404\); --node-name names the Node")
    camera.api.fault = lambda verb, kind: answer_bytes(404, b"404 page not found")
    daemon.says(r"the API server has no resource.k8s.io/v1 \(404\), which Kubernetes has since 1.34")


def test_slices_that_were_deleted_come_back(camera: Cluster, start: Starter) -> None:
    camera.serve(start, COMPARE_SECONDS=2.0, MIN_PUBLISH_SECONDS=0.05)
    camera.api.remove_slices()
    assert not camera.api.devices()
    camera.wait_for_devices("video0-0", "video0-1")
    (item,) = camera.api.slices()
    item["spec"]["devices"].pop()
    camera.api.put(f"{API}/resourceslices/{item['metadata']['name']}", item)
    assert len(camera.api.devices()) == 1
    camera.wait_for_devices("video0-0", "video0-1")
    camera.kubelet.up()  # which deletes them
    registered = time.monotonic()
    camera.wait_for_devices("video0-0", "video0-1")
    assert time.monotonic() - registered < 1.5, "at once"


# ---------------------------------------------------------------------------------------------------------------------
# DRA: the kubelet, other instances, the status, and the command line
# ---------------------------------------------------------------------------------------------------------------------


def test_a_kubelet_may_restart_and_be_late(camera: Cluster, start: Starter) -> None:
    camera.kubelet.down()
    daemon = start(*camera.options(), through=with_constants(REGISTER_SECONDS=0.5))
    daemon.says("the kubelet has not registered the driver; waiting for it")
    camera.kubelet.up()
    camera.ready("video0-0", "video0-1")
    claim = camera.give("video0-0")
    for count in (2, 3):
        camera.kubelet.up()
        wait_for(lambda count=count: daemon.log.count("registered with the kubelet") == count)
        camera.wait_for_devices("video0-0", "video0-1")
        assert camera.gives(claim)


def test_a_kubelet_that_has_ended_is_missed_and_counted(node: Node, camera: Cluster, start: Starter) -> None:
    pods = PodResources(node)
    camera.kubelet.do(pods.start())
    daemon = start(*camera.options(), "--listen", "127.0.0.1:0")
    status = Status(daemon)
    status.wait_for("/readyz", 200)
    (Path(camera.kubelet.folder) / "plugins_registry/smarter-devices-reg.sock").unlink()
    wait_for(lambda: daemon.log.count("registered with the kubelet") == 2)
    status.wait_for("/readyz", 200)
    assert status.metrics()["kubelet_restarts_total"] == 0, "it is the same kubelet"
    for count in (1, 2):
        camera.kubelet.down()
        camera.kubelet.do(pods.stop())
        assert f"the kubelet no longer answers on {pods.path}" in status.wait_for("/readyz", 503).body
        wait_for(lambda: status.metrics()["registered", "smarter-devices/video0"] == 0)
        document = status.document()
        assert status.metrics()["kubelet_answering"] == 0
        assert not (document["ready"] or document["dra"]["registered"] or document["kubelet"]["answering"])
        assert daemon.log.count("no longer answers") == count, "once"
        camera.kubelet.do(pods.start())
        settle(daemon, 2 * sdm.SOCKET_LOOK_SECONDS)
        assert status.ask("/readyz").status == 503, "it has not registered the driver yet"
        camera.kubelet.up()
        status.wait_for("/readyz", 200)
        wait_for(lambda count=count: status.metrics()["kubelet_restarts_total"] == count)
    camera.kubelet.do(pods.stop())


@pytest.mark.parametrize("folder", ["cdi", "plugins_registry", "plugins/smarter-devices"])
@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_folder_that_is_replaced_under_its_mount_ends_the_driver(how: str, folder: str, camera: Cluster) -> None:
    """As in a container, see test_a_plugin_directory_that_is_replaced_under_its_mount_ends_it."""
    node = camera.node
    mounted(node, "", "true")  # or skip
    there, source = node.root / "there" / folder, node.root / ("cdi" if folder == "cdi" else f"k/{folder}")
    for path in (there, source, node.root / "there/plugins_registry"):
        path.mkdir(parents=True, exist_ok=True)
    mounts = f"mount --bind {source} {there}; mount --bind {node.plugins} {node.plugins}"
    enter = ["unshare", "--mount", "sh", "-ec", f'{mounts}\nexec "$@"', "sh"]
    places = {"cdi-dir": str(there)} if folder == "cdi" else {"kubelet-dir": str(node.root / "there")}
    daemon = Daemon(node, *camera.options(**places), through=enter)
    try:
        camera.wait_for_devices("video0-0", "video0-1")
        settle(daemon, 1.5)
        if how == "deleted":
            shutil.rmtree(source)
        else:
            source.rename(node.root / "away")
        source.mkdir()
        assert daemon.process.wait(PATIENCE) == 1
        text = "was moved, from .* to .*/away" if how == "moved" else "was deleted, and only this mount keeps it"
        daemon.says(f"ERROR the directory (that is mounted at )?{there} {text}; exiting")
    finally:
        daemon.kill()


@pytest.mark.parametrize(
    "which", ["plugins_registry/smarter-devices-reg.sock", "plugins/smarter-devices/dra.sock", "plugins"]
)
def test_sockets_that_were_removed_are_served_again(which: str, camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start, **IMPATIENT)
    claim = camera.give("video0-0")
    path = Path(camera.kubelet.folder) / which
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    daemon.says("a socket file of the driver was deleted or replaced")
    wait_for(lambda: daemon.log.count("registered with the kubelet") == 2)
    assert camera.gives(claim)
    assert "is still prepared" in camera.prepare(camera.claim("video0-0")).error


def test_a_second_instance_waits_and_takes_over(camera: Cluster, start: Starter) -> None:
    first = camera.serve(start)
    claim = camera.give("video0-0")
    second = start(*camera.options(), "--listen", "127.0.0.1:0", through=with_constants(**IMPATIENT))
    assert "another instance serves" in Status(second).wait_for("/readyz", 200).body, "a roll-out waits for that"
    second.says("another instance serves the driver smarter-devices; waiting for its end")
    count = len(camera.api.calls)
    first.kill()
    second.says("registered with the kubelet")
    assert camera.gives(claim)
    assert "is still prepared" in camera.prepare(camera.claim("video0-0")).error
    assert len(camera.api.calls) > count
    assert second.log.count("another instance") == 1
    assert second.stop() == 0
    assert not [path.name for path in Path(camera.kubelet.folder).rglob("*") if path.is_socket()]


def test_a_kubelet_that_refuses_is_told_of(camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start, "--listen", "127.0.0.1:0", REGISTER_SECONDS=0.1)
    status = Status(daemon)
    status.wait_for("/readyz", 200)

    async def refuse() -> None:
        path = f"unix:{camera.kubelet.folder}/plugins_registry/smarter-devices-reg.sock"
        async with grpc.aio.insecure_channel(path) as channel:
            message = pb.RegistrationStatus(plugin_registered=False, error="not on my watch")
            await camera.kubelet.call(channel, sdm.PLUGIN_REGISTRATION, "NotifyRegistrationStatus", message)

    for _ in range(2):
        camera.kubelet.do(refuse())
        daemon.says("the kubelet refused the driver: not on my watch")
        time.sleep(2 * sdm.SOCKET_LOOK_SECONDS)
        assert "not on my watch" in status.wait_for("/readyz", 503).body
    assert daemon.log.count("refused the driver") == 1, "once, though the kubelet tries again"


def test_the_status_knows_of_dra(node: Node, camera: Cluster, start: Starter) -> None:
    camera.kubelet.down()
    daemon = start(*camera.options(), "--listen", "127.0.0.1:0", through=with_constants(**IMPATIENT))
    status = Status(daemon)
    assert "not registered with the kubelet yet" in status.wait_for("/readyz", 503).body
    assert status.ask("/").body.count("not registered") == 1, "what is true of all is said once"
    camera.kubelet.up()
    status.wait_for("/readyz", 200)
    claim = camera.give("video0-1")
    assert camera.prepare(camera.claim("video7-0")).error
    found = wait_for(lambda: (metrics := status.metrics())["claims_prepared"] == 1 and metrics)
    assert found["api_reachable"] == found["slices_published"] == found["prepare_errors_total"] == 1
    assert found["slice_devices_published"] == 2
    assert abs(found["slices_published_timestamp_seconds"] - time.time()) < 60
    assert found["api_requests_total", "get", "200"] >= 1
    assert found["api_requests_total", "create", "201"] >= 2
    assert found["registered", "smarter-devices/video0"] == found["allocations_total", "smarter-devices/video0"] == 1
    dra = status.document()["dra"]
    assert dra["registered"] and not dra["problem"]
    assert dra["claims"] == [{"namespace": "default", "name": claim.name, "devices": ["/dev/video0"]}]
    assert status.document()["problems"] == []
    page = status.ask("/").body
    text = node.run("--status", status.address).stdout
    for shown in (page, text):
        assert "DRA: 2 devices published in 1 ResourceSlice, 1 claim prepared, the API server answers" in shown
    camera.api.down()
    camera.prepare(camera.claim("video0-0"))
    wait_for(lambda: status.metrics()["api_reachable"] == 0)
    assert status.metrics()["api_requests_total", "get", "error"] >= 1
    assert status.metrics()["registered", "smarter-devices/video0"] == 1


def test_the_metrics_of_dra_are_absent_without_it(served: Status) -> None:
    assert not [name for name in served.metrics() if (name if isinstance(name, str) else name[0]) in DRA_METRICS]
    assert served.document()["dra"] is None


def test_holders_are_those_of_dynamic_resources(node: Node, camera: Cluster, start: Starter) -> None:
    daemon = camera.serve(start, "--listen", "127.0.0.1:0")
    response = pb.ListPodResourcesResponse()
    container = response.pod_resources.add(namespace="default", name="camera").containers.add(name="main")
    devices = container.dynamic_resources.add(claim_name="claim-1", claim_namespace="default").claim_resources
    devices.add(driver_name="smarter-devices", pool_name=NODE_NAME, device_name="video0-1")
    devices.add(driver_name="gpu.example.com", pool_name=NODE_NAME, device_name="video0-0")
    devices.add(driver_name="smarter-devices", pool_name=NODE_NAME, device_name="strange")
    pods = PodResources(node)
    pods.answer = response.SerializeToString()
    camera.kubelet.do(pods.start())
    try:
        held = wait_for(lambda: Status(daemon).resource("video0").get("holders"))
        assert [(item["slot"], item["pod"], item["container"]) for item in held] == [("1", "camera", "main")]
    finally:
        camera.kubelet.do(pods.stop())


@needs_root
def test_a_dry_run_of_dra_shows_the_whole_way(node: Node) -> None:
    node.plug("video0")
    node.plug("bus/stick")
    node.link("serial/x", "../bus/stick")
    node.sysfs("gpu.0", {})
    node.rules(VIDEO + SERIAL + "- devicematch: nvidia-gpu\n")
    node.plug(long := f"video{'9' * 80}")
    run = node.run("--dry-run", "--api", "dra")
    assert (run.returncode, run.stderr) == (0, "")
    assert f"/dev/{long} rw\n" in run.stdout
    assert "4 resources, every one could be allocated." in run.stdout
    assert re.search(
        r"2 +smarter-devices/video0 +video0-0: resource=video0 path=/dev/video0 slot=0\n +/dev/video0 rw\n", run.stdout
    )
    assert re.search(r"\n +/dev/serial/x rw \(the host's /dev/bus/stick\)\n", run.stdout)
    assert re.search(r"\n +NVIDIA_VISIBLE_DEVICES=0\n", run.stdout)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--kube-api", "http://10.0.0.1:443"], "--kube-api: .* has no TLS: write https://"),
        (["--kube-api", "10.0.0.1"], "--kube-api: .* is no URL such as https://"),
        (["--kube-api", ""], "outside a pod, --api dra needs --kube-api, --kube-token-file and --kube-ca-file"),
        (["--domain", "d" * 64], "at most 63 characters"),
        (["--domain", "3d.example.com"], "must begin with a letter"),
        (["--node-name", "Node_1"], "is not the name of a Node"),
        (["--kubelet-dir", "/nowhere"], "there is no directory /nowhere"),
        (["--kubelet-dir", "{root}/" + "x" * 90], "bytes too long"),
    ],
)  # fmt: skip
def test_options_of_dra_that_will_not_do(options: list[str], text: str, node: Node) -> None:
    (node.root / ("x" * 90)).mkdir()
    node.rules("- devicematch: x\n")
    given = ["--api", "dra", "--kube-api", "https://127.0.0.1:1", "--kubelet-dir", "{root}", *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KUBERNETES_")}
    run = node.run(*(word.format(root=node.root) for word in given), env=environment)
    assert run.returncode == 1
    assert re.search(text, run.stderr), run.stderr
    assert "Traceback" not in run.stderr
    assert node.run("--api", "csi").returncode == 2


def test_the_address_of_the_api_server_is_that_of_a_pod(node: Node) -> None:
    node.rules("- devicematch: x\n")
    service = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    environment = {**os.environ, **service, "NODE_NAME": "edge-7", "COLUMNS": "1000"}
    text = node.run("--help", env=environment).stdout
    assert "https://[fd00::1]:443" in text and "edge-7" in text and "/var/run/cdi" in text


@needs_root
def test_nothing_of_dra_is_loaded_without_it(node: Node, kubelet: Kubelet, start: Starter) -> None:
    node.rules(GPUS)
    node.sysfs("gpu.0", {})
    daemon = start()
    kubelet.wait_for("nvidia-gpu0", Healthy=4)
    libraries = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    assert "_ssl." not in libraries  # Debian's grpc itself needs libssl


# ---------------------------------------------------------------------------------------------------------------------
# Helpers: a client of the status server, and what else a test of it needs
# ---------------------------------------------------------------------------------------------------------------------


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


@contextlib.contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    """No thread of DAEMON runs."""
    daemon.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: "State:\tT" in Path(f"/proc/{daemon.process.pid}/status").read_text())
    yield
    daemon.process.send_signal(signal.SIGCONT)


@pytest.fixture
def folder(node: Node) -> Path:
    """The folder of one device with four slots, which needs no root."""
    node.rules(GPUS)
    return node.sysfs("gpu.0", {})


MOMENT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.fixture
def served(folder: Path, kubelet: Kubelet, start: Starter) -> Status:
    """A daemon that has its one resource registered, and serves its status."""
    status = Status(start("--listen", "127.0.0.1:0"))
    status.wait_for("/readyz", 200)
    return status


# ---------------------------------------------------------------------------------------------------------------------
# The document
# ---------------------------------------------------------------------------------------------------------------------


def test_holders_are_those_of_our_domain() -> None:
    response = holders_message(
        ("smarter-devices/video0", "default/detector-0/main", ["0", "2"]),
        ("example.org/video0", "default/other/main", ["1"]),
        ("smarter-devices.example.org/video0", "default/other/main", ["1"]),
        ("smarter-devices/a", "default/other/main", []),
    )
    found = [pair for pairs in sdm.find_holders(response, "smarter-devices", {}) for pair in pairs]
    assert found == [("video0", sdm.Holder(slot, "default", "detector-0", "main")) for slot in ("0", "2")]
    assert not any(sdm.find_holders(pb.ListPodResourcesResponse(), "smarter-devices", {}))


def described(resource: sdm.Resource, *slots: str) -> sdm.Document:
    """RESOURCE as the document has it, while a container has SLOTS of it."""
    use = sdm.describe_use(resource, {resource.name: [sdm.Holder(slot, "default", "pod", "main") for slot in slots]})
    return sdm.describe_resource(resource, "smarter-devices", 0.0, ready=False, trouble=sdm.unready_text(""), **use)


def test_each_slot_in_use_counts_once() -> None:
    """An init container and the main container of one pod share a slot, and a pod that ended may be listed still."""
    conf = "- devicematch: video\n  nummaxdevices: 12\n"
    (video,) = offered(conf, snapshot_of({"video0": "char"})).resources.values()
    words = ("10 default pod main", "2 default pod main", "2 default pod init", "2 default old main")
    holders = [sdm.Holder(*each.split()) for each in words]
    document = sdm.describe_use(video, {video.name: [*holders, holders[0]]})
    held = [(holder["slot"], holder["pod"], holder["container"]) for holder in document["holders"]]
    assert held == [("2", "old", "main"), ("2", "pod", "init"), ("2", "pod", "main"), ("10", "pod", "main")]
    assert document["in_use"] == 2
    assert list(document["holders"][0]) == ["slot", "device", "namespace", "pod", "container"]


@pytest.mark.parametrize(
    ("more", "slots", "held"),
    [
        ("", ["3", "03", "-1", "", "x", ":0", "/dev/video0:0", "video0:0", "9" * 5000, "\u0660"], []),
        ("", ["2", "0"], [("0", "/dev/video0"), ("2", "/dev/video0")]),
        (
            "  resource: cameras\n",
            ["video1:1", "video1:0", "video2:0", "0", "video0:3"],
            [("video1:0", "/dev/video1"), ("video1:1", "/dev/video1")],
        ),
    ],
    ids=["no slots now", "slots", "of a pool"],
)
def test_holders_have_slots_that_are_there_now(more: str, slots: list[str], held: list[tuple[str, str]]) -> None:
    conf = f"- devicematch: video\n  nummaxdevices: 3\n{more}"
    resource = next(iter(offered(conf, snapshot_of({"video0": "char", "video1": "char"})).resources.values()))
    document = described(resource, *slots)
    assert [(holder["slot"], holder["device"]) for holder in document["holders"]] == held
    assert document["in_use"] == len(held)


def test_what_is_wrong_with_many_devices_that_many_hold_is_found_in_time() -> None:
    names = [f"video{number}" for number in range(1000)]
    conf = "- devicematch: video\n  resource: cameras\n  nummaxdevices: 10\n"
    (pool,) = offered(conf, snapshot_of(chars(*names))).resources.values()
    gone = dataclasses.replace(pool, devices=tuple(dataclasses.replace(item, problem="gone") for item in pool.devices))
    held = [sdm.Holder(f"{name}:{slot}", "default", f"pod-{slot}", "main") for name in names for slot in range(10)]
    use = sdm.describe_use(gone, {gone.name: held})
    document = {
        "threads": [], "kubelet": {"answering": True}, "conf": {"error": "", "read_at": ""}, "dev_problem": "",
        "dra": None, "resources": [{**described(gone), **use}],
    }  # fmt: skip
    begin = time.process_time()
    (problem, *others) = sdm.find_problems(document).items()
    assert time.process_time() - begin < 0.3
    assert problem == ("not registered with the kubelet yet", ["smarter-devices/cameras"])
    text = ", ".join(f"main of default/pod-{number}" for number in range(8)) + " and 2 more"
    assert others == [(f"gone, in use by {text}", [f"/dev/{name}" for name in sorted(names)])]


HELD = ("nvidia-gpu0", "default/detector-0/main", ["3", "0"])


def test_slots_in_use_and_their_holders(served: Status, kubelet: Kubelet) -> None:
    assert served.resource("nvidia-gpu0")["in_use"] == 0
    kubelet.hold(HELD)
    wait_for(lambda: served.resource("nvidia-gpu0")["in_use"] == 2)
    rest = {"device": "nvidia-gpu0", "namespace": "default", "pod": "detector-0", "container": "main"}
    assert served.resource("nvidia-gpu0")["holders"] == [{"slot": "0", **rest}, {"slot": "3", **rest}]
    metrics = served.metrics()
    assert metrics["slots_in_use", "smarter-devices/nvidia-gpu0"] == 2
    assert metrics["slot_holder", "smarter-devices/nvidia-gpu0", "nvidia-gpu0", "default", "detector-0", "main"] == 1
    page = served.ask("/").body
    assert 'width="50%"' in page and "4 slots, 2 in use" in page
    (row,) = re.findall(r'<tr id="nvidia-gpu0".*?</tr>', page, re.DOTALL)
    text = "smarter-devices/nvidia-gpu0 2 of 4 nvidia-gpu0 main of default/detector-0 slots 0, 3"
    assert " ".join(Tags(row).text.split()) == text
    assert 'aria-label="Healthy"' in row
    kubelet.hold()
    wait_for(lambda: served.resource("nvidia-gpu0")["in_use"] == 0)


def fill_a_message(response: pb.ListPodResourcesResponse) -> bytes:
    """A message of RESPONSE that is longer than what is read."""
    response.pod_resources.add(name="x" * sdm.POD_RESOURCES_BYTES)
    return response.SerializeToString()


IS_NO_ANSWER: Mapping[str, Callable[[pb.ListPodResourcesResponse], bytes]] = {
    "cut": lambda response: response.SerializeToString()[:-1],
    "no UTF-8": lambda response: response.SerializeToString().replace(b"detector", b"detect\xff\xff"),
    "too long": fill_a_message,
    "too many": lambda response: holders_message(
        ("smarter-devices/nvidia-gpu0", "default/pod/main", ["0"] * (sdm.MAX_HOLDERS + 1))
    ).SerializeToString(),
}


@pytest.mark.parametrize("how", IS_NO_ANSWER)
def test_an_invalid_answer_makes_the_use_unknown(node: Node, served: Status, kubelet: Kubelet, how: str) -> None:
    kubelet.hold(HELD)
    wait_for(lambda: served.resource("nvidia-gpu0")["in_use"] == 2)
    good = kubelet.pod_resources.answer
    kubelet.pod_resources.answer = IS_NO_ANSWER[how](pb.ListPodResourcesResponse.FromString(good))
    wait_for(lambda: served.resource("nvidia-gpu0")["in_use"] is None)
    assert served.resource("nvidia-gpu0")["holders"] is None
    assert not [name for name in served.metrics() if name[0] in ("slots_in_use", "slot_holder")]
    page = served.ask("/").body
    assert "unknown, of 4" in page and "4 slots, use unknown" in page
    assert re.search(r"^\?/4 ", node.run("--status", served.address).stdout, re.MULTILINE)
    assert served.ask("/readyz").status == served.ask("/healthz").status == 200
    kubelet.pod_resources.answer = good
    wait_for(lambda: served.resource("nvidia-gpu0")["in_use"] == 2)
    ours = [line for line in served.daemon.log.splitlines() if re.match("[0-9]{4}-", line)]  # protobuf may say its own
    assert len(ours) == 5, "none of this is worth a line of the log"


def test_any_bytes_are_an_answer_or_make_the_use_unknown(kubelet: Kubelet) -> None:
    good = holders_message(("smarter-devices/a", "default/pod/main", ["0", "1"])).SerializeToString()
    seen = set()

    @settings(max_examples=100)
    @given(st.binary(max_size=50), st.integers(0, len(good)), st.integers(0, len(good)))
    @example(b"", 0, 0)
    @example(b"\xff", 0, 0)
    def answer(data: bytes, start: int, end: int) -> None:
        kubelet.pod_resources.answer = good[:start] + data + good[end:]
        holders = kubelet.do(sdm.read_holders(kubelet.pod_resources.path, "smarter-devices", {}))
        seen.add(type(holders))
        assert holders is None or all(isinstance(holder, sdm.Holder) for held in holders.values() for holder in held)

    answer()
    assert seen == {dict, type(None)}


def test_thousands_of_pods_with_long_names_are_shown(served: Status, kubelet: Kubelet) -> None:
    long = "x" * 400
    entries = [("nvidia-gpu0", f"default/pod-{number}/main", ["1"]) for number in range(5000)]
    kubelet.hold(*entries, ("nvidia-gpu0", f"{long}/{long}/{long}", ["2"]))
    resource = wait_for(lambda: (found := served.resource("nvidia-gpu0"))["in_use"] == 2 and found)
    assert len(resource["holders"]) == 5001
    assert len(resource["holders"][-1]["pod"]) < 400
    kubelet.take("nvidia-gpu0", "0")


def test_a_silent_server_makes_the_use_unknown(node: Node, folder: Path, start: Starter) -> None:
    """It is in the place of the kubelet."""
    node.pod_resources.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(node.pod_resources))
        listener.listen()
        status = Status(start("--listen", "127.0.0.1:0"))
        assert status.resource("nvidia-gpu0")["in_use"] is None


def test_a_slow_list_of_holders_keeps_no_probe_waiting(served: Status, kubelet: Kubelet) -> None:
    kubelet.pod_resources.delay = PATIENCE
    kubelet.pod_resources.count = 0
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        documents = [pool.submit(served.resource, "nvidia-gpu0") for _ in range(8)]
        wait_for(lambda: kubelet.pod_resources.count)
        for path in ("/healthz", "/readyz"):
            asked = time.monotonic()
            assert served.ask(path).status == 200
            assert time.monotonic() - asked < sdm.POD_RESOURCES_SECONDS / 2
        assert [document.result()["in_use"] for document in documents] == [None] * 8
    assert time.monotonic() - begin < 2 * sdm.POD_RESOURCES_SECONDS + sdm.StatusServer.FRESH_SECONDS
    assert kubelet.pod_resources.count <= 2, "those who look at once share an answer"
    begin = time.monotonic()
    kubelet.take("nvidia-gpu0", "0")
    assert time.monotonic() - begin < sdm.POD_RESOURCES_SECONDS


def test_holders_are_asked_for_only_when_somebody_looks(served: Status, kubelet: Kubelet) -> None:
    begin = time.monotonic()
    wait_for(lambda: time.monotonic() > begin + 1 and served.ask("/healthz").status == 200)  # ten turns
    assert served.ask("/readyz").status == 200
    assert kubelet.pod_resources.count == 0
    for _ in range(3):
        served.ask("/metrics")
    assert 1 <= kubelet.pod_resources.count <= 2, "at most once a second"


@pytest.mark.parametrize("name", ["%41.sock", "a b.sock", "\udcff.sock", "x" * 120])
def test_any_path_of_the_socket_is_taken(node: Node, folder: Path, start: Starter, name: str) -> None:
    node.pod_resources = node.root / name
    kubelet = Kubelet(node)
    kubelet.hold(HELD)
    is_path_of_a_socket = "%" in name or " " in name
    if is_path_of_a_socket:
        kubelet.pod_resources.path = kubelet.pod_resources.path.replace("%", "%25")  # as gRPC has it
        kubelet.do(kubelet.pod_resources.start())
    status = Status(start("--listen", "127.0.0.1:0"))
    assert status.resource("nvidia-gpu0")["in_use"] == (2 if is_path_of_a_socket else None)
    kubelet.do(kubelet.pod_resources.stop())


def test_list_json_and_status_json_have_the_same_shapes(node: Node, folder: Path, start: Starter) -> None:
    node.link("video9", "/etc/passwd")
    node.rules(GPUS + "- devicematch: ^video\n- devicematch: ^nothing$\n")
    status = Status(start("--listen", "127.0.0.1:0"))
    listed, served = json.loads(node.run("--list", "--json").stdout), status.document()
    assert listed["left_out"] == served["left_out"]
    assert listed["left_out"][0]["path"] == "/dev/video9"
    assert listed["unused"] == served["unused"] == [{"line": 4, "pattern": "^nothing$"}]
    assert len(listed["resources"]) == len(served["resources"]) == 1
    for document in (listed, served):
        document["resources"][0]["devices"][0].pop("since")  # each saw it appear for itself
    assert listed["resources"][0].items() <= served["resources"][0].items()


def test_node_name_and_conf_and_times_are_in_the_document(node: Node, folder: Path, start: Starter) -> None:
    status = Status(start("--listen", "127.0.0.1:0", env={**os.environ, "NODE_NAME": "greenhouse"}))
    document = status.document()
    assert (document["node"], document["conf"]["path"], document["conf"]["rules"]) == ("greenhouse", str(node.conf), 1)
    now = sdm.utc(time.time())
    for stamp in (document["time"], document["conf"]["read_at"], document["resources"][0]["devices"][0]["since"]):
        assert sdm.utc(time.time() - 60) < stamp <= now
    assert document["healthy"]
    assert not document["ready"], "there is no kubelet"
    assert "kubelet does not answer" in document["problems"][0]
    assert str(node.plugins) in document["problems"][0]


def test_events_are_listed_newest_first_and_at_most_100(node: Node, served: Status, kubelet: Kubelet) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# Health and readiness
# ---------------------------------------------------------------------------------------------------------------------


def test_healthz_is_503_while_the_device_side_hangs(served: Status) -> None:
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
    with stopped(served.daemon):
        time.sleep(0.5)  # longer than its interval: it was to have woken meanwhile
    served.wait_for("/healthz", 200)
    heartbeat = served.metrics()["conf_last_good_timestamp_seconds"]
    served.daemon.hang_up()
    wait_for(lambda: served.metrics()["conf_last_good_timestamp_seconds"] > heartbeat)


@pytest.mark.parametrize(("interval", "seconds"), [("0.01", 1.0), ("0.5", 5.0), ("1", 10.0), ("3600", 10.0)])
def test_a_thread_may_be_silent_for_ten_intervals(folder: Path, start: Starter, interval: str, seconds: float) -> None:
    status = Status(start("--listen", "127.0.0.1:0", "--interval", interval))
    assert [thread["max_seconds"] for thread in status.document()["threads"]] == [pytest.approx(seconds)] * 2
    assert all(0 <= thread["seconds_since_turn"] < PATIENCE for thread in status.document()["threads"])


def test_an_interval_of_an_hour_hides_no_thread_that_hangs(folder: Path, kubelet: Kubelet, start: Starter) -> None:
    constants = with_constants(MAX_SILENCE_SECONDS=1)
    status = Status(start("--listen", "127.0.0.1:0", "--interval", "3600", through=constants))
    status.wait_for("/readyz", 200)
    until = time.monotonic() + 2.5
    while time.monotonic() < until:  # well, though neither thread has anything to do
        assert status.ask("/healthz").status == 200
    with Tracer(status.daemon.process.pid):
        assert status.wait_for("/healthz", 503).body.startswith("the device side hangs")
    status.wait_for("/healthz", 200)


def test_readyz_lists_what_is_not_registered(node: Node, folder: Path, start: Starter) -> None:
    node.sysfs("gpu.1", {})
    status = Status(start("--listen", "127.0.0.1:0"))
    answer = status.wait_for("/readyz", 503)
    names = ["smarter-devices/nvidia-gpu0", "smarter-devices/nvidia-gpu1"]
    assert [line.partition(": ")[0] for line in answer.body.splitlines()] == names
    kubelet = Kubelet(node)
    kubelet.refused["nvidia-gpu1"] = "no " * 1000 + "not on my watch"
    with kubelet:
        expected = f"{names[1]}: not registered with the kubelet: the kubelet refused .*not on my watch\n"
        wait_for(lambda: re.fullmatch(expected, status.ask("/readyz").body))
        assert status.ask("/readyz").status == 503
        wait_for(lambda: re.search(r"nvidia-gpu1: not registered.*not on my watch", status.document()["problems"][0]))
        metrics = status.metrics()
        assert metrics["registered", names[0]] == 1
        assert metrics["registered", names[1]] == 0
        assert metrics["registrations_refused_total", names[1]] >= 1
        (event, *_) = wait_for(lambda: [each for each in status.document()["events"] if each["event"] == "refused"])
        assert len(event["message"]) == sdm.MAX_TEXT + len("..."), "a long text from outside is cut"
        kubelet.refused.clear()
        assert status.wait_for("/readyz", 200).body == "ok\n"
        assert wait_for(lambda: status.document()["ready"])
    status.wait_for("/readyz", 503)


def test_ready_takes_an_open_stream(node: Node, folder: Path, start: Starter) -> None:
    kubelet = Kubelet(node)
    kubelet.opens_streams = False
    with kubelet:
        status = Status(start("--listen", "127.0.0.1:0"))
        wait_for(lambda: status.metrics()["registrations_total", "smarter-devices/nvidia-gpu0"] >= 1)
        assert status.ask("/readyz").status == 503
        wait_for(lambda: status.metrics()["stream_losses_total", "smarter-devices/nvidia-gpu0"] >= 1)
        assert "opened no stream" in status.ask("/readyz").body


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


DRA_METRICS = {
    "api_requests_total", "api_reachable", "slices_published", "slice_devices_published",
    "slices_published_timestamp_seconds", "claims_prepared", "prepare_errors_total",
}  # fmt: skip


def metric_rows() -> list[tuple[str, str, str]]:
    """Name, type and help of every metric, as the documentation has them. The name of a counter ends in "_total"."""
    page = (HERE / "docs/operating.md").read_text()
    return re.findall(r"^\| `(\w+)` \| (gauge|counter) \| .*? \| (.*) \|$", page, re.MULTILINE)


def test_metrics_are_those_of_the_documentation(served: Status) -> None:
    answer = served.ask("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {family.name: family for family in text_string_to_metric_families(answer.body)}
    for name, kind, help_ in metric_rows():
        parsed = found.pop(name.removesuffix("_total"))
        assert (parsed.type, parsed.documentation) == (kind, help_)
        assert all(sample.name == name and math.isfinite(sample.value) for sample in parsed.samples)
        if name.replace(sdm.PREFIX, "") not in {"slots_in_use", "slot_holder", *DRA_METRICS}:
            assert parsed.samples
    assert not found
    lines = answer.body.splitlines()
    assert len([line for line in lines if line.startswith(("# HELP ", "# TYPE "))]) == 2 * len(sdm.FAMILIES)


def test_metrics_count_what_happened(node: Node, served: Status, kubelet: Kubelet) -> None:
    name = "smarter-devices/nvidia-gpu0"
    first = served.metrics()
    assert [first["slots", name], first["devices", name, "present"], first["devices", name, "absent"]] == [4, 1, 0]
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
    answer = served.ask("/readyz")
    assert answer.status == 200
    refused = rf"the config file is refused, the rules of {MOMENT} UTC stay in force: .+:1:11: .+\n"
    assert re.fullmatch(f"ok\n{refused}", answer.body)
    assert "the config file is refused" in served.document()["problems"][0]
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


def test_a_device_that_is_gone_is_absent(served: Status, folder: Path) -> None:
    folder.rmdir()
    served.daemon.hang_up()
    name = "smarter-devices/nvidia-gpu0"
    wait_for(lambda: served.metrics()["devices", name, "absent"] == 1)
    metrics = served.metrics()
    assert [metrics["devices", name, "present"], metrics["devices", name, "unhealthy"]] == [0, 0]
    assert metrics["slots", name] == 4
    document = served.document()
    assert document["problems"] == ["nvidia-gpu0: it is gone"]
    assert document["ready"], "it is registered, with Unhealthy slots"
    page = served.ask("/").body
    assert "1 thing is wrong" in page
    assert '<li><a href="#nvidia-gpu0">nvidia-gpu0</a>: it is gone</li>' in page[: page.index("<h2>Resources</h2>")]


def test_process_metrics_are_the_kernels_own(served: Status) -> None:
    process = psutil.Process(served.daemon.process.pid)
    metrics = served.metrics()
    assert metrics["process_cpu_seconds_total"] == pytest.approx(cpu_time(served.daemon), abs=0.3)
    assert metrics["process_resident_memory_bytes"] == pytest.approx(process.memory_info().rss, rel=0.2)
    assert metrics["process_start_time_seconds"] == pytest.approx(process.create_time(), abs=1.1)


def test_labels_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = 'a"b\\c\nd{}=,'
    monkeypatch.setattr(sdm, "FAMILIES", [("x", "Help.", lambda _: [({"name": hostile}, 1.5), ({"name": "b"}, True)])])
    assert samples("".join(sdm.render_metrics({}))) == {("x", hostile): 1.5, ("x", "b"): 1}


@pytest.mark.parametrize(
    ("conf", "tree", "label"),
    [
        ("a", {"a": "-> x"}, "link"),
        ("a", {"a": "-> f/x", "f": "file"}, "link"),
        ("a", {"a": "folder"}, "folder"),
        ("a", {"a": "socket"}, "not_a_device"),
        ("a/n", {"a": "shared", "a/n": "char"}, "untrusted"),
        ("^a.b", {"a.b": "char", "a_b": "char"}, "name_taken"),
        ("a, resource: b}\n- {devicematch: ^b", {"a": "char", "b": "char"}, "name_taken"),
        ("_", {"_": "char"}, "bad_name"),
        ("a", {"a\udcff": "char"}, "bad_name"),
        ("'^a()$', containerpath: '/dev/x/\\1.'", {"a": "char"}, "container_path"),
        ("a, attributes: {idVendor: x}", {"a": "char"}, "attributes"),
        ("., resource: x", {"a": "char", "b": "-> a"}, "duplicate"),
        ("b, resource: x, nummaxdevices: 10000", {"b" * 500: "char"}, "list_too_long"),
    ],
)
def test_each_reason_has_its_label(conf: str, tree: Mapping[str, str], label: str) -> None:
    plan = offered(f"- {{devicematch: {conf}}}\n", snapshot_of(tree))
    samples_ = sdm._left_out_samples(sdm.describe_plan(plan, [], "smarter-devices"))
    labels = {reason.label for reason in sdm.Reason}
    assert {found["reason"]: count for found, count in samples_} == {**dict.fromkeys(labels, 0), label: 1}


def test_the_alerts_use_metrics_that_exist() -> None:
    (alerts,) = re.findall(r"^```yaml\n(groups:\n.*?)^```$", (HERE / "docs/operating.md").read_text(), re.M | re.S)
    asked = [re.match(r"\w+", rule["expr"])[0] for rule in yaml.safe_load(alerts)["groups"][0]["rules"]]
    assert len(asked) == 3
    assert set(asked) <= {name for name, _, _ in metric_rows()}


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
        assert policy.startswith("default-src 'none'; ")
        allowed = dict(re.findall(r"(\w+)-src ([^;]+)", policy))
        expected = {"default": "'none'"}
        if path == "/":
            (nonce,) = set(re.findall(r"'nonce-[0-9a-f]{32}'", policy))
            expected |= {"style": nonce, "script": nonce, "connect": "'self'", "img": "data:"}
        assert allowed == expected
        for directive in ("base-uri", "form-action", "frame-ancestors"):
            assert f"{directive} 'none'" in policy
    assert head.body == ""
    assert int(answer.headers["content-length"]) == len(answer.body.encode())
    assert int(head.headers["content-length"]) > 0
    kind = {"/": "text/html; charset=utf-8", "/status.json": "application/json"}.get(path, "text/plain")
    assert answer.headers["content-type"].startswith(kind)
    assert served.ask(f"{path}?x=1#y").status == 200


GOOD = b"GET /healthz HTTP/1.1\r\nHost: [::1]\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (GOOD + b"\r\n", 200),
        (GOOD.replace(b"\r", b"") + b"\n", 200),  # RFC 9112, 2.2: a lone LF may be taken for a line's end
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.7\r\nHost: [::1]\r\nX-Long: " + b"y" * 7000 + b"\r\n\r\n", 200),
        (GOOD + b"Content-Length: 100000\r\n\r\n" + b"z" * 50_000, 200),
        (GOOD + b"\r\n" + GOOD + b"\r\n", 200),  # a second request is not answered
        (b"GET /nothing HTTP/1.1\r\nHost: [::1]\r\n\r\n", 404),
        (b"GET //healthz HTTP/1.1\r\nHost: [::1]\r\n\r\n", 404),
        (b"GET /../etc/passwd HTTP/1.1\r\nHost: [::1]\r\n\r\n", 404),
        (b"POST / HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"get / HTTP/1.1\r\nHost: [::1]\r\n\r\n", 400),
        (b"GET http://localhost/ HTTP/1.1\r\nHost: [::1]\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: [::1]\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: [::1]\r\n\r\n", 400),
        (b"GET / x HTTP/1.1\r\nHost: [::1]\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: [::1]\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /" + b"x" * 8187, 400),
        ((GOOD + b"X: " + b"y" * sdm.StatusServer.HEAD_BYTES)[: sdm.StatusServer.HEAD_BYTES], 400),
    ],
)
def test_each_request_gets_its_status(served: Status, data: bytes, status: int) -> None:
    answer = served.say(data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.1 %d [A-Z]" % status, head), answer[:200]
    assert answer.count(b"HTTP/1.1") == 1
    assert b"\r\nConnection: close" in head
    assert int(re.search(rb"Content-Length: (\d+)", head)[1]) == len(body)
    assert b"\r\nAllow: GET, HEAD\r\n" in head


HOSTS = {
    200: "10.1.2.3 10.1.2.3:8080 [::1] [fe80::1%25eth0]:80 localhost:9 :80 Node-1.Example:80 node-1.example. 127.1:80",
    421: "evil.example 10.1.2.3.evil.example:80 localhost.evil.example node-1 [::1].evil.example 0x7f000001 \xff",
}


def test_only_known_hosts_are_answered(folder: Path, start: Starter) -> None:
    """A page of somebody else must not read the status through the browser of who looks at it (DNS rebinding)."""
    served = Status(start("--listen", "127.1:0", "--node-name", "node-1.example"))
    for status, hosts in HOSTS.items():
        for host in [*hosts.split(), *(["", socket.gethostname()] if status == 200 else [])]:
            answer = served.say(f"GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1")).decode()
            assert answer.startswith(f"HTTP/1.1 {status} "), (host, answer[:100])
            assert (answer.partition("\r\n\r\n")[2] == f"{sdm.UNKNOWN_HOST}\n") == (status == 421)


REQUEST_PIECES = [b"GET ", b"POST ", b"HEAD", b"/", b"/metrics", b" HTTP/1.1", b"\r\n", b"\n", b"Host: [::1]"]
REQUEST_PIECES += [b":", b" ", b"\0", b"\xff", b"http://", b"\r\n\r\n"]


def test_no_input_makes_it_hang_or_fail(served: Status) -> None:
    @settings(max_examples=200)
    @given(st.binary(max_size=100) | st.lists(st.sampled_from(REQUEST_PIECES), max_size=12).map(b"".join))
    def feed(data: bytes) -> None:
        answer = served.say(data, is_done=True)
        assert re.match(rb"HTTP/1\.1 (200|400|404|405|421) ", answer)

    feed()
    assert served.ask("/healthz").status == 200
    assert "Traceback" not in served.daemon.log


def test_a_client_has_a_limited_time_for_its_request(folder: Path, start: Starter) -> None:
    served = Status(start("--listen", "127.0.0.1:0", through=with_constants(**{"StatusServer.CLIENT_SECONDS": 1.0})))
    idle, partial, dripping = (served.connect() for _ in range(3))
    with idle, partial, dripping:
        partial.sendall(GOOD)
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            wait_for(lambda: dripping.sendall(b"G"))
        assert time.monotonic() - began > 0.9
        assert received(idle) == received(partial) == b""


def open_sockets(daemon: Daemon) -> int:
    """How many TCP connections the daemon has."""
    return len([item for item in psutil.Process(daemon.process.pid).net_connections("tcp") if item.raddr])


def test_of_many_connections_the_oldest_go(served: Status) -> None:
    daemon = served.daemon
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(served.connect()) for _ in range(3 * sdm.StatusServer.MAX_CLIENTS)]
        wait_for(lambda: open_sockets(daemon) >= sdm.StatusServer.MAX_CLIENTS)
        assert served.ask("/healthz").status == 200
        wait_for(lambda: open_sockets(daemon) <= sdm.StatusServer.MAX_CLIENTS)
        assert received(idle[0]) == b""
        newest = idle[-1]
        newest.sendall(GOOD + b"\r\n")
        assert received(newest).startswith(b"HTTP/1.1 200 ")


def test_many_who_ask_at_once_are_all_answered(served: Status) -> None:
    with contextlib.ExitStack() as stack:
        with stopped(served.daemon):
            clients = [stack.enter_context(served.connect()) for _ in range(5 * sdm.StatusServer.MAX_CLIENTS)]
            for client in clients:
                client.sendall(GOOD + b"\r\n")
        assert [received(client)[:12] for client in clients] == [b"HTTP/1.1 200"] * len(clients)


def test_a_slow_reader_keeps_nobody_waiting_and_is_cut_off(served: Status, kubelet: Kubelet) -> None:
    response = pb.ListPodResourcesResponse()
    pod = response.pod_resources.add(namespace="n" * 300, name="p" * 300)
    for number in range(sdm.MAX_HOLDERS):
        found = pod.containers.add(name=str(number))
        found.devices.add(resource_name="smarter-devices/nvidia-gpu0", device_ids=["0"])
    kubelet.pod_resources.answer = response.SerializeToString()
    wait_for(lambda: len(served.ask("/status.json").body) > 7_000_000)  # more than a socket takes
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
        assert time.monotonic() - begin < sdm.StatusServer.CLIENT_SECONDS
        wait_for(lambda: open_sockets(daemon) == 0)
    assert served.ask("/healthz").status == 200


def seconds_of(work: Callable[[], object], count: int) -> list[float]:
    """How long WORK took, each of COUNT times."""
    times = []
    for _ in range(count):
        begin = time.monotonic()
        work()
        times.append(time.monotonic() - begin)
    return times


# Opens RATE connections a second, sends DATA on each, and keeps the last hundred open. It prints a line once it does.
FLOODING = """
import socket, sys, time
port, rate, data, kept = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3].encode(), []
begin, count = time.monotonic(), 0
while True:
    while count < (time.monotonic() - begin) * rate:
        count += 1
        try:
            kept.append(socket.create_connection(("127.0.0.1", port), 1))
            kept[-1].sendall(data)
        except OSError:
            pass
        if len(kept) > 100:
            kept.pop(0).close()
        if count == 101:
            print(flush=True)
    time.sleep(0.001)
"""


@pytest.mark.parametrize(
    "data", ["", "x\r\n\r\n", "GET / HTTP/1.0\r\n\r\n"], ids=["that say nothing", "of nonsense", "that ask"]
)
def test_a_thousand_connections_a_second_starve_no_probe(
    node: Node, folder: Path, kubelet: Kubelet, start: Starter, data: str
) -> None:
    for number in range(100):
        node.sysfs(f"gpu.{number}", {})
    served = Status(start("--listen", "127.0.0.1:0"))
    served.wait_for("/readyz", 200)

    def probe() -> None:
        assert served.ask("/healthz").status == 200

    request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["0"])])
    command = [sys.executable, "-c", FLOODING, str(served.port), "1000", data]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as flood:
        try:
            assert flood.stdout and flood.stdout.readline()  # the flood has come; it may have been answered already
            took = seconds_of(probe, 25)
            assert max(took) < 5, "daemonset.yaml has the kubelet's probes wait no longer"
            assert statistics.median(took) < 1, "nor those of others, unless this machine is too busy"
            with plugin_stub(node, "nvidia-gpu0") as stub:
                assert statistics.median(seconds_of(lambda: stub.Allocate(request, timeout=PATIENCE), 100)) < 0.1
            assert open_sockets(served.daemon) < 3 * sdm.StatusServer.MAX_CLIENTS
        finally:
            flood.kill()


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


def test_what_is_rendered_serves_all_who_ask_within_a_second(served: Status) -> None:
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
def test_it_listens_on_the_given_address(folder: Path, start: Starter, address: str, hosts: list[str]) -> None:
    if "::1" in hosts and not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    status = Status(start("--listen", address))
    for host in hosts:
        assert status.ask("/healthz", host=host).status == 200
    for host in {"127.0.0.1", "::1"} - set(hosts):
        with pytest.raises(OSError):
            status.ask("/healthz", host=host)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "no.such.host.invalid:8080", "a..b:80", "256.1.1.1:80", "a" * 70 + ":80"]
)
def test_an_address_that_cannot_be_had_is_logged(folder: Path, kubelet: Kubelet, start: Starter, address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = address.format(port=taken.getsockname()[1])
        daemon = start("--listen", address)
        kubelet.wait_for("nvidia-gpu0", Healthy=4)
    lines = [line for line in daemon.log.splitlines() if "listen" in line]
    assert len(lines) == 1
    reason = "Address already in use" if "127" in address else "there is no such host name|Name or service not known"
    sentence = f"cannot listen on {re.escape(address)}: ({reason}); continuing without a status page"
    assert re.search(f" ERROR {sentence}", lines[0])
    assert daemon.stop() == 0


def test_without_listen_there_is_no_server(folder: Path, kubelet: Kubelet, start: Starter) -> None:
    daemon = start()
    kubelet.wait_for("nvidia-gpu0", Healthy=4)
    assert psutil.Process(daemon.process.pid).net_connections("inet") == []


# A process with it logs what it imports; it is not measured, since coverage's own code imports more.
LOGGING_IMPORTS = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_")}
LOGGING_IMPORTS["PYTHONVERBOSE"] = "1"


def test_it_serves_without_needless_modules(folder: Path, kubelet: Kubelet, start: Starter) -> None:
    daemon = start("--listen", "127.0.0.1:0", env=LOGGING_IMPORTS)
    status = Status(daemon)
    status.wait_for("/readyz", 200)
    for path in PATHS:
        assert status.ask(path).status == 200
    assert "import 'asyncio'" in daemon.log
    loaded = set(re.findall(r"^import '([\w.]+)'", daemon.log, re.MULTILINE))
    needless = {"http.server", "http.client", "http", "urllib.request", "socketserver", "html", "ssl", "hashlib"}
    assert not loaded & needless


def test_a_bug_in_what_is_shown_is_a_500_and_nothing_worse(folder: Path, kubelet: Kubelet, start: Starter) -> None:
    daemon = start("--listen", "127.0.0.1:0", fault="sdm.render_page = fail")
    status = Status(daemon)
    assert status.ask("/").status == 500
    daemon.says("CRITICAL the status page failed; this is a bug.*\n  Traceback")
    wait_for(lambda: status.metrics()["internal_errors_total"] == 1)  # the document is a second old at most
    assert status.ask("/metrics").status == 200
    kubelet.wait_for("nvidia-gpu0", Healthy=4)
    assert daemon.stop() == 0


def test_a_bug_in_the_server_ends_the_process(node: Node, folder: Path, kubelet: Kubelet, start: Starter) -> None:
    """Half a daemon is worse than one that its supervisor restarts."""
    daemon = start("--listen", "127.0.0.1:0", fault="sdm.StatusServer.MAX_CLIENTS = None")
    status = Status(daemon)
    kubelet.wait_for("nvidia-gpu0", Healthy=4)
    with contextlib.suppress(OSError):
        status.connect().close()
    assert daemon.process.wait(PATIENCE) == 1
    assert daemon.log.count("Traceback") == 1
    assert [path.name for path in node.plugins.glob("*.sock")] == ["kubelet.sock"]


def test_sigterm_ends_it_in_good_order_with_clients_connected(served: Status) -> None:
    daemon = served.daemon
    with served.connect() as idle, served.connect() as partial:
        partial.sendall(GOOD)
        wait_for(lambda: open_sockets(daemon) == 2)
        begin = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - begin < 2
        assert received(idle) == received(partial) == b""
    assert not re.search(r"Traceback|destroyed|never retrieved", daemon.log)


def test_no_descriptor_leaks(served: Status) -> None:
    folder = f"/proc/{served.daemon.process.pid}/fd"
    served.ask("/")
    before = len(os.listdir(folder))
    for number in range(100):
        served.say((GOOD + b"\r\n", b"x\r\n\r\n", b"", GOOD)[number % 4], is_done=True)
    wait_for(lambda: len(os.listdir(folder)) <= before)


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------

HOSTILE_WORD = "<img src=x onerror=alert(1)>&amp;'\"</style><script>alert(2)</script>\x1b[31m\udcff"


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
    word = HOSTILE_WORD
    spec = sdm.DeviceSpec(word, word, "rw", ((word, word),) * 2)
    device = sdm.Device(word, 1, True, 2, nodes=(), chosen_by={}, values={}, since=1.0, specs=(spec,))
    resource = sdm.Resource(word, True, (device, sdm.dataclasses.replace(device, problem=word)))
    left_out = sdm.LeftOut(word, 1, sdm.Reason.GONE, word)
    plan = sdm.Plan({word: resource}, (left_out,), (sdm.Rule(1, re.compile(""), word),))
    use = sdm.describe_use(resource, {word: [sdm.Holder(f"{word}:{slot}", word, word, word) for slot in range(3)]})
    state = {**sdm.NOT_REGISTERED, "trouble": word}
    stamp = {"time": sdm.utc(1e9), "level": "info"}
    counts = "slices slice_devices published_at_seconds api_reachable claims_prepared prepare_errors"
    dra = dict.fromkeys(counts.split(), 1)
    return {
        **dict.fromkeys(("smarter_device_manager", "node", "domain", "dev_problem"), word),
        **stamp,
        "threads": [{"name": word, "seconds_since_turn": 100.0, "max_seconds": 1.0}],
        "kubelet": {"answering": True, "restarts": 1, "plugin_dir": word},
        "dra": {**dra, "problem": word, "api_requests": [{"verb": word, "code": word, "count": 1}]},
        "process": sdm.describe_process(),
        "events": [
            {**stamp, **dict.fromkeys(("event", "message", "resource", "more"), "")},
            {**stamp, "event": "e", "message": word, "more": word + "!"},
        ],
        "conf": {"path": word, "error": word, "read_at": sdm.utc(1e9), "read_at_seconds": 1e9,
                 "rules": 1, "reloads": 1, "failed_reloads": 1},
        "scan_seconds": 0.1,
        "problems": [word],
        **sdm.describe_plan(plan, [{**sdm.describe_resource(resource, word, 1e9), **state, **use}], word),
    }  # fmt: skip


def page_of(document: dict[str, Any]) -> str:
    return "".join(sdm.render_page(document, "nonce"))


def test_the_page_escapes_everything() -> None:
    page = page_of(hostile_document())
    page.encode()
    found = Tags(page)
    allowed = "html head meta noscript title link style script body header h1 button p span strong main h2 ul li a"
    more = "small table thead tbody tr th td svg rect code footer"
    assert found.tags <= {*allowed.split(), *more.split()}
    assert page.count("<script") == page.count("</script>") == 1
    assert not any(name.startswith("on") for name in found.attributes)
    assert "style" not in found.attributes, "the policy would forbid it"
    shown = "<img src=x onerror=alert(1)>&amp;'\"</style><script>alert(2)</script>\\x1b[31m\\udcff"
    assert found.text.count(shown) >= 15
    page = page[: page.index("<script")]
    for outside in ("http:", "https:", "//", "url(", "@import"):
        assert outside not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_page_counts_the_starts_that_were_refused() -> None:
    document = hostile_document()
    assert "refused</small>" not in page_of(document)
    document["resources"][0]["start_refusals"] = 2
    assert "2 starts of a container refused</small>" in page_of(document)


def test_json_metrics_and_terminal_escape_hostile_texts_too() -> None:
    document = hostile_document()
    assert json.loads(json.dumps(document))["node"] == HOSTILE_WORD
    text = sdm.render_status(document)
    assert "\x1b" not in text
    text.encode()
    names = {key[1] for key in samples("".join(sdm.render_metrics(document))) if key[0] == "slots"}
    assert names == {f"{HOSTILE_WORD}/{HOSTILE_WORD}"}


def test_the_page_says_what_is_wrong_first(served: Status, kubelet: Kubelet) -> None:
    assert "all is well" in served.ask("/").body
    kubelet.down()
    page = wait_for(lambda: "1 thing is wrong" in (body := served.ask("/").body) and body)
    assert page.index("kubelet does not answer") < page.index("<h2>Resources</h2>") < page.index("<h2>Last events</h2>")
    assert "not registered" not in page, "what is true of all is said once"


def test_the_page_without_a_device_says_so(node: Node, start: Starter) -> None:
    node.rules("- devicematch: ^nothing$\n")
    status = Status(start("--listen", "127.0.0.1:0"))
    assert "No device is offered" in status.ask("/").body
    assert status.ask("/readyz").status == 200
    assert "No device is offered" in node.run("--status", status.address).stdout


# In Chromium


def in_chromium(test: Callable[..., None]) -> Callable[..., None]:
    """A test that plugs in devices, and looks at the page."""
    needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
    return needs_chromium(needs_root(test))


@pytest.fixture
def chromium() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser
    assert browser.complaints == []


def plug_a_greenhouse(node: Node, kubelet: Kubelet) -> None:
    """Plug in what a small node in the field has, for pictures."""
    for path in ("video0", "ttyACM0", "ttyAMA0", "i2c-1", "gpiochip0", "snd/controlC0", "snd/pcmC0D0p"):
        node.plug(path)
    node.link("serial0", "ttyAMA0")
    node.link("ttyUSB9", "ttyUSB7")
    node.rules(
        "- devicematch: ^video[0-9]*$\n  nummaxdevices: 20\n- devicematch: ^snd$\n  nummaxdevices: 20\n"
        "- devicematch: ^gpiochip[0-9]*$\n  nummaxdevices: 4\n- devicematch: ^i2c-[0-9]*$\n"
        "- devicematch: ^(tty(USB|ACM)[0-9]*|serial0)$\n  nummaxdevices: 1\n- devicematch: ^hci[0-9]*$\n"
    )
    kubelet.hold(
        ("video0", "wildlife/detector-7c9d8b6f5-x2x9k/detector", ["0", "1", "2"]),
        ("video0", "wildlife/recorder-0/recorder", ["3"]),
        ("i2c-1", "climate/climate-6b7f9c4d8-k5wtz/sensors", ["0"]),
        ("ttyACM0", "climate/climate-6b7f9c4d8-k5wtz/sensors", ["0"]),
        ("gpiochip0", "climate/valves-5f6d7c8b9-2lq8m/valves", ["0"]),
    )


@pytest.fixture
def greenhouse(node: Node, kubelet: Kubelet, start: Starter) -> Status:
    plug_a_greenhouse(node, kubelet)
    status = Status(start("--listen", "127.0.0.1:0", env={**os.environ, "NODE_NAME": "greenhouse-pi"}))
    status.wait_for("/readyz", 200)
    return status


def pull_the_modem(node: Node, status: Status) -> None:
    """Make one thing wrong: a device that is in use goes."""
    node.unplug("ttyACM0")
    wait_for(lambda: status.document()["problems"])
    wait_for(lambda: "is wrong" in status.ask("/").body)


@in_chromium
def test_the_page_shows_what_comes_and_goes(node: Node, greenhouse: Status, chromium: Chromium) -> None:
    chromium.show(greenhouse.url)
    text = chromium.text()
    assert "all is well" in text
    assert "4 of 20" in text
    assert "/dev/serial0 -> /dev/ttyAMA0" in text
    assert "detector of wildlife/detector-7c9d8b6f5-x2x9k slots 0, 1, 2" in " ".join(text.split())
    assert "ttyUSB0" not in text
    node.plug("ttyUSB0")
    wait_for(lambda: "ttyUSB0" in greenhouse.ask("/").body)
    chromium.run("refresh()")
    assert "/dev/ttyUSB0" in chromium.text()
    pull_the_modem(node, greenhouse)
    chromium.run("refresh()")
    text = chromium.text()
    chromium.run("document.querySelector('.wrong a').click()")
    assert "/dev/ttyACM0" in chromium.run("document.querySelector('tr:target').textContent"), "it leads to its row"
    assert "1 thing is wrong" in text
    assert "/dev/ttyACM0: it is gone, in use by sensors of climate/climate-6b7f9c4d8-k5wtz" in text
    assert re.search(rf"Unhealthy: it is gone\nsince {MOMENT}", text)


@in_chromium
def test_the_page_replaces_only_what_changed(node: Node, greenhouse: Status, chromium: Chromium) -> None:
    chromium.show(greenhouse.url)
    chromium.run("document.querySelector('main').firstElementChild.mark = 'the same'")

    def is_the_same() -> bool:
        return chromium.run("document.querySelector('main').firstElementChild.mark") == "the same"

    def time_shown() -> str:
        return chromium.run("document.getElementById('time').textContent")

    first = time_shown()
    wait_for(lambda: chromium.run("refresh()") or time_shown() != first, "the page is fetched again")
    assert is_the_same(), "nothing changed but the time"
    chromium.run("getSelection().selectAllChildren(document.querySelector('main table'))")
    pull_the_modem(node, greenhouse)
    chromium.run("refresh()")
    assert is_the_same(), "somebody is selecting"
    chromium.run("getSelection().removeAllRanges()")
    assert chromium.run("document.getElementById('pause').textContent") == "Pause"
    chromium.run("document.getElementById('pause').click()")
    assert chromium.run("document.getElementById('pause').textContent") == "Resume"
    chromium.run("refresh()")
    assert is_the_same(), "it is paused"
    chromium.run("document.getElementById('pause').click()")
    wait_for(lambda: not is_the_same(), "it refreshes itself")
    assert chromium.run("document.title") == "greenhouse-pi: 1 thing is wrong"
    assert "1 thing is wrong" in chromium.run("document.querySelector('[role=status]').textContent")
    chromium.run("document.querySelector('.wrong a').focus()")
    node.unplug("i2c-1")
    wait_for(lambda: 'href="#/dev/i2c-1"' in greenhouse.ask("/").body)
    chromium.run("refresh()")
    assert "/dev/i2c-1, /dev/ttyACM0: it is gone" in chromium.text()
    focused = chromium.run("document.activeElement.getAttribute('href')")
    assert focused == "#/dev/ttyACM0", "the focus stays where it was"


@in_chromium
def test_a_page_whose_daemon_is_gone_says_so(greenhouse: Status, chromium: Chromium) -> None:
    chromium.show(greenhouse.url)
    greenhouse.daemon.stop()
    chromium.run("refresh()")
    assert re.search(rf"No answer since {MOMENT}\.", chromium.text())
    assert "/dev/video0" in chromium.text()
    assert [complaint["entry"]["source"] for complaint in chromium.complaints] == ["network"]
    chromium.complaints.clear()


@in_chromium
def test_without_scripts_the_page_is_whole_and_loads_itself_again(greenhouse: Status, chromium: Chromium) -> None:
    chromium.do("Emulation.setScriptExecutionDisabled", value=True)
    chromium.show(greenhouse.url)
    html = chromium.do("DOM.getOuterHTML", nodeId=chromium.do("DOM.getDocument")["root"]["nodeId"])["outerHTML"]
    assert re.search(r'<noscript><meta http-equiv="refresh" content="5"></noscript>', html)
    assert "/dev/video0" in html
    assert not chromium.run("document.getElementById('pause').checkVisibility()"), "it would do nothing"
    first = chromium.run("document.getElementById('time').textContent")
    wait_for(lambda: chromium.run("document.getElementById('time')?.textContent") not in (first, None))


@in_chromium
def test_the_page_fits_each_screen(node: Node, greenhouse: Status, chromium: Chromium, tmp_path: Path) -> None:
    """The pictures of README.md are made by this: STATUS_PICTURES=docs pytest -k fits_each_screen."""
    pull_the_modem(node, greenhouse)
    folder = Path(os.environ.get("STATUS_PICTURES", tmp_path))
    for width, is_dark in itertools.product((1280, 768, 390), (False, True)):
        chromium.show(greenhouse.url, width, is_dark)
        assert chromium.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
        display = "block" if width == 390 else "table-row-group"
        assert chromium.run("getComputedStyle(document.querySelector('tbody')).display") == display
        place, size = (folder, "") if width == 1280 else (tmp_path, f"-{width}")
        picture = place / f"status{'-dark' * is_dark}{size}.png"
        chromium.picture(picture)
        assert picture.stat().st_size < 250_000
        colour = "rgb(15, 19, 24)" if is_dark else "rgb(244, 245, 247)"
        assert chromium.run("getComputedStyle(document.body).backgroundColor") == colour, "the style is in force"


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The code of axe-core, which finds barriers to accessibility."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed (apt-get install npm)")
    folder = tmp_path_factory.mktemp("axe")
    command = [npm, "pack", "--silent", "axe-core@4"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip(f"npm cannot fetch axe-core: {run.stderr.strip()[-200:]}")
    with tarfile.open(next(folder.glob("axe-core-*.tgz"))) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file
        return file.read().decode()


@in_chromium
def test_axe_finds_no_violation(node: Node, greenhouse: Status, kubelet: Kubelet, chromium: Chromium, axe: str) -> None:
    def check(*sizes: int) -> None:
        for width, is_dark in itertools.product(sizes, (False, True)):
            chromium.show(greenhouse.url, width, is_dark)
            chromium.run(axe)
            found = chromium.run("axe.run().then(result => [result.violations, result.incomplete])")
            assert [
                (item["id"], [(node["html"], node["failureSummary"]) for node in item["nodes"]])
                for items in found
                for item in items
            ] == [], (width, is_dark)

    check(1280)
    pull_the_modem(node, greenhouse)
    kubelet.hold(("i2c-1", "climate/climate-0/sensors", ["0"]))
    node.link("gone", "nowhere")
    node.rules("- devicematch: ^(gone|i2c-1)$\n  nummaxdevices: 1\n- devicematch: ^video\n  resource: cameras\n")
    kubelet.down()
    wait_for(lambda: "the kubelet does not answer" in greenhouse.ask("/").body)
    check(1280, 390)


@in_chromium
def test_chromium_runs_no_code_in_a_name(node: Node, kubelet: Kubelet, start: Starter, chromium: Chromium) -> None:
    node.plug("<img src=x onerror=document.title='taken'>")
    node.rules("- devicematch: img\n")
    status = Status(start("--listen", "127.0.0.1:0", env={**os.environ, "NODE_NAME": "</title><script>x</script>"}))
    status.wait_for("/readyz", 200)
    chromium.show(status.url)
    chromium.run("refresh()")
    assert chromium.run("document.querySelectorAll('img').length") == 0
    assert chromium.run("document.querySelectorAll('script').length") == 1
    assert "<img src=x onerror=document.title='taken'>" in chromium.text()
    assert chromium.run("document.title").startswith("</title>")


# ---------------------------------------------------------------------------------------------------------------------
# --status
# ---------------------------------------------------------------------------------------------------------------------


def test_status_prints_a_daemons_state(node: Node, served: Status, folder: Path, kubelet: Kubelet) -> None:
    kubelet.hold(HELD)
    wait_for(lambda: served.resource("nvidia-gpu0")["in_use"] == 2)
    run = node.run("--status", served.address)
    assert run.returncode == 0
    assert re.match(rf"\S+: well, as of {MOMENT} UTC\n", run.stdout)
    assert re.search(r"^2/4 +smarter-devices/nvidia-gpu0 +yes +nvidia-gpu0$", run.stdout, re.MULTILINE)
    assert re.search(r"^0, 3 +nvidia-gpu0 +default/detector-0 +main$", run.stdout, re.MULTILINE)
    assert "nvidia-gpu0: offered" in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 80
    assert json.loads(node.run("--status", served.address, "--json").stdout)["node"] == served.document()["node"]
    folder.rmdir()
    served.daemon.hang_up()
    wait_for(lambda: served.document()["problems"])
    text = node.run("--status", served.address).stdout
    problem = "nvidia-gpu0: it is gone, in use by main of default/detector-0"
    assert re.match(rf"\S+: not well, as of {MOMENT} UTC\n  - {problem}\n", text)


def test_the_events_of_status_name_the_resources(node: Node, served: Status, kubelet: Kubelet) -> None:
    node.sysfs("gpu.1", {})
    served.daemon.hang_up()
    kubelet.wait_for("nvidia-gpu1", Healthy=4)
    kubelet.take("nvidia-gpu1", "2")
    kubelet.down()
    kubelet.up()
    wait_for(lambda: served.document()["events"][0]["message"].startswith("2 resources: registered"))
    text = node.run("--status", served.address).stdout
    assert re.search(rf"^{MOMENT}  smarter-devices/nvidia-gpu1: allocated to a container$", text, re.MULTILINE)
    names = r"\(smarter-devices/nvidia-gpu0, smarter-devices/nvidia-gpu1\)"
    assert re.search(rf"^{MOMENT}  2 resources: registered with .*kubelet {names}$", text, re.MULTILINE)


def test_status_looks_where_listen_says(node: Node, served: Status) -> None:
    for address in (served.address, f":{served.port}", f"0.0.0.0:{served.port}", f"[::]:{served.port}"):
        assert node.run("--status", "--listen", address).returncode == 0
    assert node.run("--status", env={**os.environ, "SMARTER_DEVICE_MANAGER_LISTEN": served.address}).returncode == 0


def test_status_needs_no_more_than_the_image_has(node: Node, served: Status) -> None:
    """The image has no http, email or urllib (Dockerfile); kubectl exec POD -- ... --status is to work in it."""
    run = node.run("--status", served.address, env=LOGGING_IMPORTS)
    assert run.returncode == 0
    assert not re.search("^import '(http|email|html|ssl|grpc|asyncio|urllib.request)'", run.stderr, re.MULTILINE)


def test_status_without_a_daemon_says_how_to_reach_one(node: Node) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        run = node.run("--status", f"127.0.0.1:{port}")
    assert run.returncode == 1
    assert run.stdout == ""
    refusal = f"smarter_device_manager.py: no daemon answers on 127.0.0.1:{port} (Connection refused)"
    assert run.stderr.startswith(refusal)
    for way in ("--listen", "--status ADDRESS:PORT", f"kubectl -n kube-system port-forward POD {port}"):
        assert way in run.stderr
    assert run.stderr.count("\n") == 1


def status_of(node: Node, work: Callable[[socket.socket], object], *more: str) -> str:
    """The sentence with which --status refuses a server that does WORK for its client."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.recv(4096)
                work(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        run = node.run("--status", f"127.0.0.1:{server.getsockname()[1]}", *more)
        thread.join()
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    return run.stderr


def send_again(data: bytes, pause: float) -> Callable[[socket.socket], None]:
    def work(connection: socket.socket) -> None:
        while True:
            connection.sendall(data)
            time.sleep(pause)

    return work


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
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 900 + b"]" * 900,
    ],
)
def test_status_of_something_else_is_refused(node: Node, answer: bytes) -> None:
    text = status_of(node, lambda connection: connection.sendall(answer))
    assert re.search("is not a smarter-device-manager|no daemon answers", text)


def test_a_status_that_does_not_end_is_refused(node: Node) -> None:
    """By its bytes, which leave the memory alone, and by its time."""
    assert "is not a smarter-device-manager" in status_of(node, send_again(b" " * 100_000, 0.0), "--json")
    began = time.monotonic()
    assert "no daemon answers" in (text := status_of(node, send_again(b" ", 0.1))) and "(timed out)" in text
    assert time.monotonic() - began < sdm.STATUS_SECONDS + 5.0


# ---------------------------------------------------------------------------------------------------------------------
# The log
# ---------------------------------------------------------------------------------------------------------------------


def test_the_log_as_json_is_an_object_per_line(node: Node, folder: Path, kubelet: Kubelet, start: Starter) -> None:
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


@pytest.mark.parametrize(
    ("told", "devices", "wanted"),
    [
        ('it is "x level=CRITICAL y="', "/dev/a", r'it is "x level\x3dCRITICAL y\x3d" devices=/dev/a'),
        ('its product is "" devices=/dev/mem"', "/dev/a", r'its product is "" devices\x3d/dev/mem" devices=/dev/a'),
        ('level="x"', "/dev/a", r'level\x3d"x" devices=/dev/a'),
        ("a\n2026 CRITICAL b", "/dev/a", r"a\n2026 CRITICAL b devices=/dev/a"),
        ("told", "/dev/a=b", r'told devices="/dev/a\u003db"'),
        ("told", '/dev/a" level=CRITICAL "', r'told devices="/dev/a\" level\u003dCRITICAL \""'),
        ("raise it (LimitNOFILE=, ulimit -n), code = 5", "a", "raise it (LimitNOFILE=, ulimit -n), code = 5 devices=a"),
    ],
)
def test_nothing_from_outside_passes_for_a_field_of_the_log(told: str, devices: str, wanted: str) -> None:
    values = {"levelname": "INFO", "msg": "%s", "args": (told,), "fields": {"devices": devices}}
    line = sdm.EventFormatter(is_json=False).format(sdm.logging.makeLogRecord(values))
    assert line.partition(" INFO ")[2] == wanted
    if '"' in wanted.partition("devices=")[2]:
        assert json.loads(line.rpartition("devices=")[2]) == devices


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"resource": "d/video0", "ids": "0"}, ("d/video0: allocated", "ids 0")),
        ({"resource": "d/video0", "devices": "/dev/a,/dev/b"}, ("d/video0: allocated (/dev/a, /dev/b)", "")),
        ({"resources": "all", "rules": 1}, ("allocated", "rules 1")),
    ],
)
def test_an_event_on_the_page_has_all_its_fields(fields: Mapping[str, Any], wanted: tuple[str, str]) -> None:
    """An ID may be part of a name in the sentence, such as 0 of video0. Names that stand there are not repeated."""
    assert sdm.event_text({"time": "t", "level": "info", "event": "e", "message": "allocated", **fields}) == wanted


def test_the_log_as_text_is_a_sentence_and_its_fields(folder: Path, kubelet: Kubelet, start: Starter) -> None:
    daemon = start()
    kubelet.wait_for("nvidia-gpu0", Healthy=4)
    kubelet.take("nvidia-gpu0", "1", "2")
    daemon.says("allocated")
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    line = next(line for line in daemon.log.splitlines() if "allocated" in line)
    fields = r'resource=smarter-devices/nvidia-gpu0 ids=1,2 devices=("")?'
    assert re.fullmatch(f"{stamp} INFO allocated to a container {fields}", line)
    for line in daemon.log.splitlines():
        assert re.fullmatch(rf'{stamp} (INFO|WARNING) [^=]+( [a-z]+=(\S*|"[^"]*"))*', line)


def test_at_any_level_refusals_are_logged_and_the_status_has_all(node: Node, folder: Path, start: Starter) -> None:
    node.sysfs("gpu.1", {})
    kubelet = Kubelet(node)
    kubelet.refused["nvidia-gpu1"] = "not on my watch"
    with kubelet:
        daemon = start("--log-level", "error", "--listen", "127.0.0.1:0")
        kubelet.wait_for("nvidia-gpu0", Healthy=4)
        with pytest.raises(grpc.RpcError):
            kubelet.take("nvidia-gpu0", "99")
        daemon.says(r'WARNING Allocate refused: no device ID "99"')
        daemon.says(r"WARNING smarter-devices/nvidia-gpu1: the kubelet refused to register it .*not on my watch")
        document = json.loads(get(daemon, "/status.json")[1])
        assert {"registered", "plugged", "started"} <= {event["event"] for event in document["events"]}
        assert daemon.stop() == 0
        assert all("refused" in line for line in daemon.log.splitlines()), daemon.log


# A log that is not read


def cpu_time(daemon: Daemon) -> float:
    """The seconds of CPU time that DAEMON has used."""
    return sum(psutil.Process(daemon.process.pid).cpu_times()[:2])


def get(daemon: Daemon, path: str) -> tuple[int, str]:
    """The HTTP status and body that a daemon sends for PATH. Its log, which has the address, may not be readable."""
    found = wait_for(lambda: [one for one in psutil.Process(daemon.process.pid).net_connections("inet") if one.laddr])
    connection = http.client.HTTPConnection("127.0.0.1", found[0].laddr.port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


@pytest.mark.parametrize("is_blocking", [True, False])
def test_nobody_waits_for_a_log_that_is_not_read(
    node: Node, folder: Path, kubelet: Kubelet, start: Starter, is_blocking: bool
) -> None:
    """Also if another process made the pipe non-blocking."""
    count = sdm.LogWriter.MAX_LINES + 200
    with FullPipe(is_blocking) as pipe:
        daemon = start("--listen", "127.0.0.1:0", stderr=pipe.writer)
        kubelet.wait_for("nvidia-gpu0", Healthy=4)
        with plugin_stub(node, "nvidia-gpu0") as stub:
            for number in range(count):
                asked = [pb.ContainerAllocateRequest(devices_ids=[f"x{number}"])]
                call = stub.Allocate.future(pb.AllocateRequest(container_requests=asked), timeout=PATIENCE)
                assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        kubelet.take("nvidia-gpu0")
        assert get(daemon, "/healthz")[0] == 200
        usage = cpu_time(daemon)
        settle(daemon)
        assert cpu_time(daemon) - usage < 0.3  # what waits for the reader sleeps
        dropped = int(samples(get(daemon, "/metrics")[1])["log_lines_dropped_total"])
        assert 200 < dropped < 220
        said = f"ERROR dropped {dropped} lines of the log, because nobody read it lines={dropped}"
        wait_for(lambda: pipe.read() and said in pipe.text, lambda: pipe.text[-2000:])
        read = [int(number) for number in re.findall('no device ID "x([0-9]+)"', pipe.text)]
        assert read == list(range(len(read)))  # the oldest, which tell how it began
        wait_for(lambda: not pipe.waits())
        read = [int(number) for number in re.findall('no device ID "x([0-9]+)"', pipe.text)]
        assert len(read) + dropped == count + 1  # the Allocate that was granted is the last one of these
        assert "allocated" not in pipe.text
        kubelet.take("nvidia-gpu0")
        wait_for(lambda: pipe.read() and "INFO allocated" in pipe.text)
        assert daemon.stop() == 0
        assert " INFO stopping: SIGTERM\n" in pipe.read_to_the_end()
        assert pipe.text.count("of the log, because nobody read it") == 1


def test_lines_that_cannot_be_written_are_counted(folder: Path, kubelet: Kubelet, start: Starter) -> None:
    with FullPipe() as pipe:
        os.close(pipe.reader)
        pipe.reader = os.open(os.devnull, os.O_RDONLY)
        daemon = start("--listen", "127.0.0.1:0", stderr=pipe.writer)
        kubelet.wait_for("nvidia-gpu0", Healthy=4)
        wait_for(lambda: samples(get(daemon, "/metrics")[1])["log_lines_dropped_total"] >= 4)
        kubelet.take("nvidia-gpu0")
        usage = cpu_time(daemon)
        settle(daemon)
        assert cpu_time(daemon) - usage < 0.3
        assert daemon.stop() == 0


def test_it_ends_although_nobody_reads_its_log(node: Node, folder: Path, kubelet: Kubelet, start: Starter) -> None:
    with FullPipe() as pipe:
        daemon = start(stderr=pipe.writer)
        kubelet.wait_for("nvidia-gpu0", Healthy=4)
        stops_well(daemon, node)


def test_the_last_lines_reach_a_reader(node: Node, folder: Path, kubelet: Kubelet, start: Starter) -> None:
    with FullPipe() as pipe:
        daemon = start(stderr=pipe.writer)
        kubelet.wait_for("nvidia-gpu0", Healthy=4)
        for number in range(100):
            with pytest.raises(grpc.RpcError):
                kubelet.take("nvidia-gpu0", f"x{number}")
        daemon.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not sockets(node))
        text = pipe.read_to_the_end()
        assert len(re.findall('no device ID "x', text)) == 100
        assert " INFO stopping: SIGTERM\n" in text and text.endswith("\n")
        assert daemon.process.wait(PATIENCE) == 0


def test_the_reason_why_it_does_not_start_is_the_last_line(node: Node) -> None:
    """And the process ends even if nobody reads it."""
    node.rules("- devicematch: [\n")
    kept_conf(node).mkdir()
    done = node.run()
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert "WARNING the last good text of" in first and last.startswith(f"smarter_device_manager.py: {node.conf}:")
    with FullPipe() as pipe:
        daemon = Daemon(node, stderr=pipe.writer)
        assert daemon.process.wait(PATIENCE) == 1
