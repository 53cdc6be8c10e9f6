"""Make or repair the checkout's `.venv` (called by `bin/venv.sh` with the stamp's text on stdin).

usage: setup_venv.py VENV NAME [EXTRA]...

Runs under any Python from 3.11 and needs nothing but its standard library. Several may run at
once: one works, the others wait for it. All it says goes to stderr.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import venv
from pathlib import Path


def say(text: str) -> None:
    """Print one line of progress where it does not mix with results."""
    print(f"p2pinfer: {text}", file=sys.stderr, flush=True)


def runs(*command: object) -> bool:
    """Run a command with its output on stderr; whether it succeeded."""
    words = [str(word) for word in command]
    done = subprocess.run(words, check=False, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    return done.returncode == 0


def create(folder: Path) -> None:
    """Create the virtual environment unless a working one is there; the lock file stays."""
    python = folder / "bin" / "python"
    if python.exists() and runs(python, "-c", "import pip"):
        return
    for entry in folder.iterdir():
        if entry.name == ".lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    venv.EnvBuilder(symlinks=True, with_pip=True).create(folder)


def install(folder: Path, extras: list[str]) -> bool:
    """Install the checkout (editable) with `extras` at the pinned versions; False if it failed."""
    root = folder.parent
    target = f"{root}[{','.join(extras)}]" if extras else root
    pip = (folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    pins = ("--constraint", root / "constraints.txt")
    if not runs(*pip, "install", "--quiet", "--no-compile", *pins, "--editable", target):
        return False
    # pip would compile on one processor. What some packages have for other Pythons does not
    # compile, and need not.
    python, packages = folder / "bin" / "python", folder / "lib"
    runs(python, "-m", "compileall", "-qq", "-j", "0", packages)
    return True


def main(arguments: list[str]) -> int:
    """Bring the environment up to date; the exit status is 1 if that failed."""
    folder, name, *extras = Path(arguments[0]), *arguments[1:]
    stamp, text = folder / f".installed-{name}", sys.stdin.read()
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that sets up .venv ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == text:
            return 0
        if extras and any(folder.glob(".installed-*")):
            say(f"adding the packages of {', '.join(extras)} to .venv, which may take a minute ...")
        else:
            say("setting up .venv: this fetches about 1 GB and takes some minutes ...")
        try:
            create(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            say(f"error: could not create {folder}: {error}")
            say("on Debian and Ubuntu, `venv` is a package of its own: apt install python3-venv")
            return 1
        if not install(folder, extras):
            say("error: the packages could not be installed; pip's own message is above.")
            say("Without a network, point PIP_FIND_LINKS or PIP_INDEX_URL at a local copy.")
            return 1
        stamp.write_text(text)
        say(".venv is ready.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
