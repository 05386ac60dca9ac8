"""Which upstream account answers a call: the table, the choice, the marks.

Rule 1: pure. The clock and the dice are handed in; the same inputs choose the
same channel.
Rule 2: health belongs to one credential of one channel (a `Target`); what may
concern the request alone (403, 429) belongs to that credential and model.
Rule 3: a strike never leaves a model without any target: when all are out, the
one that comes back first is tried.

What lives here: targets, tiers, weights, strikes, cool-downs, the retry
budget. What must not: sockets, bodies, waiting. Heat: R.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from nbgate.config import Channel, Config

STRIKES_OUT: Final = 5  # Envoy: consecutive_5xx
OUT_S: Final = 30.0  # Envoy: base_ejection_time
OUT_MAX_S: Final = 300.0
COOL_DOWN_S: Final = 5.0  # of a 429 or 403 that names no retry-after
COOL_DOWN_MAX_S: Final = 300.0
FREE_FAILURES: Final = 5
MAX_CACHED: Final = 4096
MAX_COOLED: Final = 4096
WINDOW_S: Final = 10
RETRY_FLOOR: Final = 10


class Target:
    """One credential of one channel: what a call can be sent to.

    `wire` belongs to whoever sends (endpoint, request head); nothing here
    looks at it.
    """

    __slots__ = (
        "channel",
        "cooled",
        "in_flight",
        "key",
        "label",
        "name",
        "out_until",
        "outs",
        "strikes",
        "weight",
        "wire",
    )

    def __init__(self, channel: Channel, key: str, label: str, weight: int) -> None:
        self.channel = channel
        self.name = channel.name
        self.key = key
        self.label = label
        self.weight = weight
        self.strikes = 0  # failures in a row
        self.outs = 0  # times out since the last success
        self.out_until = 0.0
        self.cooled: dict[str, float] = {}  # model -> until
        self.in_flight = 0
        self.wire: Any = None

    def ready_at(self, model: str) -> float:
        """Return when this target may be chosen for `model` again."""
        until = self.out_until
        if self.cooled:
            until = max(until, self.cooled.get(model, 0.0))
        return until


class Candidates(NamedTuple):
    """Targets of one (model, dialect, groups), best priority first."""

    tiers: tuple[tuple[Target, ...], ...]
    upstream_models: dict[str, str]  # channel name -> the upstream's model name


_NONE: Final = Candidates((), {})


class Table:
    """All channels of one generation of the configuration."""

    def __init__(self, config: Config, old: Table | None = None) -> None:
        self.targets: list[Target] = []
        self._channels: list[tuple[Channel, re.Pattern[str], tuple[Target, ...]]] = []
        self._cache: dict[tuple[str, str, tuple[str, ...]], Candidates] = {}
        self._groups = {name: frozenset(group.channels) for name, group in config.groups.items()}
        kept = {(t.name, t.key): t for t in old.targets} if old is not None else {}
        for channel in config.channels.values():
            if not channel.enabled:
                continue
            targets = tuple(self._target(channel, kept, index) for index in range(max(1, len(channel.keys))))
            self.targets += targets
            pattern = re.compile(
                "|".join(fnmatch.translate(glob) for glob in (*channel.models, *map(_literal, channel.map)))
            )
            self._channels.append((channel, pattern, tuple(t for t in targets if t.weight > 0)))
        self.by_name = {channel.name: channel for channel, _, _ in self._channels}

    def _target(self, channel: Channel, kept: dict[tuple[str, str], Target], index: int) -> Target:
        if not channel.keys:
            key, weight = "", 1
        else:
            key = channel.keys[index].value
            weight = channel.keys[index].weight if channel.keys[index].enabled else 0
        made = Target(channel, key, f"{channel.name}/{index}", weight * channel.weight)
        old = kept.get((channel.name, key))
        if old is not None:  # health outlives a reload
            made.strikes, made.outs, made.out_until = old.strikes, old.outs, old.out_until
            made.cooled = old.cooled
        return made

    def candidates(self, model: str, dialect: str, groups: tuple[str, ...]) -> Candidates:
        """Find who serves `model` in `dialect` for callers of `groups`."""
        found = self._cache.get((model, dialect, groups))
        return found if found is not None else self._find(model, dialect, groups)

    def _find(self, model: str, dialect: str, groups: tuple[str, ...]) -> Candidates:
        tiers: dict[int, list[Target]] = {}
        names: dict[str, str] = {}
        for channel, pattern, targets in self._channels:
            if dialect not in channel.dialects or pattern.fullmatch(model) is None or not self._serves(channel, groups):
                continue
            tiers.setdefault(channel.priority, []).extend(targets)
            names[channel.name] = channel.map.get(model, model)
        found = Candidates(tuple(tuple(tiers[p]) for p in sorted(tiers, reverse=True)), names) if tiers else _NONE
        if found is not _NONE:
            if len(self._cache) >= MAX_CACHED:
                self._cache.clear()
            self._cache[model, dialect, groups] = found
        return found

    def _serves(self, channel: Channel, groups: tuple[str, ...]) -> bool:
        return any(group in channel.groups or channel.name in self._groups.get(group, ()) for group in groups)

    def named(self, name: str) -> Candidates:
        """Give the targets of one channel, whatever it serves."""
        for channel, _, targets in self._channels:
            if channel.name == name:
                return Candidates((targets,), {})
        return _NONE

    def knows(self, model: str, groups: tuple[str, ...]) -> bool:
        """Tell whether any channel of the groups serves `model` at all."""
        return any(p.fullmatch(model) is not None and self._serves(c, groups) for c, p, _ in self._channels)

    def models(self, groups: tuple[str, ...]) -> list[str]:
        """List the names, without wildcards, that the groups' channels serve."""
        names: dict[str, None] = {}
        for channel, _, _ in self._channels:
            if self._serves(channel, groups):
                names.update(dict.fromkeys(m for m in (*channel.models, *channel.map) if not _GLOB.search(m)))
        return list(names)


_GLOB: Final = re.compile(r"[*?\[]")


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


class Dice(NamedTuple):
    """What `choose` needs of the world: the clock and a random number."""

    now: float
    random: Callable[[], float]


def choose(found: Candidates, model: str, tried: Iterable[Target], dice: Dice) -> Target | None:
    """Choose a target not yet tried; None when none is left.

    The best tier that has a healthy target decides by weight. With none
    healthy at all, the one that is back first.
    """
    now = dice.now
    tiers = found.tiers
    if not tried and len(tiers) == 1 and len(tiers[0]) == 1:
        return tiers[0][0]  # PERF: one target has no rival; its strikes could only refuse
    gone = set(tried)
    # NOTE: a failed channel is not tried again by another of its keys when the trouble was its address;
    # credentials differ in rates and balance, so a second key is a new try.
    resting: list[Target] = []
    for tier in tiers:
        ready = []
        for target in tier:
            if target in gone:
                continue
            if target.ready_at(model) <= now:
                ready.append(target)
            else:
                resting.append(target)
        if ready:
            return _weighted(ready, dice.random)
    if resting and not gone:
        return min(resting, key=lambda t: t.ready_at(model))
    return None


def _weighted(ready: list[Target], random: Callable[[], float]) -> Target:
    if len(ready) == 1:
        return ready[0]
    point = random() * sum(t.weight for t in ready)
    for target in ready:
        point -= target.weight
        if point < 0:
            return target
    return ready[-1]


def mark_ok(target: Target) -> None:
    """Note an answer: the target is healthy."""
    if target.strikes or target.outs:
        target.strikes = target.outs = 0
        target.out_until = 0.0


def mark_failed(target: Target, now: float) -> bool:
    """Note a failure; True when the target goes out by it."""
    target.strikes += 1
    if target.strikes < STRIKES_OUT or target.out_until > now:
        return False
    target.outs += 1
    target.strikes = 0
    target.out_until = now + min(OUT_S * target.outs, OUT_MAX_S)
    return True


def mark_limited(target: Target, model: str, now: float, retry_after_s: float | None) -> None:
    """Note a 403 or 429: cool down this credential for this model."""
    wait = COOL_DOWN_S if retry_after_s is None else min(max(retry_after_s, 0.0), COOL_DOWN_MAX_S)
    if len(target.cooled) >= MAX_COOLED:
        target.cooled.clear()
    target.cooled[model] = now + wait


def forgive(targets: Iterable[Target], model: str) -> None:
    """Take cool-downs back: every channel said the same of one request."""
    for target in targets:
        target.cooled.pop(model, None)


class RetryBudget:
    """Bound retries to a share of the calls of the last 10 s, with a floor.

    Precedent: Envoy retry budgets (20 %, min_retry_concurrency).
    """

    __slots__ = ("_calls", "_percent", "_retries", "_second")

    def __init__(self, percent: int) -> None:
        self._percent = percent
        self._calls = [0] * WINDOW_S
        self._retries = [0] * WINDOW_S
        self._second = 0

    def set_percent(self, percent: int) -> None:
        """Change the share; what was counted stays."""
        self._percent = percent

    def _turn(self, now: float) -> int:
        second = int(now)
        passed = second - self._second
        if passed > 0:
            for step in range(1, min(passed, WINDOW_S) + 1):
                self._calls[(self._second + step) % WINDOW_S] = 0
                self._retries[(self._second + step) % WINDOW_S] = 0
            self._second = second
        return second % WINDOW_S

    def call(self, now: float) -> None:
        """Count a call."""
        self._calls[self._turn(now) if now >= self._second + 1 else self._second % WINDOW_S] += 1

    def allows(self, now: float) -> bool:
        """Take one retry out of the budget, if there is one."""
        slot = self._turn(now)
        if sum(self._retries) >= max(RETRY_FLOOR, sum(self._calls) * self._percent // 100):
            return False
        self._retries[slot] += 1
        return True
