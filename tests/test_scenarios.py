"""Plays the transcripts of `tests/scenarios`, and compares each with what was recorded."""

from __future__ import annotations

import os
from difflib import unified_diff
from pathlib import Path

import pytest

from tests.scenarios.play import COMMANDS, played

FOLDER = Path(__file__).resolve().parent / "scenarios"
WRITE = "P2PINFER_WRITE_SCENARIOS"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_a_play_goes_as_recorded(path: Path) -> None:
    """A transcript begins with the rule it shows, and what happens is what it says happens."""
    recorded = path.read_text(encoding="utf-8")
    assert recorded.startswith("# "), "the first line says which rule this shows"
    now = played(recorded)
    if os.environ.get(WRITE) == "1":
        path.write_text(now, encoding="utf-8")
        return
    diff = unified_diff(recorded.splitlines(), now.splitlines(), "recorded", "now", lineterm="")
    assert now == recorded, f"not as recorded ({WRITE}=1 records anew):\n" + "\n".join(diff)


@pytest.mark.parametrize(
    "text",
    ["dance\n", "show plan\n", "nodes a\nkill b\n", "nodes a\nstart a\nuntil b leads\n"],
)
def test_a_play_that_cannot_go_on_says_where(text: str) -> None:
    """A command that is unknown, or cannot be obeyed, is named with its line."""
    with pytest.raises(ValueError, match=r"\Aline \d"):
        played(text)


def test_a_play_is_the_same_each_time() -> None:
    """Nothing of a play is left to chance."""
    text = "nodes a b c\nform a b c\nsubmit r1 through b: 9 tokens\nkill a\nuntil r1 ends\n"
    assert played(text) == played(played(text))


def test_every_command_is_played() -> None:
    """No command is there for a play that may come."""
    plays = [path.read_text(encoding="utf-8") for path in FOLDER.glob("*.txt")]
    lines = {line for play in plays for line in play.splitlines()}
    patterns = [command.pattern for command in COMMANDS]
    unused = [p.pattern for p in patterns if not any(map(p.fullmatch, lines))]
    assert not unused
