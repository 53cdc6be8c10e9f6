"""The scripts that set up `.venv`: quick when nothing changed, clear when they cannot."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the scripts, and a `.venv` whose Python only says that it ran."""
    (tmp_path / "bin").mkdir()
    for name in ("p2pinfer", "test", "venv.sh", "setup_venv.py"):
        target = tmp_path / "bin" / name
        target.write_bytes((ROOT / "bin" / name).read_bytes())
        target.chmod(0o755)
    (tmp_path / "pyproject.toml").write_text("pyproject\n")
    (tmp_path / "constraints.txt").write_text("constraints\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "ran: $*"\n')
    python.chmod(0o755)
    return tmp_path


@pytest.fixture
def path_with_old_python(tmp_path: Path) -> str:
    """A PATH on which the only Python is too old."""
    folder = tmp_path / "old"
    folder.mkdir()
    for tool in ("sh", "cat", "cmp", "dirname", "readlink"):
        (folder / tool).symlink_to(Path("/usr/bin") / tool)
    for name in ("python3", "python3.11", "python"):
        (folder / name).write_text(
            '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n'
        )
        (folder / name).chmod(0o755)
    return str(folder)


def run(checkout: Path, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    """Run bin/p2pinfer of the checkout with only `path` to find programs on."""
    command = [str(checkout / "bin" / "p2pinfer"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env={"PATH": path}
    )


def stamp(checkout: Path, kind: str) -> None:
    """Note that `.venv` holds the packages of `kind`."""
    text = f"{checkout}\npyproject\nconstraints\n"
    (checkout / ".venv" / f".installed-{kind}").write_text(text)


@pytest.mark.parametrize("kind", ["base", "bench", "test"])
def test_an_up_to_date_environment_is_used_at_once(
    kind: str, checkout: Path, path_with_old_python: str
) -> None:
    """With a matching stamp nothing is installed and no other Python is looked for."""
    stamp(checkout, kind)
    done = run(checkout, "status", "--json", path=path_with_old_python)
    assert (done.stdout, done.stderr) == ("ran: -P -m p2pinfer status --json\n", "")


def test_benchmarks_need_more_than_the_base(checkout: Path, path_with_old_python: str) -> None:
    """`bench` is not run with the packages of `base` alone."""
    stamp(checkout, "base")
    assert run(checkout, "bench", "decode", path=path_with_old_python).returncode == 1
    stamp(checkout, "bench")
    assert run(checkout, "bench", "decode", path=path_with_old_python).returncode == 0


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_of_benchmarks_needs_the_base_only(
    flag: str, checkout: Path, path_with_old_python: str
) -> None:
    """Nothing is installed to show a help."""
    stamp(checkout, "base")
    assert run(checkout, "bench", "decode", flag, path=path_with_old_python).returncode == 0


def test_changed_pins_are_installed_again(checkout: Path, path_with_old_python: str) -> None:
    """A stamp of other pins does not count."""
    stamp(checkout, "base")
    (checkout / "constraints.txt").write_text("others\n")
    assert run(checkout, "status", path=path_with_old_python).returncode == 1


def test_an_old_python_is_told(checkout: Path, path_with_old_python: str) -> None:
    """Where the only Python is too old the message says which one there is and what is needed."""
    done = run(checkout, "status", path=path_with_old_python)
    assert done.returncode == 1 and done.stdout == ""
    assert "needs Python 3.11 or newer" in done.stderr and "Python 3.9.2" in done.stderr


def test_a_symlink_to_the_script_works(
    checkout: Path, path_with_old_python: str, tmp_path: Path
) -> None:
    """The script finds its checkout when it is called through a link elsewhere."""
    stamp(checkout, "base")
    link = tmp_path / "elsewhere"
    link.symlink_to(checkout / "bin" / "p2pinfer")
    done = subprocess.run(
        [link], capture_output=True, text=True, check=True, env={"PATH": path_with_old_python}
    )
    assert done.stdout == "ran: -P -m p2pinfer\n"
