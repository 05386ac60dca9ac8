"""What a worker may spend: exact rates, true waits, nothing twice."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbgate.allowance import NO_LIMITS, Allowance, Allowances, Limits, LocalSource, share


@dataclass(eq=False)
class Key:
    """The part of a key record that allowances read."""

    key_id: str = "k"
    account_id: str = "a"
    limits: Limits = NO_LIMITS
    account_limits: Limits = NO_LIMITS


def allowance_of(limits: Limits, account: Limits = NO_LIMITS, now: float = 1000.0) -> Allowance:
    return Allowances(LocalSource()).of(Key(limits=limits, account_limits=account), now)


@given(limit=st.integers(0, 10_000), slots=st.integers(1, 64))
def test_share_of_all_slots_is_exactly_the_limit(limit: int, slots: int) -> None:
    shares = [share(limit, slot, slots) for slot in range(slots)]
    assert sum(shares) == limit
    assert max(shares) - min(shares) <= 1


@settings(deadline=None, max_examples=60)
@given(
    rate=st.integers(1, 200),
    start=st.floats(0, 1e7),
    gaps=st.lists(st.sampled_from([0.0, 0.001, 0.1, 0.3, 1.0, 7.0]), min_size=1, max_size=300),
)
def test_rate_lets_no_more_pass_than_limit_and_refill(rate: int, start: float, gaps: list[float]) -> None:
    allowance = allowance_of(Limits(rpm=rate), now=start)
    now, passed = start, 0
    for _ in range(rate):
        passed += allowance.take(now, 0) is None
    assert passed == rate
    for gap in gaps:
        now += gap
        while allowance.take(now, 0) is None:
            passed += 1
    assert rate <= passed <= rate + math.ceil(rate * (now - start) / 60 + 1e-6)
    assert passed >= rate + math.floor(rate * (now - start) / 60 - 1e-3) or now - start > 60


@settings(deadline=None, max_examples=80)
@given(
    limits=st.builds(Limits, rpm=st.integers(0, 500), tpm=st.integers(0, 100_000), parallel=st.just(0)),
    account=st.builds(Limits, rpm=st.integers(0, 500), tpm=st.integers(0, 100_000), parallel=st.just(0)),
    reserves=st.lists(st.integers(0, 50_000), min_size=1, max_size=200),
    start=st.floats(0, 1e6),
)
def test_wait_of_a_refusal_is_true(limits: Limits, account: Limits, reserves: list[int], start: float) -> None:
    def filled() -> tuple[Allowance, int] | None:
        allowance = allowance_of(limits, account, start)
        for reserve in reserves:
            if allowance.take(start, reserve) is not None:
                return allowance, reserve
        return None

    for early in (True, False):
        found = filled()
        if found is None:
            return
        allowance, reserve = found
        refusal = allowance.take(start, reserve)
        assert refusal is not None
        assert 0 < refusal.wait_s <= 60.1
        if early:
            assert allowance.take(start + refusal.wait_s - 4e-6, reserve) is not None
        else:
            assert allowance.take(start + refusal.wait_s, reserve) is None


@settings(deadline=None, max_examples=60)
@given(parallel=st.integers(1, 5), steps=st.lists(st.sampled_from(["take", "settle", "give_back"]), max_size=100))
def test_parallel_is_never_exceeded(parallel: int, steps: list[str]) -> None:
    allowance = allowance_of(Limits(parallel=parallel), Limits(parallel=parallel + 1))
    running = 0
    for step in steps:
        if step == "take":
            refusal = allowance.take(1000.0, 10)
            assert (refusal is None) == (running < parallel)
            running += refusal is None
        elif running:
            running -= 1
            allowance.settle(1000.0, 10, 5) if step == "settle" else allowance.give_back(1000.0, 10)
        assert allowance.key.in_use == allowance.account.in_use == running


def test_take_leaves_the_key_untouched_when_the_account_refuses() -> None:
    allowance = allowance_of(Limits(rpm=10, tpm=1000, parallel=3), Limits(tpm=100))
    assert allowance.take(1000.0, 100) is None
    before = (allowance.key.rpm_level, allowance.key.tpm_level, allowance.key.in_use)
    refusal = allowance.take(1000.0, 50)
    assert refusal is not None
    assert (refusal.limit, refusal.owner) == ("tokens", "account")
    assert refusal.wait_s == pytest.approx(30, abs=1e-4)
    assert (allowance.key.rpm_level, allowance.key.tpm_level, allowance.key.in_use) == before


def test_accounts_limits_hold_over_all_its_keys() -> None:
    table = Allowances(LocalSource())
    keys = [table.of(Key(key_id=f"k{n}", account_limits=Limits(rpm=5)), 0.0) for n in range(3)]
    assert sum(key.take(0.0, 0) is None for _ in range(5) for key in keys) == 5


def test_reserve_above_the_capacity_takes_the_whole_full_bucket() -> None:
    allowance = allowance_of(Limits(tpm=1000))
    assert allowance.take(1000.0, 5000) is None
    assert allowance.key.tpm_level == 0
    refusal = allowance.take(1000.0, 5000)
    assert refusal is not None
    assert refusal.wait_s == pytest.approx(60, abs=1e-4)


def test_settle_returns_what_was_reserved_too_much() -> None:
    allowance = allowance_of(Limits(tpm=1000))
    assert allowance.take(1000.0, 900) is None
    allowance.settle(1000.0, 900, 100)
    assert allowance.take(1000.0, 900) is None
    assert allowance.take(1000.0, 1) is not None


def test_settle_books_excess_as_bounded_debt() -> None:
    allowance = allowance_of(Limits(tpm=1000))
    assert allowance.take(1000.0, 100) is None
    allowance.settle(1000.0, 100, 10**9)
    refusal = allowance.take(1000.0, 1000)
    assert refusal is not None
    assert refusal.wait_s == pytest.approx(120, abs=1e-4)


def test_give_back_is_as_if_never_asked() -> None:
    allowance = allowance_of(Limits(rpm=2, tpm=1000, parallel=1))
    for _ in range(20):
        assert allowance.take(1000.0, 700) is None
        allowance.give_back(1000.0, 700)
    assert allowance.key.rpm_level == allowance.key.rpm_cap
    assert allowance.key.tpm_level == allowance.key.tpm_cap
    assert allowance.key.in_use == 0


def test_clock_that_goes_back_grants_nothing() -> None:
    allowance = allowance_of(Limits(rpm=1))
    assert allowance.take(1000.0, 0) is None
    assert allowance.take(10.0, 0) is not None
    assert allowance.take(1000.0, 0) is not None


def test_changed_limit_keeps_the_level_in_proportion() -> None:
    table = Allowances(LocalSource())
    old = table.of(Key(limits=Limits(rpm=100)), 0.0)
    for _ in range(75):
        assert old.take(0.0, 0) is None
    new = table.of(Key(limits=Limits(rpm=40)), 0.0)
    assert sum(new.take(0.0, 0) is None for _ in range(50)) == 10
    assert old.key is new.key, "calls in flight settle on the same meter"
    raised = table.of(Key(limits=Limits(rpm=400)), 0.0)
    assert raised.take(0.0, 0) is not None, "an empty bucket stays empty"


def test_same_limits_in_a_new_record_keep_the_level() -> None:
    table = Allowances(LocalSource())
    assert table.of(Key(limits=Limits(rpm=1)), 0.0).take(0.0, 0) is None
    assert table.of(Key(limits=Limits(rpm=1)), 0.0).take(0.0, 0) is not None


def test_workers_together_pass_exactly_the_limit() -> None:
    tables = [Allowances(LocalSource(slot, 4)) for slot in range(4)]
    allowances = [table.of(Key(limits=Limits(rpm=10, parallel=7)), 0.0) for table in tables]
    assert sum(a.take(0.0, 0) is None for a in allowances for _ in range(20)) == 7
    for allowance in allowances:
        while allowance.key.in_use:
            allowance.settle(0.0, 0, 0)
    assert sum(a.take(0.0, 0) is None for a in allowances for _ in range(2)) == 3


def test_worker_without_share_refuses_and_says_elsewhere() -> None:
    allowance = Allowances(LocalSource(1, 2)).of(Key(limits=Limits(parallel=1)), 0.0)
    refusal = allowance.take(0.0, 0)
    assert refusal is not None
    assert refusal.elsewhere
    assert refusal.limit == "parallel"


def test_no_limits_never_refuse_and_show_no_headers() -> None:
    allowance = allowance_of(NO_LIMITS)
    assert not allowance.limited
    assert all(allowance.take(0.0, 10**9) is None for _ in range(1000))
    assert allowance.headers(0.0) == b""
    assert allowance.header_list(0.0) == []


def test_refusal_makes_a_429_with_the_true_wait() -> None:
    allowance = allowance_of(Limits(rpm=6))
    for _ in range(6):
        assert allowance.take(1000.0, 0) is None
    refusal = allowance.take(1003.0, 0)
    assert refusal is not None
    error = refusal.error()
    assert error.kind == "rate_limit_exceeded"
    assert error.retry_after_s == pytest.approx(7, abs=1e-4)


def test_headers_tell_limit_remaining_and_reset() -> None:
    allowance = allowance_of(Limits(rpm=60, tpm=1000))
    for _ in range(3):
        assert allowance.take(1000.0, 200) is None
    assert allowance.headers(1000.0) == (
        b"x-ratelimit-limit-requests: 60\r\nx-ratelimit-remaining-requests: 57\r\nx-ratelimit-reset-requests: 3s\r\n"
        b"x-ratelimit-limit-tokens: 1000\r\nx-ratelimit-remaining-tokens: 400\r\nx-ratelimit-reset-tokens: 36s\r\n"
    )
    assert dict(allowance.header_list(1036.0))[b"x-ratelimit-reset-tokens"] == b"0s"


def test_headers_on_claude_paths_name_points_in_time() -> None:
    allowance = allowance_of(Limits(tpm=1000))
    assert allowance.take(1000.0, 500) is None
    assert allowance.headers(1000.0, 1_700_000_000.0, claude=True) == (
        b"anthropic-ratelimit-tokens-limit: 1000\r\nanthropic-ratelimit-tokens-remaining: 500\r\n"
        b"anthropic-ratelimit-tokens-reset: 2023-11-14T22:13:50Z\r\n"
    )


def test_headers_show_the_narrower_of_key_and_account() -> None:
    allowance = allowance_of(Limits(rpm=100), Limits(rpm=10))
    assert allowance.take(0.0, 0) is None
    assert b"x-ratelimit-remaining-requests: 9\r\n" in allowance.headers(1.0)


def test_headers_survive_debt_and_a_changed_account_limit() -> None:
    table = Allowances(LocalSource())
    first = table.of(Key(key_id="x", limits=Limits(tpm=10)), 0.0)
    assert first.take(0.0, 10) is None
    first.settle(0.0, 10, 10**6)
    headers = first.headers(0.0)
    assert b"remaining-tokens: 0\r\n" in headers
    assert b"reset-tokens: 2m0s\r\n" in headers
    table.of(Key(key_id="y", account_limits=Limits(rpm=7)), 0.0)
    assert b"x-ratelimit-limit-requests: 7\r\n" in first.headers(0.0)


@dataclass(eq=False)
class Many(Key):
    """Keys of one account."""

    limits: Limits = field(default=Limits(rpm=2))


def test_table_drops_idle_full_meters_when_it_grows_too_large() -> None:
    table = Allowances(LocalSource(), max_kept=10)
    busy = table.of(Many(key_id="busy"), 0.0)
    assert busy.take(0.0, 0) is None
    for n in range(500):
        table.of(Many(key_id=f"k{n}"), 0.0)
    assert len(table) <= 11
    assert table.of(busy.record, 0.0) is busy
