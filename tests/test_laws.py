"""The laws of the house that can be read off the source: imports, sizes, words."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nbgate"
FILES = sorted(PACKAGE.rglob("*.py"))
TREE = sorted(p for folder in ("nbgate", "tests", "bench") for p in (ROOT / folder).rglob("*.py"))
PURE = ["channels", "sse", "meter", "json_scan", "errors", "body", "routes", "server.wire", "allowance", "inflate"]
PURE += ["overload"]
PURE += [f"dialects.{p.stem}" for p in (PACKAGE / "dialects").glob("*.py")]
WORLD = {"asyncio", "os", "time", "random", "socket", "ssl", "aiohttp", "uvloop", "httptools", "select", "selectors"}
STDLIB_ONLY = ["supervisor", "children", "plan", "sockets", "notify"]
THIRD_PARTIES = {
    "uvloop", "httptools", "orjson", "msgspec", "xxhash", "aiohttp", "redis", "websockets", "prometheus_client",
    "click", "rich", "python_socks", "sqlalchemy", "starlette", "jinja2",
}  # fmt: skip
ROOMS_OF = {
    "httptools": {"server.head", "upstream_wire", "exchange"},
    "uvloop": {"worker", "demo.__main__"},
    "python_socks": {"dial"},
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def imports(path: Path) -> set[str]:
    """Every module that a file imports at run time, wherever it stands."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    hidden = {id(inner) for node in typing_only for inner in ast.walk(node)}
    package = ["nbgate", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(p for p in (base, node.module or "") if p)
            found.add(module)
            if node.module is None or module == "nbgate":
                found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p).startswith("server")], ids=name_of)
def test_server_imports_nothing_else_of_nbgate(path: Path) -> None:
    foreign = {n for n in imports(path) if n.startswith("nbgate") and not n.startswith("nbgate.server")}
    assert not foreign


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_data_plane_imports_no_sql_and_no_web_framework(path: Path) -> None:
    if not name_of(path).startswith("control"):
        assert not roots(path) & {"sqlalchemy", "starlette", "sqlite3", "asyncpg", "jinja2"}
        assert not {n for n in imports(path) if n.startswith("nbgate.control")}


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_know_no_world(room: str) -> None:
    path = PACKAGE / (room.replace(".", "/") + ".py")
    assert not roots(path) & WORLD


@pytest.mark.parametrize("room", STDLIB_ONLY)
def test_the_supervisor_imports_no_third_parties(room: str) -> None:
    path = PACKAGE / f"{room}.py"
    assert not roots(path) & THIRD_PARTIES
    inside = {n.removeprefix("nbgate.") for n in imports(path) if n.startswith("nbgate.")}
    assert inside <= {*STDLIB_ONLY, "__version__"}


@pytest.mark.parametrize("library", sorted(ROOMS_OF))
def test_a_library_lives_in_its_rooms(library: str) -> None:
    users = {name_of(p) for p in FILES if library in roots(p)}
    assert users <= ROOMS_OF[library]


@pytest.mark.parametrize("path", TREE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_under_500_lines_and_functions_under_50(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 500
    if "tests" in path.relative_to(ROOT).parts:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 50, f"{node.name} in line {node.lineno}"


@pytest.mark.parametrize("path", [p for p in FILES if p.stat().st_size], ids=name_of)
def test_each_room_opens_with_its_law(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "the module docstring says what lives here"


@pytest.mark.parametrize("path", TREE, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_left_to_do_in_the_tree(path: Path) -> None:
    text = path.read_text()
    if path != Path(__file__):
        assert not {word for word in ("TODO", "FIXME", "XXX", "NotImplementedError") if word in text}


def test_no_folder_is_a_lumber_room() -> None:
    names = {p.stem for p in FILES} | {p.name for p in PACKAGE.iterdir()}
    assert not names & {"utils", "common", "helpers", "types", "manager"}
