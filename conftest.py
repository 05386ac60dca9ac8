"""A rule for all tests: in CI nothing is skipped.

Elsewhere a test that needs a program skips and says so; CI installs them all, so a skip there is a fault.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

import pytest

# `make test-compiled` names the folder of the compiled rooms; then they are what is tested, and nothing else.
if tree := os.environ.get("NBGATE_TEST_TREE"):
    sys.path.insert(0, tree)
    import nbgate.relay

    if not nbgate.relay.__file__.endswith(".so"):
        raise pytest.UsageError(f"{tree} holds no compiled rooms")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure when CI is set."""
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.longrepr = f"nothing may be skipped in CI: {reason}"
    return report
