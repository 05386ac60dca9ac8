"""The choice of a target: tiers, weights, cool-downs, strikes, budgets."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbgate.channels import (
    OUT_S,
    RETRY_FLOOR,
    STRIKES_OUT,
    Dice,
    RetryBudget,
    Table,
    Target,
    choose,
    forgive,
    mark_failed,
    mark_limited,
    mark_ok,
)
from nbgate.config import parse

TEXT = """
[channels.a]
type = "openai"
base_url = "http://a/v1"
keys = ["ka1", { value = "ka2", weight = 3 }]
models = ["gpt-*"]
map = { "gpt-4o" = "gpt-4o-2024-11-20" }
[channels.b]
type = "openai"
base_url = "http://b/v1"
keys = ["kb"]
models = ["gpt-4o", "o*"]
priority = 5
[channels.c]
type = "anthropic"
base_url = "http://c"
keys = ["kc"]
models = ["claude-*"]
groups = ["vip"]
[channels.off]
type = "openai"
base_url = "http://off/v1"
keys = ["k"]
models = ["*"]
enabled = false
[groups.vip]
name = "VIP"
"""


def table(text: str = TEXT) -> Table:
    return Table(parse(text, {}))


def names(targets: tuple[Target, ...]) -> list[str]:
    return [t.label for t in targets]


def test_candidates_come_in_tiers_of_priority() -> None:
    found = table().candidates("gpt-4o", "chat", ("default",))
    assert [names(tier) for tier in found.tiers] == [["b/0"], ["a/0", "a/1"]]
    assert found.upstream_models == {"a": "gpt-4o-2024-11-20", "b": "gpt-4o"}


@pytest.mark.parametrize(
    ("model", "dialect", "groups"),
    [
        ("gpt-4o", "messages", ("default",)),  # nobody speaks it for this model
        ("claude-3-opus", "messages", ("default",)),  # another group's channel
        ("nothing", "chat", ("default",)),
        ("GPT-4o", "chat", ("default",)),  # names are case-sensitive
        ("gpt-4o\n", "chat", ()),
        ("", "chat", ("default",)),
    ],
)
def test_candidates_are_none_when_nobody_serves(model: str, dialect: str, groups: tuple[str, ...]) -> None:
    assert table().candidates(model, dialect, groups).tiers == ()


def test_disabled_channels_are_never_candidates() -> None:
    assert table().candidates("anything-else", "chat", ("default",)).tiers == ()


def test_unknown_models_do_not_fill_the_cache() -> None:
    made = table()
    for i in range(100):
        made.candidates(f"nothing-{i}", "chat", ("default",))
    assert not made._cache


def test_models_lists_plain_names_only() -> None:
    assert table().models(("default",)) == ["gpt-4o"]


def test_choose_prefers_the_best_tier_and_falls_to_the_next() -> None:
    found = table().candidates("gpt-4o", "chat", ("default",))
    first = choose(found, "gpt-4o", [], Dice(0.0, lambda: 0.5))
    assert first is not None
    assert first.label == "b/0"
    second = choose(found, "gpt-4o", [first], Dice(0.0, lambda: 0.5))
    assert second is not None
    assert second.name == "a"
    assert choose(found, "gpt-4o", [*found.tiers[0], *found.tiers[1]], Dice(0.0, lambda: 0.5)) is None


@given(st.integers(1, 1000))
def test_choose_follows_the_weights(steps: int) -> None:
    found = table().candidates("gpt-3.5", "chat", ("default",))
    seen = Counter()
    for i in range(steps):
        chosen = choose(found, "gpt-3.5", [], Dice(0.0, lambda i=i: i / steps))
        assert chosen is not None
        seen[chosen.label] += 1
    assert abs(seen["a/0"] - steps / 4) <= 1
    assert seen["a/0"] + seen["a/1"] == steps


def test_a_target_goes_out_after_strikes_in_a_row_and_comes_back() -> None:
    found = table().candidates("gpt-4o", "chat", ("default",))
    target = found.tiers[0][0]
    went = [mark_failed(target, 0.0) for _ in range(STRIKES_OUT)]
    assert went == [False] * (STRIKES_OUT - 1) + [True]
    during = choose(found, "gpt-4o", [], Dice(OUT_S - 0.1, lambda: 0.0))
    after = choose(found, "gpt-4o", [], Dice(OUT_S, lambda: 0.0))
    assert during is not None
    assert after is not None
    assert (during.name, after.name) == ("a", "b")


def test_an_answer_wipes_the_strikes() -> None:
    target = table().targets[0]
    for _ in range(STRIKES_OUT - 1):
        mark_failed(target, 0.0)
    mark_ok(target)
    assert not any(mark_failed(target, 0.0) for _ in range(STRIKES_OUT - 1))


def test_the_time_out_grows_and_is_capped() -> None:
    target = table().targets[0]
    now, outs = 0.0, []
    for _ in range(15):
        while not mark_failed(target, now):
            pass
        outs.append(target.out_until - now)
        now = target.out_until
    assert outs[:3] == [30.0, 60.0, 90.0]
    assert max(outs) == 300.0


def test_never_all_targets_out_at_once() -> None:
    found = table().candidates("gpt-4o", "chat", ("default",))
    for tier in found.tiers:
        for target in tier:
            for _ in range(STRIKES_OUT):
                mark_failed(target, 0.0 if target.name == "a" else 10.0)
    chosen = choose(found, "gpt-4o", [], Dice(11.0, lambda: 0.0))
    assert chosen is not None
    assert chosen.name == "a"


def test_a_limit_cools_one_model_of_one_credential() -> None:
    made = table()
    found = made.candidates("gpt-4o", "chat", ("default",))
    target = found.tiers[0][0]
    mark_limited(target, "gpt-4o", 0.0, 7.0)
    cooled = choose(found, "gpt-4o", [], Dice(6.9, lambda: 0.0))
    assert cooled is not None
    assert cooled.name == "a"
    other = made.candidates("o1", "chat", ("default",))
    assert choose(other, "o1", [], Dice(1.0, lambda: 0.0)) is target
    forgive([target], "gpt-4o")
    assert choose(found, "gpt-4o", [], Dice(1.0, lambda: 0.0)) is target


def test_health_outlives_a_reload() -> None:
    config = parse(TEXT, {})
    old = Table(config)
    for _ in range(STRIKES_OUT):
        mark_failed(old.targets[0], 0.0)
    new = Table(config, old)
    assert new.targets[0].out_until == OUT_S
    assert new.targets[0] is not old.targets[0]


def test_retry_budget_holds_its_share_and_floor() -> None:
    budget = RetryBudget(20)
    assert sum(budget.allows(0.0) for _ in range(100)) == RETRY_FLOOR
    budget = RetryBudget(20)
    for _ in range(1000):
        budget.call(5.0)
    assert sum(budget.allows(5.5) for _ in range(1000)) == 200


def test_retry_budget_forgets_after_ten_seconds() -> None:
    budget = RetryBudget(20)
    for _ in range(RETRY_FLOOR):
        assert budget.allows(0.0)
    assert not budget.allows(9.9)
    assert budget.allows(10.0)


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=300))
def test_retry_budget_is_never_exceeded(steps: list[tuple[float, bool]]) -> None:
    budget = RetryBudget(20)
    now = 0.0
    calls: list[float] = []
    retries: list[float] = []
    for gap, is_call in steps:
        now += gap
        if is_call:
            budget.call(now)
            calls.append(now)
        elif budget.allows(now):
            retries.append(now)
    for end in retries:
        window = [t for t in retries if end - 9 < t <= end]
        offered = [t for t in calls if end - 10 < t <= end]
        assert len(window) <= max(RETRY_FLOOR, len(offered) * 20 // 100 + 1)
