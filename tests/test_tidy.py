"""The house rules that a linter does not know: layers, purity, sizes, docstrings, documentation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from p2pinfer.cli import root

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "p2pinfer"
MAX_FUNCTION_LINES = 70
MAX_MODULE_LINES = 500

LAYERS = {
    "errors": 0,
    "limits": 0,
    "types": 0,
    "config": 0,
    "demo": 0,
    "wire": 1,
    "core": 2,
    "model": 3,
    "transport": 3,
    "notify": 3,
    "cli": 5,
    "__main__": 5,
}
"""Layer of each part by its name under `p2pinfer`; what is not named joins others: layer 4."""

LAYER_OF_THE_REST = 4
PURE = ("wire", "core")
IMPURE = frozenset(
    """
    asyncio concurrent datetime logging multiprocessing numpy os pathlib platform psutil random
    rich secrets select signal socket ssl structlog subprocess tempfile threading time torch uuid
    zmq
    """.split()  # noqa: SIM905 - a list of words
)

LONG_FUNCTIONS: dict[str, int] = {}
LONG_MODULES: dict[str, int] = {}
"""Exceptions, `path` or `path:function`, and their lines. These lists may only shrink."""

SELF_EXPLAINING = {"p2pinfer/core/events.py"}
"""Modules whose classes are facts that their name and fields explain."""


def modules(folder: Path = PACKAGE) -> list[Path]:
    """Every Python file under `folder`."""
    return sorted(folder.rglob("*.py"))


def label(path: Path) -> str:
    """The path as a test id."""
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, wherever in it."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno}: import by the full name"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def layer_of(dotted: str) -> int:
    """The layer of a module or name under `p2pinfer`."""
    parts = dotted.split(".")
    if len(parts) < 2 or parts[1].startswith("__version"):
        return 0
    return LAYERS.get(parts[1], LAYER_OF_THE_REST)


def dotted_name(path: Path) -> str:
    """`p2pinfer.core.node` for its file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def documented_elsewhere(node: ast.stmt) -> bool:
    """A function whose documentation stands at another definition of the same name."""
    decorators = getattr(node, "decorator_list", [])
    names = {ast.unparse(decorator).rpartition(".")[2] for decorator in decorators}
    return bool(names & {"overload", "setter", "override"})


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Public functions, classes and methods without a docstring."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") or documented_elsewhere(node):
            continue
        if ast.get_docstring(node) is None:
            yield f"{prefix}{node.name} (line {node.lineno})"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{prefix}{node.name}.")


def verbs(command: click.Command = root, words: tuple[str, ...] = ()) -> Iterator[str]:
    """Every command a user can type, without the program's name: `node start`, `status`, ..."""
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from verbs(child, (*words, name))
    else:
        yield " ".join(words)


@pytest.mark.parametrize("path", modules(), ids=label)
def test_imports_point_down(path: Path) -> None:
    """A module imports only from its own layer and from those below."""
    own = layer_of(dotted_name(path))
    upward = [
        f"line {line}: {name} (layer {layer_of(name)})"
        for line, name in imports(path)
        if name.split(".")[0] == "p2pinfer" and layer_of(name) > own
    ]
    assert not upward, f"{label(path)} is in layer {own} and imports {upward}"


@pytest.mark.parametrize(
    "path", [path for part in PURE for path in modules(PACKAGE / part)], ids=label
)
def test_decisions_are_pure(path: Path) -> None:
    """wire/ and core/ import no clock, randomness, socket, thread, logger or tensor library."""
    impure = [f"line {n}: {name}" for n, name in imports(path) if name.split(".")[0] in IMPURE]
    assert not impure


@pytest.mark.parametrize("path", modules(), ids=label)
def test_functions_are_short(path: Path) -> None:
    """A function has at most 70 lines, and the exceptions do not grow."""
    sizes = {f"{label(path)}:{f.name}": (f.end_lineno or 0) - f.lineno + 1 for f in functions(path)}
    limits = {name: LONG_FUNCTIONS.get(name, MAX_FUNCTION_LINES) for name in sizes}
    assert not {name: size for name, size in sizes.items() if size > limits[name]}


@pytest.mark.parametrize("path", [*modules(), *modules(ROOT / "tests")], ids=label)
def test_modules_are_short(path: Path) -> None:
    """A module has at most 500 lines, tests too, and the exceptions do not grow."""
    size = len(path.read_text(encoding="utf-8").splitlines())
    assert size <= LONG_MODULES.get(label(path), MAX_MODULE_LINES)


def test_exceptions_are_still_needed() -> None:
    """An exception from the size rules is deleted as soon as the rule holds without it."""
    for name in LONG_MODULES:
        assert len((ROOT / name).read_text().splitlines()) > MAX_MODULE_LINES, name
    for name in LONG_FUNCTIONS:
        path, _, function = name.partition(":")
        sizes = [
            (f.end_lineno or 0) - f.lineno + 1 for f in functions(ROOT / path) if f.name == function
        ]
        assert max(sizes, default=0) > MAX_FUNCTION_LINES, name


@pytest.mark.parametrize("path", [*modules(), *modules(ROOT / "tests")], ids=label)
def test_modules_have_docstrings(path: Path) -> None:
    """Every module that is not empty says what it is for."""
    assert ast.get_docstring(tree_of(path)) or not tree_of(path).body


@pytest.mark.parametrize("path", modules(), ids=label)
def test_public_names_have_docstrings(path: Path) -> None:
    """Every public function, class and method says what it does."""
    if label(path) in SELF_EXPLAINING:
        return
    missing = [*undocumented(tree_of(path).body)]
    assert not missing


@pytest.mark.parametrize("path", modules(ROOT / "tests"), ids=label)
def test_tests_state_facts_and_never_sleep(path: Path) -> None:
    """Each test has a one-sentence docstring, and none sleeps: it waits for an event instead."""
    silent = [
        f.name for f in functions(path) if f.name.startswith("test_") and not ast.get_docstring(f)
    ]
    assert not silent
    sleeps = [
        node.lineno
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep")
    ]
    assert not sleeps


@pytest.mark.parametrize("verb", [*verbs()])
def test_verbs_are_documented(verb: str) -> None:
    """Every command appears in the README and in the pages under docs/."""
    pattern = re.compile(rf"\bp2pinfer {re.escape(verb)}\b")
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    assert pattern.search((ROOT / "README.md").read_text(encoding="utf-8")), "not in README.md"
    assert pattern.search(pages), "not in docs/"


@pytest.mark.xdist_group("itself")
def test_tests_that_share_a_cluster_run_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist knows its groups by what it adds to the names of tests."""
    grouped = bool(request.config.getoption("loadgroup", False))
    assert request.node.nodeid.endswith("@itself") == grouped
