"""How a long command tells what it is at."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from p2pinfer.cli.progress import telling


def told(*, terminal: bool) -> str:
    """What appears on a console."""
    console = Console(file=StringIO(), force_terminal=terminal, width=60)
    with telling(console) as tell:
        tell("replica, run 1 of 3: [starting]")
        tell("replica, run 2 of 3")
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_log_gets_a_line_for_each() -> None:
    """As it was said, without markup."""
    assert told(terminal=False) == "replica, run 1 of 3: [starting]\nreplica, run 2 of 3\n"


def test_a_terminal_shows_the_last_one_and_the_time() -> None:
    """It is gone when the command is done."""
    shown = told(terminal=True)
    assert "0:00:00" in shown
    assert "replica, run 2 of 3\n" in shown
    assert shown.endswith("\x1b[2K")
