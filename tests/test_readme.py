"""The documents are true: README's commands and example run, its JSON has these fields, links lead
somewhere, and the code map and the error table are whole.

Fenced blocks marked `sh` and `python` run in order, in an empty home; those marked `console` only
show what it looks like elsewhere. Default ports are replaced by free ones.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.cluster import free_base_port
from p2pinfer.errors import ERROR_CODES

pytestmark = pytest.mark.xdist_group("clusters")

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "systemd").glob("*.md")]
)
NODES = 3
DEADLINE_S = 120.0

EXPECTED = {
    "bin/p2pinfer demo --kill": r"the others tell the same \d+ tokens",
    "bin/p2pinfer demo": r"Each held this part of the model",
    "bin/p2pinfer cluster start": r'"event": "cluster_ready"',
    'bin/p2pinfer submit prompt "Once upon a time" --to': r"\w+.*\w+",
    'bin/p2pinfer submit prompt "One morning, Mia"': r"\w+",
    'bin/p2pinfer submit prompt "Once upon a time" --max-tokens': r'"finish_reason": "length"',
    "echo": r"\w+",
    "bin/p2pinfer status --json": r'"ready": true',
    "bin/p2pinfer status": r"node1 .*alive",
    "bin/p2pinfer plan --without": r"without node2 the cluster goes on",
    "bin/p2pinfer plan": r"node1 +yes +0-3",
    "bin/p2pinfer node pause": r"node2 owns nothing now",
    "bin/p2pinfer node resume": r"node2 may own units again",
    "bin/p2pinfer node drain": r"node3 has left",
    "bin/p2pinfer model make": r"/models/tiny: tiny",
    "bin/p2pinfer model inspect": r"LlamaForCausalLM",
    "bin/p2pinfer doctor": r"model .*ok.* tiny: 4 layers",
    "bin/p2pinfer bench net": r'"expected_ms": \d',
    "python": r"\w+[\s\S]*\[(length|stop)\]",
}
"""What the output of each command of the README must match, by how the command begins."""

OWN_PORT = {
    "cluster start": "--base-port {port}",
    "submit prompt": "--to 127.0.0.1:{port}",
    "status": "--to 127.0.0.1:{port}",
    "plan": "--to 127.0.0.1:{port}",
    "node drain": "--to 127.0.0.1:{port}",
    "node pause": "--to 127.0.0.1:{port}",
    "node resume": "--to 127.0.0.1:{port}",
    "doctor": "--listen 127.0.0.1:{other}",
}
"""The flag that replaces the default port, for verbs that have one."""


@dataclass
class Transcript:
    """What each of the README's commands said: exit code, stdout and stderr together."""

    said: dict[str, tuple[int, str]] = field(default_factory=dict)


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command of the README that runs, in order."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    return [*lines, *(f"python\n{block}" for block in blocks("python"))]


def on_free_ports(command: str, port: int, other: int) -> str:
    """The command for a cluster on `port`; `other` is a free port beside it."""
    command = re.sub(
        r"(127\.0\.0\.1:)77(\d)0", lambda m: f"{m[1]}{port + 10 * (int(m[2]) - 2)}", command
    )
    if "127.0.0.1" in command:
        return command
    for verb, flag in OWN_PORT.items():
        if f"p2pinfer {verb}" in command:
            return f"{command} {flag.format(port=port, other=other)}"
    return command


def run(command: str, folder: Path) -> tuple[int, str]:
    """Run one command; returns its exit code and all it said."""
    if command.startswith("python\n"):
        words = [sys.executable, "-P", "-c", command.removeprefix("python\n")]
    else:
        words = ["sh", "-c", command]
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    return done.returncode, done.stdout


def environment(folder: Path) -> dict[str, str]:
    """This environment with another home, so that nothing of the user's is read or written."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    return own | {"HOME": str(folder), "COLUMNS": "120"}


def start_cluster(command: str, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Start a cluster that runs on; returns it with its first line, which says that it is ready."""
    process = subprocess.Popen(
        ["sh", "-c", f"exec {command}"],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
    return process, process.stdout.readline() if readable else ""


def end(process: subprocess.Popen[str]) -> int:
    """Ctrl-C for a process; returns its exit code."""
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    return process.returncode


@pytest.fixture(scope="module")
def transcript(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Transcript]:
    """All commands of the README, run once in their order."""
    folder = tmp_path_factory.mktemp("readme")
    program = folder / "bin" / "p2pinfer"
    program.parent.mkdir()
    # As bin/p2pinfer ends, without the check of .venv, which has tests of its own.
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m p2pinfer "$@"\n')
    program.chmod(0o755)
    base = free_base_port(NODES + 1)
    found = Transcript()
    cluster: tuple[str, subprocess.Popen[str], str] | None = None
    try:
        for command in commands():
            written = on_free_ports(command, base, base + 10 * NODES)
            if "cluster start" in command:
                cluster = (command, *start_cluster(written, folder))
            else:
                found.said[command] = run(written, folder)
    finally:
        if cluster:
            found.said[cluster[0]] = end(cluster[1]), cluster[2]
    yield found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("command", commands(), ids=lambda command: command.split("\n")[0][:60])
def test_a_command_of_the_readme_does_what_it_says(command: str, transcript: Transcript) -> None:
    """It ends with exit code 0 and says what it should."""
    code, output = transcript.said[command]
    assert code == 0, output
    expected = next(rule for start, rule in EXPECTED.items() if command.startswith(start))
    assert re.search(expected, output), output


def fields_of(value: Any) -> Any:
    """The names of an object's fields, at all depths; of a list its first item counts."""
    if isinstance(value, dict):
        return {key: fields_of(item) for key, item in value.items()}
    if isinstance(value, list) and value:
        return [fields_of(value[0])]
    return None


@pytest.mark.timeout(400)
def test_the_json_objects_have_the_fields_that_the_readme_shows(transcript: Transcript) -> None:
    """`submit prompt --json` and `status --json` print the very fields, at all depths."""
    shown = [json.loads(block) for block in blocks("json")]
    # What comes before the object is progress, which goes to stderr.
    printed = [
        json.loads(said[said.index("{") :])
        for command, (_, said) in transcript.said.items()
        if "--json" in command
    ]
    assert [fields_of(value) for value in printed] == [fields_of(value) for value in shown]


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings have, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page leads to a file that exists and a heading that is there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_code_map_names_every_module() -> None:
    """ARCHITECTURE.md has a line for each module of the package."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    package = ROOT / "p2pinfer"
    modules = [path.relative_to(package) for path in package.rglob("*.py")]
    missing = [
        path.as_posix()
        for path in modules
        if path.stem not in ("__init__", "__main__") and f"`{path.with_suffix('')}`" not in text
    ]
    assert not missing


def test_the_code_map_names_nothing_else() -> None:
    """Every path of ARCHITECTURE.md that looks like one of the package exists."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:wire|core|model|cli|bench|demo)/\w+)`", text)
    assert named
    package = ROOT / "p2pinfer"
    gone = {
        name
        for name in named
        if not list(package.glob(f"{name}.py")) and not (package / name).is_dir()
    }
    assert not gone


def test_every_error_code_is_explained_to_operators() -> None:
    """docs/operating.md has a row for each code, with whether it may succeed later."""
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (yes|no) \|", text, re.MULTILINE))
    assert rows == {code: "yes" if again else "no" for code, again in ERROR_CODES.items()}


def test_decisions_are_numbered_without_gaps() -> None:
    """docs/decisions/ has 0001, 0002, ... and each has context, decision and consequences."""
    pages = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert [page.name[:4] for page in pages] == [f"{n:04}" for n in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert {"context", "decision", "consequences"} <= anchors(text), page.name
