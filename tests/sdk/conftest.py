"""One station for all SDK tests: the demo upstream, and one that fails as told."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest
from station import Station, clean_env

KEY = "sk-sdk-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"
LIMITED = 16  # keys that may call twice a minute, one per test that needs one

_CONFIG = """
[channels.demo]
type = "demo"
[channels.fake]
type = "station"
base_url = "{fake}"
keys = ["up-secret-fake"]
models = ["paced-*", "json-*", "fault-*"]
[[keys]]
key = "{key}"
account = "sdk"
"""


def limited_key_named(number: int) -> str:
    """Name one of the limited keys."""
    return f"sk-limited-{number:02d}-0123456789abcdefghijklmnopqrstuvwxyzAB"


@pytest.fixture(scope="session")
def station(fake_upstream: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    """Serve as a newcomer's station does, with the demo upstream."""
    text = _CONFIG.format(fake=fake_upstream, key=KEY)
    for number in range(LIMITED):
        text += f'[[keys]]\nkey = "{limited_key_named(number)}"\naccount = "slow-{number}"\nrpm = 2\n'
    with Station(tmp_path_factory.mktemp("station"), text) as one:
        yield one


_numbers = itertools.count()


@pytest.fixture
def limited_key() -> str:
    """Give a key of two calls a minute that nobody has used."""
    number = next(_numbers)
    assert number < LIMITED, "raise LIMITED"
    return limited_key_named(number)


@pytest.fixture(params=["", "/v1"], ids=["bare", "v1"])
def base_url(station: Station, request: pytest.FixtureRequest) -> str:
    """Give the base URL in both forms that people set."""
    return station.url + str(request.param)


@pytest.fixture
def key() -> str:
    """Give a key without limits."""
    return KEY


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the SDKs from what the environment would tell them."""
    for name in set(os.environ) - set(clean_env()):
        monkeypatch.delenv(name)


class Sync:
    """Run calls of a synchronous client."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def do(self, call: Callable[[Any], Any]) -> Any:
        """Make one call and return what it gives."""
        with self.make() as client:
            return call(client)

    def stream(self, call: Callable[[Any], Any]) -> list[Any]:
        """Make one call and collect its stream."""
        with self.make() as client:
            return list(call(client))


class Async:
    """Run the same calls of an asynchronous client."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def do(self, call: Callable[[Any], Any]) -> Any:
        """Make one call and return what it gives."""

        async def go() -> Any:
            async with self.make() as client:
                return await call(client)

        return asyncio.run(go())

    def stream(self, call: Callable[[Any], Any]) -> list[Any]:
        """Make one call and collect its stream."""

        async def go() -> list[Any]:
            async with self.make() as client:
                made = call(client)
                if inspect.isawaitable(made):
                    made = await made
                return [one async for one in made]

        return asyncio.run(go())


@pytest.fixture(params=["sync", "async"])
def openai_sdk(request: pytest.FixtureRequest, base_url: str) -> Callable[..., Sync | Async]:
    """Make the official OpenAI client, both kinds, both base URLs."""

    def make(key: str = KEY, **more: Any) -> Sync | Async:
        options = {"api_key": key, "base_url": base_url, "max_retries": 0, **more}
        if request.param == "sync":
            return Sync(lambda: openai.OpenAI(**options))
        return Async(lambda: openai.AsyncOpenAI(**options))

    return make


@pytest.fixture(params=["sync", "async"])
def anthropic_sdk(request: pytest.FixtureRequest, station: Station) -> Callable[..., Sync | Async]:
    """Make the official Anthropic client, both kinds."""

    def make(key: str = KEY, **more: Any) -> Sync | Async:
        options = {"api_key": key, "base_url": station.url, "max_retries": 0, **more}
        if request.param == "sync":
            return Sync(lambda: anthropic.Anthropic(**options))
        return Async(lambda: anthropic.AsyncAnthropic(**options))

    return make
