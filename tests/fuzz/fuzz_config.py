"""The configuration: any text, with variables from lines such as `#env NBGATE_SERVER__WORKERS=2`."""

from __future__ import annotations

import re

from fuzzkit import Target

from nbgate import config, config_read
from nbgate.auth import Directory, Proxies

_ENV = re.compile(r"(?m)^#env ([A-Z0-9_]{1,60})=([^\n\r\0]*)$")


class NoFiles:
    """A path behind which nothing is: secrets in files are not what is tried here."""

    def __init__(self, name: str) -> None:
        self.name = name

    def is_absolute(self) -> bool:
        return self.name.startswith("/")

    def open(self, mode: str) -> None:
        raise FileNotFoundError(2, "No such file or directory")


def toml(data: bytes) -> None:
    """Only ConfigError comes out, each problem one printable line; what is sound can be used."""
    text = data.decode("utf-8", "replace")
    env = dict(_ENV.findall(text))
    real, config_read.Path = config_read.Path, NoFiles  # type: ignore[misc, assignment]
    try:
        found = config.parse(text, env)
    except config.ConfigError as exc:
        assert exc.problems
        for problem in exc.problems:
            assert str(problem).isprintable(), problem
            assert 0 <= problem.line <= text.count("\n") + 1, problem
        return
    finally:
        config_read.Path = real  # type: ignore[misc]
    Directory.from_config(found)
    Proxies(found.server.trusted_proxies)
    config.restart_only(found)


TARGETS: dict[str, Target] = {"toml": toml}
