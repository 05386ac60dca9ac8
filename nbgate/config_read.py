"""Reading of the configuration: TOML with line numbers, secrets, overrides, types.

Purpose: turn text and environment into a tree that fits a struct, and name every fault with its line.
Lives here: the line index, `env:`/`file:` values, `NBGATE_A__B` overrides, checks of type and bound against any struct.
Must not: knowledge of single settings (`config_shape` has them, `config_check` compares them). Heat: cold.
"""

from __future__ import annotations

import datetime
import difflib
import math
import re
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, get_args, get_origin

import msgspec

from nbgate.config_lines import lines_of
from nbgate.config_shape import Section

ENV_PREFIX: Final = "NBGATE_"
MAX_SECRET_FILE_BYTES: Final = 65_536
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_NOTHING: Final = object()

Where = tuple[str | int, ...]


class Problem(NamedTuple):
    """One fault of the configuration; `line` is 0 where there is none."""

    file: str
    line: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.message}"


class Hint(NamedTuple):
    """A type taken apart: what it is, its bounds and its marks."""

    type: Any
    full: Any
    meta: tuple[msgspec.Meta, ...]

    def marked(self, name: str) -> bool:
        return any((meta.extra or {}).get(name) for meta in self.meta)


def take_apart(annotation: Any) -> Hint:
    """Split an annotation into bare type and metadata."""
    meta: tuple[Any, ...] = ()
    bare = annotation
    while get_origin(bare) is Annotated:
        meta += tuple(item for item in bare.__metadata__ if isinstance(item, msgspec.Meta))
        bare = bare.__origin__
    return Hint(bare, annotation, meta)


def dotted(where: Where) -> str:
    """Write a path as a user would: channels.main.keys[1].rpm."""
    text = ""
    for part in where:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{printable(part)}"'
            text += f".{shown}" if text else shown
    return text


def printable(text: str, most: int = 60) -> str:
    """Cut and escape a string so that it fits one line of a terminal."""
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: most + 1])
    return shown if len(text) <= most else shown[:most] + "…"


def nearest(name: str, known: Any) -> str:
    """Say which known name was probably meant, or which there are."""
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 12 else ""


class Reader:
    """Checks one tree against a struct and gathers every problem."""

    def __init__(self, file: str, lines: Mapping[Where, int], env: Mapping[str, str]) -> None:
        self.file = file
        self.lines = lines
        self.env = env
        self.problems: list[Problem] = []
        self.faulty: list[Where] = []
        # Where a value came from, when not from the file itself: path -> "env:NAME" and the like.
        self.origins: dict[Where, str] = {}
        self.raw: dict[str, Any] = {}
        self._secret_depth = 0

    def names(self, section: str) -> list[str]:
        """List the names that a section of named tables has in the file."""
        found = self.raw.get(section)
        return list(found) if isinstance(found, dict) else []

    # -- problems

    def problem(self, where: Where, message: str) -> None:
        """Note a fault at the nearest place that has a line."""
        self.faulty.append(where)
        path = dotted(where)
        text = f"{path}: {message}" if path else message
        for end in range(len(where), -1, -1):
            origin = self.origins.get(where[:end], "")
            if origin.startswith(ENV_PREFIX):
                self.problems.append(Problem(origin, 0, path, text))
                return
        self.problems.append(Problem(self.file, self.line(where), path, text))

    def line(self, where: Where) -> int:
        """Find the line of a path, or of its nearest parent."""
        for end in range(len(where), 0, -1):
            if found := self.lines.get(where[:end]):
                return found
        return 0

    def is_faulty(self, where: Where) -> bool:
        """Tell whether a fault at, above or below this path is known."""
        return any(where[: len(bad)] == bad or bad[: len(where)] == where for bad in self.faulty if bad)

    # -- the walk

    def walk(self, value: Any, annotation: Any, where: Where) -> Any:
        """Check `value` against a type; `_NOTHING` if it does not fit."""
        hint = take_apart(annotation)
        if hint.marked("secret"):
            self._secret_depth += 1
            try:
                return self._walk_bare(value, hint, where)
            finally:
                self._secret_depth -= 1
        return self._walk_bare(value, hint, where)

    def _walk_bare(self, value: Any, hint: Hint, where: Where) -> Any:
        origin = get_origin(hint.type)
        if isinstance(hint.type, type) and issubclass(hint.type, Section):
            return self._walk_struct(value, hint.type, where)
        if origin is tuple:
            return self._walk_list(value, hint, where)
        if origin is dict:
            return self._walk_dict(value, get_args(hint.type)[1], where)
        if hint.type is Any:
            return self._resolve_deep(value, where)
        if origin in (Union, types.UnionType):
            inner = [arg for arg in get_args(hint.type) if arg is not type(None)]
            if len(inner) == 1:
                return self.walk(value, inner[0], where)
        return self._walk_leaf(value, hint, where)

    def _walk_struct(self, value: Any, cls: type[Section], where: Where) -> Any:
        if isinstance(value, str) and cls.shorthand:
            value = {cls.shorthand: value}
            if (line := self.line(where)) and isinstance(self.lines, dict):
                self.lines[(*where, cls.shorthand)] = line
        if not isinstance(value, dict):
            self.problem(where, f"expected a table, got {kind(value)}")
            return _NOTHING
        fields = {f.name: f for f in msgspec.structs.fields(cls) if not take_apart(f.type).marked("derived")}
        out: dict[str, Any] = {}
        for name, item in value.items():
            field = fields.get(name)
            if field is None:
                noun = "section or key" if not where else "key"
                self.problem((*where, name), f"unknown {noun}{nearest(name, fields)}")
                continue
            found = self.walk(item, field.type, (*where, name))
            if found is not _NOTHING:
                out[name] = found
        for name, field in fields.items():
            if field.required and name not in out:
                hint = take_apart(field.type)
                if name not in value:
                    self.problem((*where, name), f"is missing; expected {expected(hint)}")
                # So that the rest of the table is checked as well; a tree with problems is never used.
                out[name] = stand_in(hint)
        return out

    def _walk_list(self, value: Any, hint: Hint, where: Where) -> Any:
        item_type = get_args(hint.type)[0]
        if isinstance(value, str) and hint.marked("lone"):
            value = [value]
        if not isinstance(value, list):
            self.problem(where, f"expected {expected(hint)}, got {kind(value)}")
            return _NOTHING
        found = [self.walk(item, item_type, (*where, index)) for index, item in enumerate(value)]
        return [item for item in found if item is not _NOTHING]

    def _walk_dict(self, value: Any, item_type: Any, where: Where) -> Any:
        if not isinstance(value, dict):
            self.problem(where, f"expected a table, got {kind(value)}")
            return _NOTHING
        out = {}
        for name, item in value.items():
            found = self.walk(item, item_type, (*where, name))
            if found is not _NOTHING:
                out[name] = found
        return out

    def _walk_leaf(self, value: Any, hint: Hint, where: Where) -> Any:
        resolved = self._resolve(value, where)
        if resolved is _NOTHING:
            return _NOTHING
        if hint.type is str and isinstance(resolved, (datetime.date, datetime.datetime)):
            resolved = resolved.isoformat()
        finite = not isinstance(resolved, float) or math.isfinite(resolved)
        try:
            if finite:
                return msgspec.convert(resolved, hint.full)
        except msgspec.ValidationError:
            pass
        # APPSEC: a value that came from env:, file: or stands in a secret's place is named by its kind alone.
        private = self._secret_depth or (where in self.origins and not self.origins[where].startswith(ENV_PREFIX))
        got = kind(resolved) if private else show(resolved)
        tip = nearest(resolved, choices(hint)) if isinstance(resolved, str) and choices(hint) and not private else ""
        tip = tip if tip.startswith("; did") else ""
        self.problem(where, f"expected {expected(hint)}, got {got}{tip}")
        return _NOTHING

    # -- env: and file:

    def _resolve_deep(self, value: Any, where: Where) -> Any:
        if isinstance(value, dict):
            pairs = [(k, self._resolve_deep(v, (*where, k))) for k, v in value.items()]
            return {k: v for k, v in pairs if v is not _NOTHING}
        if isinstance(value, list):
            items = [self._resolve_deep(v, (*where, i)) for i, v in enumerate(value)]
            return [v for v in items if v is not _NOTHING]
        return self._resolve(value, where)

    def _resolve(self, value: Any, where: Where) -> Any:
        if not isinstance(value, str):
            return value
        if value.startswith("env:"):
            return self._from_env(value[4:], where)
        if value.startswith("file:"):
            return self._from_file(value[5:], where)
        return value

    def _from_env(self, name: str, where: Where) -> Any:
        if not _ENV_NAME.match(name):
            self.problem(where, "expected env:NAME with a name of letters, digits and _")
            return _NOTHING
        if not (found := self.env.get(name, "")):
            state = "is empty" if name in self.env else "is not set"
            self.problem(where, f"environment variable {name} {state}; set it, or remove this line")
            return _NOTHING
        self.origins[where] = f"env:{name}"
        return found

    def _from_file(self, name: str, where: Where) -> Any:
        path = Path(name)
        if not path.is_absolute():
            self.problem(where, f'expected file:/absolute/path, got "file:{printable(name)}"')
            return _NOTHING
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_SECRET_FILE_BYTES + 1)
            if len(raw) > MAX_SECRET_FILE_BYTES:
                raise ValueError(f"it holds more than {MAX_SECRET_FILE_BYTES} bytes")
            text = raw.decode("utf-8").rstrip("\r\n")
            if not text:
                raise ValueError("it is empty")
        except OSError as exc:
            self.problem(where, f"cannot read {printable(name, 200)}: {exc.strerror}")
            return _NOTHING
        except UnicodeDecodeError:
            self.problem(where, f"cannot use {printable(name, 200)}: it is not UTF-8 text")
            return _NOTHING
        except ValueError as exc:
            self.problem(where, f"cannot use {printable(name, 200)}: {exc}")
            return _NOTHING
        self.origins[where] = f"file:{name}"
        return text


# -- words for people


def kind(value: Any) -> str:
    """Name the TOML type of a value."""
    if isinstance(value, bool):
        return "true or false"
    names = ((str, "a string"), (int, "a whole number"), (float, "a number"), (list, "a list"), (dict, "a table"))
    return next((name for cls, name in names if isinstance(value, cls)), "a date or time")


def show(value: Any) -> str:
    """Show a plain value; a key by mistake in a plain place is not shown."""
    if isinstance(value, str):
        return "a string" if "sk-" in value else f'"{printable(value)}"'
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, (int, float)) else kind(value)


def choices(hint: Hint) -> tuple[str, ...]:
    """List the words that a type allows."""
    return get_args(hint.type) if get_origin(hint.type) is Literal else ()


def stand_in(hint: Hint) -> Any:
    """Make some value that fits a required scalar."""
    if words := choices(hint):
        return words[0]
    return "x" * next((m.min_length for m in hint.meta if m.min_length), 0) if hint.type is str else 0


def expected(hint: Hint) -> str:
    """Say in words what a type takes."""
    if words := choices(hint):
        return ("one of " if len(words) > 1 else "") + ", ".join(f'"{word}"' for word in words)
    origin = get_origin(hint.type)
    if origin in (Union, types.UnionType):
        inner = [take_apart(arg) for arg in get_args(hint.type) if arg is not type(None)]
        return " or ".join(expected(one) for one in inner)
    if origin is tuple:
        return "a list of strings" if take_apart(get_args(hint.type)[0]).type is str else "a list"
    if hint.type is bool:
        return "true or false"
    if hint.type is str:
        return "a string" + _lengths(hint)
    if hint.type in (int, float):
        return ("a whole number" if hint.type is int else "a number") + _bounds(hint)
    return "a table"


def _bounds(hint: Hint) -> str:
    low = next((m.ge for m in hint.meta if m.ge is not None), None)
    above = next((m.gt for m in hint.meta if m.gt is not None), None)
    high = next((m.le for m in hint.meta if m.le is not None), None)
    text = f" above {above:g}" if above is not None else f" from {low}" if low is not None else ""
    return text + (f" to {int(high)}" if high is not None else "")


def _lengths(hint: Hint) -> str:
    low = next((m.min_length for m in hint.meta if m.min_length), None)
    high = next((m.max_length for m in hint.meta if m.max_length), None)
    if low:
        return f" of {low} to {high} characters"
    return f" of at most {high} characters" if high else ""


# -- NBGATE_SECTION__KEY


def apply_env(tree: dict[str, Any], root: type[Section], reader: Reader) -> None:
    """Put the NBGATE_A__B variables over the scalars of the tree."""
    for name in sorted(reader.env):
        if name.startswith(ENV_PREFIX) and "__" in name:
            _apply_one(tree, root, reader, name)


def _apply_one(tree: dict[str, Any], root: type[Section], reader: Reader, name: str) -> None:
    parts = name[len(ENV_PREFIX) :].split("__")
    where: Where = ()
    annotation: Any = root
    table: Any = tree
    for index, part in enumerate(parts):
        known = _children(annotation, table)
        if part not in known:
            shown = ENV_PREFIX + "__".join([*parts[:index], ""])
            close = difflib.get_close_matches(part, known, n=1, cutoff=0.6)
            tip = f'; did you mean "{shown}{close[0]}"?' if close else ""
            reader.problems.append(Problem(name, 0, "", f"no such setting{tip}"))
            return
        key, annotation = known[part]
        where = (*where, key)
        if index < len(parts) - 1:
            table = table.setdefault(key, {}) if isinstance(table, dict) else None
    value = _env_value(reader.env[name], take_apart(annotation))
    if value is _NOTHING:
        reader.problems.append(Problem(name, 0, dotted(where), "only plain values can be set by the environment"))
    elif isinstance(table, dict):
        table[where[-1]] = value
        reader.origins[where] = name


def _children(annotation: Any, table: Any) -> dict[str, tuple[str, Any]]:
    hint = take_apart(annotation)
    if isinstance(hint.type, type) and issubclass(hint.type, Section):
        fields = msgspec.structs.fields(hint.type)
        return {f.name.upper(): (f.name, f.type) for f in fields if not take_apart(f.type).marked("derived")}
    if get_origin(hint.type) is dict and isinstance(table, dict):
        inner = get_args(hint.type)[1]
        return {re.sub(r"[^A-Za-z0-9]", "_", key).upper(): (key, inner) for key in table}
    return {}


def _env_value(text: str, hint: Hint) -> Any:
    """Read a variable's text as the setting's type would be in TOML."""
    bare = hint.type
    if get_origin(bare) is tuple and take_apart(get_args(bare)[0]).type is str:
        return [part.strip() for part in text.split(",") if part.strip()]
    if get_origin(bare) in (tuple, dict) or (isinstance(bare, type) and issubclass(bare, Section)) or bare is Any:
        return _NOTHING
    if bare is str or text.startswith(("env:", "file:")):
        return text
    if bare is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower(), text)
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()):
        return int(text)
    if re.fullmatch(r"[+-]?[0-9]{1,18}\.[0-9]{1,18}", text.strip()):
        return float(text)
    return text


def read_tree(text: str, file: str, env: Mapping[str, str], root: type[Section]) -> tuple[Reader, dict[str, Any]]:
    """Parse, override and check; the tree holds what was sound.

    Never raises for a faulty file: look at `reader.problems`.
    """
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        # NOTE: numbers of thousands of digits are a plain ValueError, endless brackets a RecursionError.
        reader = Reader(file, {}, env)
        found = re.search(r"\(at line (\d+), column \d+\)", str(exc))
        line = int(found.group(1)) if found else text.count("\n") + 1
        message = re.sub(r"\s*\(at .*\)$", "", str(exc))
        reader.problems.append(Problem(file, line, "", f"not TOML: {message}"))
        return reader, {}
    reader = Reader(file, lines_of(text), env)
    reader.raw = raw
    apply_env(raw, root, reader)
    tree = reader.walk(raw, root, ())
    return reader, tree if isinstance(tree, dict) else {}
