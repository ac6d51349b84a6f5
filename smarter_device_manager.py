#!/usr/bin/env python3
"""Offer the devices of a Linux node to Kubernetes, each as a resource that a pod can request without being privileged.

A config file selects devices by regular expressions over their paths below /dev, and says how many containers may use
each of them at once:

    - devicematch: ^video[0-9]*$
      nummaxdevices: 20

The daemon offers each device to the kubelet as smarter-devices/NAME, through the device plugin API (v1beta1) or as a
driver for Dynamic Resource Allocation (--api dra). A container that is given one of its slots finds the device in its
own /dev. The daemon follows hot-plugged devices, edits of the config file and restarts of the kubelet.

    smarter_device_manager.py                   serve the kubelet of this node
    smarter_device_manager.py --list            show what would be offered, and what is left out and why
    smarter_device_manager.py --check           check the config file
    smarter_device_manager.py --dry-run         print what containers would be given, on any machine
    smarter_device_manager.py --status          show the state of a running daemon
    smarter_device_manager.py --systemd-unit    print a unit that runs it on this host, before the kubelet
    smarter_device_manager.py --manifest        print a manifest that runs it in a cluster, without an image of its own

The chapters of this file: YAML, Expressions, Rules, Devices, Plan, Log and problems, Device side, Kubelet, Device
plugins, DRA, Status, Daemon, Modes, Options, and an appendix of texts. Each of them needs only those above it, apart
from the texts.

There are two threads. The main thread owns the device side, which is the config file and /dev; it sends whole plans to
the gRPC thread. That one owns the kubelet side: one asyncio loop with every socket and stream. Plans are immutable, and
what else both threads use is changed one entry at a time, so there are no locks of ours. Further threads write the log
and read sysfs, so that neither a slow reader of the log nor a slow driver holds these two up.

Serving needs Python 3.9, grpcio 1.51 and protobuf 3.21, or newer; --list and --check need only Python.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):  # noqa: UP036 (before imports that an older one does not have)
    sys.exit("smarter-device-manager needs Python 3.9 or newer; this is " + sys.version.split()[0])

import abc
import argparse
import binascii
import concurrent.futures
import contextlib
import dataclasses
import enum
import errno
import fcntl
import functools
import io
import itertools
import json
import logging
import math
import os
import queue
import re
import select
import signal
import socket
import stat
import struct
import threading
import time
import types
from bisect import bisect_right
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, Union

if TYPE_CHECKING:
    import asyncio
    import ssl

    import grpc

    import api_pb2 as pb
    import api_pb2_grpc as rpc

__version__ = "1.0.0"

# ---------------------------------------------------------------------------------------------------------------------
# YAML: a parser for a strict subset, because --list and --check must run where there is no YAML library. The law: for
# any text it either returns exactly what PyYAML's safe_load() returns, or raises a ConfigError that says where the
# problem is and what to write instead. Whoever extends the subset must keep the law, which the tests check against
# PyYAML. The Rules chapter relies on the line and column of each Node for its own messages.
# ---------------------------------------------------------------------------------------------------------------------

_MAX_DEPTH = 50  # levels of nesting; this also limits the parser's recursion
_MAX_KEY = 1024  # characters from the start of a key to its ':', as in PyYAML
_END = "\0"  # marks the end of the text: no YAML text may contain it

# Characters that YAML does not allow, or that YAML 1.1 and 1.2 read differently (line breaks, byte order mark).
_BAD_CHARACTER = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")

# What may stand between two tokens: blanks, comments and line breaks. A '#' starts a comment only after a blank.
_GAP = re.compile(r"(?: *(?:(?<![^ \n])#[^\n]*)?\n)* *")
_DOCUMENT_START = re.compile(r"(?: *(?:#[^\n]*)?\n)*---(?= *(?: #[^\n]*)?\n)")
_DOCUMENT_MARKER = re.compile(r"^(?:---|\.\.\.)(?=[ \t\n])", re.MULTILINE)
_LIST_DASH = re.compile(r"-(?=[ \t\n])")
_BLOCK_COLON = re.compile(r" *:(?=[ \t\n])")
_FLOW_COLON = re.compile(r" *:")  # _FLOW_PLAIN has taken each ':' that belongs to a text


def _plain_pattern(stop: str) -> re.Pattern[str]:
    """Words and the blanks between them, up to ': ', ' #', a tab or one of the characters in STOP."""
    char = rf"(?:[^ \t\n:{stop}]|:(?![ \t\n{stop}]))"
    return re.compile(rf"(?![?:,\[\]{{}}#&*!|>'\"%@`]|-(?!{char})){char}+(?: +(?!#){char}+)*")


_BLOCK_PLAIN = _plain_pattern("")
_FLOW_PLAIN = _plain_pattern(r",?\[\]{}")
_QUOTED = {"'": re.compile(r"'(?:[^'\n]|'')*"), '"': re.compile(r'"(?:[^"\\\n]|\\[^\n])*')}  # up to the closing quote
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))")
_ESCAPES = dict(zip('0abt\tnvfre "\\/N_LP', '\0\a\b\t\t\n\v\f\r\x1b "\\/\x85\xa0\u2028\u2029'))

_CONSTANTS = {"true": True, "false": False, "null": None, "~": None}
# What some YAML reader (of version 1.1 or 1.2; PyYAML, Go, Ruby, JavaScript) takes for something other than text.
_NOT_PLAIN_TEXT = re.compile(
    r"""[-+]?[0-9][0-9_,]*(?::[0-9_]+)*(?:\.[0-9_,]*)?(?:e[-+]?[0-9]+)?  # 0042 1_000 12:30 1.5 1e3
    | [-+]?\.[0-9_]+(?:e[-+]?[0-9]+)?                                    # .5
    | [-+]?0(?:b[01_]+|o[0-7_]+|x[0-9a-f_]+)                             # 0x1F
    | [-+.]+(?:inf|infinity|nan)                                         # .inf
    | [0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:(?:t|\ +)[0-9][-+0-9:.\ z]*)?     # 2001-01-01
    | y|yes|n|no|on|off|true|false|null|=|<<
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)

# What to write instead of a plain text that starts with one of these characters.
_HINTS = {
    "-": "a list item starts on a line of its own; a text that is only '-' must be quoted",
    "?": "a text that starts with '?' must be quoted; keys with '?' are not supported",
    ":": "there is no key before this ':'; a text that starts with ':' must be quoted",
    "&": "anchors are not supported: write the value out; a text that starts with '&': quote it",
    "*": "aliases are not supported: write the value out; a text that starts with '*': quote it",
    "!": "tags are not supported: remove it; a text that starts with '!': quote it",
    "|": "block texts are not supported: write the text in double quotes, with \\n for a new line",
    ">": "block texts are not supported: write the text in quotes, on one line",
    "%": "directives are not supported: remove it; a text that starts with '%': quote it",
}


class ConfigError(ValueError):
    """What is wrong with the config file and what to write instead; line and column count from 1."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(f"line {line}, column {column}: {message}")
        self.message, self.line, self.column = message, line, column


class Node(NamedTuple):
    """A value and the place where it starts; line and column count from 1."""

    value: Any  # str, int, bool or None; a list of nodes; a dict, which has the nodes of key and value by key
    line: int
    column: int

    def error(self, message: str) -> ConfigError:
        return ConfigError(message, self.line, self.column)


class YamlParser:
    """document() parses a text into nodes with their places, or raises ConfigError.

    Each method parses from self.pos on. Those for block style leave self.pos at the next token, whose column says which
    collection goes on; the others leave it right after their last character. depth is the level of nesting.
    """

    def __init__(self, text: str) -> None:
        # With a line break at the end, no method has to care for a last line without one.
        self.text = text.removeprefix("\ufeff").replace("\r\n", "\n") + "\n" + _END
        self.line_starts = [0] + [match.end() for match in re.finditer("\n", self.text)]
        self.pos = 0
        bad = _BAD_CHARACTER.search(self.text, 0, len(self.text) - len(_END))
        if bad:
            self.fail(f"the character U+{ord(bad[0]):04X} is not allowed: remove it, save as UTF-8", bad.start())

    def char(self) -> str:
        return self.text[self.pos]

    def place(self, pos: int) -> tuple[int, int]:
        line = bisect_right(self.line_starts, pos)
        return line, pos - self.line_starts[line - 1] + 1

    def indent(self) -> int:
        """The column of the token at self.pos; 0 at the end of the text."""
        return 0 if self.char() == _END else self.place(self.pos)[1]

    def node(self, value: Any, start: int) -> Node:
        return Node(value, *self.place(start))

    def fail(self, message: str, pos: int | None = None) -> NoReturn:
        raise ConfigError(message, *self.place(self.pos if pos is None else pos))

    def skip(self) -> bool:
        """Go to the next token; return whether it is on a new line."""
        start = self.pos
        self.pos = self.end_of(_GAP)
        if self.char() == "\t":
            self.fail("a tab in the indentation or between words: use spaces")
        if self.char() == "#":
            self.fail("a comment needs a space before its '#'")
        if _DOCUMENT_MARKER.match(self.text, self.pos):
            self.fail("only one '---', alone on its line before all else, is allowed: remove this")
        return self.text.find("\n", start, self.pos) >= 0

    def end_of(self, pattern: re.Pattern[str]) -> int:
        """Where a match of the pattern at self.pos ends; self.pos if there is none."""
        match = pattern.match(self.text, self.pos)
        return match.end() if match else self.pos

    # -- block style -------------------------------------------------------------------------------

    def document(self) -> Node:
        self.pos = self.end_of(_DOCUMENT_START)
        self.skip()
        if self.char() == _END:
            return Node(None, 1, 1)
        node = self.block_node(depth=1)
        if self.char() != _END:
            self.fail(
                "this belongs to none of the lists and mappings above: check its indentation, and that each key above "
                "has a space after its ':'; a text must be on one line"
            )
        return node

    def block_node(self, depth: int) -> Node:
        if _LIST_DASH.match(self.text, self.pos):
            return self.block_list(depth)
        start = self.pos
        node = self.flow_node(depth, _BLOCK_PLAIN)
        if self.end_of(_BLOCK_COLON) > self.pos:
            self.pos = start  # this was the first key
            return self.block_mapping(depth)
        self.end_line()
        return node

    def block_list(self, depth: int) -> Node:
        start, indent = self.pos, self.indent()
        self.check_depth(depth)
        items: list[Node] = []
        while self.indent() == indent and _LIST_DASH.match(self.text, self.pos):
            self.pos += len("-")
            empty = self.node(None, self.pos)
            self.skip()
            items.append(self.block_node(depth + 1) if self.indent() > indent else empty)
        return self.node(items, start)

    def block_mapping(self, depth: int) -> Node:
        start, indent = self.pos, self.indent()
        self.check_depth(depth)
        pairs: dict[str, tuple[Node, Node]] = {}
        while self.indent() == indent:
            key = self.key(depth, _BLOCK_PLAIN, _BLOCK_COLON, pairs)
            pairs[key.value] = key, self.block_value(depth + 1, indent)
        return self.node(pairs, start)

    def block_value(self, depth: int, indent: int) -> Node:
        """The value of a key with this indent; self.pos is after its ':'."""
        empty = self.node(None, self.pos)
        if not self.skip():
            node = self.flow_node(depth, _BLOCK_PLAIN)
            self.end_line()
            return node
        if self.indent() > indent:
            return self.block_node(depth)
        if self.indent() == indent and _LIST_DASH.match(self.text, self.pos):
            return self.block_list(depth)  # the only value that needs no deeper indent
        return empty

    def end_line(self) -> None:
        if not self.skip():
            if self.char() == ":":
                self.fail("a second ': ' on the line: quote the text that contains it")
            self.fail("only a comment may follow here: quote the whole text, or start a new line")

    def check_depth(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            self.fail(f"more than {_MAX_DEPTH} levels of nesting: make it flatter")

    def key(self, depth: int, plain: re.Pattern[str], colon: re.Pattern[str], others: Mapping[str, object]) -> Node:
        """A key and its ':', in either style; PLAIN and COLON are the patterns of the style."""
        start = self.pos
        node = self.flow_node(depth, plain)
        key, end = node.value, self.end_of(colon)
        if end == self.pos:
            self.fail("there is no ': ' after this key: write 'key: value', with the space", start)
        if not isinstance(key, str):
            self.fail("a key must be text: quote it", start)
        if end - 1 - start > _MAX_KEY:
            self.fail(f"a key longer than {_MAX_KEY} characters: shorten it", start)
        if key in others:
            self.fail(f"the key {_shown(key)} is there twice: remove one of them", start)
        self.pos = end
        return node

    # -- flow style and scalars --------------------------------------------------------------------

    def flow_node(self, depth: int, plain: re.Pattern[str] = _FLOW_PLAIN) -> Node:
        char = self.char()
        if char == "[":
            return self.flow_list(depth)
        if char == "{":
            return self.flow_mapping(depth)
        return self.quoted(char) if char in "'\"" else self.plain(plain)

    def flow_list(self, depth: int) -> Node:
        start = self.pos
        return self.node([self.flow_node(depth + 1) for _ in self.flow_entries(depth, "]")], start)

    def flow_mapping(self, depth: int) -> Node:
        start = self.pos
        pairs: dict[str, tuple[Node, Node]] = {}
        for _ in self.flow_entries(depth, "}"):
            key = self.key(depth + 1, _FLOW_PLAIN, _FLOW_COLON, pairs)
            empty = self.node(None, self.pos)
            self.skip()
            pairs[key.value] = key, empty if self.char() in (",", "}", _END) else self.flow_node(depth + 1)
        return self.node(pairs, start)

    def flow_entries(self, depth: int, closer: str) -> Iterator[None]:
        """Parse a flow collection; yield at the start of each entry, which the caller parses."""
        start = self.pos
        self.check_depth(depth)
        self.pos += len("[")
        self.skip()
        while self.char() != closer:
            if self.char() == _END:
                self.fail(f"this bracket is not closed: add '{closer}'", start)
            yield
            self.skip()
            if self.char() == ",":
                self.pos += len(",")
                self.skip()
            elif self.char() == ":":
                self.fail("a second ': ' or one in a list: quote the text, or write {key: value}")
            elif self.char() not in (closer, _END):
                self.fail(f"expected ',' or '{closer}': add it; quote a text that contains ,?[]{{}}")
        self.pos += len(closer)

    def plain(self, pattern: re.Pattern[str]) -> Node:
        start = self.pos
        match = pattern.match(self.text, start)
        if not match:
            default = f"no text starts with '{self.char()}': quote it, or add what is missing before it"
            self.fail(_HINTS.get(self.char(), default))
        text, self.pos = match[0], match.end()
        if text in _CONSTANTS:
            return self.node(_CONSTANTS[text], start)
        if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text):
            return self.node(int(text), start)
        number = re.fullmatch(r"[+]?0*([0-9]{1,18})(?:\.[0-9]*)?", text, re.ASCII)
        if number:
            problem = "a number must be whole, and without zeros before it"
            self.fail(f"{text[:40]}: {problem}: write {number[1]}; a text must be in quotes: {_shown(text)}", start)
        if _NOT_PLAIN_TEXT.fullmatch(text):
            problem = f"is not text to every YAML reader: if it is a text, quote it ({_shown(text)})"
            remedy = "otherwise write a decimal number of up to 18 digits, true, false or null"
            self.fail(f"{text[:40]} {problem}; {remedy}", start)
        return self.node(text, start)

    def quoted(self, quote: str) -> Node:
        start = self.pos
        self.pos = self.end_of(_QUOTED[quote])
        if self.char() != quote:
            self.fail(f"this text has no closing {quote} on its line: add it", start)
        text = self.text[start + 1 : self.pos]
        self.pos += len(quote)
        if quote == "'":
            return self.node(text.replace("''", "'"), start)
        return self.node(_ESCAPE.sub(lambda match: self.unescape(match, start + 1 + match.start()), text), start)

    def unescape(self, match: re.Match[str], pos: int) -> str:
        code, char = match[1] or match[2] or match[3], match[4]
        if char and char not in _ESCAPES:
            self.fail(f"'\\{char}' is not an escape: write '\\\\' for a backslash, or use single quotes", pos)
        if char:
            return _ESCAPES[char]
        number = int(code, 16)
        if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
            self.fail("no character has this number", pos)
        return chr(number)


def _shown(text: str) -> str:
    """TEXT in quotes, for a message; a long one is cut."""
    return f'"{text}"' if len(text) <= 40 else f'"{text[:40]}..."'


# ---------------------------------------------------------------------------------------------------------------------
# Expressions: searches for expressions of RE2 (https://github.com/google/re2/wiki/Syntax), which the Go program used,
# with Python's re, within a limit of time. A pattern is translated so that every version of re reads it like RE2 and
# without a warning; what cannot be translated is refused.
# ---------------------------------------------------------------------------------------------------------------------

SEARCH_SECONDS = 0.05  # of CPU time that a search may take; most take a microsecond
TOOK_TOO_LONG = "the expression took too long"  # the beginning of a reason

T = TypeVar("T")


class ExpressionError(ValueError):
    """A text is not an expression of RE2, or one that Python cannot express. The message says what to write instead."""


class SearchTimeout(Exception):
    """A search, or other work within a limit of time, took too long, so its result is unknown."""


class _Alarm:
    """Interrupts work that takes too long, with an exception that a signal handler raises. For the main thread only.

    It must be safe to interrupt the work anywhere, between two steps of Python's own code or of re's. The signal is
    SIGPROF, whose timer counts CPU time: a search does not take too long because the machine is busy.
    """

    RING_SECONDS = 0.01  # between two signals once the time is up: Python drops an exception raised in a finalizer
    _due: float | None = None  # time.thread_time() at which the work must be done; 0 if there is none

    def limit(self, work: Callable[[], T], seconds: float) -> T:
        """What WORK, which must not call this, returns. Raises SearchTimeout after SECONDS of CPU time."""
        if self._due is None:  # this is the first call
            signal.signal(signal.SIGPROF, self._ring)
        try:
            self._due = time.thread_time() + seconds
            signal.setitimer(signal.ITIMER_PROF, seconds, self.RING_SECONDS)
            return work()
        finally:
            # If the signal comes before the next line takes effect, it interrupts this method as it would the work.
            self._due = 0.0
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _ring(self, *_: object) -> None:
        # The timer counts the clock's ticks, of all threads in the process, so it may come early.
        if self._due and time.thread_time() >= self._due:
            raise SearchTimeout


ALARM = _Alarm()


class Expression:
    """An expression of RE2, searched with Python's re within a limit of CPU time. For the main thread only.

    A search keeps all other threads waiting. One that reaches the limit then lets them run for as long as it took, and
    is not tried again with the same text. Raises ExpressionError if the pattern is not one.
    """

    MAX_SLOW_TEXTS = 1000  # with more, all but the newest are forgotten
    MAX_FASTER = 20  # the more searches took too long, the less time the next one gets: down to this part of it
    were_slow = False  # whether searches for several expressions took too long together: then each gets its own limit

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        try:
            translator = _Translator(pattern)
            text = translator.group().text + pattern[translator.pos :]  # re refuses a ")" too many
            self.compiled = re.compile(text, re.ASCII)
        except ExpressionError as error:
            raise ExpressionError(f"{_shown(pattern)}: {error}") from None
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            problem = getattr(error, "msg", "") or "it is too large"
            raise ExpressionError(f"{_shown(pattern)} is not a regular expression: {problem}") from None
        self.slow_texts: set[str] = set()  # those in which a search took too long

    def search(self, text: str, whole: bool = False) -> re.Match[str] | SearchTimeout | None:
        """What is found in TEXT, or, if it must match as a WHOLE, whether it does."""
        find = self.compiled.fullmatch if whole else self.compiled.search
        seconds = SEARCH_SECONDS / min(1 + len(self.slow_texts), self.MAX_FASTER)
        if text not in self.slow_texts:
            try:
                return ALARM.limit(lambda: find(text), seconds)
            except SearchTimeout:
                if len(self.slow_texts) == self.MAX_SLOW_TEXTS:
                    self.slow_texts.clear()
                self.slow_texts.add(text)
                time.sleep(seconds)
        return SearchTimeout()


def search_all(expressions: Sequence[Expression], text: str) -> Sequence[re.Match[str] | SearchTimeout | None]:
    """Per expression, what the search in TEXT finds. For the main thread only."""
    if not Expression.were_slow:
        try:  # one limit for all of them, because setting it takes longer than most searches
            return ALARM.limit(lambda: [each.compiled.search(text) for each in expressions], SEARCH_SECONDS)
        except SearchTimeout:
            Expression.were_slow = True
    return [expression.search(text) for expression in expressions]


# The translation. A class is written as in a Python [class].
_POSIX = r"""alnum=0-9A-Za-z alpha=A-Za-z ascii=\x00-\x7f blank=\t\x20 cntrl=\x00-\x1f\x7f digit=0-9 graph=!-~
    lower=a-z print=\x20-~ punct=!-/:-@\[-`{-~ space=\t-\r\x20 upper=A-Z word=0-9A-Z_a-z xdigit=0-9A-Fa-f"""
_POSIX_CLASSES = dict(pair.split("=") for pair in _POSIX.split())
_PERL_CLASSES = {r"\d": "0-9", r"\s": r"\t\n\f\r\x20", r"\w": "0-9A-Z_a-z"}  # RE2's \s does not have the vertical tab
_NAMED_CLASS = re.compile(r"\[:(?P<not>\^?)(?P<posix>.*?):\]|\\[dDsSwW]", re.DOTALL)
_RANGE_DASH = re.compile(r"-(?=[^\]])")
_CONTROLS = dict(zip("aftnrv", "\a\f\t\n\r\v"))
_ASSERTIONS = {"^": r"\A", "$": r"\Z", r"\A": r"\A", r"\z": r"\Z", r"\b": r"\b", r"\B": r"(?!\b)"}  # re's \B has varied
_CHARACTER = re.compile(
    r"""
      \\ x (?: \{ (?P<wide> [0-9A-Fa-f]+ ) \} | (?P<hex> [0-9A-Fa-f]{2} ) )
    | \\ (?P<octal> 0[0-7]{0,2} | [1-7][0-7]{1,2} )
    | \\ (?P<control> [aftnrv] )
    | \\ (?P<sign> (?![0-9A-Za-z]) [\x00-\x7f] )
    | (?P<plain> [^\\] )
    """,
    re.VERBOSE | re.DOTALL,
)
_TOKEN = re.compile(
    r"""
      \( \? (?P<on> [A-Za-z]* ) (?: - (?P<off> [A-Za-z]+ ) )? (?P<scope> [:)] )
    | (?P<open> \( (?: \? (?: P?< (?P<name> [A-Za-z_][A-Za-z0-9_]* ) > | (?P<look> <?[=!] ) ) | (?!\?) ) )
    | (?P<foreign> \( \? .? )
    | (?P<repeat> (?: [*+?] | \{ (?P<count> (?:0|[1-9][0-9]*) (?: , (?:0|[1-9][0-9]*)? )? ) \} ) \?? )
    | (?P<assertion> [\^$] | \\[AzbB] )
    | (?P<any> \. )
    | (?P<bracket> \[\^? )
    |                       # nothing, if another character comes
    """,
    re.VERBOSE | re.DOTALL,
)
_BAD_ESCAPES = {
    **dict.fromkeys("CQEpP", "is not supported; write the characters themselves or a [class]"),
    **dict.fromkeys("123456789", "is for templates only; an expression cannot refer to what a group matched"),
    "": r"is not an escape; for a backslash, write \\",
    "Z": r"is not an escape; for the end, write $ or \z",
    "x": r"is not an escape; a character by its number is \x7f or \x{20ac}",
}


class _Part(NamedTuple):
    """A translated part of an expression, and what must be known to repeat it."""

    text: str
    may_be_empty: bool  # it can match without consuming a character
    may_take: bool  # it can match and consume one

    def repeat(self, token: re.Match[str]) -> _Part:
        """It repeated as TOKEN says, which is one of * + ? {n} {n,} {n,m}, or one of these and a ?."""
        least, comma, most = {"*": "0,", "+": "1,", "?": "0,1"}.get(token[0][0], token["count"]).partition(",")
        may_differ = comma and (not most or int(most) - int(least) > 1)  # in how often it is repeated
        if self.may_be_empty and self.may_take and may_differ:
            remedy = "make it match at least one character, such as (a+)* for (a*)*"
            problem = "repeats something that may be empty, which Go and Python handle differently"
            raise ExpressionError(f"{token[0]} {problem}; {remedy}")
        text = self.text if self.may_take else f"(?:{self.text})"  # re cannot repeat an assertion as it stands
        return _Part(text + token[0], self.may_be_empty or least == "0", self.may_take)


class _Translator:
    """Translates a pattern for Go's RE2 to an expression of Python's re that means the same with re.ASCII.

    Look-around, which only Python has, is allowed, and so is what is too large for Go. Under (?i), k and s do not match
    the kelvin sign and the long s, as they do in RE2. Raises ExpressionError for what Python cannot express, and for
    most of what RE2 refuses; re.compile() refuses the rest. This is a recursive descent: each method translates what
    begins at self.pos, and leaves self.pos after it.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.pos = 0
        self.flags: frozenset[str] = frozenset()  # those of i, m and s that are on

    def next(self) -> str:
        return self.pattern[self.pos : self.pos + 1]

    def take(self, token: re.Pattern[str]) -> re.Match[str] | None:
        found = token.match(self.pattern, self.pos)
        self.pos = found.end() if found else self.pos
        return found

    def group(self, opening: str = "", is_look_around: bool = False) -> _Part:
        """The alternatives up to the end of a group, whose OPENING is behind. Its flags end with it."""
        flags, text, may_be_empty, may_take = self.flags, opening, is_look_around, False
        while True:
            parts = self.sequence()
            text += "".join(part.text for part in parts)
            may_be_empty |= all(part.may_be_empty for part in parts)
            may_take |= not is_look_around and any(part.may_take for part in parts)
            end = self.next() if opening or self.next() == "|" else ""  # re refuses a group that is not closed
            self.pos += len(end)
            text += end
            if end != "|":
                self.flags = flags
                return _Part(text, may_be_empty, may_take)

    def sequence(self) -> list[_Part]:
        parts: list[_Part] = []
        is_repeatable = False
        while self.next() not in ("", "|", ")"):
            token = self.take(_TOKEN)
            assert token  # its last alternative is empty
            if token["foreign"]:
                begins = "(?:...), (?i:...), (?P<name>...) and (?=...) do"
                raise ExpressionError(f"{token[0]} does not begin a group; {begins}")
            if token["repeat"]:
                if not is_repeatable:
                    remedy = rf"for the character itself, write \{token[0][0]}"
                    raise ExpressionError(f"there is nothing before {token[0]} to repeat; {remedy}")
                parts[-1] = parts[-1].repeat(token)
            elif token["assertion"]:
                is_of_lines = "m" in self.flags and token[0] in "^$"
                parts.append(_Part(f"(?m:{token[0]})" if is_of_lines else _ASSERTIONS[token[0]], True, False))
            elif token["open"]:
                opening = f"(?P<{token['name']}>" if token["name"] else token[0]
                parts.append(self.group(opening, bool(token["look"])))
            elif token["scope"]:
                on, off, before = set(token["on"]), set(token["off"] or ""), self.flags
                if not on | off <= set("ims"):
                    raise ExpressionError(f"the flags of {_shown(token[0])} are not supported; i, m and s are")
                self.flags = (before | on) - off
                if token["scope"] == ":":
                    parts.append(self.group("(?:"))
                    self.flags = before
            else:
                parts.append(_Part(self.atom(token), may_be_empty=False, may_take=True))
            is_repeatable = not token["repeat"] and token["scope"] != ")"
        return parts

    def atom(self, token: re.Match[str]) -> str:
        """A character, a class of characters, or a "." for any."""
        if token["any"]:
            return "(?s:.)" if "s" in self.flags else "."
        if token["bracket"]:
            text = self.char_class(token["bracket"])
        else:
            named = self.take(_NAMED_CLASS)
            text = f"[{self.named_class(named)}]" if named else self.char()
        return f"(?i:{text})" if "i" in self.flags else text

    def char_class(self, text: str) -> str:
        first = self.pos
        while self.next() != "]" or self.pos == first:
            if not self.next():
                return text  # re refuses it
            named = self.take(_NAMED_CLASS)
            text += self.named_class(named) if named else self.char()
            if not named and self.take(_RANGE_DASH):
                text += f"-{self.char()}"
        self.pos += 1
        return f"{text}]"

    def named_class(self, named: re.Match[str]) -> str:
        r"""What [:alpha:], [:^alpha:], \d or \D is in a [class]."""
        name = named["posix"]
        if "i" in self.flags and name in ("lower", "upper"):
            name = "alpha"
        ranges = _PERL_CLASSES[named[0].lower()] if name is None else _POSIX_CLASSES.get(name)
        if ranges is None:
            names = ", ".join(_POSIX_CLASSES)
            raise ExpressionError(f"{_shown(named[0])} is not a character class; the names are {names}")
        if not named["not"] and not named[0].isupper():
            return ranges
        others = re.findall(f"[^{ranges}]", "".join(map(chr, range(128))))
        return "".join(map(re.escape, others)) + r"\x80-\U0010ffff"

    def char(self) -> str:
        """The one character, written as itself or as an escape."""
        found = self.take(_CHARACTER)
        if not found:
            char = self.pattern[self.pos + 1 : self.pos + 2]
            default = f"is not an escape; for the character itself, write {char}"
            raise ExpressionError(f"\\{char} {_BAD_ESCAPES.get(char, default)}")
        char = found["plain"] or found["sign"] or _CONTROLS.get(found["control"], "")
        if not char:
            code = int(found["octal"], 8) if found["octal"] else int(found["wide"] or found["hex"], 16)
            if code > sys.maxunicode:
                raise ExpressionError(f"{_shown(found[0])} is beyond Unicode")
            char = chr(code)
        if "i" in self.flags and not char.isascii():
            raise ExpressionError(f"(?i) works with ASCII only; exclude {_shown(found[0])} from it: (?-i:{found[0]})")
        return re.escape(char)


# ---------------------------------------------------------------------------------------------------------------------
# Rules: from the text of a config file to checked rules. A new key takes its name in _KEYS, a field of Rule, and a
# reader. The chapters below rely on every Rule being valid: expanding its templates cannot fail.
# ---------------------------------------------------------------------------------------------------------------------

CONF_BYTES = 1 << 20  # the most that a ConfigMap can hold
DEFAULT_DOMAIN = "smarter-devices"
MAX_SLOTS = 10_000
PARSE_SECONDS = 20.0  # of CPU time that the config file may take; one of 1 MiB takes 4 s, most a millisecond
TEGRA = "nvidia-gpu"  # a devicematch with exactly this text means the GPUs of a Tegra board, which have no node in /dev
_KEYS = ("devicematch", "nummaxdevices", "resource", "containerpath", "permissions", "attributes", "with", "env")
_COMPANION_KEYS = ("path", "containerpath", "optional", "permissions")
_FIELDS = {"devicematch": "pattern", "nummaxdevices": "slots", "with": "companions", "path": "template"}  # else the key


class Companion(NamedTuple):
    """A companion of a device, which is given to a container together with it."""

    template: str  # of the path below /dev
    optional: bool = False
    containerpath: str = ""  # template; empty: beside the device, or as on the host
    permissions: str = ""  # empty: those of the device


class Attribute(NamedTuple):
    """A sysfs attribute that a rule requires: its name, and the expression that must match its whole value."""

    name: str
    match: Expression

    def fits(self, values: Mapping[str, str]) -> bool:
        """Whether its value in VALUES, by name, matches. A search that takes too long counts as no."""
        return self.name in values and isinstance(self.match.search(values[self.name], whole=True), re.Match)


@dataclass(frozen=True)
class Rule:
    """A rule of the config file. The field for each of _KEYS has the name of the key, or that in _FIELDS."""

    line: int  # of the config file
    match: Expression  # searched for in a path below /dev
    pattern: str  # match, as written in the config file
    slots: int = 1  # how many containers may have the device at once
    resource: str = ""  # template; empty: the path names the resource
    containerpath: str = ""  # template; empty: the path itself
    permissions: str = "rw"
    attributes: tuple[Attribute, ...] = ()
    companions: tuple[Companion, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    values: tuple[str, ...] = ()  # names of the attributes whose values its templates use


# Templates: texts in which \1, \g<name> and \g<0> stand for what devicematch matched, and \g<attr:NAME> for the value
# of a sysfs attribute.
_REFERENCE = re.compile(
    r"""
    \\ (?: (?P<number> [1-9][0-9]? )
         | g< (?P<group> [0-9]{1,2} | [A-Za-z_]\w* ) >
         | g<attr: (?P<attribute> [^<>]+ ) >
         | (?P<wrong> .? ) )
    """,
    re.VERBOSE | re.ASCII | re.DOTALL,
)


def expand(template: str, match: re.Match[str], values: Mapping[str, str]) -> str:
    """TEMPLATE with its references replaced by the groups of MATCH and by VALUES, which are sysfs attributes by name.

    A group that did not take part in the match is empty. In a value, each character that the name of a resource cannot
    have becomes "_"; so a value never spans several parts of a path, and is never "." or "..".
    """

    def replacement(found: re.Match[str]) -> str:
        if not found["attribute"]:
            return match.expand(found[0])
        value = re.sub(r"[^A-Za-z0-9_.-]", "_", values[found["attribute"]])
        return value if value.strip(".") else "_" * len(value)

    return _REFERENCE.sub(replacement, template)


def _wrong(node: Node, expected: str) -> ConfigError:
    value = node.value
    kinds = {bool: "true or false", int: "a number", str: "a text", list: "a list", dict: "a mapping"}
    shown = f" ({value})" if type(value) is int else f" ({_shown(value)})" if isinstance(value, str) else ""
    return node.error(f"expected {expected}, found {kinds.get(type(value), 'nothing')}{shown}")


def _text(node: Node) -> str:
    if isinstance(node.value, str):
        return node.value
    hint = f': put it in quotes, "{node.value}"' if type(node.value) is int else ""
    raise _wrong(node, f"a text{hint}")


def _expect(node: Node, kind: type, what: str) -> None:
    if not isinstance(node.value, kind) or not node.value:
        raise _wrong(node, what)


def _compile(node: Node) -> Expression:
    try:
        return Expression(_text(node))
    except ExpressionError as error:
        raise node.error(str(error)) from None


def _check_attribute(name: str, node: Node) -> None:
    """Raise ConfigError if NAME cannot be the name of a file in a device's folder in sysfs."""
    if {"", ".", ".."} & set(name.split("/")) or "\0" in name:
        raise node.error(f"{_shown(name)} is not an attribute of sysfs")


class _RuleReader:
    """Reads one rule. read_KEY(node) returns the field for KEY, or raises ConfigError at the node's place."""

    match: Expression  # of the rule

    def __init__(self) -> None:
        self.values: dict[str, None] = {}  # the attributes in its templates

    def fields(self, node: Node, keys: Sequence[str], missing: str) -> dict[str, Any]:
        """The fields in the mapping NODE. The first of KEYS is required; MISSING says so."""
        for key, (place, _) in node.value.items():
            if key not in keys:
                import difflib  # needed for this error only

                near = difflib.get_close_matches(key.lower(), keys, 1)
                advice = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}"
                raise place.error(f"unknown key {_shown(key)}; {advice}")
        if keys[0] not in node.value:
            raise node.error(missing)
        found = [key for key in keys if key in node.value]  # in the order of KEYS: templates need read_devicematch()
        return {_FIELDS.get(key, key): getattr(self, f"read_{key}")(node.value[key][1]) for key in found}

    def read_devicematch(self, node: Node) -> str:
        self.match = Expression(f"^{TEGRA}([0-9]+)$") if node.value == TEGRA else _compile(node)
        return _text(node)

    def read_nummaxdevices(self, node: Node) -> int:
        if type(node.value) is not int:
            raise _wrong(node, "a whole number of slots")
        if not 0 <= node.value <= MAX_SLOTS:
            raise node.error(f"{node.value} slots: must be 0 to {MAX_SLOTS}")
        return node.value

    def template(self, node: Node) -> str:
        if not _text(node):
            raise _wrong(node, "a text that is not empty")
        return self.any_template(node)

    def any_template(self, node: Node) -> str:
        """A template that may be empty."""
        text = _text(node)
        if "\0" in text:
            raise _wrong(node, "a text without NUL")
        groups = {*map(str, range(self.match.compiled.groups + 1)), *self.match.compiled.groupindex}
        for reference in _REFERENCE.finditer(text):
            if reference["wrong"] is not None:
                remedy = r"write a group of devicematch or an attribute: \1, \g<name>, \g<attr:serial>"
                raise node.error(f"{_shown(text)}: after a backslash, {remedy}")
            if reference["attribute"]:
                _check_attribute(reference["attribute"], node)
                self.values[reference["attribute"]] = None
            elif (reference["number"] or reference["group"]) not in groups:
                raise node.error(f"{_shown(text)}: devicematch has no group {reference[0]}")
        return text

    def read_resource(self, node: Node) -> str:
        text = self.template(node)
        domain, slash, _ = _REFERENCE.sub(lambda found: "_" * len(found[0]), text).partition("/")
        if slash and (domain == DEFAULT_DOMAIN or "." in domain):
            name = text[len(domain) + 1 :] or "a name"
            raise node.error(f"{_shown(text)} must not have the domain, which --domain sets: write {name}")
        return text

    def read_containerpath(self, node: Node) -> str:
        text = self.template(node)
        if not text.startswith("/dev/"):
            raise node.error(f"{_shown(text)} must be an absolute path under /dev/")
        if ".." in text.split("/"):
            raise node.error(f'{_shown(text)} must not have a ".."')
        return text

    def read_permissions(self, node: Node) -> str:
        text = _text(node)
        if not text or not set(text) <= set("rwm") or len(set(text)) < len(text):
            raise node.error(f"{_shown(text)} must be letters of r, w and m, each once")
        return "".join(letter for letter in "rwm" if letter in text)

    def read_attributes(self, node: Node) -> tuple[Attribute, ...]:
        _expect(node, dict, 'a mapping of attributes, such as idVendor: "10c4"')
        for name, (place, _) in node.value.items():
            _check_attribute(name, place)
        return tuple(Attribute(name, _compile(value)) for name, (_, value) in node.value.items())

    def read_with(self, node: Node) -> tuple[Companion, ...]:
        _expect(node, list, r'a list of paths below /dev, such as ["snd/controlC\1"]')
        return tuple(self.companion(item) for item in node.value)

    def companion(self, node: Node) -> Companion:
        """An entry of `with`: a path, with a "?" at its end if it is optional, or a mapping."""
        if isinstance(node.value, dict) and node.value:
            missing = "a companion needs a path, such as path: snd/controlC0"
            return Companion(**self.fields(node, _COMPANION_KEYS, missing))
        if isinstance(node.value, (dict, list)):
            raise _wrong(node, "a path below /dev, or a mapping with it")
        text = _text(node)
        return Companion(self.read_path(node._replace(value=text.removesuffix("?"))), optional=text.endswith("?"))

    def read_path(self, node: Node) -> str:
        text = self.template(node)
        if text.endswith("?"):
            raise node.error(f'{_shown(text)}: write optional: true instead of the "?"')
        if text.startswith("/") or ".." in text.split("/"):
            raise node.error(f"{_shown(text)} must be a path below /dev, such as snd/controlC0")
        return text

    def read_optional(self, node: Node) -> bool:
        if not isinstance(node.value, bool):
            raise _wrong(node, "true or false")
        return node.value

    def read_env(self, node: Node) -> tuple[tuple[str, str], ...]:
        _expect(node, dict, r"a mapping of variables, such as CAMERA: /dev/\g<0>")
        for name, (place, _) in node.value.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise place.error(f"{_shown(name)} is not a name for a variable")
        return tuple((name, self.any_template(value)) for name, (_, value) in node.value.items())


def parse_rules(text: str) -> tuple[Rule, ...]:
    """The rules in TEXT, that of a config file, in order. For the main thread only. Raises ConfigError."""
    try:
        return ALARM.limit(lambda: _parse_rules(text), PARSE_SECONDS)
    except SearchTimeout:  # re can take a minute to compile an expression of 1 MiB
        message = f"the file takes more than {PARSE_SECONDS:.0f} s to read; write fewer rules or shorter expressions"
        raise ConfigError(message, 1, 1) from None


def _parse_rules(text: str) -> tuple[Rule, ...]:
    manifest = re.search("^apiVersion:", text, re.MULTILINE)
    if manifest:
        message = "this is a Kubernetes manifest; the config file is only the text under its conf.yaml: |"
        raise ConfigError(message, text.count("\n", 0, manifest.start()) + 1, 1)
    document = YamlParser(text).document()
    if document.value is None or document.value == []:
        raise document.error("the file has no rules; write a list: - devicematch: ^video[0-9]*$")
    if not isinstance(document.value, list):
        raise _wrong(document, "a list of rules (- devicematch: ...)")
    rules = []
    for node in document.value:
        if not isinstance(node.value, dict):
            raise _wrong(node, "a rule (devicematch: ...)")
        reader = _RuleReader()
        fields = reader.fields(node, _KEYS, "a rule needs devicematch, a regular expression")
        rules.append(Rule(line=node.line, match=reader.match, values=tuple(reader.values), **fields))
    return tuple(rules)


def resource_name(text: str) -> str:
    """The name of the resource for TEXT, a path or an expanded template; empty if TEXT has no letter or digit.

    The kubelet accepts names of up to 63 characters of A-Za-z0-9-_. that begin and end with a letter or digit.
    """
    return shorten(re.sub(r"[^A-Za-z0-9_-]", "_", text).strip("_-"), 63, text)


def shorten(name: str, limit: int, text: str) -> str:
    """NAME; one that is longer than LIMIT is cut, and ends in 8 hex digits of the SHA-256 of TEXT."""
    if len(name) <= limit:
        return name
    import hashlib  # loads OpenSSL, which takes 4 MB; devices with usual names do not need it

    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name[: limit - 9]}-{digest[:8]}"


def read_conf(path: str) -> str:
    """The text of the config file PATH. Raises OSError, and ConfigError if it is not UTF-8 or too long."""
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ConfigError("this is not a plain file; the config file must be one, because it is read again", 1, 1)
        data = file.read(CONF_BYTES + 1)
    if len(data) > CONF_BYTES:
        raise ConfigError(f"the file is longer than {CONF_BYTES} bytes; is it a config file?", 1, 1)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8").split("\n")
        raise ConfigError("this is not UTF-8; save the file as UTF-8", len(before), len(before[-1]) + 1) from None


def _open_at_once(path: str, flags: int) -> int:
    """open(2), but without waiting for the writer of a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK)


# The rules without a config file are those of conf.yaml, in its order: slots and patterns; a test compares them.
_DEFAULTS = (
    (20, "^snd$"),
    (40, "^gpiomem[0-9]*$"),
    (20, "^gpiochip[0-9]*$"),
    (1, r"^hci[0-9]*$ ^i2c-[0-9]*$ ^spidev[0-9]*\.[0-9]*$"),
    (20, "^rtc0$ ^video[0-9]*$ ^vchiq$ ^vcsm.*$"),
    (1, "^ttyUSB[0-9]*$ ^ttyACM[0-9]*$ ^ttyTHS[0-9]*$ ^ttyS[0-9]*$ ^ttyAMA[0-9]*$"),
    (10, TEGRA),
)
DEFAULT_CONF = "".join(
    f"- devicematch: {pattern}\n  nummaxdevices: {slots}\n" for slots, row in _DEFAULTS for pattern in row.split()
)


# ---------------------------------------------------------------------------------------------------------------------
# Devices: what stands below /dev, and what sysfs knows of it. One look at /dev is plain data (Snapshot), and resolve()
# is one algorithm over such data or over /dev itself (LiveTree). The chapters below rely on it never to lead to a node
# outside /dev, nor through a folder where others than root may write.
# ---------------------------------------------------------------------------------------------------------------------

CHAR, BLOCK, FOLDER, LINK, MOUNT = "character device", "block device", "folder", "symbolic link", "mount"
NODES = (CHAR, BLOCK)
FRESH_NS = 20_000_000  # two ticks of the kernel: file times move once a tick, of 10 ms at the most (CONFIG_HZ=100)
MAX_VALUE = 200  # characters of an attribute's value in a template, or that is shown to write a rule from
SYSFS_SECONDS = 0.2  # for one read of what sysfs knows of a device
SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of these, an error does not mean that something is not there
SYSFS_HANGS = "sysfs does not answer"
NO_ATTRIBUTES_YET = f"{SYSFS_HANGS}, so its attributes cannot be read"
USB_FACTS = ("idVendor", "idProduct", "serial", "manufacturer", "product")  # of a USB device, for DRA
_KINDS = {"c": CHAR, "b": BLOCK, "d": FOLDER, "l": LINK, "-": "plain file", "s": "socket", "p": "FIFO"}  # as in ls(1)

Tree = Union["Snapshot", "LiveTree"]  # what resolve() walks over
Times = dict[str, tuple[int, int]]  # st_mtime_ns and st_ctime_ns, by name
Names = tuple[str, ...]  # of sysfs attributes
Values = Mapping[str, str]  # of sysfs attributes, by name
Chain = Sequence[Values]  # what sysfs says of a device: the attributes in its own folder first, then its parents'


class Reason(enum.Enum):
    """Why a path is not offered: the label that the metrics count it under, and its text, a template."""

    GONE = "other", "it is gone"
    SWAPPED = "other", "another device has taken its place"
    COMPANION = "other", "it goes with /dev/{path}: {why}"
    LINK_DANGLES = "link", "a link to /dev/{path}, which is not there"
    LINK_CIRCLE = "link", "a link that leads in a circle"
    LINK_CLIMBS_OUT = "link", "a link that leaves /dev"
    LINK_OUT = "link", "a link to {target}, which leaves /dev"
    LINK_TO_DEV = "link", "a link to all of /dev"
    THROUGH = "link", "a path through /dev/{path}, which is a {kind}"
    UNTRUSTED = "untrusted", "others than root may write in the folder /dev/{path}"
    EMPTY_FOLDER = "folder", "a folder that holds no device node"
    FILE_SYSTEM = "file_system", "another file system"
    MOUNT_INSIDE = "file_system", "a folder with another file system in it, at /dev/{path}"
    NOT_A_DEVICE = "not_a_device", "a {kind}, not a device"
    NOT_UTF8 = "bad_name", "the name /dev/{path} is not UTF-8, and the kubelet takes no other"
    NO_NAME = "bad_name", "its path has no letter or digit to make a resource name from"
    NAME_TAKEN = "name_taken", "its resource's name {name} is taken by /dev/{path}"
    NAME_OF_POOL = "name_taken", "its resource's name {name} is taken by the pool of line {line}; rename the pool"
    CONTAINER_PATH = "container_path", 'its path in a container would be "{path}"'
    SAME_PLACE = "container_path", "{one} and {other} would both be {path} in the container"
    ATTRIBUTES = "attributes", "{why}"
    PATTERN_TIMEOUT = "pattern_timeout", "{why}"
    NO_ATTRIBUTES = "attributes", "a Tegra's GPU has no attributes"
    SAME_NODE = "duplicate", "its pool offers the same node already, as /dev/{path}"
    LIST_TOO_LONG = "list_too_long", "the list of its resource's slots would be longer than {limit} bytes"

    def __init__(self, label: str, template: str) -> None:
        self.label = label
        self.template = template


class NotADevice(Exception):
    """A path names no device; the text says why, to follow the path and a colon."""

    def __init__(self, reason: Reason, **details: object) -> None:
        super().__init__(reason.template.format(**details))
        self.reason = reason


class NotChosen(NotADevice):
    """A rule names a path, but does not choose the device there, so an earlier rule may."""


class Entry(NamedTuple):
    """One name below /dev, as lstat(2) shows it. Two entries that are equal are one node: in devtmpfs and tmpfs, which
    /dev is on a real node, no inode number is given twice."""

    kind: str
    device: int = 0  # st_rdev of a node
    inode: int = 0
    target: str = ""  # of a link
    untrusted: bool = False  # a folder in which users other than root may make names


class DeviceNode(NamedTuple):
    """A device node that a path leads to."""

    path: str  # below /dev, free of links
    suffix: str  # what follows the name that was resolved: "" or, in a folder, "/controlC0"
    entry: Entry


@dataclass(frozen=True)
class Snapshot:
    """/dev at one moment: every entry by its path below it, and the sorted names of each folder; its own path is ""."""

    entries: Mapping[str, Entry]
    folders: Mapping[str, Sequence[str]]

    def entry(self, path: str) -> Entry | None:
        return self.entries.get(path)

    def names(self, path: str) -> Sequence[str]:
        return self.folders.get(path, ())


def resolve(tree: Tree, path: str, dev_dir: str) -> list[DeviceNode]:
    """The nodes that PATH stands for, sorted: PATH, the node a link leads to in /dev, or all nodes below a folder, in
    which links are not followed. Only root can have made the names on the way and in the folder, so nobody else can
    make PATH lead elsewhere later; and a runtime that walks the folder finds no other nodes. Raises NotADevice."""
    top = _real_path(tree, path, dev_dir)
    if not top:
        raise NotADevice(Reason.LINK_TO_DEV)
    nodes, todo = [], [top]
    while todo:
        here = todo.pop()
        entry = tree.entry(here)
        if entry is None:
            continue
        if entry.kind == MOUNT:
            raise NotADevice(Reason.MOUNT_INSIDE if here != top else Reason.FILE_SYSTEM, path=here)
        if entry.untrusted:
            raise NotADevice(Reason.UNTRUSTED, path=here)
        if entry.kind in NODES:
            nodes.append(DeviceNode(here, here[len(top) :], entry))
        elif entry.kind == FOLDER:
            todo += [f"{here}/{name}" for name in reversed(tree.names(here))]
        elif here == top:
            raise NotADevice(Reason.NOT_A_DEVICE, kind=entry.kind)
    if not nodes:
        raise NotADevice(Reason.EMPTY_FOLDER)
    for name in (path, *(node.path for node in nodes)):
        if re.search("[\ud800-\udfff]", name):  # what os.listdir() makes of a byte that is not UTF-8
            raise NotADevice(Reason.NOT_UTF8, path=name)
    return nodes


def _real_path(tree: Tree, path: str, dev_dir: str) -> str:
    """PATH with its links followed, as path_resolution(7) has it, but inside /dev. Raises NotADevice."""
    todo = path.split("/")[::-1]
    done: list[str] = []
    links = 0
    while todo:
        name = todo.pop()
        if name == ".." and not done:
            raise NotADevice(Reason.LINK_CLIMBS_OUT)
        if name in ("", ".", ".."):
            del done[len(done) - (name == "..") :]
            continue
        folder, here = "/".join(done), "/".join([*done, name])
        entry = tree.entry(here)
        if entry is None:
            raise NotADevice(Reason.LINK_DANGLES, path=here) if links else NotADevice(Reason.GONE)
        parent = tree.entry(folder)
        if parent is None or parent.untrusted:
            raise NotADevice(Reason.UNTRUSTED, path=folder)
        if entry.kind != LINK:
            if todo and entry.kind != FOLDER:
                raise NotADevice(Reason.THROUGH, path=here, kind=entry.kind)
            done.append(name)
            continue
        links += 1
        if links > 40:  # as in path_resolution(7)
            raise NotADevice(Reason.LINK_CIRCLE)
        target = entry.target
        if target.startswith("/"):
            top = next((top for top in (f"{dev_dir}/", "/dev/") if target.startswith(top)), None)
            if top is None:
                raise NotADevice(Reason.LINK_OUT, target=target)
            target, done = target[len(top) :], []
        todo += target.split("/")[::-1]
    return "/".join(done)


def fit(rule: Rule, chains: Iterable[Chain | None]) -> tuple[Values, Values]:
    """The values of the attributes that RULE asks for, and of those in its templates, of a device whose nodes have
    CHAINS, of which one is None while sysfs does not answer. One node must fit: it, or a single one of its parents, has
    all attributes, like ATTRS in udev(7). Templates take values from there, else from the node, else from the nearest
    parent. Raises NotChosen if RULE does not fit, and another NotADevice if only its templates cannot be expanded."""
    if not rule.attributes and not rule.values:
        return {}, {}
    problems: list[NotADevice] = []
    for chain in chains:
        if chain is None:
            kind = NotChosen if rule.attributes else NotADevice
            problems.append(kind(Reason.ATTRIBUTES, why=NO_ATTRIBUTES_YET))
            continue
        chosen = next((folder for folder in chain if all(item.fits(folder) for item in rule.attributes)), None)
        if chosen is None:
            problems.append(_describe_not_chosen(rule.attributes, chain))
            continue
        values: dict[str, str] = {}
        missing = []
        for name in rule.values:
            found = values_of([chosen, *chain], name)
            values.update((name, value) for value in found[:1])
            if not found or len(found[0]) > MAX_VALUE:
                state = f"longer than {MAX_VALUE} characters" if found else "not there"
                missing.append(rf"its {name} is {state} (asked for: \g<attr:{name}>)")
        if not missing:
            return {item.name: chosen[item.name] for item in rule.attributes}, values
        problems.append(NotADevice(Reason.ATTRIBUTES, why="; ".join(missing)))
    raise min(problems, key=lambda each: isinstance(each, NotChosen), default=NotChosen(Reason.NO_ATTRIBUTES))


def _describe_not_chosen(attributes: Iterable[Attribute], chain: Chain) -> NotChosen:
    """What the device with CHAIN has instead of ATTRIBUTES."""
    slow, others = [], []
    for name, match in attributes:
        values = dict.fromkeys(values_of(chain, name))
        for value in filter(match.slow_texts.__contains__, values):
            slow.append(f'{TOOK_TOO_LONG} for its {name}, "{value}": {match.pattern}')
        shown = " or ".join(f'"{value}"' for value in values) or "not there"
        others.append(f"its {name} is {shown} (asked for: {match.pattern})")
    return NotChosen(Reason.PATTERN_TIMEOUT if slow else Reason.ATTRIBUTES, why="; ".join(slow + others))


def describe_device(chains: Sequence[Chain]) -> tuple[tuple[int, ...], Values]:
    """The NUMA nodes that the device whose nodes have CHAINS is close to, and what DRA publishes of it: that on which
    its nodes agree. The driver and the USB device of a node are those of the nearest parent that has one."""
    numa: set[int] = set()
    facts: list[dict[str, str | None]] = []
    for chain in chains:
        known = (int(value) for value in values_of(chain, "numa_node") if value.isdecimal() and value.isascii())
        numa.update([each for each in known if each < 1 << 63][:1])  # NUMANode.ID of the device plugin API is an int64
        usb_device = next((folder for folder in chain if folder.get("idVendor")), {})
        facts.append({"subsystem": chain[0].get("subsystem"), "driver": next(iter(values_of(chain, "driver")), None)})
        facts[-1].update((name, usb_device.get(name)) for name in USB_FACTS)
    first = facts[0] if facts else {}
    agreed = {name: value for name, value in first.items() if value and all(each[name] == value for each in facts)}
    return tuple(sorted(numa)), agreed


def find_changes(chain: Chain, before: Values) -> str:
    """What CHAIN has instead of the values that were there BEFORE, in words; empty if it has them all."""
    nearest = next((folder for folder in chain if not folder.keys().isdisjoint(before)), {})
    shown = {name: f'"{value}"' for name, value in nearest.items()}
    lost = {name: value for name, value in before.items() if value not in values_of(chain, name)}
    return "; ".join(f'its {name} is {shown.get(name, "not there")} and was "{value}"' for name, value in lost.items())


def values_of(chain: Chain, name: str) -> list[str]:
    """The values that the attribute NAME has in the folders of CHAIN that have it."""
    return [folder[name] for folder in chain if name in folder]


def _entry(found: os.stat_result, root: os.stat_result, path: str, target: str = "") -> Entry:
    """What stands at PATH, of which lstat(2) FOUND this, as an Entry. ROOT is the status of /dev itself."""
    kind = _KINDS.get(stat.filemode(found.st_mode)[0], "thing")
    untrusted = False
    if kind == FOLDER:
        kind = FOLDER if found.st_dev == root.st_dev else MOUNT
        untrusted = bool(found.st_mode & stat.S_IWOTH) or found.st_uid not in (0, root.st_uid)
        # With an ACL, the group's bits are its mask: without them, nobody whom it names may write.
        if not untrusted and found.st_mode & stat.S_IWGRP:
            untrusted = found.st_gid not in (0, root.st_gid) or (kind == FOLDER and _acl_lets_write(path, root))
    device = found.st_rdev if kind in NODES else 0
    return Entry(kind, device, found.st_ino, target, untrusted)


def _acl_lets_write(path: str, root: os.stat_result) -> bool:
    """Whether the POSIX ACL of the folder PATH lets a user or a group write that it names, other than root's."""
    try:
        acl = os.getxattr(path, "system.posix_acl_access", follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return False
        raise
    # linux/posix_acl_xattr.h: entries of a tag (2 names a user, 8 a group), permissions (2 is to write) and an ID
    trusted = {2: (0, root.st_uid), 8: (0, root.st_gid)}
    entries = struct.iter_unpack("<HHI", acl[4:])
    return any(permissions & 2 and name not in trusted.get(tag, (name,)) for tag, permissions, name in entries)


class LiveTree(contextlib.AbstractContextManager["LiveTree"]):
    """/dev as it is now, for one use. Each step is one openat(2) with O_PATH and O_NOFOLLOW from a folder that is held
    open: somebody who swaps a name meanwhile makes this fail, but cannot lead it out of /dev. Only a folder and those
    above it are held: there may be more folders than file descriptors. Raises OSError if /dev cannot be read."""

    def __init__(self, dev_dir: str) -> None:
        self._entries: dict[str, Entry | None] = {}
        self._folders = {"": os.open(dev_dir, os.O_PATH | os.O_DIRECTORY)}
        self._root = os.fstat(self._folders[""])
        self._entries[""] = _entry(self._root, self._root, f"{dev_dir}/.")

    def __exit__(self, *_: object) -> None:
        for descriptor in self._folders.values():
            os.close(descriptor)

    def entry(self, path: str) -> Entry | None:
        if path not in self._entries:
            parent = self.entry(path.rpartition("/")[0])
            self._entries[path] = self._open(path) if parent and parent.kind == FOLDER else None
        return self._entries[path]

    def _open(self, path: str) -> Entry | None:
        """What PATH is now; a folder is held from now on. Its parent is a folder."""
        parent, _, name = path.rpartition("/")
        try:
            descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._folder(parent))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return None
            raise
        self._folders[path] = descriptor
        found = os.fstat(descriptor)
        target = os.readlink("", dir_fd=descriptor) if stat.S_ISLNK(found.st_mode) else ""
        entry = _entry(found, self._root, f"/proc/self/fd/{descriptor}/.", target)
        if entry.kind != FOLDER:
            os.close(self._folders.pop(path))
        return entry

    def _folder(self, path: str) -> int:
        """The descriptor of the folder PATH. Those that are neither PATH nor above it are closed."""
        for other in [other for other in self._folders if other and not f"{path}/".startswith(f"{other}/")]:
            os.close(self._folders.pop(other))
        if path not in self._folders and self._open(path) != self._entries[path]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))  # it was swapped since it was seen first
        return self._folders[path]

    def names(self, path: str) -> Sequence[str]:
        return sorted(os.listdir(f"/proc/self/fd/{self._folder(path)}"))


class _Listing(NamedTuple):
    """A folder of /dev as it was last listed."""

    stamp: tuple[int, ...] = ()  # device, inode and times of the folder; () if it could not be listed yet
    settled: bool = False  # whether an equal stamp proves that nothing changed
    entries: Mapping[str, Entry] = {}
    times: Mapping[str, tuple[int, int]] = {}  # Times, where inodes do not tell enough


class Scanner:
    """Looks at /dev again and again, and lists only the folders whose times moved. A node in whose place another one
    was made between two scans is missing in the first one after, and there in the next one: so it went and came back
    for everybody, with new attributes."""

    def __init__(self, dev_dir: str) -> None:
        self._dev_dir = dev_dir
        self._needs_times = True  # because inode numbers are used again, unlike in devtmpfs and tmpfs
        self._listings: dict[str, _Listing] = {}  # by the path of the folder: "" or "snd/"
        self._snapshot = Snapshot({}, {})
        with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as file:
            device = os.stat(dev_dir).st_dev
            mount = f" {os.major(device)}:{os.minor(device)} .* - (devtmpfs|tmpfs) "
            self._needs_times = re.search(mount.encode(), file.read()) is None

    def scan(self, full: bool = False) -> Snapshot:
        """What stands below /dev: the same object until something changes. FULL lists every folder, whatever its times
        say. Raises OSError if /dev itself cannot be seen."""
        root = os.stat(self._dev_dir)
        listings: dict[str, _Listing] = {}
        todo = [""]
        while todo:
            path = todo.pop()
            try:
                found = os.lstat(f"{self._dev_dir}/{path[:-1]}") if path else root
            except OSError:
                continue  # it went since its parent was listed, and the parent's time will tell
            if found.st_dev == root.st_dev and stat.S_ISDIR(found.st_mode):
                listings[path] = self._list(path, found, root, full)
                todo += [f"{path}{name}/" for name, entry in listings[path].entries.items() if entry.kind == FOLDER]
        old, self._listings = self._listings, listings
        if old.keys() != listings.keys() or any(old[path].entries is not listings[path].entries for path in old):
            entries = {"": _entry(root, root, f"{self._dev_dir}/.")}
            for path, listing in listings.items():  # each folder comes after the one that it is in
                if not listing.stamp:
                    entries[path[:-1]] = entries[path[:-1]]._replace(kind="folder that cannot be listed")
                entries.update((path + name, entry) for name, entry in listing.entries.items())
            folders = {path[:-1]: sorted(listing.entries) for path, listing in listings.items()}
            self._snapshot = Snapshot(entries, folders)
        return self._snapshot

    def _list(self, path: str, folder: os.stat_result, root: os.stat_result, full: bool) -> _Listing:
        """The listing of PATH: the last one if it still holds."""
        old = self._listings.get(path, _Listing())
        stamp = (folder.st_dev, folder.st_ino, folder.st_mtime_ns, folder.st_ctime_ns)
        if old.settled and old.stamp == stamp and not full:
            return old
        # Nobody can set st_ctime, unlike st_mtime. One to come is settled, too: the clock was set back since.
        settled = abs(time.time_ns() - folder.st_ctime_ns) > FRESH_NS
        try:
            entries, times = _read_folder(f"{self._dev_dir}/{path[:-1]}", folder, root)
        except OSError:  # too many open files, say: what was seen before still counts
            return old._replace(settled=False)
        for name in old.entries.keys() & times.keys():
            # Where inode numbers are used again, another node has two new times, and its folder has, too. A touch, as
            # udev does it, leaves those of the folder alone.
            is_fresh = not {*times[name]} & {*old.times.get(name, times[name])}
            if entries[name] != old.entries[name] or (self._needs_times and old.stamp != stamp and is_fresh):
                del entries[name], times[name]
                settled = False
        return _Listing(stamp, settled, old.entries if old.stamp and entries == old.entries else entries, times)


def _read_folder(path: str, folder: os.stat_result, root: os.stat_result) -> tuple[dict[str, Entry], Times]:
    """The entries of PATH, and the times of the nodes. Raises OSError, too if PATH is not FOLDER any more."""
    entries, times = {}, {}
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not os.path.samestat(os.fstat(descriptor), folder):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        with os.scandir(descriptor) as items:
            for item in items:
                try:
                    found = item.stat(follow_symlinks=False)
                    target = os.readlink(item.name, dir_fd=descriptor) if stat.S_ISLNK(found.st_mode) else ""
                    entries[item.name] = _entry(found, root, f"{path}/{item.name}", target)
                    if entries[item.name].kind in NODES:
                        times[item.name] = found.st_mtime_ns, found.st_ctime_ns
                except OSError as error:
                    if error.errno in SCARCE:
                        raise
                    # It went meanwhile, or it is a mount whose server has ended: the other names count nevertheless.
    finally:
        os.close(descriptor)
    return entries, times


class Sysfs:
    """The chains of the nodes that rules name, read when a node appears and at each full scan. A driver may add
    attributes later, so those of nodes that a rule does not fit are read again for ATTRIBUTE_WAIT_SECONDS. A driver
    that blocks its readers delays refresh() by SYSFS_SECONDS, and many of them by little more than twice as much. Their
    chains stay as they were, and what comes late is taken by a later refresh()."""

    ATTRIBUTE_WAIT_SECONDS = 5.0
    MIN_SECONDS = 0.02  # for one read, after others took too long
    MAX_HANGING = 64  # reads, each of which keeps a thread

    def __init__(self, sys_dir: str, with_facts: bool = False) -> None:
        self.chains: dict[Entry, Chain] = {}  # by node; one that is missing has not been answered yet
        self._sys_dir = sys_dir
        self._always: Names = ("numa_node", *(("subsystem", "driver", *USB_FACTS) if with_facts else ()))
        self._wanted: Mapping[Entry, Names] = {}
        self._appeared: dict[Entry, float] = {}  # time.monotonic() when a node was wanted first
        self._unread: set[Entry] = set()  # nodes that sysfs did not answer for in time
        self._reads: dict[tuple[Entry, Names], concurrent.futures.Future[Chain]] = {}  # that took too long

    def refresh(self, wanted: Mapping[Entry, Names], unfit: Iterable[Entry], everything: bool) -> bool:
        """Read the attributes that are WANTED of nodes: of those not known yet, of UNFIT ones that are new, and of all
        if EVERYTHING. Returns whether a chain has changed."""
        now = time.monotonic()
        if wanted is not self._wanted:
            old = self._wanted
            self.chains = {node: chain for node, chain in self.chains.items() if wanted.get(node) == old[node]}
            self._reads = {key: read for key, read in self._reads.items() if not read.done() or key[0] in wanted}
            self._appeared = {node: self._appeared.get(node, now) for node in wanted}
            self._wanted = wanted
        again = {node for node in unfit if now - self._appeared.get(node, -math.inf) < self.ATTRIBUTE_WAIT_SECONDS}
        again |= self._unread
        if not everything and not again and len(self.chains) == len(wanted):
            return False
        has_changed, self._unread = False, set()
        patience = 2 * SYSFS_SECONDS  # for reads that take too long
        for node, names in wanted.items():
            if node in self.chains and node not in again and not (everything and names):
                continue
            began = time.monotonic()
            chain = self._read(node, (*self._always, *names), min(max(patience, self.MIN_SECONDS), SYSFS_SECONDS))
            if chain is None:
                self._unread.add(node)
                patience -= time.monotonic() - began
            else:
                has_changed |= chain != self.chains.get(node)
                self.chains[node] = chain
        return has_changed

    def _read(self, node: Entry, names: Names, seconds: float) -> Chain | None:
        """The chain of NODE's device with NAMES; None without an answer in SECONDS, or without means to read it."""
        read = self._reads.pop((node, names), None)
        try:
            if names == ("numa_node",):  # the kernel's own attribute, with which no driver can block a reader
                return read_chain(self._sys_dir, node, names)
            if read is None and len(self._reads) < self.MAX_HANGING:
                read = start_read(lambda: read_chain(self._sys_dir, node, names))
                concurrent.futures.wait([read], seconds)
            if read is not None and not read.done():
                self._reads[node, names] = read
            return read.result() if read and read.done() else None
        except (OSError, RuntimeError):
            return None

    def tegra_gpus(self) -> list[str]:
        """The names of the GPUs that a Tegra board has as platform devices. Raises OSError as read_chain() does."""
        found: set[str] = set()
        for folder in ("devices", "devices/platform"):
            try:
                names = os.listdir(f"{self._sys_dir}/{folder}")
            except OSError as error:
                if error.errno in SCARCE:
                    raise
                names = []  # no sysfs here, or not that kind of board
            found.update(f"{TEGRA}{name[4:]}" for name in names if re.fullmatch(r"gpu\.[0-9]+", name))
        return sorted(found)


def start_read(job: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Start JOB, a read that can block for ever, as a driver can do it in sysfs, on a thread of its own. Raises
    RuntimeError if there can be no more threads."""
    read: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            read.set_result(job())
        except Exception as error:
            read.set_exception(error)

    threading.Thread(target=run, name="sysfs", daemon=True).start()
    return read


def read_chain(sys_dir: str, node: Entry, names: Iterable[str]) -> Chain:
    """The attributes NAMES of NODE's device. Raises OSError for lack of file descriptors or memory."""
    found = ({name: read_attribute(folder, name) for name in names} for folder in sysfs_folders(sys_dir, node))
    return [{name: value for name, value in values.items() if value is not None} for values in found]


def sysfs_folders(sys_dir: str, node: Entry) -> Iterator[str]:
    """The folders in sysfs of NODE's device and its parents, the device's own first."""
    kind = "char" if node.kind == CHAR else "block"
    top = os.path.realpath(f"{sys_dir}/devices")
    folder = os.path.realpath(f"{sys_dir}/dev/{kind}/{os.major(node.device)}:{os.minor(node.device)}")
    yield folder
    while folder.startswith(top + "/") and os.path.dirname(folder) != top:
        folder = os.path.dirname(folder)
        yield folder


def read_attribute(folder: str, name: str) -> str | None:
    """The value of the attribute NAME in the sysfs FOLDER; None if it cannot be read. The value of a link (driver,
    subsystem) is the last part of its target, as in udev. Raises OSError for lack of file descriptors or memory."""
    path = f"{folder}/{name}"
    with contextlib.suppress(OSError):  # no link, or gone meanwhile
        return os.path.basename(os.readlink(path))
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            return os.read(file.fileno(), 4096).decode("utf-8", "backslashreplace").rstrip()
    except OSError as error:
        if error.errno in SCARCE:
            raise
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Plan: from rules, the contents of /dev and what sysfs says to resources by name. Immutable data and pure functions,
# apart from Matcher, which remembers its searches. A device that is gone stays in the plan, Unhealthy, for
# EXPIRY_SECONDS; then its offer ends. A name, an ID or an order that changes here costs pods.
# ---------------------------------------------------------------------------------------------------------------------

EXPIRY_SECONDS = 600.0  # a device that is gone for longer is no longer offered
MAX_SHOWN = 200  # characters of an unknown ID in a message
MAX_LIST_BYTES = 4 << 20  # of a ListAndWatchResponse: gRPC's own limit for a message, which the kubelet leaves as it is
SLOT_BYTES, NUMA_BYTES = 26, 12  # of a slot in it at most, without its path and NUMA nodes; and of a NUMA node


class DeviceSpec(NamedTuple):
    """What a container is given: DeviceSpec of the device plugin API. The kubelet keeps it for the life of the pod, and
    the container runtime resolves the host path at every start. So that is the path that the rule matched, even a link
    or a folder: it still leads to the same device after a replug. Of a folder, the runtime passes all nodes only."""

    host: str
    container: str
    permissions: str
    nodes: tuple[tuple[str, str], ...]  # the nodes at this moment: (path on the host, path in the container)


class Part(NamedTuple):
    """A path below /dev that belongs to a device, and its path in a container."""

    path: str
    container: str
    optional: bool
    permissions: str


@dataclass(frozen=True)
class Device:
    """A device that a resource offers."""

    path: str  # as matched, below /dev
    line: int  # of the rule that it follows
    is_pool: bool  # whether that rule names the resource
    slots: int
    nodes: tuple[DeviceNode, ...]  # as last seen under its rule; a Tegra GPU has none
    chosen_by: Values  # the attributes by which the rule chose it, or named its resource; none if its path alone did
    values: Values  # of the attributes in its rule's templates
    since: float  # time.monotonic() since when it is there, or gone, or has a problem
    problem: str = ""  # why it is Unhealthy, and not given to new pods; empty: it is Healthy
    is_gone: bool = False  # no node is at its path, or another one than the rule chose
    parts: tuple[Part, ...] = ()  # the device itself first, then its companions; a Tegra GPU has none
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    numa: tuple[int, ...] = ()  # the NUMA nodes that it is close to
    facts: Values = dataclasses.field(default_factory=dict)  # what sysfs says about it, for DRA
    specs: tuple[DeviceSpec, ...] = ()  # what a container is given at a start now; empty if it may not start

    def has_nodes(self, nodes: Sequence[DeviceNode]) -> bool:
        """Whether NODES are its own, and not others that came to stand at its path."""
        now, before = ([(node.entry.device, node.entry.inode) for node in each] for each in (nodes, self.nodes))
        return now == before


@dataclass(frozen=True)
class Resource:
    """A resource as the kubelet sees it: one device under a name made from its path, or a pool that a rule names."""

    name: str  # without the domain
    pool: bool
    devices: tuple[Device, ...]


class Slot(NamedTuple):
    """A slot: a Device of the device plugin API, and of a ResourceSlice."""

    resource: Resource
    device: Device  # of the resource
    number: int

    @property
    def id(self) -> str:
        """Its ID in the device plugin API, which follows from paths alone: so it means the same device tomorrow."""
        return f"{self.device.path}:{self.number}" if self.resource.pool else str(self.number)


class LeftOut(NamedTuple):
    """A path that a rule names but that is not offered under that rule, and why."""

    path: str
    line: int
    reason: Reason
    text: str  # of the reason


@dataclass(frozen=True)
class Plan:
    """What to offer, and what is left out."""

    resources: Mapping[str, Resource]
    left_out: tuple[LeftOut, ...]
    unused: tuple[Rule, ...]  # rules that matched nothing


EMPTY_PLAN = Plan({}, (), ())
Named = Sequence[tuple[Rule, Union[re.Match[str], SearchTimeout]]]


class Matcher:
    """Which of RULES name a path, the last rule first; among them those whose search took too long to tell. The answers
    are remembered, because the names in /dev hardly change. For the main thread only."""

    MAX_REMEMBERED = 1 << 14  # names

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = rules
        self.find = functools.lru_cache(self.MAX_REMEMBERED)(self._find)

    def _find(self, path: str) -> Named:
        """The rules that name PATH, which is below /dev, or is the name of a Tegra's GPU."""
        is_gpu = re.fullmatch(f"{TEGRA}[0-9]+", path)
        rules = [rule for rule in reversed(self.rules) if rule.pattern == TEGRA or not is_gpu]
        pairs = zip(rules, search_all([rule.match for rule in rules], path))
        return tuple((rule, match) for rule, match in pairs if match)


@dataclass(frozen=True)
class Look:
    """What rules name in /dev at one moment, and what sysfs says about it."""

    snapshot: Snapshot
    matcher: Matcher
    dev_dir: str
    devices: Mapping[str, tuple[DeviceNode, ...]]  # nodes by path; a Tegra GPU has none
    problems: Mapping[str, NotADevice]  # why other paths that rules name lead to no device
    wanted: Mapping[Entry, Names]  # of each node: attributes that rules ask for, or use in templates
    chains: Mapping[Entry, Chain] = dataclasses.field(default_factory=dict)  # of the nodes, if sysfs has answered yet
    now: float = 0.0  # time.monotonic() of that


def find_devices(snapshot: Snapshot, gpus: Iterable[str], matcher: Matcher, dev_dir: str) -> Look:
    """The devices that rules name. GPUS are the names of a Tegra's GPUs."""
    devices: dict[str, tuple[DeviceNode, ...]] = {}
    problems: dict[str, NotADevice] = {}
    wanted: dict[Entry, Names] = {}
    for path in snapshot.entries:
        rules = [rule for rule, _ in matcher.find(path)] if path else []
        if not rules or rules[0].pattern == TEGRA:
            continue
        try:
            devices[path] = tuple(resolve(snapshot, path, dev_dir))
        except NotADevice as error:
            problems[path] = error
            continue
        names = {name for rule in rules for name in (*(one.name for one in rule.attributes), *rule.values)}
        for node in devices[path]:
            wanted[node.entry] = tuple(sorted(names.union(wanted.get(node.entry, ()))))
    devices.update((name, ()) for name in gpus if matcher.find(name))
    return Look(snapshot, matcher, dev_dir, devices, problems, wanted)


def expiry_times(plan: Plan) -> Iterator[float]:
    """When the offer ends for each device of PLAN that is gone."""
    return (device.since + EXPIRY_SECONDS for device in devices_of(plan) if device.is_gone)


def devices_of(plan: Plan) -> Iterator[Device]:
    """The devices of all resources of PLAN."""
    return (device for resource in plan.resources.values() for device in resource.devices)


def make_plan(previous: Plan, look: Look) -> Plan:
    """The plan that what LOOK found makes under its rules, each path under the last rule that it fits. A device that
    PREVIOUS offers keeps its name, which no newcomer takes over. And it stays as it was last good, with a problem: for
    EXPIRY_SECONDS if it is gone, and while its node is there if that has changed so that no rule chooses it."""
    errors = [(path, look.matcher.find(path)[0][0].line, error) for path, error in look.problems.items()]
    offered: dict[str, dict[str, Device]] = {}  # by resource and path
    for path, nodes in look.devices.items():
        for rule, match in look.matcher.find(path):
            try:
                if isinstance(match, SearchTimeout):
                    raise NotChosen(Reason.PATTERN_TIMEOUT, why=f"{TOOK_TOO_LONG} in this name: {rule.pattern}")
                found = fit(rule, [look.chains.get(node.entry) for node in nodes])
                name, device = make_device(path, nodes, rule, match, found, look)
                offered.setdefault(name, {})[path] = device
                break
            except NotADevice as error:
                errors.append((path, rule.line, error))
                if not isinstance(error, NotChosen):
                    break
    kept = _keep(previous, look, offered)
    errors = [each for each in errors if each[0] not in kept]
    resources: dict[str, Resource] = {}
    for name in sorted(offered):
        before = previous.resources.get(name)
        old = {device.path: device for device in before.devices} if before else {}
        devices = []
        for path, device in sorted(offered[name].items()):
            was = old.get(path, device)
            is_as_it_was = (bool(was.problem), was.is_gone) == (bool(device.problem), device.is_gone)
            devices.append(dataclasses.replace(device, since=was.since if is_as_it_was else look.now))
        winners, losers = choose_devices(name, devices, before)
        errors += losers
        if winners:
            resources[name] = Resource(name, winners[0].is_pool, tuple(winners))
    used = {id(rule) for path in (*look.devices, *look.problems, *kept) for rule, _ in look.matcher.find(path)}
    unused = tuple(rule for rule in look.matcher.rules if id(rule) not in used)
    left_out = [LeftOut(path, line, error.reason, str(error)) for path, line, error in errors]
    return Plan(resources, tuple(sorted(left_out, key=lambda left: (left.path, left.line, left.text))), unused)


def _keep(previous: Plan, look: Look, offered: dict[str, dict[str, Device]]) -> set[str]:
    """Add to OFFERED the devices of PREVIOUS that stay though no rule chooses what is at their paths; these paths."""
    all_kept = set()
    for old_name, old in ((name, device) for name, each in previous.resources.items() for device in each.devices):
        if old.path in offered.get(old_name, {}):
            continue
        problem, is_gone = _find_loss(old, look)
        since = old.since if old.is_gone else look.now
        if not problem or (is_gone and look.now - since >= EXPIRY_SECONDS):
            continue
        for rule, match in look.matcher.find(old.path):
            is_chosen = old.values.keys() >= {*rule.values} and all(one.fits(old.chosen_by) for one in rule.attributes)
            if isinstance(match, SearchTimeout) or not is_chosen:
                continue
            try:
                name, new = make_device(old.path, old.nodes, rule, match, (old.chosen_by, old.values), look)
            except NotADevice:
                continue  # the rule was edited, and its path in a container or its resource's name is no longer good
            new = dataclasses.replace(new, problem=problem, is_gone=is_gone, numa=old.numa, facts=old.facts)
            kept = dataclasses.replace(new, since=since, specs=() if is_gone else new.specs)
            if old.path not in offered.get(name, {}):
                offered.setdefault(name, {})[old.path] = kept
                all_kept.add(old.path)
            break
    return all_kept


def _find_loss(device: Device, look: Look) -> tuple[str, bool]:
    """Why DEVICE is not as its rule chose it, empty if it is or its path alone chose it; and whether it is gone."""
    nodes = look.devices.get(device.path)
    if nodes is None:
        return str(look.problems.get(device.path, NotADevice(Reason.GONE))), True
    if not device.chosen_by:
        return "", False
    is_gone = device.is_gone or not device.has_nodes(nodes)
    known = [look.chains.get(node.entry) for node in nodes]
    changes = [NO_ATTRIBUTES_YET if chain is None else find_changes(chain, device.chosen_by) for chain in known]
    problem = "" if "" in changes else next(iter(changes), "")
    return problem or (Reason.SWAPPED.template if is_gone else ""), is_gone


def choose_devices(
    name: str, devices: Sequence[Device], previous: Resource | None
) -> tuple[Sequence[Device], list[tuple[str, int, NotADevice]]]:
    """The DEVICES, in the order of their paths, that get the name NAME; and path, line and problem of those left out,
    but not of those that are gone. A device that has the name keeps it while it is offered. Otherwise a pool comes
    first, then the path that equals the name, then the first path. A pool has each node once, as the first path that
    leads to it; and no more devices than its list has room for, where those that PREVIOUS has come first."""
    holder = previous.devices[0].path if previous and not previous.pool else ""
    pool = [device for device in devices if device.is_pool]
    own = [device for device in devices if not device.is_pool]
    own.sort(key=lambda device: (device.path != holder, device.is_gone, device.path != name, device.path))
    if pool and not (own and own[0].path == holder):
        winners, taken = pool, NotADevice(Reason.NAME_OF_POOL, name=name, line=pool[0].line)
    else:
        winners, pool, taken = own[:1], [], NotADevice(Reason.NAME_TAKEN, name=name, path=own[0].path)
    paths = {device.path for device in winners}
    errors = {device.path: taken for device in devices if device.path not in paths and not device.is_gone}
    owners: dict[str, str] = {}  # paths of devices, by node
    for device in pool:
        nodes = [] if device.is_gone else [node.path for node in device.nodes]
        path = next((owners[node] for node in nodes if node in owners), None)
        if path is None:
            owners.update(dict.fromkeys(nodes, device.path))
        else:
            errors[device.path] = NotADevice(Reason.SAME_NODE, path=path)
    offered = {device.path for device in previous.devices} if previous else set()
    room = MAX_LIST_BYTES
    listed = (device for device in pool if device.path not in errors)
    for device in sorted(listed, key=lambda device: device.path not in offered):
        size = device.slots * (len(device.path.encode()) + SLOT_BYTES + NUMA_BYTES * len(device.numa))
        if size > room:
            errors[device.path] = NotADevice(Reason.LIST_TOO_LONG, limit=MAX_LIST_BYTES)
        else:
            room -= size
    left_out = [(device.path, device.line, errors[device.path]) for device in devices if device.path in errors]
    return [device for device in winners if device.path not in errors], left_out


def make_device(
    path: str, nodes: tuple[DeviceNode, ...], rule: Rule, match: re.Match[str], found: tuple[Values, Values], look: Look
) -> tuple[str, Device]:
    """The name of its resource and the device with NODES at PATH, which RULE fits as FOUND by fit(). Raises
    NotADevice if it has no name, or one of its paths in a container is not a good one."""
    held, values = found
    name = resource_name(expand(rule.resource, match, values) if rule.resource else path)
    if not name:
        raise NotADevice(Reason.NO_NAME)
    naming = {attribute: value for attribute, value in values.items() if rf"\g<attr:{attribute}>" in rule.resource}
    env = {"NVIDIA_VISIBLE_DEVICES": match[1]} if rule.pattern == TEGRA else {}
    env.update((name, expand(template, match, values)) for name, template in rule.env)
    numa, facts = describe_device([look.chains.get(node.entry, [{}]) for node in nodes])
    parts = tuple(_parts(path, rule, match, values))
    device = Device(path, rule.line, bool(rule.resource), rule.slots, nodes, {**held, **naming}, values, look.now)
    device = dataclasses.replace(device, parts=parts, env=env, numa=numa, facts=facts)
    try:
        return name, dataclasses.replace(device, specs=tuple(specs_of(device, look.snapshot, look.dev_dir)))
    except NotADevice as error:
        return name, dataclasses.replace(device, problem=str(error))


def _parts(path: str, rule: Rule, match: re.Match[str], values: Values) -> Iterator[Part]:
    """PATH, unless it is a Tegra's GPU, and its companions. Raises NotADevice for a bad path in a container."""
    container = expand(rule.containerpath, match, values) if rule.containerpath else f"/dev/{path}"
    folder = container if container.endswith("/") else ""
    parts = [Part(path, container, False, rule.permissions)]
    for item in rule.companions:
        other = expand(item.template, match, values)
        place = expand(item.containerpath, match, values) or folder or f"/dev/{other}"
        parts.append(Part(other, place, item.optional, item.permissions or rule.permissions))
    for part in parts:
        name = part.path.rpartition("/")[2] if part.container.endswith("/") else ""
        place = re.sub("/+", "/", part.container + name)
        if {"", ".", ".."} & set(place.split("/")[2:]):
            raise NotADevice(Reason.CONTAINER_PATH, path=place)
        if part.path != path or rule.pattern != TEGRA:
            yield part._replace(container=place)


def specs_of(device: Device, tree: Tree, dev_dir: str) -> list[DeviceSpec]:
    """What a container with DEVICE is given, according to TREE. Raises NotADevice, which names what is missing."""
    specs: list[DeviceSpec] = []
    given: dict[str, str] = {}
    for part in device.parts:
        try:
            nodes = resolve(tree, part.path, dev_dir)
        except NotADevice as error:
            if part.optional:
                continue
            if part.path == device.path:
                raise
            raise NotADevice(Reason.COMPANION, path=part.path, why=error) from None
        if part.path == device.path and device.chosen_by and not device.has_nodes(nodes):
            raise NotADevice(Reason.SWAPPED)
        places = tuple((f"/dev/{node.path}", part.container + node.suffix) for node in nodes)
        _add_spec(specs, given, DeviceSpec(f"/dev/{part.path}", part.container, part.permissions, places))
    return specs


def _add_spec(specs: list[DeviceSpec], given: dict[str, str], spec: DeviceSpec) -> None:
    """Add SPEC to SPECS unless all its nodes are GIVEN (host paths by path in the container). Raises NotADevice if two
    nodes, or two folders, would have the same path in the container."""
    for host, container in spec.nodes:
        if given.get(container, host) != host:
            raise NotADevice(Reason.SAME_PLACE, one=given[container], other=host, path=container)
    if all(container in given for _, container in spec.nodes):
        return
    for other in specs:
        if other.container == spec.container:  # the kubelet would drop the second one
            raise NotADevice(Reason.SAME_PLACE, one=other.host, other=spec.host, path=spec.container)
    specs.append(spec)
    given.update((container, host) for host, container in spec.nodes)


def find_shared(plan: Plan) -> Mapping[str, Sequence[tuple[str, Device]]]:
    """The nodes that PLAN offers under several resources, with these resources' names and devices. A pool has each of
    its nodes once. Nodes of companions do not count, because these are for several devices in many cases."""
    offers: dict[str, list[tuple[str, Device]]] = {}
    for name, resource in plan.resources.items():
        for device in resource.devices:
            own = [spec for spec in device.specs if spec.host == f"/dev/{device.path}" and device.slots]
            for node, _ in (node for spec in own for node in spec.nodes):
                offers.setdefault(node, []).append((name, device))
    return {node: found for node, found in sorted(offers.items()) if len(found) > 1}


def describe_shared(plan: Plan) -> Mapping[str, Sequence[str]]:
    """Sentences on the nodes that PLAN offers under several resources, each with those that it is about."""
    nodes: dict[str, list[str]] = {}
    for node, offers in find_shared(plan).items():
        lines = sorted({device.line for _, device in offers})
        where = f"line{'s' * (len(lines) > 1)} {', '.join(map(str, lines))}"
        sentence = f"several resources offer it ({where}), so several pods can have it at once"
        nodes.setdefault(sentence, []).append(node)
    return nodes


def device_path(device: Device) -> str:
    """The full path of DEVICE, such as /dev/video0; of a Tegra GPU, which has no node, its name."""
    return f"/dev/{device.path}" if device.nodes else device.path


def slots_of(resource: Resource) -> tuple[Slot, ...]:
    """Every slot of RESOURCE."""
    return tuple(Slot(resource, device, number) for device in resource.devices for number in range(device.slots))


def named_slots(resource: Resource, slot_ids: Iterable[str]) -> Iterator[tuple[str, Slot | None]]:
    """Each of SLOT_IDS once, with the slot of RESOURCE that it names; None if it names none. The number may be too high
    by now, because the device had more slots when the ID was allocated."""
    devices = {device.path if resource.pool else "": device for device in resource.devices}
    for slot_id in dict.fromkeys(slot_ids):
        path, _, number = slot_id.rpartition(":")
        is_known = path in devices and re.fullmatch("[0-9]{1,5}", number)
        slot = Slot(resource, devices[path], int(number)) if is_known else None
        yield slot_id, slot if slot and slot.id == slot_id else None


class AllocationError(Exception):
    """An Allocate that cannot be granted: the name of a gRPC status code, and a text that reaches the pod's events."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class ContainerAllocation(NamedTuple):
    """What one container is given: ContainerAllocateResponse of the device plugin API."""

    specs: tuple[DeviceSpec, ...]
    env: Mapping[str, str]


def allocate(resource: Resource, slot_ids: Iterable[str], tree: Tree, dev_dir: str) -> ContainerAllocation:
    """What a container is given for SLOT_IDS of RESOURCE, according to TREE. Raises AllocationError."""
    chosen: dict[str, Device] = {}
    for slot_id, slot in named_slots(resource, slot_ids):
        if slot is None or slot.number >= slot.device.slots:
            raise AllocationError("INVALID_ARGUMENT", f'no device ID "{slot_id[:MAX_SHOWN]}"')
        chosen[slot.device.path] = slot.device
    specs: list[DeviceSpec] = []
    given: dict[str, str] = {}
    env: dict[str, dict[str, None]] = {}  # values in order, each once
    for path, device in sorted(chosen.items()):
        if device.problem and (device.chosen_by or not device.nodes):
            raise AllocationError("UNAVAILABLE", f"{device_path(device)}: {device.problem}")
        code, place = "UNAVAILABLE", f"/dev/{path}: "
        try:
            found = specs_of(device, tree, dev_dir)
            code, place = "FAILED_PRECONDITION", ""  # each could be given alone
            for spec in found:
                _add_spec(specs, given, spec)
        except NotADevice as error:
            raise AllocationError(code, f"{place}{error}") from None
        for name, value in device.env.items():
            env.setdefault(name, {})[value] = None
    return ContainerAllocation(tuple(specs), {name: ",".join(values) for name, values in env.items()})


def preferred_allocation(resource: Resource, available: Iterable[str], must: Iterable[str], size: int) -> list[str]:
    """SIZE of the AVAILABLE IDs of a pool, those in MUST first: on as many different devices as possible, and on those
    with the fewest slots in use first."""
    preferred = list(must)
    kept = set(preferred)
    free = set(available) - kept
    ranked = []
    for device in resource.devices:
        ids = [Slot(resource, device, number).id for number in range(device.slots)]
        chosen = sum(slot_id in kept for slot_id in ids)
        left = [slot_id for slot_id in ids if slot_id in free]
        in_use = device.slots - chosen - len(left)
        ranked += [(chosen + more, in_use, device.path, slot_id) for more, slot_id in enumerate(left)]
    return preferred + [slot_id for *_, slot_id in sorted(ranked)[: max(size - len(preferred), 0)]]


# ---------------------------------------------------------------------------------------------------------------------
# Log and problems: one line per event, as text or as JSON; and what is wrong now. Programs rely on the names of events
# and fields, which must stay; the sentences may be improved at any time. Whoever logs never waits for a reader.
# ---------------------------------------------------------------------------------------------------------------------

MAX_NAMES = 8  # of devices or resources in one line
MAX_MESSAGE = 4000  # characters of a sentence, and of a line of a traceback
MAX_TEXT = 300  # characters of a text from outside: an Allocate may name thousands of IDs

Document = dict[str, Any]  # what json.dumps() takes

log_counts = types.SimpleNamespace(dropped_lines=0, internal_errors=0)  # since the process started
log = logging.getLogger("smarter-device-manager")


class Problem(Exception):
    """Something that a person can fix. The text is one sentence that says what is wrong, where, and what to do."""


def log_event(event: str, sentence: str, level: int = logging.INFO, **fields: object) -> None:
    """Log an EVENT: a SENTENCE for people, and FIELDS for programs."""
    log.log(level, sentence, extra={"event": event, "fields": fields})


def log_event_for_all(event: str, sentence: str, level: int, key: str, names: Sequence[str]) -> None:
    """Log an EVENT that is the same for all NAMES; they are the value of the field KEY."""
    who = names[0] if len(names) == 1 else f"{len(names)} {key}"
    log_event(event, f"{who}: {sentence}", level, **{key: join_names(names)})


def log_internal_error(sentence: str) -> None:
    """Log and count an unexpected exception, the one being handled; SENTENCE says what failed."""
    log_counts.internal_errors += 1
    log.critical("%s; this is a bug", sentence, exc_info=True, extra={"event": "internal-error"})


class Problems:
    """What is wrong now, by subject: each change is logged once, and the document of Status shows it. A subject is one
    thread's. Resources are the gRPC thread's; equal events of several of them are logged as one."""

    GROUP_SECONDS, MAX_GROUP_SECONDS = 0.2, 2.0  # after the last and the first of equal events, they are logged
    MAX_SUBJECTS = 5_000  # of more, the oldest are forgotten; the kubelet names some

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._groups: dict[tuple[str, str, int], set[str]] = {}  # resources by event, sentence and level
        self._due = 0.0  # when the groups are logged, at the latest
        self._timer: asyncio.TimerHandle | None = None

    def get(self, subject: str) -> str:
        """What is wrong with SUBJECT; empty if nothing is."""
        return self._texts.get(subject, "")

    def set(self, subject: str, text: str, event: str = "", level: int = logging.WARNING, **fields: str) -> bool:
        """From now on, TEXT is wrong with SUBJECT, or nothing if it is empty. Whether that is a change; a change for
        the worse is logged as EVENT, if one is given."""
        has_changed = self._texts.pop(subject, "") != text
        if text:
            self._texts[subject] = text
        if len(self._texts) > self.MAX_SUBJECTS:
            oldest, *_ = self._texts
            self._texts.pop(oldest, None)  # the other thread may have done so
        if has_changed and text and event:
            log_event(event, text, level, **fields)
        return has_changed

    def set_of_resource(self, name: str, text: str, event: str, level: int = logging.WARNING) -> None:
        """From now on, TEXT is wrong with the resource NAME. A change is logged as EVENT, with equal ones of others."""
        if self.set(name, text):
            self.log_soon(event, text, level, name)

    def log_soon(self, event: str, sentence: str, level: int, name: str) -> None:
        """Log EVENT of the resource NAME, together with equal events of others at about the same time."""
        loop = asyncio.get_running_loop()
        if self._timer:
            self._timer.cancel()
        if not self._groups:
            self._due = loop.time() + self.MAX_GROUP_SECONDS
        self._timer = loop.call_at(min(loop.time() + self.GROUP_SECONDS, self._due), self.flush)
        self._groups.setdefault((event, sentence, level), set()).add(name)

    def flush(self) -> None:
        """Log the events that are still waiting for equal ones."""
        for (event, sentence, level), names in self._groups.items():
            log_event_for_all(event, sentence, level, "resources", sorted(names))
        self._groups.clear()


board = Problems()


def join_names(names: Sequence[str]) -> str:
    """The first MAX_NAMES of NAMES, as the value of a field."""
    return ",".join(names[:MAX_NAMES]) + (",..." if len(names) > MAX_NAMES else "")


class EventFormatter(logging.Formatter):
    """One line per event: a JSON object if IS_JSON, else time, level, sentence, key=value, and below that a traceback.
    Only fields have a "=" between two words; in texts from outside, such as a value in sysfs, it is escaped."""

    def __init__(self, is_json: bool) -> None:
        super().__init__()
        self._is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        event = event_of(record)
        text = self.formatException(record.exc_info) if record.exc_info else ""
        traceback = [truncate(printable(line), MAX_MESSAGE) for line in text.splitlines()[-100:]]
        if self._is_json:
            return json.dumps({**event, **({"traceback": "\n".join(traceback)} if traceback else {})})
        message = re.sub(r"(?<=\w)=(?=[^\s,])", r"\\x3d", truncate(printable(event["message"]), MAX_MESSAGE))
        pairs = [f"{key}={self._quote(str(value))}" for key, value in getattr(record, "fields", {}).items()]
        return "\n  ".join([" ".join([event["time"], record.levelname, message, *pairs]), *traceback])

    def _quote(self, text: str) -> str:
        return text if re.fullmatch("[!#-<>-~]+", text) else json.dumps(text).replace("=", r"\u003d")


def event_of(record: logging.LogRecord) -> Document:
    """RECORD as a JSON document."""
    return {
        "time": utc(record.created),
        "level": record.levelname.lower(),
        "event": getattr(record, "event", "log"),
        "message": truncate(record.getMessage(), MAX_MESSAGE),
        **getattr(record, "fields", {}),
    }


class LogWriter(logging.Handler):
    """Writes lines to stderr on a thread of its own, which ends with the process, because a write may wait for ever.
    Lines that do not fit into its queue, or that cannot be written, are dropped and counted."""

    MAX_LINES = 1000  # that are not written yet
    FLUSH_SECONDS = 0.3  # to write the last lines when the process ends

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str] = queue.Queue(self.MAX_LINES)
        self._descriptor = sys.stderr.fileno() if sys.stderr else -1  # if it is closed, another file may be number 2
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        self.put(self.format(record))

    def put(self, line: str) -> None:
        """Have LINE written."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            log_counts.dropped_lines += 1

    def flush(self) -> None:
        """Wait until all lines are written, but no longer than FLUSH_SECONDS. Python calls this when it exits."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, self.FLUSH_SECONDS)

    def _run(self) -> None:
        reported = 0
        while True:
            data = f"{self._lines.get()}\n".encode("utf-8", "backslashreplace")
            while data:
                try:  # not sys.stderr.write(): while it waits, it holds a lock that Python needs in order to exit
                    data = data[os.write(self._descriptor, data) :]
                except BlockingIOError:  # another process made it non-blocking
                    select.select([], [self._descriptor], [])
                except OSError:
                    log_counts.dropped_lines += 1
                    break
            else:
                dropped = log_counts.dropped_lines - reported
                if dropped and self._lines.qsize() <= self.MAX_LINES // 2:
                    reported += dropped
                    sentence = f"dropped {pluralize(dropped, 'line')} of the log, because nobody read it"
                    log_event("log-lines-dropped", sentence, logging.ERROR, lines=dropped)
            self._lines.task_done()


def utc(seconds: float) -> str:
    """SECONDS since the epoch as a date and time in UTC, by ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


def pluralize(number: int, noun: str) -> str:
    """NUMBER and NOUN, as in "1 slot" and "2 slots"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def truncate(text: str, limit: int) -> str:
    """TEXT; of a longer one, the first LIMIT characters and three dots."""
    return text if len(text) <= limit else text[:limit] + "..."


def printable(text: str) -> str:
    """TEXT with an escape for each character that a terminal does not show, or that cannot be encoded."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class EventRing(logging.Handler):
    """Keeps the last 100 events as documents, the newest first. New ones replace the sequence; they never change it."""

    events: Sequence[Document] = ()

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "event"):
            fields = event_of(record).items()
            event = {key: value if type(value) is int else truncate(str(value), MAX_TEXT) for key, value in fields}
            self.events = (event, *self.events[:99])


def is_unexpected_by_grpc(record: logging.LogRecord) -> bool:
    """A filter for grpc's loggers: neither bytes that are not a message nor a client that goes while grpc sends it the
    end of a call (ExecuteBatchError) is a bug of ours, or needs a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    name = type(error).__name__
    if name == "DecodeError":
        log.warning("a client or the kubelet sent bytes that are not a valid protobuf message: %s", error)
    return name not in ("DecodeError", "ExecuteBatchError")


# ---------------------------------------------------------------------------------------------------------------------
# Device side: the main thread reads the config file and looks at /dev once per --interval, and at once when the kernel
# signals a change in a folder of /dev. Each change makes a new plan. What the daemon keeps for its next start is in
# files; those of an older version are ignored if they have another form.
# ---------------------------------------------------------------------------------------------------------------------

DEFAULT_CONF_NAME = "the built-in default rules"
WITHOUT_CONF = f"no config file is given, so {DEFAULT_CONF_NAME} are used; --conf FILE names one"
FOLDER_SIGNAL = signal.SIGURG  # of a change in a folder of /dev; it is pending only once, and ignored by default
MAX_WATCHED = 64  # folders of /dev, each of which takes a file descriptor
FULL_SCAN_SECONDS = 60.0  # between two scans of all of /dev, even of folders whose times did not change


def write_file(path: str, temporary: str, data: bytes, mode: int, is_synced: bool = False) -> None:
    """Write DATA to the new file TEMPORARY and rename it to PATH: nobody sees it half written. If IS_SYNCED, a power
    cut cannot leave it empty either. Raises OSError."""
    try:
        with open(temporary, "xb", opener=functools.partial(os.open, mode=mode)) as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask is
            file.write(data)
            file.flush()
            if is_synced:
                os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if is_synced:
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@dataclass
class KeptFile:
    """The file PATH, in which this daemon keeps WHAT, a text, for its next start; none if PATH is empty. The file has a
    whole text: if a new one cannot be kept, the older one stays. KIND is a part of the names of events."""

    NOTHING = "[]"  # a text that needs no file
    path: str
    what: str
    kind: str

    def read(self, parse: Callable[[str], T]) -> T | None:
        """What PARSE makes of the text; None if there is none, or if it is ignored, which is logged."""
        try:
            return parse(read_conf(self.path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            sentence = f"{self.what}, kept in {self.path}, is ignored: {getattr(error, 'strerror', '') or error}"
            log_event(f"kept-{self.kind}-ignored", sentence, logging.WARNING)
            return None

    def keep(self, text: str) -> None:
        """Keep TEXT, unless the file has it: another instance may keep another one there, even an older one. A failure
        is logged once; the next call tries again."""
        kept = self.NOTHING
        with contextlib.suppress(OSError, ConfigError):
            kept = read_conf(self.path) if self.path else text
        if text == kept or len(text) > CONF_BYTES:  # which could not be read again
            return
        try:
            write_file(self.path, f"{self.path}.{os.urandom(8).hex()}", text.encode(), 0o600)
            board.set(self.path, "")
        except OSError as error:
            sentence = f"cannot keep {self.what} for the next start: {self.path}: {error.strerror}"
            board.set(self.path, sentence, f"{self.kind}-not-kept")


def kept_path(folder: str, domain: str, conf: str) -> str:
    """Where the instance with DOMAIN and the rules of CONF keeps files in FOLDER, but for the ends of their names. The
    kubelet removes nothing but sockets there."""
    return f"{folder}/smarter-device-manager-{shorten(domain, 180, domain)}.{binascii.crc32(os.fsencode(conf)):08x}"


def format_kept_devices(plan: Plan, boot: str) -> str:
    """The devices in PLAN that rules chose by attributes, for a KeptFile; BOOT is the ID of this boot. If another one
    has taken the place of such a device at the next start, the kept one is still offered, Unhealthy, and a container
    that was given it may not start again."""
    rows = []
    for name, resource in plan.resources.items():
        for device in resource.devices:
            if device.chosen_by:
                nodes = [(node.entry.device, node.entry.inode) for node in device.nodes]
                rows.append((name, device.path, boot, nodes, device.chosen_by, device.values))
    return json.dumps(rows)


def parse_kept_devices(text: str, boot: str) -> Plan:
    """The plan that TEXT of format_kept_devices() is from, as far as make_plan() needs it of its previous plan. Its
    devices have no right to their resources' names, unlike those of a daemon that goes on, so all resources are pools.
    Raises ValueError, TypeError or RecursionError if the text was changed."""
    devices: dict[str, list[Device]] = {}
    for row in json.loads(text):
        json.dumps(row, ensure_ascii=False).encode()  # or it has half a character, which nothing can print
        name, path, boot_then, numbers, *held = row
        numbers = numbers if boot_then == boot else [(0, 0)]  # each boot counts inodes from 1
        nodes = tuple(DeviceNode(path, "", Entry(CHAR, int(device), int(inode))) for device, inode in numbers)
        chosen_by, values = ({str(key): str(value) for key, value in dict(each).items()} for each in held)
        device = Device(str(path), 0, True, 0, nodes, chosen_by, values, since=time.monotonic())
        devices.setdefault(str(name), []).append(device)
    return Plan({name: Resource(name, True, tuple(found)) for name, found in devices.items()}, (), ())


class ConfFile:
    """The config file PATH. It is read at every turn, and its rules are in force as soon as they are good. If PATH is
    empty, the built-in ones are. The last good text is kept at KEPT_PATH, for a start with a broken config file."""

    def __init__(self, path: str, kept_path: str = "") -> None:
        self.rules: tuple[Rule, ...] = ()  # in force
        self.text = ""  # of these
        self.error = ""  # why the present text of the file is refused
        self.reloads = self.failed_reloads = 0
        self.read_at = 0.0  # time.time() when the file was last found good
        self.path = path
        self._refused: str | None = None  # the present text of the file, if its rules are not good
        self._kept = KeptFile(kept_path if path else "", f"the last good text of {json.dumps(path)}", "conf")

    def follow(self, reread: bool = False) -> bool:
        """Put the rules of the file in force if they changed and are good; whether there are new ones. Raises Problem
        at the first call if there are none. Only if REREAD, a refused text is parsed, and its error logged, again."""
        old_rules, old_error, problem, text = self.rules, self.error, "", None
        try:
            text = read_conf(self.path) if self.path else DEFAULT_CONF
            if text == self._refused and not reread:
                problem = old_error
            elif text != self.text or not old_rules:
                self.rules, self.text = parse_rules(text), text
        except ConfigError as error:
            problem = f"{self.path}:{error.line}:{error.column}: {error.message}"
        except OSError as error:
            problem = f"cannot read the config file {self.path}: {error.strerror}"
        self.error, self._refused = problem, text if problem else None
        if problem and not old_rules:  # this is the start
            kept = self._kept.read(lambda text: (parse_rules(text), text, os.stat(self._kept.path).st_mtime))
            if not kept:
                raise Problem(problem)
            self.rules, self.text, self.read_at = kept
        has_changed = self.rules is not old_rules
        if problem and (reread or problem != old_error):
            self.failed_reloads += 1
            source = "" if old_rules else f", from {self._kept.path}"
            log_event("conf-refused", f"{problem}; the last good rules stay in force{source}", logging.ERROR)
        elif not problem and (reread or old_error or has_changed):
            self.read_at = time.time()
            if old_rules and (old_error or has_changed):
                self.reloads += 1
                log_event("conf-reloaded", "the config file was read again", conf=self.path, rules=len(self.rules))
        self._kept.keep(self.text)
        return has_changed


class Watch:
    """Has the kernel send a signal to this process when a name in a directory is made, removed or renamed, and
    WITH_CONTENT also when a file in it is written. This is F_NOTIFY of fcntl(2): one signal for the first change, then
    it must be requested again. SIGIO must be blocked in every thread, or it ends the process."""

    def __init__(self, path: str, signal_number: int = signal.SIGIO, with_content: bool = False) -> None:
        self._path = path
        self._signal = signal_number
        self._changes = fcntl.DN_CREATE | fcntl.DN_DELETE | fcntl.DN_RENAME | (with_content and fcntl.DN_MODIFY)
        self._directory = -1  # its descriptor

    def ask(self) -> bool:
        """Request a signal for the next change, once however often this is called. Returns whether one will come."""
        try:
            if self._directory < 0 or not os.path.samestat(os.fstat(self._directory), os.stat(self._path)):
                self.close()  # the path leads to another directory now
                self._directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.fcntl(self._directory, fcntl.F_SETSIG, self._signal)
            fcntl.fcntl(self._directory, fcntl.F_NOTIFY, self._changes)
        except OSError:
            return False  # the directory is missing, or the kernel was built without CONFIG_DNOTIFY
        return True

    def close(self) -> None:
        """Request no more signals."""
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


class DeviceSide:
    """The part of the main thread: the config file and /dev, and the plan that is made from them."""

    def __init__(self, conf: str, dev_dir: str, sys_dir: str, kept: str = "", with_facts: bool = False) -> None:
        """KEPT is a path of kept_path(), if anything is to be kept. WITH_FACTS is that of Sysfs."""
        self.plan = EMPTY_PLAN
        self.snapshot = Snapshot({}, {})
        self.scan_seconds = 0.0  # taken by the last scan of /dev
        self.conf = ConfFile(conf, kept and f"{kept}.conf")
        self._dev_dir = dev_dir
        self._scanner = Scanner(dev_dir)
        self._sysfs = Sysfs(sys_dir, with_facts)
        self._matcher = Matcher(())
        self._look = find_devices(self.snapshot, (), self._matcher, dev_dir)
        self._unfit: Sequence[Entry] = ()  # nodes whose attributes a rule did not like
        self._gpus: Sequence[str] = ()
        what = "the list of devices that rules chose by attributes"
        self._kept_devices = KeptFile(kept and f"{kept}.devices", what, "devices")
        self._kept_text = KeptFile.NOTHING  # of the plan
        self._boot = read_attribute("/proc/sys/kernel/random", "boot_id") or ""
        self._next_full_scan = 0.0
        self._watches: dict[str, Watch] = {}  # by folder

    def start(self) -> None:
        """Make the first plan. Raises Problem if there are no good rules or no DEV_DIR."""
        try:
            os.listdir(self._dev_dir)
        except OSError as error:
            problem = f"cannot look at {self._dev_dir}: {error.strerror}; --dev-dir names the host's /dev"
            raise Problem(problem) from None
        self.plan = self._kept_devices.read(lambda text: parse_kept_devices(text, self._boot)) or EMPTY_PLAN
        self.turn()

    def turn(self, full: bool = False, reread: bool = False) -> Plan | None:
        """Look for changes, everywhere if FULL or REREAD (see ConfFile.follow()); the new plan if there is one."""
        now, before = time.monotonic(), self.plan
        full = full or reread or now >= self._next_full_scan
        has_changed = self.conf.follow(reread)
        if has_changed:
            self._matcher = Matcher(self.conf.rules)
        began, problem = time.monotonic(), ""
        try:
            snapshot = self._scanner.scan(full)
        except OSError as error:
            snapshot, problem = Snapshot({}, {}), f"cannot look at {self._dev_dir}: {error.strerror}"
        board.set(self._dev_dir, problem, "dev-lost", logging.ERROR)
        has_changed |= snapshot is not self.snapshot
        self.snapshot, self.scan_seconds = snapshot, time.monotonic() - began
        if full:
            gpus = self._gpus
            with contextlib.suppress(OSError):  # too many open files, say: those that were there still count
                self._gpus = self._sysfs.tegra_gpus()
            has_changed |= gpus != self._gpus or any(when <= now for when in expiry_times(before))
        if has_changed:
            self._look = find_devices(self.snapshot, self._gpus, self._matcher, self._dev_dir)
        # At every turn, or a /dev that always changes would keep it waiting.
        has_changed |= self._sysfs.refresh(self._look.wanted, self._unfit, full)
        if has_changed:
            plan = make_plan(before, dataclasses.replace(self._look, chains=self._sysfs.chains, now=now))
            unfit = [left.path for left in plan.left_out]
            unfit += [device.path for device in devices_of(plan) if device.problem]
            self._unfit = [node.entry for path in unfit for node in self._look.devices.get(path, ())]
            if plan != before:
                self.plan, self._kept_text = plan, format_kept_devices(plan, self._boot)
        self._kept_devices.keep(self._kept_text)
        if full:
            self._next_full_scan = min([now + FULL_SCAN_SECONDS, *expiry_times(self.plan)])
        return None if self.plan is before else self.plan

    def watch(self) -> None:
        """Have the kernel send FOLDER_SIGNAL when something comes or goes in a folder of /dev. Of too many, these have
        a watch: /dev, those with devices that are offered, the least deep; the poll must do for the others."""
        used = {path for each in devices_of(self.plan) for path in (each.path, *(node.path for node in each.nodes))}
        used |= {path.rpartition("/")[0] for path in used}
        paths = sorted(self.snapshot.folders, key=lambda path: (path != "", path not in used, path.count("/"), path))
        del paths[min(MAX_WATCHED, os.sysconf("SC_OPEN_MAX") // 16) :]
        for path in self._watches.keys() - set(paths):
            self._watches.pop(path).close()
        for path in paths:
            self._watches.setdefault(path, Watch(f"{self._dev_dir}/{path}", FOLDER_SIGNAL)).ask()

    def describe(self) -> Document:
        """Its part of the status document, as of the last turn."""
        return {
            "conf": {
                "path": self.conf.path or DEFAULT_CONF_NAME,
                "rules": len(self.conf.rules),
                "error": self.conf.error,
                "read_at": utc(self.conf.read_at),
                "read_at_seconds": self.conf.read_at,
                "reloads": self.conf.reloads,
                "failed_reloads": self.conf.failed_reloads,
            },
            "dev_problem": board.get(self._dev_dir),  # why /dev cannot be read
            "scan_seconds": self.scan_seconds,  # how long the last scan of /dev took
        }


@dataclass
class _LoggedState:
    """What ChangeLog knows of a device of a resource, or of a path that is left out."""

    now: str | None = None  # its problem, or why it is left out; None: the plan does not have it
    said: str | None = None  # the same, as of its last line
    changes: int = 0  # since then
    logged: float = -math.inf  # time.monotonic() of that


class ChangeLog:
    """Logs what changes from plan to plan, with one line for equal changes. A device that comes and goes all the time
    has a line per CHANGE_SECONDS, which says how many changes it stands for."""

    CHANGE_SECONDS = 1.0

    def __init__(self) -> None:
        self._states: dict[tuple[str, str, int], _LoggedState] = {}  # by resource, path and 0; or "", path and line
        self._shared: dict[str, str] = {}  # what was logged of nodes that several resources offer

    def take(self, plan: Plan) -> None:
        """Note what PLAN changes in what is offered and left out."""
        states = {("", f"/dev/{left.path}", left.line): left.text for left in plan.left_out}
        for name, resource in plan.resources.items():
            states.update(((name, device_path(device), 0), device.problem) for device in resource.devices)
        for subject in states.keys() | self._states.keys():
            known = self._states.setdefault(subject, _LoggedState())
            known.changes += known.now != states.get(subject)
            known.now = states.get(subject)
        for sentence, nodes in describe_shared(plan).items():
            news = [node for node in nodes if self._shared.get(node) != sentence]
            self._shared.update(dict.fromkeys(nodes, sentence))
            if news:
                log_event_for_all("shared", sentence, logging.WARNING, "devices", news)

    @property
    def due(self) -> float:
        """time.monotonic() when there is something to log; infinite if nothing waits."""
        waiting = (known.logged for known in self._states.values() if known.changes)
        return min(waiting, default=math.inf) + self.CHANGE_SECONDS

    def flush(self, now: float) -> None:
        """Log what has changed, except about subjects that had a line just before NOW."""
        if now < self.due:
            return
        groups: dict[tuple[str, str, int], list[str]] = {}
        rested = {key: known for key, known in self._states.items() if known.logged + self.CHANGE_SECONDS <= now}
        for (resource, path, line), known in sorted(rested.items(), key=lambda item: item[0]):
            event, sentence, level = "plugged", "offered" if known.said is None else "Healthy again", logging.INFO
            if known.now:
                event, sentence = ("unplugged", "Unhealthy: ") if resource else ("left-out", "left out: ")
                sentence, level = f"{sentence}{known.now}", logging.WARNING
            elif known.now is None:
                event, sentence = "retired", "no longer offered"
            if known.changes > 1:
                sentence += f" ({known.changes} changes since its last line)"
            if known.changes and (resource or known.now):
                groups.setdefault((event, sentence, level), []).append(path)
                known.logged = now
            elif known.now is None:
                del self._states[resource, path, line]
            known.said, known.changes = known.now, 0
        for (event, sentence, level), paths in groups.items():
            log_event_for_all(event, sentence, level, "devices", paths)


# ---------------------------------------------------------------------------------------------------------------------
# Kubelet: what the device plugin side and the DRA side are made of. A gRPC server on a Unix socket whose file others
# may delete or replace, leases, the connection to kubelet.sock (device plugins only), and the PodResources API.
# Serving needs grpc from here on. All of it runs on the asyncio loop of the gRPC thread.
# ---------------------------------------------------------------------------------------------------------------------

CHECK_SECONDS = 0.1  # between two checks of kubelet.sock
GATHER_SECONDS = 0.02  # after a signal, because changes come in groups
MAX_SILENCE_SECONDS = 10.0  # between two turns of a thread, of which it then has two in that time
STOP_SECONDS = 0.3  # for calls in progress when a server ends
SOCKET_PATH_BYTES = 107  # sun_path of unix(7), without its NUL
POD_RESOURCES_BYTES = 1 << 20  # of an answer of the PodResources API: parsing must not keep a gRPC call waiting
POD_RESOURCES_SECONDS = 1.0  # for such an answer
MAX_HOLDERS = 10_000  # in such an answer: a node runs a few hundred pods
CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))

Identity = tuple[int, int, int]  # of a socket file: device, inode and time of modification in nanoseconds
Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])


def load_grpc(with_tls: bool = False) -> None:
    """Import asyncio, grpc and the stubs into this module. Raises Problem if they are missing. OpenSSL takes 4 MB, so
    asyncio is kept from importing ssl unless WITH_TLS: an import of a module that is None fails."""
    global asyncio, grpc, pb, rpc
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our own log says it better than grpc's core
    sys.path.append(os.path.dirname(os.path.realpath(__file__)))  # for the stubs; python3 -I leaves it out
    is_hidden = not with_tls and sys.modules.setdefault("ssl", None) is None  # type: ignore[arg-type]
    try:
        import asyncio

        import grpc
        import grpc.aio

        import api_pb2 as pb
        import api_pb2_grpc as rpc
    except ImportError as error:
        raise Problem(
            f"serving needs the packages grpcio and protobuf, and the files api_pb2.py and api_pb2_grpc.py beside the "
            f"script ({error}); install python3-grpcio and python3-protobuf, or pip install grpcio protobuf"
        ) from None
    finally:
        if is_hidden:
            del sys.modules["ssl"]
    for name in ("grpc._common", "grpc._cython.cygrpc"):
        logging.getLogger(name).addFilter(is_unexpected_by_grpc)


def answered(method: Method) -> Method:
    """Wrap METHOD of a gRPC service that has a full_name: its caller gets an answer, be it an AllocationError or a bug.
    Without this, grpc sends none if the text of an exception is not UTF-8, and the kubelet waits for ever."""

    @functools.wraps(method)
    async def answer(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(self, request, context)
        except AllocationError as error:
            code, text = error.code, str(error)
        except grpc.aio.InternalError:  # the client has gone, and grpc is about to cancel the call for that
            raise asyncio.CancelledError from None
        except Exception as error:
            failure = f"{method.__name__} failed"
            log_internal_error(f"{self.full_name}: {failure}")
            code, text = "INTERNAL", f"{failure}, which is a bug of the plugin: {type(error).__name__}: {error}"
        data = printable(f"{self.full_name}: {text}").encode()
        if len(data) > 2600:  # a header has 8 KiB at most, and one byte takes up to three
            data = data[:2600] + b"..."
        await context.abort(grpc.StatusCode[code], data.decode(errors="ignore"))

    return answer  # type: ignore[return-value]


def unix_target(path: str) -> str:
    """The gRPC URI of the Unix socket PATH, which must have no comma: a channel takes that for the end of its URI."""
    escaped = re.sub(rb"[^A-Za-z0-9/._~-]", lambda char: b"%%%02X" % ord(char[0]), os.fsencode(path))
    return f"unix:{escaped.decode()}"


def connect_error(path: str) -> OSError | None:
    """Why nobody answers on the Unix socket PATH; None if somebody does. One of SCARCE says nothing about that."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except OSError as error:
        if error.errno != errno.EAGAIN:  # somebody listens, and has many waiting
            return error
    return None


def socket_identity(path: str) -> Identity | None:
    """Which file the socket PATH is; None if there is none. An inode number may be used again, so the time counts."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


async def wait_bounded(work: Awaitable[T], seconds: float) -> T:
    """The result of WORK within SECONDS; else raises asyncio.TimeoutError. Before Python 3.12, asyncio.wait_for()
    swallows a cancellation at the moment of the result: https://github.com/python/cpython/issues/86296"""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.add_done_callback(lambda _: task.cancelled() or task.exception())  # or it is logged as never retrieved
        task.cancel()


class UnixServer:
    """A gRPC server on the Unix socket PATH with mode 0600. ADD_SERVICES adds the services to it. start() makes it
    ready for clients; publish(), by whoever has the lease of PATH, lets them find it. Others may delete or replace the
    socket file at any time; is_lost() tells."""

    OPTIONS = (
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", 5_000),  # a client that connects and says nothing
        # Of a client without a call, unlike the kubelet, which has its stream. The timers wake every server: not often.
        ("grpc.max_connection_idle_ms", 3_600_000),
    )

    def __init__(self, path: str, add_services: Callable[[grpc.aio.Server], None]) -> None:
        self._path = path
        self._temporary = f"{os.path.dirname(path)}/.{os.urandom(8).hex()}"  # two containers may use the same PID
        self._server = grpc.aio.server(options=self.OPTIONS)
        self._identity: Identity | None = None  # of our socket file, once it has its name
        add_services(self._server)

    async def start(self) -> None:
        """Serve under a temporary name: grpc removes what has its name, even if it is another's. Raises OSError."""
        mask = os.umask(0o177)
        try:
            self._server.add_insecure_port(unix_target(self._temporary))
        except RuntimeError:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.bind(self._temporary)  # grpc does not say why it cannot; this does
            os.unlink(self._temporary)
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        finally:
            os.umask(mask)
        await self._server.start()

    def publish(self) -> None:
        """Give the socket its name, in place of one that a killed instance left. Raises OSError."""
        identity = socket_identity(self._temporary)
        os.rename(self._temporary, self._path)
        self._identity = identity

    def is_lost(self) -> bool:
        """Whether the published socket file was deleted or replaced."""
        return self._identity not in (None, socket_identity(self._path))

    async def stop(self) -> None:
        """End the server, for which calls in progress get STOP_SECONDS; then remove the socket file if it is ours."""
        await self._server.stop(STOP_SECONDS)
        if self._identity and not self.is_lost():
            with contextlib.suppress(OSError):  # the kubelet removes it when it starts
                os.unlink(self._path)


class Leases:
    """Which instance serves which socket: a lock on one byte of the file PATH for each (F_SETLK of fcntl(2)), which the
    kernel frees when a process ends, however it ends. An instance that waits has a shared lock on the first byte, so
    that the other one can hand over its sockets one after another."""

    RETRY_SECONDS = 0.02  # between two tries to take a lease that another instance has

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = -1
        self._waiting: dict[str, Callable[[], None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def take(self, socket_path: str) -> bool:
        """Take the lease of SOCKET_PATH. False while another instance has it, or one without leases answers there.
        Raises OSError."""
        is_current = False
        with contextlib.suppress(OSError):
            is_current = os.path.samestat(os.stat(self._path), os.fstat(self._file))
        if not is_current:  # the first time, or the directory is another one now
            self.close()
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if not self._lock(socket_path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        error = connect_error(socket_path)
        is_free = error is not None and error.errno not in SCARCE
        if is_free:
            self._waiting.pop(socket_path, None)
        return is_free

    def give_back(self, socket_path: str) -> None:
        """Let another instance have the lease of SOCKET_PATH, and wait for it no more."""
        self._waiting.pop(socket_path, None)
        if self._file >= 0:
            self._lock(socket_path, fcntl.LOCK_UN)

    def wait_for(self, socket_path: str, wake: Callable[[], None]) -> None:
        """Call WAKE when the lease of SOCKET_PATH may be free."""
        self._waiting[socket_path] = wake
        self._lock("", fcntl.LOCK_SH | fcntl.LOCK_NB)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.RETRY_SECONDS, self._try_one)

    def is_awaited(self) -> bool:
        """Whether another instance waits for a lease."""
        return self._file >= 0 and not self._lock("", fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Give back all leases."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _try_one(self) -> None:
        """Wake all who wait once one of the leases is free: most often, all of a process are."""
        self._timer = None
        if not self._waiting:
            return
        tried = next(iter(self._waiting))
        wake = self._waiting.pop(tried)
        with contextlib.suppress(OSError):  # who waits finds out why
            if not self.take(tried):
                self.wait_for(tried, wake)  # as the last in the queue
                return
        waiting, self._waiting = [wake, *self._waiting.values()], {}
        for each in waiting:
            each()

    def _lock(self, socket_path: str, kind: int) -> bool:
        """Change the lock of SOCKET_PATH's byte, which follows from a hash of 62 bits, or of the first one."""
        name = os.path.basename(os.fsencode(socket_path))
        number = 1 + (binascii.crc32(name) << 30 | binascii.crc32(name[::-1]) >> 2) if name else 0
        try:
            fcntl.lockf(self._file, kind, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        return True


class KubeletConnection:
    """The kubelet that listens on kubelet.sock in FOLDER. ON_CHANGE is called when one answers that did not, and when
    it stops answering."""

    def __init__(self, folder: str, on_change: Callable[[], None]) -> None:
        self.folder = folder
        self.channel: grpc.aio.Channel | None = None  # to the kubelet that answered last
        self.identity: Identity | None = None  # of kubelet.sock; None if there is none
        self.is_answering = False
        self.restarts = 0
        self._path = f"{folder}/kubelet.sock"
        self._on_change = on_change
        self._closing: asyncio.Future[None] | None = None  # of the channel before
        self._last_met: Identity | None = None  # the kubelet that answered last

    def check(self) -> bool:
        """Whether the kubelet answers at this moment; and notice if it is another one."""
        identity = socket_identity(self._path)
        error = connect_error(self._path)
        what = "the kubelet is not there: no" if identity is None else "the kubelet does not answer on"
        problem = f"{what} {self._path}; waiting for it" if error or identity is None else ""
        is_met = not problem and not (self.is_answering and identity == self.identity)
        self.identity, self.is_answering = identity, not problem
        if is_met or problem != board.get(self._path):
            board.flush()
            board.set(self._path, problem, "kubelet-gone", reason=str(error and error.strerror))
            if is_met:
                is_another = self._last_met not in (None, identity)
                log_event("kubelet-restarted" if is_another else "kubelet-found", "the kubelet answers; registering")
                if self.channel:
                    self._closing = asyncio.ensure_future(self.channel.close())
                self.channel = grpc.aio.insecure_channel(unix_target(self._path), options=CHANNEL_OPTIONS)
                self._last_met = identity
                self.restarts += is_another
            self._on_change()
        return self.is_answering

    async def close(self) -> None:
        """End the channel."""
        if self.channel:
            await self.channel.close()


class Holder(NamedTuple):
    """A container that holds a slot of a resource."""

    slot: str  # its ID
    namespace: str
    pod: str
    container: str


SlotsOfDra = Mapping[str, Slot]  # by the name that a DRA driver gave to the slot
Holders = Mapping[str, Sequence[Holder]]  # by the resource's name without the domain
Held = list[tuple[str, Holder]]  # slots of one container, each with its resource's name without the domain


def find_holders(response: pb.ListPodResourcesResponse, domain: str, slots: SlotsOfDra) -> Iterator[Held]:
    """Per container in RESPONSE, the slots that it holds of DOMAIN's resources, or of SLOTS of the DRA driver DOMAIN.
    Raises ValueError if there are more than MAX_HOLDERS."""
    count = 0
    for pod in response.pod_resources:
        for container in pod.containers:
            held = [
                (item.resource_name[len(domain) + 1 :], slot_id)
                for item in container.devices
                if item.resource_name.startswith(f"{domain}/")
                for slot_id in item.device_ids
            ]
            for claim in container.dynamic_resources:
                ours = [device.device_name for device in claim.claim_resources if device.driver_name == domain]
                held += [(slots[name].resource.name, slots[name].id) for name in ours if name in slots]
            count += len(held)
            if count > MAX_HOLDERS:
                raise ValueError("more holders than any node has")
            names = [truncate(name, MAX_TEXT) for name in (pod.namespace, pod.name, container.name)]
            yield [(name, Holder(slot_id, *names)) for name, slot_id in held]


async def read_holders(path: str, domain: str, slots: SlotsOfDra) -> Holders | None:
    """Which container holds which slots. None if no kubelet answers in time and in the known way on the Unix socket
    PATH (KEP-606; stable since Kubernetes 1.28). Since 1.34 it leaves out pods that have ended; older ones list them
    until their slots are needed (https://github.com/kubernetes/kubernetes/pull/132028)."""
    from google.protobuf.message import DecodeError

    holders: dict[str, list[Holder]] = {}
    # A new channel each time: one that failed is slow to try again.
    options = [*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", POD_RESOURCES_BYTES)]
    try:
        async with grpc.aio.insecure_channel(unix_target(path), options) as channel:
            call = channel.unary_unary("/v1.PodResourcesLister/List")
            answer = await call(b"", timeout=POD_RESOURCES_SECONDS)
        response = pb.ListPodResourcesResponse.FromString(answer)  # grpc would log bytes that are no message
        for pairs in await in_slices(find_holders(response, domain, slots)):
            for name, holder in pairs:
                holders.setdefault(name, []).append(holder)
    except (grpc.RpcError, DecodeError, ValueError) as error:
        log.debug("the kubelet does not say who holds which slots: %s", error)
        return None
    return holders


async def in_slices(items: Iterable[T]) -> list[T]:
    """list(ITEMS), made in slices of a millisecond so that nobody else on the loop has to wait."""
    done = []
    end = 0.0
    for item in items:
        done.append(item)
        if time.monotonic() >= end:
            await asyncio.sleep(0)
            end = time.monotonic() + 0.001
    return done


def unready_text(problem: str) -> str:
    """That a resource is not registered, because of PROBLEM if that is known."""
    return f"not registered with the kubelet{f': {problem}' if problem else ' yet'}"


# What the status document says of the registration of a resource that the kubelet was never offered.
NOT_REGISTERED: Document = {
    "ready": False,
    "served_by_other": False,
    "trouble": unready_text(""),
    **dict.fromkeys(("allocations", "registrations", "refusals", "stream_losses", "start_refusals"), 0),
}


class KubeletSide(abc.ABC):
    """Offers plans to the kubelet: all that others know of either side. Belongs to LOOP and its thread. It checks its
    sockets periodically; the kernel's signal for a change in the directory of WATCH makes checks fewer and sooner."""

    EAGER_SECONDS = 0.004  # while the kubelet is awaited: it makes its socket first, and then listens

    def __init__(
        self, loop: asyncio.AbstractEventLoop, max_silence: float, domain: str, folders: Sequence[str], watch: Watch
    ) -> None:
        self.domain = domain  # of the resources
        self.plugin_dir = folders[0]
        self.folders = folders  # that it works in, and others too
        self.slots: SlotsOfDra = {}
        self.last_turn = time.monotonic()  # of the last check
        self.max_silence = max_silence  # seconds since a thread's last turn, after which it counts as hanging
        self.calm_pause = max_silence / 2  # seconds between two checks, at the most
        self._loop = loop
        self._watch = watch
        self._change: asyncio.Future[None] = loop.create_future()  # done when there is something to check
        self._done: asyncio.Future[None] = loop.create_future()  # its end is that of run()

    @abc.abstractmethod
    def describe(self) -> Document:
        """The parts of the status document about the kubelet and about DRA."""

    @abc.abstractmethod
    def describe_registration(self, name: str) -> Document:
        """The part of the status document about the registration of the resource NAME: the keys of NOT_REGISTERED."""

    @abc.abstractmethod
    def apply(self, plan: Plan) -> None:
        """Make PLAN true."""

    @property
    @abc.abstractmethod
    def is_answering(self) -> bool:
        """Whether the kubelet answers, so that there is nothing to wait for."""

    @abc.abstractmethod
    async def _check(self) -> None:
        """Check the sockets."""

    @abc.abstractmethod
    async def _end(self) -> None:
        """End all streams and servers."""

    async def run(self) -> None:
        """Serve the kubelet until stop(). Raises what went wrong."""
        try:
            while not self._done.done():
                self.last_turn = time.monotonic()
                self._change = self._loop.create_future()
                is_watched = self._watch.ask()  # before the check, so that no change is missed
                await self._check()
                pause = self.calm_pause if is_watched and self.is_answering else CHECK_SECONDS
                await asyncio.wait([self._done, self._change], timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                if self._change.done() and not self._done.done():
                    await self._check()
                    await asyncio.sleep(GATHER_SECONDS if self.is_answering else self.EAGER_SECONDS)
        finally:
            self._watch.close()
            await self._end()
        self._done.result()

    def check_now(self) -> None:
        """Have run() check, and soon again. Only then is the next signal requested: many changes make few checks."""
        if not self._change.done():
            self._change.set_result(None)

    def deliver(self, plan: Plan) -> None:
        """apply(), for a callback of the loop: what it raises, run() raises. Nothing once run() is to end."""
        try:
            if not self._done.done():
                self.apply(plan)
        except Exception as error:
            self._done.set_exception(error)

    def stop(self) -> None:
        """Let run() end."""
        if not self._done.done():
            self._done.set_result(None)

    def _fail_with(self, task: asyncio.Task[None]) -> None:
        """Let run() raise what TASK has raised, if it has."""
        error = None if task.cancelled() else task.exception()
        if error and not self._done.done():
            self._done.set_exception(error)


# ---------------------------------------------------------------------------------------------------------------------
# Device plugins: the DevicePlugin service of one resource, the life of its registration, and the side that holds them
# all.
#
# Theory of operation. The kubelet sees each resource as a plugin of its own: a Unix socket in its directory. We call
# Register on kubelet.sock; the kubelet dials our socket, asks for options, and then holds one stream open
# (ListAndWatch), on which we send the whole list of slots whenever it changes. Only while that stream is open can pods
# be given slots. For each container that gets some, the kubelet calls Allocate once (for a pool, it may call
# GetPreferredAllocation before). It keeps the answer for the pod's life, so for rules by attributes it also asks
# before each start of the container (PreStartContainer).
#
# DevicePluginSide has one Registration per resource of the plan, and wakes them when kubelet.sock or a socket of theirs
# changes. Registration.run() is the life of one resource: wait for a kubelet; serve under a temporary name; wait for
# the lease of the socket's name, which another instance may have; take that name; register; watch the stream; and when
# the kubelet is another one, or anything went wrong, end the server and begin again. Plugin answers the kubelet.
#
# Three facts about the kubelet explain the order of things. When it starts, it removes every socket in its directory,
# so everything begins again with each new kubelet.sock; while it is down, its dead socket stays, and so does what we
# serve. When an older stream of a resource ends, the kubelet disconnects the newest client of that resource; so the old
# server ends before anything is registered again, and before the lease is given back. A pod that asks for a resource
# that is not registered fails for good; so nothing here waits for a poll if the kernel can signal the change.
# ---------------------------------------------------------------------------------------------------------------------

MAX_CONTAINERS = 100  # in one request; the kubelet asks for one at a time
REGISTER_SECONDS = 20.0  # the kubelet itself takes up to 10 s to dial a plugin
MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 30.0  # before a resource is registered again
# File descriptors: of a registered resource; for clients of the status server (64), Allocate, kubelet.sock and gRPC.
DESCRIPTORS_EACH, RESERVED_DESCRIPTORS = 2, 96
NO_DESCRIPTORS = "no file descriptors are left for it; raise the limit of this process (LimitNOFILE=, ulimit -n)"
OTHER_INSTANCE = "another instance serves it; this one takes over when that ends"
SHORTEST_NAME = 10  # of a resource, in its socket's name: a letter, a dash and 8 hexadecimal digits


class HostDevices:
    """The devices of the host as they are at this moment, which may be newer than the plan. START_SCAN makes the device
    side scan everything."""

    PLAN_SECONDS = 2.0  # for the next plan to know what is at the path of a device, before a start is refused
    SCAN_SECONDS = 0.5  # after a refused start, before the device side scans

    def __init__(self, dev_dir: str, start_scan: Callable[[], None]) -> None:
        self._dev_dir = dev_dir
        self._start_scan = start_scan
        self._next_scan = 0.0  # time.monotonic()

    def allocate(self, resource: Resource, asked: Iterable[Iterable[str]]) -> list[ContainerAllocation]:
        """What containers are given for the slots ASKED, a list per container. Raises AllocationError."""
        try:
            with LiveTree(self._dev_dir) as tree:
                return [allocate(resource, ids, tree, self._dev_dir) for ids in asked]
        except OSError as error:
            raise AllocationError("UNAVAILABLE", f"cannot look at /dev: {error.strerror}") from None

    def find_start_problem(self, devices: Iterable[Device]) -> tuple[Device, str, bool] | None:
        """The first of DEVICES that is no longer the one that its rule chose, what is there instead, and whether the
        plan may be too old to tell. One that is the same node still is the same device, whatever its attributes are."""
        for device in devices:
            try:
                with LiveTree(self._dev_dir) as tree:
                    specs_of(dataclasses.replace(device, chosen_by={}), tree, self._dev_dir)
                    nodes = resolve(tree, device.path, self._dev_dir) if device.chosen_by else device.nodes
            except NotADevice as error:
                return device, str(error), False
            except OSError as error:
                return device, f"cannot look at /dev: {error.strerror}", False
            is_other = device.is_gone or not device.has_nodes(nodes)
            if is_other and (device.chosen_by or not device.nodes):  # whatever is there is right if its path chose it
                is_old = device.problem in ("", Reason.GONE.template, Reason.SWAPPED.template)
                return device, device.problem or Reason.SWAPPED.template, is_old and bool(nodes)
        return None

    def request_scan(self) -> None:
        """Make the device side scan soon, since the plan may be outdated."""
        now = time.monotonic()
        if now >= self._next_scan:
            self._next_scan = now + self.SCAN_SECONDS
            asyncio.get_running_loop().call_later(self.SCAN_SECONDS, self._start_scan)


def options_of(resource: Resource) -> pb.DevicePluginOptions:
    """What the kubelet must know first of a plugin for RESOURCE; it asks only when that is registered. Starts are
    checked for rules by attributes, since no link leads the container runtime to the right device."""
    is_checked = any(device.chosen_by for device in resource.devices)
    return pb.DevicePluginOptions(get_preferred_allocation_available=resource.pool, pre_start_required=is_checked)


def _check_containers(requests: Sequence[object]) -> None:
    """Raise AllocationError if REQUESTS would keep the loop busy for long, while others wait."""
    if len(requests) > MAX_CONTAINERS:
        text = f"asked for {len(requests)} containers at once, more than {MAX_CONTAINERS}"
        raise AllocationError("INVALID_ARGUMENT", text)


class Plugin:
    """v1beta1.DevicePlugin for one resource. ON_STREAM is called with each ListAndWatch stream that opens or ends."""

    def __init__(self, resource: Resource, domain: str, host: HostDevices, on_stream: Callable[[object], None]) -> None:
        self.resource = resource
        self.full_name = f"{domain}/{resource.name}"
        self.options = options_of(resource)
        self.counts: Counter[str] = Counter()  # by keys of NOT_REGISTERED
        self.streams: set[asyncio.Event] = set()  # that are open; each is set when it may have a list to send
        self._host = host
        self._on_stream = on_stream

    def update(self, resource: Resource) -> bool:
        """Offer RESOURCE, of the same name, from now on. False if that needs a new plugin, from which the kubelet
        learns new options. Checks of starts cost little, so a plugin that no longer needs them keeps the option."""
        needed = options_of(resource)
        needed.pre_start_required |= self.options.pre_start_required
        if needed != self.options:
            return False
        self.resource = resource
        for news in self.streams:
            news.set()
        return True

    def end_streams(self) -> None:
        """End every open stream in good order."""
        ended, self.streams = self.streams, set()
        for news in ended:
            news.set()

    @answered
    async def ListAndWatch(self, request: pb.Empty, context: grpc.aio.ServicerContext) -> None:
        """The reader may be slow, or not read at all, so only the newest list waits."""
        news = asyncio.Event()
        self.streams.add(news)
        self._on_stream(news)
        sent = None
        try:
            while news in self.streams:
                news.clear()
                # The list may have 100,000 slots, so only what it is made of is compared.
                key = [(device.path, device.slots, not device.problem, device.numa) for device in self.resource.devices]
                if key != sent:
                    sent = key
                    await context.write(_list_message(self.resource))
                await news.wait()
        finally:
            self.streams.discard(news)
            self._on_stream(news)

    @answered
    async def GetDevicePluginOptions(self, request: pb.Empty, context: object) -> pb.DevicePluginOptions:
        return self.options

    @answered
    async def GetPreferredAllocation(
        self, request: pb.PreferredAllocationRequest, context: grpc.aio.ServicerContext
    ) -> pb.PreferredAllocationResponse:
        _check_containers(request.container_requests)
        response = pb.PreferredAllocationResponse()
        for item in request.container_requests:
            available, needed = item.available_deviceIDs, item.must_include_deviceIDs
            ids = preferred_allocation(self.resource, available, needed, item.allocation_size)
            response.container_responses.add(deviceIDs=ids)
        return response

    @answered
    async def Allocate(self, request: pb.AllocateRequest, context: grpc.aio.ServicerContext) -> pb.AllocateResponse:
        _check_containers(request.container_requests)
        asked = [list(item.devices_ids) for item in request.container_requests]
        ids = join_names([slot_id[:MAX_SHOWN] for slot_ids in asked for slot_id in slot_ids])
        try:
            allocations = self._host.allocate(self.resource, asked)
        except AllocationError as error:
            sentence = f"Allocate refused: {error}"
            log_event("refused", sentence, logging.WARNING, resource=self.full_name, ids=ids, status=error.code)
            raise
        response = pb.AllocateResponse()
        for found in allocations:
            answer = response.container_responses.add(envs=found.env)
            for spec in found.specs:
                answer.devices.add(container_path=spec.container, host_path=spec.host, permissions=spec.permissions)
        self.counts["allocations"] += len(allocations)
        hosts = join_names([spec.host for found in allocations for spec in found.specs])
        log_event("allocated", "allocated to a container", resource=self.full_name, ids=ids, devices=hosts)
        return response

    @answered
    async def PreStartContainer(self, request: pb.PreStartContainerRequest, _: object) -> pb.PreStartContainerResponse:
        """Allow a container to start if its devices are those that their rules chose. After a refusal, the kubelet
        shows the text in the pod's events, and asks again every 13 s or so."""
        give_up = time.monotonic() + self._host.PLAN_SECONDS
        while True:
            slots: dict[str, Slot] = {}  # one of each device, by its path; a new plan may have other ones
            for slot_id, slot in named_slots(self.resource, request.devices_ids):
                if slot is None:
                    self._refuse_start(slot_id, "", "the resource has no such ID")
                slots.setdefault(slot.device.path, slot)
            found = self._host.find_start_problem(slot.device for slot in slots.values())
            if not found:
                break
            device, problem, may_pass = found
            if not may_pass or time.monotonic() >= give_up:
                self._refuse_start(slots[device.path].id, device_path(device), problem)
            await asyncio.sleep(0.02)
        for slot_id in request.devices_ids:
            board.set(f"{self.full_name}/{slot_id[:MAX_SHOWN]}", "")
        return pb.PreStartContainerResponse()

    def _refuse_start(self, slot_id: str, path: str, problem: str) -> NoReturn:
        """Count the refusal, log it once, make the device side scan, and raise AllocationError."""
        shown = f'ID "{slot_id[:MAX_SHOWN]}"'
        given = f"{path} ({shown})" if path else f"the {shown}"
        given, problem = (truncate(printable(text), MAX_TEXT) for text in (given, problem))
        text = (
            f"the container was given {given}, but {problem}. It starts "
            "once the right device is back; or delete the pod: its replacement gets a device that is there"
        )
        self.counts["start_refusals"] += 1
        self._host.request_scan()
        sentence = f"start of a container refused: {text}"
        board.set(f"{self.full_name}/{slot_id[:MAX_SHOWN]}", sentence, "start-refused", resource=self.full_name)
        raise AllocationError("FAILED_PRECONDITION", text)


def _list_message(resource: Resource) -> pb.ListAndWatchResponse:
    response = pb.ListAndWatchResponse()
    for slot in slots_of(resource):
        device = response.devices.add(ID=slot.id, health="Unhealthy" if slot.device.problem else "Healthy")
        for numa in slot.device.numa:
            device.topology.nodes.add(ID=numa)
    return response


def is_domain(text: str) -> bool:
    """Whether the kubelet accepts TEXT as the domain of a resource: a DNS subdomain, also with the prefix "requests."
    of quotas, but without that prefix itself."""
    label = "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
    is_subdomain = re.fullmatch(rf"{label}(\.{label})*", text) and len(f"requests.{text}") <= 253
    return bool(is_subdomain) and not text.startswith("requests.") and "kubernetes.io" not in text


def socket_room(plugin_dir: str) -> int:
    """The bytes available for NAME in PLUGIN_DIR/smarter-NAME.sock; fewer than SHORTEST_NAME are too few."""
    return SOCKET_PATH_BYTES - len(os.fsencode(f"{plugin_dir}/smarter-.sock"))


def socket_name(name: str, domain: str, plugin_dir: str) -> str:
    """The file name of the socket of the resource NAME; its path has at most SOCKET_PATH_BYTES."""
    own = name if domain == DEFAULT_DOMAIN else f"{name}.{domain}"
    return f"smarter-{shorten(own, socket_room(plugin_dir), own)}.sock"


class Backoff:
    """When to retry: after MIN_BACKOFF_SECONDS, then after twice as long each time, up to MAXIMUM seconds."""

    def __init__(self, maximum: float = MAX_BACKOFF_SECONDS) -> None:
        self._maximum = maximum
        self.reset()

    def reset(self) -> None:
        """Forget the failures."""
        self.retry_at = self._pause = 0.0  # retry_at is of time.monotonic()

    def fail(self, now: float, at_once: bool = False) -> None:
        """Delay the next try. With AT_ONCE, the first one is not delayed."""
        pause = self._pause if at_once else max(self._pause, MIN_BACKOFF_SECONDS)
        self._pause = min(max(2 * pause, MIN_BACKOFF_SECONDS), self._maximum)
        self.retry_at = now + pause


class Registration:
    """The life of one resource with the kubelet: run(), until retire()."""

    STREAM_SECONDS = 5.0  # after Register, for the kubelet to open its stream

    def __init__(
        self, domain: str, host: HostDevices, kubelet: KubeletConnection, leases: Leases, resource: Resource
    ) -> None:
        self.plugin = Plugin(resource, domain, host, self._stream_changed)
        self.socket = socket_name(resource.name, domain, kubelet.folder)
        self._path = f"{kubelet.folder}/{self.socket}"
        self._kubelet = kubelet
        self._leases = leases
        self._known: Identity | None = None  # the last kubelet that it was to be registered with
        self._stream: object | None = None  # the kubelet's is the first one; other clients may open more
        self._is_standby = self._is_retired = False
        self._backoff = Backoff()
        self._wake = asyncio.Event()
        self.wake = self._wake.set  # makes run() check again what it waits for

    def describe(self) -> Document:
        """Its part of the status document."""
        is_ready = self._stream in self.plugin.streams
        is_standby = self._is_standby and self._kubelet.is_answering
        problem = board.get(self.plugin.full_name)
        return {
            **NOT_REGISTERED,
            "ready": is_ready,
            "served_by_other": is_standby,  # /readyz alone takes that for ready
            "trouble": "" if is_ready else problem if is_standby else unready_text(problem),
            **self.plugin.counts,
        }

    def retire(self) -> None:
        """Make run() end."""
        self._is_retired = True
        self.wake()

    async def run(self, previous: asyncio.Task[None] | None) -> None:
        """Serve the resource and keep it registered until retire(), once PREVIOUS, an older run() of it, has ended. It
        must not be cancelled, because grpc's servers do not survive that."""
        if previous:
            await asyncio.wait([previous])
        board.set(self.plugin.full_name, "")
        try:
            while await self._until(lambda: self._kubelet.is_answering):
                if self._kubelet.identity != self._known:
                    self._backoff.reset()
                await self._until(self._is_over, self._backoff.retry_at - time.monotonic())  # a new one need not wait
                self._known = self._kubelet.identity
                if self._known and not self._is_retired:
                    await self._serve()
        finally:
            self._leases.give_back(self._path)

    async def _serve(self) -> None:
        """Serve the resource and register it with the kubelet, until _is_over() or something fails."""
        failure = None  # the event to log, and the problem
        server = UnixServer(self._path, functools.partial(rpc.add_DevicePluginServicer_to_server, self.plugin))
        try:
            await server.start()  # before the lease, so that a hand-over takes no longer than it must
            await self._until(lambda: self._is_over() or self._take_lease())
            # Without a stream, nothing else tells that the kubelet went down.
            if self._kubelet.check() and not self._is_over():
                server.publish()
                failure = await self._register() or await self._watch(server)
        except OSError as error:
            failure = "not-served", f"cannot listen on a socket in {os.path.dirname(self._path)}: {error.strerror}"
        finally:
            is_lost = server.is_lost()
            self.plugin.end_streams()
            await server.stop()  # waits for the streams, removes the socket; only then another instance may register it
            self._stream, self._is_standby = None, False
        if failure and self._kubelet.check() and not self._is_over():  # otherwise the kubelet has ended
            event, problem = failure
            self.plugin.counts["refusals"] += event == "refused"
            self.plugin.counts["stream_losses"] += event == "stream-lost" and not is_lost
            self._backoff.fail(time.monotonic(), at_once=is_lost)
            board.set_of_resource(self.plugin.full_name, problem, event)

    def _is_over(self) -> bool:
        """Whether it is retired, or there is another kubelet than the known one."""
        return self._is_retired or self._kubelet.identity not in (self._known, None)

    def _take_lease(self) -> bool:
        """Whether no other instance serves the resource; otherwise, its end calls wake(). Raises OSError."""
        self._is_standby = not self._leases.take(self._path)
        if self._is_standby:
            board.set_of_resource(self.plugin.full_name, OTHER_INSTANCE, "not-served", logging.INFO)
            self._leases.wait_for(self._path, self.wake)
        return not self._is_standby

    async def _register(self) -> tuple[str, str] | None:
        """Register with the kubelet. The event and the problem if it failed, or if _is_over() before that."""
        name, options = self.plugin.full_name, self.plugin.options
        request = pb.RegisterRequest(version="v1beta1", endpoint=self.socket, resource_name=name, options=options)
        call = rpc.RegistrationStub(self._kubelet.channel).Register(request, timeout=REGISTER_SECONDS)
        call.add_done_callback(lambda _: self.wake())
        await self._until(lambda: call.done() or self._is_over())
        call.cancel()  # nothing if it is done
        code = await call.code()
        if code is grpc.StatusCode.OK:
            self.plugin.counts["registrations"] += 1
            board.log_soon("registered", "registered with the kubelet", logging.INFO, name)
            return None
        if code is grpc.StatusCode.UNAVAILABLE:
            await asyncio.sleep(CHECK_SECONDS)  # a kubelet that stops may end its calls before it closes its socket
        return "refused", f"the kubelet refused to register it ({code.name}): {await call.details()}"

    async def _watch(self, server: UnixServer) -> tuple[str, str] | None:
        """Wait while all is well, or the kubelet is down. The event and the problem; None if _is_over() before that."""

        def find_problem() -> str:
            if server.is_lost():
                return "its socket file was deleted"
            if not self._stream:
                return f"the kubelet opened no stream within {self.STREAM_SECONDS:.0f} s"
            return "" if self._stream in self.plugin.streams else "the kubelet ended its stream"

        began = time.monotonic()
        await self._until(lambda: self._stream or server.is_lost() or self._is_over(), self.STREAM_SECONDS)
        await self._until(lambda: self._is_over() or (find_problem() and self._kubelet.check()))
        if self._is_over():  # a hand-over is no time to look for the kubelet
            return None
        if time.monotonic() - began > MAX_BACKOFF_SECONDS:
            self._backoff.reset()
        return "stream-lost", find_problem()

    async def _until(self, is_so: Callable[[], object], seconds: float = math.inf) -> bool:
        """Wait until IS_SO(), which is checked at each wake(), for SECONDS at most; False if it is not, or retired."""
        end = time.monotonic() + seconds
        while not self._is_retired and not is_so():
            if time.monotonic() >= end:
                return False
            self._wake.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), None if seconds == math.inf else end - time.monotonic())
        return not self._is_retired

    def _stream_changed(self, stream: object) -> None:
        if self._stream is None and stream in self.plugin.streams:
            self._stream = stream
            board.set(self.plugin.full_name, "")
        self.wake()


class DevicePluginSide(KubeletSide):
    """Offers a plan's resources to the kubelet whose socket is in the plugin directory."""

    def __init__(
        self, options: argparse.Namespace, host: HostDevices, loop: asyncio.AbstractEventLoop, max_silence: float
    ) -> None:
        plugin_dir: str = options.plugin_dir
        super().__init__(loop, max_silence, options.domain, [plugin_dir], Watch(plugin_dir))
        self.registrations: dict[str, Registration] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}  # run() of the newest registration of each name
        self._kubelet = KubeletConnection(plugin_dir, self._kubelet_changed)
        self._leases = Leases(f"{plugin_dir}/smarter-device-manager.lock")
        self._make = functools.partial(Registration, self.domain, host, self._kubelet, self._leases)
        self._inodes: dict[str, int] = {}  # of the files in the plugin directory, by name, at the last check

    @property
    def is_answering(self) -> bool:
        return self._kubelet.is_answering

    def describe(self) -> Document:
        kubelet = {"answering": self.is_answering, "restarts": self._kubelet.restarts, "plugin_dir": self.plugin_dir}
        return {"kubelet": kubelet, "dra": None}

    def describe_registration(self, name: str) -> Document:
        if name in self.registrations:
            return self.registrations[name].describe()
        return {**NOT_REGISTERED, "trouble": unready_text(board.get(f"{self.domain}/{name}"))}

    async def _check(self) -> None:
        """Check kubelet.sock, and wake the registrations whose socket, ours or another's, is missing or a new one."""
        if self._kubelet.check():
            with contextlib.suppress(OSError), os.scandir(self.plugin_dir) as items:
                before, self._inodes = self._inodes, {item.name: item.inode() for item in items}
                for registration in self.registrations.values():
                    inode = self._inodes.get(registration.socket)
                    if inode is None or inode != before.get(registration.socket):
                        registration.wake()

    async def _end(self) -> None:
        """End the registrations; if another instance waits for them, no faster than it can register them. Each resource
        is without a stream meanwhile, and if all ended at once, the first would wait for the last."""
        pause = min(0.002, 1.0 / max(len(self.registrations), 1)) if self._leases.is_awaited() else 0.0
        began = time.monotonic()
        for number, name in enumerate(list(self.registrations)):
            self.registrations.pop(name).retire()
            await asyncio.sleep(max(0.0, began + number * pause - time.monotonic()))
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._leases.close()
        board.flush()
        await self._kubelet.close()

    def _kubelet_changed(self) -> None:
        self.check_now()  # which watches the directory, too: it may be another one now
        if self.is_answering:
            for registration in self.registrations.values():
                registration.wake()

    def apply(self, plan: Plan) -> None:
        """Make the smallest change that makes PLAN true: start, update or retire registrations."""
        import resource as limits

        # The hard limit, for the soft one may be lower for a while only; then each registration tries again.
        room = max(0, (limits.getrlimit(limits.RLIMIT_NOFILE)[1] - RESERVED_DESCRIPTORS) // DESCRIPTORS_EACH)
        names = sorted(plan.resources, key=lambda name: name not in self.registrations)
        served = dict.fromkeys(names[:room])
        for name in names[room:]:
            board.set_of_resource(f"{self.domain}/{name}", NO_DESCRIPTORS, "not-served")
        for name, registration in list(self.registrations.items()):
            if name not in served or not registration.plugin.update(plan.resources[name]):
                self.registrations.pop(name).retire()
        self._tasks = {name: task for name, task in self._tasks.items() if not task.done()}
        for name in served:
            if name not in self.registrations:
                registration = self.registrations[name] = self._make(plan.resources[name])
                self._tasks[name] = asyncio.ensure_future(registration.run(self._tasks.get(name)))
                self._tasks[name].add_done_callback(self._fail_with)


# ---------------------------------------------------------------------------------------------------------------------
# DRA: the other way to the kubelet, Dynamic Resource Allocation (resource.k8s.io/v1, Kubernetes 1.34).
#
# Theory of operation. Each slot of the plan is a device of a ResourceSlice on the API server, under a name that
# follows from path and slot number alone. The scheduler allocates devices to a pod's ResourceClaim. The kubelet then
# has this driver prepare the claim: Claims reads on the API server what it was allocated, writes a CDI file that says
# which nodes and env the container runtime is to add, and answers with the names of the CDI devices in it. The runtime
# reads the file at each start of a container. When the pod has ended, the kubelet calls NodeUnprepareResources, and
# Claims removes the file. The kubelet finds the driver by a socket in plugins_registry: it asks there for the driver's
# own socket (GetInfo), and says whether it took the driver (NotifyRegistrationStatus).
#
# Who owns what: Publisher the slices and the DeviceClasses; Claims what is prepared, and CdiFiles the files of it;
# DraPlugin what the kubelet calls, and whether the kubelet has the driver; DraSide the sockets and the lease, and so
# whether all of this runs. What is wanted follows from the plan, the claims, /dev and the time. The driver derives it
# again at least every second, and when the plan or the CDI folder changes. It repairs CDI files at once; it compares
# the slices with those on the API server after a change, and every 50 s.
#
# Its memory, which survives restarts, is the CDI files, and beside each a link that names the claim. A device belongs
# to one claim (adminAccess takes it from nobody) until the kubelet unprepares that claim, or the API server has said
# twice, GONE_SECONDS apart, that it does not exist. The driver asks only about claims whose files it found at its
# start, and when another claim wants the device. Nothing is awaited between looking who has a device and writing the
# file, so no two claims get it. While a file cannot be read, no other claim is prepared, until the API server has said
# which devices it has. The slices outlive the driver: the next one writes them only if they are not as it wants.
#
# A device that goes is tainted NoSchedule at once, and NoExecute, which evicts its pod, after --gone-grace. Until it
# is back, its CDI device has another name (GONE at its end), so that no container starts with what is at its path. A
# restarted driver sees by this name that the device was gone, and does not take another stick at that path for it. A
# device that is there, but that no rule names or chooses any more, stays with its pod: no edit of a rule costs a pod.
# ---------------------------------------------------------------------------------------------------------------------

MAX_SLICE_DEVICES = 64  # the API takes 128, but only 64 once one of them has a taint
MAX_API_ANSWER = 2 << 20  # bytes
MAX_API_OBJECTS = 50_000  # objects and lists in an answer: two bytes of JSON can take a hundred of memory
MAX_FILE_BYTES = 1 << 20  # of a token, a CA and a CDI file
API_SECONDS = 5.0  # for a request and its answer
COMPARE_SECONDS = 50.0  # between two comparisons with the API server: what was deleted is back within 60 s
MIN_PUBLISH_SECONDS = 1.0  # between two changes of the slices: a loose contact must not keep the API server busy
SOCKET_LOOK_SECONDS = 1.0  # between two looks at the driver's sockets
_API = "/apis/resource.k8s.io/v1"
_UID = re.compile("[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")  # it becomes part of a file name
_OBJECT_NAME = re.compile("(?=.{1,253}$)[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?")  # it becomes part of a URL
_LABEL = re.compile("[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # of a device or a request, as the API server takes them
GONE = ":gone"  # ends the name of a CDI device that is gone: the runtime does not find the name that the kubelet has
UNEXPECTED = (LookupError, TypeError, ValueError, AttributeError, RecursionError)  # of reading JSON that is another


class ClaimedDevice(NamedTuple):
    """A device (slot) of a claim: as allocated, and once it is prepared, with what containers are given."""

    name: str  # in the slices
    requests: tuple[str, ...]  # of the claim
    is_admin: bool = False  # all of them have adminAccess: it takes the device from nobody
    resource: str = ""
    path: str = ""  # as people know it: /dev/video0
    edits: Document | None = None  # containerEdits of CDI
    problem: str = ""  # why no container may start with it: it is gone, say, and another may be in its place


class PreparedClaim(NamedTuple):
    """A ResourceClaim whose devices are prepared: the content of one CDI file."""

    uid: str
    namespace: str
    name: str
    devices: tuple[ClaimedDevice, ...] = ()

    @property
    def full_name(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def taken(self) -> set[str]:
        """The devices that no other claim may have."""
        return {device.name for device in self.devices if not device.is_admin}


def dns_label(text: str, limit: int) -> str:
    """TEXT as a DNS label of at most LIMIT characters; if something had to be changed, a hash keeps it unique."""
    label = re.sub("[^a-z0-9-]+", "-", text.lower()).strip("-")
    if label == text and len(label) <= limit and not re.search("-[0-9a-f]{8}$", label):
        return label
    return f"{label[: limit - 9].strip('-')}-{short_hash(text)}".lstrip("-")


def short_hash(text: str) -> str:
    """8 hex digits of the SHA-256 of TEXT."""
    import hashlib

    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def slots_by_device_name(plan: Plan) -> SlotsOfDra:
    """Every slot of PLAN by its device's name in the slices; if two resources have its path, the one that is there."""
    slots: dict[str, Slot] = {}
    for resource in plan.resources.values():
        labels = {device.path: dns_label(device.path, 63 - len("-9999")) for device in resource.devices}
        for slot in slots_of(resource):
            name = f"{labels[slot.device.path]}-{slot.number}"
            if not slot.device.problem or name not in slots:
                slots[name] = slot
    return slots


def slice_device(name: str, device: Slot | ClaimedDevice, domain: str, evicts: bool = False) -> Document:
    """DEVICE as the device NAME of a ResourceSlice: a slot, or a prepared device that is gone and not in the plan."""
    if isinstance(device, Slot):
        resource, found = device.resource, device.device
        values: Document = {"resource": resource.name, "path": device_path(found), "slot": device.number, **found.facts}
        values.update({"pool": resource.name} if resource.pool else {})
        values.update({"numaNode": found.numa[0]} if len(found.numa) == 1 else {})
        taint = "" if not found.problem else "gone" if found.is_gone else "unhealthy"
    else:  # DeviceClasses select by its resource
        values, taint = {"resource": device.resource, "path": device.path}, "gone"
    attributes: Document = {}
    for key, value in values.items():
        text = str(value).encode("utf-8", "backslashreplace")[:64].decode("utf-8", "ignore")  # a limit of the API
        attributes[key] = {"int": value} if isinstance(value, int) else {"string": text}
    effect = "NoExecute" if evicts else "NoSchedule"
    taints = {"taints": [{"key": f"{domain}/{taint}", "effect": effect}]} if taint else {}
    return {"name": name, "attributes": attributes, **taints}


SliceGroup = tuple[int, str]  # the devices of a slice: how many, and as JSON, which takes a tenth of the memory


def slice_name(node: str, domain: str, index: int) -> str:
    """The name of the slice INDEX of NODE, which is the same after a restart and unique in the cluster."""
    readable = f"{node}-{domain}"[:230].rstrip(".-")
    return f"{readable}-{short_hash(f'{node}/{domain}')}-{index}"


def resource_slices(domain: str, node: str, uid: str, generation: int, groups: list[SliceGroup]) -> Iterator[Document]:
    """The ResourceSlices of NODE, one per group of devices. The Node (UID) owns them, so they are deleted with it."""
    owner = {"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}
    pool = {"name": node, "generation": generation, "resourceSliceCount": len(groups)}
    for index, (_, devices) in enumerate(groups):
        spec = {"driver": domain, "nodeName": node, "pool": pool, "devices": json.loads(devices)}
        yield _api_object("ResourceSlice", slice_name(node, domain, index), spec, ownerReferences=[owner])


def device_class(domain: str, resource: str = "") -> Document:
    """The DeviceClass of all devices, or that of one RESOURCE, which a pod requests as it does with a device plugin."""
    name, expression = domain, f'device.driver == "{domain}"'
    spec: Document = {}
    if resource:
        name = f"{dns_label(resource, 63)}.{domain}"
        expression += f' && device.attributes["{domain}"].resource == "{resource}"'
        spec["extendedResourceName"] = f"{domain}/{resource}"
    spec["selectors"] = [{"cel": {"expression": expression}}]
    return _api_object("DeviceClass", name, spec)


def _api_object(kind: str, name: str, spec: Document, **metadata: object) -> Document:
    metadata.update(name=name, labels={"app.kubernetes.io/managed-by": "smarter-device-manager"})
    return {"apiVersion": "resource.k8s.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


class SliceCopy(NamedTuple):
    """What is kept of a ResourceSlice that the API server has."""

    version: str
    generation: int
    digest: int  # of what is to be as wanted: hash() of the number of slices and of its devices as JSON


def read_slice(item: Document) -> SliceCopy:
    """What is kept of the slice ITEM."""
    metadata, pool, devices = item["metadata"], item["spec"]["pool"], item["spec"].get("devices", [])
    for taint in (taint for device in devices for taint in device.get("taints", ())):
        taint.pop("timeAdded", None)  # which the API server adds
    digest = hash((pool["resourceSliceCount"], json.dumps(devices, sort_keys=True)))
    return SliceCopy(metadata.get("resourceVersion", ""), int(pool["generation"]), digest)


def read_slices(answer: Document, domain: str, node: str) -> tuple[dict[str, SliceCopy], str]:
    """The slices in ANSWER, a list, that are of the driver DOMAIN and of NODE, by name; and where the list goes on."""
    own = [item for item in answer["items"] if (item["spec"]["driver"], item["spec"].get("nodeName")) == (domain, node)]
    return {item["metadata"]["name"]: read_slice(item) for item in own}, answer["metadata"].get("continue", "")


def read_claim(document: Document, claim: PreparedClaim, domain: str, node: str) -> PreparedClaim | None:
    """CLAIM with the devices of the driver DOMAIN on NODE that it was allocated, each once for all of its requests;
    None if DOCUMENT is another claim of its name. Raises AllocationError, and one of UNEXPECTED if it is no claim."""
    if document["metadata"]["name"] != claim.name:
        raise ValueError("this is not the claim")
    if document["metadata"]["uid"] != claim.uid:
        return None
    results = document.get("status", {}).get("allocation", {}).get("devices", {}).get("results")
    if not results:
        raise AllocationError("FAILED_PRECONDITION", "the claim is not allocated")
    found: dict[str, ClaimedDevice] = {}
    for result in results:
        # That for a request's alternative (request/alternative) is one for the request, as it is for the kubelet.
        request, name = result["request"].partition("/")[0], result["device"]
        if result["driver"] == domain:
            if result["pool"] != node:
                raise AllocationError("NOT_FOUND", f"the claim's device {name} is not of this node")
            before = found.get(name, ClaimedDevice(name, (), is_admin=True))
            requests = tuple(dict.fromkeys((*before.requests, request)))
            found[name] = ClaimedDevice(name, requests, before.is_admin and result.get("adminAccess") is True)
    return claim._replace(devices=tuple(found.values()))


def prepare_devices(devices: Sequence[ClaimedDevice], slots: SlotsOfDra, host: HostDevices) -> list[ClaimedDevice]:
    """DEVICES with what containers are given for them now. A container gets all devices of a request, so they must not
    conflict and they share their env, like the slots of one Allocate. Raises AllocationError."""
    for device in devices:
        if device.name not in slots:
            raise AllocationError("UNAVAILABLE", f'this node offers no device "{device.name}"')
    prepared = []
    for device in devices:
        slot = slots[device.name]
        beside = [slots[other.name] for other in devices if not set(device.requests).isdisjoint(other.requests)]
        ids = [other.id for other in beside if other.resource.name == slot.resource.name]
        together, alone = host.allocate(slot.resource, [ids, [slot.id]])
        nodes = {  # of CDI, which names no link or folder
            path: {"path": path, "hostPath": host, "permissions": spec.permissions}
            for spec in alone.specs
            for host, path in spec.nodes
        }
        env = [f"{key}={value}" for key, value in sorted(together.env.items())]
        edits = {key: value for key, value in (("env", env), ("deviceNodes", list(nodes.values()))) if value}
        path = device_path(slot.device)
        prepared.append(device._replace(resource=slot.resource.name, path=path, edits=edits, problem=""))
    return prepared


def cdi_document(claim: PreparedClaim, domain: str) -> Document:
    """The CDI file of CLAIM; read_cdi_document() is its inverse."""
    devices = []
    for device in claim.devices:
        notes = {"request": ",".join(device.requests), "resource": device.resource, "path": device.path}
        notes.update({"admin-access": "true"} if device.is_admin else {})
        annotations = {f"{domain}/{key}": value for key, value in notes.items()}
        name = f"{claim.uid}-{device.name}" + (GONE if device.problem else "")
        devices.append({"name": name, "annotations": annotations, "containerEdits": device.edits})
    notes = {f"{domain}/claim-{key}": getattr(claim, key) for key in ("uid", "namespace", "name")}
    return {"cdiVersion": "0.6.0", "kind": f"{domain}/device", "annotations": notes, "devices": devices}


def read_cdi_document(document: Document, domain: str) -> PreparedClaim:
    """The claim of a CDI file of ours. Raises one of UNEXPECTED for any other file."""
    uid, namespace, name = (document["annotations"][f"{domain}/claim-{key}"] for key in ("uid", "namespace", "name"))
    if not all(map(_OBJECT_NAME.fullmatch, (namespace, name))) or not document["devices"]:
        raise ValueError("no claim with devices")
    devices = []
    for item in document["devices"]:
        notes = item["annotations"]
        request, resource, path = (str(notes[f"{domain}/{key}"]) for key in ("request", "resource", "path"))
        match = re.fullmatch(f"{re.escape(uid)}-({_LABEL.pattern})({GONE})?", item["name"])
        requests = tuple(request.split(","))
        if not match or not all(map(_LABEL.fullmatch, requests)):
            raise ValueError("no device of this claim")
        is_admin, edits = f"{domain}/admin-access" in notes, dict(item["containerEdits"].items())
        problem = Reason.GONE.template if match[2] else ""
        devices.append(ClaimedDevice(match[1], requests, is_admin, resource, path, edits, problem))
    return PreparedClaim(uid, namespace, name, tuple(devices))


class ApiError(Exception):
    """A request that failed: the reason in a sentence, and the HTTP status (0: no answer)."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


def parse_api_url(url: str) -> tuple[bool, str, int, str]:
    """Whether URL has TLS, its host, its port, and the prefix of each path. Raises ValueError for anything else, and
    for http:// to any host but a loopback address."""
    # Python raises UnicodeError for a host with an empty label or one of more than 63 characters.
    hosts = r"\[([0-9A-Fa-f:]{2,39}(?:\.[0-9]{1,3}){0,3})\]|([A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.?)"
    match = re.fullmatch(rf"(https?)://(?:{hosts})(?::([0-9]{{1,5}}))?(/[\w./~-]*)?", url)
    if not match or int(match[4] or 1) > 65535:
        raise ValueError(f'"{url}" is no URL such as https://10.96.0.1:443')
    is_tls, host = match[1] == "https", match[2] or match[3]
    if not is_tls and not re.fullmatch(r"localhost|::1|127(\.[0-9]{1,3}){3}", host):
        raise ValueError(f'"{url}" has no TLS: write https://; http:// is for a loopback address only')
    return is_tls, host, int(match[4] or (443 if is_tls else 80)), (match[5] or "").rstrip("/")


ApiAnswer = tuple[int, Any]  # the HTTP status, and the JSON in the body; None if that is none
Reader = Callable[[Document], Any]  # of such JSON


async def receive_answer(reader: asyncio.StreamReader, url: str) -> ApiAnswer:
    """The answer that READER gets from the API server at URL. Raises ApiError if it is no HTTP, or too long."""
    head, body, size = b"", bytearray(), 1
    with contextlib.suppress(EOFError, asyncio.LimitOverrunError):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
    match = re.match(rb"http/1\.[0-9] ([0-9]{3})\s", head)
    if not match:
        raise ApiError(f"what answers at {url} hung up, or speaks no HTTP")
    headers = dict(re.findall(rb"\r\n([a-z-]+): *([^\s;,]*)", head))
    try:
        if headers.get(b"transfer-encoding") != b"chunked":
            length = int(headers.get(b"content-length", sys.maxsize))
            body += await reader.readexactly(min(length, MAX_API_ANSWER + 1))
        else:
            while size and len(body) <= MAX_API_ANSWER:
                size = int((await reader.readuntil(b"\n")).partition(b";")[0], 16)
                body += (await reader.readexactly(min(size, MAX_API_ANSWER) + 2))[:size]
    except asyncio.IncompleteReadError as error:
        body += error.partial  # JSON says itself whether it is whole
    except (ValueError, asyncio.LimitOverrunError):
        body.clear()
    if len(body) > MAX_API_ANSWER:
        raise ApiError(f"the API server's answer is longer than {MAX_API_ANSWER} bytes")
    document = None
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(body) if body.count(b"{") + body.count(b"[") <= MAX_API_OBJECTS else None
    return int(match[1]), document


def api_problem(verb: str, path: str, status: int, message: str) -> str:
    """Why the API server refused VERB on PATH with STATUS and MESSAGE, in one sentence."""
    kind = re.sub(rf"^(?:/api/v1|{_API})(?:/namespaces/[^/]+)?/([a-z]+).*", r"\1", path)
    ending = f": {printable(message)[:MAX_SHOWN]}" if message else ""
    if status == 403:
        return f'the service account lacks the right "{verb}" on "{kind}" (403){ending}'
    if status == 404 and kind == "nodes":
        return f"there is no Node {path.rpartition('/')[2]} (404); --node-name names the Node"
    if status == 404 and verb in ("get", "list", "create"):
        return f"the API server has no resource.k8s.io/v1 (404), which Kubernetes has since 1.34{ending}"
    reasons = {401: "does not accept the token", 409: "has another version by now", 429: "limits requests"}
    return f"the API server {reasons.get(status, 'fails')} ({status}) to {verb} {kind}{ending}"


class ApiServer:
    """A client of the API server at URL. TLS is verified with the CA file, always; token and CA file are read per
    request. Requests are few, so each has its own connection. Raises ValueError for what is no URL of one."""

    NEXT_ADDRESS_SECONDS = 0.25  # before the next address of the API server's name is tried as well (RFC 8305)
    METHODS: Mapping[str, str] = {"get": "GET", "list": "GET", "create": "POST", "update": "PUT", "delete": "DELETE"}

    def __init__(self, url: str, token_file: str, ca_file: str) -> None:
        self.url = url
        self.requests: Counter[tuple[str, str]] = Counter()  # by verb and code
        self.problem = "no request has been sent yet"  # why the last request had no answer; empty: it had one
        self._is_tls, self._host, self._port, self._prefix = parse_api_url(url)
        self._token_file = token_file
        self._ca_file = ca_file

    async def call(
        self, verb: str, path: str, body: Document | None = None, read: Reader | None = None, none_if: int = 0
    ) -> Any:
        """What READ reads in the answer to VERB on PATH, its metadata if there is no READ, within 2 * API_SECONDS. None
        if its status is NONE_IF; if that is 404, the answer must name PATH's object: a load balancer without a backend,
        and an API server without resource.k8s.io/v1, answer 404, too. Raises ApiError, also if READ raises UNEXPECTED:
        the API server decides what runs on the node anyway, so READ may trust its answer."""
        status, document = await self._send(verb, path, body)
        if status == 401:  # the token was replaced while the request was on its way
            status, document = await self._send(verb, path, body)
        if 200 <= status < 300:
            try:
                return read(document) if read else document["metadata"]
            except UNEXPECTED:
                text = f"the API server's answer to {verb} {path.partition('?')[0]} is not one; is it an API server?"
                raise ApiError(text, status) from None
        message = missing = ""
        with contextlib.suppress(*UNEXPECTED):
            message = str(document.get("message", ""))
            if (document["kind"], document["reason"]) == ("Status", "NotFound"):
                missing = f"/{document['details']['kind']}/{document['details']['name']}"
        if status == none_if and (status != 404 or (missing and path.endswith(missing))):
            return None
        raise ApiError(api_problem(verb, path, status, message), status)

    async def _send(self, verb: str, path: str, body: Document | None) -> ApiAnswer:
        """Send one request, and count it. Raises ApiError."""
        code = "error"
        try:
            answer = await wait_bounded(self._exchange(self.METHODS[verb], path, body), API_SECONDS)
            code, self.problem = str(answer[0]), ""
            return answer
        except asyncio.TimeoutError:
            self.problem = f"the API server at {self.url} did not answer within {API_SECONDS:.0f} s"
        except (OSError, RuntimeError) as error:  # Python raises the latter if there can be no more threads
            number = getattr(error, "errno", None) or 0  # of ssl.SSLError, it is none of the system's, but has a reason
            reason = getattr(error, "reason", "") or (os.strerror(number) if number > 0 else str(error) or repr(error))
            problem = f"does not answer: {printable(reason)[:MAX_SHOWN]}"
            verify_message = getattr(error, "verify_message", "")  # of ssl.SSLCertVerificationError
            if verify_message:
                problem = f"has a certificate that is not signed by a CA in {self._ca_file}: {verify_message}"
            self.problem = f"the API server at {self.url} {problem}"
        except ApiError as error:
            self.problem = str(error)
        finally:
            self.requests[verb, code] += 1
        raise ApiError(self.problem)

    async def _exchange(self, method: str, path: str, body: Document | None) -> ApiAnswer:
        """One request and its answer. Raises ApiError and OSError."""
        data = b"" if body is None else json.dumps(body).encode()
        host = f"[{self._host}]" if ":" in self._host else self._host
        head = [f"{method} {self._prefix}{path} HTTP/1.1", f"Host: {host}:{self._port}"]
        head += ["Accept: application/json", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        head += ["Connection: close", f"User-Agent: smarter-device-manager/{__version__}"]
        tls = None
        if self._is_tls:
            tls, authorization = self._read_credentials()
            head.append(authorization)  # never without TLS: any process may listen on a loopback address
        reader, writer = await asyncio.open_connection(
            self._host, self._port, ssl=tls, happy_eyeballs_delay=self.NEXT_ADDRESS_SECONDS
        )
        try:
            writer.write("\r\n".join([*head, "", ""]).encode() + data)
            return await receive_answer(reader, self.url)
        finally:
            writer.transport.abort()

    def _read_credentials(self) -> tuple[ssl.SSLContext, str]:
        """What verifies the server, and the header with the token. Raises ApiError."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which verifies the certificate and the host's name
        # As a Go client does, take an intermediate CA alone for the CA that it is; Python knows the flag since 3.10.
        context.verify_flags |= getattr(ssl, "VERIFY_X509_PARTIAL_CHAIN", 0)
        try:
            context.load_verify_locations(cadata=_read_file(self._ca_file).decode("ascii", "ignore"))
            token = _read_file(self._token_file).strip()
        except (ssl.SSLError, ValueError):
            raise ApiError(f"the CA file {self._ca_file} holds no certificate") from None
        except OSError as error:
            raise ApiError(f"cannot read {error.filename}: {error.strerror}") from None
        if not re.fullmatch(b"[!-~]+", token):
            raise ApiError(f"the token file {self._token_file} holds no token")
        return context, f"Authorization: Bearer {token.decode()}"


def _read_file(path: str) -> bytes:
    """The content of the file at PATH, up to MAX_FILE_BYTES. Raises OSError."""
    with open(path, "rb", opener=_open_at_once) as file:
        return file.read(MAX_FILE_BYTES) or b""  # None: a FIFO whose writer has written nothing


class CdiFiles:
    """The CDI files of the driver DOMAIN in FOLDER, one per prepared claim. Other files are left alone. Beside each is
    a link whose target is the claim's namespace and name: if the file is lost, the API server can be asked what the
    claim holds, since the kubelet does not prepare the claim of a running pod a second time."""

    def __init__(self, folder: str, domain: str) -> None:
        self._folder = folder
        self._domain = domain

    def paths(self, uid: str) -> tuple[str, str, str]:
        """The paths of the file of the claim UID, of the link beside it, and of the file while it is written. No domain
        has an underscore, so they are no other driver's."""
        name = f"{self._domain}_{uid}"
        return f"{self._folder}/{name}.json", f"{self._folder}/.{name}.claim", f"{self._folder}/.{name}.new"

    def uids(self) -> set[str]:
        """The claims of which there is a file or a link. Raises OSError."""
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # write() makes the folder, or says why not
            names = os.listdir(self._folder)
        pattern = rf"(\.)?{re.escape(self._domain)}_({_UID.pattern})\.(?(1)claim|json)"
        return {match[2] for match in (re.fullmatch(pattern, name) for name in names) if match}

    def owner(self, uid: str) -> PreparedClaim | None:
        """The claim UID without its devices, as the link names it."""
        with contextlib.suppress(OSError):
            namespace, _, name = os.readlink(self.paths(uid)[1]).partition("/")
            if all(map(_OBJECT_NAME.fullmatch, (namespace, name))):
                return PreparedClaim(uid, namespace, name)
        return None

    def read(self, uid: str) -> PreparedClaim:
        """The claim of the file of UID. Raises OSError, and one of UNEXPECTED."""
        claim = read_cdi_document(json.loads(_read_file(self.paths(uid)[0])), self._domain)
        if claim.uid != uid:
            raise ValueError("it is the file of another claim")
        return claim

    def write(self, claim: PreparedClaim) -> bool:
        """Have the file of CLAIM hold what it should; whether it had to be written. Raises OSError."""
        content = json.dumps(cdi_document(claim, self._domain)).encode()
        if self._holds(claim, content):
            return False
        if len(content) > MAX_FILE_BYTES:
            text = f"it would have {len(content)} bytes, and more than {MAX_FILE_BYTES} are not read again"
            raise OSError(errno.EFBIG, text)
        os.makedirs(self._folder, 0o755, exist_ok=True)
        path, link, temporary = self.paths(claim.uid)
        _unlink(temporary)  # of a crash
        write_file(path, temporary, content, 0o644, is_synced=True)
        _unlink(link)
        os.symlink(claim.full_name, link)
        if not self._holds(claim, content):
            raise OSError(errno.EIO, "it does not hold what was written just now")
        return True

    def remove(self, uid: str) -> None:
        """Remove the file of the claim UID. Raises OSError."""
        for path in reversed(self.paths(uid)):  # the file, which says all, goes last
            _unlink(path)

    def _holds(self, claim: PreparedClaim, content: bytes) -> bool:
        """Whether file and link of CLAIM are there, the file with this CONTENT."""
        path, link, _ = self.paths(claim.uid)
        with contextlib.suppress(OSError):
            return os.readlink(link) == claim.full_name and _read_file(path) == content
        return False


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


class Claims:
    """The claims that are prepared on this node: prepares and unprepares them, and keeps their CDI files. Between
    open() and close(), this instance alone serves the driver, and takes up what others have left. Belongs to a loop."""

    PREPARE_SECONDS = 20.0  # the kubelet waits for 45 s, and after an error it asks again only 60 to 90 s later
    RETRY_SECONDS = 1.0  # before the next try to prepare a claim
    LOG_SECONDS = 1.0  # between two groups of lines about CDI files that were written again
    # A pod that was deleted by force still has its device, though its claim is gone, until the kubelet has ended its
    # containers, for which they have 30 s by default. A kubelet that remembers the claim unprepares it then.
    GONE_SECONDS = 30.0

    def __init__(self, options: argparse.Namespace, api: ApiServer, host: HostDevices) -> None:
        self.prepared: dict[str, PreparedClaim] = {}  # by uid, as all of these are
        self.allocations: Counter[str] = Counter()  # slots that were prepared, by resource
        self._plan = EMPTY_PLAN
        self._slots: SlotsOfDra = {}  # those of the plan
        self.lost: dict[str, ClaimedDevice] = {}  # prepared devices that are gone and not in the plan, by name
        self._is_open = self._is_stale = False  # it is stale if what is prepared is to be derived again
        self._unread: dict[str, set[str] | None] = {}  # files that cannot be read: their devices; None: unknown
        self._doubts: dict[str, float | None] = {}  # claims that may be gone: time.monotonic() of the first 404
        self._rewrites: Counter[str] = Counter()  # CDI files that were written again, which is not logged yet, by claim
        self._logged_at = -math.inf  # time.monotonic() when such were logged last
        self._options = options
        self._api = api
        self._host = host
        self._files = CdiFiles(options.cdi_dir, options.domain)
        self._change: asyncio.Future[None]  # done when what may have kept a claim from being prepared has changed

    def open(self) -> None:
        """Take up what CDI files say, which another instance may have changed. Raises OSError."""
        self._change = asyncio.get_running_loop().create_future()
        self._is_open = self._is_stale = True
        self.prepared, self._unread, self._doubts = {}, {}, {}
        self._take_up()

    def close(self) -> None:
        """End what waits. From now on, another instance may serve."""
        if self._is_open:
            self._is_open = False
            self._notify()

    def look(self, plan: Plan, slots: SlotsOfDra) -> None:
        """Have what is prepared follow from PLAN, its SLOTS and /dev (of devices that are not offered, the plan says
        nothing), and the CDI files from that, whoever has changed them."""
        if not self._is_open:
            return
        is_changed = self._is_stale or plan is not self._plan
        self._is_stale, self._plan, self._slots, self.lost = False, plan, slots, {}
        for claim in list(self.prepared.values()):
            try:
                self._rewrite(claim, is_changed)
            except AllocationError:
                self._is_stale = True  # it went just now
            except OSError as error:
                self._log_not_written(claim, error)
        if self._rewrites and time.monotonic() - self._logged_at >= self.LOG_SECONDS:
            self._logged_at = time.monotonic()
            for name, count in self._rewrites.items():
                text = "a prepared device, or this file, went, came back or changed"
                text += f" ({count} times since its last line)" if count > 1 else ""
                log_event("cdi-file-rewritten", text, claim=name)
            self._rewrites.clear()
        if is_changed:
            self._notify()

    async def check(self) -> float:
        """Ask the API server about claims that may be gone; after how many seconds to ask again. Raises ApiError."""
        for uid in list(self._doubts):
            await self._check(uid)
        ends = [since + self.GONE_SECONDS - time.monotonic() for since in self._doubts.values() if since]
        return min(end for end in (*ends, COMPARE_SECONDS) if end > 0)

    async def prepare(self, claim: PreparedClaim, end: float) -> PreparedClaim:
        """Prepare the devices of CLAIM, and wait until END, of time.monotonic(), for what keeps it from being prepared.
        Raises AllocationError, ApiError and OSError."""
        if not _UID.fullmatch(claim.uid) or not all(map(_OBJECT_NAME.fullmatch, (claim.namespace, claim.name))):
            raise AllocationError("INVALID_ARGUMENT", "the claim's uid, namespace or name is not one")
        allocated: PreparedClaim | None = None
        checked: set[str] = set()  # the claims that have its devices
        problem: AllocationError | ApiError = ApiError("the API server does not answer")
        while True:
            change = self._change
            try:
                self._take_up()
                before = self.prepared.get(claim.uid)
                if before:
                    before = self._rewrite(before)
                    for device in before.devices:
                        if device.problem:
                            raise AllocationError("UNAVAILABLE", f"{device.path}: {device.problem}")
                    return before
                allocated = allocated or await wait_bounded(self._read(claim), end - time.monotonic())
                if not allocated:
                    text = f"the API server has no claim {claim.full_name} with the uid {claim.uid}"
                    raise AllocationError("NOT_FOUND", text)
                for uid in self._holders(allocated).keys() - checked:
                    checked.add(uid)
                    with contextlib.suppress(ApiError, asyncio.TimeoutError):
                        await wait_bounded(self._check(uid), end - time.monotonic())
                return self._prepare(allocated)
            except asyncio.TimeoutError:
                raise problem from None
            except AllocationError as error:
                problem, may_pass = error, error.code == "UNAVAILABLE"
            except ApiError as error:
                problem, may_pass = error, not 400 <= error.status < 500 or error.status in (404, 408, 429)
            if not may_pass or time.monotonic() >= end:
                raise problem
            await asyncio.wait([change], timeout=min(self.RETRY_SECONDS, end - time.monotonic()))

    def unprepare(self, uid: str, why: str = "its pod has ended") -> str:
        """Remove the CDI file of the claim UID, of which WHY is logged; why that failed, or an empty text."""
        try:
            self._take_up()
            claim = self.prepared.get(uid)
            if claim or uid in self._unread:
                self._files.remove(uid)
                log_event("unprepared", why, claim=claim.full_name if claim else uid)
        except AllocationError as error:
            return str(error)
        except OSError as error:
            return f"cannot remove {self._files.paths(uid)[0]}: {error.strerror}"
        board.set(uid, "")
        for memory in (self.prepared, self._unread, self._doubts):
            memory.pop(uid, None)
        self._notify()
        return ""

    def _prepare(self, claim: PreparedClaim) -> PreparedClaim:
        """Prepare CLAIM, as it was allocated. Raises AllocationError and OSError."""
        self._take_up()
        for problem in self._holders(claim).values():
            raise AllocationError("UNAVAILABLE", problem)
        claim = claim._replace(devices=tuple(prepare_devices(claim.devices, self._slots, self._host)))
        if claim.devices:
            self._files.write(claim)
            self.prepared[claim.uid] = claim
            self._unread.pop(claim.uid, None)
            self.allocations.update(device.resource for device in claim.devices)
            names = join_names([device.name for device in claim.devices])
            log_event("prepared", "prepared for a pod", claim=claim.full_name, devices=names)
        return claim

    def _rewrite(self, claim: PreparedClaim, is_changed: bool = True) -> PreparedClaim:
        """Bring the prepared CLAIM and its file up to date with the plan, which IS_CHANGED or not, and /dev. A device
        that new pods are not offered any more stays as it was. Raises AllocationError and OSError."""
        followed = [(device, *self._follow(device)) for device in claim.devices]
        self.lost.update((device.name, device) for device, slot, problem in followed if problem and not slot)
        if is_changed or any(device.problem != problem for device, _, problem in followed):
            offered = [device for device, slot, _ in followed if slot and not slot.device.problem]
            fresh = {device.name: device for device in prepare_devices(offered, self._slots, self._host)}
            devices = (fresh.get(old.name, old._replace(problem=problem)) for old, _, problem in followed)
            claim = self.prepared[claim.uid] = claim._replace(devices=tuple(devices))
        if self._files.write(claim):
            self._rewrites[claim.full_name] += 1
            board.set(claim.uid, "")
        return claim

    def _log_not_written(self, claim: PreparedClaim, error: AllocationError | OSError) -> None:
        text = f"cannot write {self._files.paths(claim.uid)[0]}: {getattr(error, 'strerror', error)}"
        board.set(claim.uid, text, "cdi-file-not-rewritten", claim=claim.full_name)

    def _follow(self, device: ClaimedDevice) -> tuple[Slot | None, str]:
        """The slot of the plan that DEVICE is, if there is one; and why no container may start with it, if none may: it
        or a companion is gone, or another one is in its place. One that was gone is back only if a rule chooses it."""
        resource, slot = self._plan.resources.get(device.resource), self._slots.get(device.name)
        found = next((own for own in (resource.devices if resource else ()) if device_path(own) == device.path), None)
        # Rules by attributes tell sticks apart: if it was gone, what another resource has at its path is another one.
        if not found and slot and not (device.problem and slot.device.chosen_by):
            found = slot.device
        if found:
            return slot if slot and slot.device is found else None, "" if found.specs else found.problem
        if device.path.startswith("/dev/") and not os.path.exists(self._options.dev_dir + device.path[len("/dev") :]):
            return None, Reason.GONE.template
        return None, Reason.SWAPPED.template if device.problem else ""

    def _holders(self, claim: PreparedClaim) -> dict[str, str]:
        """The other claims that take, or may take, devices of CLAIM: by uid, a sentence that says so."""
        found = {}
        for other in self.prepared.values():
            for name in claim.taken & other.taken:
                found[other.uid] = f"{name} is still prepared for the claim {other.full_name} (uid {other.uid})"
        for uid, taken in self._unread.items():
            if claim.taken if taken is None else claim.taken & taken:
                path = self._files.paths(uid)[0]
                found[uid] = f"{path} cannot be read, and its claim may have this device; its pod's end frees it"
        found.pop(claim.uid, None)
        return found

    async def _read(self, claim: PreparedClaim) -> PreparedClaim | None:
        """CLAIM with what it was allocated; None if there is no such claim. Raises ApiError and AllocationError."""
        path = f"{_API}/namespaces/{claim.namespace}/resourceclaims/{claim.name}"
        read = functools.partial(read_claim, claim=claim, domain=self._options.domain, node=self._options.node_name)
        found: PreparedClaim | None = await self._api.call("get", path, read=read, none_if=404)
        return found

    def _take_up(self) -> None:
        """Take up the CDI files that this instance has not written: one that does not know yet that this one serves
        may have written them at any time. Raises OSError, and AllocationError once closed."""
        if not self._is_open:
            text = "this instance of the driver has ended; the next one will do it"  # and must know of it
            raise AllocationError("FAILED_PRECONDITION", text)
        uids = self._files.uids()
        self._unread = {uid: taken for uid, taken in self._unread.items() if uid in uids}  # others were removed
        for uid in uids - self.prepared.keys():
            self._doubts.setdefault(uid, None)
            try:
                self.prepared[uid] = self._files.read(uid)
                self._unread.pop(uid, None)
            except (OSError, *UNEXPECTED) as error:
                if uid not in self._unread:
                    self._unread[uid], why = None, getattr(error, "strerror", error)
                    text = f"this CDI file cannot be read, so no device is given that its claim may have: {why}"
                    log_event("cdi-file-unreadable", text, logging.WARNING, file=self._files.paths(uid)[0])

    async def _check(self, uid: str) -> None:
        """Drop the claim UID if the API server has said GONE_SECONDS ago, too, that it does not exist. If it does, and
        its file cannot be read, write the file. Raises ApiError."""
        claim = self.prepared.get(uid) or self._files.owner(uid)
        if not claim:
            return
        try:
            allocated = await self._read(claim)
            if allocated is None:  # an API server without slices has no claims either
                await self._api.call("list", f"{_API}/resourceslices?limit=1", read=lambda document: document["items"])
                since = self._doubts[uid] = self._doubts.get(uid) or time.monotonic()
                if self._is_open and time.monotonic() - since >= self.GONE_SECONDS:
                    problem = self.unprepare(uid, "the API server has no such claim any more")
                    board.set(uid, problem, "cdi-file-not-removed", claim=claim.full_name)
                return
            self._doubts[uid] = None
            if uid in self._unread:
                self._unread[uid] = allocated.taken
                self._prepare(allocated)
                self._notify()
            del self._doubts[uid]
        except (AllocationError, OSError) as error:
            if uid in self._unread:
                self._log_not_written(claim, error)

    def _notify(self) -> None:
        """Wake the claims that wait."""
        self._change.set_result(None)
        self._change = self._change.get_loop().create_future()


class Publisher:
    """Keeps the ResourceSlices of NODE and the DeviceClasses on the API server as they are wanted. Belongs to a loop.
    All slices carry one generation, so they are written together or not at all: not if the server already has them, as
    written or as it changed them. The classes, and CHECK_CLAIMS, are tasks of their own: with many resources, or if no
    class can be made, a lost device is tainted all the same."""

    SLICES_AT_ONCE = 16  # in an answer, of up to 100 KB and 1,500 objects each
    MAX_GENERATION = (1 << 63) - 1  # of a pool; the API has it as int64
    CLASS_SECONDS = 600.0  # between two looks at a DeviceClass
    MAX_BACKOFF_SECONDS = 60.0

    def __init__(self, api: ApiServer, node: str, domain: str, check_claims: Callable[[], Awaitable[float]]) -> None:
        self.published: list[SliceGroup] = []  # as they were wanted
        self.published_at = 0.0  # time.time() when the slices were last found or made as wanted
        self._api = api
        self._node = node
        self._domain = domain
        self._wanted: list[SliceGroup] = []
        self._resources: Sequence[str] = ()
        self._copies: dict[str, SliceCopy] = {}  # what was published, by name
        self._made: dict[str, float] = {}  # time.monotonic() when each class was last found or made, by name
        # By subject: each does its work, and returns after how many seconds to do it again. Raises ApiError.
        self._work = {"slices": self._publish_slices, "classes": self._make_classes, "claims": check_claims}
        self._changes: dict[str, asyncio.Event] = {}  # by subject, while it runs: there is work to do

    @property
    def problem(self) -> str:
        """Why not everything is published; empty if it is."""
        problem = next(filter(None, map(board.get, self._work)), "")
        return f"not published: {problem}" if problem else "" if self.published_at else "not published yet"

    def want(self, devices: Iterable[Document], resources: Sequence[str]) -> None:
        """Have the slices hold DEVICES, and a class for each of RESOURCES, from now on."""
        rest = iter(devices)
        groups = iter(lambda: list(itertools.islice(rest, MAX_SLICE_DEVICES)), [])
        self._wanted = [(len(group), json.dumps(group, sort_keys=True)) for group in groups]
        self._resources = resources
        self.refresh()

    def refresh(self) -> None:
        """Compare with the API server now, also after a failure: a kubelet that has started deleted the slices."""
        for change in self._changes.values():
            change.set()

    async def run(self) -> None:
        """Publish until cancelled."""
        self._changes = {subject: asyncio.Event() for subject in self._work}
        try:
            await asyncio.gather(*map(self._repeat, self._work))
        finally:
            self.published, self.published_at = [], 0.0

    async def _repeat(self, subject: str) -> None:
        """Do the work of SUBJECT again and again, and soon again after a failure."""
        change, backoff = self._changes[subject], Backoff(self.MAX_BACKOFF_SECONDS)
        while True:
            change.clear()
            try:
                pause, problem = await self._work[subject](), ""
                backoff.reset()
            except ApiError as error:
                backoff.fail(time.monotonic())
                pause, problem = backoff.retry_at - time.monotonic(), f"{error}; trying again"
            if board.set(subject, problem, "not-published") and not problem:
                log_event("published-again", "publishing works again")
            await asyncio.sleep(MIN_PUBLISH_SECONDS)
            with contextlib.suppress(asyncio.TimeoutError):
                await wait_bounded(change.wait(), pause - MIN_PUBLISH_SECONDS)

    async def _publish_slices(self) -> float:
        """Make the slices what is wanted. They are listed a few at a time."""
        query = f"fieldSelector=spec.nodeName%3D{self._node}%2Cspec.driver%3D{self._domain}&limit={self.SLICES_AT_ONCE}"
        read = functools.partial(read_slices, domain=self._domain, node=self._node)
        wanted, (copies, rest) = self._wanted, await self._api.call("list", f"{_API}/resourceslices?{query}", read=read)
        while rest:
            more, rest = await self._api.call("list", f"{_API}/resourceslices?{query}&continue={rest}", read=read)
            copies.update(more)
        if copies != self._copies or wanted != self.published:  # if the former, somebody else has changed them
            await self._replace(copies, wanted)
        self.published, self._copies, self.published_at = wanted, copies, time.time()
        return COMPARE_SECONDS

    async def _replace(self, copies: dict[str, SliceCopy], wanted: list[SliceGroup]) -> None:
        """Unless COPIES are the WANTED slices: write every slice, in a new generation, and delete all others. COPIES is
        brought up to date."""
        names = [slice_name(self._node, self._domain, index) for index in range(len(wanted))]
        digests = {name: hash((len(wanted), devices)) for name, (_, devices) in zip(names, wanted)}
        generations = {copy.generation for copy in copies.values()}
        if len(generations) <= 1 and {name: copy.digest for name, copy in copies.items()} == digests:
            return
        generation = 1 + max(generations, default=0)
        path, surplus = f"{_API}/resourceslices", copies.keys() - digests.keys()
        if generation > self.MAX_GENERATION:  # one of somebody else, say
            generation, surplus = 1, set(copies)
        node = await self._api.call("get", f"/api/v1/nodes/{self._node}")
        for name in surplus:
            await self._api.call("delete", f"{path}/{name}")
            del copies[name]
        for body in resource_slices(self._domain, self._node, node["uid"], generation, wanted):
            name, verb, place = body["metadata"]["name"], "create", path
            if name in copies:
                body["metadata"]["resourceVersion"] = copies[name].version
                verb, place = "update", f"{path}/{name}"
            copies[name] = await self._api.call(verb, place, body, read=read_slice)
        devices, slices = sum(count for count, _ in wanted), pluralize(len(wanted), "ResourceSlice")
        log_event("published", f"published {pluralize(devices, 'device')} in {slices}", generation=generation)

    async def _make_classes(self) -> float:
        """Make the missing DeviceClasses. Others use them too, so none is changed."""
        path = f"{_API}/deviceclasses"
        for body in (device_class(self._domain, resource) for resource in ("", *self._resources)):
            name = body["metadata"]["name"]
            if time.monotonic() - self._made.get(name, -math.inf) < self.CLASS_SECONDS:
                continue
            is_missing = await self._api.call("get", f"{path}/{name}", none_if=404) is None
            if is_missing and await self._api.call("create", path, body, none_if=409):
                log_event("class-made", "made a DeviceClass", name=name)  # with 409, another node has just made it
            self._made[name] = time.monotonic()
        return self.CLASS_SECONDS


def dra_sockets(options: argparse.Namespace) -> tuple[str, str]:
    """The paths of the driver's own socket, in its own folder, and of the one by which the kubelet registers it."""
    folder, name = options.kubelet_dir, options.domain  # which is the driver's name
    return f"{folder}/plugins/{name}/dra.sock", f"{folder}/plugins_registry/{name}-reg.sock"


# The services that the kubelet calls, https://github.com/kubernetes/kubelet (pluginregistration/v1 and dra/v1): each
# method with its service and the names of its messages in api.proto.
PLUGIN_REGISTRATION, DRA_PLUGIN = "pluginregistration.Registration", "k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin"
DRA_METHODS: Mapping[str, tuple[str, str, str]] = {
    "GetInfo": (PLUGIN_REGISTRATION, "InfoRequest", "PluginInfo"),
    "NotifyRegistrationStatus": (PLUGIN_REGISTRATION, "RegistrationStatus", "RegistrationStatusResponse"),
    "NodePrepareResources": (DRA_PLUGIN, "NodePrepareResourcesRequest", "NodePrepareResourcesResponse"),
    "NodeUnprepareResources": (DRA_PLUGIN, "NodeUnprepareResourcesRequest", "NodeUnprepareResourcesResponse"),
}


class DraPlugin:
    """The services that the kubelet calls, and whether it has the driver. ON_REGISTRATION is called after each one."""

    def __init__(self, options: argparse.Namespace, claims: Claims, on_registration: Callable[[], None]) -> None:
        self.full_name: str = options.domain
        self.is_registered = False  # says the kubelet, and it has not ended since
        self.registrations = self.restarts = self.prepare_errors = 0
        self._options = options
        self._claims = claims
        self._on_registration = on_registration
        self._served_since = math.inf
        self._kubelet: Identity | None = None  # of the socket of the kubelet that answered last
        self._registrar: Identity | None = None  # the same of the one that registered the driver, once it answers

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve the services on SERVER."""
        for method, (service, request, response) in DRA_METHODS.items():
            read, write = getattr(pb, request).FromString, getattr(pb, response).SerializeToString
            handler = grpc.unary_unary_rpc_method_handler(getattr(self, method), read, write)
            server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])

    def note_sockets(self, are_served: bool) -> None:
        """From now on, the kubelet finds the sockets, or does not."""
        self._served_since = time.monotonic() if are_served else math.inf
        self.is_registered = False
        if are_served:
            board.set("driver", "")

    def check_kubelet(self) -> None:
        """Notice that the kubelet has ended, and whether another one is there, which is to register the driver."""
        path = self._options.pod_resources_socket
        error = connect_error(path)
        if error and error.errno in SCARCE:  # this says nothing about the kubelet
            return
        kubelet = None if error else socket_identity(path)
        if kubelet:
            self.restarts += self._kubelet not in (None, kubelet)
            self._kubelet = kubelet
        if self.is_registered and self._registrar in (None, kubelet):  # None: it never answered on its socket
            self._registrar = kubelet
            board.set("driver", "")
        elif self.is_registered:
            self.is_registered = False
            board.set("driver", f"the kubelet no longer answers on {path}; waiting for it", "kubelet-gone")
        elif time.monotonic() - self._served_since > REGISTER_SECONDS and not board.get("driver"):
            board.set("driver", "the kubelet has not registered the driver; waiting for it", "kubelet-gone")

    @answered
    async def GetInfo(self, request: pb.InfoRequest, context: grpc.aio.ServicerContext) -> pb.PluginInfo:
        names = {"type": "DRAPlugin", "name": self.full_name, "endpoint": dra_sockets(self._options)[0]}
        return pb.PluginInfo(**names, supported_versions=["v1.DRAPlugin"])

    @answered
    async def NotifyRegistrationStatus(
        self, request: pb.RegistrationStatus, context: grpc.aio.ServicerContext
    ) -> pb.RegistrationStatusResponse:
        self.is_registered, self._registrar = request.plugin_registered, None
        if self.is_registered:
            self.registrations += 1
            log_event("registered", "registered with the kubelet", driver=self.full_name)
        else:
            board.set("driver", f"the kubelet refused the driver: {request.error[:MAX_SHOWN]}", "refused")
        self.check_kubelet()
        self._on_registration()
        return pb.RegistrationStatusResponse()

    @answered
    async def NodePrepareResources(
        self, request: pb.NodePrepareResourcesRequest, context: grpc.aio.ServicerContext
    ) -> pb.NodePrepareResourcesResponse:
        end = time.monotonic() + self._claims.PREPARE_SECONDS
        claims = [PreparedClaim(claim.uid, claim.namespace, claim.name) for claim in request.claims]
        answers = await asyncio.gather(*(self._claims.prepare(claim, end) for claim in claims), return_exceptions=True)
        response = pb.NodePrepareResourcesResponse()
        for claim, prepared in zip(claims, answers):
            entry = response.claims[claim.uid]
            if isinstance(prepared, PreparedClaim):
                board.set(claim.uid, "")
                for device in prepared.devices:
                    cdi_id = f"{self.full_name}/device={claim.uid}-{device.name}"
                    names = {"pool_name": self._options.node_name, "device_name": device.name}
                    entry.devices.add(**names, request_names=device.requests, cdi_device_ids=[cdi_id])
            elif isinstance(prepared, (AllocationError, ApiError, OSError)):
                why = f"cannot write a CDI file: {prepared.strerror}" if isinstance(prepared, OSError) else prepared
                entry.error = printable(f"{self.full_name}: {why}")  # protobuf takes no lone surrogate, JSON has them
                self.prepare_errors += 1
                name = claim.full_name[:MAX_SHOWN]
                board.set(claim.uid[:MAX_SHOWN], f"Prepare refused: {why}", "refused", claim=name)
            else:
                raise prepared
        return response

    @answered
    async def NodeUnprepareResources(
        self, request: pb.NodeUnprepareResourcesRequest, context: grpc.aio.ServicerContext
    ) -> pb.NodeUnprepareResourcesResponse:
        response = pb.NodeUnprepareResourcesResponse()
        for uid in (claim.uid for claim in request.claims):
            problem = self._claims.unprepare(uid)
            response.claims[uid].error = f"{self.full_name}: {problem}" if problem else ""
        return response


class DraSide(KubeletSide):
    """Offers a plan's resources through Dynamic Resource Allocation: serves the sockets while it has their lease."""

    def __init__(
        self, options: argparse.Namespace, host: HostDevices, loop: asyncio.AbstractEventLoop, max_silence: float
    ) -> None:
        folders = [*map(os.path.dirname, dra_sockets(options)), options.cdi_dir]
        super().__init__(loop, max_silence, options.domain, folders, Watch(options.cdi_dir, with_content=True))
        self.calm_pause = min(self.calm_pause, SOCKET_LOOK_SECONDS)
        self._options = options
        self._api = ApiServer(options.kube_api, options.kube_token_file, options.kube_ca_file)
        self._claims = Claims(options, self._api, host)
        self._publisher = Publisher(self._api, options.node_name, self.domain, self._claims.check)
        self._plugin = DraPlugin(options, self._claims, self._publisher.refresh)
        self._plan: Plan | None = None
        self._gone_since: dict[str, float] = {}  # time.monotonic(), by name of a device in the slices
        self._wanted_from: tuple[object, ...] = ()  # what the slices were last derived from
        self._is_standby = False  # another instance serves the driver
        self._leases = Leases(f"{self.plugin_dir}/driver.lock")
        self._servers: list[UnixServer] = []
        self._publishing: asyncio.Task[None] | None = None  # while the driver is served

    @property
    def is_answering(self) -> bool:
        return True  # nothing waits for a kubelet, which registers the driver by itself

    async def _check(self) -> None:
        """Check the driver's sockets, that of the kubelet, and the CDI files, and publish what is offered, and the
        prepared devices that are gone and not offered. If another device has the name of one by now, it must wait."""
        if not self._plan:  # until then, nobody knows what to publish
            return
        await self._check_sockets()
        self._plugin.check_kubelet()
        self._claims.look(self._plan, self.slots)
        before, lost, now = self._gone_since, self._claims.lost, time.monotonic()
        self._gone_since = {name: slot.device.since for name, slot in self.slots.items() if slot.device.is_gone}
        self._gone_since.update((name, before.get(name, now)) for name in lost)
        evicted = {name for name, since in self._gone_since.items() if now - since >= self._options.gone_grace}
        wanted_from = (self._plan, set(lost), evicted)  # a copy: Prepare may add to those that are lost
        if wanted_from != self._wanted_from:
            self._wanted_from = wanted_from
            wanted: dict[str, Slot | ClaimedDevice] = {**self.slots, **lost}
            devices = (slice_device(name, device, self.domain, name in evicted) for name, device in wanted.items())
            self._publisher.want(devices, list(self._plan.resources))

    def apply(self, plan: Plan) -> None:
        """Publish PLAN, and have the CDI files name the nodes that their devices have now."""
        self._plan, self.slots = plan, slots_by_device_name(plan)
        self.check_now()

    @property
    def problem(self) -> str:
        """Why pods cannot be given every device that is offered; empty if they can."""
        return self._publisher.problem if self._plugin.is_registered else unready_text(board.get("driver"))

    def describe_registration(self, name: str) -> Document:
        state = {"ready": not self.problem, "served_by_other": self._is_standby, "trouble": self.problem}
        counts = {"allocations": self._claims.allocations[name], "registrations": self._plugin.registrations}
        return {**NOT_REGISTERED, **state, **counts}

    def describe(self) -> Document:
        api, plugin, publisher = self._api, self._plugin, self._publisher
        dra = {
            "problem": self.problem,
            "registered": plugin.is_registered,
            "socket": dra_sockets(self._options)[0],
            "slices": len(publisher.published),
            "slice_devices": sum(count for count, _ in publisher.published),
            "published_at_seconds": publisher.published_at,
            "api_server": api.url,
            "api_reachable": not api.problem,
            "api_requests": [{"verb": verb, "code": code, "count": n} for (verb, code), n in api.requests.items()],
            "claims_prepared": len(self._claims.prepared),
            "claims": [
                {"namespace": claim.namespace, "name": claim.name, "devices": [device.path for device in claim.devices]}
                for claim in self._claims.prepared.values()
            ],
            "prepare_errors": plugin.prepare_errors,
        }
        kubelet = {"answering": plugin.is_registered, "restarts": plugin.restarts, "plugin_dir": self.plugin_dir}
        return {"kubelet": kubelet, "dra": dra}

    async def _check_sockets(self) -> None:
        """Serve the driver unless another instance does, and serve it again if a socket file was replaced."""
        if any(server.is_lost() for server in self._servers):
            board.set("driver", "a socket file of the driver was deleted or replaced", "stream-lost")
            await self._end()
        if self._servers:
            return
        sockets, self._is_standby = dra_sockets(self._options), False
        problem = f"another instance serves the driver {self.domain}; waiting for its end"
        try:
            for path in sockets:
                os.makedirs(os.path.dirname(path), 0o750, exist_ok=True)
            self._is_standby = not all(map(self._leases.take, sockets))
            if not self._is_standby:
                for path in sockets:
                    self._servers.append(UnixServer(path, self._plugin.add_to))
                    await self._servers[-1].start()
                    self._servers[-1].publish()
                # Nothing is awaited from here on until all is checked; only then are the kubelet's calls answered.
                self._claims.open()
                self._plugin.note_sockets(True)
                self._publishing = asyncio.ensure_future(self._publisher.run())
                self._publishing.add_done_callback(self._fail_with)
                return
        except OSError as error:
            problem = f"cannot serve in {error.filename or self._options.kubelet_dir}: {error.strerror}"
        await self._end()
        board.set("driver", problem, "not-served")

    async def _end(self) -> None:
        """Stop to serve and to publish. The slices stay for the next instance, which may serve before this returns."""
        self._plugin.note_sockets(False)
        self._claims.close()
        if self._publishing:
            self._publishing.cancel()
            await asyncio.wait([self._publishing])
        servers, self._servers, self._publishing = self._servers, [], None
        await asyncio.gather(*(server.stop() for server in reversed(servers)))
        self._leases.close()


# ---------------------------------------------------------------------------------------------------------------------
# Status: what is offered, what is in use and what is wrong, as one document (JSON). Tables, metrics and the page are
# pure renderers of that document; a small server comes last. The document's keys, the names of the metrics and the
# paths of the server are a public interface. A new metric is one more line of FAMILIES.
# ---------------------------------------------------------------------------------------------------------------------


def describe_plan(plan: Plan, resources: Sequence[Document], domain: str) -> Document:
    """What PLAN offers (RESOURCES, described already) and leaves out, and its unused rules: --list --json prints it."""

    def offer(name: str, device: Device) -> Document:
        return {"resource": f"{domain}/{name}", "path": f"/dev/{device.path}", "line": device.line}

    shared = find_shared(plan).items()
    return {
        "resources": resources,
        "shared": [{"path": node, "offers": [offer(*each) for each in offers]} for node, offers in shared],
        "left_out": [
            {"path": f"/dev/{left.path}", "line": left.line, "reason": left.text, "label": left.reason.label}
            for left in plan.left_out
        ],
        "unused": [{"line": rule.line, "pattern": rule.pattern} for rule in plan.unused],
    }


def describe_resource(resource: Resource, domain: str, epoch: float, **more: object) -> Document:
    """RESOURCE as a document that ends with MORE. EPOCH is the time.time() at which time.monotonic() was 0."""
    devices = [
        {
            "path": device_path(device),
            "line": device.line,
            "slots": device.slots,
            "healthy": not device.problem,
            "problem": device.problem,
            **({"gone": device.is_gone} if device.problem else {}),
            "since": utc(epoch + device.since),
            "numa": list(device.numa),
            "nodes": [
                {"host": host, "container": place, "permissions": permissions, "targets": [path for path, _ in nodes]}
                for host, place, permissions, nodes in device.specs
            ],
            "env": dict(device.env),
        }
        for device in resource.devices
    ]
    slots = sum(device.slots for device in resource.devices)
    return {"name": f"{domain}/{resource.name}", "pool": resource.pool, "slots": slots, "devices": devices, **more}


def describe_use(resource: Resource, holders: Holders | None) -> Document:
    """Who has slots of RESOURCE, in the order of the slots; null if HOLDERS are unknown."""
    if holders is None:
        return {"in_use": None, "holders": None}
    own = set(holders.get(resource.name, ()))
    named = named_slots(resource, (holder.slot for holder in own))
    slots = {slot_id: slot for slot_id, slot in named if slot and slot.number < slot.device.slots}
    places = {slot_id: (slot.device.path, slot.number, device_path(slot.device)) for slot_id, slot in slots.items()}
    found = sorted((places[holder.slot], holder) for holder in own if holder.slot in places)
    held = [{"slot": holder.slot, "device": path, **holder._asdict()} for (*_, path), holder in found]
    return {"in_use": len({holder["slot"] for holder in held}), "holders": held}  # a pod's containers may share a slot


def is_served(resources: Iterable[Document]) -> bool:
    """Whether the kubelet has each of RESOURCES, from this instance or another one."""
    return all(resource["ready"] or resource["served_by_other"] for resource in resources)


def find_hanging(threads: Iterable[Document]) -> list[str]:
    """A sentence per thread that hangs."""
    late = [thread for thread in threads if thread["seconds_since_turn"] > thread["max_seconds"]]
    return [f"the {each['name']} hangs: its last turn was {each['seconds_since_turn']:.1f} s ago" for each in late]


def find_problems(document: Document) -> Mapping[str, Sequence[str]]:
    """What is wrong, the worst first, and the names of the resources or devices that have it."""
    problems: dict[str, list[str]] = {sentence: [] for sentence in find_hanging(document["threads"])}

    def add(sentence: str, *names: str) -> None:
        if sentence:
            problems.setdefault(sentence, []).extend(names)

    if document["dra"]:
        add(document["dra"]["problem"])
    elif document["kubelet"]["answering"]:
        for resource in document["resources"]:
            add(resource["trouble"], resource["name"])
    else:
        where = document["kubelet"]["plugin_dir"]
        add(f"the kubelet does not answer in {where}: no pod can be given a device until it does")
    add(document["dev_problem"])
    add(conf_problem(document["conf"]))
    for resource in document["resources"]:
        users = users_by_device(resource)
        for device in resource["devices"]:
            if device["problem"]:
                named = _first_names([f"{container} of {pod}" for pod, container in users.get(device["path"], ())])
                add(device["problem"] + (f", in use by {named}" if named else ""), device["path"])
    return problems


def conf_problem(conf: Document) -> str:
    """Why the config file is refused, and which rules are in force; empty if it is good."""
    stale = f"the config file is refused, the rules of {clock(conf['read_at'])} UTC stay in force: {conf['error']}"
    return stale if conf["error"] else ""


def users_by_device(resource: Document) -> Mapping[str, Mapping[tuple[str, str], Sequence[str]]]:
    """By path of a device of RESOURCE, the slots that each container has, by namespace/pod and container."""
    users: dict[str, dict[tuple[str, str], list[str]]] = {}
    for holder in resource["holders"] or ():
        user = f"{holder['namespace']}/{holder['pod']}", holder["container"]
        users.setdefault(holder["device"], {}).setdefault(user, []).append(holder["slot"])
    return users


def _first_names(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _with_names(sentence: str, names: Sequence[str]) -> str:
    return f"{_first_names(names)}: {sentence}" if names else sentence


def clock(moment: str) -> str:
    """MOMENT, as utc() writes it, for people: without fractions, T and Z."""
    return moment[:19].replace("T", " ")


def render_table(header: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    """ROWS as lines of text in columns, numbers to the right. The last column may be as long as it likes."""
    cells = [list(header)] + [[printable(str(cell)) for cell in row] for row in rows]
    columns = list(zip(*cells))
    widths = [max(map(len, column)) for column in columns]
    kinds = [str.rjust if all(cell.isdecimal() for cell in column[1:]) else str.ljust for column in columns]
    lines = ("  ".join(pad(cell, width) for pad, cell, width in zip(kinds, row, widths)) for row in cells)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def render_section(title: str, header: Iterable[str], rows: Sequence[Sequence[object]]) -> str:
    """ROWS as a table below TITLE; nothing if there are none."""
    return f"\n{title}:\n{render_table(header, rows)}" if rows else ""


def _lists(document: Document) -> Iterator[tuple[str, Sequence[str], Sequence[Sequence[Any]]]]:
    """What tables and page list below the resources: titles, headers and rows."""
    shared = []
    for node in document["shared"]:
        lines = ", ".join(map(str, sorted({offer["line"] for offer in node["offers"]})))
        shared.append((lines, node["path"], ", ".join(offer["resource"] for offer in node["offers"])))
    yield "Offered by several resources, so several pods can have it at once", ("LINE", "NODE", "RESOURCES"), shared
    left_out = [(left["line"], left["path"], left["reason"]) for left in document["left_out"]]
    yield "Left out, though a rule names it", ("LINE", "PATH", "REASON"), left_out
    unused = [(rule["line"], rule["pattern"]) for rule in document["unused"]]
    yield "Rules that matched nothing", ("LINE", "DEVICEMATCH"), unused


def render_list(document: Document) -> str:
    """What --list prints of describe_plan()'s DOCUMENT."""
    rows = [
        (device["slots"], device["line"], resource["name"] + " (pool)" * resource["pool"], _device_cell(device))
        for resource in document["resources"]
        for device in resource["devices"]
    ]
    text = render_table(("SLOTS", "LINE", "RESOURCE", "DEVICE"), rows) if rows else "No device would be offered.\n"
    return text + "".join(render_section(*each) for each in _lists(document))


def target_of(host: str, targets: Sequence[str]) -> tuple[str, bool]:
    """The node that HOST leads to if it is a link; and whether it is a folder. It stands for the nodes TARGETS."""
    is_folder = len(targets) > 1 or targets[0].startswith(host + "/")
    return "" if is_folder or targets[0] == host else targets[0], is_folder


def device_text(device: Document) -> str:
    """The path of DEVICE, where its link leads, its number of nodes, and the path in the container if that differs."""
    text: str = device["path"]
    if device["nodes"]:  # none while it is Unhealthy
        node = device["nodes"][0]
        target, is_folder = target_of(node["host"], node["targets"])
        text += f" -> {target}" if target else ""
        count = sum(len(each["targets"]) for each in device["nodes"])
        text += f" ({pluralize(count, 'node')})" if is_folder or count > 1 else ""
        text += "" if node["container"].startswith(device["path"]) else f" as {node['container']}"
    return text


def _device_cell(device: Document) -> str:
    return device_text(device) + (f" (Unhealthy: {device['problem']})" if device["problem"] else "")


def dra_text(dra: Document) -> str:
    """The part of the document on DRA, in one line."""
    slices = f"{pluralize(dra['slice_devices'], 'device')} published in {pluralize(dra['slices'], 'ResourceSlice')}"
    claims = f"{pluralize(dra['claims_prepared'], 'claim')} prepared"
    return f"DRA: {slices}, {claims}, the API server {'answers' if dra['api_reachable'] else 'does not answer'}"


def render_status(document: Document) -> str:
    """What --status prints of a daemon's whole DOCUMENT."""
    problems = document["problems"]
    lines = [f"{document['node']}: {'not well' if problems else 'well'}, as of {clock(document['time'])} UTC"]
    lines += [f"  - {problem}" for problem in problems]
    lines += [dra_text(document["dra"])] if document["dra"] else []
    offered, held = [], []
    for resource in document["resources"]:
        use = f"{'?' if resource['in_use'] is None else resource['in_use']}/{resource['slots']}"
        devices = _first_names([_device_cell(device) for device in resource["devices"]])
        offered.append((use, resource["name"], "yes" if resource["ready"] else "no", devices))
        for users in users_by_device(resource).values():
            name = resource["name"].partition("/")[2]
            held += [(_first_names(slots), name, pod, container) for (pod, container), slots in users.items()]
    events = [(clock(event["time"]), event_text(event)[0]) for event in document["events"][:10]]
    return (
        "".join(f"{printable(line)}\n" for line in [*lines, ""])
        + (render_table(("IN USE", "RESOURCE", "READY", "DEVICE"), offered) if offered else "No device is offered.\n")
        + render_section("Who has what", ("SLOTS", "RESOURCE", "POD", "CONTAINER"), held)
        + "".join(render_section(*each) for each in _lists(document))
        + render_section("Last events", ("TIME", "EVENT"), events)
    )


def event_text(event: Document) -> tuple[str, str]:
    """The sentence of EVENT, with the resources or devices that it is about; and its other fields."""
    fields = {key: str(value) for key, value in event.items() if key not in ("time", "level", "event", "message")}
    sentence = event["message"]
    for key in ("resource", "resources", "devices"):
        value = fields.pop(key, "")
        if value not in sentence:
            names = value.replace(",", ", ")
            sentence = f"{names}: {sentence}" if key == "resource" else f"{sentence} ({names})"
    return sentence, "; ".join(f"{key} {value}" for key, value in fields.items())


# Metrics: Prometheus's text format 0.0.4, by its naming rules.

PREFIX = "smarter_device_manager_"
Samples = Iterable[tuple[Mapping[str, str], float]]  # labels and value
_ESCAPES_OF_LABELS = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_VERSIONS = {"version": __version__, "python": ".".join(map(str, sys.version_info[:3]))}


def _holder_samples(document: Document) -> Samples:
    labels = ("device", "namespace", "pod", "container")
    for resource in document["resources"]:
        for user in dict.fromkeys(tuple(map(holder.get, labels)) for holder in resource["holders"] or ()):
            yield {"resource": resource["name"], **dict(zip(labels, user))}, 1


def _device_samples(document: Document) -> Samples:
    for resource in document["resources"]:
        states = list(map(_state, resource["devices"]))
        for state in ("present", "absent", "unhealthy"):
            yield {"resource": resource["name"], "state": state}, states.count(state)


def _state(device: Document) -> str:
    """Whether DEVICE is present, absent, or there but unhealthy."""
    return "present" if device["healthy"] else "absent" if device["gone"] else "unhealthy"


def _left_out_samples(document: Document) -> Samples:
    labels = [left["label"] for left in document["left_out"]]
    return (({"reason": label}, labels.count(label)) for label in dict.fromkeys(reason.label for reason in Reason))


def _request_samples(document: Document) -> Samples:
    for asked in document["dra"]["api_requests"] if document["dra"] else ():
        yield {"verb": asked["verb"], "code": asked["code"]}, asked["count"]


# The names of metrics without PREFIX, their help, and where the document has their values: "resources.KEY" has one per
# resource if it is known, any other "PART.KEY" has one if the document has PART.
FAMILIES: Sequence[tuple[str, str, str | Callable[[Document], Samples]]] = (
    ("build_info", "Always 1; the labels have the versions.", lambda _: [(_VERSIONS, 1)]),
    ("slots", "Containers that may have the resource at once.", "resources.slots"),
    ("slots_in_use", "Slots that containers have; absent while unknown.", "resources.in_use"),
    ("slot_holder", "1 per container that has a slot.", _holder_samples),
    ("devices", "Devices of the resource: present, absent, or there but unhealthy.", _device_samples),
    ("registered", "1 if the kubelet has the resource: registered, its stream open.", "resources.ready"),
    ("allocations_total", "Containers that were given the resource.", "resources.allocations"),
    ("starts_refused_total", "Starts of containers that were refused.", "resources.start_refusals"),
    ("registrations_total", "Registrations that the kubelet accepted.", "resources.registrations"),
    ("registrations_refused_total", "Registrations that the kubelet refused.", "resources.refusals"),
    ("stream_losses_total", "Streams that the kubelet ended or never opened.", "resources.stream_losses"),
    ("kubelet_answering", "1 if the kubelet answers on its socket.", "kubelet.answering"),
    ("kubelet_restarts_total", "Restarts of the kubelet that were seen.", "kubelet.restarts"),
    ("conf_reloads_total", "Changed config files that took effect.", "conf.reloads"),
    ("conf_refused_total", "Changed config files that were refused.", "conf.failed_reloads"),
    ("conf_good", "0 if the current config file is refused.", lambda d: [({}, not d["conf"]["error"])]),
    ("conf_last_good_timestamp_seconds", "When the config file was last good.", "conf.read_at_seconds"),
    ("scan_duration_seconds", "Seconds that the last look at /dev took.", lambda d: [({}, d["scan_seconds"])]),
    ("left_out", "Paths that a rule names and that are not offered, by reason.", _left_out_samples),
    ("api_requests_total", "Requests to the API server, by verb and code; with DRA only.", _request_samples),
    ("api_reachable", "1 if the API server answered the last request.", "dra.api_reachable"),
    ("slices_published", "ResourceSlices of this node.", "dra.slices"),
    ("slice_devices_published", "Devices in these slices.", "dra.slice_devices"),
    ("slices_published_timestamp_seconds", "When the slices were last up to date.", "dra.published_at_seconds"),
    ("claims_prepared", "ResourceClaims that are prepared.", "dra.claims_prepared"),
    ("prepare_errors_total", "Claims that could not be prepared.", "dra.prepare_errors"),
    ("internal_errors_total", "Calls that failed for an unforeseen reason.", "process.internal_errors"),
    ("log_lines_dropped_total", "Log lines dropped because nobody read them.", "process.log_lines_dropped"),
    ("process_resident_memory_bytes", "Resident memory.", "process.resident_memory_bytes"),
    ("process_cpu_seconds_total", "CPU time, user and system.", "process.cpu_seconds"),
    ("process_start_time_seconds", "When the process started.", "process.start_time_seconds"),
)


def render_metrics(document: Document) -> Iterator[str]:
    """DOCUMENT as metrics, line by line."""
    for short, text, source in FAMILIES:
        name = short if short.startswith("process_") else PREFIX + short  # the former are the same in all programs
        yield f"# HELP {name} {text}\n# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}\n"
        for labels, value in _read_samples(source, document) if isinstance(source, str) else source(document):
            pairs = ",".join(f'{key}="{text.translate(_ESCAPES_OF_LABELS)}"' for key, text in labels.items())
            number = int(value) if isinstance(value, bool) else value
            yield f"{name}{{{pairs}}} {number}\n" if pairs else f"{name} {number}\n"


def _read_samples(source: str, document: Document) -> Samples:
    part, _, key = source.partition(".")
    if part == "resources":
        return [({"resource": each["name"]}, each[key]) for each in document[part] if each[key] is not None]
    return [({}, document[part][key])] if document[part] else []


# The page. Every value goes into it through _fill, and so escaped; the rest are the texts at the end of this file.

_ESCAPES_OF_HTML = {ord(char): f"&#{ord(char)};" for char in "&<>\"'"}


def _fill(template: str, **values: object) -> str:
    """TEMPLATE with those of VALUES that it names, each escaped for HTML's text and quoted attributes."""
    return re.sub(r"{(\w+)}", lambda key: printable(str(values[key[1]])).translate(_ESCAPES_OF_HTML), template)


def render_page(document: Document, nonce: str) -> Iterator[str]:
    """DOCUMENT as an HTML page, piece by piece, problems first; only a style and a script with NONCE are in force."""
    problems = find_problems(document)
    count = len(problems)
    values = {
        **document,
        "nonce": nonce,
        "moment": clock(document["time"]),
        "verdict": "all is well" if not count else "1 thing is wrong" if count == 1 else f"{count} things are wrong",
        "mood": "bad" if count else "good",
        "colour": "%23b3262b" if count else "%23166a3a",
    }
    yield _fill(_HEAD, **values)
    if count:
        yield '<ul class="card list wrong">\n'
        for sentence, names in problems.items():
            links = [_fill('<a href="#{name}">{name}</a>', name=name) for name in names]
            yield "<li>" + _with_names(_fill("{sentence}", sentence=sentence), links) + "</li>\n"
        yield "</ul>\n"
    facts = "".join(_fill("<li>{fact}</li>\n", fact=fact) for fact in _facts(document))
    yield f'<ul class="card facts">\n{facts}</ul>\n<h2>Resources</h2>\n'
    yield _TABLE if document["resources"] else _NO_TABLE
    by_name = {name: sentence for sentence, names in problems.items() for name in names}
    for resource in document["resources"]:
        yield from _page_resource(resource, by_name.get(resource["name"], ""))
    yield "</table>\n" if document["resources"] else ""
    lists = [(title, [(f"line {line}", *texts) for line, *texts in rows]) for title, _, rows in _lists(document)]
    lists += [("Last events", [(clock(event["time"]), *event_text(event)) for event in document["events"]])]
    for title, rows in lists:
        item = '<li><span>{key}</span><span>{text} <span class="dim">{more}</span></span></li>\n'
        yield f'<h2>{title}</h2>\n<ul class="card list">\n' if rows else ""
        yield from (_fill(item, key=key, text=text, more=" ".join(more)) for key, text, *more in rows)
        yield "</ul>\n" if rows else ""
    yield _fill(_FOOT, **values)


def _facts(document: Document) -> Iterator[str]:
    resources, conf, kubelet = document["resources"], document["conf"], document["kubelet"]
    states = [_state(device) for resource in resources for device in resource["devices"]]
    in_use = [resource["in_use"] for resource in resources]
    slots = pluralize(sum(resource["slots"] for resource in resources), "slot")
    restarts = pluralize(kubelet["restarts"], "restart")
    yield f"{pluralize(len(resources), 'resource')}, {sum(resource['ready'] for resource in resources)} registered"
    yield f"{pluralize(len(states), 'device')}, {states.count('absent')} absent, {states.count('unhealthy')} unhealthy"
    yield f"{slots}, {'use unknown' if None in in_use else f'{sum(in_use)} in use'}"
    yield f"the kubelet {'answers' if kubelet['answering'] else 'is down'}, {restarts} seen"
    yield f"config file {'refused' if conf['error'] else 'good'}, {pluralize(conf['rules'], 'rule')} in force"
    if document["dra"]:
        yield dra_text(document["dra"])


def _page_resource(resource: Document, problem: str) -> Iterator[str]:
    """The rows of RESOURCE, which has PROBLEM if any: one per device, with the containers that use it."""
    in_use, refusals = resource["in_use"], resource["start_refusals"]
    domain, _, short_name = resource["name"].partition("/")
    head = _fill(
        _RESOURCE,
        rows=len(resource["devices"]),
        domain=domain,
        name=short_name,
        problem=problem,
        refused=f"{pluralize(refusals, 'start')} of a container refused" if refusals else "",
        use=f"{'unknown,' if in_use is None else in_use} of {resource['slots']}",
        percent=min(100, 100 * (in_use or 0) // max(resource["slots"], 1)),
    )
    users = users_by_device(resource)
    yield _fill('<tbody id="{name}" role="rowgroup">\n', **resource)
    for device in resource["devices"]:
        yield _fill('<tr id="{path}" role="row">', **device) + head
        values = {**device, "since": clock(device["since"]), "text": device_text(device)}
        mood, state = ("bad", "Unhealthy") if device["problem"] else ("good", "Healthy")
        yield _fill(_DEVICE, **values, mood=mood, state=state)
        yield _fill(_PROBLEM, **values) if device["problem"] else ""
        yield '</td>\n<td role="cell" data-name="Used by:">'
        for (pod, container), slots in users.get(device["path"], {}).items():
            held = f"{'slot' if len(slots) == 1 else 'slots'} {_first_names(slots)}"
            yield _fill(_USER, container=container, pod=pod, slots=held)
        yield "</td></tr>\n"
        head = ""  # it spans all rows
    yield "</tbody>\n"


# The server: a hand-written HTTP/1 of two methods and five paths, because http.server costs 2 MB and a thread per
# client. It reads and writes its sockets itself: asyncio's streams accept a whole backlog of clients in one turn of the
# loop, log a traceback if descriptors run out, and until Python 3.12 copy the answer for each reader.

OK = "200 OK"
UNAVAILABLE = "503 Service Unavailable"
UNKNOWN_HOST = "use an IP address, localhost, the name of the node or of the pod, or the one of --listen as the host"


def parse_request(data: bytes) -> tuple[str, str, str] | None:
    """Method, path and host, empty if there is none, of the request in DATA; None if it cannot be parsed."""
    head, end, _ = data.decode("latin-1").replace("\r\n", "\n").partition("\n\n")
    line = re.match(r"([A-Z]+) (/[!-~]*) HTTP/1\.[0-9]$", head, re.MULTILINE)
    host = re.search(r"^host:(.*)", head, re.IGNORECASE | re.MULTILINE)
    return (line[1], line[2].partition("?")[0], host[1] if host else "") if line and end else None


def is_known_host(host: str, names: frozenset[str]) -> bool:
    """Whether HOST, with its port, is an IP address or in NAMES. Pages of others must not read this (DNS rebinding)."""
    name = re.sub(r":[0-9]*$", "", host.strip()).strip("[]").lower().rstrip(".")
    return name in names or bool(re.fullmatch("[0-9.]+|[0-9a-f]*:[0-9a-f:.]*(%.*)?", name))


def respond(status: str, text: str, kind: str = "text/plain; charset=utf-8", policy: str = "") -> bytes:
    """TEXT as an answer of the type KIND, with POLICY added to what its Content-Security-Policy allows: nothing."""
    body = text.encode("utf-8", "backslashreplace")
    policy = f"default-src 'none'; {policy}base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    head = [
        f"HTTP/1.1 {status}",
        f"Date: {time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime())}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        f"Content-Security-Policy: {policy}",
        "X-Content-Type-Options: nosniff",
        "Referrer-Policy: no-referrer",
        "Cache-Control: no-store",
        "Allow: GET, HEAD",
        "Connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def plain(status: str, lines: Sequence[str] = ()) -> bytes:
    """LINES as a plain text; without any, STATUS."""
    return respond(status, "".join(f"{line}\n" for line in lines or [status]))


def describe_process() -> Document:
    """What the kernel knows of this process. proc(5) counts its start in ticks since the start of the machine."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return {
        "resident_memory_bytes": int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        "cpu_seconds": time.process_time(),
        "start_time_seconds": boot + int(fields[19]) / os.sysconf("SC_CLK_TCK"),
        "internal_errors": log_counts.internal_errors,
        "log_lines_dropped": log_counts.dropped_lines,
    }


@dataclass(eq=False)
class StatusServer:
    """Answers those who ask how the daemon is. Belongs to the gRPC thread and its loop, apart from report() and
    record_turn()."""

    MAX_CLIENTS = 64
    HEAD_BYTES = 8192  # of a request
    CLIENT_SECONDS = 10.0  # for a client to send its request and take the answer
    FRESH_SECONDS = 1.0  # for which all clients get the same answer

    listener: socket.socket
    side: KubeletSide
    pod_resources: str  # path of the kubelet's socket for them
    node: str
    names: frozenset[str]  # by which a client may ask, besides IP addresses
    plan: Plan
    device_side: Document  # its part of the document

    def __post_init__(self) -> None:
        self.events = EventRing()
        self._main_turn = time.monotonic()
        self._clients: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._views: dict[str, asyncio.Future[bytes]] = {}  # by path

    def report(self, plan: Plan, device_side: Document) -> None:
        """Show PLAN and DEVICE_SIDE, which nothing changes. Nothing wakes up."""
        self.plan, self.device_side = plan, device_side

    def record_turn(self) -> None:
        """The main thread, which calls this, works."""
        self._main_turn = time.monotonic()

    async def run(self) -> None:
        """Serve until cancelled. If there are too many clients, the oldest one goes: nobody can keep others out."""
        try:
            while True:
                try:
                    connection, _ = await asyncio.get_running_loop().sock_accept(self.listener)
                except OSError:
                    await asyncio.sleep(1.0)  # until there are file descriptors again
                    continue
                task = asyncio.ensure_future(self._serve(connection))
                task.add_done_callback(lambda task: self._clients.pop(task, None))
                self._clients[task] = None
                if len(self._clients) > self.MAX_CLIENTS:
                    oldest = next(iter(self._clients))
                    del self._clients[oldest]
                    oldest.cancel()
                await asyncio.sleep(0)  # or those who are accepted would wait for all who are in the queue
        finally:
            self.listener.close()
            tasks: list[asyncio.Future[Any]] = [*self._clients, *self._views.values()]
            for each in tasks:
                each.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=STOP_SECONDS)

    async def _serve(self, connection: socket.socket) -> None:
        """Answer one request, if the client sends it and takes the answer in CLIENT_SECONDS."""
        with connection, contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._answer(connection), self.CLIENT_SECONDS)

    async def _answer(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        data, chunk = b"", b"-"
        while chunk and b"\n\r\n" not in data and b"\n\n" not in data:
            chunk = await loop.sock_recv(connection, self.HEAD_BYTES - len(data))
            data += chunk
        method, path, host = parse_request(data) or ("", "", "")
        if not method:
            answer = plain("400 Bad Request")
        elif method not in ("GET", "HEAD"):
            answer = plain("405 Method Not Allowed")
        elif not is_known_host(host, self.names):
            answer = plain("421 Misdirected Request", [UNKNOWN_HOST])
        else:
            answer = await self._respond(path)
        if method == "HEAD":
            answer = answer[: answer.index(b"\r\n\r\n") + 4]
        await loop.sock_sendall(connection, answer)

    async def _respond(self, path: str) -> bytes:
        try:
            if path == "/healthz":
                hanging = find_hanging(self._threads())
                return plain(UNAVAILABLE if hanging else OK, hanging or ["ok"])
            if path == "/readyz":
                return self._readyz()
            if path not in ("/", "/metrics", "/status.json"):
                return plain("404 Not Found")
            if not self._views:
                asyncio.get_running_loop().call_later(self.FRESH_SECONDS, self._views.clear)
            if path not in self._views:
                self._views[path] = asyncio.ensure_future(self._view(path))
            return await asyncio.shield(self._views[path])
        except OSError:  # of reading /proc, for lack of file descriptors
            return plain(UNAVAILABLE)
        except Exception:
            log_internal_error("the status page failed")
            return plain("500 Internal Server Error")

    def _threads(self) -> list[Document]:
        """Per thread the age of its last turn, and the age that it may have."""
        turns = {"device side": self._main_turn, "kubelet side": self.side.last_turn}
        now, most = time.monotonic(), self.side.max_silence
        return [{"name": name, "seconds_since_turn": now - turn, "max_seconds": most} for name, turn in turns.items()]

    def _readyz(self) -> bytes:
        """200 if the kubelet has each resource, from this instance or another; and what is not as it should be."""
        states = {name: self.side.describe_registration(name) for name in self.plan.resources}
        is_ready = is_served(states.values())
        lines = ["ok"] if is_ready else []
        lines += [f"{self.side.domain}/{name}: {each['trouble']}" for name, each in states.items() if each["trouble"]]
        lines += filter(None, [conf_problem(self.device_side["conf"])])
        return plain(OK if is_ready else UNAVAILABLE, lines)

    async def _view(self, path: str) -> bytes:
        """What PATH shows of the document."""
        document, policy = await self._describe(), ""
        if path == "/metrics":
            kind, pieces = "text/plain; version=0.0.4; charset=utf-8", render_metrics(document)
        elif path == "/":
            nonce = os.urandom(16).hex()
            policy = f"style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
            kind, pieces = "text/html; charset=utf-8", render_page(document, nonce)
        else:
            document["healthy"] = not find_hanging(document["threads"])
            document["ready"] = is_served(document["resources"])
            document["problems"] = [_with_names(*problem) for problem in find_problems(document).items()]
            kind, pieces = "application/json", json.JSONEncoder(indent=1).iterencode(document)
        return respond(OK, "".join(await in_slices(pieces)), kind, policy)

    async def _describe(self) -> Document:
        side, domain, plan, epoch = self.side, self.side.domain, self.plan, time.time() - time.monotonic()
        holders = await read_holders(self.pod_resources, domain, side.slots)
        resources = (
            describe_resource(each, domain, epoch, **side.describe_registration(name), **describe_use(each, holders))
            for name, each in plan.resources.items()
        )
        return {
            "smarter_device_manager": __version__,
            "node": self.node,
            "domain": domain,
            "time": utc(time.time()),
            "threads": self._threads(),
            **side.describe(),
            "process": describe_process(),
            "events": self.events.events,
            **self.device_side,
            **describe_plan(plan, await in_slices(resources), domain),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Daemon: the thread of the kubelet side, and the loop of the main thread, which waits for signals. The kernel signals
# changes in /dev (SIGURG) and in the folder that the kubelet side watches (SIGIO). The kubelet side asks for a full
# scan by SIGUSR1, and an administrator by SIGHUP. Between signals, the main thread pings the service manager.
# ---------------------------------------------------------------------------------------------------------------------

SCAN_SIGNAL = signal.SIGUSR1  # the kubelet side asks the device side to scan everything
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, SCAN_SIGNAL)
BLOCKED_SIGNALS = (*SIGNALS, FOLDER_SIGNAL, signal.SIGIO)  # in every thread; the main thread waits for them
GATHER_CHANGES_SECONDS = 0.02  # to wait after FOLDER_SIGNAL, because one change in /dev is followed by others
REST_SECONDS = 0.05  # at least, between a scan of /dev and the next one because of FOLDER_SIGNAL


def mount_roots(folders: Iterable[str]) -> Mapping[str, str]:
    """What is mounted at those of FOLDERS at which something is: its path in its own file system, field 4 of
    proc_pid_mountinfo(5). When it is moved, the path follows; when it is deleted, "//deleted" is appended."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            roots = {point: root for root, point in (line.split(" ", 5)[3:5] for line in file)}  # the last hides others
    except OSError:  # too many open files, say
        return {}
    points = {path: re.sub(r"[ \t\n\\]", lambda c: f"\\{ord(c[0]):03o}", os.path.realpath(path)) for path in folders}
    return {path: roots[point] for path, point in points.items() if point in roots}


def network_error(error: Exception) -> str:
    """Why there is no connection, in the words of the system, without what Python adds to them."""
    if isinstance(error, UnicodeError):
        return "there is no such host name"
    problem: str = getattr(error, "strerror", None) or str(error) or "timed out"
    return problem.partition(" (while attempting ")[0]


def address_text(address: tuple[Any, ...]) -> str:
    """ADDRESS as people write it."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_status(options: argparse.Namespace, devices: DeviceSide, side: KubeletSide) -> StatusServer | None:
    """The status server for --listen; None if the address cannot be used."""
    host = options.listen[0]  # all addresses if it is empty
    is_dual = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual or ":" in host else socket.AF_INET
    try:  # a probe can wait in a long queue, and must not be dropped
        listener = socket.create_server(options.listen, family=family, backlog=1024, dualstack_ipv6=is_dual)
    except (OSError, UnicodeError) as error:
        problem = f"cannot listen on {address_text(options.listen)}: {network_error(error)}"
        log_event("not-listening", f"{problem}; continuing without a status page", logging.ERROR)
        return None
    listener.setblocking(False)
    pods = options.pod_resources_socket
    names = frozenset(map(str.lower, ("", "localhost", options.node_name, socket.gethostname(), host)))
    status = StatusServer(listener, side, pods, options.node_name, names, devices.plan, devices.describe())
    log.addHandler(status.events)
    log_event("listening", "serving health, metrics and a status page", address=address_text(listener.getsockname()))
    return status


class KubeletThread(threading.Thread):
    """The gRPC thread: an asyncio loop with the kubelet side and, with --listen, the status server."""

    EXIT_SECONDS = 4.0  # to end all streams and remove all sockets: 2,000 take 3 s on a busy machine

    def __init__(self, options: argparse.Namespace, devices: DeviceSide) -> None:
        super().__init__(name="grpc", daemon=True)
        self.has_failed = False
        self._loop = asyncio.new_event_loop()
        max_silence = min(10 * max(options.interval, CHECK_SECONDS), MAX_SILENCE_SECONDS)  # ten turns
        host = HostDevices(options.dev_dir, lambda: os.kill(os.getpid(), SCAN_SIGNAL))
        side = DraSide if options.api == "dra" else DevicePluginSide
        self._side: KubeletSide = side(options, host, self._loop, max_silence)
        self._status = open_status(options, devices, self._side) if options.listen else None
        self._directory: tuple[int, ...] = ()  # identity of the plugin directory, as the main thread last found it
        self._mounted = mount_roots(self._side.folders)

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException:
            self.has_failed = True
            log_internal_error("the kubelet side failed")
            os.kill(os.getpid(), signal.SIGTERM)  # which ends the main thread

    async def _serve(self) -> None:
        """Run the kubelet side and the status server until one of them ends, then end the other. Raises what failed."""
        tasks = [asyncio.ensure_future(part.run()) for part in (self._side, self._status) if part]
        done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(*done)

    def send(self, plan: Plan | None, devices: DeviceSide) -> None:
        """Give PLAN, if there is a new one, to the kubelet side, and the state of DEVICES to the status server."""
        if plan:
            self._loop.call_soon_threadsafe(self._side.deliver, plan)
        if self._status:
            self._status.report(devices.plan, devices.describe())

    def look(self) -> None:
        """Have the kubelet side look at its directory, where something changed."""
        self._loop.call_soon_threadsafe(self._side.check_now)

    def record_turn(self, manager: ServiceManager) -> float:
        """Tell the status server that the main thread works, and MANAGER if the kubelet side works, too: that is,
        looks at kubelet.sock as often as it should. Returns time.monotonic() by which to do so again."""
        now = time.monotonic()
        if self._status:
            self._status.record_turn()
        manager.ping(now - self._side.last_turn <= self._side.max_silence)
        return min(now + self._side.max_silence / 2, manager.due)

    def check_directory(self) -> None:
        """Have the kubelet side look if the plugin directory was replaced, for which the kernel sends no signal. Raises
        Problem if a folder that is mounted here was deleted or moved: a new one in its place is invisible here."""
        for folder, now in mount_roots(self._mounted).items() if self._mounted else ():
            end = "so that the next start finds the one that is used now"
            if now.endswith("//deleted"):
                raise Problem(f"the directory {folder} was deleted, and only this mount keeps it; exiting, {end}")
            was = self._mounted[folder]
            if now != was:
                raise Problem(
                    f"the directory that is mounted at {folder} was moved, from {was} to {now}; exiting, {end}"
                )
        before, self._directory = self._directory, (socket_identity(self._side.plugin_dir) or ())[:2]  # not the time
        if self._directory != before:
            self.look()

    def stop(self) -> None:
        """Have the kubelet side end, and wait for it, but no longer than EXIT_SECONDS."""
        self._loop.call_soon_threadsafe(self._side.stop)
        self.join(self.EXIT_SECONDS)
        if not self.is_alive():
            self._loop.close()  # otherwise Python may complain when it exits


class ServiceManager:
    """The service manager that started this process, if variables of the ENVIRONMENT say that it wants to be notified,
    as systemd does with sd_notify(3)."""

    RETRY_SECONDS = 0.5  # after it could not be notified: its queue is full, say

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = re.sub(b"^@", b"\0", os.fsencode(environment.get("NOTIFY_SOCKET", "")))
        self._message = "READY=1"  # to send next
        own_pid, period = str(os.getpid()), environment.get("WATCHDOG_USEC", "")
        is_for_us = environment.get("WATCHDOG_PID", own_pid) == own_pid
        is_wanted = is_for_us and re.fullmatch("[1-9][0-9]{0,18}", period)
        self._ping_seconds = max(int(period) / 2e6, 0.01) if is_wanted else math.inf
        self.due = 0.0  # time.monotonic() of the next ping()

    def notify(self, state: str) -> bool:
        """Send STATE: READY=1, STOPPING=1 or WATCHDOG=1. Returns False if it could not be sent."""
        try:
            if self._address:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                    sender.sendto(state.encode(), self._address)
            return True
        except OSError as error:
            log.debug("cannot notify %s: %s", os.fsdecode(self._address), error)
            return False

    def ping(self, is_alive: bool) -> None:
        """If that is due, notify it once that this process is ready, and then ping its watchdog as long as this process
        IS_ALIVE. Without pings, the watchdog ends it."""
        if time.monotonic() >= self.due:
            was_sent = is_alive and self.notify(self._message)
            if was_sent:
                self._message = "WATCHDOG=1"
            self.due = time.monotonic() + min(self._ping_seconds, math.inf if was_sent else self.RETRY_SECONDS)


def check_plugin_dir(path: str) -> str:
    """The directory PATH. Raises Problem if no plugin can listen in it."""
    try:
        os.listdir(f"{path}/.")
    except OSError as error:
        problem = f"there is no directory {path} to use: {error.strerror}"
        options = "(--plugin-dir names the kubelet's directory; --dry-run works without a kubelet)"
        raise Problem(f"{problem}; is this a node with a kubelet, and are you root? {options}") from None
    if "," in path:
        raise Problem(f"the path {path} has a comma, at which gRPC would split it; make a link to it without one")
    check_length(path, SHORTEST_NAME - socket_room(path), "make a link to it that has a shorter path")
    return path


def check_length(path: str, too_long: int, advice: str) -> None:
    """Raise Problem if the paths of sockets in the directory PATH are TOO_LONG by a byte or more."""
    if too_long > 0:
        text = f"{too_long} bytes too long: the sockets in it would have paths of more than {SOCKET_PATH_BYTES} bytes"
        raise Problem(f"the path {path} is {text}, which Unix does not allow; {advice}")


def check_dra(options: argparse.Namespace) -> str:
    """The directory of the DRA driver, which is made. Raises Problem if OPTIONS do not allow one."""
    if len(options.domain) > 63 or not options.domain[0].isalpha():
        rule = "the domain is the name of the driver, which must begin with a letter and have at most 63 characters"
        raise Problem(f"with --api dra, {rule}; {options.domain} does not")
    if not _OBJECT_NAME.fullmatch(options.node_name):
        raise Problem(f'--node-name: "{options.node_name}" is not the name of a Node; kubectl get nodes shows them')
    if not options.kube_api:
        raise Problem("outside a pod, --api dra needs --kube-api, --kube-token-file and --kube-ca-file")
    try:
        parse_api_url(options.kube_api)
    except ValueError as error:
        raise Problem(f"--kube-api: {error}") from None
    kubelet_dir, sockets = options.kubelet_dir, dra_sockets(options)
    if not os.path.isdir(kubelet_dir):
        raise Problem(f"there is no directory {kubelet_dir}: is this a node with a kubelet? (see --kubelet-dir)")
    folder = os.path.dirname(sockets[0])
    try:
        os.makedirs(folder, 0o750, exist_ok=True)
    except OSError as error:
        raise Problem(f"cannot make the directory {folder}: {error.strerror}") from None
    longest = max(len(os.fsencode(path)) for path in sockets)
    check_length(kubelet_dir, longest - SOCKET_PATH_BYTES, "choose a shorter path or domain")
    return folder


def serve(options: argparse.Namespace) -> int:
    """Offer the devices of this node to its kubelet until SIGTERM or SIGINT; the exit status. Raises Problem."""
    import resource as limits

    is_dra = options.api == "dra"
    try:
        folder = check_dra(options) if is_dra else check_plugin_dir(options.plugin_dir)
    except Problem:
        ConfFile(options.conf).follow()  # first report an error in the config file, which is the newer one
        raise
    most = limits.getrlimit(limits.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # somebody lowered fs.nr_open below it
        limits.setrlimit(limits.RLIMIT_NOFILE, (most, most))  # it is usually 1024 at first
    kept = kept_path(folder, options.domain, options.conf or "")
    devices = DeviceSide(options.conf, options.dev_dir, options.sys_dir, kept, with_facts=is_dra)
    devices.start()
    load_grpc(with_tls=is_dra and options.kube_api.startswith("https:"))
    thread, manager = KubeletThread(options, devices), ServiceManager(os.environ)
    thread.start()
    count = pluralize(len(devices.plan.resources), "resource")
    log_event("started", f"smarter-device-manager {__version__} offers {count}")
    if not options.conf:
        log_event("default-rules", WITHOUT_CONF)
    if not devices.plan.resources:
        log_event("nothing-offered", "no rule matches a device that can be offered; see --list", logging.WARNING)
    has_failed = True
    try:
        follow_devices(devices, thread, manager, options.interval)
        has_failed = False
    except Problem as problem:
        log_event("plugin-dir-deleted", str(problem), logging.ERROR)
    except Exception:
        log_internal_error("the device side failed")
    manager.notify("STOPPING=1")
    thread.stop()
    return int(has_failed or thread.has_failed)


def follow_devices(devices: DeviceSide, thread: KubeletThread, manager: ServiceManager, interval: float) -> None:
    """Send the plan, and another after each change of config file or /dev, until SIGTERM or SIGINT. Raises Problem."""
    changes = ChangeLog()
    watched: Snapshot | None = None  # the one whose folders are watched
    plan: Plan | None = devices.plan  # to be sent
    taken = 0  # the last signal
    while taken not in (signal.SIGTERM, signal.SIGINT):
        began = time.monotonic()
        if taken or devices.snapshot is not watched:
            watched = devices.snapshot
            devices.watch()  # before the scan, so that no change is missed
        plan = devices.turn(full=taken == SCAN_SIGNAL, reread=taken == signal.SIGHUP) or plan
        if plan:
            changes.take(plan)
        changes.flush(time.monotonic())
        thread.send(plan, devices)
        plan = None
        thread.check_directory()
        now = time.monotonic()
        rested = now + max(REST_SECONDS, 9 * (now - began))  # so that scans take at most a tenth of a core
        due = max(now, min(began + interval, changes.due))
        if devices.snapshot is not watched:  # new folders may have more in them by now
            due = min(due, rested)
        taken = _take_signal(due, rested, thread, manager)
    log_event("stopping", f"stopping: {signal.Signals(taken).name}")


def _take_signal(due: float, rested: float, thread: KubeletThread, manager: ServiceManager) -> int:
    """Wait until DUE for one of SIGNALS; that one, otherwise FOLDER_SIGNAL if it came, otherwise 0.
    FOLDER_SIGNAL brings DUE forward, but not before RESTED. Meanwhile, SIGIO makes THREAD look; MANAGER is pinged."""
    awaited = set(BLOCKED_SIGNALS)
    folder_signal = 0
    while True:
        until = min(due, thread.record_turn(manager))
        taken = signal.sigtimedwait(awaited, max(0.0, until - time.monotonic()))
        number = taken.si_signo if taken else 0
        if number == signal.SIGIO:
            thread.look()
        elif number == FOLDER_SIGNAL:
            folder_signal = number
            awaited.remove(FOLDER_SIGNAL)  # many changes at once cause one scan
            due = min(due, max(rested, time.monotonic() + GATHER_CHANGES_SECONDS))
        elif number or time.monotonic() >= due:
            # If the process was stopped and continued after DUE (SIGSTOP, SIGCONT), CPython returns a random number.
            return number if number in SIGNALS else folder_signal


def restart_compiled() -> None:
    """If this process had to compile the script, replace it by one that is given the byte code, in a file in memory:
    Python does not give back the 15 to 20 MB that compiling takes. Flags, options, name and working directory stay.
    Returns if nothing was compiled, if this is imported or run by a debugger or profiler, and if anything fails."""
    frame = sys._getframe()
    while frame.f_back and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    cached = getattr(__spec__, "cached", None)
    is_compiled = frame.f_back is None or (cached and not os.path.exists(cached))
    if frame.f_globals is not globals() or not is_compiled:
        return
    try:
        import marshal
        from subprocess import _args_from_interpreter_flags  # type: ignore[attr-defined]

        path = os.path.abspath(__file__)
        memory = os.memfd_create(os.path.basename(path), 0)  # inherited, unlike other descriptors
        os.pwrite(memory, marshal.dumps(frame.f_code), 0)  # which leaves the position at the beginning
        begin = (
            f"__file__ = {path!r}; import marshal, sys; sys.path[:1] = [{os.path.dirname(os.path.realpath(path))!r}]; "
            f"sys.argv[0] = {sys.argv[0]!r}; exec(marshal.load(open({memory}, 'rb')))"
        )
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # an arena per thread takes 7 KiB more per resource
        os.execv(sys.executable, [sys.executable, *_args_from_interpreter_flags(), "-c", begin, *sys.argv[1:]])
    except (ImportError, OSError, ValueError) as error:
        log.debug("not restarted: %s", error)


# ---------------------------------------------------------------------------------------------------------------------
# Modes: each prints something and ends, without a kubelet. What they print is for people, but for --json; the unit and
# the manifest are for programs, and keep their form.
# ---------------------------------------------------------------------------------------------------------------------

DEFAULT_IMAGE = "docker.io/library/python:3.13-slim"  # of --manifest
DEFAULT_NAMESPACE = "kube-system"
DEFAULT_POD_RESOURCES = "/var/lib/kubelet/pod-resources/kubelet.sock"
HOME_FOLDERS = ("/home/", "/root/", "/run/user/")  # hidden by ProtectHome=, see systemd.exec(5)
STATUS_SECONDS = 10.0  # for a daemon to answer --status


def program_name() -> str:
    """The name by which this program was called."""
    name = os.path.basename(sys.argv[0])
    return "smarter_device_manager.py" if name in ("", "-c", "-m", "__main__.py") else name


def write_output(text: str) -> None:
    """Print TEXT now. Raises BrokenPipeError if the reader has gone (--list | head), and Problem if a write fails; then
    stdout is /dev/null, or Python would try again when it exits, and complain."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise Problem(f"cannot write the output: {error.strerror}") from None


def scan_once(options: argparse.Namespace, with_facts: bool = False) -> DeviceSide:
    """The device side after its first scan, for modes that need no more. Raises Problem."""
    devices = DeviceSide(options.conf or "", options.dev_dir, options.sys_dir, with_facts=with_facts)
    devices.start()
    if not options.conf:
        print(f"{program_name()}: {WITHOUT_CONF}", file=sys.stderr)
    return devices


def read_all_attributes(sys_dir: str, node: Entry) -> Sequence[Document]:
    """The folders of NODE's device and its parents, with the attributes that a rule could ask for. Raises OSError."""
    found = []
    for folder in sysfs_folders(sys_dir, node):
        names = [name for name in ("driver", "subsystem") if os.path.islink(f"{folder}/{name}")]
        with contextlib.suppress(OSError), os.scandir(folder) as items:
            files = (item for item in items if item.is_file(follow_symlinks=False))
            names += [file.name for file in files if file.stat().st_mode & 0o444]
        values = {}
        for name in sorted({*names} - {"dev", "uevent"}):  # which distinguish no device from another
            value = read_attribute(folder, name)
            if value and len(value) <= MAX_VALUE and value.isprintable() and "\\x" not in value:  # a short line of text
                values[name] = value
        if values:
            found.append({"folder": folder, "attributes": values})
    return found


def show_attributes(options: argparse.Namespace) -> None:
    """--list --attributes: print the attributes of a device in sysfs, as the beginnings of a rule."""
    whole = os.path.normpath(os.path.join(options.dev_dir, options.attributes))
    path = next((whole[len(top) + 1 :] for top in (options.dev_dir, "/dev") if whole.startswith(f"{top}/")), "")
    shown = f"/dev/{path}"
    if not path or not os.path.lexists(f"{options.dev_dir}/{path}"):
        raise Problem(f"{options.attributes} is not in {options.dev_dir}; give a path such as /dev/video0 or video0")
    try:
        with LiveTree(options.dev_dir) as tree:
            nodes = resolve(tree, path, options.dev_dir)
        if nodes[0].suffix:
            paths = ", ".join(f"/dev/{node.path}" for node in nodes)
            raise Problem(f"{shown} is a folder; name one of its nodes: {paths}")
        kind, device = nodes[0].entry.kind, nodes[0].entry.device
        chain = start_read(lambda: read_all_attributes(options.sys_dir, nodes[0].entry)).result(SYSFS_SECONDS)
    except NotADevice as error:
        raise Problem(f"{shown} is not a device: {error}") from None
    except concurrent.futures.TimeoutError:
        raise Problem(f"{SYSFS_HANGS} within {SYSFS_SECONDS} s: its driver keeps whoever reads of {shown}") from None
    except OSError as error:
        raise Problem(f"cannot look at {shown}: {error.strerror}; --dev-dir names the host's /dev") from None
    if not chain:
        number = f"{kind} {os.major(device)}:{os.minor(device)}"
        raise Problem(f"{options.sys_dir} does not have {shown} ({number}); --sys-dir names the host's /sys")
    write_output(json.dumps(chain, indent=2) + "\n" if options.json else render_attributes(path, chain))


def render_attributes(path: str, chain: Iterable[Document]) -> str:
    """What --list --attributes prints for the device PATH: per folder in its CHAIN in sysfs, a block of attributes."""

    def quoted(literal: str) -> str:
        """An expression for a rule that matches only LITERAL, written in printable characters, as text in YAML."""
        escaped = re.sub(r"[\\.+*?()|\[\]{}^$]", r"\\\g<0>", literal)
        return "'" + "".join(c if c.isprintable() else f"\\x{{{ord(c):x}}}" for c in escaped).replace("'", "''") + "'"

    lines = [
        "# A device has the attributes of a rule if it has all of them itself, or one of its parents has all of them.",
        "# Take one of these blocks, and those of its lines that tell this device from others.",
        r"# resource, containerpath, with and env can use the value of each one, written as \g<attr:serial>.",
        f"- devicematch: '^{quoted(path)[1:-1]}$'",
    ]
    for block in chain:
        lines += ["", f"  # {printable(block['folder'])}", "  attributes:"]
        for name, value in block["attributes"].items():
            is_plain = re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) and not _NOT_PLAIN_TEXT.fullmatch(name)
            key = name if is_plain else "'" + name.replace("'", "''") + "'"
            lines.append(f"    {key}: {quoted(value)}")
    return "\n".join(lines) + "\n"


def render_overridden(plan: Plan, matcher: Matcher) -> str:
    """What --list prints of the devices that rules name without effect, and of the rules that have no effect at all."""
    overridden = []  # rules, and devices that PLAN offers under a later one
    for device in devices_of(plan):
        named = [rule for rule, match in matcher.find(device.path) if isinstance(match, re.Match)]
        lines = [rule.line for rule in named]
        overridden += [(rule, device) for rule in named[lines.index(device.line) + 1 :]]
    overridden.sort(key=lambda pair: (pair[0].line, pair[1].path))
    active = {device.line for device in devices_of(plan)} | {left.line for left in plan.left_out}
    rows = [(rule.line, device_path(device), device.line) for rule, device in overridden]
    winners: dict[tuple[int, str], set[int]] = {}
    for rule, device in overridden:
        if rule.line not in active:
            winners.setdefault((rule.line, rule.pattern), set()).add(device.line)
    inert = [(*key, ", ".join(map(str, sorted(later)))) for key, later in winners.items()]
    title = "Rules that later rules override for every device that they name"
    text = render_section("Overridden by a later rule", ("LINE", "PATH", "BY LINE"), rows)
    return text + render_section(title, ("LINE", "DEVICEMATCH", "BY LINE"), inert)


def show_list(options: argparse.Namespace, devices: DeviceSide | None = None) -> None:
    """--list: print what would be offered of DEVICES, which are scanned first if there are none."""
    if options.attributes is not None:
        return show_attributes(options)
    devices = devices or scan_once(options)
    epoch = time.time() - time.monotonic()
    resources = [describe_resource(resource, options.domain, epoch) for resource in devices.plan.resources.values()]
    document = describe_plan(devices.plan, resources, options.domain)
    if options.json:
        return write_output(json.dumps(document, indent=2) + "\n")
    overridden = render_overridden(devices.plan, Matcher(devices.conf.rules))
    notes = [f"{note}\n" for note in rule_notes(devices.conf.rules, options.domain)]
    write_output("".join([render_list(document), overridden, *(["\n"] if notes else []), *notes]))


def show_status(options: argparse.Namespace) -> None:
    """--status: print the state of a running daemon."""
    host, port = (options.listen or ("127.0.0.1", 8080)) if options.status is True else options.status
    address = ("127.0.0.1" if host in ("", "0.0.0.0", "::") else host, port)
    where = address_text(address)
    try:
        document = json.loads(start_read(lambda: _fetch_status(address)).result(STATUS_SECONDS))
        text = render_status(document)
    except (OSError, UnicodeError, concurrent.futures.TimeoutError) as error:
        raise Problem(
            f"no daemon answers on {where} ({network_error(error)}); give the address of its --listen option as "
            f"--status ADDRESS:PORT; for a daemon in a pod, first run kubectl -n kube-system port-forward POD {port}"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Problem(f"what answers on {where} is not a smarter-device-manager, or has another version") from None
    write_output(json.dumps(document, indent=2) + "\n" if options.json else text)


def _fetch_status(address: tuple[str, int]) -> str:
    """The status document of the server at ADDRESS; empty if it sends none. Raises OSError and UnicodeError."""
    with socket.create_connection(address, STATUS_SECONDS) as connection, connection.makefile("rb") as stream:
        connection.sendall(b"GET /status.json HTTP/1.0\r\n\r\n")
        answer = stream.read(1 << 25)  # which is more than any daemon sends; the rest is cut off
    head, _, body = answer.partition(b"\r\n\r\n")
    return body.decode("utf-8", "replace") if head.startswith(b"HTTP/1.1 200 ") else ""


def check(options: argparse.Namespace) -> None:
    """--check: print that the config file is good, and notes on its rules."""
    devices = scan_once(options)
    lines = [f"{options.conf or DEFAULT_CONF_NAME}: good, {pluralize(len(devices.conf.rules), 'rule')}"]
    lines += rule_notes(devices.conf.rules, options.domain)
    lines += [printable(_with_names(*each)) for each in describe_shared(devices.plan).items()]
    write_output("".join(f"{line}\n" for line in lines))


def rule_notes(rules: Iterable[Rule], domain: str) -> Iterator[str]:
    """Hints on good RULES that may not do what was meant: names that will be changed, and paths that cannot match."""
    for rule in rules:
        name = resource_name(rule.resource)
        if rule.resource != name and "\\" not in rule.resource:
            yield printable(f'line {rule.line}: the resource "{rule.resource}" is offered as {domain}/{name}')
        path = re.sub(r"^\^?/dev/", "", rule.pattern)
        if path != rule.pattern:
            end = "$" if re.fullmatch(r"[\w/-]+", path, re.ASCII) else ""
            yield printable(f"line {rule.line}: paths are matched without /dev/: write ^{path}{end}")


def dry_run(options: argparse.Namespace) -> int:
    """--dry-run: print what a container with a slot of each resource is given; 1 if one fails or there is none."""
    is_dra = options.api == "dra"
    devices = scan_once(options, with_facts=is_dra)
    if not devices.plan.resources:
        show_list(options, devices)
        return 1
    load_grpc()  # which says what serving needs
    slots: dict[str, dict[str, Slot]] = {name: {} for name in devices.plan.resources}  # by their names as DRA devices
    for device, slot in slots_by_device_name(devices.plan).items():
        slots[slot.resource.name][device] = slot
    rows: list[tuple[object, ...]] = []
    has_failed = False
    for name, each in slots.items():
        lines = ["nothing: it has no slot"]
        if each:
            device = min(each, key=lambda device: bool(each[device].device.problem))  # the first that is, or the first
            slot = each[device]
            try:
                lines = _try_slot(slot, options.dev_dir, is_dra)
            except AllocationError as error:
                lines, has_failed = [f"nothing: {error}"], True
            if is_dra:
                attributes = slice_device(device, slot, options.domain)["attributes"].items()
                values = " ".join(f"{key}={value}" for key, typed in attributes for value in typed.values())
                lines = [f"{device}: {values}", *(f"  {line}" for line in lines)]
        rows += [(len(each), f"{options.domain}/{name}", lines[0]), *(("", "", line) for line in lines[1:])]
    header = ("DEVICES", "RESOURCE", "ITS FIRST DEVICE, AND WHAT A CONTAINER WOULD BE GIVEN")
    table = render_table(header if is_dra else ("SLOTS", "RESOURCE", "A CONTAINER WOULD BE GIVEN"), rows)
    ending = f"{'not every' if has_failed else 'every'} one could be allocated"
    write_output(f"{table}\n{pluralize(len(slots), 'resource')}, {ending}.\n")
    return int(has_failed)


def _try_slot(slot: Slot, dev_dir: str, is_dra: bool) -> list[str]:
    """Lines that say what a container with SLOT is given. Raises AllocationError."""
    (given,) = HostDevices(dev_dir, lambda: None).allocate(slot.resource, [[slot.id]])
    lines = []
    for host, container, permissions, nodes in given.specs:
        # CDI names nodes, no link or folder.
        paths = [(place, node, [node]) for node, place in nodes] if is_dra else [(container, host, [*dict(nodes)])]
        for place, path, targets in paths:
            link, is_folder = target_of(path, targets)
            more = f" -> {link}" if link else f", {pluralize(len(targets), 'node')}" if is_folder else ""
            lines.append(f"{place} {permissions}" + (f" (the host's {path}{more})" if more or path != place else ""))
    return lines + [f"{key}={value}" for key, value in sorted(given.env.items())]


def print_systemd_unit(options: argparse.Namespace) -> None:
    """--systemd-unit: print a unit that runs this script with these options, before the node's kubelet."""
    if options.api == "dra":
        raise Problem("--systemd-unit does not support --api dra")
    script = os.path.realpath(__file__)
    folder, name = os.path.split(script)
    for path in (sys.executable, script, options.conf or ""):
        if path.startswith(HOME_FOLDERS):
            raise Problem(f"{path} is in a home folder, which the unit hides from the service: first copy it to /opt")
    pod_resources = _pod_resources_socket(options)
    pod_resources = "" if pod_resources == DEFAULT_POD_RESOURCES else pod_resources
    given = {"conf": options.conf or "", **options.given, "pod_resources_socket": pod_resources}
    network = "PrivateNetwork=yes\nRestrictAddressFamilies=AF_UNIX"
    if options.listen:
        network = "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6"
        if options.listen[0] in ("127.0.0.1", "::1", "localhost"):
            network += "\nIPAddressDeny=any\nIPAddressAllow=localhost"
    unit = SYSTEMD_UNIT.format(
        folder=folder.replace("%", "%%"),  # whole, without quotes
        folder_word=_systemd_word(folder),
        module=os.path.splitext(name)[0],
        python=_systemd_word(sys.executable),
        plugin_dir=_systemd_word(options.plugin_dir),
        plugin_dir_argument=_systemd_word(options.plugin_dir, is_argument=True),
        options="".join(f" {_systemd_word(option, is_argument=True)}" for option in _command_line(given)),
        network=network,
    )
    write_output(unit)


def _pod_resources_socket(options: argparse.Namespace) -> str:
    """The kubelet's socket of --pod-resources-socket; unless that is given, the one beside --plugin-dir."""
    beside = f"{os.path.dirname(options.plugin_dir)}/pod-resources/kubelet.sock"
    return beside if options.pod_resources_socket == DEFAULT_POD_RESOURCES else str(options.pod_resources_socket)


def _systemd_word(text: str, is_argument: bool = False) -> str:
    """TEXT as a path in a unit (systemd.syntax(7)) or an argument, where $ begins a variable (systemd.service(5))."""
    text = text.replace("%", "%%").replace("$", "$$" if is_argument else "$")
    return text if re.fullmatch(r"[\w@%$+=:,./-]+", text, re.ASCII) else '"' + re.sub(r'["\\]', r"\\\g<0>", text) + '"'


def _command_line(values: Mapping[str, str]) -> list[str]:
    return [f"--{name.replace('_', '-')}={text}" for name, text in values.items() if text]


# What becomes of an option under --manifest: an argument of the daemon, another part of the manifest, or a refusal that
# says why.
ARGUMENT, PART = "argument", "part"
_DRA_ONLY = "it goes with --api dra, which --manifest does not support; use helm template, see docs/dra.md"
MANIFEST_OPTIONS = {
    **dict.fromkeys(("domain", "interval", "log_level", "log_format"), ARGUMENT),
    **dict.fromkeys(("conf", "plugin_dir", "pod_resources_socket", "dev_dir", "sys_dir", "listen"), PART),
    **dict.fromkeys(("api", "image", "namespace", "pip_index", "pip_ca"), PART),
    **dict.fromkeys(("kubelet_dir", "cdi_dir", "gone_grace", "kube_api", "kube_token_file", "kube_ca_file"), _DRA_ONLY),
    "node_name": "one manifest is for all nodes, and Kubernetes tells each pod the name of its node; leave it out",
}


def print_manifest(options: argparse.Namespace) -> None:
    """--manifest: print daemonset.yaml with this script in it, so that a public image of Python is enough."""
    if options.api == "dra":
        raise Problem("--manifest does not support --api dra; use helm template, see docs/dra.md")
    for name in options.given:
        if MANIFEST_OPTIONS[name] not in (ARGUMENT, PART):
            raise Problem(f"--manifest does not take --{name.replace('_', '-')}: {MANIFEST_OPTIONS[name]}")
    path = os.path.realpath(__file__)
    folder = os.path.dirname(path)
    files = {"smarter_device_manager.py": _read_text(path)}
    files.update((stub, _read_text(f"{folder}/{stub}")) for stub in ("api_pb2.py", "api_pb2_grpc.py"))
    files.update({"install.py": INSTALL_PACKAGES, "requirements.txt": REQUIREMENTS})
    if options.pip_ca:
        files["pip-ca.crt"] = _read_text(options.pip_ca)
        if "-----BEGIN CERTIFICATE-----" not in files["pip-ca.crt"]:
            raise Problem(f"{options.pip_ca} has no CA certificate in PEM format")
    values = _manifest_values(options, "".join(files.values()))
    text = _read_text(f"{folder}/daemonset.yaml")
    for pattern, template in MANIFEST_EDITS.items():
        found = re.search(pattern, text, re.MULTILINE)
        if not found:
            problem = f"is not the one that came with this script: nothing in it matches {pattern}"
            raise Problem(f"{folder}/daemonset.yaml {problem}")
        text = text[: found.start()] + template.format(found=found[0], **values) + text[found.end() :]
    conf = ConfFile(options.conf or "")
    conf.follow()
    maps = MANIFEST_HEAD
    for name, texts in ("smarter-device-manager", {"conf.yaml": conf.text}), ("smarter-device-manager-script", files):
        maps += CONFIG_MAP.format(name=name, namespace=values["namespace"])
        for file, content in texts.items():  # as a block text, which begins after two of the blanks before its lines
            lines = content.rstrip("\n").split("\n")
            maps += f"  {file}: |2\n" + "".join(f"    {line}\n" if line else "\n" for line in lines)
        maps += "---\n"
    write_output(maps + text)


def _manifest_values(options: argparse.Namespace, files: str) -> dict[str, str]:
    """What MANIFEST_EDITS fill in. FILES is all that is in the ConfigMap with the script."""
    host, port = options.listen or ("", 8080)
    if host not in ("", "0.0.0.0", "::") or not port:
        probed = "the pod at its own address and a fixed port; leave the address out, as in --listen :8080"
        raise Problem(f"--manifest does not take --listen {options.given['listen']}: the kubelet probes {probed}")
    image = options.image or DEFAULT_IMAGE
    socket_folder, socket_name = os.path.split(_pod_resources_socket(options))
    arguments = {name: value for name, value in options.given.items() if MANIFEST_OPTIONS[name] == ARGUMENT}
    if socket_name != "kubelet.sock":
        arguments["pod_resources_socket"] = f"/var/lib/kubelet/pod-resources/{socket_name}"
    pip = {"PIP_INDEX_URL": options.pip_index, "PIP_CERT": options.pip_ca and "/app/pip-ca.crt"}
    packages = re.sub(r"[^\w.-]", "_", f"{image}-{short_hash(REQUIREMENTS)}", flags=re.ASCII)
    quoted = {
        "image": image,
        "packages": f"/var/lib/smarter-device-manager/{packages}",
        "plugin_dir": options.plugin_dir,
        "pod_resources": socket_folder,
        "dev_dir": options.dev_dir,
        "sys_dev": f"{options.sys_dir}/dev",
        "sys_devices": f"{options.sys_dir}/devices",
    }
    return {
        **{name: json.dumps(value) for name, value in quoted.items()},
        "namespace": options.namespace or DEFAULT_NAMESPACE,
        "digest": short_hash(files),
        "port": str(port),
        "arguments": "".join(f"            - {json.dumps(argument)}\n" for argument in _command_line(arguments)),
        "pip": "".join(f"            - {{name: {key}, value: {json.dumps(pip[key])}}}\n" for key in pip if pip[key]),
    }


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not text"
        raise Problem(f"cannot read {path}: {problem}; the manifest is made from it") from None


# But --status, which can have an address. A mode returns the exit status, unless that is 0.
MODES: Mapping[str, tuple[Callable[[argparse.Namespace], int | None], str]] = {
    "check": (check, "say whether the config file is good"),
    "list": (show_list, "print what would be offered, and what is left out and why"),
    "dry_run": (dry_run, "allocate each resource, without a kubelet"),
    "systemd_unit": (print_systemd_unit, "print a systemd unit that has the options given"),
    "manifest": (print_manifest, "print a manifest that has the options given and needs no image of its own"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Options: the command line and the environment, and the way from them to a mode. Options and exit statuses must stay,
# because the documentation and other people's scripts rely on them.
# ---------------------------------------------------------------------------------------------------------------------

ENVIRONMENT = "SMARTER_DEVICE_MANAGER_"
DEFAULT_PLUGIN_DIR = "/var/lib/kubelet/device-plugins"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line. Values can also come from the environment; the command line wins."""
    parser = argparse.ArgumentParser(
        prog=program_name(),
        usage="%(prog)s [OPTION ...]\n       [--check | --list | --dry-run | --status | --systemd-unit | --manifest]",
        description="Offer the devices of this node to Kubernetes, as resources that pods can request. Without a mode, "
        "this serves the kubelet of the node until SIGTERM.",
        epilog=f"An option with a value can also be set by an environment variable, such as {ENVIRONMENT}CONF for "
        "--conf; the command line wins. On SIGHUP, a daemon reads the config file and looks at all devices again.",
    )
    _add_modes(parser)
    beside = os.path.join(os.path.dirname(os.path.realpath(__file__)), "conf.yaml")
    conf, built_in = (beside, "") if os.path.lexists(beside) else (None, " (default: built-in rules)")
    add = functools.partial(add_option, parser)
    add("--conf", "FILE", option_path, conf, f"the config file, a YAML list of rules{built_in}", "--config")
    add("--plugin-dir", "DIR", option_path, DEFAULT_PLUGIN_DIR, "the kubelet's directory for device plugins")
    add("--pod-resources-socket", "PATH", option_path, DEFAULT_POD_RESOURCES, "the kubelet's PodResources socket")
    add("--dev-dir", "DIR", option_path, "/dev", "the host's /dev")
    add("--sys-dir", "DIR", option_path, "/sys", "the host's /sys")
    what = 'a domain that the kubelet accepts: lower-case letters, digits, "-" and ".", up to 244 characters, not one '
    domain = option_text(is_domain, f"{what}of kubernetes.io, and not beginning with requests.")
    add("--domain", "NAME", domain, DEFAULT_DOMAIN, "the part of a resource's name before the /")
    add("--interval", "SECONDS", option_seconds, "1", "the time between two looks at config file and devices")
    level = option_text("(?i)debug|info|warning|error|", "a level: debug, info, warning, error")
    add("--log-level", "LEVEL", level, "", "debug, info, warning or error (default: info; in modes: warning)")
    log_format = option_text("text|json", "a format: text or json")
    add("--log-format", "FORMAT", log_format, "text", "text or json, one line per event")
    listen_help = "serve health, metrics and a status page there (default: off)"
    add("--listen", "ADDRESS:PORT", lambda text: option_address(text) if text else None, "", listen_help)
    _add_dra_options(functools.partial(add_option, parser.add_argument_group("Dynamic Resource Allocation")))
    return parser


def _add_modes(parser: argparse.ArgumentParser) -> None:
    """Add the modes, and the options that belong to one of them."""
    group = parser.add_argument_group("modes, which do something else and exit")
    modes = group.add_mutually_exclusive_group()
    for name, (_, help_text) in MODES.items():
        modes.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=help_text)
    status_help = "print the state of a running daemon (default: the address of --listen, or 127.0.0.1:8080)"
    modes.add_argument("--status", nargs="?", const=True, type=option_address, metavar="ADDRESS:PORT", help=status_help)
    version = f"smarter-device-manager {__version__}"
    modes.add_argument("--version", action="version", version=version, help="print the version")
    group.add_argument("--json", action="store_true", help="with --list or --status: print JSON")
    attributes_help = "with --list: print the attributes of the device PATH, to write rules from"
    group.add_argument("--attributes", metavar="PATH", help=attributes_help)
    image = option_text(r"(?a:\w[\w.:/@-]*)", f"the name of an image, such as {DEFAULT_IMAGE}")
    url = option_text("https://[!-~]+", "a URL of an index that pip trusts, such as https://pypi.example.com/simple")
    label = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    namespace = option_text(label, 'a namespace: lower-case letters, digits and "-", up to 63 characters')
    for option, metavar, read, help_text in (
        ("--image", "IMAGE", image, f"a public image with Python and pip (default: {DEFAULT_IMAGE})"),
        ("--pip-index", "URL", url, "the package index to install from, instead of PyPI"),
        ("--pip-ca", "FILE", option_path, "the CA certificates (PEM) of that index"),
        ("--namespace", "NAME", namespace, f"the namespace, which must exist (default: {DEFAULT_NAMESPACE})"),
    ):
        group.add_argument(option, metavar=metavar, type=read, help=f"with --manifest: {help_text}")


def _add_dra_options(add: Callable[..., None]) -> None:
    """ADD --api, and the options that it takes with dra."""
    api = option_text("device-plugin|dra", "an API: device-plugin or dra")
    add("--api", "API", api, "device-plugin", "how to offer the devices: device-plugin or dra")
    add("--kubelet-dir", "DIR", option_path, "/var/lib/kubelet", "the kubelet's own directory")
    add("--cdi-dir", "DIR", option_path, "/var/run/cdi", "where the container runtime reads CDI files")
    node = os.environ.get("NODE_NAME") or socket.gethostname().lower()
    grace_help = "for how long a device may be gone before Kubernetes evicts the pods that have it"
    add("--gone-grace", "SECONDS", functools.partial(option_seconds, least=0.0), "5", grace_help)
    add("--node-name", "NAME", str, node, "the name of this node in Kubernetes")
    host, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))  # in every pod
    url = f"https://{f'[{host}]' if ':' in host else host}:{port or 443}" if host else ""
    add("--kube-api", "URL", str, url, "the URL of the API server (default: that of the pod)")
    account = "/var/run/secrets/kubernetes.io/serviceaccount"  # in a pod
    add("--kube-token-file", "FILE", option_path, f"{account}/token", "the token for the API server")
    add("--kube-ca-file", "FILE", option_path, f"{account}/ca.crt", "the CA certificates of the API server")


def add_option(
    group: Any, option: str, metavar: str, read: Callable[[str], Any], default: str | None, text: str, *more: str
) -> None:
    """Add OPTION to GROUP, with MORE names and an environment variable. READ reads its value; TEXT explains it."""
    variable = ENVIRONMENT + option[2:].upper().replace("-", "_")
    given = os.environ.get(variable)

    def convert(value: str) -> Any:
        try:
            return read(value)
        except argparse.ArgumentTypeError as error:
            source = f" (from {variable})" if value is given else ""
            raise argparse.ArgumentTypeError(f"{error}{source}") from None

    shown = (text + (f" (default: {default})" if default else "")).replace("%", "%%")
    group.add_argument(option, *more, metavar=metavar, type=convert, default=given or default, help=shown)


def option_text(wanted: str | Callable[[str], object], what: str) -> Callable[[str], str]:
    """A reader of texts that are WHAT: those that match WANTED, or for which it is true."""
    is_good = functools.partial(re.fullmatch, wanted) if isinstance(wanted, str) else wanted

    def read(text: str) -> str:
        if not is_good(text):
            raise argparse.ArgumentTypeError(f'"{text}" is not {what}')
        return text

    return read


def option_path(text: str) -> str:
    """The absolute path TEXT."""
    if not text:
        raise argparse.ArgumentTypeError('"" is not a path')
    try:
        path = os.path.abspath(text)
    except OSError:
        problem = f'"{text}" begins in the working directory, which is gone; write the whole path'
        raise argparse.ArgumentTypeError(problem) from None
    return re.sub("^//+", "/", path)  # abspath() keeps two slashes at the beginning


def option_seconds(text: str, least: float = 0.01) -> float:
    """The number of seconds TEXT, from LEAST to an hour."""
    with contextlib.suppress(ValueError):
        if least <= float(text) <= 3600:
            return float(text)
    raise argparse.ArgumentTypeError(f'"{text}" is not a number of seconds from {least:g} to 3600')


def option_address(text: str) -> tuple[str, int]:
    """The address TEXT and its port."""
    host, colon, port = text.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port) or not colon or int(port) > 65535:
        raise argparse.ArgumentTypeError(f'"{text}" is not an ADDRESS:PORT, such as :8080 or 127.0.0.1:8080')
    return host.strip("[]"), int(port)


def set_up_log(options: argparse.Namespace, handler: logging.Handler, level: int) -> None:
    """Send what is logged to HANDLER, from LEVEL on or from that in OPTIONS."""
    least = int(logging.getLevelName(options.log_level.upper())) if options.log_level else level
    handler.setFormatter(EventFormatter(options.log_format == "json"))
    # Refusals are logged at every level. The status page shows events of level info even if the log does not.
    refusals = ("refused", "start-refused")
    handler.addFilter(lambda record: record.levelno >= least or getattr(record, "event", "") in refusals)
    logging.basicConfig(level=min(least, logging.INFO), handlers=[handler])


def main() -> int:
    """Run what the command line asks for; the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names in /dev need not be UTF-8
    try:
        try:
            return run(parse_options())
        finally:
            write_output("")  # flushes what argparse printed
    except Problem as error:
        print(f"{program_name()}: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE


def parse_options() -> argparse.Namespace:
    """The options of the command line. Exits if they are wrong, and after --help and --version."""
    parser = build_parser()
    options = parser.parse_args()
    if options.attributes is not None and not options.list:
        parser.error("--attributes goes with --list: --list --attributes /dev/video0")
    if (options.image or options.namespace or options.pip_index or options.pip_ca) and not options.manifest:
        parser.error("--image, --namespace, --pip-index and --pip-ca go with --manifest")
    if options.json and not options.list and options.status is None:
        parser.error("--json goes with --list and --status")
    on_command_line = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(options))))
    options.given = {  # name and text of those that the command line or the environment gives a value
        name: f"{value:g}" if isinstance(value, float) else address_text(value) if isinstance(value, tuple) else value
        for name, value in vars(options).items()
        if value is not None and not isinstance(value, bool)
        if getattr(on_command_line, name) is not None or os.environ.get(ENVIRONMENT + name.upper())
    }
    return options


def run(options: argparse.Namespace) -> int:
    """Do what OPTIONS ask for; the exit status. Raises Problem."""
    for name, (mode, _) in {**MODES, "status": (show_status, "")}.items():
        if getattr(options, name):
            set_up_log(options, logging.StreamHandler(), logging.WARNING)
            return mode(options) or 0
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    restart_compiled()
    writer = LogWriter()
    set_up_log(options, writer, logging.INFO)
    try:
        return serve(options)
    except Problem as error:
        writer.put(f"{program_name()}: {printable(str(error))}")
        return 1


# ---------------------------------------------------------------------------------------------------------------------
# Appendix: the texts of the status page, and those that --systemd-unit and --manifest print.
# ---------------------------------------------------------------------------------------------------------------------

_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<noscript><meta http-equiv="refresh" content="5"></noscript><style nonce="{nonce}">
:root { color-scheme: light dark; --page: light-dark(#f4f5f7, #0f1318); --card: light-dark(#fff, #181d24);
  --text: light-dark(#1b1f24, #e4e8ed); --dim: light-dark(#59636e, #98a3b0); --line: light-dark(#e1e4e8, #2a313a);
  --used: light-dark(#2563c9, #6aa1ff); --full: light-dark(#a85f00, #f0a63a); --good: light-dark(#166a3a, #56d08a);
  --bad: light-dark(#b3262b, #ff8a8a); --goal: light-dark(#fff7d6, #33301a); }
* { box-sizing: border-box; margin: 0; padding: 0; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
header { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin-bottom: 1.25rem; }
header p { flex-basis: 100%; } footer { margin-top: 2rem; } ul { list-style: none; } a { color: var(--used); }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1rem; color: var(--dim); margin: 2rem 0 .6rem; }
code { font: .92em ui-monospace, Menlo, "DejaVu Sans Mono", monospace; }
.pill, button { border: 1px solid; border-radius: 99px; padding: .15rem .8rem; font: inherit; font-weight: 600; }
button { background: var(--card); color: var(--text); margin-left: auto; }
small, .dim { font-size: .87rem; font-weight: 400; color: var(--dim); } small { display: block; }
.good { color: var(--good); } .bad { color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; } .list { padding: .3rem 1rem; }
.list li { display: grid; grid-template-columns: 11rem 1fr; gap: 0 1.5rem; padding: .4rem 0; }
.list li + li, tbody th, td { border-top: 1px solid var(--line); }
.wrong { border-left: 5px solid var(--bad); margin-bottom: 1.25rem; } .wrong li { display: block; }
.facts { display: flex; flex-wrap: wrap; gap: .3rem 2rem; padding: .6rem 1rem; }
table { width: 100%; border-spacing: 0; table-layout: fixed; }
th, td { text-align: left; vertical-align: top; padding: .6rem 1rem; }
thead th:nth-child(1) { width: 20%; } thead th:nth-child(2) { width: 17%; } thead th:nth-child(3) { width: 28%; }
:target, :target td { background: var(--goal); }
svg { display: block; width: 100%; height: 9px; margin-top: .35rem; border-radius: 5px; background: var(--line); }
rect { fill: var(--used); } [width="100%"] { fill: var(--full); }
.dot { display: inline-block; border: .31em solid; border-radius: 50%; margin-right: .5em; }
@media (max-width: 44rem) {
  .list li { grid-template-columns: 1fr; }
  table, tbody, tr, th, td { display: block; } thead { display: none; } table.card { background: none; border: 0; }
  tbody { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .4rem 0; }
  tbody + tbody { margin-top: .6rem; } tbody th, td { padding: .2rem 1rem; border: 0; }
  td:empty { display: none; } td[data-name]::before { content: attr(data-name) " "; color: var(--dim); } }
</style><title>{node}: {verdict}</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'%3E%3Ccircle \
cx='4' cy='4' r='4' fill='{colour}'/%3E%3C/svg%3E">
</head><body>
<header><h1>{node}</h1><span id="verdict" role="status" data-live><span class="pill {mood}">{verdict}</span></span>
<button id="pause" type="button" hidden>Pause</button>
<p class="dim">smarter-device-manager {smarter_device_manager}, as of <span id="time" data-live>{moment}</span>.
All times are UTC. <strong id="trouble" class="bad" role="status"></strong></p></header>
<main id="content" data-live>
"""
_TABLE = """<table class="card" role="table">
<thead><tr><th scope="col">Resource</th><th scope="col">Slots in use</th><th scope="col">Device</th>
<th scope="col">Used by</th></tr></thead>
"""
_RESOURCE = """<th role="rowheader" scope="rowgroup" rowspan="{rows}"><small>{domain}/</small>{name}\
<small class="bad">{problem}</small><small class="bad">{refused}</small></th>
<td role="cell" rowspan="{rows}" data-name="Slots in use:">{use}
<svg aria-hidden="true"><rect width="{percent}%" height="100%"/></svg></td>
"""
_DEVICE = """<td role="cell" title="since {since}, by the rule of line {line}"><span class="dot {mood}" role="img" \
aria-label="{state}"></span><code>{text}</code>"""
_PROBLEM = """<small class="bad">Unhealthy: {problem}</small><small>since {since}</small>"""
_USER = """<p>{container} <span class="dim">of</span> {pod} <small>{slots}</small></p>"""
_NO_TABLE = '<p class="dim">No device is offered: no rule names a device of this node.</p>\n'
_FOOT = """</main>
<footer class="dim">This page updates itself every 5 seconds. For programs: <a href="status.json">\
status.json</a>, <a href="metrics">metrics</a>, <a href="healthz">healthz</a>, <a href="readyz">readyz</a>.</footer>
<script nonce="{nonce}">
const button = document.getElementById("pause"), trouble = document.getElementById("trouble"), period = 5000;
const mayChange = () => button.textContent == "Pause" && !document.hidden && getSelection().isCollapsed;
function show(page) {
  const focused = document.activeElement.getAttribute("href");
  for (const part of document.querySelectorAll("[data-live]")) {
    const made = page.getElementById(part.id);
    if (part.innerHTML != made.innerHTML) part.replaceChildren(...made.childNodes);
  }
  document.title = page.title;
  document.querySelector("[rel=icon]").href = page.querySelector("[rel=icon]").href;
  if (focused && document.activeElement == document.body)
    document.querySelector(`[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}
async function refresh() {
  if (mayChange()) try {
    const answer = await fetch(location.pathname, { cache: "no-store", signal: AbortSignal.timeout(period) });
    const text = await answer.text(), end = text.indexOf("</style>");  // that style has another nonce
    if (mayChange()) show(new DOMParser().parseFromString(text.slice(end), "text/html"));
    trouble.textContent = "";
  } catch {
    trouble.textContent ||= `No answer since ${new Date().toISOString().slice(0, 19).replace("T", " ")}.`;
  }
}
button.onclick = () => button.textContent = button.textContent == "Pause" ? "Resume" : "Pause";
button.hidden = false;
setInterval(refresh, period);
</script></body></html>
"""
SYSTEMD_UNIT = """\
# smarter-device-manager on the host, without a container. Printed by its option --systemd-unit.
[Unit]
Description=Offer the devices of this node to Kubernetes
# A pod that needs a device fails for good if the kubelet starts it before the device is registered.
Before=kubelet.service k3s.service k3s-agent.service rke2-server.service rke2-agent.service
Before=k0scontroller.service k0sworker.service snap.microk8s.daemon-kubelite.service
RequiresMountsFor={folder_word} {plugin_dir}
StartLimitIntervalSec=0

[Service]
Type=notify
WatchdogSec=30
Restart=on-failure
RestartSec=2
TimeoutStopSec=5
WorkingDirectory={folder}
Environment=MALLOC_ARENA_MAX=1
# Before the first start of the kubelet there is no such directory; for this command, ReadWritePaths= begins with "-".
ExecStartPre=+/bin/mkdir -p -m 0750 {plugin_dir_argument}
# Byte code saves half of the time to start and 10 MiB. The daemon also starts without it.
ExecStartPre=-+{python} -m compileall -q -l .
ExecStart={python} -m {module}{options}
ExecReload=/bin/kill -HUP $MAINPID

# The daemon is root, because root owns the kubelet's directory, but has no capabilities. PrivateDevices= and
# ProtectKernelLogs= are missing because they change /dev. DevicePolicy= may forbid all devices: it never opens one.
CapabilityBoundingSet=
NoNewPrivileges=yes
ReadWritePaths=-{plugin_dir}
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateIPC=yes
PrivateMounts=yes
PrivateUsers=yes
DevicePolicy=closed
ProtectClock=yes
ProtectHostname=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
ProtectProc=invisible
ProcSubset=pid
{network}
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
KeyringMode=private
UMask=0077
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""
MANIFEST_HEAD = """\
# smarter-device-manager for a cluster, without an image of its own. Printed by its option --manifest.
# Use kubectl apply --server-side, because the script does not fit into an annotation.
"""
CONFIG_MAP = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: {name}
  namespace: {namespace}
  labels: {{app.kubernetes.io/name: smarter-device-manager}}
data:
"""
# What --manifest changes in daemonset.yaml, in this order: what a pattern finds, and what stands there then.
MANIFEST_EDITS = {
    r"\A(?:.*\n)*---\n": "",
    "^  namespace: .*": "  namespace: {namespace}",
    "^    spec:\n": """\
      annotations: {{smarter-device-manager/script: "{digest}"}} # another script is another pod
{found}""",
    "^(?: *#.*\n)* *image: smarter-device-manager:.*": """\
          image: {image}
          command: [python3, -m, smarter_device_manager]
          workingDir: /app""",
    "^ *- --listen=.*\n": "            - --listen=:{port}\n{arguments}",
    "containerPort: .*": "containerPort: {port}",
    "^          env:\n": """\
{found}            - {{name: SMARTER_DEVICE_MANAGER_CONF, value: /root/config/conf.yaml}}
            - {{name: PYTHONPATH, value: /packages}}
            - {{name: PYTHONPYCACHEPREFIX, value: /packages/pycache}}
            - {{name: PYTHONDONTWRITEBYTECODE, value: "1"}}
            - {{name: MALLOC_ARENA_MAX, value: "1"}}
""",
    "^      containers:\n": """\
      initContainers:
        - name: packages
          image: {image}
          imagePullPolicy: IfNotPresent
          command: [python3, install.py]
          workingDir: /app
          env:
            - {{name: PYTHONPATH, value: /packages}}
            - {{name: PYTHONPYCACHEPREFIX, value: /packages/pycache}}
            - {{name: TMPDIR, value: /packages}}
{pip}          securityContext: {{runAsUser: 0, privileged: false, allowPrivilegeEscalation: false,
            readOnlyRootFilesystem: true, capabilities: {{drop: [ALL]}}}}
          volumeMounts: [{{name: script, mountPath: /app, readOnly: true}}, {{name: packages, mountPath: /packages}}]
{found}""",
    "^      volumes:\n": """\
            - {{name: script, mountPath: /app, readOnly: true}}
            - {{name: packages, mountPath: /packages, readOnly: true}}
{found}        - {{name: script, configMap: {{name: smarter-device-manager-script}}}}
        - name: packages # kept, so that a node boots without internet
          hostPath: {{path: {packages}, type: DirectoryOrCreate}}
""",
    "^            path: /var/lib/kubelet/device-plugins$": "            path: {plugin_dir}",
    "^            path: /var/lib/kubelet/pod-resources$": "            path: {pod_resources}",
    "^            path: /dev$": "            path: {dev_dir}",
    "^            path: /sys/dev$": "            path: {sys_dev}",
    "^            path: /sys/devices$": "            path: {sys_devices}",
}
# Runs in the init container. The marker is made last; without it, the installation may be incomplete. The check also
# leaves byte code of all that is imported, without which the daemon takes 10 MB more and starts slower.
INSTALL_PACKAGES = """\
import os, pathlib, platform, subprocess, sys
marker = pathlib.Path("/packages/installed")
check = [sys.executable, "-c", "import smarter_device_manager; smarter_device_manager.load_grpc()"]
if not marker.exists() or subprocess.call(check):
    install = [sys.executable, "-m", "pip", "install", "--target=/packages", "--upgrade", "--only-binary=:all:"]
    if subprocess.call([*install, "--no-cache-dir", "--require-hashes", "--requirement=/app/requirements.txt"]):
        here = f"Python {platform.python_version()} on {platform.machine()}"
        sys.exit(f"the packages are pinned for Python 3.13 on amd64, arm64 and arm/v7 with glibc; this is {here}")
    os.sync()
    marker.touch()
    sys.exit(subprocess.call(check))
"""
REQUIREMENTS = """\
# The wheels for Python 3.13 on linux/amd64, linux/arm64 and linux/arm/v7, in this order; a test downloads them all.
grpcio==1.85.3 \\
    --hash=sha256:9d20015c0dfc91de7a9a037cc84c7a174e8fe62e6427f563f1e2e35ca10f3798 \\
    --hash=sha256:399fc184b4d2dd0b014b4b880a5b1ecc99383b610dbb270acb43d1b23e1e8b9c \\
    --hash=sha256:87d162186a98e907cdf2c3ee4f419967c513f9799fdf9168f5aeb7e7889f020e
protobuf==7.36.2 \\
    --hash=sha256:89f23aa53c24553a2416fd4fd1ec06f74fa42b14b546d8883128813f775bbfd2 \\
    --hash=sha256:e11e1f0180583a2af89db6a2ecd9e8dc40aa6d2988ca175bfd0e6d12ea72d74e \\
    --hash=sha256:bdb3a345d48db958e6ce1f18e508beb0cc981d64f24088427549c866cd039f1e
typing-extensions==4.16.0 \\
    --hash=sha256:481caa481374e813c1b176ada14e97f1f67a4539ce9cfeb3f350d78d6370c2e8
"""


if __name__ == "__main__":
    sys.exit(main())
