"""The configuration's front door: a file in, a frozen `Config` or every problem out.

Purpose: `load`, `check`, and which settings need a restart. Lives here: the order of the steps and derived values.
Must not: single settings' rules (`config_shape`, `config_check`), parsing (`config_read`). Heat: cold.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from nbgate.config_check import Checker, Listen, duration_s, expires_at, parse_listen
from nbgate.config_read import Problem, Reader, read_tree
from nbgate.config_shape import (
    DEFAULT_DIALECTS,
    DEMO_MODELS,
    DIALECTS,
    Channel,
    ChannelKey,
    Config,
    Group,
    Key,
    Model,
    Price,
    PriceTier,
    Section,
    Server,
    Timeouts,
)

__all__ = [
    "DEMO_MODELS",
    "DIALECTS",
    "Channel",
    "ChannelKey",
    "Config",
    "ConfigError",
    "Group",
    "Key",
    "Listen",
    "Model",
    "Price",
    "PriceTier",
    "Problem",
    "Section",
    "Server",
    "Timeouts",
    "check",
    "duration_s",
    "load",
    "parse",
    "parse_listen",
    "restart_only",
    "restart_only_changes",
]

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
ADMIN_KEY_FILE: Final = "admin.key"
DEMO_KEY_FILE: Final = "demo.key"
# Settings that a running server cannot take over: sockets, processes, stores.
RESTART_ONLY: Final = (
    "server.listen",
    "server.workers",
    "server.data_dir",
    "admin.listen",
    "store.url",
    "redis.url",
)


class ConfigError(Exception):
    """The file cannot be used; `problems` says why, one each."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def load(
    path: str | os.PathLike[str], env: Mapping[str, str] | None = None, name: str = "", made_keys: bool = True
) -> Config:
    """Read a file into a `Config`, with overrides, secrets and made keys.

    `env` defaults to the process's; `name` is shown in place of `path` in problems. With `made_keys`,
    an empty `admin.key` or `demo.key` is filled from the file of that name in data_dir, if there is one.

    Raises:
        ConfigError: show its problems; nothing was changed.
    """
    shown = name or os.fspath(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
            written_at = os.fstat(file.fileno()).st_mtime
        text = raw.decode("utf-8")
    except OSError as exc:
        raise ConfigError([Problem(shown, 0, "", f"cannot read this file: {exc.strerror}")]) from None
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        raise ConfigError([Problem(shown, line, "", "not UTF-8 text")]) from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError([Problem(shown, 0, "", f"expected at most {MAX_FILE_BYTES} bytes")])
    config = parse(text, os.environ if env is None else env, shown, written_at)
    return _with_made_keys(config) if made_keys else config


def check(path: str | os.PathLike[str], env: Mapping[str, str] | None = None) -> list[Problem]:
    """List everything wrong with a file, in the order of its lines."""
    try:
        load(path, env)
    except ConfigError as exc:
        return exc.problems
    return []


def parse(text: str, env: Mapping[str, str], file: str = "config", written_at: float = 0.0) -> Config:
    """Read TOML text into a `Config`; reads no file but `file:` secrets.

    Raises:
        ConfigError: with all problems at once.
    """
    reader, tree = read_tree(text, file, env, Config)
    draft = msgspec.convert(_sound(tree, reader), Config)
    if not any(problem.message.startswith("not TOML") for problem in reader.problems):
        Checker(draft, reader, reader.names("channels"), reader.names("groups")).run()
    if reader.problems:
        raise ConfigError(sorted(set(reader.problems), key=lambda p: (p.line == 0, p.line, p.file, p.path)))
    channels = {name: _derived(name, channel) for name, channel in draft.channels.items()}
    keys = tuple(msgspec.structs.replace(key, expires_at=expires_at(key.expires, written_at)) for key in draft.keys)
    return msgspec.structs.replace(draft, source=file, channels=channels, keys=keys)


def _sound(tree: dict[str, Any], reader: Reader) -> dict[str, Any]:
    """Keep the sections that convert; a fault that only the whole shows is noted."""
    try:
        msgspec.convert(tree, Config)
    except msgspec.ValidationError as exc:
        if not reader.problems:
            # APPSEC: msgspec names types and paths, never values.
            reader.problem((), str(exc))
        return {}
    return tree


def _derived(name: str, channel: Channel) -> Channel:
    dialects = channel.dialects or DEFAULT_DIALECTS[channel.type]
    models = channel.models or DEMO_MODELS
    base_url = channel.base_url.rstrip("/")
    return msgspec.structs.replace(channel, name=name, dialects=dialects, models=models, base_url=base_url)


def _with_made_keys(config: Config) -> Config:
    folder = Path(config.server.data_dir)
    if not config.admin.key and (key := _made_key(folder / ADMIN_KEY_FILE)):
        config = msgspec.structs.replace(config, admin=msgspec.structs.replace(config.admin, key=key))
    if not config.demo.key and config.has_demo and (key := _made_key(folder / DEMO_KEY_FILE)):
        config = msgspec.structs.replace(config, demo=msgspec.structs.replace(config.demo, key=key))
    return config


def _made_key(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def restart_only(config: Config) -> dict[str, str]:
    """Fingerprint the settings that only a restart can change.

    APPSEC: digests, because store and redis URLs may carry a password.
    """
    found = {}
    for path in RESTART_ONLY:
        section, _, name = path.partition(".")
        value = msgspec.json.encode(getattr(getattr(config, section), name))
        found[path] = hashlib.sha256(value).hexdigest()
    return found


def restart_only_changes(old: Config, new: Config) -> list[str]:
    """Name the settings that differ and cannot change in place."""
    before, after = restart_only(old), restart_only(new)
    return [path for path in before if before[path] != after[path]]
