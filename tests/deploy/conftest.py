"""Where the kernel allows no mount namespace, `make run` in a clean root is left out, and the run says so.

That is no skip: as an ordinary user, or in a container without privileges, nothing that one installs would help.
"""

from __future__ import annotations

import subprocess


def _may_mount() -> bool:
    argv = ["unshare", "--mount", "--propagation", "private", "true"]
    try:
        return subprocess.run(argv, capture_output=True, timeout=20, check=False).returncode == 0
    except OSError:
        return False


_MISSING = "" if _may_mount() else "deploy: `make run` in a clean Debian is left out: no mount namespace for this user"
collect_ignore = ["test_clean_root.py"] if _MISSING else []


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [_MISSING] if _MISSING else []
