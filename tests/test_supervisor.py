"""The supervisor: what it starts, restarts, reloads, rolls and ends, with a stand-in for the worker."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FAKE = str(HERE / "fake_worker.py")
LAUNCHER = f"""
import os, sys
from nbgate import children, supervisor
children.BEAT_LIMIT_S = float(os.environ.get("BEAT_LIMIT_S", "60"))
supervisor.GRACE_S = 0.3
if "SYSTEMD_FD" in os.environ:
    os.dup2(int(os.environ["SYSTEMD_FD"]), 3)
    os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = str(os.getpid()), "1"
fake = (sys.executable, {FAKE!r})
commands = supervisor.Commands(describe=(*fake, "--describe"), worker=fake, demo=fake)
sys.exit(supervisor.Supervisor(sys.argv[1], os.environ, commands).run())
"""


def until(condition: Callable[[], Any], within_s: float = 20.0) -> Any:
    """Poll until the condition holds; fail at the deadline."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "the deadline passed"
        time.sleep(0.01)
    return found


def alive(pid: int) -> bool:
    """Tell whether a process runs (a zombie does not)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Node:
    """One supervisor under test and what it wrote."""

    def __init__(self, folder: Path, **plan: Any) -> None:
        self.folder = folder
        self.file = folder / "nbgate.json"
        self.events_file = folder / "events"
        self.env: dict[str, str] = {}
        self.pass_fds: tuple[int, ...] = ()
        self.plan: dict[str, Any] = {
            "listen": [["", "127.0.0.1", 0]], "workers": 2, "data_dir": str(folder / "data"), "drain_s": 0.1,
            "drain_streams_s": 0.2, "drain_roll_s": 30, "demo": False, "demo_key": "", "demo_model": "gpt-4o",
            "admin_key": False, "restart": {"server.listen": "1"}, "fake": {"log": str(self.events_file)},
        }  # fmt: skip
        self.plan["fake"].update(plan.pop("fake", {}))
        self.plan.update(plan)
        self.process: subprocess.Popen[bytes]

    def write(self, **changes: Any) -> None:
        self.file.write_text(json.dumps({**self.plan, **changes}))

    def launch(self) -> Node:
        self.write()
        env = {k: v for k, v in os.environ.items() if not k.startswith(("NBGATE_", "NOTIFY_", "LISTEN_", "RUNTIME_"))}
        env |= {"PYTHONPATH": str(HERE.parent), "FAKE_DEMO_LOG": str(self.events_file), **self.env}
        with open(self.folder / "out", "wb") as out, open(self.folder / "err", "wb") as err:
            argv = [sys.executable, "-c", LAUNCHER, str(self.file)]
            self.process = subprocess.Popen(argv, stdout=out, stderr=err, env=env, pass_fds=self.pass_fds)
        return self

    def start(self) -> Node:
        self.launch()
        until(lambda: "curl" in self.out() or self.process.poll() is not None)
        assert self.process.poll() is None, self.err()
        return self

    def out(self) -> str:
        return (self.folder / "out").read_text()

    def err(self) -> str:
        return (self.folder / "err").read_text()

    def events(self, event: str = "") -> list[str]:
        lines = self.events_file.read_text().splitlines() if self.events_file.exists() else []
        return [line for line in lines if line.startswith(event)]

    def pids(self, event: str = "start") -> list[int]:
        return [int(line.split()[2]) for line in self.events(event)]

    def port(self) -> int:
        found = re.search(r"^URL: +http://127\.0\.0\.1:(\d+)/$", self.out(), re.MULTILINE)
        assert found
        return int(found.group(1))

    def ask(self) -> str:
        """Connect once and read the line of the worker that answers."""
        with socket.create_connection(("127.0.0.1", self.port()), 10) as sock:
            return sock.recv(100).decode()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(20)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(20)
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Make supervisors that are ended after the test with all they started."""
    made: list[Node] = []

    def make(**plan: Any) -> Node:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Node(folder, **plan))
        return made[-1]

    yield make
    for one in made:
        if hasattr(one, "process"):
            one.end()


# -- start


def test_supervisor_says_how_to_use_it_in_its_last_lines(node: Callable[..., Node]) -> None:
    one = node(demo=True).start()
    url, demo, admin, curl = one.out().splitlines()[-4:]
    data = Path(one.plan["data_dir"])
    key, secret = (data / "demo.key").read_text().strip(), (data / "admin.key").read_text().strip()
    assert re.fullmatch(r"URL:       http://127\.0\.0\.1:\d+/", url)
    assert demo == f"Demo key:  {key}" and re.fullmatch(r"sk-[A-Za-z0-9]{48}", key)
    assert admin == f"Admin key: {data}/admin.key"
    assert curl.startswith(f"curl -N http://127.0.0.1:{one.port()}/v1/chat/completions -H ")
    assert f" -H 'Authorization: Bearer {key}' " in curl
    assert json.loads(curl.split("-d ")[1].strip("'"))["stream"] is True
    assert secret not in one.out() + one.err() and re.fullmatch(r"sk-[A-Za-z0-9]{48}", secret)


def test_supervisor_keeps_its_files_from_others_and_its_keys_over_restarts(node: Callable[..., Node]) -> None:
    one = node(demo=True).start()
    data = Path(one.plan["data_dir"])
    files = ["admin.key", "demo.key", "nbgate.lock", "run/config.toml", "run/demo.sock"]
    assert {name: oct((data / name).stat().st_mode & 0o777) for name in files} == dict.fromkeys(files, "0o600")
    assert oct(data.stat().st_mode & 0o777) == oct((data / "run").stat().st_mode & 0o777) == "0o700"
    keys = [(data / name).read_text() for name in files[:2]]
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    one.start()
    assert [(data / name).read_text() for name in files[:2]] == keys


def test_supervisor_makes_no_key_that_the_file_gives(node: Callable[..., Node]) -> None:
    one = node(demo=True, demo_key="sk-given", admin_key=True).start()
    assert "Demo key:  sk-given\nAdmin key: as set by [admin] key\n" in one.out()
    assert not list(Path(one.plan["data_dir"]).glob("*.key"))


def test_supervisor_gives_each_slot_its_own_socket(node: Callable[..., Node]) -> None:
    one = node().start()
    assert until(lambda: len({one.ask().split()[0] for _ in range(30)}) == 2)


def test_supervisor_refuses_a_wrong_file_with_its_lines(node: Callable[..., Node]) -> None:
    one = node()
    one.write = lambda **_: one.file.write_text("no json")  # type: ignore[method-assign]
    one.launch()
    assert one.wait() == 78
    assert one.err() == f"{one.file}:3: this is the third line's fault\n"


def test_supervisor_refuses_a_busy_port_with_the_cure(node: Callable[..., Node]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        one = node(listen=[["", "127.0.0.1", port]]).launch()
        assert one.wait() == 77
    cure = "stop that program or set [server] listen / NBGATE_SERVER__LISTEN"
    assert one.err() == f"nbgate: port {port} is in use; {cure}\n"


def test_supervisor_refuses_a_port_that_another_nbgate_shares(node: Callable[..., Node]) -> None:
    port = node().start().port()
    assert node(listen=[["", "127.0.0.1", port]]).launch().wait() == 77


def test_supervisor_refuses_a_second_start_on_one_data_dir(node: Callable[..., Node]) -> None:
    first = node().start()
    second = node(data_dir=first.plan["data_dir"]).launch()
    assert second.wait() == 77
    assert second.err() == (
        f"nbgate: another nbgate (pid {first.process.pid}) runs on {first.plan['data_dir']}; "
        "stop it or set [server] data_dir / NBGATE_SERVER__DATA_DIR\n"
    )
    assert first.ask()


def test_supervisor_refuses_a_data_dir_that_cannot_be_made(node: Callable[..., Node], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one = node(data_dir=str(tmp_path / "file" / "data")).launch()
    assert one.wait() == 77 and one.err().startswith("nbgate: cannot use the folder ")


def test_supervisor_imports_only_the_standard_library() -> None:
    code = "import sys, nbgate.supervisor; print(*sys.modules)"
    argv = [sys.executable, "-S", "-c", code]
    names = subprocess.run(argv, cwd=HERE.parent, capture_output=True, text=True, check=True)
    roots = {name.partition(".")[0] for name in names.stdout.split()} - sys.stdlib_module_names
    assert roots <= {"nbgate", "__main__"}
    ours = {name for name in names.stdout.split() if name.startswith("nbgate.")}
    assert ours == {f"nbgate.{name}" for name in ("supervisor", "children", "notify", "plan", "sockets")}


# -- sockets


def test_supervisor_shares_a_unix_socket_and_replaces_a_dead_one(node: Callable[..., Node], tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    one = node(listen=[[str(path), "", 0]]).start()
    assert oct(path.stat().st_mode & 0o777) == "0o660"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert int(client.recv(100).split()[1]) in one.pids()
    other = node(listen=[[str(path), "", 0]]).launch()
    assert other.wait() == 77 and f"unix:{path} is in use" in other.err()
    one.signal(signal.SIGTERM)
    assert one.wait() == 0 and not path.exists()


def test_supervisor_never_replaces_a_file_that_is_no_socket(node: Callable[..., Node], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    one = node(listen=[[str(tmp_path / "precious"), "", 0]]).launch()
    assert one.wait() == 77 and "exists and is no socket" in one.err()
    assert (tmp_path / "precious").read_text() == "x"


def test_supervisor_takes_the_sockets_of_systemd(node: Callable[..., Node]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        one = node()
        one.env, one.pass_fds = {"SYSTEMD_FD": str(sock.fileno())}, (sock.fileno(),)
        one.start()
        assert one.port() == sock.getsockname()[1]
        assert int(one.ask().split()[1]) in one.pids()


# -- crashes


def test_supervisor_restarts_a_killed_worker_and_loses_no_connection(node: Callable[..., Node]) -> None:
    one = node(workers=1).start()
    for _ in range(3):
        os.kill(one.pids()[-1], signal.SIGKILL)
        assert one.ask()
    assert len(set(one.pids())) == 4
    assert "was killed by SIGKILL" in one.err()


def test_supervisor_backs_off_doubling_when_a_worker_keeps_crashing(node: Callable[..., Node]) -> None:
    one = node(workers=1, fake={"exit": 1}).launch()
    until(lambda: len(one.events("start")) >= 5)
    delays = re.findall(r"ended with code 1 after .* s; next start in ([0-9.]+) s", one.err())
    assert delays[:4] == ["0.1", "0.2", "0.4", "0.8"]
    one.signal(signal.SIGTERM)
    assert one.wait() == 0


@pytest.mark.parametrize("code", [77, 78])
def test_supervisor_never_restarts_a_worker_that_says_so(node: Callable[..., Node], code: int) -> None:
    one = node(fake={"exit": code}).launch()
    assert one.wait() == code
    assert len(one.events("start")) <= 2 and "it will not be started again" in one.err()


def test_supervisor_kills_and_replaces_a_silent_worker(node: Callable[..., Node]) -> None:
    one = node(workers=1, fake={"mute": True})
    one.env["BEAT_LIMIT_S"] = "0.3"
    one.start()
    until(lambda: len(one.events("start")) >= 2)
    assert "showed no sign of life for too long; killing it" in one.err()


def test_supervisor_restarts_the_demo(node: Callable[..., Node]) -> None:
    one = node(workers=1, demo=True).start()
    until(lambda: one.events("start demo"))
    os.kill(one.pids("start demo")[0], signal.SIGKILL)
    until(lambda: len(one.events("start demo")) == 2)


# -- reload


def test_supervisor_swaps_a_good_file_in_place(node: Callable[..., Node]) -> None:
    one = node().start()
    one.write(note="second")
    os.utime(one.file, (5_000, 5_000))
    one.signal(signal.SIGHUP)
    until(lambda: len(one.events("hup-second")) == 2)
    assert sorted(one.pids("hup-second")) == sorted(one.pids("start"))
    # Key expiries count from the file's last change, so the snapshot keeps it.
    assert (Path(one.plan["data_dir"]) / "run" / "config.toml").stat().st_mtime == 5_000


def test_supervisor_changes_nothing_for_a_bad_file(node: Callable[..., Node]) -> None:
    one = node().start()
    snapshot = Path(one.plan["data_dir"]) / "run" / "config.toml"
    before = snapshot.read_bytes()
    one.file.write_text("broken")
    one.signal(signal.SIGHUP)
    until(lambda: f"{one.file}:3: this is the third line's fault" in one.err())
    one.file.unlink()
    one.signal(signal.SIGHUP)
    until(lambda: "cannot read this file: No such file or directory" in one.err())
    assert one.err().count("reload refused, nothing changed") == 2
    one.write(note="third")
    one.signal(signal.SIGHUP)
    until(lambda: len(one.events("hup-third")) == 2)
    assert len(one.events("hup")) == 2 and len(one.events("start")) == 2
    assert before != snapshot.read_bytes()


def test_supervisor_refuses_a_change_that_needs_a_restart(node: Callable[..., Node]) -> None:
    one = node().start()
    one.write(restart={"server.listen": "2"}, note="x")
    one.signal(signal.SIGHUP)
    until(lambda: "server.listen cannot change while running; restart nbgate for that" in one.err())
    assert '"note"' not in (Path(one.plan["data_dir"]) / "run" / "config.toml").read_text()
    assert one.events("hup") == []


def test_supervisor_starts_and_ends_the_demo_with_its_channel(node: Callable[..., Node]) -> None:
    one = node(workers=1).start()
    one.write(demo=True)
    one.signal(signal.SIGHUP)
    until(lambda: one.events("start demo"))
    one.write(demo=False)
    one.signal(signal.SIGHUP)
    until(lambda: one.events("end demo"))
    until(lambda: not alive(one.pids("start demo")[0]))
    assert "demo" not in one.err()


# -- roll


def test_supervisor_rolls_slot_by_slot_with_the_new_worker_ready_first(node: Callable[..., Node]) -> None:
    one = node().start()
    old = one.pids()
    one.signal(signal.SIGUSR2)
    while len(one.events("end")) < 2:
        assert one.ask()  # no connection is refused or left alone at any time
    new = one.pids()[2:]
    assert len(new) == 2 and not set(new) & set(old)
    order = [line.rpartition(" ")[0] for line in one.events() if line.startswith(("start", "roll"))][2:]
    assert order.index("start 0") < order.index("roll 0") < order.index("roll 1")
    assert order.index("start 0") < order.index("start 1") < order.index("roll 1")
    until(lambda: not any(map(alive, old)))
    assert all(map(alive, new))


def test_supervisor_lets_old_workers_finish_and_holds_no_third_in_a_slot(node: Callable[..., Node]) -> None:
    hold = "hold"
    one = node(workers=1, drain_roll_s=60)
    one.plan["fake"]["hold"] = str(one.folder / hold)
    (one.folder / hold).touch()
    one.start()
    one.signal(signal.SIGUSR2)
    until(lambda: one.events("roll"))
    one.signal(signal.SIGUSR2)
    until(lambda: one.err().count("replacing the workers") == 2)
    assert one.ask() and len(one.events("start")) == 2 and alive(one.pids()[0])
    (one.folder / hold).unlink()
    until(lambda: len(one.events("start")) == 3)


def test_supervisor_keeps_the_old_workers_when_a_new_one_fails(node: Callable[..., Node]) -> None:
    one = node().start()
    one.plan["fake"]["exit"] = 3
    one.write()
    one.signal(signal.SIGHUP)
    until(lambda: len(one.events("hup")) == 2)
    one.signal(signal.SIGUSR2)
    until(lambda: "the roll is given up, the old workers stay" in one.err())
    assert one.ask() and one.events("roll") == [] and len(one.events("start")) == 3


def test_supervisor_gives_an_old_worker_of_a_roll_no_longer_than_the_others_once_it_ends(
    node: Callable[..., Node],
) -> None:
    one = node(workers=1, drain_roll_s=3600, drain_streams_s=0.5)
    one.plan["fake"]["hold"] = str(one.folder / "hold")
    (one.folder / "hold").touch()
    one.start()
    one.signal(signal.SIGUSR2)
    until(lambda: one.events("roll"))
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    assert one.pids("hurry") == one.pids()[:1], "it was told, and then killed"
    assert not any(map(alive, one.pids()))


# -- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_supervisor_ends_every_child_the_demo_last(node: Callable[..., Node], number: int) -> None:
    one = node(demo=True).start()
    until(lambda: len(one.events("start")) == 3)
    one.signal(number)
    assert one.wait() == 0
    assert not any(map(alive, one.pids()))
    ends = [line.split()[1] for line in one.events("end")]
    assert sorted(ends) == ["0", "1", "demo"] and ends[-1] == "demo"


def test_supervisor_kills_a_worker_that_does_not_end_in_time(node: Callable[..., Node]) -> None:
    one = node(workers=1, fake={"stubborn": True}).start()
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    assert "was killed by SIGKILL" in one.err() and not alive(one.pids()[0])


def test_supervisor_ends_at_once_on_a_second_interrupt(node: Callable[..., Node]) -> None:
    one = node(drain_streams_s=600, fake={"stubborn": True}).start()
    one.signal(signal.SIGINT)
    until(lambda: "draining; a second Ctrl-C ends it at once" in one.err())
    one.signal(signal.SIGINT)
    assert one.wait() == 130
    assert not any(map(alive, one.pids()))


def test_supervisor_ends_while_workers_are_not_ready(node: Callable[..., Node]) -> None:
    one = node(fake={"unready": True}).launch()
    until(lambda: len(one.events("start")) == 2)
    one.signal(signal.SIGTERM)
    assert one.wait() == 0 and one.out() == ""


def test_children_end_when_the_supervisor_is_killed(node: Callable[..., Node]) -> None:
    one = node(demo=True).start()
    until(lambda: len(one.events("start")) == 3)
    one.process.kill()
    until(lambda: not any(map(alive, one.pids())))
    assert len(one.events("orphan")) == 3


# -- systemd


def test_supervisor_tells_systemd_what_it_does(node: Callable[..., Node], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        one = node(workers=1)
        one.env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        one.start()

        def next_words() -> str:
            while (words := manager.recv(4096).decode()) == "WATCHDOG=1":
                pass
            return words

        assert next_words() == f"READY=1\nMAINPID={one.process.pid}\nSTATUS=serving with 1 workers"
        assert manager.recv(4096) == b"WATCHDOG=1"
        one.file.write_text("broken")
        one.signal(signal.SIGHUP)
        assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", next_words())
        assert "STATUS=reload refused: " in (words := next_words()) and words.startswith("READY=1\n")
        one.signal(signal.SIGTERM)
        assert next_words() == "STOPPING=1\nSTATUS=draining"
        assert one.wait() == 0
