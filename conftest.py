"""pytest --section TEXT runs only the sections of a test file whose heading contains TEXT, in upper or lower case.

A heading is the comment between two lines of dashes.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--section", metavar="TEXT", help="only the sections of a test file whose heading contains TEXT")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("section")
    if not wanted:
        return
    sections = {path: headings(path) for path in {item.path for item in items}}
    chosen = [item for item in items if wanted.lower() in heading_of(item, sections[item.path]).lower()]
    if not chosen:
        names = sorted({name for found in sections.values() for _, name in found})
        raise pytest.UsageError(f"no section is called {wanted}; there are: {'; '.join(names)}")
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def headings(path: Path) -> list[tuple[int, str]]:
    """The first line of each heading in the file PATH, and its text."""
    text = path.read_text()
    found = re.finditer(r"^# -{50,}\n((?:# .*\n)+?)# -{50,}$", text, re.MULTILINE)
    return [(text.count("\n", 0, match.start()), re.sub(r"\s*\n?# ", " ", match[1]).strip()) for match in found]


def heading_of(item: pytest.Item, found: list[tuple[int, str]]) -> str:
    index = bisect_right(found, (item.location[1] or 0, ""))
    return found[index - 1][1] if index else ""
