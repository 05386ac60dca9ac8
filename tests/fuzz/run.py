"""Run the fuzz targets, each in a process of its own, and stop at the first fault.

    python tests/fuzz/run.py [--seconds N] [--target NAME] [--replay HEX]

N is shared by the targets that run. atheris guides the mutations; where there is no
atheris (it has no wheel for Python 3.14) the same seeds are mutated blindly.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
for folder in (HERE, HERE.parent, ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from fuzzkit import Target, seed, seeds  # noqa: E402 (the path above)

GROUPS = (
    "fuzz_request", "fuzz_connection", "fuzz_upstream", "fuzz_stream", "fuzz_body", "fuzz_call", "fuzz_config",
)  # fmt: skip
NOISE = ("INFO:", "WARNING: Failed to find function")
MAX_BYTES = 4096
ONE_INPUT_S = 5
MEMORY_MB = 2048


def load() -> dict[str, Target]:
    """Import every group; the names of targets are unique."""
    found: dict[str, Target] = {}
    for group in GROUPS:
        for name, target in importlib.import_module(group).TARGETS.items():
            assert name not in found, name
            found[name] = target
    return found


# -- the child: one target


def too_slow(*_: object) -> None:
    """Take note of the signal: an input had its time."""
    raise TimeoutError(f"one input took {ONE_INPUT_S} s of CPU")


def bounded(target: Target, data: bytes) -> None:
    """Run one input; what takes too long is a fault as well."""
    # NOTE: CPU time, and not SIGALRM: that one is libFuzzer's, which in a busy interpreter hangs.
    signal.setitimer(signal.ITIMER_VIRTUAL, ONE_INPUT_S)
    try:
        target(data)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def with_atheris(name: str, seconds: int, folder: Path) -> None:
    """Fuzz until the time is over; a fault ends the process and leaves a file in `folder`."""
    import atheris

    with atheris.instrument_imports(include=["nbgate"]):
        target = load()[name]

    def guarded(data: bytes) -> None:
        # NOTE: atheris ends the interpreter in good order, which may hang; what is to be told is told here.
        try:
            bounded(target, data)
        except BaseException:
            traceback.print_exc()
            (folder / "found-fault").write_bytes(data)
            sys.stderr.flush()
            os._exit(77)

    signal.signal(signal.SIGVTALRM, too_slow)
    options = [
        f"-max_total_time={seconds}", f"-timeout={12 * ONE_INPUT_S}", f"-max_len={MAX_BYTES}",
        f"-rss_limit_mb={MEMORY_MB}", f"-artifact_prefix={folder}/found-", "-print_final_stats=1", "-verbosity=0",
        str(folder / "corpus"),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], guarded)
    atheris.Fuzz()


def mutated(rng: random.Random, pool: list[bytes]) -> bytes:
    """Change a seed in a few places: bits, bytes, pieces of itself and of others."""
    data = bytearray(rng.choice(pool))
    for _ in range(rng.randint(1, 6)):
        at = rng.randint(0, len(data))
        end = min(len(data), at + rng.randint(1, 16))
        kind = rng.randint(0, 5)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randint(0, 7)
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.randint(1, 4))
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end] * rng.randint(1, 8)
        elif kind == 4:
            other = rng.choice(pool)
            start = rng.randint(0, len(other))
            data[at:at] = other[start : start + rng.randint(1, 64)]
        else:
            data[at:end] = bytes(rng.choice(b'\r\n\t :;,{}[]"\\%/0aF\x00\xff') for _ in range(rng.randint(1, 3)))
    return bytes(data[:MAX_BYTES])


def blindly(name: str, seconds: int, folder: Path) -> None:
    """Mutate at random until the time is over; a fault leaves a file in `folder`."""

    target = load()[name]
    pool = [path.read_bytes() for path in sorted((folder / "corpus").iterdir())] or [b""]
    rng = random.Random()
    signal.signal(signal.SIGVTALRM, too_slow)
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        data = pool[count] if count < len(pool) else mutated(rng, pool)
        count += 1
        try:
            bounded(target, data)
        except BaseException:
            (folder / "found-fault").write_bytes(data)
            raise
    print(f"stat::number_of_executed_units: {count}")


# -- the parent


def fuzz(name: str, seconds: int, blind: bool) -> bool:
    """Run one target in a child; True if it found nothing."""
    with tempfile.TemporaryDirectory(prefix="nbgate-fuzz-") as text:
        folder = Path(text)
        (folder / "corpus").mkdir()
        for path in seeds(name):
            (folder / "corpus" / path.name).write_bytes(seed(path))
        command = [sys.executable, str(Path(__file__).resolve()), "--target", name, "--seconds", str(seconds)]
        command += ["--child", text] + (["--blind"] if blind else [])
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        log = folder / "log"
        with log.open("wb") as out:
            # NOTE: the child bounds itself; the margin covers start, a slow input and the last report.
            code: int | str
            try:
                limit_s = seconds + 60
                code = subprocess.run(command, stdout=out, stderr=out, env=env, timeout=limit_s, check=False).returncode
            except subprocess.TimeoutExpired:
                code = "hung"
        said = "\n".join(x for x in log.read_text("utf-8", "replace").splitlines() if not x.startswith(NOISE))
        inputs = [path.read_bytes() for path in sorted(folder.glob("found-*"))]
    if code == 0 and not inputs:
        count = said.rpartition("number_of_executed_units:")[2].split()[:1] or ["?"]
        print(f"{name}: nothing found in {seconds} s, {count[0]} inputs", flush=True)
        return True
    print(said[-8000:])
    print(f"{name}: FAULT (exit {code})")
    for data in inputs:
        print(f"input, {len(data)} bytes: {data.hex()}")
        print(f"replay: {sys.executable} {os.path.relpath(__file__)} --target {name} --replay {data.hex() or '-'}")
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together (60)")
    parser.add_argument("--target", action="append", help="only this one; may be given more than once")
    parser.add_argument("--replay", metavar="HEX", help="run one input through --target")
    parser.add_argument("--blind", action="store_true", help="mutate without atheris")
    parser.add_argument("--list", action="store_true", help="list the targets")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    blind = args.blind or importlib.util.find_spec("atheris") is None
    if args.child:
        warnings.simplefilter("error")
        with contextlib.suppress(KeyboardInterrupt):
            (blindly if blind else with_atheris)(args.target[0], args.seconds, Path(args.child))
        return 0
    known: dict[str, Any] = load()
    names = args.target or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no target {unknown[0]}; known: {', '.join(known)}")
    if args.list:
        print("\n".join(names))
        return 0
    if args.replay is not None:
        known[names[0]](b"" if args.replay == "-" else bytes.fromhex(args.replay))
        print("no fault")
        return 0
    share = max(1, args.seconds // len(names))
    return 0 if all(fuzz(name, share, blind) for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
