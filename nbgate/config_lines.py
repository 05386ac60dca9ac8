"""The line of every key of a TOML text.

Purpose: tell on which line a setting stands, which `tomllib` does not. Lives here: one scanner for *valid* TOML.
Must not: values, types, messages. Heat: cold.
"""

from __future__ import annotations

import re
import tomllib
from typing import Final

Where = tuple[str | int, ...]

_SPACE: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BLANK: Final = re.compile(r"[ \t]*")
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
# NOTE: the long forms stand first, since "" is also the beginning of """.
_STRING: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}(?!")|\'\'\'.*?\'{3,5}(?!\')|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'', re.DOTALL
)
# A date may be parted from its time by one space.
_SCALAR: Final = re.compile(r"\d{4}-\d\d-\d\d \d\d:[^\s,\]}#]*|[^\s,\]}#]+")


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Where, int] = {}
        self.tables: dict[Where, int] = {}
        self._counted = (0, 1)

    def line(self) -> int:
        start, line = self._counted
        line += self.text.count("\n", start, self.at)
        self._counted = (self.at, line)
        return line

    def skip(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise ValueError(f"line {self.line()}: no {pattern.pattern}")
        self.at = found.end()
        return found.group()

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def document(self) -> None:
        table: Where = ()
        self.skip(_SPACE)
        while self.at < len(self.text):
            table = self.header() if self.peek() == "[" else self.pair(table)
            self.skip(_SPACE)

    def header(self) -> Where:
        line = self.line()
        listed = self.text.startswith("[[", self.at)
        self.at += 2 if listed else 1
        names = self.key()
        self.at += 2 if listed else 1
        where: Where = ()
        for index, name in enumerate(names):
            where = (*where, name)
            last = index == len(names) - 1
            if listed and last:
                self.tables[where] = self.tables.get(where, -1) + 1
            if where in self.tables:
                self.lines.setdefault(where, line)
                where = (*where, self.tables[where])
            self.lines.setdefault(where, line)
        return where

    def key(self) -> list[str]:
        names = []
        while True:
            self.skip(_BLANK)
            if self.peek() in "\"'":
                names.append(str(tomllib.loads(f"k = {self.skip(_STRING)}")["k"]))
            else:
                names.append(self.skip(_BARE))
            self.skip(_BLANK)
            if self.peek() != ".":
                return names
            self.at += 1

    def pair(self, table: Where) -> Where:
        line = self.line()
        where = table
        for name in self.key():
            where = (*where, name)
            self.lines.setdefault(where, line)
        self.at += 1  # the "="
        self.skip(_SPACE)
        self.value(where)
        return table

    def value(self, where: Where) -> None:
        first = self.peek()
        if first == "[":
            self.items(where)
        elif first == "{":
            self.inline(where)
        else:
            self.skip(_STRING if first in "\"'" else _SCALAR)

    def items(self, where: Where) -> None:
        self.at += 1
        index = 0
        while True:
            self.skip(_SPACE)
            if self.peek() == "]":
                break
            self.lines[(*where, index)] = self.line()
            self.value((*where, index))
            index += 1
            self.skip(_SPACE)
            if self.peek() == ",":
                self.at += 1
        self.at += 1

    def inline(self, where: Where) -> None:
        self.at += 1
        while True:
            self.skip(_SPACE)
            if self.peek() == "}":
                break
            self.pair(where)
            self.skip(_SPACE)
            if self.peek() == ",":
                self.at += 1
        self.at += 1


def lines_of(text: str) -> dict[Where, int]:
    """Map each path of a valid TOML text to its line, from 1.

    Paths hold table names and list positions: ("keys", 1, "rpm"). A text that the scanner
    does not follow to its end still yields the lines found before.
    """
    scanner = _Scanner(text.replace("\r\n", "\n"))
    try:
        scanner.document()
    except (ValueError, RecursionError):
        pass
    return scanner.lines
