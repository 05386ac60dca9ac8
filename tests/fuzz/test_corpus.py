"""Every seed keeps its target's invariants; no fuzzer needed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from fuzzkit import CORPUS, Target, seed, seeds

GROUPS = sorted(path.stem for path in Path(__file__).parent.glob("fuzz_*.py"))
TARGETS: dict[str, Target] = {}
for group in GROUPS:
    TARGETS.update(importlib.import_module(group).TARGETS)
CASES = [(name, path) for name in TARGETS for path in seeds(name)]


def test_each_target_has_seeds_and_each_seed_a_target() -> None:
    folders = {path.name for path in CORPUS.iterdir()}
    assert folders == set(TARGETS)
    assert {name for name, _ in CASES} == set(TARGETS)


@pytest.mark.parametrize(("name", "path"), CASES, ids=[f"{name}-{path.stem}" for name, path in CASES])
def test_target_holds_on_seed(name: str, path: Path) -> None:
    TARGETS[name](seed(path))


@pytest.mark.parametrize("name", TARGETS)
def test_target_holds_on_nothing_and_on_a_digit(name: str) -> None:
    TARGETS[name](b"")
    TARGETS[name](b"3")
